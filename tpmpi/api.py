"""The Python interface: load a model on all ranks, generate, stream.

    import tpmpi

    llm = tpmpi.load('model.h5')
    result = llm.generate('In the beginning', max_new_tokens=20)
    if llm.rank == 0:
        print(result.text)

Run alone, or as `mpirun -n 4 python script.py`: every rank runs the same script, and gets the same tokens; the text is
rank 0's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import operator
import os
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Integral
from pathlib import Path

from tpmpi import comm as mpi
from tpmpi import session as sessions
from tpmpi.config import ConfigError, RunConfig

DEFAULT_NEW_TOKENS = 128
MOST_COMPILERS = 4  # at once on a node: the kernel that takes longest is a third of all

log = logging.getLogger(__name__)


def bundled_model() -> Path:
    """The model that comes with the package."""
    package = Path(__file__).parent
    for folder in (package / 'data', package.parent / 'data'):  # installed; in a checkout
        if (folder / 'kjv.h5').exists():
            return folder / 'kjv.h5'
    raise ConfigError('the bundled model kjv.h5 is not installed; give --model FILE')


class LLM:
    """A model, loaded on all ranks.  Every rank calls the same methods with the same arguments.

    `close`, or the end of a `with` block, gives its memory back; a script may have several models beside each other.
    """

    def __init__(self, session, engine, tracer=None):
        self.session, self.engine, self.tracer = session, engine, tracer
        self.comm = None  # its own communicator, where it has one
        self.config, self.tokenizer = engine.model.config, engine.tokenizer
        self.requests = 0

    @property
    def rank(self) -> int:
        """This rank's number; rank 0 is the one that should print."""
        return self.session.comm.rank

    def request(self, prompt: str | Sequence[int] | Sequence[dict], **params):
        """A checked request.  prompt: text, token ids (an array, too), or chat messages ({'role', 'content'}).

        params: those of sampling.SamplingParams; without max_new_tokens, 128 or what the model's length leaves.  With a seed
        the text is the same each time.
        Raises ValueError on all ranks alike.
        """
        self.engine.check()
        self.session.check_streams()
        tokens = self.session.comm.share(self.session.agreed(self._encode, prompt))
        return self.session.agreed(self._request, tokens, **params)

    def _encode(self, prompt) -> list[int] | None:
        if self.rank != 0:
            return None
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.apply_chat_template(list(prompt))
        return _token_ids(prompt)

    def _request(self, tokens: list[int], **params):
        from tpmpi.sampling import SamplingParams
        if params.get('max_new_tokens') is None:
            params['max_new_tokens'] = min(DEFAULT_NEW_TOKENS, self.engine.room(tokens))
        if params.get('seed') is None:
            params.pop('seed', None)
        noise = 0 if 'seed' in params else self.requests  # one seed gives one text, none another one each time
        request = self.engine.request(tokens, SamplingParams(**params), noise)
        self.requests += 1
        return request

    def generate(self, prompt, **params):
        """Run a prompt to its end; the result holds `tokens`, `finish_reason`, `timing`, and on rank 0 `text` and more."""
        return self.engine.generate(self.request(prompt, **params))

    def stream(self, prompt, **params) -> Iterator[str]:
        """The text of a prompt's continuation, piece by piece, on rank 0; every rank must consume its stream."""
        request = self.request(prompt, **params)
        self.session.streams.append(request)
        try:
            yield from self.engine.stream(request)
        finally:
            self.session.streams.remove(request)

    def close(self) -> None:
        """Give the weights, the cache and what is shared with other ranks back.  A collective call; a second one does nothing."""
        self.session.check_streams()
        self.engine.close()
        comm, self.comm = self.comm, None
        if comm is not None:
            _close(comm)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self.session.comm.size == 1:  # else an error may be this rank's alone: the others would wait
            with contextlib.suppress(ConfigError):  # a stream is open: the first error is the one to tell
                self.close()


