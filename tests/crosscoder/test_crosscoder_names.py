"""Names of activation sets and crosscoders, the default layer, and what is sized to the data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from crosscoder.names import (
    ActivationChoice,
    CrosscoderChoice,
    add_activation_flags,
    choices_from_args,
    crosscoder_folder,
    default_layer,
    model_depth,
    name_of_method,
)
from crosscoder.repositories import find_folder
from crosscoder.training.sizing import default_batch, default_k, default_latents, sized_configs
from finqa.models.hub import repository_name
from finqa.models.students import DEFAULT_MODEL, StudentRun, settings_for
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders, write_atomically


def choice(
    model: str = DEFAULT_MODEL, run_name: str = "", dataset: str = "FinQA", layer: int | None = 17, **options: Any
) -> ActivationChoice:
    student = StudentRun(dataset, model, settings_for(model), run_name=run_name)
    return ActivationChoice(student, layer=layer, **options)


SEVEN_B = "mistralai_Mistral-7B-Instruct-v0.3-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, f"{SEVEN_B}-FinQA-test-layer17-mlp-1024"),
        ({"site": "residual", "layer": 3, "num_samples": 50}, f"{SEVEN_B}-FinQA-test-layer3-residual-50"),
        ({"raw": True, "merged": True, "keep_bos": True}, f"{SEVEN_B}-FinQA-test-layer17-mlp-1024-raw-merged-bos"),
        ({"keep_outliers": True}, f"{SEVEN_B}-FinQA-test-layer17-mlp-1024-outliers"),
        ({"split": "dev", "dataset": "FinQA-mini"}, f"{SEVEN_B}-FinQA-mini-dev-layer17-mlp-1024"),
        ({"against": "sham"}, f"{SEVEN_B}-FinQA-test-layer17-mlp-1024-against-sham"),
        (
            {"against": "", "run_name": "seed-4"},
            f"{SEVEN_B}-seed-4-FinQA-test-layer17-mlp-1024-against-unnamed",
        ),
    ],
)
def test_an_activation_sets_name_says_what_was_recorded(options, name):
    assert choice(**options).name == name


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        ([], [(None, "mlp")]),
        (["--layer", "3", "4"], [(3, "mlp"), (4, "mlp")]),
        (["--site", "residual", "mlp"], [(None, "residual"), (None, "mlp")]),
        (
            ["--layer", "9", "2", "9", "--site", "mlp", "attention"],
            [(layer, s) for layer in (9, 2) for s in ("mlp", "attention")],
        ),
    ],
)
def test_several_layers_and_sites_are_a_choice_each(words, pairs):
    parser = argparse.ArgumentParser()
    add_activation_flags(parser, several=True)
    choices = choices_from_args(parser.parse_args(["FinQA-mini", "pocket-mistral", "--raw", *words]))
    assert [(one.layer, one.site) for one in choices] == pairs
    assert all(one.raw and one.student.dataset == "FinQA-mini" for one in choices)


def test_one_layer_and_site_are_all_that_a_crosscoder_is_trained_on(capsys):
    parser = argparse.ArgumentParser()
    add_activation_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["FinQA-mini", "pocket-mistral", "--layer", "3", "4", "5"])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (choice(), "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_1k_samples_batchtopk"),
        (choice(num_samples=2048), "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_2k_samples_batchtopk"),
        (choice(num_samples=800), "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_800_samples_batchtopk"),
        (choice(run_name="sham"), "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_1k_samples_batchtopk-sham"),
        (choice(against="sham"), "Mistral-7B-Instruct-v0.3-FinQA-layer17-mlp_1k_samples_batchtopk-against-sham"),
        (choice("pocket-mistral"), "pocket-mistral-FinQA-layer17-mlp_1k_samples_batchtopk"),
    ],
)
def test_a_crosscoders_name_follows_from_model_and_activations(asked, name):
    assert asked.crosscoder_name == name


CHANGES: tuple[dict[str, Any], ...] = (
    {"dataset": "FinQA-mini"}, {"layer": 16}, {"site": "residual"}, {"split": "dev"}, {"raw": True},
    {"keep_bos": True}, {"keep_outliers": True}, {"merged": True}, {"against": "sham"}, {"num_samples": 512},
)  # fmt: skip


def test_crosscoders_of_different_activations_have_different_names():
    names = [choice(**change).crosscoder_name for change in ({}, *CHANGES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", ["batchtopk", "l1"])
def test_a_crosscoder_under_its_earlier_default_name_is_found_for_its_own_activations_alone(tmp_path: Path, method):
    folders, asked, named = Folders(tmp_path), choice(), CrosscoderChoice(method)
    earlier = f"Mistral-7B-Instruct-v0.3_1k_samples_{method}"
    facts = {"dataset": "FinQA", "split": "test", "layer": 17, "site": "mlp", "raw": False, "keep_bos": False}
    config = {"activations": {**facts, "model_id": asked.student.model_id}}
    write_atomically(crosscoder_folder(folders, earlier) / "config.json", json.dumps(config))
    assert named.name_on(asked, folders) == earlier
    for change in CHANGES[:4]:
        assert named.name_on(choice(**change), folders) == name_of_method(choice(**change).crosscoder_name, method)
    assert CrosscoderChoice(method, "mine").name_on(asked, folders) == "mine"
    new = name_of_method(asked.crosscoder_name, method)
    write_atomically(crosscoder_folder(folders, new) / "config.json", "{}")
    assert named.name_on(asked, folders) == new


@pytest.mark.parametrize(("depth", "layer"), [(32, 17), (5, 3), (2, 1), (1, 1), (40, 21), (80, 42)])
def test_the_default_layer_is_17_of_32_or_the_nearest_share_of_the_depth(depth, layer):
    assert default_layer(depth) == layer


def test_the_depth_is_read_from_the_models_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 5}))
    assert model_depth(str(tmp_path)) == 5
    assert choice(str(tmp_path), layer=None).resolved_layer == 3


def test_two_adapters_are_no_pair_of_merged_models():
    with pytest.raises(UserError, match="leave out --merged"):
        choice(against="sham", merged=True)


def test_the_command_says_which_fine_tune_is_in_the_base_models_place():
    assert choice(against="").command("train.py").endswith("--against ''")


def test_a_model_that_is_nowhere_asks_for_the_layer():
    with pytest.raises(UserError, match="say --layer"):
        model_depth("nobody/no-such-model")


def test_a_name_too_long_for_the_hub_is_cut_and_stays_unique():
    names = [choice(num_samples=n).name for n in (1024, 2048)]
    assert all(len(name) > 96 for name in names)
    assert [len(repository_name(name)) for name in names] == [96, 96]
    assert repository_name(names[0]) != repository_name(names[1])
    assert repository_name("short") == "short"


def test_a_missing_folder_names_both_places_and_the_command(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    asked = choice(site="residual")
    with pytest.raises(UserError) as error:
        find_folder(tmp_path / "set", asked.student, "set", asked.command("collect_activations.py"))
    assert str(tmp_path / "set") in str(error.value)
    assert "on the Hub" in str(error.value)
    names = "FinQA mistralai/Mistral-7B-Instruct-v0.3 --layer 17 --site residual"
    command = f"python crosscoder-model-diff/collect_activations.py {names}"
    assert str(error.value).endswith(f"make it with: {command}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "--num-samples must be at least 2"),
        ({"layer": 0}, "--layer must be at least 1"),
        ({"site": "head"}, "--site is one of attention, mlp, residual"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        choice(**options)


def test_the_published_dictionary_is_the_default_at_the_published_size():
    assert (default_latents(4096, 1_260_000), default_k(16_384), default_batch(16_384)) == (16_384, 100, 4096)


def test_the_pocket_dictionary_is_sized_to_its_width_and_data():
    crosscoder, training = sized_configs(d_model=256, n_tokens=180_000)
    assert 512 <= crosscoder.n_latents <= 1024
    assert 16 <= crosscoder.k <= 32
    assert training.total_steps(180_000) >= 1000


def test_what_is_given_stands():
    crosscoder, training = sized_configs(
        256, 180_000, n_latents=300, k=7, batch_size=64, epochs=0.5, learning_rate=1e-2, seed=4
    )
    assert (crosscoder.n_latents, crosscoder.k) == (300, 7)
    assert (training.batch_size, training.epochs, training.learning_rate, training.seed) == (64, 0.5, 1e-2, 4)


def test_the_command_that_makes_a_merged_model_has_flags_of_merging_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from crosscoder.activations.recorded_inputs import find_fine_tuned

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student = StudentRun("FinQA-mini", "pocket-mistral", settings_for("pocket-mistral"), run_name="b", grad_accum=2)
    choice = ActivationChoice(student, layer=3, site="residual", num_samples=8, split="dev", raw=True, merged=True)
    with pytest.raises(UserError) as refusal:
        find_fine_tuned(choice, Folders(data=tmp_path))
    command = f"merge_and_push_lora.py FinQA-mini pocket-mistral -GA 2 --run-name b --data-dir {tmp_path}"
    assert str(refusal.value).endswith(command)


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ({}, "_1k_samples_dedicated"),
        ({"untrained": True}, "_1k_samples_dedicated-untrained"),
        ({"freeze_decoder": True}, "_1k_samples_dedicated-frozen-decoder"),
    ],
)
def test_the_form_of_a_dictionary_is_in_its_default_name(form, ending, tmp_path: Path):
    named = CrosscoderChoice(method="dedicated", **form)
    assert named.name_on(choice(), Folders(data=tmp_path)).endswith(ending)


def test_the_two_forms_exclude_each_other():
    with pytest.raises(UserError, match="--untrained takes no step"):
        CrosscoderChoice(untrained=True, freeze_decoder=True)
