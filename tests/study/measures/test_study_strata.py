"""Strata on FinQA-mini itself, with pocket-mistral's tokenizer."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosscoder.activations.collection import documents_from_rows, planned_shards, stored_documents, token_table
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.writer import SetWriter
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.paths import SHIPPED_DATA
from finqa.task.datasets import load_finqa
from finqa.task.program_compiler import to_python
from finqa.task.prompts import training_prompt
from finqa.task.records import Question, TeacherRow
from mini.families import FAMILIES
from mini.make_finqa_mini import NAME, make_minimal_pairs
from study.measures.strata import STRATA, questions_of
from study.wording import cue, finqa_mini_wording, operation

WORDING = finqa_mini_wording()
ROWS_OF_FAMILY = 3


def row_of(question: Question) -> TeacherRow:
    code = to_python(question.program, question.table, question.question, question.passage)
    return TeacherRow(
        training_prompt(question), code, question.answer, question.answer, id=question.id, family=question.family
    )


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """A few questions of every family that FinQA-mini has."""
    by_family: dict[str, list[Question]] = defaultdict(list)
    for question in load_finqa(SHIPPED_DATA / NAME / "dev.json").questions:
        by_family[question.family].append(question)
    return [question for group in by_family.values() for question in group[:ROWS_OF_FAMILY]]


@pytest.fixture(scope="module")
def rows(questions) -> list[TeacherRow]:
    return [row_of(question) for question in questions]


@pytest.fixture(scope="module")
def tokenizer():
    return students.load_tokenizer("pocket-mistral")


@pytest.fixture(scope="module")
def store(rows, tokenizer, tmp_path_factory) -> ActivationStore:
    return store_of(rows, tokenizer, tmp_path_factory.mktemp("set"))


def store_of(rows, tokenizer, folder: Path) -> ActivationStore:
    """The rows' set, with activations of noise."""
    documents = documents_from_rows(rows, tokenizer)
    shards = planned_shards(documents, tokenizer.bos_token_id, 100_000, 10_000)
    writer = SetWriter(folder, 4, {})
    writer.prepare()
    for shard in shards:
        file = writer.shard(shard.number, shard.n_tokens)
        noise = torch.randn(shard.n_tokens, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
        file.add(noise, noise.double().norm(dim=-1))
        file.close()
    table = token_table(documents, shards, tokenizer.bos_token_id)
    sizes = [shard.n_tokens for shard in shards]
    writer.finish(table, stored_documents(documents), {"fingerprint": "noise"}, sizes)
    return ActivationStore(folder)


def test_the_strata_of_every_row_are_the_parts_of_its_text(questions, rows, tokenizer, store):
    stratum = questions_of(store, rows, tokenizer, WORDING).stratum
    for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
        ids, of = store.token_id[store.document == number], stratum[store.document == number]
        text = {name: tokenizer.decode(ids[of == code].tolist()) for code, name in enumerate(STRATA)}
        page = row.prompt.partition("###Passage:")[2].partition("###Question:")[0]
        assert text["passage"] == page
        assert text["question before the cue"] + text["question after the cue"] == question.question
        assert text["last prompt token"] == "[/INST]"
        start, end = operation(row.generated_code)
        assert text["program before the operator"] == "\n" + row.generated_code[:start]
        # The operator's own token may hold what is glued to it, as an opening bracket is.
        assert text["operator"].startswith(row.generated_code[start:end])
        program = text["program before the operator"] + text["operator"]
        assert ("\n" + row.generated_code).startswith(program)


EXAMPLES = [
    ("what was the percentage change in net sales between 2008 and 2009?", "percentage_change", "what was the pe"),
    ("what was the change in net sales between 2008 and 2009?", "change", "what was the ch"),
    ("what was the total of net sales between 2008 and 2009?", "two_year_total", "what was the total of net sales b"),
    ("what was the total of net sales and goodwill in 2009?", "two_row_total", "what was the total of net sales a"),
    ("what was the total net sales in the table?", "row_total", "what was the total n"),
    ("what was the average of net sales between 2008 and 2009?", "two_year_average", "what was the average o"),
    ("how many authorized units were not yet issued?", "units_left", "how many a"),
    ("how many units can still be issued?", "units_left", "how many u"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "family", "decided"), EXAMPLES, ids=[family for _, family, _ in EXAMPLES])
def test_the_cue_is_the_first_place_where_no_other_family_fits(text, family, decided):
    table = [["in millions", "2009", "2008"], ["net sales", "1", "2"], ["goodwill", "3", "4"]]
    question = Question("q", "", "", table, text, "0", family=family)
    every_character = range(1, len(text) + 1)
    assert text[: every_character[cue(question, WORDING, every_character)]] == decided


def test_before_the_cue_another_familys_question_starts_alike_and_from_it_on_none_does(questions):
    for question in questions:
        others = {
            template.format_map(dict(zip(("row", "row_2", "year", "year_2", "region", "count"), slots, strict=True)))
            for slots in every_filling(question)
            for family in FAMILIES
            if family.name != question.family
            for template in family.phrasings
        }
        ends = range(1, len(question.question) + 1)
        place = cue(question, WORDING, ends)
        assert not any(other.startswith(question.question[: ends[place]]) for other in others)
        assert place == 0 or any(other.startswith(question.question[: ends[place - 1]]) for other in others)


def every_filling(question: Question) -> list[tuple[str, ...]]:
    names, years = [row[0] for row in question.table[1:]], question.table[0][1:]
    regions, counts = (WORDING.fillers[slot] for slot in ("region", "count"))
    return list(itertools.product(names, names, years, years, regions, counts))


OPERATIONS = [
    ("a = 1\nb = 2\nans = a / b", "ans = a /"),
    ("a = [1, 2]\nans = sum(a) / len(a)", "ans = sum"),
    ("rate = 3.2 / 100\na = -7\n# ((1 + rate) ** 3) * a\ntotal = 1 + rate\nans = total", "# ((1 +"),
    ('a = 1\nb = 2\nans = "yes" if a > b else "no"', 'ans = "'),
    ("ans = max([1, 2])", "ans = max"),
    ("ans = 12", ""),
]


@pytest.mark.parametrize(("code", "expected"), OPERATIONS)
def test_the_operation_starts_after_the_look_ups_and_ends_with_its_first_operator(code, expected):
    start, end = operation(code)
    assert code[start:end] == expected


def test_a_store_knows_the_stratum_of_every_token_and_what_its_questions_are(store, rows, tokenizer):
    questions = questions_of(store, reversed(rows), tokenizer, WORDING)
    assert len(questions) == len(rows)
    assert questions.ids == tuple(row.id for row in rows)
    for number, row in enumerate(rows):
        assert questions.families[questions.family[number]] == row.family
    kinds = {family.name: family.kind for family in FAMILIES}
    assert [kinds[name] == "new" for name in questions.families] == questions.added.tolist()
    assert len(questions.page.unique()) == len(rows)
    shapes = [next(f.shape for f in FAMILIES if f.name == row.family) for row in rows]
    for i, j in itertools.combinations(range(len(rows)), 2):
        assert (questions.template[i] == questions.template[j]) == (shapes[i] == shapes[j])


def test_minimal_pairs_share_their_page(tokenizer, tmp_path: Path):
    records = make_minimal_pairs(2, seed=3)
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    rows = [row_of(question) for question in load_finqa(path).questions]
    questions = questions_of(store_of(rows, tokenizer, tmp_path / "set"), rows, tokenizer, WORDING)
    pairs = torch.tensor([record["qa"]["pair"] for record in records])
    assert torch.equal(questions.page, pairs)


def test_what_does_not_belong_together_is_said(store, rows, tokenizer, tiny_student: Path):
    with pytest.raises(UserError, match="no row for document"):
        questions_of(store, rows[1:], tokenizer, WORDING)
    with pytest.raises(UserError, match="no such family is known"):
        questions_of(store, [replace(rows[0], family=""), *rows[1:]], tokenizer, WORDING)
    longer = replace(rows[0], generated_code=rows[0].generated_code + "\nx = 1")
    with pytest.raises(UserError, match="another text than in"):
        questions_of(store, [longer, *rows[1:]], tokenizer, WORDING)
    swapped = replace(rows[0], prompt=rows[0].prompt.replace("1", "2", 1))
    with pytest.raises(UserError, match="another text than in"):
        questions_of(store, [swapped, *rows[1:]], tokenizer, WORDING)
    wrong = next(row for row in rows if row.family != rows[0].family)
    with pytest.raises(UserError, match="is not worded as questions of"):
        questions_of(store, [replace(rows[0], family=wrong.family), *rows[1:]], tokenizer, WORDING)
