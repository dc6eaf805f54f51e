"""What it takes to read a trained dictionary: latent scaling and the other passes, beside what no pass can do without.

    python -m benchmarks.bench_reading [--tokens 500000] [--latents 16384]
    python -m benchmarks.bench_reading --small          shapes that a CPU takes

2 x 4,096 inputs, 16,384 latents, k 100, activations made up on the device; a set that is held there, as the store is
where it fits. All in one run, by turns:

    reading            every batch is fetched, and one sum of it is taken
    encoder product    the same, scaled, times the encoder's weights, in the parameters' precision
    encode             with ReLU and selection by the threshold: what every pass starts with
    statistics         reading.statistics: frequencies, largest activations, kinds of tokens
    explained variance reading.analysis
    by kind            reading.token_kinds
    latent scaling     reading.latent_scaling
    everything         the passes of an analysis, without tables and figures: statistics over all tokens, the other
                       three over the held-out tenth

Latent scaling needs three products as large as the encoder's beside it (to decode, and two to sum along the latents),
so that it cannot take less than four encoder products.

Writes benchmarks/results/reading.json and .md after every round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.parts.record import RESULTS, markdown_table, summary, write_record
from finqa.runtime.errors import report_errors

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

SMALL = {"d_model": 64, "latents": 256, "k": 8, "tokens": 3000, "batch": 512, "repeats": 2}
N_DIRECTIONS = 20_000
DOCUMENT_TOKENS = 1000
HELD_OUT_SHARE = 0.1


class HeldTokens:
    """Made-up activations with what the passes ask of a store."""

    def __init__(self, activations: Tensor):
        """[tokens, 2, d_model]."""
        import torch

        self.activations = activations
        self.position = torch.arange(len(activations)) % DOCUMENT_TOKENS

    def __len__(self) -> int:
        return len(self.activations)

    def is_completion(self) -> Tensor:
        return self.position >= DOCUMENT_TOKENS - DOCUMENT_TOKENS // 10

    def batches(self, indices: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in indices.split(batch_size):
            yield chunk, self.activations.index_select(0, chunk.to(self.activations.device))


def main() -> None:
    args = parse_arguments()
    model, store = made_up(args)
    passes = passes_of(model, store, args)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    l0, table = mean_active(model, store, args), ""
    for number in range(args.repeats + 1):
        for name, run in passes.items():
            took = timed(run, args.device)
            if number:  # the first round warms up
                seconds[name].append(took)
                print(f"{name}: {took:.3f} s", flush=True)
        if number:
            table = report(seconds, l0, args)
    print(table)


def made_up(args: argparse.Namespace) -> tuple[BatchTopKCrosscoder, ActivationStore]:
    """An untrained dictionary whose threshold lets k latents a token through on average, and a set of tokens."""
    import torch

    from crosscoder.dictionaries.config import CrosscoderConfig
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

    activations = made_up_activations(args.tokens, args.d_model, args.device)
    generator = torch.Generator().manual_seed(0)
    config = CrosscoderConfig(args.d_model, args.latents, args.k)
    model = BatchTopKCrosscoder(config, generator=generator).to(args.device)
    with torch.no_grad():
        sample = activations[: args.batch]
        # Random latents of random signs all are active on half of the tokens; a threshold does the rest.
        scores = model.activations(model.scale(sample)) * model.selection_norms()
        model.threshold = float(scores.flatten().float().topk(args.k * len(sample)).values[-1])
    # What the passes use of a store is its batches, its length, and which tokens are of a program.
    return model, cast("ActivationStore", HeldTokens(activations))


def made_up_activations(n_tokens: int, d_model: int, device: str) -> Tensor:
    """[tokens, 2, d_model] bf16 of mean norm about sqrt(d_model): 32 directions a token, and noise that tells the
    models apart."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    directions = torch.randn(N_DIRECTIONS, d_model, device=device, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    made = torch.empty(n_tokens, 2, d_model, dtype=torch.bfloat16, device=device)
    for start in range(0, n_tokens, 4096):
        some = made[start : start + 4096]
        # Some directions are common and most are rare, as features are.
        which = (N_DIRECTIONS * torch.rand(len(some), 32, device=device, generator=generator) ** 2).long()
        strength = torch.rand(len(some), 32, 1, device=device, generator=generator)
        x = (directions[which] * strength).sum(dim=1)
        noise = 0.01 * torch.randn(len(some), 2, d_model, device=device, generator=generator)
        some.copy_((x[:, None] + noise) * d_model**0.5 / x.norm(dim=-1).mean())
    return made


