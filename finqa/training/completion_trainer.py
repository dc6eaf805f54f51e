"""The Trainer of the fine-tuning runs.

Imports transformers, which it is built on: import it where training starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedDataParallelKwargs
from transformers import Trainer

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
        told = {"find_unused_parameters": False, "gradient_as_bucket_view": True, "forward_sync_buffers": False}
        sent.to_kwargs = lambda: told  # the last of them has no field there yet
        return super()._build_accelerator_args(**kwargs) | {"kwargs_handlers": [sent]}

    def capture_steps(self) -> None:
        """Compute steps as CUDA graphs (finqa.training.captured_steps): one GPU, packed rows."""
        self._capture = True

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self.tokens_seen += int(inputs.pop("n_tokens"))
        if not self._capture:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.captured is None:
            from finqa.training.captured_steps import CapturedSteps

            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.captured = CapturedSteps(trained, lambda batch, n: model(**batch, num_items_in_batch=n).loss)
        model.train()
        return self.captured(self._prepare_inputs(inputs), num_items_in_batch)
