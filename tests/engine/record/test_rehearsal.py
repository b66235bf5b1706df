"""A run that rehearsed every batch must equal, bit for bit, a twin that never did."""

import functools
import threading
import warnings
from collections import deque

import pytest
import torch
import torchmetrics
from pytorch_lightning.callbacks import Callback
from support.rehearsed import BATCHES, WIDTH, Base, Manual, RandomNumbers, check, fit
from torch import nn
from torch.utils.checkpoint import checkpoint


class KeepsThings(Base):
    class Box:
        __slots__ = ("count",)

        def __init__(self):
            self.count = 0

        def listen(self, module):
            module.register_forward_hook(self.__hook)

        def __hook(self, *args):
            self.count += 1

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.net.shared = self.norm.shared = []
        self.count, self.recent, self.seen, self.box = 0, deque(maxlen=2), {"n": [0]}, self.Box()
        self.plain, self.history = torch.zeros(WIDTH), None
        self.view = self.plain[:2]
        self.hparams["calls"] = 0
        self.box.listen(self.norm)
        self.bump = functools.partial(self.add_to, self.seen)
        self.lock = threading.Lock()
        self.view_of_weight = self.net.weight.detach()[0]

    @staticmethod
    def add_to(where):
        where["n"].append(len(where["n"]))

    def loss(self, batch):
        with self.lock:
            self.count += 1
        self.hparams["calls"] += 1
        self.bump()
        self.recent.append(self.count)
        self.norm.shared.append(self.count)
        assert self.net.shared is self.norm.shared
        assert self.seen["n"] == list(range(self.count + 1))
        self.plain += 1
        assert self.view[0] == self.plain[0]
        self.net.weight.data.mul_(0.9)
        assert torch.equal(self.view_of_weight, self.net.weight[0])
        output = self.norm(self.net(batch))
        assert self.box.count == self.count
        if self.history is not None:
            assert self.history.grad_fn is not None
            output = output + self.history.detach().mean()
        self.history = output  # a tensor with a history: copy.deepcopy refuses it
        return output.square().mean() + self.norm.weight.sum()

    def facts(self):
        kept = [self.count, self.recent, self.seen, self.net.shared, self.plain, self.view, self.history, self.hparams]
        return [*kept, self.box.count, len(self.norm._forward_hooks)]


class Metrics(Base):
    def __init__(self):
        super().__init__()
        task = {"task": "multiclass", "num_classes": WIDTH}
        self.mean = torchmetrics.MeanMetric()
        self.collection = torchmetrics.MetricCollection([torchmetrics.Accuracy(**task), torchmetrics.Recall(**task)])
        self.list_state = torchmetrics.CatMetric()

    def loss(self, batch):
        output = self(batch)
        loss = output.square().mean()
        self.mean(loss)
        self.list_state.update(loss)
        scores = self.collection(output, batch.argmax(-1))
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(scores)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.logger.log_metrics({"by hand": loss.item()})
        self.print("")
        return loss

    def facts(self):
        return [self.collection.compute(), self.list_state.compute(), self.list_state._update_count]


ELSEWHERE = torch.zeros(1)


class WritesWeights(Base):
    def __init__(self):
        super().__init__()
        self.teacher = [nn.Linear(WIDTH, WIDTH)]  # hidden from named_modules
        self.average = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.embed = nn.Embedding(3, WIDTH, max_norm=0.1)  # writes from inside F.embedding
        self.bias2, self.bias3 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        ELSEWHERE.zero_()

    def loss(self, batch):
        self.net.weight.data.clamp_(-0.2, 0.2)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 0.5)
            for ours, theirs in zip(self.teacher[0].parameters(), self.net.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
            self.bias2[0] = 0.5 * self.bias2[0]
            torch.mul(self.bias2, 0.9, out=self.bias2)
            self.bias3.data = self.bias3.data * 0.5
            ELSEWHERE.add_(1)
        self.net.bias.requires_grad_(not self.net.bias.requires_grad)
        self.extra = nn.Parameter(torch.ones(1))
        output = self.net(batch) + self.average(batch) + self.teacher[0](batch) + self.bias2 * self.bias3
        return (output + self.embed(torch.arange(3))).square().mean() + ELSEWHERE.item()

    def facts(self):
        return [self.teacher[0].state_dict(), ELSEWHERE.clone()]


class Accumulates(Base):
    def loss(self, batch):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)
        return super().loss(batch)


