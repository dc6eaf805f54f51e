"""What changes from step to step: learning rate, k, and the L1 coefficient. Steps are counted from 0."""

from __future__ import annotations

import math

from crosscoder.dictionaries.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rises linearly, stays, and falls; it is above 0 in the first step and in the last."""
    rising, falling = config.warmup_fraction * total_steps, config.decay_fraction * total_steps
    rate = config.learning_rate
    if step < rising:
        return rate * (step + 1) / (math.floor(rising) + 1)
    left = total_steps - step
    if left >= falling:
        return rate
    share = left / falling
    return rate * (share if config.decay == "linear" else math.sin(math.pi / 2 * share) ** 2)


def k_at(config: TrainingConfig, k: int, step: int, total_steps: int) -> int:
    """Falls linearly from `anneal_k_from`; `k` from the end of the annealing on, which is before the last step."""
    steps = int(config.anneal_fraction * total_steps)
    if config.anneal_k_from is None or step >= steps:
        return k
    return max(k, round(config.anneal_k_from + (k - config.anneal_k_from) * step / steps))


def l1_weight_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rises linearly to `l1_weight`."""
    steps = config.l1_warmup_fraction * total_steps
    return config.l1_weight * (min(1.0, (step + 1) / steps) if steps else 1.0)
