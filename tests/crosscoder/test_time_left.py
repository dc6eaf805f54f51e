"""What a long measurement says of the time it takes."""

from __future__ import annotations

import pytest

from finqa.runtime import time_left
from finqa.runtime.time_left import EVERY_S, FIRST_S, TimeLeft, duration


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now[0])
    return now


def test_it_says_how_long_it_will_take_and_then_now_and_then_what_is_left(clock):
    said: list[str] = []
    left = TimeLeft("828 cells on 40 documents", 828, said.append)
    clock[0] += 25
    left.add(32)
    assert said == ["about 11 minutes for 828 cells on 40 documents"]
    clock[0] += EVERY_S - 1
    left.add(32)
    assert len(said) == 1
    clock[0] += 46
    left.add(350)
    assert said[1:] == ["50% of 828 cells on 40 documents, about 2 minutes left"]
    clock[0] += 600
    left.add(414)
    assert len(said) == 2


def test_what_is_soon_done_says_nothing(clock):
    said: list[str] = []
    left = TimeLeft("3 batches", 3, said.append)
    for _ in range(3):
        clock[0] += FIRST_S / 4
        left.add(1)
    assert not said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 second"), (40, "40 seconds"), (89, "89 seconds"), (660, "11 minutes"), (9000, "2.5 hours")],
)
def test_a_time_reads_as_one_would_say_it(seconds, said):
    assert duration(seconds) == said
