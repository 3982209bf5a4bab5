"""Files in: tables as people have them -> Bars.

One way for every file: a table -> whose columns are what -> times -> bars -> faults. What cannot be
told for certain is refused, never guessed.
"""
import csv
import glob
import os
import re
from collections import Counter

import numpy as np

from backstage.dates import ahead, clock_seconds, iso, read_dates
from backstage.files import FILES
from backstage.mapped import SEAL, differ, joined, open_folder
from backstage.names import HEADERS, PRICES
from backstage.script import UserError, printable, remark
from backstage.series import COLUMNS, DAY, Bars, faults
from backstage.table import (
    BINANCE, FIRST_LINE, MAX_BAD, UNPACKED, NoBars, cells_of, numbers_of, read_table)

NO_BAR = "there is no bar to read: check the columns"
ROUNDING = 1e-6  # a high that lies below the close by so little, relative, was rounded
SPLIT = 1.9      # a close moves by it on a split of 2 for 1, on a day that moves less than 5 %


def load(paths, order=None) -> list[Bars]:
    """Read bars from CSV files, folders or globs, packed or not, or what data.py --out wrote.

    paths: a string or a list of them. Columns are found by name; a time without a zone means UTC.
    Rows of one symbol in several files become one series; of equal times the last read wins.
    order: of days and months where the dates do not tell, "day/month/year", "month/day/year" or
    "year-month-day". UserError where nothing usable is there.
    """
    found = {}
    for bars in read_files(paths, order):
        found.setdefault(bars.symbol, []).append(bars)
    return [joined(parts) for parts in found.values()]


def read_files(paths, order=None, unpacked=UNPACKED):
    """Yield Bars file by file, so that a corpus larger than memory can be converted.

    A file that was named must be good. Of others the useless ones are skipped, unless more are bad
    than good. order: see `load`. unpacked: bytes that a packed file may hold.
    """
    files = list(_files(paths))
    symbols = _symbols([path for path, _ in files])
    skipped = []
    for path, named in files:
        try:
            if os.path.isdir(path):
                yield from open_folder(path)
            else:
                table = read_table(path, unpacked)
                table.order = order
                yield from bars_of(table, symbols[path])
        except (UserError, csv.Error) as e:
            if isinstance(e, csv.Error):
                e = UserError(f"{path}: not CSV ({e}); look for a quote that is never closed")
            if named:
                raise e
            skipped.append(e)
    bad = [e for e in skipped if not isinstance(e, NoBars)]
    if len(skipped) == len(files) or len(bad) > len(files) - len(skipped):
        raise (bad or skipped)[0]
    if skipped:
        others = ", ".join(os.path.basename(str(e).split(": ")[0]) for e in skipped[3:])
        why = "; ".join([*map(str, skipped[:3]), *(["and " + others] if others else [])])
        remark(f"{len(skipped)} of {len(files)} files skipped: {why}")


def _files(paths):
    """Yield (path, whether it must be good) of each CSV file and each folder of arrays."""
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.fspath(path)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matches:
            raise UserError(f"{path}: no such file; give --data a CSV file, a folder of them, or a "
                            f"quoted glob")
        for match in matches:
            is_folder = os.path.isdir(match)
            if not is_folder or os.path.exists(os.path.join(match, SEAL)):
                yield match, is_folder or match == path
                continue
            names = [name for name in sorted(os.listdir(match)) if FILES.search(name)[0]]
            names = [name for name in names if not name.startswith((".", "~$"))]
            if not names:
                raise UserError(f"{match}: no CSV file in this folder; put *.csv or *.csv.gz there")
            yield from ((os.path.join(match, name), False) for name in names)


