"""Stage 1: learn the next token of every bar, from bars to a checkpoint that forecasts.

    python pretrain.py                           # the synthetic market, a minute or two on 2 cores
    python pretrain.py --data bars.csv           # your bars; writes out.pt
    python pretrain.py --data bars.csv --resume  # after a kill, to the same weights bit for bit
    python pretrain.py --data other.csv --init_from out.pt --out tuned.pt    # fine-tune
    torchrun --nproc_per_node=4 pretrain.py --data bars.csv                  # four GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        pretrain.py --data bars.csv                                          # two machines

Bars become features, features tokens (the tokenizer is trained first if none is given), and the
model learns the next token: loss = CE(coarse) + CE(fine | coarse) + a tenth of the reasoner's, in
nats per bar. The batch of a step, the masks of dropout, the reasoner's origins and all other chance
come from (seed, step) alone, so that a resumed run, or one on another number of processes, sees the
same. It writes one checkpoint.

Few bars are soon learned by heart. So the size of the model, dropout and all that follows depend on
the number of bars (see `budget`). Above 10,000 the learning rate stays until val gains no more;
then training goes back to the best weights, and the rate falls (warm-up, stable, decay; arXiv
2404.06395). Up to 50,000 half of the windows are of the market quoted the other way round, which
rises where the true one falls: chance directions cancel. These windows grow rarer as the rate
falls, so that the last updates see the true market, whose falls are wilder than its rises. By
--merge 2,5 some windows are of bars merged, two and five at a time. The weights that forecast are
averaged, and chosen by what users see: the CRPS of close, range and volume on val, as a share of
the unigram's (the codes' frequencies in training).
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
    Clock, Optimizer, Run, average_gradients, load_optimizer, precision, resumed, stop_here)
from backstage.prepare import (
    Market, check, check_outputs, code_shares, compile_layers, fit_market, join_processes,
    make_windows, read_market, release, say_sizes, tokenize_market, tuning_margin, unmoved_in_train)
from backstage.script import StopSignal, UserError, cli, progress, run
from backstage.series import DAY
from backstage.validation import evaluate, print_result, say_heading, say_report
from model import Model, ModelConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer


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
    steps: int = 0                    # updates of the model; 0: by the bars, see budget
    tok_steps: int = 1200             # updates of the tokenizer
    batch_size: int = 0               # windows per update, over all processes
    block_size: int = 0               # bars in a window
    n_layer: int = 0                  # layers
    n_head: int = 0                   # heads, half linear attention, half local
    n_embd: int = 0                   # width
    # the model and its tokens
    windows: tuple[int, ...] = ModelConfig.windows  # bars that the local heads see
    coarse_bits: int = 10             # bits of the coarse token
    fine_bits: int = 10               # bits of the fine token
    direction_bit: bool = True        # the top coarse bit says whether close rose
    # the optimizer
    lr: float = 0.0                   # peak rate of Muon; 0: 0.02, or 0.006 with --init_from
    adam_lr: float = 0.0              # peak rate of AdamW; 0: 0.003, or 0.001 with --init_from
    warmup: int = 20                  # updates in which the rate rises
    cooldown: float = 0.2             # share of --steps, the last, in which the rate falls
    patience: int = -1                # reports without a gain after which it falls early; 0:
                                      # never; -1: by the bars (0 with --steps)
    weight_decay: float = 0.1         # on matrices
    clip: float = 1.0                 # largest gradient norm
    average: float = 0.95             # decay of the averaged weights, per update
    # against learning by heart
    dropout: float = -1.0             # share of a layer's outputs dropped; -1: by the bars
    mirror: int = -1                  # 1: also windows of the market quoted the other way round,
                                      # until the rate falls; 0: none; -1: by the bars
    merge: tuple[int, ...] = (1,)     # also windows of bars merged so many at a time, for each
                                      # number; 1: as they are
    # for weights of many markets, drawn by the root of their bars
    val_share: float = 0.0            # val is the last share of each series, no test; 0: by date
    release: str | None = None        # also write the best weights alone, in half precision
    # the machine
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    compile: bool = False             # torch.compile
    micro_batch: int = 0              # windows per forward pass and process; 0: its whole share
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory
    seed: int = 0                     # of everything
    # reports
    eval_every: int = 0               # updates between reports; 0: 25, or a tenth of --steps
    eval_windows: int = 128           # windows of val in a report
    save_every: int = 100             # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "release", "resume", "overwrite", "device", "compile", "eval_every", "save_every"}
ORIGIN_BARS, ORIGIN_EVERY = 64, 8   # see reasoner_origins; it takes 5 to 7 % of a run
REPORT_EVERY = 25     # updates between reports, or a tenth of a shorter run
AVERAGE_START = 10    # update at which the average keeps half of itself, and adds half

# up to so many bars (see budget): sizes, windows of an update, bars of one, updates at most
FEW = dict(n_layer=2, n_head=4, n_embd=64, batch_size=4, block_size=128, steps=150, patience=0,
           dropout=0.2, mirror=1)
SOME = dict(n_layer=4, n_head=8, n_embd=128, batch_size=16, block_size=256, steps=500, patience=3,
            dropout=0.2, mirror=1)
MANY = SOME | dict(dropout=0.0, mirror=0)
BUDGETS = (10_000, FEW), (50_000, SOME), (math.inf, MANY)
RATES = dict(lr=0.02, adam_lr=3e-3)
BY_BARS = {*SOME, *RATES, "dtype"}  # flags with a default that stands for a choice
TUNING = dict(lr=0.006, adam_lr=1e-3, dropout=0.1, mirror=1)    # in their place with --init_from
SYNTHETIC = dict(steps=160, patience=0)                         # soon learned, and no more to find
BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "base.pt")


# --------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    given = cli(Config, __doc__, argv)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}: set-up, the loop, the result."""
    job = set_up(given)
    if job is None:
        return
    config, run, model, optimizer = job.config, job.run, job.model, job.optimizer
    start, end = decay(run.metrics, config)
    while run.step < end:
        # a batch, its loss and gradients, an update
        share = rate(run.step, start, end, config.warmup)
        batch = draw_batch(job, run.step, share)
        loss, stopping = gradients(job, batch)
        optimizer.set_rate(share)
        grad_norm = run.update(model, optimizer, job.scaler, loss, config.clip, job.say)
        run.losses.append(loss)
        if run.bad_steps == 0:
            update_average(job.average, model, config.average, run.step)

        # report, save
        if run.step % job.eval_every == 0 or run.step == end:
            report_scores(job, grad_norm)
            start, end = decay(run.metrics, config)
        elif job.rank == 0:
            progress(f"step {run.step}/{end}  loss {loss:.4f}")
        if job.clock.save_due(run.step) or stopping or run.step == end:
            save(job, ended=run.step == end < config.steps)
        if stopping:
            stop_here(job.stop, run, config.out, job.say)
    result(job)


