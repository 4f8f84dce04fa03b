"""Every architecture in GGUF: files written by llama.cpp's rules give the logits of transformers, and those of llama.cpp.

The references are made by references/make_families.py and references/make_gguf.py.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_threads
from rings import cache_and_rings, step_of

gguf = pytest.importorskip('gguf', reason='GGUF files are written by the gguf package')

from family_cases import logits_of  # noqa: E402
from gguf_writer import ARCHITECTURES, CASES, interleaved, llama_cpp, numbers, reference_of, write_gguf  # noqa: E402

from tpmpi.checkpoint import CheckpointReader  # noqa: E402
from tpmpi.config import ConfigError  # noqa: E402
from tpmpi.convert import prepare  # noqa: E402
from tpmpi.formats import FormatError, open_checkpoint  # noqa: E402
from tpmpi.formats.families import read_facts  # noqa: E402
from tpmpi.formats.gguf import family_keys, tensor_sources  # noqa: E402
from tpmpi.formats.gguf_families import GGUF  # noqa: E402
from tpmpi.formats.gguf_file import read_header  # noqa: E402
from tpmpi.kernels import reference as ops  # noqa: E402
from tpmpi.model import forward, logits  # noqa: E402
from tpmpi.model_shard import load_model  # noqa: E402
from tpmpi.sharding import shard  # noqa: E402

Type = gguf.GGMLQuantizationType
PROMPT = 30
REFUSED = {  # by llama.cpp, for tensors that it does not look for or wants in another shape
    'qwen3_bias': 'wrong number of tensors', 'cohere_qk_norm': 'wrong number of tensors', 'olmoe': 'has wrong shape',
    'gpt_neox_sequential': 'not found'}
OTHERWISE = {  # llama.cpp computes something else than transformers
    'phi3': 'the window of Phi-3 is turned off', 'phi3_longrope_short': 'long factors where the cache, not the text, is long',
    'phi3_partial': 'long factors where the cache, not the text, is long'}
ROUGH = ('gemma', 'phi', 'gpt')  # llama.cpp takes GELU from a table of float16


def run(path, tokens) -> np.ndarray:
    """The logits of a GGUF file, converted, on one rank: the prompt at once, then token by token.  [tokens, vocab]"""
    out = path.with_suffix('.h5')
    prepare(path, out).write(out)

    def work(comm):
        with CheckpointReader(out) as reader:
            model = load_model(reader, shard(reader.config, 0, 1), ops)
        cache, rings = cache_and_rings(model, [2] * len(model.groups), 64, ops)
        parts = []
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, len(tokens)))]:
            step = step_of(tokens[start:stop], rings, start, stop - start, length=stop)
            parts.append(logits(forward(step, model, cache, ops, comm), model, ops))
        return np.concatenate(parts)

    return on_threads(1, work)[0]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """A function that gives the logits of a case's float32 file, computed once."""
    folder = tmp_path_factory.mktemp('gguf')
    return functools.cache(lambda name: run(write_gguf(folder / f'{name}.gguf', name), reference_of(name)['tokens']))


def test_the_cases_are_of_all_architectures():
    assert {ARCHITECTURES[case.architecture] for case in CASES.values()} == set(GGUF)
    assert llama_cpp().keys() == CASES.keys()


@pytest.mark.parametrize('name', CASES)
def test_logits_are_those_of_transformers(found, name):
    reference = reference_of(name)
    wrong = np.abs(found(name)[reference['positions']] - logits_of(reference)).max()
    assert wrong < 2e-4 * reference['spread']


