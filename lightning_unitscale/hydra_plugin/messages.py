"""What is wrong with the settings of a Hydra application, in one message that says what may have been meant.

    @in_one_message
    @hydra.main(version_base="1.3", config_path="conf", config_name="train")
    def main(cfg: DictConfig) -> None: ...

In place of `Could not override 'trainer.max_step'. To append to your config use …`, and of a traceback:

    error: there is no setting trainer.max_step here. Did you mean trainer.max_steps? (A new one is added with …)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_unitscale.errors import InputError, UnitScalingError, first_line
from lightning_unitscale.near_names import did_you_mean

Result = TypeVar("Result")

FULL_ERROR = "HYDRA_FULL_ERROR"  # of the environment: Hydra then passes errors on instead of printing them
KINDS: dict[type, str] = {  # of what a setting holds: what can stand there
    ListConfig: "a list, such as {key}=[{value}]",
    DictConfig: "names with values, such as {key}={{name:value}}",
    BooleanNode: "true or false",
    IntegerNode: "a whole number",
    FloatNode: "a number",
}


def in_one_message(entry: Callable[[], Result]) -> Callable[[], Result]:
    """The function that `hydra.main` made, which ends with `error: …` where a setting is wrong.

    Raises:
        SystemExit: with the message. An error of the program itself comes as it is, and with HYDRA_FULL_ERROR=1 all do.
    """

    @functools.wraps(entry)
    def run() -> Result:
        with errors_passed_on() as traceback_wanted:
            try:
                return entry()
            except Exception as error:
                message = in_words(error)
                if traceback_wanted or message is None:
                    raise
                sys.exit(f"error: {message}")

    return run


def traceback_wanted() -> bool:
    """Whether the environment asks for whole errors."""
    return os.environ.get(FULL_ERROR, "0") != "0"


@contextmanager
def errors_passed_on() -> Iterator[bool]:
    """Meanwhile Hydra passes errors on; gives whether the user wants to see them whole."""
    wanted = traceback_wanted()
    os.environ[FULL_ERROR] = "1"
    try:
        yield wanted
    finally:
        if not wanted:
            del os.environ[FULL_ERROR]


def in_words(error: BaseException, offered: Callable[[str, str], bool] = lambda group, option: True) -> str | None:
    """One message for an error in what the user asked for; None for a defect of the program.

    Args:
        offered: whether an option of a group is to be named among those that can be chosen.
    """
    causes = list(chain(error))
    for cause in causes:
        if isinstance(cause, (InputError, UnitScalingError)):
            return str(cause)
    if isinstance(error, InstantiationException):
        return _not_made(error)
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        return _unknown_option(error, offered)
    message = "\n".join(dict.fromkeys(str(cause).strip() for cause in causes))
    if missing := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{missing[1]} has no value; give one: {missing[1]}=..."
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, OmegaConfBaseException):
        return _not_overridden(str(error), error.__cause__)
    return message


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_option(error: MissingConfigException, offered: Callable[[str, str], bool]) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = [option for option in error.options or () if offered(group, option)]
    plugin = " Of a plugin of Hydra? Then it is not installed." if group.startswith("hydra/") else ""
    return f"{group}={name} is not known; choose one of {', '.join(options)}.{did_you_mean(name, options)}{plugin}"


def _not_overridden(message: str, cause: OmegaConfBaseException) -> str:
    if key := re.search(r"Could not override '(\S+)'", message):
        root = cause.parent_node._get_root() if cause.parent_node is not None else None
        near = near_keys(root, key[1].split("."))
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"there is no setting {key[1]} here.{hint} (A new one is added with +{key[1]}=...)"
    override = message.removeprefix("Error merging override ")
    key_of, _, value = override.partition("=")
    kind = KINDS.get(type(cause.child_node))
    if kind is None:
        return f"{override}: {first_line(cause)}"
    return f"{override} must be {kind.format(key=key_of, value=value)}"


def near_keys(node: Any, parts: list[str]) -> list[str]:
    """Settings whose names are near to this one, part by part: `optimizer.lr` for `optimiser.lr`.

    Where nothing below a near group is near, the group alone.
    """
    if not isinstance(node, DictConfig):
        return []
    (first, *rest), names = parts, [str(name) for name in node]
    near = [first] if first in names else get_close_matches(first, names, n=3)
    if not rest:
        return near
    whole = [f"{name}.{below}" for name in near for below in near_keys(node._get_node(name), rest)]
    return whole or [name for name in near if name != first]


def _not_made(error: InstantiationException) -> str:
    """Of a `_target_`: it can't be found, or refuses its arguments."""
    text = str(error)
    if gone := re.search(r"Error locating target '(\S+)'.*full_key: ((\w+)\S*)", text, re.DOTALL):
        return _gone_target(*gone.groups())
    node = re.search(r"full_key: (\S+)", text)
    refused = error.__cause__
    if node is None or refused is None or isinstance(refused, HydraException):
        return text
    return f"{node[1]}: {refused}" if isinstance(refused, TypeError) else f"{node[1]}: {refused!r}"


def _gone_target(target: str, key: str, group: str) -> str:
    package = target.partition(".")[0]
    try:
        known = importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules, but without a spec
        known = False
    if not known:
        return (
            f"{key} needs the package {package}, which is not installed: pip install {package}; or choose {group}=..."
        )
    return (
        f"{key}._target_={target} can't be imported. If it comes from a run of an earlier version, choose what it was "
        f"then anew: {group}=..."
    )
