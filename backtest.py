"""What forecasts are worth: the scores of checkpoints on bars that have happened, beside cheap opponents.

    python backtest.py --ckpt out.pt                                       # the test bars of the data it was trained on
    python backtest.py --ckpt a.pt b.pt --data other.csv --json            # several checkpoints, paired
    python backtest.py --ckpt out.pt --start 2018-07-01 --by volatility --cost_bps 5

The way from bars to intervals, in `backtest`: the bars to forecast (`Targets`); forecasters, the model (`next_bars`,
`simulated`) and its opponents (`baselines`); sums of each score over blocks of time (`block_sums`); scores of blocks
drawn anew (`bootstrap`); intervals (`scored`).

A forecaster is a dict of arrays over the N targets: p_up (given that the bar moves), mean and point (expected and
median log return), crps, pit (the share of its distribution below what came); of range and volume range_crps and so on.
Over the n origins of paths of H bars: path_point, path_crps, path_pit [n, H] of the log return since the origin,
path_rv_crps [n] of the realized volatility, and what the paths say of losses. What it does not say has no score.
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
from data import DAY, HOUR, WEEK, UserError, future_times
from model import SEEN_DATES, load_checkpoint, norm
from sample import (
    WARN, Origin, base_weights, by_close, chance_extreme, jsonable, load_series, simulate, unmoved_share,
    usual_sigma, warn_of_intervals)
from tokenizer import code_use


@dataclass
class Config:
    ckpt: list[str] | None = None      # one or more checkpoints; none: the weights that come along, assets/base.pt
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
           "coverage50", "coverage80", "coverage90", "range_crps", "range_coverage90", "volume_crps",
           "volume_coverage90", "path_mape", "path_crps", "path_rv_crps", "var95_hits", "es95_ratio",
           "extreme_flagged", "extreme_said", "extreme_came")
RATIOS = ("mae", "crps", "range_crps", "volume_crps", "path_mape", "path_crps", "path_rv_crps")  # compared as ratios
RIVALRY = dict(da="right calls %", logloss="log loss", mae="close MAE", crps="close CRPS", range_crps="range CRPS",
               volume_crps="volume CRPS", path_crps="paths CRPS", path_rv_crps="paths volatility")  # with opponents
BY = ("da", "auc", "mae", "crps", "coverage90")  # scores by groups
RARE = ("var95", "es95", "extreme")              # scores that count rare cases begin so

REPLICATES = 2000                 # of the bootstrap
MIN_BLOCKS, MAX_BLOCKS = 20, 500  # of time: with fewer no interval; with more they are merged
MIN_CASES = 5                     # blocks with a rare case; with fewer no interval
ORIGINS = 1000                    # of paths, in all, by default; but at least ten a symbol
NORMAL = statistics.NormalDist()


# ----------------------------------------------------------------------------------------------------------------------
# The backtest

def backtest(checkpoints, bars, split="test", start=None, end=None, horizon=10, paths=100, stride=None, seed=0,
             parallel=False, by=None, cost_bps=0.0, device="cpu"):
    """Score checkpoints on bars that have happened, beside baselines, with 95 % intervals over blocks of time.

    checkpoints: paths, or (model, tokenizer, meta) as load_checkpoint gives. bars: list of Bars. The rest as in Config.
    Returns a dict of
        split ("in-sample" for targets before a checkpoint's test, which need start; "test, overlap" where the weights
        that it was tuned from may have seen them), start, end, blocks
        checkpoints: dicts of ckpt, the scores of METRICS, tokens; baselines: {name: scores of METRICS}
        paired: dicts of a, b, metric, difference, ratio; by: dicts of group, ckpt, bars, the scores of BY
        scores: {name: all scores}; drawn: {name: what bootstrap gives}; targets
    A score is {value, lo, hi} or None, for path_mape and path_crps a list of them, one for each bar ahead. They are in
    log return x 100, of volume in its log, mape in %. UserError without a target, for bad dates or no start.
    """
    check(horizon, stride, paths, by)
    loaded = {}
    for i, checkpoint in enumerate(checkpoints, 1):
        if isinstance(checkpoint, (str, os.PathLike)):
            loaded[str(checkpoint)] = load_checkpoint(checkpoint, data.pick_device(device))
        else:
            loaded[f"checkpoint {i}"] = checkpoint
    split, lo, hi = span_of([meta for *_, meta in loaded.values()], split, start, end)
    t = Targets([bars] if isinstance(bars, data.Bars) else bars, lo, hi, horizon, stride, seed)
    warn(t, loaded)

    forecasts, use = {}, {}
    for name, (model, tokenizer, _) in loaded.items():
        forecasts[name] = next_bars(model, tokenizer, t) | simulated(model, tokenizer, t, paths)
        if parallel:
            forecasts[f"{name} parallel"] = simulated(model, tokenizer, t, paths, parallel=True)
        tokens = torch.from_numpy(t.flat(t.tokens(tokenizer)).astype(np.int64))  # (N, 2)
        use[name], _ = code_use(tokenizer, *tokens.T)
        use[name]["pairs"] = int(use[name]["pairs"])
    rivals = baselines(t, paths)

    drawn, scores, rows = {}, {}, {}
    for name, f in (forecasts | rivals).items():
        sums = block_sums(f, t)
        if "p_up" in f and name != "always_up":
            sums |= trading_sums(f["p_up"], t, cost_bps)
        drawn[name] = bootstrap(sums, t)
        scores[name] = {metric: scored(*found, t.blocks_of(metric)) for metric, found in drawn[name].items()}
        rows[name] = {metric: scores[name].get(metric) for metric in METRICS}
    pairs = []
    for a, b in itertools.combinations(forecasts, 2):
        pairs += paired(a, b, drawn, t, METRICS)
    for a, b in itertools.product(forecasts, rivals):
        pairs += paired(a, b, drawn, t, RIVALRY)
    groups = []
    for (group, mask), name in itertools.product(groups_of(t, by), loaded):
        groups.append(dict(group=group, ckpt=name, bars=int(mask.sum()), **grouped(forecasts[name], t, mask)))
    return dict(split=split, start=data.iso(t.time.min()), end=data.iso(t.time.max()), blocks=t.n_blocks,
                checkpoints=[dict(ckpt=name, **rows[name], tokens=use.get(name)) for name in forecasts],
                baselines={name: rows[name] for name in rivals}, paired=pairs, by=groups, scores=scores, drawn=drawn,
                targets=t)


# ----------------------------------------------------------------------------------------------------------------------
# Targets

class Targets:
    """The N bars to forecast, symbol by symbol; the n origins of paths of H bars; the blocks of time, of all symbols.

    For the next bar a block has n^(1/3) of a symbol's n target bars (Hall, Horowitz and Jing, Biometrika 1995): whole
    dates of daily bars, within the day 32 bars where there are enough of them. For paths it has the horizon at least.
    """

    def __init__(self, series, lo, hi, horizon, stride, seed):
        spans = [(bars, data.targets_of(bars, "val", (lo, hi))) for bars in series]  # "val": between two borders
        spans = [(bars, span) for bars, span in spans if span[0] < span[1]]
        if not spans:
            raise UserError(f"no bar to forecast from {data.iso(lo)} on: give other --data or --start "
                            f"(the first {data.CONTEXT} bars are context)")
        self.series, self.ranges = zip(*spans)  # of each symbol its Bars, and [first, last) of its targets
        self.horizon, self.seed, self.tokenized = horizon, seed, {}
        lengths = [last - first for first, last in self.ranges]
        longest = max(lengths)

        # the bars: returns are of all bars of a symbol, the others of the targets, [N]
        self.returns = [np.diff(np.log(bars.ohlcva[:, 3]), prepend=np.log(bars.ohlcva[0, 3])) for bars in self.series]
        self.r = self.flat(self.returns)                                # log returns
        self.range = self.flat(map(log_range, self.series))
        self.volume = self.flat(map(log_volume, self.series))
        self.s = self.flat(map(data.scales, self.series))               # the scale s_t, known before the bar
        self.time = self.flat([bars.time for bars in self.series])
        self.stamp = np.unique(self.time, return_inverse=True)[1]       # which of the distinct times
        self.symbol = np.repeat(np.arange(len(self.series)), lengths)

        # the paths: every stride-th bar is an origin, from an offset of the symbol's own, to spread the dates
        self.stride = stride or max(horizon, (longest - horizon + 1) // max(10, ORIGINS // len(self.series)))
        self.origins, self.path_rows = [], []  # of each symbol: bars after which paths begin; which of the n these are
        moves, begins, usual = [], [], []
        for bars, r, (first, last) in zip(self.series, self.returns, self.ranges):
            n = last - first - horizon + 1
            offset = zlib.crc32(bars.symbol.encode()) % max(1, min(self.stride, n))
            origins = first - 1 + np.arange(offset, n, self.stride)
            self.path_rows.append(slice(len(usual), len(usual) + len(origins)))
            self.origins.append(origins)
            moves.append(r[origins[:, None] + np.arange(1, horizon + 1)])
            begins.append(bars.time[origins + 1])
            usual += [usual_sigma(bars.ohlcva[:o + 1, 3]) for o in origins]
        moves = np.concatenate(moves)               # (n, H)
        self.path_r = moves.cumsum(1)               # (n, H): log returns since the origin
        self.path_rv = np.sqrt((moves**2).sum(1))   # (n,): realized volatility
        self.usual = np.array(usual)                # (n,): long-run volatility before the origin

        # the blocks: of each bar and each path, and how often each replicate draws each block
        daily = max(np.median(np.diff(bars.time)) for bars in self.series) >= DAY
        unit, least = (DAY, 1) if daily else (1, min(data.HALF_LIFE, longest // MIN_BLOCKS))
        length = max(int(longest ** (1 / 3) + 1e-9), least)  # of a block, in bars
        self.n_blocks = min(longest // length, MAX_BLOCKS)
        self.n_path_blocks = max(1, min(longest // max(length, horizon), MAX_BLOCKS))
        units = np.unique(self.time // unit)
        self.block = np.searchsorted(units, self.time // unit) * self.n_blocks // len(units)
        begins = np.concatenate(begins)
        self.path_block = np.searchsorted(units, begins // unit) * self.n_path_blocks // len(units)
        random = np.random.default_rng([seed, 1])
        self.weights = resampled(self.n_blocks, random)
        self.path_weights = resampled(self.n_path_blocks, random)

    def flat(self, values):
        """Of arrays over each symbol's bars, those of the targets: [N]."""
        return np.concatenate([v[first:last] for v, (first, last) in zip(values, self.ranges)])

    def blocks_of(self, metric):
        """How many blocks of time hold what a score is made of."""
        return len(np.unique(self.path_block)) if of_paths(metric) else self.n_blocks

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
        return fit_volatility(self)


