"""`python -m benchmarks tables [--check]`: the Markdown tables of README and docs, made from the committed results.

A table stands between `<!-- table: name -->` and `<!-- /table -->`, and nobody types one.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import eightbit, results
from benchmarks.gpu import cells as gpu_cells
from benchmarks.gpu import targets
from trysquare_conformance.demo import comparison as trained
from trysquare_conformance.demo import eightbit as trained8bit
from trysquare_conformance.demo import percent

MARK = re.compile(r"(?P<begin><!-- table: (?P<name>\w+) -->\n)(?P<body>.*?)(?P<end><!-- /table -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"
MEBIBYTE = 2**20


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """A table whose last `numbers` columns are set flush right."""
    rule = ["---"] * (len(head) - numbers) + ["--:"] * numbers
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def machine_line(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}: `{result['command']}`"


def demo(result: dict[str, Any]) -> str:
    """AdamW's figure is the one with softmax: it comes first."""
    head = ("", "loss", "lr", "test accuracy", "best", "first epoch ≥ 99 %")
    rows = [demo_row(row) for row in result["runs"]]
    note = f"Accuracy on the 60 % of the pairs that nobody trained on, after {result['epochs']} epochs. "
    return f"{markdown(head, rows, 4)}\n{note}{machine_line(result)}.\n"


def demo_row(row: dict[str, Any]) -> list[str]:
    learnt = "never" if row["learnt_at"] is None else str(row["learnt_at"])
    accuracies = [percent(row["final"], 1), percent(row["best"], 1)]
    return [row["optimizer"], row["loss"], f"{row['lr']:g}", *accuracies, learnt]


def cpu(result: dict[str, Any]) -> str:
    """Steps first, then the losses and what was to be reached."""
    fused = "AdamW(fused=True)"
    head = ("", "ms", f"× {fused}", "of bandwidth", "scratch, MiB", "first step, ms", "float64 error", "margin")
    table = markdown(head, [cpu_row(row, fused) for row in result["rows"]], 7)
    losses = markdown(("", "ms", "peak, MiB"), [loss_row(row) for row in result["losses"]], 2)
    bars = markdown(("ratio", "measured", "wanted"), [bar_row(row) for row in result["bars"]], 2)
    return f"{table}\n{bars}\n{losses}\n{cpu_note(result)}"


def cpu_note(result: dict[str, Any]) -> str:
    ceilings, imports = result["ceilings"], result["import_ms"]
    return (
        f"Medians of {result['rounds']} interleaved rounds on {result['threads']} threads. In the same rounds copying "
        f"moves {ceilings['copy_gb_per_s']:.1f} GB/s, scaling in place {ceilings['in_place_gb_per_s']:.1f} GB/s, and "
        f"float32 products make {ceilings['matmul_gflop_per_s']:.0f} GFLOP/s. `import trysquare` adds "
        f"{imports['trysquare']:.0f} ms to the {imports['torch']:.0f} ms of `import torch`. {machine_line(result)}.\n"
    )


def cpu_row(row: dict[str, Any], fused: str) -> list[str]:
    share = "–" if row["of_bandwidth"] is None else percent(row["of_bandwidth"])
    margin = "–" if row["margin"] is None else f"{row['margin']:.2f}"
    times = [f"{row['median_ms']:.1f}", f"{row['over'][fused]:.2f}", share, mebibytes(row)]
    return [row["name"], *times, f"{row['cold_start_ms']:.0f}", f"{row['error']:.0e}", margin]


def loss_row(row: dict[str, Any]) -> list[str]:
    rows, classes = row["logits"]
    return [f"{row['name']}, {rows:,} × {classes:,}, and its gradient", f"{row['median_ms']:.1f}", mebibytes(row)]


def bar_row(row: dict[str, Any]) -> list[str]:
    return [f"{row['slower']} / {row['faster']}", f"{row['ratio']:.2f}", row["bar"]]


def mebibytes(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / MEBIBYTE:.1f}"


def thorn(result: dict[str, Any]) -> str:
    """Steps, ratios, and how near the polar factors are."""
    steps = markdown(("", "ms"), [[row["name"], f"{row['median_ms']:.1f}"] for row in result["rows"]], 1)
    bars = markdown(("ratio", "measured", "wanted"), [bar_row(row) for row in result["bars"]], 2)
    head = ("matrix", "form", "THORN's polar error", "Muon's")
    errors = markdown(head, [polar_row(row) for row in result["polar_errors"]], 2)
    note = (
        f"Medians of {result['rounds']} interleaved rounds on {result['threads']} threads; "
        f"{result['matrix_parameters']:,} parameters in matrices, {result['parameters']:,} in all. Polar error: "
        "relative Frobenius distance to the polar factor of the singular value decomposition. "
        f"{machine_line(result)}.\n"
    )
    return f"{steps}\n{bars}\n{errors}\n{note}"


def polar_row(row: dict[str, Any]) -> list[str]:
    rows, columns = row["shape"]
    return [f"{rows} × {columns}", row["form"], f"{row['thorn']:.4f}", f"{row['muon']:.4f}"]


def comparison(result: dict[str, Any]) -> str:
    """A line for each optimizer and kind of weights, without the time of a step: `thorn` measures it beside others."""
    table = markdown(trained.HEAD[:-1], [trained.cells(row)[:-1] for row in result["rows"]], 2)
    return f"{table}\n{trained.note(result)} {machine_line(result)}.\n"


