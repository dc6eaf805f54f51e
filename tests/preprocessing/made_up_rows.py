"""Invented rows in FinQA's raw schema; none of them is a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finqa.task.programs import execute

TABLE = [
    ["( in millions )", "2009", "2008"],
    ["net sales", "$ 1,206.5", "$ 1,050.2"],
    ["operating income ( loss )", "-45 ( 45 )", "120"],
    ["tax rate", "35.5%", "34.0%"],
    ["shares , diluted", "310", "295"],
]

PROGRAMS = {
    "add": "add(1206.5, 1050.2)",
    "subtract": "subtract(-45, 120)",
    "multiply": "multiply(1206.5, 35.5%)",
    "divide": "subtract(1206.5, 1050.2), divide(#0, 1050.2)",
    "exp": "exp(const_m1, const_3)",
    "greater": "greater(1206.5, 1050.2)",
    "not-greater": "greater(295, 310)",
    "table_max": "table_max(operating income ( loss ), none)",
    "table_min": "table_min(shares , diluted, none)",
    "table_sum": "table_sum(net sales, none)",
    "table_average": "table_average(tax rate, none), multiply(#0, const_100)",
}
"""A gold program for every operation, with percentages, `$`, bracketed negatives and constants."""


def raw_row(row_id: str = "MADE/up/1", program: str = PROGRAMS["add"], **changes: Any) -> dict[str, Any]:
    """A raw row whose label comes from running its program; `changes` replace fields of the row or of its qa."""
    table = changes.get("table", TABLE)
    if "exe_ans" not in changes:
        result = execute(program, table)
        changes["exe_ans"] = result if isinstance(result, str) else round(result, 5)
    row = {
        "id": row_id,
        "pre_text": ["acorn instruments reports in millions .", "net sales rose 15% ( 15 % ) ."],
        "post_text": ["the diluted shares include options ."],
        "table": TABLE,
        "qa": {"question": f"what does {row_id} come to?", "program": program, "answer": "about"},
    }
    for key, value in changes.items():
        (row if key in row else row["qa"])[key] = value
    return row


def every_operation(split: str) -> list[dict[str, Any]]:
    return [raw_row(f"MADE/{split}/{name}", program) for name, program in PROGRAMS.items()]


def write_raw(data_dir: Path, **rows_by_split: list[dict[str, Any]]) -> None:
    """Write D/FinQA/{split}.json for train, dev and test; a split that is not named is empty."""
    for split in ("train", "dev", "test"):
        path = data_dir / "FinQA" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows_by_split.get(split, [])), encoding="utf-8")
