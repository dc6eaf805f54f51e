"""Two models of the user's own: any base model, its fine-tuned form, and the texts that both read."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finqa.models import hub
from finqa.models.adapters import check_plain, is_adapter
from finqa.models.settings import StudentSettings, settings_for
from finqa.models.students import MODEL_FILES, POCKET, StudentRun, local_model, resolve_model
from finqa.models.templates import read_template, tokenizer_in
from finqa.models.weights import check_model_folder, weights_hash
from finqa.runtime.command_line import flag, given
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash, portable_name
from finqa.runtime.paths import Folders, check_name
from finqa.task.datasets import DATASETS

LONGEST_NAME = 64
STUDENT_FIELDS = ("load_in_4bit", "revision", "chat_template")
"""What the flags of a student may say of a model of the user's own."""
SPECIAL = ("bos_token", "eos_token", "unk_token")
"""The special tokens that a model may read; padding is never read."""
PLACES = ".places.json"
"""In the folder of a set: where its models and texts lie on this machine. A push leaves it at home."""
POSITIONAL = {"dataset": "DATASET_NAME", "model": "MODEL_ID", "given_hf_name": "HF_NAME"}


@dataclass(frozen=True)
class OwnPair:
    """Which models are compared on which texts, in place of a data set and its student."""

    base: str = flag("", metavar="MODEL")
    """Any causal language model, a folder or a Hub id, in place of the names; it takes index 0."""
    fine_tuned: str = flag("", metavar="MODEL")
    """Its fine-tuned form, a whole model or an adapter of it, a folder or a Hub id; it takes index 1."""
    text: Path = flag(Path(), metavar="FILE")
    """What both read: JSON lines with `text`, `prompt` and `completion`, or `messages`; else plain text, a document for
    each paragraph."""
    name: str = flag("", metavar="NAME", shown="<fine-tuned model>-<file>")
    """Name of the pair, by which every later script finds what was recorded."""
    max_tokens: int | None = flag(None, metavar="TOKENS", shown="4096, or what the model reads")
    """Tokens of a document; a longer one is cut there."""

    def __post_init__(self) -> None:
        flags = {"--base": self.base, "--fine-tuned": self.fine_tuned, "--text": self.text.name}
        if missing := [name for name, value in flags.items() if not value]:
            raise UserError(f"two models of your own are given by {', '.join(flags)}; add {' and '.join(missing)}")
        check_name("--name", self.name)
        if self.name in DATASETS:
            raise UserError(f"--name {self.name} is that of a data set; choose another")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UserError(f"--max-tokens must be at least 2, not {self.max_tokens}")

    def student(self, **known: Any) -> StudentRun:
        """The base model, with what flags say of it, as what the stages know as a student."""
        settings = settings_for(self.base)
        if known.get("chat_template"):
            settings = replace(settings, chat_template=read_template(known["chat_template"]))
        return StudentRun(self.name, self.base, settings, **known)


def pair_from_args(args: argparse.Namespace) -> OwnPair | None:
    """The pair that flags give, local models by their whole paths; None where they give none."""
    if not (asked := given(OwnPair, args)):
        return None
    pair = OwnPair(**asked)
    base, fine_tuned = (str(local_model(name) or name) for name in (pair.base, pair.fine_tuned))
    default = re.sub(r"[^\w.+=@,-]", "-", f"{Path(fine_tuned).name}-{pair.text.stem}")
    name = pair.name or default[:LONGEST_NAME]
    return replace(pair, base=base, fine_tuned=fine_tuned, text=pair.text.expanduser().resolve(), name=name)


def find_model(name: str) -> Path:
    """Folder of a whole model or an adapter, which may be on the Hub; UserError where it holds neither."""
    folder = local_model(name) or hub.fetch_model(name, None, MODEL_FILES)
    if is_adapter(folder):
        check_plain(folder)
    else:
        check_model_folder(folder)
    return folder


