"""Stage 2: lean the model up before rises and down before falls, at next to no cost in numeric accuracy.

    python expo.py --ckpt out.pt --out expo.pt                     # on the bars that out.pt was trained on
    python expo.py --ckpt out.pt --data bars.csv --pairs matched --out expo.pt
    python expo.py --ckpt out.pt --out expo.pt --resume            # go on after a kill, to the same weights bit for bit

Next-token training weighs every code alike; whether the close rises is one bit of twenty. Regression EXPO (Hu, Kong, He
and Wipf 2025, arXiv 2506.07492) learns from pairs, w better than l, beside a frozen copy `ref` of the model:

    loss = (sigmoid(log pi(w) / pi(l)) - y)^2 + beta KL(pi || ref),    y = lam sigmoid(log ref(w) / ref(l)) + (1 - lam)

The optimum of the first term for one pair is known: sigmoid(log pi(w)/pi(l)) = lam (the reference's own) + (1 - lam)
(the share of times that w was the better one). Three ways to a pair: `extreme` and `matched` draw candidates for the next
bar from the reference and score them; `set` takes all up tokens against all down tokens, log pi(w)/pi(l) = logit P(up),
in closed form, so that nothing is drawn. `plain` is the control: next-token training with the same batches, schedule and
choice of weights.

Bars that hardly moved carry no label. Rising and falling bars weigh the same, so that a drifting market does not teach
"always up". Kept are the weights with the best log loss of P(up) on val, if better than the reference's, among those
whose MAE and CRPS there are surely (95 %) within 0.5 % of the reference's.
"""
import datetime
import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

import backtest
import data
import sample
from data import UserError
from model import close_table, draw, kl, load_checkpoint, norm, save_checkpoint
from pretrain import adamw, learning_rate, resumed


@dataclass
class Config:
    ckpt: str | None = None           # checkpoint to start from, the frozen reference
    data: list[str] | None = None     # bars; none: those that the checkpoint was trained on
    out: str = "expo.pt"              # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    pairs: str = "set"                # extreme, matched or set; plain: no pairs, the control
    lam: float = 0.6                  # share of the reference in the target: 1 holds still, 0 is the data alone
    beta: float = 0.1                 # weight of KL(pi || ref), nats per bar
    candidates: int = 192             # drawn for each labelled bar (extreme, matched)
    labels: int = 32                  # labelled bars that get candidates, a window on average; 0: all
    noise: float = 0.1                # a close that moved by less than this share of s_t carries no label
    steps: int = 150                  # updates
    batch_size: int = 16              # windows per update
    block_size: int = 0               # bars in a window; 0: as the checkpoint was trained
    lr: float = 3e-4                  # peak learning rate
    warmup: int = 10                  # updates of warm-up
    weight_decay: float = 0.0         # on matrices
    clip: float = 1.0                 # largest gradient norm
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    backtest: bool = True             # at the end, reference beside result on the test bars
    horizon: int = 10                 # bars ahead, in that backtest
    paths: int = 50                   # sampled futures of each origin, in that backtest
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes bf16 where the hardware has it
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between checks on val; 0: a sixth of the run
    save_every: int = 50              # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "backtest", "horizon", "paths", "eval_every", "save_every"}
SAVE_SECONDS = 30
MAX_BAD_STEPS = 10
VAL_BARS = 12_000    # bars of val looked at in training, about
ORIGINS = 1000       # origins of paths on test, about
ERROR_WEIGHT = 0.25  # of a candidate's error, beside 1 for the right direction
PIECE = 4            # labelled bars whose candidates are drawn at a time: 2^k2 logits each, which stay in the cache
SHOWN = (("da", "right calls, %", 100, 2), ("up_share", "called up, %", 100, 1),  # score, label, factor, digits
         ("logloss", "log loss of P(up)", 1, 4), ("ece", "calibration, %", 100, 2),
         ("mae", "MAE", 1, 4), ("crps", "CRPS", 1, 4),
         ("path_mape", "path MAPE %, last bar", 1, 3), ("path_crps", "path CRPS, last bar", 1, 3))


