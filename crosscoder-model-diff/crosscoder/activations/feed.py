"""The order in which a store is read, and a thread that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

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


class _Ready(NamedTuple):
    indices: Tensor
    activations: Tensor
    copied: Any
    """CUDA event after which the activations are there; None on the CPU."""


class Feed:
    """An iterator over (indices [n], activations [n, 2, d_model] on `device`), read ahead by a thread of its own.

    The thread ends with the batches, or with `close` (a `with` block calls it). What goes wrong in it is raised where
    its batch is asked for. On a GPU the copies run on a stream of their own, from pinned memory.
    """

    def __init__(
        self,
        read: Callable[[Tensor, bool], Tensor],
        batches: Iterable[Tensor],
        device: torch.device | str = "cpu",
    ):
        """`read` is a store's, asked for pinned memory where the device is a GPU; `batches` are [n] token indices."""
        self._read = read
        self._device = torch.device(device)
        self._stream: Any = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ready: queue.SimpleQueue[_Ready | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._closed = threading.Event()
        self._over = False
        self._thread = threading.Thread(
            target=self._read_ahead, args=(iter(batches),), name="activation feed", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._over:
            raise StopIteration
        ready = self._ready.get()
        if not isinstance(ready, _Ready):
            self._over = True
            raise StopIteration if ready is None else ready
        self._room.release()
        if ready.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready.copied)
            ready.activations.record_stream(current)
        return ready.indices, ready.activations

    def close(self) -> None:
        """End the thread, whether all batches were taken or not."""
        self._over = True
        self._closed.set()
        self._room.release()
        self._thread.join()

    def _read_ahead(self, batches: Iterator[Tensor]) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    return
                indices = next(batches, None)
                if indices is None:
                    break
                self._ready.put(self._on_device(indices))
        except BaseException as error:  # noqa: BLE001 - it is raised again by __next__
            self._ready.put(error)
        self._ready.put(None)

    def _on_device(self, indices: Tensor) -> _Ready:
        if self._stream is None:
            return _Ready(indices, self._read(indices, False).to(self._device), None)
        with torch.cuda.stream(self._stream):
            activations = self._read(indices, True).to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Ready(indices, activations, copied)
