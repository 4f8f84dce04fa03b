"""What every table of architectures is made of: the meaning of keys, and where each of our tensors comes from.

A key that changes the result is read (`facts`), or has the one value that this code computes (`fixed`); a key that
does not is neutral; any other key is refused by name, because guessing its meaning would give fluent but wrong text.
In the same way every tensor of a checkpoint is used, or is known to hold nothing new.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.formats import views
from tpmpi.formats.source import FormatError, TensorSource, describe
from tpmpi.sharding import tensor_specs


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours stands."""

    config: ModelConfig
    layer: int = 0
    expert: int = 0


Change = Callable[[TensorSource, Place], TensorSource]


@dataclass(frozen=True)
class Taken:
    """A tensor of ours that is not simply one of theirs: the changes are made one after the other.

    name: theirs, with {} for the layer's and a second {} for the expert's number.
    parts: theirs are so many, which are joined along their rows before anything else; {part} counts them.
    """

    name: str
    changes: tuple[Change, ...] = ()
    parts: Callable[[ModelConfig], int] | None = None

    def names(self, place: Place) -> list[str]:
        count = 1 if self.parts is None else self.parts(place.config)
        return [self.name.format(place.layer, place.expert, part=i) for i in range(count)]


@dataclass(frozen=True)
class Family:
    """How one architecture of a format maps to ours."""

    facts: Mapping[str, object]  # key: what it is where the file leaves it out; REQUIRED where nothing can be assumed
    fixed: Mapping[str, tuple]  # key: the values that mean what this code computes
    neutral: frozenset[str]  # keys without influence on the result
    config: Callable[[dict], ModelConfig]  # from the facts, defaults filled in
    # our name without 'layers/' and numbers: theirs, or what is taken of theirs; a bias need not be named where theirs is
    # called as its matrix is
    tensors: Mapping[str, str | Taken]
    ignored_tensors: re.Pattern  # tensors that hold nothing that the configuration does not say
    bos: int | None = None  # ids where the file names none
    eos: int | None = None
    tidy: Callable[[dict[str, TensorSource]], dict[str, TensorSource]] = dict  # one name for what files call in several ways


REQUIRED = object()
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


# ---- keys


def read_facts(values: Mapping[str, object], family: Family, neutral: Callable[[str], bool], where: str) -> dict:
    """The facts among `values`, each key checked.  Raises FormatError for a key or value that is not understood."""
    for key, value in values.items():
        if key in family.facts or key in family.neutral or neutral(key):
            continue
        if key not in family.fixed:
            raise FormatError(
                f'{where}: unknown key {key!r} (value {short(value)}); '
                'tpmpi does not know what it means for the result')
        if not any(value is known or (type(value) is type(known) and value == known) for known in family.fixed[key]):
            raise FormatError(
                f'{where}: {key} is {short(value)}; supported is {" or ".join(map(short, family.fixed[key]))} only')
    facts = {}
    for key, default in family.facts.items():
        facts[key] = values.get(key, default)
        if facts[key] is REQUIRED:
            raise FormatError(f'{where}: {key} is missing')
    return facts


def short(value) -> str:
    """A value for a message, however long or deep a hostile file makes it."""
    return SHORT.repr(value)


def whole(facts: Mapping, key: str, where: str) -> int:
    """A fact that must be a whole number, and one that a float can be made of."""
    value = facts[key]
    if not isinstance(value, int) or isinstance(value, bool) or not abs(value) < 1 << 62:
        raise FormatError(f'{where}: {key} is {short(value)}; expected a whole number of less than 63 bits')
    return value


