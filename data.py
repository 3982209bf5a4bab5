"""Bars in, features and batches out: everything that touches market data, once, for every stage.

    python data.py --data 'csv/*.csv' --out folder       # CSV -> a folder of memory-mapped arrays that --data takes
    python data.py --synthetic 100000 --out folder       # the same from the synthetic market
    python data.py --synthetic 100000 --kind reverting   # another one, in which a deviation decays

CSV -> clean `Bars` -> causal features [T, 6] -> (tokenizer) -> tokens -> batches; and back to bars with `inverse`. In
parts: features, splits and batches, synthetic markets, the clock to come; then files in, files out, the command line.
"""
import argparse
import bz2
import contextlib
import csv
import datetime
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import typing
import warnings
import zipfile
import zoneinfo
try:
    import fcntl
    import resource
except ImportError:  # Windows: there the last writer wins, and memory is not told
    fcntl = resource = None
from collections import Counter
from dataclasses import dataclass, fields, replace

# Ctrl-C while torch loads, which takes a second, ends a script of this folder without a traceback
_script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
_is_ours = os.path.dirname(_script) == os.path.dirname(os.path.abspath(__file__))
_dies = _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _dies:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
if _dies:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHANNELS = ("close", "open", "upper", "lower", "volume", "vwap")  # last axis of the features
COLUMNS = ("open", "high", "low", "close", "volume", "amount")    # last axis of ohlcva
CONTEXT = 32            # first bars of a series: context, never targets (the scales are still settling)
HALF_LIFE = 32          # bars; of every exponentially weighted mean below
DECAY = 0.5 ** (1 / HALF_LIFE)
PIECE = 512             # bars of one pass: in cache, and memory bounded on mapped bars
S_FLOOR, D_FLOOR = 1e-5, 1e-2  # least scale of log prices, of log volume
MAX_MOVE = np.log(10.0)        # most that one generated bar may move, in log price
FARTHEST = 10.0                # and in units of s_t in a generation, where history shows nothing wilder
SETTLED = 16.0                 # weight of the bars from which on s_t is taken to be settled
HOUR, DAY, WEEK, YEAR = 3600, 86400, 7 * 86400, 365.25 * 86400


class UserError(Exception):
    """Something the user can mend: one line that names the file, the line and the remedy; exit status 2."""


@dataclass
class Bars:
    """One symbol's bars.  time: int64 [T], UTC seconds, strictly increasing.

    ohlcva: float64 [T, 6], open, high, low, close, volume, amount; NaN where a column is missing.
    """
    symbol: str
    time: np.ndarray
    ohlcva: np.ndarray

    def __len__(self):
        return len(self.time)

    def __getitem__(self, rows):
        return Bars(self.symbol, self.time[rows], self.ohlcva[rows])


# ----------------------------------------------------------------------------------------------------------------------
# Causal features and their inverse
#
# Six numbers for bar t. The scales s, m, d, g come from the bars before t, so that no input can see its own target:
#
#     close   log(C_t / C_{t-1}) / s_t          upper   log(H_t / max(O_t, C_t)) / s_t
#     open    log(O_t / C_{t-1}) / s_t          lower   log(min(O_t, C_t) / L_t) / s_t
#     volume  (log(1 + V_t) - m_t) / d_t        vwap    (log(A_t / (V_t C_t)) - g_t) / s_t
#
# then asinh, which shrinks tails and clips nothing. The scales are decayed means
#
#     mean_t(u) = sum_{i<t} a^(t-i) w_i u_i / sum_{i<t} a^(t-i) w_i,        a = 0.5^(1/32),
#
#     s of the true range log(max(H, previous C) / min(L, previous C))      m of log(1 + V)
#     d of |log(1 + V) - m|                                                 g of log(A / (V C))
#
# where the weight w is 0 for a bar that has no u, and for bar 0, which has no previous close.

@dataclass
class State:
    """What the features of the next bar need of the past: float64, of any batch shape [...]."""
    close: np.ndarray    # [...]: the last close; NaN before the first bar
    total: np.ndarray    # [..., 4]: the numerators of s, m, g, d
    weight: np.ndarray   # [..., 4]: their denominators
    widest: np.ndarray   # [...]: the largest true range so far, in units of its bar's s
    origin: np.ndarray   # [..., 3]: where a generation began: s and d there, the most that a bar may move, in s; else NaN

    @classmethod
    def stack(cls, states):
        """n single states as one of shape [n, 1], to be broadcast over paths."""
        return cls(*(np.array([getattr(s, k.name) for s in states])[:, None] for k in fields(cls)))

    def scales(self):
        """(s, m, d, g), [...] each."""
        mean = _mean(self.total, self.weight)
        low, high = _bounds(self.origin)
        s, d = np.moveaxis(np.minimum(np.maximum(mean[..., ::3], low), high), -1, 0)
        return s, mean[..., 1], d, mean[..., 2]

    def anchored(self):
        """The same state as the origin of a generation, in which s and d stay within [1/8, 8] of now.

        And no bar moves by more than twice the widest so far: a code of wild days, which a model of many markets gives a
        chance of 1 in 10,000, would else multiply a calm stock's price by ten now and then.
        """
        s, _, d, _ = self.scales()
        return replace(self, origin=np.stack([s, d, np.maximum(2 * self.widest, FARTHEST)], axis=-1))

    def map(self, f):
        """f on every field: to index, repeat or stack states. The axes of the batch lead."""
        return State(*(f(getattr(self, k.name)) for k in fields(self)))


START = State(np.float64(np.nan), np.zeros(4), np.zeros(4), np.float64(0.0), np.full(3, np.nan))  # before the first bar
SMG, D = slice(3), slice(3, 4)                                                   # places of the means in a State


def _bounds(origin):
    """The least and the greatest s and d, [..., 2] each. A NaN does not bind."""
    scales = origin[..., :2]
    return np.fmax(scales / 8, (S_FLOOR, D_FLOOR)), np.fmin(scales * 8, np.inf)


def features(bars) -> tuple[np.ndarray, State]:
    """Causal features of a series: x float32 [T, 6], columns as in CHANNELS, and the State after it.

    Row 0 is zero; a channel without data is exactly 0. ValueError for no bars.
    """
    pieces = list(feature_pieces(bars))
    return np.concatenate([x for x, _ in pieces]), pieces[-1][1]


def feature_pieces(bars, state=START):
    """Yield (x float32 [n, 6], State after them) piece by piece, so that mapped bars need no memory."""
    for i in range(0, len(bars), PIECE):
        o, h, l, c, v, a = np.asarray(bars.ohlcva[i:i + PIECE], np.float64).T             # (n,) each
        first = np.isnan(state.close)
        previous = np.append(c[0] if first else state.close, c[:-1])
        begun = np.ones(len(c))
        begun[0] = 0.0 if first else 1.0
        has_v = np.where(v > 0, begun, 0.0)
        has_a = np.where(a > 0, has_v, 0.0)
        volume = np.log1p(np.where(v > 0, v, 0.0))
        vwap = np.log(np.where(has_a > 0, a, 1.0) / np.where(has_a > 0, v * c, 1.0))

        true_range = _true_range(h, l, previous)
        total, weight = _sums(state, SMG, [true_range, volume, vwap], [begun, has_v, has_a])
        s, m, g = _mean(total, weight)[:, :-1]                                            # (n,) each
        deviates = has_v * (weight[1, :-1] > 0)  # a deviation needs a level to deviate from
        total_d, weight_d = _sums(state, D, [np.abs(volume - m)], [deviates])
        [d] = _mean(total_d, weight_d)[:, :-1]

        s, d = np.maximum(s, S_FLOOR), np.maximum(d, D_FLOOR)
        price = np.log(np.stack([c / previous, o / previous, h / np.maximum(o, c), np.minimum(o, c) / l])) / s
        if first:
            price[:, 0] = 0.0
        x = np.concatenate([price, [(volume - m) / d * has_v, (vwap - g) / s * has_a]])   # (6, n)
        widest = (true_range / s).max(where=weight[0, :-1] > SETTLED, initial=state.widest)
        total, weight = np.append(total[:, -1], total_d[:, -1]), np.append(weight[:, -1], weight_d[:, -1])
        state = State(c[-1], total, weight, widest, state.origin)
        yield np.ascontiguousarray(np.arcsinh(x).astype(np.float32).T), state


def _true_range(high, low, previous):
    return np.log(np.maximum(high, previous) / np.minimum(low, previous))


def _sums(state, which, u, w):
    """Numerators and denominators of the means `which` before each of n bars and after the last, [2, k, n + 1]."""
    before = np.stack([state.total[which], state.weight[which]])                          # (2, k)
    after = decayed_sum(np.stack([np.multiply(u, w), w]), before)                         # (2, k, n)
    return np.concatenate([before[..., None], after], axis=-1)


def _mean(total, weight):
    return total / np.where(weight > 0, weight, 1.0)


def decayed_sum(u, carry=np.float64(0.0), decay=DECAY):
    """y_t = sum_{i<=t} decay^(t-i) u_i + decay^(t+1) carry along the last axis, in log2(T) elementwise passes.

    After pass k each y_t holds its last 2^k terms. Elementwise, so a bar's value depends on no later bar, to the bit.
    """
    y = u.copy()
    n, shift = y.shape[-1], 1
    while shift < n and decay ** shift > 1e-18:  # weights below the last bit add nothing
        y[..., shift:] += decay ** shift * y[..., :-shift]
        shift *= 2
    return y + carry[..., None] * decay ** np.arange(1, n + 1)


