"""python -m crosscoder.label on latents that fire on one sign each, against a server that answers by rule, and vLLM."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from label_server import LabelServer, judged, passages_in, verdicts
from made_up_documents import write_documents
from teacher_server import running
from vllm_server import running_vllm

from crosscoder.activations.collection import Document
from crosscoder.analysis.tables import read_latent_table
from crosscoder.dictionaries.checkpoint import save_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.label.naming import balanced_accuracy, read_label, read_verdicts
from crosscoder.label.passages import Passages, choose_passages, spelt
from crosscoder.names import ActivationChoice, crosscoder_folder
from crosscoder.opening import open_crosscoder
from finqa.models import students
from finqa.runtime.paths import REPOSITORY, Folders

FOLDER = REPOSITORY / "crosscoder-model-diff"
D_MODEL, N_LATENTS = 64, 8
SIGNS = "@%&"
EVERYWHERE, OFTEN, RARE = range(3)
"""Latents: on every page, on two pages of three, and on six pages."""
DOCUMENTS = 60


def text_of(i: int) -> str:
    """The i-th page; each pair of documents has the same one."""
    page = i // 2
    words = [f"w{page}x{n}" for n in range(12)]
    words[5] += " @"
    words[7 + page % 4] += " %" if page % 3 else ""
    words[2] += " &" if page % 5 == 0 else ""
    return " ".join(words * 3)


def dictionary(threshold: float) -> BatchTopKCrosscoder:
    """One whose latents read one coordinate each; the first ones differ most between the models."""
    model = new_dictionary(CrosscoderConfig(D_MODEL, N_LATENTS, 2), generator=torch.Generator().manual_seed(3))
    model.W_enc.data.zero_()
    for latent in range(N_LATENTS):
        model.W_enc.data[:, latent, latent] = 0.5
        model.W_dec.data[latent, 0] *= 0.1 + 0.1 * latent
    model.threshold = threshold
    return model


@dataclass(frozen=True)
class Made:
    """An analysed dictionary, and the command on it."""

    folders: Folders
    words: tuple[str, ...]
    checkpoint: Path
    about: dict[str, object]

    @property
    def results(self) -> Path:
        return self.folders.results / self.checkpoint.name

    def save(self, threshold: float = 0.05) -> None:
        save_dictionary(dictionary(threshold), self.checkpoint, **self.about)

    def analyse(self) -> None:
        assert run_here(FOLDER / "analyse.py", *self.words, "--no-dashboard").returncode == 0

    def label(self, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return run_here("crosscoder.label", *self.line(url, *flags))

    def line(self, url: str, *flags: str) -> list[str]:
        return [*self.words, "--base-url", url, "--latents", "3", "--max-concurrent", "2", *flags]

    def table(self) -> list[dict[str, str]]:
        with (self.results / "latents.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def labels(self) -> dict[int, dict[str, object]]:
        return {row["latent"]: row for row in json.loads((self.results / "labels.json").read_text())["labels"]}


def run_here(script: object, *words: str) -> subprocess.CompletedProcess[str]:
    """A script, or a module, in this process: what it imports is there already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [str(script), *words])
        patch.setenv("OPENAI_API_KEY", "any")
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(str(script), run_name="__main__", alter_sys=True)
    return subprocess.CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Made:
    folder = tmp_path_factory.mktemp("labelled")
    folders = Folders(data=folder / "data", results=folder / "results")
    choice = ActivationChoice(
        students.StudentRun("FinQA-mini", str(tiny_student), students.settings_for(str(tiny_student)))
    )
    tokenizer = students.load_tokenizer(str(tiny_student))
    documents = []
    for i in range(DOCUMENTS):
        prompt = f"###Passage:\n{text_of(i)}\n###Question:\nhow much in {i} ?\n###Python"
        ids, n_prompt = students.training_ids(tokenizer, prompt, "ans = 1")
        documents.append(Document(f"row-{i}", tuple(ids), n_prompt))
    signs = torch.tensor([tokenizer.encode(sign, add_special_tokens=False)[0] for sign in SIGNS])

    def activations(table: dict[str, torch.Tensor]) -> torch.Tensor:
        fires = table["token_id"][:, None] == signs
        x = torch.zeros(len(fires), 2, D_MODEL)
        x[:, :, : len(SIGNS)] = (fires * (1 + table["document"][:, None] % 7 / 10))[:, None]
        x[:, :, -1] = 1.0
        return x

    store = write_documents(folders.activations(choice.name), documents, tokenizer.bos_token_id, activations)
    flags = ("--data-dir", str(folders.data), "--results-dir", str(folders.results))
    checkpoint = crosscoder_folder(folders, choice.crosscoder_name)
    found = Made(folders, ("FinQA-mini", str(tiny_student), *flags), checkpoint, {"activations": store.config.recorded})
    found.save()
    found.analyse()
    return found


