"""Generation: the function of model.py bar by bar, as a recurrence, and the drawing of tokens.

    state = prefill(model, coarse, fine, time)             # once for the context
    coarse, fine = sample(model, state.h)                  # then one step a bar, at constant cost
    h, state = step(model, coarse, fine, time, state)

Linear attention carries S = sum_j exp(-m (i - j)) k_j^T v_j, local attention a ring of its last
keys and values; what hangs on place and stamp alone is made for many bars at once, and weights lie
as they are multiplied fastest. The plain form is Model.hidden over all bars: see tests.

Shapes as in model.py; here heads and rows are one axis, [H B, ...].
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from backstage.kernels import EPS, norm, rotate

AHEAD = 16          # bars whose clock is read at once


@dataclass
class State:
    """What generation carries from bar to bar, of B rows; it does not grow."""
    pos: int                # bars seen, the same of all rows
    h: torch.Tensor         # [B, C]: hidden state of the last bar, from which the heads read on
    stamps: torch.Tensor    # int64 [B, GAPS]: of the last bars, those ahead included
    means: torch.Tensor     # float64 [B, 2, n]: see Embedding.past_means
    layers: list            # per layer and kind of attention its state, [H B, ...]
    steps: list             # of LayerStep
    ahead: list             # of each bar to come what hangs on its place and stamp alone

    def repeat(self, n):
        """Each row n times, as copies of its own: many paths go on from one prefill."""
        def rows(a):
            return a.repeat_interleave(n, 0) if torch.is_tensor(a) else [rows(part) for part in a]

        names = "h", "stamps", "means", "layers"
        own = {name: rows(getattr(self, name)) for name in names}
        ahead = [(place, rows(stamp)) for place, stamp in self.ahead]
        return replace(self, ahead=ahead, **own)


def prefill(model, coarse, fine, time):
    """The State after coarse, fine, time int64 [B, T]: Model.hidden, but that the states of all
    parts are kept, and of the last layer only the last bar is asked for."""
    T, last = time.shape[1], model.layers[-1]
    x, means = model.embedding(*model.candles(coarse, fine), time)
    places, layers = model.places(x), []
    for layer in model.layers[:-1]:
        x, states = layer(x, places)
        layers.append(states)
    o, states = last.attend(x, places)
    h = norm(last.add(x[:, -1:], o[:, -1:]))[:, 0]
    layers = [rings(layer, states, T) for layer, states in zip(model.layers, [*layers, states])]
    steps = model.cache.get(("steps", x.dtype), list(model.layers.parameters()),
                            lambda: [LayerStep(layer, x.dtype) for layer in model.layers])
    return State(T, h.float(), model.embedding.recent(time), means, layers, steps, ahead=[])


def step(model, coarse, fine, time, state):
    """One bar more: see Model.step."""
    if not state.ahead:
        look_ahead(model, time.view(len(time), -1)[:, :AHEAD], state)
    (cos, sin, places), clock = state.ahead.pop(0)
    z, values = model.candles(coarse[:, None], fine[:, None])
    means, state.means = model.embedding.past_means(values, state.means)
    x = model.embedding.read(z, means, *clock)[:, 0]
    x = x.to(state.steps[0].up.dtype)                                       # [B, C]
    for layer, states in zip(state.steps, state.layers):
        x = layer(x, (cos, sin), places, states)
    state.h, state.pos = unit(x.float()), state.pos + 1
    return state.h, state


def look_ahead(model, time, state):
    """Makes all that the next bars need besides their tokens, time [B, n]."""
    n, stamps = time.shape[1], torch.cat((state.stamps, time), dim=1)
    pos = torch.arange(state.pos, state.pos + n, device=time.device)
    rot = (a[:, 0].split(1, dim=-2) for a in model.rotation(pos))    # [2, 1, 1, D]
    places = zip(*(places_of(kind, pos) for kind in model.layers[0].kinds))
    clock = (a.split(1, 1) for a in model.embedding.clock(stamps, n))
    state.ahead = list(zip(zip(*rot, places), zip(*clock)))
    state.stamps = model.embedding.recent(stamps)


class LayerStep:
    """A layer's recurrence, with weights of a type. Those in float32 lie by columns, with which a
    CPU is up to three times as fast on a few rows."""

    def __init__(self, layer, dtype):
        self.H, self.shares = layer.H, layer.shares
        for name in ("qkv", "out", "up", "down"):
            weight = getattr(layer, name).weight.detach().to(dtype)
            setattr(self, name, weight.T.contiguous().T if dtype == torch.float32 else weight)
        self.kinds = [local_step if kind.window else linear_step for kind in layer.kinds]

    def __call__(self, x, rot, places, states):
        """x [B, C] -> [B, C]: one bar more; updates the states, which are float32, in place.

        A batched product of three axes costs least around it.
        """
        B, H = len(x), self.H
        qkv = F.linear(unit(x), self.qkv).float().view(B, 3 * H, -1)        # [B, 3 H, D]
        qk, v = qkv.transpose(0, 1).reshape(3, H * B, 1, -1).split((2, 1))  # [2 or 1, H B, 1, D]
        shares = [B * n for n in self.shares]
        q, k = rotate(qk, rot)
        parts = zip(*(a.split(shares) for a in (q, k, v[0])))
        outs = [kind(*part, state, place)
                for kind, part, state, place in zip(self.kinds, parts, states, places)]
        o = torch.cat(outs).view(H, B, -1).transpose(0, 1).reshape(B, -1)   # [B, C]
        x = x + F.linear(o.to(x.dtype), self.out)
        return x + F.linear(F.silu(F.linear(unit(x), self.up)), self.down)


def unit(x):
    """kernels.norm, the fastest of one bar."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def linear_step(q, k, v, S, per_bar):
    """Linear attention's recurrence of q, k, v [H B, 1, D]: S = exp(-m) S + k^T v, o = q S; S
    [H B, D, D] in place."""
    S.unflatten(0, (len(per_bar), -1)).mul_(per_bar)
    return unit(torch.bmm(q, S.addcmul_(k.mT, v)))


