"""Stage 2: lean the model up before rises and down before falls, at next to no cost in numeric accuracy.

    python expo.py --ckpt out.pt --out expo.pt                     # on the bars that out.pt was trained on
    python expo.py --ckpt out.pt --data bars.csv --pairs drawn --out expo.pt
    python expo.py --ckpt out.pt --out expo.pt --resume            # go on after a kill, to the same weights bit for bit

Next-token training weighs every code alike; whether the close rises is one bit of twenty. Regression EXPO (Hu, Kong, He
and Wipf 2025, arXiv 2506.07492) learns from pairs, w better than l, beside a frozen copy `ref` of the model:

    loss = (sigmoid(log pi(w) / pi(l)) - y)^2 + beta KL(pi || ref),    y = lam sigmoid(log ref(w) / ref(l)) + (1 - lam)

Two ways to a pair. `set` takes all up tokens against all down tokens: log pi(w)/pi(l) = logit P(up), in closed form, so
that nothing is drawn. `drawn` takes candidates from the reference, and the true bar among them, and scores them.

How much of an edge is kept? Where the reference says 1/2 and the truth is 1/2 + e, the optimum of `set` is, for small e,

    P(up) = 1/2 + e (1 - lam) / (1 + 2 beta)

since KL is 2 d^2 at 1/2 + d. With lam = 0 the first term is the Brier score of P(up), a proper score.

Bars that hardly moved carry no label. Kept are the weights with the best log loss of P(up) on val, if it is surely (95 %)
better than the reference's, and MAE and CRPS are surely within 0.5 % of the reference's; else the reference.
"""
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

import backtest
import data
from backstage.checkpoint import sources_of
from backstage.files import check_out, sole_writer
from backstage.loop import (
    Clock, Optimizer, Run, begin, load_optimizer, precision, rate, resumed, stop_here)
from backstage.scores import against
from backstage.script import StopSignal, UserError, check_numbers, cli, pick_device, progress, run
from backstage.series import DAY
from model import close_table, draw, kl, load_checkpoint, save_checkpoint


@dataclass
class Config:
    ckpt: str | None = None           # checkpoint to start from, the frozen reference
    data: list[str] | None = None     # bars; none: those that the checkpoint was trained on
    out: str = "expo.pt"              # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    pairs: str = "set"                # set or drawn
    lam: float = 0.0                  # share of the reference in the target: 1 holds still, 0 is the data alone
    beta: float = 0.1                 # weight of KL(pi || ref), nats per bar
    candidates: int = 192             # drawn for each labelled bar (pairs drawn)
    labels: int = 32                  # labelled bars that get candidates, a window on average (pairs drawn)
    margin: float = 0.5               # by which w's score must exceed that of l (pairs drawn)
    noise: float = 0.1                # a close that moved by less than this share of s_t carries no label
    steps: int = 150                  # updates
    batch_size: int = 16              # windows per update
    block_size: int = 0               # bars in a window; 0: as the checkpoint was trained
    lr: float = 0.02                  # peak learning rate of Muon (matrices of the layers)
    adam_lr: float = 3e-3             # peak learning rate of AdamW (all else)
    warmup: int = 10                  # updates of warm-up
    weight_decay: float = 0.0         # on matrices
    clip: float = 1.0                 # largest gradient norm
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    backtest: bool = True             # at the end, reference beside result on the test bars
    horizon: int = 10                 # bars ahead, in that backtest
    paths: int = 50                   # sampled futures of each origin, in that backtest
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between checks on val; 0: a sixth of the run
    save_every: int = 50              # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "backtest", "horizon", "paths", "eval_every", "save_every"}
