"""What every dictionary and baseline found of the known answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from finqa.models import students
from finqa.runtime.manifest import write_json
from study.pocket.ceilings import test_rows
from study.pocket.dictionaries import Dictionary, load, targets_of
from study.pocket.models import adapter, student_of
from study.pocket.pairs import activations, site_name
from study.pocket.plan import BASE, SHAM, SHOWN_STRATUM, STUDENT, Model, Pair
from study.work import Work, in_parallel, read_json

if TYPE_CHECKING:
    import torch

    from crosscoder.activations.collection import Document
    from crosscoder.activations.store import ActivationStore
    from study.measures.probe import ProbeCeiling
    from study.measures.readouts import Subject
    from study.measures.strata import Questions
    from study.measures.token_truth import NextTokens

KNOWN_ANSWER_FILE = "known_answer.json"
READINGS_FILE = "readings.json"
BASELINES = ("PCA of the difference", "random directions", "mean difference", "norm of the difference")
RANDOM_DIRECTIONS = 1024
"""As many as a dictionary has latents."""
HELD_OUT_FRACTION, SPLIT_SEED = 0.1, 0
"""As the dictionaries are trained (config.TrainingConfig's defaults)."""


@dataclass(frozen=True)
class Baseline:
    """What needs no training."""

    pair: Pair
    target: Target
    method: str

    @property
    def name(self) -> str:
        return f"{self.pair.slug}-layer{self.target.layer}-{self.target.site}-{self.method.lower().replace(' ', '-')}"

    @property
    def described(self) -> dict[str, Any]:
        return {"pair": self.pair.name, "site": site_name(self.target), "method": self.method, "form": ""}


Asked = Dictionary | Baseline


def subjects(work: Work, trained: Sequence[Dictionary], target: Target) -> list[Asked]:
    """Everything that is measured, pair by pair, so that a pair's activations are opened once."""
    found: list[Asked] = []
    for pair in work.plan.pairs:
        for site in targets_of(work.plan, pair, target):
            found += [d for d in trained if (d.pair, d.target) == (pair, site)]
            found += [Baseline(pair, site, name) for name in BASELINES]
    return found


@dataclass(frozen=True)
class Group:
    """All that is asked of one pair at one site, by one process: opening the pair takes longer than an answer."""

    name: str
    asked: tuple[Asked, ...]


def answer_all(work: Work, asked: Sequence[Asked]) -> None:
    groups: dict[str, list[Asked]] = {}
    for one in asked:
        if not (work.measure(one.name) / KNOWN_ANSWER_FILE).exists():
            groups.setdefault(f"{one.pair.name}, {site_name(one.target)}", []).append(one)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    in_parallel(work, "known answer", answer_group, [Group(n, tuple(g)) for n, g in largest_first], _shown)


def answer_group(work: Work, group: Group) -> dict[str, Any]:
    started = time.perf_counter()
    read_tokens(work, group.asked[0].pair, group.asked[0].target)
    best: dict[str, int] = {}
    for one in group.asked:
        [of] = [of for of in answer_one(work, one)["strata"] if of["stratum"] == SHOWN_STRATUM]
        best[", ".join(part for part in (one.method, one.described["form"]) if part)] = of["specific_to_added"]
    return {"best": best, "seconds": time.perf_counter() - started}


def _shown(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{method} {n}" for method, n in found["best"].items() if n)
    return f"specific to added families: {counts or 'none'}"


@dataclass(frozen=True)
class Context:
    """What the measures of one pair at one site share."""

    store: ActivationStore
    questions: Questions
    groups: torch.Tensor
    probes: Sequence[ProbeCeiling]
    held_out: torch.Tensor


@lru_cache(maxsize=1)
def context(work: Work, pair: Pair, target: Target) -> Context:
    from crosscoder.activations.store import ActivationStore
    from study.measures.probe import probe_ceilings
    from study.measures.selectivity import halves
    from study.measures.strata import PRIMARY, questions_of
    from study.measures.token_truth import fixed_tokens, token_groups
    from study.wording import finqa_mini_wording

    store = ActivationStore(activations(work, pair, target))
    wording = finqa_mini_wording()
    kinds = {family: "new" if kind in pair.added else "known" for family, kind in wording.kinds.items()}
    rows = test_rows(work)
    questions = questions_of(store, rows, students.load_tokenizer(STUDENT), replace(wording, kinds=kinds))
    documents = all_documents(work)
    predictions = (predicted(work, model) for model in (_without(work, pair), pair.fine_tuned))
    without, fine_tuned = ([tokens.best for tokens in of_model] for of_model in predictions)
    fixed = fixed_tokens(store, without, fine_tuned, [document.ids for document in documents])
    return Context(
        store=store,
        questions=questions,
        groups=token_groups(store, questions, fixed),
        probes=probe_ceilings(store, questions, halves(questions), PRIMARY),
        held_out=store.split(HELD_OUT_FRACTION, SPLIT_SEED).held_out,
    )


def _without(work: Work, pair: Pair) -> Model:
    """The model that fixed tokens are wrong in: the sham in the base's place, so that format is no finding."""
    return SHAM if pair.instruct == BASE and SHAM in work.plan.models else pair.instruct


def all_documents(work: Work) -> list[Document]:
    from crosscoder.activations.collection import documents_from_rows

    return documents_from_rows(test_rows(work), students.load_tokenizer(STUDENT))


def predict_all(work: Work) -> None:
    """Every model's best next tokens on all documents, once."""
    missing = [model for model in work.plan.models if not _predictions_file(work, model).exists()]
    in_parallel(work, "next tokens", _predict, missing, lambda found: f"{found['right']:.1%} of the programs' right")


def _predict(work: Work, model: Model) -> dict[str, float]:
    import torch
    from safetensors.torch import save

    from finqa.runtime.paths import write_atomically
    from study.measures.token_truth import predictions

    started = time.perf_counter()
    documents = all_documents(work)
    loaded: Any = students.load_base(STUDENT, torch.float32)
    if model.run_name is not None:
        loaded = students.load_adapter(loaded, adapter(work, model)).eval()
    found = predictions(loaded, documents)
    tensors = {f"best {i}": tokens.best.int() for i, tokens in enumerate(found)}
    tensors |= {f"log_probs {i}": tokens.log_probs for i, tokens in enumerate(found)}
    write_atomically(_predictions_file(work, model), save(tensors))
    right = total = 0
    for document, tokens in zip(documents, found, strict=True):
        true = torch.tensor(document.ids[document.n_prompt :])
        right += int((tokens.best[document.n_prompt - 1 : -1] == true).sum())
        total += len(true)
    return {"right": right / total, "seconds": time.perf_counter() - started}


def predicted(work: Work, model: Model) -> list[NextTokens]:
    from safetensors.torch import load_file

    from study.measures.token_truth import NextTokens

    table = load_file(_predictions_file(work, model))
    return [NextTokens(table[f"best {i}"].long(), table[f"log_probs {i}"]) for i in range(len(table) // 2)]


def read_tokens(work: Work, pair: Pair, target: Target) -> None:
    """What tells fixed tokens from others without a dictionary, written down: the KL per token between the pair's
    models, and a linear probe on the first model alone."""
    import torch

    from study.measures.selectivity import halves
    from study.measures.token_truth import divergence, probe_on_tokens, tells_fixed

    shared = context(work, pair, target)
    choosing = halves(shared.questions)[shared.store.document]
    first, second = ([tokens.log_probs for tokens in predicted(work, m)] for m in (pair.instruct, pair.fine_tuned))
    vectors = shared.store.read(torch.arange(len(shared.store)))[:, 0].float()
    readings = {
        "KL per token": divergence(shared.store, first, second),
        "linear probe of the first model": probe_on_tokens(vectors, shared.groups, choosing),
    }
    found = {name: asdict(tells_fixed(values, shared.groups, ~choosing)) for name, values in readings.items()}
    write_json(work.measure(Baseline(pair, target, BASELINES[-1]).name) / READINGS_FILE, found)


def reading_rows(work: Work, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """A row a pair, site and reading, for tokens.csv."""
    return [
        {**one.described, "compared": one.pair.compared, "method": name}
        | {column: area[of] for column, of in (("auroc", "value"), ("low", "low"), ("high", "high"))}
        for one in asked
        if one.method == BASELINES[-1]
        for name, area in read_json(work.measure(one.name) / READINGS_FILE).items()
    ]


def _predictions_file(work: Work, model: Model) -> Path:
    name = "base" if model.run_name is None else student_of(model).model_id
    return work.folders.results / "predictions" / f"{name}.safetensors"


def subject_of(work: Work, one: Asked, shared: Context) -> Subject:
    from study.measures import readouts

    if isinstance(one, Dictionary):
        return readouts.dictionary_subject(load(work, one), one.method)
    if one.method == "norm of the difference":
        return readouts.norm_subject()
    train = shared.store.split(HELD_OUT_FRACTION, SPLIT_SEED).train
    if one.method == "random directions":
        return readouts.random_subject(shared.store, train, RANDOM_DIRECTIONS, one.pair.seed)
    make = readouts.pca_subject if one.method == "PCA of the difference" else readouts.mean_difference_subject
    return make(shared.store, train)


def answer_one(work: Work, one: Asked) -> dict[str, Any]:
    """known_answer of one subject, written down with the rows of its tables."""
    from study.measures.known_answer import Settings, known_answer
    from study.measures.strata import PRIMARY

    started = time.perf_counter()
    shared = context(work, one.pair, one.target)
    answer = known_answer(
        subject_of(work, one, shared),
        shared.store,
        shared.questions,
        pair=one.pair.name,
        strata=PRIMARY,
        scaling_tokens=shared.held_out,
        groups=shared.groups,
        probes=shared.probes,
        settings=Settings(n_permutations=work.plan.permutations),
    )
    families: dict[str, Counter[str]] = {}
    for stratum in PRIMARY:
        items = answer.item_rows(stratum)
        specific = [row["best_family"] for row in items if row["alive"] and row["scored"] >= Settings().selective_at]
        families[stratum] = Counter(specific)
    found = {
        **answer.as_json(),
        **one.described,
        "compared": one.pair.compared,
        "rows": answer.rows(),
        "specific_by_family": {stratum: dict(counts) for stratum, counts in families.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(work.measure(one.name) / KNOWN_ANSWER_FILE, found)
    return found


def answers(work: Work, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    return [read_json(work.measure(one.name) / KNOWN_ANSWER_FILE) for one in asked]
