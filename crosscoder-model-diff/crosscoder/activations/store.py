"""Activation sets on disk: the activations of two models over the same tokens.

A set is a folder with

    shard-00000.safetensors ...   `activations` [tokens, 2, d_model] bf16, as the models gave them (unscaled), and
                                  `norms` [tokens, 2] fp64
    tokens.safetensors            `document`, `position`, `token_id`, `kind` (layout.KINDS) [tokens] int32,
                                  `kept` [tokens] bool
    documents.jsonl               one question a line: its id, number of ids, how many of them are the prompt
    config.json                   what was recorded, the shards, the activation scales

in one order of tokens throughout: by length of document (shortest first), then index of document, then position.
Index 0 is the instruct model, index 1 the fine-tuned one. Sets of version 1 have no `kind` and no checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crosscoder.dictionaries.checkpoint import check_files, tensors_hash
from crosscoder.dictionaries.config import N_MODELS, READ_TOKENS, check_types
from crosscoder.names import SITES
from finqa.runtime.errors import UserError
from finqa.runtime.memory.free import free_memory
from finqa.runtime.progress import told

Place = Literal["auto", "gpu", "memory", "disk"]
VERSION = 2
"""2 added the kind of every token."""
READERS = 4
"""Threads that read and check a shard each: more were no faster on a machine of 32 cores."""
MOST_LAYERS = 10_000
"""More than any model has."""
SHARE_OF_FREE_MEMORY = 0.5
"""A set is held in memory, or on the GPU, where it takes at most this share of what is free there."""


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
    """Tokens in the shards that are outliers by their norm, which reading leaves out."""
    activation_scales: tuple[float, float]
    """c_m = sqrt(d_model) / mean norm of model m's kept activations."""
    shard_tokens: tuple[int, ...]
    """Tokens of each shard."""
    recorded: dict[str, Any]
    """What was recorded: models, layer, site, data; and `fingerprint`, which changes with any of it."""
    version: int = 1
    """Version of the set's form; VERSION where it is written."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the token table and the documents; empty in a set of version 1."""
    shard_hashes: tuple[str, ...] = ()
    """XXH3 of each shard's activations and norms; empty in earlier sets."""
    largest_norms: tuple[float, ...] = ()
    """Norm of each model's activation above which tokens are left out; empty where none are, and in earlier sets."""

    def __post_init__(self) -> None:
        sound = {
            "d_model": self.d_model >= 1,
            "n_tokens": self.n_tokens == sum(self.shard_tokens) and all(n >= 1 for n in self.shard_tokens),
            "n_dropped": 0 <= self.n_dropped < max(self.n_tokens, 1),
            "activation_scales": min(self.activation_scales) > 0,
            "version": 1 <= self.version <= VERSION,
            "shard_hashes": len(self.shard_hashes) in (0, len(self.shard_tokens)),
            "largest_norms": len(self.largest_norms) in (0, N_MODELS) and min(self.largest_norms, default=1) > 0,
            "recorded": self.recorded.get("site", SITES[0]) in SITES
            and self.recorded.get("layer", 1) in range(1, MOST_LAYERS + 1),
        }
        for name, holds in sound.items():
            if not holds:
                raise UserError(f"config.json of an activation set: {name} cannot be {getattr(self, name)!r}")


class RecordedTokens(NamedTuple):
    """Every token whose activation was recorded, outliers included; a document's tokens stand together."""

    document: Tensor
    """[recorded] int64: index into the set's documents."""
    position: Tensor
    """[recorded] int64: among the document's ids, counted from 0."""
    token_id: Tensor
    kind: Tensor | None
    """[recorded] int64: index into layout.KINDS; None in a set of version 1."""
    kept: Tensor
    """[recorded] bool: those that a store reads; they are its tokens, in its order."""

    def by_document(self) -> list[slice]:
        """The places of each document's tokens, in the order of the set."""
        ends = self.document.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        return [slice(start, end) for start, end in pairwise([0, *ends])]


