"""A crosscoder's training step beside the floor of the hardware, plain code and other implementations, in one run.

    python -m benchmarks.bench_crosscoder                            on one GPU, under eight minutes
    python -m benchmarks.bench_crosscoder --latents 16384 --steps 20 --ev-steps 0
    python -m benchmarks.bench_crosscoder --cpu                      small shapes, the same code
    torchrun --nproc-per-node 2 -m benchmarks.bench_crosscoder --ev-steps 0        the project's steps, by several GPUs

2 x 4,096 inputs, k 100, 4,096 tokens a step. The activations are made up (random directions, each rarely active, plus
noise) and lie in a set on disk as collect_activations.py leaves it. A step is the trainer's: reading its tokens, the
selection over the batch, clipping, Adam, the counts of live latents, the running threshold. How fast a step by hand is
depends on how evenly latents are active, so it is timed after --warm-steps of training.

The floor is five bf16 products of the step's shapes (two to read and write, three for their gradients; the inputs need
none) and Adam's memory traffic, 28 bytes a parameter at the speed of a copy: each measured here. It is that of a dense
step: the sparse kernels go below it, on an H200 from 16,384 latents on.

    by hand                crosscoder/training/gpu/step.py, the set on the GPU
    by hand, from memory   the same, the set in the machine's memory
    + auxiliary            the same as the first with --dead of the latents dead, all of them in the auxiliary loss
    autograd, bf16         what train.py --step autograd does
    autograd, fp32         --step autograd --precision fp32, without TF32: plain code

Other implementations have no crosscoder of this kind in their released packages. The nearest thing that each has is an
autoencoder of both models' activations as one vector of 8,192, with its own loss and clipped Adam:

dictionary-learning, eai-sparsify and sae-lens (benchmarks/parts/other_dictionaries.py). One that cannot be imported is
left out with a word; what each needs on PYTHONPATH stands there.

The last part trains the same dictionary on the same data with bf16 and with fp32 products and compares the explained
variance of held-out documents, which should not differ by more than half a point.

Writes benchmarks/results/crosscoder_step.json and .md after everything that is measured.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.parts.made_up_set import made_up_store
from benchmarks.parts.other_dictionaries import OTHERS
from benchmarks.parts.record import RESULTS, write_record
from benchmarks.parts.step_tables import explained_table, step_table
from benchmarks.parts.timing import timed
from finqa.runtime import parallel
from finqa.runtime.errors import report_errors

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.ranks import Ranks
    from crosscoder.training.step import StepKind
    from crosscoder.training.trainer import Trainer

BYTES_A_PARAMETER = 28
"""Adam with a bf16 gradient: reads gradient 2, weight, two moments 12; writes the last three, and a bf16 copy 14."""
BY_HAND, FROM_MEMORY, AUXILIARY = "by hand", "by hand, from memory", "+ auxiliary"
AUTOGRAD, PLAIN = "autograd, bf16", "autograd, fp32"
OURS = (BY_HAND, FROM_MEMORY, AUXILIARY, AUTOGRAD, PLAIN)


class Bench:
    """What was measured so far, and its record."""

    def __init__(self, args: argparse.Namespace, store: ActivationStore, ranks: Ranks) -> None:
        self.args, self.store, self.ranks = args, store, ranks
        self.steps: dict[int, dict[str, Any]] = {}
        """By latents: floor, and each way's milliseconds and memory, or why there are none."""
        self.explained: dict[str, Any] = {}

    def add(self, n_latents: int, way: str, result: Any) -> None:
        self.steps.setdefault(n_latents, {})[way] = result
        if self.ranks.is_main:
            print(f"{n_latents:,} latents, {way}: {result}", flush=True)
        self.write()

    def write(self) -> str:
        settings = {name: value for name, value in vars(self.args).items() if name != "output_dir"}
        record = {"settings": settings, "steps": self.steps, "explained_variance": self.explained}
        table = step_table(self.steps) + explained_table(self.explained)
        if self.ranks.is_main:
            write_record(self.args.name, record, table, self.args.output_dir)
        return table


