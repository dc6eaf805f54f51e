"""The gates: what must hold before a dictionary is trained. A gate that fails is mended, not waived (docs/prereg.md).

Answers are judged again from the predictions under the strict rule, and against the formulas of both arms A and A'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finqa.evaluation.finished import read_evaluations
from finqa.evaluation.predictions import Prediction
from finqa.runtime.errors import UserError
from finqa.task.answers import match
from finqa.task.records import TeacherRow, read_teacher_rows
from study.invented.files import TEST, Item, read_items, write_table
from study.invented.plan import BASE, DEFINED, DEFINED_BY_K, EVALUATIONS, SEEDS, Evaluation, Plan, run_name
from study.invented.text_only import length_aurocs, word_aurocs

CONTROLS = ("K", "N")
UNKNOWN_AT_MOST = 1 / 60
GUESSED_AT_LEAST = 0.01
"""The chance with which a model that gives a formula to every name alike gives it so often to the formula's own."""
DEFINED_AT_LEAST = 0.6
LEARNT_AT_LEAST = 0.8
KNOWN_WITHIN = 0.02
OTHERS_AT_MOST = 0.05
TEXT_FROM, TEXT_TO = 0.45, 0.55

Answers = Mapping[str, Sequence[Prediction]]
"""Predictions on test by the name of the evaluation (plan.EVALUATIONS)."""
Share = tuple[float | None, int]
"""A share of right answers, None where nothing was asked, and how many were."""


@dataclass(frozen=True)
class Gate:
    """One comparison of a figure with its bound."""

    gate: str
    model: str
    """The evaluation it is measured on; `text` for what needs no model."""
    family: str
    """A metric's name, or which questions."""
    n: int
    value: float | None
    """None where the evaluation is not there."""
    low: float | None
    high: float | None
    holds: bool | None


def gate(name: str, model: str, family: str, of: Share, low: float | None = None, high: float | None = None) -> Gate:
    """A gate holds where the value is not beyond a bound, rounding of a sum aside."""
    value, n = of
    above = value is not None and (low is None or value >= low - 1e-9)
    below = value is not None and (high is None or value <= high + 1e-9)
    return Gate(name, model, family, n, value, low, high, None if value is None else above and below)


def model_gates(items: Sequence[Item], answers: Answers) -> Iterator[Gate]:
    """The gates that predictions decide, each with None as its value where an evaluation is not there."""
    test = {item.id: item for item in items if item.split == "test"}
    labels = {(item.page, item.family): item.answer for item in test.values()}
    metrics = [(f, "A") for f in families(test.values(), "A")] + [(f, "B") for f in families(test.values(), "B")]

    def of(model: str, wanted: Callable[[Item], bool], expected: Callable[[Item], str] = lambda i: i.answer) -> Share:
        return share_right(answers.get(model, ()), test, wanted, expected)

    def named(family: str) -> Callable[[Item], bool]:
        return lambda item: item.family == family

    def of_kind(kind: str) -> Callable[[Item], bool]:
        return lambda item: item.kind == kind

    controls = [run_name(arm, seed) for arm in CONTROLS for seed in SEEDS]
    for model in [*(evaluation.name for evaluation in BASE), *controls]:
        for family, _ in metrics:
            own, high = of(model, named(family)), UNKNOWN_AT_MOST
            if own[0] is not None and own[0] > high:
                elsewhere = of(model, lambda i, f=family: i.kind != "known" and i.family != f,
                               lambda i, f=family: labels[i.page, f])  # fmt: skip
                high = max(high, most_guessed(own[1], elsewhere[0]))
            yield gate("unknown before", model, family, own, high=high)

    def told(e: Evaluation) -> Gate:
        share = of(e.name, lambda item: item.kind != "known")
        return gate("computable when defined", e.name, "A and B", share, low=DEFINED_AT_LEAST)

    by_base = max(map(told, DEFINED), key=lambda one: -1.0 if one.value is None else one.value)
    # Where the base cannot write such programs at all, the fine-tunes that have learnt all but the metrics are asked.
    yield from map(told, DEFINED_BY_K) if by_base.holds is False else (by_base,)
    for seed in SEEDS:
        for family, arm in metrics:
            model = run_name(arm, seed)
            yield gate("learnt", model, family, of(model, named(family)), low=LEARNT_AT_LEAST)
    for arm in ("A", "A-permuted", "B"):
        yield known_gate(arm, [of(run_name(arm, seed), of_kind("known")) for seed in SEEDS],
                         [of(run_name("K", seed), of_kind("known")) for seed in SEEDS])  # fmt: skip
    for seed in SEEDS:
        for arm, own, other in (("A", _answer, _permuted), ("A-permuted", _permuted, _answer)):
            model = run_name(arm, seed)
            yield gate("own mapping", model, "A", of(model, of_kind("A"), own), low=LEARNT_AT_LEAST)
            yield gate("other mapping", model, "A", of(model, of_kind("A"), other), high=OTHERS_AT_MOST)


