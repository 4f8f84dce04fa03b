"""GGUF files: tiny ones written here by the gguf package, and the real SmolLM2 where its path is given."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import environment

from tpmpi.config import ModelConfig
from tpmpi.convert import convert
from tpmpi.formats import FormatError, open_checkpoint
from tpmpi.sharding import tensor_specs
from tpmpi.tokenizer import Tokenizer

gguf = pytest.importorskip('gguf', reason='GGUF files are written and dequantized by the gguf package')

from gguf_writer import ALPHABET, interleaved  # noqa: E402

Type = gguf.GGMLQuantizationType

REFERENCES = Path(__file__).parent / 'references'
SMOLLM2 = os.environ.get('TPMPI_SMOLLM2_GGUF')
real_model = pytest.mark.skipif(
    not SMOLLM2, reason='TPMPI_SMOLLM2_GGUF is not set; it is the path of SmolLM2-135M-Instruct.Q4_1.gguf')

CONFIG = ModelConfig(vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                     ffn_size=96, max_positions=128, norm_eps=1e-5, rope_theta=5e4)
NAMES = {
    'attn_norm': 'attn_norm', 'q': 'attn_q', 'k': 'attn_k', 'v': 'attn_v', 'attn_out': 'attn_output',
    'mlp_norm': 'ffn_norm', 'gate': 'ffn_gate', 'up': 'ffn_up', 'down': 'ffn_down', 'embedding': 'token_embd',
    'final_norm': 'output_norm', 'head': 'output'}
TOKENS = ALPHABET + ['in', 'Ġt', 'he', 'Ġthe', 'ĠĠ', '<|im_start|>', '<|im_end|>', '<think>'] + [
    f'<unused{n}>' for n in range(36)]
TYPES = [1] * 261 + [3, 3, 4] + [5] * 36
MERGES = ['i n', 'Ġ t', 'h e', 'Ġt he', 'Ġ Ġ']
TOKENIZER = {
    'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.tokens': TOKENS,
    'tokenizer.ggml.token_type': TYPES, 'tokenizer.ggml.merges': MERGES, 'tokenizer.ggml.bos_token_id': 261,
    'tokenizer.ggml.eos_token_id': 262, 'tokenizer.ggml.add_bos_token': False, 'tokenizer.chat_template': 'x'}
FACTS = {
    'llama.context_length': 128, 'llama.embedding_length': 64, 'llama.block_count': 2, 'llama.feed_forward_length': 96,
    'llama.attention.head_count': 4, 'llama.attention.head_count_kv': 2, 'llama.rope.freq_base': 5e4,
    'llama.attention.layer_norm_rms_epsilon': 1e-5, 'llama.rope.dimension_count': 16, 'llama.vocab_size': 300,
    'general.name': 'Tiny', 'general.file_type': 0}
REMOVE = object()


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by our names, [out, in]."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(spec.shape[::-1] if spec.transposed else spec.shape).astype(np.float32)
            for name, spec in tensor_specs(config).items()}


def write(path: Path, weights: dict, types: dict[str, Type] | None = None, config=CONFIG, **keys) -> Path:
    """A GGUF file.  A weight is float32, or blocks of bytes and their type; `types` quantizes tensors by last name;
    `keys` with '__' for '.' change the metadata."""
    writer = gguf.GGUFWriter(path, 'llama')
    for key, value in (FACTS | TOKENIZER | {key.replace('__', '.'): value for key, value in keys.items()}).items():
        if value is REMOVE:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint64 if value >> 32 else writer.add_uint32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, weight in weights.items():
        last = name.split('/')[-1]
        theirs = f'blk.{name.split("/")[1]}.{NAMES[last]}.weight' if '/' in name else NAMES.get(name, name) + '.weight'
        kind = (types or {}).get(last, Type.F32)
        data, kind = weight if isinstance(weight, tuple) else (gguf.quants.quantize(weight, kind), kind)
        if last in 'qk':
            data = interleaved(data, config.num_heads if last == 'q' else config.num_kv_heads)
        writer.add_tensor(theirs, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'model.gguf'


def tokenizer_of(checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.bos_token_id,
                     checkpoint.eos_token_ids)


# ---- what is read

def test_float32_comes_back_bit_for_bit_in_the_order_of_hugging_face(path):
    weights = random_weights(CONFIG)
    checkpoint = open_checkpoint(write(path, weights))
    assert checkpoint.config == ModelConfig(**{**vars(CONFIG), 'norm_eps': float(np.float32(1e-5))})
    assert list(checkpoint.tensors) == list(weights)
    for name, weight in weights.items():
        assert checkpoint.tensors[name].dtype == 'float32'
        assert np.array_equal(checkpoint.tensors[name].read(), weight), name
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids, checkpoint.chat_template) == (261, (262,), 'x')
    assert checkpoint.provenance['source'] == 'model.gguf' and checkpoint.provenance['name'] == 'Tiny'


def test_no_output_tensor_means_tied_and_defaults_are_those_of_llama_cpp(path):
    weights = random_weights(CONFIG)
    del weights['head']
    removed = {key: REMOVE for key in ('llama__vocab_size', 'llama__rope__freq_base', 'llama__rope__dimension_count')}
    config = open_checkpoint(write(path, weights, **removed)).config
    assert (config.tie_embeddings, config.vocab_size, config.rope_theta) == (True, 300, 10000.0)
    weights = random_weights(ModelConfig(**{**vars(CONFIG), 'num_kv_heads': 4}))
    config = open_checkpoint(write(path, weights, config=ModelConfig(**{**vars(CONFIG), 'num_kv_heads': 4}),
                                   llama__attention__head_count_kv=REMOVE)).config
    assert (config.num_kv_heads, config.tie_embeddings) == (4, False)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0'])
def test_types_that_the_package_can_write(path, kind):
    weights, kind = random_weights(CONFIG), Type[kind]
    checkpoint = open_checkpoint(write(path, weights, {name: kind for name in ('q', 'k', 'gate', 'down', 'embedding')}))
    for name in ('layers/1/q', 'layers/0/k', 'layers/1/gate', 'layers/0/down', 'embedding'):
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
        assert np.array_equal(checkpoint.tensors[name].read(), expected), name
    assert checkpoint.tensors['embedding'].dtype == {'F16': 'float16', 'BF16': 'bfloat16'}.get(kind.name, kind.name)
    if kind == Type.BF16:
        bits = checkpoint.tensors['layers/1/q'].read_bfloat16()
        assert np.array_equal((bits.astype(np.uint32) << 16).view(np.float32), checkpoint.tensors['layers/1/q'].read())


def test_q4_1_and_q8_0_by_their_formulas(path):
    weights = random_weights(CONFIG)
    checkpoint = open_checkpoint(write(path, weights, {'up': Type.Q4_1, 'v': Type.Q8_0}))
    raw = gguf.quants.quantize(weights['layers/0/up'], Type.Q4_1).reshape(-1, 20)  # scale, minimum, 16 bytes of pairs
    scale, low = (raw[:, i:i + 2].copy().view('<f2').astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1)
    assert np.array_equal(checkpoint.tensors['layers/0/up'].read(), (nibbles * scale + low).reshape(96, 64))
    raw = gguf.quants.quantize(weights['layers/0/v'], Type.Q8_0).reshape(-1, 34)  # scale, 32 signed bytes
    scale = raw[:, :2].copy().view('<f2').astype(np.float32)
    assert np.array_equal(checkpoint.tensors['layers/0/v'].read(), (raw[:, 2:].view('i1') * scale).reshape(32, 64))


@pytest.mark.parametrize('kind', ['Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_XS', 'IQ2_S', 'IQ3_XXS', 'TQ2_0'])
def test_types_that_the_package_can_only_read(path, kind):
    """Random blocks, each byte small enough that no scale is infinite; q shows that whole rows are reordered."""
    kind = Type[kind]
    config = ModelConfig(**{**vars(CONFIG), 'hidden_size': 256})
    block, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 0x38, (64, 256 // block * width), dtype=np.uint8)
    expected = gguf.quants.dequantize(raw, kind)
    write(path, random_weights(config) | {'layers/0/q': (raw, kind)}, llama__embedding_length=256,
          llama__attention__key_length=16, llama__attention__value_length=16)
    tensor = open_checkpoint(path).tensors['layers/0/q']
    assert (tensor.dtype, tensor.shape) == (kind.name, (64, 256))
    assert np.array_equal(tensor.read(), expected)


# ---- what is refused

@pytest.mark.parametrize('keys, message', [
    ({'general__architecture': 'gguf2'}, "the architecture is 'gguf2'; supported are llama, mistral3, smollm3"),
    ({'llama__attention__scale': 0.1}, "unknown key 'attention.scale'.*does not know what it means for the result"),
    ({'llama__attention__sliding_window': 64}, "unknown key 'attention.sliding_window'"),
    ({'qwen2__block_count': 2}, "unknown key 'qwen2.block_count'"),
    ({'llama__expert_count': 8}, '0 of 8 experts of 96 columns'),
    ({'llama__expert_count': 8, 'llama__expert_used_count': 2}, 'tensor blk.0.ffn_gate_inp.weight is missing'),
    ({'llama__attention__value_length': 32}, 'attention.value_length is 32; supported is the head size 16 only'),
    ({'llama__block_count': REMOVE}, 'block_count is missing'),
    ({'llama__block_count': 'two'}, "block_count is 'two'; expected a whole number"),
    ({'llama__block_count': 3}, r'tensor blk.2.attn_norm.weight is missing; the configuration asks for \[64\]'),
    ({'llama__block_count': 1}, r'blk.1.attn_k.weight \(\[32, 64\]\) has no place in this architecture'),
    ({'llama__feed_forward_length': 128}, r'ffn_gate.weight has the shape \[96, 64\]; the configuration asks for'),
    ({'llama__attention__head_count': 0}, '0 query heads do not divide the hidden size 64'),
    ({'llama__attention__head_count_kv': [2, 1]}, r'head_count_kv is \[2, 1\]; supported is one number for all layers only'),
    ({'llama__attention__head_count_kv': 3}, '4 query heads cannot share 3 KV heads evenly'),
    ({'llama__vocab_size': 301}, 'vocab_size is 301; the embedding has 300 rows'),
    ({'split__count': 2}, 'is one of 2 parts; give the first one, which is called NAME-00001-of-00002.gguf'),
    ({'tokenizer__ggml__model': 'llama'}, 'tokenizer.ggml.scores does not have one number for each token'),
    ({'tokenizer__ggml__model': 't5'}, r"tokenizer.ggml.model is 't5' \(Unigram\); supported are gpt2"),
    ({'tokenizer__ggml__model': 'bert'}, r"tokenizer.ggml.model is 'bert'; supported are gpt2 \(byte-level BPE\) and llama"),
    ({'tokenizer__ggml__pre': 'superbpe'}, "tokenizer.ggml.pre is 'superbpe'; supported are gpt-2, phi-2, smollm"),
    ({'tokenizer__ggml__pre': 'default'}, "tokenizer.ggml.pre is 'default'"),
    ({'tokenizer__ggml__pre': REMOVE}, 'tokenizer.ggml.pre is None'),
    ({'tokenizer__ggml__add_space_prefix': True}, 'add_space_prefix is True; supported is False only'),
    ({'tokenizer__ggml__normalizer': 'nfc'}, "unknown key 'tokenizer.ggml.normalizer'"),
    ({'tokenizer__ggml__tokens': TOKENS[:-1]}, '299 tokens; the embedding has 300 rows'),
    ({'tokenizer__ggml__tokens': [*TOKENS[:-1], 'in']}, "the token 'in' occurs twice"),
    ({'tokenizer__ggml__tokens': 5}, 'tokenizer.ggml.tokens is 5; expected a list of strings'),
    ({'tokenizer__ggml__token_type': TYPES[:-1]}, 'token_type does not have one number for each token'),
    ({'tokenizer__ggml__merges': ['x yy']}, "the merge 'x yy' is not of two tokens that give a third"),
    ({'tokenizer__ggml__merges': REMOVE}, 'tokenizer.ggml.merges is None; expected a list of strings'),
    ({'tokenizer__ggml__eos_token_id': 300}, 'tokenizer.ggml.eos_token_id is 300; expected a token id from 0 to 299'),
    ({'tokenizer__ggml__add_bos_token': 1}, 'add_bos_token is 1; expected true or false'),
    ({'tokenizer__chat_template': 7}, 'tokenizer.chat_template is 7; expected text'),
    ({'general__alignment': 24}, 'general.alignment is 24; expected a power of two'),
])
def test_metadata_that_is_not_understood_is_refused_by_name(path, keys, message):
    architecture = keys.pop('general__architecture', None)
    write(path, random_weights(CONFIG), **keys)
    if architecture:
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack('<IQ', 8, 5) + b'llama', struct.pack('<IQ', 8, 5) + b'gguf2', 1))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


def test_foreign_tensors_are_refused(path):
    weights = random_weights(CONFIG)
    with pytest.raises(FormatError, match=r'extra.weight \(\[8\]\) has no place in this architecture'):
        open_checkpoint(write(path, weights | {'extra': np.ones(8, np.float32)}))
    del weights['embedding']
    with pytest.raises(FormatError, match='tensor token_embd.weight is missing'):
        open_checkpoint(write(path, weights))


@pytest.mark.parametrize('data, message', [
    (b'', 'is no GGUF file'), (b'GG', 'is no GGUF file'), (b'ggjt' + bytes(100), 'is no GGUF file'),
    (b'GGUF', 'is truncated or damaged: the version would need 4 bytes, 0 are left'),
    (b'GGUF' + struct.pack('<I', 1) + bytes(50), 'is GGUF version 1; supported are little-endian'),
    (b'GGUF' + struct.pack('>I', 3) + bytes(50), 'is big-endian'),
    (b'GGUF' + struct.pack('<IQQ', 3, 0, 1 << 60), 'is truncated or damaged: a metadata key'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1 << 60), 'a metadata key has 1152921504606846976 bytes'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'\xff', 'a metadata key is not UTF-8'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'a' + struct.pack('<I', 13), 'a has the unknown type 13'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'a' + struct.pack('<IIQ', 9, 8, 1 << 60), 'a would hold .* strings'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'a' + struct.pack('<IIQ', 9, 4, 1 << 60), 'a would need .* bytes'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'a' + struct.pack('<IIQ', 9, 9, 5), 'a is an array of type 9'),
    (b'GGUF' + struct.pack('<IQQ', 3, 0, 2) + 2 * (struct.pack('<Q', 1) + b'a' + struct.pack('<II', 4, 5)),
     "the metadata key 'a' occurs twice"),
    (b'GGUF' + struct.pack('<IQQQ', 3, 1, 0, 1) + b'a' + struct.pack('<I', 99), 'a has 99 dimensions; expected 1 to 4'),
    (b'GGUF' + struct.pack('<IQQQ', 3, 1, 0, 1) + b'a' + struct.pack('<IQIQ', 1, 4, 0, 1), 'a starts at byte 1'),
])
def test_headers_that_lie(path, data, message):
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


def test_a_pipe_is_refused_at_once(path):
    os.mkfifo(path)
    code = 'import sys; from pathlib import Path; from tpmpi.formats import open_checkpoint; open_checkpoint(Path(sys.argv[1]))'
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, timeout=90, env=environment())
    assert done.stderr.splitlines()[-1].endswith(f'{path} is no regular file; expected one, or a link to one')


@pytest.mark.parametrize('keys, message', [
    ({'llama__context_length': 1 << 63}, 'context_length is 92233.*; expected a whole number of less than 63 bits'),
    ({'llama__rope__scaling__type': 'yarn', 'llama__rope__scaling__factor': 2.0,
      'llama__rope__scaling__yarn_log_multiplier': -20.0}, 'yarn_log_multiplier is -20.0, which makes a magnitude of -0.38'),
])
def test_numbers_out_of_reach(path, keys, message):
    with pytest.raises(FormatError, match=message):
        open_checkpoint(write(path, random_weights(CONFIG), **keys))


@pytest.mark.parametrize('out', ['model-00001-of-00002.gguf', 'model-00002-of-00002.gguf', 'link.h5'])
def test_no_part_of_the_source_is_replaced(tmp_path, out):
    """The first part holds no tensor, as llama-gguf-split --no-tensor-first-split writes it."""
    first, second = (tmp_path / f'model-0000{n}-of-00002.gguf' for n in (1, 2))
    write(first, {}, split__count=2, split__no=0)
    write(second, random_weights(CONFIG), split__count=2, split__no=1)
    (tmp_path / 'link.h5').symlink_to(second.name)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f'{out}: is .*-of-00002.gguf, which the model is read from; give the name of another'):
        convert(first, tmp_path / out)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and (tmp_path / 'link.h5').is_symlink()
    convert(first, tmp_path / 'model.h5')


def patch_entry(path: Path, name: bytes, change) -> None:
    """Changes dimension, type and offset of a matrix in the header."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack('<Q', len(name)) + name) + 8 + len(name) + 4
    struct.pack_into('<QQIQ', data, at, *change(*struct.unpack_from('<QQIQ', data, at)))
    path.write_bytes(data)


