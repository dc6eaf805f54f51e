"""The card (README.md) of a repository on the Hub: metadata for its search, figures of the run, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finqa.models.students import POCKET, StudentRun, local_model
from finqa.runtime.manifest import portable_name
from finqa.runtime.paths import SPLITS, Folders, write_atomically
from finqa.task.prompts import EVAL_TYPES, EvalType

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Relation = Literal["adapter", "finetune"]


def on_the_hub(model: str) -> bool:
    """Whether a model is named as one of the Hub: a card that names a folder as its base model is refused there."""
    return local_model(model) is None and "/" in model and HUB_ID.fullmatch(model) is not None


def shown(model: str) -> str:
    """A model's name; of one in a local folder the folder's alone."""
    return portable_name(model) if local_model(model) or Path(model).is_absolute() else model


def metadata(
    name: str,
    bases: Sequence[str],
    library: str,
    tags: Sequence[str],
    relation: Relation | None = None,
    dataset: str = "",
    results: Sequence[EvalResult] = (),
    pipeline: str | None = None,
    **more: Any,
) -> str:
    """The YAML block at the top of a card.

    Args:
        name: Name of the model, dictionary or activation set that the card describes.
        bases: Models that it was made from, as the user named them; those on the Hub go into the metadata.
        relation: How a model relates to its base; None for what is not a model, such as activations.
        results: Figures of the run (`result`), each with its metric.
        more: Further fields.

    The licence is that of the first base, to which the card links: whatever is made from a model is bound by its terms.
    """
    from huggingface_hub import ModelCardData

    known = [base for base in dict.fromkeys(bases) if on_the_hub(base)]
    own: dict[str, Any] = {"license": "mit"} if bases[0] == POCKET else {}
    if bases[0] in known:
        link = f"https://huggingface.co/{bases[0]}"
        own = {"license": "other", "license_name": "license-of-the-base-model", "license_link": link}
    data = ModelCardData(
        base_model=known or None,
        base_model_relation=relation if known else None,
        datasets=[dataset] if HUB_ID.fullmatch(dataset) else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=list(tags),
        metrics=list(dict.fromkeys(each.metric_type for each in results)) or None,
        model_name=name if results else None,
        eval_results=list(results) or None,
        **own,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def result(dataset: str, split: str, metric: str, value: float, name: str = "", task: str = "") -> EvalResult:
    """One figure of a run, as a card's model-index has it; `task` is one of the Hub's."""
    from huggingface_hub import EvalResult

    where = f"{dataset} ({split})" if split else dataset
    kind = dataset if HUB_ID.fullmatch(dataset) else "own"
    return EvalResult(
        task or "feature-extraction", kind, where, metric, round(value, 4), None, None, split or None, metric_name=name
    )


def table(*rows: Mapping[str, Any]) -> str:
    """A Markdown table of rows that have the same columns."""
    lines = (rows[0], ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loading(*lines: str) -> str:
    """A block of Python with the lines that load it."""
    return "\n".join(["```python", *lines, "```"])


def write_student_card(run: StudentRun, folder: Path, folders: Folders, repository: str | None) -> None:
    """Write the card of a trained student from its run.json and its evaluations, in place of the one that peft leaves.

    That one names the base by the folder it was loaded from, which the Hub refuses and nobody else has.
    `repository`: where it goes on the Hub; None where that is not known.
    """
    trained = json.loads((folder / "run.json").read_text())
    settings = run.settings
    shape = f"LoRA of rank {settings.lora_r} on {', '.join(settings.lora_modules)}" if run.peft else "all weights"
    if run.load_in_4bit:
        shape += ", on a 4-bit base (NF4)"
    loss = trained.get("train_loss")
    facts = {
        "rows": trained.get("rows", "not known"),
        "epochs": settings.num_epochs,
        "rows an update": settings.batch_size * run.grad_accum,
        "learning rate": settings.learning_rate,
        "seed": trained.get("config", {}).get("seed", "not known"),
        "mean loss": "not known" if loss is None else f"{loss:.4f}",
    }
    found = list(_evaluations(run, trained, folders))
    results = [
        result(run.dataset, split, "accuracy", of["accuracy"], "accuracy, strict rule", "text-generation")
        for split, eval_type, of in found
        if eval_type == "fine-tuned"
    ]
    library, kind = ("peft", "AutoPeftModelForCausalLM") if run.peft else ("transformers", "AutoModelForCausalLM")
    tags = [*(["lora"] if run.peft else []), "finance", "code"]
    relation: Relation = "adapter" if run.peft else "finetune"
    where = json.dumps(repository or f"HF_NAME/{run.model_id}")
    load = loading(
        f"from {library} import {kind}",
        "from transformers import AutoTokenizer",
        f"model = {kind}.from_pretrained({where})",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
    )
    head = metadata(run.model_id, [run.model], library, tags, relation, run.dataset, results, "text-generation")
    card = f"""
# {run.model_id}

`{shown(run.model)}` fine-tuned on {run.dataset} to write small Python programs that answer questions over earnings
reports: {shape}.

{table(facts)}

{table(*(_accuracy(*one) for one in found)) if found else "It has not been evaluated yet."}

{load}

The loss is taken on the program alone. `run.json` holds the whole configuration and the hash of the base weights,
`{str(trained.get("base_hash"))[:12]}...`. Evaluate it on test with:

    python main.py {" ".join(run.words(peft=False))} -NT -T --VLLM
"""
    write_atomically(folder / "README.md", head + card)


def _evaluations(
    run: StudentRun, trained: Mapping[str, Any], folders: Folders
) -> Iterator[tuple[str, EvalType, dict[str, Any]]]:
    """Split, eval type and metrics of each evaluation of exactly these weights, or of their base."""
    for split in SPLITS:
        for eval_type in EVAL_TYPES:
            folder = folders.evaluation(run.dataset, run.model_id, split, eval_type)
            files = (folder / "run.json", folder / "metrics.json")
            made, metrics = (json.loads(file.read_text()) if file.exists() else {} for file in files)
            name, own = ("student_hash", "weights_hash") if eval_type == "fine-tuned" else ("base_hash", "base_hash")
            if made.get(name) and made[name] == trained.get(own) and "accuracy_interval" in metrics:
                yield split, eval_type, metrics


def _accuracy(split: str, eval_type: EvalType, metrics: Mapping[str, Any]) -> dict[str, Any]:
    low, high = metrics["accuracy_interval"]
    of = "this model" if eval_type == "fine-tuned" else f"the base model, {eval_type}"
    shares = {"accuracy": f"{metrics['accuracy']:.3f}", "95% interval": f"{low:.3f} to {high:.3f}"}
    return {"split": split, "of": of, "questions": metrics["n"], **shares}
