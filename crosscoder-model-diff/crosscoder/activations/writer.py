"""Writes activation sets (store.py says what they are), so that a killed run loses only what was under way.

A set is made beside its place, in `.<name>.partial`. A shard is written under a temporary name and renamed when it is
whole, by any process and in any order, so an interrupted run goes on with the shards that are missing. The plan in
plan.json says what the shards are of; what was left by another plan is thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from xxhash import xxh3_64

from crosscoder.activations.store import VERSION, SetConfig, StoredDocument, shard_name
from crosscoder.dictionaries.checkpoint import save_tensors, tensor_bytes
from crosscoder.dictionaries.config import N_MODELS
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash
from finqa.runtime.paths import json_line, json_text, write_atomically

OUTLIER_FACTOR = 10.0
"""A token above this many median norms, of either model, is an outlier (an attention sink), whatever its id."""
MODELS = ("instruct", "fine-tuned")
BATCHES_BEHIND = 3
"""Batches that may wait for the disk; with more the GPU waits too."""
PLAN_FILE = "plan.json"
HASH = "xxh3"


class ShardFile:
    """A shard under way: tokens are appended, `close` gives it its name.

    The file is safetensors with its header written first, so that nothing larger than a batch is held in memory. The
    header is written again at the end, with the checksum of what follows it.
    """

    def __init__(self, path: Path, n_tokens: int, d_model: int):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._n_tokens = n_tokens
        self._norms: list[Tensor] = []
        activations_start, end = 8 * N_MODELS * n_tokens, (8 + 2 * d_model) * N_MODELS * n_tokens
        self._layout = {
            "norms": {"dtype": "F64", "shape": [n_tokens, N_MODELS], "data_offsets": [0, activations_start]},
            "activations": {
                "dtype": "BF16",
                "shape": [n_tokens, N_MODELS, d_model],
                "data_offsets": [activations_start, end],
            },
        }
        self._digest = xxh3_64()
        self._norms_at = len(self._header())
        self._file = self._temporary.open("wb", buffering=0)
        self._file.seek(self._norms_at + activations_start)

    def add(self, activations: Tensor, norms: Tensor) -> None:
        """Append tokens: activations [n, 2, d_model] bf16 and their norms [n, 2] fp64, both on the CPU."""
        self._norms.append(norms)
        data = tensor_bytes(activations)
        self._digest.update(data)
        self._write(data)

    def close(self) -> None:
        """Write the norms and give the shard its name."""
        norms = torch.cat(self._norms)
        if len(norms) != self._n_tokens:
            raise ValueError(f"{self._path.name} got {len(norms)} tokens, planned were {self._n_tokens}")
        self._digest.update(tensor_bytes(norms))
        self._file.seek(0)
        self._write(self._header())
        self._write(tensor_bytes(norms))
        self._file.close()
        self._temporary.replace(self._path)

    def discard(self) -> None:
        """Leave nothing behind; does nothing after `close`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _header(self) -> bytes:
        """The file's header, of one length whatever has been written."""
        about = {"__metadata__": {HASH: self._digest.hexdigest()}}
        text = json.dumps(about | self._layout, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class SetWriter:
    """Makes one activation set, on its own or with other processes."""

    def __init__(self, folder: Path, d_model: int, plan: Mapping[str, Any], drop_outliers: bool = False):
        """`plan`: what decides the bytes of the shards, as JSON values; shards of another plan are not used."""
        self.folder = folder
        self.d_model = d_model
        self.drop_outliers = drop_outliers
        self.partial = folder.with_name(f".{folder.name}.partial")
        self._plan = json.dumps(plan, sort_keys=True, indent=2) + "\n"

    def prepare(self) -> None:
        """Keep the whole shards of an interrupted run of this plan, remove all else; the first process does it."""
        plan_file = self.partial / PLAN_FILE
        if not plan_file.exists() or plan_file.read_text() != self._plan:
            shutil.rmtree(self.partial, ignore_errors=True)
            write_atomically(plan_file, self._plan)
        for left_over in self.partial.glob(".*"):
            left_over.unlink()

    def has(self, number: int) -> bool:
        """Whether this shard is whole."""
        return (self.partial / shard_name(number)).exists()

    def seen(self, n_shards: int) -> str:
        """What is there of a set of so many shards, in words."""
        begun = "begun" if (self.partial / PLAN_FILE).exists() else "not begun"
        return f"{begun}, {sum(map(self.has, range(n_shards)))} of {n_shards} shards"

    def shard(self, number: int, n_tokens: int) -> ShardFile:
        return ShardFile(self.partial / shard_name(number), n_tokens, self.d_model)

    def finish(
        self,
        table: Mapping[str, Tensor],
        documents: Sequence[StoredDocument],
        recorded: dict[str, Any],
        shard_tokens: Sequence[int],
        add_to: Callable[[Path], None] = lambda folder: None,
    ) -> SetConfig:
        """Write tables and configuration, and move the set to its place; every shard must be there.

        Args:
            table: `document`, `position`, `token_id` [tokens] and, where it is known, `kind`, in the order of the
                shards.
            recorded: What was recorded (SetConfig.recorded).
            shard_tokens: Tokens of each shard.
            add_to: Called with the folder before it is moved, to write more into it.
        """
        norms = torch.cat([self._tensor(number, "norms") for number in range(len(shard_tokens))])
        self._check(norms, table, documents)
        kept, largest = torch.ones(len(norms), dtype=torch.bool), None
        if self.drop_outliers:
            largest = OUTLIER_FACTOR * norms.median(dim=0).values
            kept = (norms <= largest).all(dim=-1)
        hashes = [self._hash(number) for number in range(len(shard_tokens))]
        means = norms[kept].mean(dim=0)
        columns = {name: column.to(torch.int32) for name, column in table.items()}
        save_tensors(self.partial / "tokens.safetensors", {**columns, "kept": kept})
        lines = "".join(json_line(asdict(document)) for document in documents)
        write_atomically(self.partial / "documents.jsonl", lines)
        config = SetConfig(
            d_model=self.d_model,
            n_tokens=len(norms),
            n_dropped=int((~kept).sum()),
            activation_scales=tuple((self.d_model**0.5 / means).tolist()),
            shard_tokens=tuple(shard_tokens),
            recorded=recorded,
            version=VERSION,
            files={name: file_hash(self.partial / name) for name in ("tokens.safetensors", "documents.jsonl")},
            shard_hashes=tuple(hashes) if all(hashes) else (),
            largest_norms=() if largest is None else tuple(largest.tolist()),
        )
        add_to(self.partial)
        write_atomically(self.partial / "config.json", json_text(asdict(config), indent=2) + "\n")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)
        (self.folder / PLAN_FILE).unlink()
        return config

    def _check(self, norms: Tensor, table: Mapping[str, Tensor], documents: Sequence[StoredDocument]) -> None:
        """UserError where a model's activations are no numbers, all 0, or the same for every token."""
        for m, model in enumerate(MODELS):
            bad = (~norms[:, m].isfinite()).nonzero().squeeze(-1)
            if len(bad):
                first = int(bad[0])
                what = "not a number" if norms[first, m].isnan() else "infinite"
                raise UserError(
                    f"{self.folder.name}: the {model} model's activation is {what} on {len(bad):,} of {len(norms):,} "
                    f"tokens, first at position {int(table['position'][first])} of document "
                    f"{documents[int(table['document'][first])].id}; check that model's weights, or try another --dtype"
                )
            if not norms[:, m].median():
                raise UserError(
                    f"{self.folder.name}: the {model} model's activation is 0 on at least half of the {len(norms):,} "
                    "tokens; choose another --layer or --site"
                )
            first_norm = norms[0, m]
            if len(norms) > 1 and bool((norms[:, m] == first_norm).all()):
                rows = self._tensor(0, "activations")[:, m]
                if bool((rows == rows[0]).all()):
                    raise UserError(
                        f"{self.folder.name}: the {model} model's activation is the same for every token, so that "
                        "there is nothing to explain; choose another --layer or --site"
                    )

    def _tensor(self, number: int, name: str) -> Tensor:
        with safe_open(self.partial / shard_name(number), framework="pt") as file:
            return file.get_tensor(name)

    def _hash(self, number: int) -> str:
        """What a shard says its checksum is; nothing in one of an earlier version."""
        with safe_open(self.partial / shard_name(number), framework="pt") as file:
            return (file.metadata() or {}).get(HASH, "")


