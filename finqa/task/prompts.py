"""The prompts of student and teacher, and taking code out of a reply.

The student's prompt is Program of Thought: a page, a question, and the request for Python that leaves the answer in
`ans`. Its text never holds chat mark-up; the tokenizer's chat template adds that, as token ids.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Literal, get_args

from finqa.runtime.errors import UserError
from finqa.task.records import Question, format_table, parse_table
from finqa.task.worked_examples import WorkedExample

EvalType = Literal["zero-shot", "few-shot", "fine-tuned"]
EVAL_TYPES: tuple[EvalType, ...] = get_args(EvalType)

REQUEST = "Read the following passage and then write python code to answer the question:"
PASSAGE, QUESTION, PYTHON, END_PYTHON = "###Passage:", "###Question:", "###Python", "###End Python"
FENCE = "```"

INSTRUCTION = (
    "Identify the entities in the passage that the question needs, store each one in a Python variable, compute with "
    "them, and store the result in the variable ans. Reply with one ```python block and nothing else."
)
"""What a model that was not fine-tuned is told before the prompt."""
FINQA_INSTRUCTION = (
    "Identify the entities in the passage that the question needs, store each one in a Python variable, compute with "
    "them, and store the result in the variable ans. Give ratios and percentages as fractions (0.25, not 25). Reply "
    "with one ```python block and nothing else; its last line sets ans."
)
"""What it is told for FinQA, whose labels are fractions; the best of six wordings on dev (docs/finqa.md)."""

_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad"
_REASONING = re.compile(rf"<(?:{_TAGS})>|\[THINK\]|\u25c1think\u25b7|<\|channel\|>analysis", re.IGNORECASE)
_END_OF_REASONING = re.compile(
    rf"</(?:{_TAGS})>|\[/THINK\]|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>", re.IGNORECASE
)
_FENCE = re.compile(r"`{3,}|~{3,}")
_BLOCK = re.compile(
    r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^`\n]*?)[ \t]*\n(?P<code>.*?)"
    r"(?:(?:\n|(?<=\n))[ \t]*(?P=fence)|[ \t]*(?P=fence)[ \t]*(?=\n|\Z)|\Z)",
    re.DOTALL,
)
_IS_PYTHON = re.compile(r"^\W*i?py(?:thon)?[\d.]*\b|\bpython")
_TABLE_LINES = re.compile(r"(?:^[^\n]*\|[^\n]*(?:\n|\Z))+", re.MULTILINE)
_SETS_ANS = re.compile(r"^[ \t]*ans[ \t]*=", re.MULTILINE)

STOP = (END_PYTHON, f"\n{FENCE}\n")
"""Strings that end a reply. A closing fence counts only on a line of its own: an opening one must not match."""

TEACHER_INSTRUCTION = (
    "You write short Python programs that answer questions about pages of earnings reports. Reply with Python code "
    "only. Store every entity that the question needs in a well-named variable, compute with the variables, and store "
    "the result in `ans`: a number, or the string 'yes' or 'no'. Write a comment with the formula where there is more "
    "than one step. Print nothing, and import nothing but math. Give ratios and percentages as fractions (0.25, not "
    "25) unless the question's numbers are per cent already."
)


def training_prompt(question: Question) -> str:
    """The fine-tuning prompt of a question (the `prompt` column): request, page and question, ending in `###Python`."""
    page = "\n".join(part for part in (question.pre_text, format_table(question.table), question.post_text) if part)
    return f"{REQUEST}\n{PASSAGE}\n{page}\n{QUESTION}\n{question.question}\n{PYTHON}"


def completion(code: str) -> str:
    """What the student learns to write after a fine-tuning prompt; the end token follows it."""
    return f"\n{code.strip()}\n{END_PYTHON}"


def fenced(code: str) -> str:
    """Code as an instruct model replies with it."""
    return f"{FENCE}python\n{code.strip()}\n{FENCE}"


def messages(
    prompt: str, eval_type: EvalType, examples: tuple[WorkedExample, ...] = (), instruction: str = INSTRUCTION
) -> list[dict[str, str]]:
    """The chat of one question: the prompt alone, with the instruction, or after the worked examples as earlier turns.

    Args:
        prompt: A fine-tuning prompt (`training_prompt`).
        eval_type: "fine-tuned", "zero-shot" or "few-shot".
        examples: The data set's worked examples; used for "few-shot" alone.
        instruction: What is said first in "zero-shot" and "few-shot"; empty for nothing.

    Raises UserError for an unknown eval type.
    """
    if eval_type == "fine-tuned":
        return [_user(prompt)]
    if eval_type == "zero-shot":
        return [_user(_after(instruction, prompt))]
    if eval_type == "few-shot":
        chat: list[dict[str, str]] = []
        for example in examples:
            chat += [_user(training_prompt(example.question)), _assistant(fenced(example.code))]
        chat.append(_user(prompt))
        chat[0] = _user(_after(instruction, chat[0]["content"]))
        return chat
    raise UserError(f"unknown eval type {eval_type!r}; one of {', '.join(EVAL_TYPES)}")


def _after(instruction: str, text: str) -> str:
    return f"{instruction}\n{text}" if instruction else text


def teacher_messages(
    question: Question, examples: tuple[WorkedExample, ...], hint: bool = True
) -> list[dict[str, str]]:
    """The teacher's chat: instruction, worked examples, the page and question, and with `hint` the gold program."""
    chat = [{"role": "system", "content": TEACHER_INSTRUCTION}]
    for example in examples:
        chat += [_user(_teacher_request(example.question, hint)), _assistant(example.code)]
    return [*chat, _user(_teacher_request(question, hint))]


