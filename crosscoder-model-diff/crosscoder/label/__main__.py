"""Name the latents that changed most: a model describes each from its examples, and the name is scored on others.

    python -m crosscoder.label FinQA-mini pocket-mistral --model gpt-5 --latents 100 --dry-run
    python -m crosscoder.label FinQA-mini pocket-mistral --model NAME --base-url http://localhost:8000/v1 \\
        --max-completion-tokens 200 --temperature 0

Takes the names and flags of train.py, and these. Reads the crosscoder, its activation set, and the latents.csv that
analyse.py wrote. The model is behind OpenAI or any compatible server (vLLM's, for instance). Key, journal, retries,
--max-concurrent and --max-cost are the teacher's (docs/teacher.md).

Writes into crosscoder-model-diff/results/<crosscoder's name>/

    latents.csv            two columns more: label, and label_score, the balanced accuracy of detection (0 to 1;
                           chance is 0.5). analyse.py keeps them as long as the dictionary is the same
    labels.json            every latent that was asked about, with the number of passages judged; the run manifest
    labels.journal.jsonl   every request that was answered; a run that was killed goes on from it

How passages are chosen is in crosscoder/label/passages.py, what is asked and how it is scored in naming.py beside it. A
reply that cannot be read (a refusal, nothing, thoughts that never end) is asked for again, and then left out: such a
latent has no label, such passages count as not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosscoder.names import CrosscoderChoice, choice_from_args
from crosscoder.opening import AnalysisConfig, add_crosscoder_flags, open_crosscoder_of
from finqa.chat.answer_journal import AnswerJournal
from finqa.chat.asking import ask_all
from finqa.chat.chat_request import shown
from finqa.chat.config import ChatConfig, api_key, config_from
from finqa.chat.prices import Spending, estimate, spending_of
from finqa.runtime.command_line import add_flags, flag, from_args, script_parser, settings_of, words_of
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import Folders

if TYPE_CHECKING:
    from crosscoder.label.naming import Named, Namer
    from crosscoder.label.passages import Passages

ASSUMED_LABEL = "ten words that say what a latent is active on, or so"
"""Stands for a label that is not there yet, in the estimate."""


@dataclass(frozen=True)
class LabelConfig:
    """Which latents are named, and from what."""

    latents: int = flag(50, least=1, metavar="N")
    """How many latents are named, those that changed most first (as in most_changed.csv)."""
    explaining: int = flag(10, least=1, metavar="PASSAGES")
    """Passages that a label is made from."""
    scoring: int = flag(10, least=1, metavar="PASSAGES")
    """Other passages on which a latent fires, and as many on which it does not, to score its label; 5 at least."""
    at_once: int = flag(5, least=1, metavar="PASSAGES")
    """Passages that are judged in one request."""
    attempts: int = flag(2, least=1)
    """Times that a reply is asked for, while none can be read."""
    seed: int = flag(0, help="Of the draw of silent passages, and of the order in which passages are judged")
    dry_run: bool = flag(False, help="Print the first prompt and the estimate; send and write nothing")


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_crosscoder_flags(parser)
    add_flags(parser.add_argument_group("labels"), LabelConfig)
    add_flags(parser.add_argument_group("the model that is asked"), ChatConfig)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config, chat = from_args(LabelConfig, args), config_from(args, ChatConfig)
    choice, crosscoder, folders = choice_from_args(args), from_args(CrosscoderChoice, args), Folders.from_args(args)
    words = words_of(crosscoder)
    results = crosscoder.results_dir / crosscoder.name_on(choice, folders)
    if not config.dry_run:
        api_key()  # Before anything long.
    with only_run_on(results):
        from crosscoder.analysis.tables import most_changed
        from crosscoder.label.naming import Namer
        from crosscoder.label.passages import choose_passages
        from crosscoder.label.table import analysed_rows, label_table

        opened = open_crosscoder_of(args)
        rows = analysed_rows(opened, choice.command("analyse.py", folders, *words))
        chosen = most_changed(rows, config.latents, AnalysisConfig.min_frequency)
        passages = choose_passages(opened, chosen, config.explaining, config.scoring, config.seed)
        path = results / "labels.journal.jsonl"
        spending = spending_of(chat, [path])
        with nullcontext(AnswerJournal(path).read()) if config.dry_run else AnswerJournal(path) as journal:
            namer = Namer(chat, journal, config.at_once, config.attempts)
            plan(namer, passages, spending, config.dry_run)
            if config.dry_run:
                return
            stopped = ask(namer, passages, spending)
            named = [namer.outcome(each) for each in passages]
        label_table(opened, named, settings_of(choice, crosscoder, config, chat), **spending.facts())
    print(summary(named, passages), spending, sep="\n")
    print(f"{results / 'latents.csv'} has the labels; the dashboard shows them once it is built again:")
    print(choice.command("-m crosscoder.dashboard", folders, *words), flush=True)
    if stopped:
        raise UserError(stopped)


def plan(namer: Namer, passages: list[Passages], spending: Spending, with_prompt: bool) -> None:
    """Print what is to be asked and what it will cost."""
    wanted = [step for each in passages for step in namer.wanted(each, ASSUMED_LABEL)]
    if wanted and with_prompt:
        print(shown(wanted[0].request, namer.chat.limit_name), end="\n\n")
    planned = estimate([(step.characters, step.limit) for step in wanted], [], spending.price)
    spending.assumed_dollars = (planned.dollars or 0.0) / max(1, planned.requests)
    print(f"estimate: {planned}" if wanted else "nothing is to be asked: the journal has every answer", flush=True)


def ask(namer: Namer, passages: list[Passages], spending: Spending) -> str:
    """Ask for what the journal lacks; what stopped it before the end, or nothing."""
    missing = [each for each in passages if namer.wanted(each)]
    if not missing:
        return ""
    before = len(namer.journal) > 0
    asked = ask_all(missing, namer.next_step, namer.chat, namer.journal, spending, "labels", before)
    given_up = asyncio.run(asked)
    left = sum(any(step.key not in given_up for step in namer.wanted(each)) for each in passages)
    return spending.used_up(left, len(passages), "latents") if left else ""


def summary(named: list[Named], passages: list[Passages]) -> str:
    """How many latents have a label, and what the labels are worth."""
    from crosscoder.label.table import mean_score

    rare = sum(not each.explaining for each in passages)
    with_label = sum(bool(each.label) for each in named)
    unread = len(named) - rare - with_label
    lines = [
        f"{with_label} of {len(named)} latents have a label; {rare} fire on too few pages, {unread} have no reply that "
        "can be read"
    ]
    scores = [each.label_score for each in named if each.label_score is not None]
    if not scores:
        return "\n".join([*lines, "no label has a score: too few replies to its passages can be read"])
    mean, low, high = mean_score(scores)
    n = sum(each.n_firing + each.n_silent for each in named if each.label_score is not None)
    lines.append(
        f"detection score: {mean:.3f} [{low:.3f}, {high:.3f}], mean and 95% interval of {len(scores)} labels "
        f"({n / len(scores):.0f} passages each; chance is 0.5)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(report_errors(main))
