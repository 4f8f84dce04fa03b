"""Which tokens of this rank's part of the vocabulary can be chosen: the draws, and the candidates of each.

Of logits on a device as little as will do comes to the host.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from tpmpi.config import ConfigError

NOTHING = np.empty(0, np.float32), np.empty(0, np.int64)
FIRST_CANDIDATES = 64  # that a rank sends at first
LEAST, MOST = 1e-6, 1e6  # temperature and penalty: float32 holds a logit of 1e4 after both, with 20 orders of magnitude to spare
MOST_STOPS = 1000  # each is looked for at each token


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; a stop text may be given by itself.  Raises ConfigError for a value out of range or kind."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int = 0  # best alternatives to report per generated token
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    embedding: bool = False  # the hidden state of the prompt's last token, after the final norm

    def __post_init__(self):
        def check(name, kind, ok, expected):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not ok(value):
                raise ConfigError(f'{name} is {reprlib.repr(value)}; expected {expected}')
            object.__setattr__(self, name, int(value) if kind is Integral else float(value))  # also of NumPy's numbers

        check('max_new_tokens', Integral, lambda v: 0 <= v <= 1 << 31, 'a number of tokens, 0 or more')
        check('temperature', Real, lambda v: v == 0 or LEAST <= v <= MOST,
              f'a number of at least {LEAST:f} and at most {MOST:,.0f}, or 0 for the most probable token')
        check('top_k', Integral, lambda v: 0 <= v <= 1 << 31, 'a number of tokens, 0 for all')
        check('top_p', Real, lambda v: 0 < v <= 1, 'a number above 0 and at most 1')
        check('min_p', Real, lambda v: 0 <= v <= 1, 'a number from 0 to 1')
        check('repetition_penalty', Real, lambda v: LEAST <= v <= MOST, f'a number from {LEAST:f} to {MOST:,.0f} (1 for none)')
        check('seed', Integral, lambda v: 0 <= v < 1 << 64, 'a whole number from 0 to 2^64 - 1')
        check('logprobs', Integral, lambda v: 0 <= v <= 1000, 'a whole number from 0 to 1000')
        for name in ('prompt_logprobs', 'ignore_eos', 'embedding'):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ConfigError(f'{name} is {reprlib.repr(getattr(self, name))}; expected True or False')
        object.__setattr__(self, 'stop', _texts(self.stop))

    @property
    def filtered(self) -> bool:
        """Sampling looks at the candidates' order, not only at the perturbed logits."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _texts(stop) -> tuple[str, ...]:
    """One stop text, several, or None, as a tuple.  Raises ConfigError for anything else, an empty text, and too many."""
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    texts = tuple(stop) if several else () if stop is None else (stop,)
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f'stop is {reprlib.repr(stop)}; expected a text or several')
    if '' in texts:
        raise ConfigError('stop is empty; expected a text of at least one character')
    if len(texts) > MOST_STOPS:
        raise ConfigError(f'stop holds {len(texts):,} texts; expected at most {MOST_STOPS:,}')
    return texts


