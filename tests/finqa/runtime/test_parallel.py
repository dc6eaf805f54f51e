"""What becomes of a process of several that goes on alone, and of the others where one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.runtime import parallel
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY


def successor(tmp_path: Path, before: str, after: str) -> tuple[int, str]:
    """Process id and output of a script that runs `before` and then becomes one that runs `after`."""
    script = tmp_path / "before.py"
    script.write_text(
        f"import os, sys\nfrom finqa.runtime import parallel\n{before}\n"
        f"print('before', end=' ')\nparallel.go_on_alone([sys.executable, '-c', {after!r}, 'word'])\n"
    )
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    environment = os.environ | launched | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate()[0]
    assert process.returncode == 3
    return process.pid, output


def test_a_process_goes_on_alone_under_its_id_without_what_it_held(tmp_path: Path):
    held = "handle = os.open('/dev/null', os.O_RDONLY); os.set_inheritable(handle, True); os.dup2(handle, 57)"
    after = (
        "import json, os, sys\n"
        "try: os.fstat(57); held = True\n"
        "except OSError: held = False\n"
        "print(json.dumps([os.getpid(), sys.argv[1:], held, os.environ.get('WORLD_SIZE'), os.environ.get('RANK')]))\n"
        "sys.exit(3)"
    )
    pid, output = successor(tmp_path, held, after)
    told, found = output.split(" ", 1)
    assert told == "before"
    assert json.loads(found) == [pid, ["word"], False, None, None]


@pytest.mark.gpu
def test_the_memory_that_it_held_on_a_gpu_is_free(tmp_path: Path):
    used = "import sys, torch\nfree, there = torch.cuda.mem_get_info()\nprint(there - free, end=' ')\n"
    held = f"{used}held = torch.ones(2**30, device='cuda')\n{used}"
    _, output = successor(tmp_path, held, f"{used}sys.exit(3)")
    # Others may use the GPU: what is held against is what was in use before this process took 4.3e9 bytes.
    before, with_it, _, afterwards = (int(word) if word.isdigit() else 0 for word in output.split())
    assert with_it - before > 4e9
    assert afterwards - before < 2e9


DYING = """
import os, signal, sys, time
from pathlib import Path
from finqa.runtime import parallel
from finqa.runtime.errors import UserError, report_errors

def main():
    parallel.wait_for_all()
    HOW
    time.sleep(0.2)
    parallel.wait_for_all()

sys.exit(report_errors(main))
"""
IN_ONE = "if parallel.rank() == {}: {}"
KILLED, RAISED = "os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('a fault')"
ANY_BUT_ONE = "else: time.sleep(300)"
GONE = "error: another process of this run is gone (killed, or its machine is out of reach); the same command goes on"
ENDED = "error: ended by the launcher, as another process of this run or it was; the same command goes on"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param(IN_ONE.format(0, KILLED), (GONE, ENDED), id="the first is killed, the others wait for it"),
        pytest.param(IN_ONE.format(2, KILLED), (GONE, ENDED), id="another one is killed"),
        pytest.param(IN_ONE.format(1, KILLED) + "\n    " + ANY_BUT_ONE, (ENDED,), id="the others are at work"),
        pytest.param(IN_ONE.format(1, RAISED), ("ValueError: a fault",), id="one raises"),
        pytest.param(IN_ONE.format(1, "raise UserError('a line')"), ("error: a line",), id="one says what is wrong"),
        pytest.param("raise UserError('a line')", ("error: a line",), id="all find the same wrong"),
        pytest.param(
            "parallel.check_shared(Path('data'), f'{parallel.rank() // 2} shards')",
            ("error: data is not the same for all processes (process 0: 0 shards, process 1: 0 shards, process 2: 1 ",),
            id="two machines share no folder",
        ),
        pytest.param("raise KeyboardInterrupt", ("interrupted; the same command goes on",), id="all are interrupted"),
    ],
)
def test_a_process_that_ends_ends_the_others_at_once_and_one_line_says_why(
    how: str, said: tuple[str, ...], tmp_path: Path
):
    script = tmp_path / "dying.py"
    script.write_text(DYING.replace("HOW", how))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    ours = done.stderr.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    lines = [line for line in ours.splitlines() if line.startswith(("error:", "interrupted", "ValueError", "Runtime"))]
    assert len(lines) == 1 and lines[0].startswith(said), done.stderr


def test_each_process_has_a_gpu_of_its_own_or_one_line_says_that_there_are_too_few(monkeypatch: pytest.MonkeyPatch):
    import torch

    assert parallel.own_device("cuda:1") == "cuda:1" and parallel.own_device("cpu") == "cpu"
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.own_device("cuda") == "cuda:1" and parallel.own_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"--device cuda:0 is one GPU.*2 processes.*--device cuda"):
        parallel.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes need as many GPUs, and 1 are here; give --nproc-per-node 1"):
        parallel.own_device("cuda")
