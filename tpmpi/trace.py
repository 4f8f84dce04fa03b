"""Where the time went: the diagram's stages with their real shapes, time and bytes, measured on every rank.

The tracer stands between the model and its kernels and communicator: same calls, timed.  The model knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

STAGES = ('embedding', 'AllReduce(embedding)', 'A', 'Q', 'AllReduce(Q)', 'K', 'V', 'cache', 'B', 'C', 'AllReduce(C)', 'D', 'E',
          'AllReduce(E)', 'logits')
# the kernel's result that a stage is, by the letter of the weight it is computed with
LINEAR_STAGES = {'W^Q W^K W^V': 'Q', 'W^B': 'C', 'W^C': 'D', 'W^D': 'E', 'E': 'E'}


@dataclass
class Stage:
    """What one stage of the diagram cost in one phase, over all layers and steps."""

    shape: tuple[int, ...] = ()  # of its result in the last step
    seconds: float = 0.0
    bytes: int = 0  # that it read: weights, or the part of the cache that attention saw; for AllReduce: of the buffer
    calls: int = 0


class Tracer:
    """Times every kernel and every all-reduce, by phase and stage."""

    def __init__(self, ops, comm, synchronize=None):
        self.ops, self.comm, self.synchronize = _TracedOps(ops, self), _TracedComm(comm, self), synchronize
        self.phases: dict[str, dict[str, Stage]] = {}
        self.phase = 'load'
        self.steps: dict[str, int] = {}
        self.last = ''

    def timed(self, stage: str, function, arguments, nbytes: int = 0, is_result: bool = True):
        """Call a kernel and book its time.  is_result: what it returns is what the stage gives, and not on the way to it."""
        start = perf_counter()
        result = function(*arguments)
        if self.synchronize is not None:
            self.synchronize()
        self.book(stage, result.shape if is_result else (), perf_counter() - start, nbytes)
        return result

    def book(self, stage: str, shape, seconds: float = 0.0, nbytes: int = 0):
        """Add to a stage of the phase that is running."""
        if stage == 'embedding' != self.last:  # of the positions, it follows that of the tokens
            self.steps[self.phase] = self.steps.get(self.phase, 0) + 1
        entry = self.phases.setdefault(self.phase, {}).setdefault(stage, Stage())
        entry.shape, entry.seconds, entry.bytes = tuple(shape) or entry.shape, entry.seconds + seconds, entry.bytes + nbytes
        entry.calls += 1
        self.last = stage


class _TracedOps:
    """The kernels, timed.  What is not a stage of the diagram passes through."""

    def __init__(self, ops, tracer: Tracer):
        self._ops, self._tracer = ops, tracer

    def __getattr__(self, name):
        if name == 'kernels_of_layers':  # all layers at once would be no stages
            raise AttributeError(name)
        return getattr(self._ops, name)

    def embed(self, tokens, table, vocab):
        width = table.nbytes // max(1, len(vocab))
        return self._tracer.timed('embedding', self._ops.embed, (tokens, table, vocab), width * len(tokens))

    def rms_norm(self, x, gain, eps):
        return self._tracer.timed('A', self._ops.rms_norm, (x, gain, eps), x.nbytes)

    def layer_norm(self, x, gain, bias, eps):
        return self._tracer.timed('A', self._ops.layer_norm, (x, gain, bias, eps), x.nbytes)

    def added_norm(self, x, part, *arguments):
        return self._tracer.timed('A', self._ops.added_norm, (x, part, *arguments), x.nbytes + part.nbytes)

    def rope_table(self, positions, lengths, rope):
        return self._tracer.timed('Q', self._ops.rope_table, (positions, lengths, rope), is_result=False)

    def norm_heads(self, *arguments):
        return self._tracer.timed('Q', self._ops.norm_heads, arguments, is_result=False)

    def head_squares(self, qkv, runs):
        return self._tracer.timed('Q', self._ops.head_squares, (qkv, runs), is_result=False)

    def scale_columns(self, *arguments):
        return self._tracer.timed('Q', self._ops.scale_columns, arguments, is_result=False)

    def linear(self, x, weight, out=None):
        return self._tracer.timed(LINEAR_STAGES.get(weight.letter, 'logits'), self._ops.linear, (x, weight, out), weight.nbytes,
                                  is_result=weight.letter != 'E')

    def rope_append(self, qkv, num_heads, head_dim, rope, cache, slots):
        tokens, kv_heads = len(qkv), len(cache.k)
        for stage, heads in (('Q', num_heads), ('K', kv_heads), ('V', kv_heads)):
            self._tracer.book(stage, (tokens, heads, head_dim))
        start = perf_counter()
        q = self._ops.rope_append(qkv, num_heads, head_dim, rope, cache, slots)
        written = 2 * tokens * kv_heads * head_dim * cache.k.itemsize
        self._tracer.book('cache', cache.k.shape, perf_counter() - start, written)
        return q

    def attend(self, q, cache, groups, segments, window, scale, cap=None, sinks=0):
        seen = sum(s.stop - s.oldest for s in segments)
        nbytes = 2 * seen * len(cache.k) * q.shape[-1] * cache.k.itemsize
        return self._tracer.timed('B', self._ops.attend, (q, cache, groups, segments, window, scale, cap, sinks), nbytes)

    def gated_activation(self, gate_up, kind):
        return self._tracer.timed('D', self._ops.gated_activation, (gate_up, kind))

    def gated_linear(self, x, weight, kind):
        return self._tracer.timed('D', self._ops.gated_linear, (x, weight, kind), weight.nbytes)

    def activate(self, x, kind):
        return self._tracer.timed('D', self._ops.activate, (x, kind))

    def route(self, scores, count, normalize):
        return self._tracer.timed('E', self._ops.route, (scores, count, normalize), is_result=False)

    def experts(self, a, choice, shares, up, down, kind):
        read = len(set(choice.ravel().tolist())) / len(up.data)  # of the experts
        return self._tracer.timed('E', self._ops.experts, (a, choice, shares, up, down, kind),
                                  round(read * (up.nbytes + down.nbytes)))

    def sigmoid(self, x):
        return self._tracer.timed('E', self._ops.sigmoid, (x,), is_result=False)

    def softcap(self, x, cap):
        return self._tracer.timed('logits', self._ops.softcap, (x, cap))


class _TracedComm:
    """The communicator, with each all-reduce booked after the stage that it completes."""

    def __init__(self, comm, tracer: Tracer):
        self._comm, self._tracer = comm, tracer

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def all_reduce(self, x):
        start, stage = perf_counter(), self._tracer.last
        self._comm.all_reduce(x)
        self._tracer.book(f'AllReduce({stage})', x.shape, perf_counter() - start, x.nbytes)


def table(tracers: list[dict], hosts: list[str]) -> str:
    """The diagram of a run as text, one block per rank.  tracers: each rank's `summary`."""
    lines = ['A -> W^Q,W^K,W^V -> Q,K,V -> [cache] -> softmax(QK^T)V = B -> W^B -> C =AllReduce=> + '
             '-> W^C -> D -> W^D -> E =AllReduce=> +']
    for rank, (summary, host) in enumerate(zip(tracers, hosts, strict=True)):
        for phase, (steps, stages) in summary.items():
            lines.append(f'rank {rank} on {host}, {phase}: {steps} step{"s" if steps != 1 else ""}; '
                         f'time and bytes are of one step, over all layers')
            for stage in STAGES:
                if stage in stages:
                    s = stages[stage]
                    shape = '[' + ', '.join(map(str, s.shape)) + ']'
                    lines.append(f'  {stage:<21}{shape:<20}{1e3 * s.seconds / steps:>10.3f} ms{s.bytes // steps:>15,} bytes')
    return '\n'.join(lines)


def summary(tracer: Tracer) -> dict:
    """A rank's measurements, for `table`: {phase: (steps, {stage: Stage})}."""
    return {phase: (tracer.steps[phase], stages) for phase, stages in tracer.phases.items() if phase in tracer.steps}
