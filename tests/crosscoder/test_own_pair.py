"""Two models of the user's own on texts of their own: what is recorded, what is refused, and every later script."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import started
import torch
from made_up_qwen import tiny_qwen
from transformers import AutoTokenizer

from crosscoder.activations.layout import KINDS
from crosscoder.activations.own_texts import documents_from_texts, read_texts
from crosscoder.activations.store import ActivationStore
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY

FOLDER = REPOSITORY / "crosscoder-model-diff"
WORDS = ("net", "sales", "rose", "in", "2009", ",", "and", "the", "page", "said", "so", ":", "costs", "fell", "by")


def run(script: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("-m", "crosscoder.dashboard") if script == "dashboard" else (script,)
    return started.run([*command, *words], FOLDER, os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(12 + i % 9))


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": sentence(i)} for i in range(30)],
    "prompt": [{"prompt": sentence(i), "completion": f" {sentence(i + 3)}"} for i in range(30)],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": sentence(i)},
                {"role": "assistant", "content": sentence(i + 5)},
            ]
        }
        for i in range(30)
    ],
}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def models(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model `base`, the whole model `tuned`, and the adapter `adapter` of the base."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_student, folder / "base")
    shutil.copytree(tiny_student, folder / "tuned")
    torch.manual_seed(3)
    model: Any = students.load_base(str(tiny_student), torch.float32, "cpu")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(folder / "adapter"))
    merged: Any = adapted.merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder / "tuned")
    return folder


def pair(models: Path, fine_tuned: str, text: Path, data: Path) -> tuple[str | Path, ...]:
    return ("--base", models / "base", "--fine-tuned", models / fine_tuned, "--text", text, "--data-dir", data)


def tokenizer(models: Path) -> Any:
    return AutoTokenizer.from_pretrained(models / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "fine_tuned", "kinds"),
    [
        ("text", "tuned", {"all"}),
        ("prompt", "adapter", {"all", "prompt", "completion"}),
        ("messages", "adapter", {"all", "template", "chat", "prompt", "completion"}),
    ],
)
def test_every_script_takes_the_pairs_name(form: str, fine_tuned: str, kinds: set[str], models: Path, tmp_path: Path):
    data, results = tmp_path / "data", tmp_path / "results"
    file = write_rows(tmp_path / "texts.jsonl", ROWS[form])
    output = run("collect_activations.py", *pair(models, fine_tuned, file, data), "--name", "mine", "--layer", "2")
    assert output.returncode == 0, output.stderr
    assert "next: python train.py mine-layer2-mlp-1024" in output.stdout
    places = ("--data-dir", data, "--results-dir", results)
    small = ("--latents", "64", "--k", "4", "--epochs", "3")
    by_name = [("train.py", "mine", *small), ("analyse.py", "mine", "--causal", "2")]
    for words in (*by_name, ("dashboard", "mine-layer2-mlp-1024")):
        output = run(words[0], *words[1:], *places)
        assert output.returncode == 0, output.stderr
    folder = results / "mine-layer2-mlp-1024_batchtopk"
    numbers = json.loads((folder / "analysis.json").read_text())
    assert {row["kind"] for row in numbers["explained_variance_by_kind"]} == kinds
    assert (folder / "explained_variance_by_kind.png").exists() == (len(kinds) > 1)
    latents = (folder / "latents.csv").read_text().splitlines()
    known = dict(zip(latents[0].split(","), latents[1].split(","), strict=False))
    assert bool(known["completion_share"]) == (form != "text")
    assert bool(known["template_share"]) == (form == "messages")
    assert any("«" in line for line in latents)
    packed = re.search(r'<script[^>]*id="data"[^>]*>([^<]+)<', (folder / "dashboard.html").read_text())
    page = gzip.decompress(base64.b64decode(packed[1] if packed else "")).decode()
    assert '"line 1' in page and ("in completions" in page) == (form != "text")
    rows = [line.split(",") for line in (folder / "causal.csv").read_text().splitlines()]
    untouched = dict(zip(rows[0], rows[1], strict=True))
    assert untouched["measure"] == "divergence" and float(untouched["none"]) > 0


@pytest.mark.slow
def test_an_adapter_and_the_model_it_makes_are_recorded_alike(models: Path, tmp_path: Path):
    file = write_rows(tmp_path / "texts.jsonl", ROWS["prompt"])
    for name in ("adapter", "tuned"):
        words = (*pair(models, name, file, tmp_path), "--layer", "2", "--num-samples", "5")
        output = run("collect_activations.py", *words)
        assert output.returncode == 0, output.stderr
        assert "holds 30 documents, the first 5 are taken; more with --num-samples" in output.stdout
    one, two = (
        ActivationStore(tmp_path / "activations" / f"{name}-texts-layer2-mlp-5") for name in ("adapter", "tuned")
    )
    own, other = (store.read(torch.arange(len(store))).float() for store in (one, two))
    assert torch.equal(one.token_id, two.token_id) and torch.equal(own[:, 0], other[:, 0])
    assert (own[:, 1] - other[:, 1]).norm() < 0.02 * (own[:, 1] - own[:, 0]).norm() + 0.01 * own[:, 1].norm()


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_sets_of_several_layers_are_told_apart(models: Path, tmp_path: Path):
    file = write_rows(tmp_path / "texts.jsonl", 10 * ROWS["text"])  # so that it is killed before it has ended
    words = (*pair(models, "adapter", file, tmp_path), "--name", "mine", "--layer", "1", "2", "--shard-tokens", "40")
    command = [sys.executable, "collect_activations.py", *map(str, words), "--batch-tokens", "40"]
    with subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((tmp_path / "activations").glob(".*/shard-*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    output = run("collect_activations.py", *words, "--batch-tokens", "40")
    assert output.returncode == 0 and "going on: " in output.stdout, output.stderr
    assert {path.name for path in (tmp_path / "activations").iterdir()} == {f"mine-layer{i}-mlp-1024" for i in (1, 2)}
    output = run("train.py", "mine", "--data-dir", tmp_path)
    assert output.returncode == 1
    assert "2 sets of mine are meant; give the whole name of one: mine-layer1-mlp-1024, mine-layer2" in output.stderr
    small = ("--latents", "32", "--k", "2", "--epochs", "1")
    places = ("--data-dir", tmp_path, "--results-dir", tmp_path / "results")
    output = run("train.py", "mine", "--layer", "2", *small, *places)
    assert output.returncode == 0 and "mine-layer2-mlp-1024_batchtopk" in output.stdout, output.stderr


def parts(models: Path, file: Path) -> list[list[tuple[str, str]]]:
    """Every document as stretches of one kind of token, with their text."""
    reads = tokenizer(models)
    return [
        [
            (KINDS[kind], reads.decode([i for _, i in run]))
            for kind, run in groupby(zip(document.kinds, document.ids, strict=True), key=lambda pair: pair[0])
        ]
        for document in documents_from_texts(read_texts(file), reads)
    ]


def test_the_parts_of_a_chat_are_told_apart_also_where_its_words_are_the_templates(tmp_path: Path):
    folder = tiny_qwen(tmp_path / "base", tied=True, corpus=[sentence(i) for i in range(40)])
    chats = [
        [("user", "You"), ("assistant", "naïve 日本"), ("user", " more "), ("assistant", "a")],
        [("system", "user"), ("user", "assistant")],
    ]
    rows = [
        {"messages": [{"role": role, "content": said} for role, said in chat], "id": i} for i, chat in enumerate(chats)
    ]
    file = write_rows(tmp_path / "chats.jsonl", rows)
    documents = documents_from_texts(read_texts(file), AutoTokenizer.from_pretrained(folder))
    said = [[part for part in document if part[0] != "chat"] for document in parts(tmp_path, file)]
    assert said[0] == [("prompt", "You"), ("prompt", "naïve 日本"), ("prompt", " more "), ("completion", "a")]
    assert said[1] == [("prompt", "user"), ("prompt", "assistant")]
    assert documents[1].n_prompt == 1 and KINDS[documents[0].kinds[documents[0].n_prompt]] == "completion"


def test_plain_text_and_lines_without_a_chat_have_the_tokenizers_own_ids(models: Path, tmp_path: Path):
    plain = tmp_path / "plain.txt"
    plain.write_text("one line\nand another\n\n \n\n  a second paragraph \n")
    texts = read_texts(plain)
    assert [(text.text, text.id) for text in texts] == [
        ("one line\nand another", "line 1"),
        ("a second paragraph", "line 6"),
    ]
    reads = tokenizer(models)
    assert documents_from_texts(texts, reads)[0].ids == tuple(reads("one line\nand another")["input_ids"])
    [one, _] = documents_from_texts(read_texts(write_rows(tmp_path / "p.jsonl", ROWS["prompt"][:2])), reads)
    asked = reads(ROWS["prompt"][0]["prompt"])["input_ids"]
    assert one.ids[: one.n_prompt] == tuple(asked)
    assert reads.decode(one.ids[one.n_prompt :]) == ROWS["prompt"][0]["completion"]


WRONG = {
    '{"text": "a b"}\nnet sales\n': "line 2 is not JSON; each line is an object",
    '{"text": "a b"}\n["a"]\n': "line 2 has none of messages, prompt and completion, text; a line has one of them",
    '{"text": "a b"}\n{"prompt": "a"}\n': "line 2 has none of",
    '{"text": "a", "messages": []}\n': "line 1 has messages and text; a line has one of them",
    '{"text": "a b"}\n\n{"text": "  "}\n': "line 3: text must be text that is not empty",
    '{"text": "a b"}\n{"prompt": 3, "completion": "a"}\n': "line 2: prompt must be text that is not empty, not 3",
    '{"messages": [{"role": "user"}]}\n': 'line 1: messages is a list of {"role"',
    '{"text": "a", "id": 7}\n{"text": "b", "id": 7}\n': "line 2 has the id '7' of line 1; change one, or give no ids",
    '{"text": "a b"}\n': "holds 1 documents, and at least 2 are needed: one JSON object a line",
    "one paragraph\nof two lines\n": "holds 1 documents, and at least 2 are needed: blank lines between documents",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_wrong_line_is_named_with_the_remedy(content: str, tmp_path: Path):
    file = tmp_path / ("t.jsonl" if content.startswith("{") else "t.txt")
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_texts(file)
    assert WRONG[content] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--fine-tuned", "b", "--text", "t"),
            "two models of your own are given by --base, --fine-tuned, --text; add --base",
        ),
        (("--base", "a", "--text", "t"), "add --fine-tuned"),
        (("--base", "a", "--fine-tuned", "b", "--text", "t", "--max-tokens", "1"), "--max-tokens must be at least 2"),
        (("--base", "a", "--fine-tuned", "b", "--text", "t", "--name", "FinQA"), "--name FinQA is that of a data set"),
        (("FinQA", "--base", "a", "--fine-tuned", "b", "--text", "t"), "need no data set; leave out DATASET_NAME"),
        (
            ("--base", "a", "--fine-tuned", "b", "--text", "t", "--merged", "-GA", "2"),
            "leave out --grad-accum, --merged",
        ),
        (("--base", "a", "--fine-tuned", "b", "--text", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
    ],
)
def test_flags_that_make_no_pair_are_refused_in_one_line(words: tuple[str, ...], said: str, tmp_path: Path):
    output = run("collect_activations.py", *words, "--data-dir", tmp_path)
    assert output.returncode == 1 and said in output.stderr.strip().splitlines()[-1], output.stderr


def changed_tokenizer(models: Path, folder: Path, change: str) -> Path:
    """The fine-tuned model with a tokenizer that is not its base model's."""
    shutil.copytree(models / "tuned", folder)
    reads = tokenizer(models)
    if change == "added":
        reads.add_tokens(["<tool>"])
    elif change == "template":
        reads.chat_template = reads.chat_template + " "
    elif change == "end token":
        reads.eos_token = "<pad>"
    reads.save_pretrained(folder)
    if change == "moved":
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text())
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(state))
    elif change == "merges":
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text())
        state["model"]["merges"] = []
        path.write_text(json.dumps(state))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "form", "said"),
    [
        ("added", "text", r"differ (340 tokens and 341; 1 in the second alone, such as '<tool>')"),
        ("moved", "text", r"differ (2 of other ids, such as 'a': "),
        ("merges", "text", "document line 1: the tokenizers of the two models give different ids, so"),
        ("template", "messages", "differ; give one: --chat-template FILE"),
        ("template", "text", ""),
        ("end token", "text", ""),
    ],
)
def test_tokenizers_that_differ_are_refused_by_what_differs(
    change: str, form: str, said: str, models: Path, tmp_path: Path
):
    other = changed_tokenizer(models, tmp_path / "other", change)
    file = write_rows(tmp_path / "texts.jsonl", ROWS[form])
    words = ("--base", models / "base", "--fine-tuned", other, "--text", file, "--data-dir", tmp_path, "--layer", "2")
    output = run("collect_activations.py", *words)
    if not said:
        assert output.returncode == 0, output.stderr
        assert ("these texts need none" in output.stdout) == (change == "template")
        return
    assert output.returncode == 1
    n = len(tokenizer(models))
    assert said.replace("340", f"{n}").replace("341", f"{n + 1}") in output.stderr.strip().splitlines()[-1], (
        output.stderr
    )
    if change == "template":
        given = tmp_path / "chat.jinja"
        given.write_text(tokenizer(models).chat_template)
        output = run("collect_activations.py", *words, "--chat-template", given)
        assert output.returncode == 0, output.stderr


def test_models_of_two_shapes_are_refused(models: Path, tmp_path: Path):
    config = json.loads((models / "tuned" / "config.json").read_text())
    shutil.copytree(models / "tuned", other := tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    file = write_rows(tmp_path / "texts.jsonl", ROWS["text"])
    output = run("collect_activations.py", "--base", models / "base", "--fine-tuned", other, "--text", file)
    assert output.returncode == 1
    assert "has 5 layers of width 64, and its base 2 of width 64; give two models of one shape" in output.stderr


def test_a_name_that_is_no_set_is_an_unknown_data_set(tmp_path: Path):
    output = run("train.py", "mine", "--data-dir", tmp_path)
    assert output.returncode == 1
    assert "unknown dataset 'mine'" in output.stderr
