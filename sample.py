"""What a checkpoint can show: forecasts, their report and pictures.

    python sample.py --ckpt out.pt                                  # a table: one row a symbol, ten bars ahead
    python sample.py --ckpt out.pt --data other.csv --symbols AAPL MSFT --horizon 20 --paths 1000 --out forecast.csv
    python sample.py --ckpt out.pt --strike 1.05x --strike 100 --rate 0.04            # European options from the paths
    python sample.py --ckpt out.pt --plot forecast.svg --plot_codebook codebook.svg --plot_loss loss.svg

A forecast is a set of sampled futures. The context is tokenized once and read once (`Model.prefill`); all paths of a
symbol share it, and each path then costs one recurrent step a bar. Token pairs decode to features, features to bars
(`data.inverse`), so that every bar forecast is a valid candle. The next bar's P(up) is exact, no sampling in it.

In this order: simulation, the report, pictures. What forecasts are worth: `backtest.py`.
"""
import csv
import json
import math
import os
import sys
import zlib
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
import torch

import data
from data import UserError, future_times
from model import load_checkpoint


@dataclass
class Config:
    ckpt: str | None = None            # checkpoint to forecast from
    data: list[str] | None = None      # bars to forecast; none: those that the checkpoint was trained on
    symbols: list[str] | None = None   # only these
    horizon: int = 10                  # bars ahead
    paths: int = 200                   # sampled futures of each symbol
    temperature: float = 1.0           # of the paths; below 1: bolder, above: more spread
    top_p: float = 1.0                 # of the paths: sample among the likeliest tokens of this total probability
    parallel: bool = False             # one pass of the latent slots for all bars (at most 16) instead of step by step
    seed: int = 0                      # of the sampling
    strike: list[str] | None = None    # strikes of European options: a price, or a share of spot such as 1.05x
    rate: float = 0.0                  # annual, continuous, for the options
    json: bool = False                 # print JSON in place of the table
    out: str | None = None             # write quantiles of each step as CSV
    paths_out: str | None = None       # write all paths as .npz
    plot: str | None = None            # write candles and the fan of the forecast as SVG
    plot_codebook: str | None = None   # write the most used coarse codes as candles, SVG
    plot_loss: str | None = None       # write the training's losses as SVG
    overwrite: bool = False            # replace existing output files
    backtest: bool = False             # scores of forecasts: see python backtest.py
    device: str = "cpu"                # cpu, cuda, ...


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_ROWS = 1024  # paths simulated side by side: bounds memory, half a megabyte each


# ----------------------------------------------------------------------------------------------------------------------
# Simulation

@torch.no_grad()
def generate(model, state, times, uniform, temperature=1.0, top_p=1.0, order=None):
    """Sample futures step by step: times int64 [N, H], uniform numbers [N, H, 2] -> coarse, fine int64 [N, H].

    state: of N rows, from `Model.prefill(...).repeat`, changed in place. The last bar is drawn, not read. temperature,
    top_p, order: as in Model.sample.
    """
    tokens = []
    for k in range(times.shape[1]):
        coarse, fine = model.sample(state.h, temperature, top_p, u=uniform[:, k], order=order)
        tokens.append(torch.stack((coarse, fine)))
        if k + 1 < times.shape[1]:
            _, state = model.step(coarse, fine, times[:, k], state)
    return torch.stack(tokens, dim=-1).unbind(0)


