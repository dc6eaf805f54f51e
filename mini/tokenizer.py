"""pocket-mistral's tokenizer: byte-level BPE with Mistral's special tokens and chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

VOCABULARY = 1024
MAX_POSITIONS = 4096
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
"""At the ids that Mistral-7B-Instruct-v0.3 has them."""

# As Mistral-7B-Instruct-v0.3: `<s>[INST] text[/INST] answer</s>`.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Train the tokenizer on `texts`.

    Digits stay apart, so that a number is copied digit by digit, and so does `|`, so that columns can be counted.

    Returns a transformers.PreTrainedTokenizerFast of VOCABULARY tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("|", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
