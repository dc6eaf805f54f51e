"""The one line in which each stage says what it did, and the same figures for its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finqa.runtime.manifest import file_hash, write_manifest


@dataclass(frozen=True)
class Summary:
    """Rows of one split that went in, came out well, or were left out."""

    dataset: str
    split: str
    rows: int
    left_out: Counter[str]
    """Number of rows by reason."""
    seconds: float
    output: Path
    kept_as: str = "kept"
    left_out_as: str = "dropped"

    @property
    def kept(self) -> int:
        return self.rows - self.left_out.total()

    @property
    def left_out_share(self) -> float:
        return self.left_out.total() / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        rows = f"{self.rows} rows in, {self.kept} {self.kept_as}"
        left_out = f"{self.left_out.total()} {self.left_out_as}{by_reason(self.left_out)}"
        return f"{self.dataset} {self.split}: {rows}, {left_out}, {self.seconds:.1f} s -> {self.output}"

    def write_manifest(self, settings: dict[str, object], source: Path, **facts: object) -> None:
        """Write the run manifest beside the output, under its name: the stage's settings, what it read, the figures."""
        write_manifest(
            self.output.with_suffix(".run.json"),
            {"dataset": self.dataset, "split": self.split, **settings},
            inputs={source.name: file_hash(source)},
            **facts,
            rows=self.rows,
            kept=self.kept,
            left_out=dict(self.left_out.most_common()),
            seconds=round(self.seconds, 3),
        )


def table_of_reasons(summary: Summary) -> str:
    """What became of a split's rows, as a table of reason, rows and share: those kept first, then the commonest."""
    counts = [(summary.kept_as, summary.kept), *summary.left_out.most_common()]
    width = max(len("reason"), *(len(reason) for reason, _ in counts))
    lines = [f"{reason:<{width}}  {rows:>6,}  {rows / max(summary.rows, 1):>6.1%}" for reason, rows in counts]
    return "\n".join(f"  {line}" for line in (f"{'reason':<{width}}  {'rows':>6}  {'share':>6}", *lines))


def by_reason(reasons: Counter[str]) -> str:
    """` (wrong-answer 12, runtime 3)`, the commonest first; empty where there is none."""
    return f" ({', '.join(f'{reason} {count}' for reason, count in reasons.most_common())})" if reasons else ""


def count(reasons: Iterable[str]) -> Counter[str]:
    """Rows by reason; an empty reason is none."""
    return Counter(reason for reason in reasons if reason)
