"""`python -m benchmarks gpu`: all that needs a GPU, beside the peers that are installed and what the GPU can do.

`--dry-run` goes through the same code at toy sizes, on the CPU, to know that it works: with TRITON_INTERPRET=1 through
the Triton kernels, else eagerly, and rows say which. Its figures mean nothing and its result is marked.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import results, timing
from benchmarks.gpu import losses, matrices, peers, shapes, steps, works
from benchmarks.gpu.cells import HEAD, cells
from benchmarks.gpu.targets import IMPORTED, in_words, verdicts
from trysquare import _backend
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.report.console import simple_table

SCHEMA = 1
IMPORTS = "imports"


def listed(sizes: shapes.Sizes, device: torch.device, backend: str) -> dict[str, Callable[[], works.Work]]:
    """Every work under its name, made when it is its turn."""
    gpt2, qwen3 = "GPT-2 124M", "Qwen3-1.7B"
    return {
        "dolphinflow": lambda: steps.dolphinflow(sizes.billion, device, backend),
        "eightbit": lambda: steps.eightbit(sizes.billion, device, backend),
        "thorn-gpt2": lambda: matrices.model("thorn-gpt2", gpt2, sizes.gpt2, device, backend),
        "thorn-qwen3": lambda: matrices.model("thorn-qwen3", qwen3, sizes.qwen3, device, backend),
        "products": lambda: matrices.products(sizes.product, device),
        "losses": lambda: losses.losses(sizes.logits, device, backend),
    }


NAMES = (*listed(shapes.TOY, timing.CPU, "auto"), IMPORTS)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for; what is finished is on the disk before the next work begins."""
    dry = chosen.dry_run
    device = timing.CPU if dry else torch.device("cuda", torch.cuda.current_device())
    backend = "triton" if dry and _backend.interpreted() else "auto"
    sizes, clock = shapes.TOY if dry else shapes.FULL, timing.Clock(device)
    result = begun(chosen) | {"ceilings": ceilings(sizes, clock, chosen.rounds)}
    for name, make in listed(sizes, device, backend).items():
        if name in chosen.work:
            result["works"].append(works.measure(make(), clock, chosen.rounds, result["ceilings"]["copy_gb_per_s"]))
            keep(chosen.json, result)
    if IMPORTS in chosen.work:
        result["works"].append(imports(chosen.imports))
    keep(chosen.json, result)
    return result


def header(chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "dry_run": chosen.dry_run,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": describe_machine(),
        "peers": {peer.module: peer.version() for peer in peers.PEERS},
        "rounds": chosen.rounds,
        "works": [],
    }


def begun(chosen: argparse.Namespace) -> dict[str, Any]:
    """A new result or, with `--add`, that which is there without the works that are measured again."""
    new = header(chosen)
    if not (chosen.add and chosen.json and chosen.json.exists()):
        return new
    before = results.read(chosen.json)
    same = ("schema", "dry_run", "machine", "rounds")
    if any(before[name] != new[name] for name in same):
        sys.exit(f"{chosen.json} is of another machine or another number of rounds: --add goes on with the same")
    kept = [work for work in before["works"] if work["work"] not in chosen.work]
    return {**new, "command": f"{before['command']}; {new['command']}", "works": kept}


def keep(path: Path | None, result: dict[str, Any]) -> None:
    """Judge what there is, and write it."""
    result["works"].sort(key=lambda work: NAMES.index(work["work"]))
    result["bars"] = verdicts(result["works"])
    if path is not None:
        results.write(path, result)


def ceilings(sizes: shapes.Sizes, clock: timing.Clock, rounds: int) -> dict[str, float]:
    """What the device does at best: copies, scalings in place and square products, in interleaved rounds."""
    streams, moved = timing.bandwidths(sizes.copied_mebibytes, clock.device)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    products = {name: timing.matmul_rate(sizes.multiplied, dtype, clock.device) for name, dtype in dtypes.items()}
    actions = {**streams, **{name: action for name, (action, _) in products.items()}}
    times = timing.interleaved(actions, rounds, "ceilings", clock.whole)
    rates = {f"{name}_gb_per_s": moved / times[name].median / 1e9 for name in streams}
    return rates | {f"{name}_tflop_per_s": flop / times[name].median / 1e12 for name, (_, flop) in products.items()}


def imports(runs: int) -> dict[str, Any]:
    """Both imports, each time in a process of their own."""
    taken = zip(("import torch", IMPORTED), timing.import_seconds(runs), strict=True)
    rows = [{"name": name, "ours": name == IMPORTED, "median_ms": 1e3 * seconds} for name, seconds in taken]
    return {"work": IMPORTS, "title": "imports, the second after the first", "error": "", "rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    """The tables on the terminal."""
    for work in result["works"]:
        show_work(work, console)
    for bar in result["bars"]:
        measured = "" if bar["measured"] is None else f" = {bar['measured']:.2f}"
        said = "" if result["dry_run"] else f": {in_words(bar)}"
        console.print(f"{bar['title']}{measured} (wanted {bar['bar']}{said})", markup=False)
    console.print(", ".join(f"{name} {rate:.4g}" for name, rate in result["ceilings"].items()))
    if result["dry_run"]:
        console.print("A dry run at toy sizes on a CPU: no figure above means anything but errors and margins.")


def show_work(work: dict[str, Any], console: Console) -> None:
    """What was measured as a table, and below it why the rest was not."""
    console.print(f"\n{work['title']}", style="bold")
    table = simple_table(*HEAD, numbers=len(HEAD) - 2)
    for row in work["rows"]:
        if "missing" not in row:
            table.add_row(*cells(row))
    console.print(table)
    for row in work["rows"]:
        if "missing" in row:
            console.print(f"{row['name']}: {row['missing']}", markup=False)


def failures(result: dict[str, Any]) -> list[str]:
    """Rows of ours that failed."""
    rows = [row for work in result["works"] for row in work["rows"] if row["ours"]]
    return [f"{row['name']} {row['missing']}" for row in rows if row.get("missing", "").startswith(works.FAILED)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="how often each step is timed")
    parser.add_argument("--imports", type=int, default=9, help="how many processes time the imports")
    parser.add_argument("--work", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument("--add", action="store_true", help="to the works that the result has, from the same machine")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, to see that all of it runs")
    parser.add_argument("--json", type=Path, help="where to write the result (by default benchmarks/results/)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="only download the peers' wheels into DIR")
    chosen = parser.parse_args(arguments)
    chosen.work = chosen.work or list(NAMES)
    if chosen.json is None and not chosen.dry_run:
        chosen.json = results.path("gpu")
    return chosen


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the JSON."""
    chosen = parse(arguments)
    if chosen.wheels:
        peers.download(chosen.wheels)
        return
    if not (chosen.dry_run or torch.cuda.is_available()):
        sys.exit("torch sees no GPU here: --dry-run goes through everything at toy sizes on the CPU")
    with ExitStack() as stack:
        stack.enter_context(timing.no_earlier_compilations())
        if chosen.dry_run:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        result = run(chosen)
    show(result, Console(width=170))
    if failures(result):
        sys.exit("\n".join(failures(result)))
