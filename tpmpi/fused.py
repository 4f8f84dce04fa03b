"""model.all_layers on a CPU for steps of few tokens: all layers in one call of a compiled function, kernels/layers.py.

Where sums over the ranks need messages it is one call from each sum to the next.  Other steps, and layers of another kind, go
through all_layers.  The bits are the same either way, and so are the sums over the ranks: each rank decides for itself, but
for mixtures of experts.
"""

from __future__ import annotations

import numpy as np

from tpmpi.kernels import alignment, elementwise, layers
from tpmpi.kernels.cpu import EVERYWHERE, NOTHING
from tpmpi.kernels.recent import bounds_of, rows_of, tables_of_groups
from tpmpi.model import all_layers, embedded, norm
from tpmpi.shared_sums import ALONE

MOST_TOKENS = 64  # of more a layer takes so long that what Python takes is nothing, and the memory of all its parts would be much


class FusedLayers:
    """The layers of steps on one cache.  ops: kernels.cpu's."""

    def __init__(self, ops, model, cache):
        self.ops, self.model, self.cache = ops, model, cache
        self.possible = layers.usual(model.config) and len(model.shard.heads) > 0
        self.tables: dict[int, layers.Tables | None] = {}  # by the number of tokens
        self.mixtures = layers.mixtures_of(model.layers) if self.possible else frozenset()
        config = model.config
        self.reals = np.array([config.scores_scale, config.attention_softcap or 0, config.norm_eps, config.residual_multiplier],
                              np.float32)  # in the order of stages.py
        self.views = np.array([(EVERYWHERE if g.window is None else g.window, g.sinks) for g in model.groups], np.int64)

    def __call__(self, step, model, cache, ops, comm):
        """Hidden states before the head, [tokens, hidden]; see model.all_layers."""
        tables = self._tables(len(step.tokens), comm)
        if tables is None:
            return all_layers(step, model, cache, ops, comm)
        config, mixtures = model.config, self.mixtures
        x, ropes = embedded(step, model, ops, comm)
        a = norm(x, model.first_norm, config, ops)  # A  [tokens, hidden]
        ropes = [rows_of(rope) for rope in ropes]
        facts, numbers = self._facts(step, ropes), self._numbers(step, comm.size)
        wide = alignment.empty((len(x), config.hidden_size + config.num_experts) if mixtures else (0, 0), np.float32)
        streams = alignment.empty((2, *x.shape) if config.post_norm else (0, 0, 0), np.float32)
        end, disputed = layers.stages_of(config), np.zeros(1, np.int64)

        def run(first, last, sums, meeting, number=0):
            where = meeting.parts, meeting.rooms, meeting.flags, meeting.rank, meeting.patience
            return tables.run(first, last, x, a, *sums, wide, streams, tables.weights, facts, numbers, self.reals, disputed,
                              where, number)

        sizes = [wide.nbytes if stage in mixtures else x.nbytes for stage in range(end)]
        sums = list(alignment.empty((2, *x.shape), np.float32))  # in turn
        meeting = ALONE if comm.size == 1 else comm.meeting(max(sizes))
        if meeting is not None and meeting.rooms.size > 0:
            if mixtures:
                meeting = None  # large sums of theirs have no rooms
            else:
                sums = comm.shared.next_rooms(x.shape)
        if meeting is not None:
            with comm.sums_within(sizes) as (traffic, number):
                traffic.seconds = 1e-9 * run(0, end + 1, sums, meeting, number)
        else:
            for stage in range(end):
                room = None if stage in mixtures else comm.room(x.shape)
                if room is not None:
                    sums[stage % 2] = room
                run(stage, stage + 1, sums, ALONE)  # C, E or both, this rank's part
                whole = wide if stage in mixtures else sums[stage % 2]
                comm.all_reduce(whole)
            run(end, end + 1, sums, ALONE)
        # where ranks have chosen different experts: as all_layers does then, into the same slots of the cache
        return all_layers(step, model, cache, ops, comm) if disputed[0] else a

    def _facts(self, step, ropes) -> tuple:
        """A step as the kernel takes it."""
        segments, blocks = tables_of_groups(step.segments)
        slots = np.concatenate(step.slots).reshape(len(step.slots), -1)
        return (layers.ropes_of(ropes), slots, bounds_of(self.model.query_groups), segments, blocks, self.views,
                NOTHING if step.growth is None else step.growth)

    def _numbers(self, step, ranks: int) -> np.ndarray:
        """In the order of stages.py."""
        config, threads_of = self.model.config, self.ops.threads_of_rows
        rows, kind = len(step.tokens), elementwise.ACTIVATIONS[config.activation]
        return np.array([step.segments[0][0].ring.block, ranks, len(self.model.shard.heads), config.head_dim,
                         config.norm == 'layer', config.gated, config.parallel_block, kind, config.experts_per_token,
                         config.normalize_experts, self.ops.threads, threads_of(rows),
                         threads_of(rows * config.experts_per_token)], np.int64)

    def _tables(self, tokens: int, comm) -> layers.Tables | None:
        """For steps of so many tokens; None where one kernel is not all of an operation.

        With mixtures all ranks go one way, since they have to agree on experts: collective, where so many come the first time.
        """
        if tokens not in self.tables:
            found = self._make_tables(tokens) if self.possible and tokens <= MOST_TOKENS else None
            together = not self.model.config.num_experts or tokens > MOST_TOKENS or all(comm.exchange(found is not None))
            self.tables[tokens] = found if together else None
        return self.tables[tokens]

    def _make_tables(self, tokens: int) -> layers.Tables | None:
        products = [[self._product(tokens, w) for w, _ in layers.matrices_of(layer)] for layer in self.model.layers]
        if not all(map(all, products)) or tokens >= (self.ops.norms_in_tiles or tokens + 1):
            return None
        kernels = self.ops.kernels_of_layers(self.model.config, layers.kv_dtype_of(self.cache))
        return layers.tables_of(self.model, self.cache, products, kernels)

    def _product(self, tokens: int, weight):
        """The kernel that multiplies by one of layers.matrices_of; None where one kernel is not all of it."""
        if weight.kind == 'mixed':
            return None
        return (self.ops.experts_alone if weight.data.ndim == 3 else self.ops.product_alone)(tokens, weight)
