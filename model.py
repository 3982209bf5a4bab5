"""The model: a decoder that reads one candle per position and names the next one, coarse token first, then fine.

    from model import load_checkpoint
    model, tokenizer, meta = load_checkpoint("out.pt")
    state = model.prefill(coarse, fine, time)              # once for the context
    coarse, fine = model.sample(state.h)                   # then one step a bar, at constant cost
    h, state = model.step(coarse, fine, time, state)

No weight belongs to a code. A pair of tokens is read as the candle that it decodes to, and the heads score each code by
its candle; so codes that look alike share what is learned, and a larger codebook costs no weights. Each layer has heads
with linear attention over the whole past and heads with softmax attention over short windows. At mid depth a latent
reasoner refines a few slots at every 32nd bar, from the bars before it. The parallel form (forward, prefill) and the
recurrence (step) are the same function.

Shapes: H heads, B rows of the batch, T bars, D channels of a head, C = H D, M borders; tokens of k1 and k2 bits. Heads
come first, so that each kind of attention takes its share of them in one piece.
"""
import copy
import math
import typing
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from backstage.checkpoint import (
    FORMAT_VERSION, Checkpoint, check_sizes, check_weights, damaged, read_checkpoint, read_sizes)
from backstage.clock import calendar
from backstage.files import save_atomic
from backstage.script import UserError
from backstage.series import DAY, DECAY
from tokenizer import Tokenizer

N_CHANNELS = len(data.CHANNELS)
EPS = 1e-6          # of the RMS norm
CHUNK = 64          # bars in a chunk of linear attention: about as much work within chunks as on states
GROUP = 32          # chunks whose states are made in one product
AHEAD = 16          # bars of generation whose clock is read at once
# what the model reads of bars, beside their candles
HALF_LIVES = (1.0, 4.0, 12.0, 32.0, 96.0)  # bars; of the means of true range (of 32 it is s_t itself) and of moves
MAX_LOG = 4.0       # bound of the logs of ranges
MAX_MOVE = 10.0     # and of moves
HARMONICS = 6       # of the day, waves that tell the time of day
CALENDAR = (24, 60, 7, 31, 12, 32)  # hour, minute, weekday, day, month, log2 of the spacing: rows of their embedding
GAPS = 7            # spacings whose median tells the bars' interval
DAYS = 28           # days back at whose same time of day the model looks, and again at the last of them alone:
LAST_DAYS = 7
REACH = 512         # bars back, at most, of what it sees there
NO_BAR = -2**62     # stands for the stamp of a bar before the first one


@dataclass
class ModelConfig:
    """Sizes and switches of a Model, saved with it. ValueError for sizes that do not fit."""
    coarse_bits: int = 10            # k1: the coarse vocabulary is 2^k1
    fine_bits: int = 10              # k2
    n_layer: int = 4
    n_head: int = 8
    n_embd: int = 128
    linear_heads: int = -1           # heads with linear attention over the whole past; -1 is half of them
    windows: tuple = (16, 64)        # the other heads' windows in bars, the bar itself included; equal shares of heads
    pos: str = "both"                # rope: rotated q and k; alibi: linear bias, in linear attention a decay; both
    reasoner: bool = True            # the latent reasoner at mid depth
    border: int = 32                 # a border every so many bars
    slots: int = 16                  # latent slots at a border = bars that the parallel forecast reaches
    rounds: int = 2                  # refinements of the slots, with shared weights
    span: int = 128                  # bars before the border that its slots look at, a multiple of border
    aux_weight: float = 0.1          # weight of the slots' own prediction of the bars after the border
    block_size: int = 256            # bars in a training window; forecasts give the model as many as context
    unmoved: float = 0.0             # share of bars in the training data whose close did not move

    def __post_init__(self):
        self.windows = tuple(self.windows)
        if self.linear_heads == -1:
            self.linear_heads = self.n_head // 2 if self.windows else self.n_head
        check_sizes(self)


# --- Attention -------------------------------------------------------------------------------------------------------

class RMSNorm(torch.autograd.Function):
    """With a backward of its own: under autocast F.rms_norm works in float32, on a CPU three times as long."""

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = length.square().div(x.shape[-1]).add(EPS).rsqrt().to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        along = (g * y).mean(-1, keepdim=True, dtype=torch.float32).to(y.dtype)
        return torch.addcmul(g, y, along, value=-1).mul_(r)


def norm(x):
    """x [..., C] / its root mean square (Zhang and Sennrich, arXiv 1910.07467), without gain: a linear map follows."""
    return RMSNorm.apply(x) if torch.is_grad_enabled() else F.rms_norm(x, x.shape[-1:], eps=EPS)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


def heads_first(x, n, H):
    """[B, ..., n * C] -> [n, H, B, ..., D]."""
    return x.unflatten(-1, (n, H, -1)).movedim((-3, -2), (0, 1)).contiguous()


def heads_last(x):
    """[H, B, ..., D] -> [B, ..., C]."""
    return x.movedim(0, -2).flatten(-2)


def rotation(pos, dim, turns=True):
    """What rotate needs of bars at pos [T]: cos and signed sin of pos * theta, for q and k, each [2, 1, 1, T, dim].

    Those for q are divided by sqrt(dim), so that no attention has to. Without turns, theta is 0.
    """
    even = torch.arange(0, dim, 2, device=pos.device, dtype=torch.float64)      # float32 is off by 1e-3 at bar 20,000
    theta = turns * 10000.0 ** (-even / dim)                                    # [dim / 2]
    angle = pos.double()[:, None] * theta                                       # [T, dim / 2]
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)      # [T, dim]
    return [torch.stack((a * dim**-0.5, a))[:, None, None].float() for a in (cos, sin)]


def rotate(qk, rot):
    """Rotary positions (Su et al., arXiv 2104.09864): turns pairs (x_i, x_{i + D/2}) of q and k [2, H, B, T, D]."""
    cos, sin = rot
    return torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)


def slopes(n, most, decays):
    """The slopes of n heads, from 2^most down to 2^(most - 6), or 0 without decay: [n]."""
    return decays * 2.0 ** (most - 6 * torch.arange(n) / max(1, n - 1))


def decay(slope, d):
    """exp(-slope d) where d >= 0, else 0: [H, *d.shape]. Held at exp(-40), since denormal numbers are slow."""
    slope = slope.view(-1, *[1] * d.dim())
    return torch.exp(-(slope * d.clamp(min=0)).clamp(max=40)).masked_fill(d < 0, 0)


