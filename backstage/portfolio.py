"""Paths of many symbols together: a portfolio of equal weights and spreads of pairs, scored.

At common stamps ("dates") the paths of n symbols begin. From the log returns r of each since then

    portfolio = log mean exp(r)         what equal shares, held, have gained
    spread    = r_a - r_b               of neighbours a, b in the list of symbols

Both have scores as a symbol's paths have. `apart` are the same paths of each symbol, but path i of
one no longer belongs to path i of another: what independent draws would say.
"""
from types import SimpleNamespace

import numpy as np

from backstage.scores import (
    MAX_BLOCKS, MIN_BLOCKS, at_step, bootstrap, path_sums, resampled, score_paths, scored, versus)

MOST, FEWEST = 100, 5  # symbols of a portfolio
PLACES = 1000          # origins of all its symbols together, by default, if intervals let them
SCORES = ("crps", "coverage90", "var95_hits", "es95_ratio")


class Together:
    """Where paths of many symbols begin at once.

    Of J places, date by date: symbol, bar (the last one known), date. moves [J, H]: the log returns
    that came; start [D]: each date's first place. portfolio, spreads: what is scored, see kind.
    """

    def __init__(self, t, stride=None):
        """t: Targets. stride: bars between dates (default: the horizon, or more)."""
        n, H = len(t.series), t.horizon
        chosen = np.unique(np.linspace(0, n - 1, min(n, MOST)).round().astype(int))
        times = [t.series[i].time[slice(*t.ranges[i])] for i in chosen]
        stamps, count = np.unique(np.concatenate(times), return_counts=True)
        stamps = stamps[count >= FEWEST]
        stride = stride or max(H, min(len(stamps) * len(chosen) // PLACES,
                                      len(stamps) // MIN_BLOCKS))
        groups = [largest_group(t, chosen, stamp) for stamp in stamps[:len(stamps) - H + 1:stride]]
        groups = [group for group in groups if len(group) >= FEWEST]
        self.n_dates, self.n_symbols = len(groups), max(map(len, groups), default=0)
        if not groups:
            return
        self.symbol, self.bar = np.concatenate(groups).T                        # (J,) each
        self.date = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.start = np.searchsorted(self.date, np.arange(len(groups)))
        self.moves = np.stack([t.returns[i][o + 1:o + 1 + H]
                               for i, o in zip(self.symbol, self.bar)])         # (J, H)
        self.n_blocks = max(1, min(len(stamps) // H, len(groups), MAX_BLOCKS))
        self.random = np.random.default_rng([t.seed, 4])
        self.weights = resampled(self.n_blocks, self.random)
        self.portfolio, self.spreads = self.kind(self.hold), self.kind(self.differ)

    def kind(self, combine):
        """What path_sums and bootstrap ask of targets, of combinations of symbols."""
        value, date = combine(self.moves[:, None].cumsum(-1))                   # (m, 1, H), (m,)
        moves = np.diff(value[:, 0], prepend=0.0)                               # (m, H)
        return SimpleNamespace(
            combine=combine, path_r=value[:, 0], path_rv=np.sqrt((moves**2).sum(1)),
            usual=np.full(len(value), np.nan), horizon=moves.shape[1],
            path_time_block=date * self.n_blocks // self.n_dates, n_path_blocks=self.n_blocks,
            path_weights=self.weights)

    def hold(self, r):
        """Portfolios [D, K, H] of log returns r [J, K, H] since the origins, and their dates."""
        count = np.bincount(self.date)[:, None, None]
        return np.log(np.add.reduceat(np.exp(r), self.start) / count), np.arange(self.n_dates)

    def differ(self, r):
        """Spreads [m, K, H] of neighbours, each symbol in one, and their dates."""
        place = np.arange(len(self.date)) - self.start[self.date]
        first = np.flatnonzero((place % 2 == 0) & (np.diff(self.date, append=-1) == 0))
        return r[first] - r[first + 1], self.date[first]

    def apart(self, moves):
        """Paths moves [J, K, H] of which each symbol's have an order of their own, by halves."""
        order, half = self.random.random(moves.shape[:2]), moves.shape[1] // 2
        order[:, half:] += 1.0  # the halves are independent, and stay so
        return np.take_along_axis(moves, order.argsort(1)[..., None], 1)

    def replicates(self, moves):
        """{score: (value, replicates)} of paths moves [J, K, H], log returns of each bar."""
        found = {}
        for name, kind in (("", self.portfolio), ("spread_", self.spreads)):
            value, _ = kind.combine(moves.cumsum(-1))
            paths = np.diff(value, axis=-1, prepend=0.0)
            both = bootstrap(path_sums(score_paths(paths, kind, slice(None)), kind), kind)
            both = {metric.removeprefix("path_"): at_step(both, metric, -1) for metric in both}
            found |= {name + metric: both[metric] for metric in SCORES}
        return found

    def score(self, forecasts):
        """{name: scores} of forecasts {name: moves [J, K, H]}, each beside its own symbols apart
        and all others."""
        both = {name: (self.replicates(moves), self.replicates(self.apart(moves)))
                for name, moves in forecasts.items()}
        found = {}
        for name, (own, apart) in both.items():
            others = {"apart": apart} | {b: both[b][0] for b in both if b != name}
            ratio = {b: {metric: versus(own[metric], other[metric], self.n_blocks, as_ratio=True)
                         for metric in ("crps", "spread_crps")} for b, other in others.items()}
            found[name] = dict(symbols=self.n_symbols, origins=self.n_dates, blocks=self.n_blocks,
                               **self.scored(own), apart=self.scored(apart), ratio=ratio)
        return found

    def scored(self, replicates):
        return {metric: scored(*both, self.n_blocks) for metric, both in replicates.items()}


def largest_group(t, chosen, stamp):
    """Rows (symbol, last known bar) of those of the chosen symbols whose next H bars, the first at
    `stamp`, are at the same stamps; of several such groups the largest."""
    groups = {}
    for i in chosen:
        time, (first, last) = t.series[i].time, t.ranges[i]
        o = int(np.searchsorted(time, stamp)) - 1
        if o + 1 >= first and o + t.horizon < last and time[o + 1] == stamp:
            stamps = time[o:o + 1 + t.horizon].tobytes()
            groups.setdefault(stamps, []).append((i, o))
    return max(groups.values(), key=len, default=[])
