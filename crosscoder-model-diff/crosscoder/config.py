"""What a crosscoder is, and how it is trained: frozen values that check themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from finqa.errors import UserError

ScoreNorm = Literal["sum", "l2"]
Reconstruction = Literal["mse", "l2"]
Precision = Literal["auto", "fp32", "bf16"]

N_MODELS = 2
"""Index 0 is the instruct model, index 1 the fine-tuned one."""

Config = TypeVar("Config", "CrosscoderConfig", "TrainingConfig")


@dataclass(frozen=True)
class CrosscoderConfig:
    """Shape of a crosscoder, and how it selects latents."""

    d_model: int
    """Width of one model's activation."""
    n_latents: int
    """Latents F in the dictionary."""
    k: int
    """Mean number of active latents a token."""
    score_norm: ScoreNorm = "sum"
    """What a latent's value is multiplied by for selection: the sum of its two decoder norms, as published, or
    the joint norm. At equal energy the sum ranks a shared latent sqrt(2) above an exclusive one."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(self.k <= self.n_latents, f"k ({self.k}) is more than the {self.n_latents} latents")
        _require_choice("score_norm", self.score_norm, ScoreNorm)


@dataclass(frozen=True)
class TrainingConfig:
    """One training run over an activation store."""

    batch_size: int = 4096
    """Tokens a step, each with the activations of both models."""
    epochs: float = 1.0
    """Passes over the training tokens; what does not fill a last batch is left out."""
    learning_rate: float = 5e-5
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly towards 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    max_grad_norm: float = 1.0
    reconstruction: Reconstruction = "mse"
    """`mse`: squared error, summed over features and both models, mean over tokens; the quantity that explained
    variance is about. `l2`: its square root for each token and model, mean over both; tokens of a large norm
    weigh less."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss, which is about 1 at most; only dead latents receive its gradient."""
    aux_k: int | None = None
    """Dead latents a token that try to explain what is left over; None is half of d_model."""
    dead_after_tokens: int | None = None
    """A latent that was not selected for this many tokens is dead; None is a tenth of the run, 10 million at most."""
    decoder_norm: float = 1.0
    """Norm of every decoder vector at the start, for each model."""
    decoder_bias: Literal["zero", "median"] = "median"
    """Start of the decoder bias: 0, or the geometric median of each model's activations."""
    threshold_from_step: int = 10
    """Step after which the threshold follows the smallest selected score."""
    threshold_decay: float = 0.99
    """Of the running average of that score."""
    calibration_tokens: int = 131_072
    """Training tokens, at most, on which the threshold is set after the last step."""
    precision: Precision = "auto"
    """Of the matrix products: `auto` is bf16 on a GPU, fp32 on a CPU. Parameters and optimiser are fp32 always."""
    held_out_fraction: float = 0.1
    """Share of the documents, at least one, that are kept out of training for every reported figure."""
    split_seed: int = 0
    """Decides which documents are held out; apart from `seed`, so that seeds are compared on the same ones."""
    seed: int = 0
    """Of the initial weights, the order of the tokens, and what is drawn anew."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threshold_from_step", "calibration_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "max_grad_norm", "decoder_norm"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("decay_fraction", "held_out_fraction", "threshold_decay"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        _require(self.aux_weight >= 0, f"aux_weight must not be negative, and is {self.aux_weight}")
        for name in ("aux_k", "dead_after_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        _require_choice("reconstruction", self.reconstruction, Reconstruction)
        _require_choice("precision", self.precision, Precision)
        _require(self.decoder_bias in ("zero", "median"), f"decoder_bias is zero or median, not {self.decoder_bias}")

    def total_steps(self, n_tokens: int) -> int:
        """Full batches in `epochs` passes over `n_tokens` tokens; at least one."""
        return max(1, int(self.epochs * n_tokens) // self.batch_size)

    def dead_window(self, n_tokens: int) -> int:
        """Tokens without a selection after which a latent is dead, in a run over `n_tokens` tokens."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(self.batch_size, min(10_000_000, int(self.epochs * n_tokens) // 10))


def from_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Read a config back from JSON; UserError for a field that this version does not know, or one that lacks."""
    names = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - names)
    _require(not unknown, f"{source} has settings that this version does not know: {', '.join(unknown)}")
    arguments: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"{source} does not describe a {kind.__name__}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_choice(name: str, value: str, choices: Any) -> None:
    _require(value in get_args(choices), f"{name} is one of {', '.join(get_args(choices))}, not {value}")
