"""What a dashboard holds, before it is written as JSON. Nothing here knows a model or a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from crosscoder.dictionaries.config import READ_TOKENS
from finqa.runtime.command_line import check_bounds, flag

Value = float | int | str | None
ColumnKind = Literal["number", "share", "count", "word", "text"]
"""A word is one of a few, which can be filtered on; a text is searched."""

LEVELS = 255
"""An activation is stored as a level of 1 to 255, where 255 is the latent's largest; 0 is inactive."""


@dataclass(frozen=True)
class DashboardConfig:
    """What a dashboard shows, and what building it may hold in memory."""

    n_with_examples: int = flag(1024, "--examples-for", metavar="LATENTS", least=0)
    """Latents that get examples in the dashboard, the most interesting first (builder.by_interest)."""
    n_strongest: int = 10
    """Maximally activating examples of a latent, each from a page of its own."""
    n_per_band: int = 4
    """Examples of each band of quantiles."""
    tokens_before: int = 24
    tokens_after: int = 12
    """Context of an example, in tokens; less at the ends of its document."""
    n_bins: int = 30
    """Bins of a latent's histogram, from 0 to its largest activation."""
    n_promoted: int = 10
    n_nearest: int = 8
    n_fires_on: int = 10
    max_firings_held: int = 40_000_000
    """Firings gathered in one pass over the set, about 40 bytes each at the peak; more than that take more passes."""
    batch_size: int = READ_TOKENS
    seed: int = 0
    """Seed of the draw of examples within a band."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Column:
    """A figure that every latent has, or None where it cannot be had."""

    key: str
    label: str
    help: str
    kind: ColumnKind
    in_table: bool = True
    """Whether the table always shows it. Every column is on a latent's page, and can be sorted by and filtered on."""
    matched: bool = False
    """Whether it is about the latent's partner in another dictionary; the table of matched latents shows it."""


@dataclass(frozen=True)
class Example:
    """A stretch of a document around one token, with the latent's activation on every token of it."""

    document: str
    """Id of the row."""
    first: int
    """Index of its first token in the activation set."""
    token_ids: tuple[int, ...]
    levels: tuple[int, ...]
    """Activations: `level / LEVELS` times the latent's largest."""
    peak: int
    """Which of the tokens it was chosen for."""


@dataclass(frozen=True)
class Band:
    """Firings between two quantiles of a latent's activation, and examples drawn from them."""

    from_quantile: float
    to_quantile: float
    lowest: float
    highest: float
    """Activations at the ends."""
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class TokenUse:
    """A token that a latent fires on."""

    token_id: int
    n_firings: int
    share: float
    """Share of the token's occurrences that the latent fires on."""
    mean: float
    """Mean activation over the occurrences that it fires on."""


@dataclass(frozen=True)
class Examples:
    """What is shown of a latent's firings."""

    strongest: tuple[Example, ...]
    """One a page, the strongest first."""
    bands: tuple[Band, ...]
    """The highest first."""
    fires_on: tuple[TokenUse, ...]
    """The tokens with the largest sums of activation."""


@dataclass(frozen=True)
class LatentPage:
    """One latent."""

    latent: int
    values: dict[str, Value]
    """The latent's values by the columns' keys."""
    max_activation: float
    top_tokens: tuple[int, ...]
    """The commonest tokens among its strongest firings."""
    promoted: tuple[tuple[int, ...], ...]
    """For each direction of the dashboard, the tokens that the decoder vector promotes, best first."""
    nearest: tuple[tuple[int, float], ...]
    """Latents and the cosine of their decoder vectors with this one's, the nearest first."""
    histogram: tuple[int, ...]
    """Firings by activation, in equal bins from 0 to the largest."""
    context: str
    """Text around its strongest firing, which «» mark; for latents without examples."""
    examples: Examples | None
    """None where the latent is not among those that get examples, or is active on no token."""

    @property
    def shown(self) -> list[Example]:
        """All examples, the strongest first, then band by band."""
        if self.examples is None:
            return []
        return [*self.examples.strongest, *(example for band in self.examples.bands for example in band.examples)]

    def tokens(self) -> Iterator[int]:
        """The token ids that stand outside of the examples; those that stand there twice come twice."""
        yield from self.top_tokens
        for tokens in self.promoted:
            yield from tokens
        if self.examples is not None:
            yield from (use.token_id for use in self.examples.fires_on)


@dataclass(frozen=True)
class Summary:
    """What fine-tuning changed, for the first screen."""

    sentences: tuple[str, ...]
    changed: tuple[int, ...]
    """The latents that changed most, in that order."""
    by: str
    """Key of the column that says how much."""


@dataclass(frozen=True)
class Dashboard:
    """A dictionary's latents, in their order."""

    title: str
    summary: Summary
    facts: tuple[tuple[str, str], ...]
    """What was read, as pairs of a label and a text."""
    columns: tuple[Column, ...]
    """The columns that exist for this dictionary."""
    directions: tuple[str, ...]
    """Whose decoder vectors a latent has: instruct and fine-tuned, or the difference alone."""
    chosen_by: str
    """How the latents that get examples were chosen."""
    pages: tuple[LatentPage, ...]
    vocabulary: dict[int, str]
    """Text of every token that occurs."""
