"""Batch lines: what valid requests become, what hostile lines do, and answers against objects written by hand."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpmpi.batch_format import (
    MAX_LINE,
    BatchRequest,
    Defaults,
    LineError,
    Outcome,
    encode_record,
    error_record,
    line_id,
    parse_line,
    record_key,
    result_record,
)

CHAT, COMPLETIONS, EMBEDDINGS = '/v1/chat/completions', '/v1/completions', '/v1/embeddings'
MESSAGES = [{'role': 'user', 'content': 'Hi'}]
UNSAID = {'max_new_tokens': None, 'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0,
          'seed': 0, 'stop': (), 'ignore_eos': False, 'logprobs': 0, 'prompt_logprobs': False}


def line(record, **options) -> bytes:
    return json.dumps(record, **options).encode()


def plain(record=None, **keys) -> bytes:
    return line({'id': 'a', 'prompt': 'x'} | keys if record is None else record)


def openai(url=CHAT, **body) -> bytes:
    source = {CHAT: {'messages': MESSAGES}, COMPLETIONS: {'prompt': 'x'}, EMBEDDINGS: {'input': 'x'}}[url]
    return line({'custom_id': 'a', 'method': 'POST', 'url': url, 'body': source | body})


def parse(data: bytes, **defaults) -> BatchRequest:
    return parse_line(data, 7, Defaults(**defaults))


def refused(data: bytes) -> LineError:
    """The error of a line, whose record can be written and found again in both styles."""
    with pytest.raises(LineError) as caught:
        parse(data)
    error = caught.value
    assert '\n' not in str(error) and len(str(error)) < 500
    for style in ('plain', 'openai'):
        written = encode_record(error_record(7, error.id, style, str(error)))
        assert written.count(b'\n') == 1 and record_key(json.loads(written.decode())) == ('line', 7)
    return error


# ---- valid requests, put together field by field

texts = st.text(st.characters(exclude_categories=('Cs',)), max_size=20)
ids = st.one_of(texts, st.integers(-10**30, 10**30))
messages = st.lists(st.fixed_dictionaries({'role': texts, 'content': texts}, optional={'name': texts}), min_size=1, max_size=3)
prompts = st.one_of(texts, st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5))
fractions = st.floats(0, 1)
temperatures = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
shared = {
    'temperature': st.one_of(temperatures, st.integers(0, 9)), 'top_k': st.integers(0, 1 << 31),
    'top_p': st.floats(0, 1, exclude_min=True), 'min_p': fractions, 'repetition_penalty': st.floats(0.1, 9),
    'seed': st.integers(0, (1 << 64) - 1), 'stop': st.one_of(texts.filter(len), st.lists(texts.filter(len), max_size=3)),
    'ignore_eos': st.booleans(), 'prompt_logprobs': st.booleans(),
}
some = st.fixed_dictionaries({}, optional=shared)
counts = st.integers(0, 1000)
sources = st.one_of(st.tuples(st.just('prompt'), prompts), st.tuples(st.just('messages'), messages))
dumps = st.fixed_dictionaries({'ensure_ascii': st.booleans(), 'sort_keys': st.booleans()})
default_sets = st.builds(Defaults, st.one_of(st.none(), counts), temperatures, counts, st.floats(0.1, 1), fractions, counts,
                         st.just(('end',)), st.booleans(), counts, st.booleans(), st.booleans())


def expected_params(given: dict, defaults: Defaults, **others) -> dict:
    """The line's word before the command line's before SamplingParams' own."""
    said = {k: (v,) if k == 'stop' and isinstance(v, str) else tuple(v) if k == 'stop' else v for k, v in given.items()}
    return UNSAID | {k: v for k, v in dataclasses.asdict(defaults).items() if k in UNSAID} | others | said


@given(ids, sources, some, st.fixed_dictionaries({}, optional={'max_new_tokens': counts, 'logprobs': counts}), default_sets,
       dumps)
def test_a_plain_request_is_what_it_says(id, source, params, more, defaults, options):
    data = line({'id': id, source[0]: source[1]} | params | more, **options)
    expected = expected_params(params | more, defaults)
    assert parse_line(data, 3, defaults) == BatchRequest(
        3, id, 'plain', source[1] if source[0] == 'prompt' else None, source[1] if source[0] == 'messages' else None,
        expected, 'seed' in params, defaults.embedding, logprobs=expected['logprobs'] > 0)
    assert line_id(data) == id and type(line_id(data)) is type(id)


