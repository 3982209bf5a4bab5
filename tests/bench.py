"""Speeds and measures that are too slow or too noisy for a test. Run by hand, on a quiet machine.

    python tests/bench.py tokenizer --data sp500.csv.gz --val_start 2018-01-01 --test_start 2018-07-01

Sections: data, tokenizer, backtest, model, training, tuning. Each prints a table, all speeds as ratios in one run;
without --data it runs on the synthetic market.
"""
import argparse
import contextlib
import copy
import io
import math
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np
import torch

from backstage.checkpoint import read_checkpoint
from backstage.loop import Optimizer, Run
from backstage.opponents import baselines
from backstage.mapped import write_folder
from backstage.scores import time_block_sums, bootstrap
import data
import pretrain
from backstage.generate import draw
from model import Model
from tokenizer import TokenizerConfig, joint_entropy_term, mlp, on_sphere, quantize, token_of, train_tokenizer

SECTIONS = {}


def section(f):
    SECTIONS[f.__name__.rstrip("_")] = f
    return f


def read(args):
    """(series, borders) of the bars asked for."""
    series = data.load(args.data) if args.data else data.synthetic(seed=0)[0]
    return series, data.split_borders(series, args.val_start, args.test_start)


def best_of(n, f):
    """Least processor seconds of n calls on one core: what else runs does not count."""
    times = []
    for _ in range(n):
        began = time.process_time()
        f()
        times.append(time.process_time() - began)
    return min(times)


# ----------------------------------------------------------------------------------------------------------------------

@section
def data_(args):
    """Reading a plain numeric CSV beside numpy.loadtxt on the same numbers, and the features, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        bars = data.synthetic(n_symbols=1, n_bars=200_000)[0][0]
        path = os.path.join(folder, "bars.csv")
        np.savetxt(path, np.column_stack([bars.time, bars.ohlcva]), delimiter=",", fmt=["%d"] + ["%.6f"] * 6,
                   header="time,open,high,low,close,volume,amount", comments="")
        ours = best_of(3, lambda: data.load(path))
        numpys = best_of(3, lambda: np.loadtxt(path, delimiter=",", skiprows=1))
    features = best_of(3, lambda: data.features(bars))
    _, state = data.features(bars[:1000])
    x = np.random.default_rng(0).normal(size=(256, 100, 6))
    inverse = best_of(3, lambda: data.inverse(x, state))
    print(f"{'read CSV, 200,000 bars':28}{200_000 / ours:>12,.0f} bars/s   {numpys / ours:.1f} times numpy.loadtxt")
    print(f"{'features':28}{200_000 / features:>12,.0f} bars/s")
    print(f"{'inverse, 256 paths':28}{25_600 / inverse:>12,.0f} bars/s")


def k_means(x, n_centroids, generator, n_rounds=25):
    """Lloyd's algorithm from random bars; a centroid without bars moves to one. x [N, C] -> [n_centroids, C]."""
    c = x[torch.randperm(len(x), generator=generator)[:n_centroids]]
    for _ in range(n_rounds):
        to = assign(x, c)
        count = torch.bincount(to, minlength=n_centroids)[:, None]
        mean = torch.zeros_like(c).index_add_(0, to, x) / count.clamp(min=1)
        c = torch.where(count > 0, mean, x[torch.randint(len(x), (n_centroids,), generator=generator)])
    return c


def assign(x, c):
    return torch.cat([torch.from_numpy(((c ** 2).sum(1) - 2 * part @ c.T).numpy().argmin(1)) for part in x.split(4096)])


class VQ(torch.nn.Module):
    """A learned codebook (van den Oord et al. 2017, arXiv 1711.00937): the nearest code, straight-through."""

    def __init__(self, bits):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.randn(2 ** bits, bits))

    def forward(self, v):
        """Encoder outputs v [B, bits] -> what the decoder reads [B, bits], tokens [B], loss."""
        token = assign(v.detach(), self.codes.detach())
        c = self.codes[token]
        commitment = 0.25 * (v - c.detach()).square().mean()
        return v + (c - v).detach(), token, (c - v.detach()).square().mean() + commitment


