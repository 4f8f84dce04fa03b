"""The HDF5 model file: write a model once, read any rank's part of it as contiguous bytes.  See file_layout.py.

The file explains itself: `h5dump -H` prints each tensor's comment, type and shape.

A file from elsewhere is hostile until checked: links, external storage, virtual datasets and filters are refused, and
no size is believed that the file's own length does not cover.
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np

from tpmpi.config import ConfigError, ModelConfig, model_config_from_dict
from tpmpi.file_layout import (
    ABOUT,
    ABOUT_VERSION_2,
    ALL_GROUP_PARTS,
    FILE_TYPES,
    FORMAT,
    FORMAT_VERSIONS,
    MAX_TEXT,
    CheckpointError,
    Part,
    TokenizerData,
    attributes,
    crc32_blocks,
    group_attributes,
    group_members,
    part_meaning,
    reason,
    tensor_parts,
)
from tpmpi.sharding import TensorSpec, tensor_specs
from tpmpi.weights import GROUP_PARTS, Stored

# ---- writing


class CheckpointWriter:
    """Writes a model file tensor by tensor under a temporary name; it gets its own name when it is whole.

        with CheckpointWriter(path, config, kinds, tokenizer, provenance) as writer:
            writer.write('embedding', encode(array, kinds['embedding']))

    kinds: how each tensor is stored; sources: a few words on where each came from.
    HDF5 lays out the file first, with all metadata; the tensors' bytes then go straight to their places, because HDF5
    does not survive a disk that fills up under its caches.
    Leaving the block with an error, or with a tensor missing, removes the temporary file.
    """

    def __init__(self, path: Path, config: ModelConfig, kinds: Mapping[str, str], tokenizer: TokenizerData,
                 provenance: Mapping[str, str], sources: Mapping[str, str] | None = None):
        self.path, self.kinds, self.specs = Path(path), kinds, tensor_specs(config)
        for name, spec in self.specs.items():
            if not spec.fits(kinds[name]):
                raise CheckpointError(f'{path}: tensor {name} cannot be {kinds[name]}: {spec.why_not(kinds[name])}')
        self.parts = {name: tensor_parts(spec, kinds[name]) for name, spec in self.specs.items()}
        self.checksums: dict[str, np.ndarray] = {}
        self.temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
        try:
            self.file = h5py.File(self.temporary, 'x')
            with self.file:
                self._lay_out(config, tokenizer, provenance, sources or {})
                paths = [part.path for parts in self.parts.values() for part in parts.values()]
                self.offsets = {path: self.file[path].id.get_offset() for path in paths}
            self.descriptor = os.open(self.temporary, os.O_RDWR)
        except OSError as e:
            self.temporary.unlink(missing_ok=True)
            raise CheckpointError(f'{self.path}: cannot be written ({reason(e)})') from e

    def _lay_out(self, config: ModelConfig, tokenizer: TokenizerData, provenance: Mapping[str, str],
                 sources: Mapping[str, str]):
        version = 2 if any(kind in GROUP_PARTS for kind in self.kinds.values()) else 1
        self.file.attrs.update({'format': np.bytes_(FORMAT), 'format_version': version})
        for key, value in provenance.items():
            self.file.attrs[f'provenance_{key}'] = np.bytes_(value.encode() or b' ')
        self._comment(self.file, ABOUT.format(version) + ABOUT_VERSION_2 * (version == 2))
        facts = self.file.create_group('config')
        self._comment(facts, 'one attribute per fact of the architecture (h5dump -A prints them)')
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        self._describe(facts, {name: 'none' if value is None else value for name, value in values.items()})
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
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(part.shape)
        h5py.h5d.create(self.file.id, part.path.encode(), part.file_type, space, plist, links)
        self._comment(self.file[part.path], meaning)
        self.file[part.path].attrs.update({
            'crc32': np.zeros(-(-part.shape[0] // part.crc32_rows), np.uint32), 'crc32_rows': part.crc32_rows})

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

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        missing = [n for n in self.specs if n not in self.checksums]
        try:
            if kind is None and missing:
                raise CheckpointError(
                    f'{self.path}: not written, {len(missing)} tensors are missing, first {missing[0]}')
            if kind is None:
                self._finish()
        except OSError as e:
            raise CheckpointError(f'{self.path}: {reason(e)} while writing; nothing was left behind') from e
        finally:
            os.close(self.descriptor)
            self.temporary.unlink(missing_ok=True)

    def _finish(self):
        """Put the checksums in their places, wait for the disk, and give the file its name."""
        os.fsync(self.descriptor)
        with h5py.File(self.temporary, 'r+') as file:
            for path, checksums in self.checksums.items():
                file[path].attrs.modify('crc32', checksums)
        os.fsync(self.descriptor)
        os.replace(self.temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# ---- reading


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
        try:
            with open(self.path, 'rb') as f:
                self.length = os.fstat(f.fileno()).st_size
        except OSError as e:
            raise CheckpointError(f'{self.path}: {reason(e)}; give the path of a model file made by '
                                  f'python -m tpmpi.convert') from e
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
        facts |= {name: None for name in ('rope_theta', 'window') if facts.get(name) == 'none'}
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
        """How a tensor is stored: one of weights.WEIGHT_KINDS."""
        with self._damage_is_an_error():
            return self._checked(self.specs[name])[0]

    def _checked(self, spec: TensorSpec) -> tuple[str, dict[str, tuple[Part, h5py.Dataset]]]:
        """A tensor's kind and datasets, checked when first asked for."""
        if spec.name not in self._tensors:
            self._tensors[spec.name] = self._check(spec)
        return self._tensors[spec.name]

    def _check(self, spec: TensorSpec) -> tuple[str, dict[str, tuple[Part, h5py.Dataset]]]:
        first, known = self._dataset(spec.name), [k for k in FILE_TYPES if k not in GROUP_PARTS or self.version > 1]
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
            if not np.array_equal(found.get(name), value):
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
