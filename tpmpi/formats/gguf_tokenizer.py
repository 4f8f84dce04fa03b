"""Builds tokenizer.json from the metadata of a GGUF file.

A file holds byte-level BPE with its merges, or a SentencePiece vocabulary with scores; other kinds are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tpmpi.formats.families import short
from tpmpi.formats.gguf_families import GGUF_WHERE
from tpmpi.formats.gguf_sentencepiece import CONTROL, NORMAL, USER_DEFINED, sentencepiece_tokenizer
from tpmpi.formats.pre_tokenizers import PRE_TOKENIZERS, byte_level
from tpmpi.formats.source import FormatError, checked_token_id
from tpmpi.formats.tokenizer_json import added_token, bos_eos_processor, dump

READ_KEYS = frozenset('tokenizer.' + key for key in (
    'chat_template', 'ggml.model', 'ggml.pre', 'ggml.tokens', 'ggml.token_type', 'ggml.merges', 'ggml.scores',
    'ggml.bos_token_id', 'ggml.eos_token_id', 'ggml.eot_token_id', 'ggml.eom_token_id', 'ggml.unknown_token_id',
    'ggml.add_bos_token', 'ggml.add_eos_token'))
# Names of tokens that encoding plain text never uses, and facts of other kinds of tokenizers.
NEUTRAL_KEYS = frozenset('tokenizer.' + key for key in (
    'chat_templates', 'ggml.padding_token_id', 'ggml.seperator_token_id', 'ggml.mask_token_id', 'ggml.cls_token_id',
    'ggml.prefix_token_id', 'ggml.suffix_token_id', 'ggml.middle_token_id', 'ggml.fim_pre_token_id',
    'ggml.fim_suf_token_id', 'ggml.fim_mid_token_id', 'ggml.fim_pad_token_id', 'ggml.fim_rep_token_id',
    'ggml.fim_sep_token_id', 'ggml.token_type_count'))
FIXED_KEYS = {'tokenizer.ggml.add_sep_token': False, 'tokenizer.ggml.remove_extra_whitespaces': False}

# Tokens that end a text or a turn, known by name as in llama.cpp: many files name only one of them.
END_TOKENS = (
    '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>', '<|im_end|>', '<|endoftext|>', '<|end|>', '<|return|>', '<|call|>',
    '<end_of_turn>', '<eos>', '<end_of_utterance>', '<EOT>', '_<EOT>', '[EOT]', '<\uff5cend\u2581of\u2581sentence\uff5c>')
NO_TOKEN = (1 << 32) - 1  # -1 in 32 bits
HARMONY = ('<|return|>', '<|call|>')  # with these, <|end|> only ends a part of an answer
MODELS = {'gpt2': 'byte-level BPE', 'llama': 'SentencePiece BPE'}


def open_tokenizer(metadata: Mapping, vocab_size: int) -> tuple[str, str | None, int | None, tuple[int, ...]]:
    """tokenizer.json, chat template, bos id, eos ids.  Raises FormatError for a tokenizer that is not supported."""
    model = metadata.get('tokenizer.ggml.model')
    if not isinstance(model, str) or model not in MODELS:
        raise FormatError(
            f'{GGUF_WHERE}: tokenizer.ggml.model is {short(model)}'
            + (' (Unigram)' if model == 't5' else '')
            + f'; supported are {" and ".join(f"{name} ({kind})" for name, kind in MODELS.items())}; '
            'convert from the Hugging Face folder instead')
    check_keys(metadata, model)
    tokens = [token or f'[EMPTY_{id}]' for id, token in enumerate(strings(metadata, 'tokenizer.ggml.tokens'))]  # as llama.cpp
    if len(tokens) != vocab_size:
        raise FormatError(f'{GGUF_WHERE}: {len(tokens)} tokens; the embedding has {vocab_size} rows')
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise FormatError(f'{GGUF_WHERE}: the token {short(twice)} occurs twice')
    types = numbers(metadata, 'token_type', len(tokens), None if model == 'llama' else NORMAL)
    tokenizer, add_bos = (sentencepiece if model == 'llama' else byte_level_bpe)(metadata, vocab, types)
    bos, eos, eot, eom = (token_id(metadata, key, vocab_size) for key in ('bos', 'eos', 'eot', 'eom'))
    if model == 'llama':  # llama.cpp's defaults
        bos, eos = 1 if bos is None else bos, 2 if eos is None else eos
    add_bos = flag(metadata, 'tokenizer.ggml.add_bos_token', add_bos) and bos is not None
    add_eos = flag(metadata, 'tokenizer.ggml.add_eos_token', False) and eos is not None
    tokenizer['post_processor'] = bos_eos_processor(
        tokens[bos] if add_bos else None, bos, tokens[eos] if add_eos else None, eos) if add_bos or add_eos else None
    template = metadata.get('tokenizer.chat_template')
    if template is not None and not isinstance(template, str):
        raise FormatError(f'{GGUF_WHERE}: tokenizer.chat_template is {short(template)}; expected text')
    ends = dict.fromkeys(id for id in (eos, eot, eom, *ends_by_name(vocab, types)) if id is not None)
    return dump({'version': '1.0', 'truncation': None, 'padding': None} | tokenizer), template, bos, tuple(ends)


def byte_level_bpe(metadata: Mapping, vocab: dict[str, int], types: list[int]) -> tuple[dict, bool]:
    """tokenizer.json without its post-processor, and whether bos comes first by default."""
    name = metadata.get('tokenizer.ggml.pre')
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise FormatError(
            f'{GGUF_WHERE}: tokenizer.ggml.pre is {short(name)}; supported are {", ".join(PRE_TOKENIZERS)}; '
            'convert from the Hugging Face folder instead')
    pre = PRE_TOKENIZERS[name]
    return {
        'added_tokens': [added_token(id, token, types[id] == CONTROL) for token, id in vocab.items()
                         if types[id] in (CONTROL, USER_DEFINED)],
        'normalizer': pre.normalizer, 'pre_tokenizer': pre.steps, 'decoder': byte_level(use_regex=True),
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
            'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': pre.ignore_merges,
            'vocab': vocab, 'merges': merges(metadata, vocab)}}, pre.add_bos


def sentencepiece(metadata: Mapping, vocab: dict[str, int], types: list[int]) -> tuple[dict, bool]:
    """tokenizer.json without its post-processor, and whether bos comes first by default."""
    scores = numbers(metadata, 'scores', len(vocab))
    unk = token_id(metadata, 'unknown', len(vocab)) or 0
    return sentencepiece_tokenizer(
        vocab, types, scores, list(vocab)[unk], flag(metadata, 'tokenizer.ggml.add_space_prefix', True),
        metadata.get('general.architecture') == 'phi3', GGUF_WHERE), True


def ends_by_name(vocab: Mapping[str, int], types: list[int]) -> list[int]:
    """Ids of the tokens of END_TOKENS that are no ordinary ones."""
    found = {name: vocab[name] for name in END_TOKENS if name in vocab and types[vocab[name]] in (CONTROL, USER_DEFINED)}
    if all(name in found for name in HARMONY):
        found.pop('<|end|>', None)
    return list(found.values())


def check_keys(metadata: Mapping, model: str) -> None:
    """Raises FormatError for a key about the tokenizer that is not understood."""
    fixed = FIXED_KEYS | ({} if model == 'llama' else {'tokenizer.ggml.add_space_prefix': False})
    known = READ_KEYS | NEUTRAL_KEYS | ({'tokenizer.ggml.add_space_prefix'} - fixed.keys())
    for key, value in metadata.items():
        if not key.startswith('tokenizer.') or key in known:
            continue
        if key.startswith('tokenizer.chat_template.'):
            continue  # further templates, by name
        if key not in fixed:
            raise FormatError(
                f'{GGUF_WHERE}: unknown key {key!r} (value {short(value)}); '
                'tpmpi does not know what it means for the tokens')
        if value is not fixed[key]:
            raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; supported is {fixed[key]} only')


def strings(metadata: Mapping, key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; expected a list of strings')
    return value


def numbers(metadata: Mapping, name: str, count: int, default: int | None = None) -> list:
    """One number for each token; `default` for all of them where the file has none."""
    value = metadata.get(f'tokenizer.ggml.{name}', None if default is None else [default] * count)
    if not isinstance(value, list) or len(value) != count:
        raise FormatError(f'{GGUF_WHERE}: tokenizer.ggml.{name} does not have one number for each token')
    if not all(isinstance(item, int | float) and math.isfinite(item) for item in value):
        raise FormatError(f'{GGUF_WHERE}: tokenizer.ggml.{name} holds something else than numbers')
    return value


def token_id(metadata: Mapping, name: str, vocab_size: int) -> int | None:
    key = f'tokenizer.ggml.{name}_token_id'
    return None if metadata.get(key) == NO_TOKEN else checked_token_id(metadata.get(key), vocab_size, key)


def merges(metadata: Mapping, vocab: Mapping[str, int]) -> list[list[str]]:
    """Pairs of tokens, the first merged first."""
    pairs = []
    for merge in strings(metadata, 'tokenizer.ggml.merges'):
        left, _, right = merge.partition(' ')
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(f'{GGUF_WHERE}: the merge {short(merge)} is not of two tokens that give a third')
        pairs.append([left, right])
    return pairs


def flag(metadata: Mapping, key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; expected true or false')
    return value
