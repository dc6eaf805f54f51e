"""Prompts, and the way back from a prompt or a reply."""

from __future__ import annotations

import pytest

from finqa.runtime.errors import UserError
from finqa.task.datasets import DATASETS, dataset
from finqa.task.programs import execute
from finqa.task.prompts import (
    END_PYTHON,
    INSTRUCTION,
    PYTHON,
    completion,
    extract_code,
    messages,
    page_from_prompt,
    teacher_messages,
    training_prompt,
)
from finqa.task.records import Question
from finqa.task.worked_examples import FINQA_EXAMPLES, FINQA_MINI_EXAMPLES

QUESTION = Question(
    id="a",
    pre_text="net sales rose .\nthey were large .",
    post_text="see note 3 .",
    table=[["", "2009", "2008"], ["net sales", "$ 5829", "$ 5735"]],
    question="what was the change in net sales?",
    answer="94.0",
    program="subtract(5829, 5735)",
)


def test_the_fine_tuning_prompt_ends_where_the_code_begins():
    prompt = training_prompt(QUESTION)
    assert prompt.endswith(PYTHON)
    assert "net sales|$ 5829|$ 5735" in prompt
    assert "<s>" not in prompt and "[INST]" not in prompt


def test_a_prompt_leads_back_to_its_page():
    page = page_from_prompt(training_prompt(QUESTION))
    assert (page.pre_text, page.post_text, page.table, page.question) == (
        QUESTION.pre_text,
        QUESTION.post_text,
        QUESTION.table,
        QUESTION.question,
    )


def test_published_prompts_with_inline_markers_and_indents_are_read_too():
    page = page_from_prompt(
        "Read ...\n    ###Passage: sales rose .\n\n|2009\nnet sales|5829\n\nend .\n"
        "    ###Question: why?\n    ###Python\n    "
    )
    assert page.question == "why?"
    assert page.table == [["", "2009"], ["net sales", "5829"]]
    assert page.pre_text.startswith("sales rose .") and "end ." in page.post_text


def test_a_prompt_without_markers_is_refused():
    with pytest.raises(UserError, match="###Question"):
        page_from_prompt("what was the change?")


CODE = "a = 1\nans = a"


@pytest.mark.parametrize(
    "reply",
    [
        CODE,
        completion(CODE),
        f"{completion(CODE)}\nand then some prose",
        f" ```python\n{CODE}\n```",
        f"Sure! Here it is:\n```python\n{CODE}\n```\nIt works.\n```\nother\n```",
        f"```\n{CODE}\n```",
        f"```python\n{CODE}",
        f"###Python\n{CODE}\n{END_PYTHON}",
        "    a = 1\n    ans = a\n",
        f"\ufeff{CODE}",
        # Fences
        *(f"Here:\n{fence}\n{CODE}\n{fence[:3]}" for fence in ("```python3", "```{python}", "~~~python", "```Python")),
        *(f"{fence}\n{CODE}\n{fence[:3]}" for fence in ("~~~", "``` py", '```python title="a.py"', "```{.python .x}")),
        f"````python\n{CODE}\n````",
        f"So: ```python\n{CODE}\n```",
        f"```python\n{CODE}```",
        f"```python\r\n{CODE}\r\n```".replace("a = 1\n", "a = 1\r\n"),
        f"```python\n{CODE}\n```".replace("\n", "\r"),
        f"```bash\npip list\n```\n```python\n{CODE}\n```",
        f"```json\n{{}}\n```\n~~~\n{CODE}\n~~~",
        f"```\nans = a / b\n```\n```py\n{CODE}\n```",
        f"```tool_code\n{CODE}\n```",
        # What a stop string or a prompt that opens the block leaves
        f"{CODE}\n```",
        f"{CODE}\n```\n",
        f"{CODE}\n```\nThis adds up.",
        f"{CODE}\n~~~\nAs in:\n```\nans = 7\n```",
        f"We need\nans = a / b\n```\n{CODE}\n```",
        # Reasoning
        f"<think>\n```python\nans = 7\n```\n</think>\n```python\n{CODE}\n```",
        f"<think>ans = 7 ?</think>\n{CODE}",
        f"ans = 7, or\n```python\nans = 8\n```\n</think>\n\n{CODE}",
        f"<think>###Python\nans = 7\n{END_PYTHON}</think>{completion(CODE)}",
        f"<Thinking>ans = 7</Thinking>\n{CODE}",
        f"[THINK]ans = 7[/THINK]{CODE}",
        f"<reasoning>a</reasoning><think>ans = 7</think>\n{CODE}",
        f"<|channel|>analysis<|message|>ans = 7<|end|><|start|>assistant<|channel|>final<|message|>{CODE}",
    ],
)
def test_the_code_of_a_reply_is_found(reply: str):
    assert extract_code(reply) == CODE


@pytest.mark.parametrize("reply", ["", "<think>\n```python\nans = 7\n```\nbut", "```python\n```", "<think>a</think>"])
def test_a_reply_without_an_answer_has_no_code(reply: str):
    assert extract_code(reply) == ""


def test_zero_shot_adds_the_instruction_and_few_shot_four_turns_before():
    prompt = training_prompt(QUESTION)
    assert messages(prompt, "fine-tuned") == [{"role": "user", "content": prompt}]
    [zero] = messages(prompt, "zero-shot")
    assert zero["content"].endswith(prompt) and "store the result in the variable ans" in zero["content"]
    few = messages(prompt, "few-shot", FINQA_EXAMPLES)
    assert [turn["role"] for turn in few] == ["user", "assistant"] * 4 + ["user"]
    assert few[-1]["content"] == prompt


def test_the_instruction_says_what_form_the_labels_of_the_data_set_have():
    asked = {name: messages("x", "zero-shot", (), dataset(name).instruction)[0]["content"] for name in DATASETS}
    assert "Give ratios and percentages as fractions (0.25, not 25)." in asked["FinQA"]
    assert asked["FinQA-mini"] == f"{INSTRUCTION}\nx"
    assert messages("x", "few-shot", FINQA_EXAMPLES, "Be brief.")[0]["content"].startswith("Be brief.\n")


def test_an_empty_instruction_adds_nothing():
    assert messages("x", "zero-shot", (), "") == messages("x", "fine-tuned")
    assert messages("x", "few-shot", FINQA_EXAMPLES, "")[0]["content"] == training_prompt(FINQA_EXAMPLES[0].question)


def test_an_unknown_eval_type_is_refused():
    with pytest.raises(UserError, match="unknown eval type 'one-shot'"):
        messages("x", "one-shot")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_the_worked_examples_give_their_answers(name: str):
    from finqa.task.answers import match

    examples = DATASETS[name].worked_examples
    assert len(examples) in (3, 4)
    for example in examples:
        variables: dict[str, object] = {}
        exec(example.code, variables)
        assert match(variables["ans"], example.question.answer), example.question.question
        assert match(execute(example.question.program, example.question.table), example.question.answer)


def test_the_teacher_sees_the_hint_only_when_asked_to():
    with_hint, without = (teacher_messages(QUESTION, FINQA_EXAMPLES, hint=hint) for hint in (True, False))
    assert all("Hint" in turn["content"] for turn in with_hint if turn["role"] == "user")
    assert QUESTION.program in with_hint[-1]["content"]
    assert all(QUESTION.program not in turn["content"] for turn in without)


def test_finqa_mini_examples_ask_for_known_families_alone():
    words = " ".join(example.question.question for example in FINQA_MINI_EXAMPLES)
    assert not any(word in words for word in ("average", "mean", "percent", "ratio", "growth rate", "multiple"))
