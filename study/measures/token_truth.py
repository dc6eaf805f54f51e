"""Truth token by token: the tokens that fine-tuning fixed, and what tells them from others.

A token is *fixed* where a model without the new families (the sham, or the instruct model) predicts it wrongly and the
fine-tuned model rightly; both read the gold program. An activation at a position predicts the token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from crosscoder.activations.collection import Document, padded
from crosscoder.activations.store import ActivationStore
from study.measures.auroc import Estimate, auroc_estimate, auroc_interval, auroc_sparse
from study.measures.probe import logistic
from study.measures.readouts import BATCH_TOKENS, Subject, difference
from study.measures.strata import STRATA, Questions

TokenGroup = Literal["fixed", "other predicted", "passage", "rest"]
TOKEN_GROUPS: tuple[TokenGroup, ...] = get_args(TokenGroup)
"""`fixed` and `other predicted`: tokens whose next one is of the program or its end. `passage`: the stratum."""
NOT_PREDICTED = -1


@dataclass(frozen=True)
class TokenTruth:
    """How well the items of one subject tell fixed tokens from other predicted ones."""

    n_tokens: dict[TokenGroup, int]
    share_in_added_families: float | None
    """Share of the fixed tokens that are in questions of an added family; None without a fixed token."""
    mean_square_norm: dict[TokenGroup, float | None]
    """Mean square norm of x[1] - x[0], in the models' own units; None for an empty group."""
    best_item: int | None
    """The item of the largest AUROC on the choosing half; None where a half lacks fixed or other predicted tokens."""
    best: Estimate
    """Its AUROC on the other half. Tokens of one question are not independent: the interval is too narrow."""
    decoded: Estimate
    """AUROC, on the same half, of the norm of all that the subject decodes for the difference."""
    auroc: Tensor
    """[items] fp64: of every item on the other half."""


def token_groups(store: ActivationStore, questions: Questions, fixed: Tensor) -> Tensor:
    """[tokens] int64, index into TOKEN_GROUPS, from a mask of the fixed tokens [tokens]."""
    n_ids = torch.tensor([document.n_ids for document in store.documents])[store.document]
    n_prompt = torch.tensor([document.n_prompt for document in store.documents])[store.document]
    predicted = (store.position >= n_prompt - 1) & (store.position < n_ids - 1)
    groups = torch.full_like(store.position, TOKEN_GROUPS.index("rest"))
    groups[questions.stratum == STRATA.index("passage")] = TOKEN_GROUPS.index("passage")
    groups[predicted] = TOKEN_GROUPS.index("other predicted")
    groups[predicted & fixed] = TOKEN_GROUPS.index("fixed")
    return groups


def fixed_tokens(
    store: ActivationStore, without: Sequence[Tensor], fine_tuned: Sequence[Tensor], ids: Sequence[Sequence[int]]
) -> Tensor:
    """[tokens] bool, from the next tokens that two models predict (`predictions`) and the documents' ids, all in the
    order of store.documents."""
    rows = []
    for before, after, true in zip(without, fine_tuned, ids, strict=True):
        following = torch.tensor([*true[1:], NOT_PREDICTED])
        rows.append((before != following) & (after == following) & (following != NOT_PREDICTED))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[store.document, store.position]


class NextTokens(NamedTuple):
    """What a model predicts after every token of one document, from the last of the prompt on; on the CPU."""

    best: Tensor
    """[ids] int64: the best next token, NOT_PREDICTED before the last token of the prompt."""
    log_probs: Tensor
    """[completion + 1, vocabulary] fp16."""


@torch.no_grad()
def predictions(model: Any, documents: Sequence[Document], batch_size: int = 64) -> list[NextTokens]:
    """Next-token predictions for each document, by the model as it is: in eval mode, on its device."""
    result: list[Any] = [None] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, _ = padded([documents[i].ids for i in batch], None)
        first = min(documents[i].n_prompt for i in batch) - 1
        output = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=ids.shape[1] - first)
        for logits, i in zip(output.logits, batch, strict=True):
            own, n = documents[i].n_prompt - 1, len(documents[i].ids)
            its = logits[own - first : n - first]
            best = torch.full((n,), NOT_PREDICTED)
            best[own:] = its.argmax(dim=-1).cpu()
            result[i] = NextTokens(best, its.float().log_softmax(dim=-1).half().cpu())
    return result


