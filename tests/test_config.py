"""Configurations: what contradicts itself is refused with one line that names it."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from tpmpi.config import ConfigError, ModelConfig, RunConfig, default_ffn_block, model_config_from_dict

GOOD = dataclasses.asdict(tiny.NINE_HEADS)


@pytest.mark.parametrize(('change', 'message'), [
    ({'hidden_size': 0}, 'hidden_size is 0'), ({'hidden_size': 2.5}, 'hidden_size is 2.5'), ({'num_layers': True}, 'num_layers'),
    ({'vocab_size': 1 << 60}, 'vocab_size'), ({'num_kv_heads': 2}, '9 query heads cannot share 2 KV heads'),
    ({'norm': 'batch'}, "norm is 'batch'"), ({'activation': 'swish2'}, 'activation'), ({'residual': 1}, 'residual is 1'),
    ({'ffn_block': 100}, 'ffn_block is 100'), ({'head_dim': 7}, 'head_dim is 7'), ({'rope_theta': 0.0}, 'rope_theta is 0.0'),
    ({'norm_eps': float('nan')}, 'norm_eps'),
    ({'qk_norm': 'all', 'norm': 'layer'}, "qk_norm is 'all'"), ({'qk_norm': 'all', 'qk_norm_bias': True}, "qk_norm is 'all'"),
    ({'qk_norm': 'head', 'norm': 'none'}, "qk_norm is 'head'"),
    ({'num_experts': 4, 'experts_per_token': 2, 'expert_ffn_size': 8, 'mlp_bias': True}, 'mlp_bias with experts'),
    ({'num_experts': 4, 'experts_per_token': 5, 'expert_ffn_size': 8}, '5 of 4 experts'),
    ({'rope_long_divisors': (1.0,) * 4}, 'rope_original_positions is 0'), ({'window_layers': (0,)}, 'without a window'),
    ({'parallel_block': True, 'post_norm': True}, 'a parallel block has neither'),
    ({'query_growth': 0.5}, 'query_growth is 0.5'), ({'nope_layers': (99,)}, 'numbers of layers'),
    ({'window': 0}, 'window is 0'), ({'alibi': True}, "unknown fact 'alibi'"),
])
def test_what_contradicts_itself_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        model_config_from_dict(GOOD | change)


def test_a_missing_fact_is_named_and_a_whole_set_is_accepted():
    assert model_config_from_dict(GOOD) == tiny.NINE_HEADS
    with pytest.raises(ConfigError, match='head_dim is missing'):
        model_config_from_dict({k: v for k, v in GOOD.items() if k != 'head_dim'})


@pytest.mark.parametrize(('ffn', 'block'), [(1536, 64), (2047, 64), (2048, 128), (14336, 128), (100, 64)])
def test_ffn_blocks_are_128_columns_or_64_where_there_would_be_few(ffn, block):
    assert default_ffn_block(ffn) == block
    config = ModelConfig(64, 8, 1, 1, 1, 8, ffn, 8)
    assert config.ffn_block == block and (config.num_ffn_blocks - 1) * block < ffn <= config.num_ffn_blocks * block


@pytest.mark.parametrize(('options', 'message'), [
    ({'context': 0}, 'context is 0'), ({'chunk': 0}, 'chunk is 0'), ({'kv_dtype': 'int8'}, 'kv_dtype'),
    ({'device': 'tpu'}, 'device'),
    ({'weights': 'int2'}, "weights is 'int2'; expected one of float32, bfloat16, float16, int8, int4")])
def test_a_run_s_choices_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**options)
