"""A file of text as people have it -> a table: its lines, its header, columns of numbers and texts.

bytes -> text -> delimiter and header -> cells, each kind in the one format that fits the file.
"""
import bz2
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import re
import warnings
import zipfile
from dataclasses import dataclass

import numpy as np

from backstage.dates import is_number
from backstage.files import open_regular
from backstage.names import PRICES, folded, n_known, names_of
from backstage.script import UserError, printable, remark
from backstage.series import FORECAST

BINANCE = ["time", *PRICES, "volume", "", "amount", "", "", "", ""]
ENCODINGS = "gb18030 latin-1 cp1251 shift_jis big5 cp949 cp1250 cp1254".split()
DELIMITERS = ",;\t| "
FIRST_LINE = "put a first line such as time,open,high,low,close,volume"
MISSING = {"", "-", "--", ".", "null", "none", "nan", "na", "n/a", "n.a.", "#n/a", "nat", r"\n"}
MAX_BAD = 0.05   # share of rows that may be bad, or have the time of another
UNPACKED, PACKED = 16 * 10**6, 30   # bytes that an archive may hold, or so many times its own size
FOREIGN = {b"PAR1": "Parquet", b"ARROW1": "Feather", b"\x89HDF": "HDF5", b"{": "JSON",
           b"[": "JSON", b"\xd0\xcf\x11\xe0": "Excel"}


class NoBars(UserError):
    """A file that is empty, or holds nothing but a header, or a forecast."""


@dataclass
class Table:
    """The lines of a file and its columns."""
    path: str
    lines: list[str]
    delimiter: str
    first: int          # index of the first line below the header
    names: list[str]    # of each column, as in the file
    fields: list[str]   # the same folded
    tickers: list[str]  # whose the column is, "" where the header names no symbols
    has_header: bool = True
    order: str | None = None        # of day and month where the dates do not tell, see read_dates
    columns: list | None = None     # what they hold, where no text is behind them
    line_of: list[int] | None = None  # line of each row, from 1; None: all that are not empty

    def say(self, text):
        remark(f"{self.path}: {text}")

    def error(self, line, text):
        return UserError(f"{self.path}:{line}: {text}")

    def line(self, row):
        """The line of a row, from 1, for messages."""
        if self.line_of is None:
            lines = enumerate(self.lines[self.first:], self.first + 1)
            self.line_of = [k for k, line in lines if line]
        return self.line_of[row]

    def row(self, at):
        """The cells of a line, by its index; [] behind the last."""
        return split(self.lines[at], self.delimiter) if at < len(self.lines) else []


# -- bytes -> text

def text_of(path, unpacked=UNPACKED):
    """What a text file holds, in whatever encoding and container; UserError if it is none."""
    try:
        with open_regular(path) as f:
            raw = f.read()
        most = max(unpacked, PACKED * len(raw))
        for magic, opened in CONTAINERS.items():
            if raw.startswith(magic):
                raw = opened(io.BytesIO(raw)).read(most + 1)
                if len(raw) > most:
                    raise ValueError(f"it unpacks to over {most / 1e6:.0f} MB; if you trust it, "
                                     f"say how many to python data.py --max_unpacked")
        for magic, kind in FOREIGN.items():
            if raw[:100].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
                raise ValueError(f"it is {kind}")
        text = _decoded(raw)
        if "\0" in text:
            raise ValueError("it is binary")
    except Exception as e:  # a damaged archive raises many kinds
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise UserError(f"{path}: cannot be read ({why}); give a CSV file, or an archive of one")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unzipped(packed):
    file = zipfile.ZipFile(packed)
    names = [name for name in file.namelist() if name[-1:] != "/" and name[:9] != "__MACOSX/"]
    if "[Content_Types].xml" in names:
        raise ValueError("it is Excel")
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} files")
    return file.open(names[0])


CONTAINERS = {b"PK\3\4": _unzipped, b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open,
              b"BZh": bz2.open}


