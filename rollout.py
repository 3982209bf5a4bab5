"""Stage 3: train on contexts that end in the model's own bars; the true future selects among them.

    python rollout.py --ckpt out.pt --out rollout.pt                 # on the bars of out.pt
    python rollout.py --ckpt out.pt --select path --target chosen --out rollout.pt
    python rollout.py --ckpt out.pt --out rollout.pt --resume       # after a kill: the same weights

In pretraining every bar of the context is real; in a forecast all but the first step follow the
model's own bars. Here the model learns after such bars: it goes on from the end of a window for H
bars, K times over, and the truth picks which of its bars count. Two filters:

    step    at each step draw K candidates and continue with the one whose close is nearest to the
            true close: the nearest path, not the nearest return (learning from an expert in the
            states that the learner visits: Ross, Gordon and Bagnell, arXiv 1011.0686)
    path    K whole paths, of which the best quarter by path error, mean |log C_k - log C*_k|, is
            kept; after ROUND updates they are drawn anew from the model as it then is (expert
            iteration: Anthony, Tian and Barber, arXiv 1705.08439; STaR: arXiv 2203.14465)

and two targets: the `true` bars, the path being context alone, or the `chosen` path itself.

    loss = a mean_k w_k CE(target of bar k) + b mean_k KL_k(pi || base) + CE of the real bars
    w_k = 1 + 0.75 k / (H - 1),   a = --walk, b = --kl,   H = 3, then 6, then 10

Scale. A token is a move in units of s_t. On its own path the model works with the path's s_t, as in
a forecast. A true target keeps the token that it has in the real series. Encoding it anew, from the
path's last close, would teach the model to jump back to the truth: measured, paths then became 40 %
more volatile. The KL of a fine token is taken given the target's coarse token.

After the origin the context holds the model's own bars alone; the truth merely selects. Kept are
the weights with the best path CRPS on val, if it is surely (95 %) better than the base's; else the
base.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

import backtest
import data
from backstage.clock import future_times
from backstage.files import sole_writer
from backstage.scores import against, at_step
from backstage.script import cli, run
from backstage.stage import Settings, StageValidation, check_settings, kl, set_up
from model import mean_nats


@dataclass
class Config(Settings):
    out: str = "rollout.pt"           # checkpoint to write
    select: str = "step"              # step or path: what the truth filters
    target: str = "true"              # true or chosen
    horizon: int = 10                 # bars of a path at the end, on val and on test
    candidates: int = 8               # K: candidates at each step, or whole paths of a window
    temperature: float = 1.5          # of the candidates
    walk: float = 1.0                 # weight of the loss on a path
    kl: float = 0.05                  # weight of KL(pi || base) along a path, nats per bar


CURRICULUM = 3, 6       # bars of a path in the first and the second third of the updates
ROUND = dict(step=1, path=5)  # updates before paths are drawn anew
KEPT = 4                # of the K paths of a window the best K / KEPT are kept
LATER = 0.75            # by how much the last step of a path weighs more than the first
HISTORY = 512           # bars that a scale is made from: 16 half-lives, what is older weighs 1e-5


def check(config):
    check_settings(config, ("temperature",), ("walk", "kl"), select=("step", "path"),
                   target=("true", "chosen"))


# --------------------------------------------------------------------------------------------------
# Where paths begin

@dataclass
class Origins:
    """The ends of B windows, and where the market really went from there."""
    context: tuple         # coarse, fine, time int64 [B, L] of the real bars; a list, their targets
    times: torch.Tensor    # int64 [B, H]: stamps of the next bars, as a forecast would guess them
    tokens: torch.Tensor   # int64 [B, H, 2]: the next bars, coarse and fine
    state: data.State      # of shape [B, 1]: what decodes the next bar
    path: np.ndarray       # float64 [B, H]: log return of the true close since the origin

    def to(self, device):
        """The same on the device, but for what decodes bars."""
        *inputs, target = self.context
        context = *(a.to(device) for a in inputs), [a.to(device) for a in target]
        return replace(self, context=context, times=self.times.to(device),
                       tokens=self.tokens.to(device))

    def repeat(self, n):
        """Each origin n times: [n B]."""
        def rows(a):
            return a.repeat_interleave(n, dim=0)

        *inputs, target = self.context
        context = *map(rows, inputs), [rows(a) for a in target]
        return Origins(context, rows(self.times), rows(self.tokens),
                       self.state.map(lambda f: f.repeat(n, 0)), self.path.repeat(n, 0))


def origins_of(streams, series, slots, which, ends, horizon, longest):
    """Origins in windows (symbol, last target) of `streams`, with room for `longest` bars after.

    slots: the data.Slots of each series.
    """
    coarse, fine, when, target = data.gather(streams, which, ends)
    n = coarse.shape[1] - longest + 1  # real bars of a window: the origin is its row n - 1
    tokens = torch.stack(target, -1)[:, n - 1:n - 1 + horizon]
    target = [a[:, :n].clone() for a in target]
    for a in target:
        a[:, -1] = -1  # the first bar of the path, which the path itself teaches
    times, states, paths = [], [], []
    for i, e in zip(which, ends):
        bars, o = series[i], e - longest  # o: row of the origin
        times.append(future_times(bars.time[:o + 1], horizon))
        rows = slice(max(0, o + 1 - HISTORY), o + 1)
        *_, (_, state) = data.feature_pieces(bars[rows], log_factors=slots[i].log_factors[rows])
        states.append(state.anchored(slots[i].coming(o, times[-1])))
        log_close = np.log(bars.ohlcva[o:o + 1 + horizon, 3])
        paths.append(log_close[1:] - log_close[0])
    context = coarse[:, :n], fine[:, :n], when[:, :n], target
    times = torch.from_numpy(np.stack(times))
    return Origins(context, times, tokens, data.State.stack(states), np.stack(paths))


# --------------------------------------------------------------------------------------------------
# The two filters

@torch.no_grad()
def guided_walk(model, tokenizer, state, origins, uniform, temperature):
    """Step level: of K candidates at each step the one whose close is nearest to the true close.

    state: of Model.prefill at the origins, changed in place. uniform [B, K, H, 2]: what the
    candidates are drawn by; with K = 1 the truth has no say. -> tokens int64 [B, H, 2] and log
    returns since the origin float64 [B, H] of the walks.
    """
    B, K, H, _ = uniform.shape
    before, rows, tokens, path = origins.state, np.arange(B), [], []
    start = np.log(origins.state.close)                                         # (B, 1)
    for k in range(H):
        h = state.h[:, None].expand(-1, K, -1)                                  # (B, K, C)
        drawn = model.sample(h, temperature, u=uniform[:, :, k])                # 2 of (B, K)
        x = tokenizer.decode(*drawn).cpu().numpy()[:, :, None]                  # (B, K, 1, 6)
        bars, after = data.inverse(x, before)
        move = np.log(bars[:, :, 0, 3]) - start                                 # (B, K)
        nearest = np.abs(move - origins.path[:, k, None]).argmin(1)             # (B,)
        before = after.map(lambda f: f[rows, nearest][:, None])
        path.append(move[rows, nearest])
        tokens.append(torch.stack(drawn, -1)[torch.from_numpy(rows), torch.from_numpy(nearest)])
        if k + 1 < H:
            model.step(*tokens[-1].unbind(-1), origins.times[:, k:], state)
    return torch.stack(tokens, 1), np.stack(path, 1)


def best_paths(model, tokenizer, state, origins, uniform, temperature):
    """Trajectory level: of K whole paths the best quarter by path error, K' = K / 4, best first.

    As guided_walk, but -> tokens int64 [B K', H, 2], and the origins of each, K' times each.
    """
    B, K, H, _ = uniform.shape
    every = origins.repeat(K)
    single = uniform.flatten(0, 1)[:, None]     # (B K, 1, H, 2): one candidate, so no filter
    tokens, path = guided_walk(model, tokenizer, state.repeat(K), every, single, temperature)
    error = np.abs(path - every.path).mean(1).reshape(B, K)
    best = error.argsort(1, kind="stable")[:, :max(1, K // KEPT)]               # (B, K')
    rows = (best + K * np.arange(B)[:, None]).ravel()
    return tokens[torch.from_numpy(rows)], origins.repeat(best.shape[1])


# --------------------------------------------------------------------------------------------------
# The loss

def rollout_loss(model, base, origins, walk, target, config):
    """The loss of `walk` [B, H, 2] as context and `target` [B, H, 2]; its parts as floats.

        loss = a mean_k w_k CE(target of bar k) + b mean_k KL_k(pi || base) + CE of the real bars
    """
    coarse, fine, when, real = origins.context
    n, H = coarse.shape[1], walk.shape[1]
    inputs = (torch.cat((coarse, walk[:, :-1, 0]), 1), torch.cat((fine, walk[:, :-1, 1]), 1),
              torch.cat((when, origins.times[:, :-1]), 1))                      # (B, n + H - 1)
    h = model.hidden(*inputs)                                                   # (B, n + H - 1, C)
    given = torch.cat((real[0][:, :-1].clamp(min=0), target[..., 0]), 1)        # (B, n + H - 1)
    coarse_logits, fine_logits = model.coarse_logits(h), model.fine_logits(h, given)
    plain = mean_nats(coarse_logits[:, :n], real[0]) + mean_nats(fine_logits[:, :n], real[1])

    log_coarse = coarse_logits[:, n - 1:].float().log_softmax(-1)               # (B, H, 2^k1)
    log_fine = fine_logits[:, n - 1:].float().log_softmax(-1)                   # (B, H, 2^k2)
    log_p = log_coarse.gather(-1, target[..., :1]) + log_fine.gather(-1, target[..., 1:])
    w = 1 + LATER * torch.arange(H, device=h.device) / max(1, H - 1)
    nats = -(w * log_p[..., 0]).mean()
    with torch.no_grad():
        h_base = base.hidden(*inputs)[:, n - 1:]                                # (B, H, C)
        base_coarse = base.coarse_logits(h_base).float().log_softmax(-1)
        base_fine = base.fine_logits(h_base, target[..., 0]).float().log_softmax(-1)
    divergence = (kl(log_coarse, base_coarse) + kl(log_fine, base_fine)).mean()
    loss = config.walk * nats + config.kl * divergence + plain
    return loss, dict(loss=nats.item(), plain=plain.item(), kl=divergence.item())


# --------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    given = cli(Config, __doc__, argv)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}: draw paths, learn on them, anew."""
    stage = set_up("rollout", given, Config, check, room=lambda config: config.horizon - 1)
    if stage is None:
        return
    config, model = stage.config, stage.model
    slots = [data.slots_of(bars) for bars in stage.series]
    stage.begin(Validation(stage))
    while not stage.done:
        step = stage.run.step
        last = min(step + ROUND[config.select], config.steps)
        batches = [draw_paths(stage, slots, k) for k in range(step, last)]
        for origins, walk in batches:
            target = origins.tokens if config.target == "true" else walk
            with stage.autocast():
                loss, parts = rollout_loss(model, stage.base, origins, walk, target, config)
            stage.update(loss, parts)
        stage.save_if_due()     # between rounds: a resumed run draws the same paths
    stage.finish("base", "path CRPS", "a surely better path CRPS on val")


def draw_paths(stage, slots, step):
    """(Origins [B], their paths int64 [B, H, 2]) of an update, of the model as it now is."""
    config, model, device = stage.config, stage.model, stage.device
    chance = np.random.default_rng([config.seed, step, 1])
    windows = data.draw_windows(stage.streams, config.seed, step)
    horizon = horizon_at(step, config)
    origins = origins_of(stage.streams, stage.series, slots, *windows, horizon, config.horizon)
    origins = origins.to(device)
    uniform = chance.random((config.batch_size, config.candidates, horizon, 2), np.float32)
    uniform = torch.from_numpy(uniform).to(device)
    with torch.no_grad(), stage.autocast():
        state = model.prefill(*origins.context[:3])
    where = model, stage.tokenizer, state, origins, uniform, config.temperature
    if config.select == "step":
        return origins, guided_walk(*where)[0]
    walk, origins = best_paths(*where)
    return origins, walk


def horizon_at(step, config):
    """Bars of a path at an update: short ones first."""
    third = 3 * step // config.steps
    return min(config.horizon, (*CURRICULUM, config.horizon)[third])


class Validation(StageValidation):
    """Path CRPS on val, beside the base's: what chooses the weights."""

    def __init__(self, stage):
        config = stage.config
        super().__init__(stage, config.horizon)
        print(f"select {config.select}, target {config.target}: {stage}")
        path_crps = at_step(self.base_paths, "path_crps", None)[0]
        print(f"checked on {len(self.t.path_r):,} origins of val; the base: path CRPS "
              f"{path_crps:.4f}, mean over {config.horizon} bars")
        if not len(self.t.path_weights):
            print(f"val has {self.t.n_path_blocks} blocks of time, too few for an interval: no "
                  f"weights can be kept; train --ckpt with an earlier --val_start")
        print(f"{'step':>5}{config.target:>9}{'plain':>9}{'KL':>9}{'left':>9}   "
              f"path CRPS to the base, val    in 90 %")

    def judge(self, model):
        now = self.paths(model)
        ratio = against(now, self.base_paths, "path_crps", self.t, None)
        path_crps, inside = (float(at_step(now, metric, None)[0])
                             for metric in ("path_crps", "path_coverage90"))
        found = dict(path_crps=path_crps, path_crps_ratio=ratio, path_coverage90=inside)
        holds = ratio["hi"] is not None and ratio["hi"] < 1
        return path_crps, holds, found, f"{backtest.show(ratio, 1, 4):<26}{inside:>11.1%}"


if __name__ == "__main__":
    run(main)
