"""A stop string inside a model's reasoning ends no reply, whichever engine writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finqa.evaluation.engines.hugging_face_engine import hugging_face
from finqa.evaluation.engines.vllm_engine import EngineArguments, vllm_engine, vllm_generate
from finqa.evaluation.generation import GenerationConfig, all_replies, cut_at_stop, is_reasoning, opened_by
from finqa.models.students import load_base, load_tokenizer, resolve_model
from finqa.task.prompts import STOP, extract_code, opens_reasoning

DRAFT = "a draft\n```python\nans = 1\n```\nis wrong\n"
ANSWER = "```python\nans = 2\n```\n"
TWICE = f"<think>a</think><think>{DRAFT}</think>{ANSWER}"


@pytest.mark.parametrize(
    ("text", "opened", "kept"),
    [
        (f"<think>{DRAFT}</think>\n{ANSWER}more", False, f"<think>{DRAFT}</think>\n{ANSWER}"),
        (f"{DRAFT}</think>\n{ANSWER}more", True, f"{DRAFT}</think>\n{ANSWER}"),
        (f"[THINK]{DRAFT}[/THINK]\n{ANSWER}more", False, f"[THINK]{DRAFT}[/THINK]\n{ANSWER}"),
        (f"<think>{DRAFT}", False, f"<think>{DRAFT}"),
        (DRAFT, True, DRAFT),
        (f"{ANSWER}<think>{DRAFT}</think>", False, ANSWER),
        (TWICE + "more", False, TWICE),
    ],
)  # fmt: skip
def test_a_reply_is_cut_behind_its_reasoning(text: str, opened: bool, kept: str):
    assert cut_at_stop(text, STOP, opened) == kept
    assert is_reasoning(text, opened) == (kept == text and "</think>" not in text)


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("what is <think> for?\n<|im_start|>assistant\n", False),
        ("reply:", False),
    ],
)
def test_a_template_may_open_the_reasoning(prompt: str, opens: bool):
    assert opens_reasoning(prompt) == opens


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model that knows two replies by heart: one opens its reasoning, of the other the prompt does. Their prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("thinker"), load_tokenizer("pocket-mistral")
    reader: Any = tokenizer
    starts = ["question one, reply:", "question two, reply: <think>\n"]
    replies = [f"<think>{DRAFT}</think>\n{ANSWER}", f"{DRAFT}</think>\n{ANSWER}"]
    prompts = [reader.encode(text) for text in starts]
    rows = [
        [*prompt, *reader.encode(reply + "and more", add_special_tokens=False), reader.eos_token_id]
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(reader), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=reader.bos_token_id,
        eos_token_id=reader.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in (torch.tensor([row]) for row in rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.2  # what is left is where the two prompts differ
    model.to(torch.bfloat16).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder, prompts


@pytest.mark.slow
@pytest.mark.parametrize("vllm", [False, True], ids=["Hugging Face", "vLLM"])
def test_a_model_thinks_to_its_end_and_stops_behind_its_answer(thinker: tuple[Path, list[list[int]]], vllm: bool):
    folder, prompts = thinker
    tokenizer: Any = load_tokenizer(str(folder))
    config = GenerationConfig(vllm=vllm, max_new_tokens=100, batch_size=2)
    assert [opened_by(prompt, tokenizer) for prompt in prompts] == [False, True]
    if vllm:
        pytest.importorskip("vllm")
        path = resolve_model(str(folder))
        with vllm_engine(EngineArguments(path, path, False, config, None)) as (engine, _):
            replies = all_replies(vllm_generate(engine, {tokenizer.eos_token_id}, config, None), prompts)
    else:
        replies = all_replies(hugging_face(load_base(str(folder)), tokenizer, config), prompts)
    first, second = replies
    assert first.text.split("<think>")[-1] == second.text.split("<think>")[-1] == f"{DRAFT}</think>\n{ANSWER}"
    assert [extract_code(reply.text) for reply in replies] == ["ans = 2", "ans = 2"]
    assert {reply.finish_reason for reply in replies} == {"stop"}
