"""Datasets: a study's assets as one array of features with labels, cut into folds; the test part stays apart.

The assets' rows lie one asset below the other, and no window crosses from one asset into the next. `build` drops every
bar of the test part before it makes features or labels; `build_test` alone goes beyond.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fintx import tasks
from fintx.config.schema import DataConfig, StudySpec, TaskConfig, TrialConfig
from fintx.data import features, snapshots, sources, splits
from fintx.data.bars import Bars
from fintx.data.snapshots import Snapshot
from fintx.data.splits import Fold, PartRow, Split
from fintx.data.standardize import Drift, Standardizer, fit_standardizer, measure_drift
from fintx.errors import FintxError
from fintx.tasks import Task
from fintx.types import Floats, Ints


class NoWindows(FintxError):
    """No row has a whole window of features and a label."""


@dataclass(frozen=True, eq=False)
class Part:
    """Samples: the window of `rows[i]` ends at that row, `labels[i]` is its target."""

    rows: Ints
    """(S,) int32, index of the decision bar in `Dataset.features`."""
    labels: Floats
    """(S,) float32."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One fold, for one context length. The window of row r is features[r − T + 1 : r + 1], inside one asset."""

    features: Floats
    """(rows, F) float32, scaled; 0 in rows that no window touches."""
    feature_names: tuple[str, ...]
    dates: np.ndarray
    """(rows,) datetime64[D]."""
    asset_ids: Ints
    """(rows,) int32, index into `assets`."""
    assets: tuple[str, ...]
    close: Floats
    """(rows,) float64, raw."""
    train: Part
    validation: Part
    scaling: Standardizer
    data_hash: str
    """Of raw features, dates and assets."""
    label_hash: str
    """Of every complete label before the test part: equal hashes mean the same question on the same days."""
    split_hash: str
    """Of which asset and day lies in which part."""


@dataclass(frozen=True)
class AssetRange:
    """What is used of one symbol."""

    symbol: str
    bars: int
    first: str
    last: str
    version: str


@dataclass(frozen=True, eq=False)
class PreparedData:
    """A study's data: its folds, and what is reported of them before it runs."""

    data: DataConfig
    """Resolved: features by name, versions pinned."""
    folds: tuple[Dataset, ...]
    split: Split
    parts: tuple[PartRow, ...]
    """The split table."""
    drift: tuple[Drift, ...]
    """Train against validation of the newest fold, per feature."""
    label_description: str
    ranges: tuple[AssetRange, ...]
    dropped: dict[str, int]
    """Reason → rows before the test part that are no sample."""
    raw_features: Floats
    """(rows, F) float64, unscaled."""


# --- from a spec to its data ------------------------------------------------------------------------------------------


def build(spec: StudySpec | TrialConfig, root: Path) -> PreparedData:
    """Load bars and make features, labels, folds and scaling from them; the test part stays sealed.

    Args:
        spec: a study or a trial; its data, task, split and context length decide.
        root: the data folder.

    Raises:
        FintxError: data that are missing, a split that doesn't fit them, too few samples, unknown features.
    """
    task = spec.task
    loaded = _load(spec, root)
    panel = loaded.panel(task.rule, before=loaded.split.test_first)
    usable = panel.whole_windows(spec.model.context_length)
    _check_windows(panel, usable, task, spec.model.context_length)
    folds = tuple(_fold(panel, fold, usable, loaded.data) for fold in loaded.split.folds)
    parts = _part_rows(panel, folds, loaded, task)
    splits.check_sizes(spec.split, task, parts)
    train, validation = folds[-1].train.rows, folds[-1].validation.rows
    return PreparedData(
        data=loaded.data,
        folds=folds,
        split=loaded.split,
        parts=parts,
        drift=measure_drift(panel.features, panel.asset_ids, train=train, validation=validation, names=panel.names),
        label_description=task.rule.describe(),
        ranges=tuple(
            AssetRange(bars.symbol, len(bars), str(bars.dates[0]), str(bars.dates[-1]), bars.version)
            for bars in (*loaded.assets, *loaded.context.values())
        ),
        dropped=panel.dropped(usable),
        raw_features=panel.features,
    )


