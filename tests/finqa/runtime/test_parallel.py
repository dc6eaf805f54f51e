"""What becomes of a process of several that goes on alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
