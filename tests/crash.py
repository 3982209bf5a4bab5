"""Kill a training run at random moments, again and again, and see that it ends with the weights of an unbroken one.

    python tests/crash.py                # at least 20 kills with SIGKILL, under ten minutes

The run is long enough, and saves often enough, that kills fall into the tokenizer's training, the model's, and the writing
of the checkpoint. Exit status 0 and one line where all weights are equal, bit for bit; 1 where they are not.
"""
import argparse
import collections
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

import data

RUN = ("--batch_size 4 --block_size 64 --n_layer 2 --n_head 4 --n_embd 64 --coarse_bits 7 --fine_bits 6 "
       "--eval_every 200 --save_every 2").split()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least so many (default 20)")
    parser.add_argument("--seconds", type=float, default=600, help="bound on the whole (default 600)")
    parser.add_argument("--steps", type=int, default=2000, help="of the model, half of the tokenizer's (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        bars, whole, broken = (os.path.join(folder, name) for name in ("bars", "whole.pt", "broken.pt"))
        data.write_folder(data.synthetic(n_symbols=3, n_bars=1500)[0], bars)
        job = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", bars, *RUN,
               "--steps", str(args.steps), "--tok_steps", str(2 * args.steps)]
        subprocess.run([*job, "--out", whole], check=True, stdout=subprocess.DEVNULL)
        each = (time.time() - began) / args.kills  # of its own work a run gets on average so much before the kill
        kills, in_write = collections.Counter(), 0
        while True:
            if time.time() - began > args.seconds:
                sys.exit(f"not finished after {args.seconds:.0f} s and {sum(kills.values())} kills")
            resume = ["--resume"] * os.path.exists(broken)
            run = subprocess.Popen([*job, "--out", broken, *resume], stdout=subprocess.DEVNULL)
            left = args.kills - sum(kills.values())
            try:
                # the start alone takes seconds; while kills are owed, no run may come to its end
                run.wait(chance.uniform(2.0, 3.5 + each) if left > 0 else max(1.0, args.seconds - (time.time() - began)))
                if run.returncode:
                    sys.exit(f"a resumed run failed with status {run.returncode}")
                if left > 0:
                    sys.exit(f"finished after {args.kills - left} kills; on a machine so fast give it more --steps")
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                in_write += os.path.exists(broken + ".tmp")
                kills[data.load_safe(broken)["stage"] if os.path.exists(broken) else "before the first save"] += 1
        a, b = weights(whole), weights(broken)
        equal = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        where = ", ".join(f"{n} {stage}" for stage, n in kills.items())
        print(f"{sum(kills.values())} kills ({where}; {in_write} while writing) in {time.time() - began:.0f} s: "
              f"weights {'equal, bit for bit' if equal else 'DIFFER'}")
        sys.exit(not equal)


if __name__ == "__main__":
    main()
