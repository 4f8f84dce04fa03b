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
from time import perf_counter

import numpy as np

from tpmpi.candidates import Draw, Rows, SamplingParams

MORE_CANDIDATES = 8  # the factor of candidates of each further round


@dataclass(frozen=True)
class Choice:
    """A chosen token with the model's log-probability of it, and of the best alternatives as (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens over all ranks, of many requests at once.  Every rank calls `choose` with its part of the logits."""

    def __init__(self, vocab: range, vocab_size: int, ops, comm):
        self.vocab, self.vocab_size, self.ops, self.comm = vocab, vocab_size, ops, comm
        self.waited = 0.0  # seconds for logits on a device, in the last choice

    def choose(self, logits, draws: Sequence[Draw]) -> list[Choice] | None:
        """The next token of each row, on rank 0; None on the others.  logits: [rows, vocab/n]; draws: one for each row.

        One gather, and another one only where top-p or min-p without top-k want more candidates.
        """
        start = perf_counter()
        if all(draw.plain for draw in draws):
            totals, values, columns = most_probable(logits, self.ops)
            self.waited = 0.0 if isinstance(logits, np.ndarray) else perf_counter() - start
            return self._most_probable(totals, values, columns)
        local = Rows(logits, draws, self.vocab, self.ops)
        self.waited = 0.0 if isinstance(logits, np.ndarray) else perf_counter() - start
        chosen: list[Choice | None] = [None] * len(draws)
        rows, counts = list(range(len(draws))), [draw.candidates for draw in draws]
        while rows:
            parts = [self._candidates(local, i, draws[i], min(counts[i], self.vocab_size)) for i in rows]
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

    def _most_probable(self, totals, values, columns) -> list[Choice] | None:
        """What the general way gives for draws that are plain, all rows at once."""
        message = np.empty((len(totals), 3))
        message[:, 0], message[:, 1], message[:, 2] = totals, values, columns + self.vocab.start
        gathered = np.empty((self.comm.size, *message.shape)) if self.comm.rank == 0 else None
        self.comm.gather(message, gathered)
        if gathered is None:
            return None
        _check_finite(gathered[:, :, 0])
        total, rank = np.logaddexp.reduce(gathered[:, :, 0]), gathered[:, :, 1].argmax(axis=0)  # equal ones: the lower id
        _, logit, token = gathered[rank, np.arange(len(message))].T
        return [Choice(int(t), float(x)) for t, x in zip(token, logit - total, strict=True)]

    def _candidates(self, local: Rows, row: int, draw: Draw, count: int) -> np.ndarray:
        """This rank's best: rows of (id, logit, scaled, noise), best first, after a row of the log-sum-exps of all.

        Behind them the most probable ones, whose log-probabilities are asked for.
        """
        params = draw.params
        total, most, most_columns = local.most(row, params.logprobs)
        if draw.perturbed:
            total_scaled, found = total, local.perturbed(row)
        else:
            total_scaled, columns, logits, scores = local.candidates(row, count)
            noise = draw.noise(self.vocab)[columns] if params.temperature > 0 else np.zeros(len(columns))
            found = np.stack((columns, logits, scores, noise), axis=1)
        message = np.full((1 + count + params.logprobs, 4), -np.inf)
        message[0, :3] = total, total_scaled, len(self.vocab)
        best, others = message[1:1 + len(found)], message[1 + count:1 + count + len(most)]
        best[:] = found
        best[:, 0] += self.vocab.start
        others[:, 0], others[:, 1] = most_columns + self.vocab.start, most
        return message


def most_probable(logits, ops) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the log-sum-exp, the largest logit and its column, -inf and 0 where a rank has none.  [rows, vocab/n]"""
    if logits.shape[1] == 0:
        return *np.full((2, len(logits)), -np.inf), np.zeros(len(logits), np.int64)
    if not isinstance(logits, np.ndarray):
        totals, values, columns = ops.best(logits, 1)
        return totals, values[:, 0], columns[:, 0]
    best = logits.argmax(axis=1)
    return ops.log_sum_exp(logits), logits[np.arange(len(logits)), best], best


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


def token_logprobs(logits, vocab: range, targets: np.ndarray, ops, comm) -> np.ndarray | None:
    """log p(target) for each row, on rank 0; None on the others.  logits: [rows, vocab/n], targets: [rows] ids."""
    mine = (targets >= vocab.start) & (targets < vocab.stop)
    rows, columns = np.flatnonzero(mine), targets[mine] - vocab.start
    message = np.full((2, len(targets)), -np.inf)
    if isinstance(logits, np.ndarray):
        message[0], message[1, rows] = ops.log_sum_exp(logits), logits[rows, columns]
    elif len(vocab):
        message[0], message[1, rows] = ops.best(logits, 1)[0], logits[ops.asarray(rows), ops.asarray(columns)].get()
    gathered = np.empty((comm.size, *message.shape)) if comm.rank == 0 else None
    comm.gather(message, gathered)
    if gathered is None:
        return None
    _check_finite(gathered[:, 0])
    return gathered[:, 1].max(axis=0) - np.logaddexp.reduce(gathered[:, 0], axis=0)
