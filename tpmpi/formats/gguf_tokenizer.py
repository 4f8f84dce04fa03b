"""Builds tokenizer.json from the metadata of a GGUF file.

GGUF stores the vocabulary and the merges, but how text is split before merging only as a name (`tokenizer.ggml.pre`)
whose meaning is written in llama.cpp's source.  A name is supported here when its meaning in Hugging Face's terms is
certain: a wrong split gives tokens that the model never saw.
"""

from __future__ import annotations

from collections.abc import Mapping

from tpmpi.formats.families import GGUF_WHERE, short
from tpmpi.formats.source import FormatError, checked_token_id
from tpmpi.formats.tokenizer_json import added_token, bos_eos_processor, dump

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

READ_KEYS = frozenset('tokenizer.' + key for key in (
    'chat_template', 'ggml.model', 'ggml.pre', 'ggml.tokens', 'ggml.token_type', 'ggml.merges', 'ggml.bos_token_id',
    'ggml.eos_token_id', 'ggml.eot_token_id', 'ggml.eom_token_id', 'ggml.add_bos_token', 'ggml.add_eos_token'))
# Names of tokens that encoding plain text never uses, and facts of other kinds of tokenizers.
NEUTRAL_KEYS = frozenset('tokenizer.' + key for key in (
    'chat_templates', 'ggml.unknown_token_id', 'ggml.padding_token_id', 'ggml.seperator_token_id', 'ggml.scores',
    'ggml.mask_token_id', 'ggml.cls_token_id', 'ggml.prefix_token_id', 'ggml.suffix_token_id', 'ggml.middle_token_id',
    'ggml.fim_pre_token_id', 'ggml.fim_suf_token_id', 'ggml.fim_mid_token_id', 'ggml.fim_pad_token_id',
    'ggml.fim_rep_token_id', 'ggml.fim_sep_token_id', 'ggml.token_type_count'))
FIXED_KEYS = {'tokenizer.ggml.add_space_prefix': False, 'tokenizer.ggml.add_sep_token': False,
              'tokenizer.ggml.remove_extra_whitespaces': False}

LLAMA3_SPLIT = (  # the pattern of Llama 3's own tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')


def byte_level(use_regex: bool) -> dict:
    """Bytes as visible characters; `use_regex` splits by GPT-2's pattern first."""
    return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex}


def split(pattern: str) -> dict:
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def sequence(*steps: dict) -> dict:
    return {'type': 'Sequence', 'pretokenizers': list(steps)}


# Name: pre-tokenizer, whether a word that is a token as a whole skips the merges, whether bos comes first by default.
LLAMA3 = (sequence(split(LLAMA3_SPLIT), byte_level(use_regex=False)), True, True)
PRE_TOKENIZERS = {
    'gpt-2': (byte_level(use_regex=True), False, False),
    'smollm': (sequence({'type': 'Digits', 'individual_digits': True}, byte_level(use_regex=True)), False, False),
    'llama-bpe': LLAMA3, 'llama-v3': LLAMA3, 'llama3': LLAMA3,
}


def open_tokenizer(metadata: Mapping, vocab_size: int) -> tuple[str, str | None, int | None, tuple[int, ...]]:
    """tokenizer.json, chat template, bos id, eos ids.  Raises FormatError for a tokenizer that is not supported."""
    check_keys(metadata)
    model, pre = metadata.get('tokenizer.ggml.model'), metadata.get('tokenizer.ggml.pre')
    if model != 'gpt2':
        raise FormatError(
            f'{GGUF_WHERE}: tokenizer.ggml.model is {short(model)}'
            + (' (SentencePiece)' if model == 'llama' else '')
            + '; supported is gpt2 (byte-level BPE) only; convert from the Hugging Face folder instead')
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise FormatError(
            f'{GGUF_WHERE}: tokenizer.ggml.pre is {short(pre)}; supported are {", ".join(PRE_TOKENIZERS)}; '
            'convert from the Hugging Face folder instead')
    pre_tokenizer, ignore_merges, add_bos = PRE_TOKENIZERS[pre]
    tokens = strings(metadata, 'tokenizer.ggml.tokens')
    if len(tokens) != vocab_size:
        raise FormatError(f'{GGUF_WHERE}: {len(tokens)} tokens; the embedding has {vocab_size} rows')
    types = metadata.get('tokenizer.ggml.token_type', [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise FormatError(f'{GGUF_WHERE}: tokenizer.ggml.token_type does not have one number for each token')
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise FormatError(f'{GGUF_WHERE}: the token {short(twice)} occurs twice')
    bos, eos, eot, eom = (
        checked_token_id(metadata.get(f'tokenizer.ggml.{key}_token_id'), vocab_size, f'tokenizer.ggml.{key}_token_id')
        for key in ('bos', 'eos', 'eot', 'eom'))
    add_bos = flag(metadata, 'tokenizer.ggml.add_bos_token', add_bos) and bos is not None
    add_eos = flag(metadata, 'tokenizer.ggml.add_eos_token', False) and eos is not None
    processor = bos_eos_processor(
        tokens[bos] if add_bos else None, bos, tokens[eos] if add_eos else None, eos) if add_bos or add_eos else None
    template = metadata.get('tokenizer.chat_template')
    if template is not None and not isinstance(template, str):
        raise FormatError(f'{GGUF_WHERE}: tokenizer.chat_template is {short(template)}; expected text')
    text = dump({
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [added_token(id, token, type == CONTROL)
                         for id, (token, type) in enumerate(zip(tokens, types, strict=True))
                         if type in (CONTROL, USER_DEFINED)],
        'normalizer': None, 'pre_tokenizer': pre_tokenizer, 'post_processor': processor,
        'decoder': byte_level(use_regex=True),
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
            'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': ignore_merges,
            'vocab': vocab, 'merges': merges(metadata, vocab)}})
    return text, template, bos, tuple(dict.fromkeys(id for id in (eos, eot, eom) if id is not None))


def check_keys(metadata: Mapping) -> None:
    """Raises FormatError for a key about the tokenizer that is not understood."""
    for key, value in metadata.items():
        if not key.startswith('tokenizer.') or key in READ_KEYS or key in NEUTRAL_KEYS:
            continue
        if key.startswith('tokenizer.chat_template.'):
            continue  # further templates, by name
        if key not in FIXED_KEYS:
            raise FormatError(
                f'{GGUF_WHERE}: unknown key {key!r} (value {short(value)}); '
                'tpmpi does not know what it means for the tokens')
        if value is not FIXED_KEYS[key]:
            raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; supported is {FIXED_KEYS[key]} only')


def strings(metadata: Mapping, key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; expected a list of strings')
    return value


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
