"""Run a step of a model and leave no trace of it.

Inside `rehearsal(...)` a step runs forward on the real parameters and the real modules, but on copies of
everything else the modules hold. Four devices, each for what the others can't see:

- *Attributes.* Every module's `__dict__` is swapped for a deep copy and put back afterwards: buffers, caches,
  counters, metrics, hooks. Objects with an identity of their own (modules, parameters, the Trainer, optimizers)
  stay themselves in the copy.
- *Memory.* A dispatch mode sees each write to a tensor that was there before, and saves its storage first:
  weights clipped or averaged in place, tensors reached only through a closure or a global.
- *Methods.* `backward`, `log`, `optimizer.step` and the like are shadowed. Losses are noted, nothing is executed.
- *Global state.* Random number generators are put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_unitscale.engine.record.deep_copies import Copies
from lightning_unitscale.engine.record.leaf_gradients import add_gradients, leaves_of
from lightning_unitscale.engine.record.trainer_clock import clock_kept, move_clock
from lightning_unitscale.engine.record.write_guard import WriteGuard, storages
from lightning_unitscale.namespaces import NAMESPACES, classes
from lightning_unitscale.ops.flex_attention import gradients_on_every_device

if TYPE_CHECKING:
    import pytorch_lightning as pl


@contextmanager
def rehearsal(module: nn.Module, trainer: pl.Trainer | None = None) -> Iterator[Rehearsal]:
    """Undo, on leaving, all that the code run inside does to the module, the trainer and the random numbers.

    Use the module itself inside (not its DDP wrapper), and enter a recorder inside, so that it meets the buffers
    the step will use::

        with rehearsal(module, trainer) as run, recording(module) as recorder:
            output = run.training_step(batch, batch_idx)
            trace = recorder.finish(output, run.losses)

    `backward` is noted in `losses` instead of executed; `.grad` of parameters is `None` inside until then, zero
    afterwards. Tensors of the step's own get their gradient (an adversarial input), and so does everything where the
    backward pass of a hand-written Function calls `backward`. Optimizers evaluate their closure once and step nothing.
    `torch.autograd.grad` runs as ever.

    Out of reach: what the step does to the world (files, `print`, `wandb.log`), and to Python objects that no
    attribute leads to (globals, class attributes, variables of a closure). Tensors there are put back.

    Args:
        module: the model; modules it hides in lists or dicts are covered too.
        trainer: its Trainer, if it has one.

    Raises:
        ValueError: the model has parameters without a shape yet (`nn.LazyLinear` before its first call).
        NotImplementedError: the model is wrapped for FSDP1, whose parts can't run without their root.

    Warns:
        of attributes that can't be copied, by name; what the step does to their insides stays.
    """
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"Parameters without a shape yet: {', '.join(lazy)}. Run one batch through the model first.")
    if any(isinstance(child, FullyShardedDataParallel) for child in module.modules()) or (
        trainer is not None and isinstance(trainer.strategy.model, FullyShardedDataParallel)
    ):
        raise NotImplementedError("FSDP1 can't be rehearsed. Use FSDP2: `Trainer(strategy=ModelParallelStrategy())`.")
    copies = Copies(module, trainer)
    with _random_numbers_kept(()):  # some objects draw when built
        attributes = copies.of_all_attributes()
    if copies.uncopied:
        rank_zero_warn(
            f"Can't be copied, so a rehearsed step may change what is inside: {', '.join(copies.uncopied)}. "
            "Harmless if a training step leaves them alone."
        )
    run = Rehearsal(module, trainer, copies)
    for host, replacement in attributes:
        replacement.update(run._shadows(host))
    guard = WriteGuard()
    guard.save(copies.unseen)
    with ExitStack() as stack:
        stack.callback(run._close)
        stack.enter_context(_random_numbers_kept(copies.generators.values()))
        stack.enter_context(_parameters_kept(copies.trained.values()))
        stack.enter_context(_attributes_swapped(attributes))
        stack.enter_context(clock_kept(trainer))
        stack.enter_context(_sharded_again(module))
        stack.enter_context(_backward_shadowed(run))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(gradients_on_every_device())
        stack.enter_context(guard)
        yield run


class Rehearsal:
    """A rehearsal in progress.

    Attributes:
        losses: what `backward` or `manual_backward` was called on, in order; detached when the rehearsal ends.
        later: how many batches after the given one the step is to think it is at.
    """

    def __init__(self, module: nn.Module, trainer: pl.Trainer | None, copies: Copies) -> None:
        self.losses: list[Tensor] = []
        self.later = 0
        self._module = module
        self._trainer = trainer
        self._copies: Copies | None = copies

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the LightningModule's `training_step` on a copy of `batch`, as the Trainer would.

        Args:
            batch: a batch already on the module's device.
            batch_idx: its index; passed on if the step takes it.

        Returns:
            what the step returned.

        Raises:
            RuntimeError: the rehearsal is over, or has no Trainer or no LightningModule.
            NotImplementedError: the step asks for `dataloader_iter`: reading from it can't be undone.
        """
        if self._copies is None:
            raise RuntimeError("This rehearsal is over; call `training_step` inside its `with` block.")
        if self._trainer is None or not isinstance(self._module, classes("LightningModule")):
            raise RuntimeError("`training_step` needs a LightningModule and `rehearsal(module, trainer)`.")
        step = self._module.training_step
        if _is_parameter(step, "dataloader_iter", explicit=True):
            raise NotImplementedError(
                f"{type(self._module).__name__}.training_step takes `dataloader_iter`; a rehearsal would consume its "
                "batches. Let it take `batch` instead."
            )
        with torch._C.DisableTorchFunction():  # a recorder must meet the copy as an input, not see it made
            arguments = [self._copies.of(batch, "batch")]
        if _is_parameter(step, "batch_idx", min_args=2):
            arguments.append(batch_idx + self.later)
        with torch.enable_grad(), self._trainer.precision_plugin.train_step_context():
            return step(*arguments)

    def move_on(self, epochs: int = 0) -> None:
        """Let the step think that it is the next batch's, one optimizer step and so many epochs later."""
        self.later += 1
        move_clock(self._trainer, 1, epochs)

    def original(self, tensor: Tensor) -> Tensor:
        """The tensor that one met inside is the copy of; itself if it is none."""
        return self._copies.original(tensor) if self._copies is not None else tensor

    def _record(self, loss: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        self._record_all([loss], [gradient], *args, **kwargs)

    def _record_all(
        self,
        tensors: Tensor | Sequence[Tensor],
        grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
        if create_graph and self._copies is not None:  # the step goes on with what it finds in `.grad`
            by = [parameter for parameter in self._copies.trained.values() if parameter.requires_grad]
            found = torch.autograd.grad(losses, by, gradients, create_graph=True, allow_unused=True)
            for parameter, made in zip(by, found, strict=True):
                parameter.grad = made
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass, layers that are run again have factors
            add_gradients(losses, gradients, leaves_of(losses))
            return
        with torch._C.DisableTorchFunction():  # a recorder must not see this
            self.losses += losses
            if self._copies is None:
                return
            trained = self._copies.trained
            add_gradients(losses, gradients, [leaf for leaf in leaves_of(losses) if id(leaf) not in trained])
            for parameter in trained.values():  # code that clips or logs gradients after backward finds some
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _shadows(self, host: Any) -> dict[str, Callable[..., Any]]:
        if isinstance(host, Optimizer):
            return {"step": _evaluate, "zero_grad": _nothing}
        if isinstance(host, classes("LightningModule")):
            silent = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
            return {**dict.fromkeys(silent, _nothing), "manual_backward": self._record}
        if not isinstance(host, (nn.Module, *classes("Callback"), *classes("Trainer"))):  # a learning-rate scheduler
            return {"step": _nothing}
        return {}

    def _close(self) -> None:
        self.losses[:] = [loss.detach() for loss in self.losses]  # lets go of the graph
        self._copies = None


@contextmanager
def _attributes_swapped(attributes: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    originals = [(host, host.__dict__) for host, _ in attributes]
    try:
        for host, replacement in attributes:
            object.__setattr__(host, "__dict__", replacement)
        yield
    finally:
        for host, original in originals:
            object.__setattr__(host, "__dict__", original)


@contextmanager
def _parameters_kept(parameters: Any) -> Iterator[None]:
    """Put back memory, `requires_grad` and `.grad` of parameters; inside, `.grad` starts as None."""
    before = [(tensor, tensor.data, _layout(tensor), tensor.requires_grad, tensor.grad) for tensor in parameters]
    try:
        for tensor, *_ in before:
            tensor.grad = None
        yield
    finally:
        for tensor, data, layout, requires_grad, grad in before:
            tensor.grad = None  # would have to fit what `data` is set to
            if _layout(tensor) != layout:
                tensor.data = data
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad


@contextmanager
def _sharded_again(module: nn.Module) -> Iterator[None]:
    """Let FSDP2 free the weights it gathered: a root keeps them until backward, which never comes."""
    try:
        yield
    finally:
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


@contextmanager
def _backward_shadowed(run: Rehearsal) -> Iterator[None]:
    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    shadows: list[tuple[Any, str, Any]] = [
        (Tensor, "backward", lambda loss, *args, **kwargs: run._record(loss, *args, **kwargs)),
        (torch.autograd, "backward", run._record_all),
        (torch.amp.GradScaler, "step", step),  # would insist on gradients
        (torch.amp.GradScaler, "unscale_", _nothing),
        (torch.amp.GradScaler, "update", _nothing),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in shadows]
    try:
        for owner, name, shadow in shadows:
            setattr(owner, name, shadow)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def _random_numbers_kept(generators: Any) -> Iterator[None]:
    restore: list[Callable[[], Any]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
        *(partial(generator.set_state, generator.get_state()) for generator in generators),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        restore.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        restore.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), [key for key, _ in storages(tensor)]


def _evaluate(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _is_parameter(method: Callable[..., Any], name: str, **rules: Any) -> bool:
    """Whether Lightning would pass it an argument of that name."""
    asked: Callable[..., bool] = NAMESPACES[0].utilities.signature_utils.is_param_in_hook_signature
    return asked(method, name, **rules)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
