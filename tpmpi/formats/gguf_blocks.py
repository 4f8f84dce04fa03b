"""GGUF's quantized types whose blocks of 32 are our groups: their numbers carry over as they are.

A block is a float16 scale d, for Q4_1 a float16 minimum m, for Q5_0 32 high bits, then the numbers, those of 4 bits as
16 bytes with weights 0 to 15 in the low halves and 16 to 31 in the high ones:

    Q8_0  value = d * q           Q5_0  value = d * (q - 16), q of 5 bits
    Q4_0  value = d * (q - 8)     Q4_1  value = d * q + m
"""

from __future__ import annotations

import numpy as np

from tpmpi.formats.source import FormatError
from tpmpi.weights import GROUP, Stored, pack_int4

KINDS = {'Q4_0': ('int4', 'int8'), 'Q4_1': ('int4',), 'Q5_0': ('int8',), 'Q8_0': ('int8',)}  # that hold a type without loss
HEADER = {'Q4_0': 2, 'Q4_1': 4, 'Q5_0': 6, 'Q8_0': 2}  # bytes of a block before its numbers


def stored_groups(raw: np.ndarray, type_name: str, kind: str, origin: str) -> Stored:
    """A tensor's rows of blocks in one of the KINDS of its type.  uint8 [rows, bytes] -> [rows, columns]

    Raises FormatError where a scale or an offset is not finite, or a value too large for its float16 offset.
    """
    rows, header = len(raw), HEADER[type_name]
    size = header + (GROUP if type_name == 'Q8_0' else GROUP // 2)
    blocks = raw.reshape(rows, -1, size)  # [rows, columns/32, bytes]
    halves = np.ascontiguousarray(blocks[..., :header]).view('<f2').astype(np.float16, copy=False)
    scale, numbers, offset = np.ascontiguousarray(halves[..., 0]), blocks[..., header:], None
    if type_name == 'Q8_0':
        q = numbers.view(np.int8)
    else:
        q = np.concatenate((numbers & 15, numbers >> 4), axis=-1)
        if type_name == 'Q5_0':
            high = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder='little')
            q = (q | high << 4).view(np.int8) - np.int8(16)
        elif kind == 'int8':
            q = q.view(np.int8) - np.int8(8)
        else:
            with np.errstate(over='ignore', invalid='ignore'):  # looked at below
                offset = np.ascontiguousarray(halves[..., 1]) if type_name == 'Q4_1' else scale * np.float16(-8)
    for part in (scale, offset):
        if part is not None and not np.isfinite(part).all():
            raise FormatError(f'{origin}: a block of {type_name} has a scale or offset that is not finite in float16, '
                              f'so that it cannot become {kind}')
    q = q.reshape(rows, -1)
    return Stored(kind, pack_int4(q) if kind == 'int4' else np.ascontiguousarray(q), scale, offset)
