"""RoPE in GGUF: its keys, and the tensors that stretch it, as numbers for each pair.

llama.cpp turns pair i by position * theta^(-2i/dim) / (factor of the pair) / (scaling factor), or, for YaRN, by a mixture of
that and of the angle that is not scaled (ggml/src/ggml-cpu/ops.cpp, rope_yarn).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from tpmpi.formats import rope_scaling
from tpmpi.formats.families import number, short, whole
from tpmpi.formats.source import FormatError, TensorSource, describe

ROPE_KEYS = {
    'rope.dimension_count': None, 'rope.freq_base': 10000.0, 'rope.scaling.type': 'linear', 'rope.scaling.factor': None,
    'rope.scale_linear': 0.0, 'rope.scaling.original_context_length': None, 'rope.scaling.attn_factor': 1.0,
    'rope.scaling.yarn_beta_fast': 32.0, 'rope.scaling.yarn_beta_slow': 1.0, 'rope.scaling.yarn_attn_factor': None,
    'rope.scaling.yarn_log_multiplier': 0.0}
ROPE_FIXED = {'rope.scaling.finetuned': (False, True), 'rope.scaling.yarn_ext_factor': (1.0,)}
SCALINGS = ('none', 'linear', 'yarn', 'longrope')
FACTORS, SHORT, LONG = 'rope_freqs.weight', 'rope_factors_short.weight', 'rope_factors_long.weight'
ROPE_TENSORS = re.compile('|'.join(map(re.escape, (FACTORS, SHORT, LONG))))


def rope_facts(keys: dict, found: Mapping[str, TensorSource], facts: dict, where: str) -> dict:
    """Facts of ModelConfig about RoPE, of the keys and of these facts known so far."""
    dim = facts['head_dim'] if keys['rope.dimension_count'] is None else whole(keys, 'rope.dimension_count', where)
    if not 0 < dim <= facts['head_dim'] or dim % 2:
        raise FormatError(
            f'{where}: rope.dimension_count is {dim}; expected an even number up to the head size {facts["head_dim"]}')
    kind, context = keys['rope.scaling.type'], facts['max_positions']
    if kind not in SCALINGS:
        raise FormatError(f'{where}: rope.scaling.type is {short(kind)}; supported are {", ".join(SCALINGS)}')
    given = 'rope.scale_linear' if keys['rope.scaling.factor'] is None else 'rope.scaling.factor'
    factor = 1.0 if kind == 'none' else number(keys, given, where) or 1.0
    original = context
    if keys['rope.scaling.original_context_length'] is not None:
        original = whole(keys, 'rope.scaling.original_context_length', where)
    theta, magnitude = number(keys, 'rope.freq_base', where), number(keys, 'rope.scaling.attn_factor', where)
    result = {'rope_theta': theta, 'rotary_dim': dim % facts['head_dim']}
    if not (factor > 0 and original > 0 and theta > 1):
        raise FormatError(f'{where}: RoPE of base {theta} is scaled by {factor} from {original} positions; expected a base '
                          'above 1 and numbers above 0')
    if SHORT in found or LONG in found or kind == 'longrope':
        if factor != 1:
            raise FormatError(f'{where}: {given} is {factor} beside a factor for each pair; supported is one of both only')
        short_factors, long_factors = (pair_factors(found, name, dim) for name in (SHORT, LONG))
        result |= {'rope_divisors': short_factors, 'rope_long_divisors': long_factors, 'rope_original_positions': original}
        return result | {'rope_magnitude': magnitude}
    scaled = {}
    if kind == 'yarn':
        fast, slow = (number(keys, f'rope.scaling.yarn_beta_{name}', where) for name in ('fast', 'slow'))
        if not (fast > 0 and slow > 0):
            raise FormatError(f'{where}: rope.scaling.yarn_beta_fast and _slow are {fast} and {slow}; expected numbers above 0')
        scaled = rope_scaling.yarn(
            theta, dim, context, factor, original, fast, slow, magnitude=magnitude * yarn_magnitude(keys, factor, where))
    elif factor != 1:
        scaled = rope_scaling.linear(dim, context, factor)
    if FACTORS in found:
        before = scaled.get('rope_divisors', (1.0,) * (dim // 2))
        scaled['rope_divisors'] = tuple(a * b for a, b in zip(before, pair_factors(found, FACTORS, dim), strict=True))
    return result | {'rope_magnitude': magnitude} | scaled


def pair_factors(found: Mapping[str, TensorSource], name: str, dim: int) -> tuple[float, ...]:
    """What divides the frequency of each pair, from a tensor."""
    if name not in found:
        raise FormatError(f'GGUF tensors: {name} is missing; RoPE is scaled by a factor for each pair')
    source = found[name]
    if source.shape != (dim // 2,):
        raise FormatError(f'{source.origin} has the shape {describe(source.shape)}; RoPE turns {dim // 2} pairs')
    values = tuple(float(value) for value in source.read())
    if not all(0 < value < math.inf for value in values):
        raise FormatError(f'{source.origin} holds a factor that is no number above 0')
    return values


def yarn_magnitude(keys: dict, factor: float, where: str) -> float:
    """1 + ln(factor) / 10, divided by the same with yarn_log_multiplier (transformers' mscale_all_dim) before the logarithm.

    yarn_attn_factor, which llama.cpp does not read for these architectures, may say the same only.
    """
    over = number(keys, 'rope.scaling.yarn_log_multiplier', where)
    divisor = rope_scaling.yarn_magnitude(factor, over)  # 1 where over is 0
    if not divisor > 0:
        raise FormatError(f'{where}: rope.scaling.yarn_log_multiplier is {over}, which makes a magnitude of {divisor}; expected '
                          'one above 0')
    magnitude = rope_scaling.yarn_magnitude(factor) / divisor
    given = keys['rope.scaling.yarn_attn_factor']
    if given is not None and not math.isclose(number(keys, 'rope.scaling.yarn_attn_factor', where), magnitude, rel_tol=1e-4):
        raise FormatError(f'{where}: rope.scaling.yarn_attn_factor is {short(given)}; supported is {magnitude:.6g}, what follows '
                          'from the factor')
    return magnitude
