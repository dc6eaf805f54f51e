"""Opens what an analysis needs: crosscoder, activation set, tokenizer, unembedding, by the names train.py takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import READ_TOKENS
from crosscoder.names import (
    ActivationChoice,
    CrosscoderChoice,
    add_activation_flags,
    choice_from_args,
    crosscoder_folder,
)
from crosscoder.own_pair import base_tokenizer
from crosscoder.repositories import find_activations, find_folder
from finqa.models import students
from finqa.runtime.command_line import add_flags, check_bounds, flag, from_args, words_of
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders, chosen_splits
from finqa.task.records import read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crosscoder.activations.store import ActivationStore, Split
    from crosscoder.analysis.lens import Unembedding
    from crosscoder.dictionaries.model import BatchTopKCrosscoder


@dataclass(frozen=True)
class OpenedCrosscoder:
    """A trained crosscoder with everything that an analysis of it needs."""

    name: str
    model: BatchTopKCrosscoder
    store: ActivationStore
    """The set that it was trained on."""
    split: Split
    """Its tokens, by whether their document was held out of training."""
    tokenizer: PreTrainedTokenizerBase
    unembedding: Unembedding
    """Unembedding of the base model."""
    results: Path
    """Folder of its figures and tables."""
    families: Mapping[str, str] = field(default_factory=dict)
    """Question family of every document, by its id, where the data set knows it and its clean rows are here."""

    @property
    def made_of(self) -> dict[str, str]:
        """Identifies what results, labels and effects belong to: this very dictionary, on this very set."""
        from crosscoder.interventions.sets import dictionary_digest

        fingerprint = self.store.config.recorded.get("fingerprint")
        return {"dictionary": dictionary_digest(self.model), "activations": str(fingerprint)}

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether a record, which holds a `made_of`, was made from this dictionary on this set."""
        return self.made_of.items() <= record.items()


@dataclass(frozen=True)
class AnalysisConfig:
    """How a dictionary is analysed, and which latents are in the table of the most changed ones."""

    n_most_changed: int = flag(20, "--most-changed", metavar="LATENTS", least=1)
    """Latents in that table."""
    min_frequency: float = flag(1e-4, metavar="SHARE", least=0, below=1)
    """Share of the tokens at or below which a latent is left out of that table: it has too few examples."""
    batch_size: int = READ_TOKENS

    def __post_init__(self) -> None:
        check_bounds(self)


def add_crosscoder_flags(parser: argparse.ArgumentParser) -> None:
    """The names and flags of train.py that say which dictionary is read."""
    add_activation_flags(parser)
    add_flags(parser.add_argument_group("crosscoder"), CrosscoderChoice)


def open_crosscoder(arguments: Sequence[str] = ()) -> OpenedCrosscoder:
    """Open by the names and flags of train.py; without any, those of the 7B run. Errors as of `open_crosscoder_of`."""
    parser = argparse.ArgumentParser(prog="reading")
    add_crosscoder_flags(parser)
    return open_crosscoder_of(parser.parse_args(list(arguments)))


def open_crosscoder_of(args: argparse.Namespace) -> OpenedCrosscoder:
    """Open what the flags of `add_crosscoder_flags` name.

    Crosscoder and activation set come from their local folders, else from the Hub. UserError where one is missing,
    or where the crosscoder was trained on other activations.
    """
    choice, crosscoder, folders = choice_from_args(args), from_args(CrosscoderChoice, args), Folders.from_args(args)
    name = crosscoder.name_on(choice, folders)
    train = choice.command("train.py", folders, *words_of(crosscoder, results_dir=crosscoder.results_dir))
    local, earlier = crosscoder_folder(folders, name), crosscoder.earlier_name_on(choice)
    folder = find_folder(local, choice.student, "crosscoder", train, earlier)
    recorded = find_activations(choice, folders)
    # Only now, so that what is missing is said at once.
    from crosscoder.activations.store import ActivationStore
    from crosscoder.analysis.lens import read_unembedding
    from crosscoder.dictionaries.checkpoint import read_config
    from crosscoder.dictionaries.config import TrainingConfig

    store = ActivationStore(recorded)
    config = read_config(folder)
    if config.activations and config.activations["fingerprint"] != store.config.recorded["fingerprint"]:
        of = " ".join(str(config.activations.get(name, "")) for name in ("dataset", "layer", "site")).strip()
        raise UserError(
            f"{folder} was trained on other activations ({of or 'not said'}: data set, layer, site) than those in "
            f"{store.folder}; give the flags of those, or train one on these with: {train} --overwrite"
        )
    training = config.training or TrainingConfig()
    trained = folders.model(choice.student.dataset, choice.student.model_id)
    if choice.pair:
        tokenizer = base_tokenizer(choice.student, store.config.recorded)
    else:
        tokenizer = students.tokenizer_of(choice.student, trained)
    return OpenedCrosscoder(
        name=name,
        model=load_dictionary(folder).to(students.default_device()),
        store=store,
        split=store.split(training.held_out_fraction, training.split_seed),
        tokenizer=tokenizer,
        unembedding=read_unembedding(choice.student.model, len(tokenizer), choice.student.revision),
        results=crosscoder.results_dir / name,
        families=question_families(folders, choice),
    )


def question_families(folders: Folders, choice: ActivationChoice) -> dict[str, str]:
    """The family of every question that has one, by its id, as `name (new)` or `name (known)`."""
    paths = [folders.clean(choice.student.dataset, split) for split in chosen_splits(choice.split)]
    questions = [question for path in paths if path.exists() for question in read_questions(path)]
    return {each.id: f"{each.family} ({each.family_kind})" for each in questions if each.family}
