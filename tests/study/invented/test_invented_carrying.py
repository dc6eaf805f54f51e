"""What sets carry: their programs are written together, and judged as if each had been put in by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from crosscoder.activations.readers import Target
from crosscoder.interventions import patched_generation
from crosscoder.interventions.causal import Cell
from crosscoder.interventions.halves import pair_of
from crosscoder.interventions.sets import Components, Constant, Nothing, Whole
from finqa.models.students import load_base, load_tokenizer
from finqa.task.records import TeacherRow
from study.invented.diff.carrying import Carrier
from study.invented.diff.ceilings import Models
from study.invented.diff.plan import Lengths
from study.invented.files import Item

SITE = Target(1, "residual")


@pytest.fixture
def models(tiny_student: Path) -> Models:
    """A random model, and itself with a random adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_base(str(tiny_student), torch.float32), lora).eval()
    how_long = Lengths(sweep_pages=1, batch=5, max_new_tokens=6)
    return Models(pair_of(adapted), adapted, load_tokenizer(str(tiny_student)), how_long)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of programs in each run of a sandbox. A random model's are all wrong, so what is right is made up of
    what is written, and of the label."""
    runs: list[int] = []

    def answered(replies: Any, expected: Any, sandbox: Any) -> Any:
        runs.append(len(replies))
        right = [crc32(f"{one.text}{label}".encode()) % 2 == 0 for one, label in zip(replies, expected, strict=True)]
        return patched_generation.Answered(right, right)

    monkeypatch.setattr(patched_generation, "answered", answered)
    return runs


def on_pages(n: int, kind: str = "A", metrics: str = "xyz") -> list[tuple[Item, TeacherRow]]:
    """A question for each metric on each page, with which it begins."""
    return [
        (
            Item(f"{page}-{metric}", "test", page, "choose", 6, metric, kind, metric, ""),
            TeacherRow(f"page {page} " * 5 + f"what is {metric} ?", "", "", ""),
        )
        for page in range(n)
        for metric in metrics
    ]


@pytest.fixture
def carrier(models: Models) -> Carrier:
    made = Carrier.__new__(Carrier)  # made-up activations of gold programs
    made.models, made.target, made.arm = models, SITE, "A"
    made.own, made.other = on_pages(3), on_pages(3, "B", "uv")
    made.pairs = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(2))
    return made


def by_itself(carrier: Carrier, cell: Cell, asked: Any) -> list[tuple[str, int]]:
    """Right answers to each metric's questions where nothing else is asked."""
    [right] = carrier.models.right(SITE, [(cell, asked)])
    metrics = [item.family for item, _ in asked]
    judged = list(zip(metrics, right, strict=True))
    return [(metric, judged.count((metric, True))) for metric in dict.fromkeys(metrics)]


def test_what_sets_write_together_is_judged_as_what_each_writes_alone(models: Models, judged: list[int]):
    """Also where some change the base and some the fine-tuned model, in any order."""
    pushed = Constant("mean difference", 20 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    cells = [(Nothing(), "necessity"), (Whole(), "sufficiency"), (pushed, "necessity"), (Nothing(), "sufficiency")]
    questions = on_pages(4)
    sets: Any = [(Cell(one, way, "own"), questions[: 12 - n]) for n, (one, way) in enumerate(cells)]
    together = models.right(SITE, sets)
    assert judged == [12 + 11 + 10 + 9]
    assert together == [models.right(SITE, [one])[0] for one in sets]
    assert len({tuple(right[:9]) for right in together}) == len(sets) and models.right(SITE, []) == []


def test_the_sets_of_all_tables_write_together_and_each_row_is_of_its_own_set(carrier: Carrier, judged: list[int]):
    basis = torch.eye(64)[:32]

    def sets() -> dict[str, Any]:
        own = Components(basis)
        return {
            "carried": [carrier.carried(own, "plain", "trained", others=True), *carrier.sweep(own, "plain", "trained")],
            "explored": carrier.explored_components(basis),
        }

    tables = carrier.rows(sets())
    assert len(judged) == 1
    assert list(tables) == ["carried", "explored"]
    for name, its in sets().items():
        cells = [(Cell(one.addition, one.direction, "own"), one.asked) for one in its]
        alone = [one for cell, asked in cells for one in by_itself(carrier, cell, asked)]
        assert [(row["metric"], row["right"]) for row in tables[name]] == alone
    assert any(0 < row["right"] < row["n"] for row in tables["carried"])
    assert [(row["multiple"], row["group"], row["metric"], row["n"]) for row in tables["carried"]] == [
        *((1.0, "own", metric, 3) for metric in "xyz"),
        *((1.0, "other", metric, 3) for metric in "uv"),
        *((multiple, "own", metric, 1) for multiple in (0.5, 2.0) for metric in "xyz"),
    ]
    assert [(row["set"], row["metric"], row["n"]) for row in tables["explored"]] == [("all", m, 1) for m in "xyz"]
    assert not any("group" in row for row in tables["explored"])


def test_the_whole_site_the_base_and_the_fine_tune_are_asked_in_one_call(carrier: Carrier, judged: list[int]):
    tables = carrier.ends()
    assert judged == [15 + 15 + 15 + 3]
    methods = ["whole site", "nothing", "fine-tuned"]
    assert [row["method"] for row in tables["carried"]] == [method for method in methods for _ in "xyzuv"]
    assert [row["norm"] > 0 for row in tables["carried"]] == [True] * 5 + [False] * 10
    whole, nothing = Whole(), Nothing()
    patches: Any = [(whole, "sufficiency"), (nothing, "sufficiency"), (nothing, "necessity")]
    alone = [by_itself(carrier, Cell(*patch, "own"), carrier.own + carrier.other) for patch in patches]
    assert [(row["metric"], row["right"]) for row in tables["carried"]] == [one for rows in alone for one in rows]
    assert alone[1] != alone[2]
    assert {row["set"] for row in tables["explored"]} == {"all"} and len(tables["explored"]) == 3
