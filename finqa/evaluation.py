"""Score a student: prompts -> replies -> code -> answers -> verdicts, written beside their figures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finqa import answers, datasets, programs, prompts
from finqa.errors import UserError
from finqa.generation import Generate, GenerationConfig, Reply
from finqa.manifest import file_hash, write_json, write_manifest
from finqa.metrics import metrics
from finqa.paths import Folders
from finqa.predictions import Prediction, write_predictions
from finqa.prompts import EvalType
from finqa.records import TeacherRow, read_questions, read_teacher_rows
from finqa.report import write_report
from finqa.sandbox import Run, Sandbox, SandboxLimits
from finqa.serving import Model, Served, served_models
from finqa.students import StudentRun, find_adapter, load_tokenizer, prompt_ids, resolve_model
from finqa.weights import weights_hash

MODEL_OF_TYPE: dict[EvalType, Model] = {"fine-tuned": "fine-tuned", "zero-shot": "base", "few-shot": "base"}


@dataclass(frozen=True)
class EvalRow:
    """A question to score."""

    id: str
    prompt: str
    """The fine-tuning prompt; the other prompts are made from it."""
    expected: str
    program: str
    teacher_solved: bool | None
    family: str = ""
    family_kind: str = ""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how."""

    splits: tuple[str, ...]
    eval_types: tuple[EvalType, ...]
    generation: GenerationConfig
    max_rows: int | None = None
    """The first so many rows of a split only."""
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)


def evaluate(run: StudentRun, config: EvaluationConfig, folders: Folders) -> None:
    """Evaluate the student on every split in every eval type, starting as few engines as possible.

    Writes metrics.json, predictions.jsonl and run.json for each, and the comparison of all that is there.
    """
    data = datasets.dataset(run.dataset)
    rows = {split: read_rows(folders, data, split, config.max_rows) for split in config.splits}
    wanted: list[Model] = [MODEL_OF_TYPE[eval_type] for eval_type in config.eval_types]
    student = find_adapter(run, folders) if "fine-tuned" in wanted else None
    tokenizer = load_tokenizer(run.model, run.revision)
    with Sandbox(config.sandbox) as sandbox:
        for served in served_models(run, student, wanted, config.generation):
            hashes = _hashes(run, student if served.model == "fine-tuned" else None)
            for split, (path, split_rows) in rows.items():
                for eval_type in config.eval_types:
                    if MODEL_OF_TYPE[eval_type] != served.model:
                        continue
                    chats = [prompts.messages(r.prompt, eval_type, data.worked_examples) for r in split_rows]
                    ids = [prompt_ids(tokenizer, chat) for chat in chats]
                    folder = folders.evaluation(run.dataset, run.model_id, split, eval_type)
                    predictions, seconds = score(split_rows, ids, served.generate, sandbox)
                    found = write_results(folder, predictions, seconds)
                    _write_manifest(folder, run, config, served, hashes, path, sandbox, seconds)
                    print(summary(f"{eval_type} on {split}", found), flush=True)
    write_report(folders.results / run.dataset / run.model_id)


def read_rows(
    folders: Folders, data: datasets.Dataset, split: str, max_rows: int | None = None
) -> tuple[Path, list[EvalRow]]:
    """Every row of a split that has a label, and the file it is from: the teacher's, else the clean, else the filtered.

    Raises UserError where the split has none of them, or no rows.
    """
    generated, clean, filtered = (
        folders.generated(data.name, split),
        folders.clean(data.name, split),
        folders.filtered(data.name, split),
    )
    if generated.exists():
        path, rows = generated, [_from_teacher(row, data) for row in read_teacher_rows(generated)]
    elif clean.exists():
        path = clean
        rows = [
            EvalRow(q.id, prompts.training_prompt(q), q.answer, q.program, None, q.family, q.family_kind)
            for q in read_questions(clean)
        ]
    elif filtered.exists():
        print(
            f"{split}: only the rows that the teacher solved are here ({filtered}); all are scored better", flush=True
        )
        path, rows = filtered, [_from_teacher(row, data) for row in read_teacher_rows(filtered)]
    else:
        raise UserError(
            f"no rows of {data.name} {split} to evaluate on: neither {generated} nor {clean}; make them with: "
            f"python -m preprocessing.preprocess_finqa --dataset {data.name}"
        )
    rows = [row for row in rows if row.expected][:max_rows]
    if not rows:
        raise UserError(f"{path} has no row with a label")
    numbered = [EvalRow(**{**asdict(row), "id": row.id or f"row-{n}"}) for n, row in enumerate(rows)]
    return path, numbered


