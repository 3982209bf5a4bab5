"""What a checkpoint holds, and the checks at the door: a file may come from anyone."""
import types
import typing
from dataclasses import asdict

import torch

import data
from backstage.files import load_safe, save_atomic
from backstage.script import UserError, holds_controls
from tokenizer import Tokenizer

SEEN_DATES = "the weights that were tuned may have seen these dates, so that scores flatter them"


class Source(typing.TypedDict):
    """The bars that a run was trained on."""
    sources: list[str]                      # as --data had them, or ["synthetic"]
    fingerprint: str | None
    seed: int | None                        # of the synthetic market, where it is not the run's
    # up to this time stamp the weights it was tuned from may have seen its bars
    overlap: int | bool | None
    intervals: list[int] | None             # median spacings of the symbols, in seconds


class Report(typing.TypedDict):
    """Scores in the course of a run; each stage adds its own."""
    stage: str | None
    step: int | None
    train: float | None                     # losses
    val: float | None
    val_logloss: float | None
    path_crps: float | None


class Dump(typing.TypedDict):
    """What Tokenizer.dump makes."""
    config: dict[str, object]
    state: dict[str, torch.Tensor]


class Checkpoint(typing.TypedDict):
    """What a checkpoint of any stage holds; a stage may add to it."""
    stage: str
    config: dict[str, object] | None        # of the model; None while the tokenizer is in training
    model: dict[str, torch.Tensor] | None   # its last weights
    best: dict[str, torch.Tensor] | None    # those of the best score on val
    average: dict[str, torch.Tensor] | None  # those averaged over the last updates
    tokenizer: Dump
    features: dict[str, object] | None      # data.FEATURES
    optimizer: list | None
    scaler: dict[str, float] | None         # of fp16
    dtype: str | None                       # of the matmuls
    run: dict[str, object] | None           # the stage's settings
    step: int | None                        # updates done
    bad_steps: int | None                   # of these in a row, not finite
    best_val: float | None                  # the best score, and how many reports ago it was
    since_best: int | None
    ended: bool | None                      # early, since it no longer gained
    world: int | None                       # processes, and the threads of each
    threads: int | None
    seed: int | None
    data: Source | None
    splits: tuple[int, ...] | None          # time stamps: val starts, test starts
    metrics: list[Report]


FORMAT_VERSION = 6
RANGES = dict.fromkeys(("step", "bad_steps", "since_best", "seed"), (0, 2**63 - 1))
# a report has all or no score
SCORES = "step", "val", "coarse", "fine", "da", "close", "range", "volume", "score"


def read_checkpoint(path):
    """The plain dict of a checkpoint of any stage, its fields checked. Raises UserError for a file
    that is none."""
    entry = load_safe(path)
    if not isinstance(entry, dict) or "format_version" not in entry:
        raise UserError(f"{path}: not a Kronos-R checkpoint; give a file that pretrain.py wrote")
    if type(entry["format_version"]) is not int or entry["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {entry['format_version']!r}, "
                             f"this version reads {FORMAT_VERSION}; train it anew")
    for name, kind in typing.get_type_hints(Checkpoint).items():
        if name not in entry or not fits(entry[name], kind):
            raise damaged(path, f"{name!r} is {'of a wrong kind' if name in entry else 'missing'}")
    source = entry["data"] or {}
    for holder in (entry, source, *entry["metrics"]):
        for name, (low, high) in RANGES.items():
            if holder.get(name) is not None and not low <= holder[name] <= high:
                raise damaged(path, f"{name!r} is {holder[name]}")
    has_names = source and source["sources"] and all(source["sources"])
    if source and not (has_names and all(k > 0 for k in source.get("intervals") or ())):
        raise damaged(path, "its bars have no name, or an interval that is none")
    if any(map(holds_controls, [source.get("sources"), *(entry["run"] or {}).values()])):
        raise damaged(path, "its texts hold control characters")
    if any(report.get("step") is None for report in entry["metrics"]):
        raise damaged(path, "a report has no step")
    if not fits(entry.get("losses", []), list[float | dict[str, float]]):
        raise damaged(path, "'losses' are no numbers")
    for report in entry["metrics"]:
        if "score" in report and not all(fits(report.get(name), float) for name in SCORES):
            raise damaged(path, "a report lacks scores")
    splits, made = entry["splits"], data.FEATURES
    if splits is not None and not (len(splits) == 2 and -2**62 < splits[0] <= splits[1] < 2**62):
        raise damaged(path, "'splits' are not two dates")
    if entry["dtype"] not in (None, "bf16", "fp16", "fp32"):
        raise damaged(path, f"'dtype' is {entry['dtype']!r}")
    if any(weight.dtype != torch.float32 for weight in entry["tokenizer"]["state"].values()):
        raise damaged(path, "weights of the tokenizer are of a wrong type")
    if entry["features"] not in (None, made):
        raise damaged(path, "it reads other features than this version makes")
    return entry


def sources_of(path):
    """The names of the bars that a checkpoint was trained on, which a run that names none reads."""
    return (read_checkpoint(path)["data"] or {}).get("sources", []) if path else []


def damaged(path, reason):
    return UserError(f"{path}: damaged checkpoint ({reason}); restore it from a copy or train it "
                     f"anew")