def passes_of(
    model: BatchTopKCrosscoder, store: ActivationStore, args: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """Every pass over all tokens, by name."""
    import torch

    from crosscoder.analysis.latent_scaling import latent_scaling
    from crosscoder.analysis.measures import explained_variance
    from crosscoder.analysis.statistics import latent_statistics
    from crosscoder.analysis.token_kinds import KINDS, explained_variance_by_kind

    every = torch.arange(len(store))
    held_out = every[: max(2, round(HELD_OUT_SHARE * len(store)))]
    kinds = torch.randint(len(KINDS), (len(store),), generator=torch.Generator().manual_seed(0))
    weights = model.W_enc.detach().reshape(-1, args.latents)

    def batches(indices: Tensor) -> Iterator[Tensor]:
        return (raw for _, raw in store.batches(indices, args.batch))

    def statistics() -> object:
        return latent_statistics(model, store, every, batch_size=args.batch, kinds=kinds)

    def everything() -> list[object]:
        return [
            statistics(),
            explained_variance(model, batches(held_out)),
            explained_variance_by_kind(model, store, held_out, kinds, args.batch),
            latent_scaling(model, batches(held_out)),
        ]

    @torch.no_grad()
    def encode() -> list[Tensor]:
        return [model.encode(model.scale(raw)).sum() for raw in batches(every)]

    return {
        "reading": lambda: [raw.sum() for raw in batches(every)],
        "encoder product": lambda: [(model.scale(raw).flatten(1) @ weights)[0, 0] for raw in batches(every)],
        "encode": encode,
        "statistics": statistics,
        "explained variance": lambda: explained_variance(model, batches(every)),
        "by kind": lambda: explained_variance_by_kind(model, store, every, kinds, args.batch),
        "latent scaling": lambda: latent_scaling(model, batches(every)),
        "everything": everything,
    }


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds, with all that was put on the device done."""
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def mean_active(model: BatchTopKCrosscoder, store: ActivationStore, args: argparse.Namespace) -> float:
    """Latents a token on the first batch, which is what the threshold was set on."""
    import torch

    with torch.no_grad():
        _, raw = next(store.batches(torch.arange(min(len(store), args.batch)), args.batch))
        return float((model.encode(model.scale(raw)) > 0).sum() / len(raw))


def report(seconds: dict[str, list[float]], l0: float, args: argparse.Namespace) -> str:
    """Write the record, and return its table."""
    medians = {name: summary(times)["median"] for name, times in seconds.items()}
    product = medians["encoder product"]
    rows = [
        (name, f"{s:.3g}", f"{args.tokens / s:,.0f}", f"{s / medians['reading']:.2f}", f"{s / product:.2f}")
        for name, s in medians.items()
    ]
    table = markdown_table(("pass", "s", "tokens/s", "/ reading", "/ encoder product"), rows)
    record = {
        "settings": vars(args) | {"output_dir": ""},
        "mean_active_latents": l0,
        "seconds": {name: summary(times) for name, times in seconds.items()},
        "over_encoder_product": {name: s / product for name, s in medians.items()},
    }
    write_record(args.name, record, table, args.output_dir)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="shapes that a CPU takes, unless one is given")
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=4096, help="tokens a batch")
    parser.add_argument("--repeats", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.add_argument("--name", default="reading", help="of the record (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    if "--small" in sys.argv[1:]:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    if args.device is None:
        from finqa.models.students import default_device

        args.device = default_device()
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
