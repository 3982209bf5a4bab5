"""What sample.py and backtest.py read, and what they refuse or warn of before any work."""
import contextlib
import csv
import io
import math
import os

import numpy as np

import data
from backstage.dates import iso, read_dates
from backstage.files import check_out, files_in, fingerprint, open_regular
from backstage.script import UserError, remark
from backstage.series import DAY, HOUR

PATHS, ALL_PATHS, LEAST_PATHS = 200, 200_000, 40     # of a symbol; of all together; of a symbol
FAR = 2.5  # factor between the spacings of bars from which on a model knows little of them


def load_series(sources, meta, symbols=None):
    """The bars to look at: --data, else what the checkpoint was trained on; only `symbols` where
    given."""
    trained = meta["data"] or {}
    if not sources and not trained:
        raise UserError("the checkpoint does not say what it was trained on; name bars by --data")
    named, sources = bool(sources), sources or trained["sources"]
    if sources == ["synthetic"]:
        series, _ = data.synthetic(seed=trained.get("seed", meta["seed"]))
    else:
        series = data.load(sources) if named else trained_bars(trained)
    if not symbols:
        return series
    known = {bars.symbol: bars for bars in series}
    for symbol in symbols:
        if symbol not in known:
            some = ", ".join(sorted(known)[:8]) + " ..." * (len(known) > 8)
            raise UserError(f"--symbols {symbol}: not in the data, which has {some}")
    return [known[symbol] for symbol in dict.fromkeys(symbols)]


def long_enough(series):
    """Those with more bars than CONTEXT, and a word on the others. UserError without any."""
    histories = [bars for bars in series if len(bars) > data.CONTEXT]
    if not histories:
        raise UserError(f"no symbol has more than {data.CONTEXT} bars, the least to forecast from; "
                        f"give more bars")
    if len(histories) < len(series):
        remark(f"{len(series) - len(histories)} of {len(series)} symbols have at most "
               f"{data.CONTEXT} bars and are skipped")
    return histories


def trained_until(named, meta):
    """The stamp from which bars are new to the weights; None where they are of other markets."""
    def names_of(sources):  # of the files, also those of folders and globs; arrays go by the folder
        files = (f for f in files_in(sources) if not f.endswith((".ohlcva", ".time", ".json")))
        return {os.path.basename(os.path.normpath(name)) for name in (*sources, *files)}
    is_own = not named or names_of(named) & names_of((meta["data"] or {}).get("sources", ()))
    return meta["splits"][0] if is_own and meta["splits"] else None


def trained_bars(source):
    """The bars that a checkpoint names. It may come from anyone: of other files than those not a
    word is shown."""
    with contextlib.suppress(UserError, OSError), contextlib.redirect_stderr(io.StringIO()):
        series = data.load(source["sources"])
        if source["fingerprint"] == fingerprint(series):
            return series
    raise UserError(f"{', '.join(source['sources'][:3])}: not the bars that the checkpoint was "
                    f"trained on; name bars by --data")


