"""Post-training: the losses against closed forms and naive loops, walks against a naive walk, the scripts as users run them."""
import itertools
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from backstage import stage_scores
from backstage.bins import close_table
from backstage.checkpoint import read_checkpoint
from backstage.stage import Stage
import data
import expo
import rollout
import sample
from conftest import ROOT, complaint
from model import Model, load_checkpoint

FAST = "--steps 4 --batch_size 4 --eval_every 2 --no-backtest".split()


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def batch(loaded, market):
    model, tokenizer, meta = loaded
    series = data.load([str(market)])
    tokens = [data.tokenize(bars, tokenizer) for bars in series]
    streams = data.make_streams(series, tokens, "train", meta["splits"], 64, 4)
    coarse, fine, when, target = data.get_batch(streams, 0, 0)
    target[0][0, :5] = target[1][0, :5] = -1  # some do not count
    return [coarse, fine, when, *target]


@pytest.fixture(scope="module")
def other(loaded):
    """The same model with other weights."""
    model = Model(loaded[0].config)
    random = torch.Generator().manual_seed(0)
    weights = {name: v.clone() for name, v in loaded[0].state_dict().items()}
    for name, _ in model.named_parameters():
        weights[name] += 0.1 * torch.randn(weights[name].shape, generator=random)
    model.load_state_dict(weights)
    return model


@pytest.fixture(autouse=True)
def few_origins(monkeypatch):
    for name in ("VAL_ORIGINS", "ORIGINS"):
        monkeypatch.setattr(f"backstage.stage.{name}", 20)


# ---- expo: the loss

def test_the_gradient_of_the_loss_is_its_finite_difference():
    z = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    ref = torch.linspace(3, -3, 9, dtype=torch.float64)
    expo.expo_loss(z, ref, 0.6).sum().backward()
    e = 1e-6
    with torch.no_grad():
        slope = (expo.expo_loss(z + e, ref, 0.6) - expo.expo_loss(z - e, ref, 0.6)) / (2 * e)
    by_hand = [(1 / (1 + math.exp(-a)) - (0.6 / (1 + math.exp(-b)) + 0.4))**2 for a, b in zip(z.tolist(), ref.tolist())]
    torch.testing.assert_close(expo.expo_loss(z, ref, 0.6), torch.tensor(by_hand, dtype=torch.float64))
    torch.testing.assert_close(z.grad, slope, rtol=1e-6, atol=1e-9)


def optimum(lam, beta, ref, share):
    """P(token 0) of two tokens where token 0 is the better one in a `share` of the samples, by plain descent."""
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    odds = torch.tensor(math.log(ref / (1 - ref)), dtype=torch.float64)
    optimizer = torch.optim.SGD([z], lr=4.0)
    for _ in range(2000):
        p = z.sigmoid()
        away = p * (p / ref).log() + (1 - p) * ((1 - p) / (1 - ref)).log()
        loss = share * expo.expo_loss(z, odds, lam) + (1 - share) * expo.expo_loss(-z, -odds, lam) + beta * away
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return z.sigmoid().item()


@pytest.mark.parametrize("lam, ref, share", [(0.0, 0.3, 0.8), (0.6, 0.3, 0.8), (0.6, 0.5, 0.1), (1.0, 0.3, 0.8)])
def test_without_kl_the_optimum_is_the_mixture_of_reference_and_data(lam, ref, share):
    assert optimum(lam, 0.0, ref, share) == pytest.approx(lam * ref + (1 - lam) * share, abs=1e-6)


@pytest.mark.parametrize("lam, beta", [(0.6, 0.1), (0.0, 0.1), (0.0, 0.02), (0.3, 1.0)])
def test_the_part_of_an_edge_that_the_optimum_keeps(lam, beta):
    """Beside a reference of one half, of a small edge."""
    assert (optimum(lam, beta, 0.5, 0.51) - 0.5) / 0.01 == pytest.approx((1 - lam) / (1 + 2 * beta), rel=1e-3)


@pytest.mark.parametrize("pairs", ["set", "drawn"])
def test_with_lam_1_the_reference_stands_still(loaded, batch, pairs):
    model, tokenizer, _ = loaded
    same = Model(model.config)
    same.load_state_dict(model.state_dict())
    config = expo.Config(pairs=pairs, lam=1.0, candidates=16)
    loss, shown = expo.loss_of(same, model, close_table(tokenizer), batch, np.random.default_rng(0), config)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and abs(shown["kl"]) < 1e-6
    assert max(p.grad.abs().max().item() for p in same.parameters() if p.grad is not None) < 1e-6


