"""What forecasts are worth: checkpoints scored on bars that have happened, beside cheap opponents.

    python backtest.py --ckpt out.pt                        # on the test bars of its training data
    python backtest.py --ckpt a.pt b.pt --data other.csv --json       # several checkpoints, paired
    python backtest.py --ckpt out.pt --start 2018-07-01 --by volatility --cost_bps 5

As `backtest` goes: targets (`Targets`); forecasts of the model (`next_bars`, `simulated`) and of
its opponents (`baselines`); each score summed over blocks of time (`time_block_sums`); a bootstrap
of these blocks, all symbols of a block together (`bootstrap`); intervals (`scored`). Five symbols
and more are also scored together, as a portfolio of equal weights and as spreads of pairs
(`portfolios`).

    CRPS = E|X - y| - E|X - X'| / 2         of a law X for the outcome y, in the units of y
    log loss = -log P(what came: up, down)  of bars that moved; a coin's is log 2 = .6931
    coverage = share of outcomes within the middle 50, 80 or 90 % of their law

A forecaster is a dict of arrays; what it does not say has no score. Of the N targets:
    p_up                        P(close rises | it moves)
    mean, point                 expected and median log return
    crps, pit                   of the log return; pit: the share of its law below the outcome
    range_crps, range_pit       of log(H / L); volume_crps, volume_pit of log(1 + V)
Of the n origins of paths, at each of H bars, of the log return since the origin:
    path_point, path_crps       [n, H]
    path_pit, path_width [n, H] the outcome's place among the paths: its middle, and how wide it is
    path_rv_crps [n]            of the realized volatility over the horizon
    path_es95, path_extreme [n] expected shortfall, and the chance of an extreme move

CRPS: Gneiting and Raftery, JASA 2007. Blocks: Hall, Horowitz and Jing, Biometrika 1995.
"""
import functools
import itertools
import json
import math
import os
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import data
from backstage.bins import BinnedLaw
from backstage.copula import COMMON, move_together, stratified
from backstage.dates import iso
from backstage.door import check, heading, no_test, span_of, warn  # heading is handed on
from backstage.files import weights_hash
from backstage.grid import Bands, tick_of
from backstage.inputs import base_weights, load_series, warn_of_intervals
from backstage.opponents import (
    baselines, fit_volatility, joint_paths, log_range, log_volume, volume_scales)
from backstage.portfolio import Together
from backstage.report import jsonable
from backstage.scores import (
    MAX_BLOCKS, METRICS, MIN_BLOCKS, bootstrap, grouped, groups_of, joined, named, of_paths,
    paired, resampled, score_distribution, score_paths, scored, time_block_sums, trading_sums,
    usual_sigma)
from backstage.script import UserError, cli, pick_device, progress, run
from backstage.series import DAY, HALF_LIFE, Bars
from backstage.results import (  # all but print_backtest are handed on
    RIVALRY, best_rival, print_backtest, print_versus, show)
from backstage.trust import in_turn
from model import load_checkpoint
from sample import Calibration, Origin, calibrate, check_sampling, simulate, unmoved_share
from tokenizer import code_use


@dataclass
class Config:
    ckpt: list[str] | None = None     # checkpoints; none: the weights that come along
    data: list[str] | None = None     # bars; none: those that the first checkpoint was trained on
    symbols: list[str] | None = None  # only these
    split: str = "test"               # targets in test or val, by the checkpoints' dates
    start: str | None = None          # first date of the targets, in place of --split
    end: str | None = None            # first date after the targets
    horizon: int = 10                 # bars ahead, of the paths
    paths: int = 100                  # sampled futures of each origin
    stride: int | None = None         # bars between origins (default: horizon, or 1,000 origins)
    parallel: bool = False            # also the reasoner's forecast of all bars at once (up to 16)
    by: str | None = None             # also by symbol, quarter or volatility (where HAR sees it go)
    calibrate: bool = True            # law and P(up) mended by earlier bars, anew as time goes on
    cost_bps: float = 0.0             # cost of trading, in 1/10000 of the value traded
    seed: int = 0                     # of the sampling
    json: bool = False                # print JSON in place of the table
    device: str = "cpu"               # cpu, cuda, ...


