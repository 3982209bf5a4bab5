"""Market data: bars become features, features become tokens and batches; and features bars again.

    python data.py --data 'csv/*.csv' --out folder       # CSV -> a mapped folder, for --data
    python data.py --synthetic 100000 --out folder       # the same of the synthetic market
    python data.py --synthetic 100000 --kind reverting   # of one in which a deviation decays

Bars (backstage/series.py) are symbol, time int64 [T] in UTC seconds, and ohlcva float64 [T, 6]:
open, high, low, close, volume, amount, NaN where a column is missing. All that is learned from them
passes through here, once, for every stage.
"""
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

# some names are imported for callers, who write data.load, data.synthetic, data.future_times,
# data.parse_time, data.iso, data.Bars, data.from_frame
from backstage.clock import future_times
from backstage.dates import DATES, iso, parse_time
from backstage.frame import from_frame
from backstage.markets import best_accuracy, reverting_best, synthetic, synthetic_series
from backstage.mapped import write_folder
from backstage.reader import load, read_files
from backstage.script import UserError, cli, progress, run
from backstage.series import CONTEXT, DAY, DECAY, HALF_LIFE, Bars, decayed_sum
from backstage.slots import SLOT_HALF_LIFE, Slots

CHANNELS = ("close", "open", "upper", "lower", "volume", "vwap")  # last axis of the features
PIECE = 512              # bars computed at a time: fits the cache, bounds memory
S_FLOOR, D_FLOOR = 1e-5, 1e-2  # smallest scale of log price and of log volume
MAX_MOVE = np.log(10.0)  # largest move of one decoded bar, in log price: a factor of 10
FARTHEST = 10.0          # in s_t: so far each bar of a forecast may move, whatever the past was
SETTLED = 16.0           # sum of weights from which s_t is reliable: about 20 bars
SLOT_FLOOR = 0.1         # added to a true range before its log, as a share of the mean so far
COMING = 64              # future bars whose factors a State holds
FEATURES = dict(channels=CHANNELS, half_life=HALF_LIFE, slots=SLOT_HALF_LIFE)  # for checkpoints


# --------------------------------------------------------------------------------------------------
# Causal features
#
# Six numbers for bar t:
#
#     close   log(C_t / C_{t-1}) / s_t          upper   log(H_t / max(O_t, C_t)) / s_t
#     open    log(O_t / C_{t-1}) / s_t          lower   log(min(O_t, C_t) / L_t) / s_t
#     volume  (log(1 + V_t) - m_t) / d_t        vwap    (log(A_t / (V_t C_t)) - g_t) / s_t
#
# then asinh, which shrinks tails and clips nothing. The scales s, m, g, d come from the bars before
# t, so that no input can see its own target. With the true range and a decayed mean,
#
#     TR = log(max(H, previous C) / min(L, previous C))
#     mean_t(u) = sum_{i<t} a^(t-i) w_i u_i / sum_{i<t} a^(t-i) w_i,        a = 0.5^(1/32),
#
# where w_i is 1, or 0 where bar i has no u (bar 0 has no previous close, and counts in no mean),
#
#     s_t = F_t mean_t(TR / F)                           g_t = mean_t(log(A / (V C)))
#     m_t = log G_t + mean_t(log(1 + V) - log G)         d_t = mean_t(|log(1 + V) - m|)
#
# F and G say how wide and how busy bars usually are at this time of the day: see slots_of.

def features(bars, slots=None) -> tuple[np.ndarray, "State"]:
    """Causal features of a series: x float32 [T, 6], columns as in CHANNELS, and the State after.

    Row 0 is zero; a channel without data is exactly 0. The State holds the factors of the bars to
    come, by the clock. slots: those of the bars, where at hand. ValueError for no bars.
    """
    slots = slots_of(bars) if slots is None else slots
    pieces = list(feature_pieces(bars, log_factors=slots.log_factors))
    x, state = np.concatenate([x for x, _ in pieces]), pieces[-1][1]
    return x, replace(state, coming=slots.next(bars.time, COMING))