def softmax_attention(q, k, v, bias=None):
    """Of q [..., Tq, D], divided by sqrt(D) before, to k, v [..., Tk, D]; bias is added to the scores."""
    score = q @ k.mT
    if bias is not None:
        score = score.add_(bias)
    return score.softmax(-1) @ v


def spans(a, w, back):
    """Cuts a [H, B, N * w, D] into N blocks, each with the `back` blocks before it: [H, B, N, (back + 1) * w, D].

    Before the first block there are zeros.
    """
    N = a.shape[2] // w
    a = F.pad(a, (0, 0, back * w, 0)).unflatten(2, (N + back, w))
    return torch.cat([a[:, :, n:n + N] for n in range(back + 1)], dim=3)


class LinearAttention(nn.Module):
    """Heads that look over the whole past: attention without softmax, hence with a state of fixed size.

        o_i = sum_{j <= i} exp(-m (i - j)) (q_i . k_j) v_j / sqrt(D),      m = slope of the head, 0 without decay

    as a recurrence (Katharopoulos et al., arXiv 2006.16236), normed per head in place of its denominator (Qin et al.,
    arXiv 2210.10340), with a decay and in chunks (Sun et al., arXiv 2307.08621). slope: [H].
    """

    def __init__(self, slope):
        super().__init__()
        self.register_buffer("slope", slope, persistent=False)
        self.register_buffer("per_bar", torch.exp(-slope)[:, None, None, None], persistent=False)

    def forward(self, q, k, v):
        """q (divided by sqrt(D)), k, v [H, B, T, D] -> o [H, B, T, D], and the state after the last bar in float32,
        S = sum_j exp(-m (T - 1 - j)) k_j v_j^T [H B, D, D].

        Cut the bars into chunks n of L bars, let i and j count within a chunk, and split the sum into the bars of the
        own chunk and all those before it. With S_n [D, D] the state after chunk n:
            o_i = sum_{j <= i} exp(-m (i - j)) (q_i . k_j) v_j  +  exp(-m (i + 1)) q_i S_{n-1}
            S_n = exp(-m L) S_{n-1} + U_n,                         U_n = sum_j exp(-m (L - 1 - j)) k_j v_j^T
        The first sum is a product of matrices, (Q K^T * decay) V. So are the states of a group of chunks, since
        S_n = sum_{n' <= n} exp(-m L (n - n')) U_n'. No exponent is above 0: nothing can overflow.
        """
        H, B, T, D = q.shape
        L, m, dtype = CHUNK, self.slope, q.dtype
        if T % L:   # zeros in front: they add nothing to any sum, and the last chunk ends with the last bar
            q, k, v = (F.pad(a, (0, 0, -T % L, 0)) for a in (q, k, v))
        q, k, v = (a.reshape(H, B, -1, L, D) for a in (q, k, v))                # [H, B, N, L, D]
        i, per_bar = torch.arange(L, device=q.device), (H, 1, 1, L, 1)
        A = (q @ k.mT).mul_(decay(m, i[:, None] - i).to(dtype)[:, None, None])  # [H, B, N, L, L]
        K = k * decay(m, L - 1 - i).to(dtype).view(per_bar)
        U = (K.mT @ v).float().flatten(-2)                                      # [H, B, N, D * D]
        S, before = U.new_zeros(H, B, 1, D * D), []
        with torch.autocast(q.device.type, enabled=False):
            for u in U.split(GROUP, dim=2):
                n = torch.arange(u.shape[2] + 1, device=q.device)
                W = decay(m * L, n[:, None] - 1 - n[:-1])                       # [H, n + 1, n]
                s = W[:, None] @ u + decay(m * L, n)[:, None, :, None] * S      # [H, B, n + 1, D * D]
                S = s[:, :, -1:]
                before.append(s[:, :, :-1].to(dtype))
        before = torch.cat(before, dim=2).unflatten(-1, (D, D))                 # S_{n-1} for each chunk n
        Q = q * decay(m, i + 1).to(dtype).view(per_bar)
        o = (A @ v).add_(Q @ before)                                            # [H, B, N, L, D]
        return norm(o.view(H, B, -1, D)[:, :, -T:]), S.view(H * B, D, D)

    def places(self, pos):
        """What step needs of bars at pos [n] besides: nothing, n times."""
        return [None] * len(pos)

    def step(self, q, k, v, S, place):
        """One bar more: q, k, v [H B, 1, D]; S [H B, D, D] is updated in place."""
        S.unflatten(0, (len(self.slope), -1)).mul_(self.per_bar)
        return norm(torch.bmm(q, S.addcmul_(k.mT, v)))


class LocalAttention(nn.Module):
    """Heads that look at the last `window` bars, the bar itself included, by softmax.

    The score has the bias -slope (i - j), slope [H] (linear biases: Press et al., arXiv 2108.12409); 0 switches it off.
    """

    def __init__(self, window, slope):
        super().__init__()
        self.window = window
        self.register_buffer("slope", slope, persistent=False)

    def forward(self, q, k, v):
        """q (divided by sqrt(D)), k, v [H, B, T, D] -> o [H, B, T, D], and the ring: keys and values of the last
        W = `window` bars, 2 of [H B, W, D], bar p in place p % W.

        In blocks of W bars: a block's queries need the keys of their own block and of the one before it.
        """
        T = q.shape[2]
        w, back = min(self.window, T), int(T > self.window)
        ring = [self.ring(a.flatten(0, 1)) for a in (k, v)]
        if T % w:
            q, k, v = (F.pad(a, (0, 0, 0, -T % w)) for a in (q, k, v))
        N = q.shape[2] // w
        i, j = torch.arange(w, device=q.device), torch.arange(-w * back, w, device=q.device)
        d = i[:, None] - j                                                      # [w, 2w]
        bias = (-self.slope[:, None, None] * d).masked_fill((d < 0) | (d >= w), -math.inf)      # [H, w, 2w]
        bias = bias[:, None].repeat(1, N, 1, 1)                                 # [H, N, w, 2w]
        bias[:, 0, :, :w * back] = -math.inf                                    # nothing before the first block
        o = softmax_attention(q.unflatten(2, (N, w)), spans(k, w, back), spans(v, w, back), bias[:, None].to(q.dtype))
        return o.flatten(2, 3)[:, :, :T], ring

    def ring(self, a):
        W, T = self.window, a.shape[1]
        if T <= W:
            return F.pad(a.float(), (0, 0, 0, W - T))
        return a[:, -W:].float().roll(T % W, dims=1)    # the first is bar T - W, whose place is T % W

    def places(self, pos):
        """Of bars at pos [n]: place in the ring [1], and the bias of all places [H, 1, 1, W], n of each."""
        place = pos[:, None] % self.window                                      # [n, 1]
        age = (place - torch.arange(self.window, device=pos.device)) % self.window      # of what a place holds [n, W]
        bias = -self.slope[:, None, None, None] * age[:, None, None, None]      # [n, H, 1, 1, W]
        return list(zip(place, bias.masked_fill((age > pos[:, None])[:, None, None, None], -math.inf)))

    def step(self, q, k, v, ring, place):
        """One bar more: q, k, v [H B, 1, D]; the ring is updated in place; place: see places."""
        (keys, values), (at, bias) = ring, place
        score = torch.bmm(q, keys.index_copy_(1, at, k).mT)                     # [H B, 1, W]
        score.unflatten(0, (len(bias), -1)).add_(bias)
        return torch.bmm(score.softmax(-1), values.index_copy_(1, at, v))


