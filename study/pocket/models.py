"""The study's questions and models: rows made, students fine-tuned, each scored family by family.

Every model is made and scored by main.py in a process of its own. A fine-tune that is there with the same rows, base
and settings, in the study's folder or in the data folder that was given (where `make demo` leaves one), is not made
again.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finqa.models.settings import settings_for
from finqa.models.students import StudentRun, is_student, resolve_model
from finqa.models.weights import weights_hash
from finqa.runtime.paths import SHIPPED_DATA, Folders, write_atomically
from finqa.training.fine_tuning import CONFIG_FILE
from finqa.training.rows import read_training_rows, rows_hash
from mini.families import BY_NAME
from mini.make_finqa_mini import SEED, SIZES, as_json, make_minimal_pairs, make_split
from study.pocket.plan import DATASET, SHIPPED_KINDS, STUDENT, Model
from study.work import Work, folder_flags, in_parallel, read_json, run, step

OTHER_SPLIT = "other"
"""Name, in the ids, of the questions of families that FinQA-mini lacks."""
FEW = 200
"""Questions that two cores answer without vLLM before its engine has started."""


def student_of(model: Model) -> StudentRun:
    """The run whose folder the model's adapter is in."""
    return StudentRun(DATASET, STUDENT, settings_for(STUDENT), run_name=model.run_name or "")


def make_rows(work: Work) -> None:
    """The test questions of all families, and each fine-tune's training questions, as filtered rows."""
    for kinds in work.plan.kinds_of_rows():
        folders = work.rows_folders(kinds)
        wanted = {"train": as_json(_training_questions(work, kinds))}
        if folders == work.folders:
            wanted["test"] = as_json(_test_questions(work))
        raw = {split: folders.data / DATASET / f"{split}.json" for split in wanted}
        same = all(path.exists() and path.read_text() == wanted[split] for split, path in raw.items())
        if same and all(folders.filtered(DATASET, split).exists() for split in wanted):
            continue
        with step(f"questions of {kinds.replace(',', ' and ')} families") as say:
            shutil.rmtree(folders.data / "clean_with_code", ignore_errors=True)
            for split, path in raw.items():
                write_atomically(path, wanted[split])
                _prepare(work, folders, split)
            say(", ".join(f"{_n_rows(folders, split)} {split}" for split in raw) + " rows")


def _training_questions(work: Work, kinds: str) -> list[dict[str, Any]]:
    """The shipped ones, or as many of other kinds of family; in a rehearsal enough for a sham of the first of them."""
    shipped = kinds == SHIPPED_KINDS
    records = _shipped("train") if shipped else make_split("train", SIZES["train"], _kinds(kinds), SEED)
    return records[: 2 * work.plan.max_rows] if work.plan.max_rows else records


def _test_questions(work: Work) -> list[dict[str, Any]]:
    other = make_split(OTHER_SPLIT, work.plan.other_questions, ("other",), SEED)
    pairs = make_minimal_pairs(work.plan.pair_pages, SEED)
    return [*_shipped("test")[: work.plan.test_questions], *other, *pairs]


def _shipped(split: str) -> list[dict[str, Any]]:
    return json.loads((SHIPPED_DATA / DATASET / f"{split}.json").read_text())


def _kinds(names: str) -> tuple[Any, ...]:
    return tuple(names.split(","))


def _prepare(work: Work, folders: Folders, split: str) -> None:
    flags = f"--dataset {DATASET} --split {split} --data-dir {shlex.quote(str(folders.data))}"
    for stage in (
        "preprocess_finqa",
        "process_finqa_code_generation --teacher program",
        "filter_valid_answers",
    ):
        run(work, f"{stage.split()[0]} {split}", f"-m preprocessing.{stage} {flags}")


def _n_rows(folders: Folders, split: str) -> int:
    from finqa.task.records import read_teacher_rows

    return len(read_teacher_rows(folders.filtered(DATASET, split)))


def make_models(work: Work) -> None:
    """Fine-tune what is missing, as many at once as there are cores: one with two threads is not twice as fast."""
    missing = [model for model in work.plan.models if model.run_name is not None and not is_made(work, model)]
    if missing:
        in_parallel(work, "fine-tune", _make, missing, lambda made: made["said"])


def adapter(work: Work, model: Model) -> Path:
    """Folder of a fine-tune's adapter."""
    return work.folders.model(DATASET, student_of(model).model_id)


