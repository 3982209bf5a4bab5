"""Stage 1: learn the next token of every bar, from bars (or the synthetic market) to a checkpoint that forecasts.

    python pretrain.py                                        # the synthetic market, a few minutes on two CPU cores
    python pretrain.py --data bars.csv                        # your bars; writes out.pt
    python pretrain.py --data bars.csv --resume               # go on after a kill, to the same weights bit for bit
    python pretrain.py --data other.csv --init_from out.pt --out tuned.pt              # fine-tune
    torchrun --nproc_per_node=4 pretrain.py --data bars.csv                            # four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --data bars.csv

Bars become features, features tokens (the tokenizer is trained first if none is given), and the model learns the next
token: loss = CE(coarse) + CE(fine | coarse) + the reasoner's small auxiliary loss, in nats per bar (the table leaves out
the last). The global batch of a step, the place of the reasoner's borders and all other chance come from (seed, step)
alone, so that a resumed run, or one on another number of processes, sees the same data. It writes one checkpoint, from
the tokenizer's training on.
"""
import contextlib
import datetime
import math
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

import data
from data import UserError
from model import Model, ModelConfig, load_checkpoint, read_checkpoint, save_checkpoint
from tokenizer import Tokenizer, TokenizerConfig, report, train_tokenizer


@dataclass
class Config:
    data: list[str] | None = None     # CSV files, folders, globs or a folder of data.py; none: the synthetic market
    out: str = "out.pt"               # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    init_from: str | None = None      # checkpoint to fine-tune: its weights, tokenizer and sizes, whatever the flags say
    tokenizer: str | None = None      # checkpoint whose tokenizer is used as it is
    val_start: str | None = None      # first date of val; train is before it (default: after 80 % of the time stamps)
    test_start: str | None = None     # first date of test; val is before it (default: after 90 %)
    steps: int = 0                    # updates of the model; 0: four passes over the training bars, from 100 to 600 updates
    tok_steps: int = 3000             # updates of the tokenizer
    batch_size: int = 16              # windows per update, over all processes
    block_size: int = 256             # bars in a window
    micro_batch: int = 0              # windows per forward pass and process, the rest is accumulated; 0: its whole share
    lr: float = 1e-3                  # peak learning rate; warms up, then falls in one cosine to a tenth
    warmup: int = 50                  # updates of warm-up
    weight_decay: float = 0.1         # on matrices
    clip: float = 1.0                 # largest gradient norm
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    n_layer: int = 4                  # layers
    n_head: int = 8                   # heads: half linear attention, half local
    n_embd: int = 128                 # width
    windows: tuple[int, ...] = (16, 64)  # bars that the local heads see
    pos: str = "rope"                 # position: rope or alibi
    reasoner: bool = True             # latent slots at mid depth
    coarse_bits: int = 10             # bits of the coarse token
    fine_bits: int = 10               # bits of the fine token
    direction_bit: bool = True        # the top coarse bit says whether close rose
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes bf16 where the hardware has it
    compile: bool = False             # torch.compile
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between reports; 0: a tenth of the run
    eval_windows: int = 128           # windows of val in a report
    save_every: int = 100             # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "compile", "eval_every", "save_every"}
MIN_BLOCK = 64       # a short series shrinks the window, to this at the least
TOK_BARS = 2_000_000  # the tokenizer trains on at most so many bars, evenly thinned
SAVE_SECONDS = 30
MAX_BAD_STEPS = 10   # non-finite updates in a row that end the run


def check(config):
    positive = ("tok_steps", "batch_size", "block_size", "lr", "clip", "n_layer", "n_head", "n_embd", "eval_windows",
                "save_every")
    data.check_numbers(config, positive, ("steps", "micro_batch", "warmup", "weight_decay", "shift_weeks", "eval_every",
                                          "seed"))
    if config.block_size < 2:
        raise UserError(f"--block_size {config.block_size}: at least 2 bars")
    if config.init_from and config.tokenizer:
        raise UserError("--tokenizer: the checkpoint of --init_from brings its own; drop one of the two")


# ----------------------------------------------------------------------------------------------------------------------
# What every training loop needs

