"""The array on the device: shape and dtype are known at once, values when the stream has run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from cupy import _streams, fake
from cupy._memory import Allocation, is_pinned, poison


class HiddenSynchronization(RuntimeError):
    """The host would wait for the device where nobody sees it."""


class PendingWork(RuntimeError):
    """Memory is given away while a stream may still write it."""


def new(shape, dtype) -> ndarray:
    """An array of poison."""
    host = np.empty(0, dtype)
    shape = (int(shape),) if np.isscalar(shape) else tuple(int(n) for n in shape)
    memory = _streams.allocate(int(np.prod(shape)) * host.itemsize)
    x = ndarray(memory.bytes.view(host.dtype).reshape(shape), memory)
    poison(x.host)
    return x


def upload(values: np.ndarray) -> ndarray:
    """A copy of a host array, read at once."""
    _streams.current().refuse_if_captured()
    x = new(values.shape, values.dtype)
    np.copyto(x.host, values)
    return x


def unwrap(x, convert: Callable[[np.ndarray], np.ndarray] = lambda host: host):
    """x with the host memory of device arrays in their place.  Raises TypeError where a NumPy array is among them."""
    if isinstance(x, ndarray):
        return convert(x.host)
    if isinstance(x, np.ndarray):
        raise TypeError(f'Unsupported type {type(x)}')
    if isinstance(x, (list, tuple)):
        return type(x)(unwrap(item, convert) for item in x)
    return x


def _shadow(host: np.ndarray) -> np.ndarray:
    return np.zeros(host.shape, host.dtype)


def apply(function: Callable, *arguments, out: ndarray | None = None, **options):
    """Queue a NumPy function.  What it gives for zeros of the same shapes tells shape and dtype.

    out: takes the result; otherwise new arrays do, one or a tuple.  An error that shapes or types tell is raised at once.
    """
    with np.errstate(all='ignore'):
        known = function(*unwrap(arguments, _shadow), **unwrap_values(options, _shadow))
    several = isinstance(known, tuple)
    known = [np.asarray(k) for k in known] if several else [np.asarray(known)]
    if out is None:
        targets = [new(k.shape, k.dtype) for k in known]
    else:
        targets = [_fitting(out, known[0])]
    arguments, options = unwrap(arguments), unwrap_values(options)

    def work():
        values = function(*arguments, **options)
        for target, value in zip(targets, values if several else [values], strict=True):
            np.copyto(target.host, value, casting='same_kind')

    _streams.current().push(work)
    return tuple(targets) if several else targets[0]


def unwrap_values(options: dict, convert: Callable[[np.ndarray], np.ndarray] = lambda host: host) -> dict:
    """unwrap for keyword arguments."""
    return {name: unwrap(value, convert) for name, value in options.items()}


def _fitting(out, known: np.ndarray) -> ndarray:
    if not isinstance(out, ndarray):
        raise TypeError(f'Unsupported type {type(out)}')
    if out.shape != known.shape:
        raise ValueError(f'out has the shape {out.shape}; expected {known.shape}')
    if not np.can_cast(known.dtype, out.dtype, 'same_kind'):
        raise TypeError(f'output of {known.dtype} cannot be cast to {out.dtype}')
    return out


def depending_on_data(name: str, function: Callable, *arguments, **options):
    """A function whose shape the values decide: the host waits, and that is counted."""
    _streams.hidden_synchronization(name)
    found = function(*unwrap(arguments), **unwrap_values(options))
    return tuple(upload(f) for f in found) if isinstance(found, tuple) else upload(np.asarray(found))


def _key(key) -> tuple:
    """An index as a tuple, lists as device arrays.  Raises TypeError for NumPy arrays."""
    parts = []
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, list):
            part = np.array(part, np.int64 if not part else None)
            if part.dtype.kind not in 'biu':
                raise IndexError(f'an index of {part.dtype}; expected integers')
            part = upload(part)
        elif not (part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice, ndarray))):
            raise TypeError(f'Unsupported index type {type(part)}')
        parts.append(part)
    return tuple(parts)


def _has_mask(key: tuple) -> bool:
    return any(isinstance(part, ndarray) and part.dtype == bool for part in key)


def _binary(function: Callable, swapped: bool = False) -> Callable:
    def method(self, other):
        if other is None or isinstance(other, str):
            return NotImplemented
        if isinstance(other, np.generic) and other.dtype.kind == self.dtype.kind and (
                np.result_type(self.dtype, other.dtype) != self.dtype):
            raise TypeError(f'{self.dtype} array and np.{other.dtype}: {self.dtype} in CuPy 13, {other.dtype} in CuPy 14')
        return apply(function, *((other, self) if swapped else (self, other)))

    return method


def _in_place(function: Callable) -> Callable:
    return lambda self, other: apply(function, self, other, out=self)


def _reduction(name: str) -> Callable:
    return lambda self, axis=None, out=None, keepdims=False, **options: apply(
        getattr(np, name), self, axis=axis, out=out, keepdims=keepdims, **options)


def _refused(what: str) -> Callable:
    def method(self, *arguments, **options):
        raise HiddenSynchronization(f'hidden device sync: {what}')

    return method


class ndarray:
    """host: its memory as a NumPy array, for the stand-in only; memory: the allocation that it is a view of."""

    __hash__ = None

    def __init__(self, host: np.ndarray, memory: Allocation):
        self.host, self.memory = host, memory

    shape, dtype, size, nbytes, ndim, strides, itemsize, flags = (
        property(lambda self, name=name: getattr(self.host, name))
        for name in ('shape', 'dtype', 'size', 'nbytes', 'ndim', 'strides', 'itemsize', 'flags'))
    device = property(lambda self: SimpleNamespace(id=0))
    data = property(lambda self: SimpleNamespace(ptr=self.host.__array_interface__['data'][0]))

    @property
    def __cuda_array_interface__(self) -> dict:
        if not _streams.all_done():
            error = PendingWork('device buffer handed to MPI with work pending: synchronize first')
            print(f'cupy.fake: {error}', file=sys.stderr)  # mpi4py asks by hasattr, and says only that this is no buffer
            raise error
        strides = None if self.flags.c_contiguous else self.strides
        return {'shape': self.shape, 'typestr': self.dtype.str, 'descr': self.dtype.descr, 'data': (self.data.ptr, False),
                'strides': strides, 'version': 3, 'stream': 1}

    # ---- to and from the host

    def get(self, stream=None, order: str = 'C', out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        """A host copy; without blocking it is there when the stream has run."""
        stream = stream or _streams.current()
        if out is None:
            out = np.empty(self.shape, self.dtype, 'C' if order == 'A' else order)
        elif not isinstance(out, np.ndarray):
            raise TypeError(f'Only numpy.ndarray can be obtained from cupy.ndarray, not {type(out)}')
        elif out.dtype != self.dtype or out.shape != self.shape:
            raise ValueError(f'out is {out.dtype} {out.shape}; expected {self.dtype} {self.shape}')
        elif not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError('`out` cannot be specified when copying to non-contiguous ndarray')
        fake.count_copy(fake.device_to_host, self.nbytes)
        if blocking:
            stream.run()
            np.copyto(out, self.host)
        else:
            stream.refuse_if_captured()
            if not _streams.still_read(out):  # by a copy that the stream does before
                poison(out)
            stream.push(lambda: np.copyto(out, self.host))
        return out

    def set(self, host: np.ndarray, stream=None) -> None:
        """Overwrite with a host array: read when the stream runs where it is in pinned memory, else at once."""
        if not isinstance(host, np.ndarray):
            raise TypeError('Only numpy.ndarray can be set to cupy.ndarray')
        if host.dtype != self.dtype or host.shape != self.shape:
            raise ValueError(f'an array of {host.dtype} {host.shape}; expected {self.dtype} {self.shape}')
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError('Cannot set to non-contiguous array')
        fake.count_copy(fake.host_to_device, self.nbytes)
        stream = stream or _streams.current()
        if is_pinned(host):
            stream.push_copy_from(host, self.host)
        else:
            stream.refuse_if_captured()
            values = host.copy()
            stream.push(lambda: np.copyto(self.host, values))

    def item(self):
        """The one value, for which the host waits."""
        _streams.hidden_synchronization('item')
        return self.host.item()

    def tolist(self) -> list:
        """The values, for which the host waits."""
        _streams.hidden_synchronization('tolist')
        return self.host.tolist()

    def __array__(self, *arguments, **options):
        raise TypeError('Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array '
                        'explicitly.')

    __bool__, __float__, __int__, __index__, __iter__, __complex__, __reduce_ex__ = (
        _refused(what) for what in ('bool()', 'float()', 'int()', 'an index', 'iteration', 'complex()', 'pickle or copy'))

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if method != '__call__':
            raise TypeError(f'numpy.{ufunc.__name__}.{method} of device arrays')
        return apply(ufunc, *inputs, out=out[0] if out else None, **options)

    def __array_function__(self, function, types, arguments, options):
        own = getattr(sys.modules['cupy'], function.__name__, None)
        if own is None:
            raise TypeError(f'numpy.{function.__name__} of device arrays')
        return own(*arguments, **options)

    # ---- views and copies

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray(host, self.memory)

    T = property(lambda self: self._view(self.host.T))

    def view(self, dtype=None) -> ndarray:
        """The same bytes as another type."""
        return self._view(self.host.view(self.dtype if dtype is None else dtype))

    def reshape(self, *shape, order: str = 'C') -> ndarray:
        """A view where strides allow it, else a copy."""
        shape = shape[0] if len(shape) == 1 else shape
        host = self.host.reshape(shape, order=order)
        return self._view(host) if np.may_share_memory(host, self.host) else apply(np.reshape, self, shape, order=order)

    def ravel(self, order: str = 'C') -> ndarray:
        """One axis; a view where strides allow it."""
        return self.reshape(-1, order=order)

    def swapaxes(self, one: int, other: int) -> ndarray:
        """A view with two axes swapped."""
        return self._view(self.host.swapaxes(one, other))

    def transpose(self, *axes) -> ndarray:
        """A view with the axes in another order."""
        return self._view(self.host.transpose(*axes))

    def squeeze(self, axis=None) -> ndarray:
        """A view without axes of one."""
        return self._view(self.host.squeeze(axis))

    def astype(self, dtype, order: str = 'K', casting=None, subok=None, copy: bool = True) -> ndarray:
        """Of another type; itself where it has that type and no copy is asked for."""
        if not copy and self.dtype == dtype:
            return self
        return apply(lambda x: x.astype(dtype), self)

    def copy(self, order: str = 'C') -> ndarray:
        """A copy."""
        return apply(np.copy, self, order=order)

    def fill(self, value) -> None:
        """The same number everywhere."""
        self[...] = value

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key) -> ndarray:
        key = _key(key)
        if not any(isinstance(part, ndarray) for part in key):
            return self._view(self.host[key if Ellipsis in key else (*key, ...)])  # an array in any case, never a number
        if _has_mask(key):
            return depending_on_data('mask', lambda x, key: x[key], self, key)
        return apply(lambda x, key: x[key], self, key)

    def __setitem__(self, key, value) -> None:
        if isinstance(value, (list, tuple)):
            raise TypeError(f'Unsupported type {type(value)}')
        key = _key(key)
        host_key, host_value = unwrap(key), unwrap(value)
        if _has_mask(key) and isinstance(value, ndarray):
            _streams.hidden_synchronization('mask')
        else:  # what shapes tell is raised at once
            _shadow(self.host)[unwrap(key, _shadow)] = unwrap(value, _shadow)

        def work():
            self.host[host_key] = host_value

        _streams.current().push(work)

    # ---- arithmetic

    any, all, max, min, sum, mean, prod, argmax, argmin = (
        _reduction(name) for name in ('any', 'all', 'max', 'min', 'sum', 'mean', 'prod', 'argmax', 'argmin'))

    def argsort(self, axis: int = -1, kind=None) -> ndarray:
        """The order of the values along an axis."""
        return apply(np.argsort, self, axis=axis, kind=kind)

    def nonzero(self) -> tuple[ndarray, ...]:
        """Where it is not 0; the host waits."""
        return depending_on_data('nonzero', np.nonzero, self)

    def __neg__(self) -> ndarray:
        return apply(np.negative, self)

    def __abs__(self) -> ndarray:
        return apply(np.abs, self)

    def __invert__(self) -> ndarray:
        return apply(np.invert, self)


for _name, _function in {
        'add': np.add, 'sub': np.subtract, 'mul': np.multiply, 'truediv': np.divide, 'floordiv': np.floor_divide,
        'mod': np.remainder, 'pow': np.power, 'and': np.bitwise_and, 'or': np.bitwise_or, 'xor': np.bitwise_xor,
        'lshift': np.left_shift, 'rshift': np.right_shift, 'matmul': np.matmul}.items():
    setattr(ndarray, f'__{_name}__', _binary(_function))
    setattr(ndarray, f'__r{_name}__', _binary(_function, swapped=True))
    setattr(ndarray, f'__i{_name}__', _in_place(_function))
for _name, _function in {'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal, 'gt': np.greater,
                         'ge': np.greater_equal}.items():
    setattr(ndarray, f'__{_name}__', _binary(_function))