def check(config):
    positive = ("candidates", "steps", "batch_size", "lr", "clip", "horizon", "paths", "save_every")
    data.check_numbers(config, positive, ("lam", "beta", "labels", "noise", "block_size", "warmup", "weight_decay",
                                          "shift_weeks", "eval_every", "seed"))
    if config.ckpt is None:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if config.lam > 1:
        raise UserError(f"--lam {config.lam}: a share, at most 1")
    if config.paths < 2 or config.candidates < 2:
        raise UserError(f"--paths {config.paths}, --candidates {config.candidates}: at least 2 each")
    if config.pairs not in ("extreme", "matched", "set", "plain"):
        raise UserError(f"--pairs {config.pairs}: choose extreme, matched, set or plain")


# ----------------------------------------------------------------------------------------------------------------------
# The loss, and the pairs it is fed

def expo_loss(log_ratio, ref_log_ratio, lam):
    """Regression EXPO, element by element: of log_ratio = log pi(w)/pi(l), and of the reference's, of the same shape."""
    return (log_ratio.sigmoid() - (lam * ref_log_ratio.sigmoid() + 1 - lam)).square()


@torch.no_grad()
def draw_pairs(reference, table, h, move, uniform, kind):
    """A better and a worse candidate for the next bar, drawn from the reference.

    A candidate's score is 1 if its direction is right, less a quarter of its error in units of s_t. w is the best one;
    l is the worst (extreme), or the one with the wrong direction whose size is nearest to w's (matched): these two
    differ in little but their sign.

    h [N, C]: its hidden states; table [2^k1, 2^k2]: close feature of every pair of tokens; move [N]: log return / s_t of
    the bar that came; uniform [N, candidates, 2]: the chance; kind: extreme or matched. Returns the tokens (coarse, fine)
    of w and of l, int64 [N, 2, 2], and whether there is such a pair [N].
    """
    coarse = draw(reference.coarse_logits(h), 1.0, 1.0, uniform[..., 0].contiguous())               # [N, candidates]
    out, found = [], []
    for h, move, coarse, u in zip(*(a.split(PIECE) for a in (h, move, coarse, uniform[..., 1:]))):
        fine = draw(reference.fine_logits(h[:, None], coarse), 1.0, 1.0, u)[..., 0]
        tokens = torch.stack((coarse, fine), -1)                                                    # [n, candidates, 2]
        close = table[tokens[..., 0], tokens[..., 1]].sinh()                                        # log return / s_t
        right = (close > 0) == (move[:, None] > 0)
        score = right.float() - ERROR_WEIGHT * (close - move[:, None]).abs()
        w = score.argmax(1, keepdim=True)
        if kind == "extreme":
            l = score.argmin(1, keepdim=True)
            found.append((score.gather(1, w) > score.gather(1, l))[:, 0])
        else:
            size = close.abs()
            l = (size - size.gather(1, w)).abs().masked_fill(right, math.inf).argmin(1, keepdim=True)
            found.append((right.gather(1, w) & ~right.gather(1, l))[:, 0])
        out.append(tokens.gather(1, torch.cat((w, l), 1)[..., None].expand(-1, -1, 2)))
    return torch.cat(out), torch.cat(found)


def log_odds(model, h, log_coarse, pair):
    """log pi(w) / pi(l) [N] of pairs of tokens [N, 2, 2], from h [N, C] and the coarse log-probabilities [N, 2^k1]."""
    coarse, fine = pair.unbind(-1)                                                                      # [N, 2]
    log_fine = model.fine_logits(h[:, None].expand(-1, 2, -1), coarse).float().log_softmax(-1)          # [N, 2, 2^k2]
    both = log_coarse.gather(1, coarse) + log_fine.gather(2, fine[..., None])[..., 0]
    return both[:, 0] - both[:, 1]


def logit_up(model, log_coarse):
    """log P(up) / P(not up) [...] from the coarse log-probabilities [..., 2^k1]."""
    return log_coarse[..., model.up_mask].logsumexp(-1) - log_coarse[..., ~model.up_mask].logsumexp(-1)