class FSQ(torch.nn.Module):
    """Each number rounded to one of four levels (Mentzer et al. 2023, arXiv 2309.15505): bits / 2 numbers, 2^bits codes."""

    def __init__(self, bits):
        super().__init__()
        self.n = bits // 2

    def forward(self, v):
        v = 1.5 + 1.5 * torch.tanh(v[:, :self.n])
        level = v.round()
        token = (level.long() * 4 ** torch.arange(self.n)).sum(1)
        return v + (level - v).detach() - 1.5, token, 0.0


class BSQ(torch.nn.Module):
    """The sphere and the signs, with the entropy term: the first phase of tokenizer.py."""

    def __init__(self, bits):
        super().__init__()

    def forward(self, v):
        config, u = TokenizerConfig(), on_sphere(v)
        c = quantize(u)
        term = joint_entropy_term(u, config.tau, config.gamma)
        return c * math.sqrt(u.shape[1]), token_of(c), config.entropy * term


class Quantized(torch.nn.Module):
    """Two levels of encoder, quantizer and decoder, the second on what the first leaves; networks as in tokenizer.py."""

    def __init__(self, quantizer, channels, bits=10, n_hidden=128):
        super().__init__()
        self.quantizers = torch.nn.ModuleList(quantizer(bits) for _ in range(2))
        self.encoders = torch.nn.ModuleList(mlp(channels, n_hidden, bits) for _ in range(2))
        width = bits // 2 if quantizer is FSQ else bits
        self.decoders = torch.nn.ModuleList(mlp(width, n_hidden, channels) for _ in range(2))

    def forward(self, z):
        """Standardized bars z [B, C] -> decodes after each level [B, C], tokens [B] of each, loss."""
        left, total, decodes, tokens = z, 0.0, [], []
        for encoder, quantizer, decoder in zip(self.encoders, self.quantizers, self.decoders):
            c, token, extra = quantizer(encoder(left))
            decoded = decoder(c)
            total = total + (left - decoded).square().sum() / left.square().sum() + extra
            left = (left - decoded).detach()
            decodes.append(z - left)
            tokens.append(token)
        return decodes, tokens, total


