"""Ids of transformers, streams that lose nothing, and messages and templates that try to get out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tpmpi.tokenizer import StreamDecoder, Tokenizer, TokenizerError

REFERENCES = Path(__file__).parent / 'references'
NAMES = ('tiny_llama', 'tiny_llama_tied')
any_text = st.text(st.characters(exclude_categories=('Cs',)))


def tiny(name: str = 'tiny_llama', template: str | None = None) -> Tokenizer:
    folder = REFERENCES / name
    template = (folder / 'chat_template.jinja').read_text() if template is None else template
    return Tokenizer((folder / 'tokenizer.json').read_text(), template, 0, (2,))


def sentence_piece_like(prepend: bool) -> Tokenizer:
    """BPE on text with ▁ for spaces and <0xNN> for characters that it lacks; the first space is not shown."""
    words = ['▁the', '▁cat', 's', 'é', '▁', 't', 'h', 'e', 'c', 'a', '.', '▁t', '▁th', '▁c', '▁ca']
    vocab = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *words]
    merges = [('▁', 't'), ('▁t', 'h'), ('▁th', 'e'), ('▁', 'c'), ('▁c', 'a'), ('▁ca', 't')]
    backend = Backend(models.BPE(vocab={token: id for id, token in enumerate(vocab)}, merges=merges, unk_token='<unk>',
                                 byte_fallback=True, fuse_unk=True))
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocab[:3]])
    return Tokenizer(backend.to_str())


TINY, OTHER = tiny(), tiny('tiny_llama_tied')
PIECES = [sentence_piece_like(prepend) for prepend in (True, False)]


def stream(tokenizer: Tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def test_the_text_of_one_token_has_the_space_that_it_begins_with():
    for tokenizer in PIECES:
        ids = [tokenizer._backend.token_to_id(token) for token in ('▁the', '▁cat', 's', '▁', 'é', '<0xC3>', '</s>')]
        assert [tokenizer.piece(id) for id in ids] == [' the', ' cat', 's', ' ', 'é', '\ufffd', '']
        assert tokenizer.decode(ids[:3]) == 'the cats'
    for id in range(3, 300):
        assert TINY.piece(id) == TINY.decode([id])


# ---- encode and decode

@pytest.mark.parametrize('name', NAMES)
def test_gives_the_ids_of_transformers(name):
    reference, tokenizer = json.loads((REFERENCES / name / 'reference.json').read_text()), tiny(name)
    for case in reference['texts']:
        assert tokenizer.encode(case['text']) == case['ids'], case['text']
    for case in reference['chats']:
        ids = tokenizer.apply_chat_template(case['messages'], case['add_generation_prompt'])
        assert ids == case['ids'], case['messages']


@given(any_text.filter(lambda text: '<|' not in text))  # a special token spelled out is that token: see below
def test_any_text_survives_byte_level_bpe(text):
    for tokenizer in (TINY, OTHER):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_facts():
    assert (TINY.vocab_size, TINY.bos_token_id, TINY.eos_token_ids) == (300, 0, (2,))
    plain = TINY.encode('The')
    assert OTHER.encode('The')[0] == 0 and 0 not in OTHER.encode('The', add_special_tokens=False)
    assert TINY.encode('The<|im_end|>') == [*plain, 2]
    assert TINY.decode([*plain, 2, 1, 0]) == 'The'
    assert TINY.decode([]) == '' == TINY.decode([299 + 10 ** 6])  # a row of the embedding beyond the vocabulary


def test_truncation_and_padding_in_the_file_are_ignored():
    data = json.loads((REFERENCES / 'tiny_llama' / 'tokenizer.json').read_text())
    data['truncation'] = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    data['padding'] = {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
                       'pad_type_id': 0, 'pad_token': '<|endoftext|>'}
    assert Tokenizer(json.dumps(data)).encode('The capital of France') == TINY.encode('The capital of France')


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(TokenizerError, match='the text is not valid Unicode'):
        TINY.encode('a\ud800b')


@pytest.mark.parametrize('text', [
    '', '{', '[]', '{}', '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": 5}', '[' * 10000])
def test_broken_tokenizer(text):
    with pytest.raises(TokenizerError, match=r'tokenizer\.json is broken'):
        Tokenizer(text)


def test_import_is_cheap():
    code = 'import sys, tpmpi.tokenizer; print({"jinja2", "numpy", "h5py", "mpi4py"} & set(sys.modules))'
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == 'set()'


# ---- streams

@given(any_text)
def test_stream_of_a_text_is_the_text(text):
    for tokenizer in (TINY, OTHER, *PIECES):
        ids = tokenizer.encode(text)
        assert ''.join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 305)))
def test_stream_of_any_ids_is_what_decode_gives(ids):
    for tokenizer in (TINY, OTHER):
        assert ''.join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from(['the', ' cat', 's', 'é', '日', '😀', ' ', '  ', '\n', '\ufffd', 'a', '\u200d'])))
def test_stream_with_byte_tokens_and_a_hidden_first_space(words):
    for tokenizer in PIECES:
        ids = tokenizer.encode(''.join(words))
        pieces = stream(tokenizer, ids)
        assert ''.join(pieces) == tokenizer.decode(ids)
        assert '\ufffd' not in ''.join(pieces) or '\ufffd' in words


def test_characters_come_whole():
    text = '👩\u200d👩\u200d👧\u200d👦 日本'
    ids = TINY.encode(text)
    pieces = stream(TINY, ids)
    assert len(ids) > 20 and pieces.count('👩') == 2 and pieces.count('日') == 1
    assert not any('\ufffd' in piece for piece in pieces)


def test_what_never_becomes_a_character_is_marked():
    ids = TINY.encode('é日')
    decoder = StreamDecoder(TINY)
    assert [decoder.push(id) for id in ids[:-1]] == ['', 'é', '', '']
    assert (decoder.flush(), decoder.flush()) == ('\ufffd', '')
    assert [decoder.push(ids[0]), decoder.push(TINY.encode('x')[0])] == ['', '\ufffdx']  # and is a new stream
    decoder = StreamDecoder(PIECES[0])
    ids = PIECES[0].encode('日 the')
    assert [decoder.push(id) for id in (ids[1], ids[2], ids[-1])] == ['', '', '\ufffd the']


def test_special_tokens_are_not_shown_and_do_not_split_characters():
    a, b = TINY.encode('é')
    assert stream(TINY, [1, a, 2, b, 0]) == ['', '', '', 'é', '', '']


def test_time_of_a_token_does_not_grow():
    """Counts the ids that are decoded: at most three for each token, however long the text."""
    class Counting:
        def __init__(self, backend):
            self.backend, self.decoded = backend, 0

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return self.backend.decode(ids, **options)

    decoder = StreamDecoder(PIECES[0])
    decoder._backend = Counting(decoder._backend)
    ids = PIECES[0].encode('the cats. ' * 100)
    for id in ids:
        decoder.push(id)
    assert decoder._backend.decoded <= 3 * len(ids)
