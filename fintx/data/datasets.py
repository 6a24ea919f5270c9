"""How do many assets become one array? Their rows stand below each other; no window crosses from one to the next."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fintx import tasks
from fintx.config.schema import DataConfig, StudySpec, TaskConfig, TrialConfig
from fintx.data import features, snapshots, sources, splits
from fintx.data.bars import Bars
from fintx.data.snapshots import Snapshot
from fintx.data.splits import Fold, PartRow, Split
from fintx.data.standardize import Drift, Standardizer, drift, fit_standardizer
from fintx.errors import FintxError
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
    """A study's data: its folds, and all that is said about them before it runs."""

    data: DataConfig
    """Resolved: features by name, versions pinned."""
    folds: tuple[Dataset, ...]
    split: Split
    parts: tuple[PartRow, ...]
    """The split table."""
    drift: tuple[Drift, ...]
    """Train against validation of the newest fold, per feature."""
    label_words: str
    ranges: tuple[AssetRange, ...]
    dropped: dict[str, int]
    """Reason → rows before the test part that are no sample."""
    raw_features: Floats
    """(rows, F) float64, unscaled."""


def build(spec: StudySpec | TrialConfig, root: Path) -> PreparedData:
    """Load bars, and make features, labels, splits and scaling of them; the test part stays sealed.

    Args:
        spec: a study or a trial; its data, task, split and context length decide.
        root: the data folder.

    Raises:
        FintxError: data that are missing, a split that doesn't fit them, too few samples, unknown features.
    """
    task, context_length = spec.task, spec.model.context_length
    data, bars, context, bounds = _load(spec, root)
    first = bounds.test_first
    seen = Stack.of([_before(b, first) for b in bars], _all_before(context, first), data.features, task.rule)
    usable = seen.whole_windows(context_length)
    _check_any(seen, usable, task, context_length)
    folds = tuple(_dataset(seen, fold, usable, data) for fold in bounds.folds)
    parts = (*_part_rows(seen, folds, task), *_test_rows(bars, bounds, task))
    splits.check(spec.split, task, parts)
    newest = folds[-1]
    return PreparedData(
        data=data,
        folds=folds,
        split=bounds,
        parts=parts,
        drift=drift(
            seen.features,
            seen.asset_ids,
            train=newest.train.rows,
            validation=newest.validation.rows,
            names=seen.names,
        ),
        label_words=task.rule.describe(),
        ranges=tuple(
            AssetRange(b.symbol, len(b), str(b.dates[0]), str(b.dates[-1]), b.version)
            for b in (*bars, *context.values())
        ),
        dropped=seen.dropped(usable),
        raw_features=seen.features,
    )


def store_processed(prepared: PreparedData, root: Path) -> Snapshot:
    """Keep the raw features as an immutable processed snapshot; the same features again are a no-op.

    Raises:
        FintxError: it can't be written.
    """
    dataset, data = prepared.folds[0], prepared.data
    columns: dict[str, Any] = {
        "date": pa.array(dataset.dates),
        "asset": pa.array(np.asarray(dataset.assets)[dataset.asset_ids]),
    }
    columns |= {name: prepared.raw_features[:, i] for i, name in enumerate(dataset.feature_names)}
    parents = tuple(f"{sources.dataset_name(r.symbol)}@{r.version}" for r in prepared.ranges)
    entry, _ = snapshots.store(
        root,
        "processed",
        _processed_name(data),
        pa.table(columns),
        version=dataset.data_hash,
        source=f"features {', '.join(data.features)}",
        parents=parents,
    )
    return entry


def build_test(spec: StudySpec | TrialConfig, root: Path, *, scaling: Standardizer) -> tuple[Dataset, Part]:
    """Open the sealed test part: the only function that cuts its labels. Log the opening before you call it.

    Raises:
        FintxError: the split has no test part, or it has no complete sample.
    """
    data, bars, context, bounds = _load(spec, root)
    if bounds.test_first is None:
        raise splits.BadSplit("this walk-forward split has no test part (no split.test_start): nothing is sealed")
    whole, context_length = Stack.of(bars, context, data.features, spec.task.rule), spec.model.context_length
    chosen = whole.whole_windows(context_length) & (whole.dates >= bounds.test_first)
    return _scaled(whole, np.flatnonzero(chosen), scaling, f"the test part, from {bounds.test_first}", context_length)


