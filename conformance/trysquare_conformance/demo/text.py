"""A character-level language model of the Python standard library: real text that every machine with Python has.

Every tenth source file is held out. The model is a small GPT (pre-norm, learnt positions, no biases, untied head).
"""

import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trysquare_conformance.demo.training import Batch

VOCABULARY = 128
UNKNOWN = ord("?")
HELD_OUT = 10
CHARACTERS = 12_000_000
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
MODEL_SEED, VALIDATION_SEED = 1, 2


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Attention and a perceptron, each beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.perceptron = (
            Attention(width, heads),
            nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)),
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        x = x + self.attention(self.norms[0](x))
        y: Tensor = x + self.perceptron(self.norms[1](x))
        return y


class Transformer(nn.Module):
    """From characters (batch, length) to the logits of the next ones."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length) to (batch, length, characters)."""
        embedded = self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        y: Tensor = self.lm_head(self.norm(self.blocks(embedded)))
        return y


@dataclass(frozen=True)
class Text:
    """The task at some size. `batch` is the number of sequences in a step, of `length` characters each."""

    width: int = 160
    layers: int = 4
    length: int = 128
    batch: int = 16
    device: str = "cpu"

    name = "text"
    title = "next character of the Python standard library"

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(self.width, self.layers, self.length).to(self.device)

    @cached_property
    def sources(self) -> tuple[Tensor, Tensor]:
        """Characters to train on, and those of the held out files."""
        files = source_files()
        kept = [path for i, path in enumerate(files) if i % HELD_OUT]
        return characters(kept, CHARACTERS), characters(files[::HELD_OUT], CHARACTERS // HELD_OUT)

    def training_batch(self, generator: torch.Generator) -> Batch:
        return self._batch(self.sources[0], self.batch, generator)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The same for every run."""
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        return [self._batch(self.sources[1], 32, generator) for _ in range(4)]

    def _batch(self, text: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(text) - self.length, (count, 1), generator=generator)
        windows = text[starts + torch.arange(self.length + 1)].long().to(self.device)
        return windows[:, :-1], windows[:, 1:]


SHORT = Text()
"""For a CPU: 1.3 million parameters, 2,048 characters a step."""

LONG = Text(width=192, layers=6, length=256, batch=64)
"""For a GPU: 2.8 million parameters, 16,384 characters a step."""


def source_files() -> list[Path]:
    """The library's modules in the order of their names.

    Raises:
        FileNotFoundError: This Python comes without them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    if len(files) < HELD_OUT:
        raise FileNotFoundError(f"{root}: this Python comes without its library's sources, which the demo reads")
    return files


def characters(files: list[Path], limit: int) -> Tensor:
    """ASCII codes of the files one after the other, "?" for everything else."""
    codes = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)[:limit]), dtype=torch.uint8)
    return torch.where(codes < VOCABULARY, codes, UNKNOWN)
