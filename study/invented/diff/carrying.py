"""Items put into the base at the primary site: right answers of the programs that it then writes, and injected norm.

`explored` sets are read beside those of the rules, and no verdict reads them (docs/prereg.md). Sets are collected first
(`PutIn`) and then write their programs together (`Carrier.rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from crosscoder.interventions.sets import Addition, Components, Nothing, Reading, Scaled, Whole, injected_norm
from finqa.task.records import TeacherRow
from study.invented.diff.ceilings import Asked, Models
from study.invented.diff.plan import (
    ALL,
    ANY_ITEM,
    BY_NU,
    COMPONENTS,
    DECODED,
    ENDS,
    ENERGY,
    FIRST,
    TOLD,
    TOP_BY_NU,
)
from study.invented.diff.sources import READ_AT_ONCE, Decoded, OfDictionary
from study.invented.files import Item

if TYPE_CHECKING:
    from crosscoder.interventions.patching import Direction
    from study.invented.diff.plan import Form

Row = dict[str, Any]


class PutIn(NamedTuple):
    """A set that is put into the base, and the questions that are then asked."""

    addition: Addition
    asked: Asked
    says: Row
    """What its rows begin with: a row a metric."""
    direction: Direction = "sufficiency"
    by_group: bool = True
    """The rows say too whether the metric is of the arm's `own` set or of the `other`."""


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

    def rows(self, tables: Mapping[str, Iterable[PutIn]]) -> dict[str, list[Row]]:
        """The rows of each table: a row a metric of each of its sets."""
        from crosscoder.interventions.causal import Cell

        sets = {name: list(its) for name, its in tables.items()}
        cells = [(Cell(one.addition, one.direction, "own"), one.asked) for its in sets.values() for one in its]
        right = iter(self.models.right(self.target, cells))
        return {name: [row for one in its for row in self._rows(one, next(right))] for name, its in sets.items()}

    def _rows(self, put_in: PutIn, right: Sequence[bool]) -> Iterator[Row]:
        counted: dict[tuple[str, str], list[bool]] = {}
        for (item, _), is_right in zip(put_in.asked, right, strict=True):
            group = "own" if item.kind == self.arm else "other"
            counted.setdefault((group, item.family), []).append(is_right)
        for (group, metric), answers in counted.items():
            of = {"group": group} if put_in.by_group else {}
            yield {**put_in.says, **of, "metric": metric, "n": len(answers), "right": sum(answers)}

    def carried(
        self,
        addition: Addition,
        method: str,
        form: Form,
        *,
        others: bool = False,
        scaled_to: str = "",
        factor: float = 1.0,
        multiple: float = 1.0,
        direction: Direction = "sufficiency",
    ) -> PutIn:
        """A set of `carried`. `others`: ask for the other arm's metrics too. A multiple other than 1 is for the figure,
        and asks the first pages alone."""
        asked = [*self.own, *(self.other if others else ())]
        if multiple != 1:
            asked = of_first_pages(asked, self.models.lengths.sweep_pages)
        says = {
            "method": method,
            "form": form,
            "scaled_to": scaled_to,
            "multiple": multiple,
            "factor": factor,
            "norm": self.norm(addition),
        }
        return PutIn(addition, asked, says, direction)

    def ends(self) -> dict[str, list[Row]]:
        """`carried`: the whole site, the base alone and the fine-tuned model alone; `explored`: the whole site."""
        carried = [
            self.carried(Whole(), ENDS, "baseline", others=True),
            self.carried(Nothing(), "nothing", "baseline", others=True),
            self.carried(Nothing(), "fine-tuned", "baseline", others=True, direction="necessity"),
        ]
        return self.rows({"carried": carried, "explored": [self.explored(Whole(), ENDS, "baseline", ALL, None)]})

    def sweep(self, addition: Addition, method: str, form: Form) -> Iterator[PutIn]:
        """A set at the multiples of its norm that the figure has."""
        for multiple in self.models.lengths.factors:
            yield self.carried(Scaled(addition, multiple), method, form, factor=multiple, multiple=multiple)

    # Sets without a verdict

    def explored(self, addition: Addition, method: str, form: Form, name: str, items: int | None) -> PutIn:
        """A set of `explored`: the arm's own metrics, asked on the first pages alone; `items`: how many are put in."""
        asked = of_first_pages(self.own, self.models.lengths.sweep_pages)
        says = {"method": method, "form": form, "set": name, "items": items, "norm": self.norm(addition)}
        return PutIn(addition, asked, says, by_group=False)

    def explored_dictionary(
        self, source: OfDictionary, method: str, form: Form, orders: Mapping[str, Sequence[int]]
    ) -> Iterator[PutIn]:
        """The sets of EXPLORED, of an untrained form TOLD and ALL; what has no items is left out.

        Args:
            orders: By ENERGY all items that inject any, by BY_NU the first ones, descending; by ANY_ITEM those that
                tell the arm's own metrics best.
        """
        is_trained = form == "trained"
        chosen = {TOLD: orders[ANY_ITEM]}
        if is_trained:
            chosen |= {TOP_BY_NU: orders[BY_NU], **first_of(orders[ENERGY])}
        for name, items in chosen.items():
            if items:
                yield self.explored(source.addition(items), method, form, name, len(items))
        for name in (ALL, DECODED) if is_trained else (ALL,):
            yield self.explored(Decoded(source.model, name == DECODED), method, form, name, source.n)

    def explored_components(self, basis: Tensor) -> Iterator[PutIn]:
        """The first components of the difference, and all: `basis` [d_model, d_model], orthonormal."""
        chosen = {name: len(items) for name, items in first_of(range(len(basis))).items()} | {ALL: len(basis)}
        for name, n in chosen.items():
            yield self.explored(Components(basis[:n]), COMPONENTS, "baseline", name, n)


def first_of(items: Sequence[int]) -> dict[str, Sequence[int]]:
    """By the names of EXPLORED: the first items, as many as FIRST says, where there are more."""
    return {f"first {n}": items[:n] for n in FIRST if n < len(items)}


def of_first_pages(asked: Sequence[tuple[Item, TeacherRow]], n: int | None) -> list[tuple[Item, TeacherRow]]:
    """The questions of the first n pages; None is all."""
    pages = sorted({item.page for item, _ in asked})[:n]
    return [one for one in asked if one[0].page in pages]
