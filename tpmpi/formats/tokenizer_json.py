"""Looks into tokenizer.json, the one form in which every reader hands over a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tpmpi.formats.source import FormatError


def vocabulary(tokenizer: Mapping) -> dict[str, int]:
    """Every token with its id, added ones included.  Raises FormatError where the file has no vocabulary."""
    model = tokenizer.get('model')
    vocab = model.get('vocab') if isinstance(model, dict) else None
    try:
        if isinstance(vocab, list):  # Unigram: [token, score]
            ids = {piece[0]: id for id, piece in enumerate(vocab)}
        else:
            ids = dict(vocab)
        ids.update((token['content'], token['id']) for token in tokenizer.get('added_tokens') or ())
        if not all(isinstance(token, str) and isinstance(id, int) and id >= 0 for token, id in ids.items()):
            raise TypeError('a token is no text or an id no number')
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise FormatError(f'tokenizer.json: no vocabulary with token ids ({error})') from error
    return ids


def added_token(id: int, content: str, special: bool) -> dict:
    """An entry of `added_tokens`: found in the text before anything else is split."""
    return {'id': id, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
            'special': special}


def add_special(tokenizer: dict, ids: Mapping[str, int], token: str | None) -> None:
    """Makes a token of the vocabulary a special one, if it is not among the added ones yet."""
    added = tokenizer.get('added_tokens') or []
    if token in ids and all(entry['content'] != token for entry in added):
        tokenizer['added_tokens'] = sorted(
            [*added, added_token(ids[token], token, True)], key=lambda entry: entry['id'])


def bos_eos_processor(bos: str | None, bos_id: int | None, eos: str | None, eos_id: int | None) -> dict:
    """A post-processor that puts bos before a text and eos after it, each where given."""
    def item(token, type_id):
        return {'SpecialToken': {'id': token, 'type_id': type_id}}

    def part(name, type_id):
        return ([item(bos, type_id)] if bos is not None else []) + [{'Sequence': {'id': name, 'type_id': type_id}}] + (
            [item(eos, type_id)] if eos is not None else [])

    tokens = {token: {'id': token, 'ids': [id], 'tokens': [token]}
              for token, id in ((bos, bos_id), (eos, eos_id)) if token is not None}
    return {'type': 'TemplateProcessing', 'single': part('A', 0), 'pair': part('A', 0) + part('B', 1),
            'special_tokens': tokens}


def dump(tokenizer: Mapping) -> str:
    """The text of tokenizer.json.  Raises FormatError when it holds half a surrogate pair, which no file can store."""
    text = json.dumps(tokenizer, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f'tokenizer.json: a token is not valid Unicode ({error})') from error
    return text
