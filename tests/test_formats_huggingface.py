"""Hugging Face folders: what is read is what transformers reads, and what is not understood is refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import environment

from tpmpi.config import ModelConfig
from tpmpi.formats import FormatError, open_checkpoint
from tpmpi.formats.families import read_facts
from tpmpi.formats.huggingface import choose_family
from tpmpi.formats.huggingface_config import NEUTRAL_KEYS
from tpmpi.formats.huggingface_families import HUGGING_FACE
from tpmpi.sharding import tensor_specs
from tpmpi.tokenizer import Tokenizer

REFERENCES = Path(__file__).parent / 'references'
NAMES = ('tiny_llama', 'tiny_llama_tied')


@pytest.fixture
def folder(tmp_path):
    """A copy of the untied checkpoint (bfloat16, one file) to spoil."""
    return shutil.copytree(REFERENCES / 'tiny_llama', tmp_path / 'model')


REMOVE = object()


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not REMOVE}))


def logits(checkpoint, ids: list[int]) -> np.ndarray:
    """The Llama of the checkpoint in float64 and in the plainest way.  [tokens, vocabulary]"""
    c = checkpoint.config
    w = {name: tensor.read().astype(np.float64) for name, tensor in checkpoint.tensors.items()}

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rope(x):  # [tokens, heads, head_dim]
        half = c.head_dim // 2
        angle = np.arange(len(x))[:, None] * c.rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w['embedding'][ids]
    for i in range(c.num_layers):
        at = f'layers/{i}/'
        a = norm(x, w[at + 'attn_norm'])
        q, k, v = ((a @ w[at + name].T).reshape(len(ids), -1, c.head_dim) for name in 'qkv')
        q, k = rope(q), rope(k)
        k, v = (np.repeat(part, c.heads_per_kv_head, 1) for part in (k, v))
        score = np.einsum('qhd,khd->hqk', q, k) / np.sqrt(c.head_dim)
        score = np.exp(np.where(np.tri(len(ids), dtype=bool), score, -np.inf))
        b = np.einsum('hqk,khd->qhd', score / score.sum(-1, keepdims=True), v)
        x = x + b.reshape(len(ids), -1) @ w[at + 'attn_out'].T
        a = norm(x, w[at + 'mlp_norm'])
        gate = a @ w[at + 'gate'].T
        x = x + (gate / (1 + np.exp(-gate)) * (a @ w[at + 'up'].T)) @ w[at + 'down'].T
    return norm(x, w['final_norm']) @ w.get('head', w['embedding']).T


# ---- what is read

@pytest.mark.parametrize('name', NAMES)
def test_gives_the_logits_of_transformers(name):
    checkpoint = open_checkpoint(REFERENCES / name)
    for case in json.loads((REFERENCES / name / 'reference.json').read_text())['cases']:
        ours = logits(checkpoint, case['ids'])[case['positions']]
        np.testing.assert_allclose(ours, case['logits'], atol=2e-4)


def test_config_of_both_checkpoints():
    untied, tied = (open_checkpoint(REFERENCES / name) for name in NAMES)
    assert untied.config == ModelConfig(
        vocab_size=300, hidden_size=36, num_layers=3, num_heads=9, num_kv_heads=3, head_dim=8, ffn_size=200,
        max_positions=256, norm_eps=1e-5, rope_theta=10000.0)
    assert tied.config == ModelConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=128,
        max_positions=256, norm_eps=1e-5, rope_theta=50000.0, tie_embeddings=True)
    assert list(tied.tensors) == list(tensor_specs(tied.config))
    assert (untied.eos_token_ids, untied.bos_token_id) == ((2,), 0)
    assert tied.provenance['architecture'] == 'LlamaForCausalLM'
    assert tied.provenance['files'].count('safetensors') == 4


# ---- config.json

@pytest.mark.parametrize('changes, fact, value', [
    ({'num_key_value_heads': REMOVE, 'num_attention_heads': 3}, 'num_kv_heads', 3),
    ({'head_dim': REMOVE, 'num_attention_heads': 9}, 'head_dim', 4),
    ({'head_dim': None, 'num_attention_heads': 9}, 'head_dim', 4),
    ({'rms_norm_eps': REMOVE}, 'norm_eps', 1e-6),
    ({'rope_parameters': REMOVE}, 'rope_theta', 10000.0),
    ({'rope_parameters': REMOVE, 'rope_theta': 500000}, 'rope_theta', 500000.0),
    ({'rope_parameters': None, 'rope_theta': 7e5, 'rope_scaling': None}, 'rope_theta', 7e5),
    ({'rope_parameters': {'rope_theta': 3e4, 'rope_type': 'default'}, 'rope_theta': 7e5}, 'rope_theta', 3e4),
    ({'rope_parameters': REMOVE, 'rope_theta': 7e5, 'rope_scaling': {'type': 'default'}}, 'rope_theta', 7e5),
    ({'max_position_embeddings': REMOVE}, 'max_positions', 2048),
    ({'tie_word_embeddings': REMOVE}, 'tie_embeddings', False),
])
def test_defaults_are_those_of_transformers(folder, changes, fact, value):
    edit(folder / 'config.json', **changes)
    values = json.loads((folder / 'config.json').read_text())
    family = HUGGING_FACE['LlamaForCausalLM']
    facts = {key: values.get(key, default) for key, default in family.facts.items()}
    assert getattr(family.config(facts), fact) == value


def config_of(architecture: str, **keys) -> ModelConfig:
    """What is read of a config.json with these keys; the others are the class's defaults."""
    values = {'architectures': [architecture]} | keys
    family, _ = choose_family(values)
    return family.config(read_facts(values, family, NEUTRAL_KEYS.__contains__, 'config.json'))


