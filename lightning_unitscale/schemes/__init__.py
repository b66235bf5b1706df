"""Schemes: what function is trained, with what step sizes. One file of pure rules each; see README.md to add one."""

from lightning_unitscale.schemes import amax, completep, mus, preserve, umup, unit
from lightning_unitscale.schemes.registry import SCHEMES, find, register, scheme_of
from lightning_unitscale.schemes.scheme import Scheme

__all__ = ["SCHEMES", "Scheme", "amax", "completep", "find", "mus", "preserve", "register", "scheme_of", "umup", "unit"]
