"""Deep copies of all that modules and a Trainer hold, in which what has an identity of its own stays itself."""

from __future__ import annotations

import copy
import copyreg
import operator
import types
import weakref
from collections import OrderedDict, defaultdict
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_unitscale.engine.record.write_guard import saved, storages
from lightning_unitscale.namespaces import classes

if TYPE_CHECKING:
    import pytorch_lightning as pl

_IMMUTABLE: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type, slice, property),
        *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    }
)
# What steers training, by its place in Lightning.
_LIGHTNING = (
    *("strategies.Strategy", "accelerators.Accelerator", "plugins.Precision", "profilers.Profiler"),
    *("loops.loop._Loop", "LightningDataModule"),
)
_SHARED = (
    *(kind for path in _LIGHTNING for kind in classes(path)),
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
_READ_ONLY: set[type] = set()
Class = TypeVar("Class")
_HOSTS = (nn.Module, Optimizer, LRScheduler, ReduceLROnPlateau, *classes("Callback"), *classes("Trainer"))


class Copies:
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
        self._parameter_storages = {key for key, _ in storages(list(module.parameters()))}
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

    def original(self, twin: Tensor) -> Tensor:
        """What a tensor is the copy of; a tensor that is no copy itself."""
        return next((kept for kept in self._originals if self._memo.get(id(kept)) is twin), twin)

    def _attributes(self, host: Any) -> dict[str, Any]:
        if isinstance(host, classes("Trainer")):
            return {**host.__dict__, "_loggers": [_silent_logger() for _ in host.loggers]}
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
        if issubclass(cls, classes("loggers.Logger")):
            return _silent_logger()
        if issubclass(cls, torch.Generator):
            self.generators[id(value)] = value
            return value
        if is_shared(value):
            return value
        if cls is list:
            twin = self._remember(value, [])
            twin.extend(map(self._copy, value))
            return twin
        if cls is dict or (cls is OrderedDict and not vars(value)):  # of which each module has ten, most of them empty
            twin = self._remember(value, cls())
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
        if any(key in self._parameter_storages for key, _ in storages(value)):
            return value
        plain = type(value) is Tensor and value.is_leaf and value.layout is torch.strided
        if not plain or value.is_meta or value.is_quantized or value.is_conj() or value.is_neg():
            with torch.enable_grad():
                return value.clone()  # keeps its history
        storage = value.untyped_storage()  # copied whole and once, so that views of one tensor stay views of one
        if storage._cdata not in self._storages:
            self._originals.append(storage)
            self._storages[storage._cdata] = saved(storage)
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


def _silent_logger() -> Any:
    return classes("loggers.logger.DummyLogger")[0]()


def _two_levels(state: Any) -> Any:
    """A copy of an optimizer's state that shares the tensors: as large as the model, and guarded against writes."""
    shallow = {key: dict(item) if isinstance(item, dict) else item for key, item in state.items()}
    return defaultdict(dict, shallow)


def is_shared(value: object) -> bool:
    """Whether it is a part of the world outside the model: of the Trainer's machinery, of the process, a class."""
    cls: Any = type(value)  # to mypy a class is not Hashable
    return _is_shared_class(cls)


def shared_by_copies(cls: type[Class]) -> type[Class]:
    """Marks a class of our own whose objects a step only reads, and of which a model has many."""
    _READ_ONLY.add(cls)
    return cls


@cache
def _is_shared_class(cls: type) -> bool:
    return cls in _READ_ONLY or issubclass(cls, (type, Enum, *_SHARED)) or _is_of(cls.__module__, _SHARED_PACKAGES)


def _is_of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
