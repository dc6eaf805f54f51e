"""How tests run a preprocessing command, and read what it says when it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from finqa.runtime.paths import REPOSITORY


@dataclass(frozen=True)
class Command:
    """Runs `python -m preprocessing.<name> --data-dir <data_dir> <flags>`, with no key but what `env` gives."""

    data_dir: Path

    def __call__(self, name: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(name, *flags),
            cwd=REPOSITORY,
            env=self.environment(env),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, name: str, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.line(name, *flags), cwd=REPOSITORY, env=self.environment(env))

    def line(self, name: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", f"preprocessing.{name}", "--data-dir", str(self.data_dir), *flags]

    def environment(self, env: dict[str, str]) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")} | env


def the_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as it should: exit code 1, one line on stderr."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr
