"""From scored rows to figures: accuracy with its interval, of all rows and of groups, errors, and paired tests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from finqa.evaluation.predictions import PREDICTION_ERROR_KINDS, Prediction
from finqa.task.answers import RULES, Rule

METRIC_OF_RULE: dict[Rule, str] = {
    "strict": "accuracy",
    "relaxed": "accuracy_relaxed",
    "reported": "accuracy_reported_rule",
}
HEADLINES: tuple[Rule, ...] = ("strict", "relaxed")
"""The rules whose figures stand side by side."""

GROUPED_BY = {"family": "family", "family_kind": "family_kind", "answer_kind": "answer_kind", "steps": "program_steps"}
"""Names of groups in metrics.json, with the field of a prediction that they follow."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); (0, 1) where n is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two evaluations of the same rows differ in accuracy by chance.

    The arguments count the rows that only one of them has right; under the null each is a fair coin.
    """
    from scipy.stats import binomtest

    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def compare(
    first: Iterable[Prediction], second: Iterable[Prediction], rule: Rule = "strict"
) -> tuple[int, int, int, float]:
    """Rows in both, rows that only the first and only the second has right under `rule`, and McNemar's p."""
    of_first = {p.id: p.correct[rule] for p in first}
    pairs = [(of_first[p.id], p.correct[rule]) for p in second if p.id in of_first]
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return len(pairs), only_first, only_second, mcnemar(only_first, only_second)


def metrics(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The content of metrics.json that follows from the predictions alone.

    Figures are under the strict rule where their name has no other (`accuracy_relaxed`, `accuracy_reported_rule`).
    `accuracy_undisputed` leaves out the rows whose label is disputed, and is there where any row has a stated answer. A
    share of no rows is None. Where rows were sampled, all of these are of the voted answers, and the samples have
    figures of their own, under the strict rule. Raises ValueError for an error kind that is none of
    PREDICTION_ERROR_KINDS.
    """
    n = len(predictions)
    if unknown := {p.error_kind for p in predictions if p.error_kind} - set(PREDICTION_ERROR_KINDS):
        raise ValueError(f"unknown error kind {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {"n": n}
    result |= _accuracy(predictions, RULES)
    if any(p.teacher_solved is not None for p in predictions):
        solved = [p for p in predictions if p.teacher_solved]
        result |= _accuracy(solved, ("strict",), "_teacher_solved") | {"n_teacher_solved": len(solved)}
    if any(p.label_disputed is not None for p in predictions):
        undisputed = [p for p in predictions if not p.label_disputed]
        result |= _accuracy(undisputed, HEADLINES, "_undisputed") | {"n_undisputed": len(undisputed)}
    result["share_runs"] = _mean([p.error_kind is None for p in predictions])
    result["errors_by_kind"] = dict(Counter(p.error_kind for p in predictions if p.error_kind).most_common())
    result["finish_reasons"] = dict(Counter(p.finish_reason for p in predictions).most_common())
    result["tokens"] = {
        "prompt": sum(p.n_prompt_tokens for p in predictions),
        "new": sum(p.n_new_tokens for p in predictions),
    }
    if any(p.samples for p in predictions):
        result |= _of_samples(predictions)
    for name, field in GROUPED_BY.items():
        groups: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            if (value := getattr(prediction, field)) not in ("", None):
                groups[str(value)].append(prediction)
        if groups:
            result[f"accuracy_by_{name}"] = {
                group: _mean([p.correct["strict"] for p in rows]) for group, rows in sorted(groups.items())
            }
            result[f"by_{name}"] = {group: _group(rows) for group, rows in sorted(groups.items())}
    return result


def _of_samples(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What single samples are worth. The samples of a row are not independent, so their share has no interval here."""
    of_rows = [p.samples for p in predictions if p.samples]
    samples = [sample for of_row in of_rows for sample in of_row]
    return {
        "samples_per_row": max(map(len, of_rows)),
        "accuracy_per_sample": _mean([sample.correct for sample in samples]),
        "share_runs_per_sample": _mean([sample.error_kind is None for sample in samples]),
        **_share("any_sample_right", [any(sample.correct for sample in of_row) for of_row in of_rows]),
    }


def _group(rows: Sequence[Prediction]) -> dict[str, Any]:
    kinds = {p.family_kind for p in rows}
    kind = {"kind": kinds.pop()} if len(kinds) == 1 and "" not in kinds else {}
    runs = _mean([p.error_kind is None for p in rows])
    return {"n": len(rows), **kind, **_accuracy(rows, HEADLINES), "share_runs": runs}


def _accuracy(rows: Sequence[Prediction], rules: Sequence[Rule], of: str = "") -> dict[str, Any]:
    """Accuracy under each of the rules, with its interval; `of` ends the names."""
    return {
        name: figure
        for rule in rules
        for name, figure in _share(METRIC_OF_RULE[rule] + of, [p.correct[rule] for p in rows]).items()
    }


def _share(name: str, verdicts: Sequence[bool]) -> dict[str, Any]:
    return {name: _mean(verdicts), f"{name}_interval": list(wilson(sum(verdicts), len(verdicts)))}


def _mean(verdicts: Sequence[bool]) -> float | None:
    return sum(verdicts) / len(verdicts) if verdicts else None
