"""What the past of the series at hand corrects in what a model says: its coarse head, and how far
its P(up) is to be trusted.

**The head.** How ranges and volumes of this market depend on the past is best learned from its own
bars. So the coarse head is fitted anew, in few directions. With T_ij of coarse code i the log
range, the volume, the squares of both, and the size of the move, all standardized, and x_t the
model's hidden state before bar t, less its mean,

    logit'_ti = logit_ti + sum_j T_ij (b_j + B_j . x_t)

where b, B maximize the penalized log likelihood of the codes c_t that came,

    sum_t log P'(c_t) - FLAT |b|^2 / 2 - RIDGE |B|^2 / 2,       B_j in the span of DIRECTIONS

principal axes of x. It is concave; two steps of Newton's method from 0 come near enough.

**Trust in P(up).** With x = logit P - mean and y whether the close rose, logistic regression gives

    logit P' = a + k x
    a <- a (1 - (SURE e_a / a)^2)+
    k <- (k / e_k^2 + k0 / e0^2) / (1 / e_k^2 + 1 / e0^2)

each shrunk by its own error e over blocks of time (that of independent bars, where larger), since
one market rewards what the model says and the next does not. An a within SURE errors of 0 becomes 0
(after James and Stein 1961): few such drifts last into the next months. k is the posterior mean
under the prior k0 +- e0, with k0 = PRIOR_TRUST, e0 = PRIOR_ERROR, or QUIET / sd(x) where that is
more, but at most MOST_TRUST: of a quiet model too much trust costs little. Last, k is held between
0 and MOST_TRUST.
"""
import math
from dataclasses import dataclass, field

import numpy as np
import torch

DIRECTIONS = 16      # of the hidden state, along which the head is fitted
RIDGE, FLAT = 10000.0, 1000.0   # penalties of B, and of b
STEPS = 2            # of Newton's method
FARTHEST = 4.0       # bound of T, in standard deviations
TIME_BLOCKS = 40     # of the bars of a calibration, over which the errors of trust are computed
PRIOR_TRUST, PRIOR_ERROR = 0.3, 0.3   # in P(up), where the past is too short to tell
QUIET = 0.05         # log odds, of one sd of x, that the prior's error is at least
MOST_TRUST = 2.5     # above 1, since pretraining may shrink P(up) too much for one market
SURE = 3             # errors that the odds of a rise must be off by, to be mended


@dataclass
class Head:
    """What is added to the coarse logits: (h A + b) T^T."""
    A: torch.Tensor      # [C, J]
    b: torch.Tensor      # [J]
    T: torch.Tensor      # [2^k1, J]: see code_columns

    def __call__(self, logits, h):
        """logits [..., 2^k1] for h [..., C], corrected."""
        z = torch.addmm(self.b, h.flatten(0, -2).float(), self.A)               # [n, J]
        return torch.addmm(logits.flatten(0, -2), z, self.T.T).view_as(logits)


@dataclass
class Calibration:
    """What the past of the series at hand corrects: the head; logit P' = a + k (logit P - mean)."""
    a: float = 0.0       # log odds of a rise where the model says what it says on average
    k: float = 1.0       # trust in what it says beside
    mean: float = 0.0    # of logit P over the past bars that moved
    n_bars: int = 0      # of these bars
    head: Head | None = field(default=None, compare=False)
    table: torch.Tensor | None = field(default=None, compare=False)  # see Bands.table; of that past

    def law(self, model, h):
        """Coarse logits [..., 2^k1] for h [..., C], by the corrected head."""
        logits = model.coarse_logits(h).float()
        return logits if self.head is None else self.head(logits, h)

    def trusted(self, law, stay, up_mask):
        """Coarse logits like `law`, [n, 2^k1] or [n, K, 2^k1], whose up codes are all shifted by
        one number, and P(up | moved) float64 [n] or [n, K], as far as it is to be trusted.

        stay [n, 2^k1]: the share of each code's candles that does not move, see Bands.staying.
        """
        p = law.softmax(-1).view(len(law), -1, len(up_mask))                    # [n, K, 2^k1]
        moved = p.mul_(1 - stay[:, None]).sum(-1).double()      # in place: this code, and it moves
        up = p.mul_(up_mask).sum(-1).double()                   # in place: and it is an up code
        p_up = (up / moved.clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6).view(law.shape[:-1])
        trusted = (self.a + self.k * (p_up.logit() - self.mean)).sigmoid()
        shift = (trusted.logit() - p_up.logit()).float()
        return torch.addcmul(law, shift[..., None], up_mask.float()), trusted


def in_turn(calibration, times):
    """Yield (Calibration or None, places of the bars that it is for), of all at stamps times [n].

    calibration: a Calibration or None, for all; or a list of (stamp, one of these), each for bars
    from its stamp on.
    """
    if not isinstance(calibration, list):
        calibration = [(-math.inf, calibration)]
    since, each = zip(*calibration)
    which = np.searchsorted(since, times, side="right") - 1
    for k in np.unique(which):
        yield each[k], np.flatnonzero(which == k)


