"""Numbers that paths are drawn by: evenly spread for each symbol, moving together over symbols."""
import numpy as np
import torch

COMMON = 500         # last bars from which the correlation of symbols is known
FEWEST = 20          # common bars without which a pair has the mean correlation
HALF_PAST = 125      # bars back that count half in it
EIGEN = 1000         # symbols of which all eigenvalues are quickly found


def stratified(random, paths, horizon):
    """Uniform numbers float32 [paths, horizon, 2] for one origin: two halves, independent of each
    other.

    Each is a Latin hypercube (McKay, Beckman and Conover, Technometrics 1979): a path is a fair
    draw of the model, but at each step a half's n paths fall one into each n-th of the
    distribution, so that means and shares vary less.
    """
    halves = []
    for n in (paths // 2, paths - paths // 2):
        rows = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None], (n, 2 * horizon))
        rows = random.permuted(rows, axis=0)  # each column in an order of its own
        halves.append((rows + random.random(rows.shape, np.float32)) / max(n, 1))
    return np.concatenate(halves).reshape(paths, horizon, 2)


# Paths that move together. At each step the pairs of numbers that bars are drawn by keep their
# values and change their order, to that of a Gaussian copula (Iman and Conover, Communications in
# Statistics 1982):
#
#     Z ~ N(0, R),    u_i <- sorted(u_i)[rank of Z_i]
#     R = w C + (1 - w) mean C,    w = t^2 / (t^2 + e^2)
#
# C: correlations of the normal scores of past closes, a bar HALF_PAST bars back of half the weight;
# e: their standard errors; t: how much they truly differ (shrinkage to a constant correlation, as
# Ledoit and Wolf, Journal of Portfolio Management 2004).

def move_together(uniform, origins, times, seed):
    """Reorders, in place, the numbers [paths, H, 2] of the n origins that share their next stamps.

    Each half of the paths by itself, so that the halves stay independent. times: int64 [n, H].
    """
    groups = {}
    for i, o in enumerate(origins):
        if o.closes is not None:
            groups.setdefault((int(o.time[-1]), times[i].tobytes()), []).append(i)
    for (stamp, _), rows in groups.items():
        if len(rows) < 2:
            continue
        factor = root_of(correlation([origins[i] for i in rows]))
        random = np.random.default_rng([seed, abs(stamp), len(rows)])
        paths, horizon, _ = uniform[rows[0]].shape
        for half in (slice(0, paths // 2), slice(paths // 2, paths)):
            u = np.stack([uniform[i][half] for i in rows], -2)              # (K, H, n, 2)
            z = random.standard_normal((horizon, len(u), len(rows)), np.float32) @ factor.T
            rank = z.argsort(1).argsort(1).swapaxes(0, 1)                   # (K, H, n)
            u = np.take_along_axis(u, u[..., :1].argsort(0), 0)             # in order of the first
            u = np.take_along_axis(u, rank[..., None], 0)
            for k, i in enumerate(rows):
                uniform[i][half] = u[:, :, k]


def correlation(origins):
    """R float32 [n, n] of the closes of n origins, from their last COMMON stamps."""
    scores = normal_scores(origins)                                         # (n, T)
    known, scores = (~np.isnan(scores)).astype(np.float32), np.nan_to_num(scores)
    weight = 0.5 ** (np.arange(scores.shape[1], dtype=np.float32)[::-1] / HALF_PAST)    # (T,)
    R = np.empty((len(scores), len(scores)), np.float32)

    def pairs():
        """Yield some rows of R at a time, and of these C, e^2 and which are known; bars in all."""
        for i in range(0, len(R), 256):
            own, a = known[i:i + 256], scores[i:i + 256]
            variance = (a**2 * weight @ known.T) * (own @ (scores**2 * weight).T)
            C = (a * weight @ scores.T / np.sqrt(variance.clip(1e-12))).clip(-1, 1)
            bars = (own * weight @ known.T)**2 / (own * weight**2 @ known.T).clip(1e-12)
            enough = (own @ known.T >= FEWEST) & ~np.eye(len(C), len(R), i, bool)
            yield R[i:i + 256], C, (1 - C**2)**2 / bars.clip(1), enough, bars

    sums = np.zeros(3)
    for _, C, _, enough, bars in pairs():
        sums += enough.sum(), bars.sum(where=enough), (C * bars).sum(where=enough)
    n, mean, spread = max(1.0, float(sums[0])), float(sums[2] / max(1, sums[1])), 0.0
    for _, C, error, enough, _ in pairs():
        spread += float(((C - mean)**2 - error).sum(where=enough)) / n
    for rows, C, error, enough, _ in pairs():
        w = np.where(enough, max(0.0, spread) / np.maximum(max(0.0, spread) + error, 1e-12), 0)
        rows[:] = w * C + (1 - w) * mean
    np.fill_diagonal(R, 1)
    return R


def normal_scores(origins):
    """Of each origin's closes at the last COMMON stamps the normal scores of their ranks, NaN where
    there is no bar: float32 [n, T]."""
    stamps = np.unique(np.concatenate([o.time[-len(o.closes):] for o in origins]))[-COMMON:]
    scores = np.full((len(origins), len(stamps)), np.nan, np.float32)
    for row, o in zip(scores, origins):
        time = o.time[-len(o.closes):]
        known = time >= stamps[0]
        rank = o.closes[known].argsort().argsort()
        level = torch.from_numpy((rank + 0.5) / max(1, len(rank)))
        row[np.searchsorted(stamps, time[known])] = torch.special.ndtri(level).numpy()
    return scores


def root_of(R):
    """A root F of correlations R float32 [n, n], F F' = R.

    Pairs that have not the same bars in common can leave R with eigenvalues below 0: these become
    small ones. Of more than EIGEN symbols, R, changed in place, is drawn towards the identity.
    """
    for lift in (1e-6, *np.geomspace(1e-4, 1, 14)):
        try:
            return np.linalg.cholesky(R)
        except np.linalg.LinAlgError:
            if len(R) <= EIGEN:
                value, vector = np.linalg.eigh(R)
                F = vector * np.sqrt(value.clip(1e-4))
                return F / np.linalg.norm(F, axis=1, keepdims=True)
            R *= np.float32(1 - lift)
            np.fill_diagonal(R, 1)
    return np.eye(len(R), dtype=R.dtype)
