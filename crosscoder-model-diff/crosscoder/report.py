"""metrics.json of a crosscoder: how well it does, on held-out documents, and what its latents look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crosscoder import analysis
from crosscoder.activation_store import ActivationStore, Split
from crosscoder.analysis import ExplainedVariance
from crosscoder.model import BatchTopKCrosscoder
from crosscoder.statistics import latent_statistics

EVALUATION_BATCH = 4096


@dataclass(frozen=True)
class CrosscoderReport:
    """Everything by the inference threshold, unless it says otherwise."""

    held_out: ExplainedVariance
    """On held-out documents."""
    training: ExplainedVariance
    """On the training documents."""
    n_held_out_documents: int
    published_explained_variance: tuple[float, float] | None
    """Of the last logged training batch, by batch top-k (losses.published_explained_variance); instruct, fine-tuned."""
    dead_share: float
    """Latents that are active on no training token."""
    never_positive_share: float
    """Latents that are positive on no training token, whatever the threshold."""
    drawn_anew: int
    """Latents that were re-initialised in training."""
    threshold: float
    classes: dict[str, int]
    """Latents that are active on some training token, by class of Delta."""
    median_relative_decoder_norm: float
    """Of the same latents."""
    median_decoder_cosine: float
    """Of the same latents."""


def crosscoder_report(
    model: BatchTopKCrosscoder, store: ActivationStore, split: Split, records: list[dict[str, Any]]
) -> CrosscoderReport:
    """Two passes over the training tokens and one over the held-out ones. `records` are those of the training log."""
    assert model.threshold is not None
    statistics = latent_statistics(model, store, split.train, n_top=1)
    alive = ~statistics.dead
    norms = analysis.decoder_norms(model)[alive]
    kinds = analysis.classify(analysis.delta(norms))
    last = records[-1] if records else {}
    published = last.get("explained_variance_published")
    return CrosscoderReport(
        held_out=_explained(model, store, split.held_out),
        training=_explained(model, store, split.train),
        n_held_out_documents=len(store.document[split.held_out].unique()),
        published_explained_variance=(published[0], published[1]) if published else None,
        dead_share=float(statistics.dead.float().mean()),
        never_positive_share=float((statistics.n_positive == 0).float().mean()),
        drawn_anew=last.get("drawn_anew", 0),
        threshold=model.threshold,
        classes={kind: kinds.count(kind) for kind in analysis.CLASSES},
        median_relative_decoder_norm=float(analysis.relative_decoder_norm(norms).median()),
        median_decoder_cosine=float(analysis.decoder_cosines(model)[alive].median()),
    )


def _explained(model: BatchTopKCrosscoder, store: ActivationStore, indices: torch.Tensor) -> ExplainedVariance:
    batches = (raw for _, raw in store.batches(indices, EVALUATION_BATCH))
    return analysis.explained_variance(model, batches)