def build_test(spec: StudySpec | TrialConfig, root: Path, *, scaling: Standardizer) -> tuple[Dataset, Part]:
    """Open the sealed test part: the only function that cuts its labels. Log the opening before you call it.

    Raises:
        FintxError: the split has no test part, or it has no complete sample.
    """
    loaded = _load(spec, root)
    first = loaded.split.test_first
    if first is None:
        raise splits.BadSplit("this walk-forward split has no test part (no split.test_start): nothing is sealed")
    panel = loaded.panel(spec.task.rule, before=None)
    return _samples(panel, panel.dates >= first, scaling, spec.model.context_length, f"the test part, from {first}")


def build_external(
    bars: Bars, context: Mapping[str, Bars], spec: StudySpec | TrialConfig, *, scaling: Standardizer
) -> tuple[Dataset, Part]:
    """Samples of bars other than the study's, all of them, under the study's features and scaling.

    Args:
        spec: with its features resolved (`PreparedData.data`), as a trial's are.

    Raises:
        FintxError: too few bars for one window with its future.
    """
    panel = Panel.of([bars], context, spec.data.features, spec.task.rule)
    return _samples(panel, np.ones(len(bars), bool), scaling, spec.model.context_length, bars.symbol)


def store_processed(prepared: PreparedData, root: Path) -> Snapshot:
    """Keep the raw features as an immutable processed snapshot; the same features again are a no-op.

    Raises:
        FintxError: it can't be written.
    """
    dataset, data = prepared.folds[0], prepared.data
    columns = {"date": dataset.dates, "asset": np.asarray(dataset.assets)[dataset.asset_ids]}
    entry, _ = snapshots.store(
        root,
        "processed",
        _processed_name(data),
        pa.table(columns | dict(zip(dataset.feature_names, prepared.raw_features.T, strict=True))),
        version=dataset.data_hash,
        source=f"features {', '.join(data.features)}",
        parents=tuple(f"{sources.dataset_name(r.symbol)}@{r.version}" for r in prepared.ranges),
    )
    return entry


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """A study's bars within start … end, and what their days and their prices before the test part decide."""

    data: DataConfig
    """Features by name, versions pinned."""
    assets: list[Bars]
    context: dict[str, Bars]
    """By symbol, from before start on: an indicator's warm-up costs the asset no day."""
    split: Split

    def panel(self, task: Task, *, before: np.datetime64 | None) -> Panel:
        """Of the bars before a day; None: of all, the test part's too."""
        context = {symbol: bars.before(before) for symbol, bars in self.context.items()}
        return Panel.of([bars.before(before) for bars in self.assets], context, self.data.features, task)


def _load(spec: StudySpec | TrialConfig, root: Path) -> _Loaded:
    data = spec.data
    repeated = {symbol for symbol in data.assets if data.assets.count(symbol) > 1}
    if repeated:
        raise FintxError(f"data.assets: {', '.join(sorted(repeated))} named twice; take one out")
    features.resolve(data.features, context=data.context)  # a misspelt name is reported before missing data are
    whole = sources.load_pinned(data, (*data.assets, *data.context), root)
    assets = [whole[symbol].between(data.start, data.end) for symbol in data.assets]
    context = {symbol: whole[symbol].between(None, data.end) for symbol in data.context}
    for bars in (*assets, *context.values()):
        if len(bars) == 0:
            days = whole[bars.symbol].dates
            raise FintxError(
                f"data.start/end: no bar of {bars.symbol} lies in {data.start or '…'} … {data.end or '…'} "
                f"(it has {days[0]} … {days[-1]})"
            )
    days = np.unique(np.concatenate([bars.dates for bars in assets]))
    split = splits.split_days(spec.split, horizon=spec.task.horizon, dates=days)
    # Which features `stationary` holds is decided before the test part too: its prices choose nothing.
    gaps = all(features.has_gaps(bars.before(split.test_first)) for bars in assets)
    since_start = [bars.between(data.start, None).before(split.test_first) for bars in context.values()]
    gapless = tuple(bars.symbol for bars in since_start if not features.has_gaps(bars))
    names = features.resolve(data.features, context=data.context, gaps=gaps, gapless_context=gapless)
    pinned = {"features": names, "versions": {symbol: bars.version for symbol, bars in whole.items()}}
    return _Loaded(data.model_copy(update=pinned), assets, context, split)


