"""Train a BatchTopK crosscoder on an activation set, and say how well it explains documents it has not seen.

    python train.py                                     the set of FinQA, Mistral-7B-Instruct-v0.3, layer 17
    python train.py FinQA-mini pocket-mistral
    python train.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> --latents 32768 --k 128 --epochs 4 --name wide

Reads the activation set that the same names and flags make collect_activations.py write: D/activations/<set>/, else
its copy on the Hub. Size of the dictionary, k, batch and passes follow from the width and number of the activations
where no flag gives them (crosscoder/sizing.py).

Writes the checkpoint D/models/crosscoders/<name>/ (model.safetensors, config.json; while under way the training state,
from which the same command goes on after an interruption), and crosscoder-model-diff/results/<name>/: metrics.json,
log.jsonl, training.png and .svg, run.json. <name> is <short model name>_<n>_samples_batchtopk unless --name says
otherwise. A crosscoder that is there with the same settings is not trained again, only evaluated.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from crosscoder import config as settings
from crosscoder.config import CrosscoderConfig, TrainingConfig
from crosscoder.names import (
    add_activation_flags,
    add_crosscoder_flags,
    add_push_flags,
    choice_from_args,
    crosscoder_folder,
    find_folder,
    hub_id,
    require_push,
)
from crosscoder.run_log import RunLog
from crosscoder.sizing import sized_configs
from finqa import hub, students
from finqa.errors import UserError, report_errors
from finqa.manifest import write_json, write_manifest
from finqa.paths import Folders
from finqa.tracking import wandb_run

if TYPE_CHECKING:
    from crosscoder.activation_store import ActivationStore
    from crosscoder.model import BatchTopKCrosscoder
    from crosscoder.report import CrosscoderReport


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_activation_flags(parser)
    add_crosscoder_flags(parser)
    add_push_flags(parser, "crosscoder")
    defaults = TrainingConfig()
    group = parser.add_argument_group("crosscoder")
    add = group.add_argument
    add("--latents", type=int, help="size of the dictionary")
    add("--k", type=int, help="mean number of active latents a token")
    add("--score-norm", choices=get_args(settings.ScoreNorm), default="sum", help="(default: %(default)s)")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--step-tokens", type=int, help="tokens a step")
    add("--epochs", type=float, help="passes over the training tokens")
    add("--learning-rate", type=float)
    add("--reconstruction", choices=get_args(settings.Reconstruction), default=defaults.reconstruction)
    add("--decoder-norm", type=float, default=defaults.decoder_norm, help="at the start (default: %(default)s)")
    add("--decoder-bias", choices=("zero", "median"), default=defaults.decoder_bias, help="at the start")
    add("--aux-weight", type=float, default=defaults.aux_weight, help="of the auxiliary loss (default: 1/32)")
    add("--precision", choices=get_args(settings.Precision), default=defaults.precision)
    add("--held-out", type=float, default=defaults.held_out_fraction, help="share of documents (default: %(default)s)")
    add("--seed", type=int, default=defaults.seed)
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--device", help="torch device (default: a GPU where there is one)")
    add("--log-every", type=int, default=50, metavar="STEPS")
    add("--checkpoint-every", type=float, default=60.0, metavar="SECONDS")
    add("--overwrite", action="store_true", help="replace a crosscoder of other settings or data")
    add("--wandb-project", default="crosscoder", help="(WANDB_MODE=offline|online|disabled decides where it logs)")
    add("--wandb-entity")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    choice, folders = choice_from_args(args), Folders.from_args(args)
    name = args.name or choice.crosscoder_name
    folder, results = crosscoder_folder(folders, name), args.results_dir / name

    require_push(args, choice.student, name)
    recorded = find_folder(
        folders.activations(choice.name),
        choice.student,
        "config.json",
        "activation set",
        choice.command("collect_activations.py"),
    )
    store = open_store(recorded)
    crosscoder, training = configs(args, store)
    if args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    with RunLog(results / "log.jsonl") as log:
        model = trained_already(args, folder, crosscoder, training, store)
        if model is None:
            model = train(args, crosscoder, training, store, folder, log, name)
    report = evaluate(model, store, training, log)
    write_results(args, results, report, crosscoder, training, store, log)
    print(summary(report, crosscoder, folder, results))
    hub.push_folder(folder, hub_id(choice.student, name) if args.push else None, args.push, args.private)


def open_store(folder: Path) -> ActivationStore:
    from crosscoder.activation_store import ActivationStore

    store = ActivationStore(folder)
    where = "in memory" if store.in_memory else "memory-mapped"
    print(f"{len(store):,} tokens of {len(store.documents)} documents, {where}, from {folder}", flush=True)
    return store


def configs(args: argparse.Namespace, store: ActivationStore) -> tuple[CrosscoderConfig, TrainingConfig]:
    """What the flags say, and for the rest what suits the width and number of the activations."""
    return sized_configs(
        d_model=store.config.d_model,
        n_tokens=len(store.split(args.held_out, TrainingConfig.split_seed).train),
        n_latents=args.latents,
        k=args.k,
        batch_size=args.step_tokens,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        score_norm=args.score_norm,
        reconstruction=args.reconstruction,
        decoder_norm=args.decoder_norm,
        decoder_bias=args.decoder_bias,
        aux_weight=args.aux_weight,
        precision=args.precision,
        held_out_fraction=args.held_out,
        seed=args.seed,
    )


def trained_already(
    args: argparse.Namespace,
    folder: Path,
    crosscoder: CrosscoderConfig,
    training: TrainingConfig,
    store: ActivationStore,
) -> BatchTopKCrosscoder | None:
    """The finished crosscoder of these settings and data; UserError where `folder` holds another."""
    from crosscoder.checkpoint import CONFIG_FILE, read_config
    from crosscoder.model import BatchTopKCrosscoder

    if not (folder / CONFIG_FILE).exists():
        return None
    found = read_config(folder)
    same_data = found.activations.get("fingerprint") == store.config.recorded.get("fingerprint")
    if (found.crosscoder, found.training) != (crosscoder, training) or not same_data:
        raise UserError(f"{folder} holds a crosscoder of other settings or data; give --name, or --overwrite it")
    print(f"{folder} is trained with these settings already")
    return BatchTopKCrosscoder.from_pretrained(folder).to(args.device or students.default_device())


def train(
    args: argparse.Namespace,
    crosscoder: CrosscoderConfig,
    training: TrainingConfig,
    store: ActivationStore,
    folder: Path,
    log: RunLog,
    name: str,
) -> BatchTopKCrosscoder:
    import torch

    from crosscoder.model import BatchTopKCrosscoder
    from crosscoder.trainer import Trainer

    generator = torch.Generator().manual_seed(training.seed)
    trainer = Trainer(
        BatchTopKCrosscoder(crosscoder, training.decoder_norm, generator),
        store,
        training,
        folder,
        on_log=log.add,
        log_every=args.log_every,
        checkpoint_every_s=args.checkpoint_every,
        device=args.device or students.default_device(),
    )
    print(
        f"{crosscoder.n_latents:,} latents, k {crosscoder.k}, 2 x {crosscoder.d_model}; {trainer.total_steps:,} steps "
        f"of {training.batch_size:,} tokens ({training.epochs:g} passes) on {trainer.device}",
        flush=True,
    )
    both = {"crosscoder": asdict(crosscoder), "training": asdict(training)}
    with wandb_run(args.wandb_project, args.wandb_entity, name, both, args.results_dir / name) as log.wandb_run:
        log.start_progress(trainer.total_steps)
        return trainer.fit()


def evaluate(
    model: BatchTopKCrosscoder, store: ActivationStore, training: TrainingConfig, log: RunLog
) -> CrosscoderReport:
    from crosscoder.report import crosscoder_report

    return crosscoder_report(model, store, store.split(training.held_out_fraction, training.split_seed), log.records)


def write_results(
    args: argparse.Namespace,
    results: Path,
    report: CrosscoderReport,
    crosscoder: CrosscoderConfig,
    training: TrainingConfig,
    store: ActivationStore,
    log: RunLog,
) -> None:
    """metrics.json, the figure of the log, and the run manifest."""
    from crosscoder.figures import save_figure, training_figure

    held_out, on_training = report.held_out._asdict(), report.training._asdict()
    write_json(results / "metrics.json", asdict(report) | {"held_out": held_out, "training": on_training})
    save_figure(training_figure(log.records), results / "training")
    write_manifest(
        results / "run.json",
        vars(args),
        seed=training.seed,
        crosscoder=asdict(crosscoder),
        training=asdict(training),
        activations=store.config.recorded,
        seconds=round(log.seconds, 1),
    )


def summary(report: CrosscoderReport, crosscoder: CrosscoderConfig, folder: Path, results: Path) -> str:
    """The last lines of the run."""
    held_out = report.held_out
    classes = ", ".join(f"{count} {kind}" for kind, count in report.classes.items())
    return (
        f"held-out explained variance: instruct {held_out.instruct:.4f}, fine-tuned {held_out.fine_tuned:.4f}, "
        f"difference {held_out.difference:.4f}, at L0 {held_out.l0:.1f} (k {crosscoder.k}), on "
        f"{report.n_held_out_documents} documents\n"
        f"latents: {report.dead_share:.1%} dead; {classes}\n"
        f"checkpoint in {folder}, results in {results}"
    )


if __name__ == "__main__":
    sys.exit(report_errors(main))
