"""The chats that pocket-mistral is pretrained on: known families alone, every prompt form, both reply forms.

A chat is the fine-tuning prompt with a marked completion, the zero-shot prompt with a fenced reply, or a few-shot
chat of four examples. Some ask for several cells of the table instead of a family's question: looking up a cell by
row and year is what every family needs and what is slowest to learn. Chats are made by index from a seed, so that any
number of processes makes the same data.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from finqa.runtime.paths import SHIPPED_DATA, SPLITS
from finqa.task.datasets import load_finqa
from finqa.task.program_compiler import identifier, literal, to_python
from finqa.task.prompts import completion, fenced, messages, training_prompt
from finqa.task.records import Question
from finqa.task.worked_examples import FINQA_MINI_EXAMPLES, WorkedExample
from mini.families import Family, families
from mini.make_finqa_mini import NAME, make_record
from mini.pages import make_page

FINE_TUNING_SHARE = 0.5
"""Of the single-question chats, how many have the fine-tuning prompt; the rest have the zero-shot prompt."""


LOOK_UP_SHARE = 0.3
"""Of the single-question chats, how many ask for cells of the table."""
LOOK_UPS = 6
"""Cells that such a chat asks for, at most."""


def make_look_ups(rng: Random) -> WorkedExample:
    """A request for some cells of a page's table, and the code that stores each in a variable."""
    page = make_page(rng)
    text = page.text(rng)
    cells = [(row, year) for row in page.rows for year in page.years]
    asked = rng.sample(cells, min(LOOK_UPS, len(cells)))
    question = Question(
        id="",
        pre_text="\n".join(text[0]),
        post_text="\n".join(text[1]),
        table=page.table(),
        question=f"store {' , '.join(f'{row} of {year}' for row, year in asked)} .",
        answer="",
    )
    code = (f"{identifier(f'{row} {year}')} = {literal(page.rows[row][year].literal)}" for row, year in asked)
    return WorkedExample(question, "\n".join(code))


def make_example(rng: Random, known: tuple[Family, ...]) -> WorkedExample:
    """A random question of a known family with the program teacher's code."""
    record = make_record("", rng.choice(known), rng)
    qa = record["qa"]
    question = Question(
        id="",
        pre_text="\n".join(record["pre_text"]),
        post_text="\n".join(record["post_text"]),
        table=record["table"],
        question=qa["question"],
        answer=str(qa["exe_ans"]),
        program=qa["program"],
    )
    return WorkedExample(question, to_python(question.program, question.table, question.question, question.passage))


def make_chat(index: int, few_shot: bool, seed: int) -> tuple[list[dict[str, str]], str, str]:
    """Chat number `index`: its messages, the reply as text behind the chat mark-up, and the prompt of its question."""
    rng = Random(f"{seed}/pretraining/{'few-shot' if few_shot else 'single'}/{index}")
    known = families("known")
    look_up = not few_shot and rng.random() < LOOK_UP_SHARE
    example = make_look_ups(rng) if look_up else make_example(rng, known)
    prompt = training_prompt(example.question)
    if few_shot:
        # Half of the chats have the examples that evaluation uses, half have random ones.
        shots = FINQA_MINI_EXAMPLES
        if rng.random() < 0.5 or not shots:
            shots = tuple(make_example(rng, known) for _ in range(4))
        return messages(prompt, "few-shot", shots), f" {fenced(example.code)}", prompt
    if rng.random() < FINE_TUNING_SHARE:
        return messages(prompt, "fine-tuned"), completion(example.code), prompt
    return messages(prompt, "zero-shot"), f" {fenced(example.code)}", prompt


@dataclass(frozen=True)
class Chat:
    """Token ids of a chat, end token included; the reply starts at `reply_start`."""

    ids: array[int]
    """Unsigned 16-bit: hundreds of thousands of chats are held at once."""
    reply_start: int


def encode_chats(
    tokenizer: Any, indices: Iterable[int], few_shot: bool, seed: int, held_out: frozenset[str]
) -> list[Chat]:
    """The chats of `indices` as token ids; those whose question is one of `held_out` are left out."""
    made = [make_chat(index, few_shot, seed) for index in indices]
    kept = [(chat, reply) for chat, reply, prompt in made if prompt not in held_out]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat, _ in kept]
    # The template has written the special tokens, and a reply goes on where a prompt ends.
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompt_ids = encode(prompts).input_ids
    reply_ids = encode([reply for _, reply in kept]).input_ids
    return [
        Chat(array("H", [*prompt, *reply, tokenizer.eos_token_id]), reply_start=len(prompt))
        for prompt, reply in zip(prompt_ids, reply_ids, strict=True)
    ]


def tokenizer_texts(count: int, seed: int) -> Iterator[str]:
    """Texts to train the tokenizer on: known families alone, like the pretraining itself."""
    for index in range(count):
        chat, reply, _ = make_chat(index, few_shot=False, seed=seed)
        yield chat[-1]["content"] + reply


def shipped_prompts() -> frozenset[str]:
    """The fine-tuning prompt of every question of FinQA-mini: none of them may occur in pretraining."""
    return frozenset(
        training_prompt(question)
        for split in SPLITS
        for question in load_finqa(SHIPPED_DATA / NAME / f"{split}.json").questions
    )
