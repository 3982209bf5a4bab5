"""The tokenizer: each bar becomes a pair of tokens, and any pair becomes a bar's features.

Binary Spherical Quantization (BSQ: Zhao, Xiong, Kraehenbuehl 2024, arXiv 2406.07548):

    bar x --encoder--> v in R^k --> u = v / |v| --> c = sign(u) / sqrt(k) --decoder--> candle

u lies on the unit sphere and c is the corner nearest to it, of the 2^k corners of a cube inscribed
in the sphere. The codebook is implicit: no corner is stored, each can be reached, and a token is
the signs of c read as a binary number. Two levels: the `coarse` token carries the bar's shape, the
`fine` token what coarse leaves, 10 bits each. The top bit of coarse, the direction bit, is not
learned: it is set where close rose, and every candle decoded from it rises. So the sign of a move
is never lost.

Training has two phases. The first is the published one, above: it spreads the bars over the
corners. But the signs of u often miss the corner whose candle is nearest to the bar, and comparing
a bar with all 2^k candles takes no longer than running the encoder. So in the second phase a bar
takes the nearest candle's corner, and the decoder learns from that alone (the step of k-means):

    phase 1    error + 0.1 (E[H(q(c|u))] - gamma H(E[q(c|u)])) of both levels
    phase 2    error = |z - D1|^2 / |z|^2 + |r - M g|^2 / |r|^2,      r = z - D1

with z the standardized bar, D1 the coarse candle, and M g what the fine token adds.
`nearest=False` keeps phase 1 to the end; `python tests/bench.py tokenizer` shows both, beside
k-means and other quantizers.

`pretrain.py` trains it, and its `--tokenizer out.pt` takes it from a checkpoint.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from backstage.script import UserError
from data import CHANNELS

N_CHANNELS = len(CHANNELS)
PRICES = 4        # close, open, upper, lower are always there; volume and vwap may be missing, 0
MARGIN = 1e-4     # least |close| of a decode with a direction bit: enough to move any price
ROWS = 1024       # bars encoded at a time, padded to it: a bar's tokens hang on no other bar
MAX_BITS = 12     # 2^bits distances are held for every bar of a batch
FLOOR = 0.05      # least unit of a channel, in close's; else rare opening gaps use up the codes
WARMUP = 50       # steps in which the learning rate rises


@dataclass
class TokenizerConfig:
    """Sizes of a Tokenizer and settings of its training; UserError for what cannot be."""
    coarse_bits: int = 10       # bits of the coarse token, direction bit included
    fine_bits: int = 10         # bits of the fine token
    n_hidden: int = 128         # width of the networks
    direction_bit: bool = True  # the top coarse bit is set where close rose, and decoded so
    close: float = 2.5          # weight of the squared error of close
    nearest: bool = True        # end with the nearest candle's corner; False: the published signs
    spread: float = 0.1         # share of the updates in phase 1; not read if nearest is False
    entropy: float = 0.1        # weight of the entropy term; 0 switches it off
    gamma: float = 1.0          # within it, weight of an even use of all codes
    joint: bool = True          # the exact entropy of all 2^k codes; False: the sum over bits
    tau: float = 60.0           # sharpness of q(c|u) ~ exp(tau u . c)

    def __post_init__(self):
        limits = dict(coarse_bits=(2, MAX_BITS), fine_bits=(2, MAX_BITS), n_hidden=(1, 4096),
                      direction_bit=(0, 1), close=(0.01, 100), nearest=(0, 1), spread=(0, 1),
                      entropy=(0, 100), gamma=(0, 100), joint=(0, 1), tau=(0, 1e6))
        for name, (least, most) in limits.items():
            value, kinds = getattr(self, name), (type(getattr(TokenizerConfig, name)), int)
            if type(value) not in kinds or not least <= value <= most:
                kind = kinds[0].__name__
                raise UserError(f"--{name} {value!r}: must be a {kind} in {least:g}..{most:g}")


# --------------------------------------------------------------------------------------------------
# Binary Spherical Quantization

def signs(k, device=None):
    """The codebook, sqrt(k) c for all corners c: -1 or 1, float32 [2^k, k].

    Row i is token i, its top bit first.
    """
    tokens = torch.arange(2 ** k, device=device)
    place = torch.arange(k - 1, -1, -1, device=device)
    return 2.0 * (tokens[:, None] >> place & 1) - 1.0


def on_sphere(v):
    """v [..., k] -> u = v / |v|."""
    return F.normalize(v, dim=-1)


def quantize(u):
    """The corner nearest to u on the sphere, c = sign(u) / sqrt(k): [..., k] -> [..., k].

    The sign has no gradient. Straight-through: c passes its gradient on to u as if it were u.
    """
    c = torch.where(u > 0, 1.0, -1.0) / math.sqrt(u.shape[-1])
    return u + (c - u).detach()


def token_of(c):
    """Corners [..., k] -> int64 [...]: their signs as a binary number, the first bit on top."""
    place = 2 ** torch.arange(c.shape[-1] - 1, -1, -1, device=c.device)
    return ((c > 0) * place).sum(-1)


def entropy(p):
    """In nats, summed over all elements of p: of one distribution, or of several in all."""
    return -(p * p.clamp(min=1e-20).log()).sum()  # the clamp keeps the gradient at p = 0 finite


def joint_entropy_term(u, tau, gamma):
    """E[H(q(c|u))] - gamma H(E[q(c|u)]) of points u [N, k], exact.

    Least where each bar is sure of its code and all codes are used evenly. q(c|u) ~ exp(tau u . c)
    over all corners c. The exponent is a sum over bits, so q is a product: of A over the first a
    bits and B over the other b. So E[q] = A^T B / N covers all 2^k codes, and is cheap.
    """
    k = u.shape[1]
    scale = tau / math.sqrt(k)
    A = F.softmax(scale * u[:, :k // 2] @ signs(k // 2, u.device).T, dim=1)  # (N, 2^a)
    B = F.softmax(scale * u[:, k // 2:] @ signs(k - k // 2, u.device).T, dim=1)  # (N, 2^b)
    use = A.T @ B / len(u)                                                   # (2^a, 2^b), a + b = k
    return (entropy(A) + entropy(B)) / len(u) - gamma * entropy(use)


def bit_entropy_term(u, tau, gamma):
    """The paper's form: in place of H(E[q(c|u)]) its upper bound, the sum over bits.

    q(bit = 1 | u) = sigmoid(2 tau u / sqrt(k)).
    """
    one = torch.sigmoid(2 * tau * u / math.sqrt(u.shape[1]))                 # (N, k)
    p = torch.stack([one, 1 - one])                                          # (2, N, k)
    return entropy(p) / len(u) - gamma * entropy(p.mean(1))


def least_index(distance):
    """Index of the least along the last axis, the first of equals: [..., K] -> int64 [...]."""
    if distance.is_cuda:
        return distance.argmin(-1)
    # numpy's is several times as fast on a CPU
    return torch.from_numpy(distance.detach().numpy().argmin(-1))


# --------------------------------------------------------------------------------------------------
# The tokenizer

def mlp(n_in, n, n_out):
    return nn.Sequential(nn.Linear(n_in, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(),
                         nn.Linear(n, n_out))


def full_precision(x):
    """No autocast, whatever the caller has: a bar's tokens are always the same."""
    return torch.autocast(x.device.type, enabled=False)