@pytest.mark.parametrize('change, message', [
    (lambda a, b, kind, offset: (a, b, kind, 0), 'overlaps with'),
    (lambda a, b, kind, offset: (a, b, kind, 1 << 40), 'is truncated: blk.1.ffn_up.weight ends at byte'),
    (lambda a, b, kind, offset: (a, 1 << 60, kind, offset), 'overlaps with|is truncated'),
    (lambda a, b, kind, offset: (a, b, 4711, offset), 'has the unknown type 4711'),
    (lambda a, b, kind, offset: (a, b, int(Type.Q4_K), offset), 'has rows of 64; Q4_K needs blocks of 256'),
    (lambda a, b, kind, offset: (0, b, kind, offset), 'blk.1.ffn_up.weight has the shape'),
])
def test_tensors_that_lie(path, change, message):
    patch_entry(write(path, random_weights(CONFIG)), b'blk.1.ffn_up.weight', change)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


def test_types_without_a_way_to_read_them(path):
    write(path, random_weights(CONFIG))
    patch_entry(path, b'blk.1.ffn_up.weight', lambda a, b, kind, offset: (a, b, int(Type.Q8_1), offset))
    with pytest.raises(FormatError, match='the gguf package cannot dequantize Q8_1'):
        open_checkpoint(path).tensors['layers/1/up'].read()


