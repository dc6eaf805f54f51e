"""FinQA-mini: the shipped files, and the pages and families behind them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import pytest

from finqa.runtime.paths import SHIPPED_DATA, SPLITS
from finqa.task.answers import match
from finqa.task.datasets import load_finqa
from finqa.task.program_compiler import to_python
from finqa.task.programs import ARITHMETIC, TABLE_OPERATIONS, execute, parse
from finqa.task.prompts import training_prompt
from finqa.task.records import Question
from mini.families import FAMILIES, families
from mini.make_finqa_mini import NAME, SEED, SIZES, as_json, make_minimal_pairs, make_split


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Question]]:
    return {split: load_finqa(SHIPPED_DATA / NAME / f"{split}.json").questions for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_generator_makes_the_shipped_files_byte_for_byte(split: str):
    made = as_json(make_split(split, SIZES[split], ("known", "new"), SEED))
    assert (SHIPPED_DATA / NAME / f"{split}.json").read_text() == made


def test_another_seed_makes_other_questions():
    assert make_split("dev", 20, ("known", "new"), 1) != make_split("dev", 20, ("known", "new"), 2)


def test_every_label_is_its_programs_result_and_the_teachers(shipped: dict[str, list[Question]]):
    for question in shipped["dev"]:
        assert match(execute(question.program, question.table), question.answer)
        variables: dict[str, Any] = {}
        exec(to_python(question.program, question.table, question.question, question.passage), variables)
        assert match(variables["ans"], question.answer)


def test_all_ten_operations_are_used(shipped: dict[str, list[Question]]):
    used = {step.op for question in shipped["train"] for step in parse(question.program)}
    assert used == {*ARITHMETIC, *TABLE_OPERATIONS}


def test_there_are_at_least_twelve_families_with_several_phrasings():
    shipped_families = families("known", "new")
    assert len(shipped_families) >= 12
    assert all(len(set(family.phrasings)) >= 3 for family in shipped_families)


def test_half_of_the_test_questions_are_of_known_families(shipped: dict[str, list[Question]]):
    kinds = Counter(question.family_kind for question in shipped["test"])
    assert kinds == {"known": 400, "new": 400}


def test_no_family_is_of_two_kinds_and_none_of_the_other_kind_is_shipped(shipped: dict[str, list[Question]]):
    kinds = defaultdict(set)
    for questions in shipped.values():
        for question in questions:
            kinds[question.family].add(question.family_kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert set(kinds) == {family.name for family in FAMILIES if family.kind != "other"}


def test_no_question_stands_in_two_splits_or_twice(shipped: dict[str, list[Question]]):
    prompts = [training_prompt(question) for questions in shipped.values() for question in questions]
    assert len(set(prompts)) == len(prompts)


def test_every_number_of_a_page_names_its_place(shipped: dict[str, list[Question]]):
    """No two operands of a program get one value, and none is left without a name."""
    for question in shipped["test"]:
        code = to_python(question.program, question.table, question.question, question.passage)
        assert not any(line.startswith(("value", "row =")) for line in code.splitlines()), code


def test_pages_look_like_finqa(shipped: dict[str, list[Question]]):
    pages = [training_prompt(question) for question in shipped["test"]]
    shown = " ".join(pages)
    for trait in ("$ ", "%", "( in millions )", " , ", " .", "-", "1,"):
        assert trait in shown
    bodies = [page.split("###Passage:")[1].split("###Question:")[0] for page in pages]
    assert all(body == body.lower() for body in bodies)


def test_minimal_pairs_differ_in_the_operation_alone():
    groups = defaultdict(list)
    for record in make_minimal_pairs(9, SEED):
        groups[record["qa"]["pair"]].append(record)
    assert len(groups) == 9
    for records in groups.values():
        assert len(records) >= 3
        pages = {json.dumps([r["pre_text"], r["table"], r["post_text"]]) for r in records}
        assert len(pages) == 1
        assert len({r["qa"]["program"] for r in records}) == len(records)
        assert len({r["qa"]["question"] for r in records}) == len(records)
