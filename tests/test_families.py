"""Every family against transformers: converted, on 1, 2 and 3 ranks, a prompt in chunks and 40 tokens from the cache."""

from __future__ import annotations

import numpy as np
import pytest
from families import REFUSED, SUPPORTED, compute, convert_case, step_all_reduces
from family_cases import CASES, load_reference, logits_of, write_folder

from tpmpi.checkpoint import CheckpointReader
from tpmpi.formats import FormatError, open_checkpoint
from tpmpi.kv_cache import ring_positions

TOLERANCE = 1e-3  # of the spread of the logits


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('families')
    return {name: convert_case(case, folder) for name, case in SUPPORTED.items()}


@pytest.fixture(scope='module', params=[1, 2, 3], ids=lambda size: f'{size} ranks')
def size(request):
    return request.param


@pytest.fixture(scope='module', params=['reference', 'cpu'])
def computed(models, size, request, tmp_path_factory):
    if request.param == 'cpu':
        pytest.importorskip('numba', reason='Numba is not installed: pip install numba')
    return compute(models, size, request.param, tmp_path_factory.mktemp('computed'))


@pytest.mark.parametrize('name', SUPPORTED)
def test_gives_the_logits_of_transformers(models, computed, name):
    reference = models[name][1]
    found = computed[0][name][reference['positions']]
    assert np.abs(found - logits_of(reference)).max() <= TOLERANCE * reference['spread']
    assert max(reference['positions']) == len(reference['tokens']) - 1 >= reference['prompt_length'] + 39


@pytest.mark.parametrize('name', SUPPORTED)
def test_communicates_once_or_twice_a_layer_and_keeps_no_more_than_the_window(models, computed, size, name):
    path, reference = models[name]
    with CheckpointReader(path) as reader:
        config = reader.config
    report = computed[1][name]
    sums = step_all_reduces(config) if size > 1 else 0  # one rank holds the whole sum already
    assert len(report['all_reduces']) == sums
    row, choices = 4 * config.hidden_size, 4 * config.num_experts
    assert set(report['all_reduces']) <= {row, row + choices, 8}
    assert report['all_reduces'].count(8) == config.num_layers * (config.qk_norm == 'all' and size > 1)
    assert len(report['rings']) == config.num_layers
    for layer, capacity in enumerate(report['rings']):
        held = ring_positions(len(reference['tokens']), config.layer_window(layer), reference['prompt_length'] * 2 // 3)
        assert held <= capacity < held + 8


@pytest.mark.parametrize('name', REFUSED)
def test_other_arithmetic_is_refused(tmp_path, name):
    write_folder(tmp_path, load_reference(name))
    with pytest.raises(FormatError, match=REFUSED[name]):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize('name', [name for name in SUPPORTED if not CASES[name].old])
def test_both_spellings_of_config_json_mean_the_same(tmp_path, name):
    configs = []
    for old in (False, True):
        (tmp_path / str(old)).mkdir()
        write_folder(tmp_path / str(old), load_reference(name), old)
        configs.append(open_checkpoint(tmp_path / str(old)).config)
    assert configs[0] == configs[1]
