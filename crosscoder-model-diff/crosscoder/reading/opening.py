"""Opens what an analysis needs: crosscoder, activation set, tokenizer, unembedding, by the names train.py takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosscoder.names import (
    add_activation_flags,
    add_crosscoder_flags,
    choice_from_args,
    crosscoder_folder,
    find_folder,
)
from finqa import students
from finqa.errors import UserError
from finqa.paths import Folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crosscoder.activations.store import ActivationStore, Split
    from crosscoder.model import BatchTopKCrosscoder
    from crosscoder.reading.lens import Unembedding


@dataclass(frozen=True)
class Reading:
    """A trained crosscoder with all that is needed to read it."""

    name: str
    model: BatchTopKCrosscoder
    store: ActivationStore
    """The set that it was trained on."""
    split: Split
    """Its tokens, by whether their document was held out of training."""
    tokenizer: PreTrainedTokenizerBase
    unembedding: Unembedding
    """Of the base model."""
    results: Path
    """Folder of its figures and tables."""


def open_reading(arguments: Sequence[str] = ()) -> Reading:
    """Open by the names and flags of train.py; without any, those of the 7B run.

    Crosscoder and activation set come from their local folders, else from the Hub. UserError where one is missing,
    or where the crosscoder was trained on other activations.
    """
    from crosscoder.activations.store import ActivationStore
    from crosscoder.checkpoint import read_config
    from crosscoder.config import TrainingConfig
    from crosscoder.model import BatchTopKCrosscoder
    from crosscoder.reading.lens import read_unembedding

    parser = argparse.ArgumentParser(prog="reading")
    add_activation_flags(parser)
    add_crosscoder_flags(parser)
    args = parser.parse_args(list(arguments))
    choice, folders = choice_from_args(args), Folders.from_args(args)
    name = args.name or choice.crosscoder_name

    folder = find_folder(
        crosscoder_folder(folders, name), choice.student, "config.json", "crosscoder", choice.command("train.py")
    )
    recorded = folders.activations(choice.name)
    command = choice.command("collect_activations.py")
    store = ActivationStore(find_folder(recorded, choice.student, "config.json", "activation set", command))
    config = read_config(folder)
    if config.activations and config.activations["fingerprint"] != store.config.recorded["fingerprint"]:
        raise UserError(f"{folder} was trained on other activations than those in {store.folder}")
    training = config.training or TrainingConfig()
    return Reading(
        name=name,
        model=BatchTopKCrosscoder.from_pretrained(folder).to(students.default_device()),
        store=store,
        split=store.split(training.held_out_fraction, training.split_seed),
        tokenizer=students.load_tokenizer(choice.student.model, choice.student.revision),
        unembedding=read_unembedding(choice.student.model, choice.student.revision),
        results=args.results_dir / name,
    )
