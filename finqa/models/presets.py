"""Set-ups under a name: --preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from finqa.models.settings import StudentSettings, settings_for

Preset = Literal["published"]

PUBLISHED = StudentSettings(
    lora_r=512,
    lora_alpha=1024,
    lora_dropout=0.1,
    learning_rate=2.5e-5,
    lr_scheduler="linear",
    warmup_steps=5,
    weight_decay=0.01,
    optim="adamw_8bit",
    batch_size=1,
    num_epochs=1,
    max_seq_length=4096,
    max_new_tokens=1000,
)
"""Of the published runs, whose seed (3), bf16, greedy replies and single pass without accumulation are defaults too.
They say nothing of a maximum length; 4,096 holds every prompt of FinQA that was seen."""

PUBLISHED_LEARNING_RATES = {"microsoft/Orca-2-7b": 5e-5, "microsoft/Orca-2-13b": 5e-5,
    "microsoft/Phi-3-mini-128k-instruct": 1e-4, "microsoft/Phi-3-medium-128k-instruct": 1e-4}  # fmt: skip


def published_settings(model: str) -> StudentSettings:
    """The published settings of a model. What belongs to its architecture (which layers exist, the chat template) and
    the rows that are evaluated together are the model's own."""
    own = settings_for(model)
    return replace(
        PUBLISHED,
        learning_rate=PUBLISHED_LEARNING_RATES.get(model, PUBLISHED.learning_rate),
        lora_modules=own.lora_modules,
        chat_template=own.chat_template,
        eval_batch_size=own.eval_batch_size,
    )