@torch.no_grad()
def token_truth(
    subject: Subject, store: ActivationStore, questions: Questions, groups: Tensor, choosing: Tensor
) -> TokenTruth:
    """How well a subject's items tell `token_groups` apart, in one pass over the set. The best item is chosen on the
    pages of `choosing` [questions] bool and scored on the others."""
    counts = torch.bincount(groups, minlength=len(TOKEN_GROUPS))
    squares = torch.zeros(len(TOKEN_GROUPS), dtype=torch.float64)
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    n_items = 0
    norms = torch.full((len(store),), torch.nan)
    for chunk, raw in store.batches(torch.arange(len(store)), BATCH_TOKENS):
        raw = raw.to(subject.device)
        squares.index_add_(0, groups[chunk], difference(raw).pow(2).sum(dim=-1).double().cpu())
        there = groups[chunk] <= TOKEN_GROUPS.index("other predicted")
        raw = raw[there.to(raw.device)]
        values = subject.read(raw).float()
        if subject.decode is not None:
            norms[chunk[there]] = subject.decode(raw).norm(dim=-1).float().cpu()
        n_items = values.shape[1]
        row, item = values.nonzero(as_tuple=True)
        entries.append((chunk[there][row.cpu()], item.cpu(), values[row, item].cpu()))
    token, item, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
    fixed = groups == TOKEN_GROUPS.index("fixed")
    in_choosing = choosing[store.document]
    areas: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for half in (in_choosing, ~in_choosing):
        n_fixed, n_other = (int((half & (groups == group)).sum()) for group in range(2))
        its = half[token]
        areas.append(auroc_sparse(item[its], value[its], fixed[token[its]], n_items, n_fixed, n_fixed + n_other))
        sizes.append((n_fixed, n_other))
    added = questions.added[questions.family[store.document[fixed]]]
    usable = all(min(size) > 0 for size in sizes)
    best = int(areas[0].argmax()) if usable else None
    return TokenTruth(
        n_tokens={name: int(n) for name, n in zip(TOKEN_GROUPS, counts.tolist(), strict=True)},
        share_in_added_families=float(added.double().mean()) if len(added) else None,
        mean_square_norm={
            name: float(square / n) if n else None
            for name, square, n in zip(TOKEN_GROUPS, squares.tolist(), counts.tolist(), strict=True)
        },
        best_item=best,
        best=_estimate(areas[1], best, *sizes[1]),
        decoded=tells_fixed(norms, groups, ~in_choosing),
        auroc=areas[1],
    )


def tells_fixed(values: Tensor, groups: Tensor, scored: Tensor) -> Estimate:
    """How well one number a token [tokens] tells fixed tokens from other predicted ones, over the tokens of `scored`
    [tokens] bool that have a value."""
    there = scored & (groups <= TOKEN_GROUPS.index("other predicted"))
    return auroc_estimate(values[there], groups[there] == TOKEN_GROUPS.index("fixed"))


def probe_on_tokens(vectors: Tensor, groups: Tensor, fitted: Tensor) -> Tensor:
    """[tokens, d_model] -> [tokens]: a linear probe for fixed tokens, fitted on the predicted tokens of `fitted`
    [tokens] bool. Not a number where these lack one of the two groups."""
    is_fixed = groups == TOKEN_GROUPS.index("fixed")
    on = fitted & (groups <= TOKEN_GROUPS.index("other predicted"))
    if not is_fixed[on].any() or is_fixed[on].all():
        return torch.full((len(vectors),), torch.nan)
    weights, bias = logistic(vectors[on].double(), is_fixed[on][:, None])
    return (vectors.double() @ weights + bias)[:, 0]


def divergence(store: ActivationStore, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """[tokens]: KL(second || first) of the next token, in nats, from every document's log-probabilities (`NextTokens`);
    not a number before the last token of the prompt."""
    rows = []
    for document, before, after in zip(store.documents, first, second, strict=True):
        p, q = after.float(), before.float()
        own = (p.exp() * (p - q)).sum(dim=-1)
        rows.append(torch.cat([torch.full((document.n_ids - len(own),), torch.nan), own]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[store.document, store.position]


def _estimate(areas: Tensor, item: int | None, n: int, n_others: int) -> Estimate:
    if item is None:
        return Estimate(None, None, None, n, n_others)
    area = float(areas[item])
    return Estimate(area, *auroc_interval(area, n, n_others), n, n_others)
