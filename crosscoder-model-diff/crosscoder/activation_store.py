"""Activation sets on disk: the activations of two models over the same tokens.

A set is a folder with

    shard-00000.safetensors ...   `activations` [tokens, 2, d_model] bf16, as the models gave them (unscaled)
    tokens.safetensors            `document`, `position`, `token_id` [tokens] int32, `kept` [tokens] bool
    documents.jsonl               one document a line: id, number of ids, how many of them are the prompt
    config.json                   what was recorded, the shards, the activation scales

in one order of tokens throughout. Index 0 is the instruct model, index 1 the fine-tuned one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.checkpoint import save_tensors
from crosscoder.config import N_MODELS
from finqa.errors import UserError
from finqa.paths import write_atomically

OUTLIER_FACTOR = 10.0
"""In the residual stream a token above this many median norms is dropped (attention sinks)."""


@dataclass(frozen=True)
class StoredDocument:
    """One document of a set: a prompt and its program."""

    id: str
    n_ids: int
    """Token ids the models read, BOS included."""
    n_prompt: int
    """How many of them are the prompt; a token at a position from here on is completion."""


@dataclass(frozen=True)
class SetConfig:
    """config.json of a set."""

    d_model: int
    n_tokens: int
    """Tokens in the shards."""
    n_dropped: int
    """Of those, outliers that reading leaves out."""
    activation_scales: tuple[float, float]
    """c_m = sqrt(d_model) / mean norm of model m's kept activations."""
    shard_tokens: tuple[int, ...]
    """Tokens of each shard."""
    recorded: dict[str, Any]
    """What was recorded: models, layer, site, data; and `fingerprint`, which changes with any of it."""


class Split(NamedTuple):
    """Token indices of a set, divided by document."""

    train: Tensor
    held_out: Tensor


