"""What the scripts of this folder share: the flags that name an activation set or a crosscoder.

    activation set   D/activations/<model-id>-<dataset>-<split>-layer<L>-<site>-<n>/    Hub HF_NAME/<same name>
                     D/activations/<pair>-layer<L>-<site>-<n>/ of two models of the user's own (own_pair)
    crosscoder       D/models/crosscoders/<short model name>-<dataset>-layer<L>-<site>_<n>_samples_batchtopk/
                                                                                        Hub HF_NAME/<same name>
    its results      crosscoder-model-diff/results/<crosscoder's name>/

<n> is the number of samples that was asked for, also where fewer rows were there. Crosscoders were once named without
data set, layer and site; those names are still found.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from crosscoder.dictionaries.config import CrosscoderConfig, Method
from crosscoder.own_pair import STUDENT_FIELDS, OwnPair, pair_from_args, recorded_pairs, refuse_others
from finqa.models import hub
from finqa.models.students import (
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    StudentRun,
    add_student_flags,
    local_model,
    student_from_args,
)
from finqa.runtime.command_line import add_flags, check_bounds, flag, from_args, given, words_of
from finqa.runtime.commands import typed
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders, SplitOrAll, add_folder_flags, check_name

Site = Literal["attention", "mlp", "residual"]
SITES: tuple[Site, ...] = get_args(Site)
"""In the order in which a layer computes them."""
DEFAULT_RESULTS = REPOSITORY / "crosscoder-model-diff" / "results"
UNNAMED = "unnamed"
"""What stands for an empty run name in a name."""
DEFAULT_DEPTH = 32
"""Layers of the default model."""
OWN_FIELDS = ("num_samples", "layer", "site", "keep_bos", "keep_outliers")
"""Fields of an ActivationChoice that apply to two models of the user's own."""


@dataclass(frozen=True)
class ActivationChoice:
    """Which activations of a student and its base: decides an activation set's name."""

    student: StudentRun
    split: SplitOrAll = flag("test")
    """One of the splits, or `all` of them."""
    num_samples: int = flag(1024, metavar="DOCUMENTS", least=2)
    """Documents, from the top of the filtered rows; at least one of them is held out of training."""
    layer: int | None = flag(None, shown="17 of 32, or nearest to that share", least=1)
    """Layer that is read, counted from 1."""
    site: Site = flag("mlp")
    """Output of the MLP, of the attention block, or of the whole layer."""
    raw: bool = flag(False)
    """Join prompt and program without the chat template."""
    merged: bool = flag(False)
    """Use the merged model in place of base + adapter."""
    keep_bos: bool = flag(False)
    """Keep the first token, whose activation is an outlier."""
    keep_outliers: bool = flag(False)
    """Keep tokens of more than ten times the median norm (attention sinks), which dictionaries do not read."""
    against: str | None = flag(None, metavar="RUN_NAME", shown="the base model itself")
    """Run name of another fine-tune that takes the base model's place ('': the one without a name)."""
    pair: OwnPair | None = None
    """Two models of the user's own; `student` is then the first of them."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.site not in SITES:
            raise UserError(f"--site is one of {', '.join(SITES)}, not {self.site}")
        check_name("--against", self.against or "")
        if self.against is not None and (self.merged or not self.student.peft):
            raise UserError("--against pairs two adapters of one base; leave out --merged and --no-peft")

    @property
    def resolved_layer(self) -> int:
        if self.layer is not None:
            return self.layer
        return default_layer(model_depth(self.student.model, self.student.revision))

    @property
    def name(self) -> str:
        """Name of the activation set."""
        student = self.student
        stem = self.pair.name if self.pair else f"{student.model_id}-{student.dataset}-{self.split}"
        parts = [stem, f"layer{self.resolved_layer}", self.site, str(self.num_samples), *self._how_words]
        return "-".join([*parts, *self._against_words])

    @property
    def _how_words(self) -> list[str]:
        chosen = {"raw": self.raw, "merged": self.merged, "bos": self.keep_bos, "outliers": self.keep_outliers}
        return [word for word, is_chosen in chosen.items() if is_chosen]

    @property
    def _against_words(self) -> list[str]:
        return [] if self.against is None else ["against", self.against or UNNAMED]

    @property
    def instruct_student(self) -> StudentRun | None:
        """The fine-tune in the instruct model's place; None where that is the base itself."""
        return None if self.against is None else replace(self.student, run_name=self.against)

    @property
    def crosscoder_name(self) -> str:
        """Default name of the crosscoder that is trained on this set."""
        if self.pair:
            return f"{self.name}_batchtopk"
        split = [self.split] if self.split != ActivationChoice.split else []
        of = [self.student.dataset, *split, f"layer{self.resolved_layer}", self.site, *self._how_words]
        return self._crosscoder_name(*of)

    @property
    def earlier_crosscoder_name(self) -> str:
        """The default name before it told data sets, layers and sites apart."""
        return self.crosscoder_name if self.pair else self._crosscoder_name()

    def _crosscoder_name(self, *of: str) -> str:
        local = local_model(self.student.model)
        short = local.name if local else self.student.model.split("/")[-1]
        n = self.num_samples
        samples = f"{n // 1024}k" if n % 1024 == 0 else str(n)
        suffix = [self.student.run_name] if self.student.run_name else []
        return "-".join([short, *of]) + "-".join([f"_{samples}_samples_batchtopk", *suffix, *self._against_words])

    def is_of(self, recorded: Mapping[str, Any]) -> bool:
        """Whether this names the activations that a set, or a crosscoder's config.json, describes."""
        asked = {
            "dataset": self.student.dataset,
            "split": self.split,
            "model_id": self.student.model_id,
            "layer": self.resolved_layer,
            "site": self.site,
            "raw": self.raw,
            "keep_bos": self.keep_bos,
        }
        return all(recorded.get(name) == value for name, value in asked.items())

    def command(self, script: str, folders: Folders | None = None, *more: str) -> str:
        """The command that runs `script` for this choice, with the flags that are not at their default, and `more`."""
        words = [*self.student.words(), *words_of(self)]
        if self.pair:
            own = [*words_of(self.pair), *self.student.flags(), *words_of(self)]
            words = own if script == "collect_activations.py" else [shlex.quote(self.name)]
        place = script if script.startswith("-m ") else f"crosscoder-model-diff/{script}"
        return typed(place, *words, *more, folders=folders)


