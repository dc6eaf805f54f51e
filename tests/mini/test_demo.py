"""The demo's stages: what is run, and what a failing one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from finqa.errors import UserError
from finqa.paths import REPOSITORY
from mini import demo
from mini.demo import Stage, run_stage, stages


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "LOGS", tmp_path)
    return tmp_path


def test_a_stage_leaves_its_output_in_its_log(logs: Path):
    assert run_stage(Stage("hello", "-c 'print(2 + 3)'", str)) > 0
    assert (logs / "hello.log").read_text() == "5\n"


def test_a_stage_that_fails_stops_the_demo_with_the_end_of_its_log():
    code = "print(*range(50), sep=chr(10)); raise SystemExit(3)"
    with pytest.raises(UserError, match=r"stage bad failed \(exit code 3\)") as failure:
        run_stage(Stage("bad", f"-c '{code}'", str))
    assert str(failure.value).endswith("48\n49\n")
    assert "\n20\n" not in str(failure.value)


def test_every_script_that_the_demo_runs_is_there():
    for stage in stages():
        script = stage.command.split()[0]
        if script != "-m":
            assert (stage.folder / script).exists(), stage.command
    assert {stage.folder for stage in stages()} == {REPOSITORY, REPOSITORY / "crosscoder-model-diff"}
