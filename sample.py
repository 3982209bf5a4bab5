"""What a checkpoint can show: forecasts, their report and pictures.

    python sample.py --ckpt out.pt                                  # a table: one row a symbol, ten bars ahead
    python sample.py --ckpt out.pt --data other.csv --symbols AAPL MSFT --horizon 20 --paths 1000 --out forecast.csv
    python sample.py --ckpt out.pt --strike 1.05x --strike 100 --rate 0.04            # European options from the paths
    python sample.py --ckpt out.pt --plot forecast.svg --plot_codebook codebook.svg --plot_loss loss.svg

A forecast is a set of sampled futures. The context is tokenized once and read once (`Model.prefill`); all paths of a
symbol share it, and each path then costs one recurrent step a bar. Token pairs decode to features, features to bars
(`data.inverse`), so that every bar forecast is a valid candle. The next bar's P(up) is exact, no sampling in it.
"""
import csv
import datetime
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
from data import DAY, UserError
from model import load_checkpoint


@dataclass
class Config:
    ckpt: list[str] | None = None      # checkpoint to forecast from
    data: list[str] | None = None      # bars to forecast; none: those that the checkpoint was trained on
    symbols: list[str] | None = None   # only these
    horizon: int = 10                  # bars ahead
    paths: int = 200                   # sampled futures of each symbol
    temperature: float = 1.0           # below 1: bolder, above: more spread
    top_p: float = 1.0                 # sample among the likeliest tokens of this total probability
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
    device: str = "cpu"                # cpu, cuda, ...


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
YEAR = 365.25 * DAY
MAX_ROWS = 4096  # paths simulated side by side: bounds memory


# ----------------------------------------------------------------------------------------------------------------------
# The clock of the future

