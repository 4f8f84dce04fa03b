"""Writing a model file: all of it or nothing, and after an interruption the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import stat

import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.checkpoint import CheckpointReader
from tpmpi.checkpoint_writer import CheckpointWriter, unfinished_tensors
from tpmpi.file_layout import CheckpointError, TokenizerData
from tpmpi.sharding import tensor_specs
from tpmpi.weights import encode

CONFIG = tiny.NINE_HEADS
KINDS = dict.fromkeys(tensor_specs(CONFIG), 'float32')


def test_a_writer_that_fails_leaves_nothing_and_spares_what_was_there(tmp_path):
    path = tmp_path / 'model.h5'
    path.write_text('precious')
    with pytest.raises(CheckpointError, match='29 tensors are missing'), \
            CheckpointWriter(path, CONFIG, KINDS, TokenizerData(''), {}) as writer:
        writer.write('embedding', encode(np.zeros((300, 36)), 'float32'))
        assert len(tensor_specs(CONFIG)) == 30
    assert [p.name for p in tmp_path.iterdir()] == ['model.h5'] and path.read_text() == 'precious'


def test_a_wrong_shape_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r'tensor embedding is \(2, 36\)'), \
            CheckpointWriter(tmp_path / 'm.h5', CONFIG, KINDS, TokenizerData(''), {}) as writer:
        writer.write('embedding', encode(np.zeros((2, 36)), 'float32'))


def test_the_wrong_kind_or_axis_is_not_written(tmp_path):
    kinds = dict.fromkeys(tensor_specs(tiny.GROUPS), 'float32') | {'layers/0/down': 'int8'}
    square = np.zeros((160, 64), np.float32)
    with pytest.raises(CheckpointError, match='expected int8 along axis 0'), \
            CheckpointWriter(tmp_path / 'm.h5', tiny.GROUPS, kinds, TokenizerData(''), {}) as writer:
        writer.write('layers/0/down', encode(square, 'int8', 1))
    with pytest.raises(CheckpointError, match='tensor layers/0/attn_norm cannot be int8: a vector'):
        CheckpointWriter(tmp_path / 'm.h5', tiny.GROUPS, kinds | {'layers/0/attn_norm': 'int8'}, TokenizerData(''), {})
    assert list(tmp_path.iterdir()) == []


# ---- interruptions


def start(path, resume=False, origin=None):
    return CheckpointWriter(path, CONFIG, KINDS, TokenizerData('{}'), {'source': 'random'}, origin=origin or {'seed': '0'},
                            resume=resume)


def write_some(path, count, resume=False):
    """Write up to `count` tensors, then interrupt; returns the writer."""
    with contextlib.suppress(KeyboardInterrupt), start(path, resume) as writer:
        for name, tensor in list(tiny.random_tensors(CONFIG).items())[:count]:
            if name not in writer.done:
                writer.write(name, encode(tensor, 'float32', writer.specs[name].group_axis))
        if count < len(writer.specs):
            raise KeyboardInterrupt
    return writer


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """(part, journal) of an interrupted writer with 12 of 30 tensors, and the bytes of a whole file."""
    folder = tmp_path_factory.mktemp('interrupted')
    write_some(folder / 'whole.h5', 30)
    write_some(folder / 'm.h5', 12)
    assert sorted(p.name for p in folder.iterdir()) == ['.m.h5.part', '.m.h5.part.journal', 'whole.h5']
    return ((folder / '.m.h5.part').read_bytes(), (folder / '.m.h5.part.journal').read_bytes()), \
        (folder / 'whole.h5').read_bytes()


@settings(max_examples=25)
@given(data=st.data())
def test_a_torn_journal_costs_what_it_lost(interrupted, tmp_path_factory, data):
    """Cut at any byte, with or without the zeros that a file system may leave there."""
    (part, journal), whole = interrupted
    cut = data.draw(st.integers(0, len(journal)))
    folder = tmp_path_factory.mktemp('torn')
    (folder / '.m.h5.part').write_bytes(part)
    (folder / '.m.h5.part.journal').write_bytes(journal[:cut] + bytes(data.draw(st.integers(0, 3))))
    writer = write_some(folder / 'm.h5', 30, resume=True)
    assert len(writer.done) == max(0, journal[:cut].count(b'\n') - 1)
    assert (folder / 'm.h5').read_bytes() == whole and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize('damage', [b'\0', b'\xff'])
def test_whatever_a_crash_left_of_hdf5_s_own_bytes_is_written_anew(interrupted, tmp_path, damage):
    (part, journal), whole = interrupted
    with h5py.File(io.BytesIO(part)) as f:
        places = [(f[name].id.get_offset(), f[name].nbytes) for name in KINDS]
    left = bytearray(damage * len(part))
    for at, size in places:
        left[at:at + size] = part[at:at + size]
    (tmp_path / '.m.h5.part').write_bytes(left)
    (tmp_path / '.m.h5.part.journal').write_bytes(journal)
    assert len(write_some(tmp_path / 'm.h5', 30, resume=True).done) == 12
    assert (tmp_path / 'm.h5').read_bytes() == whole


def test_a_crash_before_the_file_gets_its_name(interrupted, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('os.replace', crash)
        write_some(tmp_path / 'm.h5', 30)
    assert not (tmp_path / 'm.h5').exists()
    assert len(write_some(tmp_path / 'm.h5', 30, resume=True).done) == 30
    assert (tmp_path / 'm.h5').read_bytes() == interrupted[1]


def test_what_cannot_be_resumed_is_refused_and_kept(tmp_path):
    write_some(tmp_path / 'm.h5', 12)
    part, journal = tmp_path / '.m.h5.part', tmp_path / '.m.h5.part.journal'
    with pytest.raises(CheckpointError, match="seed changed from '0' to '1'; start over without --resume"):
        start(tmp_path / 'm.h5', resume=True, origin={'seed': '1'})
    size = part.stat().st_size
    os.truncate(part, size - 1)
    with pytest.raises(CheckpointError, match='.m.h5.part was cut, or made by another version of HDF5'):
        start(tmp_path / 'm.h5', resume=True)
    assert part.stat().st_size == size - 1 and journal.read_bytes().count(b'\n') == 13
    target = tmp_path / 'precious'
    target.write_text('precious')
    part.unlink()
    part.symlink_to(target)
    write_some(tmp_path / 'm.h5', 30, resume=True)
    assert target.read_text() == 'precious' and not part.is_symlink() and (tmp_path / 'm.h5').exists()


def device(path):
    """What /dev/null is, under another name."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip('making a device needs root')


