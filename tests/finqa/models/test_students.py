from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finqa.evaluation.engines.serving import served_models
from finqa.evaluation.generation import GenerationConfig
from finqa.models.settings import DEFAULTS, SETTINGS, StudentSettings, settings_for
from finqa.models.students import (
    StudentRun,
    add_student_flags,
    find_adapter,
    load_adapter,
    load_base,
    load_tokenizer,
    prompt_ids,
    resolve_model,
    student_from_args,
    training_ids,
)
from finqa.models.weights import weights_hash
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task import prompts
from finqa.task.datasets import dataset

PROMPT = "Read this:\n###Passage:\nsales were $ 1,200\n###Question:\nhow much ?\n###Python"


def parsed(*words: str) -> StudentRun:
    parser = argparse.ArgumentParser()
    add_student_flags(parser, peft_default=False)
    return student_from_args(parser.parse_args(words))


MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["FinQA", MISTRAL, "me", "-P"], "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"),
        (["-P"], "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"),
        (["FinQA", MISTRAL, "-P", "-F", "-GA", "8"],
         "mistralai_Mistral-7B-Instruct-v0.3-4bit-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1-ga8"),
        (["FinQA", MISTRAL, "--peft", "--lora-modules", "q_proj", "v_proj", "--batch-size", "4", "--num-epochs", "2"],
         "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_v_proj-bs4-ne2"),
        (["FinQA", MISTRAL], "mistralai_Mistral-7B-Instruct-v0.3-bs1-ne1"),
        (["FinQA", "microsoft/Phi-3-mini-128k-instruct", "-P"],
         "microsoft_Phi-3-mini-128k-instruct-peftqkv_proj_o_proj-bs1-ne1"),
        (["FinQA-mini", "pocket-mistral", "-P", "-BS", "8", "--run-name", "sham"],
         "pocket-mistral-peftq_proj_k_proj_v_proj_o_proj-bs8-ne1-sham"),
    ],
)  # fmt: skip
def test_the_model_id_is_made_of_base_modules_batch_and_epochs(words: list[str], expected: str):
    assert parsed(*words).model_id == expected


def test_a_base_model_in_a_local_folder_goes_by_the_folders_name(tiny_student: Path):
    assert parsed("FinQA", str(tiny_student), "-P").model_id.startswith("tiny-student-peft")


def test_the_hub_name_is_the_one_given_else_that_of_the_environment_else_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert parsed("FinQA", "a/b", "-P").hub_id is None
    monkeypatch.setenv("HF_NAME", "lab")
    assert parsed("FinQA", "a/b", "-P").hub_id == "lab/a_b-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"
    assert parsed("FinQA", "a/b", "me", "-P").hub_id == "me/a_b-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"


def test_the_published_settings_stand_for_mistral_and_unknown_models_get_the_defaults():
    mistral = SETTINGS[MISTRAL]
    assert (mistral.lora_r, mistral.lora_alpha, mistral.lora_dropout) == (512, 1024, 0.1)
    assert (mistral.learning_rate, mistral.batch_size, mistral.warmup_steps) == (2.5e-5, 1, 5)
    assert settings_for("some/other-model") == DEFAULTS
    assert settings_for("/models/pocket-mistral") == SETTINGS["pocket-mistral"]
    assert settings_for("microsoft/orca-2-7B").learning_rate == 5e-5


@pytest.mark.parametrize("wrong", [{"lora_r": 0}, {"lora_dropout": 1.0}, {"learning_rate": 0}, {"lora_modules": ()}])
def test_settings_that_cannot_work_are_refused(wrong: dict):
    with pytest.raises(UserError):
        replace(DEFAULTS, **wrong)


def test_training_and_generation_read_the_same_prompt_ids_with_one_begin_and_a_learnt_end(tiny_student: Path):
    tokenizer = load_tokenizer(str(tiny_student))
    ids, n_prompt = training_ids(tokenizer, PROMPT, "ans = 1200")
    assert ids[:n_prompt] == prompt_ids(tokenizer, prompts.messages(PROMPT, "fine-tuned"))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == f"<s>[INST] {PROMPT}[/INST]\nans = 1200\n###End Python</s>"
    assert tokenizer.decode(ids[n_prompt:-1]) == prompts.completion("ans = 1200")


def test_a_chat_with_worked_examples_begins_once_and_ends_a_turn_for_each_of_them(tiny_student: Path):
    tokenizer = load_tokenizer(str(tiny_student))
    chat = prompts.messages(PROMPT, "few-shot", dataset("FinQA").worked_examples)
    ids = prompt_ids(tokenizer, chat)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(dataset("FinQA").worked_examples) == 4


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_student: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_student, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(folder))
    as_orca = shutil.copytree(folder, tmp_path / "Orca-2-7b")
    assert "<|im_start|>" in load_tokenizer(str(as_orca)).chat_template


