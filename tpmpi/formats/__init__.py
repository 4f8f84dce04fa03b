"""Readers of other people's checkpoints.  `open_checkpoint` takes whatever it is given and says what it cannot read."""

from __future__ import annotations

from pathlib import Path

from tpmpi.formats.source import Checkpoint, FormatError, TensorSource, understood

__all__ = ['Checkpoint', 'FormatError', 'TensorSource', 'open_checkpoint']


def open_checkpoint(source: Path) -> Checkpoint:
    """A Hugging Face folder or a GGUF file, opened and checked; no tensor is read yet.

    Raises FormatError, a ValueError, when the source is neither, is damaged, or says something that is not understood.
    """
    source = Path(source)
    if source.is_dir():
        if not (source / 'config.json').exists():
            raise FormatError(f'{source} is no checkpoint: it has no config.json')
        from tpmpi.formats.huggingface import open_huggingface

        with understood(source):
            return open_huggingface(source)
    if not source.exists():
        raise FormatError(f'{source} does not exist; expected a Hugging Face folder or a .gguf file')
    if source.suffix != '.gguf':
        raise FormatError(f'{source} is neither a Hugging Face folder (with config.json) nor a .gguf file')
    from tpmpi.formats.gguf import open_gguf

    with understood(source):
        return open_gguf(source)
