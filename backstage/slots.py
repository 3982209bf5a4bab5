"""The hours of a market: how much wider its bars are at one time of the day or week than at another.

An open is five times a lunch. Each bar has a slot in the day, its time of day in steps of the bar,
and one in the week, its hour; of daily bars the weekday is the only one. With y_dk the log of a
positive series on day d in slot k, or its mean there, the factor of the slot is exp(L_k),

    x_dk = y_dk - mean_k(y_dk - L_k)      what day d showed of slot k, less the level of the day
    S_k = sum_d b^(age of d) x_dk,        W_k = sum_d b^(age of d),           b = 0.5^(1/15)
    L_k = S_k / (W_k + r)                 over the days before that of the last bar

r is how many days of factor 1 count beside: the variance of x_k about L_k, over that of L among the
slots (James and Stein 1961); infinite where the slots differ no more than by chance. Factors of the
week are made alike, of weeks in place of days, from what those of the day leave. Summer time moves
an exchange's hours: an opening an hour sooner or later than the last moves all slots.
"""
import numpy as np

from backstage.clock import future_times
from backstage.series import CONTEXT, DAY, HOUR, WEEK

SLOT_HALF_LIFE = 15  # days (weeks) after which what a day (a week) showed of its slots counts half
SLOT_SECONDS = 60    # least width of a slot
SURE = 3             # slots differ by so many standard errors more than by chance, or have factor 1


class Slots:
    """How much larger than usual series are at a time of the day and of the week, known before.

    time: int64 [T]; y: float64 [k, T], logs of k positive series, NaN where a bar has none;
    levels: 0: no factors, 1: of the day (of daily bars the week), 2: also of the week.
    log_factors [T, k]: of each bar, 0 for the first CONTEXT bars.
    """

    def __init__(self, time, y, levels=2):
        self.levels, self.log_factors = [], np.zeros(y.T.shape)
        first = time[0] if len(time) else 0
        self.time, (self.shift, self.opened) = time, summer_time(time, first, first)
        local = time - self.shift
        # of the first bars alone: no later bar may change it
        step = int(np.median(np.diff(time[:CONTEXT]))) if len(time) >= CONTEXT else WEEK
        spans = [(DAY, max(step, SLOT_SECONDS)), (WEEK, HOUR)] if step < DAY else [(WEEK, DAY)]
        for period, width in spans[:levels] if step < 2 * DAY else ():
            row = np.cumsum(np.diff(local // period, prepend=local[0] // period) != 0)  # [T], day
            slot = local % period // width
            used = np.bincount(slot) > 0
            slots, column = np.flatnonzero(used), (np.cumsum(used) - 1)[slot]         # [K], [T]
            cell = row * len(slots) + column
            table = _slot_table(y - self.log_factors.T, cell, row[-1] + 1, len(slots))
            self.levels.append((period, width, slots, row, table))
            self.log_factors[CONTEXT:] += table[row[CONTEXT - 1:-1], :, column[CONTEXT:]]

    def coming(self, row, stamps):
        """Log factors [H, k] of bars at stamps int64 [H], as known after bar `row`.

        They are 0 at a time that the bars have never had.
        """
        log_factors = np.zeros((len(stamps), self.log_factors.shape[1]))
        moved, _ = summer_time(stamps, self.time[row], self.opened[row])
        local = stamps - self.shift[row] - moved
        for period, width, slots, rows, table in self.levels if row + 1 >= CONTEXT else ():
            slot = local % period // width
            column = np.searchsorted(slots, slot).clip(max=len(slots) - 1)
            log_factors += table[rows[row], :, column] * (slots[column] == slot)[:, None]
        return log_factors

    def next(self, time, horizon):
        """`coming` for the bars after those at time [T], the first of the series, by their
        clock."""
        row = len(time) - 1
        if not any(table[rows[row]].any() for *_, rows, table in self.levels):
            return np.zeros((horizon, self.log_factors.shape[1]))
        return self.coming(row, future_times(time, horizon))


def summer_time(time, last, opened):
    """Seconds by which the market's day has moved at stamps time [T], int64 [T], and the stamp of
    the last opening, int64 [T].

    An opening is a bar after half a day without any; last, opened: the stamps of the bar and of
    the opening before time[0].
    """
    opens = np.diff(time, prepend=last) >= DAY // 2
    openings, n_opened = np.append(opened, time[opens]), np.cumsum(opens)
    later = (np.diff(openings, prepend=opened) + DAY // 2) % DAY - DAY // 2
    shift = np.cumsum(np.where(np.abs(later) == HOUR, later, 0))
    return shift[n_opened], openings[n_opened]


def _slot_table(y, cell, n_days, n_slots):
    """L as known before each day, [days, k, slots], of y [k, T], bar t in cell day * slots +
    slot."""
    cells = np.empty((n_days, 2, len(y), n_slots))  # the mean of y, 0 if it has none; 1, 0 if none
    for i, values in enumerate(y):
        known = ~np.isnan(values)
        counts = np.bincount(cell, known, n_days * n_slots).reshape(n_days, n_slots)
        sums = np.bincount(cell, np.where(known, values, 0.0), counts.size).reshape(counts.shape)
        cells[:, 0, i], cells[:, 1, i] = sums / np.maximum(counts, 1), counts > 0
    n_seen = cells[:, 1].sum(-1)                                                # [days, k]
    n_ever = np.maximum.accumulate(cells[:, 1]).sum(-1)
    by_chance = n_ever + SURE * np.sqrt(2 * n_ever)  # most of sum_k S^2 / W, in units of the error
    # Sums over slots by cumsum, in turn: the 0 of a slot that only later bars have changes no bit
    n, mean = np.maximum(n_seen, 1), cells[:, 0].cumsum(-1)[..., -1]
    mean /= n

    table, b = np.zeros((n_days, len(y), n_slots)), 0.5 ** (1 / SLOT_HALF_LIFE)
    sums, squares = np.zeros((2, 2, len(y), n_slots))
    S, W = sums
    error, age, weight = np.zeros(len(y)), 0.0, 1e-9
    for d in range(n_days - 1):
        x, seen = cells[d]
        L = table[d] * seen
        x -= (mean[d] - L.cumsum(-1)[:, -1] / n[d])[:, None] * seen
        sums *= b
        sums += cells[d]
        squares[:] = np.square(x - L), S * S / np.maximum(W, 1e-9)
        missed, signal = squares.cumsum(-1)[..., -1]                            # [k] each
        error, age, weight = b * error + missed / n[d], b * age + 1, b * weight + n_seen[d]
        noise = error / age
        variance = np.maximum((signal - noise * n_ever[d]) / weight, 1e-9)
        r = np.where(signal > noise * by_chance[d], np.maximum(noise / variance, 0.5), np.inf)
        np.divide(S, W + r[:, None], out=table[d + 1])
    return table