@pytest.fixture
def server(made: Made) -> Iterator[LabelServer]:
    """A server, and a dictionary without labels."""
    for name in ("labels.json", "labels.journal.jsonl"):
        (made.results / name).unlink(missing_ok=True)
    with running(LabelServer()) as found:
        yield found


def chosen(made: Made, n_explaining: int = 10, n_scoring: int = 10) -> list[Passages]:
    rows = read_latent_table(made.results / "latents.csv")[:3]
    return choose_passages(open_crosscoder(made.words), rows, n_explaining, n_scoring, 0)


# Passages


def test_no_two_passages_of_a_latent_are_of_one_page(made):
    for passages in chosen(made):
        pages = Counter(passage.page for passage in (*passages.explaining, *passages.scoring))
        assert set(pages.values()) <= {1}
    often = chosen(made)[OFTEN]
    assert (len(often.explaining), sum(passage.fires for passage in often.scoring)) == (10, 10)


def test_passages_fire_or_are_silent_as_they_claim_and_only_the_labels_are_marked(made):
    for latent in (EVERYWHERE, OFTEN):
        passages = chosen(made, n_explaining=6, n_scoring=6)[latent]
        assert all(f"<<{SIGNS[latent]}>>" in passage.text for passage in passages.explaining)
        assert [SIGNS[latent] in passage.text for passage in passages.scoring] == [p.fires for p in passages.scoring]
        assert not any("<<" in passage.text for passage in passages.scoring)
        assert {passage.fires for passage in passages.scoring} == {True, False}


def test_a_latent_on_too_few_pages_is_not_asked_about(made):
    assert chosen(made)[RARE] == Passages(RARE, (), ())


def test_marks_keep_the_text_and_its_spaces(tiny_student):
    tokenizer = students.load_tokenizer(str(tiny_student))
    text = "net sales ’ rose @ in 2009"
    ids = tokenizer.encode(text, add_special_tokens=False)
    every_other = [i % 2 == 0 for i in range(len(ids))]
    assert spelt(tokenizer, ids, []) == text
    assert spelt(tokenizer, ids, every_other).replace("<<", "").replace(">>", "") == text


# Replies


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Label: years in a table", "years in a table"),
        ("<think>Label: perhaps years?\nno</think>\n\nLabel: **operands**", "operands"),
        ("```\nLabel: years\n```", "years"),
        ("```text\nyears after 2000\n```", None),
        ("The answer is: 4418", None),
        ('{"label": "years"}', "years"),
        ("Here is what I see.\nlabel = 'dollar signs $'", "dollar signs $"),
        ("Label: a\x00 \t tab", "a tab"),
        ("", None),
        ("``````", None),
        ("<think>it could be years, or", None),
        ("These are years.\nThey stand in a table.", None),
        ("I'm sorry, but I can't help with that.", None),
        ("Label: I cannot tell", None),
        ("Label: the description", None),
        ("Label: Moons of Saturn.", None),
        ("Label: ...", None),
        ("Label: " + "years " * 30, None),
    ],
)
def test_a_label_is_what_the_reply_says_or_nothing(reply, label):
    assert read_label(reply) == label


