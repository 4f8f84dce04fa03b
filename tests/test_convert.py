"""The conversion command: what it writes is the source, and what it cannot is one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from ranks import environment
from references import FOLDER

from tpmpi.checkpoint import CheckpointReader
from tpmpi.convert import convert, main
from tpmpi.weights import decode

pytest.importorskip('safetensors', reason='safetensors is not installed (the test extra has it)')
SOURCE = FOLDER / 'tiny_llama'


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'tpmpi.convert', *map(str, arguments)], capture_output=True, text=True,
                          env=environment(), timeout=180)


def source_bits() -> dict[str, np.ndarray]:
    """The bfloat16 tensors of the source as their bits, by the format's description: a length, a JSON header, the bytes."""
    data = (SOURCE / 'model.safetensors').read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + length])
    header.pop('__metadata__', None)
    assert {entry['dtype'] for entry in header.values()} == {'BF16'}
    return {name: np.frombuffer(data[8 + length:][slice(*entry['data_offsets'])], '<u2').reshape(entry['shape'])
            for name, entry in header.items()}


def stored(path, name):
    with CheckpointReader(path) as reader:
        return reader.kind(name), decode(reader.read_rows(name, range(reader.specs[name].shape[0]), verify=True))


@pytest.mark.parametrize(('options', 'kind'), [((), 'bfloat16'), (('--weights', 'float32'), 'float32')])
def test_the_tensors_are_the_source_s(tmp_path, options, kind):
    source = source_bits()
    assert run(SOURCE, tmp_path / 'model.h5', *options).returncode == 0
    for ours, theirs, transposed in (
            ('embedding', 'model.embed_tokens.weight', False), ('head', 'lm_head.weight', False),
            ('layers/1/q', 'model.layers.1.self_attn.q_proj.weight', False),
            ('layers/2/attn_out', 'model.layers.2.self_attn.o_proj.weight', True),
            ('layers/0/down', 'model.layers.0.mlp.down_proj.weight', True),
            ('layers/0/gate', 'model.layers.0.mlp.gate_proj.weight', False)):
        found, tensor = stored(tmp_path / 'model.h5', ours)
        expected = (source[theirs].astype(np.uint32) << 16).view(np.float32)
        assert found == kind
        np.testing.assert_array_equal(tensor, expected.T if transposed else expected)
    assert stored(tmp_path / 'model.h5', 'layers/0/attn_norm')[0] == 'float32'


@pytest.mark.parametrize('options', [(), ('--weights', 'float16'), ('--weights', 'float32')])
def test_a_source_of_float16_stays_float16_to_the_last_bit(tmp_path, options):
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, tmp_path / 'source')
    values = {name: (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16) for name, bits in source_bits().items()}
    values['lm_head.weight'][0, :3] = 2 ** -24, -65504, -0.0
    save_file(values, tmp_path / 'source' / 'model.safetensors')
    done = run(tmp_path / 'source', tmp_path / 'model.h5', *options)
    kind = 'float32' if 'float32' in options else 'float16'
    assert done.returncode == 0 and f'float16 -> {kind}, exact: ' in done.stderr
    for ours, theirs in (('head', values['lm_head.weight']), ('layers/0/down', values['model.layers.0.mlp.down_proj.weight'].T)):
        found, tensor = stored(tmp_path / 'model.h5', ours)
        assert found == kind and tensor.astype(np.float16).tobytes() == theirs.tobytes()


def test_integers_that_do_not_fit_are_bfloat16_and_the_command_says_so(tmp_path):
    """Rows of 36 are no whole groups; down and attn_out have units of 64 and of 8 rows, and 200 rows in all."""
    done = run(SOURCE, tmp_path / 'model.h5', '--weights', 'int8')
    lines = [line.removeprefix('tpmpi.convert: ') for line in done.stderr.splitlines()]
    assert lines[:2] == ['bfloat16 -> bfloat16, exact: 23 tensors', 'bfloat16 -> float32, exact: 7 tensors']
    assert 'q (3) is bfloat16 because int8 does not fit: 36 columns, no multiple of 32' in lines
    why = 'its 200 rows are split in units of 64, not in multiples of 32'
    assert f'down (3) is bfloat16 because int8 does not fit: {why}' in lines
    assert stored(tmp_path / 'model.h5', 'layers/0/q')[0] == 'bfloat16'