ORIGINS = 1000  # of paths, in all, by default; but at least ten a symbol


# --------------------------------------------------------------------------------------------------
# The backtest

def backtest(checkpoints, bars, split="test", start=None, end=None, horizon=10, paths=100,
             stride=None, seed=0, parallel=False, by=None, cost_bps=0.0, device="cpu",
             calibrate=True):
    """Score checkpoints and opponents, with 95 % intervals over blocks of time.

    checkpoints: paths, or (model, tokenizer, meta) as load_checkpoint gives. bars: list of Bars.
    The rest as in Config. Returns a dict of
        split ("in-sample" for targets before a checkpoint's test, which need start; "test, overlap"
        where the weights that it was tuned from may have seen them), start, end, blocks
        checkpoints: dicts of ckpt, the scores of METRICS, tokens, portfolio
        baselines: {name: scores of METRICS}; of FHS and HAR also portfolio
        paired: dicts of a, b, metric, difference, ratio; b is also "coin", for the log loss
        by: dicts of group, ckpt, bars, the scores of BY
        scores: {name: all scores}; replicates: {name: what bootstrap gives}; targets
    portfolio: of many symbols together, see Together; None under five that share their stamps.
    A score is {value, lo, hi} or None; of path_mape, path_crps, path_coverage a list of them, one
    for each bar ahead. They are in log return x 100, of volume in its log, mape in %, shares as
    fractions. UserError without a target, for bad dates or no start.
    """
    check(horizon, stride, paths, by)
    loaded = loaded_by_name(checkpoints, device)
    for model, *_ in loaded.values():
        check_sampling(model, horizon, paths, parallel=parallel)
    split, lo, hi = span_of({name: meta for name, (*_, meta) in loaded.items()}, split, start, end)
    t = Targets([bars] if isinstance(bars, Bars) else bars, lo, hi, horizon, stride, seed)
    warn(t)
    for name, (*_, meta) in loaded.items():
        warn_of_intervals(t.series, meta, "the weights" if len(loaded) == 1 else f"those of {name}")

    trust = {name: calibrations(*triple, t) if calibrate else None
             for name, triple in loaded.items()}
    forecasts = forecasts_of(loaded, trust, t, paths, parallel)
    rivals = baselines(t, paths)
    coin = dict(coin=dict(p_up=np.full(len(t.r), 0.5)))
    replicates, scores = scores_of(forecasts | rivals | coin, t, cost_bps)
    together = portfolios(loaded, trust, t, paths, stride)

    row = {name: {metric: own.get(metric) for metric in METRICS} for name, own in scores.items()}
    return dict(
        split=split, start=iso(t.time.min()), end=iso(t.time.max()), blocks=t.n_blocks,
        checkpoints=[dict(ckpt=name, **row[name], tokens=tokens_in_use(name, loaded, t),
                          portfolio=together.get(name)) for name in forecasts],
        baselines={name: row[name] | (dict(portfolio=together[name]) if name in together else {})
                   for name in rivals},
        paired=pairs_of(list(forecasts), list(rivals), replicates, t),
        by=[dict(group=group, ckpt=name, bars=int(mask.sum()), **grouped(forecasts[name], t, mask))
            for (group, mask), name in itertools.product(groups_of(t, by), loaded)],
        scores=scores, replicates=replicates, targets=t)


def loaded_by_name(checkpoints, device):
    """{name: (model, tokenizer, meta)} of paths, or of what load_checkpoint gives."""
    loaded = {}
    for i, checkpoint in enumerate(checkpoints, 1):
        is_path = isinstance(checkpoint, (str, os.PathLike))
        name = str(checkpoint) if is_path else f"checkpoint {i}"
        loaded[name] = load_checkpoint(checkpoint, pick_device(device)) if is_path else checkpoint
    return loaded