def has_data(x):
    """bool [..., 6] of features x [..., 6]: False where a channel is missing."""
    present = x != 0
    present[..., :PRICES] = True
    return present


def rows_of(table, tokens):
    """Tokens as a tensor on the device of their table; ValueError for one that is no row of it."""
    tokens = torch.as_tensor(tokens, device=table.device)
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < len(table):
        raise ValueError(f"a token is not in 0..{len(table) - 1}")
    return tokens


class Tokenizer(nn.Module):
    """Bars' features <-> token pairs, a single bar at a time: a token pair is a candle.

    The candle is D1(coarse) + M(coarse) g(fine), networks of the signs: a fine code is a pattern g,
    [6], which the coarse one turns and scales by M, [6, 6]. All codes are decoded on first use, 2^k
    rows a level, then looked up.
    """

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, TokenizerConfig):
            config = TokenizerConfig(**config)
        self.config = config
        k1, k2, n = config.coarse_bits, config.fine_bits, config.n_hidden
        self.coarse_encoder = mlp(N_CHANNELS, n, k1 - config.direction_bit)  # that bit is given
        self.fine_encoder = mlp(N_CHANNELS + k1, n, k2)
        self.coarse_decoder = mlp(k1, n, N_CHANNELS)
        self.fine_mix = mlp(k1, n, N_CHANNELS ** 2)
        self.fine_decoder = mlp(k2, n, N_CHANNELS)
        self.register_buffer("mean", torch.zeros(N_CHANNELS))
        self.register_buffer("std", torch.zeros(N_CHANNELS))  # 0: a channel that was never there
        self.tables = None

    def decode_tables(self):
        """Of every code, in standardized channels: D1 [2^k1, 6], M [2^k1, 6, 6], g [2^k2, 6]."""
        c1 = signs(self.config.coarse_bits, self.mean.device)
        c2 = signs(self.config.fine_bits, self.mean.device)
        return self.coarse_decoder(c1), self.mix(c1), self.fine_decoder(c2)

    def mix(self, c1):
        """M of coarse signs [..., k1] -> [..., 6, 6]."""
        usual_size = 0.3    # of a residual
        return usual_size * self.fine_mix(c1).unflatten(-1, (N_CHANNELS, N_CHANNELS))

    def frozen_tables(self):
        """decode_tables, cached until the next call of train()."""
        if self.tables is None or self.tables[0].device != self.mean.device:
            with torch.no_grad(), full_precision(self.mean):
                self.tables = self.decode_tables()
        return self.tables

    def train(self, mode=True):
        self.tables = None  # the weights are about to change, or just did
        return super().train(mode)

    def standardize(self, x):
        """x [..., 6] -> z, in units of `std` from the mean, and present: 1.0, or 0.0 if missing."""
        present = has_data(x) & (self.std > 0)
        z = (x - self.mean) / torch.where(self.std > 0, self.std, 1.0)
        return torch.where(present, z, 0.0), present.to(x.dtype)

    def published(self, z, present, up):
        """First phase: encoder, sphere, sign. Bars z, present [B, 6]; up, bool [B]: close rose.

        Returns u1 [B, k1 less a direction bit], u2 [B, k2] on their spheres, and their signs
        c1 [B, k1], c2 [B, k2].
        """
        u1 = on_sphere(self.coarse_encoder(z))
        c1 = quantize(u1) * math.sqrt(u1.shape[-1])
        if self.config.direction_bit:
            top = torch.where(up, 1.0, -1.0)[:, None]
            c1 = torch.cat([top, c1], dim=1)
        residual = (z - self.coarse_decoder(c1)) * present
        u2 = on_sphere(self.fine_encoder(torch.cat([residual, c1], dim=1).detach()))
        c2 = quantize(u2) * math.sqrt(u2.shape[-1])
        return u1, u2, c1, c2

    def search(self, z, present, up, tables):
        """Second phase: the nearest candles' tokens, int64 [B]; fine from what coarse leaves.

        tables: see decode_tables.
        """
        d1, mix, g = tables
        # |z - d|^2 - |z|^2 over present channels (z is 0 in the others), as one product:
        # present . d^2 - 2 z . d
        distance = torch.cat([present, z], 1) @ torch.cat([d1 ** 2, -2 * d1], 1).T   # (B, 2^k1)
        if self.config.direction_bit:  # only the half of the codes whose top bit is the bar's
            half = len(d1) // 2
            rows = torch.arange(len(z), device=z.device)
            own = distance.view(-1, 2, half)[rows, up.long()]                # (B, 2^(k1 - 1))
            coarse = least_index(own) + half * up
        else:
            coarse = least_index(distance)
        # likewise of what coarse leaves, r: |r - M g|^2 - |r|^2 = g^T (M^T M) g - 2 (M^T r) . g,
        # where g^T A g is the dot product of A and g g^T, flattened
        residual = (z - d1[coarse]) * present                                # (B, 6)
        mix = mix[coarse] * present[..., None]                               # (B, 6, 6)
        gram = (mix.mT @ mix).flatten(1)                                     # (B, 36)
        aim = (mix.mT @ residual[..., None]).squeeze(-1)                     # (B, 6)
        outer = (g[:, :, None] * g[:, None, :]).flatten(1)                   # (2^k2, 36)
        return coarse, least_index(torch.cat([gram, aim], 1) @ torch.cat([outer, -2 * g], 1).T)

    # ---- the interface

    @torch.no_grad()
    def encode(self, x):
        """Features x [..., 6] -> coarse, fine: int64 [...].

        A bar's tokens do not depend on its batch. ValueError where a feature is not finite.
        """
        x = torch.as_tensor(x, dtype=torch.float32, device=self.mean.device)
        if not torch.isfinite(x).all():
            raise ValueError("a feature is not finite")
        tables, tokens = self.frozen_tables(), []
        with full_precision(x):
            for part in x.reshape(-1, N_CHANNELS).split(ROWS):
                padded = F.pad(part, (0, 0, 0, ROWS - len(part)))        # (ROWS, 6)
                (z, present), up = self.standardize(padded), padded[:, 0] > 0
                if self.config.nearest:
                    coarse, fine = self.search(z, present, up, tables)
                else:
                    _, _, c1, c2 = self.published(z, present, up)
                    coarse, fine = token_of(c1), token_of(c2)
                tokens.append(torch.stack([coarse, fine])[:, :len(part)])
        return torch.cat(tokens, 1).view(2, *x.shape[:-1]).unbind()

    @torch.no_grad()
    def decode(self, coarse, fine=None):
        """Tokens int64 [...] -> features float32 [..., 6]; without fine, what coarse alone says.

        With the direction bit, close is >= MARGIN in every up code and <= -MARGIN in every other.
        ValueError for a token that is none.
        """
        d1, mix, g = self.frozen_tables()
        coarse = rows_of(d1, coarse)
        z = d1[coarse]                                                       # (..., 6)
        if fine is not None:
            z = z + (mix[coarse] * g[rows_of(g, fine)].unsqueeze(-2)).sum(-1)
        x = self.mean + self.std * z
        x[..., 0] = self.directed(x[..., 0], coarse)
        return x

    @torch.no_grad()
    def decode_pairs(self, n_channels=N_CHANNELS):
        """The first channels of all pairs of tokens, float32 [n_channels, 2^k1, 2^k2]."""
        d1, mix, g = self.frozen_tables()
        with full_precision(g):
            z = d1.T[:n_channels, :, None] + mix.transpose(0, 1)[:n_channels] @ g.T
        x = self.mean[:n_channels, None, None] + self.std[:n_channels, None, None] * z
        x[0] = self.directed(x[0], torch.arange(len(d1), device=x.device)[:, None])
        return x

    def directed(self, close, coarse):
        """close, with the direction bit at least MARGIN from 0, on the side of its coarse token."""
        if not self.config.direction_bit:
            return close
        up = coarse >> (self.config.coarse_bits - 1) == 1
        return torch.where(up, close.clamp(min=MARGIN), close.clamp(max=-MARGIN))

    def dump(self):
        """A plain dict, for a checkpoint."""
        state = {name: weights.cpu() for name, weights in self.state_dict().items()}
        return {"config": asdict(self.config), "state": state}

    @classmethod
    def load(cls, entry):
        """The tokenizer of what `dump` made, in eval mode; ValueError for a damaged entry."""
        try:
            tokenizer = cls(entry["config"])
            tokenizer.load_state_dict(entry["state"])
            for name, weights in tokenizer.state_dict().items():
                if not torch.isfinite(weights).all() or (name == "std" and weights.min() < 0):
                    raise TypeError(f"{name} holds numbers from {weights.min():g} "
                                    f"to {weights.max():g}")
        except (AttributeError, KeyError, RuntimeError, TypeError, UserError) as e:
            reason = " ".join(str(e).split())
            raise ValueError(f"its tokenizer is damaged or of another version: {reason}") from None
        return tokenizer.eval()


