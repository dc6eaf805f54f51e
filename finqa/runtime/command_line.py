"""The command line of a config: a flag is declared once, at the field that it sets.

    @dataclass(frozen=True)
    class TrainingConfig:
        save_steps: int | None = flag(None, shown="ten checkpoints a run")
        '''Updates between two checkpoints.'''

`add_flags(parser, TrainingConfig)` adds `--save-steps`: its type and choices come from the annotation, its help is the
first sentence of the docstring, and its default stands behind it. `from_args(TrainingConfig, args)` is the config that
the flags make. The namespace holds only what the user gave (`given`), under `<class>.<field>`, so that a default that
depends on something else (the model, the size of the data) is decided by whoever knows it.
"""

from __future__ import annotations

import argparse
import ast
import math
import operator
import re
import shlex
from collections.abc import Collection
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from finqa.runtime.errors import UserError, nearest

Config = TypeVar("Config")
OPTIONS: dict[str, Any] = {"help": "", "shown": None, "group": "", "metavar": "", "type": None, "values": None}
OPTIONS |= {"both_ways": False, "const": MISSING, "least": None, "above": None, "below": None, "most": None}
BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
    "most": (operator.le, "at most"),
}
"""The options that bound a number: what holds of value and bound, and how that is said."""
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def option(*names: str, **options: Any) -> dict[str, Any]:
    """Metadata that makes a field a flag.

    Args:
        names: Flags, or one word without a hyphen for a positional argument. None: the field's name with hyphens,
            after `--no-` where it is a bool that is true by default.
        options: `help`, in place of the docstring's first sentence; `shown`, what the help says of the default, where
            that is not its value; `group`, by which `add_flags` chooses fields; `metavar`, best the unit; `type`, which
            reads the value in place of the annotation; `values`, words to choose from with what each stands for;
            `both_ways`, for a bool with a flag and its opposite; `const`, what the flag means without a value; and
            the BOUNDS of a number, which `check_bounds` holds.
    """
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise TypeError(f"no option of a flag: {', '.join(sorted(unknown))}")
    return OPTIONS | options | {"names": names}


def flag(default: Any, *names: str, **options: Any) -> Any:
    """A field with a default that is a flag; `options` are those of `option`."""
    return field(default=default, metadata=option(*names, **options))


def check_bounds(config: Any) -> None:
    """Raises UserError where a number of a config is outside of the bounds of its field, infinite or NaN."""
    for one in fields(config):
        value, bounds = getattr(config, one.name), {name: one.metadata.get(name) for name in BOUNDS}
        declared = [(*BOUNDS[name], bound) for name, bound in bounds.items() if bound is not None]
        if value is None or not declared:
            continue
        if not abs(value) < math.inf or not all(holds(value, bound) for holds, _, bound in declared):
            said = " and ".join(f"{words} {bound:g}" for _, words, bound in declared)
            raise UserError(f"{_names(one)[-1]} must be {said}, not {value}")


class ScriptParser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with the command, and the flag that is most like an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        like = nearest(unknown[1], self._option_string_actions) if unknown else ""
        self.exit(2, f"error: {message}{like}; --help lists all flags\n")


