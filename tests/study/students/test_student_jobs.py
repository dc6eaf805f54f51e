"""Commands beside each other on the GPUs of a machine: order, memory, failures, going on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, SPLITS, Folders
from finqa.task.records import Question, TeacherRow, read_teacher_rows, write_questions, write_teacher_rows
from study.students.__main__ import make_styled_rows
from study.students.jobs import SHARE, Gpu, Job, gpus_of_this_machine, is_done, locked, run_jobs
from study.students.plan import MAIN, Plan, chosen, short

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


def test_a_job_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("study.students.jobs.PAUSE_S", 0)
    mark = tmp_path / "mark"
    once = f"import sys, pathlib; m = pathlib.Path('{mark}'); there = m.exists(); m.touch(); sys.exit(not there)"
    run_jobs([Job("one", f'-c "{once}"', 1)], tmp_path, [Gpu(0, 80)])
    assert is_done(Job("one", f'-c "{once}"', 1), tmp_path)


SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
STARTS_ONE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEPS}']).wait()"
HEARS = (
    "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)
"""What starts the tests may ignore both, as nohup and a shell's background do, and a process inherits that."""
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
RUNS_JOBS = (
    "from pathlib import Path; from study.students import jobs; import sys; jobs.PATIENCE_S = 1; "
    "todo = [jobs.Job(str(i), '-c \"' + code + '\"', 1) for i, code in enumerate(sys.argv[2:])]; "
    "jobs.run_jobs(todo, Path(sys.argv[1]), [jobs.Gpu(0, 80)])"
)
RUNS_INTO = "from pathlib import Path; from finqa.runtime.commands import run_into; import sys; " + (
    "run_into(Path(sys.argv[1], '0.log'), 'one', '-c \"' + sys.argv[2] + '\"')"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(("program", "jobs"), [(RUNS_JOBS, [SLEEPS, STARTS_ONE, DEAF]), (RUNS_INTO, [SLEEPS])])
def test_what_is_told_to_end_ends_what_it_started(
    program: str, jobs: list[str], number: signal.Signals, tmp_path: Path
):
    study = subprocess.Popen([sys.executable, "-c", HEARS + program, str(tmp_path), *jobs], cwd=REPOSITORY)
    logs = [tmp_path / f"{job}.log" for job in range(len(jobs))]
    wait_for(lambda: all(log.exists() and log.read_text().strip() for log in logs))
    study.send_signal(number)
    assert study.wait(timeout=20) == (-number if number == signal.SIGINT else 128 + number)
    wait_for(lambda: not any(psutil.pid_exists(int(log.read_text())) for log in logs), seconds=5)


def test_a_job_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("study.students.jobs.PAUSE_S", 0)
    crashes = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{}']); time.sleep(1); sys.exit(3)"
    job = Job("one", f'-c "{crashes.format(SLEEPS)}"', 1)
    with pytest.raises(UserError, match=r"exit code 3"):
        run_jobs([job], tmp_path, [Gpu(0, 80)])
    left = int((tmp_path / "one.log").read_text())
    wait_for(lambda: not psutil.pid_exists(left), seconds=5)


def test_two_studies_do_not_run_their_jobs_in_one_folder(tmp_path: Path):
    job = Job("one", NOTE, 1)
    with locked(tmp_path), pytest.raises(UserError, match="another study runs its jobs in"):
        run_jobs([job], tmp_path, [Gpu(0, 80)])
    run_jobs([job], tmp_path, [Gpu(0, 80)])


def test_styled_rows_are_made_for_the_jobs_that_need_them_and_again_where_the_rows_have_changed(tmp_path: Path):
    plan = Plan(Folders(tmp_path / "data", tmp_path / "results"))
    named, first = plan.styled("named"), plan.styled("formula-first")
    assert plan.styled("plain") == plan.folders
    jobs = chosen(plan.jobs(), ["search-plain-names", "search-middle"])
    table = [["", "2009"], ["sales", "1"]]
    for label in ("0.25", "0.125"):
        question = Question("a", "", "", table, "what share?", label, f"divide(1, {1 / float(label):g})")
        for split in SPLITS:
            write_questions(plan.folders.clean("FinQA", split), [question])
        make_styled_rows(plan, jobs)
        [row] = read_teacher_rows(named.filtered("FinQA", "train"))
        assert (row.expected_answer, row.generated_code.split()[0]) == (label, "sales_2009")
    assert not first.filtered("FinQA", "train").exists()
    made = named.filtered("FinQA", "train").stat().st_mtime_ns
    make_styled_rows(plan, jobs)
    assert named.filtered("FinQA", "train").stat().st_mtime_ns == made


def test_a_log_may_hold_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("study.students.jobs.PAUSE_S", 0)
    says = "import sys; sys.stdout.buffer.write(b'half a character: \\xe2\\x82'); sys.exit({})"
    jobs = [Job("good", f'-c "{says.format(0)}"', 1), Job("bad", f'-c "{says.format(1)}"', 1)]
    with pytest.raises(UserError, match="half a character"):
        run_jobs(jobs, tmp_path, [Gpu(0, 80)])
    assert is_done(jobs[0], tmp_path)


def test_a_job_that_needs_one_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="left out: needs-it"):
        run_jobs([Job("needs-it", NOTE, 1, ("nowhere",)), Job("good", NOTE, 1)], tmp_path, [Gpu(0, 80)])
    assert (tmp_path / "good.done").exists()


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [(None, [0, 1, 2]), ("1", [1]), ("2,0", [0, 2]), ("GPU-bb", [1]), ("", [None]), ("-1", [None])],
)
def test_only_gpus_that_are_visible_are_used(
    visible: str | None, numbers: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made_up = tmp_path / "nvidia-smi"
    made_up.write_text("#!/bin/sh\necho '0, GPU-aa1, 81559'\necho '1, GPU-bb2, 81559'\necho '2, GPU-cc3, 24564'\n")
    made_up.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.number for gpu in gpus_of_this_machine()] == numbers


