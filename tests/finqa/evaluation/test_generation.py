from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finqa.evaluation.adapter_check import compare
from finqa.evaluation.engines.caches import ROOM, RoomyLayer, Shared, laid_out, shared_beginnings
from finqa.evaluation.engines.hugging_face_engine import GROUPED, GumbelNoise, decode_by_groups, hugging_face
from finqa.evaluation.engines.serving import MODELS, check_backend, served_models
from finqa.evaluation.engines.vllm_engine import EngineArguments, vllm_engine
from finqa.evaluation.evaluate import EvaluationConfig
from finqa.evaluation.generation import Generate, GenerationConfig, Reply, all_replies, cut_at_stop
from finqa.models.fidelity import AGREEMENT
from finqa.models.settings import StudentSettings, settings_for
from finqa.models.students import StudentRun, load_base, load_tokenizer, prompt_ids
from finqa.models.weights import weights_hash
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.datasets import dataset
from finqa.task.program_compiler import to_python
from finqa.task.prompts import training_prompt
from finqa.task.records import TeacherRow, write_teacher_rows
from finqa.training.fine_tuning import TrainingConfig, fine_tune

CONFIG = GenerationConfig(vllm=False, max_new_tokens=12, batch_size=4)


@pytest.fixture(scope="module")
def run(tiny_student: Path) -> StudentRun:
    return StudentRun(dataset="FinQA-mini", model=str(tiny_student), settings=StudentSettings())


@pytest.fixture(scope="module")
def prompts(tiny_student: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(str(tiny_student))
    texts = [f"net sales in {year} " + "and what ? " * (year % 5) for year in range(2000, 2020)]
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def adapter(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter, large enough to change every reply."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(load_base(str(tiny_student), torch.float32), lora).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"base_hash": weights_hash(tiny_student)}))
    return folder


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ans = 1\n###End Python\nmore", "ans = 1\n###End Python"),
        ("```python\nans = 1\n```\nmore ###End Python", "```python\nans = 1\n```\n"),
        ("```python\nans = 1", "```python\nans = 1"),
        ("", ""),
    ],
)
def test_a_reply_ends_with_its_first_stop_string(text: str, kept: str):
    assert cut_at_stop(text, CONFIG.stop) == kept


def test_batched_and_padded_replies_are_those_of_prompts_asked_one_by_one(tiny_student: Path, prompts: list[list[int]]):
    import torch

    # fp32: in bf16 a random model has near-ties that flip with the shape of the batch.
    model = load_base(str(tiny_student), torch.float32)
    tokenizer = load_tokenizer(str(tiny_student))
    together = all_replies(hugging_face(model, tokenizer, CONFIG), prompts)
    alone = [all_replies(hugging_face(model, tokenizer, CONFIG), [prompt])[0] for prompt in prompts]
    assert together == alone
    assert [reply.n_prompt_tokens for reply in together] == [len(prompt) for prompt in prompts]


def test_query_heads_that_share_keys_give_the_logits_of_sdpa(
    tiny_student: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    import torch
    from transformers.integrations import sdpa_attention

    model = load_base(str(tiny_student), torch.float32)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings: Any = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def logits() -> torch.Tensor:
        return torch.stack(model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings).logits)

    by_sdpa = logits()
    decode_by_groups(model)
    assert model.config._attn_implementation == GROUPED
    own, tokens = sdpa_attention.sdpa_attention_forward, []

    def watched(module: Any, query: Any, *given: Any, **settings: Any) -> Any:
        tokens.append(query.shape[2])
        return own(module, query, *given, **settings)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    torch.testing.assert_close(logits(), by_sdpa, rtol=0, atol=1e-5)
    assert tokens == [longest] * model.config.num_hidden_layers  # the prompts alone


PAGE, OTHER = list(range(100, 140)), list(range(200, 230))


