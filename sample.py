"""What a checkpoint can show: forecasts, their report and pictures.

    python sample.py --data bars.csv             # with the weights that come along, assets/base.pt
    python sample.py --ckpt out.pt               # a table: one row a symbol, ten bars ahead
    python sample.py --data other.csv --symbols AAPL MSFT --horizon 20 --out forecast.csv
    python sample.py --strike 1.05x --strike 100 --rate 0.04          # European options
    python sample.py --plot forecast.svg --plot_codebook codebook.svg --plot_loss loss.svg

A forecast is a set of sampled futures, called paths. A symbol's context is read once
(`Model.prefill`) for all of them; each then costs one recurrent step a bar. Token pairs decode to
features, features to bars (`data.inverse`), so that every bar is a valid candle. The next bar's
P(up) is exact, without sampling. What forecasts are worth: `backtest.py`.
"""
import functools
import json
import math
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

import data
from backstage.clock import times_ahead
from backstage.files import write_atomic
from backstage.frame import check_histories
from backstage.grid import Bands, on_grid, tick_of
from backstage.inputs import (
    check, check_outputs, load_series, read_times, trained_until, warn_of_intervals)
from backstage.opponents import har
from backstage.pictures import plot_codebook, plot_forecast, plot_loss
from backstage.report import (  # summary is handed on
    describe, give_ranks, jsonable, portfolio_of, print_portfolio, print_record, print_report,
    summary, weights_of, write_csv)
from backstage.scores import bootstrap, time_block_sums
from backstage.script import UserError, cli, pick_device, run
from model import load_checkpoint


@dataclass
class Config:
    ckpt: str | None = None            # checkpoint; none: the weights that come along
    data: list[str] | None = None      # bars; none: those that the checkpoint was trained on
    symbols: list[str] | None = None   # only these
    horizon: int = 10                  # bars ahead
    paths: int = 200                   # sampled futures of each symbol
    times: str | None = None           # file of the stamps to come, where the clock would err
    temperature: float = 1.0           # of the paths; below 1: bolder, above: more spread
    top_p: float = 1.0                 # of the paths: among the likeliest tokens of this mass
    parallel: bool = False             # all bars (at most 16) in one pass of the reasoner
    joint: bool = True                 # paths of symbols with the same stamps move together
    calibrate: bool = True             # trust in P(up) as these bars' past has it; the record
    weights: list[str] | None = None   # AAPL=0.6 MSFT=0.4, or a CSV of them; none: equal
    seed: int = 0                      # of the sampling
    strike: list[str] | None = None    # of European options: a price, or a share such as 1.05x
    rate: float = 0.0                  # annual, continuous, for the options
    json: bool = False                 # print JSON in place of the table
    out: str | None = None             # write quantiles of close, medians of all columns, CSV
    paths_out: str | None = None       # write all paths as .npz
    plot: str | None = None            # write candles and the fan of the forecast as SVG
    plot_codebook: str | None = None   # write the most used coarse codes as candles, SVG
    plot_loss: str | None = None       # write the training's losses as SVG
    overwrite: bool = False            # replace existing output files
    backtest: bool = False             # scores of forecasts: see python backtest.py
    device: str = "cpu"                # cpu, cuda, ...


BATCH_BYTES = 2**27  # memory for the states of the paths that are generated side by side
BATCH_ORIGINS = 16   # contexts read side by side
COMMON = 500         # last bars from which the correlation of symbols is known
HALF_PAST = 125      # bars back that count half in it
FEWEST = 20          # common bars without which a pair has the mean correlation
RECORD, RECORD_PAST = 4000, 200  # bars of the record, in all; bars before it, of each symbol
WINDOWS = 32         # contexts that a calibration reads, each for the later half of its bars
TIME_BLOCKS = 40     # of the bars of a calibration, over which its errors are computed
PRIOR_TRUST, PRIOR_ERROR = 0.5, 0.25  # in P(up), where the past is too short to tell
LAWS = 32            # bars whose fine codes are read in full in a calibration
STANDS = 0.9         # share of unmoved bars above which nothing is said of direction
PRIOR_BARS = 32  # bars that the share of unmoved bars in training counts for, beside a symbol's own


# --------------------------------------------------------------------------------------------------
# Simulation

