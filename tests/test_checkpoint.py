"""The model file: what is written is read, by any rank its own bytes only, and a hostile file gets one line."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import PROGRAMS, environment, run_program

from tpmpi.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, TokenizerData
from tpmpi.file_layout import bfloat16_type, part_meaning
from tpmpi.sharding import rank_rows, shard, tensor_specs
from tpmpi.weights import STORED_KINDS, Stored, decode, encode

PACKAGE = Path(__file__).parent.parent
CONFIG = tiny.NINE_HEADS
KINDS = dict.fromkeys(tensor_specs(CONFIG), 'float32')


@pytest.fixture(params=STORED_KINDS)
def stored(request, tmp_path):
    """A model file of each kind: (path, whole tensors)."""
    path = tmp_path / 'model.h5'
    return path, tiny.write_model(path, tiny.GROUPS, request.param)


@pytest.fixture(scope='module')
def of_kinds(tmp_path_factory):
    """The same by kind: {'float32': (path, whole tensors), ...}."""
    folder = tmp_path_factory.mktemp('kinds')
    return {kind: (folder / f'{kind}.h5', tiny.write_model(folder / f'{kind}.h5', tiny.GROUPS, kind)) for kind in STORED_KINDS}


def read_whole(reader, name, verify=True):
    return decode(reader.read_rows(name, range(reader.specs[name].shape[0]), verify))


def test_what_is_written_is_read(stored):
    path, tensors = stored
    with CheckpointReader(path) as reader:
        assert reader.config == tiny.GROUPS
        assert reader.tokenizer == TokenizerData(tiny.byte_tokenizer(), None, None, (256,))
        assert reader.provenance() == {'source': 'random'}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read_whole(reader, name), tensor)


@settings(max_examples=30)
@given(place=st.integers(1, 14).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size))))
@pytest.mark.parametrize('kind', STORED_KINDS)
def test_any_rank_reads_its_rows(of_kinds, kind, place):
    (path, tensors), config = of_kinds[kind], tiny.GROUPS
    rank, size = place
    with CheckpointReader(path) as reader:
        for name, spec in tensor_specs(config).items():
            rows = rank_rows(spec, shard(config, rank, size))
            found = reader.read_rows(name, rows, verify=True)
            assert (found.kind, found.group_axis) == (kind if spec.is_matrix else 'float32', spec.group_axis)
            np.testing.assert_array_equal(decode(found), tensors[name][rows.start:rows.stop])


def test_other_programs_read_bfloat16_as_numbers(tmp_path):
    """h5py without any help of ours, and h5dump, give the very numbers."""
    path = tmp_path / 'model.h5'
    tensors = tiny.write_model(path, CONFIG, 'bfloat16')
    with h5py.File(path) as f:
        dataset = f['layers/0/q']
        assert dataset.id.get_type() == bfloat16_type() and dataset.id.get_type().get_size() == 2
        np.testing.assert_array_equal(dataset.astype('f4')[...], tensors['layers/0/q'])
    if shutil.which('h5dump') is None:
        pytest.skip('h5dump is not installed (Debian: hdf5-tools)')
    dump = subprocess.run(['h5dump', '-y', '-m', '%.9g', '-d', '/layers/0/q', '-s', '5,0', '-c', '1,3', path],
                          capture_output=True, text=True, check=True).stdout
    numbers = [float(x) for x in re.search(r'DATA \{([^}]*)\}', dump)[1].split(',')]
    np.testing.assert_allclose(numbers, tensors['layers/0/q'][5, :3], rtol=1e-6)


def test_float16_is_the_type_of_every_hdf5_tool(tmp_path):
    path = tmp_path / 'model.h5'
    tensors = tiny.write_model(path, CONFIG, 'float16')
    with h5py.File(path) as f:
        dataset = f['layers/0/q']
        assert f.attrs['format_version'] == 2 and dataset.dtype == np.float16
        np.testing.assert_array_equal(dataset[...], tensors['layers/0/q'])
    assert part_meaning(tensor_specs(CONFIG)['layers/0/q'], 'float16', 'data').endswith('; IEEE half')  # beside bfloat16
    with h5py.File(path, 'r+') as f:
        f.attrs['format_version'] = 1
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match='stored as float16; expected float32 or bfl'):
        reader.kind('embedding')


def a_stranger_decodes(dataset):
    """A tensor by what the file says of itself alone: its attributes, and the datasets beside it."""
    group, size, axis = (dataset.attrs[name] for name in ('kind', 'group', 'group_axis'))
    scale, q = dataset.parent[dataset.name + '.scale'][...].astype('f4'), dataset[...]
    assert size == 32 and scale.dtype == 'f4'
    if group == b'int4':
        whole = np.empty((len(q), 2 * q.shape[1]), 'f4')
        whole[:, 0::2], whole[:, 1::2] = q % 16, q // 16
        q = whole
    values = q.astype('f4') * np.repeat(scale, size, axis)
    if group == b'int4':
        values += np.repeat(dataset.parent[dataset.name + '.offset'][...].astype('f4'), size, axis)
    return values


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_other_programs_decode_integers_by_the_attributes(of_kinds, kind):
    path, tensors = of_kinds[kind]
    with h5py.File(path) as f:
        for name, tensor in tensors.items():
            values = a_stranger_decodes(f[name]) if tensor.ndim == 2 else f[name][...]
            np.testing.assert_array_equal(values, tensor)
        assert f['layers/0/down.scale'].id.get_type() == h5py.h5t.IEEE_F16LE and f['layers/0/down.scale'].shape == (5, 64)


@pytest.mark.parametrize(('kind', 'down'), [
    ('int8', 'value = scale * q, q as it stands here; down.scale: one for each 32 rows of a column"'),
    ('int4', 'value = scale * q + offset, q from 0 to 15: byte j of a row holds column 2j in its low four bits, column 2j + 1 in '
             'its high four; down.scale and down.offset: one for each 32 rows of a column"')])
def test_h5dump_says_how_integers_are_decoded(of_kinds, kind, down):
    if shutil.which('h5dump') is None:
        pytest.skip('h5dump is not installed (Debian: hdf5-tools)')
    dump = subprocess.run(['h5dump', '-H', of_kinds[kind][0]], capture_output=True, text=True, check=True).stdout
    for text in ('format version 2', 'Version 2 adds matrices of IEEE half', 'matrices of integers q', down):
        assert text in dump
    assert f'"[i, j]: scale of q[i, 32j to 32j+31]; {down.partition(", q")[0]}"' in dump
    assert '"[i, j]: scale of down[32i to 32i+31, j];' in dump


def test_the_version_is_the_oldest_that_can_say_it(of_kinds):
    for kind, (path, _) in of_kinds.items():
        with h5py.File(path) as f:
            assert f.attrs['format_version'] == (1 if kind in ('float32', 'bfloat16') else 2)
    with h5py.File(PACKAGE / 'data' / 'kjv.h5') as f:
        assert f.attrs['format_version'] == 1
    with CheckpointReader(PACKAGE / 'data' / 'kjv.h5') as reader:
        assert {reader.read_rows(name, range(32), verify=True).kind for name in reader.specs} == {'float32', 'bfloat16'}


def flip_bit(path, name, row):
    with h5py.File(path) as f:
        dataset = f[name]
        at = dataset.id.get_offset() + row * dataset.id.get_type().get_size() * dataset.shape[1]
    with open(path, 'r+b') as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 1]))


def test_a_damaged_byte_is_found_by_the_rank_that_reads_it(stored):
    path, _ = stored
    flip_bit(path, 'layers/1/up', 130)  # row 130: the third block of 64 columns
    with CheckpointReader(path) as reader:
        reader.read_rows('layers/1/up', range(0, 128), verify=True)
        with pytest.raises(CheckpointError, match=r'layers/1/up, rows 128 to 191: checksum differs'):
            reader.read_rows('layers/1/up', range(64, 160), verify=True)


@pytest.mark.parametrize(('part', 'row', 'message'), [
    ('up.scale', 130, r'up\.scale, rows 128 to 191'), ('down.offset', 4, r'down\.offset, rows 4 to 5')])
def test_a_damaged_scale_is_found_too(tmp_path, part, row, message):
    path = tmp_path / 'model.h5'
    tiny.write_model(path, tiny.GROUPS, 'int4')
    flip_bit(path, f'layers/1/{part}', row)
    name = f'layers/1/{part.partition(".")[0]}'
    with CheckpointReader(path) as reader:
        reader.read_rows(name, range(0, 128), verify=True)
        reader.read_rows(name, range(128, 160))
        with pytest.raises(CheckpointError, match=message + ': checksum differs'):
            reader.read_rows(name, range(64, 160), verify=True)


# ---- files from elsewhere


def load_all(path, verify=True):
    with CheckpointReader(path) as reader:
        for name in reader.specs:
            read_whole(reader, name, verify)


def replace(path, name, make):
    """Replace one dataset of a good file by what `make(group, leaf, array)` puts there."""
    with h5py.File(path, 'r+') as f:
        array = f[name].astype('f4')[...]
        attrs = dict(f[name].attrs)
        del f[name]
        group, leaf = f.require_group(name.rpartition('/')[0] or '/'), name.rpartition('/')[2]
        made = make(group, leaf, array)
        if made is not None:
            made.attrs.update(attrs)


def external(group, leaf, array):
    return group.create_dataset(leaf, array.shape, 'f4', external=[('/etc/passwd', 0, h5py.h5f.UNLIMITED)])


def external_link(group, leaf, array):
    group[leaf] = h5py.ExternalLink('other.h5', '/embedding')


def soft_link(group, leaf, array):
    group[leaf] = h5py.SoftLink('/embedding')


def virtual(group, leaf, array):
    layout = h5py.VirtualLayout(array.shape, 'f4')
    layout[...] = h5py.VirtualSource('other.h5', 'x', shape=array.shape)
    return group.create_virtual_dataset(leaf, layout)


def unwritten(group, leaf, array):
    """Claims its size, owns no bytes."""
    return group.create_dataset(leaf, array.shape, 'f4')


HOSTILE = {
    'external storage': (external, 'chunked, compressed, virtual or external'),
    'external link': (external_link, 'link to elsewhere'),
    'soft link': (soft_link, 'link to elsewhere'),
    'virtual': (virtual, 'chunked, compressed, virtual or external'),
    'compressed': (lambda g, n, a: g.create_dataset(n, data=a, compression='gzip'), 'chunked, compressed'),
    'chunked': (lambda g, n, a: g.create_dataset(n, data=a, chunks=True), 'chunked, compressed'),
    'no bytes': (unwritten, 'beyond the end of the file'),
    'group': (lambda g, n, a: g.create_group(n), 'is no dataset'),
    'missing': (lambda g, n, a: None, 'is missing'),
    'shape': (lambda g, n, a: g.create_dataset(n, data=a[:-1]), 'the configuration says'),
    'type': (lambda g, n, a: g.create_dataset(n, data=a.astype('f8')), 'is stored as float64'),
    'integers': (lambda g, n, a: g.create_dataset(n, data=a.astype('i4')), 'is stored as int32'),
}


@pytest.mark.parametrize('case', HOSTILE)
@pytest.mark.parametrize('name', ['embedding', 'layers/1/down'])
def test_a_hostile_dataset_is_refused(tmp_path, case, name):
    path, (make, message) = tmp_path / 'model.h5', HOSTILE[case]
    tiny.write_model(path, CONFIG)
    replace(path, name, make)
    with pytest.raises(CheckpointError, match=message) as e:
        load_all(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_a_linked_group_is_refused(tmp_path):
    path = tmp_path / 'model.h5'
    tiny.write_model(path, CONFIG)
    with h5py.File(path, 'r+') as f:
        del f['layers/1']
        f['layers/1'] = h5py.SoftLink('/layers/0')
    with pytest.raises(CheckpointError, match='layers/1 is a link to elsewhere'):
        load_all(path)


def set_attribute(place, name, value):
    def change(path):
        with h5py.File(path, 'r+') as f:
            f[place].attrs[name] = value
    return change


def delete(name):
    def change(path):
        with h5py.File(path, 'r+') as f:
            del f[name]
    return change


def cut(fraction):
    def change(path):
        data = path.read_bytes()
        path.write_bytes(data[:int(len(data) * fraction)])
    return change


@pytest.mark.parametrize(('change', 'message'), [
    (set_attribute('/', 'format_version', 3), 'format version 3; this tpmpi reads 1 and 2'),
    (set_attribute('/', 'format', np.bytes_('other')), 'not a tpmpi model'),
    (set_attribute('config', 'hidden_size', 37), 'the configuration says'),
    (set_attribute('config', 'num_kv_heads', 2), 'cannot share'),
    (set_attribute('config', 'hidden_size', 1 << 40), 'hidden_size'),
    (set_attribute('config', 'activation', np.arange(3)), 'activation'),
    (set_attribute('config', 'activation', np.bytes_('swish')), 'activation'),
    (set_attribute('config', 'soft_cap', 30.0), "unknown fact 'soft_cap'"),
    (set_attribute('tokenizer', 'eos_token_ids', np.bytes_('none')), 'damaged, or not'),
    (set_attribute('config', 'rope_theta', np.bytes_('x')), 'rope_theta'),
    (set_attribute('config', 'window', np.bytes_('x')), 'window'),
    (delete('config'), 'no group config'), (delete('tokenizer'), 'no group tokenizer'),
    (cut(0.5), 'damaged or cut short'), (cut(0.001), 'damaged or cut short|not an HDF5 file'),
    (lambda p: p.write_bytes(b''), 'not an HDF5 file'), (lambda p: p.write_text('hello'), 'not an HDF5 file'),
    (lambda p: p.unlink(), 'No such file'),
])
def test_a_bad_file_gets_one_line(tmp_path, change, message):
    path = tmp_path / 'model.h5'
    tiny.write_model(path, CONFIG)
    change(path)
    with pytest.raises(CheckpointError, match=message) as e:
        load_all(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('linked', [False, True])
def test_a_pipe_is_refused_at_once(tmp_path, linked):
    path = tmp_path / 'model.h5'
    os.mkfifo(tmp_path / 'pipe' if linked else path)
    if linked:
        path.symlink_to('pipe')
    code = 'import sys; from tpmpi.checkpoint import CheckpointReader; CheckpointReader(sys.argv[1])'
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, timeout=90, env=environment())
    assert done.stderr.splitlines()[-1].endswith(
        f'{path}: is no regular file; give the path of a model file made by python -m tpmpi.convert')


def test_a_linked_file_is_read(tmp_path):
    tiny.write_model(tmp_path / 'real.h5', CONFIG)
    (tmp_path / 'model.h5').symlink_to('real.h5')
    with CheckpointReader(tmp_path / 'model.h5') as linked, CheckpointReader(tmp_path / 'real.h5') as real:
        assert linked.config == real.config == CONFIG


def test_the_numbers_of_a_group_may_be_any(tmp_path):
    """-128 too, which our own encoder never gives."""
    path = tmp_path / 'model.h5'
    tensors = {name: encode(t, 'float32', int(not name.endswith(('attn_out', 'down'))))
               for name, t in tiny.random_tensors(tiny.GROUPS).items()}
    q = np.arange(-128, 128, dtype=np.int8).repeat(48).reshape(192, 64)
    tensors['layers/0/q'] = Stored('int8', q, np.full((192, 2), 0.5, np.float16))
    with CheckpointWriter(path, tiny.GROUPS, {n: s.kind for n, s in tensors.items()}, TokenizerData(''), {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with CheckpointReader(path) as reader:
        np.testing.assert_array_equal(read_whole(reader, 'layers/0/q'), q * np.float32(0.5))


def put(name, value):
    def change(path):
        with h5py.File(path, 'r+') as f:
            f[name][1, 1] = value
    return change


def swap(name, make):
    def change(path):
        with h5py.File(path, 'r+') as f:
            array = f[name][...]
            del f[name]
            group, leaf = f[name.rpartition('/')[0]], name.rpartition('/')[2]
            make(group, leaf, array)
    return change


def add(name):
    return lambda path: put_dataset(path, name)


def put_dataset(path, name):
    with h5py.File(path, 'r+') as f:
        f[name] = np.zeros((192, 2), np.float16)


DOWN, SCALE = 'layers/1/down', 'layers/1/down.scale'


@pytest.mark.parametrize(('change', 'message'), [
    (delete(SCALE), 'tensor layers/1/down.scale is missing'), (delete('layers/0/q.offset'), 'layers/0/q.offset is missing'),
    (put(SCALE, np.inf), 'layers/1/down.scale is not finite'), (put('layers/0/q.offset', np.nan), 'q.offset is not finite'),
    (swap(SCALE, lambda g, n, a: g.create_dataset(n, data=a, chunks=True)), 'down.scale is chunked'),
    (swap(SCALE, lambda g, n, a: g.create_dataset(n, data=a[:-1])), r'down.scale is \[4, 64\]; the configuration says'),
    (swap(SCALE, lambda g, n, a: g.create_dataset(n, data=a.T)), r'down.scale is \[64, 5\]'),
    (swap(SCALE, lambda g, n, a: g.create_dataset(n, data=a.astype('f4'))), 'down.scale is stored as float32; expected float16'),
    (swap(SCALE, soft_link), 'down.scale is a link to elsewhere'), (swap(SCALE, external_link), 'is a link to elsewhere'),
    (swap(SCALE, external), 'chunked, compressed, virtual or external'), (swap(SCALE, virtual), 'virtual or external'),
    (swap(SCALE, unwritten), 'beyond the end of the file'), (swap(SCALE, lambda g, n, a: g.create_group(n)), 'is no dataset'),
    (swap(DOWN, lambda g, n, a: g.create_dataset(n, data=a)), "attribute kind of tensor layers/1/down is None; expected 'int4'"),
    (swap(DOWN, lambda g, n, a: g.create_dataset(n, data=a.astype('i2'))), 'stored as int16; expected float32 or bfloat16'),
    (swap(DOWN, lambda g, n, a: g.create_dataset(n, data=a.view('i1'))), "is None; expected 'int8'"),
    (set_attribute(DOWN, 'kind', np.bytes_('int8')), "kind of tensor layers/1/down is 'int8'; expected 'int4'"),
    (set_attribute(DOWN, 'group', 16), 'attribute group of tensor layers/1/down is 16; expected 32'),
    (set_attribute(DOWN, 'group_axis', 1), 'group_axis of tensor layers/1/down is 1; expected 0'),
    (set_attribute(DOWN, 'group', np.arange(3000)), 'attribute group of tensor'),
    (set_attribute('/', 'format_version', 1), 'tensor embedding is stored as uint8; expected float32 or bfloat16'),
    (set_attribute('config', 'head_dim', 48), 'the configuration says'),
    (add('layers/0/attn_norm.scale'), 'layers/0/attn_norm.scale does not belong to a tensor of this kind'),
    (add('layers/0/q_bias'), "/layers/0 holds 'q_bias', which no tpmpi model has"), (add('lora'), "/ holds 'lora'"),
    (add('layers/2/q'), "/layers holds '2'"),
])
def test_hostile_groups_are_refused(tmp_path, change, message):
    path = tmp_path / 'model.h5'
    tiny.write_model(path, tiny.GROUPS, 'int4')
    change(path)
    with pytest.raises(CheckpointError, match=message) as e:
        load_all(path, verify=False)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_groups_that_ranks_would_cut_are_refused(tmp_path):
    """A head_dim of 16: whole heads are no multiples of 32, though all rows together are."""
    path, config = tmp_path / 'model.h5', dataclasses.replace(tiny.GROUPS, head_dim=16)
    tiny.write_model(path, config, 'int8')
    with h5py.File(path, 'r+') as f:
        assert 'layers/0/attn_out.scale' not in f and 'layers/0/down.scale' in f
        del f['layers/0/attn_out']
        f['layers/0/attn_out'] = np.zeros((96, 64), np.int8)
    with pytest.raises(CheckpointError, match='layers/0/attn_out is stored as int8, and cannot be: its 96 rows are split in '
                       'units of 16, not in multiples of 32'):
        load_all(path)


@pytest.mark.parametrize('kind', ['float32', 'int4'])
def test_random_damage_never_does_worse_than_an_error(tmp_path, kind):
    """Flipped bytes anywhere, half of them in the metadata: an error of ours, or the right shapes; no crash, no hang."""
    tiny.write_model(tmp_path / 'good.h5', tiny.GROUPS, kind)
    done = subprocess.run([sys.executable, PROGRAMS / 'damage.py', tmp_path / 'good.h5', '200'], capture_output=True,
                          text=True, timeout=300, env=environment())
    assert done.returncode == 0 and int(done.stdout) > 50, done.stderr


def test_a_variable_length_attribute_is_refused_unread(tmp_path):
    """HDF5 keeps such values in a heap whose damage makes the library loop for ever."""
    path = tmp_path / 'model.h5'
    tiny.write_model(path, CONFIG)
    with h5py.File(path, 'r+') as f:
        f['config'].attrs['activation'] = 'silu'
    with pytest.raises(CheckpointError, match='attribute activation of /config is of a type'):
        load_all(path)


@pytest.mark.parametrize(('size', 'kind', 'width'), [
    (1, 'float32', 4), (2, 'float32', 4), (5, 'float32', 4), (5, 'int8', 1 + 2 / 32), (2, 'int4', 0.5 + 4 / 32)])
def test_a_rank_reads_its_own_bytes_only(tmp_path, size, kind, width):
    """Measured by the kernel, on a model of 15 MB; a straddling KV head is the only part that two ranks read.

    width: bytes of a weight in the file; in memory the reference kernels have 4.
    """
    config = tiny.ModelConfig(vocab_size=8192, hidden_size=288, num_layers=4, num_heads=9, num_kv_heads=3, head_dim=32,
                              ffn_size=768, max_positions=64, tie_embeddings=True)
    path = tmp_path / 'model.h5'
    tensors = tiny.write_model(path, config, kind)
    report = run_program('bytes_read.py', size, path)
    for read, weights in report:
        assert weights * width / 4 <= read <= weights * width / 4 + 150_000  # norms, metadata, tokenizer
    held = sum(len(shard(config, rank, size).kv_heads) for rank in range(size))
    twice = (held - config.num_kv_heads) * 2 * config.num_layers * config.head_dim * config.hidden_size * 4
    assert sum(w for _, w in report) == sum(4 * t.size for t in tensors.values() if t.ndim == 2) + twice
