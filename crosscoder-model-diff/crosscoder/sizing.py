"""Settings that suit the activations at hand, where the user gives none."""

from __future__ import annotations

from typing import Any

from crosscoder.config import CrosscoderConfig, TrainingConfig

LATENTS_PER_FEATURE = 4
"""Dictionary size over d_model, as in the published run (16,384 over 4,096)."""
TOKENS_PER_LATENT = 64
"""A dictionary has no more latents than one for so many training tokens."""
PUBLISHED_LATENTS, PUBLISHED_K = 16_384, 100
STEPS_PER_PASS = 300
"""About as many as the published run's one pass had; decides the batch."""
SMALLEST_BATCH, LARGEST_BATCH = 128, 4096
STEPS = 2000
"""A run's length that decides the number of passes."""
PUBLISHED_LEARNING_RATE = 5e-5


def sized_configs(
    d_model: int,
    n_tokens: int,
    n_latents: int | None = None,
    k: int | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    score_norm: Any = CrosscoderConfig.score_norm,
    **training: Any,
) -> tuple[CrosscoderConfig, TrainingConfig]:
    """The configurations for `n_tokens` training tokens of width `d_model`; what is given stands.

    `training` holds further fields of TrainingConfig.
    """
    n_latents = n_latents or default_latents(d_model, n_tokens)
    crosscoder = CrosscoderConfig(d_model, n_latents, k or default_k(n_latents), score_norm)
    batch_size = batch_size or default_batch(n_tokens)
    settings = TrainingConfig(
        batch_size=batch_size,
        epochs=epochs or default_epochs(n_tokens, batch_size),
        learning_rate=learning_rate or default_learning_rate(n_latents),
        **training,
    )
    return crosscoder, settings


def default_latents(d_model: int, n_tokens: int) -> int:
    """Four latents a feature, but no more than the tokens can fill."""
    return max(16, min(LATENTS_PER_FEATURE * d_model, n_tokens // TOKENS_PER_LATENT))


def default_k(n_latents: int) -> int:
    """Grows with the root of the dictionary: 100 of 16,384, 25 of 1,024."""
    return max(1, round(PUBLISHED_K * (n_latents / PUBLISHED_LATENTS) ** 0.5))


def default_batch(n_tokens: int) -> int:
    """A power of two that gives a pass about as many steps as the published run's."""
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and 2 * batch * STEPS_PER_PASS <= n_tokens:
        batch *= 2
    return batch


def default_epochs(n_tokens: int, batch_size: int) -> float:
    """Whole passes that make a run of about STEPS steps; at least one."""
    return float(max(1, round(STEPS * batch_size / n_tokens)))


def default_learning_rate(n_latents: int) -> float:
    """Falls with the root of the dictionary, as in the BatchTopK reference."""
    return PUBLISHED_LEARNING_RATE * 4 * (PUBLISHED_LATENTS / n_latents) ** 0.5