def _decoded(raw):
    """UTF-16 by its mark, UTF-8, else the encoding in which most names of columns are known."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace").rstrip("\0")
    raw = raw.rstrip(b"\0")  # the machine died while it wrote
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")

    def known(text):
        lines = text[:4000].split("\n")
        return max(n_known(map(folded, re.split(r"[,;\t|]", line))) for line in lines)

    return max((raw.decode(name, "replace") for name in ENCODINGS), key=known)


# -- text -> delimiter, header, columns

def split(line, delimiter):
    """The cells of a line, each cut to what a name may have before regular expressions see it."""
    if delimiter == " ":  # or runs of them
        cells = line.replace('"', "").split()
    else:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell[:200] for cell in cells]


def read_table(path, unpacked=UNPACKED) -> Table:
    """A file's Table: its header is what makes most names of columns known, and more than one."""
    lines = text_of(path, unpacked).split("\n")
    filled = [k for k, line in enumerate(lines[:200]) if line.strip()][:40]
    if not filled:
        raise NoBars(f"{path}: the file is empty; it needs a header line and rows of bars")
    if all(re.fullmatch(r'\s*"(?:[^"]|"")*"\s*', lines[k]) for k in filled):  # each line one cell
        lines = [line.strip()[1:-1].replace('""', '"') for line in lines]
    most, found = 1, None
    for delimiter, k in itertools.product(DELIMITERS, filled):
        named = names_of(split(lines[k], delimiter))
        known = n_known(field for field, _ in named) if len(named) > 4 else 0
        if known > most:
            most, found = known, (delimiter, k, named)
        if known > 4:
            break
    if not found:
        return _without_header(path, lines, filled)
    delimiter, at, named = found
    if delimiter == " ":
        lines, delimiter = ["\t".join(split(line, " ")) for line in lines], "\t"
    cells = [printable(cell.strip()) for cell in split(lines[at], delimiter)]
    if tuple(cells[:len(FORECAST)]) == FORECAST:
        raise NoBars(f"{path}:{at + 1}: a forecast of sample.py, which is no history; "
                     f"name the bars")
    table = Table(path, lines, delimiter, at + 1, cells, *map(list, zip(*named)))
    if not cells[-1]:  # the rows may have more columns than the header has names
        for names in (table.names, table.fields, table.tickers):
            names += [""] * (len(table.row(at + 1)) - len(cells))
    if not any(table.tickers):
        above, below = [k for k in filled if k < at], [k for k in filled if k > at]
        _find_tickers(table, at, below[:1] + above[-1:])
    return table


def _find_tickers(table, at, nearby):
    """Note the symbols where a line nearby is a second row of the header, as yfinance writes it."""
    for k in nearby:
        corner, *tickers = [cell.strip() for cell in table.row(k)]
        is_corner = folded(corner) in ("", "ticker", "price", "symbol")
        if not is_corner or len(tickers) != len(table.names) - 1:
            continue
        named = list(zip(table.fields[1:], tickers))
        if min(n_known(f for f, t in named if t == ticker) for ticker in set(tickers)) < 4:
            continue  # a row of units
        table.tickers, table.first = ["", *tickers], max(at, k) + 1
        table.fields[0] = ""  # the dates, below a name that is none
        third = table.row(table.first)
        if third and not any(third[1:]):
            table.first += 1  # it names the column of dates
        return


def _without_header(path, lines, filled):
    """Time, prices, volume and perhaps one column more, or Binance's twelve; bars must be whole."""
    for delimiter in DELIMITERS:
        first = filled[0]
        if len(filled) > 1 and split(lines[first], delimiter)[:5] == ["0", "1", "2", "3", "4"]:
            first = filled[1]  # pandas numbered the columns
        cells = [cell.strip() for cell in split(lines[first], delimiter)]
        has_symbol = len(cells) > 6 and re.fullmatch(r"[A-Za-z][\w.=-]*", cells[0])
        fields = ["symbol"] if has_symbol else []
        at = len(fields)
        fields += ["date", "time"] if len(cells) > at + 6 and ":" in cells[at + 1] else ["time"]
        rest = cells[len(fields):]
        if delimiter != ",":
            rest = [cell.replace(",", ".") for cell in rest]
        fields += [*PRICES, "volume", ""][:len(rest)]
        if len(cells) == len(BINANCE):
            fields = list(BINANCE)
        if len(fields) == len(cells) and len(rest) >= 5 and all(map(is_number, rest)):
            return Table(path, lines, delimiter, first, list(fields), fields, [""] * len(fields),
                         has_header=False)
    for k, delimiter in itertools.product(filled[:3], DELIMITERS):
        if n_known(map(folded, split(lines[k], delimiter))) > 1:
            raise UserError(f"{path}:{k + 1}: the header {lines[k][:60]!r} lacks open, high, low "
                            f"or close; a bar has all four")
    raise UserError(f"{path}:{filled[0] + 1}: no header and no bars in "
                    f"{lines[filled[0]][:60]!r}; {FIRST_LINE}")


# -- columns -> numbers

