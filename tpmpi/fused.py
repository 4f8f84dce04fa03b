"""model.all_layers on a CPU for steps of few tokens: all layers in one call of a compiled function, kernels/layers.py.

Other steps, and layers of another kind, go through all_layers.  The bits are the same either way, and so are the sums over the
ranks: each rank decides for itself.
"""

from __future__ import annotations

import numpy as np

from tpmpi.kernels import elementwise, layers
from tpmpi.kernels.cpu import EVERYWHERE, bounds_of, rows_of, tables_of
from tpmpi.model import all_layers, embedded, norm
from tpmpi.shared_sums import ALONE, Meeting


class FusedLayers:
    """The layers of steps on one cache.  ops: kernels.cpu's."""

    def __init__(self, ops, model, cache):
        self.ops, self.model, self.cache = ops, model, cache
        alike = len({(layer.rope, layer.group) for layer in model.layers}) == 1
        self.possible = alike and layers.usual(model.config) and len(model.shard.heads) > 0
        self.tables: dict[int, layers.Tables | None] = {}  # by the number of tokens

    def __call__(self, step, model, cache, ops, comm):
        """Hidden states before the head, [tokens, hidden]; see model.all_layers."""
        tokens, config = len(step.tokens), model.config
        tables, meeting = self._tables(tokens), self._meeting(comm, 4 * tokens * config.hidden_size)
        if tables is None or meeting is None:
            return all_layers(step, model, cache, ops, comm)
        x, ropes = embedded(step, model, ops, comm)
        a = norm(x, model.first_norm, config, ops)  # A  [tokens, hidden]
        rope, group = model.layers[0].rope, model.layers[0].group
        segments, view = step.segments[group], model.groups[group]
        cos, sin = (x, x) if rope is None else rows_of(ropes[rope])
        numbers = np.array([segments[0].ring.block, EVERYWHERE if view.window is None else view.window, view.sinks,
                            len(model.shard.heads), config.head_dim, elementwise.ACTIVATIONS[config.activation], ops.threads,
                            ops.threads_of_rows(tokens)], np.int64)
        with comm.sums_within(2 * len(model.layers), x.nbytes) as (sums, number):  # C and E of each layer
            sums.seconds = 1e-9 * tables.run(
                x, a, tables.matrices, tables.gains, tables.cache, tables.kernels, tables.shape, cos, sin, rope is not None,
                step.slots[group], bounds_of(model.query_groups), *tables_of(segments), numbers, config.scores_scale,
                config.attention_softcap or 0, config.norm_eps, meeting.parts, meeting.rooms, meeting.flags, meeting.rank,
                number, meeting.patience)
        return a

    @staticmethod
    def _meeting(comm, nbytes: int) -> Meeting | None:
        """How sums of so many bytes are made in a kernel, None where they are not."""
        return ALONE if comm.size == 1 else comm.meeting(nbytes)

    def _tables(self, tokens: int) -> layers.Tables | None:
        """For steps of so many tokens; None where one kernel is not all of an operation."""
        if tokens not in self.tables and self.possible:
            products = [[self.ops.product_alone(tokens, dense.weight) for dense in layers.matrices_of(layer)]
                        for layer in self.model.layers]
            apart = not all(map(all, products)) or tokens >= (self.ops.norms_in_tiles or tokens + 1)
            kernels = self.ops.kernels_of_layers(self.model.config, layers.kv_dtype_of(self.cache))
            self.tables[tokens] = None if apart else layers.tables_of(self.model, self.cache, products, kernels)
        return self.tables.get(tokens)
