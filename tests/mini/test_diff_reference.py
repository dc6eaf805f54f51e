"""docs/reference/model-diff/: what is committed there agrees with its own numbers."""

from __future__ import annotations

import json
import re

from mini.diff_reference import FIGURES, REFERENCE, TABLES, readme

MEGABYTE = 1_000_000


def test_the_page_says_what_analysis_json_says():
    found = json.loads((REFERENCE / "analysis.json").read_text())
    made = {
        "versions": {"torch": "", "transformers": "", "nnsight": ""},
        "git": {"revision": "", "dirty": False},
        "device": "",
        "python": "",
    }
    pictures = [path.stem for path in (REFERENCE / f"dashboard_{way}.png" for way in ("light", "dark", "phone"))]
    written, expected = ((text.partition("\nMade by")[0]) for text in (page(), readme(found, made, pictures)))
    assert written == expected


def test_all_that_the_page_shows_is_there_and_the_dashboard_is_small():
    named = set(re.findall(r"\]\(([\w.]+)\)", page()))
    assert named >= {*(f"{figure}.png" for figure in FIGURES), *TABLES}
    assert all((REFERENCE / name).stat().st_size > 100 for name in named)
    assert (REFERENCE / "dashboard.html").stat().st_size < 5 * MEGABYTE


def page() -> str:
    return (REFERENCE / "README.md").read_text()
