"""Which rows a preprocessing stage works on, and the parser that the stages share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from finqa.runtime.command_line import add_flags, flag, script_parser
from finqa.runtime.paths import SplitOrAll, add_folder_flags, chosen_splits
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


def stage_parser(manual: str | None, *configs: type) -> argparse.ArgumentParser:
    """The parser of a stage: its rows, the flags of its `configs`, --data-dir."""
    parser = script_parser(manual)
    for kind in (Rows, *configs):
        add_flags(parser, kind)
    add_folder_flags(parser, results=False)
    return parser
