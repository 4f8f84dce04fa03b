"""Products with packed matrices on a GPU: of few rows by kernels that read them as they are packed, of many by cuBLAS.

Many rows of float32 are multiplied as they are, by bfloat16 on the tensor cores, by float16, int8 and int4 there, too, a run of
outputs unpacked at a time.  An activation, and an unpacked weight, is then the sum of two numbers of bfloat16, so that
near-float32 accuracy costs two products, or three; with activations rounded to bfloat16 one is enough, or two for float16,
whose numbers are as fine as two of bfloat16.  Few rows are never rounded (tensor.cu).
"""

from __future__ import annotations

import numpy as np

from tpmpi.kernels.cuda_launch import Launcher
from tpmpi.kernels.cuda_source import ROWS_AT_ONCE, TENSOR_BLOCKS, TENSOR_ROWS, tensor_depth
from tpmpi.weights import GROUP, GROUP_PARTS, Stored, Weight, transpose

THREADS = 128
OUTPUTS_PER_BLOCK = 2 * THREADS // 32  # of products.cu: a warp computes two
WARPS, PARTS, TILE = 8, 3, 16  # tensor.cu: of a block; of a number of x; outputs of a block
FEW_ROWS = 32  # from more on the library's product is faster
UNPACKED_BYTES, UNPACKED_ROWS = 128 << 20, 256  # of a matrix of float16, int8 or int4, at once; rows are a multiple
BITS = {'float32': 32, 'bfloat16': 16, 'float16': 16, 'int8': 8, 'int4': 4}