@pytest.mark.parametrize('architecture, keys', [
    ('LlamaForCausalLM', {'pretraining_tp': 2, 'max_sequence_length': 2048, 'tf_legacy_loss': False}),
    ('GPT2LMHeadModel', {'_num_labels': 1, 'num_labels': 1, 'output_past': True, 'predict_special_tokens': True}),
    ('GPTNeoXForCausalLM', {'custom_pipelines': {}, 'partial_rotary_factor': 0.25, 'rope_theta': 10000}),
    ('PhiForCausalLM', {'rotary_dim': 32, 'attention_bias': True}), ('StableLmForCausalLM', {'num_heads': 32}),
    ('Cohere2ForCausalLM', {'_sliding_window_pattern': 4}),
    ('Qwen3MoeForCausalLM', {'qkv_bias': False, 'use_qk_norm': True, 'shared_expert_intermediate_size': 0}),
])
def test_keys_of_published_files_that_say_nothing_new(architecture, keys):
    assert config_of(architecture, **keys) == config_of(architecture)


@pytest.mark.parametrize('architecture, keys, fact, value', [
    ('Qwen2ForCausalLM', {'dual_chunk_attention_config': {'chunk_size': 262144, 'local_size': 8192},
                          'max_position_embeddings': 1010000}, 'max_positions', 253952),
    ('MistralForCausalLM', {'layer_types': ['full_attention', *['sliding_attention'] * 3] * 8}, 'window_layers',
     tuple(i for i in range(32) if i % 4)),
    ('LlamaForCausalLM', {'max_position_embeddings': 4096, 'rope_scaling': {'type': 'linear', 'factor': 4.0}},
     'max_positions', 16384),
    ('CohereForCausalLM', {'model_max_length': 131072}, 'max_positions', 131072),  # Command R
    ('Qwen3ForCausalLM', {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768,
                                           'attn_factor': 1 / (0.1 * math.log(4) + 1)}}, 'rope_magnitude', pytest.approx(1.0)),
    ('Gemma2ForCausalLM', {'num_hidden_layers': 6}, 'window_layers', (0, 2, 4)),
    ('Gemma3ForCausalLM', {'num_hidden_layers': 12}, 'window_layers', tuple(i for i in range(12) if i % 6 != 5)),
])
def test_keys_of_published_files_that_matter(architecture, keys, fact, value):
    assert getattr(config_of(architecture, **keys), fact) == value


