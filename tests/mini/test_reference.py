"""docs/reference/finqa-mini/: written from evaluations, and what is committed there agrees with itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finqa.evaluation.evaluate import write_results
from finqa.evaluation.predictions import Prediction
from finqa.evaluation.report import write_report
from finqa.models.students import StudentRun, settings_for
from finqa.runtime.manifest import write_manifest
from mini.reference import REFERENCE, Measured, write_reference

TYPES = ("zero-shot", "few-shot", "fine-tuned")


def prediction(number: int, right: bool) -> Prediction:
    kind = "new" if number >= 10 else "known"
    return Prediction(
        id=f"q{number}",
        prompt_hash="",
        reply="",
        code="",
        answer=1.0,
        expected="1",
        correct={"strict": right, "relaxed": right, "reported": right},
        error_kind=None,
        error_message="",
        n_prompt_tokens=9,
        n_new_tokens=3,
        finish_reason="stop",
        program_steps=1,
        teacher_solved=True,
        family=f"a {kind} one",
        family_kind=kind,
    )


@pytest.fixture
def students(tmp_path: Path) -> dict[str, Measured]:
    """20 questions, half of them new: the base knows the known, fine-tuned all, the sham the known but one."""
    right = {"zero-shot": 10, "few-shot": 10, "fine-tuned": 20}
    folders = {}
    for name in ("fine-tuned", "sham"):
        results, model = tmp_path / "results" / name, tmp_path / "models" / name
        folders[name] = Measured(results, model)
        model.mkdir(parents=True)
        (model / "run.json").write_text(json.dumps({"git": {"revision": f"abcdef0123{name}", "dirty": False}}))
        for eval_type in TYPES:
            many = 9 if (name, eval_type) == ("sham", "fine-tuned") else right[eval_type]
            where = results / "test" / eval_type
            write_results(where, [prediction(n, n < many) for n in range(20)], {"generate": 1, "run": 1})
            served = {"engine": "vllm", "dtype": "bfloat16", "adapter": "merged"}
            write_manifest(where / "run.json", StudentRun("FinQA-mini", "m", settings_for("m")), served=served)
        write_report(results)
    return folders


def test_the_reference_says_what_the_evaluations_gave_and_names_no_folder(
    students: dict[str, Measured], tmp_path: Path
):
    (tmp_path / "reference" / "old").mkdir(parents=True)
    folder = write_reference(students, tmp_path / "reference")
    assert not (folder / "old").exists()
    for name, (results, _) in students.items():
        assert (folder / name / "metrics.md").read_text() == (results / "metrics.md").read_text()
        for eval_type in TYPES:
            copied, original = (p / "metrics.json" for p in (folder / name / eval_type, results / "test" / eval_type))
            assert copied.read_text() == original.read_text()
    text = " ".join((folder / "README.md").read_text().split())
    assert "from 50.0% (base, zero-shot) to 100.0%" in text
    assert "goes from 0.0% to 100.0%, on those that it knew from 100.0% to 100.0%" in text
    assert "the sham has 0.0% on the new families and 90.0% on the known" in text
    assert "Of the same 20 questions 11 are right after fine-tuning only and 0 after the sham only" in text
    assert "Trained: fine-tuned at revision abcdef0123, sham at revision abcdef0123." in text
    assert str(tmp_path) not in "".join(p.read_text() for p in folder.rglob("*.*") if p.suffix in {".md", ".json"})


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference results are committed")
def test_the_committed_readme_has_the_figures_of_its_metrics_files():
    text = (REFERENCE / "README.md").read_text()
    rows = {"base, zero-shot": "fine-tuned/zero-shot", "base, few-shot": "fine-tuned/few-shot",
            "fine-tuned": "fine-tuned/fine-tuned", "sham": "sham/fine-tuned"}  # fmt: skip
    for name, where in rows.items():
        found = json.loads((REFERENCE / where / "metrics.json").read_text())
        cells = re.search(rf"^\| {name} \| \*\*([\d.]+) \[([\d.]+), ([\d.]+)\], n (\d+)\*\* \|", text, re.M)
        assert cells, name
        figures = [found["accuracy"], *found["accuracy_interval"]]
        assert [cells[n] for n in (1, 2, 3)] == [f"{100 * figure:.1f}" for figure in figures]
        assert int(cells[4]) == found["n"]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (REFERENCE / link).exists(), link