def of_paths(metric):
    return metric.startswith(("path", *RARE))


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


# ----------------------------------------------------------------------------------------------------------------------
# Distributions, and their scores for what happened

def judge(r, p, y):
    """Scores of distributions for what happened, y [...]: values r [..., K] in order, p [..., K] their probabilities.

    CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, JASA 2007), the last as the integral of F (1 - F).
    """
    F, y = p.cumsum(-1), y[..., None]
    middle = np.stack([(F < 0.5 - 1e-9).sum(-1), (F < 0.5 + 1e-9).sum(-1)], -1)  # two places where F is 1/2, else one
    median = np.take_along_axis(r, middle, -1).mean(-1)
    below = (p * ((r < y) + 0.5 * (r == y))).sum(-1)
    return dict(mean=(p * r).sum(-1), point=median, pit=below, crps=(p * np.abs(r - y)).sum(-1) - spread(r, F))


def spread(r, F):
    """E|X - X'| / 2 of values r [..., K] in order, F [..., K] their cumulative probabilities."""
    return (F[..., :-1] * (1 - F[..., :-1]) * np.diff(r)).sum(-1)


def judge_draws(r, y):
    """judge for K draws r [..., K], in any order, of which the first K // 2 are independent of the others.

    E|X - X'| counts pairs across the halves alone: unbiased, as Ferro's fair form (QJRMS 2014) for independent draws.
    """
    K, half, ordered = r.shape[-1], r.shape[-1] // 2, np.sort(r, -1)
    scores = judge(ordered, np.full(r.shape, 1 / K), y)
    if K == 1:
        return scores
    every = spread(ordered, np.arange(1, K + 1) / K)
    first = spread(np.sort(r[..., :half], -1), np.arange(1, half + 1) / half)
    second = spread(np.sort(r[..., half:], -1), np.arange(1, K - half + 1) / (K - half))
    a = half / K  # every = a^2 first + (1 - a)^2 second + 2 a (1 - a) across
    across = (every - a**2 * first - (1 - a)**2 * second) / (2 * a * (1 - a))
    return scores | dict(crps=scores["crps"] + every - across)


def judge_residuals(z, y, scale, location=0.0):
    """judge for location + scale * z: residuals z [K] or [N, K] of equal weight; y, scale, location [N]."""
    z = np.broadcast_to(z, (len(y), z.shape[-1]))
    scale, location = np.broadcast_to(scale, len(y)), np.broadcast_to(location, len(y))
    parts = []
    for rows in np.array_split(np.arange(len(y)), len(y) // 4096 + 1):  # pieces that fit into memory
        r = np.sort(location[rows, None] + scale[rows, None] * z[rows], -1)
        parts.append(judge(r, np.full(r.shape, 1 / z.shape[-1]), y[rows]))
    return joined(parts)


def judge_normal(mean, sigma, y):
    """judge for normal distributions; CRPS in closed form."""
    z = (y - mean) / sigma
    cdf, pdf = normal_cdf(z), np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return dict(mean=mean, point=mean, pit=cdf, crps=sigma * (z * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi)))


def normal_cdf(z):
    return torch.special.ndtr(torch.from_numpy(z)).numpy()


def judge_paths(moves, t, rows):
    """A forecaster's scores of paths: log returns moves [n, K, H] from the origins `rows` of t.

    Among K draws what came has K + 1 ranks, equally likely where the forecast is right: that is a percentile's width.
    """
    K, y = moves.shape[1], t.path_r[rows]
    r = moves.cumsum(-1)
    scores = named("path", judge_draws(np.moveaxis(r, 1, -1), y))
    scores["path_pit"] = (K * scores["path_pit"] + 0.5) / (K + 1)
    scores["path_width"] = np.full(y.shape, 1 / (K + 1))
    scores["path_rv_crps"] = judge_draws(np.sqrt((moves**2).sum(-1)), t.path_rv[rows])["crps"]
    end = r[:, :, -1]                                                   # (n, K)
    beyond = np.sort(-np.expm1(end), 1)[:, -max(1, round(0.05 * K)):]   # losses beyond VaR 95 %
    scores["path_es95"] = beyond.mean(1)
    scores["path_extreme"] = chance_extreme(end, t.usual[rows], t.horizon)
    return scores


def named(name, scores):
    """Scores of another quantity than the close of the next bar, {"crps": ...} as {"range_crps": ...}."""
    return {f"{name}_{key}": value for key, value in scores.items()}