def future_times(time, horizon):
    """Stamps of the next bars, int64 [horizon]: the spacing, weekdays and times of day that the history shows.

    time: int64 [T], UTC seconds. Months keep their day, sessions their hours; with one bar of history, days follow.
    """
    recent = time[-4000:]
    gap = int(np.median(np.diff(recent))) if len(recent) > 1 else DAY
    steps = np.arange(1, horizon + 1)
    last = int(recent[-1])
    if gap >= 27 * DAY:  # months, quarters, years
        month = np.datetime64(last, "s").astype("datetime64[M]")
        months = month + steps * max(1, round(gap / (YEAR / 12)))
        offset = last - month.astype("datetime64[s]").astype(np.int64)
        length = ((months + 1).astype("datetime64[s]") - months.astype("datetime64[s]")).astype(np.int64)
        at_end = offset // DAY + 1 == ((month + 1).astype("datetime64[D]") - month.astype("datetime64[D]")).astype(np.int64)
        day = np.where(at_end, length // DAY - 1, np.minimum(offset // DAY, length // DAY - 1))
        return months.astype("datetime64[s]").astype(np.int64) + day * DAY + offset % DAY
    weekdays = np.bincount((recent // DAY + 3) % 7, minlength=7)  # Monday is 0
    opens = weekdays > 0.1 * weekdays.max()
    if recent[-1] - recent[0] < 7 * DAY:  # too short to have seen each weekday
        opens = opens | (np.arange(7) < 5) | bool(opens[5:].any())
    slots, seen = np.unique(recent % DAY, return_counts=True)  # times of day that bars bear
    days = len(np.unique(recent // DAY))
    slots = slots[seen > 0.1 * days] if gap < DAY and days >= 3 else np.empty(0, np.int64)
    stamps = []
    for _ in range(horizon):
        last += gap
        if len(slots):
            k = np.searchsorted(slots, last % DAY - gap // 2)
            last = last // DAY * DAY + (int(slots[k]) if k < len(slots) else DAY + int(slots[0]))
        while gap < 7 * DAY and not opens[(last // DAY + 3) % 7]:
            last = (last // DAY + 1) * DAY + (int(slots[0]) if len(slots) else last % DAY)
        stamps.append(last)
    return np.array(stamps, np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Simulation

@torch.no_grad()
def generate(model, state, times, uniform, temperature=1.0, top_p=1.0):
    """Sample futures step by step: times int64 [N, H], uniform numbers [N, H, 2] -> coarse, fine int64 [N, H].

    state: of N rows, from `Model.prefill(...).repeat`; it is used up. The last bar is drawn, not read.
    """
    tokens = []
    for k in range(times.shape[1]):
        coarse, fine = model.sample(state.h, temperature, top_p, u=uniform[:, k])
        tokens.append(torch.stack((coarse, fine)))
        if k + 1 < times.shape[1]:
            _, state = model.step(coarse, fine, times[:, k], state)
    return torch.stack(tokens, dim=-1).unbind(0)


@torch.no_grad()
def simulate(model, tokenizer, histories, horizon, paths, temperature=1.0, top_p=1.0, seed=0, parallel=False):
    """Futures of many histories at once. histories: Bars that end at the origin each.

    Returns ohlcva float64 [n, paths, horizon, 6] and P(next close up | it moves) [n]. A history's futures depend on
    (seed, symbol, last stamp) and its bars, not on what else is in the batch. Raises UserError where a future cannot be.
    """
    if horizon < 1 or paths < 1:
        raise UserError(f"horizon {horizon}, paths {paths}: each must be at least 1")
    if not (0 < temperature < math.inf and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature}, top_p {top_p}: they must be above 0, top_p at most 1")
    if parallel and model.config.reasoner and horizon > model.config.slots:
        raise UserError(f"--parallel reaches {model.config.slots} bars, not {horizon}; lower --horizon or forecast step by step")
    device = next(model.parameters()).device
    contexts, states = [], []
    for bars in histories:
        if len(bars) < 2:
            raise UserError(f"{bars.symbol}: {len(bars)} bar is too short a history; at least 2 are needed")
        x, state = data.features(bars)
        contexts.append(torch.from_numpy(x[-model.config.block_size:]))
        states.append(state.anchored())
    ohlcva = np.empty((len(histories), paths, horizon, 6))
    p_up = np.empty(len(histories))
    groups = {}  # rows of a batch share their length
    for i, x in enumerate(contexts):
        groups.setdefault(len(x), []).append(i)
    per_batch = max(1, MAX_ROWS // paths)
    batches = [group[i:i + per_batch] for group in groups.values() for i in range(0, len(group), per_batch)]
    for rows in batches:
        coarse, fine = tokenizer.encode(torch.stack([contexts[i] for i in rows]).to(device))  # (n, T)
        time = torch.from_numpy(np.stack([histories[i].time[-coarse.shape[1]:] for i in rows])).to(device)
        times = np.stack([future_times(histories[i].time, horizon) for i in rows])
        times = torch.from_numpy(np.repeat(times, paths, axis=0)).to(device)  # (n * paths, H)
        uniform = np.concatenate([np.random.default_rng([seed, zlib.crc32(histories[i].symbol.encode()), int(abs(histories[i].time[-1]))])
                                  .random((paths, horizon, 2), np.float32) for i in rows])
        uniform = torch.from_numpy(uniform).to(device)
        state = model.prefill(coarse, fine, time)
        p_up[rows] = model.p_up(state.h).cpu().numpy()
        if parallel:
            _, h = model.parallel(coarse, fine, time)  # (n, slots, C)
            tokens = model.sample(h[:, :horizon].repeat_interleave(paths, 0), temperature, top_p, u=uniform)
        else:
            tokens = generate(model, state.repeat(paths), times, uniform, temperature, top_p)
        x = tokenizer.decode(*tokens).cpu().numpy().reshape(len(rows), paths, horizon, 6)
        origin = data.State(*(np.array([getattr(states[i], k) for i in rows])[:, None] for k in data.State.__dataclass_fields__))
        ohlcva[rows] = data.inverse(x, origin)[0]
    return ohlcva, p_up


def forecast(model, tokenizer, bars, horizon, paths, temperature=1.0, top_p=1.0, seed=0):
    """Sample futures of one series from its end: float64 [paths, horizon, 6] (open, high, low, close, volume, amount).

    Prices and volumes in the units of bars; each bar a valid candle. Raises UserError for a horizon or paths below 1.
    """
    return simulate(model, tokenizer, [bars], horizon, paths, temperature, top_p, seed)[0][0]


# ----------------------------------------------------------------------------------------------------------------------
# The report

def describe(bars, paths, p_up, strikes=(), rate=0.0):
    """One symbol's row: what the paths [paths, horizon, 6] say, as fractions; VaR and ES are losses, so positive."""
    last = bars.ohlcva[-1, 3]
    close = paths[:, -1, 3]
    ratio = close / last
    moved = close != last
    returns = np.diff(np.log(bars.ohlcva[-21:, 3]))
    sigma = returns.std() * math.sqrt(paths.shape[1]) if len(returns) > 1 else math.nan
    var95 = -np.quantile(ratio - 1, 0.05)
    tail = ratio - 1 <= -var95
    row = dict(symbol=bars.symbol, last_time=data.iso(bars.time[-1]), last_close=last, p_up=p_up,
               p_up_horizon=(close > last).sum() / moved.sum() if moved.any() else math.nan, expected_return=ratio.mean() - 1)
    row |= {f"q{q * 100:02.0f}": value for q, value in zip((0.05, 0.5, 0.95), np.quantile(close, (0.05, 0.5, 0.95)))}
    row |= dict(var95=var95, es95=-(ratio - 1)[tail].mean(),
                p_extreme=(np.abs(np.log(ratio)) > 3 * sigma).mean() if sigma > 0 else math.nan)
    years = (future_times(bars.time, paths.shape[1])[-1] - bars.time[-1]) / YEAR
    row["options"] = [option(close, last, strike, years, rate) for strike in strikes]
    return row


def option(close, spot, strike, years, rate):
    """European call and put from the paths' last closes, discounted.

    The paths are scaled so that their mean is the forward spot e^(rT): the drift is the market's, the spread the model's
    own, which is not the implied volatility that a market quotes.
    """
    k = float(strike[:-1]) * spot if strike.endswith("x") else float(strike)
    terminal = close * (spot * math.exp(rate * years) / close.mean())
    discount = math.exp(-rate * years)
    return dict(strike=k, years=years, call=discount * np.maximum(terminal - k, 0).mean(), put=discount * np.maximum(k - terminal, 0).mean())


def print_report(rows, horizon, breadth, mean_p_up):
    if not rows[0]["options"]:
        pass
    print(f"{'':8} {'':>9} {'P(up) %':>11} {'return':>7} {'close in ' + str(horizon) + ' bars':^29} {'95 % risk':>11}")
    print(f"{'symbol':8} {'close':>9} {'next':>5} {'in ' + str(horizon):>5} {'%':>7} {'5 %':>9} {'50 %':>9} {'95 %':>9} {'VaR':>5} {'ES':>5}{'rank':>5}")
    for r in sorted(rows, key=lambda r: r["rank"]):
        flag = " !" if r["p_extreme"] > 0.01 else ""
        print(f"{r['symbol'][:8]:8} {r['last_close']:>9.6g} {r['p_up'] * 100:>5.1f} {r['p_up_horizon'] * 100:>5.1f} "
              f"{r['expected_return'] * 100:>+7.2f} {r['q05']:>9.6g} {r['q50']:>9.6g} {r['q95']:>9.6g} "
              f"{r['var95'] * 100:>5.1f} {r['es95'] * 100:>5.1f}{r['rank']:>5}{flag}")
    print(f"breadth {breadth:.1%} of {len(rows)} symbols lean up, mean P(up) {mean_p_up:.1%}.  ! more than 1 % chance of a move beyond 3 sigma")
    if rows[0]["options"]:
        print(f"\n{'symbol':8} {'strike':>10} {'years':>7} {'call':>10} {'put':>10}   drift corrected to the forward; volatility is the model's own")
        for r in rows:
            for o in r["options"]:
                print(f"{r['symbol'][:8]:8} {o['strike']:>10.6g} {o['years']:>7.4f} {o['call']:>10.4g} {o['put']:>10.4g}")


def write_csv(path, histories, ohlcva):
    """Time, symbol, step, share of paths above the last close, quantiles and mean of close: one line a bar forecast."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["time", "symbol", "step", "p_up", *(f"q{q * 100:02.0f}" for q in QUANTILES), "mean"])
        for bars, paths in zip(histories, ohlcva):
            close, last = paths[:, :, 3], bars.ohlcva[-1, 3]
            for k, when in enumerate(future_times(bars.time, close.shape[1])):
                moved = (close[:, k] != last).sum()
                p_up = (close[:, k] > last).sum() / moved if moved else math.nan
                values = [p_up, *np.quantile(close[:, k], QUANTILES), close[:, k].mean()]
                writer.writerow([stamp(when), bars.symbol, k + 1, *(f"{v:.8g}" for v in values)])


def stamp(seconds):
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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

STYLE = """<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.g{stroke:#8884}.up{fill:#2a9d6f;stroke:#2a9d6f}
.dn{fill:#d1495b;stroke:#d1495b}.f1{fill:#4c78a833}.f2{fill:#4c78a855}.m{stroke:#4c78a8;stroke-width:2;fill:none}.m2{stroke:#e08e45;stroke-width:2;fill:none}
.p{stroke:#8888;fill:none}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"""


def write_svg(path, width, height, parts):
    text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{STYLE}{"".join(parts)}</svg>\n'
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def label(x, y, text, anchor="start", css=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(str(text))}</text>'


def line(points, css):
    return f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


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
            parts.append(f'<line class="g" x1="{x0}" x2="{x0 + w}" y1="{Y(tick):.1f}" y2="{Y(tick):.1f}"/>' + label(x0 + w + 4, Y(tick) + 4, f"{tick:.6g}"))
        times = np.append(bars.time, future_times(histories[i].time, horizon))
        for k, anchor in ((0, "start"), (len(bars) - 1, "middle"), (total - 1, "end")):
            parts.append(label(X(k), y0 + h + 16, data.iso(times[k]), anchor))
        at = [X(len(bars) - 1 + k) for k in range(horizon + 1)]
        fan = np.concatenate([np.full((5, 1), bars.ohlcva[-1, 3]), fan], axis=1)
        for outer, css in ((0, "f1"), (1, "f2")):
            edge = [*zip(at, map(Y, fan[outer])), *reversed([*zip(at, map(Y, fan[4 - outer]))])]
            parts.append(f'<polygon class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in edge)}"/>')
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
        codes = [c for c in np.argsort(-count) if mask[c] and count[c]][:shown // 1]
        share = count[mask].sum() / count.sum()
        y0 = row * H + 30
        parts.append(label(10, y0 - 12, f"{name}: {share:.1%} of bars, {(count[mask] > 0).sum()} codes used; the {len(codes)} most used, share in %", css="t"))
        close, open_, upper, lower = np.sinh(x[codes, :4]).T
        high, low = np.maximum(open_, close) + upper.clip(0), np.minimum(open_, close) - lower.clip(0)
        span = max(np.abs(high).max(), np.abs(low).max())
        Y = lambda v: y0 + 55 - v / span * 50
        parts.append(f'<line class="g" x1="10" x2="{W - 10}" y1="{Y(0):.1f}" y2="{Y(0):.1f}"/>')
        for k, code in enumerate(codes):
            cx = 20 + k * gap
            parts.append(candle(cx, 10, Y(open_[k]), Y(high[k]), Y(low[k]), Y(close[k])))
            parts.append(label(cx, y0 + 122 + (k % 2) * 11, f"{100 * count[code] / count.sum():.1f}", "middle"))
    write_svg(path, W, 2 * H, parts)


def plot_loss(path, metrics):
    """Train and val loss of every report in the checkpoint's metrics."""
    rows = [m for m in metrics if "val" in m and "train" in m]
    if len(rows) < 2:
        raise UserError("the checkpoint holds fewer than two reports of losses: nothing to draw")
    W, H, x0, y0, w, h = 640, 340, 50, 30, 520, 260
    steps = [m["step"] for m in rows]
    values = np.array([[m["train"], m["val"]] for m in rows])
    low, high = values.min(), values.max() + 1e-9
    X = lambda s: x0 + (s - steps[0]) / max(1, steps[-1] - steps[0]) * w
    Y = lambda v: y0 + (high - v) / (high - low) * h
    parts = [label(x0, 18, "loss, nats per bar", css="t")]
    for tick in round_ticks(low, high):
        parts.append(f'<line class="g" x1="{x0}" x2="{x0 + w}" y1="{Y(tick):.1f}" y2="{Y(tick):.1f}"/>' + label(x0 - 5, Y(tick) + 4, f"{tick:.4g}", "end"))
    for tick in round_ticks(steps[0], steps[-1]):
        parts.append(label(X(tick), y0 + h + 18, f"{tick:.0f}", "middle"))
    for column, css, name in ((0, "m", "train"), (1, "m2", "val")):
        parts.append(line([(X(s), Y(v)) for s, v in zip(steps, values[:, column])], css))
        parts.append(label(x0 + w + 6, Y(values[-1, column]) + (4 if column else -6), name))
    parts.append(label(x0 + w / 2, H - 8, "step", "middle"))
    write_svg(path, W, H, parts)


# ----------------------------------------------------------------------------------------------------------------------

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
    if not math.isfinite(config.rate):
        raise UserError(f"--rate {config.rate}: must be a number such as 0.04")
    for path in (config.out, config.paths_out, config.plot, config.plot_codebook, config.plot_loss):
        if path:
            data.check_out(path, config.overwrite)


def load_series(config, meta):
    """The bars to look at: --data, else what the checkpoint was trained on; only --symbols where given."""
    sources = config.data or meta["data"]["sources"]
    series = data.synthetic(seed=meta["seed"])[0] if sources == ["synthetic"] else data.load(sources)
    if config.symbols:
        known = {bars.symbol: bars for bars in series}
        missing = [s for s in config.symbols if s not in known]
        if missing:
            raise UserError(f"--symbols {missing[0]}: not in the data, which has {', '.join(sorted(known)[:8])}{' ...' * (len(known) > 8)}")
        series = [known[s] for s in config.symbols]
    return series


def main():
    config = Config(**data.cli(Config, __doc__))
    check(config)
    if len(config.ckpt) > 1:
        raise UserError("--ckpt: one checkpoint at a time for a forecast")
    model, tokenizer, meta = load_checkpoint(config.ckpt[0], config.device)
    if config.plot_loss:
        plot_loss(config.plot_loss, meta["metrics"])
    series = load_series(config, meta)
    if config.plot_codebook:
        plot_codebook(config.plot_codebook, tokenizer, series)
    histories = [bars for bars in series if len(bars) > data.CONTEXT]
    if not histories:
        raise UserError(f"no symbol has more than {data.CONTEXT} bars, the least to forecast from; give more bars")
    if len(histories) < len(series):
        print(f"{len(series) - len(histories)} of {len(series)} symbols have at most {data.CONTEXT} bars and are skipped", file=sys.stderr)
    ohlcva, p_up = simulate(model, tokenizer, histories, config.horizon, config.paths, config.temperature, config.top_p, config.seed, config.parallel)
    rows = [describe(bars, paths, p, config.strike or (), config.rate) for bars, paths, p in zip(histories, ohlcva, p_up)]
    for rank, i in enumerate(np.argsort(-p_up, kind="stable")):
        rows[i]["rank"] = rank + 1
    breadth, mean_p_up = float((p_up > 0.5).mean()), float(p_up.mean())
    if config.out:
        write_csv(config.out, histories, ohlcva)
    if config.paths_out:
        np.savez_compressed(config.paths_out, symbols=[b.symbol for b in histories], ohlcva=ohlcva,
                            time=np.stack([future_times(b.time, config.horizon) for b in histories]))
    if config.plot:
        plot_forecast(config.plot, histories, ohlcva)
    if config.json:
        print(json.dumps(jsonable(dict(horizon=config.horizon, paths=config.paths, breadth=breadth, mean_p_up=mean_p_up, symbols=rows))))
    else:
        print_report(rows, config.horizon, breadth, mean_p_up)


if __name__ == "__main__":
    data.run(main)
