"""What the weights in training are worth on val: the score that chooses them, and the reports."""
import numpy as np
import torch
import torch.distributed as dist

import data
from backstage.lean import set_lean
from backstage.script import peak_memory, progress


def candle_values(model, coarse, fine=None):
    """Close and range of codes, in units of s_t, and volume as it is standardized: [..., 3]."""
    close, high, low, volume = model.values(model.standardized(coarse, fine))
    return torch.stack((close, high - low, volume), -1)


def crps(p, values, y):
    """CRPS [N] of distributions p [N, V] over values [V], for outcomes y [N].

    The integral of (F(x) - 1{x >= y})^2 over x.
    """
    values, order = values.sort()
    F, width = p[:, order].cumsum(-1)[:, :-1], values.diff()                  # [N, V - 1], [V - 1]
    outside = (values[0] - y).clamp(min=0) + (y - values[-1]).clamp(min=0)
    below = (y[:, None] - values[:-1]).clamp(min=0).minimum(width)            # of each gap, below y
    return (F.square() * below + (1 - F).square() * (width - below)).sum(-1) + outside


@torch.no_grad()
def evaluate(model, val, tiles, series, autocast, rank, world):
    """Fits the model's lean on the targets in the tiles of val, then scores them: a dict.

    coarse, fine: CE, nats; da: share of right calls of bars that moved; close, range, volume: CRPS
    by the coarse token alone, as a share of the unigram's; score: the mean of these three; lean.
    """
    model.eval()
    model.lean.fill_(1.0)
    batches = val_batches(model, val, tiles, series, autocast, rank, world)
    set_lean(model, [(h, coarse, stamp) for h, coarse, _, _, stamp in batches], world)

    device = model.up_mask.device
    values = candle_values(model, torch.arange(len(model.D1), device=device))           # [2^k1, 3]
    unigram = model.coarse_share.softmax(-1)                                            # [2^k1]
    # targets, coarse, fine, right, moved, CRPS x 3, the unigram's CRPS x 3
    sums = torch.zeros(11, dtype=torch.float64)
    for h, coarse, fine, change, _ in batches:
        log_p = model.coarse_logits(h).log_softmax(-1)                                  # [N, 2^k1]
        log_fine = model.fine_logits(h, coarse).log_softmax(-1)                         # [N, 2^k2]
        p, y = log_p.exp(), candle_values(model, coarse, fine)                          # y [N, 3]
        up = p @ model.up_mask.float() / (1 - model.config.unmoved) > 0.5               # [N]
        nats = [-a.gather(1, b[:, None]).sum() for a, b in ((log_p, coarse), (log_fine, fine))]
        moved = change != 0
        right = (up == (change > 0))[moved].sum()
        scores = [crps(q, values[:, k], y[:, k]).sum()
                  for q in (p, unigram.expand(len(p), -1)) for k in range(3)]
        n = torch.tensor(len(h))
        sums += torch.stack([n, *nats, right, moved.sum(), *scores]).double().cpu()
    sums = sums.to(device)
    if world > 1:
        dist.all_reduce(sums)
    model.train()
    n, coarse, fine, right, moved = sums[:5].tolist()
    ours, unigrams = sums[5:8], sums[8:]
    close, range_, volume = shares = (ours / unigrams.clamp(min=1e-12)).tolist()
    known = [share for share, of in zip(shares, unigrams.tolist()) if of > 1e-9]  # volume may lack
    return dict(coarse=coarse / n, fine=fine / n, da=right / max(1, moved), close=close,
                range=range_, volume=volume, score=sum(known) / len(known), lean=model.lean.item())


