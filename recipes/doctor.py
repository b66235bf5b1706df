"""Print versions, devices, which number formats run here and why others don't, and what is not installed.

unitscale doctor    # ends with status 1 where something that is needed is missing, or of another version
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution

import torch
from packaging.requirements import Requirement

from lightning_unitscale.block_formats import BlockNumbers
from lightning_unitscale.formats import FORMATS, supports
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.multiply import has_tensor_cores
from lightning_unitscale.ops.products import MatrixProducts

PACKAGE = "lightning-unitscale"


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


# ----------------------------------------------------------------------------------------------------------------------
# Packages


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


# ----------------------------------------------------------------------------------------------------------------------
# Devices and formats


def devices() -> Iterator[tuple[str, str]]:
    """Each kind: what there is, or why there is none."""
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {platform.machine()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", f"none: {'no GPU or no driver was found' if built else 'this torch is built without CUDA'}"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"compute capability {about.major}.{about.minor}"
        yield f"cuda:{number}", f"{about.name}, {capability}, {about.total_memory / 2**30:.0f} GiB"
    yield "mps", "there" if torch.backends.mps.is_available() else "none: not a Mac with Apple's GPU"


def formats() -> Iterator[tuple[str, str]]:
    """Each format on each kind of device."""
    for kind in ("cpu", "cuda", "mps"):
        if kind == "cpu" or getattr(torch, kind).is_available():
            yield from ((f"{name} on {kind}", verdict(name, torch.device(kind))) for name in FORMATS)


def verdict(name: str, device: torch.device) -> str:
    """Whether it runs, by trying; how; and why not."""
    format = FORMATS[name]
    for dtype in format.dtypes:
        if not supports(dtype, device):
            return f"no: this device has no {dtype}"
    one = torch.ones((), device=device)
    halves = torch.full((32, 32), 0.5, device=device)
    try:
        product = cast_product(halves, halves, MatrixProducts(), format, Scales(*[one] * 7))
        right = bool(((product / (32 * 0.25) - 1).abs() < 0.1).all())  # 0.5 is a number of most formats, not of all
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"no: its product fails: {str(error).splitlines()[0]}"
    if not right:
        return "no: its product is wrong"
    if isinstance(format.x, BlockNumbers):
        return "yes, but no faster: emulated, products of upcast operands"
    if format.x.itemsize > 1:
        return "yes" if device.type != "cpu" else "yes: real casts, products of upcast operands; no faster than float32"
    if has_tensor_cores(device):
        return "yes: products on tensor cores"
    why = "a CPU has no FP8 products" if device.type == "cpu" else "FP8 products need compute capability 8.9"
    return f"yes, but no faster: real casts, products of upcast operands; {why}"


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    main()