def cells_of(table, numbers, texts):
    """({index: column}, {row: why it is bad}), columns as float64 where that is quick, else texts.

    Without blanks, comments, notes at the end, and headers again where files were joined.
    """
    if table.columns:
        return {i: table.columns[i] for i in numbers | texts}, {}
    kinds = [(str(i), "f8" if i in numbers else "O" if i in texts else "U1")
             for i in range(len(table.names))]
    lines = table.lines[table.first:]
    with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")  # of no rows
        got = np.loadtxt(lines, kinds, comments=None, delimiter=table.delimiter, quotechar='"',
                         ndmin=1)
        if len(got) == sum(map(bool, lines)):  # else a quote that was not closed
            return {i: got[str(i)] for i in numbers | texts}, {}
    rows, table.line_of, reasons = [], [], {}
    n_columns, price = len(table.names), min(numbers)
    n_lines = len("\n".join(lines).rstrip().split("\n"))
    reader = csv.reader(lines, delimiter=table.delimiter, skipinitialspace=True)
    try:
        for line, row in enumerate(reader, 1):
            if reader.line_num > line:
                raise csv.Error("a quote is opened and not closed")
            if len(row) == n_columns + 1 and not row[-1]:
                row.pop()  # a comma behind the last cell
            elif len(row) == n_columns - 1 and not table.names[-1]:
                row.append("")  # or behind the last name
            fits = len(row) == n_columns
            if not fits or not row[price][:1].isdecimal():  # perhaps no row of a bar
                filled = [cell for cell in row if cell.strip()]
                is_note = len(filled) == 1 and not fits
                is_note = is_note and (line == n_lines or not is_number(filled[0]))
                if not filled or is_note or filled[0].startswith(("#", "//")):
                    continue
                if fits and folded(row[price]) == table.fields[price]:
                    continue  # the header again
            if not fits:
                reasons[len(rows)] = f"{len(row)} cells where the header has {n_columns}"
                row = [""] * n_columns
            rows.append(row)
            table.line_of.append(table.first + line)
    except csv.Error as e:
        line = table.line_of[-1] if table.line_of else table.first
        raise table.error(line + 1, f"not a CSV row ({e}); mend or remove it")
    return {i: [row[i] for row in rows] for i in numbers | texts}, reasons


NOISE = str.maketrans("\u2019", "'", "$€£¥₹ \u00a0\u202f\u2009\t")
APOSTROPHE = re.compile(r"(?<!\d)'|'(?=\d{3}(?!\d))")  # 1'234.50; in 123'16 it marks 32nds
NUMBER = [re.compile(  # 1,234.50 and 1.234,50
    rf"([-+]?(?:\d{{1,3}}(?:{comma}\d{{2,3}})*{comma}\d{{3}}|\d*)(?:{point}\d*)?(?:e[-+]?\d+)?)"
    r"([a-z]+\.?|万|亿|)") for comma, point in ((",", "\\."), ("\\.", ","))]
SUFFIX = {"": "", "k": "e3", "m": "e6", "mn": "e6", "mln": "e6", "mio": "e6", "b": "e9",
          "bn": "e9", "mrd": "e9", "t": "e12", "万": "e4", "亿": "e8"}


def numbers_of(table, cells, reasons, optional=()):
    """{index: float64} in one format for the file; NaN where a number is missing, or is none.

    The latter adds to reasons {row: why}. Of the columns `optional` one that holds other things is
    missing as a whole.
    """
    with contextlib.suppress(ValueError):
        return {i: np.asarray(column, np.float64) for i, column in cells.items()}
    cells = {i: ["nan" if c.strip().lower() in MISSING else c for c in column]
             for i, column in cells.items()}
    with contextlib.suppress(ValueError):
        return {i: np.array(column, np.float64) for i, column in cells.items()}
    plain = {i: APOSTROPHE.sub("", "\0".join(column).lower().translate(NOISE)).split("\0")
             for i, column in cells.items()}
    values = _read_numbers({c for column in plain.values() for c in column}, table.delimiter)
    for i, column in plain.items():
        bad = [row for row, text in enumerate(column) if text not in values]
        if i in optional and len(bad) > MAX_BAD * len(column):
            table.say(f"{table.names[i]!r} holds {cells[i][bad[0]]!r}, which is not a number; no "
                      f"amount is read")
            plain[i], bad = ["nan"] * len(column), []
        for row in bad:
            reasons.setdefault(row, f"{table.fields[i]} {cells[i][row]!r} is not a number")
    return {i: np.array([values.get(c, np.nan) for c in column]) for i, column in plain.items()}


def _read_numbers(texts, delimiter):
    """{text: number} of those that are numbers where the point, or the comma, is the decimal."""
    by_point, by_comma = (sum(form.fullmatch(text) is not None for text in texts)
                          for form in NUMBER)
    few = 0.02 * len(texts)  # a mistyped cell or two decide nothing
    if delimiter != "," and any("," in text for text in texts):
        few = -few  # "14,300" beside semicolons is 14.3
    comma, values = by_comma - by_point > few, {"nan": np.nan}
    for text in texts:
        found = NUMBER[comma].fullmatch(text)
        power = SUFFIX.get(found[2].rstrip(".")) if found else None
        if power is None or not any(map(str.isdigit, text)) or (power and "e" in found[1]):
            continue
        digits = found[1].replace("." if comma else ",", "").replace(",", ".")
        values[text] = float(digits + power)
    return values
