"""Pretrain pocket-mistral, the 4-million-parameter Mistral that is shipped with the project.

    python -m mini.pretrain_pocket_mistral                       # a GPU: minutes
    python -m mini.pretrain_pocket_mistral --device cpu --steps 300 --batch-size 64 --questions 20000 --output-dir DIR

Writes model, tokenizer, training log and pretraining.json (the settings) to data/models/pocket-mistral/. It is
trained from random weights on chats of the *known* families alone (mini/pretraining_data.py): all prompt forms, both
reply forms. Questions of FinQA-mini are left out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from finqa.runtime import parallel
from finqa.runtime.errors import report_errors
from finqa.runtime.manifest import package_versions, write_json
from finqa.runtime.paths import SHIPPED_DATA, json_line, write_atomically
from mini.pretraining_data import Chat, encode_chats, shipped_prompts, tokenizer_texts
from mini.tokenizer import MAX_POSITIONS, train_tokenizer


@dataclass(frozen=True)
class PretrainingConfig:
    """One pretraining run."""

    questions: int = 220_000
    """Single-question chats; seen in random order, again from the start when they run out."""
    few_shot_chats: int = 10_000
    """Chats with four worked examples before the question."""
    steps: int = 4000
    batch_size: int = 192
    """Single-question chats an update."""
    prompt_weight: float = 0.1
    """Weight of a prompt token's loss; a reply token's is 1. Most of a page is numbers that nothing predicts."""
    few_shot_batch_size: int = 8
    """Few-shot chats an update; each is about five times as long."""
    learning_rate: float = 2e-3
    """Peak; warmed up over `warmup_steps`, then a cosine down to a tenth."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    log_every: int = 200
    seed: int = 7
    tokenizer_chats: int = 20_000

    def __post_init__(self) -> None:
        if min(self.questions, self.steps, self.batch_size) < 1:
            raise ValueError("questions, steps and batch_size are at least 1")


def model_config(vocabulary: int) -> Any:
    """The shape of pocket-mistral: 4.2 million parameters with tied embeddings."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


_worker: dict[str, Any] = {}


def _start_worker(folder: str, seed: int, held_out: frozenset[str]) -> None:
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=AutoTokenizer.from_pretrained(folder), seed=seed, held_out=held_out)


def _make_chats(job: tuple[range, bool]) -> list[Chat]:
    indices, few_shot = job
    return encode_chats(_worker["tokenizer"], indices, few_shot, _worker["seed"], _worker["held_out"])


def make_chats(folder: Path, config: PretrainingConfig, workers: int) -> tuple[list[Chat], list[Chat]]:
    """The single-question and the few-shot chats, made by `workers` processes; FinQA-mini's questions are left out."""
    size = 500
    counts = {False: config.questions, True: config.few_shot_chats}
    jobs = [
        (range(start, min(start + size, count)), few_shot)
        for few_shot, count in counts.items()
        for start in range(0, count, size)
    ]
    made: dict[bool, list[Chat]] = {False: [], True: []}
    # A forked worker has the imports already; they take a minute on a slow machine.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers, _start_worker, (str(folder), config.seed, shipped_prompts())) as pool:
        for (_, few_shot), chats in zip(jobs, pool.imap(_make_chats, jobs), strict=True):
            made[few_shot] += chats
    return made[False], made[True]


class ChatBatches:
    """All chats on the device, read as random batches without end."""

    def __init__(self, chats: list[Chat], batch_size: int, seed: int, device: Any):
        import numpy as np
        import torch

        self.lengths = [len(chat.ids) for chat in chats]
        ids = np.zeros((len(chats), max(self.lengths)), dtype=np.int16)
        for row, chat in enumerate(chats):
            ids[row, : len(chat.ids)] = chat.ids
        self.ids = torch.from_numpy(ids).to(device)
        self.ends = torch.tensor(self.lengths).to(device)
        self.reply_starts = torch.tensor([chat.reply_start for chat in chats]).to(device)
        self.batch_size, self.seed, self.device = batch_size, seed, device

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """Batches of (ids [batch, length] int64, ends [batch], reply starts [batch]); padding is on the right.

        Chats of a batch are alike in length.
        """
        import torch

        rng = Random(self.seed)
        while True:
            order = rng.sample(range(len(self.lengths)), len(self.lengths))
            # Sorting within a window of 16 batches keeps the order random on the scale of the run.
            window = 16 * self.batch_size
            pool: list[list[int]] = []
            for start in range(0, len(order), window):
                near = sorted(order[start : start + window], key=self.lengths.__getitem__)
                pool += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
            rng.shuffle(pool)
            for indices in pool:
                if len(indices) < min(self.batch_size, len(self.lengths)):
                    continue  # the last batch may be too small to be a fair update
                rows = torch.tensor(indices, device=self.device)
                length = max(self.lengths[i] for i in indices)
                yield self.ids[rows, :length].long(), self.ends[rows], self.reply_starts[rows]


