"""The flags of train.py that say which dictionary is trained, and how."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args

from crosscoder.dictionaries import config as settings
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """--method, --preset, and a flag for each setting.

    Its `dest` is a field of CrosscoderConfig or TrainingConfig; what is not given is not in the namespace.
    """
    parser.add_argument("--method", choices=get_args(settings.Method), default="batchtopk", help="(default: batchtopk)")
    parser.add_argument("--preset", choices=("published",), help="settings of the published run")

    def flag(group: argparse._ArgumentGroup, name: str, field: str, **options: Any) -> None:
        group.add_argument(name, dest=field, default=argparse.SUPPRESS, **options)

    group = parser.add_argument_group("dictionary")
    flag(group, "--latents", "n_latents", type=int, help="size of the dictionary")
    flag(group, "--k", "k", type=int, help="mean number of active latents a token (of shared ones in a partition)")
    flag(group, "--score-norm", "score_norm", choices=get_args(settings.ScoreNorm), help="(default: sum)")
    flag(group, "--delta-latents", "n_delta", type=int, help="of a partition (default: a quarter)")
    flag(group, "--delta-k", "k_delta", type=int, help="mean number of active ones (default: a quarter of k)")
    group = parser.add_argument_group("loss")
    flag(group, "--reconstruction", "reconstruction", choices=get_args(settings.Reconstruction), help="(default: mse)")
    flag(
        group,
        "--difference-weight",
        "difference_weight",
        type=number_or_equal,
        metavar="LAMBDA",
        help="of the difference's error, or `equal` (default: 0; partition: equal)",
    )
    flag(group, "--l1-weight", "l1_weight", type=float, help="price of values (default: 0; l1: 0.7)")
    flag(group, "--aux-weight", "aux_weight", type=float, help="of the auxiliary loss (default: 1/32)")
    group = parser.add_argument_group("training")
    flag(group, "--step-tokens", "batch_size", type=int, help="tokens a step, over all processes")
    flag(group, "--epochs", "epochs", type=float, help="passes over the training tokens")
    flag(group, "--learning-rate", "learning_rate", type=float)
    flag(group, "--warmup", "warmup_fraction", type=float, help="share of the steps (default: 0)")
    flag(group, "--decay", "decay_fraction", type=float, help="share of the steps at the end (default: 0.2)")
    flag(group, "--decay-shape", "decay", choices=get_args(settings.Decay), help="(default: linear)")
    flag(group, "--anneal-k-from", "anneal_k_from", type=int, help="k of the first step; needs --anneal")
    flag(group, "--anneal", "anneal_fraction", type=float, help="share of the steps over which k falls to --k")
    flag(group, "--centre", "centre", action="store_true", help="take each model's mean off its activations")
    flag(group, "--decoder-norm", "decoder_norm", type=float, help="at the start (default: 1)")
    flag(group, "--directions", "directions", choices=get_args(settings.Directions), help="start (default: alike)")
    flag(group, "--decoder-bias", "decoder_bias", choices=("zero", "median"), help="at the start (default: median)")
    flag(group, "--precision", "precision", choices=get_args(settings.Precision), help="(default: auto)")
    flag(group, "--held-out", "held_out_fraction", type=float, help="share of documents (default: 0.1)")
    flag(group, "--seed", "seed", type=int, help="(default: 0)")


def number_or_equal(text: str) -> float | str:
    """A weight, or `equal`."""
    return text if text == "equal" else float(text)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by the names of their fields."""
    names = {field.name for kind in (CrosscoderConfig, TrainingConfig) for field in fields(kind)} - {"method"}
    return {name: value for name, value in vars(args).items() if name in names}
