"""Writes the HDF5 model file, tensor by tensor, so that an interrupted conversion can go on.  See file_layout.py.

Until it is whole, OUT.h5 is two files beside it: `.OUT.h5.part`, and `.OUT.h5.part.journal` with a line for each tensor
that is on disk.  HDF5 does not survive a crash, or a disk that fills up, while it writes.  So it only lays out the file;
the tensors' bytes then go straight to their places, and what HDF5 wrote can be made anew at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import reprlib
import time
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from tpmpi.config import ModelConfig, facts_of
from tpmpi.file_layout import (
    ABOUT,
    ABOUT_VERSION_2,
    FORMAT,
    KINDS_OF_VERSION_1,
    CheckpointError,
    Part,
    TokenizerData,
    crc32_blocks,
    group_attributes,
    part_meaning,
    reason,
    tensor_parts,
)
from tpmpi.sharding import tensor_specs
from tpmpi.weights import Stored

SYNC_SECONDS = 1.0  # between two waits for the disk: about what a crash costs


def destination(path: Path) -> Path:
    """The file to write: a link's target, as os.replace would replace the link.  Raises CheckpointError for no regular file."""
    file = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.lexists(file) and not file.is_file():
        raise CheckpointError(f'{path}: is {"a folder" if file.is_dir() else "no regular file"}; give the name of the file to '
                              'write')
    return file


def part_files(path: Path) -> tuple[Path, Path]:
    """The unfinished model file and its journal."""
    path = destination(path)
    return path.with_name(f'.{path.name}.part'), path.with_name(f'.{path.name}.part.journal')


def unfinished_tensors(path: Path) -> int | None:
    """How many tensors of an interrupted conversion are on disk; None where there is nothing to go on with."""
    part, journal = part_files(path)
    data = journal.read_bytes() if part.exists() and journal.exists() else b''
    # different ones: a signal that comes just after a line was written lets it be written again
    lines = {line for line in data.splitlines(keepends=True) if line.endswith(b'\n')}
    return len(lines) - 1 if lines else None


def unfinished_bytes(path: Path) -> int:
    """What the unfinished file takes of the file system."""
    part = part_files(path)[0]
    return part.stat().st_blocks * 512 if part.exists() else 0


