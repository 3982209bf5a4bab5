"""What the later stages ask: are these weights better than those they began with, at no cost? And the
point path of a model, its median token at each step."""
import numpy as np
import torch

import backtest
import data
from backstage.clock import times_ahead
from backstage.dates import iso
from backstage.past import side_by_side
from backstage.scores import bootstrap, time_block_sums
from backstage.script import UserError
from sample import by_close, generate

NO_WORSE = 1.005  # a ratio to the reference whose interval ends below this


def some_targets(series, split, borders, horizon=1, origins=1, seed=0, most=None):
    """Targets in a split, with about so many origins.

    most: about so many bars, of some symbols, the earliest dates.
    """
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
    stride = max(1, len(stamps) // origins)
    return backtest.Targets([bars for bars, *_ in spans], low, end, horizon, stride, seed)


def model_scores(model, tokenizer, t, paths=0, probes=backtest.PROBES):
    """{score: (value, replicates)}: of the next bar if probes > 0, of paths if paths > 0."""
    one = backtest.next_bars(model, tokenizer, t, probes) if probes else {}
    many = backtest.simulated(model, tokenizer, t, paths) if paths else {}
    return bootstrap(time_block_sums(one | many, t), t)


def upper(score):
    """The upper end of an interval; the value itself where there is none."""
    return score["value"] if score["hi"] is None else score["hi"]


def median_paths(model, tokenizer, t):
    """The median-token path from every origin (see median_path): a forecaster of a point."""
    origins = backtest.origins_at(model, tokenizer, t)
    close = median_path(model, tokenizer, origins, t.horizon)[..., 3]           # (n, H)
    point = np.log(close) - np.log([o.state.close for o in origins])[:, None]
    return dict(path_point=point, path_crps=np.abs(t.path_r - point))


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
    for rows in side_by_side([len(o.tokens) for o in origins], len(origins)):
        part, times = [origins[i] for i in rows], torch.from_numpy(when[rows]).to(order.device)
        coarse, fine = torch.stack([o.tokens for o in part]).to(order.device).unbind(-1)
        seen = [o.time[-coarse.shape[1]:] for o in part]
        seen = torch.from_numpy(np.stack(seen)).to(order.device)
        state = model.prefill(coarse, fine, seen)
        tokens = generate(model, state, times, torch.zeros(len(part), horizon), median_token)
        x = tokenizer.decode(*tokens).cpu().numpy()[:, None]                # (n, 1, horizon, 6)
        start = data.State.stack([o.anchored(row) for o, row in zip(part, when[rows])])
        ohlcva[rows] = data.inverse(x, start)[0][:, 0]
    return ohlcva