def _symbols(paths):
    """{path: symbol of a file that names none}: its stem.

    Without date and interval where files differ by their dates alone.
    """
    date = r"([-_. ](19|20)\d\d([-_.]?[01]\d([-_.]?[0-3]\d)?)?)+$"
    interval = r"[-_. ](\d+(s|m|min|h|d|w|mo)|[mhdw]\d+|mn1|daily|hourly)$"
    names = {path: os.path.basename(path) for path in paths}
    stems = {path: FILES.sub("", name) or name for path, name in names.items()}
    undated = {path: re.sub(date, "", stem) for path, stem in stems.items()}
    count = Counter(undated.values())
    for path, name in undated.items():
        if count[name] > 1:
            stems[path] = re.sub(interval, "", name, flags=re.I)
    return {path: printable(stem.strip()) for path, stem in stems.items()}


# -- a table -> bars

def bars_of(table, symbol):
    """The Bars of one file, a list. symbol: whose they are in a file that names none."""
    tickers = list(dict.fromkeys(filter(None, table.tickers))) or [""]
    parts = {ticker: _columns(table, ticker) for ticker in tickers}
    used = [(column, i) for columns in parts.values() for column, i in columns.items()]
    numbers = {i for column, i in used if column in COLUMNS}
    words = {i for column, i in used if column not in COLUMNS}
    free = [i for i, ticker in enumerate(table.tickers) if not ticker and i not in numbers | words]
    dates = [i for name in HEADERS["time"] for i in free if table.fields[i] == name]
    clocks = [i for name in HEADERS["clock"] for i in free if table.fields[i] == name]
    if 0 in free and table.fields[0] == "":
        dates.append(0)  # pandas writes its index without a name
    if not dates:
        raise _no_column(table, "time")

    row = table.row(table.first)
    halves = [i for i in free if i < len(row) and row[i].strip().lower() in ("am", "pm")]
    cells, reasons = cells_of(table, numbers, words | {*dates, *clocks, *halves})
    if not len(cells[dates[0]]):
        if sum(map(bool, table.lines[table.first:])) > 2:
            raise table.error(table.first + 1, "not the cells of the header; use one delimiter")
        raise NoBars(f"{table.path}:{table.first + 1}: no rows after the header; {NO_BAR}")
    if len(reasons) == len(cells[dates[0]]):
        raise table.error(table.line(0), f"{reasons[0]}; {NO_BAR}")
    for i in {*dates, *clocks} if halves else ():  # of days, in a column beside the clock
        if i not in dates or ":" in cells[i][0]:
            cells[i] = [f"{clock} {half}" for clock, half in zip(cells[i], cells[halves[0]])]
    time, at = _times(table, cells, dates, clocks)
    amounts = {columns.get("amount") for columns in parts.values()}
    values = numbers_of(table, {i: cells[i] for i in numbers}, reasons, amounts)
    prices = [values[i] for column, i in used if column in PRICES]
    for row in np.flatnonzero(np.isnan(time)).tolist():
        if not all(np.isnan(price[row]) for price in prices):
            what = table.names[at] or "time"
            reasons.setdefault(row, f"{what} {cells[at][row]!r} is no date")
    series, nothing = [], np.full(len(time), np.nan)
    for ticker, columns in parts.items():
        ohlcva = np.stack([values.get(columns.get(c), nothing) for c in COLUMNS])     # (6, rows)
        _check_columns(table, columns, cells, ohlcva)
        symbols = [printable(ticker) or symbol]
        if "symbol" in columns:
            of_rows = _symbol_of_rows(table, columns, cells, time, reasons)
            symbols = symbols if of_rows is None else of_rows
        series += _bars(table, symbols, time, ohlcva, dict(reasons))
    if not series:
        raise table.error(table.line(0), f"no row has a price; {NO_BAR}")
    return series


def _no_column(table, column):
    return table.error(table.first, f"no column {column!r} in the header; give that name to the "
                                    f"one it is")


