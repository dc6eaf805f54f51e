"""Set-ups under a name: --preset."""

from __future__ import annotations

import argparse
from dataclasses import replace

from finqa.models.settings import StudentSettings, settings_for
from finqa.models.students import StudentRun

PRESETS = ("published",)

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


def with_preset(preset: str | None, run: StudentRun, args: argparse.Namespace) -> StudentRun:
    """The student under a preset; what the flags of `finqa.models.students` say of it (layers, batch, epochs) stays.

    What belongs to the architecture (which layers exist, the chat template) is the model's own.
    """
    if preset is None:
        return run
    own = settings_for(run.model)
    settings = replace(
        PUBLISHED,
        learning_rate=PUBLISHED_LEARNING_RATES.get(run.model, PUBLISHED.learning_rate),
        lora_modules=run.settings.lora_modules,
        chat_template=own.chat_template,
        batch_size=args.BATCH_SIZE or PUBLISHED.batch_size,
        num_epochs=args.NUM_EPOCHS or PUBLISHED.num_epochs,
        eval_batch_size=own.eval_batch_size,
    )
    return replace(run, settings=settings)
