"""Bars that stay, and prices on a grid: which moves are none, the tick of a series, paths on it."""
import numpy as np
import torch

from model import close_table

TICKS = sorted((m * 10.0**k for k in range(-9, 5) for m in (1, 1.25, 2, 2.5, 3.125, 5, 6.25)),
               reverse=True)  # quarters to 32nds and decimals
ON_TICK = 0.98       # share of the closes that must lie on it
N_WIDTHS = 64        # of bands around no move


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

    def staying(self, h, table, unmoved):
        """For h [m, C] and shares of unmoved bars [m]: the share of each code's candles that
        stays, [m, 2^k1], and the width w within which they lie, [m]."""
        mass = self.model.coarse_logits(h).float().softmax(-1) @ table.T  # (m, W), P(|move| <= w)
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
    for step in TICKS:
        if len(price) < 3 or step < 20 * error.max():
            return 0.0
        if (np.abs(price - np.round(price / step) * step) <= error).mean() >= ON_TICK:
            return float(step)
    return 0.0


def on_grid(ohlcva, last, tick):
    """Rounds, in place, the prices of paths [paths, H, 6] that begin at the close `last` to ticks.

    Each bar starts where the rounded one before it ended; one that moves, moves by a tick at least.
    """
    if not tick:
        return
    before = rounded = np.full(len(ohlcva), last)
    for bar in ohlcva.swapaxes(0, 1):                                           # (paths, 6) each
        scale, move = rounded / before, bar[:, 3] - before
        before = bar[:, 3].copy()
        moved = np.round(bar[:, 3] * scale / tick) - np.round(rounded / tick)
        moved = np.sign(move) * np.maximum(np.sign(move) * moved, move != 0)
        rounded = np.where(move == 0, rounded, np.maximum(np.round(rounded / tick) + moved, 1) * tick)
        bar[:, :3] = np.maximum(np.round(bar[:, :3] * scale[:, None] / tick), 1) * tick
        bar[:, 5] *= rounded / before
        bar[:, 3] = rounded
        bar[:, 1] = bar[:, [0, 1, 3]].max(1)
        bar[:, 2] = bar[:, [0, 2, 3]].min(1)
