"""Proper scores, sums of them over blocks of time, and how sure they are: a bootstrap over these
blocks.

A forecaster is a dict of arrays over targets and origins of paths: backtest.py says which. What it
does not say has no score.
"""
import copy
import math
import statistics

import numpy as np
import torch

USUAL_BARS = 250     # of the long-run volatility
EXTREME = 3          # a move is extreme beyond so many long-run sigmas of the horizon
WARN = 0.05          # chance of an extreme move that raises a warning


def usual_sigma(close):
    """The long-run volatility of log returns, of the last USUAL_BARS closes; NaN where none
    moved."""
    r = np.diff(np.log(close[-USUAL_BARS - 1:]))
    sigma = r.std() if len(r) > 1 else 0.0
    return sigma if sigma > 0 else math.nan


def chance_extreme(r, sigma, horizon):
    """Share of log returns r [..., K] over the horizon that are extreme: [...]. sigma [...]: see
    usual_sigma."""
    least = EXTREME * np.asarray(sigma)[..., None] * math.sqrt(horizon)
    share = (np.abs(r) > least).mean(-1)
    return np.where(np.isfinite(sigma), share, np.nan)


METRICS = ("da", "balanced_accuracy", "auc", "logloss", "ece", "ic", "rank_ic",
           "mae", "rmse", "mape", "crps", "coverage50", "coverage80", "coverage90",
           "range_crps", "range_coverage90", "volume_crps", "volume_coverage90",
           "path_mape", "path_crps", "path_coverage50", "path_coverage80", "path_coverage90",
           "path_rv_crps", "var95_hits", "es95_ratio",
           "extreme_flagged", "extreme_said", "extreme_came", "long_short", "turnover")
# compared as ratios, all others as differences
RATIOS = ("mae", "crps", "range_crps", "volume_crps", "path_mape", "path_crps", "path_rv_crps")
BY = ("da", "auc", "mae", "crps", "coverage90")  # scores by groups
RARE = ("var95", "es95", "extreme")              # scores that count rare cases begin so
REPLICATES = 2000                 # of the bootstrap
MIN_BLOCKS, MAX_BLOCKS = 20, 500  # of time: with fewer no interval; with more they are merged
MIN_CASES = 5                     # blocks with a rare case; with fewer no interval
EXACT = 1e-9                      # width of the place of an outcome in a law in closed form
NORMAL = statistics.NormalDist()


def of_paths(metric):
    return metric.startswith(("path", *RARE))


def resampled(n, random):
    """How often each replicate draws each of n blocks: [REPLICATES, n]; no replicates of too few
    blocks."""
    replicates = REPLICATES if n >= MIN_BLOCKS else 0
    return random.multinomial(n, np.full(n, 1 / n), replicates).astype(float)


# --------------------------------------------------------------------------------------------------
# Distributions, and their scores for what happened

def score_distribution(r, p, y):
    """Scores of distributions for what happened, y [...]: values r [..., K] in order, p [..., K]
    their probabilities.

    CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, JASA 2007), the last as the integral of F
    (1 - F).
    """
    F, y = p.cumsum(-1), y[..., None]
    # two places where F is 1/2, else twice the same one
    middle = np.stack([(F < 0.5 - 1e-9).sum(-1), (F < 0.5 + 1e-9).sum(-1)], -1)
    median = np.take_along_axis(r, middle, -1).mean(-1)
    below = (p * ((r < y) + 0.5 * (r == y))).sum(-1)
    crps = (p * np.abs(r - y)).sum(-1) - spread(r, F)
    return dict(mean=(p * r).sum(-1), point=median, pit=below, crps=crps)


def spread(r, F):
    """E|X - X'| / 2 of values r [..., K] in order, F [..., K] their cumulative probabilities."""
    return (F[..., :-1] * (1 - F[..., :-1]) * np.diff(r)).sum(-1)


