"""The dashboard's latents and their examples as the JSON that Neuronpedia takes: batch-0.json, batch-1.json, ...

The schema is SAEDashboard's (sae_dashboard/neuronpedia/neuronpedia_dashboard.py, version 0.8). Neuronpedia's script
convert-saedashboard-to-neuronpedia-export.py (github.com/hijohnnylin/neuronpedia, utils/neuronpedia-utils) turns such
batches into an import. What has no counterpart here stays empty: aligned and correlated neurons, shares of heads. Three
fields ask for a word:

    layer       counted from 0, as TransformerLens does; here from 1
    bin_min     of the strongest examples -1, beside 99 and -1; else the activations at the ends of a band
    vector      the direction in the fine-tuned model, or of the difference; the logits are its own
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.dashboard.records import LEVELS, Dashboard, DashboardConfig, Example, LatentPage
from finqa.runtime.errors import UserError
from finqa.runtime.paths import json_text, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.opening import OpenedCrosscoder

FEATURES_IN_BATCH = 128
LOGIT_BINS = 50
DIGITS = 6
"""Significant digits of a figure."""
STRONGEST = (-1.0, 99.0, -1.0)
"""bin_min, bin_max and bin_contains by which Neuronpedia knows the strongest examples."""
EMPTY = (
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(f"correlated_{of}_{name}" for of in ("neurons", "features") for name in ("indices", "l1", "pearson")),
    "decoder_weights_dist",
)


def write_neuronpedia(opened: OpenedCrosscoder, dashboard: Dashboard, config: DashboardConfig, folder: Path) -> int:
    """Write the batches of the latents that have examples in the dashboard; their number.

    Raises UserError where none has, or `folder` holds batches already.
    """
    from crosscoder.activations.layout import token_texts
    from crosscoder.analysis.measures import decoder_directions

    pages = [page for page in dashboard.pages if page.examples is not None]
    if not pages:
        raise UserError("no latent has examples; raise --examples-for, or look at a dictionary whose latents fire")
    if any(folder.glob("batch-*.json")):
        raise UserError(f"{folder} has batches already, which would be mixed with these; give another --out")
    recorded = opened.store.config.recorded
    # Of two models the fine-tuned one's, in its own units.
    vectors = list(decoder_directions(opened.model).values())[-1].detach().cpu()
    vocabulary = token_texts(opened.tokenizer, range(len(opened.unembedding.weight)))
    common = {
        "n_prompts_total": len(opened.store.documents),
        "n_tokens_in_prompt": config.tokens_before + 1 + config.tokens_after,
        "dataset": str(recorded.get("dataset", "")),
        **{name: [] for name in EMPTY},
    }
    for number, start in enumerate(range(0, len(pages), FEATURES_IN_BATCH)):
        some = pages[start : start + FEATURES_IN_BATCH]
        logits = _logits(opened, vectors[[page.latent for page in some]], vocabulary, config.n_promoted)
        features = [
            _feature(page, dashboard.vocabulary, vectors[page.latent]) | of_logits | common
            for page, of_logits in zip(some, logits, strict=True)
        ]
        batch = {
            "model_id": Path(str(recorded.get("model", ""))).name,
            "layer": recorded.get("layer", 1) - 1,
            "sae_set": opened.name,
            "sae_id_suffix": None,
            "features": features,
        }
        write_atomically(folder / f"batch-{number}.json", json_text(batch))
    return len(pages)


def _logits(opened: OpenedCrosscoder, vectors: Tensor, vocabulary: dict[int, str], n: int) -> Iterator[dict[str, Any]]:
    """For each of [latent, d_model] `vectors` the tokens whose logits it raises and lowers most, and the histogram of
    all."""
    import torch

    from crosscoder.analysis.lens import logits

    for own in logits(vectors, opened.unembedding):
        best, worst = torch.topk(own, n), torch.topk(-own, n)
        heights = torch.histc(own, LOGIT_BINS)
        yield {
            "pos_str": [vocabulary[i] for i in best.indices.tolist()],
            "pos_values": _short(best.values.tolist()),
            "neg_str": [vocabulary[i] for i in worst.indices.tolist()],
            "neg_values": _short((-worst.values).tolist()),
            "logits_hist_data_bar_heights": heights.int().tolist(),
            "logits_hist_data_bar_values": _middles(float(own.min()), float(own.max()), LOGIT_BINS),
        }


def _feature(page: LatentPage, vocabulary: dict[int, str], vector: Tensor) -> dict[str, Any]:
    assert page.examples is not None
    bands = [
        ((band.lowest, band.highest, band.to_quantile - band.from_quantile), band.examples)
        for band in page.examples.bands
    ]
    shown = [(STRONGEST, page.examples.strongest), *bands]
    return {
        "feature_index": page.latent,
        "frac_nonzero": page.values["frequency"],
        "freq_hist_data_bar_heights": list(page.histogram),
        "freq_hist_data_bar_values": _middles(0, page.max_activation, len(page.histogram)),
        "activations": [_activation(one, page, vocabulary, bins) for bins, examples in shown for one in examples],
        "vector": _short(vector.tolist()),
    }


def _activation(
    example: Example, page: LatentPage, vocabulary: dict[int, str], bins: tuple[float, float, float]
) -> dict[str, Any]:
    return {
        **dict(zip(("bin_min", "bin_max", "bin_contains"), _short(bins), strict=True)),
        "tokens": [vocabulary[token] for token in example.token_ids],
        "values": _short(level / LEVELS * page.max_activation for level in example.levels),
        "qualifying_token_index": example.peak,
    }


def _middles(low: float, high: float, n: int) -> list[float]:
    """Middles of n equal bins from `low` to `high`."""
    return _short(low + (i + 0.5) * (high - low) / n for i in range(n))


def _short(values: Any) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