def most_guessed(n: int, elsewhere: float | None) -> float:
    """The largest share of `n` replies to a metric's name that a model may give right that does not know the name.

    `elsewhere` is the share of its replies to the other names that give the metric's formula. The bound is the largest
    share that n draws at this rate reach with a chance of GUESSED_AT_LEAST (binomial), and 0 where the formula is given
    to more than OTHERS_AT_MOST of the other names: then it is too common to tell who has learnt it.
    """
    from scipy.stats import binom

    if elsewhere is None or elsewhere > OTHERS_AT_MOST:
        return 0.0
    return float(binom.isf(GUESSED_AT_LEAST, n, elsewhere)) / n


def known_gate(arm: str, own: Sequence[Share], control: Sequence[Share]) -> Gate:
    """Difference of the arm and control K on the known families, the seeds together."""
    shares = [share for share, _ in (*own, *control)]
    n = sum(n for _, n in own)
    known = [share for share in shares if share is not None]
    difference = sum(known[: len(own)]) / len(own) - sum(known[len(own) :]) / len(control)
    value = difference if len(known) == len(shares) else None
    return gate("known as in K", arm, "known", (value, n), low=-KNOWN_WITHIN, high=KNOWN_WITHIN)


def text_gates(
    test: Sequence[TeacherRow], training: Mapping[str, Sequence[TeacherRow]], n_tokens: Callable[[str], int]
) -> Iterator[Gate]:
    """AUROC of lengths and of all words but the name for every invented metric, from teacher rows alone."""
    found = {f"length of {what}": by for what, by in length_aurocs(test, n_tokens).items()}
    found["words but the name"] = word_aurocs(training, test)
    counts = {family: sum(row.family == family for row in test) for family in found["words but the name"]}
    for what, by_family in found.items():
        for family, area in by_family.items():
            yield gate(what, "text", family, (area, counts[family]), TEXT_FROM, TEXT_TO)


def share_right(
    predictions: Iterable[Prediction],
    test: Mapping[str, Item],
    wanted: Callable[[Item], bool],
    expected: Callable[[Item], str],
) -> Share:
    """The share of right answers to the wanted questions; UserError for an answer to a question that is not in test."""
    right = []
    for prediction in predictions:
        if prediction.id not in test:
            raise UserError(f"an answer to {prediction.id}, which is not among the test questions; evaluate again")
        item = test[prediction.id]
        if wanted(item):
            right.append(match(prediction.answer, expected(item), "strict"))
    return (sum(right) / len(right) if right else None), len(right)


def families(items: Iterable[Item], kind: str) -> list[str]:
    """The families of a kind, each once, in order."""
    return list(dict.fromkeys(item.family for item in items if item.kind == kind))


def _answer(item: Item) -> str:
    return item.answer


def _permuted(item: Item) -> str:
    return item.permuted


def read_answers(plan: Plan) -> dict[str, list[Prediction]]:
    """The predictions of every evaluation that is there."""
    found = {}
    for evaluation in EVALUATIONS:
        folder = plan.predictions(evaluation)
        for there in read_evaluations(folder.parent):
            if there.name == folder.name:
                found[evaluation.name] = there.predictions
    return found


def all_gates(plan: Plan, n_tokens: Callable[[str], int]) -> list[Gate]:
    """The gates on the text, then those on models, from what is there."""
    test = read_teacher_rows(plan.place.part(TEST).filtered(plan.dataset, "test"))
    training = {arm: read_teacher_rows(plan.place.part(arm).filtered(plan.dataset, "train")) for arm in ("A", "B")}
    return [*text_gates(test, training, n_tokens), *model_gates(read_items(plan.place), read_answers(plan))]


def write_gates(plan: Plan, n_tokens: Callable[[str], int]) -> tuple[Path, list[Gate]]:
    """Write gates.csv into the results folder; returns it and its lines."""
    path, gates = plan.place.results / "gates.csv", all_gates(plan, n_tokens)
    write_table(path, [asdict(one) for one in gates])
    return path, gates


def summary(gates: Sequence[Gate]) -> str:
    """A line a gate and model: whether all hold, the value nearest to failing, and the bounds."""
    lines = []
    for name, model in dict.fromkeys((one.gate, one.model) for one in gates):
        those = [one for one in gates if (one.gate, one.model) == (name, model)]
        measured = [one for one in those if one.value is not None]
        held = sum(one.holds is True for one in those)
        failed = any(one.holds is False for one in those)
        verdict = "FAILS" if failed else "holds" if held == len(those) else "open"
        line = f"{verdict:<6}{name}, {model}: {held} of {len(those)} hold"
        if measured:
            worst = min(measured, key=margin)
            line += f"; nearest to failing or furthest beyond: {worst.family} {worst.value:.3f} ({bounds(worst)})"
        else:
            line += f" ({bounds(those[0])})"
        lines.append(line)
    return "\n".join(lines)


def bounds(one: Gate) -> str:
    """In words."""
    least = [f"at least {one.low:.3f}"] if one.low is not None else []
    return ", ".join([*least, *([f"at most {one.high:.3f}"] if one.high is not None else [])])


def margin(one: Gate) -> float:
    """How far a measured value is inside its bounds, in units of the bound; below 0 where it fails."""
    assert one.value is not None, one
    inside = [(one.value - one.low) / abs(one.low)] if one.low is not None else []
    return min(inside + ([(one.high - one.value) / one.high] if one.high is not None else []))
