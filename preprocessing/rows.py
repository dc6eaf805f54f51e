"""Which rows a stage works on: the flags that preprocessing scripts share."""

from __future__ import annotations

from dataclasses import dataclass

from finqa.runtime.command_line import flag
from finqa.runtime.paths import SplitOrAll, chosen_splits
from finqa.task.datasets import Dataset, dataset


@dataclass(frozen=True)
class Rows:
    """A data set and its splits."""

    dataset: str = flag("FinQA", metavar="NAME", help="FinQA or FinQA-mini")
    split: SplitOrAll = flag("all", help="The split, or all of them")

    @property
    def chosen(self) -> tuple[Dataset, tuple[str, ...]]:
        """The data set and the names of its splits. Raises UserError for a name that is unknown."""
        return dataset(self.dataset), chosen_splits(self.split)
