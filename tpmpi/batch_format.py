"""One line of a batch: read a request, write its answer.

Two formats, told apart by the line itself.  Plain is short and ours:

    {"id": "a", "prompt": "Once", "max_new_tokens": 20}  ->  {"id": "a", "text": ..., "tokens": [...], ...}

OpenAI's batch format, as `vllm run-batch` reads and writes it, is known by its `custom_id`:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 20}}

What a line asks and we cannot do is refused by name, never ignored.  The input comes from anywhere: nothing in it makes
more than a LineError, and every record can be written as one line of UTF-8 JSON.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from hashlib import blake2b

MAX_LINE = 64 << 20  # bytes
MAX_DIGITS = 640  # characters of a number: Python may be set to read and write no more
LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks
CHAT, COMPLETIONS, EMBEDDINGS = URLS = '/v1/chat/completions', '/v1/completions', '/v1/embeddings'

WHOLE, NUMBER, TRUTH, TEXTS = 'a whole number', 'a number', 'true or false', 'a string or a list of strings'
PARAMS = {  # arguments of SamplingParams that a line can give
    'max_new_tokens': WHOLE, 'temperature': NUMBER, 'top_k': WHOLE, 'top_p': NUMBER, 'min_p': NUMBER,
    'repetition_penalty': NUMBER, 'seed': WHOLE, 'stop': TEXTS, 'ignore_eos': TRUTH, 'logprobs': WHOLE,
    'prompt_logprobs': TRUTH,
}
PLAIN_KEYS = ('id', 'prompt', 'messages', *PARAMS)
OPENAI_KEYS = ('custom_id', 'method', 'url', 'body')
SOURCE = {CHAT: 'messages', COMPLETIONS: 'prompt', EMBEDDINGS: 'input'}  # by url: the field of a body that holds the prompt
SHARED = {'max_tokens': 'max_new_tokens'} | {name: name for name in PARAMS if name not in ('max_new_tokens', 'logprobs')}
FIELDS = {CHAT: (*SHARED, 'max_completion_tokens', 'logprobs', 'top_logprobs'), COMPLETIONS: (*SHARED, 'logprobs')}
FREE = ('user', 'metadata', 'store', 'service_tier')  # change no answer, whatever they say
NOTHING = {'n': 1, 'stream': False, 'logit_bias': {}, 'presence_penalty': 0, 'frequency_penalty': 0}
NEUTRAL = {  # the only value, besides null, with which a field asks for nothing
    CHAT: NOTHING | {'response_format': {'type': 'text'}, 'tools': [], 'tool_choice': 'none'},
    COMPLETIONS: NOTHING | {'best_of': 1, 'echo': False},
    EMBEDDINGS: {'encoding_format': 'float'},
}


class LineError(ValueError):
    """A line that cannot be run.  id: as the line gives it, None where it gives none; style: 'plain' or 'openai'."""

    def __init__(self, message: str, id: str | int | None = None, style: str = 'plain'):
        super().__init__(message)
        self.id, self.style = id, style


@dataclass(frozen=True)
class Defaults:
    """What the command line gives for lines that don't say; the temperature for plain lines only, OpenAI's is 1."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: bool = False
    embedding: bool = False


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for: text, token ids or chat messages, and how to go on from them."""

    line: int  # in the input, from 1
    id: str | int  # custom_id of the OpenAI format
    style: str  # 'plain' or 'openai'
    prompt: str | list[int] | None  # text or token ids; None: messages
    messages: list[dict] | None  # each with the strings role and content, and perhaps name
    params: dict  # arguments of SamplingParams, all in range; max_new_tokens is None where nobody said
    own_seed: bool  # the line itself gave the seed: then equal seeds give equal texts
    embedding: bool  # the last hidden state is asked for
    url: str = ''  # OpenAI's endpoint
    model: str | None = None  # as the body names it
    logprobs: bool = False  # those of the generated tokens are asked for, with params['logprobs'] alternatives, maybe none


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: str  # 'stop' or 'length'
    logprobs: list[dict] | None = None  # per token {'token': id, 'text': str, 'logprob': float, 'top': [[id, text, logprob]]}
    prompt_logprobs: list[float] | None = None  # of the prompt's tokens from the second on
    embedding: list[float] | None = None  # [hidden]
    offsets: list[int] | None = None  # where the text of each token begins


# ---- reading

def parse_line(data: bytes, line: int, defaults: Defaults) -> BatchRequest:
    """The request of one line, without its line end; number `line` of the input.  Raises LineError."""
    style, id = 'openai' if b'"custom_id"' in data[:1 << 16] else 'plain', None
    try:
        record = _decode(data)
        style, id = _identity(record)
        return (_openai if style == 'openai' else _plain)(record, line, defaults)
    except LineError as error:
        error.id, error.style = id, style
        raise


def line_id(data: bytes) -> str | int | None:
    """The id alone; None when the line is malformed or has no id that can be used.  Never raises."""
    return line_identity(data)[1]


def line_identity(data: bytes) -> tuple[str, str | int | None]:
    """(style of a line, its id or None), as `line_id`."""
    try:
        return _identity(_decode(data))
    except LineError:
        return 'plain', None


def _identity(record: dict) -> tuple[str, str | int | None]:
    """(style of a line, its id or None)."""
    style = 'openai' if 'custom_id' in record or 'body' in record else 'plain'
    id = record.get('custom_id' if style == 'openai' else 'id')
    return style, id if isinstance(id, str) or type(id) is int else None


def _plain(record: dict, line: int, defaults: Defaults) -> BatchRequest:
    _refuse_unknown(record, PLAIN_KEYS, 'key')
    id = record.get('id')
    _require(isinstance(id, str) or type(id) is int, 'id', id, 'a string or a whole number')
    if ('prompt' in record) == ('messages' in record):
        raise LineError('expected one of prompt and messages, found ' + ('both' if 'prompt' in record else 'neither'))
    given = {name: _typed(name, record[name], kind) for name, kind in PARAMS.items() if name in record}
    params = _params(given, defaults)
    prompt, messages = _source(record, 'prompt' if 'prompt' in record else 'messages')
    return BatchRequest(line, id, 'plain', prompt, messages, params, 'seed' in given, defaults.embedding,
                        logprobs=params['logprobs'] > 0)


def _openai(record: dict, line: int, defaults: Defaults) -> BatchRequest:
    _refuse_unknown(record, OPENAI_KEYS, 'key')
    id, url, body = record.get('custom_id'), record.get('url'), record.get('body')
    _require(isinstance(id, str), 'custom_id', id, 'a string')
    _require(record.get('method', 'POST') == 'POST', 'method', record.get('method'), 'POST')
    _require(url in URLS, 'url', url, ' or '.join(URLS))
    _require(isinstance(body, dict), 'body', body, 'an object')
    body = {name: value for name, value in body.items() if value is not None}  # null asks for nothing
    neutral, source = NEUTRAL[url], SOURCE[url]
    _refuse_unknown(body, ('model', source, *FIELDS.get(url, ()), *neutral, *FREE), f'field of {url}')
    for name, expected in neutral.items():
        value = body.get(name, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise LineError(f'{name} is {_shown(value)}; only {_shown(expected)} is supported')
    _require(isinstance(body.get('model', ''), str), 'model', body.get('model'), 'a string')
    given, logprobs = _body_params(body, url, defaults)
    params = _params({'temperature': 1.0} | given, defaults, {
        'max_new_tokens': 'max_tokens' if 'max_tokens' in body else 'max_completion_tokens',
        'logprobs': 'top_logprobs' if url == CHAT else 'logprobs'})
    prompt, messages = _source(body, source)
    return BatchRequest(line, id, 'openai', prompt, messages, params, 'seed' in given, url == EMBEDDINGS or defaults.embedding,
                        url, body.get('model'), logprobs)


def _body_params(body: dict, url: str, defaults: Defaults) -> tuple[dict, bool]:
    """(arguments of SamplingParams that a body gives, whether log-probabilities of the generated tokens are asked for)."""
    if url == EMBEDDINGS:
        return {'max_new_tokens': 0, 'logprobs': 0, 'prompt_logprobs': False}, False
    given = {ours: _typed(name, body[name], PARAMS[ours]) for name, ours in SHARED.items() if name in body}
    if 'max_completion_tokens' in body:
        most = _typed('max_completion_tokens', body['max_completion_tokens'], WHOLE)
        if given.setdefault('max_new_tokens', most) != most:
            raise LineError('max_tokens and max_completion_tokens differ; give one of them')
    if given.get('top_k') == -1:  # vLLM's word for all
        given['top_k'] = 0
    if not {'logprobs', 'top_logprobs'} & body.keys():
        return given, defaults.logprobs > 0
    if url == COMPLETIONS:
        return given | {'logprobs': _typed('logprobs', body['logprobs'], WHOLE)}, True
    wanted, top = (_typed('logprobs', body.get('logprobs', False), TRUTH),
                   _typed('top_logprobs', body.get('top_logprobs', 0), WHOLE))
    if top and not wanted:
        raise LineError('top_logprobs is given without logprobs; set logprobs to true')
    return given | {'logprobs': top}, wanted


def _params(given: dict, defaults: Defaults, names: dict | None = None) -> dict:
    """All arguments of SamplingParams, checked.  names: what the line calls them, where it has other words."""
    from tpmpi.sampling import SamplingParams  # brings NumPy, which must not come before the threads are chosen

    params = {name: getattr(defaults, name, 1.0) for name in PARAMS} | given  # only repetition_penalty has no default
    params['stop'] = tuple(params['stop'])
    try:
        SamplingParams(**params | {'max_new_tokens': params['max_new_tokens'] or 0})
    except ValueError as error:
        name, _, rest = str(error).partition(' ')
        raise LineError(f'{(names or {}).get(name, name)} {_cut(rest, 200)}') from None
    return params


def _source(record: dict, name: str) -> tuple[str | list[int] | None, list[dict] | None]:
    """(text or token ids, chat messages), one of them None."""
    value = record.get(name)
    if name == 'messages':
        _require(isinstance(value, list) and value, name, value, 'a list of at least one message')
        return None, [_message(message, f'messages[{at}]') for at, message in enumerate(value)]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):  # a list of one, as OpenAI has it
        value = value[0]
    tokens = isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
    _require(isinstance(value, str) or tokens, name, value, 'one text or one list of token ids')
    return value, None


def _message(message, where: str) -> dict:
    _require(isinstance(message, dict), where, message, 'an object with role and content')
    message = {key: value for key, value in message.items() if value is not None}
    _refuse_unknown(message, ('role', 'content', 'name'), f'key of {where}')
    if isinstance(message.get('content'), list):
        for part in message['content']:
            text = isinstance(part, dict) and part.keys() == {'type', 'text'} and part['type'] == 'text'
            _require(text and isinstance(part['text'], str), f'{where}.content', part, '{"type": "text", "text": ...} only')
        message['content'] = '\n'.join(part['text'] for part in message['content'])  # as vLLM joins them
    for key in ('role', 'content', *message):
        _require(isinstance(message.get(key), str), f'{where}.{key}', message.get(key), 'a string')
    return message


def _typed(name: str, value, kind: str):
    """A value of the kind that a parameter has; a bool is no number."""
    if kind == NUMBER and type(value) in (int, float):
        return float(value)
    if kind == TEXTS:
        value = [value] if isinstance(value, str) else value
        _require(isinstance(value, list) and all(isinstance(text, str) for text in value), name, value, kind)
        return tuple(value)
    _require(type(value) is {WHOLE: int, TRUTH: bool}.get(kind), name, value, kind)
    return value


def _refuse_unknown(record: dict, names: tuple[str, ...], what: str) -> None:
    for name in record:
        if name not in names:
            raise LineError(f'{_shown(name)} is no {what}; known are {", ".join(names)}')


def _require(ok, name: str, value, expected: str) -> None:
    if not ok:
        raise LineError(f'{name} is {"missing" if value is None else _shown(value)}; expected {expected}')


# ---- JSON of unknown origin

def _object(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise LineError(f'the key {_shown(name)} is given twice')
    return result


def _number(digits: str) -> int | float:
    if len(digits) <= MAX_DIGITS and math.isfinite(float(digits)):
        return int(digits) if digits.lstrip('-').isdecimal() else float(digits)
    raise LineError(f'the number {_cut(digits)} is not finite or too long')


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_number, parse_float=_number, parse_constant=_number)


def _decode(data: bytes) -> dict:
    """The JSON object of a line; a byte order mark before it is skipped.  Raises LineError."""
    if len(data) > MAX_LINE:
        raise LineError(f'the line is longer than {MAX_LINE} bytes, the most that a request may have')
    try:
        record = DECODER.decode(data.decode().removeprefix('\ufeff').strip(' \t\r\n'))
        if re.search(rb'\\u[dD][89a-fA-F]', data):
            json.dumps(record, ensure_ascii=False).encode()  # half a pair, as in "\ud800", has no UTF-8
    except UnicodeDecodeError as error:
        raise LineError(f'the line is no UTF-8 at byte {error.start + 1}; expected one JSON object in UTF-8') from None
    except UnicodeEncodeError:
        raise LineError('a text holds a lone surrogate (\\ud800 to \\udfff, half of a character); expected whole ones') from None
    except json.JSONDecodeError as error:
        nul = ' (the line holds NUL bytes: is the file damaged?)' if b'\0' in data else ''
        raise LineError(f'the line is no JSON at character {error.pos + 1}: {error.msg}{nul}') from None
    except RecursionError:
        raise LineError('the line is nested too deeply; expected a request') from None
    if not isinstance(record, dict):
        raise LineError(f'the line is {_shown(record)}; expected a JSON object')
    return record


def _shown(value) -> str:
    """A value for a message: short, on one line, without half characters."""
    if isinstance(value, (list, dict)) and value and value != {'type': 'text'}:
        return ('a list' if isinstance(value, list) else 'an object') + f' of {len(value)}'
    return _cut(_clean(json.dumps(value[:80] if isinstance(value, str) else value, ensure_ascii=False)))


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + '…'


def _clean(text: str) -> str:
    """A text that UTF-8 can hold: half characters become U+FFFD."""
    return re.sub('[\ud800-\udfff]', '\ufffd', text)


# ---- writing

def result_record(request: BatchRequest, outcome: Outcome, model: str, created: int) -> dict:
    """The answer to a request.  model: the name of what ran; created: Unix seconds (OpenAI's format has them)."""
    usage = {'prompt_tokens': outcome.prompt_tokens, 'completion_tokens': len(outcome.tokens),
             'total_tokens': outcome.prompt_tokens + len(outcome.tokens)}
    text, logprobs, extras = _clean(outcome.text), None, {}
    if request.logprobs and outcome.logprobs is not None:
        logprobs = [{'token': int(token['token']), 'text': _clean(token['text']), 'logprob': max(LEAST_LOGPROB, token['logprob']),
                     'top': [[int(id), _clean(other), max(LEAST_LOGPROB, x)] for id, other, x in token['top']]}
                    for token in outcome.logprobs]
    if request.params['prompt_logprobs'] and outcome.prompt_logprobs is not None:
        extras['prompt_logprobs'] = [max(LEAST_LOGPROB, x) for x in outcome.prompt_logprobs]
    if request.embedding and outcome.embedding is not None:
        extras['embedding'] = [float(x) if math.isfinite(x) else None for x in outcome.embedding]
    if request.style == 'plain':
        return {'id': request.id, 'text': text, 'tokens': [int(token) for token in outcome.tokens],
                'finish_reason': outcome.finish_reason, 'usage': usage,
                **({} if logprobs is None else {'logprobs': logprobs}), **extras}
    name = _name(request.line, request.id)
    kind, prefix = {CHAT: ('chat.completion', 'chatcmpl'), COMPLETIONS: ('text_completion', 'cmpl'),
                    EMBEDDINGS: ('list', 'embd')}[request.url]
    body = {'id': f'{prefix}-{name}', 'object': kind, 'created': created, 'model': model}
    if request.url == EMBEDDINGS:
        body['data'] = [{'index': 0, 'object': 'embedding', 'embedding': extras['embedding']}]
        del usage['completion_tokens']
    else:
        chat = request.url == CHAT
        answer = {'message': {'role': 'assistant', 'content': text}} if chat else {'text': text}
        shown = None
        if logprobs is not None:
            shown = _chat_logprobs(logprobs) if chat else _completion_logprobs(logprobs, outcome.offsets)
        body['choices'] = [{'index': 0, **answer, 'logprobs': shown, 'finish_reason': outcome.finish_reason, **extras}]
    return _envelope(name, request.id, 200, body | {'usage': usage}, None)


def error_record(line: int, id: str | int | None, style: str, message: str) -> dict:
    """The answer to a line that cannot be run.  A repeated id is not its id: pass None and name it in the message."""
    id = _clean(id) if isinstance(id, str) else id
    error = {'message': _clean(message), 'type': 'invalid_request_error'}
    if style == 'plain':
        return {'id': id, 'line': line, 'error': error}
    error |= {'param': None, 'code': None}
    return _envelope(_name(line, id), id, 400, {'error': error}, error | {'line': line})


def record_key(record: dict) -> tuple[str, int | str]:
    """('line', n) of an error, ('id', id) of a result: how a restart finds what is done.  LineError: neither."""
    if isinstance(record, dict):
        style, id = _identity(record)
        error = record.get('error')
        line = (error if style == 'openai' else record).get('line') if isinstance(error, dict) else None
        if type(line) is int:
            return 'line', line
        if error is None and id is not None:
            return 'id', id
    raise LineError(f'{_shown(record)} is no record of a batch; is this the output of another program?')


def encode_record(record: dict) -> bytes:
    """One line of UTF-8 JSON with its end, also for readers that take U+0085, U+2028 and U+2029 for line ends."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    text = re.sub('[\u0085\u2028\u2029]', lambda found: f'\\u{ord(found[0]):04x}', text)
    return text.encode('utf-8', 'replace') + b'\n'


def _envelope(name: str, id, status: int, body: dict, error: dict | None) -> dict:
    response = {'status_code': status, 'request_id': f'batch-{name}', 'body': body}
    return {'id': f'batch_req_{name}', 'custom_id': id, 'response': response, 'error': error}


def _name(line: int, id) -> str:
    """A name for the answers' ids that a repeated run gives again."""
    return blake2b(json.dumps([line, id]).encode(), digest_size=12).hexdigest()


def _chat_logprobs(logprobs: list[dict]) -> dict:
    def entry(text: str, logprob: float) -> dict:  # a part of a character is shown as U+FFFD, which are not its bytes
        return {'token': text, 'logprob': logprob, 'bytes': None if '\ufffd' in text else list(text.encode())}

    return {'content': [entry(token['text'], token['logprob']) | {'top_logprobs': [entry(text, x) for _, text, x in token['top']]}
                        for token in logprobs]}


def _completion_logprobs(logprobs: list[dict], offsets: list[int]) -> dict:
    top = []
    for token in logprobs:
        best, tokens = {}, {id: (text, x) for id, text, x in token['top']} | {token['token']: (token['text'], token['logprob'])}
        for id, (text, x) in tokens.items():
            best[text if text not in best else f'token_id:{id}'] = x  # parts of characters have one text
        top.append(best)
    texts = [token['text'] for token in logprobs]
    return {'text_offset': offsets,
            'token_logprobs': [token['logprob'] for token in logprobs], 'tokens': texts, 'top_logprobs': top}
