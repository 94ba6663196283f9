"""How a benchmark shows what it measured."""

from __future__ import annotations

import statistics


def medians(results: dict[str, list[float]]) -> dict[str, float]:
    """Give the median of each row."""
    return {name: statistics.median(found) for name, found in results.items()}


def print_table(title: str, results: dict[str, list[float]], form: str) -> None:
    """Print median, minimum and maximum of each row; `form` formats a number."""
    print(f"\n{title:46} {'median':>10} {'min':>10} {'max':>10}")
    for name, found in results.items():
        cells = (statistics.median(found), min(found), max(found))
        print(f"{name:46} " + " ".join(f"{cell:>10{form}}" for cell in cells))