class Gan(Manual):
    class Scheduler(torch.optim.lr_scheduler.StepLR):
        calls = 0

        def step(self):
            type(self).calls += 1
            super().step()

    def facts(self):
        return self.Scheduler.calls

    def __init__(self):
        super().__init__()
        self.Scheduler.calls = 0
        self.critic, self.batches, self.own = nn.Linear(WIDTH, 1), 0, []

    def steps(self, batch):
        opt_g, opt_d = self.optimizers()
        sched_g, sched_d = self.lr_schedulers()
        self.toggle_optimizer(opt_d)
        fake = self.net(batch).detach()
        loss = self.critic(fake).mean() - self.critic(batch).mean()
        opt_d.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt_d, 0.5, "norm")
        torch.nn.utils.clip_grad_value_(self.critic.parameters(), 0.1)
        self.log("gradient", self.critic.weight.grad.norm())
        opt_d.step()
        self.untoggle_optimizer(opt_d)
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.3, 0.3)

        def closure():
            with opt_g.toggle_model():
                loss = -self.critic(self.net(batch)).mean()
            self.manual_backward(loss)
            return loss

        self.batches += 1
        if self.batches % 2 == 0:  # accumulates otherwise
            for group in opt_g.param_groups:
                group["lr"] *= 0.9
            returned = opt_g.step(closure)
            assert returned is None or returned.ndim == 0
            opt_g.optimizer.zero_grad(set_to_none=False)
        else:
            closure()
        sched_g.step()
        sched_d.step()
        self.trainer.optimizers[0].step()  # behind Lightning's back
        self.log("lr", sched_g.get_last_lr()[0])

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in (self.net, self.critic)]
        return optimizers, [self.Scheduler(optimizer, 2, 0.5) for optimizer in optimizers]


class PlainBackward(Manual):
    """Optimizer and scaler of its own, backward in every spelling."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.optimizer = torch.optim.SGD(self.other.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def steps(self, batch):
        self.optimizer.zero_grad()
        self.scaler.scale(self.other(batch).square().mean()).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        torch.autograd.backward([self.loss(batch), self.loss(batch)])
        torch.autograd.backward(self.loss(batch))
        optimizer.step()

    def facts(self):
        return [self.optimizer.state_dict(), self.scaler.state_dict()]


class Lbfgs(Manual):
    def steps(self, batch):
        def closure():
            self.optimizers().zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        self.optimizers().step(closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class GradientPenalty(Base):
    def loss(self, batch):
        batch = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(batch).tanh().sum(), batch, create_graph=True)
        return slope.square().mean()


class Checkpointed(Base):
    def __init__(self):
        super().__init__()
        self.drop, self.reentrant = nn.Dropout(0.5), False

    def forward(self, x):
        x = checkpoint(lambda x: self.drop(self.net(x)), x, use_reentrant=False)
        return checkpoint(lambda x: self.drop(self.net(x)), x, use_reentrant=True)


class Recurrent(Base):
    def __init__(self):
        super().__init__()
        self.lstm, self.script = nn.LSTM(WIDTH, WIDTH), torch.jit.script(nn.BatchNorm1d(WIDTH))
        self.normed = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.parametrized = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.parametrized(self.normed(self.script(self.lstm(x)[0])))


class Hooks(Base):
    class Counter(Callback):
        seen = 0

        def hook(self, *args):
            self.seen += 1

    def __init__(self):
        super().__init__()
        self.counter = self.Counter()
        self.net.register_forward_hook(self.counter.hook)
        self.handle = self.net.register_forward_hook(lambda module, args, output: output * 2)
        self.left = 3

    def loss(self, batch):
        self.net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.left -= 1
        if not self.left:
            self.handle.remove()
        return super().loss(batch)

    def facts(self):
        return [self.counter.seen, len(self.net._forward_hooks), len(self.net._forward_pre_hooks)]


class WritesBatch(Base):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": [batch]}

    def loss(self, batch):
        return super().loss(batch["x"].pop().mul_(2))


class StopsTrainer(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def loss(self, batch):
        self.calls += 1
        self.trainer.should_stop = self.trainer.should_stop or self.calls == 2
        self.trainer.seen = getattr(self.trainer, "seen", 0) + 1
        assert self.trainer.seen == self.calls
        return super().loss(batch)


class NoBatchIndex(Base):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Dictionary(Base):
    def training_step(self, batch, index):
        return super().training_step(batch, index)


AUTOMATIC = [
    *(RandomNumbers, KeepsThings, Metrics, WritesWeights, GradientPenalty, Checkpointed, Recurrent, Hooks),
    *(WritesBatch, StopsTrainer, NoBatchIndex, Dictionary),
]


@pytest.mark.parametrize("make", AUTOMATIC)
def test_automatic_optimization_is_unmoved(make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Can't be copied")
        check(make)


@pytest.mark.parametrize("make", [Gan, PlainBackward, Lbfgs])
def test_manual_optimization_is_unmoved(make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Can't be copied")
        check(make)


def test_gradient_accumulation_is_unmoved():
    check(Accumulates, accumulate_grad_batches=3)


def test_every_backward_is_recorded_once():
    run = fit(PlainBackward, rehearse=True)
    assert len(run.rehearse.rehearsed) == 4 * BATCHES
    assert len(fit(Lbfgs, rehearse=True).rehearse.rehearsed) == BATCHES
    assert len(fit(Gan, rehearse=True).rehearse.rehearsed) == 2 * BATCHES


def test_nothing_is_printed_or_toggled(capsys):
    class Prints(Gan):
        def steps(self, batch):
            self.print("hello")
            with self.toggled_optimizer(self.optimizers()[0]):
                self.seen.append(self.critic.weight.requires_grad)

    seen = Prints.seen = []  # of the class: out of a rehearsal's reach
    fit(Prints, rehearse=True)
    assert capsys.readouterr().out.count("hello") == BATCHES
    assert seen == [True, False] * BATCHES
