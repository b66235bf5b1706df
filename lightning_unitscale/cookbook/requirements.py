"""What the package needs, and what is installed of it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

PACKAGE = "lightning-unitscale"


def requirements(lines: Iterable[str]) -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the package's metadata name: always needed, and by extra (but for those that take other extras together)."""
    needed: list[Requirement] = []
    optional: dict[str, list[Requirement]] = {}
    for one in map(Requirement, lines):
        if one.marker is None or "extra" not in str(one.marker):
            needed += [one] if one.marker is None or one.marker.evaluate() else []
        elif one.name != PACKAGE:
            optional.setdefault(str(one.marker).partition("extra == ")[2].strip("\"'"), []).append(one)
    return needed, {extra: parts for extra, parts in optional.items() if extra not in ("test", "dev")}


def found(requirement: Requirement) -> str:
    """The installed version."""
    try:
        return distribution(requirement.name).version
    except PackageNotFoundError:
        return "missing"


def is_met(requirement: Requirement) -> bool:
    """Whether it is there, in a version that will do."""
    version = found(requirement)
    return version != "missing" and requirement.specifier.contains(version, prereleases=True)


def state(extra: str, parts: list[Requirement]) -> str:
    """Of an extra."""
    missing = [str(one).partition(";")[0] for one in parts if not is_met(one)]
    return f"pip install '{PACKAGE}[{extra}]' for {', '.join(missing)}" if missing else "installed"