def _check_windows(panel: Panel, usable: np.ndarray, task: TaskConfig, context_length: int) -> None:
    if np.isnan(panel.labels).all():
        raise NoWindows(
            f"no bar has {task.horizon} days (task.horizon) of future before the test part or the data's end "
            f"({len(usable)} bars); shorten the horizon, or give more data or an earlier start of the parts"
        )
    if not usable.any():
        warming_up = int((~np.isfinite(panel.features).all(axis=1)).sum())
        slowest, rows = features.slowest(panel.names)
        raise NoWindows(
            f"no row has a window of {context_length} bars (model.context_length) with finite features "
            f"({len(usable)} rows, {warming_up} of them without every feature); use more data, a shorter window, or "
            f"features that warm up sooner ({slowest} takes {rows} rows){panel.never_known()}"
        )


def _processed_name(data: DataConfig) -> str:
    symbols = [*data.assets, *data.context]
    prefix = "+".join(symbols) if len(symbols) <= 4 else f"{symbols[0]}+{len(symbols) - 1}"
    for name in features.SETS:
        with contextlib.suppress(features.UnknownFeature):  # a set of VIX, which isn't in the context
            if data.features in [features.resolve((name,), context=data.context, gaps=gaps) for gaps in (False, True)]:
                return f"{prefix}.{name}.daily"
    return f"{prefix}.{content_hash(data.features)[:8]}.daily"


# --- from bars to samples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Panel:
    """All assets' rows, one asset below the other: unscaled features, and labels."""

    names: tuple[str, ...]
    """Names of the features."""
    features: Floats
    """(rows, F) float64."""
    dates: np.ndarray
    asset_ids: Ints
    bar: Ints
    """Index of each row in its asset's own bars."""
    assets: tuple[str, ...]
    close: Floats
    labels: Floats
    label_ends: np.ndarray

    @staticmethod
    def of(bars: list[Bars], context: Mapping[str, Bars], names: tuple[str, ...], task: Task) -> Panel:
        return Panel(
            names=names,
            features=np.concatenate([features.compute(names, b, context) for b in bars]),
            dates=np.concatenate([b.dates for b in bars]),
            asset_ids=np.concatenate([np.full(len(b), i, np.int32) for i, b in enumerate(bars)]),
            bar=np.concatenate([np.arange(len(b)) for b in bars]),
            assets=tuple(b.symbol for b in bars),
            close=np.concatenate([b.close for b in bars]),
            labels=np.concatenate([tasks.labels(task, b) for b in bars]),
            label_ends=np.concatenate([tasks.label_ends(task, b) for b in bars]),
        )

    def whole_windows(self, context_length: int) -> np.ndarray:
        """(rows,) bool: has a label, and T rows of finite features up to and with it, within its asset."""
        finite = np.isfinite(self.features).all(axis=1)
        n_finite = np.concatenate([[0], np.cumsum(finite)])
        first = np.maximum(np.arange(len(finite)) + 1 - context_length, 0)
        complete = n_finite[1:] - n_finite[first] == context_length
        return complete & (self.bar >= context_length - 1) & ~np.isnan(self.labels)

    def part(self, rows: np.ndarray) -> Part:
        return Part(rows=rows.astype(np.int32), labels=self.labels[rows].astype(np.float32))

    def dataset(self, scaling: Standardizer, train: np.ndarray, validation: np.ndarray, *, split_hash: str) -> Dataset:
        return Dataset(
            features=scaling.apply(self.features, self.asset_ids, self.assets),
            feature_names=self.names,
            dates=self.dates,
            asset_ids=self.asset_ids,
            assets=self.assets,
            close=self.close,
            train=self.part(train),
            validation=self.part(validation),
            scaling=scaling,
            data_hash=self.data_hash,
            label_hash=self.label_hash,
            split_hash=split_hash,
        )

    def membership(self, rows: np.ndarray) -> tuple[str, ...]:
        """Asset and day of rows as text, for hashes."""
        symbols, days = np.asarray(self.assets)[self.asset_ids[rows]], self.dates[rows].astype(str)
        return tuple(np.char.add(np.char.add(symbols, " "), days).tolist())

    @functools.cached_property
    def data_hash(self) -> str:
        return content_hash(self.names, self.assets, self.features, self.dates.astype("<i8"), self.asset_ids)

    @functools.cached_property
    def label_hash(self) -> str:
        labelled = np.flatnonzero(~np.isnan(self.labels))
        return content_hash(self.membership(labelled), self.labels[labelled])

    def never_known(self) -> str:
        """For messages: features without a single value (their context begins later, say); "" if there are none."""
        never = np.asarray(self.names)[~np.isfinite(self.features).any(axis=0)]
        shown = [*never[:5], *([f"and {len(never) - 5} more"] if len(never) > 5 else [])]
        return f"; never known here: {', '.join(shown)}" if shown else ""

    def dropped(self, usable: np.ndarray) -> dict[str, int]:
        """Reason → rows that are no sample."""
        unlabelled = np.isnan(self.labels)
        counts = {
            "no whole window of features yet": int((~usable & ~unlabelled).sum()),
            "future not complete before the test part or the data's end": int(unlabelled.sum()),
        }
        for i, symbol in enumerate(self.assets):
            own = self.asset_ids == i
            if not usable[own].any():
                counts[f"of {symbol}, all it has: it takes no part"] = int(own.sum())
        return counts


