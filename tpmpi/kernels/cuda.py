"""The kernels for NVIDIA GPUs: every operation of reference.py with the same name and meaning, on arrays of CuPy.

The sources are the .cu files beside this one, compiled for the device by NVRTC when they are first needed; CuPy keeps the
result on disk.  What the host decides for a step, such as where keys lie, is uploaded in one copy for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tpmpi.config import Rope
from tpmpi.kernels import reference
from tpmpi.kernels.cuda_launch import Launcher
from tpmpi.kernels.cuda_products import FEW_ROWS, THREADS, Products
from tpmpi.kernels.cuda_source import SPANS, TILE_DIMS
from tpmpi.kernels.recent import MOST, Recent
from tpmpi.kernels.uploads import KEYS, Uploads, attention_tasks, power_of_two
from tpmpi.weights import Stored, Weight

TILE_KEYS, TILE_THREADS = 32, 256  # attention_tiles.cu
EVERYWHERE = 1 << 30  # a window that hides nothing
ACTIVATIONS = {'identity': 0, 'silu': 1, 'relu': 2, 'gelu': 3, 'gelu_tanh': 4}  # elementwise.cu
GRID_Y = 65535  # blocks along y, at most
CHUNK = 2048  # head.cu


class Kernels:
    """The operations for one rank.  xp: CuPy; activations: bfloat16 rounds what meets bfloat16 weights in many rows."""

    expert, join = staticmethod(reference.expert), staticmethod(reference.join)
    namespace, sigmoid, route = (staticmethod(f) for f in (reference.namespace, reference.sigmoid, reference.route))
    log_sum_exp, top_k = staticmethod(reference.log_sum_exp), staticmethod(reference.top_k)  # of what came to the host
    FLOAT16 = True  # is a kind of weights here
    BEST_AT_MOST = CHUNK // 2  # `best` finds so many

    def __init__(self, xp, activations: str = 'float32'):
        self.xp, self.rounded = xp, activations == 'bfloat16'
        self.frequencies, self.recent, self.uploads = {}, Recent(), Uploads(xp)
        self.launcher = Launcher(xp)
        self._launch, self.products = self.launcher.launch, Products(self.launcher, self.rounded)
        self.kind_of_step = None  # of two steps of one kind the same kernels are launched with the same arguments

    @property
    def launches(self) -> int:
        """Of kernels, of products by cuBLAS and of graphs."""
        return self.launcher.launches

    @launches.setter
    def launches(self, count: int):
        self.launcher.launches = count

    # ---- what the host decides for a step

    def upload(self, step, model) -> None:
        """Bring it to the device, all in one copy; the operations of the step find it by the host's objects."""
        wanted = [(x, _itself, ()) for x in (step.tokens, step.positions, *step.slots, step.growth) if x is not None]
        wanted += [(step.positions, _turning(step.lengths), (rope,)) for rope in model.ropes if rope.by_length]
        wanted += [(segments, attention_tasks, (model.query_groups, group.window, group.sinks, _tiled(model.config.head_dim)))
                   for segments, group in zip(step.segments, model.groups, strict=True) if model.query_groups]
        made = [make(owner, *arguments) for owner, make, arguments in wanted]
        views = iter(self.uploads.send([x for parts in made for x in parts if isinstance(x, np.ndarray)]))
        decided = tuple(x for parts in made for x in parts if not isinstance(x, np.ndarray))
        self.kind_of_step = self.uploads.device.data.ptr, tuple(self.uploads.layout), decided
        self.recent = Recent(len(wanted) + MOST)
        for (owner, _, arguments), parts in zip(wanted, made, strict=True):
            there = tuple(next(views) if isinstance(x, np.ndarray) else x for x in parts)
            self.recent.of(owner, lambda *_, there=there: there, *arguments)

    def _uploaded(self, owner, make: Callable, *arguments) -> tuple:
        """What make(owner, *arguments) gives, arrays on the device: of `upload`, or copied now."""
        def copied(*all_arguments):
            return tuple(self.xp.asarray(x) if isinstance(x, np.ndarray) else x for x in make(*all_arguments))

        return self.recent.of(owner, copied, *arguments)

    def asarray(self, x: np.ndarray):
        """A small host array on the device; the same array is uploaded once."""
        return self._uploaded(x, _itself)[0]

    # ---- weights

    def new_weight(self, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=None) -> Weight:
        """An empty packed matrix for `rows` stored rows; `fill` puts them in, piece by piece."""
        return self.expert(self.new_experts(1, rows, hidden_size, transposed, kind, letter), 0)

    def new_experts(self, count: int, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=None) -> Weight:
        """Empty packed matrices of one shape, one for each expert, as one Weight; `fill` fills each `expert` of it."""
        return self.products.new_experts(count, *((rows, hidden_size) if transposed else (hidden_size, rows)), kind, letter)

    def fill(self, weight: Weight, at: int, stored: Stored) -> None:
        """Put stored rows into a packed matrix; at: the first one's place."""
        self.products.fill(weight, at, stored)

    def new_cache(self, kv_heads: int, slots: int, head_dim: int, kv_dtype: str, xp=None):
        """One layer's K and V, each [kv_heads/n, slots, head_dim], float32 or the bits of bfloat16."""
        return reference.new_cache(kv_heads, slots, head_dim, kv_dtype, self.xp)

    # ---- the operations of a step

    def embed(self, tokens, table: Weight, vocab: range):
        """Rows of the embedding that this rank holds, zeros for the others' tokens.  [tokens] -> [tokens, hidden]"""
        y = self.xp.empty((len(tokens), table.in_features), self.xp.float32)
        if len(vocab) == 0:
            y.fill(0)
        else:
            grid = len(tokens), -(-table.in_features // THREADS) if len(tokens) <= FEW_ROWS else 1
            self._launch('products', f'embed_{table.kind}', grid, THREADS, self.asarray(tokens), np.int64(vocab.start),
                         np.int64(vocab.stop), table.data, np.int32(table.data.shape[-1]), np.int32(table.in_features), y)
        return y

    def rms_norm(self, x, gain, eps: float):
        """x / sqrt(mean(x^2) + eps) * gain.  [tokens, hidden] -> [tokens, hidden]"""
        return self._norm(x, gain, None, eps, centred=False)

    def layer_norm(self, x, gain, bias, eps: float):
        """(x - mean) / sqrt(variance + eps) * gain + bias; bias may be None.  [tokens, hidden] -> the same"""
        return self._norm(x, gain, bias, eps, centred=True)

    def _norm(self, x, gain, bias, eps: float, centred: bool):
        y, threads = self.xp.empty_like(x), _row_threads(x.shape[1])
        self._launch('elementwise', 'norm_rows', (len(x),), threads, x, gain, bias, y, *self.products.room_for_halves(y),
                     np.int32(x.shape[1]), np.int32(centred), np.float32(eps), shared=threads // 8)
        return y

    def added_norm(self, x, part, kind: str, gain, bias, eps: float):
        """part += x, and its norm.  kind: 'rms' or 'layer'.  [tokens, hidden] both, and the result"""
        y, threads = self.xp.empty_like(part), _row_threads(x.shape[1])
        self._launch('elementwise', 'added_norm_rows', (len(x),), threads, x, part, gain, bias, y,
                     *self.products.room_for_halves(y), np.int32(x.shape[1]), np.int32(kind == 'layer'), np.float32(eps),
                     shared=threads // 8)
        return y

    def norm_heads(self, qkv, heads: int, head_dim: int, kind: str, gain, bias, eps: float) -> None:
        """Each of the first `heads` heads of the fused projection, or a run of its columns, through a norm, in place."""
        if heads:
            self._launch('elementwise', 'norm_heads', (len(qkv), heads), 32, qkv, _stride(qkv), np.int32(head_dim), gain, bias,
                         np.int32(kind == 'layer'), np.float32(eps), shared=4)

    def head_squares(self, qkv, runs: Sequence[range]):
        """The sum of squares of each of some runs of columns.  [tokens, columns] -> [tokens, runs]"""
        y = self.xp.empty((len(qkv), len(runs)), self.xp.float32)
        for column, run in enumerate(runs):
            self._launch('elementwise', 'head_squares', (len(qkv),), 256, qkv, _stride(qkv), np.int32(run.start),
                         np.int32(run.stop), y, np.int32(len(runs)), np.int32(column), shared=4 * 256 // 32)
        return y

    def scale_columns(self, qkv, run: range, factor, gain) -> None:
        """A run of columns times a factor for each token and a gain for each column, in place.  factor: [tokens]"""
        if len(run):
            self._launch('elementwise', 'scale_columns', (len(qkv),), THREADS, qkv, _stride(qkv), np.int32(run.start),
                         np.int32(len(run)), factor, gain)

    def softcap(self, x, cap: float):
        """cap * tanh(x / cap).  [tokens, vocab/n], the same shape"""
        return self._each('softcap', x, np.float32(cap))

    def activate(self, x, kind: str):
        """The MLP's activation, element by element."""
        return self._each('activate', x, np.int32(ACTIVATIONS[kind]))

    def _each(self, name: str, x, argument):
        y = self.xp.empty_like(x)
        if x.size:
            self._launch('elementwise', name, (-(-x.size // 256),), 256, x, y, np.int64(x.size), argument)
        return y

    def gated_activation(self, gate_up, kind: str):
        """activation(gate) * up.  [tokens, 2 ffn/n] -> [tokens, ffn/n]"""
        ffn = gate_up.shape[1] // 2
        y = self.xp.empty((len(gate_up), ffn), self.xp.float32)
        if ffn:
            halves = self.products.room_for_halves(y)
            for first in range(0, len(gate_up), GRID_Y):
                part = slice(first, first + GRID_Y)
                self._launch('elementwise', 'gated_activation', (-(-ffn // 1024), len(y[part])), 256, gate_up[part], y[part],
                             *(x if x is None else x[part] for x in halves), np.int32(ffn), np.int32(ACTIVATIONS[kind]))
        return y

    def linear(self, x, weight: Weight, out=None):
        """x · W for a packed W.  [tokens, in] -> [tokens, out]; out: none, it is for sums of host memory"""
        if weight.kind == 'mixed':
            y, at = self.xp.empty((len(x), sum(part.out_features for part in weight.data)), self.xp.float32), 0
            for part in weight.data:  # concatenate would bring a table of addresses from the host
                y[:, at:at + part.out_features] = self.linear(x, part)
                at += part.out_features
            return y
        y = self.xp.empty((len(x), weight.out_features), self.xp.float32)
        if weight.in_features == 0:  # a rank without heads adds nothing
            y.fill(0)
        elif weight.out_features and len(x) <= FEW_ROWS:
            self.products.few_rows('', x, weight, 0, y)
        elif weight.out_features:
            self.products.many_rows(x, weight, y)
        return y

    def gated_linear(self, x, weight: Weight, kind: str):
        """gated_activation of x · W.  [tokens, in] -> [tokens, out / 2]"""
        if weight.kind == 'mixed' or len(x) > FEW_ROWS:
            return self.gated_activation(self.linear(x, weight), kind)
        y = self.xp.empty((len(x), weight.out_features // 2), self.xp.float32)
        if weight.out_features:
            self.products.few_rows('gated_', x, weight, ACTIVATIONS[kind], y)
        return y

    def rope_table(self, positions, lengths, rope: Rope):
        """What turns the pairs of a head at each position: cosines and sines, [tokens, rope.dim / 2] each."""
        if rope.by_length:
            frequencies = self._uploaded(positions, _turning(lengths), rope)[0]
        else:
            if rope not in self.frequencies:
                self.frequencies[rope] = self.xp.asarray(reference._frequencies(rope, np))
            frequencies = self.frequencies[rope]
        tables = [self.xp.empty((len(positions), rope.dim // 2), self.xp.float32) for _ in range(2)]
        self._launch('elementwise', 'rope_table', (len(positions),), 64, self.asarray(positions), frequencies,
                     np.int32(rope.by_length), np.int32(rope.dim // 2), np.float64(rope.magnitude), *tables)
        return tuple(tables)

    def rope_append(self, qkv, num_heads: int, head_dim: int, rope, cache, slots):
        """Split the fused projection, turn Q and K, put K and V into the cache; returns Q [tokens, heads/n, head_dim]."""
        q, kv_heads = self.xp.empty((len(qkv), num_heads, head_dim), self.xp.float32), len(cache.k)
        pairs, tables = (0, (None, None)) if rope is None else (rope[0].shape[1], rope)
        if num_heads + kv_heads:
            columns = (num_heads + 2 * kv_heads) * head_dim  # few tokens share the device's blocks
            grid = len(qkv), -(-columns // (256 if len(qkv) <= FEW_ROWS else 1024))
            self._launch('elementwise', f'rope_append_{_kv(cache)}', grid, 256, qkv, *tables,
                         np.int32(pairs), np.int32(num_heads), np.int32(kv_heads), np.int32(head_dim),
                         self.asarray(slots), np.int64(cache.k.shape[1]), q, cache.k, cache.v)
        return q

    def attend(self, q, cache, query_groups, segments, window: int | None, scale: float, cap: float | None = None,
               sinks: int = 0):
        """B = softmax(scale Q K^T) V over each request's ring.  Returns B [tokens, heads/n * head_dim]."""
        tokens, heads, dim = q.shape
        b = self.xp.empty((tokens, heads * dim), self.xp.float32)
        if heads == 0:
            return b
        tasks, tiles, blocks, runs, items, splits, split = self._uploaded(segments, attention_tasks, query_groups, window, sinks,
                                                                          _tiled(dim))
        where = blocks, np.int32(segments[0].ring.block), runs, np.int32(heads), np.int32(dim), np.int64(cache.k.shape[1])
        what = (np.int32(EVERYWHERE if window is None else min(window, EVERYWHERE)), np.int32(sinks), np.float32(scale),
                np.float32(cap or 0))
        if len(tiles):
            wide = next(n for n in TILE_DIMS if n >= dim)
            name = f'attend_tiles_{_kv(cache)}_{wide}' + '_rounded' * self.rounded
            self._launch('attention_tiles', name, (len(runs), len(tiles)), TILE_THREADS, q, cache.k, cache.v, tiles, *where,
                         *what, b, shared=_tiles_shared_bytes(wide, _kv(cache), self.rounded))
        if len(tasks) == 0:
            return b
        parts = stats = None
        if splits > 1:
            parts, stats = (self.xp.empty((splits, tokens, heads, n), self.xp.float32) for n in (dim, 2))
        by_eights = dim % 8 == 0 and dim <= 8 * KEYS
        spans = 0 if by_eights else next(n for n in SPANS if n * KEYS >= dim)
        floats = items * (dim + KEYS + 3)
        floats += floats % 2 + max(2 * KEYS, 8 * KEYS * items if by_eights else 0)  # slots, and in their place sums
        self._launch('attention', f'attend_{_kv(cache)}_{items}_{spans}', (len(tasks), len(runs), splits), KEYS, q, cache.k,
                     cache.v, tasks, *where, np.int64(tokens), *what, np.int32(split), b, parts, stats, shared=4 * floats)
        if splits > 1:
            self._launch('attention', 'attend_combine', (tokens, heads), THREADS, parts, stats, np.int32(splits), np.int32(heads),
                         np.int32(dim), np.int64(tokens), b, shared=4 * (splits + THREADS // 32))
        return b

    # ---- a mixture of experts

    def experts(self, a, choice, shares, up: Weight, down: Weight, kind: str):
        """The sum over a token's experts of share * (D · W^D): E, this rank's part.  [tokens, hidden] -> [tokens, hidden]"""
        each, e = choice.shape[1], self.xp.empty(a.shape, self.xp.float32)
        if up.out_features == 0:  # a rank without columns adds nothing
            e.fill(0)
            return e
        choice, shares = (self.xp.ascontiguousarray(x) for x in (choice, shares))
        step = GRID_Y // each
        for first in range(0, len(a), step):
            part = slice(first, first + step)
            pairs = choice[part].ravel()
            d = self.gated_activation(self._chosen(a[part], up, pairs, each), kind)  # D  [tokens * each, expert_ffn/n]
            self._launch('elementwise', 'combine_experts', (-(-a.shape[1] // 256), len(choice[part])), 256,
                         self._chosen(d, down, pairs, 1), shares[part], e[part], np.int32(each), np.int32(a.shape[1]))
        return e

    def _chosen(self, x, weight: Weight, choice, shared_by: int):
        """Each pair of a row of x and the expert that it is sent to.  [pairs / shared_by, in] -> [pairs, out]"""
        y = self.xp.empty((len(choice), weight.out_features), self.xp.float32)
        grid = -(-weight.out_features // (THREADS // 32)), len(choice)
        self._launch('products', f'multiply_chosen_{weight.kind}', grid, THREADS, x, np.int32(shared_by),
                     np.int32(weight.in_features), weight.data, np.int32(weight.data.shape[2]),
                     np.int32(weight.out_features), choice, y)
        return y

    # ---- the head

    def best(self, logits, count: int, divisors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-sum-exp of each row over its divisor, and its `count` largest numbers: logits and columns, on the host.

        Largest first, equal ones by lower column.  Nothing else of [rows, vocab/n] is copied; divisors: [rows], or None for
        ones; count: at most BEST_AT_MOST.  -> [rows], [rows, k] and [rows, k], where k is count or all there are.
        """
        xp, (rows, columns) = self.xp, logits.shape
        keep, runs = min(count, columns), -(-columns // CHUNK)
        assert 1 <= keep <= self.BEST_AT_MOST
        stats, keys = xp.empty((rows, runs, 2), xp.float32), xp.empty((rows, runs, keep), xp.uint64)
        n, left = power_of_two(min(columns, CHUNK)), runs * keep
        self._launch('head', 'best_of_logits', (runs, rows), 256, logits, np.int32(columns),
                     None if divisors is None else xp.asarray(divisors, xp.float32), np.int32(keep), np.int32(n), keys, stats,
                     shared=8 * n + 4 * 256 // 32)
        while left > keep:
            blocks, n, before = -(-left // CHUNK), power_of_two(min(left, CHUNK)), keys
            keys = xp.empty((rows, blocks, keep), xp.uint64)
            self._launch('head', 'best_of_keys', (blocks, rows), 256, before, np.int32(left), np.int32(keep), np.int32(n), keys,
                         shared=8 * n)
            left = blocks * keep
        found = xp.empty((rows, 1 + 2 * keep), xp.uint32)
        self._launch('head', 'best_rows', (rows,), 256, logits, np.int32(columns), keys, np.int32(keep), stats, np.int32(runs),
                     found, shared=4 * 256 // 32)
        host = found.get()
        return host[:, 0].view(np.float32), host[:, 1:1 + keep].view(np.float32), host[:, 1 + keep:].astype(np.int64)


def _itself(x: np.ndarray) -> tuple[np.ndarray]:
    """What is uploaded of an array."""
    return (x,)


def _turning(lengths: np.ndarray) -> Callable:
    """For a RoPE that depends on the texts' lengths: a function of positions and rope that gives [tokens, pairs] frequencies."""
    def frequencies(positions, rope: Rope):
        theta, divisors = reference._stretched(lengths, rope, np)
        return (theta ** -(np.arange(0, rope.dim, 2) / rope.dim) / divisors,)

    return frequencies


def _tiled(dim: int) -> bool:
    """attention_tiles.cu computes heads of this size."""
    return dim % 8 == 0 and dim <= TILE_DIMS[-1]


def _tiles_shared_bytes(dim: int, kv: str, rounded: bool) -> int:
    """Shared memory of a block of attention_tiles.cu."""
    parts = 2 if kv == 'float32' and not rounded else 1
    keys_and_values = 2 * 2 * parts * TILE_KEYS * (2 * dim + 32 * (dim % 64 == 0))  # bytes, of both halves
    slots, second_parts = 8 * 4 * TILE_KEYS, 0 if rounded else TILE_THREADS // 2 * dim
    return max(keys_and_values + slots + second_parts, 4 * TILE_THREADS // 2 * (dim // 2 + 4))  # or what one half tells the other


def _row_threads(columns: int) -> int:
    """Of a block that computes a row's norm: four columns for each, in whole warps."""
    return min(1024, -(-columns // 128) * 32)


def _kv(cache) -> str:
    """The element type of a cache."""
    return 'float32' if cache.k.dtype == np.float32 else 'bfloat16'


def _stride(x) -> np.int64:
    """From a row to the next, in numbers."""
    return np.int64(x.strides[0] // x.itemsize)
