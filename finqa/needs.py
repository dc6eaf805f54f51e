"""How much memory and disk a stage needs, from a model's configuration and the batch alone.

Parameters are counted on the meta device, without weights. Sizes are in bytes, GB are 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finqa.tuning.trainable import Speed
from finqa.tuning.training_rows import NO_ROW, Example, LengthGrouped

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from finqa.generation import GenerationConfig

GB = 1e9
WORKSPACE = 0.5 * GB
"""What products and attention need for themselves on a GPU."""
MERGED_FILE_GB = 5
"""Of the files of a merged model at most; each is copied in memory as it is written."""
NF4 = 0.53
"""Bytes of a 4-bit weight, its twice quantised scales included."""
OPTIMISER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 0}
"""Bytes of state for each trained parameter; any other optimiser is taken for AdamW in fp32 (8)."""
EAGER, COMPILED = 1.25, 1.0
"""Share of `kept_values` that is kept without and with torch.compile."""
LONGEST_GRAPH = 4096
"""Tokens of a batch up to which steps are recorded as CUDA graphs."""
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
    kept_values: int
    """Numbers that a layer keeps of a token for the backward pass: 3 * intermediate + 10 * hidden."""
    kv_values: int
    """Numbers of a token in the key-value cache of a layer."""
    heads: int
    vocabulary: int
    missing: tuple[str, ...] = ()
    """Modules that are to have an adapter and are not there."""


@dataclass(frozen=True)
class Load:
    """The largest update of a run."""

    tokens: int
    """Tokens of its batch, padding included."""
    longest: int
    """Tokens of its longest row."""
    targets: int
    """Positions that carry loss."""

    @classmethod
    def of(cls, examples: Sequence[Example], batch_size: int, epochs: int, seed: int, packed: bool) -> Load:
        """The largest batch of the run's own batches; a packed one holds its rows' tokens, another one is padded."""
        lengths = [len(example.ids) for example in examples]
        sampler = LengthGrouped(lengths, batch_size, seed)
        tokens = targets = 0
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            order = [row for row in sampler if row != NO_ROW]
            for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
                longest = max(lengths[row] for row in rows)
                tokens = max(tokens, sum(lengths[row] for row in rows) if packed else longest * len(rows))
                targets = max(targets, sum(lengths[row] - examples[row].n_prompt for row in rows))
        return cls(tokens, max(lengths), targets)


@dataclass(frozen=True)
class Need:
    """Memory of a stage: what each part is, and its bytes."""

    parts: tuple[tuple[str, float, str], ...]
    """Name, bytes, and from what they follow."""

    @property
    def total(self) -> float:
        return sum(size for _, size, _ in self.parts)


def read_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """Configuration of a base model, as `resolve_model` finds it."""
    from transformers import AutoConfig

    from finqa.students import resolve_model

    return AutoConfig.from_pretrained(resolve_model(model, revision))


def sizes(config: PretrainedConfig, lora_modules: Sequence[str] = (), lora_r: int = 0) -> Sizes:
    """A model's numbers from its configuration alone; without `lora_modules` all of it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    parameters = sum(p.numel() for p in model.parameters())
    adapter = sum(
        lora_r * (m.in_features + m.out_features) for name, m in linear if name.rpartition(".")[2] in lora_modules
    )
    given: Any = config.get_text_config()
    heads = given.num_attention_heads
    kv_heads = getattr(given, "num_key_value_heads", None) or heads
    head_dim = getattr(given, "head_dim", None) or given.hidden_size // heads
    return Sizes(
        parameters=parameters,
        in_layers=sum(m.weight.numel() for _, m in linear if m is not head),
        trained=adapter if lora_modules else parameters,
        adapted=bool(lora_modules),
        layers=given.num_hidden_layers,
        hidden=given.hidden_size,
        kept_values=3 * getattr(given, "intermediate_size", 4 * given.hidden_size) + 10 * given.hidden_size,
        kv_values=2 * kv_heads * head_dim,
        heads=heads,
        vocabulary=given.vocab_size,
        missing=tuple(set(lora_modules) - {name.rpartition(".")[2] for name, _ in linear}),
    )


