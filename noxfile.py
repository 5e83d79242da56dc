"""Every chore of the house, each one command: ``python -m nox -s verify`` (demo, tests, lint, types, docs, …).

The everyday sessions share one environment, ``.nox/house``, because torch is large: it is installed there once.
Sessions that must know exactly what is installed (``torch``, ``package``) make environments of their own. Everywhere
torch comes first, pinned, by plain pip, so that the build of that version which the machine's pip prefers is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
SUPPORTED = PROJECT["tool"]["trysquare"]["torch"]
VERSIONS = [SUPPORTED["oldest"], *SUPPORTED["between"], SUPPORTED["default"]]
TORCH = os.environ.get("TRYSQUARE_TORCH", SUPPORTED["default"])
SOURCES = ("reference", "fast", "conformance")
# What tests compare against. The one has the alias module's import name, the other must not fetch a torch of its own:
# both go into a folder of their own, without what they depend on.
ORACLES = {"dolphinflow": "dolphinflow==0.2.0", "bitsandbytes": "bitsandbytes==0.50.2"}
REPORTS = Path("reports")
OLD_NUMPY = "numpy<2.4"  # Triton's interpreter took an array of one element for a number until 3.7; newer NumPys do not
SANITIZED = ("*/40x24+24/*/steps=2", "*/300x9/*", "*/2x16500/*", "*/nonfinite=skip/*/nan/*")
KERNELS = ("triton",) if sys.platform == "linux" else ()  # Triton has wheels for nothing else
CHECKS: dict[str, tuple[str, ...]] = {"extras": ("verify", *KERNELS), "groups": ("lint", "types", "test")}
"""What lint, types and tests are installed with together: pip resolves and builds once for all three."""
WORKERS = ("--numprocesses", "auto", "--maxprocesses", "4")
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
"""Dozens of processes import the same sources: on a machine that asks for no bytecode each would compile them anew."""

PUBLIC_NAMES = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    print(name, *[f"{public}={getattr(module, public)!r:.40}" for public in module.__all__], sep="\\n    ")
"""


class House:
    """The shared environment: asked for with extras and dependency groups, extended only by what it still lacks."""

    def __init__(
        self, session: nox.Session, extras: tuple[str, ...] = ("verify",), groups: tuple[str, ...] = ()
    ) -> None:
        self.session = session
        self.home = ROOT / ".nox" / "house"
        target = f".[{','.join(extras)}]" if extras else "."
        requirements = ["-e", target, *nox.project.dependency_groups(PROJECT, *groups)]
        stamp = self.home / f"{self.fingerprint(requirements)}.installed"
        if not stamp.exists():
            self.install(requirements)
            stamp.touch()

    @staticmethod
    def fingerprint(requirements: list[str]) -> str:
        """What was asked for, of which project file, on which torch and Python: the same answer needs no pip."""
        text = "\n".join([TORCH, sys.version, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), *requirements])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def install(self, requirements: list[str]) -> None:
        """Torch first and pinned: a bare torch among the requirements would fetch whatever is newest.

        Pip would compile all that it installs, which takes as long again. What the suite imports is a part of it: that
        is compiled here, before processes that start together would each do it.
        """
        if not self.home.exists():
            self.session.run(sys.executable, "-m", "venv", str(self.home))
        pip = ("python", "-m", "pip", "install", "--quiet", "--no-compile")
        self.run(*pip, f"torch=={TORCH}")
        self.run(*pip, *requirements)
        self.run("python", "-c", "import torch._inductor.compile_fx")

    def run(self, program: str, *arguments: str, **environment: str) -> None:
        """Run one of the environment's programs in the repository."""
        scripts = self.home / SCRIPTS
        path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
        self.session.run(str(scripts / program), *arguments, env={"PATH": path, **BYTECODE, **environment})


def files(name: str) -> list[str]:
    """The arguments that have a verification written to reports/, in every format."""
    REPORTS.mkdir(exist_ok=True)
    formats = {"--json": "json", "--html": "html", "--markdown": "md", "--junit": "xml"}
    return [text for flag, suffix in formats.items() for text in (flag, str(REPORTS / f"{name}.{suffix}"))]


