"""Recording a pair at a site, choosing the settings of every method, and training with them.

Settings are chosen on the base and control K, which has none of the metrics: of each method the learning rate, at the
smallest size and the middle k, then size and k, then how many passes, by the explained variance of the difference on
held-out documents, with thresholds that leave equally many latents active. Dictionaries are read by such thresholds
ever after.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from crosscoder.names import ActivationChoice
from finqa.models import students
from finqa.runtime.commands import CROSSCODER_FOLDER, run_into
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.progress import StepProgress
from study.invented.diff.plan import GAIN, METHODS, Compared, Form, Subject, equal_l0, lengths, site_name, slug
from study.invented.files import DOCUMENTS
from study.invented.gates import all_gates
from study.invented.plan import Plan
from study.work import read_json

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

L1_PRICE, L1_PRICE_AT, L1_PRICE_FALL = 0.7, 25, 0.85
"""The library's L1 coefficient leaves about 25 latents active; it falls by this power of how many there shall be."""


@dataclass(frozen=True)
class Settings:
    """What is chosen for a method."""

    n_latents: int
    k: int
    rate: float
    """Learning rate over the library's default for the size."""
    passes: int
    """Over the documents."""

    @property
    def name(self) -> str:
        return f"{self.n_latents}-k{self.k}-x{self.rate:g}-{self.passes}"


@dataclass(frozen=True)
class Chosen:
    """What a method is trained with."""

    settings: Settings
    converged: bool
    """Whether twice the passes change the explained variance of the difference by less than GAIN."""


@dataclass(frozen=True)
class Trained:
    """A dictionary and how it came out."""

    model: BatchTopKCrosscoder
    quality: dict[str, Any]


def recording(plan: Plan, compared: Compared, target: Target) -> ActivationChoice:
    n = 24 * plan.sizes.documents
    return ActivationChoice(plan.student(compared.run), num_samples=n, layer=target.layer, site=target.site)


def recorded(plan: Plan, compared: Compared, target: Target) -> Path:
    """Folder of a pair's activations at a site, on all documents; recorded where they are not there."""
    choice, folders = recording(plan, compared, target), plan.place.part(DOCUMENTS)
    folder = folders.activations(choice.name)
    if not (folder / "config.json").exists():
        log = plan.place.results / "logs" / f"recording-{compared.run}-{site_name(target)}.log"
        run_into(log, f"recording {choice.name}", command_of(choice.command("collect_activations.py", folders)),
                 CROSSCODER_FOLDER)  # fmt: skip
    return folder


def shared_store(plan: Plan, compared: Compared, target: Target) -> ActivationStore:
    """A pair's activations for one of several jobs that read them at a time: read from the files, whose pages they
    share, where each would hold all of them on the GPU."""
    from crosscoder.activations.store import ActivationStore

    return ActivationStore(recorded(plan, compared, target), "disk", students.default_device())


def command_of(typed: str) -> str:
    """A command as it is typed in any folder, as it is run in the crosscoder's: without `python` and the path."""
    return "collect_activations.py" + typed.partition("collect_activations.py")[2]


def folder_of(plan: Plan, compared: Compared, target: Target) -> Path:
    """Folder of the dictionaries of a pair at a site."""
    return plan.place.root / "dictionaries" / site_name(target) / compared.run


def of_pair(plan: Plan, store: ActivationStore, compared: Compared, target: Target, subject: Subject) -> Trained:
    """A dictionary of a pair with the settings of its method, trained where it is not there."""
    chosen = read_settings(plan, subject.method)
    folder, l0 = folder_of(plan, compared, target) / subject.name, equal_l0(lengths(plan))
    made = train(store, subject.method, subject.form, subject.seed, chosen.settings, folder, l0)
    return Trained(made.model, made.quality | {"converged": chosen.converged if subject.form == "trained" else None})


def train(
    store: ActivationStore, method: str, form: Form, seed: int, settings: Settings, folder: Path, l0: int
) -> Trained:
    """Train a dictionary, go on with one that was interrupted, or take the one that is there; `folder` is its own."""
    import torch

    from crosscoder.analysis.measures import explained_variance
    from crosscoder.dictionaries.checkpoint import CONFIG_FILE, load_dictionary, save_dictionary
    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.run_log import progress_line
    from crosscoder.training.sizing import default_learning_rate, sized_configs
    from crosscoder.training.trainer import Trainer

    kind, given = METHODS[method]
    if kind == "l1":
        given = given | {"l1_weight": L1_PRICE * (L1_PRICE_AT / settings.k) ** L1_PRICE_FALL}
    n_tokens = len(store.split(0.1, 0).train)
    crosscoder, training = sized_configs(
        store.config.d_model,
        n_tokens,
        kind,
        **given,
        n_latents=settings.n_latents,
        k=settings.k,
        learning_rate=settings.rate * default_learning_rate(settings.n_latents),
        epochs=float(settings.passes),
        seed=seed,
        untrained=form == "untrained",
        freeze_decoder=form == "frozen",
    )
    device = students.default_device()
    split = store.split(training.held_out_fraction, training.split_seed)
    if (folder / CONFIG_FILE).exists():
        model = load_dictionary(folder).to(device)
    else:
        generator = torch.Generator().manual_seed(seed)
        made = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
        run = Trainer(made, store, training, folder, checkpoint_every_s=30.0, device=device)
        print(f"{folder.name}: {run.total_steps:,} steps", flush=True)
        with closing(StepProgress(run.total_steps)) as progress:
            run.on_log = lambda record: progress.show(record.step, progress_line(record, None))
            model = run.fit()
        read_at(model, store, split.train, l0)
        about = {"training": asdict(training), "activations": store.config.recorded}
        save_dictionary(model, folder, **about)
    explained = explained_variance(model, (raw for _, raw in store.batches(split.held_out)))
    quality = {
        **asdict(settings),
        "passes": settings.passes if form != "untrained" else 0,
        "explained_difference": explained.difference,
        "explained_instruct": explained.instruct,
        "explained_fine_tuned": explained.fine_tuned,
        "l0": explained.l0,
    }
    return Trained(model, quality)