class Products:
    """The products of a rank.  rounded: activations that many rows bring are rounded to bfloat16."""

    def __init__(self, launcher: Launcher, rounded: bool):
        self.launcher, self.xp, self.rounded = launcher, launcher.xp, rounded
        self.halved = False  # there are matrices that many rows meet as numbers of bfloat16
        self.halves = None, None  # the last result of a norm or an activation, and it in halves: a product is what comes next

    def new_experts(self, count: int, k: int, outputs: int, kind: str, letter: str) -> Weight:
        """Empty packed matrices of one shape, [k] -> [outputs], as one Weight."""
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

    def few_rows(self, gated: str, x, weight: Weight, activation: int, y) -> None:
        """y = x · W, or the gated activation of it, by the kernel that reads W as it is packed."""
        k, outputs = weight.in_features, weight.out_features
        sizes = (np.int32(len(x)), np.int32(k), weight.data, np.int32(weight.data.shape[1]), np.int32(outputs),
                 np.int32(activation))
        choices = ROWS_AT_ONCE if weight.kind == 'float32' else tuple(TENSOR_ROWS)
        rows = next(n for n in choices if n >= min(len(x), choices[-1]))
        name = f'multiply_{gated}{weight.kind}_{rows}'
        if weight.kind == 'float32':
            grid = -(-outputs // OUTPUTS_PER_BLOCK), -(-len(x) // rows)
            self.launcher.launch('products', name, grid, THREADS, x, *sizes, y)
            return
        most = self.launcher.shared_of(TENSOR_BLOCKS)
        resident, shared = tensor_shared_bytes(k, min(len(x), rows), TENSOR_ROWS[rows], weight.kind, most)
        blocks = min(-(-outputs // TILE), TENSOR_BLOCKS * self.launcher.multiprocessors)  # which take tiles in turn
        grid = blocks, -(-len(x) // rows)
        self.launcher.launch('tensor', name, grid, 32 * WARPS, x, *sizes, np.int32(resident), y, shared=shared)

    def many_rows(self, x, weight: Weight, y) -> None:
        """y = x · W by cuBLAS."""
        xp, k, width = self.xp, weight.in_features, weight.data.shape[1]
        if weight.kind == 'float32':
            self.add_product(weight.data.view(xp.float32), x, y, first=True)
            return
        halves = self.halves[1] if self.halves[0] is x else None
        if halves is None:
            halves = self._new_halves(x.shape)
            self.launcher.launch('products', 'split_rows', (-(-x.size // 1024),), 256, x, np.int64(x.size), *halves)
        halves = [half for half in halves if half is not None]
        if weight.kind == 'bfloat16':
            for i, half in enumerate(halves):
                self.add_product(weight.data.view(xp.uint16), half, y, first=i == 0)
            return
        parts = 2 if weight.kind == 'float16' else len(halves)
        step = max(1, UNPACKED_BYTES // (2 * k * parts * UNPACKED_ROWS)) * UNPACKED_ROWS
        for first in range(0, weight.out_features, step):
            part = weight.data[first:first + step]
            unpacked = [xp.empty((len(part), k), xp.uint16) for _ in range(parts)]
            self.launcher.launch('products', f'unpack_{weight.kind}', (len(part),), 256, part, np.int32(width), np.int32(k),
                                 *unpacked, *[None] * (2 - parts))
            for i, (w, half) in enumerate([(w, half) for w in unpacked for half in halves][:3]):  # low times low is nothing
                self.add_product(w, half, y[:, first:first + step], first=i == 0)

    def _new_halves(self, shape: tuple[int, ...]) -> tuple:
        """Room for numbers as one or two of bfloat16: the nearest one, and what is left or None."""
        return self.xp.empty(shape, self.xp.uint16), None if self.rounded else self.xp.empty(shape, self.xp.uint16)

    def room_for_halves(self, y) -> tuple:
        """Where a kernel puts y, too, if the product that follows will want it so; see `halves`."""
        if len(y) <= FEW_ROWS or not self.halved:
            return None, None
        self.halves = y, self._new_halves(y.shape)
        return self.halves[1]

    def add_product(self, w, x, y, first: bool) -> None:
        """y = x · w^T, or y += where it is not the first.  w: [out, in and padding], x: [rows, in], y: [rows, out and more]"""
        cuda = self.xp.cuda
        kind = cuda.runtime.CUDA_R_32F if w.dtype == np.float32 else cuda.runtime.CUDA_R_16BF
        one, factor = np.ones(1, np.float32), np.full(1, 0 if first else 1, np.float32)
        (rows, k), blas = x.shape, cuda.cublas
        self.launcher.launches += 1
        blas.gemmEx(cuda.device.get_cublas_handle(), blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, len(w), rows, k, one.ctypes.data,
                    w.data.ptr, kind, w.strides[0] // w.itemsize, x.data.ptr, kind, k, factor.ctypes.data,
                    y.data.ptr, cuda.runtime.CUDA_R_32F, y.strides[0] // y.itemsize, blas.CUBLAS_COMPUTE_32F,
                    blas.CUBLAS_GEMM_DEFAULT)  # of columns first: [out, rows] there is [rows, out] here


def tensor_shared_bytes(k: int, rows: int, tiles: int, kind: str, most: int) -> tuple[bool, int]:
    """Shared memory of a block of tensor.cu: sums of its warps, and their parts of x, all of each if these are few."""
    sums = 4 * 2 * WARPS * 8 * tiles * TILE

    def total(groups: int) -> int:
        return sums + 2 * WARPS * PARTS * rows * (32 * groups + (32 if groups % 2 == 0 else 0))

    share, depth = -(-k // (GROUP * 8 * WARPS)) * 8, tensor_depth(kind, tiles)
    whole = total(share)
    return (True, whole) if tiles == 1 and whole <= most else (False, total(depth))


def _values_bytes(k: int, kind: str) -> int:
    """Bytes of one output's weights, padded with zeros to whole groups; see products.cu."""
    return -(-k // GROUP) * GROUP * BITS[kind] // 8


def _groups_bytes(k: int, kind: str) -> int:
    """Bytes of the float16 scales, and offsets, behind them."""
    return k // GROUP * 2 * len(GROUP_PARTS.get(kind, ()))
