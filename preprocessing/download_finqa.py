"""Fetch the official FinQA files, and keep only what is exactly theirs.

    python -m preprocessing.download_finqa [--split train|dev|test|all] [--data-dir D] [--url-base URL]

Writes D/FinQA/{train,dev,test}.json: the files of the FinQA repository at one commit, 8,281 questions. A file that is
already there and verifies is left alone. What arrives is streamed to `<split>.json.part` (an interrupted download goes
on from there), checked against its git blob id, and only then given its name. A file of that name which is not the
official one is set aside as `<split>.json.unverified`.

A mirror, or a copy on another machine of yours, is named with --url-base: the files are read from
URL/train.json, URL/dev.json and URL/test.json, and must still be the official ones.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from finqa.chat.config import check_address
from finqa.runtime.command_line import script_parser
from finqa.runtime.errors import NO_ROOM, UserError, report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import SPLITS, Folders, add_folder_flags, chosen_splits

COMMIT = "0f16e2867befa6840783e58be38c9efb9229d742"
URL_BASE = f"https://raw.githubusercontent.com/czyssrs/FinQA/{COMMIT}/dataset"
BLOB_IDS = {
    "train": "a6c2c5a60f9abe3fba5a793cc4d9e1dee2e09209",
    "dev": "970f239f591c782b17df420c0d343b780737f3da",
    "test": "59958c7c3bb3b21f4dff6bc912a0fe0ae710aee0",
}
ATTEMPTS = 5
FIRST_WAIT_S = 1.0
"""Before the second attempt; twice that before the third, and so on."""
CHUNK_BYTES = 1 << 20
SOCKET_TIMEOUT_S = 60.0
MAX_BYTES = 1 << 29
"""Where a server that never stops is cut off; the official files are far smaller."""


def main() -> None:
    args = parse_arguments()
    check_address("--url-base", args.url_base)
    folders = Folders.from_args(args)
    for split in chosen_splits(args.split):
        url = f"{args.url_base.rstrip('/')}/{split}.json"
        print(download_file(url, folders.data / "FinQA" / f"{split}.json", BLOB_IDS[split]), flush=True)


def download_file(url: str, path: Path, blob_id: str) -> str:
    """Make `path` the file whose git blob id is `blob_id`, from `url` where it is not there yet.

    Returns one line that says what was done. Raises UserError when the server has no such file, or another one (`path`
    then does not exist), and while another process downloads to `path`.
    """
    if path.exists():
        if git_blob_id(path) == blob_id:
            return f"{path}: already there, verified"
        aside = path.with_name(f"{path.name}.unverified")
        path.replace(aside)
        print(f"{path} is not the official file: set aside as {aside.name}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")

    start = time.monotonic()
    with only_run_on(part):  # else it could change between its check and its renaming
        part.touch()
        resumed = part.stat().st_size > 0
        found = fetch(url, part, blob_id)
        if found != blob_id and resumed:  # What was there may have come from elsewhere: once more, from nothing.
            os.truncate(part, 0)
            found = fetch(url, part, blob_id)
        if found != blob_id:
            part.unlink()
            raise UserError(f"{url} is not the official file (git blob {found}, expected {blob_id}); nothing was kept")
        part.replace(path)
    megabytes = path.stat().st_size / 1e6
    return f"{path}: {megabytes:.1f} MB in {time.monotonic() - start:.1f} s, verified"


def git_blob_id(path: Path) -> str:
    """The name git gives to the file's content: sha1("blob <bytes>\\0" + content), as 40 hex digits."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def fetch(url: str, part: Path, blob_id: str) -> str:
    """Stream `url` to `part`, going on after what `part` already holds; what may pass is tried again.

    Returns the git blob id of what has arrived. A file that arrived whole is taken, whatever the server said of its
    length.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            fetch_once(url, part)
            return git_blob_id(part)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (416, 429):
                raise UserError(f"{url}: HTTP {error.code} {error.reason}; name a mirror with --url-base") from error
            reason = f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise UserError(f"cannot write {part}: {error.strerror}; make room and run again") from None
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise UserError(f"{url} is no address to download from: {error}") from error
        if git_blob_id(part) == blob_id:
            return blob_id
        if reason.startswith("HTTP 416"):  # What is there is longer than the file: it belongs to another one.
            os.truncate(part, 0)
        if attempt + 1 < ATTEMPTS:
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise UserError(
        f"{url}: {reason}, after {ATTEMPTS} attempts; run the command again to go on, or name a mirror with --url-base"
    )


def fetch_once(url: str, part: Path) -> None:
    """One request; raises OSError or HTTPException when the connection ends before the file does.

    Raises UserError for more than MAX_BYTES, which is no FinQA file.
    """
    held = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
    with urllib.request.urlopen(request, timeout=SOCKET_TIMEOUT_S) as response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        length = response.headers.get("Content-Length")
        received = 0
        with part.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                if file.tell() > MAX_BYTES:
                    os.truncate(part, 0)
                    raise UserError(f"{url} is not the official file (over {MAX_BYTES >> 20} MiB); nothing was kept")
    if length is not None and length.isdecimal() and received < int(length):
        raise http.client.IncompleteRead(b"", int(length) - received)


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all", help="(default: %(default)s)")
    parser.add_argument("--url-base", default=URL_BASE, help="folder on the web with the three files (%(default)s)")
    add_folder_flags(parser, results=False)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