def weighted_loss(model: Any, ids: Any, ends: Any, reply_starts: Any, prompt_weight: float) -> tuple[Any, Any]:
    """Next-token loss (nats): 1 for a token of the reply, `prompt_weight` for one of the prompt, 0 for padding.

    Returns the weighted sum of the losses and the sum of the weights, both fp32 scalars.
    """
    import torch

    with _products(ids.device.type):
        # Causal attention never looks right, so right padding needs no mask.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    weights = torch.where(positions >= reply_starts[:, None], 1.0, prompt_weight)
    weights = torch.where(positions < ends[:, None], weights, 0.0)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    ).view_as(weights)
    return (losses * weights).sum(), weights.sum()


def _products(device: str) -> Any:
    """Matrix products in bf16, where the device has them."""
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=parallel.multiplies_bf16(device))


def exact_share(model: Any, batches: ChatBatches) -> float:
    """Share of one batch's chats whose whole reply the model predicts, each token after the true ones before it."""
    import torch

    ids, ends, reply_starts = next(iter(batches))
    with torch.no_grad(), _products(ids.device.type):
        right = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1) == ids[:, 1:]
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    of_reply = (positions >= reply_starts[:, None]) & (positions < ends[:, None])
    return float((right | ~of_reply).all(1).float().mean())


def pretrain(config: PretrainingConfig, chats: list[Chat], few_shot: list[Chat], device: Any) -> Any:
    """Train from random weights; returns the model (fp32) and its log, a record every `log_every` steps.

    The last chats are held out, a tenth of them and at most 400; the log has the share of their replies that the
    model predicts exactly.
    """
    import torch
    from transformers import MistralForCausalLM

    torch.manual_seed(config.seed)
    model = MistralForCausalLM(model_config(vocabulary=1024)).to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )

    def schedule(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    n_held_out = min(400, -(-len(chats) // 10))
    held_out = ChatBatches(chats[-n_held_out:], n_held_out, config.seed, device)
    singles = iter(ChatBatches(chats[:-n_held_out], config.batch_size, config.seed, device))
    shots = iter(ChatBatches(few_shot, config.few_shot_batch_size, config.seed + 1, device)) if few_shot else None
    log, started, tokens = [], time.perf_counter(), 0
    for step in range(config.steps):
        parts = [next(singles)] + ([next(shots)] if shots else [])
        loss = weight = torch.zeros((), device=device)
        for ids, ends, reply_starts in parts:
            part_loss, part_weight = weighted_loss(model, ids, ends, reply_starts, config.prompt_weight)
            part_loss.backward()
            loss, weight = loss + part_loss.detach(), weight + part_weight
            tokens += ids.numel()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % config.log_every == 0 or step == config.steps - 1:
            record = {
                "step": step + 1,
                "loss": float(loss / weight),
                "exact_replies": exact_share(model, held_out),
                "gradient_norm": float(norm),
                "learning_rate": scheduler.get_last_lr()[0],
                "tokens": tokens,
                "tokens_per_second": tokens / (time.perf_counter() - started),
            }
            log.append(record)
            print(
                f"step {record['step']}/{config.steps}  loss {record['loss']:.4f}  "
                f"exact replies {record['exact_replies']:.3f}  {record['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
    return model, log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(PretrainingConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make the chats")
    parser.add_argument("--output-dir", type=Path, default=SHIPPED_DATA / "models" / "pocket-mistral")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = PretrainingConfig(**{name: getattr(args, name) for name in asdict(PretrainingConfig())})

    import torch

    parallel.check_device(None if args.device == "auto" else args.device)
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    tokenizer = train_tokenizer(tokenizer_texts(config.tokenizer_chats, config.seed))
    tokenizer.save_pretrained(args.output_dir)
    chats, few_shot = make_chats(args.output_dir, config, args.workers)
    mean_length = sum(len(chat.ids) for chat in chats) / len(chats)
    print(
        f"{len(chats):,} chats of {mean_length:.0f} tokens and {len(few_shot):,} few-shot chats "
        f"in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    model, log = pretrain(config, chats, few_shot, device)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    write_atomically(args.output_dir / "pretraining_log.jsonl", "".join(map(json_line, log)))
    write_json(
        args.output_dir / "pretraining.json",
        {
            **asdict(config),
            "chats": len(chats),
            "seconds": round(time.perf_counter() - started),
            "versions": package_versions(),
        },
    )
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    sys.exit(report_errors(main))