class BackgroundWriter:
    """Writes in a thread what the models gave, while they compute the next batch.

    On a GPU the copies to pinned memory run on a stream of their own. An error of the thread is raised by the next
    `put`, or at the end of the `with` block; nothing is written after it.
    """

    def __init__(self, device: torch.device | str):
        self._stream: Any = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "activation writer")
        self._waiting: deque[Future[None]] = deque()
        self._open: dict[int, ShardFile] = {}
        self._failed = False

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        for file in self._open.values():
            file.discard()
        for job in self._waiting if kind is None else ():
            job.result()

    def put(self, files: Sequence[ShardFile], pairs: Sequence[Tensor], last: bool) -> None:
        """Append to each file its [n, 2, d_model] bf16 tensor; after the `last` of them the files are closed.

        Waits while too many batches are on their way.
        """
        self._open.update((id(file), file) for file in files)
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == BATCHES_BEHIND):
            self._waiting.popleft().result()
        norms = [torch.linalg.vector_norm(pair, dim=-1, dtype=torch.float64) for pair in pairs]
        copied = None
        if self._stream is not None:
            given = (*pairs, *norms)
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                pairs, norms = [_to_pinned(pair) for pair in pairs], [_to_pinned(norm) for norm in norms]
                copied = torch.cuda.Event()
                copied.record(self._stream)
            for tensor in given:
                tensor.record_stream(self._stream)
        self._waiting.append(self._thread.submit(self._write, files, pairs, norms, copied, last))

    def _write(
        self, files: Sequence[ShardFile], pairs: Sequence[Tensor], norms: Sequence[Tensor], copied: Any, last: bool
    ) -> None:
        """`copied`: CUDA event after the copies to the host; None on the CPU."""
        if self._failed:
            return
        self._failed = True  # until all of it is written
        if copied is not None:
            copied.synchronize()
        for file, activations, lengths in zip(files, pairs, norms, strict=True):
            file.add(activations, lengths)
            if last:
                file.close()
                del self._open[id(file)]
        self._failed = False


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
