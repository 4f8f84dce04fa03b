"""Checkpoints by their names on the Hugging Face Hub, here a server on loopback: what is fetched, and what each failure says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hub_server import COMMIT, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import environment
from references import FOLDER

from tpmpi.formats.hub import is_hub_name

pytest.importorskip('safetensors', reason='safetensors is not installed (the test extra has it)')
hub = pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed (the hub extra has it)')
SOURCE = FOLDER / 'tiny_llama'
TEXTS = {'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A Hub of a few repositories: (its address, what it was asked)."""
    folder = tmp_path_factory.mktemp('hub')
    whole = folder / 'org' / 'whole'
    shutil.copytree(SOURCE, whole)
    for stranger in ('original/model.safetensors', 'consolidated.safetensors', 'pytorch_model.bin', 'modeling.py', 'README.md'):
        (whole / stranger).parent.mkdir(exist_ok=True)
        (whole / stranger).write_bytes(b'never read')
    sharded(folder / 'org' / 'sharded')
    sharded(folder / 'org' / 'both')
    shutil.copy(SOURCE / 'model.safetensors', folder / 'org' / 'both')
    shutil.copytree(SOURCE, folder / 'org' / 'pickled')
    (folder / 'org' / 'pickled' / 'model.safetensors').rename(folder / 'org' / 'pickled' / 'pytorch_model.bin')
    (folder / 'org' / 'quants' / 'deep').mkdir(parents=True)
    for name in ('a.Q4_0.gguf', 'deep/b.gguf', 'deep/c-00001-of-00002.gguf', 'deep/c-00002-of-00002.gguf'):
        (folder / 'org' / 'quants' / name).write_bytes(b'no GGUF, really')
    shutil.copytree(SOURCE, folder / 'org' / 'strange')
    change = json.loads((SOURCE / 'config.json').read_text()) | {'architectures': ['FooForCausalLM']}
    (folder / 'org' / 'strange' / 'config.json').write_text(json.dumps(change))
    with serve(folder) as (address, seen):
        yield address, seen


def sharded(folder):
    """A model in two files, and a third beside them that the index does not name."""
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, folder)
    data = (SOURCE / 'model.safetensors').read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')])
    tensors = {name: np.ones(entry['shape'], np.float32) for name, entry in header.items() if name != '__metadata__'}
    weight_map = {name: f'model-0000{1 + i % 2}-of-00002.safetensors' for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / 'model.safetensors').unlink()
    (folder / 'model-00003-of-00003.safetensors').write_bytes(b'never read')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def run(cwd, address, *arguments, **env):
    """The command in an empty home; returns (exit code, the lines that it said)."""
    settings = {'HF_ENDPOINT': address, 'HF_HOME': str(cwd / 'home'), 'HF_HUB_DISABLE_XET': '1'} | env
    done = subprocess.run([sys.executable, '-m', 'tpmpi.convert', *map(str, arguments)], capture_output=True, text=True,
                          cwd=cwd, env=environment(**settings), timeout=180)
    return done.returncode, [line.removeprefix('tpmpi.convert: ') for line in done.stderr.splitlines()]


def fetched(seen, repository):
    return {path.partition(f'/resolve/{COMMIT}/')[2] for method, path, _ in seen
            if method == 'GET' and path.startswith(f'{repository}/resolve/')}


def arrays(path):
    """Every dataset of a model file, and the attributes of the root."""
    with h5py.File(path) as f:
        found = {}
        f.visititems(lambda name, thing: found.update({name: thing[...].tobytes()}) if isinstance(thing, h5py.Dataset) else None)
        return found, {key: value.decode() for key, value in f.attrs.items() if key.startswith('provenance_')}


