"""Does what a dictionary found matter to the answers? The share of the gap that sets of latents recover, with controls.

    report = causal_report(dictionary, pair_of(instruct, fine_tuned), asked, choose_on, Target(17, "mlp"), folder)

Sets of 1, 2, 4, ... all latents are taken from the top of a ranking that was made on other documents, added or taken
away at the site, and held against what the whole site recovers and against controls of the same size. It goes on where
it was killed: the folder has what the ranking is made from (`survey-<key>.safetensors`), and in `cells.jsonl` one line
for each batch of documents that was measured, and at the end one for each cell. `causal.json` there is the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from finqa.runtime.time_left import Say


@dataclass(frozen=True)
class CausalConfig:
    """What is patched, and how often."""

    sizes: tuple[int, ...] | None = None
    """Latents in a set; None is 1, 2, 4, ... and all that are alive."""
    control_sizes: tuple[int, ...] | None = None
    """Sizes of the controls; None is `sizes`, or every third of 1, 2, 4, ...: the random ones are most of the work."""
    directions: tuple[Direction, ...] = ("sufficiency", "necessity")
    carriers: tuple[Carrier, ...] = ("own", "other")
    n_random: int = 20
    """Matched random sets, and sets of random directions, of each size."""
    generate_sizes: tuple[int, ...] = ()
    """Sizes whose sets and controls also write replies, which are run, as do nothing and the whole site."""
    generate_random: int = 0
    """How many of the random sets are generated with."""
    max_new_tokens: int = 200
    generation_batch: int = 32
    completions: str = "gold programs"
    """What the documents' completions are: gold programs, or the fine-tuned model's own. For the report to say."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("directions", "carriers"):
            if not getattr(self, name):
                raise UserError(f"a causal report needs at least one of {name}")
        if any(size < 1 for size in (*(self.sizes or ()), *(self.control_sizes or ()), *self.generate_sizes)):
            raise UserError("sets of latents have at least one latent; the empty set is always measured")


