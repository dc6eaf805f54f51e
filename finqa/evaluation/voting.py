"""Self-consistency (Wang et al. 2022): the answer that most samples agree on."""

from __future__ import annotations

from collections.abc import Sequence

from finqa.task.answers import match, normalise

Answer = float | str | bool | None


def majority(answers: Sequence[Answer]) -> int | None:
    """Place of the first of the answers that most samples gave; None where no sample has an answer.

    Two answers are one where the strict rule says so of the later and the first of its group. Of groups of one size the
    first seen wins.
    """
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        if normalise(answer) is None:
            continue
        for group in groups:
            if match(answer, answers[group[0]]):
                group.append(place)
                break
        else:
            groups.append([place])
    return max(groups, key=len)[0] if groups else None
