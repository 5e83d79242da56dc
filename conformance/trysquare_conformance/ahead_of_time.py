"""Every kernel compiled ahead of time for GPUs that are not here, and what each compilation takes of the hardware.

The optimizers' own launches are written down and compiled with the specialisation of a real launch. Processes without
Triton's interpreter do it: `python -m trysquare_conformance.ahead_of_time --target sm_90 --part 0 --parts 2`.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from trysquare_conformance.lanes import WITH_KERNELS
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.main_configurations import Configuration, configurations
from trysquare_conformance.report.schema import SCHEMA, Kernel, KernelReport, plain

Progress: TypeAlias = Callable[[str, int, int], None]

TARGETS: dict[str, tuple[str, int | str, int, tuple[int, int]]] = {
    "sm_80": ("cuda", 80, 32, (3, 2)),
    "sm_90": ("cuda", 90, 32, (3, 2)),
    "sm_100": ("cuda", 100, 32, (3, 3)),
    "gfx942": ("hip", "gfx942", 64, (3, 2)),
}
"""What to compile for: Triton's backend, architecture, threads of a warp, and the first Triton that knows it."""

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
EVERY = "every target"
CHOICES = {"sm_90": (9, 0)}
"""Targets for which an algorithm chooses other kernels than those that any GPU may see, by capability."""

DIVISOR = 16
CUBIN = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")
AMD = {
    "registers": r"\.vgpr_count:\s*(\d+)",
    "local": r"\.private_segment_fixed_size:\s*(\d+)",
    "spills": r"\.[sv]gpr_spill_count:\s*(\d+)",
}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install 'trysquare[triton]')"


def known_targets() -> list[str]:
    """The targets that the installed Triton can compile for."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    named = [name for name, (_, _, _, first) in TARGETS.items() if version >= first]
    return [name for name in named if TARGETS[name][0] == "cuda" or _links_for_amd()]


def _links_for_amd() -> bool:
    """Newer Tritons link for AMD themselves; older ones want ROCm's linker."""
    from triton.backends.amd.compiler import HIPBackend

    find = getattr(HIPBackend, "path_to_rocm_lld", None)
    try:
        return find is None or bool(find())
    except Exception:  # noqa: BLE001  # it raises nothing more particular where there is none
        return False


# What is launched


@dataclass(frozen=True)
class Request:
    """A launch as the compiler sees it. Equal ones are one compilation."""

    algorithm: str
    configuration: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    only: str | None = None
    """The target that alone runs it; None: any."""

    @property
    def key(self) -> tuple[Any, ...]:
        """All that decides what is compiled."""
        return self.kernel.__name__, self.signature, str(self.constants), self.aligned, self.options

    def row(self, target: str, **found: Any) -> Kernel:
        """The report's entry, as of a kernel of which nothing is known."""
        named = dict(self.constants)
        chosen = [f"{name}={named[name]}" for name in self.kernel.arg_names if name in named and name.isupper()]
        told = {"kernel": self.kernel.__name__.lstrip("_"), "constants": ", ".join(chosen), "target": target}
        nothing = {"status": "error", "registers": None, "shared": None, "local": None, "stack": None, "spills": None}
        row: Any = {"algorithm": self.algorithm, "configuration": self.configuration, **told, **nothing, "error": None}
        return {**row, **found}  # type: ignore[typeddict-item]


def requests(chosen: Sequence[Configuration] | None = None) -> tuple[list[Request], list[Kernel]]:
    """The distinct launches of the main configurations, and an error for each that launches nothing."""
    from trysquare import kernels

    found: dict[tuple[Any, ...], Request] = {}
    errors: list[Kernel] = []
    for configuration in configurations() if chosen is None else chosen:
        if configuration.algorithm not in WITH_KERNELS:
            continue
        for only in (None, *CHOICES) if configuration.chooses else (None,):
            with kernels.recording(CHOICES[only] if only else None) as launches:
                configuration.step()
            for launch in launches:
                request = _request(configuration, launch, only)
                found.setdefault(request.key, request)
        if not launches:
            nothing = Request(configuration.algorithm, configuration.name, _Nothing, (), (), (), ())
            errors.append(nothing.row(EVERY, error="the configuration launches no kernel"))
    return list(found.values()), errors


