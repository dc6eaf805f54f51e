"""Whole-site patches: how much of what fine-tuning added does one site of one layer carry?

The activation of a site in one model is put in place of the other model's, for every position but BOS, and what
that recovers is measured on gold programs, teacher-forced. It is the ceiling of what any set of latents read at that
site can do, so it is measured first.

Direction: `sufficiency` puts the fine-tuned activation into the instruct model; `necessity` puts the instruct
activation into the fine-tuned model. Carrier: whose layers run above the patch, the receiving model's own (`own`), or
the other model's (`other`): the fine-tuned upper half above a patched instruct lower half.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target, decoder_layers, reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Direction = Literal["sufficiency", "necessity"]
Carrier = Literal["own", "other"]
Key = tuple[Target, Direction, Carrier]


@dataclass(frozen=True)
class Batch:
    """Documents side by side, padded on the right."""

    ids: Tensor
    """[documents, time] int64."""
    predicting: Tensor
    """[documents, time] bool: positions whose next token is of the program or its end."""
    patched: Tensor
    """[documents, time] bool: positions that a patch may change; not BOS, not padding."""


@dataclass(frozen=True)
class Agreement:
    """How near a model is to the fine-tuned one on gold programs, a number for each document."""

    divergence: Tensor
    """[documents] fp64: mean over the program's tokens of KL(fine-tuned || model), nats."""
    exact: Tensor
    """[documents] bool: the model's best next token is the true one throughout the program."""


@dataclass(frozen=True)
class Ceiling:
    """What a patch of one site recovers."""

    target: Target
    direction: Direction
    carrier: Carrier
    divergence_closed: float
    """Sufficiency: 1 - KL(patched) / KL(instruct); necessity: KL(patched) / KL(instruct), the share of the gap that
    taking the site away opens. Sums over documents; not a number where the models agree."""
    exact: float
    """Share of programs that are exact with the patch."""
    exact_recovered: float
    """Sufficiency: (exact - instruct) / (fine-tuned - instruct); necessity: (fine-tuned - exact) over the same."""


def batch_of(documents: Sequence[Document], skip_first: bool = True) -> Batch:
    """`skip_first`: the first token is BOS and stays as it is."""
    longest = max(len(document.ids) for document in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    patched = torch.zeros_like(predicting)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length] = torch.tensor(document.ids)
        predicting[row, document.n_prompt - 1 : length - 1] = True
        patched[row, int(skip_first) : length] = True
    return Batch(ids, predicting, patched)


@contextlib.contextmanager
def replaced(model: nn.Module, target: Target, activation: Tensor, where: Tensor) -> Iterator[None]:
    """While open, `target` of the model gives `activation` [documents, time, d_model] at the positions `where`."""
    block = decoder_layers(model)[target.layer - 1]
    module = {"attention": "self_attn", "mlp": "mlp"}.get(target.site)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = torch.where(where[..., None], activation.to(hidden.dtype), hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = (getattr(block, module) if module else block).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def with_upper_half(lower: Any, upper: Any, layer: int) -> Any:
    """`lower` up to and with `layer` (counted from 1), `upper` above; the modules are shared, nothing is copied."""
    model = copy.copy(lower)
    model._modules = dict(lower._modules)
    model._modules["model"] = inner = copy.copy(lower.model)
    inner._modules = dict(lower.model._modules)
    inner._modules["layers"] = nn.ModuleList([*lower.model.layers[:layer], *upper.model.layers[layer:]])
    for name in ("norm", "rotary_emb"):
        inner._modules[name] = upper.model._modules[name]
    model._modules["lm_head"] = upper._modules["lm_head"]
    return model


@torch.no_grad()
def program_logits(model: Any, batch: Batch) -> Tensor:
    """[predicting positions, vocabulary] fp32, document after document."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.predicting]
    return model.lm_head(hidden).float()


def agreement(logits: Tensor, fine_tuned: Tensor, batch: Batch) -> Agreement:
    """Of a model's program_logits with the fine-tuned model's."""
    ours, theirs = logits.log_softmax(-1), fine_tuned.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).double()
    true = torch.roll(batch.ids, -1, dims=1)[batch.predicting]
    wrong = logits.argmax(-1) != true
    document = batch.predicting.nonzero()[:, 0]
    counts = batch.predicting.sum(1)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, document, divergence)
    mistakes = torch.zeros(len(counts)).index_add_(0, document, wrong.float())
    return Agreement(sums / counts, mistakes == 0)


def patched_agreement(
    instruct: PreTrainedModel,
    fine_tuned: PreTrainedModel,
    batch: Batch,
    target: Target,
    direction: Direction,
    carrier: Carrier,
    reference: Tensor,
) -> Agreement:
    """Of the patched model with the fine-tuned one, whose program_logits are `reference`."""
    receiver, giver = (instruct, fine_tuned) if direction == "sufficiency" else (fine_tuned, instruct)
    model = receiver if carrier == "own" else with_upper_half(receiver, giver, target.layer)
    (activation,) = reader(giver, [target], "hooks")(batch.ids)
    with replaced(model, target, activation, batch.patched):
        return agreement(program_logits(model, batch), reference, batch)


def ceilings(
    instruct: PreTrainedModel,
    fine_tuned: PreTrainedModel,
    documents: Sequence[Document],
    targets: Sequence[Target],
    directions: Sequence[Direction] = ("sufficiency", "necessity"),
    carriers: Sequence[Carrier] = ("own", "other"),
    batch_size: int = 100,
) -> list[Ceiling]:
    """Every combination over all documents, both models in eval mode on the CPU, in fp32 or as they are."""
    keys: list[Key] = [(t, d, c) for t in targets for d in directions for c in carriers]
    plain: list[tuple[Agreement, Agreement]] = []
    parts: dict[Key, list[Agreement]] = {key: [] for key in keys}
    for start in range(0, len(documents), batch_size):
        batch = batch_of(documents[start : start + batch_size])
        reference = program_logits(fine_tuned, batch)
        without = agreement(program_logits(instruct, batch), reference, batch)
        plain.append((without, agreement(reference, reference, batch)))
        for key in keys:
            parts[key].append(patched_agreement(instruct, fine_tuned, batch, *key, reference))
    base, full = (_joined([pair[i] for pair in plain]) for i in range(2))
    return [_ceiling(*key, _joined(parts[key]), base, full) for key in keys]


def _ceiling(
    target: Target, direction: Direction, carrier: Carrier, patched: Agreement, base: Agreement, full: Agreement
) -> Ceiling:
    gap = float(base.divergence.sum())
    remaining = float(patched.divergence.sum()) / gap if gap > 0 else float("nan")
    low, high, exact = (float(a.exact.double().mean()) for a in (base, full, patched))
    distance = exact - low if direction == "sufficiency" else high - exact
    return Ceiling(
        target=target,
        direction=direction,
        carrier=carrier,
        divergence_closed=1 - remaining if direction == "sufficiency" else remaining,
        exact=exact,
        exact_recovered=distance / (high - low) if high != low else float("nan"),
    )


def _joined(parts: Sequence[Agreement]) -> Agreement:
    return Agreement(torch.cat([p.divergence for p in parts]), torch.cat([p.exact for p in parts]))
