"""The table of latents: one row each, as a record and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from crosscoder.activations.layout import token_texts
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import EXCLUSIVE, LatentScaling, verdict
from crosscoder.analysis.lens import Unembedding, promoted_tokens
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.dictionaries.methods import StagewiseSAE
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError
from finqa.runtime.paths import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_TOKENS = 5
CONTEXT_TOKENS = 12
EFFECT = "causal_effect"
ADDED = ("label", "label_score", EFFECT)
"""Columns that later commands add to latents.csv: labels, and causal effects."""


@dataclass(frozen=True)
class LatentRow:
    """What is known of one latent."""

    latent: int
    kind: str
    """Class (analysis.latent_classes); `difference` in a difference SAE, which has one decoder vector a latent, and
    `before and after` in a stagewise SAE."""
    delta: float | None
    """See measures.delta. Like every figure that compares decoder norms, it is None (empty in CSV) for a difference SAE
    and for a stagewise SAE."""
    relative_decoder_norm: float | None
    instruct_norm: float | None
    """Length of the decoder vector in the instruct model's own units."""
    fine_tuned_norm: float | None
    cosine: float | None
    """Cosine of the two decoder vectors; None for a difference SAE."""
    frequency: float
    """Share of tokens on which it is active."""
    completion_share: float | None
    """Of the tokens on which it is active, the share that is in completions (FinQA's programs). 0 where it is never
    active, None where no document has a prompt."""
    template_share: float | None
    """Share of its summed activation on tokens that every document has alike (statistics.template_share); None
    where the kinds of the tokens were not asked for, or the set has no such tokens."""
    difference_share: float
    """Its share of what all latents write into the difference of the models: the mean squared length of what it adds to
    fine-tuned less instruct, over the sum of that over all latents. In the models' own units, without the products of
    two latents."""
    mean_activation: float
    max_activation: float
    top_tokens: str
    """The tokens it fires on most strongly, the commonest first."""
    example: str
    """Text around its largest activation; «» mark that token."""
    promoted: str
    """Tokens that its fine-tuned decoder vector promotes (logit lens); a difference SAE's one vector."""
    promoted_instruct: str
    """Tokens that its instruct decoder vector promotes."""
    scaling_firings: int | None = None
    """Tokens of the held-out documents on which it is active. This field and those below, but `change`, are of latent
    scaling."""
    beta_err: float | None = None
    """Slope in the probe's own model (LatentScaling.probes): the model that the latent is confirmed for, else the
    instruct model for instruct-only latents and the fine-tuned one for all others."""
    beta_rec: float | None = None
    nu_err: float | None = None
    """The other model's slope over the own model's."""
    nu_rec: float | None = None
    confirmed: str = ""
    """The class whose conditions of latent scaling it meets, `instruct-only`, `fine-tuned-only` or `both`, whatever its
    class by Delta."""
    instruct_verdict: str = ""
    """What latent scaling says of it as an instruct-only latent (latent_scaling.verdict); empty where it is dead."""
    fine_tuned_verdict: str = ""
    """What latent scaling says of it as a fine-tuned-only latent; empty where it is dead."""
    change: float | None = None
    """How far it turned when a stagewise SAE was trained on with the fine-tuned model, 0 to 2 (StagewiseSAE.change):
    1 less the mean cosine of its encoder and its decoder vector before and after; None for other methods."""