class _Nothing:
    """Stands where there is no kernel."""

    __name__ = "none"
    arg_names: tuple[str, ...] = ()


def _request(configuration: Configuration, launch: Any, only: str | None) -> Request:
    """As Triton specialises: None and 1 are constants, and what divides by 16 is known to."""
    signature, constants, aligned = {}, dict(launch.constants), []
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, int | torch.Tensor) and _number(value) % DIVISOR == 0:
            aligned.append(place)
    ordered = tuple((name, signature.get(name, "constexpr")) for name in launch.kernel.arg_names)
    return Request(
        configuration.algorithm,
        configuration.name,
        launch.kernel,
        ordered,
        tuple(constants.items()),
        tuple(aligned),
        tuple(launch.options.items()),
        only,
    )


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"


def _number(value: torch.Tensor | int) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


# What is compiled


def compile_for(request: Request, target: str) -> Kernel:
    """Compile, and tell what it takes. A spill or an exception of the compiler is the entry's status."""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, architecture, threads, _ = TARGETS[target]
    try:
        gpu = GPUTarget(backend, architecture, threads)
        options = {name: value for name, value in request.options if name != "maxnreg" or backend == "cuda"}
        made = triton.compile(_source(request, gpu), target=gpu, options=options)
        taken = _of_cubin(made.asm["cubin"]) if backend == "cuda" else _of_assembly(made.asm["amdgcn"])
    except Exception as error:  # noqa: BLE001  # whatever the compiler says is the answer
        because = f" ({error.__cause__})" if error.__cause__ else ""
        return request.row(target, error=f"{type(error).__name__}: {error}{because}")
    spilled = any(taken[name] for name in ("local", "stack", "spills"))
    return request.row(target, status="spills" if spilled else "fits", shared=made.metadata.shared, **taken)


