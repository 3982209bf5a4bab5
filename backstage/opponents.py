"""The opponents of a forecast, each fitted on the bars before the first target (HAR anew every 500
bars), or on those before each origin."""
import math
import zlib

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import data
from backstage.scores import joined, score_normal, score_paths, score_residuals, named, normal_cdf
from backstage.series import decayed_sum


def log_range(bars):
    """log(H / L) of each bar."""
    return np.log(bars.ohlcva[:, 1] / bars.ohlcva[:, 2])


def log_volume(bars):
    """log(1 + V) of each bar, NaN where nothing was traded or nothing is known."""
    volume = bars.ohlcva[:, 4]
    return np.log1p(np.where(volume > 0, volume, np.nan))


def volume_scales(bars, slots):
    """Level and width of log volume before each bar, m_t and d_t of data.features: [T, 2]."""
    volume, log_G = log_volume(bars), slots.log_factors[:, 1]
    volume[0] = np.nan  # bar 0 enters no mean
    level = log_G + decayed_mean_before(volume - log_G)
    width = decayed_mean_before(np.abs(volume - level))
    return np.stack([np.nan_to_num(level), np.fmax(width, data.D_FLOOR)], 1)


def decayed_mean_before(u):
    """Decayed mean of the known ones of u [T] before each: [T], NaN where none is known."""
    known = np.isfinite(u)
    total, weight = decayed_sum(np.stack([np.where(known, u, 0.0), known]))  # itself included
    return np.append(np.nan, (total / np.where(weight > 0, weight, np.nan))[:-1])


# --------------------------------------------------------------------------------------------------
# Its opponents, each fitted on the bars before the first target, or on those before each origin

RESIDUALS = 500   # that filtered historical simulation (the newest) and HAR draw from
LAMBDA = 0.94     # decay of the former's volatility (as RiskMetrics, 1996)
LAGS = 5          # bars that the logistic regression looks at


def baselines(t, paths):
    """{name: forecaster} of all of them."""
    return dict(persistence=persistence(t), always_up=dict(p_up=np.ones(len(t.r))),
                ar1=each_series(t, ar1), logistic=logistic(t), gaussian20=each_series(t, gaussian),
                fhs=each_series(t, historical, paths), har=har(t, paths))


def each_series(t, forecaster, *options):
    """forecaster(t, series, rows of its paths, *options) of every series, as one."""
    return joined([forecaster(t, i, rows, *options) for i, rows in enumerate(t.path_rows)])


def persistence(t):
    """All stays as it is: no return, the range and volume of the bar before. A point's CRPS is its
    error."""
    zero = np.zeros(len(t.r))
    ranges = [np.abs(np.diff(log_range(bars), prepend=np.nan)) for bars in t.series]
    volumes = [np.abs(np.diff(log_volume(bars), prepend=np.nan)) for bars in t.series]
    return dict(mean=zero, point=zero, crps=np.abs(t.r),
                range_crps=t.flat(ranges), volume_crps=t.flat(volumes),
                path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r))


def ar1(t, i, rows):
    """Each log return from the one before."""
    r, (first, last) = t.returns[i], t.ranges[i]
    x, y = r[1:first - 1], r[2:first]
    b = np.cov(x, y)[0, 1] / max(x.var(ddof=1), 1e-18)
    a = y.mean() - b * x.mean()
    sigma = max((y - a - b * x).std(), 1e-9)
    one = score_normal(a + b * r[first - 1:last - 1], sigma, r[first:last])
    # (H,): weight of a shock k bars on in the return since the origin
    psi = np.cumsum(b ** np.arange(t.horizon))
    mean = a * psi.cumsum() + b * psi * r[t.origins[i], None]  # (n, H)
    many = score_normal(mean, np.sqrt((psi**2).cumsum()) * sigma, t.path_r[rows])
    return one | dict(p_up=normal_cdf(one["mean"] / sigma)) | named("path", many)