def latent_table(
    model: BatchTopKCrosscoder,
    statistics: LatentStatistics,
    store: ActivationStore,
    tokenizer: PreTrainedTokenizerBase,
    unembedding: Unembedding,
    scaling: LatentScaling | None = None,
) -> list[LatentRow]:
    """One row per latent, in their order, dead ones included; with the columns of `scaling` (on held-out documents)."""
    directions = analysis.decoder_directions(model).values()
    promoted = [promoted_tokens(vectors, unembedding, N_TOKENS) for vectors in directions]
    prompted = any(document.n_prompt > 1 for document in store.documents)
    completion = statistics.n_completion_firings / statistics.n_firings.clamp_min(1)
    template = statistics.template_share
    written = difference_shares(model, statistics)
    contexts = Contexts(store, tokenizer)
    compared = _compared(model)
    scaled = _scaled(scaling, [of["kind"] for of in compared], ~statistics.dead) if scaling else [{}] * len(compared)
    return [
        LatentRow(
            latent=j,
            **compared[j],
            frequency=float(statistics.frequency[j]),
            completion_share=float(completion[j]) if prompted else None,
            template_share=None if template is None else float(template[j]),
            difference_share=float(written[j]),
            mean_activation=float(statistics.mean_activation[j]),
            max_activation=float(statistics.top_values[j, 0]),
            top_tokens=contexts.tokens(commonest_tokens(store, statistics.top_tokens[j])),
            example=contexts.around(int(statistics.top_tokens[j, 0])),
            promoted=contexts.tokens(promoted[-1][j]),
            promoted_instruct=contexts.tokens(promoted[0][j]) if len(promoted) == 2 else "",
            **scaled[j],
        )
        for j in range(model.config.n_latents)
    ]


def difference_shares(model: BatchTopKCrosscoder, statistics: LatentStatistics) -> Tensor:
    """[latent] fp64, on the CPU: LatentRow.difference_share of each; 0 where none writes any difference."""
    written = model.written_squares(statistics.mean_products.to(model.b_dec.device)).cpu()
    return written / written.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _compared(model: BatchTopKCrosscoder) -> list[dict[str, Any]]:
    """For each latent the columns that compare its two decoder vectors; NaN becomes None."""
    names = ("kind", "delta", "relative_decoder_norm", "instruct_norm", "fine_tuned_norm", "cosine")
    none: dict[str, Any] = dict.fromkeys(names)
    if isinstance(model, StagewiseSAE):
        turned = zip(analysis.decoder_cosines(model).tolist(), model.change().tolist(), strict=True)
        return [none | {"kind": "before and after", "cosine": cosine, "change": change} for cosine, change in turned]
    if not model.config.compares_models:
        return [none | {"kind": "difference"} for _ in range(model.config.n_latents)]
    norms, cosines = analysis.decoder_norms(model), analysis.decoder_cosines(model)
    deltas, relative = analysis.delta(norms), analysis.relative_decoder_norm(norms)
    numbers = (map(_number, c.tolist()) for c in (deltas, relative, norms[:, 0], norms[:, 1], cosines))
    columns = (analysis.latent_classes(model), *numbers)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _scaled(scaling: LatentScaling, kinds: Sequence[analysis.LatentClass], alive: Tensor) -> list[dict[str, Any]]:
    """For each latent the columns of latent scaling; NaN becomes None."""
    probes, every = scaling.probes(kinds), torch.arange(len(kinds))
    columns = {
        "beta_err": scaling.beta_err[every, probes, probes],
        "beta_rec": scaling.beta_rec[every, probes, probes],
        "nu_err": scaling.nu_err[every, probes],
        "nu_rec": scaling.nu_rec[every, probes],
    }
    rows: list[dict[str, Any]] = []
    for j, lives in enumerate(alive.tolist()):
        row: dict[str, Any] = {name: _number(values[j].item()) for name, values in columns.items()}
        row["scaling_firings"] = int(scaling.n[j])
        if lives:
            meets = [kind for kind, own in EXCLUSIVE.items() if scaling.exclusive[j, own]]
            row["confirmed"] = "both" if len(meets) > 1 else "".join(meets)
            row["instruct_verdict"], row["fine_tuned_verdict"] = (verdict(scaling, j, own) for own in (0, 1))
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_latent_table(path: Path, rows: Sequence[LatentRow], more: Mapping[int, dict[str, Any]] | None = None) -> None:
    """latents.csv: the rows in their order; `more` has further columns, by latent."""
    cells = [asdict(row) | (more or {}).get(row.latent, {}) for row in rows]
    write_csv(path, cells, [field.name for field in fields(LatentRow)])