@pytest.mark.parametrize(('value', 'message'), [(np.nan, 'q_proj.weight: a weight is not a finite number'),
                                                (1e7, 'q_proj.weight: a weight has the magnitude 1e+07; int8 reaches')])
def test_weights_that_integers_cannot_hold_are_one_line(tmp_path, value, message):
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, tmp_path / 'source')
    change_config(hidden_size=64)(tmp_path / 'source')
    tensors = {name: np.ones([64 if n == 36 else n for n in bits.shape], np.float32) for name, bits in source_bits().items()}
    tensors['model.layers.1.self_attn.q_proj.weight'][5, 5] = value
    save_file(tensors, tmp_path / 'source' / 'model.safetensors')
    done = run(tmp_path / 'source', tmp_path / 'model.h5', '--weights', 'int8')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / 'model.h5').exists()
    assert run(tmp_path / 'source', tmp_path / 'model.h5', '--weights', 'bfloat16').returncode == 0


def test_an_existing_file_is_replaced_only_by_a_whole_one(tmp_path):
    out = tmp_path / 'model.h5'
    out.write_text('old')
    broken = tmp_path / 'broken'
    shutil.copytree(SOURCE, broken)
    data = (broken / 'model.safetensors').read_bytes()
    (broken / 'model.safetensors').write_bytes(data[:len(data) // 2])
    assert run(broken, out).returncode != 0 and out.read_text() == 'old'
    assert run(SOURCE, out).returncode == 0 and out.read_bytes()[1:4] == b'HDF'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken', 'model.h5']


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | changes))
    return change


@pytest.mark.parametrize(('change', 'message'), [
    (lambda f: shutil.rmtree(f), 'does not exist'),
    (lambda f: (f / 'config.json').unlink(), 'no config.json'),
    (lambda f: (f / 'config.json').write_text('{'), 'not valid JSON'),
    (lambda f: (f / 'model.safetensors').unlink(), 'safetensors'),
    (lambda f: (f / 'tokenizer.json').unlink(), 'tokenizer.json'),
    (change_config(architectures=['FooForCausalLM']), 'FooForCausalLM'),
    (change_config(attention_sinks=4), 'attention_sinks'),
    (change_config(hidden_act='mish'), 'mish'),
    (change_config(num_hidden_layers=4), 'layers.3'),
    (change_config(intermediate_size=199), r'shape'),
])
def test_what_cannot_be_converted_is_one_line(tmp_path, change, message):
    folder = tmp_path / 'source'
    shutil.copytree(SOURCE, folder)
    change(folder)
    done = run(folder, tmp_path / 'model.h5')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / 'model.h5').exists()


@pytest.mark.parametrize(('out', 'message'), [('nowhere/model.h5', 'does not exist'), ('.', 'is a folder')])
def test_where_nothing_can_be_written_is_one_line(tmp_path, out, message):
    done = run(SOURCE, tmp_path / out)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr


def hard_link(out, source):
    os.link(source, out)


def link_of_a_link(out, source):
    (out.parent / 'between').symlink_to(source)
    out.symlink_to('between')


@pytest.mark.parametrize('file', ['model.safetensors', 'config.json', 'tokenizer.json', 'chat_template.jinja'])
@pytest.mark.parametrize('way', [None, Path.symlink_to, hard_link, link_of_a_link])
def test_no_file_of_the_source_is_replaced(tmp_path, file, way):
    shutil.copytree(SOURCE, tmp_path / 'source')
    out = tmp_path / 'source' / file if way is None else tmp_path / 'out.h5'
    if way is not None:
        way(out, tmp_path / 'source' / file)
    done = run(tmp_path / 'source', out)
    message = f'{out}: is {tmp_path / "source" / file}, which the model is read from; give the name of another file to write'
    assert (done.returncode, done.stderr) == (1, f'tpmpi.convert: {message}\n')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'source').iterdir()} == {
        p.name: p.read_bytes() for p in SOURCE.iterdir()}


