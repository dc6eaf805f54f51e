"""A student made ready to train: base weights, adapter, attention, the loss, what makes it fast on this device."""

from __future__ import annotations

import hashlib
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.models.students import StudentRun, load_base
from finqa.runtime import parallel
from finqa.runtime.command_line import flag
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """How a training step is computed; none of it changes the recipe, `fp8_base` changes its arithmetic."""

    packed: bool = flag(True, "--no-packing", help="Pad the rows of a batch in place of packing them (GPU)")
    """Rows end to end without padding, where GPU and model allow it."""
    compiled: bool | None = flag(
        None, "--compile", both_ways=True, shown="where it saves more than it takes", help="Compile the layers (GPU)"
    )
    """Decoder layers through torch.compile, on a GPU. None: where the run is long enough (`seconds_of_compiling`)."""
    captured: bool = flag(True, "--no-cuda-graphs", help="Do not record short steps as CUDA graphs (GPU)")
    """Short steps as CUDA graphs, on one GPU with packed rows."""
    fp8_base: bool = flag(False)
    """The frozen base in 8-bit floats, which is faster on recent GPUs (finqa.training.fp8_base)."""
    checkpointing: bool | None = flag(
        None, "--gradient-checkpointing", values={"auto": None, "yes": True, "no": False}, shown="auto"
    )
    """Activations of a layer are computed again in the backward pass: less memory, a third more time. None (auto):
    where the memory asks for it (finqa.runtime.memory.plan)."""


FROM_NOTHING_S, AS_BEFORE_S = 60.0, 10.0
"""What compiling took at 7B shapes on an H200, from nothing and with what an earlier run had kept: the first updates of
benchmarks/results/lora_7b_8_rows.json and lora_7b_1_row.json, less those of the same rows uncompiled."""
SAVED_S = 2.9e-15
"""What compiled layers save there, for each token and parameter (8 rows an update, packed)."""
SAVED_A_LAYER_S = 5e-3
"""What they save for each layer and batch where a GPU waits for launches, as it does for a small model: 5,000 rows of
Qwen2.5-Coder-1.5B, 8 at a time, took 189 s uncompiled and 110 s compiled from nothing and captured (H200), of which
about 15 s were compiling. At 7B and a row a batch, which keeps the GPU busier, it is 1.5 ms."""


def seconds_of_compiling(parameters: int, layers: int, tokens: int, batches: int, before: bool) -> tuple[float, float]:
    """About how long compiling takes, and how much of a run it saves.

    Args:
        parameters: Of the model.
        layers: Of the model.
        tokens: That this process is trained on, in all epochs.
        batches: That they come in.
        before: Whether layers of these shapes were compiled on this machine before.
    """
    saved = max(SAVED_S * parameters * tokens, SAVED_A_LAYER_S * layers * batches)
    return AS_BEFORE_S if before else FROM_NOTHING_S, saved


def compiled_before(run: StudentRun, speed: Speed, base: str, folder: Path) -> Path:
    """File in `folder` that is there where layers as this run's were compiled before, by this torch for this GPU."""
    import torch

    settings, gpu = run.settings, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    adapter = (settings.lora_modules, settings.lora_r, settings.lora_alpha, settings.lora_dropout) if run.peft else ()
    facts = (adapter, run.load_in_4bit, speed.fp8_base, speed.packed, torch.__version__, gpu)
    digest = hashlib.sha256((Path(base) / "config.json").read_bytes() + repr(facts).encode())
    return folder / f"{digest.hexdigest()[:16]}.done"


def keep_compiled(done: Path) -> None:
    """Have torch.compile keep what it makes beside `done` (see `compiled_before`), and say so.

    Of itself it keeps that in a temporary folder, until the machine starts again.
    """
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(done.parent.resolve()))
    kept = ", from what is kept in" if done.exists() else "; what that makes is kept in"
    print(f"layers are compiled in the first update{kept} {folder}", flush=True)


def sent_bytes(model: PreTrainedModel) -> int:
    """Bytes of gradients that each process sends the others for an update, as one sum; 0 where there are no others."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.nbytes for parameter in trained) if parallel.world_size() > 1 else 0


def trainable(run: StudentRun, device: str, bf16: bool, speed: Speed) -> PreTrainedModel:
    """The student's model on `device`, with an adapter where the run has one; see `made_trainable`."""
    import torch

    dtype = torch.bfloat16 if bf16 and run.peft else torch.float32
    return made_trainable(load_base(run.model, dtype, device, run.load_in_4bit, run.revision), run, speed)


