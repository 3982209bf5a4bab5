"""The scripts as users call them: the main job end to end, kills and resumes, and what bad input gets."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.dom.minidom

import numpy as np
import pytest
import torch

import data
import backtest
import sample
from conftest import ROOT, TINY, complaint, script, write_csv
from model import load_checkpoint


def last_weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- training

def test_training_reports_and_writes_one_file(market, tmp_path, call):
    status, out, err = call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY)
    assert status == 0 and err.count("\n") <= 1
    for text in ("step", "bars/s", "left", "unigram", "direction accuracy", "M parameters", "best val"):
        assert text in out
    model, tokenizer, meta = load_checkpoint(str(tmp_path / "a.pt"))
    assert os.listdir(tmp_path) == ["a.pt"] and meta["step"] == 6 and meta["stage"] == "pretrain"
    assert set("format_version stage config optimizer scaler step bad_steps seed data splits metrics features".split()) <= set(meta)
    stages = [m["stage"] for m in meta["metrics"]]
    assert stages == ["tokenizer", "pretrain", "pretrain"] and 0 < model.config.unmoved < 0.05
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
    status, out, _ = call("pretrain", "--data", tmp_path, "--out", tmp_path / "a.pt", *TINY, "--steps", 150, "--tok_steps", 300, "--lr", 0.01,
                          "--batch_size", 8, "--eval_every", 150, "--warmup", 10)
    rows = {line.split("  ")[0].strip() or line.split()[0]: line.split() for line in out.splitlines() if line}
    assert status == 0 and float(rows["direction accuracy, val"][3].rstrip("%")) > 80
    coarse = next(line.split() for line in out.splitlines() if line.strip().startswith("coarse token"))
    assert float(coarse[2]) < float(coarse[3]) - 0.2  # model against unigram, nats


def test_a_short_csv_shrinks_window_and_bits(tmp_path, call):
    path = write_csv(tmp_path / "short.csv", data.synthetic(n_symbols=1, n_bars=150)[0][0])
    status, out, err = call("pretrain", "--data", path, "--out", tmp_path / "a.pt", "--steps", 2, "--tok_steps", 20, "--n_layer", 1, "--n_head", 4, "--n_embd", 16)
    assert status == 0, err
    assert "the window shrinks from 256 to 64" in out and "the tokens shrink to 6 + 6 bits" in out
    assert load_checkpoint(str(tmp_path / "a.pt"))[0].config.block_size == 64
    status, out, err = call("sample", "--ckpt", tmp_path / "a.pt", "--paths", 5, "--horizon", 3)
    assert status == 0 and "short" in out


def test_the_same_seed_gives_the_same_weights_and_another_does_not(market, tmp_path, checkpoint, call):
    call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY)
    call("pretrain", "--data", market, "--out", tmp_path / "b.pt", *TINY, "--seed", 1)
    assert same(last_weights(tmp_path / "a.pt"), last_weights(checkpoint))
    assert not same(last_weights(tmp_path / "b.pt"), last_weights(checkpoint))


def test_g6_killed_three_times_and_resumed_ends_with_the_same_weights(market, tmp_path, monkeypatch):
    """In the tokenizer's training, and twice in the model's; with two threads, whose turns must not matter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out, args = tmp_path / "a.pt", ["--data", str(market), *TINY, "--steps", "40", "--tok_steps", "300", "--save_every", "1"]
    job = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--out", str(out)]
    subprocess.run([*job[:2], "--out", str(tmp_path / "whole.pt"), *args], check=True, stdout=subprocess.DEVNULL)
    for stage, step in (("tokenizer", 50), ("pretrain", 3), ("pretrain", 20)):
        run = subprocess.Popen(job + (args + ["--resume"] if out.exists() else args), stdout=subprocess.DEVNULL)
        while run.poll() is None:
            if out.exists():
                found = data.load_safe(out)
                if found["stage"] == stage and found["step"] >= step or found["stage"] == "pretrain" != stage:
                    break
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "finished before it could be killed"
    subprocess.run(job + args + ["--resume"], check=True, stdout=subprocess.DEVNULL)
    assert same(last_weights(out), last_weights(tmp_path / "whole.pt"))


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(market, tmp_path, signum, status):
    out = tmp_path / "a.pt"
    run = subprocess.Popen([sys.executable, "-u", os.path.join(ROOT, "pretrain.py"), "--data", str(market), "--out", str(out), *TINY, "--steps", "100000"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if re.match(r" +3 ", line):
            break
    run.send_signal(signum)
    rest, err = run.communicate(timeout=60)
    assert run.returncode == status and "saved in" in rest and "Traceback" not in err
    assert data.load_safe(out)["step"] >= 3


def test_resume_is_refused_where_something_differs_and_leaves_a_finished_run_alone(market, tmp_path, checkpoint, call):
    path = shutil.copy(checkpoint, tmp_path / "a.pt")
    before = open(path, "rb").read()
    base = ["pretrain", "--data", market, "--out", path, "--resume"]
    assert call(*base)[0] == 0 and "finished" in call(*base)[1]
    for flag, value in (("--n_embd", 64), ("--seed", 5), ("--lr", 0.5), ("--data", "/dev/null"), ("--steps", 9)):
        assert flag in complaint(call(*base, flag, value))
    assert "exists already" in complaint(call("pretrain", "--data", market, "--out", path))
    assert open(path, "rb").read() == before


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
    entry = data.load_safe(tmp_path / "a.pt")
    data.save_atomic(entry | dict(step=3), tmp_path / "a.pt")
    write_csv(tmp_path / "bars.csv", data.synthetic(seed=1, n_symbols=1, n_bars=400)[0][0])
    assert "fingerprint" in complaint(call("pretrain", "--data", path, "--out", tmp_path / "a.pt", "--resume"))


def test_two_processes_and_accumulation_have_the_gradients_of_one(market, tmp_path, call):
    """After one step AdamW's first moment is a tenth of the gradient: it is what the checkpoint lets us compare."""
    args = ["--data", str(market), *TINY, "--steps", "1", "--dtype", "fp32"]
    call("pretrain", *args, "--out", tmp_path / "one.pt")
    call("pretrain", *args, "--out", tmp_path / "parts.pt", "--micro_batch", "1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, "pretrain.py"),
                           *args, "--out", str(tmp_path / "two.pt")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("M parameters") == 1, done.stderr
    one, parts, two = ([s["exp_avg"] for s in torch.load(tmp_path / f"{name}.pt", weights_only=True)["optimizer"]["state"].values()]
                       for name in ("one", "parts", "two"))
    size = max(g.abs().max() for g in one)
    assert all((a - b).abs().max() <= 1e-5 * size for other in (parts, two) for a, b in zip(one, other))


def test_a_process_that_dies_ends_the_run_and_it_resumes_on_another_number(market, tmp_path):
    out = tmp_path / "a.pt"
    args = ["--data", str(market), "--out", str(out), *TINY, "--steps", "3000", "--eval_every", "1000", "--save_every", "1"]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, "pretrain.py"), *args],
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    while not out.exists() or torch.load(out, weights_only=True)["stage"] != "pretrain":
        assert run.poll() is None
        time.sleep(0.1)
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
    while torch.load(out, weights_only=True)["step"] == step:
        assert one.poll() is None
        time.sleep(0.1)
    one.send_signal(signal.SIGTERM)
    assert "2 processes of 1 threads before, 1 of" in one.communicate(timeout=120)[0] and one.returncode == 143


def test_fine_tuning_brings_weights_tokenizer_and_borders(market, tmp_path, checkpoint, call):
    base, base_tokenizer, base_meta = load_checkpoint(checkpoint, weights="best")
    args = ["--data", market, "--init_from", checkpoint, "--steps", 1, "--lr", 1e-9, "--batch_size", 2, "--block_size", 48]
    status, out, err = call("pretrain", *args, "--out", tmp_path / "b.pt")
    assert status == 0, err
    tuned, tokenizer, meta = load_checkpoint(str(tmp_path / "b.pt"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(base.parameters(), tuned.parameters()))
    assert (base.config.block_size, tuned.config.block_size) == (64, 48)  # the context of forecasts, too
    assert same(base_tokenizer.state_dict(), tokenizer.state_dict()) and tuple(meta["splits"]) == tuple(base_meta["splits"])
    assert "in-sample" in complaint(call("pretrain", *args, "--out", tmp_path / "c.pt", "--val_start", data.iso(base_meta["splits"][0] - 3600).replace(" ", "T")))


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


def test_a_full_disk_leaves_the_last_good_checkpoint(market, tmp_path, checkpoint):
    path = shutil.copy(checkpoint, tmp_path / "a.pt")
    before = open(path, "rb").read()
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, "pretrain.py"), "--data", str(market), "--out", path, *TINY, "--overwrite"],
                          capture_output=True, text=True)
    assert "cannot be saved" in complaint((done.returncode, done.stdout, done.stderr))
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("flag, value, why", [
    ("--steps", -5, "--steps -5"), ("--tok_steps", 0, "--tok_steps 0"), ("--lr", "nan", "--lr nan"), ("--batch_size", 0, "--batch_size 0"), ("--steps", "many", "invalid int"),
    ("--stepz", 3, "unrecognized"), ("--n_embd", 30, "n_embd"), ("--device", "cuda:7", "--device"), ("--dtype", "fp8", "--dtype"), ("--windows", "a,b", "--windows"),
    ("--data", "none.csv", "no such file"), ("--out", "no/such/folder/a.pt", "folder"), ("--out", "/proc/a.pt", "cannot be written"), ("--out", ".", "cannot be written"), ("--tokenizer", "none.pt", "none.pt"), ("--init_from", "none.pt", "none.pt"),
    ("--val_start", "soon", "--val_start soon"), ("--block_size", -1, "--block_size"),
    ("--block_size", 1, "--block_size 1"), ("--seed", -1, "--seed -1"), ("--seed", 10**20, "--seed"), ("--device", "meta", "--device"),
    ("--clip", "inf", "finite"), ("--out", "", "not the name of a file"),
])
def test_bad_flags_get_one_line(market, tmp_path, call, monkeypatch, flag, value, why):
    monkeypatch.chdir(tmp_path)
    assert why in complaint(call("pretrain", "--data", market, *TINY, "--tok_steps", 1, flag, value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("n_bars", [1, 20, 60])
def test_series_too_short_for_a_window_get_one_line(tmp_path, call, n_bars):
    path = write_csv(tmp_path / "a.csv", data.synthetic(n_symbols=1, n_bars=100)[0][0][:n_bars])
    assert complaint(call("pretrain", "--data", path, "--out", tmp_path / "a.pt", *TINY))


# ---- forecasting

def test_no_output_takes_the_place_of_an_input(market, checkpoint, tmp_path, call):
    ckpt, bars = tmp_path / "a.pt", tmp_path / "bars.csv"
    shutil.copy(checkpoint, ckpt)
    shutil.copy(market / "SYN0.csv", bars)
    before = ckpt.read_bytes(), bars.read_bytes()
    for argv in (("expo", "--ckpt", ckpt, "--out", ckpt), ("rollout", "--ckpt", ckpt, "--out", ckpt), ("sample", "--ckpt", ckpt, "--out", ckpt),
                 ("sample", "--ckpt", ckpt, "--data", bars, "--plot", bars), ("pretrain", "--data", bars, "--out", bars)):
        assert "reads it" in complaint(call(*argv, "--overwrite"))
    assert (ckpt.read_bytes(), bars.read_bytes()) == before


def test_a_flipped_bit_is_noticed(checkpoint, tmp_path):
    raw = bytearray(open(checkpoint, "rb").read())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(data.UserError, match="a.pt"):
        data.load_safe(str(tmp_path / "a.pt"))


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
    assert "--ckpt" in complaint(call("sample"))




# ---- what is written down

def commands():
    """Every command of the README and of the scripts' own headers, once: (script, its arguments)."""
    found = {}
    for name in ["README.md"] + sorted(n for n in os.listdir(ROOT) if n.endswith(".py")):
        text = open(os.path.join(ROOT, name), encoding="utf-8").read()
        text = text if name == "README.md" else text.split('"""')[1]
        for line in text.splitlines():
            for part in re.split(r"&&|`", line.split(" #")[0]):
                words = re.search(r"(?:python|torchrun(?: --\S+)*) ((?:data|tokenizer|pretrain|expo|rollout|sample|backtest)\.py)(?: (.*))?$", part.strip())
                if words:
                    found[words[1], words[2] or ""] = True
    return list(found)


FEWER = {  # so many steps, bars and paths are enough to see that a command runs
    "data.py": "--synthetic 4000", "tokenizer.py": "--steps 40 --coarse_bits 6 --fine_bits 5 --overwrite", "pretrain.py": " ".join(TINY) + " --overwrite",
    "expo.py": "--steps 2 --eval_every 1 --batch_size 4 --paths 4 --horizon 3 --overwrite",
    "rollout.py": "--steps 2 --eval_every 1 --batch_size 4 --paths 4 --overwrite", "sample.py": "--paths 4 --overwrite",
    "backtest.py": "--paths 4 --horizon 3"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, checkpoint):
    """A folder with the files that the commands name: daily bars of 2015 to 2018, and checkpoints trained on them."""
    folder = tmp_path_factory.mktemp("desk")
    rows = ["time,symbol,open,high,low,close,volume,amount"]
    for name, bars in zip(("AAPL", "MSFT", "XOM", "JPM"), data.synthetic(seed=3, n_symbols=4, n_bars=1040)[0]):
        days = np.busday_offset("2015-01-02", np.arange(len(bars)))
        rows += [f"{day},{name}," + ",".join(f"{v:.6g}" for v in row) for day, row in zip(days, bars.ohlcva)]
    (folder / "csv").mkdir()
    for name in ("bars.csv", "other.csv", "SP500", "BTC", "csv/all.csv"):
        (folder / name).write_text("\n".join(rows) + "\n")
    done = script("pretrain.py", "--data", "bars.csv", "--out", "out.pt", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    for name in ("bars.pt", "base.pt", "a.pt", "b.pt", "SP500.pt", "expo.pt", "rollout.pt", "tok.pt"):
        shutil.copy(folder / "out.pt", folder / name)
    return folder


@pytest.mark.parametrize("name, words", commands())
def test_every_command_that_is_written_down_runs(desk, tmp_path, call, monkeypatch, name, words):
    """With fewer steps; those of tests/ in .ci/run. torchrun's run on one process: two are tested above."""
    monkeypatch.chdir(shutil.copytree(desk, tmp_path / "desk"))
    monkeypatch.setattr(data.synthetic, "__defaults__", (0, 0.1, 8, 500))
    for few in ("rollout.ORIGINS", "rollout.VAL_ORIGINS", "expo.ORIGINS"):
        monkeypatch.setattr(few, 20)
    words = shlex.split(words)
    fewer = shlex.split(FEWER[name]) if name != "data.py" or "--synthetic" in words else []
    if "folder" in words and name != "data.py":
        assert call("data", "--synthetic", "4000", "--out", "folder")[0] == 0
    if "--resume" in words:
        words.remove("--resume")
        assert call(name[:-3], *words, *fewer)[0] == 0
        words, fewer = words + ["--resume"], []
    status, out, err = call(name[:-3], *words, *fewer)
    assert status == 0, err


def test_the_written_commands_are_found():
    assert len(commands()) > 30 and {name for name, _ in commands()} == set(FEWER)
