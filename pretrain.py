"""Stage 1: learn the next token of every bar, from bars to a checkpoint that forecasts.

    python pretrain.py                           # the synthetic market, a minute or two on 2 cores
    python pretrain.py --data bars.csv           # your bars; writes out.pt
    python pretrain.py --data bars.csv --resume  # after a kill, to the same weights bit for bit
    python pretrain.py --data other.csv --init_from out.pt --out tuned.pt    # fine-tune
    torchrun --nproc_per_node=4 pretrain.py --data bars.csv                  # four GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        pretrain.py --data bars.csv                                          # two machines

Bars become features, features tokens (the tokenizer is trained first if none is given), and the
model learns the next token: loss = CE(coarse) + CE(fine | coarse) + the reasoner's own, in nats per
bar. The batch of a step, the masks of dropout, the reasoner's origins and all other chance come
from (seed, step) alone, so that a resumed run, or one on another number of processes, sees the
same. It writes one checkpoint.

Few bars are soon learned by heart. So the size of the model, the number of updates and dropout
follow the number of bars (see `budget`); the weights that forecast are averaged over the last
updates, and chosen by what users see: the CRPS of close, range and volume on val, as a share of the
unigram's (the codes' frequencies in training).
"""
import math
import os
import time
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

import data
from backstage.checkpoint import SEEN_DATES
from backstage.files import sole_writer
from backstage.loop import (
    Clock, Optimizer, Run, average_gradients, load_optimizer, load_tokenizer, precision, rate,
    resumed, stop_here)
from backstage.prepare import (
    check, check_outputs, compile_layers, count_bars, fit_window, join_processes, more_markets,
    release, source_of, split, tuning_margin)
from backstage.script import StopSignal, UserError, cli, progress, run
from backstage.series import DAY
from backstage.validation import evaluate, print_result, say_heading, say_report
from data import iso
from model import Model, ModelConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, TokenizerConfig, report, train_tokenizer


@dataclass
class Config:
    # files
    data: list[str] | None = None     # CSV files, folders, globs; none: the synthetic market
    out: str = "out.pt"               # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    init_from: str | None = None      # checkpoint to fine-tune: its weights, tokenizer and sizes
    overlap: bool = False             # fine-tune on bars older than the last of --init_from
    tokenizer: str | None = None      # checkpoint whose tokenizer is used as it is
    # splits
    val_start: str | None = None      # first date of val, after train (default: after 80 % of time)
    test_start: str | None = None     # first date of test, after val (default: after 90 %)
    # how much, and how large: 0 is by the number of bars
    steps: int = 0                    # updates of the model
    tok_steps: int = 1200             # updates of the tokenizer
    batch_size: int = 0               # windows per update, over all processes
    block_size: int = 0               # bars in a window
    n_layer: int = 0                  # layers
    n_head: int = 0                   # heads, half linear attention, half local
    n_embd: int = 0                   # width
    # the model and its tokens
    windows: tuple[int, ...] = ModelConfig.windows  # bars that the local heads see
    pos: str = ModelConfig.pos        # position: rope, alibi or both
    reasoner: bool = True             # a head to the side that names the next 16 bars at once
    coarse_bits: int = 10             # bits of the coarse token
    fine_bits: int = 10               # bits of the fine token
    direction_bit: bool = True        # the top coarse bit says whether close rose
    # the optimizer
    lr: float = 0.0                   # peak rate of Muon; 0: 0.02, or less with --init_from
    adam_lr: float = 0.0              # peak rate of AdamW; 0: 0.003, or less with --init_from
    warmup: int = 20                  # updates of warm-up; then one cosine to a fiftieth
    weight_decay: float = 0.1         # on matrices
    clip: float = 1.0                 # largest gradient norm
    average: float = 0.95             # decay of the averaged weights, per update
    # against learning by heart
    dropout: float = -1.0             # share of a layer's outputs dropped; -1: by the bars
    mirror: int = -1                  # also the market quoted the other way round; -1: by the bars
    shift_weeks: int = 104            # weeks by which a training window moves in time, at most
    # for weights of many markets
    val_share: float = 0.0            # val is the last share of each series, no test; 0: by date
    balance: bool = False             # draw markets and intervals by the root of their bars
    shift_hours: int = 0              # hours by which half the windows move within the day, at most
    sessions: int = 0                 # chance parts of the day of what trades around the clock
    release: str | None = None        # also write the best weights alone, in half precision
    # the machine
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    compile: bool = False             # torch.compile
    micro_batch: int = 0              # windows per forward pass and process; 0: its whole share
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory
    seed: int = 0                     # of everything
    # reports
    eval_every: int = 0               # updates between reports; 0: a tenth of the run
    eval_windows: int = 128           # windows of val in a report
    save_every: int = 100             # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "release", "resume", "overwrite", "device", "compile", "eval_every", "save_every"}