def test_the_set_loss_is_the_naive_one(loaded, other, batch):
    """Every labelled bar by itself, all of one weight; bars in the noise without a label."""
    reference, tokenizer, _ = loaded
    table = close_table(tokenizer)
    config = expo.Config(pairs="set", lam=0.6, beta=0.5, noise=0.3)
    loss, shown = expo.loss_of(other, reference, table, batch, np.random.default_rng(0), config)
    coarse, fine, when, *target = batch
    labelled, away, rises = [], [], []
    with torch.no_grad():
        known = tuple(a.clamp(min=0) for a in target)
        logits = [m(coarse, fine, when, known)[:2] for m in (other, reference)]
        for b, t in itertools.product(range(coarse.shape[0]), range(coarse.shape[1])):
            if target[0][b, t] < 0:
                continue
            p, r = (a[0][b, t].double().log_softmax(-1) for a in logits)
            p_fine, r_fine = (a[1][b, t].double().log_softmax(-1) for a in logits)
            away.append(((p.exp() * (p - r)).sum() + (p_fine.exp() * (p_fine - r_fine)).sum()).item())
            p, r = p.exp(), r.exp()
            move = math.sinh(table[target[0][b, t], target[1][b, t]])
            if abs(move) > 0.3:
                side = other.up_mask if move > 0 else ~other.up_mask
                labelled.append(((p[side].sum() - (0.6 * r[side].sum() + 0.4))**2).item())
                rises.append(move > 0)
    assert shown["loss"] == pytest.approx(np.mean(labelled), rel=1e-4)
    assert shown["kl"] == pytest.approx(np.mean(away), rel=1e-3)
    assert loss.item() == pytest.approx(np.mean(labelled) + 0.5 * np.mean(away), rel=1e-3)
    assert 0 < sum(rises) < len(rises) and 2 * sum(rises) != len(rises)


@pytest.mark.parametrize("pairs", ["set", "drawn"])
def test_a_batch_without_a_label_costs_only_its_kl(loaded, other, batch, pairs):
    reference, tokenizer, _ = loaded
    config = expo.Config(pairs=pairs, noise=1e9, beta=0.5)
    loss, shown = expo.loss_of(other, reference, close_table(tokenizer), batch, np.random.default_rng(0), config)
    loss.backward()
    other.zero_grad()
    assert shown["loss"] == 0 and loss.item() == pytest.approx(0.5 * shown["kl"]) and shown["kl"] > 0


def test_the_loser_is_the_worst_candidate(loaded):
    model, tokenizer, _ = loaded
    chance = np.random.default_rng(1)
    # a rise much too far is at times worse than a fall
    table = torch.from_numpy(np.arcsinh(chance.uniform(-1, 5, (64, 32))).astype(np.float32))
    h = torch.from_numpy(chance.normal(size=(11, model.config.n_embd)).astype(np.float32))
    move = torch.from_numpy(chance.normal(size=11).astype(np.float32))
    u = torch.from_numpy(chance.random((11, 24, 2), np.float32))
    losers, behind = expo.draw_losers(model, table, h, move, u)
    sides = set()
    for n in range(11):
        coarse, fine = model.sample(h[n].expand(24, -1), u=u[n])
        score, true = [], move[n].item()
        for c, f in zip(coarse, fine):
            close = math.sinh(table[c, f])
            score.append(((close > 0) == (true > 0)) - 0.25 * abs(close - true) / abs(true))
        worst = int(np.argmin(score))
        assert losers[n].tolist() == [coarse[worst], fine[worst]]
        assert behind[n].item() == pytest.approx(1 - score[worst], rel=1e-4)
        sides.add((math.sinh(table[coarse[worst], fine[worst]]) > 0) == (true > 0))
    assert sides == {True, False}


