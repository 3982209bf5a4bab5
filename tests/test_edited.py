"""Checkpoints that were edited: a right result or one line, never a traceback or numbers that are none. All in one process."""
import copy
import math
import random
import signal

import numpy as np
import torch

from backstage.checkpoint import read_checkpoint
from backstage.files import load_safe
import data
import pretrain
import sample
from conftest import TINY


WRONG = {    # what takes the place of a field; of a tensor, what is made of it
    "gone": None, "none": lambda old: None, "minus one": lambda old: -1, "huge": lambda old: 10**30, "nan": lambda old: math.nan,
    "text": lambda old: "x", "list": lambda old: [], "dict": lambda old: {}, "true": lambda old: True, "nested": lambda old: [[old]],
    "tensor": lambda old: torch.ones(3), "keys": lambda old: {1: 2},
}
WRONG_TENSORS = {
    "nan": lambda old: torch.full(old.shape, math.nan), "integers": lambda old: torch.ones(old.shape, dtype=torch.int64),
    "complex": lambda old: old.to(torch.complex64), "doubles": lambda old: old.double(), "longer": lambda old: torch.cat((old.reshape(-1), torch.ones(1))),
    "flat": lambda old: old.reshape(-1)[:0], "one number": lambda old: torch.ones(()).expand(old.shape), "text": lambda old: "x", "gone": None,
    "sparse": lambda old: torch.ones(2, 2).to_sparse(),
}


def places(value, path=()):
    """The paths to all values in dicts and lists inside one another."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*path, key))


def edited(entry, path, change):
    """A copy of the checkpoint with the value at a path changed, or taken out."""
    entry = copy.deepcopy(entry)
    *parents, last = path
    holder = entry
    for key in parents:
        holder = holder[key]
    if change is None:
        del holder[last]
    else:
        holder[last] = change(holder[last])
    return entry


def edits_of_a_checkpoint(entry, chance):
    """Each field by each wrong value; and of what lies inside of them, of weights and moments too, a sample."""
    for name in entry:
        for what, change in WRONG.items():
            yield (name,), what, change
    inner = [path for path in places(entry) if len(path) > 1]
    tensors = [path for path in inner if torch.is_tensor(value_at(entry, path))]
    for table, paths, n in ((WRONG, [path for path in inner if path not in tensors], 60), (WRONG_TENSORS, tensors, 60)):
        for path in chance.sample(paths, min(n, len(paths))):
            what = chance.choice(list(table))
            yield path, what, table[what]


def value_at(value, path):
    for key in path:
        value = value[key]
    return value


def outcome(call):
    """None, or the line of a UserError."""
    try:
        call()
    except data.UserError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)


def test_an_edited_checkpoint_forecasts_and_resumes_rightly_or_is_refused(market, tmp_path, capsys, monkeypatch):
    """The forecast of one that is taken holds real prices, and its run goes on, from the same bars, to its end."""
    chance, path = random.Random(0), tmp_path / "a.pt"
    bars = str(market / "SYN0.csv")
    pretrain.main(["--data", bars, "--out", str(path), *TINY, "--steps", "1", "--tok_steps", "5", "--n_layer", "1"])
    whole = load_safe(path)
    whole["run"]["steps"] = 2                                       # as if stopped before its end
    series = data.load([bars])
    monkeypatch.setattr(data, "load", lambda sources: series)      # read once
    monkeypatch.setattr(pretrain, "evaluate", lambda *args: dict(coarse=1.0, fine=1.0, da=0.5, close=1.0, range=1.0, volume=1.0, score=1.0, lean=1.0))
    count, refused, wrong = 0, 0, []
    for place, what, change in edits_of_a_checkpoint(whole, chance):
        torch.save(edited(whole, place, change), path)
        count += 1
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        try:
            if outcome(lambda: read_checkpoint(str(path))):        # the door of all scripts
                refused += 1
                continue
            argv = ["--ckpt", str(path), "--data", bars, "--paths", "2", "--horizon", "2", "--out", str(tmp_path / "a.csv")]
            said = outcome(lambda: sample.main(argv))
            if not said:
                rows = np.genfromtxt(tmp_path / "a.csv", delimiter=",", skip_header=1)[:, -6:-2]
                assert np.isfinite(rows).all() and (rows > 0).all()
            again = outcome(lambda: pretrain.main(["--out", str(path), "--resume"]))
            refused += bool(said or again)
        except Exception as error:
            wrong.append(f"{place} {what}: {error!r}")
        for s, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), handlers):
            signal.signal(s, handler)
    assert not wrong, "\n".join(wrong)
    assert count > 350 and refused > 250
    assert capsys.readouterr().err == ""