def entries(folder):
    """What lies in a folder, but for the times at which it was read: looking at a link counts as reading it."""
    found = {p.name: p.lstat() for p in folder.iterdir()}
    return {name: (s.st_mode, s.st_ino, s.st_nlink, s.st_uid, s.st_size, s.st_mtime_ns) for name, s in found.items()}


@pytest.mark.parametrize('linked', [False, True])
@pytest.mark.parametrize(('make', 'what'), [
    (device, 'is no regular file'), (os.mkfifo, 'is no regular file'), (os.mkdir, 'is a folder'),
    (lambda path: os.symlink(path, path), 'is no regular file')], ids=['device', 'pipe', 'folder', 'circle'])
def test_what_is_no_file_is_never_replaced(tmp_path, make, what, linked):
    path = tmp_path / 'm.h5'
    make(tmp_path / 'there' if linked else path)
    if linked:
        path.symlink_to('there')
    before = entries(tmp_path)
    with pytest.raises(CheckpointError, match=f'm.h5: {what}; give the name of the file to write'):
        start(path)
    assert entries(tmp_path) == before


@pytest.mark.parametrize('exists', [False, True])
def test_a_link_stays_and_its_target_is_written(tmp_path, interrupted, exists):
    (tmp_path / 'far').mkdir()
    if exists:
        (tmp_path / 'far' / 'real.h5').write_text('old')
    (tmp_path / 'm.h5').symlink_to('far/real.h5')
    write_some(tmp_path / 'm.h5', 12)
    assert unfinished_tensors(tmp_path / 'm.h5') == 12
    assert len(write_some(tmp_path / 'm.h5', 30, resume=True).done) == 12
    assert (tmp_path / 'm.h5').is_symlink() and (tmp_path / 'far' / 'real.h5').read_bytes() == interrupted[1]
    assert [p.name for p in (tmp_path / 'far').iterdir()] == ['real.h5']


def test_a_name_that_is_no_unicode_is_written_as_it_can_be(tmp_path):
    with CheckpointWriter(tmp_path / 'm.h5', CONFIG, KINDS, TokenizerData(''), {'source': 'b\udcffd'}) as writer:
        for name, spec in tensor_specs(CONFIG).items():
            writer.write(name, encode(np.zeros(spec.shape), 'float32', spec.group_axis))
    with CheckpointReader(tmp_path / 'm.h5') as reader:
        assert reader.provenance() == {'source': 'b?d'}


def test_one_writer_at_a_time(tmp_path):
    """Also where the first one ends while the second one waits at the door, which then has a journal of its own."""
    writer = start(tmp_path / 'm.h5')
    for resume in (False, True):
        with pytest.raises(CheckpointError, match='another process is writing this file'):
            start(tmp_path / 'm.h5', resume)
    with pytest.raises(CheckpointError, match='30 tensors are missing'), writer:
        pass
    write_some(tmp_path / 'm.h5', 30)
    assert [p.name for p in tmp_path.iterdir()] == ['m.h5']
