"""A run that rehearsed every batch must equal, bit for bit, a twin that never did."""

import functools
import gc
import random
import threading
import warnings
import weakref
from collections import deque
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import ModelParallelStrategy
from support.fresh_python import run_python
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint
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


def test_mixed_precision_is_the_trainers():
    class Seen(Base):
        def loss(self, batch):
            assert self.net(batch).dtype == torch.bfloat16
            return super().loss(batch)

    check(Seen, precision="bf16-mixed")


def test_evaluation_mode_of_parts_is_kept():
    class Frozen(Base):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))

        def on_train_start(self):
            self.backbone.eval()

        def loss(self, batch):
            assert self.training
            assert not self.backbone[0].training
            return super().loss(self.backbone(batch))

    check(Frozen)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_model_with_dropout(family):
    import transformers

    class Language(Base):
        def __init__(self):
            super().__init__()
            if family == "gpt2":
                config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
                self.net = transformers.GPT2LMHeadModel(config)
            else:
                sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
                config = transformers.LlamaConfig(**sizes, vocab_size=32, attention_dropout=0.5)
                self.net = transformers.LlamaForCausalLM(config)
            self.net.train()
            self.net.gradient_checkpointing_enable()
            self.cache = None

        def loss(self, batch):
            tokens = (batch.abs() * 10).long() % 32
            self.cache = self.net(tokens, use_cache=False).logits
            return self.net(tokens, labels=tokens).loss

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Can't be copied")
        check(Language)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_module_is_neither_run_compiled_nor_compiled_again(whole):
    graphs: list[Any] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), self.norm)
            self.kept = {"scale": 2.0}
            if not whole:
                self.net = torch.compile(self.net, backend=backend)

        def forward(self, x):
            return self.net(x) * self.kept["scale"]

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    def make():
        torch._dynamo.reset()
        graphs.clear()
        return torch.compile(Compiled(), backend=backend) if whole else Compiled()

    plain = fit(make, rehearse=False)
    compiled = len(graphs)
    assert compiled
    rehearsed = fit(make, rehearse=True)
    assert len(graphs) == compiled
    assert len(rehearsed.rehearse.rehearsed) == BATCHES
    same(plain.facts, rehearsed.facts)


class AcrossProcesses(RandomNumbers):
    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def loss(self, batch):
        loss = super().loss(batch)
        self.mean(loss)
        self.log("mean", self.mean, on_epoch=True)
        self.log("loss", loss, sync_dist=True)
        return loss + self.all_gather(loss.detach()).mean() * loss

    def on_train_end(self):
        if self.trainer.world_size > 1:
            assert torch.stack(list(self.all_gather(self.net.weight.detach()))).diff(dim=0).abs().sum() == 0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes():
    # In a fresh interpreter: the fork of one in which other tests have left threads may wait for them for ever.
    run_python("-c", "from engine.record import test_rehearsal; test_rehearsal.two_processes()")


def two_processes() -> None:
    torch.set_num_threads(1)
    options = {"strategy": "ddp_fork", "devices": 2}
    plain, rehearsed = (fit(AcrossProcesses, rehearse, **options) for rehearse in (False, True))
    same(plain.module.state_dict(), rehearsed.module.state_dict())
    same(plain.trainer.callback_metrics, rehearsed.trainer.callback_metrics)
    alone = fit(AcrossProcesses, rehearse=False)
    assert not torch.equal(alone.module.net.weight, plain.module.net.weight)


class Sharded(Base):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        with torch.no_grad():
            self.net.weight.mul_(0.9)
        return super().loss(batch)


def test_sharded_parameters():
    def run(rehearse):
        try:
            strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
            facts = fit(Sharded, rehearse, strategy=strategy).facts
            return [value.full_tensor() for value in facts["parameters"].values()]
        finally:
            torch.distributed.destroy_process_group()

    same(run(rehearse=False), run(rehearse=True))


def test_fsdp1_is_refused():
    module = nn.Sequential(nn.Linear(1, 1))
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    module.append(wrapped)
    with pytest.raises(NotImplementedError, match="FSDP2"), rehearsal(module):
        pass


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.norm, self.cache, self.count = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), [], 0

    def forward(self, x):
        self.count += 1
        self.net.weight.data.mul_(0.5)
        self.cache.append(F.dropout(self.norm(self.net(x))))
        return self.cache[-1].square().mean()


def plain_facts(module):
    gradients = [parameter.grad for parameter in module.parameters()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return [state, gradients, module.count, list(module.cache), torch.get_rng_state()]


@pytest.mark.parametrize("error", [False, True])
def test_plain_module_and_exceptions(error):
    module, batch = Plain(), torch.randn(3, WIDTH)
    module.net.weight.grad = gradient = torch.ones(WIDTH, WIDTH)
    before, attributes = plain_facts(module), module.__dict__
    with pytest.raises(KeyError) if error else warnings.catch_warnings(), rehearsal(module) as run:
        module(batch).backward()
        assert module.count == 1
        assert module.net.weight.grad is not gradient
        if error:
            raise KeyError
    same(before, plain_facts(module))
    assert module.net.weight.grad is gradient
    assert module.__dict__ is attributes
    assert len(run.losses) == 1
    module(batch).backward()
    assert gradient.ne(1).any(), "the real backward adds to the same gradient"


def test_the_graph_is_let_go():
    module = Plain()
    with rehearsal(module) as run:
        loss = module(torch.randn(3, WIDTH))
        loss.backward()
        activation = weakref.ref(module.cache[0])
        del loss
        assert activation() is not None
    gc.collect()
    assert activation() is None
    assert run.losses[0].grad_fn is None


def test_recorded_gradients_stay_out_of_the_callers_recording():
    class Seen(torch.overrides.TorchFunctionMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    module = nn.Linear(WIDTH, 1)
    with rehearsal(module), Seen() as seen:
        module(torch.ones(1, WIDTH)).sum().backward()
        assert seen.names[-2:] == ["linear", "sum"]
        assert module.weight.grad.eq(0).all()


def test_hidden_modules_and_callbacks_stay_themselves():
    module = nn.Module()
    module.watcher = watcher = CountSteps()
    module.inner = nn.Linear(WIDTH, WIDTH)
    module.hidden = {"a": [module.inner, nn.Dropout()]}
    module.hidden["a"][1].count = 0
    dropout = module.hidden["a"][1]
    with rehearsal(module):
        assert module.hidden["a"][0] is module.inner
        assert module.hidden["a"][1] is dropout
        assert module.watcher is watcher
        dropout.count += 1
        watcher.steps += 1
        module.hidden.clear()
    assert dropout.count == 0
    assert watcher.steps == 0
    assert module.hidden["a"][0] is module.inner


def test_what_cannot_be_copied_is_named_and_shared():
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].stream = {"rest": [1], "endless": (number for number in range(9))}
    with pytest.warns(UserWarning, match=r"0\.stream"), rehearsal(module):
        assert next(module[0].stream["endless"]) == 0
        module[0].stream["rest"].append(2)
    assert module[0].stream["rest"] == [1], "only the part that can't be copied is shared"


def test_a_step_on_the_loader_is_refused():
    class Iterates(Base):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(NotImplementedError, match="dataloader_iter"):
        fit(Iterates, rehearse=True)


def test_misuse_is_named():
    module = nn.Linear(1, 1)
    with rehearsal(module) as run, pytest.raises(RuntimeError, match="LightningModule"):
        run.training_step(None, 0)
    with pytest.raises(RuntimeError, match="over"):
        run.training_step(None, 0)
    with pytest.raises(ValueError, match="weight"), rehearsal(nn.LazyLinear(1)):
        pass
