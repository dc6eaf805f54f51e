"""What the engine is told on a GPU; vLLM itself is left out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from finqa.evaluation.engines import vllm_engine
from finqa.evaluation.engines.vllm_engine import EngineArguments
from finqa.evaluation.generation import GenerationConfig
from finqa.runtime.errors import UserError

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class Started(Exception):
    pass


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What an engine sets in it is gone afterwards."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize(("asked", "told"), [(None, "spawn"), ("fork", "fork")])
def test_its_process_is_spawned_as_torch_has_asked_for_gpus_by_then_and_fills_no_log_with_bars(
    asked, told, tiny_student, monkeypatch
):
    seen: list[tuple[str | None, float, str | None]] = []

    def start(**settings: Any) -> None:
        seen.append((os.environ.get(METHOD), settings["gpu_memory_utilization"], os.environ.get("TQDM_DISABLE")))
        raise Started

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setattr(vllm_engine, "default_device", lambda: "cuda")
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal
    os.environ.pop(METHOD, None)
    if asked is not None:
        os.environ[METHOD] = asked
    config = GenerationConfig(vllm=True, max_new_tokens=8, batch_size=1, gpu_memory_utilization=0.7)
    arguments = EngineArguments(str(tiny_student), str(tiny_student), False, config, None)
    with pytest.raises(Started), vllm_engine.vllm_engine(arguments):
        pass
    assert seen == [(told, 0.7, "1")]


@pytest.mark.parametrize(("free", "raised"), [(60e9, UserError), (79e9, RuntimeError)])
def test_a_start_that_fails_where_the_gpu_is_taken_says_which_share_would_do(free, raised, tiny_student, monkeypatch):
    import torch

    def fail(**settings: Any) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fail))
    monkeypatch.setattr(vllm_engine, "default_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free, 80e9))
    config = GenerationConfig(vllm=True, max_new_tokens=8, batch_size=1, gpu_memory_utilization=0.9)
    arguments = EngineArguments(str(tiny_student), str(tiny_student), False, config, None)
    with pytest.raises(raised) as caught, vllm_engine.vllm_engine(arguments):
        pass
    if raised is UserError:
        assert "60.0 of its 80.0 GB are free" in str(caught.value)
        assert "--gpu-memory-utilization 0.73" in str(caught.value)
