"""What the later stages, expo.py and rollout.py, share: their flags, what they begin with, what
ends each step, the choice of weights on val, the result."""
import functools
import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

import backtest
import data
from backstage.checkpoint import sources_of
from backstage.dates import iso
from backstage.files import check_out, fingerprint, weights_hash
from backstage.inputs import load_series
from backstage.loop import (
    Clock, Optimizer, Run, cosine_rate, load_optimizer, precision, resumed, stop_here)
from backstage.scores import bootstrap, time_block_sums
from backstage.script import StopSignal, UserError, check_numbers, pick_device, progress
from backstage.stage_scores import median_paths, model_scores, some_targets
from model import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer

VAL_BARS, VAL_ORIGINS, VAL_PATHS = 12_000, 400, 50  # of val, looked at in training, about
ORIGINS = 1000                                      # of paths on test, about
NEXT_BAR = (("da", "right calls, %", 100, 2), ("up_share", "called up, %", 100, 1),
            ("logloss", "log loss of P(up)", 1, 4), ("ece", "calibration, %", 100, 2),
            ("mae", "MAE", 1, 4), ("crps", "CRPS", 1, 4), ("range_crps", "range CRPS", 1, 4),
            ("volume_crps", "volume CRPS", 1, 4))   # score, label, factor, digits
# flags that may differ on --resume; every other must be as the run began
FREE = {"out", "resume", "overwrite", "device", "backtest", "paths", "eval_every", "save_every"}


@dataclass
class Settings:
    """Flags of both stages; what a stage adds or sets anew stands in its own file."""
    ckpt: str | None = None           # checkpoint to start from, frozen beside the one in training
    data: list[str] | None = None     # bars; none: those that the checkpoint was trained on
    out: str = "stage.pt"             # checkpoint to write
    resume: bool = False              # go on from --out
    overwrite: bool = False           # replace an existing --out
    steps: int = 150                  # updates
    batch_size: int = 16              # windows per update
    block_size: int = 0               # real bars in a window; 0: as the checkpoint was trained
    lr: float = 0.002                 # peak learning rate of Muon (matrices of the layers)
    adam_lr: float = 3e-4             # peak learning rate of AdamW (all else)
    warmup: int = 10                  # updates of warm-up
    weight_decay: float = 0.0         # on matrices
    clip: float = 1.0                 # largest gradient norm
    backtest: bool = True             # at the end, base beside result on the test bars
    horizon: int = 10                 # bars ahead, in that backtest
    paths: int = 200                  # sampled futures of each origin, in that backtest
    device: str = "auto"              # cpu, cuda, cuda:1; auto takes a GPU where there is one
    dtype: str = "auto"               # bf16, fp16 or fp32; auto takes what is faster here
    grad_ckpt: bool = False           # recompute activations in the backward pass: less memory
    seed: int = 0                     # of everything
    eval_every: int = 0               # updates between checks on val; 0: a sixth of the run
    save_every: int = 50              # updates between saves (and at least each 30 s)


def check_settings(config, positive, others, **choices):
    """UserError for what cannot be. positive, others: names of the stage's own numbers, above 0 and
    0 or more; choices: {flag: its values}."""
    check_numbers(config, ("horizon", "candidates", "steps", "batch_size", "lr", "adam_lr", "clip",
                           "paths", "save_every", *positive),
                  ("block_size", "warmup", "weight_decay", "eval_every", "seed", *others))
    if config.ckpt is None:
        raise UserError("--ckpt is missing: name the checkpoint that python pretrain.py wrote")
    if config.paths < 2:
        raise UserError(f"--paths {config.paths}: at least 2")
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise UserError(f"--{name} {getattr(config, name)}: choose {' or '.join(values)}")


# --------------------------------------------------------------------------------------------------
# A stage as it stands

