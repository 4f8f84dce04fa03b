"""Random models made by transformers here and now, converted and run on ranks.  Run with: pytest -m live"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from families import SUPPORTED, compute
from family_cases import load_reference, write_folder
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


# ---- all families


@pytest.fixture(scope='module')
def maker(transformers):
    """The program that made the references."""
    sys.path.insert(0, str(Path(__file__).parent / 'references'))
    try:
        import make_families
    finally:
        sys.path.pop(0)
    return make_families


def fresh(maker, name: str, folder: Path) -> tuple[Path, dict, np.ndarray]:
    """A case with other weights and tokens: its model file, the reference without logits, and transformers' logits of all
    tokens.  The choice of experts is as clear as in the references."""
    from tpmpi.convert import convert
    for attempt in range(20):
        seed, source = random.randrange(10_000), folder / f'{name}-{attempt}'
        source.mkdir()
        reference = load_reference(name)
        tokens = np.random.default_rng(seed).integers(0, 256, len(reference['tokens'])).tolist()
        reference |= {'seed': seed, 'tokens': tokens}
        write_folder(source, reference)
        model = maker.loaded(source, SUPPORTED[name])
        gaps = maker.watch_routers(model)
        logits = maker.run(model, tokens, reference['prompt_length'])
        if min(gaps, default=1) > maker.CLEAR:
            break
    convert(source, folder / f'{name}.h5')
    return folder / f'{name}.h5', reference, logits


def test_families_with_other_weights(maker, tmp_path):
    models = {name: fresh(maker, name, tmp_path) for name in SUPPORTED}
    found, _ = compute({name: model[:2] for name, model in models.items()}, 2, 'reference', tmp_path)
    for name, (_, reference, logits) in models.items():
        assert np.abs(found[name] - logits).max() <= 1e-3 * logits.std(), f'{name} with seed {reference["seed"]}'


def test_what_a_config_leaves_out_is_what_the_classes_say(transformers):
    from tpmpi.formats.huggingface_families import HUGGING_FACE
    models = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kinds = {architecture: kind for kind, architecture in models.items() if isinstance(architecture, str)}
    with_pictures = {name for name in HUGGING_FACE if name.endswith('ForConditionalGeneration')}  # a language model in them
    for architecture in HUGGING_FACE.keys() - with_pictures:
        kind = 'gemma3_text' if architecture == 'Gemma3ForCausalLM' else kinds[architecture]
        config, family = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind], HUGGING_FACE[architecture]
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        assert defaults['vocab_size'] == family.facts['vocab_size']
        for key in family.facts.keys() & defaults.keys() - {'num_experts', 'num_local_experts'}:
            assert defaults[key] == family.facts[key], f'{architecture}: {key}'
        theta = family.facts.get('rope_theta') or family.facts.get('rotary_emb_base')  # GPT-NeoX's name
        if theta is not None and isinstance(config.default_theta, float):
            assert theta == config.default_theta, architecture
        assert (defaults['bos_token_id'], defaults['eos_token_id']) == (family.bos, family.eos), architecture


def test_other_settings_of_the_families(maker, tmp_path):
    """What each case's `without` switches off, with weights of their own."""
    from tpmpi.convert import convert
    models, expected = {}, {}
    for case in SUPPORTED.values():
        for i, changed in enumerate(case.without):
            name = f'{case.name}-{i}'
            (tmp_path / name).mkdir()
            config, shapes = maker.saved(maker.build(case, case.settings | changed), tmp_path / name)
            reference = load_reference(case.name) | {'config': config, 'shapes': shapes}
            write_folder(tmp_path / name, reference)
            expected[name] = maker.run(maker.loaded(tmp_path / name, case), reference['tokens'], reference['prompt_length'])
            convert(tmp_path / name, tmp_path / f'{name}.h5')
            models[name] = tmp_path / f'{name}.h5', reference
    found, _ = compute(models, 1, 'reference', tmp_path)
    for name, logits in expected.items():
        assert np.abs(found[name] - logits).max() <= 1e-3 * logits.std(), f'{name}: {models[name][1]["config"]}'
