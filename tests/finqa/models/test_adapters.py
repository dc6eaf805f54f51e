"""Adapters are plain LoRA or refused; models and their settings are what a user meant, or one line says otherwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_parts import SETTINGS, folders_with_rows

from finqa.evaluation.engines.hugging_face_engine import hugging_face
from finqa.evaluation.engines.serving import served_models
from finqa.evaluation.engines.vllm_engine import EngineArguments, vllm_engine
from finqa.evaluation.generation import GenerationConfig
from finqa.models.adapters import check_adapter, write_canonical
from finqa.models.merging import merge
from finqa.models.settings import DEFAULTS, settings_for
from finqa.models.students import (
    LONGEST_ID,
    StudentRun,
    find_adapter,
    load_adapter,
    load_base,
    load_tokenizer,
    prompt_ids,
    resolve_model,
)
from finqa.models.weights import weights_hash
from finqa.runtime.errors import UserError
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.training.fine_tuning import TrainingConfig, fine_tune

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def adapter(tiny_student: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny student, at its start."""
    from peft import LoraConfig, get_peft_model

    pair: Any = get_peft_model(load_base(str(tiny_student)), LoraConfig(r=4, target_modules=["q_proj"]))
    pair.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def change(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


OTHER_KINDS = {
    "bias": "all", "use_dora": True, "lora_bias": True, "modules_to_save": ["norm"], "trainable_token_indices": [1],
    "target_parameters": ["experts.down_proj"], "layer_replication": [[0, 1]], "use_qalora": True, "peft_type": "IA3",
    "alora_invocation_tokens": [5], "init_lora_weights": "pissa_niter_4", "of_a_later_release": {"on": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_an_adapter_that_is_not_plain_lora_is_refused_before_anything_is_loaded(
    name: str, adapter: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    change(adapter, **{name: OTHER_KINDS[name]})
    base = load_base(str(tiny_student))
    run = StudentRun("FinQA-mini", str(tiny_student), SETTINGS)
    folders = Folders(data=tmp_path / "data")
    shutil.copytree(adapter, folders.model(run.dataset, run.model_id))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    config = GenerationConfig(vllm=False, max_new_tokens=2, batch_size=1)
    for use in (
        lambda: find_adapter(run, folders),
        lambda: load_adapter(base, adapter),
        lambda: merge(str(tiny_student), adapter, tmp_path / "merged"),
        lambda: list(served_models(run, adapter, ["fine-tuned"], config)),
        lambda: list(served_models(run, adapter, ["base", "fine-tuned"], replace(config, vllm=True))),
    ):
        with pytest.raises(UserError, match=f"not plain LoRA.*{name}") as refusal:
            use()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_starts_that_change_the_base_are_refused(name: str, adapter: Path, tiny_student: Path):
    change(adapter, init_lora_weights=name)
    with pytest.raises(UserError, match="changes the base weights"):
        check_adapter(adapter, tiny_student)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"layers.0.self_attn.q_proj": 8}},
        {"alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_plain_adapters_of_any_rank_and_scale_merge_to_what_the_pair_gives(
    settings: dict[str, Any], tiny_student: Path, tmp_path: Path
):
    import torch
    from peft import LoraConfig, get_peft_model

    pair: Any = get_peft_model(
        load_base(str(tiny_student)), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **settings)
    )
    torch.manual_seed(1)
    for name, parameter in pair.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pair.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(str(tiny_student), tmp_path / "adapter", tmp_path / "merged")
    pair = load_adapter(load_base(str(tiny_student), torch.float32), tmp_path / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = pair(input_ids=ids).logits
        with pair.disable_adapter():
            assert (pair(input_ids=ids).logits - expected).abs().max() > 0.5
        found = load_base(str(tmp_path / "merged"), torch.float32)(input_ids=ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("modules", [["lm_head"], ["q_proj", "embed_tokens"], ["model.embed_tokens"], ".*lm_head"])
def test_an_adapter_on_a_tied_head_is_refused(modules: Any, adapter: Path, tiny_student: Path):
    change(adapter, target_modules=modules)
    with pytest.raises(UserError, match=r"one matrix as embedding and head.*leave it out of --lora-modules"):
        check_adapter(adapter, tiny_student)


def test_a_tied_head_and_unknown_modules_are_refused_before_training(tiny_student: Path, tmp_path: Path):
    folders = folders_with_rows(tmp_path)
    for modules, says in (
        (("q_proj", "lm_head"), "leave it out of --lora-modules"),
        (("q_proj", "query"), "has no layers called query; name its own with --lora-modules: down_proj, gate_proj, k_"),
    ):
        run = StudentRun("FinQA-mini", str(tiny_student), replace(SETTINGS, lora_modules=modules))
        with pytest.raises(UserError, match=says):
            fine_tune(run, TrainingConfig(), folders)
        assert not list((folders.data / "models").rglob("*.safetensors"))


@pytest.mark.parametrize("modules", [["gate", "q_proj"], ["w1", "q_proj"]])
def test_an_adapter_on_experts_or_their_router_is_refused(modules: list[str], adapter: Path, tmp_path: Path):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    change(adapter, target_modules=modules)
    with pytest.raises(UserError, match=r"not plain LoRA .* parameters of gate|does not fit its base") as refusal:
        load_adapter(load_base(str(tmp_path / "experts"), torch.float32), adapter)
    assert "\n" not in str(refusal.value)


def test_an_adapter_of_another_models_sizes_is_one_line(adapter: Path, tiny_student: Path):
    base = load_base(str(tiny_student))
    change(adapter, r=8)
    with pytest.raises(UserError, match=r"does not fit its base.*size mismatch"):
        load_adapter(base, adapter)


def test_a_model_without_a_template_leaves_no_folder(tiny_student: Path, tmp_path: Path):
    bare = Path(shutil.copytree(tiny_student, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    folders = folders_with_rows(tmp_path)
    with pytest.raises(UserError, match=r"no chat template; .* chat_template\.jinja"):
        fine_tune(StudentRun("FinQA-mini", str(bare), SETTINGS), TrainingConfig(), folders)
    assert not list((folders.data / "models").rglob("*"))[1:]


def test_a_damaged_adapter_config_is_one_line(adapter: Path, tiny_student: Path):
    (adapter / "adapter_config.json").write_text('{"r": ')
    with pytest.raises(UserError, match="is damaged"):
        check_adapter(adapter, tiny_student)


def test_equal_adapters_are_equal_files(tmp_path: Path):
    written = []
    for order in (["v_proj", "q_proj"], ["q_proj", "v_proj"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": order, "r": 8}))
        write_canonical(tmp_path)
        written.append((tmp_path / "adapter_config.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_saved_adapter_is_canonical_and_as_readable_as_other_files(tiny_student: Path, tmp_path: Path):
    run = StudentRun("FinQA-mini", str(tiny_student), replace(SETTINGS, lora_modules=("v_proj", "q_proj")))
    folder = fine_tune(run, TrainingConfig(max_rows=4), folders_with_rows(tmp_path))
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in (folder / "adapter_model.safetensors", tmp_path / "any")}
    assert len(modes) == 1


OBEYED = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "suppress_tokens": list(range(5, 200))}


def test_greedy_replies_do_not_obey_the_models_generation_config_and_run_json_says_so(
    tiny_student: Path, tmp_path: Path
):
    changed = Path(shutil.copytree(tiny_student, tmp_path / "changed"))
    path = changed / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OBEYED))
    config = GenerationConfig(vllm=False, max_new_tokens=24, batch_size=2)
    texts = []
    for folder in (tiny_student, changed):
        run = StudentRun("FinQA-mini", str(folder), SETTINGS)
        prompt = prompt_ids(load_tokenizer(str(folder)), [{"role": "user", "content": "sales"}])
        [served] = served_models(run, None, ["base"], config)
        texts.append([reply.text for _, reply in served.generate([prompt])])
        assert served.facts["generation_config_not_used"] == (OBEYED if folder is changed else {})
    assert texts[0] == texts[1] != [""]


def test_padding_outside_of_the_embeddings_is_replaced(tiny_student: Path):
    tokenizer: Any = load_tokenizer(str(tiny_student))
    folder = tiny_student.with_name("odd-padding")
    shutil.copytree(tiny_student, folder)
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    tokenizer.save_pretrained(folder)
    loaded: Any = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id >= load_base(str(folder)).config.vocab_size
    assert loaded.pad_token_id == loaded.eos_token_id
    ids = [prompt_ids(loaded, [{"role": "user", "content": text}]) for text in ("a", "a longer one")]
    config = GenerationConfig(vllm=False, max_new_tokens=2, batch_size=2)
    assert len(list(hugging_face(load_base(str(folder)), loaded, config)(ids))) == 2


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.gguf": ""}, "holds no model .*safetensors"),
        ({}, "holds no model .*safetensors"),
        ({"adapter_config.json": "{}"}, "holds an adapter .*give the base model"),
        ({"config.json": "{"}, "is damaged"),
        ({"config.json": '{"model_type": "gemma3", "vision_config": {"a": 1}}'}, "reads vision beside text"),
        ({"config.json": '{"model_type": "t5"}'}, "no causal language model"),
        ({"config.json": '{"model_type": "of_tomorrow"}'}, "no causal language model"),
    ],
    ids=str,
)
def test_a_folder_that_holds_no_student_is_one_line(files: dict[str, str], says: str, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match=says):
        load_tokenizer(str(tmp_path))


def test_a_gguf_file_and_a_typo_say_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"is a file; give a folder with config.json"):
        resolve_model(str(tmp_path / "model.gguf"))
    monkeypatch.setattr("finqa.models.hub.fetch_folder", lambda *_: None)
    with pytest.raises(UserError, match="do you mean pocket-mistral"):
        resolve_model("pocket-mistrl")


def test_a_second_copy_of_the_weights_is_no_part_of_the_model(tiny_student: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_student, tmp_path / "both"))
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    assert weights_hash(folder) == weights_hash(tiny_student) != weights_hash(folder, consolidated=True)
    config = GenerationConfig(vllm=True, max_new_tokens=2, batch_size=1)
    engine = vllm_engine(EngineArguments(str(folder), str(folder), False, config, None))
    with pytest.raises(UserError, match="second copy of the weights"), engine:
        pass


def test_seven_modules_have_a_name_that_the_hub_takes_and_shorter_names_stay():
    model = "mistralai/Mistral-7B-Instruct-v0.3"
    run = StudentRun("FinQA", model, DEFAULTS)
    assert run.model_id == "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"
    seven = replace(run, settings=replace(DEFAULTS, lora_modules=SEVEN))
    assert seven.model_id == "mistralai_Mistral-7B-Instruct-v0.3-peftq_k_v_o_gate_up_down-bs1-ne1"
    assert len(seven.model_id) <= LONGEST_ID


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "a\ud800", "a/b"])
def test_a_run_name_that_no_folder_can_have_is_one_line(name: str):
    with pytest.raises(UserError, match="--run-name is part of a folder name"):
        StudentRun("FinQA", "pocket-mistral", SETTINGS, run_name=name)


