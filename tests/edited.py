"""Edit the files that scripts read, and see that nothing worse comes of it than one line.

    python tests/edited.py             # 1,000 edited files, some seven minutes on one core
    python tests/edited.py 20          # so many
    python tests/edited.py 1 --first 7 # one of them again

A file (bars, packed or not, a mapped folder, a folder of files, a checkpoint, stamps to come,
weights of a portfolio) or the environment is edited, and a script meets it in a fork of this
process, which has 2 GB of memory more than it begins with, and 10 s of its own. It must end with
status 0 and prices, or with 2 and one line, and leave every file but its output as it was. A table
counts what came; exit status 1 if anything else did.
"""
import argparse
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import backtest, data, expo, pretrain, rollout, sample
from backstage.script import run
from conftest import write_csv
from test_edited import WRONG, WRONG_TENSORS, edited, places, value_at

SCRIPTS = dict(sample=sample, backtest=backtest, data=data, pretrain=pretrain, expo=expo,
               rollout=rollout)
SIZES = ("--steps 1 --tok_steps 3 --batch_size 2 --block_size 32 --n_layer 1 --n_head 4 "
         "--n_embd 32 --coarse_bits 6 --fine_bits 5 --dtype fp32")
FLAGS = {
    "sample": "--ckpt base.pt --paths 4 --horizon 3 --out out --overwrite",
    "backtest": "--ckpt base.pt --paths 2 --stride 60 --horizon 2",
    "data": "--out out",
    "pretrain": f"--out out {SIZES}",
    "expo": "--ckpt base.pt --out out --steps 1 --batch_size 2 --block_size 32 --no-backtest",
    "rollout": "--ckpt base.pt --out out --steps 1 --batch_size 2 --block_size 32 --no-backtest"}
OFTEN = [*FLAGS, *["sample", "data"] * 5]       # the quick ones more often
MEMORY, SECONDS = 2e9, 10
OUTPUTS = "out", "loss.svg", "codes.svg", "plot.svg"
HOSTILE = [text.encode("utf-8", "surrogatepass") for text in [
    "", "nan", "inf", "-1", "0", "1e308", "1e-320", "9" * 400, "." * 4000, "(" * 300, "\0",
    "\x1b[31m", '"', "'", ",", ",,,,", "\n", "=1+1", "0x10", "1,5", "2024-02-30", "03/04/24",
    "1709562600", "1709562600000", "99999999999999999999", "-99999999999", "1_000", "12:61", "PM",
    "GMT+9999", "close", "symbol", "é", "\u202e", "\ud800", "𝟙", "a" * 200_000]]


# -- edits of bytes and tables

def spoiled(raw, chance):
    """Bytes with one to three edits: changed, cut out, twice, cut off, or with something put in."""
    for _ in range(chance.randint(1, 3)):
        a = chance.randrange(len(raw) + 1)
        b = min(len(raw), a + chance.choice((1, 4, 100, 10_000)))
        put = chance.choice((b"", raw[a:b] * 2, chance.randbytes(b - a), bytes(b - a),
                             b"\xff" * (b - a), chance.choice(HOSTILE)))
        raw = raw[:a] + put + raw[b:] if chance.random() < 0.9 else raw[:a]
    return raw


def spoiled_table(raw, chance):
    """A table with one to three edits of cells, columns, rows, or of all its bytes."""
    for _ in range(chance.randint(1, 3)):
        rows = [row.split(b",") for row in raw.split(b"\n")]
        i, k = chance.randrange(len(rows)), chance.randrange(len(rows[0]))
        put, how = chance.choice(HOSTILE), chance.randrange(9)
        if how == 0:
            rows[i][chance.randrange(len(rows[i]))] = put
        elif how == 1:
            rows[0][k] = chance.choice((put, *rows[0]))
        elif how == 2:
            chance.shuffle(rows)
        elif how == 3 and len(rows) < 10_000:
            rows += rows[1:] * chance.choice((1, 30))
        elif how == 4:
            rows[i:i] = rows[i:i + chance.randrange(40)]
        elif how == 5:      # a column is lost, or all of it is one thing
            rows = [row[:k] + chance.choice(([], [put])) + row[k + 1:] for row in rows]
        raw = b"\n".join(map(b",".join, rows))
        if how == 6:
            raw = raw.replace(b",", chance.choice((b";", b"\t", b"|", b" ", b"::", b"")))
        elif how == 7:
            codec = chance.choice(("utf-16", "utf-32", "gb18030", "utf-8-sig", "cp037"))
            raw = raw.decode("utf-8", "replace").encode(codec, "replace")
        elif how == 8:
            raw = spoiled(raw, chance)
    return raw


def edit(name, spoil, chance):
    path = pathlib.Path(name)
    path.write_bytes(spoil(path.read_bytes(), chance))


# -- what is edited; each returns (script, its flags beside FLAGS, environment)

def edit_bars(chance):
    edit("a.csv", spoiled_table, chance)
    return chance.choice(OFTEN), "--data a.csv", {}


