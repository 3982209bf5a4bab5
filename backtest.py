"""What forecasts are worth: the scores of checkpoints on bars that have happened, beside cheap opponents.

    python backtest.py --ckpt out.pt                                       # the test bars of the data it was trained on
    python backtest.py --ckpt a.pt b.pt --data other.csv --json            # several checkpoints, paired
    python backtest.py --ckpt out.pt --start 2018-07-01 --by volatility --cost_bps 5

The next bars are scored in one teacher-forced pass, paths from some origins, beside baselines on the same bars, with 95 %
intervals from a bootstrap over blocks of time.

In this order: targets, forecasters, scores and their intervals, the table; at its end, what the later stages ask of it.
"""
import copy
import functools
import itertools
import json
import math
import os
import statistics
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

import data
from data import DAY, UserError, future_times
from model import close_table, load_checkpoint, norm
from sample import Origin, by_close, jsonable, load_series, simulate_from
from tokenizer import code_use


@dataclass
class Config:
    ckpt: list[str] | None = None      # one or more checkpoints
    data: list[str] | None = None      # bars; none: those that the first checkpoint was trained on
    symbols: list[str] | None = None   # only these
    split: str = "test"                # targets in test or val, by the checkpoints' dates
    start: str | None = None           # first date of the targets, in place of --split
    end: str | None = None             # first date after the targets
    horizon: int = 10                  # bars ahead, of the paths
    paths: int = 100                   # sampled futures of each origin
    stride: int | None = None          # bars between the origins of paths (default: ten origins a symbol)
    parallel: bool = False             # also the latent slots' forecast of all bars at once (at most 16)
    by: str | None = None              # scores by symbol, quarter or volatility too
    cost_bps: float = 0.0              # cost of trading, in 1/10000 of the value traded
    seed: int = 0                      # of the sampling
    json: bool = False                 # print JSON in place of the table
    device: str = "cpu"                # cpu, cuda, ...


# ----------------------------------------------------------------------------------------------------------------------
# The backtest: forecasts of bars that have happened, their scores, and how sure the scores are
#
# Targets -> forecasters -> block_sums -> bootstrap -> scored. A forecaster is a dict of arrays over the N target bars:
# p_up (given that the bar moves), mean and point (expected and median log return), crps, pit (probability integral
# transform: the share of its distribution below what came); and, over the origins, path_point, path_crps, path_pit [n, H]
# for the log return since the origin. What a forecaster does not say is left out; such scores are null.

METRICS = ("da", "balanced_accuracy", "auc", "logloss", "ece", "ic", "rank_ic", "mae", "rmse", "mape", "crps",
           "coverage50", "coverage80", "coverage90", "path_mape", "path_crps")
RATIOS = ("mae", "crps", "path_mape", "path_crps")  # compared as ratios too
KEYS = ("split", "start", "end", "blocks", "checkpoints", "baselines", "paired")
BINS, PROBES = 512, 32           # of the next bar's close; coarse tokens of each bar whose fine tokens are looked at
REPLICATES = 2000               # of the bootstrap
MIN_BLOCKS, MAX_BLOCKS = 20, 500  # of time: with fewer no interval; with more they are merged
RESIDUALS = 500                 # newest residuals that filtered historical simulation draws from
LAMBDA = 0.94                   # decay of its volatility (as RiskMetrics, 1996)
LAGS = 5                        # bars that the logistic regression looks at
WINDOWS = (1, 5, 22, 66)        # bars over which HAR takes means
HAR_FLOOR = 0.05                # least volatility in HAR, as a share of its mean
LEVEL = 500                     # half-life, in bars, of the scale of HAR's residuals
SEEN = 3                        # days after which a time of day counts as much as none
HOUR = 3600
NORMAL = statistics.NormalDist()


