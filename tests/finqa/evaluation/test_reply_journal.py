"""What an evaluation finds of earlier runs, after every way in which one can have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from finqa.evaluation.evaluate import write_results
from finqa.evaluation.generation import Reply
from finqa.evaluation.judging import judge
from finqa.evaluation.predictions import prompt_hash
from finqa.evaluation.reply_journal import ReplyJournal, settings_key, slots_of
from finqa.evaluation.rows import EvalRow
from finqa.runtime.manifest import write_json
from finqa.sandbox.running import Sandbox

SETTINGS = {"max_new_tokens": 16, "base_hash": "abc", "temperature": 0.0}
PROMPTS = [[1, 2], [3], [1, 2]]
SLOTS = slots_of(map(prompt_hash, PROMPTS), 2)
REPLIES = [Reply(f"ans = {n} # half \ud800 a pair", 2, n, "stop") for n in range(6)]


def begun(folder: Path, count: int) -> ReplyJournal:
    """A journal with the first so many replies, closed."""
    journal = ReplyJournal(folder, SETTINGS)
    journal.begin({"engine": "some"})
    for slot, reply in list(zip(SLOTS, REPLIES, strict=True))[:count]:
        journal.add(slot, reply)
    journal.end()
    return journal


def test_every_sample_of_every_prompt_has_a_slot_of_its_own_even_where_a_prompt_stands_twice():
    assert len(set(SLOTS)) == 6
    assert SLOTS[0][0] == SLOTS[4][0] != SLOTS[2][0]


def test_replies_that_were_added_are_there_in_the_next_run_with_the_engine_and_the_seconds(tmp_path: Path):
    first = begun(tmp_path, 3)
    again = ReplyJournal(tmp_path, SETTINGS)
    assert again.replies == dict(zip(SLOTS[:3], REPLIES[:3], strict=True))
    assert again.served == {"engine": "some"}
    assert again.seconds == pytest.approx(first.seconds, abs=0.02)


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_torn_last_line_is_dropped_and_what_is_added_next_does_not_join_it(tmp_path: Path, cut: int):
    journal = begun(tmp_path, 3)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-cut])
    again = ReplyJournal(tmp_path, SETTINGS)
    assert set(again.replies) == set(SLOTS[:2])
    again.begin({"engine": "some"})
    again.add(SLOTS[2], REPLIES[2])
    again.end()
    assert ReplyJournal(tmp_path, SETTINGS).replies == dict(zip(SLOTS[:3], REPLIES[:3], strict=True))


def test_a_line_that_is_damaged_costs_its_own_reply_alone(tmp_path: Path):
    journal = begun(tmp_path, 3)
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join([lines[0], "\x00" * 20, *lines[2:]]) + "\n")
    assert set(ReplyJournal(tmp_path, SETTINGS).replies) == set(SLOTS[1:3])


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 17}, {"base_hash": "abd"}, {"temperature": 0.7}, {"student_hash": "x"}]
)
def test_replies_under_other_settings_or_weights_are_not_seen(tmp_path: Path, change: dict):
    begun(tmp_path, 3)
    assert not ReplyJournal(tmp_path, SETTINGS | change).replies
    assert ReplyJournal(tmp_path, SETTINGS).replies


def test_the_order_of_settings_makes_no_other_key():
    assert settings_key(SETTINGS) == settings_key(dict(reversed(SETTINGS.items())))


def test_results_take_over_from_the_journal_and_give_the_same_replies_to_the_next_run(tmp_path: Path):
    journal = begun(tmp_path, 6)
    rows = [EvalRow(f"q{n}", "p", "1", "", None) for n in range(3)]
    with Sandbox() as sandbox:
        predictions = judge(rows, PROMPTS, REPLIES, sandbox, sampled=True)
    write_results(tmp_path, predictions, {"generate": 2.5, "run": 0})
    facts = {"generation_key": journal.key, "served": {"engine": "some"}, "seconds": {"generate": 2.5}}
    write_json(tmp_path / "run.json", facts)
    journal.hand_over(SLOTS)
    assert not journal.path.exists()
    again = ReplyJournal(tmp_path, SETTINGS)
    assert again.replies == dict(zip(SLOTS, REPLIES, strict=True))
    assert again.seconds == 2.5 and again.found == facts
    # Without run.json nothing says what made the predictions.
    (tmp_path / "run.json").unlink()
    assert not ReplyJournal(tmp_path, SETTINGS).replies


@pytest.mark.parametrize("damaged", ["run.json", "predictions.jsonl"])
def test_of_damaged_results_every_reply_is_written_again(damaged: str, tmp_path: Path):
    facts = {"generation_key": settings_key(SETTINGS), "served": {}, "seconds": {"generate": 1.0}}
    write_json(tmp_path / "run.json", facts)
    (tmp_path / "predictions.jsonl").write_text("")
    (tmp_path / damaged).write_text('{"id": ')
    journal = ReplyJournal(tmp_path, SETTINGS)
    assert (journal.replies, journal.found) == ({}, {})


def test_replies_to_rows_that_were_left_out_stay_for_a_later_run(tmp_path: Path):
    begun(tmp_path, 6)
    journal = ReplyJournal(tmp_path, SETTINGS)
    journal.secure()
    journal.hand_over(SLOTS[:2])
    assert set(ReplyJournal(tmp_path, SETTINGS).replies) == set(SLOTS[2:])