def number(facts: Mapping, key: str, where: str) -> float:
    """A fact that must be a finite number."""
    value = facts[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise FormatError(f'{where}: {key} is {short(value)}; expected a number')
    return float(value)


def truth(facts: Mapping, key: str, where: str) -> bool:
    """A fact that must be true or false."""
    value = facts[key]
    if not isinstance(value, bool):
        raise FormatError(f'{where}: {key} is {short(value)}; expected true or false')
    return value


# ---- tensors


def match_tensors(config: ModelConfig, found: Mapping[str, TensorSource], family: Family, where: str) -> dict[str, TensorSource]:
    """The tensors of a model by our names, of those `found` by theirs; `where` names the checkpoint.  Reads none.

    Raises FormatError when a tensor is missing, has another shape, or has no place in the model.
    """
    tensors, used = {}, set()
    for spec in tensor_specs(config).values():
        taken, place = origin_of(spec.name, config, family.tensors)
        expected = spec.shape[::-1] if spec.transposed else spec.shape
        names = taken.names(place)
        for name in names:
            if name not in found:
                raise FormatError(f'{where}: tensor {name} is missing; the configuration asks for {describe(expected)}')
        source = found[names[0]] if taken.parts is None else views.joined([found[name] for name in names])
        for change in taken.changes:
            source = change(source, place)
        if source.shape != expected:
            raise FormatError(
                f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for {describe(expected)}')
        tensors[spec.name] = source
        used.update(names)
    extra = sorted(name for name in found if name not in used and not family.ignored_tensors.fullmatch(name))
    if extra:
        raise FormatError(
            f'{found[extra[0]].origin} ({describe(found[extra[0]].shape)}) has no place in this architecture'
            + (f', nor have {len(extra) - 1} other tensors' if len(extra) > 1 else '')
            + '; leaving it out would change the result')
    return tensors


def origin_of(name: str, config: ModelConfig, table: Mapping[str, str | Taken]) -> tuple[Taken, Place]:
    """Where a tensor of ours comes from."""
    layer, expert = re.match(r'layers/(\d+)/', name), re.search(r'/experts/(\d+)/', name)
    place = Place(config, int(layer[1]) if layer else 0, int(expert[1]) if expert else 0)
    key = re.sub(r'^layers/\d+/|(?<=experts/)\d+/', '', name)
    taken = table.get(key)
    if taken is None and key.endswith('_bias'):
        taken = bias_of(as_taken(table[key.removesuffix('_bias')]))
    if taken is None:
        raise AssertionError(f'the table has no {key}')
    return as_taken(taken), place


def as_taken(entry: str | Taken) -> Taken:
    return Taken(entry) if isinstance(entry, str) else entry


def bias_of(taken: Taken) -> Taken:
    """A bias that is called as its matrix or gain is, and changed as that is."""
    return Taken(taken.name.removesuffix('.weight') + '.bias', taken.changes, taken.parts)


# ---- changes


def transposed(source: TensorSource, place: Place) -> TensorSource:
    """Stored [in, out]."""
    return views.transposed(source)


def plus_one(source: TensorSource, place: Place) -> TensorSource:
    """A gain that is stored as what it is more than one."""
    return views.mapped(source, lambda gain: gain + np.float32(1))


def flat(source: TensorSource, place: Place) -> TensorSource:
    """[heads, head_dim] -> [heads * head_dim]."""
    return views.reshaped(source, (int(np.prod(source.shape, dtype=np.int64)),))


def for_each_head(source: TensorSource, place: Place) -> TensorSource:
    """A gain or bias [head_dim] that all query heads share."""
    return views.tiled(source, place.config.num_heads)


def for_each_kv_head(source: TensorSource, place: Place) -> TensorSource:
    """A gain or bias [head_dim] that all KV heads share."""
    return views.tiled(source, place.config.num_kv_heads)


def expert(source: TensorSource, place: Place) -> TensorSource:
    """The expert's own matrix in a stack of all."""
    if source.shape[:1] != (place.config.num_experts,):
        raise FormatError(f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for '
                          f'{place.config.num_experts} experts')
    return views.element(source, place.expert)


def part(number: int, count: int = 2) -> Change:
    """One of `count` equal runs of rows."""
    def change(source: TensorSource, place: Place) -> TensorSource:
        each, rest = divmod(source.shape[0], count)
        if rest:
            raise FormatError(f'{source.origin} has the shape {describe(source.shape)}; its rows should be {count} equal parts')
        return views.rows(source, number * each, (number + 1) * each)
    return change


def of_qkv(number: int) -> Change:
    """The rows of q, k or v (0, 1, 2) in a tensor that holds q, then k, then v."""
    def change(source: TensorSource, place: Place) -> TensorSource:
        query, kv = place.config.num_heads * place.config.head_dim, place.config.num_kv_heads * place.config.head_dim
        starts = (0, query, query + kv, query + 2 * kv)
        check_rows(source, starts[-1])
        return views.rows(source, starts[number], starts[number + 1])
    return change


def of_each_head(number: int) -> Change:
    """The rows of q, k or v (0, 1, 2) in a tensor that holds the q, k and v of one head, then of the next."""
    def change(source: TensorSource, place: Place) -> TensorSource:
        heads, dim = place.config.num_heads, place.config.head_dim
        check_rows(source, 3 * heads * dim)
        return views.selected(source, np.arange(3 * heads * dim).reshape(heads, 3, dim)[:, number].reshape(-1))
    return change


def interleaved(kv: bool = False) -> Change:
    """Rows of q, or of k, of a model whose RoPE turns the pairs (2i, 2i + 1), in the order of ours."""
    def change(source: TensorSource, place: Place) -> TensorSource:
        config = place.config
        heads = config.num_kv_heads if kv else config.num_heads
        check_rows(source, heads * config.head_dim)
        if config.rope_theta is None:
            return source
        return views.selected(source, views.half_rotation_rows(heads, config.head_dim, config.rotary_dim or config.head_dim))
    return change


def check_rows(source: TensorSource, count: int) -> None:
    """Raises FormatError where a tensor has not so many rows."""
    if source.shape[:1] != (count,):
        raise FormatError(
            f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for {count} rows')
