"""The tokenizer: each bar becomes two tokens of 10 bits, and any two tokens become a bar.

    python tokenizer.py --data bars.csv --out tok.pt     # trains, prints a report on the test bars, writes tok.pt
    python pretrain.py --data bars.csv --tokenizer tok.pt

Binary Spherical Quantization (Zhao, Xiong, Krahenbuehl 2024, arXiv 2406.07548). An encoder projects a bar to k numbers,
normalized to the unit sphere, u; its code is the nearest corner of the cube inscribed in it, c = sign(u) / sqrt(k). The
codebook is the 2^k corners: implicit, nothing stored, every code reachable. Two levels: `coarse` carries the bar's
shape, `fine` the residual given coarse. The top bit of coarse is not learned: it is set where close rose, and the
decoder honours it, so a coarse token always says up or not up.

Training draws bits at random, each from its own coordinate, sharper as it goes on: with q(c|u) = prod_b sigmoid(+-a_b),
which is the paper's softmax over all corners, q(c|u) ~ exp(2 tau u . c) (its eq. 8-10), since a dot product is a sum.
For a coarse code the mean over all draws is computed exactly, as is the joint entropy; a fine code is drawn, and its
gradient goes straight through.
"""
import copy
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import CHANNELS, UserError

N_CHANNELS = len(CHANNELS)
PRICES = 4        # close, open, upper, lower: always there; volume and vwap are missing where they are exactly 0
MARGIN = 1e-4     # least |close| that a decode with a direction bit gives: survives float32, and `inverse` at its least scale
BLOCK = 4096      # bars encoded at a time, always padded to it, so that a bar's token depends on no other bar
MAX_BITS = 12     # the exact joint entropy holds 2^bits numbers for every bar of a batch


@dataclass
class TokenizerConfig:
    coarse_bits: int = 10       # bits of the coarse token, direction bit included
    fine_bits: int = 10         # bits of the fine token
    n_hidden: int = 256         # width of each network
    n_basis: int = 8            # fine decode: so many patterns of the fine code, mixed by the coarse one
    direction_bit: bool = True  # the top coarse bit is set where close rose, and the decoder honours it
    entropy: float = 0.05       # weight of the entropy term; 0 switches it off
    gamma: float = 1.0          # within it, weight of the codes' even use against each bar's sureness
    sharp_start: float = 2.0    # how sure a bit of average size is at first: p = sigmoid(sharp)
    sharp_end: float = 10.0     # and at the end

    def __post_init__(self):
        for name in ("coarse_bits", "fine_bits"):
            if not 2 <= getattr(self, name) <= MAX_BITS:
                raise UserError(f"--{name} {getattr(self, name)}: must lie in 2..{MAX_BITS}")
        for name in ("n_hidden", "n_basis", "sharp_start", "sharp_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        if not (0 <= self.entropy < math.inf and 0 <= self.gamma < math.inf):
            raise UserError(f"--entropy {self.entropy}, --gamma {self.gamma}: must be 0 or more")


# ----------------------------------------------------------------------------------------------------------------------
# Binary spherical quantization

def sphere(u):
    """u / |u|, times sqrt(k): the code sign(u) / sqrt(k) is then +-1, and a coordinate's average size is 1."""
    return F.normalize(u, dim=-1) * math.sqrt(u.shape[-1])


def pack(bits):
    """Tokens from bits: bool [..., k] -> int64 [...], first bit highest."""
    return (bits.long() << torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)).sum(-1)


def corners(k, device=None):
    """The codebook: +-1 float32 [2^k, k], row i is token i."""
    tokens = torch.arange(2 ** k, device=device)
    bits = tokens[:, None] >> torch.arange(k - 1, -1, -1, device=device) & 1
    return 2.0 * bits - 1.0


def code_probs(a):
    """q(c|u) of all codes from the bits' logits a [..., k] -> [..., 2^k]: prod_b sigmoid(c_b a_b) = softmax_c(c . a / 2)."""
    return F.softmax(a @ corners(a.shape[-1], a.device).T / 2, dim=-1)


def bits_entropy(a):
    """H(q(c|u)) in nats [...]: the bits are independent given u, so theirs add up; a [..., k] are their logits."""
    return (F.softplus(a) - a * torch.sigmoid(a)).sum(-1)


def entropy(p):
    """In nats, of a distribution over all elements of p."""
    return -torch.special.xlogy(p, p).sum()