def feature_pieces(bars, state=None, log_factors=None):
    """Yield (x float32 [n, 6], State after them), PIECE bars at a time: mapped bars are never all
    in memory.

    state: after the bars before, none at the start of a series; log_factors [T, 2]: log F, log G
    of the bars; None: those of their own Slots.
    """
    state = START if state is None else state
    log_factors = slots_of(bars).log_factors if log_factors is None else log_factors
    for i in range(0, len(bars), PIECE):
        log_F, log_G = log_factors[i:i + PIECE].T                              # (n,) each
        F = np.exp(log_F)
        o, h, l, c, v, a = np.asarray(bars.ohlcva[i:i + PIECE], np.float64).T  # (n,) each
        first = np.isnan(state.close)
        previous = np.append(c[0] if first else state.close, c[:-1])

        # weights: 1.0 where a bar has what a mean is of, else 0.0
        has_previous = np.ones(len(c))
        has_previous[0] = 0.0 if first else 1.0
        has_v = np.where(v > 0, has_previous, 0.0)
        has_a = np.where(a > 0, has_v, 0.0)

        # scales
        true_range = _true_range(h, l, previous)
        volume = np.log1p(np.where(v > 0, v, 0.0))
        vwap = np.log(np.where(has_a > 0, a, 1.0) / np.where(has_a > 0, v * c, 1.0))
        u, w = [true_range / F, volume - log_G, vwap], [has_previous, has_v, has_a]
        total, weight = _sums(state, S_M_G, u, w)
        s, m, g = _mean(total, weight)[:, :-1]                                 # (n,) each
        s, m = F * np.maximum(s, S_FLOOR), log_G + m
        has_level = has_v * (weight[1, :-1] > 0)
        total_d, weight_d = _sums(state, ONLY_D, [np.abs(volume - m)], [has_level])
        [d] = _mean(total_d, weight_d)[:, :-1]
        s, d = np.maximum(s, S_FLOOR), np.maximum(d, D_FLOOR)

        # features
        price = np.log(np.stack([c / previous, o / previous,
                                 h / np.maximum(o, c), np.minimum(o, c) / l])) / s
        if first:
            price[:, 0] = 0.0
        x = np.concatenate([price, [(volume - m) / d * has_v, (vwap - g) / s * has_a]])  # (6, n)

        # what the next piece needs
        widest = (true_range / s).max(where=weight[0, :-1] > SETTLED, initial=state.widest)
        total = np.append(total[:, -1], total_d[:, -1])
        weight = np.append(weight[:, -1], weight_d[:, -1])
        state = State(c[-1], total, weight, widest, state.origin, START.coming)
        yield np.ascontiguousarray(np.arcsinh(x).astype(np.float32).T), state


S_M_G, ONLY_D = slice(3), slice(3, 4)   # of the means s, m, g, d; d needs m first


def _true_range(high, low, previous):
    return np.log(np.maximum(high, previous) / np.minimum(low, previous))


def _sums(state, which, u, w):
    """Numerators and denominators of the means `which`, before each bar and at the end:
    [2, k, n + 1]."""
    before = np.stack([state.total[which], state.weight[which]])      # (2, k)
    after = decayed_sum(np.stack([np.multiply(u, w), w]), before)     # (2, k, n)
    return np.concatenate([before[..., None], after], axis=-1)


def _mean(total, weight):
    return total / np.where(weight > 0, weight, 1.0)


def scales(bars, log_factors=None):
    """s_t of every bar, [T]: log return = sinh(close feature) * s_t. See feature_pieces."""
    _, h, l, c = bars.ohlcva[:, :4].T
    F = np.exp((slots_of(bars).log_factors if log_factors is None else log_factors)[:, 0])
    has_previous = (np.arange(len(c)) > 0).astype(float)
    true_range = _true_range(h, l, np.append(c[0], c[:-1]))
    total, weight = _sums(START, slice(1), [true_range / F], [has_previous])
    return np.maximum(F * np.maximum(_mean(total, weight)[0, :-1], S_FLOOR), S_FLOOR)


