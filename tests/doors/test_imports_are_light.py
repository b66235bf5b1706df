"""What importing costs: nothing that is not needed, and the order of imports does not matter."""

from __future__ import annotations

import pytest
from support.fresh_python import run_python

from lightning_unitscale import attachments, formats, options
from lightning_unitscale.engine.plan import state_dict
from lightning_unitscale.optim.families import FAMILIES

HELP = """
import sys
from lightning_unitscale import cli
sys.argv = ["unitscale", *{words}]
cli.main()
print("heavy:", sorted(set(sys.modules) & {{"torch", "pytorch_lightning", "transformers", "matplotlib", "rich"}}))
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["pretrain", "--help"], ["completion", "words", "unitscale pretrain o"]],
)
def test_help_and_completion_import_neither_torch_nor_lightning(words: list[str]) -> None:
    assert run_python("-c", HELP.format(words=words)).rstrip().endswith("heavy: []")


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = 'print(sorted(set(sys.modules) & {"torch", "pytorch_lightning", "hydra", "rich"}))'
    assert run_python("-c", f"import sys, lightning_unitscale; {heavy}").strip() == "[]"


ASKED = """
from pytorch_lightning import Trainer
print(type(Trainer(strategy="unitscale", logger=False, accelerator="cpu").strategy).__name__)
import torch
print(torch.nn.Module.load_state_dict.__wrapped__.__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import lightning_unitscale",
        "import torch, lightning_unitscale",
        "from lightning_unitscale.engine.plan.plan import Plan",
    ],
)
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    assert run_python("-c", first + "\n" + ASKED).split() == ["UnitScalingStrategy", "load_state_dict"]


def test_names_are_those_of_their_modules_whatever_was_imported_before() -> None:
    code = "import lightning_unitscale.plain_torch as module, lightning_unitscale as package\n"
    code += "print(package.unit_scale is module.unit_scale, 'Plan' in dir(package))"
    assert run_python("-c", code).split() == ["True", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'UnitScalling'"):
        __import__("lightning_unitscale").UnitScalling  # noqa: B018


def test_the_marks_of_a_plan_are_the_same() -> None:
    assert attachments.PLAN_KEY == state_dict.PLAN_KEY


def test_formats_have_one_list_of_names() -> None:
    assert tuple(formats.FORMATS) == options.FORMAT_NAMES


def test_optimizer_families_have_one_list_of_names() -> None:
    assert tuple(FAMILIES) == options.OPTIMIZER_FAMILIES
