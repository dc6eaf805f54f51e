from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from finqa.runtime.command_line import add_flags, flag, from_args, given, script_parser, words_of
from preprocessing.teacher.config import OpenAITeacherConfig


@dataclass(frozen=True)
class Inner:
    """A config in a config."""

    quick: bool = flag(True, "--no-quick")


@dataclass(frozen=True)
class Example:
    """One field of each kind."""

    place: str = flag("here", "PLACE")
    seed: int = flag(3, "-S", "--SEED", "--seed", metavar="N")
    """Seed of the draw. A second sentence is no help."""
    names: tuple[str, ...] = flag(("a", "b"), "-N", "--names")
    kind: Literal["one", "two"] | None = flag(None, shown="100% of both")
    again: bool | None = flag(None, values={"auto": None, "yes": True})
    adapter: bool = flag(True, "-P", "--adapter", both_ways=True)
    inner: Inner = Inner()
    unnamed: int = 7


def parsed(*words: str):
    parser = script_parser("What it does.")
    add_flags(parser, Example)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["there"], {"place": "there"}),
        (["--SEED", "4"], {"seed": 4}),
        (["--names", "c", "d"], {"names": ("c", "d")}),
        (["--kind", "two", "--again", "yes"], {"kind": "two", "again": True}),
        (["--no-adapter"], {"adapter": False}),
        (["--no-quick"], {"inner": Inner(quick=False)}),
    ],
)
def test_the_config_is_what_was_given_over_the_defaults(words: list[str], changes: dict[str, object]):
    args = parsed(*words)
    assert given(Example, args) == changes
    assert from_args(Example, args) == Example(**changes)  # pyright: ignore[reportArgumentType]


def test_the_help_is_the_first_sentence_and_the_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "-S N, --SEED N, --seed N Seed of the draw (default: 3)" in text
    assert "(default: a b)" in text and "(default: 100% of both)" in text
    assert "second sentence" not in text and "unnamed" not in text


def test_a_config_has_the_flags_of_the_one_it_extends_with_their_help(capsys: pytest.CaptureFixture[str]):
    parser = script_parser("What it does.")
    add_flags(parser, OpenAITeacherConfig)
    assert from_args(OpenAITeacherConfig, parser.parse_args(["--model", "m", "--attempts", "2"])).model == "m"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The model that is asked (default: gpt-5)" in text and "Times a question is put to the teacher" in text


def test_the_words_of_a_config_make_it_again():
    config = Example(seed=5, names=("c d", "e"), kind="one", adapter=False)
    assert words_of(config) == ["-S", "5", "-N", "'c d'", "e", "--kind", "one", "--no-adapter"]


def test_an_option_that_is_unknown_is_a_mistake():
    with pytest.raises(TypeError, match="no option of a flag: halp"):
        flag(1, halp="me")