class CheckpointWriter:
    """Writes a model file tensor by tensor under a temporary name; it gets its own name when it is whole.

        with CheckpointWriter(path, config, kinds, tokenizer, provenance) as writer:
            writer.write('embedding', encode(array, kinds['embedding']))

    kinds: how each tensor is stored; sources: a few words on where each came from.
    resume: go on with the unfinished file, where there is one, and where its origin was the same; `done` are the tensors that
    it holds.  Without it an unfinished file is overwritten.  origin: what the tensors are made from, in words, by any names.
    Leaving the block with an error, or with a tensor missing, removes the unfinished file.  Leaving it with KeyboardInterrupt,
    or another of those that are no Exception, keeps it, as the end of the process does.
    Raises CheckpointError where another process writes the same file, the unfinished one is of another origin, or the path is
    that of a folder, a device, or whatever else is no regular file.
    """

    def __init__(self, path: Path, config: ModelConfig, kinds: Mapping[str, str], tokenizer: TokenizerData,
                 provenance: Mapping[str, str], sources: Mapping[str, str] | None = None, *,
                 origin: Mapping[str, str] | None = None, resume: bool = False):
        self.path, self.kinds, self.specs = destination(Path(path)), kinds, tensor_specs(config)
        for name, spec in self.specs.items():
            if not spec.fits(kinds[name]):
                raise CheckpointError(f'{path}: tensor {name} cannot be {kinds[name]}: {spec.why_not(kinds[name])}')
        self.parts = {name: tensor_parts(spec, kinds[name]) for name, spec in self.specs.items()}
        self.checksums: dict[str, np.ndarray] = {}
        self.temporary, journal = part_files(self.path)
        self._facts = config, tokenizer, provenance, sources or {}
        self._unsynced: list[str] = []
        try:
            self.journal = Journal(journal, self.path)
            try:
                self.done = self._take_up(dict(origin or {})) if resume else frozenset()
                if not self.done:
                    self._begin(dict(origin or {}))
                self.descriptor = os.open(self.temporary, os.O_RDWR | os.O_NOFOLLOW)
            except BaseException:
                self.journal.close(remove=not self.temporary.exists())
                raise
        except OSError as e:
            raise CheckpointError(f'{self.path}: cannot be written ({reason(e)})') from e
        self._synced_at = time.monotonic()

    def _begin(self, origin: Mapping[str, str]):
        """An empty file, on disk before the journal says that it is there."""
        self.journal.clear()
        self.temporary.unlink(missing_ok=True)
        try:
            layout = self._lay_out(self.temporary)
            sync(self.temporary)
            self.journal.add([{'origin': origin, 'layout': layout}])
        except BaseException:
            self.temporary.unlink(missing_ok=True)
            raise

    def _take_up(self, origin: Mapping[str, str]) -> frozenset[str]:
        """The tensors of the unfinished file, whose metadata are written anew; empty where there is none to go on with."""
        first, *lines = self.journal.read() or [{}]
        if not self.temporary.is_file() or self.temporary.is_symlink() or not lines:
            return frozenset()
        was = first['origin']
        changed = [key for key in {**was, **origin} if was.get(key) != origin.get(key)]
        if changed:
            before, now = (reprlib.repr(facts.get(changed[0], 'absent')) for facts in (was, origin))
            raise CheckpointError(f'{self.path}: cannot be resumed, {changed[0]} changed from {before} to {now}; '
                                  f'start over without --resume')
        again = self.temporary.with_name(self.temporary.name + '.layout')
        again.unlink(missing_ok=True)
        try:
            if self._lay_out(again) != first['layout'] or self.temporary.stat().st_size < again.stat().st_size:
                raise CheckpointError(f'{self.path}: cannot be resumed, {self.temporary.name} was cut, or made by another '
                                      f'version of HDF5; start over without --resume')
            self._copy_metadata(again)
        finally:
            again.unlink(missing_ok=True)
        for line in lines:
            for path, checksums in line['crc32'].items():
                self.checksums[path] = np.frombuffer(bytes.fromhex(checksums), '<u4').astype(np.uint32)
        return frozenset(line['tensor'] for line in lines)

    def _copy_metadata(self, source: Path):
        """All that is no tensor's: a process that died while HDF5 entered the checksums may have left half of it."""
        end, size = 0, source.stat().st_size
        nbytes = {part.path: part.dtype.itemsize * int(np.prod(part.shape, dtype=np.int64))
                  for parts in self.parts.values() for part in parts.values()}
        with source.open('rb') as old, self.temporary.open('r+b') as new:
            for offset, length in sorted((offset, nbytes[path]) for path, offset in self.offsets.items()) + [(size, 0)]:
                old.seek(end)
                new.seek(end)
                new.write(old.read(offset - end))
                end = offset + length
            new.truncate(size)
        sync(self.temporary)

    # ---- what HDF5 writes

    def _lay_out(self, path: Path) -> str:
        """A file with all metadata, and room for the tensors at `self.offsets`.  Returns a hash of where everything lies."""
        with h5py.File(path, 'x') as self.file:
            self._describe_model(*self._facts)
            paths = [part.path for parts in self.parts.values() for part in parts.values()]
            self.offsets = {path: self.file[path].id.get_offset() for path in paths}
        return hashlib.sha256(json.dumps([self.offsets, path.stat().st_size]).encode()).hexdigest()

    def _describe_model(self, config: ModelConfig, tokenizer: TokenizerData, provenance: Mapping[str, str],
                        sources: Mapping[str, str]):
        version = 1 if set(self.kinds.values()) <= set(KINDS_OF_VERSION_1) else 2
        self.file.attrs.update({'format': np.bytes_(FORMAT), 'format_version': version})
        for key, value in provenance.items():
            self.file.attrs[f'provenance_{key}'] = np.bytes_(value.encode(errors='replace') or b' ')  # of a path, any bytes
        self._comment(self.file, ABOUT.format(version) + ABOUT_VERSION_2 * (version == 2))
        facts = self.file.create_group('config')
        self._comment(facts, 'one attribute per fact of the architecture (h5dump -A prints them)')
        self._describe(facts, facts_of(config))
        texts = self.file.create_group('tokenizer')
        self._comment(texts, "the bytes of Hugging Face's tokenizer.json and of a jinja2 chat template, UTF-8; special token ids")
        for name, text in (('tokenizer.json', tokenizer.tokenizer_json), ('chat_template', tokenizer.chat_template)):
            if text is not None:
                texts.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))
        if tokenizer.bos_token_id is not None:
            texts.attrs['bos_token_id'] = tokenizer.bos_token_id
        texts.attrs['eos_token_ids'] = np.array(tokenizer.eos_token_ids, np.int64)
        for spec in self.specs.values():
            for name, part in self.parts[spec.name].items():
                self._create(part, part_meaning(spec, self.kinds[spec.name], name))
            self._describe(self.file[spec.name], group_attributes(spec, self.kinds[spec.name]))
            if spec.name in sources:
                self._describe(self.file[spec.name], {'source': sources[spec.name]})

    @staticmethod
    def _describe(thing: h5py.HLObject, values: Mapping):
        """Attributes, a text as bytes of its length."""
        thing.attrs.update({name: np.bytes_(value) if isinstance(value, str) else value for name, value in values.items()})

    @staticmethod
    def _comment(thing: h5py.HLObject, text: str):
        """A comment, which `h5dump -H` prints with the name, the type and the shape."""
        h5py.h5o.set_comment(thing.id, text.encode())

    def _create(self, part: Part, meaning: str):
        """An empty contiguous dataset whose place in the file is known at once, with its checksums to be filled in."""
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plist.set_obj_track_times(False)  # the same source gives the same bytes
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(part.shape)
        h5py.h5d.create(self.file.id, part.path.encode(), part.file_type, space, plist, links)
        self._comment(self.file[part.path], meaning)
        self.file[part.path].attrs.update({
            'crc32': np.zeros(-(-part.shape[0] // part.crc32_rows), np.uint32), 'crc32_rows': part.crc32_rows})

    # ---- the tensors

    def write(self, name: str, stored: Stored):
        """Write one whole tensor, of the kind that was announced, in the shape and with the group_axis of its TensorSpec."""
        spec, kind = self.specs[name], self.kinds[name]
        if stored.kind != kind or stored.group_axis != spec.group_axis:
            raise CheckpointError(f'tensor {name} is {stored.kind} with groups along axis {stored.group_axis}; '
                                  f'expected {kind} along axis {spec.group_axis}')
        for part_name, data in stored.parts.items():
            part = self.parts[name][part_name]
            if data.shape != part.shape or data.dtype != part.dtype:
                raise CheckpointError(f'tensor {part.path} is {data.shape} {data.dtype}; '
                                      f'expected {part.shape} {part.dtype} for {kind}')
            self._write(part, np.ascontiguousarray(data))
        self._unsynced.append(name)
        if time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self._sync()

    def _write(self, part: Part, data: np.ndarray):
        view, at = memoryview(data).cast('B'), self.offsets[part.path]
        while view:
            try:
                written = os.pwrite(self.descriptor, view, at)
            except OSError as e:
                raise CheckpointError(
                    f'{self.path}: {e.strerror} while writing tensor {part.path}; nothing was left behind') from e
            view, at = view[written:], at + written
        self.checksums[part.path] = crc32_blocks(data, part.crc32_rows)
        os.posix_fadvise(self.descriptor, self.offsets[part.path], data.nbytes, os.POSIX_FADV_DONTNEED)  # begins to write

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        keep = False
        try:
            if kind is None:
                self._finish()
            elif not issubclass(kind, Exception):
                self._sync()
                keep = True
        except OSError as e:
            raise CheckpointError(f'{self.path}: {reason(e)} while writing; nothing was left behind') from e
        except BaseException as e:
            keep = not isinstance(e, Exception)
            raise
        finally:
            os.close(self.descriptor)
            if not keep:
                self.temporary.unlink(missing_ok=True)
            self.journal.close(remove=not keep)

    def _sync(self):
        """Wait for the disk, then say in the journal which tensors are there."""
        lines = [{'tensor': name, 'crc32': {part.path: self.checksums[part.path].astype('<u4').tobytes().hex()
                                            for part in self.parts[name].values()}} for name in self._unsynced]
        try:
            os.fdatasync(self.descriptor)
            self.journal.add(lines)
        except OSError as e:
            raise CheckpointError(f'{self.path}: {reason(e)} while writing; nothing was left behind') from e
        self._unsynced, self._synced_at = [], time.monotonic()

    def _finish(self):
        """Put the checksums in their places, wait for the disk, and give the file its name."""
        missing = [name for name in self.specs if name not in self.checksums]
        if missing:
            raise CheckpointError(f'{self.path}: not written, {len(missing)} tensors are missing, first {missing[0]}')
        self._sync()
        with h5py.File(self.temporary, 'r+') as file:
            for path, checksums in self.checksums.items():
                file[path].attrs.modify('crc32', checksums)
        os.fsync(self.descriptor)
        os.replace(self.temporary, self.path)
        sync(self.path.parent)


class Journal:
    """Lines of JSON, each on disk when `add` returns; while it is open no other process opens it.

    Raises CheckpointError where another process has it, OSError where it cannot be written.
    """

    def __init__(self, path: Path, target: Path):
        self.path = path
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                os.close(self.descriptor)
                raise CheckpointError(f'{target}: another process is writing this file; wait for it, or give another '
                                      f'name') from e
            except OSError:
                pass  # a file system without locks
            if path.exists() and os.path.samestat(path.stat(), os.fstat(self.descriptor)):
                break
            os.close(self.descriptor)  # the other process has just finished, and removed it

    def read(self) -> list[dict]:
        """The whole lines; what a crash left of a last one is cut off."""
        data, lines, size = self.path.read_bytes(), [], 0
        for line in data.splitlines(keepends=True):
            try:
                lines.append(json.loads(line if line.endswith(b'\n') else b''))
            except ValueError:
                break
            size += len(line)
        os.ftruncate(self.descriptor, size)
        return lines

    def clear(self):
        os.ftruncate(self.descriptor, 0)

    def add(self, lines: list[dict]):
        data = ''.join(json.dumps(line) + '\n' for line in lines).encode()
        while data:
            data = data[os.write(self.descriptor, data):]
        os.fsync(self.descriptor)

    def close(self, remove: bool):
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def sync(path: Path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