def _from_teacher(row: TeacherRow, data: datasets.Dataset) -> EvalRow:
    solved = answers.match(row.actual_answer, row.expected_answer, data.answer_rule)
    return EvalRow(row.id, row.prompt, row.expected_answer, row.program, solved, row.family, row.family_kind)


def score(
    rows: Sequence[EvalRow], prompt_tokens: Sequence[list[int]], generate: Generate, sandbox: Sandbox
) -> tuple[list[Prediction], dict[str, float]]:
    """Predictions in the order of the rows, and the seconds that generating and running took."""
    started = time.monotonic()
    replies = generate(prompt_tokens)
    generated = time.monotonic()
    codes = [prompts.extract_code(reply.text) for reply in replies]
    runs = sandbox.run_many(codes)
    done = time.monotonic()
    predictions = [
        _prediction(row, ids, reply, code, run)
        for row, ids, reply, code, run in zip(rows, prompt_tokens, replies, codes, runs, strict=True)
    ]
    return predictions, {"generate": round(generated - started, 2), "run": round(done - generated, 2)}


def _prediction(row: EvalRow, ids: list[int], reply: Reply, code: str, run: Run) -> Prediction:
    unasked = reply.finish_reason == "prompt_too_long"
    return Prediction(
        id=row.id,
        prompt_hash=hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest(),
        reply=reply.text,
        code=code,
        answer=run.answer,
        expected=row.expected,
        correct={rule: answers.match(run.answer, row.expected, rule) for rule in answers.RULES},
        error_kind="prompt-too-long" if unasked else run.error_kind,
        error_message=run.message,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_new_tokens=reply.n_new_tokens,
        finish_reason=reply.finish_reason,
        program_steps=_steps(row.program),
        teacher_solved=row.teacher_solved,
        family=row.family,
        family_kind=row.family_kind,
    )


def _steps(program: str) -> int | None:
    try:
        return len(programs.parse(program)) if program else None
    except programs.ProgramError:
        return None


def write_results(folder: Path, predictions: Sequence[Prediction], seconds: dict[str, float]) -> dict[str, Any]:
    """Write predictions.jsonl and metrics.json; returns the metrics."""
    found = metrics(predictions) | {"seconds": seconds}
    write_predictions(folder, predictions)
    write_json(folder / "metrics.json", found)
    return found


def summary(what: str, found: dict[str, Any]) -> str:
    """One line: accuracy under each rule, the share that runs, and how long it took."""
    low, high = found["accuracy_interval"]
    return (
        f"{what}: accuracy {found['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {found['n']} (relaxed "
        f"{found['accuracy_relaxed']:.1%}, reported rule {found['accuracy_reported_rule']:.1%}), "
        f"{found['share_runs']:.1%} run, {found['seconds']['generate']:.0f} s to generate"
    )


def _hashes(run: StudentRun, student: Path | None) -> dict[str, str | None]:
    return {
        "base_hash": weights_hash(resolve_model(run.model, run.revision)),
        "student_hash": weights_hash(student) if student else None,
    }


def _write_manifest(
    folder: Path,
    run: StudentRun,
    config: EvaluationConfig,
    served: Served,
    hashes: dict[str, str | None],
    data_file: Path,
    sandbox: Sandbox,
    seconds: dict[str, float],
) -> None:
    write_manifest(
        folder / "run.json",
        {"student": asdict(run), "evaluation": asdict(config)},
        model_id=run.model_id,
        served=served.facts,
        data={str(data_file): file_hash(data_file)},
        sandbox_protections=sandbox.protections,
        seconds=seconds,
        **hashes,
    )