def score_draws(r, y):
    """score_distribution for K draws r [..., K], in any order, of which the first K // 2 are
    independent of the others.

    E|X - X'| counts pairs across the halves alone: unbiased, as Ferro's fair form (QJRMS 2014) for
    independent draws.
    """
    K, half, ordered = r.shape[-1], r.shape[-1] // 2, np.sort(r, -1)
    scores = score_distribution(ordered, np.full(r.shape, 1 / K), y)
    if K == 1:
        return scores
    every = spread(ordered, np.arange(1, K + 1) / K)
    first = spread(np.sort(r[..., :half], -1), np.arange(1, half + 1) / half)
    second = spread(np.sort(r[..., half:], -1), np.arange(1, K - half + 1) / (K - half))
    a = half / K  # every = a^2 first + (1 - a)^2 second + 2 a (1 - a) across
    across = (every - a**2 * first - (1 - a)**2 * second) / (2 * a * (1 - a))
    return scores | dict(crps=scores["crps"] + every - across)


def score_residuals(z, y, scale, location=0.0):
    """score_distribution for location + scale * z: residuals z [K] or [N, K] of equal weight; y,
    scale, location [N]."""
    z = np.broadcast_to(z, (len(y), z.shape[-1]))
    scale, location = np.broadcast_to(scale, len(y)), np.broadcast_to(location, len(y))
    parts = []
    for rows in np.array_split(np.arange(len(y)), len(y) // 4096 + 1):  # as memory has room
        r = np.sort(location[rows, None] + scale[rows, None] * z[rows], -1)
        parts.append(score_distribution(r, np.full(r.shape, 1 / z.shape[-1]), y[rows]))
    return joined(parts)


def score_normal(mean, sigma, y):
    """score_distribution for normal distributions; CRPS in closed form."""
    z = (y - mean) / sigma
    cdf, pdf = normal_cdf(z), np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    crps = sigma * (z * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi))
    return dict(mean=mean, point=mean, pit=cdf, crps=crps)


def normal_cdf(z):
    return torch.special.ndtr(torch.from_numpy(z)).numpy()


def score_paths(moves, t, rows):
    """A forecaster's scores of paths: log returns moves [n, K, H] from the origins `rows` of t.

    Among K draws the outcome has K + 1 ranks, equally likely where the forecast is right: that is a
    percentile's width.
    """
    K, y = moves.shape[1], t.path_r[rows]
    r = moves.cumsum(-1)
    scores = named("path", score_draws(np.moveaxis(r, 1, -1), y))
    scores["path_pit"] = (K * scores["path_pit"] + 0.5) / (K + 1)
    scores["path_width"] = np.full(y.shape, 1 / (K + 1))
    scores["path_rv_crps"] = score_draws(np.sqrt((moves**2).sum(-1)), t.path_rv[rows])["crps"]
    end = r[:, :, -1]                                                   # (n, K)
    beyond = np.sort(-np.expm1(end), 1)[:, -max(1, round(0.05 * K)):]   # losses beyond VaR 95 %
    scores["path_es95"] = beyond.mean(1)
    scores["path_extreme"] = chance_extreme(end, t.usual[rows], t.horizon)
    return scores


def named(name, scores):
    """Scores of another quantity than the close of the next bar, {"crps": ...} as {"range_crps":
    ...}."""
    return {f"{name}_{key}": value for key, value in scores.items()}


