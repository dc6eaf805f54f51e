"""The Trainer of the fine-tuning runs, and the log it keeps.

Imports transformers, which the classes are built on: import it where training starts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finqa.paths import write_atomically
from finqa.training_rows import LengthGrouped

if TYPE_CHECKING:
    from finqa.captured_steps import CapturedSteps

LINE_EVERY_S = 10.0


class CompletionTrainer(Trainer):
    """Trainer whose epochs follow `LengthGrouped` and which counts the tokens it has seen."""

    tokens_seen = 0
    """Real tokens in the batches since this process started."""
    captured: CapturedSteps | None = None
    _capture = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(example.ids) for example in examples]
        return LengthGrouped(lengths, self.args.train_batch_size, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if type(optimizer).__module__.startswith("bitsandbytes") and not optimizer.is_paged:
            from bitsandbytes.optim import optimizer as implementation

            # It waits for the GPU after every tensor, which only its paged states need: a sixth of a short update.
            implementation.sync_gpu = lambda tensor: None  # pyright: ignore[reportPrivateImportUsage]
        return optimizer

    def capture_steps(self) -> None:
        """Compute steps as CUDA graphs (finqa.captured_steps): one GPU, packed rows."""
        self._capture = True

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self.tokens_seen += int(inputs.pop("n_tokens"))
        if not self._capture:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.captured is None:
            from finqa.captured_steps import CapturedSteps

            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.captured = CapturedSteps(trained, lambda batch, n: model(**batch, num_items_in_batch=n).loss)
        model.train()
        return self.captured(self._prepare_inputs(inputs), num_items_in_batch)


def without_printing(trainer: CompletionTrainer) -> CompletionTrainer:
    """The same trainer, without transformers' own lines in the log."""
    trainer.remove_callback(PrinterCallback)
    return trainer


class TrainingLog(TrainerCallback):
    """Writes a JSON line a record, sends it to wandb, and shows a line now and then or, in a terminal, a bar."""

    def __init__(self, path: Path, trainer: CompletionTrainer, wandb_run: Any = None):
        self.path = path
        self.trainer = trainer
        self.wandb_run = wandb_run
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run logs the steps after its checkpoint again; a line that a kill cut short goes as well.
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._started = self._said = time.monotonic()
        if sys.stdout.isatty() and state.is_world_process_zero:
            from tqdm import tqdm

            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started
        record = {
            "step": state.global_step,
            "epoch": round(logs["epoch"], 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens_seen": self.trainer.tokens_seen,
            "tokens_per_second": round(self.trainer.tokens_seen / seconds, 1),
            "seconds": round(seconds, 2),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log(record, step=state.global_step)
        line = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
            self._bar.set_postfix_str(line)
        elif time.monotonic() - self._said > LINE_EVERY_S or state.global_step == state.max_steps:
            self._said = time.monotonic()
            print(f"step {state.global_step} of {state.max_steps}: {line}, {seconds:.0f} s", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
