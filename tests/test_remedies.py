"""What an error tells the reader to type works: each remedy is followed until the first command does."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import started

from finqa.runtime.paths import REPOSITORY

CROSSCODER = REPOSITORY / "crosscoder-model-diff"
REMEDY = re.compile(r"(?:make it|make it again|make them) with: (python .*)$")
TRAIN = "-P --no-push --lora-r 4 --optim adamw_torch -MSL 1024 -BS 4"
EVALUATE = "-P -NT -T -ET zero-shot --limit 2 --max-new-tokens 4"


def run(command: str, folder: Path, libraries: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    words = shlex.split(command.removeprefix("python "))
    if libraries:
        return started.run(words, folder, environment)
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def follow(command: str, folder: Path, depth: int = 6) -> list[str]:
    """The commands that were run, in the same folder, until `command` worked; each remedy is run as it is printed."""
    ran: list[str] = []
    libraries = "preprocessing." not in command
    while (done := run(command, folder, libraries)).returncode:
        line = done.stderr.strip().splitlines()[-1]
        found = REMEDY.search(line)
        assert found and len(ran) < depth, done.stderr
        # A remedy works as it stands.
        assert run(found[1], folder).returncode == 0, (line, run(found[1], folder).stderr)
        ran.append(found[1])
    return ran


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder, with a blank in its name, of a few raw rows and nothing else."""
    folder = tmp_path / "my data"
    for name in ("FinQA", "FinQA-mini"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = json.loads((REPOSITORY / "data" / "FinQA-mini" / f"{split}.json").read_text())[:8]
            (folder / name / f"{split}.json").write_text(json.dumps(rows))
    return folder


STEPS = ["preprocess_finqa", "process_finqa_code_generation", "filter_valid_answers"]


@pytest.mark.parametrize("dataset", ["FinQA", "FinQA-mini"])
@pytest.mark.parametrize("folder", [REPOSITORY, CROSSCODER, Path("/")], ids=["repository", "crosscoder", "elsewhere"])
def test_preprocessing_is_led_through_its_steps(dataset: str, folder: Path, data: Path):
    words = f"--dataset {dataset} --data-dir {shlex.quote(str(data))}"
    ran = follow(f"python -m preprocessing.filter_valid_answers {words}", folder)
    assert [re.search(r"preprocessing\.(\w+)", one)[1] for one in ran] == STEPS[:2]  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["FinQA", "FinQA-mini"])
def test_training_evaluation_and_the_diff_are_led_to_what_they_need(dataset: str, data: Path, tiny_student: Path):
    where = f"--data-dir {shlex.quote(str(data))}"
    names = f"{dataset} {tiny_student}"
    results = shlex.quote(str(data.parent / "results"))
    evaluated = follow(f"python main.py {names} {EVALUATE} {where} --results-dir {results}", REPOSITORY)
    assert len(evaluated) == 1  # the clean rows are enough
    trained = follow(f"python main.py {names} {TRAIN} {where}", REPOSITORY)
    assert [STEPS[1] in trained[0], STEPS[2] in trained[1], len(trained)] == [True, True, 2]
    assert follow(f"python collect_activations.py {names} -BS 4 {where} --layer 1 --num-samples 4", CROSSCODER) == []


def test_a_split_that_is_there_is_not_made_again(data: Path):
    """The command for one split leaves a paid file of another as it is."""
    paid = data / "clean_with_code" / "FinQA" / "finqa_dev_generated.csv"
    paid.parent.mkdir(parents=True)
    paid.write_text("prompt,generated_code,actual_answer,expected_answer\np,ans = 1,1.0,1\n")
    before = paid.read_bytes()
    follow(
        f"python -m preprocessing.filter_valid_answers --split train --data-dir {shlex.quote(str(data))}", REPOSITORY
    )
    assert paid.read_bytes() == before


