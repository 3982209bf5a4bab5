"""The tokenizer: its forms against naive ones, and what it guarantees, each test red when that is broken."""
import copy
import math

import numpy as np
import pytest
import torch

from backstage.files import load_safe, save_atomic
import data
import tokenizer as tok
from data import CONTEXT, UserError
from tokenizer import Tokenizer, TokenizerConfig, least_index, report, signs, train_tokenizer

SMALL = dict(coarse_bits=6, fine_bits=5, n_hidden=32)


@pytest.fixture(scope="module")
def bars():
    """Features of the synthetic market, [N, 6]; every channel has data."""
    series, _ = data.synthetic(seed=5, n_symbols=4, n_bars=3000)
    return torch.from_numpy(np.concatenate([data.features(b)[0][CONTEXT:] for b in series]))


@pytest.fixture(scope="module")
def small(bars):
    return train_tokenizer(bars, SMALL, seed=1, steps=60, batch_size=256)


@pytest.fixture(scope="module")
def full(bars):
    """10 + 10 bits, trained for a moment."""
    return train_tokenizer(bars, TokenizerConfig(), seed=1, steps=60, batch_size=256)


def random_tokenizer(seed=0, **config):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config)
    tokenizer.mean.copy_(torch.randn(6) / 5)
    tokenizer.std.copy_(torch.rand(6) + 0.5)
    for p in tokenizer.parameters():
        p.data *= 2.0    # decodes as far apart as bars are
    return tokenizer.eval()


# ---- against naive forms

