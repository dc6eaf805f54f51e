"""What inference.py's --steer and --ablate ask for, and the two models and the dictionary that it takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from crosscoder.names import ActivationChoice, CrosscoderChoice, choice_from_args
from finqa.evaluation.engines.serving import MODELS, Model
from finqa.evaluation.generation import Generate, GenerationConfig
from finqa.runtime.command_line import add_flags
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders, SplitOrAll

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.readers import Target
    from crosscoder.dictionaries.model import BatchTopKCrosscoder
    from crosscoder.interventions.halves import Pair


@dataclass(frozen=True)
class Steering:
    """What is done to which latents."""

    steer: dict[int, float]
    """Factor of each latent."""
    ablate: tuple[int, ...]
    half: Model | None
    """Whose decoder vectors; None is each model's own."""

    def __str__(self) -> str:
        of = [f"{latent}={factor:g}" for latent, factor in self.steer.items()]
        of += [f"{latent} ablated" for latent in self.ablate]
        return f"latents {', '.join(of)}" + (f", from the {self.half} model" if self.half else "")


STEER = """Turn latents up: FACTOR times a latent's mean value, where it is active, is added to its value at every token
but BOS. 1 adds what it adds where it is active, 0 changes nothing, below 0 pushes the other way. May be repeated"""
ABLATE = """Take out what latents add: their value becomes 0, or FACTOR times its mean for one that --steer names too.
May be repeated"""
FROM = "Whose decoder vectors both models are steered by (default: each model's own)"


def add_steering_flags(parser: argparse.ArgumentParser) -> None:
    """--steer, --ablate and --from, and the flags of train.py that say which dictionary the latents are of."""
    add = parser.add_argument_group("steering (both models, with it and without; not with vLLM)").add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--steer", **several, type=_factors, metavar="LATENT=FACTOR[,...]", help=STEER)
    add("--ablate", **several, type=_latents, metavar="LATENT[,...]", help=ABLATE)
    add("--from", dest="half", choices=MODELS, help=FROM)
    group = parser.add_argument_group("dictionary of the latents (as for train.py)")
    group.add_argument(
        "--activations-split",  # --split is that of the question
        dest="ActivationChoice.split",
        choices=get_args(SplitOrAll),
        default=argparse.SUPPRESS,
        help=f"Split of its activations (default: {ActivationChoice.split})",
    )
    add_flags(group, ActivationChoice, without=("split",))
    add_flags(group, CrosscoderChoice, without=("results_dir",))


def _factors(text: str) -> list[tuple[int, float]]:
    found = []
    for one in text.split(","):
        latent, equals, factor = one.partition("=")
        try:
            found.append((int(latent), float(factor if equals else "none")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{one!r} is not LATENT=FACTOR, such as 81=2") from None
    return found


def _latents(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of latents, such as 81 or 81,204") from None


def steering_from_args(args: argparse.Namespace) -> Steering | None:
    """None where neither --steer nor --ablate is given. UserError where a latent is steered twice."""
    steer = [one for each in args.steer for one in each]
    found = Steering(dict(steer), tuple(dict.fromkeys(i for each in args.ablate for i in each)), args.half)
    if len(found.steer) < len(steer):
        raise UserError("--steer names a latent twice; give each latent one factor")
    if found.steer or found.ablate:
        return found
    if args.half:
        raise UserError("--from says whose vectors --steer and --ablate use; give one of these, too")
    return None


@dataclass(frozen=True)
class SteeredPair:
    """Both models with the dictionary of the latents."""

    steering: Steering
    pair: Pair
    target: Target
    dictionary: BatchTopKCrosscoder
    means: Tensor
    """[2, latent], interventions.steering.active_means."""
    lengths: tuple[float, ...]
    """Mean length of what the site gives in either model."""

    def served(self, tokenizer: Any, config: GenerationConfig) -> Iterator[tuple[Model, Generate, bool]]:
        """Each model as it is, then steered (True); each is valid until the next."""
        from crosscoder.interventions.steering import steered
        from finqa.evaluation.engines.hugging_face_engine import hugging_face

        known, asked = (self.pair, self.target, self.dictionary, self.means), self.steering
        for model, side in zip(MODELS, self.pair, strict=True):
            with side.active():
                yield model, hugging_face(side.model, tokenizer, config), False
            with steered(*known, model, asked.steer, asked.ablate, asked.half) as changed:
                yield model, hugging_face(changed, tokenizer, config), True

    def says(self) -> list[str]:
        """A line for each latent: its mean value, and how long a vector that writes into each model."""
        from crosscoder.interventions.steering import half_vectors

        lines = []
        for latent in dict.fromkeys([*self.steering.steer, *self.steering.ablate]):
            mean, shares = self.means[:, latent], []
            for number, half in enumerate(MODELS):
                written = half_vectors(self.dictionary, number, [latent]).norm().cpu() * mean[number]
                shares.append(f"{float(written) / self.lengths[number]:.1%} in the {half} model")
            its = f"mean value {float(mean[1]):.3g} where active, which adds {' and '.join(shares)}"
            its = its if not mean.isnan().any() else "active on no token of the activations"
            lines.append(f"latent {latent}: {its}")
        return [*lines, "(as shares of the mean length of the site's output)"]


def open_steered_pair(args: argparse.Namespace, steering: Steering) -> SteeredPair:
    """Open what the flags name. UserError where a dictionary, its activations or a model is missing, and where a latent
    cannot be steered so (interventions.steering.check_steering)."""
    import torch

    from crosscoder.extra_analyses import load_pair
    from crosscoder.interventions.splicing import target_of
    from crosscoder.interventions.steering import active_means, check_steering
    from crosscoder.opening import open_crosscoder_of

    opened = open_crosscoder_of(args)
    latents = [i for i in (*steering.steer, *steering.ablate) if i in range(opened.model.config.n_latents)]
    raw = (rows for _, rows in opened.store.batches(torch.arange(len(opened.store)), what="means of latents, tokens"))
    means = active_means(opened.model, raw, latents)
    check_steering(opened.model, means, steering.steer, steering.ablate, steering.half)
    pair = load_pair(opened.store, choice_from_args(args), Folders.from_args(args))
    # c_m, what activations are scaled by, is sqrt(d_model) over their mean length.
    lengths = tuple(opened.store.config.d_model**0.5 / scale for scale in opened.store.config.activation_scales)
    return SteeredPair(steering, pair, target_of(opened.store), opened.model, means, lengths)