def resumed(given, config_class, free, stages):
    """(config, checkpoint) of --resume: the settings of the file --out.

    given: the flags {name: value}; one that differs, unless in `free`, is a UserError. stages: who may have written it.
    """
    path = given.get("out", config_class.out)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file to go on from; drop --resume, or name it by --out")
    entry = read_checkpoint(path)
    if entry["stage"] not in stages or "run" not in entry:
        raise UserError(f"{path}: written by stage {entry['stage']!r}; resume it with that script")
    for name, value in given.items():
        saved = entry["run"].get(name)
        if name not in free and value != saved:
            raise UserError(f"--{name} {value}: the run in {path} has {saved}; "
                                 f"drop the flag to go on, or choose another --out")
    return config_class(**entry["run"] | dict(overwrite=False) | given), entry


def adamw(model, lr, weight_decay):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). Matrices and tables decay; a vector, the gate, does not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=matrices[0].device.type in ("cpu", "cuda"))


def learning_rate(step, config):
    """Rises over config.warmup updates to config.lr, then falls in one cosine to a tenth of it at config.steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    along = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


# ----------------------------------------------------------------------------------------------------------------------
# Bars, splits, windows

def split(config, series, base):
    """The borders of the splits: as told, else those of the fine-tuned checkpoint where the bars allow, else 80/10/10 %."""
    if base is None:
        return data.split_borders(series, config.val_start, config.test_start)
    theirs = tuple(base[2]["splits"])
    if config.val_start is None and config.test_start is None:
        starts, ends = min(bars.time[0] for bars in series), max(bars.time[-1] for bars in series)
        if starts < theirs[0] and ends >= theirs[1]:
            return theirs
    borders = data.split_borders(series, config.val_start, config.test_start)
    if borders[0] < theirs[0]:
        raise UserError(f"val would start {data.iso(borders[0])}, but {config.init_from} was trained on bars up to "
                        f"{data.iso(theirs[0])}: a score there would be in-sample; set --val_start to that day or later")
    return borders


def fit_window(config, series, borders, sources, say):
    """(bars in a window, the series that are long enough for one): --block_size, or less where no series has so many."""
    longest = max(data.targets_of(bars, "train", borders)[1] for bars in series)
    block_size = config.block_size
    if block_size > longest - 1:
        block_size = max(MIN_BLOCK, longest // 2)
        if block_size > longest - 1:
            raise UserError(f"{', '.join(sources)}: the longest series has {longest} bars before val starts "
                            f"({data.iso(borders[0])}); {MIN_BLOCK + 1} is the least: give more bars or a later --val_start")
        say(f"the longest series has {longest} training bars: the window shrinks from {config.block_size} to {block_size}")
    enough = [bars for bars in series if data.targets_of(bars, "train", borders)[1] > block_size]
    if len(enough) < len(series):
        say(f"{len(series) - len(enough)} of {len(series)} symbols are too short for a window of {block_size} bars "
            f"and are skipped")
    return block_size, enough


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, and what the model must beat

def tokenizer_stage(config, series, borders, n_train, entry, meta, metrics, stop, device):
    """Train the tokenizer on the train bars, saving on the way; the report is on val bars."""
    take = max(1, -(-n_train // TOK_BARS))
    rows = {"train": [], "val": []}
    for bars in series:
        x = np.concatenate([x for x, _ in data.feature_blocks(bars)])
        for part, chosen in rows.items():
            first, last = data.targets_of(bars, part, borders)
            chosen.append(x[first:last:take])
    x = torch.from_numpy(np.concatenate(rows["train"]))  # (N, 6)
    k1, k2 = (min(b, int(math.log2(max(1, len(x))))) for b in (config.coarse_bits, config.fine_bits))
    if (k1, k2) != (config.coarse_bits, config.fine_bits):
        print(f"{len(x)} bars cannot fill 2^{config.coarse_bits} codes: the tokens shrink to {k1} + {k2} bits")
    print(f"tokenizer: {len(x):,} bars, {config.tok_steps} steps", flush=True)
    resume = entry and entry["tokenizer"]["training"]
    from_step = resume["step"] if resume else 0
    started = saved_at = time.time()

    def after(step, loss, snapshot):
        nonlocal saved_at
        if step % max(1, config.tok_steps // 5) == 0:
            left = (time.time() - started) / (step - from_step) * (config.tok_steps - step)
            data.progress("")  # step, loss and left in the columns of the model's table
            print(f"{step:>6}{loss:>9.4f}{'':>56}{datetime.timedelta(seconds=round(left))!s:>8}", flush=True)
        else:
            data.progress(f"tokenizer step {step}/{config.tok_steps}  loss {loss:.4f}")
        if stop.signum or time.time() - saved_at > SAVE_SECONDS or step % (10 * config.save_every) == 0:
            snap = dict(training=snapshot())
            save_checkpoint(config.out, None, snap, **meta, stage="tokenizer", step=step, metrics=metrics)
            saved_at = time.time()
        if stop.signum:
            print(f"stopped at step {step} of the tokenizer; saved in {config.out}; go on with --resume")
            raise SystemExit(stop.status)

    sizes = TokenizerConfig(coarse_bits=k1, fine_bits=k2, direction_bit=config.direction_bit)
    tokenizer = train_tokenizer(x, sizes, seed=config.seed, steps=config.tok_steps, device=device, progress=after,
                                resume=resume)
    scores = report(tokenizer, torch.from_numpy(np.concatenate(rows["val"])))
    metrics.append(dict(stage="tokenizer", split="val", step=config.tok_steps, **scores))
    print(f"tokens, val: R^2 {scores['coarse_r2']:.3f} coarse, {scores['full_r2']:.4f} both; "
          f"codes used {scores['coarse_used']:.1%}, {scores['fine_used']:.1%}; "
          f"perplexity {scores['coarse_perplexity']:.0f}, {scores['fine_perplexity']:.0f}")
    return tokenizer


def unigram(train, val, column, n_codes):
    """Cross-entropy, nats, of val's targets under the frequencies of train's, add-one: what a model must beat."""
    counts = []
    for streams in (train, val):
        count = np.zeros(n_codes)
        for tokens, (first, last) in zip(streams.tokens, streams.targets):
            for i in range(int(first), int(last), 1 << 20):  # mapped tokens: a piece at a time
                count += np.bincount(tokens[i:min(i + (1 << 20), int(last)), column], minlength=n_codes)
        counts.append(count)
    share = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * np.log(share)).sum() / counts[1].sum())


# ----------------------------------------------------------------------------------------------------------------------
# The model

def new_model(config, tokenizer, series, train, block_size):
    """A model of the config's sizes for these tokens."""
    k1, k2 = tokenizer.config.coarse_bits, tokenizer.config.fine_bits
    moves = [np.diff(bars.ohlcva[a - 1:b, 3]) for bars, (a, b) in zip(series, train.targets) if a < b]
    n_bars, n_moved = sum(map(len, moves)), sum(map(np.count_nonzero, moves))
    sizes = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)}
    sizes |= dict(coarse_bits=k1, fine_bits=k2, block_size=block_size, unmoved=1 - int(n_moved) / max(1, n_bars))
    torch.manual_seed(config.seed)  # here, since what came before took chance in other amounts on other ranks
    try:
        model = Model(ModelConfig(**sizes))
    except ValueError as e:
        raise UserError(f"the model's sizes do not fit: {e}")
    # with a direction bit the upper half; without, the codes that decode so
    model.up_mask.copy_(tokenizer.decode(torch.arange(2**k1))[:, 0] > 0)
    return model