@dataclass
class Stage:
    """A later stage as it stands: the frozen model that it began from, the model in training."""
    name: str
    config: object
    device: torch.device
    base: object          # the model of --ckpt, frozen
    model: object         # the model in training
    tokenizer: Tokenizer
    meta: dict            # of the new checkpoint
    series: list          # Bars that are long enough to train on
    streams: data.Streams
    run: Run
    optimizer: Optimizer
    autocast: object
    scaler: torch.amp.GradScaler
    dtype: str
    why: str              # it is that dtype
    stop: StopSignal
    began: float          # time
    due: bool = False     # to be saved

    def __str__(self):
        n = self.config.batch_size
        windows = int(self.streams.windows[-1])
        return (f"{len(self.series)} symbols, {windows:,} windows, {n} a step, "
                f"{self.config.steps} steps; {self.device}, {self.dtype} ({self.why})")

    @property
    def done(self):
        return self.run.step >= self.config.steps

    def begin(self, val):
        """The loop begins; val, a StageValidation, reports on it and chooses weights."""
        self.val = val
        self.clock = Clock(self.run.step, self.config.steps, self.config.save_every)

    def update(self, loss, parts):
        """Backward, clip, update; at its turn a report of `parts` {name: float}."""
        config, run, val = self.config, self.run, self.val
        self.optimizer.set_rate(cosine_rate(run.step, config.steps, config.warmup))
        self.scaler.scale(loss).backward()
        grad_norm = run.update(self.model, self.optimizer, self.scaler, loss.item(), config.clip)
        run.losses.append(parts)
        if run.step % val.every == 0 or self.done:
            val.report(means(run.losses), grad_norm, self.clock.left(run.step))
            run.losses = []
        else:
            progress(f"step {run.step}/{config.steps}  loss {parts['loss']:.4f}")
        self.due = self.clock.save_due(run.step) or self.due

    def save_if_due(self):
        """Saves at its turn and after a signal, which then ends the process."""
        if self.due or self.stop.signum:
            self.save()
            self.due = False
        if self.stop.signum:
            stop_here(self.stop, self.run, self.config.out)

    def save(self):
        save_checkpoint(
            self.config.out, self.model, self.tokenizer, **self.meta, **vars(self.run),
            stage=self.name, average=None, optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(), dtype=self.dtype)

    def finish(self, rival, score, wanted):
        """Says what was kept and, with --backtest, what it is worth on test.

        rival: what the frozen model is called; score: what chose the weights; wanted: of which.
        """
        self.stop.release()
        config, (name, model) = self.config, self.result()
        if name == "last":
            print(f"no weights had {wanted}: {config.out} holds the {rival} "
                  f"(last: the weights that are not kept)")
        else:
            print(f"{config.out}: weights of {score} {self.run.best_val:.4f} on val; "
                  f"forecast with: python sample.py --ckpt {config.out}")
        if config.backtest:
            t = some_targets(
                self.series, "test", self.meta["splits"], config.horizon, ORIGINS, config.seed)
            print(f"\n{backtest.heading(t, self.meta)}")
            print_test({rival: self.base, name: model}, self.tokenizer, t, config.paths)
        print(f"{time.time() - self.began:.0f} s")

    def result(self):
        """(name, model) in --out: the weights that were kept or, where none were, the last ones."""
        kept = math.isfinite(self.run.best_val)
        name, weights = ("result", "best") if kept else ("last", "last")
        return name, load_checkpoint(self.config.out, self.device, weights)[0]


class StageValidation:
    """The model in training beside the frozen one, on val: what chooses the weights.

    A stage's own has `judge`: model -> (score, lower is better; whether its weights may be kept;
    what the report keeps {name: value}; what it shows, a text).
    """

    def __init__(self, stage, horizon):
        config = stage.config
        self.stage, self.every = stage, config.eval_every or max(1, config.steps // 6)
        self.t = some_targets(stage.series, "val", stage.meta["splits"], horizon, VAL_ORIGINS,
                              config.seed, most=VAL_BARS)

    def next_bars(self, model):
        return model_scores(model, self.stage.tokenizer, self.t, 0, backtest.VAL_PROBES)

    def paths(self, model):
        return model_scores(model, self.stage.tokenizer, self.t, VAL_PATHS, 0)

    @functools.cached_property
    def base_next_bars(self):
        return self.next_bars(self.stage.base)

    @functools.cached_property
    def base_paths(self):
        return self.paths(self.stage.base)

    def report(self, means, grad_norm, left):
        """Scores the model, keeps its weights if they may be and are the best, prints a line."""
        model, run = self.stage.model, self.stage.run
        score, holds, found, shown = self.judge(model)
        if holds:
            run.keep_if_best(model, score)
        parts = dict(means)
        run.metrics.append(dict(stage=self.stage.name, step=run.step, train=parts.pop("loss"),
                                grad_norm=grad_norm, **parts, **found))
        progress("")
        columns = "".join(f"{value:>9.4f}" for value in means.values())
        print(f"{run.step:>5}{columns}{left!s:>9}   {shown}", flush=True)


def print_test(models, tokenizer, t, paths):
    """Two models {name: model} and standing still, side by side; then the median-token paths."""
    columns = {name: model_scores(model, tokenizer, t, paths) for name, model in models.items()}
    still = dict(path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r))
    columns["still"] = bootstrap(time_block_sums(still, t), t)
    backtest.print_versus(columns, t, [*NEXT_BAR, *path_rows(t.horizon)], versus=(1, 0))
    points = {name: bootstrap(time_block_sums(median_paths(model, tokenizer, t), t), t)
              for name, model in models.items()}
    print("one path of median tokens:")
    backtest.print_versus(points, t, [(("path_mape", None), "path MAPE %, mean", 1, 4)])


