"""What a checkpoint can show: forecasts, their report and pictures.

    python sample.py --data bars.csv             # with the weights that come along, assets/base.pt
    python sample.py --ckpt out.pt               # a table: one row a symbol, ten bars ahead
    python sample.py --data other.csv --symbols AAPL MSFT --horizon 20 --out forecast.csv
    python sample.py --ckpt out.pt --strike 1.05x --strike 100 --rate 0.04       # European options
    python sample.py --ckpt out.pt --plot forecast.svg --plot_codebook codebook.svg \
        --plot_loss loss.svg

A forecast is a set of sampled futures, called paths. A symbol's context is read once
(`Model.prefill`) for all of them; each then costs one recurrent step a bar. Token pairs decode to
features, features to bars (`data.inverse`), so that every bar is a valid candle. The next bar's
P(up) is exact, without sampling. What forecasts are worth: `backtest.py`.
"""
import json
import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

import data
from backstage.clock import times_ahead
from backstage.copula import COMMON, move_together, stratified
from backstage.files import write_atomic
from backstage.frame import check_histories
from backstage.grid import Bands, on_grid, tick_of, unmoved_share
from backstage.inputs import (
    check, check_outputs, load_series, long_enough, paths_of_each, read_times, trained_until,
    warn_of_intervals)
from backstage.opponents import har
from backstage.past import Past, read_pasts, side_by_side
from backstage.pictures import plot_codebook, plot_forecast, plot_loss
from backstage.report import (  # summary is handed on
    describe, give_ranks, jsonable, portfolio_of, print_portfolio, print_record, print_report,
    summary, weights_of, write_csv)
from backstage.scores import bootstrap, time_block_sums
from backstage.script import UserError, cli, pick_device, run
from backstage.trust import PRIOR_TRUST, Calibration, fit_head, fit_trust
from model import load_checkpoint


