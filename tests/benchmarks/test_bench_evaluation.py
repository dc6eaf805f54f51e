"""The benchmark of evaluation compares like with like, and refuses what would falsify it."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.bench_evaluation as bench
from benchmarks.bench_evaluation import ALONE, CALLS, PROJECT, Setup
from benchmarks.parts.made_up_model import byte_level_tokenizer
from finqa.evaluation.generation import GenerationConfig
from finqa.runtime.errors import UserError


@pytest.mark.slow
def test_a_small_run_times_every_way_and_a_prefix_cache_that_is_warm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip("vllm")
    small = ["--prompts", "12", "--call-prompts", "10", "--new-tokens", "4", "--warm-up", "2", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", "--small", *small, "--output-dir", str(tmp_path)])
    args = bench.parse_arguments()
    with bench.started_engine(args, tmp_path) as (setup, facts):
        monkeypatch.setattr(bench, "started_engine", lambda *given: nullcontext((setup, facts)))
        bench.main()
        printed = capsys.readouterr().out
        prompts = bench.random_prompts(args, 4, seed=2)
        ask = bench.alone(setup)
        bench.timed(setup, ask, prompts)
        with pytest.raises(UserError, match="tokens in the prefix cache"):
            ask(prompts)
        bench.timed(setup, ask, prompts)

    record = json.loads((tmp_path / "evaluation_small.json").read_text())
    assert set(record["ways"]) == {ALONE, PROJECT, CALLS}
    assert record["engine"]["settings"]["load_format"] == "dummy"
    assert record["engine"]["settings"]["enable_prefix_caching"] is True
    for name, way in record["ways"].items():
        n = 10 if name == CALLS else 12
        assert way["prompts"] == n and way["tokens_out"] == 4 * n
        assert way["tokens_in"] == sum(map(len, bench.random_prompts(args, 12, seed=0)[:n]))
        assert way["seconds"]["repeats"] == (1 if name == CALLS else 2)
        assert way["prompts_per_second"] > 0
    assert all(f"| {name}" in printed for name in record["ways"])
    assert record["ways"][ALONE]["rate_against_vllm_alone"] == 1


def test_the_order_turns_round_so_that_a_drift_of_the_machine_falls_on_both():
    assert bench.order([ALONE, PROJECT, CALLS], 2) == [ALONE, PROJECT, CALLS, PROJECT, ALONE]
    assert bench.order([ALONE, PROJECT], 3) == [ALONE, PROJECT, PROJECT, ALONE, ALONE, PROJECT]


def test_a_run_of_other_lengths_or_on_a_cache_that_stays_full_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "CACHE_TRIES", 1)
    config = GenerationConfig(vllm=True, max_new_tokens=3, batch_size=1)
    emptied = Setup(SimpleNamespace(reset_prefix_cache=lambda: True), config, None)
    assert bench.timed(emptied, lambda prompts: [3] * len(prompts), [[1]] * 2)[1] == [3, 3]
    with pytest.raises(UserError, match="1 of 2 replies do not have 3 tokens"):
        bench.timed(emptied, lambda prompts: [3, 1], [[1]] * 2)
    full = Setup(SimpleNamespace(reset_prefix_cache=lambda: False), config, None)
    with pytest.raises(UserError, match="does not empty its prefix cache"):
        bench.timed(full, lambda prompts: [], [])


def test_calls_of_eight_keep_the_order():
    seen = []

    def ask(prompts):
        seen.append(len(prompts))
        return [ids[0] for ids in prompts]

    assert bench.in_calls(ask)([[n] for n in range(19)]) == list(range(19))
    assert seen == [8, 8, 3]


@pytest.mark.parametrize("size", [300, 1024, 32768])
def test_the_made_up_tokenizer_has_its_size_and_loses_nothing(size: int):
    tokenizer = byte_level_tokenizer(size)
    assert tokenizer.get_vocab_size() == size
    text = "net sales\nin 2009: $ 206,588 – change of 5 %"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
