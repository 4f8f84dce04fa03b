"""What lies where in the HDF5 model file: its datasets, their types, comments and checksums.

Every tensor is one contiguous, unfiltered dataset with its sharded axis first, so that a rank's part is one byte range;
beside a tensor of integers lie the scales (and offsets) of its groups, cut by the same ranks at the same rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from tpmpi.sharding import TensorSpec
from tpmpi.weights import FORMULAS, GROUP, GROUP_PARTS, part_shapes

FORMAT, FORMAT_VERSIONS = 'tpmpi model', (1, 2)  # 2 where a matrix is of another kind than these
KINDS_OF_VERSION_1 = ('float32', 'bfloat16')
ABOUT = """\
A transformer language model for tpmpi, format version {}: whole tensors, for any number of ranks.
A matrix is stored with the axis first by which ranks split it: a rank's rows are one contiguous run.  So attn_out and
down are [in, out], all others [out, in].  RoPE turns the pairs (i, i + n/2) of the first n rows of each head of q and k; n is
rotary_dim, or head_dim where that is 0.  Gains of norms are as they multiply.
A 16-bit floating-point type is bfloat16, the upper half of an IEEE single.  crc32: zlib's, of each crc32_rows rows."""
ABOUT_VERSION_2 = f"""
Version 2 adds matrices of IEEE half, whose comments say so, and matrices of integers q,
of 8 or 4 bits, in groups of {GROUP} along the contraction axis (attribute group_axis: 0,
the rows, of attn_out and down, 1, the columns, of all others).  A group has a scale, with 4 bits also an offset, in the
datasets beside, NAME.scale and NAME.offset; their 16-bit floating-point type is IEEE half.  The comments give the formulas."""
ALL_GROUP_PARTS = GROUP_PARTS['int4']
MAX_TEXT = 64 << 20  # bytes of tokenizer.json or chat template
SAMPLE = 1 << 16  # bytes of a dataset without checksums that tell it from another


class CheckpointError(ValueError):
    """A model file that cannot be read, or that contradicts itself."""


def bfloat16_type() -> h5py.h5t.TypeID:
    """bfloat16 as HDF5 describes it: 16 bits, sign 15, 8 exponent bits at 7 with bias 127, 7 mantissa bits at 0."""
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_size(2)
    t.set_precision(16)
    t.set_ebias(127)
    return t


FILE_TYPES = {'float32': h5py.h5t.IEEE_F32LE, 'bfloat16': bfloat16_type(), 'float16': h5py.h5t.IEEE_F16LE,
              'int8': h5py.h5t.STD_I8LE, 'int4': h5py.h5t.STD_U8LE}


@dataclass(frozen=True)
class Part:
    """One dataset of a tensor: its numbers, or the scales or offsets of its groups."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype  # in memory
    file_type: h5py.h5t.TypeID
    row: int  # rows of the tensor that one row here belongs to
    crc32_rows: int  # rows here that have one checksum


def tensor_parts(spec: TensorSpec, kind: str) -> dict[str, Part]:
    """What the file holds of a tensor of some kind, by the names of Stored.parts."""
    parts = {}
    for name, (shape, dtype) in part_shapes(spec.shape, kind, spec.group_axis).items():
        if name == 'data':
            parts[name] = Part(spec.name, shape, dtype, FILE_TYPES[kind], 1, spec.unit)
        else:
            row = GROUP if spec.transposed else 1
            parts[name] = Part(f'{spec.name}.{name}', shape, dtype, h5py.h5t.IEEE_F16LE, row, spec.unit // row)
    return parts


def part_meaning(spec: TensorSpec, kind: str, part: str) -> str:
    """What a stranger must know to decode a dataset."""
    if kind not in GROUP_PARTS:
        return spec.meaning + '; IEEE half' * (kind == 'float16')
    leaf, last = spec.name.rpartition('/')[2], GROUP - 1
    if part != 'data':
        run = f'{GROUP}i to {GROUP}i+{last}, j' if spec.transposed else f'i, {GROUP}j to {GROUP}j+{last}'
        return f'[i, j]: {part} of {leaf}[{run}]; {FORMULAS[kind]}'
    q = 'as it stands here' if kind == 'int8' else (
        'from 0 to 15: byte j of a row holds column 2j in its low four bits, column 2j + 1 in its high four')
    beside = ' and '.join(f'{leaf}.{name}' for name in GROUP_PARTS[kind])
    return (f'{spec.meaning}; {FORMULAS[kind]}, q {q}; {beside}: one for each {GROUP} '
            f'{"rows of a column" if spec.transposed else "columns of a row"}')


def group_attributes(spec: TensorSpec, kind: str) -> dict:
    """What a tensor of integers says about itself to a program; nothing for other kinds."""
    return {'kind': kind, 'group': GROUP, 'group_axis': spec.group_axis} if kind in GROUP_PARTS else {}


def group_members(tensors: Iterable[str]) -> dict[str, set[str]]:
    """What each group of the file may hold, by the group's path, '' for the root."""
    members = {'': {'config', 'tokenizer'}}
    for name in tensors:
        members.setdefault(name.rpartition('/')[0], set()).update(
            name.rpartition('/')[2] + suffix for suffix in ('', *(f'.{part}' for part in ALL_GROUP_PARTS)))
        while '/' in name:
            name = name.rpartition('/')[0]
            members.setdefault(name.rpartition('/')[0], set()).add(name.rpartition('/')[2])
    return members


