"""Files that survive a kill: atomic writes, one writer at a time, reading that runs no code,
hashes."""
import contextlib
import glob
import hashlib
import io
import os
import pickletools
import re
import stat
import sys
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

from backstage.script import UserError, printable, processes, remark
from backstage.series import HOUR

# names of files of bars, what else is before
FILES = re.compile(r"(\.(csv|tsv|txt))?(\.(gz|xz|bz2|zip))?$", re.I)
# what a checkpoint may call
GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
           "collections OrderedDict"}
GLOBALS |= {f"torch {kind}Storage" for kind in
            "Float Half BFloat16 Double Bool Byte Char Short Int Long".split()}
PIECE = 1 << 16     # bars that are hashed at once

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
        # a file name may hold bytes that are no text
        digest.update(bars.symbol.encode("utf-8", "surrogatepass"))
        for i in range(0, len(bars), PIECE):
            digest.update(bars.time[i:i + PIECE].tobytes() + bars.ohlcva[i:i + PIECE].tobytes())
    return digest.hexdigest()[:16]


# -- files that survive a kill

def save_atomic(obj, path):
    """torch.save by write_atomic: a kill leaves the old file or the new one. UserError when the
    disk refuses."""
    buffer = io.BytesIO()  # torch's own writer aborts the process on a full disk
    torch.save(obj, buffer)
    with write_atomic(path) as f:
        f.write(buffer.getbuffer())


@contextlib.contextmanager
def write_atomic(path, text=False):
    """with write_atomic(path) as f: a new file, bytes or text, that takes the place of path when
    all is written.

    Written beside path, flushed, renamed: a kill or a full disk leaves the old file or the new one,
    and of two runs the last wins whole. A symlink stays and its target is replaced; a device, a
    pipe and the process's own output (/dev/stdout) are written through. Text is UTF-8, with escapes
    for what is none. UserError where the disk refuses.
    """
    how = dict(mode="wb")
    if text:
        how = dict(mode="w", encoding="utf-8", errors="backslashreplace", newline="")
    target = os.path.realpath(path)
    temporary = _temporary(target)
    try:
        stream = _own_stream(path)
        if stream is not None or (os.path.exists(path) and not os.path.isfile(path)):
            with open(path if stream is None else os.dup(stream), **how) as f:
                yield f
            return
        _remove_temporaries(target, older_than=HOUR)
        # never through a link
        with open(temporary, **how | dict(mode=how["mode"].replace("w", "x"))) as f:
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
        raise UserError(f"{path}: cannot be saved ({e.strerror or e}); make room or choose another "
                        f"place. The last good file there, if any, is intact")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # there only if something went wrong


def _beside(target, end):
    """A name in the folder of target that nobody else gives, however long the target's own:
    .kronos-r-HASH.end"""
    folder, name = os.path.split(target)
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return os.path.join(folder, f".kronos-r-{digest}.{end}")


def _temporary(target):
    return _beside(target, f"{os.getpid()}-{threading.get_ident()}.tmp")


def open_regular(path):
    """Open a file to read its bytes. OSError for what is no regular file: a pipe or a device might
    never end."""
    no_wait = getattr(os, "O_NONBLOCK", 0)
    f = open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait))
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise OSError(0, "not a regular file")
    return f


