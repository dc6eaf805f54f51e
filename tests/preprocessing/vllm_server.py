"""vLLM's own server on the CPU, with the shipped model."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finqa.runtime.paths import REPOSITORY, SHIPPED_DATA


@contextmanager
def running_vllm(log: Path) -> Iterator[str]:
    """Address of the server, which starts in half a minute or so."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "--model": str(SHIPPED_DATA / "models" / "pocket-mistral"),
        "--served-model-name": "pocket-mistral",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--kv-cache-memory-bytes": str(1 << 27),
        "--max-num-seqs": "16",
    }
    quick = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    flags = [part for pair in settings.items() for part in pair]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *flags],
            cwd=REPOSITORY,
            env=os.environ | quick,
            stdout=out,
            stderr=out,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
