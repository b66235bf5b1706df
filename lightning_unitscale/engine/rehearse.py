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

import copy
import copyreg
import operator
import random
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.loops.loop import _Loop
from pytorch_lightning.plugins import Precision
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from pytorch_lightning.utilities.types import LRSchedulerTypeTuple
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

_IMMUTABLE: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type, slice, property),
        *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    }
)
_SHARED = (
    *(Strategy, Accelerator, Precision, Profiler, _Loop, pl.LightningDataModule),
    *(DataLoader, Dataset, Sampler),
    *(np.memmap, *weakref.ProxyTypes),
)
# Handles of the world outside the process, of other threads and of the compiler: a copy would be a second owner.
_SHARED_PACKAGES = (
    *("torch._C", "torch._dynamo", "torch._inductor", "torch.fx", "torch.jit", "torch.cuda", "torch.profiler"),
    *("torch.distributed", "torch.multiprocessing", "torch.utils.data", "torch.utils.tensorboard"),
    *("threading", "_thread", "concurrent", "multiprocessing", "asyncio", "logging", "inspect", "typing"),
    *("tensorboard", "tensorboardX", "wandb", "mlflow", "neptune", "comet_ml", "aim"),
)
_HOSTS = (nn.Module, Optimizer, *LRSchedulerTypeTuple, pl.Callback, pl.Trainer)


