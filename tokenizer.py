"""The tokenizer: each bar becomes two tokens of 10 bits, and any two tokens become a bar.

Trained by `pretrain.py`, from which `--tokenizer out.pt` takes it again.

Binary Spherical Quantization (BSQ: Zhao, Xiong, Kraehenbuehl 2024, arXiv 2406.07548) has for codebook the 2^k corners of
the cube inscribed in the unit sphere, c in {-1, 1}^k / sqrt(k): implicit, nothing stored, every code reachable. A
decoder D makes a candle of a corner. BSQ's encoder projects a bar to u on the sphere and takes the corner nearest to
u, sign(u) / sqrt(k), or softly q(c|u) ~ exp(2 tau u . c). Here a bar takes the corner whose *candle* is nearest to it,
or softly q(c|x) ~ exp(-sharp |x - D(c)|^2).

For a linear D with orthonormal columns, D(c) = A c, the two are one: |x - A c|^2 = const - 2 u . c with u = A^T x. For a
curved D the signs of a learned u often miss the nearest corner, and with k <= 12 all corners can be looked at, in no
more time than an encoder takes. So there is no encoder, and no gradient has to go straight through sampled bits: the
error and the joint entropy are exact sums over the 2^k codes. Training sharpens q from a blur, in which every code
learns from every bar, to the nearest code alone (deterministic annealing: Rose 1998, Proc. IEEE 86). How close that
comes to k-means with as many stored centroids: `python tests/bench.py tokenizer`.

Two levels: `coarse` carries the bar's shape, `fine` the residual given coarse. The top bit of coarse is not searched:
it is set where close rose, and the decoder honours it, so a coarse token always says up or not up.
"""
import copy
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import CHANNELS, UserError

N_CHANNELS = len(CHANNELS)
PRICES = 4        # close, open, upper, lower: always there; volume and vwap are missing where they are exactly 0
MARGIN = 1e-4     # least |close| of a decode with a direction bit: its sign outlives float32, and S_FLOOR
BLOCK = 1024      # bars encoded at a time, always padded to it, so that a bar's tokens depend on no other bar
MAX_BITS = 12     # 2^bits distances are held for every bar of a batch
FAR = 1e9         # added to the distance of codes on the wrong side of the direction bit
WARMUP = 50       # steps in which the learning rate rises


@dataclass
class TokenizerConfig:
    """Sizes of a Tokenizer and settings of its training; UserError for what cannot be."""
    coarse_bits: int = 10       # bits of the coarse token, direction bit included
    fine_bits: int = 10         # bits of the fine token
    n_hidden: int = 128         # width of the decoder's networks
    direction_bit: bool = True  # the top coarse bit is set where close rose, and the decoder honours it
    entropy: float = 0.3        # weight of the entropy term; 0 switches it off
    gamma: float = 1.0          # within it, weight of using all codes evenly, against each bar being sure of its own
    sharp_start: float = 8.0    # q(c|x) at first: exp(-sharp x squared error / the level's variance)
    sharp_end: float = 60.0     # and when annealing ends
    annealed: float = 0.2       # share of the training that anneals; the rest takes the nearest code

    def __post_init__(self):
        limits = dict(coarse_bits=(2, MAX_BITS), fine_bits=(2, MAX_BITS), n_hidden=(1, 4096), entropy=(0, 100),
                      gamma=(0, 100), sharp_start=(1e-3, 1e6), sharp_end=(1e-3, 1e6), annealed=(0, 1))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)}: must lie in {least:g}..{most:g}")


# ----------------------------------------------------------------------------------------------------------------------
# Corners and their choice

def corners(k, device=None):
    """The codebook as +-1, float32 [2^k, k]; row i is token i, the first bit its highest. (The decoder scales it.)"""
    tokens = torch.arange(2 ** k, device=device)
    return 2.0 * (tokens[:, None] >> torch.arange(k - 1, -1, -1, device=device) & 1) - 1.0


def nearest(distance):
    """Index of the least along the last axis, the first of equals: [..., K] -> int64 [...]."""
    if distance.is_cuda:
        return distance.argmin(-1)
    return torch.from_numpy(distance.detach().numpy().argmin(-1))  # numpy's is several times as fast on a CPU


