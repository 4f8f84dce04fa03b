"""The facts of an architecture, and the choices of a run.  All sizes are global: nothing here knows of ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu', 'identity')
NORMS = ('rms', 'none')
KV_DTYPES = ('float32', 'bfloat16')
DEVICES = ('auto', 'cpu', 'cuda')
WEIGHT_KINDS = ('float32', 'bfloat16', 'int8', 'int4')  # as weights.py has them, which needs NumPy
KERNELS = ('auto', 'cpu', 'reference')

VOCAB_BLOCK = 64  # rows of the vocabulary that stay together on a rank
LIMITS = {  # far above any real model: a hostile file must not make us allocate or loop for ever
    'vocab_size': 1 << 24, 'hidden_size': 1 << 20, 'num_layers': 1 << 14, 'num_heads': 1 << 14,
    'num_kv_heads': 1 << 14, 'head_dim': 1 << 14, 'ffn_size': 1 << 22, 'ffn_block': 1 << 22, 'max_positions': 1 << 40,
}


class ConfigError(ValueError):
    """A fact or a choice that is out of range or contradicts another one."""


def default_ffn_block(ffn_size: int) -> int:
    """Columns in one ffn block, the unit that the MLP is split by: 128, or 64 where 128 gives fewer than 16 blocks."""
    return 128 if ffn_size >= 16 * 128 else 64


@dataclass(frozen=True)
class ModelConfig:
    """What the model is, by facts and never by an architecture's name.

    The defaults describe a Llama.  `norm='none', residual=False, gated=False, rope_theta=None` is the diagram of the
    README taken literally.

    Raises ConfigError when a value is out of range or two values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # each serves num_heads / num_kv_heads consecutive query heads
    head_dim: int  # not always hidden_size / num_heads
    ffn_size: int  # columns of W^C
    max_positions: int  # context length that the model was trained for
    ffn_block: int = 0  # columns that are never divided between ranks; 0 becomes default_ffn_block(ffn_size)
    norm: str = 'rms'
    norm_eps: float = 1e-5
    residual: bool = True  # x + C and x + E; without: C and E alone
    activation: str = 'silu'
    gated: bool = True  # D = activation(A · gate) * (A · up); otherwise D = activation(A · up)
    parallel_block: bool = False  # attention and MLP read the same A, and C + E needs one all-reduce only
    rope_theta: float | None = 10000.0  # None: positions are not encoded
    tie_embeddings: bool = False  # the head is the embedding
    window: int | None = None  # sliding window of the attention, in positions; None: all of the context

    def __post_init__(self):
        if self.ffn_block == 0:
            object.__setattr__(self, 'ffn_block', default_ffn_block(self.ffn_size))
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit):
                raise ConfigError(f'model configuration: {name} is {value!r}; expected a whole number from 1 to {limit}')
        for name, kinds in (('norm', NORMS), ('activation', ACTIVATIONS)):
            if not (isinstance(getattr(self, name), str) and getattr(self, name) in kinds):
                raise ConfigError(f'model configuration: {name} is {getattr(self, name)!r}; known are {", ".join(kinds)}')
        for name in ('residual', 'gated', 'parallel_block', 'tie_embeddings'):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f'model configuration: {name} is {getattr(self, name)!r}; expected true or false')
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f'model configuration: {self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly')
        if self.ffn_block % 64 and self.ffn_block != self.ffn_size:
            raise ConfigError(f'model configuration: ffn_block is {self.ffn_block}; expected a multiple of 64')
        for name in ('norm_eps', 'rope_theta'):
            if not isinstance(getattr(self, name), (int, float, type(None))):
                raise ConfigError(f'model configuration: {name} is {getattr(self, name)!r}; expected a number')
        if not (self.norm_eps is not None and 0 <= self.norm_eps < 1):
            raise ConfigError(f'model configuration: norm_eps is {self.norm_eps!r}; expected a number from 0 to 1')
        if self.rope_theta is not None and not 1 < self.rope_theta < 1e30:
            raise ConfigError(f'model configuration: rope_theta is {self.rope_theta!r}; expected a number above 1, or none')
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f'model configuration: head_dim is {self.head_dim}; RoPE turns pairs and needs an even number')
        positions = range(1, LIMITS['max_positions'] + 1)
        if self.window is not None and not (isinstance(self.window, int) and self.window in positions):
            raise ConfigError(f'model configuration: window is {self.window!r}; expected at least 1 position, or none')

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_ffn_blocks(self) -> int:
        """Blocks of ffn columns; the last one may be short."""
        return -(-self.ffn_size // self.ffn_block)


@dataclass(frozen=True)
class RunConfig:
    """What a run chooses: none of it changes the model."""

    context: int | None = None  # positions that attention sees; None: as many as the request needs
    chunk: int = 512  # tokens that are computed at once
    block: int = 64  # positions in one block of the KV cache
    share_prefixes: bool = True  # prompts that begin alike share blocks of the cache
    kv_dtype: str = 'float32'  # of the KV cache
    device: str = 'auto'
    verify: bool = False  # check the file's checksums while loading
    weights: str | None = None  # kind of the matrices in memory; None: as in the file
    kernels: str = 'auto'  # cpu: compiled by Numba; reference: NumPy or CuPy; auto: cpu where there is Numba and no GPU
    activations: str = 'float32'  # bfloat16: rounded before they meet bfloat16 weights

    def __post_init__(self):
        for name, low, high in (('chunk', 1, 1 << 16), ('block', 1, 1 << 16)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f'{name} is {value}; expected {low} to {high}')
        if self.context is not None and self.context < 1:
            raise ConfigError(f'context is {self.context}; expected at least 1 position')
        for name, kinds in (('kv_dtype', KV_DTYPES), ('device', DEVICES), ('kernels', KERNELS), ('activations', KV_DTYPES),
                            ('weights', (None, *WEIGHT_KINDS))):
            if getattr(self, name) not in kinds:
                raise ConfigError(f'{name} is {getattr(self, name)!r}; expected one of {", ".join(kinds)}')


def model_config_from_dict(values: dict) -> ModelConfig:
    """A ModelConfig from stored facts.  Raises ConfigError for a fact that this version does not know, or one missing."""
    known = {f.name: f for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f'model configuration: unknown fact {unknown[0]!r}; a newer tpmpi may know it')
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise ConfigError(f'model configuration: {missing[0]} is missing')
    return ModelConfig(**values)
