"""Fixtures for the preprocessing commands: they run as processes, against a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fixture import Command
from made_up_rows import every_operation
from teacher_server import TeacherServer, running
from teaching import Teach, write_clean


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def teacher_server() -> Iterator[TeacherServer]:
    with running(TeacherServer()) as server:
        yield server


@pytest.fixture
def teach(command: Command, teacher_server: TeacherServer) -> Teach:
    return Teach(command, teacher_server)


@pytest.fixture
def questions(tmp_path: Path) -> int:
    """Clean rows for every operation; returns how many."""
    rows = every_operation("train")
    write_clean(tmp_path, train=rows)
    return len(rows)
