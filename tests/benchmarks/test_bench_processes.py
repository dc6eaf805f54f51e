"""The benchmark of several processes runs the project's own commands and reads their own figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.bench_processes as bench
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders


@pytest.mark.slow
def test_two_processes_fine_tune_and_record_and_their_rates_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    words = ["bench", "--small", "--processes", "2", "--updates", "20", "--documents", "8", "--layer", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--scratch", str(tmp_path), "--output-dir", str(tmp_path / "record")])
    bench.main()
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "record" / "processes_small.json").read_text())["processes"]["2"]
    assert "training on 40 rows" in printed and "step 20 of 20" in printed
    assert run["fine-tuning"]["updates"] == 10
    ms, rate = run["fine-tuning"]["ms_an_update"], run["fine-tuning"]["tokens_per_second"]
    assert 2 * 300 < rate * ms / 1000 < 2 * 700, "tokens an update are those of two rows"
    tokens = int(printed.split(" tokens of 8 documents")[0].split()[-1].replace(",", ""))
    assert run["recording"]["tokens"] == tokens
    assert run["recording"]["tokens_per_second_through_a_model"] == 2 * run["recording"][
        "tokens_per_second_of_both_models"
    ] > 0  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["record"], "the model and the sets are gone"


def test_one_process_is_started_without_a_launcher():
    assert bench.launched("main.py", 1, ["-P"])[1:] == ["main.py", "-P"]
    assert bench.launched("main.py", 4, ["-P"])[1:] == (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "main.py", "-P"]
    )


def test_more_processes_than_gpus_and_none_at_all_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, capsys):
    import torch

    monkeypatch.setattr(bench, "default_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bench.check_gpus([1, 2])
    with pytest.raises(UserError, match="--processes 4 needs as many GPUs, and 2 are here"):
        bench.check_gpus([1, 2, 4])
    monkeypatch.setattr(sys, "argv", ["bench", "--processes", "0"])
    with pytest.raises(SystemExit):
        bench.parse_arguments()
    assert "must be at least 1" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path):
    folders = Folders(data=tmp_path, results=tmp_path)
    with pytest.raises(UserError, match="no such words"):
        bench.command([sys.executable, "-c", "import sys; sys.exit('no such words')"], folders, 1)


def test_the_table_compares_with_the_number_that_came_first(tmp_path: Path):
    def run(rate: int) -> dict:
        return {
            "fine-tuning": {"ms_an_update": 100.0, "tokens_per_second": rate},
            "recording": {"tokens_per_second_through_a_model": 10 * rate},
        }

    args = SimpleNamespace(small=True, updates=1, documents=1, layer=3, output_dir=tmp_path)
    table = bench.report({1: run(100), 4: run(380), 2: run(195)}, args)  # pyright: ignore[reportArgumentType]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert [row[3] for row in rows] == ["1.00", "1.95", "3.80"]
    assert [row[4] for row in rows] == ["1,000", "1,950", "3,800"]
