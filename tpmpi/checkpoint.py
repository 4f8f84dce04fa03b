"""The HDF5 model file: write a model once, read any rank's part of it as contiguous bytes.

Every tensor is one contiguous, unfiltered dataset with its sharded axis first, so that a rank's part is one byte range.
The file explains itself: `h5dump -H` prints each tensor's comment, type and shape.

A file from elsewhere is hostile until checked: links, external storage, virtual datasets and filters are refused, and
no size is believed that the file's own length does not cover.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import numpy as np

from tpmpi.config import ConfigError, ModelConfig, model_config_from_dict
from tpmpi.sharding import TensorSpec, tensor_specs
from tpmpi.weights import STORAGE

FORMAT, FORMAT_VERSION = 'tpmpi model', 1
ABOUT = """\
A transformer language model for tpmpi, format version 1: whole tensors, for any number of ranks.
A matrix is stored with the axis first by which ranks split it: a rank's rows are one contiguous run.  So attn_out and
down are [in, out], all others [out, in].  RoPE turns the pairs (i, i + head_dim/2) of the rows of each head of q and k.
A 16-bit floating-point type is bfloat16, the upper half of an IEEE single.  crc32: zlib's, of each crc32_rows rows."""
MAX_TEXT = 64 << 20  # bytes of tokenizer.json or chat template


class CheckpointError(ValueError):
    """A model file that cannot be read, or that contradicts itself."""


def bfloat16_type() -> h5py.h5t.TypeID:
    """bfloat16 as HDF5 describes it: 16 bits, sign 15, 8 exponent bits at 7 with bias 127, 7 mantissa bits at 0."""
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_size(2)
    t.set_precision(16)
    t.set_ebias(127)
    return t


FILE_TYPES = {'float32': h5py.h5t.IEEE_F32LE, 'bfloat16': bfloat16_type()}


@dataclass(frozen=True)
class TokenizerData:
    """What the file says about text: the text of tokenizer.json, the chat template, and the special ids."""

    tokenizer_json: str
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


# ---- writing