def compile_blocks(model, shape, device, autocast, say):
    """torch.compile for each layer, or not at all, with a line that says why. shape: of the tokens in a forward pass.

    Layers alone: they are alike, so one compilation serves all, while the whole model would be compiled anew for each
    border phase, which changes its shapes.
    """
    try:
        for block in model.blocks:
            block.compile(dynamic=False)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        with autocast():
            loss = model(tokens, tokens, tokens, targets=(tokens, tokens))[2]
        loss.backward()
    except Exception as e:  # a missing compiler, an unsupported platform: many kinds
        for block in model.blocks:
            block._compiled_call_impl = None  # what Module.compile sets
        say(f"--compile does not work here ({type(e).__name__}: {str(e).splitlines()[0][:90]}); going on without")
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(model, val, tiles, series, autocast, rank, world):
    """Over the targets in the tiles of val: coarse and fine CE, nats, and the share of right calls of bars that moved."""
    model.eval()
    device, n, n_rows = model.up_mask.device, val.block_size, max(1, 8192 // val.block_size)
    sums = np.zeros(5)  # targets, coarse, fine; bars called right, bars that moved
    for i in range(rank * n_rows, len(tiles), world * n_rows):
        which, ends = (np.array(a) for a in zip(*tiles[i:i + n_rows]))
        coarse, fine, when, target = data.gather(val, which, ends)
        target = tuple(t.to(device) for t in target)
        with autocast(), torch.compiler.set_stance("force_eager"):  # not worth compilations of its own
            logits, _, _ = model(coarse.to(device), fine.to(device), when.to(device), target)
        is_target = target[0] >= 0
        n_targets = is_target.sum().item()
        change = np.stack([np.diff(series[s].ohlcva[e - n:e + 1, 3]) for s, e in zip(which, ends)])  # (B, T)
        up = logits.float().softmax(-1)[..., model.up_mask].sum(-1) / (1 - model.config.unmoved) > 0.5
        scored = is_target.cpu().numpy() & (change != 0)
        right = (up.cpu().numpy() == (change > 0))[scored].sum()
        sums += n_targets, *(model.parts[k].item() * n_targets for k in ("coarse", "fine")), right, scored.sum()
    sums = torch.tensor(sums, device=device)
    if world > 1:
        dist.all_reduce(sums)
    model.train()
    n_targets, coarse, fine, right, n_moved = sums.tolist()
    return coarse / n_targets, fine / n_targets, right / max(1, n_moved)


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main():
    given = data.cli(Config, __doc__)
    config, entry = Config(**given), None
    if config.resume:
        config, entry = resumed(given, Config, FREE, ("tokenizer", "pretrain"))
    check(config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = data.pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size < world:
        raise UserError(f"--batch_size {config.batch_size}: fewer windows than the {world} processes; "
                        f"give at least one for each")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # broadcasts and barriers use the current device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    say = print if rank == 0 else lambda *a, **k: None
    if entry is None and rank == 0:
        data.check_out(config.out, config.overwrite, (config.init_from, config.tokenizer, *(config.data or ())))
    trained = entry if entry and entry["stage"] == "pretrain" else None  # resumed, and the model's training has begun
    if trained and trained["step"] >= config.steps:
        return say(f"{config.out}: finished at step {trained['step']}; nothing to do")
    stop = data.StopSignal()

    # ---- bars, splits, sizes
    began = time.time()
    base = load_checkpoint(config.init_from, weights="best") if config.init_from and not trained else None
    best_da = None
    if config.data is None:
        series, best_da = data.synthetic(seed=config.seed)
        say(f"no --data: training on the synthetic market, where at best {best_da:.0%} of directions can be called right")
    else:
        series = data.load(config.data)
    source = {"sources": config.data or ["synthetic"], "fingerprint": data.fingerprint(series)}
    if entry and entry["data"] != source:
        raise UserError(f"{', '.join(source['sources'])}: not the bars that the run in {config.out} began with (fingerprint "
                        f"{source['fingerprint']}, was {entry['data']['fingerprint']}); give it those, or another --out")
    borders = entry["splits"] if entry else split(config, series, base)
    block_size, series = fit_window(config, series, borders, source["sources"], say)
    if not any(first < last for first, last in (data.targets_of(bars, "val", borders) for bars in series)):
        raise UserError(f"no symbol has a val bar between {data.iso(borders[0])} and {data.iso(borders[1])}; "
                        f"move --val_start, --test_start")
    n_train = sum(max(0, last - first) for first, last in (data.targets_of(bars, "train", borders) for bars in series))
    if config.steps == 0:
        config.steps = int(np.clip(4 * n_train // (config.batch_size * block_size), 100, 600))
    say(f"{len(series)} symbols, {sum(map(len, series)):,} bars, {n_train:,} to train on; "
        f"val from {data.iso(borders[0])}, test from {data.iso(borders[1])}")

    # ---- tokenizer
    metrics = entry["metrics"] if entry else []
    meta = dict(data=source, splits=borders, seed=config.seed, run=asdict(config),
                features=dict(channels=data.CHANNELS, half_life=data.HALF_LIFE))
    if trained:  # its own, whatever --init_from and --tokenizer hold by now
        tokenizer = Tokenizer.load(trained["tokenizer"])
    elif base:
        tokenizer = base[1]
    elif config.tokenizer:
        tokenizer = Tokenizer.load(read_checkpoint(config.tokenizer)["tokenizer"])
    elif rank == 0:
        tokenizer = tokenizer_stage(config, series, borders, n_train, entry, meta, metrics, stop, device)
    if world > 1:
        shared = [tokenizer.dump() if rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        tokenizer = Tokenizer.load(shared[0])

    # ---- tokens and batches
    if rank == 0:
        tokens = [data.tokenize(bars, tokenizer) for bars in series]  # of mapped bars kept on disk, for the others too
    if world > 1:
        dist.barrier()
        if rank > 0:
            tokens = [data.tokenize(bars, tokenizer) for bars in series]
    train = data.make_streams(series, tokens, "train", borders, block_size, config.batch_size)
    val = data.make_streams(series, tokens, "val", borders, block_size, config.batch_size)
    tiles = data.tiles(val, config.eval_windows)

    # ---- model and optimizer
    if trained:
        model, _, _ = load_checkpoint(config.out, weights="last")
    elif base:
        model = base[0]
        model.config.block_size = block_size
    else:
        model = new_model(config, tokenizer, series, train, block_size)
    model.to(device).train()
    model.grad_ckpt = config.grad_ckpt
    dtype_name, dtype = data.pick_dtype(config.dtype, device)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype_name != "fp32")
    optimizer = adamw(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_name == "fp16")
    threads = torch.get_num_threads()
    step, bad_steps, best, best_val = 0, 0, None, math.inf
    if trained:
        optimizer.load_state_dict(trained["optimizer"])
        scaler.load_state_dict(trained["scaler"])
        step, bad_steps, best, best_val = (trained[k] for k in ("step", "bad_steps", "best", "best_val"))
        if (trained["world"], trained["threads"]) != (world, threads):
            say(f"{trained['world']} processes of {trained['threads']} threads before, {world} of {threads} now: "
                f"the weights will agree to rounding, not to the bit")
    if config.compile:
        rows = -(-config.batch_size // world)
        say("compiling the layers, which takes a minute or two", flush=True)
        compile_blocks(model, (min(rows, config.micro_batch or rows), block_size), device, autocast, say)
    forward = model
    if world > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(forward, device_ids=device_ids)
    n_params = sum(p.numel() for p in model.parameters())
    say(f"{n_params / 1e6:.2f} M parameters, {config.batch_size * block_size:,} bars a step, {config.steps} steps; "
        f"{device}, {dtype_name}, {world} process{'es' * (world > 1)} of {threads} threads")

    def save():
        if rank == 0:
            save_checkpoint(config.out, model, tokenizer, **meta, stage="pretrain", best=best, best_val=best_val,
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, bad_steps=bad_steps,
                            metrics=metrics, world=world, threads=threads)

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 10)
    say(f"{'step':>6}{'train':>9}{'val':>9}{'coarse':>8}{'fine':>8}{'right':>8}{'lr':>8}{'|grad|':>7}{'bars/s':>8}{'left':>8}")
    model_began = saved_at = time.time()
    from_step, train_loss, n_losses, eval_seconds = step, 0.0, 0, 0.0
    while step < config.steps:
        coarse, fine, when, target = data.get_batch(train, config.seed, step, rank, world)
        chance = np.random.default_rng([config.seed, step, 1])
        phase = int(chance.integers(model.config.border))
        # symbols of one day move together: a model that can tell the date learns the days by heart
        weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, (config.batch_size, 1))[rank::world]
        when = when + torch.from_numpy(weeks * 7 * data.DAY)
        n_rows = len(coarse)
        micro = config.micro_batch or n_rows
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        step_loss = 0.0
        for i in range(0, n_rows, micro):
            part = [a[i:i + micro].to(device, non_blocking=True) for a in (coarse, fine, when, *target)]
            last = i + micro >= n_rows
            with forward.no_sync() if world > 1 and not last else contextlib.nullcontext():  # one exchange a step
                with autocast():
                    loss = forward(*part[:3], targets=(part[3], part[4]), phase=phase)[2]
                weight = len(part[0]) * world / config.batch_size  # DDP averages over the ranks
                scaler.scale(loss * weight).backward()
                step_loss += (model.parts["coarse"] + model.parts["fine"]).item() * weight / world
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
        losses = torch.tensor([step_loss, float(stop.signum)], dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(losses)  # the loss of the whole batch, and an agreement to stop
        if math.isfinite(losses[0].item()) and math.isfinite(norm):
            scaler.step(optimizer)
            bad_steps = 0
            train_loss, n_losses = train_loss + losses[0].item(), n_losses + 1
        else:  # norm is the same on every rank, so all skip together
            bad_steps += 1
            say(f"{step + 1:>7} loss {losses[0].item()}, gradient norm {norm}: not finite, step skipped")
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(f"{MAX_BAD_STEPS} steps in a row were not finite, the last of them step {step + 1}: start "
                                f"again with a lower --lr (now {config.lr}), or with --dtype fp32")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % eval_every == 0 or step == config.steps:
            spent = time.time()
            val_coarse, val_fine, da = evaluate(model, val, tiles, series, autocast, rank, world)
            val_loss = val_coarse + val_fine
            eval_seconds += time.time() - spent
            speed = (step - from_step) * config.batch_size * block_size / (time.time() - model_began - eval_seconds)
            left = (time.time() - model_began) / (step - from_step) * (config.steps - step)
            train_loss = train_loss / max(1, n_losses)
            metrics.append(dict(stage="pretrain", step=step, train=train_loss, val=val_loss, coarse=val_coarse,
                                fine=val_fine, da=da, lr=lr, grad_norm=norm, bars_per_s=speed))
            data.progress("")
            say(f"{step:>6}{train_loss:>9.4f}{val_loss:>9.4f}{val_coarse:>8.4f}{val_fine:>8.4f}{da:>8.2%}{lr:>8.1e}{norm:>7.2f}"
                f"{speed:>8,.0f}{datetime.timedelta(seconds=round(left))!s:>8}", flush=True)
            train_loss, n_losses = 0.0, 0
            if val_loss < best_val:
                best_val, best = val_loss, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        elif rank == 0:
            data.progress(f"step {step}/{config.steps}  loss {losses[0].item():.4f}")
        stopping = losses[1].item() > 0
        if step == config.steps or step % config.save_every == 0 or stopping or time.time() - saved_at > SAVE_SECONDS:
            save()
            saved_at = time.time()
        if stopping:
            say(f"stopped at step {step}; saved in {config.out}; go on with --resume")
            raise SystemExit(stop.status)

    # ---- what came of it
    row = min((m for m in metrics if "val" in m), key=lambda m: m["val"])  # of the weights that forecasts use
    marks = unigram(train, val, 0, 2**tokenizer.config.coarse_bits), unigram(train, val, 1, 2**tokenizer.config.fine_bits)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)  # bytes, kB
    say(f"\n{'nats per bar, val, best':<28}{'model':>9}{'unigram':>9}")
    say(f"{'  coarse token':<28}{row['coarse']:>9.4f}{marks[0]:>9.4f}")
    say(f"{'  fine token':<28}{row['fine']:>9.4f}{marks[1]:>9.4f}")
    say(f"{'direction accuracy, val':<28}{row['da']:>9.2%}" + (f"{best_da:>9.2%}  best reachable" if best_da else ""))
    say(f"{'time, peak memory':<28}{time.time() - began:>8.0f}s{memory:>8.2f}G")
    say(f"{config.out}: step {step}, best val {best_val:.4f}; forecast with: python sample.py --ckpt {config.out}")
    if world > 1:
        dist.destroy_process_group()


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
    data.run(alone_or_together)
