"""The examples of the blocks' README do what they say."""

import re
from pathlib import Path
from typing import Any

import lightning_unitscale.blocks

README = Path(lightning_unitscale.blocks.__file__).parent / "README.md"


def test_its_code_runs_as_one_program() -> None:
    programs = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(programs) == 2
    names: dict[str, Any] = {}
    for program in programs:
        exec(program, names)  # its own assertions are the test
    assert {"SimpleModel", "loss_of"} <= names.keys()
