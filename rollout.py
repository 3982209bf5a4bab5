"""Stage 3: teach the model to go on from its own output, with the truth as its guide.

    python rollout.py --ckpt out.pt --out rollout.pt             # oracle-guided, on the bars that out.pt was trained on
    python rollout.py --ckpt out.pt --mode expert --out rollout.pt  # expert iteration: whole trajectories, the best quarter
    python rollout.py --ckpt out.pt --out rollout.pt --resume      # go on after a kill, to the same weights bit for bit

In pretraining every bar of the context is real; in a forecast all but the first step follow the model's own bars, and
errors pile up. Here the model walks into the future of a training window on its own bars, guided, and is trained on the
walk, from the context that it really had:

    oracle   at each step K candidates; the one whose decoded close is nearest to the true close goes on
    expert   K whole trajectories; the best quarter by path error is kept
    random   at each step one candidate by chance: the control that shows what the oracle is worth
    plain    no walk, next-token training with the same batches, schedule and choice of weights: the other control

    loss = sum_k k CE(walk_k) / sum_k k  +  kl mean_k KL_k(pi || base)  +  plain (pretraining's loss on the real bars)

The truth only picks which of the model's own candidates becomes the target and the next bar of the context; no true value
enters the context, and a forecast needs no oracle. Hindsight narrows the forecasts: KL and the plain loss work against
it, and the table at the end shows the coverage. Kept are the weights with the best path CRPS on val, if better than the
base's. Learning from one's own rollouts under an expert: Ross, Gordon and Bagnell, arXiv 1011.0686; from the best of them,
again and again: expert iteration, Anthony, Tian and Barber, arXiv 1705.08439.
"""
import datetime
import math
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import backtest
import data
import sample
from data import UserError
from expo import learner_of, reference_of
from model import kl, load_checkpoint, mean_nats, norm, save_checkpoint
from pretrain import learning_rate, resumed


@dataclass
class Config:
    ckpt: str | None = None           # checkpoint to start from, the frozen base
    data: list[str] | None = None     # bars; none: those that the checkpoint was trained on
    out: str = "rollout.pt"           # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    mode: str = "oracle"              # oracle, expert, random, or plain
    horizons: tuple[int, ...] = (3, 6, 10)  # bars of a walk, each for an equal share of the updates
    candidates: int = 8               # K: candidates a step, or trajectories
    temperature: float = 1.5          # of the candidates
    kl: float = 0.05                  # weight of KL(pi || base), nats per bar
    plain: float = 1.0                # weight of the next-token loss on the real bars of the context
    steps: int = 480                  # updates
    batch_size: int = 16              # windows per update
    block_size: int = 0               # real bars before a walk; 0: as the checkpoint was trained
    lr: float = 3e-4                  # peak learning rate
    warmup: int = 10                  # updates of warm-up
    weight_decay: float = 0.0         # on matrices
    clip: float = 1.0                 # largest gradient norm
    shift_weeks: int = 104            # move each training window by a chance number of weeks, at most so many
    backtest: bool = True             # at the end, base beside result on the test bars
    paths: int = 200                  # sampled futures of each origin, in that backtest
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes bf16 where the hardware has it
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between checks on val; 0: a sixth of the run
    save_every: int = 50              # updates between saves (and at least each 30 s)


# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "backtest", "paths", "eval_every", "save_every"}
SAVE_SECONDS = 30
MAX_BAD_STEPS = 10
HISTORY = 512        # bars that a walk's scale is made from: 16 half-lives, so that what is older weighs 1e-5
VAL_BARS, VAL_ORIGINS = 12_000, 400  # of val, looked at in training, about
VAL_PATHS = 50       # from each of these origins
ORIGINS = 1000       # of paths on test, about


def check(config):
    positive = ("candidates", "temperature", "steps", "batch_size", "lr", "clip", "paths", "save_every")
    data.check_numbers(config, positive, ("kl", "plain", "block_size", "warmup", "weight_decay", "shift_weeks",
                                          "eval_every", "seed"))
    if config.ckpt is None:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if config.mode not in ("oracle", "expert", "random", "plain"):
        raise UserError(f"--mode {config.mode}: choose oracle, expert, random or plain")
    if not config.horizons or min(config.horizons) < 1 or list(config.horizons) != sorted(config.horizons):
        raise UserError(f"--horizons {','.join(map(str, config.horizons))}: bars of a walk, at least 1, growing, "
                        f"such as 3,6,10")
    if config.paths < 2:
        raise UserError(f"--paths {config.paths}: at least 2")


