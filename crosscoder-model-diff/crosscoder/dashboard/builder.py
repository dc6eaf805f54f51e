"""An opened crosscoder, its statistics and its table of latents -> a Dashboard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activations.layout import token_texts
from crosscoder.analysis.lens import promoted_tokens
from crosscoder.analysis.measures import decoder_directions
from crosscoder.analysis.tables import EFFECT, change_key, commonest_tokens
from crosscoder.analysis.token_kinds import token_kinds
from crosscoder.dashboard.examples import ExampleMaker, Family
from crosscoder.dashboard.firings import gather_firings, groups_within
from crosscoder.dashboard.records import Column, Dashboard, DashboardConfig, Examples, LatentPage, Summary, Value

if TYPE_CHECKING:
    from crosscoder.analysis.statistics import LatentStatistics
    from crosscoder.analysis.tables import LatentRow
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from crosscoder.opening import OpenedCrosscoder

COLUMNS = (
    Column("label", "label", "What a language model calls the latent, from its examples.", "text"),
    Column("label_score", "label score", "How well the label alone tells text on which the latent fires from other "
           "text, on examples that it was not made from: 1 is always, 0.5 is chance.", "number", in_table=False),
    Column("part", "part", "Of the partition: shared latents have one decoder vector for both models, delta latents "
           "alone tell the models apart.", "word"),
    Column("kind", "class", "By Delta: below 0.1 instruct-only, 0.4 to 0.6 shared, above 0.9 fine-tuned-only. "
           "In a dedicated feature crosscoder: which model the latent is reserved for.", "word"),
    Column("relative_decoder_norm", "relative norm", "Relative decoder norm r: length of the fine-tuned model's "
           "decoder vector over the sum of both. Near 0 the instruct model alone has the latent, near 1 the fine-tuned "
           "one.", "number"),
    Column("norm_distance", "distance from ½", "How far the relative norm is from one half, where both models' vectors "
           "are equally long.", "number", in_table=False),
    Column("delta", "Δ", "Half of one plus the difference of the two lengths over the larger; the classes are cut on "
           "it.", "number", in_table=False),
    Column("instruct_norm", "instruct norm", "Length of the instruct decoder vector, in that model's own units.",
           "number", in_table=False),
    Column("fine_tuned_norm", "fine-tuned norm", "Length of the fine-tuned decoder vector, in that model's own units.",
           "number", in_table=False),
    Column("change", "change", "How far the latent turned when the autoencoder was trained on with the fine-tuned "
           "model: 1 less the mean cosine of its encoder and its decoder vector before and after.", "number"),
    Column(EFFECT, "causal effect", "Estimated, to first order: by how many nats a document adding the latent to the "
           "instruct model brings its predictions (KL) nearer the fine-tuned model's; below 0, further away.",
           "number"),
    Column("cosine", "cosine", "Of the latent's two decoder vectors.", "number"),
    Column("nu_err", "ν err", "Latent scaling on the error: how much of the latent the other model has all the same. "
           "High: the training shrank its decoder vector there (complete shrinkage).", "number"),
    Column("nu_rec", "ν rec", "Latent scaling on the reconstruction. High: other latents write the same "
           "direction in the other model (latent decoupling).", "number"),
    Column("exclusivity", "exclusivity", "1 − ν err: near 1 where one model alone has the latent.", "number",
           in_table=False),
    Column("confirmed", "confirmed as", "The class whose conditions of latent scaling it meets on held-out documents, "
           "whatever its class by Δ.", "word", in_table=False),
    Column("fine_tuned_verdict", "as fine-tuned-only", "What latent scaling says of it as a latent that the fine-tuned "
           "model alone has: confirmed, or why not.", "word", in_table=False),
    Column("instruct_verdict", "as instruct-only", "What latent scaling says of it as a latent that the instruct model "
           "alone has: confirmed, or why not.", "word", in_table=False),
    Column("scaling_firings", "scaling tokens", "Tokens of the held-out documents that latent scaling rests on.",
           "count", in_table=False),
    Column("frequency", "frequency", "Share of tokens on which it is active.", "share"),
    Column("completion_share", "in completions", "Of the tokens on which it is active, the share in completions: of "
           "FinQA, the programs.", "share"),
    Column("template_share", "on template", "Of its summed activation, the share on tokens that every document has "
           "alike: chat mark-up, the request, the markers.", "share"),
    Column("family", "question family", "Of a latent with examples: the family on whose questions it is most active; "
           "in brackets whether fine-tuning added it (new).", "word", in_table=False),
    Column("family_times", "times the mean", "Activation on a question of that family, summed over its tokens, as a "
           "multiple of the mean over all questions.", "number", in_table=False),
    Column("difference_share", "share of difference", "Of what all latents write into the difference of the two "
           "models, the part of this one: mean squared activation times the squared length of what it adds to the "
           "difference.", "share", in_table=False),
    Column("mean_activation", "mean activation", "Over the tokens on which it is active.", "number", in_table=False),
    Column("match", "partner", "The latent of the other dictionary that it is matched with, one to one, by the cosine "
           "of their decoder vectors.", "count", False, True),
    Column("match_cosine", "partner's cosine", "Of its decoder vector and its partner's: near 1 where both "
           "dictionaries found the same.", "number", False, True),
    Column("match_kind", "partner's class", "By the partner's own Delta.", "word", False, True),
    Column("match_frequency", "partner's frequency", "Share of tokens on which the partner is active.", "share", False,
           True),
    Column("match_tokens", "partner fires on", "The tokens that the partner fires on most strongly.", "text", False,
           True),
    Column("max_activation", "largest activation", "Over all tokens.", "number", in_table=False),
)  # fmt: skip
SITE_NAMES = {"mlp": "MLP output", "attention": "attention output", "residual": "residual stream"}
FEW_FIRINGS = 10
"""A latent that is active on fewer tokens is among the least interesting: there is too little to read."""
COSINES_AT_ONCE = 2048


def build_dashboard(
    opened: OpenedCrosscoder,
    statistics: LatentStatistics,
    rows: Sequence[LatentRow],
    summary: Summary,
    config: DashboardConfig | None = None,
    added: Mapping[str, Sequence[Value]] | None = None,
) -> Dashboard:
    """The dashboard of a dictionary on the activation set that it was trained on.

    Args:
        statistics: Of all tokens of the set.
        rows: tables.latent_table of these statistics, with the columns of latent scaling or without.
        added: Further columns, by their key, with a value for every latent.

    Reads the set once, or more often where config.max_firings_held says that memory does not allow it.
    """
    config = config or DashboardConfig()
    model, tokenizer = opened.model, opened.tokenizer
    values = [_values(row, model, added or {}) for row in rows]
    alive = [row for row in rows if row.frequency > 0]
    first = dict.fromkeys([*summary.changed, *(row.latent for row in by_interest(alive, statistics))])
    chosen = list(first)[: config.n_with_examples]
    largest = statistics.top_values[:, 0]
    examples, families, histograms = _examples(opened, torch.tensor(chosen, dtype=torch.int64), statistics, config)
    for latent, (name, times) in families.items():
        values[latent] |= {"family": name, "family_times": times}
    directions = decoder_directions(model)
    promoted = [promoted_tokens(each, opened.unembedding, config.n_promoted) for each in directions.values()]
    nearest = nearest_latents(model, statistics.dead, config.n_nearest)
    pages = tuple(
        LatentPage(
            latent=j,
            values=values[j],
            max_activation=float(largest[j]),
            top_tokens=commonest_tokens(opened.store, statistics.top_tokens[j]),
            promoted=tuple(tokens[j] for tokens in promoted),
            nearest=nearest[j],
            histogram=tuple(histograms[j].tolist()),
            context=rows[j].example,
            examples=examples.get(j),
        )
        for j in range(len(rows))
    )
    named = {token for page in pages for token in page.tokens()}
    token_ids = named | {token for page in pages for example in page.shown for token in example.token_ids}
    return Dashboard(
        title=opened.name,
        summary=summary,
        facts=tuple(_facts(opened, statistics)),
        columns=tuple(columns_of(values)),
        directions=tuple(directions),
        chosen_by=(
            "that write most into the difference of the models"
            if model.config.n_inputs == 1
            else "that turned furthest in the second stage"
            if not model.config.compares_models
            else "that latent scaling confirms, then those whose decoder norms differ most between the models"
        ),
        pages=pages,
        vocabulary=token_texts(tokenizer, sorted(token_ids)),
    )


def columns_of(values: Sequence[dict[str, Value]]) -> Iterable[Column]:
    """The columns in which some latent has a value. Where there is no relative norm, the table shows the share of the
    difference; of a partition it shows the parts instead of the classes, which follow from them."""
    there = {column.key: column for column in COLUMNS if any(v[column.key] not in (None, "") for v in values)}
    moved = {"difference_share": "relative_decoder_norm" not in there, "kind": "part" not in there}
    for key, column in there.items():
        yield replace(column, in_table=moved.get(key, column.in_table))


def by_interest(rows: Iterable[LatentRow], statistics: LatentStatistics) -> list[LatentRow]:
    """The most interesting first: those that latent scaling confirms, then those that changed most (tables.change_key).
    Latents that are hardly ever active come last."""

    def key(row: LatentRow) -> tuple[bool, bool, float, float]:
        few = int(statistics.n_firings[row.latent]) < FEW_FIRINGS
        first, second = change_key(row)
        return not row.confirmed, few, -first, -second

    return sorted(rows, key=key)


@torch.no_grad()
def nearest_latents(model: BatchTopKCrosscoder, dead: Tensor, n: int) -> list[tuple[tuple[int, float], ...]]:
    """For every latent the n others, dead ones left out, whose decoder vectors have the largest cosine with its own.

    A latent's vectors of both models count as one, in the models' own units.
    """
    vectors = torch.nn.functional.normalize(model.raw_decoder().flatten(1), dim=-1)
    hidden = dead.to(vectors.device)
    found: list[tuple[tuple[int, float], ...]] = []
    for chunk in torch.arange(len(vectors), device=vectors.device).split(COSINES_AT_ONCE):
        cosines = (vectors[chunk] @ vectors.T).masked_fill(hidden, -torch.inf)
        cosines[torch.arange(len(chunk), device=chunk.device), chunk] = -torch.inf
        best = torch.topk(cosines, min(n, len(vectors) - 1))
        for latents, near in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            found.append(tuple((j, min(c, 1.0)) for j, c in zip(latents, near, strict=True) if c > -math.inf))
    return found


def _examples(
    opened: OpenedCrosscoder, chosen: Tensor, statistics: LatentStatistics, config: DashboardConfig
) -> tuple[dict[int, Examples], dict[int, Family], Tensor]:
    """Examples and question families of the chosen latents, and [latent, bin] histograms of all."""
    maker = ExampleMaker(opened.store, config, token_kinds(opened.store, opened.tokenizer))
    examples: dict[int, Examples] = {}
    families: dict[int, Family] = {}
    histograms = torch.empty(0)
    for group in groups_within(chosen, statistics.n_firings, config.max_firings_held):
        firings, histograms = gather_firings(
            opened.model, opened.store, group, statistics.top_values[:, 0], config.n_bins, config.batch_size
        )
        for latent, (tokens, values) in zip(group.tolist(), firings, strict=True):
            made = maker.examples(latent, tokens.numpy(), values.numpy())
            if made is not None:
                examples[latent] = made
                families[latent] = maker.family(opened.families, tokens.numpy(), values.numpy())
    return examples, families, histograms


def _values(row: LatentRow, model: BatchTopKCrosscoder, added: Mapping[str, Sequence[Value]]) -> dict[str, Value]:
    """A latent's columns; what is no number is None."""
    known: dict[str, Any] = asdict(row) | {key: values[row.latent] for key, values in added.items()}
    nu = known.get("nu_err")
    known["exclusivity"] = None if nu is None else 1 - nu
    r = row.relative_decoder_norm
    known["norm_distance"] = None if r is None else abs(r - 0.5)
    if row.relative_decoder_norm is None:
        known["kind"] = None  # the latents of a difference SAE, or of a stagewise one, are all of one kind
    if model.config.n_delta:
        known["part"] = "shared" if row.latent < model.config.n_shared else "delta"
    values = {column.key: known.get(column.key) for column in COLUMNS}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _facts(opened: OpenedCrosscoder, statistics: LatentStatistics) -> Iterable[tuple[str, str]]:
    """What was analysed, as pairs of label and text. A model in a local folder is named by the folder alone."""
    model, store = opened.model, opened.store
    recorded = store.config.recorded
    name = str(recorded.get("model", ""))
    if name:
        yield "model", Path(name).name if Path(name).is_absolute() else name
    if recorded.get("pair"):
        other = recorded["pair"]["models"]["fine_tuned"]
        yield "fine-tuned", Path(other).name if Path(other).is_absolute() else other
    if recorded.get("layer"):
        yield "read at", f"layer {recorded['layer']}, {SITE_NAMES[recorded.get('site', 'mlp')]}"
    if recorded.get("dataset"):
        yield "data", f"{recorded['dataset']} {recorded.get('split', '')}".strip()
    yield "tokens", f"{statistics.n_tokens:,} in {len(store.documents):,} documents"
    yield "dictionary", f"{model.config.method}, {model.config.n_latents:,} latents"
