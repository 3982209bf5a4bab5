"""What stage 1 settles before it trains: processes, borders, the window, the bars' record."""
import datetime
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

import data
from backstage.checkpoint import save_checkpoint
from backstage.dates import iso
from backstage.files import check_out, fingerprint
from backstage.loop import Clock, load_tokenizer
from backstage.script import UserError, check_numbers, pick_device, processes, progress
from tokenizer import Tokenizer, TokenizerConfig, report, train_tokenizer

TOK_BARS = 2_000_000  # the tokenizer trains on at most so many bars, evenly thinned
MIN_BLOCK = 64       # a short series shrinks the window, to this at the least
POSITIVE = "tok_steps", "clip", "eval_windows", "save_every"
NOT_NEGATIVE = ("steps", "batch_size", "block_size", "micro_batch", "lr", "adam_lr", "warmup",
                "weight_decay", "cooldown", "average", "n_layer", "n_head", "n_embd", "eval_every",
                "seed")


def check(config):
    check_numbers(config, POSITIVE, NOT_NEGATIVE)
    if config.block_size == 1:
        raise UserError("--block_size 1: at least 2 bars")
    if config.init_from and config.tokenizer:
        raise UserError("--tokenizer: the checkpoint of --init_from brings its own; "
                        "drop one of the two")
    if not (config.dropout == -1 or 0 <= config.dropout < 1):
        raise UserError(f"--dropout {config.dropout}: a share from 0 to below 1, or -1")
    if config.cooldown > 1:
        raise UserError(f"--cooldown {config.cooldown}: a share from 0 to 1")
    if config.average >= 1:
        raise UserError(f"--average {config.average}: a decay below 1")
    if config.patience < -1:
        raise UserError(f"--patience {config.patience}: a number of reports, 0 for never, or -1")
    if config.mirror not in (-1, 0, 1):
        raise UserError(f"--mirror {config.mirror}: choose 1, 0 or -1")
    if min(config.merge) < 1:
        raise UserError(f"--merge {','.join(map(str, config.merge))}: numbers of bars, from 1 on")


def check_outputs(config, resumed):
    """UserError where a file to be written exists, or is one that the run reads."""
    reads = config.init_from, config.tokenizer, *(config.data or ())
    if not resumed:
        check_out(config.out, config.overwrite, reads)
    if config.release:
        check_out(config.release, config.overwrite, (config.out, *reads))


def join_processes(config):
    """-> rank, world size, device; with more than one process they are connected."""
    rank, world, local_rank = processes()
    device = pick_device(config.device, local_rank)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # broadcasts and barriers use the current device
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        except RuntimeError as e:  # the port is taken, or the like
            raise UserError(f"the {world} processes cannot meet ({str(e).splitlines()[0][:80]}); "
                            f"start them with torchrun, on a free --master_port")
    return rank, world, device


# --------------------------------------------------------------------------------------------------
# The bars

@dataclass
class Market:
    series: list            # of Bars, those long enough to train on
    borders: list           # of each series: time stamps at which val and test start
    splits: tuple           # the same for all, as the checkpoint has them
    source: dict            # what the checkpoint says of the bars
    n_bars: int             # to train on
    n_stamps: int           # distinct time stamps of these
    best_da: float | None   # share of directions that can be called right, where known
    block_size: int = 0     # bars in a window
    spans: dict | None = None   # {split: [(first, last)] of each series}

    @property
    def n_val(self):
        return sum(max(0, last - first) for first, last in self.spans["val"])


def read_market(config, entry, base, say):
    """The bars and where they are split."""
    best_da = None
    if config.data is None:
        series, best_da = data.synthetic(seed=config.seed)
        say(f"no --data: training on the synthetic market, where at best {best_da:.0%} of "
            f"directions can be called right")
    else:
        series = data.load(config.data)
    splits = tuple(entry["splits"]) if entry else split(config, series, base)
    borders = [splits] * len(series)
    if config.val_share:
        borders = data.own_borders(series, config.val_share)
    source = source_of(config, series, splits, entry, base)
    return Market(series, borders, splits, source, *count_bars(series, borders), best_da)


