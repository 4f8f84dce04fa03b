"""The numbers of a batch in HDF5: rows of any length come back as they were."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.arrays import ArraysError, Numbers, numbers_of, write_arrays

floats = st.floats(-100, 0, width=32)


@st.composite
def tables(draw):
    """Rows that all have the same kinds of numbers."""
    scored, embedded, logged, k = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 3)))
    rows = []
    for i in range(draw(st.integers(0, 8))):
        tokens = draw(st.lists(st.integers(0, 1 << 20), max_size=5))
        logprobs = [{'logprob': draw(floats), 'top': [[j, 'x', draw(floats)] for j in range(k)]} for _ in tokens]
        rows.append(Numbers(draw(st.sampled_from('é\0')) + str(i), tokens, logprobs if logged else None,
                            draw(st.lists(floats, max_size=5)) if scored else None,
                            draw(st.lists(floats, min_size=4, max_size=4)) if embedded else None))
    return rows


@settings(max_examples=60)
@given(rows=tables())
def test_rows_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('arrays') / 'out.h5'
    assert write_arrays(path, rows) == len(rows)
    with h5py.File(path) as f:
        def row_of(name, i):
            start = f[f'{name}_start'][()]
            assert len(start) == len(rows) + 1
            return f[name][start[i]:start[i + 1]] if name in f else []

        assert 'tokens' in f
        for i, row in enumerate(rows):
            assert f['id'].asstr()[i] == row.id.replace('\0', r'\u0000') and list(row_of('tokens', i)) == row.tokens
            if row.prompt_logprobs is not None:
                assert list(row_of('prompt_logprobs', i)) == row.prompt_logprobs
            if row.embedding is not None:
                assert list(f['embedding'][i]) == row.embedding
            if row.logprobs is not None:
                assert list(row_of('logprobs', i)) == [t['logprob'] for t in row.logprobs]
                if row.logprobs and row.logprobs[0]['top']:
                    expected = [[e[2] for e in t['top']] for t in row.logprobs]
                    np.testing.assert_array_equal(row_of('top_logprobs', i), expected)
                    assert row_of('top_tokens', i).tolist() == [[e[0] for e in t['top']] for t in row.logprobs]


def test_many_rows_are_written_in_pieces(tmp_path):
    rows = [Numbers(i, [i] * (i % 7), None, None, [float(i)] * 300) for i in range(1000)]
    write_arrays(tmp_path / 'out.h5', iter(rows))
    with h5py.File(tmp_path / 'out.h5') as f:
        assert f['embedding'].shape == (1000, 300) and (f['embedding'][:, 7] == np.arange(1000)).all()
        assert f['tokens_start'][-1] == len(f['tokens']) == sum(i % 7 for i in range(1000))


def test_records_of_both_formats():
    plain = {'id': 'a', 'text': 'x', 'tokens': [3], 'logprobs': [{'logprob': -1.0, 'top': []}], 'embedding': [1.0]}
    assert numbers_of(plain) == Numbers('a', [3], [{'logprob': -1.0, 'top': []}], None, [1.0])
    body = {'data': [{'embedding': [2.0]}]}
    assert numbers_of({'custom_id': 'b', 'response': {'body': body}, 'error': None}) == Numbers('b', [], None, None, [2.0])
    assert numbers_of({'id': None, 'line': 3, 'error': {'message': 'bad'}}) is None


@pytest.mark.parametrize('rows', [
    [Numbers(1, [], None, [-1.0]), Numbers(2, [])], [Numbers(1, []), Numbers(2, [], None, [-1.0])],
    [Numbers(1, [], None, None, [1.0]), Numbers(2, [], None, None, [1.0, 2.0])]])
def test_rows_that_do_not_fit_together_are_refused_and_leave_no_file(tmp_path, rows):
    with pytest.raises(ArraysError):
        write_arrays(tmp_path / 'out.h5', rows)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArraysError, match='cannot write .*nowhere.*; the results are safe in the output'):
        write_arrays(tmp_path / 'nowhere' / 'out.h5', [])
