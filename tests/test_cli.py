"""The scripts as users call them: the main job end to end, kills and resumes, and what bad input gets."""
import contextlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from backstage.checkpoint import SEEN_DATES
from backstage.files import _beside, check_out, load_safe, save_atomic, sole_writer
from backstage.loop import Optimizer, Run, resumed
from backstage.script import cli
import data
import pretrain
from conftest import ROOT, TINY, complaint, script, write_csv
from model import load_checkpoint


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def last_weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- training

def test_training_reports_and_writes_one_file(market, tmp_path, call):
    status, out, err = call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY)
    assert status == 0 and err.count("\n") <= 1
    for text in ("step", "left", "unigram", "direction accuracy", "M parameters", "CRPS of close", "best weights of step"):
        assert text in out
    model, tokenizer, meta = load_checkpoint(str(tmp_path / "a.pt"))
    assert os.listdir(tmp_path) == ["a.pt"] and meta["step"] == 6 and meta["stage"] == "pretrain"
    assert set("format_version stage config optimizer scaler step bad_steps seed data splits metrics features".split()) <= set(meta)
    stages = [m["stage"] for m in meta["metrics"]]
    assert stages == ["tokenizer", "pretrain", "pretrain"] and 0 < model.config.unmoved < 0.05
    entry = load_safe(tmp_path / "a.pt")
    assert not same(entry["average"], entry["model"]) and all(row["score"] > 0 for row in meta["metrics"][1:])
    borders = data.split_borders(data.load(str(market)))
    assert tuple(meta["splits"]) == borders


def test_without_a_direction_bit_up_is_what_decodes_so(market, tmp_path, checkpoint, call):
    assert call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY, "--no-direction_bit")[0] == 0
    for path, upper in ((tmp_path / "a.pt", False), (checkpoint, True)):
        model, tokenizer, _ = load_checkpoint(str(path))
        assert torch.equal(model.up_mask, tokenizer.decode(torch.arange(64))[:, 0] > 0)
        assert torch.equal(model.up_mask, torch.arange(64) >= 32) == upper


def test_training_learns_a_plain_rule(tmp_path, call):
    for bars in data.synthetic(signal=0.45, n_symbols=2, n_bars=3000)[0]:
        write_csv(tmp_path / f"{bars.symbol}.csv", bars)
    status, out, _ = call("pretrain", "--data", tmp_path, "--out", tmp_path / "a.pt", *TINY, "--steps", 100, "--tok_steps", 120,
                          "--batch_size", 8, "--eval_every", 100, "--eval_windows", 32)
    rows = dict(re.findall(r"^(\w[\w ,]+?)  +(.*)$", out, re.M))
    assert status == 0 and float(rows["direction accuracy"].split("%")[0]) > 80
    coarse, unigram = map(float, rows["coarse token, nats"].split())
    assert coarse < unigram - 0.2 and float(rows["CRPS of close"].split()[0]) < 0.95


def test_a_short_csv_shrinks_window_and_bits(tmp_path, call):
    path = write_csv(tmp_path / "short.csv", data.synthetic(n_symbols=1, n_bars=150)[0][0])
    status, out, err = call("pretrain", "--data", path, "--out", tmp_path / "a.pt", "--steps", 2, "--tok_steps", 20, "--n_layer", 1, "--n_head", 4, "--n_embd", 16)
    assert status == 0, err
    assert "the window shrinks from 128 to 64" in out and "the tokens shrink to 6 + 6 bits" in out
    assert load_checkpoint(str(tmp_path / "a.pt"))[0].config.block_size == 64
    status, out, err = call("sample", "--ckpt", tmp_path / "a.pt", "--paths", 5, "--horizon", 3)
    assert status == 0 and "short" in out


def test_the_same_seed_gives_the_same_weights_and_another_does_not(market, tmp_path, checkpoint, call):
    call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY)
    call("pretrain", "--data", market, "--out", tmp_path / "b.pt", *TINY, "--seed", 1)
    assert same(last_weights(tmp_path / "a.pt"), last_weights(checkpoint))
    assert not same(last_weights(tmp_path / "b.pt"), last_weights(checkpoint))


def until(out, holds):
    """Wait for a checkpoint of which holds(entry) is true."""
    for _ in range(3000):
        if out.exists() and holds(load_safe(out)):
            return
        time.sleep(0.02)
    raise AssertionError("too slow, or never")


@pytest.fixture(scope="module")
def whole(market, tmp_path_factory):
    """Flags of a run with all that takes chance or has a memory (dropout, mirror, averages, patience), and what it ends with unbroken."""
    out = tmp_path_factory.mktemp("whole") / "whole.pt"
    flags = ["--data", str(market), *TINY, "--steps", "30", "--eval_every", "7", "--save_every", "1", "--dropout", "0.2", "--mirror", "1", "--merge", "2,3"]
    pretrain.main([*flags, "--out", str(out)])
    return flags, load_safe(out)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_g6_ended_by_a_signal_and_resumed_a_run_ends_with_the_same_weights(whole, tmp_path, call, signum):
    """All that the checkpoint holds, not the weights alone; SIGTERM saves first."""
    flags, want = whole
    out = tmp_path / "a.pt"
    run = subprocess.Popen([sys.executable, os.path.join(ROOT, "pretrain.py"), "--out", str(out), *flags], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    until(out, lambda entry: entry["step"] >= 5)
    run.send_signal(signum)
    said, err = run.communicate(timeout=60)
    assert run.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum], "finished before the signal"
    assert signum == signal.SIGKILL or "saved in" in said and not err
    assert 5 <= load_safe(out)["step"] < 30 and os.path.exists(_beside(str(out), "lock")) == (signum == signal.SIGKILL)
    assert call("pretrain", *flags, "--out", out, "--resume")[0] == 0  # a lock that nobody holds is in nobody's way
    assert os.listdir(tmp_path) == ["a.pt"]     # nor what a kill in the middle of a save left
    got = load_safe(out)
    for name in ("model", "best", "average"):
        assert same(got[name], want[name]), name
    assert got["metrics"] == want["metrics"]    # the mean training loss, too, is of all updates since the last report
    assert got["since_best"] == want["since_best"] and got["best_val"] == want["best_val"]


