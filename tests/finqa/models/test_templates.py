"""A model without a chat template takes one from a file; what is trained with it brings it along."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_parts import SETTINGS, folders_with_rows

from crosscoder.activations.recorded_inputs import tokenize
from crosscoder.names import ActivationChoice
from finqa.evaluation.evaluate import EvaluationConfig, _tasks
from finqa.evaluation.generation import GenerationConfig
from finqa.models.students import StudentRun, find_adapter, load_tokenizer, prompt_ids, tokenizer_of
from finqa.models.templates import TEMPLATE_DATE, read_template, template_facts
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.records import read_teacher_rows
from finqa.training.fine_tuning import TrainingConfig, fine_tune

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}reply:"
ASKED = [{"role": "user", "content": "how much ?"}]


@pytest.fixture
def bare(tiny_student: Path, tmp_path: Path) -> Path:
    """The tiny student without its chat template."""
    folder = Path(shutil.copytree(tiny_student, tmp_path / "bare"))
    (folder / "chat_template.jinja").unlink()
    return folder


def with_template(bare: Path, template: str | None) -> StudentRun:
    settings = {**vars(SETTINGS), "chat_template": template, "num_epochs": 1}
    return StudentRun("FinQA-mini", str(bare), type(SETTINGS)(**settings))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for message in messages %}", "does not work"),
        ("{{ messages[0]['content'] | nonsense }}", "does not work"),
        ("hello", "leaves out what the user says"),
        ("", "does not work|leaves out what the user says"),
    ],
)
def test_a_template_that_does_not_work_is_one_line(bare: Path, text: str, said: str):
    with pytest.raises(UserError, match=said):
        load_tokenizer(str(bare), template=text)


def test_a_file_that_is_no_template_and_a_model_with_one_are_one_line(tiny_student: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        read_template(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="latin cannot be read"):
        read_template(tmp_path / "latin")
    with pytest.raises(UserError, match="has a chat template of its own; leave out --chat-template"):
        load_tokenizer(str(tiny_student), template=TEMPLATE)


def test_the_date_is_recorded_where_a_template_asks_for_it(bare: Path):
    plain: Any = load_tokenizer(str(bare), template=TEMPLATE)
    dated: Any = load_tokenizer(str(bare), template="{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    assert "template_date" not in template_facts(plain)
    assert template_facts(dated)["template_date"] == TEMPLATE_DATE.isoformat()
    assert "26 Jul 2024 user: how much ?" in dated.decode(prompt_ids(dated, ASKED))


@pytest.mark.slow
def test_what_is_trained_with_a_template_brings_it_along_to_every_stage(bare: Path, tmp_path: Path):
    folders, dated = folders_with_rows(tmp_path, n_rows=8), "{{ strftime_now('%Y') }} " + TEMPLATE
    for split in ("dev", "test"):
        shutil.copy(folders.filtered("FinQA-mini", "train"), folders.filtered("FinQA-mini", split))
    folder = fine_tune(with_template(bare, dated), TrainingConfig(), folders)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["student"]["settings"]["chat_template"] == dated
    assert manifest["template_date"] == "2024-07-26"
    later = with_template(bare, None)  # --chat-template is not given again
    expected = prompt_ids(load_tokenizer(str(bare), template=dated), ASKED)
    assert find_adapter(later, folders) == folder
    assert prompt_ids(tokenizer_of(later, folder), ASKED) == expected
    assert same_prompts(later, folders, dated, bare)
    with pytest.raises(UserError, match="was trained with another chat template"):
        tokenizer_of(with_template(bare, TEMPLATE), folder)


def same_prompts(later: StudentRun, folders: Folders, template: str, bare: Path) -> bool:
    """Whether evaluation (of the base, too) and recording start from the ids that training starts from."""
    tokenizer = load_tokenizer(str(bare), template=template)
    rows = read_teacher_rows(folders.filtered("FinQA-mini", "test"))
    wanted = [prompt_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in rows]
    generation = GenerationConfig(vllm=False, max_new_tokens=8, batch_size=4)
    config = EvaluationConfig(("test",), ("fine-tuned", "zero-shot"), generation, instruction="")
    tuned, zero_shot = _tasks(later, config, folders, find_adapter(later, folders))
    documents, _ = tokenize(rows, ActivationChoice(later, split="test"), find_adapter(later, folders))
    recorded = [list(document.ids[: document.n_prompt]) for document in documents]
    assert tuned.template["template_date"] == "2024-07-26"
    return tuned.prompt_tokens == zero_shot.prompt_tokens == recorded == wanted


def test_a_tokenizer_is_loaded_without_compiling_grammars(tiny_student: Path):
    code = (
        "import sys; from finqa.models.students import load_tokenizer; "
        "print(load_tokenizer(sys.argv[1]).eos_token, 'lark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_student], capture_output=True, text=True, check=True)
    assert done.stdout == "</s> False\n"