def gumbel_noise(seed: int, request: int, position: int, ids: range) -> np.ndarray:
    """Standard Gumbel noise for a run of token ids, a function of the arguments and of each id alone.  [ids] float64

    The 64-bit words of Philox (Salmon et al. 2011), a counter-based generator: block number = id / 4.
    """
    skip = ids.start % 4
    words = np.random.Philox(key=np.array([seed, request], np.uint64),
                             counter=np.array([ids.start // 4, position, 0, 0], np.uint64))
    raw = words.random_raw(skip + len(ids))[skip:]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53  # inside (0, 1)
    return -np.log(-np.log(np.minimum(uniform, 1 - 2.0 ** -53)))  # the last of 2^53 would be rounded to 1


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Make tokens seen before less likely: divide a positive logit by the penalty, multiply a negative one.

    (Keskar et al. 2019.)  logits: [n], not changed; seen: which of them, each once.
    """
    if penalty == 1 or len(seen) == 0:
        return logits
    logits = logits.copy()
    logits[seen] = _paid(logits[seen], np.float32(penalty), np)
    return logits


def _paid(logits, penalty, xp):
    return xp.where(logits > 0, logits / penalty, logits * penalty)


class Draw(NamedTuple):
    """A token to be chosen: by which rules, with the noise of which request, after which tokens (prompt included)."""

    params: SamplingParams
    request: int
    history: Sequence[int]

    @property
    def candidates(self) -> int:
        """How many each rank sends at first."""
        return (self.params.top_k or FIRST_CANDIDATES) if self.params.filtered else 1

    @property
    def perturbed(self) -> bool:
        """The candidate is the largest perturbed logit."""
        return self.params.temperature > 0 and not self.params.filtered

    @property
    def penalized(self) -> bool:
        """The logits are changed before all else."""
        return self.params.repetition_penalty != 1

    @property
    def divisor(self) -> float:
        """What the logits are divided by before the largest are candidates."""
        return self.params.temperature if self.params.filtered else 1.0

    @property
    def plain(self) -> bool:
        """The most probable token, and nothing else is asked."""
        return not self.params.temperature and not self.params.logprobs and self.params.repetition_penalty == 1

    def seen(self, vocab: range) -> np.ndarray:
        """The columns of these tokens that the text so far has, ascending."""
        ids = np.unique(np.asarray(self.history, np.int64))
        return ids[(ids >= vocab.start) & (ids < vocab.stop)] - vocab.start

    def noise(self, vocab: range) -> np.ndarray:
        """Gumbel noise for this choice."""
        return gumbel_noise(self.params.seed, self.request, len(self.history), vocab)

    @property
    def open(self) -> bool:
        """More candidates may be asked for."""
        return self.params.filtered and not self.params.top_k


class Best(NamedTuple):
    """The largest numbers of a row over a divisor, largest first, equal ones by lower column, and the log-sum-exp of all."""

    total: float
    values: np.ndarray  # before the division
    columns: np.ndarray


class Rows:
    """This rank's logits of some rows.  Of those on a device, as little as will do comes to the host.

    The largest of each row come, of all rows in one copy.  Where others can be chosen beside them, for the noise that they
    get, those that can come too: a logit below the last of the largest is chosen only if its noise is above all that one
    lacks.  Penalties are paid on the device.  More candidates than the device sorts are the only reason for a whole row.
    """

    def __init__(self, logits, draws: Sequence[Draw], vocab: range, ops):
        self.logits, self.draws, self.vocab, self.ops, self.width = logits, draws, vocab, ops, logits.shape[1]
        self.found: dict[tuple[int, float, bool], Best] = {}  # by row, divisor, and whether penalties are paid
        self.copied: dict[int, np.ndarray] = {}
        self.raw: dict[int, np.ndarray] = {}  # of penalized rows, the logits in the columns found
        self.chosen: dict[int, np.ndarray] = {}  # of perturbed rows, see `perturbed`
        if isinstance(logits, np.ndarray):
            self.copied = dict(enumerate(logits))
            self.found = {(row, 1.0, False): Best(total, *NOTHING) for row, total in enumerate(ops.log_sum_exp(logits))}
        elif self.width:
            self._from_device()

    # ---- on a device

    def _from_device(self) -> None:
        draws, everything = self.draws, range(len(self.draws))
        count = max(max(d.params.logprobs, FIRST_CANDIDATES if d.perturbed else d.candidates) for d in draws)
        self._fetch(self.logits, everything, False, [1.0] * len(draws), count)
        if any(d.divisor != 1 and not d.penalized for d in draws):
            self._fetch(self.logits, everything, False, [d.divisor for d in draws], count)
        penalized = [row for row in everything if draws[row].penalized]
        if penalized:
            self._fetch(self._penalties_paid(penalized), penalized, True, [draws[row].divisor for row in penalized], count)
        columns = {row: self.found[row, draws[row].divisor, True].columns for row in penalized}
        noises = {row: self._could_be_chosen(row) for row in everything if draws[row].perturbed}
        values = self._some([*columns.items(), *((row, at) for row, (at, _) in noises.items())])
        self.raw = dict(zip(columns, values, strict=False))
        for (row, (at, noise)), logits in zip(noises.items(), values[len(columns):], strict=True):
            self.chosen[row] = self._largest_perturbed(row, at, logits, noise)

    def _fetch(self, matrix, rows: Sequence[int], paid: bool, divisors: Sequence[float], count: int) -> None:
        """The largest of the rows of a matrix on the device."""
        found = self.ops.best(matrix, min(count, self.ops.BEST_AT_MOST), None if set(divisors) == {1} else np.array(divisors))
        for row, divisor, *best in zip(rows, divisors, *found, strict=True):
            self.found[row, divisor, paid] = Best(*best)

    def _penalties_paid(self, rows: Sequence[int]):
        """A copy of some rows on the device, as `penalize` changes them.  [rows, vocab/n]"""
        seen = [self.draws[row].seen(self.vocab) for row in rows]
        matrix = self.logits[self.ops.asarray(np.array(rows))]
        if sum(map(len, seen)):
            at = self.ops.asarray(np.repeat(np.arange(len(rows)), [len(s) for s in seen])), self.ops.asarray(np.concatenate(seen))
            penalty = [self.draws[row].params.repetition_penalty for row in rows]
            penalty = self.ops.asarray(np.repeat(np.array(penalty, np.float32), [len(s) for s in seen]))
            matrix[at] = _paid(matrix[at], penalty, self.ops.namespace(matrix))
        return matrix

    def _could_be_chosen(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns of which one has the largest perturbed number of a row, and the noise of each."""
        draw = self.draws[row]
        noise, best = draw.noise(self.vocab), self.found[row, 1.0, draw.penalized]
        scaled = best.values / np.float32(draw.params.temperature)
        enough = (scaled + noise[best.columns]).max() - scaled[-1]  # noise with which the last, and any below it, would win
        could = noise >= enough - 1e-6 if len(best.columns) < self.width else np.zeros(self.width, bool)
        could[best.columns] = True
        columns = np.flatnonzero(could)
        return columns, noise[columns]

    def _some(self, wanted: Sequence[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """The logits of some rows in some columns, in one copy."""
        if not wanted:
            return []
        ends = np.cumsum([len(columns) for _, columns in wanted])
        rows = np.repeat([row for row, _ in wanted], [len(columns) for _, columns in wanted])
        columns = np.concatenate([columns for _, columns in wanted])
        return np.split(self.logits[self.ops.asarray(rows), self.ops.asarray(columns)].get(), ends[:-1])

    # ---- wherever they are

    def whole(self, row: int) -> np.ndarray:
        """All logits of a row.  [vocab/n]"""
        if row not in self.copied:
            self.copied[row] = self.logits[row].get()
        return self.copied[row]

    def most(self, row: int, count: int) -> Best:
        """The most probable tokens."""
        return self._best(row, 1.0, count, False)

    def candidates(self, row: int, count: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """The log-sum-exp of a row's scores, and of its `count` largest the columns, the logits and the scores themselves.

        The scores are the logits after the penalty and the temperature.
        """
        draw = self.draws[row]
        total, scores, columns = self._best(row, draw.divisor, count, draw.penalized)
        logits = scores
        if draw.penalized:
            logits = self.raw[row][:count] if row in self.raw and len(columns) <= len(self.raw[row]) else self.whole(row)[columns]
        return total, columns, logits, scores if draw.divisor == 1 else scores / np.float32(draw.divisor)

    def perturbed(self, row: int) -> np.ndarray:
        """The column of the largest perturbed score of a row, its logit, score and noise.  [0 or 1, 4]"""
        if self.width == 0:
            return np.empty((0, 4))
        if row not in self.chosen:
            noise = self.draws[row].noise(self.vocab)
            self.chosen[row] = self._largest_perturbed(row, np.arange(self.width), self.whole(row), noise)
        return self.chosen[row]

    def _largest_perturbed(self, row: int, columns: np.ndarray, logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
        draw = self.draws[row]
        seen = np.flatnonzero(np.isin(columns, draw.seen(self.vocab))) if draw.penalized else NOTHING[1]
        scores = penalize(logits, seen, draw.params.repetition_penalty) / np.float32(draw.params.temperature)
        _, (at,) = self.ops.top_k(scores + noise, 1)
        return np.array([[columns[at], logits[at], scores[at], noise[at]]])

    def _best(self, row: int, divisor: float, count: int, paid: bool) -> Best:
        found = self.found.get((row, divisor, paid))
        if found is None or len(found.columns) < min(count, self.width):
            x = self.whole(row)
            if paid:
                x = penalize(x, self.draws[row].seen(self.vocab), self.draws[row].params.repetition_penalty)
            scaled = x if divisor == 1 else x / np.float32(divisor)
            total = self.ops.log_sum_exp(scaled[None])[0] if found is None else found.total
            _, columns = self.ops.top_k(scaled, count)
            found = Best(total, x[columns], columns)
        return Best(found.total, found.values[:count], found.columns[:count])
