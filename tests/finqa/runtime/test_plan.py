"""The plan before the work: what is needed follows from shapes alone, and what does not fit is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from training_parts import SETTINGS

from benchmarks.bench_lora import VARIANTS
from benchmarks.parts.mistral_7b import SHAPES, random_rows
from benchmarks.parts.record import RESULTS
from finqa.evaluation.engines.caches import Extent
from finqa.evaluation.generation import GenerationConfig
from finqa.models.settings import DEFAULTS
from finqa.models.students import StudentRun, load_base
from finqa.runtime.errors import UserError
from finqa.runtime.memory import free as memory
from finqa.runtime.memory import plan
from finqa.runtime.memory.needs import (
    GB,
    Load,
    Sizes,
    disk_need,
    evaluation_need,
    kept_values,
    read_config,
    sizes,
    training_need,
)
from finqa.runtime.paths import REPOSITORY
from finqa.training.packing import LENGTH_STEP, LONGEST_GRAPH, TARGETS_STEP, longest_graph
from finqa.training.rows import example
from finqa.training.trainable import Speed, lora_config, made_trainable, seconds_of_compiling

ALL_THAT_IS_FAST = Speed(compiled=True)
PLAIN = Speed(compiled=True, captured=False)
ONE_ROW = Load(2276, 2276, 159)


@pytest.fixture(scope="module")
def mistral_7b() -> Sizes:
    from transformers import MistralConfig

    return sizes(MistralConfig(**SHAPES), DEFAULTS.lora_modules, DEFAULTS.lora_r)


class Disk(NamedTuple):
    free: int


def examples(*lengths: int) -> Dataset:
    return Dataset.from_list([example(f"row-{n}", (5,) * n, n - 10) for n in lengths])


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


def recorded_peaks() -> Iterator[Any]:
    """Every run of the project's own recipe that benchmarks/results records: name, rows in all, variant, peak in GB."""
    for path in sorted(RESULTS.glob("lora_7b_*.json")):
        record = json.loads(path.read_text())
        for name, run in record["variants"].items():
            if VARIANTS[name].speed and "peak_memory_gb" in run:
                # What graphs hold shows in what is reserved alone.
                peak = run["reserved_memory_gb" if run.get("graphs") else "peak_memory_gb"]
                yield pytest.param(record["rows"], VARIANTS[name], peak, id=f"{path.stem}: {name}")


@pytest.mark.parametrize(("n_rows", "variant", "peak_gb"), [*recorded_peaks()])
def test_the_need_of_a_7b_run_is_its_recorded_peak_and_at_most_a_quarter_more(
    n_rows: int, variant: Any, peak_gb: float, mistral_7b: Sizes
):
    longest = longest_graph(mistral_7b.hidden, mistral_7b.intermediate)
    load = Load.of(Dataset.from_list(random_rows(n_rows)), variant.rows, 1, 3, True, longest)
    bits = 4 if variant.load_in_4bit else 16
    planned = training_need(mistral_7b, load, "adamw_8bit", variant.speed, bits).total / GB
    assert peak_gb <= planned <= 1.25 * peak_gb


