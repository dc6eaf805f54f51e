"""Train, push, evaluate by name, merge, push, load by name: the commands as they are, against a Hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import started
from hub_contents import Account, Fault, Seen
from hub_server import HubServer, hub_server

from finqa.models.weights import weights_hash
from finqa.runtime.paths import REPOSITORY, Folders

pytestmark = pytest.mark.slow

WRITER, READER = "hf_thewriterstoken", "hf_thereaderstoken"
STUDENT = ["FinQA-mini", "pocket-mistral"]
TRAIN = ["-P", "--warmup-steps", "0", "--learning-rate", "1e-2", "-BS", "4"]
MODEL_ID = "pocket-mistral-peftq_proj_k_proj_v_proj_o_proj-bs4-ne1"
MERGED = f"{MODEL_ID}-merged"
HARNESSES = "/api/agent-harnesses"
"""A list that the client fetches for its own sake."""
ROWS = {"train": 16, "dev": 2, "test": 4}


class Commands:
    """A user's shell: a Hub, a data folder with rows of FinQA-mini, and the scripts."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.folders = Folders(data=folder / "data", results=folder / "results")
        self.trained: list[Seen] = []
        """What the Hub was asked by the training and its push."""

    def __call__(
        self,
        script: str,
        *words: object,
        token: str | None = WRITER,
        elsewhere: str = "data",
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the data folder `elsewhere`. What it says never holds a token, nor a bar."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "home"), "NO_PROXY": "*"}
        environment |= {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
        where = ["--data-dir", self.folder / elsewhere]
        where += ["--results-dir", self.folder / "results"] if script == "main.py" else []
        done = started.run([REPOSITORY / script, *words, *where], env=environment)
        assert WRITER not in done.stdout + done.stderr and READER not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "\r" not in done.stderr, done.stderr
        return done

    def rows_alone(self, name: str) -> str:
        """A data folder that has the rows and no model."""
        shutil.copytree(self.folder / "data" / "clean_with_code", self.folder / name / "clean_with_code")
        return name

    def forget_downloads(self) -> None:
        shutil.rmtree(self.folder / "home" / "hub")

    def error(self, done: subprocess.CompletedProcess[str]) -> str:
        """The one line of a command that failed as it should."""
        assert done.returncode == 1
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Rows of FinQA-mini with the program teacher's programs, and a student that was trained and pushed privately."""
    folder = tmp_path_factory.mktemp("round-trip")
    for split, n in ROWS.items():
        rows = json.loads((REPOSITORY / "data" / "FinQA-mini" / f"{split}.json").read_text())[:n]
        (folder / "data" / "FinQA-mini").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "FinQA-mini" / f"{split}.json").write_text(json.dumps(rows))
    for stage in ("preprocess_finqa", "process_finqa_code_generation", "filter_valid_answers"):
        words = ["--dataset", "FinQA-mini", "--split", "all", "--data-dir", str(folder / "data")]
        words += ["--teacher", "program"] if stage == "process_finqa_code_generation" else []
        subprocess.run([sys.executable, "-m", f"preprocessing.{stage}", *words], check=True, cwd=REPOSITORY)
    with hub_server(folder / "hub") as hub:
        hub.accounts = {WRITER: Account("writer"), READER: Account("writer", writes=False)}
        run = Commands(hub, folder)
        done = run("main.py", *STUDENT, "writer", *TRAIN, "--push", "--private")
        assert done.returncode == 0, done.stderr
        assert f"pushed {run.folders.model('FinQA-mini', MODEL_ID)} to {hub.url}/writer/{MODEL_ID}" in done.stdout
        run.trained = list(hub.seen)
        yield run


@pytest.fixture(autouse=True)
def forget(commands: Commands) -> None:
    commands.hub.seen.clear()
    commands.hub.faults.clear()


def test_the_push_holds_a_whole_student_with_a_card_and_no_path_of_this_machine_in_it(commands: Commands):
    repository = commands.hub.repositories[f"writer/{MODEL_ID}"]
    assert repository.private
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    } <= repository.files.keys()
    assert not [path for path in repository.files if "checkpoint" in path or "wandb" in path]
    for path in ("README.md", "adapter_config.json"):
        assert str(REPOSITORY) not in commands.hub.read(f"writer/{MODEL_ID}", path).decode()
    assert "| 16 | 1 | 4 | 0.01 |" in commands.hub.read(f"writer/{MODEL_ID}", "README.md").decode()


