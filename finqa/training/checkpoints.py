"""The checkpoints of a training run: which one to go on from, and what is said when the disk is full."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from finqa.runtime import parallel
from finqa.runtime.errors import NO_ROOM, UserError

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""What a checkpoint has beside its weights."""
UNFINISHED = "unfinished.tmp"
"""Folder in which the student is written before its files take their places."""
NO_ROOM_TOLD = re.compile(
    r"No space left|File too large|quota exceeded|PytorchStreamWriter failed writing|inline_container.*unexpected pos",
    re.IGNORECASE,
)
"""How the writers of weights, which are not Python code, report a full disk."""


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, whole or not."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: a kill or a full disk can cut one short."""
    return next((checkpoint for checkpoint in checkpoints(folder) if damage(checkpoint) is None), None)


def drop_damaged(folder: Path) -> None:
    """Delete the checkpoints that are not whole, and say so: they are written anew."""
    for checkpoint in checkpoints(folder):
        if what := damage(checkpoint):
            print(f"{checkpoint.name} is left out: {what}", flush=True)
            shutil.rmtree(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing or cut short; None for a whole one. No tensor is read."""
    from safetensors import SafetensorError, safe_open

    weights = list(checkpoint.glob("*.safetensors"))
    missing = [name for name in NEEDED if not (checkpoint / name).exists()] + ([] if weights else ["its weights"])
    if missing:
        return f"{missing[0]} is missing"
    try:
        path = checkpoint / "trainer_state.json"
        json.loads(path.read_text())["global_step"]
        for path in weights:
            with safe_open(path, framework="numpy"):
                pass
        for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            zipfile.ZipFile(path).close()
    except (ValueError, KeyError, SafetensorError, zipfile.BadZipFile):
        return f"{path.name} is damaged"
    return None


@contextlib.contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Turns what the block raises where nothing more can be written below `folder` into one line.

    What was half written is deleted, the checkpoint before it stays.
    """
    try:
        yield
    except Exception as error:
        if not _is_no_room(error):
            raise
        if parallel.is_first():
            for checkpoint in filter(damage, checkpoints(folder)):
                shutil.rmtree(checkpoint)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        last = last_checkpoint(folder)
        goes_on = f"it goes on from {last.name}" if last else "no checkpoint was written yet"
        raise UserError(
            f"{folder} cannot be written, the disk is full; make room there, then run the command again: {goes_on}"
        ) from error


def _is_no_room(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that nothing more can be written."""
    if (isinstance(error, OSError) and error.errno in NO_ROOM) or NO_ROOM_TOLD.search(str(error)):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_no_room(before)