def check(config):
    """Refuse, before any work, flags that cannot be; without --ckpt, name the weights that come
    along."""
    if config.backtest:
        raise UserError("--backtest: it is a script of its own, python backtest.py --ckpt ... with "
                        "the same flags")
    if config.ckpt is None:
        config.ckpt = base_weights(config.data)
    for strike in config.strike or ():
        try:
            valid = 1e-30 < float(strike.removesuffix("x")) < 1e30
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"--strike {strike}: must be a price such as 105, or a share of spot "
                            f"such as 1.05x")
    for name, value in (("horizon", config.horizon), ("paths", config.paths)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not abs(config.rate) <= 1:
        raise UserError(f"--rate {config.rate}: must be a rate a year such as 0.04, at most 1")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")


def paths_of_each(n):
    """How many paths each of n symbols has unless told, with a word where that is less."""
    paths = max(LEAST_PATHS, min(PATHS, ALL_PATHS // n))
    if paths < PATHS:
        error, usual = (math.sqrt(0.05 * 0.95 / k) / 0.103 for k in (paths, PATHS))     # normal
        remark(f"{n:,} symbols: {paths} paths of each, so that 5 and 95 % are known to {error:.2f} "
               f"standard deviations; with --paths {PATHS} to {usual:.2f}")
    return paths


def check_outputs(config, meta):
    """Refuse outputs that are read, are another output, or exist already."""
    bars = config.data or (meta["data"] or {}).get("sources", ())
    reads = [config.ckpt, config.times, *(config.weights or ()), *bars]
    outputs = config.out, config.paths_out, config.plot, config.plot_codebook, config.plot_loss
    for path in (path for path in outputs if path is not None):
        check_out(path, True, reads)
        reads.append(path)
        if os.path.exists(path) and not config.overwrite:
            raise UserError(f"{path}: exists already; replace it with --overwrite or choose "
                            f"another name")


def base_weights(sources):
    """The path of the weights that come along; they need bars of the user's own."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(root, "assets", "base.pt")
    if not os.path.exists(path):
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if not sources:
        raise UserError("--data is missing: name the bars, which the weights that come along have "
                        "not seen")
    return path


def read_times(path, histories, horizon):
    """Of each history the next stamps in a file, int64 [n, horizon].

    The file: stamps, one a line; with a header it may have a column symbol beside the time.
    """
    try:
        with open_regular(path) as f:
            lines = f.read().decode("utf-8-sig").splitlines()
        lines = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        why = getattr(e, "strerror", None) or "not a text of dates"
        raise UserError(f"--times {path}: cannot be read ({why}); give a file of dates, one a line")
    head = [name.lower() for name in lines[0]] if lines else []
    has_head = "symbol" in head or bool(head) and any(name in head[0] for name in ("time", "date"))
    of = head.index("symbol") if "symbol" in head else None
    at = next(i for i in (0, 1) if i != of)
    filled = [(number, row) for number, row in enumerate(lines, 1) if any(row)][has_head:]
    texts = [row[at] if len(row) > max(at, of or 0) else "" for _, row in filled]
    stamps = {}
    for (number, row), when in zip(filled, read_dates(texts)[0] if texts else ()):
        if math.isnan(when):
            raise UserError(f"{path}:{number}: {','.join(row)[:40]!r} is no time; write it as "
                            f"2018-01-31 or 2018-01-31 14:30")
        stamps.setdefault(None if of is None else row[of], set()).add(int(when))
    rows = []
    for bars in histories:
        own = np.array(sorted(stamps.get(None if of is None else bars.symbol, ())), np.int64)
        rows.append(own[own > bars.time[-1]][:horizon])
        if len(rows[-1]) < horizon:
            raise UserError(f"--times {path}: {len(rows[-1])} stamps after the last bar of "
                            f"{bars.symbol}, {iso(bars.time[-1])}; {horizon} are needed: add more "
                            f"or lower --horizon")
    return np.array(rows)


def warn_of_intervals(series, meta, who="the weights"):
    """A line on stderr for each spacing of bars that is far from all that the checkpoint was
    trained on."""
    known = (meta.get("data") or {}).get("intervals")
    if not known:
        return  # an older checkpoint does not say
    far = {}
    for bars in series:
        step = float(np.median(np.diff(bars.time)))
        if not any(k / FAR <= step <= FAR * k for k in known):
            far.setdefault(duration(step), []).append(bars.symbol)
    lowest, highest = duration(min(known)), duration(max(known))
    trained = f"{lowest} apart"
    if lowest != highest:
        trained = f"{lowest} to {highest} apart and none near"
    for step, symbols in far.items():
        more = f" and {len(symbols) - 1} more" if len(symbols) > 1 else ""
        remark(f"{symbols[0]}{more}: bars {step} apart, {who} were trained on bars {trained}: "
               f"trust this less")


def duration(seconds):
    """A time as people say it: 5 min."""
    for unit, size in (("d", DAY), ("h", HOUR), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
