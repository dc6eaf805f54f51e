"""Hashes of model weights, so that results of one model are never taken for another's."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash


def weights_hash(folder: Path | str) -> str:
    """sha256 over the safetensors files of a folder: the same for a plain copy and for the Hub's cache."""
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    for file in files:
        # The Hub's cache names a large file by the sha256 of its content, which saves reading it.
        blob = file.resolve().name
        content = blob if re.fullmatch("[0-9a-f]{64}", blob) else file_hash(file)
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def check_base(student: Path, base_hash: str) -> None:
    """UserError where `student` was trained on other base weights than those with this hash."""
    manifest = student / "run.json"
    recorded = json.loads(manifest.read_text()).get("base_hash") if manifest.exists() else None
    if recorded is not None and recorded != base_hash:
        raise UserError(
            f"{student} was trained on other base weights than those at hand (the hashes differ); "
            "give the base model that it was trained on, or train again under another --run-name"
        )
