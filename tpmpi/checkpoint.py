"""The HDF5 model file: read any rank's part of it as contiguous bytes.  See file_layout.py, and checkpoint_writer.py.

The file explains itself: `h5dump -H` prints each tensor's comment, type and shape.

A file from elsewhere is hostile until checked: links, external storage, virtual datasets and filters are refused, and
no size is believed that the file's own length does not cover.
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

import h5py
import numpy as np

from tpmpi.checkpoint_writer import CheckpointWriter
from tpmpi.config import ConfigError, ModelConfig, model_config_from_dict
from tpmpi.file_layout import (
    ALL_GROUP_PARTS,
    FILE_TYPES,
    FORMAT,
    FORMAT_VERSIONS,
    KINDS_OF_VERSION_1,
    MAX_TEXT,
    CheckpointError,
    Part,
    TokenizerData,
    attributes,
    crc32_blocks,
    group_attributes,
    group_members,
    reason,
    tensor_parts,
)
from tpmpi.sharding import TensorSpec, tensor_specs
from tpmpi.weights import GROUP_PARTS, Stored

__all__ = ['CheckpointError', 'CheckpointReader', 'CheckpointWriter', 'TokenizerData']


class CheckpointReader:
    """An open model file.  Only what a caller asks for is read, and only from checked datasets of this very file."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._tensors: dict[str, tuple[str, dict[str, tuple[Part, h5py.Dataset]]]] = {}  # those that have been checked
        self._own: set[str] = set()  # paths that are no links to elsewhere
        self._listed: set[str] = set()  # groups without strange members
        self._open()
        try:
            with self._damage_is_an_error():
                self._check_format()
                self.config = self._read_config()
                self.tokenizer = self._read_tokenizer()
        except CheckpointError:
            self.file.close()
            raise
        self.specs = tensor_specs(self.config)
        self._members = group_members(self.specs)

    def _open(self):
        what_to_do = 'give the path of a model file made by python -m tpmpi.convert'
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe waits for ever
                raise CheckpointError(f'{self.path}: is no regular file; {what_to_do}')
            with open(self.path, 'rb') as f:
                self.length = os.fstat(f.fileno()).st_size
        except OSError as e:
            raise CheckpointError(f'{self.path}: {reason(e)}; {what_to_do}') from e
        if not h5py.is_hdf5(self.path):
            raise CheckpointError(f'{self.path}: not an HDF5 file; make a model file with python -m tpmpi.convert')
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        if hasattr(access, 'set_file_locking'):  # HDF5 1.10.7 or newer
            access.set_file_locking(False, True)  # locks fail on many parallel file systems, and nothing is ever written
        access.set_sieve_buf_size(0)  # it would read neighbouring rows too; a rank reads its own bytes only
        try:
            self.file = h5py.File(h5py.h5f.open(os.fsencode(self.path), h5py.h5f.ACC_RDONLY, access))
        except OSError as e:
            raise CheckpointError(f'{self.path}: damaged or cut short ({reason(e)}); copy or convert it again') from e

    @contextlib.contextmanager
    def _damage_is_an_error(self):
        """HDF5 meets damaged bytes with errors of many types; here they become one."""
        try:
            yield
        except CheckpointError:
            raise
        except (AttributeError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as e:
            raise CheckpointError(f'{self.path}: damaged, or not a tpmpi model file ({reason(e)})') from e

    def _check_format(self):
        attrs = attributes(self.file)
        if attrs.get('format') != FORMAT:
            raise CheckpointError(f'{self.path}: an HDF5 file, but not a {FORMAT}; make one with python -m tpmpi.convert')
        self.version = int(attrs['format_version'])
        if self.version not in FORMAT_VERSIONS:
            raise CheckpointError(f'{self.path}: format version {self.version}; this tpmpi reads '
                                  f'{" and ".join(map(str, FORMAT_VERSIONS))}, update tpmpi or convert the model again')

    def _read_config(self) -> ModelConfig:
        facts = attributes(self._group('config'))
        facts = {name: tuple(value.tolist()) if isinstance(value, np.ndarray) else value for name, value in facts.items()}
        try:
            return model_config_from_dict(facts)
        except ConfigError as e:
            raise CheckpointError(f'{self.path}: {e}') from e

    def _read_tokenizer(self) -> TokenizerData:
        group = self._group('tokenizer')

        def text(name):
            if name not in group:
                return None
            dataset = self._dataset(f'tokenizer/{name}')
            if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > MAX_TEXT:
                raise CheckpointError(f'{self.path}: tokenizer/{name} is {dataset.shape} {dataset.dtype}; '
                                      f'expected at most {MAX_TEXT} bytes of text')
            return dataset[()].tobytes().decode()

        ids = attributes(group)
        bos, eos = ids.get('bos_token_id'), ids['eos_token_ids']
        return TokenizerData(text('tokenizer.json') or '', text('chat_template'), None if bos is None else int(bos),
                             tuple(int(i) for i in eos))

    def _group(self, name: str) -> h5py.Group:
        if not isinstance(self.file.get(name, getlink=True), h5py.HardLink):
            raise CheckpointError(f'{self.path}: no group {name} of its own')
        return self.file[name]

    def _dataset(self, name: str) -> h5py.Dataset:
        """A dataset that lies, whole and as plain bytes, in this file.  Anything else is refused, unread."""
        parts = name.split('/')
        for path in ('/'.join(parts[:i]) for i in range(1, len(parts) + 1)):
            if path not in self._own:
                if not self._exists(path):
                    raise CheckpointError(f'{self.path}: tensor {name} is missing')
                if self.file.id.links.get_info(path.encode()).type != h5py.h5l.TYPE_HARD:
                    raise CheckpointError(f'{self.path}: {path} is a link to elsewhere, which is never followed')
                self._own.add(path)
        found = h5py.h5o.open(self.file.id, name.encode())
        if not isinstance(found, h5py.h5d.DatasetID):
            raise CheckpointError(f'{self.path}: {name} is no dataset')
        dataset = h5py.Dataset(found)
        plist = dataset.id.get_create_plist()
        if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
            raise CheckpointError(f'{self.path}: {name} is chunked, compressed, virtual or external; '
                                  f'expected one contiguous dataset (h5repack -l CONTI -f NONE makes it so)')
        offset, size = found.get_offset(), math.prod(found.shape) * found.get_type().get_size()
        if size and (offset is None or offset + size > self.length):
            raise CheckpointError(f'{self.path}: {name} needs bytes beyond the end of the file; copy or convert it again')
        return dataset

    def _exists(self, path: str) -> bool:
        """Whether there is a link of this name.  The low-level interface: a model has a thousand of them to check."""
        return self.file.id.links.exists(path.encode())

    def kind(self, name: str) -> str:
        """How a tensor is stored: one of weights.STORED_KINDS."""
        with self._damage_is_an_error():
            return self._checked(self.specs[name])[0]

    def _checked(self, spec: TensorSpec) -> tuple[str, dict[str, tuple[Part, h5py.Dataset]]]:
        """A tensor's kind and datasets, checked when first asked for."""
        if spec.name not in self._tensors:
            self._tensors[spec.name] = self._check(spec)
        return self._tensors[spec.name]

    def _check(self, spec: TensorSpec) -> tuple[str, dict[str, tuple[Part, h5py.Dataset]]]:
        first, known = self._dataset(spec.name), [k for k in FILE_TYPES if k in KINDS_OF_VERSION_1 or self.version > 1]
        kind = next((k for k in known if first.id.get_type() == FILE_TYPES[k]), None)
        if kind is None:
            raise CheckpointError(f'{self.path}: tensor {spec.name} is stored as {first.dtype}; '
                                  f'expected {" or ".join(known)}')
        if not spec.fits(kind):
            raise CheckpointError(f'{self.path}: tensor {spec.name} is stored as {kind}, and cannot be: {spec.why_not(kind)}')
        if kind in GROUP_PARTS:
            self._check_group_attributes(spec, first, group_attributes(spec, kind))
        parts = {}
        for name, part in tensor_parts(spec, kind).items():
            dataset = first if part.path == spec.name else self._dataset(part.path)
            if dataset.id.shape != part.shape:
                raise CheckpointError(f'{self.path}: tensor {part.path} is {list(dataset.shape)}; '
                                      f'the configuration says {list(part.shape)}')
            if dataset.id.get_type() != part.file_type:
                raise CheckpointError(f'{self.path}: tensor {part.path} is stored as {dataset.dtype}; expected {part.dtype}')
            parts[name] = part, dataset
        self._refuse_strangers(spec, parts)
        return kind, parts

    def _check_group_attributes(self, spec: TensorSpec, dataset: h5py.Dataset, expected: Mapping):
        found = attributes(dataset, expected)
        for name, value in expected.items():
            if isinstance(found.get(name), np.ndarray) or found.get(name) != value:
                short = reprlib.repr(found.get(name))
                raise CheckpointError(f'{self.path}: attribute {name} of tensor {spec.name} is {short}; expected {value!r}')

    def _refuse_strangers(self, spec: TensorSpec, parts: Collection[str]):
        """Nothing lies beside a tensor that would have to change the result: parts of another kind, unknown tensors."""
        for name in ALL_GROUP_PARTS:
            if name not in parts and self._exists(f'{spec.name}.{name}'):
                raise CheckpointError(f'{self.path}: {spec.name}.{name} does not belong to a tensor of this kind')
        group = spec.name
        while group:
            group = group.rpartition('/')[0]
            if group not in self._listed:
                strange = sorted(set(self.file[group or '/']) - self._members[group])
                if strange:
                    raise CheckpointError(f'{self.path}: /{group} holds {strange[0][:80]!r}, which no tpmpi model has')
                self._listed.add(group)

    def read_rows(self, name: str, rows: range, verify: bool = False) -> Stored:
        """Some rows of a tensor, as stored.  Where groups run along the rows they must start and stop at a group's border.

        With `verify`, each whole checksum block among the rows is compared with the file's CRC-32.
        """
        spec = self.specs[name]
        with self._damage_is_an_error():
            kind, parts = self._checked(spec)
            arrays = {part_name: self._read(part, dataset, rows, verify) for part_name, (part, dataset) in parts.items()}
            for part_name in GROUP_PARTS.get(kind, ()):
                if not np.isfinite(arrays[part_name]).all():
                    raise CheckpointError(f'{self.path}: tensor {parts[part_name][0].path} is not finite for all of the rows '
                                          f'{rows.start} to {rows.stop - 1} of {name}; copy or convert it again')
        return Stored(kind, **arrays, group_axis=spec.group_axis)

    def _read(self, part: Part, dataset: h5py.Dataset, rows: range, verify: bool) -> np.ndarray:
        """The rows of one dataset that belong to some rows of its tensor."""
        assert rows.start % part.row == 0 and rows.stop % part.row == 0
        start, stop = rows.start // part.row, rows.stop // part.row
        out = np.empty((stop - start, *part.shape[1:]), part.dtype)
        if out.size:
            space = dataset.id.get_space()
            space.select_hyperslab((start, *(0,) * (out.ndim - 1)), out.shape)
            dataset.id.read(h5py.h5s.create_simple(out.shape), space, out, mtype=part.file_type)
            if verify:
                self._verify(part, dataset, start, out)
        return out

    def _verify(self, part: Part, dataset: h5py.Dataset, start: int, data: np.ndarray):
        attrs, unit, stop = attributes(dataset), part.crc32_rows, start + len(data)
        if 'crc32' not in attrs or attrs.get('crc32_rows') != unit:
            raise CheckpointError(f'{self.path}: tensor {part.path} has no checksums per {unit} rows; convert it again')
        first = -(-start // unit)
        found = crc32_blocks(data[first * unit - start:], unit)
        stored = np.asarray(attrs['crc32'])[first:first + len(found)]
        whole = len(found) if stop == part.shape[0] else (stop - first * unit) // unit
        bad = np.flatnonzero(found[:whole] != stored[:whole])
        if len(bad):
            at = (first + int(bad[0])) * unit
            raise CheckpointError(f'{self.path}: tensor {part.path}, rows {at} to {at + unit - 1}: '
                                  f'checksum differs, the file is damaged; copy or convert it again')

    def provenance(self) -> dict[str, str]:
        """Where the weights came from, as recorded at conversion."""
        return {k.removeprefix('provenance_'): v for k, v in attributes(self.file).items() if k.startswith('provenance_')}

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
