"""What each student model is fine-tuned with when no flag says otherwise.

The settings of the 7B run are the published ones; the others change what their architecture or size asks for.
A model that is not in the table gets those of its size: below four thousand million parameters the small ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from finqa.runtime.command_line import check_bounds, flag
from finqa.runtime.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

OWN = "the model's own"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class StudentSettings:
    """Fine-tuning and evaluation settings of one student."""

    lora_modules: tuple[str, ...] = flag(
        ATTENTION, "-LM", "--LORA_MODULES", "--lora-modules", group="name", metavar="NAME", shown=OWN
    )
    """Names of the linear layers that get an adapter."""
    lora_r: int = flag(512, group="training", least=1)
    """Rank of the adapter."""
    lora_alpha: int = flag(1024, group="training", least=1)
    """The adapter's output is multiplied by this over the rank."""
    lora_dropout: float = flag(0.1, group="training", metavar="SHARE", least=0, below=1)
    """Share of the adapter's inputs that are dropped in training."""
    learning_rate: float = flag(2.5e-5, group="training", above=0)
    """Learning rate after the warm-up."""
    lr_scheduler: str = flag("linear", group="training", metavar="NAME")
    """Name of a transformers scheduler, run from `learning_rate` to 0 after the warm-up."""
    warmup_steps: int = flag(5, group="training", metavar="UPDATES")
    """Updates in which the learning rate rises from 0."""
    weight_decay: float = flag(0.01, group="training")
    """Weight decay of the optimiser."""
    optim: str = flag("adamw_8bit", group="training", metavar="NAME")
    """Optimiser by its transformers name."""
    max_grad_norm: float = 1.0
    batch_size: int = flag(1, "-BS", "--BATCH_SIZE", "--batch-size", group="name", metavar="ROWS", shown=OWN, least=1)
    """Rows per update and process, before gradient accumulation."""
    num_epochs: int = flag(1, "--NUM_EPOCHS", "--num-epochs", group="name", shown=OWN, least=1)
    """Passes over the training rows."""
    max_seq_length: int = flag(
        4096, "-MSL", "--MAX_SEQ_LENGTH", "--max-seq-length", group="training", metavar="TOKENS", least=2
    )
    """Tokens of prompt and completion together; a longer training row is dropped."""
    max_new_tokens: int = flag(1000, group="evaluation", metavar="TOKENS", shown=OWN, least=1)
    """Tokens of a reply, at most."""
    eval_batch_size: int = flag(
        8, "-EBS", "--EVAL_BATCH_SIZE", "--eval-batch-size", group="evaluation", metavar="ROWS", shown=OWN, least=1
    )
    """Rows per generate call of the Hugging Face backend; vLLM takes all rows at once."""
    chat_template: str | None = None
    """Used only where the tokenizer brings no chat template of its own."""

    def __post_init__(self) -> None:
        if not self.lora_modules or not all(self.lora_modules):
            raise UserError("no LoRA module is named; give some with --lora-modules, e.g. q_proj v_proj")
        check_bounds(self)


DEFAULTS = StudentSettings()

_PHI3 = replace(DEFAULTS, learning_rate=1e-4, lora_modules=("qkv_proj", "o_proj"))
_ORCA2 = replace(DEFAULTS, learning_rate=5e-5, chat_template=CHATML)
_SMALL = StudentSettings(
    lora_r=64,
    lora_alpha=128,
    lora_dropout=0.05,
    learning_rate=2e-4,
    warmup_steps=20,
    optim="adamw_torch",
    batch_size=8,
    num_epochs=3,
    max_new_tokens=512,
    eval_batch_size=16,
)

SMALL_UNKNOWN = replace(_SMALL, batch_size=DEFAULTS.batch_size, num_epochs=DEFAULTS.num_epochs)
"""Settings of small models that are not in the table. What names a fine-tuned model is as for other unknown ones."""
SMALL_SIZE, SMALL_WIDTH = 4e9, 3072
"""Parameters, and hidden size, below which a model is small."""

SETTINGS: dict[str, StudentSettings] = {
    "mistralai/Mistral-7B-Instruct-v0.3": DEFAULTS,
    "microsoft/Orca-2-7b": _ORCA2,
    "microsoft/Orca-2-13b": _ORCA2,
    "microsoft/Phi-3-mini-128k-instruct": _PHI3,
    "microsoft/Phi-3-medium-128k-instruct": _PHI3,
    **{f"Qwen/Qwen2.5-Coder-{size}-Instruct": _SMALL for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"HuggingFaceTB/SmolLM2-{size}-Instruct": _SMALL for size in ("135M", "360M", "1.7B")},
    "pocket-mistral": StudentSettings(
        lora_r=64,
        lora_alpha=128,
        lora_dropout=0.0,
        learning_rate=1e-3,
        optim="adamw_torch",
        batch_size=8,
        max_seq_length=2048,
        max_new_tokens=160,
        eval_batch_size=100,
    ),
}


def settings_for(model: str) -> StudentSettings:
    """Settings of a model by its Hub id or of a local folder by its last name, whatever the case."""
    own = next((settings for name, settings in SETTINGS.items() if _is(model, name)), None)
    return own or (SMALL_UNKNOWN if _is_small(model) else DEFAULTS)


def published_settings(model: str) -> StudentSettings:
    """The settings of the published run (--preset published), which are the defaults, for any model.

    Orca-2 and Phi-3 had learning rates of their own. What belongs to a model's architecture (which layers exist, the
    chat template) and the rows that are evaluated together are the model's own. Seed (3), bf16, greedy replies and a
    single pass without accumulation are defaults too. The published runs say nothing of a maximum length; 4,096 holds
    every prompt of FinQA that was seen.
    """
    own = settings_for(model)
    rate = own.learning_rate if own in (_ORCA2, _PHI3) else DEFAULTS.learning_rate
    kept = {name: getattr(own, name) for name in ("lora_modules", "chat_template", "eval_batch_size")}
    return replace(DEFAULTS, learning_rate=rate, **kept)


def is_known(model: str) -> bool:
    """Whether the table has settings for this very model."""
    return any(_is(model, name) for name in SETTINGS)


def _is(model: str, name: str) -> bool:
    return bool({name.lower(), Path(name).name.lower()} & {model.lower(), Path(model).name.lower()})


def _is_small(model: str) -> bool:
    """Whether a model is small, by the width in a local config.json, else by the size in its name (0.5B, 360M)."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text())
        return config["hidden_size"] < SMALL_WIDTH
    except (OSError, ValueError, KeyError, TypeError):
        said = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", Path(model).name.lower())
        return bool(said) and float(said[1]) * {"b": 1e9, "m": 1e6}[said[2]] < SMALL_SIZE
