"""The clock: of bars, and of those to come."""
import datetime
import functools
import hashlib
import math
import zoneinfo

import numpy as np
import torch

from backstage.dates import iso
from backstage.script import UserError
from backstage.series import DAY, HOUR, WEEK, YEAR

# what the model reads of stamps
GAPS = 7            # spacings before a bar; their median is its interval
NO_BAR = -2**62     # time stamp of the bars before the first


def calendar(time):
    """UTC seconds int64 [...] -> hour, minute, weekday (0 is Monday), int64 [..., 3].

    No date: symbols of one day move together, so a model that can tell the date learns the days by
    heart.
    """
    return torch.stack((time // 3600 % 24, time // 60 % 60, (time // DAY + 3) % 7), dim=-1)


def gap_bucket(gaps):
    """floor(log2) of the (lower) median of the spacings [..., GAPS] that exist, 1 to 31, or 0:
    [..., 1]."""
    exist = (gaps > 0) & (gaps < -NO_BAR // 2)
    median = gaps.double().masked_fill(~exist, math.nan).nanmedian(-1, keepdim=True).values
    return (median.log2().floor().clamp(max=30) + 1).nan_to_num(0).long()


# Next week is as the last weeks were: that is the whole rule, on the clocks of the zone that the
# market keeps.
# Chicago's clocks change as New York's
MARKET_ZONES = ("UTC", "America/New_York", "Europe/London", "Australia/Sydney")
WEEKS = 5  # that tell when a market is open


def future_times(time, horizon):
    """Stamps of the next bars, int64 [horizon]: the spacing, and the times of the week, that the
    history shows.

    time: int64 [T], UTC seconds, rising. Months keep their day. Summer time is followed where the
    last year saw it begin or end, holidays are not known. A last bar that is still live moves
    nothing. What a history of less than a week has not seen is as its days were, without weekends;
    one bar is taken as daily.
    """
    recent = np.asarray(time[-500:])
    last = int(recent[-1])
    gaps = np.sort(np.diff(recent))
    gap = int(gaps[(len(gaps) - 1) // 2]) if len(gaps) else DAY  # the median
    if gap > 1.5 * DAY:  # on the clocks on which the time of day changes least
        def most_alike(zone):
            return np.bincount((recent + _ahead_of_utc(zone, recent)) % DAY).max()

        zone = max(MARKET_ZONES, key=most_alike)
        local = recent + _ahead_of_utc(zone, recent)
        gap = int(np.sort(np.diff(local))[(len(gaps) - 1) // 2])
        stamps = (_coming_months if gap >= 27 * DAY else _coming_weeks)(local, gap, horizon)
        return stamps - _ahead_of_utc(zone, stamps)

    past = np.asarray(time[np.searchsorted(time, last - (WEEKS + 1) * WEEK):])
    seconds = recent % min(gap, HOUR)
    live = len(recent) > 9 and seconds[-1] not in seconds[-50:-1]
    if live:
        past = past[:-1]
    if len(np.unique(seconds)) > 10 + len(seconds) // 20:  # bars at any second: on a grid instead
        past = np.unique(past // WEEK * WEEK + past % WEEK // gap * gap)
    after = last if live else last + gap // 2  # no bar comes sooner

    zone = _market_zone(time, last)
    local = past + _ahead_of_utc(zone, past)
    local_after = after + int(_ahead_of_utc(zone, np.array([after]))[0])
    stamps = _coming(local, gap, local_after, DAY)
    if len(stamps) <= horizon:
        week = _coming(local, gap, local_after, WEEK)
        n = np.arange(horizon + len(week))  # one week behind the other
        stamps = week[n % len(week)] + n // len(week) * WEEK
    stamps = np.unique(stamps - _ahead_of_utc(zone, stamps))
    return stamps[stamps > after][:horizon]


def _coming(past, gap, after, span):
    """Stamps later than `after`, by `span` at most: those times of the week that a third of the
    last weeks had."""
    found, weeks = past[:0], []
    for back in range(WEEK, WEEKS * WEEK + 1, WEEK):
        borders = np.array([0, span, WEEK]) + after - back
        first, last, end = np.searchsorted(past, borders, side="right")
        if end > first:  # a week with a bar
            found, weeks = np.append(found, past[first:last] + back), [*weeks, back]
    stamps, count = np.unique(found, return_counts=True)
    possible = np.sum([stamps - back >= past[0] for back in weeks], axis=0)
    stamps = stamps[3 * count >= possible]

    unseen = past[0] + WEEK  # up to here nothing was seen
    if unseen > after:
        if past[-1] - past[0] < DAY:
            more = past[-1] + gap * np.arange(1, WEEK // gap + 1)
        else:
            clocks = np.unique(past[past > past[-1] - WEEK] % DAY)
            more = (after // DAY * DAY + DAY * np.arange(8)[:, None] + clocks).ravel()
        if 5 not in (past // DAY + 3) % 7:  # no Saturday
            more = more[(more // DAY + 3) % 7 < 5]
        stamps = np.union1d(stamps, more[(more > after) & (more <= after + span) & (more < unseen)])
    if not len(stamps) and span == WEEK:
        return past[-1] + gap * np.arange(1, WEEK // gap + 2)
    return stamps


def _market_zone(time, last):
    """The zone on whose clocks each week was most like the one before it, around the last changes
    of the zones' clocks.

    UTC where none is better.
    """
    weeks, near = last - WEEK * np.arange(53, -1, -1), [np.empty(0, np.int64)]
    for zone in MARKET_ZONES:
        changes = weeks[1:][np.diff(_ahead_of_utc(zone, weeks)) != 0]
        if len(changes):
            first, end = np.searchsorted(time, [changes[-1] - 4 * WEEK, changes[-1] + 3 * WEEK])
            quarter = np.asarray(time[first:end]) // 900
            near.append(900 * quarter[np.diff(quarter, prepend=-1) != 0])
    quarters = np.unique(np.concatenate(near))
    if not len(quarters):
        return "UTC"

    def unlike(zone):
        local = quarters + _ahead_of_utc(zone, quarters)
        came, expected = local[local >= local[0] + WEEK], local + WEEK
        return len(np.setxor1d(came, expected[expected <= local[-1]]))

    return min(MARKET_ZONES, key=unlike)


def _ahead_of_utc(zone, time):
    """Seconds that the clocks of a zone are ahead of UTC at noon of the days of time, int64 [T]."""
    if zone == "UTC":
        return np.zeros(len(time), np.int64)
    days, which = np.unique(time // DAY, return_inverse=True)
    return np.array([_ahead_on(zone, int(day)) for day in days])[which]


@functools.cache
def _ahead_on(zone, day):
    try:
        noon = datetime.datetime.fromtimestamp(day * DAY + DAY // 2, zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, OverflowError, OSError, ValueError):
        return 0  # a system without zones, or far years
    return int(noon.utcoffset().total_seconds())


def _coming_weeks(recent, gap, horizon):
    """Where a holiday or a live bar moved the last bar off the usual day, from that day on."""
    last = int(recent[-1])
    phases, counts = np.unique(recent % gap, return_counts=True)
    late = (last - int(phases[counts.argmax()])) % gap
    start = last - late if HOUR < late < gap - HOUR else last
    return start + gap * np.arange(1, horizon + 1)


def _coming_months(recent, gap, horizon):
    """Months, quarters, years to come: the same day, or the last of each month, or their first or
    last business day.

    A live bar's day does not count.
    """
    month = recent.astype("datetime64[s]").astype("datetime64[M]")
    # seconds from the month's start, to its end
    since, left = recent - _begin(month), _begin(month + 1) - recent
    live = len(recent) > 3 and since[-1] not in since[:-1] and left[-1] not in left[:-1]
    last = -2 if live else -1
    months = month[last] + np.arange(1, horizon + 3) * max(1, round(gap / (YEAR / 12)))
    days = recent[:len(recent) + last + 1] // DAY
    for business_day in (_last_business_day, _first_business_day):
        off = days - business_day(month[:len(days)]).astype(np.int64)  # a holiday moves some
        of_calendar = (left[:len(days)] <= DAY).all() or (since[:len(days)] < DAY).all()
        of_weekdays = len(days) > 5 and ((days + 3) % 7 < 5).all()
        if of_weekdays and not of_calendar and (off == 0).mean() > 0.8:
            stamps = business_day(months).astype(np.int64) * DAY + recent[last] % DAY
            return stamps[stamps > recent[-1]][:horizon]
    if left[last] <= DAY:  # the last day
        stamps = _begin(months + 1) - left[last]
    else:                  # or that one where the month is too short
        last_day = _begin(months + 1) - DAY
        stamps = np.minimum(_begin(months) + since[last], last_day + since[last] % DAY)
    return stamps[stamps > recent[-1]][:horizon]


def _last_business_day(months):
    return np.busday_offset((months + 1).astype("datetime64[D]"), -1, roll="forward")


def _first_business_day(months):
    return np.busday_offset(months.astype("datetime64[D]"), 0, roll="forward")


def _begin(months):
    return months.astype("datetime64[s]").astype(np.int64)


def times_ahead(origins, horizon, times):
    """Stamps of the bars to come, int64 [n, horizon]: those given, else by the clock of each
    history."""
    if times is None:
        coming = {}     # of each series of stamps, which many symbols share
        keys = [hashlib.sha256(np.ascontiguousarray(o.time)).digest() for o in origins]
        for key, o in zip(keys, origins):
            if key not in coming:
                coming[key] = future_times(o.time, horizon)
        times = [coming[key] for key in keys]
        return np.array(times, np.int64).reshape(len(origins), horizon)
    times = np.asarray(times, np.int64)
    if times.shape not in ((horizon,), (len(origins), horizon)):
        raise UserError(f"times: an array of shape {times.shape} for {horizon} bars; give one "
                        f"stamp for each bar ahead")
    times = np.broadcast_to(times, (len(origins), horizon))
    for o, row in zip(origins, times):
        if (np.diff(row, prepend=o.time[-1]) <= 0).any():
            raise UserError(f"times: {o.symbol} ends at {iso(o.time[-1])}; the stamps must rise "
                            f"from there on")
    return times
