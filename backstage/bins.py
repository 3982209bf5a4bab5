"""The law of the next bar's close, range and volume, counted in bins.

A model of two token levels says

    P(value = v) = sum_c P(c) sum_f P(f | c) [v(c, f) = v]

where v(c, f) is the value of the pair's candle. 2^20 pairs of each bar would take hours. So values
are counted in bins, and P(bin | c) is read for a few coarse tokens alone. Of the others it is a
mean over contexts of the past; by what these few differ from it, all are put right (control
variates).
"""
import torch

BINS = 512    # of each quantity, at most


def close_table(tokenizer):
    """The decoded close (a feature, see data.features) of every token pair, [2^k1, 2^k2]."""
    return tokenizer.decode_pairs(1)[0]


def candle_tables(tokenizer):
    """The values of all pairs of tokens, {name: float64 [2^k1, 2^k2]}.

    close and range in units of s_t, volume in units of d_t above m_t.
    """
    close, open_, upper, lower, volume = tokenizer.decode_pairs(5).double().sinh()
    size = (close - open_).abs() + upper.clamp(min=0) + lower.clamp(min=0)
    return dict(close=close, range=size, volume=volume)


class Bins:
    """Bins of a quantity, from the values of all pairs of tokens, table [2^k1, 2^k2], alone.

    Half of the edges have equally many pairs between them, half lie at even steps of asinh: the
    first are close where bars are common, the second where they are rare. No bar decides them.
    bin_of [2^k1, 2^k2]: the bin of each pair; values [bins]: the means of their pairs.
    """

    def __init__(self, table):
        x = table.asinh()
        ordered = x.flatten()[::7].sort().values                # of every 7th pair: near enough
        inner = torch.linspace(0, 1, BINS // 2 + 1, dtype=x.dtype, device=x.device)[1:-1]
        common = ordered[(inner * (len(ordered) - 1)).round().long()]
        even = x.min() + inner * (x.max() - x.min())
        edges = torch.cat((common, even)).unique()
        place = torch.searchsorted(edges, x)
        used = place.flatten().bincount() > 0
        self.bin_of = (used.cumsum(0) - 1)[place]
        flat = self.bin_of.flatten()
        total = torch.zeros(int(flat.max()) + 1, dtype=x.dtype, device=x.device)
        total.index_add_(0, flat, table.flatten())
        self.values = (total / flat.bincount()).cpu().numpy()

    def shares(self, p):
        """P(bin | coarse) [2^k1, bins] of a law P(coarse, fine) [2^k1, 2^k2]."""
        p = p.clamp(min=1e-20)  # a code that never comes has its bins too
        share = torch.zeros(len(p), len(self.values), device=p.device)
        share.scatter_add_(1, self.bin_of, p)
        return share / share.sum(-1, keepdim=True)


class BinnedLaw:
    """P(bin) of close, range and volume, given a hidden state.

    past [n, C]: hidden states of bars before the first target. probes: coarse tokens of each bar
    whose fine tokens are read. values: {name: [bins]}, in units of candle_tables.
    """

    def __init__(self, model, tokenizer, past, probes):
        self.model, device = model, past.device
        self.order = tokenizer.decode(
            torch.arange(2**tokenizer.config.coarse_bits))[:, 0].argsort().to(device)   # by close
        self.bins = {name: Bins(table.to(device))
                     for name, table in candle_tables(tokenizer).items()}
        self.values = {name: bins.values for name, bins in self.bins.items()}
        self.place = (torch.arange(probes, device=device) + 0.5) / probes
        usual = sum(pair_law(model, h) for h in past)                           # (2^k1, 2^k2)
        self.shares = {name: bins.shares(usual) for name, bins in self.bins.items()}

    def __call__(self, h, logits=None):
        """{name: P(bin) float64 [m, bins]} for h [m, C]. A few may come out below 0.

        logits [m, 2^k1]: of the coarse token, in place of the model's own.

            P(bin) = sum_c P(c) S(bin | c) + mean_j (P(bin | c_j) - S(bin | c_j))

        S: the mean over the past; c_j: the coarse tokens at even steps of P(c), in order of close.
        """
        logits = self.model.coarse_logits(h) if logits is None else logits
        p = logits.float().softmax(-1)                                          # (m, 2^k1)
        cumulative = p[:, self.order].cumsum(-1)
        place = torch.searchsorted(cumulative, self.place * cumulative[:, -1:])
        probe = self.order[place.clamp(max=len(self.order) - 1)]                # (m, probes)
        fine = self.model.fine_logits(h[:, None], probe).float().softmax(-1)
        fine = (fine / len(self.place)).flatten(1)                              # (m, probes 2^k2)
        p = p.scatter_add(1, probe, p.new_full(probe.shape, -1 / len(self.place)))
        out = {}
        for name, bins in self.bins.items():
            law = p @ self.shares[name]                                         # (m, bins)
            law.scatter_add_(1, bins.bin_of[probe].flatten(1), fine)
            out[name] = law.double().cpu().numpy()
        return out


def pair_law(model, h):
    """P(coarse, fine) [2^k1, 2^k2] for one hidden state [C]: the law itself, of all pairs."""
    coarse = model.coarse_logits(h).float().softmax(-1)                         # (2^k1,)
    every = torch.arange(len(coarse), device=h.device)
    fine = model.fine_logits(h.expand(len(every), -1), every).float().softmax(-1)
    return coarse[:, None] * fine
