"""What inference.py asks two models of the user's own, by the name of their pair."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscoder.names import ActivationChoice
from crosscoder.own_pair import base_tokenizer, check_there, find_model, one_tokenizer
from crosscoder.repositories import find_activations
from crosscoder.steered_pair import Steering, open_steered_pair
from finqa.evaluation.engines.serving import MODELS, Model
from finqa.evaluation.generation import Generate, GenerationConfig
from finqa.models.students import prompt_ids, resolve_model
from finqa.models.templates import template_facts
from finqa.runtime.errors import UserError, nearest
from finqa.runtime.paths import Folders

MAX_NEW_TOKENS = 100
"""Tokens of a reply at most, where nothing else is asked for."""
TEXT_PROMPT = 64
"""Tokens of a text without a completion that are its prompt, at most; and no more than half of it."""


class AskedPair:
    """Two models of the user's own with a prompt that both get."""

    def __init__(self, choice: ActivationChoice, folders: Folders, text: str | None, name: str | None):
        """`text` is read as the recorded texts were: as a chat where they were chats. Without it the prompt is that of
        the document called `name` (None: the first), as it was recorded.

        UserError where set, models or document are missing, and where the chat template is not the recorded one.
        """
        from crosscoder.activations.store import ActivationStore

        self.choice, self.folders = choice, folders
        self.store = ActivationStore(find_activations(choice, folders), "disk")
        self.tokenizer: Any = base_tokenizer(choice.student, self.store.config.recorded)
        self.ids = self._recorded(name) if text is None else self._read(text)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).strip()

    def _recorded(self, name: str | None) -> list[int]:
        from crosscoder.interventions.splicing import stored_texts

        names = [document.id for document in self.store.documents]
        if name is not None and name not in names:
            raise UserError(f"no document {name!r} in {self.store.folder}{nearest(name, names)}; there is {names[0]!r}")
        number = 0 if name is None else names.index(name)
        [document] = stored_texts(self.store, [number], self.tokenizer.bos_token_id)
        half = max(1, min(len(document.ids) // 2, TEXT_PROMPT))
        return list(document.ids[: document.n_prompt if document.n_prompt > 1 else half])

    def _read(self, text: str) -> list[int]:
        from crosscoder.activations.layout import KINDS

        kinds = self.store.recorded.kind
        if kinds is None or not bool((kinds == KINDS.index("chat")).any()):
            return list(self.tokenizer(text)["input_ids"])
        student, pair, recorded = self.choice.student, self.choice.pair, self.store.config.recorded
        assert pair is not None
        check_there(pair.fine_tuned)
        base = resolve_model(student.model, student.revision)
        reads = one_tokenizer(student, base, find_model(pair.fine_tuned), chats=True)[0]
        if template_facts(reads)["chat_template_sha256"] != recorded["chat_template_sha256"]:
            raise UserError(
                f"the texts of {pair.name} were read by another chat template; {self._remedy(recorded)}, or ask for "
                "one of its documents by --id"
            )
        return prompt_ids(reads, [{"role": "user", "content": text}])

    def _remedy(self, recorded: dict[str, Any]) -> str:
        given = recorded["pair"]["student"]["chat_template"]
        below = self.folders.data / "models"
        return f"put {Path(given).name} into {below}" if given else "put back the models' own"

    def served(
        self, args: argparse.Namespace, steering: Steering | None, max_new_tokens: int | None
    ) -> Iterator[tuple[Model, Generate, bool]]:
        """Each model as it is, and with a `steering` steered (True), each valid until the next; says what is added."""
        from crosscoder.extra_analyses import load_pair
        from finqa.evaluation.engines.hugging_face_engine import hugging_face

        config = GenerationConfig(False, max_new_tokens or MAX_NEW_TOKENS, batch_size=1, stop=())
        if steering:
            models = open_steered_pair(args, steering)
            print("\n".join(models.says()), flush=True)
            yield from models.served(self.tokenizer, config)
            return
        for model, side in zip(MODELS, load_pair(self.store, self.choice, self.folders), strict=True):
            with side.active():
                yield model, hugging_face(side.model, self.tokenizer, config), False
