"""What latents cause: sets of them put into the base model, or taken out of the fine-tuned one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from mini.study.ceilings import load_pair, test_rows
from mini.study.dictionaries import Dictionary, load
from mini.study.measures import all_documents
from mini.study.plan import BASE, SHAM, Pair
from mini.study.work import Work, read_json, step

if TYPE_CHECKING:
    from crosscoder.activations.collection import Document

CAUSAL_METHODS = ("plain", "difference SAE")
CAUSAL_SIZES, CONTROL_SIZES = (1, 4, 16, 64), (16,)


def causal_all(work: Work, trained: Sequence[Dictionary], target: Target) -> None:
    """Latents of the first seed put into the models, for the pairs that ask for it."""
    for dictionary in causal_dictionaries(trained, target):
        if not causal_file(work, dictionary).exists():
            with step(f"causal: {dictionary.method}") as say:
                say(_causal(work, dictionary, trained))


def causal_dictionaries(trained: Sequence[Dictionary], target: Target) -> list[Dictionary]:
    return [d for d in trained if d.pair.causal and d.target == target and d.seed == 0 and d.method in CAUSAL_METHODS]


def causal_file(work: Work, dictionary: Dictionary) -> Path:
    return work.measure(dictionary.name) / "causal" / "causal.json"


def _causal(work: Work, dictionary: Dictionary, trained: Sequence[Dictionary]) -> str:
    """Nothing, the whole site, sets of rising size and their controls, teacher-forced."""
    from crosscoder.study.causal_report import CausalConfig, causal_report
    from crosscoder.study.halves import pair_of

    asked, choose_on = _causal_questions(work, dictionary.pair)
    pair = pair_of(load_pair(work, dictionary.pair.fine_tuned))
    config = CausalConfig(sizes=CAUSAL_SIZES, control_sizes=CONTROL_SIZES, n_random=work.plan.random_sets)
    rivals = {f"{d.method}, {d.pair.name}": load(work, d) for d in _rivals(dictionary, trained)}
    folder = causal_file(work, dictionary).parent
    report = causal_report(load(work, dictionary), pair, asked, choose_on, dictionary.target, folder, config, rivals)
    best = [
        row["recovered"]
        for row in report["rows"]
        if (row["kind"], row["direction"], row["carrier"], row["group"], row["measure"])
        == ("ranked", "sufficiency", "other", "new", "divergence")
    ]
    shown = [f"{value:.0%}" if value is not None else "-" for value in best]
    return f"KL recovered by {', '.join(map(str, CAUSAL_SIZES))} latents: {', '.join(shown)}"


def _rivals(dictionary: Dictionary, trained: Sequence[Dictionary]) -> list[Dictionary]:
    """The difference SAE of the same pair, and what the sham gives by the same method."""
    same_place = [d for d in trained if d.target == dictionary.target and d.seed == 0 and d != dictionary]
    return [
        d
        for d in same_place
        if (d.pair == dictionary.pair and d.method == "difference SAE")
        or ((d.pair.instruct, d.pair.fine_tuned) == (BASE, SHAM) and d.method == dictionary.method)
    ]


def _causal_questions(work: Work, pair: Pair) -> tuple[list[Any], list[Document]]:
    """Those that are scored, of known and added families, and other questions of added ones to choose on."""
    from crosscoder.study.causal_report import Asked as Question

    rows, documents = test_rows(work), all_documents(work)
    kinds = ("known", *pair.added)
    there = [(row, document) for row, document in zip(rows, documents, strict=True) if row.family_kind in kinds]
    scored, rest = there[: work.plan.causal_questions], there[work.plan.causal_questions :]
    asked = [Question(document, row.family, row.family_kind, row.expected_answer) for row, document in scored]
    choose_on = [document for row, document in rest if row.family_kind in pair.added]
    return asked, choose_on[: work.plan.causal_questions // 2]


def csv_rows(
    work: Work, trained: Sequence[Dictionary], target: Target
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a patch, group of questions and measure; and the ranked sets among their random ones."""
    rows: list[dict[str, Any]] = []
    among: list[dict[str, Any]] = []
    for dictionary in causal_dictionaries(trained, target):
        report = read_json(causal_file(work, dictionary))
        described = {name: dictionary.described[name] for name in ("pair", "site", "method")}
        kept = [row for row in report["rows"] if row["group"] in GROUPS]
        rows += [described | {name: row[name] for name in CAUSAL_COLUMNS} | _interval(row) for row in kept]
        among += [described | row for row in report["random"] if row["group"] in GROUPS]
    return rows, among


GROUPS = ("all", "known", "new", "other")
CAUSAL_COLUMNS = (
    "kind", "n_latents", "seed", "direction", "carrier", "positions", "group", "measure", "n", "value", "none",
    "ceiling", "recovered", "injected_norm",
)  # fmt: skip


def _interval(row: dict[str, Any]) -> dict[str, float | None]:
    low, high = row["interval"] or (None, None)
    return {"recovered_low": low, "recovered_high": high}
