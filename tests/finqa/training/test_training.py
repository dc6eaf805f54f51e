from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_parts import SETTINGS, examples, folders_with_rows, launch, script, teacher_row
from transformers import AutoTokenizer

from finqa.models.students import StudentRun, load_adapter, load_base, load_tokenizer, training_ids
from finqa.runtime.errors import UserError
from finqa.runtime.parallel import multiplies_bf16
from finqa.runtime.paths import Folders
from finqa.training.checkpoints import last_checkpoint
from finqa.training.fine_tuning import TrainingConfig, fine_tune, training_arguments
from finqa.training.rows import (
    NO_LOSS,
    LengthGrouped,
    collator,
    example,
    read_training_rows,
)
from finqa.training.trainable import loss_on_completion


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return folders_with_rows(tmp_path)


@pytest.fixture
def run(tiny_student: Path) -> StudentRun:
    return StudentRun(dataset="FinQA-mini", model=str(tiny_student), settings=SETTINGS)


def test_the_loss_is_on_the_completion_and_its_end_token_also_where_padding_is_the_end_token():
    end = 2
    batch = collator(pad_id=end)([example("a", (5, 6, 7, 8, end), 3), example("b", (5, 6, 9, end), 2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, end], [5, 6, 9, end, end]]
    assert batch["labels"].tolist() == [
        [NO_LOSS, NO_LOSS, NO_LOSS, 8, end],
        [NO_LOSS, NO_LOSS, 9, end, NO_LOSS],
    ]
    assert batch["n_tokens"] == 9


def test_the_loss_and_its_gradient_equal_those_of_full_logits_with_a_padding_mask(tiny_student: Path):
    tokenizer = load_tokenizer(str(tiny_student))
    rows = [teacher_row(3), teacher_row(45_678, padding=5)]
    batch = collator(pad_id=3)(examples(rows, tokenizer))
    lengths = [e["n_tokens"] for e in examples(rows, tokenizer)]
    mask = torch.tensor([[i < length for i in range(batch["input_ids"].shape[1])] for length in lengths]).long()

    reference = load_base(str(tiny_student), dtype=torch.float32)
    expected = reference(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
    expected.backward()
    ours = load_base(str(tiny_student), dtype=torch.float32)
    loss_on_completion(ours)
    loss = ours(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()

    torch.testing.assert_close(loss, expected)
    pairs = zip(ours.named_parameters(), reference.parameters(), strict=True)
    for (name, parameter), other in pairs:
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_attention_in_blocks_equals_torch_attention_forwards_and_backwards(length: int):
    from torch.nn.functional import scaled_dot_product_attention

    from finqa.training.cpu_attention import BlockCausalAttention

    torch.manual_seed(length)
    query = torch.randn(2, 6, length, 16, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 3, length, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = BlockCausalAttention.apply(query, key, value, 0.25)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.25)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(out, (query, key, value), direction)
    theirs = torch.autograd.grad(expected, (query, key, value), direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_epoch_visits_every_row_once_in_batches_of_like_length_the_same_for_one_seed():
    lengths = [100 + (i * 37) % 200 for i in range(803)]
    sampler = LengthGrouped(lengths, batch_size=8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(803))
    assert order == list(LengthGrouped(lengths, batch_size=8, seed=3))
    assert order != list(LengthGrouped(lengths, batch_size=8, seed=4))
    sampler.set_epoch(1)
    assert order != list(sampler)
    batches = [order[i : i + 8] for i in range(0, 800, 8)]
    padded = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.03 * sum(lengths[row] for row in order[:800])
    assert batches != sorted(batches, key=lambda batch: lengths[batch[0]])


def test_the_sham_learns_as_many_rows_as_the_real_run_but_of_known_families_alone(folders: Folders):
    path = folders.filtered("FinQA-mini", "train")
    for max_rows, wanted in ((None, 40), (20, 20)):
        rows = read_training_rows(path, "known", max_rows)
        assert len(rows) == wanted == len(read_training_rows(path, "all", max_rows))
        assert {row.family_kind for row in rows} == {"known"}


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_and_leaves_adapter_tokenizer_log_and_manifest(
    run: StudentRun, folders: Folders, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = replace(run, settings=replace(SETTINGS, num_epochs=6))
    folder = fine_tune(run, TrainingConfig(max_rows=36), folders)
    assert folder == folders.model("FinQA-mini", run.model_id)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 10, 20, 30, 40, 50, 54]
    assert log[-1]["loss"] < log[0]["loss"] - 1
    [tracked] = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert tracked.read_bytes().count(b"tokens_per_second") >= len(log)
    assert {"learning_rate", "grad_norm", "tokens_per_second"} <= log[0].keys()
    for before, after in pairwise(log):
        seconds = (after["tokens_seen"] - before["tokens_seen"]) / after["tokens_per_second"]
        assert seconds == pytest.approx(after["seconds"] - before["seconds"], abs=0.02), "the rate of these updates"
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["rows"] == 36 and manifest["updates"] == 54
    assert len(list(folder.glob("checkpoint-*"))) == 2
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.chat_template == load_tokenizer(str(tiny_student)).chat_template

    ids, n_prompt = training_ids(
        load_tokenizer(str(tiny_student)), teacher_row(5).prompt, teacher_row(5).generated_code
    )
    labels = torch.tensor([[NO_LOSS] * n_prompt + ids[n_prompt:]])
    base = load_base(str(tiny_student), dtype=torch.float32)
    before = base(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    after = load_adapter(base, folder)(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    assert after < before - 1


@pytest.mark.slow
def test_a_run_that_is_killed_ends_in_the_weights_of_one_that_was_not(
    run: StudentRun, folders: Folders, tmp_path: Path
):
    from safetensors.torch import load_file

    run = replace(run, settings=replace(SETTINGS, num_epochs=3))
    config = TrainingConfig(save_steps=4)
    whole = load_file(fine_tune(run, config, folders) / "adapter_model.safetensors")

    again = Folders(data=tmp_path / "again", results=tmp_path / "results")
    shutil.copytree(folders.data / "clean_with_code", again.data / "clean_with_code")
    dying = (
        "import os, signal\n"
        "from finqa.training.completion_trainer import CompletionTrainer\n"
        "step = CompletionTrainer.training_step\n"
        "def to_die(self, *a, **k):\n"
        "    if self.state.global_step == 17: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "CompletionTrainer.training_step = to_die\n"
    )
    killed = launch(script(tmp_path, "dying", run, config, dying), again.data)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = again.model("FinQA-mini", run.model_id)
    assert not (folder / "adapter_model.safetensors").exists()
    assert last_checkpoint(folder) == folder / "checkpoint-16"

    resumed = load_file(fine_tune(run, config, again) / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert weight.equal(resumed[name]), name
    steps = [json.loads(line)["step"] for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_folder_begun_with_another_configuration_is_refused_and_a_run_name_helps(run: StudentRun, folders: Folders):
    config = TrainingConfig(max_rows=8)
    fine_tune(run, config, folders)
    other = replace(run, settings=replace(SETTINGS, learning_rate=5e-3))
    with pytest.raises(UserError, match=r"learning_rate 0\.01 -> 0\.005.*--run-name"):
        fine_tune(other, config, folders)
    assert fine_tune(replace(other, run_name="slow"), config, folders).name.endswith("-slow")


@pytest.mark.parametrize(
    ("capabilities", "there"),
    [
        ({"avx512_f": True, "avx512_bw": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
    ],
)
def test_a_cpu_trains_in_bf16_only_where_its_products_are_not_software(capabilities, there, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bf16("cpu") == there
    assert multiplies_bf16("cuda")


def test_a_process_that_sees_several_gpus_takes_the_rows_of_one_for_an_update(
    run: StudentRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = training_arguments(run, TrainingConfig(), 100, False, "cuda", tmp_path)
    assert arguments.train_batch_size == SETTINGS.batch_size


def test_a_run_whose_loss_is_no_number_ends_and_says_what_to_change(folders: Folders, run: StudentRun):
    run = replace(run, settings=replace(SETTINGS, learning_rate=1e38, num_epochs=3))
    with pytest.raises(UserError, match=r"by update 10 the loss is no number \(nan\).*lower --learning-rate"):
        fine_tune(run, TrainingConfig(save_steps=1000), folders)
    log = folders.model("FinQA-mini", run.model_id) / "training_log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1], "what is no number is no record"
