"""What the model says of bars that are known already, one by one, each from those before it."""
from dataclasses import dataclass

import numpy as np
import torch

import data
from backstage.frame import check_histories

BATCH_BARS = 2**13   # bars of the contexts that are read side by side
PAST_BARS = 8064     # that a calibration reads, in all: 21 contexts, each for its later 3/4


@dataclass
class Past:
    """Bars whose last ones, from number `first` on, the model has forecast one by one."""
    bars: data.Bars
    first: int
    h: torch.Tensor | None = None       # [len(bars) - first, C]: what it forecasts them from
    coarse: torch.Tensor | None = None  # int64 [len(bars) - first]: the coarse codes that came


@torch.no_grad()
def read_pasts(model, tokenizer, histories, since=None):
    """The Pasts of some histories, evenly chosen; see calibrate. Each bar is forecast from a
    quarter of a window at least, where there are so many bars before it."""
    check_histories(histories)
    n, pasts = model.config.block_size, []
    step = n - n // 4                                                       # targets of a window
    each = max(1, PAST_BARS // step // len(histories)) * step
    for bars in histories:
        known = 0 if since is None else int(np.searchsorted(bars.time, since))
        first = max(data.CONTEXT, known, len(bars) - each)
        if first < len(bars):
            pasts.append(Past(bars, first))
    pasts = pasts[::-(-sum(len(past.bars) - past.first for past in pasts) // PAST_BARS) or 1]
    contexts, times = [], []
    x = [data.features(past.bars)[0][max(0, past.first - n):] for past in pasts]
    tokens = torch.stack(tokenizer.encode(np.concatenate([*x, np.empty((0, 6))])), -1)
    for past, own in zip(pasts, tokens.split([len(own) for own in x])):
        before = len(past.bars) - len(own)                                  # bars without tokens
        past.coarse = own[past.first - before:, 0].to(model.up_mask.device)
        for at in range(past.first, len(past.bars), step):
            end = min(at + step, len(past.bars)) - 1                        # of the context
            begin = max(0, end - n)
            contexts.append(own[begin - before:end - before])
            times.append(torch.from_numpy(past.bars.time[begin:end].copy()))
    found, device = [None] * len(contexts), model.up_mask.device
    for rows in side_by_side([len(context) for context in contexts], len(contexts)):
        coarse, fine = torch.stack([contexts[i] for i in rows]).to(device).unbind(-1)
        time = torch.stack([times[i] for i in rows]).to(device)
        for i, h in zip(rows, model.hidden(coarse, fine, time)):            # (L, C) each
            found[i] = h[-step:]
    found = iter(found)
    for past in pasts:
        wanted = len(past.bars) - past.first
        own = [next(found) for _ in range(-(-wanted // step))]
        own[-1] = own[-1][-((wanted - 1) % step + 1):]
        past.h = torch.cat(own)
    return pasts


def side_by_side(lengths, most):
    """Yield the places of at most `most` contexts of one length, int64 [n], of all with these
    lengths."""
    lengths = np.array(lengths)
    for length in np.unique(lengths):
        alike, size = np.flatnonzero(lengths == length), max(1, min(most, BATCH_BARS // length))
        yield from np.split(alike, range(size, len(alike), size))