@pytest.mark.parametrize(
    ("prompts", "lengths", "rows"),
    [
        # Two pages in any order, and the tokens that they share themselves.
        ([[1, *PAGE, 7], [1, *OTHER, 8, 9], [1, *PAGE, 7, 8], [1, *OTHER, 5]], [41, 31], [0, 1, 0, 1]),
        # Samples of one prompt: the last token is read for each.
        ([[1, *PAGE]] * 3, [40], [0, 0, 0]),
        # A prompt by itself is divided where the others are.
        ([[1, *PAGE, 7], [1, *PAGE, 8], [1, *PAGE, 9], [2, *PAGE, 9, 9]], [41, 41], [0, 0, 0, 1]),
        # What all begin with is more than what some share besides.
        ([[1, *PAGE, a, b] for a in (5, 6) for b in (7, 8)], [41], [0, 0, 0, 0]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], None, None),
        ([[1], [1], [1]], None, None),
        ([[1, *PAGE]], None, None),
    ],
)
def test_prompts_are_divided_by_what_they_begin_with(prompts: list[list[int]], lengths: Any, rows: Any):
    shared = shared_beginnings(prompts)
    assert shared == (None if lengths is None else Shared(lengths, rows))


@pytest.mark.parametrize(
    ("labels", "lengths", "rows"),
    [
        ([0, 0, 0, 0], [41], [0, 0, 0, 0]),
        ([0, 1, 0, 1], [41, 41], [0, 1, 0, 1]),
        # One by itself is divided where the others are, though it begins as they do.
        ([0, 0, 0, 5], [41, 41], [0, 0, 0, 1]),
        ([0, 1, 2, 3], None, None),
    ],
)
def test_prompts_of_different_labels_share_no_beginning(labels: list[int], lengths: Any, rows: Any):
    shared = shared_beginnings([[1, *PAGE, last] for last in (7, 8, 9, 10)], labels)
    assert shared == (None if lengths is None else Shared(lengths, rows))


