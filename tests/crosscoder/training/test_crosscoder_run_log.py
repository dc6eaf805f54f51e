"""The training log: one JSON line a logged step, in order, whatever interruptions there were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosscoder.training.run_log import RunLog, StepRecord, _flat, progress_line


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=100 * step,
        loss=loss,
        reconstruction=loss,
        auxiliary=0.0,
        explained_variance=(0.9, 0.8),
        explained_variance_published=(0.7, 0.6),
        dead_share=0.25,
        never_positive_share=0.0,
        drawn_anew=0,
        threshold=None,
        gradient_norm=1.0,
        learning_rate=1e-3,
    )


def logged(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]


def test_every_record_is_a_line(tmp_path: Path):
    with RunLog(tmp_path / "log.jsonl") as log:
        for step in (1, 2, 3):
            log.add(record(step))
    assert logged(tmp_path / "log.jsonl") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["explained_variance"] == [0.9, 0.8]


def test_steps_that_a_resumed_run_repeats_take_the_place_of_the_lost_ones(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        for step in (1, 2, 3):
            log.add(record(step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with RunLog(path) as log:
        log.add(record(3, loss=2.0))
        log.add(record(4, loss=2.0))
    assert logged(path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_progress_is_a_plain_line_without_a_terminal(tmp_path: Path, capsys):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.start_progress(2)
        log.add(record(1))
        log.add(record(2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0][8:] == " step 1 of 2: loss 1, explained variance 0.9000 and 0.8000, L0 0.0, dead 25.0%"
    assert "\r" not in "".join(lines)
    assert lines[-1][8:].startswith(" step 2 of 2")
    assert lines[-1].endswith("tokens/s")


@pytest.mark.parametrize(("stage", "of"), [(None, "difference"), (0, "instruct"), (1, "fine_tuned")])
def test_what_one_vector_is_explained_of_is_said(stage, of):
    flat = _flat(record(1)._replace(explained_variance=(0.5,), stage=stage)._asdict())
    assert flat[f"explained_variance/{of}"] == 0.5


def test_the_progress_line_gives_speed_where_it_is_known():
    assert progress_line(record(1), 12345.6).endswith("12,346 tokens/s")
