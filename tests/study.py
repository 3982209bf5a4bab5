"""Which part earns its place, measured beside its control: run by hand, ten minutes to an hour and more.

    python tests/study.py model --data bars.csv.gz      # variants of the model, its inputs and its training
    python tests/study.py tokenizer --data bars.csv.gz  # 8 to 12 bits a level, through the whole pipeline
    python tests/study.py closes                        # what rounding to tokens costs whoever calls a reverting market
    python tests/study.py codes --data bars.csv.gz      # codes in use over the updates, for VQ and for BSQ: assets/codes.svg
    python tests/study.py null                          # how often an interval of right calls misses one half
    python tests/study.py room --data bars.csv.gz       # what knowing the volatility to come would win ten bars ahead
    python tests/study.py leak                          # scaling over a whole window shows skill on a random walk
    python tests/study.py base --data market/*.csv      # the weights that come along, on markets that they have not seen
    python tests/study.py parallel --data market/*.csv  # the reasoner's forecast of 16 bars at once, beside that bar by bar
    python tests/study.py few --data market/*.csv       # few bars: a symbol of each file, alone
    python tests/study.py budgets --data stocks.csv.gz  # rows of pretrain.BUDGETS on half-years of daily bars
    python tests/study.py clock --train corpus/*.csv --data market/*.csv lunch  # with and without hours in the scale
    python tests/study.py stages --market reverting     # expo.py, rollout.py in all forms and orders, and their controls

Runs are saved one by one in --out: stop it and start it again at will; with all runs there it only prints. Each run has
one thread.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import math
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from backstage import stage, stage_scores
from backstage.checkpoint import read_checkpoint
from backstage.files import load_safe, save_atomic, weights_hash
from backstage.grid import Bands
from backstage.loop import Optimizer
from backstage.markets import KINDS, best_accuracy, reverting_path
from backstage.opponents import RESIDUALS, volatility_paths
from backstage.past import read_pasts
from backstage.pictures import Panel, grid_line, label, line, write_svg
from backstage.mapped import write_folder
from backstage.scores import (
    RATIOS, against, at_step, time_block_sums, bootstrap, direction_sums, score_draws, scored, sums_of, versus)
from backstage.script import run
from backstage.series import DAY, decayed_sum
import backtest
import data
import expo
import pretrain
import rollout
import sample
from model import Model, load_checkpoint, norm, save_checkpoint
from tokenizer import TokenizerConfig, report, train_tokenizer

SMALL = ["--n_layer=3", "--n_head=4", "--n_embd=64"]


# ----------------------------------------------------------------------------------------------------------------------
# Variants of the model, each trained by pretrain.py itself, from the same tokens

class Tables(Model):
    """A row of weights for each code, in and out, and no candle: the usual form."""

    def __init__(self, config):
        super().__init__(config)
        V1, V2, C = len(self.D1), len(self.g), self.config.n_embd
        self.rows = torch.nn.Embedding(V1 + V2, C)
        self.heads = torch.nn.ParameterList(torch.nn.Parameter(0.02 * torch.randn(n, C)) for n in (V1, V1, V2))
        torch.nn.init.normal_(self.rows.weight, std=0.02)
        self.embedding.read = self.read

    def coarse_vectors(self):
        return [self.heads[0]]

    def fine_vectors(self):
        return [*self.heads[1:]]

    def candles(self, coarse, fine):
        self.tokens = coarse, fine
        return super().candles(coarse, fine)

    def read(self, z, moves, stamp):
        coarse, fine = self.tokens
        x = self.rows(coarse) + self.rows(fine + len(self.D1)) + stamp
        return norm(x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x)


class Blind(Model):
    """Does not see what `blind_to` names of what a bar shows beside its candle: means of moves, the clock."""

    def __init__(self, config):
        super().__init__(config)
        self.read_all, self.embedding.read = self.embedding.read, self.read

    def read(self, z, moves, stamp):
        return self.read_all(z, moves * ("moves" not in self.blind_to), stamp * ("clock" not in self.blind_to))


def blind(*columns):
    return type("Blind", (Blind,), dict(blind_to=columns))


class AdamWAlone(Optimizer):
    """AdamW for all weights; --lr is its rate for the matrices that are Muon's by default."""

    def __init__(self, model, lr, adam_lr, weight_decay):
        super().__init__(model, lr, adam_lr, weight_decay)
        matrices = self.parts[0].param_groups[0]["params"]
        self.parts = torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True), self.parts[1]


# name: class of the model, its settings beside the default ones, flags of pretrain.py
VARIANTS = {
    "default": (Model, {}, []),
    "tables for codes": (Tables, {}, []),
    "no means of moves": (blind("moves"), {}, []),
    "no clock": (blind("clock"), {}, []),
    "neither": (blind("moves", "clock"), {}, []),
    "rope": (Model, dict(pos="rope"), []),
    "alibi": (Model, dict(pos="alibi"), []),
    "no reasoner": (Model, dict(reasoner=False), []),
    "linear heads alone": (Model, dict(linear_heads=-1, windows=()), []),
    "local heads alone": (Model, dict(linear_heads=0), []),
    "no averaged weights": (Model, {}, ["--average=0"]),
    "no dropout": (Model, {}, ["--dropout=0"]),
    "other market too": (Model, {}, ["--mirror=1"]),
    "AdamW alone, 0.003": (Model, {}, ["--lr=0.003"]),
    "AdamW alone, 0.01": (Model, {}, ["--lr=0.01"]),
}
FIGURES = (("coarse", "coarse, nats", 4), ("fine", "fine, nats", 4), ("close", "CRPS close", 4), ("range", "range", 4),
           ("volume", "volume", 4), ("right", "right calls %", 2))
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # Student's t for a 95 % interval, by number of seeds


