"""Build the dashboard of a trained dictionary: one HTML file that needs no server and no network.

    python -m crosscoder.dashboard                                      that of the 7B run
    python -m crosscoder.dashboard FinQA-mini pocket-mistral
    python -m crosscoder.dashboard FinQA-mini pocket-mistral --method difference-sae --examples-for 200

Takes the names and flags of train.py, and these. Reads the crosscoder, its activation set, and the base model's
tokenizer and unembedding. Writes crosscoder-model-diff/results/<crosscoder's name>/dashboard.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crosscoder.dashboard.records import DashboardConfig
from finqa.runtime.command_line import add_flags, from_args
from finqa.runtime.errors import report_errors


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The flags below, and what is left for reading.open_reading."""
    parser = argparse.ArgumentParser(
        prog="python -m crosscoder.dashboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_flags(parser, DashboardConfig)
    parser.add_argument("--out", type=Path, help="the file (default: dashboard.html in the folder of the results)")
    return parser.parse_known_args()


def main() -> None:
    args, names = parse_args()
    config = from_args(DashboardConfig, args)
    import torch

    from crosscoder.analysis import tables
    from crosscoder.analysis.latent_scaling import latent_scaling
    from crosscoder.analysis.measures import explained_variance
    from crosscoder.analysis.statistics import latent_statistics
    from crosscoder.analysis.token_kinds import token_kinds
    from crosscoder.dashboard.builder import build_dashboard
    from crosscoder.dashboard.page import write_dashboard
    from crosscoder.opening import open_reading

    reading = open_reading(names)
    model, store = reading.model, reading.store
    held_out = reading.split.held_out
    print(f"{reading.name}: {model.config.n_latents:,} latents on {len(store):,} tokens", flush=True)
    kinds = token_kinds(store, reading.tokenizer)
    statistics = latent_statistics(model, store, torch.arange(len(store)), kinds=kinds)
    scaling = None
    if model.config.compares_models:
        scaling = latent_scaling(model, (raw for _, raw in store.batches(held_out)))
    explained = explained_variance(model, (raw for _, raw in store.batches(held_out)))
    rows = tables.latent_table(model, statistics, store, reading.tokenizer, reading.unembedding, scaling)
    dashboard = build_dashboard(reading, statistics, rows, config, explained)
    path = args.out or reading.results / "dashboard.html"
    size = write_dashboard(path, dashboard)
    n = sum(page.examples is not None for page in dashboard.pages)
    print(f"{path}: {size / 1e6:.1f} MB, {len(dashboard.pages):,} latents, {n:,} with examples")


if __name__ == "__main__":
    sys.exit(report_errors(main))
