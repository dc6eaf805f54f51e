"""Turn a crosscoder of another library into a checkpoint of this project, or one of this project into theirs.

    python -m crosscoder.convert SOURCE TARGET                                what SOURCE holds -> a checkpoint
    python -m crosscoder.convert CHECKPOINT TARGET --to dictionary-learning   batchtopk and l1
    python -m crosscoder.convert CHECKPOINT TARGET --to sae-lens              difference-sae
    python -m crosscoder.convert FinQA-mini pocket-mistral --to neuronpedia   the dashboard's latents as JSON

SOURCE and CHECKPOINT are folders, or repositories on the Hub. Read are BatchTopKCrossCoder of dictionary_learning (a
folder with model.safetensors or model.pt, or the .pt file itself), the older crosscoder code's model.pt, and SAELens'
JumpReLU SAEs, which become a difference-sae. A crosscoder with plain ReLU is read with --threshold 0. The older files
do not say by what activations were multiplied: give it by --scales, as the crosscoder was trained. Nothing in a file
is run. TARGET is a new folder. What is converted gives the values and reconstructions that it gave.

--to neuronpedia takes the names and flags of train.py, reads what the dashboard reads, and writes
crosscoder-model-diff/results/<crosscoder's name>/neuronpedia/batch-<n>.json, in SAEDashboard's schema.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from crosscoder.convert.dictionary_learning import read_crosscoder, write_crosscoder
from crosscoder.convert.files import read_settings
from crosscoder.convert.sae_lens import WEIGHTS as SAE_WEIGHTS
from crosscoder.convert.sae_lens import read_sae, write_sae
from crosscoder.dictionaries.checkpoint import find_checkpoint, load_dictionary, read_config, save_dictionary
from crosscoder.dictionaries.config import ScoreNorm
from finqa.runtime.command_line import add_flags, from_args, script_parser
from finqa.runtime.errors import UserError, report_errors

if TYPE_CHECKING:
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

LAYOUTS = ("dictionary-learning", "sae-lens", "neuronpedia")
FILES = ("model.safetensors", "model.pt")


def parser_of(layout: str | None) -> argparse.ArgumentParser:
    """The flags beside --to."""
    from crosscoder.dashboard.records import DashboardConfig
    from crosscoder.opening import add_crosscoder_flags

    parser = script_parser(__doc__)
    parser.prog = "python -m crosscoder.convert"
    parser.add_argument("--to", choices=LAYOUTS, help="(default: a checkpoint of this project)")
    if layout == "neuronpedia":
        add_crosscoder_flags(parser)
        add_flags(parser, DashboardConfig)
        parser.add_argument("--out", type=Path, help="the folder (default: neuronpedia in the folder of the results)")
        return parser
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    if layout is None:
        parser.add_argument("--scales", type=float, nargs="+", metavar="SCALE", help="instruct, then fine-tuned")
        parser.add_argument("--k", type=int, help="where no file says it")
        parser.add_argument("--threshold", type=float, help="where the file has none")
        parser.add_argument("--score-norm", choices=get_args(ScoreNorm), help="(default: the file's, else sum)")
    return parser


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--to")
    layout = first.parse_known_args()[0].to
    args = parser_of(layout).parse_args()
    if layout == "neuronpedia":
        return write_pages(args)
    target: Path = args.target
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} is there already, and nothing is replaced; give a new folder")
    if layout is None:
        model = read_foreign(args)
        save_dictionary(model, target, converted_from=args.source.name)
    else:
        model = load_dictionary(args.source)
        if layout == "sae-lens":
            write_sae(model, target, read_config(find_checkpoint(args.source)).activations)
        else:
            write_crosscoder(model, target)
    config = model.config
    shape = f"{config.n_latents:,} latents, k {config.k}, {config.n_inputs} x {config.d_model}"
    print(f"{config.method}: {shape}, threshold {model.threshold}: {target}")
    if model.threshold is None:
        print(
            "the file has no threshold: give --threshold, or calibrate it (crosscoder.dictionaries.threshold.calibrate)"
        )


def read_foreign(args: argparse.Namespace) -> BatchTopKCrosscoder:
    """The dictionary of another library, by the files that are there."""
    source, scales = local_copy(args.source), tuple(args.scales) if args.scales else None
    if "activation_scales" in read_settings(source):
        raise UserError(f"{source} is a checkpoint of this project already; say --to what it is to be converted")
    if (source / SAE_WEIGHTS).exists():
        model = read_sae(source, scales, args.k, args.threshold)
    else:
        weights = next((path for path in (source, *(source / name for name in FILES)) if path.is_file()), None)
        if weights is None:
            raise UserError(f"{source} has no {SAE_WEIGHTS} and no {' or '.join(FILES)}; give such a folder, or a file")
        model = read_crosscoder(weights, scales, args.k, args.threshold, args.score_norm)
    if len(model.activation_scales) != model.config.n_inputs:
        raise UserError(f"--scales takes {model.config.n_inputs} here, and {len(model.activation_scales)} are given")
    return model


def local_copy(source: Path) -> Path:
    """A file or folder, else the copy of a repository on the Hub."""
    if source.exists():
        return source
    from finqa.models.hub import fetch_folder

    fetched = None if source.is_absolute() else fetch_folder(str(source))
    if fetched is None:
        raise UserError(f"{source} is missing, here and on the Hub; SOURCE is a folder with model.pt, or a .pt file")
    return fetched


def write_pages(args: argparse.Namespace) -> None:
    """The batches of the dictionary that train.py's names and flags name."""
    from crosscoder.analysis.findings import find
    from crosscoder.convert.neuronpedia import write_neuronpedia
    from crosscoder.dashboard.builder import build_dashboard
    from crosscoder.dashboard.records import DashboardConfig
    from crosscoder.dashboard.summary import summary_of
    from crosscoder.opening import open_crosscoder_of

    config, opened = from_args(DashboardConfig, args), open_crosscoder_of(args)
    found = find(opened)
    dashboard = build_dashboard(opened, found.statistics, found.rows, summary_of(found), config)
    folder = args.out or opened.results / "neuronpedia"
    n = write_neuronpedia(opened, dashboard, config, folder)
    print(f"{n:,} latents with examples in {folder}")


if __name__ == "__main__":
    sys.exit(report_errors(main))
