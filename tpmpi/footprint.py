"""What a rank will need of its device's memory, from the model file's facts alone: nothing is read, nothing allocated."""

from __future__ import annotations

from tpmpi.config import ModelConfig
from tpmpi.kv_cache import arrays_of, layer_groups, rings_blocks, rolling_tokens
from tpmpi.model_shard import view
from tpmpi.sharding import Shard, rank_rows, target_kind, tensor_specs
from tpmpi.weights import part_shapes

LOGIT_ROWS = 32  # prompt positions whose logits exist at once when the prompt is scored
LIBRARIES = 384 << 20  # bytes: cuBLAS' workspace, the kernels' code, a run of unpacked weights


def shard_bytes(reader, shard: Shard, weights: str | None = None, float16: bool = False) -> int:
    """Bytes of the matrices that a rank holds, each in the kind that load_model gives it.

    Vectors are not counted, nor how kernels fill up rows: together less than a hundredth.  reader, weights: load_model's;
    float16: sharding.target_kind's.
    """
    config = reader.config
    specs = {name: spec for name, spec in tensor_specs(config).items() if spec.is_matrix}
    kinds = {name: target_kind(spec, reader.kind(name), weights, float16) for name, spec in specs.items()}
    for layer in filter(config.has_experts, range(config.num_layers)):
        for parts in (('gate', 'up'), ('down',)):
            names = [f'layers/{layer}/experts/{i}/{part}' for i in range(config.num_experts) for part in parts]
            if len({kinds[name] for name in names}) > 1:  # one packed matrix holds all of them
                kinds |= dict.fromkeys(names, 'float32')
    return sum(_stored_bytes((len(rank_rows(spec, shard)), spec.shape[1]), kinds[name], spec.group_axis)
               for name, spec in specs.items())


def _stored_bytes(shape: tuple[int, int], kind: str, group_axis: int) -> int:
    return sum(rows * columns * dtype.itemsize for (rows, columns), dtype in part_shapes(shape, kind, group_axis).values())


def cache_bytes(config: ModelConfig, shard: Shard, context: int | None, chunk: int, block: int, kv_dtype: str,
                sinks: int = 0) -> int:
    """Bytes of a rank's cache for one request: of `context` tokens that roll on, or of one chunk where none is given."""
    groups = layer_groups([view(config.layer_window(i), context, sinks) for i in range(config.num_layers)])
    total = min(chunk, config.max_positions) if context is None else rolling_tokens(context, sinks, chunk, block)
    each = 2 * len(shard.kv_heads) * block * config.head_dim * (4 if kv_dtype == 'float32' else 2)
    return rings_blocks(groups, total, chunk, block) * arrays_of(groups) * each


def step_bytes(config: ModelConfig, shard: Shard, tokens: int) -> int:
    """Bytes that a step of so many tokens holds besides weights, cache and logits: an estimate, rather high than low."""
    q, kv = len(shard.heads) * config.head_dim, len(shard.kv_heads) * config.head_dim
    ffn = max(len(shard.ffn), config.experts_per_token * len(shard.expert_ffn) + len(shard.shared_ffn))
    numbers = 4 * config.hidden_size + 2 * (q + 2 * kv) + 2 * q + 3 * ffn  # of a token, float32
    return 4 * tokens * numbers


def workspace_bytes(config: ModelConfig, shard: Shard, chunk: int) -> int:
    """Bytes that steps of up to `chunk` tokens may take besides weights and cache."""
    return LIBRARIES + step_bytes(config, shard, chunk) + 4 * LOGIT_ROWS * len(shard.vocab)
