"""The Hugging Face Hub: who is logged in, fetching a folder, pushing one. A token is never printed."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from finqa.models.settings import SETTINGS
from finqa.runtime.errors import UserError, nearest

LEFT_OUT = ("checkpoint-*/*", "*.tmp", "*.tmp/*", "wandb/*", ".*")
"""Files that a push does not upload: checkpoints, logs, and what a killed run left half-written."""
NOT_FETCHED = ("consolidated*", "original/*")
"""Files that are not downloaded: a second copy of the weights, in the format of the model's maker."""
NAME_LENGTH = 96
"""Longest repository name that the Hub takes."""
Purpose = Literal["read", "write"]
RepositoryKind = Literal["model", "dataset"]
ACTIVATION_KINDS: tuple[RepositoryKind, ...] = ("dataset", "model")
"""Kinds of repository that activations are looked for in: the first ones were pushed as models."""
Result = TypeVar("Result")


def logged_in_name() -> str | None:
    """Name of the user whose token this machine holds; None without a token or a connection."""
    account = _account()
    return account["name"] if isinstance(account, dict) else None


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch_model(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a base model on the Hub that match; UserError, with the name most like it, where it is not there."""
    folder = Path(name).expanduser()
    beside = [str(path) for path in folder.parent.glob("*/") if folder.parent != Path()]
    like = nearest(name, [*SETTINGS, *beside])
    try:
        fetched = fetch_folder(name, revision, patterns)
    except UserError as error:
        raise UserError(f"{name} is no local folder{like}, and {error}") from error
    if fetched is None:
        at = f" at revision {revision}" if revision else ""
        offline = "HF_HUB_OFFLINE is set" if is_offline() else "a private one needs: hf auth login"
        raise UserError(f"the model {name} is neither a local folder nor on the Hub{at} ({offline}){like}")
    return fetched


def fetch_folder(
    repo_id: str, revision: str | None = None, patterns: list[str] | None = None, kind: RepositoryKind = "model"
) -> Path | None:
    """Local copy of a Hub repository (cached), or None where the Hub is switched off or has no such repository.

    Raises UserError, in one line with its remedy, where the Hub refuses, cannot be reached, or has no such revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _quiet()
    chosen: Any = {"allow_patterns": patterns, "ignore_patterns": list(NOT_FETCHED)}
    try:
        with _explained(repo_id, "read"):
            return Path(_once_more(lambda: snapshot_download(repo_id, revision=revision, repo_type=kind, **chosen)))
    except GatedRepoError as error:
        raise _refused(repo_id, "read") from error
    except LocalEntryNotFoundError as error:
        # The client raises this where a file is not in the cache and the Hub did not answer as it should.
        if is_offline():
            return None
        raise _explanation(repo_id, "read", error) from error
    except (RepositoryNotFoundError, HFValidationError):
        return None
    except RevisionNotFoundError as error:
        raise UserError(f"{repo_id} on the Hub has no revision {revision}; look at its branches and tags") from error


def repository_name(name: str) -> str:
    """A name as the Hub takes it: cut, with a hash of the whole, where it is too long."""
    if len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9]}-{digest}"


def looked_for(repo_id: str | None) -> str:
    """Where on the Hub something was looked for in vain, for an error message."""
    import huggingface_hub

    if repo_id is None:
        return "on the Hub (no HF_NAME is known)"
    if is_offline():
        return f"on the Hub as {repo_id} (HF_HUB_OFFLINE is set)"
    hint = "" if huggingface_hub.get_token() else " (if it is private, log in with: hf auth login)"
    return f"on the Hub as {repo_id}{hint}"


