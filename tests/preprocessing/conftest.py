"""Fixtures for the preprocessing commands: they run as processes, against a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fixture import Command
from teacher_server import TeacherServer, running_teacher_server


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def teacher_server() -> Iterator[TeacherServer]:
    with running_teacher_server() as server:
        yield server
