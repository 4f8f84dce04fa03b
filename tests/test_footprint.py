"""What a rank will need of memory, against what it then holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny

from tpmpi.checkpoint import CheckpointReader
from tpmpi.footprint import cache_bytes, shard_bytes, workspace_bytes
from tpmpi.kernels import reference
from tpmpi.kv_cache import KVCache, rings_blocks
from tpmpi.model_shard import load_model
from tpmpi.sharding import rank_rows, shard, target_kind
from tpmpi.weights import STORED_KINDS, Weight, recode

CONFIGS = tiny.CONFIGS | {'groups': tiny.GROUPS}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('footprint')
    kinds = {'mixed': lambda name: 'int8' if 'experts/1/' in name else 'bfloat16'} | {kind: kind for kind in STORED_KINDS}

    def path_of(name, kind):
        path = folder / f'{name}-{kind}.h5'
        if not path.exists():
            tiny.write_model(path, CONFIGS[name], kinds[kind])
        return path
    return path_of


@pytest.mark.parametrize('size', [1, 2, 3])
@pytest.mark.parametrize('name', CONFIGS)
def test_in_float32_it_is_what_the_reference_kernels_hold(files, name, size):
    for kind in ('float32', 'int8'):
        with CheckpointReader(files(name, kind)) as reader:
            for rank in range(size):
                part = shard(reader.config, rank, size)
                assert shard_bytes(reader, part, 'float32') == load_model(reader, part, reference).nbytes


@pytest.mark.parametrize('kind', [*STORED_KINDS, 'mixed'])
@pytest.mark.parametrize('weights', [None, *STORED_KINDS])
@pytest.mark.parametrize('name', ['groups', 'capped'])
@pytest.mark.parametrize('float16', [True, False])
def test_of_each_kind_it_is_what_is_read_and_recoded(files, name, kind, weights, float16):
    with CheckpointReader(files(name, kind)) as reader:
        for rank in range(3):
            part, total = shard(reader.config, rank, 3), 0
            for spec in filter(lambda spec: spec.is_matrix, reader.specs.values()):
                stored = reader.read_rows(spec.name, rank_rows(spec, part))
                stored = recode(stored, target_kind(spec, stored.kind, weights, float16))
                total += sum(array.nbytes for array in stored.parts.values())
            assert shard_bytes(reader, part, weights, float16) == total


def test_experts_of_several_kinds_are_float32_together(files):
    with CheckpointReader(files('experts', 'mixed')) as reader:
        part = shard(reader.config, 0, 2)
        kinds = {reader.kind(f'layers/0/experts/{i}/up') for i in range(reader.config.num_experts)}
        assert kinds == {'int8', 'bfloat16'}
        model = load_model(reader, part, Counting)
        assert model.layers[0].mlp.up.kind == 'float32'
        assert shard_bytes(reader, part) == model.nbytes


class Counting:
    """Kernels that hold nothing but know how much it would be."""

    join, fill = staticmethod(reference.join), staticmethod(lambda weight, at, stored: None)
    expert = staticmethod(lambda weights, number: weights)

    @staticmethod
    def new_experts(count, rows, hidden_size, transposed, kind, letter, xp):
        each = {'float32': 4, 'bfloat16': 2, 'int8': 1 + 2 / 32, 'int4': 1 / 2 + 4 / 32}[kind]
        return Weight(SimpleNamespace(nbytes=round(count * rows * hidden_size * each)), kind, letter)

    @classmethod
    def new_weight(cls, *arguments):
        return cls.new_experts(1, *arguments)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('context, sinks', [(None, 0), (40, 0), (24, 5)])
@pytest.mark.parametrize('kv_dtype', ['float32', 'bfloat16'])
def test_the_cache_is_that_of_one_request(files, name, context, sinks, kv_dtype):
    chunk, block = 16, 8
    with CheckpointReader(files(name, 'float32')) as reader:
        config, part = reader.config, shard(reader.config, 1, 2)
        model = load_model(reader, part, reference, context, sinks=sinks)
    total = chunk if context is None else 10 * context  # a text that rolls on
    blocks = rings_blocks(model.groups, total, chunk, block)
    pool = KVCache(config, part, model.groups, blocks, block, reference, kv_dtype).nbytes
    found = cache_bytes(config, part, context, chunk, block, kv_dtype, sinks)
    assert found == pool


def test_workspace_grows_with_the_chunk_and_shrinks_with_the_ranks():
    config, alone = tiny.NINE_HEADS, shard(tiny.NINE_HEADS, 0, 1)
    sizes = [workspace_bytes(config, alone, chunk) for chunk in (1, 64, 512)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert workspace_bytes(config, shard(config, 0, 3), 512) < sizes[-1]
