"""Errors, paths, data sets and manifests: what every script relies on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.models.weights import weights_hash
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import Journal
from finqa.runtime.manifest import write_json, write_manifest
from finqa.runtime.paths import REPOSITORY, Folders, json_line, write_atomically
from finqa.task.datasets import dataset, load_finqa


def test_a_user_error_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        raise UserError("the file is missing")

    assert report_errors(main) == 1
    assert capsys.readouterr().err == "error: the file is missing\n"


def test_any_other_exception_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        report_errors(main)


def write_manifest_of(path: Path, value: dict) -> None:
    write_manifest(path, {}, **value)


def append_to_journal(path: Path, value: dict) -> None:
    with Journal(path) as journal:
        journal.append(value)


@pytest.mark.parametrize("write", [write_json, write_manifest_of, append_to_journal])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_has_null_where_there_is_no_number(tmp_path: Path, write, number):
    path = tmp_path / "a.json"
    write(path, {"a": number, "nested": [1.5, (number, "NaN")], "at": tmp_path})
    text = path.read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["a"] is None and found["nested"] == [1.5, [None, "NaN"]] and found["at"] == str(tmp_path)


def test_shipped_data_is_found_from_any_data_folder(tmp_path: Path):
    folders = Folders(data=tmp_path)
    assert folders.raw("FinQA-mini", "test") == REPOSITORY / "data" / "FinQA-mini" / "test.json"
    own = tmp_path / "FinQA-mini" / "test.json"
    write_atomically(own, "[]")
    assert folders.raw("FinQA-mini", "test") == own


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="unknown dataset 'FinQB'; one of FinQA, FinQA-mini"):
        dataset("FinQB")


def test_broken_json_is_refused_with_its_place(tmp_path: Path):
    path = tmp_path / "train.json"
    path.write_text('[{"id": "a",\n}]')
    with pytest.raises(UserError, match=r"broken JSON .*line 2 column 1"):
        load_finqa(path)


def test_a_missing_raw_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.json is missing"):
        load_finqa(tmp_path / "train.json")


def test_unusable_rows_are_dropped_with_their_reason(tmp_path: Path):
    path = tmp_path / "train.json"
    good = {"question": "why?", "program": "add(1, 2)", "exe_ans": 3.0, "answer": ""}
    rows = [
        {"id": "good", "pre_text": ["a ."], "post_text": [], "table": [["x", 1]], "qa": good},
        {"id": "no question", "qa": good | {"question": " "}},
        {"id": "no answer", "qa": good | {"exe_ans": ""}},
        {"id": "label only", "qa": good | {"exe_ans": None, "answer": "3"}},
        {"id": "no qa"},
        "text",
        {"id": "zero", "qa": good | {"exe_ans": 0}},
    ]
    path.write_text(json.dumps(rows))
    split = load_finqa(path)
    assert [(q.id, q.answer) for q in split.questions] == [("good", "3.0"), ("label only", "3"), ("zero", "0")]
    assert [(row.id, row.reason) for row in split.dropped] == [
        ("no question", "no question"),
        ("no answer", "no answer"),
        ("no qa", "not in FinQA's schema"),
        ("row 5", "not in FinQA's schema"),
    ]


def test_a_manifest_says_what_made_the_result(tmp_path: Path):
    write_manifest(tmp_path / "run.json", {"folder": tmp_path}, seed=3)
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["versions"]["transformers"]
    assert set(manifest) >= {"git", "device", "command", "python"}


CACHED = "/home/me/.cache/huggingface/hub/models--big--base-1/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Path("/home/me/data"), "data"),
        ("/home/me/my models/tuned/", "tuned"),
        ("--data-dir=/home/me/data", "--data-dir=data"),
        ({"of": ("/home/me/a", ["/home/me/b"])}, {"of": ["a", ["b"]]}),
        (CACHED, "big/base-1"),
        (REPOSITORY / "data" / "models", "data/models"),
        *((same, same) for same in ("big/base", "models/tuned", "/", "/no", "{% if x %}\n/a/b", 3, None)),
    ],
)
def test_a_manifest_names_no_folder_of_the_machine(value: object, written: object, tmp_path: Path):
    write_manifest(tmp_path / "run.json", {"given": value})
    assert json.loads((tmp_path / "run.json").read_text())["config"]["given"] == written


def test_the_hash_of_a_folder_follows_its_weights(tmp_path: Path):
    with pytest.raises(UserError, match="holds no safetensors weights"):
        weights_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = weights_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_hash(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert weights_hash(tmp_path) != first


SCRIPTS = [
    ["main.py"],
    ["inference.py"],
    ["-m", "preprocessing.download_finqa"],
    ["-m", "preprocessing.preprocess_finqa"],
    ["-m", "preprocessing.process_finqa_code_generation"],
    ["-m", "preprocessing.filter_valid_answers"],
    ["crosscoder-model-diff/merge_and_push_lora.py"],
    ["crosscoder-model-diff/collect_activations.py"],
    ["crosscoder-model-diff/train.py"],
    ["-m", "mini.make_finqa_mini"],
    ["-m", "mini.pretrain_pocket_mistral"],
    ["-m", "mini.demo"],
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[-1])
def test_help_needs_no_torch(script: list[str]):
    """-X importtime lists every import on stderr, so that one run shows both the help and what it cost."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *script, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage:")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "vllm", "transformers", "pandas", "datasets", "wandb", "openai"}


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "\ud800", "a\r\nb", "収入", '"quoted"'])
def test_a_json_line_is_one_line_that_reads_as_it_was_written(tmp_path: Path, text: str):
    values = [{"reply": text, "number": value, "path": tmp_path} for value in (1.5, float("nan"), float("inf"))]
    write_atomically(tmp_path / "x.jsonl", "".join(map(json_line, values)))
    lines = (tmp_path / "x.jsonl").read_text(encoding="ascii").splitlines()
    read = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert read == [{"reply": text, "number": number, "path": str(tmp_path)} for number in (1.5, None, None)]
