"""LightningModules of the zoo whose modules, losses or optimizers live in unusual places."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.zoo_modules import CLASSES, WIDTH, language_model

Batch = dict[str, Tensor]


class Trained(pl.LightningModule):
    """AdamW on whatever requires a gradient."""

    learning_rate = 1e-3

    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate)


class BuiltInConfigureModel(Trained):
    """Has no parameters until ``configure_model`` has run, after every callback's ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = language_model()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


class BuiltInSetup(BuiltInConfigureModel):
    """As above, in ``setup``."""

    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        super().configure_model()


class ComputesInTrainingStep(Trained):
    """Bare parameters on the LightningModule, multiplied in ``training_step`` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 48) * 48**-0.5)
        self.b = nn.Parameter(torch.zeros(WIDTH))
        self.v = nn.Parameter(torch.randn(CLASSES, WIDTH) * WIDTH**-0.5)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = F.relu(F.linear(batch["x"], self.w, self.b))
        return F.cross_entropy(F.linear(hidden, self.v), batch["label"])


class ComputesInOtherMethods(Trained):
    """The network is a chain of methods with names of their own; there is no ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.prototypes = nn.Parameter(torch.randn(CLASSES, WIDTH) * WIDTH**-0.5)

    def embed(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def score(self, x: Tensor) -> Tensor:
        return self.embed(x) @ self.prototypes.t()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.score(batch["x"]), batch["label"])


class SeveralLosses(Trained):
    """Two heads on one trunk; ``training_step`` returns a dict with more than the loss in it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(48, WIDTH), nn.ReLU())
        self.classify = nn.Linear(WIDTH, CLASSES)
        self.reconstruct = nn.Linear(WIDTH, 48)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        hidden = self.trunk(batch["x"])
        logits = self.classify(hidden)
        classification = F.cross_entropy(logits, batch["label"])
        reconstruction = F.mse_loss(self.reconstruct(hidden), batch["x"])
        self.log_dict({"classification": classification, "reconstruction": reconstruction})
        loss = classification + 0.5 * reconstruction
        return {"loss": loss, "classification": classification.detach(), "logits": logits.detach()}


class GAN(pl.LightningModule):
    """Manual optimization, two optimizers, ``toggle_optimizer``, BCE on logits."""

    latent = 8

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(self.latent, WIDTH), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 48), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(48, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial_loss(self, x: Tensor, real: bool) -> Tensor:
        logits = self.discriminator(x)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        z = torch.randn(len(batch["x"]), self.latent, device=self.device)

        self.toggle_optimizer(generator_optimizer)
        generator_loss = self.adversarial_loss(self(z), real=True)
        generator_optimizer.zero_grad()
        self.manual_backward(generator_loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

        self.toggle_optimizer(discriminator_optimizer)
        real_loss = self.adversarial_loss(batch["x"], real=True)
        fake_loss = self.adversarial_loss(self(z).detach(), real=False)
        discriminator_optimizer.zero_grad()
        self.manual_backward((real_loss + fake_loss) / 2)
        discriminator_optimizer.step()
        self.untoggle_optimizer(discriminator_optimizer)

        self.log_dict({"generator": generator_loss, "discriminator": (real_loss + fake_loss) / 2})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.AdamW(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        ]
