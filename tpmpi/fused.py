"""model.all_layers on a CPU for steps of few tokens: all layers in one call of a compiled function, kernels/layers.py.

Where sums over the ranks need messages it is one call from each sum to the next.  Other steps, and layers of another kind, go
through all_layers.  The bits are the same either way, and so are the sums over the ranks: each rank decides for itself.
"""

from __future__ import annotations

import numpy as np

from tpmpi.kernels import alignment, elementwise, layers
from tpmpi.kernels.cpu import EVERYWHERE, bounds_of, rows_of, tables_of
from tpmpi.model import all_layers, embedded, norm
from tpmpi.shared_sums import ALONE

MOST_TOKENS = 64  # of more a layer takes so long that what Python takes is nothing, and the memory of all its parts would be much


class FusedLayers:
    """The layers of steps on one cache.  ops: kernels.cpu's."""

    def __init__(self, ops, model, cache):
        self.ops, self.model, self.cache = ops, model, cache
        alike = len({(layer.rope, layer.group) for layer in model.layers}) == 1
        self.possible = alike and layers.usual(model.config) and len(model.shard.heads) > 0
        self.tables: dict[int, layers.Tables | None] = {}  # by the number of tokens

    def __call__(self, step, model, cache, ops, comm):
        """Hidden states before the head, [tokens, hidden]; see model.all_layers."""
        tables, config = self._tables(len(step.tokens)), model.config
        if tables is None:
            return all_layers(step, model, cache, ops, comm)
        x, ropes = embedded(step, model, ops, comm)
        a = norm(x, model.first_norm, config, ops)  # A  [tokens, hidden]
        rope, group = model.layers[0].rope, model.layers[0].group
        segments, view = step.segments[group], model.groups[group]
        cos, sin = (x, x) if rope is None else rows_of(ropes[rope])
        numbers = np.array([segments[0].ring.block, EVERYWHERE if view.window is None else view.window, view.sinks,
                            len(model.shard.heads), config.head_dim, elementwise.ACTIVATIONS[config.activation], ops.threads,
                            ops.threads_of_rows(len(x))], np.int64)
        facts = (tables.matrices, tables.gains, tables.cache, tables.kernels, tables.shape, cos, sin, rope is not None,
                 step.slots[group], bounds_of(model.query_groups), *tables_of(segments), numbers, config.scores_scale,
                 config.attention_softcap or 0, config.norm_eps)

        def run(first, last, c, e, meeting, number=0):
            return tables.run(first, last, x, a, c, e, *facts, meeting.parts, meeting.rooms, meeting.flags, meeting.rank, number,
                              meeting.patience)

        def room_or(array):
            room = comm.room(x.shape)
            return array if room is None else room

        end, meeting = 2 * len(model.layers), ALONE if comm.size == 1 else comm.meeting(x.nbytes)
        in_rooms = meeting is not None and meeting.rooms.size > 0
        c, e = comm.shared.next_rooms(x.shape) if in_rooms else alignment.empty((2, *x.shape), np.float32)
        if meeting is not None:
            with comm.sums_within(end, x.nbytes) as (sums, number):  # C and E of each layer
                sums.seconds = 1e-9 * run(0, end + 1, c, e, meeting, number)
        else:
            for first in range(0, end, 2):
                c = room_or(c)
                run(first, first + 1, c, e, ALONE)  # C, this rank's part
                comm.all_reduce(c)  # C, whole
                e = room_or(e)
                run(first + 1, first + 2, c, e, ALONE)  # E, this rank's part
                comm.all_reduce(e)  # E, whole
            run(end, end + 1, c, e, ALONE)
        return a

    def _tables(self, tokens: int) -> layers.Tables | None:
        """For steps of so many tokens; None where one kernel is not all of an operation."""
        if tokens not in self.tables and self.possible and tokens <= MOST_TOKENS:
            products = [[self.ops.product_alone(tokens, dense.weight) for dense in layers.matrices_of(layer)]
                        for layer in self.model.layers]
            apart = not all(map(all, products)) or tokens >= (self.ops.norms_in_tiles or tokens + 1)
            kernels = self.ops.kernels_of_layers(self.model.config, layers.kv_dtype_of(self.cache))
            self.tables[tokens] = None if apart else layers.tables_of(self.model, self.cache, products, kernels)
        return self.tables.get(tokens)
