"""Models of random weights: their shapes, their numbers, and that they run as a file does, on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ranks import run_ranks

from tpmpi import bench
from tpmpi.checkpoint import TokenizerData
from tpmpi.random_model import SHAPES, RandomReader
from tpmpi.sharding import tensor_specs
from tpmpi.weights import decode


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'float16', 'int8', 'int4'])
def test_tensors_have_their_shapes_and_weights_are_spread_around_zero(kind):
    config = SHAPES['tiny']
    with RandomReader(config, kind, TokenizerData('{}', None, None, ())) as reader:
        for name, spec in tensor_specs(config).items():
            stored = reader.read_rows(name, range(spec.shape[0]))
            values = decode(stored)
            assert values.shape == spec.shape and stored.kind == reader.kind(name)
            if spec.is_matrix:
                assert stored.kind == kind or not spec.fits(kind)
                assert abs(values.mean()) < 2e-3 and 0.018 < values.std() < 0.022
            else:
                assert (values == 1).all()
            part = reader.read_rows(name, range(32))
            np.testing.assert_array_equal(part.data, stored.data[:32])


@pytest.mark.parametrize(('shape', 'least', 'most'), [('1b', 1.2e9, 1.3e9), ('8b', 7.9e9, 8.1e9), ('70b', 70e9, 71e9)])
def test_the_shapes_have_the_weights_that_they_are_called_by(shape, least, most):
    assert least < sum(np.prod(spec.shape, dtype=float) for spec in tensor_specs(SHAPES[shape]).values()) < most


@pytest.mark.parametrize('size', [1, 3])
def test_the_benchmark_takes_one_instead_of_a_file(size):
    options = ['--random', 'tiny', '--kernels', 'reference', '--device', 'cpu', '--prompt-tokens', 5, '--new-tokens', 2, '--json']
    brief = 'import sys; from tpmpi import bench; bench.STREAM_TOTAL = 1 << 20; sys.exit(bench.main(sys.argv[1:]))'
    done = run_ranks(size, '-c', brief, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['model'] == 'random weights, shape tiny' and found['ranks'] == size and found['decode_tokens_per_s'] > 0


@pytest.mark.parametrize('shape', SHAPES)
def test_the_benchmark_knows_every_shape(shape):
    assert bench.parse(['--random', shape]).random == shape


def test_a_file_and_a_shape_are_one_too_many():
    done = run_ranks(1, '-m', 'tpmpi.bench', '--random', 'tiny', '--model', 'm.h5')
    assert done.returncode == 2 and '--random takes the place of --model; give one of them' in done.stderr