def load(model: str | Path | None = None, *, context: int | None = None, device: str = 'auto', threads: int | None = None,
         kv: str | None = None, chunk: int = 512, block: int = 64, verify: bool = False, weights: str | None = None,
         kernels: str = 'auto', activations: str = 'float32', share_prefixes: bool = True, sinks: int = 0,
         collective: str = 'auto', share_gpu: bool = False, cuda_graphs: str = 'auto', session=None, group=None,
         tracing: bool = False) -> LLM:
    """Load this rank's shard of a model file, or of random_model.RandomReader, on every rank.  A collective call.

    context: positions that attention sees, older ones roll off; None holds the whole request.  sinks: first tokens that
    it sees besides (Xiao et al. 2024).  threads: per rank, None for a fair share of the cores.  kv: 'float32' or
    'bfloat16' for the KV cache; None is bfloat16 with int8 and int4 weights, which it costs nothing (data/quality.py), and
    with activations of bfloat16, and float32 otherwise.  verify: check the file's checksums.
    weights: 'float32', 'bfloat16', 'int8' or 'int4' in memory, or 'float16' on a GPU; as in the file by default.  kernels:
    'cpu' (Numba), 'reference' (NumPy), or 'auto'.  activations: 'bfloat16' or 'int8', what the kernels may round them to
    where they meet bfloat16, or int8 and int4, weights.
    share_prefixes: prompts that begin alike are computed once.  collective: 'mpi', 'staged', 'nccl' or 'auto', how sums of
    GPU memory go (collectives.py).  share_gpu: several ranks may compute on one GPU.  cuda_graphs:
    'off' launches a GPU's kernels one by one, 'auto' those of a step of decode together.  group: the communicator of
    the ranks that share this copy of the model, where not all of the session's ranks do; with it, or with a session, the
    communicator is the caller's, else the model's own.
    Raises ValueError (LaunchError, or comm.GroupError on all ranks) with one line that says what to do.
    """
    if group is not None and session is None:
        raise ConfigError('group is given without the session that it is of; give both, or none')
    if own := session is None:
        session = sessions.of_script(threads)
        session.check_streams()
        group = session.comm.split(0)  # models beside each other do not meet
        session.watch.where = lambda: (0, session.comm.entered_in_all)
    comm = session.comm if group is None else group

    def open_all():
        from tpmpi.checkpoint import CheckpointReader  # late: NumPy must find the number of BLAS threads set
        from tpmpi.model_shard import matrix_kinds
        run = RunConfig(None if context is None else _whole('context', context), _whole('chunk', chunk), _whole('block', block),
                        share_prefixes, kv_dtype='float32' if kv is None else kv, device=device, verify=verify, weights=weights,
                        kernels=kernels, activations=activations, sinks=_whole('sinks', sinks), collective=collective,
                        share_gpu=share_gpu, cuda_graphs='off' if tracing else cuda_graphs)  # the tracer waits for each kernel
        reader = model if hasattr(model, 'read_rows') else CheckpointReader(bundled_model() if model is None else Path(model))
        if kv is None and (activations == 'bfloat16' or matrix_kinds(reader, weights) & {'int8', 'int4'}):
            run = replace(run, kv_dtype='bfloat16')
        if run.context is not None and run.context > reader.config.max_positions:
            raise ConfigError(f'context is {context}; the model was trained for {reader.config.max_positions} positions')
        return run, reader, _tokenizer(reader) if comm.rank == 0 else None

    try:
        llm = _load(session, comm, open_all, tracing)
    except mpi.GroupError:  # known to all ranks, so that they all come here
        if own:
            _close(comm)
        raise
    llm.comm = comm if own else None
    return llm


def _load(session, comm, open_all, tracing: bool) -> LLM:
    """What `load` does once it knows the communicator.  open_all: gives what is to run, the reader, and the tokenizer."""
    session.watch.phase = 'load'
    run, reader, tokenizer = session.agreed(open_all)
    from tpmpi.engine import Engine
    from tpmpi.model_shard import load_model, matrix_kinds
    from tpmpi.sharding import shard
    _return_freed_memory()
    with reader:
        session.agreed(_check_same_model, session.comm.exchange((reader.config, reader.length)))
        opened, sharers = _open_device(session, run)
        part = shard(reader.config, comm.rank, comm.size)
        session.agreed(_check_memory, opened, sharers, reader, part, run)
        comm.close_sums()  # of a model that was loaded before on a caller's communicator
        comm.carrier = _carrier(session, comm, run, opened, sharers > 1, reader.config.hidden_size)
        atexit.register(comm.close_carrier)
        ops = _kernels(session, run, opened, reader.config, matrix_kinds(reader, run.weights))
        comm.shared = _shared_sums(session, comm, run, opened, reader.config.hidden_size, ops)
        model = session.agreed(load_model, reader, part, ops, run.context, run.verify, opened.xp, run.weights, run.sinks,
                               session.comm.while_waiting)
    _keep_freed_memory()
    tracer = None
    if tracing:
        from tpmpi.trace import Tracer
        tracer = Tracer(ops, comm, opened.synchronize)
        ops, comm = tracer.ops, tracer.comm

    def on_phase(phase: str):
        session.watch.phase = phase
        if tracer is not None:
            tracer.phase = phase

    return LLM(session, Engine(model, tokenizer, opened, ops, comm, run, on_phase), tracer)


