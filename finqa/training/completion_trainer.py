"""The Trainer of the fine-tuning runs, and its callbacks: the log, and the order of rows where a run resumes inside an
epoch.

The log is a JSON line a record, the same to wandb, and a line or a bar to look at. Imports transformers, which all of
it is built on: import it where training starts.
"""

from __future__ import annotations

import math
import time
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from finqa.runtime import parallel
from finqa.runtime.errors import UserError
from finqa.runtime.journal import Journal
from finqa.runtime.memory.free import memory_used
from finqa.runtime.paths import json_text
from finqa.runtime.progress import StepProgress
from finqa.training.packing import longest_graph
from finqa.training.rows import LengthGrouped

if TYPE_CHECKING:
    from finqa.training.captured_steps import CapturedSteps


class CompletionTrainer(Trainer):
    """Trainer whose epochs follow `LengthGrouped` and which counts the tokens it has seen."""

    tokens_seen = 0
    """Real tokens in the batches since this process started."""
    captured: CapturedSteps | None = None
    _capture = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return LengthGrouped(list(rows["n_tokens"]), self.args.train_batch_size, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if type(optimizer).__module__.startswith("bitsandbytes") and not optimizer.is_paged:
            from bitsandbytes.optim import optimizer as implementation

            # It waits for the GPU after every tensor, which only its paged states need: a sixth of a short update.
            implementation.sync_gpu = lambda tensor: None  # pyright: ignore[reportPrivateImportUsage]
        return optimizer

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """With what several processes send each other for an update: gradients, from where they are. Each trained
        parameter is used in every batch, and the buffers of a frozen base never change."""
        sent: Any = DistributedDataParallelKwargs()
        told = {"find_unused_parameters": False, "gradient_as_bucket_view": True}
        # Of buffers torch has another word since 2.13, for which accelerate has no field yet.
        new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        sent.to_kwargs = lambda: told | {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return super()._build_accelerator_args(**kwargs) | {"kwargs_handlers": [sent]}

    def capture_steps(self) -> None:
        """Compute steps as CUDA graphs (finqa.training.captured_steps): packed rows, each process on its GPU.

        The model is not wrapped: DistributedDataParallel's hooks belong to the stream on which it was made, and a
        recording must not wait for another one.
        """
        self._capture = True
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: to count the parameters in every update takes milliseconds, and nothing here reads it."""
        return 0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self.tokens_seen += int(inputs.pop("n_tokens"))
        if not self._capture:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.captured is None:
            from finqa.training.captured_steps import CapturedSteps

            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            width = model.config.get_text_config()
            longest = longest_graph(width.hidden_size, width.intermediate_size)
            self.captured = CapturedSteps(trained, lambda batch, n: model(**batch, num_items_in_batch=n).loss, longest)
            for parameter in trained:
                parallel.from_first(parameter.data)
        if not model.training:  # to say so again walks through all modules
            model.train()
        loss = self.captured(self._prepare_inputs(inputs), num_items_in_batch)
        if self.accelerator.sync_gradients:
            for gradients in self.captured.sums:
                parallel.add_up(gradients)
        return loss * parallel.world_size()  # the Trainer logs the mean of what are parts of a sum


class TrainingLog(TrainerCallback):
    """Keeps the log of a run; of several processes the first one does, for all of them. A loss that is no number ends
    the run (UserError).

    `tokens_per_second` is the rate since the record before: the first one has the compiling of the layers in it.
    """

    def __init__(self, path: Path, trainer: CompletionTrainer, wandb_run: Any = None):
        self.path = path
        self.trainer = trainer
        self.wandb_run = wandb_run
        self._progress: StepProgress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._started = self._recorded = time.monotonic()
        self._tokens = 0
        if not state.is_world_process_zero:
            return
        # A resumed run logs the steps after its checkpoint again; a line that a kill cut short goes as well.
        journal = Journal(self.path).read()
        journal.rewrite(record for record in journal.records if record["step"] <= state.global_step)
        self._progress = StepProgress(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """The last updates are logged too where their number is no multiple of those between two records."""
        control.should_log |= state.global_step == state.max_steps
        return control

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        tokens = int(parallel.total(self.trainer.tokens_seen))
        if not state.is_world_process_zero:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"by update {state.global_step} the loss is no number ({logs['loss']}): training diverged; begin it "
                "again with a lower --learning-rate and a --run-name of its own"
            )
        now = time.monotonic()
        rate = (tokens - self._tokens) / (now - self._recorded)
        self._tokens, self._recorded = tokens, now
        record = {
            "step": state.global_step,
            "epoch": round(logs["epoch"], 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens_seen": tokens,
            "tokens_per_second": round(rate, 1),
            "seconds": round(now - self._started, 2),
            "memory_gb": round(memory_used() / 1e9, 3),
        }
        with self.path.open("a") as file:
            file.write(json_text(record) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log(record, step=state.global_step)
        if self._progress is not None:
            speed = f"{rate:,.0f} tokens/s, {record['seconds']:.0f} s, {record['memory_gb']:.1f} GB"
            self._progress.show(state.global_step, f"loss {record['loss']:.4f}, {speed}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._progress is not None:
            self._progress.close()


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, whatever stands between it and the loader.

    Where several processes go on from the middle of an epoch, two wrappers do, and the Trainer's own word for the
    sampler gets no further than the second: the rest of every epoch would follow the order of the first.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
