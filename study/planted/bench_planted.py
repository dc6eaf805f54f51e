"""Which method finds rare, weak features that fine-tuning added? Planted, so the answer is known.

    python -m study.planted.bench_planted                       all methods, two magnitudes, three seeds
    python -m study.planted.bench_planted --methods crosscoder 'difference SAE' --seeds 0 --tokens 20000

A narrow fine-tune in small: many features that both models share, a little stronger in the fine-tuned one, and eight
that it has alone, rare and weak. Every method gets the same tokens, steps and number of active latents, and its
settings by one rule that does not know what was added: of the learning rates (and coefficients of L1) that leave about
K latents active, those that explain most of the held-out difference on tokens of two models without an added feature. A
planted feature is found where a latent that claims to be exclusive has its direction (cosine at least 0.9); precision
is the share of claiming latents that have one.
What claims: in a crosscoder the latents that Delta calls fine-tuned-only; beside it the same after latent scaling; in a
partition every delta latent, in a difference SAE every latent, if it is active on some held-out token. Most claims are
made by a method that claims everything: read the two figures together.

Writes benchmarks/results/planted.json and planted.md. There is no pass mark.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.parts.record import markdown_table, write_record
from finqa.runtime.errors import report_errors

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from study.planted.planted_activations import Kind, Planted

D_MODEL, N_SHARED, N_ADDED = 64, 96, 8
SHARED_FREQUENCY, ADDED_FREQUENCY = 0.04, 0.01
MAGNITUDES = (0.45, 0.7)
"""Magnitudes of the added features; the shared ones have 1."""
DRIFT, NOISE = 1.15, 0.01
"""Strength of a shared feature in the fine-tuned model; standard deviation of each number's noise."""
N_LATENTS, BATCH, EPOCHS = 192, 256, 10.0
K, NEAR_K = 4, 0.25
"""Mean active latents of every method, and the share by which L0 may be off."""
RATES = (1e-3, 3e-3, 1e-2)
L1_WEIGHTS = (1.0, 2.0, 4.0)
CONTROL_SEED = 1_000
"""Seed of the tokens that settings are chosen on; no run is scored on them."""
FOUND_AT = 0.9
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "crosscoder": ("batchtopk", {"k": K}),
    "crosscoder, joint norm": ("batchtopk", {"k": K, "score_norm": "l2"}),
    "difference term 3": ("batchtopk", {"k": K, "difference_weight": 3.0}),
    "difference term 15": ("batchtopk", {"k": K, "difference_weight": 15.0}),
    "difference term, equal weight": ("batchtopk", {"k": K, "difference_weight": "equal"}),
    "L1": ("l1", {"k": K}),
    "partition": ("partition", {"k": K - 1, "k_delta": 1}),
    "difference SAE": ("difference-sae", {"k": K}),
}
"""Methods by name, with the settings that define each; the rest is chosen. About 3.9 features are active on a token; of
those added, 0.08. In the difference a shared feature is 0.15 strong, a third of an added one of magnitude 0.45."""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    method: str
    magnitude: float
    seed: int
    found: int
    """Added features that were found, by latents that claim to be exclusive."""
    claims: int
    precise: int
    """Claims that have the direction of an added feature."""
    confirmed: int | None
    """Claims that latent scaling confirms; None where it does not apply."""
    confirmed_found: int | None
    found_by_any: int
    """Added features that some latent has the direction of in its fine-tuned (or difference) decoder vector."""
    explained_joint: float | None
    explained_difference: float
    l0: float
    dead_share: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--magnitudes", nargs="+", type=float, default=list(MAGNITUDES))
    parser.add_argument(
        "--learning-rate", type=float, help="of all methods (default: chosen for each by the rule above)"
    )
    parser.add_argument("--passes", type=float, default=EPOCHS, help="over the tokens (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    outcomes = []
    chosen = choose_settings(args)
    for outcome in runs(args, chosen):
        outcomes.append(outcome)
        print(
            f"{outcome.method}, magnitude {outcome.magnitude}, seed {outcome.seed}: {outcome.found} of {N_ADDED} "
            f"found, {outcome.precise} of {outcome.claims} claims right",
            flush=True,
        )
    text = table(outcomes)
    print(text)
    settings = {
        "d_model": D_MODEL,
        "n_shared": N_SHARED,
        "n_added": N_ADDED,
        "drift": DRIFT,
        "noise": NOISE,
        "shared_frequency": SHARED_FREQUENCY,
        "added_frequency": ADDED_FREQUENCY,
        "n_latents": N_LATENTS,
        "batch_tokens": BATCH,
        "epochs": args.passes,
        "tokens": args.tokens,
        "found_at_cosine": FOUND_AT,
        "methods": {name: {"method": METHODS[name][0], **settings} for name, settings in chosen.items()},
    }
    record = {"settings": settings, "outcomes": [asdict(outcome) for outcome in outcomes]}
    path = write_record("planted", record, text, **({"folder": args.results} if args.results else {}))
    print(f"recorded in {path}")


def kinds_of(magnitude: float | None) -> list[Kind]:
    """The planted features; without a magnitude none is added."""
    from study.planted.planted_activations import Kind

    shared = Kind("shared", N_SHARED, (1, DRIFT), SHARED_FREQUENCY)
    return [shared] if magnitude is None else [shared, Kind("added", N_ADDED, (0, 1), ADDED_FREQUENCY, magnitude)]


def choose_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every method's settings, chosen on tokens of two models that differ by no added feature."""
    from study.planted.planted_activations import plant, planted_store

    chosen = {}
    planted = plant(kinds_of(None), args.tokens, D_MODEL, CONTROL_SEED, NOISE)
    with tempfile.TemporaryDirectory() as folder:
        store = planted_store(planted, Path(folder) / "activations")
        for name in args.methods:
            tried = [settings | {"epochs": args.passes} for settings in candidates(name, args.learning_rate)]
            found = []
            for number, settings in enumerate(tried if len(tried) > 1 else []):
                where = Path(folder) / f"{name}-{number}"
                found.append(trained(METHODS[name][0], settings, CONTROL_SEED, store, where)[1])
            chosen[name] = tried[best_of([(f.l0, f.difference) for f in found]) if found else 0]
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in chosen[name].items())}", flush=True)
    return chosen