def inverse(x, state) -> tuple[np.ndarray, State]:
    """Bars from features: the inverse of `features` to float32's rounding, from a State that has seen a bar.

    x: [..., T, 6], finite (ValueError if not), state: of shape [...] -> ohlcva float64 [..., T, 6], the State after.
    Whatever x holds, each bar is a valid candle: negative wicks become 0, a move at most a factor of 10, volume >= 0.
    Without volume in the history, volume is 0; without amounts, amount is volume times close. A volume or vwap feature
    of exactly 0 says "no data".
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a feature is not finite")
    batch, n = x.shape[:-2], x.shape[-2]
    close, widest = np.broadcast_to(state.close, batch), np.broadcast_to(state.widest, batch)
    origin = np.broadcast_to(state.origin, (*batch, 3))
    total = np.moveaxis(np.broadcast_to(state.total, (*batch, 4)), -1, 0)                 # (4, ...)
    weight = np.moveaxis(np.broadcast_to(state.weight, (*batch, 4)), -1, 0)
    low, high = (np.moveaxis(bound, -1, 0) for bound in _bounds(origin))                  # (2, ...) each
    ones = [1] * len(batch)
    down, up = np.reshape([-1, -1, 0, -1], (4, *ones)), np.reshape([1, 1, 1, 0], (4, *ones))    # where c, o, h, l may go
    y = np.moveaxis(np.sinh(np.clip(x, -30.0, 30.0)), (-2, -1), (0, 1))                   # (T, 6, ...)
    y[:, 3] *= -1.0  # the low moves down
    out = np.empty((n, 6) + batch)
    u, w = np.ones((2, 4) + batch)  # what each bar adds to the means: values and weights
    for t in range(n):
        mean = _mean(total, weight)
        s, d = np.minimum(np.maximum(mean[::3], low), high)
        m, g = mean[1], mean[2]
        farthest = np.fmin(origin[..., 2] * s, MAX_MOVE)
        factor = np.exp(np.minimum(np.maximum(y[t, :4] * s, down * farthest), up * farthest))
        c, o = np.minimum(np.maximum(close * factor[:2], 1e-100), 1e100)
        h, l = np.maximum(o, c) * factor[2], np.minimum(o, c) * factor[3]
        seen = (weight > 0) | (weight[0] == 0)  # after bar 0 alone nothing says yet that a column is missing
        has_v = (y[t, 4] != 0) & seen[1]
        has_a = (y[t, 5] != 0) & seen[2] & has_v
        volume = np.minimum(np.maximum(m + y[t, 4] * d, 0.0), 80.0) * has_v
        vwap = np.minimum(np.maximum(g + y[t, 5] * s * has_a, -80.0), 80.0)
        v = np.expm1(volume)
        out[t] = o, h, l, c, v, v * c * np.exp(vwap)
        true_range = _true_range(h, l, close)
        widest = np.where(weight[0] > SETTLED, np.maximum(widest, true_range / s), widest)
        u[...] = true_range, volume, vwap, np.abs(volume - m)
        w[1:] = has_v, has_a, has_v & (weight[1] > 0)
        close, total, weight = c, DECAY * total + u * w, DECAY * weight + w
    total, weight = np.moveaxis([total, weight], 1, -1)
    return np.moveaxis(out, (0, 1), (-2, -1)), State(close, total, weight, widest, origin)


def scales(bars):
    """s_t of every bar, [T]: log return = sinh(close feature) * s_t."""
    _, h, l, c = bars.ohlcva[:, :4].T
    begun = (np.arange(len(c)) > 0).astype(float)  # bar 0 enters no mean
    total, weight = _sums(START, slice(1), [_true_range(h, l, np.append(c[0], c[:-1]))], [begun])
    return np.maximum(_mean(total, weight)[0, :-1], S_FLOOR)


def states_at(bars, origins):
    """The States after bars `origins` (rising, below len(bars)), as `features` of the bars up to each gives them."""
    state, found = START, []
    for i in range(0, max(origins, default=-1) + 1, PIECE):
        found += [next(feature_pieces(bars[i:o + 1], state))[1] for o in origins if i <= o < i + PIECE]
        state = next(feature_pieces(bars[i:i + PIECE], state))[1]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Splits, tokens, batches

def split_borders(series, val_start=None, test_start=None) -> tuple[int, int]:
    """(val_start, test_start) in UTC seconds: train < val_start <= val < test_start <= test, over all symbols at once.

    Given as dates, or None: 80/10/10 % of the distinct time stamps.
    """
    stamps = series[0].time
    for bars in series[1:]:
        if not np.array_equal(stamps, bars.time):
            stamps = np.union1d(stamps, bars.time)
    borders = []
    for name, date, share in (("val_start", val_start, 0.8), ("test_start", test_start, 0.9)):
        border = stamps[int(share * len(stamps))] if date is None else parse_time(date)
        if np.isnan(border):
            raise UserError(f"--{name} {date}: not a date; write it as 2018-01-01")
        borders.append(int(border))
    if not stamps[0] < borders[0] < borders[1]:
        raise UserError(f"the split leaves no room: bars begin {iso(stamps[0])}, val {iso(borders[0])}, "
                        f"test {iso(borders[1])}; set --val_start and --test_start in this order")
    return borders[0], borders[1]


def targets_of(bars, split, borders):
    """[first, last) of the bars that are targets in "train", "val" or "test"; context may reach back before first."""
    val, test = np.searchsorted(bars.time, borders)
    first, last = {"train": (0, val), "val": (val, test), "test": (test, len(bars))}[split]
    return max(int(first), CONTEXT), int(last)


@dataclass
class Streams:
    """Token series of many symbols, and which of their bars are targets.

    A window is named by its last target e: its inputs are the bars e - block_size .. e - 1, its targets one bar later.
    """
    tokens: list          # per symbol int16 [T, 2]: coarse, fine
    time: list            # per symbol int64 [T]
    targets: np.ndarray   # int64 [symbols, 2]: first target, one past the last
    block_size: int       # bars of context in a window
    batch_size: int       # windows in the global batch
    whole: bool = False   # only windows in which every bar is a target
    weights: np.ndarray | None = None  # float64 [symbols]: how often each is drawn; None: as it has windows

    def __post_init__(self):
        first = self.targets[:, 0] + (self.block_size - 1) * self.whole
        self.first_end = np.maximum(first, self.block_size)                   # [symbols]: the least e
        self.count = np.maximum(self.targets[:, 1] - self.first_end, 0)       # [symbols]: windows of each
        self.windows = np.cumsum(self.count)                                  # [symbols]: up to and with each


def make_streams(series, tokens, split, borders, block_size, batch_size) -> Streams:
    """Streams whose targets lie in one split; windows of training hold targets only, if a series is that long."""
    targets = np.array([targets_of(bars, split, borders) for bars in series], np.int64).reshape(-1, 2)
    whole = split == "train" and bool((targets[:, 1] - targets[:, 0] >= block_size).any())
    return Streams(tokens, [bars.time for bars in series], targets, block_size, batch_size, whole)


def draw_windows(streams, seed, step, rank=0, world=1):
    """(symbol, last target) of rows rank::world of the global batch, int64 [B] each; (seed, step) alone decide."""
    random, n = np.random.default_rng([seed, step]), streams.batch_size
    if streams.weights is None:  # each window alike
        draws = random.integers(streams.windows[-1], size=n)[rank::world]
        which = np.searchsorted(streams.windows, draws, side="right")
        place = draws - (streams.windows - streams.count)[which]
    else:
        which = random.choice(len(streams.weights), size=n, p=streams.weights)[rank::world]
        place = (random.random(n)[rank::world] * streams.count[which]).astype(np.int64)
    return which, streams.first_end[which] + place


def balanced(series, streams):
    """Weights [symbols], so that no market or interval rules: each by the root of its bars, within it by windows.

    A market is what stands behind an @ in a symbol's name (EURUSD@fx), an interval the median spacing of the bars.
    """
    groups = [f"{bars.symbol.partition('@')[2]} {int(np.median(np.diff(bars.time)))}" for bars in series]
    group = np.unique(groups, return_inverse=True)[1]
    weights = streams.count / np.sqrt(np.maximum(1, np.bincount(group, streams.count)))[group]
    return weights / weights.sum()


def get_batch(streams, seed, step, rank=0, world=1):
    """Rows rank::world of the global batch, a pure function of (seed, step); as `gather` returns them."""
    return gather(streams, *draw_windows(streams, seed, step, rank, world))


def gather(streams, which, ends):
    """coarse, fine, time, (target_coarse, target_fine), torch.int64 [B, block_size] each, of the windows (which, ends).

    A target that does not count (context, another split) is -1.
    """
    n = streams.block_size
    tokens = np.stack([streams.tokens[i][e - n:e + 1] for i, e in zip(which, ends)])      # (B, n + 1, 2)
    time = np.stack([streams.time[i][e - n:e] for i, e in zip(which, ends)])              # (B, n)
    at = np.asarray(ends)[:, None] + np.arange(1 - n, 1)                                  # (B, n): of each target
    counts = at >= streams.targets[which, :1]
    target = np.where(counts[..., None], tokens[:, 1:], -1)                               # (B, n, 2)
    parts = (tokens[:, :-1, 0], tokens[:, :-1, 1], time, target[..., 0], target[..., 1])
    coarse, fine, time, *target = (torch.from_numpy(part.astype(np.int64)) for part in parts)
    return coarse, fine, time, tuple(target)


def tiles(streams, at_most):
    """Windows (symbol, last target) side by side, evenly thinned to at_most: what a loss is measured on.

    Cut from the last target backwards; the first targets of a series may fit into no window.
    """
    found = []
    for symbol, first in enumerate(streams.first_end.tolist()):
        last = int(streams.targets[symbol, 1]) - 1
        found += [(symbol, end) for end in range(last, first - 1, -streams.block_size)]
    keep = np.linspace(0, len(found) - 1, min(at_most, len(found))).round().astype(int)
    return [found[k] for k in keep]


def tokenize(bars, tokenizer, x=None) -> np.ndarray:
    """Tokens of a series, int16 [T, 2]: coarse, fine; made in pieces. x: its features, where at hand."""
    if x is not None and len(x) != len(bars):
        raise ValueError(f"features of {len(x)} bars for a series of {len(bars)}")
    tokens = [np.empty((0, 2), np.int16)]
    pieces = (piece for piece, _ in feature_pieces(bars)) if x is None else np.split(x, range(PIECE, len(x), PIECE))
    for piece in pieces:
        coarse, fine = tokenizer.encode(torch.from_numpy(piece))                          # (n,) each
        tokens.append(torch.stack((coarse, fine), dim=-1).cpu().numpy().astype(np.int16))
        if len(tokens) % 256 == 0:
            progress(f"tokens of {bars.symbol}: {len(tokens) * PIECE:,} of {len(bars):,} bars")
    progress("")
    return np.concatenate(tokens)


# -- more series to train on, from those at hand

def around_the_clock(bars):
    """Whether a series has bars in every hour of the day, each within one of them: crypto, currencies."""
    return len(bars) > 1 and np.median(np.diff(bars.time)) <= HOUR and len(np.unique(bars.time // HOUR % 24)) == 24


def part_of_day(bars, random):
    """The bars of some hours of the day, 5 to 9 of them, drawn by `random`: like an exchange that opens and closes."""
    first, length = random.integers(24), random.integers(5, 10)
    return bars[(bars.time // HOUR - first) % 24 < length]


def mirrored(bars):
    """The market quoted the other way round, as USDEUR is to EURUSD: prices become 1 / price, volume stays.

    In training it keeps few bars from teaching a direction that is chance.
    """
    open_, high, low, close, volume, amount = bars.ohlcva.T
    amount = volume * volume / np.where(amount > 0, amount, np.nan)
    return Bars(bars.symbol, bars.time, np.stack([1 / open_, 1 / low, 1 / high, 1 / close, volume, amount], axis=1))


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic market

SESSION = 390                              # minutes of a trading day, from 14:30 UTC
KINDS = {"edge": 0.1, "reverting": 0.75}   # kinds of synthetic markets, and the signal of each unless told


def synthetic(seed=0, signal=None, n_symbols=8, n_bars=100_000, *, kind="edge", half_life=8):
    """A market whose best one-bar direction accuracy is known: ([n_bars] minute bars for each symbol, that accuracy).

    Both kinds have weekday sessions that open with a gap, volatility clusters, fat tails (Student t, 4 degrees), volume
    that moves with volatility, symbols that move together. signal=0 is a null market, signal=None the value in KINDS.
    edge: a long lower wick says that the next bar closes up with probability 0.5 + signal, a long upper one down.
    reverting: a deviation that halves in half_life bars, around a slow random walk; signal, from 0 (the walk alone) to
    below 1 (the deviation alone), is its strength. Nothing else tells the direction.
    """
    series = list(synthetic_series(seed, signal, n_symbols, n_bars, kind, half_life))
    return series, best_accuracy(signal, kind, half_life)


def best_accuracy(signal=None, kind="edge", half_life=8):
    """The best one-bar direction accuracy that anyone can reach on a synthetic market, of bars that moved."""
    signal = _checked_signal(signal, kind, half_life)
    return 0.5 + signal if kind == "edge" else reverting_best(signal, half_life)[0]


def synthetic_series(seed=0, signal=None, n_symbols=8, n_bars=100_000, kind="edge", half_life=8):
    """The series of `synthetic`, one at a time."""
    signal = _checked_signal(signal, kind, half_life)
    common = np.random.default_rng([seed, 0])
    day, minute = np.divmod(np.arange(n_bars), SESSION)
    time = 1578268800 + (day // 5 * 7 + day % 5) * DAY + 52200 + minute * 60  # from Monday 2020-01-06, 14:30
    common_vol = decayed_sum(common.normal(0, 0.06, n_bars), decay=0.98)
    coin = common.standard_normal(n_bars)  # moves all symbols
    for i in range(n_symbols):
        rng = np.random.default_rng([seed, 1 + i])
        log_vol = common_vol + decayed_sum(rng.normal(0, 0.1, n_bars), decay=0.95)
        if kind == "edge":
            open_, close, upper, lower, size = _edge_bars(rng, log_vol, coin, signal)
        else:
            open_, close, upper, lower, size = _reverting_bars(rng, log_vol, coin, signal, half_life)
        high, low = np.maximum(open_, close) * np.exp(upper), np.minimum(open_, close) * np.exp(-lower)
        level = rng.uniform(6, 9)
        volume = np.exp(level + 0.7 * log_vol + 0.3 * size + rng.normal(0, 0.4, n_bars)).round() + 1
        amount = volume * (high + low + close) / 3
        yield Bars(f"SYN{i}", time.copy(), np.stack([open_, high, low, close, volume, amount], axis=1))


def _checked_signal(signal, kind, half_life):
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: choose one of {', '.join(KINDS)}")
    signal = KINDS[kind] if signal is None else signal
    limit = 0.5 if kind == "edge" else 1.0
    if not 0 <= signal < limit:
        raise UserError(f"--signal {signal}: must be at least 0 and below {limit} for --kind {kind}")
    if not 1 <= half_life <= 1000:
        raise UserError(f"--half_life {half_life}: must be from 1 to 1000 bars")
    return signal


def _edge_bars(rng, log_vol, coin, signal):
    """Open, close, both wicks in log price, |move| in sigma, [n] each: the long wick tells the next direction."""
    n_bars = len(log_vol)
    sigma = rng.uniform(5e-4, 2e-3) * np.exp(log_vol)
    size = np.abs(rng.standard_t(4, n_bars)) / np.sqrt(2) * sigma
    size[rng.random(n_bars) < 0.01] = 0.0  # one bar in a hundred does not move
    lower_is_long = rng.random(n_bars) < 0.5
    edge = statistics.NormalDist().inv_cdf(0.5 + signal)  # in units of the normal draw below
    told = np.append(0, np.where(lower_is_long, edge, -edge)[:-1])
    up = 0.5 * coin + np.sqrt(0.75) * rng.standard_normal(n_bars) < told
    close = rng.uniform(20, 200) * np.exp(np.cumsum(np.where(up, size, -size)))
    open_ = np.append(close[0], close[:-1]) * np.exp(_gaps(rng, sigma))
    long, short = sigma * rng.uniform(0.5, 1.0, n_bars), sigma * rng.uniform(0.0, 0.2, n_bars)
    upper, lower = np.where(lower_is_long, short, long), np.where(lower_is_long, long, short)
    return open_, close, upper, lower, size / sigma


def _gaps(rng, sigma):
    """The move between a close and the next open, in log price: wide where a session opens."""
    return rng.standard_normal(len(sigma)) * sigma * np.where(np.arange(len(sigma)) % SESSION == 0, 1.5, 0.1)


# The reverting market. A deviation AR(1) plus a random walk has a reduced form in which all is known from past closes:
#     r_t = m_t + u_t,    m_{t+1} = phi m_t - k u_t,    phi = 0.5^(1/half_life),    k = signal (1 - phi)
# with r_t the log return and u_t symmetric given the past, whatever its hidden volatility. So sign(m_t) is the best
# call, the best forecast of the log return over h bars m_t (1 - phi^h) / (1 - phi). At k = 1 - phi the random walk is
# gone; k = 0 leaves it alone. From the closes m follows by m_{t+1} = (phi + k) m_t - k r_t.

def _reverting_moves(rng, log_vol, coin, signal, half_life):
    """(m, gap, body), [n] each, of one symbol: its log return is m + gap + body, u = gap + body."""
    n_bars, phi = len(log_vol), 0.5 ** (1 / half_life)
    sigma = np.exp(log_vol)
    gap = _gaps(rng, sigma)
    size = np.abs(rng.standard_t(4, n_bars)) / np.sqrt(2) * sigma
    up = 0.5 * coin + np.sqrt(0.75) * rng.standard_normal(n_bars) > 0
    body = np.where(up, size, -size)
    gap[0] = body[0] = 0.0  # the price starts with the first bar
    m = np.append(0.0, -signal * (1 - phi) * decayed_sum((gap + body)[:-1], decay=phi))
    return m, gap, body


def _reverting_bars(rng, log_vol, coin, signal, half_life):
    """As `_edge_bars`, of one symbol of the reverting market."""
    unit = rng.uniform(5e-4, 2e-3)  # log return of one sigma
    m, gap, body = _reverting_moves(rng, log_vol, coin, signal, half_life)
    close = rng.uniform(20, 200) * np.exp(np.cumsum(unit * (m + gap + body)))
    open_ = np.append(close[0], close[:-1]) * np.exp(unit * gap)
    wick = 0.4 * (unit * np.exp(log_vol))
    upper, lower = wick * rng.exponential(size=len(m)), wick * rng.exponential(size=len(m))
    return open_, close, upper, lower, np.abs(gap + body) / np.exp(log_vol)


def reverting_path(bars, horizon, half_life=8, signal=None):
    """[T, horizon]: the true expected log return over the bars that come, of a series of the reverting market."""
    signal = _checked_signal(signal, "reverting", half_life)
    phi = 0.5 ** (1 / half_life)
    k = signal * (1 - phi)
    log_return = np.diff(np.log(bars.ohlcva[:, 3]), prepend=np.log(bars.ohlcva[0, 3]))
    m = -k * decayed_sum(log_return, decay=phi + k)  # [T], of the bar after each
    return m[:, None] * (1 - phi ** np.arange(1, horizon + 1)) / (1 - phi)


@functools.cache
def reverting_best(signal=None, half_life=8, horizon=10):
    """What the best forecast reaches on the reverting market: (direction accuracy, its standard error, path ratio).

    The ratio is the mean absolute error of the best path to that of standing still. By simulation; the chance of a right
    call is exact given m, the gap and the volatility, so its error is small.
    """
    signal = _checked_signal(signal, "reverting", half_life)
    phi, n_bars = 0.5 ** (1 / half_life), 1 << 17
    right, missed, moved = [], 0.0, 0.0
    for seed in range(16):
        rng = np.random.default_rng([seed, 7])
        slow, fast = rng.normal(0, 0.06, n_bars), rng.normal(0, 0.1, n_bars)
        log_vol = decayed_sum(slow, decay=0.98) + decayed_sum(fast, decay=0.95)
        m, gap, body = _reverting_moves(rng, log_vol, rng.standard_normal(n_bars), signal, half_life)
        unit = np.exp(log_vol) / np.sqrt(2)
        chance = _student4((np.abs(m) + gap) / unit) + _student4((np.abs(m) - gap) / unit)  # a gap of either sign
        right.append(chance[CONTEXT:].mean() / 2)
        price = np.cumsum(m + gap + body)
        for h in range(1, horizon + 1):
            move = price[CONTEXT + h:] - price[CONTEXT:-h]
            best = m[CONTEXT + 1:n_bars - h + 1] * (1 - phi ** h) / (1 - phi)
            missed += np.abs(move - best).sum()
            moved += np.abs(move).sum()
    return float(np.mean(right)), float(np.std(right) / np.sqrt(len(right))), float(missed / moved)


def _student4(x):
    """Distribution function of Student's t with 4 degrees of freedom, in closed form."""
    z = x / np.sqrt(4 + x * x)
    return 0.5 + 0.25 * z * (3 - z * z)