def _teacher_request(question: Question, hint: bool) -> str:
    request = training_prompt(question)
    if hint and question.program:
        request += f"\n\nHint: these steps give the right answer: {question.program}"
    return request


def extract_code(reply: str) -> str:
    """The code of a reply: what stands between the markers, or in a fenced block, or the whole reply.

    Reasoning (`<think> ... </think>` and its kin) is no part of the reply, also where it was cut off. Of several blocks
    the first that says it is Python counts, else the first that says nothing, else the first.
    """
    text = _without_reasoning(re.sub(r"\r\n?", "\n", reply.replace("\ufeff", "")))
    text = text.split(END_PYTHON)[0]
    # The student's prompt ends in the marker; a chatty model may repeat it before its code.
    text = text.rsplit(f"{PYTHON}\n", 1)[-1]
    before = _FENCE.split(text)[0]
    if _SETS_ANS.search(before) and len(_FENCE.findall(text)) % 2:
        text = before  # of the block there is the closing fence alone
    elif blocks := [(block["language"].lower(), block["code"]) for block in _BLOCK.finditer(text)]:
        ranked = sorted(blocks, key=lambda block: (not _IS_PYTHON.search(block[0]), bool(block[0])))
        text = ranked[0][1]
    return textwrap.dedent(text.strip("\n")).strip()


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt, with its chat mark-up, ends inside reasoning, as templates of thinking models do."""
    *_, last = _END_OF_REASONING.split(prompt)
    return any(not last[found.end() :].strip() for found in _REASONING.finditer(last))


def spoken(text: str, opened: bool = False) -> Iterator[tuple[int, int | None]]:
    """The parts of a reply that are no reasoning, as (start, end); the end of the last is None, unless reasoning is.

    `opened`: the prompt ends inside reasoning.
    """
    start = 0
    while True:
        if opened:
            end = _END_OF_REASONING.search(text, start)
            if end is None:
                return
            start = end.end()
        begin = _REASONING.search(text, start)
        yield start, begin.start() if begin else None
        if begin is None:
            return
        opened, start = True, begin.end()


def _without_reasoning(text: str) -> str:
    *_, last = _END_OF_REASONING.split(text)
    return _REASONING.split(last)[0]


def question_of(prompt: str) -> str:
    """The question of a fine-tuning prompt; the whole prompt where it has no markers."""
    tail = prompt.rpartition(QUESTION)[2]
    return (tail.rpartition(PYTHON)[0] if PYTHON in tail else tail).strip()


def page_from_prompt(prompt: str) -> Question:
    """Parse a fine-tuning prompt back into its page and question; `id`, `answer` and `program` stay empty.

    Published CSVs have no ids, so that zero-shot and few-shot prompts can only be made from the prompt column. Markers
    may stand on a line of their own or before their text, and lines may be indented.

    Raises UserError where a marker is missing.
    """
    head, found_question, _ = prompt.rpartition(QUESTION)
    _, found_passage, page = head.partition(PASSAGE)
    if not found_question or not found_passage:
        raise UserError(f"a prompt without {PASSAGE} and {QUESTION} cannot be read: {prompt[:60]!r}...")
    text = "\n".join(line.strip() for line in page.strip().split("\n"))
    start, end = table_span(text, 0, len(text))
    return Question(
        id="",
        pre_text=text[:start].removesuffix("\n"),
        post_text=text[end:],
        table=parse_table(text[start:end].removesuffix("\n")),
        question=question_of(prompt),
        answer="",
    )


def table_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the table of a page stands in text[start:end]: its longest run of lines that hold a `|`, the line break
    after it included; an empty span at the end where there is none."""
    runs = _TABLE_LINES.finditer(text, start, end)
    longest = max(runs, key=lambda run: run[0].strip("\n").count("\n"), default=None)
    return longest.span() if longest else (end, end)


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
