"""The conversion command: what it writes is the source, and what it cannot is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ranks import environment
from references import FOLDER

from tpmpi.checkpoint import CheckpointReader
from tpmpi.weights import decode

pytest.importorskip('safetensors', reason='safetensors is not installed (the test extra has it)')
SOURCE = FOLDER / 'tiny_llama'


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'tpmpi.convert', *map(str, arguments)], capture_output=True, text=True,
                          env=environment(), timeout=60)


def source_bits() -> dict[str, np.ndarray]:
    """The bfloat16 tensors of the source as their bits, by the format's description: a length, a JSON header, the bytes."""
    data = (SOURCE / 'model.safetensors').read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + length])
    header.pop('__metadata__', None)
    assert {entry['dtype'] for entry in header.values()} == {'BF16'}
    return {name: np.frombuffer(data[8 + length:][slice(*entry['data_offsets'])], '<u2').reshape(entry['shape'])
            for name, entry in header.items()}


def stored(path, name):
    with CheckpointReader(path) as reader:
        return reader.kind(name), decode(reader.read_rows(name, range(reader.specs[name].shape[0]), verify=True))


@pytest.mark.parametrize(('options', 'kind'), [((), 'bfloat16'), (('--weights', 'float32'), 'float32')])
def test_the_tensors_are_the_source_s(tmp_path, options, kind):
    source = source_bits()
    assert run(SOURCE, tmp_path / 'model.h5', *options).returncode == 0
    for ours, theirs, transposed in (
            ('embedding', 'model.embed_tokens.weight', False), ('head', 'lm_head.weight', False),
            ('layers/1/q', 'model.layers.1.self_attn.q_proj.weight', False),
            ('layers/2/attn_out', 'model.layers.2.self_attn.o_proj.weight', True),
            ('layers/0/down', 'model.layers.0.mlp.down_proj.weight', True),
            ('layers/0/gate', 'model.layers.0.mlp.gate_proj.weight', False)):
        found, tensor = stored(tmp_path / 'model.h5', ours)
        expected = (source[theirs].astype(np.uint32) << 16).view(np.float32)
        assert found == kind
        np.testing.assert_array_equal(tensor, expected.T if transposed else expected)
    assert stored(tmp_path / 'model.h5', 'layers/0/attn_norm')[0] == 'float32'


def test_integers_that_do_not_fit_are_bfloat16_and_the_command_says_so(tmp_path):
    """Rows of 36 are no whole groups; down and attn_out have units of 64 and of 8 rows, and 200 rows in all."""
    done = run(SOURCE, tmp_path / 'model.h5', '--weights', 'int8')
    lines = [line.removeprefix('tpmpi.convert: ') for line in done.stderr.splitlines()]
    assert lines[:2] == ['bfloat16 -> bfloat16, exact: 23 tensors', 'bfloat16 -> float32, exact: 7 tensors']
    assert 'q (3) is bfloat16 because int8 does not fit: 36 columns, no multiple of 32' in lines
    why = 'its 200 rows are split in units of 64, not in multiples of 32'
    assert f'down (3) is bfloat16 because int8 does not fit: {why}' in lines
    assert stored(tmp_path / 'model.h5', 'layers/0/q')[0] == 'bfloat16'


@pytest.mark.parametrize(('value', 'message'), [(np.nan, 'q_proj.weight: a weight is not a finite number'),
                                                (1e7, 'q_proj.weight: a weight has the magnitude 1e+07; int8 reaches')])
def test_weights_that_integers_cannot_hold_are_one_line(tmp_path, value, message):
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, tmp_path / 'source')
    change_config(hidden_size=64)(tmp_path / 'source')
    tensors = {name: np.ones([64 if n == 36 else n for n in bits.shape], np.float32) for name, bits in source_bits().items()}
    tensors['model.layers.1.self_attn.q_proj.weight'][5, 5] = value
    save_file(tensors, tmp_path / 'source' / 'model.safetensors')
    done = run(tmp_path / 'source', tmp_path / 'model.h5', '--weights', 'int8')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / 'model.h5').exists()
    assert run(tmp_path / 'source', tmp_path / 'model.h5', '--weights', 'bfloat16').returncode == 0


def test_an_existing_file_is_replaced_only_by_a_whole_one(tmp_path):
    out = tmp_path / 'model.h5'
    out.write_text('old')
    broken = tmp_path / 'broken'
    shutil.copytree(SOURCE, broken)
    data = (broken / 'model.safetensors').read_bytes()
    (broken / 'model.safetensors').write_bytes(data[:len(data) // 2])
    assert run(broken, out).returncode != 0 and out.read_text() == 'old'
    assert run(SOURCE, out).returncode == 0 and out.read_bytes()[1:4] == b'HDF'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken', 'model.h5']


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | changes))
    return change


@pytest.mark.parametrize(('change', 'message'), [
    (lambda f: shutil.rmtree(f), 'does not exist'),
    (lambda f: (f / 'config.json').unlink(), 'no config.json'),
    (lambda f: (f / 'config.json').write_text('{'), 'not valid JSON'),
    (lambda f: (f / 'model.safetensors').unlink(), 'safetensors'),
    (lambda f: (f / 'tokenizer.json').unlink(), 'tokenizer.json'),
    (change_config(architectures=['FooForCausalLM']), 'FooForCausalLM'),
    (change_config(attention_sinks=4), 'attention_sinks'),
    (change_config(hidden_act='gelu_new'), 'hidden_act'),
    (change_config(num_hidden_layers=4), 'layers.3'),
    (change_config(intermediate_size=199), r'shape'),
])
def test_what_cannot_be_converted_is_one_line(tmp_path, change, message):
    folder = tmp_path / 'source'
    shutil.copytree(SOURCE, folder)
    change(folder)
    done = run(folder, tmp_path / 'model.h5')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / 'model.h5').exists()


@pytest.mark.parametrize(('out', 'message'), [('nowhere/model.h5', 'does not exist'), ('.', 'is a folder')])
def test_where_nothing_can_be_written_is_one_line(tmp_path, out, message):
    done = run(SOURCE, tmp_path / out)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_full_disk_leaves_nothing(tmp_path):
    """A file system of its own that has room for the tensors, but not for the whole file."""
    assert run(SOURCE, tmp_path / 'model.h5', '--weights', 'float32').returncode == 0
    size = (tmp_path / 'model.h5').stat().st_size - 8192
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size // 4096 * 4096}', 'tmpfs', disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip('mounting a small file system needs root')
    try:
        done = run(SOURCE, disk / 'model.h5', '--weights', 'float32')
        left = list(disk.iterdir())
    finally:
        subprocess.run(['umount', disk], check=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 'No space left on device while writing tensor' in done.stderr and left == []
