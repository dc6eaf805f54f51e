"""Journals: files of JSON objects, one a line, that only grow, so that a run that was killed goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Self

from finqa.runtime.errors import UserError
from finqa.runtime.paths import json_line, remove_left_overs, write_atomically


class Journal:
    """The records of one file, in its order.

        with Journal(path) as journal:
            journal.append({"step": 1})

    A process killed while writing leaves a torn last line: opening the journal cuts it off, or completes it where only
    the line break is missing. A damaged line elsewhere costs its own record alone. One process at a time: opening a
    journal that another run writes to raises UserError. May be used from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged_lines = 0
        self.records: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        self._writing = threading.Lock()

    def take(self, record: dict[str, Any]) -> None:
        """Keep a record that was read or written. Raises ValueError, TypeError or KeyError where it is damaged."""
        self.records.append(record)

    def read(self) -> Self:
        """Take in what is there, without making, locking or changing the file; a missing one is empty."""
        self._load(self.path.read_bytes() if self.path.exists() else b"")
        return self

    def open(self) -> None:
        """Lock the file, take in what is there and mend the last line."""
        file = self._open_file()
        try:
            file.seek(0)
            size, lacks_break = self._load(file.readall())
            file.truncate(size)
            if lacks_break:
                file.write(b"\n")
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether records can be appended."""
        return self._file is not None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Write a record and take it; with `sync` it is on the disk when this returns, else on its way there.

        Raises UserError where it cannot be written; nothing is torn then.
        """
        assert self._file is not None, "the journal is not open"
        data = json_line(record).encode()
        with self._writing:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(data) != len(data):
                    raise OSError("the disk is full")
                if sync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                os.ftruncate(self._file.fileno(), size)
                raise UserError(
                    f"{self.path} cannot be written ({error.strerror or error}); make room and start the same "
                    "command again: what is in it is kept"
                ) from error
        self.take(record)

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Put these in the place of all that is in the file, at once; what was taken before stays taken."""
        write_atomically(self.path, "".join(map(json_line, records)))
        if self._file is not None:
            self.close()
            self._open_file()

    def _open_file(self) -> FileIO:
        import fcntl  # Not on Windows, and only this method needs it.

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"another run is writing to {self.path}; wait for it, or end it first") from None
        return self._file

    def _load(self, content: bytes) -> tuple[int, bool]:
        """Take in all lines; returns how many bytes are worth keeping, and whether the last line lacks its break."""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            if not self._read_line(line):
                self.damaged_lines += 1
        complete = whole < len(content) and self._read_line(content[whole:])
        return len(content) if complete else whole, complete

    def _read_line(self, line: bytes) -> bool:
        """Take in one line; False where it is damaged."""
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                return False
            self.take(record)
        except (ValueError, TypeError, KeyError):
            return False
        return True


@contextmanager
def only_run_on(*outputs: Path) -> Iterator[None]:
    """Holds output folders or files for this process: UserError where another run holds one; a killed one holds none.

    A lock is a file beside its folder, so that the folder may be replaced, and goes with the block. Temporary files
    that a killed run left in the folder are removed. On a file system without locks nothing is held.
    """
    with ExitStack() as held:
        for output in outputs:
            held.enter_context(_only_run_on(output))
        yield


@contextmanager
def _only_run_on(folder: Path) -> Iterator[None]:
    import fcntl

    path = folder.with_name(f".{folder.name[:200]}.lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {folder}; wait for it, or end it first") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                    raise
            # The run before may have removed the file between opening and locking it.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            remove_left_overs(folder)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


class KeyedJournal(Journal):
    """Finished results, each by a key of all that shapes it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.found: dict[str, dict[str, Any]] = {}

    def take(self, record: dict[str, Any]) -> None:
        self.found[record["key"]] = record

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.append({"key": key, **record})
