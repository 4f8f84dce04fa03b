"""The RoPE of a config.json, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Mapping

from tpmpi.formats import rope_scaling
from tpmpi.formats.families import number, short, truth, whole
from tpmpi.formats.source import FormatError

WHERE = 'config.json'
FULL, SLIDING = 'full_attention', 'sliding_attention'
NUMBERS = {  # of each type, besides rope_theta: what must be given, and what may be
    'default': ((), ()),
    'linear': (('factor',), ()),
    'dynamic': (('factor',), ()),
    'llama3': (('factor', 'low_freq_factor', 'high_freq_factor'), ()),
    'yarn': ((), ('factor', 'beta_fast', 'beta_slow', 'attention_factor', 'attn_factor', 'mscale', 'mscale_all_dim')),
    'longrope': ((), ('factor', 'attention_factor')),
}
OTHERS = {'llama3': {'original_max_position_embeddings'}, 'yarn': {'original_max_position_embeddings', 'truncate', 'finetuned'},
          'longrope': {'original_max_position_embeddings', 'short_factor', 'long_factor'}}


def read_rope(facts: Mapping, head_dim: int, kinds: tuple[str, ...] = tuple(NUMBERS), partial: str = '', theta: str = 'rope_theta'
              ) -> dict:
    """Keyword arguments of ModelConfig, `max_positions` among them.

    As in transformers, `rope_scaling` stands for `rope_parameters` where both are given, and a value inside goes before
    the one beside.  theta, partial: the keys of these; without `partial` the architecture turns whole heads only.
    """
    key = 'rope_scaling' if facts['rope_scaling'] else 'rope_parameters'
    inner = as_object(facts[key], key)
    inner = {'rope_theta': facts[theta], 'partial_rotary_factor': facts[partial] if partial else 1.0} | inner
    share = inner.pop('partial_rotary_factor')
    share = number({'partial_rotary_factor': share}, 'partial_rotary_factor', WHERE)
    if share != 1.0 and not partial or not 0 < share <= 1:
        expected = 'a number above 0, at most 1' if partial else '1.0: this architecture turns whole heads'
        raise FormatError(f'{WHERE}: {partial or "partial_rotary_factor"} is {short(share)}; expected {expected}')
    dim = int(head_dim * share)
    if not dim:
        raise FormatError(f'{WHERE}: {partial} is {short(share)}, none of {head_dim} dimensions; expected a larger number')
    return {'rotary_dim': dim % head_dim} | scaled(inner, key, dim, facts, kinds)


def read_nested_rope(facts: Mapping, head_dim: int, local_theta: str, keep_length: bool) -> dict:
    """The same of an architecture whose layers with a window have a RoPE of their own, which is never stretched."""
    both = as_object(facts['rope_parameters'], 'rope_parameters')
    unknown = [name for name in both if name not in (FULL, SLIDING)]
    if unknown:
        raise FormatError(f'{WHERE}: rope_parameters holds {short(unknown[0])}; expected {FULL!r} and {SLIDING!r}')
    full, local = (as_object(both.get(name), name) for name in (FULL, SLIDING))
    full = {'rope_theta': facts['rope_theta']} | full | as_object(facts['rope_scaling'], 'rope_scaling')
    if not truth({'truncate': full.get('truncate', True)}, 'truncate', WHERE):
        raise FormatError(f'{WHERE}: truncate is False; transformers does not read it of {FULL!r}')
    local = {'rope_theta': facts[local_theta]} | local
    values = scaled(dict(full), f'rope_parameters of {FULL}', head_dim, facts, tuple(NUMBERS))
    if keep_length:
        values['max_positions'] = whole(facts, 'max_position_embeddings', WHERE)
    if local == full:
        return values
    plain = scaled(local, f'rope_parameters of {SLIDING}', head_dim, facts, ('default',))
    return values | {'local_rope_theta': plain['rope_theta']}


def as_object(value, key: str) -> dict:
    """A copy of an object in config.json; null is an empty one."""
    if not isinstance(value or {}, dict):
        raise FormatError(f'{WHERE}: {key} is {short(value)}; expected null or an object')
    return dict(value or {})


def kind_of(inner: dict, key: str, kinds: tuple[str, ...]) -> tuple[str, dict]:
    """The type of RoPE, and the rest."""
    older = inner.pop('type', None)
    kind = inner.pop('rope_type', None) or older or 'default'
    if kind not in kinds:
        raise FormatError(f'{WHERE}: {key} asks for RoPE of type {short(kind)}; supported is {", ".join(kinds)}')
    return kind, inner


def scaled(inner: dict, key: str, dim: int, facts: Mapping, kinds: tuple[str, ...]) -> dict:
    """theta, and what stretches RoPE."""
    kind, inner = kind_of(inner, key, kinds + (('su',) if kinds == PHI3 else ()))
    if kinds == PHI3 and kind in ('su', 'yarn'):
        kind = 'longrope'
    needed, optional = NUMBERS[kind]
    for name in inner:
        if name not in ('rope_theta', *needed, *optional, *OTHERS.get(kind, ())):
            raise FormatError(f'{WHERE}: {key} holds {short(name)}; tpmpi does not know what it means for RoPE of type {kind}')
    for name in needed:
        if name not in inner:
            raise FormatError(f'{WHERE}: {key} has no {name}, which RoPE of type {kind} needs')
    values = {name: None if inner.get(name) is None and name in optional else number(inner, name, WHERE)
              for name in (*needed, *optional)}
    theta, length = number(inner, 'rope_theta', WHERE), whole(facts, 'max_position_embeddings', WHERE)
    if not theta > 1 or not 1 <= (values.get('factor') or 1) < 1e6:
        raise FormatError(f'{WHERE}: {key} has the rope_theta {theta} and the factor {values.get("factor")}; '
                          'expected more than 1, and 1 or more, below 1e6')
    original = facts.get('original_max_position_embeddings') or inner.get('original_max_position_embeddings', length)
    original = whole({'original_max_position_embeddings': original}, 'original_max_position_embeddings', WHERE)
    if kind in OTHERS and not original > 1:
        raise FormatError(f'{WHERE}: original_max_position_embeddings is {original}; expected more than 1')
    found = {'rope_theta': theta, 'max_positions': length}
    if kind == 'linear':
        return found | rope_scaling.linear(dim, length, **values)
    if kind == 'dynamic':
        return found | rope_scaling.dynamic(length, **values)
    if kind == 'llama3':
        if not values['high_freq_factor'] > values['low_freq_factor']:
            raise FormatError(f'{WHERE}: {key} has a high_freq_factor that is not above low_freq_factor')
        return found | rope_scaling.llama3(theta, dim, original=original, **values)
    if kind == 'yarn':
        return found | read_yarn(inner, values, theta, dim, length, original)
    if kind == 'longrope':
        return found | rope_scaling.longrope(
            length, original, *(pair_factors(inner, name, dim) for name in ('short_factor', 'long_factor')), values['factor'],
            values['attention_factor'])
    return found


def read_yarn(inner: Mapping, values: Mapping, theta: float, dim: int, length: int, original: int) -> dict:
    """YaRN with the defaults of transformers, where 0 counts as none.

    attn_factor multiplies the magnitude, as its authors (DeepSeek-R1-0528-Qwen3-8B), vLLM and SGLang mean it; transformers
    does not read it.
    """
    factor = length / original if values['factor'] is None else values['factor']
    magnitude = values['attention_factor']
    if magnitude is None and values['mscale'] and values['mscale_all_dim']:
        magnitude, over = (rope_scaling.yarn_magnitude(factor, values[name]) for name in ('mscale', 'mscale_all_dim'))
        if not over > 0:
            raise FormatError(f'{WHERE}: mscale_all_dim is {values["mscale_all_dim"]}, which makes a magnitude of {over}; '
                              'expected one above 0')
        magnitude /= over
    if values['attn_factor'] is not None:
        magnitude = values['attn_factor'] * (rope_scaling.yarn_magnitude(factor) if magnitude is None else magnitude)
    truncate = truth({'truncate': inner.get('truncate', True)}, 'truncate', WHERE)
    fast, slow = values['beta_fast'] or 32.0, values['beta_slow'] or 1.0
    if not (fast > 0 and slow > 0):
        raise FormatError(f'{WHERE}: beta_fast and beta_slow are {fast} and {slow}; expected numbers above 0')
    return rope_scaling.yarn(theta, dim, length, factor, original, fast, slow, truncate, magnitude)


def pair_factors(inner: Mapping, key: str, dim: int) -> list[float]:
    """A list of numbers, one for each pair."""
    factors = inner.get(key)
    if not isinstance(factors, list) or len(factors) != dim // 2:
        raise FormatError(f'{WHERE}: {key} is {short(factors)}; expected {dim // 2} numbers, one for each pair that RoPE turns')
    return [number({key: factor}, key, WHERE) for factor in factors]


PHI3 = ('default', 'longrope', 'yarn')  # where yarn is another name of longrope