class Targets:
    """The bars to forecast, one after the other, symbol by symbol; the origins of the paths; and the blocks of time.

    series, ranges: each symbol's Bars, and [first, last) of its targets; returns: log returns of all its bars. Of the N
    targets: time, r (log return), s (the scale s_t, known before), symbol, stamp (which of the distinct times), block.
    Of the paths: origins, a symbol's bars after which they begin; path_r [n, H], log returns since the origin; path_block.
    weights, path_weights [REPLICATES, blocks]: how often each replicate of the bootstrap takes each block.

    Blocks hold all symbols. For the next bar a block has n^(1/3) of a symbol's n target bars (the usual rate: Hall,
    Horowitz and Jing, Biometrika 1995), whole dates for daily bars and at least 32 bars within the day; for paths it has
    the horizon at least.
    """

    def __init__(self, series, lo, hi, horizon, stride, seed):
        ranges = [(bars, data.targets_of(bars, "val", (lo, hi))) for bars in series]  # between two borders
        ranges = [(bars, (first, last)) for bars, (first, last) in ranges if first < last]
        if not ranges:
            raise UserError(f"no bar to forecast from {data.iso(lo)} on: give other --data or --start "
                            f"(the first {data.CONTEXT} bars are context)")
        self.series, self.ranges = zip(*ranges)
        self.tokenized = {}
        longest = max(b - a for a, b in self.ranges)
        self.horizon, self.seed = horizon, seed
        self.stride = stride or max(horizon, (longest - horizon + 1) // 10)
        flat = lambda values: np.concatenate([v[a:b] for v, (a, b) in zip(values, self.ranges)])
        self.returns = [np.diff(np.log(bars.ohlcva[:, 3]), prepend=np.log(bars.ohlcva[0, 3])) for bars in self.series]
        self.time = flat([bars.time for bars in self.series])
        self.r = flat(self.returns)
        self.s = flat([data.scales(bars) for bars in self.series])
        self.symbol = np.repeat(np.arange(len(self.series)), [b - a for a, b in self.ranges])
        self.stamp = np.unique(self.time, return_inverse=True)[1]
        self.origins = [self.origins_of(bars.symbol, *span) for bars, span in zip(self.series, self.ranges)]
        ahead = np.arange(1, horizon + 1)
        self.path_r = np.concatenate([np.cumsum(r[o[:, None] + ahead], axis=1) for r, o in zip(self.returns, self.origins)])

        daily = max(np.median(np.diff(bars.time)) for bars in self.series) >= DAY
        units, unit = np.unique(self.time // DAY if daily else self.time, return_inverse=True)
        length = max(1 if daily else data.HALF_LIFE, int(longest ** (1 / 3) + 1e-9))
        self.n_blocks = max(1, min(longest // length, MAX_BLOCKS))
        self.n_path_blocks = max(1, min(longest // max(length, horizon), MAX_BLOCKS))
        self.block = unit * self.n_blocks // len(units)
        starts = np.concatenate([b.time[o + 1] for b, o in zip(self.series, self.origins)])
        self.path_block = np.searchsorted(units, starts // DAY if daily else starts) * self.n_path_blocks // len(units)
        random = np.random.default_rng([seed, 1])
        times = lambda n: random.multinomial(n, np.full(n, 1 / n), REPLICATES if n >= MIN_BLOCKS else 0).astype(float)
        self.weights, self.path_weights = times(self.n_blocks), times(self.n_path_blocks)

    def origins_of(self, symbol, first, last):
        """The bars after which paths begin: every stride-th, from an offset of the symbol's own, to spread the dates."""
        n = last - first - self.horizon + 1
        return first - 1 + np.arange(zlib.crc32(symbol.encode()) % max(1, min(self.stride, n)), n, self.stride)

    def blocks_of(self, metric):
        """How many blocks of time hold what a score is made of."""
        return len(np.unique(self.path_block)) if metric.startswith("path") else self.n_blocks

    def tokens(self, tokenizer):
        """The series' tokens, made once for each tokenizer."""
        key = data.weights_hash(tokenizer.state_dict())
        if key not in self.tokenized:
            self.tokenized[key] = [data.tokenize(bars, tokenizer) for bars in self.series]
        return self.tokenized[key]

    @functools.cached_property
    def states(self):
        """Of each series the States at its origins."""
        return [data.states_at(bars, origins) for bars, origins in zip(self.series, self.origins)]


def span_of(metas, split, start, end):
    """(name of the split, first time stamp, end) of the targets. In-sample targets only where they are asked for."""
    if split not in ("val", "test"):
        raise UserError(f"--split {split}: choose val or test, or name the targets by --start and --end")
    borders = {tuple(meta.get("splits") or ()) for meta in metas}
    lo, hi = (None if date is None else data.parse_time(str(date)) for date in (start, end))
    for name, date, time in (("start", start, lo), ("end", end, hi)):
        if time is not None and math.isnan(time):
            raise UserError(f"--{name} {date}: not a date; write it as 2018-01-01")
    if start is None and (len(borders) > 1 or () in borders):
        raise UserError("the checkpoints were split at different dates (or at none): name the first target by --start")
    test = max((b[1] for b in borders if b), default=math.inf)
    hi = 2**62 if hi is None else hi
    if lo is None:
        lo, latest = next(iter(borders)) if split == "val" else (test, 2**62)
        hi = min(hi, latest)
    else:
        split = "in-sample" if lo < test or () in borders else "test"
    if hi <= lo:
        raise UserError(f"--end {end}: not after the first target, {data.iso(lo)}; "
                        f"targets before it are in-sample and need --start")
    return split, int(lo), int(hi)


def judge(r, p, y):
    """Scores of distributions for what happened, y [...]: r [..., K] log returns in order, p [..., K] their probabilities.

    CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, JASA 2007), the last as the integral of F (1 - F).
    """
    F, y = p.cumsum(-1), y[..., None]
    at = lambda share: (F < share).sum(-1, keepdims=True).clip(max=r.shape[-1] - 1)
    middle = [np.take_along_axis(r, at(share), -1)[..., 0] for share in (0.5 - 1e-9, 0.5 + 1e-9)]
    return dict(mean=(p * r).sum(-1), point=(middle[0] + middle[1]) / 2, pit=(p * ((r < y) + 0.5 * (r == y))).sum(-1),
                crps=(p * np.abs(r - y)).sum(-1) - spread(r, F))


def spread(r, F):
    """E|X - X'| / 2 of values r [..., K] in order, F [..., K] their cumulative probabilities."""
    return (F[..., :-1] * (1 - F[..., :-1]) * np.diff(r)).sum(-1)


def judge_draws(r, y):
    """The same for K draws r [..., K], in any order, of which the first K // 2 are independent of the others.

    They stand for what they were drawn from, so E|X - X'| counts pairs across the halves alone: unbiased, as the fair
    form of Ferro (QJRMS 2014) is for independent draws.
    """
    K = r.shape[-1]
    own = lambda r: spread(np.sort(r, -1), np.arange(1, r.shape[-1] + 1) / r.shape[-1])  # all pairs of r
    scores, a = judge(np.sort(r, -1), np.full(r.shape, 1 / K), y), K // 2 / K
    if K > 1:  # own(all) = a^2 own(first half) + (1 - a)^2 own(second) + 2 a (1 - a) across
        across = (own(r) - a**2 * own(r[..., :K // 2]) - (1 - a)**2 * own(r[..., K // 2:])) / (2 * a * (1 - a))
        scores["crps"] = scores["crps"] + own(r) - across
    return scores


def judge_normal(mean, sigma, y):
    """The same for normal distributions; CRPS in closed form."""
    z = (y - mean) / sigma
    cdf, pdf = torch.special.ndtr(torch.from_numpy(z)).numpy(), np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return dict(mean=mean, point=mean, pit=cdf, crps=sigma * (z * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi)))


def judge_scaled(z, scale, y):
    """The same for scale [N] times values z [K] in order, all of one weight, and y [N]."""
    y, K = y / scale, len(z)
    below = np.searchsorted(z, y, "left"), np.searchsorted(z, y, "right")
    total = np.append(0.0, z.cumsum())
    distance = (2 * below[1] - K) * y + total[-1] - 2 * total[below[1]]  # sum of |z - y|
    crps = distance / K - spread(z, np.arange(1, K + 1) / K)
    return dict(mean=scale * z.mean(), point=scale * np.median(z), pit=(below[0] + below[1]) / (2 * K), crps=scale * crps)


def joined(parts):
    """Forecasters of several sets of bars as one of all."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# ---- forecasters

@torch.no_grad()
def next_bars(model, tokenizer, t, probes=PROBES):
    """Forecast every target from the bars before it, teacher-forced. P(up) is exact.

    Windows advance by half their length, so that each target has half a window of context where there is history. The
    close is counted in BINS: P(bin) = sum_c P(c) P(bin | c). All 2^20 pairs, as in model.next_bar, would take hours, so
    P(bin | c) is a mean over some contexts before the first target, put right by `probes` coarse tokens of each bar's
    own (stratified by close; control variates). An estimate: a few bins may come out a little below 0.
    """
    n, device = model.config.block_size, next(model.parameters()).device
    half, tokens = max(1, n // 2), t.tokens(tokenizer)

    def read(windows):
        """h [m, C] that forecast the targets [j, end) of windows (symbol, j, end), one after the other."""
        begin = [max(0, j + half - n) for _, j, _ in windows]
        rows = [(i, np.minimum(a + np.arange(n), len(tokens[i]) - 1)) for (i, _, _), a in zip(windows, begin)]
        coarse, fine = torch.from_numpy(np.stack([tokens[i][r] for i, r in rows]).astype(np.int64)).to(device).unbind(-1)
        time = torch.from_numpy(np.stack([t.series[i].time[r] for i, r in rows])).to(device)
        h = norm(model.trunk(coarse, fine, time, 0)[0])  # (B, n, C)
        return torch.cat([h[k, j - 1 - a:end - 1 - a] for k, ((_, j, end), a) in enumerate(zip(windows, begin))])

    first = np.array([bars.time[a] for bars, (a, _) in zip(t.series, t.ranges)])
    early = np.flatnonzero(first == first.min())
    early = early[np.linspace(0, len(early) - 1, min(32, len(early))).astype(int)]
    bins, values, share = close_bins(model, tokenizer, read([(i, t.ranges[i][0], t.ranges[i][0] + 1) for i in early]))
    order = by_close(tokenizer).to(device)
    levels = (torch.arange(probes, device=device) + 0.5) / probes
    windows = [(i, j, min(j + half, b)) for i, (a, b) in enumerate(t.ranges) for j in range(a, b, half)]
    parts, at = [], 0
    for k in range(0, len(windows), 16):
        for h in read(windows[k:k + 16]).split(64):
            coarse = model.coarse_logits(h).float().softmax(-1)  # (m, 2^k1)
            c = coarse[:, order].cumsum(-1)
            probe = order[torch.searchsorted(c, levels * c[:, -1:]).clamp(max=len(order) - 1)]  # (m, probes)
            fine = model.fine_logits(h[:, None], probe).float().softmax(-1) / probes  # (m, probes, 2^k2)
            p = coarse @ share - share[probe].mean(1)
            p.scatter_add_(1, bins[probe].flatten(1), fine.flatten(1))  # (m, BINS)
            now = slice(at, at + len(h))
            r = np.clip(values * t.s[now, None], -data.MAX_MOVE, data.MAX_MOVE)
            p_up = model.p_up(h).double().cpu().numpy().clip(1e-6, 1 - 1e-6)  # keeps the log loss finite
            parts.append(dict(p_up=p_up, **judge(r, p.double().cpu().numpy(), t.r[now])))
            at += len(h)
        data.progress(f"next bars: {at:,} of {len(t.r):,}")
    return joined(parts)


def close_bins(model, tokenizer, h):
    """Bins of the close that are equally likely over contexts h [M, C].

    Returns the bin of each pair of tokens [2^k1, 2^k2], the bins' values in units of s_t, and P(bin | coarse).
    """
    table = close_table(tokenizer).to(h.device)
    p, every = torch.zeros_like(table), torch.arange(len(table), device=h.device)
    for row in h:
        fine = model.fine_logits(row.expand(len(table), -1), every).float().softmax(-1)  # (2^k1, 2^k2)
        p += model.coarse_logits(row).float().softmax(-1)[:, None] * fine
    value, order = table.flatten().sort()
    mass = p.flatten()[order].double().cumsum(0)
    inner = torch.linspace(0, 1, BINS + 1, device=h.device, dtype=mass.dtype)[1:-1] * mass[-1]
    edges = value[torch.searchsorted(mass, inner)].unique()
    bins = torch.searchsorted(edges[edges < value[-1]], table)
    n, zero = int(bins.max()) + 1, torch.zeros((), device=h.device, dtype=torch.float64)
    total = lambda a: zero.repeat(n).index_add_(0, bins.flatten(), a.flatten().double())
    share = torch.zeros(len(table), n, device=h.device).scatter_add_(1, bins, p)
    return bins, (total(p * table.double().sinh()) / total(p)).cpu().numpy(), share / share.sum(-1, keepdim=True)


def simulated(model, tokenizer, t, paths, parallel=False, temperature=1.0):
    """Forecast the log return since the origin over the horizon, from every origin."""
    n, origins = model.config.block_size, []
    for bars, tokens, at, states in zip(t.series, t.tokens(tokenizer), t.origins, t.states):
        for o, state in zip(at, states):
            context = torch.from_numpy(tokens[max(0, o + 1 - n):o + 1].astype(np.int64))
            origins.append(Origin(bars.symbol, context, bars.time[:o + 1], state))
    parts = []
    for i in range(0, len(origins), 256):
        part = origins[i:i + 256]
        ohlcva, _ = simulate_from(model, tokenizer, part, t.horizon, paths, temperature, seed=t.seed, parallel=parallel)
        close = np.array([o.state.seen for o in part])
        parts.append(from_paths(np.log(ohlcva[..., 3] / close[:, None, None]), t.path_r[i:i + 256]))
        data.progress(f"paths: {i + len(part):,} of {len(origins):,} origins")
    return joined(parts) if parts else {}


def from_paths(r, y):
    """A forecaster's scores of paths: r [n, K, H] log returns since the origin, y [n, H] what they were.

    Among K draws y has K + 1 ranks, equally likely where the forecast is right: its pit is known to 1 / (K + 1).
    """
    K, scores = r.shape[1], judge_draws(np.moveaxis(r, 1, -1), y)
    scores["pit"] = (K * scores["pit"] + 0.5) / (K + 1)
    return along(scores) | dict(path_width=np.full(y.shape, 1 / (K + 1)))


def along(scores):
    """Scores [n, H] by their names for paths."""
    return {f"path_{key}": scores[key] for key in ("point", "crps", "pit")}


def baselines(t, paths):
    """What a model must beat, each fitted on the bars before the first target, or on those before each origin."""
    path_y = np.split(t.path_r, np.cumsum([len(o) for o in t.origins])[:-1])
    each = [(r, *span, o, y) for r, span, o, y in zip(t.returns, t.ranges, t.origins, path_y)]
    randoms = [np.random.default_rng([t.seed, zlib.crc32(bars.symbol.encode()), 2]) for bars in t.series]
    zero, path_zero = np.zeros(len(t.r)), np.zeros(t.path_r.shape)
    return dict(persistence=dict(mean=zero, point=zero, crps=np.abs(t.r),  # a point's CRPS is its error
                                 path_point=path_zero, path_crps=np.abs(t.path_r)),
                always_up=dict(p_up=zero + 1), ar1=joined([ar1(*a) for a in each]), logistic=logistic(t),
                gaussian20=joined([gaussian(*a) for a in each]),
                fhs=joined([historical(*a, paths, random) for a, random in zip(each, randoms)]), har=har_on_ranges(t, paths))


def ar1(r, first, last, origins, path_y):
    """Each log return from the one before: r [T], targets r[first:last], returns [n, H] of paths from origins [n]."""
    x, target = r[1:first - 1], r[2:first]
    b = np.cov(x, target)[0, 1] / max(x.var(ddof=1), 1e-18)
    a = target.mean() - b * x.mean()
    sigma = max((target - a - b * x).std(), 1e-9)
    one = judge_normal(a + b * r[first - 1:last - 1], sigma, r[first:last])
    p_up = torch.special.ndtr(torch.from_numpy(one["mean"] / sigma)).numpy()
    psi = np.cumsum(b ** np.arange(path_y.shape[1]))  # (H,): weight of a shock k bars on in the return since the origin
    many = judge_normal(a * psi.cumsum() + b * psi * r[origins, None], np.sqrt((psi**2).cumsum()) * sigma, path_y)
    return one | dict(p_up=p_up) | along(many)


def gaussian(r, first, last, origins, path_y):
    """No drift, the volatility of the last 20 bars; arguments as in ar1."""
    rms = np.sqrt(sliding_window_view(r**2, 20).mean(-1)).clip(1e-9)  # of bars k .. k + 19
    one = judge_normal(np.zeros(last - first), rms[first - 20:last - 20], r[first:last])
    sigma = rms[origins - 19, None] * np.sqrt(np.arange(1, path_y.shape[1] + 1))
    return one | along(judge_normal(np.zeros((len(origins), 1)), sigma, path_y))


def historical(r, first, last, origins, path_y, paths, random):
    """Filtered historical simulation (Barone-Adesi, Giannopoulos and Vosper, Journal of Futures Markets 1999).

    Residuals of a decayed volatility, drawn anew and scaled by the volatility of now; arguments as in ar1.
    """
    begun = (np.arange(len(r)) > 0).astype(float)
    squares, weight = (data.decayed_sum(u, decay=LAMBDA) for u in (r**2, begun))
    vol = np.sqrt(squares / np.maximum(weight, 1e-9)).clip(1e-9)  # known after each bar
    n = min(RESIDUALS, first - 12)  # the first dozen volatilities are too raw
    z = sliding_window_view(np.append(0.0, r[1:] / vol[:-1]), n)  # row k: bars k .. k + n - 1
    one = []
    for rows in np.split(np.arange(first, last), range(4096, last - first, 4096)):
        drawn = np.sort(vol[rows - 1, None] * z[rows - n], -1)
        p_up = ((drawn > 0).sum(-1) + 0.5) / ((drawn != 0).sum(-1) + 1)
        one.append(judge(drawn, np.full(drawn.shape, 1 / n), r[rows]) | dict(p_up=p_up))
    pick = random.integers(n, size=(len(origins), paths, path_y.shape[1]))
    variance, moves = np.repeat(vol[origins, None]**2, paths, 1), np.empty(pick.shape)
    for k in range(pick.shape[2]):
        moves[:, :, k] = np.sqrt(variance) * np.take_along_axis(z[origins + 1 - n], pick[:, :, k], 1)
        variance = LAMBDA * variance + (1 - LAMBDA) * moves[:, :, k]**2
    return joined(one) | from_paths(moves.cumsum(-1), path_y)


# ---- HAR: the strongest cheap opponent

class Har:
    """Forecasts of a positive series u of one symbol from its own past: heterogeneous autoregression.

    root(u) is regressed on the roots of the means of u over WINDOWS (after Corsi, Journal of Financial Econometrics 2009),
    root = sqrt or log, u in units of `unit` [T]: its mean before the first target times the usual factor of its time of
    day. forecast [T]: of each bar, from the bars before it, in the same units as u. ratio: u / forecast of the `fitted`
    bars, those before the first target whose means are settled.
    """

    def __init__(self, bars, u, first, root):
        self.bars, self.root = bars, root
        self.mean = max(u[:first].mean(), 1e-9)
        u = np.maximum(u, HAR_FLOOR * self.mean)
        self.factor = TimeOfDay(bars.time[:first], u[:first])
        self.unit = self.mean * self.factor(bars.time)
        self.u = u / self.unit
        self.fitted = np.arange(min(WINDOWS[-1], first // 2), first)
        means = np.stack([trailing_mean(self.u, n) for n in WINDOWS], 1)
        self.x = np.concatenate([np.ones((1, len(WINDOWS))), means[:-1]])  # (T, 4): known before each bar

    def fit(self, weights):
        self.weights = weights
        self.forecast = self.predict(np.moveaxis(self.x, 1, 0)) * self.unit
        self.ratio = (self.u * self.unit / self.forecast)[self.fitted]

    def predict(self, means):
        """u of the next bar, in units of `unit`, from its means over WINDOWS, a list of [...]."""
        total = self.weights[0]
        for weight, mean in zip(self.weights[1:], means):
            total = total + weight * self.root(mean)
        return np.exp(total) if self.root is np.log else np.maximum(total, HAR_FLOOR**0.5)**2


def fit_har(t, values, root):
    """Har of each series in values, lists [T]; one regression for all symbols, on the bars before the first target of any."""
    fits = [Har(bars, u, first, root) for bars, u, (first, _) in zip(t.series, values, t.ranges)]
    x, y = [], []
    for har in fits:
        rows = har.fitted[har.bars.time[har.fitted] < t.time.min()]
        x.append(har.x[rows])
        y.append(har.u[rows])
    x, y = np.concatenate(x), np.concatenate(y)
    X = np.concatenate([np.ones((len(x), 1)), root(x)], axis=1)
    precision = np.ones(len(x)) if root is np.log else 1 / np.sqrt(x).mean(1)  # a root's error grows with the root
    weights = np.linalg.lstsq(X * precision[:, None], root(y) * precision, rcond=None)[0]
    for har in fits:
        har.fit(weights)
    return fits


class TimeOfDay:
    """The usual factor of each time of day (bars within the day; else 1), called with stamps [...].

    Fitted on u > 0 [T] at stamps `time`: the mean of log(u / its mean over the last day), shrunk where a time was seen on
    few days. Where bars come round the clock: of each hour of the day, then of each hour of the week relative to that;
    else of each time of day that has bars.
    """

    def __init__(self, time, u):
        self.levels = []  # (period, width, log factors)
        step = np.median(np.diff(time))
        if step >= DAY:
            return
        per_day = int(np.median(np.unique(time // DAY, return_counts=True)[1]))
        x = np.log(u / trailing_mean(u, per_day))
        x -= x.mean()
        around = len(np.unique(time // HOUR % 24)) >= 23
        for period, width in ((DAY, HOUR), (7 * DAY, HOUR)) if around else ((DAY, int(step)),):
            slot = time % period // width
            n = period // width + 1
            total, count = np.bincount(slot, x, n), np.bincount(slot, minlength=n)
            periods = np.bincount(np.unique(slot + n * (time // period)) % n, minlength=n)
            log_factor = total / np.maximum(count, 1) * periods / (periods + SEEN)
            self.levels.append((period, width, log_factor))
            x = x - log_factor[slot]

    def __call__(self, time):
        log_factor = np.zeros(np.shape(time))
        for period, width, levels in self.levels:
            log_factor = log_factor + levels[time % period // width]
        return np.exp(log_factor)


def trailing_mean(u, n):
    """Mean of the last n values up to each, of fewer at the beginning: [T]."""
    total = np.cumsum(u)
    total[n:] -= total[:-n].copy()
    return total / np.minimum(np.arange(1, len(u) + 1), n)


def range_volatility(bars):
    """Of each bar sqrt(Parkinson variance + gap^2), in log price [T] (Parkinson, Journal of Business 1980)."""
    open_, high, low, close = bars.ohlcva[:, :4].T
    gap = np.log(open_ / np.append(open_[0], close[:-1]))
    return np.sqrt(np.log(high / low)**2 / (4 * math.log(2)) + gap**2)


class Volatility:
    """HAR on ranges of every series, and the residuals of their returns.

    hars: Har of the range volatility; scale [T + 1] of each: of |return| / forecast, by a decayed mean with half-life LEVEL
    over the bars before; z, ratio [RESIDUALS] of each: return / (forecast * scale) in order, and what the forecast of the
    same bar was off by: half of its own before the first target, half of all symbols'.
    """

    def __init__(self, t):
        self.hars = fit_har(t, [range_volatility(bars) for bars in t.series], np.sqrt)
        size = [np.abs(r) / har.forecast for r, har in zip(t.returns, self.hars)]
        early = [har.fitted[har.bars.time[har.fitted] < t.time.min()] for har in self.hars]
        common = np.concatenate([s[rows] for s, rows in zip(size, early)]).mean()
        self.scale = [slow_scale(s, har.fitted, common) for s, har in zip(size, self.hars)]
        z = [r / (har.forecast * scale[:-1]) for r, har, scale in zip(t.returns, self.hars, self.scale)]
        ratio = [har.u * har.unit / har.forecast for har in self.hars]
        self.tables = []
        every = [np.concatenate([v[rows] for v, rows in zip(values, early)]) for values in (z, ratio)]
        shared = evenly(*every, RESIDUALS - RESIDUALS // 2)
        for own_z, own_ratio, har in zip(z, ratio, self.hars):
            own = evenly(own_z[har.fitted], own_ratio[har.fitted], RESIDUALS // 2)
            self.tables.append(evenly(*np.concatenate([own, shared], axis=1), RESIDUALS))

    def paths(self, i, origins, paths, horizon, random):
        """Log returns [n, paths, horizon] since each origin of series i."""
        har, (z, ratio), n = self.hars[i], self.tables[i], len(origins)
        usual = np.ones((n, horizon))
        if har.factor.levels:
            for row, o in zip(usual, origins):
                row[:] = har.factor(future_times(har.bars.time[:o + 1], horizon))
        scale = self.scale[i][origins + 1, None] * har.mean * usual  # (n, H)
        past = np.append(0.0, har.u.cumsum())
        drawn, moves = np.zeros((n, paths, horizon + 1)), np.empty((n, paths, horizon))  # running sums of u; returns
        pick = random.integers(len(z), size=moves.shape)
        for k in range(horizon):
            means = []
            for window in WINDOWS:
                known = past[origins + 1] - past[np.maximum(origins + 1 - max(window - k, 0), 0)]
                total = known[:, None] + drawn[..., k] - drawn[..., max(k - window, 0)]
                means.append(total / np.minimum(window, origins + 1 + k)[:, None])
            forecast = har.predict(means)  # (n, paths)
            drawn[..., k + 1] = drawn[..., k] + forecast * ratio[pick[..., k]]
            moves[..., k] = scale[:, k, None] * forecast * z[pick[..., k]]
        return moves.cumsum(-1)


def slow_scale(size, fitted, common):
    """Decayed mean of sizes before each bar and after the last, [T + 1], from their mean over the fitted ones on."""
    usual = (size[fitted].sum() + 30 * common) / (len(fitted) + 30)  # few bars of its own: that of all symbols counts too
    seen = np.arange(len(size)) >= fitted[0]
    decay = 0.5 ** (1 / LEVEL)
    total = data.decayed_sum(np.minimum(size, 6 * usual) * seen, decay=decay)  # one wild bar is not a new level
    weight = data.decayed_sum(seen.astype(float), decay=decay)
    return np.append(usual, (total + LEVEL / 2 * usual) / (weight + LEVEL / 2))


def evenly(z, ratio, n):
    """n of the pairs (z, ratio), evenly chosen in the order of z: [2, n]."""
    rows = np.argsort(z, kind="stable")[((np.arange(n) + 0.5) / n * len(z)).astype(int)]
    return np.stack([z[rows], ratio[rows]])


def har_on_ranges(t, paths):
    """Returns as the forecast volatility times residuals; along the paths the volatility follows the ranges drawn."""
    volatility, random = Volatility(t), np.random.default_rng([t.seed, 3])
    parts, row = [], 0
    for i, (r, (first, last), origins) in enumerate(zip(t.returns, t.ranges, t.origins)):
        sigma = (volatility.hars[i].forecast * volatility.scale[i][:-1])[first:last]
        one = judge_scaled(volatility.tables[i][0], sigma, r[first:last])
        moves = volatility.paths(i, origins, paths, t.horizon, random)
        parts.append(one | from_paths(moves, t.path_r[row:row + len(origins)]))
        row += len(origins)
    return joined(parts)


def logistic(t):
    """Logistic regression of the direction on the last bars' features, all symbols together, by Newton's method.

    With a ridge of 1, on at most about 300,000 bars; {} where there are under 1,000.
    """
    x = [data.features(bars)[0] for bars in t.series]
    lags = range(1, LAGS + 1)
    lagged = lambda i, rows: np.concatenate([np.ones((len(rows), 1)), *(x[i][rows - k] for k in lags)], axis=1)
    known = [np.arange(data.CONTEXT, first)[r[data.CONTEXT:first] != 0] for r, (first, _) in zip(t.returns, t.ranges)]
    total = sum(map(len, known))
    if total < 1000:
        return {}
    thin = -(-total // 300_000)
    X = np.concatenate([lagged(i, rows[::thin]) for i, rows in enumerate(known)])  # (bars, 1 + 6 LAGS)
    up = np.concatenate([r[rows[::thin]] > 0 for r, rows in zip(t.returns, known)])
    w = np.zeros(X.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-X @ w))
        w += np.linalg.solve((X.T * (p * (1 - p))) @ X + np.eye(len(w)), X.T @ (up - p) - w)
    X = np.concatenate([lagged(i, np.arange(*span)) for i, span in enumerate(t.ranges)])
    return dict(p_up=1 / (1 + np.exp(-X @ w)))


# ---- scores

def ratio(s):
    """A mean, from sums s [..., 2] of the values and of how many there are."""
    return s[..., 0] / s[..., 1]


def block_sums(f, t):
    """Of each score that forecaster f has: sums over each block [n_blocks, ...], and the score as a function of such sums.

    So the bootstrap only adds up blocks anew. t: Targets.
    """
    def total(*columns, block=t.block):
        columns = np.broadcast_arrays(*columns, np.ones(len(block)))[:-1]
        return np.stack([np.bincount(block, c, t.n_blocks) for c in columns], -1)

    out = {}
    if "p_up" in f:
        moved = t.r != 0
        p, up, block = f["p_up"][moved], t.r[moved] > 0, t.block[moved]
        hit = 0.5 + 0.5 * np.sign(p - 0.5) * np.where(up, 1, -1)
        out["da"] = total(hit, 1.0, block=block), ratio
        out["balanced_accuracy"] = (total(hit * up, up, hit * ~up, ~up, block=block),
                                    lambda s: (ratio(s[..., :2]) + ratio(s[..., 2:])) / 2)
        out["auc"] = by_bin(ordered_bins(p), block, t.n_blocks, up, ~up), area
        with np.errstate(divide="ignore"):  # always_up: infinite
            out["logloss"] = total(-np.log(np.where(up, p, 1 - p)), 1.0, block=block), ratio
        out["up_share"] = total(p > 0.5, 1.0, block=block), ratio
        out["ece"] = (by_bin(np.minimum(p * 10, 9).astype(int), block, t.n_blocks, p - up, np.ones(len(p))),
                      lambda s: np.abs(s[..., 0, :]).sum(-1) / s[..., 1, :].sum(-1))
    signal = f.get("mean", f.get("p_up"))
    if signal is not None:
        x, y = signal - signal.mean(), t.r - t.r.mean()
        out["ic"] = total(1.0, x, y, x * x, y * y, x * y), correlation
        out["rank_ic"] = stamp_sums(*rank_ic(signal, t.r, t.stamp), t), ratio
    if "point" in f:
        out["mae"] = total(100 * np.abs(t.r - f["point"]), 1.0), ratio
        out["rmse"] = total(1e4 * (t.r - f["mean"])**2, 1.0), lambda s: np.sqrt(ratio(s))
        out["mape"] = total(100 * np.abs(np.expm1(f["point"] - t.r)), 1.0), ratio
        out["crps"] = total(100 * f["crps"], 1.0), ratio
    if "pit" in f:
        out |= {f"coverage{q}": (total(np.abs(f["pit"] - 0.5) <= q / 200, 1.0), ratio) for q in (50, 80, 90)}
    if len(f.get("path_point", ())):
        values = dict(path_mape=100 * np.abs(np.expm1(f["path_point"] - t.path_r)), path_crps=100 * f["path_crps"])
        if "path_pit" in f:
            values["path_coverage90"] = within(f["path_pit"], f.get("path_width", 0.0), 0.9)
        for name, value in values.items():
            sums = np.zeros((t.n_path_blocks, t.horizon, 2))
            np.add.at(sums, t.path_block, np.stack([value, np.ones(value.shape)], -1))
            out[name] = sums, ratio
    return out


def within(pit, width, share):
    """How much of [pit - width / 2, pit + width / 2] lies in the central `share` of [0, 1]: a number from 0 to 1."""
    if not np.any(width):
        return (np.abs(pit - 0.5) <= share / 2).astype(float)
    inner = np.minimum(pit + width / 2, (1 + share) / 2) - np.maximum(pit - width / 2, (1 - share) / 2)
    return (inner / width).clip(0, 1)


def stamp_sums(v, known, t):
    """Sums over each block of v [stamps] where it is known, and how many are: [n_blocks, 2]."""
    block = np.zeros(len(v), int)
    block[t.stamp] = t.block
    return np.stack([np.bincount(block, w, t.n_blocks) for w in (v * known, known)], -1)


def by_bin(bins, block, n_blocks, *columns):
    """Sums over each block and bin: [n_blocks, len(columns), bins]."""
    n = bins.max(initial=0) + 1
    return np.stack([np.bincount(block * n + bins, c, n_blocks * n).reshape(n_blocks, n) for c in columns], 1)


def ordered_bins(p, most=2048):
    """The rank of each p among the distinct ones; neighbours share a bin where there are more than `most`."""
    value, rank, count = np.unique(p, return_inverse=True, return_counts=True)
    return rank if len(value) <= most else (np.cumsum(count) - 1)[rank] * most // len(p)


def area(s):
    """Area under the ROC curve from s [..., 2, bins], ups and downs: P(p of an up > p of a down) + P(equal) / 2."""
    below = s[..., 1, :].cumsum(-1) - s[..., 1, :] / 2
    return (s[..., 0, :] * below).sum(-1) / (s[..., 0, :].sum(-1) * s[..., 1, :].sum(-1))


def correlation(s):
    """Pearson's, from sums s [..., 6] of 1, x, y, x^2, y^2, x y."""
    n, x, y, xx, yy, xy = np.moveaxis(s, -1, 0)
    return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def rank_ic(signal, r, stamp):
    """Spearman's correlation of signal and return across the symbols of each time stamp, and which stamps have one.

    At least 3 symbols must be there, and differ.
    """
    n = np.bincount(stamp)
    x, y = (v - (np.bincount(stamp, v) / n.clip(1))[stamp] for v in (ranks(signal, stamp), ranks(r, stamp)))
    variance = np.bincount(stamp, x * x) * np.bincount(stamp, y * y)
    return np.bincount(stamp, x * y) / np.sqrt(variance.clip(1e-9)), (n >= 3) & (variance > 1e-9)


def ranks(v, stamp):
    """Rank within the time stamp (up to a constant of the stamp); equal values share their mean rank."""
    order = np.lexsort((v, stamp))
    group = np.cumsum((np.diff(v[order], prepend=np.nan) != 0) | (np.diff(stamp[order], prepend=-1) != 0)) - 1
    out = np.empty(len(v))
    out[order] = (np.bincount(group, np.arange(len(v))) / np.bincount(group))[group]
    return out


def trading(f, t, cost_bps):
    """Long the top fifth, short the bottom fifth by P(up), equal weights, at every time stamp with 5 symbols.

    Return per bar in bps after costs, and turnover, the value traded per bar as a share of one side (4: both sides
    replaced). Stamps with fewer are left out, with the cost of closing before them. Blocks of sums as in block_sums.
    """
    n_stamps, n_symbols = t.stamp.max() + 1, len(t.series)
    p = np.full((n_stamps, n_symbols), np.nan)
    p[t.stamp, t.symbol] = f["p_up"]
    n = np.isfinite(p).sum(1)
    fifth = np.maximum(n // 5, 1)[:, None]
    place = p.argsort(1, kind="stable").argsort(1)  # missing ones come last
    long, short = (place >= n[:, None] - fifth) & (place < n[:, None]), place < fifth
    weight = np.where(n[:, None] < 5, 0.0, (long * 1.0 - short) / fifth)  # (n_stamps, n_symbols)
    gain = np.bincount(t.stamp, weight[t.stamp, t.symbol] * np.expm1(t.r))
    turnover = np.abs(np.diff(weight, axis=0, prepend=0)).sum(1)
    return dict(long_short=(stamp_sums(1e4 * gain - turnover * cost_bps, n >= 5, t), ratio),
                turnover=(stamp_sums(turnover, n >= 5, t), ratio))


def bootstrap(sums, t):
    """{score: (value, replicates)} of block_sums: blocks drawn with replacement.

    The same for every forecaster, so that differences are paired.
    """
    out = {}
    with np.errstate(all="ignore"):
        for name, (s, score) in sums.items():
            value = score(s.sum(0))
            drawn = score(np.tensordot(t.path_weights if name.startswith("path") else t.weights, s, 1))
            finite = np.isfinite(drawn)
            centre = drawn.sum(0, where=finite) / finite.sum(0)
            out[name] = value, drawn - centre + value  # ECE, a sum of magnitudes, is larger in a replicate
    return out


def scored(value, drawn, n_blocks):
    """{value, lo, hi}, the 95 % percentile interval; a list of them for scores over steps.

    lo and hi are None under 20 blocks, all is None where the value is not finite. Blocks are few: the percentiles are
    those that make the interval as wide as Student's t (Hesterberg 2014, arXiv 1411.5279).
    """
    if np.ndim(value):
        steps = [scored(*step, n_blocks) for step in zip(value, drawn.T)]
        return steps if any(steps) else None
    if not np.isfinite(value):
        return None
    drawn = drawn[np.isfinite(drawn)]
    if n_blocks < MIN_BLOCKS or len(drawn) < REPLICATES // 2:
        return dict(value=float(value), lo=None, hi=None)
    z, df = NORMAL.inv_cdf(0.975), n_blocks - 1
    student = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = NORMAL.cdf(-student * math.sqrt(n_blocks / df))
    lo, hi = np.quantile(drawn, (tail, 1 - tail))
    return dict(value=float(value), lo=float(lo), hi=float(hi))


def paired(name_a, a, name_b, b, t, only=METRICS):
    """Differences a - b of every score that both have, and ratios a / b of MAE and CRPS, replicate by replicate."""
    return [dict(a=name_a, b=name_b, metric=m, difference=versus(a[m], b[m], t.blocks_of(m), as_ratio=False),
                 ratio=versus(a[m], b[m], t.blocks_of(m), as_ratio=True) if m in RATIOS else None)
            for m in only if m in a and m in b]


def versus(a, b, n_blocks, as_ratio):
    """The difference or ratio of two (value, replicates), with its interval."""
    with np.errstate(all="ignore"):
        return scored(*((x / y if as_ratio else x - y) for x, y in zip(a, b)), n_blocks)


def token_use(tokenizer, t):
    """How much of the codebooks the targets use."""
    tokens = np.concatenate([tokens[a:b] for tokens, (a, b) in zip(t.tokens(tokenizer), t.ranges)]).astype(np.int64)
    use, _ = code_use(tokenizer, *torch.from_numpy(tokens.T))
    return use | dict(pairs=int(use["pairs"]))


def token_correlations(tokens, accuracies, t):
    """Correlation, over checkpoints, of each number of token_use with direction accuracy.

    The intervals are those of the accuracies: they speak of these checkpoints, not of others.
    """
    value, drawn = np.array([v for v, _ in accuracies]), np.stack([d for _, d in accuracies], -1)  # (n,), (draws, n)
    place = lambda v: ((v[..., None] > v[..., None, :]) + 0.5 * (v[..., None] == v[..., None, :])).sum(-1)

    def pearson(x, y):
        x = x - x[0]  # all alike: exactly 0, so that no rounding correlates
        x, y = x - x.mean(), y - y.mean(-1, keepdims=True)
        return (x * y).sum(-1) / np.sqrt((x * x).sum() * (y * y).sum(-1))

    with np.errstate(all="ignore"):
        return {key: dict(pearson=scored(pearson(x, value), pearson(x, drawn), t.n_blocks),
                          spearman=scored(pearson(place(x), place(value)), pearson(place(x), place(drawn)), t.n_blocks))
                for key in tokens[0] for x in [np.array([float(use[key]) for use in tokens])]}


def groups_of(t, by):
    """(name, mask over the targets) of each group; volatility: thirds of the bars by s_t, known before the bar."""
    if by == "symbol":
        return [(bars.symbol, t.symbol == i) for i, bars in enumerate(t.series)]
    if by == "quarter":
        month = t.time.astype("datetime64[s]").astype("datetime64[M]").astype(int)
        return [(f"{1970 + q // 4}-Q{q % 4 + 1}", month // 3 == q) for q in np.unique(month // 3)]
    third = np.searchsorted(np.quantile(t.s, (1 / 3, 2 / 3)), t.s)
    return [(name, third == k) for k, name in enumerate(("low", "middle", "high"))]


def backtest(checkpoints, bars, split="test", start=None, end=None, horizon=10, paths=100, stride=None, seed=0):
    """Score checkpoints on bars that have happened, beside baselines, with 95 % intervals over blocks of time.

    checkpoints: paths, or (model, tokenizer, meta) as load_checkpoint gives.  bars: list of Bars.  split: "test" or "val"
    by the checkpoints' borders, unless start (first date of the targets) names them; end: the first date after them.
    Targets before a checkpoint's test start need start, and the result's split is then "in-sample".  Paths of `horizon`
    bars start every `stride` bars (default: ten times a symbol, at least the horizon apart).

    Returns split, start, end (of the targets), blocks; checkpoints, dicts of ckpt, the scores of METRICS, tokens;
    baselines, {name: scores}; paired, dicts of a, b, metric, difference, ratio. A score is {value, lo, hi} or None, of
    paths a list, one for each bar ahead; errors in log return x 100, mape in %. Raises UserError where there is no
    target, a date is none, or --start is missing.
    """
    result = evaluate(checkpoints, bars, split, start, end, horizon, paths, stride, seed)
    return {key: result[key] for key in KEYS}


def evaluate(checkpoints, series, split="test", start=None, end=None, horizon=10, paths=100, stride=None, seed=0,
             parallel=False, by=None, cost_bps=0.0, device="cpu"):
    """backtest, and what the table shows besides: trading, scores by groups, correlation with the tokens' use."""
    if horizon < 1 or paths < 2 or (stride is not None and stride < 1):
        raise UserError(f"--horizon {horizon}, --stride {stride}: must be at least 1, and --paths {paths} at least 2 "
                        f"in a backtest")
    if by not in (None, "symbol", "quarter", "volatility"):
        raise UserError(f"--by {by}: choose symbol, quarter or volatility")
    is_path = lambda c: isinstance(c, (str, os.PathLike))
    loaded = [(str(c), *load_checkpoint(c, data.pick_device(device))) if is_path(c) else (f"checkpoint {i + 1}", *c)
              for i, c in enumerate(checkpoints)]
    split, lo, hi = span_of([meta for *_, meta in loaded], split, start, end)
    t = Targets([series] if isinstance(series, data.Bars) else series, lo, hi, horizon, stride, seed)
    for what, n in (("the next bar", t.n_blocks), (f"{horizon} bars ahead", t.blocks_of("path"))):
        if n < MIN_BLOCKS:
            print(f"warning: no intervals for scores of {what}: the targets make {n} blocks of time, {MIN_BLOCKS} are the "
                  f"least (give a longer span, or a shorter --horizon)", file=sys.stderr)

    forecasts, use = {}, {}
    for name, model, tokenizer, _ in loaded:
        forecasts[name] = next_bars(model, tokenizer, t) | simulated(model, tokenizer, t, paths)
        if parallel:
            forecasts[f"{name} parallel"] = simulated(model, tokenizer, t, paths, parallel=True)
        use[name] = token_use(tokenizer, t)
    rivals = baselines(t, paths)
    drawn = {name: bootstrap(block_sums(f, t), t) for name, f in (forecasts | rivals).items()}
    rows = {name: {m: scored(*found[m], t.blocks_of(m)) if m in found else None for m in METRICS}
            for name, found in drawn.items()}
    pairs = [(a, b, METRICS) for a, b in itertools.combinations(forecasts, 2)]
    pairs += [(a, b, ("da", "mae", "crps", "path_crps")) for a in forecasts for b in rivals]
    pairs = [row for a, b, only in pairs for row in paired(a, drawn[a], b, drawn[b], t, only)]
    trades = {name: {m: scored(*v, t.n_blocks) for m, v in bootstrap(trading(f, t, cost_bps), t).items()}
              for name, f in (forecasts | rivals).items() if "p_up" in f and name != "always_up"}
    result = dict(split=split, start=data.iso(t.time.min()), end=data.iso(t.time.max()), blocks=t.n_blocks,
                  checkpoints=[dict(ckpt=name, **rows[name], tokens=use.get(name)) for name in forecasts],
                  baselines={name: rows[name] for name in rivals}, paired=pairs, trading=trades)
    if by:
        result["by"] = [dict(group=group, ckpt=name, bars=int(mask.sum()), **grouped(forecasts[name], t, mask))
                        for group, mask in groups_of(t, by) for name, *_ in loaded]
    if len(loaded) >= 3:
        result["correlations"] = token_correlations(list(use.values()), [drawn[name]["da"] for name in use], t)
    return result


BY = ("da", "auc", "mae", "crps", "coverage90")  # scores by groups


def grouped(f, t, mask):
    """Scores of the next bar over some of the targets, bool [N]."""
    part = copy.copy(t)
    part.r, part.stamp, part.block = t.r[mask], t.stamp[mask], t.block[mask]
    sums = block_sums({key: v[mask] for key, v in f.items() if not key.startswith("path")}, part)
    drawn = bootstrap({m: sums[m] for m in BY if m in sums}, t)
    return {m: scored(*v, len(np.unique(part.block))) for m, v in drawn.items()}


# ---- what the later stages ask: is it better than what they began with, at no cost?

NO_WORSE = 1.005                # a ratio to the reference whose interval ends below this
VAL_PROBES = 8                  # in place of PROBES, for scores on val in the course of a training


def some_targets(series, split, borders, horizon=1, origins=1, seed=0, most=None):
    """Targets in a split, with about so many origins of paths.

    most: about so many bars at most: symbols evenly chosen, at least 8, then the earliest dates.
    """
    spans = [(bars, *data.targets_of(bars, split, borders)) for bars in series]
    spans = [span for span in spans if span[2] > span[1]]
    if not spans:
        raise UserError(f"no symbol has a bar in {split} (val from {data.iso(borders[0])}, test from "
                        f"{data.iso(borders[1])}); give --data that reach there")
    n = max(8, (most or 2**62) // max(last - first for _, first, last in spans))
    if n < len(spans):
        spans = [spans[i] for i in np.linspace(0, len(spans) - 1, n).round().astype(int)]
    stamps = np.sort(np.concatenate([bars.time[first:last] for bars, first, last in spans]))
    low, end = (borders[0], borders[1]) if split == "val" else (borders[1], 2**62)
    if most and len(stamps) > most:
        stamps, end = stamps[:most], int(stamps[most])
    return Targets([bars for bars, *_ in spans], low, end, horizon, max(1, len(stamps) // origins), seed)


def drawn_scores(model, tokenizer, t, paths=0, probes=PROBES):
    """{score: (value, replicates)} of a model on targets t.

    Of the next bar if probes > 0; of paths if paths > 0, so many from each origin.
    """
    one = next_bars(model, tokenizer, t, probes) if probes else {}
    many = simulated(model, tokenizer, t, paths) if paths else {}
    return bootstrap(block_sums(one | many, t), t)


def at_step(drawn, metric, step):
    """(value, replicates) of a score; of a path's at `step` (-1: the last), or its mean over the steps if that is None."""
    value, replicates = drawn[metric]
    if not metric.startswith("path"):
        return value, replicates
    return (value.mean(), replicates.mean(-1)) if step is None else (value[step], replicates[..., step])


def against(a, b, metric, t, step=-1):
    """The score a beside b, paired: as a ratio for the metrics of RATIOS, else as a difference; step as in at_step."""
    return versus(at_step(a, metric, step), at_step(b, metric, step), t.blocks_of(metric), as_ratio=metric in RATIOS)


def upper(score):
    """The upper end of an interval; the value itself where there are too few blocks for one."""
    return score["value"] if score["hi"] is None else score["hi"]


def print_versus(columns, t, rows, versus=(-1, 0)):
    """Scores of forecasters {name: drawn_scores} side by side, and one of them paired with another, with its interval.

    versus: the places of these two among the columns. rows: (metric, label, scale, digits), of path scores (metric, step
    or None for their mean) in the first place.
    """
    names, every = list(columns), list(columns.values())
    a, b = (every[i] for i in versus)
    print(f"targets {data.iso(t.time.min())} to {data.iso(t.time.max())}: {len(t.r):,} bars, {t.n_blocks} blocks; "
          f"{len(t.path_r):,} origins")
    heads = "".join(f"{name[-9:]:>10}" for name in names)
    print(f"{'':22}{heads}   {names[versus[0]]} to {names[versus[1]]}, 95 %")
    for metric, label, scale, digits in rows:
        metric, step = metric if isinstance(metric, tuple) else (metric, -1)
        if metric not in a:
            continue
        line = f"{label:22}"
        for s in every:
            line += f"{at_step(s, metric, step)[0] * scale:>10.{digits}f}" if metric in s else f"{'.':>10}"
        if metric in b:
            pair, sign = against(a, b, metric, t, step), "" if metric in RATIOS else "+"
            scale, digits = (1, 4) if metric in RATIOS else (scale, digits)
            line += "   " + ("x " if metric in RATIOS else "  ") + show(pair, scale, digits, sign)
        print(line)


def show(score, scale, digits, sign=""):
    """A score with its interval, as text."""
    if score is None:
        return "."
    value, lo, hi = (None if score[k] is None else f"{score[k] * scale:{sign}.{digits}f}" for k in ("value", "lo", "hi"))
    return value if lo is None else f"{value} [{lo}, {hi}]"


# ---- the table

SHOWN = (("da", "right calls %", 100, 2), ("balanced_accuracy", "balanced %", 100, 2), ("auc", "AUC", 1, 4),
         ("logloss", "log loss", 1, 4), ("ece", "ECE %", 100, 2), ("ic", "IC", 1, 4), ("rank_ic", "rank IC", 1, 4),
         ("mae", "MAE", 1, 4), ("rmse", "RMSE", 1, 4), ("mape", "MAPE %", 1, 4), ("crps", "CRPS", 1, 4),
         ("coverage50", "in 50 % band", 100, 2), ("coverage80", "in 80 % band", 100, 2),
         ("coverage90", "in 90 % band", 100, 2))  # score, label, factor, digits
HEADS = ("persist", "up", "ar1", "logit", "gauss", "fhs", "har")


def print_backtest(result, horizon, cost_bps):
    """Metrics as rows, forecasters as columns of 8; under each value half its interval."""
    columns = {entry["ckpt"]: entry for entry in result["checkpoints"]} | result["baselines"]
    heads = [os.path.basename(entry["ckpt"]).removesuffix(".pt")[-7:] for entry in result["checkpoints"]]
    print(f"{result['split']}: targets {result['start']} to {result['end']}, {result['blocks']} blocks of time")
    print(f"± half the 95 % interval; MAE, RMSE, CRPS in log return x 100; costs of {cost_bps:g} bps")
    print(" " * 14 + "".join(f"{head:>8}" for head in (*heads, *HEADS)))
    rows = [(label, [entry[m] for entry in columns.values()], scale, digits) for m, label, scale, digits in SHOWN]
    for m, label in (("path_mape", "MAPE %"), ("path_crps", "CRPS")):
        for k in sorted({(horizon + 1) // 2, horizon}):
            rows.append((f"{label}, bar {k}", [entry[m] and entry[m][k - 1] for entry in columns.values()], 1, 4))
    for m, label in (("long_short", "top-bottom bps"), ("turnover", "turnover")):
        rows.append((label, [result["trading"].get(name, {}).get(m) for name in columns], 1, 2))
    for label, scores, scale, digits in rows:
        values = [f"{s['value'] * scale:.{digits}f}" if s else "." for s in scores]
        halves = [f"±{(s['hi'] - s['lo']) / 2 * scale:.{digits}f}" if s and s["lo"] is not None else "" for s in scores]
        print(f"{label:14}" + "".join(f"{v:>8}" for v in values))
        if any(halves):
            print(" " * 14 + "".join(f"{h:>8}" for h in halves))
    # ratios to the two baselines that know volatility, and between checkpoints
    own = [entry["ckpt"] for entry in result["checkpoints"]]
    print("\npaired, the same blocks drawn for both")
    for pair in result["paired"]:
        if pair["b"] not in own and pair["b"] not in ("fhs", "har"):
            continue
        what = "ratio" if pair["ratio"] else "difference"
        score, metric = pair[what], pair["metric"]
        if isinstance(score, list):
            score, metric = score[-1], f"{metric} at bar {len(score)}"
        if score:
            print(f"{metric:20} {what:10} {show(score, 1, 4):26} {os.path.basename(pair['a'])} to {os.path.basename(pair['b'])}")
    for row in result.get("by", ()):
        whose = f"  {os.path.basename(row['ckpt'])}" if len(own) > 1 else ""
        scores = "  ".join(f"{m} {show(row[m], 1, 4)}" for m in BY if m != "auc" and row.get(m))
        print(f"{row['group']:10} {row['bars']:>8,} bars{whose}  {scores}")
    for key, row in result.get("correlations", {}).items():
        kinds = ", ".join(f"{kind} {show(s, 1, 2)}" for kind, s in row.items())
        print(f"correlation of {key} with right calls: {kinds}")


# ----------------------------------------------------------------------------------------------------------------------
# The run

def check(config):
    if not config.ckpt:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if not math.isfinite(config.cost_bps):
        raise UserError(f"--cost_bps {config.cost_bps}: must be a number such as 5")


def main():
    config = Config(**data.cli(Config, __doc__))
    check(config)
    series = load_series(config.data, load_checkpoint(config.ckpt[0])[2], config.symbols)
    names = ("split", "start", "end", "horizon", "paths", "stride", "seed", "parallel", "by", "cost_bps", "device")
    result = evaluate(config.ckpt, series, **{name: getattr(config, name) for name in names})
    if config.json:
        print(json.dumps(jsonable({key: value for key, value in result.items() if key in KEYS or key == "by"})))
    else:
        print_backtest(result, config.horizon, config.cost_bps)


if __name__ == "__main__":
    data.run(main)
