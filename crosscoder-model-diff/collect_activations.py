"""Record the activations of a base model and its fine-tuned form over the same tokens.

    python collect_activations.py                                     FinQA, Mistral-7B-Instruct-v0.3, layer 17
    python collect_activations.py FinQA-mini pocket-mistral --no-push
    python collect_activations.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> --site residual --layer 20

Reads the filtered rows of a split (prompt and program, as the very token ids the student was trained on), the base
model, and the adapter: from D/models/<dataset>/<model-id>/, else from the Hub. One model is in memory, its adapter
switched off for index 0 (instruct) and on for index 1 (fine-tuned); with --merged a second one, the merged model.
The models run up to the layer and no further. Padding is never recorded, BOS only with --keep-bos.

Writes D/activations/<model-id>-<dataset>-<split>-layer<L>-<site>-<n>/: shards, token table, config.json with the
activation scales, and run.json. A set that is there and was made from the same inputs is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.names import (
    ActivationChoice,
    add_activation_flags,
    add_push_flags,
    choice_from_args,
    find_folder,
    hub_id,
    require_push,
)
from finqa import hub, students
from finqa.errors import UserError, report_errors
from finqa.manifest import file_hash, write_manifest
from finqa.paths import Folders
from finqa.records import TeacherRow, read_teacher_rows
from finqa.weights import weights_hash

if TYPE_CHECKING:
    import torch

    from crosscoder.collection import Document, Read

BYTES_PER_GB = 1e9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_activation_flags(parser)
    add_push_flags(parser, "activation set")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the models (default: bf16 on a GPU, else fp32)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a batch, padded (default: %(default)s)")
    parser.add_argument("--allow-identical", action="store_true", help="accept two models that do not differ")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that was made from other inputs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    choice, folders = choice_from_args(args), Folders.from_args(args)
    folder = folders.activations(choice.name)
    require_push(args, choice.student, choice.name)
    rows_file = folders.filtered(choice.student.dataset, choice.split)
    rows = read_teacher_rows(rows_file)
    base = students.resolve_model(choice.student.model, choice.student.revision)
    fine_tuned = find_fine_tuned(choice, folders)
    documents = tokenize(rows, choice, fine_tuned)
    inputs = describe_inputs(args, choice, base, fine_tuned, documents, rows_file)
    if is_collected(folder, inputs["fingerprint"], args.overwrite):
        print(f"{folder} is complete and was made from these inputs")
    else:
        collect(args, choice, fine_tuned, documents, inputs, folder)
    hub.push_folder(folder, hub_id(choice.student, choice.name) if args.push else None, args.push, args.private)


def find_fine_tuned(choice: ActivationChoice, folders: Folders) -> Path:
    """Folder of the adapter, or with --merged of the merged model."""
    student = choice.student
    if not choice.merged:
        return students.find_adapter(student, folders)
    local = folders.model(student.dataset, f"{student.model_id}-merged")
    command = choice.command("merge_and_push_lora.py")
    return find_folder(local, student, "config.json", "merged model", command)


def tokenize(rows: list[TeacherRow], choice: ActivationChoice, fine_tuned: Path) -> list[Document]:
    """The first --num-samples rows as token ids, the same for both models' tokenizers."""
    from transformers import AutoTokenizer

    from crosscoder.collection import assert_same_ids, documents_from_rows

    student = choice.student
    tokenizer = students.load_tokenizer(student.model, student.revision)
    longest = student.settings.max_seq_length
    documents = documents_from_rows(rows, tokenizer, choice.raw)
    pairs = [(row, document) for row, document in zip(rows, documents, strict=True) if len(document.ids) <= longest]
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} rows exceed {longest} tokens and are dropped, as in training")
    if len(pairs) < choice.num_samples:
        print(f"--num-samples {choice.num_samples}: {len(pairs)} rows are there, all are taken")
    pairs = pairs[: choice.num_samples]
    if len(pairs) < 2:
        raise UserError(f"{choice.split} of {student.dataset} has {len(pairs)} usable rows; at least 2 are needed")
    chosen = [document for _, document in pairs]
    if (fine_tuned / "tokenizer_config.json").exists():
        own: Any = AutoTokenizer.from_pretrained(fine_tuned)
        own.chat_template = own.chat_template or tokenizer.chat_template
        assert_same_ids(chosen, documents_from_rows([row for row, _ in pairs], own, choice.raw))
    return chosen