def split(config, series, base):
    """The borders of the splits: --val_start, --test_start; else those of the fine-tuned checkpoint
    where the bars allow; else 80/10/10 %.

    UserError where val would lie among the bars that the fine-tuned checkpoint was trained on, or
    test among those that its weights were chosen by, unless by --overlap.
    """
    if config.val_share:
        return 2 * (int(max(bars.time[-1] for bars in series)) + 1,)
    if base is None:
        return data.split_borders(series, config.val_start, config.test_start)
    theirs = tuple(base[2]["splits"])
    if config.val_start is None and config.test_start is None:
        starts, ends = min(bars.time[0] for bars in series), max(bars.time[-1] for bars in series)
        if starts < theirs[0] < theirs[1] <= ends:  # else they have no test, or these no bars of it
            return theirs
    borders = data.split_borders(series, config.val_start, config.test_start)
    uses = "trained on", "chosen by"
    for name, own, its, use in zip(("val", "test"), borders, theirs, uses):
        if own < its and not config.overlap:
            raise UserError(f"{name} would start {iso(own)}, but {config.init_from} was {use} bars "
                            f"up to {iso(its)}: where these were among them a score would be "
                            f"in-sample; set --{name}_start to that day or later, or allow it by "
                            f"--overlap, and every score will say so")
    return borders


def source_of(config, series, borders, entry, base):
    """What the checkpoint says of its bars, a checkpoint.Source.

    UserError where a resumed run has others than it began with.
    """
    names, own = config.data or ["synthetic"], fingerprint(series)
    if entry:
        source = entry["data"]
        if (source["sources"], source["fingerprint"]) != (names, own):
            raise UserError(f"{', '.join(names)}: not the bars that the run in {config.out} began "
                            f"with (fingerprint {own}, was {source['fingerprint']}); "
                            f"give it those, or another --out")
        return source
    intervals = sorted({int(np.median(np.diff(bars.time))) for bars in series if len(bars) > 1})
    source = dict(sources=names, fingerprint=own, intervals=intervals)
    if base:
        theirs, before = base[2]["splits"], base[2]["data"].get("overlap")
        if before or borders[0] < theirs[0] or borders[1] < theirs[1]:
            source["overlap"] = before if before is True else max(before or 0, theirs[1])
    return source


def count_bars(series, borders):
    """(training bars, distinct time stamps among them); borders: a pair for each series."""
    stamps = []
    for bars, pair in zip(series, borders):
        first, last = data.targets_of(bars, "train", pair)
        stamps.append(bars.time[first:max(first, last)])
    return sum(map(len, stamps)), len(np.unique(np.concatenate(stamps)))


