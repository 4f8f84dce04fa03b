"""GGUF's blocks as our groups: the gguf package's numbers, bit for bit, from its file through ours and back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import environment

from tpmpi.checkpoint import CheckpointReader
from tpmpi.convert import convert, report
from tpmpi.formats import FormatError, open_checkpoint
from tpmpi.formats.gguf_blocks import KINDS, stored_groups
from tpmpi.sharding import rank_rows, shard, tensor_specs
from tpmpi.weights import decode, transpose

gguf = pytest.importorskip('gguf', reason='GGUF files are written and dequantized by the gguf package')
from test_formats_gguf import CONFIG, random_weights, write  # noqa: E402

Type = gguf.GGMLQuantizationType
PAIRS = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]
FITTING = dataclasses.replace(CONFIG, head_dim=32)
KEYS = {'llama__attention__key_length': 32, 'llama__attention__value_length': 32, 'llama__rope__dimension_count': 32}


def random_blocks(name: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Any bytes, with finite scales of any magnitude and sign."""
    rng = np.random.default_rng(seed)
    block, width = gguf.GGML_QUANT_SIZES[Type[name]]
    raw = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    for at in (0, 2) if name == 'Q4_1' else (0,):
        halves = rng.integers(0, 0x7000 if name == 'Q4_0' else 0x7C00, raw.shape[:2], dtype=np.uint16)  # Q4_0: below 8192
        raw[..., at:at + 2] = (halves | rng.integers(0, 2, raw.shape[:2], dtype=np.uint16) << 15).view(np.uint8).reshape(
            *raw.shape[:2], 2)
    return raw.reshape(rows, -1)