def _columns(table, ticker):
    """{column: its index} of one symbol; UserError if a price is missing, or a name is twice."""
    own = [i for i, t in enumerate(table.tickers) if t == ticker]
    fields = [table.fields[i] for i in own]
    columns = {}
    for column in (*COLUMNS, "symbol", "interval"):
        found = [(name, own[fields.index(name)]) for name in HEADERS[column] if name in fields]
        found = [(name, i) for name, i in found if i not in columns.values()]
        if found:
            name, columns[column] = found[0]
            same = [repr(table.names[i]) for i, field in zip(own, fields) if field == name]
            if len(same) > 1:
                raise table.error(table.first, f"{' and '.join(same)} in the header are both a "
                                               f"{column}; keep one of them")
        elif column in PRICES:
            raise _no_column(table, column)
    return columns


def _times(table, cells, dates, clocks):
    """(UTC seconds of each row, index of the column): of `dates` the most distinct that is one.

    Dates without a clock take it from one of the columns `clocks`.
    """
    best, most, why = None, 0, ""
    for i in dates:
        seconds, reason = read_dates(cells[i], table.order)
        good = np.isfinite(seconds)
        distinct = len(np.unique(seconds[good])) if len(dates) > 1 else 1
        if good.mean() < 0.5:
            if not why or "may be" in reason:
                cell = next(filter(None, cells[i]), "")
                name = table.names[i] or "time"
                why = f"{name} {cell!r} is no date{reason and ': '}{reason}"
        elif distinct > most or _is_fetched(best, seconds):
            if not most or not _is_fetched(seconds, best):
                best, most, at = seconds, distinct, i
    if not most:
        raise table.error(table.line(0), f"{why}; give dates with their clock, best as "
                                         f"2024-03-04 14:30")
    if (best[np.isfinite(best)] % DAY == 0).all():
        found = (clock_seconds(cells[i]) for i in clocks if i != at)
        best = best + next((clock for clock in found if np.isfinite(clock).mean() > 0.5), 0.0)
    zone = re.search(r"\(([a-z_/]+)\)", table.names[at], re.I)  # "Time (EET)"
    return best - np.nan_to_num(ahead(zone[1], best)) if zone else best, at


def _is_fetched(seconds, other):
    """Whether times are of a download: all behind the other's, in a fraction of its span."""
    first, span = np.nanmin(seconds), np.nanmax(seconds) - np.nanmin(seconds)
    return np.nanmax(other) <= first + DAY and np.nanmax(other) - np.nanmin(other) > 10 * span


def _check_columns(table, columns, cells, ohlcva):
    """One interval; an amount is volume times price; a volume that is not read is named."""
    names = table.names
    _, high, low, close, volume, amount = ohlcva
    intervals = sorted({cell.strip() for cell in cells.get(columns.get("interval"), ())})
    if len(intervals) > 1:
        raise table.error(table.first, f"bars of several intervals ({', '.join(intervals[:4])}) in "
                                       f"the column {names[columns['interval']]!r}; keep one of "
                                       f"them a file")
    like_price = ((volume > 0.5 * low) & (volume < 2 * high)).mean() > 0.9
    if like_price and not table.has_header and len(names) != len(BINANCE):
        raise table.error(table.first + 1, f"no header, and the column behind the close looks like "
                                           f"a price; {FIRST_LINE}")
    has_volume = "volume" in columns
    base = volume * close if has_volume else np.ones(len(amount))
    for value in (volume, amount):
        if (value == -1).all():
            value[:] = np.nan  # Interactive Brokers' way to have none
    traded = (amount > 0) & (base > 0)
    ratio, swapped = 1, np.nan
    if traded.any():
        with np.errstate(over="ignore", divide="ignore"):   # of numbers that are faults, see below
            ratio = np.median(amount[traded] / base[traded])
            swapped = np.median(volume[traded] / (amount * close)[traded])
    if 0.5 < swapped < 2 and not 0.25 < ratio < 4:
        ohlcva[4:] = ohlcva[[5, 4]]
        table.say(f"{names[columns['volume']]!r} is {names[columns['amount']]!r} times price: they "
                  f"change places")
    elif not (1e-4 if has_volume else 1) <= ratio <= 1e6 or (amount < 0).mean() > MAX_BAD:
        amount[:] = np.nan  # but lots of 100, or money in thousands, may be
        table.say(f"{names[columns['amount']]!r} is not volume times price; no amount is read")
    if not has_volume:
        known = {name for names in HEADERS.values() for name in names}
        others = [repr(name) for name, field in zip(names, table.fields)
                  if name.strip() and field not in known]
        others.sort(key=lambda name: "vol" not in name.lower())
        if others:
            table.say(f"no volume is read, for none of {', '.join(others[:6])} is known to be one; "
                      f"name it volume")


