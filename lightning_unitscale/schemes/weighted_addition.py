"""Residual additions a·x + b·f(x) with constants that keep RMS 1, a² + b² = 1, as a factor on the branch alone.

A skip is never scaled: a·x + b·f(x) = a·(x + (b/a)·f(x)), and a norm behind the addition divides a out. Without one
the skip of the next addition lacks that a, so the as of earlier additions accumulate, until the norm at the end of the
stream:

    a norm behind each addition     b / a
    pre-norm                        b_n / (a_0 a_1 … a_n)        n = additions before it

Exact up to one constant for the whole stream, which the norm behind it divides out.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod, sqrt


def branch_factor(share: float, earlier: Iterable[float], post_norm: bool) -> float:
    """What a branch is multiplied by.

    Args:
        share: b², the branch's share of the sum's variance.
        earlier: that of each branch before it.
        post_norm: there is a norm behind each addition.
    """
    skips = [] if post_norm else [sqrt(1 - other) for other in earlier]
    return sqrt(share) / (prod(skips) * sqrt(1 - share))
