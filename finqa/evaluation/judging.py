"""From replies to verdicts: the code of each reply is extracted and run, and its answer compared with the label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finqa.evaluation.generation import Reply
from finqa.evaluation.predictions import PROMPT_TOO_LONG, Prediction, Sample, prompt_hash
from finqa.evaluation.rows import EvalRow
from finqa.sandbox.results import Run
from finqa.sandbox.running import Sandbox
from finqa.task import answers, prompts

Answer = float | str | bool | None


def judge(
    rows: Sequence[EvalRow],
    prompt_tokens: Sequence[list[int]],
    replies: Sequence[Reply],
    sandbox: Sandbox,
    sampled: bool = False,
) -> list[Prediction]:
    """Run the code of every reply; predictions in the order of the rows.

    Args:
        rows: What was asked.
        prompt_tokens: The prompt of each row.
        replies: Of each row as many as there are samples, one after the other.
        sandbox: Runs the code.
        sampled: Whether each row's answer is voted on by its samples.
    """
    codes = [prompts.extract_code(reply.text) for reply in replies]
    runs = sandbox.run_many(codes)
    each = len(replies) // len(rows)
    predictions = []
    for number, (row, ids) in enumerate(zip(rows, prompt_tokens, strict=True)):
        of_row = slice(number * each, (number + 1) * each)
        found = list(zip(replies[of_row], codes[of_row], runs[of_row], strict=True))
        voted = majority([ran.answer for _, _, ran in found]) or 0
        prediction = _prediction(row, ids, *found[voted])
        if sampled:
            samples = tuple(_sample(row, *one) for one in found)
            total = sum(sample.n_new_tokens for sample in samples)
            prediction = replace(prediction, samples=samples, n_new_tokens=total)
        predictions.append(prediction)
    return predictions


def majority(given: Sequence[Answer]) -> int | None:
    """Self-consistency (Wang et al. 2022): the answer that most samples agree on.

    Returns the index of the first sample with that answer; None where no sample has an answer. An answer joins a group
    where the strict rule accepts it for the first answer of the group; of groups of equal size the first wins.
    """
    groups: list[list[int]] = []
    for place, answer in enumerate(given):
        if answers.normalise(answer) is None:
            continue
        for group in groups:
            if answers.match(answer, given[group[0]]):
                group.append(place)
                break
        else:
            groups.append([place])
    return max(groups, key=len)[0] if groups else None


def _prediction(row: EvalRow, ids: list[int], reply: Reply, code: str, run: Run) -> Prediction:
    return Prediction(
        id=row.id,
        prompt_hash=prompt_hash(ids),
        reply=reply.text,
        code=code,
        answer=run.answer,
        expected=row.expected,
        correct={rule: answers.match(run.answer, row.expected, rule) for rule in answers.RULES},
        error_kind=_error_kind(reply, run),
        error_message=run.message,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_new_tokens=reply.n_new_tokens,
        finish_reason=reply.finish_reason,
        program_steps=row.n_steps,
        teacher_solved=row.teacher_solved,
        family=row.family,
        family_kind=row.family_kind,
        answer_kind=row.answer_kind,
        label_disputed=row.label_disputed,
    )


def _sample(row: EvalRow, reply: Reply, code: str, run: Run) -> Sample:
    right = answers.match(run.answer, row.expected)
    kind = _error_kind(reply, run)
    return Sample(reply.text, code, run.answer, right, kind, reply.n_new_tokens, reply.finish_reason)


def _error_kind(reply: Reply, run: Run) -> str | None:
    return PROMPT_TOO_LONG if reply.finish_reason == "prompt_too_long" else run.error_kind
