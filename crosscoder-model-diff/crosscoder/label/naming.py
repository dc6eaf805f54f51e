"""What is asked about a latent, and what its replies mean.

First a label: passages on which the latent fires are shown with the active tokens marked. Then detection, which scores
the label: other passages, firing and silent ones mixed, go to the model in small lists with the label alone, and it
says on which the latent fires. The method is that of Paulo et al. 2024, "Automatically Interpreting Millions of
Features in Large Language Models" (arXiv 2410.13928), and their library delphi; the words of the prompts are ours.

    score = (share of firing passages called firing + share of silent passages called silent) / 2

A label that has nothing to do with the passages scores 0.5 on average, however often the model says yes. What is to
be asked next follows from the journal alone, so a run that was killed asks for what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from crosscoder.label.passages import FEWEST, Passage, Passages
from finqa.chat.answer_journal import AnswerJournal, request_key
from finqa.chat.chat_request import Wanted, how_it_ended, next_limit, request_of
from finqa.chat.config import ChatConfig

Read = TypeVar("Read")
Message = dict[str, str]
LONGEST_LABEL = 120
"""Characters; ten words are asked for."""

EXPLAIN = """\
You name features of a language model. You are shown passages of text on which one feature is active. The tokens on \
which it is active stand between << and >>. Find what the marked tokens have in common: what they mean, what form they \
have, or where they stand."""
EXPLAIN_ASKED = """

What do the marked tokens have in common, over all passages? Reply with one line of at most ten words:
Label: the description"""
EXAMPLE_LABEL = "moons of Saturn"
EXPLAIN_EXAMPLE = (
    "Passage 1: The probe came down on <<Titan>> in 2005.\n\nPassage 2: <<Rhea>> and <<Dione>> are made of ice."
    + EXPLAIN_ASKED,
    f"Label: {EXAMPLE_LABEL}",
)
DETECT = """\
You are told what a feature of a language model is about, and shown passages of text. Say for each passage whether \
the feature is active somewhere in it, judging by the description alone. It may be active in all, in some or in none."""
DETECT_ASKED = """