def read_added(path: Path, rows: Sequence[LatentRow]) -> dict[str, list[Any]]:
    """The columns of ADDED that a latents.csv has, in the order of `rows`, with None for what has no cell.

    UserError where a number cannot be read.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="") as file:
            there = {int(of["latent"]): of for of in csv.DictReader(file)}
        cells = {name: [there.get(row.latent, {}).get(name) or None for row in rows] for name in ADDED}
        return {
            name: [cell if name == "label" or cell is None else float(cell) for cell in of]
            for name, of in cells.items()
            if any(of)
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {error}; write it anew with analyse.py") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV: a column for every key that any row has, `columns` first; NaN becomes an empty cell."""
    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: None if value != value else value for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def read_latent_table(path: Path) -> list[LatentRow]:
    """The rows of latents.csv, without what was added to them."""
    kinds = get_type_hints(LatentRow)

    def value(name: str, text: str) -> Any:
        if kinds[name] is str:
            return text
        return (int if kinds[name] in (int, int | None) else float)(text) if text else None

    with path.open(newline="") as file:
        return [LatentRow(**{name: value(name, row[name]) for name in kinds}) for row in csv.DictReader(file)]


def ordered_by(model: BatchTopKCrosscoder) -> str:
    """What `most_changed` orders latents by, in words."""
    if model.config.compares_models:
        return "distance of relative norm from 1/2"
    return "change" if isinstance(model, StagewiseSAE) else "difference_share"


def change_key(row: LatentRow) -> tuple[float, float]:
    """Sort key: how much a latent changed; larger is more.

    In a crosscoder that is the distance of the relative decoder norm from 1/2; latents that only one model has, which
    are all at distance 1/2, are ordered by their share of the difference. In a stagewise SAE it is how far the latent
    turned, in a difference SAE its share of the difference.
    """
    r = row.relative_decoder_norm
    change = row.change if r is None else abs(r - 0.5)
    return row.difference_share if change is None else change, row.difference_share if change == 0.5 else 0.0


def most_changed(rows: Sequence[LatentRow], n: int, min_frequency: float = 0.0) -> list[LatentRow]:
    """The `n` latents that changed most (`change_key`) among those active on more than this share of the tokens."""
    return sorted((row for row in rows if row.frequency > min_frequency), key=change_key, reverse=True)[:n]


def commonest_tokens(store: ActivationStore, indices: Tensor) -> tuple[int, ...]:
    """The N_TOKENS commonest token ids at these indices of the store (-1 is none), the commonest first."""
    counts = Counter(store.token_id[indices[indices >= 0]].tolist())
    return tuple(token for token, _ in counts.most_common(N_TOKENS))


class Contexts:
    """Turns token indices of a store into text."""

    def __init__(self, store: ActivationStore, tokenizer: PreTrainedTokenizerBase):
        self._store = store
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def tokens(self, ids: Sequence[int]) -> str:
        """Token ids as quoted text, so that spaces and line breaks show."""
        return " ".join(map(repr, self._spelt(ids)))

    def around(self, index: int) -> str:
        """The text up to and after one token, which is marked; empty for -1."""
        if index < 0:
            return ""
        document = self._store.document[index]
        first, last = max(0, index - CONTEXT_TOKENS), min(len(self._store), index + CONTEXT_TOKENS // 2 + 1)
        near = torch.arange(first, last)[self._store.document[first:last] == document]
        texts = self._spelt(self._store.token_id[near].tolist())
        at = int((near == index).nonzero())
        return f"{''.join(texts[:at])}«{texts[at]}»{''.join(texts[at + 1 :])}"

    def _spelt(self, ids: Sequence[int]) -> list[str]:
        """What each id spells, its leading space included."""
        self._texts |= token_texts(self._tokenizer, {i for i in ids if i not in self._texts})
        return [self._texts[i] for i in ids]