def model_study(argv):
    """Variants of the model from several seeds: val scores of their best weights, less those of the default."""
    parser = argparse.ArgumentParser(prog="study.py model")
    parser.add_argument("--data", nargs="+", help="files or folders of bars")
    parser.add_argument("--market", help="kind of synthetic market, in place of --data")
    parser.add_argument("--out", default="study_model", help="folder of checkpoints; what is there is not trained again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain.py")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    market_folder(args)
    found, first = {}, os.path.join(args.out, "default-0.pt")
    for seed in range(args.seeds):
        for name in args.variants:
            path = variant_file(args, name, seed)
            tokenizer = ["--tokenizer", first] if path != first and os.path.exists(first) else []     # all take the first run's
            train_variant(name, path, ["--data", *args.data, f"--seed={seed}", *tokenizer, *args.flags])
            rows = [row for row in read_checkpoint(path)["metrics"] if row["stage"] == "pretrain"]
            best = min(rows, key=lambda row: row["score"])
            found[name, seed] = best | dict(right=100 * best["da"])
            print(f"{name}, seed {seed}: score {best['score']:.4f} at update {best['step']}", file=sys.stderr, flush=True)
    print(f"{args.seeds} seeds; val, best weights; of the variants the difference to the default, 95 % interval")
    print("| | " + " | ".join(label for _, label, _ in FIGURES) + " |\n|" + " --- |" * (1 + len(FIGURES)))
    for name in args.variants:
        cells = [name]
        for key, _, digits in FIGURES:
            own = [found[name, seed][key] for seed in range(args.seeds)]
            less = [found[name, seed][key] - found["default", seed][key] for seed in range(args.seeds)]
            if name == "default":
                cells.append(f"{statistics.mean(own):.{digits}f}")
            elif args.seeds == 1:
                cells.append(f"{less[0]:+.{digits}f}")
            else:
                half = T95[args.seeds] * statistics.stdev(less) / math.sqrt(args.seeds)
                mean = statistics.mean(less)
                cells.append(f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")
        print("| " + " | ".join(cells) + " |", flush=True)


def variant_file(args, name, seed):
    return os.path.join(args.out, f"{name.replace(' ', '-')}-{seed}.pt")


def market_folder(args):
    """Makes the synthetic market of --market once, and names it as --data."""
    if args.market:
        args.data = [os.path.join(args.out, args.market)]
        if not os.path.exists(os.path.join(args.data[0], "symbols.json")):
            series, best_da = data.synthetic(seed=0, n_symbols=8, n_bars=32_000, kind=args.market)
            write_folder(series, args.data[0])
            print(f"{args.market}: at best {best_da:.2%} of directions can be called right")
    elif not args.data:
        raise data.UserError("give --data or --market")


def train_variant(name, path, flags):
    """By pretrain.py, with another model in place of its own; a run that was broken off goes on."""
    kind, settings, own = VARIANTS[name]
    go_on = ["--resume"] * os.path.exists(path)
    optimizer = pretrain.Optimizer
    pretrain.Model = lambda config: kind(dataclasses.replace(config, **settings))
    pretrain.Optimizer = AdamWAlone if name.startswith("AdamW") else optimizer
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain.main(["--out", path, *own, *flags, *go_on])
    finally:
        pretrain.Model, pretrain.Optimizer = Model, optimizer


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: how many bits, and do the codes in use tell how well the model calls directions?

CODES = (("coarse_used", "coarse codes used"), ("coarse_perplexity", "coarse perplexity"), ("pairs", "distinct pairs"))
TARGETS = (("da", "right calls %", 100, 2), ("crps", "CRPS close", 1, 4), ("range_crps", "CRPS range", 1, 4),
           ("volume_crps", "CRPS volume", 1, 4))


def tokenizer_study(argv):
    """Tokenizers of several sizes, ended with the nearest candle or with signs, each with a small model of its own.

    On bars that are given, or on a market in which a direction is planted: --market edge, reverting.
    """
    parser = argparse.ArgumentParser(prog="study.py tokenizer")
    parser.add_argument("--data", nargs="+", help="files or folders of bars")
    parser.add_argument("--market", help="kind of synthetic market, in place of --data")
    parser.add_argument("--out", default="study_tokenizer", help="folder of the checkpoints; what is there is not trained again")
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--tok_steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=(8, 10, 12), help="of each level")
    parser.add_argument("--signs", action="store_true", help="also the published form alone, at every size")
    parser.add_argument("--plot", help="write a picture of direction accuracy over codes in use")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    market_folder(args)
    series = data.load(args.data)
    borders = data.split_borders(series, args.val_start, args.test_start)
    features = [data.features(bars)[0] for bars in series]
    rows = {split: np.concatenate([x[slice(*data.targets_of(bars, split, borders))] for x, bars in zip(features, series)])
            for split in ("train", args.split)}
    arms = []
    for bits in args.bits:
        for nearest in (True, False) if args.signs else (True,):
            for seed in range(args.seeds):
                arms.append(tokenizer_arm(args, bits, nearest, seed, rows, borders))
    result = backtest.backtest([path for _, path, _, _ in arms], series, split=args.split, horizon=1, paths=2, stride=10**9)
    print(f"{result['start']} to {result['end']}, {result['blocks']} blocks of time; {args.tok_steps} updates of the "
          f"tokenizer, {args.steps} of the model; nats are of its whole tokens, on val")
    shown = [target for target in TARGETS if target[0] in result["checkpoints"][0]]
    print(f"\n{'bits a level':20}{'error coarse':>13}{'both':>9}{'used':>8}{'perplexity':>11}{'fine':>7}{'pairs':>8}{'nats':>8}" +
          "".join(f"{title:>26}" for _, title, _, _ in shown))
    for (name, _, scores, nats), entry in zip(arms, result["checkpoints"]):
        use = entry["tokens"]
        print(f"{name:20}{scores['coarse_error']:>13.4f}{scores['full_error']:>9.4f}{use['coarse_used']:>8.1%}"
              f"{use['coarse_perplexity']:>11.0f}{use['fine_perplexity']:>7.0f}{use['pairs']:>8,.0f}{nats:>8.3f}" +
              "".join(f"{backtest.show(entry[key], scale, digits):>26}" for key, _, scale, digits in shown))
    if len(arms) >= 3:
        print(f"\n{'correlation with right calls':30}{'Pearson':>22}{'Spearman':>24}     intervals: these checkpoints, other bars")
        use = [entry["tokens"] for entry in result["checkpoints"]]
        values, drawn = zip(*(result["replicates"][path]["da"] for _, path, _, _ in arms))
        correlations = token_correlations(use, np.array(values), np.stack(drawn, -1), result["blocks"])
        for key, row in correlations.items():
            pearson, spearman = (backtest.show(row[kind], 1, 2, "+") for kind in ("pearson", "spearman"))
            print(f"{key:30}{pearson:>22}{spearman:>24}")
    if args.plot:
        plot_tokenizers(args.plot, [name for name, *_ in arms], result)


def tokenizer_arm(args, bits, nearest, seed, rows, borders):
    """A tokenizer and a small model on its tokens -> name, path, the tokenizer's scores, the model's nats a bar."""
    name = f"{bits}{'' if nearest else ', signs alone'}{f', seed {seed}' if args.seeds > 1 else ''}"
    stem = os.path.join(args.out, f"{bits}-{'nearest' if nearest else 'signs'}-{seed}")
    print(name, file=sys.stderr, flush=True)
    if not os.path.exists(stem + ".tok.pt"):
        config = TokenizerConfig(bits, bits, nearest=nearest)
        tokenizer = train_tokenizer(rows["train"], config, seed=seed, steps=args.tok_steps)
        save_checkpoint(stem + ".tok.pt", None, tokenizer, stage="tokenizer", splits=borders)
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", *args.data, f"--tokenizer={stem}.tok.pt",
               f"--steps={args.steps}", f"--seed={seed}", "--out", stem + ".pt", *SMALL]
    for date in ("val_start", "test_start"):
        if getattr(args, date):
            command.append(f"--{date}={getattr(args, date)}")
    if os.path.exists(stem + ".pt"):
        command.append("--resume")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    _, tokenizer, meta = load_checkpoint(stem + ".pt")
    nats = min(row["val"] for row in meta["metrics"] if "val" in row)
    return name, stem + ".pt", report(tokenizer, rows[args.split]), nats


def token_correlations(use, accuracy, drawn, n_blocks):
    """Correlation, over checkpoints, of each number in `use` (a dict each) with direction accuracy.

    accuracy [checkpoints], drawn [replicates, checkpoints]: the intervals speak of these checkpoints, not of others.
    """
    from backtest import scored
    out = {}
    with np.errstate(all="ignore"):
        for key in use[0]:
            x = np.array([float(row[key]) for row in use])
            linear = pearson(x, accuracy), pearson(x, drawn)
            ranked = pearson(places(x), places(accuracy)), pearson(places(x), places(drawn))
            out[key] = dict(pearson=scored(*linear, n_blocks), spearman=scored(*ranked, n_blocks))
    return out


def pearson(x, y):
    """Correlation of x [n] with each row of y [..., n]."""
    x = x - x[0]  # all alike: exactly 0, so that no rounding correlates
    x, y = x - x.mean(), y - y.mean(-1, keepdims=True)
    return (x * y).sum(-1) / np.sqrt((x * x).sum() * (y * y).sum(-1))


def places(v):
    """How many of a row are below each, equal ones counted half: [..., n]."""
    return ((v[..., None] > v[..., None, :]) + 0.5 * (v[..., None] == v[..., None, :])).sum(-1)


def plot_tokenizers(path, names, result):
    """Direction accuracy, with its interval, over each number of codes, on a log scale."""
    score = [{k: v and 100 * v for k, v in entry["da"].items()} for entry in result["checkpoints"]]
    values = [v for s in score for v in s.values() if v is not None]
    low, high = min(values) - 0.2, max(values) + 0.2
    parts, w, h = [label(10, 16, "right calls of direction, %, with 95 % intervals", css="t")], 250, 200
    for panel, (key, title) in enumerate(CODES):
        x = [math.log(max(entry["tokens"][key], 1e-9)) for entry in result["checkpoints"]]
        x0, left, wide = 50 + panel * (w + 50), min(x), max(max(x) - min(x), 1e-9)

        def X(v):
            return x0 + 10 + (v - left) / wide * (w - 20)

        scale = Panel(x0, 40, w, h, 1, low, high)
        parts += scale.grid(x0 - 5, "end")
        for name, v, s in zip(names, x, score):
            css = "dn" if "signs" in name else "up"
            if s["lo"] is not None:
                parts.append(line([(X(v), scale.y(s["lo"])), (X(v), scale.y(s["hi"]))], "p"))
            parts.append(f'<circle class="{css}" cx="{X(v):.1f}" cy="{scale.y(s["value"]):.1f}" r="4"><title>{name}</title></circle>')
        for v, anchor in ((min(x), "start"), (max(x), "end")):
            text = f"{math.exp(v):,.0f}" if v > math.log(10) else f"{math.exp(v):.3g}"
            parts.append(label(X(v), h + 58, text, anchor))
        parts.append(label(x0 + w / 2, h + 74, title + ", log scale", "middle"))
    parts.append(label(3 * (w + 50) + 40, 16, "green: nearest candle, red: signs alone", "end"))
    write_svg(path, 3 * (w + 50) + 50, h + 86, parts)