# --- The layer -------------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    """Pre-norm attention and MLP. Heads in order: the linear ones, then an equal share for each window."""

    def __init__(self, config):
        super().__init__()
        self.H, C, decays = config.n_head, config.n_embd, config.pos != "rope"
        self.qkv, self.out = linear(C, 3 * C), linear(C, C)
        self.up, self.down = linear(C, 4 * C), linear(4 * C, C)
        self.kinds = nn.ModuleList()
        if config.linear_heads:     # half of the weight is left after 11 .. 710 bars
            self.kinds.append(LinearAttention(slopes(config.linear_heads, -4, decays)))
        if self.H > config.linear_heads:
            share = (self.H - config.linear_heads) // len(config.windows)
            self.kinds.extend(LocalAttention(window, slopes(share, -1, decays)) for window in config.windows)
        self.shares = [len(kind.slope) for kind in self.kinds]

    def forward(self, x, rot, keep=None, drop=None):
        """x [B, T, C] -> [B, T, C]; appends to the list `keep` what step needs. drop [2, B, 1, C]: masks of dropout."""
        qk, v = heads_first(self.qkv(norm(x)), 3, self.H).split((2, 1))         # [2, H, B, T, D], [1, H, B, T, D]
        q, k = rotate(qk, rot)
        parts = [a.split(self.shares) for a in (q, k, v[0])]
        outs, states = [], []
        for kind, q, k, v in zip(self.kinds, *parts):
            o, state = kind(q, k, v)
            outs.append(o)
            states.append(state)
        if keep is not None:
            keep.append(states)
        x = x + dropped(self.out(heads_last(torch.cat(outs))), drop, 0)
        return x + dropped(self.down(F.silu(self.up(norm(x)))), drop, 1)

    def places(self, pos):
        """What step needs of bars at pos [n] besides their rotation: n lists, an entry for each kind of attention."""
        return list(zip(*(kind.places(pos) for kind in self.kinds)))

    def step(self, x, rot, places, states):
        """x [B, C] -> [B, C]: one bar more; updates the states, which are float32, in place.

        In steps heads and rows are one axis, [H B, ...]: a batched product of three axes costs least around it.
        """
        B, H = len(x), self.H
        qkv = self.qkv(norm(x)).float().view(B, 3 * H, -1).transpose(0, 1)      # [3 H, B, D]
        qk, v = qkv.reshape(3, H * B, 1, -1).split((2, 1))                      # [2, H B, 1, D], [1, H B, 1, D]
        shares = [B * n for n in self.shares]
        q, k = rotate(qk, rot)
        parts = [a.split(shares) for a in (q, k, v[0])]
        outs = [kind.step(*rest) for kind, *rest in zip(self.kinds, *parts, states, places)]    # [H B, 1, D] of a kind
        o = torch.cat(outs).view(H, B, -1).transpose(0, 1).reshape(B, -1)       # [B, C]
        x = x + self.out(o.to(x.dtype))
        return x + self.down(F.silu(self.up(norm(x))))


def dropped(x, drop, site):
    return x if drop is None else x * drop[site]


# --- The latent reasoner ---------------------------------------------------------------------------------------------