def test_a_student_that_is_nowhere_is_an_error_with_both_places_and_the_command(tmp_path: Path):
    run = parsed("FinQA-mini", "pocket-mistral", "me", "-P", "-GA", "2")
    with pytest.raises(UserError) as error:
        find_adapter(run, Folders(data=tmp_path))
    text = str(error.value)
    assert str(tmp_path / "models" / "FinQA-mini" / run.model_id) in text
    assert f"me/{run.model_id}" in text
    assert "python main.py FinQA-mini pocket-mistral me -P -GA 2" in text


def test_hf_name_as_a_document_has_it_is_no_account():
    """A command that was pasted as it stands means the variable or the logged-in user."""
    assert parsed("FinQA", MISTRAL, "HF_NAME", "-P").given_hf_name is None
    assert parsed("FinQA", MISTRAL, "me", "-P").given_hf_name == "me"


def test_a_model_that_is_nowhere_is_one_clear_error():
    with pytest.raises(UserError, match="nobody/no-model is neither a local folder nor on the Hub"):
        resolve_model("nobody/no-model")


def test_weights_have_one_hash_in_a_plain_folder_and_in_the_hubs_cache(tiny_student: Path, tmp_path: Path):
    from finqa.runtime.manifest import file_hash

    content = tiny_student / "model.safetensors"
    blob = tmp_path / "blobs" / file_hash(content)
    blob.parent.mkdir()
    shutil.copy(content, blob)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert weights_hash(tmp_path / "snapshot") == weights_hash(tiny_student)


@pytest.fixture
def adapter(tiny_student: Path, tmp_path: Path) -> Path:
    """A random adapter on the tiny student, with a manifest that names its base."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(load_base(str(tiny_student), torch.float32), lora).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"base_hash": weights_hash(tiny_student)}))
    return tmp_path / "adapter"


def test_an_adapter_is_refused_on_another_base_than_its_own(tiny_student: Path, adapter: Path, tmp_path: Path):
    import torch

    load_adapter(load_base(str(tiny_student)), adapter)
    other = shutil.copytree(tiny_student, tmp_path / "other")
    model = load_base(str(other), torch.float32)
    model.get_input_embeddings().weight.data.add_(0.01)
    model.to(torch.bfloat16).save_pretrained(other)
    with pytest.raises(UserError, match="trained on other base weights"):
        load_adapter(load_base(str(other)), adapter)


def test_the_merged_model_replies_as_base_and_adapter_together(tiny_student: Path, adapter: Path):
    import torch

    from finqa.models.merging import merged

    base = load_base(str(tiny_student), torch.float32)
    ids = torch.tensor([[1, 9, 30, 60, 90, 120]])
    plain = base(input_ids=ids).logits
    together = load_adapter(base, adapter)(input_ids=ids).logits
    with merged(str(tiny_student), adapter) as folder:
        whole = load_base(str(folder), torch.float32)(input_ids=ids).logits
        assert load_tokenizer(str(folder)).chat_template == load_tokenizer(str(tiny_student)).chat_template
    assert not folder.exists()
    assert (whole - together).norm() < 0.05 * (plain - together).norm()


def test_a_merged_weight_is_the_sum_in_fp32_rounded_once(tiny_student: Path, adapter: Path):
    import torch

    from finqa.models.merging import merged

    whole_in_fp32 = load_adapter(load_base(str(tiny_student), torch.float32), adapter).merge_and_unload()
    expected = whole_in_fp32.to(torch.bfloat16).state_dict()
    with merged(str(tiny_student), adapter) as folder:
        weights = load_base(str(folder), torch.bfloat16).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    base = load_base(str(tiny_student), torch.bfloat16).state_dict()
    assert any(not torch.equal(weights[name], base[name]) for name in base)


def test_a_large_merged_model_is_written_in_shards_with_the_same_weights(
    tiny_student: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from finqa.models import merging

    for name, size_gb in (("whole", 5), ("sharded", 0.0001)):
        monkeypatch.setattr(merging, "MERGED_FILE_GB", size_gb)
        merging.merge(str(tiny_student), adapter, tmp_path / name)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    whole, sharded = (load_base(str(tmp_path / name), torch.float32).state_dict() for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[key], sharded[key]) for key in whole)


def test_settings_are_saved_beside_what_they_made_as_plain_values():
    assert json.loads(json.dumps(StudentSettings().__dict__))["lora_r"] == 512


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_model_is_loaded_in_bf16_only_where_its_products_are_not_software(
    bf16: bool, dtype: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": bf16, "amx_bf16": False})
    assert load_base(str(tiny_student), device="cpu").dtype == getattr(torch, dtype)
    assert load_base(str(tiny_student), torch.bfloat16, "cpu").dtype == torch.bfloat16
    run = StudentRun("FinQA-mini", str(tiny_student), settings_for(str(tiny_student)))
    config = GenerationConfig(vllm=False, max_new_tokens=4, batch_size=1)
    if not torch.cuda.is_available():
        assert [served.facts["dtype"] for served in served_models(run, None, ["base"], config)] == [dtype]