def main() -> None:
    from crosscoder.dictionaries.ranks import ranks_from_environment

    args = parse_arguments()
    ranks = ranks_from_environment(parallel.own_device(args.device))  # makes the process's own GPU what `cuda` means
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        # Every process makes the same set for itself.
        store = made_up_store(Path(folder) / "activations", args.tokens, args.d_model, args.device)
        bench = Bench(args, store, ranks)
        for n_latents in args.latents:
            bench.add(n_latents, "floor", floor(n_latents, args))
            for way in args.ways:
                if way == FROM_MEMORY and n_latents != args.latents[0]:
                    continue
                bench.add(n_latents, way, measured(lambda way=way, n=n_latents: ours(way, n, bench), args))
        for other, make in OTHERS.items() if ranks.world == 1 else ():
            n_latents = args.latents[0]
            bench.add(n_latents, other, measured(lambda make=make, n=n_latents: theirs(make, n, bench), args))
        if args.ev_steps:
            compare_precisions(bench)
        table = bench.write()
    if ranks.is_main:
        print(table)


def measured(measure: Callable[[], dict[str, Any]], args: argparse.Namespace) -> dict[str, Any] | str:
    """What `measure` gives, and the memory it took at most; in words why there is nothing."""
    import torch

    from finqa.runtime.errors import UserError

    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        result: dict[str, Any] | str = measure()
        if on_gpu and isinstance(result, dict):
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    except torch.cuda.OutOfMemoryError:
        result = "out of memory"
    except ImportError as error:
        result = f"not installed ({error})"
    except UserError as error:
        result = str(error)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return result


# The project's steps