def gaussian(t, i, rows):
    """No drift, the volatility of the last 20 bars."""
    r, (first, last) = t.returns[i], t.ranges[i]
    rms = np.sqrt(sliding_window_view(r**2, 20).mean(-1)).clip(1e-9)  # of bars k .. k + 19
    one = score_normal(np.zeros(last - first), rms[first - 20:last - 20], r[first:last])
    sigma = rms[t.origins[i] - 19, None] * np.sqrt(np.arange(1, t.horizon + 1))  # (n, H)
    return one | named("path", score_normal(np.zeros(sigma.shape), sigma, t.path_r[rows]))


def historical(t, i, rows, paths):
    """Filtered historical simulation: residuals of a decayed volatility, which along a path follows
    what is drawn (Barone-Adesi, Giannopoulos and Vosper, Journal of Futures Markets 1999)."""
    r, (first, last), origins = t.returns[i], t.ranges[i], t.origins[i]
    vol, z = filtered(r, first)
    n = z.shape[1]
    known = z[first - n:last - n]  # (targets, n)
    one = score_residuals(known, r[first:last], vol[first - 1:last - 1])
    p_up = ((known > 0).sum(-1) + 0.5) / ((known != 0).sum(-1) + 1)

    random = np.random.default_rng([t.seed, zlib.crc32(t.series[i].symbol.encode()), 2])
    pick = random.integers(n, size=(len(origins), paths, t.horizon))
    moves = filtered_paths(vol[origins], z[origins + 1 - n], pick)
    return one | dict(p_up=p_up) | score_paths(moves, t, rows)


def filtered(r, first):
    """Of returns r [T] the decayed volatility after each bar [T], and in row k of z the residuals
    of bars k .. k + n - 1, as many as there are before the first target."""
    begun = (np.arange(len(r)) > 0).astype(float)
    squares, weight = decayed_sum(r**2, decay=LAMBDA), decayed_sum(begun, decay=LAMBDA)
    vol = np.sqrt(squares / np.maximum(weight, 1e-9)).clip(1e-9)  # known after each bar
    n = min(RESIDUALS, first - 12)  # the first dozen volatilities are too raw
    return vol, sliding_window_view(np.append(0.0, r[1:] / vol[:-1]), n)


def filtered_paths(vol, z, pick):
    """Log returns [n, paths, H] from volatilities vol [n] and the residuals `pick` of z [n, m]."""
    variance, moves = np.repeat(vol[:, None]**2, pick.shape[1], 1), np.empty(pick.shape)
    for k in range(pick.shape[2]):
        residual = np.take_along_axis(z, pick[:, :, k], 1)
        moves[:, :, k] = np.sqrt(variance) * residual
        variance = LAMBDA * variance + (1 - LAMBDA) * moves[:, :, k]**2
    return moves


def logistic(t):
    """Logistic regression of the direction on the last bars' features, all symbols together; {}
    under 1,000 bars."""
    x = [data.features(*one)[0] for one in zip(t.series, t.slots)]
    known = []  # of each symbol the bars before its first target that moved
    for r, (first, _) in zip(t.returns, t.ranges):
        rows = np.arange(data.CONTEXT, first)
        known.append(rows[r[rows] != 0])
    total = sum(map(len, known))
    if total < 1000:
        return {}
    known = [rows[::math.ceil(total / 300_000)] for rows in known]  # about 300,000 are enough
    X = np.concatenate([lagged(x[i], rows) for i, rows in enumerate(known)])  # (bars, 1 + 6 LAGS)
    up = np.concatenate([r[rows] > 0 for r, rows in zip(t.returns, known)])
    w = np.zeros(X.shape[1])
    for _ in range(8):  # Newton's method, with a ridge of 1
        p = 1 / (1 + np.exp(-X @ w))
        w += np.linalg.solve((X.T * (p * (1 - p))) @ X + np.eye(len(w)), X.T @ (up - p) - w)
    X = np.concatenate([lagged(x[i], np.arange(*span)) for i, span in enumerate(t.ranges)])
    return dict(p_up=1 / (1 + np.exp(-X @ w)))


