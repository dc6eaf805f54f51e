"""The table of latents: one row each, as a record and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosscoder import analysis
from crosscoder.activation_store import ActivationStore
from crosscoder.lens import Unembedding, promoted_tokens
from crosscoder.model import BatchTopKCrosscoder
from crosscoder.statistics import LatentStatistics
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
    """Class by Delta (analysis.classify)."""
    delta: float
    relative_decoder_norm: float
    instruct_norm: float
    """Length of the decoder vector in the instruct model's own units."""
    fine_tuned_norm: float
    cosine: float
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


def latent_table(
    model: BatchTopKCrosscoder,
    statistics: LatentStatistics,
    store: ActivationStore,
    tokenizer: PreTrainedTokenizerBase,
    unembedding: Unembedding,
) -> list[LatentRow]:
    """A row a latent, in their order, the dead ones included."""
    decoder, norms = model.raw_decoder(), analysis.decoder_norms(model)
    deltas, relative = analysis.delta(norms), analysis.relative_decoder_norm(norms)
    kinds, cosines = analysis.classify(deltas), analysis.decoder_cosines(model)
    completion = statistics.n_completion_firings / statistics.n_firings.clamp_min(1)
    promoted = [promoted_tokens(decoder[:, m], unembedding, N_TOKENS).cpu() for m in range(2)]
    contexts = Contexts(store, tokenizer)
    return [
        LatentRow(
            latent=j,
            kind=kinds[j],
            delta=float(deltas[j]),
            relative_decoder_norm=float(relative[j]),
            instruct_norm=float(norms[j, 0]),
            fine_tuned_norm=float(norms[j, 1]),
            cosine=float(cosines[j]),
            frequency=float(statistics.frequency[j]),
            completion_share=float(completion[j]),
            mean_activation=float(statistics.mean_activation[j]),
            max_activation=float(statistics.top_values[j, 0]),
            top_tokens=contexts.commonest_tokens(statistics.top_tokens[j]),
            example=contexts.around(int(statistics.top_tokens[j, 0])),
            promoted=contexts.tokens(promoted[1][j].tolist()),
            promoted_instruct=contexts.tokens(promoted[0][j].tolist()),
        )
        for j in range(model.config.n_latents)
    ]


def write_latent_table(path: Path, rows: Sequence[LatentRow]) -> None:
    """latents.csv: the rows in their order."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(LatentRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue())


def most_fine_tuned(rows: Sequence[LatentRow], n: int, min_frequency: float = 0.0) -> list[LatentRow]:
    """The active latents that lean most towards the fine-tuned model, by relative decoder norm."""
    active = [row for row in rows if row.frequency > min_frequency]
    return sorted(active, key=lambda row: -row.relative_decoder_norm)[:n]


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