def test_a_teacher_that_was_begun_with_is_gone_on_with(data: Path):
    where = f"--data-dir {shlex.quote(str(data))}"
    assert run(f"python -m preprocessing.preprocess_finqa {where}", REPOSITORY).returncode == 0
    journal = data / "clean_with_code" / "FinQA" / "finqa_train_generated.journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("")
    line = run(f"python -m preprocessing.filter_valid_answers {where}", REPOSITORY).stderr
    assert "preprocessing.process_finqa_code_generation" in line and "--teacher" not in line


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("python main.py -P", REPOSITORY),
        ("python collect_activations.py", CROSSCODER),
        ("python -m preprocessing.process_finqa_code_generation", REPOSITORY),
    ],
)
def test_a_bare_command_names_make_data_and_what_is_shipped(command: str, folder: Path, tmp_path: Path):
    done = run(f"{command} --data-dir {tmp_path}", folder, libraries="collect" in command)
    back = "" if folder == REPOSITORY else "../"
    make = f"make {'-C .. ' if back else ''}data DATA_DIR={tmp_path}"
    assert f"{make} gets all of it" in done.stderr and done.stderr.count("\n") == 1
    assert f"python {back}main.py FinQA-mini pocket-mistral -P)" in done.stderr
    download = f"make it with: python -m preprocessing.download_finqa --data-dir {tmp_path}\n"
    assert done.stderr.endswith(download)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("python main.py FinQA-mni pocket-mistral -P", REPOSITORY),
        ("python inference.py finqa-mini pocket-mistral", REPOSITORY),
        ("python -m preprocessing.preprocess_finqa --dataset FinQAmini", REPOSITORY),
        ("python -m preprocessing.filter_valid_answers --dataset FINQA-MINI", REPOSITORY),
        *[
            (f"python {script} FinQA_mini pocket-mistral", CROSSCODER)
            for script in ("collect_activations.py", "merge_and_push_lora.py", "train.py", "analyse.py")
        ],
    ],
)
def test_an_unknown_data_set_is_named_with_the_nearest(command: str, folder: Path):
    done = run(command, folder)
    assert done.returncode == 1 and "(do you mean FinQA-mini?)" in done.stderr
    assert done.stderr.startswith("error: unknown dataset") and done.stderr.count("\n") == 1


def test_a_model_that_is_nowhere_is_named_with_the_nearest(data: Path, tiny_student: Path, tmp_path: Path):
    where = f"--data-dir {shlex.quote(str(data))}"
    follow(f"python -m preprocessing.filter_valid_answers --dataset FinQA-mini {where}", REPOSITORY)
    beside = tiny_student.with_name("tiny-studnt")
    for model, nearest in (("pocket-mistrl", "pocket-mistral"), (str(beside), str(tiny_student))):
        for command, folder in ((f"main.py FinQA-mini {model} -P --no-push", REPOSITORY),
                                (f"collect_activations.py FinQA-mini {model}", CROSSCODER)):  # fmt: skip
            done = run(f"python {command} {where}", folder, libraries=True)
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
            assert f"the model {model} is neither a local folder nor on the Hub" in done.stderr
            assert f"(do you mean {nearest}?)" in done.stderr


@pytest.mark.parametrize("third", ["./adapter", "data/models/x", "/tmp", "~/adapter", "a b", "adapter"])
@pytest.mark.parametrize("script", ["../main.py", "collect_activations.py", "../inference.py", "train.py"])
def test_a_third_name_that_is_no_account_is_refused(third: str, script: str, tmp_path: Path):
    if third == "adapter":  # could be an account, were it not a folder with one
        third = "adapter"
        (tmp_path / third).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / third / name).touch()
    script = str((CROSSCODER / script).resolve())
    done = run(f"python {script} FinQA-mini pocket-mistral {shlex.quote(third)} --data-dir {tmp_path}", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"the third name is the Hub account (HF_NAME), and {third!r} is none" in done.stderr


@pytest.mark.parametrize("name", ["x" * 300, r"$\foo$", "a/b", "..", "\udcff", "new\nline", "a:b"])
@pytest.mark.parametrize(
    ("script", "flag"), [("../main.py", "--run-name"), ("train.py", "--against"), ("train.py", "--name")]
)
def test_a_name_that_can_be_no_folder_is_refused(name: str, script: str, flag: str):
    done = run(f"python {script} FinQA-mini pocket-mistral {flag} {shlex.quote(name)}", CROSSCODER)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"error: {flag} is part of a folder name" in done.stderr


@pytest.mark.parametrize("device", ["nope", "cuda:97", "meta", ""])
@pytest.mark.parametrize("script", ["collect_activations.py", "merge_and_push_lora.py", "train.py"])
def test_a_device_that_is_not_there_is_refused_at_once(script: str, device: str):
    done = run(f"python {script} FinQA-mini pocket-mistral --device {shlex.quote(device)}", CROSSCODER, libraries=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"error: --device {device} is none of this machine, which has cpu" in done.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("main.py FinQA-mini pocket-mistral --vlm", "unrecognized arguments: --vlm (do you mean --vllm?)"),
        ("inference.py a b c d", "unrecognized arguments: d"),
        ("-m preprocessing.preprocess_finqa --dataste x", "--dataste x (do you mean --dataset?)"),
        ("-m preprocessing.filter_valid_answers --split nowhere", "argument --split: invalid choice"),
    ],
)
def test_a_wrong_flag_is_one_line(command: str, says: str):
    done = run(f"python {command}", REPOSITORY)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and says in done.stderr