def candidates(name: str, rate: float | None) -> list[dict[str, Any]]:
    """The settings that a method is tried with."""
    method, own = METHODS[name]
    rates = [{"learning_rate": r} for r in (RATES if rate is None else (rate,))]
    weights: list[dict[str, Any]] = [{"l1_weight": w} for w in L1_WEIGHTS] if method == "l1" else [{}]
    return [own | r | w for r in rates for w in weights]


def best_of(found: Sequence[tuple[float, float]]) -> int:
    """Place of the chosen one among (L0, explained variance of the difference): the most explained of those with about
    K active latents; where there is none, of those nearest to it."""
    off = [max(0.0, abs(l0 - K) / K - NEAR_K) for l0, _ in found]
    return min(range(len(found)), key=lambda i: (off[i], -found[i][1]))


def runs(args: argparse.Namespace, chosen: dict[str, dict[str, Any]]) -> Iterator[Outcome]:
    """One outcome a method, magnitude and seed."""
    from study.planted.planted_activations import plant, planted_store

    for magnitude in args.magnitudes:
        for seed in args.seeds:
            planted = plant(kinds_of(magnitude), args.tokens, D_MODEL, seed, NOISE)
            with tempfile.TemporaryDirectory() as folder:
                store = planted_store(planted, Path(folder) / "activations")
                for method, settings in chosen.items():
                    yield outcome_of(method, settings, magnitude, seed, planted, store, Path(folder) / method)


def trained(
    method: Any, settings: dict[str, Any], seed: int, store: ActivationStore, folder: Path
) -> tuple[BatchTopKCrosscoder, Any, Tensor]:
    """A dictionary, what it explains of the held-out tokens (measures.explained_variance), and these tokens."""
    import torch

    from crosscoder.analysis import measures as analysis
    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.sizing import sized_configs
    from crosscoder.training.trainer import Trainer

    given = {"n_latents": N_LATENTS, "batch_size": BATCH, **settings, "seed": seed}
    crosscoder, training = sized_configs(D_MODEL, len(store), method, **given)
    model = new_dictionary(crosscoder, generator=torch.Generator().manual_seed(seed))
    run = Trainer(model, store, training, folder)
    run.fit()
    held_out = store.read(run.split.held_out)
    return model, analysis.explained_variance(model, held_out.split(4096)), held_out


