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
import functools
import itertools
import json
import math
import os
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

import data
from backstage.checkpoint import SEEN_DATES
from backstage.dates import iso, parse_time
from backstage.files import weights_hash
from backstage.opponents import baselines, fit_volatility, log_range, log_volume
from backstage.scores import (
    MAX_BLOCKS, METRICS, MIN_BLOCKS, RATIOS, WARN, against, at_step, block_sums, bootstrap, grouped, groups_of, joined,
    judge, judge_paths, named, of_paths, paired, resampled, scored, trading_sums, usual_sigma)
from backstage.script import UserError, cli, pick_device, progress, run
from backstage.series import DAY, HALF_LIFE, Bars, decayed_sum
from model import load_checkpoint
from sample import (
    Origin, base_weights, by_close, jsonable, load_series, median_path, simulate, unmoved_share,
    warn_of_intervals)
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
    parallel: bool = False             # also the latent reasoner's forecast of all bars at once (at most 16)
    by: str | None = None              # scores by symbol, quarter or volatility (falling or rising, as HAR has it) too
    cost_bps: float = 0.0              # cost of trading, in 1/10000 of the value traded
    seed: int = 0                      # of the sampling
    json: bool = False                 # print JSON in place of the table
    device: str = "cpu"                # cpu, cuda, ...


RIVALRY = dict(da="right calls %", logloss="log loss", mae="close MAE", crps="close CRPS", range_crps="range CRPS",
               volume_crps="volume CRPS", path_crps="paths CRPS", path_rv_crps="paths volatility")  # with opponents

ORIGINS = 1000                    # of paths, in all, by default; but at least ten a symbol


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
            loaded[str(checkpoint)] = load_checkpoint(checkpoint, pick_device(device))
        else:
            loaded[f"checkpoint {i}"] = checkpoint
    split, lo, hi = span_of([meta for *_, meta in loaded.values()], split, start, end)
    t = Targets([bars] if isinstance(bars, Bars) else bars, lo, hi, horizon, stride, seed)
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
    return dict(split=split, start=iso(t.time.min()), end=iso(t.time.max()), blocks=t.n_blocks,
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
            raise UserError(f"no bar to forecast from {iso(lo)} on: give other --data or --start "
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
        self.slots = [data.slots_of(bars) for bars in self.series]
        factors = [slots.log_factors for slots in self.slots]
        self.s = self.flat(map(data.scales, self.series, factors))      # the scale s_t, known before the bar
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
        unit, least = (DAY, 1) if daily else (1, min(HALF_LIFE, longest // MIN_BLOCKS))
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
        key = weights_hash(tokenizer.state_dict())
        if key not in self.tokenized:
            self.tokenized[key] = [data.tokenize(bars, tokenizer) for bars in self.series]
        return self.tokenized[key]

    @functools.cached_property
    def states(self):
        """Of each series the States at its origins."""
        return [data.states_at(*one, horizon=0) for one in zip(self.series, self.origins, self.slots)]

    @functools.cached_property
    def volatility(self):
        return fit_volatility(self)


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
    level, width = t.flat(map(volume_scales, t.series, t.slots)).T[:, :, None]  # (N, 1) each
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
        progress(f"next bars: {done:,} of {len(t.r):,}")
    progress("")
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
        hidden = model.hidden(coarse, fine, torch.from_numpy(np.stack(times)).to(device))
        yield from torch.cat([row[places] for row, places in zip(hidden, wanted)]).split(64)


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


def simulated(model, tokenizer, t, paths, parallel=False):
    """Forecast the log returns over the horizon from every origin."""
    origins, parts = origins_of(model, tokenizer, t), []
    for i in range(0, len(origins), 256):
        part = origins[i:i + 256]
        ohlcva, _ = simulate(model, tokenizer, part, t.horizon, paths, seed=t.seed, parallel=parallel)
        last = np.log([o.state.close for o in part])[:, None, None]
        moves = np.diff(np.log(ohlcva[..., 3]), prepend=np.broadcast_to(last, (len(part), paths, 1)))
        parts.append(judge_paths(moves, t, slice(i, i + len(part))))
        progress(f"paths: {i + len(part):,} of {len(origins):,} origins")
    progress("")
    return joined(parts) if parts else {}


def median_paths(model, tokenizer, t):
    """The median-token path from every origin (see sample.median_path), as a forecaster of a point."""
    origins = origins_of(model, tokenizer, t)
    close = median_path(model, tokenizer, origins, t.horizon)[..., 3]   # (n, H)
    point = np.log(close) - np.log([o.state.close for o in origins])[:, None]
    return dict(path_point=point, path_crps=np.abs(t.path_r - point))


def origins_of(model, tokenizer, t):
    """An Origin for each of the n paths, with the model's context."""
    n, origins = model.config.block_size, []
    every = zip(t.series, t.tokens(tokenizer), t.origins, t.states, t.slots)
    for bars, tokens, at, states, slots in every:
        unmoved = unmoved_share(bars, model.config.unmoved)
        for o, state in zip(at, states):
            context = torch.from_numpy(tokens[max(0, o + 1 - n):o + 1].astype(np.int64))
            time = bars.time[:o + 1]
            origins.append(Origin(bars.symbol, context, time, state, slots, unmoved[o + 1]))
    return origins


# ----------------------------------------------------------------------------------------------------------------------
# The run, and its table

def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
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
        raise UserError(f"no symbol has a bar in {split} (val from {iso(borders[0])}, test from "
                        f"{iso(borders[1])}); give --data that reach there")
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
    print(f"targets {iso(t.time.min())} to {iso(t.time.max())}: {len(t.r):,} bars, {t.n_blocks} blocks; "
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
    lo = -math.inf if start is None else parse_time(start)
    hi = 2**62 if end is None else parse_time(end)
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
        raise UserError(f"--end {end}: not after the first target, {iso(lo)}; "
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
    run(main)
