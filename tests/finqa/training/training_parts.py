"""What the tests of fine-tuning share: rows, settings of a tiny student, a launcher."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import started

from finqa.models.settings import StudentSettings
from finqa.models.students import training_ids
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.records import TeacherRow, write_teacher_rows
from finqa.training.rows import Example, example

SETTINGS = StudentSettings(
    lora_r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    learning_rate=1e-2,
    optim="adamw_torch",
    batch_size=4,
    max_seq_length=512,
    max_new_tokens=32,
)


def teacher_row(number: int, kind: str = "known", padding: int = 0) -> TeacherRow:
    prompt = f"###Passage:\nsales of {number} {'and more ' * padding}\n###Question:\nwhat ?\n###Python"
    code = f"sales = {number}\nans = sales - 1"
    return TeacherRow(prompt, code, str(number - 1), str(number - 1), id=f"row-{number}", family_kind=kind, family="f")


def examples(rows: list[TeacherRow], tokenizer: Any) -> list[Example]:
    return [example(row.id, *training_ids(tokenizer, row.prompt, row.generated_code)) for row in rows]


def folders_with_rows(path: Path, n_rows: int = 40) -> Folders:
    """Data and results folders below `path`, with training rows of several lengths."""
    folders = Folders(data=path / "data", results=path / "results")
    rows = [teacher_row(i, "known" if i % 4 else "new", padding=i % 7) for i in range(n_rows)]
    write_teacher_rows(folders.filtered("FinQA-mini", "train"), rows)
    return folders


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def script(folder: Path, name: str, run: Any, config: Any, prelude: str = "") -> Path:
    """A script that fine-tunes `run` in the data folder of its first argument, `prelude` before that."""
    path = folder / f"{name}.py"
    path.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from finqa.runtime.errors import report_errors\n"
        "from finqa.runtime.paths import Folders\n"
        "from finqa.models.settings import StudentSettings\n"
        "from finqa.models.students import StudentRun\n"
        "from finqa.training.trainable import Speed\n"
        "from finqa.training.fine_tuning import TrainingConfig, fine_tune\n"
        f"{prelude}\n"
        "def main():\n"
        f"    fine_tune({run!r}, {config!r}, Folders(data=Path(sys.argv[1])))\n"
        "sys.exit(report_errors(main))\n"
    )
    return path


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node {processes}",
    # What it does by itself where there are several GPUs. (With --cpu it needs MPI to start more than one process.)
    "accelerate launch": "-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes {processes} "
    "--main_process_port 0 --mixed_precision no --dynamo_backend no",
}


def launch(
    script: Path, *words: object, processes: int = 1, launcher: str = "torchrun"
) -> subprocess.CompletedProcess[str]:
    """Run a script by itself, or in several processes by a launcher."""
    launched = LAUNCHERS[launcher].format(processes=processes).split() if processes > 1 else []
    return started.run([*launched, script, *words], REPOSITORY)
