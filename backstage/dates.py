"""Dates as people write them -> UTC seconds. What can be read in two ways is refused, never
guessed."""
import contextlib
import datetime
import re
import time
import warnings
import zoneinfo

import numpy as np

from backstage.series import DAY, YEAR


def iso(seconds):
    """UTC seconds as text: a date, with the time of day where it has one; of any year."""
    day, clock = str(np.datetime64(int(seconds), "s")).split("T")
    return day if int(seconds) % DAY == 0 else f"{day} {clock[:5]}"


# -- texts -> UTC seconds

STAMP = re.compile(r"""(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,?\s+)?
    (?P<date>\d{8}|\d\d?[a-z]{3}\d{4}|\w{1,9}[-/.\s年년]\s*\w{1,9}\.?,?(?:[-/.\s月월]\s*\d{1,4}[日일]?)?)
    (?:(?:[T\s,;]\s*|(?<=\d{8})-(?=\d\d:))
       (?P<clock>\d\d?(?:[:.h]?\d\d){0,2}(?:[.,]\d+)?(?:[\s-]*[ap]\.?m\b\.?)?))?
    \s*(?P<zone>(?:[a-z]+(?:/[a-z_/+-]+)?)?(?:[+-]\d\d(?::?\d\d)?)?)(?:\[[\w/]+\])?""", re.X | re.I)
CLOCK = re.compile(r"(\d\d?)(?:[:.h](\d\d)(?:[:.](\d\d)(?:[.,]\d+)?)?)?[\s-]*([ap])?\.?m?\.?", re.I)
DATES = {  # order -> formats, with - for whatever stands between
    "year-month-day": ("%Y-%m-%d", "%Y%m%d", "%Y-%m", "%Y-%b-%d", "%y-%m-%d"),
    "day/month/year": ("%d-%m-%Y", "%d-%b-%Y", "%d-%B-%Y", "%d%b%Y", "%d-%m-%y", "%d-%b-%y"),
    "month/day/year": ("%m-%d-%Y", "%b-%d-%Y", "%B-%d-%Y", "%m-%d-%y")}
DIGITS = {  # numbers that spell a date -> format of the day, digits of the clock behind it
    "YYYYMM": ("%Y%m", 0), "YYMMDD": ("%y%m%d", 0), "YYYYMMDD": ("%Y%m%d", 0),
    "YYYYMMDDHH": ("%Y%m%d", 2), "YYMMDDHHMM": ("%y%m%d", 4), "YYYYMMDDHHMM": ("%Y%m%d", 4),
    "YYYYMMDDHHMMSS": ("%Y%m%d", 6), "YYYYMMDDHHMMSSmmm": ("%Y%m%d", 9)}