def lagged(x, rows):
    """1 and the features x [T, 6] of the LAGS bars before each of the rows."""
    lags = [x[rows - k] for k in range(1, LAGS + 1)]
    return np.concatenate([np.ones((len(rows), 1)), *lags], axis=1)


def joint_paths(t, together, uniform):
    """{name: log returns [J, paths, H]} of FHS and HAR at the places of `together` (see Together).

    Each draws its residuals, in order of size, by the numbers uniform [J, paths, H]: where these
    move together over the symbols, so do the paths. No bar moves by more than data.MAX_MOVE.
    """
    moves = dict(fhs=np.empty(uniform.shape), har=np.empty(uniform.shape))
    for i in np.unique(together.symbol):
        rows = together.symbol == i
        origins, u = together.bar[rows], uniform[rows]
        vol, z = filtered(t.returns[i], t.ranges[i][0])
        n = z.shape[1]
        z = np.sort(z[origins + 1 - n], 1)                                      # (origins, n)
        moves["fhs"][rows] = filtered_paths(vol[origins], z, place(u, n))
        moves["har"][rows] = volatility_paths(t.volatility[i], origins, place(u, RESIDUALS))
    return {name: r.clip(-data.MAX_MOVE, data.MAX_MOVE) for name, r in moves.items()}


def place(u, n):
    """Which of n equal parts of [0, 1] each number u lies in."""
    return np.minimum((u * n).astype(int), n - 1)


# --------------------------------------------------------------------------------------------------
# HAR on ranges, the strongest opponent

WINDOWS = (1, 5, 22, 66)   # bars over which HAR takes means
HAR_FLOOR = 0.05           # least range in HAR, as a share of the mean
LEVEL = 500                # half-life, in bars, of the scale of HAR's residuals
REFIT = 500                # stamps of targets after which HAR's weights are fitted anew


def har(t, paths):
    """Volatility, range and volume each by a HAR of its own; a path draws residuals of return and
    range jointly."""
    random = np.random.default_rng([t.seed, 3])
    ranges = fit_har(t, [log_range(bars) for bars in t.series])
    volumes = fit_har(t, [np.exp(log_volume(bars)) for bars in t.series], logs=True)
    parts = []
    for i, (first, last) in enumerate(t.ranges):
        bars, now, volatility = t.series[i], slice(first, last), t.volatility[i]
        scores = score_residuals(volatility.residuals[0], t.returns[i][now], volatility.sigma[now])
        z, scale = ranges[i].residuals[0], ranges[i].forecast[now]
        scores |= named("range", score_residuals(z, log_range(bars)[now], scale))
        if volumes:
            z, location = np.log(volumes[i].residuals[0]), np.log(volumes[i].forecast[now])
            scores |= named("volume", score_residuals(z, log_volume(bars)[now], 1.0, location))
        pick = random.integers(RESIDUALS, size=(len(t.origins[i]), paths, t.horizon))
        moves = volatility_paths(volatility, t.origins[i], pick)
        parts.append(scores | score_paths(moves, t, t.path_rows[i]))
    return joined(parts)