def val_batches(model, val, tiles, series, autocast, rank, world):
    """Of this process's tiles: hidden states [N, C], coarse, fine, change of the close, stamp [N]
    of the bars that are targets."""
    device, n, n_rows = model.up_mask.device, val.block_size, max(1, 2048 // val.block_size)
    batches = []
    for i in range(rank * n_rows, len(tiles), world * n_rows):
        which, ends = (np.array(a) for a in zip(*tiles[i:i + n_rows]))
        *inputs, targets = data.gather(val, which, ends)                                # [B, T]
        change = np.stack([np.diff(series[s].ohlcva[e - n:e + 1, 3]) for s, e in zip(which, ends)])
        # eager: not worth a compilation of its own
        with autocast(), torch.compiler.set_stance("force_eager"):
            h = model.hidden(*(a.to(device) for a in inputs)).float()                   # [B, T, C]
        is_target = targets[0] >= 0
        columns = *targets, torch.from_numpy(change), inputs[2]
        columns = [a[is_target].to(device) for a in columns]                            # [N]
        batches.append((h[is_target.to(device)], *columns))
    return batches


def say_heading(say):
    say(f"{'':>6}{'nats per bar':^34}{'CRPS to unigram, val':^24}")
    say(f"{'step':>6}{'train':>9}{'val':>9}{'coarse':>8}{'fine':>8}{'close':>8}{'range':>8}"
        f"{'volume':>8}{'right':>8}{'lean':>6}{'left':>8}")


def say_report(run, scores, grad_norm, clock, say):
    """A line of the table and an entry in the metrics; the mean training loss starts anew."""
    val_loss = scores["coarse"] + scores["fine"]
    train_loss = float(np.mean(run.losses)) if run.losses else None
    run.metrics.append(dict(stage="pretrain", step=run.step, train=train_loss, val=val_loss,
                            grad_norm=grad_norm, **scores))
    run.losses = []
    progress("")
    shown = f"{'.':>9}" if train_loss is None else f"{train_loss:>9.4f}"
    columns = "".join(f"{scores[k]:>8.4f}" for k in ("coarse", "fine", "close", "range", "volume"))
    say(f"{run.step:>6}{shown}{val_loss:>9.4f}{columns}{scores['da']:>8.2%}{scores['lean']:>6.2f}"
        f"{clock.left(run.step)!s:>8}", flush=True)


def print_result(config, run, model, val, best_da, seconds):
    """The best weights beside the unigram, the codes' frequencies in training, to be beaten."""
    rows = [m for m in run.metrics if "score" in m]
    row = min(rows, key=lambda m: m["score"])
    if row["score"] > run.best_val:     # no update was clearly better than --init_from
        row = rows[0]
        print(f"no update is clearly better on val than {config.init_from}: its weights are kept")
    unigram = []
    for column, log_share in enumerate((model.coarse_share, model.fine_share)):
        tokens = np.concatenate([t[first:max(first, last), column]
                                 for t, (first, last) in zip(val.tokens, val.targets)])
        log_p = log_share.log_softmax(-1)[torch.from_numpy(tokens.astype(np.int64))]
        unigram.append(-log_p.double().mean().item())
    print(f"\n{'val, best weights':<28}{'model':>9}{'unigram':>9}")
    print(f"{'coarse token, nats':<28}{row['coarse']:>9.4f}{unigram[0]:>9.4f}")
    print(f"{'fine token, nats':<28}{row['fine']:>9.4f}{unigram[1]:>9.4f}")
    for name in ("close", "range", "volume"):
        print(f"{'CRPS of ' + name:<28}{row[name]:>9.4f}{1:>9}")
    best = f"{best_da:>9.2%}  best reachable" if best_da else ""
    print(f"{'direction accuracy':<28}{row['da']:>9.2%}{best}")
    memory = peak_memory()
    memory = f"{memory / 1e9:>8.2f}G" if memory else ""
    print(f"{'time, peak memory':<28}{seconds:>8.0f}s{memory}")
    if row["coarse"] >= unigram[0] or row["score"] >= 1:
        print("this model is no better than the frequencies of the codes: the bars are too few to "
              "learn from; give more, or fine-tune: --init_from")
    print(f"{config.out}: best weights of step {row['step']}; "
          f"forecast with: python sample.py --ckpt {config.out}")
