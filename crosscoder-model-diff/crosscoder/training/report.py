"""metrics.json of a dictionary: how well it does, on held-out documents, and what its latents look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crosscoder.activations.store import ActivationStore, Split
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import ExclusiveCounts, exclusive_counts, latent_scaling
from crosscoder.analysis.measures import ExplainedVariance
from crosscoder.analysis.statistics import LatentStatistics, latent_statistics
from crosscoder.dictionaries.methods import StagewiseSAE
from crosscoder.dictionaries.model import BatchTopKCrosscoder


@dataclass(frozen=True)
class CrosscoderReport:
    """Everything by the inference threshold, unless it says otherwise. What compares two decoder vectors is None for a
    difference SAE, which has one a latent, and what compares their norms for a stagewise SAE."""

    method: str
    held_out: ExplainedVariance
    """On held-out documents."""
    training: ExplainedVariance
    """On the training documents."""
    n_held_out_documents: int
    published_explained_variance: tuple[float, ...] | None
    """The published run's figure (losses.published_explained_variance) on the last logged training batch, by batch
    top-k; instruct, fine-tuned."""
    dead_share: float
    """Latents that are active on no training token."""
    never_positive_share: float
    """Latents that are positive on no training token, whatever the threshold."""
    drawn_anew: int
    """Latents that were re-initialised in training."""
    threshold: float
    delta_threshold: float | None
    """Threshold of the delta latents of a partition."""
    further_thresholds: tuple[float, ...]
    """See BatchTopKCrosscoder.further_thresholds."""
    classes: dict[str, int] | None
    """Latents that are active on some training token, by class (analysis.latent_classes)."""
    latent_scaling: dict[analysis.LatentClass, ExclusiveCounts] | None
    """On held-out documents, by exclusive class: how many of its latents latent scaling confirms, how many fail each of
    its conditions, and which latents of any class meet them (latent_scaling.ExclusiveCounts)."""
    median_relative_decoder_norm: float | None
    """Median over the latents that are active on some training token."""
    median_decoder_cosine: float | None
    """Median over the same latents, without those that have a vector of no length."""
    median_change: float | None = None
    """How far the same latents of a stagewise SAE turned in its second stage (StagewiseSAE.change)."""


def crosscoder_report(
    model: BatchTopKCrosscoder, store: ActivationStore, split: Split, records: list[dict[str, Any]]
) -> CrosscoderReport:
    """One pass over the training tokens and one over the held-out ones. `records` are those of the training log."""
    assert model.threshold is not None
    training, held_out = analysis.VarianceSums(model), analysis.VarianceSums(model)
    statistics = latent_statistics(model, store, split.train, n_top=1, variance=training)
    of_two_models = _of_two_models(model, store, split, statistics, held_out)
    last = records[-1] if records else {}
    published = last.get("explained_variance_published")
    return CrosscoderReport(
        method=model.config.method,
        held_out=held_out.explained(),
        training=training.explained(),
        n_held_out_documents=len(store.document[split.held_out].unique()),
        published_explained_variance=tuple(published) if published else None,
        dead_share=float(statistics.dead.float().mean()),
        never_positive_share=float((statistics.n_positive == 0).float().mean()),
        drawn_anew=last.get("drawn_anew", 0),
        threshold=model.threshold,
        delta_threshold=model.delta_threshold,
        further_thresholds=model.further_thresholds,
        **of_two_models,
    )


def _of_two_models(
    model: BatchTopKCrosscoder,
    store: ActivationStore,
    split: Split,
    statistics: LatentStatistics,
    held_out: analysis.VarianceSums,
) -> dict[str, Any]:
    """The report's fields that compare a latent's two decoder vectors; adds the held-out tokens to the sums."""
    none: dict[str, Any] = dict.fromkeys(("classes", "latent_scaling", "median_relative_decoder_norm"))
    alive = ~statistics.dead
    batches = (raw for _, raw in store.batches(split.held_out))
    if not model.config.compares_models:
        for raw in batches:
            held_out.add(raw)
    if isinstance(model, StagewiseSAE):
        return none | {
            "median_decoder_cosine": analysis.median(analysis.decoder_cosines(model)[alive]),
            "median_change": analysis.median(model.change()[alive]),
        }
    if not model.config.compares_models:
        return none | {"median_decoder_cosine": None}
    norms = analysis.decoder_norms(model)
    kinds = analysis.latent_classes(model)
    of_alive: list[analysis.LatentClass] = [kind for kind, lives in zip(kinds, alive.tolist(), strict=True) if lives]
    return {
        "classes": {kind: of_alive.count(kind) for kind in analysis.CLASSES},
        "latent_scaling": exclusive_counts(latent_scaling(model, batches, held_out), kinds, alive),
        "median_relative_decoder_norm": analysis.median(analysis.relative_decoder_norm(norms)[alive]),
        "median_decoder_cosine": analysis.median(analysis.decoder_cosines(model)[alive]),
    }
