"""Small real parts for the crosscoder's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_activations import D_MODEL, DOCUMENT_TOKENS, N_DOCUMENTS, planted_activations, write_store

from crosscoder.activations.store import ActivationStore
from finqa.runtime.paths import Folders
from finqa.task.records import TeacherRow, write_teacher_rows

INSTALL = "install a browser for these tests: apt-get install -y chromium && pip install playwright"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(INSTALL)
    if program is None:
        pytest.skip(INSTALL)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """2,000 tokens in 40 documents, planted from 16 directions, in three shards."""
    folder = tmp_path / "activations"
    write_store(folder, planted_activations(N_DOCUMENTS * DOCUMENT_TOKENS, D_MODEL, 16), shard_tokens=800)
    return ActivationStore(folder)


@pytest.fixture(scope="session")
def teacher_rows() -> list[TeacherRow]:
    """Twelve rows of different lengths, with programs."""
    return [
        TeacherRow(
            prompt=f"###Passage:\n{'net sales rose . ' * (3 + 5 * (i % 4))}\n###Question:\nhow much ?\n###Python",
            generated_code=f"net_sales_2009 = {206588 + i}\nans = net_sales_2009 - {i}",
            actual_answer="206588.0",
            expected_answer="206588",
            id=f"row-{i}",
        )
        for i in range(12)
    ]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, teacher_rows: list[TeacherRow]) -> Path:
    """A data folder with filtered rows and a LoRA adapter that changes what the tiny student computes."""
    import torch
    from peft import LoraConfig, get_peft_model

    from finqa.models import students

    data = tmp_path_factory.mktemp("crosscoder-data")
    write_teacher_rows(Folders(data=data).filtered("FinQA-mini", "test"), teacher_rows)
    torch.manual_seed(1)
    base = students.load_base(str(tiny_student), torch.float32, "cpu")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, settings)
    run = students.StudentRun("FinQA-mini", str(tiny_student), students.settings_for(str(tiny_student)))
    folder = Folders(data=data).model("FinQA-mini", run.model_id)
    adapted.save_pretrained(str(folder))
    students.load_tokenizer(str(tiny_student)).save_pretrained(folder)
    return data
