"""Replies on disk as they finish, so that a killed evaluation goes on where it was.

While replies are written they are appended to `replies-<key>.jsonl` in the results folder, a line each; the key is a
hash of everything that shapes a reply beside its prompt. When all are there predictions.jsonl and run.json take over
(run.json has the key) and the journal goes. So replies under different settings never meet, and the results of an
earlier run stay whole until new ones are complete.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finqa.evaluation.generation import Reply
from finqa.evaluation.predictions import read_predictions
from finqa.runtime.errors import UserError
from finqa.runtime.journal import Journal

Slot = tuple[str, int]
"""sha256 of a prompt's token ids, and which of the replies to it."""


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short hash of settings; equal for equal settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class ReplyJournal(Journal):
    """The replies of one evaluation: those of earlier runs under the same settings, and those that are added.

    Args:
        folder: Results folder of the evaluation.
        settings: Everything that shapes a reply beside its prompt; JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.key = settings_key(settings)
        super().__init__(folder / f"replies-{self.key}.jsonl")
        self.replies: dict[Slot, Reply] = {}
        self.served: dict[str, Any] = {}
        """What run.json will say of the engine."""
        self.seconds = 0.0
        """Spent on the replies, by all runs so far."""
        self.found = self._read_results(folder)
        self.read()

    def begin(self, served: Mapping[str, Any]) -> None:
        """Open the journal for `add`; `served` says which engine replies."""
        self.open()
        self._started, self._before = time.monotonic(), self.seconds
        self.append({"served": dict(served)})

    def add(self, slot: Slot, reply: Reply) -> None:
        """Append a reply; it is on its way to the disk when this returns."""
        self.seconds = self._before + time.monotonic() - self._started
        self.append(self._record(slot, reply))

    def end(self) -> None:
        """Close the journal."""
        self.seconds = self._before + time.monotonic() - self._started
        self.close()

    def take(self, record: dict[str, Any]) -> None:
        if "served" in record:
            self.served = record["served"]
            return
        fields = dict(record)
        slot, self.seconds = (fields.pop("prompt"), fields.pop("number")), fields.pop("seconds")
        self.replies[slot] = Reply(**fields)

    def secure(self) -> None:
        """Write every reply to the journal, so that the results can be replaced."""
        self.rewrite([{"served": self.served}, *(self._record(slot, reply) for slot, reply in self.replies.items())])

    def hand_over(self, slots: Sequence[Slot]) -> None:
        """Drop the replies that the results hold now; others (of rows that --limit left out) stay in the journal."""
        for slot in slots:
            self.replies.pop(slot, None)
        if self.replies:
            self.secure()
        else:
            self.path.unlink(missing_ok=True)

    def _record(self, slot: Slot, reply: Reply) -> dict[str, Any]:
        return {"prompt": slot[0], "number": slot[1], **asdict(reply), "seconds": round(self.seconds, 2)}

    def _read_results(self, folder: Path) -> dict[str, Any]:
        """What run.json says, where it is of these settings; its predictions become replies."""
        if not (folder / "run.json").exists():
            return {}
        try:
            manifest = json.loads((folder / "run.json").read_text())
            if manifest.get("generation_key") != self.key:
                return {}
            rows = read_predictions(folder)
        except (ValueError, UserError):
            return {}  # damaged: the replies are written again
        self.served, self.seconds = manifest["served"], manifest["seconds"]["generate"]
        written = [(row.n_prompt_tokens, sample) for row in rows for sample in row.samples or (row,)]
        slots = slots_of([row.prompt_hash for row in rows], len(written) // max(1, len(rows)))
        for slot, (n_prompt_tokens, sample) in zip(slots, written, strict=True):
            self.replies[slot] = Reply(sample.reply, n_prompt_tokens, sample.n_new_tokens, sample.finish_reason)
        return manifest


def slots_of(hashes: Iterable[str], samples: int) -> list[Slot]:
    """The slots of all replies, from the prompts' hashes. Replies to a prompt that stands twice are counted on."""
    counts: Counter[str] = Counter()
    slots = []
    for hashed in hashes:
        slots += [(hashed, counts[hashed] + sample) for sample in range(samples)]
        counts[hashed] += samples
    return slots