def closes_study(argv):
    """Right calls of the best rule on the reverting market, from its closes and from those that its tokens decode to."""
    parser = argparse.ArgumentParser(prog="study.py closes")
    parser.add_argument("--bars", type=int, default=32_000, help="of each of 8 symbols; the last fifth is scored")
    args = parser.parse_args(argv)
    series, best = data.synthetic(n_symbols=8, n_bars=args.bars, kind="reverting")
    phi, first = 0.5 ** (1 / 8), args.bars * 4 // 5
    k = KINDS["reverting"] * (1 - phi)
    x = [data.features(bars)[0] for bars in series]

    def right_calls(close):
        """Of calls by m_{t+1} = (phi + k) m_t - k r_t (see data.py), r from the close features [T] of each series."""
        hits = []
        for bars, own in zip(series, close):
            r = np.sinh(own.astype(np.float64)) * data.scales(bars)
            m = decayed_sum(-k * r, decay=phi + k)
            came = np.diff(np.log(bars.ohlcva[:, 3]))[first:]
            hits.append((m[first:-1] > 0) == (came > 0))
        return np.mean(hits)

    print(f"{'closes':32}{right_calls([own[:, 0] for own in x]):.2%}   at best {best:.2%}")
    for name, weight in (("decoded, all channels alike", 1.0), ("decoded, close counts more", TokenizerConfig.close)):
        tokenizer = train_tokenizer(np.concatenate([own[32:first] for own in x]), TokenizerConfig(close=weight))
        decoded = [tokenizer.decode(*tokenizer.encode(torch.from_numpy(own)))[:, 0].numpy() for own in x]
        print(f"{name:32}{right_calls(decoded):.2%}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Codes in use over the updates: a learned codebook beside the corners of the sphere

def codes_study(argv):
    """Trains VQ and BSQ of bench.py with equal networks and draws the share of coarse codes in use on val bars."""
    parser = argparse.ArgumentParser(prog="study.py codes")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="updates between two looks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", default=os.path.join(ROOT, "assets", "codes.svg"))
    args = parser.parse_args(argv)
    from bench import BSQ, VQ, train_quantized
    series = data.load(args.data)
    borders = data.split_borders(series, args.val_start, args.test_start)
    parts = {"train": [], "val": []}
    for bars in series:
        x = data.features(bars)[0]
        for split, rows in parts.items():
            rows.append(x[slice(*data.targets_of(bars, split, borders))])
    train, val = (torch.from_numpy(np.concatenate(rows)) for rows in parts.values())
    has = (train != 0).any(0)
    mean, std = train[:, has].mean(0), train[:, has].std(0)
    z, probe = (train[:, has] - mean) / std, (val[:, has] - mean) / std
    probe = probe[torch.randperm(len(probe), generator=torch.Generator().manual_seed(0))[:16384]]
    curves = {}
    for name, quantizer in (("VQ", VQ), ("BSQ", BSQ)):
        for seed in range(args.seeds):
            curves[name, seed] = curve = []

            @torch.no_grad()
            def look(step, model):
                if step % args.every == 0 or step == args.steps - 1:
                    _, tokens, _ = model(probe)
                    curve.append((step, len(torch.unique(tokens[0])) / 1024))

            train_quantized(quantizer, z, args.steps, seed, look=look)
            print(f"{name}, seed {seed}: {curve[-1][1]:.1%} of the codes in use on {len(probe):,} bars", flush=True)
    plot_codes(args.plot, curves, args.steps)


