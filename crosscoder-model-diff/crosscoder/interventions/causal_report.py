"""Does what a dictionary found matter to the answers? The share of the gap that sets of latents recover, with controls.

    report = causal_report(dictionary, pair_of(instruct, fine_tuned), asked, choose_on, Target(17, "mlp"), folder)

Sets of 1, 2, 4, ... all latents are taken from the top of a ranking that was made on other documents, added or taken
away at the site, and held against what the whole site recovers and against controls of the same size. It goes on where
it was killed: the folder has what the ranking is made from (`survey-<key>.safetensors`), and in `cells.jsonl` one line
for each batch of documents that was measured, and at the end one for each cell. `causal.json` there is the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions import causal_rows, ranking
from crosscoder.interventions.causal import Cell, cell_key, experiment_key, measure_missing
from crosscoder.interventions.causal_rows import Asked
from crosscoder.interventions.halves import Pair
from crosscoder.interventions.patching import BATCH_TOKENS, Carrier, Direction
from crosscoder.interventions.sets import (
    Addition,
    Components,
    Constant,
    Latents,
    Nothing,
    RandomDirections,
    Whole,
    bias_of,
    dictionary_digest,
    matched_set,
    sizes_to,
)
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import write_atomically


@dataclass(frozen=True)
class CausalConfig:
    """What is patched, and how often."""

    directions: tuple[Direction, ...] = ("sufficiency", "necessity")
    carriers: tuple[Carrier, ...] = ("own", "other")
    n_random: int = 20
    """Matched random sets, and sets of random directions, of each size."""
    seed: int = 0


def causal_report(
    dictionary: BatchTopKCrosscoder,
    pair: Pair,
    asked: Sequence[Asked],
    choose_on: Sequence[Document],
    target: Target,
    folder: Path,
    config: CausalConfig = CausalConfig(),
    scaling: LatentScaling | None = None,
) -> dict[str, Any]:
    """Measure what is missing and return the report (also `causal.json` in `folder`).

    Args:
        asked: What is scored; latents are ranked on `choose_on`, which must share no document with it.
        scaling: Of the dictionary; for the worst half by nu, where it is given.
    """
    if {a.document.id for a in asked} & {document.id for document in choose_on}:
        raise UserError("latents are chosen on documents that they are scored on; cut the documents in two")
    documents = [a.document for a in asked]
    found = kept_survey(folder, dictionary, pair, choose_on, target)
    order = ranking.by_effect(found)
    cells = [
        Cell(addition, direction, carrier)
        for addition in additions_of(dictionary, order, found, config, scaling)
        for direction in config.directions
        for carrier in config.carriers
    ]
    experiment = experiment_key(pair, target, documents, "gold programs")
    with KeyedJournal(folder / "cells.jsonl") as journal:
        measured = measure_missing(pair, target, documents, cells, journal, experiment)
    report = {
        "config": asdict(config),
        "target": list(target),
        "n_questions": len(asked),
        "n_choosing": len(choose_on),
        "n_alive": len(found.alive),
        "method": dictionary.config.method,
        "order": order[:64],
        **causal_rows.rows_of(asked, cells, measured, {}, config.seed),
    }
    write_json(folder / "causal.json", report)
    return report


def kept_survey(
    folder: Path,
    dictionary: BatchTopKCrosscoder,
    pair: Pair,
    documents: Sequence[Document],
    target: Target,
) -> ranking.Survey:
    """ranking.survey, from `folder` where an earlier run has left it: on a GPU the next one could differ by a rounding,
    which would make other cells of all that are ranked or matched by it."""
    from safetensors.torch import load_file, save

    made_of = {"dictionary": dictionary_digest(dictionary), "batch_tokens": BATCH_TOKENS}
    path = folder / f"survey-{cell_key(experiment_key(pair, target, documents, ''), 'survey', made_of)}.safetensors"
    if path.exists():
        tensors = load_file(path)
        return ranking.Survey(int(tensors.pop("n_tokens")), **tensors)
    found = ranking.survey(dictionary, pair, documents, target)
    tensors = {each.name: torch.as_tensor(getattr(found, each.name)) for each in fields(found)}
    write_atomically(path, save(tensors))
    return found


def additions_of(
    dictionary: BatchTopKCrosscoder,
    order: Sequence[int],
    found: ranking.Survey,
    config: CausalConfig,
    scaling: LatentScaling | None,
) -> list[Addition]:
    """The sets, nothing and all, and the controls that the dictionary and its data give."""
    sizes = sizes_to(len(order))
    made: list[Addition] = [Nothing(), Whole(), bias_of(dictionary)]
    made.append(Constant("mean difference", found.mean_difference.float()))
    made += [Latents(dictionary, order[:size], "ranked") for size in sizes]
    by_nu = ranking.by_exclusivity(scaling, found) if scaling is not None else None
    for size in sizes[::3]:  # random sets are most of the work
        if size < len(order) and by_nu != order:
            made.append(Latents(dictionary, order[-size:], "worst"))
        if by_nu is not None and size <= len(by_nu) // 2:
            made.append(Latents(dictionary, by_nu[-size:], "worst half by nu"))
        if size <= dictionary.config.d_model:
            made.append(Components(found.components(size).float()))
        for number in range(config.n_random):
            seed = config.seed * 1_000 + number
            drawn = matched_set(order[:size], found.frequency, found.injected, found.alive, seed)
            made += [Latents(dictionary, drawn, "random sets", seed)] if drawn else []
            made.append(RandomDirections(dictionary, order[:size], seed))
    return made
