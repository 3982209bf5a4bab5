"""The model: a decoder that reads one bar per position and names the next one, coarse token first, then fine.

    from model import Model, ModelConfig, load_checkpoint
    model, tokenizer, meta = load_checkpoint("out.pt")
    state = model.prefill(coarse, fine, time)              # once for the context
    coarse, fine = model.sample(state.h)                   # then one step a bar, at constant cost
    h, state = model.step(coarse, fine, time, state)

Each layer's heads look back over several ranges: linear attention over the whole past, local softmax attention over
short windows. At mid depth a latent reasoner refines a few slots at every 32nd bar, all borders at once, from the bars
before it. The parallel form (forward, prefill) and the recurrence (step) are the same function.

In this order: attention, the reasoner, the model, the checkpoint, what every training loop needs. In the comments H, B,
T, D are heads, rows of the batch, bars, channels of a head; C = H D; HL, HW the linear and the local heads; W the longest
window; M borders; k1, k2 the bits of a token; 16 stands for config.slots. Heads come first, since each kind of attention
takes some of them: its share is then one piece of memory.
"""

import math
import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from tokenizer import Tokenizer

FORMAT_VERSION = 1
CHUNK = 64          # bars in a chunk of linear attention: about as much work within chunks as on states
GROUP = 32          # chunks whose states are made in one product
EPS = 1e-6          # of RMSNorm
GAPS = 7            # spacings whose median tells the bars' interval
NO_GAP = 2**62      # stands for a spacing that does not exist (before the first bar)
CALENDAR = (24, 60, 7, 31, 12, 32)  # hour, minute, weekday, day, month, log2 of the spacing: rows of the embedding


@dataclass
class ModelConfig:
    """Sizes and switches of a Model; they are saved with it."""
    coarse_bits: int = 10            # k1: the coarse vocabulary is 2^k1
    fine_bits: int = 10              # k2
    n_layer: int = 4
    n_head: int = 8
    n_embd: int = 192
    linear_heads: int = -1           # heads with linear attention over the whole past; -1 is half of them
    windows: tuple = (16, 64)        # the other heads' windows in bars, the bar itself included; equal shares of heads
    pos: str = "rope"                # rope: rotated q and k; alibi: linear bias, in linear attention a decay; both
    reasoner: bool = True            # the latent reasoner at mid depth
    border: int = 32                 # a border every so many bars
    slots: int = 16                  # latent slots at a border = bars that the parallel forecast reaches
    rounds: int = 2                  # refinements of the slots, with shared weights
    span: int = 128                  # bars before the border that its slots look at, a multiple of border
    aux_weight: float = 0.1          # weight of the slots' own prediction of the bars after the border
    block_size: int = 256            # bars in a training window; forecasts give the model as many as context
    direction_bit: bool = True       # the top coarse bit says whether close rose (for the record: see Model.up_mask)
    unmoved: float = 0.0             # share of bars in the training data whose close did not move

    def __post_init__(self):
        """ValueError for sizes that do not fit."""
        self.windows = tuple(self.windows)
        if self.linear_heads == -1:
            self.linear_heads = self.n_head // 2 if self.windows else self.n_head

        def rule(holds, text):
            if not holds:
                raise ValueError(text)

        limits = dict(coarse_bits=(1, 14), fine_bits=(1, 14), n_layer=(1, 256), n_head=(1, 256), n_embd=(1, 16384),
                      linear_heads=(0, self.n_head), border=(1, 4096), slots=(1, 1024), rounds=(1, 64), span=(1, 2**16),
                      block_size=(1, 2**31), aux_weight=(0.0, 100.0), unmoved=(0.0, 0.999))
        for name, (low, high) in limits.items():
            value, kinds = getattr(self, name), (int, float) if isinstance(low, float) else int
            rule(isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high,
                 f"{name} must be within {low} and {high}, not {value!r}")
        n_local, n_windows = self.n_head - self.linear_heads, len(self.windows)
        rule(self.n_embd % (2 * self.n_head) == 0,
             f"n_embd ({self.n_embd}) must be an even multiple of n_head ({self.n_head})")
        rule(all(isinstance(w, int) and 1 <= w <= 2**16 for w in self.windows),
             f"windows must be 1 to 65536 bars, not {self.windows!r}")
        rule(not n_local or n_windows and n_local % n_windows == 0,
             f"{n_local} local heads cannot be shared among {n_windows} windows")
        rule(self.span % self.border == 0 and self.slots <= self.border,
             "span must be a multiple of border, and slots at most border")
        rule(self.pos in ("rope", "alibi", "both"), f"pos must be rope, alibi or both, not {self.pos!r}")


# --- Attention -------------------------------------------------------------------------------------------------------

