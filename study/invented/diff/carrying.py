"""Items put into the base at the primary site: right answers of the programs that it then writes, and injected norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from crosscoder.interventions.sets import Addition, Reading, Scaled, injected_norm
from finqa.task.records import TeacherRow
from study.invented.diff.ceilings import Models
from study.invented.files import Item

if TYPE_CHECKING:
    from study.invented.diff.plan import Form

READ_AT_ONCE = 4096


class Carrier:
    """The base with its fine-tune, and the test questions of both arms' metrics."""

    def __init__(self, models: Models, target: Target, asked: Sequence[tuple[Item, TeacherRow]], arm: str):
        from crosscoder.activations.collection import documents_from_rows
        from study.invented.diff.readings import patched_pairs

        self.models, self.target, self.arm = models, target, arm
        asked = of_first_pages(asked, models.lengths.carry_pages)
        self.own = [one for one in asked if one[0].kind == arm]
        self.other = [one for one in asked if one[0].kind != arm]
        documents = documents_from_rows([row for _, row in self.own], models.tokenizer)
        self.pairs: Tensor = patched_pairs(models.pair, target, documents)
        """[tokens, 2, d_model]: of the arm's own questions with their gold programs, where patches are."""

    @torch.no_grad()
    def norm(self, addition: Addition) -> float:
        """Root mean square length of what is added, over all patched tokens of the own questions."""
        return injected_norm(addition, (Reading(part) for part in self.pairs.split(READ_AT_ONCE)))

    def scaled_to(self, addition: Addition, norm: float) -> tuple[Scaled, float]:
        """The addition at another norm, and the factor; an addition of nothing stays that."""
        own = self.norm(addition)
        factor = norm / own if own > 0 else 0.0
        return Scaled(addition, factor), factor

    def rows(
        self,
        addition: Addition,
        method: str,
        form: Form,
        *,
        others: bool = False,
        scaled_to: str = "",
        factor: float = 1.0,
        multiple: float = 1.0,
        direction: Any = "sufficiency",
    ) -> list[dict[str, Any]]:
        """A row a metric. `others`: ask for the other arm's metrics too. A multiple other than 1 is for the figure, and
        asks the first pages alone."""
        from crosscoder.interventions.causal import Cell

        asked = [*self.own, *(self.other if others else ())]
        if multiple != 1:
            asked = of_first_pages(asked, self.models.lengths.sweep_pages)
        right = self.models.right(self.target, Cell(addition, direction, "own"), asked)
        norm = self.norm(addition)
        counted: dict[tuple[str, str], list[bool]] = {}
        for (item, _), is_right in zip(asked, right, strict=True):
            group = "own" if item.kind == self.arm else "other"
            counted.setdefault((group, item.family), []).append(is_right)
        return [
            {
                "method": method,
                "form": form,
                "scaled_to": scaled_to,
                "multiple": multiple,
                "factor": factor,
                "norm": norm,
                "group": group,
                "metric": metric,
                "n": len(answers),
                "right": sum(answers),
            }
            for (group, metric), answers in counted.items()
        ]


def of_first_pages(asked: Sequence[tuple[Item, TeacherRow]], n: int | None) -> list[tuple[Item, TeacherRow]]:
    """The questions of the first n pages; None is all."""
    pages = sorted({item.page for item, _ in asked})[:n]
    return [one for one in asked if one[0].page in pages]
