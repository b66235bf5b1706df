"""What the tests of the doors share."""

from typing import Any

import pytest

from lightning_unitscale import lifecycle


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each model that is prepared."""
    prepared: list[Any] = []
    original = lifecycle.prepare

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.append(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(lifecycle, "prepare", counted)
    return prepared
