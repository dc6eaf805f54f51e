"""Does another way to serve an adapter give what the base with its adapter gives? KL of their next-token distributions.

Both the check after an evaluation (finqa.evaluation.adapter_check) and the one before a merged model is kept
(merge_and_push_lora.py) ask this, on completions of the task, and hold the answer against the same limit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.models.students import StudentRun, default_device, load_adapter, load_base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AGREEMENT = 0.05
"""Largest mean KL between two ways to serve the adapter, as a share of the KL between base and adapter."""

Sequences = Sequence[tuple[list[int], int]]
"""Token ids, and how many of them are prompt."""


def unmerged(
    run: StudentRun,
    student: Path,
    sequences: Sequences,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`logprobs` by the base, and by the base with the adapter in folder `student`."""
    model: Any = load_base(run.model, dtype, device, run.load_in_4bit, run.revision)
    base = logprobs(model, sequences)
    model = load_adapter(model, student).eval()
    adapted = logprobs(model, sequences)
    del model
    _free()
    return base, adapted


def whole_model(
    folder: Path, sequences: Sequences, dtype: torch.dtype | None = None, device: str | None = None
) -> list[Tensor]:
    """`logprobs` by the model in a folder."""
    found = logprobs(load_base(str(folder), dtype, device), sequences)
    _free()
    return found


def logprobs(model: Any, sequences: Sequences) -> list[Tensor]:
    """Log-probabilities [completion tokens, vocabulary] of every sequence, fp32 on the CPU."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, n_prompt in sequences:
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, n_prompt - 1 : -1]
            found.append(logits.float().log_softmax(-1).cpu())
    return found


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) of log-probabilities [tokens, vocabulary], a number a token [tokens], in fp64."""
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)


def mean_kl(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """Mean of `kl` over the tokens of all sequences, in nats."""
    return mean(map(kl, p, q))


def same_first(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """Share of tokens with the same likeliest successor in both."""
    return mean((one.argmax(-1) == other.argmax(-1)).double() for one, other in zip(p, q, strict=True))


def mean(tokens: Iterable[Tensor]) -> float:
    """Mean over the tokens of all sequences."""
    import torch

    return float(torch.cat(list(tokens)).mean())


def agrees(divergence: float, of_base: float) -> bool:
    """Whether a mean KL from base + adapter is small beside that of the base, which must not be 0."""
    return of_base > 0 and divergence <= AGREEMENT * of_base


def _free() -> None:
    import torch

    gc.collect()
    if default_device() != "cpu":
        torch.cuda.empty_cache()
