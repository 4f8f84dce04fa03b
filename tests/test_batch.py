"""The batch command under mpirun: formats, errors in lines, replicas, and what it does when it is cut off or refused."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
from batches import PLAIN, STOPPED, Job, batch, records, report, write_lines
from ranks import is_open_mpi

from tpmpi.batch import parse, seconds
from tpmpi.checkpoint import CheckpointWriter, TokenizerData
from tpmpi.file_layout import fingerprint
from tpmpi.tokenizer import Tokenizer
from tpmpi.weights import encode

RECITED = ''.join(map(chr, range(33, 127)))
TEMPLATE = '{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:'


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    """A model that goes on from each printable character with the next one."""
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, RECITED)
    return path


def reciting(count: int, **more) -> list[dict]:
    """Requests for the reciter; `is_recited` knows the answers."""
    return [{'id': i, 'prompt': RECITED[i % 20], **more} for i in range(count)]


def is_recited(found: list[dict], count: int) -> bool:
    """Each request has one result, with the right text."""
    texts = {record['id']: record['text'] for record in found}
    return len(found) == count and texts == {i: RECITED[i % 20 + 1:] for i in range(count)}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- what it computes


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
    """A model with a chat template: (path, config, whole tensors)."""
    return write_chat_model(tmp_path_factory.mktemp('chat') / 'chat.h5', TEMPLATE)


def write_chat_model(path, template):
    config = tiny.NINE_HEADS
    tensors = tiny.random_tensors(config)
    tokenizer = TokenizerData(tiny.byte_tokenizer(), template)
    with CheckpointWriter(path, config, dict.fromkeys(tensors, 'float32'), tokenizer, {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, encode(tensor, 'float32', writer.specs[name].group_axis))
    return path, config, tensors


def test_both_formats_against_the_model_in_float64(chat, tmp_path):
    path, config, tensors = chat
    messages = [{'role': 'system', 'content': 'é'}, {'role': 'user', 'content': 'why?'}]

    def openai(id, url, **body):
        return {'custom_id': id, 'method': 'POST', 'url': f'/v1/{url}', 'body': {'model': 'any', **body}}

    lines = write_lines(tmp_path / 'in.jsonl', [
        {'id': 1, 'prompt': 'abc é 日本'}, {'id': 't', 'prompt': [7, 8, 300 - 1], 'logprobs': 0, 'prompt_logprobs': False},
        {'id': 'm', 'messages': messages, 'max_new_tokens': 3}, b'',
        openai('c', 'chat/completions', messages=messages, temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=2),
        openai('p', 'completions', prompt='to be', temperature=0), openai('e', 'embeddings', input='abc')])
    batch(3, '--model', path, '--input', lines, '--output', tmp_path / 'out.jsonl', '--replicas', 2, '--max-new-tokens', 6,
          '--logprobs', 3, '--prompt-logprobs', '--embeddings')
    found = {r.get('id') if 'text' in r else r['custom_id']: r for r in records(tmp_path / 'out.jsonl')}
    assert found.keys() == {1, 't', 'm', 'c', 'p', 'e'}
    rendered = tiny.byte_ids('<system>é<user>why?:')
    prompts = {1: tiny.byte_ids('abc é 日本'), 't': [7, 8, 299], 'm': rendered, 'c': rendered, 'p': tiny.byte_ids('to be')}
    for id, prompt in prompts.items():
        count, record = {'m': 3, 'c': 4}.get(id, 6), found[id]
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(tiny.oracle_logits(tensors, config, tokens)[-1].argmax()))
        logits = tiny.oracle_logits(tensors, config, tokens)
        exact, new = log_softmax(logits), tokens[len(prompt):]
        part = record if id in (1, 't', 'm') else record['response']['body']['choices'][0]
        text = part['message']['content'] if id == 'c' else part['text']
        assert text == Tokenizer(tiny.byte_tokenizer()).decode(new) and part['finish_reason'] == 'length'
        np.testing.assert_allclose(tensors['head'] @ part['embedding'], logits[len(prompt) - 1], atol=1e-4)
        usage = record['usage'] if part is record else record['response']['body']['usage']
        assert usage == {'prompt_tokens': len(prompt), 'completion_tokens': count, 'total_tokens': len(tokens)}
        if id == 't':
            assert 'logprobs' not in record and 'prompt_logprobs' not in record
            continue
        np.testing.assert_allclose(part['prompt_logprobs'], [exact[i, t] for i, t in enumerate(prompt[1:])], atol=1e-4)
        rows = exact[len(prompt) - 1:-1]
        best = np.sort(rows, axis=-1)[:, ::-1]
        if part is record:
            assert record['tokens'] == new == [step['token'] for step in record['logprobs']]
            np.testing.assert_allclose([[p for _, _, p in step['top']] for step in record['logprobs']], best[:, :3], atol=1e-4)
        elif id == 'c':
            found_best = [[x['logprob'] for x in step['top_logprobs']] for step in part['logprobs']['content']]
            np.testing.assert_allclose(found_best, best[:, :2], atol=1e-4)
        else:
            np.testing.assert_allclose(part['logprobs']['token_logprobs'], best[:, 0], atol=1e-4)
    logits = tiny.oracle_logits(tensors, config, tiny.byte_ids('abc'))[-1]
    embedding = found['e']['response']['body']['data'][0]['embedding']
    np.testing.assert_allclose(tensors['head'] @ embedding, logits, atol=1e-4)


def test_sampling_is_the_same_on_any_ranks_and_replicas(nine_heads, tmp_path):
    requests = [{'id': i, 'prompt': 'q' * (1 + i // 4), 'max_new_tokens': 15} for i in range(12)]
    requests += [{'id': i, 'prompt': 'q', 'max_new_tokens': 15, 'seed': i // 2} for i in range(12, 16)]
    lines, found = write_lines(tmp_path / 'in.jsonl', requests), []
    for size, replicas in ((1, 1), (2, 1), (3, 2)):
        output = tmp_path / f'{size}.jsonl'
        batch(size, '--model', nine_heads, '--input', lines, '--output', output, '--replicas', replicas,
              '--temperature', 1.2, '--top-p', 0.95, '--seed', 5, '--max-sequences', 1 + size)
        found.append({record['id']: record['tokens'] for record in records(output)})
    assert found[0] == found[1] == found[2] and len(found[0]) == 16
    tokens = found[0]
    assert len({tuple(tokens[i]) for i in range(4)}) == 4  # one prompt, by the number of its line
    assert tokens[12] == tokens[13] != tokens[14] == tokens[15]  # a seed of its own means the same on any line


def test_a_beginning_in_common_is_computed_once(nine_heads, tmp_path):
    common = 'In the beginning ' * 9
    lines = write_lines(tmp_path / 'in.jsonl', ({'id': i, 'prompt': f'{common}{i}', 'max_new_tokens': 9} for i in range(20)))
    found = []
    for option in ([], ['--no-prefix-sharing']):
        output = tmp_path / f'out{len(option)}.jsonl'
        batch(1, '--model', nine_heads, '--input', lines, '--output', output, *option)
        found.append(sorted((record['id'], record['tokens']) for record in records(output)))
    assert found[0] == found[1] and len(found[0]) == 20
    shared = [report(tmp_path / f'out{i}.jsonl')['shared_prompt_tokens'] for i in (0, 1)]
    assert 19 * 128 <= shared[0] <= 19 * (len(common) + 1) and shared[1] == 0


# ---- lines that cannot be run


def test_bad_lines_become_error_records_and_the_rest_completes(nine_heads, tmp_path):
    def completion(id, **body):
        return {'custom_id': id, 'url': '/v1/completions', 'body': {'prompt': 'a', 'max_tokens': 1, **body}}

    lines = [
        (b'{"id": "nul", "prompt": "a\0b"}', 'NUL bytes'), (b'\0' * 100, 'NUL bytes'),
        (b'{"id": "latin", "prompt": "\xe9"}', 'no UTF-8 at byte 28'), (b'[1, 2]', 'a list of 2; expected a JSON object'),
        (b'{"id": "cut", "prompt": "a', 'no JSON'), (b'[' * 100_000, 'nested too deeply'),
        (b'{"id": "nan", "prompt": "a", "temperature": NaN}', 'not finite'),
        ({'id': 'field', 'prompt': 'a', 'max_tokens': 3}, '"max_tokens" is no key'), ({'id': 'empty', 'prompt': ''}, 'is empty'),
        ({'id': 'long', 'prompt': 'a' * 10_000_000}, '4096 of 10000000 characters are 4096 tokens; the model was'),
        ({'id': 'longer', 'prompt': 'a' * 250, 'max_new_tokens': 7}, 'are 257; the model was trained for 256'),
        ({'id': 'cache', 'prompt': 'a' * 180, 'max_new_tokens': 13}, r'193 tokens need 4 blocks .* has 3: .*--kv-memory'),
        ({'id': 'token', 'prompt': [300]}, 'token 300; the model has tokens 0 to 299'), ({'id': 0}, 'found neither'),
        ({'id': 'chat', 'messages': [{'role': 'user', 'content': 'a'}]}, 'no chat template'),
        ({'id': 'hot', 'prompt': 'a', 'temperature': -1}, 'temperature is -1'), ({'prompt': 'a'}, 'id is missing'),
        (completion('x', n=2), 'n is 2; only 1'), (completion('y', logit_bias={'5': 1}), 'logit_bias is an object of 1'),
        ({'id': 19, 'prompt': 'b', 'max_new_tokens': 2}, None), ({'id': 0, 'prompt': 'c'}, "id 0 is that of line 14 already"),
        (b' \r', 'blank'), (completion('x'), "id 'x' is that of line 18 already"),
        ({'id': 'fits', 'prompt': 'a' * 180, 'max_new_tokens': 12}, None),
        ({'id': '0', 'prompt': 'b', 'max_new_tokens': 0}, None)]
    path = write_lines(tmp_path / 'in.jsonl', [line for line, _ in lines])
    output = tmp_path / 'out.jsonl'
    said = batch(1, '--model', nine_heads, '--input', path, '--output', output, '--kv-memory', 3 * 55_296)  # of cpu kernels
    found = records(output)
    good = {record['id']: record for record in found if 'text' in record}
    assert good.keys() == {19, 'fits', '0'} and len(good['fits']['tokens']) == 12 and good['0']['tokens'] == []
    errors = {}
    for record in (record for record in found if 'text' not in record):
        error = record['error'] if 'response' in record else record
        errors[error['line']] = record['error']['message']
    for number, (_, message) in enumerate(lines, 1):
        if message in (None, 'blank'):
            assert number not in errors
        else:
            assert re.search(message, errors[number]), errors[number]
    failed = len(lines) - 1 - 3
    assert len(errors) == failed and len(found) == failed + 3
    figures = report(output)
    assert (figures['requests'], figures['done'], figures['failed'], figures['complete']) == (failed + 3, 3, failed, True)
    assert re.search(rf'done: 3 done, {failed} failed, 0 skipped; [\d.]+ tokens/s\n$', said)
    again = batch(1, '--model', nine_heads, '--input', path, '--output', output)
    assert f'done: 0 done, 0 failed, {failed + 3} skipped' in again and records(output) == found


@pytest.mark.parametrize(('changes', 'message'), [
    ({'--input': 'nowhere.jsonl'}, r'nowhere\.jsonl cannot be read: No such file'), ({'--input': '.'}, r'\. is no regular file'),
    ({'--output': 'nowhere/out.jsonl'}, 'there is no folder nowhere'), ({'--output': '.'}, r'no regular file; choose another'),
    ({'--model': 'nowhere.h5'}, r'^tpmpi: nowhere\.h5: No such file'), ({'--replicas': 3}, '--replicas is 3 with 2 ranks'),
    ({'--report': 'nowhere/r.json'}, '--report is nowhere/r.json, and there is no folder nowhere'),
    ({'--report': '.'}, '--report is ., which is no regular'), ({'--arrays': '/'}, '--arrays is /, which is no regular file'),
    ({'--model': '/dev/zero'}, '/dev/zero is no regular file; expected a model file'),
    ({'--kv-memory': '1K'}, 'one block of 64 positions takes'), ({'--top-p': 2}, 'top_p is 2.0'),
    ({'--stop': b'a\xff'}, '--stop: not UTF-8 at byte 1'),
])
def test_what_cannot_work_is_one_line(nine_heads, tmp_path, changes, message):
    write_lines(tmp_path / 'in.jsonl', reciting(1))
    options = {'--model': nine_heads, '--input': tmp_path / 'in.jsonl', '--output': tmp_path / 'out.jsonl'} | changes
    said = batch(2, *(x for pair in options.items() for x in pair), code=1)
    errors = [line for line in said.splitlines() if line.startswith('tpmpi: ')]
    assert len(errors) == 1 and re.search(message, errors[0]), said
    assert not (tmp_path / 'out.jsonl').exists() or (tmp_path / 'out.jsonl').read_bytes() == b''
    assert not (tmp_path / 'out.jsonl.lease').exists()


@pytest.mark.parametrize(('text', 'expected'), [
    ('90', 90), ('1:30', 90), ('2:00:05', 7205), ('1-12', 36 * 3600), ('1-12:30', 36.5 * 3600), ('1-0:0:5', 86405), ('0.5', 0.5),
    *((text, None) for text in ('', '-5', '1-', '-', '1:2:3:4', '1-2:3:4:5', 'x', 'nan', '0', '1--2')),
])
def test_durations_as_slurm_writes_them(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            seconds(text)
    else:
        assert seconds(text) == expected


@pytest.mark.parametrize('options', [
    ('--arrays', 'm.h5'), ('--report', 'm.h5'), ('--output', 'm.h5'), ('--report', 'out.journal'), ('--arrays', 'out.lease'),
    ('--report', 'in'), ('--arrays', './out'), ('--input', 'out.tpmpi-new'),
])
def test_no_file_is_written_over_another_one(options, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(['--model', 'm.h5', '--input', 'in', '--output', 'out', *options])
    assert caught.value.code == 2 and 'must be different files' in capsys.readouterr().err


@pytest.mark.parametrize('checksums', [True, False])
def test_two_models_of_one_shape_have_two_fingerprints(nine_heads, tmp_path, checksums):
    """In the middle of the file, far from what both have in common."""
    found = set()
    for change in (0, 0, 1):
        path = tmp_path / 'model.h5'
        path.write_bytes(Path(nine_heads).read_bytes())
        with h5py.File(path, 'r+') as file:
            dataset = file['layers/1/up']
            sums = dataset.attrs['crc32']
            if checksums:
                dataset.attrs['crc32'] = sums + np.uint32(change)
            else:
                del dataset.attrs['crc32']
                dataset[0] = dataset[0] + np.float32(change)
        found.add(fingerprint(path))
    assert len(found) == 2


# ---- replicas and sizes


@pytest.mark.parametrize(('size', 'replicas'), [(3, 2), (4, 4)])
def test_all_replicas_work_until_nothing_is_left(reciter, tmp_path, size, replicas):
    lines = write_lines(tmp_path / 'in.jsonl', reciting(200))
    batch(size, '--model', reciter, '--input', lines, '--output', tmp_path / 'out.jsonl', '--replicas', replicas,
          '--max-sequences', 2)
    assert is_recited(records(tmp_path / 'out.jsonl'), 200)
    figures = report(tmp_path / 'out.jsonl')
    busy = [sum(rank['seconds'][name] for name in ('prefill', 'decode', 'scheduling', 'waiting')) for rank in figures['ranks']]
    assert all(rank['steps'] > 50 for rank in figures['ranks'])
    assert min(busy) > 0.5 * figures['run_seconds'], figures
    for seconds_of in (rank['seconds'] for rank in figures['ranks']):  # choosing, and waiting for others' logits, are in steps
        assert 0 < seconds_of['sampling'] + seconds_of['gathering'] < seconds_of['prefill'] + seconds_of['decode']


def test_the_date_in_prompts_is_that_of_the_first_run(tmp_path):
    path, config, tensors = write_chat_model(tmp_path / 'chat.h5', '{{ messages[0].content }} {{ strftime_now("%Y-%m-%d") }}')
    requests = [{'id': i, 'messages': [{'role': 'user', 'content': f'{i}'}]} for i in range(5)]
    output, journal = tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.journal'

    def run(count: int, size: int, replicas: int) -> None:
        lines = write_lines(tmp_path / 'in.jsonl', requests[:count])
        batch(size, *PLAIN, '--model', path, '--input', lines, '--output', output, '--replicas', replicas, '--max-new-tokens', 3)

    def answer(prompt: str) -> list[int]:
        tokens = tiny.byte_ids(prompt)
        for _ in range(3):
            tokens.append(int(tiny.oracle_logits(tensors, config, tokens)[-1].argmax()))
        return tokens[-3:]

    days = [datetime.now().date()]
    run(1, 1, 1)
    days.append(datetime.now().date())
    assert records(output)[0]['tokens'] in [answer(f'0 {day}') for day in days]
    first = json.loads(journal.read_text())
    assert datetime.fromisoformat(first['began']).date() in days
    journal.write_text(json.dumps(first | {'began': '2001-02-03T04:05:06'}) + '\n')  # it was begun long ago
    run(5, 3, 2)
    found = {record['id']: record['tokens'] for record in records(output)}
    assert found.keys() == set(range(5)) and all(found[i] == answer(f'{i} 2001-02-03') for i in range(1, 5))
    assert json.loads(journal.read_text())['began'] == '2001-02-03T04:05:06'


def test_a_batch_that_is_done_loads_no_model(nine_heads, tmp_path):
    lines, output = write_lines(tmp_path / 'in.jsonl', [{'id': 1, 'prompt': 'a'}]), tmp_path / 'out.jsonl'
    batch(2, *PLAIN, '--model', nine_heads, '--input', lines, '--output', output)
    before = output.read_bytes()
    batch(2, *PLAIN, '--model', nine_heads, '--input', lines, '--output', output)
    assert output.read_bytes() == before
    figures = report(output)
    assert (figures['complete'], figures['done'], figures['skipped']) == (True, 0, 1)
    assert [rank['steps'] for rank in figures['ranks']] == [0, 0]


def test_memory_does_not_grow_with_the_input(nine_heads, tmp_path):
    peaks = []
    for count in (5000, 20_000):
        requests = ({'id': i, 'prompt': f'{i}', 'max_new_tokens': i % 2} for i in range(count))
        lines, output = write_lines(tmp_path / f'{count}.jsonl', requests), tmp_path / f'{count}.out'
        batch(1, *PLAIN, '--model', nine_heads, '--input', lines, '--output', output, '--max-sequences', 4)
        found = records(output)
        assert {record['id'] for record in found} == set(range(count)) and len(found) == count
        assert all(len(record['tokens']) == record['id'] % 2 for record in found)
        peaks.append(report(output)['ranks'][0]['peak_bytes'])
    assert peaks[1] - peaks[0] < 3 << 20, peaks  # compiled kernels and a cache in use would vary by more


# ---- cut off, and gone on with


def written(output) -> int:
    """Whole lines of the output so far."""
    return output.read_bytes().count(b'\n') if output.exists() else 0


def test_the_same_command_goes_on_however_the_last_one_ended(reciter, nine_heads, tmp_path):
    count, output = 500, tmp_path / 'out.jsonl'  # more than a fast machine does until the last strike
    lines = write_lines(tmp_path / 'in.jsonl', reciting(count))
    options = ('--model', reciter, '--input', lines, '--output', output, '--max-sequences', 1)

    def struck(size, replicas, strike):
        """Let some lines more be written, strike, and look: only whole lines, those of before unchanged."""
        before, had = (output.read_bytes(), written(output)) if output.exists() else (b'', 0)
        with Job(size, *options, '--replicas', replicas) as job:
            job.wait_for_ranks()
            assert job.wait(lambda: written(output) >= had + 3), job.said
            strike(job)
            code, said = job.end(), job.said
        data = output.read_bytes()
        assert data.startswith(before) and (code != STOPPED or data.endswith(b'\n'))
        return code, said

    def second(job):
        """Another one is refused while the first lives."""
        said = batch(1, *options, code=1)
        assert re.search(rf'^tpmpi: .*is held by process {job.pids[0]} on .*, which is at work', said, re.MULTILINE), said
        os.kill(job.pids[1], signal.SIGKILL)

    code, said = struck(2, 1, second)
    assert code not in (0, STOPPED) and f'rank 1 on {socket.gethostname()} was lost during' in said
    code, said = struck(3, 2, lambda job: os.kill(job.pids[2], signal.SIGTERM))
    stopped = r'stopped: (\d+) done, 0 failed, (\d+) skipped, (\d+) left; the same command goes on\n'
    found = re.search(stopped, said)
    assert code == STOPPED and 'SIGTERM on rank 2: asked to stop' in said and sum(map(int, found.groups())) == count
    assert report(output)['complete'] is False and report(output)['done'] == int(found[1])
    sig = signal.SIGUSR1 if is_open_mpi() else signal.SIGTERM
    code, said = struck(2, 2, lambda job: job.launcher.send_signal(sig))
    assert code == STOPPED and re.search(stopped, said)
    assert re.search(stopped, batch(1, *options, '--time-limit', 2, code=STOPPED))
    batch(2, *options, '--max-sequences', 16)
    assert is_recited(records(output), count)

    data = output.read_bytes()
    assert f'done: 0 done, 0 failed, {count} skipped' in batch(1, *options) and output.read_bytes() == data
    write_lines(lines, reciting(count + 2))
    assert f'done: 2 done, 0 failed, {count} skipped' in batch(1, *options)
    assert output.read_bytes().startswith(data) and is_recited(records(output), count + 2)
    for changed, message in (((*options, '--model', nine_heads), 'was begun with model'),
                             ((*options, '--temperature', 1), r'with options.temperature 0.0, now it is 1.0: choose another'),
                             ((*options, '--input', write_lines(tmp_path / 'x', reciting(9, top_k=1))), 'lines may only be app')):
        said = batch(1, *changed, code=1)
        assert said.count('\n') == 1 and re.search(f'^tpmpi: .*{message}', said), said
    assert is_recited(records(output), count + 2)


def test_a_stopped_rank_ends_the_run_and_the_output_goes_on(reciter, tmp_path):
    lines, output = write_lines(tmp_path / 'in.jsonl', reciting(40)), tmp_path / 'out.jsonl'
    options = (*PLAIN, '--model', reciter, '--input', lines, '--output', output, '--max-sequences', 1)
    for rank in (1, 0):
        had = written(output)
        with Job(3, *options, '--stall-timeout', 2) as job:
            job.wait_for_ranks()
            assert job.wait(lambda had=had: written(output) > had), job.said
            os.kill(job.pids[rank], signal.SIGSTOP)
            assert job.end(30) != 0
            host = re.escape(socket.gethostname())
            assert re.search(rf'tpmpi: no progress for 2 s: rank {rank} on {host} \(last step \d+\) did not arrive; '
                             'all ranks end, and the same command goes on', job.said), job.said
    batch(1, *options, '--stall-timeout', 60)
    assert is_recited(records(output), 40)


@pytest.mark.parametrize('rank', [0, 1, 2])
def test_a_rank_that_stops_as_work_begins(reciter, tmp_path, monkeypatch, rank):
    """The others wait for it in MPI, and no step has been taken yet."""
    lines, output = write_lines(tmp_path / 'in.jsonl', reciting(4)), tmp_path / 'out.jsonl'
    monkeypatch.setenv('TPMPI_TEST_STOPS', str(rank))
    options = (*PLAIN, '--model', reciter, '--input', lines, '--output', output, '--replicas', 3, '--stall-timeout', 1)
    with Job(3, *options) as job:
        job.wait_for_ranks()
        assert job.end(30) != 0
        assert re.search(rf'tpmpi: no progress for 1 s: rank {rank} on .* did not arrive', job.said), job.said


@pytest.mark.parametrize(('rank', 'name', 'value'), [
    (0, 'TPMPI_TEST_HANGS', '0'), (1, 'TPMPI_TEST_HANGS', '1'),  # while it loads
    (0, 'TPMPI_TEST_HANGS_IN', 'facts_of'), (0, 'TPMPI_TEST_HANGS_IN', 'close_files'),  # as it opens or closes the files
])
def test_a_rank_whose_file_system_hangs(reciter, tmp_path, monkeypatch, rank, name, value):
    """Its other thread still answers: what tells it from those that wait is that it has come to fewer meetings."""
    lines, output = write_lines(tmp_path / 'in.jsonl', reciting(4)), tmp_path / 'out.jsonl'
    options = ('--model', reciter, '--input', lines, '--output', output, '--stall-timeout', 1, *PLAIN)
    monkeypatch.setenv('TPMPI_TEST_LOAD_SECONDS', '4')
    monkeypatch.setenv(name, value)
    with Job(3, *options) as job:
        job.wait_for_ranks()
        assert job.end(40) != 0
        assert re.search(rf'tpmpi: no progress for 4 s: rank {rank} on .* did not arrive', job.said), job.said
    monkeypatch.delenv(name)
    batch(3, *options)
    assert is_recited(records(output), 4)


def test_a_full_disk(reciter, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('a small disk takes the right to mount one')
    try:
        lines, output = write_lines(tmp_path / 'in.jsonl', reciting(200)), disk / 'out.jsonl'
        options = (*PLAIN, '--model', reciter, '--input', lines, '--output', output)
        (disk / 'ballast').write_bytes(bytes(472 << 10))
        said = batch(2, *options, code=1)
        errors = [line for line in said.splitlines() if line.startswith('tpmpi: ')]
        assert len(errors) == 1 and re.search('cannot write .*: No space left on device; .*free some space and start the same '
                                              'command again', errors[0]), said
        found = records(output)
        assert len(found) < 200 and not (disk / 'out.jsonl.lease').exists()
        (disk / 'ballast').unlink()
        batch(2, *options)
        assert records(output)[:len(found)] == found and is_recited(records(output), 200)
    finally:
        subprocess.run(['umount', disk], check=True)