nothing = st.fixed_dictionaries({}, optional={
    'n': st.just(1), 'stream': st.just(False), 'logit_bias': st.sampled_from([None, {}]), 'presence_penalty': st.just(0),
    'frequency_penalty': st.just(0.0), 'user': texts, 'metadata': st.dictionaries(texts, texts), 'store': st.booleans(),
    'service_tier': texts})


@given(texts, st.one_of(prompts, messages.map(lambda m: {'chat': m})), some, st.one_of(st.none(), counts),
       st.one_of(st.none(), counts), nothing, default_sets, dumps, st.booleans())
def test_an_openai_request_is_what_it_says(id, source, params, new, top, neutral, defaults, options, method):
    chat = isinstance(source, dict)
    body = {'model': 'm', ('messages' if chat else 'prompt'): source['chat'] if chat else source} | params | neutral
    body |= {} if new is None else {'max_tokens': new}
    if top is not None:
        body |= {'logprobs': True, 'top_logprobs': top} if chat else {'logprobs': top}
    body |= {'tools': [], 'response_format': {'type': 'text'}} if chat else {'best_of': 1}
    record = {'custom_id': id, 'url': CHAT if chat else COMPLETIONS, 'body': body} | ({'method': 'POST'} if method else {})
    others = {'temperature': 1.0} | ({} if new is None else {'max_new_tokens': new}) | ({} if top is None else {'logprobs': top})
    expected = expected_params(params, defaults, **others)
    assert parse_line(line(record, **options), 3, defaults) == BatchRequest(
        3, id, 'openai', None if chat else source, source['chat'] if chat else None, expected, 'seed' in params,
        defaults.embedding, record['url'], 'm', top is not None or defaults.logprobs > 0)
    assert line_id(line(record, **options)) == id


def test_embeddings_generate_nothing():
    request = parse(openai(EMBEDDINGS, input=[5, 6], encoding_format='float', user='u'), logprobs=3, prompt_logprobs=True)
    assert (request.prompt, request.embedding, request.params['max_new_tokens']) == ([5, 6], True, 0)
    assert not request.logprobs and not request.params['prompt_logprobs']


@pytest.mark.parametrize('data, expected', [
    (plain(max_new_tokens=0), {'max_new_tokens': 0}),
    (openai(max_completion_tokens=5), {'max_new_tokens': 5}),
    (openai(max_completion_tokens=5, max_tokens=5), {'max_new_tokens': 5}),
    (openai(temperature=None, seed=None, unheard_of=None), {'temperature': 1.0, 'seed': 9}),
    (openai(top_k=-1), {'top_k': 0}),
    (openai(logprobs=True), {'logprobs': 0}),
    (openai(logprobs=False), {'logprobs': 0}),
    (openai(COMPLETIONS, echo=False, logprobs=0), {'logprobs': 0}),
])
def test_words_of_the_formats(data, expected):
    params = parse(data, seed=9, logprobs=4).params
    assert {name: params[name] for name in expected} == expected


def test_logprobs_are_wanted_where_asked():
    asked = [plain(), plain(logprobs=0), plain(logprobs=1), openai(), openai(logprobs=True),
             openai(logprobs=False, top_logprobs=0), openai(COMPLETIONS, logprobs=0)]
    assert [parse(data).logprobs for data in asked] == [False, False, True, False, True, False, True]
    assert [parse(data, logprobs=2).logprobs for data in asked] == [True, False, True, True, True, False, True]


def test_parts_of_a_message_are_joined():
    parts = [{'type': 'text', 'text': 'one'}, {'type': 'text', 'text': 'two'}]
    for data in (openai(messages=[{'role': 'user', 'content': parts, 'tool_calls': None}]),
                 plain({'id': 1, 'messages': [{'role': 'user', 'content': parts}]})):
        assert parse(data).messages == [{'role': 'user', 'content': 'one\ntwo'}]


