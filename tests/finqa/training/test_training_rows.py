"""The training set: rows as token ids in a Dataset, tokenised once, and the CSVs that `datasets` loads by itself."""

from __future__ import annotations

import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from training_parts import teacher_row

from finqa.models.students import load_tokenizer, training_ids
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY
from finqa.task.records import Question, TeacherRow, format_table, write_questions, write_rejected, write_teacher_rows
from finqa.training import rows as training_rows
from finqa.training.rows import read_training_rows, tokenised

ROWS = [teacher_row(number, padding=number % 7) for number in range(30)]


@pytest.fixture
def tokenizer(tiny_student: Path) -> Any:
    return load_tokenizer(str(tiny_student))


def plainly(rows: list[TeacherRow], tokenizer: Any) -> list[tuple[str, list[int], int]]:
    """What tokenising one row after the other gives."""
    return [(row.id, *training_ids(tokenizer, row.prompt, row.generated_code)) for row in rows]


def as_read(rows: Any) -> list[tuple[str, list[int], int]]:
    return [(row["id"], row["ids"], row["n_prompt"]) for row in rows]


def test_a_row_over_the_maximum_is_left_out_and_named_never_cut(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture
):
    long = replace(teacher_row(7, padding=200), id="the-long-one")
    rows = [teacher_row(1), long, teacher_row(2)]
    examples, too_long = tokenised(rows, tokenizer, 512, tmp_path)
    assert as_read(examples) == plainly([rows[0], rows[2]], tokenizer)
    assert too_long == ["the-long-one"]
    assert "1 of 3 rows are over 512 tokens and left out (the-long-one)" in capsys.readouterr().out
    with pytest.raises(UserError, match="every row is over"):
        tokenised([long], tokenizer, 512, tmp_path)


