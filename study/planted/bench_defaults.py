"""What train.py takes where no flag says otherwise, against the published run's settings, on the same activations.

    python -m study.planted.bench_defaults data/activations/SET
    python -m study.planted.bench_defaults data/activations/SET --ways l1 partition --set l1_weight=1.0

Every way trains a dictionary of its own on the set's training documents and is read on the held-out ones, by the
inference threshold. The ways: the four methods with the defaults of crosscoder/training/sizing.py; `published`, one
pass with the published run's settings (16,384 latents, k 100); and `published, sized`, the same with the dictionary, k
and step that suit so few activations, which isolates the recipe from the size. --set gives a setting to all ways.

Writes benchmarks/results/<--name>.json and .md after every way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.runtime.errors import report_errors

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore

WAYS = ("batchtopk", "l1", "partition", "difference-sae", "published", "published, sized")
HEADER = (
    "way", "latents", "k", "steps", "passes", "EV instruct", "EV fine-tuned", "EV difference", "L0", "dead",
    "instruct-only", "shared", "fine-tuned-only", "between", "s",
)  # fmt: skip


def main() -> None:
    from crosscoder.activations.store import ActivationStore

    args = parse_arguments()
    store = ActivationStore(args.activations, device=args.device)
    outcomes: dict[str, Any] = {}
    for way in args.ways:
        outcomes[way] = outcome(way, store, args)
        text = table(outcomes)
        settings = {"ways": args.ways, "set": args.set, "device": args.device}
        about = {"activations": store.config.recorded, "n_tokens": len(store), "settings": settings}
        write_record(args.name, about | {"outcomes": outcomes}, text, args.output_dir)
        print(text.splitlines()[-1], flush=True)
    print(table(outcomes))


def outcome(way: str, store: ActivationStore, args: argparse.Namespace) -> dict[str, Any]:
    """Train one dictionary and report on it as train.py does."""
    import torch

    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.report import crosscoder_report
    from crosscoder.training.trainer import Trainer

    crosscoder, training = settings_of(way, store, dict(args.set))
    generator = torch.Generator().manual_seed(training.seed)
    model = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(
            model, store, training, Path(folder), lambda record: records.append(record._asdict()), device=args.device
        )
        run.fit()
    seconds = time.perf_counter() - started
    report = crosscoder_report(model, store, run.split, records)
    return {
        "crosscoder": asdict(crosscoder),
        "training": asdict(training),
        "steps": run.total_steps,
        "seconds": round(seconds, 1),
        "difference_weight": run.difference_weight,
        "report": asdict(report) | {"held_out": report.held_out._asdict(), "training": report.training._asdict()},
    }


def settings_of(way: str, store: ActivationStore, given: dict[str, Any]) -> tuple[Any, Any]:
    """The configurations of a way; `given` stands."""
    from crosscoder.training.sizing import PUBLISHED, sized_configs

    n_tokens = len(store.split(0.1, 0).train)
    method: Any = "batchtopk"
    if way == "published":
        given = PUBLISHED | given
    elif way == "published, sized":
        sizes = ("n_latents", "k", "batch_size")
        given = {name: value for name, value in PUBLISHED.items() if name not in sizes} | given
    else:
        method = way
    return sized_configs(store.config.d_model, n_tokens, method, **given)


def table(outcomes: dict[str, Any]) -> str:
    rows = []
    for way, of in outcomes.items():
        held_out, classes = of["report"]["held_out"], of["report"]["classes"] or {}
        explained = [held_out[part] for part in ("instruct", "fine_tuned", "difference")]
        shape, training = of["crosscoder"], of["training"]
        rows.append(
            (
                way,
                f"{shape['n_latents']:,}",
                f"{shape['k']} + {shape['k_delta']}" if shape["k_delta"] else shape["k"],
                f"{of['steps']:,}",
                f"{training['epochs']:g}",
                *("-" if value is None else f"{value:.4f}" for value in explained),
                f"{held_out['l0']:.1f}",
                f"{of['report']['dead_share']:.1%}",
                *(classes.get(kind, "-") for kind in ("instruct-only", "shared", "fine-tuned-only", "between")),
                f"{of['seconds']:.0f}",
            )
        )
    return markdown_table(HEADER, rows)


def setting(text: str) -> tuple[str, int | float | str]:
    """`name=value`: a field of CrosscoderConfig or TrainingConfig."""
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("activations", type=Path, help="folder of the activation set")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    add("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="a setting for all ways")
    add("--device", default="cpu")
    add("--name", default="defaults", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