def test_a_name_gives_what_its_folder_gives(world, tmp_path):
    """Nothing else of the repository is asked for; the token goes along; the cache then serves without a network."""
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, 'org/whole', 'a.h5', HF_TOKEN='hf_secret')
    assert code == 0 and lines[-1].startswith('wrote a.h5'), lines
    assert fetched(seen, 'org/whole') == TEXTS | {'model.safetensors'}
    assert {token for _, path, token in seen if 'org/whole' in path} == {'Bearer hf_secret'}
    assert run(tmp_path, address, SOURCE, 'b.h5')[0] == 0
    (ours, about), (theirs, _) = arrays(tmp_path / 'a.h5'), arrays(tmp_path / 'b.h5')
    assert ours == theirs
    assert (about['provenance_repository'], about['provenance_revision']) == ('org/whole', COMMIT)
    assert about['provenance_source'] == 'org/whole'
    for offline in ({'HF_HUB_OFFLINE': '1'}, {'TRANSFORMERS_OFFLINE': '1'}):
        seen.clear()
        code, lines = run(tmp_path, address, 'org/whole', 'c.h5', **offline)
        assert code == 0 and seen == [] and arrays(tmp_path / 'c.h5') == (ours, about), lines
    code, lines = run(tmp_path, address, 'org/sharded', 'd.h5', HF_HUB_OFFLINE='1')
    assert code == 1 and len(lines) == 1 and 'org/sharded: not, or not wholly, in the cache' in lines[0], lines


def test_only_files_of_the_index_are_fetched(world, tmp_path):
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, 'org/sharded', 'a.h5', '--revision', COMMIT)
    assert code == 0, lines
    weights = {'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'}
    assert fetched(seen, 'org/sharded') == TEXTS | weights | {'model.safetensors.index.json'}
    assert arrays(tmp_path / 'a.h5')[1]['provenance_revision'] == COMMIT
    next((tmp_path / 'home').rglob('model-00002-of-00002.safetensors')).unlink()
    code, lines = run(tmp_path, address, 'org/sharded', 'b.h5', HF_HUB_OFFLINE='1')
    assert code == 1 and len(lines) == 1 and 'not, or not wholly, in the cache' in lines[0], lines


def test_all_parts_of_a_gguf_file(world, tmp_path):
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, 'org/quants:deep/c-00001-of-00002.gguf', 'a.h5')
    assert code == 1 and f'snapshots/{COMMIT}/deep/c-00001-of-00002.gguf is no GGUF file' in lines[0], lines
    asked = {path.rpartition('/resolve/')[2].partition('/')[2] for _, path, _ in seen if '/resolve/' in path}
    assert asked == {f'deep/c-0000{i}-of-00002.gguf' for i in (1, 2)}


def test_one_file_of_all_weights_goes_before_an_index(world, tmp_path):
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, 'org/both', 'a.h5')
    assert code == 0, lines
    assert fetched(seen, 'org/both') == TEXTS | {'model.safetensors', 'model.safetensors.index.json'}
    assert run(tmp_path, address, 'org/whole', 'b.h5')[0] == 0
    (both, _), (whole, _) = arrays(tmp_path / 'a.h5'), arrays(tmp_path / 'b.h5')
    assert both == whole
    assert run(tmp_path, address, 'org/both', 'c.h5', HF_HUB_OFFLINE='1')[0] == 0


@pytest.mark.parametrize(('arguments', 'file'), [
    (['org/quants:a.Q4_0.gguf'], 'a.Q4_0.gguf'), (['org/quants', '--gguf', 'deep/b.gguf'], 'deep/b.gguf')])
def test_one_gguf_file(world, tmp_path, arguments, file):
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, arguments[0], 'a.h5', *arguments[1:])
    assert code == 1 and len(lines) == 1 and f'snapshots/{COMMIT}/{file} is no GGUF file' in lines[0], lines
    assert {path.rpartition('/resolve/')[2].partition('/')[2] for _, path, _ in seen if '/resolve/' in path} == {file}


