"""The facts of an architecture, and the choices of a run.  All sizes are global: nothing here knows of ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu', 'identity')
NORMS = ('rms', 'layer', 'none')
QK_NORMS = ('none', 'head', 'all')
KV_DTYPES = ('float32', 'bfloat16')
ACTIVATION_DTYPES = ('float32', 'bfloat16', 'int8')
DEVICES = ('auto', 'cpu', 'cuda')
COLLECTIVES = ('auto', 'mpi', 'staged', 'nccl')
CUDA_GRAPHS = ('auto', 'off')
STORED_KINDS = ('float32', 'bfloat16', 'float16', 'int8', 'int4')  # as weights.py has them, which needs NumPy
KERNELS = ('auto', 'cpu', 'reference')

VOCAB_BLOCK = 64  # rows of the vocabulary that stay together on a rank
LIMITS = {  # far above any real model: a hostile file must not make us allocate or loop for ever
    'vocab_size': 1 << 24, 'hidden_size': 1 << 20, 'num_layers': 1 << 14, 'num_heads': 1 << 14,
    'num_kv_heads': 1 << 14, 'head_dim': 1 << 14, 'ffn_size': 1 << 22, 'ffn_block': 1 << 22, 'max_positions': 1 << 40,
}
LIMITS_FROM_0 = {  # where 0 says that the model has none
    'rotary_dim': 1 << 14, 'rope_original_positions': 1 << 40, 'query_growth_positions': 1 << 40,
    'learned_positions': 1 << 24, 'num_experts': 1 << 14, 'experts_per_token': 1 << 14, 'expert_ffn_size': 1 << 22,
    'shared_ffn_size': 1 << 22,
}


class ConfigError(ValueError):
    """A fact or a choice that is out of range or contradicts another one."""


def is_number(value) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def default_ffn_block(ffn_size: int) -> int:
    """Columns in one ffn block, the unit that the MLP is split by: 128, or 64 where 128 gives fewer than 16 blocks."""
    return 128 if ffn_size >= 16 * 128 else 64


@dataclass(frozen=True)
class Rope:
    """How positions turn the pairs of a head (Su et al. 2021), and how that is stretched for longer texts."""

    theta: float
    dim: int  # numbers of a head that are turned, the first ones
    divisors: tuple[float, ...] = ()  # of the frequency of each pair; (): all 1
    long_divisors: tuple[float, ...] = ()  # for texts longer than original_positions; (): the same
    original_positions: int = 0
    magnitude: float = 1.0  # of the turned numbers
    dynamic_factor: float = 1.0  # above 1: theta grows with the length of a text beyond original_positions

    @property
    def by_length(self) -> bool:
        """Whether a position's angle depends on how long the text is."""
        return bool(self.long_divisors) or self.dynamic_factor > 1


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
    max_positions: int  # context length that the model was trained for, or that its stretched RoPE covers
    ffn_block: int = 0  # columns that are never divided between ranks; 0 becomes default_ffn_block(ffn_size)
    norm: str = 'rms'
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pre_norm: bool = True  # A = norm(x); without: x itself
    post_norm: bool = False  # x + norm(C) and x + norm(E)
    qk_norm: str = 'none'  # of Q and K before RoPE: over each head by itself, or over all heads of all ranks together
    qk_norm_bias: bool = False
    residual: bool = True  # x + C and x + E; without: C and E alone
    activation: str = 'silu'
    gated: bool = True  # D = activation(A · gate) * (A · up); otherwise D = activation(A · up)
    parallel_block: bool = False  # attention and MLP read the same x, and C + E needs one all-reduce only
    parallel_mlp_norm: bool = False  # in such a block the MLP has a norm of its own
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    rope_theta: float | None = 10000.0  # None: no layer has RoPE
    rotary_dim: int = 0  # see Rope, and so the next five; 0: all of head_dim
    rope_divisors: tuple[float, ...] = ()
    rope_long_divisors: tuple[float, ...] = ()
    rope_original_positions: int = 0
    rope_magnitude: float = 1.0
    rope_dynamic_factor: float = 1.0
    local_rope_theta: float | None = None  # of layers with a window, whose RoPE is not stretched then; None: as in all others
    nope_layers: tuple[int, ...] = ()  # layers without RoPE
    learned_positions: int = 0  # rows of the table of position embeddings; 0: there is none
    tie_embeddings: bool = False  # the head is the embedding
    window: int | None = None  # sliding window of the attention, in positions; None: all of the context
    window_layers: tuple[int, ...] | None = None  # layers that look through the window; None: all
    attention_scale: float | None = None  # of Q K^T; None: 1 / sqrt(head_dim)
    query_growth: float = 0.0  # Q times 1 + growth * ln(1 + floor(position / query_growth_positions))
    query_growth_positions: int = 0
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of C and E
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    num_experts: int = 0  # mixture of experts: each layer's MLP is so many smaller ones; 0: none
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalize_experts: bool = False  # the weights of a token's experts add up to 1
    shared_ffn_size: int = 0  # columns of an expert that serves every token
    shared_gate: bool = False  # sigmoid(x · its gate) multiplies what the shared expert gives
    dense_layers: tuple[int, ...] = ()  # layers with one MLP of ffn_size where others have experts

    def __post_init__(self):
        if self.ffn_block == 0:
            object.__setattr__(self, 'ffn_block', default_ffn_block(self.ffn_size))
        self._check_types()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f'model configuration: {self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly')
        if self.ffn_block % 64 and self.ffn_block != self.ffn_size:
            raise ConfigError(f'model configuration: ffn_block is {self.ffn_block}; expected a multiple of 64')
        if not 0 <= self.norm_eps < 1:
            raise ConfigError(f'model configuration: norm_eps is {self.norm_eps!r}; expected a number from 0 to 1')
        self._check_positions()
        if self.parallel_block and (self.post_norm or self.num_experts):
            raise ConfigError('model configuration: a parallel block has neither post_norm nor experts')
        if self.num_experts and self.mlp_bias:
            raise ConfigError('model configuration: mlp_bias with experts; theirs have none')
        over_all = self.qk_norm == 'all' and (self.norm != 'rms' or self.qk_norm_bias)
        if self.qk_norm != 'none' and self.norm == 'none' or over_all:
            raise ConfigError(f'model configuration: qk_norm is {self.qk_norm!r}, qk_norm_bias {self.qk_norm_bias}, norm '
                              f'{self.norm!r}; a norm over all heads is an RMS norm without bias')
        if self.num_experts and not (1 <= self.experts_per_token <= self.num_experts and self.expert_ffn_size and self.gated):
            raise ConfigError(f'model configuration: {self.experts_per_token} of {self.num_experts} experts of '
                              f'{self.expert_ffn_size} columns, gated {self.gated}; expected 1 to {self.num_experts} gated ones')

    def _check_types(self) -> None:
        """Each fact by itself."""
        def refuse(name, expected):
            raise ConfigError(f'model configuration: {name} is {getattr(self, name)!r}; expected {expected}')

        for limits, low in ((LIMITS, 1), (LIMITS_FROM_0, 0)):
            for name, limit in limits.items():
                value = getattr(self, name)
                if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= limit):
                    refuse(name, f'a whole number from {low} to {limit}')
        for name, kinds in (('norm', NORMS), ('qk_norm', QK_NORMS), ('activation', ACTIVATIONS)):
            if not (isinstance(getattr(self, name), str) and getattr(self, name) in kinds):
                raise ConfigError(f'model configuration: {name} is {getattr(self, name)!r}; known are {", ".join(kinds)}')
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == 'bool' and not isinstance(value, bool):
                refuse(f.name, 'true or false')
            if f.type.startswith('float') and not (value is None and f.type == 'float | None' or is_number(value)):
                refuse(f.name, 'a number')
            if f.type.startswith('tuple[int') and not (value is None and f.type.endswith('None') or (
                    isinstance(value, tuple) and all(isinstance(i, int) and 0 <= i < self.num_layers for i in value))):
                refuse(f.name, f'numbers of layers from 0 to {self.num_layers - 1}')
            if f.type.startswith('tuple[float') and not (isinstance(value, tuple) and all(map(is_number, value))):
                refuse(f.name, 'numbers')
        for name in ('attention_scale', 'attention_softcap', 'logit_softcap', 'rope_magnitude'):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                refuse(name, 'a number above 0')

    def _check_positions(self) -> None:
        """RoPE and windows."""
        for name in ('rope_theta', 'local_rope_theta'):
            theta = getattr(self, name)
            if theta is not None and not 1 < theta < 1e30:
                raise ConfigError(f'model configuration: {name} is {theta!r}; expected a number above 1, or none')
        turned = self.rotary_dim or self.head_dim
        if self.rope_theta is not None and (turned % 2 or turned > self.head_dim):
            raise ConfigError(f'model configuration: head_dim is {self.head_dim}, of which RoPE turns {turned}; '
                              'it turns pairs and needs an even number')
        for name in ('rope_divisors', 'rope_long_divisors'):
            divisors = getattr(self, name)
            if divisors and not (len(divisors) == turned // 2 and min(divisors) > 0):
                raise ConfigError(f'model configuration: {name} has {len(divisors)} numbers; expected one above 0 for each of '
                                  f'{turned // 2} pairs')
        if not 1 <= self.rope_dynamic_factor < 1e6:
            raise ConfigError(f'model configuration: rope_dynamic_factor is {self.rope_dynamic_factor}; expected 1 or more')
        if self.rope_dynamic_factor > 1 and (self.rotary_dim or self.head_dim) <= 2:
            raise ConfigError(f'model configuration: rope_dynamic_factor is {self.rope_dynamic_factor} for '
                              f'{self.rotary_dim or self.head_dim} dimensions; expected more of them, or a factor of 1')
        if (self.rope_long_divisors or self.rope_dynamic_factor > 1) and not self.rope_original_positions:
            raise ConfigError('model configuration: rope_original_positions is 0; this RoPE needs them')
        if not 0 <= self.query_growth < 1e6 or self.query_growth and not self.query_growth_positions:
            raise ConfigError(f'model configuration: query_growth is {self.query_growth}, query_growth_positions '
                              f'{self.query_growth_positions}; expected a number from 0 to 1e6, and its positions')
        if self.learned_positions and self.learned_positions < self.max_positions:
            raise ConfigError(f'model configuration: {self.learned_positions} learned positions are fewer than max_positions '
                              f'{self.max_positions}')
        positions = range(1, LIMITS['max_positions'] + 1)
        if self.window is not None and not (isinstance(self.window, int) and self.window in positions):
            raise ConfigError(f'model configuration: window is {self.window!r}; expected at least 1 position, or none')
        if self.window is None and self.window_layers is not None:
            raise ConfigError('model configuration: window_layers without a window')

    @property
    def num_ffn_blocks(self) -> int:
        """Blocks of ffn columns; the last one may be short."""
        return -(-self.ffn_size // self.ffn_block)

    def layer_window(self, layer: int) -> int | None:
        """How far a layer looks back, in positions; None: all of the context."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    def layer_rope(self, layer: int) -> Rope | None:
        """The RoPE of a layer; None: it has none."""
        if self.rope_theta is None or layer in self.nope_layers:
            return None
        dim = self.rotary_dim or self.head_dim
        if self.local_rope_theta is not None and self.layer_window(layer) is not None:
            return Rope(self.local_rope_theta, dim)
        return Rope(self.rope_theta, dim, self.rope_divisors, self.rope_long_divisors, self.rope_original_positions,
                    self.rope_magnitude, self.rope_dynamic_factor)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def scores_scale(self) -> float:
        """What Q K^T is multiplied by."""
        return self.head_dim ** -0.5 if self.attention_scale is None else self.attention_scale

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads



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
    kernels: str = 'auto'  # cpu: compiled by Numba; reference: NumPy; auto: a GPU's own, else cpu where there is Numba
    activations: str = 'float32'  # what they may be rounded to for such weights
    sinks: int = 0  # first tokens that attention sees besides the context
    collective: str = 'auto'  # how an all-reduce is carried: see shared_sums.py, and collectives.py for GPUs
    share_gpu: bool = False  # several ranks may compute on one GPU
    cuda_graphs: str = 'auto'  # steps of decode by graphs where these can be captured; off: never

    def __post_init__(self):
        for name, low, high in (('chunk', 1, 1 << 16), ('block', 1, 1 << 16)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f'{name} is {value}; expected {low} to {high}')
        if self.context is not None and self.context < 1:
            raise ConfigError(f'context is {self.context}; expected at least 1 position')
        if not 0 <= self.sinks <= 1 << 16:
            raise ConfigError(f'sinks is {self.sinks}; expected 0 to {1 << 16} tokens')
        if self.sinks and self.context is None:
            raise ConfigError(f'sinks is {self.sinks}; they need a context that rolls (--context N)')
        for name, kinds in (('kv_dtype', KV_DTYPES), ('device', DEVICES), ('kernels', KERNELS),
                            ('activations', ACTIVATION_DTYPES), ('collective', COLLECTIVES), ('weights', (None, *STORED_KINDS)),
                            ('cuda_graphs', CUDA_GRAPHS)):
            if getattr(self, name) not in kinds:
                raise ConfigError(f'{name} is {getattr(self, name)!r}; expected one of {", ".join(filter(None, kinds))}')


def facts_of(config: ModelConfig) -> dict:
    """The facts as a file stores them; none is a word."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: 'none' if value is None else value for name, value in values.items()}


def model_config_from_dict(values: dict) -> ModelConfig:
    """A ModelConfig from stored facts.  Raises ConfigError for a fact that this version does not know, or one missing."""
    known = {f.name: f for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f'model configuration: unknown fact {unknown[0]!r}; a newer tpmpi may know it')
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise ConfigError(f'model configuration: {missing[0]} is missing')
    facts = {}
    for name, value in values.items():
        optional, several = known[name].type.endswith('None'), known[name].type.startswith('tuple')
        facts[name] = None if optional and value == 'none' else tuple(value) if several and isinstance(value, list) else value
    return ModelConfig(**facts)
