"""A run that rehearses every batch, and its twin that never does, to be compared bit for bit."""

import random
from collections import deque
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale.engine.record.rehearsal import rehearsal

WIDTH = 4
BATCHES = 4
STEPS_RUN: list[str] = []  # a class-level trace is out of a rehearsal's reach, on purpose: it shows that steps ran


class Memory(Logger):
    name, version, experiment = "memory", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def log_metrics(self, metrics, step=None):
        self.written.append((metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass


class CountSteps(Callback):
    steps = 0

    def on_train_start(self, trainer, module):
        def count(*args):
            self.steps += 1

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(count)


class Rehearse(Callback):
    """Rehearses each batch from where the real callback does, and keeps the losses of both runs."""

    def __init__(self) -> None:
        self.batches = 0
        self.rehearsed: list[Tensor] = []
        self.real: list[Tensor] = []

    def on_train_start(self, trainer, module):
        strategy, original = trainer.strategy, trainer.strategy.on_train_batch_start

        def on_train_batch_start(batch, batch_idx, *args):
            with rehearsal(module, trainer) as run:
                output = run.training_step(batch, batch_idx)
                losses = run.losses or [output]
                self.rehearsed += [loss.detach().clone() for loss in losses if loss is not None]
            self.batches += 1
            return original(batch, batch_idx, *args)

        strategy.on_train_batch_start = on_train_batch_start

    def on_train_end(self, trainer, module):
        assert self.batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if outputs:
            self.real.append(outputs["loss"])


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, WIDTH)

    def loss(self, batch):
        return self(batch).square().mean()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        STEPS_RUN.append(type(self).__name__)
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Manual(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        STEPS_RUN.append(type(self).__name__)
        self.steps(batch)


class Run:
    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, rehearse: Rehearse) -> None:
        self.trainer, self.module, self.rehearse = trainer, module, rehearse
        self.facts: dict[str, Any] = {
            "parameters": module.state_dict(),
            "gradients": [parameter.grad for parameter in module.parameters()],
            "trainable": [parameter.requires_grad for parameter in module.parameters()],
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "logged": trainer.logger.written,
            "metrics": trainer.callback_metrics,
            "loops": trainer.fit_loop.state_dict(),
            "results": list(trainer.fit_loop.epoch_loop._results),
            "steps": trainer.callbacks[0].steps,
            "random": [random.random(), np.random.rand(), torch.rand(2)],
            "module": getattr(module, "facts", list)(),
        }


def fit(make, rehearse, **options) -> Run:
    pl.seed_everything(1, verbose=False)
    module, callback = make(), Rehearse()
    data = DataLoader([torch.randn(WIDTH) for _ in range(3 * BATCHES)], batch_size=3)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": Memory(), "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [CountSteps(), *([callback] if rehearse else [])]
    trainer = pl.Trainer(**{**defaults, **quiet, **options, "callbacks": callbacks})
    trainer.fit(module, data)
    return Run(trainer, module, callback)


def same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(map(str, one)) == list(map(str, other)), path
        for (key, left), right in zip(one.items(), other.values(), strict=True):
            same(left, right, f"{path}.{key}")
    elif isinstance(one, (list, tuple, deque)):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{path}[{index}]")
    else:
        assert one == other, path


def check(make, **options) -> Run:
    STEPS_RUN.clear()
    plain = fit(make, rehearse=False, **options)
    steps = len(STEPS_RUN)
    rehearsed = fit(make, rehearse=True, **options)
    assert len(STEPS_RUN) == 3 * steps, "each batch should have run once plain, once in rehearsal and once for real"
    same(plain.facts, rehearsed.facts)
    if rehearsed.rehearse.real:  # automatic optimization: the rehearsed loss is the loss
        scale = options.get("accumulate_grad_batches", 1)
        same([loss / scale for loss in rehearsed.rehearse.rehearsed], rehearsed.rehearse.real)
    return rehearsed


class RandomNumbers(Base):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.python, self.numpy = random.Random(1), np.random.default_rng(2)

    def loss(self, batch):
        own = self.python.random() + self.numpy.random() + torch.rand(1, generator=self.generator)
        return super().loss(F.dropout(batch, 0.5)) * (own + random.random() + np.random.rand())

    def facts(self):
        return [self.generator.get_state(), self.python.getstate(), self.numpy.random()]
