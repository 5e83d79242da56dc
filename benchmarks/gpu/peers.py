"""Who is compared with, where it comes from, and why it may be missing; `--wheels` fetches all for use offline."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from trysquare_conformance import originals


@dataclass(frozen=True)
class Peer:
    """A package with an optimizer.

    Attributes:
        module: Its import name.
        install: What pip is told.
        wheels: Requirements that `--wheels` downloads alone, for they need torch, which the machine has.
        torchless: Those that it downloads with all that they need.
    """

    module: str
    install: str
    wheels: tuple[str, ...] = ()
    torchless: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot be compared with, or None."""
        found = importlib.util.find_spec(self.module) is not None
        return None if found else f"not installed: pip install {self.install}"

    def version(self) -> str | None:
        """Of what is installed, or lies in a folder of oracles."""
        name, folders = self.module.replace("_", "-"), [*sys.path, *map(str, originals.folders())]
        found = importlib.metadata.Distribution.discover(name=name, path=folders)
        return next((distribution.version for distribution in found), None)


BITSANDBYTES = Peer("bitsandbytes", "bitsandbytes==0.50.2", ("bitsandbytes==0.50.2",), ("packaging",))
TORCHAO = Peer("torchao", "torchao==0.18.0", ("torchao==0.18.0",))
GRAM = Peer(
    "gram_newton_schulz",
    "gram-newton-schulz==0.1.6",
    ("gram-newton-schulz==0.1.6", "quack-kernels==0.5.0", "torch-c-dlpack-ext"),
    ("nvidia-cutlass-dsl==4.5.2", "apache-tvm-ffi>=0.1.6,<0.2", "einops"),
)
DION = Peer("dion", "git+https://github.com/microsoft/dion")
PEERS = (BITSANDBYTES, TORCHAO, GRAM, DION)


def without_bitsandbytes() -> str | None:
    return None if originals.without_bitsandbytes() is None else BITSANDBYTES.missing()


def without_muon() -> str | None:
    return None if hasattr(torch.optim, "Muon") else f"torch {torch.__version__} has no torch.optim.Muon"


def download(folder: Path) -> None:
    """Fetch the wheels of all peers that have any, for this Python on this kind of machine, and say how to use them."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--dest", str(folder)]
    subprocess.run([*pip, "--no-deps", *(wheel for peer in PEERS for wheel in peer.wheels)], check=True)
    subprocess.run([*pip, *(wheel for peer in PEERS for wheel in peer.torchless)], check=True)
    print(HOW_TO_INSTALL.format(folder=folder, names=" ".join(p.install for p in (BITSANDBYTES, TORCHAO, GRAM))))


HOW_TO_INSTALL = """On the machine without a network, in the environment with its torch:
  python -m pip install --no-index --find-links {folder} {names}"""