def straight_through(a, generator):
    """Bits +-1 drawn with p = sigmoid(a); the gradient is that of their mean, 2 p - 1 (a [..., k] -> [..., k])."""
    p = torch.sigmoid(a)
    drawn = (torch.rand(p.shape, generator=generator).to(p.device) < p).to(p.dtype)
    return 2 * (p + (drawn - p).detach()) - 1


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

def mlp(n_in, n_hidden, n_out):
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_out))


class Tokenizer(nn.Module):
    """Bars' features <-> token pairs. Encoder and decoder see a single bar: a token pair is a candle.

    The decode is D(coarse, fine) = D1(coarse) + sum_r M_r(coarse) g_r(fine): networks of the bits, evaluated once for
    all codes on first use and then looked up (2^k rows a level, not 2^20).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = TokenizerConfig(**config) if isinstance(config, dict) else config
        k1, k2, n = config.coarse_bits, config.fine_bits, config.n_hidden
        self.coarse_encoder = mlp(N_CHANNELS + config.direction_bit, n, k1 - config.direction_bit)
        self.coarse_decoder = mlp(k1, n, N_CHANNELS)
        self.fine_encoder = mlp(2 * N_CHANNELS + k1, n, k2)
        self.fine_mix = mlp(k1, n, N_CHANNELS * config.n_basis)
        self.fine_basis = mlp(k2, n, config.n_basis)
        self.register_buffer("mean", torch.zeros(N_CHANNELS))
        self.register_buffer("std", torch.zeros(N_CHANNELS))  # 0: a channel that was never there; it decodes to exactly 0
        self.tables = None

    # ---- features <-> standardized ones

    def standardize(self, x):
        """x [..., 6] -> z, mask: channels of unit variance; 0, and masked, where one is missing."""
        mask = x != 0
        mask[..., :PRICES] = True
        mask &= self.std > 0
        return torch.where(mask, (x - self.mean) / torch.where(self.std > 0, self.std, 1.0), 0.0), mask

    def direction(self, up):
        """The direction bit as +-1, a column [..., 1]; none without the bit."""
        return 2.0 * up[..., None] - 1.0 if self.config.direction_bit else torch.zeros(*up.shape, 0, device=up.device)

    # ---- coordinates on the two spheres

    def coarse_sphere(self, z, up):
        """z [..., 6], up bool [...] -> [..., k1 - 1], or k1 without the direction bit."""
        return sphere(self.coarse_encoder(torch.cat([z, self.direction(up)], -1)))

    def coarse_token(self, u, up):
        bits = u > 0
        return pack(torch.cat([up[..., None], bits], -1) if self.config.direction_bit else bits)

    def fine_sphere(self, z, mask, coarse, coarse_z):
        """Of the bar, what coarse left of it, and the coarse code: [..., k2]."""
        bits = corners(self.config.coarse_bits, z.device)[coarse]                                # (..., k1)
        return sphere(self.fine_encoder(torch.cat([z, 2 * (z - coarse_z) * mask, bits], -1)))    # 2: nearer to unit size

    def decode_tables(self):
        """D1 [2^k1, 6], M [2^k1, 6, r], g [2^k2, r] of every code."""
        c1, c2 = corners(self.config.coarse_bits, self.mean.device), corners(self.config.fine_bits, self.mean.device)
        mix = self.fine_mix(c1).unflatten(-1, (N_CHANNELS, -1))
        return self.coarse_decoder(c1), mix * 0.3, self.fine_basis(c2)  # 0.3: a residual's usual size

    def frozen_tables(self):
        if self.tables is None or self.tables[0].device != self.mean.device:
            with torch.no_grad():
                self.tables = self.decode_tables()
        return self.tables

    def train(self, mode=True):
        self.tables = None  # the weights are about to change, or just did
        return super().train(mode)

    # ---- the interface

    @torch.no_grad()
    def encode(self, x):
        """Features x [..., 6] -> coarse, fine: int64 [...]. Deterministic; a bar's tokens do not depend on its batch.

        Raises ValueError where x is not finite.
        """
        x = torch.as_tensor(x, dtype=torch.float32, device=self.mean.device)
        if not torch.isfinite(x).all():
            raise ValueError("a feature is not finite")
        d1 = self.frozen_tables()[0]
        rows = x.reshape(-1, N_CHANNELS)
        tokens = torch.empty(2, len(rows), dtype=torch.int64, device=x.device)
        for i in range(0, len(rows), BLOCK):
            part = rows[i:i + BLOCK]
            z, mask = self.standardize(F.pad(part, (0, 0, 0, BLOCK - len(part))))  # (BLOCK, 6)
            up = F.pad(part[:, 0], (0, BLOCK - len(part))) > 0
            coarse = self.coarse_token(self.coarse_sphere(z, up), up)
            fine = pack(self.fine_sphere(z, mask, coarse, d1[coarse]) > 0)
            tokens[:, i:i + BLOCK] = torch.stack([coarse, fine])[:, :len(part)]
        return tokens[0].view(x.shape[:-1]), tokens[1].view(x.shape[:-1])

    @torch.no_grad()
    def decode(self, coarse, fine=None):
        """Tokens int64 [...] -> features float32 [..., 6]; without fine, what the coarse token alone says.

        With the direction bit, close is >= MARGIN in every up code and <= -MARGIN in every other.
        """
        d1, mix, basis = self.frozen_tables()
        coarse = torch.as_tensor(coarse, device=d1.device)
        z = d1[coarse]                                                                        # (..., 6)
        if fine is not None:
            fine = torch.as_tensor(fine, device=d1.device)
            z = z + (mix[coarse] * basis[fine].unsqueeze(-2)).sum(-1)                         # (..., 6, r) -> (..., 6)
        x = self.mean + self.std * z
        if self.config.direction_bit:
            up = coarse >> (self.config.coarse_bits - 1) == 1
            x[..., 0] = torch.where(up, x[..., 0].clamp(min=MARGIN), x[..., 0].clamp(max=-MARGIN))
        return x

    def dump(self):
        """A plain dict for a checkpoint."""
        return {"config": asdict(self.config), "state": {k: v.cpu() for k, v in self.state_dict().items()}}

    @classmethod
    def load(cls, entry):
        """Restores what `dump` made."""
        tokenizer = cls(entry["config"])
        tokenizer.load_state_dict(entry["state"])
        return tokenizer.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Training

def train_tokenizer(x, config, seed=0, steps=3000, batch_size=1024, lr=2e-3, device="cpu", progress=None, resume=None):
    """Train on features x float32 [N, 6] (context bars left out) -> Tokenizer.

    progress(step, loss, snapshot) is called after each step; snapshot() is a plain dict from which `resume` goes on bit
    for bit. The randomness of a step comes from (seed, step) alone. Raises UserError for bars that cannot be learned
    from, and when training turns non-finite.
    """
    config = TokenizerConfig(**config) if isinstance(config, dict) else config
    x = torch.as_tensor(x, dtype=torch.float32)
    check_bars(x, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config)
    present = x != 0
    present[:, :PRICES] = True
    n = present.sum(0).clamp(min=1)
    tokenizer.mean.copy_((x.double() * present).sum(0) / n)
    tokenizer.std.copy_((((x.double() - tokenizer.mean) ** 2 * present).sum(0) / n).sqrt())
    tokenizer = tokenizer.to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    done = 0
    if resume is not None:
        tokenizer.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))
        done = resume["step"]

    for step in range(done, steps):
        progress_made = step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress_made)))
        draw = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        batch = x[torch.randint(len(x), (batch_size,), generator=draw)].to(device)               # (B, 6)
        sharp = config.sharp_start * (config.sharp_end / config.sharp_start) ** progress_made
        loss = batch_loss(tokenizer, batch, sharp, draw)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            what = "loss" if not math.isfinite(loss.item()) else "gradient"
            raise UserError(f"tokenizer training stopped at step {step + 1}: its {what} is {loss.item() if what == 'loss' else norm.item()}; "
                            f"lower the learning rate ({lr:g}) or look for extreme values among the bars")
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item(), lambda: copy.deepcopy({"step": step + 1, "model": dict(tokenizer.state_dict()),
                                                                   "optimizer": optimizer.state_dict()}))
    return tokenizer.eval()


def check_bars(x, config):
    """UserError for bars that no tokenizer can be trained on."""
    least = 2 ** max(config.coarse_bits, config.fine_bits)
    if len(x) < least:
        raise UserError(f"the tokenizer has {least} codes a level and only {len(x)} bars to train on; give more data, or fewer bits "
                        f"(--coarse_bits, --fine_bits)")
    bad = ~torch.isfinite(x)
    if bad.any():
        row, channel = bad.nonzero()[0].tolist()
        raise UserError(f"feature {CHANNELS[channel]!r} of bar {row} is {x[row, channel].item()}; the tokenizer needs finite bars: mend the data")
    flat = [c for i, c in enumerate(CHANNELS) if (x[:, i] == x[0, i]).all() and (i < PRICES or x[0, i] != 0)]
    if "close" in flat:
        raise UserError("close never moves in the training bars: there is nothing to learn from a constant series; give other data")
    if flat:
        raise UserError(f"channel {flat[0]!r} never changes in the training bars; the tokenizer needs bars with an open, high and low "
                        f"of their own: give other data")


def batch_loss(tokenizer, x, sharp, draw):
    """Reconstruction errors of both levels (shares of variance) and their entropy terms, for bars x [B, 6]."""
    config, B = tokenizer.config, len(x)
    z, mask = tokenizer.standardize(x)
    up = x[:, 0] > 0
    weight = mask / mask.sum(-1, keepdim=True)                                                   # (B, 6)
    d1, mix, basis = tokenizer.decode_tables()

    # coarse: the expected error sum_c q(c|u) |z - D1(c)|^2 over all codes of the bar's direction
    u = tokenizer.coarse_sphere(z, up)
    q = code_probs(sharp * u)                                                                    # (B, 2^(k1-1))
    half = up.long() if config.direction_bit else torch.zeros_like(up, dtype=torch.long)
    codes = d1.view(1 + config.direction_bit, -1, N_CHANNELS)                                    # (2, 2^(k1-1), 6)
    cross = torch.stack([(weight * z) @ c.T for c in codes], 1)[torch.arange(B), half]           # (B, 2^(k1-1))
    square = torch.stack([weight @ (c ** 2).T for c in codes], 1)[torch.arange(B), half]
    coarse_error = (q * (square - 2 * cross)).sum(-1).mean() + (weight * z ** 2).sum(-1).mean()
    use = F.one_hot(half, len(codes)).to(q.dtype).T @ q / B                                      # (2, 2^(k1-1)), sums to 1
    coarse_entropy = bits_entropy(sharp * u).mean() - config.gamma * entropy(use)

    # fine: one draw of bits, given the sure coarse code
    coarse = tokenizer.coarse_token(u, up)
    residual = (z - d1[coarse]).detach() * mask
    v = sharp * tokenizer.fine_sphere(z, mask, coarse, d1[coarse].detach())                      # (B, k2)
    patterns = tokenizer.fine_basis(straight_through(v, draw))                                   # (B, r)
    fine_error = (weight * (residual - (mix[coarse] @ patterns[..., None]).squeeze(-1)) ** 2).sum(-1).mean()
    fine_entropy = bits_entropy(v).mean() - config.gamma * entropy(code_probs(v).mean(0))
    return coarse_error + fine_error + config.entropy * (coarse_entropy + fine_entropy)


# ----------------------------------------------------------------------------------------------------------------------
# Report

def report(tokenizer, x):
    """Scores of features x [N, 6], a flat dict of floats. `coarse_` is the coarse token alone, `full_` both.

    {coarse,full}_{error,r2}[_channel]: R^2 = 1 - error, error = mean square / variance over the bars that have the channel; without a
    channel's name the mean over channels. {coarse,fine}_{used,perplexity}: share of codes met, exp of their entropy.
    {coarse,fine}_bit_entropy_I: in bits, I = 0 the top bit; _bit_entropy: the least of them. pairs: distinct ones.
    {coarse,full}_sign: share of decodes on close's side, where it moved.
    """
    x = torch.as_tensor(x, dtype=torch.float32)
    coarse, fine = (t.cpu() for t in tokenizer.encode(x))
    decoded = {"coarse": tokenizer.decode(coarse).cpu(), "full": tokenizer.decode(coarse, fine).cpu()}
    present = x != 0
    present[:, :PRICES] = True
    out = {"bars": float(len(x))}
    for level, y in decoded.items():
        errors = {}
        for i, channel in enumerate(CHANNELS):
            true, got = x[present[:, i], i].double(), y[present[:, i], i].double()
            if len(true) > 1 and true.var() > 0:
                errors[channel] = ((true - got).square().mean() / true.var(correction=0)).item()
        errors = {f"_{c}": e for c, e in errors.items()} | {"": sum(errors.values()) / max(1, len(errors))}
        out |= {f"{level}_error{c}": e for c, e in errors.items()} | {f"{level}_r2{c}": 1 - e for c, e in errors.items()}
        moved = x[:, 0] != 0
        out[f"{level}_sign"] = ((y[:, 0] > 0) == (x[:, 0] > 0))[moved].double().mean().item() if moved.any() else 1.0
    for level, token, k in (("coarse", coarse, tokenizer.config.coarse_bits), ("fine", fine, tokenizer.config.fine_bits)):
        share = torch.bincount(token, minlength=2 ** k).double() / max(1, len(token))
        out[f"{level}_used"] = (share > 0).double().mean().item()
        out[f"{level}_perplexity"] = entropy(share).exp().item()
        p = (corners(k) > 0).double().T @ share                                                  # (k,)
        bits = (entropy_of_bit(p) / math.log(2)).tolist()
        out |= {f"{level}_bit_entropy_{i}": b for i, b in enumerate(bits)} | {f"{level}_bit_entropy": min(bits)}
    out["pairs"] = float(len(torch.unique(coarse << tokenizer.config.fine_bits | fine)))
    return out


def entropy_of_bit(p):
    return -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)


def print_report(scores):
    """The report as an aligned table for a person."""
    channels = [c for c in CHANNELS if f"full_r2_{c}" in scores]
    print(f"{'':8} {'':6} " + " ".join(f"{c:>8}" for c in ["mean"] + channels))
    for level in ("coarse", "full"):
        for what in ("error", "r2"):
            print(f"{level:8} {what:6} " + " ".join(f"{scores[f'{level}_{what}{c}']:8.4f}" for c in [""] + [f"_{c}" for c in channels]))
    print(f"\n{'':8} {'used':>7} {'perplexity':>10} {'least bit':>9} {'sign':>8}")
    for level, decode in (("coarse", "coarse"), ("fine", "full")):
        print(f"{level:8} {scores[f'{level}_used']:7.1%} {scores[f'{level}_perplexity']:10.1f} {scores[f'{level}_bit_entropy']:9.3f} "
              f"{scores[f'{decode}_sign']:8.2%}")
    print(f"\n{scores['pairs']:,.0f} distinct pairs in {scores['bars']:,.0f} bars")


# ----------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    data: list[str] | None = None    # CSV files, folders or globs; none: the synthetic market
    val_start: str | None = None     # first date that is not trained on (default: after 80 % of the time stamps)
    test_start: str | None = None    # first date of the test bars, which are reported on (default: after 90 %)
    out: str = "tok.pt"              # file to write
    overwrite: bool = False          # replace it if it exists
    coarse_bits: int = 10            # bits of the coarse token
    fine_bits: int = 10              # bits of the fine token
    direction_bit: bool = True       # the top coarse bit says that close rose
    entropy: float = 0.05            # weight of the entropy term
    steps: int = 3000                # updates
    batch_size: int = 1024           # bars of an update
    lr: float = 2e-3                 # peak learning rate
    seed: int = 0                    # of weights, batches and drawn bits
    device: str = "cpu"              # where to train


def main():
    config = Config(**data.cli(Config, __doc__))
    sizes = TokenizerConfig(config.coarse_bits, config.fine_bits, direction_bit=config.direction_bit, entropy=config.entropy)
    for name in ("steps", "batch_size", "lr"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name} {getattr(config, name)}: must be above 0")
    data.check_out(config.out, config.overwrite)
    series = data.load(config.data) if config.data else data.synthetic(config.seed)[0]
    borders = data.split_borders(series, config.val_start, config.test_start)
    rows = {split: [] for split in ("train", "test")}
    for bars in series:
        x, _ = data.features(bars)
        for split, parts in rows.items():
            first, last = data.targets_of(bars, split, borders)
            parts.append(x[first:last])
    rows = {split: np.concatenate(parts) for split, parts in rows.items()}
    print(f"tokenizer: {len(rows['train']):,} bars to train on, {len(rows['test']):,} to test, {config.steps} steps", flush=True)
    tokenizer = train_tokenizer(rows["train"], sizes, config.seed, config.steps, config.batch_size, config.lr, config.device,
                                lambda step, loss, _: data.progress(f"step {step}/{config.steps}  loss {loss:.4f}"))
    scores = report(tokenizer, rows["test"])
    print_report(scores)
    from model import save_checkpoint  # the schema lives there; model.py imports this file, so not at the top
    save_checkpoint(config.out, None, tokenizer, stage="tokenizer", step=config.steps, seed=config.seed, splits=borders,
                    metrics=[dict(stage="tokenizer", split="test", step=config.steps, **scores)])
    print(f"saved in {config.out}")


if __name__ == "__main__":
    data.run(main)
