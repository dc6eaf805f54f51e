"""Several vLLM engines beside each other, each a process with GPUs of its own; the prompts are dealt out to them.

With --data-parallel N and --tensor-parallel T engine i takes the GPUs i*T to i*T + T - 1 of those that are visible. On
a CPU the engines share the cores, which is no faster and lets the same code be tested there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from finqa.evaluation.engines.devices import device_shares
from finqa.evaluation.engines.vllm_engine import EngineArguments, vllm_engine, vllm_generate
from finqa.evaluation.generation import Generate, Reply
from finqa.models.students import default_device
from finqa.runtime.errors import UserError


@contextmanager
def parallel_engines(
    arguments: EngineArguments,
) -> Iterator[tuple[Callable[[bool, set[int]], Generate], dict[str, Any]]]:
    """The engines behind one `Generate`, and what is worth recording of them; they are gone at the end of the block."""
    config = arguments.config
    shares, on_cpu = device_shares(config.data_parallel, config.tensor_parallel), default_device() == "cpu"
    context = multiprocessing.get_context("spawn")  # a fork would carry over threads and a GPU context
    workers, pipes = [], []
    try:
        for devices in shares:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, arguments, devices, on_cpu))
            worker.start()
            theirs.close()  # so that reading fails when the worker ends
            workers.append(worker)
            pipes.append(ours)
        facts = [_receive(pipe, number) for number, pipe in enumerate(pipes)]
        yield (
            lambda adapted, ends: _shared_out(pipes, adapted, ends),
            facts[0] | {"data_parallel": len(pipes), "devices": shares},
        )
    finally:
        for pipe in pipes:
            pipe.close()  # tells a worker that waits to end
        for worker in workers:
            worker.join(timeout=20)
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _shared_out(pipes: Sequence[Connection], adapted: bool, ends: set[int]) -> Generate:
    def generate(prompts: Sequence[list[int]], done: Collection[int] = ()) -> Iterator[tuple[int, Reply]]:
        missing = sorted(set(range(len(prompts))) - set(done))
        busy = {}
        for number, pipe in enumerate(pipes):
            # Dealt out one by one, so that long and short pages are spread alike.
            others = set(range(len(prompts))) - set(missing[number :: len(pipes)])
            pipe.send((list(prompts), others, adapted, ends))
            busy[pipe] = number
        while busy:
            for pipe in wait(list(busy)):
                answer = _receive(pipe, busy[pipe])  # pyright: ignore[reportArgumentType]
                if answer is None:
                    del busy[pipe]  # pyright: ignore[reportArgumentType]
                else:
                    yield answer

    return generate


def _receive(pipe: Connection, number: int) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError(f"engine {number} of --data-parallel ended without a reply; what it said is above") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _work(pipe: Connection, arguments: EngineArguments, devices: list[str], on_cpu: bool) -> None:
    """One engine: sends its facts, then for every list of prompts its replies and None; ends when the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the engines
    # Before anything starts CUDA or counts processors.
    if on_cpu:
        os.sched_setaffinity(0, {int(device) for device in devices})
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    try:
        with vllm_engine(arguments) as (engine, facts):
            pipe.send(facts)
            while True:
                prompts, done, adapted, ends = pipe.recv()
                adapter = arguments.adapter if adapted else None
                for answer in vllm_generate(engine, ends, arguments.config, adapter)(prompts, done):
                    pipe.send(answer)
                pipe.send(None)
    except UserError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
