"""tokenizer.json of a SentencePiece vocabulary (byte-pair encoding with scores) in a GGUF file.

SentencePiece joins the pair of neighbours whose join has the best score among all tokens; tokenizer.json wants a list of
such pairs, the best first, so that list is recovered here from the scores.  The text is not split before.

Gemma's tokens of several spaces are found before any merging, as by SentencePiece and llama.cpp; the tokenizer.json of
transformers merges them from single spaces, which ends otherwise for more spaces than the longest token has.
"""

from __future__ import annotations

from collections.abc import Sequence

from tpmpi.formats.source import FormatError
from tpmpi.formats.tokenizer_json import added_token

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = '\u2581'  # what a space is in the vocabulary
MISTRAL = '[INST]'  # a token of its own since Mistral's third tokenizer
PLAIN_PHI3 = ('<unk>', '<s>', '<|endoftext|>')


def sentencepiece_tokenizer(
        vocab: dict[str, int], types: Sequence[int], scores: Sequence[float], unk: str | None, space_prefix: bool,
        phi3: bool, where: str) -> dict:
    """tokenizer.json without its post-processor.  `space_prefix`: a space comes before a text; `where` is for messages.

    Raises FormatError where a byte has no token.
    """
    missing = next((byte for byte in range(256) if types[vocab.get(f'<0x{byte:02X}>', 0)] != BYTE), None)
    if missing is not None:
        raise FormatError(f'{where}: no token <0x{missing:02X}> of the type BYTE; supported are SentencePiece '
                          'vocabularies with a token for each byte')
    prepend = [{'type': 'Prepend', 'prepend': SPACE}] if space_prefix else []
    # Llama 2's way is one more space after each special token, too.  The third tokenizer of Mistral has it only at the
    # beginning, and not before a space; llama.cpp knows the first way only and gives [INST] and a text two spaces.
    mistral = space_prefix and MISTRAL in vocab and types[vocab[MISTRAL]] == CONTROL
    strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if space_prefix else []
    return {
        'added_tokens': [
            # Phi-3 takes white space after its tokens away; the file does not say so
            added_token(id, token, types[id] != USER_DEFINED) | {'rstrip': phi3 and token not in PLAIN_PHI3}
            for token, id in vocab.items() if types[id] in (UNKNOWN, CONTROL, USER_DEFINED)],
        'normalizer': None if mistral else {'type': 'Sequence', 'normalizers': [
            *prepend, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]},
        'pre_tokenizer': {'type': 'Metaspace', 'replacement': SPACE, 'prepend_scheme': 'first', 'split': False}
        if mistral else None,
        'decoder': {'type': 'Sequence', 'decoders': [
            {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}, {'type': 'ByteFallback'},
            {'type': 'Fuse'}, *strip]},
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': unk, 'continuing_subword_prefix': None,
            'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True, 'ignore_merges': False,
            'vocab': vocab, 'merges': recovered_merges(vocab, types, scores)}}


def recovered_merges(vocab: dict[str, int], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every pair of tokens whose join is a token, the join of the best score first.

    Only ordinary tokens take part: the others stand for something else than their letters, and those that a user defined
    are found in the text before any merging.  Pairs with the same join come in the order of their ids, as in the
    tokenizer.json of Llama 2.
    """
    ids = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    merges = []
    for join, _ in sorted(ids.items(), key=lambda item: (-scores[item[1]], item[1])):
        cuts = ((join[:at], join[at:]) for at in range(1, len(join)))
        pairs = [(ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids]
        merges += [[left, right] for _, _, left, right in sorted(pairs)]
    return merges