def loss_of(model, reference, table, batch, phase, chance, config):
    """The loss of a batch, and what the report shows of it, a dict of floats.

    batch: coarse, fine, time, target_coarse, target_fine, as data.get_batch gives; chance: a numpy generator. Shown: the
    loss without its KL; kl; ref_odds, the median of log ref(w)/ref(l); the share of w that are right, of l that are wrong.
    """
    coarse, fine, when, *target = batch
    if config.pairs == "plain":
        loss = model(coarse, fine, when, tuple(target), phase)[2]
        nats = (model.parts["coarse"] + model.parts["fine"]).item()
        return loss, dict(loss=nats, kl=math.nan, ref_odds=math.nan, w_right=math.nan, l_wrong=math.nan)
    counts = target[0] >= 0
    came = target[0][counts], target[1][counts]                                                         # [N]
    h = norm(model.trunk(coarse, fine, when, phase)[0])[counts]                                         # [N, C]
    log_coarse = model.coarse_logits(h).float().log_softmax(-1)                                         # [N, 2^k1]
    log_fine = model.fine_logits(h, came[0]).float().log_softmax(-1)                                    # [N, 2^k2]
    with torch.no_grad():
        h_ref = norm(reference.trunk(coarse, fine, when, phase)[0])[counts]
        ref_coarse = reference.coarse_logits(h_ref).float().log_softmax(-1)
        ref_fine = reference.fine_logits(h_ref, came[0]).float().log_softmax(-1)
    away = (kl(log_coarse, ref_coarse) + kl(log_fine, ref_fine)).mean()
    move = table[came].sinh()                                                                    # [N], log return / s_t
    rows = (move.abs() > config.noise).nonzero()[:, 0]                                              # that carry a label
    if config.pairs == "set":
        rising = move[rows] > 0
        sign = torch.where(rising, 1.0, -1.0)
        odds, ref_odds = (sign * logit_up(model, log_p[rows]) for log_p in (log_coarse, ref_coarse))
        w_right = l_wrong = 1.0
    else:
        if config.labels:
            keep = chance.permutation(len(rows))[:config.labels * len(coarse)]
            rows = rows[torch.from_numpy(np.sort(keep)).to(rows.device)]
        uniform = torch.from_numpy(chance.random((len(rows), config.candidates, 2), np.float32)).to(h.device)
        pair, found = draw_pairs(reference, table, h_ref[rows], move[rows], uniform, config.pairs)
        rows, pair = rows[found], pair[found]
        rising = move[rows] > 0
        odds = log_odds(model, h[rows], log_coarse[rows], pair)
        with torch.no_grad():
            ref_odds = log_odds(reference, h_ref[rows], ref_coarse[rows], pair)
        up = table[pair[..., 0], pair[..., 1]] > 0                                                      # [N, 2]
        w_right = (up[:, 0] == rising).float().mean().item()
        l_wrong = (up[:, 1] != rising).float().mean().item()
    each = expo_loss(odds, ref_odds, config.lam)
    sides = [each[side].mean() for side in (rising, ~rising) if side.any()]  # rises and falls weigh the same
    expo = torch.stack(sides).mean() if sides else each.sum()  # without a label: 0
    median = ref_odds.median().item() if len(ref_odds) else math.nan
    shown = dict(loss=expo.item(), kl=away.item(), ref_odds=median, w_right=w_right, l_wrong=l_wrong)
    return expo + config.beta * away, shown


# ----------------------------------------------------------------------------------------------------------------------
# What the later stages share, this one and rollout.py

