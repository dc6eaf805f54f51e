"""The whole study as a rehearsal: every step on FinQA-mini and pocket-mistral, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finqa.runtime.paths import REPOSITORY
from study.page import NOT_RUN, PAGE
from study.pocket.tables import read_csv

STUDY = [sys.executable, "-m", "study.pocket", "--quick"]
TABLES = (
    "models", "ceilings", "dictionaries", "known_answer", "glance", "kinds", "matrix", "untrained", "tokens", "probes",
    "causal", "causal_controls",
)  # fmt: skip


def started(folder: Path) -> subprocess.Popen[str]:
    flags = ["--data-dir", folder / "data", "--results-dir", folder / "results", "--output", folder / "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*STUDY, *map(str, flags)], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_rehearsal_goes_on_and_writes_every_table(tmp_path: Path):
    page = PAGE.read_text()
    first = started(tmp_path)
    sets = tmp_path / "data" / "study-quick" / "activations"
    while first.poll() is None and not list(sets.glob("*/config.json")):
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.stdout is not None
    said = first.stdout.read()
    assert "layer and site" in said, said
    assert "dictionary:" not in said, said
    made = next(sets.glob("*/config.json"))
    before = made.stat().st_mtime_ns

    output, _ = started(tmp_path).communicate()
    assert "12 tables, 3 figures" in output, output
    assert not [line for line in output.splitlines() if line.startswith(("fine-tune:", "ceilings"))], output
    assert made.stat().st_mtime_ns == before

    out = tmp_path / "out"
    rows = {name: read_csv(out / f"{name}.csv") for name in TABLES}
    assert all(rows.values()), {name: len(its) for name, its in rows.items()}
    assert {row["pair"] for row in rows["glance"]} == {
        "base -> fine-tuned", "sham -> fine-tuned", "fine-tuned -> fine-tuned",
    }  # fmt: skip
    identical = [row for row in rows["tokens"] if row["pair"] == "fine-tuned -> fine-tuned"]
    assert {row["method"] for row in identical} >= {"plain", "norm of the difference"}
    readings = {"KL per token", "linear probe of the first model"}
    assert {(row["tokens: fixed"], row["auroc"]) for row in identical if row["method"] not in readings} == {("0", "")}
    assert {row["method"] for row in identical} >= readings
    patched = {row["kind"] for row in rows["causal"]}
    assert patched >= {"ranked", "untrained, equal norm", "frozen decoder, equal norm", "components, equal norm"}
    norms = {(r["method"], r["kind"], r["injected_norm"]) for r in rows["causal"] if r["measure"] == "divergence"}
    for method in ("plain", "difference SAE"):
        wanted = [float(norm) for m, kind, norm in norms if (m, kind) == (method, "random directions")]
        matched = [float(norm) for m, kind, norm in norms if m == method and kind.endswith("equal norm")]
        assert matched == pytest.approx([wanted[0]] * len(matched), rel=1e-3)
    assert len(rows["ceilings"]) == 5 * 3 * 2 * 2
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("ceilings", "glance", "causal"))
    assert json.loads((out / "run.json").read_text())["config"]["plan"]["name"] == "study-quick"
    assert NOT_RUN.format(study="pocket") not in (out / "study.md").read_text()
    assert PAGE.read_text() == page

    again, _ = started(tmp_path).communicate()
    steps = [line for line in again.splitlines() if " s  " in line]
    assert len(steps) == 1, again
    assert steps[0].startswith("tables and figures")