def test_pairs_of_the_true_bar_and_a_loser_beyond_the_margin(loaded, other, batch):
    """The drawn loss with all labels, row by row."""
    reference, tokenizer, _ = loaded
    table, chance = close_table(tokenizer), np.random.default_rng(7)
    config = expo.Config(pairs="drawn", lam=0.6, beta=0.0, candidates=3, labels=64, margin=1.1)
    loss, _ = expo.loss_of(other, reference, table, batch, np.random.default_rng(7), config)
    coarse, fine, when, *target = batch
    counts = target[0] >= 0
    came = torch.stack((target[0][counts], target[1][counts]), 1)
    move = table[came[:, 0], came[:, 1]].sinh()
    rows = (move.abs() > config.noise).nonzero()[:, 0]
    chance.permutation(len(rows))
    uniform = torch.from_numpy(chance.random((len(rows), 3, 2), np.float32))
    each = []
    with torch.no_grad():
        h, h_ref = (m.hidden(coarse, fine, when)[counts] for m in (other, reference))
        losers, behind = expo.draw_losers(reference, table, h_ref[rows], move[rows], uniform)
        for row, l, gap in zip(rows, losers, behind):
            if gap < 1.1:
                continue
            odds = []
            for m, hidden in ((other, h[row]), (reference, h_ref[row])):
                log_p = [m.coarse_logits(hidden).log_softmax(-1)[c] + m.fine_logits(hidden, c).log_softmax(-1)[f]
                         for c, f in (came[row], l)]
                odds.append(log_p[0] - log_p[1])
            each.append(expo.expo_loss(*odds, 0.6).item())
    assert 0 < len(each) < len(rows) and loss.item() == pytest.approx(np.mean(each), rel=1e-3)


