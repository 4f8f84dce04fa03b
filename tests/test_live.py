"""Random Llama configurations made by transformers here and now, converted and run on ranks.  Run with: pytest -m live"""

from __future__ import annotations

import copy
import json
import random

import pytest
import tiny
from references import answer, check_greedy

pytestmark = pytest.mark.live


@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('torch', reason='PyTorch is not installed: pip install torch transformers')
    pytest.importorskip('safetensors', reason='safetensors is not installed')
    return pytest.importorskip('transformers', reason='transformers is not installed: pip install torch transformers')


def random_checkpoint(folder, seed: int, bfloat16: bool) -> list[dict]:
    """Write a random Llama as transformers does; returns its greedy continuations as reference cases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    rng = random.Random(seed)
    kv_heads, group, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([8, 16, 24])
    config = LlamaConfig(
        vocab_size=rng.choice([300, 333, 512]), hidden_size=kv_heads * group * rng.randint(4, 12),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=rng.randint(20, 400), max_position_embeddings=128, rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([1e4, 5e5]), tie_word_embeddings=rng.random() < 0.5, bos_token_id=None, eos_token_id=256)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1, 0.1) if parameter.ndim == 1 else parameter.normal_(0, parameter.shape[-1] ** -0.5)
            if bfloat16:
                parameter.copy_(parameter.bfloat16())
    # the model itself stays float32: to(bfloat16) would round its RoPE frequencies too, which are no weights
    (copy.deepcopy(model).to(torch.bfloat16) if bfloat16 else model).save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(tiny.byte_tokenizer())
    cases = []
    for length in (1, 2, 17, 60):
        ids, greedy = [rng.randrange(256) for _ in range(length)], []
        tokens = torch.tensor([ids])
        for _ in range(30):
            with torch.inference_mode():
                best = torch.log_softmax(model(tokens).logits[0, -1].double(), -1).topk(2)
            greedy.append([int(best.indices[0]), float(best.values[0]), float(best.values[1])])
            tokens = torch.cat((tokens, best.indices[None, :1]), dim=1)
        cases.append({'ids': ids, 'greedy': greedy})
    return cases


@pytest.mark.parametrize('seed', range(6))
def test_a_random_llama_generates_as_transformers(transformers, tmp_path, seed):
    from tpmpi.convert import convert
    cases = random_checkpoint(tmp_path / 'hf', seed, bfloat16=seed % 2 == 1)
    convert(tmp_path / 'hf', tmp_path / 'model.h5')
    for size in (1, 2 + seed % 4):
        for case, found in zip(cases, answer(tmp_path / 'model.h5', cases, size, tmp_path, max_positions=128), strict=True):
            check_greedy(found, case['greedy'])
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['model_type'] == 'llama'