@contextmanager
def rehearsal(module: nn.Module, trainer: pl.Trainer | None = None) -> Iterator[Rehearsal]:
    """Undo, on leaving, all that the code run inside does to the module, the trainer and the random numbers.

    Use the module itself inside (not its DDP wrapper), and enter a recorder inside, so that it meets the buffers
    the step will use::

        with rehearsal(module, trainer) as run, recording(module) as recorder:
            output = run.training_step(batch, batch_idx)
            trace = recorder.finish(output, run.losses)

    `backward` is noted in `losses` instead of executed; `.grad` is `None` inside until then, zero afterwards.
    Optimizers evaluate their closure once and step nothing. `torch.autograd.grad` runs as ever.

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
    copies = _Copies(module, trainer)
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
    guard = _WriteGuard()
    guard.save(copies.unseen)
    with ExitStack() as stack:
        stack.callback(run._close)
        stack.enter_context(_random_numbers_kept(copies.generators.values()))
        stack.enter_context(_parameters_kept(copies.trained.values()))
        stack.enter_context(_attributes_swapped(attributes))
        stack.enter_context(_sharded_again(module))
        stack.enter_context(_backward_shadowed(run))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(guard)
        yield run


class Rehearsal:
    """A rehearsal in progress.

    Attributes:
        losses: what `backward` or `manual_backward` was called on, in order; detached when the rehearsal ends.
    """

    def __init__(self, module: nn.Module, trainer: pl.Trainer | None, copies: _Copies) -> None:
        self.losses: list[Tensor] = []
        self._module = module
        self._trainer = trainer
        self._copies: _Copies | None = copies

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
        if self._trainer is None or not isinstance(self._module, pl.LightningModule):
            raise RuntimeError("`training_step` needs a LightningModule and `rehearsal(module, trainer)`.")
        step = self._module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise NotImplementedError(
                f"{type(self._module).__name__}.training_step takes `dataloader_iter`; a rehearsal would consume its "
                "batches. Let it take `batch` instead."
            )
        with torch._C.DisableTorchFunction():  # a recorder must meet the copy as an input, not see it made
            arguments = [self._copies.of(batch, "batch")]
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            arguments.append(batch_idx)
        with torch.enable_grad(), self._trainer.precision_plugin.train_step_context():
            return step(*arguments)

    def _record(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.losses.append(loss)
        if self._copies is None:
            return
        # Code that clips or logs gradients after backward finds some. The caller's recorder must not see this.
        with torch._C.DisableTorchFunction():
            for parameter in self._copies.trained.values():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _record_all(self, tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        for loss in [tensors] if isinstance(tensors, Tensor) else tensors:
            self._record(loss)

    def _shadows(self, host: Any) -> dict[str, Callable[..., Any]]:
        if isinstance(host, Optimizer):
            return {"step": _evaluate, "zero_grad": _nothing}
        if isinstance(host, pl.LightningModule):
            silent = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
            return {**dict.fromkeys(silent, _nothing), "manual_backward": self._record}
        if not isinstance(host, (nn.Module, pl.Callback, pl.Trainer)):  # a learning-rate scheduler
            return {"step": _nothing}
        return {}

    def _close(self) -> None:
        self.losses[:] = [loss.detach() for loss in self.losses]  # lets go of the graph
        self._copies = None


class _Copies:
    """Deep copies in which what has an identity of its own stays itself.

    Like `copy.deepcopy` with one memo for all modules, so that what two of them share they share in the copy. Unlike
    it, decides by type what stays shared, copies tensors that have a history, and where one thing can't be copied
    shares that thing only.

    Attributes:
        trained: tensors that stay themselves and whose `.grad` must be kept, by id.
        generators: random number generators met, by id.
        unseen: tensors no copy can be made of, and whose writes a dispatch mode may miss.
        uncopied: names of what couldn't be copied.
    """

    def __init__(self, module: nn.Module, trainer: pl.Trainer | None) -> None:
        self.trained: dict[int, Tensor] = {}
        self.generators: dict[int, torch.Generator] = {}
        self.unseen: list[Tensor] = []
        self.uncopied: dict[str, None] = {}
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that their ids stay theirs
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hosts: list[Any] = []
        self._names = {id(child): name or type(module).__name__ for name, child in module.named_modules()}
        self._place = ""
        # All at once and first: an object's own __deepcopy__ asks the memo only.
        for parameter in module.parameters():
            self._share(parameter)
            self.trained[id(parameter)] = parameter
        self._parameter_storages = {key for key, _ in _storages(list(module.parameters()))}
        for child in module.modules():
            self._add_host(child)
        if trainer is not None:
            self._add_host(trainer)
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            for steering in (*trainer.optimizers, *trainer.strategy._lightning_optimizers, *schedulers):
                self._add_host(steering)

    def of_all_attributes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Each object that stays itself, with a copy of its attributes."""
        attributes = []
        for host in self._hosts:  # grows while it is walked: attributes lead to more hosts
            attributes.append((host, self._attributes(host)))
        return attributes

    def of(self, value: Any, place: str) -> Any:
        """A copy of `value`; `place` names it where it can't be copied."""
        self._place = place
        return self._copy(value)

    def _attributes(self, host: Any) -> dict[str, Any]:
        if isinstance(host, pl.Trainer):
            return {**host.__dict__, "_loggers": [DummyLogger() for _ in host.loggers]}
        name = self._names.get(id(host), type(host).__name__)
        if isinstance(host, Optimizer):
            attributes = dict(host.__dict__)
            if "param_groups" in attributes:  # absent in LightningOptimizer
                attributes["param_groups"] = self.of(host.param_groups, f"{name}.param_groups")
                attributes["state"] = _two_levels(host.state)
            return attributes
        return {key: self.of(value, f"{name}.{key}") for key, value in host.__dict__.items()}

    def _add_host(self, host: Any) -> None:
        if id(host) in self._memo:
            return
        self._share(host)
        if isinstance(host, torch.jit.ScriptModule):
            self.unseen.extend(host.buffers())  # kept in C++, out of reach of a copy of its attributes
        else:
            self._hosts.append(host)

    def _share(self, value: Any) -> Any:
        return self._remember(value, value)

    def _remember(self, value: Any, twin: Any) -> Any:
        self._memo[id(value)] = twin
        self._originals.append(value)
        return twin

    def _copy(self, value: Any) -> Any:
        if type(value) in _IMMUTABLE:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        try:
            return self._remember(value, self._twin(value))
        except Exception:  # whatever a foreign class's own copying raises
            self.uncopied[self._place] = None
            return self._share(value)

    def _twin(self, value: Any) -> Any:
        cls = type(value)
        if issubclass(cls, Tensor):
            return self._tensor(value)
        if issubclass(cls, _HOSTS):
            self._add_host(value)
            return value
        if issubclass(cls, Logger):
            return DummyLogger()
        if issubclass(cls, torch.Generator):
            self.generators[id(value)] = value
            return value
        if issubclass(cls, (type, Enum, *_SHARED)) or _is_of(cls.__module__, _SHARED_PACKAGES):
            return value
        if cls is list:
            twin = self._remember(value, [])
            twin.extend(map(self._copy, value))
            return twin
        if cls is dict:
            twin = self._remember(value, {})
            twin.update((self._copy(key), self._copy(item)) for key, item in value.items())
            return twin
        if cls is tuple:
            items = tuple(map(self._copy, value))
            return value if all(map(operator.is_, items, value)) else items
        if cls is types.MethodType:
            return types.MethodType(value.__func__, self._copy(value.__self__))
        if cls is weakref.ref:
            target = value()
            twin = self._copy(target)
            return value if twin is target else weakref.ref(twin)
        if issubclass(cls, np.ndarray) and not value.flags.writeable:
            return value
        if hasattr(cls, "__del__"):
            raise TypeError(f"{cls.__name__} owns something that it releases when deleted")
        if hasattr(cls, "__deepcopy__"):
            return copy.deepcopy(value, self._memo)
        return self._rebuilt(value)

    def _tensor(self, value: Tensor) -> Tensor:
        if value.is_leaf and (value.requires_grad or isinstance(value, nn.Parameter)):
            self.trained[id(value)] = value
            return value
        if any(key in self._parameter_storages for key, _ in _storages(value)):
            return value
        plain = type(value) is Tensor and value.is_leaf and value.layout is torch.strided
        if not plain or value.is_meta or value.is_quantized or value.is_conj() or value.is_neg():
            with torch.enable_grad():
                return value.clone()  # keeps its history
        storage = value.untyped_storage()  # copied whole and once, so that views of one tensor stay views of one
        if storage._cdata not in self._storages:
            self._originals.append(storage)
            self._storages[storage._cdata] = _saved(storage)
        twin = torch.empty(0, dtype=value.dtype, device=value.device)
        twin.set_(self._storages[storage._cdata], value.storage_offset(), value.size(), value.stride())
        self._remember(value, twin).__dict__.update(self._copy(value.__dict__))
        return twin

    def _rebuilt(self, value: Any) -> Any:
        """A copy made from what the object says of itself to `pickle` (`object.__reduce_ex__`)."""
        reducer = copyreg.dispatch_table.get(type(value))
        reduced: Any = reducer(value) if reducer else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return value
        make, arguments, state, items, pairs, set_state = (*reduced, None, None, None, None)[:6]
        twin = self._remember(value, make(*map(self._copy, arguments)))
        if state is not None:
            state = self._copy(state)
            if set_state is not None:
                set_state(twin, state)
            elif hasattr(twin, "__setstate__"):
                twin.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) else (state, None)
                if attributes:
                    twin.__dict__.update(attributes)
                for key, item in (slots or {}).items():
                    setattr(twin, key, item)
        for item in items or ():
            twin.append(self._copy(item))
        for key, item in pairs or ():
            twin[self._copy(key)] = self._copy(item)
        return twin


