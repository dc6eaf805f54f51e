"""The plan before the work: what is needed follows from shapes alone, and what does not fit is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from training_parts import SETTINGS

from benchmarks.mistral_7b import SHAPES
from finqa import plan
from finqa.errors import UserError
from finqa.generation import GenerationConfig
from finqa.needs import GB, Load, Sizes, disk_need, evaluation_need, read_config, sizes, training_need
from finqa.student_settings import DEFAULTS
from finqa.students import StudentRun, load_base
from finqa.tuning.trainable import Speed, made_trainable
from finqa.tuning.training_rows import Example

ALL_THAT_IS_FAST = Speed()
PLAIN = Speed(captured=False)
ONE_ROW, EIGHT_ROWS = Load(2276, 2276, 159), Load(16_407, 2276, 1026)
"""The largest updates of the measured runs."""


@pytest.fixture(scope="module")
def mistral_7b() -> Sizes:
    from transformers import MistralConfig

    return sizes(MistralConfig(**SHAPES), DEFAULTS.lora_modules, DEFAULTS.lora_r)


class Disk(NamedTuple):
    free: int


def examples(*lengths: int) -> list[Example]:
    return [Example(f"row-{n}", (5,) * n, n - 10) for n in lengths]


def test_mistral_7b_has_the_published_numbers_of_parameters(mistral_7b: Sizes):
    assert mistral_7b.parameters == 7_248_023_552
    assert mistral_7b.trained == 436_207_616
    assert mistral_7b.in_layers == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


@pytest.mark.parametrize("model", ["tiny", "pocket-mistral"])
@pytest.mark.parametrize("modules", [(), ("q_proj", "down_proj")])
def test_what_is_counted_without_weights_is_what_the_loaded_model_has(
    model: str, modules: tuple[str, ...], tiny_student: Path
):
    import torch

    name = str(tiny_student) if model == "tiny" else model
    counted = sizes(read_config(name), modules, 4)
    run = StudentRun("FinQA-mini", name, replace(SETTINGS, lora_r=4, lora_modules=modules or ("q_proj",)))
    base: Any = load_base(name, torch.float32)
    assert counted.parameters == base.num_parameters()
    trained = made_trainable(base, replace(run, peft=bool(modules)), Speed())
    assert counted.trained == sum(p.numel() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("load", "speed", "measured_gb"),
    [
        (ONE_ROW, PLAIN, 30.4),
        (EIGHT_ROWS, PLAIN, 104.1),
        (ONE_ROW, replace(PLAIN, compiled=False), 34.2),
        (EIGHT_ROWS, replace(PLAIN, compiled=False), 127.5),
        (replace(ONE_ROW, tokens=2127, longest=2127), replace(PLAIN, checkpointing=True), 19.4),
        (ONE_ROW, Speed(), 42.3),
    ],
)
def test_the_need_of_7b_runs_is_what_was_measured_on_a_gpu(
    load: Load, speed: Speed, measured_gb: float, mistral_7b: Sizes
):
    planned = training_need(mistral_7b, load, "adamw_8bit", speed).total / GB
    assert 0.98 * measured_gb < planned < 1.07 * measured_gb


def test_4_bits_an_optimiser_in_fp32_and_all_weights_are_counted_as_what_they_are(mistral_7b: Sizes):
    def part(name: str, optim: str = "adamw_8bit", model: Sizes = mistral_7b, bits: int = 16) -> float:
        need = training_need(model, ONE_ROW, optim, PLAIN, bits)
        return next(size for what, size, _ in need.parts if what == name)

    assert part("weights") == 2 * mistral_7b.parameters
    in_4_bits = 0.53 * mistral_7b.in_layers + 2 * (mistral_7b.parameters - mistral_7b.in_layers)
    assert part("weights", bits=4) == pytest.approx(in_4_bits)
    assert part("adapter", "adamw_torch") - part("adapter") == 6 * mistral_7b.trained
    whole = replace(mistral_7b, trained=mistral_7b.parameters, adapted=False)
    assert part("weights", model=whole) == 4 * mistral_7b.parameters
    assert part("optimiser", model=whole) == 4 * mistral_7b.parameters
    one, two = (training_need(mistral_7b, ONE_ROW, "adamw_8bit", PLAIN, processes=n).total for n in (1, 2))
    assert two == one + 8 * mistral_7b.trained
    assert disk_need(mistral_7b, "adamw_8bit") == (4 + 3 * 6) * mistral_7b.trained


def test_the_largest_update_is_that_of_the_runs_own_batches():
    rows = examples(30, 200, 40, 210)
    assert Load.of(rows, 2, 1, 3, packed=True) == Load(410, 210, 20)
    assert Load.of(rows, 2, 1, 3, packed=False) == Load(420, 210, 20)
    assert Load.of(rows, 1, 1, 3, packed=True) == Load(210, 210, 10)


@pytest.mark.parametrize(
    ("free_gb", "captured", "checkpointing"), [(79, True, False), (40, False, False), (23.6, False, True)]
)
def test_a_card_of_24_gb_gets_checkpointing_by_itself_a_larger_one_all_that_is_fast(
    free_gb: float, captured: bool, checkpointing: bool, on_a_gpu: Any
):
    speed = on_a_gpu(free_gb, examples(1000, 2276))
    assert (speed.captured, speed.checkpointing) == (captured, checkpointing)


def test_what_the_user_says_about_checkpointing_stands(on_a_gpu: Any):
    assert on_a_gpu(79, examples(2276), Speed(checkpointing=True)).checkpointing is True
    with pytest.raises(UserError, match="--gradient-checkpointing yes or -F"):
        on_a_gpu(24, examples(2276), Speed(checkpointing=False))


@pytest.mark.parametrize(
    ("free_gb", "batch_size", "says"),
    [
        (16, 1, "what helps is -F"),
        (21.5, 8, "what helps is -F or -BS 1 -GA 8"),
        (13.6, 8, "what helps is all of -F -BS 1 --gradient-checkpointing yes"),
        (6, 1, "use a GPU with more memory"),
    ],
)
def test_a_card_that_is_too_small_is_one_line_that_names_what_helps(
    free_gb: float, batch_size: int, says: str, on_a_gpu: Any
):
    with pytest.raises(UserError) as error:
        on_a_gpu(free_gb, examples(*[2276] * 8), batch_size=batch_size)
    line = str(error.value)
    assert says in line and "\n" not in line
    assert f"{free_gb:.1f} GB are free" in line


def test_all_weights_of_a_7b_model_do_not_fit_and_an_adapter_does(on_a_gpu: Any):
    with pytest.raises(UserError, match="what helps is -P"):
        on_a_gpu(79, examples(2276), peft=False)


def test_a_plan_is_a_few_plain_lines(on_a_gpu: Any, capsys: pytest.CaptureFixture):
    on_a_gpu(79, examples(2276), PLAIN)
    told = capsys.readouterr().out
    assert "plan: training needs 30.7 GB; 79.0 GB are free on the GPU" in told
    assert "7.25 B parameters, bf16" in told and "436,207,616 trained parameters, adamw_8bit" in told
    assert "2,276 tokens in the largest update" in told and "9.6 GB  checkpoints and student; 100.0 GB are free" in told
    assert len(told.splitlines()) == 6


def test_a_disk_that_is_too_full_is_one_line_before_anything_is_loaded(on_a_gpu: Any):
    with pytest.raises(UserError, match=r"needs 9\.6 GB of disk and 9\.0 GB are free.*--data-dir"):
        on_a_gpu(79, examples(2276), disk_gb=9)


def test_evaluation_needs_weights_adapter_and_keys_and_values(mistral_7b: Sizes):
    config = GenerationConfig(vllm=False, max_new_tokens=1000, batch_size=8)
    need = evaluation_need(mistral_7b, config, longest=4096)
    sizes_of = {name: size for name, size, _ in need.parts}
    assert sizes_of["keys and values"] == 2 * 2 * 8 * 128 * 32 * 8 * 4096
    assert sizes_of["weights"] == 2 * mistral_7b.parameters
    run = StudentRun("FinQA-mini", "pocket-mistral", DEFAULTS)
    plan.plan_evaluation(run, config, free=79 * GB)
    with pytest.raises(UserError, match="a smaller -EBS"):
        plan.plan_evaluation(run, config, free=0.1 * GB)


def test_merging_needs_the_weights_of_base_and_adapter_and_as_much_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for name, size in (("base", 3_000_000), ("adapter", 2_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    folders = (tmp_path / "base", tmp_path / "adapter", tmp_path / "data" / "merged")
    plan.plan_merging(*folders, free=GB)
    printed = capsys.readouterr().out
    assert "plan: merging needs 508 MB; 1.0 GB are free in the machine's memory" in printed
    assert f"  {'disk':<23}{'3 MB':>9}  the merged model; " in printed
    with pytest.raises(UserError, match="merging needs 508 MB of the machine's memory and 507 MB are free"):
        plan.plan_merging(*folders, free=507e6)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000))
    with pytest.raises(UserError, match="merged needs 3 MB of disk for a merged model and 2 MB are free"):
        plan.plan_merging(*folders, free=GB)


def test_the_memory_that_is_free_is_less_than_the_machine_has():
    import psutil

    assert 0 < plan.free_memory("cpu") <= psutil.virtual_memory().total


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Plans a 7B run for a GPU with so much free memory and 100 GB of disk, of which nothing else is asked."""
    from transformers import MistralConfig

    monkeypatch.setattr(plan, "read_config", lambda *a: MistralConfig(**SHAPES))

    def planned(free_gb: float, rows: list[Example], speed: Speed = ALL_THAT_IS_FAST, **changed: Any) -> Speed:
        monkeypatch.setattr(plan, "free_memory", lambda device: free_gb * GB)
        disk = Disk(int(changed.get("disk_gb", 100) * GB))
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: disk)
        settings = replace(DEFAULTS, batch_size=changed.get("batch_size", 1))
        run = StudentRun("FinQA", "a-7b-model", settings, peft=changed.get("peft", True))
        return plan.plan_training(run, speed, rows, 3, tmp_path / "student", "cuda", 16)

    return planned