# --------------------------------------------------------------------------------------------------
# The step

def decay(metrics, config):
    """(update from which the rate falls, last update), as far as the reports tell.

    The rate falls in the last config.cooldown of config.steps. Where val has gained nothing for
    config.patience reports, it falls at once, for a fourth as many updates as led to the best
    report.
    """
    best, at, since = math.inf, 0, 0    # the best score, its update, reports since then
    for report in (row for row in metrics if row["stage"] == "pretrain"):
        step, gains = report["step"], report["score"] < best
        best, at, since = (report["score"], step, 0) if gains else (best, at, since + 1)
        if since == config.patience > 0 and step + at // 4 < config.steps:
            return step, step + max(1, at // 4)
    return config.steps - int(config.cooldown * config.steps), config.steps


def rate(step, start, end, warmup):
    """The learning rate as a share of its peak: it rises, stays, and from `start` falls to `end`
    in a straight line."""
    return min(1.0, (step + 1) / max(1, warmup), (end - step) / max(1, end - start))


def draw_batch(job, step, share):
    """This process's rows of the batch: (coarse, fine, time) and targets [B, T], dropout's masks or
    None, the reasoner's origins [B, M] or None. All of it a function of (seed, step).

    share: of the learning rate, to its peak. As it falls, so does the share of mirrored windows,
    from one half: the last updates see the market as it is.
    """
    config, train, own = job.config, job.train, slice(job.rank, None, job.world)
    which, ends = data.draw_windows(train, config.seed, step, job.rank, job.world)
    random = np.random.default_rng([config.seed, step, 1])  # one order of draws on every process
    if config.mirror == 1:  # the second half of the symbols is the first, mirrored
        n_symbols = len(train.tokens) // 2
        mirrored = random.random(config.batch_size)[own] < share / 2                     # [B]
        which = which % n_symbols + n_symbols * mirrored
    coarse, fine, when, targets = data.gather(train, which, ends)
    origins = reasoner_origins(random, config, job.model.config, step, share, own)
    when = shift_hours(when, random, config, own)
    masks = dropout_masks(random, config, own)
    return (coarse, fine, when), targets, masks, origins


def gradients(job, batch):
    """Adds up the gradients of the batch, a micro-batch at a time; -> (its mean loss, whether a
    process was told to stop), the same on every process."""
    loss = 0.0
    for part in micro_batches(batch, job.config.micro_batch):
        bars, targets, masks, origins = (to_device(a, job.device) for a in part)
        share = len(bars[0]) * job.world / job.config.batch_size
        with job.autocast():
            part_loss = job.model(*bars, targets, masks, origins)[2]
        job.scaler.scale(part_loss * share).backward()
        loss += part_loss.item() * share / job.world
    loss_and_stop = torch.tensor([loss, job.stop.signum], dtype=torch.float64, device=job.device)
    if job.world > 1:
        average_gradients(job.model, [p.numel() for p in job.model.parameters()], job.world)
        dist.all_reduce(loss_and_stop)
    return loss_and_stop[0].item(), loss_and_stop[1].item() > 0


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


def reasoner_origins(random, config, sizes, step, share, own):
    """Bars of each window [B, M] after which the reasoner learns, one for each ORIGIN_BARS; None in
    updates without any. It learns in each ORIGIN_EVERY-th update, and in all while the rate rises
    or falls: at the end the hidden states that it reads hardly change. own: this process's rows."""
    if share == 1 and step % ORIGIN_EVERY:
        return None
    last = max(1, sizes.block_size - sizes.latents)
    shape = config.batch_size, max(1, sizes.block_size // ORIGIN_BARS)
    return torch.from_numpy(random.integers(1, last + 1, shape)[own])


def shift_hours(when, random, config, own):
    """Stamps of windows [B, T]. For weights of many markets half of those within the day are moved
    by quarters of an hour, since each exchange has hours of its own."""
    if not config.val_share:
        return when
    shape = config.batch_size, 1
    quarters = random.integers(-DAY // 1800, DAY // 1800 + 1, shape)[own]                # [B, 1]
    half = random.random(shape)[own] < 0.5                                               # [B, 1]
    within_day = when.diff().median(1, keepdim=True).values < DAY                        # [B, 1]
    return when + 900 * torch.from_numpy(quarters * half) * within_day                   # [B, T]


def dropout_masks(random, config, own=slice(None)):
    """[n_layer, 2, B, 1, C], 0 or 1 / (1 - dropout), or None: one mask for all bars of a window."""
    if not config.dropout:
        return None
    shape = config.n_layer, 2, config.batch_size, 1, config.n_embd
    keep = random.random(shape, np.float32)[:, :, own] >= config.dropout
    return torch.from_numpy(keep) / (1 - config.dropout)


@torch.no_grad()
def update_average(average, model, decay, step):
    """average <- decay average + (1 - decay) weights, with a smaller decay in the first updates."""
    decay = min(decay, step / (step + AVERAGE_START))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# Reports, saves, the result

def report_scores(job, grad_norm=None):
    """A line of the table. The averaged weights are kept where they are the best so far; where val
    gains no more, training goes back to the best and lets the rate fall."""
    config, run, clock = job.config, job.run, job.clock
    scores = evaluate(job.average, job.val, job.tiles, job.market.series, job.autocast, job.rank,
                      job.world)
    run.keep_if_best(job.average, scores["score"])
    _, end = decay(run.metrics, config)
    clock.steps = end
    say_report(run, scores, grad_norm, clock, job.say)      # it is added to run.metrics
    _, clock.steps = decay(run.metrics, config)
    if clock.steps != end:                                  # no gain: an earlier one
        job.average.load_state_dict(run.best)
        job.model.load_state_dict(run.best)
        job.model.lean.fill_(1.0)   # it is fitted on the average
        job.say(f"val has gained nothing for {config.patience} reports: back to the best weights, "
                f"whose rate falls until step {clock.steps}, the last")


def save(job, ended):
    if job.rank == 0:
        save_checkpoint(job.config.out, job.model, job.tokenizer, **job.meta, **vars(job.run),
                        stage="pretrain", average=job.average.state_dict(), ended=ended,
                        optimizer=job.optimizer.state_dict(), scaler=job.scaler.state_dict(),
                        dtype=job.config.dtype)


def result(job):
    job.stop.release()
    config, market = job.config, job.market
    if job.rank == 0:
        if config.release and job.run.best:
            release(config.release, job.run, job.average, job.tokenizer, job.meta)
        print_result(config, job.run, job.average, job.val, market.best_da,
                     time.time() - job.began)
        if market.source.get("overlap"):
            print(SEEN_DATES)
    if job.world > 1:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Set-up

@dataclass
class Job:
    """A run as it stands: what the loop works with."""
    config: Config
    run: Run                # how far it has come
    market: Market
    tokenizer: Tokenizer
    train: data.Streams
    val: data.Streams
    tiles: list             # windows of val in a report
    model: Model
    average: Model          # with the averaged weights, which forecast
    optimizer: Optimizer
    autocast: object
    scaler: torch.amp.GradScaler
    meta: dict              # what the checkpoint says beside its weights
    rank: int
    world: int              # processes
    device: torch.device
    say: object             # print, on the first process
    stop: StopSignal
    began: float
    clock: Clock
    eval_every: int


def set_up(given):
    """The Job of these flags {name: value}, begun or gone on with; None if it is finished."""
    config, entry = Config(**given), None
    if config.resume:   # what is by the bars may be typed so
        given = {name: value for name, value in given.items()
                 if name not in BY_BARS or value != getattr(Config, name)}
        config, entry = resumed(given, Config, FREE, ("pretrain",))
    check(config)
    rank, world, device = join_processes(config)
    say = print if rank == 0 else lambda *a, **k: None
    run = Run.of(entry) if entry else Run()
    if entry and (run.step >= config.steps or entry["ended"]):
        if config.release and rank == 0:
            check_outputs(config, True)
            release(config.release, run, *load_checkpoint(config.out)[:2], entry)
        return say(f"{config.out}: finished at step {run.step}; nothing to train")
    if rank == 0:
        check_outputs(config, entry is not None)
    stop, began = StopSignal(), time.time()

    base = load_checkpoint(config.init_from) if config.init_from and not entry else None
    market = read_market(config, entry, base, say)
    if entry is None:
        budget(config, market, base, say)
    fit_market(config, market, world, say)
    tokenizer, tokens = tokenize_market(config, market, entry, base, run, stop, rank, world, device)
    train_series, train, val = make_windows(config, market, tokenizer, tokens)
    model, average = model_and_average(config, entry, base, tokenizer, train_series, train)
    model.to(device).train()
    average.to(device)
    autocast, scaler, config.dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    if entry:
        load_optimizer(optimizer, entry, config.out)
    if config.compile:
        rows = -(-config.batch_size // world)
        shape = min(rows, config.micro_batch or rows), market.block_size
        compile_layers(model, shape, device, autocast, say)
    meta = dict(data=market.source, splits=market.splits, seed=config.seed, run=asdict(config),
                world=world, threads=torch.get_num_threads(), features=data.FEATURES)
    clock = Clock(run.step, config.steps, config.save_every)
    every = config.eval_every or min(REPORT_EVERY, max(1, config.steps // 10))
    job = Job(config, run, market, tokenizer, train, val, data.tiles(val, config.eval_windows),
              model, average, optimizer, autocast, scaler, meta, rank, world, device, say, stop,
              began, clock, every)
    say_sizes(job, entry, why)
    say_heading(say)
    if base:    # the weights of --init_from stay where no update makes them clearly better
        report_scores(job)
        run.best_val *= 1 - tuning_margin(market.n_val)
    return job


def budget(config, market, base, say):
    """Fills in what the config leaves to the number of training bars.

    Symbols of one time move together, so that a second symbol is worth less than as many later
    bars: what counts is the geometric mean of the bars and of their distinct time stamps.
    """
    count = math.sqrt(market.n_bars * market.n_stamps)
    chosen = RATES | next(sizes for most, sizes in BUDGETS if count <= most)
    if config.data is None:
        chosen |= SYNTHETIC
    if config.steps:
        chosen |= dict(patience=0)
    if base:
        chosen |= TUNING
        for name in ("n_layer", "n_head", "n_embd"):
            own, given = getattr(base[0].config, name), getattr(config, name)
            if given not in (0, own):
                raise UserError(f"--{name} {given}: the weights of {config.init_from} have {own}; "
                                f"drop the flag")
            chosen[name] = own
    for name, value in chosen.items():
        if getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)
    if config.data and not base and os.path.exists(BASE):
        path, how = os.path.relpath(BASE), "tuned"
        if count <= BUDGETS[0][0]:
            how = "as they are or tuned"
        say(f"the weights that come along may forecast these bars better, {how} "
            f"(--init_from {path} --overlap); see by backtest.py --ckpt {config.out} {path}")


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
    average.requires_grad_(False)
    model.grad_ckpt = config.grad_ckpt
    return model, average


def new_model(config, tokenizer, series, train):
    """A model of the config's sizes for these tokens."""
    sizes = {f.name: getattr(config, f.name) for f in fields(ModelConfig)
             if hasattr(config, f.name)}
    sizes |= dict(coarse_bits=tokenizer.config.coarse_bits, fine_bits=tokenizer.config.fine_bits,
                  block_size=train.block_size, unmoved=unmoved_in_train(series, train))
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
