"""Train a crosscoder on an activation set, and say how well it explains documents it has not seen.

    python train.py                                     the set of FinQA, Mistral-7B-Instruct-v0.3, layer 17
    python train.py FinQA-mini pocket-mistral
    python train.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME --latents 32768 --k 128 --epochs 4 --name wide
    python train.py FinQA-mini pocket-mistral --method difference-sae
    python train.py mine                                a pair of your own (collect_activations.py --name mine)
    torchrun --nproc-per-node 2 train.py FinQA-mini pocket-mistral

--method batchtopk is the crosscoder. The others are there to be compared with it, with the same trainer on the same
activations: l1 (an L1 penalty on values), partition (shared and delta latents), dedicated (shared latents, and
--reserved of them for either model, which neither read nor write the other), difference-sae (an autoencoder of the
difference), and stagewise-sae (an autoencoder of the instruct model, then trained on with the fine-tuned one: two
stages of as many steps each, at the cost of one crosscoder). Every method has two forms that show what training adds:
--untrained takes no step, --freeze-decoder trains all but the decoder's vectors; both are in the default name.

Reads the activation set that the same names and flags make collect_activations.py write: D/activations/<set>/, else
its copy on the Hub. Size of the dictionary, k, batch and passes follow from the width and number of the activations
where no flag gives them (crosscoder/training/sizing.py). Before anything is loaded it prints what the run needs and
what there is; the activations are held on the GPU if they fit beside the dictionary, else in memory if they fit there,
else read from disk (--store). --preset published takes the published run's settings where no flag gives others, and
prints what of that run it does not reproduce. Under torchrun each process reads an equal share of every batch, latents
are selected over the whole batch, and the first process alone writes. Where steps are taken by hand (on GPUs, where
the latents divide among the processes) each has an equal share of the latents, and by autograd all of them.

Writes the checkpoint D/models/crosscoders/<name>/ (model.safetensors, config.json; while under way the training state,
from which the same command goes on after an interruption), and crosscoder-model-diff/results/<name>/: metrics.json,
log.jsonl, training.png and .svg, run.json. <name> is <short model name>_<n>_samples_<method> unless --name says
otherwise. A crosscoder that is there with the same settings is not trained again, only evaluated.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crosscoder.cards import write_crosscoder_card
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.names import CrosscoderChoice, add_activation_flags, choice_from_args, crosscoder_folder
from crosscoder.repositories import add_push_flags, find_activations, hub_id, require_push
from crosscoder.training.run_log import RunLog
from crosscoder.training.sizing import NOT_REPRODUCED, PUBLISHED, sized_configs
from finqa.models import hub, students
from finqa.runtime import parallel
from finqa.runtime.command_line import add_flags, flag, from_args, given, script_parser, settings_of
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import write_json, write_manifest
from finqa.runtime.memory.free import memory_used
from finqa.runtime.paths import Folders, check_writable
from finqa.runtime.tracking import wandb_run

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from crosscoder.dictionaries.ranks import Ranks
    from crosscoder.training.report import CrosscoderReport


@dataclass(frozen=True)
class Running:
    """How a run is carried out; none of it changes the dictionary that is meant, but for a preset."""

    preset: Literal["published"] | None = flag(None, help="Settings of the published run, where no flag gives others")
    device: str | None = flag(None, shown="a GPU where there is one", help="Torch device")
    store: Literal["auto", "gpu", "memory", "disk"] = flag("auto", help="Where the activations are held")
    step: Literal["auto", "autograd", "by-hand"] = flag("auto", shown="by hand on a GPU")
    """How gradients are computed: by torch's autograd, or by the fused backward pass."""
    log_every: int = flag(50, metavar="STEPS", help="Steps between two records of the log")
    checkpoint_every_s: float = flag(60.0, "--checkpoint-every", metavar="SECONDS")
    """Time between two checkpoints of the training state."""
    overwrite: bool = flag(False, help="Replace a crosscoder of other settings or data")
    wandb_project: str = flag("crosscoder", metavar="NAME")
    """Project on wandb (WANDB_MODE=offline|online|disabled decides where it logs)."""
    wandb_entity: str | None = flag(None, metavar="NAME", help="User or team on wandb")


