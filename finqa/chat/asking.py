"""Many requests at once, each until it is answered or given up, every try in the journal.

What ends the run (a bad key, no money, Ctrl-C) ends it gently: no request is sent any more, and those under way, which
are paid for, are waited for and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from finqa.chat.answer_journal import Answer, AnswerJournal
from finqa.chat.chat_request import LIMIT_NAMES, Fault, Request, Wanted, as_sent, refuses_limit_name, send
from finqa.chat.config import ChatConfig, LimitName, api_key
from finqa.chat.prices import Spending
from finqa.chat.throttle import Stopped, Throttle, backoff_s
from finqa.runtime.errors import UserError
from finqa.runtime.progress import Progress

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Item = TypeVar("Item")
GIVEN_UP_IN_A_ROW = 20
"""So many failures before the first answer mean that the set-up is wrong, not the questions; so many requests in a
row given up after all their retries mean that the server is gone."""
TRIES_WITHOUT_A_SERVER = 4
"""Tries of each of the first requests, where no server was ever reached."""
UNLUCKY = 4
"""A request that was told to slow down so many times waits longer than the server says, and lets others pass."""
LONGEST_RETRY_AFTER_S = 600.0
"""Where the server asks for a longer pause, the run ends and says when to start again."""
_NOT_THERE = ("teacher-connection", "teacher-timeout")


def make_client(config: ChatConfig) -> AsyncOpenAI:
    """The client of OpenAI's package, without its own retries: Asker has what it needs to slow all requests down."""
    from openai import AsyncOpenAI, Timeout

    timeout = Timeout(config.timeout_s, connect=min(30.0, config.timeout_s))
    return AsyncOpenAI(api_key=api_key(), base_url=config.base_url, max_retries=0, timeout=timeout)


class Asker:
    """Sends requests and keeps what comes back.

    Args:
        client: From make_client.
        config: How many at a time, how often, how long.
        journal: Takes every answer and every failed try.
        spending: Counts tokens and dollars; lets no request pass where they are used up.
        answered_before: Whether earlier runs got answers to requests like these, so that refusals are of single rows.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        config: ChatConfig,
        journal: AnswerJournal,
        spending: Spending,
        answered_before: bool = False,
    ) -> None:
        self.client = client
        self.config = config
        self.journal = journal
        self.spending = spending
        self.throttle = Throttle(config.max_concurrent, spending.allows)
        self.given_up = 0
        self.limit_name: LimitName = config.limit_name
        self._takes_limit_name = False
        self._answered = answered_before
        self._given_up_in_a_row = 0
        self._server_seen = False
        self._said: set[str] = set()

    async def ask(self, key: str, request: Request) -> bool:
        """Put the answer into the journal; False where the request was given up.

        Raises Stopped where nothing is sent any more, UserError for what every other request would meet as well.
        """
        for tries in range(1, self.config.max_retries + 2):
            entered = await self.throttle.enter()
            try:
                outcome = await self._send(request)
                self._keep(key, outcome, entered)
            finally:
                self.throttle.leave()
            if isinstance(outcome, Answer):
                return True
            if tries > self.config.max_retries or tries >= outcome.tries:
                self._give_up(outcome)
                return False
            self._check_server(outcome, tries)
            self._say_once(outcome)
            if not outcome.limited:
                await self.throttle.sleep(max(outcome.retry_after_s or 0.0, backoff_s(tries)))
            elif tries >= UNLUCKY:  # The pause after a 429 is everybody's, and kept at the entrance.
                await self.throttle.sleep(backoff_s(tries))
        raise AssertionError("the last try always returns")

    async def _send(self, request: Request) -> Answer | Fault:
        """Send a request, once more with the limit's other name where the server refuses the first."""
        name, timeout_s = self.limit_name, self.config.timeout_s
        outcome = await send(self.client, as_sent(request, name), timeout_s)
        if name == LIMIT_NAMES[0] and refuses_limit_name(outcome) and not self._takes_limit_name:
            other = await send(self.client, as_sent(request, LIMIT_NAMES[1]), timeout_s)
            if isinstance(other, Answer):
                self.limit_name, outcome = LIMIT_NAMES[1], other
        self._takes_limit_name |= isinstance(outcome, Answer) and self.limit_name == LIMIT_NAMES[0]
        return outcome

    def _keep(self, key: str, outcome: Answer | Fault, entered: float) -> None:
        if isinstance(outcome, Answer):
            self.journal.add_answer(key, outcome)
            self.spending.add(outcome)
            self.throttle.speed_up()
            self._answered = self._server_seen = True
            self._given_up_in_a_row = 0
            if self.spending.max_cost is not None and not outcome.prompt_tokens:
                raise UserError("the server counts no tokens (usage), so --max-cost cannot be kept; leave it out")
            return
        self.journal.add_failure(key, outcome.failure)
        if outcome.stops and not self._answered:
            raise UserError(outcome.stops)
        self._server_seen |= outcome.failure.kind not in _NOT_THERE
        wait = outcome.retry_after_s
        if wait is not None and wait > LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the server asks to wait {wait:,.0f} s ({outcome.failure.message}); start the same command again "
                "then: what was answered is kept"
            )
        if outcome.limited:
            self.throttle.slow_down(entered, wait)

    def _check_server(self, fault: Fault, tries: int) -> None:
        if not self._server_seen and fault.failure.kind == "teacher-connection" and tries >= TRIES_WITHOUT_A_SERVER:
            raise UserError(f"no server answers, after {tries} tries: {fault.failure.message}")

    def _say_once(self, fault: Fault) -> None:
        """A run that waits says what for, the first time that each kind of fault comes."""
        if fault.failure.kind not in self._said:
            self._said.add(fault.failure.kind)
            print(f"{fault.failure.kind}: {fault.failure.message}; it is tried again", flush=True)

    def _give_up(self, fault: Fault) -> None:
        self.given_up += 1
        self._given_up_in_a_row += 1
        passing = fault.tries > 1
        if self._given_up_in_a_row >= GIVEN_UP_IN_A_ROW and (passing or not self._answered):
            which = "last" if self._answered else "first"
            raise UserError(
                f"the {which} {GIVEN_UP_IN_A_ROW} requests all failed: {fault.failure.message}; once that is mended, "
                "start the same command again: what was answered is kept"
            )


