"""Speeds and measures that are too slow or too noisy for a test. Run by hand, on a quiet machine.

    python tests/bench.py tokenizer --data sp500.csv.gz --val_start 2018-01-01 --test_start 2018-07-01

Each section prints a table; without --data it runs on the synthetic market.
"""
import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import data

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
        np.savetxt(path, np.column_stack([bars.time, bars.ohlcva]), delimiter=",", header="time,open,high,low,close,volume,amount", comments="",
                   fmt=["%d"] + ["%.6f"] * 6)
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


@section
def tokenizer(args):
    """Error and codes' use on the test bars, beside k-means of the same bars (1,024 centroids, then 1,024 on the residual)."""
    from tokenizer import CHANNELS, TokenizerConfig, report, train_tokenizer
    series, borders = read(args)
    features = [data.features(bars)[0] for bars in series]
    train, test = (torch.from_numpy(np.concatenate([x[slice(*data.targets_of(bars, split, borders))] for bars, x in zip(series, features)]))
                   for split in ("train", "test"))
    has = [i for i in range(6) if (train[:, i] != 0).any()]
    print(f"{len(train):,} bars to train on, {len(test):,} to test, {torch.get_num_threads()} threads\n")
    print(f"{'':26} {'train s':>8} {'cpu s':>6} {'mean':>8} " + " ".join(f"{CHANNELS[i]:>8}" for i in has) + "   used perplexity least bit   sign")

    def row(name, errors, seconds=None, use=""):
        times = f"{seconds[0]:8.0f} {seconds[1]:6.0f}" if seconds else " " * 15
        print(f"{name:26} {times} {np.mean(errors):8.5f} " + " ".join(f"{e:8.5f}" for e in errors) + use, flush=True)

    def timed(f):
        wall, cpu = time.perf_counter(), time.process_time()
        return f(), (time.perf_counter() - wall, time.process_time() - cpu)

    def use_of(tokens):
        share = torch.bincount(tokens, minlength=1024) / len(tokens)
        return f" {(share > 0).float().mean():6.1%} {torch.exp(-torch.xlogy(share, share).sum()):10.0f}"

    mean, std = train[:, has].mean(0), train[:, has].std(0)
    z, z_test = ((x[:, has] - mean) / std for x in (train, test))
    generator = torch.Generator().manual_seed(args.seed)
    c1, t1 = timed(lambda: k_means(z, 1024, generator))
    c2, t2 = timed(lambda: k_means(z - c1[assign(z, c1)], 1024, generator))
    coarse = assign(z_test, c1)
    fine = assign(z_test - c1[coarse], c2)
    error = lambda y: ((z_test - y) ** 2).mean(0) / z_test.var(0, correction=0)
    marks = error(c1[coarse]), error(c1[coarse] + c2[fine])
    row("k-means coarse", marks[0].tolist(), t1, use_of(coarse))
    row("k-means full", marks[1].tolist(), t2, use_of(fine))
    for name, config in (("tokenizer", TokenizerConfig()), ("without direction bit", TokenizerConfig(direction_bit=False))):
        model, seconds = timed(lambda: train_tokenizer(train, config, seed=args.seed))
        scores = report(model, test)
        for level, tokens, mark in (("coarse", "coarse", marks[0]), ("full", "fine", marks[1])):
            row(f"{name} {level}"[:26], [scores[f"{level}_error_{CHANNELS[i]}"] for i in has], seconds if level == "coarse" else None,
                f" {scores[f'{tokens}_used']:6.1%} {scores[f'{tokens}_perplexity']:10.0f} {scores[f'{tokens}_bit_entropy']:9.3f} "
                f"{scores[f'{level}_sign']:7.2%}")
            print(f"{'  of k-means':26} {'':15} {scores[f'{level}_error'] / mark.mean():8.2f}")
        if config.direction_bit:
            kept = model
    tokens = kept.encode(test)
    speed = lambda f: len(test) / min(timed(f)[1][0] for _ in range(5))
    print(f"\nencode {speed(lambda: kept.encode(test)):,.0f} bars/s, decode {speed(lambda: kept.decode(*tokens)):,.0f} bars/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--val_start")
    parser.add_argument("--test_start")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.sections or SECTIONS:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}; choose of {', '.join(SECTIONS)}")
        print(f"== {name}")
        SECTIONS[name](args)
