"""The dictionaries of the study: every method, seed and pair, trained side by side on the cores there are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from crosscoder.dictionaries.checkpoint import load_dictionary
from finqa.runtime.manifest import write_json
from study.pocket.ceilings import published_target
from study.pocket.pairs import activations, site_name
from study.pocket.plan import METHODS, Form, Method, Pair, Plan
from study.work import Work, in_parallel, read_json

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

QUALITY_FILE = "quality.json"


@dataclass(frozen=True)
class Dictionary:
    """One training."""

    pair: Pair
    target: Target
    method: Method
    form: Form = "trained"

    @property
    def name(self) -> str:
        method = f"{self.method} {self.form}".removesuffix(" trained").lower().replace(" ", "-")
        return f"{self.pair.slug}-layer{self.target.layer}-{self.target.site}-{method}-s{self.pair.seed}"

    @property
    def described(self) -> dict[str, Any]:
        """The columns that say which one it is, in every CSV."""
        return {"pair": self.pair.name, "site": site_name(self.target), "method": self.method, "form": self.form}


def dictionaries(plan: Plan, target: Target) -> list[Dictionary]:
    """All of a plan, the main pair's first, and at the published site too for pairs that ask for it.

    A difference term changes nothing before training, so its untrained form is the plain one's.
    """
    sites = [(pair, target) for pair in plan.pairs]
    if target != published_target():
        sites += [(pair, published_target()) for pair in plan.pairs if pair.published_site]
    return [
        Dictionary(pair, site, method, form)
        for pair, site in sites
        for form in pair.forms
        for method in pair.methods
        if (method, form) != ("difference term", "untrained")
    ]


def targets_of(plan: Plan, pair: Pair, target: Target) -> list[Target]:
    """The sites at which a pair is read."""
    return list(dict.fromkeys(d.target for d in dictionaries(plan, target) if d.pair == pair))


def train_all(work: Work, wanted: Sequence[Dictionary]) -> None:
    """Train what is missing, one process a core, or one after the other on a GPU."""
    missing = [d for d in wanted if not (work.measure(d.name) / QUALITY_FILE).exists()]
    in_parallel(work, "dictionary", train_one, missing, lambda found: f"{_shown(found)}, L0 {found['l0']:.1f}")


def _shown(found: dict[str, Any]) -> str:
    parts = {"both": found["explained_joint"], "difference": found["explained_difference"]}
    return "explained variance " + ", ".join(f"{n} {v:.3f}" for n, v in parts.items() if v is not None)


def train_one(work: Work, dictionary: Dictionary) -> dict[str, Any]:
    """Train a dictionary as its form asks, or go on where a killed run was; returns what it explains, and writes it
    down."""
    import torch

    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.trainer import Trainer
    from finqa.models.students import default_device

    started = time.perf_counter()
    store = open_store(work, dictionary)
    crosscoder, training = settings(store, dictionary, work.plan.steps)
    device = default_device()
    folder = work.dictionary(dictionary.name)
    generator = torch.Generator().manual_seed(training.seed)
    model = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
    trainer = Trainer(model, store, training, folder, checkpoint_every_s=30.0, device=device)
    trainer.fit()
    found = {
        **dictionary.described,
        **quality(model, store, store.split(training.held_out_fraction, training.split_seed).held_out),
        "steps": trainer.steps_done,
        "passes": training.epochs,
        "latents": crosscoder.n_latents,
        "k": crosscoder.k,
        "k_delta": crosscoder.k_delta,
        "seconds": round(time.perf_counter() - started, 1),
        "fingerprint": store.config.recorded["fingerprint"],
        "training": asdict(training),
    }
    write_json(work.measure(dictionary.name) / QUALITY_FILE, found)
    return found


def settings(store: ActivationStore, dictionary: Dictionary, steps: int) -> tuple[CrosscoderConfig, TrainingConfig]:
    """The library's defaults for these activations in the dictionary's form, but for the number of steps; what is
    frozen is not drawn anew."""
    from crosscoder.dictionaries.config import TrainingConfig
    from crosscoder.training.sizing import sized_configs

    n_tokens = len(store.split(TrainingConfig.held_out_fraction, TrainingConfig.split_seed).train)
    method, given = METHODS[dictionary.method]
    d_model = store.config.d_model
    batch = sized_configs(d_model, n_tokens, method, **given)[1].batch_size
    of_form: dict[str, Any] = {
        "untrained": dictionary.form == "untrained",
        "freeze_decoder": dictionary.form == "frozen decoder",
        "draw_anew": None if dictionary.form == "trained" else False,
    }
    given = given | of_form | {"seed": dictionary.pair.seed, "epochs": (steps + 0.5) * batch / n_tokens}
    return sized_configs(d_model, n_tokens, method, **given)


def quality(model: BatchTopKCrosscoder, store: ActivationStore, held_out: Any) -> dict[str, Any]:
    """Explained variance on held-out documents, beside how many latents it takes."""
    from crosscoder.analysis import measures as analysis
    from crosscoder.analysis.statistics import latent_statistics

    explained = analysis.explained_variance(model, (raw for _, raw in store.batches(held_out, 4096)))
    statistics = latent_statistics(model, store, held_out, n_top=1)
    return {
        "explained_instruct": explained.instruct,
        "explained_fine_tuned": explained.fine_tuned,
        "explained_joint": explained.joint,
        "explained_difference": explained.difference,
        "l0": explained.l0,
        "dead_on_held_out": float(statistics.dead.float().mean()),
        "held_out_tokens": explained.n_tokens,
    }


def open_store(work: Work, dictionary: Dictionary) -> ActivationStore:
    from crosscoder.activations.store import ActivationStore

    return ActivationStore(activations(work, dictionary.pair, dictionary.target))


def load(work: Work, dictionary: Dictionary) -> BatchTopKCrosscoder:

    return load_dictionary(work.dictionary(dictionary.name))


def quality_rows(work: Work, wanted: Iterable[Dictionary]) -> list[dict[str, Any]]:
    names = (
        "pair", "site", "method", "form", "explained_instruct", "explained_fine_tuned", "explained_joint",
        "explained_difference", "l0", "dead_on_held_out", "latents", "k", "k_delta", "steps", "passes", "seconds",
    )  # fmt: skip
    found = [read_json(work.measure(d.name) / QUALITY_FILE) for d in wanted]
    return [{name: values[name] for name in names} for values in found]