def test_of_two_runs_on_one_file_the_later_is_refused_and_the_first_is_whole(whole, checkpoint, tmp_path, call):
    flags, want = whole
    out = tmp_path / "a.pt"
    first = subprocess.Popen([sys.executable, os.path.join(ROOT, "pretrain.py"), "--out", str(out), *flags], stdout=subprocess.DEVNULL)
    until(out, lambda entry: entry["step"] >= 3)
    first.send_signal(signal.SIGSTOP)
    before = out.read_bytes()
    tune = ["--ckpt", checkpoint, "--steps", 1, "--batch_size", 2, "--no-backtest"]
    try:
        for argv in (["pretrain", *flags], ["pretrain", *flags, "--overwrite"], ["pretrain", "--resume"], ["expo", *tune, "--overwrite"],
                     ["rollout", *tune, "--overwrite"], ["expo", "--resume"]):
            assert "another run is writing it" in complaint(call(*argv, "--out", out))
        assert out.read_bytes() == before and first.poll() is None
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0 and os.listdir(tmp_path) == ["a.pt"]
    got = load_safe(out)
    assert all(same(got[name], want[name]) for name in ("model", "best", "average"))


def test_of_two_conversions_into_one_folder_the_later_is_refused(market, tmp_path, call):
    argv = ["data", "--data", market, "--out", tmp_path / "bars"]
    (tmp_path / "bars").mkdir()
    with sole_writer(tmp_path / "bars" / "symbols.json"):
        assert "another run is writing it" in complaint(call(*argv))
    open(_beside(str(tmp_path / "bars" / "symbols.json"), "lock"), "w").close()  # as one that was killed leaves it
    assert call(*argv)[0] == 0 and len(data.load(str(tmp_path / "bars"))) == 3
    assert not [name for name in os.listdir(tmp_path / "bars") if name.endswith(".lock")]


def test_where_val_gains_no_more_the_rate_falls_and_the_run_ends_also_where_it_was_stopped_meanwhile(market, tmp_path, call, monkeypatch):
    """Scores that rise from the ninth report on: four reports later the rate falls, from the weights of the eighth, for a fourth
    of the updates up to these."""
    scores = [0.9 - 0.01 * t for t in range(8)] + [0.84 + 0.01 * t for t in range(30)]

    def evaluate(model, *args):
        model.lean.fill_(0.5)
        return dict(coarse=0.1, fine=3.0, da=0.5, close=1.0, range=1.0, volume=1.0, score=next(after), lean=0.5)
    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    flags = ["--data", market, *TINY, "--steps", 20, "--patience", 4, "--eval_every", 1, "--save_every", 1, "--warmup", 2]
    rates, set_rate, update, before = [], Optimizer.set_rate, Run.update, {}
    monkeypatch.setattr(Optimizer, "set_rate", lambda self, share: rates.append(share) or set_rate(self, share))

    def noted(run, model, *args):
        before[run.step] = {k: v.clone() for k, v in model.state_dict().items()}
        return update(run, model, *args)
    monkeypatch.setattr(Run, "update", noted)
    after = iter(scores)
    status, out, _ = call("pretrain", *flags, "--out", tmp_path / "a.pt")
    assert status == 0 and "val has gained nothing for 4 reports: back to the best weights, whose rate falls until step 14, the last" in out
    assert rates == pytest.approx([1 / 2] + [1.0] * 11 + [1.0, 1 / 2])
    best = load_safe(tmp_path / "a.pt")["best"]
    assert all(torch.equal(before[12][k], v) != (k == "lean") for k, v in best.items())
    assert "no better than the frequencies" not in out and "best weights of step 8" in out
    assert "finished at step 14" in call("pretrain", *flags, "--out", tmp_path / "a.pt", "--resume")[1]
    after, rates[:] = iter(scores), []
    assert call("pretrain", *flags, "--patience", 0, "--out", tmp_path / "c.pt")[0] == 0
    assert rates == pytest.approx([1 / 2] + [1.0] * 16 + [3 / 4, 1 / 2, 1 / 4])     # a fifth of the updates asked for
    after = iter(scores)

    def stop_after(run, *args):
        norm = update(run, *args)
        if run.step == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return norm
    monkeypatch.setattr(Run, "update", stop_after)
    for stop in (9, 12):   # before the rate falls, and while it does
        resume = ["--resume"] if stop == 12 else []
        assert call("pretrain", *flags, *resume, "--out", tmp_path / "b.pt")[0] == 130
    assert "finished" not in call("pretrain", "--out", tmp_path / "b.pt", "--resume")[1]
    for name in ("model", "best", "average"):
        assert same(load_safe(tmp_path / "a.pt")[name], load_safe(tmp_path / "b.pt")[name])


