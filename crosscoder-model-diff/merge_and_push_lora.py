"""Make one model of a base model and its LoRA adapter, check that it answers as the pair does, and push it.

    python merge_and_push_lora.py                                     FinQA, Mistral-7B-Instruct-v0.3
    python merge_and_push_lora.py FinQA-mini pocket-mistral --no-push
    python merge_and_push_lora.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME --push --private

Reads the base model and the adapter, from D/models/<dataset>/<model-id>/, else from the Hub; and for the check a few
rows of D/clean_with_code (those of the test split where they are there).

Writes D/models/<dataset>/<model-id>-merged/ with a model card and run.json; with --push also
HF_NAME/<model-id>-merged on the Hub. A merged weight is base + adapter rounded to the base's dtype, so the merged
model's next-token distributions differ a little from the pair's. When the mean KL divergence is above --max-kl, or
is not well below that of the base model, nothing is kept and nothing pushed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crosscoder.repositories import add_push_flags, hub_id, require_push
from finqa.models import fidelity, hub, merging, students
from finqa.models.adapters import is_adapter
from finqa.models.model_card import loading, metadata, shown
from finqa.models.weights import weights_hash
from finqa.runtime import parallel
from finqa.runtime.command_line import add_flags, flag, from_args, script_parser, settings_of
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import write_manifest
from finqa.runtime.paths import SPLITS, Folders, add_folder_flags, write_atomically
from finqa.task.records import read_teacher_rows

CHECKED_ROWS = 8
NOWHERE = "HF_NAME/"
"""What stands in the card for the Hub account until there is a push."""
OWN_PROMPT = "Read the following passage and then write python code to answer the question:\n###Python"
"""What is checked where no row is at hand."""


class Divergence(NamedTuple):
    """Mean over the checked tokens, in nats, and share of tokens with the same likeliest next token."""

    merged: float
    """KL(base + adapter || merged)."""
    base: float
    """KL(base + adapter || base): what the adapter does."""
    agreement: float
    """Share of tokens whose likeliest successor is the same in merged and base + adapter."""
    n_tokens: int


@dataclass(frozen=True)
class Merging:
    """How a merge is checked, and what it may replace."""

    max_kl: float = flag(0.01, metavar="NATS", help="Largest mean KL divergence from base + adapter, in nats a token")
    device: str | None = flag(None, shown="a GPU where there is one", help="Torch device of the check")
    overwrite: bool = flag(False, help="Replace a merged model of another adapter")


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    students.add_student_flags(parser)
    add_folder_flags(parser, results=False)
    add_push_flags(parser, "merged model")
    add_flags(parser, Merging)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    student, folders, config = students.student_from_args(args), Folders.from_args(args), from_args(Merging, args)
    parallel.check_device(config.device)
    require_push(args, student, f"{student.model_id}-merged")
    adapter = students.find_adapter(student, folders)
    if not is_adapter(adapter):
        raise UserError(f"{adapter} is a whole model, not an adapter: there is nothing to merge")
    if student.load_in_4bit:
        raise UserError("an adapter of a 4-bit base cannot be merged into it; serve the pair, or train without -F")
    folder = folders.model(student.dataset, f"{student.model_id}-merged")
    adapter_hash = weights_hash(adapter)
    if is_merged(folder, adapter_hash, config.overwrite):
        print(f"{folder} is complete and was made from this adapter")
    else:
        with only_run_on(folder):
            merge(config, student, adapter, adapter_hash, folder, folders)
    repository = hub_id(student, folder.name) if args.push else None
    if repository:
        card = folder / "README.md"
        write_atomically(card, card.read_text().replace(NOWHERE, repository.partition("/")[0] + "/"))
    hub.push_folder(folder, repository, args.push, args.private)


def is_merged(folder: Path, adapter_hash: str, overwrite: bool) -> bool:
    """Whether `folder` holds this adapter's merge; UserError where it holds another's that may not be replaced."""
    manifest = folder / "run.json"
    if not manifest.exists():
        return False
    if json.loads(manifest.read_text()).get("adapter_hash") == adapter_hash:
        return True
    if not overwrite:
        raise UserError(f"{folder} was made from another adapter; replace it with --overwrite")
    return False


def merge(
    config: Merging,
    student: students.StudentRun,
    adapter: Path,
    adapter_hash: str,
    folder: Path,
    folders: Folders,
) -> None:
    """Merge beside the final place, check, and move the result there."""
    started = time.monotonic()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merging.merge(student.model, adapter, partial, student.revision)
    divergence = compare(student, adapter, partial, checked_rows(student, adapter, folders), config.device)
    print(
        f"KL from base + adapter over {divergence.n_tokens} tokens: merged {divergence.merged:.2g}, base "
        f"{divergence.base:.2g} nats; {divergence.agreement:.2%} of next tokens agree"
    )
    refuse_if_apart(divergence, config.max_kl, partial)
    write_atomically(partial / "README.md", model_card(student, divergence))
    write_manifest(
        partial / "run.json",
        settings_of(student, config),
        adapter_hash=adapter_hash,
        base_hash=weights_hash(students.resolve_model(student.model, student.revision)),
        check=divergence._asdict(),
        seconds=round(time.monotonic() - started, 1),
    )
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    print(f"merged model in {folder}")


def checked_rows(student: students.StudentRun, adapter: Path, folders: Folders) -> fidelity.Sequences:
    """A few training rows of whatever split is there, test first; else one bare prompt."""
    tokenizer = students.tokenizer_of(student, adapter)
    for split in reversed(SPLITS):
        path = folders.filtered(student.dataset, split)
        rows = read_teacher_rows(path)[:CHECKED_ROWS] if path.exists() else []
        if rows:
            return [students.training_ids(tokenizer, row.prompt, row.generated_code) for row in rows]
    return [students.training_ids(tokenizer, OWN_PROMPT, "ans = 1 + 1")]


def compare(
    student: students.StudentRun, adapter: Path, merged: Path, sequences: fidelity.Sequences, device: str | None
) -> Divergence:
    """Next-token distributions of base + adapter, base alone, and the merged model, on the same completions."""
    import torch

    device = device or students.default_device()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    base, pair = fidelity.unmerged(student, adapter, sequences, dtype, device)
    whole = fidelity.whole_model(merged, sequences, dtype, device)
    return Divergence(
        merged=fidelity.mean_kl(pair, whole),
        base=fidelity.mean_kl(pair, base),
        agreement=fidelity.same_first(pair, whole),
        n_tokens=sum(map(len, pair)),
    )


def refuse_if_apart(divergence: Divergence, max_kl: float, partial: Path) -> None:
    """UserError, and nothing kept, where the merged model is not the pair."""
    if divergence.merged <= max_kl and fidelity.agrees(divergence.merged, divergence.base):
        return
    shutil.rmtree(partial)
    raise UserError(
        f"the merged model is {divergence.merged:.3g} nats from base + adapter (at most {max_kl:g}, and "
        f"{fidelity.AGREEMENT:.0%} of the base's {divergence.base:.3g}, are accepted); use base + adapter, or raise "
        "--max-kl knowingly"
    )


def model_card(student: students.StudentRun, divergence: Divergence) -> str:
    """README.md of the merged model."""
    name = f"{student.model_id}-merged"
    tags = ["merge", "lora", "finance", "code"]
    head = metadata(
        name, [student.model], "transformers", tags, "finetune", student.dataset, pipeline="text-generation"
    )
    where = json.dumps(f"{NOWHERE}{name}")
    load = loading(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({where})",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
    )
    return f"""{head}
# {name}

`{shown(student.model)}` with the LoRA adapter that was fine-tuned on {student.dataset} to write small Python programs
that answer questions over earnings reports, merged into its weights. Made by `merge_and_push_lora.py`.

A merged weight is base + adapter, summed in fp32 and rounded to the base's dtype. Over {divergence.n_tokens} tokens of
its own task, KL(base + adapter || merged) is {divergence.merged:.2g} nats a token, against {divergence.base:.2g} for
the base model; {divergence.agreement:.2%} of the likeliest next tokens agree.

{load}
"""


if __name__ == "__main__":
    sys.exit(report_errors(main))
