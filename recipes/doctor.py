"""Print versions, devices, which number formats run here and why others don't, and what is not installed.

unitscale doctor    # ends with status 1 where something that is needed is missing, or of another version
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import distribution

from lightning_unitscale.cookbook.devices import devices, formats
from lightning_unitscale.cookbook.requirements import PACKAGE, found, is_met, requirements, state


def main() -> None:
    """
    Raises:
        SystemExit: status 1 where a requirement is not met.
    """
    ours = distribution(PACKAGE)
    needed, optional = requirements(ours.requires or ())
    print(f"{PACKAGE} {ours.version}, Python {platform.python_version()}, {platform.platform()}")
    unmet = [requirement for requirement in needed if not is_met(requirement)]
    section("packages that it needs", ((one.name, f"{found(one):16} {one.specifier}") for one in needed))
    section("optional parts", ((extra, state(extra, parts)) for extra, parts in optional.items()))
    section("devices", devices())
    section("formats: unitscale.format=…", formats())
    if unmet:
        sys.exit(f"error: not met: {', '.join(map(str, unmet))}. Install them: pip install {PACKAGE}")


def section(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Prints one, in two columns."""
    print(f"\n{title}")
    for name, text in rows:
        print(f"  {name:22} {text}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    main()
