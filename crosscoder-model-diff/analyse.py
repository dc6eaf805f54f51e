"""Read a trained dictionary: its figures, tables, numbers and dashboard.

    python analyse.py                                          that of the 7B run
    python analyse.py FinQA-mini pocket-mistral
    python analyse.py FinQA-mini pocket-mistral --method difference-sae
    python analyse.py mine                                     a pair of your own (collect_activations.py --name mine)
    python analyse.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME --name wide --examples-for 4096
    python analyse.py FinQA mistralai/Mistral-7B-Instruct-v0.3 --causal 64

Takes the names and flags of train.py, and these. Reads the crosscoder and its activation set, each from its local
folder, else from the Hub, and the base model's tokenizer and unembedding.

Writes into crosscoder-model-diff/results/<crosscoder's name>/

    explained_variance, explained_variance_by_kind, relative_decoder_norms, decoder_cosines, latent_scaling,
    firing_frequency                 figures, each as .png and .svg
    latents.csv                      every latent
    most_changed.csv                 the latents that changed most, in that order
    classes.csv                      latents by class, and how many of each latent scaling confirms as exclusive
    confirmed.csv                    the latents that it confirms, whatever their class
    explained_variance.csv           on all held-out tokens, and by kind of token
    stability.csv                    with --second-seed: latents matched one to one, by class, beside what chance gives;
                                     each latent's partner is on the dashboard
    splicing.csv                     with --splice: loss recovered when reconstructions take the activations' place
    causal.csv and its figure        with --causal: share of the gap between the models that sets of latents recover,
                                     put into the one or taken out of the other, beside controls; each latent's own
                                     effect is in latents.csv and on the dashboard
    analysis.json                    every number that the figures show, with what it was counted over
    dashboard.html                   every latent, to be looked up; no server and no network needed
    analysis.run.json                the run manifest

--second-seed, --splice and --causal take long on a large model. They come after all else is written, say how long they
will take, and each is written when it is done. A run that was killed goes on where it was (stability.jsonl,
splicing.jsonl and causal/ hold what is done) and gives what an uninterrupted one gives.

What compares the decoder norms of two models is left out for a difference SAE, which has one vector a latent, and for a
stagewise SAE, whose vectors have unit norm; the latents of that are compared by their change (docs/model-diff.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosscoder.dashboard.records import DashboardConfig
from crosscoder.names import CrosscoderChoice, choice_from_args
from crosscoder.opening import AnalysisConfig, add_crosscoder_flags, open_crosscoder_of
from finqa.runtime.command_line import add_flags, check_bounds, flag, from_args, script_parser, settings_of
from finqa.runtime.errors import report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import write_manifest
from finqa.runtime.memory.free import memory_used
from finqa.runtime.paths import Folders, check_writable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crosscoder.analysis.findings import Findings
    from crosscoder.dictionaries.model import BatchTopKCrosscoder


@dataclass(frozen=True)
class Extras:
    """What is made beside the figures and tables of the dictionary alone."""

    dashboard: bool = flag(True, help="Leave the dashboard out")
    second_seed: str | None = flag(None, metavar="FOLDER")
    """Checkpoint of another dictionary of the same activations, to see which latents it finds too."""
    splice: bool = flag(False, help="Load both models, and measure what their loss is with reconstructions")
    causal: int | None = flag(None, metavar="N", const=0, shown="not; without N: all", least=0)
    """Load both models, and patch sets of latents into them on N held-out documents; latents are chosen on as many
    training documents."""

    def __post_init__(self) -> None:
        check_bounds(self)


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_crosscoder_flags(parser)
    group = parser.add_argument_group("analysis")
    for kind in (AnalysisConfig, DashboardConfig, Extras):
        add_flags(group, kind)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    extras, config = from_args(Extras, args), from_args(AnalysisConfig, args)
    dashboard, crosscoder = from_args(DashboardConfig, args), from_args(CrosscoderChoice, args)
    check_writable(crosscoder.results_dir)
    choice, folders = choice_from_args(args), Folders.from_args(args)
    with only_run_on(crosscoder.results_dir / crosscoder.name_on(choice, folders)):
        opened = open_crosscoder_of(args)
        model, store = opened.model, opened.store

        from crosscoder.analysis.findings import find, plan_analysis
        from crosscoder.extra_analyses import open_second
        from crosscoder.results import write_figures, write_numbers, write_page, write_tables

        second = open_second(opened, extras.second_seed) if extras.second_seed else None
        print(f"{opened.name}: {model.config.n_latents:,} latents on {len(store):,} tokens", flush=True)
        plan_analysis(opened, config)
        found = find(opened, config)
        folder = opened.results
        settings = settings_of(choice, crosscoder, extras) | {"reading": config, "pages": dashboard}

        def manifest() -> None:
            held = {"memory_gb": round(memory_used() / 1e9, 3), "seconds": round(time.perf_counter() - started, 1)}
            write_manifest(folder / "analysis.run.json", settings, activations=store.config.recorded, **held)

        n_figures = len(write_figures(found, folder)) // 2
        n_tables = len(write_tables(found, folder))
        write_numbers(found, folder)
        if extras.dashboard:
            print(write_page(found, dashboard), flush=True)
        manifest()
        print(summary(found))
        print(f"{n_figures} figures, {n_tables} tables and analysis.json in {folder}", flush=True)
        for name in extra_tables(args, extras, found, second):
            print(f"{name}.csv in {folder}", flush=True)
            manifest()
        if extras.dashboard and (second is not None or extras.causal is not None):
            other = (Path(str(extras.second_seed)).name, second) if second is not None else None
            print(write_page(found, dashboard, second=other), flush=True)


def extra_tables(
    args: argparse.Namespace, extras: Extras, found: Findings, second: BatchTopKCrosscoder | None
) -> Iterator[str]:
    """Make the tables of --second-seed, --splice and --causal, and name each once it is written."""
    from crosscoder.analysis.figures import save_figure
    from crosscoder.extra_analyses import causal_rows, cause, load_pair, splice, stability_table
    from crosscoder.interventions.causal_figures import recovered_figure
    from crosscoder.results import write_effects, write_extra

    folder = found.opened.results
    if second is not None:
        write_extra("stability", stability_table(found, second), folder)
        yield "stability"
    if not extras.splice and extras.causal is None:
        return
    pair = load_pair(found.opened.store, choice_from_args(args), Folders.from_args(args))
    if extras.splice:
        write_extra("splicing", splice(found.opened, pair), folder)
        yield "splicing"
    if extras.causal is not None:
        report, effects = cause(found, pair, extras.causal or None)
        save_figure(recovered_figure(report), folder / "causal")
        write_effects(found, effects, folder)
        write_extra("causal", causal_rows(report), folder)
        yield "causal"


def summary(found: Findings) -> str:
    """The main figures, in a few lines."""
    from crosscoder.analysis.latent_scaling import meet_lines
    from crosscoder.results import class_rows

    explained = found.explained
    dead = int(found.statistics.dead.sum())
    lines = [
        f"held-out explained variance: {explained}, n {explained.n_tokens:,} tokens",
        f"latents: {len(found.rows):,}, {dead:,} of them active on no token",
    ]
    for row in class_rows(found):
        confirmed = f" ({row['confirmed']:,} confirmed)" if "confirmed" in row else ""
        lines[1] += f", {row['latents']:,} {row['class']}{confirmed}"
    return "\n".join([*lines, *meet_lines(found.exclusive)])


if __name__ == "__main__":
    sys.exit(report_errors(main))