def _symbol_of_rows(table, columns, cells, time, reasons):
    """Array of each row's symbol; None where there is none, or a code of the row."""
    symbols = np.array([cell.strip() for cell in cells[columns["symbol"]]])
    distinct, which = np.unique(symbols, return_inverse=True)
    changes = np.count_nonzero(np.diff(which)) > len(time) // 2  # from row to row
    changes = changes and len(np.unique(time)) == len(time)
    bad = np.array([not symbol or not symbol.isprintable() for symbol in distinct])
    if bad.all() or (changes and table.fields[columns["symbol"]] in ("code", "name")):
        return None
    for row in np.flatnonzero(bad[which]).tolist():
        reasons.setdefault(row, "no symbol, or one with control characters")
    return symbols


def _bars(table, symbols, time, ohlcva, reasons):
    """Bars of each symbol, sorted, without faults.

    symbols: of each row, or of all. reasons: {row: what is wrong}.
    """
    names, code = np.unique(symbols, return_inverse=True)
    code = np.broadcast_to(code, len(time))
    step, same = np.diff(time), code[1:] == code[:-1]
    far = same & (np.abs(step) > 360 * DAY)
    back = far[:-1] & far[1:] & (np.abs(step[:-1] + step[1:]) < 360 * DAY)  # a mistyped year
    for row in (np.flatnonzero(back) + 1).tolist():
        reasons.setdefault(row, f"time {iso(time[row])} is a year or more off the rows around it")
    empty = np.isnan(ohlcva[:4]).all(0)  # a row without any price is no bar, and no fault
    # nor is a day without trade, that repeats the last close
    empty |= (ohlcva[:3] == 0).all(0) & (ohlcva[3] > 0) & ~(ohlcva[4] > 0)
    empty[list(reasons)] = False
    if empty.all():
        return []
    if empty.any() and not any(table.tickers):
        table.say(f"{empty.sum()} of {len(empty)} rows have no price, or no trade: no bars")
    row = np.arange(len(time))
    in_order = np.where(same, step > 0, code[1:] > code[:-1]).all()
    if empty.any() or not in_order:
        row = np.lexsort((time, code))  # stable: of equal times the last stays last
        row = row[~empty[row]]
    time, code, ohlcva = time[row], code[row], ohlcva[:, row]
    _mend(table, ohlcva, code)
    good = _good(table, row, ohlcva, reasons)
    row, time, code, ohlcva = row[good], time[good], code[good], ohlcva[:, good]
    last = _latest(table, names, row, time, code, ohlcva)
    time, code, ohlcva = time[last], code[last], ohlcva[:, last]
    _look_for_jumps(table, names, time, code, ohlcva[3])
    time, ohlcva = time.astype(np.int64), ohlcva.T
    starts = np.flatnonzero(np.append(True, np.diff(code) != 0)).tolist()
    return [Bars(str(names[code[a]]), time[a:b], ohlcva[a:b])
            for a, b in zip(starts, [*starts[1:], len(code)])]


# -- faults

