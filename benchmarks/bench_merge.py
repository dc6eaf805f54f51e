"""Time and memory of merging an adapter into its base, a matrix at a time in fp32 against the whole base in fp32.

    python -m benchmarks.bench_merge [--layers 12 32]         Mistral-7B's shapes, on any machine
    python -m benchmarks.bench_merge --layers 2 --small       a small model, in seconds

Both ways give the nearest bf16 number to base + scale * B A, and their files are compared by their hashes. The plain
way is that of peft: the base loaded in fp32, merge_and_unload, rounded to bf16. Each runs in a process of its own, on a
base of random weights and an adapter of rank 512 that were just written; what is counted is the largest memory of that
process and the seconds from imported libraries to the last file. A way that would need more than the memory that is
free is left out.

Writes benchmarks/results/merge.json and .md after every number of layers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench_collect import SMALL
from benchmarks.parts.made_up_model import write_model, write_random_adapter
from benchmarks.parts.mistral_7b import SHAPES, random_mistral_7b
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.runtime.errors import report_errors
from finqa.runtime.manifest import file_hash
from finqa.runtime.memory.free import free_memory
from finqa.runtime.paths import REPOSITORY

PROJECT, PLAIN = "a matrix at a time", "the whole base in fp32"


def main() -> None:
    args = parse_arguments()
    if args.one:
        print(json.dumps(merge_here(*args.one)))
        return
    measured: dict[str, Any] = {}
    table = ""
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            measured[str(layers)] = both_ways(Path(scratch), layers, args)
        table = report(measured, args)
    print(table)


def both_ways(scratch: Path, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak memory in bytes, and a hash of what was written, of each way that fits."""
    base, adapter = scratch / "base", scratch / "adapter"
    model = small_model(layers) if args.small else random_mistral_7b(layers, "cpu")
    write_model(model, base)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    shapes = {**SHAPES, **(SMALL if args.small else {}), "num_hidden_layers": layers}
    write_random_adapter(adapter, shapes, args.rank, 2 * args.rank)
    ways: dict[str, Any] = {"parameters": parameters}
    for way, value_bytes in ((PROJECT, 2), (PLAIN, 4)):
        if 1.1 * parameters * value_bytes > free_memory("cpu"):
            print(f"{layers} layers, {way}: does not fit", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.bench_merge", "--one", way, str(scratch)]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        merged = scratch / "merged"
        ways[way] = json.loads(done.stdout.splitlines()[-1])
        ways[way]["files"] = [file_hash(path) for path in sorted(merged.glob("*.safetensors"))]
        shutil.rmtree(merged)
        print(f"{layers} layers, {way}: {ways[way]['seconds']} s, {ways[way]['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return ways


def small_model(layers: int) -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shapes: dict[str, Any] = {**SHAPES, **SMALL, "num_hidden_layers": layers}
    return MistralForCausalLM(MistralConfig(**shapes)).bfloat16()


def merge_here(way: str, scratch: str) -> dict[str, Any]:
    """Merge by `way` in this process; seconds, and the most memory that it ever had."""
    import torch

    from finqa.models.merging import merge
    from finqa.models.students import load_adapter, load_base

    base, adapter, merged = (Path(scratch) / name for name in ("base", "adapter", "merged"))
    started = time.perf_counter()
    if way == PROJECT:
        merge(str(base), adapter, merged)
    else:
        pair: Any = load_adapter(load_base(str(base), torch.float32, "cpu"), adapter)
        pair.merge_and_unload().to(torch.bfloat16).save_pretrained(merged, max_shard_size="5GB")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak_memory()}


def peak_memory() -> int:
    """The most bytes that this process ever held. (What getrusage says may be the most of its parent.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def report(measured: dict[str, Any], args: argparse.Namespace) -> str:
    """Write the record of what was measured so far; returns its table."""
    rows = []
    for layers, ways in measured.items():
        weights = 2 * ways["parameters"]
        alike = PLAIN in ways and ways[PLAIN]["files"] == ways[PROJECT]["files"]
        for way in (PROJECT, PLAIN):
            if way not in ways:
                rows.append((layers, way, f"{weights / 1e9:.1f}", "does not fit", "", ""))
                continue
            peak = ways[way]["peak_bytes"]
            same = ("yes" if alike else "NO") if PLAIN in ways else "not compared"
            rows.append((layers, way, f"{weights / 1e9:.1f}", f"{peak / 1e9:.1f}", ways[way]["seconds"], same))
    head = ("layers", "way", "weights in bf16, GB", "peak memory, GB", "s", "same bytes")
    table = markdown_table(head, rows)
    record = {"small": args.small, "rank": args.rank, "layers": measured}
    write_record(args.name, record, table, args.output_dir)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[12, 32], help="one after the other (default: 12 32)")
    add("--small", action="store_true", help="small matrices")
    add("--rank", type=int, default=512, help="of the adapter (default: %(default)s)")
    add("--scratch", type=Path, help="folder for base and merged model (default: the system's)")
    add("--name", default="merge", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    add("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
