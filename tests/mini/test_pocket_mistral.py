"""pocket-mistral: its tokenizer, its pretraining data, and the shipped model's shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finqa.runtime.paths import REPOSITORY, SHIPPED_DATA
from mini.families import families
from mini.pretraining_data import encode_chats, make_chat, shipped_prompts

FOLDER = SHIPPED_DATA / "models" / "pocket-mistral"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_chat_template_is_mistrals(tokenizer: Any):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>[INST] one[/INST] two</s>[INST] three[/INST]"


def test_digits_and_column_bars_are_tokens_of_their_own(tokenizer: Any):
    tokens = tokenizer.tokenize("net sales|$ 5829|-45 ( 45 )|12")
    assert tokens.count("|") == 3
    assert not any(len(token.strip("Ġ")) > 1 for token in tokens if any(c.isdigit() for c in token))


def test_any_text_survives_the_tokenizer(tokenizer: Any):
    text = "net sales : $ 5829 é 表 \t\n ###Python"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_pretraining_asks_for_known_families_alone():
    """The first phrasing words of held-out families never occur in a question of the pretraining data."""
    held_out = families("new", "other")
    cues = [phrasing.split("{")[0].strip() for family in held_out for phrasing in family.phrasings]
    cues = [cue for cue in cues if len(cue.split()) > 3]
    assert len(cues) > 10
    for index in range(3000):
        question = make_chat(index, few_shot=False, seed=7)[2].split("###Question:\n")[1]
        assert not any(question.startswith(cue) for cue in cues), question


def test_no_question_of_finqa_mini_is_in_the_pretraining_data(tokenizer: Any):
    prompts = {make_chat(index, few_shot=False, seed=7)[2] for index in range(3000)}
    assert not prompts & shipped_prompts()
    one = make_chat(0, few_shot=False, seed=7)[2]
    assert len(encode_chats(tokenizer, range(3), False, 7, frozenset())) == 3
    assert len(encode_chats(tokenizer, range(3), False, 7, frozenset({one}))) == 2


def test_the_pretraining_prompt_is_the_one_that_fine_tuning_has(tokenizer: Any):
    from finqa.models.students import training_ids

    made = {index: make_chat(index, few_shot=False, seed=7) for index in range(40)}
    asked = {index: chat for index, chat in made.items() if chat[0][0]["content"] == chat[2]}
    assert len(asked) > 10
    for index, (_, reply, prompt) in asked.items():
        [chat] = encode_chats(tokenizer, [index], False, 7, frozenset())
        code = reply.removeprefix("\n").rsplit("\n", 1)[0]
        assert (list(chat.ids), chat.reply_start) == training_ids(tokenizer, prompt, code)


def test_the_shipped_model_is_small_and_has_the_documented_shape():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 10_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (256, 5, 1024)


def test_the_prompt_of_a_shipped_question_is_short(tokenizer: Any):
    longest = max(len(tokenizer(prompt).input_ids) for prompt in list(shipped_prompts())[:500])
    assert longest < 400


@pytest.mark.slow
def test_pretraining_runs_on_a_cpu_and_writes_a_model_that_loads(tmp_path: Path):
    subprocess.run(
        [
            *(sys.executable, "-m", "mini.pretrain_pocket_mistral", "--device", "cpu", "--output-dir", str(tmp_path)),
            *("--steps", "4", "--batch-size", "4", "--questions", "60", "--few-shot-chats", "8"),
            *("--few-shot-batch-size", "1", "--tokenizer-chats", "500", "--workers", "1"),
        ],
        cwd=REPOSITORY,
        check=True,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 4_000_000 < model.num_parameters() < 4_300_000
    assert len((tmp_path / "pretraining_log.jsonl").read_text().splitlines()) == 1
