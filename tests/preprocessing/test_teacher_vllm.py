"""The same command against a real server: vLLM on the CPU, serving the shipped model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from command_fixture import Command, the_one_line
from vllm_server import running_vllm

from finqa.task.answers import match
from finqa.task.records import read_teacher_rows

ROWS = 12


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_vllm(tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


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