class Har:
    """Forecasts of a positive series u [T] of one symbol from its own past, NaN where a bar has
    none.

    Heterogeneous autoregression (after Corsi, Journal of Financial Econometrics 2009): the root of
    u on roots of its means over WINDOWS; logs: its log on the means of its log. u is taken in units
    of its mean before the first target times its factors in the Slots of the day and of the week,
    or fewer `levels` of these. What fit_har adds: weights [fits, 5], and fit [T], which of them are
    each bar's; forecast [T] of each bar; ratio [T], u over that; residuals [1, RESIDUALS], ratios
    in order.
    """

    def __init__(self, bars, u, first, start, logs, levels):
        self.bars, self.logs = bars, logs
        known = np.isfinite(u)
        self.mean = max(u[:first].mean(where=known[:first]) if known[:first].any() else 1.0, 1e-9)
        u = np.where(known, u, self.mean)
        if not logs:
            u = np.maximum(u, HAR_FLOOR * self.mean)
        self.slots = data.Slots(bars.time, np.where(known, np.log(u), np.nan)[None], levels)
        self.unit = self.mean * np.exp(self.slots.log_factors[:, 0])
        self.u = u / self.unit
        # bars whose means are settled; those to learn from; those before any symbol's first target
        self.known = known & (np.arange(len(u)) >= min(WINDOWS[-1], first // 2))
        self.fitted = np.flatnonzero(self.known[:first])
        self.early = self.fitted[bars.time[self.fitted] < start]
        usual, self.y = (0.0, np.log(self.u)) if logs else (1.0, self.u)
        self.x = np.stack([np.append(usual, trailing_mean(self.y, n)[:-1]) for n in WINDOWS], 1)
        if not logs:
            self.x, self.y = np.sqrt(self.x), np.sqrt(self.y)       # (T, 4), known before; (T,)

    def predict(self, x, rows):
        """u of the next bar, in its units, from the roots or logs of its means over WINDOWS, a list
        of [n, ...].

        rows [n]: the next bars, of which the weights are.
        """
        weights = self.weights[self.fit[rows]].T                        # (5, n)
        constant, *weights = weights.reshape(*weights.shape, *[1] * (np.ndim(x[0]) - 1))
        y = constant + sum(weight * column for weight, column in zip(weights, x))
        return np.exp(y) if self.logs else np.maximum(y, HAR_FLOOR**0.5)**2


def fit_har(t, values, logs=False):
    """A Har of each series' values [T], with one regression for all of them; None if there is
    nothing to learn from.

    With factors of day and week, of the day alone or none: what was the best before the first
    target.
    """
    forms = [fit_form(t, values, logs, levels) for levels in range(3)]
    return forms[0] and min(forms, key=early_error)


def early_error(hars):
    """Mean size of log u / forecast about its median, before any symbol's first target."""
    error = np.log(np.concatenate([har.ratio[har.early] for har in hars]))
    return np.abs(error - np.median(error)).mean()


def fit_form(t, values, logs, levels):
    """fit_har with so many levels of Slots. After every REFIT stamps of targets it is fitted anew,
    to all bars before."""
    edges = np.unique(t.time)[::REFIT]                              # the first of each fit's bars
    hars = [Har(bars, u, first, edges[0], logs, levels)
            for bars, u, (first, _) in zip(t.series, values, t.ranges)]
    if not sum(len(har.early) for har in hars):
        return None
    moments = np.zeros((len(edges), 5, 6))
    for har in hars:
        later = np.searchsorted(edges, har.bars.time, side="right")     # the first to know the bar
        har.fit = np.maximum(later - 1, 0)
        X = np.concatenate([np.ones((len(later), 1)), har.x, har.y[:, None]], axis=1)   # (T, 6)
        if not logs:
            X /= har.x.mean(1, keepdims=True)                           # a root's error grows so
        for k in range(later[0], min(later[-1] + 1, len(edges))):
            rows = X[(later == k) & har.known]
            moments[k] += rows[:, :5].T @ rows
    moments = moments.cumsum(0)
    weights = np.stack([np.linalg.lstsq(m[:, :5], m[:, 5], rcond=None)[0] for m in moments])
    for har in hars:
        har.weights = weights
        forecast = har.predict(har.x.T, np.arange(len(har.u)))
        har.forecast, har.ratio = forecast * har.unit, har.u / forecast
    give_residuals(hars, [har.ratio[None] for har in hars])
    return hars


def trailing_mean(u, n):
    """Mean of the last n values up to each, of fewer at the beginning: [T]."""
    total = np.cumsum(u)
    total[n:] -= total[:-n]
    return total / np.minimum(np.arange(1, len(u) + 1), n)


def give_residuals(hars, values):
    """To each Har RESIDUALS columns of its values [k, T], half its own, half of all, in order of
    the first row."""
    shared = np.concatenate([v[:, har.early] for v, har in zip(values, hars)], axis=1)
    shared = evenly(evenly(shared, RESIDUALS), RESIDUALS // 2)
    for v, har in zip(values, hars):
        own = v[:, har.fitted]
        own = evenly(own, RESIDUALS // 2) if own.shape[1] else own
        har.residuals = evenly(np.concatenate([own, shared], axis=1), RESIDUALS)


def evenly(values, n):
    """n of the columns of values [k, N], evenly chosen in the order of the first row: [k, n]."""
    order = np.argsort(values[0], kind="stable")
    return values[:, order[((np.arange(n) + 0.5) / n * len(order)).astype(int)]]


def fit_volatility(t):
    """A Har of each series' range volatility, and from it sigma [T], the volatility of each bar's
    return.

    It is forecast * scale [T + 1], the slow scale of |return| / forecast. residuals [2, RESIDUALS]:
    return / sigma, in order, and the ratio of the same bar.
    """
    hars = fit_har(t, [range_volatility(bars) for bars in t.series])
    size = [np.abs(r) / har.forecast for r, har in zip(t.returns, hars)]
    common = np.concatenate([s[har.early] for s, har in zip(size, hars)]).mean()
    pairs = []
    for har, s, r in zip(hars, size, t.returns):
        har.scale = slow_scale(s, har.fitted, common)
        har.sigma = har.forecast * har.scale[:-1]
        pairs.append(np.stack([r / har.sigma, har.ratio]))
    give_residuals(hars, pairs)
    return hars


def volatility_paths(har, origins, pick):
    """Log returns after each origin of a series, [n, paths, H], by a Har of fit_volatility.

    A path draws a residual of its return and, of the same bar, one of its range, on which the next
    forecasts look back: the column pick [n, paths, H] of har.residuals.
    """
    (z, ratio), (n, paths, horizon) = har.residuals, pick.shape
    usual = np.ones((n, horizon))  # the factors of the bars to come
    for row, o in zip(usual, origins):
        row[:] = np.exp(har.slots.next(har.bars.time[:o + 1], horizon)[:, 0])
    scale = har.scale[origins + 1, None] * har.mean * usual  # (n, H)
    past = np.append(0.0, har.u.cumsum())
    # running sums of u after the origin; returns
    drawn, moves = np.zeros((n, paths, horizon + 1)), np.empty((n, paths, horizon))
    for k in range(horizon):
        x = []
        for window in WINDOWS:
            # up to the origin, and after it
            known = past[origins + 1] - past[np.maximum(origins + 1 - max(window - k, 0), 0)]
            total = known[:, None] + drawn[..., k] - drawn[..., max(k - window, 0)]
            x.append(np.sqrt(total / np.minimum(window, origins + 1 + k)[:, None]))
        forecast = har.predict(x, origins + 1)                                      # (n, paths)
        drawn[..., k + 1] = drawn[..., k] + forecast * ratio[pick[..., k]]
        moves[..., k] = scale[:, k, None] * forecast * z[pick[..., k]]
    return moves


def range_volatility(bars):
    """Of each bar sqrt(Parkinson variance + gap^2), in log price [T] (Parkinson, Journal of
    Business 1980)."""
    open_, close = bars.ohlcva[:, 0], bars.ohlcva[:, 3]
    gap = np.log(open_ / np.append(open_[0], close[:-1]))
    return np.sqrt(log_range(bars)**2 / (4 * math.log(2)) + gap**2)


def slow_scale(size, fitted, common):
    """Decayed mean of sizes [T] before each bar and after the last, [T + 1], from the first fitted
    bar on.

    It begins with the mean over the fitted bars and 30 more of `common`, that of all symbols. A
    size counts as 6 usual ones at most: one wild bar is not a new level.
    """
    usual = (size[fitted].sum() + 30 * common) / (len(fitted) + 30)
    seen = np.arange(len(size)) >= fitted[0]
    decay = 0.5 ** (1 / LEVEL)
    total = decayed_sum(np.minimum(size, 6 * usual) * seen, decay=decay)
    weight = decayed_sum(seen.astype(float), decay=decay)
    return np.append(usual, (total + LEVEL / 2 * usual) / (weight + LEVEL / 2))
