"""The project's own commands on a real model and real rows, on two CPU cores: few rows, so accuracies mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.evaluation.metrics import wilson
from finqa.evaluation.predictions import read_predictions
from finqa.runtime.paths import REPOSITORY, SPLITS

QUESTIONS, ROWS = 5, 20
SMALL = ("--max-rows", str(ROWS), "--limit", str(QUESTIONS), "--NUM_EPOCHS", "1", "--max-new-tokens", "64")
NO_WARMUP = ("--warmup-steps", "0")
"""Three updates are fewer than the warm-up: what the adapter changes would be less than what bf16 rounds away."""


def run(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    not {"REAL_STUDENT", "FINQA_ROWS"} <= os.environ.keys(),
    reason="REAL_STUDENT names no folder of SmolLM2-135M-Instruct, or FINQA_ROWS no folder with raw/",
)
def test_smollm2_learns_from_real_rows_and_is_evaluated_in_all_three_ways(tmp_path: Path):
    model, data, results = Path(os.environ["REAL_STUDENT"]), tmp_path / "data", tmp_path / "results"
    (data / "FinQA").mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(Path(os.environ["FINQA_ROWS"]) / "raw" / f"{split}.json", data / "FinQA")
    run("-m", "preprocessing.preprocess_finqa", "--data-dir", data)
    run("-m", "preprocessing.process_finqa_code_generation", "--teacher", "program", "--data-dir", data)
    run("-m", "preprocessing.filter_valid_answers", "--data-dir", data)

    folders = ("--data-dir", data, "--results-dir", results)
    flags = ("-P", "-T", "--VLLM", "-ET", "all", "--no-push", *SMALL, *NO_WARMUP, *folders)
    log = run("main.py", "FinQA", model, *flags)

    [student] = (results / "FinQA").iterdir()
    assert student.name == f"{model.name}-peftq_proj_k_proj_v_proj_o_proj-bs8-ne1"
    assert "strict" in (student / "metrics.md").read_text()
    for evaluation in ("zero-shot", "few-shot", "fine-tuned"):
        metrics = json.loads((student / "test" / evaluation / "metrics.json").read_text())
        right = [prediction.correct["strict"] for prediction in read_predictions(student / "test" / evaluation)]
        assert metrics["n"] == len(right) == QUESTIONS
        assert metrics["accuracy"] == sum(right) / QUESTIONS
        assert tuple(metrics["accuracy_interval"]) == wilson(sum(right), QUESTIONS)
    trained = json.loads((data / "models" / "FinQA" / student.name / "run.json").read_text())
    assert (trained["rows"], trained["updates"]) == (ROWS, 3)
    found = json.loads((student / "test" / "fine-tuned" / "run.json").read_text())["adapter_check"]
    assert found["active"] and found["questions"] == QUESTIONS
    # Rounding is a large share of what three updates change; but what is served is nearer the student than the base is.
    assert found["kl_merged"] < 0.5 * found["kl_base"]
    assert found["kl_vllm"] < 0.5 * found["kl_base_on_vllm_tokens"]
    assert "adapter active" in log
