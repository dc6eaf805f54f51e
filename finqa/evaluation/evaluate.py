"""Score a student: prompts -> replies -> code -> answers -> verdicts, written beside their figures."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.evaluation.engines.serving import Model, Served, served_models
from finqa.evaluation.generation import GenerationConfig
from finqa.evaluation.judging import judge
from finqa.evaluation.metrics import HEADLINES, METRIC_OF_RULE, metrics
from finqa.evaluation.predictions import Prediction, prompt_hash, write_predictions
from finqa.evaluation.reply_journal import ReplyJournal, Slot, slots_of
from finqa.evaluation.report import write_report
from finqa.evaluation.rows import EvalRow, read_rows
from finqa.models.students import (
    StudentRun,
    default_device,
    find_adapter,
    prompt_ids,
    quiet_libraries,
    resolve_model,
    tokenizer_of,
)
from finqa.models.templates import template_facts
from finqa.models.weights import weights_hash
from finqa.runtime.command_line import flag
from finqa.runtime.errors import UserError
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import file_hash, write_json, write_manifest
from finqa.runtime.memory.free import memory_used
from finqa.runtime.memory.needs import read_config
from finqa.runtime.memory.plan import amount, plan_evaluation
from finqa.runtime.paths import Folders
from finqa.runtime.progress import Progress, say
from finqa.sandbox.running import Sandbox, SandboxLimits
from finqa.task import datasets, prompts
from finqa.task.answers import Rule
from finqa.task.prompts import EvalType

if TYPE_CHECKING:
    from finqa.evaluation.engines.caches import Extent

MODEL_OF_TYPE: dict[EvalType, Model] = {"fine-tuned": "fine-tuned", "zero-shot": "base", "few-shot": "base"}


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how."""

    splits: tuple[str, ...]
    eval_types: tuple[EvalType, ...]
    generation: GenerationConfig
    max_rows: int | None = flag(None, "--limit", least=1, metavar="ROWS")
    """Evaluate on the first so many rows of a split only."""
    instruction: str | None = flag(None, shown="the data set's own")
    """What a model that was not fine-tuned is told before the prompt."""
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)

    def __post_init__(self) -> None:
        if self.instruction and re.search("[\ud800-\udfff]", self.instruction):  # bytes that are no character
            raise UserError("--instruction is no text in UTF-8")
        if self.instruction is not None and set(self.eval_types) == {"fine-tuned"}:
            raise UserError(
                "--instruction changes nothing for a fine-tuned model, which is asked as it was trained; give "
                "--eval-type zero-shot, few-shot or all"
            )


@dataclass
class Task:
    """One eval type on one split: its rows, their prompts, and the replies there are."""

    name: str
    model: Model
    data_file: Path
    rows: list[EvalRow]
    prompt_tokens: list[list[int]]
    folder: Path
    hashes: dict[str, str | None]
    template: dict[str, str]
    """`template_facts`."""
    samples: int
    journal: ReplyJournal

    @property
    def slots(self) -> list[Slot]:
        """Slot of every reply: sample s of row r has the place r * samples + s."""
        return slots_of(map(prompt_hash, self.prompt_tokens), self.samples)

    @property
    def complete(self) -> bool:
        return all(slot in self.journal.replies for slot in self.slots)


def evaluate(
    run: StudentRun,
    config: EvaluationConfig,
    folders: Folders,
    on_fine_tuned: Callable[[Served], None] | None = None,
) -> None:
    """Evaluate the student on every split in every eval type, starting as few engines as possible.

    Replies that are there under the same settings and weights are not generated again; a model whose replies are all
    there is not loaded. Writes metrics.json, predictions.jsonl and run.json for each, and the comparison of all that
    is there. `on_fine_tuned` is called with the fine-tuned model, while it can still reply.
    """
    wanted: list[Model] = [MODEL_OF_TYPE[eval_type] for eval_type in config.eval_types]
    student = find_adapter(run, folders) if "fine-tuned" in wanted else None
    tasks = _tasks(run, config, folders, student)
    missing = [task for task in tasks if not task.complete]
    report = folders.results / run.dataset / run.model_id
    with Sandbox(config.sandbox) as sandbox, only_run_on(*(task.folder for task in tasks)):
        for task in tasks:
            if task.complete:
                _finish(task, run, config, sandbox)
        if missing:
            if not config.generation.vllm:
                model = read_config(run.model, run.revision)
                plan_evaluation(run, config.generation, extents(missing, config.generation, model))
            for served in served_models(run, student, [task.model for task in missing], config.generation):
                for task in missing:
                    if task.model == served.model:
                        collect_replies(task, served)
                        _finish(task, run, config, sandbox)
                if on_fine_tuned and served.model == "fine-tuned":
                    write_report(report)  # whatever becomes of the call
                    on_fine_tuned(served)
    write_report(report)


def extents(tasks: Iterable[Task], config: GenerationConfig, model: Any) -> Iterator[Extent]:
    """Of each batch that Hugging Face's generation makes of the tasks' prompts; `model` is the model's config."""
    from finqa.evaluation.engines.caches import extent
    from finqa.evaluation.engines.hugging_face_engine import batches_of

    for task in tasks:
        prompts = [ids for ids in task.prompt_tokens for _ in range(task.samples)]
        yield from (extent([prompts[i] for i in places], model) for places in batches_of(prompts, config, model))


