"""The table of latents: one row each, as a record and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crosscoder.activations.store import ActivationStore
from crosscoder.model import BatchTopKCrosscoder
from crosscoder.reading import analysis
from crosscoder.reading.latent_scaling import LatentScaling, own_model, verdict
from crosscoder.reading.lens import Unembedding, promoted_tokens
from crosscoder.reading.statistics import LatentStatistics
from finqa.paths import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_TOKENS = 5
CONTEXT_TOKENS = 12


@dataclass(frozen=True)
class LatentRow:
    """What is known of one latent."""

    latent: int
    kind: str
    """Class by Delta (analysis.classify); `difference` in a difference SAE, which has one decoder vector a latent."""
    delta: float | None
    """This and what else compares two decoder vectors is None, empty in CSV, for a difference SAE."""
    relative_decoder_norm: float | None
    instruct_norm: float | None
    """Length of the decoder vector in the instruct model's own units."""
    fine_tuned_norm: float | None
    cosine: float | None
    """Of the two decoder vectors."""
    frequency: float
    """Share of tokens on which it is active."""
    completion_share: float
    """Of the tokens on which it is active, the share in programs; 0 where it is active on none."""
    mean_activation: float
    max_activation: float
    top_tokens: str
    """The tokens it fires on most strongly, the commonest first."""
    example: str
    """Context of its largest activation, which is marked by «»."""
    promoted: str
    """Tokens that its fine-tuned decoder vector promotes (logit lens)."""
    promoted_instruct: str
    """The same of its instruct decoder vector."""
    scaling_firings: int | None = None
    """Tokens of the held-out documents on which it is active; this and the next are of latent scaling."""
    beta_err: float | None = None
    """Slope in the probe's own model: the instruct model for instruct-only latents, else the fine-tuned one."""
    beta_rec: float | None = None
    nu_err: float | None = None
    """The other model's slope over the own model's."""
    nu_rec: float | None = None
    verdict: str = ""
    """What latent scaling says of a latent that Delta calls exclusive (latent_scaling.verdict)."""


def latent_table(
    model: BatchTopKCrosscoder,
    statistics: LatentStatistics,
    store: ActivationStore,
    tokenizer: PreTrainedTokenizerBase,
    unembedding: Unembedding,
    scaling: LatentScaling | None = None,
) -> list[LatentRow]:
    """A row a latent, in their order, dead ones included. With `scaling` (of held-out documents) its columns too."""
    decoder = model.raw_decoder()
    directions = [model.difference_decoder()] if decoder.shape[1] == 1 else list(decoder.unbind(dim=1))
    promoted = [promoted_tokens(vectors, unembedding, N_TOKENS).cpu() for vectors in directions]
    completion = statistics.n_completion_firings / statistics.n_firings.clamp_min(1)
    contexts = Contexts(store, tokenizer)
    compared = _compared(model)
    return [
        LatentRow(
            latent=j,
            **compared[j],
            frequency=float(statistics.frequency[j]),
            completion_share=float(completion[j]),
            mean_activation=float(statistics.mean_activation[j]),
            max_activation=float(statistics.top_values[j, 0]),
            top_tokens=contexts.commonest_tokens(statistics.top_tokens[j]),
            example=contexts.around(int(statistics.top_tokens[j, 0])),
            promoted=contexts.tokens(promoted[-1][j].tolist()),
            promoted_instruct=contexts.tokens(promoted[0][j].tolist()) if len(promoted) == 2 else "",
            **(_scaled(scaling, j, compared[j]["kind"]) if scaling else {}),
        )
        for j in range(model.config.n_latents)
    ]


def _compared(model: BatchTopKCrosscoder) -> list[dict[str, Any]]:
    """A latent's columns that compare its two decoder vectors."""
    names = ("kind", "delta", "relative_decoder_norm", "instruct_norm", "fine_tuned_norm", "cosine")
    if model.config.n_inputs == 1:
        return [dict.fromkeys(names) | {"kind": "difference"} for _ in range(model.config.n_latents)]
    norms, cosines = analysis.decoder_norms(model), analysis.decoder_cosines(model)
    deltas, relative = analysis.delta(norms), analysis.relative_decoder_norm(norms)
    columns = (analysis.classify(deltas), *(c.tolist() for c in (deltas, relative, norms[:, 0], norms[:, 1], cosines)))
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _scaled(scaling: LatentScaling, latent: int, kind: analysis.LatentClass) -> dict[str, Any]:
    """A latent's columns of latent scaling; what is not a number is None."""
    own = own_model(kind)
    probe = 1 if own is None else own
    values = {
        "beta_err": scaling.beta_err[latent, probe, probe],
        "beta_rec": scaling.beta_rec[latent, probe, probe],
        "nu_err": scaling.nu_err[latent, probe],
        "nu_rec": scaling.nu_rec[latent, probe],
    }
    numbers = {name: value.item() if torch.isfinite(value) else None for name, value in values.items()}
    return numbers | {"scaling_firings": int(scaling.n[latent]), "verdict": verdict(scaling, latent, kind)}


def write_latent_table(path: Path, rows: Sequence[LatentRow]) -> None:
    """latents.csv: the rows in their order."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(LatentRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue())


def most_fine_tuned(rows: Sequence[LatentRow], n: int, min_frequency: float = 0.0) -> list[LatentRow]:
    """The active latents that lean most towards the fine-tuned model, by relative decoder norm; those of a difference
    SAE, which have none, by how often they are active."""
    active = [row for row in rows if row.frequency > min_frequency]
    return sorted(
        active, key=lambda row: -(row.frequency if row.relative_decoder_norm is None else row.relative_decoder_norm)
    )[:n]


class Contexts:
    """Turns token indices of a store into text."""

    def __init__(self, store: ActivationStore, tokenizer: PreTrainedTokenizerBase):
        self._store = store
        self._tokenizer = tokenizer

    def tokens(self, ids: Sequence[int]) -> str:
        """Token ids as quoted text, so that spaces and line breaks show."""
        return " ".join(repr(self._tokenizer.decode([i])) for i in ids)

    def commonest_tokens(self, indices: torch.Tensor) -> str:
        """Tokens at these indices (-1 is none), the commonest first."""
        there = indices[indices >= 0]
        counts = Counter(self._store.token_id[there].tolist())
        return self.tokens([token for token, _ in counts.most_common(N_TOKENS)])

    def around(self, index: int) -> str:
        """The text up to and after one token, which is marked; empty for -1."""
        if index < 0:
            return ""
        document = self._store.document[index]
        first, last = max(0, index - CONTEXT_TOKENS), min(len(self._store), index + CONTEXT_TOKENS // 2 + 1)
        near = [i for i in range(first, last) if self._store.document[i] == document]
        before = self._store.token_id[[i for i in near if i < index]].tolist()
        after = self._store.token_id[[i for i in near if i > index]].tolist()
        decode = self._tokenizer.decode
        return f"{decode(before)}«{decode([int(self._store.token_id[index])])}»{decode(after)}"
