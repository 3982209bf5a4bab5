"""Generation: the function of model.py bar by bar, as a recurrence, and the drawing of tokens. The
methods of Model:

    state = model.prefill(coarse, fine, time)              # once for the context
    coarse, fine = model.sample(state.h)                   # then one step a bar, at constant cost
    h, state = model.step(coarse, fine, time, state)

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
    stamps: torch.Tensor    # int64 [B, GAPS]: of the last bars
    moves: torch.Tensor     # float64 [B, n]: see Embedding.past_moves
    layers: list            # per layer and kind of attention its state, [H B, ...]
    steps: list             # of LayerStep
    ahead: list             # of each bar to come what hangs on its place and stamp alone

    def repeat(self, n):
        """Each row n times, as copies of its own: many paths go on from one prefill."""
        def rows(a):
            return a.repeat_interleave(n, 0) if torch.is_tensor(a) else [rows(part) for part in a]

        own = {name: rows(getattr(self, name)) for name in ("h", "stamps", "moves", "layers")}
        return replace(self, ahead=[], **own)


@torch.no_grad()
def prefill(model, coarse, fine, time):
    """The State after coarse, fine, time int64 [B, T], from which step goes on.

    It is Model.hidden, but that the states of all parts are kept; of the last layer only the last
    bar is asked for, which is a step.
    """
    x, moves = model.embedding(*model.candles(coarse, fine), time)
    (B, T, _), places, layers = x.shape, model.places(x), []
    for layer in model.layers[:-1]:
        x, states = layer(x, places)
        layers.append(rings(layer, states, T))
    last, rot = model.layers[-1], places[0]                                 # 2 of [2, 1, 1, T, D]
    layers.append(states_after(last, x[:, :-1], [a[..., :-1, :] for a in rot]))
    dtype = x.dtype
    steps = model.cache.get(("steps", dtype), model.layers,
                            lambda: [LayerStep(layer, dtype) for layer in model.layers])
    with torch.autocast(x.device.type, enabled=False):
        pos = torch.tensor([T - 1], device=x.device)
        weights = [step_weights(kind, pos, B)[0] for kind in last.kinds]
        place = [a[:, 0, :, -1:].float() for a in rot], weights
        h = unit(steps[-1](x[:, -1], place, layers[-1]).float())
    return State(T, h, model.embedding.recent(time), moves, layers, steps, ahead=[])


def states_after(layer, x, rot):
    """The states of a layer's attention after bars x [B, T, C], without its output."""
    B, T, C = x.shape
    kv = F.linear(norm(x), layer.qkv.weight[C:]).view(B, T, 2, layer.H, C // layer.H)
    k, v = kv.permute(2, 3, 0, 1, 4)                                        # [H, B, T, D]
    k = rotate(k[None], [a[1:] for a in rot])[0]
    return [end_of(kind, *share, T)
            for kind, *share in zip(layer.kinds, k.split(layer.shares), v.split(layer.shares))]


def end_of(kind, k, v, T):
    """The state of a kind of attention after bars k, v [H, B, T, D]."""
    if kind.window:
        return [ring(a[:, :, -kind.window:].flatten(0, 1).float(), kind.window, T) for a in (k, v)]
    age = torch.arange(T - 1, -1, -1, device=k.device)
    k = k.float() * torch.exp(-kind.slope[:, None] * age)[:, None, :, None]
    with torch.autocast(k.device.type, enabled=False):
        return (v.float().mT @ k).flatten(0, 1)


@torch.no_grad()
def step(model, coarse, fine, time, state):
    """One bar more: coarse, fine, time int64 [B] -> h [B, C], state. Updates the state in place.

    time may also be [B, n], with the stamps of bars to come: what hangs on these alone is made for
    many at once. Matmuls run in the type of the prefill, the states are float32; call step itself
    outside of autocast.
    """
    if not state.ahead:
        look_ahead(model, time.view(len(time), -1)[:, :AHEAD], state)
    place, clock, state.stamps = state.ahead.pop(0)
    z, values = model.candles(coarse[:, None], fine[:, None])
    moves, state.moves = model.embedding.past_moves(values, state.moves)
    x = model.embedding.read(z, moves, clock)[:, 0]
    x = x.to(state.steps[0].up.dtype)                                       # [B, C]
    for layer, states in zip(state.steps, state.layers):
        x = layer(x, place, states)
    state.h, state.pos = unit(x.float()), state.pos + 1
    return state.h, state


def look_ahead(model, time, state):
    """Makes all that the next bars need besides their tokens, time [B, n]."""
    (B, n), stamps = time.shape, torch.cat((state.stamps, time), dim=1)
    pos = torch.arange(state.pos, state.pos + n, device=time.device)
    clock = model.embedding.clock(stamps, n).split(1, 1)
    recent = stamps.unfold(1, state.stamps.shape[1], 1)[:, 1:].unbind(1)    # n of [B, GAPS]
    state.ahead = list(zip(places_of(model, pos, B), clock, recent))


class LayerStep:
    """A layer's recurrence, with weights of a type. Those in float32, but for the narrowing ones,
    lie by columns, with which a CPU is up to four times as fast on a few rows."""

    def __init__(self, layer, dtype):
        self.H, self.shares = layer.H, layer.shares
        for name in ("qkv", "out", "up", "down"):
            weight = getattr(layer, name).weight.detach().to(dtype)
            by_columns = dtype == torch.float32 and name != "down"
            setattr(self, name, weight.T.contiguous().T if by_columns else weight)
        self.out, self.down = self.out.T, self.down.T       # as addmm wants them
        self.kinds = [local_step if kind.window else linear_step for kind in layer.kinds]

    def __call__(self, x, place, states):
        """x [B, C] -> [B, C]: one bar more; updates the states, which are float32, in place.

        A batched product of three axes costs least around it.
        """
        B, H, (rot, weights) = len(x), self.H, place
        qkv = F.linear(unit(x), self.qkv).float().view(B, 3 * H, -1)        # [B, 3 H, D]
        qkv = qkv.transpose(0, 1).reshape(3, H * B, 1, -1)
        shares = [B * n for n in self.shares]
        parts = zip(rotate(qkv[:2], rot).split(shares, 1), qkv[2].split(shares))
        outs = [kind(*qk, v, state, weight) for kind, (qk, v), state, weight
                in zip(self.kinds, parts, states, weights)]
        o = torch.cat(outs).view(H, B, -1).transpose(0, 1).reshape(B, -1)   # [B, C]
        x = torch.addmm(x, o.to(x.dtype), self.out)
        return torch.addmm(x, F.silu(F.linear(unit(x), self.up)), self.down)


def unit(x):
    """kernels.norm, the fastest of one bar."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def linear_step(q, k, v, S, fade):
    """Linear attention's recurrence of q, k, v [H B, 1, D]: S = exp(-m) S + v^T k, o^T = S q^T; S
    [H B, D, D] in place, fade exp(-m) [H B, 1, 1]. Transposed, it takes half as long."""
    return unit(torch.bmm(S.mul_(fade).addcmul_(v.mT, k), q.mT).mT)


def local_step(q, k, v, ring, place):
    """Local attention of q [H B, 1, D] over a ring of the last W keys and values, 2 of
    [H B, W, D], in place; place: that of the bar, [1], and the bias of all places [H B, 1, W]."""
    (keys, values), (at, bias) = ring, place
    score = torch.baddbmm(bias, q, keys.index_copy_(1, at, k).mT)           # [H B, 1, W]
    return torch.bmm(score.softmax(-1), values.index_copy_(1, at, v))


def places_of(model, pos, B):
    """What the steps of bars at pos [n], of B rows, need of their place: n times the rotation, 2 of
    [2, 1, 1, D], and the weights of each kind of attention."""
    rot = (a[:, 0].split(1, dim=-2) for a in model.rotation(pos))
    weights = (step_weights(kind, pos, B) for kind in model.layers[0].kinds)
    return list(zip(zip(*rot), zip(*weights)))


def step_weights(kind, pos, B):
    """Those of one kind, n times: the decay [H B, 1, 1], or the place in the ring [1] and the bias
    of all its places [H B, 1, W]."""
    slope = kind.slope.repeat_interleave(B)[:, None, None]                  # [H B, 1, 1]
    if not kind.window:
        return [torch.exp(-slope)] * len(pos)
    at = pos[:, None] % kind.window                                         # [n, 1]
    age = (at - torch.arange(kind.window, device=pos.device)) % kind.window     # of what it holds
    age = age[:, None, None]                                                # [n, 1, 1, W]
    return list(zip(at, (-slope * age).masked_fill(age > pos[:, None, None, None], -math.inf)))


def rings(layer, states, T):
    """The states that a layer's forward over T bars leaves, as its steps want them: those of linear
    attention transposed; keys and values become rings, bar p in place p % W."""
    return [[ring(a.flatten(0, 1).float(), kind.window, T) for a in state] if kind.window
            else state.mT.contiguous() for kind, state in zip(layer.kinds, states)]


def ring(a, W, T):
    """The last bars of T, a [H B, at most W, D], as a ring [H B, W, D]."""
    if T <= W:
        return F.pad(a, (0, 0, 0, W - T))
    return a.roll(T % W, dims=1)    # the first is bar T - W, whose place is T % W


# --- Tokens ---------------------------------------------------------------------------------------

def sample(model, h, temperature=1.0, top_p=1.0, generator=None, u=None, order=None, logits=None):
    """Draws the next bar's coarse and fine token, int64 [...], for h [..., C].

    logits [..., 2^k1]: of the coarse token, in place of coarse_logits(h). temperature, top_p: see
    draw. u [..., 2]: uniform numbers to draw by, else from `generator`; u [..., K, 2]: K draws from
    each h, [..., K]. order int64 [2^k1]: the coarse tokens as u runs through them; by rising close,
    models that hardly differ draw bars that hardly do.
    """
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
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    p = logits.softmax(-1)
    if top_p < 1:       # the likeliest up to a mass of top_p, the one that crosses it included
        value, order = p.sort(dim=-1, descending=True)
        value = value.masked_fill(value.cumsum(-1) - value >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, value)
    c = p.cumsum(-1)
    at = torch.searchsorted(c, (u * c[..., -1:]).contiguous(), right=True)
    return at.clamp(max=p.shape[-1] - 1)
