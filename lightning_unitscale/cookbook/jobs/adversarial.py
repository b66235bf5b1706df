"""A generative adversarial net on handwritten digits, with two optimizers and manual optimization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.cookbook.jobs.job import Batch, Job
from lightning_unitscale.cookbook.jobs.pictures import digit_images

NOISE = 16


class GAN(Job):
    """The non-saturating game of Goodfellow et al. (arXiv 1406.2661). The score is an energy distance.

    2 E|x - y| - E|x - x'| - E|y - y'| between images and made ones (Székely & Rizzo, 2013): 0 only where they have the
    same distribution.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False
        w = self.width
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, 4 * w), nn.ReLU(), nn.Unflatten(1, (w, 2, 2)), nn.ConvTranspose2d(w, w, 4, 2, 1)),
            *(nn.BatchNorm2d(w), nn.ReLU(), nn.ConvTranspose2d(w, 1, 4, 2, 1), nn.Tanh()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Conv2d(1, w, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Linear(8 * w, 1)),
        )

    def examples(self) -> tuple[Tensor, ...]:
        """Images."""
        return (digit_images()[0],)

    def loss(self, batch: Batch) -> Tensor:
        """The discriminator's."""
        (images,) = batch
        made = self.generator(torch.randn(len(images), NOISE)).detach()
        return F.softplus(self.discriminator(made)).mean() + F.softplus(-self.discriminator(images)).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """A step of the discriminator, then one of the generator."""
        players: Any = self.optimizers()
        of_generator, of_discriminator = players
        loss = self.loss(batch)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        cheat = F.softplus(-self.discriminator(self.generator(torch.randn(len(batch[0]), NOISE)))).mean()
        of_generator.zero_grad()
        self.manual_backward(cheat)
        of_generator.step()
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers or ():
            scheduler.step()
        return {"loss": loss.detach()}

    def score(self, batch: Batch) -> Tensor:
        """Energy distance of made images to these."""
        images = batch[0].flatten(1)
        made = self.generator(torch.randn(len(images), NOISE)).flatten(1)
        between = torch.cdist(images, made).mean()
        return 2 * between - F.pdist(images).mean() - F.pdist(made).mean()

    def configure_optimizers(self) -> Any:
        """One for each player."""
        parts = [self.with_schedule(part.parameters()) for part in (self.generator, self.discriminator)]
        return parts if not self.schedule else ([p["optimizer"] for p in parts], [p["lr_scheduler"] for p in parts])