def test_logit_up_is_that_of_the_up_tokens(loaded):
    model = loaded[0]
    h = torch.randn(5, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    logits = model.coarse_logits(h)
    up = expo.logit_up(model, logits.log_softmax(-1)).sigmoid()
    torch.testing.assert_close(up, logits.softmax(-1)[:, model.up_mask].sum(-1))


# ---- rollout: the walk

@pytest.fixture(scope="module")
def walks(loaded, market):
    """(series, streams, origins) of a batch of windows of 64 real bars and up to 5 bars of walk."""
    model, tokenizer, meta = loaded
    series = data.load([str(market)])
    tokens = [data.tokenize(bars, tokenizer) for bars in series]
    streams = data.make_streams(series, tokens, "train", meta["splits"], 64 + 5 - 1, 3)
    return series, streams, rollout.origins_of(streams, series, list(map(data.slots_of, series)), *data.draw_windows(streams, 0, 0), 4, 5)


def state_of(model, origins):
    with torch.no_grad():
        return model.prefill(*origins.context[:3])


def uniform_of(candidates):
    return torch.rand(3, candidates, 4, 2, generator=torch.Generator().manual_seed(0))


def test_origins_are_what_the_window_says(loaded, walks):
    model, tokenizer, _ = loaded
    series, streams, origins = walks
    which, ends = data.draw_windows(streams, 0, 0)
    coarse, fine, when, target = origins.context
    assert coarse.shape == (3, 64) and origins.times.shape == (3, 4) and origins.path.shape == (3, 4)
    for n, (i, e) in enumerate(zip(which, ends)):
        bars, o = series[i], e - 5
        x, state = data.features(bars[:o + 1])
        assert when[n, -1] == bars.time[o] and target[0][n, -1] == -1
        assert coarse[n].tolist() == tokenizer.encode(torch.from_numpy(x[-64:]))[0].tolist()
        after = torch.stack(tokenizer.encode(torch.from_numpy(data.features(bars)[0][o + 1:o + 5])), -1)
        assert torch.equal(origins.tokens[n], after)
        log_close = np.log(bars.ohlcva[:, 3])
        np.testing.assert_allclose(origins.path[n], log_close[o + 1:o + 5] - log_close[o], rtol=1e-9, atol=1e-12)
        want = data.State.stack([state.anchored()]).scales()
        np.testing.assert_allclose([a[n] for a in origins.state.scales()], [a[0] for a in want], rtol=1e-4)


def test_the_future_shapes_the_choice_and_nothing_else(loaded, walks):
    """Other bars after the origin: the same context, stamps, scale and, of one candidate, the same walk."""
    model, tokenizer, _ = loaded
    series, streams, before = walks
    which, ends = data.draw_windows(streams, 0, 0)
    changed = []
    for i, bars in enumerate(series):
        ohlcva, time = bars.ohlcva.copy(), bars.time.copy()
        for e in ends[which == i]:
            ohlcva[e - 4:e + 1] *= 1.5
            time[e - 4:] += 17
        changed.append(data.Bars(bars.symbol, time, ohlcva))
    stamps = [bars.time for bars in changed]
    fresh = data.Streams(streams.tokens, stamps, streams.targets, streams.block_size, streams.batch_size, streams.whole)
    # those without a changed bar in their context
    only = [k for k in range(3) if not any(which[k] == which[j] and ends[j] < ends[k] for j in range(3))]
    after = rollout.origins_of(fresh, changed, list(map(data.slots_of, changed)), which, ends, 4, 5)
    assert not np.allclose(after.path[only], before.path[only])
    assert torch.equal(after.times[only], before.times[only])
    for a, b in zip(after.context[:3], before.context[:3]):
        assert torch.equal(a[only], b[only])
    for name in data.State.__dataclass_fields__:
        assert np.array_equal(getattr(after.state, name)[only], getattr(before.state, name)[only])
    for candidates in (1, 6):
        a, b = (rollout.guided_walk(model, tokenizer, state_of(model, origins), origins, uniform_of(candidates), 1.5)[0][only]
                for origins in (after, before))
        assert torch.equal(a, b) == (candidates == 1)


def test_a_guided_walk_is_the_naive_one(loaded, walks):
    """Each step from a parallel forward over context and walk, each candidate decoded by itself; by position."""
    model, tokenizer, _ = loaded
    _, _, origins = walks
    u = uniform_of(6)
    got, path = rollout.guided_walk(model, tokenizer, state_of(model, origins), origins, u, 1.5)
    assert got.shape == (3, 4, 2)
    for b in range(3):
        coarse, fine, when = (a[b:b + 1] for a in origins.context[:3])
        state = start = origins.state.map(lambda f: f[b, 0])
        for k in range(4):
            with torch.no_grad():
                h = model.hidden(coarse, fine, when)[0, -1]
                tokens = [model.sample(h, 1.5, u=u[b, j, k]) for j in range(6)]
            decoded = [data.inverse(tokenizer.decode(*pair).numpy()[None], state) for pair in tokens]
            error = [abs(math.log(bar[0, 3] / start.close) - origins.path[b, k]) for bar, _ in decoded]
            pick = int(np.argmin(error))
            assert got[b, k].tolist() == [int(v) for v in tokens[pick]]
            state = decoded[pick][1]
            assert path[b, k] == pytest.approx(math.log(state.close / start.close), abs=1e-9)
            coarse, fine = (torch.cat((a, token.view(1, 1)), 1) for a, token in zip((coarse, fine), tokens[pick]))
            when = torch.cat((when, origins.times[b:b + 1, k:k + 1]), 1)


def test_the_best_quarter_of_whole_paths_by_path_error(loaded, walks):
    model, tokenizer, _ = loaded
    _, _, origins = walks
    u = uniform_of(8)
    got, of = rollout.best_paths(model, tokenizer, state_of(model, origins), origins, u, 1.5)
    assert got.shape == (6, 4, 2)
    walked = [rollout.guided_walk(model, tokenizer, state_of(model, origins), origins, u[:, j:j + 1], 1.5) for j in range(8)]
    for b in range(3):
        error = [np.abs(path[b] - origins.path[b]).mean() for _, path in walked]
        for row, j in zip((2 * b, 2 * b + 1), np.argsort(error)):
            assert torch.equal(got[row], walked[j][0][b])
            assert torch.equal(of.context[0][row], origins.context[0][b]) and torch.equal(of.tokens[row], origins.tokens[b])
            assert torch.equal(of.times[row], origins.times[b]) and (of.path[row] == origins.path[b]).all()


def test_the_median_path_is_the_naive_one(loaded, market):
    """Each step the coarse token at the median of the close, its likeliest fine one, from a parallel forward."""
    model, tokenizer, _ = loaded
    histories = [bars[:n] for bars, n in zip(data.load([str(market)]), (200, 40, 300))]
    origins = sample.origins_of(model, tokenizer, histories)
    got = stage_scores.median_path(model, tokenizer, origins, 3)
    rising = tokenizer.decode(torch.arange(2**tokenizer.config.coarse_bits))[:, 0].argsort()
    for bars, origin, path in zip(histories, origins, got):
        (coarse, fine), state = origin.tokens.T, origin.state.anchored()
        when = torch.from_numpy(np.append(bars.time, data.future_times(bars.time, 3)))
        when = when[len(bars) - len(coarse):]
        for k in range(3):
            with torch.no_grad():
                h = model.hidden(coarse[None], fine[None], when[None, :len(coarse)])[0, -1]
                p = model.coarse_logits(h).softmax(-1)
                c = next(c for c, below in zip(rising, p[rising].cumsum(0)) if below >= 0.5).item()
                f = model.fine_logits(h, torch.tensor(c)).argmax()
            bar, state = data.inverse(tokenizer.decode(torch.tensor(c), f).numpy()[None], state)
            np.testing.assert_allclose(path[k], bar[0], rtol=1e-6)
            coarse, fine = torch.cat((coarse, torch.tensor([c]))), torch.cat((fine, f[None]))


@pytest.mark.parametrize("true", [True, False])
def test_the_loss_of_a_walk_is_the_naive_one(loaded, other, walks, true):
    base, tokenizer, _ = loaded
    _, _, origins = walks
    tokens, _ = rollout.guided_walk(other, tokenizer, state_of(other, origins), origins, uniform_of(1), 1.5)
    target = origins.tokens if true else tokens
    loss, shown = rollout.rollout_loss(other, base, origins, tokens, target, rollout.Config(walk=0.5, kl=0.3))
    own, away = [], []
    with torch.no_grad():
        for b, (walk, goal) in enumerate(zip(tokens, target)):
            coarse, fine = (torch.cat((origins.context[i][b], walk[:-1, i]))[None] for i in (0, 1))
            when = torch.cat((origins.context[2][b], origins.times[b, :-1]))[None]
            given = torch.cat((origins.context[3][0][b, :-1].clamp(min=0), goal[:, 0]))[None]
            said = [m(coarse, fine, when, (given, torch.zeros_like(given)))[:2] for m in (other, base)]
            for k, level in itertools.product(range(4), range(2)):
                p, q = (s[level][0, 63 + k].log_softmax(-1) for s in said)
                own.append(-(1 + 0.75 * k / 3) * p[goal[k, level]].item())
                away.append((p.exp() * (p - q)).sum().item())
        coarse, fine, when, real = origins.context
        logits = other(coarse, fine, when, tuple(real))[:2]
        plain = sum(torch.nn.functional.cross_entropy(a.mT, b, ignore_index=-1).item() for a, b in zip(logits, real))
    assert shown["loss"] == pytest.approx(2 * np.mean(own), rel=1e-4)
    assert shown["plain"] == pytest.approx(plain, rel=1e-5)
    assert shown["kl"] == pytest.approx(2 * np.mean(away), rel=1e-3)
    assert loss.item() == pytest.approx(0.5 * 2 * np.mean(own) + 0.3 * 2 * np.mean(away) + plain, rel=1e-4)


# ---- the scripts

@pytest.mark.parametrize("name, flags", [
    ("expo", "--pairs set --noise 0.2"), ("expo", "--pairs drawn --candidates 16"), ("rollout", "--horizon 2"),
    ("rollout", "--select path --target chosen --horizon 3")])
def test_a_stage_writes_a_checkpoint_that_forecasts(checkpoint, tmp_path, call, name, flags):
    before = open(checkpoint, "rb").read()
    status, out, err = call(name, "--ckpt", checkpoint, "--out", tmp_path / "a.pt", *FAST, *flags.split())
    assert status == 0 and open(checkpoint, "rb").read() == before, err
    assert ("no weights can be kept" in out) == (name == "rollout")     # 50 bars of val
    entry, base = read_checkpoint(str(tmp_path / "a.pt")), read_checkpoint(checkpoint)
    assert entry["stage"] == name and entry["step"] == 4 and entry["splits"] == base["splits"]
    assert [m["step"] for m in entry["metrics"] if m["stage"] == name] == [2, 4]
    assert entry["metrics"][:len(base["metrics"])] == base["metrics"]
    assert any(not torch.equal(v, base["best"][k]) for k, v in entry["model"].items())
    status, out, err = call("sample", "--ckpt", tmp_path / "a.pt", "--paths", 5, "--horizon", 2, "--plot_loss", tmp_path / "l.svg")
    assert status == 0 and "symbol" in out, err


def test_expo_trains_free_of_the_lean_and_its_reference_keeps_it(checkpoint, tmp_path, call):
    entry = torch.load(checkpoint, weights_only=True)
    for weights in (entry["model"], entry["best"]):
        weights["lean"] = torch.tensor(0.25)
    torch.save(entry, tmp_path / "leaning.pt")
    still = ["--lr", 1e-9, "--adam_lr", 1e-9]   # so that nothing is surely better
    status, _, err = call("expo", "--ckpt", tmp_path / "leaning.pt", "--out", tmp_path / "a.pt", *FAST, *still)
    assert status == 0, err
    tuned = read_checkpoint(str(tmp_path / "a.pt"))
    assert tuned["model"]["lean"] == 1 and tuned["best"]["lean"] == 0.25


@pytest.mark.parametrize("name, flags, metric", [("expo", "--horizon 2", "log loss"), ("rollout", "--horizon 2", "path CRPS")])
def test_ends_with_the_paired_backtest(checkpoint, tmp_path, call, name, flags, metric):
    args = ["--ckpt", checkpoint, "--out", tmp_path / "a.pt", "--steps", 2, "--batch_size", 2, "--paths", 4, *flags.split()]
    status, out, err = call(name, *args)
    assert status == 0, err
    table = out[out.index("test, which"):]
    assert metric in table and " last to " in table and max(map(len, table.splitlines())) <= 90


@pytest.mark.parametrize("name, gain", [("expo", -0.01), ("rollout", 0.99)])
def test_the_base_is_kept_unless_an_interval_says_better(checkpoint, tmp_path, call, monkeypatch, name, gain):
    """Better by a point, or in the log loss alone, is not enough; and a resumed run knows what was kept."""
    base = read_checkpoint(checkpoint)["best"]

    def kept(half, others, out, *flags):
        score = dict(value=gain, lo=gain - half, hi=gain + half)
        other = dict(value=others, lo=others, hi=others)
        unmoved = dict(value=0.0, lo=0.0, hi=0.0)
        answers = {"path_coverage90": unmoved, "logloss": score, "path_crps": score if name == "rollout" else other}
        monkeypatch.setattr(f"{name}.against", lambda a, b, metric, *rest: answers.get(metric, other))
        flags = flags or ("--ckpt", checkpoint, "--steps", 2, "--batch_size", 2, "--eval_every", 2)
        status, text, err = call(name, "--out", tmp_path / out, "--no-backtest", *flags)
        assert status == 0, err
        weights = read_checkpoint(str(tmp_path / out))["best"]
        same = all(torch.equal(weights[k], base[k]) for k in base)
        assert same == ("holds the" in text)
        return not same

    assert kept(0.001, 1.0, "clear.pt")
    assert kept(0.001, 1.006, "worse.pt") == (name == "rollout")
    assert not kept(0.02, 1.0, "point.pt")
    entry = torch.load(tmp_path / "point.pt", weights_only=True)
    torch.save(entry | dict(step=1), tmp_path / "point.pt")
    assert not kept(0.02, 1.0, "point.pt", "--resume")


@pytest.mark.parametrize("metric", ["mae", "crps", "range_crps", "volume_crps", "path_crps"])
def test_the_guard_refuses_whatever_one_condition_refuses(monkeypatch, metric):
    """Each condition by itself: a gain that is not sure, one score surely not within half a percent, the band."""
    names = ("logloss", "mae", "crps", "range_crps", "volume_crps", "path_crps", "path_coverage90")

    def failed(**scores):
        fine = dict(logloss=(-0.01, -0.02, -0.001), path_coverage90=(0.004, -0.02, 0.02))
        values = {name: scores.get(name) or fine.get(name, (1.0, 0.99, 1.0049)) for name in names}
        monkeypatch.setattr("expo.against", lambda a, b, m, *rest: dict(zip(("value", "lo", "hi"), values[m])))
        return expo.guard(dict.fromkeys(names), dict.fromkeys(names), None)[2]

    assert failed() == []
    assert failed(**{metric: (1.0, 0.99, 1.0051)}) == [metric] and failed(**{metric: (1.006, None, None)}) == [metric]
    assert failed(logloss=(-0.01, -0.02, 0.001)) == ["logloss"] == failed(logloss=(-0.01, None, None))
    for moved in (-0.006, 0.006):
        assert failed(path_coverage90=(moved, moved - 0.01, moved + 0.01)) == ["path_coverage90"]


@pytest.mark.parametrize("gain, best, drawn", [(-0.01, math.inf, True), (-0.01, 0.5, False), (0.01, math.inf, False)])
def test_paths_on_val_are_drawn_where_they_can_decide(monkeypatch, gain, best, drawn):
    """Where the next bar holds and is the best so far; and a path that is worse then refuses."""
    asked = []
    one = dict(logloss=(0.6, None), da=(0.5, None), up_share=(0.5, None), mae=(1.0, None))
    val = object.__new__(expo.Validation)
    val.stage, val.t = types.SimpleNamespace(run=types.SimpleNamespace(best_val=best), base="base"), None
    val.next_bars = lambda model: one
    val.paths = lambda model: asked.append(model) or dict(path_crps=(1.0, None))
    scores = dict(logloss=dict(value=gain, lo=gain, hi=gain), mae=dict(value=1.0, lo=1.0, hi=1.0), path_crps=dict(value=1.1, lo=1.1, hi=1.1))
    monkeypatch.setattr("expo.against", lambda a, b, metric, *rest: scores[metric])
    score, holds, found, _ = val.judge("model")
    assert (score, asked) == (0.6, ["model", "base"] if drawn else [])
    assert found["failed"] == (["path_crps"] if drawn else ["logloss"] if gain > 0 else []) and holds == (not found["failed"])


def test_what_is_not_kept_is_scored_on_test_as_the_last_weights(checkpoint, tmp_path, call, monkeypatch):
    """Beside the base, which the file goes on to hold."""
    scored = []
    monkeypatch.setattr("backtest.print_versus", lambda columns, *rest, **how: scored.append(list(columns)))
    for name in ("expo", "rollout"):
        args = ["--ckpt", checkpoint, "--out", tmp_path / f"{name}.pt", "--steps", 1, "--batch_size", 2, "--paths", 2]
        status, out, err = call(name, *args, "--horizon", 2, "--lr", 1e-9, "--adam_lr", 1e-9)
        assert status == 0 and "the weights that are not kept" in out, err
    assert [columns[:2] for columns in scored] == 2 * [["reference", "last"]] + 2 * [["base", "last"]]
    result = Stage.result
    entry = read_checkpoint(str(tmp_path / "rollout.pt"))
    stage = types.SimpleNamespace(run=types.SimpleNamespace(best_val=math.inf), device="cpu",
                                  config=types.SimpleNamespace(out=str(tmp_path / "rollout.pt")))
    name, model = result(stage)
    assert name == "last" and all(torch.equal(v, entry["model"][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name, flags", [
    ("rollout", ["--select path", "--target chosen", "--temperature 0.7", "--candidates 3", "--walk 0.5", "--kl 1",
                 "--horizon 4", "--seed 1"]),
    ("expo", ["--pairs drawn --candidates 8", "--lam 0.5", "--beta 1", "--noise 0.5", "--seed 1"])])
def test_each_flag_of_a_stage_changes_its_weights(checkpoint, tmp_path, call, monkeypatch, name, flags):
    monkeypatch.setattr(f"{name}.Validation", lambda stage: types.SimpleNamespace(every=9, report=lambda *a: None))
    found = []
    for k, extra in enumerate(["", *flags]):
        args = ["--ckpt", checkpoint, "--out", tmp_path / f"{k}.pt", "--steps", 2, "--batch_size", 2, "--no-backtest"]
        status, _, err = call(name, *args, *extra.split())
        assert status == 0, err
        found.append(read_checkpoint(str(tmp_path / f"{k}.pt"))["model"])
    for a, b in itertools.combinations(found, 2):
        assert any(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("select, drawn_at", [("step", [0, 1, 2, 3, 4, 5]), ("path", [0, 0, 0, 0, 0, 5])])
def test_paths_grow_and_are_drawn_anew_each_round(checkpoint, tmp_path, call, monkeypatch, select, drawn_at):
    """Bars of the paths of each update, and how many updates their model had had."""
    real, horizons, updates = rollout.draw_paths, [], []

    def draw_paths(stage, slots, step):
        origins, walk = real(stage, slots, step)
        horizons.append(walk.shape[1])
        updates.append(stage.run.step)
        return origins, walk

    monkeypatch.setattr("rollout.draw_paths", draw_paths)
    monkeypatch.setattr("rollout.Validation", lambda stage: types.SimpleNamespace(every=9, report=lambda *a: None))
    args = ["--ckpt", checkpoint, "--out", tmp_path / "a.pt", "--select", select, "--steps", 6, "--batch_size", 2]
    assert call("rollout", *args, "--no-backtest")[0] == 0
    assert horizons == [3, 3, 6, 6, 10, 10] and updates == drawn_at


@pytest.mark.parametrize("name, flags, signum", [
    ("expo", "--pairs drawn --candidates 8", signal.SIGKILL), ("rollout", "--horizon 4", signal.SIGKILL),
    ("expo", "--pairs set", signal.SIGTERM), ("rollout", "--horizon 4 --target chosen --select path", signal.SIGTERM)])
def test_g6_ended_by_a_signal_and_resumed_a_stage_ends_with_the_same_weights(checkpoint, tmp_path, call, name, flags, signum):
    args = ["--ckpt", checkpoint, *flags.split(), *"--dtype fp32 --steps 24 --batch_size 2 --eval_every 24 --save_every 1 --no-backtest".split()]
    assert call(name, *args, "--out", tmp_path / "whole.pt")[0] == 0
    command = [sys.executable, os.path.join(ROOT, name + ".py"), *args, "--out", str(tmp_path / "broken.pt")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not os.path.exists(tmp_path / "broken.pt"):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signum)
    text = run.communicate(timeout=120)[0]
    assert run.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum]
    assert ("go on with --resume" in text) == (signum == signal.SIGTERM)
    entry = read_checkpoint(str(tmp_path / "broken.pt"))
    assert entry["step"] < 24 and entry["stage"] == name
    done = call(name, "--out", tmp_path / "broken.pt", "--resume")
    assert done[0] == 0, done[2]
    whole, broken = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "broken"))
    for part in ("model", "best"):
        assert all(torch.equal(whole[part][k], broken[part][k]) for k in whole[part])
    status, out, _ = call(name, "--out", tmp_path / "broken.pt", "--resume")
    assert status == 0 and "finished" in out


