"""Train a crosscoder on an activation set, and say how well it explains documents it has not seen.

    python train.py                                     the set of FinQA, Mistral-7B-Instruct-v0.3, layer 17
    python train.py FinQA-mini pocket-mistral
    python train.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> --latents 32768 --k 128 --epochs 4 --name wide
    python train.py FinQA-mini pocket-mistral --method difference-sae
    torchrun --nproc-per-node 2 train.py FinQA-mini pocket-mistral

--method batchtopk is the crosscoder; l1 (a price on values), partition (shared and delta latents) and difference-sae
(an autoencoder of the difference) are there to be compared with it, with the same trainer on the same activations.

Reads the activation set that the same names and flags make collect_activations.py write: D/activations/<set>/, else
its copy on the Hub. Size of the dictionary, k, batch and passes follow from the width and number of the activations
where no flag gives them (crosscoder/training/sizing.py). Before anything is loaded it prints what the run needs and
what there is; the activations are held on the GPU if they fit beside the dictionary, else in memory if they fit there,
else read from disk (--store). --preset published takes the published run's settings where
no flag gives others, and prints what of that run it does not reproduce. Under torchrun each process takes an equal
share of every batch; latents are selected over the whole batch, and the first process alone writes.

Writes the checkpoint D/models/crosscoders/<name>/ (model.safetensors, config.json; while under way the training state,
from which the same command goes on after an interruption), and crosscoder-model-diff/results/<name>/: metrics.json,
log.jsonl, training.png and .svg, run.json. <name> is <short model name>_<n>_samples_<method> unless --name says
otherwise. A crosscoder that is there with the same settings is not trained again, only evaluated.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.flags import add_method_flags, given_settings
from crosscoder.names import (
    add_activation_flags,
    add_crosscoder_flags,
    add_push_flags,
    choice_from_args,
    crosscoder_folder,
    find_folder,
    hub_id,
    name_of_method,
    require_push,
)
from crosscoder.training.run_log import RunLog
from crosscoder.training.sizing import NOT_REPRODUCED, PUBLISHED, sized_configs
from finqa.models import hub, students
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.manifest import write_json, write_manifest
from finqa.runtime.paths import Folders
from finqa.runtime.tracking import wandb_run

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from crosscoder.dictionaries.ranks import Ranks
    from crosscoder.training.report import CrosscoderReport


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_activation_flags(parser)
    add_crosscoder_flags(parser)
    add_push_flags(parser, "crosscoder")
    add_method_flags(parser)
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--device", help="torch device (default: a GPU where there is one)")
    add("--store", choices=("auto", "gpu", "memory", "disk"), default="auto", help="where activations are held")
    add("--step", choices=("auto", "autograd", "by-hand"), default="auto", help="(default: by hand on a GPU)")
    add("--log-every", type=int, default=50, metavar="STEPS")
    add("--checkpoint-every", type=float, default=60.0, metavar="SECONDS")
    add("--overwrite", action="store_true", help="replace a crosscoder of other settings or data")
    add("--wandb-project", default="crosscoder", help="(WANDB_MODE=offline|online|disabled decides where it logs)")
    add("--wandb-entity")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    choice, folders = choice_from_args(args), Folders.from_args(args)
    name = args.name or name_of_method(choice.crosscoder_name, args.method)
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
    device = args.device or students.default_device()
    ranks = process_ranks(device)
    hold(store, crosscoder, training, args, device, ranks)
    if args.overwrite and ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait()
    with RunLog(results / "log.jsonl") as log:
        model = trained_already(folder, crosscoder, training, store)
        if model is None:
            model = train(args, crosscoder, training, store, folder, log, name, device, ranks)
    if not ranks.is_main:
        return
    model = model.to(device)
    report = evaluate(model, store, training, log)
    write_results(args, results, report, crosscoder, training, store, log)
    print(summary(report, crosscoder, folder, results))
    hub.push_folder(folder, hub_id(choice.student, name) if args.push else None, args.push, args.private)


def open_store(folder: Path) -> ActivationStore:
    """The set as it lies on disk; a plan decides where it is held."""
    from crosscoder.activations.store import ActivationStore

    store = ActivationStore(folder, place="disk")
    print(f"{len(store):,} tokens of {len(store.documents)} documents from {folder}", flush=True)
    return store


def process_ranks(device: str) -> Ranks:
    """This process among those of torchrun."""
    from crosscoder.dictionaries.ranks import ranks_from_environment

    return ranks_from_environment(device)


def configs(args: argparse.Namespace, store: ActivationStore) -> tuple[CrosscoderConfig, TrainingConfig]:
    """What the flags say, then the preset, and for the rest what suits the width and number of the activations."""
    given = given_settings(args)
    if args.preset == "published":
        given = PUBLISHED | given
        print("not as in the published run: " + "; ".join(NOT_REPRODUCED), flush=True)
    held_out = given.get("held_out_fraction", TrainingConfig.held_out_fraction)
    n_tokens = len(store.split(held_out, TrainingConfig.split_seed).train)
    return sized_configs(store.config.d_model, n_tokens, args.method, **given)


def hold(
    store: ActivationStore,
    crosscoder: CrosscoderConfig,
    training: TrainingConfig,
    args: argparse.Namespace,
    device: str,
    ranks: Ranks,
) -> None:
    """Print the plan, and hold the activations where it puts them; UserError where the run does not fit."""
    import torch

    from crosscoder.training.plan import plan_training, training_need
    from crosscoder.training.step import product_dtype
    from crosscoder.training.step_choice import not_by_hand

    by_hand = args.step != "autograd" and not_by_hand(crosscoder, training, torch.device(device), ranks) is None
    product_bytes = product_dtype(training, torch.device(device)).itemsize
    need = training_need(crosscoder, training, by_hand, product_bytes, ranks.world)
    store.move(plan_training(store, need, device, args.store, ranks.world), device)


def trained_already(
    folder: Path, crosscoder: CrosscoderConfig, training: TrainingConfig, store: ActivationStore
) -> BatchTopKCrosscoder | None:
    """The finished crosscoder of these settings and data; UserError where `folder` holds another."""
    from crosscoder.dictionaries.checkpoint import CONFIG_FILE, read_config

    if not (folder / CONFIG_FILE).exists():
        return None
    found = read_config(folder)
    same_data = found.activations.get("fingerprint") == store.config.recorded.get("fingerprint")
    if (found.crosscoder, found.training) != (crosscoder, training) or not same_data:
        raise UserError(f"{folder} holds a crosscoder of other settings or data; give --name, or --overwrite it")
    print(f"{folder} is trained with these settings already")
    return load_dictionary(folder)


def train(
    args: argparse.Namespace,
    crosscoder: CrosscoderConfig,
    training: TrainingConfig,
    store: ActivationStore,
    folder: Path,
    log: RunLog,
    name: str,
    device: str,
    ranks: Ranks,
) -> BatchTopKCrosscoder:
    import torch

    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.step_choice import not_by_hand
    from crosscoder.training.trainer import Trainer

    generator = torch.Generator().manual_seed(training.seed)
    model = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
    options = {"log_every": args.log_every, "checkpoint_every_s": args.checkpoint_every, "step": args.step}
    trainer = Trainer(model, store, training, folder, log.add, **options, device=device, ranks=ranks)
    if not ranks.is_main:
        return trainer.fit()
    processes = f", {ranks.world} processes" if ranks.world > 1 else ""
    reason = "as asked" if args.step == "autograd" else not_by_hand(crosscoder, training, trainer.device, ranks)
    steps = f"steps by autograd ({reason})" if reason else "steps by hand"
    print(
        f"{crosscoder.method}: {crosscoder.n_latents:,} latents, k {crosscoder.k}, {crosscoder.n_inputs} x "
        f"{crosscoder.d_model}; {trainer.total_steps:,} steps of {training.batch_size:,} tokens "
        f"({training.epochs:g} passes) on {trainer.device}{processes}; {steps}",
        flush=True,
    )
    both = {"crosscoder": asdict(crosscoder), "training": asdict(training)}
    with wandb_run(args.wandb_project, args.wandb_entity, name, both, args.results_dir / name) as log.wandb_run:
        log.start_progress(trainer.total_steps)
        return trainer.fit()


def evaluate(
    model: BatchTopKCrosscoder, store: ActivationStore, training: TrainingConfig, log: RunLog
) -> CrosscoderReport:
    from crosscoder.training.report import crosscoder_report

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
    from crosscoder.analysis.figures import save_figure, training_figure

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
    from crosscoder.analysis.latent_scaling import meet_lines

    held_out = report.held_out
    parts = {"instruct": held_out.instruct, "fine-tuned": held_out.fine_tuned, "difference": held_out.difference}
    explained = ", ".join(f"{part} {value:.4f}" for part, value in parts.items() if value is not None)
    lines = [
        f"held-out explained variance: {explained}, at L0 {held_out.l0:.1f} (k {crosscoder.k + crosscoder.k_delta}), "
        f"on {report.n_held_out_documents} documents",
        f"latents: {report.dead_share:.1%} dead"
        + "".join(f", {count} {kind}" for kind, count in (report.classes or {}).items()),
    ]
    lines += meet_lines(report.latent_scaling or {})
    return "\n".join([*lines, f"checkpoint in {folder}, results in {results}"])


if __name__ == "__main__":
    sys.exit(report_errors(main))
