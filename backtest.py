"""What forecasts are worth: the scores of checkpoints on bars that have happened, beside cheap opponents.

    python backtest.py --ckpt out.pt                                       # the test bars of the data it was trained on
    python backtest.py --ckpt a.pt b.pt --data other.csv --json            # several checkpoints, paired
    python backtest.py --ckpt out.pt --start 2018-07-01 --by volatility --cost_bps 5

Targets -> forecasters -> block_sums -> bootstrap -> scored. The next bars are scored in one teacher-forced pass, paths
from some origins, beside opponents on the same bars, with 95 % intervals from a bootstrap over blocks of time.

A forecaster is a dict of arrays over the N target bars: p_up (given that the bar moves), mean and point (expected and
median log return), crps, pit (probability integral transform: the share of its distribution below what came), and crps
and pit of the bar's range and of its volume, as range_crps and so on. Over the n origins: path_point, path_crps,
path_pit [n, H] of the log return since the origin, path_rv_crps [n] of the realized volatility, and what the paths say of
losses. What a forecaster does not say is left out; such scores are null.

In this order: targets, distributions and their scores, the model, its opponents, scores and intervals, what the later
stages ask of it, the table.
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
from model import load_checkpoint, norm
from sample import (
    WARN, Origin, by_close, chance_extreme, chance_up, extreme_move, jsonable, load_series, simulate_from,
    unmoved_share, usual_sigma)
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
    stride: int | None = None          # bars between the origins of paths (default: the horizon, or a thousand origins)
    parallel: bool = False             # also the latent slots' forecast of all bars at once (at most 16)
    by: str | None = None              # scores by symbol, quarter or volatility (falling or rising, as HAR has it) too
    cost_bps: float = 0.0              # cost of trading, in 1/10000 of the value traded
    seed: int = 0                      # of the sampling
    json: bool = False                 # print JSON in place of the table
    device: str = "cpu"                # cpu, cuda, ...


METRICS = ("da", "balanced_accuracy", "auc", "logloss", "ece", "ic", "rank_ic", "mae", "rmse", "mape", "crps",
           "coverage50", "coverage80", "coverage90", "range_crps", "range_coverage90", "volume_crps", "volume_coverage90",
           "path_mape", "path_crps", "path_rv_crps", "var95_hits", "es95_ratio",
           "extreme_flagged", "extreme_said", "extreme_came")
OF_PATHS = ("path", "var95", "es95", "extreme")  # scores of paths begin so
RARE = ("var95", "es95", "extreme")              # of those that count rare cases
RATIOS = ("mae", "crps", "range_crps", "volume_crps", "path_mape", "path_crps", "path_rv_crps")  # compared as ratios too
KEYS = ("split", "start", "end", "blocks", "checkpoints", "baselines", "paired")
BINS, PROBES = 512, 32           # of the next bar's close; coarse tokens of each bar whose fine tokens are looked at
REPLICATES = 2000               # of the bootstrap
MIN_BLOCKS, MAX_BLOCKS = 20, 500  # of time: with fewer no interval; with more they are merged
MIN_CASES = 5                   # blocks with a rare case; with fewer no interval
ORIGINS = 1000                  # of paths, in all, by default; but at least ten a symbol
RESIDUALS = 500                 # that filtered historical simulation (the newest) and HAR draw from
LAMBDA = 0.94                   # decay of the former's volatility (as RiskMetrics, 1996)
LAGS = 5                        # bars that the logistic regression looks at
WINDOWS = (1, 5, 22, 66)        # bars over which HAR takes means
HAR_FLOOR = 0.05                # least range in HAR, as a share of the mean
LEVEL = 500                     # half-life, in bars, of the scale of HAR's residuals
SEEN = 3                        # days after which what a time of day shows counts for half
HOUR = 3600
NORMAL = statistics.NormalDist()


# ----------------------------------------------------------------------------------------------------------------------
# Targets

class Targets:
    """The bars to forecast, one after the other, symbol by symbol; the origins of the paths; and the blocks of time.

    series, ranges: each symbol's Bars, and [first, last) of its targets; returns: log returns of all its bars. Of the N
    targets: time, r (log return), range (log H / L), volume (log 1 + V, NaN where there is none), s (the scale s_t, known
    before), symbol, stamp (which of the distinct times), block. Of the paths: origins, a symbol's bars after which they
    begin; path_r [n, H], log returns since the origin; path_rv [n], root of the sum of squared returns; usual [n], the
    long-run volatility; path_block.
    weights, path_weights [REPLICATES, blocks]: how often each replicate of the bootstrap takes each block.

    Blocks hold all symbols. For the next bar a block has n^(1/3) of a symbol's n target bars (the usual rate: Hall,
    Horowitz and Jing, Biometrika 1995): whole dates of daily bars; within the day 32 bars where there are enough of them.
    For paths it has the horizon at least.
    """

    def __init__(self, series, lo, hi, horizon, stride, seed):
        ranges = [(bars, data.targets_of(bars, "val", (lo, hi))) for bars in series]  # between two borders
        ranges = [(bars, (first, last)) for bars, (first, last) in ranges if first < last]
        if not ranges:
            raise UserError(f"no bar to forecast from {data.iso(lo)} on: give other --data or --start "
                            f"(the first {data.CONTEXT} bars are context)")
        self.series, self.ranges = zip(*ranges)
        self.tokenized = {}
        self.horizon, self.seed = horizon, seed
        lengths = [last - first for first, last in self.ranges]
        longest = max(lengths)

        # the bars
        self.returns = [np.diff(np.log(bars.ohlcva[:, 3]), prepend=np.log(bars.ohlcva[0, 3])) for bars in self.series]
        self.time = self.flat([bars.time for bars in self.series])
        self.r = self.flat(self.returns)
        self.range = self.flat([log_range(bars) for bars in self.series])
        self.volume = self.flat([log_volume(bars) for bars in self.series])
        self.s = self.flat([data.scales(bars) for bars in self.series])
        self.symbol = np.repeat(np.arange(len(self.series)), lengths)
        self.stamp = np.unique(self.time, return_inverse=True)[1]

        # the paths
        each = max(10, ORIGINS // len(self.series))
        self.stride = stride or max(horizon, (longest - horizon + 1) // each)
        self.origins = [self.origins_of(bars.symbol, *span) for bars, span in zip(self.series, self.ranges)]
        ahead = np.arange(1, horizon + 1)
        moves = np.concatenate([r[o[:, None] + ahead] for r, o in zip(self.returns, self.origins)])  # (n, H)
        self.path_r, self.path_rv = moves.cumsum(1), np.sqrt((moves**2).sum(1))
        usual = [usual_sigma(bars.ohlcva[:o + 1, 3]) for bars, at in zip(self.series, self.origins) for o in at]
        self.usual = np.array(usual)

        # the blocks
        self.daily = max(np.median(np.diff(bars.time)) for bars in self.series) >= DAY
        units, unit = np.unique(self.time // DAY if self.daily else self.time, return_inverse=True)
        self.n_blocks = self.blocks_in(longest, 1)
        self.n_path_blocks = self.blocks_in(longest, horizon)
        self.block = unit * self.n_blocks // len(units)
        starts = np.concatenate([bars.time[o + 1] for bars, o in zip(self.series, self.origins)])
        place = np.searchsorted(units, starts // DAY if self.daily else starts)
        self.path_block = place * self.n_path_blocks // len(units)
        random = np.random.default_rng([seed, 1])
        self.weights, self.path_weights = (resampled(n, random) for n in (self.n_blocks, self.n_path_blocks))

    def flat(self, values):
        """Of arrays over each symbol's bars, those of the targets: [N]."""
        return np.concatenate([v[first:last] for v, (first, last) in zip(values, self.ranges)])

    def origins_of(self, symbol, first, last):
        """The bars after which paths begin: every stride-th, from an offset of the symbol's own, to spread the dates."""
        n = last - first - self.horizon + 1
        return first - 1 + np.arange(zlib.crc32(symbol.encode()) % max(1, min(self.stride, n)), n, self.stride)

    def blocks_in(self, n, horizon):
        """How many blocks n target bars make."""
        within_day = 1 if self.daily else min(data.HALF_LIFE, n // MIN_BLOCKS)
        length = max(1, int(n ** (1 / 3) + 1e-9), within_day, horizon)
        return max(1, min(n // length, MAX_BLOCKS))

    def blocks_of(self, metric):
        """How many blocks of time hold what a score is made of."""
        return len(np.unique(self.path_block)) if of_paths(metric) else self.n_blocks

    def missing(self, horizon):
        """How many target bars more would make enough blocks for an interval."""
        n = longest = max(last - first for first, last in self.ranges)
        while self.blocks_in(n, horizon) < MIN_BLOCKS:
            n += 1
        return n - longest

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

    @functools.cached_property
    def volatility(self):
        return Volatility(self)


def of_paths(metric):
    return metric.startswith(OF_PATHS)


def log_range(bars):
    """log(H / L) of each bar."""
    return np.log(bars.ohlcva[:, 1] / bars.ohlcva[:, 2])


def log_volume(bars):
    """log(1 + V) of each bar, NaN where nothing was traded or nothing is known."""
    volume = bars.ohlcva[:, 4]
    return np.log1p(np.where(volume > 0, volume, np.nan))


def resampled(n, random):
    """How often each replicate draws each of n blocks: [REPLICATES, n]; no replicates of too few blocks."""
    return random.multinomial(n, np.full(n, 1 / n), REPLICATES if n >= MIN_BLOCKS else 0).astype(float)


def span_of(metas, split, start, end):
    """(name of the split, first time stamp, end) of the targets. In-sample targets only where they are asked for."""
    if split not in ("val", "test"):
        raise UserError(f"--split {split}: choose val or test, or name the targets by --start and --end")
    borders = {tuple(meta.get("splits") or ()) for meta in metas}
    lo, hi = date_of("start", start), date_of("end", end)
    if lo is None and (len(borders) > 1 or () in borders):
        raise UserError("the checkpoints were split at different dates (or at none): name the first target by --start")
    test = max((b[1] for b in borders if b), default=math.inf)
    hi = 2**62 if hi is None else hi
    if lo is not None:
        split = "in-sample" if lo < test or () in borders else "test"
    elif split == "val":
        lo, latest = next(iter(borders))
        hi = min(hi, latest)
    else:
        lo = test
    if hi <= lo:
        raise UserError(f"--end {end}: not after the first target, {data.iso(lo)}; "
                        f"targets before it are in-sample and need --start")
    return split, int(lo), int(hi)


def date_of(name, date):
    """The time stamp of --start or --end, None where it is not given."""
    if date is None:
        return None
    time = data.parse_time(str(date))
    if math.isnan(time):
        raise UserError(f"--{name} {date}: not a date; write it as 2018-01-01")
    return time


# ----------------------------------------------------------------------------------------------------------------------
# Distributions, and their scores for what happened

def judge(r, p, y):
    """Scores of distributions for what happened, y [...]: values r [..., K] in order, p [..., K] their probabilities.

    CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, JASA 2007), the last as the integral of F (1 - F).
    """
    F, y = p.cumsum(-1), y[..., None]
    middle = (quantile(r, F, 0.5 - 1e-9) + quantile(r, F, 0.5 + 1e-9)) / 2
    below = (p * ((r < y) + 0.5 * (r == y))).sum(-1)
    return dict(mean=(p * r).sum(-1), point=middle, pit=below, crps=(p * np.abs(r - y)).sum(-1) - spread(r, F))


def quantile(r, F, share):
    """The first of the values r [..., K] whose cumulative probability F [..., K] reaches share."""
    at = (F < share).sum(-1, keepdims=True).clip(max=r.shape[-1] - 1)
    return np.take_along_axis(r, at, -1)[..., 0]


def spread(r, F):
    """E|X - X'| / 2 of values r [..., K] in order, F [..., K] their cumulative probabilities."""
    return (F[..., :-1] * (1 - F[..., :-1]) * np.diff(r)).sum(-1)


def spread_of_draws(r):
    """The same of draws r [..., K] in any order."""
    K = r.shape[-1]
    return spread(np.sort(r, -1), np.arange(1, K + 1) / K)


def judge_draws(r, y):
    """The same for K draws r [..., K], in any order, of which the first K // 2 are independent of the others.

    They stand for what they were drawn from, so E|X - X'| counts pairs across the halves alone: unbiased, as the fair
    form of Ferro (QJRMS 2014) is for independent draws.
    """
    K, half = r.shape[-1], r.shape[-1] // 2
    scores = judge(np.sort(r, -1), np.full(r.shape, 1 / K), y)
    if K == 1:
        return scores
    # spread(all) = a^2 spread(first half) + (1 - a)^2 spread(second) + 2 a (1 - a) across
    a, whole = half / K, spread_of_draws(r)
    within_halves = a**2 * spread_of_draws(r[..., :half]) + (1 - a)**2 * spread_of_draws(r[..., half:])
    across = (whole - within_halves) / (2 * a * (1 - a))
    return scores | dict(crps=scores["crps"] + whole - across)


def judge_normal(mean, sigma, y):
    """The same for normal distributions; CRPS in closed form."""
    z = (y - mean) / sigma
    cdf, pdf = torch.special.ndtr(torch.from_numpy(z)).numpy(), np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return dict(mean=mean, point=mean, pit=cdf, crps=sigma * (z * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi)))


def judge_residuals(z, y, location=0.0, scale=1.0):
    """The same for location + scale * z: residuals z [K] in order, of one weight; y, location, scale [N]."""
    y, K = (y - location) / scale, len(z)
    below, not_above = np.searchsorted(z, y, "left"), np.searchsorted(z, y, "right")
    total = np.append(0.0, z.cumsum())
    distance = (2 * not_above - K) * y + total[-1] - 2 * total[not_above]  # sum of |z - y|
    crps = scale * (distance / K - spread_of_draws(z))
    return dict(mean=location + scale * z.mean(), point=location + scale * np.median(z),
                pit=(below + not_above) / (2 * K), crps=crps)


def named(name, scores):
    """CRPS and percentile of another quantity than the close."""
    return {f"{name}_crps": scores["crps"], f"{name}_pit": scores["pit"]}


def joined(parts):
    """Forecasters of several sets of bars as one of all."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def from_paths(moves, t, rows):
    """A forecaster's scores of paths: log returns moves [n, K, H] from the origins `rows` of t.

    Among K draws what came has K + 1 ranks, equally likely where the forecast is right: its percentile is known to
    1 / (K + 1). The loss over the horizon is a share of the close at the origin.
    """
    K, r, y = moves.shape[1], moves.cumsum(-1), t.path_r[rows]
    scores = judge_draws(np.moveaxis(r, 1, -1), y)
    pit = (K * scores["pit"] + 0.5) / (K + 1)
    volatility = judge_draws(np.sqrt((moves**2).sum(-1)), t.path_rv[rows])
    worst = np.sort(-np.expm1(r[:, :, -1]), 1)[:, -max(1, round(0.05 * K)):]  # losses beyond VaR 95 %
    return dict(path_point=scores["point"], path_crps=scores["crps"], path_pit=pit,
                path_width=np.full(y.shape, 1 / (K + 1)), path_rv_crps=volatility["crps"], path_es95=worst.mean(1),
                path_extreme=chance_extreme(r[:, :, -1], t.usual[rows], t.horizon))


def along(scores):
    """Scores [n, H] by their names for paths."""
    return {f"path_{key}": scores[key] for key in ("point", "crps", "pit")}


# ----------------------------------------------------------------------------------------------------------------------
# The model

@torch.no_grad()
def next_bars(model, tokenizer, t, probes=PROBES):
    """Forecast every target from the bars before it, teacher-forced. P(up) is exact.

    Windows advance by half their length, so that each target has half a window of context where there is history. Close,
    range and volume are counted in BINS each: P(bin) = sum_c P(c) P(bin | c). All 2^20 pairs would take hours, so
    P(bin | c) is a mean over some contexts before the first target, put right by `probes` coarse tokens of each bar's
    own (stratified by close; control variates). An estimate: a few bins may come out a little below 0.
    """
    half = max(1, model.config.block_size // 2)
    first = np.array([bars.time[a] for bars, (a, _) in zip(t.series, t.ranges)])
    early = np.flatnonzero(first == first.min())
    early = early[np.linspace(0, len(early) - 1, min(32, len(early))).astype(int)]
    h = read(model, tokenizer, t, [(i, t.ranges[i][0], t.ranges[i][0] + 1) for i in early])
    binned = bins_of(model, tokenizer, h)

    device = h.device
    order = by_close(tokenizer).to(device)
    levels = (torch.arange(probes, device=device) + 0.5) / probes
    unmoved = t.flat([unmoved_share(bars, model.config.unmoved)[:-1] for bars in t.series])
    volume_scale = [volume_scales(bars) for bars in t.series]
    level, width = (t.flat([scale[k] for scale in volume_scale]) for k in range(2))
    windows = [(i, j, min(j + half, last)) for i, (first, last) in enumerate(t.ranges) for j in range(first, last, half)]
    parts, at = [], 0
    for k in range(0, len(windows), 16):
        for h in read(model, tokenizer, t, windows[k:k + 16]).split(64):
            now = slice(at, at + len(h))
            coarse = model.coarse_logits(h).float().softmax(-1)  # (m, 2^k1)
            c = coarse[:, order].cumsum(-1)
            probe = order[torch.searchsorted(c, levels * c[:, -1:]).clamp(max=len(order) - 1)]  # (m, probes)
            fine = model.fine_logits(h[:, None], probe).float().softmax(-1) / probes  # (m, probes, 2^k2)
            p = {name: b.probabilities(coarse, probe, fine) for name, b in binned.items()}  # each (m, bins)
            s = t.s[now, None]
            r = np.clip(binned["close"].values * s, -data.MAX_MOVE, data.MAX_MOVE)
            volume = np.clip(level[now, None] + binned["volume"].values * width[now, None], 0, 80)
            p_up = chance_up(model, h, torch.from_numpy(unmoved[now]).to(device)).double().cpu().numpy()
            scores = judge(r, p["close"], t.r[now]) | dict(p_up=p_up.clip(1e-6, 1 - 1e-6))  # keeps the log loss finite
            scores |= named("range", judge(binned["range"].values * s, p["range"], t.range[now]))
            scores |= named("volume", judge(volume, p["volume"], t.volume[now]))
            parts.append(scores)
            at += len(h)
        data.progress(f"next bars: {at:,} of {len(t.r):,}")
    data.progress("")
    return joined(parts)


def read(model, tokenizer, t, windows):
    """h [m, C] that forecast the targets [j, end) of windows (symbol, j, end), one after the other."""
    n, half, tokens = model.config.block_size, max(1, model.config.block_size // 2), t.tokens(tokenizer)
    device = next(model.parameters()).device
    begins = [max(0, j + half - n) for _, j, _ in windows]
    pairs, times = [], []
    for (i, _, _), begin in zip(windows, begins):
        rows = np.minimum(begin + np.arange(n), len(tokens[i]) - 1)  # past the end: repeated, and not looked at
        pairs.append(tokens[i][rows].astype(np.int64))
        times.append(t.series[i].time[rows])
    coarse, fine = torch.from_numpy(np.stack(pairs)).to(device).unbind(-1)  # (B, n)
    hidden = norm(model.trunk(coarse, fine, torch.from_numpy(np.stack(times)).to(device), 0)[0])  # (B, n, C)
    return torch.cat([row[j - 1 - begin:end - 1 - begin] for row, (_, j, end), begin in zip(hidden, windows, begins)])


def volume_scales(bars):
    """(level, width) of log volume before each bar, [T] each: m_t and d_t of data.features."""
    known = np.isfinite(log_volume(bars)) & (np.arange(len(bars)) > 0)
    volume = np.where(known, log_volume(bars), 0.0)
    total, weight = decayed_before(volume), decayed_before(known.astype(float))
    level = total / np.where(weight > 0, weight, 1)
    deviates = known & (weight > 0)
    total, weight = decayed_before(np.abs(volume - level) * deviates), decayed_before(deviates.astype(float))
    return level, np.maximum(total / np.where(weight > 0, weight, 1), data.D_FLOOR)


def decayed_before(u):
    return np.append(0.0, data.decayed_sum(u)[:-1]) * data.DECAY


@dataclass
class Bins:
    """Bins of one quantity of a candle, equally likely over some contexts.

    of [2^k1, 2^k2]: the bin of each pair of tokens; values [bins], their means; share [2^k1, bins]: P(bin | coarse).
    """
    of: torch.Tensor
    values: np.ndarray
    share: torch.Tensor

    def probabilities(self, coarse, probe, fine):
        """P(bin) float64 [m, bins], from coarse = P(coarse) [m, 2^k1], tokens probe [m, n], fine = P(fine) / n of each."""
        p = coarse @ self.share - self.share[probe].mean(1)
        p.scatter_add_(1, self.of[probe].flatten(1), fine.flatten(1))
        return p.double().cpu().numpy()


def bins_of(model, tokenizer, h):
    """Bins of close, range (both in units of s_t) and volume, equally likely over contexts h [M, C]."""
    tables = candle_tables(tokenizer)
    n = len(tables["close"])
    every, p = torch.arange(n, device=h.device), 0.0
    for row in h:
        fine = model.fine_logits(row.expand(n, -1), every).float().softmax(-1)  # (2^k1, 2^k2)
        p = p + model.coarse_logits(row).float().softmax(-1)[:, None] * fine
    return {name: bins_of_table(table.to(h.device), p) for name, table in tables.items()}


def bins_of_table(table, p):
    """Bins of the values table [2^k1, 2^k2], equally likely under p [2^k1, 2^k2]."""
    value, order = table.flatten().sort()
    mass = p.flatten()[order].double().cumsum(0)
    inner = torch.linspace(0, 1, BINS + 1, device=table.device, dtype=mass.dtype)[1:-1] * mass[-1]
    edges = value[torch.searchsorted(mass, inner)].unique()
    of = torch.searchsorted(edges[edges < value[-1]], table)
    n = int(of.max()) + 1
    zero = torch.zeros(n, device=table.device, dtype=torch.float64)
    total = zero.index_add(0, of.flatten(), p.flatten().double())
    values = zero.index_add(0, of.flatten(), (p * table).flatten().double()) / total
    share = torch.zeros(len(table), n, device=table.device).scatter_add_(1, of, p)
    return Bins(of, values.cpu().numpy(), share / share.sum(-1, keepdim=True))


def candle_tables(tokenizer):
    """What every pair of tokens says, {name: float64 [2^k1, 2^k2]}: close and range in units of s_t, volume of d_t."""
    rows = {"close": [], "range": [], "volume": []}
    fine = torch.arange(2**tokenizer.config.fine_bits)
    for coarse in range(2**tokenizer.config.coarse_bits):
        x = tokenizer.decode(torch.full_like(fine, coarse), fine).double()
        close, open_, upper, lower, volume, _ = x.sinh().unbind(-1)
        rows["close"].append(close)
        rows["range"].append((close - open_).abs() + upper.clamp(min=0) + lower.clamp(min=0))
        rows["volume"].append(volume)
    return {name: torch.stack(values) for name, values in rows.items()}


def simulated(model, tokenizer, t, paths, parallel=False, temperature=1.0):
    """Forecast the log returns over the horizon from every origin."""
    n, origins = model.config.block_size, []
    for bars, tokens, at, states in zip(t.series, t.tokens(tokenizer), t.origins, t.states):
        unmoved = unmoved_share(bars, model.config.unmoved)
        for o, state in zip(at, states):
            context = torch.from_numpy(tokens[max(0, o + 1 - n):o + 1].astype(np.int64))
            origins.append(Origin(bars.symbol, context, bars.time[:o + 1], state, bars.ohlcva[o, 3], unmoved[o + 1]))
    parts = []
    for i in range(0, len(origins), 256):
        part = origins[i:i + 256]
        ohlcva, _ = simulate_from(model, tokenizer, part, t.horizon, paths, temperature, seed=t.seed, parallel=parallel)
        last = np.array([o.close for o in part])[:, None, None]
        close = np.concatenate([np.broadcast_to(last, (len(part), paths, 1)), ohlcva[..., 3]], -1)
        parts.append(from_paths(np.diff(np.log(close)), t, slice(i, i + len(part))))
        data.progress(f"paths: {i + len(part):,} of {len(origins):,} origins")
    data.progress("")
    return joined(parts) if parts else {}


# ----------------------------------------------------------------------------------------------------------------------
# Its opponents, each fitted on the bars before the first target, or on those before each origin

def baselines(t, paths):
    """{name: forecaster} of all of them."""
    random = [np.random.default_rng([t.seed, zlib.crc32(bars.symbol.encode()), 2]) for bars in t.series]
    return dict(persistence=persistence(t), always_up=dict(p_up=np.ones(len(t.r))), ar1=each_series(t, ar1),
                logistic=logistic(t), gaussian20=each_series(t, gaussian),
                fhs=each_series(t, historical, paths, random), har=har(t, paths))


def each_series(t, forecaster, *options):
    """forecaster(t, series, rows of its paths, *options) of every series, as one."""
    parts, row = [], 0
    for i, origins in enumerate(t.origins):
        parts.append(forecaster(t, i, slice(row, row + len(origins)), *options))
        row += len(origins)
    return joined(parts)


def persistence(t):
    """All stays as it is: no return, the range and volume of the bar before. A point's CRPS is its error."""
    zero, path_zero = np.zeros(len(t.r)), np.zeros(t.path_r.shape)
    before = {}
    for name, values in (("range", log_range), ("volume", log_volume)):
        every = [values(bars) for bars in t.series]
        before[f"{name}_crps"] = t.flat([np.abs(np.diff(v, prepend=np.nan)) for v in every])
    return dict(mean=zero, point=zero, crps=np.abs(t.r), path_point=path_zero, path_crps=np.abs(t.path_r)) | before


def ar1(t, i, rows):
    """Each log return from the one before."""
    r, (first, last), origins, path_y = t.returns[i], t.ranges[i], t.origins[i], t.path_r[rows]
    x, target = r[1:first - 1], r[2:first]
    b = np.cov(x, target)[0, 1] / max(x.var(ddof=1), 1e-18)
    a = target.mean() - b * x.mean()
    sigma = max((target - a - b * x).std(), 1e-9)
    one = judge_normal(a + b * r[first - 1:last - 1], sigma, r[first:last])
    p_up = torch.special.ndtr(torch.from_numpy(one["mean"] / sigma)).numpy()
    psi = np.cumsum(b ** np.arange(t.horizon))  # (H,): weight of a shock k bars on in the return since the origin
    many = judge_normal(a * psi.cumsum() + b * psi * r[origins, None], np.sqrt((psi**2).cumsum()) * sigma, path_y)
    return one | dict(p_up=p_up) | along(many)


def gaussian(t, i, rows):
    """No drift, the volatility of the last 20 bars."""
    r, (first, last), origins = t.returns[i], t.ranges[i], t.origins[i]
    rms = np.sqrt(sliding_window_view(r**2, 20).mean(-1)).clip(1e-9)  # of bars k .. k + 19
    one = judge_normal(np.zeros(last - first), rms[first - 20:last - 20], r[first:last])
    sigma = rms[origins - 19, None] * np.sqrt(np.arange(1, t.horizon + 1))
    return one | along(judge_normal(np.zeros((len(origins), 1)), sigma, t.path_r[rows]))


def historical(t, i, rows, paths, randoms):
    """Filtered historical simulation (Barone-Adesi, Giannopoulos and Vosper, Journal of Futures Markets 1999).

    Residuals of a decayed volatility, drawn anew and scaled by the volatility of now; along a path it follows the draws.
    """
    r, (first, last), origins = t.returns[i], t.ranges[i], t.origins[i]
    begun = (np.arange(len(r)) > 0).astype(float)
    squares, weight = data.decayed_sum(r**2, decay=LAMBDA), data.decayed_sum(begun, decay=LAMBDA)
    vol = np.sqrt(squares / np.maximum(weight, 1e-9)).clip(1e-9)  # known after each bar
    n = min(RESIDUALS, first - 12)  # the first dozen volatilities are too raw
    z = sliding_window_view(np.append(0.0, r[1:] / vol[:-1]), n)  # row k: bars k .. k + n - 1
    one = []
    for bars in np.split(np.arange(first, last), range(4096, last - first, 4096)):
        drawn = np.sort(vol[bars - 1, None] * z[bars - n], -1)
        p_up = ((drawn > 0).sum(-1) + 0.5) / ((drawn != 0).sum(-1) + 1)
        one.append(judge(drawn, np.full(drawn.shape, 1 / n), r[bars]) | dict(p_up=p_up))
    pick = randoms[i].integers(n, size=(len(origins), paths, t.horizon))
    variance, moves = np.repeat(vol[origins, None]**2, paths, 1), np.empty(pick.shape)
    for k in range(t.horizon):
        moves[:, :, k] = np.sqrt(variance) * np.take_along_axis(z[origins + 1 - n], pick[:, :, k], 1)
        variance = LAMBDA * variance + (1 - LAMBDA) * moves[:, :, k]**2
    return joined(one) | from_paths(moves, t, rows)


def logistic(t):
    """Logistic regression of the direction on the last bars' features, all symbols together, by Newton's method.

    With a ridge of 1, on at most about 300,000 bars; {} where there are under 1,000.
    """
    x = [data.features(bars)[0] for bars in t.series]
    known = [np.arange(data.CONTEXT, first)[r[data.CONTEXT:first] != 0] for r, (first, _) in zip(t.returns, t.ranges)]
    total = sum(map(len, known))
    if total < 1000:
        return {}
    thin = -(-total // 300_000)
    X = np.concatenate([lagged(x[i], rows[::thin]) for i, rows in enumerate(known)])  # (bars, 1 + 6 LAGS)
    up = np.concatenate([r[rows[::thin]] > 0 for r, rows in zip(t.returns, known)])
    w = np.zeros(X.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-X @ w))
        w += np.linalg.solve((X.T * (p * (1 - p))) @ X + np.eye(len(w)), X.T @ (up - p) - w)
    X = np.concatenate([lagged(x[i], np.arange(*span)) for i, span in enumerate(t.ranges)])
    return dict(p_up=1 / (1 + np.exp(-X @ w)))


def lagged(x, rows):
    """1 and the features x [T, 6] of the LAGS bars before each of the rows."""
    return np.concatenate([np.ones((len(rows), 1)), *(x[rows - k] for k in range(1, LAGS + 1))], axis=1)


# ---- HAR on ranges: the strongest of them

def har(t, paths):
    """Returns: the forecast volatility times residuals, of which a path draws those of return and range jointly.

    The range and the volume of the next bar by a HAR of their own, with residuals of their own.
    """
    volatility, random = t.volatility, np.random.default_rng([t.seed, 3])
    ranges = fit_har(t, [log_range(bars) for bars in t.series], np.sqrt)
    volumes = fit_har(t, [np.exp(log_volume(bars)) for bars in t.series], np.log)
    range_tables, volume_tables = residual_tables(t, ranges), volumes and residual_tables(t, volumes)

    def forecaster(t, i, rows):
        bars, now = t.series[i], slice(*t.ranges[i])
        z, _ = volatility.tables[i]
        scores = judge_residuals(z, t.returns[i][now], scale=volatility.sigma[i][now])
        scores |= named("range", judge_residuals(range_tables[i], log_range(bars)[now], scale=ranges[i].forecast[now]))
        if volumes:
            z, location = np.log(volume_tables[i]), np.log(volumes[i].forecast[now])
            scores |= named("volume", judge_residuals(z, log_volume(bars)[now], location))
        return scores | from_paths(volatility.paths(i, t.origins[i], paths, t.horizon, random), t, rows)

    return each_series(t, forecaster)


class Har:
    """Forecasts of a positive series u [T] of one symbol from its own past: heterogeneous autoregression.

    root(u) is regressed on the roots of the means of u over WINDOWS (after Corsi, Journal of Financial Econometrics
    2009): root is sqrt, or log with geometric means; u in units of its mean before the first target times the usual factor
    of its time of day.
    u is NaN where a bar has none. forecast [T]: of each bar, from the bars before it; ratio [T]: u over that; fitted: the
    known bars before the first target whose means are settled.
    """

    def __init__(self, bars, u, first, root):
        self.bars, self.root = bars, root
        known = np.isfinite(u)
        self.mean = max(u[:first].mean(where=known[:first]) if known[:first].any() else 1.0, 1e-9)
        u = np.where(known, u, self.mean)
        u = u if root is np.log else np.maximum(u, HAR_FLOOR * self.mean)
        self.factor = TimeOfDay(bars.time[:first], u[:first])
        self.unit = self.mean * self.factor(bars.time)
        self.u = u / self.unit
        rows = np.arange(min(WINDOWS[-1], first // 2), first)
        self.fitted = rows[known[rows]]
        if root is np.log:  # geometric means: the regression is one of logs on means of logs
            means = [np.exp(trailing_mean(np.log(self.u), n)) for n in WINDOWS]
        else:
            means = [trailing_mean(self.u, n) for n in WINDOWS]
        self.means = np.concatenate([np.ones((1, len(WINDOWS))), np.stack(means, 1)[:-1]])  # (T, 4): known before each bar

    def fit(self, weights):
        self.weights = weights
        forecast = self.predict(self.means.T)
        self.forecast, self.ratio = forecast * self.unit, self.u / forecast

    def predict(self, means):
        """u of the next bar, in its units, from its means over WINDOWS, a list of [...]."""
        total = self.weights[0]
        for weight, mean in zip(self.weights[1:], means):
            total = total + weight * self.root(mean)
        return np.exp(total) if self.root is np.log else np.maximum(total, HAR_FLOOR**0.5)**2

    def early(self, t):
        """Of the fitted bars those before the first target of any series: what all may learn from."""
        return self.fitted[self.bars.time[self.fitted] < t.time.min()]


def fit_har(t, values, root):
    """A Har of each series' values [T], with one regression for all of them; None if there is nothing to learn from."""
    hars = [Har(bars, u, first, root) for bars, u, (first, _) in zip(t.series, values, t.ranges)]
    if not any(len(har.early(t)) for har in hars):
        return None
    means = np.concatenate([har.means[har.early(t)] for har in hars])
    u = np.concatenate([har.u[har.early(t)] for har in hars])
    X = np.concatenate([np.ones((len(u), 1)), root(means)], axis=1)
    precision = np.ones(len(u)) if root is np.log else 1 / np.sqrt(means).mean(1)  # a root's error grows with the root
    weights = np.linalg.lstsq(X * precision[:, None], root(u) * precision, rcond=None)[0]
    for har in hars:
        har.fit(weights)
    return hars


def trailing_mean(u, n):
    """Mean of the last n values up to each, of fewer at the beginning: [T]."""
    total = np.cumsum(u)
    total[n:] -= total[:-n].copy()
    return total / np.minimum(np.arange(1, len(u) + 1), n)


def evenly(values, n):
    """n of the columns of values [rows, N], evenly chosen in the order of the first row: [rows, n]."""
    order = np.argsort(values[0], kind="stable")
    return values[:, order[((np.arange(n) + 0.5) / n * len(order)).astype(int)]]


def half_and_half(own, shared):
    """RESIDUALS residuals in order, half of them a series' own, half those of all: from columns [rows, N] of each."""
    own = evenly(own, RESIDUALS // 2) if own.shape[1] else own
    return evenly(np.concatenate([own, evenly(shared, RESIDUALS // 2)], axis=1), RESIDUALS)


def residual_tables(t, hars):
    """Of each Har the ratios of what came to the forecast, in order: [RESIDUALS]."""
    shared = evenly(np.concatenate([har.ratio[har.early(t)] for har in hars])[None], RESIDUALS)
    return [half_and_half(har.ratio[None, har.fitted], shared)[0] for har in hars]


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
        round_the_clock = len(np.unique(time // HOUR % 24)) >= 23
        levels = [(DAY, HOUR), (7 * DAY, HOUR)] if round_the_clock else [(DAY, int(step))]
        for period, width in levels:
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


class Volatility:
    """HAR on ranges of every series, and the residuals of their returns.

    hars: a Har of the range volatility each; sigma [T]: its forecast times the slow scale of |return| / forecast, known
    before each bar; tables [2, RESIDUALS]: return / sigma in order, and by how much the range of the same bar was off.
    """

    def __init__(self, t):
        self.hars = fit_har(t, [range_volatility(bars) for bars in t.series], np.sqrt)
        size = [np.abs(r) / har.forecast for r, har in zip(t.returns, self.hars)]
        common = np.concatenate([s[har.early(t)] for s, har in zip(size, self.hars)]).mean()
        self.scale = [slow_scale(s, har.fitted, common) for s, har in zip(size, self.hars)]  # [T + 1] each
        self.sigma = [har.forecast * scale[:-1] for har, scale in zip(self.hars, self.scale)]
        pairs = [np.stack([r / sigma, har.ratio]) for r, sigma, har in zip(t.returns, self.sigma, self.hars)]
        shared = evenly(np.concatenate([p[:, har.early(t)] for p, har in zip(pairs, self.hars)], axis=1), RESIDUALS)
        self.tables = [half_and_half(p[:, har.fitted], shared) for p, har in zip(pairs, self.hars)]

    def paths(self, i, origins, paths, horizon, random):
        """Log returns of the bars after each origin of series i: [n, paths, horizon]."""
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
        return moves


def range_volatility(bars):
    """Of each bar sqrt(Parkinson variance + gap^2), in log price [T] (Parkinson, Journal of Business 1980)."""
    open_, close = bars.ohlcva[:, 0], bars.ohlcva[:, 3]
    gap = np.log(open_ / np.append(open_[0], close[:-1]))
    return np.sqrt(log_range(bars)**2 / (4 * math.log(2)) + gap**2)


def slow_scale(size, fitted, common):
    """Decayed mean of sizes before each bar and after the last, [T + 1], from their mean over the fitted bars on.

    common: the mean of all symbols, which counts as 30 bars more.
    """
    usual = (size[fitted].sum() + 30 * common) / (len(fitted) + 30)
    seen = np.arange(len(size)) >= fitted[0]
    decay = 0.5 ** (1 / LEVEL)
    total = data.decayed_sum(np.minimum(size, 6 * usual) * seen, decay=decay)  # one wild bar is not a new level
    weight = data.decayed_sum(seen.astype(float), decay=decay)
    return np.append(usual, (total + LEVEL / 2 * usual) / (weight + LEVEL / 2))


# ----------------------------------------------------------------------------------------------------------------------
# Scores, and how sure they are

def block_sums(f, t):
    """Of each score that forecaster f has: (sums over each block [n_blocks, ...], the score as a function of such sums).

    So the bootstrap only adds up blocks anew. t: Targets.
    """
    out = {}
    if "p_up" in f:
        out |= direction_sums(f["p_up"], t)
    signal = f.get("mean", f.get("p_up"))
    if signal is not None:
        x, y = signal - signal.mean(), t.r - t.r.mean()
        out["ic"] = sums_of([np.ones(len(x)), x, y, x * x, y * y, x * y], t.block, t.n_blocks), correlation
        out["rank_ic"] = stamp_sums(*rank_ic(signal, t.r, t.stamp), t), ratio
    if "point" in f:
        out["mae"] = mean_of(100 * np.abs(t.r - f["point"]), t)
        out["rmse"] = mean_of(1e4 * (t.r - f["mean"])**2, t)[0], root_ratio
        out["mape"] = mean_of(100 * np.abs(np.expm1(f["point"] - t.r)), t)
        out["crps"] = mean_of(100 * f["crps"], t)
    if "pit" in f:
        for q in (50, 80, 90):
            out[f"coverage{q}"] = mean_of(np.abs(f["pit"] - 0.5) <= q / 200, t)
    for name, scale in (("range", 100), ("volume", 1)):
        known = np.isfinite(f.get(f"{name}_crps", np.nan))
        if known.any():
            out[f"{name}_crps"] = mean_of(scale * f[f"{name}_crps"], t, known)
        if known.any() and f"{name}_pit" in f:
            out[f"{name}_coverage90"] = mean_of(np.abs(f[f"{name}_pit"] - 0.5) <= 0.45, t, known)
    if len(f.get("path_point", ())):
        out |= path_sums(f, t)
    return out


def direction_sums(p_up, t):
    """block_sums of P(up), over the bars that moved."""
    moved = t.r != 0
    p, up, block, n = p_up[moved], t.r[moved] > 0, t.block[moved], t.n_blocks
    one = np.ones(len(p))
    hit = 0.5 + 0.5 * np.sign(p - 0.5) * np.where(up, 1, -1)
    with np.errstate(divide="ignore"):  # always_up: infinite
        logloss = -np.log(np.where(up, p, 1 - p))
    tenth = np.minimum(p * 10, 9).astype(int)
    return dict(da=(sums_of([hit, one], block, n), ratio),
                balanced_accuracy=(sums_of([hit * up, up, hit * ~up, ~up], block, n), balanced),
                auc=(by_bin(ordered_bins(p), block, n, up, ~up), area),
                logloss=(sums_of([logloss, one], block, n), ratio),
                up_share=(sums_of([p > 0.5, one], block, n), ratio),
                ece=(by_bin(tenth, block, n, p - up, one), calibration))


def path_sums(f, t):
    """block_sums of paths: lists over the steps; realized volatility and losses over the whole horizon."""
    values = dict(path_mape=100 * np.abs(np.expm1(f["path_point"] - t.path_r)), path_crps=100 * f["path_crps"])
    if "path_pit" in f:
        values["path_coverage90"] = within(f["path_pit"], f.get("path_width", 0.0), 0.05, 0.95)
    if "path_rv_crps" in f:
        values["path_rv_crps"] = 100 * f["path_rv_crps"]
    out = {name: mean_of_origins(value, t) for name, value in values.items()}
    if "path_es95" not in f:
        return out
    hit = within(f["path_pit"][:, -1], f["path_width"][:, -1], 0.0, 0.05)  # the loss was beyond VaR 95 %
    loss, said = -np.expm1(t.path_r[:, -1]), f["path_extreme"]
    flagged = said > WARN
    came = np.abs(t.path_r[:, -1]) > extreme_move(t.usual, t.horizon)
    out["var95_hits"] = mean_of_origins(hit, t)
    out["es95_ratio"] = mean_of_origins(loss * hit, t, 0.05 * f["path_es95"])  # Acerbi and Szekely, Risk 2014: 1 if right
    out["extreme_flagged"] = mean_of_origins(flagged, t)
    if flagged.any():
        out["extreme_said"] = mean_of_origins(np.where(flagged, said, 0), t, flagged)
        out["extreme_came"] = mean_of_origins(flagged * came, t, flagged)
    return out


def sums_of(columns, block, n_blocks):
    """Sums over each block of columns [N] each: [n_blocks, columns]."""
    return np.stack([np.bincount(block, column, n_blocks) for column in columns], -1)


def mean_of(values, t, known=True):
    """Sums and score of a mean over the bars that are known."""
    known = np.broadcast_to(known, len(values))
    return sums_of([np.where(known, values, 0), known], t.block, t.n_blocks), ratio


def mean_of_origins(values, t, weight=1.0):
    """Sums and score of sum(values) / sum(weight) over origins: values [n] or [n, H]."""
    pairs = np.stack(np.broadcast_arrays(values, weight), -1)
    sums = np.zeros((t.n_path_blocks, *pairs.shape[1:]))
    np.add.at(sums, t.path_block, pairs)
    return sums, ratio


def ratio(s):
    """A mean, from sums s [..., 2] of the values and of how many there are."""
    return s[..., 0] / s[..., 1]


def root_ratio(s):
    return np.sqrt(ratio(s))


def balanced(s):
    """From sums [..., 4]: hits among ups, ups, hits among downs, downs."""
    return (ratio(s[..., :2]) + ratio(s[..., 2:])) / 2


def calibration(s):
    """Expected calibration error from s [..., 2, bins]: sums of p - up, and counts."""
    return np.abs(s[..., 0, :]).sum(-1) / s[..., 1, :].sum(-1)


def area(s):
    """Area under the ROC curve from s [..., 2, bins], ups and downs: P(p of an up > p of a down) + P(equal) / 2."""
    below = s[..., 1, :].cumsum(-1) - s[..., 1, :] / 2
    return (s[..., 0, :] * below).sum(-1) / (s[..., 0, :].sum(-1) * s[..., 1, :].sum(-1))


def correlation(s):
    """Pearson's, from sums s [..., 6] of 1, x, y, x^2, y^2, x y."""
    n, x, y, xx, yy, xy = np.moveaxis(s, -1, 0)
    return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def within(pit, width, low, high):
    """How much of [pit - width / 2, pit + width / 2] lies in [low, high]: a number from 0 to 1."""
    if not np.any(width):
        return ((pit >= low) & (pit <= high)).astype(float)
    inner = np.minimum(pit + width / 2, high) - np.maximum(pit - width / 2, low)
    return (inner / width).clip(0, 1)


def stamp_sums(v, known, t):
    """Sums over each block of v [stamps] where it is known, and how many are: [n_blocks, 2]."""
    block = np.zeros(len(v), int)
    block[t.stamp] = t.block
    return sums_of([v * known, known], block, t.n_blocks)


def by_bin(bins, block, n_blocks, *columns):
    """Sums over each block and bin: [n_blocks, len(columns), bins]."""
    n = bins.max(initial=0) + 1
    return np.stack([np.bincount(block * n + bins, c, n_blocks * n).reshape(n_blocks, n) for c in columns], 1)


def ordered_bins(p, most=2048):
    """The rank of each p among the distinct ones; neighbours share a bin where there are more than `most`."""
    value, rank, count = np.unique(p, return_inverse=True, return_counts=True)
    return rank if len(value) <= most else (np.cumsum(count) - 1)[rank] * most // len(p)


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
            drawn = score(np.tensordot(t.path_weights if of_paths(name) else t.weights, s, 1))
            finite = np.isfinite(drawn)
            if name.startswith(RARE) and (s[:, 0] != 0).sum() < MIN_CASES:
                drawn, finite = np.full_like(drawn, np.nan), np.zeros_like(finite)
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


def versus(a, b, n_blocks, as_ratio):
    """The difference or ratio of two (value, replicates), with its interval."""
    with np.errstate(all="ignore"):
        return scored(*((x / y if as_ratio else x - y) for x, y in zip(a, b)), n_blocks)


def paired(name_a, a, name_b, b, t, only=METRICS):
    """Differences a - b of every score that both have, and ratios a / b of RATIOS, replicate by replicate."""
    rows = []
    for metric in only:
        if metric not in a or metric not in b:
            continue
        n = t.blocks_of(metric)
        difference = versus(a[metric], b[metric], n, as_ratio=False)
        quotient = versus(a[metric], b[metric], n, as_ratio=True) if metric in RATIOS else None
        rows.append(dict(a=name_a, b=name_b, metric=metric, difference=difference, ratio=quotient))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The backtest

AGAINST_RIVALS = ("da", "logloss", *RATIOS[:4], "path_crps", "path_rv_crps")  # scores paired with every opponent
BY = ("da", "auc", "mae", "crps", "coverage90")  # scores by groups


def backtest(checkpoints, bars, split="test", start=None, end=None, horizon=10, paths=100, stride=None, seed=0):
    """Score checkpoints on bars that have happened, beside baselines, with 95 % intervals over blocks of time.

    checkpoints: paths, or (model, tokenizer, meta) as load_checkpoint gives.  bars: list of Bars.  split: "test" or "val"
    by the checkpoints' borders, unless start (first date of the targets) names them; end: the first date after them.
    Targets before a checkpoint's test start need start, and the result's split is then "in-sample".  Paths of `horizon`
    bars start every `stride` bars (default: 1,000 of them, ten a symbol at least, and at least the horizon apart).

    Returns split, start, end (of the targets), blocks; checkpoints, dicts of ckpt, the scores of METRICS, tokens;
    baselines, {name: scores}; paired, dicts of a, b, metric, difference, ratio. A score is {value, lo, hi} or None;
    path_mape and path_crps are lists, one for each bar ahead; errors in log return x 100, of volume in its log, mape in %.
    Raises UserError where there is no target, a date is none, or --start is missing.
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
    loaded = []
    for i, checkpoint in enumerate(checkpoints):
        if isinstance(checkpoint, (str, os.PathLike)):
            loaded.append((str(checkpoint), *load_checkpoint(checkpoint, data.pick_device(device))))
        else:
            loaded.append((f"checkpoint {i + 1}", *checkpoint))
    split, lo, hi = span_of([meta for *_, meta in loaded], split, start, end)
    t = Targets([series] if isinstance(series, data.Bars) else series, lo, hi, horizon, stride, seed)
    warn_of_few_blocks(t)

    forecasts, use = {}, {}
    for name, model, tokenizer, _ in loaded:
        forecasts[name] = next_bars(model, tokenizer, t) | simulated(model, tokenizer, t, paths)
        if parallel:
            forecasts[f"{name} parallel"] = simulated(model, tokenizer, t, paths, parallel=True)
        use[name] = token_use(tokenizer, t)
    rivals = baselines(t, paths)

    drawn, rows, trades = {}, {}, {}
    for name, f in (forecasts | rivals).items():
        drawn[name] = bootstrap(block_sums(f, t), t)
        rows[name] = {m: scored(*drawn[name][m], t.blocks_of(m)) if m in drawn[name] else None for m in METRICS}
        if "p_up" in f and name != "always_up":
            trades[name] = {m: scored(*v, t.n_blocks) for m, v in bootstrap(trading(f, t, cost_bps), t).items()}
    pairs = []
    for a, b in itertools.combinations(forecasts, 2):
        pairs += paired(a, drawn[a], b, drawn[b], t)
    for a, b in itertools.product(forecasts, rivals):
        pairs += paired(a, drawn[a], b, drawn[b], t, AGAINST_RIVALS)

    result = dict(split=split, start=data.iso(t.time.min()), end=data.iso(t.time.max()), blocks=t.n_blocks,
                  checkpoints=[dict(ckpt=name, **rows[name], tokens=use.get(name)) for name in forecasts],
                  baselines={name: rows[name] for name in rivals}, paired=pairs, trading=trades)
    if by:
        result["by"] = [dict(group=group, ckpt=name, bars=int(mask.sum()), **grouped(forecasts[name], t, mask))
                        for group, mask in groups_of(t, by) for name, *_ in loaded]
    if len(loaded) >= 3:
        result["correlations"] = token_correlations(list(use.values()), [drawn[name]["da"] for name in use], t)
    return result


def warn_of_few_blocks(t):
    """Say which scores have no interval, and what it takes."""
    for what, horizon, n in (("the next bar", 1, t.n_blocks), (f"{t.horizon} bars ahead", t.horizon, t.blocks_of("path"))):
        if n >= MIN_BLOCKS:
            continue
        more = t.missing(horizon)
        remedy = f"{more:,} bars more of targets would do" if more else "lower --stride, or give more bars"
        print(f"warning: no intervals for scores of {what}: {n} blocks of time, {MIN_BLOCKS} are the least; {remedy}",
              file=sys.stderr)


def groups_of(t, by):
    """(name, mask over the targets) of each group; volatility: thirds of the bars by HAR's forecast over s_t."""
    if by == "symbol":
        return [(bars.symbol, t.symbol == i) for i, bars in enumerate(t.series)]
    if by == "quarter":
        month = t.time.astype("datetime64[s]").astype("datetime64[M]").astype(int)
        return [(f"{1970 + q // 4}-Q{q % 4 + 1}", month // 3 == q) for q in np.unique(month // 3)]
    rising = t.flat(t.volatility.sigma) / t.s  # known before the bar: how volatility is to change
    third = np.searchsorted(np.quantile(rising, (1 / 3, 2 / 3)), rising)
    return [(name, third == k) for k, name in enumerate(("falling", "steady", "rising"))]


def grouped(f, t, mask):
    """Scores of the next bar over some of the targets, bool [N]."""
    part = copy.copy(t)
    part.r, part.stamp, part.block = t.r[mask], t.stamp[mask], t.block[mask]
    sums = block_sums({key: v[mask] for key, v in f.items() if not of_paths(key)}, part)
    drawn = bootstrap({m: sums[m] for m in BY if m in sums}, t)
    return {m: scored(*v, len(np.unique(part.block))) for m, v in drawn.items()}


def token_use(tokenizer, t):
    """How much of the codebooks the targets use."""
    tokens = t.flat(t.tokens(tokenizer)).astype(np.int64)
    use, _ = code_use(tokenizer, *torch.from_numpy(tokens.T))
    return use | dict(pairs=int(use["pairs"]))


def token_correlations(tokens, accuracies, t):
    """Correlation, over checkpoints, of each number of token_use with direction accuracy.

    The intervals are those of the accuracies: they speak of these checkpoints, not of others.
    """
    value = np.array([v for v, _ in accuracies])          # (checkpoints,)
    drawn = np.stack([d for _, d in accuracies], -1)      # (replicates, checkpoints)
    out = {}
    with np.errstate(all="ignore"):
        for key in tokens[0]:
            x = np.array([float(use[key]) for use in tokens])
            linear = pearson(x, value), pearson(x, drawn)
            ranked = pearson(places(x), places(value)), pearson(places(x), places(drawn))
            out[key] = dict(pearson=scored(*linear, t.n_blocks), spearman=scored(*ranked, t.n_blocks))
    return out


def pearson(x, y):
    """Correlation of x [n] with each row of y [..., n]."""
    x = x - x[0]  # all alike: exactly 0, so that no rounding correlates
    x, y = x - x.mean(), y - y.mean(-1, keepdims=True)
    return (x * y).sum(-1) / np.sqrt((x * x).sum() * (y * y).sum(-1))


def places(v):
    """How many of a row are below each, equal ones counted half: [..., n]."""
    return ((v[..., None] > v[..., None, :]) + 0.5 * (v[..., None] == v[..., None, :])).sum(-1)


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
    """(value, replicates) of a score; of a list over steps that at `step` (-1: the last), its mean if that is None."""
    value, replicates = drawn[metric]
    if np.ndim(value) == 0:
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
        if metric in b and metric in RATIOS:
            line += "   x " + show(against(a, b, metric, t, step), 1, 4)
        elif metric in b:
            line += "     " + show(against(a, b, metric, t, step), scale, digits, "+")
        print(line)


def show(score, scale, digits, sign=""):
    """A score with its interval, as text."""
    if score is None:
        return "."
    value, lo, hi = (None if score[k] is None else f"{score[k] * scale:{sign}.{digits}f}" for k in ("value", "lo", "hi"))
    return value if lo is None else f"{value} [{lo}, {hi}]"


# ----------------------------------------------------------------------------------------------------------------------
# The table

SHOWN = (("da", "right calls %", 100, 2), ("balanced_accuracy", "balanced %", 100, 2), ("auc", "AUC", 1, 4),
         ("logloss", "log loss", 1, 4), ("ece", "ECE %", 100, 2), ("ic", "IC", 1, 4), ("rank_ic", "rank IC", 1, 4),
         ("mae", "MAE", 1, 4), ("rmse", "RMSE", 1, 4), ("mape", "MAPE %", 1, 4), ("crps", "CRPS", 1, 4),
         ("coverage50", "in 50 % band", 100, 2), ("coverage80", "in 80 % band", 100, 2),
         ("coverage90", "in 90 % band", 100, 2), ("range_crps", "range CRPS", 1, 4),
         ("range_coverage90", "  in 90 %", 100, 2), ("volume_crps", "volume CRPS", 1, 4),
         ("volume_coverage90", "  in 90 %", 100, 2))  # score, label, factor, digits
RISK = (("path_rv_crps", "volat. CRPS", 1, 4), ("var95_hits", "beyond VaR %", 100, 2),
        ("es95_ratio", "loss to ES", 1, 3), ("extreme_flagged", "! raised %", 100, 2),
        ("extreme_said", "  chance, %", 100, 1), ("extreme_came", "  came true %", 100, 1),
        ("long_short", "top-bottom bps", 1, 2), ("turnover", "turnover", 1, 2))
HEADS = dict(persistence="persist", always_up="up", ar1="ar1", logistic="logit", gaussian20="gauss", fhs="fhs", har="har")
HIGHER = ("da",)  # scores of AGAINST_RIVALS of which more is better


def print_backtest(result, horizon, cost_bps):
    """Scores as rows, forecasters as columns of 8; under each value half its interval. Then pairs, groups."""
    columns = {entry["ckpt"]: entry for entry in result["checkpoints"]} | result["baselines"]
    heads = [os.path.basename(entry["ckpt"]).removesuffix(".pt")[-7:] for entry in result["checkpoints"]]
    print(f"{result['split']}: targets {result['start']} to {result['end']}, {result['blocks']} blocks of time")
    print("± half the 95 % interval; MAE, RMSE, CRPS in log return x 100, of volume in its")
    print(f"log; ! more than {WARN:.0%} chance of an extreme move; costs of {cost_bps:g} bps")
    print(" " * 14 + "".join(f"{head:>8}" for head in (*heads, *HEADS.values())))
    for metric, label, scale, digits in SHOWN:
        print_row(label, [entry[metric] for entry in columns.values()], scale, digits)
    for metric, label in (("path_mape", "MAPE %"), ("path_crps", "CRPS")):
        for k in sorted({(horizon + 1) // 2, horizon}):
            print_row(f"{label}, bar {k}", [entry[metric] and entry[metric][k - 1] for entry in columns.values()], 1, 4)
    for metric, label, scale, digits in RISK:
        scores = [entry.get(metric) or result["trading"].get(name, {}).get(metric) for name, entry in columns.items()]
        print_row(label, scores, scale, digits)
    print_pairs(result)
    for row in result.get("by", ()):
        whose = f"  {os.path.basename(row['ckpt'])}" if len(result["checkpoints"]) > 1 else ""
        scores = "  ".join(f"{m} {show(row[m], 1, 4)}" for m in BY if m != "auc" and row.get(m))
        print(f"{row['group']:10} {row['bars']:>8,} bars{whose}  {scores}")
    for key, row in result.get("correlations", {}).items():
        kinds = ", ".join(f"{kind} {show(s, 1, 2)}" for kind, s in row.items())
        print(f"correlation of {key} with right calls: {kinds}")


def print_row(label, scores, scale, digits):
    """A score of each column, 8 wide, and half the intervals below."""
    values, halves = "", ""
    for s in scores:
        value = f"{s['value'] * scale:.{digits}f}" if s else "."
        half = f"±{(s['hi'] - s['lo']) / 2 * scale:.{digits}f}" if s and s["lo"] is not None else ""
        values, halves = values + f"{value:>8}", halves + f"{half:>8}"
    print(f"{label:14}{values}")
    if halves.strip():
        print(" " * 14 + halves)


def print_pairs(result):
    """Each checkpoint beside its best opponent of every score, and beside the other checkpoints."""
    own = [entry["ckpt"] for entry in result["checkpoints"]]
    print("\npaired, the same blocks drawn for both: the best opponent of each score"
          + ", and other checkpoints" * (len(own) > 1))
    for pair in result["paired"]:
        metric = pair["metric"]
        if pair["b"] not in own and pair["b"] != best_rival(result["baselines"], metric):
            continue
        score = pair["ratio"] or pair["difference"]
        if isinstance(score, list):
            score, metric = score[-1], f"{metric} at bar {len(score)}"
        if score:
            what = "ratio" if pair["ratio"] else "difference"
            names = f"{os.path.basename(pair['a'])} to {os.path.basename(pair['b'])}"
            print(f"{metric:20} {what:10} {show(score, 1, 4):26} {names}")


def best_rival(baselines, metric):
    """The name of the baseline with the best score; of lists over steps, the last."""
    found = {}
    for name, scores in baselines.items():
        score = scores[metric]
        score = score[-1] if isinstance(score, list) else score
        if score:
            found[name] = score["value"]
    if not found:
        return None
    return max(found, key=found.get) if metric in HIGHER else min(found, key=found.get)


# ----------------------------------------------------------------------------------------------------------------------
# The run

def check(config):
    if not config.ckpt:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if not math.isfinite(config.cost_bps):
        raise UserError(f"--cost_bps {config.cost_bps}: must be a number such as 5")


def main(argv=None):
    config = Config(**data.cli(Config, __doc__, argv))
    check(config)
    series = load_series(config.data, load_checkpoint(config.ckpt[0])[2], config.symbols)
    result = evaluate(config.ckpt, series, config.split, config.start, config.end, config.horizon, config.paths,
                      config.stride, config.seed, config.parallel, config.by, config.cost_bps, config.device)
    if config.json:
        kept = {key: value for key, value in result.items() if key in KEYS or key == "by"}
        print(json.dumps(jsonable(kept)))
    else:
        print_backtest(result, config.horizon, config.cost_bps)


if __name__ == "__main__":
    data.run(main)
