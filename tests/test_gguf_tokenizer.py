"""Tokenizers from GGUF metadata, against ids of transformers, SentencePiece and llama.cpp (references/make_tokenizers.py)."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tpmpi.formats.gguf_sentencepiece import recovered_merges
from tpmpi.formats.gguf_tokenizer import open_tokenizer
from tpmpi.formats.pre_tokenizers import PRE_TOKENIZERS
from tpmpi.formats.source import FormatError
from tpmpi.tokenizer import StreamDecoder, Tokenizer

REFERENCES = Path(__file__).parent / 'references' / 'tokenizers'
BYTE_LEVEL = json.loads((REFERENCES / 'byte_level.json').read_text(encoding='utf-8'))
SENTENCEPIECE = json.loads((REFERENCES / 'sentencepiece.json').read_text(encoding='utf-8'))
NAMES = [name for name in PRE_TOKENIZERS if name in BYTE_LEVEL]
ALIASES = {'phi-2': 'gpt-2', 'refact': 'smollm', 'llama-v3': 'llama-bpe', 'llama3': 'llama-bpe', 'mpt': 'olmo',
           'deepseek-r1-qwen': 'qwen2'}  # make_tokenizers.py checks them in llama.cpp
VOCABULARY = {key: BYTE_LEVEL[key] for key in ('tokens', 'token_type', 'merges', 'bos_token_id', 'eos_token_id')}
LLAMA, GEMMA = SENTENCEPIECE['llama']['keys'], SENTENCEPIECE['gemma']['keys']
SPECIAL = tuple(token for keys in (VOCABULARY, LLAMA, GEMMA)
                for token, type in zip(keys['tokens'], keys['token_type'], strict=True) if type in (2, 3))


def opened(keys: dict, architecture: str = 'llama'):
    metadata = {'general.architecture': architecture} | {
        f'tokenizer.ggml.{key}': value for key, value in keys.items() if value is not None}
    return open_tokenizer(metadata, len(keys['tokens']))


def tokenizer_of(keys: dict, architecture: str = 'llama') -> Tokenizer:
    return Tokenizer(*opened(keys, architecture))


def byte_level(name: str, **keys) -> Tokenizer:
    return tokenizer_of({'model': 'gpt2', 'pre': name, **VOCABULARY, 'add_bos_token': False, **keys})


def streamed(tokenizer: Tokenizer, ids) -> str:
    decoder = StreamDecoder(tokenizer)
    return ''.join([*map(decoder.push, ids), decoder.flush()])


def id_of(keys: dict, token: str) -> int:
    return keys['tokens'].index(token)


# ---- byte level

def test_every_name_has_a_reference():
    assert set(NAMES) | set(ALIASES) == set(PRE_TOKENIZERS)
    for alias, name in ALIASES.items():
        assert PRE_TOKENIZERS[alias] == PRE_TOKENIZERS[name]


@pytest.mark.parametrize('name', NAMES)
def test_ids_are_those_of_the_oracle(name):
    reference = BYTE_LEVEL[name]
    merges = [merge for merge in VOCABULARY['merges'] if merge not in set(reference['without'])]
    tokenizer = byte_level(name, merges=merges)
    for number, text in enumerate(BYTE_LEVEL['texts']):
        assert tokenizer.encode(text) == reference['ids'].get(str(number), BYTE_LEVEL['base'][number]), text


def test_the_vocabulary_tells_the_names_apart():
    """Without this, the test above could pass with the wrong pattern."""
    outcomes = {name: json.dumps([BYTE_LEVEL[name]['ids'], BYTE_LEVEL[name]['without']]) for name in NAMES}
    same = {frozenset(pair) for pair in itertools.combinations(NAMES, 2) if outcomes[pair[0]] == outcomes[pair[1]]}
    assert same == {frozenset(pair) for pair in (
        ('smollm', 'starcoder'), ('llama-bpe', 'smaug-bpe'), ('qwen2', 'stablelm2'))}


@pytest.mark.parametrize('name', ['deepseek-llm', 'falcon'])
def test_steps_that_llama_cpp_leaves_away(name):
    tokenizer = byte_level(name)
    ids = {'deepseek-llm': ['1', '2'], 'falcon': ['Ġ', '1']}[name]
    assert tokenizer.encode({'deepseek-llm': '12', 'falcon': ' 1'}[name]) == [id_of(VOCABULARY, token) for token in ids]


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=60)
@given(text=st.text(max_size=40))
@example(text='\ufdd0 e\u0301 \u212b')
def test_text_comes_back(name, text):
    assume(not any(token in text for token in SPECIAL))  # hypothesis tries words from this package
    tokenizer = TOKENIZERS[name]
    decoded = tokenizer.decode(ids := tokenizer.encode(text))
    assert streamed(tokenizer, ids) == decoded
    if PRE_TOKENIZERS[name].normalizer is None:
        assert decoded == text
    else:
        assert tokenizer.encode(decoded) == ids


TOKENIZERS = {name: byte_level(name) for name in NAMES}


def test_bos_comes_first_where_the_name_or_the_file_says_so():
    bos = VOCABULARY['bos_token_id']
    for name, pre in PRE_TOKENIZERS.items():
        assert (byte_level(name, add_bos_token=None).encode('x')[0] == bos) == pre.add_bos, name
        assert byte_level(name, add_bos_token=True).encode('x')[0] == bos
    assert {name for name, pre in PRE_TOKENIZERS.items() if pre.add_bos} == {'llama-bpe', 'llama-v3', 'llama3', 'tekken'}


def test_what_some_files_have_for_no_token():
    """-1 for an id, and tokens without letters, which llama.cpp takes as well."""
    *rest, last = VOCABULARY['tokens']
    keys = {'tokens': ['' if token in rest[-2:] else token for token in rest] + [last], 'merges': []}
    tokenizer = byte_level('gpt-2', **keys, **{f'{name}_token_id': (1 << 32) - 1 for name in ('bos', 'eot', 'unknown')})
    assert tokenizer.bos_token_id is None and tokenizer.vocab_size == len(rest) + 1


# ---- SentencePiece

@pytest.mark.parametrize('name', ['llama', 'gemma'])
def test_ids_are_those_of_sentencepiece(name):
    tokenizer, reference = tokenizer_of(SENTENCEPIECE[name]['keys']), SENTENCEPIECE[name]
    compared = 0
    for text, ids in zip(SENTENCEPIECE['texts'], reference['ids'], strict=True):
        if text not in ('<s>', '</s>', '<unk>'):  # in a raw prompt they are tokens, for SentencePiece they are letters
            compared += 1
            assert tokenizer.encode(text)[1:] == ids, text
    assert compared > 350
    assert tokenizer.encode('</s>') == [1, 2]


@pytest.mark.parametrize('name', ['llama', 'gemma'])
def test_sentencepiece_streams_whole_characters(name):
    tokenizer = tokenizer_of(SENTENCEPIECE[name]['keys'])
    for text in SENTENCEPIECE['texts']:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        if '\u2581' not in text and text not in ('<s>', '</s>', '<unk>'):
            assert tokenizer.decode(ids) == text
    decoder, ids = StreamDecoder(tokenizer), tokenizer.encode('Ж𠜎', add_special_tokens=False)
    pieces = [piece for piece in map(decoder.push, ids) if piece]
    assert len(ids) > 5 and pieces == ['Ж', '𠜎']


@settings(max_examples=200)
@given(st.text(st.characters(exclude_characters='\u2581', exclude_categories=['Cs']), max_size=40))
@example('  two')
@example(' \x00\t\U0010ffff ')
def test_byte_fallback_keeps_every_text(text):
    assume(not any(token in text for token in SPECIAL))
    for tokenizer in SENTENCEPIECE_TOKENIZERS:
        ids = tokenizer.encode(text)
        assert ids[0] == 1 and 0 not in ids
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


SENTENCEPIECE_TOKENIZERS = [tokenizer_of(LLAMA), tokenizer_of(GEMMA)]


@settings(max_examples=100)
@given(st.data())
def test_merges_from_scores_join_the_best_pair_first(data):
    """Against SentencePiece's own rule, followed step by step: join the neighbours with the best join, the left one first."""
    words = data.draw(st.sets(st.text('abc', min_size=2, max_size=4), max_size=8).map(sorted))
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *'abc', *words]
    scores = [0.0] * 262 + [-float(score) for score in data.draw(st.permutations(range(len(words))))]
    text = data.draw(st.text('abc', max_size=12))
    assume(not ambiguous(text, words))
    keys = {'model': 'llama', 'tokens': tokens, 'scores': scores, 'token_type': [2, 3, 3] + [6] * 256 + [1] * (3 + len(words)),
            'add_space_prefix': False, 'add_bos_token': False}
    score_of = dict(zip(words, scores[262:], strict=True))
    pieces = list(text)
    while joins := [(-score_of[left + right], at) for at, (left, right) in enumerate(itertools.pairwise(pieces))
                    if left + right in score_of]:
        at = min(joins)[1]
        pieces[at:at + 2] = [pieces[at] + pieces[at + 1]]
    assert [tokens[id] for id in tokenizer_of(keys).encode(text)] == pieces