@dataclass(frozen=True)
class CrosscoderChoice:
    """Which crosscoder of an activation set, and where its results are."""

    method: Method = flag(CrosscoderConfig.method, help="What kind of dictionary it is")
    name: str | None = flag(None, shown="<short model name>-<dataset>-layer<L>-<site>_<n>_samples_<method>")
    """Name of the crosscoder."""
    untrained: bool = flag(False)
    """The dictionary as training would start: scales, decoder bias and thresholds are those of the data."""
    freeze_decoder: bool = flag(False)
    """The dictionary whose decoder's vectors stay as they start, while encoder and biases are trained."""
    results_dir: Path = flag(DEFAULT_RESULTS, help="Folder of its figures and tables, each crosscoder's below its name")

    def __post_init__(self) -> None:
        check_name("--name", self.name or "")
        if self.untrained and self.freeze_decoder:
            raise UserError("--untrained takes no step, so there is nothing to train beside --freeze-decoder: give one")

    @property
    def kind(self) -> str:
        """What the default name says of the dictionary: its method, and how it was trained where that is unusual."""
        form = "-untrained" if self.untrained else "-frozen-decoder" if self.freeze_decoder else ""
        return self.method + form

    def name_on(self, activations: ActivationChoice, folders: Folders) -> str:
        """The name that was given, else the default one on these activations; the earlier default where a crosscoder
        of these activations has that, and none the new one."""
        if self.name:
            return self.name
        name, earlier = name_of_method(activations.crosscoder_name, self.kind), self.earlier_name_on(activations)
        old, new = (crosscoder_folder(folders, each) / "config.json" for each in (earlier, name))
        if not new.exists() and old.exists():
            try:
                values = json.loads(old.read_text())
            except json.JSONDecodeError:
                return name
            if isinstance(values, dict) and activations.is_of(values.get("activations") or {}):
                return earlier
        return name

    def earlier_name_on(self, activations: ActivationChoice) -> str:
        """What the default name was; the Hub may have it."""
        return self.name or name_of_method(activations.earlier_crosscoder_name, self.kind)


