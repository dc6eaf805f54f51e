"""What goes to the Hub and comes from there: flags of a push, names of repositories, and finding what is made.

Activation sets are dataset repositories; dictionaries and merged models are model repositories.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from crosscoder.names import ActivationChoice
from finqa.models import hub
from finqa.models.students import StudentRun
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders

MARKER = "config.json"
"""What is in every folder that is found."""


def add_push_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """--push, --no-push and --private; what these scripts make is pushed only when asked for."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--push", action="store_true", help=f"Upload the {what} to the Hub")
    group.add_argument("--no-push", dest="push", action="store_false", help="Keep it here (the default)")
    parser.add_argument("--private", action="store_true", help="Make the Hub repository private")


def require_push(args: argparse.Namespace, student: StudentRun, name: str) -> None:
    """UserError before any work where --push is given and cannot be done."""
    reason = hub.why_no_push(hub_id(student, name)) if args.push else None
    if reason:
        raise UserError(f"cannot push {name}: {reason}")


def hub_id(student: StudentRun, name: str) -> str | None:
    """Hub repository of something by this name; None where no Hub account is known."""
    account = student.hf_name
    return f"{account}/{hub.repository_name(name)}" if account else None


def find_folder(
    local: Path,
    student: StudentRun,
    what: str,
    command: str,
    earlier_name: str = "",
    kinds: Sequence[hub.RepositoryKind] = ("model",),
) -> Path:
    """`local` where it holds a config.json, else its copy from the Hub; UserError names both and the remedy.

    `earlier_name`: under which the Hub may have it, too. `kinds`: of its repository, each is looked for.
    """
    if (local / MARKER).exists():
        return local
    repository = hub_id(student, local.name)
    names = dict.fromkeys([local.name, earlier_name or local.name]) if repository else ()
    for name, kind in product(names, kinds):
        fetched = hub.fetch_folder(str(hub_id(student, name)), kind=kind)
        if fetched is not None and (fetched / MARKER).exists():
            return fetched
    raise UserError(f"no {what} in {local}, nor {hub.looked_for(repository)}; make it with: {command}")


def find_activations(choice: ActivationChoice, folders: Folders) -> Path:
    """Folder of an activation set; UserError as of `find_folder`."""
    command = choice.command("collect_activations.py", folders)
    local = folders.activations(choice.name)
    return find_folder(local, choice.student, "activation set", command, kinds=hub.ACTIVATION_KINDS)
