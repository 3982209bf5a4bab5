"""Stage 1: learn the next token of every bar, from bars (or the synthetic market) to a checkpoint that forecasts.

    python pretrain.py                                        # the synthetic market, a minute or two on two CPU cores
    python pretrain.py --data bars.csv                        # your bars; writes out.pt
    python pretrain.py --data bars.csv --resume               # go on after a kill, to the same weights bit for bit
    python pretrain.py --data other.csv --init_from out.pt --out tuned.pt              # fine-tune
    torchrun --nproc_per_node=4 pretrain.py --data bars.csv                            # four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --data bars.csv

Bars become features, features tokens (the tokenizer is trained first if none is given), and the model learns the next
token: loss = CE(coarse) + CE(fine | coarse) + the reasoner's own, in nats per bar. The global batch of
a step, the masks of dropout, the reasoner's origins and all other chance come from (seed, step) alone, so
that a resumed run, or one on another number of processes, sees the same. It writes one checkpoint.

Few bars are soon learned by heart. So the size of the model, the number of updates and dropout follow the number of bars
(see `budget`); the weights that are kept are averaged over the last updates, and chosen by what users see: the CRPS of
close, range and volume on val, as a share of the unigram's (the codes' frequencies in training).
"""
import datetime
import math
import os
import time
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

import data
from backstage.checkpoint import SEEN_DATES
from backstage.files import check_out, fingerprint, sole_writer
from backstage.loop import (
    Clock, Optimizer, Run, average_gradients, load_optimizer, load_tokenizer, precision, rate, resumed, stop_here)
from backstage.script import StopSignal, UserError, check_numbers, cli, peak_memory, pick_device, progress, run
from backstage.series import DAY
from data import iso
from model import Model, ModelConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, TokenizerConfig, report, train_tokenizer


@dataclass
class Config:
    data: list[str] | None = None     # CSV files, folders, globs or a folder of data.py; none: the synthetic market
    out: str = "out.pt"               # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    init_from: str | None = None      # checkpoint to fine-tune: its weights, tokenizer and sizes, whatever the flags say
    overlap: bool = False             # fine-tune on bars older than the last that --init_from was trained on
    tokenizer: str | None = None      # checkpoint whose tokenizer is used as it is
    val_start: str | None = None      # first date of val; train is before it (default: after 80 % of the time stamps)
    test_start: str | None = None     # first date of test; val is before it (default: after 90 %)
    steps: int = 0                    # updates of the model; 0: by the number of bars
    tok_steps: int = 1200             # updates of the tokenizer
    batch_size: int = 0               # windows per update, over all processes; 0: by the number of bars
    block_size: int = 0               # bars in a window; 0: by the number of bars
    micro_batch: int = 0              # windows per forward pass and process, the rest is accumulated; 0: its whole share
    lr: float = 0.0                   # peak learning rate of Muon (matrices of the layers); 0: 0.02, or less with --init_from
    adam_lr: float = 0.0              # peak learning rate of AdamW (all else); 0: 0.003, or less with --init_from
    warmup: int = 20                  # updates of warm-up; then one cosine to a fiftieth
    weight_decay: float = 0.1         # on matrices
    clip: float = 1.0                 # largest gradient norm
    dropout: float = -1.0             # share of a layer's outputs that is dropped; -1: by the number of bars
    average: float = 0.95             # decay of the averaged weights, per update
    mirror: int = -1                  # 1: also train on the market quoted the other way round, 0: not, -1: with few bars
    val_share: float = 0.0            # val is the last share of each series' own time, and nothing is test; 0: by date
    balance: bool = False             # draw markets and intervals by the root of their bars, not by their bars
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    shift_hours: int = 0              # and half of those within the day by hours, at most so many: bars then tell the session
    sessions: int = 0                 # also train on so many chance parts of the day of what trades around the clock
    n_layer: int = 0                  # layers; 0: by the number of bars
    n_head: int = 0                   # heads, half linear attention, half local; 0: by the number of bars
    n_embd: int = 0                   # width; 0: by the number of bars
    windows: tuple[int, ...] = ModelConfig.windows  # bars that the local heads see
    pos: str = ModelConfig.pos        # position: rope, alibi or both
    reasoner: bool = True             # a head to the side that names the next 16 bars at once: sample.py --parallel
    coarse_bits: int = 10             # bits of the coarse token
    fine_bits: int = 10               # bits of the fine token
    direction_bit: bool = True        # the top coarse bit says whether close rose
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    compile: bool = False             # torch.compile
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between reports; 0: a tenth of the run
    eval_windows: int = 128           # windows of val in a report
    save_every: int = 100             # updates between saves (and at least each 30 s)
    release: str | None = None        # at the end, also write the best weights alone, in half precision, to this file


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "release", "resume", "overwrite", "device", "compile", "eval_every", "save_every"}
MIN_BLOCK = 64       # a short series shrinks the window, to this at the least
TOK_BARS = 2_000_000  # the tokenizer trains on at most so many bars, evenly thinned
LEAN_BLOCKS = 40     # of time on val, at least, by which the error of the lean is told
ORIGIN_BARS = 256    # bars of a window for each origin of the reasoner
PATIENCE = 4         # reports without a better score that end it


