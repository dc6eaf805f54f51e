"""Replies by Hugging Face generate."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from finqa.evaluation.generation import (
    Generate,
    GenerationConfig,
    Reply,
    cut_at_stop,
    end_ids,
    is_reasoning,
    opened_by,
    prompt_too_long,
)

if TYPE_CHECKING:
    from torch import Tensor


def hugging_face(model: Any, tokenizer: Any, config: GenerationConfig, labels: Sequence[int] | None = None) -> Generate:
    """Replies by Hugging Face generate, prompts of like length in one batch, padded on the left.

    `labels`: one for each prompt, for hooks of the model that treat prompts differently: a call finds those of its rows
    in its cache (BatchCache.labels). Prompts of one label stand together, so that few meet in a batch.

    A batch of which a reply is missing is written again whole: the same shapes give the same replies. Of the model's
    generation_config only the end tokens count, as with vLLM: `generate` would take penalties and beams from it.
    """
    from transformers import GenerationConfig as Decoding

    decode_by_groups(model)
    ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    model.generation_config = Decoding(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)

    def generate(prompts: Sequence[list[int]], done: Collection[int] = ()) -> Iterator[tuple[int, Reply]]:
        missing = set(range(len(prompts))) - set(done)
        batches = batches_of(prompts, config, model.config, labels)
        for place in sorted(missing.difference(*batches)):
            yield place, prompt_too_long(prompts[place])
        for places in batches:
            if missing.isdisjoint(places):
                continue
            seeds = [config.seed_of(place) for place in places]
            its = None if labels is None else [labels[place] for place in places]
            for row, reply in _batch(model, tokenizer, config, [prompts[place] for place in places], its, seeds, ends):
                if places[row] in missing:
                    yield places[row], reply

    return generate


def batches_of(
    prompts: Sequence[list[int]], config: GenerationConfig, model: Any, labels: Sequence[int] | None = None
) -> list[list[int]]:
    """The places of the prompts of each batch; one that leaves no room for a reply is in none. `model` is its config.

    The longest come first: where memory does not suffice, that shows at once.
    """
    own = getattr(model, "max_position_embeddings", None) or sys.maxsize
    room = min(own, config.max_model_len or own) - config.max_new_tokens
    order = sorted(range(len(prompts)), key=lambda place: (labels[place] if labels else 0, -len(prompts[place])))
    fitting = [place for place in order if len(prompts[place]) <= room]
    return [fitting[start : start + config.batch_size] for start in range(0, len(fitting), config.batch_size)]


GROUPED = "sdpa_by_groups"


def decode_by_groups(model: Any) -> None:
    """Have a model whose attention is `sdpa` attend by `grouped_attention`, for good: it gives the same."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: its own `sdpa`, but for one new token a row under a mask.

    There transformers copies keys and values for every query head that shares them, at each token anew. The query
    heads of a group can as well stand beside each other as tokens, which see the same keys.

    query [batch, H, 1, d], key and value [batch, H_kv, time, d]; returns [batch, 1, H, d].
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens, width = query.shape
    one_mask = attention_mask is not None and attention_mask.shape[1] == 1
    if tokens > 1 or heads == key.shape[1] or not one_mask or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    grouped = query.view(batch, key.shape[1], -1, width)
    out = scaled_dot_product_attention(
        grouped, key, value, attention_mask, dropout_p=settings.get("dropout", 0.0), scale=settings.get("scaling")
    )
    return out.reshape(batch, 1, heads, width), None


class GumbelNoise:
    """A logits processor under which the largest score is a sample: softmax(scores / temperature) by the Gumbel trick.

    Every row draws from a generator of its own, so that its sample does not depend on the rows beside it.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: Any) -> None:
        import torch

        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [batch, vocabulary] fp32 with the noise of one more token."""
        import torch

        for row, generator in enumerate(self.generators):
            # -log of an exponential variable is a standard Gumbel variable.
            noise = torch.empty_like(scores[row]).exponential_(generator=generator).log_().neg_()
            scores[row] = scores[row] / self.temperature + noise
        return scores


class Ends:
    """A stopping criterion: a row ends with a stop string or an end token, and `tell` gets it at that moment.

    A stop string inside reasoning ends nothing. `is_reasoning(row, ids)` says whether a row is there.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: GenerationConfig,
        ends: set[int],
        is_reasoning: Callable[[int, list[int]], bool],
        tell: Callable[[int, Any], None],
    ):
        from transformers.generation.stopping_criteria import StopStringCriteria

        self.stop_strings: Any = StopStringCriteria(tokenizer, list(config.stop)) if config.stop else None
        self.ends, self.is_reasoning, self.tell = ends, is_reasoning, tell
        self.told: set[int] = set()
        self.given_up = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Which rows of `input_ids` [batch, tokens] have ended: bool [batch]; all of them where nobody waits."""
        import torch

        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.stop_strings is not None:
            stopped = self.stop_strings(input_ids, scores)
        for row in stopped.nonzero()[:, 0].tolist():
            stopped[row] = row in self.told or not self.is_reasoning(row, input_ids[row].tolist())
        ended = stopped | torch.isin(input_ids[:, -1], input_ids.new_tensor([*self.ends]))
        for row in ended.nonzero()[:, 0].tolist():
            if row not in self.told:
                self.told.add(row)
                self.tell(row, input_ids[row].tolist())
        return ended | self.given_up.is_set()


def _batch(
    model: Any,
    tokenizer: Any,
    config: GenerationConfig,
    prompts: list[list[int]],
    labels: list[int] | None,
    seeds: list[int],
    ends: set[int],
) -> Iterator[tuple[int, Reply]]:
    """The reply of each row as it ends; a thread generates, and stops where the iterator is closed."""
    import torch

    from finqa.evaluation.engines.caches import laid_out

    pad = tokenizer.pad_token_id
    laid = laid_out(model, prompts, pad, labels)
    longest = laid.ids.shape[1]
    sampling = [GumbelNoise(config.temperature, seeds, model.device)] if config.temperature else []

    opened = [opened_by(prompt, tokenizer) for prompt in prompts]

    def reply_of(row: int, new: list[int]) -> Reply:
        length = next((i for i, token in enumerate(new) if token in ends), len(new))
        ended = length < len(new)
        text = tokenizer.decode(new[:length], skip_special_tokens=True)
        cut = cut_at_stop(text, config.stop, opened[row])
        stopped = cut.endswith(config.stop) and not is_reasoning(cut, opened[row])
        count = length + (ended and not stopped)
        return Reply(cut, len(prompts[row]), count, "stop" if ended or stopped else "length")

    written: SimpleQueue[Any] = SimpleQueue()

    def reasons(row: int, ids: list[int]) -> bool:
        return is_reasoning(tokenizer.decode(ids[longest:], skip_special_tokens=True), opened[row])

    stopping = Ends(tokenizer, config, ends, reasons, lambda row, ids: written.put((row, ids)))

    @torch.inference_mode()
    def write() -> None:
        rows = model.generate(
            input_ids=laid.ids,
            attention_mask=laid.mask,
            past_key_values=laid.read(model, config.max_new_tokens),
            max_new_tokens=config.max_new_tokens,
            logits_processor=sampling,
            do_sample=False,
            stopping_criteria=[stopping],
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        ).tolist()
        for row in set(range(len(rows))) - stopping.told:
            written.put((row, rows[row]))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        writing.add_done_callback(lambda _: written.put(None))
        try:
            while (got := written.get()) is not None:
                row, tokens = got
                yield row, reply_of(row, tokens[longest:])
            writing.result()  # raises what generate raised
        finally:
            stopping.given_up.set()
