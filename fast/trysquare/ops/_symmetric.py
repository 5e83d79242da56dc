"""Symmetric products at little more than half the work: the panels on and below the diagonal, then their mirror image.

A panel is some columns from the diagonal down. With T of them (T + 1)/2T of the operations are left. They are written
into buffers that are used again, through views that are made once: making a view takes as long as a small copy.
Elsewhere than on a CPU, under torch.compile and for small matrices the whole product is formed.

Measured on an EPYC of the fourth generation, polar factors by panels over the same with whole products (medians of
interleaved rounds, one thread): in bfloat16 1.03 at 384 × 384, 0.84 at 512 × 512, 0.87 at 640 × 640, 0.62 at
2048 × 2048; in float32 0.76 at 768 × 3072. On the eight matrices of two GPT-2 blocks whole products took 0.73 of
torch.optim.Muon's step, panels of 128 or 192 columns 0.56 to 0.62 in several runs on a busy machine, of 256 0.58 to
0.61, of 384 0.64.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

WIDTH = 128
SMALLEST = 512


class Panels:
    """B symmetric n × n matrices, ``whole`` of shape (B, n, n), and the views of which products are made.

    Of a left factor a product reads ``rows``, from the panel's first on, of a right factor ``columns``, those of the
    panel, and it writes ``lower``.
    """

    def __init__(self, whole: Tensor) -> None:
        starts = range(0, whole.shape[-1], WIDTH)
        self.whole = whole
        self.rows, self.columns = rows(whole), columns(whole)
        self.lower = [m[j:, j : j + WIDTH] for m in whole.unbind() for j in starts]
        beyond = [(slice(j, j + WIDTH), slice(j + WIDTH, None)) for j in starts[:-1]]
        self.mirrored = [(whole[:, panel, rest], whole[:, rest, panel].mT) for panel, rest in beyond]

    def multiply_(self, left: list[Tensor], right: list[Tensor]) -> Panels:
        """Becomes left · right, from the factors' rows and columns."""
        for product, factors in zip(self.lower, zip(left, right, strict=True), strict=True):
            torch.mm(*factors, out=product)
        return self._mirror_()

    def add_multiple_(self, base: Panels, left: Panels, right: Panels, beta: float, alpha: float = 1.0) -> Panels:
        """Becomes β·base + α·left · right; may be the base, but neither factor."""
        for out, addend, x, y in zip(self.lower, base.lower, left.rows, right.columns, strict=True):
            torch.addmm(addend, x, y, beta=beta, alpha=alpha, out=out)
        return self._mirror_()

    def _mirror_(self) -> Panels:
        for upper, lower in self.mirrored:
            upper.copy_(lower)
        return self


def rows(x: Tensor) -> list[Tensor]:
    """Of every matrix the rows from each panel's first on."""
    return [m[j:] for m in x.unbind() for j in range(0, x.shape[-2], WIDTH)]


def columns(x: Tensor) -> list[Tensor]:
    """Of every matrix the columns of each panel."""
    return [m[:, j : j + WIDTH] for m in x.unbind() for j in range(0, x.shape[-1], WIDTH)]


def buffers(x: Tensor, count: int) -> list[Panels]:
    """So many, for the Gram matrix of X (B, n, m) and its products."""
    size = x.shape[-2]
    return [Panels(x.new_empty(x.shape[0], size, size)) for _ in repeat(None, count)]


def pays(x: Tensor) -> bool:
    """Whether products of the Gram matrix of X (B, n, m) run by panels."""
    return x.device.type == "cpu" and x.shape[-2] >= SMALLEST and not torch.compiler.is_compiling()