def train_quantized(quantizer, z, steps, seed=0, batch_size=2048, lr=7e-3, look=None):
    """A Quantized trained on standardized bars z [N, C]; look(step, model) is called before each update."""
    torch.manual_seed(seed)
    model = Quantized(quantizer, z.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(steps):
        if look is not None:
            look(step, model)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = model(z[torch.randint(len(z), (batch_size,))])[2]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@section
def tokenizer(args):
    """Error, codes' use and seconds of quantizers of 10 + 10 bits, on the bars of --split (val: what choices are made by)."""
    series, borders = read(args)
    features = [data.features(bars)[0] for bars in series]
    parts = {}
    for split in ("train", args.split):
        rows = [x[slice(*data.targets_of(bars, split, borders))] for bars, x in zip(series, features)]
        parts[split] = torch.from_numpy(np.concatenate(rows))
    train, test = parts["train"], parts[args.split]
    has = (train != 0).any(0)
    mean, std = train[:, has].mean(0), train[:, has].std(0)
    z, z_test = (train[:, has] - mean) / std, (test[:, has] - mean) / std
    steps = args.steps or 1200
    torch.set_num_threads(1)
    print(f"{len(train):,} bars to train on, {len(test):,} of {args.split}, {steps:,} updates, one thread, seed {args.seed}\n")
    print(f"{'':24}{'cpu s':>6}   {'coarse error':>12}{'used':>8}{'perplexity':>12}   {'both, error':>12}{'fine used':>11}{'perplexity':>12}")

    def row(name, seconds, decodes, tokens):
        line = f"{name:24}{seconds:>6.0f}"
        for y, token, width in zip(decodes, tokens, (8, 11)):
            error = (((z_test - y) ** 2).mean(0) / z_test.var(0, correction=0)).mean()
            share = torch.bincount(token, minlength=1024) / len(token)
            perplexity = torch.exp(-torch.xlogy(share, share).sum())
            line += f"   {error:>12.5f}{(share > 0).float().mean():>{width}.1%}{perplexity:>12.0f}"
        print(line, flush=True)

    began = time.process_time()
    generator = torch.Generator().manual_seed(args.seed)
    c1 = k_means(z, 1024, generator)
    c2 = k_means(z - c1[assign(z, c1)], 1024, generator)
    seconds = time.process_time() - began
    coarse = assign(z_test, c1)
    fine = assign(z_test - c1[coarse], c2)
    row("k-means", seconds, (c1[coarse], c1[coarse] + c2[fine]), (coarse, fine))

    for name, quantizer in (("VQ, learned codes", VQ), ("FSQ", FSQ)):
        began = time.process_time()
        model = train_quantized(quantizer, z, steps, args.seed)
        seconds = time.process_time() - began
        with torch.no_grad():
            decodes, tokens, _ = model(z_test)
        row(name, seconds, decodes, tokens)

    forms = {"BSQ alone": dict(nearest=False), "  entropy per bit": dict(nearest=False, joint=False),
             "  no entropy term": dict(nearest=False, entropy=0.0), "BSQ, then nearest": {},
             "  no direction bit": dict(direction_bit=False), "  close counts more": dict(close=TokenizerConfig.close)}
    for name, settings in forms.items():
        began = time.process_time()
        net = train_tokenizer(train, TokenizerConfig(**dict(close=1.0) | settings), seed=args.seed, steps=steps)
        seconds = time.process_time() - began
        tokens = net.encode(test)
        decodes = [(net.decode(*read)[:, has] - mean) / std for read in (tokens[:1], tokens)]
        row(name, seconds, decodes, tokens)
    coarse = net.encode(train)[0]
    some = coarse[torch.randperm(len(coarse), generator=generator)[:len(test)]]
    print(f"\nthe last one, coarse codes in use: {len(coarse.unique()) / 1024:.1%} on all {len(coarse):,} training bars, "
          f"{len(some.unique()) / 1024:.1%} on {len(some):,} of them")
    speed = [len(test) / best_of(3, f) for f in (lambda: net.encode(test), lambda: net.decode(*tokens))]
    print(f"\nencode {speed[0]:,.0f} bars/s, decode {speed[1]:,.0f} bars/s")


@section
def backtest(args):
    """Seconds of a backtest, part by part: an untrained model, ten origins a symbol, 10 steps, 100 paths."""
    import backtest
    import sample
    from model import Model, ModelConfig
    series, borders = read(args)
    x = np.concatenate([data.features(bars)[0][data.CONTEXT:] for bars in series[:64]])
    tokenizer, model = train_tokenizer(x, TokenizerConfig(), steps=30), Model(ModelConfig()).eval()
    t = backtest.Targets(series, borders[1], 2**62, 10, None, 0)
    origins = sum(map(len, t.origins))
    histories = [bars[:o + 1] for bars, origins in zip(t.series, t.origins) for o in origins][:64]
    print(f"{len(t.series)} symbols, {len(t.r):,} targets, {origins:,} origins, {torch.get_num_threads()} threads\n")
    print(f"{'':34}{'wall s':>8}{'cpu s':>8}")
    total = np.zeros(2)

    def row(name, f, times=1.0):
        wall, cpu = time.perf_counter(), time.process_time()
        result = f()
        seconds = times * np.array([time.perf_counter() - wall, time.process_time() - cpu])
        total[:] += seconds
        print(f"{name:34}{seconds[0]:>8.0f}{seconds[1]:>8.0f}", flush=True)
        return result

    f = row("next bars", lambda: backtest.next_bars(model, tokenizer, t))
    row("paths, from 64 origins' time", lambda: sample.simulate(model, tokenizer, histories, 10, 100), origins / len(histories))
    rivals = row("baselines", lambda: baselines(t, 100))
    row("scores and intervals", lambda: [bootstrap(time_block_sums(g, t), t) for g in (f, *rivals.values())])
    print(f"{'all':34}{total[0]:>8.0f}{total[1]:>8.0f}")


# --- model: against a plain Transformer of torch's own parts ---

class PlainBlock(torch.nn.Module):
    def __init__(self, C, H, hidden):
        super().__init__()
        linear = lambda n, m: torch.nn.Linear(n, m, bias=False)
        self.H, self.norm1, self.norm2 = H, torch.nn.RMSNorm(C), torch.nn.RMSNorm(C)
        self.qkv, self.out = linear(C, 3 * C), linear(C, C)
        self.up, self.down = linear(C, hidden), linear(hidden, C)

    def forward(self, x, cache=None, pos=0):
        """cache: keys and values [B, H, room, D] of the bars before `pos`, to which those of x are
        added."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.H, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # [B, H, T, D]
        if cache is not None:
            for held, new in zip(cache, (k, v)):
                held[:, :, pos:pos + T] = new
            k, v = (held[:, :, :pos + T] for held in cache)
        attention = torch.nn.functional.scaled_dot_product_attention
        o = attention(q, k, v, is_causal=T > 1)
        x = x + self.out(o.transpose(1, 2).reshape(B, T, C))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Plain(torch.nn.Module):
    """A GPT: causal softmax attention, learned positions, the same heads, width and vocabulary.

    The MLPs' width makes the parameters equal.
    """

    def __init__(self, C, H, n_layer, n_parameters, V=1024, block_size=8192):
        super().__init__()
        self.coarse, self.fine, self.pos = (torch.nn.Embedding(n, C) for n in (V, V, block_size))
        hidden = (n_parameters - 4 * V * C - 4 * n_layer * C * C) // (2 * n_layer * C) // 8 * 8
        self.layers = torch.nn.ModuleList(PlainBlock(C, H, hidden) for _ in range(n_layer))
        self.norm, self.heads = torch.nn.RMSNorm(C), torch.nn.Linear(C, 2 * V, bias=False)

    def hidden(self, coarse, fine, caches=None, pos=0):
        x = self.coarse(coarse) + self.fine(fine) + self.pos.weight[pos:pos + coarse.shape[1]]
        for n, block in enumerate(self.layers):
            x = block(x, caches and caches[n], pos)
        return x

    def forward(self, coarse, fine, time, targets, *_):
        a, b = self.heads(self.norm(self.hidden(coarse, fine))).chunk(2, dim=-1)
        ce = torch.nn.functional.cross_entropy
        loss = ce(a.flatten(0, 1).float(), targets[0].flatten())
        return a, b, loss + ce(b.flatten(0, 1).float(), targets[1].flatten())

    def last(self, x):
        """Logits of the next bar's tokens, 2 of [B, V], from the last of hidden states."""
        return self.heads(self.norm(x[:, -1])).float().chunk(2, dim=-1)

    def caches(self, B, room):
        heads = self.layers[0].H
        shape, like = (B, heads, room, self.pos.weight.shape[1] // heads), self.pos.weight
        return [[like.new_empty(shape) for _ in "kv"] for _ in self.layers]


HORIZON, CONTEXT = 10, 400


@torch.inference_mode()
def forecast_ours(model, half, context, stamp, n):
    """n paths of HORIZON bars, prefill and all."""
    with torch.autocast(stamp.device.type, torch.bfloat16, enabled=half):
        state = model.prefill(*context, stamp).repeat(n)
    times = state.stamps[:, -1:] + 86400 * torch.arange(1, HORIZON + 1, device=stamp.device)
    for k in range(HORIZON):
        with torch.autocast(stamp.device.type, torch.bfloat16, enabled=half):
            coarse, fine = model.sample(state.h)
        if k + 1 < HORIZON:
            model.step(coarse, fine, times[:, k:], state)


def drawn(logits, device):
    return [draw(a, 1.0, 1.0, torch.rand(len(a), 1, device=device)) for a in logits]


@torch.inference_mode()
def forecast_cached(model, context, n):
    """The same of the plain Transformer, which keeps keys and values."""
    device, caches = context[0].device, model.caches(1, CONTEXT + HORIZON)
    logits = model.last(model.hidden(*context, caches))
    logits = [a.repeat(n, 1) for a in logits]
    caches = [[a.repeat(n, 1, 1, 1) for a in pair] for pair in caches]
    for k in range(HORIZON):
        tokens = drawn(logits, device)
        if k + 1 < HORIZON:
            logits = model.last(model.hidden(*tokens, caches, CONTEXT + k))


@torch.inference_mode()
def forecast_again(model, context, n):
    """The same of the plain Transformer, which reads all bars again for each one more."""
    tokens = [a.repeat(n, 1) for a in context]
    for k in range(HORIZON):        # the first bar's logits are the same of all paths
        logits = [a.expand(n, -1) for a in model.last(model.hidden(*tokens if k else context))]
        tokens = [torch.cat(pair, 1) for pair in zip(tokens, drawn(logits, context[0].device))]


def in_turns(calls, rounds, clock, device):
    """Least time of each call, over some rounds."""
    def taken(f):
        if device == "cuda":
            torch.cuda.synchronize()
        began = clock()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    for call in calls:
        call()
    return [min(column) for column in zip(*[[taken(call) for call in calls] for _ in range(rounds)])]


def trainer(model, batch, dtype, device):
    """A whole update, as pretrain.py makes it."""
    optimizer = Optimizer(model, 0.02, 3e-3, 0.1)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    state = Run()

    def step():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(*batch)[2]
        scaler.scale(loss).backward()
        state.update(model, optimizer, scaler, loss.item(), 1.0)
    return step


@section
def model_(args):
    """Training and whole forecasts, as ratios to a plain Transformer of equal size in the same run,
    calls taken in turns."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = device == "cpu" and args.threads == 1
    clock = time.process_time if alone else time.perf_counter   # one thread: what else runs does not count
    sizes = [dict(n_layer=12 if C == 768 else 4, n_head=max(4, C // 64) if C > 128 else 8, n_embd=C)
             for C in args.widths]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for size in sizes:
        ours = Model(size).to(device)
        n_parameters = sum(p.numel() for p in ours.parameters())
        plain = Plain(size["n_embd"], size["n_head"], size["n_layer"], n_parameters).to(device)
        count = sum(p.numel() for p in plain.parameters()) - plain.pos.weight.numel()
        print(f"\n{name}, {args.threads} threads: {size['n_layer']} layers of {size['n_embd']}, {n_parameters:,} "
              f"parameters; plain Transformer {count:,} without positions")
        if "training" in args.parts:
            training_speed(ours, plain, n_parameters, args.rounds, clock, device)
        if "forecasts" in args.parts:
            forecast_speed(ours, plain, args.rounds, clock, device)


def training_speed(ours, plain, n_parameters, rounds, clock, device):
    bars = 8192 * (4 if device == "cuda" else 1)
    print(f"{'training':>12}{'':10}{'ours, bars/s':>16}{'plain, bars/s':>16}{'ratio':>8}"
          f"{'of matmul rate':>16}{'plain':>8}{'reasoner':>10}")
    often = 0.2 + 0.8 / pretrain.ORIGIN_EVERY   # the share of a run's updates in which the reasoner learns
    for T in (512, 2048, 8192) if device == "cuda" else (512, 2048):
        B = bars // T
        coarse, fine = torch.randint(0, 1024, (2, B, T + 1), device=device)
        stamp = (1_500_000_000 + 86400 * torch.arange(T, device=device)).expand(B, -1)
        origins = torch.randint(1, T - 15, (B, max(1, T // pretrain.ORIGIN_BARS)), device=device)
        batch = coarse[:, :-1], fine[:, :-1], stamp, (coarse[:, 1:], fine[:, 1:]), None
        halves = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,)
        for dtype in (*halves, torch.float32):
            square = torch.randn(2048, 2048, device=device, dtype=dtype)
            calls = [trainer(ours, (*batch, at), dtype, device) for at in (None, origins)]
            calls += trainer(plain, batch, dtype, device), lambda: square @ square
            alone, learning, b, matmul = in_turns(calls, rounds, clock, device)
            a = alone + often * (learning - alone)      # a mean update of a run
            share = [6 * n_parameters * bars / t / (2 * 2048**3 / matmul) for t in (a, b)]
            print(f"{'T = ' + str(T):>12}{str(dtype)[6:]:>10}{bars / a:>16,.0f}{bars / b:>16,.0f}{b / a:>8.2f}"
                  f"{share[0]:>16.1%}{share[1]:>8.1%}{1 - alone / a:>10.1%}")


def forecast_speed(ours, plain, rounds, clock, device):
    """Each model in the type that is faster for it; of the plain one bfloat16 means its weights, too."""
    ours.eval(), plain.eval()
    half = copy.deepcopy(plain).bfloat16()
    context = torch.randint(0, 1024, (2, 1, CONTEXT), device=device)
    stamp = (1_500_000_000 + 86400 * torch.arange(CONTEXT, device=device))[None]
    print(f"{'paths':>12}{'ours, ms':>12}{'again, ms':>12}{'ratio':>8}{'cached, ms':>12}{'ratio':>8}"
          f"   {HORIZON} bars from {CONTEXT}, float32 or bfloat16")
    for n in (1, 16, 256, 4096) if device == "cuda" else (1, 16, 200):
        calls = [lambda: forecast_ours(ours, False, context, stamp, n), lambda: forecast_ours(ours, True, context, stamp, n),
                 lambda: forecast_cached(plain, context, n), lambda: forecast_cached(half, context, n)]
        if n <= 16:     # more takes minutes
            calls += [lambda: forecast_again(plain, context, n), lambda: forecast_again(half, context, n)]
        times = in_turns(calls, rounds * (4 if n == 1 else 1), clock, device)   # the shortest is the noisiest
        best = [min(times[i:i + 2]) for i in range(0, len(times), 2)] + [math.nan]
        a, cached, again = best[:3]
        print(f"{n:>12}{1e3 * a:>12.1f}{1e3 * again:>12.1f}{again / a:>8.2f}{1e3 * cached:>12.1f}{cached / a:>8.2f}"
              f"   {'bfloat16' if times[1] < times[0] else 'float32'}")


SIZES = "--tok_steps=50 --n_layer=4 --n_head=8 --n_embd=128 --batch_size=16 --block_size=256 --dropout=0 --mirror=0 --device=cpu".split()
SMALL = ["--n_layer=3", "--n_head=4", "--n_embd=64"]


def trained(script, path, *flags):
    """Runs a stage in this process, silently -> its checkpoint's reports of that stage, and the least seconds of an update."""
    ends, update, argv = [], Run.update, sys.argv

    def timed(*a):
        ends.append(time.perf_counter())
        return update(*a)
    Run.update, sys.argv = timed, [script.__name__, "--out", path, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            script.main()
    finally:
        Run.update, sys.argv = update, argv
    return [m for m in read_checkpoint(path)["metrics"] if m["stage"] == script.__name__], min(np.diff(ends[1:]))


@section
def training(args):
    """What the loop adds to the bare step; what activation checkpointing saves; how near bf16 ends to float32."""
    from model import ModelConfig
    torch.set_num_threads(args.threads)
    B, T = 16, 256
    tokens = torch.randint(0, 1024, (2, B, T + 1))
    stamp = (1_500_000_000 + 86400 * torch.arange(T)).expand(B, -1)
    model = Model(ModelConfig(n_embd=128))
    optimizer = Optimizer(model, 0.02, 3e-3, 0.1)

    def step():
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens[0, :, :-1], tokens[1, :, :-1], stamp, (tokens[0, :, 1:], tokens[1, :, 1:]))[2]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizer.parts:
            part.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        write_folder(data.synthetic(n_symbols=4, n_bars=20_000)[0], os.path.join(folder, "bars"))
        flags = ["--data", os.path.join(folder, "bars"), *SIZES, "--dtype=bf16"]
        bare, loop = [], []
        for k in range(args.rounds):    # in turns, since the machine's speed drifts
            n = args.steps or 40
            loop.append(trained(pretrain, os.path.join(folder, f"{k}.pt"), *flags, f"--steps={n}", f"--eval_every={n}")[1])
            bare.append(min(step() for _ in range(args.steps or 20)))
        least, loop = min(bare), min(loop)
        print(f"{'bare step':44}{B * T / least:>10,.0f} bars/s")
        print(f"{'in the loop of pretrain.py':44}{B * T / loop:>10,.0f} bars/s   {loop / least - 1:+.1%} time, at most +5 %")

        model.zero_grad()
        tokens, T = torch.randint(0, 1024, (2, 4, 2049)), 2048
        stamp = (1_500_000_000 + 86400 * torch.arange(T)).expand(4, -1)
        held = {}
        for model.grad_ckpt in (False, True):
            storages = {}

            def pack(a):
                storages[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
                return a
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a), torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens[0, :, :-1], tokens[1, :, :-1], stamp, (tokens[0, :, 1:], tokens[1, :, 1:]))[2]
            held[model.grad_ckpt] = sum(n for p, n in storages.items() if p not in own)
        print(f"{'activations held at T = 2,048, 4 windows':44}{held[False] / 2**20:>10,.0f} MiB")
        print(f"{'  with --grad_ckpt':44}{held[True] / 2**20:>10,.0f} MiB   {1 - held[True] / held[False]:.0%} less, "
              f"at least 40 %")

        n, last = args.steps or 300, {}
        for dtype in ("fp32", "bf16"):
            run, _ = trained(pretrain, os.path.join(folder, f"{dtype}.pt"), *flags[:-1], f"--dtype={dtype}", f"--steps={n}", f"--eval_every={n}", *SMALL)
            last[dtype] = run[-1]["val"]
        print(f"{f'val loss after {n} steps, float32':44}{last['fp32']:>10.4f}")
        print(f"{'  bfloat16':44}{last['bf16']:>10.4f}   {last['bf16'] / last['fp32'] - 1:+.2%}, within 1 %")


@section
def tuning(args):
    """What an update of the later stages takes, as a multiple of one of pretrain.py on the same windows."""
    import expo
    import rollout
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        base, out = os.path.join(folder, "base.pt"), os.path.join(folder, "out.pt")
        write_folder(data.synthetic(n_symbols=4, n_bars=20_000)[0], os.path.join(folder, "bars"))
        n = args.steps or 20
        _, plain = trained(pretrain, base, "--data", os.path.join(folder, "bars"), *SIZES, f"--steps={n}", f"--eval_every={n}")
        print(f"{'pretrain.py':40}{plain:>8.2f} s an update")
        for script, *how in ((expo, "--pairs=set"), (expo, "--pairs=drawn"), (rollout, "--target=true"), (rollout, "--target=chosen")):
            took = trained(script, out, "--ckpt", base, "--overwrite", "--no-backtest", f"--steps={n}", f"--eval_every={n}", *how)[1]
            print(f"{script.__name__ + '.py ' + how[0]:40}{took:>8.2f}{took / plain:>8.1f} times pretrain.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="bars that score the tokenizers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--steps", type=int, default=0, help="of the trainings in tokenizer, training; 0: as published")
    parser.add_argument("--widths", nargs="+", type=int, default=(128, 256),
                        help="of the models: 128 is the shipped one, 768 has about 100 million parameters")
    parser.add_argument("--parts", nargs="+", default=("training", "forecasts"), choices=("training", "forecasts"))
    args = parser.parse_args()
    for name in args.sections or SECTIONS:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}; choose of {', '.join(SECTIONS)}")
        print(f"== {name}")
        SECTIONS[name](args)
