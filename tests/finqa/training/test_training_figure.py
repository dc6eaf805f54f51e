"""The figure of a training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finqa.training.figure import PANELS, draw_training, running_mean


def test_the_figure_has_a_panel_for_loss_learning_rate_gradient_norm_and_speed(tmp_path: Path):
    log = tmp_path / "training_log.jsonl"
    draw_training(log, "nothing yet")
    assert not (tmp_path / "training.png").exists()
    records = [
        {"step": step, "loss": 4 / step, "learning_rate": 1e-3 / step, "grad_norm": 2.0, "tokens_per_second": 900.0}
        for step in range(1, 42)
    ]
    for shown in (records[:1], records):
        log.write_text("".join(json.dumps(record) + "\n" for record in shown))
        draw_training(log, "a student on a data set")
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    picture = (tmp_path / "training.svg").read_text()
    for _, title, unit in PANELS:
        assert f"<!-- {title}, {unit} -->" in picture or f"<!-- {title} -->" in picture
    assert "<!-- a student on a data set -->" in picture and "<!-- running mean -->" in picture


def test_a_running_mean_keeps_a_line_as_it_is_and_halves_what_jumps():
    line = [float(n) for n in range(50)]
    assert running_mean(line) == pytest.approx(line)
    jumping = [float(n % 2) for n in range(100)]
    assert all(0.4 < mean < 0.6 for mean in running_mean(jumping)[10:-10])