# ----------------------------------------------------------------------------------------------------------------------
# The walk

@dataclass
class Origins:
    """Where the walks of a batch begin, and where the market really went."""
    context: tuple   # coarse, fine, time int64 [B, L] of the real bars up to the origin, and their targets as get_batch
    times: torch.Tensor  # int64 [B, H]: stamps of the next bars, as a forecast would guess them
    state: data.State    # of shape [B, 1]: what decodes the next bar
    truth: np.ndarray    # float64 [B, H]: log(C_{origin + k} / C_origin)

    def moved(self, later, device):
        """The same with all stamps later by so many seconds, int64 [B, 1], on the device."""
        coarse, fine, time, target = self.context
        context = coarse.to(device), fine.to(device), (time + later).to(device), [a.to(device) for a in target]
        return replace(self, context=context, times=(self.times + later).to(device))


def origins_of(streams, series, which, ends, horizon, longest):
    """Origins in the windows (symbol, last target) of `streams`, which have room for `longest` bars after the origin."""
    coarse, fine, when, target = data.gather(streams, which, ends)
    n = coarse.shape[1] - longest + 1  # real bars of a window up to the origin
    target = [a[:, :n].clone() for a in target]
    for a in target:
        a[:, -1] = -1  # the walk's first bar, which the walk itself teaches
    times, states, truth = [], [], []
    for i, e in zip(which, ends):
        bars, o = series[i], e - longest  # o: row of the origin
        times.append(data.future_times(bars.time[:o + 1], horizon))
        states.append(data.features(bars[max(0, o + 1 - HISTORY):o + 1])[1].anchored())
        truth.append(np.log(bars.ohlcva[o + 1:o + 1 + horizon, 3] / bars.ohlcva[o, 3]))
    context = coarse[:, :n], fine[:, :n], when[:, :n], target
    return Origins(context, torch.from_numpy(np.stack(times)), data.State.stack(states), np.stack(truth))