def read_at(model: BatchTopKCrosscoder, store: ActivationStore, indices: Any, l0: int, tokens: int = 131_072) -> None:
    """Set the thresholds so that `l0` latents are active a token in the mean over at most `tokens` of `indices`, each
    group of a method having its share. An L1 dictionary has fewer where no more are positive."""
    from crosscoder.dictionaries.scaling import sample_of
    from crosscoder.dictionaries.threshold import calibrated_threshold

    sample = sample_of(indices, tokens, 0)
    groups = model.groups() or [(slice(None), 1.0)]
    whole = sum(k for _, k in groups)
    found = [calibrated_threshold(model, store, sample, latents, l0 * k / whole) for latents, k in groups]
    if model.groups():
        model.set_thresholds(found)
    else:
        model.threshold = found[0]  # L1 takes every positive latent for its own


def until_converged(train_for: Callable[[int], float], passes: int, most: int) -> tuple[int, bool]:
    """Double the passes until what `train_for` gives changes by less than GAIN; the last passes, and whether it has
    converged: it did so before there were more than `most`, and what it gives is above 0."""
    before = train_for(passes)
    while 2 * passes <= most:
        passes *= 2
        after = train_for(passes)
        if abs(after - before) < GAIN:
            return passes, after > 0
        before = after
    return passes, False


def settings_path(plan: Plan, method: str) -> Path:
    return plan.place.results / "settings" / f"{slug(method)}.json"


def read_settings(plan: Plan, method: str) -> Chosen:
    """What was chosen for a method; UserError where nothing is yet."""
    path = settings_path(plan, method)
    if not path.exists():
        raise UserError(f"{path} is missing; choose settings with: python -m study.invented settings")
    found = read_json(path)
    return Chosen(Settings(**found["chosen"]), found["converged"])


def choose_settings(plan: Plan, control: Compared, target: Target, method: str) -> str:
    """Choose a method's settings on a control fine-tune, once the gates hold; returns a line that says them.

    What was recorded of the control stays for the other methods, and for its own pair where that is read.
    """
    path = settings_path(plan, method)
    if not path.exists():
        check_gates(plan)
        store = shared_store(plan, control, target)
        write_json(path, {"site": site_name(target), **_choice(plan, control, target, store, method)})
    if not lengths(plan).controls and all(settings_path(plan, each).exists() for each in METHODS):
        forget(plan, control, target)
    chosen = read_settings(plan, method)
    return f"{method}: {chosen.settings.name}, {'converged' if chosen.converged else 'not converged'}"


def _choice(plan: Plan, control: Compared, target: Target, store: ActivationStore, method: str) -> dict[str, Any]:
    how_long = lengths(plan)
    tried: dict[Settings, float] = {}

    def explained(settings: Settings) -> float:
        if settings not in tried:
            place = settings_path(plan, f"{method} {settings.name}")
            if not place.exists():
                folder = folder_of(plan, control, target) / "settings" / f"{method}-{settings.name}"
                write_json(place, train(store, method, "trained", 0, settings, folder, equal_l0(how_long)).quality)
                shutil.rmtree(folder)
            tried[settings] = read_json(place)["explained_difference"]
        return tried[settings]

    first = Settings(how_long.latents[0], how_long.ks[len(how_long.ks) // 2], how_long.rates[0], how_long.passes)
    rate = max(how_long.rates, key=lambda rate: explained(replace(first, rate=rate)))
    for n_latents in how_long.latents:
        for k in how_long.ks:
            explained(replace(first, n_latents=n_latents, k=k, rate=rate))
    chosen = best(tried)
    passes, converged = until_converged(
        lambda passes: explained(replace(chosen, passes=passes)), how_long.passes, how_long.most_passes
    )
    return {
        "chosen": asdict(replace(chosen, passes=passes)),
        "converged": converged,
        "explained_difference": {settings.name: value for settings, value in tried.items()},
    }


def best(candidates: dict[Settings, float]) -> Settings:
    """The settings with the largest explained variance; of equal ones the first that was tried."""
    return max(candidates, key=lambda settings: candidates[settings])


def check_gates(plan: Plan) -> None:
    """UserError where a gate does not hold, but in a rehearsal: no dictionary is trained before they do."""
    if plan.is_rehearsal:
        return
    tokenizer = students.load_tokenizer(plan.model)
    gates = all_gates(plan, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    failed = list(dict.fromkeys(f"{one.gate} ({one.model})" for one in gates if not one.holds))
    if failed:
        raise UserError(
            f"{len(failed)} gates do not hold, or were not measured: {', '.join(failed[:6])}; mend them before a "
            "dictionary is trained (docs/prereg.md says how; where definitions are not followed: --teach-definitions)"
        )


def forget(plan: Plan, compared: Compared, target: Target) -> None:
    """Delete what was recorded of a pair at a site."""
    folders = plan.place.part(DOCUMENTS)
    shutil.rmtree(folders.activations(recording(plan, compared, target).name), ignore_errors=True)
