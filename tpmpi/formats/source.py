"""What every reader of other people's checkpoints hands over: a configuration, tensors to read, a tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpmpi.config import ConfigError, ModelConfig
from tpmpi.weights import Stored

BFLOAT16 = 'bfloat16'
HALVES = (BFLOAT16, 'float16')  # as a file has them, and as weights.py calls them
JSON_LIMIT = 1 << 28  # bytes; the largest tokenizer.json in use is below 40 MB


class FormatError(ValueError):
    """A checkpoint that is damaged, contradicts itself, or says something whose meaning this version does not know."""


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint, not yet read.  Matrices are [out, in], as in Hugging Face."""

    origin: str  # file and name there, for messages
    shape: tuple[int, ...]
    dtype: str  # 'float32', 'float16', 'bfloat16', or GGUF's name of a quantized type
    load: Callable[[], np.ndarray]  # uint16 bits where dtype is bfloat16; float16 or float32 otherwise
    load_groups: Callable[[str], Stored] | None = None  # of a quantized type, as one of `group_kinds`
    group_kinds: tuple[str, ...] = ()  # the integer kinds that hold its very numbers, the smallest first
    rows: Callable[[int, int], TensorSource] | None = None  # rows first … stop - 1 of [rows, columns], where those can be read
    # by themselves; of a tensor with more axes, all but the last one count rows

    @property
    def exact_kinds(self) -> tuple[str, ...]:
        """The kinds that hold the tensor without loss, the smallest first."""
        return *self.group_kinds, *((self.dtype,) if self.dtype in HALVES else ()), 'float32'

    def read(self) -> np.ndarray:
        """The tensor as float32, read anew on each call.  Raises FormatError where the file is too short."""
        values = self.load()
        if self.dtype == BFLOAT16:
            return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)  # the upper half of a float32
        return values.astype(np.float32, copy=False)

    def read_bfloat16(self) -> np.ndarray:
        """The raw 16 bits of a bfloat16 tensor as uint16.  Raises FormatError where the source has another type."""
        if self.dtype != BFLOAT16:
            raise FormatError(f'{self.origin} is {self.dtype}; only bfloat16 tensors have bfloat16 bits, use read()')
        return self.load()

    def read_stored(self, kind: str) -> Stored:
        """The tensor without loss in one of `exact_kinds`, [out, in].  Raises FormatError for any other kind."""
        if kind not in self.exact_kinds:
            raise FormatError(f'{self.origin} is {self.dtype}; without loss it can be {" or ".join(self.exact_kinds)}')
        if kind in self.group_kinds:
            return self.load_groups(kind)
        return Stored(kind, np.ascontiguousarray(self.load() if kind in HALVES else self.read()))


@dataclass(frozen=True)
class Checkpoint:
    """Somebody's checkpoint, opened and checked; the tensors stay in their files until they are read."""

    config: ModelConfig
    tensors: Mapping[str, TensorSource]  # by the names of `tensor_specs`, in its order
    tokenizer_json: str  # Hugging Face's tokenizer.json
    chat_template: str | None  # jinja2
    eos_token_ids: tuple[int, ...]  # each ends a text; the tokenizer's own one first
    bos_token_id: int | None
    provenance: Mapping[str, str]  # where it came from
    files: tuple[Path, ...]  # that hold the tensors


@contextlib.contextmanager
def understood(where: Path):
    """What goes wrong with the values of a file becomes a FormatError that names it, also where no check foresaw them."""
    try:
        yield
    except FormatError:
        raise
    except ConfigError as error:
        raise FormatError(f'{where}: {error}') from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise FormatError(f'{where} cannot be read ({type(error).__name__}: {str(error)[:200]}); look for a value of a wrong '
                          'type or size') from error


def describe(shape: tuple[int, ...]) -> str:
    return '[' + ', '.join(map(str, shape)) + ']'


def read_numbers(path: Path, offset: int, count: int, dtype: str) -> np.ndarray:
    """`count` numbers from byte `offset` of a file.  Raises FormatError where the file ends earlier."""
    try:
        values = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    except OSError as error:
        raise FormatError(f'{path}: {error.strerror or error}') from error
    if values.size != count:
        raise FormatError(
            f'{path} ends inside a tensor: {count} numbers expected at byte {offset}, {values.size} found')
    return values


def file_size(path: Path) -> int:
    """Bytes of a regular file.  Raises FormatError for anything else: opening a pipe waits for ever.  Raises OSError, too."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f'{path} is no regular file; expected one, or a link to one')
    return found.st_size


def read_json(path: Path) -> dict:
    """The object in a JSON file.  Raises FormatError when there is none."""
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    try:
        if (size := file_size(path)) > JSON_LIMIT:
            raise FormatError(f'{path} has {size} bytes; at most {JSON_LIMIT} are read')
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f'{path} cannot be read: {error}') from error


def parse_json(text: str, where: Path | str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f'{where} is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise FormatError(f'{where} holds a {type(value).__name__}; expected a JSON object')
    return value


def checked_token_id(value, vocab_size: int, name: str) -> int | None:
    """A token id, or None.  Raises FormatError when the vocabulary has no such id."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise FormatError(f'{name} is {value!r}; expected a token id from 0 to {vocab_size - 1}')
    return value


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