def _tasks(run: StudentRun, config: EvaluationConfig, folders: Folders, student: Path | None) -> list[Task]:
    data = datasets.dataset(run.dataset)
    instruction = data.instruction if config.instruction is None else config.instruction
    quiet_libraries()
    tokenizer = tokenizer_of(run, student or folders.model(run.dataset, run.model_id))
    base_hash = weights_hash(resolve_model(run.model, run.revision))
    student_hash = weights_hash(student) if student else None
    tasks = []
    for split in config.splits:
        path, rows = read_rows(folders, data, split, config.max_rows)
        for eval_type in config.eval_types:
            model = MODEL_OF_TYPE[eval_type]
            chats = [prompts.messages(r.prompt, eval_type, data.worked_examples, instruction) for r in rows]
            folder = folders.evaluation(run.dataset, run.model_id, split, eval_type + config.generation.folder_suffix)
            hashes = {"base_hash": base_hash, "student_hash": student_hash if model == "fine-tuned" else None}
            tasks.append(
                Task(
                    name=f"{folder.name} on {split}",
                    model=model,
                    data_file=path,
                    rows=rows,
                    prompt_tokens=[prompt_ids(tokenizer, chat) for chat in chats],
                    folder=folder,
                    hashes=hashes,
                    template=template_facts(tokenizer),
                    samples=config.generation.samples,
                    journal=ReplyJournal(
                        folder, reply_settings(run, config.generation, eval_type, instruction) | hashes
                    ),
                )
            )
    return tasks


def reply_settings(run: StudentRun, config: GenerationConfig, eval_type: EvalType, instruction: str) -> dict[str, Any]:
    """All that shapes a reply beside the question and the weights: replies under other settings are never mixed in."""
    settings: dict[str, Any] = {
        "eval_type": eval_type,
        "engine": "vllm" if config.vllm else "transformers",
        "device": default_device(),
        "load_in_4bit": run.load_in_4bit,
        "max_new_tokens": config.max_new_tokens,
        "max_model_len": config.max_model_len,
        "stop": list(config.stop),
        "temperature": config.temperature,
        "samples": config.samples,
        "seed": config.seed if config.temperature else None,
        "batch_size": None if config.vllm else config.batch_size,
        "tensor_parallel": config.tensor_parallel,
    }
    return settings if eval_type == "fine-tuned" else settings | {"instruction": instruction}


def collect_replies(task: Task, served: Served) -> None:
    """Have the missing replies of a task written, each to the journal as it finishes."""
    asked = [ids for ids in task.prompt_tokens for _ in range(task.samples)]
    slots = task.slots
    done = {place for place, slot in enumerate(slots) if slot in task.journal.replies}
    if done:
        say(f"{task.name}: going on, {len(done)} of {len(asked)} replies are there")
    else:
        say(f"{task.name}: {len(asked)} replies to write")
    task.journal.begin(served.facts)
    progress = Progress(f"{task.name}: replies", len(asked), done=len(done))
    try:
        for place, reply in served.generate(asked, done):
            task.journal.add(slots[place], reply)
            progress.advance()
    finally:
        progress.close()
        task.journal.end()
    if served.facts["engine"] == "transformers":
        say(f"{task.name}: written in {amount(memory_used())} of memory")


def _finish(task: Task, run: StudentRun, config: EvaluationConfig, sandbox: Sandbox) -> None:
    """Run and judge the replies of a task, and write its files; run.json last, which makes them valid."""
    slots = task.slots
    replies = [task.journal.replies[slot] for slot in slots]
    started = time.monotonic()
    predictions = judge(task.rows, task.prompt_tokens, replies, sandbox, sampled=config.generation.temperature > 0)
    seconds = {"generate": round(task.journal.seconds, 2), "run": round(time.monotonic() - started, 2)}
    earlier = task.journal.found
    task.journal.secure()
    (task.folder / "run.json").unlink(missing_ok=True)
    found = write_results(task.folder, predictions, seconds)
    write_manifest(
        task.folder / "run.json",
        {"student": asdict(run), "evaluation": asdict(config)},
        model_id=run.model_id,
        generation_key=task.journal.key,
        generation=task.journal.settings,
        served=task.journal.served,
        data={task.data_file.name: file_hash(task.data_file)},
        sandbox_protections=sandbox.protections,
        seconds=seconds,
        **task.template,
        **task.hashes,
        **({"adapter_check": earlier["adapter_check"]} if "adapter_check" in earlier else {}),
    )
    task.journal.hand_over(slots)
    say(summary(task.name, found))


def write_results(folder: Path, predictions: Sequence[Prediction], seconds: dict[str, float]) -> dict[str, Any]:
    """Write predictions.jsonl and metrics.json; returns the metrics."""
    found = metrics(predictions) | {"seconds": seconds}
    write_predictions(folder, predictions)
    write_json(folder / "metrics.json", found)
    return found


def summary(what: str, found: dict[str, Any]) -> str:
    """One line: accuracy under each rule and without disputed labels, the share that runs, and how long it took."""

    def accuracy(rule: Rule) -> str:
        name = METRIC_OF_RULE[rule]
        low, high = found[f"{name}_interval"]
        return f"{found[name]:.1%} [{low:.1%}, {high:.1%}] {rule}"

    more = [f"reported rule {found['accuracy_reported_rule']:.1%}"]
    if disputed := found["n"] - found.get("n_undisputed", found["n"]):
        shares = " and ".join(f"{found[f'{METRIC_OF_RULE[rule]}_undisputed']:.1%}" for rule in HEADLINES)
        more.append(f"without {disputed} disputed labels {shares}")
    return (
        f"{what}: accuracy {', '.join(map(accuracy, HEADLINES))}, of {found['n']} ({'; '.join(more)}), "
        f"{found['share_runs']:.1%} run, {found['seconds']['generate']:.0f} s to generate"
    )
