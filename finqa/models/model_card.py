"""The model card (README.md) of a fine-tuned student, as the Hub takes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finqa.models.students import StudentRun, local_model
from finqa.runtime.paths import write_atomically

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def metadata(model: str, library: str) -> str:
    """Head of a card. The Hub refuses one whose base model is a folder, so only a model of the Hub is named."""
    base = f"base_model: {model}\n" if local_model(model) is None and HUB_ID.fullmatch(model) else ""
    return f"---\n{base}library_name: {library}\npipeline_tag: text-generation\n---\n"


def write_student_card(run: StudentRun, folder: Path) -> None:
    """Write the card of a trained student from its run.json, in place of the one that peft leaves.

    That one names the base by the folder it was loaded from, which the Hub refuses and nobody else has.
    """
    trained = json.loads((folder / "run.json").read_text())
    settings = run.settings
    shape = f"LoRA of rank {settings.lora_r} on {', '.join(settings.lora_modules)}" if run.peft else "all weights"
    if run.load_in_4bit:
        shape += ", on a 4-bit base (NF4)"
    base = Path(run.model).name if local_model(run.model) else run.model
    facts = {
        "rows": trained["rows"],
        "epochs": settings.num_epochs,
        "rows an update": settings.batch_size * run.grad_accum,
        "learning rate": settings.learning_rate,
        "seed": trained["config"]["seed"],
    }
    card = f"""
# {run.model_id}

`{base}` fine-tuned on {run.dataset} to write small Python programs that answer questions over earnings reports:
{shape}.

| {" | ".join(facts)} |
| {" | ".join("---" for _ in facts)} |
| {" | ".join(str(value) for value in facts.values())} |

The loss is taken on the program alone. `run.json` holds the whole configuration and the hash of the base weights,
`{trained["base_hash"][:12]}...`. Evaluate it on test with:

    python main.py {" ".join(run.words(peft=False))} -NT -T --VLLM
"""
    write_atomically(folder / "README.md", metadata(run.model, "peft" if run.peft else "transformers") + card)