@pytest.mark.parametrize(
    ("reply", "n", "said"),
    [
        ("1: yes\n2: no", 2, [True, False]),
        ("Passage 1: **Yes**, it is.\nPassage 2: **No**.", 2, [True, False]),
        ("1. yes 2. no 3) YES", 3, [True, False, True]),
        ("<think>1: no\n2: no</think>1: yes\n2: yes", 2, [True, True]),
        ("1: yes", 2, None),
        ("1: yes\n2: no\n3: no", 2, None),
        ("1: yes\n1: no\n2: no", 2, None),
        ("2: yes\n1: no", 2, None),
        ("1: maybe\n2: no", 2, None),
        ("[1, 0]", 2, None),
        ("yes", 2, None),
        ("<think>1: yes\n2: no", 2, None),
        ("", 2, None),
    ],
)
def test_a_judgement_is_there_for_every_passage_or_none_counts(reply, n, said):
    assert read_verdicts(reply, n) == said


@pytest.mark.parametrize(
    ("fires", "said", "score"),
    [
        ("yyyynn", "yyyynn", 1.0),
        ("yyyynn", "nnnnyy", 0.0),
        ("yyyynn", "yyyyyy", 0.5),  # accuracy would be 4 of 6
        ("yyyynn", "nnnnnn", 0.5),
        ("yyyynn", "yyynny", (3 / 4 + 1 / 2) / 2),
    ],
)
def test_the_score_is_the_mean_of_what_is_right_of_either_sort(fires, said, score):
    assert balanced_accuracy([(a == "y", b == "y") for a, b in zip(fires, said, strict=True)]) == score


# The command


def test_labels_and_scores_are_written_and_said(made, server):
    before = [{k: v for k, v in row.items() if not k.startswith("label")} for row in made.table()]
    done = made.label(server.url)
    assert done.returncode == 0, done.stderr
    rows = made.table()
    assert [row["label"] for row in rows] == ["the sign @", "the sign %", *[""] * 6]
    assert [row["label_score"] for row in rows][1:] == ["1.0", *[""] * 6]
    assert [{k: v for k, v in row.items() if not k.startswith("label")} for row in rows] == before
    assert made.labels()[OFTEN] == {
        "latent": OFTEN, "label": "the sign %", "label_score": 1.0, "n_firing": 10, "n_silent": 10
    }  # fmt: skip
    assert "2 of 3 latents have a label; 1 fire on too few pages, 0 have no reply" in done.stdout
    assert "chance is 0.5" in done.stdout and "detection score: 1.000 [1.000, 1.000]" in done.stdout
    assert "python -m crosscoder.dashboard FinQA-mini" in done.stdout


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        (lambda asked: verdicts(True for _ in passages_in(asked)[1:]), 0.5),
        (lambda asked: verdicts(" %" not in passage for passage in passages_in(asked)[1:]), 0.0),
    ],
)
def test_what_is_judged_wrongly_costs_score(made, server, rule, score):
    server.judge = rule
    assert made.label(server.url, "--latents", "2").returncode == 0
    assert made.labels()[OFTEN]["label_score"] == score


def test_analyse_keeps_the_labels_of_the_same_dictionary_and_drops_those_of_another(made, server):
    made.label(server.url)
    labelled = made.table()
    made.analyse()
    assert made.table() == labelled
    try:
        made.save(threshold=0.06)
        stale = made.label(server.url)
        assert stale.returncode == 1 and "is of another dictionary" in stale.stderr and "analyse.py" in stale.stderr
        made.analyse()
        assert "label" not in made.table()[0] and not (made.results / "labels.json").exists()
    finally:
        made.save()
        made.analyse()