def install_pinned(session: nox.Session, torch: str, *requirements: str) -> None:
    """Into a session's own environment: torch first and pinned, then the rest."""
    session.install("--quiet", f"torch=={torch}")
    session.install("--quiet", *requirements)


def oracles(session: nox.Session) -> str:
    """A folder with the packages that the tests compare against."""
    folder = ROOT / ".nox" / "oracles"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    missing = [requirement for name, requirement in ORACLES.items() if not (folder / name).exists()]
    if missing:
        session.run(*pip, *missing, external=True)
    return str(folder)


@nox.session(venv_backend="none")
def verify(session: nox.Session) -> None:
    """Is it right on this machine? One sentence, and a report to look at."""
    arguments = session.posargs or ["--tier", "quick", *files("quick")]
    House(session).run("trysquare", "verify", *arguments)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train the modular-addition task with AdamW and DolphinFlow; print the table, draw the picture."""
    REPORTS.mkdir(exist_ok=True)
    arguments = session.posargs or ["--picture", str(REPORTS / "demo.png")]
    House(session).run("trysquare", "demo", *arguments)


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Plant every fault in the compiled lane, where each has to be compiled; `tests` plants them in the eager one."""
    House(session).run("trysquare", "faults", *(session.posargs or ["--lane", "compiled-cpu"]))


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff's rules and the import contracts."""
    house = House(session, **CHECKS)
    house.run("ruff", "check", ".")
    house.run("lint-imports", "--no-logo")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict, over the three packages."""
    House(session, **CHECKS).run("mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The standard tier of the conformance suite, its planted faults, all kernels compiled, then the pytest suite."""
    house = House(session, **CHECKS)
    environment = {"TRYSQUARE_ORACLES": oracles(session), "OMP_NUM_THREADS": "1"}
    if not session.posargs:
        kernels = ["--kernels"] if KERNELS else []
        verify = ["verify", "--tier", "standard", "--faults", *kernels, *files("conformance")]
        house.run("trysquare", *verify, TRYSQUARE_ORACLES=oracles(session))
        environment["TRYSQUARE_RESULT"] = str(REPORTS / "conformance.json")  # what it told need not be found out again
    house.run("pytest", *WORKERS, *session.posargs, **environment)


@nox.session(reuse_venv=True)
@nox.parametrize("version", VERSIONS)
def torch(session: nox.Session, version: str) -> None:
    """The pytest suite on a real install of the oldest supported torch, of the default, and of one that errs alone."""
    own = [] if version == SUPPORTED["default"] else [OLD_NUMPY]
    install_pinned(session, version, "-e", ".[verify]", *nox.project.dependency_groups(PROJECT, "test"), *own)
    environment = {"TRYSQUARE_ORACLES": oracles(session), "OMP_NUM_THREADS": "1", **BYTECODE}
    session.run("python", "-m", "pytest", *WORKERS, *session.posargs, env=environment)


@nox.session(reuse_venv=True)
@nox.parametrize("version", [SUPPORTED["oldest"], SUPPORTED["default"]])
def triton(session: nox.Session, version: str) -> None:
    """The kernels interpreted and compiled ahead of time, on the oldest and the newest Triton that a torch pins."""
    pinned = PROJECT["tool"]["trysquare"]["triton"]
    requirements = [f"triton=={pinned[version]}", "-e", ".[verify]"]
    if version == SUPPORTED["oldest"]:
        requirements.append(OLD_NUMPY)
    install_pinned(session, version, *requirements)
    trysquare = ["python", "-m", "trysquare_conformance"]
    lanes = ["--lane", "triton-interpreter"]
    session.run(*trysquare, "verify", *lanes, *(session.posargs or files(f"triton-{pinned[version]}")))
    session.run(*trysquare, "kernels", "--json", str(REPORTS / f"kernels-{pinned[version]}.json"))


