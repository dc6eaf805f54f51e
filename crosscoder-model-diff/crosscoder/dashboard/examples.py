"""From a latent's firings to what is shown of them: examples, and the tokens that it fires on.

Every choice is made over all firings of the latent, so the strongest examples and the quantiles are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from crosscoder.activations.layout import KINDS
from crosscoder.activations.store import ActivationStore
from crosscoder.dashboard.records import LEVELS, Band, DashboardConfig, Example, Examples, TokenUse

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Quantiles of a latent's activations, over the tokens on which it is active."""

LEAST_QUESTIONS = 10
"""Fewest questions on which a latent must be active for its question family to be named."""
Family = tuple[str | None, float | None]


def quantise(values: NDArray[np.float32], largest: float) -> NDArray[np.uint8]:
    """Positive activations as levels from 1 to LEVELS, which stands for `largest`.

    The error is at most half a level, except that an active token never gets level 0.
    """
    return np.clip(np.rint(values / largest * LEVELS), 1, LEVELS).astype(np.uint8)


class ExampleMaker:
    """Examples of latents, all from one activation set.

    `kinds` [token] is token_kinds.token_kinds': several questions are asked of one page, and examples of one latent
    are from pages of their own.
    """

    def __init__(self, store: ActivationStore, config: DashboardConfig, kinds: Tensor):
        self.config = config
        self._token_ids = store.token_id.numpy()
        self._document = store.document.numpy()
        self._names = [document.id for document in store.documents]
        self._occurrences = np.bincount(self._token_ids) if len(store) else np.zeros(0, np.int64)
        # A document's tokens follow each other in a set; its documents are in no order of their own.
        cuts = np.flatnonzero(np.diff(self._document)) + 1
        self._begins = np.concatenate([[0], cuts])
        self._ends = np.concatenate([cuts, [len(store)]])
        self.page = self._pages(np.isin(kinds.numpy(), [KINDS.index("passage"), KINDS.index("table")]))
        """[token] the number of its document's page."""

    def _pages(self, of_page: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[token] the number of its document's page, given the tokens that are of a page.

        Documents with the same tokens of a page have one page; one that has none of them is a page of its own.
        """
        numbers: dict[bytes, int] = {}
        page = np.empty(len(self._token_ids), np.int64)
        for begin, end in zip(self._begins, self._ends, strict=True):
            ids = self._token_ids[begin:end]
            text = ids[of_page[begin:end]] if of_page[begin:end].any() else ids
            page[begin:end] = numbers.setdefault(text.tobytes(), len(numbers))
        return page

    def examples(self, latent: int, tokens: NDArray[np.int32], values: NDArray[np.float32]) -> Examples | None:
        """Examples of a latent from its firings: [n] ascending token indices, and their activations. None without."""
        if not len(tokens):
            return None
        strongest = self._apart(np.argsort(-values, kind="stable"), tokens, self.config.n_strongest)
        return Examples(
            strongest=tuple(self._example(i, tokens, values) for i in strongest),
            bands=tuple(self._bands(latent, tokens, values)),
            fires_on=self._fires_on(tokens, values),
        )

    def family(self, families: Mapping[str, str], tokens: NDArray[np.int32], values: NDArray[np.float32]) -> Family:
        """The family on whose questions a latent is most active, from its firings, and its mean activation, summed over
        a question, as a multiple of the mean over all. (None, None) where a question has no family, or the latent is
        active on fewer than LEAST_QUESTIONS."""
        of = [families.get(name, "") for name in self._names]
        per_question = np.bincount(self._document[tokens], values, len(of))
        if not all(of) or np.count_nonzero(per_question) < LEAST_QUESTIONS:
            return None, None
        names, which = np.unique(of, return_inverse=True)
        means = np.bincount(which, per_question) / np.bincount(which)
        return str(names[means.argmax()]), float(means.max() / per_question.mean())

    def _apart(self, order: NDArray[np.int64], tokens: NDArray[np.int32], n: int) -> NDArray[np.int64]:
        """The first n firings of `order` that are on different pages."""
        _, first = np.unique(self.page[tokens[order]], return_index=True)
        return order[np.sort(first)[:n]]

    def _bands(self, latent: int, tokens: NDArray[np.int32], values: NDArray[np.float32]) -> list[Band]:
        rising = np.argsort(values, kind="stable")
        cuts = [round(quantile * len(rising)) for quantile in BANDS]
        random = np.random.default_rng((self.config.seed, latent))
        bands = []
        for i in reversed(range(len(BANDS) - 1)):
            ranks = rising[cuts[i] : cuts[i + 1]]
            if not len(ranks):
                continue
            drawn = self._apart(random.permutation(ranks), tokens, self.config.n_per_band)
            drawn = drawn[np.argsort(-values[drawn], kind="stable")]
            examples = tuple(self._example(j, tokens, values) for j in drawn)
            bands.append(Band(BANDS[i], BANDS[i + 1], float(values[ranks[0]]), float(values[ranks[-1]]), examples))
        return bands

    def _fires_on(self, tokens: NDArray[np.int32], values: NDArray[np.float32]) -> tuple[TokenUse, ...]:
        ids, which, counts = np.unique(self._token_ids[tokens], return_inverse=True, return_counts=True)
        sums = np.bincount(which, weights=values)
        best = np.argsort(-sums, kind="stable")[: self.config.n_fires_on]
        shares = counts / self._occurrences[ids]
        return tuple(TokenUse(int(ids[i]), int(counts[i]), float(shares[i]), float(sums[i] / counts[i])) for i in best)

    def _example(self, i: int | np.int64, tokens: NDArray[np.int32], values: NDArray[np.float32]) -> Example:
        """Around the i-th firing."""
        peak = int(tokens[i])
        document = int(np.searchsorted(self._begins, peak, side="right")) - 1
        first = max(int(self._begins[document]), peak - self.config.tokens_before)
        end = min(int(self._ends[document]), peak + self.config.tokens_after + 1)
        low, high = np.searchsorted(tokens, [first, end])
        levels = np.zeros(end - first, np.uint8)
        levels[tokens[low:high] - first] = quantise(values[low:high], float(values.max()))
        return Example(
            document=self._names[int(self._document[peak])],
            first=first,
            token_ids=tuple(self._token_ids[first:end].tolist()),
            levels=tuple(levels.tolist()),
            peak=peak - first,
        )