@pytest.fixture
def doubles():
    """Networks and codebooks in float64, for finite differences."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_signs_are_the_bits_of_their_tokens():
    for k in (2, 5, 12):
        c = signs(k)
        assert c.shape == (2 ** k, k) and torch.equal(tok.token_of(c / math.sqrt(k)), torch.arange(2 ** k))
        for token in (0, 1, 2, 2 ** k // 3, 2 ** k - 1):
            assert c[token].tolist() == [2.0 * int(b) - 1 for b in f"{token:0{k}b}"]


def test_quantize_takes_the_nearest_corner_of_the_sphere():
    torch.manual_seed(0)
    u = tok.on_sphere(torch.randn(200, 5))
    c, corners = tok.quantize(u), signs(5) / math.sqrt(5)
    assert torch.allclose(u.norm(dim=-1), torch.ones(200)) and torch.allclose(c.norm(dim=-1), torch.ones(200))
    assert torch.equal(tok.token_of(c), torch.cdist(u, corners).argmin(1))
    assert torch.allclose(c, corners[tok.token_of(c)], atol=1e-6)


def test_gradient_passes_straight_through_the_sign_and_along_the_sphere(doubles):
    """For a linear loss w . c the gradient at v is that of w . v / |v|, by finite differences."""
    v, w = torch.tensor([0.3, -1.2, 0.7, 2.0], requires_grad=True), torch.tensor([1.0, 2.0, -1.0, 0.5])
    (w * tok.quantize(tok.on_sphere(v))).sum().backward()
    for i in range(4):
        step = 1e-6 * torch.eye(4)[i]
        up, down = ((w * (v + s) / (v + s).norm()).sum().item() for s in (step, -step))
        assert v.grad[i].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


def naive_entropies(u, tau):
    """E[H(q)], H(E[q]) over all codes, and the sum over bits of the entropies of E[q], by loops."""
    B, k = u.shape
    sure, use, ones = 0.0, [0.0] * 2 ** k, [0.0] * k
    for row in u.tolist():
        weights = [math.exp(tau * sum(a * (1 if t >> (k - 1 - i) & 1 else -1) for i, a in enumerate(row)) / math.sqrt(k))
                   for t in range(2 ** k)]
        for t, weight in enumerate(weights):
            q = weight / sum(weights)
            sure -= q * math.log(q) / B
            use[t] += q / B
            for i in range(k):
                ones[i] += q / B * (t >> (k - 1 - i) & 1)
    bits = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in ones)
    return sure, -sum(p * math.log(p) for p in use), bits


@pytest.mark.parametrize("k", [2, 5])
def test_entropy_terms_are_the_sums_over_all_codes(doubles, k):
    torch.manual_seed(1)
    u = tok.on_sphere(torch.randn(7, k) + 0.5).requires_grad_()
    sure, joint, bits = naive_entropies(u, 3.0)
    assert joint < bits - 1e-3                       # they differ where bits in use depend on each other
    assert tok.joint_entropy_term(u, 3.0, 0.7).item() == pytest.approx(sure - 0.7 * joint, abs=1e-12)
    assert tok.bit_entropy_term(u, 3.0, 0.7).item() == pytest.approx(sure - 0.7 * bits, abs=1e-12)
    for term in (tok.joint_entropy_term, tok.bit_entropy_term):
        assert torch.autograd.gradcheck(lambda u: term(u, 3.0, 0.7), u)
        far = (1e6 * u).detach().requires_grad_()    # a bar that is all too sure
        term(far, 1e3, 1.0).backward()
        assert torch.isfinite(far.grad).all()


def test_for_a_linear_decoder_the_nearest_candle_is_the_sign_of_the_projection():
    torch.manual_seed(0)
    A = torch.linalg.qr(torch.randn(6, 5))[0]                   # (6, 5), orthonormal columns
    x = torch.randn(500, 6)
    got = signs(5)[least_index(torch.cdist(x, signs(5) @ A.T))]     # (500, 5)
    assert torch.equal(got, torch.where(x @ A > 0, 1.0, -1.0))


def naive_distances(tokenizer, row):
    """[2^k1] and, for each coarse code, [2^k2] squared distances of one bar, in float64, by loops over the networks."""
    k1, k2 = tokenizer.config.coarse_bits, tokenizer.config.fine_bits
    net = copy.deepcopy(tokenizer).double()
    channels = [i for i in range(6) if net.std[i] > 0 and (i < 4 or row[i] != 0)]
    z = [(row[i].double() - net.mean[i]) / net.std[i] for i in channels]
    bits = lambda t, k: torch.tensor([1.0 if t >> (k - 1 - i) & 1 else -1.0 for i in range(k)], dtype=torch.float64)
    square = lambda d: sum((z[j] - d[i]) ** 2 for j, i in enumerate(channels)).item()
    d1 = [net.coarse_decoder(bits(c, k1)) for c in range(2 ** k1)]
    g = [net.fine_decoder(bits(f, k2)) for f in range(2 ** k2)]
    coarse = [square(d) for d in d1]
    if tokenizer.config.direction_bit:
        coarse = [e if (c >> (k1 - 1)) == (row[0] > 0) else math.inf for c, e in enumerate(coarse)]
    fine = lambda c: [square(d1[c] + 0.3 * net.fine_mix(bits(c, k1)).view(6, 6) @ h) for h in g]
    return coarse, fine


@pytest.mark.parametrize("direction_bit", [True, False])
@torch.no_grad()
def test_encode_finds_the_nearest_of_all_codes(direction_bit):
    tokenizer = random_tokenizer(coarse_bits=5, fine_bits=4, n_hidden=16, direction_bit=direction_bit)
    x = torch.randn(30, 6)
    x[::3, 4], x[::4, 5], x[7, 0] = 0.0, 0.0, 0.0    # missing channels, a bar that did not move
    coarse, fine = tokenizer.encode(x)
    for row, c, f in zip(x, coarse.tolist(), fine.tolist()):
        coarse_distance, fine_distance = naive_distances(tokenizer, row)
        assert coarse_distance[c] <= min(coarse_distance) + 1e-4
        assert fine_distance(c)[f] <= min(fine_distance(c)) + 1e-4


@torch.no_grad()
def test_decode_is_the_network_at_the_corner():
    tokenizer = random_tokenizer(coarse_bits=5, fine_bits=4, n_hidden=16)
    coarse, fine = torch.randint(32, (3, 7)), torch.randint(16, (3, 7))
    z1 = tokenizer.coarse_decoder(signs(5)[coarse])
    mix = 0.3 * tokenizer.fine_mix(signs(5)[coarse]).view(3, 7, 6, 6)
    z2 = z1 + torch.einsum("btij,btj->bti", mix, tokenizer.fine_decoder(signs(4)[fine]))
    for got, z in ((tokenizer.decode(coarse), z1), (tokenizer.decode(coarse, fine), z2)):
        want = tokenizer.mean + tokenizer.std * z
        assert got.shape == (3, 7, 6) and got.dtype == torch.float32
        assert torch.allclose(got[..., 1:], want[..., 1:], atol=1e-5)
        up = coarse >= 16
        assert torch.allclose(got[..., 0], torch.where(up, want[..., 0].clamp(min=tok.MARGIN), want[..., 0].clamp(max=-tok.MARGIN)), atol=1e-5)


@torch.no_grad()
def test_signs_of_the_published_form_are_those_of_the_sphere():
    """nearest=False: tokens are the signs of encoder outputs, the coarse one's with the direction bit on top."""
    net = random_tokenizer(coarse_bits=5, fine_bits=4, n_hidden=16, nearest=False)
    x = torch.randn(30, 6)
    x[::3, 4] = 0.0
    coarse, fine = net.encode(x)
    for row, c, f in zip(x, coarse.tolist(), fine.tolist()):
        present = torch.tensor([i < 4 or row[i] != 0 for i in range(6)])
        z = torch.where(present, (row - net.mean) / net.std, 0.0)
        bits = [row[0] > 0] + [v > 0 for v in net.coarse_encoder(z)]
        c1 = torch.tensor([1.0 if b else -1.0 for b in bits])
        residual = torch.where(present, z - net.coarse_decoder(c1), 0.0)
        assert c == sum(int(b) << (4 - i) for i, b in enumerate(bits))
        assert f == sum(int(v > 0) << (3 - i) for i, v in enumerate(net.fine_encoder(torch.cat([residual, c1]))))