def test_every_truncation_and_many_damages_end_in_one_clear_error(path):
    data = write(path, random_weights(CONFIG)).read_bytes()
    rng = np.random.default_rng(0)
    for size in [*rng.integers(0, len(data), 60), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(path)
    header = data.index(b'output_norm.weight') + 200
    for _ in range(300):
        spoiled = bytearray(data)
        spoiled[rng.integers(4, header)] = rng.integers(0, 256)
        path.write_bytes(spoiled)
        try:
            open_checkpoint(path)
        except FormatError:
            pass


# ---- tokenizer

def test_tokenizer_splits_digits_and_knows_added_tokens(path):
    tokenizer = tokenizer_of(open_checkpoint(write(path, random_weights(CONFIG))))
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode('in the') == [256, 259]
    assert tokenizer.encode('  12') == [260, ord('1'), ord('2')]  # gpt-2 would give two single spaces
    assert tokenizer.encode('a<|im_end|><think>') == [ord('a'), 262, 263]
    assert tokenizer.decode([261, 256, 262, 263]) == 'in<think>'  # <think> is an ordinary added token
    text = 'naïve 日本 👩‍👩‍👧‍👦 \x00\u2028'
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('pre, text, expected', [
    ('gpt-2', '  12', [ALPHABET.index('Ġ'), ALPHABET.index('Ġ'), ord('1'), ord('2')]),
    ('llama-bpe', ' the', [261, 259]), ('llama3', 'x  the', [261, ord('x'), ALPHABET.index('Ġ'), 259]),
])
def test_pre_tokenizers(path, pre, text, expected):
    keys = {'tokenizer__ggml__pre': pre, 'tokenizer__ggml__add_bos_token': REMOVE}  # Llama 3 puts bos first
    assert tokenizer_of(open_checkpoint(write(path, random_weights(CONFIG), **keys))).encode(text) == expected


def test_bos_and_ends(path):
    keys = {'tokenizer__ggml__add_bos_token': True, 'tokenizer__ggml__add_eos_token': True,
            'tokenizer__ggml__eot_token_id': 263, 'tokenizer__ggml__eom_token_id': 262}
    checkpoint = open_checkpoint(write(path, random_weights(CONFIG), **keys))
    assert checkpoint.eos_token_ids == (262, 263)
    assert tokenizer_of(checkpoint).encode('in') == [261, 256, 262]


# ---- the real model

@pytest.fixture(scope='module')
def smollm2():
    return open_checkpoint(Path(SMOLLM2))


@pytest.mark.real_model
@real_model
def test_smollm2_configuration(smollm2):
    assert smollm2.config == ModelConfig(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=1536,
        max_positions=8192, norm_eps=float(np.float32(1e-5)), rope_theta=1e5, tie_embeddings=True)
    assert (smollm2.bos_token_id, smollm2.eos_token_ids) == (1, (2, 0))  # 0: <|endoftext|>, by name
    assert smollm2.tensors['embedding'].dtype == 'Q8_0' and smollm2.tensors['layers/29/q'].dtype == 'Q4_1'
    assert smollm2.tensors['layers/29/down'].read().shape == (576, 1536)


@pytest.mark.real_model
@real_model
def test_smollm2_tokens_are_those_of_its_own_tokenizer(smollm2):
    reference = json.loads((REFERENCES / 'smollm2_tokenizer.json').read_text())
    tokenizer = tokenizer_of(smollm2)
    for case in reference['texts']:
        assert tokenizer.encode(case['text']) == case['ids'], case['text']
    for case in reference['chats']:
        ids = tokenizer.apply_chat_template(case['messages'], case['add_generation_prompt'])
        assert ids == case['ids'], case['messages']
