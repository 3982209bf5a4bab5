"""Stage 2: train P(up), so that directions improve and no other score gets worse.

    python expo.py --ckpt out.pt --out expo.pt                     # on the bars of out.pt
    python expo.py --ckpt out.pt --data bars.csv --pairs drawn --out expo.pt
    python expo.py --ckpt out.pt --out expo.pt --resume            # after a kill: the same weights

Next-token training weighs every code alike; whether the close rises is one bit of twenty.
Regression EXPO (Hu, Kong, He and Wipf 2025, arXiv 2506.07492) learns from pairs, w better than l,
beside a frozen copy `ref` of the model:

    loss = (sigmoid(log pi(w) / pi(l)) - y)^2 + beta KL(pi || ref)
    y    = lam sigmoid(log ref(w) / ref(l)) + (1 - lam)

Two ways to a pair. `set`, the default, takes all up tokens against all down tokens where the bar
rose, and the reverse where it fell. Then log pi(w) / pi(l) is logit P(up) where the bar rose, and
-logit P(up) where it fell: with lam = 0 the first term is the Brier score of P(up), a proper score,
and nothing is drawn. `drawn` is nearer to the publication: candidates come from the reference, each
is scored by its direction and its error, the true bar is w and the worst candidate l.

KL is in closed form, of the coarse token plus of the fine token after the true coarse one; the sum
over all coarse tokens would cost 2^k1 times as much.

How far does P(up) move? Let the reference say 1/2, the truth be 1/2 + e, and the model say 1/2 + d,
with small e and d. KL is then about 2 d^2, and the loss of `set` is least at

    P(up) = 1/2 + e (1 - lam) / (1 + 2 beta)

Bars that hardly moved carry no label. Kept are the weights with the best log loss of P(up) on val,
if it is surely (95 %) better than the reference's and nothing else is worse (see `guard`): MAE,
CRPS of close, range, volume and of ten-bar paths, and their 90 % band; else the reference.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

import backtest
import data
from backstage.bins import close_table
from backstage.files import sole_writer
from backstage.generate import draw
from backstage.scores import against
from backstage.script import UserError, cli, run
from backstage.stage import (
    FREE, Settings, StageValidation, check_settings, kl, set_up)
from backstage.stage_scores import NO_WORSE, upper


@dataclass
class Config(Settings):
    out: str = "expo.pt"              # checkpoint to write
    pairs: str = "set"                # set or drawn
    lam: float = 0.0                  # share of the reference in the target: 1 holds still
    beta: float = 0.1                 # weight of KL(pi || ref), nats per bar
    noise: float = 0.1                # a close that moved by less, in s_t, carries no label
    candidates: int = 192             # drawn for each labelled bar (pairs drawn)
    labels: int = 32                  # labelled bars with candidates, a window on average (drawn)
    margin: float = 0.5               # by which w's score must exceed that of l (pairs drawn)
    lr: float = 0.02                  # peak learning rate of Muon (matrices of the layers)
    adam_lr: float = 3e-3             # peak learning rate of AdamW (all else)
    paths: int = 50                   # sampled futures of each origin, in the backtest at the end


ERROR_WEIGHT = 0.25  # of a candidate's error, beside 1 for the right direction
PIECE = 4            # labelled bars whose candidates are drawn at a time, in the cache
# the guard: errors that may not grow, the share within 90 % bands and by how much it may move
COSTS = ("mae", "crps", "range_crps", "volume_crps", "path_crps")
BAND, BAND_WITHIN = "path_coverage90", 0.005
VAL_HORIZON = 10     # bars of the paths on val


def check(config):
    check_settings(config, ("labels",), ("lam", "beta", "margin", "noise"), pairs=("set", "drawn"))
    if config.lam > 1:
        raise UserError(f"--lam {config.lam}: a share, at most 1")


# --------------------------------------------------------------------------------------------------
# The loss

def expo_loss(log_ratio, ref_log_ratio, lam):
    """Regression EXPO, pair by pair: of log pi(w)/pi(l) and log ref(w)/ref(l), of one shape."""
    y = lam * ref_log_ratio.sigmoid() + (1 - lam)
    return (log_ratio.sigmoid() - y).square()


def loss_of(model, reference, table, batch, random, config):
    """The loss of a batch, and what the report shows of it, a dict of floats.

    batch: coarse, fine, time, target_coarse, target_fine int64 [B, T]; table [2^k1, 2^k2]: see
    close_table; random: a numpy generator. The dict: loss, without KL; kl; odds, the median of
    log ref(w)/ref(l), NaN without a pair.
    """
    *inputs, target_coarse, target_fine = batch
    counted = target_coarse >= 0
    target = torch.stack((target_coarse[counted], target_fine[counted]), 1)     # (N, 2)
    pi = Predictions.of(model, inputs, counted, target)
    with torch.no_grad():
        ref = Predictions.of(reference, inputs, counted, target)
    move = table[target[:, 0], target[:, 1]].sinh()                             # (N,): in s_t
    labelled = (move.abs() > config.noise).nonzero()[:, 0]
    if config.pairs == "set":
        log_ratio, ref_log_ratio = set_pairs(pi, ref, move, labelled)
    else:
        chosen = random.permutation(len(labelled))[:config.labels * len(counted)]
        labelled = labelled[torch.from_numpy(np.sort(chosen)).to(labelled.device)]
        log_ratio, ref_log_ratio = drawn_pairs(
            pi, ref, table, target, move, labelled, random, config)
    expo = expo_loss(log_ratio, ref_log_ratio, config.lam).sum() / max(1, len(log_ratio))
    divergence = (kl(pi.log_coarse, ref.log_coarse) + kl(pi.log_fine, ref.log_fine)).mean()
    odds = ref_log_ratio.median().item() if len(ref_log_ratio) else math.nan
    return expo + config.beta * divergence, dict(loss=expo.item(), kl=divergence.item(), odds=odds)


@dataclass
class Predictions:
    """What a model says of N targets."""
    model: torch.nn.Module
    h: torch.Tensor           # [N, C]
    log_coarse: torch.Tensor  # [N, 2^k1]
    log_fine: torch.Tensor    # [N, 2^k2], given the target's coarse token

    @classmethod
    def of(cls, model, inputs, counted, target):
        h = model.hidden(*inputs)[counted]                                      # (N, C)
        log_coarse = model.coarse_logits(h).float().log_softmax(-1)             # (N, 2^k1)
        log_fine = model.fine_logits(h, target[:, 0]).float().log_softmax(-1)   # (N, 2^k2)
        return cls(model, h, log_coarse, log_fine)


# --------------------------------------------------------------------------------------------------
# Pairs of sets: all up tokens against all down tokens

def logit_up(model, log_coarse):
    """log P(up) / P(not up) [...] from the coarse log-probabilities [..., 2^k1]."""
    up, down = log_coarse[..., model.up_mask], log_coarse[..., ~model.up_mask]
    return up.logsumexp(-1) - down.logsumexp(-1)


def set_pairs(pi, ref, move, labelled):
    """log pi(w)/pi(l) and log ref(w)/ref(l) of the labelled bars [n]: w is the true side."""
    side = move[labelled].sign()
    return [side * logit_up(p.model, p.log_coarse[labelled]) for p in (pi, ref)]


# --------------------------------------------------------------------------------------------------
# Drawn pairs: the true bar against the worst of some candidates

def drawn_pairs(pi, ref, table, target, move, labelled, random, config):
    """As set_pairs, of the true bar and the worst candidate, if that is worse by the margin."""
    uniform = random.random((len(labelled), config.candidates, 2), np.float32)
    uniform = torch.from_numpy(uniform).to(move.device)
    losers, gap = draw_losers(ref.model, table, ref.h[labelled], move[labelled], uniform)
    clear = gap >= config.margin
    rows = labelled[clear]
    pair = torch.stack((target[rows], losers[clear]), 1)                        # (n, 2, 2): w, l
    log_ratio = log_odds(pi, rows, pair)
    with torch.no_grad():
        return log_ratio, log_odds(ref, rows, pair)


@torch.no_grad()
def draw_losers(reference, table, h, move, uniform):
    """The worst candidate for each next bar, drawn from the reference, and how much worse it is.

    A candidate's score is 1 if its direction is right, less a quarter of its error relative to the
    true move. The true bar, which is one of the candidates, has the score 1: none is better, so it
    is w. h [N, C]: hidden states of the reference; table: see close_table; move [N]: of the true
    bar, in s_t, not 0; uniform [N, candidates, 2]: the chance. -> tokens (coarse, fine) of l,
    int64 [N, 2], and 1 - its score [N].
    """
    coarse = draw(reference.coarse_logits(h), 1.0, 1.0, uniform[..., 0].contiguous())
    losers, gap = [], []
    for h, move, coarse, u in zip(*(a.split(PIECE) for a in (h, move, coarse, uniform[..., 1:]))):
        fine = draw(reference.fine_logits(h[:, None], coarse), 1.0, 1.0, u)[..., 0]
        close, true = table[coarse, fine].sinh(), move[:, None]                 # (n, candidates)
        right = (close > 0) == (true > 0)
        score = right.float() - ERROR_WEIGHT * (close - true).abs() / true.abs()
        worst = score.argmin(1, keepdim=True)                                   # (n, 1)
        losers.append(torch.cat((coarse.gather(1, worst), fine.gather(1, worst)), 1))
        gap.append(1 - score.gather(1, worst)[:, 0])
    return torch.cat(losers), torch.cat(gap)


def log_odds(p, rows, pair):
    """log p(w)/p(l) [n] of the Predictions p in these rows [n], of pairs of tokens [n, 2, 2]."""
    coarse, fine = pair.unbind(-1)                                              # (n, 2)
    h = p.h[rows, None].expand(-1, 2, -1)                                       # (n, 2, C)
    log_fine = p.model.fine_logits(h, coarse).float().log_softmax(-1)           # (n, 2, 2^k2)
    log_coarse = p.log_coarse[rows].gather(1, coarse)                           # (n, 2)
    log_p = log_coarse + log_fine.gather(2, fine[..., None])[..., 0]
    return log_p[:, 0] - log_p[:, 1]


# --------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    given = cli(Config, __doc__, argv)
    with sole_writer(given.get("out", Config.out)):
        training(given)


def training(given):
    """The whole run, by the flags given {name: value}."""
    stage = set_up("expo", given, Config, check, FREE | {"horizon"})
    if stage is None:
        return
    config, model = stage.config, stage.model
    model.lean.fill_(1.0)   # direction is what is trained: not to be drawn to the base rate
    table = close_table(stage.tokenizer).to(stage.device)
    stage.begin(Validation(stage))
    while not stage.done:
        step = stage.run.step
        random = np.random.default_rng([config.seed, step, 1])
        coarse, fine, when, target = data.get_batch(stage.streams, config.seed, step)
        batch = [a.to(stage.device) for a in (coarse, fine, when, *target)]
        with stage.autocast():
            loss, parts = loss_of(model, stage.base, table, batch, random, config)
        stage.update(loss, parts)
        stage.save_if_due()
    stage.finish("reference", "log loss", "a surely better log loss on val and nothing worse")


def guard(scores, reference, t):
    """What the weights win and what they cost, on the same targets t: (gain, costs, failed).

    gain: the difference in log loss of P(up), costs: the other scores {metric: {value, lo, hi}}
    beside the reference's; failed: the names of the conditions that do not hold. All must:
        log loss of P(up)                                  surely (95 %) lower
        MAE, CRPS of close, range, volume, ten-bar paths   upper end of the ratio at most 1.005
        share within the paths' 90 % band                  within half a point
    """
    gain = against(scores, reference, "logloss", t)
    failed = [] if gain["hi"] is not None and gain["hi"] < 0 else ["logloss"]
    costs = {}
    for metric in (*COSTS, BAND):
        if metric not in reference:
            continue  # paths not drawn, bars without volume, or too few of them for a path
        costs[metric] = cost = against(scores, reference, metric, t, None)
        holds = (abs(cost["value"]) <= BAND_WITHIN if metric == BAND
                 else upper(cost) <= NO_WORSE)
        failed += [metric] * (not holds)
    return gain, costs, failed


class Validation(StageValidation):
    """The guard on val: what chooses the weights."""

    def __init__(self, stage):
        super().__init__(stage, VAL_HORIZON)
        base = self.base_next_bars
        print(f"{stage.config.pairs}: {stage}")
        print(f"checked on {len(self.t.r):,} bars of val; the reference: log loss "
              f"{base['logloss'][0]:.4f}, right calls {base['da'][0]:.2%}, "
              f"called up {base['up_share'][0]:.1%}")
        print(f"{'step':>5}{'loss':>9}{'KL':>9}{'odds':>9}{'left':>9}   "
              f"log loss to the reference, val  right   worse")

    def judge(self, model):
        now = self.next_bars(model)
        gain, costs, failed = guard(now, self.base_next_bars, self.t)
        logloss, da, up_share = (float(now[metric][0]) for metric in ("logloss", "da", "up_share"))
        if not failed and logloss < self.stage.run.best_val:    # else no path could change it
            gain, costs, failed = guard(now | self.paths(model),
                                        self.base_next_bars | self.base_paths, self.t)
        found = dict(val_logloss=logloss, gain=gain, da=da, up_share=up_share, costs=costs,
                     failed=failed)
        shown = f"{backtest.show(gain, 1, 4, '+'):<29}{da:>8.2%}   {', '.join(failed) or '-'}"
        return logloss, not failed, found, shown


if __name__ == "__main__":
    run(main)
