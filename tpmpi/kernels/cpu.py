"""The kernels for CPUs, compiled by Numba: every operation of reference.py with the same name and meaning.

Matrices lie in panels of 16 outputs, in the kind of the file: float32, bfloat16, int8 or int4 (tiles.py).  A cache of
K and V lies likewise (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.kernels import (
    alignment,
    attention,
    attention_tiles,
    elementwise,
    integer_units,
    jit,
    layers,
    matrix_units,
    meeting,
    mixture,
    packing,
    products,
    reference,
    stages,
)
from tpmpi.kernels.jit import HALVES
from tpmpi.kernels.recent import Recent, bounds_of, rows_of, tables_of
from tpmpi.kernels.tiles import GROUP, GROUP_BYTES, HALF_BYTES, LANES, PER_STEP
from tpmpi.weights import Stored, Weight

VALUES = {'float32': np.float32, 'bfloat16': np.uint16, 'int8': np.uint8, 'int4': np.uint8}  # a panel seen as these
STREAM_K = 1000  # rows of what `stream` takes for a matrix: streams that lie powers of two apart would hinder each other
EVERYWHERE = 1 << 62  # a window that hides nothing
FEW_TOKENS = 8  # go to all their experts at once
BYTES_FROM = 6  # rows on, that integer weights meet in tiles: of fewer, vectors read memory faster
BYTES_OF_ONE = 24  # rows of one expert that are worth a call of their own, x in 16 bits and weights of integers
ROWS_TOGETHER = 1024  # of several experts that are computed at once: a bound of memory
SHARED_ROWS = 16  # of norms and activations
NOTHING = np.empty(0, np.float32)  # for a kernel: no bias


class Kernels:
    """The operations for one rank.  threads: that share each product and each attention.

    units: whether matrix units may be used, where there are any.  Those for many rows do not give a row the bits that it
    has alone.
    """

    SLOTS_TOGETHER = LANES  # of the cache's layout: blocks that are multiples of it can be copied
    rope_table, top_k = staticmethod(reference.rope_table), staticmethod(reference.top_k)
    sigmoid, namespace = staticmethod(reference.sigmoid), staticmethod(reference.namespace)
    asarray, node_sums = staticmethod(reference.asarray), meeting.SUMS

    def __init__(self, threads: int = 1, activations: str = 'float32', units: bool = True):
        self.threads, self.rounded, self.coarse = threads, activations == 'bfloat16', activations == 'int8'
        self.recent, self.arena = Recent(), alignment.Arena()
        self.pairs = matrix_units.PAIRS if units and self.rounded else {}
        self.pairs_of_cache = bool(units and matrix_units.PAIRS and (self.rounded or self.coarse))
        self.bytes = (integer_units.COARSE if self.coarse else integer_units.BYTES) if units else {}
        self.products = products.MULTIPLY | (products.COARSE if self.coarse else {}) | self.pairs  # by kind of weight
        self.expert_products = mixture.MULTIPLY | (mixture.COARSE if self.coarse else {})
        tiles, rounded = matrix_units.TILES if units else {}, matrix_units.ROUNDED_TILES
        kinds = set(tiles) & set(rounded if self.rounded else products.COARSE if self.coarse else {})
        self.units = tiles | {kind: rounded[kind] for kind in kinds}  # for many rows
        # rows for which norms leave what they give in tiles as well
        self.norms_in_tiles = min((rounded[kind].fewest for kind in kinds), default=None)
        self.normed = None, None  # what the last one gave, and its tiles

    def needed(self, config: ModelConfig, kinds: Sequence[str], kv_dtype: str) -> list:
        """The compiled functions that a model with weights of these kinds needs."""
        e = elementwise
        found = {'rms': [e.rms_norm, e.add_rms_norm], 'layer': [e.layer_norm], 'none': []}[config.norm]
        found += {'head': [e.norm_heads], 'all': [e.head_squares, e.scale_columns], 'none': []}[config.qk_norm]
        found += [e.gated_activation if config.gated else e.activate, e.log_sum_exp, *meeting.SUMS]
        found += [e.softcap] if config.logit_softcap is not None else []
        found += [getattr(e, f'rope_append_{kv_dtype}'), self._attention(kv_dtype, config.head_dim)]
        found += [matrix_units.add_rms_norm_in_tiles] if self.norms_in_tiles and config.norm == 'rms' else []
        found += [layers.COMPILED[kv_dtype]] if layers.usual(config) else []
        if config.num_experts:
            found += [mixture.route, mixture.sort_by_expert, mixture.combine, *(self.expert_products[kind] for kind in kinds)]
            found += [stages.expert_parts] if layers.usual(config) else []
        return found + self.needed_for(kinds)

    def needed_for(self, kinds: Sequence[str]) -> list:
        """The compiled functions that matrices of these kinds need."""
        found = [elementwise.round_bfloat16] if self.rounded else []
        found += [packing.touch] if self.threads > 1 else []
        for kind in kinds:
            found += [getattr(packing, f'pack_{kind}'), getattr(packing, f'embed_{kind}'), self.products[kind]]
            found += self.units[kind].kernels if kind in self.units else []
            found += [self.bytes[kind]] if kind in self.bytes else []
        return found

    missing, build, folder = staticmethod(jit.missing), staticmethod(jit.build), jit.FOLDER
    compile_missing = staticmethod(jit.compile_missing)

    # ---- weights

    def new_weight(self, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=np) -> Weight:
        """An empty packed matrix for `rows` stored rows; `fill` puts them in, piece by piece."""
        weights = self.new_experts(1, rows, hidden_size, transposed, kind, letter, xp)
        return self.expert(weights, 0)

    def new_experts(self, count: int, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=np) -> Weight:
        """Empty packed matrices of one shape, one for each expert, as one Weight; `fill` fills each `expert` of it."""
        k, outputs = (rows, hidden_size) if transposed else (hidden_size, rows)
        if kind in PER_STEP:
            size = -(-k // PER_STEP[kind]) * LANES * 4
        else:
            assert k % GROUP == 0
            size = k // GROUP * GROUP_BYTES[kind]
        data = self.arena.zeros((count, -(-outputs // LANES), size), np.uint8)
        if self.threads > 1:
            for matrix in data:
                packing.touch(matrix, self.threads)
        return Weight(data, kind, letter, k, outputs)

    @staticmethod
    def fill(weight: Weight, at: int, stored: Stored) -> None:
        """Put stored rows into a packed matrix; at: the first one's place."""
        assert stored.kind == weight.kind
        transposed, values = stored.group_axis == 0, VALUES[stored.kind]
        scales = [_bytes_of(s) for s in (stored.scale, stored.offset) if s is not None]
        pack = getattr(packing, f'pack_{stored.kind}')
        pack(np.ascontiguousarray(stored.data).view(values), *scales, transposed, at, weight.data.view(values))

    expert, join = staticmethod(reference.expert), staticmethod(reference.join)

    # ---- the operations of a step

    @staticmethod
    def embed(tokens, table: Weight, vocab: range):
        """Rows of the embedding that this rank holds, zeros for the others' tokens.  [tokens] -> [tokens, hidden]"""
        y, ids = np.zeros((len(tokens), table.in_features), np.float32), np.ascontiguousarray(tokens, np.int64) - vocab.start
        embed = getattr(packing, f'embed_{table.kind}')
        embed(ids, len(vocab), table.data.view(VALUES[table.kind]), y.view(np.uint32) if table.kind == 'bfloat16' else y)
        return y

    def rms_norm(self, x, gain, eps: float):
        """x / sqrt(mean(x^2) + eps) * gain.  [tokens, hidden] -> [tokens, hidden]"""
        y = np.empty_like(x)
        elementwise.rms_norm(x, gain, eps, y, self.threads_of_rows(len(x)))
        return y

    def layer_norm(self, x, gain, bias, eps: float):
        """(x - mean) / sqrt(variance + eps) * gain + bias; bias may be None.  [tokens, hidden] -> the same"""
        y = np.empty_like(x)
        elementwise.layer_norm(x, gain, NOTHING if bias is None else bias, eps, y, self.threads_of_rows(len(x)))
        return y

    def added_norm(self, x, part, kind: str, gain, bias, eps: float):
        """part += x, and its norm.  kind: 'rms' or 'layer'.  [tokens, hidden] both, and the result"""
        if kind == 'layer':
            part += x
            return self.layer_norm(part, gain, bias, eps)
        if self.norms_in_tiles and len(x) >= self.norms_in_tiles and x.shape[1] % matrix_units.TILE_K == 0:
            y, tiles = alignment.empty(x.shape, np.float32), matrix_units.Tiles.empty(1, *x.shape)
            matrix_units.add_rms_norm_in_tiles(x, part, gain, eps, y, tiles.data, self.threads_of_rows(len(x)))
            self.normed = y, tiles  # the next product is one with y
            return y
        y = np.empty_like(x)
        elementwise.add_rms_norm(x, part, gain, eps, y, self.threads_of_rows(len(x)))
        return y

    @staticmethod
    def norm_heads(qkv, heads: int, head_dim: int, kind: str, gain, bias, eps: float) -> None:
        """Each of the first `heads` heads of the fused projection, or a run of its columns, through a norm, in place."""
        assert qkv.dtype == np.float32 and (qkv.strides[1] == 4 or qkv.size == 0) and qkv.shape[1] >= heads * head_dim
        elementwise.norm_heads(qkv.__array_interface__['data'][0], qkv.strides[0], len(qkv), heads, head_dim, kind == 'layer',
                               gain, NOTHING if bias is None else bias, eps)

    @staticmethod
    def head_squares(qkv, runs: Sequence[range]):
        """The sum of squares of each of some runs of columns.  [tokens, columns] -> [tokens, runs]"""
        y = np.empty((len(qkv), len(runs)), np.float32)
        for column, run in enumerate(runs):
            elementwise.head_squares(qkv, run.start, run.stop, y, column)
        return y

    @staticmethod
    def scale_columns(qkv, run: range, factor, gain) -> None:
        """A run of columns times a factor for each token and a gain for each column, in place.  factor: [tokens]"""
        assert len(gain) == len(run)
        elementwise.scale_columns(qkv, run.start, factor, gain)

    @staticmethod
    def softcap(x, cap: float):
        """cap * tanh(x / cap).  [tokens, vocab/n], the same shape"""
        y = np.empty_like(x)
        elementwise.softcap(x, cap, y)
        return y

    def linear(self, x, weight: Weight, out=None):
        """x · W for a packed W, in `out` where that is given.  [tokens, in] -> [tokens, out]"""
        if weight.kind == 'mixed':
            return np.concatenate([self.linear(x, part) for part in weight.data], axis=1, out=out)
        if out is None:  # whole lines matter to tiles alone, and take longer to get than a small product
            out = (np.empty if len(x) < BYTES_FROM else alignment.empty)((len(x), weight.out_features), np.float32)
        if weight.in_features == 0:  # a rank without heads adds nothing
            out.fill(0)
            return out
        unit = self._unit(len(x), weight)
        if isinstance(x, matrix_units.Tiles) and (unit is None or unit.parts != x.parts):  # a kind of weights of its own
            x = x.numbers()
        if unit is not None:
            unit.multiply(self._tiles(x, unit).data, len(x), weight.data, out, self.threads)
        else:
            product = self._product(len(x), weight.kind)
            product(self._input(x, weight, product), weight.data, out, self.threads)
        return out

    def _product(self, tokens: int, kind: str):
        return (self.bytes if tokens >= BYTES_FROM and kind in self.bytes else self.products)[kind]

    def _unit(self, tokens: int, weight: Weight) -> matrix_units.Unit | None:
        """The matrix unit for so many rows, if there is one."""
        unit = self.units.get(weight.kind)
        return unit if unit and tokens >= unit.fewest and weight.in_features % matrix_units.TILE_K == 0 else None

    def _tiles(self, x, unit: matrix_units.Unit) -> matrix_units.Tiles:
        """x in tiles, where it is not yet."""
        if isinstance(x, matrix_units.Tiles):
            return x
        if self.normed[0] is x and unit.parts == 1:
            return self.normed[1]
        tiles = matrix_units.Tiles.empty(unit.parts, *x.shape)
        unit.fill(x, tiles.data, self.threads)
        return tiles

    def _input(self, x, weight: Weight, product):
        """x as an ordinary product takes it: even along k, and rounded where that was chosen and the product does not."""
        if self.rounded and weight.kind == 'bfloat16' and product is not matrix_units.pairs_bfloat16:
            x, given = np.empty_like(x), x
            elementwise.round_bfloat16(given, x)
        return _even(x, weight)

    def rope_append(self, qkv, num_heads: int, head_dim: int, rope, cache, slots):
        """Split the fused projection, turn Q and K, put K and V into the cache; returns Q [tokens, heads/n, head_dim]."""
        q = np.empty((len(qkv), num_heads, head_dim), np.float32)
        cos, sin = (qkv, qkv) if rope is None else self.recent.of(rope, rows_of)
        append = elementwise.rope_append_float32 if cache.k.dtype == np.float32 else elementwise.rope_append_bfloat16
        append(qkv, cos, sin, rope is not None, slots, q, cache.k, cache.v, self.threads_of_rows(len(qkv)))
        return q

    def attend(self, q, cache, query_groups, segments, window: int | None, scale: float, cap: float | None = None,
               sinks: int = 0):
        """B = softmax(scale Q K^T) V over each request's ring.  Returns B [tokens, heads/n * head_dim]."""
        b = np.empty(q.shape, np.float32)
        run = self._attention('float32' if cache.k.dtype == np.float32 else 'bfloat16', q.shape[2])
        tables = self.recent.of(segments, tables_of)  # all layers of a group ask for the same
        run(q, cache.k, cache.v, bounds_of(query_groups), *tables, segments[0].ring.block,
            EVERYWHERE if window is None else window, scale, cap or 0, sinks, b, self.threads)
        return b.reshape(len(q), -1)

    def _attention(self, kv_dtype: str, head_dim: int):
        """The kernel for a cache; in the matrix units where there are any for it."""
        if kv_dtype == 'bfloat16' and self.units and head_dim % matrix_units.TILE_K == 0:
            return attention_tiles.attend_rounded if self.rounded or self.coarse else attention_tiles.attend_tiles
        pairs = self.pairs_of_cache and kv_dtype == 'bfloat16'
        return attention.attend_pairs if pairs else getattr(attention, f'attend_{kv_dtype}')

    def activate(self, x, kind: str):
        """The MLP's activation, element by element."""
        y = np.empty_like(x)
        elementwise.activate(x, elementwise.ACTIVATIONS[kind], y, self.threads_of_rows(len(x)))
        return y

    def gated_activation(self, gate_up, kind: str):
        """activation(gate) * up.  [tokens, 2 ffn/n] -> [tokens, ffn/n]"""
        y = np.empty((len(gate_up), gate_up.shape[1] // 2), np.float32)
        elementwise.gated_activation(gate_up, elementwise.ACTIVATIONS[kind], y, self.threads_of_rows(len(gate_up)))
        return y

    def gated_linear(self, x, weight: Weight, kind: str):
        """gated_activation of x · W, in tiles where `linear` can go on from there.  [tokens, in] -> [tokens, out / 2]"""
        unit, ffn = self._unit(len(x), weight), weight.out_features // 2
        if unit is not None and unit.gated and kind == 'silu' and ffn % matrix_units.TILE_K == 0:
            d = matrix_units.Tiles.empty(unit.parts, len(x), ffn)
            unit.gated(self._tiles(x, unit).data, len(x), weight.data, d.data, self.threads)
            return d
        return self.gated_activation(self.linear(x, weight), kind)

    # ---- for all layers at once (fused.py)

    def product_alone(self, tokens: int, weight: Weight):
        """The kernel that is all of `linear` for so many rows and one kind of weights; None where there is more to it."""
        product = self._product(tokens, weight.kind)
        return product if self._as_given(weight, product) and not self._unit(tokens, weight) else None

    def experts_alone(self, tokens: int, weights: Weight):
        """The kernel that is all of `_each` for so many tokens, with all experts at once; None where there is more to it."""
        together = tokens < FEW_TOKENS and len(weights.data) > 1 and weights.out_features > 0
        product = self.expert_products[weights.kind]
        return product if together and self._as_given(weights, product) else None

    def _as_given(self, weight: Weight, product) -> bool:
        """Whether a product takes x as it is; see `_input`."""
        rounding = self.rounded and weight.kind == 'bfloat16' and product is not matrix_units.pairs_bfloat16
        return not rounding and weight.in_features > 0 and weight.in_features % PER_STEP.get(weight.kind, 1) == 0

    def kernels_of_layers(self, config: ModelConfig, kv_dtype: str) -> list:
        """Those of usual layers besides the products, in the order of stages.py; None for what there is not."""
        e = elementwise
        norms = [e.layer_norm] * 2 if config.norm == 'layer' else [e.rms_norm, e.add_rms_norm]
        mixtures = stages.expert_parts, mixture.route, mixture.sort_by_expert, mixture.combine
        return [getattr(e, f'rope_append_{kv_dtype}'), self._attention(kv_dtype, config.head_dim), *norms,
                e.gated_activation if config.gated else e.activate, e.norm_heads if config.qk_norm == 'head' else None,
                *(mixtures if config.num_experts else [None] * 4)]

    def threads_of_rows(self, tokens: int) -> int:
        """That share so many rows of norms and activations: of few, one is done before the others have begun."""
        return self.threads if tokens >= SHARED_ROWS else 1

    # ---- a mixture of experts

    @staticmethod
    def route(scores, count: int, normalize: bool):
        """Which experts each token goes to, and with what weight.  [tokens, experts] -> [tokens, count] ids, [tokens, count]"""
        choice, shares = np.empty((len(scores), count), np.int64), np.empty((len(scores), count), np.float32)
        mixture.route(scores, normalize, choice, shares)
        return choice, shares

    def experts(self, a, choice, shares, up: Weight, down: Weight, kind: str):
        """The sum over a token's experts of share * (D · W^D): E, this rank's part.  [tokens, hidden] -> [tokens, hidden]"""
        e = np.zeros(a.shape, np.float32)
        if up.out_features == 0:  # a rank without columns adds nothing
            return e
        starts, tokens = np.zeros(len(up.data) + 1, np.int64), np.empty(choice.size, np.int64)
        weights = np.empty(choice.size, np.float32)
        mixture.sort_by_expert(choice, shares, starts, tokens, weights)
        for first, last in self._together(len(a), starts, {up.kind, down.kind}):
            run = slice(starts[first], starts[last])
            d = self.gated_activation(self._each(a[tokens[run]], up, starts, first, last), kind)  # D  [rows, expert_ffn/n]
            mixture.combine(self._each(d, down, starts, first, last), tokens[run], weights[run], e, self.threads)
        return e

    def _together(self, tokens: int, starts, kinds: set[str]) -> list[tuple[int, int]]:
        """Runs of experts that are computed at once; one with rows enough for the matrix units is a run of its own."""
        experts = len(starts) - 1
        if tokens < FEW_TOKENS:
            return [(0, experts)]
        limit = max(map(self._rows_of_one, kinds & set(self.units)), default=ROWS_TOGETHER)
        runs, first = [], 0
        starts = starts.tolist()
        for i in range(experts):
            if i > first and (starts[i + 1] - starts[i] >= limit or starts[i + 1] - starts[first] > ROWS_TOGETHER):
                runs.append((first, i))
                first = i
            if starts[i + 1] - starts[i] >= limit:
                runs.append((i, i + 1))
                first = i + 1
        return [run for run in [*runs, (first, experts)] if starts[run[0]] < starts[run[1]]]

    def _rows_of_one(self, kind: str) -> int:
        """Of an expert that is better computed by itself, in the matrix units."""
        fewest = self.units[kind].fewest
        return min(fewest, BYTES_OF_ONE) if kind in self.bytes and not self.coarse else fewest

    def _each(self, x, weights: Weight, starts, first: int, last: int):
        """The rows of experts first … last - 1, each times its expert's matrix."""
        if last - first == 1:
            return self.linear(x, self.expert(weights, first))
        y = np.empty((len(x), weights.out_features), np.float32)
        product = self.expert_products[weights.kind]
        product(self._input(x, weights, product), starts[first:last + 1] - starts[first], weights.data[first:last], y,
                self.threads)
        return y

    # ---- the head

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

    def new_cache(self, kv_heads: int, slots: int, head_dim: int, kv_dtype: str, xp=np):
        """One layer's K and V; each [kv_heads/n, slots, head_dim] in attention.py's order, and filled up as that says."""
        dtype, even = (np.float32, head_dim) if kv_dtype == 'float32' else (np.uint16, head_dim + head_dim % 2)
        slots, wide = -(-slots // LANES) * LANES, -(-head_dim // LANES) * LANES
        spare = 2 * LANES * wide  # tiles take 32 slots together
        return tuple(self.arena.zeros((kv_heads, slots, width), dtype, spare) for width in (even, wide))


def _bytes_of(scales: np.ndarray) -> np.ndarray:
    """Scales or offsets as the bytes that a panel keeps of each.  float16 [a, b] -> uint8 [a, b, 2 or 4]"""
    kept = np.ascontiguousarray(scales, np.float16 if HALVES else np.float32)
    return kept.view(np.uint8).reshape(*kept.shape, HALF_BYTES)


def _even(x, weight: Weight):
    """x with a zero column more where pairs along an odd k are filled up."""
    each = PER_STEP.get(weight.kind, 1)
    return x if x.shape[1] % each == 0 else np.concatenate((x, np.zeros((len(x), 1), np.float32)), axis=1)
