"""Reads the header of a GGUF file: metadata, and where each tensor lies.

The `gguf` package has a reader too, but it makes an array of every token and every merge (4 seconds for a vocabulary of
49152, where this takes a tenth) and does not check lengths and offsets against the file.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tpmpi.formats.source import FormatError, file_size

VERSIONS = (2, 3)
NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME = 1 << 16  # bytes of a key


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies, in GGUF's own terms."""

    name: str
    dimensions: tuple[int, ...]  # the fastest first: the reverse of NumPy's shape
    type: int  # ggml's number
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    metadata: dict[str, object]  # numbers, strings and lists of either
    tensors: tuple[GgufTensor, ...]
    size: int  # bytes of the file
    data_start: int


class Cursor:
    """Takes values from a file one after the other and never more than the file holds."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.left = file, path, size

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise FormatError(
                f'{self.path} is truncated or damaged: {what} would need {count} bytes, {self.left} are left')
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise FormatError(f'{self.path} became shorter while it was read')
        return data

    def number(self, code: str, what: str):
        return struct.unpack('<' + code, self.take(struct.calcsize('<' + code), what))[0]

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number('Q', what)
        if limit is not None and length > limit:
            raise FormatError(f'{self.path}: {what} has {length} bytes; expected at most {limit}')
        try:
            return self.take(length, what).decode('utf-8')
        except UnicodeDecodeError as error:
            raise FormatError(f'{self.path}: {what} is not UTF-8 ({error})') from error

    def value(self, type: int, what: str):
        if type in NUMBERS:
            return self.number(NUMBERS[type], what)
        if type == STRING:
            return self.string(what)
        if type != ARRAY:
            raise FormatError(f'{self.path}: {what} has the unknown type {type}')
        item, count = self.number('I', what), self.number('Q', what)
        if item in NUMBERS:
            width = struct.calcsize('<' + NUMBERS[item])
            return list(struct.unpack(f'<{count}{NUMBERS[item]}', self.take(count * width, what)))
        if item != STRING:
            raise FormatError(f'{self.path}: {what} is an array of type {item}; expected numbers or strings')
        if count * 8 > self.left:  # each string has at least its length
            raise FormatError(f'{self.path} is truncated or damaged: {what} would hold {count} strings')
        return [self.string(what) for _ in range(count)]


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file of version 2 or 3.

    Raises FormatError where the file is no GGUF, is truncated, or contradicts itself.
    """
    try:
        size = file_size(path)
        with path.open('rb') as file:
            return parse_header(Cursor(file, path, size), size)
    except OSError as error:
        raise FormatError(f'{path} cannot be read: {error.strerror or error}') from error


def parse_header(cursor: Cursor, size: int) -> GgufHeader:
    path = cursor.path
    if cursor.take(min(4, size), 'the magic number') != b'GGUF':
        raise FormatError(f'{path} is no GGUF file: it does not start with "GGUF"')
    version = cursor.number('I', 'the version')
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big') in VERSIONS
        raise FormatError(f'{path} is {"big-endian" if swapped else f"GGUF version {version}"}; '
                          f'supported are little-endian files of version {" and ".join(map(str, VERSIONS))}')
    tensor_count, key_count = cursor.number('Q', 'the tensor count'), cursor.number('Q', 'the key count')
    metadata = {}
    for _ in range(key_count):  # a huge count ends with the file
        key = cursor.string('a metadata key', MAX_NAME)
        if key in metadata:
            raise FormatError(f'{path}: the metadata key {key!r} occurs twice')
        metadata[key] = cursor.value(cursor.number('I', key), key)
    alignment = metadata.get('general.alignment', DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise FormatError(f'{path}: general.alignment is {alignment!r}; expected a power of two')
    entries = []
    for _ in range(tensor_count):
        name = cursor.string('a tensor name', MAX_NAME)
        dimensions = cursor.number('I', name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise FormatError(f'{path}: {name} has {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}')
        shape = tuple(cursor.number('Q', name) for _ in range(dimensions))
        entries.append((name, shape, cursor.number('I', name), cursor.number('Q', name)))
    start = -(-(size - cursor.left) // alignment) * alignment
    for name, _, _, offset in entries:
        if offset % alignment:
            raise FormatError(f'{path}: {name} starts at byte {offset} of the data; expected a multiple of {alignment}')
    return GgufHeader(path, metadata, tuple(
        GgufTensor(name, shape, type, start + offset) for name, shape, type, offset in entries), size, start)


def check_ranges(header: GgufHeader, sizes: dict[str, int]) -> None:
    """Raises FormatError when tensors of these sizes, in bytes by name, leave the file or overlap."""
    end, before = header.data_start, None
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise FormatError(f'{header.path}: {tensor.name} overlaps with {before}')
        end, before = tensor.offset + sizes[tensor.name], tensor.name
        if end > header.size:
            raise FormatError(
                f'{header.path} is truncated: {tensor.name} ends at byte {end}, the file at {header.size}')


def elements(tensor: GgufTensor) -> int:
    return math.prod(tensor.dimensions)