async def ask_all(
    items: Sequence[Item],
    next_step: Callable[[Item], object],
    config: ChatConfig,
    journal: AnswerJournal,
    spending: Spending,
    what: str,
    answered_before: bool = False,
) -> set[str]:
    """Fill the journal with what the items need, `max_concurrent` requests at a time; the keys that were given up.

    Args:
        next_step: What an item needs next by the journal: a Wanted, or anything else where it is settled. Called in a
            thread, since it may take long.
        what: Who asks, for the line that says how far it is.
        answered_before: As of Asker.
    """
    progress = Progress(what, len(items))
    queue = iter(items)
    locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
    given_up: set[str] = set()

    async with make_client(config) as client:
        asker = Asker(client, config, journal, spending, answered_before)

        async def settle(item: Item) -> None:
            while isinstance(step := await asyncio.to_thread(next_step, item), Wanted):
                if step.key in given_up:
                    return
                async with locks[step.key]:  # Equal requests are paid for once.
                    still = journal.answer(step.key) is step.cut and step.key not in given_up
                    if still and not await asker.ask(step.key, step.request):
                        given_up.add(step.key)

        async def worker() -> None:
            for item in queue:
                await settle(item)
                notes = (str(spending), f"{asker.given_up} failed", str(asker.throttle))
                progress.advance(note=", ".join(filter(None, notes)))

        try:
            await run_together(worker, min(config.max_concurrent, len(items)), asker.throttle)
        finally:
            progress.close()
    return given_up


async def run_together(worker: Callable[[], Coroutine[Any, Any, None]], count: int, throttle: Throttle) -> None:
    """Run a worker `count` times over; the first UserError stops the throttle and is raised when all have ended.

    Ctrl-C and SIGTERM stop the throttle too, and raise KeyboardInterrupt when all have ended; a second one ends at
    once.
    """
    stops: list[BaseException] = []

    def stop(reason: BaseException) -> None:
        stops.append(reason)
        throttle.stop()

    async def gently() -> None:
        try:
            await worker()
        except Stopped:
            return
        except UserError as error:
            stop(error)

    def interrupt() -> None:
        print(f"interrupted: waiting for {throttle.under_way} requests under way (again to drop them)", flush=True)
        stop(KeyboardInterrupt())

    with _on_interrupt(interrupt):
        tasks = [asyncio.ensure_future(gently()) for _ in range(count)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    if stops:
        raise stops[0]


@contextlib.contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` at the first SIGINT or SIGTERM within the block; the second does what it always does."""
    loop = asyncio.get_running_loop()
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    def remove() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    def first() -> None:
        remove()
        action()

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Not in a thread, not on Windows.
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:  # As in a job that a shell put into the background.
                loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            remove()
