"""The student: its name, its flags, where its base model and adapter are, and the token ids it reads.

A student is a base model fine-tuned on a data set. Scripts share the flags that shape its name, and what loads
it: base model, tokenizer, adapter (a local folder first, then the Hub). `merging` makes one model of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.models import hub
from finqa.models.adapters import check_adapter, check_layers, check_plain, is_adapter
from finqa.models.settings import StudentSettings, settings_for
from finqa.models.templates import TEMPLATE_DATE, put_template, read_template, tokenizer_in
from finqa.models.weights import SAFETENSORS, check_base, check_model_folder
from finqa.runtime.command_line import add_flags, check_bounds, flag, given, option, words_of
from finqa.runtime.commands import typed
from finqa.runtime.errors import UserError
from finqa.runtime.parallel import multiplies_bf16
from finqa.runtime.paths import REPOSITORY, Folders, check_name
from finqa.task import datasets, prompts

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_DATASET = "FinQA"
DEFAULT_MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
POCKET = "pocket-mistral"
ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
"""What may be the name of a Hub account."""
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
LONGEST_ID = 96 - len("-merged")
"""Letters of a model id, so that the Hub takes its repository and that of the merged model."""


@dataclass(frozen=True)
class StudentRun:
    """A base model with the choices that name its fine-tuned form on one data set."""

    dataset: str = field(metadata=option("DATASET_NAME", shown=DEFAULT_DATASET))
    """Data set that the student is fine-tuned on."""
    model: str = field(metadata=option("MODEL_ID", shown=DEFAULT_MODEL))
    """Base model as the user gave it: a Hub id, a local folder, or `pocket-mistral`."""
    settings: StudentSettings
    """Settings of the model with the flags applied."""
    peft: bool = flag(True, "-P", "--PEFT", "--peft", group="name", both_ways=True)
    """An adapter (LoRA) is trained, not the whole model; -P for main.py, everywhere else the default."""
    load_in_4bit: bool = flag(False, "-F", "--LOAD_IN_4BIT", "--load-in-4bit", group="name")
    """Load the base model in 4 bits (NF4)."""
    grad_accum: int = flag(1, "-GA", "--GRAD_ACCUM", "--grad-accum", group="name", metavar="BATCHES", least=1)
    """Batches per update."""
    run_name: str = flag("", group="name", metavar="NAME")
    """Suffix that keeps runs of other settings apart."""
    revision: str | None = flag(None, group="name")
    """Revision of the base model on the Hub."""
    chat_template: Path | None = flag(None, group="name", metavar="FILE")
    """Chat template, for a base model that has none; trained students bring it along."""
    given_hf_name: str | None = flag(None, "HF_NAME", shown="HF_NAME, then the logged-in user")
    """Hub account."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_name("--run-name", self.run_name)
        account = self.given_hf_name
        if account is not None and not (ACCOUNT.fullmatch(account) and not is_student(Path(account))):
            raise UserError(
                f"the third name is the Hub account (HF_NAME), and {account!r} is none; a fine-tuned model is found by "
                "its name below --data-dir, one of several by --run-name"
            )

    @property
    def base_name(self) -> str:
        """The base model's part of the names of folders."""
        local = local_model(self.model)
        return local.name if local else self.model.replace("/", "_")

    @property
    def model_id(self) -> str:
        """`<base, / as _>[-4bit]-peft<modules>-bs<batch>-ne<epochs>[-ga<n>][-<run name>]`.

        Where that is longer than the Hub takes, modules are named without `_proj`.
        """
        whole = self._model_id("_".join(self.settings.lora_modules))
        if len(whole) <= LONGEST_ID:
            return whole
        return self._model_id("_".join(name.removesuffix("_proj") for name in self.settings.lora_modules))

    def _model_id(self, modules: str) -> str:
        parts = [self.base_name]
        if self.load_in_4bit:
            parts.append("4bit")
        if self.peft:
            parts.append("peft" + modules)
        parts += [f"bs{self.settings.batch_size}", f"ne{self.settings.num_epochs}"]
        if self.grad_accum > 1:
            parts.append(f"ga{self.grad_accum}")
        if self.run_name:
            parts.append(self.run_name)
        return "-".join(parts)

    @property
    def hf_name(self) -> str | None:
        """Hub account: the one given, else HF_NAME, else the logged-in user (asked now), else None."""
        return self.given_hf_name or os.environ.get("HF_NAME") or hub.logged_in_name()

    @property
    def hub_id(self) -> str | None:
        """Hub repository of the fine-tuned model; None when only local folders are in question."""
        name = self.hf_name
        return f"{name}/{self.model_id}" if name else None

    def words(self, **defaults: Any) -> list[str]:
        """The names and flags of this student on a command line; `defaults` are those of the script."""
        account = [self.given_hf_name] if self.given_hf_name else []
        return [self.dataset, shlex.quote(self.model), *account, *self.flags(**defaults)]

    def flags(self, **defaults: Any) -> list[str]:
        """The flags that name this student; `defaults` are those of the script that takes them."""
        own = vars(settings_for(self.model))
        return words_of(self, "name", **defaults) + words_of(self.settings, "name", **own)


