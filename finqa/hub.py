"""The Hugging Face Hub: who is logged in, fetching a folder, pushing one. A token is never printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finqa.errors import UserError


def logged_in_name() -> str | None:
    """Name of the user whose token this machine holds; None without a token or a connection."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if huggingface_hub.get_token() is None:
        return None
    try:
        return huggingface_hub.whoami()["name"]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch_folder(repo_id: str, revision: str | None = None, patterns: list[str] | None = None) -> Path | None:
    """Local copy of a Hub repository (cached), or None where no such repository can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _explained(repo_id):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise _refused(repo_id) from error
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None
    except RevisionNotFoundError as error:
        raise UserError(f"{repo_id} on the Hub has no revision {revision}; look at its branches and tags") from error


def why_no_push(repo_id: str | None) -> str | None:
    """What is missing for a push, with its remedy; None where nothing is."""
    import huggingface_hub

    if repo_id is None:
        return "no Hub name is known (give HF_NAME as third argument or in the environment)"
    if huggingface_hub.get_token() is None:
        return "no Hub token is here (log in with: hf auth login)"
    if is_offline():
        return "the Hub is switched off by HF_HUB_OFFLINE"
    return None


def push_folder(
    folder: Path,
    repo_id: str | None,
    push: bool | None,
    private: bool = False,
    ignore: tuple[str, ...] = ("checkpoint-*/*", "*.tmp", "wandb/*"),
) -> str | None:
    """Upload `folder` as the model repository `repo_id`; the address, or None where nothing was pushed.

    `push`: True is mandatory (a UserError when it cannot be done), False never pushes, None pushes when a
    token and a name are there and otherwise says in one line why not.
    """
    if push is False:
        return None
    missing = why_no_push(repo_id)
    if missing or repo_id is None:
        if push:
            raise UserError(f"cannot push {folder}: {missing}")
        print(f"not pushed to the Hub: {missing}", flush=True)
        return None

    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    api = huggingface_hub.HfApi()
    try:
        with _explained(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                ignore_patterns=list(ignore),
                commit_message=f"Upload {folder.name}",
            )
    except RepositoryNotFoundError as error:
        raise _refused(repo_id) from error
    address = f"{api.endpoint}/{repo_id}"
    print(f"pushed {folder} to {address}", flush=True)
    return address


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn a refusal or a broken connection into one line with its remedy.

    What says "there is no such repository or revision" goes through: the caller knows where else to look.
    """
    # The client's HTTP library changes its name between releases; its base error is found here in each.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise _refused(repo_id) from error
        raise UserError(f"the Hub answered {status} for {repo_id}; try again later") from error
    except HTTPError as error:
        raise UserError(
            f"the connection to the Hub broke while working on {repo_id} ({type(error).__name__}); run again"
        ) from error


def _refused(repo_id: str) -> UserError:
    return UserError(
        f"the Hub refuses access to {repo_id}: accept the model's terms on its page, and log in with a token "
        "that may read it (and write it, for a push): hf auth login"
    )
