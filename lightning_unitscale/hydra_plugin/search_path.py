"""Lets any Hydra application write `callbacks: unitscale` in its defaults list.

The wheel installs this file as `hydra_plugins/lightning_unitscale.py`, where Hydra finds and runs it
at the start of every application. It therefore imports nothing heavy: the package is located, not loaded.
"""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class UnitscaleSearchPath(SearchPathPlugin):
    """Appends the folder with `callbacks/unitscale.yaml`, so an application's own files come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this while it assembles the places to look for configuration."""
        spec = find_spec("lightning_unitscale")
        if spec is None or spec.origin is None:  # uninstalled, with this file left behind
            return
        folder = Path(spec.origin).parent / "hydra_plugin" / "conf"
        search_path.append(provider="lightning-unitscale", path=f"file://{folder}")
