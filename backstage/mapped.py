"""A corpus in a folder that is mapped into memory: no more of it is read than is used.

All times and all bars lie in a file each, a symbol behind another; symbols.json, the seal, comes
last: [[symbol, first row, one past], ...].
"""
import contextlib
import json
import os

import numpy as np

from backstage.files import open_regular, sole_writer, write_atomic
from backstage.script import UserError, progress, remark
from backstage.series import YEAR, Bars, faults

SEAL = "symbols.json"
ARRAYS = ("bars.time", "<i8", 1), ("bars.ohlcva", "<f8", 6)     # name, type, numbers a bar
PIECE = 1 << 16         # rows that are checked at once


def joined(parts):
    """Stretches of one symbol as one series; of equal times the last wins.

    UserError where their intervals differ.
    """
    if len(parts) == 1:
        return parts[0]
    gaps = [np.sort(np.diff(part.time)) for part in parts if len(part) > 2]
    gaps = [int(gap[len(gap) // 10]) for gap in gaps]  # as they come close: holes make gaps longer
    symbol = parts[0].symbol
    if gaps and max(gaps) >= 2 * min(gaps):
        raise UserError(f"{symbol}: bars every {min(gaps):,} s in one file and every "
                        f"{max(gaps):,} s in another; give --data the files of one interval")
    time, ohlcva = (np.concatenate(arrays) for arrays in zip(*((p.time, p.ohlcva) for p in parts)))
    order = np.argsort(time, kind="stable")
    time, ohlcva = time[order], ohlcva[order]
    last = np.append(np.diff(time) != 0, True)
    changed = (~last[:-1] & differ(ohlcva[:-1].T, ohlcva[1:].T)).sum()
    if changed:
        remark(f"{symbol}: {changed} of {last.sum()} bars differ between files; the last read "
               f"counts")
    return Bars(symbol, time[last], ohlcva[last])


def differ(left, right):
    """Which of two rows of bars, [6, T], differ; NaN equals NaN."""
    return ((left != right) & ~(np.isnan(left) & np.isnan(right))).any(0)


def write_folder(series, out):
    """Write Bars, any number of them, as a folder for `open_folder`; returns (symbols, bars)."""
    seal, rows, is_new = os.path.join(out, SEAL), {}, not os.path.isdir(out)
    try:
        os.makedirs(out, exist_ok=True)
        with sole_writer(seal):
            if os.path.exists(seal):
                raise UserError(f"{out}: holds a data set already; choose another --out or "
                                f"remove it")
            own = [name for name, _, _ in ARRAYS]       # of a run that was killed
            others = [n for n in os.listdir(out) if n not in own and not n.startswith(".")]
            if others:      # which nobody would read any more
                raise UserError(f"{out}: holds {others[0]!r}; choose a new folder by --out")
            n_bars = _append(series, out, rows)
            if any(len(parts) > 1 for parts in rows.values()):     # put side by side what belongs
                parts, rows = rows, {}
                n_bars = _append(_whole(out, parts, n_bars), out, rows)
            if not rows:
                raise UserError(f"{out}: no bars to write")
            with write_atomic(seal, text=True) as f:
                json.dump([[symbol, *parts[0]] for symbol, parts in rows.items()], f)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); choose another --out")
    finally:
        if is_new and not os.path.exists(seal):
            with contextlib.suppress(OSError):  # nothing was written: no empty folder is left
                os.rmdir(out)
    progress("")
    return len(rows), n_bars


def _append(series, out, rows):
    """Write Bars, and in `rows` {symbol: [(first, one past) of each part]}; returns how many."""
    n_bars = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(write_atomic(os.path.join(out, name)))
                 for name, _, _ in ARRAYS]
        for bars in series:
            if not _is_symbol(bars.symbol):
                raise UserError(f"{bars.symbol[:40]}...: a symbol of over 200 letters; give it a "
                                f"shorter name")
            rows.setdefault(bars.symbol, []).append((n_bars, n_bars + len(bars)))
            n_bars += len(bars)
            for f, array, (_, kind, _) in zip(files, (bars.time, bars.ohlcva), ARRAYS):
                f.write(np.ascontiguousarray(array, kind).data)
            progress(f"{len(rows)} symbols, {n_bars:,} bars")
    return n_bars


def _whole(out, rows, n_bars):
    """Yield each symbol's Bars, its parts put together."""
    time, ohlcva = _mapped(out, n_bars)
    for symbol, parts in rows.items():
        yield joined([Bars(symbol, time[a:b], ohlcva[a:b]) for a, b in parts])


def _mapped(folder, n_bars):
    """int64 [n_bars] and float64 [n_bars, 6], mapped; ValueError for files of another length."""
    for name, kind, width in ARRAYS:
        with open_regular(os.path.join(folder, name)) as f:
            if os.fstat(f.fileno()).st_size != 8 * width * n_bars:
                raise ValueError(f"{name} has not the {n_bars:,} bars of {SEAL}")
            yield np.memmap(f, kind, "r", shape=(n_bars, width) if width > 1 else n_bars)


def _is_symbol(name):
    return isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()


def open_folder(folder):
    """The series of a folder, mapped into memory and checked whole: who reads on may trust them."""
    try:
        with open_regular(os.path.join(folder, SEAL)) as f:
            listed = json.load(f)
        names, first, end = zip(*listed)
        good = all(map(_is_symbol, names)) and len(set(names)) == len(names)
        good = good and all(type(row) is int for row in end) and [0, *end[:-1]] == list(first)
        if not good or not all(a < b for a, b in zip(first, end)):
            raise ValueError(f"{SEAL} is no list of different symbols and their rows")
        time, ohlcva = _mapped(folder, end[-1])
        _check_arrays(time, ohlcva, names, np.array(first))
        return [Bars(name, time[a:b], ohlcva[a:b]) for name, a, b in listed]
    except Exception as e:  # numpy and json raise many kinds for a damaged file
        why = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
        raise UserError(f"{folder}: not a whole data set ({why}); write it again with "
                        f"python data.py --out")


def _check_arrays(time, ohlcva, names, first):
    """ValueError for rows that are no bars, or do not rise within a symbol; piece by piece."""
    for i in range(0, len(time), PIECE):
        stamps = np.asarray(time[i:i + PIECE + 1])  # with the first of the next piece
        beyond = (stamps < -229 * YEAR) | (stamps > 229 * YEAR)
        falls = np.diff(stamps) <= 0
        begins = slice(*np.searchsorted(first, (i + 1, i + 1 + len(falls))))
        falls[first[begins] - i - 1] = False
        broken = faults(np.asarray(ohlcva[i:i + PIECE]).T)
        for failed, why in ((beyond, "its times are none"), (falls, "its times do not rise"),
                            *broken):
            if failed.any():
                row = i + int(np.argmax(failed))
                which = int(np.searchsorted(first, row, "right")) - 1
                raise ValueError(f"{names[which]}: bar {row - first[which]}: {why}")