@dataclass(frozen=True)
class Run:
    """One training run: what is trained, on what, how, and where it is written."""

    name: str
    crosscoder: CrosscoderConfig
    training: TrainingConfig
    running: Running
    store: ActivationStore
    folder: Path
    """Folder of the checkpoint."""
    results: Path
    device: str
    ranks: Ranks

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return {"crosscoder": asdict(self.crosscoder), "training": asdict(self.training)}


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_activation_flags(parser)
    add_push_flags(parser, "crosscoder")
    dictionary, loss = parser.add_argument_group("dictionary"), parser.add_argument_group("loss")
    add_flags(dictionary, CrosscoderChoice)
    add_flags(dictionary, CrosscoderConfig)
    add_flags(loss, TrainingConfig, group="loss")
    add_flags(parser.add_argument_group("training"), TrainingConfig, group="")
    add_flags(parser.add_argument_group("running"), Running)
    return parser.parse_args()


@parallel.only_first_prints()
def main() -> None:
    args = parse_args()
    choice, named, folders = choice_from_args(args), from_args(CrosscoderChoice, args), Folders.from_args(args)
    name, running = named.name_on(choice, folders), from_args(Running, args)
    parallel.check_device(running.device)
    if parallel.world_size() > 1:
        joined(running)
    with parallel.first_goes_first():
        require_push(args, choice.student, name)
        check_writable(named.results_dir)
        recorded = find_activations(choice, folders)

    # Only now, so that what is missing is said at once.
    from crosscoder.activations.store import ActivationStore
    from crosscoder.training.report import crosscoder_report

    store = ActivationStore(recorded, place="disk")
    print(f"{len(store):,} tokens of {len(store.documents)} documents from {recorded}", flush=True)
    crosscoder, training = configs(args, named, running, store)
    folder, results = crosscoder_folder(folders, name), named.results_dir / name
    run = Run(name, crosscoder, training, running, store, folder, results, *joined(running))
    with only_run_on(*([folder, results] if run.ranks.is_main else [])):
        hold(run)
        if running.overwrite and run.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (results / "log.jsonl").unlink(missing_ok=True)
        parallel.wait_for_all()
        with RunLog(results / "log.jsonl") as log:
            model = trained_already(run) or train(run, log)
        if not run.ranks.is_main:
            return
        split = store.split(training.held_out_fraction, training.split_seed)
        report = crosscoder_report(model.to(run.device), store, split, log.records)
        write_results(run, report, log, settings_of(choice, named, running))
        print(summary(run, report))
    repository = hub_id(choice.student, name) if args.push else None
    write_crosscoder_card(folder, report, repository)
    hub.push_folder(folder, repository, args.push, args.private)


def joined(running: Running) -> tuple[str, Ranks]:
    """This process's device, and the processes that train together on theirs."""
    from crosscoder.dictionaries.ranks import ranks_from_environment

    device = parallel.own_device(running.device or students.default_device())
    return device, ranks_from_environment(device)


def configs(
    args: argparse.Namespace, named: CrosscoderChoice, running: Running, store: ActivationStore
) -> tuple[CrosscoderConfig, TrainingConfig]:
    """What the flags say, then the preset, and for the rest what suits the width and number of the activations."""
    settings = given(CrosscoderConfig, args) | given(TrainingConfig, args)
    if running.preset == "published":
        settings = PUBLISHED | settings
        print("not as in the published run: " + "; ".join(NOT_REPRODUCED), flush=True)
    held_out = settings.get("held_out_fraction", TrainingConfig.held_out_fraction)
    n_tokens = len(store.split(held_out, TrainingConfig.split_seed).train)
    form = {"untrained": named.untrained, "freeze_decoder": named.freeze_decoder}
    return sized_configs(store.config.d_model, n_tokens, named.method, **settings, **form)


def hold(run: Run) -> None:
    """Print the plan, and hold the activations where it puts them; UserError where the run does not fit."""
    import torch

    from crosscoder.training.plan import plan_training, training_need
    from crosscoder.training.step import product_dtype
    from crosscoder.training.step_choice import not_by_hand

    device = torch.device(run.device)
    reason = not_by_hand(run.crosscoder, run.training, device, run.ranks.world)
    by_hand = run.running.step != "autograd" and reason is None
    product_bytes = product_dtype(run.training, device).itemsize
    need = training_need(run.crosscoder, run.training, by_hand, product_bytes, run.ranks.world)
    run.store.move(plan_training(run.store, need, run.device, run.running.store, run.ranks.world), run.device)


