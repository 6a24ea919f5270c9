"""How are numbers and shapes put into words? The same everywhere that a person reads them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from fintx.config.schema import Shape


def number(value: float | int | None, digits: int = 4) -> str:
    """0.4321, or "–" where there is none; whole numbers with thousands separators; 0.000292 with its digits kept."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.{digits - 1}g}" if digits > 1 else f"{value:.1g}"
    return f"{value:.{digits}f}"


def metric_words(name: str) -> str:
    """A metric as a figure's axis names it, with its unit: log loss, nats."""
    return _METRICS.get(name, name.replace("_", " "))


_METRICS = {"log_loss": "log loss, nats per row", "brier": "Brier score", "auc": "AUC", "mse": "squared error",
            "mae": "absolute error"}  # fmt: skip

UNITS = {"log_loss": "nats per row", "brier": "of Brier score per row", "mse": "of squared error per row",
         "mae": "of absolute error per row", "auc": "of AUC", "average_precision": "of average precision"}  # fmt: skip
"""Of a difference in a metric: .012 of AUC."""


def percent(value: float | None) -> str:
    """12.3 %, or "–"."""
    return "–" if value is None else f"{100 * value:.1f} %"


def count(value: float) -> str:
    """199.0M, 2.1B, 48.1K, 912: three or four leading digits and a suffix."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return str(round(value))


def duration(seconds: float | datetime.timedelta | None) -> str:
    """4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h; "–" where there is none."""
    if seconds is None:
        return "–"
    whole = round(seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2]) or "0 s"


def size(n_bytes: float) -> str:
    """2.3 GiB, 45 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{round(n_bytes)} B"


def shape_words(shape: Shape) -> str:
    """d_model 768 · 28 layers · 12 heads · d_ff 3072."""
    return f"d_model {shape.d_model} · {shape.n_layers} layers · {shape.n_heads} heads · d_ff {shape.d_ff}"


def span(low: float | None, high: float | None) -> str:
    """0.0008 … 0.0337: both ends with the digits that their distance deserves; "–" where there are none."""
    if low is None or high is None:
        return "–"
    digits = _digits(high - low)
    return f"{low:.{digits}f} … {high:.{digits}f}"


def measured(mean: float, low: float, high: float) -> str:
    """A figure with as many digits as its interval deserves: 0.0172."""
    return f"{mean:.{_digits(high - low)}f}"


def _digits(width: float) -> int:
    return min(max(2 - math.floor(math.log10(width)), 1), 12) if width > 0 else 4


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points: +1.2 pp; "–" where there is none."""
    return "–" if value is None else f"{100 * value:+.1f} pp"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