@pytest.mark.parametrize("name", ["expo", "rollout"])
def test_bad_steps_and_refusals(checkpoint, tmp_path, call, monkeypatch, name):
    module, loss = {"expo": (expo, "loss_of"), "rollout": (rollout, "rollout_loss")}[name]
    out = tmp_path / "a.pt"
    assert "--ckpt is missing" in complaint(call(name))
    assert call(name, "--ckpt", checkpoint, "--out", out, *FAST)[0] == 0
    assert "exists already" in complaint(call(name, "--ckpt", checkpoint, "--out", out, *FAST))
    assert "--lr 0.5" in complaint(call(name, "--out", out, "--resume", "--lr", 0.5))
    assert "resume it with that script" in complaint(call(name, "--out", checkpoint, "--resume"))
    entry = torch.load(out, weights_only=True)
    torch.save(entry | dict(step=2, data=entry["data"] | dict(reference="another")), tmp_path / "c.pt")
    assert "another --ckpt" in complaint(call(name, "--out", tmp_path / "c.pt", "--resume"))
    real = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    result = call(name, "--ckpt", checkpoint, "--out", tmp_path / "b.pt", *FAST, "--steps", 30, "--save_every", 1)
    assert "10 steps in a row" in complaint(result) and result[1].count("step skipped") == 10
    kept = read_checkpoint(str(tmp_path / "b.pt"))["model"]
    assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.mark.parametrize("name, flag, value, why", [
    ("expo", "--pairs", "best", "--pairs best"), ("expo", "--lam", 1.5, "--lam 1.5"), ("expo", "--candidates", 0, "--candidates 0"),
    ("expo", "--steps", 0, "--steps 0"), ("expo", "--ckpt", "none.pt", "no such file"),
    ("expo", "--block_size", 100000, "--block_size"), ("expo", "--dtype", "int8", "--dtype int8"),
    ("rollout", "--target", "luck", "--target luck"), ("rollout", "--select", "all", "--select all"), ("rollout", "--horizon", 0, "--horizon 0"),
    ("rollout", "--kl", -1, "--kl -1"),
    ("rollout", "--temperature", 0, "--temperature 0"), ("rollout", "--out", "no/such/a.pt", "folder"),
    ("rollout", "--paths", 1, "--paths 1")])
def test_bad_flags_get_one_line(checkpoint, tmp_path, call, monkeypatch, name, flag, value, why):
    monkeypatch.chdir(tmp_path)
    args = ["--ckpt", checkpoint] * (flag != "--ckpt")
    assert why in complaint(call(name, *args, *FAST, flag, value)) and os.listdir(tmp_path) == []
