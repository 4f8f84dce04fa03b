"""What the names in a GGUF file's `tokenizer.ggml.pre` mean, in the terms of Hugging Face's tokenizer.json.

A GGUF file stores how text is split before merging only as a name.  llama.cpp writes the meaning of each in C++; the truth
is the tokenizer.json of the models that carry the name.  A name is in the table when its meaning is certain: a wrong split
gives tokens that the model never saw.

Where the two differ, the table follows tokenizer.json.  llama.cpp never normalizes (NFC), has [^a-z] and [^A-Z] in place of
the classes of upper and lower case in `tekken` and `gpt-4o`, does not cut ` 12` after the space in `falcon`, keeps digits of
`deepseek-llm` together, and for some names merges words that are tokens as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

NFC = {'type': 'NFC'}
DIGITS = {'type': 'Digits', 'individual_digits': True}


@dataclass(frozen=True)
class PreTokenizer:
    """What happens to text before byte-level merging."""

    steps: dict  # tokenizer.json's `pre_tokenizer`
    normalizer: dict | None = None
    ignore_merges: bool = False  # a word that is a token as a whole skips the merges
    add_bos: bool = False  # whether bos comes first where the file does not say


def byte_level(use_regex: bool) -> dict:
    """Bytes as visible characters; `use_regex` splits by GPT-2's pattern first."""
    return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex}


def split(pattern: str) -> dict:
    """Every match is a piece, and so is what lies between two."""
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def sequence(*steps: dict) -> dict:
    return {'type': 'Sequence', 'pretokenizers': list(steps)}


def splits(*patterns: str) -> dict:
    """One split after the other, then bytes."""
    return sequence(*map(split, patterns), byte_level(use_regex=False))


# ---- patterns

SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SYMBOLS_AND_SPACES = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
CL100K = SUFFIXES + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|' + SYMBOLS_AND_SPACES
QWEN2 = SUFFIXES + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|' + SYMBOLS_AND_SPACES
QWEN35 = (SUFFIXES + r'|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*'
          r'|\s*[\r\n]+|\s+(?!\S)|\s+')

UPPER, LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
LOWER_WORD, UPPER_WORD = (rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}{a}{LOWER}{b}' for a, b in ('*+', '+*'))
SYMBOLS_SLASH_AND_SPACES = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
TEKKEN = rf'{LOWER_WORD}|{UPPER_WORD}|\p{{N}}|{SYMBOLS_SLASH_AND_SPACES}'
O200K = rf'{LOWER_WORD}{SUFFIXES}?|{UPPER_WORD}{SUFFIXES}?|\p{{N}}{{1,3}}|{SYMBOLS_SLASH_AND_SPACES}'

CJK = r'[一-龥ࠀ-一가-퟿]+'
LETTERS_WITH_CASE = (  # those of DeepSeek's own list; some alphabets are not in it
    'A-Za-zµÀ-ÖØ-öø-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386'
    '\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5'
    '\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d'
    '\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4'
    '\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115'
    '\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184'
    '\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e'
    '\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3'
    '\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943')
DEEPSEEK_V3 = (
    r'\p{N}{1,3}', r'[一-龥぀-ゟ゠-ヿ]+',
    r'[!"#$%&' r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+')


def deepseek(*patterns: str) -> dict:
    return sequence(*map(split, patterns), DIGITS, byte_level(use_regex=False))


# ---- the table

GPT2 = PreTokenizer(byte_level(use_regex=True))
DIGITS_AND_GPT2 = PreTokenizer(sequence(DIGITS, byte_level(use_regex=True)))
LLAMA3 = PreTokenizer(splits(CL100K), ignore_merges=True, add_bos=True)
NEOX = PreTokenizer(byte_level(use_regex=True), NFC)
QWEN = PreTokenizer(splits(QWEN2), NFC)

PRE_TOKENIZERS = {
    'gpt-2': GPT2, 'phi-2': GPT2,
    'smollm': DIGITS_AND_GPT2,  # SmolLM, SmolLM2
    'starcoder': DIGITS_AND_GPT2, 'refact': DIGITS_AND_GPT2,  # StarCoder2, Granite
    'command-r': PreTokenizer(DIGITS_AND_GPT2.steps, NFC),
    'llama-bpe': LLAMA3, 'llama-v3': LLAMA3, 'llama3': LLAMA3,
    'smaug-bpe': PreTokenizer(LLAMA3.steps, ignore_merges=True),  # Llama 3's tokenizer without bos, as in SmolLM3
    'dbrx': PreTokenizer(splits(CL100K)),  # DBRX, OLMo 2, Phi-4
    'gpt-4o': PreTokenizer(splits(O200K)),  # Phi-4-mini
    'tekken': PreTokenizer(splits(TEKKEN), ignore_merges=True, add_bos=True),  # Mistral from Nemo on
    'qwen2': QWEN, 'deepseek-r1-qwen': QWEN, 'stablelm2': QWEN,
    'qwen35': PreTokenizer(splits(QWEN35), NFC),
    'olmo': NEOX, 'mpt': NEOX,  # GPT-NeoX, Pythia, the first OLMo
    'deepseek-llm': PreTokenizer(deepseek(
        r'[\r\n]', rf'\s?[{LETTERS_WITH_CASE}]+', r'\s?[!-/:-~！-／：-～‘-‟　-。]+', r'\s+$', CJK)),
    'deepseek-coder': PreTokenizer(deepseek(r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', CJK)),
    'deepseek-v3': PreTokenizer(splits(*DEEPSEEK_V3)),
    'falcon': PreTokenizer(sequence(
        {'type': 'Punctuation', 'behavior': 'Contiguous'}, byte_level(use_regex=True),
        {'type': 'Digits', 'individual_digits': False}, split('[0-9][0-9][0-9]'))),
}
