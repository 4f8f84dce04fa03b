"""What a replica asks for: enough that no step is empty, and little that nobody else could take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tpmpi import dispatch
from tpmpi.dispatch import AHEAD, START, Answer, Line, Queue, Replica, Report


def replica_with(running: int, waiting: int, most: int = 16) -> Replica:
    """A replica with so many requests that run and that wait."""
    replica = Replica(SimpleNamespace(scheduler=SimpleNamespace(running=[None] * running)), None, 'model', most)
    asked = SimpleNamespace(logprobs=None, embedding=False)
    request = SimpleNamespace(tokens=[], params=SimpleNamespace(prompt_logprobs=False))
    replica.requests = {line: (asked, request) for line in range(running + waiting)}
    replica.told = dict.fromkeys(replica.requests, 0)
    return replica


@pytest.mark.parametrize('running', range(17))
def test_what_waits_at_a_replica_is_no_more_than_what_runs_or_a_few(running):
    """Also where the cache holds fewer requests than --max-sequences allows; one that runs none begins with more."""
    most = min(max(AHEAD, running) if running else START, 16 + AHEAD - running)
    for waiting in range(20):
        report = replica_with(running, waiting).report(leaving=True)
        assert report.held == running + waiting and report.room == max(0, most - waiting)


def test_a_replica_speaks_up_as_soon_as_nothing_waits():
    for waiting in (0, 1):
        replica = replica_with(3, waiting)
        replica.reported = float('inf')  # it is not time for a report
        report = replica.report()
        assert report.room == AHEAD if waiting == 0 else report is None


def test_lines_that_take_long_to_begin_do_not_keep_the_ranks_waiting(monkeypatch):
    """One at least, and no more when the time is over: a step, or a sign of life, comes between."""
    begun, replica = [], replica_with(0, 0)
    monkeypatch.setattr(replica, '_begin', lambda line: begun.append(line.number))
    for seconds, expected in ((-1, [1]), (-1, [1, 2]), (60, [1, 2, 3, 4])):
        monkeypatch.setattr(dispatch, 'BEGIN_SECONDS', seconds)
        if not begun:
            replica.take(Answer([Line(number, b'{}', [], None) for number in (1, 2, 3, 4)], empty=True))
        replica.begin()
        assert begun == expected and replica.held == 4 - len(begun) and replica.over == (len(begun) == 4)
    replica.take(Answer([Line(5, b'{}', [], None)], stop=True))
    replica.begin()
    assert begun == [1, 2, 3, 4] and replica.over  # the queue's next run has it


def test_long_lines_come_in_several_answers():
    lines = SimpleNamespace(count=lambda: 9, remaining=9, pending=lambda: iter(range(1, 10)), read=lambda number: bytes(60 << 20),
                            repeated=lambda number: None)
    results = SimpleNamespace(unfinished={}, check=lambda: None)
    queue, answers = Queue(lines, results, 1, lambda: False), [Answer()]
    while not answers[-1].empty:
        answers.append(queue.answer(0, Report(held=queue.held[0], room=9)))
    assert [len(answer.lines) for answer in answers] == [0, 3, 3, 3]
