"""Stage 3: learn on the model's own bars, with the truth as guide and target: rollouts.

    python rollout.py --ckpt out.pt --out rollout.pt                    # on the bars that out.pt was trained on
    python rollout.py --ckpt out.pt --target chosen --out rollout.pt    # the walks themselves as targets
    python rollout.py --ckpt out.pt --out rollout.pt --resume           # go on after a kill, to the same weights, bit for bit

In pretraining every bar of the context is real; in a forecast all but the first step follow the model's own bars. So here
the model walks on from the end of a window: at each step it draws K candidates, and the one whose return is nearest to
that of the true bar goes on (Ross, Gordon and Bagnell, arXiv 1011.0686: learn under the own states from the expert's
actions). The targets:

    true     the true tokens; the walk enters the context alone
    chosen   the tokens of the walk

    loss = walk mean_k w_k CE(target of bar k) + kl mean_k KL_k(pi || base) + pretraining's loss,   w_k = 1 + 0.75 k / (H - 1)

The truth only picks which of the model's own candidates becomes the next bar of the context; no true value enters it, and
a forecast needs no guide. Kept are the weights with the best path CRPS on val, if it is surely (95 %) better than the
base's; else the base.
"""
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

import backtest
import data
from backstage.clock import future_times
from backstage.checkpoint import sources_of
from backstage.files import check_out, sole_writer
from backstage.loop import (
    Clock, Optimizer, Run, begin, load_optimizer, precision, rate, resumed, stop_here)
from backstage.scores import against, at_step, block_sums, bootstrap
from backstage.script import StopSignal, UserError, check_numbers, cli, pick_device, progress, run
from backstage.series import DAY
from model import kl, load_checkpoint, mean_nats, save_checkpoint


@dataclass
class Config:
    ckpt: str | None = None           # checkpoint to start from, the frozen base
    data: list[str] | None = None     # bars; none: those that the checkpoint was trained on
    out: str = "rollout.pt"           # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    target: str = "true"              # true or chosen
    horizon: int = 10                 # bars of a path on val and test; a walk has 3, 6, then all of them
    candidates: int = 8               # K: candidates at each step of a walk
    temperature: float = 1.5          # of the candidates
    walk: float = 1.0                 # weight of the loss on a walk
    kl: float = 0.05                  # weight of KL(pi || base) along a walk, nats per bar
    steps: int = 150                  # updates
    batch_size: int = 16              # windows per update
    block_size: int = 0               # real bars before a walk; 0: as the checkpoint was trained
    lr: float = 0.002                 # peak learning rate of Muon (matrices of the layers)
    adam_lr: float = 3e-4             # peak learning rate of AdamW (all else)
    warmup: int = 10                  # updates of warm-up
    weight_decay: float = 0.0         # on matrices
    clip: float = 1.0                 # largest gradient norm
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    backtest: bool = True             # at the end, base beside result on the test bars
    paths: int = 200                  # sampled futures of each origin, in that backtest
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between checks on val; 0: a sixth of the run
    save_every: int = 50              # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "backtest", "paths", "eval_every", "save_every"}
HISTORY = 512        # bars that a walk's scale is made from: 16 half-lives, so that what is older weighs 1e-5
LATER = 0.75         # by how much the last step of a walk weighs more than the first
VAL_BARS, VAL_ORIGINS = 12_000, 400  # of val, looked at in training, about
VAL_PATHS = 50       # from each of these origins
ORIGINS = 1000       # of paths on test, about


def check(config):
    positive = ("horizon", "candidates", "temperature", "steps", "batch_size", "lr", "adam_lr", "clip", "paths", "save_every")
    check_numbers(config, positive, ("walk", "kl", "block_size", "warmup", "weight_decay", "shift_weeks",
                                          "eval_every", "seed"))
    if config.ckpt is None:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if config.target not in ("true", "chosen"):
        raise UserError(f"--target {config.target}: choose true or chosen")
    if config.paths < 2:
        raise UserError(f"--paths {config.paths}: at least 2")


