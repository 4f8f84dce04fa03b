"""Convert a checkpoint to a model file:  python -m tpmpi.convert SOURCE OUT.h5 [--weights float32|bfloat16|int8|int4]

SOURCE is a Hugging Face folder or a .gguf file.  Without --weights nothing is rounded.  One tensor is in memory at a
time.  One process is enough: the file serves any number of ranks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpmpi.checkpoint import CheckpointError, CheckpointWriter, TokenizerData
from tpmpi.formats import Checkpoint, TensorSource, open_checkpoint
from tpmpi.sharding import TensorSpec, target_kind, tensor_specs
from tpmpi.weights import WEIGHT_KINDS, Stored, encode, part_shapes, transpose


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor."""

    spec: TensorSpec
    source: TensorSource
    kind: str
    unfit: str = ''  # the kind that was wanted and that its shape does not allow

    @property
    def exact(self) -> bool:
        """Whether every value stays what it is."""
        return self.kind in self.source.exact_kinds

    @property
    def words(self) -> str:
        """For the file: the source's type, and whether anything was lost."""
        return f'{self.source.dtype}, {"exact" if self.exact else "rounded"}'

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        shapes = part_shapes(self.spec.shape, self.kind, self.spec.group_axis).values()
        return sum(dtype.itemsize * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape, dtype in shapes)

    def stored(self) -> Stored:
        """The tensor as the file keeps it, sharded axis first.  Raises ValueError where it cannot be read or encoded."""
        try:
            stored = self.source.read_stored(self.kind) if self.exact else encode(self.source.read(), self.kind)
        except ValueError as e:
            known = str(e).startswith(self.source.origin)
            raise CheckpointError(f'{e}' if known else f'{self.source.origin}: {e}') from e
        return transpose(stored) if self.spec.transposed else stored


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a conversion."""
    p = argparse.ArgumentParser('python -m tpmpi.convert', description=__doc__.partition('\n')[0])
    p.add_argument('source', type=Path, metavar='SOURCE', help='Hugging Face folder (config.json, *.safetensors, '
                   'tokenizer.json) or .gguf file')
    p.add_argument('out', type=Path, metavar='OUT.h5', help='model file to write')
    p.add_argument('--weights', choices=WEIGHT_KINDS, help='kind of the stored matrices (default: the smallest that holds '
                   "each without loss: int4 and int8 for GGUF's Q4_0, Q4_1, Q5_0 and Q8_0, bfloat16 for bfloat16, else float32)")
    p.add_argument('--verbose', action='store_true', help='one line for each tensor')
    return p.parse_args(argv)


def plan(checkpoint: Checkpoint, asked: str | None) -> dict[str, Change]:
    """How each tensor is stored; None asks for the smallest kind without loss."""
    changes = {}
    for name, spec in tensor_specs(checkpoint.config).items():
        source = checkpoint.tensors[name]
        wanted = asked or source.exact_kinds[0]
        kind = target_kind(spec, source.exact_kinds[0], asked)
        changes[name] = Change(spec, source, kind, wanted if spec.is_matrix and kind != wanted else '')
    return changes


def convert(source: Path, out: Path, weights: str | None = None) -> Mapping[str, Change]:
    """Convert a checkpoint; returns what became of each tensor.  Raises ValueError with one line when it cannot be."""
    checkpoint = open_checkpoint(source)
    changes = plan(checkpoint, weights)
    total = sum(change.nbytes for change in changes.values())
    if not out.parent.is_dir():
        raise CheckpointError(f'{out}: the folder {out.parent} does not exist')
    if out.is_dir():
        raise CheckpointError(f'{out}: is a folder; give the name of the file to write')
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise CheckpointError(f'{out}: {total:,} bytes are needed and {free:,} are free on that file system')
    tokenizer = TokenizerData(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.bos_token_id,
                              checkpoint.eos_token_ids)
    kinds, words = ({name: getattr(change, what) for name, change in changes.items()} for what in ('kind', 'words'))
    with CheckpointWriter(out, checkpoint.config, kinds, tokenizer, checkpoint.provenance, words) as writer:
        for name, change in progress(changes.items(), len(changes)):
            writer.write(name, change.stored())
    return changes


def progress(items: Iterable, count: int) -> Iterable:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm
    return tqdm(items, total=count, unit='tensor', desc='convert', file=sys.stderr)


def report(changes: Mapping[str, Change], verbose: bool = False) -> list[str]:
    """What a user should know: which types became which kinds, whether anything was lost, and what could not be as wanted.

    One line for each tensor where verbose.
    """
    lines, same, unfit = [], defaultdict(int), defaultdict(int)
    for name, change in changes.items():
        was, _, how = change.words.partition(', ')
        became = f'{was} -> {change.kind}, {how}'
        if verbose:
            lines.append(f'{name} {list(change.spec.shape)}: {became}')
        same[became] += 1
        if change.unfit:
            unfit[name.rpartition('/')[2], change.kind, change.unfit, change.spec.why_not(change.unfit)] += 1
    lines += [f'{became}: {count} tensor{"s" * (count > 1)}' for became, count in same.items()]
    return lines + [f'{leaf} ({count}) is {kind} because {wanted} does not fit: {why}'
                    for (leaf, kind, wanted, why), count in unfit.items()]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    try:
        changes = convert(options.source, options.out, options.weights)
    except (ValueError, OSError) as e:
        print(f'tpmpi.convert: {" ".join(str(e).split())}', file=sys.stderr)
        return 1
    for line in report(changes, options.verbose):
        print(f'tpmpi.convert: {line}', file=sys.stderr)
    total = sum(change.nbytes for change in changes.values())
    print(f'tpmpi.convert: wrote {options.out}, {total / 1e6:,.1f} MB of tensors', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