def test_buffers_of_older_checkpoints_hold_nothing_new():
    ignored = HUGGING_FACE['LlamaForCausalLM'].ignored_tensors
    for name in ('model.layers.3.self_attn.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq'):
        assert ignored.fullmatch(name) and not ignored.fullmatch(name.replace('inv_freq', 'weight'))


@pytest.mark.parametrize('architecture, keys, message', [
    ('GPTNeoXForCausalLM', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5; expected 0.25, as the other keys say'),
    ('PhiForCausalLM', {'partial_rotary_factor': 1e-9}, 'partial_rotary_factor is 1e-09, none of'),
    ('GPTNeoXForCausalLM', {'rope_theta': 5e5}, 'rope_theta is 500000.0; expected 10000'),
    ('PhiForCausalLM', {'rotary_dim': 64}, 'rotary_dim is 64; expected 32'),
    ('Qwen3ForCausalLM', {'dual_chunk_attention_config': {'chunk_size': 8}}, 'local_size is None; expected a whole number'),
    ('Qwen3ForCausalLM', {'dual_chunk_attention_config': {'chunk_size': 8, 'local_size': 8}}, 'chunk_size is 8 and local_size 8'),
    ('Qwen3ForCausalLM', {'dual_chunk_attention_config': [8]}, 'dual_chunk_attention_config is .8.; expected null or an object'),
    ('Qwen3MoeForCausalLM', {'shared_expert_intermediate_size': 8}, 'shared_expert_intermediate_size is 8'),
    ('Qwen3MoeForCausalLM', {'qkv_bias': True}, 'qkv_bias is True; supported is False only'),
    ('MixtralForCausalLM', {'num_local_experts': []}, r'num_local_experts is \[\]; expected a whole number'),
    ('GemmaForCausalLM', {'hidden_size': 10 ** 400}, 'hidden_size is 1000.*; expected a whole number of less than 63 bits'),
    ('LlamaForCausalLM', {'auto_map': {'AutoModelForCausalLM': 'modeling_llama.LlamaForCausalLM'}}, "unknown key 'auto_map'"),
])
def test_second_spellings_must_agree(architecture, keys, message):
    with pytest.raises(FormatError, match=message):
        config_of(architecture, **keys)


def test_keys_without_influence_are_accepted(folder):
    edit(folder / 'config.json', torch_dtype='float16', use_cache=False, _name_or_path='x', unsloth_version='1',
         **{'transformers.js_config': {'kv_cache_dtype': {}}}, is_llama_config=True, rope_interleaved=False)
    open_checkpoint(folder)
    for name, family in HUGGING_FACE.items():
        known = [*NEUTRAL_KEYS | family.neutral, *family.facts, *family.fixed]
        assert len(known) == len(set(known)), f'{name} has a key twice'


@pytest.mark.parametrize('changes, message', [
    ({'qk_norm': True}, r"unknown key 'qk_norm' \(value True\); tpmpi does not know what it means"),
    ({'logits_scaling': 8.0}, "unknown key 'logits_scaling'"),
    ({'auto_map': {'AutoModel': 'x--y'}}, "unknown key 'auto_map'"),
    ({'hidden_act': 'quick_gelu'}, "hidden_act is 'quick_gelu'; supported are silu, swish, gelu"),
    ({'attention_bias': 0}, 'attention_bias is 0; expected true or false'),
    ({'attention_bias': True}, 'q_proj.bias is missing'),
    ({'mlp_bias': True}, 'gate_proj.bias is missing'),
    ({'sliding_window': 4096}, 'sliding_window is 4096'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config is .*gptq'),
    ({'rope_interleaved': True}, 'rope_interleaved is True'),
    ({'rope_scaling': {'type': 'mrope', 'factor': 2.0}}, "rope_scaling asks for RoPE of type 'mrope'; supported is default,"),
    ({'rope_scaling': {'type': ['yarn']}}, "rope_scaling asks for RoPE of type .'yarn'."),
    ({'rope_scaling': {'type': 'linear'}}, 'rope_scaling has no factor'),
    ({'rope_scaling': {'type': 'linear', 'factor': 0.5}}, 'the factor 0.5; expected more than 1, and 1 or more'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'beta': 1}}, "holds 'beta'; .* RoPE of type yarn"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'attn_factor': 'a'}}, "attn_factor is 'a'; expected a number"),
    ({'rope_scaling': {'type': 'longrope', 'long_factor': [1.0] * 4, 'short_factor': [1.0] * 3}},
     'short_factor is .*; expected 4 numbers, one for each pair'),
    ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0}}, 'has no low_freq_factor'),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4, 'factor': 8.0}}, "rope_parameters holds 'factor'"),
    ({'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor is 0.5; expected 1.0'),
    ({'rope_parameters': [1]}, 'rope_parameters is .1.; expected null or an object'),
    ({'rope_parameters': {'rope_theta': '1e4'}}, "rope_theta is '1e4'; expected a number"),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan; expected a number'),
    ({'hidden_size': '36'}, "hidden_size is '36'; expected a whole number"),
    ({'hidden_size': 36.0}, 'hidden_size is 36.0; expected a whole number'),
    ({'num_hidden_layers': True}, 'num_hidden_layers is True'),
    ({'num_hidden_layers': 10 ** 9}, 'num_layers is 1000000000; expected a whole number from 1 to'),
    ({'num_attention_heads': 0, 'head_dim': None}, 'hidden_size 36 is no multiple of num_attention_heads 0'),
    ({'num_key_value_heads': 2}, '9 query heads cannot share 2 KV heads evenly'),
    ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings is 'yes'; expected true or false"),
    ({'architectures': ['BloomForCausalLM']}, r"architectures is .'BloomForCausalLM'.; supported is one of LlamaFor"),
    ({'architectures': ['LlamaForSequenceClassification']}, 'LlamaForSequenceClassification'),
    ({'architectures': REMOVE}, 'architectures is None'),
    ({'head_dim': 0}, 'head_dim is 0; expected a whole number from 1'),
    ({'head_dim': 10 ** 12, 'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 'head_dim is 1000000000000; expected'),
    ({'hidden_size': 0, 'head_dim': None}, 'hidden_size is 0; expected a whole number from 1'),
    ({'hidden_size': 10 ** 400, 'head_dim': None}, 'config.json: hidden_size is 1000.*; expected a whole number of less than 63'),
    ({'max_position_embeddings': 0, 'rope_scaling': {'type': 'yarn', 'original_max_position_embeddings': 32}},
     'max_positions is 0; expected a whole number from 1'),
    ({'rope_scaling': {'type': 'linear', 'factor': 1e300 / 8}}, 'the factor 1.25e.299; expected more than 1, and'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 10 ** 400}},
     'original_max_position_embeddings is 1000.*; expected a whole number of less than 63 bits'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'beta_fast': -1}}, 'beta_fast and beta_slow are -1.0 and 1.0; expected'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'beta_slow': -1}}, 'beta_fast and beta_slow are 32.0 and -1.0; expected'),
    ({'rope_scaling': {'type': 'yarn', 'factor': math.e, 'mscale': 1, 'mscale_all_dim': -10.0}},  # 1 + ln(factor) * -10 / 10
     'mscale_all_dim is -10.0, which makes a magnitude of 0.0; expected one above 0'),
    ({'architectures': [[1]]}, r'architectures is \[\[1\]\]; supported is one of LlamaFor'),
    ({'eos_token_id': 300}, 'generation_config.json: eos_token_id is 300; expected a token id from 0 to 299'),
])
def test_what_is_not_understood_is_refused_by_name(folder, changes, message):
    edit(folder / 'config.json', **changes)
    if 'eos_token_id' in changes:
        edit(folder / 'generation_config.json', **changes)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize('error', [
    TypeError('unhashable'), KeyError('x'), IndexError(3), AttributeError('x'), ZeroDivisionError('x'), OverflowError('x'),
    MemoryError(), ValueError('math domain error')], ids=lambda error: type(error).__name__)
