"""Everything that an analysis computes from a dictionary, before figures are drawn and tables written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from crosscoder.analysis import figure_data, tables
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import ExclusiveCounts, LatentScaling, exclusive_counts, latent_scaling
from crosscoder.analysis.lens import AT_ONCE
from crosscoder.analysis.measures import ExplainedVariance, LatentClass
from crosscoder.analysis.statistics import LatentStatistics, latent_statistics
from crosscoder.analysis.token_kinds import KindExplained, explained_variance_by_kind, kind_rows, token_kinds
from crosscoder.opening import AnalysisConfig, OpenedCrosscoder
from finqa.runtime.memory.free import free_memory
from finqa.runtime.memory.needs import Need
from finqa.runtime.memory.plan import USABLE, check_fits

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.dictionaries.config import CrosscoderConfig

CUBLAS_WORKSPACE = 32 * 1024**2
"""Bytes that PyTorch holds for cuBLAS on a GPU, in the largest case."""


@dataclass(frozen=True)
class TwoModels:
    """Measures that compare the two decoder vectors of each latent; of all latents."""

    norms: Tensor
    """[latent, 2] (analysis.decoder_norms)."""
    cosines: Tensor
    """[latent] (analysis.decoder_cosines)."""
    kinds: list[LatentClass]
    """Classes (analysis.latent_classes)."""
    scaling: LatentScaling
    """On held-out documents."""


@dataclass(frozen=True)
class Findings:
    """Results of the analysis of a dictionary on the activation set that it was trained on."""

    opened: OpenedCrosscoder
    config: AnalysisConfig
    statistics: LatentStatistics
    """Over all tokens of the set; a latent is dead where it is active on none of them."""
    by_kind: list[KindExplained]
    """On held-out documents: all tokens, then kind by kind."""
    two_models: TwoModels | None
    """None for a difference SAE, which has one decoder vector per latent, and for a stagewise SAE, whose two vectors
    say how far a latent turned (LatentRow.change) and not which model it belongs to."""
    rows: list[tables.LatentRow]
    """One row for each latent, in their order."""
    most_changed: list[tables.LatentRow]

    @property
    def explained(self) -> ExplainedVariance:
        """On all tokens of the held-out documents."""
        return next(each.own_mean for each in self.by_kind if each.kind == "all")

    @property
    def alive(self) -> Tensor:
        """[latent] mask."""
        return ~self.statistics.dead

    @property
    def classes(self) -> list[LatentClass]:
        """Classes of the latents that are alive, in their order; empty where there is no `two_models`."""
        kinds = self.two_models.kinds if self.two_models else []
        return [kind for kind, lives in zip(kinds, self.alive.tolist(), strict=True) if lives] if kinds else []

    @cached_property
    def exclusive(self) -> dict[LatentClass, ExclusiveCounts]:
        """Verdicts of latent scaling, counted over the latents that are alive; empty where there is no `two_models`."""
        two = self.two_models
        return exclusive_counts(two.scaling, two.kinds, self.alive) if two else {}


def plan_analysis(opened: OpenedCrosscoder, config: AnalysisConfig) -> None:
    """Print what `find` needs and what there is; UserError where it does not fit."""
    device = str(opened.model.b_dec.device)
    on_gpu = device.startswith("cuda")
    need = analysis_need(opened.model.config, config.batch_size, len(opened.unembedding.weight), on_gpu)
    helps = "CUDA_VISIBLE_DEVICES= leaves it to the CPU" if on_gpu else "use a machine with more"
    check_fits("analysis", need, free_memory(device), device, helps, USABLE)


def analysis_need(crosscoder: CrosscoderConfig, batch_size: int, n_tokens: int, on_gpu: bool) -> Need:
    """Memory of the stage of an analysis that takes most, beside the dictionary, which is loaded by then.

    Bytes for each pair of token and latent, of token and input and of latent and input are counted on tensors that are
    alive. A batch's are still there when the next one's are made. `n_tokens` are those of the vocabulary.
    A GPU holds cuBLAS's workspace besides.
    """
    width, n_latents = crosscoder.n_inputs * crosscoder.d_model, crosscoder.n_latents
    pairs, inputs, weights = batch_size * n_latents, batch_size * width, n_latents * width
    stages = {
        "what latents do": 22 * pairs + 8 * inputs + 760 * n_latents,
        "explained variance": max(13 * pairs + 10 * inputs, 4 * pairs + 35 * inputs),
        "logit lens": 4.0 * n_tokens * (AT_ONCE + crosscoder.d_model) + 6 * weights,
    }
    if crosscoder.compares_models:
        stages["latent scaling"] = max(26 * weights, 17 * weights + 17 * pairs + 24 * inputs)
    most = max(stages, key=lambda stage: stages[stage])
    whole = stages[most] + (CUBLAS_WORKSPACE if on_gpu else 0)
    return Need(((most, whole, f"{batch_size:,} tokens x {n_latents:,} latents"),))


def find(opened: OpenedCrosscoder, config: AnalysisConfig | None = None) -> Findings:
    """Analyse a dictionary: one pass over all tokens of its set, two over the held-out ones."""
    config = config or AnalysisConfig()
    model, store, held_out = opened.model, opened.store, opened.split.held_out
    kinds = token_kinds(store, opened.tokenizer)
    everything = torch.arange(len(store))
    statistics = latent_statistics(model, store, everything, batch_size=config.batch_size, kinds=kinds)
    by_kind = explained_variance_by_kind(model, store, held_out, kinds, config.batch_size)
    two_models = None
    if model.config.compares_models:
        norms = analysis.decoder_norms(model)
        batches = store.batches(held_out, config.batch_size, "latent scaling, tokens")
        two_models = TwoModels(
            norms=norms,
            cosines=analysis.decoder_cosines(model),
            kinds=analysis.latent_classes(model),
            scaling=latent_scaling(model, (raw for _, raw in batches)),
        )
    scaling = two_models.scaling if two_models else None
    rows = tables.latent_table(model, statistics, store, opened.tokenizer, opened.unembedding, scaling)
    most_changed = tables.most_changed(rows, config.n_most_changed, config.min_frequency)
    return Findings(opened, config, statistics, by_kind, two_models, rows, most_changed)


def in_numbers(found: Findings) -> dict[str, Any]:
    """The content of analysis.json: every number in the figures, with what it was counted over. What does not apply to
    this dictionary is left out."""
    opened, statistics, model = found.opened, found.statistics, found.opened.model
    n_alive = int(found.alive.sum())
    thresholds = {name: getattr(model, name) for name in ("threshold", "delta_threshold", "further_thresholds")}
    numbers: dict[str, Any] = {
        "name": opened.name,
        "made_of": opened.made_of,
        "dictionary": asdict(model.config) | thresholds,
        "activations": opened.store.config.recorded,
        "n_tokens": statistics.n_tokens,
        "n_outliers_left_out": opened.store.config.n_dropped,
        "n_documents": len(opened.store.documents),
        "n_held_out_tokens": len(opened.split.held_out),
        "n_held_out_documents": len(opened.store.document[opened.split.held_out].unique()),
        "explained_variance": _without_none(found.explained._asdict()),
        "explained_variance_by_kind": [_without_none(row) for row in kind_rows(found.by_kind)],
        "latents": {"n": len(found.rows), "alive": n_alive, "dead": len(found.rows) - n_alive},
        "frequency": {"n": n_alive, "median": analysis.median(statistics.frequency[found.alive])}
        | _histograms(frequencies(found)),
        "most_changed": {
            "ordered_by": tables.ordered_by(model),
            "min_frequency": found.config.min_frequency,
            "latents": [row.latent for row in found.most_changed],
        },
    }
    return numbers | _of_two_models(found)


def frequencies(found: Findings) -> Mapping[LatentClass | None, figure_data.Histogram]:
    """How often latents are active: by class, or all where latents have none."""
    statistics, two = found.statistics, found.two_models
    return figure_data.frequencies(statistics.frequency, statistics.n_tokens, two.kinds if two else None)


def _of_two_models(found: Findings) -> dict[str, Any]:
    two, alive = found.two_models, found.alive
    if two is None:
        return {}
    norms, cosines, kinds = two.norms[alive], two.cosines[alive], found.classes
    relative = analysis.relative_decoder_norm(norms)
    have_cosine = cosines[cosines.isfinite()]
    points = figure_data.scaling_points(two.scaling, two.kinds, found.statistics.dead)
    return {
        "classes": {"n": len(kinds)} | {kind: kinds.count(kind) for kind in analysis.CLASSES},
        "relative_decoder_norm": {
            "n": len(relative),
            "median": analysis.median(relative),
            "regions": [count._asdict() for count in figure_data.class_counts(norms)],
            "histogram": figure_data.relative_norms(norms)._asdict(),
        },
        "decoder_cosine": {
            "n": len(have_cosine),
            "without_length": len(cosines) - len(have_cosine),
            "median": analysis.median(have_cosine),
            "of_shared": analysis.median(cosines[torch.tensor([kind == "shared" for kind in kinds], dtype=torch.bool)]),
        },
        "latent_scaling": {kind: asdict(counts) for kind, counts in found.exclusive.items()}
        | {
            "shown": {
                kind: {"n": of.n, "too_few": of.too_few, "outside": of.outside, "regions": of.regions}
                for kind, of in points.items()
            }
        },
    }


def _histograms(by_class: Mapping[LatentClass | None, figure_data.Histogram]) -> dict[str, Any]:
    """Histograms on the same edges, as JSON."""
    counts = {kind or "all": of.counts for kind, of in by_class.items()}
    edges = next(iter(by_class.values())).edges if by_class else []
    return {"histogram": {"edges": edges, "counts": counts}}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
