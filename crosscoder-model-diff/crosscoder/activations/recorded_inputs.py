"""What an activation set is made from: rows or texts as token ids, the fine-tuned model, and the facts that name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from crosscoder.activations.collection import Document, assert_same_ids, documents_from_rows, fingerprint
from crosscoder.activations.own_texts import OwnText, documents_from_texts, read_texts
from crosscoder.activations.store import ActivationStore, read_set_config
from crosscoder.names import OWN_FIELDS, ActivationChoice
from crosscoder.own_pair import OwnPair, find_model, one_tokenizer, portable
from crosscoder.repositories import find_folder
from finqa.models import students
from finqa.models.adapters import is_adapter
from finqa.models.model_card import shown
from finqa.models.templates import tokenizer_in
from finqa.models.weights import weights_hash
from finqa.runtime.commands import typed
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash
from finqa.runtime.paths import Folders, chosen_splits
from finqa.task.datasets import dataset, how_to_make, rows_file
from finqa.task.records import TeacherRow, read_teacher_rows


def find_fine_tuned(choice: ActivationChoice, folders: Folders) -> Path:
    """Folder of the adapter, or with --merged of the merged model; of the user's own pair, of either kind."""
    student = choice.student
    if choice.pair:
        return find_model(choice.pair.fine_tuned)
    if not choice.merged:
        return students.find_adapter(student, folders)
    local = folders.model(student.dataset, f"{student.model_id}-merged")
    command = typed("crosscoder-model-diff/merge_and_push_lora.py", *student.words(), folders=folders)
    return find_folder(local, student, "merged model", command)


def find_instruct(choice: ActivationChoice, folders: Folders) -> Path | None:
    """Folder of the adapter in the instruct model's place; None where that is the base itself."""
    student = choice.instruct_student
    return students.find_adapter(student, folders) if student else None


class Source(NamedTuple):
    """What the documents are made of."""

    files: list[Path]
    tokenize: Callable[[Path], tuple[list[Document], Any]]
    """Folder of the fine-tuned model -> the first --num-samples documents, the same ids for both models' tokenizers;
    and the base model's tokenizer."""


def read_source(choice: ActivationChoice, folders: Folders) -> Source:
    """The filtered rows of the splits, or the texts of the user's own."""
    if choice.pair:
        texts = read_texts(choice.pair.text)
        return Source([choice.pair.text], partial(tokenize_texts, texts, choice, choice.pair))
    data, splits = dataset(choice.student.dataset), chosen_splits(choice.split)
    files = [rows_file("filtered", data, split, folders) for split in splits]
    rows_of = [
        read_teacher_rows(file, how_to_make("filtered", data, split, folders))
        for file, split in zip(files, splits, strict=True)
    ]
    check_every_split_is_reached(choice, [len(rows) for rows in rows_of])
    return Source(files, partial(tokenize, [row for rows in rows_of for row in rows], choice))


def check_every_split_is_reached(choice: ActivationChoice, n_rows: Sequence[int]) -> None:
    """UserError where the first --num-samples rows are not of every split; `n_rows` has the rows of each."""
    *before, last = n_rows
    if last and choice.num_samples <= sum(before):
        raise UserError(
            f"--split {choice.split} takes the splits one after the other, and --num-samples {choice.num_samples} ends "
            f"before the last, which begins after {sum(before)} rows; give a larger one ({sum(n_rows)} takes all), or "
            "one split"
        )


def tokenize(rows: list[TeacherRow], choice: ActivationChoice, fine_tuned: Path) -> tuple[list[Document], Any]:
    """The first --num-samples rows as token ids, the same for both models' tokenizers; and that of the base."""
    student = choice.student
    tokenizer: Any = students.tokenizer_of(student, fine_tuned)
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
        own = tokenizer_in(fine_tuned)
        own.chat_template = own.chat_template or tokenizer.chat_template
        assert_same_ids(chosen, documents_from_rows([row for row, _ in pairs], own, choice.raw))
    return chosen, tokenizer


def tokenize_texts(
    texts: Sequence[OwnText], choice: ActivationChoice, pair: OwnPair, fine_tuned: Path
) -> tuple[list[Document], Any]:
    """The first --num-samples texts of the user's own as token ids, long ones cut; and the base model's tokenizer."""
    student, chosen = choice.student, texts[: choice.num_samples]
    if len(chosen) < len(texts):
        print(f"{pair.text} holds {len(texts)} documents, the first {len(chosen)} are taken; more with --num-samples")
    base = students.resolve_model(student.model, student.revision)
    ours, theirs, why = one_tokenizer(student, base, fine_tuned, any(text.messages for text in chosen))
    reads = getattr(AutoConfig.from_pretrained(base).get_text_config(), "max_position_embeddings", None)
    longest = min(n for n in (pair.max_tokens or student.settings.max_seq_length, reads) if n)
    documents = documents_from_texts(chosen, ours)
    if theirs is not None:
        assert_same_ids(documents, documents_from_texts(chosen, theirs), why)
    if n_long := sum(len(document.ids) > longest for document in documents):
        print(f"{n_long} documents are longer than {longest} tokens, and are cut there")
    return [document.cut(longest) for document in documents], ours


def describe_inputs(
    choice: ActivationChoice, base: str, fine_tuned: Path, rows_files: Sequence[Path], instruct: Path | None = None
) -> dict[str, Any]:
    """What all sets of a run are made from. `instruct`: the adapter in the base model's place."""
    if choice.merged:
        how = "merged model"
    else:
        how = "adapter switched on" if is_adapter(fine_tuned) else "fine-tuned as a whole"
    student = choice.student
    facts: dict[str, Any] = {"dataset": student.dataset}
    if not choice.pair:
        facts |= {"split": choice.split, "model": student.model, "model_id": student.model_id, "raw": choice.raw}
        facts |= {"rows_hash": "+".join(map(file_hash, rows_files))}
    if instruct:
        facts |= {"against": choice.against, "against_hash": weights_hash(instruct)}
    return facts | {
        "keep_bos": choice.keep_bos,
        "load_in_4bit": student.load_in_4bit,
        "fine_tuned": how,
        "base_hash": weights_hash(base),
        "fine_tuned_hash": weights_hash(fine_tuned),
    }


def inputs_of(choice: ActivationChoice, facts: dict[str, Any], documents: list[Document]) -> dict[str, Any]:
    """What one set is made from, and its fingerprint; it travels with the set into every checkpoint trained on it."""
    own = {**facts, "layer": choice.resolved_layer, "site": choice.site}
    own |= {"keep_outliers": True} if choice.keep_outliers else {}  # as sets of version 1, which do not say it
    found = {"fingerprint": fingerprint(documents, own), "num_samples": len(documents), **own}
    if choice.pair:
        # By these a later script finds the models again; where they lie makes no other set.
        of_set = {name: getattr(choice, name) for name in OWN_FIELDS} | {"layer": choice.resolved_layer}
        found["pair"] = {**portable(choice.pair, choice.student)[0], "set": of_set}
    return found | {"model": shown(choice.student.model)}


def is_collected(folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `folder` holds this very set; UserError where it holds another one that may not be replaced.

    A damaged one counts as another, but for its shards, which are read only where it may be replaced.
    """
    if not (folder / "config.json").exists():
        return False
    try:
        same = read_set_config(folder).recorded.get("fingerprint") == fingerprint
        if same and overwrite:
            ActivationStore(folder, "disk").check()
    except UserError:
        if not overwrite:
            raise
        return False
    if not same and not overwrite:
        raise UserError(f"{folder} was made from other inputs (model, rows or settings); replace it with --overwrite")
    return same
