"""Files that survive a kill: atomic writes, one writer at a time, reading that runs no code, hashes."""
import contextlib
import glob
import hashlib
import io
import os
import sys
import tempfile
import threading
import time
import warnings
import zipfile
try:
    import fcntl
except ImportError:  # Windows: there the last writer wins
    fcntl = None

import numpy as np
import torch

from backstage.script import UserError, printable
from backstage.series import HOUR

# -- what tells two data sets, or two sets of weights, apart

def weights_hash(weights) -> str:
    """A hash of named tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint(series) -> str:
    """A hash of every bar, so that a run can tell that it goes on with the data it began with."""
    digest = hashlib.sha256()
    for bars in series:
        digest.update(bars.symbol.encode("utf-8", "surrogatepass"))  # a file name may hold bytes that are no text
        for i in range(0, len(bars), 1 << 16):
            digest.update(bars.time[i:i + (1 << 16)].tobytes() + bars.ohlcva[i:i + (1 << 16)].tobytes())
    return digest.hexdigest()[:16]


# -- files that survive a kill

def save_atomic(obj, path):
    """torch.save by write_atomic: a kill leaves the old file or the new one. UserError when the disk refuses."""
    buffer = io.BytesIO()  # torch's own writer aborts the process on a full disk
    torch.save(obj, buffer)
    with write_atomic(path) as f:
        f.write(buffer.getbuffer())


@contextlib.contextmanager
def write_atomic(path, text=False):
    """with write_atomic(path) as f: a new file, bytes or text, that takes the place of path when all is written.

    Written beside path, flushed, renamed: a kill or a full disk leaves the old file or the new one, and of two runs the
    last wins whole. A symlink stays and its target is replaced; a device, a pipe and the process's own output
    (/dev/stdout) are written through. Text is UTF-8, with escapes for what is none. UserError where the disk refuses.
    """
    how = dict(mode="w", encoding="utf-8", errors="backslashreplace", newline="") if text else dict(mode="wb")
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        stream = _own_stream(path)
        if stream is not None or (os.path.exists(path) and not os.path.isfile(path)):
            with open(path if stream is None else os.dup(stream), **how) as f:
                yield f
            return
        _remove_temporaries(target, older_than=HOUR)
        with open(temporary, **how) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(OSError):  # of a new file there is no mode to keep
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
        with contextlib.suppress(PermissionError):  # Windows, where a folder cannot be flushed
            folder = os.open(os.path.dirname(target), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BrokenPipeError:
        raise  # who reads our output went away; see run
    except OSError as e:
        raise UserError(f"{path}: cannot be saved ({e.strerror or e}); make room or choose another place. "
                        f"The last good file there, if any, is intact")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # there only if something went wrong


def _remove_temporaries(target, older_than):
    """Remove what writers of `target` left that were killed, if it is so many seconds old."""
    for name in glob.glob(glob.escape(target) + ".*-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(name) > older_than:
                os.unlink(name)


def _own_stream(path):
    """1 or 2 where path is our standard output or error, else None; what was printed so far goes out first."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError, AttributeError):  # no such path, or a closed stream
            if os.path.samestat(os.stat(path), os.fstat(number)):
                stream.flush()
                return number


def load_safe(path):
    """torch.load that runs no code, onto the CPU; UserError for anything but a whole file of ours.

    A tensor larger than what the file holds of it is refused: it would take any memory once it is copied.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()) or file.testzip():
                raise zipfile.BadZipFile  # torch neither compresses nor looks at checksums
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            found = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors_in(found):
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError("a tensor claims more numbers than the file holds")
        return found
    except FileNotFoundError:
        why = "no such file"
    except OSError as e:
        why = f"cannot be read ({e.strerror})"
    except Exception as e:  # torch raises many kinds for a truncated, foreign or hostile file
        hostile = "weights_only" in str(e) and "global" in str(e).lower()
        why = e if "more numbers" in str(e) else "it asks to run code" if hostile else "truncated or foreign"
        why = f"not a checkpoint that can be loaded safely ({why})"
    raise UserError(f"{path}: {why}; name a checkpoint, or train one with python pretrain.py")


def _tensors_in(obj):
    """Every tensor in dicts, lists and tuples inside one another."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, (dict, list, tuple)):
        for part in obj.values() if isinstance(obj, dict) else obj:
            yield from _tensors_in(part)


@contextlib.contextmanager
def sole_writer(path):
    """with sole_writer(path): UserError where another run is about to write the file; of many processes, rank 0 asks.

    By a lock on `path.lock`, removed at the end. A run that was killed leaves the file, but no lock: the next takes it.
    """
    target, lock = os.path.realpath(path), None
    name = target + ".lock"
    asks = fcntl and int(os.environ.get("RANK", 0)) == 0 and (os.path.isfile(target) or not os.path.exists(target))
    while asks:
        try:
            lock = open(name, "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing it; wait for its end, or choose another --out")
        except OSError:
            break  # nothing can be written or locked there; check_out says so
        if os.path.exists(name) and os.path.samestat(os.fstat(lock.fileno()), os.stat(name)):
            _remove_temporaries(target, older_than=-np.inf)  # there is no other writer now
            break
        # else its holder has just ended and removed it: again
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):
                os.unlink(name)
            lock.close()


def check_out(path, overwrite=False, inputs=()):
    """Refuse, before any work, an output that exists, is an input, or could not be written at the end."""
    folder, exists = os.path.dirname(os.path.realpath(path)), os.path.exists(path)
    if not path or os.path.isdir(path):
        raise UserError(f"{path!r}: cannot be written, it is not the name of a file; choose another --out")
    if exists and (_own_stream(path) or not os.path.isfile(path)):
        return  # a device, a pipe, our own output: nothing there is replaced
    if not os.path.isdir(folder):
        raise UserError(f"{path}: the folder {folder} does not exist; make it or choose another --out")
    try:
        tempfile.TemporaryFile(dir=folder).close()
        if exists:
            open(path, "r+b").close()
    except OSError:
        raise UserError(f"{path}: cannot be written; choose another --out")
    if exists and any(name and os.path.exists(name) and os.path.samefile(name, path) for name in inputs):
        raise UserError(f"{path}: this run reads it; choose another --out")
    if exists and not overwrite:
        raise UserError(f"{path}: exists already; go on from it with --resume, replace it with --overwrite, "
                        f"or choose another --out")


def csv_text(text):
    """A name as a cell of a CSV file: printable, and never a formula to a spreadsheet (= + - @ get a quote)."""
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text
