"""What a dictionary does on each part of the documents: the kinds of token that activations.layout tells apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.layout import KINDS, TEMPLATE, layout, spelling
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.measures import ExplainedVariance
from crosscoder.dictionaries.config import N_MODELS, READ_TOKENS
from crosscoder.dictionaries.model import BatchTopKCrosscoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_kinds(store: ActivationStore, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[tokens] int64: index into KINDS of every token of a set."""
    return recorded_kinds(store, tokenizer)[store.recorded.kept]


def recorded_kinds(store: ActivationStore, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[recorded] int64: the same of outliers too; found by the ids where the set does not store it."""
    recorded = store.recorded
    if recorded.kind is not None:
        return recorded.kind
    spelled = spelling(tokenizer, recorded.token_id.unique().tolist())
    kinds: list[int] = []
    for its in recorded.by_document():
        n_prompt = int((recorded.position[its] < store.documents[int(recorded.document[its.start])].n_prompt).sum())
        kinds += layout(recorded.token_id[its].tolist(), n_prompt, spelled)
    return torch.tensor(kinds)


class KindExplained(NamedTuple):
    """Explained variance on the tokens of one kind."""

    kind: str
    """One of KINDS, or `template` for chat and frame together, or `all`."""
    n_tokens: int
    l0: float
    own_mean: ExplainedVariance
    """Distances are from the mean of these very tokens: the definition of `explained_variance`, applied to them alone.
    It asks for what varies among them; that they are of this kind explains nothing."""
    common_mean: ExplainedVariance
    """Distances are from the mean of all tokens given: the figures of the kinds, weighted by their shares of the
    variance, average to the figure of all."""
    share_of_variance: float
    """These tokens' part of the difference's squared distances from its mean over all tokens."""
    share_of_error: float
    """These tokens' part of the difference's squared errors."""


@dataclass
class _KindSums:
    """fp64 sums by kind for one target of width d; `shift` keeps the difference of large sums exact."""

    errors: Tensor
    """[kind]"""
    squares: Tensor
    """[kind]: of distances from the shift."""
    sums: Tensor
    """[kind, d]: the same, not squared."""
    shift: Tensor | None = None

    @classmethod
    def of(cls, d: int, device: torch.device) -> _KindSums:
        zeros = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), torch.zeros(len(KINDS), d, dtype=torch.float64, device=device))

    def add(self, kinds: Tensor, x: Tensor, xhat: Tensor) -> None:
        """[n] kinds, [n, d] targets and reconstructions."""
        x, xhat = x.double(), xhat.double()
        if self.shift is None:
            self.shift = x.mean(dim=0)
        centred = x - self.shift
        self.errors.index_add_(0, kinds, (x - xhat).pow(2).sum(dim=-1))
        self.squares.index_add_(0, kinds, centred.pow(2).sum(dim=-1))
        self.sums.index_add_(0, kinds, centred)

    def error(self, members: Tensor) -> float:
        return float(self.errors[members].sum())

    def total(self, members: Tensor, counts: Tensor, common: bool) -> float:
        """Squared distances of the members' tokens from their own mean, or from that of all tokens."""
        over = torch.arange(len(KINDS), device=counts.device) if common else members
        mean = self.sums[over].sum(dim=0) / counts[over].sum()
        sums, n = self.sums[members].sum(dim=0), counts[members].sum()
        return float(self.squares[members].sum() - 2 * mean @ sums + n * mean @ mean)


@torch.no_grad()
def explained_variance_by_kind(
    model: BatchTopKCrosscoder, store: ActivationStore, indices: Tensor, kinds: Tensor, batch_size: int = READ_TOKENS
) -> list[KindExplained]:
    """Explained variance on the tokens at `indices` of the store, by the inference threshold, kind by kind.

    One pass. `kinds` [tokens of the store] is token_kinds'. First all tokens, then the template, then every kind that
    occurs; where all are of one kind, that is left out. Models in scaled space and the difference in the models' own
    units, as explained_variance has them.
    """
    device = model.b_dec.device
    kinds = kinds.to(device)
    inputs = [_KindSums.of(model.config.d_model, device) for _ in range(model.config.n_inputs)]
    difference = _KindSums.of(model.config.d_model, device)
    counts = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
    active = torch.zeros_like(counts)
    for chunk, raw in store.batches(indices, batch_size, "explained variance, tokens"):
        raw = raw.to(device)
        x, own = model.scale(raw), kinds[chunk.to(device)]
        f, xhat = model.reconstruct(x)
        counts.index_add_(0, own, torch.ones(len(own), dtype=torch.float64, device=device))
        active.index_add_(0, own, (f > 0).sum(dim=-1).double())
        for m, sums in enumerate(inputs):
            sums.add(own, x[:, m], xhat[:, m])
        truth = model.difference(model.inputs(raw).double())
        difference.add(own, truth, model.difference(model.unscale(xhat.double())))
    groups = {"all": KINDS, "template": TEMPLATE, **{kind: (kind,) for kind in KINDS}}
    found = []
    for name, members in groups.items():
        at = torch.tensor([KINDS.index(kind) for kind in members], device=device)
        if 0 < counts[at].sum() < counts.sum() or name == "all":
            found.append(_explained(name, at, inputs, difference, counts, active))
    return found


def _explained(
    name: str, at: Tensor, inputs: list[_KindSums], difference: _KindSums, counts: Tensor, active: Tensor
) -> KindExplained:
    n, l0 = int(counts[at].sum()), float(active[at].sum() / counts[at].sum())
    every = torch.arange(len(KINDS), device=at.device)

    def explained(common: bool) -> ExplainedVariance:
        totals = [sums.total(at, counts, common) for sums in inputs]
        errors = [sums.error(at) for sums in inputs]
        two = len(inputs) == N_MODELS
        return ExplainedVariance(
            instruct=_one_less(errors[0], totals[0]) if two else None,
            fine_tuned=_one_less(errors[1], totals[1]) if two else None,
            joint=_one_less(sum(errors), sum(totals)) if two else None,
            difference=_one_less(difference.error(at), difference.total(at, counts, common)),
            l0=l0,
            n_tokens=n,
        )

    return KindExplained(
        kind=name,
        n_tokens=n,
        l0=l0,
        own_mean=explained(common=False),
        common_mean=explained(common=True),
        share_of_variance=_part(difference.total(at, counts, True), difference.total(every, counts, True)),
        share_of_error=_part(difference.error(at), difference.error(every)),
    )


def _one_less(error: float, total: float) -> float:
    """Not a number where nothing varies, as on a single token."""
    return 1 - error / total if total > 0 else float("nan")


def _part(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def kind_rows(found: Iterable[KindExplained]) -> list[dict[str, Any]]:
    """A flat row a kind, to be written as CSV or JSON; what is not a number or does not apply is None."""
    figures = ("instruct", "fine_tuned", "joint", "difference")
    rows = []
    for each in found:
        row: dict[str, Any] = {"kind": each.kind, "n_tokens": each.n_tokens, "l0": each.l0}
        row |= {name: getattr(each.own_mean, name) for name in figures}
        row |= {f"{name}_common_mean": getattr(each.common_mean, name) for name in figures}
        row |= {name: getattr(each, name) for name in ("share_of_variance", "share_of_error")}
        rows.append({name: None if value != value else value for name, value in row.items()})
    return rows