def fit_window(config, market, say):
    """(bars in a window, indices of the series that are long enough for one): --block_size, or less
    where no series has so many."""
    n_train = [data.targets_of(bars, "train", pair)[1]
               for bars, pair in zip(market.series, market.borders)]
    longest = max(n_train)
    block_size = config.block_size
    if block_size > longest - 1:
        block_size = max(MIN_BLOCK, longest // 2)
        if block_size > longest - 1:
            raise UserError(f"{', '.join(market.source['sources'])}: the longest series has "
                            f"{longest} bars before val starts ({iso(market.borders[0][0])}); "
                            f"{MIN_BLOCK + 1} is the least: give more bars or a later --val_start")
        say(f"the longest series has {longest} training bars: "
            f"the window shrinks from {config.block_size} to {block_size}")
    enough = [i for i, n in enumerate(n_train) if n > block_size]
    if len(enough) < len(n_train):
        say(f"{len(n_train) - len(enough)} of {len(n_train)} symbols are too short for a window of "
            f"{block_size} bars and are skipped")
    return block_size, enough


def fit_market(config, market, world, say):
    """Settles the bars in a window, drops the series that are too short for one, and adds those
    whose training bars are merged."""
    if config.batch_size < world:
        raise UserError(f"--batch_size {config.batch_size}: fewer windows than the {world} "
                        f"processes; give at least one for each")
    market.block_size, chosen = fit_window(config, market, say)
    market.series = [market.series[i] for i in chosen]
    market.borders = [market.borders[i] for i in chosen]
    n_symbols, n_bars = len(chosen), sum(map(len, market.series))
    n_merged = add_merged(market, config.merge)
    pairs = list(zip(market.series, market.borders))
    market.spans = {name: [data.targets_of(bars, name, pair) for bars, pair in pairs]
                    for name in ("train", "val")}
    val, test = map(iso, market.splits)
    if not market.n_val:
        raise UserError(f"no symbol has a val bar between {val} and {test}; "
                        f"move --val_start, --test_start")
    merges = f", and {n_merged:,} merged ones" if max(config.merge) > 1 else ""
    say(f"{n_symbols} symbols, {n_bars:,} bars, {market.n_bars:,} to train on{merges}; "
        f"val from {val}, test from {test}")


def add_merged(market, merge):
    """Adds to the series those of their training bars that are merged, k at a time for each k of
    `merge`, where they are long enough for a window. -> how many bars these are."""
    pairs = list(zip(market.series, market.borders))
    train = [(bars[:np.searchsorted(bars.time, pair[0])], pair) for bars, pair in pairs]
    found = [(data.merged(bars, k), pair) for k in merge if k > 1 for bars, pair in train]
    found = [(bars, pair) for bars, pair in found if len(bars) > market.block_size]
    market.series = market.series + [bars for bars, _ in found]
    market.borders = market.borders + [pair for _, pair in found]
    return sum(len(bars) for bars, _ in found)


# --------------------------------------------------------------------------------------------------
# Tokens, windows

def tokenize_market(config, market, entry, base, run, stop, rank, world, device):
    """The tokenizer, the same on every process, and the tokens of each series."""
    features, tokenizer = [data.features(bars)[0] for bars in market.series], None
    if entry:  # its own, whatever --init_from and --tokenizer hold by now
        tokenizer = load_tokenizer(config.out)
    elif base:
        tokenizer = base[1]
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    elif rank == 0:
        tokenizer = tokenizer_stage(config, features, market.spans, run.metrics, device, stop)
    if world > 1:
        shared = [tokenizer.dump() if rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        tokenizer = Tokenizer.load(shared[0])
    tokens = [data.tokenize(bars, tokenizer, x) for bars, x in zip(market.series, features)]
    return tokenizer, tokens


def tokenizer_stage(config, features, spans, metrics, device, stop):
    """Train the tokenizer on the train bars; the report is on val bars."""
    rows = {name: [x[first:last] for x, (first, last) in zip(features, spans[name])]
            for name in ("train", "val")}
    x = np.concatenate(rows["train"])
    x = torch.from_numpy(x[::-(-len(x) // TOK_BARS)].copy())                             # [N, 6]
    most = int(math.log2(len(x)))
    bits = min(config.coarse_bits, most), min(config.fine_bits, most)
    if bits != (config.coarse_bits, config.fine_bits):
        print(f"{len(x)} bars cannot fill 2^{config.coarse_bits} codes: "
              f"the tokens shrink to {bits[0]} + {bits[1]} bits")
    print(f"tokenizer: {len(x):,} bars, {config.tok_steps} steps", flush=True)
    clock = Clock(0, config.tok_steps, config.tok_steps)

    def after_step(step, loss):
        left = clock.left(step)
        progress(f"tokenizer step {step}/{config.tok_steps}  loss {loss:.4f}  {left} left")
        if stop.signum:
            print(f"stopped at step {step} of the tokenizer; nothing is saved yet")
            raise SystemExit(stop.status)

    sizes = TokenizerConfig(*bits, direction_bit=config.direction_bit)
    tokenizer = train_tokenizer(x, sizes, seed=config.seed, steps=config.tok_steps, device=device,
                                progress=after_step)
    progress("")
    scores = report(tokenizer, torch.from_numpy(np.concatenate(rows["val"])))
    metrics.append(dict(stage="tokenizer", split="val", step=config.tok_steps, **scores))
    print(f"tokens, val: R^2 {scores['coarse_r2']:.3f} coarse, {scores['full_r2']:.4f} both; "
          f"codes used {scores['coarse_used']:.1%}, {scores['fine_used']:.1%}; "
          f"perplexity {scores['coarse_perplexity']:.0f}, {scores['fine_perplexity']:.0f}")
    return tokenizer


def make_windows(config, market, tokenizer, tokens):
    """All series to train on, their windows, and the windows of val."""
    sizes = market.block_size, config.batch_size
    val = data.make_streams(market.series, tokens, "val", market.borders, *sizes)
    mirrored = [data.mirrored(bars) for bars in market.series] if config.mirror == 1 else []
    series, borders = market.series + mirrored, market.borders + market.borders[:len(mirrored)]
    tokens = tokens + [data.tokenize(bars, tokenizer) for bars in mirrored]
    train = data.make_streams(series, tokens, "train", borders, *sizes)
    if config.val_share:
        train.weights = data.balanced(series, train)
    return series, train, val


def code_shares(streams, tokenizer):
    """How often each code occurs among the targets: coarse [2^k1], fine [2^k2], add-one."""
    shares = []
    for column, bits in enumerate((tokenizer.config.coarse_bits, tokenizer.config.fine_bits)):
        count = np.ones(2**bits)
        for tokens, (first, last) in zip(streams.tokens, streams.targets):
            count += np.bincount(tokens[first:max(first, last), column], minlength=2**bits)
        shares.append(count / count.sum())
    return shares


def unmoved_in_train(series, train):
    """The share of the targets, bars of `series`, whose close is that of the bar before."""
    moves = [np.diff(bars.ohlcva[first - 1:last, 3])
             for bars, (first, last) in zip(series, train.targets) if first < last]
    n_moved, n_bars = sum(map(np.count_nonzero, moves)), sum(map(len, moves))
    return 1 - int(n_moved) / max(1, n_bars)


# --------------------------------------------------------------------------------------------------
# The rest

def compile_layers(model, shape, device, autocast, say):
    """torch.compile for each layer, or not at all, with a line that says why.

    shape: of the tokens in a forward pass. The layers are alike, so one compilation serves all.
    """
    say("compiling the layers, which takes a minute or two", flush=True)
    try:
        for layer in model.layers:
            layer.compile(dynamic=False)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        with autocast():
            loss = model(tokens, tokens, tokens, targets=(tokens, tokens))[2]
        loss.backward()
    except Exception as e:  # a missing compiler, an unsupported platform: many kinds
        for layer in model.layers:
            layer._compiled_call_impl = None  # what Module.compile sets
        say(f"--compile does not work here ({type(e).__name__}: {str(e).splitlines()[0][:90]}); "
            f"going on without")
    model.zero_grad(set_to_none=True)


def say_sizes(job, entry, why):
    """What is trained, and on what."""
    config, world, threads = job.config, job.world, job.meta["threads"]
    if entry and (entry["world"], entry["threads"]) != (world, threads):
        job.say(f"{entry['world']} processes of {entry['threads']} threads before, {world} of "
                f"{threads} now: the weights will agree to rounding, not to the bit")
    n_params = sum(p.numel() for p in job.model.parameters())
    job.say(f"{n_params / 1e6:.2f} M parameters, {config.batch_size} windows of "
            f"{job.market.block_size} bars a step, at most {config.steps} steps; {job.device}, "
            f"{config.dtype} ({why}), {world} process{'es' * (world > 1)} of {threads} threads")


def release(path, run, model, tokenizer, meta):
    """The best weights alone, in half precision, in a checkpoint to give away."""
    model.load_state_dict(run.best)
    for p in model.parameters():
        p.data = p.data.half()
    # the folders are nobody else's business
    names = [os.path.basename(name) for name in meta["data"]["sources"]]
    public = {key: meta[key] for key in ("splits", "seed", "features")}
    public["data"] = meta["data"] | dict(sources=names)
    save_checkpoint(path, model, tokenizer, stage="pretrain", step=run.step, metrics=run.metrics,
                    **public)


def tuning_margin(n_val):
    """The share of the score by which fine-tuned weights must beat those that they began as.

    What the best of ten reports gains by chance: .4 / sqrt(bars of val).
    """
    return min(0.1, 0.4 / math.sqrt(max(1, n_val)))
