"""LoRA fine-tuning at 7B shapes on one GPU: the plain recipe against the project's, step by step, in one run.

    python -m benchmarks.bench_lora [--variants NAME ...] [--rows 320] [--compare-steps 6] [--cap-gb 24]

Random weights in Mistral-7B's shapes, random rows as long as FinQA's, the published adapter (r 512 on q, k, v, o),
8-bit AdamW. Every variant runs the transformers Trainer over the same rows in the same batches. The plain recipe
pads its batches, runs PyTorch's own attention and the head on every position, and compiles nothing.

The first part of each variant (compiling, recording graphs) is timed apart; the epoch is extrapolated from the rest
to 5,929 rows. --compare-steps sets dropout to 0 and puts loss and gradient norm of identical batches side by side.
--cap-gb holds the process to that much GPU memory.

Two libraries stand beside, where they are installed: liger-kernel on the plain recipe (its loss too) and on packed
rows, and torchao's float8 for the frozen base, with one scale a tensor (its default; the project's has one a row).

Writes benchmarks/results/lora_7b*.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.parts.libraries import LIGER, TORCHAO, mistral_put_back, that_run, use_library, versions
from benchmarks.parts.mistral_7b import SHAPES, TRAIN_ROWS, TRAIN_TOKENS, random_mistral_7b, random_rows
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.models.settings import DEFAULTS
from finqa.models.students import StudentRun
from finqa.runtime.errors import report_errors
from finqa.training.fine_tuning import TrainingConfig
from finqa.training.trainable import Speed

EAGER = Speed(packed=True, compiled=False, captured=False)
COMPILED = replace(EAGER, compiled=True)


@dataclass(frozen=True)
class Variant:
    rows: int
    """Rows an update."""
    speed: Speed | None = None
    """None: the plain recipe."""
    load_in_4bit: bool = False
    package: str = ""
    """Kernels of Liger, or a frozen base in torchao's float8, in place of the project's own."""


VARIANTS = {
    "8 rows, plain": Variant(8),
    "8 rows, packed": Variant(8, EAGER),
    "8 rows, + compiled layers": Variant(8, COMPILED),
    "8 rows, + fp8 base": Variant(8, replace(COMPILED, fp8_base=True)),
    "8 rows, liger": Variant(8, package=LIGER),
    "8 rows, packed, liger": Variant(8, EAGER, package=LIGER),
    "8 rows, + torchao fp8 base": Variant(8, COMPILED, package=TORCHAO),
    "1 row, plain": Variant(1),
    "1 row, packed": Variant(1, EAGER),
    "1 row, + compiled layers": Variant(1, COMPILED),
    "1 row, + CUDA graphs": Variant(1, Speed()),
    "1 row, + fp8 base": Variant(1, Speed(fp8_base=True)),
    "1 row, + fp8 base, no graphs": Variant(1, replace(COMPILED, fp8_base=True)),
    "1 row, liger": Variant(1, package=LIGER),
    "1 row, + torchao fp8 base, no graphs": Variant(1, COMPILED, package=TORCHAO),
    "1 row, + torchao fp8 base": Variant(1, Speed(), package=TORCHAO),
    "1 row, 4-bit": Variant(1, Speed(captured=False), load_in_4bit=True),
    "1 row, checkpointing": Variant(1, Speed(captured=False, checkpointing=True)),
    "1 row, 4-bit, checkpointing": Variant(1, Speed(captured=False, checkpointing=True), load_in_4bit=True),
}


def main() -> None:
    args = parse_arguments()
    names = that_run(args.variants, {name: variant.package for name, variant in VARIANTS.items()})
    import torch

    if args.cap_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gb * 1e9 / total))
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = measure(VARIANTS[name], args)
        except torch.cuda.OutOfMemoryError as error:
            results[name] = {"out_of_memory": str(error).split(". ")[0]}
        print(name, {key: value for key, value in results[name].items() if key != "log"}, flush=True)
        report(results, args)  # after every variant: a run that is cut short has what was measured
        torch.cuda.synchronize()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(report(results, args))


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    used = versions(VARIANTS[name].package for name in results)
    settings = {name: getattr(args, name) for name in ("rows", "layers", "optim", "cap_gb")}
    settings["lora_dropout"] = args.dropout
    table = comparison(results) if args.compare_steps else speeds(results)
    write_record(args.name, {**settings, "libraries": used, "variants": results}, table, args.output_dir)
    return table


def measure(variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """Train for `--rows` rows (or `--compare-steps` updates); the figures of one variant."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    steps = args.compare_steps or args.rows // variant.rows
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mistral_put_back():
        trainer = make_trainer(variant, args, Path(folder), steps)
        timing = timing_callback(trainer)
        trainer.add_callback(timing)
        setup_s = time.perf_counter() - started
        trainer.train()
    torch.cuda.synchronize()
    result = {
        "steps": steps,
        "setup_s": round(setup_s, 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "reserved_memory_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1),
        "log": [
            {key: record[key] for key in ("step", "loss", "grad_norm")}
            for record in trainer.state.log_history
            if "grad_norm" in record
        ],
    }
    return result if args.compare_steps else {**result, **timing.figures(args.warm_share, variant.rows)}


def make_trainer(variant: Variant, args: argparse.Namespace, folder: Path, steps: int) -> Any:
    from datasets import Dataset

    from finqa.training import fine_tuning as training

    dropout = 0.0 if args.compare_steps else args.dropout
    settings = replace(DEFAULTS, batch_size=variant.rows, lora_dropout=dropout, optim=args.optim)
    run = StudentRun("FinQA", "random-7b", settings, load_in_4bit=variant.load_in_4bit)
    base = random_mistral_7b(args.layers)
    if variant.load_in_4bit:
        base = in_4_bit(base)
    use_library(variant.package, base, own_loss=variant.speed is None)
    config = TrainingConfig(speed=variant.speed or Speed())
    rows: Any = random_rows(args.rows)
    rows = Dataset.from_list(rows)
    if variant.speed:
        trainer = training.make_trainer(run, config, rows, 0, folder, base)
    else:
        trainer = plain_trainer(run, config, rows, folder, base)
    trainer.args.max_steps = steps
    trainer.args.save_strategy = "no"
    trainer.args.logging_steps = 1 if args.compare_steps else 10
    return trainer


def in_4_bit(base: Any) -> Any:
    """The model's decoder layers in NF4, as `-F` loads them."""
    import bitsandbytes
    import torch

    nn: Any = bitsandbytes.nn

    for parent in list(base.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                linear = nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                linear.weight = nn.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(parent, name, linear.cuda())
    base.is_loaded_in_4bit = True
    return base


def plain_trainer(
    run: StudentRun, config: TrainingConfig, rows: Any, folder: Path, base: Any, device: str = "cuda", pad_id: int = 0
) -> Any:
    """What one would write first: padded batches with a mask, the model's own loss over every position."""
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    from finqa.training.completion_trainer import CompletionTrainer
    from finqa.training.fine_tuning import multiplies_bf16, training_arguments
    from finqa.training.rows import collator
    from finqa.training.trainable import lora_config

    set_seed(config.seed)
    padded = collator(pad_id)

    def with_mask(examples: Any) -> dict[str, Any]:
        batch = padded(examples)
        lengths = torch.tensor([example["n_tokens"] for example in examples])
        positions = torch.arange(batch["input_ids"].shape[1])
        return {**batch, "attention_mask": (positions < lengths[:, None]).long()}

    base.config.use_cache = False
    trainer: Any = CompletionTrainer(
        model=get_peft_model(base, lora_config(run)),
        args=training_arguments(run, config, len(rows), multiplies_bf16(device), device, folder),
        train_dataset=rows,
        data_collator=with_mask,
    )
    return trainer


def timing_callback(trainer: Any) -> Any:
    import torch
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        """The GPU's clock and the tokens after every update; nothing waits for them."""

        def __init__(self) -> None:
            self.marks: list[tuple[Any, int, int]] = []

        def mark(self) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            graphs = len([g for g in trainer.captured.graphs.values() if g]) if trainer.captured else 0
            self.marks.append((event, trainer.tokens_seen, graphs))

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.mark()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.mark()

        def figures(self, warm_share: float, rows: int) -> dict[str, Any]:
            """Steps of the warm part, and those that recorded a graph, are not counted in the rate."""
            torch.cuda.synchronize()
            first = max(1, round(len(self.marks) * warm_share))
            pairs = [(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)][first:]
            steady = [(a, b) for a, b in pairs if a[2] == b[2]]
            ms = [a[0].elapsed_time(b[0]) for a, b in steady]
            tokens = sum(b[1] - a[1] for a, b in steady)
            rate = tokens / (sum(ms) / 1e3)
            return {
                "first_part_s": round(self.marks[0][0].elapsed_time(self.marks[first][0]) / 1e3, 1),
                "graphs": self.marks[-1][2],
                "steady_steps": len(ms),
                "ms_a_step": round(sum(ms) / len(ms), 1),
                "median_ms_a_step": round(sorted(ms)[len(ms) // 2], 1),
                "tokens_per_second": round(rate),
                "tflops": round(rate * flops_per_token(trainer.model.config.num_hidden_layers) / 1e12, 1),
                "epoch_min": round(TRAIN_TOKENS / rate / 60, 2),
            }

    return Timing()


def flops_per_token(layers: int) -> float:
    """Of the products with weights alone: 4 for a frozen weight, 6 for one of the adapter (attention not counted)."""
    d, inner, kv = SHAPES["hidden_size"], SHAPES["intermediate_size"], 1024
    base = layers * (2 * d * d + 2 * d * kv + 3 * d * inner)
    adapter = layers * DEFAULTS.lora_r * (2 * (d + d) + 2 * (d + kv))
    return 4.0 * base + 6.0 * adapter


def speeds(results: dict[str, Any]) -> str:
    rows = []
    for name, result in results.items():
        if "epoch_min" not in result:
            rows.append((name, "-", "-", "-", "-", "out of memory"))
            continue
        rows.append(
            (
                name, f"{result['ms_a_step']:.0f}", f"{result['tokens_per_second']:,}", f"{result['tflops']:.0f}",
                f"{result['epoch_min']:.1f}", f"{result['peak_memory_gb']:.1f}",
            )
        )  # fmt: skip
    head = ("variant", "ms an update", "tokens/s", "TFLOP/s", f"epoch of {TRAIN_ROWS:,} rows, min", "peak GB")
    return markdown_table(head, rows)


def comparison(results: dict[str, Any]) -> str:
    """Loss and gradient norm of each update, by variant; at last how far they are from the first variant's at most."""
    header = ["update", *results]
    steps = max(len(result.get("log", [])) for result in results.values())
    rows = []
    for step in range(steps):
        logs = [result["log"][step] if step < len(result.get("log", [])) else None for result in results.values()]
        rows.append((step + 1, *(f"{log['loss']:.4f} / {log['grad_norm']:.4f}" if log else "-" for log in logs)))
    rows.append(("apart", *(apart(next(iter(results.values())), result) for result in results.values())))
    return "loss / gradient norm\n\n" + markdown_table(header, rows)


def apart(first: dict[str, Any], other: dict[str, Any]) -> str:
    pairs = list(zip(first.get("log", []), other.get("log", []), strict=False))
    parts = (max(abs(b[key] / a[key] - 1) for a, b in pairs) for key in ("loss", "grad_norm"))
    return " / ".join(f"{part:.2%}" for part in parts) if pairs else "-"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--rows", type=int, default=320, help="training rows of each variant (default: %(default)s)")
    parser.add_argument("--warm-share", type=float, default=0.3, help="of the updates, not counted in the rate")
    parser.add_argument("--compare-steps", type=int, default=0, help="so many updates with dropout 0, side by side")
    parser.add_argument("--dropout", type=float, default=DEFAULTS.lora_dropout)
    parser.add_argument("--optim", default=DEFAULTS.optim, help="(default: %(default)s, which needs bitsandbytes)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cap-gb", type=float, default=0.0)
    parser.add_argument("--name", default="lora_7b", help="of the record (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