def is_made(work: Work, model: Model) -> bool:
    return _holds(adapter(work, model), _identity(work, model))


def _make(work: Work, model: Model) -> dict[str, Any]:
    started = time.perf_counter()
    said = _fine_tuned(work, model)
    return {"seconds": time.perf_counter() - started, "said": said}


def _fine_tuned(work: Work, model: Model) -> str:
    own, place = adapter(work, model), work.rows_folders(model.kinds)
    identity = _identity(work, model)
    model_id = student_of(model).model_id
    for folders in (work.given, place):
        if _holds(folders.model(DATASET, model_id), identity):
            _copy(folders.model(DATASET, model_id), own)
            return f"taken from {folders.model(DATASET, model_id)}"
    words = [f"main.py {DATASET} {STUDENT} -P -NE --no-push --seed {model.seed} --families {model.families}"]
    words += [f"--run-name {model.run_name}"] if model.run_name else []
    words += [f"--max-rows {work.plan.max_rows}"] if work.plan.max_rows else []
    run(work, f"fine-tune {model.name}", " ".join([*words, folder_flags(place)]))
    made = place.model(DATASET, model_id)
    if made != own:
        _copy(made, own)
    losses = [record["loss"] for record in _log(own) if "loss" in record]
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def _copy(source: Path, target: Path) -> None:
    """The finished student without its checkpoints; whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("checkpoint-*", "wandb"))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _identity(work: Work, model: Model) -> dict[str, Any]:
    """What a training_config.json must say."""
    rows = work.rows_folders(model.kinds).filtered(DATASET, "train")
    with contextlib.redirect_stdout(io.StringIO()):  # training says how many rows it repeats
        learnt = read_training_rows(rows, model.families, work.plan.max_rows)
    settings = asdict(student_of(model).settings)
    return {
        **{name: value for name, value in settings.items() if name not in ("max_new_tokens", "eval_batch_size")},
        "seed": model.seed,
        "families": model.families,
        "base_hash": weights_hash(resolve_model(STUDENT)),
        "rows_hash": rows_hash(learnt),
    }


def _holds(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds a finished student with these settings."""
    config = folder / CONFIG_FILE
    if not (is_student(folder) and (folder / "run.json").exists() and config.exists()):
        return False
    found = read_json(config)
    return all(found.get(name) == (list(v) if isinstance(v, tuple) else v) for name, v in identity.items())


def score_models(work: Work) -> None:
    """Evaluate every model once on the study's test split: the base zero-shot, the others as they were fine-tuned."""
    missing = [model for model in work.plan.models if not evaluation(work, model).exists()]
    in_parallel(work, "accuracy", _score, missing, lambda found: found["shown"])


def _score(work: Work, model: Model) -> dict[str, Any]:
    started = time.perf_counter()
    words = [f"main.py {DATASET} {STUDENT} -P -NT -T --no-push -ET {_eval_type(model)}"]
    words += ["--VLLM"] if find_spec("vllm") and work.plan.documents > FEW else []
    words += [f"--run-name {model.run_name}"] if model.run_name else []
    run(work, f"accuracy {model.name}", " ".join([*words, folder_flags(work.folders)]))
    kinds = read_json(evaluation(work, model))["accuracy_by_family_kind"]
    shown = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items())
    return {"seconds": time.perf_counter() - started, "shown": shown}


def _eval_type(model: Model) -> str:
    return "zero-shot" if model.run_name is None else "fine-tuned"


def evaluation(work: Work, model: Model) -> Path:
    """metrics.json of a model; the base's is in the folder of the fine-tune without a run name."""
    folder = work.folders.evaluation(DATASET, student_of(model).model_id, "test", _eval_type(model))
    return folder / "metrics.json"


def accuracy_rows(work: Work) -> list[dict[str, Any]]:
    """One row a model and family, then one a model and kind of family."""
    rows = []
    for model in work.plan.models:
        metrics = read_json(evaluation(work, model))
        for family, group in metrics["by_family"].items():
            rows.append(_accuracy_row(model, BY_NAME[family].kind, family, group))
        for kind, group in metrics["by_family_kind"].items():
            rows.append(_accuracy_row(model, kind, "all", group))
    return rows


def _accuracy_row(model: Model, kind: str, family: str, group: dict[str, Any]) -> dict[str, Any]:
    return {"model": model.name, "kind": kind, "family": family, "n": group["n"], "accuracy": group["accuracy"]}