def forecasts_of(loaded, trust, t, paths, parallel):
    """{name: forecaster} of the checkpoints; of their reasoners too, where asked for."""
    forecasts = {}
    for name, (model, tokenizer, _) in loaded.items():
        own = dict(calibration=trust[name])
        forecasts[name] = (next_bars(model, tokenizer, t, **own)
                           | simulated(model, tokenizer, t, paths, **own))
        if parallel:
            forecasts[f"{name} parallel"] = simulated(
                model, tokenizer, t, paths, parallel=True, **own)
    return forecasts


def scores_of(forecasters, t, cost_bps):
    """{name: what bootstrap gives}, {name: {score: {value, lo, hi}}}."""
    replicates, scores = {}, {}
    for name, forecaster in forecasters.items():
        sums = time_block_sums(forecaster, t)
        if "p_up" in forecaster and name not in ("always_up", "coin"):
            sums |= trading_sums(forecaster["p_up"], t, cost_bps)
        replicates[name] = bootstrap(sums, t)
        scores[name] = {metric: scored(*both, t.blocks_of(metric))
                        for metric, both in replicates[name].items()}
    return replicates, scores


def pairs_of(own, rivals, replicates, t):
    """Each checkpoint beside each other one, each opponent, and the coin."""
    pairs = []
    for a, b in itertools.combinations(own, 2):
        pairs += paired(a, b, replicates, t, METRICS)
    for a, b in itertools.product(own, rivals):
        pairs += paired(a, b, replicates, t, RIVALRY)
    for a in own:
        pairs += paired(a, "coin", replicates, t, ["logloss"])
    return pairs


def tokens_in_use(name, loaded, t):
    """How many codes the targets have, as tokenizer.code_use counts them; None for "parallel"."""
    if name not in loaded:
        return None
    tokenizer = loaded[name][1]
    tokens = torch.from_numpy(t.flat(t.tokens(tokenizer)).astype(np.int64))     # (N, 2)
    use, _ = code_use(tokenizer, *tokens.T)
    return use | dict(pairs=int(use["pairs"]))


# --------------------------------------------------------------------------------------------------
# Targets

