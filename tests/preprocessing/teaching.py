"""What tests of the OpenAI teacher share: running the command against the server, and reading what it left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_fixture import Command
from made_up_rows import raw_row, write_raw
from teacher_server import Fault, TeacherServer

from finqa.runtime.errors import report_errors
from finqa.runtime.paths import SPLITS, Folders
from finqa.task.datasets import load_finqa
from finqa.task.records import TeacherRow, read_teacher_rows, write_questions
from preprocessing import process_finqa_code_generation

KEY = "sk-secret-of-the-tests"


@dataclass(frozen=True)
class Teach:
    """Runs the command on split train against the server, in this process: starting one takes most of a second."""

    command: Command
    server: TeacherServer

    def __call__(self, *flags: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
        name = "process_finqa_code_generation"
        line = [name, "--data-dir", str(self.command.data_dir), *self.flags, *flags]
        environment = self.command.environment({"OPENAI_API_KEY": key} if key else {})
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", line)
            for variable in [variable for variable in os.environ if variable not in environment]:
                patch.delenv(variable)
            for variable, value in environment.items():
                patch.setenv(variable, value)
            code = report_errors(process_finqa_code_generation.main)
        return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        return self.command.start("process_finqa_code_generation", *self.flags, *flags, OPENAI_API_KEY=KEY)

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--split", "train", "--base-url", self.server.url)

    def clean_rows(self, count: int) -> None:
        """Make so many clean rows, numbered in their ids."""
        write_clean(self.command.data_dir, train=[raw_row(f"MADE/up/{i}") for i in range(count)])

    @property
    def rows(self) -> list[TeacherRow]:
        return read_teacher_rows(self.output)

    @property
    def output(self) -> Path:
        return self.command.data_dir / "clean_with_code/FinQA/finqa_train_generated.csv"

    @property
    def journal(self) -> Path:
        return self.output.with_suffix(".journal.jsonl")

    def journal_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def manifest(self) -> dict[str, Any]:
        return json.loads(self.output.with_suffix(".run.json").read_text())


def write_clean(data_dir: Path, **rows_by_split: list[dict[str, Any]]) -> None:
    """The clean CSVs of raw rows, as the stage before writes them."""
    write_raw(data_dir, **rows_by_split)
    folders = Folders(data=data_dir)
    for split in SPLITS:
        write_questions(folders.clean("FinQA", split), load_finqa(folders.raw("FinQA", split)).questions)


def number_in(question: str) -> int:
    """The number at the end of the id that a made-up question quotes."""
    return int(question.split("MADE/up/")[1].split()[0])


def only_for(name: str, fault: Fault, times: int = 1_000_000):
    """The fault, for the question that has `name` in it, the first `times` times."""
    return lambda question, nth: fault if f"/{name} " in question and nth <= times else None
