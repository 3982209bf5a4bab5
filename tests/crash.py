"""Kill training runs at random moments, again and again, and see that each ends with the weights of an unbroken one.

    python tests/crash.py                # at least 20 kills with SIGKILL for each stage, under ten minutes each
    python tests/crash.py expo rollout   # of these stages alone

The runs are long enough, and save often enough, that kills fall into the training and the writing of the checkpoint.
Exit status 0 and a line for each stage where all weights are equal, bit for bit; 1 where they are not.
"""
import argparse
import glob
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from backstage.mapped import write_folder
import data

SIZES = "--batch_size 4 --block_size 64 --n_layer 2 --n_head 4 --n_embd 64 --coarse_bits 7 --fine_bits 6 --tok_steps 200".split()
FLAGS = {
    "pretrain": ["--data", "bars", *SIZES, "--eval_every", "200", "--save_every", "2"],
    "expo": "--ckpt base.pt --batch_size 4 --block_size 64 --eval_every 1000 --save_every 2 --no-backtest".split(),
    "rollout": "--ckpt base.pt --batch_size 4 --block_size 64 --eval_every 1000 --save_every 2 --no-backtest".split(),
}


def equal_weights():
    a, b = (torch.load(path, weights_only=True)["model"] for path in ("whole.pt", "broken.pt"))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def killed_again_and_again(script, args, chance):
    """Trains the stage unbroken to whole.pt, and to broken.pt until enough kills fell: (kills, those while it wrote, equal)."""
    job = [sys.executable, os.path.join(ROOT, script + ".py"), *FLAGS[script], "--steps", str(args.steps)]
    began = time.time()
    subprocess.run([*job, "--out", "whole.pt", "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    each = (time.time() - began) / args.kills  # so much of its work a run does at most before the kill; the start alone takes seconds
    kills, in_write, equal = 0, 0, True
    while True:
        if time.time() - began > args.seconds:
            sys.exit(f"{script}: not finished after {args.seconds:.0f} s and {kills} kills")
        resume = ["--resume"] * os.path.exists("broken.pt")
        run = subprocess.Popen([*job, "--out", "broken.pt", *resume], stdout=subprocess.DEVNULL)
        try:
            run.wait(chance.uniform(2.0, 3.5 + each) if kills < args.kills else max(1.0, args.seconds - (time.time() - began)))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
            in_write += bool(glob.glob(".kronos-r-*.tmp"))
            for path in glob.glob(".kronos-r-*.tmp"):
                os.unlink(path)
            continue
        if run.returncode:
            sys.exit(f"{script}: a resumed run failed with status {run.returncode}")
        equal &= equal_weights()
        os.unlink("broken.pt")
        if kills >= args.kills:
            return kills, in_write, equal


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(FLAGS)}; all if none")
    parser.add_argument("--kills", type=int, default=20, help="at least so many of each stage (default 20)")
    parser.add_argument("--seconds", type=float, default=600, help="bound for a stage (default 600)")
    parser.add_argument("--steps", type=int, default=2000, help="updates of each run (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance, all_equal = random.Random(args.seed), True
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_folder(data.synthetic(n_symbols=3, n_bars=1500)[0], "bars")
        subprocess.run([sys.executable, os.path.join(ROOT, "pretrain.py"), *FLAGS["pretrain"], "--steps", "20", "--out", "base.pt"],
                       check=True, stdout=subprocess.DEVNULL)
        for script in args.stages or FLAGS:
            began = time.time()
            kills, in_write, equal = killed_again_and_again(script, args, chance)
            all_equal &= equal
            print(f"{script}: {kills} kills ({in_write} while writing) in {time.time() - began:.0f} s: weights "
                  f"{'equal, bit for bit' if equal else 'DIFFER'}", flush=True)
        os.chdir(ROOT)
    sys.exit(not all_equal)


if __name__ == "__main__":
    main()