def test_resume_is_refused_where_something_differs_and_leaves_a_finished_run_alone(market, tmp_path, checkpoint, call):
    path = shutil.copy(checkpoint, tmp_path / "a.pt")
    before = open(path, "rb").read()
    base = ["pretrain", "--data", market, "--out", path, "--resume"]
    assert call(*base)[0] == 0 and "finished" in call(*base)[1]
    for flag, value in (("--n_embd", 64), ("--seed", 5), ("--lr", 0.5), ("--data", "/dev/null"), ("--steps", 9)):
        assert flag in complaint(call(*base, flag, value))
    assert "exists already" in complaint(call("pretrain", "--data", market, "--out", path))
    assert open(path, "rb").read() == before


def test_a_flag_younger_than_the_run_has_its_default(checkpoint, tmp_path, call):
    entry = torch.load(checkpoint, weights_only=True)
    entry["run"]["steps"] += 1      # as if stopped before its end
    del entry["run"]["cooldown"]
    torch.save(entry, tmp_path / "a.pt")
    assert "the run in" in complaint(call("pretrain", "--out", tmp_path / "a.pt", "--resume", "--cooldown", 0.5))
    status, _, err = call("pretrain", "--out", tmp_path / "a.pt", "--resume")
    assert status == 0, err
    assert load_safe(tmp_path / "a.pt")["run"]["cooldown"] == pretrain.Config.cooldown
    entry["run"]["haste"] = 1
    torch.save(entry, tmp_path / "a.pt")
    assert "'haste'" in complaint(call("pretrain", "--out", tmp_path / "a.pt", "--resume"))


def test_a_resumed_fine_tune_keeps_its_tokenizer(market, tmp_path, checkpoint, call):
    """Even where the checkpoint that it began from was trained anew meanwhile, or is gone."""
    base, out = tmp_path / "base.pt", tmp_path / "out.pt"
    shutil.copy(checkpoint, base)
    args = ["--data", market, "--init_from", base, "--batch_size", 2, "--eval_every", 1]
    assert call("pretrain", *args, "--steps", 2, "--out", out)[0] == 0
    entry = torch.load(out, weights_only=True)
    entry["run"]["steps"] = 3  # as if stopped before its end
    torch.save(entry, out)
    os.unlink(base)
    status, _, err = call("pretrain", "--out", out, "--resume")
    assert status == 0, err
    after = torch.load(out, weights_only=True)
    assert after["step"] == 3 and same(entry["tokenizer"]["state"], after["tokenizer"]["state"])


def test_a_run_that_replaced_a_file_resumes(market, tmp_path, checkpoint, call):
    out = tmp_path / "out.pt"
    shutil.copy(checkpoint, out)
    assert call("pretrain", "--data", market, "--out", out, "--overwrite", *TINY)[0] == 0
    assert call("pretrain", "--data", market, "--out", out, "--resume")[0] == 0


def test_resume_with_other_bars_is_refused(tmp_path, call):
    path = write_csv(tmp_path / "bars.csv", data.synthetic(n_symbols=1, n_bars=400)[0][0])
    stopped = [*TINY, "--steps", "5"]
    call("pretrain", "--data", path, "--out", tmp_path / "a.pt", *stopped)
    entry = load_safe(tmp_path / "a.pt")
    save_atomic(entry | dict(step=3), tmp_path / "a.pt")
    write_csv(tmp_path / "bars.csv", data.synthetic(seed=1, n_symbols=1, n_bars=400)[0][0])
    assert "fingerprint" in complaint(call("pretrain", "--data", path, "--out", tmp_path / "a.pt", "--resume"))