@pytest.mark.parametrize(("line", "gpu"), [("0, GPU-aa1, [N/A]", Gpu(0, 0)), ("No devices were found", Gpu(None, 0))])
def test_a_gpu_of_unknown_memory_takes_a_job_at_a_time(
    line: str, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made_up = tmp_path / "nvidia-smi"
    made_up.write_text(f"#!/bin/sh\necho '{line}'\n")
    made_up.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_of_this_machine() == [gpu]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_jobs_are_chosen_by_the_beginning_of_their_names_with_what_they_need():
    jobs = Plan(Folders(Path("d"), Path("r"))).jobs()
    names = [job.name for job in chosen(jobs, ["vote"])]
    assert names == [f"student-{short(MAIN)}", "vote"]
    assert chosen(jobs, []) == jobs
    assert {name for job in jobs for name in job.after} <= {job.name for job in jobs}
    with pytest.raises(
        UserError, match="no job is called serach; they begin with search, wording, student, again, seed4"
    ):
        chosen(jobs, ["serach"])


def test_the_study_asks_for_its_data_before_it_starts_anything(tmp_path: Path):
    command = [sys.executable, "-m", "study.students", "--data-dir", str(tmp_path), "--results-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "is missing; make it with: make data" in found.stderr and "Traceback" not in found.stderr
    listed = subprocess.run([*command, "--list"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"python main.py FinQA {MAIN} -P -D -T --VLLM -ET all" in listed.stdout
    assert "{" not in listed.stdout


def test_the_study_asks_for_clean_rows_too(tmp_path: Path):
    folders = Folders(tmp_path, tmp_path)
    for split in SPLITS:
        write_teacher_rows(folders.filtered("FinQA", split), [TeacherRow("p", "ans = 1", "1", "1")])
    command = [sys.executable, "-m", "study.students", "--data-dir", str(tmp_path), "--results-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    missing = folders.clean("FinQA", "train")
    remedy = f"make it with: make data DATA_DIR={tmp_path}"
    assert (found.returncode, found.stderr) == (1, f"error: {missing} is missing; {remedy}\n")
