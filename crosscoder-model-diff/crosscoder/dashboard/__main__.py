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
from crosscoder.opening import add_crosscoder_flags, open_crosscoder_of
from finqa.runtime.command_line import add_flags, from_args, script_parser
from finqa.runtime.errors import report_errors
from finqa.runtime.journal import only_run_on


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.prog = "python -m crosscoder.dashboard"
    add_crosscoder_flags(parser)
    group = parser.add_argument_group("dashboard")
    add_flags(group, DashboardConfig)
    other = "Checkpoint of another dictionary of these activations, to match latents with"
    group.add_argument("--compare", metavar="FOLDER", help=other)
    group.add_argument("--out", type=Path, help="the file (default: dashboard.html in the folder of the results)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = from_args(DashboardConfig, args)

    from crosscoder.analysis.findings import find
    from crosscoder.extra_analyses import open_second
    from crosscoder.results import write_page

    opened = open_crosscoder_of(args)
    second = (Path(args.compare).name, open_second(opened, args.compare, any_method=True)) if args.compare else None
    path = args.out or opened.results / "dashboard.html"
    with only_run_on(path):
        n_latents = opened.model.config.n_latents
        print(f"{opened.name}: {n_latents:,} latents on {len(opened.store):,} tokens", flush=True)
        print(write_page(find(opened), config, path, second))


if __name__ == "__main__":
    sys.exit(report_errors(main))