def trained_already(run: Run) -> BatchTopKCrosscoder | None:
    """The finished crosscoder of these settings and data; UserError where the folder holds another."""
    from crosscoder.dictionaries.checkpoint import CONFIG_FILE, read_config

    if not (run.folder / CONFIG_FILE).exists():
        return None
    found = read_config(run.folder)
    same_data = found.activations.get("fingerprint") == run.store.config.recorded.get("fingerprint")
    if (found.crosscoder, found.training) != (run.crosscoder, run.training) or not same_data:
        raise UserError(f"{run.folder} holds a crosscoder of other settings or data; give --name, or --overwrite it")
    print(f"{run.folder} is trained with these settings already")
    return load_dictionary(run.folder)


def train(run: Run, log: RunLog) -> BatchTopKCrosscoder:
    import torch

    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.step_choice import not_by_hand
    from crosscoder.training.trainer import Trainer

    crosscoder, training, running, ranks = run.crosscoder, run.training, run.running, run.ranks
    generator = torch.Generator().manual_seed(training.seed)
    model = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
    trainer = Trainer(
        model,
        run.store,
        training,
        run.folder,
        log.add,
        running.log_every,
        running.checkpoint_every_s,
        run.device,
        ranks,
        running.step,
    )
    if not ranks.is_main:
        return trainer.fit()
    processes = f", {ranks.world} processes" if ranks.world > 1 else ""
    asked = running.step == "autograd"
    reason = "as asked" if asked else not_by_hand(crosscoder, training, trainer.device, ranks.world)
    steps = f"steps by autograd ({reason})" if reason else "steps by hand"
    stages = f", in {len(model.stages)} stages" if len(model.stages) > 1 else ""
    taken = (
        f"{trainer.total_steps:,} steps of {training.batch_size:,} tokens ({training.epochs:g} passes{stages}) on "
        f"{trainer.device}{processes}; {steps}{', the decoder is frozen' if training.freeze_decoder else ''}"
    )
    print(
        f"{crosscoder.method}: {crosscoder.n_latents:,} latents, k {crosscoder.k}, {crosscoder.n_inputs} x "
        f"{crosscoder.d_model}; {'untrained: no step is taken' if training.untrained else taken}",
        flush=True,
    )
    tracked = wandb_run(running.wandb_project, running.wandb_entity, run.name, run.settings, run.results)
    with tracked as log.wandb_run:
        log.start_progress(trainer.total_steps)
        return trainer.fit()


def write_results(run: Run, report: CrosscoderReport, log: RunLog, flags: dict[str, Any]) -> None:
    """metrics.json, the figure of the log, and the run manifest."""
    from crosscoder.analysis.figures import save_figure, training_figure

    held_out, on_training = report.held_out._asdict(), report.training._asdict()
    write_json(run.results / "metrics.json", asdict(report) | {"held_out": held_out, "training": on_training})
    save_figure(training_figure(log.records), run.results / "training")
    write_manifest(
        run.results / "run.json",
        flags,
        seed=run.training.seed,
        **run.settings,
        activations=run.store.config.recorded,
        processes=run.ranks.world,
        sent=dict(run.ranks.sent),
        memory_gb=round(memory_used() / 1e9, 3),
        tokens=log.records[-1]["tokens"] if log.records else 0,
        tokens_per_second=round(log.tokens_per_second),
        seconds=round(log.seconds, 1),
    )


def summary(run: Run, report: CrosscoderReport) -> str:
    """The last lines of the run."""
    from crosscoder.analysis.latent_scaling import meet_lines

    k = run.crosscoder.k + run.crosscoder.k_delta
    lines = [
        f"held-out explained variance: {report.held_out} (k {k}), on {report.n_held_out_documents} documents",
        f"latents: {report.dead_share:.1%} dead"
        + "".join(f", {count} {kind}" for kind, count in (report.classes or {}).items()),
    ]
    if report.median_change is not None:
        lines.append(f"median change of a latent in the second stage: {report.median_change:.3f} (0 to 2)")
    lines += meet_lines(report.latent_scaling or {})
    return "\n".join([*lines, f"checkpoint in {run.folder}, results in {run.results}"])


if __name__ == "__main__":
    sys.exit(report_errors(main))
