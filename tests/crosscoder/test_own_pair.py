"""Two models of the user's own on texts of their own: what is recorded, what is refused, and every later script."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import started
import torch
import yaml
from hub_contents import Account
from hub_server import hub_server
from made_up_qwen import tiny_qwen
from transformers import AutoTokenizer

from crosscoder.activations.layout import KINDS
from crosscoder.activations.own_texts import documents_from_texts, read_texts
from crosscoder.activations.store import ActivationStore
from crosscoder.own_pair import OwnPair, portable, recorded_pairs
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders

FOLDER = REPOSITORY / "crosscoder-model-diff"
INFERENCE = str(REPOSITORY / "inference.py")
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

    alive = next(row["latent"] for row in csv.DictReader(latents) if float(row["frequency"]))
    ask = (INFERENCE, "mine", "--data-dir", data, "--max-new-tokens", "8")
    same = run(*ask, "--steer", f"{alive}=0")
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("(the same text)") == 2 and f"latent {alive}: mean value " in same.stdout
    begin = {"text": 5, "prompt": 12, "messages": 12}[form]  # half of a text that has no completion
    assert " ".join(sentence(0).split()[:begin]) in same.stdout.partition("\n===")[0].replace("\n", " ")
    other = run(*ask, "--question", "net sales", "--steer", f"{alive}=3000", "--ablate", alive, "--from", "fine-tuned")
    assert other.returncode == 0, other.stderr
    assert "net sales" in other.stdout.partition("\n===")[0]
    title = f"=== base model: without | with latents {alive}=3000, {alive} ablated, from the fine-tuned model\n"
    assert title in other.stdout and "(the same text)" not in other.stdout
    for words, says in (form == "text") * (
        (("--id", "line 31"), "no document 'line 31' in "),
        (("--id", "line 1", "--question", "net"), "give one of them"),
        (("--passage-file", "page.txt", "--VLLM"), "by --question or --id; leave out --passage-file, --vllm"),
        (("--steer", "64=1"), "there is no latent 64; give one of this dictionary's, 0 to 63"),
    ):
        output = run(*ask, *words)
        assert output.returncode == 1 and says in output.stderr.strip().splitlines()[-1], output.stderr


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
    command = ["collect_activations.py", *words, "--batch-tokens", "40"]
    # Of the first shards one may be half written, or of one layer alone.
    started.killed_when(lambda: len(list((tmp_path / "activations").glob(".*/shard-*"))) >= 6, command, FOLDER)
    output = run(*command)
    assert output.returncode == 0 and "going on: " in output.stdout, output.stderr
    assert {path.name for path in (tmp_path / "activations").iterdir()} == {f"mine-layer{i}-mlp-1024" for i in (1, 2)}
    output = run("train.py", "mine", "--data-dir", tmp_path)
    assert output.returncode == 1
    assert "2 sets of mine are meant; give the whole name of one: mine-layer1-mlp-1024, mine-layer2" in output.stderr
    small = ("--latents", "32", "--k", "2", "--epochs", "1")
    places = ("--data-dir", tmp_path, "--results-dir", tmp_path / "results")
    output = run("train.py", "mine", "--layer", "2", *small, *places)
    assert output.returncode == 0 and "mine-layer2-mlp-1024_batchtopk" in output.stdout, output.stderr


@pytest.mark.slow
def test_a_set_names_no_folder_and_its_models_are_found_where_they_are_or_where_they_are_put(
    models: Path, tmp_path: Path
):
    shutil.copytree(models, own := tmp_path / "own")
    template = tmp_path / "own.jinja"
    template.write_text(tokenizer(models).chat_template + "{# another #}")
    file, data = write_rows(tmp_path / "texts.jsonl", ROWS["messages"]), tmp_path / "data"
    collect = ("--name", "mine", "--layer", "2", "--chat-template", template)
    output = run("collect_activations.py", *pair(own, "adapter", file, data), *collect)
    assert output.returncode == 0, output.stderr
    folder = data / "activations" / "mine-layer2-mlp-1024"
    places = ("--data-dir", data, "--results-dir", tmp_path / "results")
    output = run("train.py", "mine", "--latents", "32", "--k", "2", "--epochs", "1", *places)
    assert output.returncode == 0, output.stderr
    pushed = [path for of in (folder, data / "models") for path in of.rglob("[!.]*") if path.is_file()]
    pushed += (tmp_path / "results").rglob("*.json")
    for path in pushed:
        assert str(tmp_path).encode() not in path.read_bytes(), path
    config = json.loads((folder / "config.json").read_text())
    recorded = config["recorded"]
    named = {"base": "base", "fine_tuned": "adapter", "text": "texts.jsonl", "name": "mine", "max_tokens": None}
    assert recorded["pair"]["models"] == named and recorded["model"] == "base"
    assert recorded["pair"]["student"]["chat_template"] == "own.jinja"
    assert recorded["pair"]["text_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command[2:6] == ["--base", "base", "--fine-tuned", "adapter"]

    analyse = ("analyse.py", "mine", "--no-dashboard", "--splice", *places)
    ask = (INFERENCE, "mine", "--data-dir", data, "--max-new-tokens", "4", "--question", "net sales")
    template.rename(data / "models" / "another.jinja")
    output = run(*ask)
    assert output.returncode == 1
    assert f"by another chat template; put own.jinja into {data / 'models'}, or ask" in output.stderr
    (data / "models" / "another.jinja").rename(data / "models" / "own.jinja")
    output = run(*ask)
    assert output.returncode == 0 and output.stdout.count("\n=== ") == 2, output.stderr
    (own / "adapter").rename(tmp_path / "adapter")
    for words in (analyse, ask):
        output = run(*words)
        assert output.returncode == 1 and f"nor in {data / 'models' / 'adapter'}; put the folder" in output.stderr
    (tmp_path / "adapter").rename(own / "adapter")
    own.rename(moved := tmp_path / "moved")
    output = run(*analyse)
    assert output.returncode == 1
    assert f"nor in {data / 'models' / 'base'}; put the folder, or a link to it, there" in output.stderr
    (data / "models" / "base").symlink_to(models / "tuned")
    output = run(*analyse)
    assert output.returncode == 1 and "tuned has changed since the activations were recorded" in output.stderr
    (data / "models" / "base").unlink()
    for name in ("base", "adapter"):
        (data / "models" / name).symlink_to(moved / name)
    output = run(*analyse)
    assert output.returncode == 0, output.stderr
    (data / "models" / "own.jinja").rename(template)
    output = run("collect_activations.py", *pair(moved, "adapter", file, data), *collect)
    assert "is complete and was made from these inputs" in output.stdout, output.stderr
    assert json.loads((folder / ".places.json").read_text())["base"] == str(moved / "base")


@pytest.mark.slow
def test_a_pushed_set_is_a_data_set_that_another_machine_works_with(models: Path, tmp_path: Path):
    with hub_server(tmp_path / "hub") as hub:
        hub.accounts = {"hf_thewriterstoken": Account("writer")}
        for name in ("base", "adapter"):
            hub.create(f"writer/{name}")
            hub.put_folder(f"writer/{name}", models / name)
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_thewriterstoken", "HF_NAME": "writer", "NO_PROXY": "*"}
        online |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        file = write_rows(tmp_path / "texts.jsonl", ROWS["prompt"])
        own = (
            "--base",
            "writer/base",
            "--fine-tuned",
            "writer/adapter",
            "--text",
            file,
            "--data-dir",
            tmp_path / "one",
        )
        words = (*own, "--name", "mine", "--layer", "2", "--push", "--private")
        output = run("collect_activations.py", *words, **online)
        assert output.returncode == 0, output.stderr
        pushed = "datasets/writer/mine-layer2-mlp-1024"
        assert f"to {hub.url}/{pushed}" in output.stdout
        repository = hub.repositories[pushed]
        assert repository.private and ".places.json" not in repository.files
        for name in repository.files:
            assert str(tmp_path).encode() not in hub.read(pushed, name), name
        card = yaml.safe_load(hub.read(pushed, "README.md").split(b"---\n")[1])
        assert card["base_model"] == ["writer/base", "writer/adapter"] and card["viewer"] is False

        places = ("--data-dir", tmp_path / "two", "--results-dir", tmp_path / "results")
        shutil.rmtree(tmp_path / "home")  # another machine has downloaded nothing
        small = ("--latents", "32", "--k", "2", "--epochs", "1")
        for words in (("train.py", "mine-layer2-mlp-1024", *small), ("analyse.py", "mine-layer2-mlp-1024", "--splice")):
            output = run(words[0], *words[1:], *places, **online)
            assert output.returncode == 0, output.stderr
        assert (tmp_path / "results" / "mine-layer2-mlp-1024_batchtopk" / "splicing.csv").exists()
        output = run("train.py", "mine-layer3-mlp-1024", *places, **online)
        assert output.returncode == 1 and "unknown dataset 'mine-layer3-mlp-1024'" in output.stderr


CACHED = "/nowhere/hub/models--big--tuned/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("recorded", "kept", "found"),
    [
        ("adapter", "{here}", "{here}"),
        ("adapter", "/nowhere/adapter", "{here}/models/adapter"),
        ("adapter", None, "{here}/models/adapter"),
        ("adapter", "damaged", "{here}/models/adapter"),
        ("big/tuned", CACHED, "big/tuned"),
        ("pocket-mistral", None, str(students.local_model("pocket-mistral"))),
        # Of a set that has whole paths in its record.
        ("{here}", None, "{here}"),
        ("/nowhere/adapter", None, "{here}/models/adapter"),
        (CACHED, None, "big/tuned"),
    ],
)
def test_a_model_is_where_it_was_read_or_below_the_data_folder_or_on_the_hub(
    recorded: str, kept: str | None, found: str, tmp_path: Path
):
    here = str(tmp_path)
    models = {"base": "big/base", "fine_tuned": recorded.format(here=here), "name": "mine"}
    of_pair = {"models": models, "student": {"chat_template": None}}
    of_pair |= {} if Path(models["fine_tuned"]).is_absolute() else {"local": ["fine_tuned"]}
    (folder := tmp_path / "activations" / "mine-layer2-mlp-9").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"recorded": {"pair": of_pair}}))
    if kept:
        text = "[1" if kept == "damaged" else json.dumps({"fine_tuned": kept.format(here=here)})
        (folder / ".places.json").write_text(text)
    placed = recorded_pairs("mine", Folders(data=tmp_path))["mine-layer2-mlp-9"]["pair"]["models"]
    assert (placed["base"], placed["fine_tuned"]) == ("big/base", found.format(here=here))


def test_two_checkpoints_of_one_step_are_told_apart(tmp_path: Path):
    (file := tmp_path / "t.txt").write_text("a b")
    of = [str(tmp_path / name / "checkpoint-9") for name in ("one", "two")]
    pair = OwnPair(*of, text=file, name="mine")
    recorded, places = portable(pair, pair.student())
    assert [recorded["models"][name] for name in ("base", "fine_tuned")] == ["one-checkpoint-9", "two-checkpoint-9"]
    assert [places[name] for name in ("base", "fine_tuned")] == of


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
        (("--base", "/no/a", "--fine-tuned", "/no/b", "--text", __file__), "the model /no/a is neither a local folder"),
        (
            ("--base", "pocket-mistral", "--fine-tuned", "/no/b", "--text", __file__),
            "the model /no/b is neither a local folder",
        ),
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
