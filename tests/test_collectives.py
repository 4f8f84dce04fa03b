"""How sums of device memory go: what an MPI library is believed, what is chosen, and that every way sums right."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import types
import warnings

import gpu_driver
import pytest
from ranks import PROGRAMS, environment, run_program, run_ranks

from tpmpi import comm as mpi
from tpmpi.collectives import (
    Nccl,
    Staged,
    Support,
    check_host,
    choose,
    gpu_support,
    load_nccl,
    mpi_answers,
    mpi_libraries,
    nccl_id,
)
from tpmpi.device import DeviceError

MPICH, OPEN_MPI = 'MPICH Version: 5.0.2', 'Open MPI v5.0.8, package: Open MPI builder@host Distribution'
CRAY = 'MPI VERSION : CRAY MPICH version 8.1.28.21 (ANL base 3.4a2)'
YES, NO = {'MPIX_Query_cuda_support': True}, {'MPIX_Query_cuda_support': False}
GPU_YES = {'MPIX_GPU_query_support': True}
CAN, CANNOT = Support(True, 'it can'), Support(False, 'it cannot')


# ---- what the library says


@pytest.mark.parametrize('library, kinds, answers, environ, supported, reason', [
    (MPICH, 'mpi,system', NO, {}, False, 'MPIX_Query_cuda_support of MPICH Version: 5.0.2 says no'),
    (MPICH, 'mpi,system,cuda:device', YES, {}, True, 'says yes'),
    (OPEN_MPI, None, YES, {}, True, 'MPIX_Query_cuda_support of Open MPI v5.0.8 says yes'),
    (OPEN_MPI, 'mpi,system,cuda:device', NO, {}, False, 'says no'),  # it echoes what a launcher asked for
    ('Some MPI', 'system,cuda', {}, {}, True, 'takes memory of the kinds system,cuda'),
    ('Some MPI', 'system, cuda:host:device', {}, {}, True, 'takes memory of the kinds'),
    ('Some MPI', 'system,cuda:host,rocm:device,cudax', {}, {}, False, 'does not say that it can'),
    ('Some MPI', None, {}, {}, False, 'Some MPI does not say that it can'),
    (CRAY, None, GPU_YES, {}, False, 'only with MPICH_GPU_SUPPORT_ENABLED=1'),
    (CRAY, None, GPU_YES, {'MPICH_GPU_SUPPORT_ENABLED': '0'}, False, 'MPICH_GPU_SUPPORT_ENABLED=1'),
    (CRAY, None, GPU_YES, {'MPICH_GPU_SUPPORT_ENABLED': '1'}, True, 'MPIX_GPU_query_support of MPI'),
    (CRAY, None, {}, {'MPICH_GPU_SUPPORT_ENABLED': '1'}, False, 'does not say'),
    ('Intel(R) MPI Library 2021.13 for Linux* OS', None, YES, {'I_MPI_OFFLOAD': '1'}, False, 'Intel GPUs only'),
    ('MVAPICH2 Version : 2.3.7', None, YES, {'MVP_USE_CUDA': '1'}, False, 'MV2_USE_CUDA=1'),
    ('MVAPICH2 Version : 2.3.7', None, YES, {'MV2_USE_CUDA': '1'}, True, 'says yes'),
    ('MVAPICH-Plus Version : 4.0', None, YES, {'MV2_USE_CUDA': '1'}, False, 'MVP_USE_CUDA=1'),
    ('MVAPICH-Plus Version : 4.0', None, YES, {'MVP_USE_CUDA': '1'}, True, 'says yes')])
def test_a_library_is_believed_only_where_it_says_yes(library, kinds, answers, environ, supported, reason):
    support = gpu_support(library, kinds, answers, environ)
    assert support.supported is supported and reason in support.reason


def support_here() -> Support:
    """Of the MPI that runs these tests, which on a cluster may take GPU memory."""
    return gpu_support(mpi.library(), mpi.Communicator().memory_kinds(), mpi_answers(mpi_libraries()), os.environ)


def test_the_library_that_runs_here_is_found_and_asked():
    libraries = mpi_libraries()
    assert libraries and all('.so' in path for path in libraries)
    assert mpi.library().partition(',')[0] in support_here().reason
    if all(path.startswith(sys.prefix) for path in libraries):  # a package of PyPI
        assert not support_here().supported


def test_libraries_are_those_of_the_memory_map(tmp_path):
    maps = tmp_path / 'maps'
    maps.write_text(''.join(f'7f0000000000-7f0000001000 r-xp 00000000 08:01 {i} {path}\n' for i, path in enumerate([
        '', '/opt/my mpi/libmpi.so.40.30', '/usr/lib/libmpich.so.12', '/cray/libmpi_gnu_123.so.12', '/x/libmpi_abi.so.0',
        '/x/libpmpi.so', '/x/libmpi.so.notes/file', '/x/libcompi.so', '/x/libimpish.so', '[heap]',
        '/opt/my mpi/libmpi.so.40.30'])))
    assert [path.rpartition('/')[2] for path in mpi_libraries(str(maps))] == [
        'libmpi.so.40.30', 'libmpich.so.12', 'libmpi_gnu_123.so.12', 'libmpi_abi.so.0', 'libpmpi.so']
    assert mpi_libraries(str(tmp_path / 'none')) == []


QUERY = 'int MPIX_Query_cuda_support(void) {{ return {}; }}'
GPU_QUERY = 'int MPIX_GPU_query_support(int type, int *is_supported) {{ *is_supported = type == 0 ? {} : 1; return {}; }}'


@pytest.mark.parametrize('sources, expected', [
    ([QUERY.format(1)], {'MPIX_Query_cuda_support': True}), ([QUERY.format(0)], {'MPIX_Query_cuda_support': False}),
    ([QUERY.format(-1)], {'MPIX_Query_cuda_support': False}),
    ([GPU_QUERY.format(1, 0)], {'MPIX_GPU_query_support': True}), ([GPU_QUERY.format(0, 0)], {'MPIX_GPU_query_support': False}),
    ([GPU_QUERY.format(1, 5)], {'MPIX_GPU_query_support': False}),
    ([QUERY.format(0), QUERY.format(1)], {'MPIX_Query_cuda_support': False}), (['int other;'], {})])
def test_queries_of_loaded_libraries(tmp_path, sources, expected):
    if shutil.which('gcc') is None:
        pytest.skip('no gcc: there is no library to ask')
    paths = []
    for number, source in enumerate(sources):
        paths.append(str(tmp_path / f'libmpi{number}.so'))
        subprocess.run(['gcc', '-shared', '-fPIC', '-x', 'c', '-', '-o', paths[-1]], input=source, text=True, check=True)
    assert mpi_answers(paths) == {}  # not loaded: they are nobody's MPI
    loaded = [ctypes.CDLL(path) for path in paths]
    assert len(loaded) == len(paths) and mpi_answers(paths) == expected and set(paths) <= set(mpi_libraries())


# ---- the choice


@pytest.mark.parametrize('asked, supports, expected', [
    ('auto', [CAN, CAN], ('mpi', 'it can')), ('auto', [CAN, CANNOT], ('staged', 'on rank 1 it cannot')),
    ('auto', [CANNOT, CAN], ('staged', 'on rank 0 it cannot')), ('mpi', [CAN, CAN], ('mpi', 'it can')),
    ('staged', [None, None], ('staged', 'as asked for')), ('nccl', [None, None], ('nccl', 'as asked for'))])
def test_all_ranks_choose_alike(asked, supports, expected):
    assert choose(asked, supports, shared=False) == expected


def test_mpi_is_not_tried_where_the_library_does_not_say_yes():
    with pytest.raises(DeviceError, match='collective mpi: on rank 1 it cannot; .* TPMPI_TRUST_GPU_MPI=1 where you know better'):
        choose('mpi', [CAN, CANNOT], shared=False)
    told = 'TPMPI_TRUST_GPU_MPI=1, although on rank 1 it cannot'
    assert choose('mpi', [CAN, CANNOT], shared=False, trusted=True) == ('mpi', told)
    assert choose('auto', [CAN, CANNOT], shared=False, trusted=True)[0] == 'staged'


def test_nccl_is_not_for_ranks_that_share_a_gpu():
    with pytest.raises(DeviceError, match='NCCL takes one rank for each GPU'):
        choose('nccl', [None, None], shared=True)
    assert choose('auto', [CANNOT, CAN], shared=True)[0] == 'staged'


def test_on_the_cpu_only_mpi_sums():
    for asked in ('auto', 'mpi'):
        check_host(asked)
    for asked in ('staged', 'nccl'):
        with pytest.raises(DeviceError, match=f'collective {asked}: the ranks compute on the CPU; use auto or mpi'):
            check_host(asked)


def carriers(*options, gpus=('[0, 1]', '[0, 1]'), **environ):
    """What api.load makes of it on two ranks with GPUs, and what is logged after the table of ranks."""
    done = run_ranks(2, PROGRAMS / 'open_device.py', json.dumps(dict(options)), *gpus, env=environment(**environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()[2:]


@pytest.mark.parametrize('collective, environ, name, reason', [
    ('auto', {}, 'Staged', 'all-reduce of GPU memory: staged (on rank 0 '), ('staged', {}, 'Staged', 'staged (as asked for)'),
    ('mpi', {'TPMPI_TRUST_GPU_MPI': '1'}, 'Direct', 'mpi (TPMPI_TRUST_GPU_MPI=1, although on rank 0 '),
    ('nccl', {}, 'Nccl', 'nccl (as asked for)')])
def test_ranks_with_gpus_carry_alike_and_say_it_once(collective, environ, name, reason):
    if support_here().supported and collective in ('auto', 'mpi'):
        pytest.skip('this MPI takes GPU memory, and is right')
    found, log = carriers(('collective', collective), **environ)
    assert found == [['cuda:0 Fake GPU', 1, name], ['cuda:1 Fake GPU', 1, name]]
    assert len(log) == 1 and reason in log[0]


def test_what_cannot_be_carried_ends_all_ranks_with_one_line():
    if not support_here().supported:
        (one, other), log = carriers(('collective', 'mpi'))
        assert one == other and one.startswith('collective mpi: on rank 0 ') and not log
    (one, other), log = carriers(('collective', 'nccl'), ('share_gpu', True), gpus=('[0]', '[0]'))
    assert one == other and one.startswith('collective nccl: NCCL takes one rank for each GPU') and not log
    (one, other), _ = carriers(('collective', 'staged'), ('device', 'cpu'))
    assert one == other == 'collective staged: the ranks compute on the CPU; use auto or mpi, or --device cuda'


# ---- the carriers


@pytest.mark.parametrize('collective, size', [('mpi', 2), ('staged', 2), ('staged', 3)])
def test_ranks_sum_device_arrays(collective, size):
    report = run_program('device_sums.py', size, collective)
    assert report['right'] == [[True] * 6] * size and report['traffic'] == [6, 4 * (3 * 6 + 3 + 2 * 20)]
    assert report['waits'] == ([1] * 6 if collective == 'mpi' else [1, 1, 1, 2, 1, 1])  # once more before the buffer goes
    assert report['buffers'] == ([] if collective == 'mpi' else [24, 80])


def test_a_missing_wait_would_be_seen():
    assert run_program('device_sums.py', 2, 'impatient')['right'] == [[False] * 6] * 2


def test_no_pinned_memory_is_one_line():
    def refuse(nbytes):
        raise gpu_driver.CUDARuntimeError('cudaErrorMemoryAllocation: out of memory')

    xp = types.SimpleNamespace(cuda=types.SimpleNamespace(alloc_pinned_memory=refuse))
    with pytest.raises(DeviceError, match=r'^collective staged: no pinned memory of 4,096 bytes \(cudaErrorMemoryAllocation'):
        Staged(xp, gpu_driver.Stream(), 4096)


def test_nccl_joins_the_stream_and_nobody_waits():
    stream, x = gpu_driver.Stream(), types.SimpleNamespace(data=types.SimpleNamespace(ptr=1234), size=6)
    assert nccl_id(gpu_driver.Nccl, 1) is None
    carrier = Nccl(gpu_driver.Nccl, 2, nccl_id(gpu_driver.Nccl, 0), 1, stream)
    carrier.sum(x, lambda _: pytest.fail('MPI has nothing to do'))
    assert stream.waits == 0
    carrier.close()
    assert gpu_driver.Nccl.calls == [('made', 2, 1), (1234, 1234, 6, 7, 0, stream.ptr), 'destroyed'] and stream.waits == 1


def test_nccl_that_does_not_begin_is_one_line():
    with pytest.raises(DeviceError, match=r'^collective nccl: RuntimeError: NCCL_ERROR_INVALID_ARGUMENT: invalid argument; '):
        Nccl(gpu_driver.Nccl, 2, None, 0, gpu_driver.Stream())


def test_nccl_is_loaded_or_its_absence_told(monkeypatch):
    gpu_driver.install(monkeypatch, gpu_driver.make(nccl=gpu_driver.Nccl))
    assert load_nccl() is gpu_driver.Nccl
    gpu_driver.install(monkeypatch, gpu_driver.make())
    with pytest.raises(DeviceError, match=r'NCCL cannot be loaded \(CuPy has none\); pip install nvidia-nccl-cu12 or'):
        load_nccl()


def test_the_warning_of_cupy_becomes_the_reason(monkeypatch, tmp_path):
    for name in gpu_driver.PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / 'cupy' / 'cuda').mkdir(parents=True)
    for folder in ('cupy', 'cupy/cuda'):
        (tmp_path / folder / '__init__.py').touch()
    (tmp_path / 'cupy/cuda/nccl.py').write_text(  # as CuPy 14 does
        'import warnings\navailable = False\n'
        r"warnings.warn('\nnccl library could not be loaded.\n\nReason: ImportError (libnccl.so.2: cannot open)\n\nYou can ...')")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(), pytest.raises(DeviceError, match=r'NCCL cannot be loaded \(ImportError \(libnccl\.so\.2: '):
        warnings.simplefilter('error')
        load_nccl()
    for name in gpu_driver.PARTS:
        sys.modules.pop(name, None)


def test_memory_kinds_are_a_list_or_nothing():
    kinds = mpi.Communicator().memory_kinds()
    assert kinds is None or 'system' in kinds.split(',')