class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2)) (Zhang and Sennrich, arXiv 1910.07467), without gain: a linear map follows.

    With a backward of its own, since that of F.rms_norm takes three times as long on a CPU.
    """

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = length.square().div(x.shape[-1]).add(EPS).rsqrt()
        y = x * r.to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        along = (g * y).mean(-1, keepdim=True, dtype=torch.float32).to(y.dtype)
        return torch.addcmul(g, y, along, value=-1).mul_(r.to(y.dtype))


def norm(x):
    """x [..., C] at a root mean square of 1."""
    return RMSNorm.apply(x) if torch.is_grad_enabled() else F.rms_norm(x, x.shape[-1:], eps=EPS)


def rotation(pos, dim):
    """cos and signed sin of pos * theta, each [T, dim] (rotary positions: Su et al., arXiv 2104.09864).

    In float64: at bar 20,000 a float32 angle is off by 1e-3.
    """
    theta = 10000.0 ** (-torch.arange(0, dim, 2, device=pos.device, dtype=torch.float64) / dim)
    angle = pos.double()[:, None] * theta                                       # [T, dim / 2]
    sin = angle.sin()
    return angle.cos().repeat(1, 2).float(), torch.cat((-sin, sin), dim=1).float()


def rotate(x, rot):
    """Turns each pair (x_i, x_{i + D/2}) of x [..., T, D] by its angle: q_i . k_j then depends on i - j alone."""
    cos, sin = rot[0].to(x.dtype), rot[1].to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def decay(slope, d):
    """exp(-slope d) where d >= 0, else 0: [H, *d.shape]."""
    return torch.exp(-slope.view(-1, *[1] * d.dim()) * d.clamp(min=0)).masked_fill(d < 0, 0)


def linear_attention(q, k, v, slope):
    """o_i = sum_{j <= i} exp(-slope (i - j)) (q_i . k_j) v_j / sqrt(D), for q, k, v [H, B, T, D] and slope [H].

    Returns o and, in float32, the state S_T = sum_j exp(-slope (T - 1 - j)) k_j v_j^T [H, B, D, D], from which the sum
    goes on bar by bar: attention as a recurrence (Katharopoulos et al., arXiv 2006.16236), without its denominator and
    normed per head instead (Qin et al., arXiv 2210.10340), with a decay and in chunks (Sun et al., arXiv 2307.08621).

    Why chunks. With m = slope, cut the bars into chunks n of L bars, let i and j count within a chunk, and split the
    sum into the bars of the own chunk and all those before it (1 / sqrt(D) left out):
        o_i = sum_{j <= i} exp(-m (i - j)) (q_i . k_j) v_j    = ((A * M) V)_i,  A = Q K^T [L, L],  M_ij = exp(-m (i - j))
            + exp(-m (i + 1)) q_i S_{n-1}                       S_n [D, D]: the state after chunk n
        S_n = exp(-m L) S_{n-1} + U_n                           U_n = sum_j exp(-m (L - 1 - j)) k_j v_j^T
    so  S_n = sum_{n' <= n} exp(-m L (n - n')) U_n', one product with a small triangular matrix W for a group of chunks.
    All is matmuls, the work is T L D + T D D, and no exponent is above 0: nothing can overflow.
    """
    H, B, T, D = q.shape
    L, dtype = CHUNK, q.dtype
    if T % L:       # zeros in front: they add nothing to any sum, and the last chunk ends with the last bar
        q, k, v = (F.pad(a, (0, 0, -T % L, 0)) for a in (q, k, v))
    q, k, v = (a.reshape(H, B, -1, L, D) for a in (q, k, v))                    # [H, B, N, L, D]
    i, scale, wide = torch.arange(L, device=q.device), D**-0.5, (H, 1, 1, -1, 1)
    A = q @ k.mT                                                                # [H, B, N, L, L]
    A = A.mul_((decay(slope, i[:, None] - i) * scale).to(dtype)[:, None, None])
    K = k * decay(slope, L - 1 - i).to(dtype).view(wide)
    U = (K.mT @ v).float().flatten(-2)                                          # [H, B, N, D * D]
    S, before = U.new_zeros(H, B, 1, D * D), []
    with torch.autocast(q.device.type, enabled=False):
        for u in U.split(GROUP, dim=2):
            n = torch.arange(u.shape[2] + 1, device=q.device)
            W = decay(slope * L, n[:, None] - 1 - n[:-1])                       # [H, n + 1, n]
            s = W[:, None] @ u + decay(slope * L, n)[:, None, :, None] * S      # [H, B, n + 1, D * D]
            S = s[:, :, -1:]
            before.append(s[:, :, :-1].to(dtype))
    before = torch.cat(before, dim=2).unflatten(-1, (D, D))                     # S_{n-1} for each chunk n
    Q = q * (decay(slope, i + 1) * scale).to(dtype).view(wide)
    o = (A @ v).add_(Q @ before)                                                # [H, B, N, L, D]
    return o.view(H, B, -1, D)[:, :, -T:], S.view(H, B, D, D)


def spans(a, w, back):
    """Cuts a [H, B, N * w, D] into N blocks, each with the `back` blocks before it: [H, B, N, (back + 1) * w, D].

    Before the first block there are zeros.
    """
    N = a.shape[2] // w
    a = F.pad(a, (0, 0, back * w, 0)).unflatten(2, (N + back, w))
    return torch.cat([a[:, :, n:n + N] for n in range(back + 1)], dim=3)


def softmax_attention(q, k, v, bias=None):
    """Softmax attention of q [..., Tq, D] to k, v [..., Tk, D]; bias is added to the scores."""
    score = (q * q.shape[-1] ** -0.5) @ k.mT
    if bias is not None:
        score = score.add_(bias)
    return score.softmax(-1) @ v


def local_attention(q, k, v, window, slope):
    """Softmax attention of bar i over bars j = i - window + 1 .. i, for q, k, v [H, B, T, D] -> [H, B, T, D].

    The score has the bias -slope (i - j), slope [H] (linear biases: Press et al., arXiv 2108.12409; 0 switches it off).
    In blocks of `window` bars: a block's queries need the keys of their own block and of the one before it, no others.
    """
    T = q.shape[2]
    w, back = min(window, T), int(T > window)
    if T % w:
        q, k, v = (F.pad(a, (0, 0, 0, -T % w)) for a in (q, k, v))
    N = q.shape[2] // w
    n, i, j = (torch.arange(*a, device=q.device) for a in ((N,), (w,), (-w * back, w)))
    d = i[:, None] - j                                                          # [w, 2w]
    bias = (-slope[:, None, None] * d).masked_fill((d < 0) | (d >= w), -math.inf)   # each row sees w keys
    bias = bias[:, None].masked_fill(n[:, None, None] * w + j < 0, -math.inf)   # [H, N, w, 2w]: those that exist
    o = softmax_attention(q.unflatten(2, (N, w)), spans(k, w, back), spans(v, w, back), bias[:, None].to(q.dtype))
    return o.flatten(2, 3)[:, :, :T]


def linear(weights, module, x):
    """module(x) in generation, where rows are few: by the copy of its weights in Model.step_weights; in x's type."""
    w = weights[module]
    return F.linear(x.to(w.dtype), w).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP. Heads in order: linear ones, then an equal share for each window."""

    def __init__(self, config):
        super().__init__()
        C, H, HL, self.windows = config.n_embd, config.n_head, config.linear_heads, config.windows
        self.shares = [HL] + [(H - HL) // len(self.windows) for _ in self.windows]
        self.H, self.HL = H, HL
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.rope, self.decays = config.pos != "alibi", config.pos != "rope"
        place = torch.cat([torch.arange(n) / max(1, n - 1) for n in self.shares])       # 0 .. 1 within each kind
        # linear heads 2^-4 .. 2^-10: half is left after 11 .. 710 bars; local ones 2^-1 .. 2^-7; all 0 with rope alone
        slope = torch.where(torch.arange(H) < HL, 2.0 ** (-4 - 6 * place), 2.0 ** (-1 - 6 * place))
        self.register_buffer("slope", slope * self.decays, persistent=False)        # [H]

    def forward(self, x, rot, keep=None):
        """x [B, T, C] -> [B, T, C]; appends to `keep` what step needs: the linear state, the last keys and values."""
        B, T, C = x.shape
        heads_first = lambda a: a.view(B, T, -1, self.H, C // self.H).permute(2, 3, 0, 1, 4).contiguous()
        qk, v = map(heads_first, self.qkv(norm(x)).split((2 * C, C), -1))
        q, k, v = *(rotate(qk, rot) if self.rope else qk).unbind(), v[0]        # [H, B, T, D]
        groups = list(zip(*(a.split(self.shares) for a in (q, k, v, self.slope))))
        o, S = [], None
        if self.HL:
            y, S = linear_attention(*groups[0])
            o.append(norm(y))
        for window, (q_, k_, v_, slope) in zip(self.windows, groups[1:]):
            if len(q_):
                o.append(local_attention(q_, k_, v_, window, slope))
        if keep is not None:
            keep.append([S, self.ring(k[self.HL:], v[self.HL:])])
        x = x + self.out(torch.cat(o).permute(1, 2, 0, 3).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(norm(x))))

    def ring(self, k, v):
        """The last keys and values of the local heads, bar p in place p % W, W the longest window: [2, HW, B, W, D]."""
        W, T = max(self.windows, default=1), k.shape[2]
        kv = torch.stack((k[:, :, -W:], v[:, :, -W:])).float()
        if T <= W:
            return F.pad(kv, (0, 0, 0, W - T))
        return kv.roll(T % W, dims=3)   # the first is bar T - W, whose place is T % W

    def step(self, x, rot, pos, memory, bias, weights):
        """x [B, C] -> [B, C]: one bar more; updates memory in place. bias [HW, 1, 1, bars in the ring]: see ring_bias."""
        B, C = x.shape
        (S, ring), HL = memory, self.HL
        qkv = linear(weights, self.qkv, norm(x)).view(B, 3, self.H, 1, -1).permute(1, 2, 0, 3, 4)  # [3, H, B, 1, D]
        q, k, v = *(rotate(qkv[:2], rot) if self.rope else qkv[:2]).unbind(), qkv[2]
        o = []
        if HL:
            if self.decays:
                S.mul_(torch.exp(-self.slope[:HL])[:, None, None, None])
            S.addcmul_(k[:HL].mT, v[:HL])
            o.append(norm((q[:HL] * q.shape[-1] ** -0.5) @ S))
        if HL < self.H:
            place, n = pos % ring.shape[3], bias.shape[-1]
            ring[0, :, :, place], ring[1, :, :, place] = k[HL:, :, 0], v[HL:, :, 0]
            o.append(F.scaled_dot_product_attention(q[HL:], ring[0, :, :, :n], ring[1, :, :, :n], attn_mask=bias))
        x = x + linear(weights, self.out, torch.cat(o).permute(1, 2, 0, 3).reshape(B, C))
        return x + linear(weights, self.down, F.gelu(linear(weights, self.up, norm(x))))

    def ring_bias(self):
        """[HW, 2 W]: from place W - 1 - p % W on, what to add to the scores of the ring's W places at bar p.

        That is -slope * distance, or -inf outside of the head's window.
        """
        W = max(self.windows, default=1)
        d = torch.arange(W, device=self.slope.device)
        window = torch.cat([d.new_full((n,), w) for n, w in zip(self.shares[1:], self.windows)] + [d[:0]])
        bias = (-self.slope[self.HL:, None] * d).masked_fill(d >= window[:, None], -math.inf).flip(1)
        return bias.repeat(1, 2)


# --- The latent reasoner ---------------------------------------------------------------------------------------------

class Reasoner(nn.Module):
    """Slots [16, C] at each border, refined from the `span` bars before it; read by the bars from the border on.

    The bars lie on a grid of blocks, one from each border to the next. The slots at the start of block m + 1 look at
    blocks m, m - 1, ..., and the bars of block m + 1 look at those slots: shifts by whole blocks, all borders side by
    side. Slots that attend to many inputs: Jaegle et al., arXiv 2103.03206.
    """

    def __init__(self, config):
        super().__init__()
        C, self.config, self.H = config.n_embd, config, config.n_head
        self.latent = nn.Parameter(torch.randn(config.slots, C))
        self.offset = nn.Parameter(torch.zeros(config.border, C))   # tells a bar how far it is from its border
        self.gate = nn.Parameter(torch.full((C,), 0.1))
        # slots look at bars, then at each other; bars read slots
        self.look_q, self.look_kv, self.look_out = (nn.Linear(C, n * C, bias=False) for n in (1, 2, 1))
        self.self_qkv, self.self_out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 2 * C, bias=False), nn.Linear(2 * C, C, bias=False)
        self.read_q, self.read_kv, self.read_out = (nn.Linear(C, n * C, bias=False) for n in (1, 2, 1))
        slope = 2.0 ** (-1 - 8 * torch.arange(self.H) / self.H)
        distance = torch.arange(config.span, 0, -1)
        self.register_buffer("near", -slope[:, None] * distance, persistent=False)      # [H, span]

    def heads(self, x):
        """[B, ..., n * C] -> n tensors [H, B, ..., D], heads first."""
        x = x.unflatten(-1, (-1, self.H, self.gate.shape[0] // self.H))
        return x.permute(-3, -2, *range(x.dim() - 3), -1).contiguous().unbind()

    def join(self, x):
        """[H, B, ..., D] -> [B, ..., C]"""
        return x.permute(*range(1, x.dim() - 1), 0, -1).flatten(-2)

    def think(self, k, v, count):
        """Slots [B, M, 16, C] from k, v [H, B, M, span, D] of the bars before M borders, of which count [M] exist."""
        missing = torch.arange(k.shape[3], 0, -1, device=k.device) > count[:, None]                 # [M, span]
        bias = self.near[:, None].masked_fill(missing, -math.inf)[:, None, :, None].to(k.dtype)     # [H, 1, M, 1, span]
        s = self.latent.to(k.dtype).expand(*k.shape[1:3], -1, -1)                                   # [B, M, 16, C]
        for _ in range(self.config.rounds):
            s = s + self.look_out(self.join(softmax_attention(*self.heads(self.look_q(norm(s))), k, v, bias)))
            s = s + self.self_out(self.join(softmax_attention(*self.heads(self.self_qkv(norm(s))))))
            s = s + self.down(F.gelu(self.up(norm(s))))
        return s

    def keys_values(self, slots):
        """Keys and values that bars read from slots [B, M, 16, C]: 2 of [H, B, M, 16, D]."""
        return self.heads(self.read_kv(norm(slots)))

    def read(self, x, kv, offset):
        """What bars x [B, M, n, C] take from the slots' keys and values; offset [n, C]: how far after the border."""
        q, = self.heads(self.read_q(norm(x)) + offset.to(x.dtype))
        return self.gate.to(x.dtype) * self.read_out(self.join(softmax_attention(q, *kv)))

    def forward(self, x, phase, keep=None):
        """x [B, T, C] -> x and the slots [B, M, 16, C] of the M borders at (p + phase) % border == 0, 0 < p < T."""
        (B, T, C), border, back = x.shape, self.config.border, self.config.span // self.config.border
        left = phase % border
        first = border - left                                                   # the first border
        M = max(0, -(-(T - first) // border))
        end = M * border                                                        # the last border, on the grid
        grid = F.pad(x, (0, 0, left, end + border - left - T))                  # [B, end + border, C]
        k, v = self.heads(self.look_kv(norm(grid)))                             # [H, B, end + border, D]
        if keep is not None:
            past = torch.stack([F.pad(a, (0, 0, self.config.span, 0))[:, :, end:end + self.config.span] for a in (k, v)])
            keep.update(pending=grid[:, end:].float().clone(), past=past.float())
        if M == 0:
            return x, x.new_zeros(B, 0, self.config.slots, C)
        count = first + border * torch.arange(M, device=x.device)
        slots = self.think(*(spans(a[:, :, :end], border, back - 1) for a in (k, v)), count)
        bars = grid[:, border:].unflatten(1, (M, border))
        read = self.read(bars, self.keys_values(slots), self.offset).flatten(1, 2)
        read = F.pad(read, (0, 0, border, 0))                                   # nothing before the first border
        return x + read[:, left:left + T], slots


# --- The model -------------------------------------------------------------------------------------------------------

def gap_bucket(gaps):
    """floor(log2) of the (lower) median of the spacings [..., GAPS] that exist, from 1 to 31; 0 where none does."""
    gaps = gaps.sort(-1).values
    count = (gaps < NO_GAP).sum(-1, keepdim=True)
    median = gaps.gather(-1, (count - 1).clamp(min=0) // 2)
    bucket = median.clamp(min=1).double().log2().floor().long().clamp(max=30) + 1
    return torch.where(count > 0, bucket, 0)            # [..., 1]


@dataclass
class State:
    """What generation carries from bar to bar, of B rows; its size does not depend on how many bars there were.

    (data.State is another thing: what decodes the next bar.) The slots of a border are made right after the bar before
    it, so that paths which begin there share them.
    """
    pos: int                      # bars seen, the same of all rows
    phase: int                    # borders lie where (p + phase) % border == 0
    h: torch.Tensor               # [B, C]: hidden state of the last bar, from which the heads read the next one
    time: torch.Tensor            # int64 [B]: stamp of the last bar
    gaps: torch.Tensor            # int64 [B, GAPS]: the last spacings
    layers: list                  # per layer S [HL, B, D, D], and the ring of keys and values [2, HW, B, W, D]
    bias: torch.Tensor            # [HW, 2 W]: see Block.ring_bias
    weights: dict                 # see Model.step_weights
    pending: torch.Tensor | None  # [B, border, C]: what entered the reasoner since the last border; None without one
    past: torch.Tensor | None     # [2, H, B, span, D]: keys and values of the bars before that
    slots: torch.Tensor | None    # [2, H, B, 1, 16, D]: keys and values of the last border's slots; None before one

    def repeat(self, n):
        """Each row n times, as copies of its own: many paths go on from one prefill."""
        def rows(a, dim=0):
            return None if a is None else a.repeat_interleave(n, dim=dim)
        layers = [[rows(S, 1), rows(ring, 2)] for S, ring in self.layers]
        return replace(self, layers=layers, h=rows(self.h), time=rows(self.time), gaps=rows(self.gaps),
                       pending=rows(self.pending), past=rows(self.past, 2), slots=rows(self.slots, 2))


class Model(nn.Module):
    """Bars' tokens and stamps -> the next bar's tokens. `forward` for many bars at once, `prefill` and `step` one by one.

    config: a ModelConfig, or a dict of its fields; ValueError for sizes that do not fit.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = config if isinstance(config, ModelConfig) else ModelConfig(**config)
        C, V1, V2 = config.n_embd, 2**config.coarse_bits, 2**config.fine_bits
        sizes = (V1, V2) + CALENDAR
        offsets = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        self.embed = nn.Embedding(sum(sizes), C)        # a bar takes eight rows: coarse, fine, calendar, spacing
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.reasoner = Reasoner(config) if config.reasoner else None
        self.coarse_head = nn.Linear(C, V1, bias=False)
        self.fine_mix = nn.Linear(C, C, bias=False)     # fine logits = fine_head gelu(fine_mix h + fine_given[coarse])
        self.fine_given = nn.Embedding(V1, C)
        self.fine_head = nn.Linear(C, V2, bias=False)
        self.register_buffer("offsets", offsets, persistent=False)
        # coarse tokens that say "up"; without a direction bit pretrain.py asks the tokenizer
        self.register_buffer("up_mask", torch.arange(V1) >= V1 // 2)
        self.mid = config.n_layer // 2
        self.grad_ckpt = False                          # see run
        self.parts = {}
        # maps back into the residual stream start smaller, the more layers there are; latent and offset as they are
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2 and not name.endswith(("latent", "offset")):
                nn.init.normal_(p, std=0.02)

    def embedding(self, coarse, fine, time, gaps):
        """Normed sum of a bar's eight rows: tokens and stamps [...], gaps [..., GAPS] -> [..., C], in autocast's type."""
        rows = torch.cat((coarse[..., None], fine[..., None], data.calendar(time), gap_bucket(gaps)), dim=-1) + self.offsets
        x = norm(F.embedding_bag(rows.flatten(0, -2), self.embed.weight, mode="sum"))
        x = x.view(*coarse.shape, -1)                                           # [..., C]
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def trunk(self, coarse, fine, time, phase, keep=None, depth=None):
        """Hidden states [B, T, C] after `depth` layers (None: all), and the slots of the borders [B, M, 16, C].

        phase: borders lie where (p + phase) % border == 0. keep: a dict that collects what step needs. slots are None
        without reasoner, or above depth.
        """
        gaps = F.pad(time[:, 1:] - time[:, :-1], (GAPS, 0), value=NO_GAP)       # [B, T + GAPS - 1]
        x, slots = self.embedding(coarse, fine, time, gaps.unfold(1, GAPS, 1)), None
        rot = rotation(torch.arange(x.shape[1], device=x.device), self.config.n_embd // self.config.n_head)
        rot = [a.to(x.dtype) for a in rot]
        if keep is not None:
            keep.update(layers=[], gaps=gaps[:, -GAPS:].clone(), time=time[:, -1].clone())
        for n, block in enumerate(self.blocks[:depth]):
            if n == self.mid and self.reasoner:
                x, slots = self.run(self.reasoner, x, phase, keep)
            x = self.run(block, x, rot, keep and keep["layers"])
        return x, slots

    def run(self, part, x, given, keep):
        """part(x, given, keep); with grad_ckpt its activations are made again in the backward pass, not kept."""
        if self.grad_ckpt and torch.is_grad_enabled() and keep is None:
            return checkpoint(part, x, given, use_reentrant=False)
        return part(x, given, keep)

    def forward(self, coarse, fine, time, targets=None, phase=0):
        """coarse, fine, time int64 [B, T]; targets: (coarse, fine) of each next bar, -1 where it does not count; phase
        as in trunk.

        Returns coarse logits [B, T, 2^k1], fine logits [B, T, 2^k2] (given the target coarse token, else the likeliest),
        and the loss in nats per bar, None without targets. Its parts stay in self.parts: coarse, fine, aux.
        """
        x, slots = self.trunk(coarse, fine, time, phase)
        h = norm(x)
        coarse_logits = self.coarse_logits(h)
        given = coarse_logits.argmax(-1) if targets is None else targets[0].clamp(min=0)
        fine_logits = self.fine_logits(h, given)
        if targets is None:
            return coarse_logits, fine_logits, None
        parts = dict(coarse=mean_nats(coarse_logits, targets[0]), fine=mean_nats(fine_logits, targets[1]))
        loss = parts["coarse"] + parts["fine"]
        if slots is not None and self.config.aux_weight:
            parts["aux"] = self.slot_loss(slots, targets, phase)
            loss = loss + self.config.aux_weight * parts["aux"]
        self.parts = {name: part.detach() for name, part in parts.items()}
        return coarse_logits, fine_logits, loss

    def slot_loss(self, slots, targets, phase):
        """Slot m at border p predicts bar p + m, which is the target at p + m - 1."""
        border, (B, M, n, _) = self.config.border, slots.shape
        m, i = torch.arange(M, device=slots.device), torch.arange(n, device=slots.device)
        at = border * (m[:, None] + 1) - phase % border - 1 + i                 # [M, 16]
        coarse, fine = (F.pad(target, (0, n), value=-1)[:, at] for target in targets)  # [B, M, 16]
        h = norm(slots)
        return mean_nats(self.coarse_logits(h), coarse) + mean_nats(self.fine_logits(h, coarse.clamp(min=0)), fine)

    def prefill(self, coarse, fine, time, phase=0):
        """The State after coarse, fine, time int64 [B, T], from which step goes on."""
        keep = dict(slots=None, pending=None, past=None)
        x, slots = self.trunk(coarse, fine, time, phase, keep)
        if slots is not None and slots.shape[1]:
            keep["slots"] = torch.stack(self.reasoner.keys_values(slots[:, -1:])).float()
        state = State(pos=coarse.shape[1], phase=phase, h=norm(x[:, -1]).float(), bias=self.blocks[0].ring_bias(),
                      weights=self.step_weights(x.dtype), **keep)
        if self.reasoner:
            self.reason_border(state)
        return state

    def step_weights(self, dtype):
        """Copies of the linear maps' weights for a few rows at a time: in float32 by columns, 3 times as fast for one."""
        maps = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        if self.reasoner:
            maps += [self.reasoner.read_q, self.reasoner.read_out]
        by_columns = lambda w: w.T.contiguous().T
        return {m: by_columns(m.weight.detach()) if dtype == torch.float32 else m.weight.detach().to(dtype) for m in maps}

    def step(self, coarse, fine, time, state):
        """One bar more: coarse, fine, time int64 [B] -> h [B, C], state. Updates the state in place; no gradients.

        Its matmuls run in the type of the prefill, its states in float32; call step itself outside of autocast.
        """
        state.gaps = torch.cat((state.gaps[:, 1:], (time - state.time)[:, None]), dim=1)
        state.time = time
        x, pos, W = self.embedding(coarse, fine, time, state.gaps), state.pos, state.bias.shape[1] // 2
        rot = rotation(torch.tensor([pos], device=x.device), self.config.n_embd // self.config.n_head)
        place = W - 1 - pos % W
        bias = state.bias[:, None, None, place:place + min(pos + 1, W)]
        for n, block in enumerate(self.blocks):
            if n == self.mid and self.reasoner:
                x = self.reason_step(x, pos, state)
            x = block.step(x, rot, pos, state.layers[n], bias, state.weights)
        state.h, state.pos = norm(x), pos + 1
        if self.reasoner:
            self.reason_border(state)
        return state.h, state

    def reason_step(self, x, pos, state):
        """The reasoner for one bar x [B, C]."""
        r, offset = self.reasoner, (pos + state.phase) % self.config.border
        state.pending[:, offset] = x
        if state.slots is None:
            return x
        q = linear(state.weights, r.read_q, norm(x)) + r.offset[offset]
        q = q.view(len(x), r.H, 1, -1).transpose(0, 1)                          # [H, B, 1, D]
        o = F.scaled_dot_product_attention(q, *state.slots[:, :, :, 0])
        return torch.addcmul(x, r.gate, linear(state.weights, r.read_out, r.join(o[:, :, 0])))

    def reason_border(self, state):
        """Before a bar at a border: the bars since the last one become keys and values, and the slots are made anew."""
        r, border = self.reasoner, self.config.border
        if (state.pos + state.phase) % border:
            return
        dtype = state.weights[r.read_q].dtype
        with torch.autocast(state.h.device.type, dtype, enabled=dtype != torch.float32):
            block = torch.stack(r.heads(r.look_kv(norm(state.pending)))).float()  # [2, H, B, border, D]
            state.past = torch.cat((state.past[:, :, :, border:], block), dim=3)
            slots = r.think(*state.past[:, :, :, None], torch.tensor([state.pos], device=block.device))
            state.slots = torch.stack(r.keys_values(slots)).float()

    def parallel(self, coarse, fine, time):
        """The next 16 bars at once, from slots at the origin T: coarse logits [B, 16, 2^k1] and h [B, 16, C].

        fine_logits, p_up and sample take the rest from h. Raises UserError if the model has no reasoner.
        """
        if not self.reasoner:
            raise data.UserError("the model has no latent reasoner: parallel forecasts need one; "
                                 "train it with the reasoner, or forecast step by step")
        span, r = self.config.span, self.reasoner
        x, _ = self.trunk(coarse, fine, time, 0, depth=self.mid)
        x = F.pad(x[:, -span:], (0, 0, max(0, span - x.shape[1]), 0))           # [B, span, C]
        k, v = r.heads(r.look_kv(norm(x)))
        h = norm(r.think(k[:, :, None], v[:, :, None], torch.tensor([coarse.shape[1]], device=x.device))[:, 0])
        return self.coarse_logits(h), h

    def coarse_logits(self, h):
        """h [..., C] -> [..., 2^k1]."""
        return self.coarse_head(h)

    def fine_logits(self, h, coarse):
        """Given the coarse token: h [..., C], coarse int64 [...] -> [..., 2^k2]."""
        return self.fine_head(F.gelu(self.fine_mix(h) + self.fine_given(coarse)))

    def p_up(self, h):
        """P(close rises | it moves) for h [..., C]: the exact P(up token), over the share of training bars that moved."""
        p = self.coarse_logits(h).float().softmax(-1) @ self.up_mask.float()
        return (p / (1 - self.config.unmoved)).clamp(max=1)

    def sample(self, h, temperature=1.0, top_p=1.0, generator=None, u=None, order=None):
        """Draws the next bar's coarse and fine token, int64 [...], for h [..., C].

        u [..., 2]: uniform numbers to draw by, else from `generator`; temperature, top_p: see draw. order int64 [2^k1]:
        the coarse tokens in the order in which u runs through them (by rising close, say: then two models that hardly
        differ draw bars that hardly differ).
        """
        u = torch.rand(*h.shape[:-1], 2, device=h.device, generator=generator) if u is None else u
        logits = self.coarse_logits(h)
        coarse = draw(logits if order is None else logits[..., order], temperature, top_p, u[..., :1]).squeeze(-1)
        coarse = coarse if order is None else order[coarse]
        return coarse, draw(self.fine_logits(h, coarse), temperature, top_p, u[..., 1:]).squeeze(-1)


def mean_nats(logits, target):
    """Mean cross-entropy of logits [..., V] over the targets int64 [...] that count (>= 0); 0 if none does."""
    rows = zip(logits.flatten(0, -2).split(1024), target.flatten().split(1024))  # so many stay in the cache in float32
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


@torch.no_grad()
def next_bar(model, table, h, scale, quantiles=(0.05, 0.5, 0.95)):
    """The next bar in closed form, without sampling noise, from h [B, C] of `prefill` or `step`.

    scale [B]: the s_t that makes the close feature a log return, sinh(feature) * s_t (data.State.scales), at most log 10
    either way; table: from close_table. Returns P(up token) [B] (Model.p_up divides it by the share of bars that move),
    the expected return E[C'/C] - 1 [B], and quantiles of the log return [B, Q]. Row by row, since the 2^20 probabilities
    of a row are 4 MB.
    """
    value, order = table.flatten().double().sort()
    V1 = table.shape[0]
    every = torch.arange(V1, device=h.device)
    p_up, mean, quantile = [], [], []
    for row, s in zip(h, scale.double()):
        pc = model.coarse_logits(row).double().softmax(-1)                      # [2^k1]
        pf = model.fine_logits(row.expand(V1, -1), every).double().softmax(-1)  # [2^k1, 2^k2]
        p = (pc[:, None] * pf).flatten()[order]
        log_return = (torch.sinh(value) * s).clamp(-math.log(10), math.log(10))
        c, q = p.cumsum(0), torch.tensor(quantiles, dtype=p.dtype, device=p.device)
        at = torch.searchsorted(c, q * c[-1]).clamp(max=len(c) - 1)
        p_up.append(pc[model.up_mask].sum())
        mean.append((p * torch.expm1(log_return)).sum())
        quantile.append(log_return[at])
    return torch.stack(p_up), torch.stack(mean), torch.stack(quantile)


# --- The checkpoint --------------------------------------------------------------------------------------------------

FIELDS = ("stage", "best", "features", "optimizer", "scaler", "step", "bad_steps", "seed", "data", "splits", "metrics")


def save_checkpoint(path, model, tokenizer, **meta):
    """Writes one self-contained file. model may be None while the tokenizer is in training, and tokenizer a plain dict.

    meta: of FIELDS what there is, and what else a stage needs. Raises UserError when the disk refuses.
    """
    entry = dict.fromkeys(FIELDS) | dict(metrics=[]) | meta | dict(format_version=FORMAT_VERSION, config=None, model=None)
    if model is not None:
        entry |= dict(config=asdict(model.config), model=model.state_dict())
    entry["tokenizer"] = tokenizer.dump() if hasattr(tokenizer, "dump") else tokenizer
    data.save_atomic(entry, path)


def read_checkpoint(path):
    """The plain dict of a checkpoint of any stage. Raises UserError for a file that is none."""
    entry = data.load_safe(path)
    if not isinstance(entry, dict) or "format_version" not in entry:
        raise data.UserError(f"{path}: not a Kronos-R checkpoint; give a file that pretrain.py wrote")
    if entry["format_version"] != FORMAT_VERSION:
        raise data.UserError(f"{path}: checkpoint format {entry['format_version']!r}, this version reads {FORMAT_VERSION}; "
                             f"train it anew")
    for key in ("stage", "config", "model", "best", "tokenizer", "metrics", "data", "splits"):
        if key not in entry or (key == "metrics" and not isinstance(entry[key], list)):
            raise data.UserError(f"{path}: damaged checkpoint, {key!r} is missing; "
                                 f"restore it from a copy or train it anew")
    return entry


def load_checkpoint(path, device="cpu", weights="best"):
    """-> model (in eval mode), tokenizer, meta (all else in the file). Raises UserError for a file that is none.

    weights: "best", those with the best val score (the last if there is none), or "last".
    """
    entry = read_checkpoint(path)
    if entry["model"] is None:
        raise data.UserError(f"{path}: its training has not reached the model yet; go on with pretrain.py --resume")
    state = entry["best"] if weights == "best" and entry["best"] is not None else entry["model"]
    try:
        known = {f.name for f in fields(ModelConfig)}
        if set(entry["config"]) - known:
            raise ValueError(f"unknown setting {sorted(set(entry['config']) - known)[0]!r}")
        config = ModelConfig(**entry["config"])
        with torch.device("meta"):      # compare the shapes before any memory is taken
            shapes = {name: p.shape for name, p in Model(config).state_dict().items()}
        found = {name: p.shape for name, p in state.items()}
        for name in shapes.keys() | found.keys():
            if shapes.get(name) != found.get(name):
                raise ValueError(f"weights {name!r} do not fit the config")
        model = Model(config)
        model.load_state_dict(state)
        tokenizer = Tokenizer.load(entry["tokenizer"])
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path}: damaged checkpoint ({reason}); restore it from a copy or train it anew"
        raise data.UserError(message) from None
    meta = {key: value for key, value in entry.items() if key not in ("model", "best", "tokenizer")}
    return model.to(device).eval(), tokenizer, meta