Is the feature active? Reply with {} lines and nothing else, one for each passage: its number, a colon, yes or no."""
DETECT_EXAMPLE = (
    f"Description: {EXAMPLE_LABEL}\n\nPassage 1: The rent went up by a tenth last year.\n\nPassage 2: a map of Rhea, "
    "drawn in 1981\n\nPassage 3: boats leave at noon\n\nPassage 4: The lakes of Titan are cold."
    + DETECT_ASKED.format(4),
    "1: no\n2: yes\n3: no\n4: yes",
)
LABEL_AGAIN = "That cannot be read. Reply with one line that begins with Label: and gives at most ten words."
VERDICTS_AGAIN = "That cannot be read. Reply with one line for each passage: its number, a colon, and yes or no."

_LABEL = re.compile(r"""[\s{*#>"'`-]*label["'*`\s]*[:=]["'*`\s]*(.+?)["'*`}\s]*""", re.IGNORECASE)
_REFUSES = re.compile(
    r"(i'?m |i am )?(very )?(sorry|unable|not able)\b|i (can(no|')?t|cannot|could not|do ?n.t) |as an ai\b|"
    r"(the |your )?description$",
    re.IGNORECASE,
)
_VERDICT = re.compile(r"\b(\d+)\W{1,4}(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Named:
    """What came of one latent."""

    latent: int
    label: str
    """Empty where it has none."""
    label_score: float | None
    """Balanced accuracy of detection, 0 to 1; None where fewer than FEWEST passages of a sort were judged."""
    n_firing: int
    n_silent: int
    """Passages that were judged."""


class Namer:
    """Conducts the conversation about each latent; what comes next follows from the journal alone.

    Args:
        chat: How to ask.
        journal: What was asked and answered so far.
        at_once: Passages that are judged in one request.
        attempts: Times that a reply is asked for, while none can be read.
    """

    def __init__(self, chat: ChatConfig, journal: AnswerJournal, at_once: int, attempts: int) -> None:
        self.chat = chat
        self.journal = journal
        self.at_once = at_once
        self.attempts = attempts

    def next_step(self, passages: Passages) -> Wanted | None:
        """What is to be asked next of a latent; None where nothing is left."""
        return next(iter(self.wanted(passages)), None)

    def wanted(self, passages: Passages, assumed: str = "") -> list[Wanted]:
        """What the journal lacks of a latent. Its judgements are asked for when there is a label; with `assumed`, for
        an estimate, by that one until then."""
        label = self.label(passages)
        steps: list[object] = [label]
        if isinstance(label, str) or (label and assumed):
            steps += self.verdicts(passages, label if isinstance(label, str) else assumed)
        return [step for step in steps if isinstance(step, Wanted)]

    def outcome(self, passages: Passages) -> Named:
        """The latent's label and score as things stand."""
        label = self.label(passages)
        if not isinstance(label, str):
            return Named(passages.latent, "", None, 0, 0)
        judged: list[tuple[bool, bool]] = []
        for shown, verdicts in zip(self._lists(passages), self.verdicts(passages, label), strict=True):
            if isinstance(verdicts, list):
                judged += zip((passage.fires for passage in shown), verdicts, strict=True)
        n_firing = sum(fires for fires, _ in judged)
        n_silent = len(judged) - n_firing
        score = round(balanced_accuracy(judged), 4) if min(n_firing, n_silent) >= FEWEST else None
        return Named(passages.latent, label, score, n_firing, n_silent)

    def label(self, passages: Passages) -> str | Wanted | None:
        """The label, the request for one, or None where no reply can be read."""
        if not passages.explaining:
            return None
        messages = _messages(EXPLAIN, EXPLAIN_EXAMPLE, _numbered(passages.explaining) + EXPLAIN_ASKED)
        return self._asked(messages, read_label, LABEL_AGAIN)

    def verdicts(self, passages: Passages, label: str) -> list[list[bool] | Wanted | None]:
        """For each list of passages: on which the latent is said to fire, or the request for it, or None if no reply
        can be read."""
        found = []
        for shown in self._lists(passages):
            n = len(shown)
            asked = f"Description: {label}\n\n{_numbered(shown)}{DETECT_ASKED.format(n)}"
            messages = _messages(DETECT, DETECT_EXAMPLE, asked)
            found.append(self._asked(messages, lambda text, n=n: read_verdicts(text, n), VERDICTS_AGAIN))
        return found

    def _lists(self, passages: Passages) -> list[tuple[Passage, ...]]:
        scoring = passages.scoring
        return [scoring[i : i + self.at_once] for i in range(0, len(scoring), self.at_once)]

    def _asked(self, messages: list[Message], read: Callable[[str], Read | None], again: str) -> Read | Wanted | None:
        """What `read` makes of the reply; a reply that it makes nothing of is answered with `again`."""
        for _ in range(self.attempts):
            request = request_of(self.chat, messages)
            key = request_key(request)
            answer = self.journal.answer(key)
            limit = next_limit(answer, self.chat.max_completion_tokens)
            if answer is None or limit:
                return Wanted(key, request | {"max_completion_tokens": limit}, answer)
            found = read(answer.text) if how_it_ended(answer) == "stop" else None
            if found is not None:
                return found
            reply = {"role": "assistant", "content": answer.text.strip() or "(nothing)"}
            messages = [*messages, reply, {"role": "user", "content": again}]
        return None


def balanced_accuracy(judged: Sequence[tuple[bool, bool]]) -> float:
    """Balanced accuracy of pairs (fires, was said to fire): the mean of the accuracies on firing and on silent ones."""
    shares = [[said == fires for fires, said in judged if fires is sort] for sort in (True, False)]
    return sum(sum(right) / len(right) for right in shares) / 2


def read_label(reply: str) -> str | None:
    """What stands behind the last `Label:` of a reply; None where there is none, or nothing that can be a label,
    such as a refusal or the label of the worked example."""
    marked = [found[1] for line in _said(reply).splitlines() if (found := _LABEL.fullmatch(line))]
    label = " ".join("".join(sign if sign.isprintable() else " " for sign in (marked or [""])[-1]).split())
    copied = EXAMPLE_LABEL.lower() in label.lower()
    sound = any(map(str.isalnum, label)) and len(label) <= LONGEST_LABEL and not _REFUSES.match(label)
    return label if sound and not copied else None


def read_verdicts(reply: str, n: int) -> list[bool] | None:
    """Yes or no for each of n passages, from a reply like `1: yes`; None unless each is there once, in order."""
    pairs = _VERDICT.findall(_said(reply))
    each_once = [int(number) for number, _ in pairs] == list(range(1, n + 1))
    return [word.lower() == "yes" for _, word in pairs] if each_once else None


def _said(reply: str) -> str:
    """A reply without what a reasoning model thought aloud; nothing where it never came to an end."""
    said = reply.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def _messages(system: str, example: tuple[str, str], asked: str) -> list[Message]:
    turns = ("system", system), ("user", example[0]), ("assistant", example[1]), ("user", asked)
    return [{"role": role, "content": content} for role, content in turns]


def _numbered(passages: Sequence[Passage]) -> str:
    return "\n\n".join(f"Passage {i}: {passage.text.strip()}" for i, passage in enumerate(passages, start=1))
