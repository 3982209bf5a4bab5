"""What every script shares: errors in one line, flags from a dataclass, devices, signals, progress.

`run(main)` calls a script; a UserError is one line and exit status 2.
"""
import argparse
import atexit
import contextlib
import gc
import inspect
import os
import re
import signal
import sys
import threading
import time
import typing
from dataclasses import fields
try:
    import resource
except ImportError:  # Windows, where memory is not told
    resource = None

import torch


def printable(text):
    """Text with control characters, escape codes and what is no letter written as escapes: one
    harmless line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class UserError(Exception):
    """Something the user can mend: one harmless line that names the file, the line and the remedy;
    exit status 2."""

    def __init__(self, text):
        super().__init__(printable(text))


def remark(text):
    """What a user should know, as one harmless line on stderr."""
    print(printable(text), file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The command line


def progress(text):
    """One line that rewrites itself on a terminal, and stays out of a file; an empty text clears
    it."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{printable(text)}\x1b[K", end="", file=sys.stderr, flush=True)


def pick_device(name, local_rank=0):
    """The torch.device of --device; auto takes a GPU where there is one, cuda that of this
    process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0][:80]
        raise UserError(f"--device {name}: not available here ({why}); use --device cpu")


def pick_dtype(name, device):
    """(name, torch.dtype, why) of --dtype; auto takes the faster one, and why says what decided.

    On a GPU bf16 where it has it, else fp16. On a processor what is measured: some are three times
    as fast with bf16, some slower. Keep the name in the checkpoint, so that a resumed run has the
    same.
    """
    why = "as asked"
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        why = "this GPU has bf16" if name == "bf16" else "this GPU has no bf16"
    elif name == "auto":
        gain = bf16_gain()
        name = "bf16" if gain > 1.5 else "fp32"
        why = f"bf16 multiplies {gain:.1f} times as fast here"
    return name, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name], why


def bf16_gain():
    """How many times as fast as in float32 a core of this processor maps 4,096 rows of 128 numbers
    to 512 and back in bf16. What else runs does not count."""
    n_threads, least = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            shapes = (4096, 128), (128, 512), (512, 128)
            x, up, down = (torch.ones(shape, dtype=dtype) for shape in shapes)
            times = []
            for _ in range(5):
                began = time.process_time()
                x.float().to(dtype) @ up @ down
                times.append(time.process_time() - began)
            least[dtype] = min(times)
    torch.set_num_threads(n_threads)
    return least[torch.float32] / least[torch.bfloat16]


def peak_memory():
    """The most memory that this process has held, in bytes; None where the system does not tell
    (Windows)."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def check_numbers(config, positive, others):
    """UserError for a number in a training's config that cannot be, or switches that exclude each
    other."""
    for name in (*positive, *others):
        value, least = getattr(config, name), "above 0" if name in positive else "0 or more"
        if not 0 <= value < 2**63 or (name in positive and value == 0):  # nor is NaN
            raise UserError(f"--{name} {value}: must be a finite number, {least}")
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on from --out, or "
                        "replace it")
    if config.dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError(f"--dtype {config.dtype}: choose auto, bf16, fp16 or fp32")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def _integers(text):
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 3,6,10")


def cli(config_class, doc, argv=None) -> dict:
    """The flags given, as {field: value}; there is a flag for each field of the dataclass, and no
    other.

    A field's type is the flag's, the comment behind it the help; a list takes one or more values; a
    bool is a switch.
    """
    parser = _Parser(description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = ""
    if {"-h", "--help"} & set(sys.argv if argv is None else map(str, argv)):    # it takes a while
        with contextlib.suppress(OSError, TypeError):   # under a profiler, in a notebook: no help
            source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.M))
    for field in fields(config_class):
        kind, default = field.type, field.default
        if type(None) in typing.get_args(kind):  # X | None
            kind = typing.get_args(kind)[0]
        how = dict(type=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is list:
            how = dict(action="extend", nargs="+", type=typing.get_args(kind)[0])
        elif typing.get_origin(kind) is tuple:
            how, default = dict(type=_integers, metavar="N,N"), ",".join(map(str, default))
        told = comments.get(field.name, "") + ("" if default is None else f" (default {default})")
        parser.add_argument(f"--{field.name}", help=told.replace("%", "%%"),
                            default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if "" in (value if isinstance(value, list) else [value]):
            raise UserError(f"--{name} '': empty, not the name of a file or a value; give it one, "
                            f"or drop the flag")
        if holds_controls(value):
            raise UserError(f"--{name} {value}: holds control characters; rename the file")
    return given


def holds_controls(value):
    """Whether a text, or one in a list, holds what would do something to a terminal."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and re.search(r"[\0-\x1f\x7f-\x9f]", text) for text in texts)


def processes():
    """(rank, world, local rank) of this process, as torchrun has set them; UserError for what it
    never sets."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    try:
        rank, world, local_rank, port = (int(given.get(name, 0)) for name in names[:4])
    except ValueError:
        rank, world, local_rank, port = -1, 0, 0, 0
    fits = 0 <= rank < world <= 2**16 and 0 <= local_rank < world
    if not fits or (world > 1 and not ("MASTER_ADDR" in given and 0 < port < 2**16)):
        raise UserError(f"{' '.join(f'{name}={text}' for name, text in given.items())}: no "
                        f"processes of one run; unset these variables of the environment, or start "
                        f"with torchrun")
    return rank, world, local_rank


class StopSignal:
    """SIGTERM, Ctrl-C and a lost terminal as a flag that a loop reads between steps, to save and
    then exit."""

    def __init__(self):
        self.signum, self.before = 0, {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            # others get no signals
            if signum and threading.current_thread() is threading.main_thread():
                self.before[signum] = signal.signal(signum, self._note)

    def release(self):
        """All is saved: from here on the signals do what they did before."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.signum:
            raise KeyboardInterrupt  # asked twice: stop without saving
        self.signum = signum

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGTERM)  # 143 and 130, as the shell has it


def run(main):
    """Call a script's main; a UserError is one line on stderr and exit status 2, Ctrl-C is 130."""
    # or each collection of garbage walks all objects of torch, a sixth of a second, and the last
    # one all there are
    gc.freeze()
    atexit.register(gc.freeze)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is printed goes nowhere
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            # a terminal that lacks a letter is no reason to stop
            getattr(sys, name).reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as e:
        why = str(e)
    except BrokenPipeError:  # who reads our output went away, as `| head` does: stop as it is usual
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as e:
        why = f"{e.filename or 'output'}: {e.strerror or e}; make room or choose another place"
    except (MemoryError, torch.OutOfMemoryError) as e:
        what = str(e).splitlines()[0][:80] if str(e) else "none left"
        why = f"out of memory ({what}); lower --batch_size, --n_embd or --paths"
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        why = "out of memory; lower --batch_size, --n_embd, --horizon or --paths"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {printable(why)}", file=sys.stderr)
    sys.exit(2)
