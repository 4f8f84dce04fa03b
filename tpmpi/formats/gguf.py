"""Opens a GGUF file: llama.cpp's one-file format.  Its quantized tensors become float32 or our groups when they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tpmpi.config import ConfigError
from tpmpi.formats.families import GGUF, GGUF_WHERE, NEUTRAL_PREFIXES, Family, read_facts, short, their_name
from tpmpi.formats.gguf_blocks import KINDS, stored_groups
from tpmpi.formats.gguf_file import GgufHeader, GgufTensor, check_ranges, elements, read_header
from tpmpi.formats.gguf_tokenizer import open_tokenizer
from tpmpi.formats.source import BFLOAT16, Checkpoint, FormatError, TensorSource, match_tensors, read_numbers, sha256

STORED = {'F32': ('float32', '<f4'), 'F16': ('float16', '<f2'), 'BF16': (BFLOAT16, '<u2')}  # ours, and as stored
ROPE_FACTORS = 'rope_freqs.weight'  # the frequencies of Llama 3.1's RoPE, scaled


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file.  Raises FormatError for whatever is missing, damaged or not understood."""
    header = read_header(path)
    metadata = header.metadata
    architecture = metadata.get('general.architecture')
    if not isinstance(architecture, str) or architecture not in GGUF:
        raise FormatError(f'{path}: the architecture is {short(architecture)}; supported is {", ".join(GGUF)}')
    if metadata.get('split.count', 1) not in (0, 1):
        raise FormatError(
            f'{path} is one of {short(metadata["split.count"])} parts; join them first (llama-gguf-split --merge)')
    found = tensor_sources(header)
    if ROPE_FACTORS in found:
        raise FormatError(f'{path}: {ROPE_FACTORS} scales RoPE; supported is plain RoPE only')
    family = GGUF[architecture]
    facts = read_facts(family_keys(metadata, architecture), family, lambda key: False, GGUF_WHERE)
    embedding = found.get(family.tensors['embedding'])
    if embedding is None:
        raise FormatError(f'{path}: tensor {family.tensors["embedding"]} is missing')
    if facts['vocab_size'] not in (None, embedding.shape[0]):
        raise FormatError(
            f'{path}: vocab_size is {short(facts["vocab_size"])}; the embedding has {embedding.shape[0]} rows')
    facts |= {'vocab_size': embedding.shape[0], 'tied': family.tensors['head'] not in found}
    try:
        config = family.config(facts)
    except ConfigError as error:
        raise FormatError(f'{path}: {error}') from error
    heads = {'q': config.num_heads, 'k': config.num_kv_heads}
    found = half_rotation(found, family, config.num_layers, heads, header)
    tensors = match_tensors(config, found, lambda name: their_name(name, family.tensors), str(path))
    tokenizer_json, chat_template, bos, eos = open_tokenizer(metadata, config.vocab_size)
    with path.open('rb') as file:
        digest = sha256(file.read(header.data_start))
    about = {key: str(metadata[f'general.{key}']) for key in ('name', 'license') if f'general.{key}' in metadata}
    return Checkpoint(
        config, tensors, tokenizer_json, chat_template, eos, bos,
        {'format': 'GGUF', 'architecture': architecture, 'source': path.name, 'header sha256': digest} | about)


def family_keys(metadata: dict, architecture: str) -> dict:
    """The keys that describe the model, without the architecture's prefix.  Refuses keys of any other kind."""
    prefix, keys = architecture + '.', {}
    for key, value in metadata.items():
        if key.startswith(prefix):
            keys[key.removeprefix(prefix)] = value
        elif not key.startswith((*NEUTRAL_PREFIXES, 'split.')):
            raise FormatError(
                f'{GGUF_WHERE}: unknown key {key!r} (value {short(value)}); '
                'tpmpi does not know what it means for the result')
    return keys


# ---- tensors