# ----------------------------------------------------------------------------------------------------------------------
# The clock: of bars, and of those to come

def calendar(time):
    """UTC seconds int64 [...] -> hour, minute, weekday (0 is Monday), day, month (both from 0), int64 [..., 5].

    In whole numbers (Hinnant, "chrono-compatible low-level date algorithms"): years begin in March, so that a leap day
    comes last; doe is the day of an era of 400 years, doy the day of such a year.
    """
    days = time // 86400
    second = time - days * 86400
    doe = (days + 719468) % 146097                      # days since 0000-03-01, 400 years each era
    year = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * year + year // 4 - year // 100)
    month = (5 * doy + 2) // 153                        # 0 is March
    day = doy - (153 * month + 2) // 5
    return torch.stack((second // 3600, second // 60 % 60, (days + 3) % 7, day, (month + 2) % 12), dim=-1)


def iso(seconds):
    """UTC seconds as text: a date, with the time of day where it has one."""
    when = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return when.strftime("%Y-%m-%d" if int(seconds) % DAY == 0 else "%Y-%m-%d %H:%M")


# Next week is as the last weeks were: that is the whole rule, on the clocks of the zone that the market keeps.
MARKET_ZONES = ("UTC", "America/New_York", "Europe/London", "Australia/Sydney")  # Chicago's clocks change as New York's
WEEKS = 5  # that tell when a market is open


def future_times(time, horizon):
    """Stamps of the next bars, int64 [horizon]: the spacing, and the times of the week, that the history shows.

    time: int64 [T], UTC seconds, rising. Months keep their day. Summer time is followed where the last year saw it begin
    or end, holidays are not known. A last bar that is still live moves nothing. What a history of less than a week has
    not seen is as its days were, without weekends; one bar is taken as daily.
    """
    recent = np.asarray(time[-500:])
    last = int(recent[-1])
    gaps = np.sort(np.diff(recent))
    gap = int(gaps[(len(gaps) - 1) // 2]) if len(gaps) else DAY  # the median
    if gap >= 27 * DAY:
        return _coming_months(recent, gap, horizon)
    if gap > 1.5 * DAY:  # weeks: where a holiday or a live bar moved the last off the usual day, from that day on
        phases, counts = np.unique(recent % gap, return_counts=True)
        late = (last - int(phases[counts.argmax()])) % gap
        start = last - late if HOUR < late < gap - HOUR else last
        return start + gap * np.arange(1, horizon + 1)

    past = np.asarray(time[np.searchsorted(time, last - (WEEKS + 1) * WEEK):])
    seconds = recent % min(gap, HOUR)
    live = len(recent) > 9 and seconds[-1] not in seconds[-50:-1]
    if live:
        past = past[:-1]
    if len(np.unique(seconds)) > 10 + len(seconds) // 20:  # bars at any second: on a grid instead
        past = np.unique(past // WEEK * WEEK + past % WEEK // gap * gap)
    after = last if live else last + gap // 2  # no bar comes sooner

    zone = _market_zone(time, last)
    local = past + _ahead_of_utc(zone, past)
    local_after = after + int(_ahead_of_utc(zone, np.array([after]))[0])
    stamps = _coming(local, gap, local_after, DAY)
    if len(stamps) <= horizon:
        week = _coming(local, gap, local_after, WEEK)
        n = np.arange(horizon + len(week))  # one week behind the other
        stamps = week[n % len(week)] + n // len(week) * WEEK
    stamps = np.unique(stamps - _ahead_of_utc(zone, stamps))
    return stamps[stamps > after][:horizon]


def _coming(past, gap, after, span):
    """Stamps later than `after`, by `span` at most: those times of the week that a third of the last weeks had."""
    found, weeks = past[:0], []
    for back in range(WEEK, WEEKS * WEEK + 1, WEEK):
        first, last, end = np.searchsorted(past, np.array([0, span, WEEK]) + after - back, side="right")
        if end > first:  # a week with a bar
            found, weeks = np.append(found, past[first:last] + back), [*weeks, back]
    stamps, count = np.unique(found, return_counts=True)
    possible = np.sum([stamps - back >= past[0] for back in weeks], axis=0)
    stamps = stamps[3 * count >= possible]

    unseen = past[0] + WEEK  # up to here nothing was seen
    if unseen > after:
        if past[-1] - past[0] < DAY:
            more = past[-1] + gap * np.arange(1, WEEK // gap + 1)
        else:
            clocks = np.unique(past[past > past[-1] - WEEK] % DAY)
            more = (after // DAY * DAY + DAY * np.arange(8)[:, None] + clocks).ravel()
        if 5 not in (past // DAY + 3) % 7:  # no Saturday
            more = more[(more // DAY + 3) % 7 < 5]
        stamps = np.union1d(stamps, more[(more > after) & (more <= after + span) & (more < unseen)])
    if not len(stamps) and span == WEEK:
        return past[-1] + gap * np.arange(1, WEEK // gap + 2)
    return stamps


def _market_zone(time, last):
    """The zone on whose clocks each week was most like the one before it, around the last changes of the zones' clocks.

    UTC where none is better.
    """
    weeks, near = last - WEEK * np.arange(53, -1, -1), [np.empty(0, np.int64)]
    for zone in MARKET_ZONES:
        changes = weeks[1:][np.diff(_ahead_of_utc(zone, weeks)) != 0]
        if len(changes):
            first, end = np.searchsorted(time, [changes[-1] - 4 * WEEK, changes[-1] + 3 * WEEK])
            quarter = np.asarray(time[first:end]) // 900
            near.append(900 * quarter[np.diff(quarter, prepend=-1) != 0])
    quarters = np.unique(np.concatenate(near))
    if not len(quarters):
        return "UTC"

    def unlike(zone):
        local = quarters + _ahead_of_utc(zone, quarters)
        came, expected = local[local >= local[0] + WEEK], local + WEEK
        return len(np.setxor1d(came, expected[expected <= local[-1]]))

    return min(MARKET_ZONES, key=unlike)


def _ahead_of_utc(zone, time):
    """Seconds that the clocks of a zone are ahead of UTC at noon of the days of time, int64 [T]."""
    if zone == "UTC":
        return np.zeros(len(time), np.int64)
    days, which = np.unique(time // DAY, return_inverse=True)
    return np.array([_ahead_on(zone, int(day)) for day in days])[which]


@functools.cache
def _ahead_on(zone, day):
    try:
        noon = datetime.datetime.fromtimestamp(day * DAY + DAY // 2, zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, OverflowError, OSError, ValueError):  # a system without zones, or far years
        return 0
    return int(noon.utcoffset().total_seconds())


def _coming_months(recent, gap, horizon):
    """Months, quarters, years to come: the same day, or the last of each month. A live bar's day does not count."""
    month = recent.astype("datetime64[s]").astype("datetime64[M]")
    since, left = recent - _begin(month), _begin(month + 1) - recent  # seconds from the month's start, to its end
    live = len(recent) > 3 and since[-1] not in since[:-1] and left[-1] not in left[:-1]
    last = -2 if live else -1
    months = month[last] + np.arange(1, horizon + 3) * max(1, round(gap / (YEAR / 12)))
    if left[last] <= DAY:  # the last day
        stamps = _begin(months + 1) - left[last]
    else:                  # or that one where the month is too short
        stamps = np.minimum(_begin(months) + since[last], _begin(months + 1) - DAY + since[last] % DAY)
    return stamps[stamps > recent[-1]][:horizon]


def _begin(months):
    return months.astype("datetime64[s]").astype(np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Files in: CSV as people have it. Who reads to learn how the model sees a market can stop here.
#
# One way for every file: bytes -> text -> delimiter and header -> columns -> numbers and dates, each in the one format
# that fits the whole file -> bars -> faults. What cannot be told for certain is refused, never guessed.

HEADERS = {column: names.split() for column, names in {  # names of a column, best first, as `_fold` leaves them
    "time": "candledatetime timeperiodstart time timeopen timestamp timestamps datetime date opentime tradetime "
            "tradedate windowstart barstart begin starttime startat exchangedate traddt candlebegintime bartime "
            "bardate tradingdate tradingday periodstart start day trddt gmttime localtime utctime utc dtyyyymmdd unix "
            "unixtime unixtimestamp epoch ts tsevent mts dt t datum zeit data fecha tarih дата 时间 日期 交易日期 日付 날짜 일자",
    "clock": "time hour clock minute timeofday tradetime localtime starttime opentime bartime timestamp zeit uhrzeit "
             "hora время 时间",
    "open": "open opening bidopen erster eröffnung eröffn mido pxopen opnpric openprc dayopen 24hopen opnprc apertura "
            "abertura ouv ouvert otwarcie açılış откр открытие 开盘 开盘价 開盤價 始値 시가 o",
    "high": "high bidhigh hoch máximo máxima tageshoch midh pxhigh hghpric askhi highest dayhigh dayshigh 24hhigh "
            "hiprc maximum max massimo plushaut haut najwyzszy najwyższy yüksek макс максимум 最高 最高价 最高價 高値 고가 h",
    "low": "low bidlow tief mínimo mínima tagestief midl pxlow lwpric bidlo lowest daylow dayslow 24hlow loprc "
           "minimum min minimo plusbas bas najnizszy najniższy düşük мин минимум 最低 最低价 最低價 安値 저가 l",
    "close": "close bidclose closelast adjclose last settle price midc pxlast clspric prc trade closing clsprc "
             "schlusskurs schluss zuletzt letzter último ultimo cierre dernier clot zamkniecie zamknięcie şimdi "
             "kapanış цена закрытие 收盘 收盘价 收盤價 終値 종가 c",
    "volume": "volume tickvol vol volumecoin tickvolume totalvolume volumetraded tradedvolume sharestraded noofshares "
              "totaltradedquantity tottrdqty ttltradgvol pxvolume numberofshares tickqty basevolume baseassetvolume "
              "tradevolume tradingvolume totaltradequantity tradedquantity candleacctradevolume adjvolume shares "
              "contracts lots dnshrtrd quantity qty stuecke stücke volumen wolumen hac hacim объём объем 成交量 成交股數 总手 "
              "出来高 거래량 v volumemoney",
    "amount": "amount turnover quotevolume quoteassetvolume value volumemoney money totalturnover tottrdval ttltrfval "
              "candleacctrade tradingmoney dnvaltrd umsatz volumen 成交额 成交金额 成交金額 거래대금 金额",
    "symbol": "symbol ticker tckrsymb tscode code name instrument instrumentname indexname pair asset secid stock "
              "stockcode stockid stocksymbol tradingsymbol security contract coin ric isin stkcd orderbookid 股票代码 代码 "
              "名称",
    "interval": "timeframe interval resolution per granularity freq frequency",
}.items()}
PRICES = COLUMNS[:4]
MONEY = "usd usdt usdc busd eur gbp jpy krw currency quote to".split()  # "Volume USDT" is an amount
INDICATORS = "ma sma ema avg mean std ratio change pct osc delta buy sell".split()  # "Volume MA" is neither
FIELD = "(?P<field>adj close|adjusted|open|high|low|close|volume)"
BETWEEN = r"[\s_:.,'\"()|/-]+"  # between a field and its symbol: AAPL.Open, Close_AAPL, ('Close', 'AAPL')
FIELD_FIRST = re.compile(f"{FIELD}{BETWEEN}(?P<ticker>.+)", re.I)
TICKER_FIRST = re.compile(f"(?P<ticker>.+?){BETWEEN}{FIELD}", re.I)
BINANCE = ["time", *PRICES, "volume", "", "amount", "", "", "", ""]
DELIMITERS = ",;\t| "
FIRST_LINE = "put a first line such as time,open,high,low,close,volume"
NO_BAR = "there is no bar to read: check the columns"
MISSING = {"", "-", "--", ".", "null", "none", "nan", "na", "n/a", "n.a.", "#n/a", "nat", r"\n"}
MAX_BAD = 0.05   # share of bad rows, or of rows with the time of another, above which a file is refused
ROUNDING = 1e-6  # a high that lies below the close by so little, relative, was rounded
SPLIT = 1.9      # from this factor between two closes on a word is said: 2 for 1, on a day that moves less than 5 %
FILES = re.compile(r"(\.(csv|tsv|txt))?(\.(gz|xz|bz2|zip))?$", re.I)
FOREIGN = {b"PAR1": "Parquet", b"ARROW1": "Feather", b"\x89HDF": "HDF5", b"{": "JSON", b"[": "JSON",
           b"\xd0\xcf\x11\xe0": "Excel"}


class _NoBars(UserError):
    """A file that is empty, or holds nothing but a header."""


def load(paths) -> list[Bars]:
    """Read bars from CSV files, folders or globs (also in gzip, xz, bz2, zip), or what `python data.py --out` wrote.

    paths: a string or a list of them. Columns are found by name; a time without a zone means UTC. Rows of one symbol in
    several files become one series; of equal times the last read wins. UserError where nothing usable is there.
    """
    found = {}
    for bars in read_files(paths):
        found.setdefault(bars.symbol, []).append(bars)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in found.values()]


def _joined(parts):
    """Stretches of one symbol as one series; of equal times the last wins. UserError where their intervals differ."""
    gaps = [np.sort(np.diff(part.time)) for part in parts if len(part) > 2]
    gaps = [int(gap[len(gap) // 10]) for gap in gaps]  # as they come close: holes make gaps longer
    symbol = parts[0].symbol
    if gaps and max(gaps) >= 2 * min(gaps):
        raise UserError(f"{symbol}: bars every {min(gaps):,} s in one file and every {max(gaps):,} s in another; "
                        f"give --data the files of one interval")
    time, ohlcva = np.concatenate([p.time for p in parts]), np.concatenate([p.ohlcva for p in parts])
    order = np.argsort(time, kind="stable")
    time, ohlcva = time[order], ohlcva[order]
    last = np.append(np.diff(time) != 0, True)
    changed = int((~last[:-1] & _differ(ohlcva[:-1].T, ohlcva[1:].T)).sum())
    if changed:
        print(f"{symbol}: {changed} of {last.sum()} bars differ between files; the last read counts", file=sys.stderr)
    return Bars(symbol, time[last], ohlcva[last])


def _differ(left, right):
    """Which of two rows of bars, [6, T], differ; NaN equals NaN."""
    return ((left != right) & ~(np.isnan(left) & np.isnan(right))).any(0)


def read_files(paths):
    """Yield Bars file by file, so that a corpus larger than memory can be converted.

    A file that was named must be good. Of others the useless ones are skipped, unless more are bad than good.
    """
    files = list(_files(paths))
    symbols = _symbols([path for path, _ in files])
    skipped = []
    for path, named in files:
        try:
            yield from _open_folder(path) if os.path.isdir(path) else _read_csv(path, symbols[path])
        except UserError as e:
            if named:
                raise
            skipped.append(e)
    bad = [e for e in skipped if not isinstance(e, _NoBars)]
    if len(skipped) == len(files) or len(bad) > len(files) - len(skipped):
        raise (bad or skipped)[0]
    if skipped:
        print(f"{len(skipped)} of {len(files)} files skipped: {'; '.join(map(str, skipped[:3]))}", file=sys.stderr)


def _files(paths):
    """Yield (path, whether it must be good) of each CSV file and each folder of arrays."""
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.fspath(path)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matches:
            raise UserError(f"{path}: no such file; give --data a CSV file, a folder of them, or a quoted glob")
        for match in matches:
            is_folder = os.path.isdir(match)
            if not is_folder or os.path.exists(os.path.join(match, "symbols.json")):
                yield match, is_folder or match == path
                continue
            names = sorted(n for n in os.listdir(match) if FILES.search(n)[0] and not n.startswith((".", "~$")))
            if not names:
                raise UserError(f"{match}: no CSV file in this folder; put *.csv or *.csv.gz there")
            yield from ((os.path.join(match, name), False) for name in names)


def _symbols(paths):
    """{path: symbol of a file that names none}: its stem, without date and interval if files differ by date alone."""
    date = r"([-_. ](19|20)\d\d([-_.]?[01]\d([-_.]?[0-3]\d)?)?)+$"
    interval = r"[-_. ](\d+(s|m|min|h|d|w|mo)|[mhdw]\d+|mn1|daily|hourly)$"
    stems = {path: FILES.sub("", os.path.basename(path)) or os.path.basename(path) for path in paths}
    undated = {path: re.sub(date, "", stem) for path, stem in stems.items()}
    count = Counter(undated.values())
    for path, name in undated.items():
        if count[name] > 1:
            stems[path] = re.sub(interval, "", name, flags=re.I)
    return {path: printable(stem.strip()) for path, stem in stems.items()}


# -- one file

def _read_csv(path, symbol):
    """The Bars of one file, a list. symbol: whose they are in a file that names none."""
    table = _table(path)
    tickers = list(dict.fromkeys(filter(None, table.tickers))) or [""]
    parts = {ticker: _columns(table, ticker) for ticker in tickers}
    numbers = {i for columns in parts.values() for column, i in columns.items() if column in COLUMNS}
    words = {i for columns in parts.values() for column, i in columns.items() if column not in COLUMNS}
    free = [i for i, ticker in enumerate(table.tickers) if not ticker and i not in numbers | words]
    dates = [i for name in HEADERS["time"] for i in free if table.fields[i] == name]
    clocks = [i for name in HEADERS["clock"] for i in free if table.fields[i] == name]
    if 0 in free and table.fields[0] == "":
        dates.append(0)  # pandas writes its index without a name
    if not dates:
        raise table.error(table.first, "no column 'time' in the header; give that name to the one it is")

    cells, reasons = _cells(table, numbers, words | {*dates, *clocks})
    if not len(cells[dates[0]]):
        raise _NoBars(f"{path}:{table.first + 1}: no rows after the header; {NO_BAR}")
    if len(reasons) == len(cells[dates[0]]):
        raise table.error(table.line(0), f"{reasons[0]}; {NO_BAR}")
    time, at = _times(table, cells, dates, clocks)
    values = _numbers(table, {i: cells[i] for i in numbers}, reasons)
    for row in np.flatnonzero(np.isnan(time)).tolist():
        prices = [values[columns[c]][row] for columns in parts.values() for c in PRICES]
        if not np.isnan(prices).all():
            reasons.setdefault(row, f"{table.names[at] or 'time'} {cells[at][row]!r} is no date")
    series = []
    for ticker, columns in parts.items():
        nothing = np.full(len(time), np.nan)
        ohlcva = np.stack([values.get(columns.get(c), nothing) for c in COLUMNS])         # (6, rows)
        _check_columns(table, columns, cells, ohlcva)
        symbols = _symbol_of_rows(table, columns, cells, time, reasons) if "symbol" in columns else None
        series += _bars(table, [ticker or symbol] if symbols is None else symbols, time, ohlcva, dict(reasons))
    if not series:
        raise table.error(table.line(0), f"no row has a price; {NO_BAR}")
    return series


# -- bytes -> text

def _text(path):
    """What a text file holds, in whatever encoding and container; UserError if it is none."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        for magic, unpack in CONTAINERS.items():
            if raw.startswith(magic):
                raw = unpack(raw)
        for magic, kind in FOREIGN.items():
            if raw[:100].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
                raise ValueError(f"it is {kind}")
        text = _decoded(raw)
        if "\0" in text:
            raise ValueError("it is binary")
    except Exception as e:  # a damaged archive raises many kinds
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise UserError(f"{path}: cannot be read ({why}); give a CSV file, or an archive of one")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unzipped(raw):
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        names = [name for name in file.namelist() if not name.startswith("__MACOSX/") and not name.endswith("/")]
        if "[Content_Types].xml" in names:
            raise ValueError("it is Excel")
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files")
        return file.read(names[0])


CONTAINERS = {b"PK\3\4": _unzipped, b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ": lzma.decompress, b"BZh": bz2.decompress}


def _decoded(raw):
    """UTF-16 by its mark, UTF-8, else the one of a few encodings in which most names of columns are known."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace").rstrip("\0")
    raw = raw.rstrip(b"\0")  # the machine died while it wrote
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")

    def known(text):
        return max(_n_known(map(_fold, re.split(r"[,;\t|]", line))) for line in text[:4000].split("\n"))

    return max((raw.decode(name, "replace") for name in ("gb18030", "latin-1", "cp1251", "shift_jis")), key=known)


# -- text -> delimiter, header, columns

@dataclass
class Table:
    """The lines of a file and its columns."""
    path: str
    lines: list[str]
    delimiter: str
    first: int          # index of the first line below the header
    names: list[str]    # of each column, as in the file
    fields: list[str]   # the same folded
    tickers: list[str]  # whose the column is, "" where the header names no symbols
    has_header: bool = True
    line_of: list[int] | None = None  # line of each row, from 1; None: rows are the lines that are not empty

    def say(self, text):
        print(f"{self.path}: {text}", file=sys.stderr)

    def error(self, line, text):
        return UserError(f"{self.path}:{line}: {text}")

    def line(self, row):
        """The line of a row, from 1, for messages."""
        if self.line_of is None:
            self.line_of = [k for k, line in enumerate(self.lines[self.first:], self.first + 1) if line]
        return self.line_of[row]


@functools.lru_cache(10_000)
def _fold(name):
    """A column's name in lower case, letters and digits only, without "1. ", "(USD)", "Price" and a time's "_utc"."""
    name = re.sub(r"(?<=Volume)(?=[A-Z])", " ", name.strip()).lower()
    name = re.sub(r"^\d+[a-z]?\.\s+", "", name)
    if re.match(r"turnover \((pcs|shares)", name):
        return "volume"
    what = re.fullmatch(r"vol(?:ume)?[ _(]+([a-z]{2,8})\)?|volume(to|from)", name)
    unit = what and (what[1] or what[2])
    if unit and unit not in INDICATORS:
        return "volumemoney" if unit in MONEY else "volumecoin"
    folded = re.sub(r"[\W_]", "", re.sub(r"[(\[].*?[)\]]", "", name)) or re.sub(r"[\W_]", "", name)
    when = re.sub(r"(utc|gmt|iso|ms|ns|millis|unix)$", "", folded)
    if when in HEADERS["time"]:
        return when
    in_money = re.fullmatch(rf"(\w+)price({'|'.join(MONEY)})", folded)      # openPriceUsd
    return in_money[1] if in_money else folded.removeprefix("price").removesuffix("price") or folded


def _n_known(fields):
    """How many of time, open, high, low, close and volume have a column."""
    fields = set(fields)
    return sum(not fields.isdisjoint(HEADERS[column]) for column in ("time", *PRICES, "volume"))


def _split(line, delimiter):
    if delimiter == " ":  # or runs of them
        return line.replace('"', "").split()
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _table(path):
    """The lines and columns of a file: its header is what makes most names of columns known, and more than one."""
    lines = _text(path).split("\n")
    filled = [k for k, line in enumerate(lines[:200]) if line.strip()][:40]
    if not filled:
        raise _NoBars(f"{path}: the file is empty; it needs a header line and rows of bars")
    most, found = 1, None
    for delimiter, k in itertools.product(DELIMITERS, filled):
        named = _names(_split(lines[k], delimiter))
        known = _n_known(field for field, _ in named) if len(named) > 4 else 0
        if known > most:
            most, found = known, (delimiter, k, named)
        if known > 4:
            break
    if not found:
        return _without_header(path, lines, filled)
    delimiter, at, named = found
    if delimiter == " ":
        lines, delimiter = ["\t".join(_split(line, " ")) for line in lines], "\t"
    cells = [printable(cell.strip()) for cell in _split(lines[at], delimiter)]
    fields, tickers = [field for field, _ in named], [ticker for _, ticker in named]
    table = Table(path, lines, delimiter, at + 1, cells, fields, tickers)
    if not any(tickers):
        above, below = [k for k in filled if k < at], [k for k in filled if k > at]
        _find_tickers(table, at, below[:1] + above[-1:])
    return table


def _names(cells):
    """(field, ticker) of each column of a header: as they stand, or AAPL.Open taken apart."""
    fields = [_fold(cell) for cell in cells]
    named = [(field, "") for field in fields]
    if _n_known(fields) > 2:
        return named
    texts = [cell.strip(" '\"()") for cell in cells]
    parts = [FIELD_FIRST.fullmatch(text) or TICKER_FIRST.fullmatch(text) for text in texts]
    if _n_known(_fold(part["field"]) for part in parts if part) < 4:
        return named
    tickers = {part["ticker"] for part in parts if part}
    for i, (part, field) in enumerate(zip(parts, fields)):
        if part:
            named[i] = (_fold(part["field"]), part["ticker"])
        elif len(tickers) == 1 and field in HEADERS["volume"]:  # A.Open,A.High,A.Low,A.Close,Volume
            named[i] = (field, *tickers)
    return named


def _find_tickers(table, at, nearby):
    """Where one of the lines nearby is a second row of the header, with symbols, as yfinance writes it: note them."""
    for k in nearby:
        corner, *tickers = [cell.strip() for cell in _split(table.lines[k], table.delimiter)]
        if len(tickers) != len(table.names) - 1 or _fold(corner) not in ("", "ticker", "price", "symbol"):
            continue
        of_each = [[f for f, t in zip(table.fields[1:], tickers) if t == ticker] for ticker in set(tickers)]
        if min(map(_n_known, of_each)) < 4:
            continue  # a row of units
        table.tickers, table.first = ["", *tickers], max(at, k) + 1
        table.fields[0] = ""  # the dates, below a name that is none
        third = _split("".join(table.lines[table.first:table.first + 1]), table.delimiter)
        if third and not any(third[1:]):
            table.first += 1  # it names the column of dates
        return


def _without_header(path, lines, filled):
    """Time, open, high, low, close, volume and perhaps one column more, or Binance's twelve; the candles must hold."""
    for delimiter in DELIMITERS:
        first = filled[0]
        if len(filled) > 1 and _split(lines[first], delimiter)[:5] == ["0", "1", "2", "3", "4"]:
            first = filled[1]  # pandas numbered the columns
        cells = [cell.strip() for cell in _split(lines[first], delimiter)]
        fields = ["symbol"] if len(cells) > 6 and re.fullmatch(r"[A-Za-z][\w.=-]*", cells[0]) else []
        at = len(fields)
        fields += ["date", "time"] if len(cells) > at + 6 and ":" in cells[at + 1] else ["time"]
        rest = [cell if delimiter == "," else cell.replace(",", ".") for cell in cells[len(fields):]]
        fields += [*PRICES, "volume", ""][:len(rest)]
        if len(cells) == len(BINANCE):
            fields = list(BINANCE)
        if len(fields) == len(cells) and len(rest) >= 5 and all(map(_is_number, rest)):
            tickers = [""] * len(fields)
            return Table(path, lines, delimiter, first, list(fields), fields, tickers, has_header=False)
    raise UserError(f"{path}:{filled[0] + 1}: no header and no bars in {lines[filled[0]][:60]!r}; {FIRST_LINE}")


def _columns(table, ticker):
    """{column: its index} of one symbol; UserError if a price is missing, or a name is there twice."""
    own = [i for i, t in enumerate(table.tickers) if t == ticker]
    fields = [table.fields[i] for i in own]
    columns = {}
    for column in (*COLUMNS, "symbol", "interval"):
        found = [(name, own[fields.index(name)]) for name in HEADERS[column] if name in fields]
        found = [(name, i) for name, i in found if i not in columns.values()]
        if found:
            name, columns[column] = found[0]
            if fields.count(name) > 1:
                raise table.error(table.first, f"two columns {name!r} in the header; keep one of them")
        elif column in PRICES:
            raise table.error(table.first, f"no column {column!r} in the header; give that name to the one it is")
    return columns


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


# -- columns -> numbers

def _cells(table, numbers, texts):
    """({index: column}, {row: why it is bad}): columns are float64 where that is quick, else lists of text.

    Without blanks, comments, notes at the end, and headers again where files were put one behind the other.
    """
    kinds = [(str(i), "f8" if i in numbers else "O" if i in texts else "U1") for i in range(len(table.names))]
    lines = table.lines[table.first:]
    with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")  # of no rows
        got = np.loadtxt(lines, kinds, comments=None, delimiter=table.delimiter, quotechar='"', ndmin=1)
        if len(got) == sum(map(bool, lines)):  # else a quote that was not closed
            return {i: got[str(i)] for i in numbers | texts}, {}
    rows, table.line_of, reasons, n_columns, price = [], [], {}, len(table.names), min(numbers)
    reader = csv.reader(lines, delimiter=table.delimiter, skipinitialspace=True)
    try:
        for line, row in enumerate(reader, 1):
            if reader.line_num > line:
                raise csv.Error("a quote is opened and not closed")
            if len(row) == n_columns + 1 and not row[-1]:
                row.pop()  # a comma behind the last cell
            elif len(row) == n_columns - 1 and not table.names[-1]:
                row.append("")  # or behind the last name
            fits = len(row) == n_columns
            if not fits or not row[price][:1].isdecimal():  # perhaps no row of a bar
                filled = [cell for cell in row if cell.strip()]
                is_note = len(filled) == 1 and not fits and not _is_number(filled[0])
                if not filled or is_note or filled[0].startswith(("#", "//")):
                    continue
                if fits and _fold(row[price]) == table.fields[price]:
                    continue  # the header again
            if not fits:
                reasons[len(rows)] = f"{len(row)} cells where the header has {n_columns}"
                row = [""] * n_columns
            rows.append(row)
            table.line_of.append(table.first + line)
    except csv.Error as e:
        line = table.line_of[-1] if table.line_of else table.first
        raise table.error(line + 1, f"not a CSV row ({e}); mend or remove it")
    return {i: [row[i] for row in rows] for i in numbers | texts}, reasons


NOISE = str.maketrans("\u2019", "'", "$€£¥₹ \u00a0\u202f\u2009\t")
APOSTROPHE = re.compile(r"(?<!\d)'|'(?=\d{3}(?!\d))")  # 1'234.50; in 123'16 it stands before 32nds
NUMBER = [re.compile(rf"([-+]?(?:\d{{1,3}}(?:{comma}\d{{2,3}})*{comma}\d{{3}}|\d*)(?:{point}\d*)?(?:e[-+]?\d+)?)"
                     r"([a-z]+\.?|万|亿|)")
          for comma, point in ((",", "\\."), ("\\.", ","))]  # 1,234.50 and 1.234,50
SUFFIX = {"": "", "k": "e3", "m": "e6", "mn": "e6", "mln": "e6", "mio": "e6", "b": "e9", "bn": "e9", "mrd": "e9",
          "t": "e12", "万": "e4", "亿": "e8"}


def _numbers(table, cells, reasons):
    """{index: float64}, NaN where a number is missing, or is none: then a reason is added. One format for the file."""
    with contextlib.suppress(ValueError):
        return {i: np.asarray(column, np.float64) for i, column in cells.items()}
    cells = {i: ["nan" if c.strip().lower() in MISSING else c for c in column] for i, column in cells.items()}
    with contextlib.suppress(ValueError):
        return {i: np.array(column, np.float64) for i, column in cells.items()}
    plain = {i: APOSTROPHE.sub("", "\0".join(c).lower().translate(NOISE)).split("\0") for i, c in cells.items()}
    distinct = {c for column in plain.values() for c in column}
    by_point, by_comma = (sum(form.fullmatch(c) is not None for c in distinct) for form in NUMBER)
    few = 0.02 * len(distinct)  # a mistyped cell or two decide nothing
    if table.delimiter != "," and any("," in c for c in distinct):
        few = -few  # "14,300" beside semicolons is 14.3
    comma = by_comma - by_point > few
    values = {"nan": np.nan}
    for text in distinct:
        found = NUMBER[comma].fullmatch(text)
        power = SUFFIX.get(found[2].rstrip(".")) if found else None
        if power is None or not any(map(str.isdigit, text)) or (power and "e" in found[1]):
            continue
        digits = found[1].replace(".", "").replace(",", ".") if comma else found[1].replace(",", "")
        values[text] = float(digits + power)
    for i, column in plain.items():
        for row, text in enumerate(column):
            if text not in values:
                reasons.setdefault(row, f"{table.fields[i]} {cells[i][row]!r} is not a number")
    return {i: np.array([values.get(c, np.nan) for c in column], np.float64) for i, column in plain.items()}


# -- texts -> UTC seconds

STAMP = re.compile(r"""(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,?\s+)?
    (?P<date>\d{8}|\d\d?[a-z]{3}\d{4}|\w{1,9}[-/.\s年년]\s*\w{1,9}\.?,?(?:[-/.\s月월]\s*\d{1,4}[日일]?)?)
    (?:(?:[T\s,;]\s*|(?<=\d{8})-(?=\d\d:))(?P<clock>\d\d?(?:[:.h]?\d\d){0,2}(?:[.,]\d+)?(?:[\s-]*[ap]\.?m\b\.?)?))?
    \s*(?P<zone>(?:[a-z]+(?:/[a-z_/+-]+)?)?(?:[+-]\d\d(?::?\d\d)?)?)(?:\[[\w/]+\])?""", re.X | re.I)
CLOCK = re.compile(r"(\d\d?)(?:[:.h](\d\d)(?:[:.](\d\d)(?:[.,]\d+)?)?)?[\s-]*([ap])?\.?m?\.?", re.I)
DATES = {  # order -> formats, with - for whatever stands between
    "year-month-day": ("%Y-%m-%d", "%Y%m%d", "%Y-%m", "%Y-%b-%d", "%y-%m-%d"),
    "day/month/year": ("%d-%m-%Y", "%d-%b-%Y", "%d-%B-%Y", "%d%b%Y", "%d-%m-%y", "%d-%b-%y"),
    "month/day/year": ("%m-%d-%Y", "%b-%d-%Y", "%B-%d-%Y", "%m-%d-%y")}
DIGITS = {  # numbers that spell a date -> format of the day, digits of the clock behind it
    "YYYYMM": ("%Y%m", 0), "YYMMDD": ("%y%m%d", 0), "YYYYMMDD": ("%Y%m%d", 0), "YYYYMMDDHH": ("%Y%m%d", 2),
    "YYMMDDHHMM": ("%y%m%d", 4), "YYYYMMDDHHMM": ("%Y%m%d", 4), "YYYYMMDDHHMMSS": ("%Y%m%d", 6),
    "YYYYMMDDHHMMSSmmm": ("%Y%m%d", 9)}


def parse_time(text):
    """One time stamp as UTC seconds (float; NaN if it is none, may be two, or lies past 2199). Naive means UTC.

    ISO 8601 and the other forms of `_dates`; of numbers YYYYMMDD[HHMM[SS]] and epochs from 1973 up to now.
    """
    return float(_dates([str(text)])[0][0])


def _times(table, cells, dates, clocks):
    """(UTC seconds of each row, index of the column): of the columns `dates` the most distinct that holds dates.

    Dates without a clock take it from one of the columns `clocks`.
    """
    most, why = 0, ""
    for i in dates:
        seconds, reason = _dates(cells[i])
        good = np.isfinite(seconds)
        distinct = len(np.unique(seconds[good])) if len(dates) > 1 else 1
        if good.mean() < 0.5:
            if not why or "may be" in reason:
                cell = next(filter(None, cells[i]), "")
                why = f"{table.names[i] or 'time'} {cell!r} is no date{reason and ': '}{reason}"
        elif distinct > most:
            best, most, at = seconds, distinct, i
    if not most:
        raise table.error(table.line(0), f"{why}; give dates with their clock, best as 2024-03-04 14:30")
    if (best[np.isfinite(best)] % DAY == 0).all():
        found = (_clock(cells[i]) for i in clocks if i != at)
        best = best + next((clock for clock in found if np.isfinite(clock).mean() > 0.5), 0.0)
    zone = re.search(r"\(([a-z_/]+)\)", table.names[at], re.I)  # "Time (EET)"
    return best - np.nan_to_num(_ahead(zone[1], best)) if zone else best, at


def _dates(cells):
    """(UTC seconds, NaN where a cell is no date; why none is, or ""), in one form for all cells.

    A text is a day, a clock and a zone; each day is read once, in the order that fits most of them.
    """
    with contextlib.suppress(ValueError):
        return _dates_of_numbers(np.array(cells, np.float64))
    texts, which = np.unique([cell.strip(" '=\"") for cell in cells], return_inverse=True)  # '1/1 and ="1/1" are texts
    if _is_number(texts[-1]) or _is_number(texts[len(texts) // 2]):
        seconds, why = _dates_of_numbers(np.array([float(t) if _is_number(t) else np.nan for t in texts]))
        return seconds[which], why
    if texts[0][:1].isdecimal() and texts[-1][:1].isdecimal():  # and so all between
        with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
            warnings.simplefilter("error")  # of zones
            seconds = texts.astype("datetime64[s]").astype(np.float64)  # plain ISO, in no time
            if (np.abs(seconds) < 200 * YEAR).all():
                return seconds[which], ""
    found = [STAMP.fullmatch(text) for text in texts.tolist()]
    dates, clocks, zones = zip(*[match.groups("") if match else ("", "", "") for match in found])
    days, day_of = np.unique(dates, return_inverse=True)
    days = [re.sub(r"^1\d\d(?=[/年])", lambda year: str(1911 + int(year[0])), day) for day in days]  # Taiwan's
    days = [re.sub(r"[/.,\s年月日년월일-]+", "-", day).strip("-") for day in days]
    readings = {order: np.array([_day(day, formats) for day in days]) for order, formats in DATES.items()}
    seconds, why = _told_apart(readings, prefer="day/month/year" if "." in dates[-1] else None)  # dots: never m.d.y
    seconds = seconds[day_of] + _clock([clock or "00:00" for clock in clocks])
    for zone in set(zones) - {""}:
        rows = np.array([z == zone for z in zones])
        seconds[rows] -= _ahead(zone, seconds[rows])
    return seconds[which], why


def _day(text, formats):
    """UTC seconds of a date; NaN if it has none of the formats."""
    for form in formats:
        with contextlib.suppress(ValueError):
            day = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
            is_future = day.timestamp() > time.time() + 2 * DAY
            if 1770 <= day.year < 2200 and not ("%y" in form and is_future):  # 31/01/20 is no day of 2031
                return day.timestamp()
    return np.nan


def _clock(cells):
    """Seconds of the day of texts such as 9:05, 02:30 PM, 143000, 930 or 14; NaN where a cell is no clock."""
    texts, which = np.unique([cell.strip().removesuffix(".0") for cell in cells], return_inverse=True)
    values = np.array([float(text) if text.isdecimal() else np.nan for text in texts])
    if np.isfinite(values[which]).mean() > 0.5:
        numbers = sorted((value, len(text)) for value, text in zip(values, texts) if np.isfinite(value))
        top, width = numbers[int(0.95 * (len(numbers) - 1))]  # not the largest, which may be mistyped
        if top <= 24 and width <= 2:  # hours
            values *= 10000
        elif top <= 2400 and width <= 4:
            values *= 100
        elif top > 240000:  # with milliseconds
            values //= 1000
        return _of_hhmmss(values)[which]
    for k, found in enumerate(map(CLOCK.fullmatch, texts)):
        if found:
            hour, half = int(found[1]), (found[4] or "").lower()
            if half:  # 12 am is 0, 12 pm is 12
                hour = hour % 12 + 12 * (half == "p") if 1 <= hour <= 12 else 99
            values[k] = hour * 10000 + int(found[2] or 0) * 100 + int(found[3] or 0)
    return _of_hhmmss(values)[which]


def _of_hhmmss(values):
    hour, minute, second = values // 10000, values // 100 % 100, values % 100
    fits = (hour * 60 + minute <= 1440) & (minute < 60) & (second < 60 + (minute == 59))  # with leap seconds
    return np.where(fits, hour * 3600 + minute * 60 + second, np.nan)


def _ahead(zone, seconds):
    """Seconds that a zone's clocks are ahead of UTC: Z, +01:00, GMT+0100, US/Eastern; NaN if it is unknown."""
    offset = re.fullmatch(r"(?:z|utc|gmt)?(?:([+-])(\d\d):?(\d\d)?)?", zone, re.I)
    if offset:
        size = int(offset[2] or 0) * 3600 + int(offset[3] or 0) * 60
        return -size if offset[1] == "-" else size
    try:
        zone = zoneinfo.ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        return np.nan
    local = [datetime.datetime.fromtimestamp(s, datetime.UTC) if np.isfinite(s) else None for s in seconds]
    return np.array([when.replace(tzinfo=zone).utcoffset().total_seconds() if when else np.nan for when in local])


def _dates_of_numbers(values):
    """Numbers that spell a date, or an epoch in one unit; never a clock, a row's number, a serial number or a year."""
    sample = values[::max(1, len(values) // 50)]
    readings = {name: _spelled(values, *form) for name, form in DIGITS.items()
                if np.isfinite(_spelled(sample, *form)).mean() > 0.5}
    epoch = _epoch(values)
    if len(np.unique(sample)) < 3 and np.isfinite(epoch).all():
        readings.pop("YYMMDDHHMM", None)  # as one or two epochs may by chance, three don't
    seconds, why = _told_apart(readings or {"an epoch": epoch})
    if not np.isfinite(seconds).any():
        why = why or "it is a clock, a count, a year, a spreadsheet's number, or lies in the future"
    return seconds, why


def _spelled(values, form, n_clock):
    """UTC seconds of numbers such as 20240304143000."""
    day, clock = np.divmod(np.where(np.abs(values) < 1e18, values, np.nan), 10.0 ** n_clock)
    days, which = np.unique(day, return_inverse=True)
    texts = [f"{d:.0f}" for d in days]
    width = 8 if form == "%Y%m%d" else 6
    seconds = np.array([_day(text, [form]) if len(text) == width else np.nan for text in texts])[which]
    seconds = seconds + _of_hhmmss(np.floor(clock * 10.0 ** (6 - n_clock)))
    return np.where(seconds < time.time() + 2 * DAY, seconds, np.nan)


def _epoch(values):
    """Seconds of an epoch in s, ms, us or ns, one for all (but Binance went from ms to us); NaN from tomorrow on."""
    sample = np.abs(values[::max(1, len(values) // 1000)])
    sample = sample[sample < 1e19]
    if not len(sample):
        return values * np.nan
    if 1e12 < sample.min() < 1e13 and 1e15 < sample.max() < 1e16:
        values, sample = (np.where(x >= 1e15, x / 1e3, x) for x in (values, sample))
    size = np.quantile(sample, 0.95, method="lower")  # not the largest, which may be mistyped
    now = time.time() + 2 * DAY
    unit = next((unit for unit in (1, 1e3, 1e6, 1e9) if size / unit < now), np.nan)
    is_windows = 6.2e17 < size < 6.5e17 or 1.2e17 < size < 1.36e17  # 100 ns from year 1, or from 1601
    is_1970 = unit == 1 and (sample % (1000 * DAY) == 0).mean() > 0.9  # its days in ms
    if is_windows or is_1970 or size / unit < 1e8:  # before 1973 a number may be anything
        return values * np.nan
    seconds = np.floor(values / unit)
    return np.where((seconds < now) & (seconds > -200 * YEAR), seconds, np.nan)


def _told_apart(readings, prefer=None):
    """(seconds by the reading that fits most cells, why or ""); all NaN where two fit as many and differ."""
    fits = {name: int(np.isfinite(seconds).sum()) for name, seconds in readings.items()}
    name, *others = [name for name in readings if fits[name] == max(fits.values())]
    for other in others:
        differ = (readings[name] != readings[other]) & np.isfinite(readings[name])
        if differ.any() and prefer in (name, other):
            name = prefer
        elif differ.any():
            k = np.argmax(differ)
            texts = [iso(s) if np.isfinite(s) else "none" for s in (readings[name][k], readings[other][k])]
            why = f"it may be {texts[0]} ({name}) or {texts[1]} ({other}), as may all others here"
            return readings[name] * np.nan, why
    return readings[name], ""


# -- columns -> bars

def _check_columns(table, columns, cells, ohlcva):
    """Intervals are not mixed, an amount is volume times price, a volume that is not read is named."""
    names = table.names
    _, high, low, close, volume, amount = ohlcva
    intervals = sorted({printable(cell.strip()) for cell in cells.get(columns.get("interval"), ())})
    if len(intervals) > 1:
        column = names[columns["interval"]]
        raise table.error(table.first, f"bars of several intervals ({', '.join(intervals[:4])}) in the column "
                                       f"{column!r}; keep one of them a file")
    like_price = ((volume > 0.5 * low) & (volume < 2 * high)).mean() > 0.9
    if like_price and not table.has_header and len(names) != len(BINANCE):
        raise table.error(table.first + 1, f"no header, and the column behind the close looks like a price; {FIRST_LINE}")
    base, least = (volume * close, 1e-4) if "volume" in columns else (np.ones(len(amount)), 1)
    traded = (amount > 0) & (base > 0)
    ratio = np.median(amount[traded] / base[traded]) if traded.any() else 1
    if not least <= ratio <= 1e6:  # lots of 100, money in thousands
        amount[:] = np.nan
        table.say(f"{names[columns['amount']]!r} is not volume times price; no amount is read")
    if "volume" not in columns:
        known = {name for names in HEADERS.values() for name in names}
        others = [repr(name) for name, field in zip(names, table.fields) if name.strip() and field not in known]
        if others:
            table.say(f"no volume is read, for none of {', '.join(others[:6])} is known to be one; name it volume")


def _symbol_of_rows(table, columns, cells, time, reasons):
    """Array of each row's symbol; None where the column holds none, or a code of the row and not of a symbol."""
    symbols = np.array([cell.strip() for cell in cells[columns["symbol"]]])
    distinct, which = np.unique(symbols, return_inverse=True)
    changes = np.count_nonzero(np.diff(which)) > len(time) // 2 and len(np.unique(time)) == len(time)  # from row to row
    bad = np.array([not symbol or not symbol.isprintable() for symbol in distinct])
    if bad.all() or (changes and table.fields[columns["symbol"]] in ("code", "name")):
        return None
    for row in np.flatnonzero(bad[which]).tolist():
        reasons.setdefault(row, "no symbol, or one with control characters")
    return symbols


def _bars(table, symbols, time, ohlcva, reasons):
    """Bars of each symbol, sorted, without faults. symbols: of each row, or of all.  reasons: {row: what is wrong}."""
    names, code = np.unique(symbols, return_inverse=True)
    code = np.broadcast_to(code, len(time))
    step, same = np.diff(time), code[1:] == code[:-1]
    far = same & (np.abs(step) > 360 * DAY)
    there_and_back = far[:-1] & far[1:] & (np.abs(step[:-1] + step[1:]) < 360 * DAY)  # a mistyped year
    for row in (np.flatnonzero(there_and_back) + 1).tolist():
        reasons.setdefault(row, f"time {iso(time[row])} is a year or more off the rows around it")
    empty = np.isnan(ohlcva[:4]).all(0)  # a row without any price is no bar, and no fault
    empty[list(reasons)] = False
    if empty.all():
        return []
    if empty.any() and not any(table.tickers):
        table.say(f"{empty.sum()} of {len(empty)} rows have no price: no bars")
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
    starts = np.flatnonzero(np.append(True, np.diff(code) != 0))
    return [Bars(str(names[code[a]]), time[a:b], ohlcva[a:b]) for a, b in zip(starts, [*starts[1:], len(code)])]


# -- faults

def _mend(table, ohlcva, code):
    """In place: highs and lows inside the body by rounding; an open that is missing or 0 becomes the close before."""
    open_, high, low, close = ohlcva[:4]
    lacks = (np.isnan(open_) | (open_ == 0)) & (low > 0) & (low <= close) & (close <= high)
    if lacks.any():
        before = np.append(np.nan, np.where(np.diff(code) == 0, close[:-1], np.nan))
        open_[lacks] = np.clip(np.where(before > 0, before, close), low, high)[lacks]
        table.say(f"{lacks.sum()} of {len(lacks)} rows have no open; the close before stands for it")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    np.copyto(high, top, where=(high < top) & (high >= top * (1 - ROUNDING)))
    np.copyto(low, bottom, where=(low > bottom) & (low <= bottom * (1 + ROUNDING)))


def _faults(ohlcva):
    """Yield (which rows, why) for all that can be wrong with a bar; of several the first counts."""
    o, h, l, c, v, a = ohlcva
    bottom, top = np.minimum(o, c), np.maximum(o, c)
    least, most = np.minimum(bottom, np.minimum(h, l)), np.maximum(top, np.maximum(h, l))  # or NaN
    yield np.isnan(least), "a price is missing"
    yield least <= 0, "a price is zero or negative"
    yield (least < 1e-30) | (most > 1e30), "a price is not a finite number, or outside of 1e-30 to 1e30"
    yield h < l, "high below low"
    yield h < top, "high below open or close"
    yield l > bottom, "low above open or close"
    yield (v < 0) | (a < 0), "negative volume or amount"
    yield (v > 1e30) | (a > 1e30), "volume or amount above 1e30"


def _good(table, row, ohlcva, reasons):
    """Which bars are good, bool; bad ones are counted, three are named, too many are an error. row: of each bar."""
    bad = np.isin(row, list(reasons))
    for failed, why in _faults(ohlcva):
        reasons |= {k: why for k in row[failed & ~bad].tolist()}
        bad |= failed
    n_bad = int(bad.sum())
    if n_bad:
        examples = [f"{table.path}:{table.line(k)}: {reasons[k]}" for k in sorted(row[bad].tolist())[:3]]
        if n_bad > MAX_BAD * len(row):
            remedy = "check the columns" if table.has_header else FIRST_LINE
            raise UserError(f"{examples[0]}; {n_bad} of {len(row)} rows are bad, more than {MAX_BAD:.0%}: {remedy}")
        print(f"{n_bad} bad row{'s' * (n_bad > 1)} of {len(row)} dropped: " + "; ".join(examples), file=sys.stderr)
    return ~bad


def _latest(table, names, row, time, code, ohlcva):
    """Which bars are the last of their time and symbol, bool; UserError if that drops many that differ from it."""
    again = np.append((np.diff(time) == 0) & (np.diff(code) == 0), False)
    unlike = again[:-1] & _differ(ohlcva[:, :-1], ohlcva[:, 1:])
    lost, rows = np.bincount(code[:-1][unlike], minlength=len(names)), np.bincount(code, minlength=len(names))
    worst = int(np.argmax(lost / np.maximum(rows, 1)))
    if lost[worst] > MAX_BAD * rows[worst]:
        k = int(np.flatnonzero(unlike & (code[:-1] == worst))[0])
        raise table.error(table.line(row[k + 1]),
                          f"{lost[worst]} of {rows[worst]} rows of {names[worst]} have the time of another, as "
                          f"{iso(time[k])} in line {table.line(row[k])}. Several symbols, contracts, exchanges or "
                          f"intervals in one file? Keep one a file, or name their column symbol. Times rounded by a "
                          f"spreadsheet? Export them in full")
    if lost.any():
        table.say(f"{lost.sum()} of {len(row)} rows have the time of a later one and give way to it")
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
        table.say(f"the close of {names[code[k]]} moves by a factor of {factor:.2f} at {iso(time[k + 1])}{why}{more}")


# ----------------------------------------------------------------------------------------------------------------------
# Files out

# -- the memory-mapped form: symbols.json, and per symbol NNNNNN.time.npy, NNNNNN.ohlcva.npy

def write_folder(series, out):
    """Write Bars as a folder that `load` maps into memory; symbols.json, the seal, comes last. -> (symbols, bars)."""
    seal, names, n_bars = os.path.join(out, "symbols.json"), {}, 0
    try:
        os.makedirs(out, exist_ok=True)
        with sole_writer(seal):
            if os.path.exists(seal):
                raise UserError(f"{out}: holds a data set already; choose another --out or remove it")
            for bars in series:
                n_bars += len(bars)
                seen = bars.symbol in names
                stem = os.path.join(out, f"{names.setdefault(bars.symbol, len(names)):06d}")
                if seen:  # the symbol goes on in another file
                    bars = _joined([_open_series(stem, bars.symbol), bars])
                np.save(stem + ".time.npy", bars.time)
                np.save(stem + ".ohlcva.npy", bars.ohlcva)
                progress(f"{len(names)} symbols, {n_bars:,} bars")
            with write_atomic(seal, text=True) as f:
                json.dump(list(names), f)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); choose another --out")
    progress("")
    return len(names), n_bars


def _open_folder(folder):
    """The series of a folder, mapped into memory and checked whole: who reads on may trust them."""
    try:
        with open(os.path.join(folder, "symbols.json"), encoding="utf-8") as f:
            names = json.load(f)
        listed = names if isinstance(names, list) else []
        good = {name for name in listed if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()}
        if not good or len(good) < len(names):
            raise ValueError("symbols.json is no list of different symbols")
        return [_open_series(os.path.join(folder, f"{i:06d}"), name) for i, name in enumerate(names)]
    except Exception as e:  # numpy and json raise many kinds for a damaged file
        why = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
        raise UserError(f"{folder}: not a whole data set ({why}); write it again with python data.py --out")


def _open_series(stem, symbol):
    """Bars of a folder; ValueError for arrays that are none. Reads them once, piece by piece."""
    time, ohlcva = np.load(stem + ".time.npy", mmap_mode="r"), np.load(stem + ".ohlcva.npy", mmap_mode="r")
    fits = time.dtype == np.int64 and ohlcva.dtype == np.float64 and time.ndim == 1 and ohlcva.shape == (len(time), 6)
    if not fits or not len(time):
        raise ValueError(f"{symbol}: times {time.dtype} {time.shape} and bars {ohlcva.dtype} {ohlcva.shape} do not fit")
    piece = 1 << 16
    for i in range(0, len(time), piece):
        stamps = np.asarray(time[i:i + piece + 1])  # with the first of the next piece
        if (np.diff(stamps) <= 0).any() or stamps[0] < -229 * YEAR or stamps[-1] > 229 * YEAR:
            raise ValueError(f"{symbol}: its times do not rise")
        for failed, why in _faults(np.asarray(ohlcva[i:i + piece]).T):
            if failed.any():
                raise ValueError(f"{symbol}: bar {i + int(np.argmax(failed))}: {why}")
    return Bars(symbol, time, ohlcva)


# -- what tells two data sets, or two sets of weights, apart

def weights_hash(weights) -> str:
    """A hash of named tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint(series) -> str:
    """A hash of every bar, so that a run can tell that it goes on with the data it began with."""
    digest = hashlib.sha256()
    for bars in series:
        digest.update(bars.symbol.encode("utf-8", "surrogatepass"))  # a file name may hold bytes that are no text
        for i in range(0, len(bars), 1 << 16):
            digest.update(bars.time[i:i + (1 << 16)].tobytes() + bars.ohlcva[i:i + (1 << 16)].tobytes())
    return digest.hexdigest()[:16]


# -- files that survive a kill

def save_atomic(obj, path):
    """torch.save by write_atomic: a kill leaves the old file or the new one. UserError when the disk refuses."""
    buffer = io.BytesIO()  # torch's own writer aborts the process on a full disk
    torch.save(obj, buffer)
    with write_atomic(path) as f:
        f.write(buffer.getbuffer())


@contextlib.contextmanager
def write_atomic(path, text=False):
    """with write_atomic(path) as f: a new file, bytes or text, that takes the place of path when all is written.

    Written beside path, flushed, renamed: a kill or a full disk leaves the old file or the new one, and of two runs the
    last wins whole. A symlink stays and its target is replaced; a device, a pipe and the process's own output
    (/dev/stdout) are written through. Text is UTF-8, with escapes for what is none. UserError where the disk refuses.
    """
    how = dict(mode="w", encoding="utf-8", errors="backslashreplace", newline="") if text else dict(mode="wb")
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        stream = _own_stream(path)
        if stream is not None or (os.path.exists(path) and not os.path.isfile(path)):
            with open(path if stream is None else os.dup(stream), **how) as f:
                yield f
            return
        _remove_temporaries(target, older_than=HOUR)
        with open(temporary, **how) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(OSError):  # of a new file there is no mode to keep
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
        with contextlib.suppress(PermissionError):  # Windows, where a folder cannot be flushed
            folder = os.open(os.path.dirname(target), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BrokenPipeError:
        raise  # who reads our output went away; see run
    except OSError as e:
        raise UserError(f"{path}: cannot be saved ({e.strerror or e}); make room or choose another place. "
                        f"The last good file there, if any, is intact")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # there only if something went wrong


def _remove_temporaries(target, older_than):
    """Remove what writers of `target` left that were killed, if it is so many seconds old."""
    for name in glob.glob(glob.escape(target) + ".*-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(name) > older_than:
                os.unlink(name)


def _own_stream(path):
    """1 or 2 where path is our standard output or error, else None; what was printed so far goes out first."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError, AttributeError):  # no such path, or a closed stream
            if os.path.samestat(os.stat(path), os.fstat(number)):
                stream.flush()
                return number


def load_safe(path):
    """torch.load that runs no code, onto the CPU; UserError for anything but a whole file of ours.

    A tensor larger than what the file holds of it is refused: it would take any memory once it is copied.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()) or file.testzip():
                raise zipfile.BadZipFile  # torch neither compresses nor looks at checksums
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            found = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors_in(found):
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError("a tensor claims more numbers than the file holds")
        return found
    except FileNotFoundError:
        why = "no such file"
    except OSError as e:
        why = f"cannot be read ({e.strerror})"
    except Exception as e:  # torch raises many kinds for a truncated, foreign or hostile file
        hostile = "weights_only" in str(e) and "global" in str(e).lower()
        why = e if "more numbers" in str(e) else "it asks to run code" if hostile else "truncated or foreign"
        why = f"not a checkpoint that can be loaded safely ({why})"
    raise UserError(f"{path}: {why}; name a checkpoint, or train one with python pretrain.py")


def _tensors_in(obj):
    """Every tensor in dicts, lists and tuples inside one another."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, (dict, list, tuple)):
        for part in obj.values() if isinstance(obj, dict) else obj:
            yield from _tensors_in(part)


@contextlib.contextmanager
def sole_writer(path):
    """with sole_writer(path): UserError where another run is about to write the file; of many processes, rank 0 asks.

    By a lock on `path.lock`, removed at the end. A run that was killed leaves the file, but no lock: the next takes it.
    """
    target, lock = os.path.realpath(path), None
    name = target + ".lock"
    asks = fcntl and int(os.environ.get("RANK", 0)) == 0 and (os.path.isfile(target) or not os.path.exists(target))
    while asks:
        try:
            lock = open(name, "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing it; wait for its end, or choose another --out")
        except OSError:
            break  # nothing can be written or locked there; check_out says so
        if os.path.exists(name) and os.path.samestat(os.fstat(lock.fileno()), os.stat(name)):
            _remove_temporaries(target, older_than=-np.inf)  # there is no other writer now
            break
        # else its holder has just ended and removed it: again
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):
                os.unlink(name)
            lock.close()


def check_out(path, overwrite=False, inputs=()):
    """Refuse, before any work, an output that exists, is an input, or could not be written at the end."""
    folder, exists = os.path.dirname(os.path.realpath(path)), os.path.exists(path)
    if not path or os.path.isdir(path):
        raise UserError(f"{path!r}: cannot be written, it is not the name of a file; choose another --out")
    if exists and (_own_stream(path) or not os.path.isfile(path)):
        return  # a device, a pipe, our own output: nothing there is replaced
    if not os.path.isdir(folder):
        raise UserError(f"{path}: the folder {folder} does not exist; make it or choose another --out")
    try:
        tempfile.TemporaryFile(dir=folder).close()
        if exists:
            open(path, "r+b").close()
    except OSError:
        raise UserError(f"{path}: cannot be written; choose another --out")
    if exists and any(name and os.path.exists(name) and os.path.samefile(name, path) for name in inputs):
        raise UserError(f"{path}: this run reads it; choose another --out")
    if exists and not overwrite:
        raise UserError(f"{path}: exists already; go on from it with --resume, replace it with --overwrite, "
                        f"or choose another --out")


# ----------------------------------------------------------------------------------------------------------------------
# The command line: what every script shares

def printable(text):
    """Text with control characters, escape codes and what is no letter written as escapes: one harmless line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def csv_text(text):
    """A name as a cell of a CSV file: printable, and never a formula to a spreadsheet (= + - @ get a quote)."""
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def progress(text):
    """One line that rewrites itself on a terminal, and stays out of a file; an empty text clears it."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{printable(text)}\x1b[K", end="", file=sys.stderr, flush=True)


def pick_device(name, local_rank=0):
    """The torch.device of --device; auto takes a GPU where there is one, cuda that of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: not available here ({str(e).splitlines()[0][:80]}); use --device cpu")


def pick_dtype(name, device):
    """(name, torch.dtype, why) of --dtype; auto takes the faster one, and why says what decided.

    On a GPU bf16 where it has it, else fp16. On a processor what is measured: some are three times as fast with bf16,
    some slower. Keep the name in the checkpoint, so that a resumed run has the same.
    """
    why = "as asked"
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        why = "this GPU has bf16" if name == "bf16" else "this GPU has no bf16"
    elif name == "auto":
        gain = bf16_gain()
        name, why = "bf16" if gain > 1.5 else "fp32", f"bf16 multiplies {gain:.1f} times as fast here"
    return name, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name], why


def bf16_gain():
    """How many times as fast as in float32 this processor maps 4,096 rows of 128 numbers to 512 and back in bf16."""
    least = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x, up, down = (torch.ones(shape, dtype=dtype) for shape in ((4096, 128), (128, 512), (512, 128)))
            times = []
            for _ in range(3):
                began = time.perf_counter()
                x.float().to(dtype) @ up @ down
                times.append(time.perf_counter() - began)
            least[dtype] = min(times)
    return least[torch.float32] / least[torch.bfloat16]


def peak_memory():
    """The most memory that this process has held, in bytes; None where the system does not tell (Windows)."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def check_numbers(config, positive, others):
    """UserError for a number in a training's config that cannot be, or switches that exclude each other."""
    for name in (*positive, *others):
        value, least = getattr(config, name), "above 0" if name in positive else "0 or more"
        if not 0 <= value < 2**63 or (name in positive and value == 0):  # nor is NaN
            raise UserError(f"--{name} {value}: must be a finite number, {least}")
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on from --out, or replace it")
    if config.dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError(f"--dtype {config.dtype}: choose auto, bf16, fp16 or fp32")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def _integers(text):
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 3,6,10")


def cli(config_class, doc, argv=None) -> dict:
    """The flags given, as {field: value}; there is a flag for each field of the dataclass, and no other.

    A field's type is the flag's, the comment behind it the help; a list takes one or more values; a bool is a switch.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = ""
    if {"-h", "--help"} & set(sys.argv if argv is None else map(str, argv)):    # it takes a while
        with contextlib.suppress(OSError, TypeError):   # under a profiler, in a notebook: no help
            source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.M))
    for field in fields(config_class):
        kind, default = field.type, field.default
        if type(None) in typing.get_args(kind):  # X | None
            kind = typing.get_args(kind)[0]
        how = dict(type=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is list:
            how = dict(action="extend", nargs="+", type=typing.get_args(kind)[0])
        elif typing.get_origin(kind) is tuple:
            how, default = dict(type=_integers, metavar="N,N"), ",".join(map(str, default))
        told = comments.get(field.name, "") + ("" if default is None else f" (default {default})")
        parser.add_argument(f"--{field.name}", help=told.replace("%", "%%"), default=argparse.SUPPRESS, **how)
    return vars(parser.parse_args(argv))


class StopSignal:
    """SIGTERM, Ctrl-C and a lost terminal as a flag that a loop reads between steps, to save and then exit."""

    def __init__(self):
        self.signum, self.before = 0, {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum and threading.current_thread() is threading.main_thread():  # others get no signals
                self.before[signum] = signal.signal(signum, self._note)

    def release(self):
        """All is saved: from here on the signals do what they did before."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.signum:
            raise KeyboardInterrupt  # asked twice: stop without saving
        self.signum = signum

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGTERM)  # 143 and 130, as the shell has it


def run(main):
    """Call a script's main; a UserError is one line on stderr and exit status 2, Ctrl-C is 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is printed goes nowhere
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to stop
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as e:
        why = str(e)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does: stop as the shell has it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as e:
        why = f"{e.filename or 'output'}: {e.strerror or e}; make room or choose another place"
    except (MemoryError, torch.OutOfMemoryError) as e:
        what = str(e).splitlines()[0][:80] if str(e) else "none left"
        why = f"out of memory ({what}); lower --batch_size, --n_embd or --paths"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {printable(why)}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Config:
    data: list[str] | None = None  # CSV files, folders or globs to convert
    synthetic: int | None = None   # instead of files: so many bars of the synthetic market, all symbols together
    kind: str = "edge"             # synthetic: edge (a wick tells the next direction) or reverting (a deviation decays)
    signal: float | None = None    # synthetic: edge: best accuracy above 0.5, 0.1; reverting: strength, 0 to 1, 0.75
    half_life: float = 8           # synthetic, reverting: bars in which a deviation halves
    n_symbols: int = 8             # synthetic: among so many symbols
    seed: int = 0                  # synthetic: seed
    out: str = "bars"              # folder to write


def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if (config.data is None) == (config.synthetic is None):
        raise UserError("give either --data FILES or --synthetic N_BARS")
    if config.data is None:
        if config.n_symbols < 1 or config.synthetic < config.n_symbols:
            raise UserError("--synthetic needs at least one bar for each of --n_symbols")
        best = best_accuracy(config.signal, config.kind, config.half_life)
        print(f"best reachable direction accuracy, next bar: {best:.2%}")
        if config.kind == "reverting":
            ratio = reverting_best(config.signal, config.half_life)[2]
            print(f"best path over 10 bars: {ratio:.4f} of the mean absolute error of standing still")
        series = synthetic_series(config.seed, config.signal, config.n_symbols, config.synthetic // config.n_symbols,
                                  config.kind, config.half_life)
    else:
        series = read_files(config.data)
    n_symbols, n_bars = write_folder(series, config.out)
    print(f"{config.out}: {n_symbols} symbols, {n_bars:,} bars; use it with --data {config.out}")


if __name__ == "__main__":
    run(main)
