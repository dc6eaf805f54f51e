"""The table of docs/models.md: families whose tiny random models train, reply, are recorded and merge exactly.

`python tests/finqa/models/test_supported_models.py` writes the table.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_parts import SETTINGS, examples, teacher_row

from crosscoder.activations.readers import Target, adapter_readers
from crosscoder.analysis.lens import promoted_tokens, read_unembedding
from crosscoder.names import SITES
from finqa.evaluation.engines.hugging_face_engine import hugging_face
from finqa.evaluation.generation import GenerationConfig
from finqa.models.merging import merge
from finqa.models.settings import ATTENTION
from finqa.models.students import StudentRun, load_adapter, load_base, load_tokenizer
from finqa.runtime import figures
from finqa.runtime.errors import UserError
from finqa.runtime.memory.needs import sizes
from finqa.runtime.paths import REPOSITORY
from finqa.training.rows import collator
from finqa.training.trainable import Speed, loss_on_completion, made_trainable

TABLE = REPOSITORY / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"

FAMILIES = {
    "llama": "Llama 2 and 3, SmolLM2, Orca 2",
    "mistral": "Mistral 7B, pocket-mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 1B",
    "granite": "Granite 3",
    "cohere": "Command R",
    "cohere2": "Command R7B",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM 2",
    "smollm3": "SmolLM3",
    "glm": "GLM-4",
    "glm4": "GLM-4-0414",
    "exaone4": "EXAONE 4",
    "helium": "Helium",
    "nemotron": "Nemotron, Minitron",
    "ernie4_5": "ERNIE 4.5",
    "seed_oss": "Seed-OSS",
    "hunyuan_v1_dense": "Hunyuan dense",
    "arcee": "Arcee AFM",
    "apertus": "Apertus",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3 30B-A3B",
}
"""Model type of transformers, and models of that family."""
QUICK = ("llama", "phi3", "gemma2", "granite", "cohere")
"""Those that the fast tests have: plain, fused, capped and scaled."""
NOT_PATCHED = ("cohere", "cohere2", "gemma2", "gemma3_text", "olmo3")
"""Those whose layers patches cannot call one by one: `analyse.py --causal` refuses them."""
FUSED = {"phi3": ("qkv_proj", "o_proj")}


def tiny_model(kind: str, tiny_student: Path, folder: Path) -> Path:
    """A random two-layer model of a family with the tiny student's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_student, folder)
    own = json.loads((folder / "config.json").read_text())
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    wanted = {name: own[name] for name in shared} | experts | {"head_dim": 16, "initializer_range": 0.1}
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{name: wanted[name] for name in wanted if hasattr(known, name)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def modules(kind: str) -> tuple[str, ...]:
    return FUSED.get(kind, ATTENTION)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_a_family_trains_with_its_own_loss_replies_is_recorded_and_merges_exactly(
    kind: str, tiny_student: Path, tmp_path: Path
):
    import torch

    folder = tiny_model(kind, tiny_student, tmp_path / kind)
    run = StudentRun("FinQA-mini", str(folder), replace(SETTINGS, lora_modules=modules(kind), lora_dropout=0.0))
    base: Any = load_base(run.model, torch.float32)
    assert set(modules(kind)) <= set(sizes(base.config).linear)
    tokenizer = load_tokenizer(run.model)
    batch = collator(3)(examples([teacher_row(1), teacher_row(2, padding=5)], tokenizer))
    del batch["n_tokens"]
    with torch.no_grad():
        own_loss = base(**batch).loss.item()
    model: Any = made_trainable(base, run, Speed())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == set(modules(kind))
    optimiser = torch.optim.AdamW(trained.values(), lr=2e-2)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(own_loss, rel=1e-5) and losses[-1] < losses[0]
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(student := tmp_path / "student", save_embedding_layers=False)

    ids = batch["input_ids"][:1]
    plain: Any = load_base(run.model, torch.float32)
    with torch.no_grad():
        of_base = plain(input_ids=ids).logits
    layer = plain.config.num_hidden_layers  # in a first layer an MLP beside attention knows nothing of the adapter
    pair: Any = load_adapter(plain, student).eval()
    instruct, fine_tuned = adapter_readers(pair, [Target(layer, site) for site in SITES], "hooks")
    with torch.no_grad():
        assert all(not a.equal(b) for a, b in zip(instruct(ids), fine_tuned(ids), strict=True))
        with pair.disable_adapter():
            torch.testing.assert_close(pair(input_ids=ids).logits, of_base)
        of_pair = pair(input_ids=ids).logits
    config = GenerationConfig(vllm=False, max_new_tokens=4, batch_size=2)
    [(_, reply)] = hugging_face(pair, tokenizer, config)([ids[0].tolist()])
    assert reply.n_new_tokens >= 1

    merge(run.model, student, tmp_path / "merged")
    with torch.no_grad():
        of_merged = load_base(str(tmp_path / "merged"), torch.float32)(input_ids=ids).logits
    assert (of_pair - of_base).abs().max() > 1e-3
    torch.testing.assert_close(of_merged, of_pair, rtol=1e-3, atol=1e-3)


def logits_of(model: Any, hidden: Any) -> Any:
    """What the model's own last normalisation and head give."""
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_two_models_of_a_family_are_compared_on_texts_of_ones_own(
    kind: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No data set: collect, train a few steps, analyse with its causal figure; the logit lens is the model's own."""
    import analyse
    import collect_activations
    import torch
    import train

    base, tuned = (tiny_model(kind, tiny_student, tmp_path / name) for name in ("base", "tuned"))
    torch.manual_seed(1)
    model: Any = load_base(str(base), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tuned)
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(f"net sales rose {i} and then costs fell by {i % 7} in the year ." for i in range(12)))
    # Figures are the same for every family, and to draw them takes half of this test: others do.
    monkeypatch.setattr(figures, "image_of", lambda *_: b"")
    places = ("--data-dir", tmp_path, "--results-dir", tmp_path / "results")
    pair = ("--base", base, "--fine-tuned", tuned, "--text", text, "--name", "mine", "--layer", "2", *places[:2])
    small = ("--latents", "32", "--k", "2", "--epochs", "1")
    for script, words in (
        (collect_activations, pair),
        (train, ("mine", *small, *places)),
        (analyse, ("mine", "--causal", "1", *places)),
    ):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
        try:
            script.main()
        except UserError as error:
            assert script is analyse and kind in NOT_PATCHED and "patches" in str(error)
    results = tmp_path / "results" / "mine-layer2-mlp-1024_batchtopk"
    found = json.loads((results / "analysis.json").read_text())
    assert found["latents"]["n"] == 32 and found["activations"]["pair"]["models"]["fine_tuned"] == tuned.name
    assert {"dashboard.html", "latents.csv"} <= {path.name for path in results.iterdir()}
    assert (results / "causal.csv").exists() == (kind not in NOT_PATCHED)

    own: Any = load_base(str(base), torch.float32)
    unembedding = read_unembedding(str(base), own.config.vocab_size)
    hidden = torch.randn(4, own.config.hidden_size)
    with torch.no_grad():
        expected = logits_of(own, hidden).topk(5).indices.tolist()
    assert promoted_tokens(hidden, unembedding, 5) == list(map(tuple, expected))


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "bloom"])
def test_families_that_are_built_otherwise_have_their_own_loss(kind: str, tiny_student: Path, tmp_path: Path):
    import torch

    folder = str(tiny_model(kind, tiny_student, tmp_path / kind))
    model: Any = load_base(folder, torch.float32)
    batch = collator(3)(examples([teacher_row(1), teacher_row(2, padding=5)], load_tokenizer(folder)))
    del batch["n_tokens"]
    with torch.no_grad():
        own_loss = model(**batch).loss.item()
        loss_on_completion(model)
        assert model(**batch).loss.item() == pytest.approx(own_loss, rel=1e-5)


def table() -> str:
    rows = [f"| {named} | `{kind}` | `{' '.join(modules(kind))}` |\n" for kind, named in FAMILIES.items()]
    return "| Models | `model_type` | Modules that get an adapter |\n| --- | --- | --- |\n" + "".join(rows)


def test_the_table_in_the_documents_is_that_of_the_tests():
    assert TABLE.read_text().partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    head, _, rest = TABLE.read_text().partition(BEGIN)
    TABLE.write_text(head + BEGIN + table() + END + rest.partition(END)[2])