def test_a_file_beside_the_source_s_is_replaced_and_a_link_stays(tmp_path):
    shutil.copytree(SOURCE, tmp_path / 'source')
    (tmp_path / 'out.h5').symlink_to('source/model.h5')
    for _ in range(2):
        assert run(tmp_path / 'source', tmp_path / 'out.h5').returncode == 0
    assert (tmp_path / 'out.h5').is_symlink() and (tmp_path / 'source' / 'model.h5').read_bytes()[1:4] == b'HDF'


def test_a_device_is_refused_before_anything_is_read(tmp_path):
    try:
        os.mknod(tmp_path / 'null', stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip('making a device needs root')
    (tmp_path / 'link').symlink_to('null')
    for name in ('null', 'link'):
        done = run('no/source', tmp_path / name)
        message = f'{tmp_path / name}: is no regular file; give the name of the file to write'
        assert (done.returncode, done.stderr) == (1, f'tpmpi.convert: {message}\n')
    assert stat.S_ISCHR((tmp_path / 'null').stat().st_mode) and (tmp_path / 'link').is_symlink()


@pytest.mark.parametrize('changes', [{'version': 'x'}, {'decoder': 5}, {'post_processor': {'type': 'x'}}])
def test_a_tokenizer_that_no_run_loads_is_one_line(tmp_path, changes):
    shutil.copytree(SOURCE, tmp_path / 'source')
    tokenizer = json.loads((SOURCE / 'tokenizer.json').read_text())
    (tmp_path / 'source' / 'tokenizer.json').write_text(json.dumps(tokenizer | changes))
    done = run(tmp_path / 'source', tmp_path / 'model.h5')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f'{tmp_path / "source"}: tokenizer.json is broken: ' in done.stderr and 'no run could load it' in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['source']


def test_a_folder_whose_name_is_no_unicode(tmp_path):
    folder = tmp_path / os.fsdecode(b'bad\xff')
    shutil.copytree(SOURCE, folder)
    assert run(folder, tmp_path / 'model.h5').returncode == 0
    with CheckpointReader(tmp_path / 'model.h5') as reader:
        assert reader.provenance()['source'] == 'bad?'


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def read(*_, **__):
        raise MemoryError('Unable to allocate 9 GiB')

    monkeypatch.setattr(np, 'fromfile', read)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    assert main([str(SOURCE), str(tmp_path / 'model.h5')]) == 1
    assert capsys.readouterr().err == (
        'tpmpi.convert: out of memory: Unable to allocate 9 GiB; take a machine with more\n')
    assert list(tmp_path.iterdir()) == []


LARGEST = {np.float32: 3.4028235e38, np.float16: 65504}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(('source', 'options'), [
    (np.float32, []), (np.float16, []), (np.float32, ['--weights', 'bfloat16']), (np.float16, ['--weights', 'float32'])])
def test_weights_that_are_not_finite_are_counted(tmp_path, source, options, value):
    """The last number of a tensor counts, and a vector; the largest number of a type does not."""
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, tmp_path / 'source')
    tensors = {name: np.zeros(bits.shape, source) for name, bits in source_bits().items()}
    tensors['lm_head.weight'][0] = 3e38 if 'bfloat16' in options else LARGEST[source]
    save_file(tensors, tmp_path / 'source' / 'model.safetensors')
    assert 'warning' not in run(tmp_path / 'source', tmp_path / 'model.h5', *options).stderr
    for name in ('model.layers.1.self_attn.o_proj.weight', 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'):
        tensors[name][..., -1] = value
    save_file(tensors, tmp_path / 'source' / 'model.safetensors')
    done = run(tmp_path / 'source', tmp_path / 'model.h5', *options)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if 'warning' in line] == [
        f'tpmpi.convert: warning: NaN or infinity in 3 of 30 tensors, first in {tmp_path / "source" / "model.safetensors"}: '
        'model.layers.1.self_attn.o_proj.weight; what a run computes with it is no text: check the source']


