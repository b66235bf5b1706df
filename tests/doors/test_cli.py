"""The command line: help, errors in one message, configuration schemas."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from support.fresh_python import run_python

from lightning_unitscale import ScaleMonitor, cli
from lightning_unitscale.cookbook import config, wrong_values
from lightning_unitscale.cookbook.arguments import wrong_path
from lightning_unitscale.cookbook.help import composed, options
from lightning_unitscale.cookbook.wrong_values import check_values
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import SUFFIXES
from lightning_unitscale.export.fp8_weights import WEIGHT_FORMATS
from lightning_unitscale.near_names import not_found
from lightning_unitscale.schemes import SCHEMES

CONF = config.shipped("conf")
GROUPS = ("model", "data", "task", "optimizer", "unitscale", "monitor", "trainer", "logger", "experiment")


def failure(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, command: str = "pretrain") -> str:
    """The message with which `unitscale <command> <arguments>` gives up."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["unitscale", command, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, str)  # a message, printed to stderr, exit status 1
    return caught.value.code


def test_help_lists_every_recipe_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["unitscale", "--help"])
    cli.main()
    shown = capsys.readouterr().out
    for name, line in cli.commands().items():
        assert line
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.MULTILINE)
    assert "optimizer.lr=" in shown


def test_help_may_be_read_by_one_who_stops_early() -> None:
    command = [sys.executable, "-m", "lightning_unitscale.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_unknown_command_names_the_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["unitscale", "pretain"])
    with pytest.raises(SystemExit, match=r"unknown command 'pretain'.*Did you mean pretrain"):
        cli.main()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", r"no setting trainer\.max_step .*Did you mean trainer\.max_steps"),
        ("modle.width=64", r"no setting modle\.width .*Did you mean model"),
        ("unitscale.schema=umup", r"no setting unitscale\.schema .*Did you mean unitscale\.scheme"),
        (
            "unitscale=umpu",
            r"unitscale=umpu is not known; choose one of amax, completep, mus, none, preserve, .*\. Did you mean umup",
        ),
        ("experiment=tny", r"experiment=tny is not known.*Did you mean tiny"),
        ("unitscale.weights=maybe", r"unitscale\.weights"),
        ("unitscale.scheme=umpu", r"scheme='umpu' is not known.*Did you mean 'umup'"),
        ("unitscale.format=fp9", r"format='fp9' is not known"),
        ("data=text", r"data\.path has no value; give one: data\.path="),
        ("+trainer.foo=3", r"Trainer.*unexpected keyword argument 'foo'"),
        ("trainer.max_steps=0", r"trainer\.max_steps=0 must be a positive whole number"),
        ("optimizer.lr=fast", r"optimizer\.lr=fast must be a positive number"),
        ("model.width=100", r"model\.width=100 is not a multiple of model\.head_width=64"),
        ("ckpt_path=nowhere.ckpt", r"ckpt_path=nowhere\.ckpt: no such file"),
        (f"ckpt_path={__file__}", r"test_cli\.py: not a readable checkpoint"),
        ("task.sequence_length=5", r"task\.sample\.prompt has 4 bytes; there is room for 3"),
        ("task.sequence_length=1000000", r"too short for one sequence of 1000001"),
    ],
)
def test_wrong_override_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, message: str) -> None:
    assert re.search(message, failure(monkeypatch, tmp_path, override), re.DOTALL)


def test_full_traceback_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unitscale", "pretrain", "model.width=100"])
    GlobalHydra.instance().clear()
    with pytest.raises(InputError, match="not a multiple"):
        cli.main()