class Reasoner(nn.Module):
    """Slots [16, C] at each border, refined from the `span` bars before it; read by the bars from the border on.

    The bars lie on a grid of rows, one from each border to the next. The slots at the start of row m + 1 look at rows
    m, m - 1, ..., and the bars of row m + 1 look at those slots: shifts by whole rows, all borders side by side. Slots
    that attend to many inputs: Jaegle et al., arXiv 2103.03206.

    The state of its steps is a dict, in float32: `pending` [B, border, C], the bars since the last border; `past`, keys
    and values of the `span` bars before it, 2 of [H B, span, D]; `slots`, those of the slots, 2 of [H B, 16, D], or [].
    """

    def __init__(self, config):
        super().__init__()
        C, self.config, self.H = config.n_embd, config, config.n_head
        self.latent = nn.Parameter(torch.randn(config.slots, C))
        self.offset = nn.Parameter(torch.zeros(config.border, C))   # tells a bar how far it is from its border
        self.gate = nn.Parameter(torch.full((C,), 0.1))
        # slots look at bars, then at each other; bars read slots
        self.look_q, self.look_kv, self.look_out = linear(C, C), linear(C, 2 * C), linear(C, C)
        self.self_qkv, self.self_out = linear(C, 3 * C), linear(C, C)
        self.up, self.down = linear(C, 2 * C), linear(2 * C, C)
        self.read_q, self.read_kv, self.read_out = linear(C, C), linear(C, 2 * C), linear(C, C)
        self.scale = (C // self.H) ** -0.5
        slope = 2.0 ** (-1 - 8 * torch.arange(self.H) / self.H)
        distance = torch.arange(config.span, 0, -1)
        self.register_buffer("near", -slope[:, None] * distance, persistent=False)      # [H, span]

    def heads(self, x):
        """[B, ..., n * C] -> n tensors [H, B, ..., D]."""
        return heads_first(x, x.shape[-1] // len(self.gate), self.H).unbind()

    def think(self, k, v, count):
        """Slots [B, M, 16, C] from k, v [H, B, M, span, D] of the bars before M borders, of which count [M] exist."""
        missing = torch.arange(k.shape[3], 0, -1, device=k.device) > count[:, None]                 # [M, span]
        bias = self.near[:, None].masked_fill(missing, -math.inf)[:, None, :, None].to(k.dtype)     # [H, 1, M, 1, span]
        s = self.latent.to(k.dtype).expand(*k.shape[1:3], -1, -1)                                   # [B, M, 16, C]
        for _ in range(self.config.rounds):
            q = self.heads(self.look_q(self.scale * norm(s)))[0]                                    # [H, B, M, 16, D]
            s = s + self.look_out(heads_last(softmax_attention(q, k, v, bias)))
            own_q, own_k, own_v = self.heads(self.self_qkv(norm(s)))
            s = s + self.self_out(heads_last(softmax_attention(self.scale * own_q, own_k, own_v)))
            s = s + self.down(F.silu(self.up(norm(s))))
        return s

    def keys_values(self, slots):
        """Keys and values that bars read from slots [B, M, 16, C]: 2 of [H, B, M, 16, D]."""
        return self.heads(self.read_kv(norm(slots)))

    def forward(self, x, phase, keep=None):
        """x [B, T, C] -> x and the slots [B, M, 16, C] of the M borders at (p + phase) % border == 0, 0 < p < T.

        keep: a dict that takes the state of step.
        """
        (B, T, C), border, span = x.shape, self.config.border, self.config.span
        left = phase % border                                                   # empty places at the start of the grid
        first = border - left                                                   # the first border
        M = max(0, math.ceil((T - first) / border))
        end = M * border                                                        # the last border, on the grid
        grid = F.pad(x, (0, 0, left, end + border - left - T))                  # [B, end + border, C]
        k, v = self.heads(self.look_kv(norm(grid)))                             # [H, B, end + border, D]
        slots = x.new_zeros(B, 0, self.config.slots, C)
        if M:
            count, back = first + border * torch.arange(M, device=x.device), span // border - 1
            slots = self.think(spans(k[:, :, :end], border, back), spans(v[:, :, :end], border, back), count)
            bars = grid[:, border:].unflatten(1, (M, border))                   # [B, M, border, C]
            q = self.heads(self.scale * (self.read_q(norm(bars)) + self.offset.to(x.dtype)))[0]
            k_read, v_read = self.keys_values(slots)
            o = softmax_attention(q.to(k_read.dtype), k_read, v_read).to(x.dtype)
            read = (self.gate.to(x.dtype) * self.read_out(heads_last(o))).flatten(1, 2)
            read = F.pad(read, (0, 0, border, 0))                               # nothing before the first border
            x = x + read[:, left:left + T]
        if keep is not None:
            past = [F.pad(a, (0, 0, span, 0))[:, :, end:end + span].flatten(0, 1).float() for a in (k, v)]
            last = self.keys_values(slots[:, -1:]) if M else []                 # 2 of [H, B, 1, 16, D]
            keep.update(pending=grid[:, end:].float().clone(), past=past, slots=[a.flatten(0, 2).float() for a in last])
        return x, slots

    def step(self, x, place, state):
        """One bar x [B, C], `place` bars after its border."""
        state["pending"][:, place] = x
        if not state["slots"]:
            return x
        q = self.heads(self.scale * (self.read_q(norm(x)) + self.offset[place].to(x.dtype)))[0]     # [H, B, D]
        o = softmax_attention(q.float().view(self.H * len(x), 1, -1), *state["slots"])
        return x + self.gate.to(x.dtype) * self.read_out(heads_last(o.view_as(q)).to(x.dtype))

    def border_step(self, n_bars, state):
        """At a border, after n_bars bars: those since the last one become keys and values; the slots are made anew."""
        more = self.heads(self.look_kv(norm(state["pending"])))                 # 2 of [H, B, border, D]
        past = [torch.cat((a[:, self.config.border:], b.flatten(0, 1).float()), 1) for a, b in zip(state["past"], more)]
        k, v = (a.view(self.H, -1, 1, *a.shape[1:]).to(more[0].dtype) for a in past)
        slots = self.think(k, v, torch.tensor([n_bars], device=k.device))       # [B, 1, 16, C]
        state.update(past=past, slots=[a.flatten(0, 2).float() for a in self.keys_values(slots)])


# --- The model -------------------------------------------------------------------------------------------------------

def gap_bucket(gaps):
    """floor(log2) of the (lower) median of the spacings [..., GAPS] that exist, 1 to 31, or 0: [..., 1]."""
    exist = (gaps > 0) & (gaps < -NO_BAR // 2)
    median = gaps.double().masked_fill(~exist, math.nan).nanmedian(-1, keepdim=True).values
    return (median.log2().floor().clamp(max=30) + 1).nan_to_num(0).long()


def days_before(stamps, n):
    """For each of the last n of the stamps [B, T], and each of the DAYS days before it: how many bars back lies the bar
    that came after the same time of day. int64 [B, n, DAYS]; -1 where there is none within REACH bars."""
    T = stamps.shape[1]
    days = DAY * torch.arange(1, DAYS + 1, device=stamps.device)
    earlier = (stamps[:, T - n:, None] - days).flatten(1)                       # [B, n * DAYS]
    at = torch.searchsorted(stamps.contiguous(), earlier)
    there = stamps.gather(1, at.clamp(max=T - 1)) == earlier
    own = torch.arange(T - n, T, device=stamps.device)[:, None]
    back = own - at.unflatten(1, (n, DAYS)) - 1
    return back.masked_fill(~there.view_as(back) | (back < 0) | (back >= REACH), -1)


def true_range(high, low):
    """Of a bar whose high and low are told from the close before; bounded, for candles that no market shows."""
    return (high.clamp(min=0) - low.clamp(max=0)).clamp(1e-3, 1e3)


def centred(a):
    """a less its mean over the codes, its first axis. What all logits share says nothing, but would grow to hundreds in
    some thousand updates and cost bf16 its digits."""
    return a - a.mean(0)


def mlp(n_in, n, n_out):
    return nn.Sequential(nn.Linear(n_in, n), nn.SiLU(), nn.Linear(n, n_out))


@dataclass
class State:
    """What generation carries from bar to bar, of B rows; it does not grow. (data.State is what decodes a bar.)"""
    pos: int                      # bars seen, the same of all rows
    phase: int                    # borders lie where (p + phase) % border == 0
    parts: nn.ModuleList          # the layers, and the reasoner: see Model.parts_for_steps
    h: torch.Tensor               # [B, C]: hidden state of the last bar, from which the heads read the next one
    stamps: torch.Tensor          # int64 [B, REACH]: of the last bars whose clock was read; NO_BAR before the first
    means: torch.Tensor           # float64 [B, 2, len(HALF_LIVES)]: see Model.past_means
    recent: torch.Tensor          # [B, REACH, 2]: range and volume of the last bars, bar p in place p % REACH
    layers: list                  # per layer and kind of attention its state, [H B, ...]
    reasoner: dict                # see Reasoner; empty without one
    ahead: list                   # of each bar to come: pos, cos, sin, Layer.places, and what Model.clock says

    def repeat(self, n):
        """Each row n times, as copies of its own: many paths go on from one prefill."""
        def rows(a):
            if isinstance(a, dict):
                return {name: rows(part) for name, part in a.items()}
            return a.repeat_interleave(n, dim=0) if torch.is_tensor(a) else [rows(part) for part in a]

        kept = {name: rows(getattr(self, name)) for name in ("h", "stamps", "means", "recent", "layers", "reasoner")}
        ahead = [(pos, cos, sin, places, *rows(clock)) for pos, cos, sin, places, *clock in self.ahead]
        return replace(self, ahead=ahead, **kept)


class Model(nn.Module):
    """Bars' tokens and stamps -> the next bar's tokens: `forward` for many bars, `prefill` and `step` one by one.

    config: a ModelConfig, or a dict of its fields. The codes' candles are random ones before `read_codes`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = config if isinstance(config, ModelConfig) else ModelConfig(**config)
        C, V1, V2, n = config.n_embd, 2**config.coarse_bits, 2**config.fine_bits, N_CHANNELS
        random = torch.Generator().manual_seed(0)
        # candles of the codes, as Tokenizer.decode_tables: z = D1[coarse] + M[coarse] g[fine], standardized channels
        self.register_buffer("D1", torch.randn(V1, n, generator=random))
        self.register_buffer("M", 0.3 * torch.randn(V1, n, n, generator=random))
        self.register_buffer("g", torch.randn(V2, n, generator=random))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.register_buffer("up_mask", torch.arange(V1) >= V1 // 2)    # coarse tokens that say "up"
        self.register_buffer("lean", torch.ones(()))    # how far a mean of its own is trusted, see coarse_logits
        # log shares of the codes in the training data, centred: what the heads say before they have learned anything
        self.register_buffer("coarse_share", torch.zeros(V1))
        self.register_buffer("fine_share", torch.zeros(V2))

        # what it reads
        fade = 0.5 ** (1 / torch.tensor(HALF_LIVES, dtype=torch.float64))
        self.register_buffer("past_decay", fade, persistent=False)
        self.register_buffer("past_unit", (2 / (1 - fade[:, None])).sqrt(), persistent=False)   # of a mean of moves
        n_seen = n + 2 * len(HALF_LIVES) + 5 + 2 * HARMONICS
        self.candle = mlp(n_seen, C, C)
        self.candle_linear = linear(n_seen, C)      # sums over past moves stay linear
        offsets = torch.tensor(CALENDAR).cumsum(0) - torch.tensor(CALENDAR)
        self.register_buffer("offsets", offsets, persistent=False)
        self.calendar = nn.Embedding(sum(CALENDAR), C)
        # the layers
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.reasoner = Reasoner(config) if config.reasoner else None
        self.mid = config.n_layer // 2
        self.grad_ckpt = False                      # see run
        # the heads: coarse logits = share + h . coarse_head(D1)
        #            fine logits = share + silu(fine_mix h + fine_given(D1, M)) . fine_head(g)
        self.coarse_head = mlp(n, C, C)
        self.fine_given = mlp(n + n * n, C, C)
        self.fine_mix = linear(C, C)
        self.fine_head = mlp(n, C, C)
        self.codes = {}                             # see kept
        heads = nn.ModuleList([self.coarse_head, self.fine_given, self.fine_head])
        self.code_weights = list(heads.parameters())

        inner = "q.weight", "kv.weight", "up.weight", "calendar.weight", "fine_mix.weight"
        for name, p in self.named_parameters():     # all others begin as torch has them
            if name.endswith(("out.weight", "down.weight")):    # back into the stream: smaller, the more layers
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name.endswith(inner):
                nn.init.normal_(p, std=0.02)
        for head in (self.coarse_head, self.fine_head):
            nn.init.normal_(head[2].weight, std=0.02)

    @torch.no_grad()
    def read_codes(self, tokenizer, shares=None):
        """Takes the candles that the tokenizer's codes decode to.

        shares: how often each code occurs, [2^k1] and [2^k2], above 0; None: all alike.
        """
        for buffer, table in zip((self.D1, self.M, self.g), tokenizer.frozen_tables()):
            buffer.copy_(table)
        self.mean.copy_(tokenizer.mean)
        self.std.copy_(tokenizer.std)
        self.up_mask.copy_(tokenizer.decode(torch.arange(len(self.D1)))[:, 0] > 0)
        for buffer, share in zip((self.coarse_share, self.fine_share), shares or ()):
            buffer.copy_(centred(torch.as_tensor(share).log()))

    # ---- what it reads

    def standardized(self, coarse, fine=None):
        """The candle z [..., 6] of codes int64 [...]; without fine, what the coarse one says."""
        z = self.D1[coarse]
        return z if fine is None else z + (self.M[coarse] @ self.g[fine][..., None]).squeeze(-1)

    def values(self, z):
        """Of candles z [..., 6]: close, high and low as log prices from the close before, in units of s_t, and the
        feature volume: 4 of [...]."""
        x = self.mean + self.std * z
        close, open_, upper, lower = x[..., :4].clamp(-20, 20).sinh().unbind(-1)
        high = torch.maximum(close, open_) + upper.clamp(min=0)
        low = torch.minimum(close, open_) - lower.clamp(min=0)
        return close, high, low, x[..., 4]

    def past_means(self, k, move, before=None):
        """Decayed means of bars over the n half-lives HALF_LIVES, relative to s_t: [B, T, 2 n], logs of those of the
        true range, then those of the close's moves. Also the means after the last bar, float64 [B, 2, n].

        before: the means before the first bar, else 1 and 0. All follows from k_t = TR_t / s_t, [B, T]:
            s_{t+1} = s_t (a + (1 - a) k_t),    e_{t+1} = b e_t + (1 - b) k_t s_t
        with the decays a of s and b of e. The means e_{t+1} / s_{t+1} are known once bar t is. For moves alike, with
        move [B, T], close / s_t, in place of k_t.
        """
        growth = DECAY + (1 - DECAY) * k                              # [B, T], s_{t+1} / s_t
        terms = torch.stack((k, move.clamp(-1e3, 1e3)), dim=1)                  # [B, 2, T]
        b, T = self.past_decay, k.shape[1]                                      # [n]
        if T > 1:
            growth = growth.log().cumsum(-1).exp()                              # [B, T], s_{t+1} / s_0
            terms = terms * F.pad(growth[:, None, :-1], (1, 0), value=1.0)      # [B, 2, T], relative to s_0
        e = (1 - b)[:, None] * terms[:, :, None]                                # [B, 2, n, T]
        shift = 1
        while shift < T:            # after each pass a term is the sum of twice as many bars
            e = e + (b ** shift)[:, None] * F.pad(e[..., :-shift], (shift, 0))
            shift *= 2
        if before is None:
            before = torch.stack((torch.ones_like(b), torch.zeros_like(b)))     # [2, n]
        fades = b[:, None] if T == 1 else b[:, None] ** torch.arange(1, T + 1, device=k.device)
        e = (e + before[..., None] * fades) / growth[:, None, None]
        ranges, moves = e.unbind(1)                                             # [B, n, T]
        moves = moves * self.past_unit                                          # brought to about unit size
        seen = torch.cat((ranges.log().clamp(-MAX_LOG, MAX_LOG), moves.clamp(-MAX_MOVE, MAX_MOVE)), dim=1)
        return seen.mT.float(), e[..., -1]

    def clock(self, stamps, pos, size):
        """What the stamps [B, T] say of the last n bars, at pos [n]: waves of the day [B, n, 2 HARMONICS], the sum of
        the calendar's rows [B, n, C]; and for same_hour the places [B, n, DAYS] of the bars it asks for, bar p in place
        p % size, their weights in two means [B, n, 2, DAYS], and the share of days that have one [B, n, 1]."""
        n = len(pos)
        time = stamps[:, -n:]
        turn = 2 * math.pi / DAY * (time % DAY)[..., None]
        angle = turn * torch.arange(1, HARMONICS + 1, device=time.device)
        waves = torch.cat((angle.sin(), angle.cos()), -1)

        gaps = F.pad(stamps, (GAPS, 0), value=NO_BAR).diff()[:, -n - GAPS + 1:]
        gaps = gaps.unfold(1, GAPS, 1)                                          # [B, n, GAPS]
        rows = torch.cat((calendar(time), gap_bucket(gaps)), dim=-1) + self.offsets        # [B, n, 6]
        stamp = F.embedding_bag(rows.flatten(0, -2), self.calendar.weight, mode="sum").view(*time.shape, -1)

        back = days_before(stamps, n)
        there = back >= 0
        lately = there & (torch.arange(DAYS, device=pos.device) < LAST_DAYS)
        weights = torch.stack((lately, there), dim=2).float()
        weights = weights / (1 + weights.sum(-1, keepdim=True))                 # few days are drawn towards 0
        return waves, stamp, (pos[:, None] - back) % size, weights, there.float().mean(2, keepdim=True)

    def same_hour(self, recent, place, weights, share):
        """Means of range and volume of what came after the same time of day, over LAST_DAYS and DAYS days, and the
        share of days that had such a bar: [B, n, 5]. recent [B, size, 2]; the others: see clock."""
        values = recent.gather(1, place.flatten(1)[..., None].expand(-1, -1, 2)).unflatten(1, place.shape[1:])
        return torch.cat(((weights @ values).flatten(2), share), -1)            # [B, n, 2, DAYS] [B, n, DAYS, 2]

    def embedding(self, coarse, fine, pos, waves, stamp, *hour, state=None):
        """What the model reads of bars: tokens [B, T], pos [T] and what clock says -> [B, T, C]; and past means and
        recent bars after them, as a State has them. state: that of the bars before."""
        z = self.standardized(coarse, fine)                                     # [B, T, 6]
        close, high, low, volume = self.values(z.double())                      # [B, T]
        k = true_range(high, low)
        means, after = self.past_means(k, close, state and state.means)
        recent = torch.stack((k.log(), volume), dim=-1).clamp(-MAX_LOG, MAX_LOG).float()        # [B, T, 2]
        if state:
            recent = state.recent.index_copy_(1, pos % REACH, recent)
        with torch.autocast(z.device.type, enabled=False):
            hour = self.same_hour(recent, *hour)
        seen = torch.cat((z, means, hour, waves), -1)
        x = self.candle(seen) + self.candle_linear(seen)
        return norm(x + stamp.to(x.dtype)), after, recent

    # ---- the trunk

    def trunk(self, coarse, fine, time, phase=0, keep=None, depth=None, drop=None):
        """Hidden states [B, T, C] after `depth` layers (None: all), and the slots of the borders [B, M, 16, C], if any.

        phase: borders lie where (p + phase) % border == 0. keep: a dict, takes what step needs. drop: see forward.
        """
        pos = torch.arange(time.shape[1], device=time.device)
        x, means, recent = self.embedding(coarse, fine, pos, *self.clock(time, pos, len(pos)))
        slots, layers, reasoner = None, None, None
        if keep is not None:
            layers, reasoner = [], {}
            keep.update(means=means, recent=recent, layers=layers, reasoner=reasoner)
        rot = [a.to(x.dtype) for a in self.rotation(pos)]
        for n, layer in enumerate(self.layers[:depth]):
            if n == self.mid and self.reasoner:
                x, slots = self.run(self.reasoner, x, phase, reasoner)
            x = self.run(layer, x, rot, layers, None if drop is None else drop[n])
        return x, slots

    def rotation(self, pos):
        return rotation(pos, self.config.n_embd // self.config.n_head, turns=self.config.pos != "alibi")

    def run(self, part, *args):
        """part(*args); with grad_ckpt its activations are made again in the backward pass, not kept."""
        if self.grad_ckpt and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)

    # ---- what it says

    def coarse_vectors(self):
        """The coarse head's vector of every code: [2^k1, C], the only one of a list."""
        return [centred(self.coarse_head(self.D1))]

    def fine_vectors(self):
        """Of the fine head what every coarse code gives, [2^k1, C], and the vector of every fine code, [2^k2, C]."""
        return [self.fine_given(torch.cat((self.D1, self.M.flatten(1)), 1)), centred(self.fine_head(self.g))]

    def kept(self, make):
        """make(), one of the two above: kept until a weight changes, which its version tells.

        But a fused update raises none, and tensors of inference mode have none: there they are made anew.
        """
        if torch.is_grad_enabled() or self.g.is_inference():
            self.codes = {}
            return make()
        kind, name = self.g.device.type, make.__name__
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.g.dtype
        key = dtype, [(w.data_ptr(), w._version) for w in (*self.code_weights, self.D1, self.M, self.g)]
        if self.codes.get("key") != key:
            self.codes = dict(key=key)
        if name not in self.codes:
            with torch.autocast(kind, enabled=False):       # the same for callers in any precision
                self.codes[name] = [a.to(dtype) for a in make()]
        return self.codes[name]

    def moves(self):
        """The move of every coarse token, log(C_t / C_{t-1}) / s_t, bounded, and its square: [2^k1, 2]."""
        move = self.values(self.D1)[0].clamp(-MAX_MOVE, MAX_MOVE)
        return torch.stack((move, move**2), dim=1)

    def coarse_logits(self, h):
        """h [..., C] -> [..., 2^k1].

        Then the mean move is drawn towards that of the training data: base + lean (mean - base), lean from 0 to 1.
        Directions are learned by heart first, and over many bars a false drift adds up; so pretraining fits lean on
        val. The law is tilted, p ~ exp(t move) p, which moves its mean by t times its variance.
        """
        [vectors] = self.kept(self.coarse_vectors)
        logits = F.linear(h, vectors, self.coarse_share)
        if self.lean.item() == 1:
            return logits
        moves = self.moves()
        mean, variance = self.move_moments(logits, moves)
        base, _ = self.move_moments(self.coarse_share, moves)
        tilt = (self.lean - 1) * (mean - base) / variance
        return torch.addcmul(logits.float(), tilt[..., None], moves[:, 0])

    def move_moments(self, logits, moves):
        """Mean and variance [...] of the next move under coarse logits [..., 2^k1]; moves: see there."""
        mean, square = (logits.float().softmax(-1) @ moves).unbind(-1)
        return mean, (square - mean**2).clamp(min=1e-6)

    def fine_logits(self, h, coarse):
        """Given the coarse token: h [..., C], coarse int64 [...] -> [..., 2^k2]."""
        given, vectors = self.kept(self.fine_vectors)
        mixed = F.silu(self.fine_mix(h) + F.embedding(coarse, given))
        return F.linear(mixed, vectors, self.fine_share)

    def p_up(self, h, unmoved=None):
        """P(close rises | it moves) [...] for h [..., C]: the exact P(up token) / (1 - unmoved).

        unmoved: share of bars whose close stays, a number or a tensor [...]; None: that of the training data.
        """
        unmoved = self.config.unmoved if unmoved is None else unmoved
        p = self.coarse_logits(h).float().softmax(-1) @ self.up_mask.float()
        return (p / (1 - unmoved)).clamp(max=1)

    def sample(self, h, temperature=1.0, top_p=1.0, generator=None, u=None, order=None):
        """Draws the next bar's coarse and fine token, int64 [...], for h [..., C].

        temperature, top_p: see draw. u [..., 2]: uniform numbers to draw by, else from `generator`. order int64 [2^k1]:
        the coarse tokens as u runs through them; by rising close, models that hardly differ draw bars that hardly do.
        """
        if u is None:
            u = torch.rand(*h.shape[:-1], 2, device=h.device, generator=generator)
        logits = self.coarse_logits(h)
        if order is not None:
            logits = logits[..., order]
        coarse = draw(logits, temperature, top_p, u[..., :1]).squeeze(-1)
        if order is not None:
            coarse = order[coarse]
        return coarse, draw(self.fine_logits(h, coarse), temperature, top_p, u[..., 1:]).squeeze(-1)

    # ---- many bars at once

    def hidden(self, coarse, fine, time):
        """Tokens and stamps int64 [B, T] -> h [B, T, C], from which the heads read the next bar."""
        return norm(self.trunk(coarse, fine, time)[0])

    def forward(self, coarse, fine, time, targets=None, phase=0, drop=None):
        """coarse, fine, time int64 [B, T] -> coarse logits [B, T, 2^k1], fine logits [B, T, 2^k2] given the target
        coarse token, else the likeliest, and the loss in nats per bar, None without targets.

        targets: (coarse, fine) of each next bar, -1 where it does not count. phase: see trunk. drop: masks of dropout
        [n_layer, 2, B, 1, C].
        """
        h, slots = self.trunk(coarse, fine, time, phase, drop=drop)
        h = norm(h)
        coarse_logits = self.coarse_logits(h)
        given = coarse_logits.argmax(-1) if targets is None else targets[0].clamp(min=0)
        fine_logits = self.fine_logits(h, given)
        if targets is None:
            return coarse_logits, fine_logits, None
        loss = mean_nats(coarse_logits, targets[0]) + mean_nats(fine_logits, targets[1])
        if slots is not None and self.config.aux_weight:
            loss = loss + self.config.aux_weight * self.slot_loss(slots, targets, phase)
        return coarse_logits, fine_logits, loss

    def slot_loss(self, slots, targets, phase):
        """Slot m at border p predicts bar p + m, which is the target at p + m - 1."""
        border, (B, M, n, _) = self.config.border, slots.shape
        m, i = torch.arange(M, device=slots.device), torch.arange(n, device=slots.device)
        at = border * (m[:, None] + 1) - phase % border - 1 + i                 # [M, 16]
        coarse, fine = (F.pad(target, (0, n), value=-1)[:, at] for target in targets)  # [B, M, 16]
        h = norm(slots)
        return mean_nats(self.coarse_logits(h), coarse) + mean_nats(self.fine_logits(h, coarse.clamp(min=0)), fine)

    def parallel(self, coarse, fine, time):
        """The next 16 bars at once, from slots at the origin T: coarse logits [B, 16, 2^k1] and h [B, 16, C].

        fine_logits, p_up and sample take the rest from h. Raises UserError if the model has no reasoner.
        """
        if not self.reasoner:
            raise UserError("the model has no latent reasoner: parallel forecasts need one; "
                                 "train it with the reasoner, or forecast step by step")
        span, r = self.config.span, self.reasoner
        x, _ = self.trunk(coarse, fine, time, depth=self.mid)
        x = F.pad(x[:, -span:], (0, 0, max(0, span - x.shape[1]), 0))           # [B, span, C]
        k, v = r.heads(r.look_kv(norm(x)))
        h = norm(r.think(k[:, :, None], v[:, :, None], torch.tensor([coarse.shape[1]], device=x.device))[:, 0])
        return self.coarse_logits(h), h

    # ---- bar by bar

    def prefill(self, coarse, fine, time, phase=0):
        """The State after coarse, fine, time int64 [B, T], from which step goes on."""
        keep, T = {}, time.shape[1]
        x, _ = self.trunk(coarse, fine, time, phase, keep)
        recent = F.pad(keep.pop("recent")[:, -REACH:], (0, 0, 0, max(0, REACH - T)))
        state = State(pos=T, phase=phase, parts=self.parts_for_steps(x.dtype), h=norm(x[:, -1]).float(),
                      stamps=F.pad(time, (REACH, 0), value=NO_BAR)[:, -REACH:].clone(),
                      recent=recent.roll(max(0, T - REACH) % REACH, dims=1), ahead=[], **keep)
        self.reach_border(state)
        return state

    def parts_for_steps(self, dtype):
        """Copies of the layers and the reasoner with weights of that type. Those in float32 lie by columns, with
        which a CPU is up to three times as fast on a few rows."""
        parts = copy.deepcopy(nn.ModuleList([*self.layers, *([self.reasoner] if self.reasoner else [])]))
        for p in parts.requires_grad_(False).parameters():
            p.data = p.to(dtype) if dtype != torch.float32 or p.dim() != 2 else p.T.contiguous().T
        return parts

    @torch.no_grad()
    def step(self, coarse, fine, time, state):
        """One bar more: coarse, fine, time int64 [B] -> h [B, C], state. Updates the state in place; no gradients.

        time may also be [B, n], with the stamps of bars to come: what hangs on these alone is made for many at once.
        Matmuls run in the type of the prefill, the states are float32; call step itself outside of autocast.
        """
        if not state.ahead:
            self.look_ahead(time.view(len(time), -1)[:, :AHEAD], state)
        pos, cos, sin, places, *clock = state.ahead.pop(0)
        x, state.means, _ = self.embedding(coarse[:, None], fine[:, None], pos, *clock, state=state)    # [B, 1, C]
        x = x[:, 0].to(state.parts[0].up.weight.dtype)
        for n, states in enumerate(state.layers):
            if n == self.mid and self.reasoner:
                x = state.parts[-1].step(x, (state.pos + state.phase) % self.config.border, state.reasoner)
            x = state.parts[n].step(x, (cos, sin), places, states)
        state.h, state.pos = norm(x.float()), state.pos + 1
        self.reach_border(state)
        return state.h, state

    def look_ahead(self, time, state):
        """Makes all that the next bars need besides their tokens, time [B, n]."""
        stamps = torch.cat((state.stamps, time), dim=1)
        pos = torch.arange(state.pos, state.pos + time.shape[1], device=time.device)
        cos, sin = (a[:, 0].split(1, dim=-2) for a in self.rotation(pos))       # n of [2, 1, 1, D]
        clock = [a.split(1, dim=1) for a in self.clock(stamps, pos, REACH)]
        state.ahead = list(zip(pos.split(1), cos, sin, self.layers[0].places(pos), *clock))
        state.stamps = stamps[:, -REACH:]

    @torch.no_grad()
    def reach_border(self, state):
        """Where the next bar is at a border, its slots are made: paths that begin there share them."""
        if self.reasoner and (state.pos + state.phase) % self.config.border == 0:
            dtype = state.parts[0].up.weight.dtype
            with torch.autocast(state.h.device.type, dtype, enabled=dtype != torch.float32):
                state.parts[-1].border_step(state.pos, state.reasoner)


# --- Losses and drawing ----------------------------------------------------------------------------------------------

def mean_nats(logits, target):
    """Mean cross-entropy of logits [..., V] over the targets int64 [...] that count (>= 0); 0 if none does."""
    rows = zip(logits.flatten(0, -2).split(256), target.flatten().split(256))  # so many stay in the cache in float32
    total = sum(F.cross_entropy(a.float(), b, ignore_index=-1, reduction="sum") for a, b in rows)
    return total / (target >= 0).sum().clamp(min=1)


def kl(log_p, log_q):
    """KL(p || q), nats [...], of log-probabilities [..., V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def draw(logits, temperature, top_p, u):
    """Tokens int64 [..., n] from logits [..., V]: where uniform numbers u [..., n] fall in the cumulative distribution.

    temperature divides the logits; top_p keeps the likeliest tokens of that total probability.
    """
    u = u.clamp(max=1 - 2**-23)  # a number rounded up to 1 would fall behind the last token that can be
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:       # keep the likeliest tokens up to a mass of top_p, the one that crosses it included
        value, order = p.sort(dim=-1, descending=True)
        p = torch.zeros_like(p).scatter(-1, order, value.masked_fill(value.cumsum(-1) - value >= top_p, 0))
    c = p.cumsum(-1)
    return torch.searchsorted(c, u * c[..., -1:], right=True).clamp(max=p.shape[-1] - 1)


@torch.no_grad()
def close_table(tokenizer):
    """The decoded close (a feature, see data.features) of every token pair, [2^k1, 2^k2]."""
    k1, k2 = tokenizer.config.coarse_bits, tokenizer.config.fine_bits
    fine = torch.arange(2**k2)
    return torch.stack([tokenizer.decode(torch.full_like(fine, c), fine)[..., 0] for c in range(2**k1)])


def save_checkpoint(path, model, tokenizer, **meta):
    """Writes one self-contained file. model may be None while the tokenizer is in training, and tokenizer a plain dict.

    meta: of the fields of Checkpoint what there is, and what else a stage needs. UserError when the disk refuses.
    """
    entry = dict.fromkeys(typing.get_type_hints(Checkpoint)) | dict(metrics=[]) | meta
    if model is not None:
        entry |= dict(config=asdict(model.config), model=model.state_dict())
    entry["tokenizer"] = tokenizer.dump() if isinstance(tokenizer, Tokenizer) else tokenizer
    entry["format_version"] = FORMAT_VERSION
    save_atomic(entry, path)


def load_checkpoint(path, device="cpu", weights="best"):
    """-> model (in eval mode), tokenizer, meta (all else in the file). Raises UserError for a file that is none.

    weights: "best" on val, "last", or "average" of the last updates; the last where there are no such ones.
    """
    entry = read_checkpoint(path)
    if entry["model"] is None:
        raise UserError(f"{path}: its training has not reached the model yet; go on with pretrain.py --resume")
    states = {"last": entry["model"], "best": entry["best"], "average": entry["average"]}
    chosen = entry["model"] if states[weights] is None else states[weights]
    try:
        tokenizer, model = Tokenizer.load(entry["tokenizer"]), Model(read_sizes(entry, ModelConfig))
        model.read_codes(tokenizer)
        for state in states.values():
            if state is not None:
                check_weights(state, model.state_dict())
        model.load_state_dict(chosen)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, UserError) as error:
        raise damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    meta = {key: value for key, value in entry.items() if key not in ("model", "best", "average", "tokenizer")}
    return model.to(device).eval(), tokenizer, meta


