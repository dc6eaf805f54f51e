"""Fine-tune a student: the transformers Trainer and peft, with the loss on the completion alone.

One recipe on GPU and CPU: base weights in bf16 and frozen, the adapter in fp32, products in bf16 by autocast. A CPU
without bf16 products trains in fp32.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.models.adapters import check_tied, write_canonical
from finqa.models.settings import is_known
from finqa.models.students import (
    StudentRun,
    default_device,
    is_student,
    quiet_libraries,
    resolve_model,
    tokenizer_of,
)
from finqa.models.templates import template_facts
from finqa.models.weights import weights_hash
from finqa.runtime import parallel
from finqa.runtime.command_line import check_bounds, flag
from finqa.runtime.errors import UserError
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import file_hash, without_folders, write_json, write_manifest
from finqa.runtime.memory.free import memory_used
from finqa.runtime.memory.plan import plan_training
from finqa.runtime.parallel import multiplies_bf16
from finqa.runtime.paths import Folders, follow_umask, write_atomically
from finqa.runtime.tracking import wandb_run
from finqa.training.checkpoints import UNFINISHED, drop_damaged, last_checkpoint, told_when_full
from finqa.training.figure import draw_training
from finqa.training.packing import packed_collator
from finqa.training.rows import Families, SharedRows, collator, read_training_rows, rows_hash, tokenised
from finqa.training.trainable import (
    Speed,
    check_trainable,
    compiled_before,
    is_packed,
    keep_compiled,
    made_trainable,
    sent_bytes,
    trainable,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from finqa.training.completion_trainer import CompletionTrainer

CHECKPOINTS_KEPT = 2
CHECKPOINTS_PER_RUN = 10
CONFIG_FILE = "training_config.json"
LOG_FILE = "training_log.jsonl"


@dataclass(frozen=True)
class TrainingConfig:
    """What shapes a fine-tuning run beside the student's own settings."""

    seed: int = flag(3, "-S", "--SEED", "--seed")
    """Seed of the adapter's start, the order of the rows, and of sampled replies."""
    families: Families = flag("all")
    """Rows of which question families are learnt; `known` is the control (sham) fine-tune."""
    max_rows: int | None = flag(None, metavar="ROWS", least=1)
    """Train on the first so many rows only."""
    save_steps: int | None = flag(None, metavar="UPDATES", shown="ten checkpoints in a run", least=1)
    """Updates between two checkpoints."""
    speed: Speed = Speed()  # noqa: RUF009  frozen
    wandb_project: str = flag("finqa-lora", metavar="NAME")
    """Project on wandb."""
    wandb_entity: str | None = flag(None, metavar="NAME")
    """User or team on wandb."""

    def __post_init__(self) -> None:
        check_bounds(self)


def fine_tune(run: StudentRun, config: TrainingConfig, folders: Folders) -> Path:
    """Train the student on its data set's filtered rows, or go on where a killed run was; returns its folder.

    The folder gets the adapter (or, without peft, the model), tokenizer, checkpoints, training_log.jsonl with its
    figure, and run.json. Several processes that a launcher started train together, and the first one writes.
    Raises UserError where the folder holds a student of another configuration or base, and where memory or disk
    do not suffice.
    """
    folder = folders.model(run.dataset, run.model_id)
    with parallel.only_first_prints(), only_run_on(*([folder] if parallel.is_first() else [])), told_when_full(folder):
        _fine_tune(run, config, folders, folder)
        parallel.wait_for_all()
        parallel.part()
    return folder


