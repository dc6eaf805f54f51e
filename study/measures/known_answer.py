"""Does a diff find what fine-tuning added? All figures of one subject on one pair of models, where the answer is known.

An item is specific to a family where it tells the family's questions from those of other families on the same page.

    questions = questions_of(store, rows, tokenizer, finqa_mini_wording())
    answer = known_answer(dictionary_subject(model), store, questions, pair="base -> fine-tuned")
    write_atomically(path, json.dumps(answer.as_json()))

The subject is a dictionary of any method or a baseline (readouts.py); the set is one that names its families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from study.measures.answers import ClassAnswer, ExclusivityAnswer, KnownAnswer, StratumAnswer
from study.measures.auroc import Estimate, auroc_estimate, auroc_interval, share
from study.measures.exclusivity import Exclusivity, exclusivity
from study.measures.nulls import ALPHA, N_PERMUTATIONS, PermutationNull, permutation_null
from study.measures.probe import ProbeCeiling, probe_ceilings
from study.measures.readouts import Subject
from study.measures.scores import read_scores
from study.measures.selectivity import SELECTIVE_AT, Selectivity, halves, selectivity
from study.measures.strata import STRATA, Questions, Stratum
from study.measures.token_truth import token_truth


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside the data."""

    seed: int = 0
    """Seed of the halves and of the permutations."""
    selective_at: float = SELECTIVE_AT
    """AUROC from which an item is specific to a family."""
    n_permutations: int = N_PERMUTATIONS
    alpha: float = ALPHA
    """False discovery rate over the families."""


def known_answer(
    subject: Subject,
    store: ActivationStore,
    questions: Questions,
    pair: str = "",
    strata: Sequence[Stratum] = STRATA,
    scaling_tokens: Tensor | None = None,
    groups: Tensor | None = None,
    probes: Sequence[ProbeCeiling] | None = None,
    settings: Settings = Settings(),
) -> KnownAnswer:
    """Five passes over the set at most.

    Args:
        pair: Its name, carried along.
        scaling_tokens: Token indices for what says how exclusive an item is; best of documents that the dictionary was
            not trained on. All, where none are given.
        groups: Of tokens (token_truth.token_groups); without them there is no token-level truth.
        probes: Of probe.probe_ceilings, on the halves of settings.seed. They are the same for every subject, so whoever
            asks about several makes them once; made here where they are not given.
    """
    choosing = halves(questions, settings.seed)
    if probes is None:
        probes = probe_ceilings(store, questions, choosing, strata, subject.device)
    scores = read_scores(store, questions, subject)
    everything = torch.arange(len(store))
    exclusive = exclusivity(subject, store, everything if scaling_tokens is None else scaling_tokens)
    selective: dict[Stratum, Selectivity] = {
        s: selectivity(scores.of(s), questions, choosing, within_pages=True) for s in strata
    }
    known = dict(zip(questions.families, (~questions.added).tolist(), strict=True))
    return KnownAnswer(
        pair=pair,
        subject=subject.name,
        n_questions=len(questions),
        n_pages=int(questions.page.max()) + 1,
        n_tokens=len(store),
        n_items=len(scores.alive),
        n_alive=int(scores.alive.sum()),
        added=tuple(name for name, seen in known.items() if not seen),
        known=tuple(name for name, seen in known.items() if seen),
        n_unreliable=exclusive.n_unreliable,
        strata=tuple(
            _of_stratum(
                s,
                selective[s],
                selectivity(scores.of(s), questions, choosing),
                exclusive,
                scores.alive,
                questions,
                permutation_null(
                    scores.of(s), questions, scores.alive, settings.n_permutations, settings.seed, subject.device
                ),
                [probe for probe in probes if probe.stratum == s],
                settings,
            )
            for s in strata
        ),
        tokens=None if groups is None else token_truth(subject, store, questions, groups, choosing),
        alive=scores.alive,
        selectivity=selective,
        exclusivity=exclusive,
    )


