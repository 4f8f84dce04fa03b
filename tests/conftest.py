"""What the tests share: model files, and running a program on several ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS'):
    os.environ.setdefault(name, '1')  # the ranks of a test share two cores with it

import tiny  # noqa: E402

settings.register_profile('tests', deadline=None)  # an example that takes long beside other work is no failure
settings.load_profile('tests')


@pytest.fixture(scope='session')
def models(tmp_path_factory):
    """Random model files by name: {'nine_heads': (path, config, whole tensors), ...}; no token ends a text."""
    folder = tmp_path_factory.mktemp('models')
    return {name: (folder / f'{name}.h5', config, tiny.write_model(folder / f'{name}.h5', config, eos=()))
            for name, config in tiny.CONFIGS.items()}


@pytest.fixture
def nine_heads(models):
    """The path of the model with 9 query heads and 3 KV heads."""
    return models['nine_heads'][0]