def _fine_tune(run: StudentRun, config: TrainingConfig, folders: Folders, folder: Path) -> None:
    started = time.monotonic()
    device = parallel.own_device(default_device())
    check_trainable(run, config.speed, device)
    rows_path = folders.filtered(run.dataset, "train")
    quiet_libraries()
    trained, last = is_student(folder) and (folder / "run.json").exists(), last_checkpoint(folder)
    parallel.check_shared(folder, "trained" if trained else last.name if last else "no checkpoint")
    with parallel.first_goes_first():
        rows = read_training_rows(rows_path, config.families, config.max_rows)
        base = resolve_model(run.model, run.revision)
        if not is_known(run.model) and parallel.is_first():
            r, rate = run.settings.lora_r, run.settings.learning_rate
            print(f"{run.model} has no settings of its own: rank {r}, learning rate {rate:g} by its size", flush=True)
        if run.peft:
            check_tied(run.settings.lora_modules, base)
        base_hash = weights_hash(base)
        identity = _identity(run, config, base_hash, rows_hash(rows))
        tokenizer = tokenizer_of(run, folder)  # before the folder is made
        if parallel.is_first():
            _claim(folder, identity)
        if trained:
            print(f"already trained: {folder}", flush=True)
            return
        examples, too_long = tokenised(rows, tokenizer, run.settings.max_seq_length, folders.tokenised)
        n_tokens = sum(examples["n_tokens"])
        print(f"training on {len(examples)} rows, {n_tokens} tokens an epoch: {folder}", flush=True)
        bits = 16 if multiplies_bf16(device) else 32
        done = compiled_before(run, config.speed, base, folders.compiled)
        speed = plan_training(run, config.speed, examples, config.seed, folder, device, bits, done.exists())
        if parallel.is_first():
            drop_damaged(folder)

    from finqa.training.completion_trainer import TrainingLog

    pad_id: Any = tokenizer.pad_token_id
    trainer = make_trainer(run, replace(config, speed=speed), examples, pad_id, folder)
    compiles = device != "cpu" and speed.compiled
    if compiles:
        keep_compiled(done)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        print(f"going on from {checkpoint.name}", flush=True)
    tracked = wandb_run(config.wandb_project, config.wandb_entity, run.model_id, identity, folder)
    with tracked if parallel.is_first() else contextlib.nullcontext() as wandb:
        trainer.add_callback(TrainingLog(folder / LOG_FILE, trainer, wandb))
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not parallel.is_first():
        return
    if compiles:
        write_atomically(done, "")
    model: Any = trainer.model
    draw_training(folder / LOG_FILE, f"{run.model_id} on {run.dataset}")
    _save(run, model, tokenizer, folder)
    seconds = round(time.monotonic() - started, 1)
    write_manifest(
        folder / "run.json",
        identity,
        student=without_folders(run),
        speed=asdict(speed),
        processes=parallel.world_size(),
        sent_bytes_an_update=sent_bytes(model),
        base_hash=base_hash,
        weights_hash=weights_hash(folder),
        **template_facts(tokenizer),
        data={rows_path.name: file_hash(rows_path)},
        rows=len(examples),
        rows_too_long=too_long,
        tokens_an_epoch=n_tokens,
        train_loss=result.training_loss,
        updates=trainer.state.global_step,
        resumed_from=checkpoint.name if checkpoint else None,
        precision="bf16" if trainer.args.bf16 else "fp32",
        attention=model.config._attn_implementation,
        memory_gb=round(memory_used() / 1e9, 3),
        seconds=seconds,
    )
    print(f"trained in {seconds:.0f} s: {folder}", flush=True)