@dataclass
class Config:
    ckpt: str | None = None            # checkpoint; none: the weights that come along
    data: list[str] | None = None      # bars; none: those that --ckpt was trained on
    symbols: list[str] | None = None   # only these
    horizon: int = 10                  # bars ahead
    paths: int | None = None           # sampled futures of each symbol; none: 200, fewer of many
    times: str | None = None           # file of the stamps to come, where the clock would err
    temperature: float = 1.0           # of the paths; below 1: bolder, above: more spread
    top_p: float = 1.0                 # of the paths: among the likeliest tokens of this mass
    parallel: bool = False             # all bars (at most 16) in one pass of the reasoner
    joint: bool = True                 # paths of symbols with the same stamps move together
    calibrate: bool = True             # law and P(up) mended by these bars' past; the record
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
RECORD, RECORD_PAST = 4000, 200  # bars of the record, in all; bars before it, of each symbol
RECORDED = "da", "coverage90", "crps", "range_crps", "volume_crps"   # what it says
LAWS = 16            # bars of the past whose mean is a calibration's law of narrow moves
STANDS = 0.9         # share of unmoved bars above which P(up) is NaN
MOSTLY = 0.5         # share of bars that must move for the head to be fitted: else P(up) suffers
RARELY = 0.05        # share of unmoved bars below which that law serves all series


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
    the market (see move_together); the set of a symbol's first bars depends only on its own bars
    and (seed, symbol, last stamp). calibration: see calibrate. UserError for impossible arguments.
    """
    check_sampling(model, horizon, paths, temperature, top_p, parallel)
    check_histories(histories)
    is_made = isinstance(histories[0], Origin)
    origins = histories if is_made else origins_of(model, tokenizer, histories)
    times = times_ahead(origins, horizon, times)  # (n, H)
    order = by_close(tokenizer).to(model.up_mask.device)

    def draw(h, u, stay):
        """Coarse and fine tokens [N] for h [N, C], N = n K, by uniform numbers u [N, 2]; at once
        [n, H, K] for h [n, H, C], u [n, H, K, 2]. stay [n, 2^k1]: see Bands.staying."""
        logits = None
        if calibration:
            law = calibration.law(model, h.view(len(stay), -1, h.shape[-1]))
            logits = calibration.trusted(law, stay, model.up_mask)[0].view(*h.shape[:-1], -1)
        return model.sample(h, temperature, top_p, u=u, order=order, logits=logits)

    uniform = np.stack([stratified(np.random.default_rng([
        seed, zlib.crc32(o.symbol.encode()), int(abs(o.time[-1]))]), paths, horizon)
        for o in origins])                                                  # (n, paths, H, 2)
    if joint:
        move_together(uniform, origins, times, seed)
    at_once, bands = rows_at_once(model), Bands(model, tokenizer)
    ohlcva, p_up = np.empty((len(origins), paths, horizon, 6)), np.empty(len(origins))
    for rows in side_by_side([len(o.tokens) for o in origins], at_once // paths):
        part = [origins[i] for i in rows]
        u = torch.from_numpy(uniform[rows]).flatten(0, 1)                   # (n * paths, H, 2)
        tokens, p_up[rows], width = draw_tokens(
            model, part, times[rows], u, draw, parallel, at_once, calibration or Calibration(),
            bands)
        x = tokenizer.decode(*tokens).cpu().numpy().reshape(len(part), paths, horizon, 6)
        x[..., 0][np.abs(x[..., 0]) <= width[:, None, None]] = 0.0          # the close stays
        state = data.State.stack([o.anchored(row) for o, row in zip(part, times[rows])])
        ohlcva[rows], _ = data.inverse(x, state)
    on_grid(ohlcva, np.array([o.state.close for o in origins]), np.array([o.tick for o in origins]))
    return ohlcva, p_up


def check_sampling(model, horizon, paths, temperature=1.0, top_p=1.0, parallel=False):
    """UserError for what no forecast of the model can be made with."""
    if horizon < 1 or paths < 1:
        raise UserError(f"horizon {horizon}, paths {paths}: each must be at least 1")
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: they must be above 0, "
                        f"top_p at most 1")
    if parallel and model.reasoner and horizon > model.config.latents:
        raise UserError(f"--parallel reaches {model.config.latents} bars, not {horizon}; "
                        f"lower --horizon or forecast step by step")


def origins_of(model, tokenizer, histories):
    """The Origins after all bars of each of histories."""
    found, features = [], []
    for bars in histories:
        if len(bars) < 2:
            raise UserError(f"{bars.symbol}: {len(bars)} bar is too short a history; "
                            f"at least 2 are needed")
        slots = data.slots_of(bars)
        x, state = data.features(bars, slots)
        features.append(x[-model.config.block_size:])
        unmoved = unmoved_share(bars, model.config.unmoved)[-1]
        found.append(Origin(bars.symbol, None, bars.time, state, slots, unmoved,
                            tick_of(bars.ohlcva[-COMMON:, 3]), x[-COMMON:, 0]))
    tokens = torch.stack(tokenizer.encode(np.concatenate(features)), -1)
    for origin, own in zip(found, tokens.split([len(x) for x in features])):
        origin.tokens = own
    return found


def draw_tokens(model, origins, times, uniform, draw, parallel, at_once, calibration, bands):
    """Of n origins with contexts of one length: [coarse, fine], int64 [n * paths, H] each, P(up)
    [n], and the width up to which a move is none, [n]. uniform [n * paths, H, 2] draws them."""
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
    stay, width, p_up = next_move(h, unmoved, calibration, bands)           # (n, 2^k1), (n,), (n,)
    p_up = p_up.masked_fill(unmoved > STANDS, math.nan).cpu().numpy()

    uniform = uniform.to(device)
    if parallel:
        uniform = uniform.view(n, paths, horizon, 2).transpose(1, 2)        # (n, H, paths, 2)
        tokens = draw(ahead, uniform, stay)                                 # 2 of (n, H, paths)
        return [token.transpose(1, 2).flatten(0, 1) for token in tokens], p_up, width.cpu().numpy()
    times = times.repeat_interleave(paths, 0)                               # (n * paths, H)
    size = at_once if n == 1 else n * paths  # several origins fit; the paths of one may not
    pieces = [generate(model, state.repeat(len(u) // n), when, u, lambda h, u: draw(h, u, stay))
              for when, u in zip(times.split(size), uniform.split(size))]
    return [torch.cat(level) for level in zip(*pieces)], p_up, width.cpu().numpy()


def next_move(h, unmoved, calibration, bands):
    """Bands.staying for h [n, C] and unmoved [n], and P(up | moved) [n].

    To compute the law of narrow moves for a state takes as long as a dozen paths. So where bars
    rarely stand still, the calibration's law is used in its place, if there is one.
    """
    usual, law = calibration.table, calibration.law(bands.model, h)        # (n, 2^k1)
    stay, width = torch.empty_like(law), torch.empty_like(law[:, 0])
    own = unmoved >= (-1 if usual is None else RARELY)
    for rows in (*own.nonzero(), (~own).nonzero().view(-1)):
        table = bands.table(h[rows]) if own[rows].any() else usual
        if len(rows):
            stay[rows], width[rows] = bands.staying(law[rows], table, unmoved[rows])
    return stay, width, calibration.trusted(law, stay, bands.model.up_mask)[1]


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
# Before it speaks, the model is held against the last bars that the series already have, each
# forecast from the bars before it alone: see backstage/trust.py.

def calibrate(model, tokenizer, histories, since=None):
    """The Calibration from the last PAST_BARS bars, about, of histories (Bars).

    since: stamp of the first bar to learn from, where the weights were trained on those before it.
    Few bars leave the head as it is, and of P(up) the prior: little trust.
    """
    return calibrate_on(model, tokenizer, read_pasts(model, tokenizer, histories, since))


@torch.no_grad()
def calibrate_on(model, tokenizer, pasts):
    """See calibrate."""
    if not pasts:
        return Calibration(k=PRIOR_TRUST)
    h, bands = torch.cat([past.h for past in pasts]), Bands(model, tokenizer)       # (N, C)
    table = bands.table(h[::-(-len(h) // LAWS)])

    def flat(values):
        """Of arrays over each past's bars, those of the last ones."""
        return np.concatenate([v[past.first:] for v, past in zip(values, pasts)])

    unmoved = flat([unmoved_share(past.bars, model.config.unmoved)[:-1] for past in pasts])
    change = flat([np.diff(past.bars.ohlcva[:, 3], prepend=0) for past in pasts])
    moved, stamp = change != 0, flat([past.bars.time for past in pasts])
    if not moved.any():
        return Calibration(k=PRIOR_TRUST)
    laws, coarse = model.coarse_logits(h).float(), torch.cat([past.coarse for past in pasts])
    head = fit_head(model, h, laws, coarse) if moved.mean() > MOSTLY else None
    logit = []
    unmoved = torch.from_numpy(unmoved).to(h.device)
    for x, law, share in zip(h.split(1024), laws.split(1024), unmoved.split(1024)):
        law = law if head is None else head(law, x)
        stay, _ = bands.staying(law, table, share)
        logit.append(Calibration().trusted(law, stay, model.up_mask)[1].logit().cpu())
    found = fit_trust(torch.cat(logit).numpy()[moved], change[moved] > 0, stamp[moved])
    return replace(found, head=head, table=table)


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