def test_what_no_check_foresaw_names_the_file(folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr('tpmpi.formats.huggingface.choose_family', fail)
    with pytest.raises(FormatError) as found:
        open_checkpoint(folder)
    text = f'{type(error).__name__}: {error}'
    assert str(found.value) == f'{folder / "config.json"} cannot be read ({text}); look for a value of a wrong type or size'
    monkeypatch.undo()
    monkeypatch.setattr('tpmpi.formats.huggingface.open_tokenizer', fail)
    with pytest.raises(FormatError, match=f'^{folder} cannot be read .{type(error).__name__}: '):
        open_checkpoint(folder)


@pytest.mark.parametrize('file', ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
                                  'chat_template.jinja', 'model.safetensors', 'model.safetensors.index.json'])
@pytest.mark.parametrize('linked', [False, True])
def test_a_pipe_is_refused_at_once(folder, file, linked):
    for name in (file, 'model.safetensors') if file.endswith('index.json') else (file,):  # that goes before an index
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / ('pipe' if linked else file))
    if linked:
        (folder / file).symlink_to('pipe')
    assert in_time(folder).endswith(f'{file} is no regular file; expected one, or a link to one')


def in_time(source) -> str:
    """The last line of what a process that opens a checkpoint says; it does not wait for ever."""
    code = 'import sys; from pathlib import Path; from tpmpi.formats import open_checkpoint; open_checkpoint(Path(sys.argv[1]))'
    return subprocess.run([sys.executable, '-c', code, source], capture_output=True, text=True, timeout=90,
                          env=environment()).stderr.splitlines()[-1]