def test_many_labels_share_within_each_as_one_does_alone():
    prompts = [[1, *page, last] for page in (PAGE, OTHER, PAGE[::-1]) for last in range(5)]
    alone = shared_beginnings(prompts)
    together = shared_beginnings(prompts * 8, [label for label in range(8) for _ in prompts])
    assert alone is not None and together is not None
    assert sorted(together.lengths) == sorted(alone.lengths * 8)
    assert len({(row, place // len(prompts)) for place, row in enumerate(together.rows)}) == len(together.lengths)


@pytest.mark.parametrize("begin_alike", [True, False])
def test_the_cache_of_every_call_says_the_labels_of_its_rows(
    tiny_student: Path, prompts: list[list[int]], begin_alike: bool
):
    """Made up: a prompt's second token says its label."""
    import torch

    model, tokenizer = load_base(str(tiny_student), torch.float32), load_tokenizer(str(tiny_student))
    labels = [2, 0, 1, 0, 2, 1, 2]
    page = prompts[4] * 3 if begin_alike else []
    asked = [[1, 300 + label, *page, *prompts[n][: 9 - n]] for n, label in enumerate(labels)]
    calls: list[tuple[Any, Any]] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((kwargs["input_ids"], kwargs["past_key_values"].labels))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    for _ in hugging_face(model, tokenizer, replace(CONFIG, batch_size=5), labels)(asked):
        pass
    whole = [[300 + int(label) in row for row, label in zip(ids.tolist(), its, strict=True)] for ids, its in calls
             if ids.shape[1] > 9 or (not begin_alike and ids.shape[1] > 1)]  # fmt: skip
    assert len(whole) == 2 and all(map(all, whole))
    steps = [its.tolist() for ids, its in calls if ids.shape[1] == 1]
    assert {tuple(its) for its in steps} == {(0, 0, 1, 1, 2), (2, 2)} and len(steps) > 4
    calls.clear()
    all_replies(hugging_face(model, tokenizer, CONFIG), asked[:2])
    assert {its for _, its in calls} == {None}


@pytest.mark.parametrize("begin_alike", [True, False])
def test_keys_and_values_take_the_room_that_a_batch_needs_and_no_more(tiny_student: Path, begin_alike: bool):
    import torch

    model, new = load_base(str(tiny_student), torch.float32), 6
    asked = [[1, *PAGE, *OTHER[:n]] if begin_alike else [n, *PAGE] for n in range(3, 7)]
    laid = laid_out(model, asked, 0)
    assert (laid.begun is not None) == begin_alike
    places = set()
    with torch.no_grad():
        cache: Any = laid.read(model, new)
        ids = laid.ids[:, cache.get_seq_length() :]
        for step in range(1 + new):
            mask = torch.nn.functional.pad(laid.mask, (0, step), value=1)
            model(input_ids=ids[:, :1] if step else ids, attention_mask=mask, past_key_values=cache)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1  # never copied
    assert {tuple(room.shape) for layer in cache.layers for room in layer.rooms} == {
        (4, 2, laid.ids.shape[1] + new, 32)
    }


def test_a_layer_grows_beyond_the_room_that_was_asked_for():
    import torch

    layer, given = RoomyLayer(7), torch.randn(2, 1, 3, 5, 4)
    layer.update(given[0], given[1])
    keys, _ = layer.update(given[0], given[1])
    assert torch.equal(keys, torch.cat([given[0], given[0]], dim=2)) and layer.rooms[0].shape[2] == 10 + ROOM


def test_a_layer_with_room_holds_what_transformers_own_holds():
    import torch
    from transformers.cache_utils import DynamicLayer

    torch.manual_seed(0)
    own, roomy = DynamicLayer(), RoomyLayer()
    kept, copies = None, 0
    for new in (5, 1, 1, ROOM, 1, "select", 1, 1, "crop", 2, 1):
        if new == "select":
            for layer in (own, roomy):
                layer.batch_select_indices(torch.tensor([1, 0, 1]))
        elif new == "crop":
            for layer in (own, roomy):
                layer.crop(-3)
        else:
            given = torch.randn(2, len(own.keys) if own.is_initialized else 2, 3, new, 4)
            expected, found = (layer.update(given[0], given[1]) for layer in (own, roomy))
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
            assert roomy.get_seq_length() == own.get_seq_length()
            copies += found[0].data_ptr() != kept
            kept = found[0].data_ptr()
    assert copies == 3  # the first, where room ends, after the selection


def test_replies_of_shared_beginnings_are_those_of_whole_prompts(tiny_student: Path, prompts: list[list[int]]):
    import torch

    model, tokenizer = load_base(str(tiny_student), torch.float32), load_tokenizer(str(tiny_student))
    pages = [prompts[0] * 3, prompts[1] * 4, prompts[4] * 2]
    asked = [page + prompt[: 2 + 3 * number] for page in pages for number, prompt in enumerate(prompts[:4])]
    config = replace(CONFIG, batch_size=12)
    read = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )  # fmt: skip
    together = all_replies(hugging_face(model, tokenizer, config), asked)
    assert sum(read[:2]) < 0.6 * 12 * max(map(len, asked))
    assert together == [all_replies(hugging_face(model, tokenizer, config), [prompt])[0] for prompt in asked]


def talkative(generate: Generate, prompts: list[list[int]]) -> tuple[list[int], Reply]:
    """A prompt whose reply uses up the limit in plain letters, and that reply."""
    replies = zip(prompts, all_replies(generate, prompts), strict=True)
    return next((p, r) for p, r in replies if r.finish_reason == "length" and len(r.text) > 8 and r.text.isascii())


def test_a_reply_stops_at_a_stop_string_and_counts_its_own_tokens_alone(tiny_student: Path, prompts: list[list[int]]):
    import torch

    model, tokenizer = load_base(str(tiny_student), torch.float32), load_tokenizer(str(tiny_student))
    prompt, whole = talkative(hugging_face(model, tokenizer, CONFIG), prompts)
    stop = whole.text[3:7]
    config = GenerationConfig(vllm=False, max_new_tokens=12, batch_size=4, stop=(stop,))
    stopped = all_replies(hugging_face(model, tokenizer, config), [prompt, *prompts[:3]])[0]
    assert stopped.text == whole.text[: whole.text.index(stop) + len(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.n_new_tokens < whole.n_new_tokens == 12


def test_a_reply_that_ends_itself_counts_its_end_token(tiny_student: Path, prompts: list[list[int]]):
    import torch

    model, tokenizer = load_base(str(tiny_student), torch.float32), load_tokenizer(str(tiny_student))
    prompt, whole = talkative(hugging_face(model, tokenizer, CONFIG), prompts)
    ids = tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = ids[3]
    reply = all_replies(hugging_face(model, tokenizer, CONFIG), [prompt, *prompts[:3]])[0]
    assert reply.finish_reason == "stop"
    assert reply.n_new_tokens == ids.index(ids[3]) + 1


def test_a_prompt_that_leaves_no_room_is_not_asked_and_the_others_are(tiny_student: Path, prompts: list[list[int]]):
    config = GenerationConfig(vllm=False, max_new_tokens=12, batch_size=4, max_model_len=60)
    model, tokenizer = load_base(str(tiny_student)), load_tokenizer(str(tiny_student))
    replies = all_replies(hugging_face(model, tokenizer, config), [prompts[0], prompts[0] * 9, prompts[1]])
    assert replies[1] == Reply("", 9 * len(prompts[0]), 0, "prompt_too_long")
    assert all(replies[i].n_new_tokens for i in (0, 2))


def test_what_is_done_is_not_written_again_and_the_rest_is_as_in_a_whole_run(
    tiny_student: Path, prompts: list[list[int]]
):
    # In bf16: the batches of a run that goes on have the shapes of a whole run's.
    generate = hugging_face(load_base(str(tiny_student)), load_tokenizer(str(tiny_student)), CONFIG)
    whole = dict(generate(prompts))
    done = {0, 1, 2, 7, 19}
    rest = dict(generate(prompts, done))
    assert rest == {place: reply for place, reply in whole.items() if place not in done}


def test_samples_differ_by_place_and_seed_and_not_by_what_is_done(tiny_student: Path, prompts: list[list[int]]):
    model, tokenizer = load_base(str(tiny_student)), load_tokenizer(str(tiny_student))
    config = replace(CONFIG, samples=3, temperature=1.0)
    asked = [prompts[0]] * 3 + [prompts[1]] * 3
    whole = all_replies(hugging_face(model, tokenizer, config), asked)
    assert len({reply.text for reply in whole[:3]}) == 3
    assert dict(hugging_face(model, tokenizer, config)(asked, {0, 4})) == {n: whole[n] for n in (1, 2, 3, 5)}
    assert all_replies(hugging_face(model, tokenizer, replace(config, seed=4)), asked) != whole


def test_sampling_draws_from_the_softmax_at_the_temperature():
    import torch

    logits, temperature, n = torch.tensor([2.0, 1.0, 0.0, -30.0]), 0.7, 20_000
    noise = GumbelNoise(temperature, range(n), "cpu")
    drawn = noise(None, logits.repeat(n, 1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / n
    expected = (logits / temperature).softmax(-1)
    # Four standard errors of a share of n draws.
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 4}, "--samples above 1 needs a --temperature above 0"),
        ({"temperature": -0.1}, "--temperature must be at least 0"),
        ({"temperature": float("nan")}, "--temperature must be at least 0"),
        ({"samples": 0}, "must be at least 1"),
        ({"data_parallel": 2}, "need --VLLM"),
        ({"kv_cache_gb": 2.0}, "need --VLLM"),
        ({"enforce_eager": True}, "need --VLLM"),
        ({"kv_cache_gb": 0.0, "vllm": True}, "--kv-cache-gb must be above 0"),
        ({"kv_cache_gb": float("nan"), "vllm": True}, "--kv-cache-gb must be above 0"),
        ({"kv_cache_gb": float("inf"), "vllm": True}, "--kv-cache-gb must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, says: str):
    with pytest.raises(UserError, match=says):
        GenerationConfig(**{"vllm": False, "max_new_tokens": 8, "batch_size": 4, **settings})


def test_an_instruction_that_no_eval_type_uses_is_refused():
    with pytest.raises(UserError, match="--instruction changes nothing for a fine-tuned model"):
        EvaluationConfig(("dev",), ("fine-tuned",), CONFIG, instruction="Be brief.")
    EvaluationConfig(("dev",), ("zero-shot", "fine-tuned"), CONFIG, instruction="Be brief.")


def test_an_instruction_of_bytes_that_are_no_text_is_refused():
    with pytest.raises(UserError, match="--instruction is no text in UTF-8"):
        EvaluationConfig(("dev",), ("zero-shot",), CONFIG, instruction=os.fsdecode(b"caf\xe9"))


def test_a_cache_that_holds_no_reply_is_refused_before_an_engine_starts(tiny_student: Path):
    config = GenerationConfig(vllm=True, max_new_tokens=8, batch_size=1, kv_cache_gb=1e-6)
    arguments = EngineArguments(str(tiny_student), str(tiny_student), False, config, None)
    with (
        pytest.raises(UserError, match=r"--kv-cache-gb 1e-06 does not hold one prompt and reply of .* tokens"),
        vllm_engine(arguments),
    ):
        pass


def test_only_samples_have_a_folder_of_their_own():
    assert CONFIG.folder_suffix == ""
    assert replace(CONFIG, samples=8, temperature=0.7).folder_suffix == "-8-samples"


def test_the_base_replies_as_if_there_were_no_adapter(run: StudentRun, adapter: Path, prompts: list[list[int]]):
    replies = {s.model: all_replies(s.generate, prompts) for s in served_models(run, adapter, MODELS, CONFIG)}
    alone = [all_replies(s.generate, prompts) for s in served_models(run, None, ["base"], CONFIG)]
    assert replies["base"] == alone[0]
    assert replies["fine-tuned"] != replies["base"]


def test_vllm_where_it_is_not_installed_is_refused_before_anything_is_loaded(
    run: StudentRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*requirements-cpu\.txt"):
        check_backend(run, vllm=True)
    check_backend(run, vllm=False)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudentRun, Path, list[list[int]]]:
    """pocket-mistral, what 200 rows make of it, and 40 prompts that it was not trained on."""
    questions = dataset("FinQA-mini").load(Folders().raw("FinQA-mini", "train")).questions[:240]
    rows = [
        TeacherRow(
            training_prompt(q), to_python(q.program, q.table, q.question, q.passage), q.answer, q.answer, id=q.id
        )
        for q in questions
    ]
    folders = Folders(data=tmp_path_factory.mktemp("pocket"))
    write_teacher_rows(folders.filtered("FinQA-mini", "train"), rows[:200])
    run = StudentRun(dataset="FinQA-mini", model="pocket-mistral", settings=settings_for("pocket-mistral"))
    student = fine_tune(run, TrainingConfig(), folders)
    tokenizer = load_tokenizer("pocket-mistral")
    return run, student, [prompt_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in rows[200:]]


@pytest.mark.slow
def test_vllm_replies_as_hugging_face_does_for_base_and_for_the_merged_adapter(
    pocket: tuple[StudentRun, Path, list[list[int]]],
):
    pytest.importorskip("vllm")
    run, student, asked = pocket
    tokenizer: Any = load_tokenizer("pocket-mistral")
    replies: dict[bool, dict[str, list[Reply]]] = {}
    for vllm in (False, True):
        config = GenerationConfig(vllm=vllm, max_new_tokens=80, batch_size=40)
        served = served_models(run, student, MODELS, config)
        replies[vllm] = {s.model: all_replies(s.generate, asked) for s in served}
    for model in MODELS:
        pairs = list(zip(replies[False][model], replies[True][model], strict=True))
        # bf16 kernels differ, so that a near-tie may fall the other way; a lost adapter would change far more.
        assert sum(theirs == ours for theirs, ours in pairs) >= 34, model
    changed = zip(replies[True]["base"], replies[True]["fine-tuned"], strict=True)
    assert sum(before.text != after.text for before, after in changed) >= 12

    written = [
        tokenizer(reply.text, add_special_tokens=False)["input_ids"] for reply in replies[True]["fine-tuned"][:8]
    ]
    sequences = [([*prompt, *reply], len(prompt)) for prompt, reply in zip(asked[:8], written, strict=True)]
    found = compare(run, student, sequences, EvaluationConfig(("test",), ("fine-tuned",), config))
    assert found["active"] and found["agrees"], found
    assert 0 < found["share_vllm"] < AGREEMENT and 0 < found["share_merged"] < AGREEMENT
    assert found["kl_base_on_vllm_tokens"] <= found["kl_base"] * 1.001


@pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="two processes of vLLM take minutes on fewer than four cores")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["data_parallel", "tensor_parallel"])
def test_two_processes_of_vllm_reply_and_sample_as_one_does(pocket: tuple[StudentRun, Path, list[list[int]]], way: str):
    pytest.importorskip("vllm")
    run, _, asked = pocket
    config = GenerationConfig(vllm=True, max_new_tokens=60, batch_size=40, samples=2, temperature=0.7)
    twice = [prompt for prompt in asked[:20] for _ in range(2)]
    [alone] = [dict(s.generate(twice)) for s in served_models(run, None, ["base"], config)]
    shared, done = replace(config, **{way: 2}), {0, 5, 39}
    for served in served_models(run, None, ["base"], shared):
        together = dict(served.generate(twice, done))
        told = served.facts if way == "data_parallel" else served.facts["settings"]
        assert told[way if way == "data_parallel" else f"{way}_size"] == 2
    assert set(together) == set(range(40)) - done
    # The seed of a place is the same wherever it is drawn; near-ties in bf16 may fall the other way.
    assert sum(alone[place] == reply for place, reply in together.items()) >= 30
    assert sum(alone[2 * n].text != alone[2 * n + 1].text for n in range(20)) >= 1


def test_each_reply_of_a_batch_is_there_when_it_ends_and_the_rest_is_given_up(
    tiny_student: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """A reply of one token does not wait for the others of its batch, and closing the iterator stops those."""
    from finqa.evaluation.engines import hugging_face_engine
    from finqa.evaluation.engines.hugging_face_engine import hugging_face

    model, tokenizer = load_base(str(tiny_student)), load_tokenizer(str(tiny_student))
    steps = []
    real = hugging_face_engine.Ends.__call__

    def ended(self, input_ids, scores, **others):
        steps.append(input_ids.shape[1])
        if len(steps) == 3:  # the second row ends here, if none has before
            input_ids[1, -1] = tokenizer.eos_token_id
        return real(self, input_ids, scores, **others)

    monkeypatch.setattr(hugging_face_engine.Ends, "__call__", ended)
    config = GenerationConfig(vllm=False, max_new_tokens=1500, batch_size=3)
    replies = hugging_face(model, tokenizer, config)(prompts[:3])
    _, first = next(replies)
    assert first.n_new_tokens <= 3 and first.finish_reason == "stop"
    replies.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(steps) < 1500


def test_an_engine_over_more_gpus_than_are_here_is_rays_where_ray_is_installed(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    import torch

    from finqa.evaluation.engines.devices import over_machines

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert over_machines(2) == {}
    with pytest.raises(UserError, match=r"--tensor-parallel 4 needs as many GPUs, and 2 are here;.*docs/reproduce\.md"):
        over_machines(4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert over_machines(4) == {"distributed_executor_backend": "ray", "disable_custom_all_reduce": True}


def test_vllm_keeps_from_nvlink_multicast_where_the_machine_says_so(monkeypatch: pytest.MonkeyPatch):
    import os

    from finqa.evaluation.engines.devices import without_multicast

    names = ("VLLM_ALLREDUCE_USE_FLASHINFER", "VLLM_ALLREDUCE_USE_SYMM_MEM")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert without_multicast(2) == {}
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert without_multicast(1) == {} and os.environ[names[0]] == "1"
    told = without_multicast(2)["compilation_config"]
    assert [os.environ[name] for name in names] == ["0", "0"]
    envs, config = pytest.importorskip("vllm.envs"), pytest.importorskip("vllm.config")
    assert not any(getattr(envs, name) for name in names)
    assert config.CompilationConfig(**told).pass_config.fuse_allreduce_rms is False


def test_the_processes_of_an_engine_on_a_cpu_take_a_part_of_its_cores_each(monkeypatch: pytest.MonkeyPatch):
    from finqa.evaluation.engines.devices import share_cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    with pytest.raises(UserError, match="--tensor-parallel 4 needs a core each, and an engine has 3 here"):
        share_cores(4)
    share_cores(1)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    share_cores(2)
    share_cores(3)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,5|1", "what is set already stays"
