"""The command `unitscale`: runs a recipe, and says in one message what is wrong with what was asked for.

A command is a file `recipes/<command>.py` whose main function is decorated with `recipe`; its docstring's
first line is the help text. `unitscale pretrain …` and `python recipes/pretrain.py …` are the same.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightning_unitscale.cookbook.arguments import MULTIRUN, for_hydra, single_runs, wrong_path
from lightning_unitscale.cookbook.config import register, shipped
from lightning_unitscale.cookbook.help import commands, completion, composed, help_of, is_for
from lightning_unitscale.cookbook.logs import without_torchao
from lightning_unitscale.cookbook.wrong_values import check_values
from lightning_unitscale.errors import InputError, UnitScalingError
from lightning_unitscale.hydra_plugin.messages import chain, errors_passed_on, in_words, traceback_wanted
from lightning_unitscale.near_names import did_you_mean

Task = Callable[[DictConfig], Any]

USAGE = """\
usage: unitscale <command> [key=value ...]

commands:
{commands}

Every setting can be overridden by its name (Hydra):
  unitscale pretrain optimizer.lr=1e-3 model.width=128      change values
  unitscale pretrain unitscale=none data=text data.path=.   choose other parts
  unitscale pretrain experiment=transfer                    use a preset
  unitscale pretrain -m model.width=64,128                  run every combination
  unitscale pretrain ckpt_path=outputs/pretrain/…           go on with a run, its settings kept
  unitscale pretrain --help                                 list parts and settings
  unitscale pretrain --cfg job                              print the settings of this run
The Tab key completes all of it: eval "$(unitscale completion bash)"; also zsh, fish.
Errors are shown as one message; HYDRA_FULL_ERROR=1 adds the traceback.
Exit status: 1 an error, 3 training diverged, 130 Ctrl-C."""
WITH_TORCHAO = ("fp8_benchmark", "passes")  # which measure it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point of the console script."""
    known = commands()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        width = max(map(len, known))
        _print(USAGE.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in known.items())))
        return
    if command == "completion":
        _print(completion(sys.argv[2:]))
        return
    if command not in known:
        sys.exit(
            f"error: unknown command {command!r}; there are {', '.join(known)}."
            f"{did_you_mean(command, known)} See unitscale --help."
        )
    if {"-h", "--help"} & set(sys.argv[2:]):
        _print(help_of(command))
        return
    if wrong := wrong_path(sys.argv[2:]) or _wrong_setting(command, sys.argv[2:]):  # before the seconds of imports
        sys.exit(f"error: {wrong}")
    if command not in WITH_TORCHAO:
        without_torchao()
    script = shipped("recipes") / f"{command}.py"
    sys.argv = [str(script), *sys.argv[2:]]  # what relaunched processes (DDP) run
    sys.path.insert(0, str(script.parent))  # as `python recipes/<command>.py` does
    try:
        runpy.run_path(str(script), run_name="__main__")
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. The recipes' own packages: pip install 'lightning-unitscale[recipes]'")


def _print(text: str) -> None:
    """Also for a reader like `head`, who closes the pipe before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Of what is printed from now on, and of what Python flushes as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_unread() -> NoReturn:
    """As a program ends that SIGPIPE ended."""
    _drop_output()
    sys.exit(128 + 13)


def recipe(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Turns `main(cfg)` into a command configured by `conf/<config_name>.yaml`."""

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def entry() -> None:
            register()
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning 2.6 on torch 2.13
            warnings.filterwarnings("ignore", message="The dirpath has changed")  # each run has a folder of its own
            sys.argv[1:] = for_hydra(config_name, sys.argv[1:])
            with errors_passed_on() as whole:
                job = _Job(task, config_name, traceback_wanted=whole)

                @functools.wraps(task)  # by whose module Hydra names the job
                def run(cfg: DictConfig) -> Any:
                    return job.run(cfg)

                try:
                    hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=config_name)(run)()
                    job.say_failed()
                except Exception as error:
                    job.give_up(error)

        return entry

    return decorate


