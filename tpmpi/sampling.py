"""Choosing the next token exactly, although no rank ever sees all logits.

Every rank sends a few candidates and log-sum-exps of its part of the vocabulary; rank 0 decides.  The random choice is
Gumbel-max (argmax of logit / temperature + Gumbel noise is a sample of the softmax), with noise that is a function of
(seed, request, position, token id) alone, so that the result does not depend on the number of ranks:

* whole vocabulary: each rank's best perturbed logit is its only candidate;
* top-k: each rank's k best;
* top-p, min-p: each rank's best few, and more rounds until the candidates certainly hold the nucleus.

Filters apply in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.  Reported
log-probabilities are the model's own, before all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tpmpi.config import ConfigError

FIRST_CANDIDATES, MORE_CANDIDATES = 64, 8  # candidates a rank sends at first, and the factor of each further round


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.  Raises ConfigError when a value is out of range."""

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
        def check(name, ok, expected):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not ok(value):
                raise ConfigError(f'{name} is {value}; expected {expected}')

        check('max_new_tokens', lambda v: 0 <= v <= 1 << 31, 'a number of tokens, 0 or more')
        check('temperature', lambda v: 0 <= v < math.inf, 'a number of at least 0 (0 takes the most probable token)')
        check('top_k', lambda v: 0 <= v <= 1 << 31, 'a number of tokens, 0 for all')
        check('top_p', lambda v: 0 < v <= 1, 'a number above 0 and at most 1')
        check('min_p', lambda v: 0 <= v <= 1, 'a number from 0 to 1')
        check('repetition_penalty', lambda v: 0 < v < math.inf, 'a number above 0 (1 for none)')
        check('seed', lambda v: 0 <= v < 1 << 64, 'a whole number from 0 to 2^64 - 1')
        check('logprobs', lambda v: 0 <= v <= 1000, 'a number from 0 to 1000')
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ConfigError('stop is empty; expected a text of at least one character')

    @property
    def filtered(self) -> bool:
        """Sampling looks at the candidates' order, not only at the perturbed logits."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Choice:
    """A chosen token with the model's log-probability of it, and of the best alternatives as (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def gumbel_noise(seed: int, request: int, position: int, ids: range) -> np.ndarray:
    """Standard Gumbel noise for a run of token ids, a function of the arguments and of each id alone.  [ids] float64

    The 64-bit words of Philox (Salmon et al. 2011), a counter-based generator: block number = id / 4.
    """
    skip = ids.start % 4
    words = np.random.Philox(key=np.array([seed, request], np.uint64),
                             counter=np.array([ids.start // 4, position, 0, 0], np.uint64))
    raw = words.random_raw(skip + len(ids))[skip:]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53  # inside (0, 1)
    return -np.log(-np.log(uniform))


def penalize(logits: np.ndarray, vocab: range, history: Sequence[int], penalty: float) -> np.ndarray:
    """Make tokens seen before less likely: divide a positive logit by the penalty, multiply a negative one.

    (Keskar et al. 2019.)  logits: [vocab/n], not changed; history: ids of the prompt and of all generated tokens.
    """
    if penalty == 1:
        return logits
    seen = np.unique(np.asarray(history, np.int64))
    seen = seen[(seen >= vocab.start) & (seen < vocab.stop)] - vocab.start
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


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
    def plain(self) -> bool:
        """The most probable token, and nothing else is asked."""
        return not self.params.temperature and not self.params.logprobs and self.params.repetition_penalty == 1

    @property
    def open(self) -> bool:
        """More candidates may be asked for."""
        return self.params.filtered and not self.params.top_k


class Sampler:
    """Chooses tokens over all ranks, of many requests at once.  Every rank calls `choose` with its part of the logits."""

    def __init__(self, vocab: range, vocab_size: int, ops, comm):
        self.vocab, self.vocab_size, self.ops, self.comm = vocab, vocab_size, ops, comm

    def choose(self, logits: np.ndarray, draws: Sequence[Draw]) -> list[Choice] | None:
        """The next token of each row, on rank 0; None on the others.  logits: [rows, vocab/n]; draws: one for each row.

        One gather, and another one only where top-p or min-p without top-k want more candidates.
        """
        totals = self.ops.log_sum_exp(logits)  # [rows]
        if all(draw.plain for draw in draws):
            return self._most_probable(logits, totals)
        chosen: list[Choice | None] = [None] * len(draws)
        rows, counts = list(range(len(draws))), [draw.candidates for draw in draws]
        while rows:
            parts = [self._candidates(logits[i], totals[i], draws[i], min(counts[i], self.vocab_size)) for i in rows]
            message = np.concatenate(parts)
            gathered = np.empty((self.comm.size, *message.shape)) if self.comm.rank == 0 else None
            self.comm.gather(message, gathered)
            if gathered is not None:
                ends = np.cumsum([len(part) for part in parts])
                for i, part in zip(rows, np.split(gathered, ends[:-1], axis=1), strict=True):
                    chosen[i] = _decide(part, min(counts[i], self.vocab_size), draws[i].params)
            rows = [i for i in rows if draws[i].open]
            if rows:
                undecided = np.array([chosen[i] is None for i in rows], np.int64)
                self.comm.broadcast(undecided)
                rows = [i for i, more in zip(rows, undecided, strict=True) if more]
                for i in rows:
                    counts[i] *= MORE_CANDIDATES
        return chosen if self.comm.rank == 0 else None

    def _most_probable(self, logits: np.ndarray, totals: np.ndarray) -> list[Choice] | None:
        """What the general way gives for draws that are plain, all rows at once."""
        message = np.full((len(logits), 3), -np.inf)  # log-sum-exp, largest logit, its id
        message[:, 0] = totals
        if len(self.vocab):
            best = logits.argmax(axis=1)
            message[:, 1], message[:, 2] = logits[np.arange(len(logits)), best], best + self.vocab.start
        gathered = np.empty((self.comm.size, *message.shape)) if self.comm.rank == 0 else None
        self.comm.gather(message, gathered)
        if gathered is None:
            return None
        _check_finite(gathered[:, :, 0])
        total, rank = np.logaddexp.reduce(gathered[:, :, 0]), gathered[:, :, 1].argmax(axis=0)  # equal ones: the lower id
        _, logit, token = gathered[rank, np.arange(len(logits))].T
        return [Choice(int(t), float(x)) for t, x in zip(token, logit - total, strict=True)]

    def _candidates(self, logits, total, draw: Draw, count: int) -> np.ndarray:
        """This rank's best: rows of (id, logit, scaled, noise), best first, after a row of the log-sum-exps of all."""
        params, scaled, noise, total_scaled = draw.params, logits, None, total
        if params.repetition_penalty != 1:
            scaled = penalize(logits, self.vocab, draw.history, params.repetition_penalty)
        if params.temperature > 0:
            scaled = scaled / np.float32(params.temperature)
            noise = gumbel_noise(params.seed, draw.request, len(draw.history), self.vocab)
        if params.filtered and scaled is not logits:  # what a nucleus is measured by
            total_scaled = self.ops.log_sum_exp(scaled[None])[0]
        key = scaled if noise is None or params.filtered else scaled + noise
        message = np.full((1 + count + params.logprobs, 4), -np.inf)
        message[0, :3] = total, total_scaled, len(logits)
        for at, (values, most) in ((1, (key, count)), (1 + count, (logits, params.logprobs))):
            _, ids = self.ops.top_k(values, most)
            part = message[at:at + len(ids)]
            part[:, 0], part[:, 1], part[:, 2] = ids + self.vocab.start, logits[ids], scaled[ids]
            part[:, 3] = 0 if noise is None else noise[ids]
        return message


def _check_finite(totals: np.ndarray) -> None:
    if not (totals < np.inf).all():
        raise ArithmeticError('the logits are not finite: the weights are damaged, or overflow float32')


def _decide(gathered: np.ndarray, count: int, params: SamplingParams) -> Choice | None:
    """Rank 0: the choice among all ranks' candidates; None when they may not hold the whole nucleus yet."""
    _check_finite(gathered[:, 0, 0])
    total, total_scaled = np.logaddexp.reduce(gathered[:, 0, :2])
    rows = _by_value(gathered[:, 1:1 + count].reshape(-1, 4), 2)
    if params.filtered:
        cut = gathered[:, 0, 2] > count  # ranks that hold more than they sent, all of it at most their last one
        unseen = gathered[cut, count, 2].max(initial=-np.inf)
        rows = _nucleus(rows, total_scaled, unseen, params)
        if rows is None:
            return None
    if params.temperature > 0:
        rows = rows[np.lexsort((rows[:, 0], -(rows[:, 2] + rows[:, 3])))]
    token, logit = int(rows[0, 0]), rows[0, 1]
    top = _by_value(gathered[:, 1 + count:].reshape(-1, 4), 1)[:params.logprobs]
    return Choice(token, float(logit - total), tuple((int(r[0]), float(r[1] - total)) for r in top))


def _nucleus(rows: np.ndarray, total: float, unseen: float, params: SamplingParams) -> np.ndarray | None:
    """The candidates that top-k, top-p and min-p leave, best first; None when one that was not sent could belong.

    rows: best first; total: log-sum-exp of all scaled logits; unseen: no candidate above it is missing.
    """
    if params.top_k:
        rows = rows[:params.top_k]
        total, unseen = np.logaddexp.reduce(rows[:, 2]), -np.inf
    mass = np.cumsum(np.exp(rows[:, 2] - total))
    inside = np.ones(len(rows), bool)
    known = unseen == -np.inf
    if params.top_p < 1:
        inside &= np.concatenate(([0.0], mass[:-1])) < params.top_p  # the better ones do not fill it yet
        complete = int((rows[:, 2] > unseen).sum())  # the best so many are certainly the best of all
        known |= complete > 0 and mass[complete - 1] >= params.top_p
    if params.min_p > 0:
        least = rows[0, 2] + math.log(params.min_p)
        inside &= rows[:, 2] >= least
        known |= unseen < least
    return rows[inside] if known else None


def _by_value(rows: np.ndarray, column: int) -> np.ndarray:
    """Real candidates (padding has the id -inf), largest value first, equal ones by lower id."""
    rows = rows[np.isfinite(rows[:, 0])]
    return rows[np.lexsort((rows[:, 0], -rows[:, column]))]


def token_logprobs(logits: np.ndarray, vocab: range, targets: np.ndarray, ops, comm) -> np.ndarray | None:
    """log p(target) for each row, on rank 0; None on the others.  logits: [rows, vocab/n], targets: [rows] ids."""
    mine = (targets >= vocab.start) & (targets < vocab.stop)
    message = np.full((2, len(targets)), -np.inf)
    message[0] = ops.log_sum_exp(logits)
    message[1, mine] = logits[np.flatnonzero(mine), targets[mine] - vocab.start]
    gathered = np.empty((comm.size, *message.shape)) if comm.rank == 0 else None
    comm.gather(message, gathered)
    return None if gathered is None else gathered[:, 1].max(axis=0) - np.logaddexp.reduce(gathered[:, 0], axis=0)
