"""Prints the README's table of families: how far our logits are from those of transformers, on 1, 2 and 3 ranks.

    python tests/family_table.py [reference|cpu]

A difference is the largest one of the logits, over their standard deviation: of a prompt of 30 tokens in two chunks, and of
40 tokens after it from the cache.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from families import SUPPORTED, compute, convert_case
from family_cases import logits_of

SIZES = (1, 2, 3)
FAMILIES = {  # of a row: the families of the cases in it, their names in GGUF, and what is special
    'Llama 2, 3, 3.1, 3.2': (['Llama'], 'llama', 'RoPE stretched: `linear`, `dynamic`, `llama3`, `yarn`; biases'),
    'SmolLM2, SmolLM3': (['SmolLM3'], 'llama, smollm3', 'layers without RoPE; windows'),
    'Mistral, Ministral, Ministral 3': (['Mistral', 'Ministral', 'Ministral 3'], 'llama, mistral3',
                                        'sliding window; queries that grow with the position; '
                                        'of Mistral 3 and Gemma 3 with pictures the language model'),
    'Qwen2, Qwen2.5, Qwen3': (['Qwen2', 'Qwen3'], 'qwen2, qwen3', 'biases of Q, K, V; norms of Q and K'),
    'Gemma 1, 2, 3': (['Gemma', 'Gemma 2', 'Gemma 3'], 'gemma, gemma2, gemma3',
                      'scaled embeddings, post-norms, soft-capping, windows with a RoPE of their own'),
    'Phi-3, Phi-4': (['Phi-3'], 'phi3', 'fused tensors, LongRoPE, partial RoPE'),
    'GPT-2': (['GPT-2'], 'gpt2', 'learned positions, layer norms, biases everywhere'),
    'GPT-NeoX, Pythia; Phi-1.5, Phi-2': (['GPT-NeoX', 'Phi'], 'gptneox, phi2', 'attention beside MLP: one all-reduce a layer'),
    'Command-R, Command-R7B': (['Cohere', 'Cohere 2'], 'command-r, cohere2', 'the same; logit scale; windows'),
    'OLMo 2, 3': (['OLMo 2', 'OLMo 3'], 'olmo2', 'norms after the block; norms over all heads of all ranks'),
    'Granite, StableLM': (['Granite', 'StableLM'], 'granite, stablelm', 'multipliers; norms of each head'),
    'Mixtral, GraniteMoE, OLMoE': (['Mixtral', 'GraniteMoE', 'OLMoE'], 'llama, granitemoe, olmoe', 'mixture of experts'),
    'Qwen2-MoE, Qwen3-MoE': (['Qwen2-MoE', 'Qwen3-MoE'], 'qwen2moe, qwen3moe', 'shared expert with a gate; dense layers between'),
}


def main(kernels: str = 'cpu') -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models, worst = {name: convert_case(case, folder) for name, case in SUPPORTED.items()}, {}
        for size in SIZES:
            found, _ = compute(models, size, kernels, folder)
            for name, (_, reference) in models.items():
                difference = np.abs(found[name][reference['positions']] - logits_of(reference)).max() / reference['spread']
                key = SUPPORTED[name].family, size
                worst[key] = max(worst.get(key, 0), float(difference))
    print('| family | in GGUF | special | cases | ' + ' | '.join(f'{size} rank{"s" * (size > 1)}' for size in SIZES) + ' |')
    print('| --- |' + ' --- |' * (3 + len(SIZES)))
    for row, (families, gguf, special) in FAMILIES.items():
        cases = sum(case.family in families for case in SUPPORTED.values())
        differences = [max(worst.pop((family, size)) for family in families) for size in SIZES]
        print(f'| {row} | {gguf} | {special} | {cases} | ' + ' | '.join(f'{x:.0e}' for x in differences) + ' |')
    assert not worst, f'in no row: {worst}'


if __name__ == '__main__':
    main(*sys.argv[1:])