def test_the_adapter_is_evaluated_by_its_name_with_vllm_over_a_download_that_breaks_once(commands: Commands):
    pytest.importorskip("vllm")
    empty = commands.rows_alone("evaluated")
    words = [*STUDENT, "writer", *TRAIN, "-NT", "-T", "--VLLM", "--limit", "2", "--max-new-tokens", "8"]
    words += ["--check-adapter"]
    commands.hub.faults = [Fault("GET", "/storage/*", after_bytes=1000)]
    done = commands("main.py", *words, elsewhere=empty)
    assert done.returncode == 0, done.stderr
    assert commands.hub.asked("GET", "/storage/*") == 2, "broken once, then whole"
    assert not (commands.folder / empty / "models").exists()
    results = commands.folders.evaluation("FinQA-mini", MODEL_ID, "test", "fine-tuned")
    manifest = json.loads((results / "run.json").read_text())
    assert manifest["student_hash"] == weights_hash(commands.folders.model("FinQA-mini", MODEL_ID))
    assert manifest["served"]["engine"] == "vllm"
    assert json.loads((results / "metrics.json").read_text())["n"] == 2
    checked = manifest["adapter_check"]
    assert checked["active"] and checked["vllm_adapter"] == "merged" and checked["kl_vllm"] < checked["kl_base"]
    assert started.times_said("starting vLLM", done.stdout) == 1, "the engine that evaluates is asked for the check too"


def test_an_evaluation_with_push_sends_the_card_with_its_accuracy(commands: Commands):
    def card() -> str:
        return commands.hub.read(f"writer/{MODEL_ID}", "README.md").decode()

    words = [*STUDENT, "writer", *TRAIN, "-NT", "-D", "--limit", "2", "--max-new-tokens", "4"]
    assert commands("main.py", *words).returncode == 0
    assert "model-index" not in card() and commands.hub.seen == [], "only what is asked for is sent"
    assert commands("main.py", *words, "--push", "--private").returncode == 0
    assert "- type: accuracy" in card() and "| dev | this model | 2 | " in card()
    assert not commands.hub.asked("PUT", "/storage/*"), "the weights are there already"


def test_the_merged_model_comes_back_by_its_name_with_the_weights_that_were_merged(commands: Commands):
    empty = commands.rows_alone("merged")
    done = commands(
        "crosscoder-model-diff/merge_and_push_lora.py", *STUDENT, "writer", *TRAIN[-2:], "--push", elsewhere=empty
    )
    assert done.returncode == 0, done.stderr
    repository = commands.hub.repositories[f"writer/{MERGED}"]
    assert not repository.private
    assert f'from_pretrained("writer/{MERGED}")' in commands.hub.read(f"writer/{MERGED}", "README.md").decode()
    local = Folders(data=commands.folder / empty).model("FinQA-mini", MERGED)
    script = commands.folder / "load.py"
    script.write_text(
        "import sys, torch\nfrom finqa.models.students import load_base, load_tokenizer\n"
        "name, folder = sys.argv[1:3]\n"
        "hub, here = (load_base(m, torch.bfloat16, 'cpu').state_dict() for m in (name, folder))\n"
        "assert hub.keys() == here.keys() and all(torch.equal(hub[key], here[key]) for key in here)\n"
        "base = load_base('pocket-mistral', torch.bfloat16, 'cpu').state_dict()\n"
        "print('tensors', len(here), 'apart from the base', sum(not torch.equal(here[k], base[k]) for k in base))\n"
        "print(load_tokenizer(name).chat_template == load_tokenizer('pocket-mistral').chat_template)\n"
    )
    loaded = commands(str(script), f"writer/{MERGED}", local)
    assert loaded.returncode == 0, loaded.stderr
    *_, tensors, same_template = loaded.stdout.splitlines()
    assert tensors.split()[0] == "tensors" and int(tensors.split()[-1]) > 0 and same_template == "True"


def test_no_manifest_nor_log_holds_a_token(commands: Commands):
    files = [
        file
        for file in commands.folder.rglob("*")
        if file.is_file() and "blobs" not in file.parts and file.suffix not in {".safetensors", ".pt", ".bin"}
    ]
    assert any(file.name == "run.json" for file in files)
    told = [file for file in files if any(token.encode() in file.read_bytes() for token in (WRITER, READER))]
    assert not told


def test_without_a_push_the_hub_hears_nothing(commands: Commands):
    done = commands("main.py", *STUDENT, "writer", *TRAIN, "--no-push")
    assert done.returncode == 0 and "already trained" in done.stdout
    assert commands.hub.seen == []


def test_without_a_name_the_account_is_the_one_that_is_logged_in(commands: Commands):
    done = commands("main.py", *STUDENT, *TRAIN, "--push")
    assert done.returncode == 0 and f"to {commands.hub.url}/writer/{MODEL_ID}" in done.stdout
    assert not commands.hub.asked("PUT", "/storage/*"), "what is there already is not sent again"