def _of_stratum(
    stratum: Stratum,
    selective: Selectivity,
    over_all: Selectivity,
    exclusive: Exclusivity,
    alive: Tensor,
    questions: Questions,
    null: PermutationNull,
    probes: Sequence[ProbeCeiling],
    settings: Settings,
) -> StratumAnswer:
    added, at = questions.added, settings.selective_at
    significant, is_added = null.significant(settings.alpha), questions.added[null.families]
    return StratumAnswer(
        stratum=stratum,
        n_chosen=selective.n_chosen,
        n_scored=selective.n_scored,
        specific_to_added=int((alive & selective.specific(added, at)).sum()),
        specific_to_known=int((alive & selective.specific(~added, at)).sum()),
        over_all_pages_added=int((alive & over_all.specific(added, at)).sum()),
        over_all_pages_known=int((alive & over_all.specific(~added, at)).sum()),
        best_is_added=share(int((alive & added[selective.best]).sum()), int(alive.sum())),
        best_items=_best_items(selective, alive, questions),
        exclusivity=tuple(
            _exclusivity_answer(name, values, selective, alive, added, at)
            for name, values in exclusive.measures.items()
        ),
        classes=tuple(
            _class_answer(name, alive & members, selective, questions, at)
            for name, members in {"all active": alive, **exclusive.classes}.items()
        ),
        null_p=_by_family(null, null.family_p, questions),
        null_q=_by_family(null, null.family_q, questions),
        significant_for_added=int(significant[:, is_added].any(dim=1).sum()),
        significant_for_known=int(significant[:, ~is_added].any(dim=1).sum()),
        probe={p.input: dict(zip(questions.families, _numbers(p.auroc), strict=True)) for p in probes},
    )


def _best_items(selective: Selectivity, alive: Tensor, questions: Questions) -> dict[str, Estimate]:
    """For each family the active item that the choosing half likes best, and what it has on the other half."""
    result = {}
    areas = _numbers(selective.best_of(alive))
    sizes = (selective.n_of_family.tolist(), selective.n_others.tolist())
    for name, area, n, n_others in zip(questions.families, areas, *sizes, strict=True):
        interval = (None, None) if area is None else auroc_interval(area, n, n_others)
        result[name] = Estimate(area, *interval, n, n_others)
    return result


def _exclusivity_answer(
    measure: str, values: Tensor, selective: Selectivity, alive: Tensor, added: Tensor, at: float
) -> ExclusivityAnswer:
    from scipy.stats import spearmanr

    finds_added, finds_known = selective.specific(added, at), selective.specific(~added, at)
    either = alive & (finds_added | finds_known)
    known = alive & ~values.isnan()
    largest = selective.scored[:, added].nan_to_num(nan=-1.0).amax(dim=1) if added.any() else torch.zeros(len(alive))
    ordered = int(known.sum()) > 2 and values[known].unique().numel() > 1 and largest[known].unique().numel() > 1
    correlation: Any = spearmanr(values[known], largest[known]) if ordered else None
    return ExclusivityAnswer(
        measure=measure,
        added_against_rest=auroc_estimate(values[alive], finds_added[alive]),
        added_against_known=auroc_estimate(values[either], finds_added[either]),
        correlation=float(correlation.statistic) if ordered else None,
        n_correlation=int(known.sum()),
    )


def _class_answer(name: str, members: Tensor, selective: Selectivity, questions: Questions, at: float) -> ClassAnswer:
    n, added = int(members.sum()), questions.added
    found = selective.found(members, at)
    n_right = int((members & added[selective.best]).sum())
    return ClassAnswer(
        name=name,
        n=n,
        found=tuple(f for f, yes in zip(questions.families, (found & added).tolist(), strict=True) if yes),
        found_known=tuple(f for f, yes in zip(questions.families, (found & ~added).tolist(), strict=True) if yes),
        recall=share(int((found & added).sum()), int(added.sum()) if n else 0),
        precision=share(n_right, n),
        specific_to_added=int((members & selective.specific(added, at)).sum()),
        specific_to_known=int((members & selective.specific(~added, at)).sum()),
    )


def _by_family(null: PermutationNull, values: Tensor, questions: Questions) -> dict[str, float]:
    return {questions.families[f]: v for f, v in zip(null.families.tolist(), values.tolist(), strict=True)}


def _numbers(values: Tensor) -> list[float | None]:
    return [v if v == v else None for v in values.tolist()]