# --------------------------------------------------------------------------------------------------
# The hours of the market
#
# An open is five times a lunch, so each time of the day (of daily bars each weekday) has a factor F
# of range and G of volume: the decayed geometric mean of what earlier days showed there, relative
# to the whole day, drawn to 1 by its own error. backstage/slots.py has the formulas.

def slots_of(bars, levels=2):
    """The Slots of a series' true range and volume: log_factors are log F, log G. levels: see
    Slots."""
    _, h, l, c, v, _ = np.asarray(bars.ohlcva, np.float64).T
    true_range = _true_range(h, l, np.append(c[:1], c[:-1]))
    mean_range = np.maximum(np.cumsum(true_range) / np.arange(1, len(c) + 1), S_FLOOR)
    floor = SLOT_FLOOR * mean_range                                   # (T,), of the bars so far
    y = np.stack([np.log(true_range + floor), np.log1p(np.where(v > 0, v, np.nan))])
    y[0, :1] = np.nan  # bar 0 has no previous close
    return Slots(bars.time, y, levels)


# --------------------------------------------------------------------------------------------------
# The way back: bars from features
#
# A State is what a series hands on to its next bar: to the features of real bars, or to bars made
# of features, in a forecast.

@dataclass
class State:
    """What the features of the next bar need of the past: float64, of any batch shape [...]."""
    close: np.ndarray    # [...]: the last close; NaN before the first bar
    total: np.ndarray    # [..., 4]: the numerators of s / F, m - log G, g, d
    weight: np.ndarray   # [..., 4]: their denominators
    widest: np.ndarray   # [...]: the largest true range so far, in units of its bar's s
    origin: np.ndarray   # [..., 3]: s / F and d where a forecast began, how far it may move,
    #                      in s; NaN outside of a forecast
    coming: np.ndarray   # [..., H, 2]: log F, log G of the next H bars; 0 beyond

    @classmethod
    def stack(cls, states):
        """n single states as one of shape [n, 1], to be broadcast over paths."""
        return cls(*(np.array([getattr(s, k.name) for s in states])[:, None] for k in fields(cls)))

    def scales(self):
        """(s, m, d, g) of the next bar, [...] each."""
        mean = _mean(self.total, self.weight)
        low, high = _bounds(self.origin)
        s, d = np.moveaxis(np.minimum(np.maximum(mean[..., ::3], low), high), -1, 0)
        log_F = log_G = 0.0
        if self.coming.shape[-2]:
            log_F, log_G = np.moveaxis(self.coming[..., 0, :], -1, 0)
        return np.maximum(np.exp(log_F) * s, S_FLOOR), log_G + mean[..., 1], d, mean[..., 2]

    def anchored(self, log_factors=None):
        """The state as the start of a forecast: from here on s / F and d move at most 8-fold.

        And a bar moves at most twice the widest so far, or FARTHEST s if that is more. Otherwise a
        rare code (1 in 10,000) would multiply the price of a calm stock by ten. log_factors
        [..., H, 2]: of the bars to come, in place of the state's own.
        """
        s, d = np.moveaxis(_mean(self.total, self.weight)[..., ::3], -1, 0)
        s, d = np.maximum(s, S_FLOOR), np.maximum(d, D_FLOOR)
        origin = np.stack([s, d, np.maximum(2 * self.widest, FARTHEST)], axis=-1)
        return replace(self, origin=origin,
                       coming=self.coming if log_factors is None else log_factors)

    def map(self, f):
        """f on every field: to index, repeat or stack states. The axes of the batch lead."""
        return State(*(f(getattr(self, k.name)) for k in fields(self)))


START = State(np.float64(np.nan), np.zeros(4), np.zeros(4), np.float64(0.0), np.full(3, np.nan),
              np.zeros((0, 2)))