def naive_loss(net, x, coarse, fine):
    """Squared errors of both levels, each over the size of what it aims at, by loops over bars."""
    left, size, fine_left = 0.0, 0.0, 0.0
    for row, c, f in zip(x, coarse.tolist(), fine.tolist()):
        present = torch.tensor([1.0 if i < 4 or row[i] != 0 else 0.0 for i in range(6)])
        z = present * (row - net.mean) / net.std
        c1, c2 = signs(net.config.coarse_bits)[c], signs(net.config.fine_bits)[f]
        residual = present * (z - net.coarse_decoder(c1))
        pattern = 0.3 * net.fine_mix(c1).view(6, 6) @ net.fine_decoder(c2)
        size, left = size + z @ z, left + residual @ residual
        fine_left = fine_left + (present * (residual - pattern)).square().sum()
    return (left / size + fine_left / left.detach()).item()


@pytest.mark.parametrize("form", ["nearest", "published"])
@torch.no_grad()
def test_losses_against_naive_ones(form):
    net = random_tokenizer(coarse_bits=5, fine_bits=4, n_hidden=16, nearest=form == "nearest", entropy=0.2)
    x = torch.randn(40, 6)
    x[::3, 4], x[::4, 5] = 0.0, 0.0
    want = naive_loss(net, x, *net.encode(x))
    if form == "nearest":
        assert tok.nearest_loss(net, x).item() == pytest.approx(want, rel=1e-5)
        return
    z, present = net.standardize(x)
    u1, u2, _, _ = net.published(z, present, x[:, 0] > 0)
    for net.config.joint, term in ((True, tok.joint_entropy_term), (False, tok.bit_entropy_term)):
        entropies = term(u1, net.config.tau, 1.0) + term(u2, net.config.tau, 1.0)
        assert tok.published_loss(net, x).item() == pytest.approx(want + 0.2 * entropies.item(), rel=1e-5)


def test_the_second_phase_moves_the_chosen_candles_alone():
    """The gradient at a table is that of its bars' mean, as in Lloyd's algorithm; 0 where no bar is."""
    torch.manual_seed(3)
    z, table = torch.randn(9, 6), torch.randn(4, 6, requires_grad=True)
    to = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    tok.level_errors(z, torch.ones(9, 6), tok.look_up(table, to), torch.zeros(9, 6, 6), torch.zeros(9, 6)).backward()
    for code in range(4):
        want = 2 * (table[code].detach() - z[to == code]).sum(0) / z.square().sum()
        assert torch.allclose(table.grad[code], want, atol=1e-6)


