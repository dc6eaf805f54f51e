"""The same command against a real server: vLLM on the CPU, serving the shipped model."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line

from finqa.runtime.paths import REPOSITORY, SHIPPED_DATA
from finqa.task.answers import match
from finqa.task.records import read_teacher_rows

ROWS = 12


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server; it starts in half a minute or so."""
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
    log = tmp_path_factory.mktemp("vllm") / "log"
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


@pytest.mark.slow
def test_a_vllm_server_is_a_teacher(command: Command, vllm_server: str) -> None:
    command("preprocess_finqa", "--dataset", "FinQA-mini", "--split", "dev")
    flags = ("--dataset", "FinQA-mini", "--split", "dev", "--limit", str(ROWS), "--no-hint", "--temperature", "0")
    flags += ("--model", "pocket-mistral", "--base-url", vllm_server, "--max-completion-tokens", "200")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return command("process_finqa_code_generation", *flags, *more, OPENAI_API_KEY="any")

    # Its chat template has no system turn: the error says what to do, and doing it is enough.
    assert "--system-role user" in the_one_line(run())
    done = run("--system-role", "user")
    again = run("--system-role", "user")

    assert done.returncode == 0, done.stderr
    assert f"{ROWS} replies paid for" in done.stdout
    rows = read_teacher_rows(command.data_dir / "clean_with_code/FinQA-mini/finqa-mini_dev_generated.csv")
    assert len(rows) == ROWS and {row.finish_reason for row in rows} <= {"stop", "length"}
    assert sum(match(row.actual_answer, row.expected_answer) for row in rows) >= 2
    assert f"0 replies paid for, {ROWS} rows from the journal" in again.stdout