def add_student_flags(parser: argparse.ArgumentParser, peft_default: bool = True) -> None:
    """The three names and the flags that shape `<model-id>`.

    `peft_default`: whether the student is an adapter without -P; only the training script says no.
    """
    add_flags(parser, StudentRun, group="")
    group = parser.add_argument_group("student (these shape the name of the fine-tuned model)")
    add_flags(group, StudentRun, group="name")
    add_flags(group, StudentSettings, group="name")
    if not peft_default:
        parser.set_defaults(**{"StudentRun.peft": None})


def student_from_args(args: argparse.Namespace, base: StudentSettings | None = None) -> StudentRun:
    """The student that the flags describe; what they say of its settings is applied to `base`, or the model's own."""
    changes = given(StudentSettings, args)
    if "lora_modules" in changes:
        changes["lora_modules"] = tuple(name for word in changes["lora_modules"] for name in word.split(",") if name)
    names: dict[str, Any] = {"dataset": DEFAULT_DATASET, "model": DEFAULT_MODEL, "peft": True} | given(StudentRun, args)
    names["peft"] = bool(names["peft"])
    if names.get("given_hf_name") == "HF_NAME":  # pasted from a document: the variable, or the logged-in user
        del names["given_hf_name"]
    datasets.dataset(names["dataset"])
    if names.get("chat_template"):
        changes["chat_template"] = read_template(names["chat_template"])
    return StudentRun(**names, settings=replace(base or settings_for(names["model"]), **changes))


def local_model(name: str) -> Path | None:
    """Folder of a model that is on this machine: the shipped one by its name, or any folder by its path."""
    if name == POCKET:
        return REPOSITORY / "data" / "models" / POCKET
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else None


def resolve_model(name: str, revision: str | None = None) -> str:
    """Folder of a base model; one on the Hub is downloaded (or found in the Hub's cache)."""
    folder = local_model(name)
    if folder is not None:
        if name == POCKET and not (folder / "config.json").exists():
            remedy = "make it with: python -m mini.pretrain_pocket_mistral"
            raise UserError(f"{folder} holds no model (config.json is missing); {remedy}")
        check_model_folder(folder)
        return str(folder)
    if Path(name).is_file():
        raise UserError(f"{name} is a file; {SAFETENSORS}")
    fetched = hub.fetch_model(name, revision, MODEL_FILES)
    check_model_folder(fetched)
    return str(fetched)


def tokenizer_of(run: StudentRun, student: Path | None) -> PreTrainedTokenizerBase:
    """The student's tokenizer; `student` is the folder where it is, or will be."""
    return load_tokenizer(run.model, run.revision, run.settings.chat_template, student)


