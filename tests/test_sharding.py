"""Sharding: every unit has exactly one owner, and nothing is cut, at any rank count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.config import VOCAB_BLOCK, ModelConfig
from tpmpi.sharding import QUERY_HEADS, REPLICATED, rank_rows, shard, split, tensor_specs


@st.composite
def configs(draw):
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 3000)), hidden_size=draw(st.integers(1, 64)), num_layers=1,
        num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=2 * draw(st.integers(1, 8)),
        ffn_size=draw(st.integers(1, 4000)), max_positions=8, gated=draw(st.booleans()))


@given(units=st.integers(0, 1000), size=st.integers(1, 64))
def test_split_is_a_partition_into_even_runs(units, size):
    runs = [split(units, size, rank) for rank in range(size)]
    assert [u for run in runs for u in run] == list(range(units))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@settings(max_examples=300)
@given(config=configs(), size=st.integers(1, 40))
def test_every_unit_has_one_owner(config, size):
    shards = [shard(config, rank, size) for rank in range(size)]

    def all_of(name):
        return [u for s in shards for u in getattr(s, name)]

    assert all_of('heads') == list(range(config.num_heads))
    assert all_of('owned_kv_heads') == list(range(config.num_kv_heads))
    assert all_of('ffn_blocks') == list(range(config.num_ffn_blocks))
    assert all_of('ffn') == list(range(config.ffn_size))
    assert all_of('vocab') == list(range(config.vocab_size))


@settings(max_examples=300)
@given(config=configs(), size=st.integers(1, 40))
def test_a_rank_holds_just_the_kv_heads_that_its_query_heads_read(config, size):
    for rank in range(size):
        s = shard(config, rank, size)
        read = {head * config.num_kv_heads // config.num_heads for head in s.heads}
        assert set(s.kv_heads) == read
        assert set(s.owned_kv_heads) <= read
        pairs = [(s.kv_heads[i], s.heads.start + q) for i, run in enumerate(s.query_groups(config)) for q in run]
        assert pairs == [(head * config.num_kv_heads // config.num_heads, head) for head in s.heads]


@settings(max_examples=200)
@given(config=configs(), size=st.integers(1, 40))
def test_no_unit_is_cut(config, size):
    for rank in range(size):
        s = shard(config, rank, size)
        for part, unit, whole in ((s.ffn, config.ffn_block, config.ffn_size), (s.vocab, VOCAB_BLOCK, config.vocab_size)):
            assert not part or (part.start % unit == 0 and (part.stop % unit == 0 or part.stop == whole))


@settings(max_examples=100)
@given(config=configs(), size=st.integers(1, 40))
def test_the_rows_read_cover_each_tensor_and_only_kv_heads_twice(config, size):
    for spec in tensor_specs(config).values():
        runs = [rank_rows(spec, shard(config, rank, size)) for rank in range(size)]
        rows = [row for run in runs for row in run]
        assert set(rows) == set(range(spec.shape[0]))
        if spec.name.endswith(('/k', '/v')) or spec.sharded == REPLICATED:
            continue
        assert len(rows) == len(set(rows)), spec.name
        if spec.sharded == QUERY_HEADS:
            assert all(len(run) % config.head_dim == 0 for run in runs)


@pytest.mark.parametrize('size', [2, 3, 5, 7, 9, 12, 16])
def test_work_is_even(size):
    """With 9 heads and 24 ffn blocks no rank holds more than one head and one block above the average."""
    config = ModelConfig(vocab_size=49152, hidden_size=576, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64,
                         ffn_size=1536, max_positions=8)
    loads = []
    for rank in range(size):
        s = shard(config, rank, size)
        loads.append(2 * 64 * (len(s.heads) + len(s.kv_heads)) + 3 * len(s.ffn))
    assert max(loads) <= sum(loads) / size + 2 * 64 * 2 + 3 * config.ffn_block


def test_a_rank_without_heads_has_ffn_columns():
    config = ModelConfig(vocab_size=49152, hidden_size=576, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64,
                         ffn_size=1536, max_positions=8)
    last = shard(config, 11, 12)
    assert not last.heads and not last.kv_heads and len(last.ffn) >= 64


@pytest.mark.parametrize(('rank', 'size'), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank, size):
    with pytest.raises(ValueError, match='expected 0 to'):
        shard(ModelConfig(64, 8, 1, 1, 1, 8, 64, 8), rank, size)