@pytest.mark.parametrize(('arguments', 'message'), [
    (['gone/model'], 'gone/model: no such file or folder here, and no such repository on the Hub, or a private one'),
    (['private/model'], 'set HF_TOKEN to a token that may read it'),
    (['gone/model:a.gguf'], 'no such repository on the Hub'),
    (['gated/model'], 'the repository is gated; accept its terms at http'),
    (['gated/model:a.gguf'], 'the repository is gated; accept its terms at http'),
    (['forbidden/model'], 'the Hub refuses access (HTTP 403); set HF_TOKEN'),
    (['org/whole', '--revision', 'v9'], "the repository has no revision 'v9'"),
    (['org/whole', '--revision', 'f' * 40], "the repository has no revision 'fff"),
    (['org/pickled'], 'the repository has no model.safetensors; pytorch_model.bin is a pickle'),
    (['org/quants'], 'GGUF files; name one of them: org/quants:a.Q4_0.gguf, org/quants:deep/b.gguf'),
    (['org/quants:c.gguf'], 'the repository has no c.gguf, but GGUF files; name one of them: org/quants:a.Q4_0.gguf'),
    (['org/quants:../x.gguf'], "'../x.gguf' is no name of a GGUF file"),
    (['org/whole:pytorch_model.bin'], "'pytorch_model.bin' is no name of a GGUF file"),
    (['org/strange'], 'FooForCausalLM'),
])
def test_what_cannot_be_fetched_is_one_line(world, tmp_path, arguments, message):
    address, seen = world
    seen.clear()
    code, lines = run(tmp_path, address, arguments[0], 'a.h5', *arguments[1:])
    assert code == 1 and len(lines) == 1 and message in lines[0], lines
    assert not any(path.endswith(('.safetensors', '.bin')) for _, path, _ in seen)


def test_no_network_is_one_line(tmp_path):
    code, lines = run(tmp_path, 'http://127.0.0.1:9', 'org/whole', 'a.h5')
    assert code == 1 and len(lines) == 1 and 'http://127.0.0.1:9 cannot be reached' in lines[0], lines


def test_without_huggingface_hub_the_line_says_what_to_install(world, tmp_path):
    (tmp_path / 'huggingface_hub.py').write_text('raise ImportError')
    path = environment()['PYTHONPATH']
    code, lines = run(tmp_path, world[0], 'org/whole', 'a.h5', PYTHONPATH=f'{tmp_path}:{path}')
    assert code == 1 and len(lines) == 1 and 'pip install "tpmpi[hub]"' in lines[0], lines


def test_paths_go_first(world, tmp_path):
    """Also where a folder has the name of a repository; what begins with ./ or ends like a file is never one."""
    address, seen = world
    seen.clear()
    for source, message in (('./org/whole', 'does not exist'), ('org/whole.gguf', 'does not exist'), ('whole', 'does not exist'),
                            ('a/b/c', 'does not exist')):
        code, lines = run(tmp_path, address, source, 'a.h5')
        assert code == 1 and len(lines) == 1 and message in lines[0], lines
    shutil.copytree(SOURCE, tmp_path / 'org' / 'whole')
    (tmp_path / 'org' / 'whole' / 'x.gguf').write_bytes(b'no GGUF, really')
    assert run(tmp_path, address, 'org/whole', 'a.h5')[0] == 0
    assert 'org/whole/x.gguf is no GGUF file' in run(tmp_path, address, 'org/whole:x.gguf', 'b.h5')[1][0]
    assert 'a path has no revision' in run(tmp_path, address, 'org/whole', 'b.h5', '--revision', 'main')[1][0]
    assert seen == []


def test_a_full_cache_is_one_line(world, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    room = (SOURCE / 'model.safetensors').stat().st_size // 2 + sum((SOURCE / name).stat().st_size for name in TEXTS) + 65536
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={room // 4096 * 4096}', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip('mounting a small file system needs root')
    try:
        code, lines = run(tmp_path, world[0], 'org/whole', 'a.h5', HF_HUB_CACHE=str(disk))
    finally:
        subprocess.run(['umount', disk], check=True)
    assert code == 1 and len(lines) == 1 and f'No space left on device in the cache {disk}' in lines[0], lines


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first import of huggingface_hub, and Unicode tables
@given(st.one_of(st.from_regex(r'[A-Za-z0-9._-]{1,4}/[A-Za-z0-9._-]{1,4}', fullmatch=True), st.text(max_size=8),
                 st.from_regex(r'[a-b./-]{1,8}(/[a-b.-]{1,3})?(\.git)?', fullmatch=True)))
def test_names_by_the_rules_of_the_hub(text):
    """As huggingface_hub itself judges them, but for old names without an organization, and for Unicode digits."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(text)
        expected = text.count('/') == 1 and text.isascii()
    except HFValidationError:
        expected = False
    assert is_hub_name(text) == (expected and not text.endswith(('.gguf', '.safetensors', '.h5')))
