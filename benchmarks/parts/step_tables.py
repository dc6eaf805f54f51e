"""The tables of bench_crosscoder."""

from __future__ import annotations

from typing import Any

from benchmarks.parts.record import markdown_table


def step_table(results: dict[int, dict[str, Any]]) -> str:
    """One row a way: milliseconds and the ratio to the floor, for every size."""
    ways = list(dict.fromkeys(way for of in results.values() for way in of if way != "floor"))
    header = ("ms a step (times the floor)", *(f"{n:,} latents" for n in results))
    rows = [("floor", *(f"{of['floor']['both']:.2f}" for of in results.values()))]
    rows += [("of it products", *(f"{of['floor']['products']:.2f}" for of in results.values()))]
    left_out = []
    for way in ways:
        cells = []
        for of in results.values():
            result = of.get(way, "")
            if isinstance(result, str):
                left_out += [f"{way}: {result}"] if result else []
                cells.append("-")
            else:
                cells.append(f"{result['ms']:.2f} ({result['ms'] / of['floor']['both']:.2f})")
        rows.append((way, *cells))
    return "\n\n".join([markdown_table(header, rows), *dict.fromkeys(left_out)])


def explained_table(explained: dict[str, Any]) -> str:
    if not explained:
        return ""
    rows = []
    for way, of in explained.items():
        figures = ("instruct", "fine_tuned", "difference")
        cells = ["-"] * 4 if isinstance(of, str) else [*(f"{of[name]:.4f}" for name in figures), f"{of['l0']:.1f}"]
        rows.append((way, *cells))
    header = ("explained variance of held-out documents", "instruct", "fine-tuned", "difference", "L0")
    return "\n\n" + markdown_table(header, rows)
