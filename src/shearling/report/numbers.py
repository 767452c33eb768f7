"""How numbers are written in the report: few digits, clear units, a true minus sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

THIN = "\u202f"  # narrow no-break space: between thousands and before units
MINUS = "\u2212"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def exact(number: int) -> str:
    """134515008 -> "134 515 008"."""
    return f"{number:,}".replace(",", THIN).replace("-", MINUS)


def figure(number: float) -> str:
    """About three significant digits: 35.9, 411, 79 812, 3.1 × 10⁻⁶."""
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else ("∞" if number > 0 else MINUS + "∞")
    size = abs(number)
    if size == 0:
        return "0"
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{number:.1e}".split("e")
        power = str(int(exponent)).translate(SUPERSCRIPTS)
        return f"{mantissa}{THIN}×{THIN}10{power}".replace("-", MINUS)
    if size >= 99.95:
        return exact(round(number))
    decimals = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{number:.{decimals}f}".replace("-", MINUS)


def tick(number: float) -> str:
    """As on an axis, where the values are round: 50, 0.05, 10 000, 10⁶."""
    size = abs(number)
    if number == 0 or 1e-4 <= size < 1000:
        return f"{number:g}".replace("-", MINUS)
    if 1000 <= size < 1e6:
        return exact(round(number))
    mantissa, exponent = f"{number:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    rounded = mantissa.removesuffix(".0").replace("-", MINUS)
    return power if rounded == "1" else f"{rounded}{THIN}×{THIN}{power}"


def count(number: int) -> str:
    """134515008 -> "134.5 M"."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


def amount(number: float) -> str:
    """As on an axis: 2000 -> "2 K", 2500 -> "2.5 K", 0 -> "0"."""
    step, units = 0, ("", "K", "M", "B", "T")
    while abs(number) >= 1000 and step + 1 < len(units):
        number, step = number / 1000, step + 1
    return f"{number:g}{THIN}{units[step]}".strip(THIN)


def disk(size: int) -> str:
    """Bytes on disk in decimal units: 269060381 -> "269.1 MB"."""
    return _scaled(size, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory(size: int, beside: int | None = None) -> str:
    """Bytes of memory in binary units, those that suit ``beside``: 826277888 -> "788.0 MiB"."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), beside)


def _scaled(number: int, base: int, units: tuple[str, ...], beside: int | None = None) -> str:
    step, size = 0, float(number if beside is None else beside)
    # 999.95 would be written as 1000.0: it already belongs to the next unit
    while size >= base - 0.05 and step + 1 < len(units):
        size, step = size / base, step + 1
    value = number / base**step
    digits = exact(number) if step == 0 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{digits}{THIN}{units[step]}".strip(THIN)


def percent(before: float, after: float) -> str | None:
    """The change from before to after: "−15.8 %"; None where there is no such number."""
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return None
    change = 100 * (after / before - 1)
    if abs(change) < 0.05:
        return f"±0{THIN}%"
    digits = f"{abs(change):.1f}" if abs(change) < 99.95 else exact(round(abs(change)))
    return f"{'+' if change > 0 else MINUS}{digits}{THIN}%"


def ratio(before: float, after: float) -> str | None:
    """after / before: "0.84×"; None where there is no such number."""
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return None
    value = after / before
    return f"{value:.2f}×" if 0.0995 <= value < 9.995 else f"{figure(value)}×"


def ranges(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"; nothing -> "none"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs]
    return ", ".join(parts) or "none"


def named(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def seconds(duration: float) -> str:
    """4.2 -> "4.2 s"; 421 -> "7 min 1 s"; 7321 -> "2 h 2 min"."""
    if duration < 60:
        return f"{duration:.1f}{THIN}s"
    whole = round(duration)
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60}{THIN}min"


def plural(number: int, noun: str) -> str:
    """1, "block" -> "1 block"; 6, "block" -> "6 blocks"."""
    return f"{exact(number)} {noun}{'' if number == 1 else 's'}"
