"""Files in: CSV as people have it -> Bars, and the folder of arrays that is mapped into memory.

One way for every file: bytes -> text -> delimiter and header -> columns -> numbers and dates, each in the one format
that fits the whole file -> bars -> faults. What cannot be told for certain is refused, never guessed.
"""
import bz2
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass

import numpy as np

from backstage.dates import ahead, clock_seconds, is_number, iso, read_dates
from backstage.files import FILES, open_regular, sole_writer, write_atomic
from backstage.script import UserError, printable, progress, remark
from backstage.series import COLUMNS, DAY, FORECAST, YEAR, Bars

HEADERS = {column: names.split() for column, names in {  # names of a column, best first, as `_fold` leaves them
    "time": "candledatetime timeperiodstart time timeopen timestamp timestamps datetime date opentime tradetime "
            "tradedate windowstart barstart begin starttime startat exchangedate traddt candlebegintime bartime "
            "bardate tradingdate tradingday startdate periodstart start day trddt gmttime localtime utctime utc dtyyyymmdd unix "
            "unixtime unixtimestamp epoch ts tsevent mts dt t datum zeit data fecha tarih дата 时间 日期 交易日期 日付 날짜 일자",
    "clock": "time hour clock minute timeofday tradetime localtime starttime opentime bartime timestamp zeit uhrzeit "
             "hora время 时间",
    "open": "open opening bidopen erster eröffnung eröffn mido pxopen opnpric openprc dayopen 24hopen opnprc apertura "
            "abertura ouv ouvert otwarcie açılış откр открытие 开盘 开盘价 開盤價 始値 시가 o",
    "high": "high bidhigh hoch máximo máxima tageshoch midh pxhigh hghpric askhi highest dayhigh dayshigh 24hhigh "
            "hiprc maximum max massimo plushaut haut najwyzszy najwyższy yüksek макс максимум 最高 最高价 最高價 高値 고가 h",
    "low": "low bidlow tief mínimo mínima tagestief midl pxlow lwpric bidlo lowest daylow dayslow 24hlow loprc "
           "minimum min minimo plusbas bas najnizszy najniższy düşük мин минимум 最低 最低价 最低價 安値 저가 l",
    "close": "close bidclose closelast adjclose last settle price midc pxlast clspric prc trade closing clsprc "
             "schlusskurs schluss zuletzt letzter último ultimo cierre dernier clot zamkniecie zamknięcie şimdi "
             "kapanış цена закрытие 收盘 收盘价 收盤價 終値 종가 c",
    "volume": "volume tickvol vol volumecoin tickvolume totalvolume volumetraded tradedvolume sharestraded noofshares "
              "totaltradedquantity tottrdqty ttltradgvol pxvolume numberofshares tickqty basevolume baseassetvolume "
              "tradevolume tradingvolume totaltradequantity tradedquantity candleacctradevolume adjvolume shares "
              "contracts lots dnshrtrd quantity qty stuecke stücke volumen wolumen hac hacim объём объем 成交量 成交股數 总手 "
              "出来高 거래량 v volumemoney",
    "amount": "amount turnover quotevolume quoteassetvolume value volumemoney money totalturnover tottrdval ttltrfval "
              "candleacctrade tradingmoney dnvaltrd umsatz volumen 成交额 成交金额 成交金額 거래대금 金额",
    "symbol": "symbol ticker tckrsymb tscode code name instrument instrumentname indexname pair asset secid stock "
              "stockcode stockid stocksymbol tradingsymbol security contract coin ric isin stkcd orderbookid 股票代码 代码 "
              "名称",
    "interval": "timeframe interval resolution per granularity freq frequency",
}.items()}
PRICES = COLUMNS[:4]
MONEY = """usd usdt usdc busd tusd dai eur gbp jpy krw chf cad aud nzd cny inr brl rub try pln sek mxn zar idr currency
    quote to""".split()  # "Volume USDT" is an amount
COINS = """btc xbt eth xrp ltc bch bsv bnb sol ada doge dot trx link matic pol avax xlm etc eos neo dash zec xmr xtz atom
    uni aave algo fil icp near apt arb sui ton shib pepe hbar vet grt mana sand axs ftm inj imx rune ldo mkr snx crv
    comp bat omg qtum ont iota waves zil ksm xem theta chz kava flow gala ape sei tia wld bonk wif stx kas cro okb
    base coin from shares lots contracts units""".split()  # "Volume BTC" is a volume, "Volume MA" is neither
FIELD = "(?P<field>adj close|adjusted|open|high|low|close|volume)"
BETWEEN = r"[\s_:.,'\"()|/-]+"  # between a field and its symbol: AAPL.Open, Close_AAPL, ('Close', 'AAPL')
FIELD_FIRST = re.compile(f"{FIELD}{BETWEEN}(?P<ticker>.+)", re.I)
TICKER_FIRST = re.compile(f"(?P<ticker>.+?){BETWEEN}{FIELD}", re.I)
BINANCE = ["time", *PRICES, "volume", "", "amount", "", "", "", ""]
ENCODINGS = "gb18030 latin-1 cp1251 shift_jis big5 cp949 cp1250 cp1254".split()
DELIMITERS = ",;\t| "
FIRST_LINE = "put a first line such as time,open,high,low,close,volume"
NO_BAR = "there is no bar to read: check the columns"
MISSING = {"", "-", "--", ".", "null", "none", "nan", "na", "n/a", "n.a.", "#n/a", "nat", r"\n"}
MAX_BAD = 0.05   # share of bad rows, or of rows with the time of another, above which a file is refused
ROUNDING = 1e-6  # a high that lies below the close by so little, relative, was rounded
SPLIT = 1.9      # from this factor between two closes on a word is said: 2 for 1, on a day that moves less than 5 %
UNPACKED, PACKED = 16 * 10**6, 30   # bytes that an archive may hold, or so many times its own size
FOREIGN = {b"PAR1": "Parquet", b"ARROW1": "Feather", b"\x89HDF": "HDF5", b"{": "JSON", b"[": "JSON",
           b"\xd0\xcf\x11\xe0": "Excel"}


