from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finqa.models.weights import weights_hash
from finqa.runtime.errors import report_errors
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.sandbox.results import Run
from finqa.task.evidence import evidence
from finqa.task.records import Question, write_questions


@pytest.fixture(scope="module")
def folders(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A clean test split of one row, and a random adapter where main.py would have left its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    from finqa.models.students import load_base

    folders = Folders(data=tmp_path_factory.mktemp("data"))
    question = Question("page-7", "sales were 12 .", "", [["", "2009"], ["sales", "12"]], "how much ?", "12")
    write_questions(folders.clean("FinQA-mini", "test"), [question])
    folder = folders.model("FinQA-mini", "tiny-student-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1")
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(load_base(str(tiny_student), torch.float32), lora).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"base_hash": weights_hash(tiny_student)}))
    return folders


@pytest.fixture
def ask(
    folders: Folders, tiny_student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """inference.py in this process; gives exit code, stdout, stderr."""
    script = runpy.run_path(str(REPOSITORY / "inference.py"))

    def call(*words: object) -> tuple[int, str, str]:
        names = ["inference.py", "FinQA-mini", str(tiny_student), "--data-dir", str(folders.data)]
        monkeypatch.setattr(sys, "argv", [*names, *map(str, words)])
        code = report_errors(script["main"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_row_is_asked_of_both_models_and_both_programs_are_run(ask: Callable[..., tuple[int, str, str]]):
    code, out, err = ask("--id", "page-7", "--max-new-tokens", 12)
    assert code == 0, err
    assert "question: how much ?" in out and "answer in the data set: 12" in out
    assert out.index("base model (zero-shot)") < out.index("fine-tuned model (fine-tuned)")
    assert out.count("\n--> ") == 2


def test_the_numbers_of_a_program_are_shown_with_their_place_on_the_page(capsys: pytest.CaptureFixture):
    script = runpy.run_path(str(REPOSITORY / "inference.py"))
    page = Question("", "rent was 7 .", "", [["", *map(str, range(2000, 2005))], ["sales", *["12"] * 5]], "what ?", "")
    code = "sales = 12\nrent = 7\nans = sales - rent * 31"
    script["show"]("some model", code, Run(-205.0, None, ""), evidence(code, page))
    assert capsys.readouterr().out.split("\n")[5:] == [
        "--> -205.0",
        "    sales 12: table: sales, 2000; table: sales, 2001; table: sales, 2002; and 2 more",
        "    rent 7: text: rent was 7 .",
        "    number 31: not on the page",
        "",
    ]


def test_lines_that_steering_changed_are_marked_beside_those_without():
    script = runpy.run_path(str(REPOSITORY / "inference.py"))
    before = "a = 1\nb = 2\nc = a\nans = a - b"
    after = "a = 1\nb = 3\nb = b + 1\nans = a - b\nans = ans / b"
    assert script["side_by_side"](before, after).split("\n") == [
        "  a = 1       | a = 1",
        "! b = 2       | b = 3",
        "! c = a       | b = b + 1",
        "  ans = a - b | ans = a - b",
        "+             | ans = ans / b",
    ]
    assert script["side_by_side"]("a = 1\nans = a", "ans = a").split("\n") == ["- a = 1   |", "  ans = a | ans = a"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_question_of_ones_own_is_asked_about_a_page_in_a_file(
    ask: Callable[..., tuple[int, str, str]], tmp_path: Path, form: str
):
    page = tmp_path / ("page.json" if form == "json" else "page.txt")
    content = {"pre_text": ["sales rose ."], "post_text": [], "table": [["", "2009"], ["sales", "12"]]}
    page.write_text(json.dumps(content) if form == "json" else "sales rose .\n|2009\nsales|12\n")
    code, out, err = ask("--question", "what ?", "--passage-file", page, "--max-new-tokens", 12)
    assert code == 0, err
    assert "question: what ?" in out and "answer in the data set" not in out


@pytest.mark.parametrize("content", ["sales rose .", '{"pre_text": "sales rose .", "table": null}'])
def test_a_page_may_begin_with_a_byte_order_mark_and_have_its_text_as_one_string(tmp_path: Path, content: str):
    page = runpy.run_path(str(REPOSITORY / "inference.py"))["page"]
    file = tmp_path / ("page.json" if "{" in content else "page.txt")
    file.write_text(content, encoding="utf-8-sig")
    assert (page(file, "what ?").pre_text, page(file, "what ?").table) == ("sales rose .", [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--id", "page-8"], "no row 'page-8' in the test split of FinQA-mini"),
        (["--question", "what ?"], "--question and --passage-file go together"),
        (["--question", "what ?", "--passage-file", "/nowhere.txt"], "/nowhere.txt is missing"),
        (["--question", "what ?", "--passage-file", "latin-1.txt"], "latin-1.txt is not UTF-8 text"),
        (["--run-name", "other"], "main.py FinQA-mini"),
        (["--from", "base"], "--from says whose vectors --steer and --ablate use; give one of these, too"),
        (["--steer", "3=1", "--steer", "4=1,3=2"], "--steer names a latent twice; give each latent one factor"),
        (["--steer", "3=1"], "no crosscoder in "),
    ],
)
def test_wrong_input_is_one_clear_line(
    ask: Callable[..., tuple[int, str, str]],
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("latin-1.txt").write_bytes(b"caf\xe9")
    code, _, err = ask(*words)
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert says in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steer", "3"], "'3' is not LATENT=FACTOR, such as 81=2"),
        (["--steer", "3=1,4=much"], "'4=much' is not LATENT=FACTOR"),
        (["--ablate", "three"], "'three' is not numbers of latents, such as 81 or 81,204"),
        (["--steer", "3=1", "--from", "instruct"], "invalid choice: 'instruct'"),
    ],
)
def test_a_steering_flag_that_cannot_be_read_is_one_line(
    ask: Callable[..., tuple[int, str, str]], words: list[str], says: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        ask(*words)
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1