def causal_report(
    dictionary: BatchTopKCrosscoder,
    pair: Pair,
    asked: Sequence[Asked],
    choose_on: Sequence[Document],
    target: Target,
    folder: Path,
    config: CausalConfig = CausalConfig(),
    rivals: Mapping[str, BatchTopKCrosscoder] | None = None,
    scaling: LatentScaling | None = None,
    tokenizer: Any = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure what is missing and return the report (also `causal.json` in `folder`).

    Args:
        asked: What is scored; latents are ranked on `choose_on`, which must share no document with it.
        rivals: Other dictionaries of the same site (a difference SAE, one trained on the sham), by name; sets of as
            many of their latents, ranked by effect, are patched into the same pair.
        scaling: Of the dictionary; for the worst half by nu, where it is given.
        tokenizer: To write replies (config.generate_sizes).
        say: Hears how long it will take.
    """
    if {a.document.id for a in asked} & {document.id for document in choose_on}:
        raise UserError("latents are chosen on documents that they are scored on; cut the documents in two")
    if config.generate_sizes and tokenizer is None:
        raise UserError("writing replies (generate_sizes) needs the tokenizer")
    documents = [a.document for a in asked]

    def surveyed(of: BatchTopKCrosscoder) -> ranking.Survey:
        return kept_survey(folder, of, pair, choose_on, target, say)

    found = surveyed(dictionary)
    order = ranking.by_effect(found)
    additions = additions_of(dictionary, order, found, config, scaling)
    for name, rival in (rivals or {}).items():
        its = ranking.by_effect(surveyed(rival))
        sizes = [size for size in control_sizes(config, order) if size <= len(its)]
        additions += [Latents(rival, its[:size], name) for size in sizes]
    cells = [
        Cell(addition, direction, carrier)
        for addition in additions
        for direction in config.directions
        for carrier in config.carriers
    ]
    experiment = experiment_key(pair, target, documents, config.completions)
    with KeyedJournal(folder / "cells.jsonl") as journal:
        measured = measure_missing(pair, target, documents, cells, journal, experiment, say)
        replies = generated(pair, target, asked, cells, journal, experiment, config, tokenizer, say)
    report = {
        "config": asdict(config),
        "target": list(target),
        "n_questions": len(asked),
        "n_choosing": len(choose_on),
        "n_alive": len(found.alive),
        "method": dictionary.config.method,
        "order": order[:64],
        **causal_rows.rows_of(asked, cells, measured, replies, config.seed),
    }
    write_json(folder / "causal.json", report)
    return report


def kept_survey(
    folder: Path,
    dictionary: BatchTopKCrosscoder,
    pair: Pair,
    documents: Sequence[Document],
    target: Target,
    say: Say,
) -> ranking.Survey:
    """ranking.survey, from `folder` where an earlier run has left it: on a GPU the next one could differ by a rounding,
    which would make other cells of all that are ranked or matched by it."""
    from safetensors.torch import load_file, save

    made_of = {"dictionary": dictionary_digest(dictionary), "batch_tokens": BATCH_TOKENS}
    path = folder / f"survey-{cell_key(experiment_key(pair, target, documents, ''), 'survey', made_of)}.safetensors"
    if path.exists():
        tensors = load_file(path)
        return ranking.Survey(int(tensors.pop("n_tokens")), **tensors)
    found = ranking.survey(dictionary, pair, documents, target, BATCH_TOKENS, say)
    tensors = {each.name: torch.as_tensor(getattr(found, each.name)) for each in fields(found)}
    write_atomically(path, save(tensors))
    return found


def set_sizes(config: CausalConfig, order: Sequence[int]) -> list[int]:
    chosen = {*(config.sizes or sizes_to(len(order))), *config.generate_sizes}
    return sorted(size for size in chosen if size <= len(order))


def control_sizes(config: CausalConfig, order: Sequence[int]) -> list[int]:
    chosen = {*(config.control_sizes or config.sizes or sizes_to(len(order))[::3]), *config.generate_sizes}
    return sorted(size for size in chosen if size <= len(order))


def additions_of(
    dictionary: BatchTopKCrosscoder,
    order: Sequence[int],
    found: ranking.Survey,
    config: CausalConfig,
    scaling: LatentScaling | None,
) -> list[Addition]:
    """The sets, nothing and all, and the controls that the dictionary and its data give."""
    sizes = set_sizes(config, order)
    made: list[Addition] = [Nothing(), Whole(), bias_of(dictionary)]
    made.append(Constant("mean difference", found.mean_difference.float()))
    made += [Latents(dictionary, order[:size], "ranked") for size in sizes]
    by_nu = ranking.by_exclusivity(scaling, found) if scaling is not None else None
    for size in control_sizes(config, order):
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


def generated(
    pair: Pair,
    target: Target,
    asked: Sequence[Asked],
    cells: Sequence[Cell],
    journal: KeyedJournal,
    experiment: str,
    config: CausalConfig,
    tokenizer: Any,
    say: Say,
) -> dict[int, dict[str, list[int]]]:
    """`right` and `runs` of each question, by number of the cell; from the journal where they are there."""
    from crosscoder.interventions.patched_generation import answered, patched_replies
    from finqa.sandbox.running import Sandbox

    chosen = [number for number, cell in enumerate(cells) if _is_generated(cell.addition.label, config)]
    prompts = [list(a.document.ids[: a.document.n_prompt]) for a in asked]
    results = {}
    for count, number in enumerate(chosen):
        how = {**cells[number].label, "max_new_tokens": config.max_new_tokens}
        key = cell_key(experiment, "generated", how)
        if key not in journal.found:
            replies = patched_replies(
                pair, target, cells[number], prompts, tokenizer, config.max_new_tokens, config.generation_batch
            )
            with Sandbox() as sandbox:
                verdicts = answered(replies, [a.expected for a in asked], sandbox)
            as_numbers = {name: [int(v) for v in values] for name, values in asdict(verdicts).items()}
            journal.add(key, {"what": "generated", **how, **as_numbers})
            say(f"{count + 1} of {len(chosen)} cells generated with")
        results[number] = {name: journal.found[key][name] for name in ("right", "runs")}
    return results


def _is_generated(label: dict[str, Any], config: CausalConfig) -> bool:
    if not config.generate_sizes:
        return False
    if label["kind"].startswith("random") and label["seed"] - config.seed * 1_000 >= config.generate_random:
        return False
    return label["n"] in (0, *config.generate_sizes)
