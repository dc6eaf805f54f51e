"""Commands beside each other on the GPUs of a machine: order, memory, failures, going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finqa.errors import UserError
from study.students.jobs import SHARE, Gpu, Job, is_done, run_jobs

NOTE = (
    '-c "import json, os, sys, time; start = time.time(); time.sleep(0.5); '
    "print(json.dumps([start, time.time(), os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:]]))\" "
)
FAILS = "-c \"import sys; print('no such thing'); sys.exit(3)\""


def noted(logs: Path, name: str) -> tuple[float, float, str, list[str]]:
    return tuple(json.loads((logs / f"{name}.log").read_text()))  # pyright: ignore[reportReturnType]


def test_a_job_waits_for_those_before_it_and_for_memory(tmp_path: Path):
    jobs = [Job("second", NOTE, 10, ("first",)), Job("first", NOTE, 10), Job("large", NOTE, 75), Job("small", NOTE, 5)]
    run_jobs(jobs, tmp_path, [Gpu(4, 80)])
    found = {job.name: noted(tmp_path, job.name) for job in jobs}
    assert found["second"][0] >= found["first"][1]
    assert found["large"][0] >= found["first"][1]
    assert {gpu for _, _, gpu, _ in found.values()} == {"4"}


def test_jobs_go_to_the_gpu_with_the_least_on_it_and_are_told_their_share(tmp_path: Path):
    run_jobs([Job("one", NOTE + SHARE, 20), Job("other", NOTE + SHARE, 20)], tmp_path, [Gpu(0, 80), Gpu(1, 80)])
    one, other = noted(tmp_path, "one"), noted(tmp_path, "other")
    assert {one[2], other[2]} == {"0", "1"}
    assert one[3] == other[3] == ["0.250"]
    assert max(one[0], other[0]) < min(one[1], other[1])


def test_without_a_gpu_one_job_runs_at_a_time(tmp_path: Path):
    run_jobs([Job("one", NOTE, 20), Job("other", NOTE, 20)], tmp_path, [Gpu(None, 0)])
    first, second = sorted(noted(tmp_path, name) for name in ("one", "other"))
    assert second[0] >= first[1]


def test_what_is_done_is_not_done_again_unless_its_command_changed(tmp_path: Path):
    job = Job("one", NOTE, 1)
    run_jobs([job], tmp_path, [Gpu(None, 0)])
    before = noted(tmp_path, "one")
    run_jobs([job], tmp_path, [Gpu(None, 0)])
    assert noted(tmp_path, "one") == before
    assert not is_done(Job("one", NOTE + "else", 1), tmp_path)


def test_a_failure_leaves_out_what_needs_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("study.students.jobs.PAUSE_S", 0)
    jobs = [Job("bad", FAILS, 1), Job("needs-it", NOTE, 1, ("bad",)), Job("good", NOTE, 1)]
    with pytest.raises(UserError, match=r"(?s)bad failed.*no such thing.*left out: needs-it"):
        run_jobs(jobs, tmp_path, [Gpu(0, 80)])
    assert is_done(jobs[2], tmp_path) and not is_done(jobs[0], tmp_path)
