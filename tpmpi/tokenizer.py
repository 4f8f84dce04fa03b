"""Text to token ids and back: encode, decode, decode as a stream, chat templates.

The tokenizer itself is Hugging Face's tokenizer.json, run by the `tokenizers` package.  What a user writes in a message
never becomes one of the special tokens that a chat template writes.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import re
import string
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import tokenizers

# Noncharacters, which Unicode keeps free for such internal use: around a special token in a message, at the rim of a
# message that could make one together with what stands beside it, and around the id in a special token's private name.
OPEN, CLOSE, RIM, NAME = '\ufdd0', '\ufdd1', '\ufdd2', '\ufdd3'
NONCHARACTERS = re.compile(f'[{OPEN}{CLOSE}{RIM}{NAME}]')


class TokenizerError(ValueError):
    """A tokenizer or a chat template that is broken or goes too far, or text that it cannot take."""


class Tokenizer:
    """Hugging Face's tokenizer.json with a chat template.

    Raises TokenizerError for a tokenizer.json that is broken; a chat template is looked at when it is first used.
    """

    def __init__(self, tokenizer_json: str, chat_template: str | None = None, bos_token_id: int | None = None,
                 eos_token_ids: Iterable[int] = ()):
        self._backend = load_backend(tokenizer_json)
        self.chat_template = chat_template
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(map(int, eos_token_ids))  # each ends a text; the first is the tokenizer's own
        self._added = self._backend.get_added_tokens_decoder()
        self.now: datetime | None = None  # what a chat template takes for the present; None: the clock's time
        self._template = None  # compiled when it is first used
        self._pieces: dict[int, str] = {}

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a raw prompt, in which special tokens are found; `add_special_tokens` puts bos before it if it should.

        Raises TokenizerError for half a surrogate pair, which is not valid Unicode.
        """
        return encode(self._backend, text, add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens.  Bytes that are no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def piece(self, id: int) -> str:
        """The text of one token behind another: decode may take the space that it begins with for that of a whole text.

        Of a special token it is empty, and U+FFFD stands for a part of a character.
        """
        if id not in self._pieces:
            before = [] if self._letter is None else [self._letter]
            self._pieces[id] = self.decode([*before, id])[len(before):]
        return self._pieces[id]

    @functools.cached_property
    def _letter(self) -> int | None:
        """A token that is one letter."""
        ids = ((letter, self._backend.token_to_id(letter)) for letter in string.ascii_letters)
        return next((id for letter, id in ids if id is not None and self.decode([id]) == letter), None)

    def apply_chat_template(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: [{'role': 'user', 'content': ...}, ...], and the head of the answer to come.

        The ids are those of transformers, except that a special token spelled out in a message stays plain text there, and,
        but in an answer, so does an ordinary one that the template writes, such as </think>.
        (A template that itself removes characters from a message could put one together; none in use does.)
        Raises TokenizerError when there is no template, it is broken, it refuses the messages, or it goes too far.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise TokenizerError("expected a list of at least one message such as {'role': 'user', 'content': 'Hello'}")
        try:
            messages = [{key: plain(value) for key, value in message.items() if value is not None} for message in messages]
            marked = [{key: self._marker(message).mark(value) for key, value in message.items()} for message in messages]
        except RecursionError:
            raise TokenizerError('a message holds lists or objects hundreds deep; expected text, or a few levels') from None
        variables = {
            'messages': marked, 'tools': None, 'documents': None, 'add_generation_prompt': add_generation_prompt}
        for name, id in (('bos_token', self.bos_token_id), ('eos_token', next(iter(self.eos_token_ids), None))):
            if id is not None:  # transformers leaves them out, too
                variables[name] = self._backend.id_to_token(id)
        text = self._render(variables)
        if marked != messages:
            if NONCHARACTERS.search(json.dumps(messages, ensure_ascii=False)):
                raise TokenizerError('a message may spell out a special token, and one holds a noncharacter, U+FDD0 to '
                                     'U+FDD3, which no text should; remove either')
            text, forged = self._controls.resolve(text)
            if forged:
                return encode(self._plain_twin, text, add_special_tokens=False)
        return encode(self._backend, text, add_special_tokens=False)

    def _render(self, variables: Mapping) -> str:
        from tpmpi.chat_template import ChatTemplate, ChatTemplateError  # late: jinja2 is for chats only

        if self.chat_template is None:
            raise TokenizerError('this model has no chat template; give a raw prompt')
        try:
            if self._template is None:
                self._template = ChatTemplate(self.chat_template)
            return self._template.render(variables, self.now)
        except ChatTemplateError as error:
            raise TokenizerError(str(error)) from error

    @functools.cached_property
    def _controls(self) -> ControlTokens:
        """The special tokens, and those other added ones that the template writes, such as </think>."""
        template = self.chat_template or ''
        return ControlTokens({token.content: id for id, token in self._added.items()
                              if token.special or (token.content in template and not token.content.isspace())})

    @functools.cached_property
    def _special(self) -> ControlTokens:
        """The special tokens alone."""
        return ControlTokens({token.content: id for id, token in self._added.items() if token.special})

    def _marker(self, message: Mapping) -> ControlTokens:
        """What stays plain text in a message.  An answer may have been a model's own, with its </think>, which templates look
        for."""
        return self._special if message.get('role') == 'assistant' else self._controls

    @functools.cached_property
    def _plain_twin(self) -> tokenizers.Tokenizer:
        """This tokenizer with each control token under its private name, so that its usual name is plain text."""
        data = json.loads(self._backend.to_str())
        names = {token: private_name(id) for token, id in self._controls.ids.items()}
        for token in data['added_tokens']:
            token['content'] = names.get(token['content'], token['content'])
        vocab = data['model']['vocab']
        if isinstance(vocab, dict):
            data['model']['vocab'] = {names.get(token, token): id for token, id in vocab.items()}
        else:  # Unigram: [token, score]
            data['model']['vocab'] = [[names.get(token, token), score] for token, score in vocab]
        twin = load_backend(json.dumps(data))
        if any(twin.token_to_id(name) != self._controls.ids[token] for token, name in names.items()):
            raise TokenizerError(
                'a message spells out a special token, which this tokenizer cannot tell from a real one')
        return twin


@contextlib.contextmanager
def rust_errors(what: str):
    """Turns what the Rust code raises into TokenizerError; its panics are no Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f'{what}: {str(error)[:200]}') from error


def load_backend(tokenizer_json: str) -> tokenizers.Tokenizer:
    with rust_errors('tokenizer.json is broken'):
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
    return backend


def encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f'the text is not valid Unicode: {error}') from error
    with rust_errors('tokenizer.json is broken, it cannot encode'):
        return backend.encode(text, add_special_tokens=add_special_tokens).ids


def plain(value):
    """A message's value built anew from JSON's types only, so that a template cannot call anything through it."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TokenizerError(f'a message holds a {type(value).__name__}; expected text, numbers, lists and objects')


# ---- special tokens that are only text

def private_name(id: int) -> str:
    return f'{NAME}{id}{NAME}'


class ControlTokens:
    """Tells special tokens that the template writes from the same letters in a message."""

    def __init__(self, ids: Mapping[str, int]):
        self.ids = dict(ids)
        tokens = '|'.join(map(re.escape, sorted(ids, key=len, reverse=True))) or '(?!)'
        self.token = re.compile(tokens)
        self.marks = re.compile(f'{OPEN}({tokens}){CLOSE}|[{OPEN}{CLOSE}{RIM}]')
        self.heads = {token[:n] for token in ids for n in range(1, len(token))}
        self.tails = {token[n:] for token in ids for n in range(1, len(token))}
        self.longest = max(map(len, ids), default=0)

    def mark(self, value):
        """A message's value with marks in its texts; most texts need none."""
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if not isinstance(value, str):
            return value
        core = value.strip()  # templates strip
        start = value.find(core)
        end = start + len(core)
        parts = range(1, min(self.longest, len(core) + 1)) if not core.isidentifier() else ()  # not in 'user'
        before = RIM if any(core[:n] in self.tails for n in parts) else ''
        after = RIM if any(core[-n:] in self.heads for n in parts) else ''
        return value[:start] + before + self.token.sub(rf'{OPEN}\g<0>{CLOSE}', core) + after + value[end:]

    def resolve(self, marked: str) -> tuple[str, bool]:
        """The rendered text without marks, and whether it spells out a special token that the template did not write.

        If so, the special tokens that it did write stand under their private names.
        """
        pieces, starts, ends, cuts, at, length = [], [], [], [], 0, 0
        for mark in self.marks.finditer(marked):
            pieces.append(marked[at:mark.start()])
            length += len(pieces[-1])
            if mark[1] is None:
                cuts.append(length)
            else:
                pieces.append(mark[1])
                starts.append(length)
                length += len(mark[1])
                ends.append(length)
            at = mark.end()
        text = ''.join(pieces) + marked[at:]
        named, forged, at, done = [], False, 0, 0
        while (found := self.token.search(text, at)) is not None:
            start, end = found.span()
            span, cut = bisect_right(ends, start), bisect_right(cuts, start)  # the first that end or lie after start
            if (span < len(ends) and starts[span] < end) or (cut < len(cuts) and cuts[cut] < end):
                forged, at = True, start + 1
            else:
                named += text[done:start], private_name(self.ids[found[0]])
                at = done = end
        return (''.join(named) + text[done:], True) if forged else (text, False)


# ---- streams

class StreamDecoder:
    """Text of ids that come one by one, in constant time for each.

    Characters whose bytes lie in several tokens are held back until they are whole.  The pieces together are what
    `tokenizer.decode` makes of all ids at once, but for bytes of <0xNN> tokens that are no UTF-8: here each ill-formed part
    becomes one U+FFFD (the Unicode Standard, 3.9), while decode, which sees a run of such tokens as a whole, gives one for
    each of its bytes, also for those of characters that a stream has shown long before.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._backend, self._added = tokenizer._backend, tokenizer._added
        decoder = self._backend.decoder
        self._byte_level = decoder is not None and decoder.decode(['\u0120']) == ' '
        self._byte_tokens = decoder is not None and decoder.decode(['<0xC3>', '<0xA9>']) == '\u00e9'
        self._start()

    def _start(self) -> None:
        self._bytes = codecs.getincrementaldecoder('utf-8')('replace')
        self._last = None  # the id before: some decoders treat the first token of a text in another way

    def push(self, id: int) -> str:
        """The characters that this id completes; often none."""
        token = self._backend.id_to_token(id)
        if token is None or (id in self._added and self._added[id].special):
            return ''
        data = self._token_bytes(token)
        last, self._last = self._last, id
        if data is not None and (self._byte_level or last is not None or data[0] >= 0x80):
            return self._bytes.decode(data)
        held = self._bytes.decode(b'', final=True)  # bytes that this token does not continue
        if last is None:
            return held + self._backend.decode([id], skip_special_tokens=True)
        before = self._backend.decode([last], skip_special_tokens=True)
        return held + self._backend.decode([last, id], skip_special_tokens=True)[len(before):]

    def flush(self) -> str:
        """What is left at the end of the text: U+FFFD for bytes that never became a character, or nothing."""
        held = self._bytes.decode(b'', final=True)
        self._start()
        return held

    def _token_bytes(self, token: str) -> bytes | None:
        """The bytes that a token stands for, where it stands for bytes rather than for text."""
        if self._byte_level:
            try:
                return bytes(map(BYTE_OF.__getitem__, token))
            except KeyError:
                return token.encode()
        if self._byte_tokens and re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes.fromhex(token[3:5])
        return None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte: itself where it is printable in Latin-1, one above U+00FF otherwise."""
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = byte_alphabet()