VAL_BARS = 12_000    # bars of val looked at in training, about
ORIGINS = 1000       # origins of paths on test, about
ERROR_WEIGHT = 0.25  # of a candidate's error, beside 1 for the right direction
PIECE = 4            # labelled bars whose candidates are drawn at a time: 2^k2 logits each, which stay in the cache
SHOWN = (("da", "right calls, %", 100, 2), ("up_share", "called up, %", 100, 1),  # score, label, factor, digits
         ("logloss", "log loss of P(up)", 1, 4), ("ece", "calibration, %", 100, 2),
         ("mae", "MAE", 1, 4), ("crps", "CRPS", 1, 4),
         ("path_mape", "path MAPE %, last bar", 1, 3), ("path_crps", "path CRPS, last bar", 1, 3))


def check(config):
    positive = ("candidates", "labels", "steps", "batch_size", "lr", "adam_lr", "clip", "horizon", "paths", "save_every")
    check_numbers(config, positive, ("lam", "beta", "margin", "noise", "block_size", "warmup", "weight_decay",
                                          "shift_weeks", "eval_every", "seed"))
    if config.ckpt is None:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if config.lam > 1:
        raise UserError(f"--lam {config.lam}: a share, at most 1")
    if config.paths < 2:
        raise UserError(f"--paths {config.paths}: at least 2")
    if config.pairs not in ("set", "drawn"):
        raise UserError(f"--pairs {config.pairs}: choose set or drawn")


# ----------------------------------------------------------------------------------------------------------------------
# The loss, and the pairs it is fed

def expo_loss(log_ratio, ref_log_ratio, lam):
    """Regression EXPO, element by element: of log_ratio = log pi(w)/pi(l), and of the reference's, of the same shape."""
    return (log_ratio.sigmoid() - (lam * ref_log_ratio.sigmoid() + 1 - lam)).square()


def logit_up(model, log_coarse):
    """log P(up) / P(not up) [...] from the coarse log-probabilities [..., 2^k1]."""
    return log_coarse[..., model.up_mask].logsumexp(-1) - log_coarse[..., ~model.up_mask].logsumexp(-1)


@torch.no_grad()
def draw_losers(reference, table, h, move, uniform):
    """The worst of the candidates for the next bar, drawn from the reference, and how far it is behind the true bar.

    A candidate's score is 1 if its direction is right, less a quarter of its error relative to the true move. The true
    bar, which is one of the candidates, has the score 1: none is better, so it is w.

    h [N, C]: hidden states of the reference; table [2^k1, 2^k2]: close feature of every pair of tokens; move [N]: log
    return / s_t of the true bar, not 0; uniform [N, candidates, 2]: the chance. Returns the tokens (coarse, fine) of l,
    int64 [N, 2], and 1 - its score [N].
    """
    coarse = draw(reference.coarse_logits(h), 1.0, 1.0, uniform[..., 0].contiguous())               # [N, candidates]
    losers, behind = [], []
    for h, move, coarse, u in zip(h.split(PIECE), move.split(PIECE), coarse.split(PIECE), uniform[..., 1:].split(PIECE)):
        fine = draw(reference.fine_logits(h[:, None], coarse), 1.0, 1.0, u)[..., 0]
        close, true = table[coarse, fine].sinh(), move[:, None]                                     # log return / s_t
        right = (close > 0) == (true > 0)
        score = right.float() - ERROR_WEIGHT * (close - true).abs() / true.abs()
        worst = score.argmin(1, keepdim=True)
        losers.append(torch.cat((coarse.gather(1, worst), fine.gather(1, worst)), 1))
        behind.append(1 - score.gather(1, worst)[:, 0])
    return torch.cat(losers), torch.cat(behind)


def log_odds(model, h, log_coarse, pair):
    """log pi(w) / pi(l) [N] of pairs of tokens [N, 2, 2], from h [N, C] and the coarse log-probabilities [N, 2^k1]."""
    coarse, fine = pair.unbind(-1)                                                                  # [N, 2]
    log_fine = model.fine_logits(h[:, None].expand(-1, 2, -1), coarse).float().log_softmax(-1)      # [N, 2, 2^k2]
    both = log_coarse.gather(1, coarse) + log_fine.gather(2, fine[..., None])[..., 0]
    return both[:, 0] - both[:, 1]