def joined(parts):
    """Forecasters of several sets of bars as one of all."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# ----------------------------------------------------------------------------------------------------------------------
# The model

BINS = 512    # of close, range and volume each
PROBES = 32   # coarse tokens of each bar whose fine tokens are read


@torch.no_grad()
def next_bars(model, tokenizer, t, probes=PROBES):
    """Forecast every target from the bars before it, teacher-forced, with half a window of context where there is one.

    P(up) is exact. Close, range, volume are counted in BINS each: P(bin) = sum_c P(c) P(bin | c) over coarse tokens c.
    P(bin | c) itself is a sum over fine tokens; all 2^20 pairs of each bar would take hours. So it is a mean over some
    contexts before the first target (`bins_of`), put right by `probes` coarse tokens of each bar's own, stratified by
    close, of which the fine tokens are read (control variates). A few bins may come out below 0.
    """
    binned = bins_of(model, tokenizer, t)
    unmoved = t.flat([unmoved_share(bars, model.config.unmoved)[:-1] for bars in t.series])
    level, width = t.flat([volume_scales(bars) for bars in t.series]).T[:, :, None]  # (N, 1) each
    came = dict(close=t.r, range=t.range, volume=t.volume)
    order = by_close(tokenizer).to(model.up_mask.device)
    shares = (torch.arange(probes, device=order.device) + 0.5) / probes
    half = max(1, model.config.block_size // 2)
    windows = []
    for i, (first, last) in enumerate(t.ranges):
        windows += [(i, j, min(j + half, last)) for j in range(first, last, half)]
    parts, done = [], 0
    for h in contexts(model, tokenizer, t, windows):                            # (m, C)
        now = slice(done, done + len(h))
        done += len(h)
        coarse = model.coarse_logits(h).float().softmax(-1)                     # (m, 2^k1)
        cumulative = coarse[:, order].cumsum(-1)
        place = torch.searchsorted(cumulative, shares * cumulative[:, -1:])
        probe = order[place.clamp(max=len(order) - 1)]                          # (m, probes)
        fine = model.fine_logits(h[:, None], probe).float().softmax(-1) / probes  # (m, probes, 2^k2)

        s = t.s[now, None]
        values = dict(close=np.clip(binned["close"].values * s, -data.MAX_MOVE, data.MAX_MOVE),
                      range=binned["range"].values * s,
                      volume=np.clip(level[now] + binned["volume"].values * width[now], 0, 80))  # (m, bins) each
        p_up = model.p_up(h, torch.from_numpy(unmoved[now]).to(h.device)).double().cpu().numpy()
        scores = dict(p_up=p_up.clip(1e-6, 1 - 1e-6))                           # keeps the log loss finite
        for name, bins in binned.items():
            found = judge(values[name], bins.probabilities(coarse, probe, fine), came[name][now])
            scores |= found if name == "close" else named(name, found)
        parts.append(scores)
        data.progress(f"next bars: {done:,} of {len(t.r):,}")
    data.progress("")
    return joined(parts)


def contexts(model, tokenizer, t, windows):
    """Yield h [m, C], m <= 64, that forecast the targets [j, end) of windows (symbol, j, end), one after the other."""
    n, tokens, device = model.config.block_size, t.tokens(tokenizer), model.up_mask.device
    for k in range(0, len(windows), 16):
        pairs, times, wanted = [], [], []
        for i, j, end in windows[k:k + 16]:
            begin = max(0, j + max(1, n // 2) - n)
            rows = np.minimum(begin + np.arange(n), len(tokens[i]) - 1)  # past the end: repeated, and not looked at
            pairs.append(tokens[i][rows].astype(np.int64))
            times.append(t.series[i].time[rows])
            wanted.append(slice(j - 1 - begin, end - 1 - begin))
        coarse, fine = torch.from_numpy(np.stack(pairs)).to(device).unbind(-1)  # (B, n)
        hidden, _ = model.trunk(coarse, fine, torch.from_numpy(np.stack(times)).to(device))
        yield from torch.cat([row[places] for row, places in zip(norm(hidden), wanted)]).split(64)


def volume_scales(bars):
    """Level and width of log volume before each bar, m_t and d_t of data.features: [T, 2]."""
    volume = log_volume(bars)
    volume[0] = np.nan  # bar 0 enters no mean
    level = decayed_mean_before(volume)
    width = decayed_mean_before(np.abs(volume - level))
    return np.stack([np.nan_to_num(level), np.fmax(width, data.D_FLOOR)], 1)


def decayed_mean_before(u):
    """Decayed mean of the known ones of u [T] before each: [T], NaN where none is known."""
    known = np.isfinite(u)
    total, weight = data.decayed_sum(np.stack([np.where(known, u, 0.0), known]))  # itself included
    return np.append(np.nan, (total / np.where(weight > 0, weight, np.nan))[:-1])


def bins_of(model, tokenizer, t):
    """{name: Bins} of close, range (both in units of s_t) and volume, from contexts before the earliest target."""
    first = np.array([bars.time[begin] for bars, (begin, _) in zip(t.series, t.ranges)])
    early = np.flatnonzero(first == first.min())
    early = early[np.linspace(0, len(early) - 1, min(32, len(early))).astype(int)]
    windows = [(i, t.ranges[i][0], t.ranges[i][0] + 1) for i in early]
    tables, p = candle_tables(tokenizer), 0.0
    every = torch.arange(len(tables["close"]), device=model.up_mask.device)
    for h in torch.cat(list(contexts(model, tokenizer, t, windows))):                       # (C,)
        fine = model.fine_logits(h.expand(len(every), -1), every).float().softmax(-1)       # (2^k1, 2^k2)
        p = p + model.coarse_logits(h).float().softmax(-1)[:, None] * fine
    return {name: Bins(table.to(every.device), p) for name, table in tables.items()}


class Bins:
    """Bins of a quantity of candles, table [2^k1, 2^k2], equally likely under p [2^k1, 2^k2].

    bin_of [2^k1, 2^k2]: the bin of each pair of tokens; values [bins]: their means; share [2^k1, bins]: P(bin | coarse)
    """

    def __init__(self, table, p):
        p = p.clamp(min=1e-20)  # a code that never comes still has its bins
        value, order = table.flatten().sort()
        mass = p.flatten()[order].double().cumsum(0)
        inner = torch.linspace(0, 1, BINS + 1, device=table.device, dtype=mass.dtype)[1:-1] * mass[-1]
        edges = value[torch.searchsorted(mass, inner)].unique()
        self.bin_of = torch.searchsorted(edges[edges < value[-1]], table)
        zero = torch.zeros(int(self.bin_of.max()) + 1, device=table.device, dtype=torch.float64)
        total = zero.index_add(0, self.bin_of.flatten(), p.flatten().double())
        sums = zero.index_add(0, self.bin_of.flatten(), (p * table).flatten().double())
        self.values = (sums / total).cpu().numpy()
        share = torch.zeros(len(table), len(zero), device=table.device).scatter_add_(1, self.bin_of, p)
        self.share = share / share.sum(-1, keepdim=True)

    def probabilities(self, coarse, probe, fine):
        """P(bin) float64 [m, bins], from P(coarse) [m, 2^k1], tokens probe [m, n], fine = P(fine) / n of each."""
        p = coarse @ self.share - self.share[probe].mean(1)
        p.scatter_add_(1, self.bin_of[probe].flatten(1), fine.flatten(1))
        return p.double().cpu().numpy()


def candle_tables(tokenizer):
    """What every pair of tokens says, {name: float64 [2^k1, 2^k2]}: close and range in units of s_t, volume of d_t."""
    fine = torch.arange(2**tokenizer.config.fine_bits)
    x = [tokenizer.decode(torch.full_like(fine, c), fine) for c in range(2**tokenizer.config.coarse_bits)]
    close, open_, upper, lower, volume, _ = torch.stack(x).double().sinh().unbind(-1)
    size = (close - open_).abs() + upper.clamp(min=0) + lower.clamp(min=0)
    return dict(close=close.contiguous(), range=size, volume=volume.contiguous())


def simulated(model, tokenizer, t, paths, parallel=False, temperature=1.0):
    """Forecast the log returns over the horizon from every origin."""
    n, origins = model.config.block_size, []
    for bars, tokens, at, states in zip(t.series, t.tokens(tokenizer), t.origins, t.states):
        unmoved = unmoved_share(bars, model.config.unmoved)
        for o, state in zip(at, states):
            context = torch.from_numpy(tokens[max(0, o + 1 - n):o + 1].astype(np.int64))
            origins.append(Origin(bars.symbol, context, bars.time[:o + 1], state, unmoved[o + 1]))
    parts = []
    for i in range(0, len(origins), 256):
        part = origins[i:i + 256]
        ohlcva, _ = simulate(model, tokenizer, part, t.horizon, paths, temperature, seed=t.seed, parallel=parallel)
        last = np.log([o.state.close for o in part])[:, None, None]
        moves = np.diff(np.log(ohlcva[..., 3]), prepend=np.broadcast_to(last, (len(part), paths, 1)))
        parts.append(judge_paths(moves, t, slice(i, i + len(part))))
        data.progress(f"paths: {i + len(part):,} of {len(origins):,} origins")
    data.progress("")
    return joined(parts) if parts else {}


# ----------------------------------------------------------------------------------------------------------------------
# Its opponents, each fitted on the bars before the first target, or on those before each origin

RESIDUALS = 500   # that filtered historical simulation (the newest) and HAR draw from
LAMBDA = 0.94     # decay of the former's volatility (as RiskMetrics, 1996)
LAGS = 5          # bars that the logistic regression looks at


def baselines(t, paths):
    """{name: forecaster} of all of them."""
    return dict(persistence=persistence(t), always_up=dict(p_up=np.ones(len(t.r))), ar1=each_series(t, ar1),
                logistic=logistic(t), gaussian20=each_series(t, gaussian), fhs=each_series(t, historical, paths),
                har=har(t, paths))


def each_series(t, forecaster, *options):
    """forecaster(t, series, rows of its paths, *options) of every series, as one."""
    return joined([forecaster(t, i, rows, *options) for i, rows in enumerate(t.path_rows)])


def persistence(t):
    """All stays as it is: no return, the range and volume of the bar before. A point's CRPS is its error."""
    zero = np.zeros(len(t.r))
    ranges = [np.abs(np.diff(log_range(bars), prepend=np.nan)) for bars in t.series]
    volumes = [np.abs(np.diff(log_volume(bars), prepend=np.nan)) for bars in t.series]
    return dict(mean=zero, point=zero, crps=np.abs(t.r), range_crps=t.flat(ranges), volume_crps=t.flat(volumes),
                path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r))


