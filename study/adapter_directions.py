"""The adapter's own directions: where a LoRA adapter writes, without any dictionary.

An adapted module gives W h + s B A h. Where its output goes into the residual stream (o_proj, down_proj), what the
adapter adds there lies in the columns of B, and in some directions more than in others:

    by weights    the left singular vectors of s B A: how much a direction gets of an input of unit length
    by outputs    the (uncentred) principal directions of s B A h on documents: how much it gets on these

Both are computed from the r x r part that matters, exactly, in fp64; no matrix of the module's size is made. What an
adapter on q, k and v changes goes through the attention, and has no such directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

    from crosscoder.activations.collection import Document

SITE_OF = {"o_proj": "attention", "down_proj": "mlp"}
"""The modules that write into the residual stream, with the site that is their output."""


@dataclass(frozen=True)
class AdapterDirections:
    """Directions of one module's adapter, the strongest first, on the CPU."""

    layer: int
    """Counted from 1."""
    module: str
    """`o_proj` or `down_proj`."""
    strengths: Tensor
    """[rank] fp64: singular values of s B A; by outputs the root mean square over tokens along the direction."""
    vectors: Tensor
    """[rank, d_model] fp64, orthonormal."""


def weight_directions(model: PeftModel) -> list[AdapterDirections]:
    """Singular directions of the adapted modules that write into the residual stream, by layer; UserError for none."""
    found = []
    for layer, module, lora in _writing(model):
        a, b = _matrices(lora)
        q_b, r_b = torch.linalg.qr(b)
        _, r_a = torch.linalg.qr(a.T)
        inner, strengths, _ = torch.linalg.svd(r_b @ r_a.T)
        found.append(AdapterDirections(layer, module, strengths.cpu(), (q_b @ inner).T.contiguous().cpu()))
    return found


@torch.no_grad()
def output_directions(model: PeftModel, documents: Iterable[Document]) -> list[AdapterDirections]:
    """Principal directions of what each such module's adapter gives, over all tokens but untouched ones (BOS, say).

    The model runs once over each document, its adapter on and in evaluation mode. UserError where no module of the
    adapter writes into the residual stream, or there is no token.
    """
    writing = list(_writing(model))
    moments: list[Any] = [0.0] * len(writing)
    read = torch.zeros(0, dtype=torch.bool)
    n_tokens = 0

    def keep(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            inner = output[0][read.to(output.device)].double()  # A h of the tokens that count: [tokens, rank]
            moments[number] = moments[number] + inner.T @ inner

        return hook

    model.eval()
    with ExitStack() as hooks:
        for number, (_, _, lora) in enumerate(writing):
            handle = lora.lora_A[lora.active_adapters[0]].register_forward_hook(keep(number))
            hooks.callback(handle.remove)
        for document in documents:
            read = torch.ones(len(document.ids), dtype=torch.bool)
            read[list(document.untouched)] = False
            n_tokens += int(read.sum())
            device = next(model.parameters()).device
            model(input_ids=torch.tensor([document.ids], device=device), use_cache=False)
    if n_tokens == 0:
        raise UserError("the adapter's outputs were asked for on no token; give documents")
    found = []
    for (layer, module, lora), moment in zip(writing, moments, strict=True):
        _, b = _matrices(lora)
        q_b, r_b = torch.linalg.qr(b)
        squares, inner = torch.linalg.eigh(r_b @ (moment / n_tokens) @ r_b.T)  # rising
        strengths = squares.flip(0).clamp_min(0).sqrt()
        found.append(AdapterDirections(layer, module, strengths.cpu(), (q_b @ inner.flip(-1)).T.contiguous().cpu()))
    return found


def strongest(found: Sequence[AdapterDirections], n: int, target: Target | None = None) -> Tensor:
    """[at most n, d_model] fp32 of length 1: of all modules the directions of the largest strength, largest first.

    With a target only of the modules that reach it directly: all up to its layer for the residual stream, else the
    one whose output it is. UserError where there is none. They need not be at right angles.
    """
    reaching = [each for each in found if target is None or _reaches(each, target)]
    if not reaching:
        where = f"layer {target.layer}, {target.site}" if target is not None else "the model"
        raise UserError(
            f"no module of the adapter writes into {where}; read the residual stream at or above its layers"
        )
    strengths = torch.cat([each.strengths for each in reaching])
    order = strengths.argsort(descending=True, stable=True)[:n]
    return torch.cat([each.vectors for each in reaching])[order].float()


def _reaches(one: AdapterDirections, target: Target) -> bool:
    if target.site == "residual":
        return one.layer <= target.layer
    return one.layer == target.layer and SITE_OF[one.module] == target.site


def _writing(model: PeftModel) -> Iterator[tuple[int, str, Any]]:
    """Layer, name and LoRA layer of the adapted modules that write into the residual stream, in order."""
    from peft.tuners.lora import LoraLayer

    n_found = 0
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, LoraLayer) and parts[-1] in SITE_OF:
            n_found += 1
            yield int(parts[parts.index("layers") + 1]) + 1, parts[-1], module
    if not n_found:
        raise UserError(
            f"no module of the adapter writes into the residual stream ({' or '.join(SITE_OF)}); fine-tune with one of "
            "them among --lora-modules"
        )


def _matrices(lora: Any) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and s B [outputs, rank] of the active adapter, fp64."""
    name = lora.active_adapters[0]
    a, b = lora.lora_A[name].weight.detach().double(), lora.lora_B[name].weight.detach().double()
    return a, lora.scaling[name] * b
