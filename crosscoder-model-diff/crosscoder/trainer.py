"""Trains a BatchTopK crosscoder on an activation store: losses.py, liveness.py and threshold.py define the terms."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder import checkpoint, losses
from crosscoder.activation_store import ActivationStore, ShuffledOrder, Split
from crosscoder.config import TrainingConfig
from crosscoder.liveness import Liveness, draw_anew
from crosscoder.model import BatchTopKCrosscoder, Selection
from crosscoder.threshold import RunningThreshold, calibrated_threshold
from finqa.errors import UserError

MEDIAN_TOKENS = 16_384
"""Training tokens from which the start of the decoder bias is taken."""


class StepRecord(NamedTuple):
    """What a logged step looked like; every figure is of that step's batch."""

    step: int
    """Counted from 1."""
    tokens: int
    """Read so far."""
    loss: float
    reconstruction: float
    auxiliary: float
    explained_variance: tuple[float, float]
    """Of the instruct and the fine-tuned model, on the training batch (losses.batch_explained_variance)."""
    explained_variance_published: tuple[float, float]
    """The published run's figure (losses.published_explained_variance)."""
    dead_share: float
    """Latents not selected for a window of tokens."""
    never_positive_share: float
    drawn_anew: int
    """Latents re-initialised so far."""
    threshold: float | None
    gradient_norm: float
    """Before clipping."""
    learning_rate: float


