"""softmax(Q K^T) V in the tile registers of amx.py, over a cache of bfloat16 as attention.py describes it.

K lies as a tile's weights do, 16 keys by pairs of head_dim; V as well, pairs of keys by 16 of head_dim.  So both products
are those of matrix_units.py, Q and the exponentials in as many parts of bfloat16 as are asked for.  Keys go by steps of
32; where a run of slots begins or ends within one, its part of V is copied beside zeros: what other requests keep there
does not matter, whatever it is.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.alignment import LINE, aligned
from tpmpi.kernels.amx import ROW, TILE, TILE_K, TILE_ROWS, registers, release, row_exp_parts, row_parts, tile_blocks
from tpmpi.kernels.attention import (
    ATTEND_BFLOAT16,
    FEWEST_ROWS,
    SOON,
    first_query,
    mask_row,
    most_columns,
    panels_of,
    pieces_of,
    put_rows,
    runs_of,
    slot_there,
    task_after,
)
from tpmpi.kernels.jit import helper, inlined, shared_kernel
from tpmpi.kernels.rows import floats, words
from tpmpi.kernels.tiles import LANES, keep

SCORES = 1 << 17  # of one block of rows: 512 KiB, a fourth of a second-level cache
MOST_ROWS = 32  # queries of one block
f32 = np.float32


def _attention(parts: int):
    """share(…), Q and the exponentials in so many parts of bfloat16."""
    two, one = tile_blocks(parts, 1)
    split, exponentials = row_parts(parts), row_exp_parts(parts)

    @helper
    def multiply(tiles, x, x_part, x_row, row_tiles, w, w_panel, w_step, w_row, panels, steps, out, out_row, first, also):
        """out (+)= x · w for whole tiles of rows and pairs of panels.

        also: where as many bytes lie that will be needed next, or 0; they are asked for meanwhile.
        """
        for p in range(0, panels, 2):
            for m in range(0, row_tiles, 2):
                to, at = out + m * TILE_ROWS * out_row + p * ROW, w + p * w_panel
                soon, pairs = also + p * steps * TILE, TILE // LINE if m == 0 and also else 0
                if m + 1 < row_tiles:
                    two(tiles, x + m * x_row, x_part, x_row, at, 0, w_panel, w_step, w_row, steps, to, out_row, first, soon,
                        soon + LINE, pairs, 2 * LINE, 0)
                else:
                    one(tiles, x + m * x_row, x_part, at, 0, w_panel, w_step, w_row, steps, to, out_row, first, soon,
                        soon + LINE, pairs, 2 * LINE)

    @helper
    def some_of(v, dim, first, low, high, buffer):
        """32 slots of V, from address v on and numbered from `first`, into a buffer, those outside low to high - 1 as zeros."""
        for pair in range(TILE_K // 2):
            at = first + 2 * pair
            mask = np.uint32(0xFFFF if low <= at < high else 0) | np.uint32(0xFFFF0000 if low <= at + 1 < high else 0)
            source, target = words(v + 4 * dim * pair, dim), words(buffer + 4 * dim * pair, dim)
            for j in range(dim):
                target[j] = source[j] & mask

    @inlined
    def attend_block(tiles, q, k, v, head, heads, rows, first_row, position, oldest, window, scale, cap, sinks, runs, pieces, xa,
                     sa, pa, oa, fa, edge, b, table, blocks, block, then, then_k):
        """`rows` queries from row first_row and position `position` on, all heads that read one KV head.

        k, v: where that one's begin; xa, sa, pa, oa, fa, edge: room for Q and the exponentials in tiles, scores, sums,
        factors and a tile's part of V; then, then_k: the segment and the K of the next task, which is asked for meanwhile.
        """
        dim, m = q.shape[2], rows * heads
        row_tiles, dim_steps = -(-m // TILE_ROWS), dim // TILE_K
        low, high = max(oldest, position - window + 1), position + rows  # positions that some row sees
        number, width = pieces_of(runs, sinks, low, high, TILE_K, pieces)
        x_row, p_row = dim_steps * TILE, width // TILE_K * TILE
        factors = floats(fa, m)
        for i in range(m):
            query = q.ctypes.data + 4 * first_query(q, first_row, head, heads, i)
            split(query, xa + i // TILE_ROWS * x_row + i % TILE_ROWS * ROW, row_tiles * x_row, dim_steps, f32(scale))
        for piece in range(number):
            column, count, slot = pieces[piece, 0], pieces[piece, 2], pieces[piece, 3]
            at = k + slot // TILE_K * (2 * dim * 2 * LANES)
            multiply(tiles, xa, row_tiles * x_row, x_row, row_tiles, at, dim * 2 * LANES, TILE, ROW,
                     panels_of(slot, count, TILE_K) * 2, dim_steps, sa + 4 * column, 4 * width, True,
                     v + slot // TILE_K * (2 * dim * 2 * LANES))
        for i in range(m):
            at = sa + 4 * width * i
            top = mask_row(at, width, pieces, number, position + i // heads, window, cap, sinks, TILE_K)
            place = pa + i // TILE_ROWS * p_row + i % TILE_ROWS * ROW
            factors[i] = f32(1) / exponentials(at, width // TILE_K, top, place, row_tiles * p_row)
        first = True
        for piece in range(number):
            column, slot, last = pieces[piece, 0], pieces[piece, 3], pieces[piece, 3] + pieces[piece, 2]
            at, end = slot // TILE_K * TILE_K, last // TILE_K * TILE_K
            x_at, also = pa + column // TILE_K * TILE, 0
            if then >= 0 and width * 2 * dim <= SOON:
                there = slot_there(table, blocks, block, then, pieces[piece, 1], low, window)
                if there >= 0:
                    also = then_k + (there // TILE_K - slot // TILE_K) * TILE_K * 2 * dim
            while at < last:
                steps, w = 1, edge
                if at >= slot and at < end:  # whole steps
                    steps, w = (end - at) // TILE_K, v + at * 2 * dim
                else:
                    some_of(v + at * 2 * dim, dim, at, slot, last, edge)
                multiply(tiles, x_at, row_tiles * p_row, p_row, row_tiles, w, ROW, TILE_K * 2 * dim, 4 * dim, dim // LANES, steps,
                         oa, 4 * dim, first, also + at * 2 * dim if also else 0)
                first = False
                x_at += steps * TILE
                at += steps * TILE_K
        put_rows(oa, dim, factors, b, first_row, head, heads)
        keep(q)

    @helper
    def share(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, t, threads):
        """Every threads-th task from the t-th on; a task is a block of rows of a segment and a KV head."""
        largest, task, dim, tiles = 1, 0, q.shape[2], registers()
        k_head, v_head = 2 * k.shape[1] * k.shape[2], 2 * v.shape[1] * v.shape[2]
        for group in range(len(groups)):
            largest = max(largest, groups[group, 1] - groups[group, 0])
        room, pieces = np.empty(0, np.uint8), np.empty((2, 4), np.int64)
        for i in range(len(table)):
            row, rows, start, oldest, ring = table[i, 0], table[i, 1], table[i, 2], table[i, 3], blocks[table[i, 4]:table[i, 5]]
            runs = runs_of(ring, table[i, 6], block, sinks, oldest, start + rows)
            each_block = max(FEWEST_ROWS, min(MOST_ROWS, SCORES // (largest * (start + rows - oldest))))
            m = -(-min(rows, each_block) * largest // TILE_ROWS) * TILE_ROWS
            columns = most_columns(runs, TILE_K)
            x_size, p_size, s_size, o_size = parts * m * 2 * dim, parts * m * 2 * columns, m * 4 * columns, m * 4 * dim
            size = x_size + p_size + s_size + o_size + TILE_K * 2 * dim + 4 * m
            if len(room) < size:
                room = aligned(size)
            if len(pieces) < 2 * len(runs):
                pieces = np.empty((2 * len(runs), 4), np.int64)
            xa = room.ctypes.data
            pa, sa, oa = xa + x_size, xa + x_size + p_size, xa + x_size + p_size + s_size
            edge = oa + o_size
            fa = edge + TILE_K * 2 * dim
            for at in range(0, rows, each_block):
                for group in range(len(groups)):
                    if task % threads == t:
                        then, then_group = task_after(i, group, rows - at - each_block, len(groups), table, threads)
                        attend_block(tiles, q, k.ctypes.data + group * k_head, v.ctypes.data + group * v_head, groups[group, 0],
                                     groups[group, 1] - groups[group, 0], min(each_block, rows - at), row + at, start + at,
                                     oldest, window, scale, cap, sinks, runs, pieces, xa, sa, pa, oa, fa, edge, b, table, blocks,
                                     block, then, k.ctypes.data + then_group * k_head)
                    task += 1
        release(tiles)
        keep(k)
        keep(v)
        keep(room)

    return share


_whole, _half = _attention(1), _attention(2)


@shared_kernel(ATTEND_BFLOAT16)
def attend_rounded(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """B of a step as `attention.attend_bfloat16` gives it, Q and the exponentials rounded; head_dim is a multiple of 32."""
    for t in prange(threads):
        _whole(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)


@shared_kernel(ATTEND_BFLOAT16)
def attend_tiles(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """The same, Q and the exponentials in two parts, 16 bits of each."""
    for t in prange(threads):
        _half(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)
