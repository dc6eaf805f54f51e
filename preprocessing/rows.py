"""Which rows a stage works on, and the check of a flag that preprocessing scripts share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from finqa.runtime.command_line import flag
from finqa.runtime.paths import SplitOrAll, chosen_splits
from finqa.task.datasets import Dataset, dataset


def share(text: str) -> float:
    """Reads a share from 0 to 1, as a flag's `type`."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {value:g}")
    return value


@dataclass(frozen=True)
class Rows:
    """A data set and its splits."""

    dataset: str = flag("FinQA", metavar="NAME", help="FinQA or FinQA-mini")
    split: SplitOrAll = flag("all", help="The split, or all of them")

    @property
    def chosen(self) -> tuple[Dataset, tuple[str, ...]]:
        """The data set and the names of its splits. Raises UserError for a name that is unknown."""
        return dataset(self.dataset), chosen_splits(self.split)