def fits(value, kind):
    """Whether a value of a file is of a type such as int, float | None, list[str], dict[str, int],
    or a TypedDict.

    The last: a dict with at least these fields; one that is missing counts as None.
    """
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, k) for k in inner)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind).items()
        return isinstance(value, dict) and all(fits(value.get(name), k) for name, k in hints)
    if typing.get_origin(kind) in (list, tuple):
        return isinstance(value, (list, tuple)) and all(fits(v, inner[0]) for v in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, kind) and (kind in (bool, object) or type(value) is not bool)


def check_sizes(config):
    """ValueError for a ModelConfig whose sizes do not fit one another, or are absurd."""
    limits = dict(coarse_bits=(1, 14), fine_bits=(1, 14), n_layer=(1, 256), n_head=(1, 256),
                  n_embd=(1, 16384), linear_heads=(0, config.n_head), latents=(1, 1024),
                  rounds=(1, 64), span=(1, 2**16), block_size=(1, 2**31),
                  aux_weight=(0.0, 100.0), unmoved=(0.0, 0.999))
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not fits(value, type(low)) or not low <= value <= high:
            raise ValueError(f"{name} must be within {low} and {high}, not {value!r}")
    n_local, n_windows = config.n_head - config.linear_heads, len(config.windows)
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd ({config.n_embd}) must be an even multiple of n_head "
                         f"({config.n_head})")
    if not all(isinstance(w, int) and 1 <= w <= 2**16 for w in config.windows):
        raise ValueError(f"windows must be 1 to 65536 bars, not {config.windows!r}")
    if n_local and (not n_windows or n_local % n_windows):
        raise ValueError(f"{n_local} local heads cannot be shared among {n_windows} windows")
    if config.pos not in ("rope", "alibi", "both"):
        raise ValueError(f"pos must be rope, alibi or both, not {config.pos!r}")


def read_sizes(entry, config_class):
    """The model's config, a config_class, of a checkpoint; ValueError for one that cannot be that
    of its weights."""
    kinds = typing.get_type_hints(config_class)
    for name, value in entry["config"].items():
        if name not in kinds or not fits(value, kinds[name]):
            raise ValueError(f"setting {name!r} of the model is unknown or of a wrong kind")
    config = config_class(**entry["config"])
    n_weights = sum(weight.numel() for weight in entry["model"].values())
    if 12 * config.n_layer * config.n_embd**2 > n_weights:  # it might not fit the memory
        raise ValueError("its sizes are those of a larger model than its weights")
    return config


def check_weights(state, own):
    """ValueError unless the weights of a file are those of `own`, the model's: names, shapes,
    types, codes' candles."""
    if state.keys() != own.keys():
        raise ValueError(f"weight {min(state.keys() ^ own.keys())!r} is missing or unknown")
    for name, weight in state.items():
        # weights to give away
        half = weight.dtype == torch.float16 and own[name].is_floating_point()
        if weight.shape != own[name].shape or not (half or weight.dtype == own[name].dtype):
            raise ValueError(f"weight {name!r} is of another shape or type than the sizes ask for")
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name!r} is not finite")
    if (state["mean"] == 0).all() and (state["std"] == 1).all():
        return      # the candles that Model begins with: it never read those of a tokenizer
    for name in ("D1", "M", "g", "mean", "std", "up_mask"):
        if not torch.allclose(state[name].float(), own[name].float(), rtol=0, atol=1e-3):
            raise ValueError(f"{name!r} of the model are not the candles of its tokenizer")


def save_checkpoint(path, model, tokenizer, **meta):
    """Writes one self-contained file. model may be None while the tokenizer is in training, and
    tokenizer a plain dict.

    meta: of the fields of Checkpoint what there is, and what else a stage needs. UserError when the
    disk refuses.
    """
    entry = dict.fromkeys(typing.get_type_hints(Checkpoint)) | dict(metrics=[]) | meta
    if model is not None:
        entry |= dict(config=asdict(model.config), model=model.state_dict())
    entry["tokenizer"] = tokenizer.dump() if isinstance(tokenizer, Tokenizer) else tokenizer
    entry["format_version"] = FORMAT_VERSION
    save_atomic(entry, path)


def restored(path, device, weights, model_class, config_class):
    """See model.load_checkpoint, whose classes these are."""
    entry = read_checkpoint(path)
    if entry["model"] is None:
        raise UserError(f"{path}: its training has not reached the model yet; go on with "
                        f"pretrain.py --resume")
    states = {"last": entry["model"], "best": entry["best"], "average": entry["average"]}
    chosen = entry["model"] if states[weights] is None else states[weights]
    try:
        tokenizer = Tokenizer.load(entry["tokenizer"])
        model = model_class(read_sizes(entry, config_class))
        model.read_codes(tokenizer)
        for state in states.values():
            if state is not None:
                check_weights(state, model.state_dict())
        model.load_state_dict(chosen)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise damaged(path, reason) from None
    rest = entry.keys() - {"model", "best", "average", "tokenizer"}
    meta = {key: value for key, value in entry.items() if key in rest}
    return model.to(device).eval(), tokenizer, meta
