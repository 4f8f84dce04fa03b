"""Models of family_cases converted and computed on ranks, beside what transformers computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from family_cases import CASES, FOLDER, Case, load_reference, write_folder
from ranks import run_program

from tpmpi.config import ModelConfig
from tpmpi.convert import convert

REFUSED = {  # cases whose arithmetic we do not have: what the converter says of them
    'olmoe_clip': 'clip_qkv is 1.2; supported is None only'}
SUPPORTED = {name: case for name, case in CASES.items() if name not in REFUSED and (FOLDER / f'{name}.json').exists()}


def convert_case(case: Case, folder: Path) -> tuple[Path, dict]:
    """The model file of a case, and its reference."""
    reference, source = load_reference(case.name), folder / case.name
    source.mkdir()
    write_folder(source, reference)
    convert(source, folder / f'{case.name}.h5')
    return folder / f'{case.name}.h5', reference


def compute(models: dict[str, tuple[Path, dict]], size: int, kernels: str, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The logits of all tokens of each reference, on `size` ranks, and what family_logits.py reports."""
    cases = [{'name': name, 'model': str(path), 'tokens': reference['tokens'], 'prompt': reference['prompt_length']}
             for name, (path, reference) in models.items()]
    (folder / 'cases.json').write_text(json.dumps(cases))
    report = run_program('family_logits.py', size, folder / 'logits.npz', folder / 'cases.json', kernels, timeout=300)
    with np.load(folder / 'logits.npz') as found:
        return dict(found), report


def step_all_reduces(config: ModelConfig) -> int:
    """How many all-reduces a decode step has: the embedding's, and of each layer one or two, and one for norms over all heads."""
    per_layer = (1 if config.parallel_block else 2) + (config.qk_norm == 'all')
    return 1 + config.num_layers * per_layer