def made_trainable(base: PreTrainedModel, run: StudentRun, speed: Speed) -> PreTrainedModel:
    """The base made ready: its loss on the completion, attention and layers as `speed` says, and the run's adapter.

    Raises UserError where `fp8_base` is not possible. That the base has layers of the names that get an adapter is
    checked before, by finqa.runtime.memory.plan.
    """
    device = next(base.parameters()).device.type
    base.config.use_cache = False
    if device == "cpu":
        from finqa.training.cpu_attention import use_block_causal

        use_block_causal(base)
    elif speed.packed:
        from finqa.training.packing import use_packed

        use_packed(base)
    loss_on_completion(base)
    model: Any = base
    if run.peft:
        from peft import get_peft_model

        # A 4-bit base needs no other preparation: peft freezes it, the rest stays as for a bf16 one.
        model = get_peft_model(base, lora_config(run))
    check_trainable(run, speed, device)
    if speed.fp8_base:
        from finqa.training.fp8_base import to_fp8

        to_fp8(decoder_layers(base))
    if speed.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device == "cuda" and speed.compiled is not False:
        compile_layers(base)
    return model


def compile_layers(base: PreTrainedModel, **options: Any) -> None:
    """Compile the decoder layers of a model that is trained, once for all of them; `options` go to torch.compile.

    Two things would make torch compile a layer more than once. The first layer's input would be the only one without
    a gradient. And numbers such as a dropout rate would first be taken for values that change, as lengths do.
    """
    import torch._dynamo

    base.enable_input_require_grads()
    torch._dynamo.config.specialize_float = True
    for layer in decoder_layers(base):
        layer.compile(dynamic=True, **options)


def is_packed(model: PreTrainedModel) -> bool:
    """Whether the model takes the batches of finqa.training.packing."""
    from finqa.training.packing import NAME

    return model.config._attn_implementation == NAME


def decoder_layers(base: PreTrainedModel) -> Any:
    """The list of decoder layers, whatever the architecture calls it."""
    import torch

    return next(module for module in base.base_model.modules() if isinstance(module, torch.nn.ModuleList))


def lora_config(run: StudentRun) -> LoraConfig:
    from peft import LoraConfig

    settings = run.settings
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_modules),
        task_type="CAUSAL_LM",
    )


def check_trainable(run: StudentRun, speed: Speed, device: str) -> None:
    """Raises UserError, before anything is loaded, for what cannot be trained in this way or on this device."""
    if run.load_in_4bit and not run.peft:
        raise UserError("a 4-bit base cannot be trained as a whole; give -P for an adapter, or leave out -F")
    if not speed.fp8_base:
        return
    if not run.peft or run.load_in_4bit:
        raise UserError("--fp8-base is for a frozen bf16 base with an adapter: give -P, and leave out -F")
    import torch

    if device == "cpu" or torch.cuda.get_device_capability() < (8, 9):
        raise UserError("--fp8-base needs a GPU with 8-bit float products (compute capability 8.9 or above)")


def loss_on_completion(model: PreTrainedModel) -> None:
    """Give a causal model a forward pass that returns the loss and applies the head only where there is one.

    Logits of the prompt would be three quarters of the head's work and, at a large vocabulary, most of the memory.
    The model's own forward pass makes the logits, of the chosen hidden states: some families scale or cap them.
    Everything around the model (peft, DDP, autocast) still calls its `forward`.
    """
    from transformers.modeling_outputs import CausalLMOutput

    from finqa.training.rows import NO_LOSS, completion_positions

    own_forward = model.forward

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        predicting: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **rows: Any,
    ) -> CausalLMOutput:
        """The loss is a mean over labelled tokens of the whole update.

        input_ids, labels [rows, length] as the collator makes them, or a batch of finqa.training.packing.
        """
        import torch

        if predicting is None:
            where, targets = completion_positions(labels)
        else:
            where, targets = (0, predicting), labels

        chosen = False

        def choose(module: Any, inputs: Any, output: Any) -> None:
            nonlocal chosen
            output.last_hidden_state = output.last_hidden_state[where][None]
            chosen = True

        hook = getattr(self, self.base_model_prefix).register_forward_hook(choose)
        try:
            logits = own_forward(input_ids=input_ids, use_cache=False, **rows).logits
        finally:
            hook.remove()
        # Some families (OPT) pass the hooked module by: then the logits are those of every token.
        logits = (logits[0] if chosen else logits[where]).float()
        total: Any = torch.nn.functional.cross_entropy(logits, targets, ignore_index=NO_LOSS, reduction="sum")
        return CausalLMOutput(
            loss=total / ((targets != NO_LOSS).sum() if num_items_in_batch is None else num_items_in_batch)
        )

    model.forward = types.MethodType(forward, model)