@pytest.mark.parametrize('name', CASES)
def test_logits_are_those_of_llama_cpp(found, name):
    theirs, spread = llama_cpp()[name], reference_of(name)['spread']
    if name in REFUSED:
        assert REFUSED[name] in theirs['refused']
        return
    expected, ours = numbers(theirs['logits'], len(theirs['positions'])), found(name)
    wrong = np.abs(ours[theirs['positions']] - expected).max()
    if name in OTHERWISE:
        assert wrong > 0.1 * spread  # no longer so: take the case out
        return
    limit = (4e-3 if name.startswith(ROUGH) else 1e-4) * spread
    assert wrong < limit
    for row, best in zip(ours, theirs['best'], strict=True):
        assert row[best] > row.max() - 2 * limit


QUANTIZED = ('phi3_longrope_long', 'gptneox_tanh', 'cohere2', 'qwen2_moe_all', 'granite_bias', 'gemma3_softcap', 'stablelm')


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0'])
@pytest.mark.parametrize('name', QUANTIZED)
def test_blocks_carry_over_where_rows_are_cut_permuted_or_of_an_expert(tmp_path, name, kind):
    """The same logits as the file with the dequantized numbers, and tensors in integers that are those very numbers."""
    kind = Type[kind]

    def decoded(keys, tensors):
        for theirs, weight in tensors.items():
            if weight.ndim > 1 and weight.shape[-1] % 32 == 0:
                tensors[theirs] = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)

    quantized, plain = (write_gguf(tmp_path / f'{of}.gguf', name, *options) for of, *options in (
        ('quantized', kind), ('plain', Type.F32, decoded)))
    integers = {'Q8_0': 'int8', 'Q4_0': 'int4'}[kind.name]
    expected, tensors = open_checkpoint(plain).tensors, open_checkpoint(quantized).tensors
    for tensor, source in tensors.items():
        np.testing.assert_array_equal(source.read(), expected[tensor].read())
    for tensor in ('q', 'k', 'v', 'experts/1/up' if 'moe' in name else 'up'):
        assert tensors[f'layers/1/{tensor}'].exact_kinds[0] == integers
    tokens = reference_of(name)['tokens'][:PROMPT + 3]
    np.testing.assert_allclose(run(quantized, tokens), run(plain, tokens), atol=1e-5 * reference_of(name)['spread'])


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q5_1'])
def test_experts_of_other_types(tmp_path, kind):
    path, raw, kind = tmp_path / 'model.gguf', {}, Type[kind]
    write_gguf(path, 'qwen2_moe_all', kind, lambda keys, tensors: raw.update(tensors))
    tensors = open_checkpoint(path).tensors
    for name in ('gate', 'up', 'down'):
        expected = gguf.quants.dequantize(gguf.quants.quantize(raw[f'blk.1.ffn_{name}_exps.weight'], kind), kind)
        for expert in range(4):
            np.testing.assert_array_equal(tensors[f'layers/1/experts/{expert}/{name}'].read(), expected[expert])


# ---- other ways to write the same


def fused(keys, tensors):
    """q, k and v in one tensor, as newer conversions may."""
    for layer in range(keys['llama.block_count']):
        for what in ('weight', 'bias'):
            parts = [tensors.pop(f'blk.{layer}.attn_{name}.{what}') for name in 'qkv']
            tensors[f'blk.{layer}.attn_qkv.{what}'] = np.concatenate(parts)


def fused_without_biases(keys, tensors):
    """Only the matrices in one tensor."""
    for layer in range(keys['llama.block_count']):
        parts = [tensors.pop(f'blk.{layer}.attn_{name}.weight') for name in 'qkv']
        tensors[f'blk.{layer}.attn_qkv.weight'] = np.concatenate(parts)


def one_by_one(keys, tensors):
    """Each expert in a tensor of its own, as before 2024-04."""
    for theirs in [name for name in tensors if name.endswith('_exps.weight')]:
        for number, weight in enumerate(tensors.pop(theirs)):
            tensors[theirs.replace('_exps.', f'.{number}.')] = weight


def by_layer(keys, tensors):
    """Numbers of heads and columns for each layer."""
    for key in ('attention.head_count', 'attention.head_count_kv', 'feed_forward_length'):
        keys[f'llama.{key}'] = [keys[f'llama.{key}']] * keys['llama.block_count']