def script_parser(manual: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the script's docstring."""
    return ScriptParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flags(
    into: argparse._ActionsContainer,
    kind: type,
    group: str | None = None,
    several: Collection[str] = (),
    without: Collection[str] = (),
) -> None:
    """Add the flags of a config and of the configs in it to a parser or a group.

    Args:
        into: Gets the flags.
        kind: The dataclass.
        group: Only the fields of this group; None is all of them.
        several: Fields that take one value or more here.
        without: Fields that are left out here.
    """
    scope: dict[str, Any] = {}
    docstrings: dict[str, str] = {}
    for parent in [parent for parent in reversed(kind.__mro__) if is_dataclass(parent)]:
        own = parent.__dict__["__init__"].__globals__  # those of its module, also where that is a script
        scope |= own
        docstrings |= field_docstrings(own["__file__"]).get(parent.__name__, {})
    hints = get_type_hints(kind, scope)
    for one in fields(kind):
        if one.name in without:
            continue
        if is_dataclass(one.default):
            add_flags(into, hints[one.name], group, several, without)
        elif one.metadata and group in (None, one.metadata["group"]):
            _add_flag(into, kind, one, hints[one.name], docstrings.get(one.name, ""), one.name in several)


def _add_flag(
    into: argparse._ActionsContainer, kind: type, one: Field[Any], hint: Any, docstring: str, several: bool
) -> None:
    settings = one.metadata
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    off, names = one.default is True and not settings["both_ways"], _names(one)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(one, docstring)}
    if settings["values"]:
        options |= {"choices": tuple(settings["values"])}
    elif hint is bool:
        one_way = "store_false" if off else "store_true"
        options |= {"action": argparse.BooleanOptionalAction if settings["both_ways"] else one_way}
    elif get_origin(hint) is Literal:
        options |= {"choices": get_args(hint)}
    else:
        if get_origin(hint) is tuple:
            hint, several = get_args(hint)[0], True
        metavar = settings["metavar"] or METAVARS.get(hint)
        options |= {"type": settings["type"] or hint, "metavar": metavar}
    if several or settings["const"] is not MISSING:
        options |= {"nargs": "+"} if several else {"nargs": "?", "const": settings["const"]}
    destination = f"{kind.__name__}.{one.name}"
    if names[0].startswith("-"):
        into.add_argument(*names, dest=destination, **options)
    else:
        options |= {"nargs": "?", "metavar": names[0]}
        into.add_argument(destination, **options)


def _names(one: Field[Any]) -> tuple[str, ...]:
    off = one.default is True and not one.metadata["both_ways"]
    return one.metadata["names"] or (f"--{'no-' if off else ''}{one.name.replace('_', '-')}",)


def _help(one: Field[Any], docstring: str) -> str:
    first_sentence = re.split(r"(?<=[.]) (?=[A-Z`])", " ".join(docstring.split()))[0].rstrip(".")
    shown = one.metadata["shown"]
    if shown is None and one.default not in (MISSING, None, "") and not isinstance(one.default, bool):
        shown = " ".join(one.default) if isinstance(one.default, tuple) else str(one.default)
    text = (one.metadata["help"] or first_sentence) + (f" (default: {shown})" if shown else "")
    return text.strip().replace("%", "%%")


@cache
def field_docstrings(path: str) -> dict[str, dict[str, str]]:
    """The docstrings under the fields of the classes in a Python file, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for before, after in zip(node.body, node.body[1:], strict=False):
                match before, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found.setdefault(node.name, {})[name] = text
    return found


def given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config that the user gave a value, by name."""
    found: dict[str, Any] = {}
    for one in fields(kind):
        if is_dataclass(one.default) and not isinstance(one.default, type):
            if inner := given(type(one.default), args):
                found[one.name] = replace(one.default, **inner)
        elif (destination := f"{kind.__name__}.{one.name}") in vars(args):
            value = getattr(args, destination)
            values = one.metadata["values"]
            found[one.name] = values[value] if values else tuple(value) if isinstance(value, list) else value
    return found


def words_of(config: Any, group: str | None = None, **defaults: Any) -> list[str]:
    """The flags, with their values, of the fields that differ from their default or from the one in `defaults`."""
    words: list[str] = []
    for one in fields(config):
        value = getattr(config, one.name)
        if one.metadata and group in (None, one.metadata["group"]) and value != defaults.get(one.name, one.default):
            off = value is False and one.metadata["both_ways"]
            words.append(_names(one)[-1].replace("--", "--no-") if off else _names(one)[0])
            values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            words += [shlex.quote(str(each)) for each in values]
    return words


def settings_of(*configs: Any) -> dict[str, Any]:
    """The values of all fields of some configs, for a run's manifest."""
    return {name: value for config in configs for name, value in asdict(config).items()}


def from_args(kind: type[Config], args: argparse.Namespace, **known: Any) -> Config:
    """The config that the flags make, with `known` fields that no flag gives. Raises UserError as `check_bounds`."""
    config = kind(**given(kind, args), **known)
    check_bounds(config)
    return config