@nox.session(reuse_venv=True)
def package(session: nox.Session) -> None:
    """Build wheel and sdist, and use the wheel as a stranger would: without the extra, then with it."""
    session.install("--quiet", *nox.project.dependency_groups(PROJECT, "package"))
    place = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--outdir", str(place / "dist"))
    built = sorted((place / "dist").glob(f"trysquare-{PROJECT['project']['version']}*"))
    session.run("python", "-m", "twine", "check", "--strict", *map(str, built))
    wheel = next(str(path) for path in built if path.suffix == ".whl")
    python, command = (str(place / "empty" / SCRIPTS / name) for name in ("python", "trysquare"))
    session.run("python", "-m", "venv", "--clear", str(place / "empty"))
    session.chdir(place)
    session.run(python, "-m", "pip", "install", "--quiet", f"torch=={TORCH}", external=True)
    session.run(python, "-m", "pip", "install", "--quiet", wheel, external=True)
    session.run(python, "-c", PUBLIC_NAMES, "trysquare", "dolphinflow", external=True)
    refuse_without_extra(session, command)
    session.run(python, "-m", "pip", "install", "--quiet", f"{wheel}[verify]", external=True)
    session.run(python, "-c", PUBLIC_NAMES, "trysquare_reference", external=True)
    session.run(command, "verify", "--tier", "quick", external=True)


def refuse_without_extra(session: nox.Session, command: str) -> None:
    """Without the extra the command line must fail, and say which extra it needs."""
    said = session.run(command, "verify", success_codes=range(1, 256), silent=True, external=True)
    if "trysquare[verify]" not in str(said) or "Traceback" in str(said):
        session.error(f"without the extra, `trysquare verify` should name trysquare[verify]; it said:\n{said}")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """The speed tables: everything side by side in one run, medians. Slow, and never part of the tests."""
    house = House(session, groups=("test",))
    house.run("python", "-m", "benchmarks", *session.posargs, TRYSQUARE_ORACLES=oracles(session))


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation strictly into site/; an undocumented public name or a dead link fails it."""
    house = House(session, ("verify", "docs"))
    if not any(REPORTS.glob("*.json")):  # the budgets' numbers in the pages come from a result, never from a keyboard
        house.run("trysquare", "verify", "--tier", "quick", *files("quick"))
    house.run("mkdocs", "build", "--strict", *session.posargs, NO_MKDOCS_2_WARNING="1")


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Right first, then fast: the CUDA lanes, captured steps and the benchmarks; arguments go to the benchmarks.

    On the torch of the environment that runs nox: a CUDA build is that machine's own business.
    """
    lanes = [word for lane in ("triton-cuda", "eager-cuda", "compiled-cuda") for word in ("--lane", lane)]
    verify = ["verify", *lanes, "--tier", "standard", *files("gpu")]
    session.run(sys.executable, "-m", "trysquare_conformance", *verify, env=from_sources())
    session.run(sys.executable, "-m", "pytest", "conformance/tests/fast/test_capture_cuda.py", env=from_sources())
    session.run(sys.executable, "-m", "benchmarks", "gpu", *session.posargs, env=from_sources())


@nox.session(venv_backend="none")
@nox.parametrize("tool", ["memcheck", "racecheck"])
def sanitizer(session: nox.Session, tool: str) -> None:
    """A few cases of every kernel under NVIDIA's compute-sanitizer, which sees what a result does not show."""
    program = sanitizer_program()
    if program is None:
        session.error("compute-sanitizer is neither on the PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", sys.executable]
    worker = ["-m", "trysquare_conformance.worker", "--lane", "triton-cuda", "--tier", "quick"]
    cases = session.posargs or [f"--case={glob}" for glob in SANITIZED]
    budgets = ["--budgets", session.create_tmp(), "--strict"]
    # torch keeps freed memory for itself, which hides what reads beyond a tensor
    session.run(*command, *worker, *budgets, *cases, env=from_sources() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def sanitizer_program() -> str | None:
    """NVIDIA's tool, on the PATH or in the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("PATH", ""), *([os.path.join(home, "bin")] if home else [])]  # noqa: PTH118
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def from_sources() -> dict[str, str]:
    """The environment in which this checkout is imported."""
    return {"PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in SOURCES)}