def _source(request: Request, target: Any) -> Any:
    """What `triton.compile` takes; until 3.2 it had its attributes in a class of their own."""
    from triton.backends import compiler
    from triton.compiler import ASTSource, make_backend

    names, signature, constants = request.kernel.arg_names, dict(request.signature), dict(request.constants)
    if hasattr(compiler, "AttrsDescriptor"):
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(request.aligned, DIVISOR))
        return ASTSource(request.kernel, signature, constants, hints)
    backend = make_backend(target)
    attributes = {
        (place,): backend.parse_attr(("D" if place in request.aligned else "") + ("S" if kind[0] == "*" else ""))
        for place, kind in enumerate(signature.values())
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(request.kernel, signature, places, {place: found for place, found in attributes.items() if found})


@cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _of_cubin(binary: bytes) -> dict[str, int]:
    """What NVIDIA's own tool, which Triton brings along, reads in the binary; bytes a thread."""
    with tempfile.TemporaryDirectory(prefix="trysquare-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [_cuobjdump(), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = CUBIN.search(said)
    if found is None:
        raise ValueError(f"cuobjdump does not tell the resources of the kernel; it said {said!r}")
    return {**{name: int(number) for name, number in found.groupdict().items()}, "spills": 0}


def _of_assembly(text: str) -> dict[str, int]:
    """What AMD's assembler is told at the end of the assembly."""
    found = {name: [int(number) for number in re.findall(pattern, text)] for name, pattern in AMD.items()}
    if not all(found.values()):
        raise ValueError("the assembly does not tell the resources of the kernel")
    return {**{name: sum(numbers) for name, numbers in found.items()}, "stack": 0}


# Side by side


def run(
    targets: Sequence[str] = (), globs: Sequence[str] = ("*",), progress: Progress = lambda *_: None
) -> list[Kernel]:
    """Compile every kernel for every target, in a process for each core.

    Args:
        targets: Names; none: all that the installed Triton knows.
        globs: Of the algorithms.
        progress: Is told how far it is.

    Raises:
        RuntimeError: Triton is not installed or does not know a target, or a process ended before its work.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return start(pool, targets, globs, progress)()


def start(
    pool: Executor,
    targets: Sequence[str] = (),
    globs: Sequence[str] = ("*",),
    progress: Progress = lambda *_: None,
) -> Callable[[], list[Kernel]]:
    """`run` in a pool that others use too; what this gives waits for the end and returns the kernels."""
    check(targets)
    cores, told = os.cpu_count() or 1, _Told(progress)
    parts = [pool.submit(_part, part, cores, targets or known_targets(), globs, told) for part in range(cores)]
    order = [*TARGETS, EVERY]

    def collect() -> list[Kernel]:
        rows = [row for part in parts for row in part.result()]
        return sorted(rows, key=lambda k: (k["algorithm"], k["kernel"], k["constants"], order.index(k["target"])))

    return collect


def check(targets: Sequence[str]) -> None:
    """Raise a RuntimeError if Triton is not installed, or does not know a target."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    unknown = [name for name in targets if name not in known_targets()]
    if unknown:
        raise RuntimeError(f"{', '.join(unknown)}: the installed Triton compiles for {', '.join(known_targets())}")


def report(targets: Sequence[str], progress: Progress, command: str) -> KernelReport:
    """`run`, as a report."""
    started, clock = datetime.now(UTC), time.perf_counter()
    kernels = run(targets, progress=progress)
    return {
        "schema": SCHEMA,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
        "command": command,
        "machine": describe_machine(),
        "kernels": kernels,
    }


class _Told:
    """Adds up what the processes say of their progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.done, self.of = progress, 0, dict[int, int]()

    def expect(self, part: int, amount: int) -> None:
        self.of[part] = amount

    def one(self) -> None:
        self.done += 1
        self.progress("kernels", self.done, sum(self.of.values()))


def _part(part: int, parts: int, targets: Sequence[str], globs: Sequence[str], told: _Told) -> list[Kernel]:
    command = [sys.executable, "-m", "trysquare_conformance.ahead_of_time", "--part", str(part), "--parts", str(parts)]
    command += [f"--target={target}" for target in targets] + [f"--algorithm={glob}" for glob in globs]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows: list[Kernel] = []
    expected = 0
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        for line in process.stdout or ():
            found = json.loads(line)
            if isinstance(found, int):
                expected = found
                told.expect(part, expected)
            else:
                rows.append(found)
                told.one()
        code = process.wait()
        errors.seek(0)
        said = errors.read()[-2000:].strip()
    if code or len(rows) != expected:
        raise RuntimeError(f"compiling ahead of time ended with exit code {code} after {len(rows)} kernels\n{said}")
    return rows


def main() -> None:
    """Compile a part, and write how many there are and then an entry a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", default=[], choices=list(TARGETS))
    parser.add_argument("--algorithm", action="append", default=[])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    for line in _lines(options):
        print(json.dumps(plain(line)), flush=True)  # noqa: T201  # the protocol


def _lines(options: argparse.Namespace) -> Iterator[Any]:
    globs = options.algorithm or ["*"]
    wanted = [c for c in configurations() if any(fnmatchcase(c.algorithm, glob) for glob in globs)]
    found, errors = requests(wanted)
    wanted_targets = options.target or known_targets()
    pairs = [(request, target) for request in found for target in wanted_targets if request.only in {None, target}]
    own = pairs[options.part :: options.parts]
    told = errors if options.part == 0 else []
    yield len(own) + len(told)
    yield from told
    for request, target in own:
        yield compile_for(request, target)


if __name__ == "__main__":
    main()