class _WriteGuard(TorchDispatchMode):
    """Saves the memory of each tensor that was there before, at the first write to it, and puts it back on leaving."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def save(self, tensors: Any) -> None:
        """Save the memory of these tensors, unless it was allocated inside or is saved already."""
        for key, storage in _storages(tensors):
            if key not in self._own and key not in self._before and storage.device.type != "meta":
                self._before[key] = (storage, _saved(storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operator may write to anything it is given
            self.save((args, kwargs))
        elif schema.is_mutable:
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.save(args[position] if position < len(args) else kwargs.get(argument.name))
        result = func(*args, **kwargs)
        if schema is not None and not schema.is_mutable:
            given = {key for key, _ in _storages((args, kwargs))}
            self._own.update(key for key, _ in _storages(result) if key not in given)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for storage, saved in self._before.values():
            if storage.nbytes() != saved.nbytes():
                storage.resize_(saved.nbytes())
            storage.copy_(saved)
        self._before.clear()


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
        (Tensor, "backward", lambda loss, *args, **kwargs: run._record(loss)),
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


def _storages(tree: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """The memory behind each tensor in `tree`, with the address that identifies it."""
    if isinstance(tree, Tensor):
        wrapper: Any = tree
        if is_traceable_wrapper_subclass(wrapper):
            names, _ = wrapper.__tensor_flatten__()
            yield from _storages([getattr(wrapper, name) for name in names])
        elif tree.layout is torch.strided:
            storage = tree.untyped_storage()
            yield storage._cdata, storage
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _storages(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _storages(item)


def _saved(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    memory: torch.UntypedStorage = torch.UntypedStorage(storage.nbytes(), device=storage.device)
    memory.copy_(storage)
    return memory


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), [key for key, _ in _storages(tensor)]


def _two_levels(state: Any) -> Any:
    """A copy of an optimizer's state that shares the tensors: as large as the model, and guarded against writes."""
    shallow = {key: dict(item) if isinstance(item, dict) else item for key, item in state.items()}
    return defaultdict(dict, shallow)


def _is_of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _evaluate(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