class _NoBars(UserError):
    """A file that is empty, or holds nothing but a header."""


def load(paths, order=None) -> list[Bars]:
    """Read bars from CSV files, folders or globs (also in gzip, xz, bz2, zip), or what `python data.py --out` wrote.

    paths: a string or a list of them. Columns are found by name; a time without a zone means UTC. Rows of one symbol in
    several files become one series; of equal times the last read wins. UserError where nothing usable is there.
    order: of days and months where the dates do not tell, "day/month/year", "month/day/year" or "year-month-day".
    """
    found = {}
    for bars in read_files(paths, order):
        found.setdefault(bars.symbol, []).append(bars)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in found.values()]


def _joined(parts):
    """Stretches of one symbol as one series; of equal times the last wins. UserError where their intervals differ."""
    gaps = [np.sort(np.diff(part.time)) for part in parts if len(part) > 2]
    gaps = [int(gap[len(gap) // 10]) for gap in gaps]  # as they come close: holes make gaps longer
    symbol = parts[0].symbol
    if gaps and max(gaps) >= 2 * min(gaps):
        raise UserError(f"{symbol}: bars every {min(gaps):,} s in one file and every {max(gaps):,} s in another; "
                        f"give --data the files of one interval")
    time, ohlcva = np.concatenate([p.time for p in parts]), np.concatenate([p.ohlcva for p in parts])
    order = np.argsort(time, kind="stable")
    time, ohlcva = time[order], ohlcva[order]
    last = np.append(np.diff(time) != 0, True)
    changed = int((~last[:-1] & _differ(ohlcva[:-1].T, ohlcva[1:].T)).sum())
    if changed:
        remark(f"{symbol}: {changed} of {last.sum()} bars differ between files; the last read counts")
    return Bars(symbol, time[last], ohlcva[last])


def _differ(left, right):
    """Which of two rows of bars, [6, T], differ; NaN equals NaN."""
    return ((left != right) & ~(np.isnan(left) & np.isnan(right))).any(0)


def read_files(paths, order=None, unpacked=UNPACKED):
    """Yield Bars file by file, so that a corpus larger than memory can be converted.

    A file that was named must be good. Of others the useless ones are skipped, unless more are bad
    than good. order: see `load`. unpacked: bytes that a packed file may hold.
    """
    files = list(_files(paths))
    symbols = _symbols([path for path, _ in files])
    skipped = []
    for path, named in files:
        try:
            yield from (_open_folder(path) if os.path.isdir(path)
                        else _read_csv(path, symbols[path], order, unpacked))
        except (UserError, csv.Error) as e:
            if isinstance(e, csv.Error):
                e = UserError(f"{path}: not CSV ({e}); look for a quote that is never closed")
            if named:
                raise e
            skipped.append(e)
    bad = [e for e in skipped if not isinstance(e, _NoBars)]
    if len(skipped) == len(files) or len(bad) > len(files) - len(skipped):
        raise (bad or skipped)[0]
    if skipped:
        others = [os.path.basename(str(e).split(": ")[0]) for e in skipped[3:]]
        why = "; ".join([*map(str, skipped[:3]), *(["and " + ", ".join(others)] if others else [])])
        remark(f"{len(skipped)} of {len(files)} files skipped: {why}")


def _files(paths):
    """Yield (path, whether it must be good) of each CSV file and each folder of arrays."""
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.fspath(path)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matches:
            raise UserError(f"{path}: no such file; give --data a CSV file, a folder of them, or a quoted glob")
        for match in matches:
            is_folder = os.path.isdir(match)
            if not is_folder or os.path.exists(os.path.join(match, "symbols.json")):
                yield match, is_folder or match == path
                continue
            names = sorted(n for n in os.listdir(match) if FILES.search(n)[0] and not n.startswith((".", "~$")))
            if not names:
                raise UserError(f"{match}: no CSV file in this folder; put *.csv or *.csv.gz there")
            yield from ((os.path.join(match, name), False) for name in names)


def _symbols(paths):
    """{path: symbol of a file that names none}: its stem, without date and interval if files differ by date alone."""
    date = r"([-_. ](19|20)\d\d([-_.]?[01]\d([-_.]?[0-3]\d)?)?)+$"
    interval = r"[-_. ](\d+(s|m|min|h|d|w|mo)|[mhdw]\d+|mn1|daily|hourly)$"
    stems = {path: FILES.sub("", os.path.basename(path)) or os.path.basename(path) for path in paths}
    undated = {path: re.sub(date, "", stem) for path, stem in stems.items()}
    count = Counter(undated.values())
    for path, name in undated.items():
        if count[name] > 1:
            stems[path] = re.sub(interval, "", name, flags=re.I)
    return {path: printable(stem.strip()) for path, stem in stems.items()}


# -- one file

def _read_csv(path, symbol, order=None, unpacked=UNPACKED):
    table = _table(path, unpacked)
    table.order = order
    return bars_of(table, symbol)


def bars_of(table, symbol):
    """The Bars of one file, a list. symbol: whose they are in a file that names none."""
    tickers = list(dict.fromkeys(filter(None, table.tickers))) or [""]
    parts = {ticker: _columns(table, ticker) for ticker in tickers}
    numbers = {i for columns in parts.values() for column, i in columns.items() if column in COLUMNS}
    words = {i for columns in parts.values() for column, i in columns.items() if column not in COLUMNS}
    free = [i for i, ticker in enumerate(table.tickers) if not ticker and i not in numbers | words]
    dates = [i for name in HEADERS["time"] for i in free if table.fields[i] == name]
    clocks = [i for name in HEADERS["clock"] for i in free if table.fields[i] == name]
    if 0 in free and table.fields[0] == "":
        dates.append(0)  # pandas writes its index without a name
    if not dates:
        raise table.error(table.first, "no column 'time' in the header; give that name to the one it is")

    row = _split("".join(table.lines[table.first:table.first + 1]), table.delimiter)
    halves = [i for i in free if i < len(row) and row[i].strip().lower() in ("am", "pm")]  # of days, beside the clock
    cells, reasons = _cells(table, numbers, words | {*dates, *clocks, *halves})
    if not len(cells[dates[0]]):
        raise _NoBars(f"{table.path}:{table.first + 1}: no rows after the header; {NO_BAR}")
    if len(reasons) == len(cells[dates[0]]):
        raise table.error(table.line(0), f"{reasons[0]}; {NO_BAR}")
    for i in {*dates, *clocks} if halves else ():
        if i not in dates or ":" in cells[i][0]:
            cells[i] = [f"{clock} {half}" for clock, half in zip(cells[i], cells[halves[0]])]
    time, at = _times(table, cells, dates, clocks)
    amounts = {columns.get("amount") for columns in parts.values()}
    values = _numbers(table, {i: cells[i] for i in numbers}, reasons, amounts)
    for row in np.flatnonzero(np.isnan(time)).tolist():
        prices = [values[columns[c]][row] for columns in parts.values() for c in PRICES]
        if not np.isnan(prices).all():
            reasons.setdefault(row, f"{table.names[at] or 'time'} {cells[at][row]!r} is no date")
    series = []
    for ticker, columns in parts.items():
        nothing = np.full(len(time), np.nan)
        ohlcva = np.stack([values.get(columns.get(c), nothing) for c in COLUMNS])         # (6, rows)
        _check_columns(table, columns, cells, ohlcva)
        symbols = _symbol_of_rows(table, columns, cells, time, reasons) if "symbol" in columns else None
        series += _bars(table, [printable(ticker) or symbol] if symbols is None else symbols, time, ohlcva, dict(reasons))
    if not series:
        raise table.error(table.line(0), f"no row has a price; {NO_BAR}")
    return series


# -- bytes -> text

def _text(path, unpacked):
    """What a text file holds, in whatever encoding and container; UserError if it is none."""
    try:
        with open_regular(path) as f:
            raw = f.read()
        most = max(unpacked, PACKED * len(raw))
        for magic, opened in CONTAINERS.items():
            if raw.startswith(magic):
                raw = opened(io.BytesIO(raw)).read(most + 1)
                if len(raw) > most:
                    raise ValueError(f"it unpacks to over {most / 1e6:.0f} MB; if you trust it, say how "
                                     f"many to python data.py --max_unpacked")
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
    names = [name for name in file.namelist() if not name.startswith("__MACOSX/") and not name.endswith("/")]
    if "[Content_Types].xml" in names:
        raise ValueError("it is Excel")
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} files")
    return file.open(names[0])


CONTAINERS = {b"PK\3\4": _unzipped, b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}


def _decoded(raw):
    """UTF-16 by its mark, UTF-8, else the one of a few encodings in which most names of columns are known."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace").rstrip("\0")
    raw = raw.rstrip(b"\0")  # the machine died while it wrote
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")

    def known(text):
        return max(_n_known(map(_fold, re.split(r"[,;\t|]", line))) for line in text[:4000].split("\n"))

    return max((raw.decode(name, "replace") for name in ENCODINGS), key=known)


# -- text -> delimiter, header, columns

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
    order: str | None = None  # of day and month where the dates do not tell, see read_dates
    columns: list | None = None  # what they hold, where no text is behind them
    line_of: list[int] | None = None  # line of each row, from 1; None: rows are the lines that are not empty

    def say(self, text):
        remark(f"{self.path}: {text}")

    def error(self, line, text):
        return UserError(f"{self.path}:{line}: {text}")

    def line(self, row):
        """The line of a row, from 1, for messages."""
        if self.line_of is None:
            self.line_of = [k for k, line in enumerate(self.lines[self.first:], self.first + 1) if line]
        return self.line_of[row]


@functools.lru_cache(10_000)
def _fold(name):
    """A column's name in lower case, letters and digits only, without "1. ", "(USD)", "Price" and a time's "_utc"."""
    name = re.sub(r"(?<=Volume)(?=[A-Z])", " ", name.strip()).lower()
    name = re.sub(r"^\d+[a-z]?\.\s+", "", name)
    if re.match(r"turnover \((pcs|shares)", name):
        return "volume"
    what = re.fullmatch(r"vol(?:ume)?[ _(]+([a-z]{2,})\)?|volume(to|from)", name)
    unit = what and (what[1] or what[2])
    if unit:
        return "volumemoney" if unit in MONEY else "volumecoin" if unit in COINS else re.sub(r"[\W_]", "", name)
    folded = re.sub(r"[\W_]", "", re.sub(r"[(\[].*?[)\]]", "", name)) or re.sub(r"[\W_]", "", name)
    when = re.sub(r"(utc|gmt|iso|ms|ns|millis|unix)$", "", folded)
    if when in HEADERS["time"]:
        return when
    in_money = re.fullmatch(rf"(\w+)price({'|'.join(MONEY)})", folded)      # openPriceUsd
    return in_money[1] if in_money else folded.removeprefix("price").removesuffix("price") or folded


def _n_known(fields):
    """How many of time, open, high, low, close and volume have a column."""
    fields = set(fields)
    return sum(not fields.isdisjoint(HEADERS[column]) for column in ("time", *PRICES, "volume"))


def _split(line, delimiter):
    """The cells of a line, each cut to what a name may have before regular expressions see it."""
    if delimiter == " ":  # or runs of them
        cells = line.replace('"', "").split()
    else:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell[:200] for cell in cells]


def _table(path, unpacked):
    """The lines and columns of a file: its header is what makes most names of columns known, and more than one."""
    lines = _text(path, unpacked).split("\n")
    filled = [k for k, line in enumerate(lines[:200]) if line.strip()][:40]
    if not filled:
        raise _NoBars(f"{path}: the file is empty; it needs a header line and rows of bars")
    if all(len(re.findall(r'(?<!")"(?!")', lines[k].strip())) == 2 for k in filled) and all(
            lines[k].strip()[0] == lines[k].strip()[-1] == '"' for k in filled):  # each line as one cell
        lines = [line.strip()[1:-1].replace('""', '"') for line in lines]
    most, found = 1, None
    for delimiter, k in itertools.product(DELIMITERS, filled):
        named = names_of(_split(lines[k], delimiter))
        known = _n_known(field for field, _ in named) if len(named) > 4 else 0
        if known > most:
            most, found = known, (delimiter, k, named)
        if known > 4:
            break
    if not found:
        return _without_header(path, lines, filled)
    delimiter, at, named = found
    if delimiter == " ":
        lines, delimiter = ["\t".join(_split(line, " ")) for line in lines], "\t"
    cells = [printable(cell.strip()) for cell in _split(lines[at], delimiter)]
    if tuple(cells[:len(FORECAST)]) == FORECAST:
        raise _NoBars(f"{path}:{at + 1}: a forecast of sample.py, which is no history; name the bars")
    if not cells[-1]:  # the rows may have more columns than the header has names
        more = len(_split("".join(lines[at + 1:at + 2]), delimiter)) - len(cells)
        cells, named = cells + [""] * more, named + [("", "")] * more
    fields, tickers = [field for field, _ in named], [ticker for _, ticker in named]
    table = Table(path, lines, delimiter, at + 1, cells, fields, tickers)
    if not any(tickers):
        above, below = [k for k in filled if k < at], [k for k in filled if k > at]
        _find_tickers(table, at, below[:1] + above[-1:])
    return table


def names_of(cells):
    """(field, ticker) of each column of a header: as they stand, or AAPL.Open taken apart."""
    fields = [_fold(cell) for cell in cells]
    named = [(field, "") for field in fields]
    if _n_known(fields) > 2:
        return named
    texts = [cell.strip(" '\"()") for cell in cells]
    parts = [FIELD_FIRST.fullmatch(text) or TICKER_FIRST.fullmatch(text) for text in texts]
    if _n_known(_fold(part["field"]) for part in parts if part) < 4:
        return named
    tickers = {part["ticker"] for part in parts if part}
    for i, (part, field) in enumerate(zip(parts, fields)):
        if part:
            named[i] = (_fold(part["field"]), part["ticker"])
        elif len(tickers) == 1 and field in HEADERS["volume"]:  # A.Open,A.High,A.Low,A.Close,Volume
            named[i] = (field, *tickers)
    return named


def _find_tickers(table, at, nearby):
    """Where one of the lines nearby is a second row of the header, with symbols, as yfinance writes it: note them."""
    for k in nearby:
        corner, *tickers = [cell.strip() for cell in _split(table.lines[k], table.delimiter)]
        if len(tickers) != len(table.names) - 1 or _fold(corner) not in ("", "ticker", "price", "symbol"):
            continue
        of_each = [[f for f, t in zip(table.fields[1:], tickers) if t == ticker] for ticker in set(tickers)]
        if min(map(_n_known, of_each)) < 4:
            continue  # a row of units
        table.tickers, table.first = ["", *tickers], max(at, k) + 1
        table.fields[0] = ""  # the dates, below a name that is none
        third = _split("".join(table.lines[table.first:table.first + 1]), table.delimiter)
        if third and not any(third[1:]):
            table.first += 1  # it names the column of dates
        return


def _without_header(path, lines, filled):
    """Time, open, high, low, close, volume and perhaps one column more, or Binance's twelve; the candles must hold."""
    for delimiter in DELIMITERS:
        first = filled[0]
        if len(filled) > 1 and _split(lines[first], delimiter)[:5] == ["0", "1", "2", "3", "4"]:
            first = filled[1]  # pandas numbered the columns
        cells = [cell.strip() for cell in _split(lines[first], delimiter)]
        fields = ["symbol"] if len(cells) > 6 and re.fullmatch(r"[A-Za-z][\w.=-]*", cells[0]) else []
        at = len(fields)
        fields += ["date", "time"] if len(cells) > at + 6 and ":" in cells[at + 1] else ["time"]
        rest = [cell if delimiter == "," else cell.replace(",", ".") for cell in cells[len(fields):]]
        fields += [*PRICES, "volume", ""][:len(rest)]
        if len(cells) == len(BINANCE):
            fields = list(BINANCE)
        if len(fields) == len(cells) and len(rest) >= 5 and all(map(is_number, rest)):
            tickers = [""] * len(fields)
            return Table(path, lines, delimiter, first, list(fields), fields, tickers, has_header=False)
    for k, delimiter in itertools.product(filled[:3], DELIMITERS):
        if _n_known(map(_fold, _split(lines[k], delimiter))) > 1:
            raise UserError(f"{path}:{k + 1}: the header {lines[k][:60]!r} lacks open, high, low or close; "
                            f"a bar has all four")
    raise UserError(f"{path}:{filled[0] + 1}: no header and no bars in {lines[filled[0]][:60]!r}; {FIRST_LINE}")


def _columns(table, ticker):
    """{column: its index} of one symbol; UserError if a price is missing, or a name is there twice."""
    own = [i for i, t in enumerate(table.tickers) if t == ticker]
    fields = [table.fields[i] for i in own]
    columns = {}
    for column in (*COLUMNS, "symbol", "interval"):
        found = [(name, own[fields.index(name)]) for name in HEADERS[column] if name in fields]
        found = [(name, i) for name, i in found if i not in columns.values()]
        if found:
            name, columns[column] = found[0]
            if fields.count(name) > 1:
                same = " and ".join(repr(table.names[i]) for i, field in zip(own, fields) if field == name)
                raise table.error(table.first, f"{same} in the header are both a {column}; keep one of them")
        elif column in PRICES:
            raise table.error(table.first, f"no column {column!r} in the header; give that name to the one it is")
    return columns


# -- columns -> numbers

def _cells(table, numbers, texts):
    """({index: column}, {row: why it is bad}): columns are float64 where that is quick, else lists of text.

    Without blanks, comments, notes at the end, and headers again where files were put one behind the other.
    """
    if table.columns:
        return {i: table.columns[i] for i in numbers | texts}, {}
    kinds = [(str(i), "f8" if i in numbers else "O" if i in texts else "U1") for i in range(len(table.names))]
    lines = table.lines[table.first:]
    with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")  # of no rows
        got = np.loadtxt(lines, kinds, comments=None, delimiter=table.delimiter, quotechar='"', ndmin=1)
        if len(got) == sum(map(bool, lines)):  # else a quote that was not closed
            return {i: got[str(i)] for i in numbers | texts}, {}
    rows, table.line_of, reasons, n_columns, price = [], [], {}, len(table.names), min(numbers)
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
                is_note = len(filled) == 1 and not fits and (line == n_lines or not is_number(filled[0]))
                if not filled or is_note or filled[0].startswith(("#", "//")):
                    continue
                if fits and _fold(row[price]) == table.fields[price]:
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
APOSTROPHE = re.compile(r"(?<!\d)'|'(?=\d{3}(?!\d))")  # 1'234.50; in 123'16 it stands before 32nds
NUMBER = [re.compile(rf"([-+]?(?:\d{{1,3}}(?:{comma}\d{{2,3}})*{comma}\d{{3}}|\d*)(?:{point}\d*)?(?:e[-+]?\d+)?)"
                     r"([a-z]+\.?|万|亿|)")
          for comma, point in ((",", "\\."), ("\\.", ","))]  # 1,234.50 and 1.234,50
SUFFIX = {"": "", "k": "e3", "m": "e6", "mn": "e6", "mln": "e6", "mio": "e6", "b": "e9", "bn": "e9", "mrd": "e9",
          "t": "e12", "万": "e4", "亿": "e8"}


def _numbers(table, cells, reasons, optional=()):
    """{index: float64}, NaN where a number is missing, or is none: then a reason is added. One format for the file.

    Of the columns `optional` one that holds other things is missing as a whole.
    """
    with contextlib.suppress(ValueError):
        return {i: np.asarray(column, np.float64) for i, column in cells.items()}
    cells = {i: ["nan" if c.strip().lower() in MISSING else c for c in column] for i, column in cells.items()}
    with contextlib.suppress(ValueError):
        return {i: np.array(column, np.float64) for i, column in cells.items()}
    plain = {i: APOSTROPHE.sub("", "\0".join(c).lower().translate(NOISE)).split("\0") for i, c in cells.items()}
    distinct = {c for column in plain.values() for c in column}
    by_point, by_comma = (sum(form.fullmatch(c) is not None for c in distinct) for form in NUMBER)
    few = 0.02 * len(distinct)  # a mistyped cell or two decide nothing
    if table.delimiter != "," and any("," in c for c in distinct):
        few = -few  # "14,300" beside semicolons is 14.3
    comma = by_comma - by_point > few
    values = {"nan": np.nan}
    for text in distinct:
        found = NUMBER[comma].fullmatch(text)
        power = SUFFIX.get(found[2].rstrip(".")) if found else None
        if power is None or not any(map(str.isdigit, text)) or (power and "e" in found[1]):
            continue
        digits = found[1].replace(".", "").replace(",", ".") if comma else found[1].replace(",", "")
        values[text] = float(digits + power)
    for i, column in plain.items():
        bad = [row for row, text in enumerate(column) if text not in values]
        if i in optional and len(bad) > MAX_BAD * len(column):
            table.say(f"{table.names[i]!r} holds {cells[i][bad[0]]!r}, which is not a number; no amount is read")
            plain[i] = ["nan"] * len(column)
            continue
        for row in bad:
            reasons.setdefault(row, f"{table.fields[i]} {cells[i][row]!r} is not a number")
    return {i: np.array([values.get(c, np.nan) for c in column], np.float64) for i, column in plain.items()}


def _times(table, cells, dates, clocks):
    """(UTC seconds of each row, index of the column): of the columns `dates` the most distinct that holds dates.

    Dates without a clock take it from one of the columns `clocks`.
    """
    best, most, why = None, 0, ""
    for i in dates:
        seconds, reason = read_dates(cells[i], table.order)
        good = np.isfinite(seconds)
        distinct = len(np.unique(seconds[good])) if len(dates) > 1 else 1
        if good.mean() < 0.5:
            if not why or "may be" in reason:
                cell = next(filter(None, cells[i]), "")
                why = f"{table.names[i] or 'time'} {cell!r} is no date{reason and ': '}{reason}"
        elif distinct > most or _is_fetched(best, seconds):
            if not most or not _is_fetched(seconds, best):
                best, most, at = seconds, distinct, i
    if not most:
        raise table.error(table.line(0), f"{why}; give dates with their clock, best as 2024-03-04 14:30")
    if (best[np.isfinite(best)] % DAY == 0).all():
        found = (clock_seconds(cells[i]) for i in clocks if i != at)
        best = best + next((clock for clock in found if np.isfinite(clock).mean() > 0.5), 0.0)
    zone = re.search(r"\(([a-z_/]+)\)", table.names[at], re.I)  # "Time (EET)"
    return best - np.nan_to_num(ahead(zone[1], best)) if zone else best, at


def _is_fetched(seconds, other):
    """Whether times are those of a download: all behind the other column's, in a fraction of its span."""
    first, span = np.nanmin(seconds), np.nanmax(seconds) - np.nanmin(seconds)
    return np.nanmax(other) <= first + DAY and np.nanmax(other) - np.nanmin(other) > 10 * span


# -- columns -> bars

def _check_columns(table, columns, cells, ohlcva):
    """Intervals are not mixed, an amount is volume times price, a volume that is not read is named."""
    names = table.names
    _, high, low, close, volume, amount = ohlcva
    intervals = sorted({cell.strip() for cell in cells.get(columns.get("interval"), ())})
    if len(intervals) > 1:
        column = names[columns["interval"]]
        raise table.error(table.first, f"bars of several intervals ({', '.join(intervals[:4])}) in the column "
                                       f"{column!r}; keep one of them a file")
    like_price = ((volume > 0.5 * low) & (volume < 2 * high)).mean() > 0.9
    if like_price and not table.has_header and len(names) != len(BINANCE):
        raise table.error(table.first + 1, f"no header, and the column behind the close looks like a price; {FIRST_LINE}")
    base, least = (volume * close, 1e-4) if "volume" in columns else (np.ones(len(amount)), 1)
    for value in (volume, amount):
        if (value == -1).all():
            value[:] = np.nan  # Interactive Brokers' way to have none
    traded = (amount > 0) & (base > 0)
    ratio = np.median(amount[traded] / base[traded]) if traded.any() else 1
    swapped = np.median(volume[traded] / (amount * close)[traded]) if traded.any() else np.nan
    if 0.5 < swapped < 2 and not 0.25 < ratio < 4:
        ohlcva[4:] = ohlcva[[5, 4]]
        table.say(f"{names[columns['volume']]!r} is {names[columns['amount']]!r} times price: they change places")
    elif not least <= ratio <= 1e6 or (amount < 0).mean() > MAX_BAD:  # lots of 100, money in thousands
        amount[:] = np.nan
        table.say(f"{names[columns['amount']]!r} is not volume times price; no amount is read")
    if "volume" not in columns:
        known = {name for names in HEADERS.values() for name in names}
        others = [repr(name) for name, field in zip(names, table.fields) if name.strip() and field not in known]
        others.sort(key=lambda name: "vol" not in name.lower())
        if others:
            table.say(f"no volume is read, for none of {', '.join(others[:6])} is known to be one; name it volume")


def _symbol_of_rows(table, columns, cells, time, reasons):
    """Array of each row's symbol; None where the column holds none, or a code of the row and not of a symbol."""
    symbols = np.array([cell.strip() for cell in cells[columns["symbol"]]])
    distinct, which = np.unique(symbols, return_inverse=True)
    changes = np.count_nonzero(np.diff(which)) > len(time) // 2 and len(np.unique(time)) == len(time)  # from row to row
    bad = np.array([not symbol or not symbol.isprintable() for symbol in distinct])
    if bad.all() or (changes and table.fields[columns["symbol"]] in ("code", "name")):
        return None
    for row in np.flatnonzero(bad[which]).tolist():
        reasons.setdefault(row, "no symbol, or one with control characters")
    return symbols


def _bars(table, symbols, time, ohlcva, reasons):
    """Bars of each symbol, sorted, without faults. symbols: of each row, or of all.  reasons: {row: what is wrong}."""
    names, code = np.unique(symbols, return_inverse=True)
    code = np.broadcast_to(code, len(time))
    step, same = np.diff(time), code[1:] == code[:-1]
    far = same & (np.abs(step) > 360 * DAY)
    there_and_back = far[:-1] & far[1:] & (np.abs(step[:-1] + step[1:]) < 360 * DAY)  # a mistyped year
    for row in (np.flatnonzero(there_and_back) + 1).tolist():
        reasons.setdefault(row, f"time {iso(time[row])} is a year or more off the rows around it")
    empty = np.isnan(ohlcva[:4]).all(0)  # a row without any price is no bar, and no fault
    empty |= (ohlcva[:3] == 0).all(0) & (ohlcva[3] > 0) & ~(ohlcva[4] > 0)  # so is a day without trade, that repeats the last close
    empty[list(reasons)] = False
    if empty.all():
        return []
    if empty.any() and not any(table.tickers):
        table.say(f"{empty.sum()} of {len(empty)} rows have no price, or no trade: no bars")
    row = np.arange(len(time))
    in_order = np.where(same, step > 0, code[1:] > code[:-1]).all()
    if empty.any() or not in_order:
        row = np.lexsort((time, code))  # stable: of equal times the last stays last
        row = row[~empty[row]]
    time, code, ohlcva = time[row], code[row], ohlcva[:, row]
    _mend(table, ohlcva, code)
    good = _good(table, row, ohlcva, reasons)
    row, time, code, ohlcva = row[good], time[good], code[good], ohlcva[:, good]
    last = _latest(table, names, row, time, code, ohlcva)
    time, code, ohlcva = time[last], code[last], ohlcva[:, last]
    _look_for_jumps(table, names, time, code, ohlcva[3])
    time, ohlcva = time.astype(np.int64), ohlcva.T
    starts = np.flatnonzero(np.append(True, np.diff(code) != 0))
    return [Bars(str(names[code[a]]), time[a:b], ohlcva[a:b]) for a, b in zip(starts, [*starts[1:], len(code)])]


# -- faults

def _mend(table, ohlcva, code):
    """In place: highs and lows inside the body by rounding; an open that is missing or 0 becomes the close before.

    A negative close within the bar is CRSP's mark of a mean of bid and ask: its size counts.
    """
    open_, high, low, close = ohlcva[:4]
    quoted = (low > 0) & (low <= -close) & (-close <= high)
    if quoted.any():
        close[quoted] *= -1
        table.say(f"{quoted.sum()} of {len(quoted)} closes are negative, as means of bid and ask; their size counts")
    lacks = (np.isnan(open_) | (open_ == 0)) & (low > 0) & (low <= close) & (close <= high)
    if lacks.any():
        before = np.append(np.nan, np.where(np.diff(code) == 0, close[:-1], np.nan))
        open_[lacks] = np.clip(np.where(before > 0, before, close), low, high)[lacks]
        table.say(f"{lacks.sum()} of {len(lacks)} rows have no open; the close before stands for it")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    np.copyto(high, top, where=(high < top) & (high >= top * (1 - ROUNDING)))
    np.copyto(low, bottom, where=(low > bottom) & (low <= bottom * (1 + ROUNDING)))


def faults(ohlcva):
    """Yield (which rows, why) for all that can be wrong with a bar; of several the first counts."""
    o, h, l, c, v, a = ohlcva
    bottom, top = np.minimum(o, c), np.maximum(o, c)
    least, most = np.minimum(bottom, np.minimum(h, l)), np.maximum(top, np.maximum(h, l))  # or NaN
    yield np.isnan(least), "a price is missing"
    yield least <= 0, "a price is zero or negative, and has no logarithm"
    yield (least < 1e-30) | (most > 1e30), "a price is not a finite number, or outside of 1e-30 to 1e30"
    yield h < l, "high below low"
    yield h < top, "high below open or close"
    yield l > bottom, "low above open or close"
    yield (v < 0) | (a < 0), "negative volume or amount"
    yield (v > 1e30) | (a > 1e30), "volume or amount above 1e30"


def _good(table, row, ohlcva, reasons):
    """Which bars are good, bool; bad ones are counted, three are named, too many are an error. row: of each bar."""
    bad = np.isin(row, list(reasons))
    for failed, why in faults(ohlcva):
        reasons |= {k: why for k in row[failed & ~bad].tolist()}
        bad |= failed
    n_bad = int(bad.sum())
    if n_bad:
        examples = [f"{table.path}:{table.line(k)}: {reasons[k]}" for k in sorted(row[bad].tolist())[:3]]
        if n_bad > MAX_BAD * len(row):
            remedy = "check the columns" if table.has_header else FIRST_LINE
            raise UserError(f"{examples[0]}; {n_bad} of {len(row)} rows are bad, more than {MAX_BAD:.0%}: {remedy}")
        remark(f"{n_bad} bad row{'s' * (n_bad > 1)} of {len(row)} dropped: {'; '.join(examples)}")
    return ~bad


def _latest(table, names, row, time, code, ohlcva):
    """Which bars are the last of their time and symbol, bool; UserError if that drops many that differ from it."""
    again = np.append((np.diff(time) == 0) & (np.diff(code) == 0), False)
    unlike = again[:-1] & _differ(ohlcva[:, :-1], ohlcva[:, 1:])
    lost, rows = np.bincount(code[:-1][unlike], minlength=len(names)), np.bincount(code, minlength=len(names))
    worst = int(np.argmax(lost / np.maximum(rows, 1)))
    if lost[worst] > MAX_BAD * rows[worst]:
        k = int(np.flatnonzero(unlike & (code[:-1] == worst))[0])
        raise table.error(table.line(row[k + 1]),
                          f"{lost[worst]} of {rows[worst]} rows of {names[worst]} have the time of another, as "
                          f"{iso(time[k])} in line {table.line(row[k])}. Several symbols, contracts, exchanges or "
                          f"intervals in one file? Keep one a file, or name their column symbol. Times rounded by a "
                          f"spreadsheet? Export them in full. Bars within a second? Times are whole seconds here")
    if lost.any():
        table.say(f"{lost.sum()} of {len(row)} rows have the time of a later one and give way to it")
    return ~again


def _look_for_jumps(table, names, time, code, close):
    """A word on closes that move as splits and mixed-up units do."""
    ratio = close[1:] / close[:-1]
    at = np.flatnonzero(((ratio > SPLIT) | (ratio < 1 / SPLIT)) & (np.diff(code) == 0))
    if len(at):
        k = int(at[0])
        factor = max(ratio[k], 1 / ratio[k])
        back = k + 1 in at and abs(np.log(ratio[k] * ratio[k + 1])) < 0.2 * np.log(factor)
        why = " and back: mixed units, or a mistyped price?" if back else ": an unadjusted split?"
        more = f" (and {len(at) - 1 - back} more)" if len(at) > 1 + back else ""
        table.say(f"the close of {names[code[k]]} moves by a factor of {factor:.2f} at {iso(time[k + 1])}{why}{more}")


# -- the memory-mapped form: all times and all bars in a file each, and symbols.json: [[symbol, first row, one past], ...]

ARRAYS = ("bars.time", "<i8", 1), ("bars.ohlcva", "<f8", 6)     # name, type, numbers a bar


def write_folder(series, out):
    """Write Bars as a folder that `load` maps into memory; symbols.json, the seal, comes last. -> (symbols, bars)."""
    seal, rows, is_new = os.path.join(out, "symbols.json"), {}, not os.path.isdir(out)
    try:
        os.makedirs(out, exist_ok=True)
        with sole_writer(seal):
            if os.path.exists(seal):
                raise UserError(f"{out}: holds a data set already; choose another --out or remove it")
            n_bars = _append(series, out, rows)
            if any(len(parts) > 1 for parts in rows.values()):     # a symbol went on in another file: side by side
                parts, rows = rows, {}
                n_bars = _append(_whole(out, parts, n_bars), out, rows)
            if not rows:
                raise UserError(f"{out}: no bars to write")
            with write_atomic(seal, text=True) as f:
                json.dump([[symbol, *parts[0]] for symbol, parts in rows.items()], f)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); choose another --out")
    finally:
        if is_new and not os.path.exists(seal):
            with contextlib.suppress(OSError):  # nothing was written: no empty folder is left
                os.rmdir(out)
    progress("")
    return len(rows), n_bars


def _append(series, out, rows):
    """Write Bars one behind another, and in `rows` {symbol: [(first, one past) of each part]}; returns how many."""
    n_bars = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(write_atomic(os.path.join(out, name))) for name, _, _ in ARRAYS]
        for bars in series:
            if not _is_symbol(bars.symbol):
                raise UserError(f"{bars.symbol[:40]}...: a symbol of over 200 letters; give it a shorter name")
            rows.setdefault(bars.symbol, []).append((n_bars, n_bars + len(bars)))
            n_bars += len(bars)
            for f, array, (_, kind, _) in zip(files, (bars.time, bars.ohlcva), ARRAYS):
                f.write(np.ascontiguousarray(array, kind).data)
            progress(f"{len(rows)} symbols, {n_bars:,} bars")
    return n_bars