@pytest.mark.parametrize(
    ("run", "load"),
    [("named", Load(23_680, 3463, 1280, 4096, 1024)), ("named-seed4", Load(24_192, 3463, 1280, 3584, 768)),
     ("named-seed5", Load(23_296, 3463, 1280, 3840, 768))],
)  # fmt: skip
def test_the_need_of_a_1_5b_run_is_its_recorded_peak_and_at_most_a_quarter_more(run: str, load: Load):
    """The largest updates of these runs on FinQA's rows with named programs, eight a time, by each seed."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = sizes(config, DEFAULTS.lora_modules, 64)
    assert (model.parameters, model.trained) == (1_777_088_000, 17_432_576)
    record = json.loads((REPOSITORY / "docs" / "reference" / "finqa" / "manifests.json").read_text())
    peak = record[f"Qwen2.5-Coder-1.5B-Instruct {run}".strip()]["fine-tune"]["memory_gb"]
    assert peak <= training_need(model, load, "adamw_torch", Speed()).total / GB <= 1.25 * peak


@pytest.mark.parametrize(
    "run", [f"search-{name}" for name in ("learning-rate-1e-4", "rank-16", "rank-256", "5-epochs", "all-linear-layers")]
)
def test_the_need_of_a_half_b_run_is_its_recorded_peak_and_at_most_a_quarter_more(run: str):
    """On the rows of `named` above, by the same seed; the tokenizer is that of 1.5B."""
    from transformers import Qwen2Config

    record = json.loads((REPOSITORY / "docs" / "reference" / "finqa" / "manifests.json").read_text())
    tuned, of_1_5b = (
        record[f"Qwen2.5-Coder-{name}"]["fine-tune"] for name in (f"0.5B-Instruct {run}", "1.5B-Instruct named")
    )
    assert tuned["tokens_an_epoch"] == of_1_5b["tokens_an_epoch"]
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = sizes(config, tuned["config"]["lora_modules"], tuned["config"]["lora_r"])
    planned = training_need(model, Load(23_680, 3463, 1280, 4096, 1024), tuned["config"]["optim"], Speed()).total / GB
    assert tuned["memory_gb"] <= planned <= 1.25 * tuned["memory_gb"]


@pytest.mark.parametrize("layers", ["12", "32"])
def test_the_need_of_merging_is_its_recorded_peak_and_at_most_a_quarter_more(
    layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import MistralConfig

    record = json.loads((RESULTS / "merge.json").read_text())
    shapes = MistralConfig(**{**SHAPES, "num_hidden_layers": int(layers)})
    model, told = sizes(shapes, DEFAULTS.lora_modules, record["rank"]), []
    for name, size in (("base", 2 * model.parameters), ("adapter", 4 * model.trained)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(size)  # a file of that size that takes no disk
    monkeypatch.setattr(plan, "free_memory", lambda device: 100 * GB)
    monkeypatch.setattr(plan, "check_disk", lambda *a: None)
    monkeypatch.setattr(plan, "print_need", lambda stage, need, *a: told.append(need.total))
    plan.plan_merging(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    peak = record["layers"][layers]["a matrix at a time"]["peak_bytes"]
    assert peak <= told[0] <= 1.25 * peak


@pytest.mark.parametrize("modules", [("q_proj", "k_proj", "v_proj", "o_proj"), ("down_proj",)])
def test_what_a_layer_keeps_is_what_autograd_saves(modules: tuple[str, ...]):
    """All heads have keys of their own here, and the compiler's first half, which decides what is kept, runs alone."""
    import torch
    from peft import get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    n_tokens, rank = 256, 8
    config = MistralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, sliding_window=None, attn_implementation="sdpa",
    )  # fmt: skip
    run = StudentRun("FinQA", "a-model", replace(DEFAULTS, lora_modules=modules, lora_r=rank))
    base = MistralForCausalLM(config).bfloat16()
    model: Any = get_peft_model(base, lora_config(run)).train()
    layer = base.model.layers[0]
    layer.compile(dynamic=True, backend="aot_eager_decomp_partition")
    x = torch.randn(1, n_tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(n_tokens)[None]
    angles = base.model.rotary_emb(x, positions)
    shared = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *angles)}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared and n_tokens in tensor.shape:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        layer(x, position_embeddings=angles, position_ids=positions, attention_mask=None)
    kept = sum(saved.values()) / n_tokens / 2
    assert kept == pytest.approx(kept_values(sizes(config, modules, rank), compiled=True), rel=0.02)


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
    assert two == one + 4 * mistral_7b.trained
    assert disk_need(mistral_7b, "adamw_8bit") == (4 + 3 * 6) * mistral_7b.trained


def test_the_largest_update_is_that_of_the_runs_own_batches():
    rows = examples(30, 200, 40, 210)
    assert Load.of(rows, 2, 1, 3, True, LONGEST_GRAPH) == Load(4 * LENGTH_STEP, 210, TARGETS_STEP)
    assert Load.of(rows, 2, 1, 3, False, LONGEST_GRAPH) == Load(420, 210, 20)