def test_lists_of_one_prompt():
    assert [parse(openai(COMPLETIONS, prompt=p)).prompt for p in (['x'], [[1, 2]], [3])] == ['x', [1, 2], [3]]


# ---- refusals

@pytest.mark.parametrize('data, message', [
    (plain({'prompt': 'x'}), 'id is missing'),
    (plain(id=None), 'id is missing'),
    (plain(id=1.0), r'id is 1\.0; expected a string or a whole number'),
    (plain(id=True), 'id is true'),
    (plain(id=['a']), 'id is a list of 1'),
    (plain({'id': 'a'}), 'expected one of prompt and messages, found neither'),
    (plain(messages=MESSAGES), 'expected one of prompt and messages, found both'),
    (plain(temprature=1), '"temprature" is no key; known are id, prompt, messages, max_new_tokens, temperature, '),
    (plain(prompt=3), 'prompt is 3'),
    (plain(prompt=[]), r'prompt is \[\]'),
    (plain(prompt=[1, True]), 'prompt is a list of 2; expected one text or one list of token ids'),
    (plain(prompt=['x', 'y']), 'prompt is a list of 2'),
    (plain(temperature='hot'), 'temperature is "hot"; expected a number'),
    (plain(temperature=True), 'temperature is true; expected a number'),
    (plain(temperature=-1), 'temperature is -1.0; expected a number of at least 0'),
    (plain(max_new_tokens=1.5), r'max_new_tokens is 1\.5; expected a whole number'),
    (plain(max_new_tokens=-1), 'max_new_tokens is -1; expected a number of tokens'),
    (plain(seed=1 << 64), 'seed is 1844.*expected a whole number from 0'),
    (plain(stop=''), 'stop is empty'),
    (plain(stop=['a', 1]), 'stop is a list of 2; expected a string or a list of strings'),
    (plain(ignore_eos=1), 'ignore_eos is 1; expected true or false'),
    (plain(logprobs=1001), 'logprobs is 1001'),
    (plain({'id': 1, 'messages': []}), r'messages is \[\]'),
    (plain({'id': 1, 'messages': ['x']}), r'messages\[0\] is "x"'),
    (plain({'id': 1, 'messages': [{'role': 'user'}]}), r'messages\[0\]\.content is missing'),
    (plain({'id': 1, 'messages': [{'content': 'x'}]}), r'messages\[0\]\.role is missing'),
    (openai(messages=[*MESSAGES, {'role': 'user', 'content': 'x', 'tool_calls': [1]}]),
     r'"tool_calls" is no key of messages\[1\]'),
    (openai(messages=[{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}]), r'messages\[0\]\.content'),
    (openai(messages=None), 'messages is missing'),
    (openai(n=2), 'n is 2; only 1 is supported'),
    (openai(n=True), 'n is true'),
    (openai(stream=True), 'stream is true'),
    (openai(logit_bias={'5': 1}), 'logit_bias is an object of 1'),
    (openai(response_format={'type': 'json_object'}), r'response_format is .*; only {"type": "text"} is supported'),
    (openai(tools=[{}]), 'tools is a list of 1'),
    (openai(presence_penalty=0.5), r'presence_penalty is 0\.5'),
    (openai(guided_json={}), '"guided_json" is no field of /v1/chat/completions'),
    (openai(top_logprobs=2), 'top_logprobs is given without logprobs'),
    (openai(logprobs=True, top_logprobs=1001), 'top_logprobs is 1001'),
    (openai(logprobs=2), 'logprobs is 2; expected true or false'),
    (openai(max_tokens=-1), 'max_tokens is -1'),
    (openai(max_completion_tokens=-1), 'max_completion_tokens is -1'),
    (openai(max_tokens=1, max_completion_tokens=2), 'max_tokens and max_completion_tokens differ'),
    (openai(model=3), 'model is 3'),
    (openai(prompt_logprobs=1), 'prompt_logprobs is 1'),
    (openai(COMPLETIONS, echo=True), 'echo is true'),
    (openai(COMPLETIONS, best_of=2), 'best_of is 2'),
    (openai(COMPLETIONS, logprobs=True), 'logprobs is true'),
    (openai(COMPLETIONS, top_logprobs=1), '"top_logprobs" is no field of /v1/completions'),
    (openai(COMPLETIONS, messages=MESSAGES), '"messages" is no field of /v1/completions'),
    (openai(EMBEDDINGS, temperature=1), '"temperature" is no field of /v1/embeddings'),
    (openai(EMBEDDINGS, encoding_format='base64'), 'encoding_format is "base64"'),
    (line({'custom_id': 'a', 'url': '/v1/audio', 'body': {}}), 'url is "/v1/audio"; expected /v1/chat/completions or'),
    (line({'custom_id': 'a', 'url': CHAT, 'body': []}), r'body is \[\]'),
    (line({'custom_id': 'a', 'url': CHAT, 'body': {}, 'method': 'GET'}), 'method is "GET"'),
    (line({'custom_id': 'a', 'url': CHAT, 'body': {}, 'id': 1}), '"id" is no key'),
    (line({'custom_id': 5, 'url': CHAT, 'body': {}}), 'custom_id is 5; expected a string'),
    (line({'url': CHAT, 'body': {'messages': MESSAGES}}), 'custom_id is missing'),
])
def test_what_cannot_be_done_is_refused_by_name(data, message):
    error = refused(data)
    assert re.match(message, str(error))
    record = json.loads(data)
    given = record.get('custom_id') if error.style == 'openai' else record.get('id')
    assert error.style == ('openai' if 'body' in record else 'plain')
    assert error.id == (given if type(given) in (str, int) else None)