def joined(parts):
    """Forecasters of several sets of bars as one of all."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# --------------------------------------------------------------------------------------------------
# Scores, and how sure they are

def time_block_sums(f, t):
    """{score: sums over each block of time, [n_blocks, ...]} of what forecaster f says of targets
    t.

    `score_of` makes the score of them. Most are means of a value of each bar, NaN where a bar has
    none.
    """
    out, means = {}, {}
    if "p_up" in f:
        out |= direction_sums(f["p_up"], t)
    signal = f.get("mean", f.get("p_up"))
    if signal is not None:
        x, y = signal - signal.mean(), t.r - t.r.mean()
        products = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], -1)
        out["ic"] = totals(products, t.time_block, t.n_blocks)
        out["rank_ic"] = sums_of_stamps(rank_ic(signal, t.r, t.stamp), t)
    if "point" in f:
        means = dict(mae=100 * np.abs(t.r - f["point"]), rmse=1e4 * (t.r - f["mean"])**2,
                     mape=100 * np.abs(np.expm1(f["point"] - t.r)), crps=100 * f["crps"])
    if "pit" in f:
        means |= {f"coverage{q}": inside(f["pit"], q) for q in (50, 80, 90)}
    for name, scale in (("range", 100), ("volume", 1)):
        crps, pit = f.get(f"{name}_crps"), f.get(f"{name}_pit")
        if crps is not None and not np.isnan(crps).all():
            means[f"{name}_crps"] = scale * crps
            if pit is not None:
                means[f"{name}_coverage90"] = np.where(np.isnan(crps), np.nan, inside(pit, 90))
    out |= {name: sums_of(values, t.time_block, t.n_blocks) for name, values in means.items()}
    if len(f.get("path_point", ())):  # of no origins no scores
        out |= path_sums(f, t)
    return out


def direction_sums(p_up, t):
    """time_block_sums of P(up), over the bars that moved."""
    moved = t.r != 0
    p, up, block = p_up[moved], t.r[moved] > 0, t.time_block[moved]
    hit = 0.5 + 0.5 * np.sign(p - 0.5) * np.where(up, 1, -1)
    among_ups, among_downs = np.where(up, hit, np.nan), np.where(up, np.nan, hit)
    by_side = np.stack([among_ups, among_downs], -1)
    with np.errstate(divide="ignore"):  # always_up: infinite
        logloss = -np.log(np.where(up, p, 1 - p))
    calls = dict(da=hit, balanced_accuracy=by_side, logloss=logloss, up_share=p > 0.5)
    out = {name: sums_of(values, block, t.n_blocks) for name, values in calls.items()}
    out["auc"] = sums_by_bin([up, ~up], ordered_bins(p), block, t.n_blocks)
    tenth = np.minimum(p * 10, 9).astype(int)
    out["ece"] = sums_by_bin([p - up, np.ones(len(p))], tenth, block, t.n_blocks)
    return out


def path_sums(f, t):
    """time_block_sums of paths: lists over the steps; realized volatility and losses over the whole
    horizon."""
    out = {}
    means = dict(path_mape=100 * np.abs(np.expm1(f["path_point"] - t.path_r)),
                 path_crps=100 * f["path_crps"])
    if "path_pit" in f:
        pit, width = f["path_pit"], f.get("path_width", np.full(t.path_r.shape, EXACT))
        for q in (50, 80, 90):
            means[f"path_coverage{q}"] = within(pit, width, 0.5 - q / 200, 0.5 + q / 200)
    if "path_rv_crps" in f:  # sampled paths
        extreme = f["path_extreme"]
        hit = within(pit[:, -1], width[:, -1], 0.0, 0.05)  # the loss was beyond VaR 95 %
        tails = np.stack([-np.expm1(t.path_r[:, -1]) * hit, 0.05 * f["path_es95"]], -1)
        # Acerbi and Szekely, Risk 2014: 1 if right
        out["es95_ratio"] = totals(tails, t.path_time_block, t.n_path_blocks)
        flagged = extreme > WARN
        means |= dict(path_rv_crps=100 * f["path_rv_crps"], var95_hits=hit, extreme_flagged=flagged)
        if flagged.any():
            happened = chance_extreme(t.path_r[:, -1:], t.usual, t.horizon)  # 1 or 0
            means["extreme_said"] = np.where(flagged, extreme, np.nan)
            means["extreme_came"] = np.where(flagged, happened, np.nan)
    return out | {name: sums_of(values, t.path_time_block, t.n_path_blocks)
                  for name, values in means.items()}


def inside(pit, q):
    """Whether the outcome lies in the middle q % of its law."""
    return np.abs(pit - 0.5) <= q / 200 + 1e-9  # rounding decides nothing


def within(pit, width, low, high):
    """How much of [pit - width / 2, pit + width / 2] lies in [low, high]: a number from 0 to 1."""
    overlap = np.minimum(pit + width / 2, high) - np.maximum(pit - width / 2, low)
    return (overlap / width).clip(0, 1)


def sums_of(values, block, n_blocks):
    """Sums over each block of values [N, ...] and of how many there are, NaN left out: [n_blocks,
    ..., 2]."""
    known = ~np.isnan(values)
    return totals(np.stack([np.where(known, values, 0), known], -1), block, n_blocks)


def sums_of_stamps(values, t):
    """The same of values [stamps]."""
    block = np.zeros(len(values), int)
    block[t.stamp] = t.time_block
    return sums_of(values, block, t.n_blocks)


def sums_by_bin(columns, bins, block, n_blocks):
    """Sums of columns [N] each over each block and bin: [n_blocks, bins, columns]."""
    n = bins.max(initial=0) + 1
    return totals(np.stack(columns, -1), block * n + bins, n_blocks * n).reshape(n_blocks, n, -1)


def totals(values, block, n_blocks):
    """Sums of values [N, ...] over each block: [n_blocks, ...]."""
    columns = values.reshape(len(values), math.prod(values.shape[1:])).T
    sums = [np.bincount(block, column, n_blocks) for column in columns]
    return np.stack(sums, -1).reshape(n_blocks, *values.shape[1:])


def score_of(metric, s):
    """A score from sums over some blocks, s [..., 2] (six for IC): the columns that time_block_sums
    stacks."""
    if metric == "ic":  # Pearson's correlation
        n, x, y, xx, yy, xy = np.moveaxis(s, -1, 0)
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    first, second = s[..., 0], s[..., 1]
    if metric == "auc":  # P(p of an up > p of a down) + P(equal) / 2, of ups and downs by bin
        below = second.cumsum(-1) - second / 2
        return (first * below).sum(-1) / (first.sum(-1) * second.sum(-1))
    if metric == "ece":  # expected calibration error, from p - up and counts in each bin
        return np.abs(first).sum(-1) / second.sum(-1)
    mean = first / second
    if metric == "balanced_accuracy":
        return mean.mean(-1)
    return np.sqrt(mean) if metric == "rmse" else mean


def ordered_bins(p, most=2048):
    """The rank of each p among the distinct ones; neighbours share a bin where there are more than
    `most`."""
    value, rank, count = np.unique(p, return_inverse=True, return_counts=True)
    return rank if len(value) <= most else (np.cumsum(count) - 1)[rank] * most // len(p)


def rank_ic(signal, r, stamp):
    """Spearman's correlation across the symbols of each time stamp, [stamps]; NaN for fewer than 3,
    or all alike."""
    x, y = ranks(signal, stamp), ranks(r, stamp)
    variance = np.bincount(stamp, x * x) * np.bincount(stamp, y * y)
    rho = np.bincount(stamp, x * y) / np.sqrt(variance.clip(1e-9))
    return np.where((np.bincount(stamp) >= 3) & (variance > 1e-9), rho, np.nan)


def ranks(v, stamp):
    """Rank within the time stamp, less the mean rank there; equal values share theirs."""
    order = np.lexsort((v, stamp))
    new = (np.diff(v[order], prepend=np.nan) != 0) | (np.diff(stamp[order], prepend=-1) != 0)
    group = np.cumsum(new) - 1  # equal values of one stamp
    rank = np.empty(len(v))
    rank[order] = (np.bincount(group, np.arange(len(v))) / np.bincount(group))[group]
    return rank - (np.bincount(stamp, rank) / np.bincount(stamp).clip(1))[stamp]


def trading_sums(p_up, t, cost_bps):
    """time_block_sums of a trade: long the top fifth, short the bottom fifth by P(up) at every time
    stamp with 5 symbols.

    Return per bar in bps after costs; turnover, the value traded as a share of one side (4: both
    sides replaced).
    """
    p = np.full((t.stamp.max() + 1, len(t.series)), np.nan)
    p[t.stamp, t.symbol] = p_up
    n = np.isfinite(p).sum(1, keepdims=True)  # (stamps, 1)
    fifth = np.maximum(n // 5, 1)
    place = p.argsort(1, kind="stable").argsort(1)  # missing ones come last
    long, short = (place >= n - fifth) & (place < n), place < fifth
    weight = np.where(n < 5, 0.0, (long * 1.0 - short) / fifth)  # (stamps, symbols)
    gain = np.bincount(t.stamp, weight[t.stamp, t.symbol] * np.expm1(t.r))
    turnover = np.abs(np.diff(weight, axis=0, prepend=0)).sum(1)
    traded = n[:, 0] >= 5
    net = 1e4 * gain - turnover * cost_bps
    return dict(long_short=sums_of_stamps(np.where(traded, net, np.nan), t),
                turnover=sums_of_stamps(np.where(traded, turnover, np.nan), t))


def bootstrap(sums, t):
    """{score: (value, replicates)} of time_block_sums. All forecasters get the same draws of
    blocks: so they are paired."""
    out = {}
    with np.errstate(all="ignore"):
        for name, s in sums.items():
            value = score_of(name, s.sum(0))
            weights = t.path_weights if of_paths(name) else t.weights
            replicates = score_of(name, np.tensordot(weights, s, 1))
            if name.startswith(RARE) and (s[:, 0] != 0).sum() < MIN_CASES:
                replicates = np.full_like(replicates, np.nan)
            finite = np.isfinite(replicates)
            centre = replicates.sum(0, where=finite) / finite.sum(0)
            # ECE, a sum of magnitudes, is larger in a replicate
            out[name] = value, replicates - centre + value
    return out


def scored(value, replicates, n_blocks):
    """{value, lo, hi}: the 95 % percentile interval, None under 20 blocks; a list of them for a
    score over steps.

    As wide as Student's t has it, since blocks are few (Hesterberg 2014, arXiv 1411.5279). None for
    no finite value.
    """
    if np.ndim(value):
        steps = [scored(*step, n_blocks) for step in zip(value, replicates.T)]
        return steps if any(steps) else None
    if not np.isfinite(value):
        return None
    replicates = replicates[np.isfinite(replicates)]
    if n_blocks < MIN_BLOCKS or len(replicates) < REPLICATES // 2:
        return dict(value=float(value), lo=None, hi=None)
    z, df = NORMAL.inv_cdf(0.975), n_blocks - 1
    student = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = NORMAL.cdf(-student * math.sqrt(n_blocks / df))
    lo, hi = np.quantile(replicates, (tail, 1 - tail))
    return dict(value=float(value), lo=float(lo), hi=float(hi))


def at_step(scores, metric, step):
    """(value, replicates) of a score; of a list over steps that at `step`, its mean if that is
    None."""
    value, replicates = scores[metric]
    if np.ndim(value) == 0:
        return value, replicates
    if step is None:
        return value.mean(), replicates.mean(-1)
    return value[step], replicates[..., step]


def versus(a, b, n_blocks, as_ratio):
    """The difference or ratio of two (value, replicates), with its interval."""
    with np.errstate(all="ignore"):
        return scored(*(x / y if as_ratio else x - y for x, y in zip(a, b)), n_blocks)


def against(a, b, metric, t, step=-1):
    """The score a beside b, paired: as a ratio for the metrics of RATIOS, else as a difference;
    step as in at_step."""
    one, other = at_step(a, metric, step), at_step(b, metric, step)
    return versus(one, other, t.blocks_of(metric), as_ratio=metric in RATIOS)


def paired(name_a, name_b, replicates, t, metrics):
    """Differences a - b of every score that both have, and ratios a / b of RATIOS, replicate by
    replicate."""
    a, b, rows = replicates[name_a], replicates[name_b], []
    for metric in metrics:
        if metric in a and metric in b:
            difference = versus(a[metric], b[metric], t.blocks_of(metric), as_ratio=False)
            ratio = against(a, b, metric, t, slice(None)) if metric in RATIOS else None
            rows.append(dict(a=name_a, b=name_b, metric=metric, difference=difference, ratio=ratio))
    return rows


def groups_of(t, by):
    """(name, mask over the targets) of each group; volatility: thirds of the bars by HAR's forecast
    over s_t."""
    if by is None:
        return []
    if by == "symbol":
        names, group = [bars.symbol for bars in t.series], t.symbol
    elif by == "quarter":
        months = t.time.astype("datetime64[s]").astype("datetime64[M]").astype(int)  # since 1970
        quarters, group = np.unique(months // 3, return_inverse=True)
        names = [f"{1970 + q // 4}-Q{q % 4 + 1}" for q in quarters]
    else:
        # known before the bar: how volatility is to change
        rising = t.flat([har.sigma for har in t.volatility]) / t.s
        names = "falling", "steady", "rising"
        group = np.searchsorted(np.quantile(rising, (1 / 3, 2 / 3)), rising)
    return [(name, group == k) for k, name in enumerate(names)]


def grouped(f, t, mask):
    """Scores BY of some of the targets, bool [N]."""
    part = copy.copy(t)
    part.r, part.stamp, part.time_block = t.r[mask], t.stamp[mask], t.time_block[mask]
    sums = time_block_sums({key: v[mask] for key, v in f.items() if not of_paths(key)}, part)
    replicates = bootstrap({m: sums[m] for m in BY if m in sums}, t)
    n_blocks = len(np.unique(part.time_block))
    return {m: scored(*both, n_blocks) for m, both in replicates.items()}