def test_report_against_naive_counts(bars, small):
    x = bars[:500].clone()
    x[::7, 5] = 0.0
    scores, (coarse, fine) = report(small, x), small.encode(x)
    assert all(type(v) is float and math.isfinite(v) for v in scores.values())
    for name, tokens, k in (("coarse", coarse.tolist(), 6), ("fine", fine.tolist(), 5)):
        share = {t: tokens.count(t) / 500 for t in set(tokens)}
        assert scores[f"{name}_used"] == pytest.approx(len(share) / 2 ** k)
        assert scores[f"{name}_perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.values())))
        bits = []
        for i in range(k):
            p = sum(t >> (k - 1 - i) & 1 for t in tokens) / 500
            bits.append(-sum(q * math.log2(q) for q in (p, 1 - p) if q))
            assert scores[f"{name}_bit_entropy_{i}"] == pytest.approx(bits[i])
        assert scores[f"{name}_bit_entropy"] == pytest.approx(min(bits))
    assert scores["pairs"] == len(set(zip(coarse.tolist(), fine.tolist())))
    for level, y in (("coarse", small.decode(coarse)), ("full", small.decode(coarse, fine))):
        errors = []
        for i, channel in enumerate(data.CHANNELS):
            rows = [r for r in range(500) if i < 4 or x[r, i] != 0]
            true, got = x[rows, i].double().numpy(), y[rows, i].double().numpy()
            errors.append(((true - got) ** 2).mean() / true.var())
            assert scores[f"{level}_error_{channel}"] == pytest.approx(errors[-1]) == pytest.approx(1 - scores[f"{level}_r2_{channel}"])
        assert scores[f"{level}_error"] == pytest.approx(np.mean(errors))


# ---- guarantees

def test_every_pair_is_a_valid_candle_on_the_side_its_bit_says(full):
    for tokenizer in (full, random_tokenizer(seed=3)):
        pairs = torch.arange(2 ** 20)
        coarse, fine = pairs >> 10, pairs & 1023
        up = (coarse >> 9 == 1).numpy()
        states = [data.features(b)[1] for b in data.synthetic(seed=2, n_symbols=1, n_bars=300)[0]]
        still = states[0].map(np.copy)
        still.s = np.float64(0.0)    # the least scale there is
        for state in states + [still]:
            for x in (tokenizer.decode(coarse, fine), tokenizer.decode(coarse[::1024])):
                assert x.dtype == torch.float32 and torch.isfinite(x).all()
                rises = up if len(x) == 2 ** 20 else up[::1024]
                assert np.array_equal(x[:, 0].numpy() > 0, rises) and np.array_equal(x[:, 0].numpy() < 0, ~rises)
                ohlcva, _ = data.inverse(x[:, None], state)
                o, h, l, c, v, a = ohlcva[:, 0].T
                assert np.isfinite(ohlcva).all() and (l > 0).all() and (v >= 0).all() and (a >= 0).all()
                assert (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all()
                assert np.array_equal(c > state.close, rises) and np.array_equal(c < state.close, ~rises)
            if tokenizer is not full:
                break


def test_the_direction_bit_is_the_sign_of_close(bars, small):
    x = bars[:2000].clone()
    x[:4, 0] = torch.tensor([1e-30, -1e-30, 0.0, -0.0])     # the least move counts; none is "not up"
    coarse, fine = small.encode(x)
    assert torch.equal(coarse >> 5 == 1, x[:, 0] > 0)
    scores = report(small, x)
    assert scores["coarse_sign"] == scores["full_sign"] == 1.0


def test_without_the_direction_bit_nothing_is_forced(bars):
    tokenizer = train_tokenizer(bars, SMALL | dict(direction_bit=False), seed=1, steps=120, batch_size=256)
    scores = report(tokenizer, bars)
    assert scores["full_r2"] > 0.5 and scores["coarse_sign"] < 1.0


@pytest.mark.parametrize("form", ["nearest", "published"])
def test_tokens_do_not_depend_on_the_batch(bars, full, form, monkeypatch):
    full = full if form == "nearest" else random_tokenizer(nearest=False)
    rows, plain = [], Tokenizer.standardize

    def standardize(self, x):
        rows.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(Tokenizer, "standardize", standardize)
    coarse, fine = full.encode(bars)
    for n in (1, 3, 100, tok.ROWS + 1):
        for at in range(0, 20 * n, n):
            c, f = full.encode(bars[at:at + n])
            assert torch.equal(c, coarse[at:at + n]) and torch.equal(f, fine[at:at + n])
    shape = full.encode(bars[:24].view(2, 3, 4, 6))
    assert torch.equal(shape[0].flatten(), coarse[:24]) and shape[1].shape == (2, 3, 4) and shape[0].dtype == torch.int64
    assert torch.equal(full.encode(bars[:24].numpy())[0], coarse[:24])
    assert full.encode(bars[:0])[0].shape == (0,)
    assert set(rows) == {tok.ROWS}     # products of one shape: their last bits are the same for every batch


def test_a_channel_that_is_never_there_changes_nothing_and_decodes_to_zero(bars):
    x = bars.clone()
    x[:, 5] = 0.0
    tokenizer = train_tokenizer(x, SMALL, seed=1, steps=40, batch_size=256)
    y = tokenizer.decode(*tokenizer.encode(x))
    assert (y[:, 5] == 0).all() and "full_r2_vwap" not in report(tokenizer, x)
    for tokens, also in zip(tokenizer.encode(x), tokenizer.encode(bars)):     # its values, if any come, are not seen
        assert torch.equal(tokens, also)


def test_training_is_a_function_of_the_seed(bars, small):
    torch.manual_seed(99)       # the caller's own randomness neither matters nor is touched
    before, losses = torch.get_rng_state(), []
    again = train_tokenizer(bars, SMALL, seed=1, steps=60, batch_size=256, progress=lambda step, loss: losses.append((step, loss)))
    assert torch.equal(torch.get_rng_state(), before)
    other = train_tokenizer(bars, SMALL, seed=2, steps=60, batch_size=256)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in small.state_dict().items())
    assert [step for step, _ in losses] == list(range(1, 61)) and losses[-1][1] < losses[12][1]


def test_a_tokenizer_survives_save_and_load(bars, small, tmp_path):
    save_atomic(small.dump(), tmp_path / "t.pt")
    loaded = Tokenizer.load(load_safe(tmp_path / "t.pt"))
    for a, b in zip(loaded.encode(bars), small.encode(bars)):
        assert torch.equal(a, b)
    assert torch.equal(loaded.decode(torch.arange(64)), small.decode(torch.arange(64)))


def test_a_damaged_entry_is_refused_in_one_line(small):
    def damaged(**state):
        entry = small.dump()
        entry["state"] = {key: value.clone() for key, value in entry["state"].items()} | state
        return entry

    std, weight = small.std.clone(), small.coarse_decoder[0].weight.detach().clone()
    std[2], weight[0, 0] = -1.0, math.nan
    config = small.dump()["config"]
    missing = small.dump()
    del missing["state"]["mean"]
    for entry in (None, [], {}, {"config": config}, {"config": 3, "state": {}}, {"config": config, "state": {}}, missing,
                  damaged(std=std), damaged(mean=torch.zeros(5)), damaged(mean="mean"), damaged(mean=None),
                  damaged(std=torch.full((6,), math.inf)), damaged(**{"coarse_decoder.0.weight": weight}),
                  small.dump() | {"config": config | {"coarse_bits": 7}}, small.dump() | {"config": config | {"coarse_bits": "6"}},
                  small.dump() | {"config": config | {"coarse_bits": 6.5}}, small.dump() | {"config": config | {"colour": 1}},
                  small.dump() | {"config": {"coarse_bits": 6}}):
        with pytest.raises(ValueError) as e:
            Tokenizer.load(entry)
        assert "\n" not in str(e.value)


def test_rare_gaps_take_few_codes(bars, monkeypatch):
    """One bar in twenty opens with a gap, of little size beside close: the scale has a floor, so they take no codes."""
    x, used = bars[::5].clone(), {}
    gaps = 0.005 * torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    x[:, 1] = torch.where(torch.arange(len(x)) % 20 == 0, gaps, 0.0)
    for floor in (0.0, tok.FLOOR):
        monkeypatch.setattr(tok, "FLOOR", floor)
        net = train_tokenizer(x, TokenizerConfig(7, 3, n_hidden=64), seed=1, steps=150, batch_size=256)
        plain = x[x[:, 1] == 0]
        used[floor] = report(net, plain)["coarse_used"]
    assert net.std[1] == pytest.approx(tok.FLOOR * math.sqrt(net.config.close) * net.std[0].item())
    assert used[0.0] < 0.7 and used[tok.FLOOR] > 0.85, used


def test_close_is_kept_best(bars):
    """Its error falls by a third and more, where that of all channels hardly moves."""
    plain, weighted = (report(train_tokenizer(bars, SMALL | dict(close=weight), seed=1, steps=300, batch_size=256), bars)
                       for weight in (1.0, TokenizerConfig.close))
    assert weighted["full_error_close"] < 0.7 * plain["full_error_close"] and weighted["full_error"] < 1.1 * plain["full_error"]


def test_the_second_phase_earns_its_place(bars):
    errors = {}
    for nearest_form in (False, True):
        net = train_tokenizer(bars, SMALL | dict(nearest=nearest_form), seed=1, steps=200, batch_size=256)
        errors[nearest_form] = report(net, bars)["coarse_error"]
    assert errors[True] < 0.9 * errors[False] < 0.5


def test_codes_come_near_k_means(bars):
    """7 + 7 bits: the mean error of two levels of k-means on the same bars, and even use of the codes."""
    torch.manual_seed(0)
    z = (bars - bars.mean(0)) / bars.std(0)

    def lloyd(x, centroids=128):
        c = x[torch.randperm(len(x))[:centroids]]
        for _ in range(20):
            a = torch.cdist(x, c).argmin(1)
            c = torch.stack([x[a == i].mean(0) if (a == i).any() else x[torch.randint(len(x), ())] for i in range(centroids)])
        return x - c[torch.cdist(x, c).argmin(1)]

    left = lloyd(z)
    k_means = (left.square().mean().item(), lloyd(left).square().mean().item())
    scores = report(train_tokenizer(bars, dict(coarse_bits=7, fine_bits=7), steps=700, batch_size=1024), bars)
    assert scores["coarse_error"] < 1.15 * k_means[0] and scores["full_error"] < 1.1 * k_means[1]
    assert scores["coarse_used"] == scores["fine_used"] == 1.0
    assert scores["coarse_perplexity"] > 70 and scores["fine_perplexity"] > 90
    assert scores["coarse_bit_entropy"] > 0.85 and scores["fine_bit_entropy"] > 0.9


@pytest.mark.parametrize("bits", [(5, 5), (5, 12), (12, 5)])
@pytest.mark.parametrize("direction_bit", [True, False])
def test_sizes(bars, bits, direction_bit):
    config = TokenizerConfig(*bits, direction_bit=direction_bit, entropy=0.0)
    tokenizer = train_tokenizer(bars, config, steps=3, batch_size=64)
    coarse, fine = tokenizer.encode(bars[:1000])
    assert 0 <= coarse.min() and coarse.max() < 2 ** bits[0] and 0 <= fine.min() and fine.max() < 2 ** bits[1]
    assert torch.isfinite(tokenizer.decode(coarse, fine)).all()


# ---- bad input

def refuse(x, match, **kwargs):
    with pytest.raises(UserError, match=match) as e:
        train_tokenizer(x, kwargs.pop("config", SMALL), **kwargs)
    assert "\n" not in str(e.value)


def test_bars_that_cannot_be_learned_are_refused(bars):
    refuse(bars[:63], "64 codes a level and only 63 bars")
    refuse(bars[:0], "only 0 bars")
    for value in (math.inf, -math.inf, math.nan):
        x = bars.clone()
        x[17, 2] = value
        refuse(x, "'upper' of bar 17 is")
    still = bars.clone()
    still[:, 0] = 0.0
    refuse(still, "the close never changes")
    refuse(torch.zeros(200, 6), "the close never changes")


def test_an_open_that_is_always_the_close_before_and_no_wick_are_no_fault(bars):
    x = bars.clone()
    x[:, 1:3] = 0.0
    tokenizer = train_tokenizer(x, TokenizerConfig(6, 5, n_hidden=16), steps=20, batch_size=64)
    decoded = tokenizer.decode(*tokenizer.encode(x))
    assert torch.isfinite(decoded).all() and (decoded[:, 1:3] == 0).all()


def test_training_that_turns_non_finite_stops_with_step_and_cause(bars, monkeypatch):
    refuse(bars, r"step \d+: its (loss|gradient) is (nan|inf)", lr=1e30, steps=20, batch_size=64)
    plain = tok.nearest_loss
    monkeypatch.setattr(tok, "nearest_loss", lambda net, x: plain(net, x) * math.nan)
    refuse(bars, "step 7: its loss is nan", steps=60, batch_size=64)


def test_configs_that_make_no_sense_are_refused():
    for wrong in (dict(coarse_bits=13), dict(fine_bits=1), dict(n_hidden=0), dict(entropy=-1.0), dict(entropy=math.nan), dict(tau=math.inf), dict(fine_bits=6.5),
                  dict(direction_bit="no")):
        with pytest.raises(UserError, match=next(iter(wrong))):
            TokenizerConfig(**wrong)


def test_tokens_and_features_out_of_range_are_refused(small):
    for x in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            small.encode(torch.tensor([0.1, 0, 0, 0, x, 0]))
    for coarse, fine in ((64, 0), (-1, 0), (0, 32), (0, -1)):
        with pytest.raises(ValueError, match="token"):
            small.decode(torch.tensor([coarse]), torch.tensor([fine]))