def training_need(
    model: Sizes, load: Load, optim: str, speed: Speed, bits: int = 16, on_gpu: bool = True, processes: int = 1
) -> Need:
    """Memory at the largest update.

    - Weights: 2 bytes a parameter in bf16, 0.53 in 4-bit layers, 4 where all of them are trained or, at `bits` 32, on
      a CPU without bf16 products.
    - Trained parameters: 4 bytes each in fp32, 2 for autocast's copy, and the optimiser's state. Their gradients, 4
      more, come as activations go, so the larger of the two counts. CUDA graphs keep both, and activations of their
      largest batch a second time. Several `processes` send gradients from a copy of theirs, and keep both as well.
    - Activations: tokens * layers * (3 * intermediate + 10 * hidden) * 2 bytes, the shape of what a layer of gated
      MLP and attention with adapters keeps (inputs of the adapters and their dropouts, q, k, v, attention's output,
      two norms, the gate's product). Measured on one H200 at Mistral-7B's shapes, r 512 on q, k, v, o, rows packed:
      from one row (2,276 tokens) to eight (16,407) memory grew from 30.4 to 104.1 GB with compiled layers, 5.2 MB a
      token, and from 34.2 to 127.5 GB without, 6.6 MB. The formula says 5.4 MB, the factors COMPILED and EAGER do the
      rest: 30.8 and 107 GB, 33.9 and 129 GB. With checkpointing each layer keeps its input alone, and one layer's
      activations are there at a time: 20.3 GB where 19.4 were measured (one row, 2,127 tokens).
    - Logits: 10 bytes a labelled position and word (bf16, fp32 and their gradient).
    - On a CPU attention keeps its probabilities too: about half of heads * longest a token and layer. Not measured.
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
    values = model.kept_values * (COMPILED if speed.compiled and on_gpu else EAGER)
    if not on_gpu:
        values += model.heads * load.longest / 2
    kept = values * width * load.tokens
    layers = kept + model.layers * model.hidden * width * load.tokens if speed.checkpointing else kept * model.layers
    activations = layers + 10 * load.targets * model.vocabulary
    graphs = speed.captured and on_gpu
    if graphs:
        passing = gradients + activations * (1 + min(1.0, LONGEST_GRAPH / load.tokens))
    else:
        passing = max(activations, gradients) if processes == 1 else activations + 2 * gradients
    how = f"{load.tokens:,} tokens in the largest update" + (", with checkpointing" if speed.checkpointing else "")
    return Need(
        (
            ("weights", weights, f"{count(model.parameters)} parameters, {kind}"),
            ("adapter" if model.adapted else "optimiser", held, f"{model.trained:,} trained parameters, {optim}"),
            ("activations, gradients", passing, how + (", CUDA graphs" if graphs else "")),
            *([("workspace", WORKSPACE, "")] if on_gpu else []),
        )
    )


def evaluation_need(model: Sizes, config: GenerationConfig, longest: int, in_4bit: bool = False) -> Need:
    """Memory of generation: weights, an adapter in fp32, keys and values of the rows that are there at a time.

    vLLM takes what `gpu_memory_utilization` gives it and needs one row of `longest` tokens in it, Hugging Face a batch.
    """
    layers = NF4 if in_4bit else 2.0
    rows = 1 if config.vllm else config.batch_size
    weights = layers * model.in_layers + 2 * (model.parameters - model.in_layers)
    kv = 2.0 * model.kv_values * model.layers * rows * longest
    return Need(
        (
            ("weights", weights, f"{count(model.parameters)} parameters, {'4-bit layers' if in_4bit else 'bf16'}"),
            *([("adapter", 4.0 * model.trained, f"{model.trained:,} parameters")] if model.adapted else []),
            ("keys and values", kv, f"{rows} x {longest:,} tokens"),
            ("workspace", WORKSPACE, ""),
        )
    )


def disk_need(model: Sizes, optim: str) -> float:
    """Bytes on disk: the student in fp32, and its checkpoints with the optimiser's state."""
    output = 4.0 * model.trained
    return output + CHECKPOINTS_AT_ONCE * (output + OPTIMISER_BYTES.get(optim, 8) * model.trained)


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