TOK_BARS = 2_000_000  # the tokenizer trains on at most so many bars, evenly thinned
ORIGIN_BARS = 512     # bars of training for each origin of the reasoner: 5 % of the time
PATIENCE = 4          # reports without a better score that end it
AVERAGE_START = 10    # updates after which half of the averaged weights is past

# up to so many bars (see budget): sizes, windows of an update, bars of one, updates, dropout
FEW = dict(n_layer=2, n_head=4, n_embd=64, batch_size=4, block_size=128, steps=150, dropout=0.2,
           mirror=1)
MANY = dict(n_layer=4, n_head=8, n_embd=128, batch_size=16, block_size=256, steps=160, dropout=0.0,
            mirror=0)
BUDGETS = (10_000, FEW), (50_000, MANY | dict(dropout=0.1)), (math.inf, MANY)
RATES = dict(lr=0.02, adam_lr=3e-3)
TUNING = dict(lr=0.002, adam_lr=3e-4, dropout=0.1, mirror=0)    # in their place with --init_from
BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "base.pt")


# --------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    given = cli(Config, __doc__, argv)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}: set-up, the loop, the result."""
    config, entry = Config(**given), None
    if config.resume:
        config, entry = resumed(given, Config, FREE, ("pretrain",))
    check(config)
    rank, world, device = join_processes(config)
    say = print if rank == 0 else lambda *a, **k: None
    if rank == 0 and entry is None:
        check_outputs(config, False)
    run = Run.of(entry) if entry else Run()
    if entry and (run.step >= config.steps or entry["ended"]):
        return say(f"{config.out}: finished at step {run.step}; nothing to do")
    if rank == 0 and entry:
        check_outputs(config, True)
    stop, began = StopSignal(), time.time()

    # ---- bars, tokens, windows
    base = load_checkpoint(config.init_from) if config.init_from and not entry else None
    market = read_market(config, entry, base, say)
    size_by_bars(config, market, entry, base, world, say)
    tokenizer, tokens = tokenize_market(config, market, entry, base, run, stop, rank, world, device)
    train_series, train, val = make_windows(config, market, tokenizer, tokens)
    tiles = data.tiles(val, config.eval_windows)

    # ---- model, averaged weights, optimizer
    model, average = model_and_average(config, entry, base, tokenizer, train_series, train)
    model.to(device).train()
    average.to(device).requires_grad_(False)
    model.grad_ckpt = config.grad_ckpt
    autocast, scaler, config.dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    threads = torch.get_num_threads()
    if entry:
        load_optimizer(optimizer, entry, config.out)
        if (entry["world"], entry["threads"]) != (world, threads):
            say(f"{entry['world']} processes of {entry['threads']} threads before, {world} of "
                f"{threads} now: the weights will agree to rounding, not to the bit")
    if config.compile:
        rows = -(-config.batch_size // world)
        shape = min(rows, config.micro_batch or rows), market.block_size
        compile_layers(model, shape, device, autocast, say)
    n_params = [p.numel() for p in model.parameters()]
    say(f"{sum(n_params) / 1e6:.2f} M parameters, {config.batch_size} windows of "
        f"{market.block_size} bars a step, {config.steps} steps; {device}, {config.dtype} ({why}), "
        f"{world} process{'es' * (world > 1)} of {threads} threads")
    meta = dict(data=market.source, splits=market.splits, seed=config.seed, run=asdict(config),
                world=world, threads=threads, features=data.FEATURES)

    def save(ended):
        if rank == 0:
            save_checkpoint(config.out, model, tokenizer, **meta, **vars(run), stage="pretrain",
                            average=average.state_dict(), optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), dtype=config.dtype, ended=ended)

    def report_scores(grad_norm=None):
        scores = evaluate(average, val, tiles, market.series, autocast, rank, world)
        run.keep_if_best(average, scores["score"])
        say_report(run, scores, grad_norm, clock, say)

    eval_every = config.eval_every or max(1, config.steps // 10)
    clock, ended = Clock(run.step, config.steps, config.save_every), False
    say_heading(say)
    if base:    # the weights of --init_from stay where no update makes them clearly better
        report_scores()
        run.best_val *= 1 - tuning_margin(market.n_val)

    # ---- the loop
    while run.step < config.steps and not ended:
        # batch: a function of (seed, step) alone
        batch = draw_batch(train, config, model.config, run.step, rank, world)

        # loss and gradients, a micro-batch at a time
        loss = 0.0
        for part in micro_batches(batch, config.micro_batch):
            bars, targets, dropout, origins = (to_device(a, device) for a in part)
            share = len(bars[0]) * world / config.batch_size
            with autocast():
                part_loss = model(*bars, targets, dropout, origins)[2]
            scaler.scale(part_loss * share).backward()
            loss += part_loss.item() * share / world
        loss_and_stop = torch.tensor([loss, stop.signum], dtype=torch.float64, device=device)
        if world > 1:
            average_gradients(model, n_params, world)
            dist.all_reduce(loss_and_stop)  # the whole batch's loss, and an agreement to stop
        loss, stopping = loss_and_stop[0].item(), loss_and_stop[1].item() > 0

        # update
        optimizer.set_rate(rate(run.step, config.steps, config.warmup))
        grad_norm = run.update(model, optimizer, scaler, loss, config.clip, say)
        run.losses.append(loss)
        if run.bad_steps == 0:
            update_average(average, model, config.average, run.step)

        # report, save
        if run.step % eval_every == 0 or run.step == config.steps:
            report_scores(grad_norm)
            ended = run.since_best >= PATIENCE and run.step < config.steps
        elif rank == 0:
            progress(f"step {run.step}/{config.steps}  loss {loss:.4f}")
        if clock.save_due(run.step) or stopping or ended:
            save(ended)
        if stopping:
            stop_here(stop, run, config.out, say)

    # ---- the result
    if ended:
        say(f"stopped at step {run.step}: no better score on val for {PATIENCE} reports")
    if rank == 0:
        if config.release and run.best:
            release(config.release, run, average, tokenizer, meta)
        print_result(config, run, average, val, market.best_da, time.time() - began)
        if market.source.get("overlap"):
            print(SEEN_DATES)
    if world > 1:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The step

def draw_batch(train, config, sizes, step, rank, world):
    """This process's rows of the batch: (coarse, fine, time) and targets [B, T], dropout's masks or
    None, the reasoner's origins [B, M] or None. All of it a function of (seed, step)."""
    coarse, fine, when, targets = data.get_batch(train, config.seed, step, rank, world)
    random = np.random.default_rng([config.seed, step, 1])  # one order of draws on every process
    origins = reasoner_origins(random, config, sizes, step, rank, world)
    when = shift_in_time(when, random, config, rank, world)
    masks = dropout_masks(random, config, rank, world)
    return (coarse, fine, when), targets, masks, origins


def micro_batches(batch, n_rows):
    """The batch in parts of n_rows windows; 0: in one."""
    bars, targets, masks, origins = batch
    n_windows = len(bars[0])
    for i in range(0, n_windows, n_rows or n_windows):
        rows = slice(i, i + (n_rows or n_windows))
        yield ([a[rows] for a in bars], [a[rows] for a in targets],
               None if masks is None else masks[:, :, rows],
               None if origins is None else origins[rows])


def to_device(a, device):
    if isinstance(a, list):
        return [to_device(part, device) for part in a]
    return None if a is None else a.to(device, non_blocking=True)


def reasoner_origins(random, config, sizes, step, rank, world):
    """Bars of each window [B, M] after which the reasoner learns, one for each ORIGIN_BARS bars of
    training; None in steps without any."""
    if step % max(1, ORIGIN_BARS // sizes.block_size):
        return None
    last = max(1, sizes.block_size - sizes.latents)
    shape = config.batch_size, max(1, sizes.block_size // ORIGIN_BARS)
    return torch.from_numpy(random.integers(1, last + 1, shape)[rank::world])


def shift_in_time(when, random, config, rank, world):
    """Stamps of windows [B, T], each window moved by some weeks, half of those within the day by
    quarters of an hour too.

    Symbols of one day move together: a model that can tell the date learns the days by heart.
    """
    shape, weeks, quarters = (config.batch_size, 1), config.shift_weeks, 4 * config.shift_hours
    weeks = random.integers(-weeks, weeks + 1, shape)[rank::world]                       # [B, 1]
    quarters = random.integers(-quarters, quarters + 1, shape)[rank::world]              # [B, 1]
    half = (random.random(shape) < 0.5)[rank::world]                                     # [B, 1]
    within_day = when.diff().median(1, keepdim=True).values < DAY                        # [B, 1]
    hours = 900 * torch.from_numpy(quarters * half) * within_day
    return when + torch.from_numpy(7 * DAY * weeks) + hours                              # [B, T]


def dropout_masks(random, config, rank, world):
    """[n_layer, 2, B, 1, C], 0 or 1 / (1 - dropout), or None: one mask for all bars of a window."""
    if not config.dropout:
        return None
    shape = config.n_layer, 2, config.batch_size, 1, config.n_embd
    keep = random.random(shape, np.float32)[:, :, rank::world] >= config.dropout
    return torch.from_numpy(keep) / (1 - config.dropout)


@torch.no_grad()
def update_average(average, model, decay, step):
    """average <- decay average + (1 - decay) weights, with a smaller decay in the first updates."""
    decay = min(decay, step / (step + AVERAGE_START))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# Bars, tokens, windows, the model

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


def budget(config, n_bars, n_stamps):
    """Fills in what the config leaves to the number of training bars; returns that number.

    Symbols of one time move together, so that a second symbol is worth less than as many later
    bars: what counts is the geometric mean of the bars and of their distinct time stamps.
    """
    count = math.sqrt(n_bars * n_stamps)
    chosen = RATES | next(sizes for most, sizes in BUDGETS if count <= most)
    if config.init_from:
        chosen |= TUNING
    for name, value in chosen.items():
        if getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)
    return count


def size_by_bars(config, market, entry, base, world, say):
    """Settles sizes of model and window by the bars, and drops the series that are too short."""
    if entry is None:
        if base:
            for name in ("n_layer", "n_head", "n_embd"):
                setattr(config, name, getattr(base[0].config, name))
        count = budget(config, market.n_bars, market.n_stamps)
        if count <= BUDGETS[0][0] and not base and os.path.exists(BASE):
            say(f"few bars: the weights that come along, tuned to them, mostly forecast better "
                f"than any trained on so few alone: --init_from {os.path.relpath(BASE)} --overlap")
    if config.batch_size < world:
        raise UserError(f"--batch_size {config.batch_size}: fewer windows than the {world} "
                        f"processes; give at least one for each")
    sources = market.source["sources"]
    market.block_size, chosen = fit_window(config, market.series, market.borders, sources, say)
    market.series = [market.series[i] for i in chosen]
    market.borders = [market.borders[i] for i in chosen]
    pairs = list(zip(market.series, market.borders))
    market.spans = {name: [data.targets_of(bars, name, pair) for bars, pair in pairs]
                    for name in ("train", "val")}
    val, test = map(iso, market.splits)
    if not market.n_val:
        raise UserError(f"no symbol has a val bar between {val} and {test}; "
                        f"move --val_start, --test_start")
    say(f"{len(market.series)} symbols, {sum(map(len, market.series)):,} bars, {market.n_bars:,} "
        f"to train on; val from {val}, test from {test}")


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
    more, more_borders = more_markets(config, market.series, market.borders)
    series, borders = [*market.series, *more], [*market.borders, *more_borders]
    tokens = tokens + [data.tokenize(bars, tokenizer) for bars in more]
    train = data.make_streams(series, tokens, "train", borders, *sizes)
    if config.balance:
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


def model_and_average(config, entry, base, tokenizer, series, train):
    """The model to train, the average of its weights: as saved, as in --init_from, or new."""
    if entry:
        model, average = (load_checkpoint(config.out, weights=w)[0] for w in ("last", "average"))
    elif base:
        model, average = base[0], load_checkpoint(config.init_from)[0]
        model.config.block_size = average.config.block_size = train.block_size
        model.lean.fill_(1.0)  # it is fitted on the average
    else:
        model, average = (new_model(config, tokenizer, series, train) for _ in range(2))
    return model, average


def new_model(config, tokenizer, series, train):
    """A model of the config's sizes for these tokens."""
    moves = [np.diff(bars.ohlcva[first - 1:last, 3])
             for bars, (first, last) in zip(series, train.targets) if first < last]
    n_moved, n_bars = sum(map(np.count_nonzero, moves)), sum(map(len, moves))
    sizes = {f.name: getattr(config, f.name) for f in fields(ModelConfig)
             if hasattr(config, f.name)}
    sizes |= dict(coarse_bits=tokenizer.config.coarse_bits, fine_bits=tokenizer.config.fine_bits,
                  block_size=train.block_size, unmoved=1 - int(n_moved) / max(1, n_bars))
    torch.manual_seed(config.seed)  # here: other ranks have drawn other amounts before
    try:
        model = Model(ModelConfig(**sizes))
    except ValueError as e:
        raise UserError(f"the model's sizes do not fit: {e}")
    model.read_codes(tokenizer, code_shares(train, tokenizer))
    return model


def alone_or_together():
    """main; where another process of the run has died, one line in place of the collective's."""
    try:
        main()
    except RuntimeError as e:
        if not dist.is_initialized() or isinstance(e, torch.OutOfMemoryError):
            raise
        raise UserError(f"process {os.environ['RANK']} lost another process of this run "
                        f"({str(e).splitlines()[0][:80]}); start the same command again with "
                        f"--resume, on any number of processes")


if __name__ == "__main__":
    run(alone_or_together)
