"""The numbers of a batch's results as arrays in an HDF5 file, made from its finished output in one pass.

The output's lines are what is appended and kept through any interruption; this file follows from them, and is written
under a temporary name and renamed when it is whole.  Rows are in the order of the output.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

PIECE = 1 << 16  # numbers that are written at once

ABOUT = """The results of tpmpi.batch, one row each, in the order of the output file.  What has its own length for each
request lies one after another, with NAME_start[i] and NAME_start[i + 1] the run of row i."""


class ArraysError(ValueError):
    """The file of arrays cannot be written."""


@dataclass(frozen=True)
class Numbers:
    """What a result holds of numbers."""

    id: str | int
    tokens: list[int]  # none in the OpenAI format, which has no ids of them
    logprobs: list[dict] | None = None  # per token {'logprob', 'top': [[id, text, logprob], ...]}
    prompt_logprobs: list[float] | None = None
    embedding: list[float] | None = None


def numbers_of(record: dict) -> Numbers | None:
    """The numbers of one line of the output, of either format; None for an error."""
    if record.get('error') is not None:
        return None
    if 'response' not in record:
        return Numbers(record['id'], record['tokens'], *map(record.get, ('logprobs', 'prompt_logprobs', 'embedding')))
    body = record['response']['body']
    part = body['choices'][0] if 'choices' in body else body['data'][0]
    return Numbers(record['custom_id'], [], None, part.get('prompt_logprobs'), part.get('embedding'))


class _Column:
    """A dataset that grows: [rows, *shape]."""

    def __init__(self, file: h5py.File, name: str, dtype, about: str):
        self.file, self.name, self.dtype, self.about = file, name, dtype, about
        self.held: list[np.ndarray] = []
        self.count = self.size = 0
        self.dataset = None

    def add(self, rows) -> None:
        """Rows more.  [rows, *shape]"""
        rows = np.asarray(rows, self.dtype)
        if self.dataset is None:
            shape = rows.shape[1:]
            chunk = (max(1, PIECE // max(1, int(np.prod(shape)))), *shape)
            self.dataset = self.file.create_dataset(self.name, (0, *shape), self.dtype, maxshape=(None, *shape), chunks=chunk)
            self.dataset.attrs['about'] = self.about
        if rows.shape[1:] != self.dataset.shape[1:]:
            raise ArraysError(f'{self.name}: a row of shape {list(rows.shape[1:])} among rows of {list(self.dataset.shape[1:])}; '
                              f'requests that ask for different numbers do not fit into one file')
        self.held.append(rows)
        self.count += len(rows)
        self.size += rows.size
        if self.size >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self.held:
            self.dataset.resize(self.count, axis=0)
            rows = np.concatenate(self.held)
            self.dataset[self.count - len(rows):] = rows
            self.held, self.size = [], 0


class _Ragged:
    """A column with as many numbers as each row has, and the column of where they start."""

    def __init__(self, file: h5py.File, name: str, dtype, about: str):
        self.values = _Column(file, name, dtype, about)
        self.starts = _Column(file, f'{name}_start', np.int64, f'[rows + 1] where each row of {name} begins')
        self.starts.add([0])

    def skip(self, rows: int) -> None:
        """Rows without numbers."""
        self.starts.add([self.values.count] * rows)

    def add(self, values) -> None:
        """One row more."""
        if len(values):
            self.values.add(values)
        self.starts.add([self.values.count])

    def flush(self) -> None:
        """Write what is held."""
        if self.values.dataset is None:
            self.values.add([])
        self.values.flush()
        self.starts.flush()


def write_arrays(path: Path, rows: Iterable[Numbers]) -> int:
    """Write the numbers of all results; returns how many rows there are.  Raises ArraysError where that cannot be done.

    /id [rows]; /tokens, and where they were asked for /prompt_logprobs, /logprobs (of the tokens), /top_tokens and
    /top_logprobs [tokens, K]; /embedding [rows, hidden].
    """
    part = path.with_name(path.name + '.part')
    try:
        with h5py.File(part, 'w', locking=False) as file:
            count = _fill(file, rows)
        with open(part, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ArraysError(f'cannot write {path}: {e.strerror or e}; the results are safe in the output') from e
    finally:
        part.unlink(missing_ok=True)
    return count


def _fill(file: h5py.File, rows: Iterable[Numbers]) -> int:
    file.attrs['about'] = ABOUT
    ids = _Column(file, 'id', h5py.string_dtype(), 'of the request')
    tokens = _Ragged(file, 'tokens', np.int32, 'generated token ids')
    columns: dict[str, _Column | _Ragged] = {}

    def column(name: str, make, dtype, about: str, before: int = 0):
        """before: rows so far that need none of it."""
        if name not in columns:
            if count > before:
                raise ArraysError(f'{name}: only some requests ask for it; one file needs it of all')
            columns[name] = make(file, name, dtype, about)
            if before:
                columns[name].skip(before)
        return columns[name]

    count = 0
    for row in rows:
        ids.add([str(row.id).replace('\0', '\\u0000')])  # which HDF5's texts cannot hold
        before = 0 if tokens.values.count else count
        tokens.add(row.tokens)
        given = set()
        if row.prompt_logprobs is not None:
            column('prompt_logprobs', _Ragged, np.float32, 'of each prompt token from the second on').add(row.prompt_logprobs)
            given.add('prompt_logprobs')
        if row.logprobs is not None:
            column('logprobs', _Ragged, np.float32, 'of each generated token').add([t['logprob'] for t in row.logprobs])
            top = [t['top'] for t in row.logprobs]
            given.add('logprobs')
            if top and top[0]:
                column('top_tokens', _Ragged, np.int32, 'best tokens of each step', before).add([[e[0] for e in t] for t in top])
                column('top_logprobs', _Ragged, np.float32, 'their log-probabilities', before).add(
                    [[e[-1] for e in t] for t in top])
                given |= {'top_tokens', 'top_logprobs'}
            elif not top:  # no tokens, so nobody knows whether they were asked for
                for name in {'top_tokens', 'top_logprobs'} & set(columns):
                    columns[name].skip(1)
                    given.add(name)
        if row.embedding is not None:
            column('embedding', _Column, np.float32, "hidden state of the prompt's last token").add([row.embedding])
            given.add('embedding')
        if given != set(columns):
            raise ArraysError(f'{min(set(columns) - given)}: only some requests ask for it; one file needs it of all')
        count += 1
    for each in (ids, tokens, *columns.values()):
        each.flush()
    return count