def reference_of(config, entry, device, room=0):
    """What a later stage begins with: reference, tokenizer, meta, series, streams.

    entry: the checkpoint that is resumed, or None; UserError where it began with another reference or other bars. room:
    bars that a window needs beyond a block. Returns the frozen model of --ckpt; its tokenizer; its meta, with `data` for
    the new checkpoint; the series that are long enough to train on; and their Streams.
    """
    reference, tokenizer, meta = load_checkpoint(config.ckpt, device)
    reference.requires_grad_(False)
    if not meta["data"] or not meta["splits"]:
        raise UserError(f"{config.ckpt}: does not say what it was trained on; name a checkpoint of pretrain.py")
    series = sample.load_series(config.data, meta)
    source = dict(sources=config.data or meta["data"]["sources"], fingerprint=data.fingerprint(series),
                  reference=data.weights_hash(reference.state_dict()),
                  seed=meta["data"].get("seed", meta["seed"]))  # of the synthetic market, where that is the source
    if entry and entry["data"] != source:
        raise UserError(f"{config.out}: begun from other bars or another --ckpt than {config.ckpt} holds now; "
                        f"give it those, or another --out")
    borders, window = tuple(meta["splits"]), (config.block_size or reference.config.block_size) + room
    series = [bars for bars in series if data.targets_of(bars, "train", borders)[1] > window]
    if not series:
        raise UserError(f"no symbol has more than {window} bars before val starts ({data.iso(borders[0])}, the "
                        f"checkpoint's date); lower --block_size, or fine-tune on these bars first: "
                        f"pretrain.py --init_from {config.ckpt}")
    tokens = [data.tokenize(bars, tokenizer) for bars in series]
    streams = data.make_streams(series, tokens, "train", borders, window, config.batch_size)
    return reference, tokenizer, meta | dict(data=source, splits=borders), series, streams