class CheckpointWriter:
    """Writes a model file tensor by tensor under a temporary name; it gets its own name when it is whole.

        with CheckpointWriter(path, config, kinds, tokenizer, provenance) as writer:
            writer.write('embedding', array)

    kinds: how each tensor is stored.  HDF5 lays out the file first, with all metadata; the tensors' bytes then go
    straight to their places, because HDF5 does not survive a disk that fills up under its caches.
    Leaving the block with an error, or with a tensor missing, removes the temporary file.
    """

    def __init__(self, path: Path, config: ModelConfig, kinds: Mapping[str, str], tokenizer: TokenizerData,
                 provenance: Mapping[str, str]):
        self.path, self.kinds, self.specs = Path(path), kinds, tensor_specs(config)
        self.checksums: dict[str, np.ndarray] = {}
        self.temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
        try:
            self.file = h5py.File(self.temporary, 'x')
            with self.file:
                self._lay_out(config, tokenizer, provenance)
                self.offsets = {name: self.file[name].id.get_offset() for name in self.specs}
            self.descriptor = os.open(self.temporary, os.O_RDWR)
        except OSError as e:
            self.temporary.unlink(missing_ok=True)
            raise CheckpointError(f'{self.path}: cannot be written ({_reason(e)})') from e

    def _lay_out(self, config: ModelConfig, tokenizer: TokenizerData, provenance: Mapping[str, str]):
        self.file.attrs.update({'format': np.bytes_(FORMAT), 'format_version': FORMAT_VERSION})
        for key, value in provenance.items():
            self.file.attrs[f'provenance_{key}'] = np.bytes_(value.encode() or b' ')
        self._comment(self.file, ABOUT)
        facts = self.file.create_group('config')
        self._comment(facts, 'one attribute per fact of the architecture (h5dump -A prints them)')
        for field in fields(config):
            value = getattr(config, field.name)
            value = 'none' if value is None else value
            facts.attrs[field.name] = np.bytes_(value) if isinstance(value, str) else value
        texts = self.file.create_group('tokenizer')
        self._comment(texts, "the bytes of Hugging Face's tokenizer.json and of a jinja2 chat template, UTF-8; special token ids")
        for name, text in (('tokenizer.json', tokenizer.tokenizer_json), ('chat_template', tokenizer.chat_template)):
            if text is not None:
                texts.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))
        if tokenizer.bos_token_id is not None:
            texts.attrs['bos_token_id'] = tokenizer.bos_token_id
        texts.attrs['eos_token_ids'] = np.array(tokenizer.eos_token_ids, np.int64)
        for spec in self.specs.values():
            self._create_tensor(spec, self.kinds[spec.name])

    @staticmethod
    def _comment(thing: h5py.HLObject, text: str):
        """A comment, which `h5dump -H` prints with the name, the type and the shape."""
        h5py.h5o.set_comment(thing.id, text.encode())

    def _create_tensor(self, spec: TensorSpec, kind: str):
        """An empty contiguous dataset whose place in the file is known at once, with its attributes."""
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(spec.shape)
        h5py.h5d.create(self.file.id, spec.name.encode(), FILE_TYPES[kind], space, plist, links)
        self._comment(self.file[spec.name], spec.meaning)
        self.file[spec.name].attrs.update({
            'crc32': np.zeros(-(-spec.shape[0] // spec.unit), np.uint32), 'crc32_rows': spec.unit})

    def write(self, name: str, data: np.ndarray):
        """Write one whole tensor.  data: as stored (see TensorSpec.shape), float32 or the bits of bfloat16."""
        spec, kind = self.specs[name], self.kinds[name]
        if data.shape != spec.shape or data.dtype != STORAGE[kind]:
            raise CheckpointError(f'tensor {name} is {data.shape} {data.dtype}; '
                                  f'expected {spec.shape} {STORAGE[kind]} for {kind}')
        data = np.ascontiguousarray(data)
        view, at = memoryview(data).cast('B'), self.offsets[name]
        while view:
            try:
                written = os.pwrite(self.descriptor, view, at)
            except OSError as e:
                raise CheckpointError(f'{self.path}: {e.strerror} while writing tensor {name}; nothing was left behind') from e
            view, at = view[written:], at + written
        self.checksums[name] = _crc32_blocks(data, spec.unit)

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
            raise CheckpointError(f'{self.path}: {_reason(e)} while writing; nothing was left behind') from e
        finally:
            os.close(self.descriptor)
            self.temporary.unlink(missing_ok=True)

    def _finish(self):
        """Put the checksums in their places, wait for the disk, and give the file its name."""
        os.fsync(self.descriptor)
        with h5py.File(self.temporary, 'r+') as file:
            for name, checksums in self.checksums.items():
                file[name].attrs.modify('crc32', checksums)
        os.fsync(self.descriptor)
        os.replace(self.temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _crc32_blocks(data: np.ndarray, unit: int) -> np.ndarray:
    """CRC-32 of each block of `unit` rows, which no rank count cuts."""
    return np.array([zlib.crc32(data[i:i + unit].data) for i in range(0, len(data), unit)], np.uint32)


# ---- reading


class CheckpointReader:
    """An open model file.  Only what a caller asks for is read, and only from checked datasets of this very file."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._tensors: dict[str, tuple[h5py.Dataset, str]] = {}
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

    def _open(self):
        try:
            with open(self.path, 'rb') as f:
                self.length = os.fstat(f.fileno()).st_size
        except OSError as e:
            raise CheckpointError(f'{self.path}: {_reason(e)}; give the path of a model file made by '
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
            raise CheckpointError(f'{self.path}: damaged or cut short ({_reason(e)}); copy or convert it again') from e

    @contextlib.contextmanager
    def _damage_is_an_error(self):
        """HDF5 meets damaged bytes with errors of many types; here they become one."""
        try:
            yield
        except CheckpointError:
            raise
        except (AttributeError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as e:
            raise CheckpointError(f'{self.path}: damaged, or not a tpmpi model file ({_reason(e)})') from e

    def _check_format(self):
        attrs = attributes(self.file)
        if attrs.get('format') != FORMAT:
            raise CheckpointError(f'{self.path}: an HDF5 file, but not a {FORMAT}; make one with python -m tpmpi.convert')
        version = int(attrs['format_version'])
        if version != FORMAT_VERSION:
            raise CheckpointError(f'{self.path}: format version {version}; this tpmpi reads version {FORMAT_VERSION}, '
                                  f'update tpmpi or convert the model again')

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
        for i in range(1, len(parts) + 1):
            link = self.file.get('/'.join(parts[:i]), getlink=True)
            if link is None:
                raise CheckpointError(f'{self.path}: tensor {name} is missing')
            if not isinstance(link, h5py.HardLink):
                raise CheckpointError(f'{self.path}: {"/".join(parts[:i])} is a link to elsewhere, which is never followed')
        dataset = self.file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise CheckpointError(f'{self.path}: {name} is no dataset')
        plist = dataset.id.get_create_plist()
        if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
            raise CheckpointError(f'{self.path}: {name} is chunked, compressed, virtual or external; '
                                  f'expected one contiguous dataset (h5repack -l CONTI -f NONE makes it so)')
        offset, size = dataset.id.get_offset(), dataset.size * dataset.id.get_type().get_size()
        if size and (offset is None or offset + size > self.length):
            raise CheckpointError(f'{self.path}: {name} needs bytes beyond the end of the file; copy or convert it again')
        return dataset

    def kind(self, name: str) -> str:
        """How a tensor is stored: a key of weights.STORAGE."""
        with self._damage_is_an_error():
            return self._checked(self.specs[name])[1]

    def _checked(self, spec: TensorSpec) -> tuple[h5py.Dataset, str]:
        """A tensor's dataset and kind, checked when first asked for."""
        if spec.name not in self._tensors:
            self._tensors[spec.name] = self._check(spec)
        return self._tensors[spec.name]

    def _check(self, spec: TensorSpec) -> tuple[h5py.Dataset, str]:
        dataset = self._dataset(spec.name)
        if dataset.shape != spec.shape:
            raise CheckpointError(f'{self.path}: tensor {spec.name} is {list(dataset.shape)}; '
                                  f'the configuration says {list(spec.shape)}')
        for kind, file_type in FILE_TYPES.items():
            if dataset.id.get_type() == file_type:
                return dataset, kind
        raise CheckpointError(f'{self.path}: tensor {spec.name} is stored as {dataset.dtype}; '
                              f'expected {" or ".join(FILE_TYPES)}')

    def read_rows(self, name: str, rows: range, out: np.ndarray, verify: bool = False):
        """Read rows of a tensor into `out`, as stored.  out: [len(rows), ...], C-contiguous, the kind's storage dtype.

        With `verify`, each whole checksum block among the rows is compared with the file's CRC-32.
        """
        spec = self.specs[name]
        with self._damage_is_an_error():
            dataset, kind = self._checked(spec)
            assert out.flags.c_contiguous and out.dtype == STORAGE[kind] and out.shape == (len(rows), *spec.shape[1:])
            if not rows:
                return
            space = dataset.id.get_space()
            space.select_hyperslab((rows.start, *(0,) * (out.ndim - 1)), out.shape)
            dataset.id.read(h5py.h5s.create_simple(out.shape), space, out, mtype=FILE_TYPES[kind])
            if verify:
                self._verify(spec, dataset, rows, out)

    def _verify(self, spec: TensorSpec, dataset: h5py.Dataset, rows: range, data: np.ndarray):
        attrs = attributes(dataset)
        if 'crc32' not in attrs or attrs.get('crc32_rows') != spec.unit:
            raise CheckpointError(f'{self.path}: tensor {spec.name} has no checksums per {spec.unit} rows; convert it again')
        first = -(-rows.start // spec.unit)
        skip = first * spec.unit - rows.start
        found = _crc32_blocks(data[skip:], spec.unit)
        stored = np.asarray(attrs['crc32'])[first:first + len(found)]
        whole = len(found) if rows.stop == spec.shape[0] else (rows.stop - first * spec.unit) // spec.unit
        bad = np.flatnonzero(found[:whole] != stored[:whole])
        if len(bad):
            at = (first + int(bad[0])) * spec.unit
            raise CheckpointError(f'{self.path}: tensor {spec.name}, rows {at} to {at + spec.unit - 1}: '
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


def attributes(thing: h5py.HLObject) -> dict:
    """The attributes of a group or dataset: numbers, truth values, texts of fixed length, arrays of numbers.

    Variable-length values are refused unread: they lie in HDF5's global heap, and the library has been seen to loop for
    ever over a damaged one.  Raises TypeError for them.
    """
    values = {}
    for name in thing.attrs:
        attribute = h5py.h5a.open(thing.id, name.encode())
        kind = attribute.get_type()
        plain = isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID, h5py.h5t.TypeStringID))
        if not plain or isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
            raise TypeError(f'attribute {name} of {thing.name} is of a type that model files do not have')
        size = int(np.prod(attribute.shape, dtype=object)) * kind.get_size()
        if size > MAX_TEXT:
            raise TypeError(f'attribute {name} of {thing.name} has {size} bytes')
        value = thing.attrs[name]
        value = value.item() if isinstance(value, np.generic) else value
        values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def _reason(e: BaseException) -> str:
    """The short reason of an error: what the system says, or HDF5's last words."""
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return str(e).splitlines()[0].strip() if str(e) else type(e).__name__
