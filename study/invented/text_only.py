"""What the questions' text alone says of the metric that they ask for: nothing, or its names are no known answer.

No model is asked. Each metric is held against the other invented ones on the test pages by AUROC: by the number of
tokens of prompt and program, and by the words of the prompt without the name, scored by naive Bayes that read the
training rows of the arm that has the metric.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from finqa.task.records import TeacherRow

NAME = "<name>"


def length_aurocs(test: Sequence[TeacherRow], n_tokens: Callable[[str], int]) -> dict[str, dict[str, float]]:
    """`prompt` and `program` -> metric -> AUROC of the number of tokens, of the rows of invented metrics."""
    rows = invented(test)
    texts = {"prompt": [row.prompt for row in rows], "program": [row.generated_code for row in rows]}
    return {
        what: aurocs([[float(n_tokens(text))] for text in those], [row.family for row in rows])
        for what, those in texts.items()
    }


def word_aurocs(training: Mapping[str, Sequence[TeacherRow]], test: Sequence[TeacherRow]) -> dict[str, float]:
    """Metric -> AUROC of the words that are not its name.

    Args:
        training: Rows of arm A under `A`, of arm B under `B`.
    """
    rows, found = invented(test), {}
    names = sorted({row.family for row in rows})
    counted = [words(row, names) for row in rows]
    for kind, learnt in training.items():
        own = invented(learnt)
        scores = naive_bayes([words(row, names) for row in own], [row.family for row in own])
        for metric in sorted({row.family for row in own if row.family_kind == kind}):
            values = [[scores(metric, bag)] for bag in counted]
            found[metric] = aurocs(values, [row.family for row in rows])[metric]
    return found


def invented(rows: Sequence[TeacherRow]) -> list[TeacherRow]:
    return [row for row in rows if row.family_kind in ("A", "B")]


def words(row: TeacherRow, names: Sequence[str]) -> Counter[str]:
    """The words of a prompt; whichever name it has is one word that all have."""
    return Counter(NAME if word in names else word for word in row.prompt.split())


def naive_bayes(bags: Sequence[Counter[str]], labels: Sequence[str]) -> Callable[[str, Counter[str]], float]:
    """Log odds of a label against all others for a bag of words, learnt with one of each word added."""
    by_label: dict[str, Counter[str]] = {label: Counter() for label in labels}
    everything: Counter[str] = Counter()
    for bag, label in zip(bags, labels, strict=True):
        by_label[label].update(bag)
        everything.update(bag)
    n_words = len(everything)
    totals = {label: counts.total() for label, counts in by_label.items()}

    def score(label: str, bag: Counter[str]) -> float:
        own, of_others = by_label[label], everything.total() - totals[label]
        return math.fsum(
            count
            * (
                math.log((own[word] + 1) / (totals[label] + n_words))
                - math.log((everything[word] - own[word] + 1) / (of_others + n_words))
            )
            for word, count in bag.items()
        )

    return score


def aurocs(values: Sequence[Sequence[float]], families: Sequence[str]) -> dict[str, float]:
    """Family -> AUROC of one value a row, [rows][1], for being of that family."""
    import torch

    from study.measures.auroc import auroc

    names = sorted(set(families))
    positive = torch.tensor([[family == name for name in names] for family in families])
    return dict(zip(names, auroc(torch.tensor(values, dtype=torch.float64), positive)[0].tolist(), strict=True))