def ambiguous(text: str, words: list[str]) -> bool:
    """Whether two longer occurrences of one token share a letter, as of aba in ababa.

    Each could be joined from other parts, and tokenizer.json cannot give two pairs the same rank.
    """
    return any(len(word) > 2 and text.startswith(word, at) and text.startswith(word, at + step)
               for word in words for at in range(len(text)) for step in range(1, len(word)))


def test_merges_of_a_large_vocabulary_take_seconds():
    pieces = [''.join(letters) for size in range(1, 6) for letters in itertools.product('abcdefghijkl', repeat=size)][:256000]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    start = time.process_time()
    merges = recovered_merges(vocab, [1] * len(vocab), [-float(id) for id in range(len(vocab))])
    assert time.process_time() - start < 20
    assert len(merges) == sum(len(piece) - 1 for piece in pieces) and merges[0] == ['a', 'a']


def test_tokens_that_are_not_ordinary_take_no_part_in_merges():
    vocab = {'a': 0, 'b': 1, 'ab': 2, 'ba': 3, 'aa': 4, 'bb': 5}
    assert recovered_merges(vocab, [1, 1, 1, 3, 4, 5], [0, 0, -1, -2, -3, -4]) == [['a', 'b']]


def test_space_prefix_and_bos_follow_the_file():
    tokens = [LLAMA['tokens'][id] for id in tokenizer_of(LLAMA).encode('the<|user|>the')]
    assert tokens[0] == '<s>' and tokens[1] == '▁the' and tokens.count('▁the') == 2  # after a special token, too
    without = tokenizer_of(LLAMA | {'add_space_prefix': False, 'add_bos_token': False})
    assert without.encode(' the') == [id_of(LLAMA, '▁the')] and without.decode(without.encode(' the')) == ' the'
    assert without.encode('') == []
    assert tokenizer_of(LLAMA | {'add_eos_token': True}).encode('')[-1] == 2
    assert opened(LLAMA | {'bos_token_id': None, 'eos_token_id': None})[2:] == opened(LLAMA)[2:]  # 1 and 2 by default


