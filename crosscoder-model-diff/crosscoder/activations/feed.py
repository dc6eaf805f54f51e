"""The order in which a store is read, and a thread that reads ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

BATCHES_AHEAD = 2
"""Batches that are read before they are asked for."""


class ShuffledOrder:
    """Batches of token indices in a seeded random order of all of them, a new one each pass.

    The passes form one stream that is cut into full batches. A batch follows from its step alone, so a resumed run
    reads what the interrupted one would have read.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int):
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self._pass: tuple[int, Tensor] = (-1, indices)

    def batch(self, step: int) -> Tensor:
        """[batch_size] token indices of a step, counted from 0."""
        parts, start, missing = [], step * self.batch_size, self.batch_size
        while missing:
            number, offset = divmod(start, len(self.indices))
            part = self._pass_order(number)[offset : offset + missing]
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        return torch.cat(parts)

    def _pass_order(self, number: int) -> Tensor:
        at, order = self._pass  # one tuple: another thread may read a batch meanwhile
        if number != at:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            order = self.indices[torch.randperm(len(self.indices), generator=generator)]
            self._pass = number, order
        return order


@contextmanager
def feed(
    read: Callable[[Tensor, bool], Tensor], batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """In the block, an iterator over (indices [n], activations [n, 2, d_model] on `device`), read ahead by a thread.

        with feed(store.read, map(order.batch, range(first_step, total_steps)), "cuda") as batches:
            for indices, activations in batches: ...

    `read` is a store's, asked for pinned memory where the device is a GPU. `batches` are [n] token indices, which the
    thread goes through. What goes wrong in it is raised where its batch is asked for. On a GPU the copies run on a
    stream of their own.
    """
    device, left = torch.device(device), iter(batches)
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read_next() -> tuple[Tensor, Tensor, Any] | None:
        """Indices, activations, and the CUDA event after which these are there; None after the last batch."""
        indices = next(left, None)
        if indices is None:
            return None
        if stream is None:
            return indices, read(indices, False).to(device), None
        with torch.cuda.stream(stream):
            activations = read(indices, True).to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return indices, activations, copied

    def read_ahead() -> Generator[tuple[Tensor, Tensor], None, None]:
        waiting = deque(thread.submit(read_next) for _ in range(BATCHES_AHEAD))
        while (ready := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(read_next))
            indices, activations, copied = ready
            if copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                activations.record_stream(current)
            yield indices, activations

    with ThreadPoolExecutor(1, "activation feed") as thread, closing(read_ahead()) as ahead:
        yield ahead