def describe_inputs(
    args: argparse.Namespace,
    choice: ActivationChoice,
    base: str,
    fine_tuned: Path,
    documents: list[Document],
    rows_file: Path,
) -> dict[str, Any]:
    """What is recorded, and its fingerprint; it travels with the set into every checkpoint trained on it."""
    from crosscoder.collection import fingerprint

    device = args.device or students.default_device()
    facts = {
        "dataset": choice.student.dataset,
        "split": choice.split,
        "model": choice.student.model,
        "model_id": choice.student.model_id,
        "layer": choice.resolved_layer,
        "site": choice.site,
        "raw": choice.raw,
        "keep_bos": choice.keep_bos,
        "load_in_4bit": choice.student.load_in_4bit,
        "fine_tuned": "merged model" if choice.merged else "adapter switched on",
        "dtype": args.dtype or ("bf16" if device.startswith("cuda") else "fp32"),
        "base_hash": weights_hash(base),
        "fine_tuned_hash": weights_hash(fine_tuned),
        "rows_hash": file_hash(rows_file),
    }
    return {"fingerprint": fingerprint(documents, facts), "num_samples": len(documents), "device": device, **facts}


def is_collected(folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `folder` holds this very set; UserError where it holds another one that may not be replaced."""
    from crosscoder.activation_store import read_set_config

    if not (folder / "config.json").exists():
        return False
    if read_set_config(folder).recorded.get("fingerprint") == fingerprint:
        return True
    if not overwrite:
        raise UserError(f"{folder} was made from other inputs (model, rows or settings); replace it with --overwrite")
    return False


def collect(
    args: argparse.Namespace,
    choice: ActivationChoice,
    fine_tuned: Path,
    documents: list[Document],
    inputs: dict[str, Any],
    folder: Path,
) -> None:
    import torch

    from crosscoder.activation_store import ActivationWriter
    from crosscoder.collection import record

    started = time.monotonic()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[inputs["dtype"]]
    bos_id: Any = students.load_tokenizer(choice.student.model, choice.student.revision).bos_token_id
    readers, d_model = load_readers(choice, fine_tuned, dtype, inputs["device"])
    print_plan(documents, d_model, folder)
    writer = ActivationWriter(folder, d_model, drop_outliers=choice.site == "residual")
    progress = Progress(sum(len(document.ids) for document in documents))
    stored = record(
        readers,
        documents,
        writer,
        skip_id=None if choice.keep_bos else bos_id,
        device=inputs["device"],
        batch_tokens=args.batch_tokens,
        allow_identical=args.allow_identical,
        on_batch=progress.add,
    )
    config = writer.finish(stored, inputs)
    seconds = time.monotonic() - started
    write_manifest(folder / "run.json", vars(args), inputs=inputs, seconds=round(seconds, 1))
    if config.n_dropped:
        print(f"{config.n_dropped} tokens above ten times the median norm are left out of every reading")
    scales = " and ".join(f"{scale:.4g}" for scale in config.activation_scales)
    print(
        f"{config.n_tokens:,} tokens of {len(stored)} documents at layer {choice.resolved_layer} ({choice.site}), "
        f"scales {scales}, {config.n_tokens / progress.seconds:,.0f} tokens/s for both models, in {folder}"
    )


def load_readers(
    choice: ActivationChoice, fine_tuned: Path, dtype: torch.dtype, device: str
) -> tuple[tuple[Read, Read], int]:
    """Readers of the instruct and the fine-tuned model, and the width of what they read."""
    from crosscoder.collection import adapter_readers, reader

    student, layer = choice.student, choice.resolved_layer
    base = students.load_base(student.model, dtype, device, student.load_in_4bit, student.revision)
    d_model = base.config.get_text_config().hidden_size
    if (fine_tuned / "adapter_config.json").exists():
        adapted = students.load_adapter(base, fine_tuned)
        return adapter_readers(adapted.eval(), layer, choice.site), d_model
    whole = students.load_base(str(fine_tuned), dtype, device)
    return (reader(base, layer, choice.site), reader(whole, layer, choice.site)), d_model


def print_plan(documents: list[Document], d_model: int, folder: Path) -> None:
    """Say what the set takes on disk; UserError where it does not fit."""
    n_tokens = sum(len(document.ids) for document in documents)
    needed = n_tokens * 2 * d_model * 2
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    print(f"{len(documents)} documents, {n_tokens:,} tokens: {needed / BYTES_PER_GB:.2f} GB on disk", flush=True)
    if needed > 0.95 * free:
        raise UserError(
            f"the activations need {needed / BYTES_PER_GB:.1f} GB and {existing} has {free / BYTES_PER_GB:.1f} GB "
            "free; take fewer documents (--num-samples) or another --data-dir"
        )


class Progress:
    """A line now and then with the tokens that are done."""

    def __init__(self, total: int, every_s: float = 10.0):
        self.total = total
        self.every_s = every_s
        self.done = 0
        self._start = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def add(self, n_tokens: int) -> None:
        self.done += n_tokens
        if time.monotonic() - self._said > self.every_s:
            self._said = time.monotonic()
            print(f"{self.done:,} of {self.total:,} tokens, {self.done / self.seconds:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    sys.exit(report_errors(main))
