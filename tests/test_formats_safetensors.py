"""Safetensors files and their index: the right bits, and a header that lies is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tpmpi.formats import FormatError, open_checkpoint

REFERENCES = Path(__file__).parent / 'references'
LM_HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'


@pytest.fixture
def folder(tmp_path):
    """A copy of the untied checkpoint (bfloat16, one file) to spoil."""
    return shutil.copytree(REFERENCES / 'tiny_llama', tmp_path / 'model')


@pytest.fixture
def tied(tmp_path):
    """A copy of the tied checkpoint (float32, four files with an index) to spoil."""
    return shutil.copytree(REFERENCES / 'tiny_llama_tied', tmp_path / 'tied')


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_file(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name: dtype, shape and bytes of each tensor of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:start])
    header.pop('__metadata__', None)
    return {name: (e['dtype'], e['shape'], raw[start + e['data_offsets'][0]:start + e['data_offsets'][1]])
            for name, e in header.items()}


def write_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [at, at + len(data)]}
        at += len(data)
    write_raw(path, header, b''.join(data for _, _, data in tensors.values()))


def write_raw(path: Path, header, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def edit_tensors(folder: Path, change) -> None:
    tensors = read_file(folder / 'model.safetensors')
    change(tensors)
    write_file(folder / 'model.safetensors', tensors)


def test_reads_the_bits_of_the_safetensors_package():
    package = pytest.importorskip('safetensors', reason='compares with the safetensors package')
    checkpoint = open_checkpoint(REFERENCES / 'tiny_llama')
    entries = dict(package.deserialize((REFERENCES / 'tiny_llama' / 'model.safetensors').read_bytes()))
    assert len(entries) == len(checkpoint.tensors)
    tensor = checkpoint.tensors['layers/2/attn_out']
    expected = np.frombuffer(entries['model.layers.2.self_attn.o_proj.weight']['data'], '<u2').reshape(36, 72)
    assert (tensor.dtype, tensor.shape) == ('bfloat16', (36, 72))
    assert np.array_equal(tensor.read_bfloat16(), expected)
    assert np.array_equal(tensor.read(), (expected.astype(np.uint32) << 16).view(np.float32))


def test_float32_and_float16(tied):
    tensor = open_checkpoint(tied).tensors['final_norm']
    assert tensor.dtype == 'float32' and tensor.read().dtype == np.float32
    with pytest.raises(FormatError, match=r'norm.weight is float32; only bfloat16 tensors have bfloat16 bits'):
        tensor.read_bfloat16()
    file = tied / json.loads((tied / 'model.safetensors.index.json').read_text())['weight_map']['model.norm.weight']
    tensors, values = read_file(file), tensor.read().astype('<f2')
    tensors['model.norm.weight'] = ('F16', [32], values.tobytes())
    write_file(file, tensors)
    half = open_checkpoint(tied).tensors['final_norm']
    assert half.dtype == 'float16' and np.array_equal(half.read(), values)


def test_opening_reads_no_tensor(monkeypatch):
    monkeypatch.setattr('tpmpi.formats.safetensors_file.read_numbers', lambda *a: pytest.fail('a tensor was read'))
    open_checkpoint(REFERENCES / 'tiny_llama')


def set_tensor(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     r'tensor model.layers.1.mlp.up_proj.weight is missing; the configuration asks for \[200, 36\]'),
    (lambda t: t.pop(LM_HEAD), r'tensor lm_head.weight is missing'),
    (set_tensor('model.norm.weight', ('BF16', [35], bytes(70))),
     r'model.norm.weight has the shape \[35\]; the configuration asks for \[36\]'),
    (set_tensor('model.layers.0.self_attn.q_proj.bias', ('BF16', [72], bytes(144))),
     r'q_proj.bias \(\[72\]\) has no place in this architecture; leaving it out would change the result'),
    (set_tensor('model.layers.3.mlp.up_proj.weight', ('BF16', [1], bytes(2))), r'layers.3.mlp.up_proj.weight'),
    (set_tensor('model.norm.weight', ('F8_E4M3', [36], bytes(36))), 'norm.weight is F8_E4M3; supported are float32'),
])
def test_tensors_that_do_not_fit(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


def test_rotary_frequencies_are_ignored(folder):
    edit_tensors(folder, set_tensor('model.layers.0.self_attn.rotary_emb.inv_freq', ('F32', [4], bytes(16))))
    assert len(open_checkpoint(folder).tensors) == 3 * 9 + 3


def test_a_tied_head_in_the_file_must_be_the_embedding(folder):
    edit(folder / 'config.json', tie_word_embeddings=True)
    with pytest.raises(FormatError, match='tie_word_embeddings is true, but .*lm_head.weight differs from'):
        open_checkpoint(folder)
    edit_tensors(folder, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING]}))
    both = open_checkpoint(folder)
    assert 'head' not in both.tensors and both.config.tie_embeddings
    shared = both.tensors['embedding'].read()
    edit_tensors(folder, lambda tensors: tensors.pop(EMBEDDING))  # the shared matrix under its other name
    assert np.array_equal(open_checkpoint(folder).tensors['embedding'].read(), shared)


GOOD = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


@pytest.mark.parametrize('header, data, message', [
    (b'{"a"', b'', 'the header of .* is not valid JSON'),
    (b'[]', b'', 'holds a list; expected a JSON object'),
    (b'\xff\xff', b'', 'its header is not UTF-8'),
    (b'[' * 50_000, b'', 'is not valid JSON'),
    ({'a': GOOD}, bytes(7), 'do not fit F32'),
    ({'a': GOOD}, bytes(9), 'holds 9 bytes of data; its header describes 8'),
    ({'a': GOOD, 'b': GOOD}, bytes(8), 'b starts at byte 0 of the data; expected 8'),
    ({'a': GOOD | {'data_offsets': [4, 12]}}, bytes(12), 'a starts at byte 4 of the data; expected 0'),
    ({'a': GOOD | {'shape': [3]}}, bytes(8), r'data_offsets 0 to 8 do not fit F32 \[3\]'),
    ({'a': GOOD | {'shape': [1 << 61, 1 << 61, 0]}}, bytes(8), 'do not fit'),
    ({'a': GOOD | {'shape': [-2]}}, bytes(8), 'must be whole numbers from 0'),
    ({'a': GOOD | {'shape': 2}}, bytes(8), 'must be whole numbers from 0'),
    ({'a': GOOD | {'data_offsets': [8, 0]}}, bytes(8), 'do not fit'),
    ({'a': GOOD | {'data_offsets': [0.0, 8.0]}}, bytes(8), 'must be whole numbers from 0'),
    ({'a': GOOD | {'data_offsets': [0]}}, bytes(8), 'is not dtype, shape and two data_offsets'),
    ({'a': GOOD | {'dtype': 'F99'}}, bytes(8), "unknown dtype 'F99'"),
    ({'a': GOOD | {'dtype': [1]}}, bytes(8), 'unknown dtype'),
    ({'a': 5}, b'', 'is not dtype, shape and two data_offsets'),
])
def test_safetensors_headers_that_lie(folder, header, data, message):
    write_raw(folder / 'model.safetensors', header, data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize('size', [0, 3, 8, 100, 5000])
def test_truncated_safetensors(folder, size):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match=r'is no safetensors file|do not fit'):
        open_checkpoint(folder)


def test_file_that_shrinks_after_opening(folder):
    checkpoint = open_checkpoint(folder)
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(FormatError, match='ends inside a tensor'):
        for tensor in checkpoint.tensors.values():
            tensor.read()


@pytest.mark.parametrize('weight_map, message', [
    ({}, 'weight_map is missing'),
    ({'model.norm.weight': '../../etc/passwd'}, r"names the file '../../etc/passwd'; expected \*.safetensors"),
    ({'model.norm.weight': 'model.bin'}, "names the file 'model.bin'"),
    ({'model.norm.weight': 'absent.safetensors'}, 'absent.safetensors cannot be read'),
])
def test_index_that_lies(tied, weight_map, message):
    edit(tied / 'model.safetensors.index.json', weight_map=weight_map)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tied)


def test_index_and_files_must_agree(tied):
    path = tied / 'model.safetensors.index.json'
    weight_map = json.loads(path.read_text())['weight_map']
    edit(path, weight_map=weight_map | {'model.extra': weight_map['model.norm.weight']})
    with pytest.raises(FormatError, match="should hold 'model.extra', but does not"):
        open_checkpoint(tied)
    edit(path, weight_map={k: v for k, v in weight_map.items() if k != 'model.norm.weight'})
    with pytest.raises(FormatError, match='model.norm.weight: the index says None for this tensor'):
        open_checkpoint(tied)