def _remove_temporaries(target, older_than):
    """Remove what writers of `target` left that were killed, if it is so many seconds old."""
    for name in glob.glob(glob.escape(_beside(target, "")) + "*-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(name) > older_than:
                os.unlink(name)


def _own_stream(path):
    """1 or 2 where path is our standard output or error, else None; what was printed so far goes
    out first."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError, AttributeError):  # no such path, or a closed stream
            if os.path.samestat(os.stat(path), os.fstat(number)):
                stream.flush()
                return number


class _Hostile(Exception):
    """What a file of ours never holds."""


def load_safe(path):
    """torch.load that runs no code, onto the CPU; UserError for anything but a whole file of ours.

    A tensor larger than what the file holds of it is refused: it would take any memory once it is
    copied.
    """
    try:
        with open_regular(path) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            n_bytes = _check_pickle(f)
            f.seek(0)
            found = torch.load(f, map_location="cpu", weights_only=True)
        for tensor in _tensors_in(found, at_most=1000 + 10 * n_bytes):
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise _Hostile("a tensor claims more numbers than the file holds")
        return found
    except FileNotFoundError:
        why = "no such file"
    except OSError as e:
        why = f"cannot be read ({e.strerror})"
    except _Hostile as e:
        why = f"not a checkpoint that can be loaded safely ({e})"
    except Exception:  # torch raises many kinds for a truncated or foreign file
        why = "not a checkpoint that can be loaded safely (truncated or foreign)"
    raise UserError(f"{path}: {why}; name a checkpoint, or train one with python pretrain.py")


def _check_pickle(f):
    """Look at a file of torch.save before it is loaded: bytes of its pickle; an error unless it
    makes tensors alone."""
    with zipfile.ZipFile(f) as file:
        entries = file.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        n_bytes = sum(entry.file_size for entry in entries)
        if not stored or n_bytes > os.fstat(f.fileno()).st_size or file.testzip():
            raise zipfile.BadZipFile  # torch neither compresses nor looks at checksums
        pickle = file.read(next(entry for entry in entries if entry.filename.endswith("data.pkl")))
    for op, argument, _ in pickletools.genops(pickle):
        is_global = op.name == "GLOBAL" and argument not in GLOBALS
        if is_global or op.name in ("STACK_GLOBAL", "INST", "OBJ"):
            raise _Hostile("it asks to run code")
    return len(pickle)


def _tensors_in(obj, at_most):
    """Yield every tensor in dicts, lists and tuples inside one another, which must have an end."""
    left = [(obj, 0)]
    while left:
        obj, depth = left.pop()
        at_most -= 1
        if at_most < 0 or depth > 20:
            raise _Hostile("lists inside one another without end")
        if isinstance(obj, torch.Tensor):
            yield obj
        elif isinstance(obj, (dict, list, tuple)):
            left += ((part, depth + 1) for part in (obj.values() if isinstance(obj, dict) else obj))


@contextlib.contextmanager
def sole_writer(path):
    """with sole_writer(path): UserError where another run is about to write the file; of many
    processes, rank 0 asks.

    By a lock on a file beside it, removed at the end. A run that was killed leaves the file, but no
    lock: the next takes it.
    """
    target, lock = os.path.realpath(path), None
    name = _beside(target, "lock")
    asks = fcntl and processes()[0] == 0 and (os.path.isfile(target) or not os.path.exists(target))
    while asks:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            lock = open(os.open(name, flags, 0o600), "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing it; wait for its end, or choose "
                            f"another --out")
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


def check_out(path, overwrite=False, reads=()):
    """Refuse, before any work, an output that exists, is read or written otherwise, or could not be
    written at the end.

    reads: what the run reads, and its other outputs: files, folders and globs of bars, None. Links
    are followed.
    """
    path, exists = os.fspath(path), os.path.exists(path)
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(path):
        raise UserError(f"{path}: cannot be written, it is a folder; choose another --out")
    if exists and (_own_stream(path) or not os.path.isfile(path)):
        return  # a device, a pipe, our own output: nothing there is replaced
    if not os.path.isdir(folder):
        raise UserError(f"{path}: the folder {folder} does not exist; make it or choose another "
                        f"--out")
    try:
        open(_temporary(target), "x").close()
        os.unlink(_temporary(target))
        with contextlib.suppress(FileNotFoundError):
            open(target, "r+b").close()     # too long a name fails here
    except OSError:
        raise UserError(f"{path}: cannot be written; choose another --out")
    if _identity(target) in map(_identity, files_in(reads)):
        raise UserError(f"{path}: this run reads it, or writes something else to it; choose "
                        f"another --out")
    folders = [source for source in reads if source and os.path.isdir(source)]
    if FILES.search(path)[0] and any(os.path.samefile(source, folder) for source in folders):
        remark(f"{path}: lies in a folder that is read for bars; better choose another place")
    if exists and not overwrite:
        raise UserError(f"{path}: exists already; replace it with --overwrite, choose another "
                        f"--out, or go on with the run in it by --resume")


def _identity(path):
    """What two names of one file have in common."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


def files_in(sources):
    """Yield every file of files, folders and globs of bars."""
    for source in filter(None, sources):
        for path in [source] if os.path.lexists(source) else glob.glob(source) or [source]:
            if not os.path.isdir(path):
                yield path
                continue
            names = os.listdir(path)
            of_arrays = "symbols.json" in names
            yield from (os.path.join(path, name) for name in names
                        if of_arrays or FILES.search(name)[0])


def csv_text(text):
    """A name as a cell of a CSV file: printable, and never a formula to a spreadsheet (= + - @ get
    a quote)."""
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text
