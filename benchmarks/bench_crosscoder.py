"""A crosscoder's training step on one GPU: beside the floor that the hardware sets, and beside plain code, in one run.

    python -m benchmarks.bench_crosscoder [--latents 16384 32768 65536 131072] [--steps 40]

2 x 4,096 inputs, k 100, 4,096 tokens a step, activations drawn at random from a store on the GPU (its reading is part
of a step, as are selection and clipping). The data: random directions, each rarely active, plus noise; speed depends
on how evenly latents are active, so every way starts from the same weights, first trained for --warm-steps.

The floor is five bf16 products of the step's shapes (two to read and write, three for their gradients; the inputs
need none) and Adam's memory traffic, 28 bytes a parameter at the speed of a copy: each measured here.

    plain fp32     autograd, fp32 products, torch's Adam
    autocast       autograd, bf16 products, fused Adam: crosscoder.trainer
    by hand        crosscoder.gpu_step
    + auxiliary    the same with --dead of the latents dead, in the auxiliary loss

Writes benchmarks/results/crosscoder_step.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import RESULTS, markdown_table, write_record
from finqa.errors import report_errors

if TYPE_CHECKING:
    from torch import Tensor

BYTES_A_PARAMETER = 28
"""Adam with a bf16 gradient: reads gradient 2, weight, two moments 12; writes the last three, and a bf16 copy 14."""
AUX_WEIGHT = 1 / 32


def main() -> None:
    args = parse_arguments()
    results: dict[str, Any] = {}
    for n_latents in args.latents:
        results[str(n_latents)] = measure(n_latents, args)
        print(n_latents, results[str(n_latents)], flush=True)
        report(results, args)
    print(report(results, args))


def measure(n_latents: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step of every way, and the floor, for one size of the dictionary."""
    import torch

    store = made_up_activations(args.tokens, args.d_model)
    result: dict[str, Any] = {"floor": floor(n_latents, args)}
    ways: dict[str, Callable[[], Callable[[Tensor], None]]] = {
        "by hand": lambda: by_hand(n_latents, args, 0.0),
        "+ auxiliary": lambda: by_hand(n_latents, args, args.dead),
        "autocast": lambda: by_autograd(n_latents, args, torch.bfloat16),
        "plain fp32": lambda: by_autograd(n_latents, args, None),
    }
    for name, make in ways.items():
        if name not in args.ways:
            continue
        try:
            result[name] = timed(make(), store, args)
        except torch.cuda.OutOfMemoryError:
            result[name] = None
        gc.collect()
        torch.cuda.empty_cache()
    return result


def made_up_activations(n_tokens: int, d_model: int) -> Tensor:
    """[tokens, 2, d_model] bf16 of mean norm sqrt(d_model), on the GPU: 32 of 20,000 directions a token, and noise."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    directions = torch.randn(20_000, d_model, device="cuda", generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    parts = []
    for _ in range(0, n_tokens, 4096):
        # Some directions are common and most are rare, as features are.
        which = (20_000 * torch.rand(4096, 32, device="cuda", generator=generator) ** 2).long()
        strength = torch.rand(4096, 32, 1, device="cuda", generator=generator)
        x = (directions[which] * strength).sum(1)
        pair = torch.stack([x, x], 1) + 0.01 * torch.randn(4096, 2, d_model, device="cuda", generator=generator)
        parts.append((pair * d_model**0.5 / pair.norm(dim=-1).mean()).bfloat16())
    return torch.cat(parts)[:n_tokens]


def fresh(n_latents: int, args: argparse.Namespace) -> tuple[Any, Any]:
    """A model, and Adam over its parameters."""
    import torch

    from crosscoder.config import CrosscoderConfig
    from crosscoder.model import BatchTopKCrosscoder

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = BatchTopKCrosscoder(CrosscoderConfig(args.d_model, n_latents, args.k))
    return model, torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)


def by_hand(n_latents: int, args: argparse.Namespace, dead_share: float) -> Callable[[Tensor], None]:
    import torch

    from crosscoder.training.gpu_step import GpuStep

    model, adam = fresh(n_latents, args)
    step = GpuStep(model, adam, "mse", max_grad_norm=1.0)
    dead = torch.randperm(n_latents, device="cuda")[: int(dead_share * n_latents)] if dead_share else None

    def run(raw: Tensor) -> None:
        step(raw, args.learning_rate, dead, args.d_model // 2, AUX_WEIGHT)

    return run


def by_autograd(n_latents: int, args: argparse.Namespace, dtype: Any) -> Callable[[Tensor], None]:
    import torch

    from crosscoder.training.losses import reconstruction_loss

    model, adam = fresh(n_latents, args)
    torch.backends.cuda.matmul.allow_tf32 = False

    def run(raw: Tensor) -> None:
        x = model.scale(raw)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            selection = model.select_batch_topk(model.activations(x))
            loss = reconstruction_loss(x, model.decode(selection.values), "mse")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return run


def timed(run: Callable[[Tensor], None], store: Tensor, args: argparse.Namespace) -> float:
    """Milliseconds a step after the warm steps, the reading of its tokens included."""
    import torch

    generator = torch.Generator("cuda").manual_seed(1)
    marks = []
    for number in range(args.warm_steps + args.steps + 1):
        if number >= args.warm_steps:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        run(store[torch.randint(len(store), (args.batch,), device="cuda", generator=generator)])
    torch.cuda.synchronize()
    return round(marks[0].elapsed_time(marks[-1]) / args.steps, 3)


def floor(n_latents: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the five products, of Adam's memory traffic, and of both."""
    import torch

    width = 2 * args.d_model
    x = torch.randn(args.batch, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n_latents, width, device="cuda", dtype=torch.bfloat16)
    latents = torch.randn(args.batch, n_latents, device="cuda", dtype=torch.bfloat16)

    def products() -> list[Tensor]:
        encode, decode = x @ weight.t(), latents @ weight
        to_decoder, to_values, to_encoder = latents.t() @ x, x @ weight.t(), latents.t() @ x
        return [encode, decode, to_decoder, to_values, to_encoder]

    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = repeated(lambda: target.copy_(source), 20)
    products_ms = repeated(products, 20)
    adam_ms = 2 * n_latents * width * BYTES_A_PARAMETER / (2 * source.numel() / copy_ms)
    return {"products": products_ms, "adam": adam_ms, "both": products_ms + adam_ms}


def repeated(action: Callable[[], object], count: int) -> float:
    """Milliseconds a call, after three that are not counted."""
    import torch

    for _ in range(3):
        action()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    header = ("latents", "floor ms", "of it products", *(f"{way} ms" for way in args.ways), "by hand / floor")
    rows = []
    for n_latents, result in results.items():
        low = result["floor"]
        times = ["out of memory" if result.get(way) is None else f"{result[way]:.2f}" for way in args.ways]
        ratio = f"{result['by hand'] / low['both']:.2f}" if result.get("by hand") else "-"
        rows.append((f"{int(n_latents):,}", f"{low['both']:.2f}", f"{low['products']:.2f}", *times, ratio))
    table = markdown_table(header, rows)
    write_record(args.name, {"settings": vars(args) | {"output_dir": ""}, "ms": results}, table, args.output_dir)
    return table


WAYS = ("plain fp32", "autocast", "by hand", "+ auxiliary")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[16_384, 32_768, 65_536, 131_072])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--tokens", type=int, default=200_000, help="in the store")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-steps", type=int, default=60)
    parser.add_argument("--dead", type=float, default=0.1, help="share of the latents that is dead, for + auxiliary")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--name", default="crosscoder_step", help="of the record (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