@pytest.mark.parametrize('text, message', [
    ('', 'is not valid JSON'), ('[1]', 'holds a list; expected a JSON object'), ('{"a": ', 'is not valid JSON'),
    ('[' * 100_000, 'is not valid JSON'), ('{"architectures": ["LlamaForCausalLM"], "x": "\udcff"}', 'cannot be read'),
])
def test_config_that_is_no_json(folder, text, message):
    (folder / 'config.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


# ---- folders

def test_pickles_are_never_opened(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(FormatError, match='pytorch_model.bin is a pickle, which can run any code'):
        open_checkpoint(folder)


def test_sources_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(FormatError, match='does not exist; expected a Hugging Face folder or a .gguf file'):
        open_checkpoint(tmp_path / 'absent')
    with pytest.raises(FormatError, match='is no checkpoint: it has no config.json'):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match='is neither a Hugging Face folder'):
        open_checkpoint(folder / 'config.json')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FormatError, match='has no model.safetensors and no model.safetensors.index.json'):
        open_checkpoint(folder)


# ---- tokenizer

def tokenizer_of(folder: Path) -> tuple[Tokenizer, object]:
    checkpoint = open_checkpoint(folder)
    return Tokenizer(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.bos_token_id,
                     checkpoint.eos_token_ids), checkpoint


def test_bos_and_eos_around_a_text(folder):
    plain = tokenizer_of(folder)[0].encode('The')
    edit(folder / 'tokenizer_config.json', add_bos_token=True)
    assert tokenizer_of(folder)[0].encode('The') == [0, *plain]
    edit(folder / 'tokenizer_config.json', add_eos_token=True)
    assert tokenizer_of(folder)[0].encode('The') == [0, *plain, 2]
    assert tokenizer_of(folder)[0].encode('The', add_special_tokens=False) == plain


def test_an_explicit_setting_goes_before_the_post_processor(tmp_path):
    folder = shutil.copytree(REFERENCES / 'tiny_llama_tied', tmp_path / 'model')
    assert tokenizer_of(folder)[0].encode('The')[0] == 0
    edit(folder / 'tokenizer_config.json', add_bos_token=False)
    assert tokenizer_of(folder)[0].encode('The')[0] != 0


