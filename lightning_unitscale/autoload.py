"""What torch calls when it is imported, where this package is installed: `attach`, if the package is whole.

The installation puts a copy of this file beside the package, as `lightning_unitscale_autoload.py`, and the entry point
`torch.backends` names that copy: torch turns any error of an entry point into its own, so `import torch` must not
depend on a package that is half removed, moved (an editable installation) or broken. Whoever imports such a package
sees what is wrong with it.
"""

from __future__ import annotations


def attach() -> None:
    """`lightning_unitscale.attachments.attach`; nothing where that can't be had."""
    try:
        from lightning_unitscale.attachments import attach
    except Exception:  # whatever a broken package raises
        return
    attach()