def edit_packed(chance):
    """A spoiled table that is packed, the spoiled bytes of a pack, or what unpacks to 300 MB."""
    raw, how = pathlib.Path("a.csv").read_bytes(), chance.choice(("table", "pack", "bomb"))
    if how == "table":
        raw = spoiled_table(raw, chance)
    elif how == "bomb":
        raw = chance.choice((b"\n", b"1,", b"\0", raw[:100])) * 3_000_000
    kind = chance.choice(("gz", "xz", "bz2", "zip", "csv", "two.zip"))
    buffer = io.BytesIO()
    if kind.endswith("zip"):
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as f:
            for name in ("a.csv", "b.csv")[:1 + (kind != "zip")]:
                f.writestr(name, raw)
    packed = buffer.getvalue() or {"xz": lzma, "bz2": bz2}.get(kind, gzip).compress(raw)
    packed = spoiled(packed, chance) if how == "pack" else packed
    pathlib.Path("p." + kind).write_bytes(packed)
    return chance.choice(OFTEN), f"--data p.{kind}", {}


def edit_mapped(chance):
    """An array or the seal of a mapped folder."""
    name = chance.choice(("symbols.json", "bars.time", "bars.ohlcva"))
    if name == "symbols.json" and chance.random() < 0.7:
        path = pathlib.Path("mapped", name)
        listed = json.loads(path.read_text())
        what = chance.choice(list(WRONG)[:-2])      # the others are not of JSON
        path.write_text(json.dumps(edited(listed, chance.choice([*places(listed)]), WRONG[what])))
    else:
        edit("mapped/" + name, spoiled, chance)
    return chance.choice(OFTEN), "--data mapped", {}


def edit_folder(chance):
    """What lies in a folder of bars, and how it is named."""
    names = ("x", "B\x1b[31m", "-rf", "a b", "é", "\udcff", "x" * 240, "*", "x\n", "symbols.json",
             ".x", "SYN0.csv")
    links = {"link": "../a.csv", "loop": ".", "device": "/dev/zero", "gone": "nowhere"}
    texts = {"empty": lambda raw, chance: b"", "text": spoiled_table, "copy": lambda raw, c: raw}
    for _ in range(chance.randint(1, 3)):
        end = chance.choice((".csv", ".txt", ".csv.gz", "", ".npy"))
        name, how = "bars/" + chance.choice(names) + end, chance.choice(["pipe", *links, *texts])
        with contextlib.suppress(OSError):
            if how == "pipe":
                os.mkfifo(name)
            elif how in links:
                os.symlink(links[how], name)
            else:
                shutil.copy("a.csv", name)
                edit(name, texts[how], chance)
    source = chance.choice(("bars", "bars/*", "bars/*.csv"))
    return chance.choice(OFTEN), f"--data {source}", {}


def edit_checkpoint(chance):
    """A value in a checkpoint, or its bytes; read by a stage, or resumed."""
    if chance.random() < 0.2:
        edit("base.pt", spoiled, chance)
    else:
        entry = torch.load("base.pt", weights_only=True)
        place = chance.choice(list(places(entry)))
        table = WRONG_TENSORS if torch.is_tensor(value_at(entry, place)) else WRONG
        torch.save(edited(entry, place, chance.choice(list(table.values()))), "base.pt")
    name = chance.choice(["sample"] * 3 + ["backtest", "expo", "rollout", "resume", "resume"])
    if name == "resume":
        return "pretrain", "--resume --out base.pt", {}
    plots = "--plot plot.svg", "--plot_loss loss.svg", "--plot_codebook codes.svg"
    more = chance.choice(("", *plots)) if name == "sample" else ""
    return name, chance.choice(("", "--data a.csv ")) + more, {}


def edit_stamps(chance):
    name = chance.choice(("times.csv", "stamps.txt"))
    edit(name, spoiled_table, chance)
    return "sample", f"--data bars --times {name}", {}


def edit_weights(chance):
    edit("weights.csv", spoiled_table, chance)
    return "sample", "--data bars --weights weights.csv", {}


def edit_environment(chance):
    """Processes that are not there would be waited for: two of them have a port that is none."""
    names = ("RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT COLUMNS LINES TZ LANG LC_ALL HOME "
             "TMPDIR NO_COLOR TERM").split()
    values = [text.decode() for text in HOSTILE if text.isascii() and b"\0" not in text]
    given = {name: chance.choice((*values, "1", "2", "/nowhere")) for name in
             chance.sample(names, 5)}
    if chance.random() < 0.5:
        given |= dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")
    if given.get("MASTER_PORT", "").isdecimal():
        del given["MASTER_PORT"]
    return chance.choice(list(FLAGS)), "--data a.csv", given


KINDS = {"bars": edit_bars, "packed bars": edit_packed, "mapped folder": edit_mapped,
         "folder of files": edit_folder, "checkpoint": edit_checkpoint,
         "stamps to come": edit_stamps, "portfolio weights": edit_weights,
         "environment": edit_environment}
COLUMNS = "right", "one line", "traceback", "signal", "hang", "memory", "changed", "no price"


# -- what comes of it

