"""The layout of a document: which part of it each token belongs to.

The kinds follow from the form of the prompt (finqa.task.prompts), whose markers are found in the text that the ids
spell:

    chat       mark-up of the chat template, around the prompt
    frame      fixed words of the prompt: the request and the markers
    passage    the page, but for its table
    table      its table
    question
    program    the completion up to its end marker
    end        the end marker and what follows it
    other      prompts without the markers, which cannot be told apart; texts that are neither prompt nor completion
    prompt     of a text of the user's own (own_texts), which has no markers: its prompt, or its messages
    completion of such a text

chat and frame are the template: the same in every document. A token that reaches over a border belongs to where its
first character that is no white space stands.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from finqa.task.prompts import END_PYTHON, PASSAGE, PYTHON, QUESTION, REQUEST, table_span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenKind = Literal["chat", "frame", "passage", "table", "question", "program", "end", "other", "prompt", "completion"]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
"""Activation sets store a kind as its place here, so that a new one goes to the end."""
TEMPLATE: tuple[TokenKind, ...] = ("chat", "frame")
ANCHOR = "a"


def layout(ids: Sequence[int], n_prompt: int, texts: dict[int, str], special: set[int]) -> tuple[int, ...]:
    """The kind, as a place in KINDS, of every id of a document whose first `n_prompt` ids are the prompt.

    `texts` has what each id spells (`token_texts`), `special` the ids that are mark-up wherever they stand (`mark_up`).
    """
    prompt = _cut(ids[:n_prompt], texts, _prompt_borders("".join(texts[i] for i in ids[:n_prompt])))
    kinds: list[TokenKind] = ["chat" if i in special else kind for i, kind in zip(ids, prompt, strict=False)]
    text = "".join(texts[i] for i in ids[n_prompt:])
    end = text.rfind(END_PYTHON)
    borders: list[tuple[int, TokenKind]] = [(0, "program")]
    if end >= 0:
        borders.append((end, "end"))
    completion = _cut(ids[n_prompt:], texts, borders)
    # The end token of a completion whose marker was cut off.
    kinds.extend("end" if i in special else kind for i, kind in zip(ids[n_prompt:], completion, strict=True))
    return tuple(map(KINDS.index, kinds))


def _prompt_borders(text: str) -> list[tuple[int, TokenKind]]:
    """Where each part of a prompt starts, in order of place; the markers as page_from_prompt finds them."""
    question = text.rfind(QUESTION)
    passage = text.find(PASSAGE, 0, max(question, 0))
    if question < 0 or passage < 0:
        return [(0, "other")]
    # Without the request's own words what stands before the passage may be either; special tokens tell themselves.
    request = text.find(REQUEST, 0, passage)
    page, asked = passage + len(PASSAGE), question + len(QUESTION)
    python = text.rfind(PYTHON, asked)
    borders: list[tuple[int, TokenKind]] = [(0, "chat"), (max(request, 0), "frame"), (page, "passage")]
    begin, end = table_span(text, page, question)
    if begin < end:
        borders.extend([(begin, "table"), (end, "passage")])
    borders.extend([(question, "frame"), (asked, "question")])
    if python >= 0:
        borders.extend([(python, "frame"), (python + len(PYTHON), "chat")])
    return borders


def _cut(ids: Sequence[int], texts: dict[int, str], borders: list[tuple[int, TokenKind]]) -> list[TokenKind]:
    """The part in which each id's first character stands, white space before it left out."""
    spelled, starts, place = "".join(texts[i] for i in ids), [], 0
    for i in ids:
        starts.append(first_letter(spelled, place, place + len(texts[i])))
        place += len(texts[i])
    return kinds_at(starts, borders)


def first_letter(text: str, start: int, end: int) -> int:
    """Place of the first character of a stretch that is no white space; `start` where there is none."""
    return next((place for place in range(start, end) if not text[place].isspace()), start)


def kinds_at(places: Iterable[int], borders: list[tuple[int, TokenKind]]) -> list[TokenKind]:
    """The part in which each place lies."""
    starts = [place for place, _ in borders]
    return [borders[bisect_right(starts, place) - 1][1] for place in places]


def mark_up(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that no text is made of: special tokens, those of the chat template among them."""
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks.update(tokenizer.all_special_ids)
    unknown: Any = tokenizer.unk_token_id
    return marks - {unknown}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Each token as it reads inside a text: a tokenizer decodes a token that comes first without its space.

    Bytes that are part of a character alone, such as the first of the three of a curly apostrophe, read <0xE2>.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
    before = text(anchor)
    texts = {}
    for i in ids:
        both = text([*anchor, i])
        texts[i] = both[len(before) :] if both.startswith(before) else text([i])
        if "\ufffd" in texts[i]:
            texts[i] = _with_byte_marks(str(tokenizer.convert_ids_to_tokens(i)), texts[i])
    return texts


def _with_byte_marks(token: str, text: str) -> str:
    """A vocabulary's token with its stray bytes as marks: one of SentencePiece is the mark already, and one of a
    byte-level BPE has a letter for every byte. `text` where it is neither."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return token
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if not set(token) <= set(byte_of):
        return text
    spelled = bytes(byte_of[letter] for letter in token).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda stray: f"<0x{ord(stray[0]) - 0xDC00:02X}>", spelled)