class Targets:
    """What is to be forecast, and what came.

    series, ranges: of each symbol its Bars, and [first, last) of its targets. Of the N targets,
    symbol by symbol: r (log returns), range, volume, s (the scale s_t), time, stamp (which of the
    distinct times), symbol, time_block. Of the n origins of paths of H bars: path_r [n, H] (log
    returns since the origin), path_rv, usual (long-run volatility), path_time_block.

    A time block holds all symbols. For the next bar it is n^(1/3) bars long, of a symbol's n
    targets: whole dates of daily bars; within the day at least 32 bars, where that leaves blocks
    enough; for paths at least the horizon. weights, path_weights [REPLICATES, blocks]: how often a
    replicate draws each block.
    """

    def __init__(self, series, lo, hi, horizon, stride, seed):
        """Targets of time stamps in [lo, hi). UserError if there is none, or none moves."""
        spans = [(bars, data.targets_of(bars, "val", (lo, hi))) for bars in series]
        spans = [(bars, span) for bars, span in spans if span[0] < span[1]]
        if not spans:
            raise UserError(f"no bar to forecast from {iso(lo)} on: give other --data or --start "
                            f"(the first {data.CONTEXT} bars are context)")
        self.series, self.ranges = zip(*spans)
        self.horizon, self.seed, self.tokenized = horizon, seed, {}
        self.set_bars()
        if not self.r.any():
            raise UserError(f"no close moves from {iso(self.time.min())} to "
                            f"{iso(self.time.max())}: there is nothing to forecast; give other "
                            f"--data, --start or --end")
        self.set_paths(stride)
        self.set_time_blocks()

    def set_bars(self):
        close = [np.log(bars.ohlcva[:, 3]) for bars in self.series]
        self.returns = [np.diff(c, prepend=c[0]) for c in close]        # of all bars of a symbol
        self.r = self.flat(self.returns)
        self.range = self.flat(map(log_range, self.series))
        self.volume = self.flat(map(log_volume, self.series))
        self.slots = [data.slots_of(bars) for bars in self.series]
        factors = [slots.log_factors for slots in self.slots]
        self.s = self.flat(map(data.scales, self.series, factors))
        self.time = self.flat([bars.time for bars in self.series])
        self.stamp = np.unique(self.time, return_inverse=True)[1]
        lengths = [last - first for first, last in self.ranges]
        self.longest = max(lengths)
        self.symbol = np.repeat(np.arange(len(lengths)), lengths)

    def set_paths(self, stride):
        """Every stride-th bar is an origin, from an offset of the symbol's own: dates spread."""
        H, each = self.horizon, max(10, ORIGINS // len(self.series))
        self.stride = stride or max(H, (self.longest - H + 1) // each)
        self.origins, self.path_rows = [], []  # of each symbol: bars after which paths begin; rows
        moves, begins, usual = [], [], []
        for bars, r, (first, last) in zip(self.series, self.returns, self.ranges):
            n = last - first - H + 1
            offset = zlib.crc32(bars.symbol.encode()) % max(1, min(self.stride, n))
            origins = first - 1 + np.arange(offset, n, self.stride)
            self.path_rows.append(slice(len(usual), len(usual) + len(origins)))
            self.origins.append(origins)
            moves.append(r[origins[:, None] + np.arange(1, H + 1)])
            begins.append(bars.time[origins + 1])
            usual += [usual_sigma(bars.ohlcva[:o + 1, 3]) for o in origins]
        moves, self.begins = np.concatenate(moves), np.concatenate(begins)      # (n, H), (n,)
        self.path_r = moves.cumsum(1)
        self.path_rv = np.sqrt((moves**2).sum(1))
        self.usual = np.array(usual)

    def set_time_blocks(self):
        daily = max(np.median(np.diff(bars.time)) for bars in self.series) >= DAY
        unit, least = (DAY, 1) if daily else (1, min(HALF_LIFE, self.longest // MIN_BLOCKS))
        length = max(int(self.longest ** (1 / 3) + 1e-9), least)        # of a block, in bars
        self.n_blocks = min(self.longest // length, MAX_BLOCKS)
        self.n_path_blocks = max(1, min(self.longest // max(length, self.horizon), MAX_BLOCKS))
        units = np.unique(self.time // unit)
        self.time_block, self.path_time_block = (
            np.searchsorted(units, time // unit) * n // len(units)
            for time, n in ((self.time, self.n_blocks), (self.begins, self.n_path_blocks)))
        random = np.random.default_rng([self.seed, 1])
        self.weights = resampled(self.n_blocks, random)
        self.path_weights = resampled(self.n_path_blocks, random)

    def flat(self, values):
        """Of arrays over each symbol's bars, those of the targets: [N]."""
        return np.concatenate([v[first:last] for v, (first, last) in zip(values, self.ranges)])

    def blocks_of(self, metric):
        """How many time blocks hold what a score is made of."""
        return len(np.unique(self.path_time_block)) if of_paths(metric) else self.n_blocks

    def tokens(self, tokenizer):
        """The series' tokens, made once for each tokenizer."""
        key = weights_hash(tokenizer.state_dict())
        if key not in self.tokenized:
            self.tokenized[key] = [data.tokenize(bars, tokenizer) for bars in self.series]
        return self.tokenized[key]

    @functools.cached_property
    def states(self):
        """Of each series the States at its origins."""
        each = zip(self.series, self.origins, self.slots)
        return [data.states_at(*one, horizon=0) for one in each]

    @functools.cached_property
    def closes(self):
        """Of each series the close features of all bars: what a copula is made of."""
        return [data.features(*one)[0][:, 0] for one in zip(self.series, self.slots)]

    @functools.cached_property
    def volatility(self):
        return fit_volatility(self)


# --------------------------------------------------------------------------------------------------
# The model's forecasts

PROBES = 32  # coarse tokens of each bar whose fine tokens are read
VAL_PROBES = 8    # in their place, for the record and in the course of a training
PAST = 32    # contexts before the first target, whose mean BinnedLaw takes for the other tokens
RENEW, RENEWALS = 100, 8  # stamps after which a calibration is made anew; calibrations, at most


def calibrations(model, tokenizer, meta, t):
    """What forecasts would have as time goes on, see in_turn: [(stamp, Calibration from the bars
    before it)], from the first target on. How many stamps are to come decides how often."""
    stamps = np.unique(t.time)
    renewed = stamps[::max(RENEW, -(-len(stamps) // RENEWALS))]
    found = []
    for i, stamp in enumerate(renewed, 1):
        found.append((stamp, past_calibration(model, tokenizer, meta, t, stamp)))
        progress(f"calibrations: {i} of {len(renewed)}")
    progress("")
    return found


def past_calibration(model, tokenizer, meta, t, until):
    """The Calibration from bars before a stamp alone, and where the checkpoint's val begins before
    it, from then on: its weights were trained on those before. For weights of many markets these
    bars are most likely of another one, so that all serve."""
    past = [bars[:np.searchsorted(bars.time, until)] for bars in t.series]
    past = [bars for bars in past if len(bars)]
    splits = meta.get("splits")
    since = splits[0] if splits and not no_test(splits) and splits[0] < until else None
    return calibrate(model, tokenizer, past, since)


@torch.no_grad()
def next_bars(model, tokenizer, t, probes=PROBES, calibration=None, states=None):
    """Forecast every target from the bars before it, teacher-forced: a forecaster.

    A context is half a window at least, where there are so many bars. P(up) is exact; close, range
    and volume are counted in bins (see BinnedLaw), in units of s_t and d_t. calibration: see
    in_turn. states: past_states and hidden_states of all targets, where at hand.
    """
    past = past_states(model, tokenizer, t) if states is None else states[0]
    law, bands = BinnedLaw(model, tokenizer, past, probes), Bands(model, tokenizer)
    table = bands.table(past)
    unmoved = t.flat([unmoved_share(bars, model.config.unmoved)[:-1] for bars in t.series])
    level, width = t.flat(map(volume_scales, t.series, t.slots)).T[:, :, None]      # (N, 1) each
    half = max(1, model.config.block_size // 2)
    windows = [(i, j, min(j + half, last)) for i, (first, last) in enumerate(t.ranges)
               for j in range(first, last, half)]
    parts, done = [], 0
    ahead = hidden_states(model, tokenizer, t, windows) if states is None else states[1]
    for h in ahead:                                                                 # (m, C)
        now = slice(done, done + len(h))
        s, m, d = t.s[now, None], level[now], width[now]                            # (m, 1) each
        value = dict(
            close=np.clip(law.values["close"] * s, -data.MAX_MOVE, data.MAX_MOVE),  # (m, bins)
            range=law.values["range"] * s,
            volume=np.clip(m + law.values["volume"] * d, 0, 80))
        outcome = dict(close=t.r[now], range=t.range[now], volume=t.volume[now])
        still = torch.from_numpy(unmoved[now]).to(h.device)
        logits, p_up = h.new_empty(len(h), len(model.up_mask)), np.empty(len(h))
        for own, rows in in_turn(calibration, t.time[now]):
            own = own or Calibration()
            coarse = own.law(model, h[rows])
            stay, _ = bands.staying(coarse, table, still[rows])
            logits[rows], p = own.trusted(coarse, stay, model.up_mask)
            p_up[rows] = p.cpu().numpy()
        scores = dict(p_up=p_up.clip(1e-6, 1 - 1e-6))                   # keeps the log loss finite
        for name, p in law(h, logits).items():
            one = score_distribution(value[name], p, outcome[name])
            scores |= one if name == "close" else named(name, one)
        parts.append(scores)
        done += len(h)
        progress(f"next bars: {done:,} of {len(t.r):,}")
    progress("")
    return joined(parts)


def past_states(model, tokenizer, t):
    """Hidden states [PAST, C] at bars spread evenly over all those before the first target."""
    n_past = [np.searchsorted(bars.time, t.time.min()) for bars in t.series]
    ends = np.cumsum(np.maximum(n_past, 1) - 1)         # a symbol's first bar has no past
    every = np.unique(((np.arange(PAST) + 0.5) / PAST * ends[-1]).astype(int))
    symbol = np.searchsorted(ends, every, side="right")
    bar = every - np.append(0, ends)[symbol] + 1
    windows = [(i, j, j + 1) for i, j in zip(symbol, bar)]
    return torch.cat(list(hidden_states(model, tokenizer, t, windows)))


def hidden_states(model, tokenizer, t, windows):
    """Yield h [m, C], m <= 64, that forecast the targets [j, end) of windows (symbol, j, end)."""
    n, tokens, device = model.config.block_size, t.tokens(tokenizer), model.up_mask.device
    for k in range(0, len(windows), 16):
        pairs, times, wanted = [], [], []
        for i, j, end in windows[k:k + 16]:
            begin = max(0, j + max(1, n // 2) - n)
            rows = np.minimum(begin + np.arange(n), len(tokens[i]) - 1)     # past the end: unused
            pairs.append(tokens[i][rows].astype(np.int64))
            times.append(t.series[i].time[rows])
            wanted.append(slice(j - 1 - begin, end - 1 - begin))
        coarse, fine = torch.from_numpy(np.stack(pairs)).to(device).unbind(-1)      # (B, n)
        h = model.hidden(coarse, fine, torch.from_numpy(np.stack(times)).to(device))  # (B, n, C)
        yield from torch.cat([row[places] for row, places in zip(h, wanted)]).split(64)


def simulated(model, tokenizer, t, paths, parallel=False, calibration=None):
    """Forecast the log returns over the horizon from every origin: a forecaster. calibration: see
    in_turn."""
    origins, parts, done = origins_at(model, tokenizer, t), [], []
    for own, places in in_turn(calibration, t.begins):
        for rows in np.split(places, range(256, len(places), 256)):
            part = [origins[i] for i in rows]
            ohlcva, _ = simulate(
                model, tokenizer, part, t.horizon, paths, seed=t.seed, parallel=parallel,
                joint=False, calibration=own)                                   # (n, K, H, 6)
            parts.append(score_paths(log_returns(ohlcva, part), t, rows))
            done += list(rows)
            progress(f"paths: {len(done):,} of {len(origins):,} origins")
    progress("")
    return {name: value[np.argsort(done)] for name, value in joined(parts).items()} if parts else {}


def origins_at(model, tokenizer, t):
    """An Origin for each of the n paths, with the model's context."""
    return [origin for i, (at, states) in enumerate(zip(t.origins, t.states))
            for origin in origins_after(model, tokenizer, t, i, at, states)]


def origins_after(model, tokenizer, t, i, at, states):
    """Origins after the bars `at` [n] of symbol i, with the model's context."""
    bars, tokens, n = t.series[i], t.tokens(tokenizer)[i], model.config.block_size
    unmoved, origins = unmoved_share(bars, model.config.unmoved), []
    for o, state in zip(at, states):
        context = torch.from_numpy(tokens[max(0, o + 1 - n):o + 1].astype(np.int64))
        last = slice(max(0, o + 1 - COMMON), o + 1)
        origins.append(Origin(
            bars.symbol, context, bars.time[:o + 1], state, t.slots[i], unmoved[o + 1],
            tick_of(bars.ohlcva[last, 3]), t.closes[i][last]))
    return origins


# --------------------------------------------------------------------------------------------------
# Many symbols together

def portfolios(loaded, trust, t, paths, stride):
    """{name: scores of a portfolio and of spreads} of the checkpoints, FHS and HAR, see Together;
    {} where no FEWEST symbols share their stamps."""
    together = Together(t, stride)
    if not together.n_dates:
        return {}
    return together.score(paths_together(loaded, trust, t, together, paths))


def paths_together(loaded, trust, t, together, paths):
    """{name: log returns [J, paths, H]} of paths that move together; FHS and HAR by the copula of
    the model's."""
    moves = {}
    for name, (model, tokenizer, _) in loaded.items():
        origins, parts = joint_origins(t, together, model, tokenizer), []
        for d in range(together.n_dates):
            part = list(origins[together.date == d])
            i, o = (a[together.start[d]] for a in (together.symbol, together.bar))
            [(own, _)] = in_turn(trust[name], t.series[i].time[o + 1:o + 2])
            ohlcva, _ = simulate(
                model, tokenizer, part, t.horizon, paths, seed=t.seed, calibration=own)
            parts.append(log_returns(ohlcva, part))
            progress(f"symbols together: {d + 1} of {together.n_dates} dates")
        moves[name] = np.concatenate(parts)
    progress("")
    return moves | joint_paths(t, together, np.stack(uniform_numbers(t, together, paths)))


def joint_origins(t, together, model, tokenizer):
    """The Origins of the J places."""
    origins = np.empty(len(together.bar), object)
    for i in np.unique(together.symbol):
        rows = together.symbol == i
        at = together.bar[rows]
        states = data.states_at(t.series[i], at, t.slots[i], horizon=0)
        origins[rows] = origins_after(model, tokenizer, t, i, at, states)
    return origins


def uniform_numbers(t, together, paths):
    """J of [paths, H]: numbers that move together, as those do by which the model's paths are
    drawn."""
    pasts = [SimpleNamespace(symbol=t.series[i].symbol, time=t.series[i].time[:o + 1],
                             closes=t.closes[i][max(0, o + 1 - COMMON):o + 1])
             for i, o in zip(together.symbol, together.bar)]
    seeds = [[t.seed, zlib.crc32(past.symbol.encode()), int(abs(past.time[-1])), 5]
             for past in pasts]
    uniform = [stratified(np.random.default_rng(seed), paths, t.horizon) for seed in seeds]
    move_together(uniform, pasts, np.zeros((len(pasts), t.horizon), np.int64), t.seed)
    return [u[..., 0] for u in uniform]


def log_returns(ohlcva, origins):
    """Log returns [n, K, H] of paths [n, K, H, 6] after their origins."""
    last = np.log([o.state.close for o in origins])[:, None, None]
    close = np.log(ohlcva[..., 3])
    return np.diff(close, prepend=np.broadcast_to(last, (*close.shape[:2], 1)))


# --------------------------------------------------------------------------------------------------
# The run, and its table

def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
    config.ckpt = config.ckpt or [base_weights(config.data)]
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    if not math.isfinite(config.cost_bps):
        raise UserError(f"--cost_bps {config.cost_bps}: must be a number such as 5")
    series = load_series(config.data, load_checkpoint(config.ckpt[0])[2], config.symbols)
    result = backtest(
        config.ckpt, series, config.split, config.start, config.end, config.horizon, config.paths,
        config.stride, config.seed, config.parallel, config.by, config.cost_bps, config.device,
        config.calibrate)
    if not config.json:
        print_backtest(result, config.horizon, config.cost_bps)
        return
    hidden = {"scores", "replicates", "targets"} | (set() if config.by else {"by"})
    print(json.dumps(jsonable({k: value for k, value in result.items() if k not in hidden})))


if __name__ == "__main__":
    run(main)