def ours(way: str, n_latents: int, bench: Bench) -> dict[str, Any]:
    """Milliseconds of a step of the trainer, and steps that were timed."""
    args = bench.args
    by_hand = way in (BY_HAND, FROM_MEMORY, AUXILIARY)
    bench.store.move("gpu" if args.device == "cuda" and way != FROM_MEMORY else "memory", args.device)
    steps = args.steps if by_hand else max(1, args.steps // 4)
    warm = args.warm_steps if by_hand else 3
    with tempfile.TemporaryDirectory() as folder:
        precision = "fp32" if way == PLAIN or args.device == "cpu" else "bf16"
        run = trainer_of(n_latents, bench, Path(folder), "by-hand" if by_hand else "autograd", precision, warm + steps)
        if way == AUXILIARY:
            hold_dead(run, args.dead)
        run.begin()
        with run.batches() as batches:
            raws = (raw for _, raw in batches)
            take(run.step, raws, warm)
            return {"ms": timed(lambda: take(run.step, raws, steps)) / steps, "steps": steps, "warm_steps": warm}


def trainer_of(
    n_latents: int, bench: Bench, folder: Path, step: StepKind, precision: Any, steps: int, **settings: Any
) -> Trainer:
    """A run of so many steps, from the same weights whichever way they are taken; no latent is ever dead."""
    import torch

    from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from crosscoder.training.trainer import Trainer

    args = bench.args
    torch.manual_seed(0)
    with torch.device(args.device):
        model = BatchTopKCrosscoder(CrosscoderConfig(args.d_model, n_latents, args.k))
    n_train = len(bench.store.split(TrainingConfig.held_out_fraction, TrainingConfig.split_seed).train)
    config = TrainingConfig(
        batch_size=args.batch,
        epochs=(steps + 0.5) * args.batch / n_train,
        learning_rate=args.learning_rate,
        precision=precision,
        dead_after_tokens=10**12,
        draw_anew=False,
        decoder_bias="zero",
        **settings,
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    how: dict[str, Any] = {"device": args.device, "step": step, "log_every": 10**9, "ranks": bench.ranks}
    return Trainer(model, bench.store, config, folder, **how)


def hold_dead(run: Trainer, share: float) -> None:
    """A share of the latents is in the auxiliary loss at every step, whether it fires or not."""
    import torch

    from crosscoder.training.dead_latents import DeadLatents

    n_latents = run.model.config.n_latents
    mask = torch.zeros(n_latents, dtype=torch.bool, device=run.device)
    mask[torch.randperm(n_latents, device=run.device)[: int(share * n_latents)]] = True

    class HeldDead(DeadLatents):
        @property
        def dead(self) -> Tensor:
            return mask

    run.dead_latents = HeldDead(n_latents, run.dead_latents.window, run.device)


def compare_precisions(bench: Bench) -> None:
    """Explained variance of held-out documents after the same run with products of either precision."""
    from crosscoder.analysis.measures import explained_variance

    args = bench.args
    ways: dict[str, tuple[StepKind, str]] = {
        "by hand, bf16": ("by-hand", "bf16"), "by hand, fp32": ("by-hand", "fp32"),
        AUTOGRAD: ("autograd", "bf16"), PLAIN: ("autograd", "fp32"),
    }  # fmt: skip
    bench.store.move("auto", args.device)
    for way, (step, precision) in ways.items():

        def measure(step: StepKind = step, precision: str = precision) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                run = trainer_of(args.latents[0], bench, Path(folder), step, precision, args.ev_steps)
                model = run.fit()
                held_out = bench.store.batches(run.split.held_out, 4096)
                return explained_variance(model, (raw for _, raw in held_out))._asdict()

        bench.explained[way] = measured(measure, args)
        print(f"{way}: {bench.explained[way]}", flush=True)
        bench.write()


# Others


def theirs(make: Callable[..., Callable[[Tensor], object]], n_latents: int, bench: Bench) -> dict[str, Any]:
    args = bench.args
    step = make(n_latents, args)
    bench.store.move("gpu" if args.device == "cuda" else "memory", args.device)
    scale = float(sum(bench.store.config.activation_scales)) / 2

    def batches() -> Iterator[Tensor]:
        from crosscoder.activations.feed import ShuffledOrder

        order = ShuffledOrder(bench.store.split(0.1, 0).train, args.batch, 0)
        for number in count():
            yield bench.store.read(order.batch(number)).to(args.device).flatten(1).float() * scale

    raws, steps = batches(), max(1, args.steps // 4)
    take(step, raws, 3)
    return {"ms": timed(lambda: take(step, raws, steps)) / steps, "steps": steps, "warm_steps": 3}


# The floor and the clock


def floor(n_latents: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the five products, of Adam's memory traffic, and of both."""
    import torch

    width, device = 2 * args.d_model, args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(args.batch, width, device=device, dtype=dtype)
    weight = torch.randn(n_latents, width, device=device, dtype=dtype)
    latents = torch.randn(args.batch, n_latents, device=device, dtype=dtype)

    def products() -> None:
        _ = x @ weight.t(), latents @ weight
        _ = latents.t() @ x, x @ weight.t(), latents.t() @ x

    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    repeats = 20 if device == "cuda" else 3
    times = {}
    for name, action in (("products", products), ("copy", lambda: target.copy_(source))):
        action()
        times[name] = timed(lambda action=action: [action() for _ in range(repeats)]) / repeats
    adam = 2 * n_latents * width * BYTES_A_PARAMETER / (2 * source.numel() / times["copy"])
    return {"products": times["products"], "adam": adam, "both": times["products"] + adam}


def take(step: Callable[[Tensor], object], raws: Iterator[Tensor], steps: int) -> None:
    for _ in range(steps):
        step(next(raws))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--latents", type=int, nargs="+", help="(default: 16,384 to 131,072)")
    add("--ways", nargs="+", choices=OURS, default=list(OURS), metavar="WAY")
    add("--cpu", action="store_true", help="small shapes, on the CPU")
    add("--d-model", type=int)
    add("--k", type=int)
    add("--batch", type=int, help="tokens a step")
    add("--tokens", type=int, help="in the set")
    add("--steps", type=int, default=40, help="timed; a quarter of it for the slow ways (default: %(default)s)")
    add("--warm-steps", type=int, default=60, help="before those of a step by hand (default: %(default)s)")
    add("--ev-steps", type=int, default=200, help="of the runs whose explained variance is compared; 0 is none")
    add("--dead", type=float, default=0.1, help="share of the latents that is dead, for + auxiliary")
    add("--learning-rate", type=float, default=5e-4)
    add("--scratch", type=Path, help="folder for the set, which is deleted (default: the system's)")
    add("--name", default="crosscoder_step", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.device = "cpu" if args.cpu else "cuda"
    small = {"latents": [128, 256], "d_model": 32, "k": 8, "batch": 128, "tokens": 10_240}
    full = {"latents": [16_384, 32_768, 65_536, 131_072], "d_model": 4096, "k": 100, "batch": 4096, "tokens": 131_072}
    for name, value in (small if args.cpu else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
