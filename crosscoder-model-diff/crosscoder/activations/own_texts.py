"""Texts of the user's own, from a file to documents: JSON lines, or plain text.

    {"text": "..."}                                             a text, after the tokenizer's own special tokens
    {"prompt": "...", "completion": "..."}                      joined as they are, after those
    {"messages": [{"role": "user", "content": "..."}, ...]}     by the chat template; the last reply is the completion

A line of JSON may have an `id` beside these. Plain text is a document for each paragraph: blank lines part them. A
document without a completion has its first token as its prompt, as every later one is predicted from those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.collection import Document
from crosscoder.activations.layout import KINDS, TokenKind, first_letter, kinds_at, mark_up
from finqa.models.templates import TEMPLATE_DATE
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("messages", "prompt and completion", "text")
JSON_LINES = (".jsonl", ".ndjson", ".json")
EXAMPLE = (
    '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
)
MARK = "\ue000"
"""A character of no text."""


@dataclass(frozen=True)
class OwnText:
    """A document as the file has it."""

    id: str
    place: str
    """Where it stands, for an error: `FILE, line 3`."""
    text: str = ""
    """The completion where there is a prompt."""
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()


def read_texts(file: Path) -> list[OwnText]:
    """The documents of a file, in their order; UserError, with the line and the remedy, where it cannot be read so.

    JSON lines by the file's ending, or by a first line that begins with `{`; all else is plain text.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8; give JSON lines or plain text") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--text {file}: there is no such file; give JSON lines or plain text") from None
    is_json = file.suffix.lower() in JSON_LINES or content.lstrip().startswith("{")
    texts = _json_lines(file, content) if is_json else _paragraphs(file, content)
    if len(texts) < 2:
        parted = "one JSON object a line" if is_json else "blank lines between documents"
        raise UserError(f"{file} holds {len(texts)} documents, and at least 2 are needed: {parted}")
    return texts


def _paragraphs(file: Path, content: str) -> list[OwnText]:
    texts = []
    for filled, lines in groupby(enumerate(content.split("\n"), 1), key=lambda line: bool(line[1].strip())):
        if filled:
            numbers, paragraph = zip(*lines, strict=True)
            name = f"line {numbers[0]}"
            texts.append(OwnText(name, f"{file}, {name}", "\n".join(paragraph).strip()))
    return texts


def _json_lines(file: Path, content: str) -> list[OwnText]:
    texts, lines_of = [], {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{place} is not JSON; each line is an object: {EXAMPLE}") from None
        text = _own_text(row, place, f"line {number}")
        if text.id in lines_of:
            raise UserError(f"{place} has the id {text.id!r} of line {lines_of[text.id]}; change one, or give no ids")
        lines_of[text.id] = number
        texts.append(text)
    return texts


def _own_text(row: Any, place: str, name: str) -> OwnText:
    """The document of one line; UserError where it is none, or could be two."""
    fields: dict[str, Any] = row if isinstance(row, dict) else {}
    named = {form: all(name in fields for name in form.split(" and ")) for form in FORMS}
    forms = [form for form, there in named.items() if there]
    if len(forms) != 1:
        said = " and ".join(forms) or "none of " + ", ".join(FORMS)
        raise UserError(f"{place} has {said}; a line has one of them: {EXAMPLE}")
    identity = str(fields.get("id", name))
    if forms == ["messages"]:
        messages = fields["messages"]
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise UserError(f'{place}: messages is a list of {{"role": "...", "content": "..."}}, both of them text')
        return OwnText(identity, place, messages=tuple(messages))
    values = {name: fields[name] for name in forms[0].split(" and ")}
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: {name} must be text that is not empty, not {json.dumps(value)[:60]}")
    return OwnText(identity, place, values.get("text") or values["completion"], values.get("prompt", ""))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def documents_from_texts(texts: Sequence[OwnText], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The ids of the texts, a document each.

    UserError where a text has fewer than two tokens, or the chat template refuses its messages.
    """
    marks, documents = mark_up(tokenizer), list[Document]()
    kinds: list[TokenKind]
    for text in texts:
        if text.messages:
            ids, n_prompt, kinds = _chat(text, tokenizer)
        else:
            asked: Any = tokenizer(text.prompt)["input_ids"] if text.prompt else []
            rest: Any = tokenizer(text.text, add_special_tokens=not text.prompt)["input_ids"]
            ids, n_prompt = [*asked, *rest], len(asked) or 1
            of_rest: TokenKind = "completion" if text.prompt else "other"
            kinds = ["prompt" if i < len(asked) else of_rest for i in range(len(ids))]
        if len(ids) < 2:
            raise UserError(f"{text.place}: the text is a single token, before which nothing stands; leave it out")
        own = tuple(KINDS.index("chat" if i in marks else kind) for i, kind in zip(ids, kinds, strict=True))
        documents.append(Document(text.id, tuple(ids), n_prompt, kinds=own))
    return documents


def _chat(text: OwnText, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int, list[TokenKind]]:
    """Ids of a chat, how many are prompt, and their kinds: what the template writes around the messages is `chat`."""
    from jinja2 import TemplateError

    def written_with(contents: Sequence[str]) -> str:
        messages = [message | {"content": own} for message, own in zip(text.messages, contents, strict=True)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TEMPLATE_DATE.strftime))

    contents = [message["content"] for message in text.messages]
    try:
        written = written_with(contents)
        # With a mark in the place of each content; a template may put them in another order, or leave one out.
        pieces = re.split(f"{MARK}(\\d+){MARK}", written_with([f"{MARK}{i}{MARK}" for i in range(len(contents))]))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{text.place}: the chat template refuses these messages ({error}); change them") from None
    read: Any = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(read["input_ids"])
    reply = len(contents) - 1 if text.messages[-1]["role"] == "assistant" else None
    for said in (contents, [content.strip() for content in contents]):  # many templates strip
        borders, place = list[tuple[int, TokenKind]](), 0
        spelled = [said[int(piece)] if i % 2 else piece for i, piece in enumerate(pieces)]
        for i, (piece, spelt) in enumerate(zip(pieces, spelled, strict=True)):
            borders.append((place, ("completion" if int(piece) == reply else "prompt") if i % 2 else "chat"))
            place += len(spelt)
        if "".join(spelled) == written:
            kinds = kinds_at((first_letter(written, *span) for span in read["offset_mapping"]), borders)
            return ids, max(1, kinds.index("completion")) if "completion" in kinds else 1, kinds
    return ids, 1, ["other"] * len(ids)
