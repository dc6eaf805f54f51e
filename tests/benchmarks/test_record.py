"""A benchmark's record says what was measured, where, from which code and by which command."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from benchmarks.parts.record import command_line, machine, markdown_table, summary, write_record
from finqa.runtime.paths import REPOSITORY


def test_a_record_holds_its_figures_and_what_they_depend_on(tmp_path: Path):
    path = write_record("speed", {"n": 3, "seconds": summary([1.0, 4.0, 2.0])}, "| a |", folder=tmp_path / "new")
    record = json.loads(path.read_text())
    assert path == tmp_path / "new" / "speed.json"
    assert record["n"] == 3
    assert record["seconds"] == {"median": 2.0, "lowest": 1.0, "highest": 4.0, "repeats": 3}
    assert record["machine"]["python"] == platform.python_version()
    assert record["machine"]["cpu"] and record["machine"]["kernel"] == platform.release()
    assert {"command", "git", "date", "benchmark"} <= set(record)


def test_the_table_stands_beside_it_with_its_origin(tmp_path: Path):
    write_record("speed", {}, markdown_table(("way", "ms"), [("fork", "1.5")]), folder=tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert "| fork | 1.5 |" in text
    assert machine()["cpu"] in text and command_line() in text


def test_a_table_lines_up():
    assert markdown_table(("way", "ms"), [("a fork", 1.5), ("b", 10)]) == (
        "| way    |  ms |\n| ------ | --: |\n| a fork | 1.5 |\n| b      |  10 |"
    )


def test_the_command_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    script = REPOSITORY / "main.py"
    monkeypatch.setattr(sys, "orig_argv", ["/some/where/python3", str(script), "--name", "two words"])
    assert command_line() == "python main.py --name 'two words'"
