"""Ways to train and bases to train on: 4-bit bases, all weights, 8-bit AdamW, other architectures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_parts import SETTINGS, examples, folders_with_rows, read_log, teacher_row

from finqa.evaluation.engines.serving import served_models
from finqa.evaluation.generation import GenerationConfig
from finqa.models.settings import SETTINGS as STUDENTS
from finqa.models.settings import StudentSettings, settings_for
from finqa.models.students import StudentRun, load_base, load_tokenizer, prompt_ids, training_ids
from finqa.runtime.errors import UserError
from finqa.runtime.memory.needs import read_config, sizes
from finqa.runtime.paths import REPOSITORY
from finqa.training.fine_tuning import TrainingConfig, fine_tune
from finqa.training.rows import NO_LOSS, collator
from finqa.training.trainable import Speed, compile_layers, compiled_before, made_trainable

EIGHT_BIT = replace(SETTINGS, optim="adamw_8bit", lora_dropout=0.0, num_epochs=2, lora_r=32)
"""A matrix of under 4,096 numbers keeps its state in fp32, so the rank is larger."""


def loss_of(model: Any, base: str) -> float:
    import torch

    tokenizer = load_tokenizer(base)
    ids, n_prompt = training_ids(tokenizer, teacher_row(5).prompt, teacher_row(5).generated_code)
    labels = torch.tensor([[NO_LOSS] * n_prompt + ids[n_prompt:]])
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), labels=labels).loss.item()


COMPILING = """
import sys
from pathlib import Path
from finqa.training.trainable import keep_compiled
keep_compiled(Path(sys.argv[1]) / "a-model.done")
import torch
from torch._dynamo.utils import counters
torch.compile(lambda x: (x.sin() + 1).relu().sum())(torch.ones(100))
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_what_is_compiled_is_kept_in_a_folder_of_ours_for_the_next_run(tmp_path: Path):
    (tmp_path / "compiling.py").write_text(COMPILING)
    folder = tmp_path / "compiled"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["PYTHONPATH"] = str(REPOSITORY)

    def run() -> list[str]:
        words = [sys.executable, str(tmp_path / "compiling.py"), str(folder)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    assert run() == [f"layers are compiled in the first update; what that makes is kept in {folder}", "0"]
    (folder / "a-model.done").touch()
    said, hits = run()
    assert said.endswith(f", from what is kept in {folder}") and int(hits) > 0


def test_layers_count_as_compiled_before_for_the_same_shapes_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    run = StudentRun("FinQA-mini", "a-model", EIGHT_BIT)

    def done(run: StudentRun = run, speed: Speed = Speed()) -> Path:  # noqa: B008  frozen
        return compiled_before(run, speed, str(tmp_path), tmp_path / "compiled")

    assert done() == done(replace(run, settings=replace(EIGHT_BIT, learning_rate=1.0)))
    others = (replace(run, settings=replace(EIGHT_BIT, lora_r=3)), replace(run, load_in_4bit=True))
    assert len({done(), *map(done, others), done(run, Speed(fp8_base=True))}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft", "in_4bit", "learning_rate"), [(True, True, 1e-2), (True, False, 1e-2), (False, False, 1e-3)]
)
def test_4_bit_bases_adapters_and_all_weights_learn_by_8_bit_adamw_and_are_evaluated_as_saved(
    peft: bool, in_4bit: bool, learning_rate: float, tmp_path: Path
):
    settings = replace(EIGHT_BIT, learning_rate=learning_rate)
    run = StudentRun("FinQA-mini", "pocket-mistral", settings, peft=peft, load_in_4bit=in_4bit)
    folder = fine_tune(run, TrainingConfig(max_rows=24), folders_with_rows(tmp_path))
    log = read_log(folder)
    assert log[-1]["step"] == 12 and log[-1]["loss"] < log[0]["loss"] - 0.5
    assert all(record["memory_gb"] > 0.05 for record in log)
    assert (folder / ("adapter_model.safetensors" if peft else "model.safetensors")).exists()
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["config"]["load_in_4bit"] == in_4bit and manifest["config"]["optim"] == "adamw_8bit"
    assert manifest["speed"] == {
        "packed": False, "compiled": True, "captured": False, "fp8_base": False, "checkpointing": False
    }  # fmt: skip
    state = optimiser_state(folder / "checkpoint-12")
    # Where all weights are trained the Trainer keeps the embeddings' state in fp32.
    assert {tensor.dtype.itemsize for tensor in state if tensor.numel() > 4096} == ({1} if peft else {1, 4})

    before = loss_of(load_base("pocket-mistral", load_in_4bit=in_4bit), "pocket-mistral")
    engine = GenerationConfig(vllm=False, max_new_tokens=4, batch_size=2)
    prompt = prompt_ids(load_tokenizer("pocket-mistral"), [{"role": "user", "content": teacher_row(5).prompt}])
    [served] = served_models(run, folder, ["fine-tuned"], engine)
    [(place, reply)] = served.generate([prompt])
    assert place == 0 and reply.n_new_tokens >= 1
    base: Any = load_base("pocket-mistral" if peft else str(folder), load_in_4bit=in_4bit)
    if peft:
        from finqa.models.students import load_adapter

        base = load_adapter(base, folder)
    assert loss_of(base, "pocket-mistral") < before - 0.5


def optimiser_state(checkpoint: Path) -> list[Any]:
    import torch

    def tensors(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [tensor for inner in value.values() for tensor in tensors(inner)]
        return [value] if isinstance(value, torch.Tensor) else []

    return tensors(torch.load(checkpoint / "optimizer.pt", weights_only=False)["state"])


def test_a_4_bit_base_is_not_trained_as_a_whole(tmp_path: Path):
    run = StudentRun("FinQA-mini", "pocket-mistral", SETTINGS, peft=False, load_in_4bit=True)
    with pytest.raises(UserError, match="a 4-bit base cannot be trained as a whole"):
        fine_tune(run, TrainingConfig(), folders_with_rows(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "says"), [({"peft": False}, "give -P"), ({"load_in_4bit": True}, "leave out -F"), ({}, "needs a GPU")]
)
def test_an_8_bit_base_is_refused_before_anything_is_loaded(wrong: dict, says: str):
    from finqa.training.trainable import check_trainable

    run = StudentRun("FinQA-mini", "pocket-mistral", SETTINGS, **wrong)
    with pytest.raises(UserError, match=says):
        check_trainable(run, Speed(fp8_base=True), "cpu")


@pytest.mark.parametrize(
    "model", ["Mistral-7B-Instruct-v0.3", "Phi-3-mini-128k-instruct", "Orca-2-13b", "Qwen2.5-Coder-1.5B-Instruct"]
)
def test_the_named_students_have_settings_of_their_own_and_all_others_the_defaults(model: str):
    assert any(name.endswith(model) and settings_for(name) is STUDENTS[name] for name in STUDENTS)
    assert settings_for(f"/some/where/{model.lower()}") in STUDENTS.values()
    assert settings_for("a/nother-model") == StudentSettings()


def test_phi_3_has_its_adapter_on_the_fused_projection():
    for size in ("mini", "medium"):
        assert settings_for(f"microsoft/Phi-3-{size}-128k-instruct").lora_modules == ("qkv_proj", "o_proj")


@pytest.fixture
def other_model(tiny_student: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with a random two-layer model of an architecture and the tiny student's tokenizer."""

    def make(kind: str) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = Path(shutil.copytree(tiny_student, tmp_path / kind))
        own = json.loads((folder / "config.json").read_text())
        shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
        config = AutoConfig.for_model(kind, **{name: own[name] for name in shared}, initializer_range=0.1)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("qwen2", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("phi3", ("qkv_proj", "o_proj")),
    ],
)
def test_a_step_on_another_architecture_changes_its_adapter_alone_and_lowers_the_loss(
    kind: str, modules: tuple[str, ...], other_model: Callable[[str], Path]
):
    import torch

    folder = str(other_model(kind))
    run = StudentRun("FinQA-mini", folder, replace(SETTINGS, lora_modules=modules, lora_dropout=0.0))
    model: Any = made_trainable(load_base(folder, torch.float32), run, Speed())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == set(modules)
    assert sum(p.numel() for p in trained.values()) == sizes(read_config(folder), modules, SETTINGS.lora_r).trained
    tokenizer = load_tokenizer(folder)
    batch = collator(3)(examples([teacher_row(1), teacher_row(2, padding=5)], tokenizer))
    del batch["n_tokens"]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.equal(frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.slow
def test_the_fused_projection_is_trained_from_the_command_to_the_saved_adapter(
    other_model: Callable[[str], Path], tmp_path: Path
):
    folder = other_model("phi3")
    settings = replace(SETTINGS, lora_modules=("qkv_proj", "o_proj"), lora_dropout=0.0)
    run = StudentRun("FinQA-mini", str(folder), settings)
    student = fine_tune(run, TrainingConfig(max_rows=8), folders_with_rows(tmp_path))
    saved = json.loads((student / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {"qkv_proj", "o_proj"}
    wrong = replace(run, settings=replace(settings, lora_modules=("q_proj",)))
    with pytest.raises(UserError, match="has no layers called q_proj; name its own with --lora-modules"):
        fine_tune(wrong, TrainingConfig(max_rows=8), folders_with_rows(tmp_path / "wrong"))


@pytest.mark.slow
def test_all_decoder_layers_share_one_compiled_layer(tmp_path: Path):
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from transformers import Qwen2Config, Qwen2ForCausalLM

    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return aot_autograd(fw_compiler=lambda traced, _: traced.forward)(graph, inputs)

    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = made_trainable(Qwen2ForCausalLM(config), StudentRun("FinQA-mini", "any", SETTINGS), Speed()).train()
    compile_layers(model.get_base_model(), backend=backend)
    for length in (16, 24, 32):
        ids = torch.arange(length)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(compiled) == 1


def test_checkpointing_gives_the_same_loss_and_gradients(tiny_student: Path):
    import torch

    run = StudentRun("FinQA-mini", str(tiny_student), replace(SETTINGS, lora_dropout=0.0))
    tokenizer = load_tokenizer(str(tiny_student))
    batch = collator(3)(examples([teacher_row(1), teacher_row(2, padding=5)], tokenizer))
    del batch["n_tokens"]
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        speed = Speed(checkpointing=checkpointing)
        model: Any = made_trainable(load_base(str(tiny_student), torch.float32), run, speed)
        assert model.base_model.model.is_gradient_checkpointing is checkpointing
        model.train()
        model(**batch).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, twice)