# --------------------------------------------------------------------------------------------------
# The head

def fit_head(model, h, logits, codes):
    """The Head that fits the coarse codes int64 [N] that came after h [N, C], for which the model
    has logits [N, 2^k1]."""
    T, mean = code_columns(model), h.double().mean(0)
    x = h.double() - mean
    axes = torch.linalg.eigh(x.T @ x)[1][:, -DIRECTIONS:]                   # [C, D]
    W = fit_tilt(logits, codes, T, torch.cat((torch.ones_like(x[:, :1]), x @ axes), 1))
    A = axes @ W[:, 1:].T                                                   # [C, J]
    return Head(A.float(), (W[:, 0] - mean @ A).float(), T.float())


def code_columns(model):
    """T float64 [2^k1, 5] of the coarse codes: log range, its square, volume, its square, size of
    the move; standardized as bars in training have them, and bounded."""
    close, high, low, volume = model.values(model.D1.double())
    columns = torch.stack(((high - low).clamp(min=1e-2).log(), volume, close.abs().clamp(max=6)), 1)
    share = model.coarse_share.double().softmax(-1)
    mean = share @ columns
    z = (columns - mean) / (share @ (columns - mean)**2).sqrt().clamp(min=1e-6)
    r, v, m = z.clamp(-FARTHEST, FARTHEST).unbind(1)
    return torch.stack((r, r**2, v, v**2, m), 1)


def fit_tilt(logits, codes, T, X):
    """W float64 [J, D], the maximum of sum_n log softmax(logits_n + T W X_n)[codes_n] less the
    penalty, for logits [N, V], codes int64 [N], T [V, J], X [N, D], the first column 1."""
    J, D = T.shape[1], X.shape[1]
    pairs = torch.cat((T, products(T)), 1).float()                          # [V, J + J^2]
    penalty = torch.full((J, D), RIDGE, dtype=torch.float64, device=X.device)
    penalty[:, 0] = FLAT
    XX, best = products(X), -math.inf                                       # [N, D^2]
    W = step = torch.zeros_like(penalty)
    for k in range(STEPS + 1):              # pass k checks step k - 1; the last one only checks
        mean, value = [], -(penalty * W**2).sum() / 2
        for some, x, came in zip(*(a.split(1024) for a in (logits, X, codes))):
            log_p = torch.addmm(some, (x @ W.T).float(), T.float().T).log_softmax(-1)
            value += log_p.gather(1, came[:, None]).double().sum()
            if k < STEPS:
                mean.append(log_p.exp_() @ pairs)
        if not value >= best:               # the step went too far
            return W - step
        if k == STEPS:
            return W
        E, square = torch.cat(mean).double().split([J, J * J], 1)
        gradient = (T[codes] - E).T @ X - penalty * W                       # [J, D]
        H = ((square - products(E)).T @ XX).view(J, J, D, D).transpose(1, 2).reshape(J * D, J * D)
        step = torch.linalg.solve(H + penalty.flatten().diag(), gradient.flatten()).view(J, D)
        best, W = value, W + step


def products(a):
    """All products of two columns: [n, J] -> [n, J^2]."""
    return (a[:, :, None] * a[:, None]).flatten(1)


# --------------------------------------------------------------------------------------------------
# Trust in P(up)

def fit_trust(logit, rose, stamp):
    """The Calibration from logit P(up) [N] of past bars that moved, whether they rose, their
    stamps."""
    mean = logit.mean()
    X, theta = np.stack([np.ones(len(logit)), logit - mean], 1), np.zeros(2)
    block = np.searchsorted(np.unique(stamp), stamp) * TIME_BLOCKS // len(np.unique(stamp))
    for _ in range(20):                                                     # Newton's method
        p = 1 / (1 + np.exp(-X @ theta))
        H = (X * (p * (1 - p))[:, None]).T @ X + 1e-6 * np.eye(2)
        theta = np.clip(theta + np.linalg.solve(H, X.T @ (rose - p)), -5, 5)
    sums = np.stack([np.bincount(block, (rose - p) * column, TIME_BLOCKS) for column in X.T], 1)
    inverse = np.linalg.inv(H)
    cov = inverse @ (sums.T @ sums) @ inverse                               # (2, 2), sandwich
    (a, k), (var_a, var_k) = theta, np.maximum(np.diag(cov), np.diag(inverse))
    a *= max(0.0, 1 - SURE**2 * var_a / max(a**2, 1e-12))
    var_0 = max(PRIOR_ERROR, QUIET / max(logit.std(), QUIET / MOST_TRUST))**2
    k = (k / var_k + PRIOR_TRUST / var_0) / (1 / var_k + 1 / var_0)
    return Calibration(float(a), float(min(MOST_TRUST, max(0.0, k))), float(mean), len(logit))