@pytest.mark.parametrize('data, message', [
    (b'', 'no JSON'),
    (b'{"id": 1, "prompt": "x"', 'no JSON at character'),
    (b'{"id": 1, "prompt": "x"} {}', 'no JSON at character'),
    (b'{"id": 1, "prompt": "\xff"}', 'no UTF-8 at byte 22'),
    (b'{"id": 1, "prompt": "\xed\xa0\x80"}', 'no UTF-8'),
    ('{"id": 1, "prompt": "x"}'.encode('utf-16'), 'no UTF-8'),
    (b'\0' * 4096, 'NUL bytes'),
    (b'{"id": 1, "prompt": "a\0b"}', 'NUL bytes'),
    (rb'{"id": 1, "prompt": "\ud800"}', 'lone surrogate'),
    (rb'{"id": "\uDCff", "prompt": "x"}', 'lone surrogate'),
    (b'[' * 100_000, 'nested'),
    (b'[' * 100_000 + b']' * 100_000, 'nested'),
    (b'{"id": 1, "prompt": "x", "temperature": 1e999}', '1e999 is not finite'),
    (b'{"id": 1, "prompt": "x", "temperature": NaN}', 'NaN is not finite'),
    (b'{"id": 1, "prompt": "x", "temperature": -Infinity}', '-Infinity is not finite'),
    (b'{"id": ' + b'9' * 5000 + b', "prompt": "x"}', 'too long'),
    (b'{"id": 1, "prompt": "x", "temperature": 0.' + b'1' * 5000 + b'}', 'too long'),
    (b'{"id": 1, "prompt": "x", "id": 2}', 'the key "id" is given twice'),
    (b'{"custom_id": "a", "body": {"n": 1, "n": 1}}', 'the key "n" is given twice'),
    (b'[1]', 'the line is a list of 1; expected a JSON object'),
    (b'null', 'the line is null'),
    (b'{"id": 1, "prompt": "' + b'x' * MAX_LINE + b'"}', 'longer than 67108864 bytes'),
], ids=lambda value: repr(value[:30]))
def test_hostile_lines(data, message):
    error = refused(data)
    assert message in str(error) and error.id is None and line_id(data) is None
    assert error.style == ('openai' if b'custom_id' in data else 'plain')


def test_long_and_oddly_framed_lines_work():
    text = 'x' * 10_000_000
    assert parse(plain(prompt=text)).prompt == text
    for data in (b'\xef\xbb\xbf' + plain(), plain() + b'\r', b'  ' + plain() + b'\t'):
        assert parse(data) == parse(plain()) and line_id(data) == 'a'
    assert parse(rb'{"id": "\ud83d\ude00", "prompt": "\u0000"}').id == '\U0001f600'


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
        ['id', 'custom_id', 'url', 'body', 'messages', 'prompt', 'role', 'content', 'stop', 'n', 'logprobs']), inner)),
    max_leaves=10)