def make_trainer(
    run: StudentRun,
    config: TrainingConfig,
    examples: Dataset,
    pad_id: int,
    folder: Path,
    base: PreTrainedModel | None = None,
) -> CompletionTrainer:
    """The Trainer of a run, its model made ready; `base` is loaded where it is not given."""
    from transformers import PrinterCallback, set_seed

    from finqa.training.completion_trainer import CompletionTrainer, EpochOrder

    device = parallel.own_device(default_device())
    bf16 = multiplies_bf16(device)
    set_seed(config.seed)
    model = trainable(run, device, bf16, config.speed) if base is None else made_trainable(base, run, config.speed)
    packed = is_packed(model)
    alone = parallel.world_size() == 1
    trainer = CompletionTrainer(
        model=model,
        args=training_arguments(run, config, len(examples), bf16, device, folder),
        train_dataset=examples if alone else SharedRows(examples, pad_id),  # pyright: ignore[reportArgumentType]
        data_collator=packed_collator(pad_id) if packed else collator(pad_id),  # pyright: ignore[reportArgumentType]
    )
    if packed and config.speed.captured:
        trainer.capture_steps()
    trainer.remove_callback(PrinterCallback)  # transformers' own lines in the log
    trainer.add_callback(EpochOrder())
    if not parallel.is_first():
        set_seed(config.seed + parallel.rank())  # dropout of its own in every process
    return trainer


def training_arguments(
    run: StudentRun, config: TrainingConfig, n_rows: int, bf16: bool, device: str, folder: Path
) -> TrainingArguments:
    """The Trainer's arguments of a run over `n_rows` rows."""
    from transformers import TrainingArguments

    settings = run.settings
    rows_an_update = settings.batch_size * run.grad_accum * parallel.world_size()
    updates = -(-n_rows // rows_an_update) * settings.num_epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=run.grad_accum,
        num_train_epochs=settings.num_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=config.seed,
        save_steps=config.save_steps or max(1, -(-updates // CHECKPOINTS_PER_RUN)),
        save_total_limit=CHECKPOINTS_KEPT,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the GPU in every update, and hides a loss that is no number
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": True},  # else every batch's copy waits for the update before it
    )
    # A process trains on one GPU. Where it sees several, the Trainer would take as many times the rows for an update.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _identity(run: StudentRun, config: TrainingConfig, base_hash: str, data_hash: str) -> dict[str, Any]:
    """What makes a training run the one it is: two runs that differ here must not share a folder."""
    settings = asdict(run.settings)
    for name in ("max_new_tokens", "eval_batch_size"):
        settings.pop(name)
    return {
        "dataset": run.dataset,
        "peft": run.peft,
        "load_in_4bit": run.load_in_4bit,
        "grad_accum": run.grad_accum,
        **settings,
        "lora_modules": list(run.settings.lora_modules),
        "seed": config.seed,
        "fp8_base": config.speed.fp8_base,
        "families": config.families,
        "base_hash": base_hash,
        "rows_hash": data_hash,
        **({"processes": parallel.world_size()} if parallel.world_size() > 1 else {}),
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Record the configuration that a folder belongs to, or refuse a folder of another configuration.

    A model that was copied here with its run.json is recognised by that.
    """
    path, manifest = folder / CONFIG_FILE, folder / "run.json"
    if not path.exists():
        brought = json.loads(manifest.read_text()).get("config") if manifest.exists() else None
        if is_student(folder) and not brought:
            raise UserError(f"{folder} holds a model that was not trained here; choose another --run-name")
        write_json(path, brought if is_student(folder) else identity)
    before = json.loads(path.read_text())
    changed = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
    if changed:
        told = ", ".join(f"{key} {_short(before.get(key))} -> {_short(identity.get(key))}" for key in changed)
        raise UserError(
            f"{folder} was begun with another configuration ({told}); give this run a --run-name of its own, "
            "or delete that folder"
        )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text


def _save(run: StudentRun, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the adapter (or model) and tokenizer; the weights come last, so a folder with weights is whole."""
    staged = folder / UNFINISHED
    shutil.rmtree(staged, ignore_errors=True)
    if run.peft:
        # What is saved and pushed names the base as the user did, not the folder it was found in.
        model.peft_config["default"].base_model_name_or_path = run.model
        model.save_pretrained(staged, save_embedding_layers=False)
    else:
        model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    write_canonical(staged)
    for file in staged.iterdir():
        follow_umask(file)  # the writer of weights makes them private
    for file in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        file.replace(folder / file.name)
    staged.rmdir()