class _Job:
    """A recipe's main function as Hydra calls it; ends with one message where what was asked for is wrong."""

    def __init__(self, task: Task, config_name: str, traceback_wanted: bool) -> None:
        self.task, self.config_name, self.traceback_wanted = task, config_name, traceback_wanted
        self.begun = False
        self.failed: list[str] = []  # runs of a multirun, by number

    def run(self, cfg: DictConfig) -> Any:
        """The recipe; what it is run with and how it failed goes into the run's log file too."""
        self.begun = True
        log = logging.getLogger("lightning_unitscale")
        try:
            if missing := sorted(OmegaConf.missing_keys(cfg)):  # raises where another key refers to a missing one
                raise MissingMandatoryValue(f"Missing mandatory value: {missing[0]}")
            log.debug("unitscale %s", shlex.join([self.config_name, *HydraConfig.get().overrides.task]))
            result = self.task(cfg)
            log.debug("finished: %s", result)
            return result
        except BrokenPipeError:
            _end_unread()
        except Exception as error:
            log.debug("failed", exc_info=True)
            if (message := _explain(error, self.config_name)) and not self.traceback_wanted and _others_go_on():
                return self._pass_over(message)
            self.give_up(error)  # here: Hydra would print its own message first

    def _pass_over(self, message: str) -> float:
        """Says at once what is wrong with one run of several; its score is no number."""
        hydra_config = HydraConfig.get()
        number = str(hydra_config.job.num)
        print(f"error: run {number} ({' '.join(hydra_config.overrides.task)}): {message}", file=sys.stderr, flush=True)
        self.failed.append(number)
        return math.nan

    def say_failed(self) -> None:
        """
        Raises:
            SystemExit: runs of a multirun failed; they are named again, as what was said of each may be far above.
        """
        if self.failed:
            sys.exit(f"error: of these runs {', '.join(self.failed)} failed; what was wrong is said above")

    def give_up(self, error: Exception) -> NoReturn:
        """
        Raises:
            SystemExit: with the message for an error in what the user asked for.
        """
        message = _explain(error, self.config_name)
        if message is None and isinstance(error, OSError) and not self.begun:
            message = (
                f"the folder of the run, {error.filename}, can't be made ({error.strerror}); give another: "
                "hydra.run.dir=…, or hydra.sweep.dir=… with -m"
            )
        if self.traceback_wanted or message is None:
            raise error
        sys.exit(f"error: {message}")


def _others_go_on() -> bool:
    """Whether this is a run of a multirun, in the process that makes one after the other."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return str(HydraConfig.get().launcher._target_).endswith(".BasicLauncher")


def _wrong_setting(command: str, arguments: Sequence[str]) -> str | None:
    """What to say of settings that the command has not, and of values that they can't have.

    Of a multirun, each of the values is looked at once. Beside other flags (another file) Hydra says what is wrong.
    """
    settings = [argument for argument in arguments if argument not in MULTIRUN]
    has_flags = any(argument.startswith("-") for argument in settings)
    if has_flags or traceback_wanted() or not (shipped("conf") / f"{command}.yaml").is_file():
        return None
    if unequal := [argument for argument in settings if "=" not in argument and not argument.startswith("~")]:
        return f"{unequal[0]}: settings are given as key=value; those of this command: unitscale {command} --help"
    with redirect_stdout(None):  # what settings a run goes on with is said when it does
        typed = for_hydra(command, settings)
    for overrides in [typed] if settings == list(arguments) else single_runs(typed):
        try:
            check_values(command, composed(command, overrides), overrides)
        except (HydraException, OmegaConfBaseException, InputError) as error:
            return _explain(error, command)
    return None


def _explain(error: BaseException, command: str) -> str | None:
    """One message for an error in what the user asked for; None for a defect of the program."""
    causes = list(chain(error))
    full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in FULL), None)
    message = in_words(error, functools.partial(is_for, command))
    if full is None:
        return message
    make_room = " Make room, and go on with ckpt_path=<the run's last checkpoint>"
    if any(isinstance(cause, (InputError, UnitScalingError)) for cause in causes):
        return f"{message}{make_room}"
    where = f" ({full.filename})" if full.filename else ""
    return f"{full.strerror}{where}: what was being written is not there, earlier files are whole.{make_room}"


if __name__ == "__main__":
    main()
