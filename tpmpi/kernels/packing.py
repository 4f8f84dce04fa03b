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


@helper
def place(i, j, at, transposed):
    """(output, k) of element (i, j) of a piece."""
    return (j, at + i) if transposed else (at + i, j)


@kernel('void(f4[:, ::1], b1, i8, f4[:, ::1])')
def pack_float32(raw, transposed, at, w):
    """Into [panels, k * 16]."""
    for i in range(raw.shape[0]):
        for j in range(raw.shape[1]):
            out, k = place(i, j, at, transposed)
            w[out // LANES, k * LANES + out % LANES] = raw[i, j]


@kernel('void(u2[:, ::1], b1, i8, u2[:, ::1])')
def pack_bfloat16(raw, transposed, at, w):
    """Into [panels, k/2 * 16 * 2]."""
    for i in range(raw.shape[0]):
        for j in range(raw.shape[1]):
            out, k = place(i, j, at, transposed)
            w[out // LANES, k // 2 * (2 * LANES) + out % LANES * 2 + k % 2] = raw[i, j]


@kernel('void(u1[:, ::1], u1[:, :, ::1], b1, i8, u1[:, ::1])')
def pack_int8(raw, scale, transposed, at, w):
    """Into groups of [8, 16, 4] q + 128 and 16 scales, all as bytes."""
    size = INT8_BYTES
    for i in range(raw.shape[0]):
        for j in range(raw.shape[1]):
            out, k = place(i, j, at, transposed)
            byte = k // GROUP * size + k % GROUP // 4 * (4 * LANES) + out % LANES * 4 + k % 4
            w[out // LANES, byte] = raw[i, j] ^ np.uint8(128)
    pack_scales(scale, transposed, at, w, size, INT8_SCALES)


@kernel('void(u1[:, ::1], u1[:, :, ::1], u1[:, :, ::1], b1, i8, u1[:, ::1])')
def pack_int4(raw, scale, offset, transposed, at, w):
    """Into groups of [4, 16, 4] bytes, 16 scales and 16 offsets.  raw: two columns in a byte, the even one low; w: zeros."""
    size = INT4_BYTES
    for i in range(raw.shape[0]):
        for j in range(2 * raw.shape[1]):
            out, k = place(i, j, at, transposed)
            value = (raw[i, j // 2] >> np.uint8(j % 2 * 4)) & np.uint8(15)
            byte = k // GROUP * size + k % GROUP // 8 * (4 * LANES) + out % LANES * 4 + k % 4
            w[out // LANES, byte] |= value << np.uint8(k % 8 // 4 * 4)
    pack_scales(scale, transposed, at, w, size, INT4_SCALES)
    pack_scales(offset, transposed, at, w, size, INT4_SCALES + LANES * HALF_BYTES)


@helper
def pack_scales(scale, transposed, at, w, size, start):
    """One of the rows of 16 after the values of each group."""
    first = at // GROUP if transposed else at
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out, group = place(i, j, first, transposed)
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
