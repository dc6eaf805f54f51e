"""Loss recovered: what a model still knows when a dictionary's reconstruction takes the place of its activation.

Explained variance weighs directions by their size, the model by what it does with them. So the reconstruction is put
into the forward pass of each model, at the site it was trained on, and the cross-entropy of the next token is compared
with that of the untouched model and with those of three ablations of the same site:

    recovered = (CE ablated - CE spliced) / (CE ablated - CE clean)

Beside it stands the same of KL(clean || patched), which the clean model has 0 of. A model on text that it would not
have written can lose nothing by an ablation, or gain by it (ablated <= clean): then what is recovered of the loss says
little, and what is recovered of the divergence still says how near the spliced model is to itself.

    zero    the activation is 0
    mean    it is its mean over training tokens
    other   it is the other model's activation of the same token: what tells the models apart is lost, and nothing else

A difference SAE reconstructs neither model: spliced is the instruct activation with the decoded difference added, in
the fine-tuned model alone, and `other` is the ablation that it has to answer to.

Only tokens that the dictionary was trained to read are changed: not BOS, not padding, no outlier that the set leaves
out. All of it in the models' own units (the scales are undone).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.writer import MODELS
from crosscoder.dictionaries.config import N_MODELS
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.causal import cell_key, experiment_key
from crosscoder.interventions.causal_rows import INTERVAL, draws
from crosscoder.interventions.halves import Frame, LayerRecord, Pair, Side, after_patch, record_layers
from crosscoder.interventions.patching import BATCH_TOKENS, Batch, batches
from crosscoder.interventions.sets import dictionary_digest, digest
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.progress import Progress

Ablation = Literal["zero", "mean", "other"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
Tokens = Literal["program", "all"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)

CONDITIONS = ("clean", "spliced", *ABLATIONS)
ROWS_AT_ONCE = 512
"""Tokens whose latents, or whose logits, are held at one time: a few GB with a vocabulary of 150,000."""


class LossRecovered(NamedTuple):
    """Loss recovered in one model, over one choice of tokens, against one ablation. Cross-entropies in nats a token."""

    model: str
    """instruct or fine-tuned."""
    tokens: Tokens
    """`program`: of the program and its end; `all`: every token but those that only BOS stands before."""
    ablation: Ablation
    n_documents: int
    n_tokens: int
    clean: float
    spliced: float
    ablated: float
    recovered: float
    """1: as good as the activation itself; 0: as bad as the ablation. Not a number where the ablation costs nothing."""
    low: float
    high: float
    """95% of the resamples of documents."""
    divergence_spliced: float
    """KL(clean || spliced), nats a token."""
    divergence_ablated: float
    divergence_recovered: float
    """1 - the first of the two over the second."""
    divergence_low: float
    divergence_high: float


@dataclass(frozen=True)
class SpliceLosses:
    """Sums over each document's tokens; on the CPU, fp64."""

    sums: Tensor
    """[document, model, condition, tokens]: cross-entropy, nats; not a number where a model was not spliced."""
    divergences: Tensor
    """[document, model, condition, tokens]: KL(clean || condition), nats; not a number in the same places."""
    counts: Tensor
    """[document, tokens] int64."""


def stored_texts(store: ActivationStore, numbers: Iterable[int], bos_id: int | None) -> list[Document]:
    """The documents of these numbers as the models read them, untouched where the set does not read their activations.

    What was not recorded of them is BOS, whose id is `bos_id`. UserError where an id was not recorded and that is None.
    """
    recorded = store.recorded
    places = {int(recorded.document[its.start]): its for its in recorded.by_document()}
    texts = []
    for number in numbers:
        stored, own = store.documents[number], places[number]
        positions = recorded.position[own]
        if bos_id is None and len(positions) < stored.n_ids:
            raise UserError(f"{store.folder} left tokens out, and the tokenizer has no BOS that they could be")
        ids = torch.full((stored.n_ids,), bos_id or 0)
        known = torch.zeros(stored.n_ids, dtype=torch.bool)
        ids[positions], known[positions] = recorded.token_id[own], recorded.kept[own]
        untouched = tuple((~known).nonzero().squeeze(-1).tolist())
        texts.append(Document(stored.id, tuple(ids.tolist()), stored.n_prompt, untouched))
    return texts