def build_external(
    bars: Bars, context: Mapping[str, Bars], spec: StudySpec | TrialConfig, *, scaling: Standardizer
) -> tuple[Dataset, Part]:
    """Samples of other bars than the study's, all of them, under the study's features and scaling.

    Args:
        spec: with its features resolved (`Prepared.data`), as a trial's are.

    Raises:
        FintxError: too few bars for one window with its future.
    """
    stack, context_length = Stack.of([bars], context, spec.data.features, spec.task.rule), spec.model.context_length
    chosen = stack.whole_windows(context_length)
    return _scaled(stack, np.flatnonzero(chosen), scaling, bars.symbol, context_length)


# --- loading ----------------------------------------------------------------------------------------------------------


def _load(spec: StudySpec | TrialConfig, root: Path) -> tuple[DataConfig, list[Bars], dict[str, Bars], Split]:
    """The assets' and the context's bars within start … end, the config with features and versions resolved, and the
    bounds of the parts."""
    data = spec.data
    twice = {symbol for symbol in data.assets if data.assets.count(symbol) > 1}
    if twice:
        raise FintxError(f"data.assets: {', '.join(sorted(twice))} named twice; take one out")
    features.resolve(data.features, context=data.context)  # a misspelt name is told before missing data are
    loaded = sources.load_pinned(data, (*data.assets, *data.context), root)
    bars = [loaded[symbol].between(data.start, data.end) for symbol in data.assets]
    # Context keeps its bars from before start: an indicator's warm-up costs the asset no day.
    context = {symbol: loaded[symbol].between(None, data.end) for symbol in data.context}
    for b in (*bars, *context.values()):
        if len(b) == 0:
            whole = loaded[b.symbol]
            raise FintxError(
                f"data.start/end: no bar of {b.symbol} lies in {data.start or '…'} … {data.end or '…'} "
                f"(it has {whole.dates[0]} … {whole.dates[-1]})"
            )
    bounds = splits.split_days(
        spec.split, horizon=spec.task.horizon, dates=np.unique(np.concatenate([b.dates for b in bars]))
    )
    # Which features `stationary` holds is decided before the test part too: its prices choose nothing.
    gaps = all(features.has_gaps(_before(b, bounds.test_first)) for b in bars)
    joined = {symbol: b.between(data.start, None) for symbol, b in context.items()}
    gapless = tuple(s for s, b in _all_before(joined, bounds.test_first).items() if not features.has_gaps(b))
    names = features.resolve(data.features, context=data.context, gaps=gaps, gapless_context=gapless)
    versions = {symbol: b.version for symbol, b in loaded.items()}
    return data.model_copy(update={"features": names, "versions": versions}), bars, context, bounds


def _before(bars: Bars, day: np.datetime64 | None) -> Bars:
    return bars if day is None else bars.take(np.flatnonzero(bars.dates < day))


def _all_before(context: Mapping[str, Bars], day: np.datetime64 | None) -> dict[str, Bars]:
    return {symbol: _before(bars, day) for symbol, bars in context.items()}


def _check_any(stack: Stack, usable: np.ndarray, task: TaskConfig, context_length: int) -> None:
    if np.isnan(stack.labels).all():
        raise NoWindows(
            f"no bar has {task.horizon} days (task.horizon) of future before the test part or the data's end "
            f"({len(usable)} bars); shorten the horizon, or give more data or an earlier start of the parts"
        )
    if not usable.any():
        warm = int((~np.isfinite(stack.features).all(axis=1)).sum())
        slowest, rows = features.slowest(stack.names)
        raise NoWindows(
            f"no row has a window of {context_length} bars (model.context_length) with finite features "
            f"({len(usable)} rows, {warm} of them without every feature); use more data, a shorter window, or features "
            f"that warm up sooner ({slowest} takes {rows} rows){stack.never_known()}"
        )