def _bounds(origin):
    """The least and the greatest s / F and d, [..., 2] each; outside of a forecast floors alone."""
    scales = origin[..., :2]
    return np.fmax(scales / 8, (S_FLOOR, D_FLOOR)), np.fmin(scales * 8, np.inf)


def _factors(coming, n):
    """log F, log G of the next n bars, [2, n, ...], from coming [..., H, 2]; 0 beyond its H."""
    known = np.moveaxis(coming[..., :n, :], (-1, -2), (0, 1))         # (2, n or fewer, ...)
    return np.concatenate([known, np.zeros((2, n - known.shape[1], *known.shape[2:]))], axis=1)


def inverse(x, state, log_factors=None) -> tuple[np.ndarray, State]:
    """Bars from features, to float32's rounding; the state must have seen a bar.

    x: [..., T, 6], finite (ValueError if not), state: of shape [...] -> ohlcva float64 [..., T, 6],
    the State after. log_factors [..., T, 2]: log F, log G of these bars; None: those that the state
    holds, then 0. Whatever x holds, each bar is a valid candle: negative wicks become 0, no move
    exceeds a factor of 10, volume is at least 0. Volume is 0 if no bar before had volume; amount is
    volume times close if no bar before had an amount. A volume or vwap feature of exactly 0 says
    "no data".
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a feature is not finite")
    batch, n = x.shape[:-2], x.shape[-2]
    close, widest = np.broadcast_to(state.close, batch), np.broadcast_to(state.widest, batch)
    origin = np.broadcast_to(state.origin, (*batch, 3))
    coming = state.coming if log_factors is None else np.asarray(log_factors, np.float64)
    coming = np.broadcast_to(coming, (*batch, *coming.shape[-2:]))
    log_F, log_G = _factors(coming, n)
    F = np.exp(log_F)
    total = np.moveaxis(np.broadcast_to(state.total, (*batch, 4)), -1, 0)           # (4, ...)
    weight = np.moveaxis(np.broadcast_to(state.weight, (*batch, 4)), -1, 0)
    low, high = (np.moveaxis(bound, -1, 0) for bound in _bounds(origin))            # (2, ...) each
    # bounds of the log moves of c, o, h, l, in units of the farthest: h only up, l only down
    ones = [1] * len(batch)
    down, up = np.reshape([-1, -1, 0, -1], (4, *ones)), np.reshape([1, 1, 1, 0], (4, *ones))
    y = np.moveaxis(np.sinh(np.clip(x, -30.0, 30.0)), (-2, -1), (0, 1))             # (T, 6, ...)
    y[:, 3] *= -1.0  # the low moves down
    out = np.empty((n, 6) + batch)
    u, w = np.ones((2, 4) + batch)  # what each bar adds to the means: values and weights
    for t in range(n):
        # scales
        mean = _mean(total, weight)
        s, d = np.minimum(np.maximum(mean[::3], low), high)           # means 0 and 3: s / F and d
        s, m, g = np.maximum(F[t] * s, S_FLOOR), log_G[t] + mean[1], mean[2]

        # prices
        farthest = np.fmin(origin[..., 2] * s, MAX_MOVE)
        factor = np.exp(np.minimum(np.maximum(y[t, :4] * s, down * farthest), up * farthest))
        c, o = np.minimum(np.maximum(close * factor[:2], 1e-100), 1e100)
        h, l = np.maximum(o, c) * factor[2], np.minimum(o, c) * factor[3]

        # volume and amount; until a mean has begun, no column counts as missing
        seen = (weight > 0) | (weight[0] == 0)
        has_v = (y[t, 4] != 0) & seen[1]
        has_a = (y[t, 5] != 0) & seen[2] & has_v
        volume = np.minimum(np.maximum(m + y[t, 4] * d, 0.0), 80.0) * has_v
        vwap = np.minimum(np.maximum(g + y[t, 5] * s * has_a, -80.0), 80.0)
        v = np.expm1(volume)
        out[t] = o, h, l, c, v, v * c * np.exp(vwap)

        # means after the bar
        true_range = _true_range(h, l, close)
        widest = np.where(weight[0] > SETTLED, np.maximum(widest, true_range / s), widest)
        u[...] = true_range / F[t], volume - log_G[t], vwap, np.abs(volume - m)
        w[1:] = has_v, has_a, has_v & (weight[1] > 0)
        close, total, weight = c, DECAY * total + u * w, DECAY * weight + w
    total, weight = np.moveaxis([total, weight], 1, -1)
    after = State(close, total, weight, widest, origin, coming[..., n:, :])
    return np.moveaxis(out, (0, 1), (-2, -1)), after


def states_at(bars, origins, slots=None, horizon=COMING):
    """The States after bars `origins` (rising), as `features` of the bars up to each gives them.

    slots: those of the bars, where at hand; horizon: of how many bars to come the States hold
    factors.
    """
    slots = slots_of(bars) if slots is None else slots
    state, found = START, []
    # once through all bars, in pieces; each origin from the start of its own
    for i in range(0, max(origins, default=-1) + 1, PIECE):
        for o in origins:
            if i <= o < i + PIECE:
                _, after = next(feature_pieces(bars[i:o + 1], state, slots.log_factors[i:o + 1]))
                if horizon:
                    after = replace(after, coming=slots.next(bars.time[:o + 1], horizon))
                found.append(after)
        state = next(feature_pieces(bars[i:i + PIECE], state, slots.log_factors[i:i + PIECE]))[1]
    return found


# --------------------------------------------------------------------------------------------------
# Splits, tokens, batches

def split_borders(series, val_start=None, test_start=None) -> tuple[int, int]:
    """(val_start, test_start) in UTC seconds: train < val_start <= val < test_start <= test, over
    all symbols at once.

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
        raise UserError(f"the split leaves no room: bars begin {iso(stamps[0])}, "
                        f"val {iso(borders[0])}, test {iso(borders[1])}; set "
                        f"--val_start and --test_start in this order")
    return borders[0], borders[1]


