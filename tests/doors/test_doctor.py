"""`unitscale doctor`: what is there, what runs, and why not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from packaging.requirements import Requirement

from lightning_unitscale import cli
from lightning_unitscale.cookbook import devices
from lightning_unitscale.cookbook.requirements import is_met, requirements, state


def test_it_prints_versions_devices_and_formats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["unitscale", "doctor"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main()
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert torch.__version__ in lines["torch"]
    assert pl.__version__ in lines["pytorch-lightning"]
    assert "yes" in lines["bf16 on cpu"]
    assert "a CPU has no FP8 products" in lines["fp8 on cpu"]
    if not torch.cuda.is_available():
        assert "none: " in lines["cuda"]
        assert "fp8 on cuda" not in lines


def test_a_requirement_is_met_by_its_version_alone() -> None:
    met = {text: is_met(Requirement(text)) for text in ("torch", "torch>=999", "there-is-no-such-package")}
    assert met == {"torch": True, "torch>=999": False, "there-is-no-such-package": False}
    assert "pip install 'lightning-unitscale[mine]' for torch>=999" in state(
        "mine", [Requirement("torch"), Requirement("torch>=999; extra == 'mine'")]
    )


def test_extras_are_those_of_the_metadata() -> None:
    lines = ["torch>=2", "wandb>=1; extra == 'wandb'", "lightning-unitscale[wandb]; extra == 'test'"]
    lines += ["pytest; extra == 'test'", "old; python_version < '3'"]
    needed, optional = requirements(lines)
    assert [one.name for one in needed] == ["torch"]
    assert {extra: [one.name for one in parts] for extra, parts in optional.items()} == {"wandb": ["wandb"]}


def test_a_format_whose_product_fails_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel here\nfile 3")

    verdict, cpu = devices.verdict, torch.device("cpu")
    assert verdict("fp8", cpu).startswith("yes")
    monkeypatch.setattr(devices, "cast_product", fails)
    assert verdict("fp8", cpu) == "no: its product fails: no kernel here"
    monkeypatch.setattr(devices, "cast_product", lambda *_: torch.zeros(32, 32))
    assert verdict("fp8", cpu) == "no: its product is wrong"
    monkeypatch.setattr(devices, "supports", lambda *_: False)
    assert verdict("fp8", cpu) == "no: this device has no torch.float8_e4m3fn"