def test_one_setting_leaves_the_other_token_as_it_is(tmp_path):
    folder = shutil.copytree(REFERENCES / 'tiny_llama_tied', tmp_path / 'model')
    plain = tokenizer_of(folder)[0].encode('The')
    for settings in ({'add_eos_token': False}, {'add_eos_token': False, 'add_bos_token': None}):
        edit(folder / 'tokenizer_config.json', **settings)
        assert tokenizer_of(folder)[0].encode('The') == plain
    edit(folder / 'tokenizer_config.json', add_eos_token=True)
    tokenizer, checkpoint = tokenizer_of(folder)
    assert tokenizer.encode('The') == [*plain, checkpoint.eos_token_ids[0]]


def test_what_else_encloses_a_text_stays(tmp_path):
    """Qwen3's embedding models end a text with a token that is not eos, and say add_bos_token: false."""
    folder = shutil.copytree(REFERENCES / 'tiny_llama_tied', tmp_path / 'model')
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    known = {entry['content']: entry['id'] for entry in tokenizer['added_tokens']}
    other, eos = list(known)[1:3]
    plain = tokenizer_of(folder)[0].encode('The', add_special_tokens=False)
    first, second = ({'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB'))
    edit(folder / 'tokenizer.json', post_processor={
        'type': 'TemplateProcessing', 'single': [first, {'SpecialToken': {'id': other, 'type_id': 0}}], 'pair': [first, second],
        'special_tokens': {other: {'id': other, 'ids': [known[other]], 'tokens': [other]}}})
    bos = list(known)[0]
    for settings, expected in (
            ({}, [*plain, known[other]]), ({'add_bos_token': False, 'bos_token': None}, [*plain, known[other]]),
            ({'add_bos_token': False, 'bos_token': bos}, [*plain, known[other]]),
            ({'add_bos_token': True}, [known[bos], *plain, known[other]]),
            ({'add_eos_token': True, 'eos_token': eos}, [known[bos], *plain, known[other], known[eos]]),
            ({'add_bos_token': False, 'eos_token': other, 'add_eos_token': False}, plain)):
        edit(folder / 'tokenizer_config.json', **settings)
        assert tokenizer_of(folder)[0].encode('The') == expected, settings


def test_special_tokens_map_of_older_folders(folder):
    (folder / 'special_tokens_map.json').write_text(json.dumps({'bos_token': {'content': 'a'}, 'eos_token': 'e'}))
    vocab = json.loads((folder / 'tokenizer.json').read_text())['model']['vocab']
    tokenizer, checkpoint = tokenizer_of(folder)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids[0]) == (vocab['a'], vocab['e'])
    assert tokenizer.decode(tokenizer.encode('xex')) == 'xx'
    edit(folder / 'tokenizer_config.json', added_tokens_decoder={})
    assert tokenizer_of(folder)[1].bos_token_id == 0  # tokenizer_config.json tells all


@pytest.mark.parametrize(('flags', 'text'), [
    ({}, 'a <x>  b'), ({'rstrip': True}, 'a <x>b'), ({'lstrip': True}, 'a<x>  b'), ({'single_word': True}, 'a <x>  b')])
def test_how_an_added_token_is_found_is_as_the_settings_say(folder, flags, text):
    add(folder, '<x>')
    edit(folder / 'tokenizer_config.json', added_tokens_decoder={'299': {'content': '<x>', 'special': False} | flags})
    tokenizer = tokenizer_of(folder)[0]
    assert tokenizer.decode(tokenizer.encode('a <x>  b')) == text
    assert (299 in tokenizer.encode('a<x>b')) == ('single_word' not in flags)


def test_an_added_token_that_only_the_settings_have(folder):
    drop_last(folder)
    edit(folder / 'tokenizer_config.json', added_tokens_decoder={'299': {'content': '<new>', 'special': True}})
    tokenizer = tokenizer_of(folder)[0]
    assert 299 in tokenizer.encode('a<new>b') and tokenizer.decode(tokenizer.encode('a<new>b')) == 'ab'


