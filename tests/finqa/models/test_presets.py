from __future__ import annotations

import runpy
import sys

import pytest

from finqa.models.students import StudentRun
from finqa.runtime.command_line import from_args
from finqa.runtime.paths import REPOSITORY
from finqa.training.fine_tuning import TrainingConfig

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"


def student(monkeypatch: pytest.MonkeyPatch, *words: str) -> StudentRun:
    """The student that main.py makes of these words."""
    main = runpy.run_path(str(REPOSITORY / "main.py"))
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    return main["student"](main["parse_arguments"]())


def test_the_published_set_up_is_the_reported_one(monkeypatch: pytest.MonkeyPatch):
    run = student(monkeypatch, "FinQA", MISTRAL, "-P", "--preset", "published")
    s = run.settings
    assert s.lora_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (s.lora_r, s.lora_alpha, s.lora_dropout) == (512, 1024, 0.1)
    assert (s.learning_rate, s.lr_scheduler, s.warmup_steps, s.weight_decay) == (2.5e-5, "linear", 5, 0.01)
    assert (s.optim, s.batch_size, s.num_epochs, run.grad_accum) == ("adamw_8bit", 1, 1, 1)
    assert s.max_new_tokens == 1000
    main = runpy.run_path(str(REPOSITORY / "main.py"))
    args = main["parse_arguments"]()
    assert from_args(TrainingConfig, args).seed == 3
    monkeypatch.setattr(sys, "argv", [*sys.argv, "-T"])
    generation = main["evaluation_config"](main["parse_arguments"](), run).generation
    assert (generation.temperature, generation.samples) == (0.0, 1)


def test_the_preset_is_mistrals_default_and_names_the_same_model(monkeypatch: pytest.MonkeyPatch):
    plain, preset = (student(monkeypatch, "FinQA", MISTRAL, "-P", *more) for more in ([], ["--preset", "published"]))
    assert plain == preset
    assert preset.model_id == "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"


@pytest.mark.parametrize(
    ("model", "rate", "modules"),
    [
        ("microsoft/Orca-2-7b", 5e-5, ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("microsoft/Phi-3-mini-128k-instruct", 1e-4, ("qkv_proj", "o_proj")),
        ("pocket-mistral", 2.5e-5, ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_other_models_keep_what_their_architecture_asks_for(
    monkeypatch: pytest.MonkeyPatch, model: str, rate: float, modules: tuple[str, ...]
):
    s = student(monkeypatch, "FinQA", model, "-P", "--preset", "published").settings
    assert (s.learning_rate, s.lora_modules, s.lora_r, s.optim) == (rate, modules, 512, "adamw_8bit")


def test_a_flag_beside_the_preset_wins(monkeypatch: pytest.MonkeyPatch):
    words = ["FinQA", "pocket-mistral", "-P", "--preset", "published", "--lora-r", "8", "-BS", "4", "-LM", "q_proj"]
    s = student(monkeypatch, *words).settings
    assert (s.lora_r, s.batch_size, s.lora_modules, s.lora_alpha) == (8, 4, ("q_proj",), 1024)