class ActivationWriter:
    """Writes a set shard by shard, beside its final place until `finish` renames it there."""

    def __init__(self, folder: Path, d_model: int, shard_tokens: int = 65_536, drop_outliers: bool = False):
        self.folder = folder
        self.d_model = d_model
        self.drop_outliers = drop_outliers
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._shard_tokens = shard_tokens
        self._waiting: list[Tensor] = []
        self._shards: list[int] = []
        self._norms: list[Tensor] = []
        self._table: dict[str, list[Tensor]] = {"document": [], "position": [], "token_id": []}
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)

    def add(self, activations: Tensor, document: Tensor, position: Tensor, token_id: Tensor) -> None:
        """Append tokens: `activations` [n, 2, d_model] and, for each, its document, position and token id [n]."""
        stored = activations.to(torch.bfloat16).cpu()
        self._waiting.append(stored)
        self._norms.append(stored.double().norm(dim=-1))
        for name, column in (("document", document), ("position", position), ("token_id", token_id)):
            self._table[name].append(column.to(torch.int32).cpu())
        if sum(map(len, self._waiting)) >= self._shard_tokens:
            self._write_shard()

    def finish(self, documents: Sequence[StoredDocument], recorded: dict[str, Any]) -> SetConfig:
        """Write the tables and the configuration, and move the set to its place."""
        self._write_shard()
        norms = torch.cat(self._norms)
        kept = torch.ones(len(norms), dtype=torch.bool)
        if self.drop_outliers:
            kept = (norms <= OUTLIER_FACTOR * norms.median(dim=0).values).all(dim=-1)
        means = norms[kept].mean(dim=0)
        if not torch.isfinite(means).all() or not means.all():
            raise UserError(f"the activations have mean norms {means.tolist()}; no scale can be taken from them")
        config = SetConfig(
            d_model=self.d_model,
            n_tokens=len(norms),
            n_dropped=int((~kept).sum()),
            activation_scales=tuple((self.d_model**0.5 / means).tolist()),
            shard_tokens=tuple(self._shards),
            recorded=recorded,
        )
        table = {name: torch.cat(columns) for name, columns in self._table.items()}
        save_tensors(self._partial / "tokens.safetensors", {**table, "kept": kept})
        lines = "".join(json.dumps(asdict(document)) + "\n" for document in documents)
        write_atomically(self._partial / "documents.jsonl", lines)
        write_atomically(self._partial / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._partial.rename(self.folder)
        return config

    def _write_shard(self) -> None:
        if not self._waiting:
            return
        shard = torch.cat(self._waiting)
        save_tensors(self._partial / shard_name(len(self._shards)), {"activations": shard})
        self._shards.append(len(shard))
        self._waiting = []


class ActivationStore:
    """Reads a set: its tokens by index, in memory when they fit, else from memory-mapped shards.

    A token's index runs over the *kept* tokens, in the order of the shards.
    """

    def __init__(self, folder: Path, memory_limit_bytes: int | None = None):
        """`memory_limit_bytes`: what may be held; None is half of this machine's memory."""
        from safetensors.torch import load_file

        self.folder = folder
        self.config = read_set_config(folder)
        table = load_file(folder / "tokens.safetensors")
        self._rows = table["kept"].nonzero().squeeze(-1)
        self.document = table["document"][self._rows].long()
        """[tokens]: index into `documents`."""
        self.position = table["position"][self._rows].long()
        """[tokens]: position among the document's ids, counted from 0 at BOS."""
        self.token_id = table["token_id"][self._rows].long()
        lines = (folder / "documents.jsonl").read_text().splitlines()
        self.documents = [StoredDocument(**json.loads(line)) for line in lines]
        self._shards = [_map_shard(folder / shard_name(i)) for i in range(len(self.config.shard_tokens))]
        self._ends = torch.tensor(self.config.shard_tokens).cumsum(0)
        limit = _half_of_memory() if memory_limit_bytes is None else memory_limit_bytes
        size = 2 * N_MODELS * self.config.d_model * self.config.n_tokens
        self._in_memory = torch.cat(self._shards) if size <= limit else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        return self._in_memory is not None

    def read(self, indices: Tensor) -> Tensor:
        """[n] token indices -> [n, 2, d_model] bf16, unscaled."""
        rows = self._rows[indices]
        if self._in_memory is not None:
            return self._in_memory[rows]
        out = torch.empty(len(rows), N_MODELS, self.config.d_model, dtype=torch.bfloat16)
        shard_of = torch.searchsorted(self._ends, rows, right=True)
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            start = int(self._ends[shard]) - self.config.shard_tokens[shard]
            out[here] = self._shards[shard][rows[here] - start]
        return out

    def is_completion(self) -> Tensor:
        """[tokens] bool: whether a token belongs to the program, not to the prompt."""
        return self.position >= torch.tensor([d.n_prompt for d in self.documents])[self.document]

    def split(self, held_out_fraction: float, seed: int) -> Split:
        """Divide the tokens by document: a seeded share of the documents, at least one, is held out."""
        n = len(self.documents)
        if n < 2:
            raise UserError(f"{self.folder} has {n} document; holding one out needs at least 2: --num-samples")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        out = torch.zeros(n, dtype=torch.bool)
        out[order[: min(n - 1, max(1, round(held_out_fraction * n)))]] = True
        is_out = out[self.document]
        return Split((~is_out).nonzero().squeeze(-1), is_out.nonzero().squeeze(-1))

    def batches(self, indices: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of token indices and their activations [n, 2, d_model], in the order of `indices`."""
        for chunk in indices.split(batch_size):
            yield chunk, self.read(chunk)


class ShuffledOrder:
    """Batches of token indices in a seeded random order, a new one each pass.

    The passes form one stream that is cut into full batches. A batch follows from its step alone, so a resumed run
    reads what the interrupted one would have read.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int):
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self._pass = -1
        self._order = indices

    def batch(self, step: int) -> Tensor:
        """[batch_size] token indices of a step, counted from 0."""
        parts, start, missing = [], step * self.batch_size, self.batch_size
        while missing:
            number, offset = divmod(start, len(self.indices))
            part = self._pass_order(number)[offset : offset + missing]
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        return torch.cat(parts)

    def _pass_order(self, number: int) -> Tensor:
        if number != self._pass:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            self._order = self.indices[torch.randperm(len(self.indices), generator=generator)]
            self._pass = number
        return self._order


def read_set_config(folder: Path) -> SetConfig:
    """config.json of an activation set; UserError where there is none or it is of another kind."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return SetConfig(**arguments)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no activation set; make it with collect_activations.py") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is not an activation set's configuration ({error}); collect it again") from None


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _map_shard(path: Path) -> Tensor:
    """The shard's activations, memory-mapped: pages are read when they are touched."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("activations")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); collect the activations again") from None


def _half_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