def mean_activations(store: ActivationStore, indices: Tensor) -> Tensor:
    """[2, d_model] fp64, in the models' own units, over the tokens at these indices."""
    total = torch.zeros(N_MODELS, store.config.d_model, dtype=torch.float64)
    for _, raw in store.batches(indices):
        total += raw.double().sum(dim=0).cpu()
    return total / len(indices)


def target_of(store: ActivationStore) -> Target:
    """Where a set was recorded."""
    return Target(int(store.config.recorded["layer"]), store.config.recorded["site"])


@torch.no_grad()
def reconstructions(model: BatchTopKCrosscoder, raw: Tensor) -> list[Tensor | None]:
    """[n, 2, d_model] raw activations -> for each model [n, d_model], what is spliced in its activation's place."""
    parts = []
    for rows in raw.split(ROWS_AT_ONCE):
        xhat = model.unscale(model.forward(model.scale(rows.to(model.b_dec.device))))
        parts.append(xhat if model.config.n_inputs == N_MODELS else model.difference(xhat))
    decoded = torch.cat(parts).to(raw.device)
    if model.config.n_inputs == N_MODELS:
        return list(decoded.unbind(dim=1))
    return [None, raw[:, 0] + decoded]


def splice_losses(
    model: BatchTopKCrosscoder,
    pair: Pair,
    texts: Sequence[Document],
    target: Target,
    means: Tensor,
    journal: KeyedJournal,
    batch_tokens: int = BATCH_TOKENS,
) -> SpliceLosses:
    """Losses of both models on `texts`, under every condition.

    Args:
        pair: interventions.halves.pair_of; on any device, which need not be the dictionary's.
        target: The site that the dictionary reads.
        means: [2, d_model] for the mean ablation, raw (`mean_activations`).
        journal: Has the batches that are done already; those that are not are added.
        batch_tokens: Padded, of a batch.
    """
    sums = torch.zeros(2, len(texts), N_MODELS, len(CONDITIONS), len(TOKENS), dtype=torch.float64)
    counts = torch.zeros(len(texts), len(TOKENS), dtype=torch.int64)
    experiment = experiment_key(pair, target, texts, f"{dictionary_digest(model)} {digest(means.float())}")
    whole = list(batches(texts, pair.instruct.device, batch_tokens))
    keys = [cell_key(experiment, "spliced", {"documents": chosen.tolist()}) for chosen, _ in whole]
    missing = [batch for key, (_, batch) in zip(keys, whole, strict=True) if key not in journal.found]
    n_missing = sum(batch.ids.numel() for batch in missing)
    progress = Progress(f"splicing into {len(texts)} documents, tokens", n_missing)
    for key, (chosen, batch) in zip(keys, whole, strict=True):
        if key not in journal.found:
            own_sums, own_counts = _losses_of_batch(model, pair, batch, target, means)
            journal.add(key, {"what": "spliced", "sums": own_sums.tolist(), "counts": own_counts.tolist()})
            progress.advance(batch.ids.numel())
        found = journal.found[key]
        # The journal has null for what is not a number, as of a model that was not spliced.
        sums[:, chosen] = torch.from_numpy(np.array(found["sums"], dtype=np.float64))
        counts[chosen] = torch.tensor(found["counts"])
    progress.close()
    return SpliceLosses(sums[0], sums[1], counts)


