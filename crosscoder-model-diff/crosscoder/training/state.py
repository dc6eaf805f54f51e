"""What a run under way writes, so that it can be killed at any moment and go on as if it had not been."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from crosscoder.dictionaries import checkpoint
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from crosscoder.training.trainer import Trainer


def identity(trainer: Trainer) -> dict[str, Any]:
    """What an interrupted run must share with this one to be gone on with."""
    return {
        "crosscoder": asdict(trainer.model.config),
        "training": asdict(trainer.config) | {"betas": list(trainer.config.betas)},
        "activations": trainer.store.config.recorded.get("fingerprint", ""),
    }


def save(trainer: Trainer) -> None:
    """Write parameters, optimiser, counts, generator and progress into the trainer's folder."""
    tensors = {f"model.{name}": p.detach() for name, p in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in trainer.optimizer.state[parameter].items()}
    tensors |= {
        "since_selected": trainer.liveness.since_selected,
        "since_positive": trainer.liveness.since_positive,
        "generator": trainer.generator.get_state(),
        "first_reconstruction": trainer.first_reconstruction,
    }
    progress = {
        "identity": identity(trainer),
        "steps_done": trainer.steps_done,
        "drawn_anew": trainer.drawn_anew,
        "threshold": trainer.threshold.value,
    }
    checkpoint.save_training_state(trainer.folder, tensors, progress)


def resume(trainer: Trainer) -> bool:
    """Put an untouched trainer where the run in its folder was; False where none is under way there."""
    state = checkpoint.load_training_state(trainer.folder)
    if state is None:
        return False
    tensors, progress = state
    if progress["identity"] != identity(trainer):
        raise UserError(
            f"{trainer.folder} holds a run with other settings or data; give this one another --name, or --overwrite it"
        )
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        prefix = f"adam.{name}."
        trainer.optimizer.state[parameter] = {
            # Adam keeps its step count where its kernel wants it: on the parameter's device when fused.
            key.removeprefix(prefix): value.to(trainer.device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    trainer.liveness.since_selected = tensors["since_selected"].to(trainer.device)
    trainer.liveness.since_positive = tensors["since_positive"].to(trainer.device)
    trainer.first_reconstruction = tensors["first_reconstruction"].to(trainer.device)
    trainer.generator.set_state(tensors["generator"].to(torch.uint8))
    trainer.steps_done = progress["steps_done"]
    trainer.drawn_anew = progress["drawn_anew"]
    trainer.threshold.value = progress["threshold"]
    return True
