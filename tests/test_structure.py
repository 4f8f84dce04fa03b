"""The house: imports go downward only, third-party packages enter by one door each, and the all-reduces are in sight."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import tpmpi

PACKAGE = Path(tpmpi.__file__).parent
FLOORS = {
    'config': 0, 'weights': 0, 'sharding': 0,
    'watchman': 0, 'launch': 1, 'watch': 1, 'comm': 1, 'device': 1, 'collectives': 1, 'shared_sums': 1, 'kernels': 1,
    'checkpoint': 1,
    'formats': 1, 'tokenizer': 1, 'chat_template': 1, 'file_layout': 1, 'checkpoint_writer': 1, 'memory': 1,
    'kv_cache': 2, 'model_shard': 2, 'model': 2, 'graphs': 2, 'fused': 2, 'footprint': 2, 'candidates': 2, 'random_model': 2,
    'text_stream': 2,
    'sampling': 3, 'block_pool': 3, 'scheduler': 3, 'engine': 3, 'trace': 3, 'batch_format': 3, 'batch_input': 3, 'lease': 3,
    'results': 3, 'progress': 3, 'arrays': 3,
    'session': 4, 'dispatch': 4, 'versions': 4, 'api': 5, 'run': 6, 'convert': 6, 'bench': 6, 'batch': 6, '__init__': 7,
}
# two modules of one floor that may know each other, and why
NEIGHBOURS = {
    ('sharding', 'config'), ('sharding', 'weights'),  # facts
    ('collectives', 'device'),  # one kind of error
    ('footprint', 'kv_cache'), ('footprint', 'model_shard'),
    ('graphs', 'model'), ('fused', 'model'), ('model', 'kv_cache'), ('model', 'model_shard'), ('model_shard', 'kv_cache'),
    ('engine', 'sampling'), ('engine', 'scheduler'), ('scheduler', 'sampling'), ('scheduler', 'block_pool'),
    ('batch_format', 'sampling'), ('batch_input', 'batch_format'), ('results', 'lease'),
    ('tokenizer', 'chat_template'), ('checkpoint', 'file_layout'), ('checkpoint', 'checkpoint_writer'),
    ('checkpoint_writer', 'file_layout'),  # parts
}
THIRD_PARTY = {
    'mpi4py': {'comm', 'shared_sums'}, 'h5py': {'checkpoint', 'checkpoint_writer', 'file_layout', 'versions', 'arrays'},
    'cupy': {'device', 'collectives', 'versions'},
    'tokenizers': {'tokenizer', 'formats'}, 'numba': {'kernels'}, 'llvmlite': {'kernels'},
    'jinja2': {'chat_template'}, 'safetensors': {'formats'}, 'gguf': {'formats'}, 'tqdm': {'convert'},
    'huggingface_hub': {'formats'}, 'numpy': None,
}
FILES = sorted(p for p in PACKAGE.rglob('*.py') if 'data' not in p.relative_to(PACKAGE).parts)


def module(path: Path) -> str:
    """The room that a file belongs to: its folder below the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path: Path):
    """(imported name, whether at the top of the file) for every import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            if node.module == 'tpmpi':
                yield from ((f'tpmpi.{alias.name}', top) for alias in node.names)
            else:
                yield node.module, top


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    here = module(path)
    assert here in FLOORS, f'{here} has no floor: give it one here and in the README'
    for name, _ in imports(path):
        parts = name.split('.')
        if parts[0] == 'tpmpi':
            there = parts[1] if len(parts) > 1 else '__init__'
            if there not in (here, '__init__') and there + '.py' != here:
                assert FLOORS[there] < FLOORS[here] or (here, there) in NEIGHBOURS, f'{here} imports {there}'
        elif parts[0] not in sys.stdlib_module_names:
            allowed = THIRD_PARTY[parts[0]]
            assert allowed is None or here in allowed, f'{here} imports {parts[0]}'


def test_numpy_is_imported_after_the_threads_are_chosen():
    """What runs before session.start must not import NumPy, at the top or through a module of ours."""
    def top_imports(room, seen):
        path = PACKAGE / f'{room}.py'
        for name, top in imports(path):
            parts = name.split('.')
            if top and parts[0] == 'tpmpi' and len(parts) > 1 and parts[1] not in seen and (PACKAGE / f'{parts[1]}.py').exists():
                seen.add(parts[1])
                top_imports(parts[1], seen)
            assert not (top and parts[0] in ('numpy', 'h5py')), f'{room} imports {parts[0]}'

    top_imports('run', {'run'})


def test_every_all_reduce_is_in_plain_sight():
    """The definitions, the embedding, the forms of the layer, norms over all heads, experts: nowhere else but to measure."""
    lines = [(module(p), line.strip()) for p in FILES for line in p.read_text().splitlines()
             if re.search(r'\ball_reduce\(', line)]
    calls = [(room, line.partition('  #')[0].strip()) for room, line in lines if room not in ('trace', 'bench', 'graphs')]
    fused = [line.partition('(')[0] for room, line in calls if room == 'kernels']
    assert fused == ['def all_reduce', 'number = all_reduce']  # at the end of each stage, where a kernel makes them
    assert [line for room, line in calls if room == 'fused'] == ['comm.all_reduce(whole)']  # between two calls
    calls = [call for call in calls if call[0] not in ('kernels', 'fused')]
    assert calls == [('comm', 'def all_reduce(self, x) -> None:'), ('model', 'comm.all_reduce(x)'),
                     ('model', 'comm.all_reduce(c)'), ('model', 'comm.all_reduce(e)'), ('model', 'comm.all_reduce(c)'),
                     ('model', 'comm.all_reduce(squares)'), ('model', 'comm.all_reduce(parts)'),
                     ('model', 'comm.all_reduce(again)')]
    assert [line for p in FILES for line in p.read_text().splitlines() if re.search(r'\.Allreduce\(', line)
            and module(p) not in ('comm', 'shared_sums')] == []


def test_files_stay_readable():
    for path in FILES:
        lines = path.read_text().count('\n')
        assert lines <= (300 if path.name == 'model.py' else 430), f'{path}: {lines} lines'


def test_no_name_of_an_architecture_outside_formats():
    for path in FILES:
        if module(path) not in ('formats', 'config'):
            assert not re.search(r'ForCausalLM|\bllama\b|\bqwen|\bmistral', path.read_text(), re.IGNORECASE), path