def ar1(t, i, rows):
    """Each log return from the one before."""
    r, (first, last) = t.returns[i], t.ranges[i]
    x, y = r[1:first - 1], r[2:first]
    b = np.cov(x, y)[0, 1] / max(x.var(ddof=1), 1e-18)
    a = y.mean() - b * x.mean()
    sigma = max((y - a - b * x).std(), 1e-9)
    one = judge_normal(a + b * r[first - 1:last - 1], sigma, r[first:last])
    psi = np.cumsum(b ** np.arange(t.horizon))  # (H,): weight of a shock k bars on in the return since the origin
    mean = a * psi.cumsum() + b * psi * r[t.origins[i], None]  # (n, H)
    many = judge_normal(mean, np.sqrt((psi**2).cumsum()) * sigma, t.path_r[rows])
    return one | dict(p_up=normal_cdf(one["mean"] / sigma)) | named("path", many)


def gaussian(t, i, rows):
    """No drift, the volatility of the last 20 bars."""
    r, (first, last) = t.returns[i], t.ranges[i]
    rms = np.sqrt(sliding_window_view(r**2, 20).mean(-1)).clip(1e-9)  # of bars k .. k + 19
    one = judge_normal(np.zeros(last - first), rms[first - 20:last - 20], r[first:last])
    sigma = rms[t.origins[i] - 19, None] * np.sqrt(np.arange(1, t.horizon + 1))  # (n, H)
    return one | named("path", judge_normal(np.zeros(sigma.shape), sigma, t.path_r[rows]))


def historical(t, i, rows, paths):
    """Filtered historical simulation: residuals of a decayed volatility, which along a path follows what is drawn
    (Barone-Adesi, Giannopoulos and Vosper, Journal of Futures Markets 1999)."""
    r, (first, last), origins = t.returns[i], t.ranges[i], t.origins[i]
    begun = (np.arange(len(r)) > 0).astype(float)
    squares, weight = data.decayed_sum(r**2, decay=LAMBDA), data.decayed_sum(begun, decay=LAMBDA)
    vol = np.sqrt(squares / np.maximum(weight, 1e-9)).clip(1e-9)  # known after each bar
    n = min(RESIDUALS, first - 12)  # the first dozen volatilities are too raw
    z = sliding_window_view(np.append(0.0, r[1:] / vol[:-1]), n)  # row k: bars k .. k + n - 1
    known = z[first - n:last - n]  # (targets, n)
    one = judge_residuals(known, r[first:last], vol[first - 1:last - 1])
    p_up = ((known > 0).sum(-1) + 0.5) / ((known != 0).sum(-1) + 1)

    random = np.random.default_rng([t.seed, zlib.crc32(t.series[i].symbol.encode()), 2])
    pick = random.integers(n, size=(len(origins), paths, t.horizon))
    variance, moves = np.repeat(vol[origins, None]**2, paths, 1), np.empty(pick.shape)
    for k in range(t.horizon):
        moves[:, :, k] = np.sqrt(variance) * np.take_along_axis(z[origins + 1 - n], pick[:, :, k], 1)
        variance = LAMBDA * variance + (1 - LAMBDA) * moves[:, :, k]**2
    return one | dict(p_up=p_up) | judge_paths(moves, t, rows)


def logistic(t):
    """Logistic regression of the direction on the last bars' features, all symbols together; {} under 1,000 bars."""
    x = [data.features(bars)[0] for bars in t.series]
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
    return np.concatenate([np.ones((len(rows), 1)), *(x[rows - k] for k in range(1, LAGS + 1))], axis=1)


# ----------------------------------------------------------------------------------------------------------------------
# Scores, and how sure they are

def block_sums(f, t):
    """{score: sums over each block of time, [n_blocks, ...]} of what forecaster f says of targets t.

    `score_of` makes the score of them. Most are means of a value of each bar, NaN where a bar has none.
    """
    out, means = {}, {}
    if "p_up" in f:
        out |= direction_sums(f["p_up"], t)
    signal = f.get("mean", f.get("p_up"))
    if signal is not None:
        x, y = signal - signal.mean(), t.r - t.r.mean()
        out["ic"] = totals(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], -1), t.block, t.n_blocks)
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
    out |= {name: sums_of(values, t.block, t.n_blocks) for name, values in means.items()}
    if len(f.get("path_point", ())):  # of no origins no scores
        out |= path_sums(f, t)
    return out


def direction_sums(p_up, t):
    """block_sums of P(up), over the bars that moved."""
    moved = t.r != 0
    p, up, block = p_up[moved], t.r[moved] > 0, t.block[moved]
    hit = 0.5 + 0.5 * np.sign(p - 0.5) * np.where(up, 1, -1)
    by_side = np.stack([np.where(up, hit, np.nan), np.where(up, np.nan, hit)], -1)  # hits among ups, among downs
    with np.errstate(divide="ignore"):  # always_up: infinite
        logloss = -np.log(np.where(up, p, 1 - p))
    calls = dict(da=hit, balanced_accuracy=by_side, logloss=logloss, up_share=p > 0.5)
    out = {name: sums_of(values, block, t.n_blocks) for name, values in calls.items()}
    out["auc"] = sums_by_bin([up, ~up], ordered_bins(p), block, t.n_blocks)
    tenth = np.minimum(p * 10, 9).astype(int)
    out["ece"] = sums_by_bin([p - up, np.ones(len(p))], tenth, block, t.n_blocks)
    return out


