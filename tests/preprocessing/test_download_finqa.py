from __future__ import annotations

import gzip
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fixture import Command, the_one_line
from file_server import FileServer, blob_id, running_file_server

from finqa.runtime.errors import UserError
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import REPOSITORY
from preprocessing import download_finqa
from preprocessing.download_finqa import download_file, git_blob_id

CONTENT = b'[{"id": "made up"}]\n' * 200_000
"""4 MB: several chunks."""
BLOB_ID = blob_id(CONTENT)


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    with running_file_server(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_finqa, "FIRST_WAIT_S", 0.01)


def test_the_blob_id_is_the_one_git_gives(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    by_git = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True).stdout.strip()
    assert git_blob_id(file) == by_git == BLOB_ID


def test_a_verified_file_gets_its_name_and_nothing_else_is_left(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "FinQA" / "train.json"
    download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_and_verifies_is_not_asked_for(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(CONTENT)
    assert "already there" in download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert file_server.ranges == []


def test_a_wrong_file_is_not_left_in_place(file_server: FileServer, tmp_path: Path) -> None:
    file_server.content = CONTENT.replace(b"made", b"MADE", 1)
    with pytest.raises(UserError, match="not the official file"):
        download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_set_aside(file_server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"[my own rows]")
    download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "train.json.unverified").read_bytes() == b"[my own rows]"


def test_a_broken_connection_goes_on_where_it_broke(file_server: FileServer, tmp_path: Path) -> None:
    file_server.break_off_after = [1_000_000, 500_000]
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT
    assert file_server.ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_killed_download_is_resumed(file_server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "train.json.part").write_bytes(CONTENT[:123_456])
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT
    assert file_server.ranges == ["bytes=123456-"]


@pytest.mark.parametrize("left", [b"of another file", CONTENT, CONTENT + b"longer"], ids=["other", "whole", "longer"])
def test_whatever_part_is_left_the_result_is_the_file(file_server: FileServer, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "train.json.part").write_bytes(left)
    download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert (tmp_path / "train.json").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (500, 5), (429, 5)])
def test_an_http_error_is_one_line_and_only_a_passing_one_is_tried_again(
    file_server: FileServer, tmp_path: Path, status: int, requests: int
) -> None:
    file_server.status = status
    with pytest.raises(UserError, match=rf"HTTP {status}.*--url-base"):
        download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert len(file_server.ranges) == requests
    assert not (tmp_path / "train.json").exists()


def test_the_command_refuses_a_mirror_with_other_files(
    command: Command, file_server: FileServer, tmp_path: Path
) -> None:
    line = the_one_line(command("download_finqa", "--split", "dev", "--url-base", file_server.url))
    assert "not the official file" in line
    assert list((tmp_path / "FinQA").iterdir()) == []


def test_an_address_that_is_none_is_one_line(command: Command) -> None:
    assert "not an address" in the_one_line(command("download_finqa", "--url-base", "not an address"))


# --- Servers that misbehave: either the right file has its name in the end, or none has ------------------------------


def outcome(file_server: FileServer, tmp_path: Path) -> bool:
    """Whether the download succeeds; whatever happens, no other content has the file's name and nothing is left."""
    path = tmp_path / "train.json"
    try:
        download_file(f"{file_server.url}/train.json", path, BLOB_ID)
    except UserError:
        assert not path.exists()
        return False
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]
    return True


def test_a_server_that_ignores_ranges_sends_all_of_it_again(file_server: FileServer, tmp_path: Path) -> None:
    file_server.ignores_ranges = True
    file_server.break_off_after = [1_000_000]
    assert outcome(file_server, tmp_path)
    assert file_server.ranges == [None, "bytes=1000000-"]


@pytest.mark.parametrize("off_by", [-700, 500])
def test_a_server_that_sends_another_range_does_not_mix_up_the_file(
    file_server: FileServer, tmp_path: Path, off_by: int
) -> None:
    file_server.range_off_by = off_by
    (tmp_path / "train.json.part").write_bytes(CONTENT[:1_000_000])
    assert outcome(file_server, tmp_path)


@pytest.mark.parametrize("off_by", [1, 100_000])
def test_a_file_that_arrived_whole_is_taken_though_more_was_announced(
    file_server: FileServer, tmp_path: Path, off_by: int
) -> None:
    file_server.length_off_by = off_by
    assert outcome(file_server, tmp_path)


def test_a_file_longer_than_announced_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    file_server.length_off_by = -100
    assert not outcome(file_server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_much_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    file_server.content = CONTENT + b"\n"
    assert not outcome(file_server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_stops_is_cut_off(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_finqa, "MAX_BYTES", 6 << 20)
    file_server.endless = True
    assert not outcome(file_server, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 0


@pytest.mark.parametrize("break_off_after", [[], [1_000_000, 0, 2_000_000]])
def test_chunked_transfer_may_break_off(file_server: FileServer, tmp_path: Path, break_off_after: list[int]) -> None:
    file_server.chunked = True
    file_server.break_off_after = break_off_after
    assert outcome(file_server, tmp_path)


@pytest.mark.parametrize("keep", [None, -200], ids=["whole", "truncated"])
def test_a_compressed_body_that_was_not_asked_for_is_refused(
    file_server: FileServer, tmp_path: Path, keep: int | None
) -> None:
    file_server.encoding = "gzip"
    file_server.content = gzip.compress(CONTENT)[:keep]
    assert not outcome(file_server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_connections_that_always_break_off_are_an_error_that_keeps_what_came(
    file_server: FileServer, tmp_path: Path
) -> None:
    file_server.break_off_after = [300_000] * download_finqa.ATTEMPTS
    assert not outcome(file_server, tmp_path)
    assert (tmp_path / "train.json.part").read_bytes() == CONTENT[: 300_000 * download_finqa.ATTEMPTS]
    assert outcome(file_server, tmp_path)


def test_kill_9_midway_leaves_no_file_and_what_came_is_used(
    command: Command, file_server: FileServer, tmp_path: Path
) -> None:
    file_server.seconds_a_chunk = 0.1
    process = command.start("download_finqa", "--split", "train", "--url-base", file_server.url)
    part = tmp_path / "FinQA" / "train.json.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 1 << 20) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [file.name for file in part.parent.iterdir() if file.suffix != ".lock"] == ["train.json.part"]

    held = part.stat().st_size
    file_server.seconds_a_chunk = 0
    file_server.ranges.clear()
    assert outcome(file_server, part.parent)
    assert held >= 1 << 20 and file_server.ranges == [f"bytes={held}-"]


def test_a_second_download_of_the_same_file_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    with only_run_on(tmp_path / "train.json.part"), pytest.raises(UserError, match="another run is writing"):
        download_file(f"{file_server.url}/train.json", tmp_path / "train.json", BLOB_ID)
    assert file_server.ranges == []


def test_no_room_is_one_line_at_once_and_keeps_what_came(
    command: Command, file_server: FileServer, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk."""
    limit = 1 << 20
    done = subprocess.run(
        command.line("download_finqa", "--split", "train", "--url-base", file_server.url),
        cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    line = the_one_line(done)
    assert "train.json.part" in line and "make room" in line
    assert file_server.ranges == [None]
    assert (tmp_path / "FinQA/train.json.part").read_bytes() == CONTENT[:limit]
