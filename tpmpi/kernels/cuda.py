"""The kernels for NVIDIA GPUs: every operation of reference.py with the same name and meaning, on arrays of CuPy.

The sources are the .cu files beside this one, compiled for the device by NVRTC when they are first needed; CuPy keeps the
result on disk.  A few rows meet the packed weights in one kernel (products.cu).  Many rows are multiplied by cuBLAS: float32
as it is, bfloat16 on the tensor cores, float16, int8 and int4 there, too, a run of outputs unpacked at a time.  An activation,
and an unpacked weight, is then the sum of two numbers of bfloat16, so that near-float32 accuracy costs two products, or three;
with activations rounded to bfloat16 one is enough, or two for float16, whose numbers are as fine as two of bfloat16.  What the
host decides for a step, such as where keys lie, is uploaded in one copy for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from tpmpi.config import Rope
from tpmpi.kernels import reference
from tpmpi.kernels.cuda_source import FILES, ROWS_AT_ONCE, SPANS, TENSOR_ROWS, TILE_DIMS, source
from tpmpi.kernels.recent import MOST, Recent
from tpmpi.kernels.uploads import KEYS, Uploads, attention_tasks, power_of_two
from tpmpi.weights import GROUP, GROUP_PARTS, Stored, Weight, transpose

THREADS = 128
OUTPUTS_PER_BLOCK = 2 * THREADS // 32  # of products.cu: a warp computes two
USUAL_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without asking
TILE_KEYS, TILE_THREADS = 32, 256  # attention_tiles.cu
WARPS, PARTS, TILE = 8, 3, 16  # tensor.cu: of a block; of a number of x; outputs of a block
FEW_ROWS = 32  # from more on the library's product is faster
UNPACKED_BYTES = 64 << 20  # of a matrix of float16, int8 or int4, at once
EVERYWHERE = 1 << 30  # a window that hides nothing
ACTIVATIONS = {'identity': 0, 'silu': 1, 'relu': 2, 'gelu': 3, 'gelu_tanh': 4}  # elementwise.cu
BITS = {'float32': 32, 'bfloat16': 16, 'float16': 16, 'int8': 8, 'int4': 4}
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
        self.functions, self.frequencies, self.recent, self.uploads = {}, {}, Recent(), Uploads(xp)
        self.halved = False  # there are matrices that many rows meet as numbers of bfloat16
        self.halves = None, None  # the last result of a norm or an activation, and it in halves: a product is what comes next
        self.allowed = {}  # bytes of dynamic shared memory of those that need more than usual
        self.launches = 0  # of these kernels, of products by cuBLAS and of graphs
        self.kind_of_step = None  # of two steps of one kind the same kernels are launched with the same arguments

    @cached_property
    def modules(self) -> dict:
        """The compiled files."""
        return {name: self.xp.RawModule(code=source(name), options=('-std=c++17',)) for name in FILES}

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device."""
        return self.xp.cuda.Device().attributes['MultiProcessorCount']

    @cached_property
    def most_shared(self) -> int:
        """Bytes of shared memory that the blocks of a multiprocessor have together, less what each takes besides."""
        return self.xp.cuda.Device().attributes['MaxSharedMemoryPerMultiprocessor'] - (4 << 10)

    def _launch(self, file: str, name: str, grid: tuple[int, ...], threads: int, *arguments, shared: int = 0) -> None:
        """Run a kernel; None is a null pointer."""
        if name not in self.functions:
            self.functions[name] = self.modules[file].get_function(name)
        if shared > self.allowed.get(name, USUAL_SHARED):
            self.functions[name].max_dynamic_shared_size_bytes = self.allowed[name] = shared
        self.launches += 1
        arguments = tuple(np.uint64(0) if a is None else a for a in arguments)
        self.functions[name](grid, (threads,), arguments, shared_mem=shared)

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
        k, outputs = (rows, hidden_size) if transposed else (hidden_size, rows)
        self.halved |= kind != 'float32'
        width = -(-(_values_bytes(k, kind) + _groups_bytes(k, kind)) // 16) * 16
        return Weight(self.xp.zeros((count, outputs, width), self.xp.uint8), kind, letter, k, outputs)

    def fill(self, weight: Weight, at: int, stored: Stored) -> None:
        """Put stored rows into a packed matrix; at: the first one's place."""
        assert stored.kind == weight.kind
        rows, first = slice(at, at + len(stored.data)), 0
        if stored.group_axis == 0:  # [in, out]: these rows are columns of the packed matrix
            rows, first, stored = slice(None), at, transpose(stored)
        values = np.ascontiguousarray(stored.data).view(np.uint8)
        begin = first * BITS[weight.kind] // 8
        weight.data[rows, begin:begin + values.shape[1]] = self.xp.asarray(values)
        if weight.kind in GROUP_PARTS:
            groups = np.stack([getattr(stored, name) for name in GROUP_PARTS[weight.kind]], axis=-1)
            groups = groups.reshape(len(groups), -1).view(np.uint8)
            begin = _values_bytes(weight.in_features, weight.kind) + _groups_bytes(first, weight.kind)
            weight.data[rows, begin:begin + groups.shape[1]] = self.xp.asarray(groups)

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
            self._launch('products', f'embed_{table.kind}', (len(tokens),), THREADS, self.asarray(tokens), np.int64(vocab.start),
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
        self._launch('elementwise', 'norm_rows', (len(x),), threads, x, gain, bias, y, *self._room_for_halves(y),
                     np.int32(x.shape[1]), np.int32(centred), np.float32(eps), shared=threads // 8)
        return y

    def added_norm(self, x, part, kind: str, gain, bias, eps: float):
        """part += x, and its norm.  kind: 'rms' or 'layer'.  [tokens, hidden] both, and the result"""
        y, threads = self.xp.empty_like(part), _row_threads(x.shape[1])
        self._launch('elementwise', 'added_norm_rows', (len(x),), threads, x, part, gain, bias, y, *self._room_for_halves(y),
                     np.int32(x.shape[1]), np.int32(kind == 'layer'), np.float32(eps), shared=threads // 8)
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
            halves = self._room_for_halves(y)
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
            self._few_rows('', x, weight, 0, y)
        elif weight.out_features:
            self._many_rows(x, weight, y)
        return y

    def gated_linear(self, x, weight: Weight, kind: str):
        """gated_activation of x · W.  [tokens, in] -> [tokens, out / 2]"""
        if weight.kind == 'mixed' or len(x) > FEW_ROWS:
            return self.gated_activation(self.linear(x, weight), kind)
        y = self.xp.empty((len(x), weight.out_features // 2), self.xp.float32)
        if weight.out_features:
            self._few_rows('gated_', x, weight, ACTIVATIONS[kind], y)
        return y

    def _few_rows(self, gated: str, x, weight: Weight, activation: int, y) -> None:
        """y = x · W, or the gated activation of it, by the kernel that reads W as it is packed."""
        k, outputs = weight.in_features, weight.out_features
        end, sizes = (np.int32(activation), y), (np.int32(len(x)), np.int32(k), weight.data, np.int32(weight.data.shape[1]))
        most = ROWS_AT_ONCE if weight.kind == 'float32' else tuple(TENSOR_ROWS)
        rows = next(n for n in most if n >= min(len(x), most[-1]))
        name = f'multiply_{gated}{weight.kind}_{rows}'
        if weight.kind == 'float32':
            grid = -(-outputs // OUTPUTS_PER_BLOCK), -(-len(x) // rows)
            self._launch('products', name, grid, THREADS, x, *sizes, np.int32(outputs), *end)
            return
        resident, shared = tensor_shared_bytes(k, min(len(x), rows), TENSOR_ROWS[rows], weight.kind, self.most_shared // 2)
        tiles = -(-outputs // TILE)  # of gate and up 8 each
        grid = min(tiles, 2 * self.multiprocessors), -(-len(x) // rows)
        self._launch('tensor', name, grid, 32 * WARPS, x, *sizes, np.int32(outputs), end[0], np.int32(resident), y, shared=shared)

    def _many_rows(self, x, weight: Weight, y) -> None:
        """y = x · W by cuBLAS."""
        xp, k, width = self.xp, weight.in_features, weight.data.shape[1]
        if weight.kind == 'float32':
            self._add_product(weight.data.view(xp.float32), x, y, first=True)
            return
        halves = self.halves[1] if self.halves[0] is x else None
        if halves is None:
            halves = self._new_halves(x.shape)
            self._launch('products', 'split_rows', (-(-x.size // 1024),), 256, x, np.int64(x.size), *halves)
        halves = [half for half in halves if half is not None]
        if weight.kind == 'bfloat16':
            for i, half in enumerate(halves):
                self._add_product(weight.data.view(xp.uint16), half, y, first=i == 0)
            return
        parts = 2 if weight.kind == 'float16' else len(halves)
        step = max(1, UNPACKED_BYTES // (2 * k * parts))
        for first in range(0, weight.out_features, step):
            part = weight.data[first:first + step]
            unpacked = [xp.empty((len(part), k), xp.uint16) for _ in range(parts)]
            self._launch('products', f'unpack_{weight.kind}', (len(part),), 256, part, np.int32(width), np.int32(k), *unpacked,
                         *[None] * (2 - parts))
            for i, (w, half) in enumerate([(w, half) for w in unpacked for half in halves][:3]):  # low times low is nothing
                self._add_product(w, half, y[:, first:first + step], first=i == 0)

    def _new_halves(self, shape: tuple[int, ...]) -> tuple:
        """Room for numbers as one or two of bfloat16: the nearest one, and what is left or None."""
        return self.xp.empty(shape, self.xp.uint16), None if self.rounded else self.xp.empty(shape, self.xp.uint16)

    def _room_for_halves(self, y) -> tuple:
        """Where a kernel puts y, too, if the product that follows will want it so; see `halves`."""
        if len(y) <= FEW_ROWS or not self.halved:
            return None, None
        self.halves = y, self._new_halves(y.shape)
        return self.halves[1]

    def _add_product(self, w, x, y, first: bool) -> None:
        """y = x · w^T, or y += where it is not the first.  w: [out, in and padding], x: [rows, in], y: [rows, out and more]"""
        cuda = self.xp.cuda
        kind = cuda.runtime.CUDA_R_32F if w.dtype == np.float32 else cuda.runtime.CUDA_R_16BF
        one, factor = np.ones(1, np.float32), np.full(1, 0 if first else 1, np.float32)
        (rows, k), blas = x.shape, cuda.cublas
        self.launches += 1
        blas.gemmEx(cuda.device.get_cublas_handle(), blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, len(w), rows, k, one.ctypes.data,
                    w.data.ptr, kind, w.strides[0] // w.itemsize, x.data.ptr, kind, k, factor.ctypes.data,
                    y.data.ptr, cuda.runtime.CUDA_R_32F, y.strides[0] // y.itemsize, blas.CUBLAS_COMPUTE_32F,
                    blas.CUBLAS_GEMM_DEFAULT)  # of columns first: [out, rows] there is [rows, out] here

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
        keys, block = (cache.k, cache.v), np.int32(segments[0].ring.block)
        sizes = runs, np.int32(heads), np.int32(dim), np.int64(cache.k.shape[1])
        hidden, factors = np.int32(EVERYWHERE if window is None else min(window, EVERYWHERE)), (np.float32(scale), np.float32(cap or 0))
        if len(tiles):
            wide = next(n for n in TILE_DIMS if n >= dim)
            name = f'attend_tiles_{_kv(cache)}_{wide}' + '_rounded' * self.rounded
            parts = 2 if cache.k.dtype == np.float32 and not self.rounded else 1
            both = 2 * 2 * parts * TILE_KEYS * (2 * wide + 32 * (wide % 64 == 0))  # bytes, K and V of both halves
            seconds, slots = 0 if self.rounded else TILE_THREADS // 2 * wide, 8 * 4 * TILE_KEYS
            self._launch('attention_tiles', name, (len(runs), len(tiles)), TILE_THREADS, q, *keys, tiles, blocks, block, *sizes,
                         hidden, np.int32(sinks), *factors, b,
                         shared=max(both + slots + seconds, 4 * TILE_THREADS // 2 * (wide // 2 + 4)))
        if len(tasks) == 0:
            return b
        parts = stats = None
        if splits > 1:
            parts, stats = (self.xp.empty((splits, tokens, heads, n), self.xp.float32) for n in (dim, 2))
        by_eights = dim % 8 == 0 and dim <= 8 * KEYS
        spans = 0 if by_eights else next(n for n in SPANS if n * KEYS >= dim)
        floats = items * (dim + KEYS + 3)
        floats += floats % 2 + max(2 * KEYS, 8 * KEYS * items if by_eights else 0)  # slots, and in their place sums
        self._launch('attention', f'attend_{_kv(cache)}_{items}_{spans}', (len(tasks), len(runs), splits), KEYS, q, *keys, tasks,
                     blocks, block, *sizes, np.int64(tokens), hidden, np.int32(sinks), *factors, np.int32(split), b, parts, stats,
                     shared=4 * floats)
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


def tensor_shared_bytes(k: int, rows: int, tiles: int, kind: str, most: int) -> tuple[bool, int]:
    """Shared memory of a block of tensor.cu: sums of its warps, and their parts of x, all of each if these are few."""
    sums = 4 * 2 * WARPS * 8 * tiles * TILE

    def total(groups: int) -> int:
        return sums + 2 * WARPS * PARTS * rows * (32 * groups + (32 if groups % 2 == 0 else 0))

    share = -(-(-(-k // GROUP)) // (8 * WARPS)) * 8
    if tiles == 1 and total(share) <= most:
        return True, total(share)
    return False, total({1: 4 if kind != 'int4' else 8, 3: 2, 6: 1}[tiles])


def _row_threads(columns: int) -> int:
    """Of a block that computes a row's norm: four columns for each, in whole warps."""
    return min(1024, -(-columns // 128) * 32)


def _values_bytes(k: int, kind: str) -> int:
    """Bytes of one output's weights, padded with zeros to whole groups; see products.cu."""
    return -(-k // GROUP) * GROUP * BITS[kind] // 8


def _groups_bytes(k: int, kind: str) -> int:
    """Bytes of the float16 scales, and offsets, behind them."""
    return k // GROUP * 2 * len(GROUP_PARTS.get(kind, ()))


def _kv(cache) -> str:
    """The element type of a cache."""
    return 'float32' if cache.k.dtype == np.float32 else 'bfloat16'


def _stride(x) -> np.int64:
    """From a row to the next, in numbers."""
    return np.int64(x.strides[0] // x.itemsize)