def why_no_push(repo_id: str | None) -> str | None:
    """What is missing for a push, with its remedy; None where nothing is, as far as that is known beforehand."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if huggingface_hub.get_token() is None:
        return "no Hub token is here (log in with: hf auth login)"
    if is_offline():
        return "the Hub is switched off by HF_HUB_OFFLINE"
    account = _account()
    if account == "invalid":
        return "the Hub does not know this token (log in with: hf auth login)"
    if repo_id is None:
        return "no Hub name is known (give HF_NAME as third argument or in the environment)"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return f"the Hub takes no repository called {repo_id} (choose a shorter --run-name, or another HF_NAME)"
    role = account["auth"]["accessToken"]["role"] if isinstance(account, dict) and "auth" in account else None
    if role == "read":
        return "this token may only read (make one that may write at the Hub, and log in with: hf auth login)"
    return None


def push_folder(
    folder: Path,
    repo_id: str | None,
    push: bool | None,
    private: bool = False,
    kind: RepositoryKind = "model",
) -> str | None:
    """Upload `folder` as the repository `repo_id`; the address, or None where nothing was pushed.

    `push`: True is mandatory (a UserError when it cannot be done), False never pushes, None pushes when a token and a
    name are there, and otherwise says in one line why not. With `private` nothing is sent before the repository is
    private, also where it was public before.
    """
    if push is False:
        return None
    missing = why_no_push(repo_id)
    if missing is None and repo_id is not None:
        try:
            return _push(folder, repo_id, private, kind)
        except UserError as error:
            if push:
                raise
            missing = str(error)
    if push:
        raise UserError(f"cannot push {folder}: {missing}")
    print(f"not pushed to the Hub: {missing}", flush=True)
    return None


def _push(folder: Path, repo_id: str, private: bool, kind: RepositoryKind) -> str:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    _quiet()
    api = huggingface_hub.HfApi()
    try:
        with _explained(repo_id, "write"):
            api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=kind)
            if private and not api.repo_info(repo_id, repo_type=kind).private:
                api.update_repo_settings(repo_id, private=True, repo_type=kind)
            api.upload_folder(
                repo_id=repo_id,
                repo_type=kind,
                folder_path=folder,
                ignore_patterns=list(LEFT_OUT),
                commit_message=f"Upload {folder.name}",
            )
    except RepositoryNotFoundError as error:
        raise _refused(repo_id, "write") from error
    address = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    print(f"pushed {folder} to {address}", flush=True)
    return address


def _account() -> dict[str, Any] | Literal["invalid"] | None:
    """Whose token this machine holds; `invalid` where the Hub does not know it, None where it cannot be asked."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if huggingface_hub.get_token() is None:
        return None
    try:
        return huggingface_hub.whoami(cache=True)
    except HfHubHTTPError as error:
        return "invalid" if error.response.status_code == 401 else None
    except (_transport_error(), OfflineModeIsEnabled, OSError):
        return None


def _transport_error() -> type[Exception]:
    """Base of what the client's HTTP library raises; the library changes its name between releases."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError


def _once_more(call: Callable[[], Result]) -> Result:
    """`call`'s result, called again where the connection was reset: the client goes on from all other breaks."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except HfHubHTTPError:
        raise
    except _transport_error() as error:
        print(f"the connection to the Hub broke ({type(error).__name__}); going on", flush=True)
        time.sleep(1)
        return call()


def _quiet() -> None:
    """No bars with carriage returns in a log file."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


@contextmanager
def _explained(repo_id: str, purpose: Purpose) -> Iterator[None]:
    """Turn a refusal or a broken connection into one line with its remedy.

    What says "there is no such repository or revision" goes through: the caller knows where else to look.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError):
        raise
    except (RuntimeError, ValueError) as error:
        # The client wraps what went wrong with a large file, and what the Hub has against a model card.
        if not isinstance(error.__cause__, _transport_error()):
            raise
        raise _explanation(repo_id, purpose, error) from error
    except (_transport_error(), OSError) as error:
        raise _explanation(repo_id, purpose, error) from error


def _explanation(repo_id: str, purpose: Purpose, error: BaseException) -> UserError:
    """One line about a failed call, from the answer or the broken connection at its root where there is one."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error
    while not isinstance(cause, _transport_error()) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return _refused(repo_id, purpose)
        said = " ".join((cause.server_message or "").split())
        remedy = "mend what it says" if 400 <= status < 500 and status not in (408, 429) else "try again later"
        return UserError(f"the Hub answered {status} for {repo_id}{f' ({said})' if said else ''}; {remedy}")
    text = " ".join(str(cause).split())
    if isinstance(cause, ConnectionError) and ("(401" in text or "(403" in text):
        # Xet storage is no part of the client's HTTP library, and tells the status in words alone.
        return _refused(repo_id, purpose)
    if not isinstance(cause, (_transport_error(), ConnectionError)):
        return UserError(f"working on {repo_id} of the Hub failed: {text}")
    return UserError(
        f"the connection to the Hub broke while working on {repo_id} ({type(cause).__name__}); see to the network "
        "and run again: what has arrived is kept"
    )


def _refused(repo_id: str, purpose: Purpose) -> UserError:
    if purpose == "read":
        return UserError(
            f"the Hub refuses access to {repo_id}: accept the model's terms on its page, and log in with a token "
            "that may read it: hf auth login"
        )
    return UserError(
        f"the Hub refuses to let you write {repo_id}: log in with a token that may write there (hf auth login), give "
        "an HF_NAME that is yours, and accept the model's terms on its page where it has some"
    )