@given(st.one_of(st.binary(), anything.map(line), anything.map(lambda x: line({'id': x, 'prompt': 'x', 'stop': x})),
                 anything.map(lambda x: line({'custom_id': 'a', 'url': CHAT, 'body': x})),
                 anything.map(lambda x: openai(messages=x)), anything.map(lambda x: openai(COMPLETIONS, prompt=x, logprobs=x))))
@settings(max_examples=300)
@example(b'\xef\xbb\xbf\xef\xbb\xbf')
def test_nothing_but_a_line_error_comes_out(data):
    try:
        parse(data)
    except LineError:
        refused(data)
    line_id(data)


# ---- answers

LOGPROBS = [{'token': 5, 'text': 'He', 'logprob': -0.5, 'top': [[5, 'He', -0.5], [6, '\ufffd', float('-inf')]]},
            {'token': 7, 'text': 'llo', 'logprob': -1.5, 'top': [[8, 'y', -0.25], [9, 'y', -2.0]]}]
OUTCOME = Outcome(3, [5, 7], 'Hello', 'stop', LOGPROBS, [-1.0, float('-inf')], [0.5, -0.25], [0, 2])
USAGE = {'prompt_tokens': 3, 'completion_tokens': 2, 'total_tokens': 5}


def answer(data: bytes, **defaults) -> dict:
    record = result_record(parse(data, **defaults), OUTCOME, 'tiny', 1234)
    assert json.loads(encode_record(record)) == record
    return record


def test_plain_answers():
    assert answer(plain()) == {'id': 'a', 'text': 'Hello', 'tokens': [5, 7], 'finish_reason': 'stop', 'usage': USAGE}
    assert answer(plain(id=4, logprobs=2, prompt_logprobs=True), embedding=True) == {
        'id': 4, 'text': 'Hello', 'tokens': [5, 7], 'finish_reason': 'stop', 'usage': USAGE,
        'logprobs': [{'token': 5, 'text': 'He', 'logprob': -0.5, 'top': [[5, 'He', -0.5], [6, '\ufffd', -9999.0]]},
                     {'token': 7, 'text': 'llo', 'logprob': -1.5, 'top': [[8, 'y', -0.25], [9, 'y', -2.0]]}],
        'prompt_logprobs': [-1.0, -9999.0], 'embedding': [0.5, -0.25]}


def openai_answer(data: bytes, prefix: str) -> dict:
    """The body, when the envelope is right and its names hang together."""
    record = answer(data)
    name = record['response']['body']['id'].removeprefix(prefix)
    assert re.fullmatch('[0-9a-f]{24}', name)
    assert record == {'id': f'batch_req_{name}', 'custom_id': 'a', 'error': None, 'response': {
        'status_code': 200, 'request_id': f'batch-{name}', 'body': record['response']['body']}}
    return {key: value for key, value in record['response']['body'].items() if key != 'id'}


def test_chat_answers():
    head = {'object': 'chat.completion', 'created': 1234, 'model': 'tiny', 'usage': USAGE}
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': 'Hello'}, 'logprobs': None, 'finish_reason': 'stop'}
    assert openai_answer(openai(model='other'), 'chatcmpl-') == head | {'choices': [choice]}
    logprobs = {'content': [
        {'token': 'He', 'logprob': -0.5, 'bytes': [72, 101], 'top_logprobs': [
            {'token': 'He', 'logprob': -0.5, 'bytes': [72, 101]}, {'token': '\ufffd', 'logprob': -9999.0, 'bytes': None}]},
        {'token': 'llo', 'logprob': -1.5, 'bytes': [108, 108, 111], 'top_logprobs': [
            {'token': 'y', 'logprob': -0.25, 'bytes': [121]}, {'token': 'y', 'logprob': -2.0, 'bytes': [121]}]}]}
    assert openai_answer(openai(logprobs=True, top_logprobs=2, prompt_logprobs=True), 'chatcmpl-') == head | {
        'choices': [choice | {'logprobs': logprobs, 'prompt_logprobs': [-1.0, -9999.0]}]}


