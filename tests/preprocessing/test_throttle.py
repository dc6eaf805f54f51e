"""How many requests are let in at a time."""

from __future__ import annotations

import asyncio
import time

import pytest

from finqa.chat.throttle import LONGEST_WAIT_S, Stopped, Throttle, backoff_s


def test_the_limit_is_halved_by_a_429_and_grows_by_one_in_a_round_of_answers() -> None:
    throttle = Throttle(16)
    throttle.slow_down(time.monotonic(), 0.0)
    assert throttle.limit == 8
    for _ in range(8):
        throttle.speed_up()
    assert 8.9 < throttle.limit <= 9
    for _ in range(10_000):
        throttle.speed_up()
    assert throttle.limit == 16


def test_requests_that_were_under_way_together_halve_it_once() -> None:
    throttle, entered = Throttle(16), time.monotonic()
    for _ in range(16):
        throttle.slow_down(entered, 0.0)
    assert throttle.limit == 8
    throttle.slow_down(time.monotonic(), 0.0)
    assert throttle.limit == 4


def test_one_is_always_let_in() -> None:
    throttle = Throttle(3)
    for _ in range(5):
        throttle.slow_down(time.monotonic(), 0.0)
    assert throttle.limit == 1

    asyncio.run(asyncio.wait_for(throttle.enter(), 5))


def test_no_more_than_the_limit_are_let_in_and_a_place_goes_on() -> None:
    async def scenario() -> None:
        throttle = Throttle(2)
        await throttle.enter()
        await throttle.enter()
        third = asyncio.ensure_future(throttle.enter())
        await asyncio.sleep(0.05)
        assert not third.done() and throttle.under_way == 2
        throttle.leave()
        await asyncio.wait_for(third, 5)
        assert throttle.under_way == 2

    asyncio.run(scenario())


def test_a_pause_holds_everybody_for_as_long_as_the_server_says() -> None:
    async def scenario() -> None:
        throttle = Throttle(4)
        start = time.monotonic()
        throttle.slow_down(await throttle.enter(), 0.3)
        await asyncio.gather(throttle.enter())
        assert time.monotonic() - start >= 0.3

    asyncio.run(scenario())


def test_stopping_ends_all_waiting_at_once() -> None:
    async def scenario() -> None:
        throttle = Throttle(1)
        await throttle.enter()
        throttle.slow_down(time.monotonic(), 1_000.0)
        waiting = [asyncio.ensure_future(wait) for wait in (throttle.enter(), throttle.enter(), throttle.sleep(1_000))]
        await asyncio.sleep(0.01)
        throttle.stop()
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert all(isinstance(result, Stopped) for result in results)

    asyncio.run(scenario())


def test_what_is_not_allowed_waits_for_those_under_way_and_then_ends() -> None:
    async def scenario() -> None:
        throttle = Throttle(4, allows=lambda under_way: under_way < 1 and not spent)
        await throttle.enter()
        second = asyncio.ensure_future(throttle.enter())
        await asyncio.sleep(0.01)
        assert not second.done()
        spent.append(1)
        throttle.leave()
        with pytest.raises(Stopped):
            await asyncio.wait_for(second, 5)

    spent: list[int] = []
    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("failures", "longest"), [(1, 0.5), (2, 1), (5, 8), (8, LONGEST_WAIT_S), (10_000, LONGEST_WAIT_S)]
)
def test_backing_off_doubles_up_to_a_minute_with_jitter(failures: int, longest: float) -> None:
    waits = [backoff_s(failures) for _ in range(200)]
    assert longest / 2 <= min(waits) < max(waits) <= longest
