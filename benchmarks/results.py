"""Where results lie, and how they are named: `<what>-<hardware>.json`."""

import json
import re
from pathlib import Path
from typing import Any

from trysquare_conformance.machine import describe_machine

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"


def hardware() -> str:
    """Name this machine as a file name can hold it, such as `amd-epyc-2-cores`."""
    machine = describe_machine()
    words = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def path(what: str) -> Path:
    """Where this machine's result belongs."""
    return FOLDER / f"{what}-{hardware()}.json"


def write(target: Path, result: dict[str, Any]) -> None:
    """Replace a result."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(source: Path) -> dict[str, Any]:
    """A result."""
    found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return found


def load(what: str) -> list[dict[str, Any]]:
    """The committed results of every machine, by file name."""
    return [read(found) for found in sorted(FOLDER.glob(f"{what}-*.json"))]