@torch.no_grad()
def walk(model, tokenizer, state, origins, mode, uniform, temperature):
    """Walks of H bars from `state`, the model's after each context: tokens int64 [B, kept, H, 2].

    uniform [B, K, H, 2] is the chance; state is used up. Kept is 1 walk of a window, or the best quarter of K in mode
    expert. Errors are those of the log close since the origin.
    """
    B, K, H, _ = uniform.shape
    if mode == "expert":
        times, flat = origins.times.repeat_interleave(K, 0), uniform.flatten(0, 1)
        tokens = torch.stack(sample.generate(model, state.repeat(K), times, flat, temperature), -1).view(B, K, H, 2)
        close = data.inverse(tokenizer.decode(*tokens.unbind(-1)).cpu().numpy(), origins.state)[0][..., 3]  # [B, K, H]
        error = np.abs(np.log(close / origins.state.close[..., None]) - origins.truth[:, None]).mean(-1)
        best = torch.from_numpy(error.argsort(1, kind="stable")[:, :max(1, K // 4)]).to(tokens.device)
        return tokens.gather(1, best[..., None, None].expand(-1, -1, H, 2))
    chosen, before, rows = [], origins.state, np.arange(B)
    for k in range(H):
        drawn = model.sample(state.h[:, None].expand(-1, K, -1), temperature, u=uniform[:, :, k])  # K of one h
        tokens = torch.stack(drawn, -1)                                                                     # [B, K, 2]
        bars, after = data.inverse(tokenizer.decode(*drawn).cpu().numpy()[:, :, None], before)
        error = np.abs(np.log(bars[:, :, 0, 3] / origins.state.close) - origins.truth[:, k, None])          # [B, K]
        pick = error.argmin(1) if mode == "oracle" else np.zeros(B, int)  # random: the first, since all are alike
        before = after.map(lambda f: f[rows, pick][:, None])
        token = tokens[torch.from_numpy(rows), torch.from_numpy(pick)]
        chosen.append(token)
        if k + 1 < H:
            model.step(token[:, 0], token[:, 1], origins.times[:, k], state)
    return torch.stack(chosen, 1)[:, None]


def loss_of(model, base, origins, tokens, phase, config):
    """The loss of walks `tokens` [B, kept, H, 2] (None: of the context alone), and its parts as floats."""
    coarse, fine, when, target = origins.context
    n = coarse.shape[1]
    if tokens is not None:
        kept, H = tokens.shape[1:3]
        coarse, fine, when, *target = (a.repeat_interleave(kept, 0) for a in (coarse, fine, when, *target))
        walked = tokens.flatten(0, 1)                                                                       # [B', H, 2]
        coarse, fine = (torch.cat((a, walked[:, :-1, i]), 1) for i, a in enumerate((coarse, fine)))
        when = torch.cat((when, origins.times.repeat_interleave(kept, 0)[:, :-1]), 1)
    x, slots = model.trunk(coarse, fine, when, phase)
    h = norm(x)
    plain = 0.0
    if config.plain or tokens is None:
        real = h[:, :n]
        plain = mean_nats(model.coarse_logits(real), target[0])
        plain = plain + mean_nats(model.fine_logits(real, target[0].clamp(min=0)), target[1])
        if slots is not None:
            padded = [torch.nn.functional.pad(a, (0, h.shape[1] - n), value=-1) for a in target]
            plain = plain + model.config.aux_weight * model.slot_loss(slots, padded, phase)
    if tokens is None:
        return plain, dict(loss=plain.item(), kl=math.nan)
    with torch.no_grad():
        h_base = norm(base.trunk(coarse, fine, when, phase)[0])[:, n - 1:]
    heads = lambda m, h: [a.float().log_softmax(-1) for a in (m.coarse_logits(h), m.fine_logits(h, walked[..., 0]))]
    pi, ref = heads(model, h[:, n - 1:]), heads(base, h_base)                                             # [B', H, 2^k]
    each = -sum(p.gather(-1, walked[..., i, None])[..., 0] for i, p in enumerate(pi))                       # [B', H]
    away = sum(kl(p, q) for p, q in zip(pi, ref)).mean()
    weight = torch.arange(1.0, H + 1, device=each.device)  # later steps weigh more
    own = (each * weight).sum(-1).mean() / weight.sum()
    return own + config.kl * away + config.plain * plain, dict(loss=own.item(), kl=away.item())


# ----------------------------------------------------------------------------------------------------------------------
# The run

def main():
    given = data.cli(Config, __doc__)
    config, entry = resumed(given, Config, FREE, ("rollout",)) if given.get("resume") else (Config(**given), None)
    check(config)
    device = data.pick_device(config.device)
    if entry is None:
        data.check_out(config.out, config.overwrite, (config.ckpt, *(config.data or ())))
    elif entry["step"] >= config.steps:
        return print(f"{config.out}: finished at step {entry['step']}; nothing to do")
    stop = data.StopSignal()

    # ---- the base and its bars, the model in training
    began = time.time()
    longest = max(config.horizons)
    base, tokenizer, meta, series, train = reference_of(config, entry, device, room=longest - 1)
    borders = meta["splits"]
    t = backtest.some_targets(series, "val", borders, longest, VAL_ORIGINS, config.seed, most=VAL_BARS)
    if config.backtest:
        final = backtest.some_targets(series, "test", borders, longest, ORIGINS, config.seed)
    model, optimizer, scaler, autocast, dtype_name = learner_of(config, entry, device)
    step, bad_steps, best, best_val, metrics = 0, 0, None, math.inf, meta["metrics"]
    if entry:
        step, bad_steps, best, best_val, metrics = (entry[k] for k in ("step", "bad_steps", "best", "best_val", "metrics"))

    def save():
        # until some weights qualify, the base's are those that forecasts use
        save_checkpoint(config.out, model, tokenizer, stage="rollout", run=asdict(config), seed=config.seed,
                        features=meta["features"], data=meta["data"], splits=borders,
                        best=best or base.state_dict(), best_val=best_val, step=step, bad_steps=bad_steps,
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), metrics=metrics)

    def scores(model):  # paths go by Model.step: no autocast
        return backtest.drawn_scores(model, tokenizer, t, VAL_PATHS, probes=0)

    base_scores = scores(base)
    base_crps, base_mape = (backtest.at_step(base_scores, m, None)[0] for m in ("path_crps", "path_mape"))
    print(f"{config.mode}: {len(series)} symbols, {int(train.windows[-1]):,} windows of {train.block_size - longest + 1} bars, "
          f"{config.batch_size} a step, {config.steps} steps; {device}, {dtype_name}")
    print(f"checked on {len(t.path_r):,} origins of val; the base: path CRPS {base_crps:.4f}, MAPE {base_mape:.4f}, "
          f"means over {longest} bars")

    # ---- the loop
    eval_every = config.eval_every or max(1, config.steps // 6)
    print(f"{'step':>4}{'bars':>5}{'loss':>8}{'KL':>7}{'grad':>6}{'lr':>6}{'walk/s':>8}"
          f"{'CRPS':>7}{'to base':>8}{'MAPE':>7}{'90 %':>6}{'left':>8}")
    loop_began = saved_at = time.time()
    from_step, seen, n_walked, walk_seconds = step, [], 0, 1e-9
    while step < config.steps:
        horizon = config.horizons[step * len(config.horizons) // config.steps]  # short walks first
        chance = np.random.default_rng([config.seed, step, 1])
        phase = int(chance.integers(model.config.border))
        weeks = chance.integers(-config.shift_weeks, config.shift_weeks + 1, (config.batch_size, 1))
        origins = origins_of(train, series, *data.draw_windows(train, config.seed, step), horizon, longest)
        origins = origins.moved(torch.from_numpy(weeks * 7 * data.DAY), device)
        walks = None
        if config.mode != "plain":
            timed = time.time()
            uniform = chance.random((config.batch_size, config.candidates, horizon, 2), np.float32)
            uniform = torch.from_numpy(uniform).to(device)
            with torch.no_grad(), autocast():
                state = model.prefill(*origins.context[:3], phase)
            walks = walk(model, tokenizer, state, origins, config.mode, uniform, config.temperature)
            n_walked, walk_seconds = n_walked + uniform[..., 0].numel(), walk_seconds + time.time() - timed
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        with autocast():
            loss, told = loss_of(model, base, origins, walks, phase, config)
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
            names = "path_crps", "path_mape", "path_coverage90"
            crps, mape, inside = (float(backtest.at_step(now, m, None)[0]) for m in names)
            ratio = backtest.against(now, base_scores, "path_crps", t, None)
            mean = {k: float(np.mean([s[k] for s in seen])) if seen else math.nan for k in ("loss", "kl", "grad")}
            metrics.append(dict(stage="rollout", step=step, horizon=horizon, train=mean["loss"], kl=mean["kl"],
                                grad_norm=mean["grad"], lr=lr, path_crps=crps, path_crps_ratio=ratio, path_mape=mape,
                                path_coverage90=inside))
            seen = []
            data.progress("")
            print(f"{step:>4}{horizon:>5}{mean['loss']:>8.4f}{mean['kl']:>7.4f}{mean['grad']:>6.3f}{lr:>6.0e}"
                  f"{n_walked / walk_seconds:>8,.0f}{crps:>7.4f}{ratio['value']:>8.4f}{mape:>7.4f}{inside:>6.1%}{left!s:>8}",
                  flush=True)
            if crps < min(best_val, base_crps):
                best_val, best = crps, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
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
        print(f"no weights had a better path CRPS on val: {config.out} holds the base")
    else:
        print(f"{config.out}: the weights of path CRPS {best_val:.4f} on val; forecast with: python sample.py --ckpt {config.out}")
    if config.backtest:
        result, _, _ = load_checkpoint(config.out, device)
        print("\ntest, which nothing above has seen")
        print_paths({"base": base, "result": result}, tokenizer, final, config.paths)
    print(f"{time.time() - began:.0f} s")


def print_paths(models, tokenizer, t, paths):
    """Two models {name: model} side by side, and persistence, bar by bar."""
    columns = {name: backtest.drawn_scores(m, tokenizer, t, paths) for name, m in models.items()}
    scores = lambda f: backtest.bootstrap(backtest.block_sums(f, t), t)
    greedy = {name: scores(backtest.simulated(m, tokenizer, t, 1, temperature=1e-6)) for name, m in models.items()}
    columns["still"] = scores(dict(path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r)))
    steps = sorted(k for k in {1, 2, (t.horizon + 1) // 2, t.horizon} if k <= t.horizon)
    rows = [("da", "right calls, %", 100, 2), ("mae", "MAE", 1, 4), ("crps", "CRPS", 1, 4),
            ("coverage90", "in 90 % band, %", 100, 1)]
    for metric, label, scale, digits in (("path_mape", "path MAPE %", 1, 4), ("path_crps", "path CRPS", 1, 4),
                                         ("path_coverage90", "in 90 % band, %", 100, 1)):
        rows.append(((metric, None), f"{label}, mean", scale, digits))
        rows += [((metric, k - 1), f"  bar {k}", scale, digits) for k in steps]
    backtest.print_versus(columns, t, rows, versus=(1, 0))
    mape = [(("path_mape", None), "path MAPE %, mean", 1, 4)]
    print("and to persistence:")
    backtest.print_versus({k: columns[k] for k in (list(models)[1], "still")}, t, mape, versus=(0, 1))
    print("the greedy path (likeliest tokens):")
    backtest.print_versus(greedy, t, mape)


if __name__ == "__main__":
    data.run(main)
