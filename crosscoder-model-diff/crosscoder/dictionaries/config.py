"""What a dictionary is, and how it is trained: frozen values that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from finqa.runtime.command_line import check_bounds, flag, option
from finqa.runtime.errors import UserError

Method = Literal["batchtopk", "l1", "partition", "dedicated", "difference-sae", "stagewise-sae"]
ScoreNorm = Literal["sum", "l2", "none"]
Reconstruction = Literal["mse", "l2"]
Precision = Literal["auto", "fp32", "bf16"]
Decay = Literal["linear", "cosine"]
Directions = Literal["alike", "apart"]

N_MODELS = 2
"""Index 0 is the instruct model, index 1 the fine-tuned one."""
READ_TOKENS = 4096
"""Tokens of a set that are read, and whose latents are held, at one time."""

Config = TypeVar("Config", "CrosscoderConfig", "TrainingConfig")


BY_SIZE = "by the size of the data, crosscoder/training/sizing.py"


def number_or_equal(text: str) -> float | str:
    """A weight, or `equal`."""
    return text if text == "equal" else float(text)


@dataclass(frozen=True)
class CrosscoderConfig:
    """Shape of a dictionary, and how it selects latents."""

    d_model: int
    """Width of one model's activation."""
    n_latents: int = field(metadata=option("--latents", shown=BY_SIZE, least=1))
    """Latents F in the dictionary."""
    k: int = field(metadata=option("--k", shown=BY_SIZE, least=1))
    """Mean number of active latents a token; in a partition, of shared ones."""
    score_norm: ScoreNorm = flag("sum")
    """What a latent's value is multiplied by for selection: the sum of its two decoder norms, as published, or
    the joint norm. At equal energy the sum ranks a shared latent sqrt(2) above an exclusive one. `none` is what the
    published run did: there a drift of the norms changes what is selected."""
    method: Method = "batchtopk"
    """`batchtopk`: the k * batch largest scores of a batch are active. `l1`: every positive latent is, and the loss
    has an L1 penalty (Lindsey et al. 2024). `partition`: most latents have one decoder vector for both models,
    the last `n_delta` one for each. `dedicated`: a crosscoder in which either model has latents of its own, which
    neither read nor write the other. `difference-sae`: a BatchTopK autoencoder of x[1] - x[0], decoder of unit norm.
    `stagewise-sae`: an autoencoder of the instruct model that is then trained on with the fine-tuned one."""
    n_delta: int = flag(0, "--delta-latents", shown="a quarter, in a partition")
    """Latents of a partition that tell the models apart; they are the last ones."""
    k_delta: int = flag(0, "--delta-k", shown="a quarter of k, in a partition")
    """Mean number of active delta latents a token."""
    reserved_share: float = flag(0.0, "--reserved", metavar="SHARE", shown="0.05 for dedicated")
    """Share of the latents, and of k, that dedicated reserves for each of the two models; the rest is shared."""

    def __post_init__(self) -> None:
        check_bounds(self)
        _require(self.d_model >= 1, f"d_model must be at least 1, not {self.d_model}")
        _require(self.k <= self.n_latents, f"--k ({self.k}) is more than the {self.n_latents} latents")
        _require_choices(self)
        if self.method == "dedicated":
            _require(
                0 < self.reserved_share < 0.5 and 1 <= self.n_reserved < self.n_latents / 2,
                "--reserved must be above 0 and below 0.5, and leave a latent to each model and some shared, of "
                f"{self.n_latents}; it is {self.reserved_share}",
            )
        else:
            _require(self.reserved_share == 0, f"--reserved belongs to dedicated, not {self.method}")
        if self.method != "partition":
            _require(
                self.n_delta == self.k_delta == 0,
                "--delta-latents and --delta-k belong to partition alone",
            )
            return
        _require(
            0 < self.n_delta < self.n_latents,
            f"--delta-latents must be above 0 and below the {self.n_latents} latents, and is {self.n_delta}",
        )
        _require(
            0 < self.k_delta <= self.n_delta,
            f"--delta-k must be above 0 and at most the {self.n_delta} delta latents, and is {self.k_delta}",
        )
        _require(self.k <= self.n_shared, f"--k ({self.k}) is more than the {self.n_shared} shared latents")

    @property
    def n_inputs(self) -> int:
        """Vectors that a token enters with: one for each model, or their difference alone."""
        return 1 if self.method == "difference-sae" else N_MODELS

    @property
    def compares_models(self) -> bool:
        """Whether a latent has one value and a decoder vector for each model, so that norms say whose it is."""
        return self.method not in ("difference-sae", "stagewise-sae")

    @property
    def n_reserved(self) -> int:
        """Latents that are reserved for either model: none but in a dedicated feature crosscoder."""
        return round(self.reserved_share * self.n_latents)

    @property
    def n_shared(self) -> int:
        """Latents before the delta latents of a partition, and before those of either model in a dedicated feature
        crosscoder; of other methods all."""
        return self.n_latents - self.n_delta - 2 * self.n_reserved


