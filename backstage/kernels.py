"""Fast forms of what model.py says in a line: the norm, decayed means, rotation, and what is made
from weights, kept until one of them changes. The plain forms are in tests/test_model.py. Below,
the order of attention's axes."""
import torch
import torch.nn.functional as F

EPS = 1e-6          # of the RMS norm


def norm(x):
    """x [..., C] / its root mean square (Zhang and Sennrich, arXiv 1910.07467).

    Without gain: a linear map follows.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return HalfNorm.apply(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (length.square() / x.shape[-1] + EPS).rsqrt()


class HalfNorm(torch.autograd.Function):
    """norm with a backward of its own: of half precision a step of training is 9 % faster."""

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = length.square().div(x.shape[-1]).add(EPS).rsqrt().to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        along = (g * y).mean(-1, keepdim=True, dtype=torch.float32).to(y.dtype)
        return torch.addcmul(g, y, along, value=-1).mul_(r)


def rotation(pos, dim, turns=True):
    """What rotate needs of bars at pos [T]: cos and signed sin of pos * theta, for q and k, each
    [2, 1, 1, T, dim].

    Those for q are divided by sqrt(dim), so that no attention has to. Without turns, theta is 0.
    """
    # float32 is off by 1e-3 at bar 20,000
    even = torch.arange(0, dim, 2, device=pos.device, dtype=torch.float64)
    theta = turns * 10000.0 ** (-even / dim)                            # [dim / 2]
    angle = pos.double()[:, None] * theta                               # [T, dim / 2]
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)      # [T, dim]
    return [torch.stack((a * dim**-0.5, a))[:, None, None].float() for a in (cos, sin)]


def rotate(qk, rot):
    """Rotary positions (Su et al., arXiv 2104.09864): turns pairs (x_i, x_{i + D/2}) of q and k
    [2, H, B, T, D]."""
    cos, sin = rot
    return torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)


def decayed_means(terms, growth, decay, before):
    """e_t / g_t of e_t = b e_{t-1} + (1 - b) x_t g_{t-1} with g_t = growth_0 ... growth_t, for each
    of n decays b, and e_t / g_t of the last bar.

    terms x [B, T], growth [B, T], decay b [n], before e_{-1} [..., n] -> [B, n, T] and [B, n].
    """
    b, T = decay[:, None], growth.shape[1]
    if T == 1:
        e = torch.lerp(terms[:, None], before[..., None], b) / growth[:, None]
        return e, e[..., 0]
    growth = growth.log().cumsum(-1).exp()                                  # [B, T], g
    terms = terms * F.pad(growth[:, :-1], (1, 0), value=1.0)
    e = (1 - b) * terms[:, None]                                            # [B, n, T]
    shift = 1
    while shift < T:            # after each pass a term is the sum of twice as many bars
        e = e + b ** shift * F.pad(e[..., :-shift], (shift, 0))
        shift *= 2
    e = e + before[..., None] * b ** torch.arange(1, T + 1, device=b.device)
    e = e / growth[:, None]
    return e, e[..., -1]


def kept(model, make):
    """make(), one of the methods that make the codes' vectors, in the type that matmuls run in:
    kept until a weight changes, where no gradient is wanted."""
    if torch.is_grad_enabled():
        model.cache.clear()
        return make()
    kind, heads = model.g.device.type, (model.coarse_head, model.fine_given, model.fine_head)
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else model.g.dtype

    def cast():
        with torch.autocast(kind, enabled=False):       # the same for callers in any precision
            return [a.to(dtype) for a in make()]
    return model.cache.get((make.__name__, dtype), heads, cast, (model.D1, model.M, model.g))


class Cache:
    """What was made from the weights of modules, until one of them changes, which its version
    tells.

    But tensors of inference mode have none: there it is made anew. So it is where gradients are
    wanted: see kept.
    """

    def __init__(self):
        self.made, self.holders = {}, {}

    def get(self, name, modules, make, weights=()):
        if name not in self.holders:        # looked up each time in these, as weights are exchanged
            self.holders[name] = [(part._parameters, key) for module in modules
                                  for part in module.modules() for key in part._parameters]
        weights = [*(place[key] for place, key in self.holders[name]), *weights]
        weights = [w for w in weights if w is not None]
        if any(w.is_inference() for w in weights):
            return make()
        key = [(w.data_ptr(), w._version) for w in weights]
        if name not in self.made or self.made[name][0] != key:
            self.made[name] = key, make()
        return self.made[name][1]

    def clear(self):
        self.made.clear()

    def __deepcopy__(self, memo):
        return Cache()


def heads_first(x, n, H):
    """[B, ..., n * C] -> [n, H, B, ..., D]."""
    return x.unflatten(-1, (n, H, -1)).movedim((-3, -2), (0, 1)).contiguous()


def heads_last(x):
    """[H, B, ..., D] -> [B, ..., C]."""
    return x.movedim(0, -2).flatten(-2)


def with_block_before(a, w, back):
    """Cuts a [H, B, N * w, D] into N blocks, each with the `back` blocks before it, zeros before
    the first: [H, B, N, (back + 1) * w, D]."""
    N = a.shape[2] // w
    a = F.pad(a, (0, 0, back * w, 0)).unflatten(2, (N + back, w))
    return torch.cat([a[:, :, n:n + N] for n in range(back + 1)], dim=3)
