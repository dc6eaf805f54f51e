"""Replies by Hugging Face generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from finqa.generation import Generate, GenerationConfig, Reply, cut_at_stop, end_ids, prompt_too_long

LINE_EVERY_S = 10.0


def hugging_face(model: Any, tokenizer: Any, config: GenerationConfig) -> Generate:
    """Greedy replies by Hugging Face generate, prompts of like length in one batch, padded on the left."""

    def generate(prompts: Sequence[list[int]]) -> list[Reply]:
        own = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        limit = min(own, config.max_model_len or own)
        replies: list[Reply | None] = [None] * len(prompts)
        # The longest first: where memory does not suffice, that shows at once.
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        fitting = [row for row in order if len(prompts[row]) + config.max_new_tokens <= limit]
        for row in set(order) - set(fitting):
            replies[row] = prompt_too_long(prompts[row])
        said = time.monotonic()
        for start in range(0, len(fitting), config.batch_size):
            rows = fitting[start : start + config.batch_size]
            for row, reply in zip(rows, _batch(model, tokenizer, config, [prompts[r] for r in rows]), strict=True):
                replies[row] = reply
            if time.monotonic() - said > LINE_EVERY_S:
                said = time.monotonic()
                print(f"{start + len(rows)} of {len(prompts)} replies", flush=True)
        return [reply for reply in replies if reply is not None]

    return generate


def _batch(model: Any, tokenizer: Any, config: GenerationConfig, prompts: list[list[int]]) -> list[Reply]:
    import torch

    pad = tokenizer.pad_token_id
    ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            stop_strings=list(config.stop),
            tokenizer=tokenizer,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        )
    replies = []
    for prompt, new in zip(prompts, written[:, longest:].tolist(), strict=True):
        length = next((i for i, token in enumerate(new) if token in ends), len(new))
        ended = length < len(new)
        while not ended and length and new[length - 1] == pad:
            length -= 1
        text = tokenizer.decode(new[:length], skip_special_tokens=True)
        cut = cut_at_stop(text, config.stop)
        stopped = cut.endswith(config.stop)
        count = length + (ended and not stopped)
        replies.append(Reply(cut, len(prompt), count, "stop" if ended or stopped else "length"))
    return replies
