"""How do many assets become one array? Their rows stand below each other; no window crosses from one to the next."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fintx import tasks
from fintx.data import features
from fintx.data.bars import Bars
from fintx.tasks import Task
from fintx.types import Floats, Ints


@dataclass(frozen=True, eq=False)
class Stack:
    """All assets' rows below each other, unscaled, with labels."""

    names: tuple[str, ...]
    features: Floats
    dates: np.ndarray
    asset_ids: Ints
    bar: Ints
    """Index of each row in its asset's own bars."""
    assets: tuple[str, ...]
    close: Floats
    labels: Floats
    label_ends: np.ndarray

    @staticmethod
    def of(bars: list[Bars], context: Mapping[str, Bars], names: tuple[str, ...], task: Task) -> Stack:
        return Stack(
            names=names,
            features=np.concatenate([features.compute(names, b, context) for b in bars]),
            dates=np.concatenate([b.dates for b in bars]),
            asset_ids=np.concatenate([np.full(len(b), i, np.int32) for i, b in enumerate(bars)]),
            bar=np.concatenate([np.arange(len(b)) for b in bars]),
            assets=tuple(b.symbol for b in bars),
            close=np.concatenate([b.close for b in bars]),
            labels=np.concatenate([tasks.labels(task, b) for b in bars]),
            label_ends=np.concatenate([tasks.ends(task, b) for b in bars]),
        )

    def whole_windows(self, context_length: int) -> np.ndarray:
        """Rows with a label and T rows of finite features behind them, within their asset."""
        finite = np.isfinite(self.features).all(axis=1)
        run = np.concatenate([[0], np.cumsum(finite)])
        first = np.maximum(np.arange(len(finite)) + 1 - context_length, 0)
        complete = run[1:] - run[first] == context_length
        return complete & (self.bar >= context_length - 1) & ~np.isnan(self.labels)

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """(rows,) asset and day as text, for hashes."""
        return np.char.add(np.char.add(np.asarray(self.assets)[self.asset_ids], " "), self.dates.astype(str))

    @functools.cached_property
    def data_hash(self) -> str:
        return content_hash(self.names, self.assets, self.features, self.dates.astype("<i8"), self.asset_ids)

    @functools.cached_property
    def label_hash(self) -> str:
        known = np.flatnonzero(~np.isnan(self.labels))
        return content_hash(self.membership(known), self.labels[known])

    def membership(self, rows: np.ndarray) -> tuple[str, ...]:
        return tuple(self.keys[rows].tolist())

    def never_known(self) -> str:
        """Words on features without a single value (their context begins later, say); empty if there are none."""
        never = np.asarray(self.names)[~np.isfinite(self.features).any(axis=0)]
        shown = [*never[:5], *([f"and {len(never) - 5} more"] if len(never) > 5 else [])]
        return f"; never known here: {', '.join(shown)}" if shown else ""

    def dropped(self, usable: np.ndarray) -> dict[str, int]:
        """Reason → rows that are no sample."""
        unlabelled = np.isnan(self.labels)
        idle = [symbol for i, symbol in enumerate(self.assets) if not usable[self.asset_ids == i].any()]
        return {
            "no whole window of features yet": int((~usable & ~unlabelled).sum()),
            "future not complete before the test part or the data's end": int(unlabelled.sum()),
            **{f"of {symbol}, all it has: it takes no part": int((self.asset_ids == i).sum())
               for i, symbol in enumerate(self.assets) if symbol in idle},
        }  # fmt: skip


def content_hash(*parts: tuple[str, ...] | np.ndarray) -> str:
    """sha256 (hex) of names and arrays, the same on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, tuple):
            digest.update("\n".join(part).encode() + b"\0")
        else:
            digest.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