@given(st.sampled_from(PAIRS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_any_blocks_decode_to_the_package_s_numbers(pair, rows, groups, seed):
    name, kind = pair
    raw = random_blocks(name, rows, 32 * groups, seed)
    stored = stored_groups(raw, name, kind, 'x')
    expected = gguf.quants.dequantize(raw, Type[name])
    found = decode(stored)
    assert (stored.kind, stored.group_axis, found.dtype) == (kind, 1, np.float32)
    if (name, kind) == ('Q4_0', 'int4'):  # scale * 8 - 8 * scale is +0 where the package has -0
        found, expected = found + np.float32(0), expected + np.float32(0)
    assert found.tobytes() == expected.tobytes()
    if rows % 2 == 0:
        np.testing.assert_array_equal(decode(transpose(stored)), expected.T)


@pytest.mark.parametrize(('name', 'kind', 'bits'), [
    ('Q8_0', 'int8', 0x7C00), ('Q4_1', 'int4', 0xFE00), ('Q5_0', 'int8', 0x7E00), ('Q4_0', 'int4', 0x7C00),
    ('Q4_0', 'int4', 0x7001)])
def test_what_float16_cannot_say_is_refused(name, kind, bits):
    """0x7001 is the first above 8192, whose offset -8 * scale would be infinite."""
    raw = random_blocks(name, 2, 64, 0)
    raw[1, :2] = np.array([bits], '<u2').view(np.uint8)
    with pytest.raises(FormatError, match=f'tensor: a block of {name} has a scale or offset that is not finite in float16'):
        stored_groups(raw, name, kind, 'tensor')


TYPES = {'embedding': Type.Q8_0, 'q': Type.Q4_0, 'k': Type.Q4_1, 'v': Type.Q8_0, 'attn_out': Type.Q4_1, 'gate': Type.Q8_0,
         'up': Type.Q4_0, 'down': Type.Q4_0, 'head': Type.Q5_0}
KIND_OF = {Type.Q8_0: 'int8', Type.Q5_0: 'int8', Type.Q4_0: 'int4', Type.Q4_1: 'int4'}


def dequantized(weights: dict, types: dict) -> dict[str, np.ndarray]:
    """What the package says that the file's tensors are, in the order of ours."""
    specs, out = tensor_specs(FITTING), {}
    for name, weight in weights.items():
        kind = types.get(name.split('/')[-1])
        values = weight if kind is None else gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        out[name] = values.T if specs[name].transposed else values
    return out


@pytest.mark.parametrize('types', [TYPES, dict.fromkeys(TYPES, Type.Q4_0), dict.fromkeys(TYPES, Type.Q8_0)])
def test_a_quantized_file_converts_without_loss(tmp_path, types):
    """q and k with their rows in another order, attn_out and down transposed, any rank's part."""
    weights = random_weights(FITTING)
    write(tmp_path / 'model.gguf', weights, types, FITTING, **KEYS)
    changes = convert(tmp_path / 'model.gguf', tmp_path / 'model.h5')
    assert all(change.exact for change in changes.values())
    with CheckpointReader(tmp_path / 'model.h5') as reader:
        for name, expected in dequantized(weights, types).items():
            type, spec = types.get(name.split('/')[-1]), reader.specs[name]
            assert reader.kind(name) == KIND_OF.get(type, 'float32')
            for rank in range(3):
                rows = rank_rows(spec, shard(FITTING, rank, 3))
                found = decode(reader.read_rows(name, rows, verify=True))
                np.testing.assert_array_equal(found, expected[rows.start:rows.stop])


@pytest.mark.parametrize(('asked', 'exact'), [
    ('float32', set(Type)), ('bfloat16', set()), ('int8', {Type.Q8_0, Type.Q5_0, Type.Q4_0}), ('int4', {Type.Q4_0, Type.Q4_1})])
def test_a_kind_that_is_asked_for_loses_nothing_where_it_can(tmp_path, asked, exact):
    weights = random_weights(FITTING)
    write(tmp_path / 'model.gguf', weights, TYPES, FITTING, **KEYS)
    changes = convert(tmp_path / 'model.gguf', tmp_path / 'model.h5', asked)
    expected = dequantized(weights, TYPES)
    with CheckpointReader(tmp_path / 'model.h5') as reader:
        for name, spec in reader.specs.items():
            found, type = reader.read_rows(name, range(spec.shape[0])), TYPES.get(name.split('/')[-1])
            assert found.kind == (asked if spec.is_matrix else 'float32')
            assert changes[name].exact == (type in exact or type is None)
            if changes[name].exact:
                np.testing.assert_array_equal(decode(found), expected[name])
            else:
                np.testing.assert_allclose(decode(found), expected[name], atol=0.3)


def test_heads_that_cut_groups_keep_float32_by_default_and_bfloat16_where_integers_are_asked_for(tmp_path):
    write(tmp_path / 'model.gguf', random_weights(CONFIG), TYPES)
    changes = convert(tmp_path / 'model.gguf', tmp_path / 'exact.h5')
    assert changes['layers/1/attn_out'].kind == 'float32' and all(change.exact for change in changes.values())
    why = 'its 64 rows are split in units of 16, not in multiples of 32'
    assert report(changes)[-1] == f'attn_out (2) is float32 because int4 does not fit: {why}'
    changes = convert(tmp_path / 'model.gguf', tmp_path / 'int8.h5', 'int8')
    assert report(changes)[-1] == f'attn_out (2) is bfloat16 because int8 does not fit: {why}'
    assert {change.kind for name, change in changes.items() if 'attn_out' not in name and change.spec.is_matrix} == {'int8'}


def test_the_command_says_what_was_lost(tmp_path):
    write(tmp_path / 'model.gguf', random_weights(FITTING), TYPES, FITTING, **KEYS)

    def lines(*options):
        done = subprocess.run([sys.executable, '-m', 'tpmpi.convert', tmp_path / 'model.gguf', tmp_path / 'model.h5', *options],
                              capture_output=True, text=True, env=environment(), timeout=180, check=True)
        return [line.removeprefix('tpmpi.convert: ') for line in done.stderr.splitlines()]

    assert lines()[:-1] == ['Q8_0 -> int8, exact: 5 tensors', 'float32 -> float32, exact: 5 tensors',
                            'Q4_0 -> int4, exact: 6 tensors', 'Q4_1 -> int4, exact: 4 tensors', 'Q5_0 -> int8, exact: 1 tensor']
    verbose = lines('--weights', 'int4', '--verbose')
    assert verbose[0] == 'embedding [300, 64]: Q8_0 -> int4, rounded' and len(verbose) == 21 + 5 + 1
    assert 'layers/1/down [96, 64]: Q4_0 -> int4, exact' in verbose
    with CheckpointReader(tmp_path / 'model.h5') as reader:
        assert reader.file['layers/1/down'].attrs['source'] == b'Q4_0, exact'


def test_only_kinds_without_loss_are_read_as_stored(tmp_path):
    tensors = open_checkpoint(write(tmp_path / 'model.gguf', random_weights(CONFIG), {'q': Type.Q4_1, 'k': Type.BF16})).tensors
    assert tensors['layers/0/q'].exact_kinds == ('int4', 'float32') and tensors['layers/0/v'].exact_kinds == ('float32',)
    assert tensors['layers/0/k'].exact_kinds == ('bfloat16', 'float32')
    for name in ('q', 'k', 'v'):
        tensor = tensors[f'layers/0/{name}']
        for kind in tensor.exact_kinds:
            np.testing.assert_array_equal(decode(tensor.read_stored(kind)), tensor.read())
        with pytest.raises(FormatError, match='without loss it can be'):
            tensor.read_stored('int8')
