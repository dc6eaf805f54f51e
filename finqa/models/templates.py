"""Chat templates: that of a model without one is given, or is found beside the student that was trained with it."""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from finqa.models.settings import settings_for
from finqa.runtime.errors import UserError

TEMPLATE_DATE = date(2024, 7, 26)
"""What a chat template is told when it asks for today's date: the token ids of a row are the same on every day."""
_PROBE = "what was asked"


def read_template(file: Path) -> str:
    """The text of a template; UserError where the file is none."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def tokenizer_in(folder: str | Path) -> Any:
    """The tokenizer in a folder, of the class that transformers chooses."""
    # For a Mistral model transformers imports mistral_common, and that jsonschema, which compiles 38 grammars of
    # addresses where the package is there (1.6 s of every start) and does without them where it is not.
    sys.modules.setdefault("rfc3987_syntax", None)  # pyright: ignore[reportArgumentType]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def put_template(tokenizer: Any, model: str, given: str | None, student: Path | None) -> None:
    """Give the tokenizer of a model its chat template: its own, else `given`, else what `student` was trained with.

    Raises UserError where there is none, where a model with a template is given another, where `given` is not what
    `student` was trained with, and where the template does not write what it is given.
    """
    preset = settings_for(model).chat_template
    if tokenizer.chat_template is not None:
        if given not in (None, preset, tokenizer.chat_template):
            raise UserError(f"the tokenizer of {model} has a chat template of its own; leave out --chat-template")
        return
    saved = student is not None and (student / "tokenizer_config.json").exists()
    trained = tokenizer_in(student).chat_template if student and saved else None
    if given is not None and trained not in (None, given):
        raise UserError(
            f"{student} was trained with another chat template; leave out --chat-template, or give that one"
        )
    tokenizer.chat_template = next((each for each in (given, trained, preset) if each is not None), None)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {model} has no chat template; use an instruct model, or give its template with "
            "--chat-template FILE (a Jinja file, as chat_template.jinja of a model's repository)"
        )
    if tokenizer.chat_template != preset:
        _check(tokenizer, model)


def template_facts(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the chat template, and `template_date` where it asks for the day's date: for run.json."""
    text = json.dumps(tokenizer.chat_template)
    asks = {"template_date": TEMPLATE_DATE.isoformat()} if "strftime_now" in text else {}
    return {"chat_template_sha256": hashlib.sha256(text.encode()).hexdigest(), **asks}


def _check(tokenizer: Any, model: str) -> None:
    from jinja2 import TemplateError

    try:
        chat = [{"role": "user", "content": _PROBE}]
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, strftime_now=TEMPLATE_DATE.strftime
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template for {model} does not work: {error}") from None
    if _PROBE not in text:
        raise UserError(f"the chat template for {model} leaves out what the user says; see --chat-template")
