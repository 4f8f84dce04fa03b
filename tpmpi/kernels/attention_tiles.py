"""softmax(Q K^T) V in the tile registers of amx.py, over a cache of bfloat16 as attention.py describes it.

K lies as a tile's weights do, 16 keys by pairs of head_dim; V as well, pairs of keys by 16 of head_dim.  So both products
are those of matrix_units.py, Q and the exponentials in as many parts of bfloat16 as are asked for.  Keys go by steps of
32; where a run of slots begins or ends within one, its part of V is copied beside zeros: what other requests keep there
does not matter, whatever it is.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.amx import ROW, TILE, TILE_K, TILE_ROWS, aligned, registers, release, row_exp_parts, row_parts, tile_blocks
from tpmpi.kernels.attention import FEWEST_ROWS, TYPES, mask_row, panels_of, pieces_of, runs_of
from tpmpi.kernels.jit import helper, inlined, shared_kernel
from tpmpi.kernels.rows import floats
from tpmpi.kernels.tiles import LANES, keep

SCORES = 1 << 17  # of one block of rows: 512 KiB, a fourth of a second-level cache
MOST_ROWS = 32  # queries of one block
f32 = np.float32


def _attention(parts: int):
    """share(…), Q and the exponentials in so many parts of bfloat16."""
    two, one = tile_blocks(parts, 1)
    split, exponentials = row_parts(parts), row_exp_parts(parts)

    @helper
    def multiply(tiles, x, x_part, x_row, row_tiles, w, w_panel, w_step, w_row, panels, steps, out, out_row, first):
        """out (+)= x · w for whole tiles of rows and pairs of panels."""
        for p in range(0, panels, 2):
            for m in range(0, row_tiles, 2):
                to = out + m * TILE_ROWS * out_row + p * ROW
                if m + 1 < row_tiles:
                    two(tiles, x + m * x_row, x_part, x_row, w + p * w_panel, 0, w_panel, w_step, w_row, steps, to, out_row,
                        first, 0, 0, 0, 0)
                else:
                    one(tiles, x + m * x_row, x_part, w + p * w_panel, 0, w_panel, w_step, w_row, steps, to, out_row, first)

    @helper
    def some_of(v, first, low, high, buffer):
        """The 32 slots of V from the first on, those outside low to high - 1 as zeros.  v, buffer: [slots / 2, 2 head_dim]"""
        for pair in range(TILE_K // 2):
            for j in range(v.shape[1]):
                at = first + 2 * pair + j % 2
                buffer[pair, j] = v[at // 2, j] if low <= at < high else 0

    @inlined
    def attend_block(tiles, q, k, v, head, heads, rows, first_row, position, oldest, window, scale, cap, sinks, runs, b):
        """`rows` queries from row first_row and position `position` on, all heads that read one KV head."""
        dim, m = q.shape[2], rows * heads
        row_tiles, dim_steps = -(-m // TILE_ROWS), dim // TILE_K
        low, high = max(oldest, position - window + 1), position + rows  # positions that some row sees
        pieces, width = pieces_of(runs, sinks, low, high, TILE_K)
        x_row, p_row = dim_steps * TILE, width // TILE_K * TILE
        x, p = aligned(parts * row_tiles * x_row), aligned(parts * row_tiles * p_row)
        scores = aligned(row_tiles * TILE_ROWS * 4 * width)
        output = aligned(row_tiles * TILE_ROWS * 4 * dim)
        for i in range(m):
            query = q.ctypes.data + 4 * dim * ((first_row + i // heads) * q.shape[1] + head + i % heads)
            split(query, x.ctypes.data + i // TILE_ROWS * x_row + i % TILE_ROWS * ROW, row_tiles * x_row, dim_steps, f32(scale))
        for piece in range(len(pieces)):
            column, count, slot = pieces[piece, 0], pieces[piece, 2], pieces[piece, 3]
            at = k.ctypes.data + slot // TILE_K * (2 * dim * 2 * LANES)
            multiply(tiles, x.ctypes.data, row_tiles * x_row, x_row, row_tiles, at, dim * 2 * LANES, TILE, ROW,
                     panels_of(slot, count, TILE_K) * 2, dim_steps, scores.ctypes.data + 4 * column, 4 * width, True)
        factor = np.empty(m, np.float32)
        for i in range(m):
            at = scores.ctypes.data + 4 * width * i
            top = mask_row(at, width, pieces, position + i // heads, window, cap, sinks, TILE_K)
            place = p.ctypes.data + i // TILE_ROWS * p_row + i % TILE_ROWS * ROW
            factor[i] = f32(1) / exponentials(at, width // TILE_K, top, place, row_tiles * p_row)
        pairs = v.reshape(-1, 2 * dim)
        edge = aligned(TILE_K * dim * 2)
        beside = edge.view(np.uint16).reshape(TILE_K // 2, 2 * dim)
        first = True
        for piece in range(len(pieces)):
            column, slot, last = pieces[piece, 0], pieces[piece, 3], pieces[piece, 3] + pieces[piece, 2]
            at, end = slot // TILE_K * TILE_K, last // TILE_K * TILE_K
            x_at = p.ctypes.data + column // TILE_K * TILE
            while at < last:
                steps, w = 1, edge.ctypes.data
                if at >= slot and at < end:  # whole steps
                    steps, w = (end - at) // TILE_K, v.ctypes.data + at * 2 * dim
                else:
                    some_of(pairs, at, slot, last, beside)
                multiply(tiles, x_at, row_tiles * p_row, p_row, row_tiles, w, ROW, TILE_K * 2 * dim, 4 * dim, dim // LANES, steps,
                         output.ctypes.data, 4 * dim, first)
                first = False
                x_at += steps * TILE
                at += steps * TILE_K
        for i in range(m):
            out = floats(output.ctypes.data + 4 * dim * i, dim)
            result = floats(b.ctypes.data + 4 * dim * ((first_row + i // heads) * q.shape[1] + head + i % heads), dim)
            for j in range(dim):
                result[j] = out[j] * factor[i]
        keep(x)
        keep(p)
        keep(scores)
        keep(output)
        keep(edge)
        keep(q)
        keep(b)
        keep(k)
        keep(v)

    @helper
    def share(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, t, threads):
        """Every threads-th task from the t-th on; a task is a block of rows of a segment and a KV head."""
        largest, task, tiles = 1, 0, registers()
        for group in range(len(groups)):
            largest = max(largest, groups[group, 1] - groups[group, 0])
        for i in range(len(table)):
            row, rows, start, oldest, ring = table[i, 0], table[i, 1], table[i, 2], table[i, 3], blocks[table[i, 4]:table[i, 5]]
            runs = runs_of(ring, table[i, 6], block, sinks, oldest, start + rows)
            each_block = max(FEWEST_ROWS, min(MOST_ROWS, SCORES // (largest * (start + rows - oldest))))
            for at in range(0, rows, each_block):
                for group in range(len(groups)):
                    if task % threads == t:
                        attend_block(tiles, q, k[group], v[group], groups[group, 0], groups[group, 1] - groups[group, 0],
                                     min(each_block, rows - at), row + at, start + at, oldest, window, scale, cap, sinks, runs, b)
                    task += 1
        release(tiles)

    return share


_whole, _half = _attention(1), _attention(2)


@shared_kernel(f'void(f4[:, :, ::1], u2[:, :, ::1], u2[:, :, ::1], {TYPES})')
def attend_rounded(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """B of a step as `attention.attend_bfloat16` gives it, Q and the exponentials rounded; head_dim is a multiple of 32."""
    for t in prange(threads):
        _whole(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)


@shared_kernel(f'void(f4[:, :, ::1], u2[:, :, ::1], u2[:, :, ::1], {TYPES})')
def attend_tiles(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """The same, Q and the exponentials in two parts, 16 bits of each."""
    for t in prange(threads):
        _half(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)