def own_borders(series, share) -> np.ndarray:
    """(val_start, test_start) of each series, int64 [series, 2]: val is the last share of its own
    time.

    For weights of many markets whose bars end in different years; nothing is left for test.
    """
    first, last = np.array([(bars.time[0], bars.time[-1]) for bars in series]).T
    val = last - (share * (last - first)).astype(np.int64)
    return np.stack([val, np.full_like(last, last.max() + 1)], axis=1)


def targets_of(bars, split, borders):
    """[first, last) of the bars that are targets in "train", "val" or "test"; context may reach
    back before first."""
    val, test = np.searchsorted(bars.time, borders)
    first, last = {"train": (0, val), "val": (val, test), "test": (test, len(bars))}[split]
    return max(int(first), CONTEXT), int(last)


@dataclass
class Streams:
    """Token series of many symbols, and which of their bars are targets.

    A window is named by its last target e: its inputs are the bars e - block_size .. e - 1, its
    targets one bar later.
    """
    tokens: list          # per symbol int16 [T, 2]: coarse, fine
    time: list            # per symbol int64 [T]
    targets: np.ndarray   # int64 [symbols, 2]: first target, one past the last
    block_size: int       # bars of context in a window
    batch_size: int       # windows in the global batch
    whole: bool = False   # only windows in which every bar is a target
    weights: np.ndarray | None = None  # [symbols]: how often each is drawn; None: as windows

    def __post_init__(self):
        first = self.targets[:, 0] + (self.block_size - 1) * self.whole
        self.first_end = np.maximum(first, self.block_size)  # [symbols]: the least e
        self.count = np.maximum(self.targets[:, 1] - self.first_end, 0)  # [symbols]: windows
        self.windows = np.cumsum(self.count)              # [symbols]: windows, running total