# ----------------------------------------------------------------------------------------------------------------------
# The walk

@dataclass
class Origins:
    """Where the walks of a batch begin, and where the market really went."""
    context: tuple         # coarse, fine, time int64 [B, L] of the real bars up to the origin, and their targets as get_batch
    times: torch.Tensor    # int64 [B, H]: stamps of the next bars, as a forecast would guess them
    tokens: torch.Tensor   # int64 [B, H, 2]: the next bars, coarse and fine
    state: data.State      # of shape [B, 1]: what decodes the next bar
    moves: np.ndarray      # float64 [B, H]: log returns of the next bars

    def moved(self, later, device):
        """The same with all stamps later by so many seconds, int64 [B, 1], on the device."""
        coarse, fine, time, target = self.context
        context = coarse.to(device), fine.to(device), (time + later).to(device), [a.to(device) for a in target]
        return replace(self, context=context, times=(self.times + later).to(device), tokens=self.tokens.to(device))


def origins_of(streams, series, slots, which, ends, horizon, longest):
    """Origins in the windows (symbol, last target) of `streams`, which have room for `longest` bars after the origin.

    slots: the data.Slots of each series.
    """
    coarse, fine, when, target = data.gather(streams, which, ends)
    n = coarse.shape[1] - longest + 1  # real bars of a window up to the origin
    tokens = torch.stack(target, -1)[:, n - 1:n - 1 + horizon]
    target = [a[:, :n].clone() for a in target]
    for a in target:
        a[:, -1] = -1  # the walk's first bar, which the walk itself teaches
    times, states, moves = [], [], []
    for i, e in zip(which, ends):
        bars, o = series[i], e - longest  # o: row of the origin
        times.append(future_times(bars.time[:o + 1], horizon))
        rows = slice(max(0, o + 1 - HISTORY), o + 1)
        *_, (_, state) = data.feature_pieces(bars[rows], log_factors=slots[i].log_factors[rows])
        states.append(state.anchored(slots[i].coming(o, times[-1])))
        moves.append(np.diff(np.log(bars.ohlcva[o:o + 1 + horizon, 3])))
    context = coarse[:, :n], fine[:, :n], when[:, :n], target
    return Origins(context, torch.from_numpy(np.stack(times)), tokens, data.State.stack(states), np.stack(moves))


@torch.no_grad()
def guided_walk(model, tokenizer, state, origins, uniform, temperature):
    """Tokens int64 [B, H, 2] of walks of H bars from `state`, the model's after each context, which is used up.

    At each step the candidate whose log return is nearest to that of the true bar goes on. uniform [B, K, H, 2] is the
    chance of the K candidates; with K = 1 the truth has no say.
    """
    B, K, H, _ = uniform.shape
    chosen, before, rows = [], origins.state, np.arange(B)
    for k in range(H):
        drawn = model.sample(state.h[:, None].expand(-1, K, -1), temperature, u=uniform[:, :, k])
        bars, after = data.inverse(tokenizer.decode(*drawn).cpu().numpy()[:, :, None], before)      # [B, K, 1, 6]
        error = np.abs(np.log(bars[:, :, 0, 3] / before.close) - origins.moves[:, k, None])         # [B, K]
        pick = error.argmin(1)
        before = after.map(lambda f: f[rows, pick][:, None])
        token = torch.stack(drawn, -1)[torch.from_numpy(rows), torch.from_numpy(pick)]              # [B, 2]
        chosen.append(token)
        if k + 1 < H:
            model.step(token[:, 0], token[:, 1], origins.times[:, k:], state)
    return torch.stack(chosen, 1)