@pytest.mark.parametrize(
    ("group", "option"), [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
)
def test_every_option_composes(group: str, option: str) -> None:
    config.register()
    is_of_distill = "# unitscale distill: " in (CONF / group / f"{option}.yaml").read_text()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("distill" if is_of_distill else "pretrain", overrides=[f"{group}={option}"])
    assert composed.optimizer.lr > 0


def test_nodes_of_the_monitor_have_its_arguments_and_defaults() -> None:
    defaults = {name: argument.default for name, argument in inspect.signature(ScaleMonitor).parameters.items()}
    elsewhere = OmegaConf.load(config.PACKAGE / "hydra_plugin" / "conf" / "callbacks" / "scale_monitor.yaml")
    node = OmegaConf.to_container(elsewhere.scale_monitor)
    assert node == {"_target_": "lightning_unitscale.ScaleMonitor", **defaults}
    ours = OmegaConf.load(CONF / "monitor" / "scale.yaml")
    assert set(ours) == set(node)
    own = {"folder", "figures"}  # beside the run's other files; the recipes have matplotlib
    assert {name: ours[name] for name in defaults.keys() - own} == {
        name: defaults[name] for name in defaults.keys() - own
    }


ASIDE = "import sys; from lightning_unitscale import cli; sys.argv = ['unitscale', *{words}]\ntry: cli.main()\n"
ASIDE += "except SystemExit as error: print(error)\nprint('heavy:', 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["pretrain", "data=text", "data.path=nots"],
            "data.path=nots: no such file or folder (looked in HERE). Did you mean notes?",
        ),
        (["pretrain", "ckpt_path=outputs/first/lsat.ckpt"], "(looked in HERE). Did you mean outputs/first/last.ckpt?"),
        (["finetune", "model.path=outputs/frist/last.ckpt"], "(looked in HERE). Did you mean outputs/first/last.ckpt?"),
        (["finetune", "model.path=outputs/other"], "(looked in HERE); outputs has first"),
        (["inference", "rows=~nowhere/rows.csv"], "rows=~nowhere/rows.csv: no such file or folder"),
        (["pretrain", "trainer.max_step=3"], "no setting trainer.max_step here. Did you mean trainer.max_steps or"),
        (["pretrain", "+experiment=tny"], "Did you mean tiny?"),
        (["pretrain", "hydra/launcher=submitit"], "Of a plugin of Hydra? Then it is not installed."),
        (["pretrain", "tiny"], "tiny: settings are given as key=value"),
        (["pretrain", "optimizer.lr=abc"], "optimizer.lr=abc must be a positive number"),
        (["pretrain", "trainer.max_steps=-5"], "trainer.max_steps=-5 must be a positive whole number"),
        (["pretrain", "model.width=0"], "model.width=0 must be a positive whole number"),
        (["pretrain", "data.workers=many"], "data.workers=many must be a number; its default is 0"),
        (["finetune", "test_before=1"], "test_before=1 must be true or false"),
        (["pretrain", "unitscale.scheme=umupp"], "unitscale.scheme='umupp' is not known; choose one of 'amax', "),
        (["pretrain", "unitscale.format=fp9"], "unitscale.format='fp9' is not known; choose one of 'fp8', "),
        (["pretrain", "unitscale.storage=fold"], "unitscale.storage='fold' is not known"),
        (["pretrain", "unitscale.lr_units=umpu"], "unitscale.lr_units='umpu' is not known"),
        (["pretrain", "unitscale.skip=head"], "unitscale.skip=head must be a list, such as unitscale.skip=[head]"),
        (["pretrain", "unitscale.overrides=3"], "unitscale.overrides=3 must be names with values, such as"),
        (["pretrain", "unitscale.verify=maybe"], "unitscale.verify=maybe must be true or false"),
        (["pretrain", "+unitscale.schem=umup"], "unitscale.schem: UnitScaling has no such argument. Did you mean "),
        (["pretrain", "unitscale.optimizer_family=adan"], "unitscale.optimizer_family='adan' is not known; choose one"),
        (["pretrain", "optimiser.lr=1"], "no setting optimiser.lr here. Did you mean optimizer.lr?"),
        (["pretrain", "modle.width=64"], "no setting modle.width here. Did you mean model.width?"),
        (["pretrain", "modle.x=64"], "no setting modle.x here. Did you mean model?"),
        (["export", "model.path=.", "format=onx"], "format=onx is not known; choose one of hf, safetensors, pt2, onnx"),
        (["export", "model.path=.", "dtype=fp16"], "dtype=fp16 is not known; choose one of float32, bfloat16"),
        (["inference", "mode=talk"], "mode=talk is not known; choose one of generate, chat, predict, evaluate"),
        (["inference", "weights=[fp8,int8]"], "weights=int8 is not known; choose one of float32, bfloat16, fp8"),
        (["pretrain", "-m", "optimizer.lr=1e-3,abc", "model.width=64,128"], "optimizer.lr=abc must be a positive"),
        (["pretrain", "model.width=64,0", "-m"], "model.width=0 must be a positive whole number"),
    ],
)
def test_what_is_not_there_is_named_with_what_is_near_before_torch_is_imported(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "outputs" / "first").mkdir(parents=True)
    (tmp_path / "outputs" / "first" / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    said = run_python("-c", ASIDE.format(words=words))
    assert message.replace("HERE", str(tmp_path)) in said
    assert said.rstrip().endswith("heavy: False")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[] if name == "pretrain" else [pytest.mark.slow])
        for name in cli.commands()
        if (CONF / f"{name}.yaml").is_file()
    ],
)
def test_what_the_files_say_is_not_wrong(command: str) -> None:
    for group, names in options(command).items():
        for name in names if group != "hparams_search" else ():  # of a plugin
            overrides = [f"{group}={name}"]
            check_values(command, composed(command, overrides), overrides)


def test_choices_are_those_of_the_code_that_makes_them() -> None:
    modes, dtypes = (runpy.run_path(str(config.shipped("recipes") / f"{name}.py")) for name in ("inference", "export"))
    assert {
        "export": {"format": tuple(SUFFIXES), "dtype": tuple(dtypes["DTYPES"])},
        "inference": {
            "mode": tuple(modes["MODES"]),
            "part": ("validation", "test"),
            "weights": tuple(WEIGHT_FORMATS),
        },
    } == wrong_values.CHOICES


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_misspelt_option_lists_those_that_the_help_has(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = failure(monkeypatch, tmp_path, "experiment=basline", command=command)
    assert f"choose one of {', '.join(options(command)['experiment'])}." in said


def test_words_that_the_trainer_knows_beside_numbers_are_left_to_it() -> None:
    overrides = ["trainer.devices=auto", "trainer.val_check_interval=00:10:00", "trainer.deterministic=warn"]
    check_values("pretrain", composed("pretrain", overrides), overrides)


def test_the_schemes_that_the_files_have_are_all_there_are() -> None:
    for scheme in SCHEMES:
        check_values("pretrain", composed("pretrain", [f"unitscale.scheme={scheme}"]), [])


def test_paths_that_are_there_patterns_and_names_of_the_hub_are_left_to_their_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    fine = ["data.path=notes.txt", "data.path=*.md", "model.path=gpt2", "model.path=owner/name", "ckpt_path=null"]
    assert wrong_path([*fine, "data.path=a,b", "-m", "optimizer.lr=1", "data.path=[1]"]) == ""
    assert "it is a file, and a folder is needed" in not_found("notes.txt")
