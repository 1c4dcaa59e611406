"""Divisors of a number, as values and as text."""

import math


def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def divisors_text(number: int) -> str:
    """Return `1, 2, 4 or 8`: if there are more than eight, the four smallest and the four largest."""
    found = divisors(number)
    if len(found) > 8:
        found = found[:4] + found[-4:]
    return " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1])]))
