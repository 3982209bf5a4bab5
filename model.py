"""The model: a causal Transformer over candles. It reads one bar per position and predicts the
next, its coarse token first, then its fine token.

    from model import load_checkpoint
    model, tokenizer, meta = load_checkpoint("out.pt")
    state = model.prefill(coarse, fine, time)              # once for the context
    coarse, fine = model.sample(state.h)                   # then one step a bar, at constant cost
    h, state = model.step(coarse, fine, time, state)

No weight belongs to a code. A pair of tokens is read as the candle that it decodes to, and the
heads score each code by its candle; so codes that look alike share what is learned, and a larger
codebook costs no weights. Each layer has heads with linear attention over the whole past and heads
with softmax attention over short windows. To the side, a latent reasoner predicts the next 16 bars
at once.

In order: the embedding, attention, the layer, the reasoner, the model. Bar by bar the same function
is a recurrence: backstage/generate.py.

Shapes: H heads, B rows of the batch, T bars, D channels of a head, C = H D; tokens of k1 and k2
bits. In attention heads come first, so that each kind takes its share of them in one piece.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from backstage import generate
from backstage.checkpoint import check_sizes, restored, save_checkpoint  # the last is handed on
from backstage.clock import GAPS, NO_BAR, calendar, gap_bucket
from backstage.kernels import (
    Cache, decayed_means, heads_first, heads_last, kept, norm, rotate, rotation, with_block_before)
from backstage.lean import tilted
from backstage.script import UserError
from backstage.series import DECAY

N_CHANNELS = len(data.CHANNELS)
GROUP = 32          # chunks whose states are made in one product
# what the model reads of bars, beside their candles
HALF_LIVES = (1.0, 4.0, 12.0, 32.0, 96.0)   # bars; of the means of past moves
MAX_MOVE = 10.0     # largest mean move that is read
CALENDAR = (24, 60, 7, 32)  # rows: hour, minute, weekday, log2 of the spacing in seconds


@dataclass
class ModelConfig:
    """Sizes and switches of a Model, saved with it. ValueError for sizes that do not fit."""
    coarse_bits: int = 10            # k1: the coarse vocabulary is 2^k1
    fine_bits: int = 10              # k2
    n_layer: int = 4
    n_head: int = 8
    n_embd: int = 128
    linear_heads: int = -1           # heads with linear attention; -1 is half of them
    windows: tuple = (16, 64)        # bars that the other heads see; equal shares of heads
    pos: str = "both"                # rope: rotated q and k; alibi: linear bias or decay; both
    reasoner: bool = True            # the latent reasoner
    latents: int = 16                # its latents: bars that --parallel predicts at once
    rounds: int = 2                  # their refinements, with shared weights
    span: int = 128                  # bars before the origin that they look at
    aux_weight: float = 0.1          # weight of their own cross-entropy
    block_size: int = 256            # bars in a training window, and in the context of a forecast
    unmoved: float = 0.0             # share of bars in the training data whose close did not move

    def __post_init__(self):
        self.windows = tuple(self.windows)
        if self.linear_heads == -1:
            self.linear_heads = self.n_head // 2 if self.windows else self.n_head
        check_sizes(self)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


def mlp(n_in, n, n_out):
    return nn.Sequential(nn.Linear(n_in, n), nn.SiLU(), nn.Linear(n, n_out))


# --- The embedding --------------------------------------------------------------------------------

class Embedding(nn.Module):
    """Bars -> the stream. With r the candle and means of past moves,

        x = norm( MLP(r) + W r + sum of the calendar's rows )
    """

    def __init__(self, C):
        super().__init__()
        n_read = N_CHANNELS + len(HALF_LIVES)
        self.candle = mlp(n_read, C, C)
        self.candle_linear = linear(n_read, C)      # sums over past moves stay linear
        self.calendar = nn.Embedding(sum(CALENDAR), C)
        offsets = torch.tensor(CALENDAR).cumsum(0) - torch.tensor(CALENDAR)
        self.register_buffer("offsets", offsets, persistent=False)
        decay = 0.5 ** (1 / torch.tensor(HALF_LIVES, dtype=torch.float64))
        self.register_buffer("decay", decay, persistent=False)
        unit = (2 / (1 - decay[:, None])).sqrt()        # brings a mean of moves to about unit size
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, z, values, time):
        """z [B, T, 6]: candles; values: see Model.values; time int64 [B, T] -> x [B, T, C], and
        the means after the last bar, with which generation goes on."""
        moves, after = self.past_moves(values)                          # [B, T, n]
        return self.read(z, moves, self.clock(time)), after

    def read(self, z, moves, stamp):
        """The stream x [B, T, C] from all that is read; stamp: see clock."""
        r = torch.cat((z, moves), -1)                                   # [B, T, n_read]
        x = self.candle(r) + self.candle_linear(r)
        return norm(x + stamp.to(x.dtype))                              # [B, T, C]

    def clock(self, time, n=None):
        """What the last n stamps tell (None: all): the sum of the calendar's rows, [B, n, C]."""
        n = n or time.shape[1]
        gaps = F.pad(time, (GAPS, 0), value=NO_BAR).diff()[:, -n - GAPS + 1:].unfold(1, GAPS, 1)
        time = time[:, -n:]
        rows = torch.cat((calendar(time), gap_bucket(gaps)), -1) + self.offsets     # [B, n, 4]
        rows = F.embedding_bag(rows.flatten(0, -2), self.calendar.weight, mode="sum")
        return rows.view(len(time), n, -1)

    def recent(self, time):
        """The last GAPS stamps, which `clock` needs for the bars to come: int64 [B, GAPS]."""
        return F.pad(time, (GAPS, 0), value=NO_BAR)[:, -GAPS:].clone()

    def past_moves(self, values, before=None):
        """Decayed means of the close's moves over the n half-lives HALF_LIVES, relative to s_t:
        [B, T, n], and those after the last bar, float64 [B, n]; before: these of the bars before
        the first, else 0.

        s_t is the mean of true ranges with decay a (here without the factor of the hours), e_t one
        of moves with decay b; k_t = TR_t / s_t and m_t are the bar's true range and move in s_t:
            s_{t+1} = s_t (a + (1 - a) k_t),    e_{t+1} = b e_t + (1 - b) m_t s_t
        So e / s follows from candles alone, without prices.
        """
        close, high, low, _ = values                                        # [B, T]
        before = torch.zeros_like(self.decay) if before is None else before     # [n] or [B, n]
        # e_{t+1} / s_{t+1}; the second argument is s_{t+1} / s_t
        means, after = decayed_means(
            close.clamp(-1e3, 1e3), DECAY + (1 - DECAY) * true_range(high, low), self.decay, before)
        return (means * self.unit).clamp(-MAX_MOVE, MAX_MOVE).mT.float(), after


def true_range(high, low):
    """Of bars whose high and low are log prices from the close before, in s_t; bounded, for codes
    whose candles no market shows."""
    return (high.clamp(min=0) - low.clamp(max=0)).clamp(1e-3, 1e3)


# --- Attention ------------------------------------------------------------------------------------

def slopes(n, most, on):
    """The slopes of n heads, from 2^most down to 2^(most - 6), or 0 if not on: [n]."""
    return on * 2.0 ** (most - 6 * torch.arange(n) / max(1, n - 1))


def decay(slope, d):
    """exp(-slope d) where d >= 0, else 0: [H, *d.shape]. Held at exp(-40), since denormal numbers
    are slow."""
    slope = slope.view(-1, *[1] * d.dim())
    return torch.exp(-(slope * d.clamp(min=0)).clamp(max=40)).masked_fill(d < 0, 0)


def softmax_attention(q, k, v, bias=None):
    """Of q [..., Tq, D], divided by sqrt(D) before, to k, v [..., Tk, D]; bias is added to the
    scores."""
    score = q @ k.mT
    if bias is not None:
        score = score.add_(bias)
    return score.softmax(-1) @ v


class LinearAttention(nn.Module):
    """Heads that look over the whole past: attention without softmax, hence with a state of fixed
    size.

        o_i = norm( sum_{j <= i} exp(-m (i - j)) (q_i . k_j) v_j ),     m = slope of the head

    with q divided by sqrt(D) before. As a recurrence (Katharopoulos et al., arXiv 2006.16236),
    normed per head in place of its denominator (Qin et al., arXiv 2210.10340), with a decay and in
    chunks (Sun et al., arXiv 2307.08621). slope: [H], 0 without decay. chunk: bars in one, so that
    there is about as much work within chunks as between them.
    """

    window = None       # the whole past

    def __init__(self, slope, chunk=64):
        super().__init__()
        self.chunk = chunk
        self.register_buffer("slope", slope, persistent=False)

    def weights(self, T, dtype):
        """The decays in `forward` of T bars; they depend on places alone.

        own: between two bars of a chunk; to_end: from a bar to the end of its chunk; chunks:
        between the chunks of a group; fade: from the state before the group; since: from the state
        before a chunk to each of its bars.
        """
        m, L = self.slope, self.chunk
        i, n = (torch.arange(size, device=m.device) for size in (L, min(GROUP, -(-T // L)) + 1))
        own = decay(m, i[:, None] - i)[:, None, None]                       # [H, 1, 1, L, L]
        to_end, since = (decay(m, a)[:, None, None, :, None] for a in (L - 1 - i, i + 1))
        chunks = decay(m * L, n[:, None] - 1 - n[:-1])                      # [H, n + 1, n]
        fade = decay(m * L, n)[:, None, :, None]                            # [H, 1, n + 1, 1]
        return own.to(dtype), to_end.to(dtype), chunks, fade, since.to(dtype)

    def forward(self, q, k, v, weights):
        """q (divided by sqrt(D)), k, v [H, B, T, D] -> o [H, B, T, D], and the state after the last
        bar in float32, S = sum_j exp(-m (T - 1 - j)) k_j^T v_j [H B, D, D].

        Cut the bars into chunks n of L bars, let i and j count within a chunk, and split the sum
        into the bars of the own chunk and all those before it. With S_n [D, D] the state after
        chunk n:
            o_i = sum_{j <= i} exp(-m (i - j)) (q_i . k_j) v_j  +  exp(-m (i + 1)) q_i S_{n-1}
            S_n = exp(-m L) S_{n-1} + U_n,     U_n = sum_j exp(-m (L - 1 - j)) k_j^T v_j
        The first sum is a product of matrices, (Q K^T * decay) V. So are the states of a group of
        chunks, since S_n = sum_{n' <= n} exp(-m L (n - n')) U_n'. No exponent is above 0: nothing
        can overflow.
        """
        (H, B, T, D), L, dtype = q.shape, self.chunk, q.dtype
        own, to_end, chunks, fade, since = weights
        if T % L:   # zeros in front add nothing, and the last chunk ends with the last bar
            q, k, v = (F.pad(a, (0, 0, -T % L, 0)) for a in (q, k, v))
        q, k, v = (a.reshape(H, B, -1, L, D) for a in (q, k, v))            # [H, B, N, L, D]
        A = (q @ k.mT).mul_(own)                                            # [H, B, N, L, L]
        U = ((k * to_end).mT @ v).float().flatten(-2)                       # [H, B, N, D * D]
        S, before = U.new_zeros(H, B, 1, D * D), []
        with torch.autocast(q.device.type, enabled=False):
            for u in U.split(GROUP, dim=2):
                n = u.shape[2]
                s = chunks[:, None, :n + 1, :n] @ u + fade[:, :, :n + 1] * S
                S = s[:, :, -1:]                                            # [H, B, 1, D * D]
                before.append(s[:, :, :-1].to(dtype))
        before = torch.cat(before, dim=2).unflatten(-1, (D, D))             # S_{n-1} of chunk n
        o = (A @ v).add_((q * since) @ before)                              # [H, B, N, L, D]
        return norm(o.view(H, B, -1, D)[:, :, -T:]), S.view(H * B, D, D)


class LocalAttention(nn.Module):
    """Heads that look at the last `window` bars, the bar itself included, by softmax.

    The score has the bias -slope (i - j), slope [H] (linear biases: Press et al., arXiv
    2108.12409); 0 switches it off.
    """

    def __init__(self, window, slope):
        super().__init__()
        self.window = window
        self.register_buffer("slope", slope, persistent=False)

    def weights(self, T, dtype):
        """What is added to the scores, of T bars: [H, 1, N, w, 2 w]; [H, 1, 1, T, T] where the
        window holds them all."""
        w, back = min(self.window, T), int(T > self.window)
        i = torch.arange(w, device=self.slope.device)
        d = i[:, None] - torch.arange(-w * back, w, device=i.device)        # [w, 2 w]
        bias = (-self.slope[:, None, None] * d).masked_fill((d < 0) | (d >= w), -math.inf)
        bias = bias[:, None].repeat(1, -(-T // w), 1, 1)                    # [H, N, w, 2 w]
        bias[:, 0, :, :w * back] = -math.inf                                # nothing before bar 0
        return bias[:, None].to(dtype)

    def forward(self, q, k, v, weights):
        """q (divided by sqrt(D)), k, v [H, B, T, D] -> o [H, B, T, D], and keys and values of the
        last bars, 2 of [H, B, w, D].

        In blocks of w bars, `window` or T if that is less: a block's queries need the keys of their
        own block and of the one before it.
        """
        T, w, back = q.shape[2], weights.shape[3], int(weights.shape[4] > weights.shape[3])
        last = k[:, :, -w:], v[:, :, -w:]
        if T % w:   # zeros behind: no earlier query sees them
            q, k, v = (F.pad(a, (0, 0, 0, -T % w)) for a in (q, k, v))
        q, k, v = q.unflatten(2, (-1, w)), *(with_block_before(a, w, back) for a in (k, v))
        return softmax_attention(q, k, v, weights).flatten(2, 3)[:, :, :T], last


# --- The layer ------------------------------------------------------------------------------------

class Layer(nn.Module):
    """Pre-norm attention and MLP. Heads in order: the linear ones, then an equal share for each
    window."""

    def __init__(self, config):
        super().__init__()
        self.H, C, biased = config.n_head, config.n_embd, config.pos != "rope"
        self.qkv, self.out = linear(C, 3 * C), linear(C, C)
        self.up, self.down = linear(C, 4 * C), linear(4 * C, C)
        self.kinds = nn.ModuleList()
        if config.linear_heads:     # slopes 2^-4 to 2^-10: half is left after 11 to 710 bars
            chunk = 32 if C // self.H < 32 else 64
            self.kinds.append(LinearAttention(slopes(config.linear_heads, -4, biased), chunk))
        if self.H > config.linear_heads:
            n = (self.H - config.linear_heads) // len(config.windows)
            self.kinds.extend(LocalAttention(w, slopes(n, -1, biased)) for w in config.windows)
        self.shares = [len(kind.slope) for kind in self.kinds]

    def forward(self, x, places, drop=None):
        """x [B, T, C] -> [B, T, C], and the states of attention after the last bar.

        places: see Model.places. drop [2, B, 1, C]: masks of dropout.
        """
        o, states = self.attend(x, places)
        return self.add(x, o, drop), states

    def attend(self, x, places):
        """Each kind of attention by its share of the heads: o [B, T, C], and their states, S
        [H B, D, D] or keys and values, 2 of [H, B, w, D]."""
        rot, weights = places
        qk, v = heads_first(self.qkv(norm(x)), 3, self.H).split((2, 1))     # [2 or 1, H, B, T, D]
        q, k = rotate(qk, rot)
        shares = zip(*(a.split(self.shares) for a in (q, k, v[0])))
        outs, states = zip(*(kind(*share, weight)
                             for kind, share, weight in zip(self.kinds, shares, weights)))
        return heads_last(torch.cat(outs)), states

    def add(self, x, o, drop=None):
        """x [B, T, C] with what attention found, o [B, T, C], and then the MLP added to it."""
        x = x + dropped(self.out(o), drop, 0)
        return x + dropped(self.down(F.silu(self.up(norm(x)))), drop, 1)


def dropped(x, drop, site):
    return x if drop is None else x * drop[site]


# --- The latent reasoner --------------------------------------------------------------------------

class Reasoner(nn.Module):
    """Predicts the next 16 bars in one pass. Latent n stands for the n-th bar ahead, whose stamp it
    knows; it attends to the last `span` hidden states before an origin and to the latents before
    it, in `rounds` rounds with shared weights (latents that attend to many inputs: Jaegle et al.,
    arXiv 2103.03206). So a shorter forecast is the beginning of a longer one."""

    def __init__(self, config):
        super().__init__()
        C, self.config, self.H = config.n_embd, config, config.n_head
        self.latent = nn.Parameter(torch.randn(config.latents, C))
        self.stamp = linear(C, C)
        self.look_q, self.look_kv, self.look_out = linear(C, C), linear(C, 2 * C), linear(C, C)
        self.self_qkv, self.self_out = linear(C, 3 * C), linear(C, C)
        self.up, self.down = linear(C, 2 * C), linear(2 * C, C)
        self.scale = (C // self.H) ** -0.5
        slope = 2.0 ** (-1 - 8 * torch.arange(self.H) / self.H)
        distance = torch.arange(config.span, 0, -1)
        self.register_buffer("near", -slope[:, None] * distance, persistent=False)  # [H, span]

    def heads(self, x):
        """[B, ..., n * C] -> n tensors [H, B, ..., D]."""
        return heads_first(x, x.shape[-1] // self.latent.shape[1], self.H).unbind()

    def forward(self, h, origins, stamps):
        """h [B, T, C]: hidden states of bars; origins int64 [B, M]: numbers of bars, at most T;
        stamps [B, M, n, C]: see Embedding.clock, of the n bars that come next
        -> latents of these, [B, M, n, C]. They see the last `span` bars before their origin."""
        k, v, bias = self.memory(h, origins)
        n = stamps.shape[2]
        later = torch.ones(n, n, device=h.device).triu(1).bool()
        causal = torch.zeros_like(later, dtype=k.dtype).masked_fill(later, -math.inf)   # [n, n]
        s = (self.latent[:n] + self.stamp(stamps)).to(k.dtype)              # [B, M, n, C]
        for _ in range(self.config.rounds):
            q = self.heads(self.look_q(self.scale * norm(s)))[0]            # [H, B, M, n, D]
            s = s + self.look_out(heads_last(softmax_attention(q, k, v, bias)))
            own_q, own_k, own_v = self.heads(self.self_qkv(norm(s)))
            o = softmax_attention(self.scale * own_q, own_k, own_v, causal)
            s = s + self.self_out(heads_last(o))
            s = s + self.down(F.silu(self.up(norm(s))))
        return norm(s)

    def memory(self, h, origins):
        """Keys and values of the bars before each origin, 2 of [H, B, M, span, D], and the bias of
        their scores: the lower, the older the bar; -inf where there is none."""
        rows = torch.arange(len(h), device=h.device)[:, None, None]
        past = origins[..., None] - torch.arange(self.config.span, 0, -1, device=h.device)
        k, v = self.heads(self.look_kv(h[rows, past.clamp(min=0)]))         # [H, B, M, span, D]
        bias = self.near[:, None, None].masked_fill(past < 0, -math.inf)    # [H, B, M, span]
        return k, v, bias[:, :, :, None].to(k.dtype)


# --- The model ------------------------------------------------------------------------------------

class Model(nn.Module):
    """Bars' tokens and stamps -> the next bar's tokens: `forward` for many bars, `prefill` and
    `step` one by one, `parallel` for the next 16 at once.

    config: a ModelConfig, or a dict of its fields. The codes' candles are random ones before
    `read_codes`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = config if isinstance(config, ModelConfig) else ModelConfig(**config)
        C = config.n_embd
        self.register_codes()
        self.embedding = Embedding(C)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.reasoner = Reasoner(config) if config.reasoner else None
        # the heads: coarse logits = share + h . coarse_head(D1)
        #            fine logits = share + silu(fine_mix h + fine_given(D1, M)) . fine_head(g)
        self.coarse_head = mlp(N_CHANNELS, C, C)
        self.fine_given = mlp(N_CHANNELS + N_CHANNELS**2, C, C)
        self.fine_mix = linear(C, C)
        self.fine_head = mlp(N_CHANNELS, C, C)
        self.grad_ckpt = False                      # see run
        self.cache = Cache()                        # see kept
        self.initialize()

    def register_codes(self):
        """Candles of the codes, as Tokenizer.decode_tables: z = D1[coarse] + M[coarse] g[fine], in
        standardized channels; and what else is known of the codes."""
        V1, V2, n = 2**self.config.coarse_bits, 2**self.config.fine_bits, N_CHANNELS
        random = torch.Generator().manual_seed(0)
        self.register_buffer("D1", torch.randn(V1, n, generator=random))
        self.register_buffer("M", 0.3 * torch.randn(V1, n, n, generator=random))
        self.register_buffer("g", torch.randn(V2, n, generator=random))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.register_buffer("up_mask", torch.arange(V1) >= V1 // 2)    # coarse tokens for "up"
        self.register_buffer("lean", torch.ones(()))                    # see coarse_logits
        # log frequency of each code in training, centred: the logits before any update
        self.register_buffer("coarse_share", torch.zeros(V1))
        self.register_buffer("fine_share", torch.zeros(V2))

    def initialize(self):
        """Small weights within the layers, smaller ones where they end in the stream; of the other
        MLPs the first layers and all biases are as torch has them."""
        inner = "q.weight", "kv.weight", "up.weight", "calendar.weight", "fine_mix.weight"
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):    # smaller, the more layers
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
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

    # ---- many bars at once

    def forward(self, coarse, fine, time, targets=None, drop=None, origins=None):
        """coarse, fine, time int64 [B, T] -> coarse logits [B, T, 2^k1], fine logits [B, T, 2^k2]
        given the target coarse token, else the likeliest, and the loss in nats per bar, None
        without targets.

        targets: (coarse, fine) of each next bar, -1 where it does not count. drop: masks of dropout
        [n_layer, 2, B, 1, C]. origins int64 [B, M], numbers of bars from 1 on: where the reasoner
        learns; None: nowhere.
        """
        h = self.hidden(coarse, fine, time, drop)
        coarse_logits = self.coarse_logits(h)
        given = coarse_logits.argmax(-1) if targets is None else targets[0].clamp(min=0)
        fine_logits = self.fine_logits(h, given)
        if targets is None:
            return coarse_logits, fine_logits, None
        loss = mean_nats(coarse_logits, targets[0]) + mean_nats(fine_logits, targets[1])
        if origins is not None and self.reasoner:
            loss = loss + self.config.aux_weight * self.reasoner_loss(h, time, origins, targets)
        return coarse_logits, fine_logits, loss

    def hidden(self, coarse, fine, time, drop=None):
        """Tokens and stamps int64 [B, T] -> h [B, T, C], from which the heads read the next bar.

        drop: see forward.
        """
        x, _ = self.embedding(*self.candles(coarse, fine), time)            # [B, T, C]
        places = self.places(x)
        for n, layer in enumerate(self.layers):
            x, _ = self.run(layer, x, places, None if drop is None else drop[n])
        return norm(x)

    def places(self, x):
        """What depends on position alone, the same in all layers: of x [B, T, C] the rotation of
        bars 0 to T - 1, and the weights of each kind of attention."""
        T, kinds = x.shape[1], self.layers[0].kinds
        rot = self.rotation(torch.arange(T, device=x.device))
        return [a.to(x.dtype) for a in rot], [kind.weights(T, x.dtype) for kind in kinds]

    def rotation(self, pos):
        D, turns = self.config.n_embd // self.config.n_head, self.config.pos != "alibi"
        return rotation(pos, D, turns)

    def run(self, part, *args):
        """part(*args); with grad_ckpt its activations are made again in the backward pass."""
        if self.grad_ckpt and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)

    def candles(self, coarse, fine):
        """Of bars [B, T]: the candles z [B, T, 6], and their values."""
        z = self.standardized(coarse, fine)
        return z, self.values(z.double())

    def standardized(self, coarse, fine=None):
        """The candle z [..., 6] of codes int64 [...]; without fine, what the coarse one says."""
        z = self.D1[coarse]
        return z if fine is None else z + (self.M[coarse] @ self.g[fine][..., None]).squeeze(-1)

    def values(self, z):
        """Of candles z [..., 6]: close, high and low as log prices from the close before, in units
        of s_t, and the feature volume: 4 of [...]."""
        x = self.mean + self.std * z
        close, open_, upper, lower = x[..., :4].clamp(-20, 20).sinh().unbind(-1)
        high = torch.maximum(close, open_) + upper.clamp(min=0)
        low = torch.minimum(close, open_) - lower.clamp(min=0)
        return close, high, low, x[..., 4]

    # ---- the heads

    def coarse_logits(self, h):
        """h [..., C] -> [..., 2^k1]: of every code its candle's vector, times h; the mean move
        drawn towards that of the training data as far as lean says (see backstage/lean.py)."""
        [vectors] = kept(self, self.coarse_vectors)
        logits = F.linear(h, vectors, self.coarse_share)
        return logits if self.lean.item() == 1 else tilted(self, logits)

    def fine_logits(self, h, coarse):
        """Given the coarse token: h [..., C], coarse int64 [...] -> [..., 2^k2]."""
        given, vectors = kept(self, self.fine_vectors)
        mixed = F.silu(self.fine_mix(h) + F.embedding(coarse, given))
        return F.linear(mixed, vectors, self.fine_share)

    def coarse_vectors(self):
        """The coarse head's vector of every code: [2^k1, C], the only one of a list."""
        return [centred(self.coarse_head(self.D1))]

    def fine_vectors(self):
        """Of the fine head what every coarse code gives, [2^k1, C], and the vector of every fine
        code, [2^k2, C]."""
        given = self.fine_given(torch.cat((self.D1, self.M.flatten(1)), 1))
        return [given, centred(self.fine_head(self.g))]

    def p_up(self, h, unmoved=None):
        """P(close rises | it moves) [...] for h [..., C]: the exact P(up token) / (1 - unmoved).

        unmoved: share of bars whose close stays, a number or a tensor [...]; None: that of the
        training data.
        """
        unmoved = self.config.unmoved if unmoved is None else unmoved
        p = self.coarse_logits(h).float().softmax(-1) @ self.up_mask.float()
        return (p / (1 - unmoved)).clamp(max=1)

    # ---- the next 16 bars at once

    def reasoner_loss(self, h, time, origins, targets):
        """The cross-entropy of the bars after the origins [B, M], nats per bar. The bar after n
        bars is the target at n - 1; bar T has no stamp here. h [B, T, C] is detached: this loss
        trains the reasoner and the heads, not the layers."""
        T, rows = time.shape[1], torch.arange(len(time), device=time.device)[:, None, None]
        ahead = origins[..., None] + torch.arange(self.config.latents, device=time.device)
        at = ahead.clamp(max=T - 1)                                         # [B, M, 16]
        coarse, fine = (a[rows, at - 1].masked_fill(ahead >= T, -1) for a in targets)
        stamps = self.embedding.clock(time).detach()[rows, at]              # [B, M, 16, C]
        h = self.reasoner(h.detach(), origins, stamps)                      # [B, M, 16, C]
        fine_logits = self.fine_logits(h, coarse.clamp(min=0))
        return mean_nats(self.coarse_logits(h), coarse) + mean_nats(fine_logits, fine)

    def parallel(self, coarse, fine, time, future_times):
        """All in one pass: h [B, C] after the bars [B, T], as prefill has it, and h [B, n, C] from
        which the heads read the next n bars, whose stamps are future_times int64 [B, n], n <= 16.
        The first of these is h itself: no latent knows the next bar as well.

        Raises UserError if the model has no reasoner.
        """
        if not self.reasoner:
            raise UserError("the model has no latent reasoner: parallel forecasts need one; "
                            "train it with the reasoner, or forecast step by step")
        h, (B, T) = self.hidden(coarse, fine, time), time.shape
        stamps = self.embedding.clock(torch.cat((time, future_times), 1), future_times.shape[1])
        ahead = self.reasoner(h, torch.full((B, 1), T, device=h.device), stamps[:, None])[:, 0, 1:]
        return h[:, -1], torch.cat((h[:, -1:], ahead.to(h.dtype)), 1)

    # ---- bar by bar: see backstage/generate.py

    sample, prefill, step = generate.sample, generate.prefill, generate.step


def centred(a):
    """a less its mean over the codes, its first axis. A number added to all logits changes nothing;
    it would grow to hundreds in some thousand updates, and cost bf16 its precision."""
    return a - a.mean(0)


def mean_nats(logits, target):
    """Mean cross-entropy of logits [..., V] over the targets int64 [...] that count (>= 0); 0 if
    none does."""
    # 256 rows at a time stay in the cache as float32
    rows = zip(logits.flatten(0, -2).split(256), target.flatten().split(256))
    total = sum(F.cross_entropy(a.float(), b, ignore_index=-1, reduction="sum") for a, b in rows)
    return total / (target >= 0).sum().clamp(min=1)


def load_checkpoint(path, device="cpu", weights="best"):
    """-> model (in eval mode), tokenizer, meta (all else in the file). UserError for a file that is
    none.

    weights: "best" on val, "last", or "average" of the last updates; the last where there are no
    such ones.
    """
    return restored(path, device, weights, Model, ModelConfig)