def test_a_full_disk_leaves_nothing(tmp_path):
    """A file system of its own that has room for the tensors, but not for the whole file."""
    assert run(SOURCE, tmp_path / 'model.h5', '--weights', 'float32').returncode == 0
    size = (tmp_path / 'model.h5').stat().st_size - 8192
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size // 4096 * 4096}', 'tmpfs', disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip('mounting a small file system needs root')
    try:
        done = run(SOURCE, disk / 'model.h5', '--weights', 'float32')
        left = list(disk.iterdir())
    finally:
        subprocess.run(['umount', disk], check=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 'No space left on device while writing tensor' in done.stderr and left == []


# ---- interruptions

SLOW = '''
import sys, time
import numpy as np
from tpmpi import checkpoint_writer, convert
def slowly(path, dtype, count, offset):
    with open(sys.argv[1], 'a') as file:
        print(offset, file=file)
    time.sleep(float(sys.argv[2]))
    return fromfile(path, dtype=dtype, count=count, offset=offset)
fromfile, np.fromfile, checkpoint_writer.SYNC_SECONDS = np.fromfile, slowly, 0
sys.exit(convert.main(sys.argv[3:]))
'''


class Conversion:
    """The command in a process of its own that waits before it reads a tensor, and notes where; every tensor is synced."""

    def __init__(self, folder, *options, seconds=0.02, source=SOURCE):
        self.out, self.reads = folder / 'model.h5', folder / 'reads'
        self.part, self.journal = folder / '.model.h5.part', folder / '.model.h5.part.journal'
        self.reads.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, '-c', SLOW, self.reads, str(seconds), source, self.out, *options], stderr=subprocess.PIPE,
            text=True, env=environment())

    def until(self, lines: int):
        """Waits until the journal has so many lines, or the conversion ends; returns self."""
        deadline = time.monotonic() + 180
        while self.process.poll() is None and len(self.lines()) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self

    def lines(self) -> list[str]:
        try:
            return self.journal.read_text().split('\n')[:-1]
        except FileNotFoundError:
            return []

    def end(self, number=None) -> tuple[int, list[str]]:
        """The exit code and the lines of standard error, after a signal."""
        if number is not None:
            self.process.send_signal(number)
        lines = self.process.communicate(timeout=180)[1].splitlines()
        return self.process.returncode, [line.removeprefix('tpmpi.convert: ') for line in lines]

    def offsets(self) -> set[int]:
        """Where the source was read; each tensor at most once."""
        found = self.reads.read_text().split() if self.reads.exists() else []
        assert len(found) == len(set(found))
        return set(map(int, found))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted conversion's bytes."""
    out = tmp_path_factory.mktemp('whole') / 'model.h5'
    assert run(SOURCE, out).returncode == 0
    return out.read_bytes()