def _mend(table, ohlcva, code):
    """In place: highs and lows inside the body by rounding, a missing open, a negative close.

    An open that is missing or 0 becomes the close before. A negative close within the bar is CRSP's
    mark of a mean of bid and ask: its size counts.
    """
    open_, high, low, close = ohlcva[:4]
    quoted = (low > 0) & (low <= -close) & (-close <= high)
    if quoted.any():
        close[quoted] *= -1
        table.say(f"{quoted.sum()} of {len(quoted)} closes are negative, as means of bid and ask; "
                  f"their size counts")
    lacks = (np.isnan(open_) | (open_ == 0)) & (low > 0) & (low <= close) & (close <= high)
    if lacks.any():
        before = np.append(np.nan, np.where(np.diff(code) == 0, close[:-1], np.nan))
        open_[lacks] = np.clip(np.where(before > 0, before, close), low, high)[lacks]
        table.say(f"{lacks.sum()} of {len(lacks)} rows have no open; the close before stands for "
                  f"it")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    np.copyto(high, top, where=(high < top) & (high >= top * (1 - ROUNDING)))
    np.copyto(low, bottom, where=(low > bottom) & (low <= bottom * (1 + ROUNDING)))


def _good(table, row, ohlcva, reasons):
    """Which bars are good, bool. Bad ones are counted, three are named, too many are an error.

    row: of each bar. reasons: {row: what is wrong}, to which is added.
    """
    bad = np.isin(row, list(reasons))
    for failed, why in faults(ohlcva):
        reasons |= {k: why for k in row[failed & ~bad].tolist()}
        bad |= failed
    n_bad = int(bad.sum())
    if n_bad:
        first = sorted(row[bad].tolist())[:3]
        examples = [f"{table.path}:{table.line(k)}: {reasons[k]}" for k in first]
        if n_bad > MAX_BAD * len(row):
            remedy = "check the columns" if table.has_header else FIRST_LINE
            raise UserError(f"{examples[0]}; {n_bad} of {len(row)} rows are bad, more than "
                            f"{MAX_BAD:.0%}: {remedy}")
        remark(f"{n_bad} bad row{'s' * (n_bad > 1)} of {len(row)} dropped: {'; '.join(examples)}")
    return ~bad


def _latest(table, names, row, time, code, ohlcva):
    """Which bars are the last of their time and symbol, bool.

    UserError if that drops many that differ from the last.
    """
    again = np.append((np.diff(time) == 0) & (np.diff(code) == 0), False)
    unlike = again[:-1] & differ(ohlcva[:, :-1], ohlcva[:, 1:])
    lost = np.bincount(code[:-1][unlike], minlength=len(names))
    rows = np.bincount(code, minlength=len(names))
    worst = int(np.argmax(lost / np.maximum(rows, 1)))
    if lost[worst] > MAX_BAD * rows[worst]:
        k = int(np.flatnonzero(unlike & (code[:-1] == worst))[0])
        raise table.error(
            table.line(row[k + 1]), f"{lost[worst]} of {rows[worst]} rows of {names[worst]} have "
            f"the time of another, as {iso(time[k])} in line {table.line(row[k])}. Several "
            f"symbols, contracts, exchanges or intervals in one file? Keep one a file, or name "
            f"their column symbol. Times rounded by a spreadsheet? Export them in full. Bars "
            f"within a second? Times are whole seconds here")
    if lost.any():
        table.say(f"{lost.sum()} of {len(row)} rows have the time of a later one and give way to "
                  f"it")
    return ~again


def _look_for_jumps(table, names, time, code, close):
    """A word on closes that move as splits and mixed-up units do."""
    ratio = close[1:] / close[:-1]
    at = np.flatnonzero(((ratio > SPLIT) | (ratio < 1 / SPLIT)) & (np.diff(code) == 0))
    if len(at):
        k = int(at[0])
        factor = max(ratio[k], 1 / ratio[k])
        back = k + 1 in at and abs(np.log(ratio[k] * ratio[k + 1])) < 0.2 * np.log(factor)
        why = " and back: mixed units, or a mistyped price?" if back else ": an unadjusted split?"
        more = f" (and {len(at) - 1 - back} more)" if len(at) > 1 + back else ""
        size = f"{factor:.2f}" if factor < 1e4 else f"{factor:.0e}"
        table.say(f"the close of {names[code[k]]} moves by a factor of {size} at "
                  f"{iso(time[k + 1])}{why}{more}")
