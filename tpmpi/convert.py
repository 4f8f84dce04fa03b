"""Convert a checkpoint to a model file:  python -m tpmpi.convert SOURCE OUT.h5 [--weights float32|bfloat16]

SOURCE is a Hugging Face folder or a .gguf file.  One tensor is in memory at a time.  One process is enough: the file
serves any number of ranks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tpmpi.checkpoint import CheckpointError, CheckpointWriter, TokenizerData
from tpmpi.formats import Checkpoint, TensorSource, open_checkpoint
from tpmpi.sharding import TensorSpec, tensor_specs
from tpmpi.weights import STORAGE, encode


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a conversion."""
    p = argparse.ArgumentParser('python -m tpmpi.convert', description=__doc__.partition('\n')[0])
    p.add_argument('source', type=Path, metavar='SOURCE', help='Hugging Face folder (config.json, *.safetensors, '
                   'tokenizer.json) or .gguf file')
    p.add_argument('out', type=Path, metavar='OUT.h5', help='model file to write')
    p.add_argument('--weights', choices=tuple(STORAGE), help='type of the stored matrices (default: bfloat16 where the '
                   'source has it, else float32)')
    return p.parse_args(argv)


def stored(spec: TensorSpec, source: TensorSource, kind: str) -> np.ndarray:
    """A tensor as the file keeps it: sharded axis first, in the kind's storage; bfloat16 to bfloat16 bit by bit."""
    lossless = kind == source.dtype == 'bfloat16'
    data = source.read_bfloat16() if lossless else source.read()
    data = np.ascontiguousarray(data.T if spec.transposed else data)
    return data if lossless else encode(data, kind)


def kinds(checkpoint: Checkpoint, asked: str | None) -> dict[str, str]:
    """How each tensor is stored.  Vectors stay float32: they are small, and every rank holds them."""
    def kind(spec, source):
        if not spec.is_matrix:
            return 'float32'
        return asked or ('bfloat16' if source.dtype == 'bfloat16' else 'float32')

    return {name: kind(spec, checkpoint.tensors[name]) for name, spec in tensor_specs(checkpoint.config).items()}


def convert(source: Path, out: Path, weights: str | None = None) -> int:
    """Convert a checkpoint; returns the bytes of tensors written.  Raises ValueError with one line when it cannot be."""
    checkpoint = open_checkpoint(source)
    specs, chosen = tensor_specs(checkpoint.config), kinds(checkpoint, weights)
    total = sum(int(np.prod(specs[n].shape)) * STORAGE[k].itemsize for n, k in chosen.items())
    if not out.parent.is_dir():
        raise CheckpointError(f'{out}: the folder {out.parent} does not exist')
    if out.is_dir():
        raise CheckpointError(f'{out}: is a folder; give the name of the file to write')
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise CheckpointError(f'{out}: {total:,} bytes are needed and {free:,} are free on that file system')
    tokenizer = TokenizerData(checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.bos_token_id,
                              checkpoint.eos_token_ids)
    with CheckpointWriter(out, checkpoint.config, chosen, tokenizer, checkpoint.provenance) as writer:
        for name, kind in progress(chosen.items(), len(chosen)):
            writer.write(name, stored(specs[name], checkpoint.tensors[name], kind))
    return total


def progress(items: Iterable, count: int) -> Iterable:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm
    return tqdm(items, total=count, unit='tensor', desc='convert', file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    try:
        total = convert(options.source, options.out, options.weights)
    except (ValueError, OSError) as e:
        print(f'tpmpi.convert: {" ".join(str(e).split())}', file=sys.stderr)
        return 1
    print(f'tpmpi.convert: wrote {options.out}, {total / 1e6:,.1f} MB of tensors', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