def test_training_asks_the_hub_for_nothing_and_the_push_takes_the_lfs_way(commands: Commands):
    model = f"writer/{MODEL_ID}"
    wanted = ["/api/whoami-v2", "/api/whoami-v2", "/api/repos/create", f"/api/models/{model}", "/api/validate-yaml"]
    wanted += [f"/api/models/{model}/preupload/main", f"/{model}.git/info/lfs/objects/batch", "/storage/*"]
    wanted += [f"/{model}.git/info/lfs/objects/verify", f"/api/models/{model}/commit/main"]
    assert {seen.path if seen.method != "PUT" else "/storage/*" for seen in commands.trained} - {HARNESSES} == {*wanted}


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("writer", None, "no Hub token is here (log in with: hf auth login)"),
        ("writer", READER, "this token may only read (make one that may write"),
        ("other", WRITER, "the Hub refuses to let you write other/"),
    ],
)
def test_a_push_that_may_not_be_is_skipped_in_one_line_and_an_error_with_push(
    commands: Commands, name: str, token: str | None, says: str
):
    before = dict(commands.hub.repositories)
    skipped = commands("main.py", *STUDENT, name, *TRAIN, token=token)
    assert skipped.returncode == 0, skipped.stderr
    [line] = [line for line in skipped.stdout.splitlines() if "push" in line]
    assert line.startswith("not pushed to the Hub: ") and says in line
    assert says in commands.error(commands("main.py", *STUDENT, name, *TRAIN, "--push", token=token))
    assert commands.hub.repositories == before


def test_a_token_that_may_not_write_is_told_before_the_training(commands: Commands):
    words = [*STUDENT, "writer", *TRAIN, "--run-name", "never", "--push"]
    assert "may only read" in commands.error(commands("main.py", *words, token=READER))
    assert not commands.folders.model("FinQA-mini", f"{MODEL_ID}-never").exists()


def test_a_private_adapter_without_a_token_is_looked_for_in_both_places(commands: Commands):
    empty = commands.rows_alone("nobody")
    commands.forget_downloads()
    done = commands("main.py", *STUDENT, "writer", *TRAIN, "-NT", "-T", token=None, elsewhere=empty)
    error = commands.error(done)
    assert str(commands.folder / empty / "models") in error and f"on the Hub as writer/{MODEL_ID}" in error
    assert "if it is private, log in with: hf auth login" in error and "make it with: python main.py" in error


def test_a_gated_base_says_to_accept_its_terms_and_log_in(commands: Commands):
    pocket = REPOSITORY / "data" / "models" / "pocket-mistral"
    commands.hub.create("big/gated", gated=True)
    commands.hub.put_folder("big/gated", pocket)
    for token in (None, WRITER):
        error = commands.error(
            commands("main.py", "FinQA-mini", "big/gated", "writer", *TRAIN, "--no-push", token=token)
        )
        assert "the Hub refuses access to big/gated: accept the model's terms" in error and "hf auth login" in error


def test_a_revision_pins_the_base(commands: Commands, tiny_student: Path):
    """A base on the Hub whose main branch has moved on: its adapter is evaluated at the commit it was trained on."""
    hub, pocket = commands.hub, REPOSITORY / "data" / "models" / "pocket-mistral"
    hub.create("writer/pocket-mistral")
    pinned = hub.put_folder("writer/pocket-mistral", pocket)
    hub.put("writer/pocket-mistral", "model.safetensors", (tiny_student / "model.safetensors").read_bytes())
    model_id = MODEL_ID.replace("pocket-mistral", "writer_pocket-mistral")
    shutil.copytree(commands.folders.model("FinQA-mini", MODEL_ID), commands.folders.model("FinQA-mini", model_id))
    words = ["FinQA-mini", "writer/pocket-mistral", "writer", *TRAIN, "-NT", "-T", "--limit", "1"]
    words += ["--max-new-tokens", "2"]
    done = commands("main.py", *words, "--revision", pinned)
    assert done.returncode == 0, done.stderr
    served = commands.folders.evaluation("FinQA-mini", model_id, "test", "fine-tuned")
    assert json.loads((served / "run.json").read_text())["base_hash"] == weights_hash(pocket)
    assert not commands.hub.asked("GET", "/api/models/writer/pocket-mistral/revision/main")
    assert "has no revision v9" in commands.error(commands("main.py", *words, "--revision", "v9"))


def test_a_connection_that_keeps_breaking_is_one_line(commands: Commands):
    empty = commands.rows_alone("broken")
    commands.hub.faults = [Fault("GET", "*/revision/main", times=None)]
    commands.forget_downloads()
    done = commands("main.py", *STUDENT, "writer", *TRAIN, "-NT", "-T", elsewhere=empty)
    assert f"the connection to the Hub broke while working on writer/{MODEL_ID}" in commands.error(done)