# --------------------------------------------------------------------------------------------------
# Training

def look_up(table, tokens):
    """table [V, ...] at tokens int64 [N]: [N, ...], with a gradient that is summed in one order,
    whatever the threads do."""
    return F.embedding(tokens, table.flatten(1)).view(*tokens.shape, *table.shape[1:])


def train_tokenizer(x, config, seed=0, steps=1200, batch_size=2048, lr=7e-3, device="cpu",
                    progress=None):
    """Train on features x float32 [N, 6] (context bars left out) -> Tokenizer.

    steps: updates; batch_size: bars of one; lr: peak learning rate. progress(step, loss) is called
    after each update. All randomness comes from the seed. UserError for bars that cannot be learned
    from, or a loss that is not finite.
    """
    x = torch.as_tensor(x, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config)
    config = tokenizer.config
    check_bars(x, config)
    set_scale(tokenizer, x)
    tokenizer = tokenizer.to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(seed)
    first_phase = round(config.spread * steps) if config.nearest else steps

    for step in range(steps):
        warm = min(1.0, (step + 1) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = x[torch.randint(len(x), (batch_size,), generator=draw)].to(device)  # (B, 6)
        loss_of = published_loss if step < first_phase else nearest_loss
        loss = loss_of(tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        for what, value in (("loss", loss.item()), ("gradient", norm.item())):
            if not math.isfinite(value):
                raise UserError(f"tokenizer training stopped at step {step + 1}: its {what} is "
                                f"{value}; lower the learning rate ({lr:g}) or look for extreme "
                                f"values among the bars")
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    return tokenizer.eval()


def set_scale(tokenizer, x):
    """Mean and unit (standard deviation) of each channel, over the bars x [N, 6] that have it."""
    present = has_data(x)
    n = present.sum(0).clamp(min=1)
    mean = (x.double() * present).sum(0) / n
    std = ((x.double() - mean).square() * present).sum(0).div(n).sqrt()
    tokenizer.mean.copy_(mean)
    std = torch.where(std > 0, std.clamp(min=FLOOR * std[0]), 0.0)
    # a smaller unit of close, so that its squared error weighs config.close times as much
    std[0] /= math.sqrt(tokenizer.config.close)
    tokenizer.std.copy_(std)


def published_loss(tokenizer, x):
    """First phase, bars x [B, 6]: what the decoded corners leave, and both entropy terms."""
    config = tokenizer.config
    z, present = tokenizer.standardize(x)
    u1, u2, c1, c2 = tokenizer.published(z, present, x[:, 0] > 0)
    mix = tokenizer.mix(c1.detach())                                         # (B, 6, 6)
    error = level_errors(z, present, tokenizer.coarse_decoder(c1), mix, tokenizer.fine_decoder(c2))
    term = joint_entropy_term if config.joint else bit_entropy_term
    spread = term(u1, config.tau, config.gamma) + term(u2, config.tau, config.gamma)
    return error + config.entropy * spread


def nearest_loss(tokenizer, x):
    """Second phase, bars x [B, 6]: what the nearest candles leave."""
    z, present = tokenizer.standardize(x)
    d1, mix, g = tokenizer.decode_tables()
    with torch.no_grad():
        coarse, fine = tokenizer.search(z, present, x[:, 0] > 0, (d1, mix, g))  # (B,)
    return level_errors(z, present, look_up(d1, coarse), look_up(mix, coarse), look_up(g, fine))


def level_errors(z, present, coarse, mix, pattern):
    """The share that coarse leaves of z, and the share that the fine pattern leaves of that.

    z, present, coarse, pattern: [B, 6]; mix: [B, 6, 6].
    """
    # |z - D1|^2 / |z|^2 + |r - M g|^2 / |r|^2
    left = (z - coarse) * present
    r = left.detach()   # the fine level has no say in the coarse one
    fine_left = (r - (mix @ pattern[..., None]).squeeze(-1)) * present
    return (left ** 2).sum() / (z ** 2).sum() + (fine_left ** 2).sum() / (r ** 2).sum()


def check_bars(x, config):
    """UserError for bars that no tokenizer can be trained on."""
    least = 2 ** max(config.coarse_bits, config.fine_bits)
    if len(x) < least:
        raise UserError(f"the tokenizer has {least} codes a level and only {len(x)} bars to train "
                        f"on; give more data, or fewer bits")
    bad = ~torch.isfinite(x)
    if bad.any():
        row, channel = bad.nonzero()[0].tolist()
        raise UserError(f"feature {CHANNELS[channel]!r} of bar {row} is {x[row, channel].item()}; "
                        f"the tokenizer needs finite bars: mend the data")
    if (x[:, 0] == x[0, 0]).all():  # an open that never gaps, or no wick, is no fault
        raise UserError("the close never changes in the training bars, so there is nothing to "
                        "learn: give bars of a market that moves")


# --------------------------------------------------------------------------------------------------
# Report: how good it is, and how much of its codebooks is in use

def report(tokenizer, x):
    """Scores of features x [N, 6], a flat dict: `coarse_` of the coarse token, `full_` of both.

    {coarse,full}_{error,r2}[_channel]: R^2 = 1 - error, error = mean square / variance over the
    bars that have the channel, or the mean over channels. {coarse,full}_sign: share of decodes on
    close's side, where it moved. {coarse,fine}_bit_entropy_I: in bits, I = 0 the top bit;
    _bit_entropy: the least of them. And what code_use says.
    """
    x = torch.as_tensor(x, dtype=torch.float32)
    coarse, fine = (tokens.cpu() for tokens in tokenizer.encode(x))
    present, moved = has_data(x), x[:, 0] != 0
    use, shares = code_use(tokenizer, coarse, fine)
    out = use | {"bars": float(len(x))}
    decoded = {"coarse": tokenizer.decode(coarse), "full": tokenizer.decode(coarse, fine)}
    for level, y in decoded.items():
        y, errors = y.cpu(), {}
        for i, channel in enumerate(CHANNELS):
            true, got = x[present[:, i], i].double(), y[present[:, i], i].double()
            if len(true) > 1 and true.var() > 0:
                error = (true - got).square().mean() / true.var(correction=0)
                errors[f"_{channel}"] = error.item()
        errors[""] = sum(errors.values()) / max(1, len(errors))
        for channel, error in errors.items():
            out[f"{level}_error{channel}"], out[f"{level}_r2{channel}"] = error, 1 - error
        right = ((y[:, 0] > 0) == (x[:, 0] > 0))[moved]
        out[f"{level}_sign"] = right.double().mean().item() if len(right) else 1.0
    for level, share in shares.items():
        k = int(math.log2(len(share)))
        ones = (signs(k) > 0).double().T @ share                             # (k,)
        bits = [entropy(torch.stack([p, 1 - p])).item() / math.log(2) for p in ones]
        out[f"{level}_bit_entropy"] = min(bits)
        out |= {f"{level}_bit_entropy_{i}": bit for i, bit in enumerate(bits)}
    return out


def code_use(tokenizer, coarse, fine):
    """How much of the codebooks tokens int64 [N] use, and each code's share {level: [2^k]}.

    The first is a flat dict of floats: {coarse,fine}_used, the share of codes met;
    {coarse,fine}_perplexity, exp of their entropy; pairs, the distinct ones.
    """
    config, shares = tokenizer.config, {}
    use = {"pairs": float(len(torch.unique(coarse << config.fine_bits | fine)))}
    levels = ("coarse", coarse, config.coarse_bits), ("fine", fine, config.fine_bits)
    for level, tokens, k in levels:
        share = torch.bincount(tokens, minlength=2 ** k).double() / max(1, len(tokens))
        use[f"{level}_used"] = (share > 0).double().mean().item()
        use[f"{level}_perplexity"] = entropy(share).exp().item()
        shares[level] = share
    return use, shares