def content_hash(*parts: tuple[str, ...] | np.ndarray) -> str:
    """sha256 (hex) of names and arrays, the same on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, tuple):
            digest.update("\n".join(part).encode() + b"\0")
        else:
            digest.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _fold(panel: Panel, fold: Fold, usable: np.ndarray, data: DataConfig) -> Dataset:
    dates, ends = panel.dates, panel.label_ends
    days = (dates >= fold.validation_first) & (dates < fold.validation_before)
    train = np.flatnonzero(usable & (dates >= fold.train_first) & (ends < fold.train_labels_before))
    validation = np.flatnonzero(usable & days & (ends < fold.validation_labels_before))
    scaling = fit_standardizer(panel.features, panel.asset_ids, panel.assets, train, kind=data.scaling)
    split_hash = content_hash(panel.membership(train), panel.membership(validation))
    return panel.dataset(scaling, train, validation, split_hash=split_hash)


def _samples(
    panel: Panel, chosen: np.ndarray, scaling: Standardizer, context_length: int, where: str
) -> tuple[Dataset, Part]:  # fmt: skip
    """A dataset without folds, and the chosen rows that are samples."""
    rows, none = np.flatnonzero(chosen & panel.whole_windows(context_length)), np.zeros(0, int)
    if len(rows) == 0:
        raise NoWindows(
            f"{where}: no row has a window of {context_length} bars with every feature, and a complete future, among "
            f"{len(panel.dates)} bars; give a longer history{panel.never_known()}"
        )
    split_hash = content_hash(panel.membership(rows))
    return panel.dataset(scaling, none, none, split_hash=split_hash), panel.part(rows)


def _part_rows(panel: Panel, folds: tuple[Dataset, ...], loaded: _Loaded, task: TaskConfig) -> tuple[PartRow, ...]:
    """The split table; the test part's days are counted without looking at a price."""
    table = []
    for number, fold in enumerate(folds, 1):
        for name, part in (("train", fold.train), ("validation", fold.validation)):
            ids, bars = panel.asset_ids[part.rows], panel.bar[part.rows]
            table.append(
                splits.describe_part(
                    name if len(folds) == 1 else f"{name} {number}",
                    task,
                    dates=panel.dates[part.rows],
                    labels=part.labels,
                    bars=[bars[ids == i] for i in range(len(panel.assets))],
                )
            )
    if loaded.split.test_first is not None:
        days = [b.dates[b.dates >= loaded.split.test_first] for b in loaded.assets]
        days = [own[: max(len(own) - task.horizon, 0)] for own in days]
        bars = [np.arange(len(own)) for own in days]
        table.append(splits.describe_part("test", task, dates=np.concatenate(days), labels=None, bars=bars))
    return tuple(table)