def tensor_sources(header: GgufHeader) -> dict[str, TensorSource]:
    """Every tensor of the file, unread, by its name there; the shape is NumPy's, [out, in]."""
    sources, sizes = {}, {}
    for tensor in header.tensors:
        if tensor.name in sources:
            raise FormatError(f'{header.path}: the tensor {tensor.name!r} occurs twice')
        sources[tensor.name], sizes[tensor.name] = tensor_source(header, tensor, None)
    check_ranges(header, sizes)
    return sources


def tensor_source(header: GgufHeader, tensor: GgufTensor, heads: int | None) -> tuple[TensorSource, int]:
    """One tensor and its size in bytes.  `heads`: how many heads its rows hold, if RoPE turns them."""
    kind, block, width = type_of(tensor, header.path)
    if tensor.dimensions[0] % block:
        raise FormatError(
            f'{header.path}: {tensor.name} has rows of {tensor.dimensions[0]}; {kind.name} needs blocks of {block}')
    shape = tensor.dimensions[::-1]
    size = elements(tensor) // block * width
    row_bytes = tensor.dimensions[0] // block * width
    rows = elements(tensor) // max(1, tensor.dimensions[0])
    origin = f'{header.path}: {tensor.name}'
    raw = functools.partial(read_rows, header.path, tensor.offset, rows, row_bytes, heads)
    group_kinds = KINDS.get(kind.name, ()) if len(shape) == 2 else ()
    return TensorSource(
        origin, shape, STORED.get(kind.name, (kind.name,))[0], functools.partial(load_tensor, header.path, raw, kind, shape),
        lambda ours: stored_groups(raw(), kind.name, ours, origin), group_kinds), size


def type_of(tensor: GgufTensor, path: Path):
    """ggml's type of a tensor, its weights per block and bytes per block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # late: the package takes a quarter of a second

    try:
        kind = GGMLQuantizationType(tensor.type)
    except ValueError as error:
        raise FormatError(f'{path}: {tensor.name} has the unknown type {tensor.type}') from error
    return kind, *GGML_QUANT_SIZES[kind]


def read_rows(path: Path, offset: int, rows: int, row_bytes: int, heads: int | None) -> np.ndarray:
    """The rows of a tensor as bytes, those of q and k in Hugging Face's order.  [rows, bytes]"""
    raw = read_numbers(path, offset, rows * row_bytes, 'u1').reshape(rows, row_bytes)
    return raw if heads is None else raw[half_rotation_rows(rows, heads)]


def load_tensor(path: Path, read: Callable[[], np.ndarray], kind, shape: tuple[int, ...]) -> np.ndarray:
    """float32, float16 or bfloat16's bits as stored; any quantized type as float32."""
    raw = read()
    if kind.name in STORED:
        return raw.view(STORED[kind.name][1]).reshape(shape)
    from gguf.quants import dequantize

    try:
        return dequantize(raw, kind).astype(np.float32, copy=False).reshape(shape)
    except NotImplementedError as error:
        raise FormatError(f'{path}: the gguf package cannot dequantize {kind.name}') from error


def half_rotation_rows(rows: int, heads: int) -> np.ndarray:
    """Where row i of a Hugging Face q or k projection lies in GGUF.

    llama.cpp's RoPE for this architecture turns the neighbours 2j and 2j + 1 of a head, Hugging Face's turns j and
    j + head_dim / 2, so the conversion to GGUF interleaved the halves of each head.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def half_rotation(found: dict[str, TensorSource], family: Family, layers: int, heads: dict[str, int], header: GgufHeader
                  ) -> dict[str, TensorSource]:
    """The tensors with the rows of every q and k in Hugging Face's order."""
    found, by_name = dict(found), {tensor.name: tensor for tensor in header.tensors}
    for layer in range(layers):
        for name, count in heads.items():
            theirs = their_name(f'layers/{layer}/{name}', family.tensors)
            if theirs not in found:
                break  # match_tensors says that it is missing
            if found[theirs].shape[0] % (2 * count) == 0:  # otherwise match_tensors says that the shape is wrong
                found[theirs], _ = tensor_source(header, by_name[theirs], count)
    return found