@pytest.mark.parametrize(('settings', 'expected'), [
    ({}, '[][<|endoftext|>][]'),
    ({'pad_token': '<|im_start|>', 'unk_token': {'content': 'e"'}}, '[<|im_start|>][<|endoftext|>][e"]'),
    ({'bos_token': None}, '[][][]'), ({'extra_special_tokens': {'image_token': '<|im_end|>'}}, '[][<|endoftext|>][]<|im_end|>')])
def test_special_tokens_that_a_template_names(folder, settings, expected):
    (folder / 'chat_template.jinja').write_text(
        '  {%- for m in messages %}[{{ pad_token }}][{{ bos_token }}][{{ unk_token }}]{{ image_token }}{% endfor %}')
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['model']['vocab'] = {('e"' if id == 299 else token): id for token, id in tokenizer['model']['vocab'].items()}
    tokenizer['model']['merges'] = tokenizer['model']['merges'][:-1]
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    edit(folder / 'tokenizer_config.json', **settings)
    read = tokenizer_of(folder)[0]
    ids = read.apply_chat_template([{'role': 'user', 'content': 'x'}])
    assert read._backend.decode(ids, skip_special_tokens=False) == expected


def add(folder: Path, content: str) -> None:
    """An added token in place of the vocabulary's last one."""
    drop_last(folder)
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['added_tokens'].append({'id': 299, 'content': content, 'special': False} | ADDED)
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))


def drop_last(folder: Path) -> None:
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['model']['vocab'] = {token: id for token, id in tokenizer['model']['vocab'].items() if id != 299}
    tokenizer['model']['merges'] = tokenizer['model']['merges'][:-1]  # the one that makes token 299
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))


def test_ends_of_a_text(folder):
    edit(folder / 'generation_config.json', eos_token_id=[5, 2, 0])
    assert tokenizer_of(folder)[1].eos_token_ids == (2, 5, 0)  # the tokenizer's own first
    edit(folder / 'generation_config.json', eos_token_id=REMOVE)
    edit(folder / 'config.json', eos_token_id=7)
    assert tokenizer_of(folder)[1].eos_token_ids == (2, 7)
    edit(folder / 'tokenizer_config.json', eos_token=None, bos_token=None)
    edit(folder / 'config.json', eos_token_id=None)
    assert (tokenizer_of(folder)[1].eos_token_ids, tokenizer_of(folder)[1].bos_token_id) == ((), None)
    edit(folder / 'tokenizer_config.json', eos_token=REMOVE, bos_token=REMOVE)
    edit(folder / 'config.json', eos_token_id=REMOVE, bos_token_id=REMOVE)
    assert (tokenizer_of(folder)[1].eos_token_ids, tokenizer_of(folder)[1].bos_token_id) == ((2,), 1)  # LlamaConfig's


def test_a_named_token_becomes_special(folder):
    edit(folder / 'tokenizer_config.json', eos_token={'content': 'e', '__type': 'AddedToken'})
    tokenizer, checkpoint = tokenizer_of(folder)
    assert tokenizer.decode(tokenizer.encode('xex')) == 'xx'
    assert checkpoint.eos_token_ids[0] == json.loads(checkpoint.tokenizer_json)['model']['vocab']['e']


ADDED = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}


@pytest.mark.parametrize('settings, special', [
    ({}, False), ({'eos_token': '<x>'}, True), ({'sep_token': '<x>'}, True), ({'extra_special_tokens': {'image': '<x>'}}, True),
    ({'added_tokens_decoder': {'299': {'content': '<x>', 'special': True}}}, True),
    ({'added_tokens_decoder': {'299': {'content': '<x>', 'special': False}}}, False),
])
def test_added_tokens_are_special_where_the_settings_say_so(folder, settings, special):
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['model']['vocab'] = {('<x>' if id == 299 else token): id for token, id in tokenizer['model']['vocab'].items()}
    tokenizer['model']['merges'] = tokenizer['model']['merges'][:-1]  # the one that makes token 299
    tokenizer['added_tokens'].append({'id': 299, 'content': '<x>', 'special': False} | ADDED)
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    edit(folder / 'tokenizer_config.json', **settings)
    tokenizer = tokenizer_of(folder)[0]
    assert tokenizer.decode(tokenizer.encode('a<x>b')) == ('ab' if special else 'a<x>b')


