"""Shares of a whole, rounded as a person computes them.

A decimal fraction has no exact binary value: 0.7 · 90 is 62.99999999999999 in float64, and 0.1 · 30 is more than 3. A
product that differs from a whole number by no more than such errors is that number.
"""

import math

# Relative; a product of two float64 numbers is off by a few 2⁻⁵³.
_ROUNDING = 1e-12


def floor_share(fraction: float, count: int) -> int:
    """
    >>> floor_share(0.7, 90), floor_share(2 / 3, 12), floor_share(0.5, 7)
    (63, 8, 3)
    """
    product = fraction * count
    return round(product) if math.isclose(product, round(product), rel_tol=_ROUNDING) else math.floor(product)


def ceil_share(fraction: float, count: int) -> int:
    """
    >>> ceil_share(0.1, 30), ceil_share(0.07, 100), ceil_share(0.5, 7)
    (3, 7, 4)
    """
    product = fraction * count
    return round(product) if math.isclose(product, round(product), rel_tol=_ROUNDING) else math.ceil(product)
