"""How much memory and disk a stage needs, from a model's configuration and the batch alone.

Parameters are counted on the meta device, without weights. Sizes are in bytes, GB are 1e9 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finqa.training.packing import packed_shape
from finqa.training.rows import NO_ROW, LengthGrouped
from finqa.training.trainable import Speed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

    from finqa.evaluation.engines.caches import Extent

GB = 1e9
WORKSPACE = 0.5 * GB
"""Bytes of working memory that matrix products and attention use on a GPU."""
MERGED_FILE_GB = 5
"""Largest size of one file of a merged model."""
WRITTEN_SHARE = 0.25
"""Share of a merged model's weights that writing it holds beside them; 0.19 and 0.20 were measured
(benchmarks/results/merge.json)."""
NF4 = 0.53
"""Bytes of a 4-bit weight, its twice quantised scales included."""
OPTIMISER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 0}
"""Bytes of state for each trained parameter; any other optimiser is taken for AdamW in fp32 (8)."""
CHECKPOINTS_AT_ONCE = 3
"""The two that are kept, and the one that is being written."""


@dataclass(frozen=True)
class Sizes:
    """A causal model in numbers."""

    parameters: int
    in_layers: int
    """Parameters of the linear layers that -F makes 4-bit: all but embeddings, head and norms."""
    trained: int
    """Parameters of the adapter, or all of them."""
    adapted: bool
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP."""
    adapter_values: float
    """Numbers that a layer's adapters keep of a token for the backward pass; see `kept_values`."""
    kv_values: int
    """Numbers of a token in the key-value cache of a layer."""
    heads: int
    head_values: int
    """Numbers of a token's keys and values once each query head has its own."""
    vocabulary: int
    missing: tuple[str, ...] = ()
    """Modules that are to have an adapter and are not there."""
    linear: tuple[str, ...] = ()
    """Names of the linear layers that can have one."""


@dataclass(frozen=True)
class Load:
    """The largest update of a run."""

    tokens: int
    """Tokens of its batch, padding included."""
    longest: int
    """Tokens of its longest row."""
    targets: int
    """Positions that carry loss."""
    captured_tokens: int = 0
    """Tokens of the largest batch that is recorded as a CUDA graph, where that is done; 0 where none is."""
    captured_targets: int = 0

    @classmethod
    def of(cls, rows: Dataset, batch_size: int, epochs: int, seed: int, packed: bool, longest_graph: int) -> Load:
        """The largest of the run's own batches; a packed batch has its rows' tokens, any other is padded.

        `rows` is a Dataset of finqa.training.rows.Example. A batch is recorded where it is packed, has no more than
        `longest_graph` tokens, and its shape comes more than once.
        """
        lengths, prompts = list(rows["n_tokens"]), list(rows["n_prompt"])
        sampler = LengthGrouped(lengths, batch_size, seed)
        shapes: Counter[tuple[int, ...]] = Counter()
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            order = [row for row in sampler if row != NO_ROW]
            for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
                longest, n_tokens = max(lengths[row] for row in batch), sum(lengths[row] for row in batch)
                n_targets = n_tokens - sum(prompts[row] for row in batch)
                padded = (len(batch), longest * len(batch), n_targets, longest)
                shapes[packed_shape(len(batch), n_tokens, n_targets, longest) if packed else padded] += 1
        captured = [shape for shape, times in shapes.items() if packed and times > 1 and shape[1] <= longest_graph]
        return cls(
            tokens=max(shape[1] for shape in shapes),
            longest=max(lengths),
            targets=max(shape[2] for shape in shapes),
            captured_tokens=max((shape[1] for shape in captured), default=0),
            captured_targets=max((shape[2] for shape in captured), default=0),
        )


@dataclass(frozen=True)
class Need:
    """Memory of a stage: what each part is, and its bytes."""

    parts: tuple[tuple[str, float, str], ...]
    """Name, bytes, and what the number of bytes follows from."""

    @property
    def total(self) -> float:
        return sum(size for _, size, _ in self.parts)


