"""Settings that suit the activations at hand, where the user gives none.

Measured on pocket-mistral (MLP output of layer 3 of 5, 180,000 training tokens, seed 0, held-out documents), with
1,024 latents and k 25. Explained variance of instruct and fine-tuned model, of their difference, dead latents:

    batch   passes   learning rate   instruct   fine-tuned   difference   dead
    512     6        3e-4            0.968      0.967        0.471         0.0%
    512     6        8e-4            0.976      0.975        0.538         0.0%
    512     3        2e-3            0.976      0.974        0.522         0.3%
    512     3        4e-3            0.976      0.975        0.511         7.4%
    256     3        2e-3            0.978      0.976        0.537         1.7%
    256     4        1.6e-3          0.979      0.978        0.560         1.2%

At 512, 3 passes, 2e-3: reconstruction `l2` gives 0.975, 0.974, 0.513 (so `mse` is the default), a decoder norm of 0.1
at the start 53% dead latents. Method l1 at a coefficient of 0.25, 0.5, 0.8 and 2 has 87, 38, 21 and 7 active latents a
token (3 passes, 1.6e-3, batch 256): the default is that of about 25, so that methods are compared at one sparsity.

At a size of 7B nothing was measured: those defaults are the published run's, but for more passes and a learning rate
between the published one and that of the BatchTopK reference.
"""

from __future__ import annotations

from typing import Any

from crosscoder.dictionaries.config import CrosscoderConfig, Method, TrainingConfig, check_together

SHAPE = ("n_latents", "k", "score_norm", "n_delta", "k_delta", "reserved_share")
"""Fields of CrosscoderConfig that are given by name."""
LATENTS_PER_FEATURE = 4
"""Dictionary size over d_model, as in the published run (16,384 over 4,096)."""
TOKENS_PER_LATENT = 64
"""A dictionary has no more latents than one for so many training tokens."""
PUBLISHED_LATENTS, PUBLISHED_K = 16_384, 100
LATENTS_PER_BATCH_TOKEN = 4
"""The dictionary over the tokens of a step, as in the published run (16,384 over 4,096)."""
SMALLEST_BATCH, LARGEST_BATCH = 128, 4096
STEPS = 2000
"""A run's length that decides the number of passes."""
MEASURED_LATENTS, MEASURED_LEARNING_RATE = 1024, 1.6e-3
LARGEST_LEARNING_RATE = 2e-3
"""Above it latents died."""


DELTA_SHARE = 1 / 4
"""Share of a partition's latents, and of its k, that tell the models apart."""
RESERVED_SHARE = 0.05
"""Share of a dedicated feature crosscoder's latents, and of its k, that is either model's."""
L1_WEIGHT = 0.7
"""L1 coefficient where none is given, for activations of length sqrt(d_model): about as many active latents as k."""
PUBLISHED_L1_WEIGHT = 2.0
"""L1 coefficient of the published replication of Lindsey et al. 2024."""

PUBLISHED: dict[str, Any] = {
    "n_latents": PUBLISHED_LATENTS,
    "k": PUBLISHED_K,
    "score_norm": "none",
    "batch_size": 4096,
    "epochs": 1.0,
    "learning_rate": 5e-5,
    "decay_fraction": 0.2,
    "reconstruction": "mse",
    "l1_weight": PUBLISHED_L1_WEIGHT,
    "aux_weight": 0.0,
    "draw_anew": False,
    "decoder_norm": 0.08,
    "directions": "apart",
    "decoder_bias": "zero",
    "seed": 49,
}
"""The published run's settings, so far as they can be said here."""
NOT_REPRODUCED = (
    "rows of train, each cut to its last 10,000 characters",
    "BOS among the tokens (collect_activations.py --keep-bos has it)",
    "tokens in their stored order: here they are shuffled",
    f"the weight of its L1 term, which is not known: {PUBLISHED_L1_WEIGHT:g} is that of the code it started from",
    "its inference: here the threshold is calibrated",
)
"""What the published run did otherwise, for whoever compares with its figures."""


def sized_configs(
    d_model: int, n_tokens: int, method: Method = "batchtopk", **given: Any
) -> tuple[CrosscoderConfig, TrainingConfig]:
    """The configurations for `n_tokens` training tokens of width `d_model`; what is given stands.

    `given` holds fields of CrosscoderConfig and TrainingConfig by name; None is not given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    of_shape = {name: given.pop(name) for name in SHAPE if name in given}
    n_latents = of_shape.setdefault("n_latents", default_latents(d_model, n_tokens))
    k = of_shape.setdefault("k", default_k(n_latents))
    if method == "partition":
        of_shape.setdefault("n_delta", max(1, round(DELTA_SHARE * n_latents)))
        of_shape.setdefault("k_delta", max(1, round(DELTA_SHARE * k)))
        given.setdefault("difference_weight", "equal")
    if method == "dedicated":
        of_shape.setdefault("reserved_share", RESERVED_SHARE)
    if method == "l1":
        given.setdefault("l1_weight", L1_WEIGHT)
    crosscoder = CrosscoderConfig(d_model, method=method, **of_shape)
    batch_size = given.setdefault("batch_size", default_batch(n_latents))
    given.setdefault("epochs", default_epochs(n_tokens, batch_size))
    given.setdefault("learning_rate", default_learning_rate(n_latents))
    training = TrainingConfig(**given)
    check_together(crosscoder, training)
    return crosscoder, training


def default_latents(d_model: int, n_tokens: int) -> int:
    """Four latents a feature, but no more than the tokens can fill."""
    return max(16, min(LATENTS_PER_FEATURE * d_model, n_tokens // TOKENS_PER_LATENT))


def default_k(n_latents: int) -> int:
    """Grows with the root of the dictionary: 100 of 16,384, 25 of 1,024."""
    return max(1, round(PUBLISHED_K * (n_latents / PUBLISHED_LATENTS) ** 0.5))


def default_batch(n_latents: int) -> int:
    """A quarter of the dictionary."""
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, n_latents // LATENTS_PER_BATCH_TOKEN))


def default_epochs(n_tokens: int, batch_size: int) -> float:
    """Whole passes that make a run of about STEPS steps; at least one."""
    return float(max(1, round(STEPS * batch_size / n_tokens)))


def default_learning_rate(n_latents: int) -> float:
    """Falls with the size of the dictionary: 1.6e-3 at 1,024 latents, 1e-4 at 16,384."""
    return min(LARGEST_LEARNING_RATE, MEASURED_LEARNING_RATE * MEASURED_LATENTS / n_latents)