def _close(comm) -> None:
    atexit.unregister(comm.close_carrier)
    comm.close()


def _token_ids(prompt) -> list[int]:
    """The ids of a prompt that is no text.  Raises ConfigError where it holds anything but integers."""
    with contextlib.suppress(TypeError):  # no integer, or nothing that holds any
        if not isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set):
            values = list(prompt)
            if not any(isinstance(value, bool) for value in values):
                return [operator.index(value) for value in values]
    raise ConfigError(f'the prompt is {reprlib.repr(prompt)}; expected text, integers that are token ids, or chat messages')


def _whole(name: str, value) -> int:
    """A number of tokens or positions.  Raises ConfigError for what is no integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f'{name} is {reprlib.repr(value)}; expected a whole number')
    return int(value)


def _open_device(session, run: RunConfig):
    """This rank's device, and how many ranks compute on it; on all ranks a GPU, or on all the CPU."""
    from tpmpi import device as devices
    comm = session.comm
    if run.device == 'cpu' or run.device == 'auto' and not any(comm.exchange(devices.driver_present())):
        return devices.host(), 1
    try:
        gpus = session.agreed(devices.visible_gpus)
        local_rank, on_node = comm.exchange_on_node(gpus)
        number = session.agreed(devices.choose_gpu, on_node, local_rank, run.share_gpu)
        placed = comm.exchange((session.host, gpus[number]))
        sharers = session.agreed(devices.ranks_on, placed, comm.rank, run.share_gpu)
        opened = session.agreed(devices.open_gpu, gpus, number)
    except mpi.GroupError as e:
        if run.device == 'cuda':
            raise mpi.GroupError(e.rank, f'device cuda: {e}') from e
        if comm.rank == 0:
            log.info('device auto: rank %d: %s; all ranks compute on the CPU', e.rank, e)
        return devices.host(), 1
    if comm.rank == 0:
        for line in devices.table(placed):
            log.info('%s', line)
    return opened, sharers