class Split(NamedTuple):
    """Token indices of a set, divided by document."""

    train: Tensor
    held_out: Tensor


class ActivationStore:
    """A set on disk. A token index counts the kept tokens, in the order of the shards."""

    def __init__(self, folder: Path, place: Place = "auto", device: torch.device | str = "cpu"):
        """Open a set; what is read is the same wherever it lies.

        Args:
            folder: Of the set.
            place: `disk` leaves the activations on disk, where pages are read when they are touched; `memory` and
                `gpu` hold all of them. `auto` takes the GPU if `device` is one and the set fits, else memory if it
                fits, else leaves it on disk.
            device: The GPU in question.

        Raises UserError where there is no set, or no GPU for `gpu`, and where a file that is read was damaged.
        """
        self.folder = folder
        self.config = read_set_config(folder)
        check_files(folder, self.config.files, "collect the activations again with --overwrite")
        table = load_file(folder / "tokens.safetensors")
        columns = (table[name].long() if name in table else None for name in RecordedTokens._fields[:-1])
        self.recorded = RecordedTokens(*columns, kept=table["kept"])  # pyright: ignore[reportArgumentType]
        self._rows = table["kept"].nonzero().squeeze(-1)
        self.document = self.recorded.document[self._rows]
        """[tokens]: index into `documents`."""
        self.position = self.recorded.position[self._rows]
        """[tokens]: position among the document's ids, counted from 0 at BOS."""
        self.token_id = self.recorded.token_id[self._rows]
        lines = (folder / "documents.jsonl").read_text().splitlines()
        self.documents = [StoredDocument(**json.loads(line)) for line in lines]
        self._check_table()
        self._shards = [
            _map_shard(folder / shard_name(i), (n, N_MODELS, self.config.d_model))
            for i, n in enumerate(self.config.shard_tokens)
        ]
        self._unchecked = dict(enumerate(self.config.shard_hashes))
        self._starts = torch.tensor([0, *self.config.shard_tokens]).cumsum(0)
        self.place: Place = "disk"
        """Where the activations are: `gpu`, `memory` or `disk`."""
        self._held: Tensor | None = None
        self.move(place, device)

    def _check_table(self) -> None:
        """UserError where the token table and the documents are not of each other."""
        recorded, config = self.recorded, self.config
        n_ids = torch.tensor([document.n_ids for document in self.documents])
        sound = (
            all(len(column) == config.n_tokens for column in recorded if column is not None)
            and int(recorded.kept.sum()) == config.n_tokens - config.n_dropped
            and all(0 <= document.n_prompt <= document.n_ids for document in self.documents)
            and recorded.document.unique().tolist() == list(range(len(n_ids)))  # ids may be of several splits
            and bool((recorded.position >= 0).all() & (recorded.position < n_ids[recorded.document]).all())
        )
        if not sound:
            raise UserError(
                f"{self.folder}: token table and documents do not fit each other; collect it again with --overwrite"
            )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size_bytes(self) -> int:
        """Bytes that all activations take."""
        return 2 * N_MODELS * self.config.d_model * self.config.n_tokens

    def move(self, place: Place, device: torch.device | str = "cpu") -> None:
        """Hold the activations elsewhere; arguments and errors as of the class. Nothing may be reading meanwhile."""
        self._held = None
        self.place = _chosen_place(place, self.size_bytes, torch.device(device), self.folder)
        if self.place != "disk":
            self._held = self._hold(torch.device(device if self.place == "gpu" else "cpu"))

    def read(self, indices: Tensor, pinned: bool = False) -> Tensor:
        """[n] token indices -> [n, 2, d_model] bf16, unscaled, on the GPU where the store is there, else on the CPU.

        pinned: On the CPU in page-locked memory, which a GPU copies from while other things go on.
        """
        rows = self._rows[indices.cpu()]
        if self._held is not None and self._held.is_cuda:
            return self._held.index_select(0, rows.to(self._held.device, non_blocking=True))
        # Gathered where it is sent from: a tensor in between costs a second copy, and its fresh pages far more.
        out = torch.empty(len(rows), N_MODELS, self.config.d_model, dtype=torch.bfloat16, pin_memory=pinned)
        if self._held is not None:
            return torch.index_select(self._held, 0, rows, out=out)
        # In the order of the file: tokens that share a page are read together. By numpy: torch would wake its threads
        # for the few rows of every shard, which takes many times as long where several processes share the cores.
        rising, order = rows.sort()
        cuts = torch.searchsorted(rising, self._starts).tolist()
        into, places, rising = _as_numpy(out), order.numpy(), rising.numpy()
        for shard, (first, last) in enumerate(pairwise(cuts)):
            if first < last:
                its = _as_numpy(self._shard(shard))
                into[places[first:last]] = its[rising[first:last] - int(self._starts[shard])]
        return out

    def check(self) -> None:
        """Raises UserError where a shard is not as it was written."""
        list(map(self._shard, range(len(self._shards))))

    def _shard(self, number: int) -> Tensor:
        """A shard's activations; UserError where they are not as they were written, which the first reading sees."""
        expected = self._unchecked.get(number)
        if expected is not None:
            path = self.folder / shard_name(number)
            with safe_open(path, framework="pt") as file:
                if tensors_hash((self._shards[number], file.get_tensor("norms"))) != expected:
                    raise UserError(
                        f"{path} is not the file that was written; collect the activations again with --overwrite"
                    )
            self._unchecked.pop(number, None)
        return self._shards[number]

    def _hold(self, device: torch.device) -> Tensor:
        shape = self.config.n_tokens, N_MODELS, self.config.d_model
        with torch.inference_mode(False):  # which is a thread's own
            held = torch.empty(shape, dtype=torch.bfloat16, device=device)
        parts = held.split(self.config.shard_tokens)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda number: parts[number].copy_(self._shard(number)), range(len(parts))))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other threads read it on streams of their own
        return held

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

    def batches(
        self, indices: Tensor, batch_size: int = READ_TOKENS, what: str = ""
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of token indices and their activations [n, 2, d_model], in the order of `indices`; a long pass says how
        far it is, where `what` says what it is for."""
        for chunk in told(what, indices.split(batch_size), len(indices)):
            yield chunk, self.read(chunk)


def read_set_config(folder: Path) -> SetConfig:
    """config.json of an activation set; UserError where there is none or it is of another kind."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        check_types(SetConfig, arguments, str(path))
        return SetConfig(**arguments)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no activation set; make it with collect_activations.py") from None
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        message = f"{path} is not an activation set's configuration ({error}); collect it again with --overwrite"
        raise UserError(message) from None


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _map_shard(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The shard's activations, memory-mapped: pages are read when they are touched."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor("activations")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); collect the activations again with --overwrite") from None
    if tuple(found.shape) != shape or found.dtype != torch.bfloat16:
        raise UserError(
            f"{path} has {found.dtype} {list(found.shape)}, not bf16 {list(shape)}; collect it again with --overwrite"
        )
    return found


def _as_numpy(activations: Tensor) -> Any:
    """The same memory as an array, which knows no bf16."""
    return activations.view(torch.int16).numpy()


def _chosen_place(place: Place, size: int, device: torch.device, folder: Path) -> Place:
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if place == "gpu" and not on_gpu:
        raise UserError(f"{folder} cannot be held on a GPU: none is in use here; choose memory or disk")
    if place != "auto":
        return place
    if on_gpu and size <= SHARE_OF_FREE_MEMORY * free_memory(str(device)):
        return "gpu"
    return "memory" if size <= SHARE_OF_FREE_MEMORY * free_memory("cpu") else "disk"
