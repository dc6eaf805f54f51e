"""What every dictionary and baseline found of the known answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

KNOWN_ANSWER_FILE = "known_answer.json"
BASELINES = ("PCA of the difference", "mean difference", "norm of the difference")
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
        return {"pair": self.pair.name, "site": site_name(self.target), "method": self.method, "seed": ""}


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
    found = {one: answer_one(work, one) for one in group.asked}
    best: dict[str, int] = {}
    for one, answer in found.items():
        [of] = [of for of in answer["strata"] if of["stratum"] == SHOWN_STRATUM]
        best.setdefault(one.method, of["specific_to_added"])  # of the first seed
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
    from study.measures.strata import questions_of
    from study.measures.token_truth import fixed_tokens, token_groups
    from study.wording import finqa_mini_wording

    store = ActivationStore(activations(work, pair, target))
    wording = finqa_mini_wording()
    kinds = {family: "new" if kind in pair.added else "known" for family, kind in wording.kinds.items()}
    rows = test_rows(work)
    questions = questions_of(store, rows, students.load_tokenizer(STUDENT), replace(wording, kinds=kinds))
    documents = all_documents(work)
    without, fine_tuned = (predicted(work, model) for model in (_without(work, pair), pair.fine_tuned))
    fixed = fixed_tokens(store, without, fine_tuned, [document.ids for document in documents])
    return Context(
        store=store,
        questions=questions,
        groups=token_groups(store, questions, fixed),
        probes=probe_ceilings(store, questions, halves(questions)),
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
    write_atomically(_predictions_file(work, model), save({str(i): ids.int() for i, ids in enumerate(found)}))
    right = total = 0
    for document, ids in zip(documents, found, strict=True):
        true = torch.tensor(document.ids[document.n_prompt :])
        right += int((ids[document.n_prompt - 1 : -1] == true).sum())
        total += len(true)
    return {"right": right / total, "seconds": time.perf_counter() - started}


def predicted(work: Work, model: Model) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    table = load_file(_predictions_file(work, model))
    return [table[str(i)].long() for i in range(len(table))]


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
    make = readouts.pca_subject if one.method == "PCA of the difference" else readouts.mean_difference_subject
    return make(shared.store, train)


def answer_one(work: Work, one: Asked) -> dict[str, Any]:
    """known_answer of one subject, written down with the rows of its tables."""
    from study.measures.known_answer import Settings, known_answer
    from study.measures.strata import PRIMARY, STRATA

    started = time.perf_counter()
    shared = context(work, one.pair, one.target)
    # All strata for the first seed of the pairs that have several: seven take thrice the time of two.
    every = isinstance(one, Baseline) or (one.seed == 0 and len(one.pair.seeds) > 1)
    answer = known_answer(
        subject_of(work, one, shared),
        shared.store,
        shared.questions,
        pair=one.pair.name,
        strata=(*PRIMARY, *(s for s in STRATA if s not in PRIMARY)) if every else PRIMARY,
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
        **one.described,
        **answer.as_json(),
        "rows": answer.rows(),
        "specific_by_family": {stratum: dict(counts) for stratum, counts in families.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(work.measure(one.name) / KNOWN_ANSWER_FILE, found)
    return found


def answers(work: Work, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    return [read_json(work.measure(one.name) / KNOWN_ANSWER_FILE) for one in asked]