def _whole(out, rows, n_bars):
    """Yield each symbol's Bars, its parts put together."""
    time, ohlcva = _mapped(out, n_bars)
    for symbol, parts in rows.items():
        yield _joined([Bars(symbol, time[a:b], ohlcva[a:b]) for a, b in parts])


def _mapped(folder, n_bars):
    """int64 [n_bars] and float64 [n_bars, 6], mapped; ValueError where the files have another length."""
    for name, kind, width in ARRAYS:
        with open_regular(os.path.join(folder, name)) as f:
            if os.fstat(f.fileno()).st_size != 8 * width * n_bars:
                raise ValueError(f"{name} has not the {n_bars:,} bars of symbols.json")
            yield np.memmap(f, kind, "r", shape=(n_bars, width) if width > 1 else n_bars)


def _is_symbol(name):
    return isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()


def _open_folder(folder):
    """The series of a folder, mapped into memory and checked whole: who reads on may trust them."""
    try:
        with open_regular(os.path.join(folder, "symbols.json")) as f:
            listed = json.load(f)
        names, first, end = zip(*listed)
        good = all(map(_is_symbol, names)) and len(set(names)) == len(names) and all(type(b) is int for b in end)
        if not good or [0, *end[:-1]] != list(first) or not all(a < b for a, b in zip(first, end)):
            raise ValueError("symbols.json is no list of different symbols and their rows")
        time, ohlcva = _mapped(folder, end[-1])
        _check_arrays(time, ohlcva, names, np.array(first))
        return [Bars(name, time[a:b], ohlcva[a:b]) for name, a, b in listed]
    except Exception as e:  # numpy and json raise many kinds for a damaged file
        why = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
        raise UserError(f"{folder}: not a whole data set ({why}); write it again with python data.py --out")


def _check_arrays(time, ohlcva, names, first):
    """ValueError for rows that are no bars, or do not rise within a symbol. Reads them once, piece by piece."""
    piece = 1 << 16
    for i in range(0, len(time), piece):
        stamps = np.asarray(time[i:i + piece + 1])  # with the first of the next piece
        beyond = (stamps < -229 * YEAR) | (stamps > 229 * YEAR)
        falls = np.diff(stamps) <= 0
        begins = first[np.searchsorted(first, i + 1):np.searchsorted(first, i + len(falls), "right")]
        falls[begins - i - 1] = False
        broken = faults(np.asarray(ohlcva[i:i + piece]).T)
        for failed, why in ((beyond, "its times are none"), (falls, "its times do not rise"), *broken):
            if failed.any():
                row = i + int(np.argmax(failed))
                which = int(np.searchsorted(first, row, "right")) - 1
                raise ValueError(f"{names[which]}: bar {row - first[which]}: {why}")