def make_streams(series, tokens, split, borders, block_size, batch_size) -> Streams:
    """Streams whose targets lie in one split; borders: a pair of stamps, or one for each series.

    Windows of training hold targets only, unless every series is shorter than a window.
    """
    pairs = np.broadcast_to(borders, (len(series), 2))
    targets = [targets_of(bars, split, pair) for bars, pair in zip(series, pairs)]
    targets = np.array(targets, np.int64).reshape(-1, 2)
    whole = split == "train" and bool((targets[:, 1] - targets[:, 0] >= block_size).any())
    return Streams(tokens, [bars.time for bars in series], targets, block_size, batch_size, whole)


def draw_windows(streams, seed, step, rank=0, world=1):
    """(symbol, last target) of rows rank::world of the global batch, int64 [B] each; (seed, step)
    alone decide."""
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
    """Weights [symbols] by which windows are drawn: of groups by the root of their windows, so that
    none rules, of symbols within a group by their windows.

    A group is of one market, the part after an @ in a symbol's name (EURUSD@fx), and of one
    interval, the median spacing of the bars.
    """
    groups = [f"{bars.symbol.partition('@')[2]} {int(np.median(np.diff(bars.time)))}"
              for bars in series]
    group = np.unique(groups, return_inverse=True)[1]
    weights = streams.count / np.sqrt(np.maximum(1, np.bincount(group, streams.count)))[group]
    return weights / weights.sum()


def get_batch(streams, seed, step, rank=0, world=1):
    """Rows rank::world of the global batch, a pure function of (seed, step); as `gather` returns
    them."""
    return gather(streams, *draw_windows(streams, seed, step, rank, world))


def gather(streams, which, ends):
    """coarse, fine, time, (target_coarse, target_fine), torch.int64 [B, block_size] each, of the
    windows (which, ends).

    A target that does not count (context, another split) is -1.
    """
    n = streams.block_size
    # inputs and targets in one: (B, n + 1, 2)
    tokens = np.stack([streams.tokens[i][e - n:e + 1] for i, e in zip(which, ends)])
    time = np.stack([streams.time[i][e - n:e] for i, e in zip(which, ends)])              # (B, n)
    at = np.asarray(ends)[:, None] + np.arange(1 - n, 1)              # (B, n): of each target
    counts = at >= streams.targets[which, :1]
    target = np.where(counts[..., None], tokens[:, 1:], -1)           # (B, n, 2)
    parts = (tokens[:, :-1, 0], tokens[:, :-1, 1], time, target[..., 0], target[..., 1])
    coarse, fine, time, *target = (torch.from_numpy(part.astype(np.int64)) for part in parts)
    return coarse, fine, time, tuple(target)


def tiles(streams, at_most):
    """Windows (symbol, last target) side by side, evenly thinned to at_most: what a loss is
    measured on.

    Cut from the last target backwards; the first targets of a series may fit into no window.
    """
    found = []
    for symbol, first in enumerate(streams.first_end.tolist()):
        last = int(streams.targets[symbol, 1]) - 1
        found += [(symbol, end) for end in range(last, first - 1, -streams.block_size)]
    keep = np.linspace(0, len(found) - 1, min(at_most, len(found))).round().astype(int)
    return [found[k] for k in keep]


def tokenize(bars, tokenizer, x=None) -> np.ndarray:
    """Tokens of a series, int16 [T, 2]: coarse, fine; made in pieces. x: its features, where at
    hand."""
    if x is not None and len(x) != len(bars):
        raise ValueError(f"features of {len(x)} bars for a series of {len(bars)}")
    tokens = [np.empty((0, 2), np.int16)]
    if x is None:
        pieces = (piece for piece, _ in feature_pieces(bars))
    else:
        pieces = np.split(x, range(PIECE, len(x), PIECE))
    for piece in pieces:
        coarse, fine = tokenizer.encode(torch.from_numpy(piece))      # (n,) each
        tokens.append(torch.stack((coarse, fine), dim=-1).cpu().numpy().astype(np.int16))
        if len(tokens) % 256 == 0:
            progress(f"tokens of {bars.symbol}: {len(tokens) * PIECE:,} of {len(bars):,} bars")
    progress("")
    return np.concatenate(tokens)


