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
    words += ["--latents", "64"]
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
    small = run["crosscoder"]
    assert run["recording"]["tokens_per_second"] > 0 and small["tokens_per_second"] > 0
    # Gradients in fp32: those of the adapter (rank 512 on q, k, v, o of five layers), those of 64 latents of 2 x 256.
    assert run["fine-tuning"]["sent_bytes"] == 4 * 5 * 512 * 2 * (2 * 256 + 256 + 128)
    assert 4 * (2 * 512 * 64) < small["sent_bytes"] < 1.3 * 4 * (2 * 512 * 64)
    step = run.pop("a step, 64 latents")
    assert step["tokens_per_second"] == pytest.approx(1000 * 128 / step["ms_a_step"], rel=0.01)
    assert all(stage["memory_gb"] > 0 and stage["efficiency"] == 1 for stage in run.values())
    assert [path.name for path in tmp_path.iterdir()] == ["record"], "the model and the sets are gone"


def test_evaluation_is_timed_with_as_many_engines_and_with_one_over_as_many_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = Folders(data=tmp_path / "data", results=tmp_path / "results")
    asked = []

    def command(words: list[str], folders: Folders, processes: int) -> None:
        asked.append(words)
        written = Path(words[words.index("--results-dir") + 1]) / "FinQA-mini" / "a-model" / "test" / "zero-shot"
        written.mkdir(parents=True)
        (written / "metrics.json").write_text(json.dumps({"n": 800, "seconds": {"generate": 20.0}}))

    monkeypatch.setattr(bench, "command", command)
    monkeypatch.setattr(bench, "default_device", lambda: "cuda")
    monkeypatch.setattr(bench, "find_spec", lambda name: name == "vllm")
    args = SimpleNamespace(processes=[1, 2], latents=[64], stages=["engines"])
    engines = bench.stages(args)  # pyright: ignore[reportArgumentType]
    assert list(engines) == list(bench.ENGINES)
    for processes in (1, 2):
        for measure in engines.values():
            assert measure(tmp_path, folders, processes, args)["replies_per_second"] == 40.0
    ways = [("--data-parallel", "1"), ("--data-parallel", "2"), ("--tensor-parallel", "2")]
    assert all(words[words.index(flag) + 1] == n for words, (flag, n) in zip(asked, ways, strict=True))


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
    monkeypatch.setattr(sys, "argv", ["bench", "--stages", "fine-tuning", "crosscoder"])
    with pytest.raises(SystemExit):
        bench.parse_arguments()
    assert "recording needs fine-tuning, and a crosscoder both" in capsys.readouterr().err


def test_engines_alone_are_refused_at_once_where_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bench, "default_device", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", ["bench", "--small", "--stages", "engines", "--scratch", str(tmp_path)])
    with pytest.raises(UserError, match="needs a GPU and vLLM"):
        bench.main()
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path):
    folders = Folders(data=tmp_path, results=tmp_path)
    with pytest.raises(UserError, match="no such words"):
        bench.command([sys.executable, "-c", "import sys; sys.exit('no such words')"], folders, 1)


def test_the_table_has_the_efficiency_over_the_number_that_came_first(tmp_path: Path):
    def run(rate: int) -> dict:
        of_all = {"memory_gb": 1.5, "sent_bytes": 2_000_000}
        return {"fine-tuning": {"tokens_per_second": rate} | of_all, "evaluation": {"replies_per_second": 2.5} | of_all}

    args = SimpleNamespace(small=True, updates=1, documents=1, layer=3, latents=[64], name="rates", output_dir=tmp_path)
    table = bench.report({1: run(100), 4: run(380), 2: run(195)}, args)  # pyright: ignore[reportArgumentType]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        ["fine-tuning", "1", "100 tokens/s", "1.00"], ["fine-tuning", "2", "195 tokens/s", "0.97"],
        ["fine-tuning", "4", "380 tokens/s", "0.95"], ["evaluation", "1", "2.5 replies/s", "1.00"],
        ["evaluation", "2", "2.5 replies/s", "0.50"], ["evaluation", "4", "2.5 replies/s", "0.25"],
    ]  # fmt: skip
    assert rows[0][4:] == ["1.5", "2.0"]
    record = json.loads((tmp_path / "rates.json").read_text())
    assert record["processes"]["4"]["fine-tuning"]["efficiency"] == 0.95


def test_the_efficiency_of_fine_tuning_is_that_of_the_time_of_an_update_whatever_its_rows(tmp_path: Path):
    def run(tokens: int, ms: float) -> dict:
        return {"fine-tuning": {"tokens_per_second": tokens, "ms_an_update": ms, "memory_gb": None, "sent_bytes": None}}

    args = SimpleNamespace(small=True, updates=1, documents=1, layer=3, latents=[64], name="rates", output_dir=tmp_path)
    runs = {1: run(8_802, 50.0), 2: run(18_648, 49.5)}
    bench.report(runs, args)  # pyright: ignore[reportArgumentType]
    assert runs[2]["fine-tuning"]["efficiency"] == 1.01


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [2, 4])
def test_as_many_gpus_fine_tune_record_and_train_a_crosscoder(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if bench.gpus() < processes:
        pytest.skip(f"fewer than {processes} GPUs")
    words = ["bench", "--small", "--processes", str(processes), "--updates", "20", "--documents", "32", "--layer", "3"]
    words += ["--latents", "256", "--scratch", str(tmp_path), "--output-dir", str(tmp_path / "record")]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    run = json.loads((tmp_path / "record" / "processes_small.json").read_text())["processes"][str(processes)]
    steps = {"a step, 256 latents", "a step, 256 latents, a tenth dead"}
    assert set(run) == {"fine-tuning", "recording", "crosscoder", *steps, *bench.ENGINES}