def walk_loss(model, base, origins, walk, target, config):
    """The loss of walks [B, H, 2], which enter the context, with targets [B, H, 2]; and its parts, as floats."""
    coarse, fine, when, real = origins.context
    n, H = coarse.shape[1], walk.shape[1]
    inputs = (torch.cat((coarse, walk[:, :-1, 0]), 1), torch.cat((fine, walk[:, :-1, 1]), 1),
              torch.cat((when, origins.times[:, :-1]), 1))                      # [B, n + H - 1]
    h = model.hidden(*inputs)
    given = torch.cat((real[0][:, :-1].clamp(min=0), target[..., 0]), 1)
    coarse_logits, fine_logits = model.coarse_logits(h), model.fine_logits(h, given)
    plain = mean_nats(coarse_logits[:, :n], real[0]) + mean_nats(fine_logits[:, :n], real[1])
    log_coarse, log_fine = (a[:, n - 1:].float().log_softmax(-1) for a in (coarse_logits, fine_logits))  # [B, H, 2^k]
    log_p = log_coarse.gather(-1, target[..., :1]) + log_fine.gather(-1, target[..., 1:])           # [B, H, 1]
    weight = 1 + LATER * torch.arange(H, device=h.device) / max(1, H - 1)
    own = -(log_p[..., 0] * weight).mean()
    with torch.no_grad():
        h_base = base.hidden(*inputs)[:, n - 1:]
        base_coarse = base.coarse_logits(h_base).float().log_softmax(-1)
        base_fine = base.fine_logits(h_base, target[..., 0]).float().log_softmax(-1)
    away = (kl(log_coarse, base_coarse) + kl(log_fine, base_fine)).mean()
    return config.walk * own + config.kl * away + plain, dict(loss=own.item(), plain=plain.item(), kl=away.item())


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main():
    given = cli(Config, __doc__)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}."""
    config, entry = resumed(given, Config, FREE, ("rollout",)) if given.get("resume") else (Config(**given), None)
    check(config)
    device = pick_device(config.device)
    if entry is None:
        check_out(config.out, config.overwrite, (config.ckpt, *(config.data or sources_of(config.ckpt))))
    elif entry["step"] >= config.steps:
        return print(f"{config.out}: finished at step {entry['step']}; nothing to do")
    stop = StopSignal()

    # ---- the base and its bars, the model in training
    began = time.time()
    longest = config.horizon
    room = longest - 1
    base, model, tokenizer, meta, series, train, reports = begin(config, entry, device, room)
    # until some weights qualify, the base's are those that forecasts use
    run = Run.of(entry) if entry else Run(best=base.state_dict(), metrics=reports)
    autocast, scaler, dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    if entry:
        load_optimizer(optimizer, entry, config.out)
    t = backtest.some_targets(series, "val", meta["splits"], longest, VAL_ORIGINS, config.seed, most=VAL_BARS)
    if config.backtest:
        final = backtest.some_targets(series, "test", meta["splits"], longest, ORIGINS, config.seed)

    def scores(model):  # paths go by Model.step: no autocast
        return backtest.drawn_scores(model, tokenizer, t, VAL_PATHS, probes=0)

    base_scores = scores(base)
    slots = [data.slots_of(bars) for bars in series]
    print(f"{config.target}: {len(series)} symbols, {int(train.windows[-1]):,} windows of "
          f"{train.block_size - room} bars, {config.batch_size} a step, {config.steps} steps; {device}, {dtype} ({why})")
    print(f"checked on {len(t.path_r):,} origins of val; the base: path CRPS "
          f"{at_step(base_scores, 'path_crps', None)[0]:.4f}, mean over {longest} bars")

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 6)
    print(f"{'step':>5}{config.target:>9}{'plain':>9}{'KL':>8}   path CRPS to the base, val {'in 90 %':>10}{'left':>9}")
    clock = Clock(run.step, config.steps, config.save_every)
    while run.step < config.steps:
        chance = np.random.default_rng([config.seed, run.step, 1])
        weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, (config.batch_size, 1))
        later = torch.from_numpy(weeks * 7 * DAY)
        windows = data.draw_windows(train, config.seed, run.step)
        optimizer.set_rate(rate(run.step, config.steps, config.warmup))
        horizon = min(longest, (3, 6, longest)[3 * run.step // config.steps])   # short walks first
        origins = origins_of(train, series, slots, *windows, horizon, longest).moved(later, device)
        uniform = chance.random((config.batch_size, config.candidates, horizon, 2), np.float32)
        with torch.no_grad(), autocast():
            state = model.prefill(*origins.context[:3])
        uniform = torch.from_numpy(uniform).to(device)
        walk = guided_walk(model, tokenizer, state, origins, uniform, config.temperature)
        target = origins.tokens if config.target == "true" else walk
        with autocast():
            loss, shown = walk_loss(model, base, origins, walk, target, config)
        scaler.scale(loss).backward()
        norm_now = run.update(model, optimizer, scaler, loss.item(), config.clip)
        run.losses.append(shown)

        if run.step % eval_every == 0 or run.step == config.steps:
            now = scores(model)
            ratio = against(now, base_scores, "path_crps", t, None)
            path_crps, inside = (float(at_step(now, m, None)[0]) for m in ("path_crps", "path_coverage90"))
            if ratio["hi"] is not None and ratio["hi"] < 1:
                run.keep_if_best(model, path_crps)
            mean = {k: float(np.mean([s[k] for s in run.losses if math.isfinite(s[k])] or [math.nan])) for k in shown}
            run.metrics.append(dict(stage="rollout", step=run.step, train=mean["loss"], plain=mean["plain"],
                                    kl=mean["kl"], grad_norm=norm_now, path_crps=path_crps, path_crps_ratio=ratio,
                                    path_coverage90=inside))
            run.losses = []
            progress("")
            print(f"{run.step:>5}{mean['loss']:>9.4f}{mean['plain']:>9.4f}{mean['kl']:>8.4f}"
                  f"   {backtest.show(ratio, 1, 4):<27}{inside:>10.1%}{clock.left(run.step)!s:>9}", flush=True)
        else:
            progress(f"step {run.step}/{config.steps}  loss {shown['loss']:.4f}")
        if clock.save_due(run.step) or stop.signum:
            save_checkpoint(config.out, model, tokenizer, **meta, **vars(run), stage="rollout", average=None,
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), dtype=dtype)
        if stop.signum:
            stop_here(stop, run, config.out)

    # ---- what came of it
    stop.release()
    if math.isinf(run.best_val):
        print(f"no weights had a surely better path CRPS on val: {config.out} holds the base")
    else:
        print(f"{config.out}: weights of path CRPS {run.best_val:.4f} on val; forecast with: python sample.py --ckpt {config.out}")
    if config.backtest:
        result, _, _ = load_checkpoint(config.out, device)
        print(f"\n{backtest.heading(final, meta)}")
        print_paths({"base": base, "result": result}, tokenizer, final, config.paths)
    print(f"{time.time() - began:.0f} s")


def print_paths(models, tokenizer, t, paths):
    """Two models {name: model} side by side, and persistence: the median path bar by bar, then the greedy path."""
    columns = {name: backtest.drawn_scores(model, tokenizer, t, paths) for name, model in models.items()}
    still = dict(path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r))
    columns["still"] = bootstrap(block_sums(still, t), t)
    rows = [("da", "right calls, %", 100, 2), ("mae", "MAE", 1, 4), ("crps", "CRPS", 1, 4)]
    for metric, label, scale, digits in (("path_crps", "path CRPS", 1, 4), ("path_mape", "path MAPE %", 1, 4),
                                         ("path_coverage90", "in 90 % band, %", 100, 1)):
        rows.append(((metric, None), f"{label}, mean", scale, digits))
        rows += [((metric, k - 1), f"  bar {k}", scale, digits) for k in sorted({1, (t.horizon + 1) // 2, t.horizon})]
    backtest.print_versus(columns, t, rows, versus=(1, 0))
    greedy = {}
    for name, model in models.items():
        path = backtest.simulated(model, tokenizer, t, 1, temperature=1e-6)
        greedy[name] = bootstrap(block_sums(path, t), t)
    print("the greedy path (likeliest tokens):")
    backtest.print_versus(greedy, t, [(("path_mape", None), "path MAPE %, mean", 1, 4)])


if __name__ == "__main__":
    run(main)
