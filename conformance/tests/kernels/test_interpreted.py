"""Runs the tests of `interpreted/` where Triton's interpreter is on, which it is for a whole process or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it has wheels for Linux only")
ROOT = Path(__file__).parents[3]
FILES = [file for file in sorted((Path(__file__).parent / "interpreted").glob("*.py")) if file.stem != "conftest"]


def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *map(str, FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


STEPS = """
import torch
from triton.runtime import interpreter
from trysquare import THORN, DolphinFlow
from trysquare_conformance.interpreter import without_repetition

replaced = []
replace = interpreter._patch_lang
interpreter._patch_lang = lambda function: replaced.append(function) or replace(function)


kinds = {DolphinFlow: {}, THORN: {"orthogonalize": False}}


def stepped(kind):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((12, 10), (7,), (20, 30))]
    optimizer = kind([{"params": parameters, **kinds[kind]}], backend="triton")
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


for kind in kinds:
    before = len(replaced)
    plain = stepped(kind)
    often = len(replaced) - before
    with without_repetition():
        spared = stepped(kind)
    once = len(replaced) - before - often
    again = stepped(kind)
    assert torch.equal(plain, spared) and torch.equal(plain, again)
    assert len(replaced) - before - often - once == often > 2 * once > 0, (often, once)
"""


def test_the_interpreter_without_repetition_computes_the_same() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