def test_two_processes_and_accumulation_have_the_gradients_of_one(market, tmp_path, call):
    """After one step the optimizers' moments are shares of the gradient, of every weight; dropout's masks are the same everywhere."""
    args = ["--data", str(market), *TINY, "--steps", "1", "--dtype", "fp32", "--dropout", "0.3"]
    call("pretrain", *args, "--out", tmp_path / "one.pt")
    call("pretrain", *args, "--out", tmp_path / "parts.pt", "--micro_batch", "3")
    done = subprocess.run([*TORCHRUN, os.path.join(ROOT, "pretrain.py"), *args, "--out", str(tmp_path / "two.pt")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("M parameters") == 1, done.stderr
    one, parts, two = (load_safe(tmp_path / f"{name}.pt") for name in ("one", "parts", "two"))
    for other in (parts, two):
        assert other["metrics"][-1]["train"] == pytest.approx(one["metrics"][-1]["train"], rel=1e-6)
        assert other["metrics"][-1]["score"] == pytest.approx(one["metrics"][-1]["score"], rel=1e-3)
        for kind, moment in ((0, "momentum_buffer"), (1, "exp_avg")):
            ours, theirs = ([s[moment] for s in entry["optimizer"][kind]["state"].values()] for entry in (one, other))
            size = max(g.abs().max() for g in ours)
            assert len(ours) == len(theirs) > 5 and size > 0
            assert all((a - b).abs().max() <= 1e-5 * size for a, b in zip(ours, theirs))


def test_a_process_that_dies_ends_the_run_and_it_resumes_on_another_number(market, tmp_path):
    out = tmp_path / "a.pt"
    args = ["--data", str(market), "--out", str(out), *TINY, "--steps", "3000", "--eval_every", "1000", "--save_every", "1"]
    run = subprocess.Popen([*TORCHRUN, os.path.join(ROOT, "pretrain.py"), *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env=os.environ | dict(OMP_NUM_THREADS="1"))
    until(out, lambda entry: True)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command, environment = (open(f"/proc/{pid}/{name}", "rb").read().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(out).encode() in command and b"RANK=1" in environment:
            os.kill(int(pid), signal.SIGKILL)
    err = run.communicate(timeout=120)[1]
    assert run.returncode != 0 and "error: process 0 lost another process of this run" in err and "--resume" in err, err
    step = torch.load(out, weights_only=True)["step"]
    one = subprocess.Popen([sys.executable, os.path.join(ROOT, "pretrain.py"), "--out", str(out), "--resume"], stdout=subprocess.PIPE, text=True)
    until(out, lambda entry: entry["step"] > step)
    one.send_signal(signal.SIGTERM)
    assert "2 processes of 1 threads before, 1 of" in one.communicate(timeout=120)[0] and one.returncode == 143


def two_processes(*argv):
    """A run's two processes, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    job = [sys.executable, os.path.join(ROOT, "pretrain.py"), *argv]
    return [subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | group | dict(RANK=str(k), LOCAL_RANK=str(k)))
            for k in range(2)]


def test_stopped_and_resumed_two_processes_end_with_the_weights_of_two_that_never_stopped(market, tmp_path):
    """The signal reaches one of them, and not the one that saves; all that takes chance or has a memory is on."""
    flags = ["--data", str(market), *TINY, "--steps", "12", "--eval_every", "5", "--save_every", "1", "--dropout", "0.2", "--mirror", "1", "--merge", "2,3"]
    for run in two_processes("--out", str(tmp_path / "whole.pt"), *flags):
        assert run.communicate(timeout=120)[1] == "" and run.returncode == 0
    out = tmp_path / "a.pt"
    pair = two_processes("--out", str(out), *flags)
    until(out, lambda entry: entry["step"] >= 4)
    pair[1].send_signal(signal.SIGTERM)
    said = [run.communicate(timeout=120) for run in pair]
    assert "saved in" in said[0][0] and pair[1].returncode == 143, said
    assert 4 <= load_safe(out)["step"] < 12
    for run in two_processes("--out", str(out), "--resume"):
        assert run.communicate(timeout=120)[1] == "" and run.returncode == 0
    got, want = load_safe(out), load_safe(tmp_path / "whole.pt")
    assert got["world"] == 2 and got["step"] == want["step"] == 12
    for name in ("model", "best", "average"):
        assert same(got[name], want[name]), name
    assert [row["score"] for row in got["metrics"][1:]] == [row["score"] for row in want["metrics"][1:]]


def test_fine_tuning_brings_weights_tokenizer_and_borders(market, tmp_path, checkpoint, call):
    base, base_tokenizer, base_meta = load_checkpoint(checkpoint, weights="best")
    args = ["--data", market, "--init_from", checkpoint, "--steps", 1, "--lr", 1e-9, "--adam_lr", 1e-9, "--batch_size", 2, "--block_size", 48]
    status, out, err = call("pretrain", *args, "--out", tmp_path / "b.pt")
    assert status == 0, err
    tuned, tokenizer, meta = load_checkpoint(str(tmp_path / "b.pt"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(base.parameters(), tuned.parameters()))
    assert (base.config.block_size, tuned.config.block_size) == (64, 48)  # the context of forecasts, too
    assert same(base_tokenizer.state_dict(), tokenizer.state_dict()) and tuple(meta["splits"]) == tuple(base_meta["splits"])
    assert not meta["data"].get("overlap")


def test_weights_of_many_markets_are_tuned_on_bars_that_go_on_after_them(tmp_path, call):
    """They have no test to share. Their sizes are not to be had otherwise."""
    bars = data.synthetic(n_symbols=1, n_bars=600)[0][0]
    old, new = write_csv(tmp_path / "old.csv", bars[:500]), write_csv(tmp_path / "new.csv", bars)
    status, _, err = call("pretrain", "--data", old, "--out", tmp_path / "a.pt", "--release", tmp_path / "base.pt", "--val_share", 0.2, *TINY)
    assert status == 0, err
    args = ["--data", new, "--init_from", tmp_path / "base.pt", "--overlap", "--out", tmp_path / "b.pt", "--steps", 1, "--batch_size", 2]
    assert "have 32; drop the flag" in complaint(call("pretrain", *args, "--n_embd", 64))
    status, _, err = call("pretrain", *args)
    assert status == 0, err
    assert tuple(load_safe(tmp_path / "b.pt")["splits"]) == tuple(bars.time[[480, 540]])


def test_a_finished_run_may_still_be_released_and_be_typed_as_it_began(market, tmp_path, call):
    args = ["--data", market, "--out", tmp_path / "a.pt", *TINY[:-2], "--dtype", "auto", "--dropout", -1]
    assert call("pretrain", *args)[0] == 0
    status, _, err = call("pretrain", *args, "--resume", "--release", tmp_path / "r.pt")
    assert status == 0, err
    got, want = (load_checkpoint(str(tmp_path / name))[0].state_dict() for name in ("r.pt", "a.pt"))
    assert all(torch.allclose(got[k].float(), want[k].float(), atol=2e-3, rtol=2e-3) for k in want)
    assert "SYN0.csv" in complaint(call("pretrain", *args, "--resume", "--release", market / "SYN0.csv"))


def test_weights_that_come_along_are_kept_where_no_update_makes_them_better(market, tmp_path, checkpoint, call):
    """Two updates at absurd rates; and the picture of losses, the first of which has none of training."""
    base, _, _ = load_checkpoint(checkpoint)
    status, out, err = call("pretrain", "--data", market, "--init_from", checkpoint, "--steps", 2, "--lr", 9, "--adam_lr", 9,
                            "--batch_size", 2, "--block_size", 48, "--eval_every", 1, "--out", tmp_path / "b.pt")
    assert status == 0 and "best weights of step 0" in out, err
    assert "its weights are kept" in out
    kept, _, _ = load_checkpoint(str(tmp_path / "b.pt"))
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), kept.parameters()))
    status, _, err = call("sample", "--ckpt", tmp_path / "b.pt", "--paths", 5, "--horizon", 2, "--plot_loss", tmp_path / "l.svg")
    assert status == 0 and "nan" not in (tmp_path / "l.svg").read_text(), err


@pytest.mark.parametrize("gain, kept", [(0.0, False), (1e6, True)])
def test_tuned_weights_must_be_clearly_better_on_val(checkpoint, market, tmp_path, call, monkeypatch, gain, kept):
    """Gains below what the best of ten reports has by chance, of the number of val bars, leave the weights as they came."""
    monkeypatch.setattr(pretrain, "tuning_margin", lambda n_val: min(0.1, gain))
    status, out, err = call("pretrain", "--data", market, "--init_from", checkpoint, "--steps", 12, "--eval_every", 4, "--batch_size", 8,
                            "--block_size", 48, "--lr", 0.01, "--adam_lr", 1e-3, "--warmup", 2, "--out", tmp_path / "a.pt")
    assert status == 0 and ("its weights are kept" in out) == kept, out + err
    found = load_checkpoint(str(tmp_path / "a.pt"))[0].state_dict()
    base = load_checkpoint(checkpoint)[0].state_dict()
    assert all(torch.equal(found[k], base[k]) for k in base if k != "lean") == kept


def test_val_among_the_bars_that_the_base_was_trained_on_is_refused_or_marked_for_good(market, tmp_path, checkpoint, call):
    earlier = data.iso(load_checkpoint(checkpoint)[2]["splits"][0] - 3600).replace(" ", "T")
    args = ["--data", market, "--steps", 1, "--batch_size", 2, "--block_size", 48]
    refused = complaint(call("pretrain", *args, "--init_from", checkpoint, "--val_start", earlier, "--out", tmp_path / "a.pt"))
    assert "in-sample" in refused and "--overlap" in refused
    status, _, err = call("pretrain", *args, "--init_from", checkpoint, "--val_start", earlier, "--overlap", "--out", tmp_path / "a.pt")
    test = load_checkpoint(checkpoint)[2]["splits"][1]
    assert status == 0 and load_checkpoint(str(tmp_path / "a.pt"))[2]["data"]["overlap"] == test, err
    status, out, err = call("pretrain", *args, "--init_from", tmp_path / "a.pt", "--out", tmp_path / "b.pt")   # what it has seen, it has seen
    assert status == 0 and load_checkpoint(str(tmp_path / "b.pt"))[2]["data"]["overlap"] == test, err
    assert SEEN_DATES in out


def test_scores_of_weights_that_may_have_seen_the_dates_say_so(market, tmp_path, checkpoint, call):
    """Test earlier than that of the base: refused, or by --overlap marked in every score before that date, and not after it."""
    val, test = load_checkpoint(checkpoint)[2]["splits"]
    when = {name: data.iso(t).replace(" ", "T") for name, t in (("early", test - 600), ("late", test + 600))}
    args = ["--data", market, "--steps", 1, "--batch_size", 2, "--block_size", 48, "--init_from", checkpoint, "--test_start", when["early"]]
    assert "chosen by" in complaint(call("pretrain", *args, "--out", tmp_path / "a.pt"))
    assert call("pretrain", *args, "--overlap", "--out", tmp_path / "a.pt")[0] == 0
    for flags, marked in (([], True), (["--start", when["late"]], False)):
        flags = ["--ckpt", tmp_path / "a.pt", "--data", market, "--paths", 2, "--horizon", 1, *flags]
        status, out, err = call("backtest", *flags)
        assert status == 0 and (SEEN_DATES in out) == marked, err
        assert json.loads(call("backtest", *flags, "--json")[1])["split"] == ("test, overlap" if marked else "test")
    flags = ["--ckpt", tmp_path / "a.pt", "--out", tmp_path / "b.pt", "--steps", 1, "--batch_size", 2, "--paths", 2, "--horizon", 1]
    assert SEEN_DATES in call("expo", *flags)[1]


def test_the_unigram_scores_one_and_a_model_no_better_is_told_so(market, tmp_path, checkpoint, call):
    """A model whose heads know no candle says the codes' shares: its CRPS is the unigram's."""
    model, tokenizer, meta = load_checkpoint(checkpoint)
    series = data.load(str(market))
    tokens = [data.tokenize(bars, tokenizer) for bars in series]
    val = data.make_streams(series, tokens, "val", meta["splits"], 64, 4)
    for p in model.coarse_head.parameters():
        p.data.zero_()
    model.codes = {}
    row = pretrain.evaluate(model, val, data.tiles(val, 100), series, contextlib.nullcontext, 0, 1)
    for name in ("close", "range", "volume", "score"):
        assert row[name] == pytest.approx(1, abs=1e-5)
    first, last = val.targets[0]
    came = np.concatenate([t[first:last, 0] for t, (first, last) in zip(val.tokens, val.targets)])
    assert row["coarse"] == pytest.approx(-model.coarse_share.log_softmax(-1)[came.astype(int)].mean().item(), abs=1e-4)
    status, out, _ = call("pretrain", "--data", market, *TINY, "--steps", 1, "--lr", 1e-9, "--adam_lr", 1e-9, "--out", tmp_path / "a.pt")
    assert status == 0 and "no better than the frequencies of the codes" in out


def test_a_mirrored_market_rises_as_often_as_it_falls(tmp_path, call):
    """So the codes' shares, which the heads begin with, say neither up nor down, whatever the bars did."""
    bars = data.synthetic(seed=1, n_symbols=1, n_bars=400)[0][0]
    bars.ohlcva[:, :4] *= np.exp(np.arange(400) * 2e-3)[:, None]
    bars.ohlcva[:, 5] = np.nan
    path = write_csv(tmp_path / "a.csv", bars, header="time,open,high,low,close,volume,amount")
    up = {}
    for mirror in (0, 1):
        status, _, err = call("pretrain", "--data", path, *TINY, "--steps", 1, "--mirror", mirror, "--out", tmp_path / f"{mirror}.pt")
        assert status == 0, err
        model = load_checkpoint(str(tmp_path / f"{mirror}.pt"))[0]
        up[mirror] = model.coarse_share.softmax(-1) @ model.up_mask.float()
    assert up[0] > 0.7 and up[1] == pytest.approx(0.5, abs=0.01)


def test_main_is_a_function_and_runs_in_any_thread(market, tmp_path, checkpoint):
    argv = ["--data", str(market), "--out", str(tmp_path / "a.pt"), *TINY]
    thread = threading.Thread(target=pretrain.main, args=(argv,))
    thread.start()
    thread.join()
    assert same(last_weights(tmp_path / "a.pt"), last_weights(checkpoint))


def test_flags_are_read_under_a_profiler(tmp_path):
    done = subprocess.run([sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile"), os.path.join(ROOT, "pretrain.py"), "--batch_size", "few"],
                          capture_output=True, text=True)
    assert "invalid int" in complaint((2, done.stdout, done.stderr))   # the profiler has a status of its own


def test_ten_bad_steps_in_a_row_stop_the_run(market, tmp_path, call, monkeypatch):
    import pretrain
    forward = pretrain.Model.forward

    def poisoned(self, *args, **kwargs):
        coarse, fine, loss = forward(self, *args, **kwargs)
        poisoned.calls += self.training
        return coarse, fine, loss * float("nan") if self.training and poisoned.calls > 2 else loss
    poisoned.calls = 0
    monkeypatch.setattr(pretrain.Model, "forward", poisoned)
    status, out, err = call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY, "--steps", 50, "--save_every", 1)
    assert "10 steps in a row" in complaint((status, out, err)) and out.count("step skipped") == 10
    assert all(torch.isfinite(v).all() for v in last_weights(tmp_path / "a.pt").values())


def test_compile_goes_on_without_where_it_does_not_work(market, tmp_path, checkpoint, call, monkeypatch):
    def broken(self, *args, **kwargs):
        self._compiled_call_impl = lambda *a, **k: 1 / 0
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    status, out, err = call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY, "--compile")
    assert status == 0 and "--compile does not work here (ZeroDivisionError" in out, err
    assert same(last_weights(tmp_path / "a.pt"), last_weights(checkpoint))


def test_a_full_disk_leaves_the_last_good_checkpoint(market, tmp_path, checkpoint, call):
    path = shutil.copy(checkpoint, tmp_path / "a.pt")
    before, limits = open(path, "rb").read(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        assert "cannot be saved" in complaint(call("pretrain", "--data", market, "--out", path, *TINY, "--overwrite"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("flag, value, why", [
    ("--steps", -5, "--steps -5"), ("--tok_steps", 0, "--tok_steps 0"), ("--lr", "nan", "--lr nan"), ("--batch_size", -4, "--batch_size -4"), ("--steps", "many", "invalid int"),
    ("--stepz", 3, "unrecognized"), ("--n_embd", 30, "n_embd"), ("--device", "cuda:7", "--device"), ("--dtype", "fp8", "--dtype"), ("--windows", "a,b", "--windows"),
    ("--data", "none.csv", "no such file"), ("--out", "no/such/folder/a.pt", "folder"), ("--out", "/proc/a.pt", "cannot be written"), ("--out", ".", "cannot be written"), ("--tokenizer", "none.pt", "none.pt"), ("--init_from", "none.pt", "none.pt"),
    ("--val_start", "soon", "--val_start soon"), ("--block_size", -1, "--block_size"),
    ("--block_size", 1, "--block_size 1"), ("--seed", -1, "--seed -1"), ("--seed", 10**20, "--seed"), ("--device", "meta", "--device"),
    ("--clip", "inf", "finite"), ("--out", "", "not the name of a file"), ("--dropout", 1, "--dropout 1"), ("--dropout", -0.5, "--dropout -0.5"),
    ("--average", 1, "--average 1"), ("--cooldown", 1.5, "--cooldown 1.5"), ("--mirror", 2, "--mirror 2"), ("--merge", "2,0", "--merge 2,0"), ("--adam_lr", -1, "--adam_lr"),
    ("--val_start", "1990-01-01", "--val_start"), ("--coarse_bits", 1, "--coarse_bits 1"),
])
def test_bad_flags_get_one_line(market, tmp_path, call, monkeypatch, flag, value, why):
    monkeypatch.chdir(tmp_path)
    assert why in complaint(call("pretrain", *TINY, "--data", market, "--tok_steps", 1, flag, value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("n_bars", [1, 20, 60])
def test_series_too_short_for_a_window_get_one_line(tmp_path, call, n_bars):
    path = write_csv(tmp_path / "a.csv", data.synthetic(n_symbols=1, n_bars=100)[0][0][:n_bars])
    assert complaint(call("pretrain", "--data", path, "--out", tmp_path / "a.pt", *TINY))


# ---- forecasting

@pytest.mark.parametrize("argv", [
    ["expo", "--ckpt", "a.pt", "--out", "a.pt"], ["rollout", "--ckpt", "a.pt", "--out", "a.pt"], ["sample", "--ckpt", "a.pt", "--out", "a.pt"],
    ["sample", "--ckpt", "a.pt", "--data", "bars.csv", "--plot", "bars.csv"], ["pretrain", "--data", "bars.csv", "--out", "bars.csv"],
    ["pretrain", "--init_from", "a.pt", "--out", "a.pt"]])
def test_no_output_takes_the_place_of_an_input(market, checkpoint, tmp_path, call, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "a.pt")
    shutil.copy(market / "SYN0.csv", "bars.csv")
    before = [(tmp_path / name).read_bytes() for name in ("a.pt", "bars.csv")]
    assert "reads it" in complaint(call(*argv, "--overwrite"))
    assert [(tmp_path / name).read_bytes() for name in ("a.pt", "bars.csv")] == before


@pytest.mark.parametrize("flag, value, why", [
    ("--strike", "1e300", "--strike 1e300"), ("--strike", "1e-300x", "--strike 1e-300x"), ("--weights", "SYN0=1e308", "not a share"),
    ("--weights", "SYN0=1,SYN0=2", "SYN0 is named twice"), ("--weights", "SYN0=60,SYN1=40", "SYN1=0.6 for 60 %"), ("--ckpt", "", "--ckpt '': empty"), ("--data", "", "--data '': empty")])
def test_values_that_cannot_be_meant_get_one_line(market, checkpoint, call, flag, value, why):
    argv = ["--ckpt", checkpoint, "--data", market, "--paths", 2, "--horizon", 2]
    assert why in complaint(call("sample", *argv, flag, value))


def test_weights_of_a_portfolio_are_no_output(checkpoint, tmp_path, call):
    (tmp_path / "w.csv").write_text("symbol,weight\nSYN0,1\n")
    argv = ["sample", "--ckpt", checkpoint, "--weights", tmp_path / "w.csv"]
    assert "reads it" in complaint(call(*argv, "--out", tmp_path / "w.csv", "--overwrite"))


@pytest.mark.parametrize("name", ["sample", "backtest", "data", "pretrain", "expo", "rollout"])
def test_no_escape_code_of_a_file_or_a_symbol_reaches_the_terminal(market, checkpoint, tmp_path, call, name):
    """In the name of a file with a bad row, in a header's symbols, in a useless file, in a column of symbols, in a seal."""
    red, lines = "\x1b[31m", (market / "SYN0.csv").read_text().splitlines()
    head, *rows = lines
    for file, text in ((f"A{red}.csv", [*lines, rows[0].replace(",", ",x", 1)]), (f"B{red}.csv", [f"no bars {red}"]),
                       ("C.csv", [head + ",symbol", *(row + ",C" for row in rows), rows[0] + "," + red]),
                       ("D.csv", [head.replace("close", f"close.D{red}").replace("open", f"open.D{red}").replace("high", f"high.D{red}")
                                  .replace("low", f"low.D{red}"), *rows])):
        (tmp_path / file).write_text("\n".join(text) + "\n")
    argv = {"data": ["--out", tmp_path / "out"], "pretrain": [*TINY, "--steps", 1, "--out", tmp_path / "out"]}.get(name, ["--ckpt", checkpoint])
    argv += {"expo": ["--steps", 1, "--no-backtest"], "rollout": ["--steps", 1, "--no-backtest"], "sample": ["--horizon", 2, "--paths", 2],
             "backtest": ["--paths", 2, "--stride", 50, "--horizon", 2]}.get(name, [])
    if name in ("expo", "rollout"):
        argv += ["--out", tmp_path / "out", "--block_size", 32]
    status, out, err = call(name, *argv, "--data", tmp_path)
    assert status == 0 and "A\\x1b[31m.csv:" in err and "B\\x1b[31m.csv:1: no header" in err
    assert all(line.isprintable() for line in (out + err).splitlines()), out + err
    if name == "sample":
        assert "D\\x1b[31m" in out


def test_no_text_of_a_checkpoint_reaches_the_terminal_with_escape_codes(checkpoint, tmp_path, call):
    for holder, name, value in (("run", "init_from", "\x1b[2J"), ("data", "sources", ["a", "\x1b[2J"])):
        entry = load_safe(checkpoint)
        entry[holder][name] = value
        torch.save(entry, tmp_path / "a.pt")
        for argv in (("sample", "--ckpt"), ("pretrain", "--resume", "--out")):
            assert "its texts hold control characters" in complaint(call(*argv, tmp_path / "a.pt"))


def test_no_output_is_reached_by_a_glob_a_folder_a_link_or_the_checkpoints_own_bars(market, checkpoint, tmp_path, call):
    bars, link = market / "SYN0.csv", tmp_path / "link.csv"
    link.symlink_to(bars)
    before = bars.read_bytes()
    for argv in (["sample", "--data", market / "*.csv", "--out", bars], ["sample", "--data", market, "--plot", link], ["sample", "--out", bars],
                 ["expo", "--out", link], ["sample", "--out", tmp_path / "a", "--plot", tmp_path / "b/../a"]):
        assert "reads it" in complaint(call(*argv, "--ckpt", checkpoint, "--overwrite")) and bars.read_bytes() == before
    assert "reads it" in complaint(call("pretrain", "--data", market, "--out", tmp_path / "a.pt", "--release", link, "--overwrite", *TINY))


def test_a_file_of_others_names_nothing_that_is_read_or_written(checkpoint, tmp_path, call):
    secret, path = tmp_path / "secret", tmp_path / "a.pt"
    secret.write_text("a secret\n")
    entry = load_safe(checkpoint)
    entry["run"] |= dict(release=str(secret), steps=7)
    entry["data"]["sources"] = [str(secret)]
    torch.save(entry, path)
    assert "a secret" not in complaint(call("sample", "--ckpt", path))
    assert resumed(dict(out=str(path)), pretrain.Config, pretrain.FREE, ("pretrain",))[0].release is None


@pytest.mark.parametrize("n_letters, why", [(255, None), (256, "cannot be written")])
def test_a_name_that_cannot_be_made_is_refused_before_the_training(tmp_path, n_letters, why):
    try:
        check_out(str(tmp_path / ("a" * n_letters)))
        said = None
    except data.UserError as e:
        said = str(e)
    assert (why in said if why else said is None) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("holder, change", [
    ("data", dict(sources=["synthetic"], seed=-5)), ("data", dict(sources=[])),
    (None, dict(metrics=[dict(stage="pretrain")])), ("run", dict(steps=7)),
    *((None, dict(metrics=[dict(stage="pretrain", split="val", step=k, train=v, val=v, val_logloss=v)
                           for k in range(3)])) for v in (math.nan, math.inf, 1e308))])
def test_numbers_of_a_file_that_cannot_be_get_one_line(checkpoint, tmp_path, call, holder, change):
    entry, path = load_safe(checkpoint), tmp_path / "a.pt"
    (entry[holder] if holder else entry).update(change)
    argv = ["sample", "--ckpt", path, "--paths", 2, "--horizon", 2, "--plot_loss", tmp_path / "a.svg"]
    if holder == "run":
        entry |= dict(dtype="fp16", scaler={})
        argv = ["pretrain", "--out", path, "--resume"]
    torch.save(entry, path)
    said = complaint(call(*argv))
    assert "a.pt" in said or "nothing to draw" in said


@pytest.mark.parametrize("given", [
    dict(RANK="1"), dict(RANK="abc"), dict(WORLD_SIZE="2"), dict(WORLD_SIZE="2", MASTER_ADDR="x"),
    *(dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port) for port in ("x", "-1", "99999"))])
def test_half_an_environment_of_processes_gets_one_line(tmp_path, call, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in complaint(call("pretrain", "--out", tmp_path / "a.pt", *TINY))


def test_a_flipped_bit_is_noticed(checkpoint, tmp_path):
    raw = bytearray(open(checkpoint, "rb").read())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(data.UserError, match="a.pt"):
        load_safe(str(tmp_path / "a.pt"))


def test_a_terminal_without_the_letter_and_a_full_one(checkpoint):
    done = script("data.py", "--data", "\u00e4.csv", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stderr.startswith("error: ?.csv: no such file") and not done.stdout
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "--ckpt", checkpoint, "--paths", "3"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_bad_checkpoints_get_one_line(checkpoint, tmp_path, call):
    whole = open(checkpoint, "rb").read()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": 1}, tmp_path / "other.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pt")
    for name in ("cut.pt", "text.pt", "other.pt", "code.pt", "none.pt", "."):
        assert name in complaint(call("sample", "--ckpt", tmp_path / name if name != "." else str(tmp_path) + "/."))
    assert "--data is missing" in complaint(call("sample"))




# ---- what is written down

SCRIPTS = ("data", "pretrain", "expo", "rollout", "sample", "backtest")


def commands():
    """Every command of the README and of the scripts' own headers, once: (script, its arguments)."""
    found = {}
    for name in ["README.md"] + sorted(n for n in os.listdir(ROOT) if n.endswith(".py")):
        text = open(os.path.join(ROOT, name), encoding="utf-8").read().replace("\\\n", " ")
        text = text if name == "README.md" else text.split('"""')[1]
        for line in text.splitlines():
            for part in re.split(r"&&|`", line.split(" #")[0]):
                words = re.search(rf"(?:python|torchrun(?: --\S+)*) ({'|'.join(SCRIPTS)})\.py(?: (.*))?$", part.strip())
                if words:
                    found[words[1], words[2] or ""] = True
    return list(found)


def test_every_command_that_is_written_down_is_found():
    assert len(commands()) > 20 and {name for name, _ in commands()} >= {"data", "pretrain", "sample", "backtest"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_is_for_and_has_the_flags_that_are_written_down(name, monkeypatch, capsys):
    """Each command is parsed, and its numbers looked at; the ones that matter are run by other tests and by .ci/run."""
    module = __import__(name)
    for words in (words for script, words in commands() if script == name):
        try:
            config = module.Config(**cli(module.Config, "", shlex.split(words)))
            if name == "pretrain":
                module.check(config)
        except data.UserError as e:
            pytest.fail(f"python {name}.py {words}: {e}")
    monkeypatch.setattr(sys, "argv", [name + ".py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and len(capsys.readouterr().out) > 500
