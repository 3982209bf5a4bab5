"""Bars that stay, and prices on a grid: how many stay, which moves are none, the tick of a series,
paths on it."""
import numpy as np
import torch

from backstage.bins import close_table
from backstage.series import decayed_sum

HALF_LIVES = (30, 100, 300, 1000, 1e9)   # bars, of the share of those that stay
PRIOR_BARS = 16      # that the share in training counts for, beside a symbol's own
FORGET = 300         # bars back that count half in the choice of a half-life

TICKS = np.array(sorted(  # quarters to 32nds and decimals
    (m * 10.0**k for k in range(-9, 5) for m in (1, 1.25, 2, 2.5, 3.125, 5, 6.25)), reverse=True))
ON_TICK = 0.98       # share of the closes that must lie on it
N_WIDTHS = 64        # of bands around no move


def unmoved_share(bars, prior):
    """Share of bars whose close does not move, as forecast before each bar and after the last,
    [T + 1], from the bars before alone.

    Ticks differ, and liquidity comes and goes. So u is a mean of forecasts with different memories,
    each by the likelihood of what it said before (a Bayesian mixture that forgets):

        u_k = (prior n_0 + sum_{i<t} b_k^(t-1-i) still_i) / (n_0 + sum_{i<t} b_k^(t-1-i))
        log w_k = sum_{i<t} c^(t-1-i) log P(what bar i did | u_k then)
        u_t = sum_k w_k u_k / sum_k w_k
    """
    still = (np.diff(bars.ohlcva[:, 3]) == 0).astype(float)                     # [T - 1]
    u = np.full((len(HALF_LIVES), len(bars) + 1), float(prior))
    for row, half_life in zip(u, HALF_LIVES):
        pair = np.stack([still, np.ones_like(still)])
        came, n = decayed_sum(pair, np.zeros(2), 0.5**(1 / half_life))
        row[2:] = (prior * PRIOR_BARS + came) / (PRIOR_BARS + n)
    log_p = np.log(np.where(still, u[:, 1:-1], 1 - u[:, 1:-1]).clip(1e-6))
    log_w = np.zeros_like(u)                                                    # [K, T + 1]
    log_w[:, 2:] = decayed_sum(log_p, np.zeros(len(u)), 0.5**(1 / FORGET))
    w = np.exp(log_w - log_w.max(0))
    return (w * u).sum(0) / w.sum(0)


# No code says "unmoved": such bars have the codes of small moves, on both sides of 0. So the
# narrowest moves stay, as many as stayed before:
#
#     P(|move| <= w) = unmoved          P(up | moved) = P(move > w) / P(|move| > w)
#
# over all pairs of tokens, and a path's close stays where its move is at most w.

class Bands:
    """How much of each coarse code's candles, over its fine codes, lies within a width of no
    move."""

    def __init__(self, model, tokenizer):
        moves = close_table(tokenizer).abs().to(model.up_mask.device)           # (2^k1, 2^k2)
        self.model, self.every = model, torch.arange(len(moves), device=moves.device)
        inner = torch.logspace(-4, 1, N_WIDTHS - 2, device=moves.device) * 1.001
        self.widths = torch.cat((inner.new_zeros(1), inner, moves.max()[None] + 1))  # (W,)
        self.place = torch.searchsorted(self.widths, moves)     # the least width that holds a pair

    def table(self, h):
        """P(|move| <= width | coarse) [W, 2^k1], the mean over h [n, C]."""
        total = torch.zeros(len(self.every), len(self.widths), device=h.device)
        for row in h:
            fine = self.model.fine_logits(row.expand(len(self.every), -1), self.every)
            total.scatter_add_(1, self.place, fine.float().softmax(-1))
        share = total.cumsum(1).T
        return share / share[-1]

    def staying(self, logits, table, unmoved):
        """For coarse logits [m, 2^k1] and shares of unmoved bars [m]: the share of each code's
        candles that stays, [m, 2^k1], and the width w within which they lie, [m]."""
        mass = logits.softmax(-1) @ table.T                     # (m, W), P(|move| <= w)
        unmoved = unmoved.float()
        right = torch.searchsorted(mass.contiguous(), unmoved[:, None]).clamp(1, len(table) - 1)
        low, high = mass.gather(1, right - 1), mass.gather(1, right)
        part = ((unmoved[:, None] - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)  # (m, 1)
        right = right[:, 0]
        width = torch.lerp(self.widths[right - 1], self.widths[right], part[:, 0])
        return torch.lerp(table[right - 1], table[right], part), width


def tick_of(close):
    """The largest step on which nearly all distinct closes [T] lie; 0 where there is none that
    seven digits could show, as of adjusted prices."""
    price = np.unique(close)
    error = 3e-7 * price                                                        # of seven digits
    steps = TICKS[TICKS >= 20 * error.max(), None]                              # (n, 1)
    if len(price) < 3:
        return 0.0
    on_step = np.abs(price - np.round(price / steps) * steps) <= error          # (n, T)
    fits = np.flatnonzero(on_step.mean(1) >= ON_TICK)
    return float(steps[fits[0], 0]) if len(fits) else 0.0


def on_grid(ohlcva, last, tick):
    """Rounds, in place, the prices of paths [n, paths, H, 6] that begin at the closes `last` [n] to
    ticks [n]; a tick of 0 leaves them.

    Each bar starts where the rounded one before it ended; one that moves, moves by a tick at least.
    """
    rows = np.flatnonzero(tick)
    tick, last = tick[rows, None], last[rows, None]                             # (m, 1)
    before = rounded = np.broadcast_to(last, (len(rows), ohlcva.shape[1]))
    for k in range(ohlcva.shape[2]):
        bar = ohlcva[rows, :, k]                                                # (m, paths, 6)
        scale, move = rounded / before, bar[..., 3] - before
        before = bar[..., 3].copy()
        moved = np.round(before * scale / tick) - np.round(rounded / tick)
        moved = np.sign(move) * np.maximum(np.sign(move) * moved, move != 0)
        moved = np.maximum(np.round(rounded / tick) + moved, 1) * tick
        rounded = np.where(move == 0, rounded, moved)
        bar[..., :3] = np.maximum(np.round(bar[..., :3] * (scale / tick)[..., None]), 1)
        bar[..., :3] *= tick[..., None]
        bar[..., 5] *= rounded / before
        bar[..., 3] = rounded
        bar[..., 1] = bar[..., [0, 1, 3]].max(-1)
        bar[..., 2] = bar[..., [0, 2, 3]].min(-1)
        ohlcva[rows, :, k] = bar
