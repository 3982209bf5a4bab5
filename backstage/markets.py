"""Synthetic markets, and the best scores that anyone can reach on them."""
import functools
import statistics

import numpy as np

from backstage.script import UserError
from backstage.series import CONTEXT, DAY, Bars, decayed_sum

SESSION = 390                              # minutes of a trading day, from 14:30 UTC
# kinds of synthetic markets, and the signal of each unless told
KINDS = {"edge": 0.1, "reverting": 0.75}


def synthetic(seed=0, signal=None, n_symbols=8, n_bars=100_000, *, kind="edge", half_life=8):
    """A market whose best one-bar direction accuracy is known: ([n_bars] minute bars for each
    symbol, that accuracy).

    Both kinds have weekday sessions that open with a gap, volatility clusters, fat tails (Student
    t, 4 degrees), volume that moves with volatility, symbols that move together. signal=0 is a null
    market, signal=None the value in KINDS. edge: a long lower wick says that the next bar closes up
    with probability 0.5 + signal, a long upper one down. reverting: a deviation that halves in
    half_life bars, around a slow random walk; signal, from 0 (the walk alone) to below 1 (the
    deviation alone), is its strength. Nothing else tells the direction.
    """
    series = list(synthetic_series(seed, signal, n_symbols, n_bars, kind, half_life))
    return series, best_accuracy(signal, kind, half_life)


def best_accuracy(signal=None, kind="edge", half_life=8):
    """The best one-bar direction accuracy that anyone can reach on a synthetic market, of bars that
    moved."""
    signal = _checked_signal(signal, kind, half_life)
    return 0.5 + signal if kind == "edge" else reverting_best(signal, half_life)[0]


def synthetic_series(seed=0, signal=None, n_symbols=8, n_bars=100_000, kind="edge", half_life=8):
    """The series of `synthetic`, one at a time."""
    signal = _checked_signal(signal, kind, half_life)
    common = np.random.default_rng([seed, 0])
    day, minute = np.divmod(np.arange(n_bars), SESSION)
    # from Monday 2020-01-06, 14:30
    time = 1578268800 + (day // 5 * 7 + day % 5) * DAY + 52200 + minute * 60
    common_vol = decayed_sum(common.normal(0, 0.06, n_bars), decay=0.98)
    coin = common.standard_normal(n_bars)  # moves all symbols
    for i in range(n_symbols):
        rng = np.random.default_rng([seed, 1 + i])
        log_vol = common_vol + decayed_sum(rng.normal(0, 0.1, n_bars), decay=0.95)
        if kind == "edge":
            open_, close, upper, lower, size = _edge_bars(rng, log_vol, coin, signal)
        else:
            open_, close, upper, lower, size = _reverting_bars(rng, log_vol, coin, signal,
                                                               half_life)
        high = np.maximum(open_, close) * np.exp(upper)
        low = np.minimum(open_, close) * np.exp(-lower)
        level = rng.uniform(6, 9)
        volume = np.exp(level + 0.7 * log_vol + 0.3 * size + rng.normal(0, 0.4, n_bars)).round() + 1
        amount = volume * (high + low + close) / 3
        ohlcva = np.stack([open_, high, low, close, volume, amount], axis=1)
        yield Bars(f"SYN{i}", time.copy(), ohlcva)


def _checked_signal(signal, kind, half_life):
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: choose one of {', '.join(KINDS)}")
    signal = KINDS[kind] if signal is None else signal
    limit = 0.5 if kind == "edge" else 1.0
    if not 0 <= signal < limit:
        raise UserError(f"--signal {signal}: must be at least 0 and below {limit} for --kind "
                        f"{kind}")
    if not 1 <= half_life <= 1000:
        raise UserError(f"--half_life {half_life}: must be from 1 to 1000 bars")
    return signal


def _edge_bars(rng, log_vol, coin, signal):
    """Open, close, both wicks in log price, |move| in sigma, [n] each: the long wick tells the next
    direction."""
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
    at_open = np.arange(len(sigma)) % SESSION == 0
    return rng.standard_normal(len(sigma)) * sigma * np.where(at_open, 1.5, 0.1)


# The reverting market. A deviation AR(1) plus a random walk has a reduced form in which all is
# known from past closes:
#     r_t = m_t + u_t,  m_{t+1} = phi m_t - k u_t,  phi = 0.5^(1/half_life),  k = signal (1 - phi)
# with r_t the log return and u_t symmetric given the past, whatever its hidden volatility. So
# sign(m_t) is the best call, the best forecast of the log return over h bars m_t (1 - phi^h) / (1 -
# phi). At k = 1 - phi the random walk is gone; k = 0 leaves it alone. From the closes m follows by
# m_{t+1} = (phi + k) m_t - k r_t.

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
    """[T, horizon]: the true expected log return over the bars that come, of a series of the
    reverting market."""
    signal = _checked_signal(signal, "reverting", half_life)
    phi = 0.5 ** (1 / half_life)
    k = signal * (1 - phi)
    log_return = np.diff(np.log(bars.ohlcva[:, 3]), prepend=np.log(bars.ohlcva[0, 3]))
    m = -k * decayed_sum(log_return, decay=phi + k)  # [T], of the bar after each
    return m[:, None] * (1 - phi ** np.arange(1, horizon + 1)) / (1 - phi)


@functools.cache
def reverting_best(signal=None, half_life=8, horizon=10):
    """What the best forecast reaches on the reverting market: (direction accuracy, its standard
    error, path ratio).

    The ratio is the mean absolute error of the best path to that of standing still. By simulation;
    the chance of a right call is exact given m, the gap and the volatility, so its error is small.
    """
    signal = _checked_signal(signal, "reverting", half_life)
    phi, n_bars = 0.5 ** (1 / half_life), 1 << 17
    right, missed, moved = [], 0.0, 0.0
    for seed in range(16):
        rng = np.random.default_rng([seed, 7])
        slow, fast = rng.normal(0, 0.06, n_bars), rng.normal(0, 0.1, n_bars)
        log_vol = decayed_sum(slow, decay=0.98) + decayed_sum(fast, decay=0.95)
        coin = rng.standard_normal(n_bars)
        m, gap, body = _reverting_moves(rng, log_vol, coin, signal, half_life)
        unit = np.exp(log_vol) / np.sqrt(2)
        # a gap of either sign
        chance = _student4((np.abs(m) + gap) / unit) + _student4((np.abs(m) - gap) / unit)
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