def test_a_killed_run_goes_on_without_paying_twice(made, server):
    server.delay_s = 0.3
    line = [sys.executable, "-m", "crosscoder.label", *made.line(server.url)]
    environment = os.environ | {"OPENAI_API_KEY": "any"}
    process = subprocess.Popen(line, cwd=FOLDER, env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while server.answered.total() < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (made.results / "labels.json").exists()
    server.delay_s = 0
    kept = len((made.results / "labels.journal.jsonl").read_text().splitlines())
    assert made.label(server.url).returncode == 0
    assert made.labels()[OFTEN]["label_score"] == 1.0
    # Two are under way at a time: no more than these are lost.
    assert kept >= 1 and sum(n - 1 for n in server.asked.values()) <= 2
    paid = len(server.bodies)
    assert made.label(server.url).returncode == 0
    assert len(server.bodies) == paid


@pytest.mark.parametrize("odd", ["", "I'm sorry, I cannot do that.", "<think>hm", "It is this.\nOr that."])
def test_a_reply_that_cannot_be_read_is_asked_for_again(made, server, odd):
    server.name = lambda asked: odd
    assert made.label(server.url).returncode == 0
    assert made.labels()[OFTEN]["label"] == "the sign %"
    again = [body for body in server.bodies if body["messages"][-1]["content"].startswith("That cannot be read")]
    assert len(again) == 2 and all(body["messages"][-2]["content"] for body in again)


def test_what_is_never_read_is_left_out_and_nothing_is_invented(made, server):
    server.judge = lambda asked: "perhaps"
    done = made.label(server.url, "--attempts", "2")
    assert done.returncode == 0 and "detection score" not in done.stdout
    row = made.labels()[OFTEN]
    assert (row["label"], row["label_score"], row["n_firing"]) == ("the sign %", None, 0)
    server.name = lambda asked: "This has two lines.\nNone is a label."
    done = made.label(server.url, "--attempts", "1", "--temperature", "1")
    assert "0 of 3 latents have a label; 1 fire on too few pages, 2 have no reply that can be read" in done.stdout
    assert "label" not in made.table()[0]


def test_a_list_that_cannot_be_read_counts_as_not_judged(made, server):
    first: list[str] = []

    def judge(asked: str) -> str:
        first.append(asked)
        return "perhaps" if asked == first[0] else judged(asked)

    server.judge = judge
    assert made.label(server.url, "--max-concurrent", "1").returncode == 0
    rows = made.labels().values()
    assert sorted(row["n_firing"] + row["n_silent"] for row in rows)[1:] != [20, 20]
    assert made.labels()[OFTEN]["label_score"] in (1.0, None)


def test_the_cost_cap_ends_the_run_and_keeps_what_there_is(made, server, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text('{"models": {"gpt-5": {"input": 1000, "output": 1000}}}')  # $0.11 a reply of the server
    done = made.label(server.url, "--prices", str(prices), "--max-cost", "0.40", "--max-concurrent", "1")
    assert done.returncode == 1 and "--max-cost 0.4 is reached" in done.stderr and "of 3 latents" in done.stderr
    assert len(server.bodies) == 3 and made.table()[EVERYWHERE]["label"] == "the sign @"
    assert made.label(server.url, "--prices", str(prices), "--max-cost", "9").returncode == 0
    assert made.labels()[OFTEN]["label_score"] == 1.0


def test_a_dry_run_shows_the_prompt_and_sends_nothing(made, server):
    done = made.label(server.url, "--dry-run")
    assert done.returncode == 0 and "<<@>>" in done.stdout
    assert "estimate: " in done.stdout and not server.bodies and not (made.results / "labels.json").exists()


def test_without_an_analysis_one_line_says_what_makes_it(made, server, tmp_path):
    done = run_here("crosscoder.label", *made.line(server.url), "--results-dir", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "latents.csv is missing; make it with: python" in done.stderr and "analyse.py FinQA-mini" in done.stderr


@pytest.mark.slow
def test_a_vllm_server_is_asked_and_its_replies_are_kept(made, server, tmp_path):
    """The shipped model writes programs, not labels: what it says is asked for twice, then left out."""
    with running_vllm(tmp_path / "log") as url:
        flags = ("--model", "pocket-mistral", "--system-role", "user", "--max-completion-tokens", "40")
        done = made.label(url, *flags, "--temperature", "0", "--explaining", "2")
        lines = (made.results / "labels.journal.jsonl").read_text().splitlines()
        again = made.label(url, *flags, "--temperature", "0", "--explaining", "2")
    assert done.returncode == again.returncode == 0, done.stderr
    answers = [json.loads(line) for line in lines]
    assert answers and all(answer["completion_tokens"] > 0 for answer in answers)
    assert (made.results / "labels.journal.jsonl").read_text().splitlines() == lines
    assert "the journal has every answer" in again.stdout
    assert "2 have no reply that can be read" in done.stdout
