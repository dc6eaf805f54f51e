"""Weights & Biases: online where a key is there, offline otherwise."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def wandb_run(project: str, entity: str | None, name: str, config: Mapping[str, Any], folder: Path) -> Iterator[Any]:
    """A wandb run with its files below `folder`; None where WANDB_MODE is `disabled`.

    WANDB_MODE decides where it is set; otherwise the run is online with a key and offline without one.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    if mode == "disabled":
        yield None
        return
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", disable_git=True)
    run = wandb.init(
        project=project,
        entity=entity,
        name=name,
        config=dict(config),
        dir=folder,
        mode=mode,  # pyright: ignore[reportArgumentType]
        settings=settings,
    )
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)  # `with run` would print a traceback, whatever becomes of the error
        raise
    run.finish()


def has_wandb_key() -> bool:
    """Whether a key is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
