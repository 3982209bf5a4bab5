"""Bars in, features and batches out: everything that touches market data, once, for every stage.

    python data.py --data 'csv/*.csv' --out folder     # CSV -> a folder of mapped arrays for --data
    python data.py --synthetic 100000 --out folder       # the same from the synthetic market
    python data.py --synthetic 100000 --kind reverting   # another one, in which a deviation decays

CSV -> clean `Bars` -> causal features [T, 6] -> (tokenizer) -> tokens -> batches; and back to bars
with `inverse`.
"""
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

# some of these names are handed on: data.load, data.synthetic, data.future_times, data.parse_time,
# data.iso, data.Bars
from backstage.clock import future_times
from backstage.dates import DATES, iso, parse_time
from backstage.frame import from_frame
from backstage.markets import best_accuracy, reverting_best, synthetic, synthetic_series
from backstage.reader import load, read_files, write_folder
from backstage.script import UserError, cli, progress, run
from backstage.series import COLUMNS, CONTEXT, DAY, DECAY, HALF_LIFE, HOUR, WEEK, Bars, decayed_sum

CHANNELS = ("close", "open", "upper", "lower", "volume", "vwap")  # last axis of the features
PIECE = 512             # bars of one pass: in cache, and memory bounded on mapped bars
S_FLOOR, D_FLOOR = 1e-5, 1e-2  # least scale of log prices, of log volume
MAX_MOVE = np.log(10.0)        # most that one generated bar may move, in log price
FARTHEST = 10.0  # and in units of s_t in a generation, where history shows nothing wilder
SETTLED = 16.0                 # weight of the bars from which on s_t is taken to be settled
SLOT_HALF_LIFE = 15  # days (weeks) after which what a day (a week) showed of its slots counts half
SLOT_SECONDS = 60       # least width of a slot
SURE = 3  # slots differ by so many standard errors more than by chance, or have factor 1
SLOT_FLOOR = 0.1        # a range counts for its slot as at least this share of the mean before
COMING = 64             # bars to come whose factors a State holds
FEATURES = dict(channels=CHANNELS, half_life=HALF_LIFE, slots=SLOT_HALF_LIFE)  # for checkpoints


# --------------------------------------------------------------------------------------------------
# The hours of the market
#
# An open is five times a lunch. Each bar has a slot in the day, its time of day in steps of the
# bar, and one in the week, its hour; of daily bars the weekday is the only one. With y_dk the log
# of a positive series on day d in slot k, or its mean there, the factor of the slot is exp(L_k),
#
#     x_dk = y_dk - mean_k(y_dk - L_k)      what day d showed of slot k, less the level of the day
#     S_k = sum_d b^(age of d) x_dk,        W_k = sum_d b^(age of d),           b = 0.5^(1/15)
#     L_k = S_k / (W_k + r)                 over the days before that of the last bar
#
# r is how many days of factor 1 count beside: the variance of x_k about L_k, over that of L among
# the slots (James and Stein 1961); infinite where the slots differ no more than by chance. Factors
# of the week are made alike, of weeks in place of days, from what those of the day leave.