def old_linear(keys, tensors):
    """The old key, and no type."""
    keys['llama.rope.scale_linear'] = keys.pop('llama.rope.scaling.factor')
    del keys['llama.rope.scaling.type']


def yarn_said_again(keys, tensors):
    """What follows from the factor anyway."""
    keys |= {'llama.rope.scaling.yarn_attn_factor': 1 + 0.1 * np.log(4.0).item(), 'llama.rope.scaling.yarn_ext_factor': 1.0,
             'llama.rope.scaling.yarn_beta_fast': 32.0, 'llama.rope.scaling.yarn_beta_slow': 1.0}


def embedding_model(keys, tensors):
    """One that is meant for the hidden state of a text's last token; its logits are the same."""
    keys['qwen3.pooling_type'] = 3


def pattern_as_a_list(keys, tensors):
    keys['cohere2.attention.sliding_window_pattern'] = [True, True, False, True]


@pytest.mark.parametrize('name, change', [
    ('llama', fused), ('llama', fused_without_biases), ('llama', by_layer), ('mixtral', one_by_one),
    ('llama_rope_linear', old_linear), ('llama_rope_yarn', yarn_said_again), ('cohere2', pattern_as_a_list),
    ('qwen3', embedding_model)])
def test_another_way_to_write_it_is_the_same_model(tmp_path, name, change):
    one, other = (open_checkpoint(write_gguf(tmp_path / f'{i}.gguf', name, Type.F32, c)) for i, c in enumerate((None, change)))
    assert one.config == other.config
    for tensor, source in one.tensors.items():
        np.testing.assert_array_equal(other.tensors[tensor].read(), source.read())


def test_sizes_and_patterns_that_a_file_leaves_to_llama_cpp(tmp_path):
    def config(name, **removed):
        def change(keys, tensors):
            for key, value in removed.items():
                key = f'{ARCHITECTURES[CASES[name].architecture]}.{key.replace("__", ".")}'
                keys.pop(key, None)
                if value is not None:
                    keys[key] = value
        return open_checkpoint(write_gguf(tmp_path / 'model.gguf', name, Type.F32, change)).config

    pattern = {'attention__sliding_window_pattern': None}
    gemma2 = config('gemma2_plain', attention__sliding_window=None, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (gemma2.window, gemma2.window_layers, gemma2.attention_softcap, gemma2.logit_softcap) == (4096, (0, 2), 50.0, 30.0)
    assert config('gemma3_sixth', rope__freq_base_swa=None).local_rope_theta == 10000.0
    assert config('gemma3_sixth').window_layers == (0, 1, 2, 3, 4, 6)
    gemma3 = config('gemma3_sixth', attention__sliding_window=None)
    assert (gemma3.window, gemma3.local_rope_theta) == (None, None)
    assert config('olmo3', **pattern).window_layers == (0, 1, 2)
    cohere2 = config('cohere2', **pattern)
    assert (cohere2.window_layers, cohere2.nope_layers) == ((0, 1, 2), (3,))
    assert config('phi3', attention__sliding_window=0).window is None
    assert config('granite', rope__scaling__finetuned=False).rope_theta is None
    assert config('granite', attention__scale=None).attention_scale is None
    assert config('gpt2').learned_positions == 128


def test_a_model_in_several_files(tmp_path):
    name = 'qwen2_moe_all'
    whole = open_checkpoint(write_gguf(tmp_path / 'whole.gguf', name))
    reader = gguf.GGUFReader(tmp_path / 'whole.gguf')
    writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'qwen2moe', split_max_tensors=10)
    for key, field in reader.fields.items():
        if not key.startswith(('GGUF.', 'general.architecture')):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob('model-*.gguf'))
    assert len(parts) == 4
    split = open_checkpoint(parts[0])
    assert split.config == whole.config and split.tokenizer_json == whole.tokenizer_json
    for tensor, source in whole.tensors.items():
        np.testing.assert_array_equal(split.tensors[tensor].read(), source.read())
    run(parts[0], reference_of(name)['tokens'][:PROMPT])
    with pytest.raises(FormatError, match="the architecture is None"):
        open_checkpoint(parts[1])
    parts[0].rename(tmp_path / 'renamed.gguf')
    with pytest.raises(FormatError, match='one of 4 parts; give the first one, which is called NAME-00001-of-00004.gguf'):
        open_checkpoint(tmp_path / 'renamed.gguf')
    (tmp_path / 'renamed.gguf').rename(parts[0])
    parts[3].write_bytes(parts[2].read_bytes())
    with pytest.raises(FormatError, match=r'split.no, .count and .tensors.count are \[2, 4, .*; expected \[3, 4, '):
        open_checkpoint(parts[0])
    parts[3].unlink()
    with pytest.raises(FormatError, match='model-00004-of-00004.gguf cannot be read'):
        open_checkpoint(parts[0])