@torch.no_grad()
def _losses_of_batch(
    model: BatchTopKCrosscoder, pair: Pair, batch: Batch, target: Target, means: Tensor
) -> tuple[Tensor, Tensor]:
    """[2, documents, model, condition, tokens] losses and divergences, [documents, tokens] counts; as SpliceLosses."""
    known = batch.patched
    place = torch.arange(batch.ids.shape[1], device=known.device)
    predicting = (known.cumsum(1) > 0) & (place < batch.length[:, None] - 1)
    following = torch.roll(batch.ids, -1, dims=1)[predicting]
    counts = torch.stack([batch.predicting.sum(1), predicting.sum(1)], dim=1)
    sums = torch.full((2, len(known), N_MODELS, len(CONDITIONS), len(TOKENS)), torch.nan, dtype=torch.float64)

    records: list[LayerRecord] = []
    for side in pair:
        hidden = side.embedded(batch.ids)
        frame = side.frame(hidden)
        records.append(record_layers(side, hidden, frame, [target.layer])[target.layer])
    raw = torch.stack([record.site(target)[known] for record in records], dim=1).float()
    spliced = reconstructions(model, raw)
    for m, side in enumerate(pair):
        rows = {
            "clean": None,
            "spliced": spliced[m],
            "zero": torch.zeros_like(raw[:, m]),
            "mean": means[m].to(raw).expand(len(raw), -1),
            "other": raw[:, 1 - m],
        }
        if rows["spliced"] is None:
            continue
        last = [_last_hidden(side, records[m], target, rows[c], known, frame)[predicting] for c in CONDITIONS]
        for c, hidden in enumerate(last):
            for measure, values in enumerate(_losses(side, hidden, last[0], following)):
                each = torch.zeros(batch.ids.shape, dtype=torch.float64, device=known.device)
                each[predicting] = values
                sums[measure, :, m, c, 0] = (each * batch.predicting).sum(1).cpu()
                sums[measure, :, m, c, 1] = each.sum(1).cpu()
    return sums, counts


def _last_hidden(
    side: Side, record: LayerRecord, target: Target, rows: Tensor | None, known: Tensor, frame: Frame
) -> Tensor:
    """[documents, time, d_model] of the last layer with the site's activation `rows` [known, d_model] at the known
    tokens; None leaves it as it is."""
    value = None
    if rows is not None:
        value = record.site(target).clone()
        value[known] = rows.to(value)
    return after_patch(side, side, record, target, value, frame)


def _losses(side: Side, hidden: Tensor, clean: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """[n] fp64 twice: cross-entropy of the tokens `following` [n], and the divergence of the prediction from that of
    the `clean` model; from last hidden states [n, d_model]."""
    losses, divergences = [], []
    for some, untouched, true in zip(*(t.split(ROWS_AT_ONCE) for t in (hidden, clean, following)), strict=True):
        ours, theirs = side.logits(some).log_softmax(-1), side.logits(untouched).log_softmax(-1)
        losses.append(-ours.gather(-1, true[:, None]).squeeze(-1))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
    return torch.cat(losses).double(), torch.cat(divergences).double()


def loss_recovered(losses: SpliceLosses) -> list[LossRecovered]:
    """Every model that was spliced, choice of tokens and ablation; the interval is a bootstrap over documents."""
    n = len(losses.counts)
    weights = torch.cat([torch.ones(1, n, dtype=torch.float64), draws(n)])
    found = []
    for m, t in ((m, t) for m in range(N_MODELS) for t in range(len(TOKENS))):
        # The first row is the documents themselves, the others are resamples: a mean over tokens in each.
        tokens = (weights @ losses.counts[:, t].double())[:, None]
        loss, divergence = (weights @ sums[:, m, :, t] / tokens for sums in (losses.sums, losses.divergences))
        if loss[0].isnan().any():
            continue
        for a, ablation in enumerate(ABLATIONS, start=2):
            recovered, low, high = _recovered(loss[:, 0], loss[:, 1], loss[:, a])
            near, near_low, near_high = _recovered(divergence[:, 0], divergence[:, 1], divergence[:, a])
            found.append(
                LossRecovered(
                    model=MODELS[m],
                    tokens=TOKENS[t],
                    ablation=ablation,
                    n_documents=n,
                    n_tokens=int(losses.counts[:, t].sum()),
                    clean=float(loss[0, 0]),
                    spliced=float(loss[0, 1]),
                    ablated=float(loss[0, a]),
                    recovered=recovered,
                    low=low,
                    high=high,
                    divergence_spliced=float(divergence[0, 1]),
                    divergence_ablated=float(divergence[0, a]),
                    divergence_recovered=near,
                    divergence_low=near_low,
                    divergence_high=near_high,
                )
            )
    return found


def _recovered(clean: Tensor, spliced: Tensor, ablated: Tensor) -> tuple[float, float, float]:
    """[1 + resamples] each -> the share of the documents themselves, and the ends of its interval."""
    share = torch.where(ablated != clean, (ablated - spliced) / (ablated - clean), torch.nan)
    low, high = torch.nanquantile(share[1:], torch.tensor(INTERVAL, dtype=share.dtype)).tolist()
    return float(share[0]), low, high