@pytest.mark.parametrize(
    ("model", "rank"),
    [("a/model-0.5B", 64), ("a/Some-360M-Instruct", 64), ("a/b-3b-chat", 64), ("a/b-8B", 512), ("a/v2.5-model", 512)],
)
def test_an_unknown_model_has_the_settings_of_its_size_and_the_name_of_every_unknown_one(model: str, rank: int):
    settings = settings_for(model)
    assert settings.lora_r == rank and (settings.batch_size, settings.num_epochs) == (1, 1)


def test_a_local_folder_has_the_settings_of_its_width(tiny_student: Path):
    assert settings_for(str(tiny_student)).lora_r == 64


def test_an_adapter_where_a_whole_model_was_looked_for_is_named(adapter: Path, tiny_student: Path, tmp_path: Path):
    run = StudentRun("FinQA-mini", str(tiny_student), SETTINGS)
    folders = Folders(data=tmp_path / "data")
    shutil.copytree(adapter, folders.model(run.dataset, run.model_id))
    with pytest.raises(UserError, match=r"of this base are there: tiny-student-peftq_proj"):
        find_adapter(replace(run, peft=False), folders)


def test_a_folder_has_one_run_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from finqa.runtime.journal import only_run_on\n"
        "with only_run_on(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing to"), only_run_on(folder):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with only_run_on(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_holds_its_folder(tiny_student: Path, tmp_path: Path):
    folders, run = folders_with_rows(tmp_path), StudentRun("FinQA-mini", str(tiny_student), SETTINGS)
    with (
        only_run_on(folders.model(run.dataset, run.model_id)),
        pytest.raises(UserError, match="another run is writing"),
    ):
        fine_tune(run, TrainingConfig(), folders)
