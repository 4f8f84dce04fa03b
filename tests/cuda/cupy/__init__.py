"""A stand-in for CuPy on the host, for tests: as strict as CuPy, and stricter where a GPU breaks only by luck.

Put the folder of this package first on sys.path.  Every operation is queued on the current stream, and until that runs its
result is poison; see _array.py.  Kernels run in the emulator; `cupy.fake` counts.  What is not here, CuPy may well have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cupy import cuda, fake
from cupy._array import HiddenSynchronization, PendingWork, apply, depending_on_data, ndarray, new, unwrap, upload
from cupy._kernels import RawKernel, RawModule
from cupy.cuda.memory import MemoryPool

__all__ = ['HiddenSynchronization', 'PendingWork', 'RawKernel', 'RawModule', 'cuda', 'fake', 'ndarray']
__version__ = '13.6.0'
_pool = MemoryPool()
for _name in ('bool_ dtype float16 float32 float64 generic inf int8 int16 int32 int64 nan newaxis pi uint8 uint16 uint32 '
              'uint64').split():
    globals()[_name] = getattr(np, _name)


def get_default_memory_pool() -> MemoryPool:
    """The pool of all arrays."""
    return _pool


def get_default_pinned_memory_pool() -> MemoryPool:
    """The pool of pinned memory."""
    return _pool


def get_array_module(*arrays):
    """This module where one of the arrays is on the device, else NumPy."""
    import cupy
    return cupy if any(isinstance(x, ndarray) for x in arrays) else np


# ---- new arrays


def empty(shape, dtype=float, order: str = 'C') -> ndarray:
    """An array of poison."""
    return new(shape, dtype)


def full(shape, fill_value, dtype=None, order: str = 'C') -> ndarray:
    """The same number everywhere, when the stream has run."""
    x = new(shape, np.result_type(fill_value) if dtype is None else dtype)
    x.fill(fill_value)
    return x


def zeros(shape, dtype=float, order: str = 'C') -> ndarray:
    """Zeros, when the stream has run."""
    return full(shape, 0, dtype)


def ones(shape, dtype=float, order: str = 'C') -> ndarray:
    """Ones, when the stream has run."""
    return full(shape, 1, dtype)


def empty_like(a: ndarray, dtype=None) -> ndarray:
    """An array of poison, of a's shape."""
    return new(_device(a).shape, dtype or a.dtype)


def zeros_like(a: ndarray, dtype=None) -> ndarray:
    """Zeros, of a's shape."""
    return zeros(_device(a).shape, dtype or a.dtype)


def ones_like(a: ndarray, dtype=None) -> ndarray:
    """Ones, of a's shape."""
    return ones(_device(a).shape, dtype or a.dtype)


def full_like(a: ndarray, fill_value, dtype=None) -> ndarray:
    """The same number everywhere, of a's shape."""
    return full(_device(a).shape, fill_value, dtype or a.dtype)


def arange(start, stop=None, step=1, dtype=None) -> ndarray:
    """Numbers in equal steps."""
    return apply(np.arange, *((0, start) if stop is None else (start, stop)), step, dtype=dtype)


def array(obj, dtype=None, copy: bool = True, order: str = 'K') -> ndarray:
    """A copy on the device; host values are read at once."""
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, copy=copy)
    if not isinstance(obj, np.ndarray):
        unwrap(obj, _refuse)
    values = np.array(obj, dtype, order='C')
    if values.dtype.kind not in 'biufc':
        raise ValueError(f'Unsupported dtype {values.dtype}')
    fake.count_copy(fake.host_to_device, values.nbytes)
    return upload(values)


def asarray(a, dtype=None, order: str | None = None, *, blocking: bool = False) -> ndarray:
    """a itself where it is on the device, else a copy of the host values as they are now."""
    return array(a, dtype, copy=False)


def ascontiguousarray(a, dtype=None) -> ndarray:
    """asarray in C order."""
    x = asarray(a, dtype)
    return x if x.flags.c_contiguous else x.copy()


def asnumpy(a, stream=None, order: str = 'C', out=None, *, blocking: bool = True) -> np.ndarray:
    """A host copy."""
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def _device(x) -> ndarray:
    if not isinstance(x, ndarray):
        raise TypeError(f'Unsupported type {type(x)}')
    return x


def _refuse(host: np.ndarray):
    raise TypeError('device arrays in a list: use stack')


# ---- functions of arrays


def copyto(dst: ndarray, src, casting: str = 'same_kind', where=None) -> None:
    """dst = src where the mask says so."""
    if where is None:
        apply(lambda d, s: np.broadcast_to(s, d.shape), dst, src, out=dst)
    else:
        apply(lambda d, s, w: np.where(w, s, d).astype(d.dtype), _device(dst), src, _device(where), out=dst)


def flatnonzero(a: ndarray) -> ndarray:
    """Where a is not 0; the host waits."""
    return depending_on_data('flatnonzero', np.flatnonzero, _device(a))


def nonzero(a: ndarray) -> tuple[ndarray, ...]:
    """Where a is not 0, along each axis; the host waits."""
    return depending_on_data('nonzero', np.nonzero, _device(a))


def unique(ar: ndarray, **options):
    """The values, each once; the host waits."""
    return depending_on_data('unique', np.unique, _device(ar), **options)


def where(condition: ndarray, x=None, y=None):
    """x or y by the condition; without them as nonzero."""
    return nonzero(condition) if x is None and y is None else apply(np.where, _device(condition), x, y)


def _generic(name: str) -> Callable:
    def function(*arguments, out=None, **options):
        return apply(getattr(np, name), *arguments, out=out, **options)

    function.__name__, function.__doc__ = name, f'numpy.{name}, queued.'
    return function


for _name in (
        'abs absolute add all any argmax argmin argsort bitwise_and bitwise_or broadcast_to ceil clip concatenate cos cumsum '
        'diff divide dot einsum equal exp expand_dims floor greater greater_equal invert isfinite isinf isnan left_shift less '
        'less_equal lexsort log logical_and logical_not logical_or matmul max maximum mean min minimum mod multiply negative '
        'not_equal outer partition power prod repeat right_shift sign sin sort sqrt square stack subtract sum take '
        'take_along_axis tan tanh tile true_divide').split():
    globals()[_name] = _generic(_name)


def swapaxes(a: ndarray, one: int, other: int) -> ndarray:
    """A view with two axes swapped."""
    return a.swapaxes(one, other)


def transpose(a: ndarray, axes=None) -> ndarray:
    """A view with the axes in another order."""
    return a.transpose(*(axes or ()))


def reshape(a: ndarray, shape, order: str = 'C') -> ndarray:
    """A view where strides allow it, else a copy."""
    return a.reshape(shape, order=order)


def ravel(a: ndarray, order: str = 'C') -> ndarray:
    """One axis; a view where strides allow it."""
    return a.ravel(order)