def said(model, batch):
    """What a model says of the targets that count: h [N, C], coarse and fine log-probabilities [N, 2^k1], [N, 2^k2]."""
    coarse, fine, when, *target = batch
    counts = target[0] >= 0
    h = model.hidden(coarse, fine, when)[counts]
    log_coarse = model.coarse_logits(h).float().log_softmax(-1)
    return h, log_coarse, model.fine_logits(h, target[0][counts]).float().log_softmax(-1)


def loss_of(model, reference, table, batch, chance, config):
    """The loss of a batch, and what the report shows of it, a dict of floats.

    batch: coarse, fine, time, target_coarse, target_fine, as data.get_batch gives; chance: a numpy generator. Shown: the
    loss without its KL; kl; odds, the median of log ref(w)/ref(l), NaN without a pair.
    """
    target = batch[3:]
    counts = target[0] >= 0
    came = torch.stack((target[0][counts], target[1][counts]), 1)                                   # [N, 2]
    h, log_coarse, log_fine = said(model, batch)
    with torch.no_grad():
        h_ref, ref_coarse, ref_fine = said(reference, batch)
    away = (kl(log_coarse, ref_coarse) + kl(log_fine, ref_fine)).mean()
    move = table[came[:, 0], came[:, 1]].sinh()                                                     # log return / s_t
    rows = (move.abs() > config.noise).nonzero()[:, 0]                                              # that carry a label
    if config.pairs == "set":
        sign = move[rows].sign()
        odds, ref_odds = sign * logit_up(model, log_coarse[rows]), sign * logit_up(model, ref_coarse[rows])
    else:
        keep = chance.permutation(len(rows))[:config.labels * len(target[0])]
        rows = rows[torch.from_numpy(np.sort(keep)).to(rows.device)]
        uniform = torch.from_numpy(chance.random((len(rows), config.candidates, 2), np.float32)).to(h.device)
        losers, behind = draw_losers(reference, table, h_ref[rows], move[rows], uniform)
        clear = behind >= config.margin
        rows, pair = rows[clear], torch.stack((came[rows], losers), 1)[clear]                       # [N, 2, 2]
        odds = log_odds(model, h[rows], log_coarse[rows], pair)
        with torch.no_grad():
            ref_odds = log_odds(reference, h_ref[rows], ref_coarse[rows], pair)
    expo = expo_loss(odds, ref_odds, config.lam).sum() / max(1, len(rows))
    shown = dict(loss=expo.item(), kl=away.item(), odds=ref_odds.median().item() if len(rows) else math.nan)
    return expo + config.beta * away, shown


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main():
    given = cli(Config, __doc__)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}."""
    config, entry = resumed(given, Config, FREE, ("expo",)) if given.get("resume") else (Config(**given), None)
    check(config)
    device = pick_device(config.device)
    if entry is None:
        check_out(config.out, config.overwrite, (config.ckpt, *(config.data or sources_of(config.ckpt))))
    elif entry["step"] >= config.steps:
        return print(f"{config.out}: finished at step {entry['step']}; nothing to do")
    stop = StopSignal()

    # ---- the reference and its bars, the model in training
    began = time.time()
    reference, model, tokenizer, meta, series, train, reports = begin(config, entry, device)
    if entry is None:
        model.lean.fill_(1.0)   # direction is what is trained here: not to be drawn back to the base rate
    # until some weights qualify, the reference's are those that forecasts use
    run = Run.of(entry) if entry else Run(best=reference.state_dict(), metrics=reports)
    autocast, scaler, dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    if entry:
        load_optimizer(optimizer, entry, config.out)
    table = close_table(tokenizer).to(device)
    t = backtest.some_targets(series, "val", meta["splits"], seed=config.seed, most=VAL_BARS)
    if config.backtest:
        final = backtest.some_targets(series, "test", meta["splits"], config.horizon, ORIGINS, config.seed)

    def scores(model):
        with autocast():  # next bars alone, no Model.step
            return backtest.drawn_scores(model, tokenizer, t, probes=backtest.VAL_PROBES)

    ref_scores = scores(reference)
    print(f"{config.pairs}: {len(series)} symbols, {int(train.windows[-1]):,} windows of {train.block_size} bars, "
          f"{config.batch_size} a step, {config.steps} steps; {device}, {dtype} ({why})")
    print(f"checked on {len(t.r):,} bars of val; the reference: log loss {ref_scores['logloss'][0]:.4f}, "
          f"right calls {ref_scores['da'][0]:.2%}, called up {ref_scores['up_share'][0]:.1%}")

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 6)
    print(f"{'step':>5}{'loss':>8}{'KL':>7}{'odds':>7}   log loss to the reference, val{'right':>7}{'MAE':>8}{'CRPS':>8}{'left':>9}")
    clock = Clock(run.step, config.steps, config.save_every)
    while run.step < config.steps:
        coarse, fine, when, target = data.get_batch(train, config.seed, run.step)
        chance = np.random.default_rng([config.seed, run.step, 1])
        weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, (config.batch_size, 1))
        batch = [a.to(device) for a in (coarse, fine, when + torch.from_numpy(weeks * 7 * DAY), *target)]
        optimizer.set_rate(rate(run.step, config.steps, config.warmup))
        with autocast():
            loss, shown = loss_of(model, reference, table, batch, chance, config)
        scaler.scale(loss).backward()
        norm_now = run.update(model, optimizer, scaler, loss.item(), config.clip)
        run.losses.append(shown)

        if run.step % eval_every == 0 or run.step == config.steps:
            now = scores(model)
            gain, mae, crps = (against(now, ref_scores, m, t) for m in ("logloss", "mae", "crps"))
            fair = max(backtest.upper(mae), backtest.upper(crps)) <= backtest.NO_WORSE
            logloss, da, up_share = (float(now[m][0]) for m in ("logloss", "da", "up_share"))
            if fair and gain["hi"] is not None and gain["hi"] < 0:
                run.keep_if_best(model, logloss)
            mean = {k: float(np.mean([s[k] for s in run.losses if math.isfinite(s[k])] or [math.nan])) for k in shown}
            run.metrics.append(dict(stage="expo", step=run.step, train=mean["loss"], kl=mean["kl"], ref_odds=mean["odds"],
                                    grad_norm=norm_now, val_logloss=logloss, gain=gain, da=da, up_share=up_share,
                                    mae_ratio=mae, crps_ratio=crps))
            run.losses = []
            progress("")
            print(f"{run.step:>5}{mean['loss']:>8.4f}{mean['kl']:>7.4f}{mean['odds']:>7.2f}"
                  f"   {backtest.show(gain, 1, 4, '+'):<31}{da:>7.2%}{mae['value']:>8.4f}{crps['value']:>8.4f}"
                  f"{clock.left(run.step)!s:>9}", flush=True)
        else:
            progress(f"step {run.step}/{config.steps}  loss {shown['loss']:.4f}")
        if clock.save_due(run.step) or stop.signum:
            save_checkpoint(config.out, model, tokenizer, **meta, **vars(run), stage="expo", average=None,
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), dtype=dtype)
        if stop.signum:
            stop_here(stop, run, config.out)

    # ---- what came of it
    stop.release()
    if math.isinf(run.best_val):
        print(f"no weights had a surely better log loss at no worse MAE and CRPS: {config.out} holds the reference")
    else:
        print(f"{config.out}: weights of log loss {run.best_val:.4f} on val; forecast with: python sample.py --ckpt {config.out}")
    if config.backtest:
        result, _, _ = load_checkpoint(config.out, device)
        columns = {name: backtest.drawn_scores(m, tokenizer, final, config.paths)
                   for name, m in (("reference", reference), ("result", result))}
        print(f"\n{backtest.heading(final, meta)}")
        backtest.print_versus(columns, final, SHOWN)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run(main)