def check(config):
    positive = ("tok_steps", "clip", "eval_windows", "save_every")
    check_numbers(config, positive, ("steps", "batch_size", "block_size", "micro_batch", "lr", "adam_lr", "warmup",
                                          "weight_decay", "average", "shift_weeks", "shift_hours", "sessions", "n_layer", "n_head",
                                          "n_embd", "eval_every", "seed"))
    if config.block_size == 1:
        raise UserError("--block_size 1: at least 2 bars")
    if config.init_from and config.tokenizer:
        raise UserError("--tokenizer: the checkpoint of --init_from brings its own; drop one of the two")
    if not (config.dropout == -1 or 0 <= config.dropout < 1):
        raise UserError(f"--dropout {config.dropout}: a share from 0 to below 1, or -1")
    if config.average >= 1:
        raise UserError(f"--average {config.average}: a decay below 1")
    if config.mirror not in (-1, 0, 1):
        raise UserError(f"--mirror {config.mirror}: choose 1, 0 or -1")


# ----------------------------------------------------------------------------------------------------------------------
# Bars, splits, windows

# up to so many bars (see budget): layers, heads, width; windows of an update, bars of one, updates; dropout; mirror
FEW = dict(n_layer=2, n_head=4, n_embd=64, batch_size=4, block_size=128, steps=150, dropout=0.2, mirror=1)
MANY = dict(n_layer=4, n_head=8, n_embd=128, batch_size=16, block_size=256, steps=160, dropout=0.0, mirror=0)
BUDGETS = (10_000, FEW), (50_000, MANY | dict(dropout=0.1)), (math.inf, MANY)
RATES = dict(lr=0.02, adam_lr=3e-3)
TUNING = dict(lr=0.002, adam_lr=3e-4, dropout=0.1, mirror=0)    # in place of both, where weights come along
TUNING_GAIN = 0.4    # over sqrt(bars of val): as a share of the score, what the best of ten reports may gain by chance
BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "base.pt")


def budget(config, n_bars, n_stamps):
    """Fills in what the config leaves to the number of training bars, and returns that number as it counts here.

    Symbols of one time move together, so that a second symbol is worth less than as many later bars: what counts is the
    geometric mean of the bars and of their distinct time stamps.
    """
    count = math.sqrt(n_bars * n_stamps)
    chosen = RATES | next(sizes for most, sizes in BUDGETS if count <= most)
    if config.init_from:
        chosen |= TUNING
    for name, value in chosen.items():
        if getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)
    return count


def split(config, series, base):
    """The borders of the splits: as told, else those of the fine-tuned checkpoint where the bars allow, else 80/10/10 %.

    UserError where val would lie among the bars that the fine-tuned checkpoint was trained on, or test among those that
    its weights were chosen by, unless by --overlap.
    """
    if base is None:
        return data.split_borders(series, config.val_start, config.test_start)
    theirs = tuple(base[2]["splits"])
    if config.val_start is None and config.test_start is None:
        starts, ends = min(bars.time[0] for bars in series), max(bars.time[-1] for bars in series)
        if starts < theirs[0] and ends >= theirs[1]:
            return theirs
    borders = data.split_borders(series, config.val_start, config.test_start)
    for name, own, its, use in zip(("val", "test"), borders, theirs, ("trained on", "chosen by")):
        if own < its and not config.overlap:
            raise UserError(f"{name} would start {iso(own)}, but {config.init_from} was {use} bars up to "
                            f"{iso(its)}: where these were among them a score would be in-sample; set --{name}_start "
                            f"to that day or later, or allow it by --overlap, and every score will say so")
    return borders


