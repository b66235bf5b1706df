"""Is every module with an explicit factor still the one that the factor was put on?

A factor stands on a module object. What is put in that module's place after the model was prepared (a resized or a new
head, a quantized layer) runs without it, and nothing of ours runs in it that could say so. So the prepared root looks
after its parts, before each forward pass and each saving; where a plan is about to be used, it is asked as well. Four
things that are done to prepared models leave every factor where it belongs, and are let be:

    a module is wrapped (checkpointing, torch.compile, an adapter around it)    the wrapper still runs it
    a module is taken out, as by a shorter list of layers                       nothing runs in its place
    prepared modules change places                                              each brings its factor along
    parts are added                                                             they never had one
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_unitscale.engine.runtime.scoped_forward import ScopedForward
from lightning_unitscale.errors import UnitScalingError

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # a list with fewer entries has lost nothing but these


class Placement:
    """The modules of one root that factors or their weights are on, by name; a forward pre-hook of the root.

    Copied and pickled with its root, it looks after the copy. It holds no reference to the root itself.
    """

    def __init__(self, root: nn.Module) -> None:
        names = dict(root.named_modules(remove_duplicate=False))
        owners = {owner for module in names.values() for scope in _scopes(module) for owner, *_ in scope.touched}
        self._placed = [name for name, module in names.items() if name and (_scopes(module) or module in owners)]
        around = {name[:end] for name in self._placed for end in _ends(name)}
        self._modules = {name: names[name] for name in sorted(around)}
        self._remember_links(root)

    def _remember_links(self, root: nn.Module) -> None:
        """What one look at each name has to find, so that the check before every forward pass costs next to nothing."""
        self._links: list[tuple[nn.Module | None, str, nn.Module | None]] = []
        for name in self._modules:
            parent, _, attribute = name.rpartition(".")
            owner = _found(root, parent)[0]
            self._links.append((None if owner is root else owner, attribute, owner._modules.get(attribute)))

    def __call__(self, root: nn.Module, args: Any) -> None:
        """Before the root's forward pass."""
        if not torch.compiler.is_compiling():
            self.check(root)

    def check(self, root: nn.Module) -> None:
        """
        Raises:
            UnitScalingError: a module with a factor was replaced.
        """
        for owner, attribute, module in self._links:
            if (root if owner is None else owner)._modules.get(attribute) is not module:
                break
        else:
            return
        replaced = [name for name in self._placed if self._is_replaced(root, name)]
        if replaced:
            raise UnitScalingError(
                f"{', '.join(replaced[:3])}{' …' if len(replaced) > 3 else ''} of {type(root).__name__} "
                f"{'is' if len(replaced) == 1 else 'are'} not what unit scaling has put a factor on: replaced after "
                "the model was prepared, and so without the factor. Replace modules (resize_token_embeddings, a new "
                "head, quantization, adapters) before the model is prepared, or between remove_unit_scaling(model) "
                "and preparing it anew."
            )
        self._remember_links(root)

    def _is_replaced(self, root: nn.Module, name: str) -> bool:
        found, where = _found(root, name)
        if found is (self._modules[where] if where else root):
            return False  # itself, or it was taken out of where it was
        if (where == name and _scopes(found)) or (where != name and isinstance(found, _LISTS)):
            return False
        return all(module is not self._modules[name] for module in found.modules())


def look_after(root: nn.Module) -> None:
    """Have the root check its parts before each forward pass and each saving, if factors stand on any."""
    if any(_scopes(module) for module in root.modules()):
        root.register_forward_pre_hook(Placement(root), prepend=True)
        root.register_state_dict_pre_hook(check_placement)


def look_away(root: nn.Module) -> None:
    """Undo `look_after`, on the root or on a copy of it."""
    for key, hook in list(root._forward_pre_hooks.items()):
        if isinstance(hook, Placement):
            del root._forward_pre_hooks[key]
    for key, hook in list(root._state_dict_pre_hooks.items()):
        if hook is check_placement:
            del root._state_dict_pre_hooks[key]


def check_placement(root: nn.Module, *_: Any) -> None:
    """
    Args:
        root: any module; one without factors passes.

    Raises:
        UnitScalingError: a module of the prepared root that a factor was put on has been replaced.
    """
    for hook in root._forward_pre_hooks.values():
        if isinstance(hook, Placement):
            hook.check(root)


def _scopes(module: nn.Module) -> list[ScopedForward]:
    return [scope for value in module.__dict__.values() if (scope := ScopedForward.behind(value))]


def _ends(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."] + [len(name)]


def _found(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of that name, or the nearest around it that is there, and its name."""
    module, path = root, list[str]()
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            break
        module = child
        path.append(part)
    return module, ".".join(path)