def test_a_filter_that_keeps_nothing_says_so_and_leaves_the_reasons(data: Path):
    generated = data / "clean_with_code" / "FinQA" / "finqa_dev_generated.csv"
    generated.parent.mkdir(parents=True)
    generated.write_text("prompt,generated_code,actual_answer,expected_answer\np,ans = 1,1.0,2\n")
    where = f"--split dev --data-dir {shlex.quote(str(data))}"
    done = run(f"python -m preprocessing.filter_valid_answers {where}", REPOSITORY)
    assert done.returncode == 1 and "error: no row of dev was kept" in done.stderr
    assert (
        "wrong-answer" in done.stdout
        and "wrong-answer" in generated.with_stem("finqa_dev_generated_rejected").read_text()
    )


@pytest.mark.parametrize("what", ["--data-dir", "--results-dir"])
def test_what_cannot_be_written_is_known_before_any_work(what: str, data: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    words = f"FinQA-mini pocket-mistral -P {'' if what == '--data-dir' else '-NT -T'}"
    done = run(f"python main.py {words} {what} {tmp_path / 'file' / 'below'}", REPOSITORY)
    assert (
        done.returncode == 1
        and done.stderr == f"error: {tmp_path / 'file'}: Not a directory; move what is in the way\n"
    )


@pytest.mark.parametrize("script", ["train.py", "analyse.py"])
def test_results_of_the_diff_that_cannot_be_written_are_known_at_once(script: str, tmp_path: Path):
    (tmp_path / "file").touch()
    done = run(f"python {script} FinQA-mini pocket-mistral --results-dir {tmp_path / 'file' / 'below'}", CROSSCODER)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'file'}: Not a directory; move what is in the way\n"


@pytest.mark.slow
def test_what_was_trained_is_evaluated_without_p(data: Path, tiny_student: Path, tmp_path: Path):
    where = f"--data-dir {shlex.quote(str(data))} --results-dir {tmp_path / 'results'}"
    names = f"FinQA-mini {tiny_student}"
    follow(f"python main.py {names} {TRAIN} {where}", REPOSITORY)
    evaluated = f"python main.py {names} -BS 4 -NT -T --limit 2 --max-new-tokens 4 {where}"
    done = run(evaluated, REPOSITORY, libraries=True)
    assert done.returncode == 0, done.stderr
    model_id = "tiny-student-peftq_proj_k_proj_v_proj_o_proj-bs4-ne1"
    assert f"the fine-tuned model is the adapter in {data}/models/FinQA-mini/{model_id} (as with -P)" in done.stdout
    last = done.stdout.splitlines()[-1]
    table = tmp_path / "results" / "FinQA-mini" / model_id / "metrics.md"
    assert last.endswith(f"all evaluations side by side: {table}") and table.exists()
    # With other flags, and with --no-peft, it is named and not taken.
    for words in ("", "-BS 4 --no-peft", "-BS 4 --run-name other -P"):
        done = run(f"python main.py {names} {words} -NT -T {where}", REPOSITORY, libraries=True)
        assert done.returncode == 1 and f"(of this base are there: {model_id})" in done.stderr


def test_a_notebook_shows_the_line_alone(capsys: pytest.CaptureFixture):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from finqa.runtime.errors import UserError\nraise UserError('x is missing; make it with: y')")
    assert capsys.readouterr().out.strip() == "error: x is missing; make it with: y"