def test_mistral_has_a_space_at_the_beginning_only():
    instruct = LLAMA | {'tokens': [{'<|user|>': '[INST]'}.get(token, token) for token in LLAMA['tokens']]}
    tokenizer, inst = tokenizer_of(instruct), id_of(LLAMA, '<|user|>')
    ids = tokenizer_of(LLAMA).encode('the the')
    assert tokenizer.encode('the the') == ids
    assert tokenizer.encode('[INST] the the') == [1, inst, *ids[1:]]  # as Mistral's own: the token, then the text alone
    assert tokenizer.decode(tokenizer.encode('[INST] the the')) == 'the the'
    types = [1 if id == inst else type for id, type in enumerate(LLAMA['token_type'])]
    assert tokenizer_of(instruct | {'token_type': types}).encode('[INST] the the') != [1, inst, *ids[1:]]


def test_gemma_has_tokens_of_spaces_and_lines():
    tokenizer = tokenizer_of(GEMMA)
    tokens = [GEMMA['tokens'][id] for id in tokenizer.encode('a\n\n\n   b<table><end_of_turn>')]
    assert tokens == ['<bos>' if '<bos>' in GEMMA['tokens'] else '<s>', 'a', '\n\n\n', '   ', 'b', '<table>', '<end_of_turn>']
    assert tokenizer.decode(tokenizer.encode('a\n\n\n   b<table><end_of_turn>')) == 'a\n\n\n   b<table>'