class Slots:
    """How much larger than usual series are at a time of the day and of the week, known before.

    time: int64 [T]; y: float64 [k, T], logs of k positive series, NaN where a bar has none;
    levels: 0: no factors, 1: of the day (of daily bars the week), 2: also of the week.
    log_factors [T, k]: of each bar, 0 for the first CONTEXT bars.
    """

    def __init__(self, time, y, levels=2):
        self.levels, self.log_factors = [], np.zeros(y.T.shape)
        # of the first bars alone: no later bar may change it
        step = int(np.median(np.diff(time[:CONTEXT]))) if len(time) >= CONTEXT else WEEK
        spans = [(DAY, max(step, SLOT_SECONDS)), (WEEK, HOUR)] if step < DAY else [(WEEK, DAY)]
        for period, width in spans[:levels] if step < 2 * DAY else ():
            row = np.cumsum(np.diff(time // period, prepend=time[0] // period) != 0)  # [T], day
            slot = time % period // width
            used = np.bincount(slot) > 0
            slots, column = np.flatnonzero(used), (np.cumsum(used) - 1)[slot]         # [K], [T]
            cell = row * len(slots) + column
            table = _slot_table(y - self.log_factors.T, cell, row[-1] + 1, len(slots))
            self.levels.append((period, width, slots, row, table))
            self.log_factors[CONTEXT:] += table[row[CONTEXT - 1:-1], :, column[CONTEXT:]]

    def coming(self, row, stamps):
        """Log factors [H, k] of bars at stamps int64 [H], as known after bar `row`.

        They are 0 at a time that the bars have never had.
        """
        log_factors = np.zeros((len(stamps), self.log_factors.shape[1]))
        for period, width, slots, rows, table in self.levels if row + 1 >= CONTEXT else ():
            slot = stamps % period // width
            column = np.searchsorted(slots, slot).clip(max=len(slots) - 1)
            log_factors += table[rows[row], :, column] * (slots[column] == slot)[:, None]
        return log_factors

    def next(self, time, horizon):
        """`coming` for the bars after those at time [T], the first of the series, by their
        clock."""
        row = len(time) - 1
        if not any(table[rows[row]].any() for *_, rows, table in self.levels):
            return np.zeros((horizon, self.log_factors.shape[1]))
        return self.coming(row, future_times(time, horizon))


def _slot_table(y, cell, n_days, n_slots):
    """L as known before each day, [days, k, slots], of y [k, T], bar t in cell day * slots +
    slot."""
    cells = np.empty((n_days, 2, len(y), n_slots))  # the mean of y, 0 if it has none; 1, 0 if none
    for i, values in enumerate(y):
        known = ~np.isnan(values)
        counts = np.bincount(cell, known, n_days * n_slots).reshape(n_days, n_slots)
        sums = np.bincount(cell, np.where(known, values, 0.0), counts.size).reshape(counts.shape)
        cells[:, 0, i], cells[:, 1, i] = sums / np.maximum(counts, 1), counts > 0
    n_seen = cells[:, 1].sum(-1)                                                # [days, k]
    n_ever = np.maximum.accumulate(cells[:, 1]).sum(-1)
    by_chance = n_ever + SURE * np.sqrt(2 * n_ever)  # most of sum_k S^2 / W, in units of the error
    # Sums over slots by cumsum, in turn: the 0 of a slot that only later bars have changes no bit
    n, mean = np.maximum(n_seen, 1), cells[:, 0].cumsum(-1)[..., -1]
    mean /= n

    table, b = np.zeros((n_days, len(y), n_slots)), 0.5 ** (1 / SLOT_HALF_LIFE)
    sums, squares = np.zeros((2, 2, len(y), n_slots))
    S, W = sums
    error, age, weight = np.zeros(len(y)), 0.0, 1e-9
    for d in range(n_days - 1):
        x, seen = cells[d]
        L = table[d] * seen
        x -= (mean[d] - L.cumsum(-1)[:, -1] / n[d])[:, None] * seen
        sums *= b
        sums += cells[d]
        squares[:] = np.square(x - L), S * S / np.maximum(W, 1e-9)
        missed, signal = squares.cumsum(-1)[..., -1]                            # [k] each
        error, age, weight = b * error + missed / n[d], b * age + 1, b * weight + n_seen[d]
        noise = error / age
        variance = np.maximum((signal - noise * n_ever[d]) / weight, 1e-9)
        r = np.where(signal > noise * by_chance[d], np.maximum(noise / variance, 0.5), np.inf)
        np.divide(S, W + r[:, None], out=table[d + 1])
    return table


def slots_of(bars, levels=2):
    """The Slots of a series' true range and volume: log_factors are log F, log G."""
    _, h, l, c, v, _ = np.asarray(bars.ohlcva, np.float64).T
    true_range = _true_range(h, l, np.append(c[:1], c[:-1]))
    usual = np.maximum(np.cumsum(true_range) / np.arange(1, len(c) + 1), S_FLOOR)
    y = np.stack([np.log(true_range + SLOT_FLOOR * usual), np.log1p(np.where(v > 0, v, np.nan))])
    y[0, :1] = np.nan  # bar 0 has no previous close
    return Slots(bars.time, y, levels)


# --------------------------------------------------------------------------------------------------
# Causal features and their inverse
#
# Six numbers for bar t. The scales s, m, d, g come from the bars before t, so that no input can see
# its own target:
#
#     close   log(C_t / C_{t-1}) / s_t          upper   log(H_t / max(O_t, C_t)) / s_t
#     open    log(O_t / C_{t-1}) / s_t          lower   log(min(O_t, C_t) / L_t) / s_t
#     volume  (log(1 + V_t) - m_t) / d_t        vwap    (log(A_t / (V_t C_t)) - g_t) / s_t
#
# then asinh, which shrinks tails and clips nothing. With F and G, the factors of range and volume
# in the slots of bar t, and the decayed means
#
#     mean_t(u) = sum_{i<t} a^(t-i) w_i u_i / sum_{i<t} a^(t-i) w_i,        a = 0.5^(1/32),
#
# where the weight w is 0 for a bar that has no u, and for bar 0, which has no previous close,
#
#     s_t = F_t mean_t(TR / F),   TR = log(max(H, previous C) / min(L, previous C)) the true range
#     m_t = log G_t + mean_t(log(1 + V) - log G)
#     d_t = mean_t(|log(1 + V) - m|),      g_t = mean_t(log(A / (V C)))

@dataclass
class State:
    """What the features of the next bar need of the past: float64, of any batch shape [...]."""
    close: np.ndarray    # [...]: the last close; NaN before the first bar
    total: np.ndarray    # [..., 4]: the numerators of s / F, m - log G, g, d
    weight: np.ndarray   # [..., 4]: their denominators
    widest: np.ndarray   # [...]: the largest true range so far, in units of its bar's s
    # [..., 3]: s / F and d where a generation began, and the most that a bar may
    origin: np.ndarray
    #                      move in it, in s; NaN outside of one
    coming: np.ndarray   # [..., H, 2]: log F, log G of the next H bars; of those after them 0

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
        """The same state as the origin of a generation, in which s / F and d stay within [1/8, 8]
        of now.

        And no bar moves by more than twice the widest so far: a code of wild days, which a model of
        many markets gives a chance of 1 in 10,000, would else multiply a calm stock's price by ten
        now and then. log_factors [..., H, 2]: of the bars to come, in place of the state's own.
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
SMG, D = slice(3), slice(3, 4)                               # places of the means in a State


def _bounds(origin):
    """The least and the greatest s / F and d, [..., 2] each. A NaN does not bind."""
    scales = origin[..., :2]
    return np.fmax(scales / 8, (S_FLOOR, D_FLOOR)), np.fmin(scales * 8, np.inf)


def features(bars, slots=None) -> tuple[np.ndarray, State]:
    """Causal features of a series: x float32 [T, 6], columns as in CHANNELS, and the State after
    it.

    Row 0 is zero; a channel without data is exactly 0. The State holds the factors of the bars to
    come, by the clock. slots: those of the bars, where at hand. ValueError for no bars.
    """
    slots = slots_of(bars) if slots is None else slots
    pieces = list(feature_pieces(bars, log_factors=slots.log_factors))
    x, state = np.concatenate([x for x, _ in pieces]), pieces[-1][1]
    return x, replace(state, coming=slots.next(bars.time, COMING))


def feature_pieces(bars, state=START, log_factors=None):
    """Yield (x float32 [n, 6], State after them) piece by piece, so that mapped bars need no
    memory.

    log_factors [T, 2]: log F, log G of the bars; None: those of their own Slots.
    """
    log_factors = slots_of(bars).log_factors if log_factors is None else log_factors
    for i in range(0, len(bars), PIECE):
        log_F, log_G = log_factors[i:i + PIECE].T                     # (n,) each
        F = np.exp(log_F)
        o, h, l, c, v, a = np.asarray(bars.ohlcva[i:i + PIECE], np.float64).T  # (n,) each
        first = np.isnan(state.close)
        previous = np.append(c[0] if first else state.close, c[:-1])
        begun = np.ones(len(c))
        begun[0] = 0.0 if first else 1.0
        has_v = np.where(v > 0, begun, 0.0)
        has_a = np.where(a > 0, has_v, 0.0)
        volume = np.log1p(np.where(v > 0, v, 0.0))
        vwap = np.log(np.where(has_a > 0, a, 1.0) / np.where(has_a > 0, v * c, 1.0))

        true_range = _true_range(h, l, previous)
        u, w = [true_range / F, volume - log_G, vwap], [begun, has_v, has_a]
        total, weight = _sums(state, SMG, u, w)
        s, m, g = _mean(total, weight)[:, :-1]                        # (n,) each
        s, m = F * np.maximum(s, S_FLOOR), log_G + m
        deviates = has_v * (weight[1, :-1] > 0)  # a deviation needs a level to deviate from
        total_d, weight_d = _sums(state, D, [np.abs(volume - m)], [deviates])
        [d] = _mean(total_d, weight_d)[:, :-1]

        s, d = np.maximum(s, S_FLOOR), np.maximum(d, D_FLOOR)
        price = np.stack([c / previous, o / previous, h / np.maximum(o, c), np.minimum(o, c) / l])
        price = np.log(price) / s
        if first:
            price[:, 0] = 0.0
        x = np.concatenate([price, [(volume - m) / d * has_v, (vwap - g) / s * has_a]])   # (6, n)
        widest = (true_range / s).max(where=weight[0, :-1] > SETTLED, initial=state.widest)
        total = np.append(total[:, -1], total_d[:, -1])
        weight = np.append(weight[:, -1], weight_d[:, -1])
        state = State(c[-1], total, weight, widest, state.origin, START.coming)
        yield np.ascontiguousarray(np.arcsinh(x).astype(np.float32).T), state


def _true_range(high, low, previous):
    return np.log(np.maximum(high, previous) / np.minimum(low, previous))


def _sums(state, which, u, w):
    """Numerators and denominators of the means `which` before each of n bars and after the last,
    [2, k, n + 1]."""
    before = np.stack([state.total[which], state.weight[which]])                          # (2, k)
    after = decayed_sum(np.stack([np.multiply(u, w), w]), before)     # (2, k, n)
    return np.concatenate([before[..., None], after], axis=-1)


def _mean(total, weight):
    return total / np.where(weight > 0, weight, 1.0)


def inverse(x, state, log_factors=None) -> tuple[np.ndarray, State]:
    """Bars from features: the inverse of `features` to float32's rounding, from a State that has
    seen a bar.

    x: [..., T, 6], finite (ValueError if not), state: of shape [...] -> ohlcva float64 [..., T, 6],
    the State after. log_factors [..., T, 2]: log F, log G of these bars; None: those that the state
    holds, then 0. Whatever x holds, each bar is a valid candle: negative wicks become 0, a move at
    most a factor of 10, volume >= 0. Without volume in the history, volume is 0; without amounts,
    amount is volume times close. A volume or vwap feature of exactly 0 says "no data".
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a feature is not finite")
    batch, n = x.shape[:-2], x.shape[-2]
    close, widest = np.broadcast_to(state.close, batch), np.broadcast_to(state.widest, batch)
    origin = np.broadcast_to(state.origin, (*batch, 3))
    coming = state.coming if log_factors is None else np.asarray(log_factors, np.float64)
    coming = np.broadcast_to(coming, (*batch, *coming.shape[-2:]))
    log_F, log_G = np.zeros((2, n) + batch)
    known = np.moveaxis(coming[..., :n, :], (-1, -2), (0, 1))         # (2, T or fewer, ...)
    log_F[:known.shape[1]], log_G[:known.shape[1]] = known
    F = np.exp(log_F)
    total = np.moveaxis(np.broadcast_to(state.total, (*batch, 4)), -1, 0)                 # (4, ...)
    weight = np.moveaxis(np.broadcast_to(state.weight, (*batch, 4)), -1, 0)
    low, high = (np.moveaxis(bound, -1, 0) for bound in _bounds(origin))  # (2, ...) each
    ones = [1] * len(batch)
    # where c, o, h, l may go
    down, up = np.reshape([-1, -1, 0, -1], (4, *ones)), np.reshape([1, 1, 1, 0], (4, *ones))
    y = np.moveaxis(np.sinh(np.clip(x, -30.0, 30.0)), (-2, -1), (0, 1))  # (T, 6, ...)
    y[:, 3] *= -1.0  # the low moves down
    out = np.empty((n, 6) + batch)
    u, w = np.ones((2, 4) + batch)  # what each bar adds to the means: values and weights
    for t in range(n):
        mean = _mean(total, weight)
        s, d = np.minimum(np.maximum(mean[::3], low), high)
        s, m, g = np.maximum(F[t] * s, S_FLOOR), log_G[t] + mean[1], mean[2]
        farthest = np.fmin(origin[..., 2] * s, MAX_MOVE)
        factor = np.exp(np.minimum(np.maximum(y[t, :4] * s, down * farthest), up * farthest))
        c, o = np.minimum(np.maximum(close * factor[:2], 1e-100), 1e100)
        h, l = np.maximum(o, c) * factor[2], np.minimum(o, c) * factor[3]
        # after bar 0 alone nothing says yet that a column is missing
        seen = (weight > 0) | (weight[0] == 0)
        has_v = (y[t, 4] != 0) & seen[1]
        has_a = (y[t, 5] != 0) & seen[2] & has_v
        volume = np.minimum(np.maximum(m + y[t, 4] * d, 0.0), 80.0) * has_v
        vwap = np.minimum(np.maximum(g + y[t, 5] * s * has_a, -80.0), 80.0)
        v = np.expm1(volume)
        out[t] = o, h, l, c, v, v * c * np.exp(vwap)
        true_range = _true_range(h, l, close)
        widest = np.where(weight[0] > SETTLED, np.maximum(widest, true_range / s), widest)
        u[...] = true_range / F[t], volume - log_G[t], vwap, np.abs(volume - m)
        w[1:] = has_v, has_a, has_v & (weight[1] > 0)
        close, total, weight = c, DECAY * total + u * w, DECAY * weight + w
    total, weight = np.moveaxis([total, weight], 1, -1)
    after = State(close, total, weight, widest, origin, coming[..., n:, :])
    return np.moveaxis(out, (0, 1), (-2, -1)), after


def scales(bars, log_factors=None):
    """s_t of every bar, [T]: log return = sinh(close feature) * s_t. log_factors: see
    feature_pieces."""
    _, h, l, c = bars.ohlcva[:, :4].T
    F = np.exp((slots_of(bars).log_factors if log_factors is None else log_factors)[:, 0])
    begun = (np.arange(len(c)) > 0).astype(float)  # bar 0 enters no mean
    true_range = _true_range(h, l, np.append(c[0], c[:-1]))
    total, weight = _sums(START, slice(1), [true_range / F], [begun])
    return np.maximum(F * np.maximum(_mean(total, weight)[0, :-1], S_FLOOR), S_FLOOR)


def states_at(bars, origins, slots=None, horizon=COMING):
    """The States after bars `origins` (rising, below len(bars)), as `features` of the bars up to
    each gives them.

    slots: those of the bars, where at hand; horizon: of how many bars to come the States hold
    factors.
    """
    slots = slots_of(bars) if slots is None else slots
    state, found = START, []
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
        # [symbols]: windows of each
        self.count = np.maximum(self.targets[:, 1] - self.first_end, 0)
        self.windows = np.cumsum(self.count)              # [symbols]: up to and with each


def make_streams(series, tokens, split, borders, block_size, batch_size) -> Streams:
    """Streams whose targets lie in one split; borders: a pair of stamps, or one for each series.

    Windows of training hold targets only, if a series is that long.
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
    """Weights [symbols], so that no market or interval rules: each by the root of its bars, within
    it by windows.

    A market is what stands behind an @ in a symbol's name (EURUSD@fx), an interval the median
    spacing of the bars.
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
    # (B, n + 1, 2)
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


# -- more series to train on, from those at hand

def mirrored(bars):
    """The market quoted the other way round, as USDEUR is to EURUSD: prices become 1 / price,
    volume stays.

    In training it keeps few bars from teaching a direction that is chance.
    """
    open_, high, low, close, volume, amount = bars.ohlcva.T
    amount = volume * volume / np.where(amount > 0, amount, np.nan)
    ohlcva = np.stack([1 / open_, 1 / low, 1 / high, 1 / close, volume, amount], axis=1)
    return Bars(bars.symbol, bars.time, ohlcva)


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
    out: str = "bars"              # folder to write


def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if config.order not in (None, *DATES):
        raise UserError(f"--order {config.order}: must be one of {', '.join(DATES)}")
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
        series = read_files(config.data, config.order)
    n_symbols, n_bars = write_folder(series, config.out)
    print(f"{config.out}: {n_symbols} symbols, {n_bars:,} bars; use it with --data {config.out}")


if __name__ == "__main__":
    run(main)
