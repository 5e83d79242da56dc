"""How a row of the GPU's table reads, on a terminal and in the documentation."""

from typing import Any

HEAD = ("", "backend", "ms", "middle half", "host ms", "kernels ms", "of bandwidth", "scratch, MiB", "state, MiB",
        "first step, ms", "error", "margin")  # fmt: skip
MEBIBYTE = 2**20


def cells(row: dict[str, Any]) -> list[str]:
    """One for each head. What is missing says why."""
    if "missing" in row:
        return [row["name"], row["missing"], *["–"] * (len(HEAD) - 2)]
    low, high = row.get("low_ms"), row.get("high_ms")
    half = "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"
    return [
        row["name"],
        row.get("backend") or "–",
        f"{row['median_ms']:.2f}",
        half,
        _number(row, "host_ms", ".2f"),
        _number(row, "busy_ms", ".2f"),
        _number(row, "of_bandwidth", ".0%").replace("%", " %"),
        _number(row, "scratch_bytes", ".1f", MEBIBYTE),
        _number(row, "state_bytes", ".1f", MEBIBYTE),
        _number(row, "cold_start_ms", ".0f"),
        _number(row, "error", ".1e"),
        _number(row, "margin", ".2f"),
    ]


def _number(row: dict[str, Any], name: str, style: str, unit: int = 1) -> str:
    value = row.get(name)
    return "–" if value is None else format(value / unit, style)
