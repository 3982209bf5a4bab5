"""Pictures: plain SVG, readable on light and dark."""
import functools
import math
from dataclasses import dataclass
from html import escape

import numpy as np
import torch

import data
from backstage.dates import iso
from backstage.files import write_atomic
from backstage.script import UserError, printable

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# --------------------------------------------------------------------------------------------------
# Pictures: plain SVG, readable on light and dark

# t: title, g: grid, p: a path, f1 and f2: the fan's outer and inner band, m and m2: curves
STYLE = """<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.g{stroke:#8884}.p{stroke:#8888;fill:none}
.up{fill:#2a9d6f;stroke:#2a9d6f}.dn{fill:#d1495b;stroke:#d1495b}.f1{fill:#4c78a833}.f2{fill:#4c78a855}
.m{stroke:#4c78a8;stroke-width:2;fill:none}.m2{stroke:#e08e45;stroke-width:2;fill:none}
@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"""


def write_svg(path, width, height, parts):
    """A picture of SVG elements, texts, in pixels."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    with write_atomic(path, text=True) as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{"".join(parts)}</svg>\n')


def label(x, y, text, anchor="start", css=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(printable(text))}</text>'


def grid_line(x1, x2, y):
    return f'<line class="g" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def line(points, css, tag="polyline"):
    return f'<{tag} class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


@dataclass
class Panel:
    """A rectangle of a picture: n places side by side, and values from low (at the bottom) to
    high."""
    left: float
    top: float
    width: float
    height: float
    n: int
    low: float
    high: float

    def x(self, k):
        return self.left + (k + 0.5) * self.width / self.n

    def y(self, value):
        return self.top + (self.high - value) / (self.high - self.low) * self.height

    def grid(self, x, anchor):
        """Lines at about four round values, with labels at x."""
        each = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(each))
        step = min((power, 2 * power, 5 * power, 10 * power), key=lambda step: abs(4 * each / step - 4))
        parts = []
        for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            parts.append(grid_line(self.left, self.left + self.width, self.y(k * step)))
            parts.append(label(x, self.y(k * step) + 4, f"{k * step:.6g}", anchor))
        return parts

    def candle(self, k, prices, width=10.0):
        """prices: open, high, low, close."""
        x, css = self.x(k), "up" if prices[3] > prices[0] else "dn"
        open_, high, low, close = (self.y(price) for price in prices)
        top, tall = min(open_, close), max(1.0, abs(open_ - close))
        return (f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>'
                f'<rect class="{css}" x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall:.1f}"/>')


MANY, SHOWN = 5, 12  # symbols from which on their portfolio comes first; panels of a picture


@dataclass
class View:
    """What a panel shows: the past, as candles [m, 4] or a curve [m], and paths [K, 1 + H] that
    begin at its last value."""
    title: str
    past: np.ndarray
    paths: np.ndarray
    first_time: int
    last_time: int


def plot_forecast(path, histories, ohlcva, times, weights=None, shown=60, drawn=3):
    """The last bars as candles, the median forecast, its 5-95 and 25-75 % fan and a few paths: of
    at most SHOWN symbols, and of MANY first of their portfolio of weights [n], in % of its value.

    histories: n Bars; ohlcva [n, paths, H, 6]; times [n, H].
    """
    views = []
    if weights is not None and len(histories) >= MANY:
        views.append(portfolio_view(histories, ohlcva, times, weights, shown))
    for bars, paths, stamps in zip(histories, ohlcva, times[:SHOWN - len(views)]):
        bars = bars[-shown:]
        close = np.insert(paths[:, :, 3], 0, bars.ohlcva[-1, 3], axis=1)        # (paths, 1 + H)
        views.append(View(f"{bars.symbol}, {len(stamps)} bars ahead", bars.ohlcva[:, :4], close,
                          bars.time[0], stamps[-1]))
    n = len(views)
    columns = 1 if n == 1 else 2 if n <= 4 else 3
    W, H = (760, 380) if n == 1 else (440, 260)
    parts = []
    for i, view in enumerate(views):
        parts += fan(view, i % columns * W + 10, i // columns * H + 26, W - 75, H - 62, drawn)
    write_svg(path, columns * W, math.ceil(n / columns) * H, parts)


def portfolio_view(histories, ohlcva, times, weights, shown):
    """The View of shares bought today: what they gained over the last stamps that all symbols have,
    and what they may gain."""
    last = np.array([bars.ohlcva[-1, 3] for bars in histories])
    newest = max(bars.time[-1] for bars in histories)
    stamps = functools.reduce(np.intersect1d, [bars.time for bars in histories])[-shown:]
    close = np.array([bars.ohlcva[np.searchsorted(bars.time, stamps), 3] for bars in histories])
    past = 100 * weights @ (close / last[:, None] - 1)                          # (m,)
    if newest not in stamps:
        stamps, past = np.append(stamps, newest), np.append(past, 0.0)
    gain = 100 * np.tensordot(weights, ohlcva[..., 3] / last[:, None, None] - 1, 1)
    gain = np.insert(gain, 0, 0.0, axis=1)                                      # (paths, 1 + H)
    title = f"portfolio of {len(histories)} symbols, gain from today in %"
    return View(title, past, gain, stamps[0], times[:, -1].max())


def fan(view, left, top, width, height, drawn):
    """SVG elements of a View at a place: its past, its fan and `drawn` of its paths."""
    quantiles, few = np.quantile(view.paths, QUANTILES, axis=0), view.paths[:drawn]  # (5, 1 + H)
    m, ahead = len(view.past), view.paths.shape[1] - 1
    values = np.concatenate([view.past.ravel(), quantiles.ravel(), few.ravel()])
    low, high = values.min(), values.max()
    margin = 0.03 * (high - low) + 1e-9 * max(1e-3, abs(high))
    panel = Panel(left, top, width, height, m + ahead, low - margin, high + margin)
    below = top + height + 16
    parts = [label(left, top - 10, view.title, css="t"), *panel.grid(left + width + 4, "start"),
             label(panel.x(0), below, iso(view.first_time)),
             label(panel.x(panel.n - 1), below, iso(view.last_time), "end")]
    x = panel.x(m - 1 + np.arange(ahead + 1))
    q05, q25, q50, q75, q95 = panel.y(quantiles)
    for lower, upper, css in ((q05, q95, "f1"), (q25, q75, "f2")):
        parts.append(line([*zip(x, lower), *zip(x[::-1], upper[::-1])], css, "polygon"))
    parts += [line(zip(x, row), "p") for row in panel.y(few)]
    parts.append(line(zip(x, q50), "m"))
    if view.past.ndim == 2:
        return parts + [panel.candle(k, row, 0.6 * width / panel.n)
                        for k, row in enumerate(view.past)]
    return parts + [line(zip(panel.x(np.arange(m)), panel.y(view.past)), "m2")]


def plot_codebook(path, tokenizer, series, shown=40):
    """The most used coarse codes as candles with their share of bars, up codes above, down codes
    below."""
    tokens = np.concatenate([np.asarray(data.tokenize(bars, tokenizer)[data.CONTEXT:, 0]) for bars in series])
    count = np.bincount(tokens, minlength=2 ** tokenizer.config.coarse_bits)
    if not count.sum():
        raise UserError("no series has a bar past its first 32; give longer --data for a codebook picture")
    # (codes,) each
    close, open_, upper, lower = np.sinh(tokenizer.decode(torch.arange(len(count))).numpy()[:, :4]).T
    high, low = np.maximum(open_, close) + upper.clip(0), np.minimum(open_, close) - lower.clip(0)
    candles = np.stack([open_, high, low, close], 1)
    W, H, parts = 20 + shown * 22, 170, []
    for row, (name, mask) in enumerate((("up", close > 0), ("not up", close <= 0))):
        codes = [code for code in np.argsort(-count) if mask[code] and count[code]][:shown]
        if not codes:
            continue
        span = np.abs(candles[codes]).max()
        panel = Panel(9, row * H + 35, shown * 22, 100, shown, -span, span)
        title = (f"{name}: {count[mask].sum() / count.sum():.1%} of bars, {(count[mask] > 0).sum()} codes used; "
                 f"the {len(codes)} most used, share in %")
        parts += [label(10, panel.top - 17, title, css="t"), grid_line(10, W - 10, panel.y(0))]
        for k, code in enumerate(codes):
            parts.append(panel.candle(k, candles[code]))
            share = f"{100 * count[code] / count.sum():.1f}"
            parts.append(label(panel.x(k), panel.top + 117 + k % 2 * 11, share, "middle"))
    write_svg(path, W, 2 * H, parts)


LOSSES = {  # title: keys of a stage's reports
    "pretrain: loss, nats per bar": ("train", "val"), "expo: log loss of P(up)": ("val_logloss",),
    "rollout: path CRPS, log return x 100": ("path_crps",)}


def plot_loss(path, metrics):
    """The reports in a checkpoint's metrics, a panel for each stage that made any."""
    parts, n = [], 0
    for title, keys in LOSSES.items():
        reports = [report for report in metrics if all(abs(report.get(key) or np.inf) < 1e30 for key in keys)]
        if len(reports) < 2:
            continue
        # (reports, curves)
        values = np.array([[report[key] for key in keys] for report in reports])
        panel = Panel(60, 30 + n * 340, 510, 260, len(reports), values.min(), values.max() + 1e-9)
        n += 1
        parts += [label(60, panel.top - 12, title, css="t"), *panel.grid(55, "end")]
        # of all runs: each counts its steps anew
        for k in sorted({0, (len(reports) - 1) // 2, len(reports) - 1}):
            parts.append(label(panel.x(k), panel.top + 278, f"{reports[k]['step']:,}", "middle"))
        for key, column in zip(keys, values.T):
            css, below, name = ("m", -6, "train") if key == "train" else ("m2", 4, "val")
            parts.append(line(zip(panel.x(np.arange(len(column))), panel.y(column)), css))
            parts.append(label(576, panel.y(column[-1]) + below, name))
        parts.append(label(315, panel.top + 294, "step", "middle"))
    if not n:
        raise UserError("the checkpoint holds fewer than two reports of losses: nothing to draw")
    write_svg(path, 640, 340 * n, parts)
