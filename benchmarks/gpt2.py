"""Parameters of GPT-2 shape: an embedding, positions, two blocks and a final norm; 21 million entries in 15 tensors."""

from collections.abc import Iterator, Sequence

import torch

BLOCK = ((768,), (2304, 768), (768, 768), (768,), (3072, 768), (768, 3072))
SHAPES: tuple[tuple[int, ...], ...] = ((8192, 768), (1024, 768), *BLOCK, *BLOCK, (768,))


def shrunk(shape: Sequence[int], divisor: int = 128) -> tuple[int, ...]:
    """The same tensor with so few entries that a step over all of them is nothing but overhead."""
    return tuple(max(size // divisor, 1) for size in shape)


PARAMETERS = sum(torch.Size(shape).numel() for shape in SHAPES)
SMALL_SHAPES = tuple(shrunk(shape) for shape in SHAPES)


Device = str | torch.device


def weights(shapes: Sequence[Sequence[int]], seed: int = 0, device: Device = "cpu") -> list[torch.nn.Parameter]:
    """Gaussian, as GPT-2 initialises them (σ = 0.02); norms and biases too, for their timing does not depend on it."""
    return [torch.nn.Parameter(0.02 * noise) for noise in _gaussian(shapes, seed, device)]


def gradients(shapes: Sequence[Sequence[int]], seed: int, device: Device = "cpu") -> list[torch.Tensor]:
    """Gaussian of a size that the clipping has something to do."""
    return [1e-2 * noise for noise in _gaussian(shapes, 1000 + seed, device)]


def _gaussian(shapes: Sequence[Sequence[int]], seed: int, device: Device) -> Iterator[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator, device=device) for shape in shapes)


def give(parameters: Sequence[torch.nn.Parameter], grads: Sequence[torch.Tensor]) -> None:
    """Hang the gradients on the parameters. No optimizer here writes into them, so that all may share them."""
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient
