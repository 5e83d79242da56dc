"""What is stepped: a billion parameters of GPT shape, and the matrices of two models; toys of the same kinds."""

from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

GPT2 = ((768, 768),) * 4 + ((3072, 768), (768, 3072))
"""The matrices of a block of GPT-2 124M, of which there are 12: query, key, value and output apart."""

QWEN3 = ((2048, 2048), (1024, 2048), (1024, 2048), (2048, 2048), (6144, 2048), (6144, 2048), (2048, 6144))
"""Those of a layer of Qwen3-1.7B, of which there are 28: query, key, value, output, gate, up, down."""

BILLION = ((50_304, 1536), (1024, 1536), *(((4608, 1536), (1536, 1536), (6144, 1536), (1536, 6144), (1536,)) * 33))
"""An embedding, positions, 33 blocks with a norm each: 1.01 billion entries."""

CHECKED: tuple[Shape, ...] = ((64, 128), (128, 64), (96, 256), (300,))
"""On which errors are found: large enough for 8-bit codes, small enough for NumPy."""

PRODUCT, PRODUCT_BATCH = 2048, 28
LOGITS = (8192, 128_256)


@dataclass(frozen=True)
class Sizes:
    """How much of everything a run takes."""

    billion: tuple[Shape, ...]
    gpt2: tuple[Shape, ...]
    qwen3: tuple[Shape, ...]
    product: Shape
    logits: tuple[int, int]
    copied_mebibytes: int
    multiplied: int


FULL = Sizes(BILLION, GPT2 * 12, QWEN3 * 28, (PRODUCT_BATCH, PRODUCT, PRODUCT), LOGITS, 2048, 8192)
TOY = Sizes(((64, 80), (40,)), ((24, 24), (32, 24)), ((24, 40), (40, 24)), (2, 48, 48), (16, 200), 1, 64)


def count(shapes: tuple[Shape, ...]) -> int:
    """Entries of all of them."""
    return sum(torch.Size(shape).numel() for shape in shapes)