def test_what_is_recorded_is_the_largest_short_batch_whose_shape_comes_again():
    def captured(*lengths: int, epochs: int = 1, longest: int = LONGEST_GRAPH) -> tuple[int, int]:
        load = Load.of(examples(*lengths), 1, epochs, 3, True, longest)
        return load.captured_tokens, load.captured_targets

    assert captured(200, 300, LONGEST_GRAPH) == (0, 0), "no shape comes twice"
    assert captured(200, 300, 210) == (256, TARGETS_STEP)
    assert captured(200, 300, 310, epochs=2) == (384, TARGETS_STEP)
    assert captured(200, LONGEST_GRAPH, LONGEST_GRAPH + 1, epochs=2) == (LONGEST_GRAPH, TARGETS_STEP)
    assert captured(LONGEST_GRAPH + 1, LONGEST_GRAPH + 1) == (0, 0), "longer batches run plain"
    both = LONGEST_GRAPH + 1, LONGEST_GRAPH + 200
    assert captured(*both, longest=8192) == (LONGEST_GRAPH + 2 * LENGTH_STEP, TARGETS_STEP), "and have fewer lengths"
    padded = Load.of(examples(200, 200), 1, 1, 3, False, LONGEST_GRAPH)
    assert padded.captured_tokens == 0


def test_graphs_cost_nothing_where_no_batch_is_recorded_and_a_second_batch_where_one_is(mistral_7b: Sizes):
    def need(load: Load, speed: Speed = ALL_THAT_IS_FAST) -> float:
        return training_need(mistral_7b, load, "adamw_8bit", speed).total

    long = Load(8192, 2276, 1023)
    assert need(long) == need(long, PLAIN)
    recorded = replace(long, captured_tokens=1024, captured_targets=255)
    a_batch = need(Load(2048, 2048, 255), PLAIN) - need(Load(1024, 1024, 255), PLAIN)
    assert need(recorded) - need(recorded, PLAIN) == pytest.approx(a_batch + 4 * mistral_7b.trained)


@pytest.mark.parametrize(
    ("free_gb", "captured", "checkpointing"), [(79, True, False), (40, False, False), (23.6, False, True)]
)
def test_a_card_of_24_gb_gets_checkpointing_by_itself_a_larger_one_all_that_is_fast(
    free_gb: float, captured: bool, checkpointing: bool, on_a_gpu: Any
):
    speed = on_a_gpu(free_gb, examples(1000, 2276, 2276))
    assert (speed.captured, speed.checkpointing) == (captured, checkpointing)


@pytest.mark.parametrize(
    ("rows", "before", "asked", "compiled"),
    [
        (5929, False, None, True),
        (300, False, None, False),
        (300, True, None, True),
        (60, True, None, False),
        (60, False, True, True),
        (5929, True, False, False),
    ],
)
def test_layers_are_compiled_where_that_saves_more_than_it_takes_or_where_it_is_asked_for(
    rows: int, before: bool, asked: bool | None, compiled: bool, on_a_gpu: Any, capsys: pytest.CaptureFixture
):
    """By the rule 32 layers save 0.16 s a batch, of one row here: 48 s of 300 rows, where compiling takes 60 or 10."""
    speed = on_a_gpu(79, examples(*[1147] * rows), Speed(compiled=asked), before=before)
    assert speed.compiled == compiled
    told = capsys.readouterr().out
    assert ("layers are not compiled: that takes about" in told) == (asked is None and not compiled)


def test_a_small_model_is_bound_by_launches_and_a_large_batch_by_its_arithmetic():
    """5,000 rows of 1.5B, 8 a batch: 14 s by parameters and tokens alone, where 79 were won after compiling."""
    assert seconds_of_compiling(1_780_000_000, 28, 2_740_000, 625, before=False) == pytest.approx((60, 87.5))
    assert seconds_of_compiling(7_250_000_000, 32, 1_000_000, 10, before=True) == pytest.approx((10, 21), abs=0.1)


def test_where_only_compiled_layers_fit_they_are_compiled_in_the_shortest_run(on_a_gpu: Any):
    rows = examples(2276)
    assert on_a_gpu(79, rows, Speed()).compiled is False
    assert on_a_gpu(33, rows, Speed()).compiled is True