def _check_memory(opened, sharers: int, reader, part, run: RunConfig) -> None:
    """Raises DeviceError where this rank's share of its GPU's free memory cannot hold what it will load."""
    from tpmpi.device import check_memory
    from tpmpi.footprint import cache_bytes, shard_bytes, step_bytes, workspace_bytes
    free = opened.free_bytes()
    if free is not None:
        parts = {'weights': shard_bytes(reader, part, run.weights, float16=True),
                 'cache': cache_bytes(reader.config, part, run.context, run.chunk, run.block, run.kv_dtype, run.sinks),
                 'workspace': workspace_bytes(reader.config, part, run.chunk)}
        if run.cuda_graphs != 'off':
            from tpmpi.graphs import FEW_ROWS, MOST_KINDS
            parts['graphs'] = MOST_KINDS * step_bytes(reader.config, part, FEW_ROWS)
        check_memory(sum(parts.values()), free // sharers, opened.name, parts)


def _carrier(session, comm, run: RunConfig, opened, shared: bool, hidden: int):
    """How sums of this rank's GPU memory go, alike on all ranks; None where nothing of that kind is to be summed."""
    from tpmpi import collectives
    if opened.gpu is None:
        session.agreed(collectives.check_host, run.collective)
        return None
    if session.comm.size == 1:
        return None
    support = None
    if run.collective in ('auto', 'mpi'):
        answers = collectives.mpi_answers(collectives.mpi_libraries())
        support = collectives.gpu_support(mpi.library(), comm.memory_kinds(), answers, os.environ)
    supports, sharing = zip(*session.comm.exchange((support, shared)), strict=True)
    trusted = os.environ.get(collectives.TRUST) == '1'
    name, reason = session.agreed(collectives.choose, run.collective, supports, any(sharing), trusted)
    if name == 'mpi':
        carrier = collectives.Direct(opened.stream)
    elif name == 'staged':
        carrier = session.agreed(collectives.Staged, opened.xp, opened.stream, 4 * run.chunk * hidden)
    else:
        nccl = session.agreed(collectives.load_nccl)  # all have it, before any of them waits in it for the others
        first = comm.share(session.agreed(collectives.nccl_id, nccl, comm.rank))
        carrier = session.agreed(collectives.Nccl, nccl, comm.size, first, comm.rank, opened.stream)
    if session.comm.rank == 0:
        log.info('all-reduce of GPU memory: %s (%s)', name, reason)
    return carrier


def _shared_sums(session, comm, run: RunConfig, opened, hidden: int, ops):
    """How sums of host memory go among ranks of a node, alike on all ranks; None where MPI alone carries them."""
    from tpmpi import shared_sums
    if opened.gpu is not None or comm.size == 1 or run.collective != 'auto':
        return None
    return shared_sums.share(comm.mpi_comm, 4 * run.chunk * hidden, ops.node_sums, session.local_size)


def _kernels(session, run: RunConfig, device, config, kinds: set[str]):
    """The kernel set of this run, ready: children of the ranks of each node share the compiling of what its cache lacks."""
    ops = session.agreed(_choose_kernels, session, run, device)
    if not hasattr(ops, 'needed'):
        return ops
    needed = ops.needed(config, sorted(kinds), run.kv_dtype)
    if any(session.comm.exchange(ops.missing(needed))):
        if session.comm.rank == 0:
            log.info('compiling kernels for this CPU, once, into %s: about half a minute', ops.folder)
        ticket = f'{session.host}-{session.comm.share(secrets.token_hex(4))}'
        before = session.local_rank * session.threads  # children of this node's other ranks
        children = max(0, min(session.threads, MOST_COMPILERS - before))
        session.agreed(ops.compile_missing, needed, children, ticket, session.comm.while_waiting)
    session.agreed(ops.build, needed)
    return ops


def _choose_kernels(session, run: RunConfig, device):
    from tpmpi.kernels import reference
    if device.name != 'cpu':
        if run.kernels != 'auto':
            raise ConfigError(f'kernels {run.kernels}: the device is {device.name}; choose device cpu, or leave kernels out')
        from tpmpi.kernels.cuda import Kernels
        return Kernels(device.xp, run.activations)
    if run.weights == 'float16':
        raise ConfigError('weights float16: only a GPU computes with it; choose bfloat16, or leave weights out: a file of '
                          'float16 is then float32 in memory, without loss')
    if run.kernels == 'reference':
        return reference
    try:
        from tpmpi.kernels.cpu import Kernels
    except ImportError as e:
        reason = ' '.join(str(e).split())
        if run.kernels == 'cpu':
            raise ConfigError(f'kernels cpu: Numba cannot be used ({reason}); pip install numba, or choose reference') from e
        if session.comm.rank == 0:
            log.warning('Numba cannot be used (%s): the slower NumPy kernels run; pip install numba', reason)
        return reference
    return Kernels(session.threads, run.activations)


def _tokenizer(reader):
    """The tokenizer of a model file; a large one takes a quarter of a second and 40 MB, so rank 0 alone has one."""
    from tpmpi.tokenizer import Tokenizer
    data = reader.tokenizer
    return Tokenizer(data.tokenizer_json, data.chat_template, data.bos_token_id, data.eos_token_ids)


def _return_freed_memory() -> None:
    """Give the system what is free: the tokenizer's parser alone leaves tens of megabytes in glibc's heap."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, up to 256 MiB.

    Else the pages of activations come from the system and go back in each step: measured, an eighth of a prefill.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most that it takes
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def _check_same_model(seen: list) -> None:
    """Raises ConfigError when ranks opened different files under one name, as node-local copies may be."""
    for rank, facts in enumerate(seen):
        if facts != seen[0]:
            raise ConfigError(f'rank {rank} found another model file under this name than rank 0; '
                              f'copy the same file to all nodes')
