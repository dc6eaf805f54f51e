"""Where every file of the pipeline lives, from --data-dir and --results-dir."""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from finqa.runtime.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
"""Root of the repository; the default folders lie below it, whatever the current folder is."""

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SplitOrAll = Literal["train", "dev", "test", "all"]
TEMPORARY = ".tmp"
"""Ending of temporary names: `.<name>.<eight letters>.tmp` beside the file or folder that it is for."""
SHIPPED_DATA = REPOSITORY / "data"
"""Holds FinQA-mini and pocket-mistral, which are valid names with any --data-dir."""


@dataclass(frozen=True)
class Folders:
    """The data and results folders of a run, and the path of each file the stages exchange."""

    data: Path = SHIPPED_DATA
    results: Path = REPOSITORY / "results"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Folders:
        return cls(data=args.data_dir, results=args.results_dir)

    def raw(self, dataset: str, split: str) -> Path:
        """Raw JSON of a split: below the data folder, or the one that is shipped."""
        own = self.data / dataset / f"{split}.json"
        shipped = SHIPPED_DATA / dataset / f"{split}.json"
        return shipped if shipped.exists() and not own.exists() else own

    def clean(self, dataset: str, split: str) -> Path:
        return self.data / "clean" / dataset / f"{split}.csv"

    def generated(self, dataset: str, split: str) -> Path:
        return self._with_code(dataset, split, "generated")

    def filtered(self, dataset: str, split: str) -> Path:
        return self._with_code(dataset, split, "generated_filtered")

    def rejected(self, dataset: str, split: str) -> Path:
        return self._with_code(dataset, split, "generated_rejected")

    def model(self, dataset: str, model_id: str) -> Path:
        return self.data / "models" / dataset / model_id

    def evaluation(self, dataset: str, model_id: str, split: str, eval_type: str) -> Path:
        return self.results / dataset / model_id / split / eval_type

    @property
    def tokenised(self) -> Path:
        """Cache of training rows as token ids; what is deleted there is made again."""
        return self.data / "tokenised"

    @property
    def compiled(self) -> Path:
        """What torch.compile makes of models' layers; what is deleted there is made again."""
        return self.data / "compiled"

    def activations(self, name: str) -> Path:
        return self.data / "activations" / name

    def _with_code(self, dataset: str, split: str, what: str) -> Path:
        return self.data / "clean_with_code" / dataset / f"{dataset.lower()}_{split}_{what}.csv"


def add_folder_flags(parser: argparse.ArgumentParser, results: bool = True) -> None:
    """Add --data-dir and, with `results`, --results-dir; what the user gives is relative to the current folder."""
    parser.add_argument("--data-dir", type=Path, default=Folders.data, help="Data folder (default: %(default)s)")
    if results:
        parser.add_argument(
            "--results-dir", type=Path, default=Folders.results, help="Results folder (default: %(default)s)"
        )
    else:
        parser.set_defaults(results_dir=Folders.results)


def check_writable(folder: Path) -> None:
    """Raises OSError, which names the place, where nothing can be written to a folder or to what it will be made in."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"some room")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from error


def check_name(flag: str, name: str) -> None:
    """Raises UserError where a name that `flag` gives cannot be part of a folder's name and of a figure's title."""
    if not re.fullmatch(r"[\w.+=@,-]{0,64}", name) or name in {".", ".."}:
        raise UserError(
            f"{flag} is part of a folder name: at most 64 letters, digits and . _ - + = @ , and not {name[:80]!r}"
        )


def chosen_splits(split: str) -> tuple[str, ...]:
    """The splits that --split names: `all` is each of train, dev, test."""
    return SPLITS if split == "all" else (split,)


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON, with json.dumps' options; null for the numbers that JSON does not have (NaN, infinities)."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        plain = json.loads(json.dumps(value, **options), parse_constant=lambda name: None)
        return json.dumps(plain, **options)


def json_line(value: Any) -> str:
    """A line of a JSON-lines file, its line break included; what has no JSON form as its text.

    ASCII, so that a line ends at a line break alone and half a surrogate pair of a reply can be written.
    """
    return json_text(value, default=str) + "\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside `path` and rename it, so that a killed run leaves no half file.

    Text is written as UTF-8; half a surrogate pair, which a model's reply can hold and UTF-8 cannot, as `\\ud800`.
    An OSError names `path`.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_to(path) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def follow_umask(path: Path) -> None:
    """Make a file as readable as any that the user makes."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def renamed_to(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and goes where the block fails."""
    with _temporary(path, _new_file) as temporary:
        yield temporary
        follow_umask(temporary)  # mkstemp makes it private
        temporary.replace(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, for what is to become it; it goes with the block, or by the next run if this is killed.

    Raises OSError where it cannot be made.
    """
    with _temporary(path, tempfile.mkdtemp) as temporary:
        yield temporary


def remove_left_overs(folder: Path, name: str = "*") -> None:
    """Remove what killed runs left under temporary names, of files called `name` alone if given.

    A living run holds a lock on its own, and so keeps it; where files cannot be locked nothing is removed.
    """
    import fcntl

    for left_over in folder.glob(f".{name}.{'?' * 8}{TEMPORARY}"):
        is_folder = left_over.is_dir()
        with contextlib.suppress(OSError):  # of a living run or another user, or gone meanwhile
            # On network file systems what is not open for writing cannot be locked against all others.
            handle = os.open(left_over, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left_over) if is_folder else left_over.unlink()
            finally:
                os.close(handle)


def _new_file(**where: Any) -> str:
    handle, name = tempfile.mkstemp(**where)
    os.close(handle)
    return name


@contextmanager
def _temporary(path: Path, make: Callable[..., str]) -> Iterator[Path]:
    """A temporary file or folder beside `path`, by `make` (as tempfile.mkdtemp); locked in the block, then removed."""
    import fcntl

    remove_left_overs(path.parent, glob.escape(path.name))
    while True:
        temporary = Path(make(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY))
        try:
            handle = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another run found it before it was locked
            continue
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        if temporary.exists():
            break
        os.close(handle)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        os.close(handle)
