"""Greedy replies of patched models, against plain generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from patched_models import SITE, planted_crosscoder, planted_pair

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.interventions.causal import Cell, measure
from crosscoder.interventions.halves import Pair, pair_of
from crosscoder.interventions.patched_generation import answered, patched, patched_replies, replies_of_cells
from crosscoder.interventions.sets import Constant, Latents, Nothing, Scaled, Whole
from finqa.evaluation.engines.caches import BatchCache
from finqa.evaluation.engines.hugging_face_engine import hugging_face
from finqa.evaluation.generation import GenerationConfig, Reply, all_replies
from finqa.models.students import load_tokenizer
from finqa.runtime.errors import UserError
from finqa.sandbox.running import Sandbox


@pytest.fixture(scope="module")
def tokenizer(tiny_student) -> Any:
    return load_tokenizer(str(tiny_student))


@pytest.fixture(scope="module")
def planted(tokenizer):
    """A pair over the tokenizer's vocabulary; random models, so that the replies are long and of any token."""
    instruct, fine_tuned, direction = planted_pair(len(tokenizer))
    for model in (instruct, fine_tuned):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return pair_of(instruct, fine_tuned), direction


@pytest.fixture(scope="module")
def prompts():
    return [[1, *(7 + (number * 11 + j * (number + 2)) % 300 for j in range(5 + 3 * number))] for number in range(7)]


def plain(model: Any, tokenizer: Any, prompts: list[list[int]], n: int = 24) -> list[Reply]:
    config = GenerationConfig(vllm=False, max_new_tokens=n, batch_size=4)
    return all_replies(hugging_face(model, tokenizer, config), prompts)


def replies(pair: Pair, tokenizer: Any, prompts: list[list[int]], cell: Cell, target: Target = SITE) -> list[Reply]:
    return patched_replies(pair, target, cell, prompts, tokenizer, max_new_tokens=24, batch_size=4)


def tokens(pair: Pair, cell: Cell, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Of the model's own generate, in one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    with patched(pair, SITE, cell) as model:
        written = model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=n, do_sample=False, eos_token_id=-1
        )
    return written[:, longest:].tolist()


def texts(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def test_the_empty_set_writes_what_the_model_itself_writes(planted, tokenizer, prompts):
    pair, direction = planted
    for number, way in enumerate(("sufficiency", "necessity")):
        expected = plain(pair[number].model, tokenizer, prompts)
        for addition in (Nothing(), Latents(planted_crosscoder(direction), [])):
            for site in ("attention", "mlp", "residual"):
                assert replies(pair, tokenizer, prompts, Cell(addition, way, "own"), Target(2, site)) == expected
    assert len(set(texts(expected))) == len(prompts)


def test_the_whole_last_residual_writes_what_the_other_model_writes(planted, tokenizer, prompts):
    pair, _ = planted
    instruct, fine_tuned = (plain(side.model, tokenizer, prompts) for side in pair)
    assert not set(texts(instruct)) & set(texts(fine_tuned))
    last = Target(3, "residual")
    for carrier in ("own", "other"):
        assert replies(pair, tokenizer, prompts, Cell(Whole(), "sufficiency", carrier), last) == fine_tuned
        assert replies(pair, tokenizer, prompts, Cell(Whole(), "necessity", carrier), last) == instruct


def test_the_other_carrier_alone_is_the_upper_half_of_the_other_model(planted, tokenizer, prompts):
    pair, _ = planted
    changed = copy.deepcopy(pair.instruct.model)
    torch.manual_seed(5)
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.add_(
            torch.randn_like(changed.model.layers[2].mlp.down_proj.weight)
        )
    both = pair_of(pair.instruct.model, changed)
    expected = plain(changed, tokenizer, prompts)
    assert replies(both, tokenizer, prompts, Cell(Nothing(), "sufficiency", "other")) == expected
    assert replies(both, tokenizer, prompts, Cell(Nothing(), "sufficiency", "own")) != expected


@pytest.fixture(scope="module")
def adapted(planted):
    """The instruct model with a random adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(planted[0].instruct.model), settings).eval()


def test_an_adapter_is_switched_for_each_side(planted, adapted, tokenizer, prompts):
    base, pair = planted[0].instruct.model, pair_of(adapted)
    with_adapter = plain(adapted.get_base_model(), tokenizer, prompts)
    assert with_adapter != plain(base, tokenizer, prompts)
    assert replies(pair, tokenizer, prompts, Cell(Nothing(), "sufficiency", "own")) == plain(base, tokenizer, prompts)
    last = Target(3, "residual")
    assert replies(pair, tokenizer, prompts, Cell(Whole(), "sufficiency", "own"), last) == with_adapter


def test_what_is_written_token_by_token_is_what_teacher_forcing_says(planted, tokenizer, prompts):
    """The reply, read back as a document under the same patch, is exact."""
    pair, direction = planted
    addition = Latents(planted_crosscoder(direction), [0])
    cell = Cell(addition, "sufficiency", "own")
    written = tokens(pair, cell, prompts, 12)
    assert written != tokens(pair, Cell(Nothing(), "sufficiency", "own"), prompts, 12)
    documents = [Document(str(i), (*p, *w), len(p)) for i, (p, w) in enumerate(zip(prompts, written, strict=True))]
    assert all(measure(pair, SITE, documents, [cell])[0].exact)


def test_patched_replies_of_prompts_that_begin_alike_are_those_of_each_by_itself(planted, tokenizer, prompts):
    """In every way of patching: where the other model reads too, it goes on from the same beginnings."""
    pair, direction = planted
    asked = [[*page, *prompts[0][1 : 2 + number]] for page in (prompts[4], prompts[6]) for number in range(3)]
    addition = Latents(planted_crosscoder(direction), [0])
    written = set()
    for change in (addition, Whole()):
        for way in ("sufficiency", "necessity"):
            for carrier in ("own", "other"):
                cell = Cell(change, way, carrier)
                together = patched_replies(pair, SITE, cell, asked, tokenizer, 24, 6)
                assert together == [replies(pair, tokenizer, [prompt], cell)[0] for prompt in asked], cell
                written.add(tuple(texts(together)))
    assert len(written) > 1


def sets_of(direction: Any, way: Any, carrier: Any, asked: list[list[int]]) -> list[tuple[Cell, list[list[int]]]]:
    """Patches of every kind, with all prompts, some, and the same one twice."""
    latents = Latents(planted_crosscoder(direction), [0])
    additions = [latents, Whole(), Nothing(), Scaled(latents, -1.5), Constant("mean difference", direction)]
    cells = [Cell(addition, way, carrier) for addition in additions]
    return list(zip(cells, (asked, asked, asked[:3], asked[1:], [asked[-1]] * 2), strict=True))


@pytest.mark.parametrize("begin_alike", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_several_cells_write_together_what_each_writes_alone(
    planted, adapted, tokenizer, prompts, with_adapter, begin_alike
):
    """In one batch, and in several in which cells begin and end."""
    direction = planted[1]
    pair = pair_of(adapted) if with_adapter else planted[0]
    asked = [[*page, *prompts[0][1 : 2 + number]] for page in (prompts[4], prompts[6]) for number in range(3)]
    for way in ("sufficiency", "necessity"):
        for carrier in ("own", "other"):
            sets = sets_of(direction, way, carrier, asked if begin_alike else prompts)
            alone = [patched_replies(pair, SITE, cell, its, tokenizer, 12, 64) for cell, its in sets]
            for batch_size in (64, 7):
                together = replies_of_cells(pair, SITE, sets, tokenizer, 12, batch_size)
                assert together == alone, (way, carrier, batch_size)
            _, whole, nothing, scaled, _ = map(texts, alone)
            assert whole[:3] != nothing and whole[1:] != scaled


def test_the_whole_site_is_the_other_models_to_the_last_bit_beside_other_cells(planted, prompts):
    pair, direction = planted
    ids = torch.tensor([prompt[:6] for prompt in prompts[:5]])

    def logits(model: Any) -> torch.Tensor:
        cache = BatchCache(model)
        cache.labels = torch.tensor([1, 0, 1, 2, 1])
        with torch.no_grad():
            first = model(input_ids=ids, past_key_values=cache).logits
            return torch.cat([first, model(input_ids=ids[:, :1], past_key_values=cache).logits], dim=1)

    additions = Latents(planted_crosscoder(direction), [0]), Whole(), Nothing()
    with patched(pair, Target(3, "residual"), *(Cell(one, "sufficiency", "own") for one in additions)) as model:
        found = logits(model)
    base, fine_tuned = (logits(side.model) for side in pair)
    # BOS is not patched.
    assert torch.equal(found[[0, 2, 4], 1:], fine_tuned[[0, 2, 4], 1:]) and torch.equal(found[3], base[3])
    assert not torch.equal(found[1, 1:], fine_tuned[1, 1:]) and torch.equal(found[:, 0], base[:, 0])


def test_cells_that_ask_the_same_read_what_prompts_begin_with_once_each(planted, tokenizer, prompts):
    pair, direction = planted
    asked = [[*prompts[6], *prompts[0][1 : 2 + number]] for number in range(4)]
    sets = [(cell, asked) for cell, _ in sets_of(direction, "sufficiency", "own", asked)]
    read: list[tuple[int, int]] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        read.append(tuple(kwargs["input_ids"].shape))

    handle = pair.instruct.model.register_forward_pre_hook(watch, with_kwargs=True)
    replies_of_cells(pair, SITE, sets, tokenizer, 4, 64)
    handle.remove()
    # A beginning for each cell and no more; then a token of the shortest prompt and four of the longest.
    assert read[:3] == [(5, len(prompts[6])), (20, 4), (20, 1)]


@pytest.mark.parametrize("begin_alike", [False, True])
def test_the_cache_of_the_other_model_has_as_much_room(adapted, tokenizer, prompts, begin_alike):
    """The rooms of its layers as far as the site; those above are never read."""
    asked = [[*prompts[6], 8 + n] if begin_alike else prompts[4 - n] for n in range(4)]
    caches: list[Any] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        caches.append(kwargs["past_key_values"])

    pair = pair_of(adapted)
    handle = pair.instruct.model.register_forward_pre_hook(watch, with_kwargs=True)
    replies(pair, tokenizer, asked, Cell(Whole(), "sufficiency", "own"))
    handle.remove()
    own, other = {id(cache): cache for cache in caches}.values()
    rooms = [[layer.rooms[0].shape for layer in cache.layers if layer.rooms[0] is not None] for cache in (own, other)]
    longest = len(prompts[6]) + 1 if begin_alike else len(prompts[4])
    assert rooms == [[(4, 2, longest + 24, 8)] * n for n in (3, 2)]


def test_cells_that_change_different_models_or_of_unknown_rows_are_refused(planted, tokenizer, prompts):
    pair, _ = planted
    for other in (Cell(Whole(), "necessity", "own"), Cell(Whole(), "sufficiency", "other")):
        with pytest.raises(UserError, match="directions or carriers"):
            replies_of_cells(pair, SITE, [(Cell(Whole(), "sufficiency", "own"), prompts), (other, prompts)], tokenizer)
    several = Cell(Whole(), "sufficiency", "own"), Cell(Nothing(), "sufficiency", "own")
    with patched(pair, SITE, *several) as model, pytest.raises(ValueError, match="which one it is of"):
        model(input_ids=torch.tensor(prompts[:1]))


def test_a_reply_ends_at_its_end_token_or_stop_string(planted, tokenizer, prompts):
    """Whichever comes first, each row for itself, as in plain generation."""
    pair, _ = planted
    model = copy.deepcopy(pair.instruct.model)
    free = plain(model, tokenizer, prompts)
    ends = [tokenizer(reply.text, add_special_tokens=False)["input_ids"] for reply in free]
    stop = free[2].text[5:8]
    assert stop and len(ends[0]) > 6
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ends[0][6]]
    config = GenerationConfig(vllm=False, max_new_tokens=24, batch_size=4, stop=(stop,))
    expected = all_replies(hugging_face(model, tokenizer, config), prompts)
    both = pair_of(model, pair.fine_tuned.model)
    cell = Cell(Nothing(), "sufficiency", "own")
    found = patched_replies(both, SITE, cell, prompts, tokenizer, 24, 4, (stop,))
    assert texts(found) == texts(expected)
    assert [reply.finish_reason for reply in found] == [reply.finish_reason for reply in expected]
    assert {"stop", "length"} == {reply.finish_reason for reply in found}


def test_programs_are_run_and_their_answers_held_against_the_labels():
    replies = [
        Reply("\nans = 6 * 7\n###End Python", 3, 9, "stop"),
        Reply("\nans = 6 * 7\n###End Python", 3, 9, "stop"),
        Reply("\nans = \n###End Python", 3, 9, "stop"),
        Reply("\nans = 42 if", 3, 9, "length"),
    ]
    with Sandbox(workers=1) as sandbox:
        found = answered(replies, ["42", "43", "42", "42"], sandbox)
    assert found.right == [True, False, False, False]
    assert found.runs == [True, True, False, False]
