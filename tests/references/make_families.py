"""Makes families/*.json, what Hugging Face transformers computes with the models of tests/family_cases.py, on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/references/make_families.py                 # all
    python tests/references/make_families.py gemma2 mixtral  # some

The same files come out each time.  A file holds the names and shapes of the weights as they are on the Hub, config.json
and logits in float32 with eager attention: of a prompt and then of one token at a time from the cache.  Each model is
checked before its file is written: transformers knows every tensor and misses none, computes the same without a cache and
from config.json as transformers 4 wrote it, and the logits change where a setting of `without` does or where the tensors of
one kind are reversed along their last axis.  So what a reader of these files overlooks must show.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from family_cases import CASES, FOLDER, POSITIONS, Case, old_style, write_model
from safetensors import safe_open

SAME = 2e-4  # of the spread: equal but for rounding
DIFFERENT = 1e-2  # of the spread: something else was computed
CLEAR = 1e-4  # between the router's logits of the last expert chosen and the first one not


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            reference = make(CASES[name], Path(folder))
        path = FOLDER / f'{name}.json'
        lines = (f' {json.dumps(key)}: {json.dumps(value)}' for key, value in reference.items())
        path.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
        print(f'{name:24} spread {reference["spread"]:6.3f}  {path.stat().st_size / 1000:5.1f} kB', flush=True)


def make(case: Case, folder: Path) -> dict:
    """The reference of a case; AssertionError where a check fails."""
    config, shapes = saved(build(case, case.settings), folder)
    count = case.prompt_length + case.new_tokens
    reference = {
        'name': case.name, 'family': case.family, 'architecture': case.architecture,
        'transformers': transformers.__version__, 'seed': case.seed, 'zero_centred': case.zero_centred,
        'by_length': case.by_length, 'prompt_length': case.prompt_length,
        'tokens': np.random.default_rng(case.seed).integers(0, 256, count).tolist(),
        'config': (old_style(config) if case.old else config) | case.edit, 'shapes': shapes}
    write_model(folder, reference)
    model = loaded(folder, case)
    tokens = reference['tokens']
    logits = run(model, tokens, case.prompt_length)
    spread = float(logits.std())
    check(case, model, tokens, logits, spread)
    if not case.old:
        write_model(folder, reference, old=True)
        assert np.array_equal(run(loaded(folder, case), tokens, case.prompt_length), logits), 'old style of config.json'
    kept = logits[list(POSITIONS)].astype('<f4')
    return reference | {'positions': list(POSITIONS), 'spread': round(spread, 6),
                        'logits': base64.b64encode(kept.tobytes()).decode()}


def build(case: Case, settings):
    """A new model of the case's class."""
    config = getattr(transformers, case.config_class)(**settings, attn_implementation='eager')
    return getattr(transformers, case.architecture)(config).eval()


def saved(model, folder: Path) -> tuple[dict, dict[str, list[int]]]:
    """config.json and the shapes of the tensors that save_pretrained writes."""
    model.save_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text())
    with safe_open(folder / 'model.safetensors', 'numpy') as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    return config, shapes


def loaded(folder: Path, case: Case):
    """The model in a folder, of which transformers missed nothing and left nothing over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
    assert type(model).__name__ == case.architecture
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'):
        assert not report.get(kind), f'{kind}: {report[kind]}'
    return model.eval()


def run(model, tokens: list[int], prompt_length: int) -> np.ndarray:
    """Logits of all tokens: the prompt at once, then one token at a time from the cache.  [tokens, vocab]"""
    parts, cache = [tokens[:prompt_length], *([token] for token in tokens[prompt_length:])], None
    logits = []
    with torch.inference_mode():
        for part in parts:
            out = model(torch.tensor([part]), past_key_values=cache, use_cache=True)
            logits.append(out.logits[0].numpy())
            cache = out.past_key_values
    return np.concatenate(logits)


def check(case: Case, model, tokens: list[int], logits: np.ndarray, spread: float) -> None:
    """AssertionError where a reader's error could stay unseen."""
    gaps = watch_routers(model)

    def difference(other) -> float:
        return float(np.abs(run(other, tokens, case.prompt_length) - logits).max()) / spread

    assert 0.5 < spread < 6, f'spread {spread}'
    assert logits.std(0).mean() > 0.4 * spread, 'positions are alike'
    if not case.by_length:
        assert difference_at_once(model, tokens, logits) < SAME * spread, 'without a cache'
    assert difference(model) == 0, 'the second time'
    assert min(gaps, default=1) > CLEAR, f'router {min(gaps)}'
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights['lm_head.weight']
    same, *others = (built_with(weights, case, changed) for changed in ({}, *case.without))
    assert difference(same) < SAME, f'config.json and the settings differ: {difference(same)}'
    for changed, other in zip(case.without, others, strict=True):
        assert difference(other) > DIFFERENT, f'{changed}: {difference(other)}'
    for kind in sorted({kind_of(name) for name in weights}):
        altered = {name: value.flip(-1) if kind_of(name) == kind else value for name, value in weights.items()}
        other = built_with(altered, case, {})
        assert difference(other) > DIFFERENT, f'{kind}: {difference(other)}'


def built_with(weights, case: Case, changed):
    """The case's model with some settings changed and those of the weights that it has."""
    model = build(case, case.settings | changed)
    model.load_state_dict(weights, strict=False)
    return model


def difference_at_once(model, tokens: list[int], logits: np.ndarray) -> float:
    with torch.inference_mode():
        return float(np.abs(model(torch.tensor([tokens]), use_cache=False).logits[0].numpy() - logits).max())


def kind_of(name: str) -> str:
    """The tensor's name without the numbers of its layer, head and expert."""
    return re.sub(r'\.\d+\.', '.*.', name)


def watch_routers(model) -> list[float]:
    """A list that gets the least gap of each call of a router."""
    gaps = []

    def watch(module, inputs, outputs):
        best = outputs[0].sort(-1, descending=True).values
        gaps.append(float((best[..., module.top_k - 1] - best[..., module.top_k]).min()))

    for module in model.modules():
        if type(module).__name__.endswith('TopKRouter'):
            module.register_forward_hook(watch)
    return gaps


if __name__ == '__main__':
    main(sys.argv[1:])
