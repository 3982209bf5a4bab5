"""How far a model's predicted mean moves are to be trusted: one number, fitted on val."""
import torch
import torch.distributed as dist

from backstage.series import DAY

MAX_MOVE = 10.0      # bound of the moves, in units of s_t
LEAN_BLOCKS = 40     # stretches of time on val, at least, from which the slope's error is computed


def tilted(model, logits):
    """Coarse logits [..., 2^k1] whose mean move is drawn towards that of the training data:
    base + lean (mean - base), lean from 0 to 1.

    Directions are learned by heart first, and over many bars a false drift adds up. The law is
    tilted, p ~ exp(t move) p, which moves its mean by t times its variance.
    """
    moves = moves_of(model)
    mean, variance = move_moments(logits, moves)
    base, _ = move_moments(model.coarse_share, moves)
    tilt = (model.lean - 1) * (mean - base) / variance
    return torch.addcmul(logits.float(), tilt[..., None], moves[:, 0])


def moves_of(model):
    """The move of every coarse token, log(C_t / C_{t-1}) / s_t, bounded, and its square:
    [2^k1, 2]."""
    move = model.values(model.D1)[0].clamp(-MAX_MOVE, MAX_MOVE)
    return torch.stack((move, move**2), dim=1)


def move_moments(logits, moves):
    """Mean and variance [...] of the next move under coarse logits [..., 2^k1]; moves: see
    moves_of."""
    mean, square = (logits.float().softmax(-1) @ moves).unbind(-1)
    return mean, (square - mean**2).clamp(min=1e-6)


def fit_lean(mean, move, stamp):
    """Trust, 0 to 1, in predicted mean moves [N], given the moves [N], both less the base rate.

    The slope of `move` on `mean`, shrunk by its own error (James and Stein): slope
    (1 - (error / slope)^2), from 0 up. The error is that of a ratio of sums over blocks of time,
    since symbols of one time move together: days, or where these are few LEAN_BLOCKS stretches.
    stamp: int64 [N], UTC seconds.
    """
    if len(mean) == 0:
        return 0.0
    block = stamp // DAY
    if len(torch.unique(block)) < LEAN_BLOCKS:
        block = (stamp - stamp.min()) * LEAN_BLOCKS // (stamp.max() - stamp.min() + 1)
    which = torch.unique(block, return_inverse=True)[1]
    n = int(which.max()) + 1
    hits, squares = (
        torch.zeros(n, dtype=torch.float64, device=which.device).index_add_(0, which, a.double())
        for a in (mean * move, mean * mean))
    total = squares.sum().item()
    slope = (hits.sum() / squares.sum().clamp(min=1e-12)).item()
    error = (hits - slope * squares).square().sum().sqrt().item() / max(1e-12, total)
    if slope <= 0 or n == 1:
        return 0.0
    return min(1.0, slope) * max(0.0, 1 - (error / slope) ** 2)


def set_lean(model, batches, world):
    """Fit the model's lean, which must be 1 until then, on batches of (h, coarse, stamp) of val.

    h [N, C]; coarse, stamp int64 [N]. All processes get the same.
    """
    moves = moves_of(model)
    base, _ = move_moments(model.coarse_share, moves)
    columns = [(move_moments(model.coarse_logits(h), moves)[0] - base,
                moves[coarse, 0] - base, stamp) for h, coarse, stamp in batches]
    empty = [torch.zeros(0, device=moves.device)] * 3
    columns = [torch.cat(column) for column in zip(*columns)] or empty
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, [column.cpu() for column in columns])
        columns = [torch.cat(column) for column in zip(*parts)]
    model.lean.fill_(fit_lean(*columns))
