"""cuBLAS: the one product that tpmpi asks for, of matrices by columns, in float32 sums."""

from __future__ import annotations

import ctypes

import numpy as np

from cupy import _memory, _streams, fake
from cupy.cuda import runtime

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT = 68, -1


def gemmEx(handle, transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute_type, algo):
    """C = alpha op(A) op(B) + beta C, queued.  The factors are read at once, from the host."""
    for name, value in (('m', m), ('n', n), ('k', k), ('lda', lda), ('ldb', ldb), ('ldc', ldc), ('A', a), ('B', b), ('C', c)):
        if not isinstance(value, int) or value < 1:
            raise TypeError(f'gemmEx: {name} is {value!r}; expected a positive int')
    if (compute_type, c_type, algo) != (CUBLAS_COMPUTE_32F, runtime.CUDA_R_32F, CUBLAS_GEMM_DEFAULT):
        raise ValueError('gemmEx: CUBLAS_STATUS_NOT_SUPPORTED')
    shapes = (m, k) if transa == CUBLAS_OP_N else (k, m), (k, n) if transb == CUBLAS_OP_N else (n, k), (m, n)
    if lda < shapes[0][0] or ldb < shapes[1][0] or ldc < m:
        raise ValueError('gemmEx: CUBLAS_STATUS_INVALID_VALUE')
    alpha, beta = (ctypes.c_float.from_address(at).value for at in (alpha, beta))
    views = [_matrix(at, kind, shape, ld) for at, kind, shape, ld in
             zip((a, b, c), (a_type, b_type, c_type), shapes, (lda, ldb, ldc), strict=True)]
    memories = [_memory.at(pointer) for pointer in (a, b, c)]
    fake.launches['gemmEx'] += 1

    def work():
        left, right = (_values(view) for view in views[:2])
        product = (left.T if transa else left) @ (right.T if transb else right) * np.float32(alpha)
        np.copyto(views[2], product + np.float32(beta) * views[2] if beta else product)
        for memory in memories:
            memory.check('gemmEx')

    _streams.current().push(work)


def _matrix(address: int, kind: int, shape: tuple[int, int], ld: int) -> np.ndarray:
    """A matrix by columns in device memory.  Raises RuntimeError where it is longer than the array it begins in."""
    dtype = {runtime.CUDA_R_32F: np.dtype(np.float32), runtime.CUDA_R_16BF: np.dtype(np.uint16)}[kind]
    nbytes = ((shape[1] - 1) * ld + shape[0]) * dtype.itemsize
    start, memory = address - _memory.at(address).bytes.ctypes.data, _memory.at(address).bytes
    if start + nbytes > memory.nbytes:
        raise RuntimeError(f'gemmEx: a matrix of {nbytes} bytes in {memory.nbytes - start} bytes of memory')
    return np.ndarray(shape, dtype, memory, start, (dtype.itemsize, ld * dtype.itemsize))


def _values(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)