def test_added_tokens_for_which_the_model_has_no_row(folder):
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    extra = {'id': 300, 'content': '<picture>', 'special': True} | ADDED
    edit(folder / 'tokenizer.json', added_tokens=[*tokenizer['added_tokens'], extra])
    edit(folder / 'tokenizer_config.json', added_tokens_decoder={'300': extra}, pad_token='<picture>')
    read = tokenizer_of(folder)[0]
    assert max(read.encode('a<picture>b')) < 300 and read.decode(read.encode('a<picture>b')) == 'a<picture>b'
    (folder / 'chat_template.jinja').write_text('{{ "<picture>" }}')
    with pytest.raises(FormatError, match='has token ids up to 300; config.json allows vocab_size 300'):
        open_checkpoint(folder)


@pytest.mark.parametrize('source, expected', [
    ({'chat_template': 'one'}, 'one'), ({}, None),
    ({'chat_template': [{'name': 'tool_use', 'template': 'a'}, {'name': 'default', 'template': 'b'}]}, 'b'),
])
def test_chat_template(folder, source, expected):
    inside = (folder / 'chat_template.jinja').read_text()
    edit(folder / 'tokenizer_config.json', **source)
    assert open_checkpoint(folder).chat_template == inside  # the file of its own goes first
    (folder / 'chat_template.jinja').unlink()
    assert open_checkpoint(folder).chat_template == expected


@pytest.mark.parametrize('file, changes, message', [
    ('tokenizer_config.json', {'chat_template': 5}, 'chat_template is 5; expected text'),
    ('tokenizer_config.json', {'eos_token': '<end>'}, "eos_token is '<end>', which tokenizer.json does not have"),
    ('tokenizer_config.json', {'eos_token': 5}, 'eos_token is 5; expected a token or null'),
    ('tokenizer_config.json', {'added_tokens_decoder': {'299': {'content': '<new>'}}},
     "gives token '<new>' the id 299; tokenizer.json gives it None"),
    ('tokenizer_config.json', {'added_tokens_decoder': {'0': {'content': ['x']}}},
     r"added_tokens_decoder has \['x'\] as token '0'; expected its text"),
    ('tokenizer_config.json', {'added_tokens_decoder': {'0': None}}, "has None as token '0'; expected its text"),
    ('tokenizer_config.json', {'added_tokens_decoder': [5]}, 'added_tokens_decoder is .5.; expected an object'),
    ('tokenizer.json', {'model': {}}, 'no vocabulary with token ids'),
    ('tokenizer.json', {'model': {'vocab': {'a': 'b'}}}, 'no vocabulary with token ids'),
    ('tokenizer.json', {'added_tokens': [5]}, 'no vocabulary with token ids'),
    ('tokenizer.json', {'added_tokens': [{'id': 300, 'content': '<|im_end|>'}]},  # the tokenizer's eos
     'has token ids up to 300; config.json allows vocab_size 300'),
    ('tokenizer.json', {'added_tokens': [{'id': 0, 'content': '\ud800'}]}, 'a token is not valid Unicode'),
    ('generation_config.json', {'eos_token_id': '2'}, "eos_token_id is '2'; expected a token id"),
])
def test_tokenizer_files_that_do_not_fit(folder, file, changes, message):
    edit(folder / file, **changes)
    (folder / 'chat_template.jinja').unlink()
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


def test_folder_without_tokenizer(folder):
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(FormatError, match='has no tokenizer.json'):
        open_checkpoint(folder)
