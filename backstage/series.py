"""Bars, and what every other file stands on: columns, seconds, the exponentially weighted sum."""
from dataclasses import dataclass

import numpy as np

COLUMNS = ("open", "high", "low", "close", "volume", "amount")    # last axis of ohlcva
# first columns of a file of forecasts, which is never read as bars
FORECAST = ("time", "symbol", "step", "p_up")
CONTEXT = 32  # first bars of a series: context, never targets (the scales are still settling)
HALF_LIFE = 32          # bars; of every exponentially weighted mean below
DECAY = 0.5 ** (1 / HALF_LIFE)
HOUR, DAY, WEEK, YEAR = 3600, 86400, 7 * 86400, 365.25 * 86400


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


def faults(ohlcva):
    """Yield (which rows, why) for all that can be wrong with bars [6, T]; of several the first
    counts."""
    o, h, l, c, v, a = ohlcva
    bottom, top = np.minimum(o, c), np.maximum(o, c)
    least, most = np.minimum(bottom, np.minimum(h, l)), np.maximum(top, np.maximum(h, l))  # or NaN
    yield np.isnan(least), "a price is missing"
    yield least <= 0, "a price is zero or negative, and has no logarithm"
    yield (least < 1e-30) | (most > 1e30), "a price is not finite, or outside of 1e-30 to 1e30"
    yield h < l, "high below low"
    yield h < top, "high below open or close"
    yield l > bottom, "low above open or close"
    yield (v < 0) | (a < 0), "negative volume or amount"
    small, large = np.fmin(np.where(v > 0, v, 1), np.where(a > 0, a, 1)), np.fmax(v, a)
    yield (small < 1e-30) | (large > 1e30), "volume or amount above 1e30, or below 1e-30"


def decayed_sum(u, carry=np.float64(0.0), decay=DECAY):
    """y_t = sum_{i<=t} decay^(t-i) u_i + decay^(t+1) carry along the last axis, in log2(T)
    elementwise passes.

    After pass k each y_t holds its last 2^k terms. Elementwise, so a bar's value depends on no
    later bar, to the bit.
    """
    y = u.copy()
    n, shift = y.shape[-1], 1
    while shift < n and decay ** shift > 1e-18:  # weights below the last bit add nothing
        y[..., shift:] += decay ** shift * y[..., :-shift]
        shift *= 2
    return y + carry[..., None] * decay ** np.arange(1, n + 1)