def load_tokenizer(
    model: str, revision: str | None = None, template: str | None = None, student: Path | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and a padding token (padding never carries loss or attention).

    A model without a chat template takes `template`, else that of the fine-tuned student in the folder `student`.
    """
    from transformers import AutoConfig

    folder = resolve_model(model, revision)
    tokenizer = tokenizer_in(folder)
    put_template(tokenizer, model, template, student)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no end token, so a reply could never end")
    embedded = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    if tokenizer.eos_token_id >= embedded:
        raise UserError(f"the end token of {model} ({tokenizer.eos_token_id}) is none of its {embedded} embeddings")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedded:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """No loading bars in a log file, and no warnings that nobody who runs a script here can act on."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def load_base(
    model: str,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    load_in_4bit: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The base model in eval mode; on a GPU where one is there, in bf16 where it has such products, unless told."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quiet_libraries()
    device = device or default_device()
    dtype = dtype or (torch.bfloat16 if multiplies_bf16(device) else torch.float32)
    # cuDNN's attention plans anew for every shape, and hardly two batches or steps of generation are alike.
    torch.backends.cuda.enable_cudnn_sdp(False)
    of_4_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **of_4_bits)
    quantization, path = nf4 if load_in_4bit else None, resolve_model(model, revision)
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map=device, quantization_config=quantization
    )
    return loaded.eval()


def find_adapter(run: StudentRun, folders: Folders) -> Path:
    """Folder of the fine-tuned student: `D/models/<dataset>/<model-id>`, else a copy from the Hub."""
    local = folders.model(run.dataset, run.model_id)
    if is_student(local):
        check_plain(local)
        return local
    hub_id = run.hub_id
    fetched = hub.fetch_folder(hub_id) if hub_id else None
    if fetched is not None and is_student(fetched):
        check_plain(fetched)
        return fetched
    # What the folder of the same base with other modules, batch, epochs or run name is called.
    beside = sorted(path.name for path in local.parent.glob(f"{run.base_name}-*") if is_student(path))
    others = f" (of this base are there: {', '.join(beside)})" if beside else ""
    nowhere = f"no fine-tuned model in {local}{others}, nor {hub.looked_for(hub_id)}"
    command = typed("main.py", *run.words(peft=False), folders=folders)
    raise UserError(f"{nowhere}; make it with: {command}")


def is_student(folder: Path) -> bool:
    """Whether a folder holds a whole adapter or a whole fine-tuned model."""
    adapter = is_adapter(folder) and (folder / "adapter_model.safetensors").exists()
    return adapter or ((folder / "config.json").exists() and any(folder.glob("model*.safetensors")))


def load_adapter(base: PreTrainedModel, student: Path) -> PeftModel:
    """Put the adapter in folder `student` on its base model.

    Raises UserError on another base than its own, and for an adapter that is not handled exactly.
    """
    from peft import PeftModel

    check_adapter(student, str(base.name_or_path))
    check_base(student, str(base.name_or_path))
    try:
        pair = PeftModel.from_pretrained(base, student)
    except (ValueError, RuntimeError) as error:  # no layers of these names, none that take an adapter, other sizes
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        raise UserError(
            f"the adapter in {student} does not fit its base: {' '.join(str(error).split())[:300]}"
        ) from error
    check_layers(pair, student)
    return pair


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the reply begins, special tokens by the chat template alone."""
    ids: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, strftime_now=TEMPLATE_DATE.strftime
    )
    return list(ids)


def training_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, code: str) -> tuple[list[int], int]:
    """Token ids of a training row (prompt, then completion, then end token), and how many are prompt.

    The prompt's ids are exactly those that generation starts from; the loss is taken on the others.
    """
    asked = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    reply: Any = tokenizer(prompts.completion(code), add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return [*asked, *reply, end], len(asked)