class Trainer:
    """One training run. `fit` starts it, or goes on with the one that was interrupted in `folder`."""

    def __init__(
        self,
        model: BatchTopKCrosscoder,
        store: ActivationStore,
        config: TrainingConfig,
        folder: Path,
        on_log: Callable[[StepRecord], None] = lambda record: None,
        log_every: int = 50,
        checkpoint_every_s: float = 60.0,
        device: torch.device | str = "cpu",
    ):
        """`folder` gets the training state while it runs and the checkpoint at the end. The model is moved to
        `device` and given the store's activation scales."""
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.model.activation_scales = store.config.activation_scales
        self.store = store
        self.config = config
        self.folder = folder
        self.on_log = on_log
        self.log_every = log_every
        self.checkpoint_every_s = checkpoint_every_s

        self.split: Split = store.split(config.held_out_fraction, config.split_seed)
        n_tokens = len(self.split.train)
        if n_tokens == 0:
            raise UserError(f"{store.folder} has no training tokens once documents are held out; collect more")
        self.order = ShuffledOrder(self.split.train, config.batch_size, config.seed)
        self.total_steps = config.total_steps(n_tokens)
        self.liveness = Liveness(model.config.n_latents, config.dead_window(n_tokens), self.device)
        self.threshold = RunningThreshold(config.threshold_from_step, config.threshold_decay)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_done = 0
        self.drawn_anew = 0

    def fit(self) -> BatchTopKCrosscoder:
        """Train to the end, set the threshold, write the checkpoint; returns the model."""
        if not self._resume():
            self._start()
        saved_at = time.monotonic()
        while self.steps_done < self.total_steps:
            self._step()
            if time.monotonic() - saved_at > self.checkpoint_every_s:
                self.save_state()
                saved_at = time.monotonic()
        self.model.threshold = calibrated_threshold(
            self.model, self.store, self.split.train, self.config.calibration_tokens, self.config.seed
        )
        self.model.save_pretrained(
            self.folder, training=asdict(self.config), activations=asdict(self.store.config)["recorded"]
        )
        (self.folder / checkpoint.STATE_FILE).unlink(missing_ok=True)
        return self.model

    def learning_rate(self, step: int) -> float:
        """Of a step counted from 0: constant, then falling linearly; the last step's is still positive."""
        decay_steps = self.config.decay_fraction * self.total_steps
        left = self.total_steps - step
        return self.config.learning_rate * (min(1.0, left / decay_steps) if decay_steps else 1.0)

    def _start(self) -> None:
        if self.config.decoder_bias == "median":
            sample = self.split.train[torch.randperm(len(self.split.train), generator=self.generator)[:MEDIAN_TOKENS]]
            x = self.model.scale(self.store.read(sample).to(self.device))
            for m, bias in enumerate(self.model.b_dec.data):
                bias.copy_(losses.geometric_median(x[:, m]))

    def _step(self) -> None:
        step = self.steps_done
        raw = self.store.read(self.order.batch(step)).to(self.device, non_blocking=True)
        x = self.model.scale(raw)
        with self._products():
            values = self.model.activations(x)
            selection = self.model.select_batch_topk(values)
            xhat = self.model.decode(selection.values)
            reconstruction = losses.reconstruction_loss(x, xhat, self.config.reconstruction)
            auxiliary = self._auxiliary_loss(values, (x - xhat).detach())
        loss = reconstruction + self.config.aux_weight * auxiliary

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.steps_done += 1

        self.threshold.update(self.steps_done, selection.smallest_score)
        self._update_liveness(values, selection, x)
        if self.steps_done % self.log_every == 0 or self.steps_done in (1, self.total_steps):
            self._log(loss, reconstruction, auxiliary, gradient_norm, x, xhat)

    def _auxiliary_loss(self, values: Tensor, residual: Tensor) -> Tensor:
        dead = self.liveness.dead
        if not self.config.aux_weight or not dead.any():
            return torch.zeros((), device=self.device)
        scores = values.detach() * self.model.selection_norms().detach()
        k_aux = self.config.aux_k or max(1, self.model.config.d_model // 2)
        kept = losses.auxiliary_values(values, scores, dead, k_aux)
        return losses.auxiliary_loss(residual, self.model.decode_without_bias(kept))

    def _update_liveness(self, values: Tensor, selection: Selection, x: Tensor) -> None:
        self.liveness.update(values.detach(), selection.values.detach())
        every = max(1, self.liveness.window // self.config.batch_size)
        still_learning = self.steps_done < (1 - self.config.decay_fraction) * self.total_steps
        if self.steps_done % every == 0 and still_learning:
            lost = self.liveness.never_positive
            self.drawn_anew += draw_anew(self.model, self.optimizer, lost, x, self.config.decoder_norm, self.generator)
            self.liveness.reset(lost)

    def _log(
        self, loss: Tensor, reconstruction: Tensor, auxiliary: Tensor, gradient_norm: Tensor, x: Tensor, xhat: Tensor
    ) -> None:
        self._check_finite(loss)
        with torch.no_grad():
            instruct, fine_tuned = losses.batch_explained_variance(x, xhat).tolist()
            published = losses.published_explained_variance(x, xhat).tolist()
        self.on_log(
            StepRecord(
                step=self.steps_done,
                tokens=self.steps_done * self.config.batch_size,
                loss=loss.item(),
                reconstruction=reconstruction.item(),
                auxiliary=auxiliary.item(),
                explained_variance=(instruct, fine_tuned),
                explained_variance_published=(published[0], published[1]),
                dead_share=float(self.liveness.dead.float().mean()),
                never_positive_share=float(self.liveness.never_positive.float().mean()),
                drawn_anew=self.drawn_anew,
                threshold=self.threshold.value,
                gradient_norm=gradient_norm.item(),
                learning_rate=self.learning_rate(self.steps_done - 1),
            )
        )

    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            state = self.folder / checkpoint.STATE_FILE
            last = f"the last good state is {state}" if state.exists() else "no state was saved before it"
            raise UserError(f"the loss is {loss.item()} at step {self.steps_done}; {last}; try a lower learning rate")

    def _products(self) -> AbstractContextManager[Any]:
        on_gpu = self.device.type == "cuda"
        if self.config.precision == "bf16" or (self.config.precision == "auto" and on_gpu):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _identity(self) -> dict[str, Any]:
        """What an interrupted run must share with this one to be gone on with."""
        recorded = self.store.config.recorded
        return {
            "crosscoder": asdict(self.model.config),
            "training": asdict(self.config) | {"betas": list(self.config.betas)},
            "activations": recorded.get("fingerprint", ""),
        }

    def save_state(self) -> None:
        """Write all that the next step depends on."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {"since_selected": self.liveness.since_selected, "since_positive": self.liveness.since_positive}
        tensors |= {"generator": self.generator.get_state()}
        progress = {
            "identity": self._identity(),
            "steps_done": self.steps_done,
            "drawn_anew": self.drawn_anew,
            "threshold": self.threshold.value,
        }
        checkpoint.save_training_state(self.folder, tensors, progress)

    def _resume(self) -> bool:
        state = checkpoint.load_training_state(self.folder)
        if state is None:
            return False
        tensors, progress = state
        if progress["identity"] != self._identity():
            raise UserError(
                f"{self.folder} holds a run with other settings or data; give this one another --name, or --overwrite"
            )
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            prefix = f"adam.{name}."
            self.optimizer.state[parameter] = {
                # Adam keeps its step count where its kernel wants it: on the parameter's device when fused.
                key.removeprefix(prefix): value.to(self.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.liveness.since_selected = tensors["since_selected"].to(self.device)
        self.liveness.since_positive = tensors["since_positive"].to(self.device)
        self.generator.set_state(tensors["generator"])
        self.steps_done = progress["steps_done"]
        self.drawn_anew = progress["drawn_anew"]
        self.threshold.value = progress["threshold"]
        return True
