"""The benchmark of fine-tuning names what it cannot measure, and says how far variants are apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_lora
from benchmarks.parts import libraries
from finqa.runtime.errors import UserError

NEEDS = {"plain": "", "liger": libraries.LIGER, "float8": libraries.TORCHAO}


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    monkeypatch.setattr(libraries, "missing", lambda library: library in absent)


def test_variants_of_a_library_that_is_not_there_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    without(monkeypatch, libraries.TORCHAO)
    assert libraries.that_run(None, NEEDS) == ["plain", "liger"]
    assert capsys.readouterr().out == "left out, torchao is not installed: float8\n"


def test_a_variant_asked_for_by_name_needs_its_library(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, libraries.LIGER)
    assert libraries.that_run(["float8", "plain"], NEEDS) == ["float8", "plain"]
    with pytest.raises(UserError, match="'liger' needs liger-kernel, which is not installed: pip install liger-kernel"):
        libraries.that_run(["plain", "liger"], NEEDS)


def test_what_a_library_puts_into_transformers_is_gone_afterwards():
    from transformers.models.mistral import modeling_mistral

    norm = modeling_mistral.MistralRMSNorm
    with libraries.mistral_put_back():
        modeling_mistral.MistralRMSNorm = modeling_mistral.MistralMLP  # pyright: ignore
    assert modeling_mistral.MistralRMSNorm is norm


def test_the_comparison_ends_with_the_largest_distance_from_the_first_variant():
    results = {
        "plain": {"log": [{"loss": 2.0, "grad_norm": 10.0}, {"loss": 4.0, "grad_norm": 10.0}]},
        "other": {"log": [{"loss": 2.0, "grad_norm": 10.5}, {"loss": 3.9, "grad_norm": 10.0}]},
        "large": {"out_of_memory": "CUDA out of memory"},
    }
    *_, last = bench_lora.comparison(results).splitlines()
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["apart", "0.00% / 0.00%", "2.50% / 5.00%", "-"]


@pytest.mark.parametrize("library", [libraries.LIGER, libraries.TORCHAO])
def test_every_library_has_a_variant_of_eight_rows_and_of_one(library: str):
    assert {variant.rows for variant in bench_lora.VARIANTS.values() if variant.package == library} == {1, 8}


def test_a_record_holds_what_was_measured_so_far_and_by_which_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["bench_lora", "--compare-steps", "1", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(libraries, "version", lambda library: f"{library} 1.0")
    log = {"log": [{"loss": 2.0, "grad_norm": 10.0}]}
    bench_lora.report({"8 rows, plain": log, "8 rows, liger": log}, bench_lora.parse_arguments())
    record = json.loads((tmp_path / "lora_7b.json").read_text())
    assert record["libraries"] == {libraries.LIGER: "liger-kernel 1.0"}
    assert list(record["variants"]) == ["8 rows, plain", "8 rows, liger"]