def path_sums(f, t):
    """block_sums of paths: lists over the steps; realized volatility and losses over the whole horizon."""
    out = {}
    means = dict(path_mape=100 * np.abs(np.expm1(f["path_point"] - t.path_r)), path_crps=100 * f["path_crps"])
    if "path_rv_crps" in f:  # sampled paths
        pit, width, extreme = f["path_pit"], f["path_width"], f["path_extreme"]
        hit = within(pit[:, -1], width[:, -1], 0.0, 0.05)  # the loss was beyond VaR 95 %
        tails = np.stack([-np.expm1(t.path_r[:, -1]) * hit, 0.05 * f["path_es95"]], -1)
        out["es95_ratio"] = totals(tails, t.path_block, t.n_path_blocks)  # Acerbi and Szekely, Risk 2014: 1 if right
        flagged = extreme > WARN
        means |= dict(path_rv_crps=100 * f["path_rv_crps"], path_coverage90=within(pit, width, 0.05, 0.95),
                      var95_hits=hit, extreme_flagged=flagged)
        if flagged.any():
            came = chance_extreme(t.path_r[:, -1:], t.usual, t.horizon)  # 1 or 0
            means["extreme_said"] = np.where(flagged, extreme, np.nan)
            means["extreme_came"] = np.where(flagged, came, np.nan)
    return out | {name: sums_of(values, t.path_block, t.n_path_blocks) for name, values in means.items()}


def inside(pit, q):
    """Whether what came lies in the middle q % of its distribution."""
    return np.abs(pit - 0.5) <= q / 200 + 1e-9  # rounding decides nothing


def within(pit, width, low, high):
    """How much of [pit - width / 2, pit + width / 2] lies in [low, high]: a number from 0 to 1."""
    return ((np.minimum(pit + width / 2, high) - np.maximum(pit - width / 2, low)) / width).clip(0, 1)


def sums_of(values, block, n_blocks):
    """Sums over each block of values [N, ...] and of how many there are, NaN left out: [n_blocks, ..., 2]."""
    known = ~np.isnan(values)
    return totals(np.stack([np.where(known, values, 0), known], -1), block, n_blocks)


def sums_of_stamps(values, t):
    """The same of values [stamps]."""
    block = np.zeros(len(values), int)
    block[t.stamp] = t.block
    return sums_of(values, block, t.n_blocks)


def sums_by_bin(columns, bins, block, n_blocks):
    """Sums of columns [N] each over each block and bin: [n_blocks, bins, columns]."""
    n = bins.max(initial=0) + 1
    return totals(np.stack(columns, -1), block * n + bins, n_blocks * n).reshape(n_blocks, n, -1)


def totals(values, block, n_blocks):
    """Sums of values [N, ...] over each block: [n_blocks, ...]."""
    sums = [np.bincount(block, column, n_blocks) for column in values.reshape(len(values), -1).T]
    return np.stack(sums, -1).reshape(n_blocks, *values.shape[1:])


def score_of(metric, s):
    """A score from sums over some blocks, s [..., 2] (six for IC): the columns that block_sums stacks."""
    if metric == "ic":  # Pearson's correlation
        n, x, y, xx, yy, xy = np.moveaxis(s, -1, 0)
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    first, second = s[..., 0], s[..., 1]
    if metric == "auc":  # P(p of an up > p of a down) + P(equal) / 2, from ups and downs in each bin
        below = second.cumsum(-1) - second / 2
        return (first * below).sum(-1) / (first.sum(-1) * second.sum(-1))
    if metric == "ece":  # expected calibration error, from p - up and counts in each bin
        return np.abs(first).sum(-1) / second.sum(-1)
    mean = first / second
    if metric == "balanced_accuracy":
        return mean.mean(-1)
    return np.sqrt(mean) if metric == "rmse" else mean


def ordered_bins(p, most=2048):
    """The rank of each p among the distinct ones; neighbours share a bin where there are more than `most`."""
    value, rank, count = np.unique(p, return_inverse=True, return_counts=True)
    return rank if len(value) <= most else (np.cumsum(count) - 1)[rank] * most // len(p)


def rank_ic(signal, r, stamp):
    """Spearman's correlation across the symbols of each time stamp, [stamps]; NaN for fewer than 3, or all alike."""
    x, y = ranks(signal, stamp), ranks(r, stamp)
    variance = np.bincount(stamp, x * x) * np.bincount(stamp, y * y)
    found = np.bincount(stamp, x * y) / np.sqrt(variance.clip(1e-9))
    return np.where((np.bincount(stamp) >= 3) & (variance > 1e-9), found, np.nan)


def ranks(v, stamp):
    """Rank within the time stamp, less the mean rank there; equal values share theirs."""
    order = np.lexsort((v, stamp))
    new = (np.diff(v[order], prepend=np.nan) != 0) | (np.diff(stamp[order], prepend=-1) != 0)
    group = np.cumsum(new) - 1  # equal values of one stamp
    rank = np.empty(len(v))
    rank[order] = (np.bincount(group, np.arange(len(v))) / np.bincount(group))[group]
    return rank - (np.bincount(stamp, rank) / np.bincount(stamp).clip(1))[stamp]


def trading_sums(p_up, t, cost_bps):
    """block_sums of a trade: long the top fifth, short the bottom fifth by P(up) at every time stamp with 5 symbols.

    Return per bar in bps after costs; turnover, the value traded as a share of one side (4: both sides replaced).
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
    return dict(long_short=sums_of_stamps(np.where(traded, 1e4 * gain - turnover * cost_bps, np.nan), t),
                turnover=sums_of_stamps(np.where(traded, turnover, np.nan), t))


def bootstrap(sums, t):
    """{score: (value, replicates)} of block_sums. All forecasters get the same draws of blocks: so they are paired."""
    out = {}
    with np.errstate(all="ignore"):
        for name, s in sums.items():
            value = score_of(name, s.sum(0))
            drawn = score_of(name, np.tensordot(t.path_weights if of_paths(name) else t.weights, s, 1))
            if name.startswith(RARE) and (s[:, 0] != 0).sum() < MIN_CASES:
                drawn = np.full_like(drawn, np.nan)
            finite = np.isfinite(drawn)
            centre = drawn.sum(0, where=finite) / finite.sum(0)
            out[name] = value, drawn - centre + value  # ECE, a sum of magnitudes, is larger in a replicate
    return out


def scored(value, drawn, n_blocks):
    """{value, lo, hi}: the 95 % percentile interval, None under 20 blocks; a list of them for a score over steps.

    As wide as Student's t has it, since blocks are few (Hesterberg 2014, arXiv 1411.5279). None for no finite value.
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


def at_step(drawn, metric, step):
    """(value, replicates) of a score; of a list over steps that at `step`, its mean if that is None."""
    value, replicates = drawn[metric]
    if np.ndim(value) == 0:
        return value, replicates
    return (value.mean(), replicates.mean(-1)) if step is None else (value[step], replicates[..., step])


def versus(a, b, n_blocks, as_ratio):
    """The difference or ratio of two (value, replicates), with its interval."""
    with np.errstate(all="ignore"):
        return scored(*(x / y if as_ratio else x - y for x, y in zip(a, b)), n_blocks)


def against(a, b, metric, t, step=-1):
    """The score a beside b, paired: as a ratio for the metrics of RATIOS, else as a difference; step as in at_step."""
    return versus(at_step(a, metric, step), at_step(b, metric, step), t.blocks_of(metric), as_ratio=metric in RATIOS)


def paired(name_a, name_b, drawn, t, metrics):
    """Differences a - b of every score that both have, and ratios a / b of RATIOS, replicate by replicate."""
    a, b, rows = drawn[name_a], drawn[name_b], []
    for metric in metrics:
        if metric in a and metric in b:
            difference = versus(a[metric], b[metric], t.blocks_of(metric), as_ratio=False)
            ratio = against(a, b, metric, t, slice(None)) if metric in RATIOS else None
            rows.append(dict(a=name_a, b=name_b, metric=metric, difference=difference, ratio=ratio))
    return rows


