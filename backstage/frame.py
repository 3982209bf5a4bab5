"""Bars from a notebook: data frames, and the check of arrays that no file reader has seen."""
import numpy as np

from backstage.names import names_of
from backstage.reader import bars_of
from backstage.script import UserError
from backstage.series import YEAR, Bars, faults
from backstage.table import Table


def from_frame(frame, symbol="") -> Bars:
    """One symbol's bars from a pandas or polars frame, a dict of arrays, or what else has named
    columns.

    The time is a column or the index. Names, dates, numbers and faults as in files (see `load`);
    zones become UTC, rows are sorted. symbol: its name; else that in a column `symbol`. UserError
    where no bars are there.
    """
    if hasattr(frame, "reset_index"):  # pandas: the index becomes the first column
        index = frame.index
        unnamed = getattr(index, "name", None) is None and getattr(index, "nlevels", 1) == 1
        frame = frame.reset_index()
        names = ["" if unnamed and i == 0 else str(name) for i, name in enumerate(frame.columns)]
        columns = [frame.iloc[:, i] for i in range(len(names))]
    elif hasattr(frame, "keys") or hasattr(frame, "columns"):
        keys = list(frame.keys() if hasattr(frame, "keys") else frame.columns)
        names, columns = list(map(str, keys)), [frame[key] for key in keys]
        if hasattr(frame, "index") and not callable(frame.index):
            names, columns = ["", *names], [frame.index, *columns]
    else:
        raise UserError(f"from_frame: {type(frame).__name__} has no named columns; give a frame or "
                        f"a dict of arrays")
    columns = [_cells(column) for column in columns]
    n_rows = {name: len(column) for name, column in zip(names, columns)}
    if len(set(n_rows.values())) != 1 or not any(n_rows.values()):
        raise UserError(f"from_frame: columns of {n_rows} rows; each needs one value a bar")
    table = Table(symbol or "frame", [], ",", 0, names, *map(list, zip(*names_of(names))),
                  line_of=range(len(columns[0])), columns=columns)
    series = bars_of(table, symbol)
    if len(series) > 1:
        raise UserError(f"from_frame: {len(series)} symbols, {series[0].symbol}, "
                        f"{series[1].symbol} ...; give the rows of one")
    return Bars(symbol or series[0].symbol, series[0].time, series[0].ohlcva)


def _cells(column):
    """A column as float64, or as a list of texts: what a file would have held."""
    values = np.asarray(column)
    if values.ndim != 1:
        raise UserError(f"from_frame: a column of shape {values.shape}; each needs one value a bar")
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    if values.dtype.kind == "M":
        return np.datetime_as_string(values.astype("datetime64[s]")).tolist()
    return ["nan" if value is None else str(value) for value in values.tolist()]


def check_histories(histories):
    """Refuse Bars made by hand that are none, before they give a forecast of something else."""
    if isinstance(histories, Bars) or not len(histories):
        raise UserError("histories: give a list of Bars, with at least one")
    for bars in histories:
        if isinstance(bars, Bars):
            check_bars(bars)


def check_bars(bars):
    """UserError, with symbol, row and remedy, unless the arrays are as Bars says."""
    name, time, ohlcva = bars.symbol, bars.time, bars.ohlcva
    if not isinstance(name, str):
        raise UserError(f"symbol {name!r}: must be a text")
    if not isinstance(time, np.ndarray) or time.dtype != np.int64 or time.ndim != 1:
        raise UserError(f"{name}: time is {_kind(time)}; give UTC seconds, int64 [T], or use "
                        f"data.from_frame")
    if _kind(ohlcva) != f"float64 [{len(time)}, 6]":
        raise UserError(f"{name}: ohlcva is {_kind(ohlcva)}; give float64 [{len(time)}, 6], open, "
                        f"high, low, close, volume, amount, NaN where a column is missing, or use "
                        f"data.from_frame")
    if not len(time):
        raise UserError(f"{name}: no bars; give at least two")
    row = int(np.argmax(np.abs(time)))
    if abs(time[row]) > 229 * YEAR:
        raise UserError(f"{name}: row {row}: time {time[row]} is beyond year 2199; give UTC "
                        f"seconds, not ms or ns")
    fall = np.diff(time) <= 0
    if fall.any():
        row = int(np.argmax(fall)) + 1
        raise UserError(f"{name}: row {row}: its time is not after the one before; sort by time, "
                        f"the oldest first, each time once")
    for failed, why in faults(ohlcva.T):
        if failed.any():
            raise UserError(f"{name}: row {int(np.argmax(failed))}: {why}; the columns are open, "
                            f"high, low, close, volume, amount: mend or drop the row")


def _kind(value):
    is_array = isinstance(value, np.ndarray)
    return f"{value.dtype} {list(value.shape)}" if is_array else type(value).__name__