@dataclass(frozen=True)
class TokenizerData:
    """What the file says about text: the text of tokenizer.json, the chat template, and the special ids."""

    tokenizer_json: str
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def crc32_blocks(data: np.ndarray, unit: int) -> np.ndarray:
    """CRC-32 of each block of `unit` rows, which no rank count cuts."""
    return np.array([zlib.crc32(data[i:i + unit].data) for i in range(0, len(data), unit)], np.uint32)


def attributes(thing: h5py.HLObject, names: Iterable[str] | None = None) -> dict:
    """The attributes of a group or dataset, or those with some names: numbers, truth values, texts of fixed length, arrays.

    Variable-length values are refused unread: they lie in HDF5's global heap, and the library has been seen to loop for
    ever over a damaged one.  Raises TypeError for them.
    """
    values = {}
    for name in thing.attrs if names is None else names:
        if names is not None and not h5py.h5a.exists(thing.id, name.encode()):
            continue
        attribute = h5py.h5a.open(thing.id, name.encode())
        kind = attribute.get_type()
        plain = isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID, h5py.h5t.TypeStringID))
        if not plain or isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
            raise TypeError(f'attribute {name} of {thing.name} is of a type that model files do not have')
        shape, dtype = attribute.shape, attribute.dtype  # each asked for once: a model has a thousand attributes
        size = math.prod(shape) * kind.get_size()
        if size > MAX_TEXT:
            raise TypeError(f'attribute {name} of {thing.name} has {size} bytes')
        value = np.empty(shape, dtype)  # what thing.attrs[name] does, without opening it again
        attribute.read(value, mtype=h5py.h5t.py_create(dtype))
        value = value.item() if value.ndim == 0 else value
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def fingerprint(path: Path) -> str:
    """A digest that tells one model file from another, whatever it is called: of all datasets their checksums.

    Of one without checksums its first numbers count.  Raises OSError for a file that is not HDF5.
    """
    digest = hashlib.blake2b(digest_size=16)
    with h5py.File(path, 'r', locking=False) as file:
        def add(name: str, thing: h5py.HLObject):
            of_thing = attributes(thing, ('crc32',) if isinstance(thing, h5py.Dataset) else None)
            if isinstance(thing, h5py.Dataset):
                of_thing |= {'shape': thing.shape, 'type': thing.dtype.str}
                if 'crc32' not in of_thing and thing.id.get_offset() is not None:
                    os.lseek(descriptor, thing.id.get_offset(), os.SEEK_SET)
                    of_thing['data'] = os.read(descriptor, min(SAMPLE, thing.id.get_storage_size()))
            of_thing = {key: value.tobytes() if isinstance(value, np.ndarray) else value for key, value in of_thing.items()}
            digest.update(repr((name, sorted(of_thing.items()))).encode())

        descriptor = os.open(path, os.O_RDONLY)
        try:
            file.visititems(add)
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def reason(e: BaseException) -> str:
    """The short reason of an error: what the system says, or HDF5's last words."""
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return str(e).splitlines()[0].strip() if str(e) else type(e).__name__
