"""What a dictionary explains on each kind of token (activations.layout): template, page, table, question, program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.layout import KINDS, TEMPLATE, layout, mark_up, token_texts
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.measures import ExplainedVariance, VarianceSums
from crosscoder.dictionaries.config import READ_TOKENS
from crosscoder.dictionaries.model import BatchTopKCrosscoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_kinds(store: ActivationStore, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[tokens] int64: index into KINDS of every token of a set."""
    return recorded_kinds(store, tokenizer)[store.recorded.kept]


def recorded_kinds(store: ActivationStore, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[recorded] int64: the same for all recorded tokens, outliers included. By the ids where the set has no kinds."""
    recorded = store.recorded
    if recorded.kind is not None:
        return recorded.kind
    spelled, marks = token_texts(tokenizer, recorded.token_id.unique().tolist()), mark_up(tokenizer)
    kinds: list[int] = []
    for its in recorded.by_document():
        n_prompt = int((recorded.position[its] < store.documents[int(recorded.document[its.start])].n_prompt).sum())
        kinds += layout(recorded.token_id[its].tolist(), n_prompt, spelled, marks)
    return torch.tensor(kinds)


class KindExplained(NamedTuple):
    """Explained variance on the tokens of one kind."""

    kind: str
    """One of KINDS, or `template` for chat and frame together, or `all`."""
    own_mean: ExplainedVariance
    """Distances are from the mean of these very tokens: `explained_variance` on them alone. What all tokens of the kind
    have in common counts for nothing."""
    common_mean: ExplainedVariance
    """Distances are from the mean of all tokens given: the figures of the kinds, weighted by their shares of the
    variance, average to the figure of all."""
    share_of_variance: float
    """These tokens' part of the difference's squared distances from its mean over all tokens."""
    share_of_error: float
    """These tokens' part of the difference's squared errors."""


def explained_variance_by_kind(
    model: BatchTopKCrosscoder, store: ActivationStore, indices: Tensor, kinds: Tensor, batch_size: int = READ_TOKENS
) -> list[KindExplained]:
    """Explained variance on the tokens at `indices` of the store, by the inference threshold, kind by kind.

    One pass. `kinds` [tokens of the store] is token_kinds'. First all tokens, then the template, then every kind that
    occurs; where all are of one kind, that is left out.
    """
    sums = VarianceSums(model, len(KINDS))
    for chunk, raw in store.batches(indices, batch_size, "explained variance, tokens"):
        sums.add(raw, kinds[chunk])
    counts, difference, every = sums.difference.counts, sums.difference, range(len(KINDS))
    found = []
    for name, members in {"all": KINDS, "template": TEMPLATE, **{kind: (kind,) for kind in KINDS}}.items():
        at = [KINDS.index(kind) for kind in members]
        if 0 < counts[at].sum() < counts.sum() or name == "all":
            found.append(
                KindExplained(
                    kind=name,
                    own_mean=sums.explained(at),
                    common_mean=sums.explained(at, common_mean=True),
                    share_of_variance=_part(difference.total(at, True), difference.total(every, True)),
                    share_of_error=_part(difference.error(at), difference.error(every)),
                )
            )
    return found


def _part(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def kind_rows(found: Iterable[KindExplained]) -> list[dict[str, Any]]:
    """One flat row per kind, to be written as CSV or JSON; NaN, and what does not apply, is None."""
    figures = ("instruct", "fine_tuned", "joint", "difference")
    rows = []
    for each in found:
        row: dict[str, Any] = {"kind": each.kind, "n_tokens": each.own_mean.n_tokens, "l0": each.own_mean.l0}
        row |= {name: getattr(each.own_mean, name) for name in figures}
        row |= {f"{name}_common_mean": getattr(each.common_mean, name) for name in figures}
        row |= {name: getattr(each, name) for name in ("share_of_variance", "share_of_error")}
        rows.append({name: None if value != value else value for name, value in row.items()})
    return rows
