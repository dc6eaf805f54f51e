"""A long job is never silent, and its lines say when they were written."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from finqa.runtime.errors import report_errors
from finqa.runtime.progress import Progress, StepProgress, never_silent, say

TIME = r"\d\d:\d\d:\d\d "


def test_a_silent_wait_says_what_is_under_way_and_since_when(capsys: pytest.CaptureFixture):
    with never_silent(0.2):
        print("loading the model")
        time.sleep(0.5)
        print("done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading the model" and lines[-1] == "done"
    assert re.fullmatch(TIME + r"still under way, \d s after: loading the model", lines[1])
    assert len(lines) == 4


def test_what_speaks_or_has_not_ended_its_line_is_left_alone(capsys: pytest.CaptureFixture):
    with never_silent(0.2):
        for _ in range(4):
            print("a step", file=sys.stderr)
            time.sleep(0.1)
        print("a stage", end="", flush=True)
        time.sleep(0.4)
    assert capsys.readouterr().out == "a stage"


def test_the_streams_are_as_they_were_after_an_error():
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), never_silent():
        _ = 1 / 0
    assert (sys.stdout, sys.stderr) == before


def test_lines_of_a_log_have_the_time_of_day(capsys: pytest.CaptureFixture):
    say("a result")
    StepProgress(2500).show(1250, "loss 1.0")
    progress = Progress("programs", 4_000_000, every_s=0)
    progress.started -= 2
    progress.advance(5000)
    said = capsys.readouterr()
    for line in (*said.out.splitlines(), *said.err.splitlines()):
        assert re.match(TIME, line), line
    assert "step 1,250 of 2,500: loss 1.0" in said.out
    assert re.search(r"programs: 5,000 of 4,000,000, \d,\d{3} a second, \d,\d{3} s left", said.err)


def test_after_ctrl_c_it_is_said_that_the_same_command_goes_on(capsys: pytest.CaptureFixture):
    def main() -> None:
        raise KeyboardInterrupt

    assert report_errors(main) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from what is kept\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_one_speaks(rank: str, lines: int):
    code = "import time; from finqa.runtime.progress import never_silent\nwith never_silent(0.2): time.sleep(0.3)"
    done = subprocess.run([sys.executable, "-c", code], env={"RANK": rank, "PYTHONPATH": ":".join(sys.path)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.count("still under way") == lines
