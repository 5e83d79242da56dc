"""Mistakes inside DolphinFlow's Triton kernels: in masks, strides, addresses and what passes from launch to launch.

None reads or writes outside of its tensors: what that does is chance.
"""

import importlib.util
from typing import Any

from trysquare_conformance.planting import Planter
from trysquare_conformance.rewriting import rewritten

plant = Planter("dolphinflow", lanes=("triton-*",))
FAULTS = plant.faults

TRUNCATED = """@triton.jit
def _truncated(x, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        y = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _moved("""

Mistake = tuple[str, tuple[tuple[str, str], ...]]  # what it is, and the lines that it replaces

MASK = "here = (row < rows) & (column < columns)"
PLACES = "places = row.to(tl.int64) * columns + column"
WRITTEN = "written = moved(here, finite)"
GRADIENT = "clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)"
COEFFICIENT = "coefficient(along, square, eps, PROJECTS, SMALLEST, LARGEST)"
UNCLIPPED = GRADIENT.replace("scale", "None")
IN_UPDATE: dict[str, Mistake] = {
    "kernel-rows-not-masked": (
        "The rows behind the last of a program begin again at the first",
        ((MASK, "here = (row < 1 << 30) & (column < columns)"), (PLACES, PLACES.replace("row.", "(row % rows)."))),
    ),
    "kernel-columns-not-masked": (
        "The sums of a row count its first columns again",
        (
            (MASK, "here = row < rows"),
            (PLACES, PLACES.replace("+ column", "+ column % columns")),
        ),
    ),
    "kernel-last-column-skipped": ("The mask ends a column early", ((MASK, MASK.replace("columns", "columns - 1")),)),
    "kernel-row-stride": ("A row begins a column too early", ((PLACES, PLACES.replace("columns", "(columns - 1)")),)),
    "kernel-rows-share-products": (
        "All rows of a program have one coefficient",
        (("tl.sum(w * g, axis=1, keep_dims=True)", "tl.sum(w * g).to(w.dtype)"),),
    ),
    "kernel-projection-by-zero": (
        "A coefficient of 0 is subtracted like others: beside an infinite weight that is NaN",
        ((f"g = subtract(g, w, {COEFFICIENT})", f"g -= w * {COEFFICIENT}"),),
    ),
    "kernel-first-rows-coefficient": (
        "The long rows of a parameter have the coefficient of the first",
        (("tl.load(coefficients + row)", "tl.load(coefficients + member * rows)"),),
    ),
    "kernel-not-clipped": ("The gradient is not clipped", ((f"g = {GRADIENT}", f"g = {UNCLIPPED}"),)),
    "kernel-not-corrected": ("The second moment is not corrected", (("if CORRECTED:", "if False:"),)),
    "kernel-natural-logarithm": ("ln β₂ instead of log₂ β₂", (("math.log2(beta2)", "math.log(beta2)"),)),
    "kernel-second-moment-of-raw-gradient": (
        "v of the gradient before it is projected",
        (("u = _adapted(u, g, ", f"u = _adapted(u, {GRADIENT}, "),),
    ),
    "kernel-second-moment-in-momentum": (
        "The address of v is that of m",
        (("spare if bucket.exp_avg_sqs is None else bucket.exp_avg_sqs", "spare"),),
    ),
    "kernel-gradient-of-neighbour": (
        "The table's gradients are shifted by a member",
        (("        bucket.gradients,\n", "        [*bucket.gradients[1:], bucket.gradients[0]],\n"),),
    ),
    "kernel-second-moment-of-neighbour": (
        "All members have the address of the first one's v",
        (("address(table, member, count, 3,", "address(table, member * 0, count, 3,"),),
    ),
    "kernel-finite-ignored": ("A step that is skipped is written", ((WRITTEN, "written = here"),)),
    "kernel-momentum-not-masked": (
        "A step that is skipped writes the momentum",
        (("tl.store(m_place, m, mask=written)", "tl.store(m_place, m, mask=here)"),),
    ),
    "kernel-truncates": (
        "bfloat16 parameters are truncated",
        (("narrowed(_moved(", "_truncated(_moved("), ("@triton.jit\ndef _moved(", TRUNCATED)),
    ),
    "kernel-no-look-ahead": ("u = m", (("u = g + m * mu", "u = m"),)),
    "kernel-no-decay": ("θ is not decayed", (("w * (1.0 - lr * tl.load(numbers + 1)).to(STATE)", "w"),)),
}
IN_PRODUCTS: dict[str, Mistake] = {
    "kernel-products-not-clipped": (
        "The products of long rows are of the raw gradient",
        (("mask=here, other=0.0), scale, STATE)\n        if", "mask=here, other=0.0), None, STATE)\n        if"),),
    ),
    "kernel-first-part-only": (
        "The products of a long row are those of its first part",
        (("parts, tile = cdiv(columns, part)", "parts, tile = 1"),),
    ),
    "kernel-last-tile-of-part": (
        "The products of a part leave out its last tile",
        (("range(0, PART, TILE)", "range(0, PART - TILE, TILE)"),),
    ),
    "kernel-sums-overwritten": (
        "The products of a long row are those of its last tile",
        (("along += (w * x).to(tl.float64)", "along = (w * x).to(tl.float64)"),),
    ),
}
IN_NORM: dict[str, Mistake] = {
    "kernel-norm-without-last-part": (
        "The norm of a long gradient leaves out its last part",
        (("parts = cdiv(first.numel(), part)", "parts = max(1, first.numel() // part)"),),
    ),
    "kernel-norm-without-last-block": (
        "The sum of squares of a part leaves out its last block",
        (("range(0, PART, BLOCK)", "range(0, PART - BLOCK, BLOCK)"),),
    ),
    "kernel-infinite-norm-is-finite": (
        "Infinity passes for a finite norm",
        (('is_finite = length < float("inf")', 'is_finite = length <= float("inf")'),),
    ),
    "kernel-clips-without-margin": ("G/n instead of G/(n + 1e-6)", (("(length + MARGIN)", "length"),)),
    "kernel-skipped-step-counts": ("A step that is skipped is counted", (("if finite is None:", "if True:"),)),
    "kernel-step-counts-twice": ("t ← t + 2", (("other=0.0) + moves", "other=0.0) + moves + moves"),)),
}
IN_MOMENTS: dict[str, Mistake] = {
    "kernel-matrix-no-look-ahead": ("u = m in the matrix mode", (("(u_place, g + m * mu", "(u_place, m"),)),
    "kernel-matrix-not-clipped": (
        "The gradient of the matrix mode is not clipped",
        ((f"g = {GRADIENT}", f"g = {UNCLIPPED}"),),
    ),
    "kernel-matrix-first-tile-only": (
        "The momentum of the matrix mode stays beyond the first tile",
        (("here = places < elements", "here = places < tl.minimum(elements, TILE // 2)"),),
    ),
}


def _declare(owner: Any, attribute: str, mistakes: dict[str, Mistake]) -> None:
    for name, (what, changes) in mistakes.items():
        plant.add(name, what, owner, attribute, rewritten(*changes))


if importlib.util.find_spec("triton"):
    from trysquare import kernels
    from trysquare.kernels import clipping, dolphinflow

    _declare(kernels, "dolphinflow", IN_UPDATE)
    _declare(kernels, clipping.__name__.rpartition(".")[2], IN_NORM)
    _declare(dolphinflow, "projection", IN_PRODUCTS)
    _declare(dolphinflow, "moments", IN_MOMENTS)
