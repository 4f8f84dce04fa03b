"""Prints the README's table of families: how far our logits are from those of transformers, on 1, 2 and 3 ranks.

    python tests/family_table.py [reference|cpu]
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from families import SUPPORTED, compute, convert_case
from family_cases import logits_of

SIZES = (1, 2, 3)


def main(kernels: str = 'cpu') -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {name: convert_case(case, folder) for name, case in SUPPORTED.items()}
        worst, cases = defaultdict(lambda: [0.0] * len(SIZES)), defaultdict(list)
        for name, case in SUPPORTED.items():
            cases[case.family].append(name)
        for i, size in enumerate(SIZES):
            found, _ = compute(models, size, kernels, folder)
            for name, (_, reference) in models.items():
                difference = np.abs(found[name][reference['positions']] - logits_of(reference)).max() / reference['spread']
                family = worst[SUPPORTED[name].family]
                family[i] = max(family[i], float(difference))
    print('| family | cases | ' + ' | '.join(f'{size} rank{"s" * (size > 1)}' for size in SIZES) + ' |')
    print('| --- | --- |' + ' --- |' * len(SIZES))
    for family, differences in worst.items():
        print(f'| {family} | {", ".join(cases[family])} | ' + ' | '.join(f'{x:.0e}' for x in differences) + ' |')


if __name__ == '__main__':
    main(*sys.argv[1:])