@dataclass
class Origin:
    """Where futures begin."""
    symbol: str
    tokens: torch.Tensor   # int64 [L, 2]: coarse, fine of the last bars, the context
    time: np.ndarray       # int64 [T]: stamps of all bars up to there
    state: data.State      # decodes the next bar
    slots: data.Slots      # factors of the bars to come, of a series whose bars begin with these
    unmoved: float         # share of bars that do not move, see unmoved_share
    tick: float = 0.0      # prices lie on its multiples, see tick_of; 0: on none
    closes: np.ndarray | None = None  # [at most COMMON]: close features of the last bars, for joint

    def anchored(self, times):
        """The state with the factors of bars at the stamps times int64 [H], as known here."""
        return self.state.anchored(self.slots.coming(len(self.time) - 1, times))


@dataclass
class Calibration:
    """Trust in P(up), from the past of the series at hand: logit P' = a + k (logit P - mean)."""
    a: float = 0.0       # log odds of a rise, whatever the model says
    k: float = 1.0       # trust in what it says, from 0 to 1
    mean: float = 0.0    # of logit P over the past bars
    n_bars: int = 0      # of these that moved

    def logits(self, model, h, stay):
        """Coarse logits [..., 2^k1] for h [..., C], and P(up | moved) [...], both calibrated.

        stay [..., 2^k1]: the share of each code's candles that does not move, see staying. The odds
        of up against other tokens change; among up tokens, and among the others, the law stays.
        """
        logits = model.coarse_logits(h).float()
        moving = logits.softmax(-1) * (1 - stay)                                # [..., 2^k1]
        up = (moving * model.up_mask).sum(-1).double()
        p_up = (up / moving.sum(-1).double().clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)
        trusted = (self.a + self.k * (p_up.logit() - self.mean)).sigmoid()
        shift = trusted.logit() - p_up.logit()
        return logits + shift.float()[..., None] * model.up_mask, trusted


def forecast(model, tokenizer, bars, horizon, paths, temperature=1.0, top_p=1.0, seed=0):
    """Futures of one series: float64 [paths, horizon, 6] (open, high, low, close, volume, amount).
    See simulate."""
    return simulate(model, tokenizer, [bars], horizon, paths, temperature, top_p, seed)[0][0]