def parse_time(text):
    """One time stamp as UTC seconds (float; NaN if it is none, may be two, or lies past 2199).
    Naive means UTC.

    ISO 8601 and the other forms of `read_dates`; of numbers YYYYMMDD[HHMM[SS]] and epochs from 1973
    up to now.
    """
    return float(read_dates([str(text)])[0][0])


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def read_dates(cells, order=None):
    """(UTC seconds, NaN where a cell is no date; why none is, or ""), in one form for all cells.

    A text is a day, a clock and a zone; each day is read once, in the order that fits most of them;
    where two do, consecutive weekdays decide, or `order`, one of DATES.
    """
    with contextlib.suppress(ValueError):
        return _dates_of_numbers(np.array(cells, np.float64))
    plain = _plain_iso(np.array(cells, str))
    if plain is not None:
        return plain, ""
    # '1/1 and ="1/1" are texts
    texts, which = np.unique([cell.strip(" '=\"") for cell in cells], return_inverse=True)
    if is_number(texts[-1]) or is_number(texts[len(texts) // 2]):
        numbers = np.array([float(text) if is_number(text) else np.nan for text in texts])
        seconds, why = _dates_of_numbers(numbers)
        return seconds[which], why
    plain = _plain_iso(texts)
    if plain is not None:
        return plain[which], ""
    found = [STAMP.fullmatch(text) for text in texts.tolist()]
    dates, clocks, zones = zip(*[match.groups("") if match else ("", "", "") for match in found])
    days, day_of = np.unique(dates, return_inverse=True)
    # Taiwan's
    days = [re.sub(r"^1\d\d(?=[/年])", lambda year: str(1911 + int(year[0])), day) for day in days]
    days = [re.sub(r"[/.,\s年月日년월일-]+", "-", day).strip("-") for day in days]
    readings = {name: np.array([_day(day, formats) for day in days])
                for name, formats in DATES.items()}
    if "." in dates[-1]:
        order = "day/month/year"  # dots: never m.d.y
    order = order or _weekdays(readings, is_intraday=len(texts) > 2 * len(days))
    seconds, why = _told_apart(readings, order)
    seconds = seconds[day_of] + clock_seconds([clock or "00:00" for clock in clocks])
    for zone in set(zones) - {""}:
        rows = np.array([z == zone for z in zones])
        seconds[rows] -= ahead(zone, seconds[rows])
    return seconds[which], why


def _plain_iso(texts):
    """UTC seconds of texts [T] that are all plain ISO 8601, in no time; else None."""
    if texts.dtype.itemsize <= 16 or not texts.size:
        return None
    letters = texts[:, None].view("U1")                                           # (T, width)
    if not ((letters[:, 0] >= "0") & (letters[:, 0] <= "9") & (letters[:, 4] != "")).all():
        return None
    with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")  # of zones
        seconds = texts.astype("datetime64[s]").astype(np.float64)
        if (np.abs(seconds) < 200 * YEAR).all():
            return seconds
    return None


def _weekdays(readings, is_intraday):
    """Of days and months that may change places the order that makes them weekdays in a row, or
    None.

    It makes four or more; the other a day a month, of which one falls on a weekend, unless bars
    are of minutes.
    """
    orders, in_a_row, unlikely = ("day/month/year", "month/day/year"), [], []
    for order in orders:
        days = np.unique(readings[order] // DAY)
        if not np.isfinite(days).all():
            return None
        at_weekend = ((days + 3) % 7 > 4).any()
        in_a_row.append(len(days) > 3 and (np.diff(days) <= 4).all() and not at_weekend)
        unlikely.append(at_weekend or is_intraday)
    first, second = in_a_row
    return orders[int(second)] if first != second and unlikely[int(first)] else None


def _day(text, formats):
    """UTC seconds of a date; NaN if it has none of the formats."""
    for form in formats:
        with contextlib.suppress(ValueError):
            day = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
            is_future = day.timestamp() > time.time() + 2 * DAY
            # 31/01/20 is no day of 2031
            if 1770 <= day.year < 2200 and not ("%y" in form and is_future):
                return day.timestamp()
    return np.nan


def clock_seconds(cells):
    """Seconds of the day of texts such as 9:05, 02:30 PM, 143000, 930 or 14; NaN where a cell is no
    clock."""
    cells = [cell.strip().removesuffix(".0") for cell in cells]
    texts, which = np.unique(cells, return_inverse=True)
    values = np.array([float(text) if text.isdecimal() else np.nan for text in texts])
    if np.isfinite(values[which]).mean() > 0.5:
        numbers = sorted((v, len(text)) for v, text in zip(values, texts) if np.isfinite(v))
        # not the largest, which may be mistyped
        top, width = numbers[int(0.95 * (len(numbers) - 1))]
        if top <= 24 and width <= 2:  # hours
            values *= 10000
        elif top <= 2400 and width <= 4:
            values *= 100
        elif top > 240000:  # with milliseconds
            values //= 1000
        return _of_hhmmss(values)[which]
    for k, found in enumerate(map(CLOCK.fullmatch, texts)):
        if found:
            hour, half = int(found[1]), (found[4] or "").lower()
            if half:  # 12 am is 0, 12 pm is 12
                hour = hour % 12 + 12 * (half == "p") if 1 <= hour <= 12 else 99
            values[k] = hour * 10000 + int(found[2] or 0) * 100 + int(found[3] or 0)
    return _of_hhmmss(values)[which]


def _of_hhmmss(values):
    hour, minute, second = values // 10000, values // 100 % 100, values % 100
    # with leap seconds
    fits = (hour * 60 + minute <= 1440) & (minute < 60) & (second < 60 + (minute == 59))
    return np.where(fits, hour * 3600 + minute * 60 + second, np.nan)


def ahead(zone, seconds):
    """Seconds that a zone's clocks are ahead of UTC: Z, +01:00, GMT+0100, US/Eastern; NaN if it is
    unknown."""
    offset = re.fullmatch(r"(?:z|utc|gmt)?(?:([+-])(\d\d):?(\d\d)?)?", zone, re.I)
    if offset:
        size = int(offset[2] or 0) * 3600 + int(offset[3] or 0) * 60
        return -size if offset[1] == "-" else size
    try:
        zone = zoneinfo.ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        return np.nan
    def offset_at(second):
        when = datetime.datetime.fromtimestamp(second, datetime.UTC).replace(tzinfo=zone)
        return when.utcoffset().total_seconds()

    return np.array([offset_at(second) if np.isfinite(second) else np.nan for second in seconds])


def _dates_of_numbers(values):
    """Numbers that spell a date, or an epoch in one unit; never a clock, a row's number, a serial
    number or a year."""
    sample = values[::max(1, len(values) // 50)]
    if all(((values > low) & (values < 5 * low)).mean() > 0.05 for low in (9e8, 9e11)):
        return values * np.nan, "some rows count seconds and others milliseconds"
    readings = {name: _spelled(values, *form) for name, form in DIGITS.items()
                if np.isfinite(_spelled(sample, *form)).mean() > 0.5}
    epoch = _epoch(values)
    if len(np.unique(sample)) < 3 and np.isfinite(epoch).all():
        readings.pop("YYMMDDHHMM", None)  # as one or two epochs may by chance, three don't
    seconds, why = _told_apart(readings or {"an epoch": epoch})
    if not np.isfinite(seconds).any():
        why = why or "it is a clock, a count, a year, a spreadsheet's number, or lies in the future"
    return seconds, why


def _spelled(values, form, n_clock):
    """UTC seconds of numbers such as 20240304143000."""
    day, clock = np.divmod(np.where(np.abs(values) < 1e18, values, np.nan), 10.0 ** n_clock)
    days, which = np.unique(day, return_inverse=True)
    texts = [f"{d:.0f}" for d in days]
    width = 8 if form == "%Y%m%d" else 6
    seconds = [_day(text, [form]) if len(text) == width else np.nan for text in texts]
    seconds = np.array(seconds)[which] + _of_hhmmss(np.floor(clock * 10.0 ** (6 - n_clock)))
    return np.where(seconds < time.time() + 2 * DAY, seconds, np.nan)


def _epoch(values):
    """Seconds of an epoch in s, ms, us or ns, one for all (but Binance went from ms to us); NaN
    from tomorrow on."""
    sample = np.abs(values[::max(1, len(values) // 1000)])
    sample = sample[sample < 1e19]
    if not len(sample):
        return values * np.nan
    if 1e12 < sample.min() < 1e13 and 1e15 < sample.max() < 1e16:
        values, sample = (np.where(x >= 1e15, x / 1e3, x) for x in (values, sample))
    size = np.quantile(sample, 0.95, method="lower")  # not the largest, which may be mistyped
    now = time.time() + 2 * DAY
    unit = next((unit for unit in (1, 1e3, 1e6, 1e9) if size / unit < now), np.nan)
    # 100 ns from year 1, or from 1601
    is_windows = 6.2e17 < size < 6.5e17 or 1.2e17 < size < 1.36e17
    is_1970 = unit == 1 and (sample % (1000 * DAY) == 0).mean() > 0.9  # its days in ms
    if is_windows or is_1970 or size / unit < 1e8:  # before 1973 a number may be anything
        return values * np.nan
    seconds = np.floor(values / unit)
    return np.where((seconds < now) & (seconds > -200 * YEAR), seconds, np.nan)


def _told_apart(readings, prefer=None):
    """(seconds by the reading that fits most cells, why or ""); all NaN where two fit as many and
    differ."""
    fits = {name: int(np.isfinite(seconds).sum()) for name, seconds in readings.items()}
    name, *others = [name for name in readings if fits[name] == max(fits.values())]
    for other in others:
        differ = (readings[name] != readings[other]) & np.isfinite(readings[name])
        if differ.any() and prefer in (name, other):
            name = prefer
        elif differ.any():
            k = np.argmax(differ)
            both = [f"{iso(seconds[k]) if np.isfinite(seconds[k]) else 'none'} ({order})"
                    for order, seconds in ((name, readings[name]), (other, readings[other]))]
            return readings[name] * np.nan, (f"it may be {' or '.join(both)}, as may all others "
                                             f"here; say which by python data.py --order")
    return readings[name], ""