# ---- what is refused


@pytest.mark.parametrize('name, key, value, message', [
    ('llama', 'attention.temperature_scale', 0.1, 'attention.temperature_scale is 0.10000.*supported is 0.0 only'),
    ('mistral3', 'attention.temperature_scale', -0.1, 'query_growth is -0.1'),
    ('mixtral', 'expert_gating_func', 2, 'expert_gating_func is 2; supported is 0 or 1 only'),
    ('mixtral', 'expert_weights_norm', False, 'expert_weights_norm is False; supported is True only'),
    ('mixtral', 'expert_used_count', [2, 1], r'expert_used_count is \[2, 1\]; supported is one number for all layers only'),
    ('mixtral', 'expert_used_count', 9, '9 of 4 experts'),
    ('qwen3', 'pooling_type', 1, 'pooling_type is 1; supported is 0 or 3 only'),
    ('qwen2', 'expert_count', 4, 'expert_count is 4; supported is 0 only'),
    ('qwen2', 'attention.sliding_window', 16, "unknown key 'attention.sliding_window'"),
    ('llama', 'attention.head_count_kv', [3, 2], r'head_count_kv is \[3, 2\]; supported is one number for all layers only'),
    ('llama', 'rope.scaling.alpha', 1000.0, "unknown key 'rope.scaling.alpha'"),
    ('llama', 'rope.scaling.type', 'ntk', "rope.scaling.type is 'ntk'; supported are none, linear, yarn, longrope"),
    ('llama', 'rope.scaling.type', 'longrope', 'rope_factors_short.weight is missing'),
    ('llama', 'rope.scaling.factor', -1.0, 'is scaled by -1.0 from 128 positions'),
    ('llama', 'rope.dimension_count', 14, 'rope.dimension_count is 14; expected an even number up to the head size 12'),
    ('llama_rope_yarn', 'rope.scaling.yarn_attn_factor', 1.5, 'yarn_attn_factor is 1.5; supported is 1.13863, what follows'),
    ('llama_rope_yarn', 'rope.scaling.yarn_beta_slow', 0.0, 'expected numbers above 0'),
    ('phi3_short', 'rope.scaling.factor', 4.0, 'rope.scaling.factor is 4.0 beside a factor for each pair'),
    ('gptneox_tanh', 'use_parallel_residual', None, 'use_parallel_residual is missing'),
    ('granite', 'logit_scale', 0.0, 'logit_scale is 0; logits are divided by it'),
    ('cohere2', 'attention.sliding_window_pattern', [True], r'is \[True\]; expected true or false for each of 4 layers'),
    ('gemma3_sixth', 'block_count', 1 << 31, 'num_layers is 2147483648'),
    ('smollm3_fourth', 'attention.key_length', 1 << 30, 'head_dim is 1073741824'),
])
def test_what_is_not_understood_is_refused_by_name(tmp_path, name, key, value, message):
    def change(keys, tensors):
        key_there = f'{ARCHITECTURES[CASES[name].architecture]}.{key}'
        keys.pop(key_there, None)
        if value is not None:
            keys[key_there] = value
        if key == 'attention.key_length':
            keys[key_there.replace('key', 'value')] = value

    with pytest.raises(FormatError, match=message):
        open_checkpoint(write_gguf(tmp_path / 'model.gguf', name, Type.F32, change))


