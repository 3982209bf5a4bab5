"""What the loops of the three stages share: optimizer, rate, state of a run, time left."""
import datetime
import math
import os
import time
import typing
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist

from backstage.checkpoint import damaged, fits, read_checkpoint
from backstage.script import UserError, pick_dtype
from tokenizer import Tokenizer

RESUMED = ("model", "optimizer", "scaler", "dtype", "run", "step", "bad_steps", "best_val",
           "since_best", "data", "splits")
OUTPUTS = "out", "release"  # flags that name files to write
SAVE_SECONDS = 30
MAX_BAD_STEPS = 10   # non-finite updates in a row that end the run


def resumed(given, config_class, free, stages):
    """(config, checkpoint) of --resume: the settings of the file --out.

    given: the flags {name: value}; one that differs, unless in `free`, is a UserError. stages: who
    may have written it.
    """
    path = given.get("out", config_class.out)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file to go on from; drop --resume, or name it by --out")
    entry = read_checkpoint(path)
    if entry["stage"] not in stages:
        raise UserError(f"{path}: written by stage {entry['stage']!r}; resume it with that script")
    missing = [name for name in RESUMED if entry[name] is None]
    if missing:
        raise UserError(f"{path}: no run can go on from it, it has no {missing[0]!r}; "
                        f"fine-tune its weights: --init_from {path}")
    for name, value in given.items():
        saved = entry["run"].get(name, getattr(config_class, name))
        if name not in free and value != saved:
            raise UserError(f"--{name} {value}: the run in {path} has {saved}; "
                            f"drop the flag to go on, or choose another --out")
    kinds = typing.get_type_hints(config_class)
    # a flag that is younger than the run has its default
    wrong = [name for name, value in entry["run"].items()
             if name not in kinds or not fits(value, kinds[name])]
    if wrong:
        raise damaged(path, f"setting {wrong[0]!r} of its run is unknown or of a wrong kind")
    # no file names what is written
    own = {name: value for name, value in entry["run"].items() if name not in OUTPUTS}
    return config_class(**own | dict(overwrite=False, out=path) | given), entry


class Optimizer:
    """Muon (Jordan 2024; torch.optim.Muon) for the matrices of the layers, AdamW (arXiv 1711.05101)
    for all else.

    Muon makes the update of a matrix orthogonal, so that each of its directions moves alike. Only
    matrices decay.
    """

    def __init__(self, model, lr, adam_lr, weight_decay):
        matrices, tables, vectors = [], [], []
        for name, p in model.named_parameters():
            inner = name.startswith(("layers", "reasoner"))
            inner = inner and not name.endswith("latent")
            (vectors if p.dim() < 2 else matrices if inner else tables).append(p)
        groups = [dict(params=tables, weight_decay=weight_decay),
                  dict(params=vectors, weight_decay=0.0)]
        on_known = tables[0].device.type in ("cpu", "cuda")
        self.parts = (torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay),
                      torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), fused=on_known))
        self.peaks = lr, adam_lr

    def set_rate(self, share):
        """The learning rates, as a share of their peaks."""
        for part, peak in zip(self.parts, self.peaks):
            for group in part.param_groups:
                group["lr"] = share * peak

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        """The settings (rates, decays) stay those of the config.

        ValueError where a tensor has not the shape and type of its weight: files are not trusted.
        """
        if len(states) != len(self.parts):
            raise ValueError("the optimizer's state is not that of Muon and AdamW")
        moments = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}
        for part, state, names in zip(self.parts, states, moments):
            weights = [p for group in part.param_groups for p in group["params"]]
            for i, entry in state["state"].items():
                if entry.keys() != names or not 0 <= i < len(weights):
                    raise ValueError(f"the optimizer's state of weight {i!r} is not what it keeps")
                for name, value in entry.items():
                    shape = () if name == "step" else weights[i].shape
                    fit = value.shape == shape and value.dtype == torch.float32
                    if not fit or not torch.isfinite(value).all():
                        raise ValueError(f"the optimizer's {name!r} does not fit its weight, "
                                         f"or is not finite")
            groups = part.state_dict()["param_groups"]
            part.load_state_dict(dict(state=state["state"], param_groups=groups))