def test_phi3_takes_white_space_after_its_tokens_away():
    phi3, llama = tokenizer_of(LLAMA, 'phi3'), tokenizer_of(LLAMA)
    assert phi3.encode('<|user|>\n the') == phi3.encode('<|user|>the')
    assert phi3.encode('<s>\n the') != phi3.encode('<s>the')
    assert llama.encode('<|user|>\nthe') != llama.encode('<|user|>the')


# ---- what ends a text, and what is refused

@pytest.mark.parametrize('tokens, types, ends', [
    (('<end_of_turn>', '<eos>'), (3, 4), [0, 1]), (('<|im_end|>', '<|end|>'), (1, 5), []),
    (('<|eot_id|>', '<|end_of_text|>', '<|eom_id|>'), (3, 3, 3), [0, 2, 1]),
    (('<|end|>', '<|endoftext|>'), (3, 3), [1, 0]),
    (('<|end|>', '<|return|>', '<|call|>'), (3, 3, 3), [1, 2]),
])
def test_tokens_that_end_a_turn_are_known_by_name(tokens, types, ends):
    count, eos = len(VOCABULARY['tokens']), VOCABULARY['bos_token_id']  # a token without a telling name
    keys = VOCABULARY | {'tokens': [{'<|im_end|>': 'x1', '<|endoftext|>': 'x2'}.get(token, token)
                                    for token in VOCABULARY['tokens']] + list(tokens),
                         'token_type': VOCABULARY['token_type'] + list(types), 'eos_token_id': eos}
    found = opened({'model': 'gpt2', 'pre': 'gpt-2', **keys})[3]
    assert found == (eos, *(count + end for end in ends))


@pytest.mark.parametrize('changes, message', [
    ({'scores': None}, 'tokenizer.ggml.scores does not have one number for each token'),
    ({'scores': [float('nan')] * 700}, 'tokenizer.ggml.scores holds something else than numbers'),
    ({'scores': ['0'] * 700}, 'tokenizer.ggml.scores holds something else than numbers'),
    ({'token_type': None}, 'tokenizer.ggml.token_type does not have one number for each token'),
    ({'token_type': [1] * 700}, 'no token <0x00> of the type BYTE'),
    ({'unknown_token_id': 700}, 'unknown_token_id is 700; expected a token id from 0 to 699'),
    ({'add_space_prefix': 1}, 'add_space_prefix is 1; expected true or false'),
    ({'remove_extra_whitespaces': True}, 'remove_extra_whitespaces is True; supported is False only'),
    ({'precompiled_charsmap': [1, 2]}, "unknown key 'tokenizer.ggml.precompiled_charsmap'"),
    ({'model': 't5'}, r"tokenizer.ggml.model is 't5' \(Unigram\)"), ({'model': 'gemma4'}, "model is 'gemma4'; supported are"),
    ({'model': ['llama']}, 'tokenizer.ggml.model is '), ({'tokens': ['\ud800', *LLAMA['tokens'][1:]]}, 'not valid Unicode'),
])
def test_sentencepiece_that_is_not_understood_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        opened(LLAMA | changes)
