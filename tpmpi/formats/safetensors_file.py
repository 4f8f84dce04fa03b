"""Reads safetensors files: an 8-byte length, a JSON header, then the raw numbers.

This reader does without the `safetensors` package: its NumPy side has no bfloat16, the type of nearly every checkpoint,
and raw bits are what a lossless conversion wants.  The header is checked here as strictly as there.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from tpmpi.formats.source import FormatError, TensorSource, file_size, parse_json, read_numbers

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
DTYPES = {'F32': ('float32', '<f4'), 'F16': ('float16', '<f2'), 'BF16': ('bfloat16', '<u2')}  # ours, and as stored
ITEM_BITS = {'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'F8_E8M0': 8, 'I16': 16, 'U16': 16, 'F16': 16,
             'BF16': 16, 'I32': 32, 'U32': 32, 'F32': 32, 'I64': 64, 'U64': 64, 'F64': 64, 'C64': 64}


def open_safetensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of one file, unread, by their names there.

    Raises FormatError when the header and the file contradict each other, or a tensor has a type that is not supported.
    """
    try:
        size = file_size(path)
        with path.open('rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise FormatError(
                    f'{path} is no safetensors file: its header would have {length} bytes, the file has {size}')
            text = file.read(length).decode('utf-8')
    except OSError as error:
        raise FormatError(f'{path} cannot be read: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise FormatError(f'{path} is no safetensors file: its header is not UTF-8') from error
    header = parse_json(text, f'the header of {path}')
    header.pop('__metadata__', None)
    start = 8 + length
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, first, last = check_entry(entry, size - start, f'{path}: {name}')
        ranges.append((first, last, name))
        tensors[name] = tensor_source(path, name, dtype, shape, start + first)
    ranges.sort()
    end = 0
    for first, last, name in ranges:
        if first != end:
            raise FormatError(f'{path}: {name} starts at byte {first} of the data; expected {end}, without a gap')
        end = last
    if end != size - start:
        raise FormatError(f'{path} holds {size - start} bytes of data; its header describes {end}')
    return tensors


def check_entry(entry, data_size: int, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and byte range of one entry of the header, checked against the size of the data."""
    try:
        dtype, shape, (first, last) = entry['dtype'], entry['shape'], entry['data_offsets']
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(f'{where}: its entry in the header is not dtype, shape and two data_offsets') from error
    if not isinstance(shape, list) or not all(is_size(n) for n in [*shape, first, last]):
        raise FormatError(f'{where}: shape and data_offsets must be whole numbers from 0')
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise FormatError(f'{where}: unknown dtype {dtype!r}')
    elements = 1
    for n in shape:
        elements = min(elements * n, 1 << 62)  # a hostile shape must not grow a number of a million digits
    if not first <= last <= data_size or (last - first) * 8 != elements * ITEM_BITS[dtype]:
        raise FormatError(
            f'{where}: data_offsets {first} to {last} do not fit {dtype} {shape} in {data_size} bytes of data')
    return dtype, tuple(shape), first, last


def is_size(n) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62


def tensor_source(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorSource:
    """A tensor that reads its part of the file when asked, or says then that its type is not supported."""
    ours, stored = DTYPES.get(dtype, (dtype, None))

    def rows(start: int, stop: int) -> TensorSource:
        columns = shape[-1:] if len(shape) > 1 else ()
        skipped = start * int(np.prod(columns, dtype=np.int64)) * ITEM_BITS[dtype] // 8
        return tensor_source(path, name, dtype, (stop - start, *columns), offset + skipped)

    return TensorSource(f'{path}: {name}', shape, ours, functools.partial(load, path, name, dtype, shape, offset), rows=rows)


def load(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    if dtype not in DTYPES:
        raise FormatError(f'{path}: {name} is {dtype}; supported are {", ".join(DTYPES)}')
    return read_numbers(path, offset, int(np.prod(shape, dtype=np.int64)), DTYPES[dtype][1]).reshape(shape)