@pytest.mark.parametrize('seed', range(4))
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(tmp_path, whole, seed):
    """What the journal had is not read again; what a kill left of other tensors is overwritten."""
    dice, read, done = random.Random(seed), [], 0
    for _ in range(3):
        run = Conversion(tmp_path, '--resume').until(done + dice.randint(0, 10))
        time.sleep(dice.random() * 0.03)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
        read.append(run.offsets())
        done = len(run.lines())
    last = Conversion(tmp_path, '--resume', seconds=0)
    code, lines = last.end()
    read.append(last.offsets())
    assert code == 0 and (f'{done - 1} of 30 tensors were there already' in lines) == (done > 1), lines
    assert (tmp_path / 'model.h5').read_bytes() == whole
    assert len(set.union(*read)) == 30 and len(read[-1]) == 30 - max(0, done - 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.h5', 'reads']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_how_to_go_on(tmp_path, whole, number):
    run = Conversion(tmp_path, seconds=0.1).until(8)
    code, lines = run.end(number)
    done = len(set(run.lines())) - 1
    assert (code, lines) == (75, [f'interrupted; {done} of 30 tensors are done, the same command with --resume does the rest'])
    assert done >= 7 and not run.out.exists()
    again = Conversion(tmp_path, '--resume', seconds=0)
    assert again.end()[0] == 0 and again.out.read_bytes() == whole and len(again.offsets()) == 30 - done


def touch(file):
    def change(folder):
        os.utime(folder / file, ns=(1, 1))
    return change


@pytest.mark.parametrize(('change', 'options', 'message'), [
    (touch('model.safetensors'), [], 'model.safetensors changed from'),
    (lambda folder: None, ['--weights', 'float32'], 'the kinds of the tensors (--weights) changed from'),
    (lambda folder: change_config(eos_token_id=5)(folder), [], "the source's config.json sha256 changed from"),
])
def test_another_source_is_not_mixed_in(tmp_path, change, options, message):
    shutil.copytree(SOURCE, tmp_path / 'source')
    killed = Conversion(tmp_path, source=tmp_path / 'source').until(5)
    killed.end(signal.SIGKILL)
    before = killed.journal.read_bytes(), killed.part.read_bytes()
    change(tmp_path / 'source')
    code, lines = Conversion(tmp_path, '--resume', *options, seconds=0, source=tmp_path / 'source').end()
    assert code == 1 and len(lines) == 1 and f'cannot be resumed, {message}' in lines[0], lines
    assert 'start over without --resume' in lines[0] and (killed.journal.read_bytes(), killed.part.read_bytes()) == before
    fresh = Conversion(tmp_path, *options, seconds=0, source=tmp_path / 'source')
    assert fresh.end()[0] == 0 and len(fresh.offsets()) == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.h5', 'reads', 'source']


def test_a_source_that_changes_meanwhile_gives_no_file(tmp_path):
    shutil.copytree(SOURCE, tmp_path / 'source')
    shutil.copy(tmp_path / 'source' / 'model.safetensors', tmp_path / 'other')
    conversion = Conversion(tmp_path, seconds=0.05, source=tmp_path / 'source').until(3)
    os.replace(tmp_path / 'other', tmp_path / 'source' / 'model.safetensors')
    code, lines = conversion.end()
    assert code == 1 and len(lines) == 1 and 'model.safetensors: has changed while it was read' in lines[0], lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ['reads', 'source']


def test_two_conversions_to_one_file(tmp_path, whole):
    first = Conversion(tmp_path, seconds=0.1).until(3)
    first.process.send_signal(signal.SIGSTOP)  # however long the others take to start
    try:
        for options in ([], ['--resume']):
            done = run(SOURCE, tmp_path / 'model.h5', *options)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'another process is writing' in done.stderr
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert first.end()[0] == 0 and first.out.read_bytes() == whole


def test_every_byte_of_many_files_is_read_once(tmp_path, whole, monkeypatch):
    """The tensors come in the order of the model; those of one file may lie anywhere in it."""
    from safetensors.numpy import save_file
    shutil.copytree(SOURCE, tmp_path / 'source')
    (tmp_path / 'source' / 'model.safetensors').unlink()
    bits = source_bits()
    weight_map = {name: f'part-{i % 3}.safetensors' for i, name in enumerate(bits)}
    for file in set(weight_map.values()):
        held = {name: b.astype(np.float32) for name, b in bits.items() if weight_map[name] == file}
        save_file(held, tmp_path / 'source' / file)
    (tmp_path / 'source' / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    reads, fromfile = defaultdict(list), np.fromfile

    def noted(path, dtype, count, offset):
        reads[Path(path).name].append((offset, offset + count * np.dtype(dtype).itemsize))
        return fromfile(path, dtype=dtype, count=count, offset=offset)

    monkeypatch.setattr(np, 'fromfile', noted)
    convert(tmp_path / 'source', tmp_path / 'model.h5')
    assert set(reads) == set(weight_map.values())
    for file, ranges in reads.items():
        data = (tmp_path / 'source' / file).read_bytes()
        ends = [8 + int.from_bytes(data[:8], 'little'), *(stop for _, stop in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == ends[:-1] and ends[-1] == len(data)
