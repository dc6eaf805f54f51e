"""main.py as a user runs it: a process of its own, the documented flags."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import started

from finqa.evaluation.predictions import read_predictions
from finqa.runtime.errors import report_errors
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.answers import match
from finqa.task.prompts import INSTRUCTION
from finqa.task.records import TeacherRow, write_teacher_rows

SETTINGS = ["--lora-r", "8", "--lora-alpha", "16", "--learning-rate", "1e-2", "--optim", "adamw_torch", "-BS", "4"]
QUICK = ["-MSL", "512", "--max-new-tokens", "16", "-EBS", "8", "--no-push"]
MODEL_ID = "tiny-student-peftq_proj_k_proj_v_proj_o_proj-bs4-ne1"


def run(*words: object, script: str = "main.py") -> subprocess.CompletedProcess[str]:
    return started.run([REPOSITORY / script, *words])


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """main.py in this process: the same code without the seconds of a start."""
    script = runpy.run_path(str(REPOSITORY / "main.py"))

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
        return report_errors(script["main"])

    return call


def teacher_row(number: int) -> TeacherRow:
    prompt = f"###Passage:\nsales of {number}\n###Question:\nhow much ?\n###Python"
    kind = "new" if number % 4 == 0 else "known"
    code = f"sales = {number}\nans = sales - 1"
    answer = str(number - 1)
    return TeacherRow(prompt, code, answer, answer, id=f"row-{number}", family_kind=kind, family=f"{kind}-one")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(data=tmp_path / "data", results=tmp_path / "results")
    write_teacher_rows(folders.filtered("FinQA-mini", "train"), [teacher_row(n) for n in range(24)])
    for split in ("dev", "test"):
        write_teacher_rows(folders.generated("FinQA-mini", split), [teacher_row(n) for n in range(30, 38)])
    return folders


def where(folders: Folders) -> list[str]:
    return ["--data-dir", str(folders.data), "--results-dir", str(folders.results)]


@pytest.mark.parametrize("script", ["main.py", "inference.py"])
def test_help_answers_at_once_without_importing_torch(script: str):
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets', 'wandb', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DATASET_NAME" in done.stdout
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["NoSuch", "pocket-mistral", "-P"], "unknown dataset 'NoSuch'; one of FinQA"),
        (["FinQA-mini", "tiny", "-P", "-NT", "-D", "--EVAL_TYPE", "one-shot"], "unknown eval type 'one-shot'; one of"),
        (["FinQA-mini", "tiny", "-P", "-NT", "-D", "-ET", "zero-shot,few"], "unknown eval type 'few'; one of"),
        (["FinQA-mini", "tiny", "-P", "-NT"], "nothing to do"),
        (["FinQA-mini", "tiny", "-P", "-NT", "-T"], "make it with: python main.py FinQA-mini"),
        (["FinQA-mini", "tiny", "-P", "--push"], "--push is not possible"),
        (["FinQA-mini", "tiny", "-P", "--lora-r", "0"], "--lora-r must be at least 1"),
        (["FinQA-mini", "tiny", "-P", "-NT", "-T", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["FinQA", "tiny", "-P"], "finqa_train_generated_filtered.csv is missing; make it with: python -m prep"),
        (["FinQA-mini", "tiny", "-P", "-LM", "no_proj"], "has no layers called no_proj"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line_and_a_non_zero_exit(
    words: list[str], says: str, folders: Folders, tiny_student: Path
):
    done = run(*[str(tiny_student) if word == "tiny" else word for word in words], *where(folders))
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert "Traceback" not in done.stderr


def test_vllm_where_it_is_not_installed_is_one_line_before_anything_heavy(folders: Folders, tiny_student: Path):
    words = ["main.py", "FinQA-mini", str(tiny_student), "-P", "-NT", "-D", "--VLLM", *where(folders)]
    code = (
        "import importlib.util, runpy, sys\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'vllm' else real(name, *a)\n"
        f"sys.argv = {words!r}\n"
        f"try: runpy.run_path({str(REPOSITORY / 'main.py')!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: vLLM is not installed (--VLLM); install it with")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_training_and_evaluation_in_one_call_equal_two_calls(
    folders: Folders, tiny_student: Path, tmp_path: Path, run_here: Callable[..., int]
):
    student = ["FinQA-mini", tiny_student, "-P", *SETTINGS, *QUICK]
    once = run(*student, "-D", *where(folders))
    assert once.returncode == 0, once.stderr
    assert "fine-tuned on dev: accuracy" in once.stdout
    assert "adapter active: KL" in once.stdout
    manifest = folders.evaluation("FinQA-mini", MODEL_ID, "dev", "fine-tuned") / "run.json"
    checked = json.loads(manifest.read_text())["adapter_check"]
    assert checked["active"] and checked["tokens"] > 0

    apart = Folders(data=tmp_path / "again", results=tmp_path / "results-again")
    shutil.copytree(folders.data / "clean_with_code", apart.data / "clean_with_code")
    assert run_here(*student, *where(apart)) == 0
    assert not apart.results.exists()
    assert run_here(*student, "--NO-TRAIN", "--DEV_SET", *where(apart)) == 0

    first, second = (
        read_predictions(f.evaluation("FinQA-mini", MODEL_ID, "dev", "fine-tuned")) for f in (folders, apart)
    )
    assert first == second and len(first) == 8


@pytest.mark.slow
def test_all_types_on_both_splits_leave_figures_that_follow_from_the_predictions(
    folders: Folders, tiny_student: Path, run_here: Callable[..., int]
):
    student = ["FinQA-mini", tiny_student, "-P", *SETTINGS, *QUICK, *where(folders)]
    assert run_here(*student) == 0
    assert run_here(*student, "-NT", "-D", "-T", "-ET", "all", "--limit", "6") == 0
    for split in ("dev", "test"):
        for eval_type in ("zero-shot", "few-shot", "fine-tuned"):
            folder = folders.evaluation("FinQA-mini", MODEL_ID, split, eval_type)
            found = json.loads((folder / "metrics.json").read_text())
            predictions = read_predictions(folder)
            right = sum(match(p.answer, p.expected) for p in predictions)
            assert found["accuracy"] == right / 6 and found["n"] == 6
            assert set(found["accuracy_by_family"]) == {"known-one", "new-one"}
            manifest = json.loads((folder / "run.json").read_text())
            assert manifest["served"]["engine"] == "transformers"
            assert (manifest["student_hash"] is None) == (eval_type != "fine-tuned")
    student_folder = folders.results / "FinQA-mini" / MODEL_ID
    assert "| zero-shot | fine-tuned | strict | 6 |" in (student_folder / "metrics.md").read_text()
    assert (student_folder / "accuracy.png").exists()


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_ends_with_the_same_files(
    folders: Folders,
    tiny_student: Path,
    tmp_path: Path,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    n = 120
    write_teacher_rows(folders.generated("FinQA-mini", "dev"), [teacher_row(number) for number in range(n)])
    words = ["FinQA-mini", tiny_student, "-P", "-NT", "-D", "-ET", "zero-shot", "--max-new-tokens", 24, "-EBS", 4]
    whole = Folders(data=folders.data, results=tmp_path / "whole")
    assert run_here(*words, *where(whole)) == 0
    expected = folder_of(whole)

    folder = folder_of(folders)

    def n_replies() -> int:
        return sum(path.read_text().count("\n") for path in folder.glob("replies-*"))

    command = [REPOSITORY / "main.py", *words, *where(folders)]
    assert started.killed_when(lambda: n_replies() >= 20, command).returncode == -signal.SIGKILL
    assert n_replies() < n and not (folder / "predictions.jsonl").exists()

    capsys.readouterr()
    assert run_here(*words, *where(folders)) == 0
    assert "zero-shot on dev: going on, " in capsys.readouterr().out
    assert (folder / "predictions.jsonl").read_bytes() == (expected / "predictions.jsonl").read_bytes()
    assert [path.name for path in folder.iterdir() if path.name.startswith("replies")] == []

    with monkeypatch.context() as patched:
        # All there: no model is loaded, and the figures are made again.
        patched.setattr("finqa.evaluation.evaluate.served_models", None)
        assert run_here(*words, *where(folders)) == 0
    assert (folder / "predictions.jsonl").read_bytes() == (expected / "predictions.jsonl").read_bytes()

    assert run_here(*words, "--max-new-tokens", 5, "--limit", 8, *where(folders)) == 0
    shorter = read_predictions(folder)
    assert len(shorter) == 8 and max(p.n_new_tokens for p in shorter) == 5


def folder_of(folders: Folders) -> Path:
    return folders.evaluation("FinQA-mini", MODEL_ID.replace("bs4", "bs1"), "dev", "zero-shot")


@pytest.mark.slow
def test_samples_are_voted_on_beside_the_greedy_results(
    folders: Folders, tiny_student: Path, run_here: Callable[..., int]
):
    words = ["FinQA-mini", tiny_student, "-P", "-NT", "-D", "-ET", "zero-shot", "--max-new-tokens", 8]
    assert run_here(*words, *where(folders)) == 0
    greedy = (folder_of(folders) / "predictions.jsonl").read_bytes()
    assert run_here(*words, "--samples", 3, *where(folders)) == 0
    assert (folder_of(folders) / "predictions.jsonl").read_bytes() == greedy
    sampled = folder_of(folders).with_name("zero-shot-3-samples")
    assert [len(p.samples or ()) for p in read_predictions(sampled)] == [3] * 8
    assert json.loads((sampled / "run.json").read_text())["generation"]["temperature"] == 0.7
    assert "| zero-shot-3-samples | 3 |" in (sampled.parents[1] / "metrics.md").read_text()


@pytest.mark.slow
def test_an_instruction_replaces_the_data_sets_own_and_its_replies_stay_apart(
    folders: Folders, tiny_student: Path, run_here: Callable[..., int]
):
    words = ["FinQA-mini", tiny_student, "-P", "-NT", "-D", "-ET", "zero-shot,few-shot", "--max-new-tokens", 8]
    words += where(folders)
    seen = {}
    for flags in ((), ("--instruction", "Be brief.")):
        assert run_here(*words, *flags) == 0
        manifest = json.loads((folder_of(folders) / "run.json").read_text())
        seen[manifest["generation"]["instruction"]] = manifest["generation_key"]
        few_shot = json.loads((folder_of(folders).parent / "few-shot" / "run.json").read_text())
        assert few_shot["generation"]["instruction"] == manifest["generation"]["instruction"]
        assert read_predictions(folder_of(folders))[0].n_prompt_tokens > 0
    assert list(seen) == [INSTRUCTION, "Be brief."]
    assert len(set(seen.values())) == 2


@pytest.mark.slow
def test_another_base_under_the_same_name_is_refused(
    folders: Folders, tiny_student: Path, tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture
):
    import torch

    from finqa.models.students import load_base

    base = Path(shutil.copytree(tiny_student, tmp_path / "tiny-student"))
    student = ["FinQA-mini", base, "-P", *SETTINGS, *QUICK, *where(folders)]
    assert run_here(*student) == 0
    model = load_base(str(base), torch.float32)
    model.get_input_embeddings().weight.data.add_(0.01)
    model.to(torch.bfloat16).save_pretrained(base)
    assert run_here(*student, "-NT", "-D") == 1
    assert "trained on other base weights" in capsys.readouterr().err
    assert run_here(*student) == 1
    assert "begun with another configuration (base_hash" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sham_is_one_flag_and_stays_apart_by_its_run_name(
    folders: Folders, tiny_student: Path, run_here: Callable[..., int]
):
    student = ["FinQA-mini", tiny_student, "-P", *SETTINGS, *QUICK, *where(folders)]
    assert run_here(*student, "--families", "known", "--run-name", "sham") == 0
    folder = folders.model("FinQA-mini", f"{MODEL_ID}-sham")
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["config"]["families"] == "known" and manifest["rows"] == 24
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_student)
