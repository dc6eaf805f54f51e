"""Trains a dictionary of any method on an activation store; step.py takes the steps, schedule.py has what changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.feed import ShuffledOrder, feed
from crosscoder.activations.store import ActivationStore, Split
from crosscoder.dictionaries import checkpoint, losses
from crosscoder.dictionaries.config import N_MODELS, TrainingConfig, check_together
from crosscoder.dictionaries.losses import Weights
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.scaling import equal_difference_weight, fit_scaling, sample_of
from crosscoder.dictionaries.threshold import RunningThreshold, calibrate
from crosscoder.training import schedule
from crosscoder.training.dead_latents import DeadLatents, resample_latents
from crosscoder.training.run_log import StepRecord
from crosscoder.training.step import Step, StepKind
from crosscoder.training.step_choice import new_step
from finqa.runtime import parallel
from finqa.runtime.errors import UserError

MEDIAN_TOKENS = 16_384
"""Training tokens from which the start of the decoder bias is taken."""
LONGEST_PAUSE = 64
"""Steps after which several processes ask the first again whether it is time to save, at most: they wait for it."""
DIVERGED = 10.0
"""A reconstruction loss of so many times that of the first step ends the run."""


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
        ranks: Ranks = ALONE,
        step: StepKind = "auto",
    ):
        """`folder` gets the training state while it runs and the checkpoint at the end. The model is moved to
        `device` and given its activation scales. Of several `ranks` the first alone logs and writes."""
        check_together(model.config, config)
        if config.batch_size % ranks.world:
            raise UserError(
                f"a step of {config.batch_size} tokens does not divide among {ranks.world} processes: --step-tokens"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.model.W_dec.requires_grad_(not config.freeze_decoder)
        self.store, self.config, self.folder, self.ranks = store, config, folder, ranks
        self.on_log, self.log_every, self.checkpoint_every_s = on_log, log_every, checkpoint_every_s

        self.split: Split = store.split(config.held_out_fraction, config.split_seed)
        n_tokens = len(self.split.train)
        if n_tokens == 0:
            raise UserError(f"{store.folder} has no training tokens once documents are held out; collect more")
        sample = sample_of(self.split.train, config.calibration_tokens, config.seed)
        fit_scaling(self.model, store, sample, config.centre)
        self.difference_weight = (
            equal_difference_weight(self.model, store, sample)
            if config.difference_weight == "equal"
            else config.difference_weight
        )
        self.order = ShuffledOrder(self.split.train, config.batch_size, config.seed)
        self.steps_a_stage = config.total_steps(n_tokens)
        self.total_steps = len(model.stages) * self.steps_a_stage
        self.dead_latents = DeadLatents(model.config.n_latents, config.dead_window(n_tokens), self.device)
        self.threshold = RunningThreshold(config.threshold_from_step, config.threshold_decay)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_done = self.stages_done = self.drawn_anew = 0
        self.first_reconstruction = torch.tensor(torch.inf, device=self.device)
        self._failed_step = torch.zeros((), dtype=torch.int64, device=self.device)
        self._step_kind: StepKind = step

    def fit(self) -> BatchTopKCrosscoder:
        """Train to the end, set the threshold, write the checkpoint; returns the model. Of several processes only the
        first has the threshold."""
        self.begin()
        saved_at = began = time.monotonic()
        first = ask_at = self.steps_done + 1
        with self.batches() as batches:
            for _, raw in batches:
                self.step(raw)
                if self.steps_done < ask_at:
                    continue
                now = time.monotonic()
                a_step = (now - began) / (self.steps_done - first + 1)
                pause = self._pause(self.checkpoint_every_s - (now - saved_at), a_step)
                if pause == 0:
                    self.save_state()
                    saved_at = time.monotonic()
                ask_at = self.steps_done + max(1, pause)
        while self.stages_done + 1 < len(self.model.stages):  # those without a step
            self._next_stage()
        self.model.stage = None
        self._take_step.gather()
        if self.ranks.is_main:
            config = self.config
            calibrate(self.model, self.store, self.split.train, config.calibration_tokens, config.seed)
            recorded = asdict(self.store.config)["recorded"]
            checkpoint.save_dictionary(self.model, self.folder, training=asdict(config), activations=recorded)
            (self.folder / checkpoint.STATE_FILE).unlink(missing_ok=True)
        return self.model

    def begin(self) -> None:
        """Put parameters and counts where the interrupted run in the folder was, or at their start."""
        state = checkpoint.load_training_state(self.folder)
        if state is None:
            self.model.enter_stage(self.model.stages[0])
            self._start()
        else:
            self.load_state_dict(*state)
        parallel.check_shared(self.folder, f"{self.steps_done} steps taken")
        # Only now: a step by hand holds copies of the weights, and the optimiser's moments.
        self._take_step = new_step(self._step_kind, self.model, self.optimizer, self.config, self.ranks)

    def batches(self) -> AbstractContextManager[Iterator[tuple[Tensor, Tensor]]]:
        """This process's rows of the steps that are left, read ahead; a context manager."""
        left = range(self.steps_done, self.total_steps)
        return feed(self.store.read, (self.ranks.rows(self.order.batch(step)) for step in left), self.device)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        return schedule.learning_rate(self.config, step % self.steps_a_stage, self.steps_a_stage)

    def weights(self, step: int) -> Weights:
        """k and the weights of the loss at a step counted from 0; what changes does so in each stage anew."""
        step, total = step % self.steps_a_stage, self.steps_a_stage
        return Weights(
            k=schedule.k_at(self.config, self.model.config.k, step, total),
            l1=schedule.l1_weight_at(self.config, step, total),
            difference=self.difference_weight,
        )

    def _pause(self, seconds: float, seconds_a_step: float) -> int:
        """Steps until it is asked again whether to save, where so many seconds are left by the first process's clock; 0
        where it is time."""
        likely = seconds / (2 * seconds_a_step)
        pause = 0 if seconds <= 0 else round(min(max(likely, 1), LONGEST_PAUSE)) if self.ranks.world > 1 else 1
        return self.ranks.number_of_first(pause, self.device)

    def save_state(self) -> None:
        """Write all that the next step depends on, unless the run has failed. Called by all processes."""
        self._check_healthy()
        self._take_step.gather()
        if self.ranks.is_main:
            checkpoint.save_training_state(self.folder, *self.state_dict())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a run under way is: parameters, optimiser, counts and generator as tensors, and its progress as JSON. Of
        several processes by hand only once their weights were gathered, as `save_state` does."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {
            "since_selected": self.dead_latents.since_selected,
            "since_positive": self.dead_latents.since_positive,
            "generator": self.generator.get_state(),
            "first_reconstruction": self.first_reconstruction,
        }
        progress = {
            "identity": self._identity(),
            "steps_done": self.steps_done,
            "stages_done": self.stages_done,
            "drawn_anew": self.drawn_anew,
            "threshold": self.threshold.value,
        }
        return tensors, progress

    def load_state_dict(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Put an untouched trainer where a killed run was. Raises UserError for a run of other settings or data."""
        if progress["identity"] != self._identity():
            raise UserError(
                f"{self.folder} holds a run with other settings or data; give this one another --name, or --overwrite "
                "it"
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
        self.dead_latents.since_selected = tensors["since_selected"].to(self.device)
        self.dead_latents.since_positive = tensors["since_positive"].to(self.device)
        self.first_reconstruction = tensors["first_reconstruction"].to(self.device)
        self.generator.set_state(tensors["generator"].to(torch.uint8))
        self.steps_done, self.stages_done = progress["steps_done"], progress.get("stages_done", 0)
        self.model.stage = self.model.stages[self.stages_done]
        self.drawn_anew = progress["drawn_anew"]
        self.threshold.value = progress["threshold"]

    def _identity(self) -> dict[str, Any]:
        """What an interrupted run must share with this one to be gone on with."""
        return {
            "crosscoder": asdict(self.model.config),
            "training": asdict(self.config) | {"betas": list(self.config.betas)},
            "activations": self.store.config.recorded.get("fingerprint", ""),
        }

    def _start(self) -> None:
        if self.config.decoder_bias == "median":
            sample = self.split.train[torch.randperm(len(self.split.train), generator=self.generator)[:MEDIAN_TOKENS]]
            x = self.model.scale(self.store.read(sample).to(self.device))
            for inputs, bias in zip(x.unbind(dim=1), self.model.b_dec.data, strict=False):  # one in a stage of one
                bias.copy_(losses.geometric_median(inputs))
        for parameter in self.model.parameters():
            self.ranks.from_first(parameter.data)

    def step(self, raw: Tensor) -> None:
        """Take the next step, on its [batch, 2, d_model] raw activations."""
        if self.steps_done == (self.stages_done + 1) * self.steps_a_stage:
            self._next_stage()
        rate = self.learning_rate(self.steps_done)
        step = self._take_step(raw, rate, self.weights(self.steps_done), self.dead_latents.dead)
        self.steps_done += 1
        self._watch(step)
        self.threshold.update(self.steps_done, step.smallest_score)
        self._resample_dead(step)
        if self.steps_done % self.log_every == 0 or self.steps_done in (1, self.total_steps):
            self._log(step)

    def _next_stage(self) -> None:
        """The optimiser, and what is counted, begin anew."""
        self.stages_done += 1
        self.model.enter_stage(self.model.stages[self.stages_done])
        self.optimizer.state.clear()
        self.dead_latents.reset(torch.ones_like(self.dead_latents.dead))
        self.threshold.value = None

    def _watch(self, step: Step) -> None:
        """Remember the first step that gave no number, or diverged, without waiting for the device."""
        if (self.steps_done - 1) % self.steps_a_stage == 0:
            self.first_reconstruction = step.parts[1]
        healthy = torch.isfinite(step.parts[0]) & torch.isfinite(step.gradient_norm)
        healthy &= step.parts[1] <= DIVERGED * self.first_reconstruction
        self._failed_step = torch.where(healthy | (self._failed_step > 0), self._failed_step, self.steps_done)

    def _check_healthy(self) -> None:
        failed = int(self._failed_step)
        if failed:
            state = self.folder / checkpoint.STATE_FILE
            last = f"the last good state is {state}" if state.exists() else "no state was saved before it"
            raise UserError(f"the loss diverged or was no number at step {failed}; {last}; try a lower learning rate")

    def _resample_dead(self, step: Step) -> None:
        self.dead_latents.update(step.positive, step.selected, self.config.batch_size)
        every = max(1, self.dead_latents.window // self.config.batch_size)
        in_first = self.steps_done < (1 - self.config.decay_fraction) * self.steps_a_stage
        # In a later stage what is resampled would have nothing to do with what it was before.
        if self.config.draw_anew and self.steps_done % every == 0 and in_first:
            lost = self.dead_latents.never_positive
            mean_x = self.ranks.mean(step.x.float().mean(dim=0))
            n_drawn = resample_latents(self.model, self.optimizer, lost, mean_x, self.config, self.generator)
            self.drawn_anew += n_drawn
            self.dead_latents.reset(lost)
            if n_drawn:
                self._take_step.refresh()

    @torch.no_grad()
    def _log(self, step: Step) -> None:
        self._check_healthy()
        x, xhat = step.x.float(), step.x.float() + step.error.float()
        explained = losses.batch_explained_variance(x, xhat, self.ranks)
        published = losses.published_explained_variance(x, xhat, self.ranks)
        of_difference = None
        if x.shape[1] == N_MODELS:
            changed, explained_change = (
                self.model.difference(self.model.unscale(vectors))[:, None] for vectors in (x, xhat)
            )
            of_difference = losses.batch_explained_variance(changed, explained_change, self.ranks).item()
        if not self.ranks.is_main:
            return
        loss, reconstruction, difference, l1, auxiliary = step.parts.tolist()
        self.on_log(
            StepRecord(
                step=self.steps_done,
                tokens=self.steps_done * self.config.batch_size,
                loss=loss,
                reconstruction=reconstruction,
                auxiliary=auxiliary,
                explained_variance=tuple(explained.tolist()),
                explained_variance_published=tuple(published.tolist()),
                dead_share=float(self.dead_latents.dead.float().mean()),
                never_positive_share=float(self.dead_latents.never_positive.float().mean()),
                drawn_anew=self.drawn_anew,
                threshold=self.threshold.value,
                gradient_norm=step.gradient_norm.item(),
                learning_rate=self.learning_rate(self.steps_done - 1),
                l0=int(step.n_active) / self.config.batch_size,
                difference=difference,
                l1=l1,
                explained_variance_of_difference=of_difference,
                stage=self.model.stage,
            )
        )