def add_activation_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The student's flags, those that name an activation set, and the folders.

    `several`: --layer and --site take one or more values each (`choices_from_args`).
    """
    add_student_flags(parser)
    group = parser.add_argument_group("activations (these shape the name of the activation set)")
    add_flags(group, ActivationChoice, several=("layer", "site") if several else ())
    add_folder_flags(parser, results=False)


def choice_from_args(args: argparse.Namespace) -> ActivationChoice:
    """The choice that the flags of `add_activation_flags` describe, or the name of a pair of the user's own."""
    return _recorded_choice(args) or from_args(ActivationChoice, args, student=student_from_args(args))


def _recorded_choice(args: argparse.Namespace) -> ActivationChoice | None:
    """The set of a pair of the user's own that is named in the data set's place; flags choose among several."""
    name, asked = given(StudentRun, args).get("dataset", DEFAULT_DATASET), given(ActivationChoice, args)
    if not (found := recorded_pairs(name, Folders.from_args(args))):
        return None
    refuse_others(args, (StudentRun, ActivationChoice), ("dataset", *OWN_FIELDS), f"{name} says what was recorded")
    choices = [_choice_of(recorded) for recorded in found.values()]
    chosen = [one for one in choices if all(getattr(one, field) == value for field, value in asked.items())]
    if len(chosen) != 1:
        raise UserError(f"{len(chosen)} sets of {name} are meant; give the whole name of one: {', '.join(found)}")
    return chosen[0]


def _choice_of(recorded: Mapping[str, Any]) -> ActivationChoice:
    """The choice that made a set of a pair of the user's own."""
    of_student, of_set, of_pair = (recorded["pair"][part] for part in ("student", "set", "models"))
    pair = OwnPair(**of_pair | {"text": Path(of_pair["text"])})
    return ActivationChoice(pair.student(**of_student), **of_set, pair=pair)


def choices_from_args(args: argparse.Namespace) -> list[ActivationChoice]:
    """A choice for every combination of the layers and sites that are given, each once."""
    asked, pair = given(ActivationChoice, args), pair_from_args(args)
    if pair:
        allowed = (*OWN_FIELDS, *STUDENT_FIELDS)
        refuse_others(args, (StudentRun, ActivationChoice), allowed, "two models of your own need no data set")
    student = pair.student(**given(StudentRun, args)) if pair else student_from_args(args)
    layers, sites = asked.pop("layer", (None,)), asked.pop("site", ("mlp",))
    pairs = dict.fromkeys((layer, site) for layer in layers for site in sites)
    return [ActivationChoice(student, **asked, layer=layer, site=site, pair=pair) for layer, site in pairs]


def default_layer(depth: int) -> int:
    """Layer that is read by default, counted from 1: 17 of 32, else the nearest to that share of `depth`."""
    return max(1, round(17 * depth / 32))


def model_depth(model: str, revision: str | None = None) -> int:
    """Layers of a model, from its config.json alone; UserError where that is nowhere."""
    try:
        folder = local_model(model) or hub.fetch_model(model, revision, ["config.json"])
    except UserError as error:
        if model == DEFAULT_MODEL:
            return DEFAULT_DEPTH  # so that what is missing without a network is said by its name
        raise UserError(f"{error}; where only its depth is asked for, say --layer") from error
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"the depth of {model} is not known, as {path} is missing; say --layer")
    values = json.loads(path.read_text())
    depth = values.get("num_hidden_layers") or values.get("text_config", {}).get("num_hidden_layers")
    if not depth:
        raise UserError(f"{path} does not say how many layers the model has; say --layer")
    return int(depth)


def crosscoder_folder(folders: Folders, name: str) -> Path:
    """Checkpoint folder of a crosscoder."""
    return folders.data / "models" / "crosscoders" / name


def name_of_method(name: str, method: str) -> str:
    """The default name of a crosscoder, which says batchtopk, with another method in its place."""
    before, _, after = name.rpartition("_batchtopk")
    return f"{before}_{method}{after}"
