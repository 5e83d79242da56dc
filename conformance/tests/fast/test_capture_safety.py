"""No step reads a result from the GPU or copies from the host, which a capture into a graph could not hold.

Shown without a GPU, by `untouchable`: on tensors of another device than the CPU, that have no values.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("untouchable.py")
NEEDED = "_setup_privateuseone_for_python_backend"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the program says; it is one because a device can be named only once in a process."""
    if not hasattr(backend_registration, NEEDED):
        pytest.skip(f"this torch has no {NEEDED} to make a device with")
    said = subprocess.run([sys.executable, str(PROGRAM)], check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    result: dict[str, Any] = json.loads(said.stdout)
    return result


def test_no_step_touches_the_cpu(found: dict[str, Any]) -> None:
    steps = {name: operations for name, operations in found.items() if name.endswith(("propagate", "skip"))}
    assert len(steps) == 28
    assert {name: operations for name, operations in steps.items() if operations} == {}


def test_a_number_on_the_host_would_be_seen(found: dict[str, Any]) -> None:
    assert found["a rate on the host"]


def test_a_step_that_reads_would_be_seen(found: dict[str, Any]) -> None:
    assert found["a step that reads"] == "DataDependentOutputException"
