"""From the file's layout into panels (see tiles.py), piece by piece as it is read, and rows of the embedding back out."""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.jit import helper, kernel, shared_kernel
from tpmpi.kernels.tiles import GROUP, GROUP_BYTES, GROUP_VALUES, HALF_BYTES, LANES, keep, widened

INT8_BYTES, INT8_SCALES = GROUP_BYTES['int8'], GROUP_VALUES['int8']  # of a group; where its scales begin
INT4_BYTES, INT4_SCALES = GROUP_BYTES['int4'], GROUP_VALUES['int4']

# raw, [outputs, k] or, transposed, [k, outputs]; at: where its first row goes; w: [panels, values of a panel]


@shared_kernel('void(u1[:, ::1], i8)')
def touch(w, threads):
    """Zeros, each thread's panels written by itself: their pages then lie in the memory of its NUMA domain."""
    for thread in prange(threads):
        t, panels = np.int64(thread), len(w)
        for panel in range(panels * t // threads, panels * (t + 1) // threads):
            for i in range(w.shape[1]):
                w[panel, i] = 0


@kernel('void(f4[:, ::1], b1, i8, f4[:, ::1])')
def pack_float32(raw, transposed, at, w):
    """Into [panels, k * 16]."""
    whole = raw.shape[1] // LANES  # panels
    if transposed:
        for i in range(raw.shape[0]):
            for panel in range(whole):
                for lane in range(LANES):
                    w[panel, (at + i) * LANES + lane] = raw[i, panel * LANES + lane]
            for out in range(whole * LANES, raw.shape[1]):
                w[whole, (at + i) * LANES + out % LANES] = raw[i, out]
    else:
        for i in range(raw.shape[0]):
            panel, lane = (at + i) // LANES, (at + i) % LANES
            for k in range(raw.shape[1]):
                w[panel, k * LANES + lane] = raw[i, k]


@kernel('void(u2[:, ::1], b1, i8, u2[:, ::1])')
def pack_bfloat16(raw, transposed, at, w):
    """Into [panels, k/2 * 16 * 2]."""
    words, rows, columns = w.view(np.uint32), raw.shape[0], raw.shape[1]
    if transposed:
        odd, whole = at % 2, columns // LANES
        for i in range(odd, rows - 1, 2):  # two rows, of one word
            to = (at + i) // 2 * LANES
            for panel in range(whole):
                for lane in range(LANES):
                    words[panel, to + lane] = two(raw[i, panel * LANES + lane], raw[i + 1, panel * LANES + lane])
            for out in range(whole * LANES, columns):
                words[whole, to + out % LANES] = two(raw[i, out], raw[i + 1, out])
        if odd and rows:
            put_half(raw, 0, at, w)
        if (at + rows) % 2 and rows > odd:
            put_half(raw, rows - 1, at, w)
    else:
        for i in range(rows):
            panel, lane = (at + i) // LANES, (at + i) % LANES
            for pair in range(columns // 2):
                words[panel, pair * LANES + lane] = two(raw[i, 2 * pair], raw[i, 2 * pair + 1])
            if columns % 2:
                w[panel, columns // 2 * (2 * LANES) + lane * 2] = raw[i, columns - 1]


@kernel('void(u1[:, ::1], u1[:, :, ::1], b1, i8, u1[:, ::1])')
def pack_int8(raw, scale, transposed, at, w):
    """Into groups of [8, 16, 4] q + 128 and 16 scales, all as bytes.  at, transposed: a whole number of groups."""
    words, size, flip = w.view(np.uint32), INT8_BYTES // 4, np.uint32(0x80808080)
    if transposed:
        whole = raw.shape[1] // LANES
        for i in range(0, raw.shape[0], 4):
            to = (at + i) // GROUP * size + (at + i) % GROUP // 4 * LANES
            for panel in range(whole):
                for lane in range(LANES):
                    words[panel, to + lane] = flip ^ four(raw, i, panel * LANES + lane)
            for out in range(whole * LANES, raw.shape[1]):
                words[whole, to + out % LANES] = flip ^ four(raw, i, out)
    else:
        given = raw.view(np.uint32)
        for i in range(raw.shape[0]):
            panel, lane = (at + i) // LANES, (at + i) % LANES
            for group in range(raw.shape[1] // GROUP):
                for j in range(GROUP // 4):
                    words[panel, group * size + j * LANES + lane] = flip ^ given[i, group * (GROUP // 4) + j]
    pack_scales(scale, transposed, at, w, INT8_BYTES, INT8_SCALES)


@kernel('void(u1[:, ::1], u1[:, :, ::1], u1[:, :, ::1], b1, i8, u1[:, ::1])')
def pack_int4(raw, scale, offset, transposed, at, w):
    """Into groups of [4, 16, 4] bytes, 16 scales and 16 offsets.

    raw: two columns in a byte, the even one low; w: byte m of a word has of eight along k m low and m + 4 high.
    at, transposed: a whole number of groups.
    """
    words, size, low = w.view(np.uint32), INT4_BYTES // 4, np.uint32(0x0F0F0F0F)
    if transposed:
        for i in range(0, raw.shape[0], 8):
            to = (at + i) // GROUP * size + (at + i) % GROUP // 8 * LANES
            for j in range(raw.shape[1]):
                a, b, panel, lane = four(raw, i, j), four(raw, i + 4, j), 2 * j // LANES, 2 * j % LANES
                words[panel, to + lane] = a & low | (b & low) << np.uint32(4)
                words[panel, to + lane + 1] = a >> np.uint32(4) & low | b & ~low
    else:
        given = raw.view(np.uint32)
        for i in range(raw.shape[0]):
            panel, lane = (at + i) // LANES, (at + i) % LANES
            for group in range(2 * raw.shape[1] // GROUP):
                for j in range(GROUP // 8):
                    eight = given[i, group * (GROUP // 8) + j]
                    words[panel, group * size + j * LANES + lane] = (
                        spread(eight & np.uint32(0xFFFF)) | spread(eight >> np.uint32(16)) << np.uint32(4))
    pack_scales(scale, transposed, at, w, INT4_BYTES, INT4_SCALES)
    pack_scales(offset, transposed, at, w, INT4_BYTES, INT4_SCALES + LANES * HALF_BYTES)


@helper
def put_half(raw, i, at, w):
    """A row of bfloat16 whose neighbour is of another piece, or that has none."""
    k = at + i
    for out in range(raw.shape[1]):
        w[out // LANES, k // 2 * (2 * LANES) + out % LANES * 2 + k % 2] = raw[i, out]


@helper
def two(a, b):
    """16 bits each, the first ones low."""
    return np.uint32(a) | np.uint32(b) << np.uint32(16)


@helper
def four(raw, i, j):
    """The bytes of four rows of a column, the first one lowest."""
    return two(raw[i, j], raw[i + 2, j]) | two(raw[i + 1, j], raw[i + 3, j]) << np.uint32(8)


@helper
def spread(x):
    """Four numbers of 4 bits, a byte for each."""
    x = (x | x << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (x | x << np.uint32(4)) & np.uint32(0x0F0F0F0F)


@helper
def pack_scales(scale, transposed, at, w, size, start):
    """One of the rows of 16 after the values of each group."""
    first = at // GROUP if transposed else at
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out, group = (j, first + i) if transposed else (first + i, j)
            for byte in range(HALF_BYTES):
                w[out // LANES, group * size + start + out % LANES * HALF_BYTES + byte] = scale[i, j, byte]


# ---- the embedding: ids [tokens], counted from this rank's first row; negative or too large: another rank's, zeros


@kernel('void(i8[::1], i8, f4[:, ::1], f4[:, ::1])')
def embed_float32(ids, rows, w, y):
    """Rows of the table.  y [tokens, hidden], zeros before."""
    for t in range(len(ids)):
        if 0 <= ids[t] < rows:
            for k in range(y.shape[1]):
                y[t, k] = w[ids[t] // LANES, k * LANES + ids[t] % LANES]


@kernel('void(i8[::1], i8, u2[:, ::1], u4[:, ::1])')
def embed_bfloat16(ids, rows, w, y):
    """Rows of the table.  y: the bits of [tokens, hidden]."""
    for t in range(len(ids)):
        if 0 <= ids[t] < rows:
            for k in range(y.shape[1]):
                bits = w[ids[t] // LANES, k // 2 * (2 * LANES) + ids[t] % LANES * 2 + k % 2]
                y[t, k] = np.uint32(bits) << np.uint32(16)


@kernel('void(i8[::1], i8, u1[:, ::1], f4[:, ::1])')
def embed_int8(ids, rows, w, y):
    """Rows of the table."""
    size = INT8_BYTES
    for t in range(len(ids)):
        if 0 <= ids[t] < rows:
            panel, lane = w.ctypes.data + ids[t] // LANES * w.shape[1], ids[t] % LANES
            for k in range(y.shape[1]):
                group = k // GROUP * size
                byte = group + k % GROUP // 4 * (4 * LANES) + lane * 4 + k % 4
                scale = widened(panel + group + INT8_SCALES + lane * HALF_BYTES)
                y[t, k] = np.float32(np.int64(w[ids[t] // LANES, byte]) - 128) * scale
    keep(w)


@kernel('void(i8[::1], i8, u1[:, ::1], f4[:, ::1])')
def embed_int4(ids, rows, w, y):
    """Rows of the table."""
    size = INT4_BYTES
    for t in range(len(ids)):
        if 0 <= ids[t] < rows:
            panel, lane = w.ctypes.data + ids[t] // LANES * w.shape[1], ids[t] % LANES
            for k in range(y.shape[1]):
                group = k // GROUP * size
                byte = group + k % GROUP // 8 * (4 * LANES) + lane * 4 + k % 4
                scale = panel + group + INT4_SCALES + lane * HALF_BYTES
                value = np.float32((w[ids[t] // LANES, byte] >> np.uint8(k % 8 // 4 * 4)) & np.uint8(15))
                y[t, k] = value * widened(scale) + widened(scale + LANES * HALF_BYTES)
    keep(w)
