"""Shared parts of the study's tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finqa.runtime.manifest import write_json
from finqa.runtime.paths import SPLITS, Folders


@pytest.fixture(scope="session")
def few_pages(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A data folder with the first 120 questions of each split of FinQA-mini."""
    data: Path = tmp_path_factory.mktemp("few")
    for split in SPLITS:
        write_json(
            data / "FinQA-mini" / f"{split}.json", json.loads(Folders().raw("FinQA-mini", split).read_text())[:120]
        )
    return Folders(data)
