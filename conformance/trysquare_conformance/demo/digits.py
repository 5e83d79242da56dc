"""A small convolutional network on the 1,797 handwritten digits of 8 × 8 pixels that scikit-learn ships."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from trysquare_conformance.demo.training import Batch

TESTED_SHARE = 0.25
SPLIT_SEED = 3


@dataclass(frozen=True)
class Digits:
    """The task; a quarter of the images is held out."""

    batch: int = 64
    device: str = "cpu"

    name = "digits"
    title = "scikit-learn's digits"

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        return nn.Sequential(*layers).to(self.device)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """Pixels between 0 and 1 as (1797, 1, 8, 8), and what they show.

        Raises:
            ModuleNotFoundError: scikit-learn is missing.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"scikit-learn has the digits; {error.name} is missing: pip install 'trysquare[verify,digits]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        return images[shuffled].to(self.device), torch.as_tensor(labels)[shuffled].to(self.device)

    @property
    def tested(self) -> int:
        return int(TESTED_SHARE * len(self.images[1]))

    def training_batch(self, generator: torch.Generator) -> Batch:
        images, labels = self.images
        chosen = torch.randint(self.tested, len(labels), (self.batch,), generator=generator).to(self.device)
        return images[chosen], labels[chosen]

    @cached_property
    def held_out(self) -> list[Batch]:
        """All held out images at once."""
        images, labels = self.images
        return [(images[: self.tested], labels[: self.tested])]