def read_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """Configuration of a base model, as `resolve_model` finds it."""
    from transformers import AutoConfig

    from finqa.models.students import resolve_model

    return AutoConfig.from_pretrained(resolve_model(model, revision))


def sizes(config: PretrainedConfig, lora_modules: Sequence[str] = (), lora_r: int = 0) -> Sizes:
    """A model's numbers from its configuration alone; without `lora_modules` all of it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    names = {name.rpartition(".")[2] for name, _ in linear}
    head = model.get_output_embeddings()
    parameters = sum(p.numel() for p in model.parameters())
    adapted = [m for name, m in linear if name.rpartition(".")[2] in lora_modules]
    adapter = sum(lora_r * (m.in_features + m.out_features) for m in adapted)
    given: Any = config.get_text_config()
    hidden, heads = given.hidden_size, given.num_attention_heads
    kv_heads = getattr(given, "num_key_value_heads", None) or heads
    head_dim = getattr(given, "head_dim", None) or hidden // heads
    return Sizes(
        parameters=parameters,
        in_layers=sum(m.weight.numel() for _, m in linear if m is not head),
        trained=adapter if lora_modules else parameters,
        adapted=bool(lora_modules),
        layers=given.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(given, "intermediate_size", 4 * hidden),
        adapter_values=sum(1.5 * m.in_features + lora_r for m in adapted) / given.num_hidden_layers,
        kv_values=2 * kv_heads * head_dim,
        heads=heads,
        head_values=2 * heads * head_dim,
        vocabulary=given.vocab_size,
        missing=tuple(name for name in lora_modules if name not in names),
        linear=tuple(sorted(names)),
    )


def training_need(
    model: Sizes, load: Load, optim: str, speed: Speed, bits: int = 16, on_gpu: bool = True, processes: int = 1
) -> Need:
    """Memory at the largest update.

    - Weights: 2 bytes a parameter in bf16, 0.53 in 4-bit layers, 4 where all of them are trained or, at `bits` 32, on
      a CPU without bf16 products.
    - Trained parameters: 4 bytes each in fp32, 2 for autocast's copy, and the optimiser's state. Their gradients, 4
      more, come as activations go, so the larger of the two counts. Several `processes` keep the memory of gradients,
      which they are sent from.
    - Activations: see `_activations`. CUDA graphs keep gradients beside them, and the activations of their largest
      batch in memory of their own, which no other batch can use.

    benchmarks/results/lora_7b_*.json have the peaks that this was measured at.
    """
    width = 4 if bits == 32 else 2
    if not model.adapted:
        weights, kind = 4.0 * model.parameters, "fp32"
    elif bits == 4:
        weights = NF4 * model.in_layers + 2 * (model.parameters - model.in_layers)
        kind = "4-bit layers, bf16 embeddings and head"
    else:
        weights, kind = float(width * model.parameters), "fp32" if bits == 32 else "bf16"
    state = OPTIMISER_BYTES.get(optim, 8)
    copies = 2 if width == 2 else 0
    held = (4 * model.adapted + copies + state) * model.trained
    gradients = 4.0 * model.trained
    values = kept_values(model, compiled=speed.compiled is not False and on_gpu)
    if not on_gpu:  # attention there keeps its probabilities too, about half of them; not measured
        values += model.heads * load.longest / 2
    activations = _activations(model, values * width, width, load.tokens, load.targets, bool(speed.checkpointing))
    graphs = speed.captured and on_gpu and load.captured_tokens > 0
    if graphs:
        recorded = _activations(model, values * width, width, load.captured_tokens, load.captured_targets, False)
        passing = gradients + activations + recorded
    else:
        passing = max(activations, gradients) if processes == 1 else activations + gradients
    how = f"{load.tokens:,} tokens in the largest update" + (", with checkpointing" if speed.checkpointing else "")
    return Need(
        (
            ("weights", weights, f"{count(model.parameters)} parameters, {kind}"),
            ("adapter" if model.adapted else "optimiser", held, f"{model.trained:,} trained parameters, {optim}"),
            ("activations, gradients", passing, how + (", CUDA graphs" if graphs else "")),
            *([("workspace", WORKSPACE, "")] if on_gpu else []),
        )
    )


def kept_values(model: Sizes, compiled: bool) -> float:
    """Numbers that a decoder layer keeps of a token for the backward pass, counted from what autograd saves there.

    Compiled, it keeps the MLP's gate and up products, both inputs of the residual stream, the query, attention's
    output, and key and value, which are counted as wide as the query: so they were where this was measured, before
    torch 2.12. Uncompiled, it keeps the gate's activation too and the inputs of both norms in fp32. An adapter
    adds, for each of its modules, the input after dropout, the dropout's mask (a byte a number) and the r numbers
    between its matrices. Where all weights are trained, the inputs of the products are kept and the residual stream
    is fp32.
    """
    values = 2 * model.intermediate + 6 * model.hidden + model.adapter_values
    if not model.adapted:
        values += model.intermediate + 3 * model.hidden
    return values if compiled else values + model.intermediate + 2 * model.hidden


def _activations(model: Sizes, kept: float, width: int, tokens: int, targets: int, checkpointing: bool) -> float:
    """Bytes of activations of a batch at its peak, which is where the backward pass begins.

    There are the `kept` bytes a token of every layer (with checkpointing the input of every layer, and one layer's
    activations), and beside them the larger of two: the logits, 10 bytes a labelled position and word (bf16, fp32 and
    their gradient), or gradients and what is computed again within the last layer, about twice what it keeps.
    """
    layers = kept + model.layers * model.hidden * width if checkpointing else kept * model.layers
    return layers * tokens + max(10.0 * targets * model.vocabulary, 2 * kept * tokens)


def evaluation_need(model: Sizes, batch: Extent, new_tokens: int, in_4bit: bool = False, bits: int = 16) -> Need:
    """Memory of Hugging Face's generation in one batch.

    Weights, an adapter in fp32, keys and values of the prompts with room for all new tokens, and the largest of three:
    what an MLP makes of the tokens that are read at once (three times its width and four times the model's, of each),
    what attention does (keys and values anew for every query head, four times the model's width, the mask as numbers),
    and the logits of the next tokens (10 bytes a row and word: bf16, fp32 and what the processors copy). A mask of one
    byte for each token that is read and each that it may see is there all the time.
    """
    width = bits / 8
    layers = NF4 if in_4bit else width
    weights = layers * model.in_layers + width * (model.parameters - model.in_layers)
    kept = "4-bit layers" if in_4bit else "bf16" if bits == 16 else "fp32"
    room = batch.time + new_tokens
    mask = batch.read * batch.time
    mlp = width * (3 * model.intermediate + 4 * model.hidden) * batch.read + mask
    copied = model.head_values if model.head_values > model.kv_values else 0
    attention = width * (copied * batch.rows * batch.time + 4 * model.hidden * batch.read + mask) + mask
    most = max(mlp, attention, 10.0 * batch.rows * model.vocabulary)
    kept_values = width * model.kv_values * model.layers * batch.rows * room
    return Need(
        (
            ("weights", weights, f"{count(model.parameters)} parameters, {kept}"),
            *([("adapter", 4.0 * model.trained, f"{model.trained:,} parameters")] if model.adapted else []),
            ("keys and values", kept_values, f"{batch.rows} x {room:,} tokens"),
            ("activations", most, f"{batch.read:,} tokens read at once"),
            ("workspace", WORKSPACE, ""),
        )
    )


def disk_need(model: Sizes, optim: str) -> float:
    """Bytes on disk: the student in fp32, and its checkpoints with the optimiser's state."""
    output = 4.0 * model.trained
    return output + CHECKPOINTS_AT_ONCE * (output + OPTIMISER_BYTES.get(optim, 8) * model.trained)


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
