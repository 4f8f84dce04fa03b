"""Opens a GGUF file: llama.cpp's one-file format.  Its quantized tensors become float32 or our groups when they are read."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tpmpi.formats.families import match_tensors, read_facts, short
from tpmpi.formats.gguf_blocks import KINDS, stored_groups
from tpmpi.formats.gguf_families import GGUF, GGUF_WHERE, NEUTRAL_PREFIXES
from tpmpi.formats.gguf_file import GgufHeader, GgufTensor, check_ranges, elements, read_header
from tpmpi.formats.gguf_tokenizer import open_tokenizer
from tpmpi.formats.source import BFLOAT16, Checkpoint, FormatError, TensorSource, read_numbers, sha256, understood

STORED = {'F32': ('float32', '<f4'), 'F16': ('float16', '<f2'), 'BF16': (BFLOAT16, '<u2')}  # ours, and as stored
PART = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')  # llama-gguf-split's names
EMBEDDING = 'token_embd.weight'


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file, or in several parts of one, of which `path` is the first.

    Raises FormatError for whatever is missing, damaged or not understood.
    """
    header = read_header(path)
    metadata = header.metadata
    architecture = metadata.get('general.architecture')
    if not isinstance(architecture, str) or architecture not in GGUF:
        raise FormatError(f'{path}: the architecture is {short(architecture)}; supported are {", ".join(GGUF)}')
    headers = [header, *other_parts(header)]
    found = tensor_sources(headers)
    if EMBEDDING not in found:
        raise FormatError(f'{path}: tensor {EMBEDDING} is missing')
    family = GGUF[architecture].family(found)
    facts = read_facts(family_keys(metadata, architecture), family, lambda key: False, GGUF_WHERE)
    if facts['vocab_size'] not in (None, found[EMBEDDING].shape[0]):
        raise FormatError(
            f'{path}: vocab_size is {short(facts["vocab_size"])}; the embedding has {found[EMBEDDING].shape[0]} rows')
    with understood(path):
        config = family.config(facts)
    tensors = match_tensors(config, found, family, str(path))
    tokenizer_json, chat_template, bos, eos = open_tokenizer(metadata, config.vocab_size)
    about = {key: str(metadata[f'general.{key}']) for key in ('name', 'license') if f'general.{key}' in metadata}
    return Checkpoint(
        config, tensors, tokenizer_json, chat_template, eos, bos,
        {'format': 'GGUF', 'architecture': architecture, 'source': path.name, 'header sha256': digest(headers)} | about,
        tuple(header.path for header in headers))


def other_parts(header: GgufHeader) -> list[GgufHeader]:
    """The headers of all parts but the first of a model in several files.  Raises FormatError where one is not there."""
    path, count = header.path, header.metadata.get('split.count', 1)
    if count in (0, 1):
        return []
    name = PART.fullmatch(path.name)
    if not name or header.metadata.get('split.no') != 0 or int(name[2]) != 1 or int(name[3]) != count:
        raise FormatError(f'{path} is one of {short(count)} parts; give the first one, which is called NAME-00001-of-'
                          f'{count if isinstance(count, int) else 0:05}.gguf, with the others beside it')
    headers = []
    for number in range(1, count):
        part = path.with_name(f'{name[1]}-{number + 1:05}-of-{count:05}.gguf')
        headers.append(read_header(part))
        said = [headers[-1].metadata.get(f'split.{key}') for key in ('no', 'count', 'tensors.count')]
        expected = [number, count, header.metadata.get('split.tensors.count')]
        if said != expected:
            raise FormatError(f'{part}: split.no, .count and .tensors.count are {short(said)}; expected {expected}')
    tensors = sum(len(h.tensors) for h in (header, *headers))
    if tensors != header.metadata.get('split.tensors.count', tensors):
        raise FormatError(f'{path}: its {count} parts hold {tensors} tensors; '
                          f'split.tensors.count says {short(header.metadata["split.tensors.count"])}')
    return headers


def digest(headers: list[GgufHeader]) -> str:
    """SHA-256 of all that stands before the tensors."""
    texts = []
    for header in headers:
        with header.path.open('rb') as file:
            texts.append(file.read(header.data_start))
    return sha256(b''.join(texts))


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

def tensor_sources(headers: list[GgufHeader]) -> dict[str, TensorSource]:
    """Every tensor of the files, unread, by its name there; the shape is NumPy's, [out, in]."""
    sources = {}
    for header in headers:
        sizes = {}
        for tensor in header.tensors:
            if tensor.name in sources:
                raise FormatError(f'{header.path}: the tensor {tensor.name!r} occurs twice')
            sources[tensor.name], sizes[tensor.name] = tensor_source(header, tensor)
        check_ranges(header, sizes)
    return sources


def tensor_source(header: GgufHeader, tensor: GgufTensor) -> tuple[TensorSource, int]:
    """One tensor and its size in bytes."""
    kind, block, width = type_of(tensor, header.path)
    if tensor.dimensions[0] % block:
        raise FormatError(
            f'{header.path}: {tensor.name} has rows of {tensor.dimensions[0]}; {kind.name} needs blocks of {block}')
    shape = tensor.dimensions[::-1]
    size = elements(tensor) // block * width
    row_bytes = tensor.dimensions[0] // block * width
    origin = f'{header.path}: {tensor.name}'
    rows = elements(tensor) // max(1, tensor.dimensions[0])
    part = functools.partial(rows_source, header.path, origin, kind, tensor.offset, row_bytes, tensor.dimensions[0])
    whole = part(0, rows)
    if len(shape) == 2:
        return dataclasses.replace(whole, rows=part), size
    return dataclasses.replace(whole, shape=shape, load=lambda: whole.load().reshape(shape), group_kinds=(),
                               rows=part if len(shape) > 2 else None), size


def rows_source(path: Path, origin: str, kind, offset: int, row_bytes: int, columns: int, start: int, stop: int) -> TensorSource:
    """Some rows of a tensor.  [stop - start, columns]"""
    raw = functools.partial(read_rows, path, offset + start * row_bytes, stop - start, row_bytes)
    return TensorSource(
        origin, (stop - start, columns), STORED.get(kind.name, (kind.name,))[0],
        functools.partial(load_tensor, path, raw, kind, (stop - start, columns)),
        lambda ours: stored_groups(raw(), kind.name, ours, origin), KINDS.get(kind.name, ()),
        lambda first, last: rows_source(path, origin, kind, offset, row_bytes, columns, start + first, start + last))


def type_of(tensor: GgufTensor, path: Path):
    """ggml's type of a tensor, its weights per block and bytes per block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # late: the package takes a quarter of a second

    try:
        kind = GGMLQuantizationType(tensor.type)
    except ValueError as error:
        raise FormatError(f'{path}: {tensor.name} has the unknown type {tensor.type}') from error
    return kind, *GGML_QUANT_SIZES[kind]


def read_rows(path: Path, offset: int, rows: int, row_bytes: int) -> np.ndarray:
    """The rows of a tensor as bytes.  [rows, bytes]"""
    return read_numbers(path, offset, rows * row_bytes, 'u1').reshape(rows, row_bytes)


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