def entropy(p):
    """In nats, summed over all elements of p: of one distribution, or of several in all.

    The clamp keeps the gradient at p = 0 finite.
    """
    return -(p * p.clamp(min=1e-20).log()).sum()


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

def mlp(n_in, n, n_out):
    return nn.Sequential(nn.Linear(n_in, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n_out))


def exact(x):
    """No autocast, whatever the caller has: a bar's tokens are always the same."""
    return torch.autocast(x.device.type, enabled=False)


def has_data(x):
    """bool [..., 6] of features x [..., 6]: False where a channel is missing."""
    present = x != 0
    present[..., :PRICES] = True
    return present


class Tokenizer(nn.Module):
    """Bars' features <-> token pairs, a single bar at a time: a token pair is a candle.

    Decode: D(coarse, fine) = D1(coarse) + M(coarse) g(fine), networks of the bits. A fine code is a pattern g, [6], and the
    coarse one turns and scales it by M, [6, 6]. On first use all codes are evaluated, then looked up: 2^k rows a level.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = TokenizerConfig(**config) if isinstance(config, dict) else config
        k1, k2, n = config.coarse_bits, config.fine_bits, config.n_hidden
        self.coarse_decoder = mlp(k1, n, N_CHANNELS)
        self.fine_mix = mlp(k1, n, N_CHANNELS ** 2)
        self.fine_decoder = mlp(k2, n, N_CHANNELS)
        self.register_buffer("mean", torch.zeros(N_CHANNELS))
        self.register_buffer("std", torch.zeros(N_CHANNELS))  # 0: a channel that was never there; it decodes to exactly 0
        self.tables = None

    def decode_tables(self):
        """Of every code, in standardized channels: D1 [2^k1, 6], M [2^k1, 6, 6], g [2^k2, 6]."""
        c1, c2 = corners(self.config.coarse_bits, self.mean.device), corners(self.config.fine_bits, self.mean.device)
        mix = self.fine_mix(c1).unflatten(-1, (N_CHANNELS, N_CHANNELS))
        return self.coarse_decoder(c1), 0.3 * mix, self.fine_decoder(c2)  # 0.3: a residual's usual size

    def frozen_tables(self):
        """decode_tables, made once between two trainings."""
        if self.tables is None or self.tables[0].device != self.mean.device:
            with torch.no_grad(), exact(self.mean):
                self.tables = self.decode_tables()
        return self.tables

    def train(self, mode=True):
        self.tables = None  # the weights are about to change, or just did
        return super().train(mode)

    def standardize(self, x):
        """x [..., 6] -> z [..., 6] of mean 0 and variance 1 a channel, 0 where one is missing; present: 1.0 where not."""
        present = has_data(x) & (self.std > 0)
        z = (x - self.mean) / torch.where(self.std > 0, self.std, 1.0)
        return torch.where(present, z, 0.0), present.to(x.dtype)

    def coarse_distance(self, z, present, up, d1):
        """|z - D1(c)|^2 - |z|^2 over present channels, of all codes c: [B, 2^k1]; FAR where the direction bit is wrong."""
        bars, codes = [present, z], [d1 ** 2, -2 * d1]  # sum of present d^2 - 2 z d: one product of matrices
        if self.config.direction_bit:
            says_up = torch.arange(len(d1), device=d1.device) >= len(d1) // 2
            bars += [torch.stack([up, ~up], 1).to(z.dtype)]
            codes += [FAR * torch.stack([~says_up, says_up], 1).to(z.dtype)]
        return torch.cat(bars, 1) @ torch.cat(codes, 1).T                     # (B, 12 or 14) (12 or 14, 2^k1)

    def fine_distance(self, residual, present, mix, g):
        """|r - M g|^2 - |r|^2 = (M^T M) : (g g^T) - 2 (M^T r) . g over present channels; mix [B, 6, 6] -> [B, 2^k2]."""
        mix = mix * present[..., None]
        gram = (mix.mT @ mix).flatten(1)                                                     # (B, 36)
        aim = (mix.mT @ residual[..., None]).squeeze(-1)                                     # (B, 6)
        outer = (g[:, :, None] * g[:, None, :]).flatten(1)                                   # (2^k2, 36)
        return torch.cat([gram, aim], 1) @ torch.cat([outer, -2 * g], 1).T

    def search(self, z, present, up, tables):
        """The nearest codes of bars z [B, 6]: coarse first, then the fine code nearest to what it leaves; int64 [B] each."""
        d1, mix, g = tables
        coarse = nearest(self.coarse_distance(z, present, up, d1))
        return coarse, nearest(self.fine_distance((z - d1[coarse]) * present, present, mix[coarse], g))

    # ---- the interface

    @torch.no_grad()
    def encode(self, x):
        """Features x [..., 6] -> coarse, fine: int64 [...]; a bar's tokens do not depend on its batch.

        ValueError where a feature is not finite.
        """
        x = torch.as_tensor(x, dtype=torch.float32, device=self.mean.device)
        if not torch.isfinite(x).all():
            raise ValueError("a feature is not finite")
        tables, rows = self.frozen_tables(), x.reshape(-1, N_CHANNELS)
        tokens = torch.empty(2, len(rows), dtype=torch.int64, device=x.device)
        for i in range(0, len(rows), BLOCK):
            part = rows[i:i + BLOCK]
            padded = F.pad(part, (0, 0, 0, BLOCK - len(part)))                                # (BLOCK, 6)
            with exact(x):
                found = self.search(*self.standardize(padded), padded[:, 0] > 0, tables)
            tokens[:, i:i + BLOCK] = torch.stack(found)[:, :len(part)]
        return tokens[0].view(x.shape[:-1]), tokens[1].view(x.shape[:-1])

    @torch.no_grad()
    def decode(self, coarse, fine=None):
        """Tokens int64 [...] -> features float32 [..., 6]; without fine, what coarse alone says.

        With the direction bit, close is >= MARGIN in every up code and <= -MARGIN in every other. ValueError where there
        is no such token.
        """
        d1, mix, g = self.frozen_tables()
        coarse = torch.as_tensor(coarse, device=d1.device)
        fine = None if fine is None else torch.as_tensor(fine, device=d1.device)
        for tokens, table in ((coarse, d1), (fine, g)):
            if tokens is not None and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < len(table):
                raise ValueError(f"a token is not in 0..{len(table) - 1}")
        z = d1[coarse]                                                                        # (..., 6)
        if fine is not None:
            z = z + (mix[coarse] * g[fine].unsqueeze(-2)).sum(-1)                             # (..., 6, 6) -> (..., 6)
        x = self.mean + self.std * z
        if self.config.direction_bit:
            up = coarse >> (self.config.coarse_bits - 1) == 1
            x[..., 0] = torch.where(up, x[..., 0].clamp(min=MARGIN), x[..., 0].clamp(max=-MARGIN))
        return x

    def dump(self):
        """A plain dict, for a checkpoint."""
        return {"config": asdict(self.config), "state": {k: v.cpu() for k, v in self.state_dict().items()}}

    @classmethod
    def load(cls, entry):
        """The tokenizer of what `dump` made, in eval mode."""
        if "config" not in entry:
            raise UserError("the tokenizer of this checkpoint is still in training; go on with pretrain.py --resume")
        tokenizer = cls(entry["config"])
        tokenizer.load_state_dict(entry["state"])
        return tokenizer.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training

def look_up(table, tokens):
    """table[tokens], with a gradient that is summed in one order (that of indexing depends on the threads' turns)."""
    return F.embedding(tokens, table.flatten(1)).view(*tokens.shape, *table.shape[1:])


def train_tokenizer(x, config, seed=0, steps=3000, batch_size=1024, lr=4e-3, device="cpu", progress=None, resume=None):
    """Train on features x float32 [N, 6] (context bars left out) -> Tokenizer.

    steps: updates; batch_size: bars of one; lr: peak learning rate. progress(step, loss, snapshot) is called after each
    step; snapshot() is a plain dict from which `resume` goes on bit for bit. The randomness of a step comes from (seed,
    step) alone. Raises UserError for bars that cannot be learned from, and when training turns non-finite.
    """
    config = TokenizerConfig(**config) if isinstance(config, dict) else config
    x = torch.as_tensor(x, dtype=torch.float32)
    check_bars(x, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config)
    present = has_data(x)
    n = present.sum(0).clamp(min=1)
    tokenizer.mean.copy_((x.double() * present).sum(0) / n)
    tokenizer.std.copy_((((x.double() - tokenizer.mean) ** 2 * present).sum(0) / n).sqrt())
    tokenizer = tokenizer.to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    first = 0
    if resume is not None:
        tokenizer.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))
        first = resume["step"]

    for step in range(first, steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        draw = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        batch = x[torch.randint(len(x), (batch_size,), generator=draw)].to(device)               # (B, 6)
        if done < config.annealed:
            sharp = config.sharp_start * (config.sharp_end / config.sharp_start) ** (done / config.annealed)
            loss = annealed_loss(tokenizer, batch, sharp)
        else:
            loss = nearest_loss(tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        for what, value in (("loss", loss.item()), ("gradient", norm.item())):
            if not math.isfinite(value):
                raise UserError(f"tokenizer training stopped at step {step + 1}: its {what} is {value}; "
                                f"lower the learning rate ({lr:g}) or look for extreme values among the bars")
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item(), lambda: copy.deepcopy(
                dict(step=step + 1, model=dict(tokenizer.state_dict()), optimizer=optimizer.state_dict())))
    return tokenizer.eval()


def check_bars(x, config):
    """UserError for bars that no tokenizer can be trained on."""
    least = 2 ** max(config.coarse_bits, config.fine_bits)
    if len(x) < least:
        raise UserError(f"the tokenizer has {least} codes a level and only {len(x)} bars to train on; "
                        f"give more data, or fewer bits")
    bad = ~torch.isfinite(x)
    if bad.any():
        row, channel = bad.nonzero()[0].tolist()
        raise UserError(f"feature {CHANNELS[channel]!r} of bar {row} is {x[row, channel].item()}; "
                        f"the tokenizer needs finite bars: mend the data")
    for i, channel in enumerate(CHANNELS):
        if (x[:, i] == x[0, i]).all() and (i < PRICES or x[0, i] != 0):
            raise UserError(f"channel {channel!r} never changes in the training bars, there is nothing to learn from a "
                            f"constant series: give bars with a close, open, high and low of their own")


def annealed_loss(tokenizer, x, sharp):
    """The loss of both levels for bars x [B, 6], each spread over all codes by q; fine learns what coarse leaves."""
    z, present = tokenizer.standardize(x)
    d1, mix, g = tokenizer.decode_tables()
    distance = tokenizer.coarse_distance(z, present, x[:, 0] > 0, d1)                            # (B, 2^k1)
    coarse = nearest(distance)
    residual = (z - look_up(d1, coarse)).detach() * present                                      # (B, 6)
    fine_distance = tokenizer.fine_distance(residual, present, look_up(mix, coarse), g)          # (B, 2^k2)
    return sum(level_loss(d, source, present, sharp, tokenizer.config)
               for d, source in ((distance, z), (fine_distance, residual)))


def level_loss(distance, source, present, sharp, config):
    """Share of the source's variance that a code leaves, its mean over q(c|x), and the entropy term.

    distance [B, 2^k]: |source - D(c)|^2 - |source|^2 over the channels present; source, present [B, 6].
    """
    size = (source ** 2).sum()
    q = F.softmax(-sharp * present.sum() / size * distance, dim=-1)                              # (B, 2^k)
    loss = 1 + (q * distance).sum() / size
    if config.entropy:  # E[H(q(c|x))] - gamma H(E[q(c|x)]): each bar's code sure, the codes' use even
        loss = loss + config.entropy * (entropy(q) / len(q) - config.gamma * entropy(q.mean(0)))
    return loss


def nearest_loss(tokenizer, x):
    """annealed_loss at infinite sharpness: each bar moves its own codes alone, as in Lloyd's algorithm."""
    z, present = tokenizer.standardize(x)
    d1, mix, g = tokenizer.decode_tables()
    with torch.no_grad():
        coarse, fine = tokenizer.search(z, present, x[:, 0] > 0, (d1, mix, g))                   # (B,)
    left = (z - look_up(d1, coarse)) * present                                                   # (B, 6)
    residual = left.detach()
    fine_left = (residual - (look_up(mix, coarse) @ look_up(g, fine)[..., None]).squeeze(-1)) * present
    return (left ** 2).sum() / (z ** 2).sum() + (fine_left ** 2).sum() / (residual ** 2).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Report

def report(tokenizer, x):
    """Scores of features x [N, 6], a flat dict of floats. `coarse_` is the coarse token alone, `full_` both.

    {coarse,full}_{error,r2}[_channel]: R^2 = 1 - error, error = mean square / variance over the bars that have the
    channel, or the mean over channels. {coarse,full}_sign: share of decodes on close's side, where it moved.
    {coarse,fine}_{used,perplexity}: see code_use; _bit_entropy_I: in bits, I = 0 the top bit; _bit_entropy: the least
    of them. pairs: distinct ones.
    """
    x = torch.as_tensor(x, dtype=torch.float32)
    coarse, fine = (t.cpu() for t in tokenizer.encode(x))
    decoded = {"coarse": tokenizer.decode(coarse).cpu(), "full": tokenizer.decode(coarse, fine).cpu()}
    present, moved = has_data(x), x[:, 0] != 0
    out = {"bars": float(len(x))}
    for level, y in decoded.items():
        errors = {}
        for i, channel in enumerate(CHANNELS):
            true, got = x[present[:, i], i].double(), y[present[:, i], i].double()
            if len(true) > 1 and true.var() > 0:
                errors[channel] = ((true - got).square().mean() / true.var(correction=0)).item()
        errors = {f"_{c}": e for c, e in errors.items()} | {"": sum(errors.values()) / max(1, len(errors))}
        for channel, error in errors.items():
            out |= {f"{level}_error{channel}": error, f"{level}_r2{channel}": 1 - error}
        out[f"{level}_sign"] = ((y[:, 0] > 0) == (x[:, 0] > 0))[moved].double().mean().item() if moved.any() else 1.0
    use, shares = code_use(tokenizer, coarse, fine)
    for level, share in shares.items():
        ones = (corners(int(math.log2(len(share)))) > 0).double().T @ share                      # (k,)
        bits = [entropy(torch.stack([p, 1 - p])).item() / math.log(2) for p in ones]
        out |= {f"{level}_bit_entropy_{i}": b for i, b in enumerate(bits)} | {f"{level}_bit_entropy": min(bits)}
    return out | use


def code_use(tokenizer, coarse, fine):
    """How much of the codebooks tokens int64 [N] use: a flat dict of floats, and each code's share {level: [2^k]}.

    {coarse,fine}_used: share of codes met. {coarse,fine}_perplexity: exp of their entropy. pairs: distinct ones.
    """
    config, use, shares = tokenizer.config, {}, {}
    for level, tokens, k in (("coarse", coarse, config.coarse_bits), ("fine", fine, config.fine_bits)):
        shares[level] = share = torch.bincount(tokens, minlength=2 ** k).double() / max(1, len(tokens))
        use[f"{level}_used"] = (share > 0).double().mean().item()
        use[f"{level}_perplexity"] = entropy(share).exp().item()
    return use | dict(pairs=float(len(torch.unique(coarse << config.fine_bits | fine)))), shares


def print_report(scores):
    """The report as an aligned table for a person."""
    channels = [""] + [f"_{c}" for c in CHANNELS if f"full_r2_{c}" in scores]
    print(f"{'':13} " + " ".join(f"{c[1:] or 'mean':>8}" for c in channels))
    for row in ("coarse_error", "coarse_r2", "full_error", "full_r2"):
        print(f"{row.replace('_', ' '):13} " + " ".join(f"{scores[row + c]:8.4f}" for c in channels))
    print(f"\n{'':13} {'used':>8} {'perplexity':>10} {'least bit':>9} {'sign':>8}")
    for row, decode in (("coarse", "coarse"), ("fine", "full")):
        used, perplexity, bit = (scores[f"{row}_{what}"] for what in ("used", "perplexity", "bit_entropy"))
        print(f"{row:13} {used:8.1%} {perplexity:10.1f} {bit:9.3f} {scores[f'{decode}_sign']:8.2%}")
    print(f"\n{scores['pairs']:,.0f} distinct pairs in {scores['bars']:,.0f} bars")