def local_step(q, k, v, ring, place):
    """Local attention of q [H B, 1, D] over a ring of the last W keys and values, 2 of
    [H B, W, D], in place."""
    (keys, values), (at, bias) = ring, place
    score = torch.bmm(q, keys.index_copy_(1, at, k).mT)                     # [H B, 1, W]
    score.unflatten(0, (len(bias), -1)).add_(bias)
    return torch.bmm(score.softmax(-1), values.index_copy_(1, at, v))


def places_of(kind, pos):
    """What the step of a kind of attention needs of bars at pos [n], n times: the decay, or the
    place in the ring [1] and the bias of all places [H, 1, 1, W]."""
    if not kind.window:
        return [torch.exp(-kind.slope)[:, None, None, None]] * len(pos)
    at = pos[:, None] % kind.window                                         # [n, 1]
    age = (at - torch.arange(kind.window, device=pos.device)) % kind.window     # of what it holds
    bias = -kind.slope[:, None, None, None] * age[:, None, None, None]      # [n, H, 1, 1, W]
    return list(zip(at, bias.masked_fill((age > pos[:, None])[:, None, None, None], -math.inf)))


def rings(layer, states, T):
    """The states that a layer's forward over T bars leaves, as its steps want them: keys and values
    become rings, bar p in place p % W."""
    return [[ring(a.flatten(0, 1).float(), kind.window, T) for a in state] if kind.window else state
            for kind, state in zip(layer.kinds, states)]


def ring(a, W, T):
    """The last bars of T, a [H B, at most W, D], as a ring [H B, W, D]."""
    if T <= W:
        return F.pad(a, (0, 0, 0, W - T))
    return a.roll(T % W, dims=1)    # the first is bar T - W, whose place is T % W


# --- Tokens ---------------------------------------------------------------------------------------

def sample(model, h, temperature, top_p, generator, u, order, logits):
    """The next bar's coarse and fine token: see Model.sample."""
    if u is None:
        u = torch.rand(*h.shape[:-1], 2, device=h.device, generator=generator)
    one = u.dim() == h.dim()
    u = u[..., None, :] if one else u                                       # [..., K, 2]
    logits = model.coarse_logits(h) if logits is None else logits
    logits = logits if order is None else logits.index_select(-1, order)
    coarse = draw(logits, temperature, top_p, u[..., 0])                    # [..., K]
    coarse = coarse if order is None else order[coarse]
    logits = model.fine_logits(h[..., None, :].expand(*coarse.shape, -1), coarse)
    fine = draw(logits, temperature, top_p, u[..., 1:]).squeeze(-1)
    return (coarse.squeeze(-1), fine.squeeze(-1)) if one else (coarse, fine)


def draw(logits, temperature, top_p, u):
    """Tokens int64 [..., n] from logits [..., V]: where uniform numbers u [..., n] fall in the
    cumulative distribution.

    temperature divides the logits; top_p keeps the likeliest tokens of that total probability.
    """
    u = u.clamp(max=1 - 2**-23)  # rounded up to 1 it would fall behind the last token that can be
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:       # the likeliest up to a mass of top_p, the one that crosses it included
        value, order = p.sort(dim=-1, descending=True)
        value = value.masked_fill(value.cumsum(-1) - value >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, value)
    c = p.cumsum(-1)
    at = torch.searchsorted(c, (u * c[..., -1:]).contiguous(), right=True)
    return at.clamp(max=p.shape[-1] - 1)
