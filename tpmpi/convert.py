"""Convert a checkpoint to a model file:  python -m tpmpi.convert SOURCE OUT.h5 [--weights float32|bfloat16|float16|int8|int4]

SOURCE is a Hugging Face folder, a .gguf file, or the name of a repository on the Hugging Face Hub.  Without --weights nothing
is rounded.  One tensor is in memory at a time.  One process is enough: the file serves any number of ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tpmpi
from tpmpi.checkpoint import CheckpointError, CheckpointWriter, TokenizerData
from tpmpi.checkpoint_writer import destination, unfinished_bytes, unfinished_tensors
from tpmpi.formats import Checkpoint, TensorSource, open_checkpoint
from tpmpi.formats.hub import TEXTS, locate
from tpmpi.sharding import TensorSpec, target_kind, tensor_specs
from tpmpi.tokenizer import TokenizerError, load_backend
from tpmpi.weights import AT_ONCE, STORED_KINDS, Stored, encode, part_shapes, transpose

STOPPED = 75  # exit code of a conversion that can go on, as of tpmpi.batch: EX_TEMPFAIL of sysexits.h
EXPONENTS = {'float32': ('u4', 0x7F800000), 'bfloat16': ('u2', 0x7F80), 'float16': ('u2', 0x7C00)}  # all ones: NaN or infinity


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
            stored = self.source.read_stored(self.kind) if self.exact else encode(self.source.read(), self.kind, search=True)
        except ValueError as e:
            known = str(e).startswith(self.source.origin)
            raise CheckpointError(f'{e}' if known else f'{self.source.origin}: {e}') from e
        return transpose(stored) if self.spec.transposed else stored


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a conversion."""
    p = argparse.ArgumentParser('python -m tpmpi.convert', description=__doc__.partition('\n')[0])
    p.add_argument('source', metavar='SOURCE', help='Hugging Face folder (config.json, *.safetensors, tokenizer.json), .gguf '
                   'file, or org/name or org/name:FILE.gguf of the Hugging Face Hub, which goes through its cache (HF_HOME, '
                   'HF_TOKEN, HF_HUB_OFFLINE); a path that exists goes first, ./org/name is always a path')
    p.add_argument('out', type=Path, metavar='OUT.h5', help='model file to write')
    p.add_argument('--weights', choices=STORED_KINDS, help='kind of the stored matrices (default: the smallest that holds '
                   "each without loss: int4 and int8 for GGUF's Q4_0, Q4_1, Q5_0 and Q8_0, bfloat16 and float16 for these, "
                   'else float32)')
    p.add_argument('--revision', metavar='REV', help="branch, tag or commit of the Hub's repository (default: main)")
    p.add_argument('--gguf', metavar='FILE', help='the GGUF file to take of a repository or folder with several')
    p.add_argument('--resume', action='store_true', help='go on with an interrupted conversion of the same source to the same '
                   'file, which otherwise starts over')
    p.add_argument('--verbose', action='store_true', help='one line for each tensor')
    return p.parse_args(argv)


def plan(checkpoint: Checkpoint, asked: str | None) -> dict[str, Change]:
    """How each tensor is stored; None asks for the smallest kind without loss."""
    changes = {}
    for name, spec in tensor_specs(checkpoint.config).items():
        source = checkpoint.tensors[name]
        wanted = asked or source.exact_kinds[0]
        kind = target_kind(spec, source.exact_kinds[0], asked, float16=True)
        changes[name] = Change(spec, source, kind, wanted if spec.is_matrix and kind != wanted else '')
    return changes


@dataclass(frozen=True)
class Conversion:
    """A checkpoint, opened and checked, and what shall become of it."""

    checkpoint: Checkpoint
    changes: Mapping[str, Change]
    seen: Mapping[Path, tuple]  # the files, by `stamp`

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(change.nbytes for change in self.changes.values())

    def origin(self) -> dict[str, str]:
        """All that the tensors of the file depend on; an interrupted conversion goes on only where it is the same."""
        made = {'the version of tpmpi': tpmpi.__version__}
        made |= {file.name: f'{size} bytes of {date} ns' for file, (_, size, date) in self.seen.items()}
        made |= {f"the source's {key}": value for key, value in self.checkpoint.provenance.items()}
        texts = [self.checkpoint.tokenizer_json, self.checkpoint.chat_template, self.checkpoint.bos_token_id,
                 self.checkpoint.eos_token_ids]
        kinds = [(name, change.kind, change.words) for name, change in self.changes.items()]
        return made | {'the tokenizer': sha256(repr(texts)), 'the configuration': sha256(repr(self.checkpoint.config)),
                       'the kinds of the tensors (--weights)': sha256(repr(kinds))}

    def check_unchanged(self) -> None:
        """Raises CheckpointError where a file is no longer the one whose beginning was read when it was opened."""
        for file, seen in self.seen.items():
            if stamp(file) != seen:
                raise CheckpointError(f'{file}: has changed while it was read, and nothing was written; convert it again')

    def write(self, out: Path, resume: bool = False) -> tuple[int, list[str]]:
        """Write the model file; returns how many tensors an interrupted conversion had left, and which of the others hold NaN or
        infinity.  Raises ValueError or OSError.

        KeyboardInterrupt leaves what is needed to go on.
        """
        checkpoint = self.checkpoint
        tokenizer = TokenizerData(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.bos_token_id,
                                  checkpoint.eos_token_ids)
        kinds, words = ({name: getattr(change, what) for name, change in self.changes.items()} for what in ('kind', 'words'))
        with CheckpointWriter(out, checkpoint.config, kinds, tokenizer, checkpoint.provenance, words, origin=self.origin(),
                              resume=resume) as writer:
            left, not_finite = [(name, change) for name, change in self.changes.items() if name not in writer.done], []
            for name, change in progress(left, len(left)):
                stored = change.stored()
                writer.write(name, stored)
                if not is_finite(stored):
                    not_finite.append(name)
                del stored  # before the next one is read
            self.check_unchanged()
        return len(writer.done), not_finite


