"""Which bars a backtest may score, and what it refuses or warns of before it begins."""
import math
import sys

from backstage.checkpoint import SEEN_DATES
from backstage.dates import iso, parse_time
from backstage.scores import MIN_BLOCKS
from backstage.script import UserError


def span_of(metas, split, start, end):
    """(split, first time stamp, end) of the targets. In-sample ones only where asked for.

    metas: {name of a checkpoint: its meta}.
    """
    if split not in ("val", "test"):
        raise UserError(f"--split {split}: choose val or test, or name the targets by --start and "
                        f"--end")
    lo = -math.inf if start is None else parse_time(start)
    hi = 2**62 if end is None else parse_time(end)
    for name, date, time in (("start", start, lo), ("end", end, hi)):
        if math.isnan(time):
            raise UserError(f"--{name} {date}: not a date; write it as 2018-01-01")
    borders = {name: tuple(meta.get("splits") or ()) for name, meta in metas.items()}
    # beside weights that have a test of their own, this one counts
    borders = {name: pair for name, pair in borders.items() if not no_test(pair)} or borders
    if start is not None:
        tests = [pair[1] for pair in borders.values() if pair]
        seen = len(tests) < len(borders) or lo < max(tests, default=math.inf)
        split = "in-sample" if seen else "test"
    else:
        val, test = common_borders(borders)
        lo, hi = (val, min(hi, test)) if split == "val" else (test, hi)
    if split != "in-sample" and lo < max(seen_until(meta) for meta in metas.values()):
        split += ", overlap"
    if hi <= lo:
        raise UserError(f"--end {end}: not after the first target, {iso(lo)}; "
                        f"targets before it are in-sample and need --start")
    return split, int(lo), int(hi)


def common_borders(borders):
    """The dates (val, test) of all checkpoints {name: dates}; else UserError says what to type."""
    for name, pair in borders.items():
        if not pair:
            raise UserError(f"{name} does not say at which dates its bars were split: name the "
                            f"first target, as --start 2018-07-01 (what it has seen is not known)")
    if len(set(borders.values())) > 1:
        first, last = (f(borders.values(), key=max) for f in (min, max))
        date = iso(-(-last[1] // 60) * 60)
        date = f'"{date}"' if " " in date else date
        raise UserError(f"the checkpoints were split at different dates (test from {iso(first[1])} "
                        f"and {iso(last[1])}): add --start {date}, from when on it is test for all")
    return next(iter(borders.values()))


def seen_until(meta):
    """Up to when the weights, or those that they were tuned from, may have seen the bars: by
    --overlap, or as weights of many markets, which have no test."""
    overlap, pair = (meta.get("data") or {}).get("overlap"), meta.get("splits") or ()
    seen = math.inf if overlap is True else overlap or -math.inf
    return max(seen, pair[0]) if no_test(pair) else seen


def no_test(pair):
    """Whether the dates (val, test) are those of weights of many markets, each with its own val."""
    return len(set(pair)) == 1


def heading(t, meta):
    """What a later stage says above its scores on test."""
    seen = t.time.min() < seen_until(meta)
    return f"test: {SEEN_DATES}" if seen else "test, which nothing above has seen"


def check(horizon, stride, paths, by):
    if horizon < 1 or paths < 2 or (stride is not None and stride < 1):
        raise UserError(f"--horizon {horizon}, --stride {stride}: must be at least 1, and "
                        f"--paths {paths} at least 2 in a backtest")
    if by not in (None, "symbol", "quarter", "volatility"):
        raise UserError(f"--by {by}: choose symbol, quarter or volatility")


def warn(t):
    """Of too few blocks for intervals."""
    for what, n in (("the next bar", t.n_blocks), (f"{t.horizon} bars ahead", t.blocks_of("path"))):
        if n < MIN_BLOCKS:
            print(f"warning: no intervals for scores of {what}: {n} blocks of time, {MIN_BLOCKS} "
                  f"are the least; give more bars, or lower --stride or --horizon", file=sys.stderr)
