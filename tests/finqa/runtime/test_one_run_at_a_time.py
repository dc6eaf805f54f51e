"""One run at a time on an output; temporary files of killed runs go with the next one, those of a living one stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import REPOSITORY, Folders, renamed_to, temporary_folder, write_atomically

HOLDS = """
import sys, time
from pathlib import Path
from finqa.runtime.paths import renamed_to, temporary_folder
with {how}(Path(sys.argv[1])) as temporary:
    print(temporary, flush=True)
    {content}
    time.sleep(100)
"""
KINDS = {
    "file": (renamed_to, "temporary.write_text('half')"),
    "folder": (temporary_folder, "(temporary / 'weights').write_text('half')"),
}
KILLED_WHILE_WRITING = """
import os, runpy, signal, sys
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_run_left_goes_with_the_next_and_a_living_one_keeps_its_own(tmp_path: Path, kind: str):
    how, content = KINDS[kind]
    path, mine = tmp_path / "a [b].csv", tmp_path / ".a [b].csv.notes"
    mine.write_text("of the user")
    code = HOLDS.format(how=how.__name__, content=content)
    other = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert other.stdout is not None
    temporary = Path(other.stdout.readline().strip())
    assert temporary.parent == tmp_path and temporary.exists()
    with how(path):
        assert temporary.exists()
    with only_run_on(tmp_path):
        assert temporary.exists()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    write_atomically(tmp_path / "another.csv", "of another file")
    assert temporary.exists()
    with how(path) as own:
        assert not temporary.exists() and own.exists()
    assert not own.exists() and mine.exists()


def test_a_run_that_holds_a_folder_removes_every_file_that_a_killed_one_left_in_it(tmp_path: Path):
    for name in ("training_state.safetensors", "model.safetensors"):
        code = HOLDS.format(how="renamed_to", content="pass")
        other = subprocess.Popen([sys.executable, "-c", code, tmp_path / name], stdout=subprocess.PIPE, cwd=REPOSITORY)
        assert other.stdout is not None and other.stdout.readline()
        other.kill()
        other.wait()
    assert len(names(tmp_path)) == 2
    with only_run_on(tmp_path):
        assert names(tmp_path) == []


def test_a_command_that_was_killed_while_writing_leaves_nothing_once_it_ran_again(tmp_path: Path):
    raw = json.loads((REPOSITORY / "data/FinQA-mini/test.json").read_text())[:3]
    write_atomically(tmp_path / "FinQA-mini/test.json", json.dumps(raw))
    words = ["preprocessing.preprocess_finqa", "--dataset", "FinQA-mini", "--split", "test", "--data-dir", tmp_path]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *words], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert any(name.startswith(".test.csv.") for name in names(tmp_path / "clean"))
    subprocess.run([sys.executable, "-m", *words], cwd=REPOSITORY, check=True, capture_output=True)
    assert not any(name.startswith(".") for name in names(tmp_path))


STAGES = {
    ("preprocess_finqa",): Folders.clean,
    ("process_finqa_code_generation", "--teacher", "program"): Folders.generated,
    ("filter_valid_answers",): Folders.filtered,
}


def test_a_second_preprocessing_of_a_split_is_refused_in_one_line(tmp_path: Path):
    for (script, *words), output in STAGES.items():
        named = ["--dataset", "FinQA-mini", "--data-dir", tmp_path, "--split", "dev"]
        command = [sys.executable, "-m", f"preprocessing.{script}", *named, *words]
        place = output(Folders(data=tmp_path), "FinQA-mini", "dev")
        with only_run_on(place):
            second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert second.stderr == f"error: another run is writing to {place}; wait for it, or end it first\n"
        assert second.returncode == 1 and not place.exists()
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