def cosine_rate(step, steps, warmup):
    """The learning rate as a share of its peak: warm-up, then a cosine to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * along))


@dataclass
class Run:
    """How far a training has come; all of it is in the checkpoint."""
    step: int = 0
    bad_steps: int = 0            # non-finite updates in a row
    best: dict | None = None      # weights of the best score on val
    best_val: float = math.inf    # that score, lower is better
    since_best: int = 0           # reports since then
    metrics: list = field(default_factory=list)
    losses: list = field(default_factory=list)     # of the updates since the last report

    @classmethod
    def of(cls, entry):
        return cls(**{f.name: entry[f.name] for f in fields(cls) if f.name in entry})

    def update(self, model, optimizer, scaler, loss, clip, say=print):
        """One update from the gradients of the model, or none where loss or gradient is not finite.

        Returns the gradient's norm. UserError after MAX_BAD_STEPS of these in a row. loss: a float,
        the same on every process.
        """
        for part in optimizer.parts:
            scaler.unscale_(part)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        if math.isfinite(loss) and math.isfinite(norm):
            for part in optimizer.parts:
                scaler.step(part)
            # which fused optimizers forget: see kernels.kept
            torch.autograd.graph.increment_version(model.parameters())
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            say(f"{self.step + 1:>6} loss {loss}, gradient norm {norm}: not finite, step skipped")
            if self.bad_steps == MAX_BAD_STEPS:
                raise UserError(f"{MAX_BAD_STEPS} steps in a row were not finite, the last of them "
                                f"step {self.step + 1}: start again with a lower --lr, or with "
                                f"--dtype fp32")
        scaler.update()
        optimizer.zero_grad()
        self.step += 1
        return norm

    def keep_if_best(self, model, score):
        """Keeps the weights where their score is the best so far."""
        self.since_best += 1
        if score < self.best_val:
            self.since_best, self.best_val = 0, score
            self.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


class Clock:
    """Time left of a loop, and when to save."""

    def __init__(self, step, steps, save_every):
        self.from_step, self.steps, self.save_every = step, steps, save_every
        self.began = self.saved_at = time.time()

    def left(self, step):
        seconds = (time.time() - self.began) / max(1, step - self.from_step) * (self.steps - step)
        return datetime.timedelta(seconds=round(seconds))

    def save_due(self, step):
        """True at the end, every save_every steps, and SAVE_SECONDS after it last was."""
        late = time.time() - self.saved_at > SAVE_SECONDS
        due = late or step == self.steps or step % self.save_every == 0
        if due:
            self.saved_at = time.time()
        return due


def stop_here(stop, run, out, say=print):
    """Ends the process after a signal, its state being saved."""
    say(f"stopped at step {run.step}; saved in {out}; go on with --resume")
    raise SystemExit(stop.status)


def precision(config, device, entry=None):
    """(autocast, scaler, its name and why) of --dtype; a resumed run keeps its type."""
    name = entry["dtype"] if entry else config.dtype
    name, dtype, why = pick_dtype(name, device)
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    if entry:
        if scaler.is_enabled() and entry["scaler"].keys() != scaler.state_dict().keys():
            raise damaged(config.out, "the scaler of fp16 is not whole")
        scaler.load_state_dict(entry["scaler"])
        why = "as it began"
    autocast = lambda: torch.autocast(device.type, dtype, enabled=name != "fp32")
    return autocast, scaler, name, why


def average_gradients(model, n_params, world):
    """Over the processes, in one exchange."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in model.parameters()])
    dist.all_reduce(flat)
    flat /= world
    for p, grad in zip(model.parameters(), flat.split(n_params)):
        if p.grad is not None:      # as on every other process
            p.grad = grad.view_as(p)


def load_tokenizer(path):
    try:
        return Tokenizer.load(read_checkpoint(path)["tokenizer"])
    except ValueError as e:
        raise UserError(f"{path}: no tokenizer can be taken from it ({str(e).splitlines()[0]}); "
                        f"name another checkpoint")


def load_optimizer(optimizer, entry, path):
    try:
        optimizer.load_state_dict(entry["optimizer"])
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise damaged(path, str(e).splitlines()[0])
