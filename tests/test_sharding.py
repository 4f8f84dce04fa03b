"""Sharding: every unit has exactly one owner, and nothing is cut, at any rank count."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.config import VOCAB_BLOCK, ModelConfig
from tpmpi.sharding import QUERY_HEADS, REPLICATED, rank_rows, shard, split, target_kind, tensor_specs


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


@settings(max_examples=200)
@given(config=configs(), head_dim=st.sampled_from([8, 32, 48, 64]), ffn=st.sampled_from([32, 64, 96, 100, 320, 2080]),
       hidden=st.sampled_from([32, 33, 36, 64]), size=st.integers(1, 40))
def test_no_rank_cuts_a_group_of_integers(config, head_dim, ffn, hidden, size):
    config = dataclasses.replace(config, head_dim=head_dim, ffn_size=ffn, hidden_size=hidden, ffn_block=0)
    for spec in tensor_specs(config).values():
        leaf = spec.name.rpartition('/')[2]
        contraction = {'attn_out': head_dim, 'down': ffn}.get(leaf, hidden)
        assert spec.group_axis == (0 if leaf in ('attn_out', 'down') else 1)
        assert spec.fits('int8') == (spec.is_matrix and contraction % 32 == 0) and spec.fits('float32')
        assert spec.fits('int4') == (spec.fits('int8') and hidden % 2 == 0)
        for kind in ('int8', 'int4'):
            assert spec.fits(kind) or spec.why_not(kind)
        if spec.fits('int8') and spec.group_axis == 0:
            rows = rank_rows(spec, shard(config, size // 2, size))
            assert rows.start % 32 == rows.stop % 32 == 0


def test_the_kind_that_a_tensor_gets():
    specs = tensor_specs(ModelConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
                                     ffn_size=64, max_positions=8))
    q, attn_out, norm = (specs[name] for name in ('layers/0/q', 'layers/0/attn_out', 'final_norm'))
    assert [target_kind(q, 'bfloat16', asked) for asked in (None, 'int4', 'float32')] == ['bfloat16', 'int4', 'float32']
    assert [target_kind(attn_out, 'int4', asked) for asked in (None, 'int8', 'float32')] == ['float32', 'bfloat16', 'float32']
    assert [target_kind(q, *kinds) for kinds in (('float16', None), ('float16', None, True), ('int8', 'float16', True),
                                                 ('float16', 'int4', True))] == ['float32', 'float16', 'float16', 'int4']
    assert {target_kind(norm, 'float32', asked) for asked in (None, 'int8', 'bfloat16')} == {'float32'}
    assert attn_out.why_not('int8') == 'its 32 rows are split in units of 16, not in multiples of 32'


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