def test_completion_answers():
    head = {'object': 'text_completion', 'created': 1234, 'model': 'tiny', 'usage': USAGE}
    choice = {'index': 0, 'text': 'Hello', 'logprobs': None, 'finish_reason': 'stop'}
    assert openai_answer(openai(COMPLETIONS), 'cmpl-') == head | {'choices': [choice]}
    logprobs = {'text_offset': [0, 2], 'tokens': ['He', 'llo'], 'token_logprobs': [-0.5, -1.5],
                'top_logprobs': [{'He': -0.5, '\ufffd': -9999.0}, {'llo': -1.5, 'y': -0.25, 'token_id:9': -2.0}]}
    assert openai_answer(openai(COMPLETIONS, logprobs=2), 'cmpl-') == head | {'choices': [choice | {'logprobs': logprobs}]}
    empty = result_record(parse(openai(COMPLETIONS, logprobs=2)), Outcome(3, [], '', 'length', [], offsets=[]), 'tiny', 1)
    assert empty['response']['body']['choices'][0]['logprobs'] == {
        'text_offset': [], 'tokens': [], 'token_logprobs': [], 'top_logprobs': []}


def test_embedding_answers():
    assert openai_answer(openai(EMBEDDINGS), 'embd-') == {
        'object': 'list', 'created': 1234, 'model': 'tiny', 'usage': {'prompt_tokens': 3, 'total_tokens': 5},
        'data': [{'index': 0, 'object': 'embedding', 'embedding': [0.5, -0.25]}]}


def test_error_records():
    error = {'message': 'n is 2', 'type': 'invalid_request_error'}
    assert error_record(3, 'a', 'plain', 'n is 2') == {'id': 'a', 'line': 3, 'error': error}
    record = error_record(3, 'a', 'openai', 'n is 2')
    whole = error | {'param': None, 'code': None}
    assert record == {'id': record['id'], 'custom_id': 'a', 'error': whole | {'line': 3}, 'response': {
        'status_code': 400, 'request_id': record['response']['request_id'], 'body': {'error': whole}}}


def test_names_depend_on_the_line_and_the_id_alone():
    def name(number, id):
        data = line({'custom_id': id, 'url': CHAT, 'body': {'messages': MESSAGES}})
        return result_record(parse_line(data, number, Defaults()), OUTCOME, 'tiny', 1)['response']['body']['id']

    assert name(1, 'a') == 'chatcmpl-0e7206c3fed2884847026b1a'  # also tomorrow
    assert len({name(1, 'a'), name(1, 'b'), name(2, 'a')}) == 3


def test_a_restart_finds_records():
    assert record_key(answer(plain(id='1'))) == ('id', '1') and record_key(answer(plain(id=1))) == ('id', 1)
    assert record_key(answer(openai())) == ('id', 'a')
    for style in ('plain', 'openai'):
        assert record_key(error_record(5, 'a', style, 'x')) == record_key(error_record(5, None, style, 'x')) == ('line', 5)
    for foreign in ({}, [], {'id': None}, {'id': True}, {'id': 'a', 'error': 'no'}, {'error': {}},
                    {'custom_id': 'a', 'error': {'line': '1'}}):
        with pytest.raises(LineError, match='no record of a batch'):
            record_key(foreign)


@given(st.text(st.characters()), st.sampled_from([plain(logprobs=1), openai(logprobs=True), openai(COMPLETIONS, logprobs=1)]))
@example('\x85\u2028\u2029\x0b\x0c\x1c\r\n\0\ud800 é', plain())
def test_every_record_is_one_line_of_utf8(text, data):
    logprobs = [{'token': 1, 'text': text, 'logprob': float('-inf'), 'top': [[1, text, float('-inf')]]}]
    outcome = Outcome(1, [1], text, 'stop', logprobs, None, [float('nan')], [0])
    clean = re.sub('[\ud800-\udfff]', '\ufffd', text)
    for record in (result_record(parse(data, embedding=True), outcome, 'tiny', 1), error_record(1, text, 'openai', text)):
        written = encode_record(record).decode()
        assert written.endswith('\n') and len(written.splitlines()) == 1
        assert json.loads(written, parse_constant=pytest.fail) == record
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    assert error_record(1, text, 'plain', text) == {
        'id': clean, 'line': 1, 'error': {'message': clean, 'type': 'invalid_request_error'}}