def record_of(model, tokenizer, pasts):
    """What forecasts were worth on the last bars of pasts, calibrated on the bars before these: a
    dict, or None.

    bars; da {value, lo, hi}; coverage90, the share of closes in the 90 % band; close, range,
    volume: CRPS as a ratio to HAR's, None where there is none. None for too few bars.
    """
    import backtest  # which imports this file
    each = [min(max(64, RECORD // len(pasts)), len(past.bars) // 3) for past in pasts]
    starts = [past.bars.time[-n] for past, n in zip(pasts, each) if n] or [0]

    def place_of(past, start):
        return int(np.searchsorted(past.bars.time, start))

    def scored(start):
        """{id of series: h of its past} of those with enough bars before `start` and one after."""
        return {id(past.bars): past.h for past in pasts
                if max(RECORD_PAST, past.first) <= place_of(past, start) < len(past.bars)}

    # the middle one, unless symbols end at times of their own
    candidates = np.median(starts), *sorted(set(starts), reverse=True)
    start = int(max(candidates, key=lambda start: len(scored(start))))
    fit = scored(start)
    try:
        bars = [past.bars for past in pasts if id(past.bars) in fit]
        t = backtest.Targets(bars, start, 2**62, horizon=1, stride=2**31, seed=0)  # no paths
    except (UserError, ValueError):
        return None
    if t.n_blocks < 2:
        return None
    parts = [fit[id(bars)].split([len(fit[id(bars)]) - last + first, last - first])
             for bars, (first, last) in zip(t.series, t.ranges)]
    before, ahead = map(torch.cat, zip(*parts))
    if not len(before):
        return None
    before = before[::-(-len(before) // LAWS)]
    earlier = [Past(past.bars[:place], past.first, past.h[:place - past.first],
                    past.coarse[:place - past.first])
               for past in pasts if past.first < (place := place_of(past, start))]
    own = backtest.next_bars(model, tokenizer, t, backtest.VAL_PROBES,
                             calibrate_on(model, tokenizer, earlier), (before, ahead.split(256)))
    sums = [time_block_sums(f, t) for f in (own, har(t, 2))]
    own, rival = (bootstrap({name: each[name] for name in RECORDED if name in each}, t)
                  for each in sums)
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
    check_sampling(model, config.horizon, config.paths or 1, config.temperature, config.top_p,
                   config.parallel)
    check_outputs(config, meta)
    if config.plot_loss:
        plot_loss(config.plot_loss, meta["metrics"])
    series = load_series(config.data, meta, config.symbols)
    histories = long_enough(series)
    warn_of_intervals(histories, meta)

    times = read_times(config.times, histories, config.horizon) if config.times else None
    times = times_ahead(histories, config.horizon, times)  # (n, H)
    weights = weights_of(config.weights, histories, config.horizon)
    if config.plot_codebook:
        plot_codebook(config.plot_codebook, tokenizer, series)
    calibration = record = None
    if config.calibrate:
        pasts = read_pasts(model, tokenizer, histories, trained_until(config.data, meta))
        calibration = calibrate_on(model, tokenizer, pasts)
        record = record_of(model, tokenizer, pasts)
    paths = config.paths or paths_of_each(len(histories))
    ohlcva, p_up = simulate(
        model, tokenizer, histories, config.horizon, paths, config.temperature, config.top_p,
        config.seed, config.parallel, times, config.joint, calibration)
    rows = []
    for bars, own, p, stamps in zip(histories, ohlcva, p_up, times):
        rows.append(describe(bars, own, p, config.strike or (), config.rate, stamps))
    ranked = give_ranks(rows, histories, config.horizon)
    breadth = float((ranked > 0.5).mean()) if len(ranked) else math.nan
    mean_p_up = float(ranked.mean()) if len(ranked) else math.nan
    portfolio = None
    if len(rows) > 1:
        portfolio, beside = portfolio_of(histories, ohlcva, weights, config.seed)
        for i, row in enumerate(rows):
            row |= {name: values[i] for name, values in beside.items()}

    if config.out:
        write_csv(config.out, histories, ohlcva, times)
    if config.paths_out:
        with write_atomic(config.paths_out) as f:  # a name without .npz stays as it is
            symbols = [bars.symbol for bars in histories]
            np.savez_compressed(f, symbols=symbols, ohlcva=ohlcva, time=times)
    if config.plot:
        plot_forecast(config.plot, histories, ohlcva, times, weights)
    if config.json:
        found = dict(horizon=config.horizon, paths=paths, breadth=breadth,
                     mean_p_up=mean_p_up, record=record, portfolio=portfolio, symbols=rows)
        print(json.dumps(jsonable(found)))
    else:
        print_report(rows, config.horizon, breadth, mean_p_up)
        print_portfolio(portfolio, rows, config.horizon)
        print_record(record, calibration, meta, histories)


if __name__ == "__main__":
    run(main)