def learner_of(config, entry, device):
    """What a later stage trains, from --ckpt or as `entry` left it: model, optimizer, scaler, autocast, type's name."""
    model, _, _ = load_checkpoint(config.out if entry else config.ckpt, device, "last" if entry else "best")
    model.grad_ckpt = config.grad_ckpt
    dtype_name, dtype = data.pick_dtype(config.dtype, device)
    optimizer = adamw(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_name == "fp16")
    if entry:
        optimizer.load_state_dict(entry["optimizer"])
        scaler.load_state_dict(entry["scaler"])
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype_name != "fp32")
    return model, optimizer, scaler, autocast, dtype_name


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main():
    given = data.cli(Config, __doc__)
    config, entry = resumed(given, Config, FREE, ("expo",)) if given.get("resume") else (Config(**given), None)
    check(config)
    device = data.pick_device(config.device)
    if entry is None:
        data.check_out(config.out, config.overwrite, (config.ckpt, *(config.data or ())))
    elif entry["step"] >= config.steps:
        return print(f"{config.out}: finished at step {entry['step']}; nothing to do")
    stop = data.StopSignal()

    # ---- the reference and its bars, the model in training
    began = time.time()
    reference, tokenizer, meta, series, train = reference_of(config, entry, device)
    borders = meta["splits"]
    t = backtest.some_targets(series, "val", borders, seed=config.seed, most=VAL_BARS)
    if config.backtest:
        final = backtest.some_targets(series, "test", borders, config.horizon, ORIGINS, config.seed)
    table = close_table(tokenizer).to(device)
    model, optimizer, scaler, autocast, dtype_name = learner_of(config, entry, device)
    step, bad_steps, best, best_val, metrics = 0, 0, None, math.inf, meta["metrics"]
    if entry:
        step, bad_steps, best, best_val, metrics = (entry[k] for k in ("step", "bad_steps", "best", "best_val", "metrics"))

    def scores(model):
        with autocast():  # next bars alone, no Model.step; eval() would change nothing, there is no dropout
            return backtest.drawn_scores(model, tokenizer, t, probes=backtest.VAL_PROBES)

    def save():
        # until some weights qualify, the reference's are those that forecasts use
        save_checkpoint(config.out, model, tokenizer, stage="expo", run=asdict(config), seed=config.seed,
                        features=meta["features"], data=meta["data"], splits=borders,
                        best=best or reference.state_dict(), best_val=best_val, step=step, bad_steps=bad_steps,
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), metrics=metrics)

    ref_scores = scores(reference)
    print(f"{config.pairs}: {len(series)} symbols, {int(train.windows[-1]):,} windows of {train.block_size} bars, "
          f"{config.batch_size} a step, {config.steps} steps; {device}, {dtype_name}")
    print(f"checked on {len(t.r):,} bars of val; the reference: log loss {ref_scores['logloss'][0]:.4f}, "
          f"right calls {ref_scores['da'][0]:.2%}, called up {ref_scores['up_share'][0]:.1%}")

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 6)
    print(f"{'':23}{'---- pairs ----':>16}{'':6}{'------ log loss, val -----':>26}")
    print(f"{'step':>4}{'loss':>7}{'KL':>6}{'grad':>6}{'odds':>6}{'w':>5}{'l':>5}{'lr':>6}"
          f"{'loss':>7}{'right':>6}{'MAE':>7}{'CRPS':>7}{'left':>8}")
    loop_began = saved_at = time.time()
    from_step, seen = step, []
    while step < config.steps:
        coarse, fine, when, target = data.get_batch(train, config.seed, step)
        chance = np.random.default_rng([config.seed, step, 1])
        phase = int(chance.integers(model.config.border))
        weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, (config.batch_size, 1))
        batch = [a.to(device) for a in (coarse, fine, when + torch.from_numpy(weeks * 7 * data.DAY), *target)]
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        with autocast():
            loss, told = loss_of(model, reference, table, batch, phase, chance, config)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
        if math.isfinite(loss.item()) and math.isfinite(gradient):
            scaler.step(optimizer)
            bad_steps = 0
            seen.append(told | dict(grad=gradient))
        else:
            bad_steps += 1
            print(f"{step + 1:>5} loss {loss.item()}, gradient norm {gradient}: not finite, step skipped")
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(f"{MAX_BAD_STEPS} steps in a row were not finite, the last of them step {step + 1}: start "
                                f"again with a lower --lr (now {config.lr}), or with --dtype fp32")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        left = datetime.timedelta(seconds=round((time.time() - loop_began) / (step - from_step) * (config.steps - step)))
        if step % eval_every == 0 or step == config.steps:
            now = scores(model)
            mae, crps = (backtest.against(now, ref_scores, m, t) for m in ("mae", "crps"))
            fair = max(backtest.upper(mae), backtest.upper(crps)) <= backtest.NO_WORSE
            shown = {k: [s[k] for s in seen if math.isfinite(s[k])] for k in (*told, "grad")}  # no pair, no odds
            mean = {k: float(np.mean(values)) if values else math.nan for k, values in shown.items()}
            logloss, da, up_share = (float(now[m][0]) for m in ("logloss", "da", "up_share"))
            metrics.append(dict(stage="expo", step=step, train=mean["loss"], kl=mean["kl"], ref_odds=mean["ref_odds"],
                                winners_right=mean["w_right"], losers_wrong=mean["l_wrong"], grad_norm=mean["grad"], lr=lr,
                                val_logloss=logloss, da=da, up_share=up_share, mae_ratio=mae, crps_ratio=crps))
            seen = []
            data.progress("")
            print(f"{step:>4}{mean['loss']:>7.4f}{mean['kl']:>6.3f}{mean['grad']:>6.3f}{mean['ref_odds']:>6.2f}"
                  f"{mean['w_right']:>5.0%}{mean['l_wrong']:>5.0%}{lr:>6.0e}{logloss:>7.4f}{da:>6.1%}"
                  f"{mae['value']:>7.4f}{crps['value']:>7.4f}{left!s:>8}{'' if fair else ' worse'}", flush=True)
            if fair and logloss < min(best_val, ref_scores["logloss"][0]):
                best_val, best = logloss, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        else:
            data.progress(f"step {step}/{config.steps}  loss {told['loss']:.4f}  {left} left")
        if step == config.steps or step % config.save_every == 0 or stop.signum or time.time() - saved_at > SAVE_SECONDS:
            save()
            saved_at = time.time()
        if stop.signum:
            print(f"stopped at step {step}; saved in {config.out}; go on with --resume")
            raise SystemExit(stop.status)

    # ---- what came of it
    stop.release()
    if math.isinf(best_val):  # a resumed run has the first weights as its best until some qualify
        print(f"no weights had a better log loss at no worse MAE and CRPS: {config.out} holds the reference")
    else:
        print(f"{config.out}: the weights of log loss {best_val:.4f} on val; forecast with: python sample.py --ckpt {config.out}")
    if config.backtest:
        result, _, _ = load_checkpoint(config.out, device)
        columns = {name: backtest.drawn_scores(m, tokenizer, final, config.paths)
                   for name, m in (("reference", reference), ("result", result))}
        print("\ntest, which nothing above has seen")
        backtest.print_versus(columns, final, SHOWN)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    data.run(main)