@functools.cache
def keys_and_tensors(name):
    """The metadata of a case without the prefix, and its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        header = read_header(write_gguf(Path(folder, 'model.gguf'), name))
        found = {theirs: dataclasses.replace(source, load=functools.partial(np.ones, source.shape, np.float32))
                 for theirs, source in tensor_sources([header]).items()}
    architecture = ARCHITECTURES[CASES[name].architecture]
    return architecture, family_keys(header.metadata, architecture), found


VALUES = st.one_of(st.integers(-2, 130), st.sampled_from([1 << 31, 1 << 63]), st.floats(), st.booleans(), st.text(max_size=3),
                   st.lists(st.integers(0, 3) | st.floats() | st.text(max_size=2), max_size=7))


@settings(max_examples=400)
@given(name=st.sampled_from(list(CASES)), data=st.data())
def test_no_value_of_any_key_ends_in_another_error(name, data):
    architecture, keys, found = keys_and_tensors(name)
    family = GGUF[architecture].family(found)
    known = sorted({*family.facts, *family.fixed})
    changed = data.draw(st.dictionaries(st.sampled_from(known), VALUES, min_size=1, max_size=3))
    try:
        family.config(read_facts(keys | changed, family, lambda key: False, 'metadata'))
    except (FormatError, ConfigError):
        pass


@pytest.mark.parametrize('name, theirs, shape, message', [
    ('llama_rope_llama3', 'rope_freqs.weight', (7,), r'rope_freqs.weight has the shape \[7\]; RoPE turns 8 pairs'),
    ('llama_rope_llama3', 'rope_freqs.weight', (8,), 'rope_freqs.weight holds a factor that is no number above 0'),
    ('mixtral', 'blk.1.ffn_up_exps.weight', (3, 100, 60), r'has the shape \[3, 100, 60\]; the configuration asks for 4 experts'),
    ('phi3_short', 'blk.0.attn_qkv.weight', (120, 64), 'blk.0.attn_qkv.weight has the shape'),
    ('phi3_short', 'blk.0.ffn_up.weight', (88, 64), 'blk.0.ffn_up.weight'),
    ('qwen2', 'blk.0.attn_q.scale', (1,), r'blk.0.attn_q.scale \(\[1\]\) has no place in this architecture'),
])
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, theirs, shape, message):
    def change(keys, tensors):
        tensors[theirs] = np.zeros(shape, np.float32)

    with pytest.raises(FormatError, match=message):
        open_checkpoint(write_gguf(tmp_path / 'model.gguf', name, Type.F32, change))


def test_neighbours_of_the_rotary_part_only(tmp_path):
    """Where RoPE that turns neighbours turns a part of each head, the rest of the head stays where it is."""
    def change(keys, tensors):
        keys['cohere2.rope.dimension_count'] = 8
        tensors['blk.0.attn_q.weight'] = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)

    source = open_checkpoint(write_gguf(tmp_path / 'model.gguf', 'cohere2', Type.F32, change)).tensors['layers/0/q']
    ours = source.read().reshape(4, 16, 64)
    theirs = np.arange(64 * 64, dtype=np.float32).reshape(4, 16, 64)
    np.testing.assert_array_equal(ours[:, 8:], theirs[:, 8:])
    for head in range(4):
        np.testing.assert_array_equal(interleaved(ours[head, :8], 1), theirs[head, :8])
