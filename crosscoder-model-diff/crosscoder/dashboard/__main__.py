"""Build the dashboard of a trained dictionary: one HTML file that needs no server and no network.

    python -m crosscoder.dashboard                                      that of the 7B run
    python -m crosscoder.dashboard FinQA-mini pocket-mistral
    python -m crosscoder.dashboard FinQA-mini pocket-mistral --method difference-sae --examples-for 200
    python -m crosscoder.dashboard FinQA-mini pocket-mistral --compare data/models/crosscoders/OTHER

Takes the names and flags of train.py, and these. Reads the crosscoder, its activation set, and the base model's
tokenizer and unembedding; of the folder of its results the labels and causal effects in latents.csv, where there are
any. Writes crosscoder-model-diff/results/<crosscoder's name>/dashboard.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crosscoder.dashboard.records import DashboardConfig
from finqa.runtime.command_line import add_flags, from_args
from finqa.runtime.errors import report_errors
from finqa.runtime.journal import only_run_on


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The flags below, and what is left for reading.open_reading."""
    parser = argparse.ArgumentParser(
        prog="python -m crosscoder.dashboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_flags(parser, DashboardConfig)
    parser.add_argument(
        "--compare",
        metavar="FOLDER",
        help="Checkpoint of another dictionary of these activations, to match latents with",
    )
    parser.add_argument("--out", type=Path, help="the file (default: dashboard.html in the folder of the results)")
    return parser.parse_known_args()


def main() -> None:
    args, names = parse_args()
    config = from_args(DashboardConfig, args)

    from crosscoder.analysis.findings import find
    from crosscoder.extra_readings import open_second
    from crosscoder.opening import open_reading
    from crosscoder.results import write_page

    reading = open_reading(names)
    second = (Path(args.compare).name, open_second(reading, args.compare, any_method=True)) if args.compare else None
    path = args.out or reading.results / "dashboard.html"
    with only_run_on(path):
        print(
            f"{reading.name}: {reading.model.config.n_latents:,} latents on {len(reading.store):,} tokens", flush=True
        )
        print(write_page(find(reading), config, path, second))


if __name__ == "__main__":
    sys.exit(report_errors(main))
