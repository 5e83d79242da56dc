"""What this machine can verify: versions, backends, lanes, and which `dolphinflow` is found."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trysquare_conformance.lanes import LANES
from trysquare_conformance.machine import describe_machine


def report(console: Console) -> None:
    """Print the machine and, for every lane, whether it can run here or why not."""
    console.print(_machine())
    console.print(_lanes())


def _machine() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    machine = describe_machine()
    flags = machine["flags"]
    facts = {
        **{name: str(machine[name]) for name in ("trysquare", "python", "torch", "numpy")},
        "triton": machine["triton"] or "not installed",
        "system": machine["platform"],
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "gpu": f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "none",
        "flags": ", ".join(f"{name}={value}" for name, value in flags.items()),
        "import dolphinflow": machine["dolphinflow_module"] or "finds nothing",
    }
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _lanes() -> Table:
    table = Table(title="lanes", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    for lane in LANES.values():
        reason = lane.available()
        state = Text("can run here", style="green") if reason is None else Text(f"not here: {reason}", style="yellow")
        table.add_row(Text(lane.name), state)
    return table
