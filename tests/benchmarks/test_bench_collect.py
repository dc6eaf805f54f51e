"""The benchmarks of collecting run every way in small, on the CPU, and record its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bench_collect import (
    ONE,
    PROJECT,
    SIXTEEN,
    Setup,
    in_batches,
    masked_model,
    of_both,
    parse_arguments,
    project_way,
    random_student,
    whole_model,
    with_adapter,
)
from finqa.runtime.paths import REPOSITORY


def run(module: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout


@pytest.mark.slow
def test_a_small_run_times_every_way_and_records_it(tmp_path: Path):
    small = ["--layers", "2", "--d-model", "small", "--documents", "8", "--rank", "4", "--device", "cpu"]
    printed = run("bench_collect", *small, "--scratch", str(tmp_path), "--output-dir", str(tmp_path / "results"))
    record = json.loads((tmp_path / "results" / "collect.json").read_text())
    assert set(record["ways"]) == {ONE, SIXTEEN, f"{PROJECT}, hooks", f"{PROJECT}, nnsight"}
    assert (record["layers"], record["layer"], record["d_model"]) == (2, 2, 64)
    for way in record["ways"].values():
        assert set(way["tokens_per_second"]) == {"instruct", "fine-tuned", "both"}
        assert min(way["tokens_per_second"].values()) > 0
    assert all(f"| {name}" in printed for name in record["ways"])
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # the sets are gone


def test_every_way_writes_the_same_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import load_file

    from crosscoder.activations.collection import Document
    from crosscoder.activations.readers import Target, adapter_readers
    from crosscoder.activations.store import ActivationStore

    monkeypatch.setattr(sys, "argv", ["bench", "--layers", "2", "--d-model", "small"])
    base = random_student(parse_arguments(), "cpu")
    setup = Setup(with_adapter(base, 4, "cpu"), Target(2, "mlp"), 64, "cpu")
    documents = [Document(str(n), (1, *range(3, 3 + n)), 2) for n in (5, 9, 12)]
    project_way(setup, adapter_readers(setup.model, [setup.target], "hooks"), documents, tmp_path / "project")
    store = ActivationStore(tmp_path / "project")
    ours = store.read(torch.arange(len(store))).float()
    assert not torch.equal(ours[:, 0], ours[:, 1])
    bos = torch.cat([torch.tensor(document.ids) for document in documents]) == 1
    for make, size in ((whole_model, 1), (masked_model, 16)):
        folder = tmp_path / make.__name__
        in_batches(setup, of_both(setup, make), documents, folder, size)
        theirs = load_file(folder / "activations.safetensors")["activations"][~bos].float()
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
