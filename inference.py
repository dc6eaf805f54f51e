"""Ask the base model and the fine-tuned one the same question, run what each of them writes, and say where on the page
its numbers stand: which cells of the table, or which sentence.

    python inference.py                                            # FinQA, Mistral-7B-Instruct-v0.3, HF_NAME
    python inference.py FinQA-mini pocket-mistral --id ROW_ID
    python inference.py FinQA-mini pocket-mistral --question "what was ...?" --passage-file page.txt
    python inference.py FinQA-mini pocket-mistral --steer 81=2,204=-1 --from fine-tuned
    python inference.py mine --question "..." --steer 81=2         # a pair of your own (collect_activations.py --base)

Without --id or --question the question is the first of the split, or where the split is not at hand the data set's
worked example. A passage file is text, a table in it one line a row with cells joined by |, or the page as JSON with
pre_text, post_text and table. Reads D/clean/<dataset>/ and the fine-tuned student as main.py does; writes nothing.

With --steer or --ablate both models also answer with latents of a trained dictionary turned up or taken out, at every
token but BOS. That program stands beside the one without; lines that differ have a mark: ! changed, - gone, + new. Then
the crosscoder and its activation set are read, too, by the names that train.py takes.

A pair of your own is asked by its name: --question is any prompt, as a chat where the recorded texts were chats;
without it the prompt is that of the document --id, or of the first. What is written is shown, and not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from crosscoder.asked_pair import MAX_NEW_TOKENS, AskedPair
from crosscoder.names import ActivationChoice, choice_from_args
from crosscoder.steered_pair import add_steering_flags, open_steered_pair, steering_from_args
from finqa.evaluation.engines.serving import check_backend, served_models
from finqa.evaluation.evaluate import MODEL_OF_TYPE
from finqa.evaluation.generation import GenerationConfig, all_replies
from finqa.models.students import add_student_flags, find_adapter, prompt_ids, tokenizer_of
from finqa.runtime.command_line import add_flags, flag, from_args, given, script_parser
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import Folders, Split, add_folder_flags
from finqa.sandbox.results import Run
from finqa.sandbox.running import Sandbox
from finqa.task import datasets, prompts
from finqa.task.evidence import Evidence, evidence
from finqa.task.prompts import EvalType
from finqa.task.records import Question, read_questions

SHOWN_PLACES = 3
"""Places on the page that are shown of one number."""
ASKED: tuple[EvalType, ...] = ("zero-shot", "fine-tuned")
"""How the base model and the fine-tuned one are asked."""
WIDEST = 72
"""Columns of the program without steering, beside the steered one; a longer line moves the other aside."""


def main() -> int:
    args = parse_arguments()
    folders, request = Folders.from_args(args), from_args(Request, args)
    choice = choice_from_args(args)
    if choice.pair:
        return ask_own_pair(args, choice, folders, request)
    run = choice.student
    data = datasets.dataset(run.dataset)
    question = chosen_question(request, data, folders)
    check_backend(run, request.vllm)
    steering = steering_from_args(args)
    if steering and request.vllm:
        raise UserError("--steer and --ablate change the model inside Hugging Face; leave out --VLLM")
    student = find_adapter(run, folders)

    # Before the libraries are loaded, which takes most of the time of a small model.
    print(f"question: {question.question}")
    if question.answer:
        print(f"answer in the data set: {question.answer}")
    sys.stdout.flush()
    tokenizer = tokenizer_of(run, student)
    config = GenerationConfig(request.vllm, request.max_new_tokens or run.settings.max_new_tokens, batch_size=1)
    if steering:
        models = open_steered_pair(args, steering)
        print("\n".join(models.says()), flush=True)
        served = models.served(tokenizer, config)
    else:
        wanted: list[Any] = [MODEL_OF_TYPE[asked] for asked in ASKED]
        served = ((each.model, each.generate, False) for each in served_models(run, student, wanted, config))
    before = ""
    with Sandbox() as sandbox:
        for model, generate, is_steered in served:
            asked: EvalType = next(eval_type for eval_type in ASKED if MODEL_OF_TYPE[eval_type] == model)
            chat = prompts.messages(prompts.training_prompt(question), asked, data.worked_examples, data.instruction)
            code = prompts.extract_code(all_replies(generate, [prompt_ids(tokenizer, chat)])[0].text)
            title = f"{model} model ({asked})" + (f": without | with {steering}" if is_steered else "")
            beside = "(the same program)" if code == before else side_by_side(before, code)
            show(title, beside if is_steered else code, sandbox.run(code), evidence(code, question))
            before = code
    return 0


def ask_own_pair(args: argparse.Namespace, choice: ActivationChoice, folders: Folders, request: Request) -> int:
    """Show what both models of a pair write to one prompt, and with --steer or --ablate what they write steered."""
    if other := [
        f"--{name.replace('_', '-')}" for name in ("split", "passage_file", "vllm") if name in given(Request, args)
    ]:
        raise UserError(f"two models of your own are asked by --question or --id; leave out {', '.join(other)}")
    if request.question is not None and request.id is not None:
        raise UserError("--question is a prompt of your own, and --id one of the documents; give one of them")
    steering = steering_from_args(args)
    asked = AskedPair(choice, folders, request.question, request.id)
    print(f"prompt: {asked.text}", flush=True)
    before = ""
    for model, generate, is_steered in asked.served(args, steering, request.max_new_tokens):
        reply = all_replies(generate, [asked.ids])[0].text
        text = "\n".join(part for line in reply.strip().split("\n") for part in wrap(line, WIDEST) or [""])
        beside = "(the same text)" if text == before else side_by_side(before, text)
        title = f"{model} model" + (f": without | with {steering}" if is_steered else "")
        print(f"\n=== {title}\n{beside if is_steered else text}", flush=True)
        before = text
    return 0


@dataclass(frozen=True)
class Request:
    """The question, and how it is answered."""

    split: Split = flag("test", help="Split of --id")
    id: str | None = flag(None, help="Id of a row of the split, or of a document of a pair")
    question: str | None = flag(
        None, help="A question of your own, about the page in --passage-file; any prompt to a pair"
    )
    passage_file: Path | None = flag(None, help="Text or JSON file of the page")
    max_new_tokens: int | None = flag(
        None, metavar="TOKENS", shown=f"the student's settings; {MAX_NEW_TOKENS} for a pair"
    )
    """Tokens of a reply, at most."""
    vllm: bool = flag(False, "--VLLM", "--vllm", help="Generate by vLLM, not by Hugging Face")


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_student_flags(parser)
    add_folder_flags(parser)
    add_flags(parser, Request)
    add_steering_flags(parser)
    return parser.parse_args()


def chosen_question(request: Request, data: datasets.Dataset, folders: Folders) -> Question:
    """The question of the flags. Raises UserError where there is no such row or file."""
    if request.question or request.passage_file:
        if not (request.question and request.passage_file):
            raise UserError("--question and --passage-file go together")
        return page(request.passage_file, request.question)
    clean, raw = folders.clean(data.name, request.split), folders.raw(data.name, request.split)
    if clean.exists():
        questions = read_questions(clean, datasets.how_to_make("clean", data, request.split, folders))
    elif raw.exists():
        questions = data.load(raw).questions
    else:
        questions = [example.question for example in data.worked_examples]
        if request.id:
            datasets.rows_file("raw", data, request.split, folders)  # raises, with the command that gets it
    found = next((q for q in questions if request.id in (None, q.id)), None)
    if found is None:
        raise UserError(f"no row {request.id!r} in the {request.split} split of {data.name}; --split chooses another")
    return found


def page(path: Path, question: str) -> Question:
    """A question about the page in a text or JSON file."""
    if not path.exists():
        raise UserError(f"{path} is missing (--passage-file)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if path.suffix != ".json":
        return Question("", text.strip(), "", [], question, "")
    try:
        content = json.loads(text)
        pre_text, post_text, table = datasets.page_of(content)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no page (a JSON object with pre_text, post_text, table): {error}") from error
    return Question("", pre_text, post_text, table, question, "")


def side_by_side(before: str, after: str) -> str:
    """Two programs beside each other, each line that only one has with a mark: ! changed, - gone, + new."""
    old, new = before.split("\n"), after.split("\n")
    width = min(WIDEST, max(map(len, old)))
    rows = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        mark = {"equal": " ", "replace": "!", "delete": "-", "insert": "+"}[kind]
        for left, right in zip_longest(old[a:b], new[c:d]):
            own = mark if kind != "replace" or None not in (left, right) else "+" if left is None else "-"
            rows.append(f"{own} {left or '':<{width}} | {right or ''}".rstrip())
    return "\n".join(rows)


def show(title: str, code: str, run: Run, used: list[Evidence]) -> None:
    """Print a program, its answer, and where on the page its numbers stand."""
    result = run.answer if run.error_kind is None else f"none ({run.error_kind}: {run.message})"
    print(f"\n=== {title}\n{code}\n--> {result}")
    for one in used:
        places = list(one.places[:SHOWN_PLACES]) or ["not on the page"]
        if len(one.places) > SHOWN_PLACES:
            places.append(f"and {len(one.places) - SHOWN_PLACES} more")
        print(f"    {one.name or 'number'} {one.number:.15g}: {'; '.join(places)}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(report_errors(main))
