"""The plan before a run: what training needs against what there is, and where the activations are held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosscoder.activations.store import Place
from crosscoder.dictionaries.config import READ_TOKENS, CrosscoderConfig, TrainingConfig
from finqa.runtime.errors import UserError
from finqa.runtime.memory.free import free_memory
from finqa.runtime.memory.needs import Need
from finqa.runtime.memory.plan import USABLE, amount, check_fits

if TYPE_CHECKING:
    import torch

    from crosscoder.activations.store import ActivationStore

BY_AUTOGRAD, BY_HAND = 24, 16
"""Bytes that a step holds for each pair of token and latent besides the product: values, scores, what is kept, their
gradients; by hand, what the first step's selection sorts."""
PLACES = {"gpu": "on the GPU", "memory": "in memory", "disk": "memory-mapped"}
"""What is said of a store that is there."""


def training_need(
    crosscoder: CrosscoderConfig, training: TrainingConfig, by_hand: bool, product_bytes: int, processes: int = 1
) -> Need:
    """Memory of a run beside its activations, for each of the processes, which by hand share the latents and otherwise
    the tokens. `product_bytes` of a number in a product."""
    width = crosscoder.n_inputs * crosscoder.d_model
    parameters = 2 * width * crosscoder.n_latents + crosscoder.n_latents + width
    copies = product_bytes if by_hand or product_bytes < 4 else 0
    gradients = product_bytes if by_hand else 4
    tokens, latents, own = training.batch_size, crosscoder.n_latents, parameters
    if by_hand:
        latents, own = -(-latents // processes), -(-parameters // processes)
    else:
        tokens = -(-tokens // processes)
    pair = product_bytes + (BY_HAND if by_hand else BY_AUTOGRAD)
    step = tokens * (latents * pair + 8 * width * 4)
    of_scores = 12 * crosscoder.k * training.calibration_tokens
    calibration = READ_TOKENS * crosscoder.n_latents * BY_HAND + of_scores
    return Need(
        (
            ("weights", 4 * parameters, f"{parameters:,} parameters in fp32"),
            ("Adam", 8 * parameters, "two moments in fp32"),
            ("gradients and copies", (gradients + copies) * own, f"{gradients} and {copies} bytes each"),
            ("a step", max(step, calibration), f"{tokens:,} tokens x {latents:,} latents"),
        )
    )


def plan_training(
    store: ActivationStore, need: Need, device: torch.device | str, place: Place = "auto", processes: int = 1
) -> Place:
    """Print what a run needs and what there is; returns where its activations fit, or `place` if they do there.

    `device` is that of the run; processes on one CPU share its memory, and each holds activations of its own.
    Raises UserError, one line with the flags that help, where the run or its activations do not fit.
    """
    kind = str(device)
    on_gpu = kind.startswith("cuda")
    memory = free_memory("cpu") / processes
    there = free_memory(kind) if on_gpu else memory
    remedy = "what helps: a smaller --latents or --step-tokens" + (", or --device cpu" if on_gpu else "")
    check_fits("training", need, there, kind if on_gpu else "cpu", remedy, USABLE)
    left: dict[Place, float] = {"gpu": USABLE * there - need.total} if on_gpu else {}
    left["memory"] = USABLE * memory - (0 if on_gpu else need.total)
    chosen: Place = place
    if place == "auto":
        fits: list[Place] = [where for where, room in left.items() if store.size_bytes <= room]
        chosen = fits[0] if fits else "disk"
    elif place != "disk" and store.size_bytes > left.get(place, float("inf")):
        raise UserError(
            f"the activations in {store.folder} take {amount(store.size_bytes)}, and beside the run "
            f"{amount(max(0.0, left[place]))} are free {PLACES[place]}; give --store auto, or disk"
        )
    print(f"  {'activations':<23}{amount(store.size_bytes):>9}  {PLACES[chosen]} (--store)", flush=True)
    return chosen
