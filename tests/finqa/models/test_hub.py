"""Fetching from and pushing to a Hub on this machine, by the real client in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_contents import Account, Fault
from hub_server import HubServer, hub_server

WRITER, READER, STRANGER = "hf_thewriterstoken", "hf_thereaderstoken", "hf_anunknowntoken"
NOBODY = "http://127.0.0.1:9"
CONTENT = bytes(range(256)) * 4096
"""One mebibyte."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as server:
        server.accounts = {WRITER: Account("writer"), READER: Account("writer", writes=False)}
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a push could take, and what it must leave."""
    folder = tmp_path / "student"
    for name in ("checkpoint-5/optimizer.bin", "wandb/log", "unfinished.tmp/model.safetensors", ".run.json.x1", ".c/y"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("at home")
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "run.json").write_text("{}")
    return folder


def ask(
    endpoint: HubServer | str, call: str, home: Path, token: str | None = WRITER, xet: bool = False, offline: str = "0"
) -> str:
    """What a process says that makes the call; `gave ...` or `refused ...` is its last line.

    The client waits longer and longer before it tries again; here it does not wait.
    """
    script = (
        "import time\nfrom pathlib import Path\n"
        "from finqa.models import hub\nfrom finqa.runtime.errors import UserError\n"
        "time.sleep = lambda seconds: None\n"
        f"try: print('gave', {call})\nexcept UserError as error: print('refused', error)\n"
    )
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": offline, "NO_PROXY": "*"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert not any(known in done.stdout + done.stderr for known in (WRITER, READER, STRANGER))
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    return done.stdout


def push(folder: Path, name: str = "writer/model", push: bool | None = True, private: bool = False) -> str:
    return f"hub.push_folder(Path({str(folder)!r}), {name!r}, {push}, {private})"


def fetch(name: str = "writer/model", revision: str | None = None) -> str:
    return f"{{f.name: len(f.read_bytes()) for f in hub.fetch_folder({name!r}, {revision!r}).iterdir()}}"


# Push


def test_what_is_pushed_comes_back_and_checkpoints_and_half_files_stay_at_home(hub: HubServer, folder: Path, tmp_path):
    assert ask(hub, push(folder), tmp_path).endswith(f"gave {hub.url}/writer/model\n")
    assert hub.repositories["writer/model"].files.keys() == {".gitattributes", "model.safetensors", "run.json"}
    assert hub.read("writer/model", "model.safetensors") == CONTENT
    assert not hub.repositories["writer/model"].private
    back = ask(hub, fetch(), tmp_path, token=None)
    assert "'model.safetensors': 1048576" in back and "'run.json': 2" in back


def test_large_files_go_the_lfs_way_as_xet_is_switched_off_and_nothing_is_sent_twice(hub, folder, tmp_path):
    for _ in range(2):
        assert f"gave {hub.url}" in ask(hub, push(folder), tmp_path)
    assert hub.asked("POST", "/writer/model.git/info/lfs/objects/batch") == 2
    assert hub.asked("PUT", "/storage/*") == 1
    assert not hub.asked("GET", "*xet*")
    assert len(hub.repositories["writer/model"].commits) == 2


@pytest.mark.parametrize("public_before", [False, True])
def test_private_makes_it_private_before_anything_is_sent(hub, folder, tmp_path, public_before: bool):
    if public_before:
        hub.create("writer/model")
    ask(hub, push(folder, private=True), tmp_path)
    assert hub.repositories["writer/model"].private
    paths = [seen.path for seen in hub.seen]
    if public_before:
        assert paths.index("/api/models/writer/model/settings") < paths.index("/api/models/writer/model/preupload/main")
    assert "gave None" in ask(hub, "hub.fetch_folder('writer/model')", tmp_path, token=None)
    assert "model.safetensors" in ask(hub, fetch(), tmp_path)


def test_without_a_token_the_push_is_skipped_in_one_line_and_an_error_where_it_was_asked_for(hub, folder, tmp_path):
    said = ask(hub, push(folder, push=None), tmp_path, token=None)
    assert said == "not pushed to the Hub: no Hub token is here (log in with: hf auth login)\ngave None\n"
    assert "refused cannot push" in ask(hub, push(folder), tmp_path, token=None)
    assert ask(hub, push(folder, push=False), tmp_path) == "gave None\n"
    assert not [seen for seen in hub.seen if seen.path != "/api/agent-harnesses"]


@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        (READER, "writer/model", "this token may only read"),
        (STRANGER, "writer/model", "the Hub does not know this token"),
        (WRITER, "other/model", "may write there (hf auth login), give an HF_NAME that is yours"),
        (WRITER, "other/theirs", "may write there (hf auth login), give an HF_NAME that is yours"),
        (WRITER, f"writer/{'long' * 25}", "the Hub takes no repository called"),
    ],
)
def test_a_push_that_may_not_be_is_one_line_that_says_what_to_do(hub, folder, tmp_path, token, name, says):
    theirs = hub.create("other/theirs")
    said = ask(hub, push(folder, name), tmp_path, token)
    assert said.startswith("refused ") and says in said and len(said.splitlines()) == 1
    optional = ask(hub, push(folder, name, push=None), tmp_path, token)
    assert optional.startswith("not pushed to the Hub: ") and says in optional and optional.endswith("\ngave None\n")
    assert hub.repositories.keys() == {"other/theirs"} and theirs.files.keys() == {".gitattributes"}


def test_a_card_that_the_hub_does_not_take_is_told_in_its_words(hub, folder, tmp_path):
    (folder / "README.md").write_text("---\nbase_model: /a/folder/here\n---\n")
    said = ask(hub, push(folder), tmp_path)
    assert 'refused the Hub answered 400 for writer/model ("base_model" with value' in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "path", "xet"), [("PUT", "/storage/*", False), ("GET", "*/xet-write-token/*", True)]
)
def test_storage_that_refuses_a_file_is_one_line(hub, folder, tmp_path, method: str, path: str, xet: bool):
    hub.faults = [Fault(method, path, status=403)]
    said = ask(hub, push(folder), tmp_path, xet=xet)
    assert said.startswith("refused the Hub refuses to let you write writer/model") and len(said.splitlines()) == 1
    assert hub.asked(method, path) == 1
    assert hub.repositories["writer/model"].files.keys() == {".gitattributes"}


def test_an_upload_that_breaks_half_way_is_sent_again(hub, folder, tmp_path):
    hub.faults = [Fault("PUT", "/storage/*", after_bytes=len(CONTENT) // 2)]
    assert "gave http" in ask(hub, push(folder), tmp_path)
    assert hub.read("writer/model", "model.safetensors") == CONTENT
    assert hub.asked("PUT", "/storage/*") == 2


def test_an_upload_that_always_breaks_is_one_line_leaves_nothing_half_and_goes_on_when_run_again(hub, folder, tmp_path):
    hub.faults = [Fault("PUT", "/storage/*", after_bytes=len(CONTENT) // 2, times=None)]
    said = ask(hub, push(folder), tmp_path)
    assert said.startswith("refused the connection to the Hub broke while working on writer/model")
    assert len(said.splitlines()) == 1 and hub.asked("PUT", "/storage/*") > 2
    assert hub.repositories["writer/model"].files.keys() == {".gitattributes"}
    hub.faults = []
    assert "gave http" in ask(hub, push(folder), tmp_path)
    assert hub.read("writer/model", "model.safetensors") == CONTENT


def test_a_commit_whose_connection_breaks_is_one_line_and_the_next_run_sends_no_file_again(hub, folder, tmp_path):
    hub.faults = [Fault("POST", "/api/models/writer/model/commit/main")]
    assert "refused the connection to the Hub broke" in ask(hub, push(folder), tmp_path)
    assert hub.repositories["writer/model"].files.keys() == {".gitattributes"}
    assert "gave http" in ask(hub, push(folder), tmp_path)
    assert hub.asked("PUT", "/storage/*") == 1
    assert "model.safetensors" in hub.repositories["writer/model"].files


# Fetch


@pytest.fixture
def model(hub: HubServer) -> str:
    hub.create("writer/model")
    hub.put("writer/model", "model.safetensors", CONTENT)
    return hub.put("writer/model", "config.json", b"{}")


def test_a_download_that_breaks_half_way_goes_on_where_it_was(hub, tmp_path):
    hub.create("writer/big")
    hub.put("writer/big", "model.safetensors", CONTENT * 12)
    hub.faults = [Fault("GET", "/storage/*", after_bytes=len(CONTENT) * 11)]
    sha256 = "hashlib.sha256((hub.fetch_folder('writer/big') / 'model.safetensors').read_bytes()).hexdigest()"
    said = ask(hub, sha256.replace("hashlib", "__import__('hashlib')"), tmp_path)
    assert said == f"gave {hub.repositories['writer/big'].files['model.safetensors'].sha256}\n"
    ranges = [seen.range for seen in hub.seen if seen.path.startswith("/storage/")]
    assert ranges == [None, f"bytes={len(CONTENT) * 10}-"], "the client writes in pieces of ten mebibytes"


def test_a_download_that_always_breaks_is_one_line_and_nothing_half_is_taken_for_whole(hub, model, tmp_path):
    hub.faults = [Fault("GET", "/storage/*", after_bytes=len(CONTENT) // 2, times=None)]
    said = ask(hub, fetch(), tmp_path)
    assert said.splitlines()[-1].startswith("refused the connection to the Hub broke while working on writer/model")
    assert not list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    assert ask(hub, "hub.fetch_folder('writer/model')", tmp_path, offline="1") == "gave None\n"
    assert "refused the connection to the Hub broke" in ask(NOBODY, fetch(), tmp_path)
    assert hub.asked("GET", "/storage/*") > 2
    hub.faults, hub.seen = [], []
    assert "'model.safetensors': 1048576" in ask(hub, fetch(), tmp_path)
    assert not hub.asked("GET", "*/config.json"), "what had arrived is fetched again"


def test_a_connection_that_is_reset_once_is_tried_again(hub, model, tmp_path):
    hub.faults = [Fault("GET", "/api/models/writer/model/tree/*", after_bytes=20)]
    assert "model.safetensors" in ask(hub, fetch(), tmp_path)
    assert hub.asked("GET", "/api/models/writer/model/tree/*") == 2


@pytest.mark.parametrize("token", [None, STRANGER, "hf_someoneelsestoken"])
def test_a_gated_model_says_to_accept_its_terms_and_log_in(hub, tmp_path, token: str | None):
    hub.accounts["hf_someoneelsestoken"] = Account("other")
    hub.create("writer/gated", gated=True)
    hub.put("writer/gated", "config.json", b"{}")
    said = ask(hub, fetch("writer/gated"), tmp_path, token)
    assert said.startswith(
        "refused the Hub refuses access to writer/gated: accept the model's terms on its page, and log"
    )
    assert "hf auth login" in said and len(said.splitlines()) == 1
    assert "config.json" in ask(hub, fetch("writer/gated"), tmp_path)


def test_a_revision_is_a_branch_a_commit_or_one_line(hub, model, tmp_path):
    hub.put("writer/model", "config.json", b'{"new": 1}')
    hub.put("writer/model", "config.json", b'{"a": "branch"}', branch="trial")
    for revision, size in ((None, 10), (model, 2), ("trial", 15)):
        assert f"'config.json': {size}" in ask(hub, fetch(revision=revision), tmp_path)
    assert "refused writer/model on the Hub has no revision v9" in ask(hub, fetch(revision="v9"), tmp_path)


def test_a_second_copy_of_the_weights_is_not_fetched(hub, model, tmp_path):
    for name in ("consolidated.safetensors", "consolidated.00.pth", "params.json"):
        hub.put("writer/model", name, b"the same once more")
    found = ask(hub, fetch(), tmp_path)
    assert "params.json" in found and "consolidated" not in found


def test_a_repository_that_is_not_there_is_none_and_a_private_one_may_need_a_login(hub, model, tmp_path):
    hub.repositories["writer/model"].private = True
    for token in (WRITER, None):
        assert ask(hub, "hub.fetch_folder('writer/nothing')", tmp_path, token) == "gave None\n"
    assert ask(hub, "hub.fetch_folder('writer/model')", tmp_path, None) == "gave None\n"
    assert "if it is private, log in with" in ask(hub, "hub.looked_for('writer/model')", tmp_path, None)
    assert ask(hub, "hub.looked_for('writer/model')", tmp_path) == "gave on the Hub as writer/model\n"


def test_a_hub_that_is_down_or_far_is_one_line_and_one_that_is_switched_off_is_none(hub, model, tmp_path):
    hub.faults = [Fault("GET", "/api/models/*", status=503, times=None)]
    down = ask(hub, fetch(), tmp_path)
    assert down.startswith("refused the Hub answered 503 for writer/model") and "try again later" in down
    for call in (fetch(), push(tmp_path)):
        assert "refused the connection to the Hub broke" in ask(NOBODY, call, tmp_path)
    assert ask(hub, "hub.fetch_folder('writer/model')", tmp_path, offline="1") == "gave None\n"


def test_the_logged_in_name_is_none_where_nobody_can_say_it(hub, tmp_path):
    assert ask(hub, "hub.logged_in_name()", tmp_path) == "gave writer\n"
    for endpoint, token in ((hub, None), (hub, STRANGER), (NOBODY, WRITER)):
        assert ask(endpoint, "hub.logged_in_name()", tmp_path, token) == "gave None\n"