def stratified(random, paths, horizon):
    """Uniform numbers float32 [paths, horizon, 2] for one origin: two halves, independent of each other.

    Each half is a Latin hypercube (McKay, Beckman and Conover, Technometrics 1979). A path's numbers are independent and
    uniform, so it is a fair draw of the model; but at each step a half's n paths fall one into each n-th of the
    distribution, and means, medians and shares of the paths vary less.
    """
    halves = []
    for n in (paths // 2, paths - paths // 2):
        place = random.permuted(np.broadcast_to(np.arange(n, dtype=np.float32)[:, None], (n, 2 * horizon)), axis=0)
        halves.append((place + random.random(place.shape, np.float32)) / max(n, 1))
    return np.concatenate(halves).reshape(paths, horizon, 2)


@dataclass
class Origin:
    """Where futures begin."""
    symbol: str
    tokens: torch.Tensor   # int64 [L, 2]: coarse, fine of the last bars, the context
    time: np.ndarray       # int64 [T]: stamps of all bars up to there
    state: data.State      # decodes the next bar


def simulate(model, tokenizer, histories, horizon, paths, temperature=1.0, top_p=1.0, seed=0, parallel=False):
    """Futures of many histories at once. histories: Bars that end at the origin each.

    Returns ohlcva float64 [n, paths, horizon, 6] and P(next close up | it moves) [n]. A history's futures depend on
    (seed, symbol, last stamp) and its bars, not on what else is in the batch. Raises UserError for a history of one bar,
    horizon or paths below 1, and parallel beyond the slots.
    """
    origins = []
    for bars in histories:
        if len(bars) < 2:
            raise UserError(f"{bars.symbol}: {len(bars)} bar is too short a history; at least 2 are needed")
        x, state = data.features(bars)
        tokens = torch.stack(tokenizer.encode(torch.from_numpy(x[-model.config.block_size:])), -1)
        origins.append(Origin(bars.symbol, tokens, bars.time, state))
    return simulate_from(model, tokenizer, origins, horizon, paths, temperature, top_p, seed, parallel)


@torch.no_grad()
def simulate_from(model, tokenizer, origins, horizon, paths, temperature=1.0, top_p=1.0, seed=0, parallel=False):
    """As simulate, of Origins. Those with contexts of one length go side by side, MAX_ROWS paths at a time."""
    if horizon < 1 or paths < 1:
        raise UserError(f"horizon {horizon}, paths {paths}: each must be at least 1")
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: they must be above 0, top_p at most 1")
    if parallel and model.config.reasoner and horizon > model.config.slots:
        raise UserError(f"--parallel reaches {model.config.slots} bars, not {horizon}; "
                        f"lower --horizon or forecast step by step")
    device = next(model.parameters()).device
    order = by_close(tokenizer).to(device)
    ohlcva = np.empty((len(origins), paths, horizon, 6))
    p_up = np.empty(len(origins))
    groups = {}  # rows of a batch share their length
    for i, origin in enumerate(origins):
        groups.setdefault(len(origin.tokens), []).append(i)
    per_batch = max(1, MAX_ROWS // paths)
    batches = [group[i:i + per_batch] for group in groups.values() for i in range(0, len(group), per_batch)]
    for rows in batches:
        part = [origins[i] for i in rows]
        coarse, fine = torch.stack([o.tokens for o in part]).to(device).unbind(-1)  # (n, L)
        time = torch.from_numpy(np.stack([o.time[-coarse.shape[1]:] for o in part])).to(device)
        times = np.stack([future_times(o.time, horizon) for o in part])
        times = torch.from_numpy(np.repeat(times, paths, axis=0)).to(device)  # (n * paths, H)
        randoms = [np.random.default_rng([seed, zlib.crc32(o.symbol.encode()), int(abs(o.time[-1]))]) for o in part]
        uniform = torch.from_numpy(np.concatenate([stratified(r, paths, horizon) for r in randoms])).to(device)
        state = model.prefill(coarse, fine, time)
        p_up[rows] = model.p_up(state.h).cpu().numpy()
        if parallel:
            _, h = model.parallel(coarse, fine, time)  # (n, slots, C)
            h = h[:, :horizon].repeat_interleave(paths, 0)
            tokens = model.sample(h, temperature, top_p, u=uniform, order=order)
        else:
            pieces = [generate(model, state.repeat(len(u) // len(rows)), when, u, temperature, top_p, order)
                      for when, u in zip(times.split(MAX_ROWS), uniform.split(MAX_ROWS))]  # several of one origin alone
            tokens = [torch.cat(level) for level in zip(*pieces)]
        x = tokenizer.decode(*tokens).cpu().numpy().reshape(len(rows), paths, horizon, 6)
        ohlcva[rows] = data.inverse(x, data.State.stack([o.state.anchored() for o in part]))[0]
    return ohlcva, p_up


def by_close(tokenizer):
    """The coarse tokens int64 [2^k1] by rising close: the order in which Model.sample draws them."""
    return tokenizer.decode(torch.arange(2**tokenizer.config.coarse_bits))[:, 0].argsort()


def forecast(model, tokenizer, bars, horizon, paths, temperature=1.0, top_p=1.0, seed=0):
    """Sample futures of one series from its end: float64 [paths, horizon, 6] (open, high, low, close, volume, amount).

    Prices and volumes in the units of bars; each bar a valid candle. Raises UserError for a horizon or paths below 1.
    """
    return simulate(model, tokenizer, [bars], horizon, paths, temperature, top_p, seed)[0][0]


# ----------------------------------------------------------------------------------------------------------------------
# The report

def describe(bars, paths, p_up, strikes=(), rate=0.0):
    """One symbol's row: what the paths [paths, horizon, 6] say, as fractions; VaR and ES are losses, so positive.

    p_up: of the next bar, given that it moves; p_up_horizon: the share of the paths that end above the last close.
    """
    last, close, horizon = bars.ohlcva[-1, 3], paths[:, -1, 3], paths.shape[1]
    move = close / last - 1
    q05, q50, q95 = np.quantile(close, (0.05, 0.5, 0.95))
    returns = np.diff(np.log(bars.ohlcva[-21:, 3]))
    sigma = returns.std() * math.sqrt(horizon)
    years = (future_times(bars.time, horizon)[-1] - bars.time[-1]) / data.YEAR
    return dict(symbol=bars.symbol, last_time=data.iso(bars.time[-1]), last_close=last, p_up=p_up,
                p_up_horizon=(close > last).mean(), expected_return=move.mean(), q05=q05, q50=q50, q95=q95,
                var95=1 - q05 / last, es95=-move[close <= q05].mean(),
                p_extreme=(np.abs(np.log(close / last)) > 3 * sigma).mean() if sigma > 0 else math.nan,
                options=[option(close, last, strike, years, rate) for strike in strikes])


def option(close, spot, strike, years, rate):
    """European call and put from the paths' last closes, discounted.

    The paths are scaled so that their mean is the forward spot e^(rT): the drift is the market's, the spread the model's
    own, which is not the implied volatility that a market quotes.
    """
    k = float(strike[:-1]) * spot if strike.endswith("x") else float(strike)
    terminal = close * (spot * math.exp(rate * years) / close.mean())
    discount = math.exp(-rate * years)
    call, put = (discount * np.maximum(sign * (terminal - k), 0).mean() for sign in (1, -1))
    return dict(strike=k, years=years, call=call, put=put)


def print_report(rows, horizon, breadth, mean_p_up):
    """The rows of `describe` as a table of 80 columns, best rank first."""
    ahead = f"in {horizon}"
    print(f"{'':7} {'':>8} {'P(up) %':>11} {'return':>6} {'close ' + ahead + ' bars':^26} {'95 % risk':>11}")
    print(f"{'symbol':7} {'close':>8} {'next':>5} {ahead:>5} {'%':>6} {'5 %':>8} {'50 %':>8} {'95 %':>8} "
          f"{'VaR':>5} {'ES':>4}{'rank':>5}")
    for r in sorted(rows, key=lambda r: r["rank"]):
        flag = " !" if r["p_extreme"] > 0.01 else ""
        print(f"{r['symbol'][:7]:7} {r['last_close']:>8.6g} {r['p_up'] * 100:>5.1f} {r['p_up_horizon'] * 100:>5.1f} "
              f"{r['expected_return'] * 100:>+6.2f} {r['q05']:>8.6g} {r['q50']:>8.6g} {r['q95']:>8.6g} "
              f"{r['var95'] * 100:>5.1f} {r['es95'] * 100:>4.1f}{r['rank']:>5}{flag}")
    print(f"breadth: {breadth:.1%} of {len(rows)} symbols lean up, mean P(up) {mean_p_up:.1%}")
    if any(r["p_extreme"] > 0.01 for r in rows):
        print("! more than 1 % chance of a move beyond 3 sigma of the last 20 bars")
    if rows[0]["options"]:
        print("\noptions (drift: the forward's; volatility: the model's own)")
        print(f"{'symbol':8} {'strike':>10} {'years':>8} {'call':>10} {'put':>10}")
        for r in rows:
            for o in r["options"]:
                print(f"{r['symbol'][:8]:8} {o['strike']:>10.6g} {o['years']:>8.3g} {o['call']:>10.4g} {o['put']:>10.4g}")


def write_csv(path, histories, ohlcva):
    """Time, symbol, step, share of paths above the last close, quantiles and mean of close: one line a bar forecast."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["time", "symbol", "step", "p_up", *(f"q{q * 100:02.0f}" for q in QUANTILES), "mean"])
        for bars, paths in zip(histories, ohlcva):
            close, last = paths[:, :, 3], bars.ohlcva[-1, 3]
            for k, when in enumerate(future_times(bars.time, close.shape[1]).astype("datetime64[s]")):
                values = [(close[:, k] > last).mean(), *np.quantile(close[:, k], QUANTILES), close[:, k].mean()]
                writer.writerow([f"{when}Z", bars.symbol, k + 1, *(f"{v:.8g}" for v in values)])


def jsonable(value):
    """Plain JSON values; what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: plain SVG, readable on light and dark

# t: title, g: grid, p: a path, f1 and f2: the fan's outer and inner band, m and m2: curves
STYLE = """<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.g{stroke:#8884}.p{stroke:#8888;fill:none}
.up{fill:#2a9d6f;stroke:#2a9d6f}.dn{fill:#d1495b;stroke:#d1495b}.f1{fill:#4c78a833}.f2{fill:#4c78a855}
.m{stroke:#4c78a8;stroke-width:2;fill:none}.m2{stroke:#e08e45;stroke-width:2;fill:none}
@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"""


def write_svg(path, width, height, parts):
    """A picture of SVG elements, texts, in pixels."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{"".join(parts)}</svg>\n')


def label(x, y, text, anchor="start", css=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(str(text))}</text>'


def grid_line(x1, x2, y):
    return f'<line class="g" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def line(points, css, tag="polyline"):
    return f'<{tag} class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def candle(x, width, open_, high, low, close):
    """A candle at x; the four prices are pixel heights (smaller is higher)."""
    css = "up" if close < open_ else "dn"
    top, tall = min(open_, close), max(1.0, abs(open_ - close))
    return (f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>'
            f'<rect class="{css}" x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall:.1f}"/>')


def round_ticks(low, high, n=4):
    """About n round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (step * m) - n))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def plot_forecast(path, histories, ohlcva, shown=60, drawn=3):
    """Last bars as candles, the fan of 5-95 % and 25-75 %, the median, a few paths; one panel a symbol, at most 12."""
    n = min(len(histories), 12)
    columns = 1 if n == 1 else 2 if n <= 4 else 3
    W, H = (760, 380) if n == 1 else (440, 260)
    parts = []
    for i in range(n):
        bars, paths = histories[i][-shown:], ohlcva[i]
        x0, y0 = i % columns * W + 10, i // columns * H + 26
        w, h = W - 75, H - 62
        horizon = paths.shape[1]
        fan = np.quantile(paths[:, :, 3], QUANTILES, axis=0)  # (5, H)
        few = paths[:drawn, :, 3]
        low = min(bars.ohlcva[:, 2].min(), fan.min(), few.min())
        high = max(bars.ohlcva[:, 1].max(), fan.max(), few.max())
        low, high = low - 0.03 * (high - low) - 1e-9 * low, high + 0.03 * (high - low) + 1e-9 * high
        total = len(bars) + horizon
        X = lambda k: x0 + (k + 0.5) * w / total
        Y = lambda price: y0 + (high - price) / (high - low) * h
        parts.append(label(x0, y0 - 10, f"{bars.symbol}, {horizon} bars ahead", css="t"))
        for tick in round_ticks(low, high):
            parts += [grid_line(x0, x0 + w, Y(tick)), label(x0 + w + 4, Y(tick) + 4, f"{tick:.6g}")]
        times = np.append(bars.time, future_times(histories[i].time, horizon))
        parts += [label(X(0), y0 + h + 16, data.iso(times[0])),
                  label(X(total - 1), y0 + h + 16, data.iso(times[-1]), "end")]
        at = [X(len(bars) - 1 + k) for k in range(horizon + 1)]
        fan = np.concatenate([np.full((5, 1), bars.ohlcva[-1, 3]), fan], axis=1)
        for outer, css in ((0, "f1"), (1, "f2")):
            edge = [*zip(at, Y(fan[outer])), *zip(at[::-1], Y(fan[4 - outer])[::-1])]
            parts.append(line(edge, css, "polygon"))
        parts += [line([(at[0], Y(bars.ohlcva[-1, 3])), *zip(at[1:], map(Y, p))], "p") for p in few]
        parts.append(line([*zip(at, map(Y, fan[2]))], "m"))
        for k, (o, hi, lo, c) in enumerate(bars.ohlcva[:, :4]):
            parts.append(candle(X(k), 0.6 * w / total, Y(o), Y(hi), Y(lo), Y(c)))
    write_svg(path, columns * W, -(-n // columns) * H, parts)


def plot_codebook(path, tokenizer, series, shown=40):
    """The most used coarse codes as candles with their share of bars, up codes above, down codes below."""
    tokens = np.concatenate([np.asarray(data.tokenize(bars, tokenizer)[data.CONTEXT:, 0]) for bars in series])
    count = np.bincount(tokens, minlength=2 ** tokenizer.config.coarse_bits)
    if not count.sum():
        raise UserError("no series has a bar past its first 32; give longer --data for a codebook picture")
    x = tokenizer.decode(torch.arange(len(count))).numpy()  # (codes, 6)
    up = x[:, 0] > 0
    W, H, gap = 20 + shown * 22, 170, 22
    parts = []
    for row, (name, mask) in enumerate((("up", up), ("not up", ~up))):
        codes = [c for c in np.argsort(-count) if mask[c] and count[c]][:shown]
        if not codes:
            continue
        share = count[mask].sum() / count.sum()
        y0 = row * H + 30
        parts.append(label(10, y0 - 12, f"{name}: {share:.1%} of bars, {(count[mask] > 0).sum()} codes used; "
                                        f"the {len(codes)} most used, share in %", css="t"))
        close, open_, upper, lower = np.sinh(x[codes, :4]).T
        high, low = np.maximum(open_, close) + upper.clip(0), np.minimum(open_, close) - lower.clip(0)
        span = max(np.abs(high).max(), np.abs(low).max())
        Y = lambda v: y0 + 55 - v / span * 50
        parts.append(grid_line(10, W - 10, Y(0)))
        for k, code in enumerate(codes):
            cx = 20 + k * gap
            parts.append(candle(cx, 10, Y(open_[k]), Y(high[k]), Y(low[k]), Y(close[k])))
            parts.append(label(cx, y0 + 122 + (k % 2) * 11, f"{100 * count[code] / count.sum():.1f}", "middle"))
    write_svg(path, W, 2 * H, parts)


PANELS = (("pretrain: loss, nats per bar", (("train", "m", "train"), ("val", "m2", "val"))),  # title, (key, css, label)
          ("expo: log loss of P(up)", (("val_logloss", "m2", "val"),)),
          ("rollout: path CRPS, log return x 100", (("path_crps", "m2", "val"),)))


def plot_loss(path, metrics):
    """The reports in a checkpoint's metrics, a panel for each stage that made any."""
    panels = [(title, [m for m in metrics if all(key in m for key, *_ in lines)], lines) for title, lines in PANELS]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        raise UserError("the checkpoint holds fewer than two reports of losses: nothing to draw")
    W, H, x0, w, h = 640, 340, 60, 510, 260
    parts = []
    for n, (title, rows, lines) in enumerate(panels):
        y0 = 30 + n * H
        reports = range(1, len(rows) + 1)  # of all runs: each counts its steps anew
        values = np.array([[m[key] for key, *_ in lines] for m in rows])
        low, high = values.min(), values.max() + 1e-9
        X = lambda n: x0 + (n - 1) / (len(rows) - 1) * w
        Y = lambda v: y0 + (high - v) / (high - low) * h
        parts.append(label(x0, y0 - 12, title, css="t"))
        for tick in round_ticks(low, high):
            parts += [grid_line(x0, x0 + w, Y(tick)), label(x0 - 5, Y(tick) + 4, f"{tick:.6g}", "end")]
        for tick in {1, (len(rows) + 1) // 2, len(rows)}:
            parts.append(label(X(tick), y0 + h + 18, f"{rows[tick - 1]['step']:,}", "middle"))
        for column, (_, css, name) in enumerate(lines):
            parts.append(line([(X(n), Y(v)) for n, v in zip(reports, values[:, column])], css))
            parts.append(label(x0 + w + 6, Y(values[-1, column]) + (4 if column else -6), name))
        parts.append(label(x0 + w / 2, y0 + h + 34, "step", "middle"))
    write_svg(path, W, H * len(panels), parts)


# ----------------------------------------------------------------------------------------------------------------------
# The run

def check(config):
    if not config.ckpt:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    for strike in config.strike or ():
        try:
            if not 0 < float(strike.removesuffix("x")) < math.inf:
                raise ValueError
        except ValueError:
            raise UserError(f"--strike {strike}: must be a price such as 105, or a share of spot such as 1.05x")
    if config.horizon < 1 or config.paths < 1:
        raise UserError(f"--horizon {config.horizon}, --paths {config.paths}: each must be at least 1")
    if not abs(config.rate) <= 10:
        raise UserError(f"--rate {config.rate}: must be a number such as 0.04")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be 0 or more")
    outputs = (config.out, config.paths_out, config.plot, config.plot_codebook, config.plot_loss)
    given = [os.path.abspath(path) for path in outputs if path]
    if len(set(given)) < len(given):
        raise UserError("two of --out, --paths_out and the plots have the same name; give each its own")
    for path in outputs:
        if path is not None:
            data.check_out(path, config.overwrite, (config.ckpt, *(config.data or ())))


def load_series(sources, meta, symbols=None):
    """The bars to look at: --data, else what the checkpoint was trained on; only `symbols` where given."""
    if not sources and not meta["data"]:
        raise UserError("the checkpoint does not say what it was trained on; name bars by --data")
    sources = sources or meta["data"]["sources"]
    if sources == ["synthetic"]:
        series, _ = data.synthetic(seed=(meta["data"] or {}).get("seed", meta["seed"]))
    else:
        series = data.load(sources)
    if symbols:
        known = {bars.symbol: bars for bars in series}
        missing = [s for s in symbols if s not in known]
        if missing:
            raise UserError(f"--symbols {missing[0]}: not in the data, which has {', '.join(sorted(known)[:8])}"
                            f"{' ...' * (len(known) > 8)}")
        series = [known[s] for s in symbols]
    return series


def main():
    config = Config(**data.cli(Config, __doc__))
    if config.backtest:
        raise UserError("--backtest: it is a script of its own, python backtest.py --ckpt ... with the same flags")
    check(config)
    model, tokenizer, meta = load_checkpoint(config.ckpt, data.pick_device(config.device))
    if config.plot_loss:
        plot_loss(config.plot_loss, meta["metrics"])
    series = load_series(config.data, meta, config.symbols)
    if config.plot_codebook:
        plot_codebook(config.plot_codebook, tokenizer, series)
    histories = [bars for bars in series if len(bars) > data.CONTEXT]
    if not histories:
        raise UserError(f"no symbol has more than {data.CONTEXT} bars, the least to forecast from; give more bars")
    if len(histories) < len(series):
        print(f"{len(series) - len(histories)} of {len(series)} symbols have at most {data.CONTEXT} bars and are skipped",
              file=sys.stderr)
    ohlcva, p_up = simulate(model, tokenizer, histories, config.horizon, config.paths, config.temperature, config.top_p,
                            config.seed, config.parallel)
    rows = [describe(*each, config.strike or (), config.rate) for each in zip(histories, ohlcva, p_up)]
    for rank, i in enumerate(np.argsort(-p_up, kind="stable")):
        rows[i]["rank"] = rank + 1
    breadth, mean_p_up = float((p_up > 0.5).mean()), float(p_up.mean())
    if config.out:
        write_csv(config.out, histories, ohlcva)
    if config.paths_out:
        with open(config.paths_out, "wb") as f:  # a name without .npz stays as it is
            np.savez_compressed(f, symbols=[b.symbol for b in histories], ohlcva=ohlcva,
                                time=np.stack([future_times(b.time, config.horizon) for b in histories]))
    if config.plot:
        plot_forecast(config.plot, histories, ohlcva)
    if config.json:
        print(json.dumps(jsonable(dict(horizon=config.horizon, paths=config.paths, breadth=breadth, mean_p_up=mean_p_up,
                                       symbols=rows))))
    else:
        print_report(rows, config.horizon, breadth, mean_p_up)


if __name__ == "__main__":
    data.run(main)
