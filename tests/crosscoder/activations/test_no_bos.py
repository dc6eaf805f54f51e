"""The whole diff on a student in the form of Qwen2.5: no BOS, a default system turn, a padded vocabulary."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import started
import torch
from made_up_documents import write_documents
from made_up_qwen import PADDING, SYSTEM, tiny_qwen

from crosscoder.activations.collection import documents_from_rows
from crosscoder.activations.layout import KINDS, token_texts
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.lens import read_unembedding
from crosscoder.analysis.token_kinds import token_kinds
from crosscoder.interventions.patching import batch_of
from crosscoder.interventions.splicing import stored_texts
from finqa.models import students
from finqa.runtime.paths import REPOSITORY, SHIPPED_DATA, Folders
from finqa.task.datasets import load_finqa
from finqa.task.prompts import REQUEST, training_prompt
from finqa.task.records import TeacherRow, write_teacher_rows
from mini.make_finqa_mini import NAME
from study.measures.strata import STRATA, questions_of
from study.wording import finqa_mini_wording

FOLDER = REPOSITORY / "crosscoder-model-diff"


class Diff:
    """A tiny Qwen with a LoRA fine-tune, and the words that name both."""

    def __init__(self, folder: Path, tied: bool, rows: list[TeacherRow]):
        from peft import LoraConfig, get_peft_model

        self.data, self.results = folder / "data", folder / "results"
        corpus = [text for row in rows for text in (row.prompt, row.generated_code)] + [SYSTEM]
        self.student = str(tiny_qwen(folder / "tiny-qwen", tied, corpus))
        write_teacher_rows(Folders(data=self.data).filtered("FinQA-mini", "test"), rows)
        torch.manual_seed(1)
        base = students.load_base(self.student, torch.float32, "cpu")
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        run = students.StudentRun("FinQA-mini", self.student, students.settings_for(self.student))
        adapter = Folders(data=self.data).model("FinQA-mini", run.model_id)
        get_peft_model(base, settings).save_pretrained(str(adapter))
        self.tokenizer: Any = students.load_tokenizer(self.student)
        self.tokenizer.save_pretrained(adapter)

    def run(self, script: str, *words: str) -> str:
        done = started.run(
            [script, "FinQA-mini", self.student, "--data-dir", self.data, "--layer", "2", *words], FOLDER
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=[("mlp", True), ("residual", False)], ids=["tied", "untied"])
def diff(request, tmp_path_factory, teacher_rows):
    site, tied = request.param
    rows = [replace(row, prompt=f"{REQUEST}\n{row.prompt}") for row in teacher_rows]
    made = Diff(tmp_path_factory.mktemp("qwen"), tied, rows)
    made.run("collect_activations.py", "--site", site, "--no-push")
    made.run("train.py", "--site", site, "--results-dir", str(made.results), "--epochs", "20", "--no-push")
    return made, site


@pytest.fixture(scope="module")
def store(diff) -> ActivationStore:
    (folder,) = (diff[0].data / "activations").iterdir()
    return ActivationStore(folder)


@pytest.mark.slow
def test_analysis_splicing_and_patches_run_through(diff):
    made, site = diff
    said = made.run("analyse.py", "--site", site, "--results-dir", str(made.results), "--splice", "--causal", "4")
    assert "latent scaling's conditions for fine-tuned-only" in said
    (results,) = made.results.iterdir()
    numbers = json.loads((results / "analysis.json").read_text())
    assert {"splicing", "causal", "latent_scaling"} <= set(numbers)
    kinds = {row["kind"] for row in numbers["explained_variance_by_kind"]}
    assert {"template", "chat", "frame", "passage", "question", "program", "end"} <= kinds and "other" not in kinds
    with (results / "latents.csv").open(newline="") as file:
        promoted = [row["promoted"] for row in csv.DictReader(file)]
    assert all("''" not in tokens for tokens in promoted)


@pytest.mark.slow
def test_every_token_is_recorded_and_the_system_turn_is_mark_up(diff, store):
    tokenizer = diff[0].tokenizer
    kinds = token_kinds(store, tokenizer)
    own = store.document == store.document[0]
    texts = token_texts(tokenizer, store.token_id.unique().tolist())
    parts = dict.fromkeys(KINDS, "")
    for kind, token in zip(kinds[own].tolist(), store.token_id[own].tolist(), strict=True):
        parts[KINDS[kind]] += texts[token]
    turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert parts["chat"] == "".join(turns)
    assert len(store) == sum(document.n_ids for document in store.documents)


@pytest.mark.slow
def test_a_patch_changes_the_first_token_where_it_is_no_bos(store):
    (document,) = stored_texts(store, [0], None)
    assert document.untouched == () and batch_of([document]).patched.all()


def test_strata_are_found_behind_a_system_turn(tmp_path: Path):
    questions = load_finqa(SHIPPED_DATA / NAME / "dev.json").questions[:4]
    rows = [TeacherRow(training_prompt(q), "ans = 1", "1", "1", id=q.id, family=q.family) for q in questions]
    tokenizer: Any = students.load_tokenizer(str(tiny_qwen(tmp_path / "qwen", True, [row.prompt for row in rows])))
    documents = documents_from_rows(rows, tokenizer)
    store = write_documents(tmp_path / "set", documents, None, lambda table: torch.randn(len(table["kind"]), 2, 4))
    stratum = questions_of(store, rows, tokenizer, finqa_mini_wording()).stratum
    for number, (question, document) in enumerate(zip(questions, documents, strict=True)):
        ids, strata = document.ids, [STRATA[code] for code in stratum[store.document == number].tolist()]
        assert len(strata) == len(ids) and strata[document.n_prompt - 1] == "last prompt token"
        asked = [i for i, stratum in zip(ids, strata, strict=True) if stratum.startswith("question")]
        assert tokenizer.decode(asked).strip() == question.question.strip()


def test_rows_that_pad_the_vocabulary_are_no_token(tmp_path: Path, teacher_rows):
    student = tiny_qwen(tmp_path / "qwen", True, [row.prompt for row in teacher_rows])
    tokenizer = students.load_tokenizer(str(student))
    whole = read_unembedding(str(student), 10**6).weight
    assert len(read_unembedding(str(student), len(tokenizer)).weight) == len(tokenizer) == len(whole) - PADDING
