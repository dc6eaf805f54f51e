"""What happens beside the updates of a fine-tuning run: its log, and the order of an epoch that is gone on with.

The log is a JSON line a record, the same to wandb, and a line or a bar to look at. Imports transformers, which the
callbacks are built on: import it where training starts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finqa.runtime import parallel
from finqa.runtime.journal import Journal

if TYPE_CHECKING:
    from finqa.training.completion_trainer import CompletionTrainer

LINE_EVERY_S = 10.0


class TrainingLog(TrainerCallback):
    """Keeps the log of a run; of several processes the first one does, for all of them.

    `tokens_per_second` is the rate since the record before: the first one has the compiling of the layers in it.
    """

    def __init__(self, path: Path, trainer: CompletionTrainer, wandb_run: Any = None):
        self.path = path
        self.trainer = trainer
        self.wandb_run = wandb_run
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._said = self._recorded = time.monotonic()
        self._tokens = 0
        if not state.is_world_process_zero:
            return
        # A resumed run logs the steps after its checkpoint again; a line that a kill cut short goes as well.
        journal = Journal(self.path).read()
        journal.rewrite(record for record in journal.records if record["step"] <= state.global_step)
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The last updates are logged too where their number is no multiple of those between two records."""
        control.should_log |= state.global_step == state.max_steps
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        tokens = int(parallel.total(self.trainer.tokens_seen))
        if not state.is_world_process_zero:
            return
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
            file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log(record, step=state.global_step)
        self._show(record, state)

    def _show(self, record: dict[str, Any], state: TrainerState) -> None:
        line = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
            self._bar.set_postfix_str(line)
        elif time.monotonic() - self._said > LINE_EVERY_S or state.global_step == state.max_steps:
            self._said = time.monotonic()
            seconds, memory = record["seconds"], record["memory_gb"]
            print(
                f"step {state.global_step} of {state.max_steps}: {line}, {seconds:.0f} s, {memory:.1f} GB", flush=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class EpochOrder(TrainerCallback):
    """Tells the sampler the epoch, whatever stands between it and the loader.

    Where several processes go on from the middle of an epoch, two wrappers do, and the Trainer's own word for the
    sampler gets no further than the second: the rest of every epoch would follow the order of the first.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


def memory_used() -> int:
    """Bytes of this process: the most that it has held of its GPU, or what it holds now of the machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