def mirrored(bars):
    """The market quoted the other way round, as USDEUR is to EURUSD: prices become 1 / price,
    volume stays.

    In training it keeps few bars from teaching a direction that is chance. The amount becomes
    volume / vwap.
    """
    open_, high, low, close, volume, amount = bars.ohlcva.T
    amount = volume * volume / np.where(amount > 0, amount, np.nan)
    ohlcva = np.stack([1 / open_, 1 / low, 1 / high, 1 / close, volume, amount], axis=1)
    return Bars(bars.symbol, bars.time, ohlcva)


def merged(bars, k):
    """Every k bars in a row as one, at the time of the first; those shorter than a day are not
    merged across a midnight of UTC."""
    if len(bars) < 2:
        return bars
    place = np.arange(len(bars))
    if np.median(np.diff(bars.time)) < DAY:
        place -= np.searchsorted(bars.time // DAY, bars.time // DAY)    # within the day
    first = np.flatnonzero(place % k == 0)
    last = np.append(first[1:], len(bars)) - 1
    open_, high, low, close, *amounts = bars.ohlcva.T
    known = [np.logical_or.reduceat(~np.isnan(x), first) for x in amounts]
    sums = [np.add.reduceat(np.nan_to_num(x), first) for x in amounts]
    sums = [np.where(is_known, x, np.nan) for is_known, x in zip(known, sums)]
    high, low = np.maximum.reduceat(high, first), np.minimum.reduceat(low, first)
    ohlcva = np.stack([open_[first], high, low, close[last], *sums], axis=1)
    return Bars(bars.symbol, bars.time[first], ohlcva)


# --------------------------------------------------------------------------------------------------
# The command line

@dataclass
class Config:
    data: list[str] | None = None  # CSV files, folders or globs to convert
    synthetic: int | None = None   # so many bars of the synthetic market, in all
    kind: str = "edge"             # synthetic: edge (a wick tells) or reverting
    signal: float | None = None    # synthetic: edge: 0.1; reverting: 0.75
    half_life: float = 8           # synthetic, reverting: bars in which a deviation halves
    n_symbols: int = 8             # synthetic: among so many symbols
    seed: int = 0                  # synthetic: seed
    order: str | None = None       # of dates that do not tell: month/day/year or the like
    max_unpacked: int = 16         # MB that a packed file may hold if it is over 30 times its size
    out: str = "bars"              # folder to write


def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if config.order not in (None, *DATES):
        raise UserError(f"--order {config.order}: must be one of {', '.join(DATES)}")
    if not 0 < config.max_unpacked < 10**9:
        raise UserError(f"--max_unpacked {config.max_unpacked}: must be a number of MB above 0")
    if (config.data is None) == (config.synthetic is None):
        raise UserError("give either --data FILES or --synthetic N_BARS")
    if config.data is None:
        if config.n_symbols < 1 or config.synthetic < config.n_symbols:
            raise UserError("--synthetic needs at least one bar for each of --n_symbols")
        best = best_accuracy(config.signal, config.kind, config.half_life)
        print(f"best reachable direction accuracy, next bar: {best:.2%}")
        if config.kind == "reverting":
            ratio = reverting_best(config.signal, config.half_life)[2]
            print(f"best path over 10 bars: {ratio:.4f} of the mean absolute error of "
                  f"standing still")
        n_bars = config.synthetic // config.n_symbols
        series = synthetic_series(config.seed, config.signal, config.n_symbols, n_bars,
                                  config.kind, config.half_life)
    else:
        series = read_files(config.data, config.order, config.max_unpacked * 10**6)
    n_symbols, n_bars = write_folder(series, config.out)
    print(f"{config.out}: {n_symbols} symbols, {n_bars:,} bars; use it with --data {config.out}")


if __name__ == "__main__":
    run(main)