def make_sound():
    """In this folder: bars as a file, in a folder and mapped, a checkpoint, stamps, weights."""
    series = data.synthetic(n_symbols=2, n_bars=400)[0]
    os.makedirs("bars")
    for bars in series:
        write_csv(pathlib.Path("bars", bars.symbol + ".csv"), bars)
    shutil.copy("bars/SYN0.csv", "a.csv")
    data.write_folder(series, "mapped")
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        pretrain.main(f"--data a.csv bars --out base.pt {SIZES}".split())
    entry = torch.load("base.pt", weights_only=True)
    entry["run"]["steps"] = 2       # as if it was stopped before its end
    torch.save(entry, "base.pt")
    stamps = [data.iso(t) for t in data.future_times(series[0].time, 4)]
    rows = {"stamps.txt": stamps, "weights.csv": ["symbol,weight", "SYN0,0.6", "SYN1,0.4"],
            "times.csv": ["symbol,time", *(f"{b.symbol},{t}" for b in series for t in stamps)]}
    for name, lines in rows.items():
        pathlib.Path(name).write_text("\n".join(lines) + "\n")


def contents(outputs):
    """{path: what it is and holds} of all in this folder but the outputs."""
    found = {}
    for folder, names, files in os.walk("."):
        for path in (os.path.join(folder, name) for name in names + files):
            mode, held = os.lstat(path).st_mode, None
            if stat.S_ISREG(mode):
                held = pathlib.Path(path).read_bytes()
            elif stat.S_ISLNK(mode):
                held = os.readlink(path)
            if path.split("/")[1] not in outputs:
                found[path] = mode, held
    return found


def call(name, argv, given, log):
    """Run a script's main in a fork of this process; -> (exit status or minus the signal, bytes of
    memory, lines of its output)."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            os.environ |= given
            time.tzset()
            size = re.search(r"VmSize:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]
            resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size) + int(MEMORY),) * 2)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(12 * SECONDS)  # where it waits; the machine may have others to serve
            sys.argv = [name + ".py", *argv]
            run(SCRIPTS[name].main)
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss, lines


def judge(status, memory, lines):
    """One of COLUMNS."""
    if status in (-signal.SIGALRM, -signal.SIGPROF):
        return "hang"
    if memory > MEMORY or any("out of memory" in line for line in lines):
        return "memory"
    if status < 0:
        return "signal"
    errors = sum(line.startswith("error: ") for line in lines)
    ended = (status, errors) in ((0, 0), (2, 1)) and all(map(str.isprintable, lines))
    if not ended or any(line.startswith("Traceback") or "Warning: " in line for line in lines):
        return "traceback"
    return "one line" if status else "right"


def has_prices(path):
    """Whether the rows of a forecast hold bars."""
    with open(path, newline="") as f:
        rows = np.array([row[-6:-2] for row in csv.reader(f)][1:], float)
    o, h, l, c = rows.T
    return len(rows) and np.isfinite(rows).all() and (0 < l).all() and (
        (l <= np.minimum(o, c)) & (np.maximum(o, c) <= h)).all()


def meet(kind, chance):
    """Edit a file in this folder, and call a script: -> (one of COLUMNS, what was called)."""
    name, more, given = KINDS[kind](chance)
    argv = more.split() if "--resume" in more else (FLAGS[name] + " " + more).split()
    outputs = ("base.pt",) if "--resume" in argv else OUTPUTS
    before = contents(outputs)
    with tempfile.TemporaryFile() as log:
        status, memory, lines = call(name, argv, given, log)
    outcome = judge(status, memory, lines)
    if outcome in ("right", "one line") and contents(outputs) != before:
        outcome = "changed"
    if outcome == "right" and name == "sample" and not has_prices("out"):
        outcome = "no price"
    text = f"{name}.py {' '.join(argv)} {given or ''}: {ascii(lines[-1] if lines else '')}"
    return outcome, text[:500]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="?", default=1000, help="edited files (1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--seed", type=int, default=0, help="of the edits")
    args = parser.parse_args()
    counts = {kind: dict.fromkeys(COLUMNS, 0) for kind in KINDS}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sound, work = os.path.join(folder, "sound"), os.path.join(folder, "work")
        os.mkdir(sound)
        with contextlib.chdir(sound):
            make_sound()
        for k in range(args.first, args.first + args.n):
            kind = list(KINDS)[k % len(KINDS)]
            shutil.copytree(sound, work)
            with contextlib.chdir(work):
                outcome, text = meet(kind, random.Random(f"{args.seed} {k}"))
            shutil.rmtree(work)
            counts[kind][outcome] += 1
            if outcome not in ("right", "one line"):
                print(f"{k} {kind}: {outcome}: {text}", flush=True)
    counts[f"all {args.n}"] = {c: sum(row[c] for row in counts.values()) for c in COLUMNS}
    print(f"{'edited':18}" + "".join(f"{column:>10}" for column in COLUMNS))
    for kind, row in counts.items():
        print(f"{kind:18}" + "".join(f"{count:>10}" for count in row.values()))
    good = sum(row["right"] + row["one line"] for row in counts.values())
    sys.exit(good < 2 * args.n)


if __name__ == "__main__":
    main()