def plot_codes(path, curves, steps):
    """curves: {(name, seed): [(update, share of codes in use)]}, a line each."""
    x0, y0, w, h = 50, 40, 480, 220

    def at(step, share):
        return x0 + step / steps * w, y0 + (1 - share) * h

    parts = [label(x0, 20, "coarse codes in use on bars not trained on, % of 1,024", css="t")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(0, share)[1]
        parts += [grid_line(x0, x0 + w, y), label(x0 - 6, y + 4, f"{share:.0%}", "end")]
    for step in (0, steps // 2, steps):
        parts.append(label(at(step, 0)[0], y0 + h + 18, f"{step:,}", "middle"))
    parts.append(label(x0 + w / 2, y0 + h + 36, "updates", "middle"))
    for (name, seed), curve in curves.items():
        parts.append(line([at(*point) for point in curve], "m" if name == "BSQ" else "m2"))
        if seed == 0:
            text = "BSQ: corners of the sphere" if name == "BSQ" else "VQ: learned codes"
            parts.append(label(x0 + w + 8, at(*curve[-1])[1] + 4, text))
    write_svg(path, x0 + w + 170, y0 + h + 46, parts)


# ----------------------------------------------------------------------------------------------------------------------
# Later stages: what each, in each of its forms and orders, is worth beside as many plain next-token updates

PLAIN = ["--walk=0", "--kl=0"]  # of rollout.py: next-token training is left
ARMS = {    # name: (script, the arm it starts from, flags)
    "plain updates": ("rollout", "base", PLAIN),        # at the rates of rollout.py
    "plain updates, expo's rates": ("rollout", "base", [*PLAIN, "--lr=0.02", "--adam_lr=3e-3"]),
    "temperature on val": (None, "base", []),   # no training: logit P(up) times one number, with the best log loss on val
    "expo, set": ("expo", "base", []),
    "expo, set, lam 0.6": ("expo", "base", ["--lam=0.6"]),
    "expo, drawn": ("expo", "base", ["--pairs=drawn"]),
    "step, true": ("rollout", "base", []),
    "step, chosen": ("rollout", "base", ["--target=chosen"]),
    "path, true": ("rollout", "base", ["--select=path"]),
    "path, chosen": ("rollout", "base", ["--select=path", "--target=chosen"]),
    "one candidate": ("rollout", "base", ["--candidates=1", "--temperature=1"]),
    "64 candidates": ("rollout", "base", ["--candidates=64", "--temperature=1"]),
    "expo, then rollout": ("rollout", "expo, set", []),
    "rollout, then expo": ("expo", "step, true", []),
}
HORIZON = 10


def stages_study(argv):
    """Each arm from several seeds, paired with its base on the test bars; means over the seeds.

    On bars that are given, or on a planted market, where the best forecast is known: there the figure is the share of the
    room that the base left, in path CRPS (reverting) or in the log loss of P(up) (edge).
    """
    parser = argparse.ArgumentParser(prog="study.py stages")
    parser.add_argument("--data", nargs="+", help="files or folders of bars")
    parser.add_argument("--market", choices=("edge", "reverting"), help="a planted market, in place of --data")
    parser.add_argument("--half_life", type=int, default=8, help="of the reverting market, in bars")
    parser.add_argument("--bars", type=int, default=40_000, help="of each of the planted market's 4 symbols")
    parser.add_argument("--out", default="study_stages", help="folder of checkpoints, scores; what is there is not made again")
    parser.add_argument("--symbols", type=int, help="of --data, evenly chosen; none: all")
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=["plain updates", "step, true", "step, chosen", "path, true",
                                                      "path, chosen"], help=f"of {', '.join(ARMS)}".replace("%", "%%"))
    parser.add_argument("--steps", type=int, default=100, help="of the base model")
    parser.add_argument("--tok_steps", type=int, default=600)
    parser.add_argument("--stage_steps", type=int, default=100, help="of each later stage")
    parser.add_argument("--test_bars", type=int, default=24_000, help="about")
    parser.add_argument("--origins", type=int, default=1000)
    parser.add_argument("--paths", type=int, default=32)
    args = parser.parse_args(argv)
    if (args.data is None) == (args.market is None):
        parser.error("give --data or --market")
    os.makedirs(args.out, exist_ok=True)
    if args.market:
        args.data = [os.path.join(args.out, "market")]
        if not os.path.exists(os.path.join(args.data[0], "symbols.json")):
            market = data.synthetic(n_symbols=4, n_bars=args.bars, kind=args.market, half_life=args.half_life)[0]
            write_folder(market, args.data[0])
    elif args.symbols:
        series, args.data = data.load(args.data), [os.path.join(args.out, "market")]
        if not os.path.exists(os.path.join(args.data[0], "symbols.json")):
            keep = np.linspace(0, len(series) - 1, min(len(series), args.symbols)).round().astype(int)
            write_folder([series[k] for k in keep], args.data[0])
    stage.model_scores = remembering(stage.model_scores)
    scores, test, kept = {}, None, {}
    for seed in range(args.seeds):
        for arm in ("base", *args.arms):
            path = stage_arm(args, arm, seed)
            if test is None:
                test = StageTest(args, load_checkpoint(path)[2])
            # the last weights, before the choice on val: where nothing is better that takes the base, and all arms look alike
            own = arm != "base" and path != arm_file(args, "base", seed)
            scores[arm, seed] = test.scores(path, "last" if own else "best", tempered=ARMS.get(arm, " ")[0] is None)
            kept[arm] = kept.get(arm, 0) + (own and math.isfinite(load_checkpoint(path)[2]["best_val"]))
            print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        if args.market == "reverting":
            scores["best", seed] = test.scores(arm_file(args, "base", seed), "best", shifted=True)
    print_stages(args, scores, test.t, kept)


def arm_file(args, arm, seed, end=".pt"):
    return os.path.join(args.out, f"{arm.replace(', ', '-').replace(' ', '-').replace(chr(39), '')}_{seed}{end}")


def stage_arm(args, arm, seed):
    """Trains an arm, if that is not done: its checkpoint."""
    path, done = arm_file(args, arm, seed), arm_file(args, arm, seed, ".done")
    if os.path.exists(done):
        return path
    if arm != "base" and ARMS[arm][0] is None:
        return arm_file(args, ARMS[arm][1], seed)
    if arm == "base":
        script, flags = "pretrain", [f"--tok_steps={args.tok_steps}", f"--steps={args.steps}", *SMALL, "--n_layer=2",
                                     "--coarse_bits=8", "--fine_bits=8", "--block_size=128", "--batch_size=16"]
        flags += [f"--{name}={getattr(args, name)}" for name in ("val_start", "test_start") if getattr(args, name)]
        flags += ["--tokenizer", arm_file(args, "base", 0)] * bool(seed)  # one for all seeds: scores differ by the model
    else:
        script, start, flags = ARMS[arm]
        flags = [f"--steps={args.stage_steps}", f"--eval_every={args.stage_steps}", "--no-backtest", *flags,
                 "--ckpt", arm_file(args, start, seed)]
    flags = ["--resume"] if os.path.exists(path) else [*flags, f"--seed={seed}", "--data", *args.data]
    with open(arm_file(args, arm, seed, ".txt"), "a") as log, contextlib.redirect_stdout(log):
        dict(pretrain=pretrain, expo=expo, rollout=rollout)[script].main(["--out", path, *flags])
    open(done, "w").close()
    return path


def remembering(model_scores):
    """stage.model_scores that scores the same weights on the same targets once: each arm is checked beside one base."""
    known = {}

    def scores(model, tokenizer, t, *how):
        key = (weights_hash(model.state_dict()), hash(t.time.tobytes()), t.path_r.shape, how)
        if key not in known:
            known[key] = model_scores(model, tokenizer, t, *how)
        return known[key]

    return scores


def scaled(p, factor):
    """p with its logit times a factor."""
    return 1 / (1 + (1 / p - 1) ** factor)


class StageTest:
    """The test bars t and, on the reverting market, the true expected log returns since each origin, [n, HORIZON]."""

    def __init__(self, args, meta):
        self.args = args
        series = data.load(args.data)
        self.t = stage_scores.some_targets(series, "test", meta["splits"], HORIZON, args.origins, 0, args.test_bars)
        self.val = stage_scores.some_targets(series, "val", meta["splits"], most=args.test_bars)
        if args.market == "reverting":
            true = [reverting_path(bars, HORIZON, args.half_life)[o] for bars, o in zip(self.t.series, self.t.origins)]
            self.true = np.concatenate(true)

    def scores(self, path, weights, shifted=False, tempered=False):
        """Scores of the next bar, of paths and of the median-token path, kept in a file. shifted: the model's paths moved so that their means are the true ones.

        tempered: logit P(up) times the number that has the best log loss on val.
        """
        kept = path.removesuffix(".pt") + "-shifted" * shifted + "-tempered" * tempered + ".scores.pt"
        if not os.path.exists(kept):
            model, tokenizer, _ = load_checkpoint(path, weights=weights)
            one = backtest.next_bars(model, tokenizer, self.t, backtest.VAL_PROBES)
            if tempered:
                factor = self.best_factor(backtest.next_bars(model, tokenizer, self.val)["p_up"])
                one["p_up"] = scaled(one["p_up"], factor)
            judge = backtest.score_paths
            backtest.score_paths = functools.partial(self.judge, judge, shifted)
            try:
                many = backtest.simulated(model, tokenizer, self.t, self.args.paths)
            finally:
                backtest.score_paths = judge
            sums, volatility = time_block_sums(one | many, self.t), many["path_volatility"]
            sums["path_volatility"] = sums_of(volatility, self.t.path_time_block, self.t.n_path_blocks)
            median = time_block_sums(stage_scores.median_paths(model, tokenizer, self.t), self.t)
            sums["path_median_mape"] = median["path_mape"]
            drawn = bootstrap(sums, self.t)
            save_atomic({k: (torch.as_tensor(v), torch.as_tensor(r)) for k, (v, r) in drawn.items()}, kept)
        return {k: (v.numpy(), r.numpy()) for k, (v, r) in load_safe(kept).items()}

    def best_factor(self, p_up):
        """The factor of logit P(up) with the least log loss on val, of bars that moved."""
        moved, up = self.val.r != 0, self.val.r > 0

        def log_loss(factor):
            p = scaled(p_up, factor)
            return -np.log(np.where(up, p, 1 - p))[moved].mean()

        return min(np.exp(np.linspace(-3, 2, 101)), key=log_loss)

    def judge(self, judge, shifted, moves, t, rows):
        """backtest.score_paths, and the volatility of the paths: their mean root of summed squares, [n].

        On the reverting market the CRPS is also of the outcome's mirror image about the true mean: it is
        equally likely there, and the mean of both varies far less.
        """
        volatility = dict(path_volatility=np.sqrt((moves**2).sum(-1)).mean(1))
        if self.args.market != "reverting":
            return judge(moves, t, rows) | volatility
        if shifted:
            moves = moves + (np.diff(self.true[rows], prepend=0.0) - moves.mean(1))[:, None]
        mirrored = copy.copy(t)
        mirrored.path_r = 2 * self.true - t.path_r
        came, image = judge(moves, t, rows), judge(moves, mirrored, rows)
        return came | volatility | dict(path_crps=(came["path_crps"] + image["path_crps"]) / 2)


def print_stages(args, scores, t, kept):
    """A row for each arm: its scores less those of its base or, of errors, their change in %."""
    print(f"test {data.iso(t.time.min())} to {data.iso(t.time.max())}, {len(t.r):,} bars, {t.n_blocks} blocks; "
          f"{len(t.path_r):,} origins, {t.blocks_of('path')} blocks; {args.seeds} seeds; kept: runs whose weights were kept on val, all scores are of the last ones")

    def over_seeds(metric, of_seed, scale, digits):
        """The mean over seeds of of_seed(seed) -> (value, replicates), as text."""
        values, replicates = zip(*(of_seed(seed) for seed in range(args.seeds)))
        return backtest.show(scored(sum(values) / args.seeds, sum(replicates) / args.seeds, t.blocks_of(metric)),
                             scale, digits, "+")

    def change(arm, metric, seed):
        (a, a_drawn), (b, b_drawn) = (at_step(scores[name, seed], metric, None) for name in (arm, "base"))
        if metric in (*RATIOS, "path_median_mape", "path_volatility"):
            return a / b - 1, a_drawn / b_drawn - 1
        return a - b, a_drawn - b_drawn

    def share(arm, metric, seed):
        """Of the room between the base and the best."""
        (a, a_drawn), (b, b_drawn) = (at_step(scores[name, seed], metric, None) for name in (arm, "base"))
        if args.market == "edge":
            p = best_accuracy()
            best = best_drawn = -p * math.log(p) - (1 - p) * math.log(1 - p)
        else:
            best, best_drawn = at_step(scores["best", seed], metric, None)
        return (b - a) / (b - best), (b_drawn - a_drawn) / (b_drawn - best_drawn)

    columns = [("da", "right calls, points", 100, 2), ("logloss", "log loss x 1000", 1000, 2), ("ece", "calibration, points", 100, 2),
               ("crps", "CRPS, %", 100, 2), ("range_crps", "range CRPS, %", 100, 2), ("volume_crps", "volume CRPS, %", 100, 2),
               ("path_crps", "path CRPS, %", 100, 2), ("path_mape", "path MAPE, median of paths, %", 100, 2),
               ("path_median_mape", "path MAPE, median token, %", 100, 2), ("path_coverage90", "in 90 % band, points", 100, 1),
               ("path_volatility", "path volatility, %", 100, 1)]
    columns = [column for column in columns if column[0] in scores["base", 0]]
    room = {"edge": "logloss", "reverting": "path_crps"}.get(args.market)
    heads = ["", "kept", *(label for _, label, *_ in columns)] + ["share of the room, %"] * bool(room)
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for arm in args.arms:
        cells = [arm, str(kept[arm])]
        for metric, _, scale, digits in columns:
            cells.append(over_seeds(metric, lambda seed: change(arm, metric, seed), scale, digits))
        if room:
            cells.append(over_seeds(room, lambda seed: share(arm, room, seed), 100, 1))
        print("| " + " | ".join(cells) + " |", flush=True)
    for metric, label, scale, digits in columns:
        if metric in (*RATIOS, "path_median_mape"):
            scale, digits = 1, 4    # of log returns x 100 and %
        elif metric == "path_volatility":
            digits = 3
        each = [float(at_step(scores["base", seed], metric, None)[0]) * scale for seed in range(args.seeds)]
        print(f"base, {label.rpartition(',')[0] or label}: " + ", ".join(f"{v:.{digits}f}" for v in each))
    print(f"what came: path volatility {100 * t.path_rv.mean():.3f}; standing still: "
          f"path MAPE {100 * np.abs(np.expm1(-t.path_r)).mean():.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# The null market: no model can call it, so no interval may often say that one did

def null_study(argv):
    """Small models trained on null markets, each from a seed of its own, and then post-trained for direction.

    Does the interval of their right calls on test hold one half? And that of rules, on many more such markets?
    """
    parser = argparse.ArgumentParser(prog="study.py null")
    parser.add_argument("--out", default="study_null", help="folder of markets and checkpoints; what is there is not made again")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="of the model; expo.py takes 2 for each 5 of them")
    parser.add_argument("--markets", type=int, default=1000, help="for the rules")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    null_rules(args.markets)
    held, harmed = {"pretrain": 0, "expo": 0}, 0
    for seed in range(args.seeds):
        market, base, tuned = (os.path.join(args.out, f"{seed}{end}") for end in ("", ".pt", "-expo.pt"))
        if not os.path.exists(os.path.join(market, "symbols.json")):
            write_folder(null_market(seed), market)
        sizes = ["--tok_steps=200", "--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=64"]
        for script, path, flags in (("pretrain.py", base, ["--data", market, f"--steps={args.steps}", *sizes]),
                                    ("expo.py", tuned, ["--ckpt", base, f"--steps={args.steps * 2 // 5}", "--no-backtest"])):
            if not os.path.exists(path):
                command = [sys.executable, os.path.join(ROOT, script), *flags, f"--seed={seed}", "--out", path]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = backtest.backtest([base, tuned], data.load([market]), horizon=1, paths=2, stride=10**9)
        pair = {p["metric"]: p["difference"] for p in result["paired"] if (p["a"], p["b"]) == (base, tuned)}
        line = f"seed {seed:>2}"
        for name, entry in zip(held, result["checkpoints"]):
            da = entry["da"]
            held[name] += da["lo"] <= 0.5 <= da["hi"]
            line += f"   {name}: right calls {backtest.show(da, 100, 2)} {'' if da['lo'] <= 0.5 <= da['hi'] else 'NOT one half'}"
        worse = [m for m in ("logloss", "ece") if pair[m]["hi"] < 0]       # pretrain less expo: wholly below 0 says that expo did harm
        harmed += bool(worse)
        print(line + (f"   expo worse in {', '.join(worse)}" if worse else ""), flush=True)
    print(f"markets on which expo's log loss or calibration is worse, interval clear of 0: {harmed}")
    print(f"intervals that hold one half, of {args.seeds}: " + ", ".join(f"{name} {n}" for name, n in held.items()))


def null_market(seed):
    return data.synthetic(seed=seed, signal=0.0, n_symbols=4, n_bars=8000)[0]


def null_rules(n_markets, lengths=(1, 4, 16, 64, 256)):
    """Prints how often the interval holds one half for rules that call the sign of the last moves' sum."""
    held = dict.fromkeys(lengths, 0)
    for seed in range(1000, 1000 + n_markets):
        series = null_market(seed)
        t = backtest.Targets(series, data.split_borders(series)[1], 2**62, horizon=1, stride=10**9, seed=0)
        closes = [np.log(bars.ohlcva[:, 3]) for bars in series]
        for n in lengths:
            rise = t.flat([np.append(np.nan, (c - np.roll(c, n))[:-1]) for c in closes])
            calls = direction_sums(np.where(rise > 0, 0.6, 0.4), t)
            da = scored(*bootstrap(dict(da=calls["da"]), t)["da"], t.n_blocks)
            held[n] += da["lo"] <= 0.5 <= da["hi"]
    shares = ", ".join(f"{n} {k / n_markets:.1%}" for n, k in held.items())
    print(f"intervals of the last moves' sign that hold one half, {n_markets:,} markets, by the number of moves: {shares}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The leak: what scaling over a whole window tells of its last bar

def leak_demo(seed=0, n_windows=4000):
    """Calls the last bar of windows of a random walk by one rule: minus the sum of the values before it.

    Over a whole window z-scores add up to zero, so those before the last bar tell it; causal features tell nothing.
    Returns rows (what the values are, window, share of variance kept, share of right calls, half its 95 % interval).
    """
    found = []
    for window, step in ((1024, 0.0), (1024, 0.6), (101, 0.0), (101, 0.92)):
        rng = np.random.default_rng([seed, window])
        r = 0.01 * rng.standard_t(4, (n_windows, window))
        close = 100 * np.exp(np.cumsum(r, axis=1))  # each window a walk of its own
        before = np.append(np.full((n_windows, 1), 100.0), close[:, :-1], axis=1)
        no_data = np.full(r.shape, np.nan)
        bars = np.stack([before, np.maximum(before, close), np.minimum(before, close), close, no_data, no_data], -1)
        causal = np.stack([data.features(data.Bars("WALK", np.arange(window), b))[0][:, 0] for b in bars])
        whole = (r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True)
        for name, x in (("z-scores over the whole window", whole), ("causal features", causal.astype(np.float64))):
            unit = x / x.std()
            token = np.round(unit / step) * step if step else unit  # rounded as a tokenizer rounds
            kept = 1 - (token - unit).var()
            guess, moved = -token[:, :-1].sum(1), r[:, -1] != 0
            share = np.mean((guess > 0) == (r[:, -1] > 0), where=moved)
            found.append((name, window, kept, share, 1.96 * np.sqrt(share * (1 - share) / moved.sum())))
    return found


def leak_study(argv):
    """A table of leak_demo."""
    parser = argparse.ArgumentParser(prog="study.py leak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print("random walks with fat tails, whose next move no one can call; the rule: minus the sum of the values so far")
    print(f"{'values':32}{'window':>8}{'variance kept':>15}{'right calls':>16}")
    for name, window, kept, share, half in leak_demo(args.seed):
        print(f"{name:32}{window:>8,}{kept:>15.1%}{share:>9.1%} ±{half:>5.1%}")


# ----------------------------------------------------------------------------------------------------------------------
# Weights that come along, on bars that they have not seen

# score, opponent, label
HEADLINES = (("crps", "har", "close"), ("range_crps", "har", "range"), ("volume_crps", "har", "volume"),
             ("path_crps", "har", "close, bar 10"), ("crps", "fhs", "close to FHS"))


TAIL = {"90 % band, bar 1": ".1%", "bar 10": ".1%", "log loss": ".4f"}     # columns behind the ratios


def still_markets(bars):
    """Yield (name, Bars) of markets that stay: hours of `bars` forward-filled, a pegged rate, a penny stock."""
    random, n = np.random.default_rng(0), len(bars)
    for share in (0.3, 0.6, 0.8):
        ohlcva = bars.ohlcva.copy()
        for i in np.flatnonzero(random.random(n) < share)[1:]:
            ohlcva[i, :4] = ohlcva[i - 1, 3]
        yield f"{share:.0%} of {bars.symbol} repeated", data.Bars("FILLED", bars.time, ohlcva)
    peg = 3.75 + 1e-4 * random.choice([-1, 0, 1], n, p=[0.05, 0.9, 0.05])
    penny = np.maximum(np.round(0.10 * np.exp(0.03 * random.standard_normal(n).cumsum()) / 0.005), 1) * 0.005
    for name, close in (("pegged rate", peg), ("penny stock", penny)):
        open_ = np.append(close[0], close[:-1])
        volume = np.round(np.exp(random.normal(8, 1, n)))
        high, low = np.maximum(open_, close), np.minimum(open_, close)
        yield name, data.Bars(name, bars.time, np.stack([open_, high, low, close, volume, volume * close], 1))


@torch.no_grad()
def unmoved_study(argv):
    """P(up) on the last bars of markets that stay and of files: what share of bars was said not to move and did not, and the
    log loss of P(up | moved), as it comes and calibrated on the bars before."""
    args = of_files("unmoved").parse_args(argv)
    model, tokenizer, _ = load_checkpoint(args.ckpt[0])
    bands, files = Bands(model, tokenizer), {}
    for path in args.data:
        series = sorted(data.load(path), key=len)
        files[os.path.basename(path).partition(".")[0]] = [bars[-args.bars:] for bars in series[-args.symbols:]]
    still = {name: [bars] for name, bars in still_markets(next(iter(files.values()))[-1])}
    print_row("market", "bars", "said, %", "came, %", "log loss as it comes", "calibrated", "right, %", "calibrated", "trust")
    print_row(*["---"] * 9)
    for name, series in (still | files).items():
        stamps = np.unique(np.concatenate([bars.time for bars in series]))
        start = stamps[int((1 - args.share) * len(stamps))]
        earlier = [bars[:np.searchsorted(bars.time, start)] for bars in series]
        trust, rows = sample.calibrate(model, tokenizer, [bars for bars in earlier if len(bars)]), []
        for past in read_pasts(model, tokenizer, series, since=start):
            said = torch.from_numpy(sample.unmoved_share(past.bars, model.config.unmoved)[past.first:-1])
            p_up = []
            for own in (sample.Calibration(), trust):
                law = own.law(model, past.h)
                stay, _ = bands.staying(law, trust.table, said)
                p_up.append(own.trusted(law, stay, model.up_mask)[1].numpy())
            rows.append(np.stack([said.numpy(), np.diff(past.bars.ohlcva[past.first - 1:, 3]), *p_up]))
        said, change, *p_up = np.concatenate(rows, 1)
        moved, rose = change != 0, change > 0
        loss = [-np.log(np.where(rose, p, 1 - p))[moved].mean() for p in p_up]
        right = [((p > 0.5) == rose)[moved].mean() for p in p_up]
        print_row(name, f"{len(said):,}", f"{said.mean():.1%}", f"{1 - moved.mean():.1%}", *(f"{v:.4f}" for v in loss),
                  *(f"{v:.1%}" for v in right), f"{trust.k:.2f}")


def print_heads():
    print("CRPS as a ratio to HAR's, of the close also to that of FHS; 95 % intervals\n")
    print_row("market", "weights", *(head for _, _, head in HEADLINES), *TAIL)
    print_row(*["---"] * (2 + len(HEADLINES) + len(TAIL)))


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def print_to_opponents(label, arm, ckpts, result):
    """A row: CRPS as ratios to an opponent's, the mean of checkpoints that differ by their seed. Returns the values."""
    drawn, t, cells, values = result["replicates"], result["targets"], [label, arm], []
    for metric, rival, _ in HEADLINES:
        if metric in drawn[rival] and all(metric in drawn[ckpt] for ckpt in ckpts):
            theirs = at_step(drawn[rival], metric, -1)
            ours = [at_step(drawn[ckpt], metric, -1) for ckpt in ckpts]
            mean = tuple(sum(parts) / len(ckpts) for parts in zip(*ours))
            score = versus(mean, theirs, t.blocks_of(metric), as_ratio=True)
            cells.append(backtest.show(score, 1, 4))
            values.append(score["value"])
        else:
            cells.append(".")
            values.append(math.nan)
    entries = [entry for entry in result["checkpoints"] if entry["ckpt"] in ckpts]
    values += [statistics.mean(entry["coverage90"]["value"] for entry in entries),
               statistics.mean(entry["path_coverage90"][-1]["value"] for entry in entries),
               statistics.mean(entry["logloss"]["value"] for entry in entries)]
    print_row(*cells, *map(format, values[-3:], TAIL.values()))
    return values


def print_means(rows):
    """rows: {arm: values of each file}."""
    for arm, values in rows.items():
        columns = [[v for v in column if math.isfinite(v)] for column in zip(*values)]
        for name, f in (("mean", statistics.mean), ("largest", max)):
            forms = [".4f"] * (len(columns) - len(TAIL)) + list(TAIL.values())
            cells = [format(f(column), form) if column else "." for column, form in zip(columns, forms)]
            print_row(f"{name} of {len(values)} files", arm, *cells)


def of_files(prog):
    """A parser of which of the last bars of which files are targets."""
    parser = argparse.ArgumentParser(prog=f"study.py {prog}")
    parser.add_argument("--data", nargs="+", required=True, help="CSV files, a market each")
    parser.add_argument("--ckpt", nargs="+", default=[os.path.join(ROOT, "assets", "base.pt")])
    parser.add_argument("--share", type=float, default=0.3, help="of a file's time stamps, the last ones, that are targets")
    parser.add_argument("--bars", type=int, default=5000, help="of a symbol, of whose last share the targets are")
    parser.add_argument("--symbols", type=int, default=8, help="at most, evenly chosen")
    parser.add_argument("--without", nargs="*", default=[], help="symbols to leave out, as those that were trained on")
    parser.add_argument("--origins", type=int, default=25, help="of paths, a symbol")
    parser.add_argument("--paths", type=int, default=64)
    return parser


def markets_of(args):
    """Yield (market, series, first target, bars between two origins) of each file.

    Symbols of a file may end years apart. Targets are on dates that most of them share: those up to the day that three
    quarters of the symbols reach. What came before the first target is whole, for the opponents to be fitted on.
    """
    for path in args.data:
        market = os.path.basename(path).partition(".")[0]
        series = [bars for bars in data.load(path) if bars.symbol.partition("@")[0] not in args.without]
        end = int(np.quantile([bars.time[-1] for bars in series], 0.25, method="lower"))
        series = [bars[:np.searchsorted(bars.time, end, side="right")] for bars in series if bars.time[-1] >= end]
        stamps = np.unique(np.concatenate([bars.time[-args.bars:] for bars in series]))
        start = int(stamps[int((1 - args.share) * len(stamps))])
        series = [bars for bars in series if np.searchsorted(bars.time, start) >= 500]
        if not series:
            print(f"{market}: no symbol of 500 bars before the first target")
            continue
        series = sorted(series, key=lambda bars: bars.symbol)
        keep = np.linspace(0, len(series) - 1, min(len(series), args.symbols)).round().astype(int)
        series = [series[k] for k in keep]
        n_before = [int(np.searchsorted(bars.time, start)) for bars in series]
        names = ", ".join(f"{bars.symbol.partition('@')[0]} ({n:,})" for bars, n in zip(series, n_before))
        print(f"{market}: {names} bars before the first target, {data.iso(start)}", file=sys.stderr, flush=True)
        yield market, series, start, max(1, int(args.share * len(stamps)) // args.origins)


def base_study(argv):
    """One row a file: CRPS of checkpoints on its last bars beside HAR and FHS, which are fitted on the bars before."""
    parser = of_files("base")
    parser.add_argument("--raw", action="store_true", help="not calibrated: the weights as they come")
    args = parser.parse_args(argv)
    print_heads()
    rows = {ckpt: [] for ckpt in args.ckpt}
    for market, series, start, stride in markets_of(args):
        start = str(np.datetime64(start, "s"))
        result = backtest.backtest(args.ckpt, series, start=start, horizon=10, paths=args.paths, stride=stride, calibrate=not args.raw)
        for ckpt in args.ckpt:
            rows[ckpt].append(print_to_opponents(market, os.path.basename(ckpt), [ckpt], result))
    print_means({os.path.basename(ckpt): values for ckpt, values in rows.items()})


def parallel_study(argv):
    """One row a file: path CRPS of the reasoner's forecast, as a ratio to that bar by bar, and its processor time."""
    args = of_files("parallel").parse_args(argv)
    model, tokenizer, _ = load_checkpoint(args.ckpt[0])
    steps = (0, 3, 7, 15, None)
    print_row("market", "origins", *("mean" if k is None else f"bar {k + 1}" for k in steps), "time")
    print_row(*["---"] * (3 + len(steps)))
    for market, series, start, stride in markets_of(args):
        t = backtest.Targets(series, start, 2**62, 16, stride, 0)
        drawn, took = {}, {}
        for parallel in (False, True):
            began = time.process_time()
            paths = backtest.simulated(model, tokenizer, t, args.paths, parallel)
            took[parallel] = time.process_time() - began
            drawn[parallel] = bootstrap(time_block_sums(paths, t), t)
        ratios = [against(drawn[True], drawn[False], "path_crps", t, k) for k in steps]
        cells = [backtest.show(ratio, 1, 4) for ratio in ratios]
        print_row(market, f"{len(t.path_r):,}", *cells, f"x {took[True] / took[False]:.2f}")


def train_once(bars, ckpt, *flags):
    """Runs pretrain.py on a file or folder, or goes on with a run that was broken off."""
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", bars, "--out", ckpt, *flags]
    subprocess.run(command + ["--resume"] * os.path.exists(ckpt), check=True, stdout=subprocess.DEVNULL)


def few_study(argv):
    """One row a file: its middle symbol's last bars, alone; from scratch with all defaults, and with weights that come along."""
    parser = argparse.ArgumentParser(prog="study.py few")
    parser.add_argument("--data", nargs="+", required=True, help="CSV files")
    parser.add_argument("--out", default="study_few", help="folder of bars and checkpoints; what is there is not made again")
    parser.add_argument("--bars", type=int, default=4000)
    parser.add_argument("--base", help="also fine-tune these weights, and score them as they are")
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="also train by these rows of pretrain.BUDGETS")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    arms = {"scratch": []} | ({"tuned": ["--init_from", args.base, "--overlap"]} if args.base else {})
    arms |= {f"row {row}": row_flags(row) for row in args.rows}
    rows = {arm: [] for arm in (*arms, *["as it is"] * bool(args.base))}
    print_heads()
    for path in args.data:
        stem = os.path.join(args.out, os.path.basename(path).partition(".")[0])
        if not os.path.exists(os.path.join(stem, "symbols.json")):
            series = sorted(data.load(path), key=lambda bars: bars.symbol)
            long = [bars for bars in series if len(bars) >= min(2000, max(map(len, series)))]
            write_folder([long[len(long) // 2][-args.bars:]], stem)
        ckpts = {"as it is": [args.base]} if args.base else {}
        for arm, flags in arms.items():
            ckpts[arm] = [f"{stem}-{arm}-{seed}.pt" for seed in range(args.seeds)]
            for seed, ckpt in enumerate(ckpts[arm]):
                train_once(stem, ckpt, f"--seed={seed}", *flags)
        series = data.load(stem)
        start = data.iso(data.split_borders(series)[1])
        result = backtest.backtest(sum(ckpts.values(), []), series, start=start, horizon=10, paths=100, stride=4)
        for arm in rows:
            label = f"{os.path.basename(stem)}, {len(series[0]):,}"
            rows[arm].append(print_to_opponents(label, arm, ckpts[arm], result))
    print_means(rows)


def volume_market(seed=0, n_bars=12_000, edge=0.6):
    """Hourly bars of a market whose close goes on where volume is high and turns where it is low, with probability `edge`."""
    random = np.random.default_rng(seed)
    slow = decayed_sum(random.normal(0, 0.05, n_bars), decay=0.98)
    surprise = random.normal(0, 0.5, n_bars)
    goes_on = (random.random(n_bars) < edge) == (surprise > 0)          # of the next bar
    sign = np.cumprod(np.append(1, np.where(goes_on, 1, -1))[:-1])
    move = sign * np.abs(random.standard_normal(n_bars))
    steps = random.standard_normal((n_bars, 12)) / np.sqrt(12)
    steps += (move - steps.sum(1))[:, None] / 12                        # they add up to the move
    path = np.log(50) + (3e-3 * np.exp(slow)[:, None] * steps).cumsum().reshape(n_bars, 12)
    open_ = np.append(path[0, 0], path[:-1, -1])
    high, low = np.maximum(open_, path.max(1)), np.minimum(open_, path.min(1))
    volume = np.exp(9 + 0.7 * slow + surprise).round()
    price = np.exp(np.stack([open_, high, low, path[:, -1]], axis=1))
    time = 1_600_000_000 // 3600 * 3600 + 3600 * np.arange(n_bars)
    return data.Bars(f"VOLUME{seed}", time, np.column_stack([price, volume, volume * price[:, 1:].mean(1)]))


def rule_by_features(series):
    """Share of right calls on the test bars of volume_markets by the rule that made them: on where the feature volume is
    above 0, else back."""
    test_start, right = data.split_borders(series)[1], []
    for bars in series:
        close, volume = data.features(bars)[0][:-1, [0, 4]].T               # of the bar before each target
        rose = np.diff(bars.ohlcva[:, 3]) > 0
        right.append(((close * volume > 0) == rose)[bars.time[1:] >= test_start])
    return np.concatenate(right).mean()


def planted_study(argv):
    """One row an arm: right calls, %, on the test bars of eight volume_markets, of models from scratch and tuned from the base.

    Who knows how much of the last volume was a surprise calls 60 % right; the first row is of who knows the rule, but reads
    the surprise off the features, as a model must.
    """
    parser = argparse.ArgumentParser(prog="study.py planted")
    parser.add_argument("--base", default=os.path.join(ROOT, "assets", "base.pt"), help="to tune")
    parser.add_argument("--out", default="study_planted", help="folder of bars and checkpoints; what is there is not made again")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    folder = os.path.join(args.out, "bars")
    if not os.path.exists(os.path.join(folder, "symbols.json")):
        os.makedirs(args.out, exist_ok=True)
        write_folder(map(volume_market, range(8)), folder)
    arms, series = {"from scratch": [], "tuned": ["--init_from", args.base, "--overlap"]}, data.load(folder)
    print_row("weights", *(f"seed {seed}" for seed in range(args.seeds)), "log loss of P(up), mean")
    print_row(*["---"] * (args.seeds + 2))
    print_row("the rule, by features", *[f"{rule_by_features(series):.1%}"] * args.seeds, ".")
    for arm, flags in arms.items():
        ckpts = [os.path.join(args.out, f"{arm.replace(' ', '-')}-{seed}.pt") for seed in range(args.seeds)]
        for seed, ckpt in enumerate(ckpts):
            train_once(folder, ckpt, f"--seed={seed}", *flags)
        result = backtest.backtest(ckpts, series, horizon=1, paths=2, stride=1000)
        entries = result["checkpoints"]
        cells = [backtest.show(entry["da"], 100, 1) for entry in entries]
        print_row(arm, *cells, f"{statistics.mean(entry['logloss']['value'] for entry in entries):.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Hours in the scale, or not

@contextlib.contextmanager
def levels_of_the_clock(levels):
    """Features whose scale knows the hours of day and week (2) or nothing of the clock (0). HAR has its own."""
    known = data.slots_of
    data.slots_of = functools.partial(known, levels=levels)
    try:
        yield
    finally:
        data.slots_of = known


def lunch_market(seed=0, n_days=250, bars_a_day=48):
    """Five-minute bars of an exchange whose open and close are five times as wide as its lunch; no direction."""
    random, n = np.random.default_rng(seed), n_days * bars_a_day
    day, k = np.divmod(np.arange(n), bars_a_day)
    hour = np.log(5) * (2 * k / (bars_a_day - 1) - 1) ** 2
    slow = decayed_sum(random.normal(0, 0.06, n), decay=0.98) + decayed_sum(random.normal(0, 0.1, n), decay=0.95)
    steps = np.exp(slow + hour)[:, None] * random.standard_normal((n, 12)) * 2e-4
    path = np.log(50) + steps.cumsum().reshape(n, 12)
    open_ = np.append(path[0, 0], path[:-1, -1])
    high, low = np.maximum(open_, path.max(1)), np.minimum(open_, path.min(1))
    volume = np.exp(9 + 0.7 * slow + 0.8 * hour + random.normal(0, 0.4, n)).round()
    price = np.exp(np.stack([open_, high, low, path[:, -1]], axis=1))
    time = 1578268800 + (day // 5 * 7 + day % 5) * DAY + 5400 + k * 300
    return data.Bars(f"LUNCH{seed}", time, np.column_stack([price, volume, volume * price[:, 1:].mean(1)]))


CLOCK_ARMS = {"hours in the scale": (2, "default"), "without": (0, "default")}      # levels of slots, one of VARIANTS


def trained_variant(args, arm, seed):
    """(model, tokenizer, meta) of an arm, trained on args.train as far as that was not done."""
    path, (_, name) = variant_file(args, arm, seed), CLOCK_ARMS.get(arm, (2, arm))
    train_variant(name, path, ["--data", *args.train, f"--seed={seed}", *args.flags])
    model, tokenizer, meta = load_checkpoint(path)
    variant = VARIANTS[name][0](model.config).eval()
    variant.load_state_dict(model.state_dict())
    return variant, tokenizer, meta


def clock_study(argv):
    """One row a file and arm: CRPS beside HAR of models trained on --train with and without hours in the scale, or of
    VARIANTS with them.

    In place of a file, `lunch` is a market of its own making.
    """
    parser = of_files("clock")
    parser.add_argument("--arms", nargs="+", default=list(CLOCK_ARMS), choices=[*CLOCK_ARMS, *VARIANTS])
    parser.add_argument("--train", nargs="+", required=True, help="CSV files to train on")
    parser.add_argument("--out", default="study_clock", help="folder of bars and checkpoints; what is there is not made again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", nargs="+", action="extend", default=[], help="of pretrain.py, as --flags=--steps=600")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    lunch = os.path.join(args.out, "lunch")
    if "lunch" in args.data and not os.path.exists(os.path.join(lunch, "symbols.json")):
        write_folder(map(lunch_market, range(4)), lunch)
    args.data = [lunch if path == "lunch" else path for path in args.data]
    levels, ckpts = {arm: CLOCK_ARMS.get(arm, (2, arm))[0] for arm in args.arms}, {}
    for arm in args.arms:
        with levels_of_the_clock(levels[arm]):
            ckpts[arm] = [trained_variant(args, arm, seed) for seed in range(args.seeds)]
    names = [f"checkpoint {i + 1}" for i in range(args.seeds)]
    print_heads()
    rows = {arm: [] for arm in args.arms}
    for market, series, start, stride in markets_of(args):
        for arm in args.arms:
            with levels_of_the_clock(levels[arm]):
                result = backtest.backtest(ckpts[arm], series, start=data.iso(start), paths=args.paths, stride=stride)
            rows[arm].append(print_to_opponents(market, arm, names, result))
    print_means(rows)


def row_flags(row):
    return [f"--{name}={value}" for name, value in pretrain.BUDGETS[row][1].items()]


def budgets_study(argv):
    """Rows of pretrain.BUDGETS on half-years of daily bars, each from scratch: three years to train on, then half a year of
    val, then the one that is scored. One line a row and half-year, with the bars as pretrain.budget counts them.
    """
    parser = argparse.ArgumentParser(prog="study.py budgets")
    parser.add_argument("--data", nargs="+", required=True, help="CSV files of daily bars")
    parser.add_argument("--out", default="study_budgets", help="folder of bars and checkpoints; what is there is not made again")
    parser.add_argument("--tests", nargs="+", default=["2009-07", "2010-07", "2011-07", "2013-01", "2014-07", "2015-07", "2016-07"],
                        help="months in which a half-year to score begins")
    parser.add_argument("--rows", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--every", type=int, default=1, help="of the symbols only each so many-th")
    args = parser.parse_args(argv)
    series = data.load(args.data)
    print_heads()
    found = {f"row {row}": [] for row in args.rows}
    for test in args.tests:
        dates = [np.datetime64(test, "M") + months for months in (-42, -6, 0, 6)]
        begin, val, start, end = (int(date.astype("datetime64[s]").astype(int)) for date in dates)
        cut = [bars[slice(*np.searchsorted(bars.time, (begin, end)))] for bars in series]
        cut = [bars for bars in cut if len(bars) > 600][::args.every]
        folder = os.path.join(args.out, f"{test}-{args.every}")
        if not os.path.exists(os.path.join(folder, "symbols.json")):
            write_folder(cut, folder)
        stamps = [bars.time[slice(*data.targets_of(bars, "train", (val, start)))] for bars in cut]
        count = math.sqrt(sum(map(len, stamps)) * len(np.unique(np.concatenate(stamps))))
        ckpts = [f"{folder}-{row}.pt" for row in args.rows]
        for row, ckpt in zip(args.rows, ckpts):
            train_once(folder, ckpt, *row_flags(row), f"--val_start={dates[1]}-01", f"--test_start={dates[2]}-01")
        result = backtest.backtest(ckpts, cut, horizon=10, paths=20, stride=60)
        for arm, ckpt in zip(found, ckpts):
            found[arm].append(print_to_opponents(f"{test}, {count:,.0f}", arm, [ckpt], result))
    print_means(found)


# ----------------------------------------------------------------------------------------------------------------------
# How much of the error ten bars ahead is left to whoever knows the volatility to come

def room_study(argv):
    """CRPS of HAR's paths at bar 10, their width put right in hindsight, as a ratio to that of HAR as it is."""
    parser = argparse.ArgumentParser(prog="study.py room")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--origins", type=int, default=3000, help="about")
    parser.add_argument("--paths", type=int, default=100)
    args = parser.parse_args(argv)
    series = data.load(args.data)
    borders = data.split_borders(series, args.val_start, args.test_start)
    t = stage_scores.some_targets(series, args.split, borders, HORIZON, args.origins)
    random = np.random.default_rng(0)
    moves = [volatility_paths(har, at, random.integers(RESIDUALS, size=(len(at), args.paths, HORIZON)))
             for har, at in zip(t.volatility, t.origins)]
    r, came = np.concatenate(moves).sum(-1), t.path_r[:, -1]            # [n, paths], [n]
    factors = np.exp(np.linspace(-0.7, 0.7, 29))
    crps = np.stack([score_draws(f * r, came)["crps"] for f in factors])       # [factors, n]
    as_it_is = crps[len(factors) // 2].mean()
    width = r.std(1)
    groups = {"one factor for all": np.zeros(len(r)),
              "one for each fifth of their width": np.searchsorted(np.quantile(width, (0.2, 0.4, 0.6, 0.8)), width),
              "one for each block of time, all symbols": t.path_time_block}
    print(f"{len(r):,} origins, {data.iso(t.time.min())} to {data.iso(t.time.max())}; CRPS of HAR at bar {HORIZON}: {100 * as_it_is:.4f}")
    for name, group in groups.items():
        best = sum(crps[:, group == k].sum(1).min() for k in np.unique(group)) / len(r)
        print(f"{name:42}{len(np.unique(group)):>4}   x {best / as_it_is:.4f}")


SECTIONS = {"null": null_study, "room": room_study, "model": model_study, "tokenizer": tokenizer_study,
            "closes": closes_study, "codes": codes_study, "stages": stages_study, "leak": leak_study, "base": base_study,
            "parallel": parallel_study, "few": few_study, "unmoved": unmoved_study, "planted": planted_study,
            "budgets": budgets_study, "clock": clock_study}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SECTIONS:
        raise SystemExit(f"usage: python tests/study.py {'|'.join(SECTIONS)} --data FILE ...")
    run(lambda: SECTIONS[sys.argv[1]](sys.argv[2:]))
