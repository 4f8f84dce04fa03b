"""The model file: what is written is read, by any rank its own bytes only, and a hostile file gets one line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import PROGRAMS, environment, run_program

from tpmpi.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, TokenizerData, bfloat16_type
from tpmpi.sharding import rank_rows, shard, tensor_specs
from tpmpi.weights import STORAGE, decode, encode

CONFIG = tiny.NINE_HEADS
KINDS = dict.fromkeys(tensor_specs(CONFIG), 'float32')


@pytest.fixture(params=['float32', 'bfloat16'])
def stored(request, tmp_path):
    """A model file of each kind: (path, whole tensors)."""
    path = tmp_path / 'model.h5'
    return path, tiny.write_model(path, CONFIG, request.param)


def read_whole(reader, name):
    spec, kind = reader.specs[name], reader.kind(name)
    out = np.empty(spec.shape, STORAGE[kind])
    reader.read_rows(name, range(spec.shape[0]), out, verify=True)
    return decode(out, kind)


def test_what_is_written_is_read(stored):
    path, tensors = stored
    with CheckpointReader(path) as reader:
        assert reader.config == CONFIG
        assert reader.tokenizer == TokenizerData(tiny.byte_tokenizer(), None, None, (256,))
        assert reader.provenance() == {'source': 'random'}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read_whole(reader, name), tensor)


@settings(max_examples=30, deadline=None)
@given(place=st.integers(1, 14).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size))))
def test_any_rank_reads_its_rows(models, place):
    path, config, tensors = models['nine_heads']
    rank, size = place
    with CheckpointReader(path) as reader:
        for name, spec in tensor_specs(config).items():
            rows = rank_rows(spec, shard(config, rank, size))
            out = np.empty((len(rows), *spec.shape[1:]), np.float32)
            reader.read_rows(name, rows, out, verify=True)
            np.testing.assert_array_equal(out, tensors[name][rows.start:rows.stop])


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


def test_a_damaged_byte_is_found_by_the_rank_that_reads_it(stored):
    path, _ = stored
    with h5py.File(path) as f:
        dataset = f['layers/1/up']
        width = dataset.id.get_type().get_size() * CONFIG.hidden_size
        at = dataset.id.get_offset() + 130 * width  # row 130: the third block of 64 columns
    with open(path, 'r+b') as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 1]))
    with CheckpointReader(path) as reader:
        dtype = STORAGE[reader.kind('layers/1/up')]
        reader.read_rows('layers/1/up', range(0, 128), np.empty((128, 36), dtype), verify=True)
        with pytest.raises(CheckpointError, match=r'layers/1/up, rows 128 to 191: checksum differs'):
            reader.read_rows('layers/1/up', range(64, 200), np.empty((136, 36), dtype), verify=True)


def test_a_writer_that_fails_leaves_nothing_and_spares_what_was_there(tmp_path):
    path = tmp_path / 'model.h5'
    path.write_text('precious')
    with pytest.raises(CheckpointError, match='29 tensors are missing'), \
            CheckpointWriter(path, CONFIG, KINDS, TokenizerData(''), {}) as writer:
        writer.write('embedding', np.zeros((300, 36), np.float32))
        assert len(tensor_specs(CONFIG)) == 30
    assert [p.name for p in tmp_path.iterdir()] == ['model.h5'] and path.read_text() == 'precious'


def test_a_wrong_shape_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r'tensor embedding is \(2, 36\)'), \
            CheckpointWriter(tmp_path / 'm.h5', CONFIG, KINDS, TokenizerData(''), {}) as writer:
        writer.write('embedding', np.zeros((2, 36), np.float32))


# ---- files from elsewhere


def load_all(path):
    with CheckpointReader(path) as reader:
        for name in reader.specs:
            read_whole(reader, name)


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
        f.move('layers/1', 'hidden')
        f['layers/1'] = h5py.SoftLink('/hidden')
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
    (set_attribute('/', 'format_version', 2), 'format version 2; this tpmpi reads version 1'),
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


def test_random_damage_never_does_worse_than_an_error(tmp_path):
    """Flipped bytes anywhere, half of them in the metadata: an error of ours, or the right shapes; no crash, no hang."""
    tiny.write_model(tmp_path / 'good.h5', CONFIG)
    done = subprocess.run([sys.executable, PROGRAMS / 'damage.py', tmp_path / 'good.h5', '200'], capture_output=True,
                          text=True, timeout=120, env=environment())
    assert done.returncode == 0 and int(done.stdout) > 50, done.stderr


def test_a_variable_length_attribute_is_refused_unread(tmp_path):
    """HDF5 keeps such values in a heap whose damage makes the library loop for ever."""
    path = tmp_path / 'model.h5'
    tiny.write_model(path, CONFIG)
    with h5py.File(path, 'r+') as f:
        f['config'].attrs['activation'] = 'silu'
    with pytest.raises(CheckpointError, match='attribute activation of /config is of a type'):
        load_all(path)


def test_encode_matches_storage():
    assert encode(np.ones(3, np.float32), 'bfloat16').dtype == STORAGE['bfloat16']


@pytest.mark.parametrize('size', [1, 2, 5])
def test_a_rank_reads_its_own_bytes_only(tmp_path, size):
    """Measured by the kernel, on a model of 15 MB; a straddling KV head is the only part that two ranks read."""
    config = tiny.ModelConfig(vocab_size=8192, hidden_size=288, num_layers=4, num_heads=9, num_kv_heads=3, head_dim=32,
                              ffn_size=768, max_positions=64, tie_embeddings=True)
    path = tmp_path / 'model.h5'
    tensors = tiny.write_model(path, config)
    report = run_program('bytes_read.py', size, path)
    for read, weights in report:
        assert weights <= read <= weights + 100_000  # norms, metadata, tokenizer
    held = sum(len(shard(config, rank, size).kv_heads) for rank in range(size))
    twice = (held - config.num_kv_heads) * 2 * config.num_layers * config.head_dim * config.hidden_size * 4
    assert sum(w for _, w in report) == sum(4 * t.size for t in tensors.values() if t.ndim == 2) + twice
