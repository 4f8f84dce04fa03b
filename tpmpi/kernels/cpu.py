"""The kernels for CPUs, compiled by Numba: every operation of reference.py with the same name and meaning.

Matrices lie in panels of 16 outputs, in the kind of the file: float32, bfloat16, int8 or int4 (tiles.py).  A cache of
K and V lies likewise (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tpmpi.kernels import attention, elementwise, jit, matrix_units, packing, products, reference
from tpmpi.kernels.jit import HALVES
from tpmpi.kernels.tiles import GROUP, GROUP_BYTES, GROUP_VALUES, HALF_BYTES, LANES, PER_STEP
from tpmpi.weights import Stored, Weight

VALUES = {'float32': np.float32, 'bfloat16': np.uint16, 'int8': np.int8, 'int4': np.uint8}  # a panel seen as these
STREAM_K = 1000  # rows of what `stream` takes for a matrix: streams that lie powers of two apart would hinder each other
EVERYWHERE = 1 << 62  # a window that hides nothing


class Kernels:
    """The operations for one rank.  threads: that share each product and each attention."""

    SLOTS_TOGETHER = LANES  # of the cache's layout: blocks that are multiples of it can be copied
    rope_table = staticmethod(reference.rope_table)
    top_k = staticmethod(reference.top_k)

    def __init__(self, threads: int = 1, activations: str = 'float32'):
        self.threads, self.rounded = threads, activations == 'bfloat16'
        self.segments, self.tables = None, None  # of the step that is running, as the attention takes them
        self.units = matrix_units.TILES | (matrix_units.PAIRS if self.rounded else {})  # for many rows, by kind of weight

    def needed(self, kinds: Sequence[str], kv_dtype: str) -> list:
        """The compiled functions that a model with weights of these kinds needs."""
        found = [elementwise.rms_norm, elementwise.activate, elementwise.gated_activation, elementwise.log_sum_exp]
        found += [elementwise.round_bfloat16] if self.rounded else []
        found += [getattr(elementwise, f'rope_append_{kv_dtype}'), getattr(attention, f'attend_{kv_dtype}')]
        found += [packing.touch] if self.threads > 1 else []
        for kind in kinds:
            found += [getattr(packing, f'pack_{kind}'), getattr(packing, f'embed_{kind}'), products.MULTIPLY[kind]]
            found += [self.units[kind]] if kind in self.units else []
        return found

    missing, build, folder = staticmethod(jit.missing), staticmethod(jit.build), jit.FOLDER

    # ---- weights

    def new_weight(self, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=np) -> Weight:
        """An empty packed matrix for `rows` stored rows; `fill` puts them in, piece by piece."""
        k, outputs = (rows, hidden_size) if transposed else (hidden_size, rows)
        if kind in PER_STEP:
            size = -(-k // PER_STEP[kind]) * LANES * 4
        else:
            assert k % GROUP == 0
            size = k // GROUP * GROUP_BYTES[kind]
        data = np.zeros((-(-outputs // LANES), size), np.uint8)
        if self.threads > 1:
            packing.touch(data, self.threads)
        return Weight(data, kind, letter, k, outputs)

    @staticmethod
    def fill(weight: Weight, at: int, stored: Stored) -> None:
        """Put stored rows into a packed matrix; at: the first one's place."""
        assert stored.kind == weight.kind
        transposed, values = stored.group_axis == 0, np.uint8 if stored.kind == 'int8' else VALUES[stored.kind]
        scales = [_bytes_of(s) for s in (stored.scale, stored.offset) if s is not None]
        pack = getattr(packing, f'pack_{stored.kind}')
        pack(np.ascontiguousarray(stored.data).view(values), *scales, transposed, at, weight.data.view(values))

    join = staticmethod(reference.join)

    # ---- the operations of a step

    @staticmethod
    def embed(tokens, table: Weight, vocab: range):
        """Rows of the embedding that this rank holds, zeros for the others' tokens.  [tokens] -> [tokens, hidden]"""
        y, ids = np.zeros((len(tokens), table.in_features), np.float32), np.ascontiguousarray(tokens, np.int64) - vocab.start
        embed = getattr(packing, f'embed_{table.kind}')
        embed(ids, len(vocab), table.data.view(VALUES[table.kind]), y.view(np.uint32) if table.kind == 'bfloat16' else y)
        if table.kind in ('int8', 'int4'):
            mine = (ids >= 0) & (ids < len(vocab))
            y[mine] = _scaled(y[mine], table, ids[mine])
        return y

    @staticmethod
    def rms_norm(x, gain, eps: float):
        """x / sqrt(mean(x^2) + eps) * gain.  [tokens, hidden] -> [tokens, hidden]"""
        y = np.empty_like(x)
        elementwise.rms_norm(x, gain, eps, y)
        return y

    def linear(self, x, weight: Weight):
        """x · W for a packed W.  [tokens, in] -> [tokens, out]"""
        if weight.kind == 'mixed':
            return np.concatenate([self.linear(x, part) for part in weight.data], axis=1)
        y = np.empty((len(x), weight.out_features), np.float32)
        if weight.in_features == 0:  # a rank without heads adds nothing
            y[:] = 0
        else:
            if self.rounded and weight.kind == 'bfloat16':
                x, given = np.empty_like(x), x
                elementwise.round_bfloat16(given, x)
            self._product(x, weight)(_even(x, weight), weight.data, y, self.threads)
        return y

    def _product(self, x, weight: Weight):
        """The kernel for so many rows: the matrix units, where there are any, or the ordinary one."""
        if len(x) >= matrix_units.FEWEST_ROWS and weight.in_features % matrix_units.STEP == 0:
            return self.units.get(weight.kind, products.MULTIPLY[weight.kind])
        return products.MULTIPLY[weight.kind]

    @staticmethod
    def rope_append(qkv, num_heads: int, head_dim: int, rope, cache, slots):
        """Split the fused projection, turn Q and K, put K and V into the cache; returns Q [tokens, heads/n, head_dim]."""
        q = np.empty((len(qkv), num_heads, head_dim), np.float32)
        cos, sin = (qkv, qkv) if rope is None else (table[:, 0] for table in rope)
        append = elementwise.rope_append_float32 if cache.k.dtype == np.float32 else elementwise.rope_append_bfloat16
        append(qkv, cos, sin, rope is not None, slots, q, cache.k, cache.v)
        return q

    def attend(self, q, cache, query_groups, segments, window: int | None):
        """B = softmax(Q K^T / sqrt(head_dim)) V over each request's ring.  Returns B [tokens, heads/n * head_dim]."""
        b = np.empty(q.shape, np.float32)
        run = attention.attend_float32 if cache.k.dtype == np.float32 else attention.attend_bfloat16
        if segments is not self.segments:  # all layers of a step ask for the same
            self.segments, self.tables = segments, _tables(segments)
        run(q, cache.k, cache.v, _bounds(query_groups), *self.tables, segments[0].ring.block,
            EVERYWHERE if window is None else window, b, self.threads)
        return b.reshape(len(q), -1)

    @staticmethod
    def activate(x, kind: str):
        """The MLP's activation, element by element."""
        y = np.empty_like(x)
        elementwise.activate(x, elementwise.ACTIVATIONS[kind], y)
        return y

    @staticmethod
    def gated_activation(gate_up, kind: str):
        """activation(gate) * up.  [tokens, 2 ffn/n] -> [tokens, ffn/n]"""
        y = np.empty((len(gate_up), gate_up.shape[1] // 2), np.float32)
        elementwise.gated_activation(gate_up, elementwise.ACTIVATIONS[kind], y)
        return y

    @staticmethod
    def log_sum_exp(logits):
        """log(sum(exp(logits))) of each row, -inf where a rank holds no vocabulary.  [tokens, vocab/n] -> [tokens]"""
        y = np.full(len(logits), -np.inf, np.float32)
        if logits.shape[1]:
            elementwise.log_sum_exp(np.ascontiguousarray(logits), y)
        return y

    # ---- for measurements

    def stream(self, buffer) -> None:
        """Read a float32 array as fast as weights can be read: it is multiplied as if it were some."""
        jit.build([products.multiply_float32])
        panels = buffer.size // (STREAM_K * LANES)
        w = buffer[:panels * STREAM_K * LANES].view(np.uint8).reshape(panels, -1)
        y = np.empty((1, panels * LANES), np.float32)
        products.multiply_float32(np.ones((1, STREAM_K), np.float32), w, y, self.threads)

    # ---- the cache

    @staticmethod
    def new_cache(kv_heads: int, slots: int, head_dim: int, kv_dtype: str, xp=np):
        """One layer's K and V; each [kv_heads/n, slots, head_dim] in attention.py's order, and filled up as that says."""
        dtype, even = (np.float32, head_dim) if kv_dtype == 'float32' else (np.uint16, head_dim + head_dim % 2)
        slots = -(-slots // LANES) * LANES
        return np.zeros((kv_heads, slots, even), dtype), np.zeros((kv_heads, slots, -(-head_dim // LANES) * LANES), dtype)


@lru_cache
def _bounds(groups: tuple[range, ...]) -> np.ndarray:
    """[kv_heads/n, 2] first query head of each, and the one after its last."""
    return np.array([(g.start, g.stop) for g in groups], np.int64).reshape(-1, 2)


def _tables(segments) -> tuple[np.ndarray, np.ndarray]:
    """A step's segments as the kernel takes them: [segments, 5], and the blocks of all rings one after another."""
    blocks = [s.ring.blocks for s in segments]
    ends = np.cumsum([len(ring) for ring in blocks])
    table = [(s.rows.start, len(s.slots), s.start, end - len(ring), end)
             for s, ring, end in zip(segments, blocks, ends, strict=True)]
    return np.array(table, np.int64), np.concatenate(blocks).astype(np.int64)


def _bytes_of(scales: np.ndarray) -> np.ndarray:
    """Scales or offsets as the bytes that a panel keeps of each.  float16 [a, b] -> uint8 [a, b, 2 or 4]"""
    kept = np.ascontiguousarray(scales, np.float16 if HALVES else np.float32)
    return kept.view(np.uint8).reshape(*kept.shape, HALF_BYTES)


def _scaled(values, table: Weight, rows):
    """Integers of the embedding's rows as the numbers that they stand for.  [tokens, hidden]"""
    groups = table.data.reshape(len(table.data), -1, GROUP_BYTES[table.kind])  # [panels, groups, bytes]
    at, parts = GROUP_VALUES[table.kind], []
    for start in (at, at + LANES * HALF_BYTES)[:1 if table.kind == 'int8' else 2]:
        stored = np.ascontiguousarray(groups[rows // LANES, :, start:start + LANES * HALF_BYTES])
        stored = stored.view(np.float16 if HALVES else np.float32).astype(np.float32)  # [tokens, groups, 16]
        parts.append(np.repeat(stored[np.arange(len(rows)), :, rows % LANES], GROUP, axis=1))
    return values * parts[0] + (parts[1] if len(parts) == 2 else 0)


def _even(x, weight: Weight):
    """x with a zero column more where pairs along an odd k are filled up."""
    each = PER_STEP.get(weight.kind, 1)
    return x if x.shape[1] % each == 0 else np.concatenate((x, np.zeros((len(x), 1), np.float32)), axis=1)
