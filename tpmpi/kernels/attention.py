"""softmax(Q K^T) V over rings of cache slots, as two products with panels (see tiles.py): K and V lie as weights do.

K of a head: panels of 16 slots, [slots/16, head_dim, 16], so that the scores of 16 keys are one panel of outputs.
V of a head: [slots, head_dim], so that the sum over keys is a product along k.  In bfloat16 pairs lie together:
[slots/16, head_dim/2, 16, 2] and [slots/2, head_dim, 2].  head_dim is padded to a multiple of 16 in V, to an even
number in K of bfloat16.

One row or many: the scores of a key, the sum of the exponentials (in lanes by slot modulo 16, slots ascending) and the
sum over keys have one order.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.alignment import aligned
from tpmpi.kernels.elementwise import bfloat16
from tpmpi.kernels.jit import helper, inlined, shared_kernel
from tpmpi.kernels.products import float_panels
from tpmpi.kernels.rows import floats, halves, row_cap, row_exp, row_exp_halves, row_max
from tpmpi.kernels.tiles import AHEAD, LANES, LATER, PER_STEP, X_STEP, keep

SCORES = 1 << 16  # of one block of rows: 256 KiB, half of a second-level cache
MOST_ROWS, FEWEST_ROWS = 16, 4  # queries of one block
SOON = 1 << 18  # bytes of V that are asked for while K is read: a half, or a fourth, of a second-level cache
V_ROWS = 64  # rows of V in one pass: 16 KiB, half of a first-level cache
f32 = np.float32


@helper
def runs_of(blocks, pinned, block, sinks, oldest, stop):
    """Runs of consecutive slots that hold the positions below `sinks` and from `oldest` to stop - 1, ascending.

    [runs, 3] first slot, length, first position.  blocks, pinned: see kv_cache.Ring.
    """
    first = min(sinks, oldest)  # positions before a gap
    runs = np.empty((stop // block - oldest // block + first // block + 2, 3), np.int64)
    n, at, moving = 0, 0 if first > 0 else oldest, len(blocks) - pinned
    while at < stop:
        number = at // block
        if number >= pinned and moving > 0:
            number = pinned + (number - pinned) % moving
        slot, count = blocks[number] * block + at % block, min(block - at % block, (first if at < first else stop) - at)
        if n and slot == runs[n - 1, 0] + runs[n - 1, 1] and at == runs[n - 1, 2] + runs[n - 1, 1]:
            runs[n - 1, 1] += count
        else:
            runs[n, 0], runs[n, 1], runs[n, 2] = slot, count, at
            n += 1
        at += count
        if at == first:
            at = oldest
    return runs[:n].copy()


@helper
def pieces_of(runs, sinks, low, high, unit, pieces):
    """The parts of the runs with positions below `sinks` and from low to high - 1, ascending; their number, and columns.

    pieces: room for two of each run, [pieces, 4] column of the scores, position, keys, first slot.  A piece takes whole
    panels of `unit` columns, 16 or a multiple; the slot of a column is then the same modulo `unit`, whatever low is.
    """
    n = width = 0
    for part in range(0 if sinks > 0 else 1, 2):
        begin, end = (0, min(sinks, low)) if part == 0 else (low, high)
        for run in range(len(runs)):
            first, last = max(begin, runs[run, 2]), min(end, runs[run, 2] + runs[run, 1])
            if first < last:
                slot = runs[run, 0] + first - runs[run, 2]
                pieces[n, 0], pieces[n, 1], pieces[n, 2], pieces[n, 3] = width, first, last - first, slot
                width += panels_of(slot, last - first, unit) * unit
                n += 1
    return n, width


@helper
def most_columns(runs, unit):
    """Of the pieces of some runs."""
    columns = 0
    for run in range(len(runs)):
        columns += runs[run, 1] + 4 * unit  # two pieces, that fill panels up at both ends
    return columns // unit * unit


@helper
def panels_of(slot, count, unit):
    """Panels of `unit` slots that hold `count` slots from `slot` on."""
    return (slot + count - 1) // unit - slot // unit + 1


@helper
def task_after(i, group, rows_left, groups, table, threads):
    """(segment, group) of what the thread computes after group `group` of segment i; (-1, 0) where nothing new is read."""
    group += threads
    if group < groups:
        return i, group
    if group < 2 * groups and rows_left <= 0 and i + 1 < len(table):
        return i + 1, group - groups
    return -1, 0


@helper
def slot_there(table, blocks, block, i, first, low, window):
    """The slot that is to segment i what that of position `first` is to one that sees positions from `low` on, or -1.

    With it memory is asked for what the next task needs: so no other than the text's own blocks have to be right.
    """
    if first >= low:
        first += max(table[i, 3], table[i, 2] - window + 1) - low
    ring, pinned, number = blocks[table[i, 4]:table[i, 5]], table[i, 6], first // block
    if number >= pinned and len(ring) > pinned:
        number = pinned + (number - pinned) % (len(ring) - pinned)
    if first >= table[i, 2] + table[i, 1] or number >= len(ring):
        return -1
    return ring[number] * block + first % block


@helper
def hide(scores, first, last):
    """No key is seen in the columns from first to last - 1 of a row of scores, an address."""
    if first < last:
        part = floats(scores + 4 * first, last - first)
        for i in range(last - first):
            part[i] = f32(-np.inf)


@helper
def mask_row(scores, width, pieces, count_pieces, position, window, cap, sinks, unit):
    """Caps a row of scores, an address, and hides the keys that a query does not see; returns the largest that is left."""
    if cap > 0:
        row_cap(scores, width // LANES, cap)
    for piece in range(count_pieces):
        column, first, count, skip = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], pieces[piece, 3] % unit
        kept = min(count, max(0, sinks - first))  # the window hides none of these
        low = min(count, max(0, position - window + 1 - first))
        high = max(low, min(count, position + 1 - first))
        hide(scores, column, column + skip)
        hide(scores, column + skip + kept, column + skip + low)
        hide(scores, column + skip + high, column + panels_of(pieces[piece, 3], count, unit) * unit)
    return row_max(scores, width // LANES)


@helper
def first_query(q, first_row, head, heads, i):
    """Where the i-th of a block's queries begins, whose heads are the inner ones."""
    return ((first_row + i // heads) * q.shape[1] + head + i % heads) * q.shape[2]


@helper
def put_rows(sums, width, factors, b, first_row, head, heads):
    """The sums of a block's queries, an address, each times its factor, in their places in B [tokens, heads/n, head_dim]."""
    dim = b.shape[2]
    for i in range(len(factors)):
        result = floats(b.ctypes.data + 4 * first_query(b, first_row, head, heads, i), dim)
        total = floats(sums + 4 * width * i, dim)
        for j in range(dim):
            result[j] = total[j] * factors[i]
    keep(b)


def _attention(kind: str):
    """share(…) for a cache of float32 or bfloat16; pairs: of bfloat16, which Q and the exponentials are rounded to as well."""
    add_panels, each, pairs = float_panels(kind, LATER), PER_STEP.get(kind, 2), kind == 'pairs'
    x_bytes = X_STEP[kind] // each

    @helper
    def taken(x, count, rounded):
        """Where float32 numbers lie as the products take them, which may be `rounded`; addresses."""
        if not pairs:
            return x
        numbers, to = floats(x, count), halves(rounded, count)
        for i in range(count):
            to[i] = bfloat16(numbers[i])
        return rounded

    @helper
    def exponentials(row, panels, top, to):
        """Of a row of scores, an address: in their place, or rounded at another; returns their sum."""
        if pairs:
            return row_exp_halves(row, panels, top, to)
        return row_exp(row, panels, top)

    @helper
    def add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row, fresh, ahead):
        add_panels(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row, fresh, ahead)

    @inlined
    def attend_block(q, k, v, head, heads, rows, first_row, position, oldest, window, scale, cap, sinks, runs, pieces, xa, sa, pa,
                     oa, fa, b, table, blocks, block, then, then_k):
        """`rows` queries from row first_row and position `position` on, all heads that read one KV head.

        k, v: where that one's begin; xa, sa, pa, oa, fa: room for Q, scores, exponentials as they are multiplied, sums, factors;
        then, then_k: the segment and the K of the next task.  While K is multiplied V is asked for, and that K while V is.
        """
        dim, m = q.shape[2], rows * heads
        wide, even = -(-dim // LANES) * LANES, -(-dim // each) * each
        low, high = max(oldest, position - window + 1), position + rows  # positions that some row sees
        number, width = pieces_of(runs, sinks, low, high, LANES, pieces)
        for i in range(m):
            query = floats(q.ctypes.data + 4 * first_query(q, first_row, head, heads, i), dim)
            row = floats(xa + 4 * even * i, even)
            for j in range(dim):
                row[j] = query[j] * scale
            if even > dim:
                row[dim] = 0
        x = taken(xa, m * even, pa)
        sums, factors = floats(oa, m * wide), floats(fa, m)
        for i in range(m * wide):
            sums[i] = 0
        panel, v_panel = even * LANES * 4 // each, wide * LANES * 4 // each
        soon = width // LANES * v_panel <= SOON
        for piece in range(number):
            column, slot = pieces[piece, 0], pieces[piece, 3]
            at, ahead = k + slot // LANES * panel, AHEAD
            if soon:
                ahead = v + slot // LANES * v_panel - at
            add(np.int64(x), x_bytes * even, m, at, panel, LANES * 4, panels_of(slot, pieces[piece, 2], LANES), even // each,
                sa + 4 * column, 4 * width, np.int64(1), ahead)
        for i in range(m):
            row = sa + 4 * width * i
            top = mask_row(row, width, pieces, number, position + i // heads, window, cap, sinks, LANES)
            factors[i] = f32(1) / exponentials(row, width // LANES, top, pa + x_bytes * width * i)
        p = pa if pairs else sa
        for piece in range(number):
            column, slot, last = pieces[piece, 0], pieces[piece, 3], pieces[piece, 3] + pieces[piece, 2]
            begin, end, ahead = slot // each * each, -(-last // each) * each, AHEAD
            if soon and then >= 0:
                there = slot_there(table, blocks, block, then, pieces[piece, 1], low, window)
                if there >= 0:
                    ahead = then_k + there // LANES * panel - (v + slot // LANES * v_panel)
            for at in range(begin, end, V_ROWS):
                add(p + x_bytes * (column + begin % LANES + at - begin), x_bytes * width, m, v + at * wide * 4 // each,
                    LANES * 4, wide * 4, wide // LANES, (min(end, at + V_ROWS) - at) // each, oa, 4 * wide, np.int64(0), ahead)
        put_rows(oa, wide, factors, b, first_row, head, heads)
        keep(q)

    @helper
    def share(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, t, threads):
        """Every threads-th task from the t-th on; a task is a block of rows of a segment and a KV head."""
        largest, task, dim = 1, 0, -(-q.shape[2] // LANES) * LANES
        k_head, v_head = k.shape[1] * k.shape[2] * k.itemsize, v.shape[1] * v.shape[2] * v.itemsize
        for group in range(len(groups)):
            largest = max(largest, groups[group, 1] - groups[group, 0])
        room, columns = np.empty(0, np.uint8), 0
        pieces = np.empty((2, 4), np.int64)
        for i in range(len(table)):
            row, rows, start, oldest, ring = table[i, 0], table[i, 1], table[i, 2], table[i, 3], blocks[table[i, 4]:table[i, 5]]
            runs = runs_of(ring, table[i, 6], block, sinks, oldest, start + rows)
            each_block = max(FEWEST_ROWS, min(MOST_ROWS, SCORES // (largest * (start + rows - oldest))))
            columns, m = most_columns(runs, LANES), min(rows, each_block) * largest
            x_size, s_size = 4 * m * dim, 4 * m * columns
            p_size = max(x_size, s_size)
            if len(room) < 2 * x_size + s_size + p_size + 4 * m:
                room = aligned(2 * x_size + s_size + p_size + 4 * m)
            if len(pieces) < 2 * len(runs):
                pieces = np.empty((2 * len(runs), 4), np.int64)
            xa = room.ctypes.data
            oa, sa, pa = xa + x_size, xa + 2 * x_size, xa + 2 * x_size + s_size
            for at in range(0, rows, each_block):
                for group in range(len(groups)):
                    if task % threads == t:
                        then, then_group = task_after(i, group, rows - at - each_block, len(groups), table, threads)
                        attend_block(q, k.ctypes.data + group * k_head, v.ctypes.data + group * v_head, groups[group, 0],
                                     groups[group, 1] - groups[group, 0], min(each_block, rows - at), row + at, start + at,
                                     oldest, window, scale, cap, sinks, runs, pieces, xa, sa, pa, oa, pa + p_size, b,
                                     table, blocks, block, then, k.ctypes.data + then_group * k_head)
                    task += 1
        keep(k)
        keep(v)
        keep(room)

    return share


_float32, _bfloat16, _pairs = _attention('float32'), _attention('bfloat16'), _attention('pairs')
TYPES = 'i8[:, ::1], i8[:, ::1], i8[::1], i8, i8, f4, f4, i8, f4[:, :, ::1], i8'
ATTEND_FLOAT32 = f'void(f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], {TYPES})'
ATTEND_BFLOAT16 = f'void(f4[:, :, ::1], u2[:, :, ::1], u2[:, :, ::1], {TYPES})'


@shared_kernel(ATTEND_FLOAT32)
def attend_float32(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """B of a step.

    groups: [kv_heads/n, 2] the run of query heads of each; table: [segments, 7] first row, rows, first position, oldest
    position, the run of `blocks` that is the request's ring, and how many of these are pinned; block: slots in each of
    them; window: positions seen, at most; scale, cap: of the scores, a cap of 0 is none; sinks: first positions seen besides.
    """
    for t in prange(threads):
        _float32(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)


@shared_kernel(ATTEND_BFLOAT16)
def attend_bfloat16(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """The same from a cache of bfloat16."""
    for t in prange(threads):
        _bfloat16(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)


@shared_kernel(ATTEND_BFLOAT16)
def attend_pairs(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, threads):
    """The same in products of bfloat16, where activations may be rounded."""
    for t in prange(threads):
        _pairs(q, k, v, groups, table, blocks, block, window, scale, cap, sinks, b, np.int64(t), threads)
