"""Does the check see an adapter that is lost, and pass one that is there?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finqa.evaluation.adapter_check import classes_of, compare, kl_on_classes, verdict
from finqa.evaluation.evaluate import EvaluationConfig
from finqa.evaluation.generation import GenerationConfig
from finqa.models.fidelity import AGREEMENT, kl
from finqa.models.settings import StudentSettings
from finqa.models.students import StudentRun, load_base, load_tokenizer, prompt_ids
from finqa.models.weights import weights_hash

CONFIG = EvaluationConfig(("test",), ("fine-tuned",), GenerationConfig(vllm=False, max_new_tokens=8, batch_size=4))


@pytest.fixture(scope="module")
def run(tiny_student: Path) -> StudentRun:
    return StudentRun(dataset="FinQA-mini", model=str(tiny_student), settings=StudentSettings())


@pytest.fixture(scope="module")
def sequences(tiny_student: Path) -> list[tuple[list[int], int]]:
    tokenizer: Any = load_tokenizer(str(tiny_student))
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": f"sales in {year} ?"}]) for year in range(2000, 2004)]
    replies = [tokenizer(f"\nans = {n} + 1", add_special_tokens=False)["input_ids"] for n in range(4)]
    return [([*prompt, *reply], len(prompt)) for prompt, reply in zip(prompts, replies, strict=True)]


def adapter(tiny_student: Path, folder: Path, random: bool) -> Path:
    """An adapter with random weights, or one as it is before training: it changes nothing."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=not random)
    get_peft_model(load_base(str(tiny_student), torch.float32), lora).save_pretrained(folder)  # pyright: ignore
    (folder / "run.json").write_text(json.dumps({"base_hash": weights_hash(tiny_student)}))
    return folder


def test_an_adapter_that_is_there_is_active_and_its_merged_model_agrees(
    run: StudentRun, tiny_student: Path, sequences: list, tmp_path: Path
):
    found = compare(run, adapter(tiny_student, tmp_path, random=True), sequences, CONFIG)
    assert found["active"] and found["agrees"]
    assert found["questions"] == 4
    assert found["tokens"] == sum(len(ids) - n_prompt for ids, n_prompt in sequences)
    assert found["kl_base"] > 1e-3
    assert 0 < found["share_merged"] < 0.05
    assert "adapter active" in verdict(found) and "do not trust" not in verdict(found)


def test_an_adapter_that_changes_nothing_is_not_active(
    run: StudentRun, tiny_student: Path, sequences: list, tmp_path: Path
):
    found = compare(run, adapter(tiny_student, tmp_path, random=False), sequences, CONFIG)
    assert found["kl_base"] == 0 and not found["active"] and not found["agrees"]
    assert "NOT active" in verdict(found)


@pytest.mark.parametrize(
    ("kl_base", "kl_vllm", "said"),
    [
        (0.0114, 0.0017, "rounding is over 5% of so small a change, which tells nothing; train for longer"),
        (0.0114, 0.0114, "do not trust it"),
        (1.5, 0.0017, ""),
    ],
)
def test_a_change_that_rounding_hides_is_told_from_an_adapter_that_is_lost(kl_base: float, kl_vllm: float, said: str):
    share = kl_vllm / kl_base
    found = {"kl_base": kl_base, "kl_vllm": kl_vllm, "share_vllm": share, "active": True, "agrees": share < AGREEMENT}
    line = verdict(found)
    assert line.endswith(said) and ("do not trust" in line) == (said == "do not trust it")


def test_a_merge_that_loses_the_adapter_is_seen(
    run: StudentRun, tiny_student: Path, sequences: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import contextlib

    monkeypatch.setattr("finqa.models.merging.merged", lambda *names: contextlib.nullcontext(tiny_student))
    found = compare(run, adapter(tiny_student, tmp_path, random=True), sequences, CONFIG)
    assert found["active"] and not found["agrees"]
    assert found["share_merged"] == pytest.approx(1)
    assert "do not trust it" in verdict(found)


def test_where_there_is_no_room_to_merge_the_rest_is_checked(
    run: StudentRun, tiny_student: Path, sequences: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr("finqa.runtime.memory.plan.free_memory", lambda device: 1e6)
    found = compare(run, adapter(tiny_student, tmp_path, random=True), sequences, CONFIG)
    assert found["active"] and "share_merged" not in found
    assert "the merged model is not checked: merging needs" in capsys.readouterr().out


def logs(*probabilities: float) -> Any:
    import torch

    return torch.tensor([probabilities]).log()


def test_the_divergence_is_the_sum_over_the_vocabulary():
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    assert kl(logs(*p), logs(*q)).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert kl(logs(*p), logs(*p)).item() == 0


def test_over_the_likeliest_tokens_the_divergence_is_a_lower_bound_and_exact_where_the_rest_is_alike():
    p, q = logs(0.5, 0.2, 0.2, 0.1), logs(0.2, 0.5, 0.15, 0.15)
    named = [{0: math.log(0.2), 1: math.log(0.5)}]
    exact = 0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5) + 0.3 * math.log(0.3 / 0.3)
    assert kl_on_classes(p, named).item() == pytest.approx(exact, abs=1e-6)
    assert kl_on_classes(p, named).item() <= kl(p, q).item()
    assert classes_of(q, named)[0] == pytest.approx(named[0], abs=1e-6)
    assert kl_on_classes(p, classes_of(p, named)).item() == pytest.approx(0, abs=1e-6)