# --- folds ------------------------------------------------------------------------------------------------------------


def _dataset(stack: Stack, fold: Fold, usable: np.ndarray, data: DataConfig) -> Dataset:
    dates = stack.dates
    train = usable & (dates >= fold.train_first) & (stack.label_ends < fold.train_labels_before)
    validation = usable & (dates >= fold.validation_first) & (dates < fold.validation_before)
    validation &= stack.label_ends < fold.validation_labels_before
    rows = (np.flatnonzero(train), np.flatnonzero(validation))
    scaling = fit_standardizer(stack.features, stack.asset_ids, stack.assets, rows[0], kind=data.scaling)
    return _assemble(stack, scaling, *rows, split_hash=content_hash(*map(stack.membership, rows)))


def _scaled(
    stack: Stack, rows: np.ndarray, scaling: Standardizer, where: str, context_length: int
) -> tuple[Dataset, Part]:  # fmt: skip
    if len(rows) == 0:
        raise NoWindows(
            f"{where}: no row has a window of {context_length} bars with every feature, and a complete future, among "
            f"{len(stack.dates)} bars; give a longer history{stack.never_known()}"
        )
    none = np.zeros(0, int)
    return _assemble(stack, scaling, none, none, split_hash=content_hash(stack.membership(rows))), _part(stack, rows)


def _assemble(
    stack: Stack, scaling: Standardizer, train: np.ndarray, validation: np.ndarray, *, split_hash: str
) -> Dataset:  # fmt: skip
    return Dataset(
        features=scaling.apply(stack.features, stack.asset_ids, stack.assets),
        feature_names=stack.names,
        dates=stack.dates,
        asset_ids=stack.asset_ids,
        assets=stack.assets,
        close=stack.close,
        train=_part(stack, train),
        validation=_part(stack, validation),
        scaling=scaling,
        data_hash=stack.data_hash,
        label_hash=stack.label_hash,
        split_hash=split_hash,
    )


def _part(stack: Stack, rows: np.ndarray) -> Part:
    return Part(rows=rows.astype(np.int32), labels=stack.labels[rows].astype(np.float32))


# --- the split table --------------------------------------------------------------------------------------------------


def _part_rows(stack: Stack, folds: tuple[Dataset, ...], task: TaskConfig) -> list[PartRow]:
    found = []
    for index, fold in enumerate(folds):
        for name, part in (("train", fold.train), ("validation", fold.validation)):
            rows = part.rows
            effective = sum(
                splits.effective_n(stack.bar[rows[stack.asset_ids[rows] == i]], horizon=task.horizon)
                for i in range(len(stack.assets))
            )
            label = name if len(folds) == 1 else f"{name} {index + 1}"
            found.append(
                splits.describe_part(
                    label, task, dates=stack.dates[rows], labels=part.labels, n_effective=effective
                )
            )  # fmt: skip
    return found


def _test_rows(bars: list[Bars], bounds: Split, task: TaskConfig) -> list[PartRow]:
    """The test part's days, counted without a look at a price."""
    if bounds.test_first is None:
        return []
    days = [b.dates[b.dates >= bounds.test_first] for b in bars]
    effective = sum(
        splits.effective_n(np.arange(max(len(d) - task.horizon, 0)), horizon=task.horizon) for d in days
    )  # fmt: skip
    samples = np.concatenate([d[: max(len(d) - task.horizon, 0)] for d in days])
    return [splits.describe_part("test", task, dates=samples, labels=None, n_effective=effective)]


def _processed_name(data: DataConfig) -> str:
    symbols = [*data.assets, *data.context]
    who = "+".join(symbols) if len(symbols) <= 4 else f"{symbols[0]}+{len(symbols) - 1}"
    for name in features.SETS:
        try:
            sets = {features.resolve((name,), context=data.context, gaps=gaps) for gaps in (False, True)}
            if data.features in sets:
                return f"{who}.{name}.daily"
        except features.UnknownFeature:
            continue
    return f"{who}.{content_hash(data.features)[:8]}.daily"