def test_the_same_rows_are_tokenised_once_whatever_the_maximum(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    tokenised_rows = []

    def counted(*args: Any) -> Any:
        tokenised_rows.append(args)
        return training_ids(*args)

    monkeypatch.setattr(training_rows, "training_ids", counted)
    first, _ = tokenised(ROWS, tokenizer, 512, tmp_path)
    assert len(tokenised_rows) == 1 + len(ROWS), "the first row is looked at before the cache is"
    again, _ = tokenised(ROWS, tokenizer, 512, tmp_path)
    shorter, too_long = tokenised(ROWS, tokenizer, max(first["n_tokens"]) - 1, tmp_path)
    assert len(tokenised_rows) == 3 + len(ROWS)
    assert as_read(first) == as_read(again) == plainly(ROWS, tokenizer)
    assert len(shorter) + len(too_long) == len(ROWS) and too_long
    told = capfd.readouterr()
    assert "\r" not in told.out + told.err


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("[INST]", "[INST] ")


def other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<s>"


def other_vocabulary(tokenizer: Any) -> None:
    tokenizer.add_tokens(["sales of"])


@pytest.mark.parametrize("change", [other_template, other_end, other_vocabulary])
def test_another_tokenizer_is_another_file_in_the_cache(change: Callable[[Any], None], tokenizer: Any, tmp_path: Path):
    before, _ = tokenised(ROWS, tokenizer, 512, tmp_path)
    change(tokenizer)
    after, _ = tokenised(ROWS, tokenizer, 512, tmp_path)
    assert as_read(after) == plainly(ROWS, tokenizer) != as_read(before)
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_are_tokenised_where_libraries_lie_outside_of_site_packages(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There, `datasets` cannot name a table by what is in it: it would pickle pyarrow itself."""

    def cannot(*_: Any) -> None:
        raise pickle.PicklingError("Can't pickle pyarrow")

    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", cannot)
    assert as_read(tokenised(ROWS, tokenizer, 512, tmp_path)[0]) == plainly(ROWS, tokenizer)
    assert as_read(tokenised(ROWS, tokenizer, 512, tmp_path)[0]) == plainly(ROWS, tokenizer), "read from the cache"


@pytest.mark.parametrize("changed", [{"id": "another"}, {"prompt": "another"}, {"generated_code": "another"}])
def test_other_rows_are_another_file_in_the_cache(changed: dict[str, str], tokenizer: Any, tmp_path: Path):
    tokenised(ROWS, tokenizer, 512, tmp_path)
    rows = [*ROWS[:-1], replace(ROWS[-1], **changed)]
    assert as_read(tokenised(rows, tokenizer, 512, tmp_path)[0]) == plainly(rows, tokenizer)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("module", ["finqa.task.prompts", "finqa.models.students", "finqa.training.rows"])
def test_other_code_is_another_file_in_the_cache(
    module: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenised(ROWS, tokenizer, 512, tmp_path)
    source = training_rows.inspect.getsource
    changed = sys.modules[module]
    monkeypatch.setattr(training_rows.inspect, "getsource", lambda of: source(of) + "#" * (of is changed))
    tokenised(ROWS, tokenizer, 512, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils import chat_template_utils

    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    for day in (1, 2):

        class Day(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2024, 1, day)  # noqa: B023

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        chat_template_utils._compile_jinja_template.cache_clear()
        assert as_read(tokenised(ROWS, tokenizer, 512, tmp_path)[0]) == plainly(ROWS, tokenizer)
    assert len(list(tmp_path.iterdir())) == 1
    assert "26 Jul 2024" in tokenizer.decode(plainly(ROWS, tokenizer)[0][1])


def test_a_run_that_is_killed_while_it_tokenises_leaves_nothing_that_is_taken_for_whole(
    tokenizer: Any, tiny_student: Path, tmp_path: Path
):
    dying = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from test_training_rows import ROWS\n"
        "from finqa.models.students import load_tokenizer\n"
        "from finqa.training import rows as training_rows\n"
        "ids, calls = training_rows.training_ids, []\n"
        "def to_die(*a):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return ids(*a)\n"
        "training_rows.training_ids = to_die\n"
        "training_rows.tokenised(ROWS, load_tokenizer(sys.argv[1]), 512, Path(sys.argv[2]))\n"
    )
    path = ":".join([*map(str, (REPOSITORY, Path(__file__).parent)), *filter(None, sys.path)])
    words = [sys.executable, "-c", dying, str(tiny_student), str(tmp_path)]
    killed = subprocess.run(words, env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list(tmp_path.glob("*.arrow"))
    assert as_read(tokenised(ROWS, tokenizer, 512, tmp_path)[0]) == plainly(ROWS, tokenizer)


@pytest.mark.parametrize("left", ["nothing", "half", "a batch"])
def test_a_damaged_file_in_the_cache_is_made_again(left: str, tokenizer: Any, tmp_path: Path):
    rows = [replace(ROWS[0], id=str(number)) for number in range(1001)]
    tokenised(rows, tokenizer, 512, tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    with pyarrow.ipc.open_stream(whole) as stream:
        written = pyarrow.BufferOutputStream()
        pyarrow.ipc.new_stream(written, stream.schema).write_batch(stream.read_next_batch())
    a_batch = written.getvalue().to_pybytes()
    file.write_bytes({"nothing": b"", "half": whole[: len(whole) // 2], "a batch": a_batch}[left])
    assert len(tokenised(rows, tokenizer, 512, tmp_path)[0]) == len(rows)
    assert file.read_bytes() == whole


def test_a_full_disk_keeps_nothing_half_written(tokenizer: Any, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [replace(ROWS[0], id=str(number)) for number in range(3000)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tokenised(rows, tokenizer, 512, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_two_runs_can_tokenise_the_same_rows_at_once(tiny_student: Path, tmp_path: Path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from test_training_rows import ROWS\n"
        "from finqa.models.students import load_tokenizer\n"
        "from finqa.training.rows import tokenised\n"
        "tokenizer = load_tokenizer(sys.argv[1])\n"
        "input()\n"
        "print(sum(tokenised(ROWS, tokenizer, 512, Path(sys.argv[2]))[0]['n_tokens']))\n"
    )
    path = ":".join([*map(str, (REPOSITORY, Path(__file__).parent)), *filter(None, sys.path)])
    words = [sys.executable, "-c", program, str(tiny_student), str(tmp_path)]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(words, env={"PYTHONPATH": path}, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdin
        run.stdin.write("\n")
        run.stdin.flush()
    first, second = (run.communicate(timeout=120)[0] for run in runs)
    assert first == second != ""
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_without_a_prompt_or_a_program_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [ROWS[0], replace(ROWS[1], generated_code=" \n"), replace(ROWS[2], prompt=""), ROWS[3]]
    write_teacher_rows(tmp_path / "rows.csv", rows)
    assert [row.id for row in read_training_rows(tmp_path / "rows.csv")] == [ROWS[0].id, ROWS[3].id]
    assert "2 of 4 rows" in capsys.readouterr().out
    write_teacher_rows(tmp_path / "rows.csv", rows[1:2])
    with pytest.raises(UserError, match="no rows to train on"):
        read_training_rows(tmp_path / "rows.csv")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is offline by a variable, and whoever asks for an address or a connection fails."""
    import datasets
    import huggingface_hub.constants

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_training_set_needs_no_network(tokenizer: Any, tmp_path: Path, no_network: None):
    assert len(tokenised(ROWS, tokenizer, 512, tmp_path)[0]) == len(ROWS)


AWKWARD = ["NA", "null", "1.0", "", 'None, "quoted"\r\nand\rbroken\n', " 007 ", "nan"]
"""Cells that readers like to take for something else."""


def questions() -> list[Question]:
    return [
        Question(str(n), cell, cell, [["a", cell.strip() or "b"]], cell, cell, cell) for n, cell in enumerate(AWKWARD)
    ]


@pytest.mark.parametrize("stage", ["clean", "generated", "rejected", "published"])
def test_load_dataset_reads_the_csv_of_each_stage_as_text(stage: str, tmp_path: Path, no_network: None):
    from datasets import Features, Value, load_dataset

    path = tmp_path / "rows.csv"
    rows = [TeacherRow(*[cell] * 9) for cell in AWKWARD]
    if stage == "clean":
        columns = ["pre_text", "post_text", "table", "question", "answer", "program", "id"]
        wanted = [{**asdict(q), "table": format_table(q.table)} for q in questions()]
        write_questions(path, questions())
    elif stage == "rejected":
        columns = ["prompt", "generated_code", "actual_answer", "expected_answer", "id", "reason"]
        wanted = [{**asdict(row), "reason": "wrong-answer"} for row in rows]
        write_rejected(path, [(row, "wrong-answer") for row in rows])
    else:
        columns = ["prompt", "generated_code", "actual_answer", "expected_answer"]
        wanted = [asdict(row) for row in rows]
        write_teacher_rows(path, rows)
    if stage == "published":  # these columns are all there is
        import csv

        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *(astuple(row)[:4] for row in rows)])
    text = Features({column: Value("string") for column in columns})
    loaded: Any = load_dataset(
        "csv", data_files=str(path), split="train", keep_default_na=False, features=text, cache_dir=str(tmp_path)
    )
    assert loaded.to_list() == [{column: row[column] for column in columns} for row in wanted]