@dataclass(frozen=True)
class TrainingConfig:
    """One training run over an activation store."""

    batch_size: int = flag(4096, "--step-tokens", metavar="TOKENS", shown=BY_SIZE, least=1)
    """Tokens a step, each with the activations of both models; over all processes."""
    epochs: float = flag(1.0, shown=BY_SIZE, above=0)
    """Passes over the training tokens; what does not fill a last batch is left out."""
    learning_rate: float = flag(5e-5, shown=BY_SIZE, above=0)
    """Learning rate between warm-up and decay."""
    warmup_fraction: float = flag(0.0, "--warmup", metavar="SHARE", least=0, below=1)
    """Share of the steps over which the learning rate rises linearly at the start: a share, so never longer than the
    run."""
    decay_fraction: float = flag(0.2, "--decay", metavar="SHARE", least=0, below=1)
    """Share of the steps, at the end, over which the learning rate falls towards 0; 0 keeps it constant."""
    decay: Decay = flag("linear", "--decay-shape")
    """Shape of that fall."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    max_grad_norm: float = 1.0
    reconstruction: Reconstruction = flag("mse", group="loss")
    """`mse`: squared error, summed over features and both models, mean over tokens; the quantity that explained
    variance is about. `l2`: its square root for each token and model, mean over both; tokens of a large norm
    weigh less. The two differ by a factor that changes what clipping at 1 and an auxiliary weight of 1/32 mean."""
    difference_weight: float | Literal["equal"] = flag(
        0.0, group="loss", metavar="LAMBDA", type=number_or_equal, shown="0; partition: equal"
    )
    """lambda on the squared error of the difference, |e[1] - e[0]|^2 (sum over features, mean over tokens). `equal`:
    the weight at which the models' sum and difference count alike, taken from the data."""
    l1_weight: float = flag(0.0, group="loss", shown="0; l1: 0.7", least=0)
    """L1 coefficient, on the sum over latents of value * (norm W_dec[j,0] + norm W_dec[j,1]), mean over tokens."""
    l1_warmup_fraction: float = 0.05
    """Share of the steps over which that coefficient rises from 0."""
    aux_weight: float = flag(1 / 32, group="loss", shown="1/32", least=0)
    """Weight of the auxiliary loss, which is about 1 at most; only dead latents receive its gradient."""
    aux_k: int | None = None
    """Dead latents a token that try to explain what is left over; None is half of d_model."""
    dead_after_tokens: int | None = None
    """A latent that was not selected for this many tokens is dead; None is a tenth of the run, 10 million at most."""
    draw_anew: bool = True
    """Whether latents that are never positive, which no loss can reach, are re-initialised."""
    anneal_k_from: int | None = flag(None, least=1)
    """k of the first step, from which it falls linearly to --k; needs --anneal."""
    anneal_fraction: float = flag(0.0, "--anneal", metavar="SHARE", shown="", least=0, below=1)
    """Share of the steps over which k falls from --anneal-k-from to --k; both are needed, so that k always arrives."""
    centre: bool = flag(False)
    """Whether each model's mean over the training tokens is taken off before scaling."""
    decoder_norm: float = flag(1.0, above=0)
    """Norm of every decoder vector at the start, for each model."""
    directions: Directions = flag("alike")
    """Whether a latent starts with the same direction for both models, or with one drawn for each."""
    decoder_bias: Literal["zero", "median"] = flag("median")
    """Start of the decoder bias: 0, or the geometric median of each model's activations."""
    threshold_from_step: int = 10
    """Step after which the threshold follows the smallest selected score."""
    threshold_decay: float = 0.99
    """Decay of the running average of that score."""
    calibration_tokens: int = 131_072
    """Training tokens, at most, on which the threshold is set after the last step."""
    precision: Precision = flag("auto")
    """Number format of the matrix products: `auto` is bf16 on a GPU, fp32 on a CPU. Parameters and
    optimiser are fp32 always."""
    held_out_fraction: float = flag(0.1, "--held-out", metavar="SHARE", least=0, below=1)
    """Share of the documents, at least one, that are kept out of training for every reported figure."""
    split_seed: int = 0
    """Decides which documents are held out; apart from `seed`, so that seeds are compared on the same ones."""
    seed: int = flag(0)
    """Seed of the initial weights, the order of the tokens, and the latents that are re-initialised."""
    untrained: bool = False
    """Whether no step is taken: the dictionary as training would start, with scales, decoder bias and thresholds of
    the data. With the next one, set by names.CrosscoderChoice, as both are in the dictionary's name."""
    freeze_decoder: bool = False
    """Whether the decoder's vectors stay as they are at the start; encoder and biases are trained."""

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("threshold_from_step", "calibration_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(self.max_grad_norm > 0, f"max_grad_norm must be positive, not {self.max_grad_norm}")
        for name in ("threshold_decay", "l1_warmup_fraction"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        rising_and_falling = self.warmup_fraction + self.decay_fraction
        _require(rising_and_falling <= 1, f"warm-up and decay take {rising_and_falling} of the run; at most 1 is there")
        weight = self.difference_weight
        _require(weight == "equal" or weight >= 0, f"--difference-weight must not be negative, and is {weight}")
        for name in ("aux_k", "dead_after_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        _require(
            (self.anneal_k_from is not None) == (self.anneal_fraction > 0),
            "--anneal-k-from and --anneal need each other: with no steps to fall in, k would stay where it starts",
        )
        _require_choices(self)
        _require(not (self.untrained and self.freeze_decoder), "untrained and freeze_decoder exclude each other")

    def total_steps(self, n_tokens: int) -> int:
        """Full batches in `epochs` passes over `n_tokens` tokens, at least one; none where it is to be untrained. A
        method of several stages takes so many in each."""
        if self.untrained:
            return 0
        return max(1, int(self.epochs * n_tokens) // self.batch_size)

    def dead_window(self, n_tokens: int) -> int:
        """Tokens without a selection after which a latent is dead, in a run over `n_tokens` tokens."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(self.batch_size, min(10_000_000, int(self.epochs * n_tokens) // 10))


def check_together(crosscoder: CrosscoderConfig, training: TrainingConfig) -> None:
    """UserError where a training setting makes no sense for the method."""
    method = crosscoder.method
    if training.anneal_k_from is not None:
        _require(method != "l1", "l1 has no k to anneal")
        _require(
            crosscoder.k <= training.anneal_k_from <= crosscoder.n_shared,
            f"--anneal-k-from ({training.anneal_k_from}) must be from --k ({crosscoder.k}) to the number of latents "
            f"({crosscoder.n_shared})",
        )
    if method == "l1":
        _require(training.l1_weight > 0, "method l1 needs an --l1-weight above 0, else nothing makes it sparse")
    if method in ("difference-sae", "stagewise-sae"):
        a_method = f"a {method.removesuffix('-sae')} SAE"
        _require(training.difference_weight == 0, f"{a_method} has no difference term: it reads one vector at a time")
        _require(training.decoder_norm == 1, f"the decoder of {a_method} has unit norm; leave --decoder-norm at 1")
    if method == "stagewise-sae":
        _require(training.l1_weight == 0, "a stagewise SAE has no L1 term; leave --l1-weight at 0")
        _require(training.directions == "alike", "a stagewise SAE has one direction a latent: --directions alike")
    if method == "dedicated":
        _require(
            crosscoder.k * crosscoder.reserved_share * training.batch_size >= 1,
            f"{crosscoder.reserved_share} of k ({crosscoder.k}) is less than one active latent in a step of "
            f"{training.batch_size} tokens; raise --reserved or --k",
        )
    if method == "partition":
        _require(training.directions == "alike", "a partition's shared latents have one direction: --directions alike")


def from_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Read a config back from JSON; UserError for a field that this version does not know, or one that lacks."""
    names = {one.name for one in fields(kind)}
    unknown = sorted(set(values) - names)
    _require(not unknown, f"{source} has settings that this version does not know: {', '.join(unknown)}")
    arguments: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    check_types(kind, arguments, source)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"{source} does not describe a {kind.__name__}: {error}") from None


def check_types(kind: type, values: dict[str, Any], source: str) -> None:
    """UserError for a value, read from `source`, that is not of the type of its field in the dataclass `kind`."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        _require(name not in hints or _fits(value, hints[name]), f"{source}: {name} cannot be {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        of = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(of) and all(map(_fits, value, of))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind or hint) and not (hint is int and isinstance(value, bool))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_choices(config: CrosscoderConfig | TrainingConfig) -> None:
    """UserError where a field is none of the words that its type names."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            choices, value = get_args(hint), getattr(config, name)
            _require(value in choices, f"{name} is one of {', '.join(choices)}, not {value}")