def prepare(source: str | Path, out: Path, weights: str | None = None, revision: str | None = None, gguf: str | None = None
            ) -> Conversion:
    """A conversion that can begin.  Raises ValueError with one line where it cannot; see `locate`."""
    file = destination(out)
    if not file.parent.is_dir():
        raise CheckpointError(f'{out}: the folder {file.parent} does not exist')
    path, provenance = locate(source, revision, gguf)
    checkpoint = open_checkpoint(path)
    for read in (path, *checkpoint.files, *(path / name for name in TEXTS)):
        if file.exists() and read.exists() and file.samefile(read):
            raise CheckpointError(f'{out}: is {read}, which the model is read from; give the name of another file to write')
    try:
        load_backend(checkpoint.tokenizer_json)  # as a run does
    except TokenizerError as e:
        raise CheckpointError(f'{path}: {e}; no run could load it') from e
    checkpoint = dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, **provenance})
    conversion = Conversion(checkpoint, plan(checkpoint, weights), {file: stamp(file) for file in checkpoint.files})
    free = shutil.disk_usage(file.parent).free + unfinished_bytes(out)
    if free < conversion.nbytes:
        raise CheckpointError(f'{out}: {conversion.nbytes:,} bytes are needed and {free:,} are free on that file system')
    return conversion


def convert(source: str | Path, out: Path, weights: str | None = None, *, revision: str | None = None,
            gguf: str | None = None, resume: bool = False) -> Mapping[str, Change]:
    """Convert a checkpoint; returns what became of each tensor.  Raises ValueError with one line when it cannot be."""
    conversion = prepare(source, Path(out), weights, revision, gguf)
    conversion.write(Path(out), resume)
    return conversion.changes


def stamp(file: Path) -> tuple[int, int, int]:
    """What tells a file from what it was before, or from another one of its name."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def is_finite(stored: Stored) -> bool:
    """Whether no number of a tensor is NaN or infinity, by its bits; integers and their scales are checked as they are made."""
    if stored.kind not in EXPONENTS:
        return True
    bits, ones = EXPONENTS[stored.kind]
    flat = stored.data.reshape(-1).view(bits)
    return all(np.max(flat[i:i + AT_ONCE] & flat.dtype.type(ones)) < ones for i in range(0, flat.size, AT_ONCE))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    options, conversion = parse(argv), None
    try:
        conversion = prepare(options.source, options.out, options.weights, options.revision, options.gguf)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        before, not_finite = conversion.write(options.out, options.resume)
    except (ValueError, OSError) as e:
        say(' '.join(str(e).split()))
        return 1
    except MemoryError as e:
        say(' '.join(f'out of memory: {e or "one tensor at a time must fit, as float32"}; take a machine with more'.split()))
        return 1
    except KeyboardInterrupt:
        done = None if conversion is None else unfinished_tensors(options.out)
        say('interrupted; nothing was written' if done is None else
            f'interrupted; {done} of {len(conversion.changes)} tensors are done, the same command with --resume does the rest')
        return STOPPED
    for line in report(conversion.changes, options.verbose):
        say(line)
    if not_finite:
        say(f'warning: NaN or infinity in {len(not_finite)} of {len(conversion.changes)} tensors, first in '
            f'{conversion.changes[not_finite[0]].source.origin}; what a run computes with it is no text: check the source')
    if before:
        say(f'{before} of {len(conversion.changes)} tensors were there already')
    say(f'wrote {options.out}, {conversion.nbytes / 1e6:,.1f} MB of tensors')
    return 0


def say(line: str):
    print(f'tpmpi.convert: {line}', file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
