"""The demo's stages: what is run, and what a failing one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY
from mini import demo
from mini.demo import SIDE_BY_SIDE, Stage, run_lines, run_stage, stages


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


def meeting(logs: Path, name: str, other: str) -> Stage:
    """A stage that ends once the other one has begun."""
    code = (
        'import os, time; from pathlib import Path; print(os.environ["OMP_WAIT_POLICY"]); '
        f'Path("{logs}/{name}").touch(); end = time.monotonic() + 60\n'
        f'while not Path("{logs}/{other}").exists(): time.sleep(0.01) if time.monotonic() < end else exit(1)'
    )
    return Stage(name, f"-c '{code}'", str)


def test_lines_of_stages_run_side_by_side_and_give_up_a_core_while_they_wait(logs: Path):
    last = Stage("last", f"-c 'from pathlib import Path; print(Path(\"{logs}/b\").exists())'", str)
    ended = [
        (stage.name, s > 0) for stage, s in run_lines([[meeting(logs, "a", "b")], [meeting(logs, "b", "a"), last]])
    ]
    assert sorted(ended) == [("a", True), ("b", True), ("last", True)]
    assert [(logs / f"{name}.log").read_text() for name in ("a", "b", "last")] == ["PASSIVE\n", "PASSIVE\n", "True\n"]


def test_a_stage_that_fails_ends_the_other_line(logs: Path):
    waits = Stage("waits", "-c 'import time; print(1, flush=True); time.sleep(800)'", str)
    bad = Stage("bad", "-c 'raise SystemExit(3)'", str)
    with pytest.raises(UserError, match=r"stage bad failed \(exit code 3\)"):
        list(run_lines([[waits, Stage("never", "-c ''", str)], [bad]]))
    assert not (logs / "never.log").exists()


def test_side_by_side_runs_all_that_follows_the_fine_tune_and_in_order():
    names = [stage.name for stage in stages()]
    following = names[names.index("fine-tune") + 1 :]
    assert sorted(following) == sorted(name for line in SIDE_BY_SIDE for name in line)
    assert all([name for name in following if name in line] == list(line) for line in SIDE_BY_SIDE)


def test_the_analysis_is_summed_up_by_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "CROSSCODER_RESULTS", tmp_path)
    classes = {"n": 5, "instruct-only": 0, "shared": 3, "fine-tuned-only": 2, "between": 0}
    numbers = {"classes": classes, "latents": {"n": 6, "alive": 5, "dead": 1}}
    (tmp_path / "analysis.json").write_text(json.dumps(numbers))
    with pytest.raises(FileNotFoundError, match=r"dashboard\.html"):
        demo.latents()
    (tmp_path / "dashboard.html").write_bytes(b"x" * 2_340_000)
    assert demo.latents() == "5 latents alive, 3 shared, 0 instruct-only, 2 fine-tuned-only; dashboard 2.3 MB"


def test_the_last_lines_name_the_table_the_figures_and_the_dashboard():
    paths = [Path(line.partition(": ")[2].strip()) for line in demo.where().splitlines()]
    results = (
        REPOSITORY / "crosscoder-model-diff" / "results" / "pocket-mistral-FinQA-mini-layer3-mlp_1k_samples_batchtopk"
    )
    assert [path.name for path in paths] == ["metrics.md", results.name, "dashboard.html"]
    assert paths[1:] == [results, results / "dashboard.html"]
    assert paths[0].parent == REPOSITORY / "results" / "FinQA-mini" / demo.student().model_id


def test_every_script_that_the_demo_runs_is_there():
    for stage in stages():
        script = stage.command.split()[0]
        if script != "-m":
            assert (stage.folder / script).exists(), stage.command
    assert {stage.folder for stage in stages()} == {REPOSITORY, REPOSITORY / "crosscoder-model-diff"}