def training8bit(result: dict[str, Any]) -> str:
    """A line for each task and optimizer."""
    table = markdown(trained8bit.HEAD, trained8bit.cells(result), trained8bit.FIGURES)
    return f"{table}\n{trained8bit.note(result)} {machine_line(result)}.\n"


def eight(result: dict[str, Any]) -> str:
    """Steps, state and scratch."""
    head = ("", "ms", f"× {eightbit.ADAMW8BIT}", "state, bytes a parameter", "of 32 bits", "scratch, MiB")
    steps = markdown(head, [eightbit.table_row(row, result["parameters"]) for row in result["rows"]], 5)
    bars = markdown(("ratio", "measured", "wanted"), [bar_row(row) for row in result["bars"]], 2)
    note = (
        f"Medians of {result['rounds']} interleaved rounds, threads: {result['threads']}, over "
        f"{result['parameters']:,} float32 parameters; ratios within rounds. State is counted from its tensors. "
        f"{machine_line(result)}.\n"
    )
    return f"{steps}\n{bars}\n{note}"


def verified(result: dict[str, Any]) -> str:
    """What was right where."""
    rows = [[row["lane"], row["algorithm"], f"{row['cases']:,}", f"{row['right']:,}", f"{row['margin']:.2f}"]
            for row in result["rows"]]  # fmt: skip
    table = markdown(("lane", "", "cases", "right", "worst margin"), rows, 3)
    machine = result["machine"]
    named = ", ".join([machine["gpu"] or machine["cpu"], f"torch {machine['torch']}", f"Triton {machine['triton']}"])
    day = result["started"][:10]
    return f"{table}\nTier {result['tier']}, on {day}, commit {result['commit']}. {named}: `{result['command']}`.\n"


def gpu(result: dict[str, Any]) -> str:
    """What was to be reached."""
    note = f"Ratios within {result['rounds']} interleaved rounds. " if result["works"] else ""
    return f"{gpu_bars(result['bars'])}\n{note}{gpu_line(result)}.\n"


def gpu_bars(bars: Iterable[dict[str, Any]]) -> str:
    return markdown(("on a GPU", "measured", "wanted", ""), [gpu_bar(bar) for bar in bars], 3)


def gpu_bar(bar: dict[str, Any]) -> list[str]:
    measured = "–" if bar["measured"] is None else f"{bar['measured']:.2f}"
    return [bar["title"], measured, bar["bar"], targets.in_words(bar)]


def gpu_line(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = [f"{name} {version}" for name, version in result["peers"].items() if version]
    named = ", ".join([machine["gpu"], f"driver {machine['driver']}", f"torch {machine['torch']}",
                       f"Triton {machine['triton']}", *versions])  # fmt: skip
    return f"{named}: `{result['command']}`"


def gpu_rows(result: dict[str, Any]) -> str:
    """Every work's rows, and what the GPU can do at best."""
    works = [gpu_work(work) for work in result["works"]]
    ceilings = ", ".join(f"{name.replace('_', ' ')} {rate:.4g}" for name, rate in result["ceilings"].items())
    note = f"In the same run, at best: {ceilings}. Medians of {result['rounds']} interleaved rounds."
    return "\n".join([*works, f"{note} {gpu_line(result)}.\n"])


def gpu_work(work: dict[str, Any]) -> str:
    rows = [gpu_cells.cells(row) for row in work["rows"]]
    error = f" Error: {work['error']}." if work["error"] else ""
    return f"{work['title']}.{error}\n\n{markdown(gpu_cells.HEAD, rows, len(gpu_cells.HEAD) - 2)}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "cpu": cpu,
    "eightbit": eight,
    "thorn": thorn,
    "text": comparison,
    "digits": comparison,
    "training8bit": training8bit,
    "verified": verified,
    "gpu": gpu,
    "gpu_rows": gpu_rows,
}
SOURCES = {"gpu_rows": "gpu"}
"""Tables that are made of the result of another name."""


def body(name: str) -> str:
    """One table for each machine that has a result; where there is none, it says so."""
    found = results.load(SOURCES.get(name, name))
    if any(result.get("dry_run") for result in found):
        sys.exit(f"{results.FOLDER} holds the result of a dry run, whose figures mean nothing: remove it")
    unmeasured = gpu_bars(targets.verdicts([])) if name == "gpu" else NOT_MEASURED
    return "\n".join(TABLES[name](result) for result in found) or unmeasured


def filled(text: str) -> str:
    """The page with every marked table replaced."""
    return MARK.sub(lambda found: f"{found['begin']}{body(found['name'])}{found['end']}", text)


def pages() -> list[Path]:
    return [results.ROOT / "README.md", *sorted((results.ROOT / "docs").rglob("*.md"))]


def main(arguments: Sequence[str]) -> None:
    """Write the tables, or with --check only say which pages are not what the results say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page differs")
    check = parser.parse_args(arguments).check
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    stale = {page: filled(text) for page, text in texts.items() if filled(text) != text}
    if stale and check:
        names = ", ".join(str(page.relative_to(results.ROOT)) for page in stale)
        sys.exit(f"{names}: not what the results say; `python -m benchmarks tables` writes it")
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(results.ROOT)}")
