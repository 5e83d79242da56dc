"""Where results lie, and how they are named: `<what>-<hardware>.json`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trysquare_conformance.machine import describe_machine

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"


def hardware(machine: Mapping[str, Any]) -> str:
    """Name a machine as a file name can hold it, such as `amd-epyc-2-cores`."""
    words = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def path(what: str, machine: Mapping[str, Any] | None = None) -> Path:
    """Where the result of a machine belongs; None: of this one."""
    return FOLDER / f"{what}-{hardware(machine or describe_machine())}.json"


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
