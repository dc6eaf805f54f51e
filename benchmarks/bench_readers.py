"""What reading activations costs a forward pass: nnsight and plain hooks against a model that is not read, on the CPU.

    python -m benchmarks.bench_readers [--repeats 15]

pocket-mistral in fp32, the MLP output of its default layer. The model that is not read ends after that layer. The three
take turns on the same ids.

Writes benchmarks/results/readers.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.parts.record import RESULTS, markdown_table, summary, write_record
from finqa.runtime.errors import report_errors

BARE = "not read"
SHAPES = ((1, 32), (1, 256), (16, 256))
"""Batch and tokens of a call; the last is what collecting takes on a CPU."""


def main() -> None:
    args = parse_arguments()
    results = measured(args.repeats)
    table = comparison(results)
    write_record("readers", results, table, args.output_dir)
    print(table)


def measured(repeats: int) -> dict[str, Any]:
    """Milliseconds a call of nnsight, hooks, and a model that ends at the layer and is not read, on the CPU."""
    import torch

    from crosscoder.activations.readers import Target, reader
    from crosscoder.names import default_layer
    from finqa.models import students

    def model() -> Any:
        return students.load_base(students.POCKET, torch.float32, "cpu")

    target = Target(default_layer(model().config.num_hidden_layers), "mlp")
    bare = model()
    bare.model.layers = bare.model.layers[: target.layer]
    bare.lm_head = torch.nn.Identity()

    def not_read(ids: Any) -> None:
        with torch.no_grad():
            bare(input_ids=ids, use_cache=False)

    # A model each: nnsight wraps the modules of its own.
    calls = {
        BARE: not_read,
        "hooks": reader(model(), [target], "hooks"),
        "nnsight": reader(model(), [target], "nnsight"),
    }
    shapes = {}
    for batch, length in SHAPES:
        ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call(ids)
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - started)
        shapes[f"{batch} x {length}"] = {name: summary([1e3 * s for s in took]) for name, took in seconds.items()}
        print(
            batch,
            length,
            {name: round(ms["median"], 2) for name, ms in shapes[f"{batch} x {length}"].items()},
            flush=True,
        )
    return {"model": students.POCKET, "layer": target.layer, "ms_a_call": shapes}


def comparison(results: dict[str, Any]) -> str:
    rows = []
    for shape, ms in results["ms_a_call"].items():
        bare = ms[BARE]["median"]
        figures = [f"{ms[name]['median']:.2f}" for name in ms]
        rows.append((shape, *figures, *(f"{ms[name]['median'] / bare:.3f}" for name in ("hooks", "nnsight"))))
    header = ("batch x tokens, median ms a call", BARE, "hooks", "nnsight", "hooks / not read", "nnsight / not read")
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="of each call (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