def check_there(model: str) -> None:
    """UserError where a model was recorded from a local folder that this machine does not have (`_placed`)."""
    place = Path(model)
    if place.is_absolute() and not place.exists():
        raise UserError(
            f"the model {place.name}, which was read from a local folder, is not where it was read, nor in {place}; "
            "put the folder, or a link to it, there"
        )


def check_unchanged(folder: Path | str, recorded: Mapping[str, Any], hashed: str) -> None:
    """UserError where the weights in a folder are not those that a set was recorded from."""
    if hashed in recorded and weights_hash(folder) != recorded[hashed]:
        raise UserError(
            f"{folder} has changed since the activations were recorded; put the weights that were read back there, or "
            "collect the activations again"
        )


def base_tokenizer(student: StudentRun, recorded: Mapping[str, Any]) -> Any:
    """The tokenizer of a set's base model; UserError where the model that was recorded is not here."""
    check_there(student.model)
    folder = resolve_model(student.model, student.revision)
    check_unchanged(folder, recorded, "base_hash")
    return _tokenizer(folder)


def one_tokenizer(student: StudentRun, base: str, fine_tuned: Path, chats: bool) -> tuple[Any, Any | None, str]:
    """The base model's tokenizer; the fine-tuned one's where it brings one; and how their special tokens differ.

    Both get the chat template of either, or the one that is given. UserError where the vocabularies differ, and where
    `chats` are to be read and there is not one template.
    """
    ours = _tokenizer(base)
    brings_one = any((fine_tuned / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    theirs = _tokenizer(str(fine_tuned)) if brings_one else None
    given_one, templates = student.settings.chat_template, [t.chat_template for t in (ours, theirs) if t is not None]
    own = list(dict.fromkeys(template for template in templates if template is not None))
    specials = ""
    if theirs is not None:
        _check_vocabularies(ours.get_vocab(), theirs.get_vocab(), student.model, fine_tuned)
        names = [name for name in SPECIAL if getattr(ours, name) != getattr(theirs, name)]
        said = "; ".join(f"{name} {getattr(ours, name)!r} and {getattr(theirs, name)!r}" for name in names)
        specials = f" (special tokens: {said})" if said else ""
    of_both = f"{student.model} and {fine_tuned}"
    if len(own) > 1 and not student.chat_template:
        if chats:
            raise UserError(f"the chat templates of {of_both} differ; give one: --chat-template FILE")
        print(f"the chat templates of {of_both} differ; these texts need none")
    template = given_one if student.chat_template else next(iter(own), given_one)
    if chats and template is None:
        raise UserError(f"{of_both} have no chat template, which messages need; give one: --chat-template FILE")
    for tokenizer in (ours, theirs):
        if tokenizer is not None:
            tokenizer.chat_template = template
    return ours, theirs, specials


def _tokenizer(folder: str) -> Any:
    try:
        return tokenizer_in(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None


def _check_vocabularies(ours: dict[str, int], theirs: dict[str, int], base: str, fine_tuned: Path) -> None:
    """UserError that says in what two vocabularies differ."""
    if ours == theirs:
        return
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    parts = [f"{len(ours):,} tokens and {len(theirs):,}"] if len(ours) != len(theirs) else []
    for only, where in ((ours.keys() - theirs.keys(), "first"), (theirs.keys() - ours.keys(), "second")):
        if only:
            parts.append(f"{len(only):,} in the {where} alone, such as {min(only)!r}")
    if moved:
        first = min(moved, key=lambda token: ours[token])
        parts.append(f"{len(moved):,} of other ids, such as {first!r}: {ours[first]} and {theirs[first]}")
    raise UserError(
        f"the tokenizers of {base} and {fine_tuned} differ ({'; '.join(parts)}), so no token of one is that of the "
        "other; give two models with one tokenizer"
    )


def refuse_others(args: argparse.Namespace, kinds: Sequence[type], allowed: Collection[str], why: str) -> None:
    """UserError where flags of these configs are given that have no meaning here."""
    asked = (name for kind in (*kinds, StudentSettings) for name in given(kind, args) if name not in allowed)
    if said := [POSITIONAL.get(name, f"--{name.replace('_', '-')}") for name in asked]:
        raise UserError(f"{why}; leave out {', '.join(said)}")


def portable(pair: OwnPair, student: StudentRun) -> tuple[dict[str, Any], dict[str, str]]:
    """What a set records of its pair, by names that mean something elsewhere; and where on this machine that lies,
    which goes into the set's PLACES."""
    models, of_student = asdict(pair), {name: getattr(student, name) for name in STUDENT_FIELDS}
    places = {name: str(models[name]) for name in ("base", "fine_tuned", "text") if Path(models[name]).is_absolute()}
    models |= {name: portable_name(place) for name, place in places.items()}
    if models["base"] == models["fine_tuned"]:  # as two checkpoints of one step
        models |= {name: "-".join(Path(places[name]).parts[-2:]) for name in ("base", "fine_tuned") if name in places}
    if student.chat_template:
        places["chat_template"] = str(student.chat_template.expanduser().resolve())
        of_student["chat_template"] = student.chat_template.name
    recorded = {"models": models, "student": of_student, "local": sorted(places), "text_sha256": file_hash(pair.text)}
    return recorded, places


def _placed(recorded: dict[str, Any], folder: Path, folders: Folders) -> dict[str, Any]:
    """What a set in `folder` records, its models and texts by where they lie on this machine: where they were read, or
    where that is not known or nothing is there any more, below D/models/ by their names, a Hub id by itself."""
    models, student = (dict(recorded["pair"][part]) for part in ("models", "student"))
    try:
        known = json.loads((folder / PLACES).read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    absolute = [name for name in models if Path(str(models[name])).is_absolute()]  # of a set that has no `local`
    for name in recorded["pair"].get("local", absolute):
        of = student if name == "chat_template" else models
        place, called = Path(str(known.get(name, of[name]))), of[name]
        called = portable_name(called) if Path(called).is_absolute() else called
        there = place.is_absolute() and place.exists()
        shipped = local_model(POCKET) if called == POCKET else None
        below = shipped or folders.data.resolve() / "models" / called
        of[name] = str(place) if there else called if "/" in called else str(below)
    template = student["chat_template"]
    student["chat_template"] = Path(template) if template and Path(template).exists() else None
    return recorded | {"model": models["base"], "pair": recorded["pair"] | {"models": models, "student": student}}


def recorded_pairs(name: str, folders: Folders) -> dict[str, dict[str, Any]]:
    """What the sets record, by their names, that are called `name`, or were made of the pair of that name; none have
    the name of a data set.

    From their local folders; by its whole name a set is also found on the Hub.
    """
    if name in DATASETS:
        return {}
    paths = sorted(folders.activations("x").parent.glob("*/config.json"))
    found = _of_pairs(name, {path.parent.name: path for path in paths}, folders)
    account = (os.environ.get("HF_NAME") or hub.logged_in_name()) if not found and "-layer" in name else None
    for kind in hub.ACTIVATION_KINDS if account else ():
        fetched = hub.fetch_folder(f"{account}/{hub.repository_name(name)}", None, ["config.json"], kind)
        found = found or (_of_pairs(name, {name: fetched / "config.json"}, folders) if fetched else {})
    return found


def _of_pairs(name: str, configs: Mapping[str, Path], folders: Folders) -> dict[str, dict[str, Any]]:
    found = {}
    for folder, path in configs.items():
        try:
            recorded = json.loads(path.read_text())["recorded"]
            if name in (folder, recorded["pair"]["models"]["name"]):
                found[folder] = _placed(recorded, path.parent, folders)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or of a data set
    return found