def path_rows(horizon):
    """Rows of print_versus: the mean over a path and, of errors, some of its bars."""
    rows, steps = [], sorted({1, (horizon + 1) // 2, horizon})
    for metric, label in (("path_crps", "path CRPS"), ("path_mape", "path MAPE %")):
        rows.append(((metric, None), f"{label}, mean", 1, 4))
        rows += [((metric, k - 1), f"  bar {k}", 1, 4) for k in steps]
    return [*rows, (("path_coverage90", None), "in 90 % band, %", 100, 1)]


# --------------------------------------------------------------------------------------------------
# What a stage begins with

def set_up(name, given, config_class, check, free=FREE, room=lambda config: 0):
    """The Stage of these flags {name: value}, begun or gone on with; None if it is finished.

    check(config) refuses what cannot be. free: flags that may differ on --resume. room(config):
    bars that a window needs beyond a block. UserError where the run began with another --ckpt or
    other bars.
    """
    stop, began = StopSignal(), time.time()
    config, entry = config_class(**given), None
    if config.resume:
        config, entry = resumed(given, config_class, free, (name,))
    check(config)
    device = pick_device(config.device)
    if entry is None:
        check_out(config.out, config.overwrite,
                  (config.ckpt, *(config.data or sources_of(config.ckpt))))
    elif entry["step"] >= config.steps:
        return print(f"{config.out}: finished at step {entry['step']}; nothing to do")
    base, tokenizer, old = load_checkpoint(config.ckpt, device)
    base.requires_grad_(False)
    series, streams, source = bars_of(config, base, tokenizer, old, room(config))
    if entry and entry["data"] != source:
        raise UserError(f"{config.out}: begun from other bars or another --ckpt than {config.ckpt} "
                        f"holds now; give it those, or another --out")
    weights = (config.out, device, "last") if entry else (config.ckpt, device, "best")
    model, _, _ = load_checkpoint(*weights)
    model.grad_ckpt = config.grad_ckpt
    # until some weights qualify, the base's are those that forecasts use
    run = Run.of(entry) if entry else Run(best=base.state_dict(), metrics=old["metrics"])
    autocast, scaler, dtype, why = precision(config, device, entry)
    optimizer = Optimizer(model, config.lr, config.adam_lr, config.weight_decay)
    if entry:
        load_optimizer(optimizer, entry, config.out)
    meta = dict(data=source, splits=tuple(old["splits"]), seed=config.seed, run=asdict(config),
                features=old["features"])
    return Stage(name, config, device, base, model, tokenizer, meta, series, streams, run,
                 optimizer, autocast, scaler, dtype, why, stop, began)


def bars_of(config, base, tokenizer, meta, room):
    """(series that are long enough to train on, their Streams, what a checkpoint says of them)."""
    if not meta["data"] or not meta["splits"]:
        raise UserError(f"{config.ckpt}: does not say what it was trained on; "
                        f"name a checkpoint of pretrain.py")
    series = load_series(config.data, meta)
    source = dict(sources=config.data or meta["data"]["sources"], fingerprint=fingerprint(series),
                  reference=weights_hash(base.state_dict()),
                  seed=meta["data"].get("seed", meta["seed"]))  # of a synthetic market
    source |= {k: meta["data"][k] for k in ("overlap", "intervals") if meta["data"].get(k)}
    borders, window = tuple(meta["splits"]), (config.block_size or base.config.block_size) + room
    series = [bars for bars in series if data.targets_of(bars, "train", borders)[1] > window]
    if not series:
        raise UserError(f"no symbol has more than {window} bars before val starts "
                        f"({iso(borders[0])}, the checkpoint's date); lower --block_size, or "
                        f"fine-tune on these bars first: pretrain.py --init_from {config.ckpt}")
    tokens = [data.tokenize(bars, tokenizer) for bars in series]
    streams = data.make_streams(series, tokens, "train", borders, window, config.batch_size)
    return series, streams, source


def kl(log_p, log_q):
    """KL(p || q), nats [...], of log-probabilities [..., V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def means(parts):
    """The mean of each entry of the dicts `parts`, over those that are finite."""
    found = {k: [part[k] for part in parts if math.isfinite(part[k])] for k in parts[0]}
    return {k: sum(v) / len(v) if v else math.nan for k, v in found.items()}