def groups_of(t, by):
    """(name, mask over the targets) of each group; volatility: thirds of the bars by HAR's forecast over s_t."""
    if by is None:
        return []
    if by == "symbol":
        names, group = [bars.symbol for bars in t.series], t.symbol
    elif by == "quarter":
        months = t.time.astype("datetime64[s]").astype("datetime64[M]").astype(int)  # since 1970
        quarters, group = np.unique(months // 3, return_inverse=True)
        names = [f"{1970 + q // 4}-Q{q % 4 + 1}" for q in quarters]
    else:
        rising = t.flat([har.sigma for har in t.volatility]) / t.s  # known before the bar: how volatility is to change
        names, group = ("falling", "steady", "rising"), np.searchsorted(np.quantile(rising, (1 / 3, 2 / 3)), rising)
    return [(name, group == k) for k, name in enumerate(names)]


def grouped(f, t, mask):
    """Scores BY of some of the targets, bool [N]."""
    part = copy.copy(t)
    part.r, part.stamp, part.block = t.r[mask], t.stamp[mask], t.block[mask]
    sums = block_sums({key: v[mask] for key, v in f.items() if not of_paths(key)}, part)
    drawn = bootstrap({m: sums[m] for m in BY if m in sums}, t)
    return {m: scored(*found, len(np.unique(part.block))) for m, found in drawn.items()}


# ----------------------------------------------------------------------------------------------------------------------
# HAR on ranges, the strongest opponent

WINDOWS = (1, 5, 22, 66)   # bars over which HAR takes means
HAR_FLOOR = 0.05           # least range in HAR, as a share of the mean
LEVEL = 500                # half-life, in bars, of the scale of HAR's residuals
FORGET = 15                # half-life, in days, of what a time of day shows (in weeks, of the week's)
SEEN = 3                   # days that it counts as usual, beside


def har(t, paths):
    """Volatility, range and volume each by a HAR of its own; a path draws residuals of return and range jointly."""
    random = np.random.default_rng([t.seed, 3])
    ranges = fit_har(t, [log_range(bars) for bars in t.series])
    volumes = fit_har(t, [np.exp(log_volume(bars)) for bars in t.series], logs=True)
    parts = []
    for i, (first, last) in enumerate(t.ranges):
        bars, now, volatility = t.series[i], slice(first, last), t.volatility[i]
        scores = judge_residuals(volatility.residuals[0], t.returns[i][now], volatility.sigma[now])
        scores |= named("range", judge_residuals(ranges[i].residuals[0], log_range(bars)[now], ranges[i].forecast[now]))
        if volumes:
            z, location = np.log(volumes[i].residuals[0]), np.log(volumes[i].forecast[now])
            scores |= named("volume", judge_residuals(z, log_volume(bars)[now], 1.0, location))
        moves = volatility_paths(volatility, t.origins[i], paths, t.horizon, random)
        parts.append(scores | judge_paths(moves, t, t.path_rows[i]))
    return joined(parts)


class Har:
    """Forecasts of a positive series u [T] of one symbol from its own past, NaN where a bar has none.

    Heterogeneous autoregression (after Corsi, Journal of Financial Econometrics 2009): the root of u on roots of its
    means over WINDOWS; logs: its log on the means of its log. u is taken in units of its mean before the first target
    times its TimeOfDay. What fit_har adds: weights; forecast [T] of each bar; ratio [T], u over that; residuals
    [1, RESIDUALS], ratios in order.
    """

    def __init__(self, bars, u, first, start, logs):
        self.bars, self.logs = bars, logs
        known = np.isfinite(u)
        self.mean = max(u[:first].mean(where=known[:first]) if known[:first].any() else 1.0, 1e-9)
        u = np.where(known, u, self.mean)
        if not logs:
            u = np.maximum(u, HAR_FLOOR * self.mean)
        self.factor = TimeOfDay(bars.time, u, first)
        self.unit = self.mean * self.factor(bars.time)
        self.u = u / self.unit
        settled = np.arange(min(WINDOWS[-1], first // 2), first)
        self.fitted = settled[known[settled]]                           # bars to learn from, whose means are settled
        self.early = self.fitted[bars.time[self.fitted] < start]        # those before any symbol's first target
        usual, self.y = (0.0, np.log(self.u)) if logs else (1.0, self.u)
        self.x = np.stack([np.append(usual, trailing_mean(self.y, n)[:-1]) for n in WINDOWS], 1)
        if not logs:
            self.x, self.y = np.sqrt(self.x), np.sqrt(self.y)           # (T, 4), known before each bar; (T,)

    def predict(self, x):
        """u of the next bar, in its units, from the roots or logs of its means over WINDOWS: a list of [...]."""
        y = self.weights[0]
        for weight, column in zip(self.weights[1:], x):
            y = y + weight * column
        return np.exp(y) if self.logs else np.maximum(y, HAR_FLOOR**0.5)**2


def fit_har(t, values, logs=False):
    """A Har of each series' values [T], with one regression for all of them; None if there is nothing to learn from."""
    start = t.time.min()
    hars = [Har(bars, u, first, start, logs) for bars, u, (first, _) in zip(t.series, values, t.ranges)]
    X = np.concatenate([har.x[har.early] for har in hars])
    y = np.concatenate([har.y[har.early] for har in hars])
    if not len(y):
        return None
    precision = np.ones(len(y)) if logs else 1 / X.mean(1)  # a root's error grows with the root
    X = np.concatenate([np.ones((len(y), 1)), X], axis=1)
    weights = np.linalg.lstsq(X * precision[:, None], y * precision, rcond=None)[0]
    for har in hars:
        har.weights = weights
        forecast = har.predict(har.x.T)
        har.forecast, har.ratio = forecast * har.unit, har.u / forecast
    give_residuals(hars, [har.ratio[None] for har in hars])
    return hars


def trailing_mean(u, n):
    """Mean of the last n values up to each, of fewer at the beginning: [T]."""
    total = np.cumsum(u)
    total[n:] -= total[:-n]
    return total / np.minimum(np.arange(1, len(u) + 1), n)


def give_residuals(hars, values):
    """To each Har RESIDUALS columns of its values [k, T], half its own, half of all, in order of the first row."""
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


class TimeOfDay:
    """How much larger u > 0 [T] usually is at each time of day, or of daily bars on each weekday: a factor known before.

    Its log is the mean of log(u / mean of u over the last day) at that time on the days before. A day counts half after
    FORGET days, since habits change (summer time, another source of the bars); SEEN days of factor 1 are added. In a
    market that never closes there are two levels: each hour of the day, then each hour of the week relative to it, over
    the weeks before; of daily bars the weekday is the one level. Which market it is, and the mean of all factors, is
    learned before bar `first`.
    """

    def __init__(self, time, u, first):
        self.levels = []  # (period, width, periods that have bars, log factors [times of the period, periods])
        past = time[:first]
        step = np.median(np.diff(past))
        if step >= 2 * DAY:
            return
        if step >= DAY:
            levels = [(WEEK, DAY)]
        elif len(np.unique(past // HOUR % 24)) >= 23:       # round the clock
            levels = [(DAY, HOUR), (WEEK, HOUR)]
        else:
            levels = [(DAY, int(step))]
        n_bars = int(np.median(np.unique(past // levels[0][0], return_counts=True)[1]))
        x = np.log(u / trailing_mean(u, n_bars))
        x -= x[:first].mean()
        for period, width in levels:
            periods, column = np.unique(time // period, return_inverse=True)
            row, shape = time % period // width, (period // width + 1, len(periods))
            total, count = sums_of(x, row * len(periods) + column, math.prod(shape)).T.reshape(2, *shape)
            means = np.stack([total / np.maximum(count, 1), count > 0])
            total, weight = data.decayed_sum(means, decay=0.5 ** (1 / FORGET))  # up to each period
            log_factor = np.roll(total / (weight + SEEN), 1, axis=1)            # before it
            log_factor[:, 0] = 0.0
            self.levels.append((period, width, periods, log_factor))
            x = x - log_factor[row, column]

    def __call__(self, time, now=None):
        """Factors of stamps [...], as known when the day (week) of each began; of bars to come, when that of `now` did."""
        log_factor = np.zeros(np.shape(time))
        for period, width, periods, levels in self.levels:
            column = np.searchsorted(periods, (time if now is None else now) // period)
            log_factor = log_factor + levels[time % period // width, column]
        return np.exp(log_factor)


def fit_volatility(t):
    """A Har of each series' range volatility, and from it sigma [T], the volatility of each bar's return.

    It is forecast * scale [T + 1], the slow scale of |return| / forecast. residuals [2, RESIDUALS]: return / sigma, in
    order, and the ratio of the same bar.
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


def volatility_paths(har, origins, paths, horizon, random):
    """Log returns after each origin of a series, [n, paths, H], by a Har of fit_volatility.

    A path draws a residual of its return and, of the same bar, one of its range, on which the next forecasts look back.
    """
    (z, ratio), n = har.residuals, len(origins)
    usual = np.ones((n, horizon))
    if har.factor.levels:
        for row, o in zip(usual, origins):
            row[:] = har.factor(future_times(har.bars.time[:o + 1], horizon), har.bars.time[o])
    scale = har.scale[origins + 1, None] * har.mean * usual  # (n, H)
    past = np.append(0.0, har.u.cumsum())
    drawn, moves = np.zeros((n, paths, horizon + 1)), np.empty((n, paths, horizon))  # running sums of u; returns
    pick = random.integers(len(z), size=moves.shape)
    for k in range(horizon):
        x = []
        for window in WINDOWS:
            known = past[origins + 1] - past[np.maximum(origins + 1 - max(window - k, 0), 0)]   # up to the origin
            total = known[:, None] + drawn[..., k] - drawn[..., max(k - window, 0)]             # and after it
            x.append(np.sqrt(total / np.minimum(window, origins + 1 + k)[:, None]))
        forecast = har.predict(x)                                                               # (n, paths)
        drawn[..., k + 1] = drawn[..., k] + forecast * ratio[pick[..., k]]
        moves[..., k] = scale[:, k, None] * forecast * z[pick[..., k]]
    return moves


def range_volatility(bars):
    """Of each bar sqrt(Parkinson variance + gap^2), in log price [T] (Parkinson, Journal of Business 1980)."""
    open_, close = bars.ohlcva[:, 0], bars.ohlcva[:, 3]
    gap = np.log(open_ / np.append(open_[0], close[:-1]))
    return np.sqrt(log_range(bars)**2 / (4 * math.log(2)) + gap**2)


def slow_scale(size, fitted, common):
    """Decayed mean of sizes [T] before each bar and after the last, [T + 1], from the first fitted bar on.

    It begins with the mean over the fitted bars and 30 more of `common`, that of all symbols. A size counts as 6 usual
    ones at most: one wild bar is not a new level.
    """
    usual = (size[fitted].sum() + 30 * common) / (len(fitted) + 30)
    seen = np.arange(len(size)) >= fitted[0]
    decay = 0.5 ** (1 / LEVEL)
    total = data.decayed_sum(np.minimum(size, 6 * usual) * seen, decay=decay)
    weight = data.decayed_sum(seen.astype(float), decay=decay)
    return np.append(usual, (total + LEVEL / 2 * usual) / (weight + LEVEL / 2))


# ----------------------------------------------------------------------------------------------------------------------
# The run, and its table

def main(argv=None):
    config = Config(**data.cli(Config, __doc__, argv))
    config.ckpt = config.ckpt or [base_weights(config.data)]
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if not math.isfinite(config.cost_bps):
        raise UserError(f"--cost_bps {config.cost_bps}: must be a number such as 5")
    series = load_series(config.data, load_checkpoint(config.ckpt[0])[2], config.symbols)
    result = backtest(config.ckpt, series, config.split, config.start, config.end, config.horizon, config.paths,
                      config.stride, config.seed, config.parallel, config.by, config.cost_bps, config.device)
    if not config.json:
        print_backtest(result, config.horizon, config.cost_bps)
        return
    hidden = ("scores", "drawn", "targets") if config.by else ("scores", "drawn", "targets", "by")
    print(json.dumps(jsonable({key: value for key, value in result.items() if key not in hidden})))


SECTIONS = {  # title: (score, label, factor, digits)
    "next close": (("crps", "CRPS", 1, 4), ("mae", "MAE", 1, 4), ("rmse", "RMSE", 1, 4), ("mape", "MAPE %", 1, 4),
                   ("coverage50", "in 50 % band", 100, 2), ("coverage80", "in 80 % band", 100, 2),
                   ("coverage90", "in 90 % band", 100, 2)),
    "next range": (("range_crps", "CRPS", 1, 4), ("range_coverage90", "in 90 % band", 100, 2)),
    "next volume": (("volume_crps", "CRPS", 1, 4), ("volume_coverage90", "in 90 % band", 100, 2)),
    "next direction": (("da", "right calls %", 100, 2), ("balanced_accuracy", "balanced %", 100, 2),
                       ("auc", "AUC", 1, 4), ("logloss", "log loss", 1, 4), ("ece", "ECE %", 100, 2),
                       ("ic", "IC", 1, 3), ("rank_ic", "rank IC", 1, 3)),
    "paths": (("path_crps", "CRPS", 1, 4), ("path_mape", "MAPE %", 1, 4), ("path_rv_crps", "volatility", 1, 4)),
    "risk": (("var95_hits", "beyond VaR %", 100, 2), ("es95_ratio", "loss to ES", 1, 3),
             ("extreme_flagged", "! raised %", 100, 2), ("extreme_said", "! chance %", 100, 2),
             ("extreme_came", "! came true %", 100, 2)),
    "trading": (("long_short", "top-bottom bps", 1, 2), ("turnover", "turnover", 1, 2))}
HEADS = ("still", "up", "ar1", "logit", "gauss", "fhs", "har")  # of the baselines


def print_backtest(result, horizon, cost_bps):
    """Each checkpoint's scores with half their intervals, beside those of the opponents; then pairs, and groups."""
    own, columns = [entry["ckpt"] for entry in result["checkpoints"]], result["scores"]
    print(f"{result['split']}: targets {result['start']} to {result['end']}, {result['blocks']} blocks of time")
    if "overlap" in result["split"]:
        print(SEEN_DATES)
    print("± half the 95 % interval; MAE, RMSE, CRPS in log return x 100, of volume in its")
    print(f"log; ! more than {WARN:.0%} chance of an extreme move; costs of {cost_bps:g} bps\n")
    print(" " * 16 + "".join(f"{stem(name)[-14:]:>15}" for name in own) + "".join(f"{head:>7}" for head in HEADS))
    for title, rows in SECTIONS.items():
        if not any(scores.get(metric) for metric, *_ in rows for scores in columns.values()):
            continue  # no volume, or too few symbols to trade
        print(title)
        for metric, label, scale, digits in rows:
            steps = sorted({(horizon + 1) // 2, horizon}) if metric in ("path_crps", "path_mape") else [None]
            for k in steps:
                line = f"  {f'{label}, bar {k}' if k else label:14}"
                for name, scores in columns.items():
                    score = scores.get(metric)
                    score = score[k - 1] if k and score else score
                    line += f"{number(score, scale, digits, half=name in own):>{15 if name in own else 7}}"
                print(line)

    print("\npaired, 95 % interval: x ratio, + difference to the best opponent of each score")
    for pair in sorted(result["paired"], key=lambda pair: METRICS.index(pair["metric"])):
        metric, score = pair["metric"], pair["ratio"] or pair["difference"]
        if pair["b"] not in own and pair["b"] != best_rival(result["baselines"], metric):
            continue
        label = RIVALRY.get(metric, metric)
        scale, digits = (100, 2) if metric == "da" else (1, 4)
        if isinstance(score, list):
            label, score = f"{label}, bar {len(score)}", score[-1]
        if score:
            text = "x " + show(score, 1, 4) if pair["ratio"] else "  " + show(score, scale, digits, "+")
            print(f"  {label:22}{text:32}{stem(pair['a'])} to {stem(pair['b'])}")

    if result["by"]:
        print(f"\n{'':12}{'bars':>8}{'right calls %':>15}{'MAE':>15}{'CRPS':>15}{'in 90 % band':>15}")
    for row in result["by"]:
        line = f"{row['group'][:11]:12}{row['bars']:>8,}"
        for metric, scale, digits in (("da", 100, 2), ("mae", 1, 4), ("crps", 1, 4), ("coverage90", 100, 2)):
            line += f"{number(row.get(metric), scale, digits):>15}"
        print(line + f"  {stem(row['ckpt'])}" * (len(own) > 1))


def number(score, scale, digits, half=True):
    """A score as text, with half its interval where it has one."""
    if score is None:
        return "."
    values = [score["value"] * scale]
    if half and score["lo"] is not None:
        values.append((score["hi"] - score["lo"]) / 2 * scale)
    return " ±".join(f"{value:.{digits if abs(value) < 10 else min(digits, 2)}f}" for value in values)


def show(score, scale, digits, sign=""):
    """A score with its interval, as text."""
    if score is None:
        return "."
    known = [score[k] for k in ("value", "lo", "hi") if score[k] is not None]
    value, *ends = (f"{v * scale:{sign}.{digits}f}" for v in known)
    return f"{value} [{', '.join(ends)}]" if ends else value


def stem(path):
    return os.path.basename(path).removesuffix(".pt")


def best_rival(baselines, metric):
    """The name of the baseline with the best score; of lists over steps, the last."""
    found = {}
    for name, scores in baselines.items():
        score = scores[metric][-1] if isinstance(scores[metric], list) else scores[metric]
        if score:
            found[name] = -score["value"] if metric == "da" else score["value"]  # all but right calls are errors
    return min(found, key=found.get, default=None)


# ----------------------------------------------------------------------------------------------------------------------
# What the later stages ask: is it better than what they began with, at no cost?

NO_WORSE = 1.005                # a ratio to the reference whose interval ends below this
VAL_PROBES = 8                  # in place of PROBES, for scores on val in the course of a training


def some_targets(series, split, borders, horizon=1, origins=1, seed=0, most=None):
    """Targets in a split, with about so many origins; about `most` bars: of some symbols, the earliest dates."""
    low, end = borders if split == "val" else (borders[1], 2**62)
    spans = [(bars, *data.targets_of(bars, split, borders)) for bars in series]
    spans = [span for span in spans if span[2] > span[1]]
    if not spans:
        raise UserError(f"no symbol has a bar in {split} (val from {data.iso(borders[0])}, test from "
                        f"{data.iso(borders[1])}); give --data that reach there")
    n = max(8, (most or 2**62) // max(last - first for _, first, last in spans))
    if n < len(spans):
        spans = [spans[i] for i in np.linspace(0, len(spans) - 1, n).round().astype(int)]
    stamps = np.sort(np.concatenate([bars.time[first:last] for bars, first, last in spans]))
    if most and len(stamps) > most:
        stamps, end = stamps[:most], int(stamps[most])
    return Targets([bars for bars, *_ in spans], low, end, horizon, max(1, len(stamps) // origins), seed)


def drawn_scores(model, tokenizer, t, paths=0, probes=PROBES):
    """{score: (value, replicates)} of a model on targets t: of the next bar if probes > 0, of paths if paths > 0."""
    one = next_bars(model, tokenizer, t, probes) if probes else {}
    many = simulated(model, tokenizer, t, paths) if paths else {}
    return bootstrap(block_sums(one | many, t), t)


def upper(score):
    """The upper end of an interval; the value itself where there is none."""
    return score["value"] if score["hi"] is None else score["hi"]


def print_versus(columns, t, rows, versus=(-1, 0)):
    """Scores of forecasters {name: drawn_scores} side by side; those at the places `versus` also paired.

    rows: (metric, label, scale, digits), of path scores (metric, step or None for their mean) in the first place.
    """
    names = list(columns)
    a, b = (names[place] for place in versus)
    print(f"targets {data.iso(t.time.min())} to {data.iso(t.time.max())}: {len(t.r):,} bars, {t.n_blocks} blocks; "
          f"{len(t.path_r):,} origins")
    print(f"{'':22}{''.join(f'{name[-9:]:>10}' for name in names)}   {a} to {b}, 95 %")
    for metric, label, scale, digits in rows:
        metric, step = metric if isinstance(metric, tuple) else (metric, -1)
        if metric not in columns[a]:
            continue
        line = f"{label:22}"
        for drawn in columns.values():
            line += f"{at_step(drawn, metric, step)[0] * scale:>10.{digits}f}" if metric in drawn else f"{'.':>10}"
        if metric in columns[b]:
            score = against(columns[a], columns[b], metric, t, step)
            line += "   x " + show(score, 1, 4) if metric in RATIOS else "     " + show(score, scale, digits, "+")
        print(line)


# ----------------------------------------------------------------------------------------------------------------------
# A reader may stop here: what follows only finds the dates, refuses what cannot be, and warns

def span_of(metas, split, start, end):
    """(name of the split, first time stamp, end) of the targets. In-sample targets only where they are asked for."""
    if split not in ("val", "test"):
        raise UserError(f"--split {split}: choose val or test, or name the targets by --start and --end")
    lo = -math.inf if start is None else data.parse_time(start)
    hi = 2**62 if end is None else data.parse_time(end)
    for name, date, time in (("start", start, lo), ("end", end, hi)):
        if math.isnan(time):
            raise UserError(f"--{name} {date}: not a date; write it as 2018-01-01")
    borders = {tuple(meta.get("splits") or ()) for meta in metas}
    if start is not None:
        seen = () in borders or lo < max((test for _, test in borders), default=math.inf)
        split = "in-sample" if seen else "test"
    elif len(borders) > 1 or () in borders:
        raise UserError("the checkpoints were split at different dates (or at none): name the first target by --start")
    else:
        [(val, test)] = borders
        lo, hi = (val, min(hi, test)) if split == "val" else (test, hi)
    if split != "in-sample" and lo < max(seen_until(meta) for meta in metas):
        split += ", overlap"
    if hi <= lo:
        raise UserError(f"--end {end}: not after the first target, {data.iso(lo)}; "
                        f"targets before it are in-sample and need --start")
    return split, int(lo), int(hi)


def seen_until(meta):
    """The date up to which the weights that a checkpoint was tuned from may have seen its bars, by --overlap."""
    overlap = (meta.get("data") or {}).get("overlap")
    return math.inf if overlap is True else overlap or -math.inf


def heading(t, meta):
    """What a later stage says above its scores on test."""
    return f"test: {SEEN_DATES}" if t.time.min() < seen_until(meta) else "test, which nothing above has seen"


def check(horizon, stride, paths, by):
    if horizon < 1 or paths < 2 or (stride is not None and stride < 1):
        raise UserError(f"--horizon {horizon}, --stride {stride}: must be at least 1, and --paths {paths} at least 2 "
                        f"in a backtest")
    if by not in (None, "symbol", "quarter", "volatility"):
        raise UserError(f"--by {by}: choose symbol, quarter or volatility")


def warn(t, loaded):
    """Of too few blocks for intervals, and of bars of another spacing than those of the training."""
    for what, n in (("the next bar", t.n_blocks), (f"{t.horizon} bars ahead", t.blocks_of("path"))):
        if n < MIN_BLOCKS:
            print(f"warning: no intervals for scores of {what}: {n} blocks of time, {MIN_BLOCKS} are the least; "
                  f"give more bars, or lower --stride or --horizon", file=sys.stderr)
    for name, (*_, meta) in loaded.items():
        warn_of_intervals(t.series, meta, "the weights" if len(loaded) == 1 else f"those of {name}")


if __name__ == "__main__":
    data.run(main)
