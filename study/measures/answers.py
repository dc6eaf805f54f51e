"""The figures of study.measures.known_answer as records: JSON in full, CSV a row a stratum."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from study.measures.auroc import Estimate
from study.measures.exclusivity import Exclusivity
from study.measures.selectivity import Selectivity
from study.measures.strata import Stratum
from study.measures.token_truth import TokenTruth


@dataclass(frozen=True)
class ExclusivityAnswer:
    """Does a measure of exclusivity tell which items are specific to an added family?"""

    measure: str
    added_against_rest: Estimate
    """The primary figure: over active items, AUROC of the measure for being specific to an added family. Nothing is cut
    on the measure."""
    added_against_known: Estimate
    """That figure over items that are specific to some family: new families against known ones."""
    correlation: float | None
    """Spearman's, over active items, of the measure and the item's largest AUROC for an added family on the scoring
    half: no cut at all. None where either has one value throughout."""
    n_correlation: int


@dataclass(frozen=True)
class ClassAnswer:
    """What the items of a class find. An empty class has n 0 and no figure."""

    name: str
    """`all active`, or a class of fine-tuned-only items (exclusivity.Exclusivity.classes)."""
    n: int
    """Active items of the class."""
    found: tuple[str, ...]
    """Added families for which the class's best item of the choosing half is specific on the other half."""
    found_known: tuple[str, ...]
    """Known families for which it is so."""
    recall: Estimate
    """Share of the added families that are found."""
    precision: Estimate
    """Share of the items whose best family is an added one; to be held against StratumAnswer.best_is_added."""
    specific_to_added: int
    specific_to_known: int


@dataclass(frozen=True)
class StratumAnswer:
    """On the tokens of one stratum. Items are chosen on half of the pages, and scored on the other half."""

    stratum: Stratum
    n_chosen: int
    """Questions of the choosing half."""
    n_scored: int
    specific_to_added: int
    """Active items whose best family on the choosing half is an added one, and whose AUROC for it on the other half is
    at least Settings.selective_at; AUROC within pages (selectivity.auroc_within)."""
    specific_to_known: int
    over_all_pages_added: int
    """That count for added families where their questions are compared with all others, on whatever page and template:
    what the page and the template give away counts too."""
    over_all_pages_known: int
    best_is_added: Estimate
    """Share of all active items whose best family is an added one."""
    best_items: dict[str, Estimate]
    """Family -> AUROC, on the scoring half, of the active item that the choosing half likes best for it."""
    exclusivity: tuple[ExclusivityAnswer, ...]
    classes: tuple[ClassAnswer, ...]
    null_p: dict[str, float]
    """Family -> p of its best item, of all questions, against labels permuted within templates."""
    null_q: dict[str, float]
    """That p, adjusted over the families by Benjamini and Hochberg."""
    significant_for_added: int
    """Items that beat the null for an added family (nulls.PermutationNull.significant)."""
    significant_for_known: int
    probe: dict[str, dict[str, float | None]]
    """instruct, fine-tuned, difference -> family -> AUROC of a linear probe (study.measures.probe)."""


@dataclass(frozen=True)
class KnownAnswer:
    """The answer for one subject on one pair of models."""

    pair: str
    subject: str
    n_questions: int
    n_pages: int
    n_tokens: int
    n_items: int
    n_alive: int
    """Items that are active on some token of the set."""
    added: tuple[str, ...]
    known: tuple[str, ...]
    n_unreliable: int | None
    """Active items whose nu_err cannot be trusted, and which its figures leave out; None without latent scaling."""
    strata: tuple[StratumAnswer, ...]
    tokens: TokenTruth | None
    alive: Tensor = field(repr=False)
    """[items] bool. This and the next two are for further use, and not in the JSON."""
    selectivity: dict[Stratum, Selectivity] = field(repr=False)
    exclusivity: Exclusivity = field(repr=False)

    def of(self, stratum: Stratum) -> StratumAnswer:
        return next(answer for answer in self.strata if answer.stratum == stratum)

    def as_json(self) -> dict[str, Any]:
        """Numbers, text, lists and None."""
        kept = [
            f.name for f in fields(self) if f.name not in ("alive", "selectivity", "exclusivity", "tokens", "strata")
        ]
        tokens = None
        if self.tokens is not None:
            tokens = {f.name: getattr(self.tokens, f.name) for f in fields(self.tokens) if f.name != "auroc"}
            tokens |= {name: asdict(getattr(self.tokens, name)) for name in ("best", "decoded")}
        strata = [asdict(answer) for answer in self.strata]
        return {name: getattr(self, name) for name in kept} | {"strata": strata, "tokens": tokens}

    def rows(self) -> list[dict[str, Any]]:
        """A flat row a stratum, for a CSV; what there is no figure for is None."""
        return [self._row(answer) for answer in self.strata]

    def item_rows(self, stratum: Stratum) -> list[dict[str, Any]]:
        """A flat row an item: its best family, AUROC on both halves, how exclusive it is."""
        selective, families = self.selectivity[stratum], sorted((*self.added, *self.known))
        columns = {
            "alive": self.alive.tolist(),
            "best_family": [families[f] for f in selective.best.tolist()],
            "chosen": selective.chosen.gather(1, selective.best[:, None])[:, 0].tolist(),
            "scored": selective.best_scored.tolist(),
            **{name: [v if v == v else None for v in of.tolist()] for name, of in self.exclusivity.measures.items()},
            **{f"class {name}": members.tolist() for name, members in self.exclusivity.classes.items()},
        }
        return [{"item": j, **{name: values[j] for name, values in columns.items()}} for j in range(len(self.alive))]

    def _row(self, answer: StratumAnswer) -> dict[str, Any]:
        row: dict[str, Any] = {"pair": self.pair, "subject": self.subject, "stratum": answer.stratum}
        row |= {"n_questions": self.n_questions, "n_items": self.n_items, "n_alive": self.n_alive}
        row |= {"specific_to_added": answer.specific_to_added, "specific_to_known": answer.specific_to_known}
        row |= {"over all pages: added": answer.over_all_pages_added}
        row |= {"over all pages: known": answer.over_all_pages_known}
        row |= {"significant_for_added": answer.significant_for_added}
        row |= {"significant_for_known": answer.significant_for_known}
        for of in answer.exclusivity:
            for name in ("added_against_rest", "added_against_known"):
                estimate: Estimate = getattr(of, name)
                row |= {f"{of.measure}: {name}": estimate.value, f"{of.measure}: {name} low": estimate.low}
                row |= {f"{of.measure}: {name} high": estimate.high, f"{of.measure}: {name} n": estimate.n}
            row[f"{of.measure}: correlation"] = of.correlation
        for its in answer.classes:
            row |= {f"{its.name}: n": its.n, f"{its.name}: recall": its.recall.value}
            row |= {f"{its.name}: precision": its.precision.value}
        for name, areas in answer.probe.items():
            of_added = [area for family, area in areas.items() if family in self.added and area is not None]
            row[f"probe {name}: added"] = sum(of_added) / len(of_added) if of_added else None
        return row