def test_what_the_user_says_about_checkpointing_stands(on_a_gpu: Any):
    assert on_a_gpu(79, examples(2276), replace(ALL_THAT_IS_FAST, checkpointing=True)).checkpointing is True
    with pytest.raises(UserError, match="--gradient-checkpointing yes or -F"):
        on_a_gpu(24, examples(2276), replace(ALL_THAT_IS_FAST, checkpointing=False))


@pytest.mark.parametrize(
    ("free_gb", "batch_size", "says"),
    [
        (16, 1, "what helps is -F"),
        (23.5, 8, "what helps is -F or -BS 1 -GA 8"),
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
    assert "plan: training needs 31.0 GB; 79.0 GB are free on the GPU" in told
    assert "7.25 B parameters, bf16" in told and "436,207,616 trained parameters, adamw_8bit" in told
    assert "2,304 tokens in the largest update" in told and "9.6 GB  checkpoints and student; 100.0 GB are free" in told
    assert len(told.splitlines()) == 6


def test_a_disk_that_is_too_full_is_one_line_before_anything_is_loaded(on_a_gpu: Any):
    with pytest.raises(UserError, match=r"needs 9\.6 GB of disk and 9\.0 GB are free.*--data-dir"):
        on_a_gpu(79, examples(2276), disk_gb=9)


def test_evaluation_needs_weights_adapter_keys_and_values_and_a_layer_of_prompts(
    mistral_7b: Sizes, monkeypatch: pytest.MonkeyPatch
):
    config = GenerationConfig(vllm=False, max_new_tokens=1000, batch_size=8)
    need = evaluation_need(mistral_7b, Extent(8, 1200, 9600), 1000)
    sizes_of = {name: size for name, size, _ in need.parts}
    assert sizes_of["keys and values"] == 2 * 2 * 8 * 128 * 32 * 8 * 2200
    mask = 9600 * 1200
    assert sizes_of["activations"] == 2 * (3 * 14336 + 4 * 4096) * 9600 + mask
    assert sizes_of["weights"] == 2 * mistral_7b.parameters
    in_fp32 = {name: size for name, size, _ in evaluation_need(mistral_7b, Extent(8, 1200, 9600), 1000, bits=32).parts}
    for name, one_byte in (("weights", 0), ("keys and values", 0), ("activations", mask)):
        assert in_fp32[name] - one_byte == 2 * (sizes_of[name] - one_byte)
    shared = {name: size for name, size, _ in evaluation_need(mistral_7b, Extent(8, 1200, 80), 1000).parts}
    mask = 80 * 1200
    assert shared["activations"] == 2 * (2 * 32 * 128 * 8 * 1200 + 4 * 4096 * 80 + mask) + mask, "attention's"
    short = {name: size for name, size, _ in evaluation_need(mistral_7b, Extent(8, 2, 16), 1000).parts}
    assert short["activations"] == 10 * 8 * 32768  # the logits
    run = StudentRun("FinQA-mini", "pocket-mistral", DEFAULTS)
    batches = [Extent(8, 1200, 9600), Extent(2, 1200, 2400)]
    monkeypatch.setattr(plan, "free_memory", lambda device: 79 * GB)
    plan.plan_evaluation(run, config, [])
    plan.plan_evaluation(run, config, batches)
    monkeypatch.setattr(plan, "free_memory", lambda device: 0.1 * GB)
    with pytest.raises(UserError, match="a smaller -EBS"):
        plan.plan_evaluation(run, config, batches)


@pytest.mark.parametrize(
    ("batch", "gb"),
    [
        (Extent(480, 694, 26_880), 9.9), (Extent(480, 1529, 35_352), 16.4), (Extent(480, 628, 26_880), 9.4),
        (Extent(480, 786, 71_520), 11.6), (Extent(480, 1621, 71_520), 17.8), (Extent(480, 1167, 26_880), 13.6),
    ],
)  # fmt: skip
def test_evaluation_is_planned_within_a_tenth_of_what_a_gpu_was_seen_to_hold(batch: Extent, gb: float):
    """What evaluations of Qwen2.5-Coder-0.5B said at their end ("written in 9.9 GB of memory"): one H200, torch 2.11,
    room for 512 new tokens. The largest batches of zero-shot, few-shot and bare prompts, of the same with a definition,
    and of a fine-tune on dev; all share beginnings."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    planned = evaluation_need(sizes(config, modules, 64), batch, 512).total / GB
    assert 1 <= planned / gb <= 1.1


def test_what_evaluation_needs_beside_weights_is_what_lives_as_prompts_are_read():
    import torch
    from live_memory import Live
    from transformers import MistralConfig, MistralForCausalLM

    from finqa.evaluation.engines.caches import BatchCache

    rows, longest, new = 16, 300, 100
    shapes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=256, num_hidden_layers=3, head_dim=32, sliding_window=None, **shapes)
    model = MistralForCausalLM(config).bfloat16().eval()
    ids = torch.randint(256, (rows, longest))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.inference_mode(), Live() as live:
        model(input_ids=ids, attention_mask=mask, past_key_values=BatchCache(model, longest + new), logits_to_keep=1)
    need = {
        name: size
        for name, size, _ in evaluation_need(sizes(config, (), 8), Extent(rows, longest, rows * longest), new).parts
    }
    assert live.peak == pytest.approx(need["keys and values"] + need["activations"], rel=0.15)


def test_merging_needs_the_weights_of_base_and_adapter_and_as_much_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for name, size in (("base", 3_000_000), ("adapter", 2_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    folders = (tmp_path / "base", tmp_path / "adapter", tmp_path / "data" / "merged")
    monkeypatch.setattr(plan, "free_memory", lambda device: GB)
    plan.plan_merging(*folders)
    printed = capsys.readouterr().out
    assert "plan: merging needs 506 MB; 1.0 GB are free in the machine's memory" in printed
    assert f"  {'disk':<23}{'3 MB':>9}  the merged model; " in printed
    monkeypatch.setattr(plan, "free_memory", lambda device: 505e6)
    with pytest.raises(UserError, match="merging needs 506 MB of memory and 505 MB are free"):
        plan.plan_merging(*folders)
    monkeypatch.setattr(plan, "free_memory", lambda device: GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000))
    with pytest.raises(UserError, match="merged needs 3 MB of disk and 2 MB are free"):
        plan.plan_merging(*folders)


def test_the_memory_that_is_free_is_less_than_the_machine_has():
    import psutil

    assert 0 < memory.free_memory("cpu") <= psutil.virtual_memory().total


def test_in_a_container_what_is_free_is_its_limit_less_what_cannot_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, content in (("memory.max", "3000"), ("memory.current", "1000"), ("memory.stat", "inactive_file 400")):
        (tmp_path / name).write_text(content + "\n")
    assert memory.free_memory("cpu") == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory("cpu") > 3000


def test_a_plan_counts_the_longer_batches_that_a_narrower_model_has_recorded(
    on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    from transformers import MistralConfig

    rows = examples(5000, 5000, 5000)
    on_a_gpu(300, rows)
    assert "5,120 tokens in the largest update\n" in capsys.readouterr().out, "7B: above LONGEST_GRAPH"
    narrow = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    monkeypatch.setattr(plan, "read_config", lambda *a: MistralConfig(**SHAPES | narrow))
    on_a_gpu(300, rows)
    assert "5,120 tokens in the largest update, CUDA graphs\n" in capsys.readouterr().out


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Plans a 7B run for a GPU with so much free memory and 100 GB of disk, of which nothing else is asked."""
    from transformers import MistralConfig

    monkeypatch.setattr(plan, "read_config", lambda *a: MistralConfig(**SHAPES))

    def planned(free_gb: float, rows: Dataset, speed: Speed = ALL_THAT_IS_FAST, **changed: Any) -> Speed:
        monkeypatch.setattr(plan, "free_memory", lambda device: free_gb * GB)
        disk = Disk(int(changed.get("disk_gb", 100) * GB))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
        settings = replace(DEFAULTS, batch_size=changed.get("batch_size", 1))
        run = StudentRun("FinQA", "a-7b-model", settings, peft=changed.get("peft", True))
        folder = tmp_path / "student"
        return plan.plan_training(run, speed, rows, 3, folder, "cuda", 16, changed.get("before", False))

    return planned
