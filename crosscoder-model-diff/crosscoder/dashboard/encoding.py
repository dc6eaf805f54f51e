"""A Dashboard as compact JSON.

Each token text is stored once, in a list with the commonest first, and everything else holds indices into that list.
Contexts are stored once too: examples of many latents show the same text, so the tokens of all examples are kept as
stretches of the activation set. An example has the number of its stretch, where it begins there, and the levels of its
active tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from crosscoder.dashboard.records import LEVELS, Band, Dashboard, Example, LatentPage, Value

DIGITS = 4
"""Significant digits of a figure: one that looks equal is, to a reader."""


def encode(dashboard: Dashboard) -> dict[str, Any]:
    """What template/data.js reads."""
    return _Encoder(dashboard).encoded()


class _Encoder:
    def __init__(self, dashboard: Dashboard):
        self._dashboard = dashboard
        examples = [example for page in dashboard.pages for example in page.shown]
        self._stretches, self._stretch_of = _stretches(examples)
        self._words = {token: i for i, (token, _) in enumerate(self._used_tokens().most_common())}
        names = dict.fromkeys(example.document for example in examples)
        self._documents = {name: i for i, name in enumerate(names)}

    def encoded(self) -> dict[str, Any]:
        dashboard = self._dashboard
        pages = dashboard.pages
        return {
            "title": dashboard.title,
            "summary": asdict(dashboard.summary),
            "facts": dashboard.facts,
            "columns": [asdict(column) for column in dashboard.columns],
            "directions": dashboard.directions,
            "chosenBy": dashboard.chosen_by,
            "levels": LEVELS,
            "vocabulary": [dashboard.vocabulary[token] for token in self._words],
            "documents": list(self._documents),
            "stretches": [[self._words[token] for token in tokens] for _, tokens in self._stretches],
            "values": {c.key: [_short(page.values[c.key]) for page in pages] for c in dashboard.columns},
            "largest": [_short(page.max_activation) for page in pages],
            "topTokens": [self._tokens(page.top_tokens) for page in pages],
            "promoted": [[self._tokens(page.promoted[i]) for page in pages] for i in range(len(dashboard.directions))],
            "nearest": [[x for latent, cosine in page.nearest for x in (latent, _short(cosine))] for page in pages],
            "histograms": [page.histogram if any(page.histogram) else 0 for page in pages],
            "contexts": ["" if page.examples else page.context for page in pages],
            "examples": [self._latent(page) for page in pages],
        }

    def _used_tokens(self) -> Counter[int]:
        used: Counter[int] = Counter()
        for _, tokens in self._stretches:
            used.update(tokens)
        for page in self._dashboard.pages:
            used.update(page.tokens())
        return used

    def _latent(self, page: LatentPage) -> Any:
        """[strongest examples, bands, tokens it fires on], 0 for a latent without."""
        if page.examples is None:
            return 0
        uses = [[self._words[u.token_id], u.n_firings, _short(u.share), _short(u.mean)] for u in page.examples.fires_on]
        return [
            [self._example(example) for example in page.examples.strongest],
            [self._band(band) for band in page.examples.bands],
            uses,
        ]

    def _band(self, band: Band) -> list[Any]:
        """[from quantile, to quantile, lowest, highest activation, examples]."""
        examples = [self._example(example) for example in band.examples]
        return [band.from_quantile, band.to_quantile, _short(band.lowest), _short(band.highest), examples]

    def _example(self, example: Example) -> list[int]:
        """[document, stretch, first token in it, tokens, peak, then pairs of a token that is active and its level]."""
        stretch = self._stretch_of[example.first]
        start = example.first - self._stretches[stretch][0]
        fired = [x for i, level in enumerate(example.levels) if level for x in (i, level)]
        return [self._documents[example.document], stretch, start, len(example.token_ids), example.peak, *fired]

    def _tokens(self, tokens: tuple[int, ...]) -> list[int]:
        return [self._words[token] for token in tokens]


def _stretches(examples: list[Example]) -> tuple[list[tuple[int, list[int]]], dict[int, int]]:
    """The examples' tokens, where those that overlap share one stretch: [(first index, token ids)], and which stretch
    holds the example that begins at an index.

    Stretches end where their document does.
    """
    stretches: list[tuple[int, list[int]]] = []
    stretch_of: dict[int, int] = {}
    document = None
    for example in sorted(examples, key=lambda example: (example.first, len(example.token_ids))):
        begin, tokens = stretches[-1] if stretches else (0, [])
        if example.document != document or example.first > begin + len(tokens):
            begin, tokens = example.first, []
            stretches.append((begin, tokens))
            document = example.document
        tokens.extend(example.token_ids[begin + len(tokens) - example.first :])
        stretch_of[example.first] = len(stretches) - 1
    return stretches, stretch_of


def _short(value: Value) -> Value:
    """A number with as many digits as are shown."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
