"""Symmetric products at little more than half the work: the panels on and below the diagonal, then their mirror image.

A panel is some columns from the diagonal down. With T of them (T + 1)/2T of the operations are left. They are written
into buffers that are used again, through views that are made once: making a view takes as long as a small copy.
Elsewhere than on a CPU, under torch.compile and for small matrices the whole product is formed.

Measured on an EPYC of the fourth generation, polar factors by panels over the same with whole products (medians of
interleaved rounds, one thread): in bfloat16 1.03 at 384 × 384, 0.84 at 512 × 512, 0.87 at 640 × 640, 0.62 at
2048 × 2048; in float32 0.76 at 768 × 3072. On the eight matrices of two GPT-2 blocks whole products took 0.73 of
torch.optim.Muon's step, panels of 128 or 192 columns 0.56 to 0.62 in several runs on a busy machine, of 256 0.58 to
0.61, of 384 0.64.

A CPU that multiplies bfloat16 by tiles (AMX) is so fast that of square matrices mirroring costs what the panels save.
On a Xeon with it, one thread: a product plus a multiple of a third matrix takes 0.86 ms whole at 768 × 768, 0.99 by
panels of 128 and 0.86 to 0.91 by wider ones; 0.26 against 0.30 and more at 512 × 512; at 1536 × 1536 panels of 256 were
ahead (5.9 against 7.5 ms), at 2048 × 2048 behind (21.6 against 17.0). The Gram matrix of 768 × 3072 entries takes
3.7 ms whole, 2.5 by panels of 128 and 3.0 of 256; of 3072 × 768, read transposed, 5.3, 5.1 and 3.9.
With two threads oneDNN leaves one of them idle over a whole product at 768 and 1024, but not over half the rows of
it: 0.55 ms for both halves against 0.81 at 768 × 768, 1.2 against 1.8 at 1024 × 1024; at 640 and 1536 it is the other
way round (0.83 against 0.60, 3.6 against 3.4). More threads were not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops import _scratch

SMALLEST = 512
WIDTH, GRAM_WIDTH = 128, 256
"""Columns of a panel; and of one of XXᵀ where products of square matrices run whole."""

HALVED = range(768, 1024 + 1)
"""Rows of square matrices whose whole products run as two halves, if there is more than one thread."""

TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
"""Whether this CPU multiplies bfloat16 by tiles."""


class Panels:
    """B symmetric n × n matrices, ``whole`` of shape (B, n, n), and the views of which products are made.

    Of a left factor a product reads ``rows``, of a right factor ``columns``, and it writes ``product``, which is at
    these rows and columns: a panel, or without a ``width`` all of some rows. ``mirrored`` follows from panels.
    """

    def __init__(self, whole: Tensor, width: int | None) -> None:
        self.whole, self.width = whole, width
        n = whole.shape[-1]
        cuts = parts(n, width)
        self.rows = [m[part] for m in whole.unbind() for part, _ in cuts]
        self.columns = [m[:, part] for m in whole.unbind() for _, part in cuts]
        self.product = [m[part] for m in whole.unbind() for part in cuts]
        beyond = [] if width is None else [(slice(j, j + width), slice(j + width, None)) for j in range(0, n, width)]
        self.mirrored = [(whole[:, panel, rest], whole[:, rest, panel].mT) for panel, rest in beyond[:-1]]

    def become_gram_(self, x: Tensor) -> Panels:
        """Becomes XXᵀ."""
        if not by_tiles(x) or x.shape[-2] == x.shape[-1]:
            panels, width = self, self.width
        else:
            panels, width = Panels(self.whole, GRAM_WIDTH), GRAM_WIDTH
        pairs = [(m[i], m.mT[:, j]) for m in x.unbind() for i, j in parts(x.shape[-2], width)]
        for out, (left, right) in zip(panels.product, pairs, strict=True):
            torch.mm(left, right, out=out)
        panels.mirror_()
        return self

    def add_multiple_(self, base: Panels, left: Panels, right: Panels, beta: float, alpha: float = 1.0) -> Panels:
        """Becomes β·base + α·left · right; may be the base, but neither factor."""
        for out, addend, x, y in zip(self.product, base.product, left.rows, right.columns, strict=True):
            torch.addmm(addend, x, y, beta=beta, alpha=alpha, out=out)
        self.mirror_()
        return self

    def multiply_(self, left: Panels, right: Panels, *, symmetric: bool = True) -> Panels:
        """Becomes left · right; may be neither. One that is not quite ``symmetric`` is formed whole."""
        if self.width is not None and not symmetric:
            torch.bmm(left.whole, right.whole, out=self.whole)
            return self
        for out, x, y in zip(self.product, left.rows, right.columns, strict=True):
            torch.mm(x, y, out=out)
        self.mirror_()
        return self

    def plus_identity_(self, number: float) -> Panels:
        """The same plus a multiple of the identity."""
        plus_identity_(self.whole, number)
        return self

    def mirror_(self) -> None:
        """What is above the panels becomes what is below."""
        for upper, lower in self.mirrored:
            upper.copy_(lower)


def plus_identity_(z: Tensor, number: float) -> Tensor:
    """Z and a multiple of the identity, in the place of Z.

    In float32: on a CPU torch rounds a number to bfloat16 before it adds it to something in bfloat16, so that
    aI + Z was too small by 0.6 % in the last iteration of five, and all that it multiplied with it.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return torch.add(z.to(wide), torch.eye(z.shape[-1], dtype=wide, device=z.device), alpha=number).to(z.dtype)
    diagonal = z.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(diagonal.to(wide).add_(number))
    return z


def parts(n: int, width: int | None) -> list[tuple[slice, slice]]:
    """Rows and columns of the products that make up one of n × n: panels, or without a width some of all rows."""
    if width is None:
        return [(part, slice(None)) for part in halves(n)]
    return [(slice(j, None), slice(j, j + width)) for j in range(0, n, width)]


def halves(n: int) -> list[slice]:
    """Rows of a whole product that are multiplied at once."""
    if n in HALVED and torch.get_num_threads() > 1:
        return [slice(0, n // 2), slice(n // 2, n)]
    return [slice(0, n)]


def buffers(x: Tensor, count: int) -> list[Panels]:
    """So many, for the Gram matrix of X (B, n, m) and its products."""
    shape, width = (x.shape[0], x.shape[-2], x.shape[-2]), None if by_tiles(x) else WIDTH
    return [Panels(_scratch.empty(f"square {i}", shape, x.dtype, x.device), width) for i in range(count)]


def by_tiles(x: Tensor) -> bool:
    """Whether products run so fast that a square one is formed whole."""
    return TILES and x.device.type == "cpu" and x.dtype == torch.bfloat16


def pays(x: Tensor) -> bool:
    """Whether products of the Gram matrix of X (B, n, m) run by panels."""
    return x.device.type == "cpu" and x.shape[-2] >= SMALLEST and not torch.compiler.is_compiling()
