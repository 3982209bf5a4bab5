"""Shared by the tests: a tiny market as CSV, a tiny checkpoint, and scripts called in the process."""
import os
import subprocess
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests may share the processor
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of a few thousand numbers: a second thread only waits
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest

import data
import pretrain
from backstage.script import run as run_script

TINY = "--steps 6 --tok_steps 40 --batch_size 4 --block_size 64 --n_layer 2 --n_head 4 --n_embd 32 --coarse_bits 6 --fine_bits 5 --eval_every 3 --dtype fp32".split()


def write_csv(path, bars, header="time,open,high,low,close,volume,amount"):
    rows = [f"{t}," + ",".join(repr(float(v)) for v in row) for t, row in zip(bars.time, bars.ohlcva)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def market(tmp_path_factory):
    """A folder of three CSV files of 500 synthetic bars each."""
    folder = tmp_path_factory.mktemp("market")
    for bars in data.synthetic(seed=3, n_symbols=3, n_bars=500)[0]:
        write_csv(folder / f"{bars.symbol}.csv", bars)
    return folder


def script(name, *argv, **kwargs):
    """Run a script as a user does: its own process."""
    return subprocess.run([sys.executable, os.path.join(ROOT, name), *map(str, argv)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="session")
def checkpoint(market):
    """A checkpoint trained for a few steps on the tiny market."""
    out = str(market.parent / f"tiny-{os.getpid()}.pt")
    pretrain.main(["--data", str(market), "--out", out, *TINY])
    return out


@pytest.fixture
def call(monkeypatch, capfd):
    """call("sample", "--ckpt", path) runs a script's main in this process -> (exit status, stdout, stderr)."""
    def run(name, *argv):
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [name + ".py", *map(str, argv)])
        capfd.readouterr()
        try:
            run_script(module.main)
            status = 0
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        return status, out, err
    return run


def complaint(result):
    """What a refused call said: exit status 2 and one line on stderr, without a traceback."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line]
    assert status == 2, (status, err)
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]
