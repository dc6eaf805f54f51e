"""Scripts of the project, each run in a process of its own, without the wait for torch and transformers.

Importing these takes longer than most of what a test runs afterwards. One process for each of pytest's imports them,
and forks for every run: the script starts at its first line in a new process, with its own arguments, folder,
environment and output, and none of the project's modules is imported before. What is about a start itself (imports,
help, several processes, an engine) starts a Python of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

READ_WHEN_IMPORTED = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Variables that the libraries look at once, when they start."""
LIBRARIES = (
    "datasets",
    "matplotlib.pyplot",
    "nnsight",
    "pandas",
    "peft",
    "torch",
    "transformers.integrations.mistral.tokenizer",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
)
"""What the scripts import of others, once they have something to do."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FORKS = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()
"""A GPU's driver does not survive a fork."""


_STARTERS: dict[tuple[str | None, ...], subprocess.Popen[str]] = {}
"""By what READ_WHEN_IMPORTED says, the one that was used last at the end; two at most, for each holds its libraries."""


def run(
    words: Sequence[object], cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script's path, or -m and a module, with what follows it; as subprocess.run does, with its output kept."""
    return killed_when(None, words, cwd, env)


def times_said(text: str, output: str) -> int:
    """Lines with a text, without those that repeat the last one after a silence."""
    return sum(text in line and "still under way" not in line for line in output.splitlines())


def killed_when(
    happened: Callable[[], object] | None,
    words: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`run` a script, and kill it once something has happened, unless it ends before."""
    env = dict(os.environ if env is None else env)
    said = [str(word) for word in words]
    if not FORKS or "--VLLM" in said:  # vLLM sets torch up before it is imported
        said.insert(0, sys.executable)
        pipe = subprocess.PIPE
        with subprocess.Popen(said, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True) as process:
            _kill(process.pid, happened, lambda: process.poll() is not None)
            outputs = process.communicate()
        return subprocess.CompletedProcess(said, process.returncode, *outputs)
    starter = _starter(env)
    assert starter.stdin and starter.stdout
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()  # a run may be killed before it has
        asked = {"words": said, "cwd": str(cwd or Path.cwd()), "env": env, "outputs": list(map(str, outputs))}
        try:
            starter.stdin.write(json.dumps(asked) + "\n")
            starter.stdin.flush()
            pid = int(starter.stdout.readline())
            _kill(pid, happened, lambda: not Path(f"/proc/{pid}").exists())
            code = int(starter.stdout.readline())
        except BaseException:  # the test was told to end: no later one shall read this one's exit code
            os.killpg(starter.pid, signal.SIGKILL)
            _STARTERS.clear()
            raise
        return subprocess.CompletedProcess(said, code, *(path.read_text() for path in outputs))


def _kill(pid: int, happened: Callable[[], object] | None, ended: Callable[[], bool]) -> None:
    while happened and not ended():
        if happened():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.002)


def paste(block: str, cwd: Path, env: Mapping[str, str]) -> str:
    """Run a block in a shell that stops at the first error and whose `python` is `run`; gives what `python` printed."""
    python = 'python() { echo "${PWD@Q} ${*@Q}"; read -r code; return $code; }\n'
    words, pipe = ["bash", "-ec", python + block], subprocess.PIPE
    with subprocess.Popen(words, cwd=cwd, env=env, stdin=pipe, stdout=pipe, text=True) as shell:
        assert shell.stdin and shell.stdout
        done: list[subprocess.CompletedProcess[str]] = []
        for line in shell.stdout:
            folder, *words = shlex.split(line)
            done.append(run(words, Path(folder), env))
            print(done[-1].returncode, file=shell.stdin, flush=True)
    assert shell.returncode == 0, done[-1].stdout[-2000:] + done[-1].stderr[-2000:]
    return "".join(one.stdout for one in done)


def kill_one_of_two(words: Sequence[object], cwd: Path, rank: int, there: Callable[[], object]) -> tuple[float, str]:
    """Start two processes by torchrun and kill one of them once `there()`; seconds until all had ended, and stderr."""
    import psutil

    launched = [sys.executable, *TORCHRUN, *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        launched, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not there():
            time.sleep(0.002)
        [one] = (
            child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)
        )  # fmt: skip
        one.kill()
        killed = time.monotonic()
        said = process.communicate()[1]
    assert process.returncode != 0
    return time.monotonic() - killed, said


def _starter(env: Mapping[str, str]) -> subprocess.Popen[str]:
    """The process that forks; it ends when its input does, at the latest with this process."""
    key = tuple(map(env.get, READ_WHEN_IMPORTED))
    if key not in _STARTERS and len(_STARTERS) == 2:
        with _STARTERS.pop(next(iter(_STARTERS))):
            pass
    alone = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread would not come along
    alone["PYTHONPATH"] = ""  # of every run its own
    _STARTERS[key] = _STARTERS.pop(key, None) or subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**env, **alone},
        start_new_session=True,
    )  # fmt: skip
    return _STARTERS[key]


def _serve() -> list[str]:
    """Fork for every line of the input, and write process id and exit code; returns in the new process what it runs."""
    import gc
    from importlib import import_module

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print when they are imported

    sys.modules["rfc3987_syntax"] = None  # pyright: ignore[reportArgumentType]  # as finqa.models.templates has it
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # another version has it elsewhere: the script imports it then
            import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            answers.close()
            asked = json.loads(line)
            _become(asked["cwd"], asked["env"], asked["outputs"])
            return asked["words"]
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
    sys.exit()


def _become(cwd: str, env: Mapping[str, str], outputs: Sequence[str]) -> None:
    """Take the place that a started process would have."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for number, path in enumerate([os.devnull, *outputs]):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)


def _run(words: list[str]) -> None:
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(str(Path(words[0]).absolute()), run_name="__main__")


if __name__ == "__main__":
    _run(_serve())
