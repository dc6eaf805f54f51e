"""Which passages a label is made from, and which it is scored on.

No two passages of a latent are of one page: a latent's pages are ranked by its strongest firing on each, every other
one is for the label, the rest for the score. The label is made from the strongest; the score takes firing passages
evenly from all ranks, so that it asks for weak firings too. The silent passages are drawn at random: a random token of
a page that is not used, with the same stretch around it, on which the latent does not fire at all. Nothing else makes
them like the firing ones, so a label that only says what kind of text it is (a table, a program) can score well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from crosscoder.analysis.token_kinds import token_kinds
from crosscoder.dashboard.examples import ExampleMaker
from crosscoder.dashboard.firings import gather_firings, groups_within
from crosscoder.dashboard.records import DashboardConfig, Example

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from crosscoder.analysis.tables import LatentRow
    from crosscoder.opening import OpenedCrosscoder

STRONG = 0.3
"""Share of a passage's largest activation, from which a token is marked in it; delphi's value."""
FEWEST = 5
"""Passages of a sort, below which they are too few: to name a latent, or to score a name."""
CANDIDATES = 20_000
"""Tokens drawn to find silent passages around."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a document."""

    text: str
    """With << and >> around the tokens on which the latent is strongly active, where it is for the label."""
    fires: bool
    page: int


@dataclass(frozen=True)
class Passages:
    """What is shown of one latent."""

    latent: int
    explaining: tuple[Passage, ...]
    """The strongest first; empty where the latent fires on too few pages."""
    scoring: tuple[Passage, ...]
    """Firing and silent ones, mixed."""


def choose_passages(
    opened: OpenedCrosscoder, rows: Sequence[LatentRow], n_explaining: int, n_scoring: int, seed: int
) -> list[Passages]:
    """The passages of the latents of `rows`, in their order; at most `n_scoring` of either sort for the score."""
    store, n_latents = opened.store, opened.model.config.n_latents
    config = DashboardConfig(n_strongest=len(store.documents), n_per_band=0, n_fires_on=0)
    maker = ExampleMaker(store, config, token_kinds(store, opened.tokenizer))
    latents = torch.tensor([row.latent for row in rows], dtype=torch.int64)
    n_firings = torch.zeros(n_latents)
    n_firings[latents] = torch.tensor([row.frequency for row in rows]) * len(store)
    passage = partial(_passage, maker, opened.tokenizer)
    found: list[Passages] = []
    for group in groups_within(latents, n_firings, config.max_firings_held):
        firings, _ = gather_firings(opened.model, store, group, torch.zeros(n_latents), n_bins=1)
        for latent, columns in zip(group.tolist(), firings, strict=True):
            random = np.random.default_rng((seed, latent))
            tokens, values = (column.numpy() for column in columns)
            examples = maker.examples(latent, tokens, values)
            ranked = list(examples.strongest if examples else ())
            if len(ranked) < 2 * FEWEST:
                found.append(Passages(latent, (), ()))
                continue
            others = ranked[1::2]
            places = np.linspace(0, len(others) - 1, min(n_scoring, len(others))).round().astype(int)
            explaining, firing = ranked[0::2][:n_explaining], [others[place] for place in places]
            used = [int(maker.page[example.first]) for example in (*explaining, *firing)]
            silent = _silent(latent, maker, tokens, used, random)[:n_scoring]
            scoring = [passage(each, True) for each in firing] + [passage(each, False) for each in silent]
            mixed = tuple(scoring[place] for place in random.permutation(len(scoring)))
            found.append(Passages(latent, tuple(passage(each, True, marked=True) for each in explaining), mixed))
    return found


def _silent(
    latent: int, maker: ExampleMaker, tokens: NDArray[np.int32], used: list[int], random: np.random.Generator
) -> tuple[Example, ...]:
    """Passages on which the latent does not fire, each from a page of its own that is not `used`, in a random order."""
    drawn = np.sort(random.permutation(len(maker.page))[:CANDIDATES]).astype(np.int32)
    first, end = drawn - maker.config.tokens_before, drawn + maker.config.tokens_after + 1
    quiet = np.searchsorted(tokens, first) == np.searchsorted(tokens, end)
    drawn = drawn[quiet & ~np.isin(maker.page[drawn], used)]
    # The strongest firing of each page, the strongest first, at activations that are made up.
    examples = maker.examples(latent, drawn, random.random(len(drawn), np.float32))
    return examples.strongest if examples else ()


def _passage(
    maker: ExampleMaker, tokenizer: PreTrainedTokenizerBase, example: Example, fires: bool, marked: bool = False
) -> Passage:
    strong = [level >= STRONG * max(example.levels) for level in example.levels] if marked else []
    return Passage(spelt(tokenizer, example.token_ids, strong), fires, int(maker.page[example.first]))


def spelt(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool]) -> str:
    """The text of some ids, with << and >> around each run of them that is marked; `marked` may be shorter."""

    def up_to(end: int) -> str:
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        return text if end == len(ids) else text.rstrip("\ufffd")  # a character that goes on after it

    text, before, inside = "", "", False
    for end in range(len(ids) + 1):
        active = end < len(marked) and marked[end]
        if active != inside or end == len(ids):
            # From the first id on each time, since a tokenizer drops the space of one that comes first.
            whole = up_to(end)
            piece = whole[len(before) :]
            blank = len(piece) - len(piece.lstrip()) if piece.strip() else 0
            text += f"{piece[:blank]}<<{piece[blank:]}>>" if inside else piece
            before, inside = whole, active
    return text