def source_of(config, series, borders, entry, base):
    """What the checkpoint says of its bars, a model.Source; UserError where a resumed run has others than it began with."""
    names, own = config.data or ["synthetic"], fingerprint(series)
    if entry:
        source = entry["data"]
        if (source["sources"], source["fingerprint"]) != (names, own):
            raise UserError(f"{', '.join(names)}: not the bars that the run in {config.out} began with (fingerprint "
                            f"{own}, was {source['fingerprint']}); give it those, or another --out")
        return source
    intervals = sorted({int(np.median(np.diff(bars.time))) for bars in series if len(bars) > 1})
    source = dict(sources=names, fingerprint=own, intervals=intervals)
    if base:
        theirs, before = base[2]["splits"], base[2]["data"].get("overlap")
        if before or borders[0] < theirs[0] or borders[1] < theirs[1]:
            source["overlap"] = before if before is True else max(before or 0, theirs[1])
    return source


def fit_window(config, series, borders, sources, say):
    """(bars in a window, the series that are long enough for one): --block_size, or less where no series has so many."""
    n_train = [data.targets_of(bars, "train", pair)[1] for bars, pair in zip(series, borders)]
    longest = max(n_train)
    block_size = config.block_size
    if block_size > longest - 1:
        block_size = max(MIN_BLOCK, longest // 2)
        if block_size > longest - 1:
            raise UserError(f"{', '.join(sources)}: the longest series has {longest} bars before val starts "
                            f"({iso(borders[0][0])}); {MIN_BLOCK + 1} is the least: give more bars or a later --val_start")
        say(f"the longest series has {longest} training bars: the window shrinks from {config.block_size} to {block_size}")
    enough = [i for i, n in enumerate(n_train) if n > block_size]
    if len(enough) < len(series):
        say(f"{len(series) - len(enough)} of {len(series)} symbols are too short for a window of {block_size} bars "
            f"and are skipped")
    return block_size, enough


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, and the codes' shares

def tokenizer_stage(config, features, spans, metrics, device, stop):
    """Train the tokenizer on the train bars; the report is on val bars. spans: {split: [(first, last)] of each series}."""
    rows = {name: [x[first:last] for x, (first, last) in zip(features, spans[name])] for name in ("train", "val")}
    x = np.concatenate(rows["train"])
    x = torch.from_numpy(x[::-(-len(x) // TOK_BARS)].copy())  # (N, 6)
    k1, k2 = (min(bits, int(math.log2(len(x)))) for bits in (config.coarse_bits, config.fine_bits))
    if (k1, k2) != (config.coarse_bits, config.fine_bits):
        print(f"{len(x)} bars cannot fill 2^{config.coarse_bits} codes: the tokens shrink to {k1} + {k2} bits")
    print(f"tokenizer: {len(x):,} bars, {config.tok_steps} steps", flush=True)
    clock = Clock(0, config.tok_steps, config.tok_steps)

    def after(step, loss):
        progress(f"tokenizer step {step}/{config.tok_steps}  loss {loss:.4f}  {clock.left(step)} left")
        if stop.signum:
            print(f"stopped at step {step} of the tokenizer; nothing is saved yet")
            raise SystemExit(stop.status)

    sizes = TokenizerConfig(coarse_bits=k1, fine_bits=k2, direction_bit=config.direction_bit)
    tokenizer = train_tokenizer(x, sizes, seed=config.seed, steps=config.tok_steps, device=device, progress=after)
    progress("")
    scores = report(tokenizer, torch.from_numpy(np.concatenate(rows["val"])))
    metrics.append(dict(stage="tokenizer", split="val", step=config.tok_steps, **scores))
    print(f"tokens, val: R^2 {scores['coarse_r2']:.3f} coarse, {scores['full_r2']:.4f} both; "
          f"codes used {scores['coarse_used']:.1%}, {scores['fine_used']:.1%}; "
          f"perplexity {scores['coarse_perplexity']:.0f}, {scores['fine_perplexity']:.0f}")
    return tokenizer


def code_shares(streams, tokenizer):
    """How often each code occurs among the targets: coarse [2^k1], fine [2^k2], add-one."""
    shares = []
    for column, bits in enumerate((tokenizer.config.coarse_bits, tokenizer.config.fine_bits)):
        count = np.ones(2**bits)
        for tokens, (first, last) in zip(streams.tokens, streams.targets):
            count += np.bincount(tokens[first:max(first, last), column], minlength=2**bits)
        shares.append(count / count.sum())
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# The model

def new_model(config, tokenizer, series, train, block_size):
    """A model of the config's sizes for these tokens."""
    n_bars = n_moved = 0
    for bars, (first, last) in zip(series, train.targets):
        if first < last:
            moves = np.diff(bars.ohlcva[first - 1:last, 3])
            n_bars, n_moved = n_bars + len(moves), n_moved + np.count_nonzero(moves)
    sizes = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)}
    sizes |= dict(coarse_bits=tokenizer.config.coarse_bits, fine_bits=tokenizer.config.fine_bits, block_size=block_size,
                  unmoved=1 - int(n_moved) / max(1, n_bars))
    torch.manual_seed(config.seed)  # here, since what came before took chance in other amounts on other ranks
    try:
        model = Model(ModelConfig(**sizes))
    except ValueError as e:
        raise UserError(f"the model's sizes do not fit: {e}")
    model.read_codes(tokenizer, code_shares(train, tokenizer))
    return model


def compile_layers(model, shape, device, autocast, say):
    """torch.compile for each layer, or not at all, with a line that says why. shape: of the tokens in a forward pass.

    Layers alone: they are alike, so one compilation serves all.
    """
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
        say(f"--compile does not work here ({type(e).__name__}: {str(e).splitlines()[0][:90]}); going on without")
    model.zero_grad(set_to_none=True)


def moved_in_time(when, chance, config, rank, world):
    """Stamps of windows [B, T], each window moved by some weeks, and half of those within the day by quarters of an hour.

    Symbols of one day move together: a model that can tell the date learns the days by heart.
    """
    shape = config.batch_size, 1
    weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, shape)[rank::world]
    quarters = chance.integers(-4 * config.shift_hours, 4 * config.shift_hours + 1, shape)[rank::world]
    half = (chance.random(shape) < 0.5)[rank::world]
    within_day = when.diff().median(1, keepdim=True).values < DAY
    return when + torch.from_numpy(7 * DAY * weeks) + 900 * torch.from_numpy(quarters * half) * within_day


def reasoner_origins(chance, config, sizes, rank, world):
    """Bars of each window [B, M] after which the reasoner learns: one for each ORIGIN_BARS bars, by chance."""
    last = max(1, sizes.block_size - sizes.latents)
    shape = config.batch_size, max(1, sizes.block_size // ORIGIN_BARS)
    return torch.from_numpy(chance.integers(1, last + 1, shape)[rank::world])


def dropout_masks(chance, config, rank, world, device):
    """[n_layer, 2, B, 1, C], or None: of a window the same channels in all bars, so that few numbers are drawn."""
    if not config.dropout:
        return None
    shape = config.n_layer, 2, config.batch_size, 1, config.n_embd
    kept = chance.random(shape, np.float32)[:, :, rank::world] >= config.dropout
    return (torch.from_numpy(kept) / (1 - config.dropout)).to(device)


def candle_values(model, coarse, fine=None):
    """Close and range of codes, in units of s_t, and volume as it is standardized: [..., 3]."""
    close, high, low, volume = model.values(model.standardized(coarse, fine))
    return torch.stack((close, high - low, volume), -1)


def crps(p, values, y):
    """CRPS [N] of a distribution over V values, p [N, V], for what came, y [N]: the integral of (F - 1{x >= y})^2."""
    values, order = values.sort()
    F, width = p[:, order].cumsum(-1)[:, :-1], values.diff()                    # (N, V - 1), (V - 1,)
    outside = (values[0] - y).clamp(min=0) + (y - values[-1]).clamp(min=0)
    came = (y[:, None] - values[:-1]).clamp(min=0).minimum(width)               # part of each gap that lies below y
    return (F.square() * came + (1 - F).square() * (width - came)).sum(-1) + outside


def fit_lean(mean, came, stamp):
    """How far predicted mean moves [N], less the base, are to be trusted, for what came [N], less the base: 0 to 1.

    The slope of `came` on `mean`, shrunk by its own error (James and Stein): slope (1 - (error / slope)^2), from 0 up. The
    error is that of a ratio of sums over blocks of time, since symbols of one time move together: days, or where these are
    few LEAN_BLOCKS stretches. stamp: int64 [N], UTC seconds.
    """
    if len(mean) == 0:
        return 0.0
    block = stamp // DAY
    if len(torch.unique(block)) < LEAN_BLOCKS:
        block = (stamp - stamp.min()) * LEAN_BLOCKS // (stamp.max() - stamp.min() + 1)
    which = torch.unique(block, return_inverse=True)[1]
    n = int(which.max()) + 1
    hits, squares = (torch.zeros(n, dtype=torch.float64, device=which.device).index_add_(0, which, a.double())
                     for a in (mean * came, mean * mean))
    slope = (hits.sum() / squares.sum().clamp(min=1e-12)).item()
    error = (hits - slope * squares).square().sum().sqrt().item() / max(1e-12, squares.sum().item())
    return min(1.0, slope) * max(0.0, 1 - (error / slope) ** 2) if slope > 0 and n > 1 else 0.0


@torch.no_grad()
def evaluate(model, val, tiles, series, autocast, rank, world):
    """Fits the model's lean on the targets in the tiles of val, then scores them: a dict.

    coarse, fine: CE, nats; da: share of right calls of bars that moved; close, range, volume: CRPS by the coarse token
    alone, as a share of the unigram's; score: the mean of these three; lean.
    """
    model.eval()
    device, n, n_rows = model.up_mask.device, val.block_size, max(1, 2048 // val.block_size)
    model.lean.fill_(1.0)
    found = []  # of each batch of tiles: h (N, C), coarse, fine, change of the close, stamp (N,)
    for i in range(rank * n_rows, len(tiles), world * n_rows):
        which, ends = (np.array(a) for a in zip(*tiles[i:i + n_rows]))
        *inputs, targets = data.gather(val, which, ends)
        change = np.stack([np.diff(series[s].ohlcva[e - n:e + 1, 3]) for s, e in zip(which, ends)])  # (B, T)
        with autocast(), torch.compiler.set_stance("force_eager"):  # not worth compilations of its own
            h = model.hidden(*(a.to(device) for a in inputs)).float()
        is_target = targets[0] >= 0
        kept = [a[is_target].to(device) for a in (*targets, torch.from_numpy(change), inputs[2])]
        found.append((h[is_target.to(device)], *kept))
    moves = model.moves()
    base, _ = model.move_moments(model.coarse_share, moves)
    known = [(model.move_moments(model.coarse_logits(h), moves)[0] - base, moves[coarse, 0] - base, stamp)
             for h, coarse, _, _, stamp in found]
    known = [torch.cat(column) for column in zip(*known)] or [torch.zeros(0, device=device)] * 3
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, [a.cpu() for a in known])
        known = [torch.cat(column) for column in zip(*parts)]
    model.lean.fill_(fit_lean(*known))

    codes = candle_values(model, torch.arange(len(model.D1), device=device))    # (2^k1, 3)
    unigram = model.coarse_share.softmax(-1)
    sums = torch.zeros(11, dtype=torch.float64)  # targets, coarse, fine, right, moved, CRPS x 3, the unigram's CRPS x 3
    for h, coarse, fine, change, _ in found:
        log_p = model.coarse_logits(h).log_softmax(-1)
        log_fine = model.fine_logits(h, coarse).log_softmax(-1)
        p, came = log_p.exp(), candle_values(model, coarse, fine)               # (N, 2^k1), (N, 3)
        up = p @ model.up_mask.float() / (1 - model.config.unmoved) > 0.5
        nats = [-a.gather(1, b[:, None]).sum() for a, b in ((log_p, coarse), (log_fine, fine))]
        ours = [crps(p, codes[:, k], came[:, k]).sum() for k in range(3)]
        theirs = [crps(unigram.expand(len(p), -1), codes[:, k], came[:, k]).sum() for k in range(3)]
        moved = change != 0
        right = (up == (change > 0))[moved].sum()
        sums += torch.stack([torch.tensor(len(h)), *nats, right, moved.sum(), *ours, *theirs]).double().cpu()
    sums = sums.to(device)
    if world > 1:
        dist.all_reduce(sums)
    model.train()
    n_targets, coarse, fine, right, moved = sums[:5].tolist()
    shares = (sums[5:8] / sums[8:].clamp(min=1e-12)).tolist()  # without volume: 0 of 0
    known = [share for share, theirs in zip(shares, sums[8:].tolist()) if theirs > 1e-9]
    return dict(coarse=coarse / n_targets, fine=fine / n_targets, da=right / max(1, moved), close=shares[0],
                range=shares[1], volume=shares[2], score=sum(known) / len(known), lean=model.lean.item())


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    given = cli(Config, __doc__, argv)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}."""
    config, entry = Config(**given), None
    if config.resume:
        config, entry = resumed(given, Config, FREE, ("pretrain",))
    check(config)
    rank, world, local_rank = processes()
    device = pick_device(config.device, local_rank)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # broadcasts and barriers use the current device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    say = print if rank == 0 else lambda *a, **k: None
    reads = config.init_from, config.tokenizer, *(config.data or ())
    if entry is None and rank == 0:
        check_out(config.out, config.overwrite, reads)
    run = Run.of(entry) if entry else Run()
    if entry and (run.step >= config.steps or entry["ended"]):
        return say(f"{config.out}: finished at step {run.step}; nothing to do")
    if config.release and rank == 0:
        check_out(config.release, config.overwrite, (config.out, *reads))
    stop = StopSignal()

    # ---- bars, splits, sizes
    began = time.time()
    base = load_checkpoint(config.init_from) if config.init_from and not entry else None
    best_da = None
    if config.data is None:
        series, best_da = data.synthetic(seed=config.seed)
        say(f"no --data: training on the synthetic market, where at best {best_da:.0%} of directions can be called right")
    else:
        series = data.load(config.data)
    borders = tuple(entry["splits"]) if entry else split(config, series, base)
    if config.val_share:
        borders = 2 * (int(max(bars.time[-1] for bars in series)) + 1,)
    own = data.own_borders(series, config.val_share) if config.val_share else [borders] * len(series)
    source = source_of(config, series, borders, entry, base)
    spans = [data.targets_of(bars, "train", pair) for bars, pair in zip(series, own)]
    n_train = sum(max(0, last - first) for first, last in spans)
    stamps = [bars.time[first:max(first, last)] for bars, (first, last) in zip(series, spans)]
    n_stamps = len(np.unique(np.concatenate(stamps)))
    if entry is None:
        if base:
            config.n_layer, config.n_head, config.n_embd = (getattr(base[0].config, k) for k in ("n_layer", "n_head", "n_embd"))
        if budget(config, n_train, n_stamps) <= BUDGETS[0][0] and not base and os.path.exists(BASE):
            say("few bars: the weights that come along, tuned to them, mostly forecast better than any trained on so few alone: "
                f"--init_from {os.path.relpath(BASE)} --overlap")
    if config.batch_size < world:
        raise UserError(f"--batch_size {config.batch_size}: fewer windows than the {world} processes; "
                        f"give at least one for each")
    block_size, kept = fit_window(config, series, own, source["sources"], say)
    series, own = [series[i] for i in kept], [own[i] for i in kept]
    spans = {name: [data.targets_of(bars, name, pair) for bars, pair in zip(series, own)] for name in ("train", "val")}
    if not any(first < last for first, last in spans["val"]):
        raise UserError(f"no symbol has a val bar between {iso(borders[0])} and {iso(borders[1])}; "
                        f"move --val_start, --test_start")
    say(f"{len(series)} symbols, {sum(map(len, series)):,} bars, {n_train:,} to train on; "
        f"val from {iso(borders[0])}, test from {iso(borders[1])}")

    # ---- tokens and batches
    features = [data.features(bars)[0] for bars in series]
    if entry:  # its own, whatever --init_from and --tokenizer hold by now
        tokenizer = load_tokenizer(config.out)
    elif base:
        tokenizer = base[1]
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    elif rank == 0:
        tokenizer = tokenizer_stage(config, features, spans, run.metrics, device, stop)
    if world > 1:
        shared = [tokenizer.dump() if rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        tokenizer = Tokenizer.load(shared[0])
    tokens = [data.tokenize(bars, tokenizer, x) for bars, x in zip(series, features)]
    del features
    val = data.make_streams(series, tokens, "val", own, block_size, config.batch_size)
    tiles = data.tiles(val, config.eval_windows)
    more = [(data.mirrored(bars), pair) for bars, pair in zip(series, own)] if config.mirror == 1 else []
    chance = np.random.default_rng([config.seed, 2])
    more += [(data.part_of_day(bars, chance), pair) for _ in range(config.sessions) for bars, pair in zip(series, own)
             if data.around_the_clock(bars)]
    both, tokens = [*series, *(bars for bars, _ in more)], tokens + [data.tokenize(bars, tokenizer) for bars, _ in more]
    own = [*own, *(pair for _, pair in more)]
    train = data.make_streams(both, tokens, "train", own, block_size, config.batch_size)
    if config.balance:
        train.weights = data.balanced(both, train)

    # ---- model and optimizer
    if entry:
        model, _, _ = load_checkpoint(config.out, weights="last")
        average, _, _ = load_checkpoint(config.out, weights="average")
    elif base:
        model, average = base[0], load_checkpoint(config.init_from)[0]
        model.config.block_size = average.config.block_size = block_size
        model.lean.fill_(1.0)  # it is fitted after the training, on the average
    else:
        model, average = (new_model(config, tokenizer, both, train, block_size) for _ in range(2))
    model.to(device).train()
    average.to(device).requires_grad_(False)
    model.grad_ckpt = config.grad_ckpt
    autocast, scaler, config.dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    threads = torch.get_num_threads()
    if entry:
        load_optimizer(optimizer, entry, config.out)
        if (entry["world"], entry["threads"]) != (world, threads):
            say(f"{entry['world']} processes of {entry['threads']} threads before, {world} of {threads} now: "
                f"the weights will agree to rounding, not to the bit")
    if config.compile:
        rows = -(-config.batch_size // world)
        say("compiling the layers, which takes a minute or two", flush=True)
        compile_layers(model, (min(rows, config.micro_batch or rows), block_size), device, autocast, say)
    n_params = [p.numel() for p in model.parameters()]
    say(f"{sum(n_params) / 1e6:.2f} M parameters, {config.batch_size} windows of {block_size} bars a step, {config.steps} steps; "
        f"{device}, {config.dtype} ({why}), {world} process{'es' * (world > 1)} of {threads} threads")
    meta = dict(data=source, splits=borders, seed=config.seed, run=asdict(config), world=world, threads=threads,
                features=data.FEATURES)

    def save(ended=False):
        if rank == 0:
            save_checkpoint(config.out, model, tokenizer, **meta, **vars(run), stage="pretrain", average=average.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), dtype=config.dtype, ended=ended)

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 10)
    say(f"{'':>6}{'nats per bar':^34}{'CRPS to unigram, val':^24}")
    say(f"{'step':>6}{'train':>9}{'val':>9}{'coarse':>8}{'fine':>8}{'close':>8}{'range':>8}{'volume':>8}"
        f"{'right':>8}{'lean':>6}{'left':>8}")
    clock, ended = Clock(run.step, config.steps, config.save_every), False

    def report_on(losses, norm):
        scores = evaluate(average, val, tiles, series, autocast, rank, world)
        run.keep_if_best(average, scores["score"])
        val_loss, loss = scores["coarse"] + scores["fine"], float(np.mean(losses)) if losses else None
        run.metrics.append(dict(stage="pretrain", step=run.step, train=loss, val=val_loss, grad_norm=norm, **scores))
        progress("")
        shown = f"{loss:>9.4f}" if losses else f"{'.':>9}"
        say(f"{run.step:>6}{shown}{val_loss:>9.4f}{scores['coarse']:>8.4f}{scores['fine']:>8.4f}{scores['close']:>8.4f}"
            f"{scores['range']:>8.4f}{scores['volume']:>8.4f}{scores['da']:>8.2%}{scores['lean']:>6.2f}"
            f"{clock.left(run.step)!s:>8}", flush=True)

    if base:    # weights that come along are kept where no update makes them clearly better
        report_on([], None)
        n_val = sum(max(0, last - first) for first, last in spans["val"])
        run.best_val *= 1 - min(0.1, TUNING_GAIN / math.sqrt(max(1, n_val)))
    while run.step < config.steps and not ended:
        coarse, fine, when, target = data.get_batch(train, config.seed, run.step, rank, world)
        chance = np.random.default_rng([config.seed, run.step, 1])
        origins = reasoner_origins(chance, config, model.config, rank, world)
        when = moved_in_time(when, chance, config, rank, world)
        drop = dropout_masks(chance, config, rank, world, device)
        optimizer.set_rate(rate(run.step, config.steps, config.warmup))
        n_rows, loss_sum = len(coarse), 0.0
        micro = config.micro_batch or n_rows
        for i in range(0, n_rows, micro):
            part = [a[i:i + micro].to(device, non_blocking=True) for a in (coarse, fine, when, *target)]
            masks = None if drop is None else drop[:, :, i:i + micro]
            with autocast():
                loss = model(*part[:3], part[3:], masks, origins[i:i + micro].to(device))[2]
            weight = len(part[0]) * world / config.batch_size
            scaler.scale(loss * weight).backward()
            loss_sum += loss.item() * weight / world
        told = torch.tensor([loss_sum, float(stop.signum)], dtype=torch.float64, device=device)
        if world > 1:
            average_gradients(model, n_params, world)
            dist.all_reduce(told)  # the loss of the whole batch, and an agreement to stop
        loss_sum, stopping = told[0].item(), told[1].item() > 0
        norm = run.update(model, optimizer, scaler, loss_sum, config.clip, say)
        run.losses.append(loss_sum)
        if run.bad_steps == 0:
            with torch.no_grad():  # young averages are short
                keep = min(config.average, run.step / (run.step + 10))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

        if run.step % eval_every == 0 or run.step == config.steps:
            report_on(run.losses, norm)
            run.losses = []
            ended = run.since_best >= PATIENCE and run.step < config.steps
        elif rank == 0:
            progress(f"step {run.step}/{config.steps}  loss {loss_sum:.4f}")
        if clock.save_due(run.step) or stopping or ended:
            save(ended)
        if stopping:
            stop_here(stop, run, config.out, say)

    # ---- what came of it
    if ended:
        say(f"stopped at step {run.step}: no better score on val for {PATIENCE} reports")
    if rank == 0:
        if config.release and run.best:
            release(config.release, run, average, tokenizer, meta)
        tell_result(config, run, average, val, best_da, time.time() - began)
        if source.get("overlap"):
            print(SEEN_DATES)
    if world > 1:
        dist.destroy_process_group()


def release(path, run, model, tokenizer, meta):
    """The best weights alone, in half precision, in a checkpoint to give away."""
    model.load_state_dict(run.best)
    for p in model.parameters():
        p.data = p.data.half()
    names = [os.path.basename(name) for name in meta["data"]["sources"]]    # the folders are nobody else's business
    kept = {key: meta[key] for key in ("splits", "seed", "features")} | dict(data=meta["data"] | dict(sources=names))
    save_checkpoint(path, model, tokenizer, stage="pretrain", step=run.step, metrics=run.metrics, **kept)


def tell_result(config, run, model, val, best_da, seconds):
    """The best weights beside the unigram: the frequencies of the codes in training, which a model must beat."""
    rows = [m for m in run.metrics if "score" in m]
    row = min(rows, key=lambda m: m["score"])
    if row["score"] > run.best_val:     # no update was clearly better than the weights of --init_from
        row = rows[0]
        print(f"no update is clearly better on val than {config.init_from}: its weights are kept")
    marks = []
    for column, log_share in enumerate((model.coarse_share, model.fine_share)):
        tokens = np.concatenate([t[first:max(first, last), column] for t, (first, last) in zip(val.tokens, val.targets)])
        marks.append(-log_share.log_softmax(-1)[torch.from_numpy(tokens.astype(np.int64))].double().mean().item())
    print(f"\n{'val, best weights':<28}{'model':>9}{'unigram':>9}")
    print(f"{'coarse token, nats':<28}{row['coarse']:>9.4f}{marks[0]:>9.4f}")
    print(f"{'fine token, nats':<28}{row['fine']:>9.4f}{marks[1]:>9.4f}")
    for name in ("close", "range", "volume"):
        print(f"{'CRPS of ' + name:<28}{row[name]:>9.4f}{1:>9}")
    print(f"{'direction accuracy':<28}{row['da']:>9.2%}" + (f"{best_da:>9.2%}  best reachable" if best_da else ""))
    memory = peak_memory()
    print(f"{'time, peak memory':<28}{seconds:>8.0f}s" + (f"{memory / 1e9:>8.2f}G" if memory else ""))
    if row["coarse"] >= marks[0] or row["score"] >= 1:
        print("this model is no better than the frequencies of the codes: the bars are too few to learn from; "
              "give more, or fine-tune: --init_from")
    print(f"{config.out}: best weights of step {row['step']}; forecast with: python sample.py --ckpt {config.out}")


def alone_or_together():
    """main; where another process of the run has died, one line in place of the collective's own error."""
    try:
        main()
    except RuntimeError as e:
        if not dist.is_initialized() or isinstance(e, torch.OutOfMemoryError):
            raise
        raise UserError(f"process {os.environ['RANK']} lost another process of this run ({str(e).splitlines()[0][:80]}); "
                        f"start the same command again with --resume, on any number of processes")


if __name__ == "__main__":
    run(alone_or_together)