@torch.no_grad()
def simulate(model, tokenizer, histories, horizon, paths, temperature=1.0, top_p=1.0, seed=0,
             parallel=False, times=None, joint=True, calibration=None):
    """Futures of many histories at once.

    histories: Bars that end where the future begins, or Origins. Returns ohlcva float64
    [n, paths, horizon, 6], in the units of the bars, and P(next close up | it moves) [n], NaN where
    nearly nothing moved. times: stamps of the bars to come, int64 [horizon] or [n, horizon], in
    place of future_times. joint: path i of all symbols with the same next stamps is one future of
    the market (see move_together); what a symbol's first bar may be depends on (seed, symbol, last
    stamp) and its bars alone. calibration: see calibrate. UserError for what cannot be.
    """
    if horizon < 1 or paths < 1:
        raise UserError(f"horizon {horizon}, paths {paths}: each must be at least 1")
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: they must be above 0, "
                        f"top_p at most 1")
    if parallel and model.config.reasoner and horizon > model.config.latents:
        raise UserError(f"--parallel reaches {model.config.latents} bars, not {horizon}; "
                        f"lower --horizon or forecast step by step")
    check_histories(histories)
    origins = [past if isinstance(past, Origin) else origin_of(model, tokenizer, past)
               for past in histories]
    times = times_ahead(origins, horizon, times)  # (n, H)
    order = by_close(tokenizer).to(model.up_mask.device)
    bands = Bands(model, tokenizer)

    def draw(h, u, stay):
        """Coarse and fine tokens [...] for h [..., C], by uniform numbers u [..., 2]."""
        logits = calibration.logits(model, h, stay)[0] if calibration else None
        return model.sample(h, temperature, top_p, u=u, order=order, logits=logits)

    uniform = [stratified(np.random.default_rng([seed, zlib.crc32(o.symbol.encode()),
                                                 int(abs(o.time[-1]))]), paths, horizon)
               for o in origins]                                            # n of (paths, H, 2)
    if joint:
        move_together(uniform, origins, times, seed)
    at_once = rows_at_once(model)
    size = max(1, min(BATCH_ORIGINS, at_once // paths))
    ohlcva, p_up = np.empty((len(origins), paths, horizon, 6)), np.empty(len(origins))
    lengths = np.array([len(o.tokens) for o in origins])
    for length in np.unique(lengths):  # contexts of one length go side by side
        alike = np.flatnonzero(lengths == length)
        for rows in np.split(alike, range(size, len(alike), size)):
            part = [origins[i] for i in rows]
            u = torch.from_numpy(np.concatenate([uniform[i] for i in rows]))
            tokens, p_up[rows], width = draw_tokens(
                model, part, times[rows], u, draw, parallel, at_once, calibration or Calibration(),
                bands)
            x = tokenizer.decode(*tokens).cpu().numpy().reshape(len(part), paths, horizon, 6)
            x[..., 0][np.abs(x[..., 0]) <= width[:, None, None]] = 0.0          # the close stays
            state = data.State.stack([o.anchored(row) for o, row in zip(part, times[rows])])
            ohlcva[rows], _ = data.inverse(x, state)
            for i, o in zip(rows, part):
                on_grid(ohlcva[i], float(o.state.close), o.tick)
    return ohlcva, p_up


def origin_of(model, tokenizer, bars):
    """The Origin after all of the bars."""
    if len(bars) < 2:
        raise UserError(f"{bars.symbol}: {len(bars)} bar is too short a history; "
                        f"at least 2 are needed")
    slots = data.slots_of(bars)
    x, state = data.features(bars, slots)
    tokens = torch.stack(tokenizer.encode(torch.from_numpy(x[-model.config.block_size:])), -1)
    unmoved = unmoved_share(bars, model.config.unmoved)[-1]
    return Origin(bars.symbol, tokens, bars.time, state, slots, unmoved,
                  tick_of(bars.ohlcva[-COMMON:, 3]), x[-COMMON:, 0])


def draw_tokens(model, origins, times, uniform, draw, parallel, at_once, calibration, bands):
    """Of n origins with contexts of one length: [coarse, fine], int64 [n * paths, H] each, P(up)
    [n], and how wide a move must be, [n]. uniform [n * paths, H, 2]: what they are drawn by."""
    device, (n, horizon), paths = model.up_mask.device, times.shape, len(uniform) // len(times)
    coarse, fine = torch.stack([o.tokens for o in origins]).to(device).unbind(-1)  # (n, L)
    seen = torch.from_numpy(np.stack([o.time[-coarse.shape[1]:] for o in origins])).to(device)
    times = torch.from_numpy(times).to(device)
    if parallel:
        h, ahead = model.parallel(coarse, fine, seen, times)
    else:
        state = model.prefill(coarse, fine, seen)
        h = state.h
    unmoved = torch.tensor([o.unmoved for o in origins], device=device)
    each = [bands.staying(row, bands.table(row), share)
            for row, share in zip(h.split(1), unmoved.split(1))]
    stay, width = (torch.cat(column) for column in zip(*each))              # (n, 2^k1), (n,)
    p_up = calibration.logits(model, h, stay)[1]
    p_up = p_up.masked_fill(unmoved > STANDS, math.nan).cpu().numpy()

    uniform = uniform.to(device)
    if parallel:
        uniform = uniform.view(n, paths, horizon, 2).transpose(1, 2)        # (n, H, paths, 2)
        tokens = draw(ahead, uniform, stay[:, None])                        # 2 of (n, H, paths)
        return [token.transpose(1, 2).flatten(0, 1) for token in tokens], p_up, width.cpu().numpy()
    times = times.repeat_interleave(paths, 0)                               # (n * paths, H)
    stay = stay.repeat_interleave(paths, 0)                                 # (n * paths, 2^k1)
    size = at_once if n == 1 else n * paths  # several origins fit; the paths of one may not
    pieces = []
    for when, u, share in zip(*(a.split(size) for a in (times, uniform, stay))):
        own_draw = functools.partial(draw, stay=share)
        pieces.append(generate(model, state.repeat(len(u) // n), when, u, own_draw))
    return [torch.cat(level) for level in zip(*pieces)], p_up, width.cpu().numpy()


def generate(model, state, times, uniform, draw):
    """Sample futures step by step: times int64 [N, H], uniform numbers [N, H, 2] -> coarse, fine
    int64 [N, H].

    state: of N rows, from `Model.prefill(...).repeat`, changed in place. draw: from h and uniform
    numbers to tokens.
    """
    tokens = []
    for k in range(times.shape[1]):
        tokens.append(draw(state.h, uniform[:, k]))
        if k + 1 < times.shape[1]:
            _, state = model.step(*tokens[-1], times[:, k:], state)
    return [torch.stack(level, dim=-1) for level in zip(*tokens)]


# --------------------------------------------------------------------------------------------------
# A forecast that knows its record
#
# Before it speaks, the model says P(up) of the last bars that the series already have, each from
# the bars before it alone. With x = logit P - mean and y whether the close rose, logistic
# regression gives
#
#     logit P' = a + k x
#     a <- a (1 - (e_a / a)^2)+,      k <- (k / e_k^2 + k0 / e0^2) / (1 / e_k^2 + 1 / e0^2)
#
# each shrunk by its own error e over blocks of time (James and Stein 1961 for a; for k the
# posterior mean from a prior k0 +- e0, cut to [0, 1]), since one market rewards what the model says
# and the next does not.

@torch.no_grad()
def calibrate(model, tokenizer, histories, since=None):
    """The Calibration of P(up) from the last bars of histories (Bars), some WINDOWS contexts of
    them.

    since: stamp of the first bar to learn from, where the weights were trained on those before it.
    Few bars leave the prior: half the trust, no bias.
    """
    check_histories(histories)
    n, share = model.config.block_size, max(1, len(histories) // WINDOWS)
    logits, rose, stamps, bands = [], [], [], Bands(model, tokenizer)
    laws = max(1, LAWS // len(histories[::share]))
    for bars in histories[::share]:
        known = 0 if since is None else np.searchsorted(bars.time, since)
        first = max(data.CONTEXT, known)
        each = max(1, WINDOWS // len(histories)) * (n // 2)
        first = max(first, len(bars) - each)
        if first >= len(bars):
            continue
        begin = max(0, first - n)                                           # context reaches back
        tokens = data.tokenize(bars[begin:], tokenizer, data.features(bars)[0][begin:])
        unmoved, table = unmoved_share(bars, model.config.unmoved), None
        for at in range(first, len(bars), n // 2):                          # targets at .. end
            end = min(at + n // 2, len(bars))
            context = slice(max(0, end - 1 - n - begin), end - 1 - begin)
            coarse, fine = torch.from_numpy(tokens[context].astype(np.int64)).T[:, None]
            time = torch.from_numpy(bars.time[context.start + begin:context.stop + begin].copy())
            device = model.up_mask.device
            h = model.hidden(coarse.to(device), fine.to(device), time[None].to(device))
            h = h[0, at - end:]                                             # (end - at, C)
            if table is None:
                table = bands.table(h[::-(-len(h) // laws)])
            u = torch.from_numpy(unmoved[at:end]).to(device)
            p_up = Calibration().logits(model, h, bands.staying(h, table, u)[0])[1]
            change = np.diff(bars.ohlcva[at - 1:end, 3])
            moved = torch.from_numpy(change != 0).to(device)
            logits.append(p_up.logit()[moved].cpu().numpy())
            rose.append((change > 0)[change != 0])
            stamps.append(bars.time[at:end][change != 0])
    if not logits or not sum(map(len, logits)):
        return Calibration(k=PRIOR_TRUST)
    return trust(*map(np.concatenate, (logits, rose, stamps)))


def trust(logit, rose, stamp):
    """The Calibration from logit P(up) [N] of past bars that moved, whether they rose, their
    stamps."""
    mean = logit.mean()
    X, theta = np.stack([np.ones(len(logit)), logit - mean], 1), np.zeros(2)
    block = np.searchsorted(np.unique(stamp), stamp) * TIME_BLOCKS // len(np.unique(stamp))
    for _ in range(20):                                                     # Newton's method
        p = 1 / (1 + np.exp(-X @ theta))
        H = (X * (p * (1 - p))[:, None]).T @ X + 1e-6 * np.eye(2)
        theta = np.clip(theta + np.linalg.solve(H, X.T @ (rose - p)), -5, 5)
    sums = np.stack([np.bincount(block, (rose - p) * column, TIME_BLOCKS) for column in X.T], 1)
    inverse = np.linalg.inv(H)
    cov = inverse @ (sums.T @ sums) @ inverse                               # (2, 2), sandwich
    (a, k), (var_a, var_k) = theta, np.maximum(np.diag(cov), np.diag(inverse))
    a *= max(0.0, 1 - var_a / max(a * a, 1e-12))
    k = (k / var_k + PRIOR_TRUST / PRIOR_ERROR**2) / (1 / var_k + 1 / PRIOR_ERROR**2)
    return Calibration(float(a), float(min(1.0, max(0.0, k))), float(mean), len(logit))


@torch.no_grad()
def median_path(model, tokenizer, origins, horizon):
    """The point path of each Origin: ohlcva float64 [n, horizon, 6].

    Each bar is the median token: the coarse one at the median of the close, its likeliest fine one.
    The likeliest coarse token would be a bad point: among codes that look alike it is chance.
    """
    order = by_close(tokenizer).to(model.up_mask.device)

    def median_token(h, _):
        cumulative = model.coarse_logits(h).float().softmax(-1)[..., order].cumsum(-1)
        coarse = order[(cumulative < 0.5).sum(-1).clamp(max=len(order) - 1)]
        return coarse, model.fine_logits(h, coarse).argmax(-1)

    ohlcva, when = np.empty((len(origins), horizon, 6)), times_ahead(origins, horizon, None)
    lengths = np.array([len(o.tokens) for o in origins])
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for rows in np.split(alike, range(BATCH_ORIGINS, len(alike), BATCH_ORIGINS)):
            part, times = [origins[i] for i in rows], torch.from_numpy(when[rows]).to(order.device)
            coarse, fine = torch.stack([o.tokens for o in part]).to(order.device).unbind(-1)
            seen = torch.from_numpy(np.stack([o.time[-length:] for o in part])).to(order.device)
            state = model.prefill(coarse, fine, seen)
            tokens = generate(model, state, times, torch.zeros(len(part), horizon), median_token)
            x = tokenizer.decode(*tokens).cpu().numpy()[:, None]            # (n, 1, horizon, 6)
            start = data.State.stack([o.anchored(row) for o, row in zip(part, when[rows])])
            ohlcva[rows] = data.inverse(x, start)[0][:, 0]
    return ohlcva


def stratified(random, paths, horizon):
    """Uniform numbers float32 [paths, horizon, 2] for one origin: two halves, independent of each
    other.

    Each is a Latin hypercube (McKay, Beckman and Conover, Technometrics 1979): a path is a fair
    draw of the model, but at each step a half's n paths fall one into each n-th of the
    distribution, so that means and shares vary less.
    """
    halves = []
    for n in (paths // 2, paths - paths // 2):
        rows = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None], (n, 2 * horizon))
        rows = random.permuted(rows, axis=0)  # each column in an order of its own
        halves.append((rows + random.random(rows.shape, np.float32)) / max(n, 1))
    return np.concatenate(halves).reshape(paths, horizon, 2)


# Paths that move together. At each step the pairs of numbers that bars are drawn by keep their
# values and change their order, to that of a Gaussian copula (Iman and Conover, Communications in
# Statistics 1982):
#
#     Z ~ N(0, R),    u_i <- sorted(u_i)[rank of Z_i]
#     R = w C + (1 - w) mean C,    w = t^2 / (t^2 + e^2)
#
# C: correlations of the normal scores of past closes, a bar HALF_PAST bars back of half the weight;
# e: their standard errors; t: how much they truly differ (shrinkage to a constant correlation, as
# Ledoit and Wolf, Journal of Portfolio Management 2004).

def move_together(uniform, origins, times, seed):
    """Reorders, in place, the numbers [paths, H, 2] of the n origins that share their next stamps.

    Each half of the paths by itself, so that the halves stay independent. times: int64 [n, H].
    """
    groups = {}
    for i, o in enumerate(origins):
        if o.closes is not None:
            groups.setdefault((int(o.time[-1]), times[i].tobytes()), []).append(i)
    for (stamp, _), rows in groups.items():
        if len(rows) < 2:
            continue
        factor = np.linalg.cholesky(correlation([origins[i] for i in rows]))
        random = np.random.default_rng([seed, abs(stamp), len(rows)])
        paths, horizon, _ = uniform[rows[0]].shape
        for half in (slice(0, paths // 2), slice(paths // 2, paths)):
            u = np.stack([uniform[i][half] for i in rows], -2)              # (K, H, n, 2)
            z = random.standard_normal((horizon, len(u), len(rows))) @ factor.T     # (H, K, n)
            rank = z.argsort(1).argsort(1).swapaxes(0, 1)                   # (K, H, n)
            u = np.take_along_axis(u, u[..., :1].argsort(0), 0)             # in order of the first
            u = np.take_along_axis(u, rank[..., None], 0)
            for k, i in enumerate(rows):
                uniform[i][half] = u[:, :, k]


def correlation(origins):
    """R [n, n] of the closes of n origins, positive definite, from their last COMMON stamps."""
    scores = normal_scores(origins)                                         # (n, T)
    known, scores = (~np.isnan(scores)).astype(float), np.nan_to_num(scores)
    weight = 0.5 ** (np.arange(scores.shape[1])[::-1] / HALF_PAST)          # (T,)
    variance = (scores**2 * weight) @ known.T                               # of i, beside j
    C = (scores * weight) @ scores.T / np.sqrt(np.maximum(variance * variance.T, 1e-12))
    C, common = C.clip(-1, 1), known @ known.T
    bars = (known * weight @ known.T)**2 / np.maximum(known * weight**2 @ known.T, 1e-12)
    error = (1 - C**2)**2 / np.maximum(bars, 1)                             # squared
    pairs = ~np.eye(len(C), dtype=bool) & (common >= FEWEST)
    if not pairs.any():
        return np.eye(len(C))
    mean = np.average(C[pairs], weights=bars[pairs])
    spread = max(0.0, ((C[pairs] - mean)**2 - error[pairs]).mean())
    w = np.where(common >= FEWEST, spread / np.maximum(spread + error, 1e-12), 0.0)
    return definite(w * C + (1 - w) * mean)


def normal_scores(origins):
    """Of each origin's closes at the last COMMON stamps the normal scores of their ranks, NaN where
    there is no bar: [n, T]."""
    stamps = np.unique(np.concatenate([o.time[-len(o.closes):] for o in origins]))[-COMMON:]
    scores = np.full((len(origins), len(stamps)), np.nan)
    for row, o in zip(scores, origins):
        time = o.time[-len(o.closes):]
        known = time >= stamps[0]
        rank = o.closes[known].argsort().argsort()
        level = torch.from_numpy((rank + 0.5) / max(1, len(rank)))
        row[np.searchsorted(stamps, time[known])] = torch.special.ndtri(level).numpy()
    return scores


def definite(R):
    """R [n, n] with a diagonal of 1 and no eigenvalue below 1e-4, as it can come of pairs that have
    not the same bars in common."""
    np.fill_diagonal(R, 1.0)
    value, vector = np.linalg.eigh(R)
    if value[0] >= 1e-4:
        return R
    R = (vector * np.maximum(value, 1e-4)) @ vector.T
    size = np.sqrt(np.diag(R))
    return R / (size * size[:, None])


def rows_at_once(model):
    """How many paths' states BATCH_BYTES hold."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.up_mask.device)
    n_bytes, parts = 0, [vars(model.prefill(token, token, token))]
    while parts:
        part = parts.pop()
        if torch.is_tensor(part):
            n_bytes += part.nbytes
        elif isinstance(part, (dict, list, tuple)):
            parts += part.values() if isinstance(part, dict) else part
    return max(1, BATCH_BYTES // n_bytes)


def by_close(tokenizer):
    """The coarse tokens int64 [2^k1] by rising close: the order in which Model.sample draws
    them."""
    return tokenizer.decode(torch.arange(2**tokenizer.config.coarse_bits))[:, 0].argsort()


def unmoved_share(bars, prior):
    """Share of bars whose close did not move, before each bar and after the last: [T + 1].

    It is a symbol's own, as ticks differ; `prior`, the share in the training data, counts for
    PRIOR_BARS beside.
    """
    still = np.diff(bars.ohlcva[:, 3]) == 0
    count = np.concatenate([[0, 0], still.cumsum()])  # the first bar has nothing to move from
    seen = np.concatenate([[0], np.arange(len(bars))])
    return (prior * PRIOR_BARS + count) / (PRIOR_BARS + seen)


def record_of(model, tokenizer, histories, since=None):
    """What the model, as it comes, was worth on the last bars of histories: a dict, or None.

    bars; da {value, lo, hi}; coverage90, the share of closes in the 90 % band; close, range,
    volume: CRPS as a ratio to HAR's, None where there is none. None for too few bars.
    """
    import backtest  # which imports this file
    each = max(64, RECORD // len(histories))
    long = [bars for bars in histories if len(bars) > each + RECORD_PAST]
    long = long[::max(1, len(long) * each // RECORD)] or [
        bars for bars in histories if len(bars) > 3 * RECORD_PAST][:8]
    if not long:
        return None
    starts = [bars.time[-min(each, len(bars) // 3)] for bars in long]
    start = max(int(np.median(starts)), since or 0)
    try:
        t = backtest.Targets(long, start, 2**62, 1, 2**31, 0)
    except UserError:
        return None
    if t.n_blocks < 2 or min(first for first, _ in t.ranges) < RECORD_PAST:
        return None
    own = backtest.model_scores(model, tokenizer, t, probes=backtest.VAL_PROBES)
    rival = bootstrap(time_block_sums(har(t, 2), t), t)
    value, spread = own["da"]
    lo, hi = np.quantile(spread, (0.025, 0.975)) if len(spread) else (0.0, 1.0)
    found = dict(bars=len(t.r), da=dict(value=float(value), lo=float(lo), hi=float(hi)),
                 coverage90=float(own["coverage90"][0]))
    for name, metric in (("close", "crps"), ("range", "range_crps"), ("volume", "volume_crps")):
        known = metric in own and metric in rival
        found[name] = float(own[metric][0] / rival[metric][0]) if known else None
    return found


# --------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    config = Config(**cli(Config, __doc__, argv))
    check(config)
    model, tokenizer, meta = load_checkpoint(config.ckpt, pick_device(config.device))
    check_outputs(config, meta)
    if config.plot_loss:
        plot_loss(config.plot_loss, meta["metrics"])
    series = load_series(config.data, meta, config.symbols)
    if config.plot_codebook:
        plot_codebook(config.plot_codebook, tokenizer, series)
    histories = [bars for bars in series if len(bars) > data.CONTEXT]
    if not histories:
        raise UserError(f"no symbol has more than {data.CONTEXT} bars, the least to forecast from; "
                        f"give more bars")
    if len(histories) < len(series):
        print(f"{len(series) - len(histories)} of {len(series)} symbols have at most "
              f"{data.CONTEXT} bars and are skipped", file=sys.stderr)
    warn_of_intervals(histories, meta)

    times = read_times(config.times, histories, config.horizon) if config.times else None
    times = times_ahead(histories, config.horizon, times)  # (n, H)
    weights = weights_of(config.weights, histories)
    calibration = None
    if config.calibrate:
        calibration = calibrate(model, tokenizer, histories, trained_until(config.data, meta))
    ohlcva, p_up = simulate(
        model, tokenizer, histories, config.horizon, config.paths, config.temperature, config.top_p,
        config.seed, config.parallel, times, config.joint, calibration)
    rows = []
    for bars, paths, p, stamps in zip(histories, ohlcva, p_up, times):
        rows.append(describe(bars, paths, p, config.strike or (), config.rate, stamps))
    ranked = give_ranks(rows, histories, config.horizon)
    breadth = float((ranked > 0.5).mean()) if len(ranked) else math.nan
    mean_p_up = float(ranked.mean()) if len(ranked) else math.nan
    portfolio = None
    if len(rows) > 1:
        portfolio, beside = portfolio_of(histories, ohlcva, weights, config.seed)
        for i, row in enumerate(rows):
            row |= {name: values[i] for name, values in beside.items()}

    record = None
    if config.calibrate:
        record = record_of(model, tokenizer, histories, trained_until(config.data, meta))
    if config.out:
        write_csv(config.out, histories, ohlcva, times)
    if config.paths_out:
        with write_atomic(config.paths_out) as f:  # a name without .npz stays as it is
            symbols = [bars.symbol for bars in histories]
            np.savez_compressed(f, symbols=symbols, ohlcva=ohlcva, time=times)
    if config.plot:
        plot_forecast(config.plot, histories, ohlcva, times, weights)
    if config.json:
        found = dict(horizon=config.horizon, paths=config.paths, breadth=breadth,
                     mean_p_up=mean_p_up, record=record, portfolio=portfolio, symbols=rows)
        print(json.dumps(jsonable(found)))
    else:
        print_report(rows, config.horizon, breadth, mean_p_up)
        print_portfolio(portfolio, rows, config.horizon)
        print_record(record, calibration, meta)


if __name__ == "__main__":
    run(main)