def outcome_of(
    name: str,
    settings: dict[str, Any],
    magnitude: float,
    seed: int,
    planted: Planted,
    store: ActivationStore,
    folder: Path,
) -> Outcome:
    """Train one dictionary and compare it with what was planted."""
    import torch

    from crosscoder.analysis.latent_scaling import latent_scaling
    from study.planted.planted_activations import best_matches

    method = METHODS[name][0]
    model, explained, held_out = trained(method, settings, seed, store, folder)
    with torch.no_grad():
        active = torch.cat([(model.encode(model.scale(raw)) > 0).any(dim=0)[None] for raw in held_out.split(4096)])
    alive = active.any(dim=0)
    decoder = model.difference_decoder() if method in ("partition", "difference-sae") else model.raw_decoder()[:, 1]
    added = planted.directions[planted.of("added")]
    claims = claims_of(model) & alive
    precise = best_matches(decoder, added)[0] >= FOUND_AT
    confirmed = None
    if method in ("batchtopk", "l1"):
        scaling = latent_scaling(model, held_out.split(4096))
        confirmed = claims & torch.tensor([not scaling.failures(j, own=1) for j in range(N_LATENTS)])

    def found_by(latents: Tensor) -> int:
        chosen = decoder[latents]
        return int((best_matches(added, chosen)[0] >= FOUND_AT).sum()) if len(chosen) else 0

    return Outcome(
        method=name,
        magnitude=magnitude,
        seed=seed,
        found=found_by(claims),
        claims=int(claims.sum()),
        precise=int((claims & precise).sum()),
        confirmed=None if confirmed is None else int(confirmed.sum()),
        confirmed_found=None if confirmed is None else found_by(confirmed),
        found_by_any=found_by(alive),
        explained_joint=explained.joint,
        explained_difference=explained.difference,
        l0=explained.l0,
        dead_share=float((~alive).double().mean()),
    )


def claims_of(model: BatchTopKCrosscoder) -> Tensor:
    """[latent] mask: those that the method itself says belong to what differs."""
    import torch

    from crosscoder.analysis import measures as analysis

    latents = torch.arange(model.config.n_latents)
    if model.config.method in ("partition", "difference-sae"):
        return latents >= (model.config.n_shared if model.config.method == "partition" else 0)
    return analysis.delta(analysis.decoder_norms(model)) > analysis.FINE_TUNED_ONLY_ABOVE


def table(outcomes: list[Outcome]) -> str:
    """One row a method and magnitude: the seeds' counts side by side, precision over all seeds together."""
    header = (
        "method",
        "magnitude",
        f"found of {N_ADDED}",
        "precision",
        "confirmed: found",
        "any latent",
        "EV both",
        "EV difference",
        "L0",
    )
    rows = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        for magnitude in dict.fromkeys(outcome.magnitude for outcome in outcomes):
            of = [o for o in outcomes if (o.method, o.magnitude) == (method, magnitude)]
            claims, precise = sum(o.claims for o in of), sum(o.precise for o in of)
            joint = [o.explained_joint for o in of if o.explained_joint is not None]
            confirmed = [o.confirmed_found for o in of if o.confirmed_found is not None]
            rows.append(
                (
                    method,
                    magnitude,
                    ", ".join(str(o.found) for o in of),
                    f"{precise / claims:.2f} of {claims}" if claims else "no claim",
                    ", ".join(map(str, confirmed)) or "-",
                    ", ".join(str(o.found_by_any) for o in of),
                    f"{sum(joint) / len(joint):.3f}" if joint else "-",
                    f"{sum(o.explained_difference for o in of) / len(of):.3f}",
                    f"{sum(o.l0 for o in of) / len(of):.1f}",
                )
            )
    return markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(report_errors(main))
