"""Post-training: the losses against finite differences and naive loops, walks against a naive walk, and the two scripts as users run them."""
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import expo
import rollout
import backtest
import sample
from conftest import ROOT, complaint, script
from model import Model, close_table, load_checkpoint, read_checkpoint

FAST = "--steps 4 --batch_size 4 --eval_every 2 --no-backtest".split()


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture
def batch(loaded, market):
    model, tokenizer, meta = loaded
    series = data.load([str(market)])
    streams = data.make_streams(series, [data.tokenize(b, tokenizer) for b in series], "train", meta["splits"], 64, 4)
    coarse, fine, when, target = data.get_batch(streams, 0, 0)
    return [coarse, fine, when, *target]


def moved(model, seed=0):
    """A copy of the model with other weights."""
    other = Model(model.config)
    g = torch.Generator().manual_seed(seed)
    other.load_state_dict({k: v + 0.3 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v for k, v in model.state_dict().items()})
    return other


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


@pytest.mark.parametrize("lam, ref, share", [(0.0, 0.3, 0.8), (0.6, 0.3, 0.8), (0.6, 0.5, 0.1), (1.0, 0.3, 0.8)])
def test_two_tokens_converge_to_the_mixture_of_reference_and_data(lam, ref, share):
    """Token 0 is the better one in a `share` of the samples: the optimum is lam ref + (1 - lam) share."""
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    odds = torch.tensor(math.log(ref / (1 - ref)), dtype=torch.float64)
    optimizer = torch.optim.SGD([z], lr=5.0)
    for _ in range(3000):
        loss = share * expo.expo_loss(z, odds, lam) + (1 - share) * expo.expo_loss(-z, -odds, lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.sigmoid(z).item() == pytest.approx(lam * ref + (1 - lam) * share, abs=1e-6)


@pytest.mark.parametrize("pairs", ["set", "matched", "extreme"])
def test_with_lam_1_the_reference_stands_still(loaded, batch, pairs):
    model, tokenizer, _ = loaded
    same = Model(model.config)
    same.load_state_dict(model.state_dict())
    config = expo.Config(pairs=pairs, lam=1.0, candidates=16)
    loss, told = expo.loss_of(same, model, close_table(tokenizer), batch, 0, np.random.default_rng(0), config)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and abs(told["kl"]) < 1e-6
    assert max(p.grad.abs().max().item() for p in same.parameters() if p.grad is not None) < 1e-6


def test_the_set_loss_is_the_naive_one(loaded, batch):
    """Every labelled bar by itself; rises and falls averaged apart; bars in the noise without a label."""
    reference, tokenizer, _ = loaded
    model, table = moved(reference), close_table(tokenizer)
    config = expo.Config(pairs="set", lam=0.6, beta=0.5, noise=0.3)
    loss, told = expo.loss_of(model, reference, table, batch, 5, np.random.default_rng(0), config)
    coarse, fine, when, *target = batch
    with torch.no_grad():
        up, away = {True: [], False: []}, []
        logits = [m(coarse, fine, when, tuple(t.clamp(min=0) for t in target), 5)[:2] for m in (model, reference)]
        for b in range(coarse.shape[0]):
            for t in range(coarse.shape[1]):
                if target[0][b, t] < 0:
                    continue
                p, r = (a[0][b, t].softmax(-1).double() for a in logits)
                pf, rf = (a[1][b, t].softmax(-1).double() for a in logits)
                away.append((p * (p / r).log()).sum() + (pf * (pf / rf).log()).sum())
                move = math.sinh(table[target[0][b, t], target[1][b, t]])
                if abs(move) > 0.3:
                    rises = move > 0
                    win, ref = ((a[model.up_mask] if rises else a[~model.up_mask]).sum() for a in (p, r))
                    up[rises].append((win - (0.6 * ref + 0.4))**2)
    expected = (np.mean(up[True]) + np.mean(up[False])) / 2
    assert told["loss"] == pytest.approx(expected, rel=1e-4) and told["kl"] == pytest.approx(float(np.mean(away)), rel=1e-3)
    assert loss.item() == pytest.approx(expected + 0.5 * float(np.mean(away)), rel=1e-3)
    assert len(up[True]) != len(up[False])


@pytest.mark.parametrize("pairs", ["set", "matched"])
def test_a_batch_without_a_label_costs_only_its_kl(loaded, batch, pairs):
    reference, tokenizer, _ = loaded
    loss, told = expo.loss_of(moved(reference), reference, close_table(tokenizer), batch, 0, np.random.default_rng(0), expo.Config(pairs=pairs, noise=1e9, beta=0.5))
    loss.backward()
    assert told["loss"] == 0 and loss.item() == pytest.approx(0.5 * told["kl"]) and told["kl"] > 0


@pytest.mark.parametrize("kind", ["extreme", "matched"])
def test_pairs_are_the_naive_ones(loaded, kind):
    model, tokenizer, _ = loaded
    chance = np.random.default_rng(1)
    table = torch.from_numpy(np.arcsinh(chance.uniform(-1, 5, (64, 32))).astype(np.float32))  # a rise too far is at times worse than a fall
    h = torch.from_numpy(chance.normal(size=(11, model.config.n_embd)).astype(np.float32))
    move = torch.from_numpy(chance.normal(size=11).astype(np.float32))
    u = torch.from_numpy(chance.random((11, 24, 2), np.float32))
    pair, found = expo.draw_pairs(model, table, h, move, u, kind)
    for n in range(11):
        coarse, fine = model.sample(h[n].expand(24, -1), u=u[n])
        told = [math.sinh(table[c, f]) for c, f in zip(coarse, fine)]
        right = [(x > 0) == (move[n].item() > 0) for x in told]
        score = [r - 0.25 * abs(x - move[n].item()) for r, x in zip(right, told)]
        w = max(range(24), key=lambda i: score[i])
        wrong = [i for i in range(24) if not right[i]]
        l = min(range(24), key=lambda i: score[i]) if kind == "extreme" else min(wrong, key=lambda i: abs(abs(told[i]) - abs(told[w]))) if wrong else None
        assert found[n] == (l is not None and (kind == "extreme" or right[w]))
        if found[n]:
            assert pair[n].tolist() == [[coarse[w], fine[w]], [coarse[l], fine[l]]]


def test_candidates_come_as_often_as_the_reference_says(loaded):
    model, tokenizer, _ = loaded
    h = torch.randn(1, model.config.n_embd, generator=torch.Generator().manual_seed(3)) * 3
    u = torch.rand(1, 200_000, 2, generator=torch.Generator().manual_seed(4))
    coarse, fine = model.sample(h.expand(200_000, -1), u=u[0])
    p = model.coarse_logits(h[0]).softmax(-1)
    got = torch.bincount(coarse, minlength=len(p)) / 200_000
    assert (got - p).abs().max() < 5 * (p * (1 - p) / 200_000).sqrt().max()
    c = p.argmax()
    q = model.fine_logits(h[0], c).softmax(-1)
    part = fine[coarse == c]
    got = torch.bincount(part, minlength=len(q)) / len(part)
    assert (got - q).abs().max() < 5 * (q * (1 - q) / len(part)).sqrt().max()


def test_log_odds_of_a_pair_and_of_the_sets(loaded):
    model = loaded[0]
    h = torch.randn(5, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    pair = torch.randint(0, 32, (5, 2, 2), generator=torch.Generator().manual_seed(1))
    got = expo.log_odds(model, h, model.coarse_logits(h).log_softmax(-1), pair)
    up = expo.logit_up(model, model.coarse_logits(h).log_softmax(-1)).sigmoid()
    for n in range(5):
        p = model.coarse_logits(h[n]).softmax(-1)
        both = [(p[c] * model.fine_logits(h[n], c).softmax(-1)[f]).item() for c, f in pair[n]]
        assert got[n].item() == pytest.approx(math.log(both[0] / both[1]), abs=1e-4)
        assert up[n].item() == pytest.approx(p[model.up_mask].sum().item(), abs=1e-5)


# ---- rollout: the walk

@pytest.fixture(scope="module")
def walks(loaded, market):
    """(series, streams, origins) of a batch of windows of 64 real bars and up to 5 bars of walk."""
    model, tokenizer, meta = loaded
    series = data.load([str(market)])
    streams = data.make_streams(series, [data.tokenize(b, tokenizer) for b in series], "train", meta["splits"], 64 + 5 - 1, 3)
    return series, streams, rollout.origins_of(streams, series, *data.draw_windows(streams, 0, 0), 4, 5)


def state_of(model, origins):
    with torch.no_grad():
        return model.prefill(*origins.context[:3], 7)


def test_origins_are_what_the_window_says(loaded, walks):
    model, tokenizer, _ = loaded
    series, streams, origins = walks
    which, ends = data.draw_windows(streams, 0, 0)
    coarse, fine, when, target = origins.context
    assert coarse.shape == (3, 64) and origins.times.shape == (3, 4) and origins.truth.shape == (3, 4)
    for n, (i, e) in enumerate(zip(which, ends)):
        bars, o = series[i], e - 5
        x, state = data.features(bars[:o + 1])
        assert when[n, -1] == bars.time[o] and target[0][n, -1] == -1
        assert coarse[n].tolist() == tokenizer.encode(torch.from_numpy(x[-64:]))[0].tolist()
        np.testing.assert_allclose(origins.truth[n], [math.log(bars.ohlcva[o + k, 3] / bars.ohlcva[o, 3]) for k in (1, 2, 3, 4)], rtol=1e-12)
        for got, want in zip(data.State.stack([state.anchored()]).scales(), (f[n] for f in origins.state.scales())):
            np.testing.assert_allclose(want, got[0], rtol=1e-4)


def test_the_future_shapes_the_choice_and_nothing_else(loaded, walks):
    """Other bars after the origin: the same context, stamps, scale and, without an oracle, the same walk."""
    model, tokenizer, _ = loaded
    series, streams, before = walks
    which, ends = data.draw_windows(streams, 0, 0)
    other = []
    for i, bars in enumerate(series):
        ohlcva, time = bars.ohlcva.copy(), bars.time.copy()
        for e in ends[which == i]:
            ohlcva[e - 4:e + 1] *= 1.5
            time[e - 4:] += 17
        other.append(data.Bars(bars.symbol, time, ohlcva))
    fresh = data.Streams(streams.tokens, [b.time for b in other], streams.targets, streams.block_size, streams.batch_size, streams.whole)
    only = [k for k in range(3) if not any(which[k] == which[j] and ends[j] < ends[k] for j in range(3))]       # no changed bar in their context
    after = rollout.origins_of(fresh, other, which, ends, 4, 5)
    assert not np.allclose(after.truth[only], before.truth[only])
    assert torch.equal(after.times[only], before.times[only])
    for a, b in zip(after.context[:3], before.context[:3]):
        assert torch.equal(a[only], b[only])
    for name in data.State.__dataclass_fields__:
        assert np.array_equal(getattr(after.state, name)[only], getattr(before.state, name)[only])
    u = torch.rand(3, 6, 4, 2, generator=torch.Generator().manual_seed(0))
    walk = lambda origins, mode: rollout.walk(model, tokenizer, state_of(model, origins), origins, mode, u, 1.5)
    assert torch.equal(walk(after, "random")[only], walk(before, "random")[only])
    assert not torch.equal(walk(after, "oracle")[only], walk(before, "oracle")[only])


@pytest.mark.parametrize("mode", ["oracle", "random"])
def test_a_walk_is_the_naive_one(loaded, walks, mode):
    """Each step from a parallel forward over context and walk, each candidate decoded by itself."""
    model, tokenizer, _ = loaded
    _, _, origins = walks
    K, H = 6, 4
    u = torch.rand(3, K, H, 2, generator=torch.Generator().manual_seed(0))
    got = rollout.walk(model, tokenizer, state_of(model, origins), origins, mode, u, 1.5)
    assert got.shape == (3, 1, H, 2)
    for b in range(3):
        coarse, fine, when = (a[b:b + 1] for a in origins.context[:3])
        state, close = origins.state.map(lambda f: f[b, 0]), origins.state.close[b, 0]
        for k in range(H):
            with torch.no_grad():
                h = torch.nn.functional.rms_norm(model.trunk(coarse, fine, when, 7)[0][0, -1], (model.config.n_embd,))
                tokens = [model.sample(h, 1.5, u=u[b, j, k]) for j in range(K)]
            decoded = [data.inverse(tokenizer.decode(*t).numpy()[None], state) for t in tokens]
            error = [abs(math.log(bar[0, 3] / close) - origins.truth[b, k]) for bar, _ in decoded]
            pick = int(np.argmin(error)) if mode == "oracle" else 0
            assert got[b, 0, k].tolist() == [int(v) for v in tokens[pick]]
            state = decoded[pick][1]
            coarse, fine = (torch.cat((a, t.view(1, 1)), 1) for a, t in zip((coarse, fine), tokens[pick]))
            when = torch.cat((when, origins.times[b:b + 1, k:k + 1]), 1)


def test_expert_keeps_the_quarter_with_the_least_path_error(loaded, walks):
    model, tokenizer, _ = loaded
    _, _, origins = walks
    u = torch.rand(3, 8, 4, 2, generator=torch.Generator().manual_seed(0))
    got = rollout.walk(model, tokenizer, state_of(model, origins), origins, "expert", u, 1.0)
    assert got.shape == (3, 2, 4, 2)
    every = torch.stack(sample.generate(model, state_of(model, origins).repeat(8), origins.times.repeat_interleave(8, 0), u.flatten(0, 1)), -1).view(3, 8, 4, 2)
    for b in range(3):
        state, error = origins.state.map(lambda f: f[b, 0]), []
        for walk in every[b]:
            bars, _ = data.inverse(tokenizer.decode(walk[:, 0], walk[:, 1]).numpy(), state)
            error.append(np.mean([abs(math.log(c / state.close) - y) for c, y in zip(bars[:, 3], origins.truth[b])]))
        assert got[b].tolist() == [every[b, i].tolist() for i in np.argsort(error, kind="stable")[:2]]


def test_the_loss_of_walks_is_the_naive_one(loaded, walks):
    base, tokenizer, _ = loaded
    model = moved(base)
    _, _, origins = walks
    u = torch.rand(3, 8, 4, 2, generator=torch.Generator().manual_seed(0))
    tokens = rollout.walk(model, tokenizer, state_of(model, origins), origins, "expert", u, 1.0)
    config = rollout.Config(kl=0.3, plain=0.0)
    loss, told = rollout.loss_of(model, base, origins, tokens, 7, config)
    own, away, real = [], [], []
    with torch.no_grad():
        for b in range(3):
            for walk in tokens[b]:
                coarse, fine = (torch.cat((origins.context[i][b], walk[:-1, i]))[None] for i in (0, 1))
                when = torch.cat((origins.context[2][b], origins.times[b, :-1]))[None]
                given = torch.cat((origins.context[3][0][b, :-1].clamp(min=0), walk[:, 0]))[None]
                pi, ref = (m(coarse, fine, when, (given, torch.zeros_like(given)), 7)[:2] for m in (model, base))
                for k in range(4):
                    at = 63 + k
                    logs = [(p[0, at].log_softmax(-1), q[0, at].log_softmax(-1)) for p, q in zip(pi, ref)]
                    own.append((k + 1) / 10 * -sum(p[walk[k, i]].item() for i, (p, _) in enumerate(logs)))
                    away.append(sum((p.exp() * (p - q)).sum().item() for p, q in logs))
    assert told["loss"] == pytest.approx(4 * np.mean(own), rel=1e-4) and told["kl"] == pytest.approx(np.mean(away), rel=1e-3)
    assert loss.item() == pytest.approx(4 * np.mean(own) + 0.3 * np.mean(away), rel=1e-4)
    plain, told = rollout.loss_of(model, base, origins, None, 7, rollout.Config(mode="plain"))
    coarse, fine, when, target = origins.context
    with torch.no_grad():
        want = model(coarse, fine, when, tuple(target), 7)[2]
    assert plain.item() == pytest.approx(want.item(), rel=1e-5)
    both, _ = rollout.loss_of(model, base, origins, tokens, 7, rollout.Config(kl=0.3, plain=0.5))
    assert both.item() == pytest.approx(loss.item() + 0.5 * want.item(), rel=1e-4)


# ---- the scripts

@pytest.mark.parametrize("name, flags", [("expo", ["--pairs", "set"]), ("expo", ["--pairs", "matched", "--candidates", 16]), ("expo", ["--pairs", "plain"]),
                                         ("rollout", ["--mode", "oracle"]), ("rollout", ["--mode", "expert"]), ("rollout", ["--mode", "plain"])])
def test_a_stage_writes_a_checkpoint_that_forecasts(checkpoint, tmp_path, call, name, flags):
    before = open(checkpoint, "rb").read()
    status, out, err = call(name, "--ckpt", checkpoint, "--out", tmp_path / "a.pt", *FAST, *flags, "--horizons" if name == "rollout" else "--noise", "2,3" if name == "rollout" else 0.2)
    assert status == 0 and open(checkpoint, "rb").read() == before, err
    entry, base = read_checkpoint(str(tmp_path / "a.pt")), read_checkpoint(checkpoint)
    assert entry["stage"] == name and entry["step"] == 4 and entry["splits"] == base["splits"]
    assert [m["step"] for m in entry["metrics"] if m["stage"] == name] == [2, 4] and entry["metrics"][:len(base["metrics"])] == base["metrics"]
    assert any(not torch.equal(v, base["best"][k]) for k, v in entry["model"].items())
    status, out, err = call("sample", "--ckpt", tmp_path / "a.pt", "--paths", 5, "--horizon", 2, "--plot_loss", tmp_path / "l.svg")
    assert status == 0 and "symbol" in out, err


@pytest.mark.parametrize("name, metric", [("expo", "log loss"), ("rollout", "path CRPS")])
def test_ends_with_the_paired_backtest(checkpoint, tmp_path, call, name, metric):
    args = ["--ckpt", checkpoint, "--out", tmp_path / "a.pt", "--steps", 2, "--batch_size", 2, "--paths", 4, *(["--horizons", "2"] if name == "rollout" else ["--horizon", 2])]
    status, out, err = call(name, *args)
    assert status == 0, err
    table = out[out.index("test, which"):]
    assert metric in table and " result to " in table and max(map(len, table.splitlines())) <= 90


@pytest.mark.parametrize("name", ["expo", "rollout"])
def test_the_base_is_kept_where_nothing_is_better(checkpoint, tmp_path, call, monkeypatch, name):
    real, calls = backtest.drawn_scores, []

    def ever_worse(*args, **kwargs):        # paths, MAE and CRPS; a better log loss must not make up for them
        calls.append(1)
        scale = lambda k: 1 / len(calls) if k == "logloss" else len(calls)
        return {k: (v * scale(k), r * scale(k)) for k, (v, r) in real(*args, **kwargs).items()}
    monkeypatch.setattr(sample, "drawn_scores", ever_worse)
    status, out, err = call(name, "--ckpt", checkpoint, "--out", tmp_path / "a.pt", *FAST)
    assert status == 0 and "holds the" in out, err
    entry = torch.load(tmp_path / "a.pt", weights_only=True)  # and a resumed run says so too
    torch.save(entry | dict(step=2), tmp_path / "a.pt")
    status, out, err = call(name, "--out", tmp_path / "a.pt", "--resume", "--no-backtest")
    assert status == 0 and "holds the" in out, (out, err)
    kept, base = read_checkpoint(str(tmp_path / "a.pt"))["best"], read_checkpoint(checkpoint)["best"]
    assert all(torch.equal(kept[k], base[k]) for k in base)


@pytest.mark.parametrize("name, flags", [("expo", []), ("expo", ["--pairs", "extreme", "--candidates", "8"]), ("rollout", ["--horizons", "2,4"])])
def test_g6_killed_and_resumed_ends_with_the_same_weights(checkpoint, tmp_path, call, name, flags):
    args = ["--ckpt", checkpoint, *map(str, flags), "--steps", 8, "--batch_size", 2, "--eval_every", 4, "--save_every", 1, "--no-backtest"]
    assert script(name + ".py", *args, "--out", tmp_path / "whole.pt").returncode == 0
    run = subprocess.Popen([sys.executable, os.path.join(ROOT, name + ".py"), *map(str, args), "--out", str(tmp_path / "broken.pt")], stdout=subprocess.DEVNULL)
    while not os.path.exists(tmp_path / "broken.pt"):
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    done = script(name + ".py", "--out", tmp_path / "broken.pt", "--resume")
    assert done.returncode == 0, done.stderr
    whole, broken = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "broken"))
    for part in ("model", "best"):
        assert all(torch.equal(whole[part][k], broken[part][k]) for k in whole[part])
    status, out, _ = call(name, "--out", tmp_path / "broken.pt", "--resume")
    assert status == 0 and "finished" in out


@pytest.mark.parametrize("name", ["expo", "rollout"])
def test_sigterm_saves_and_exits_143(checkpoint, tmp_path, name):
    out = tmp_path / "a.pt"
    run = subprocess.Popen([sys.executable, os.path.join(ROOT, name + ".py"), "--ckpt", checkpoint, "--out", str(out), "--steps", "5000", "--batch_size", "2",
                            "--save_every", "1", "--no-backtest"], stdout=subprocess.PIPE, text=True)
    while not out.exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    text = run.communicate(timeout=120)[0]
    assert run.returncode == 143 and "go on with --resume" in text and read_checkpoint(str(out))["stage"] == name


@pytest.mark.parametrize("name", ["expo", "rollout"])
def test_bad_steps_and_refusals(checkpoint, market, tmp_path, call, monkeypatch, name):
    module = {"expo": expo, "rollout": rollout}[name]
    out = tmp_path / "a.pt"
    assert call(name, "--ckpt", checkpoint, "--out", out, *FAST)[0] == 0
    assert "exists already" in complaint(call(name, "--ckpt", checkpoint, "--out", out, *FAST))
    assert "--lr 0.5" in complaint(call(name, "--out", out, "--resume", "--lr", 0.5))
    assert "resume it with that script" in complaint(call(name, "--out", checkpoint, "--resume"))
    real = module.loss_of
    monkeypatch.setattr(module, "loss_of", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    status, text, err = call(name, "--ckpt", checkpoint, "--out", tmp_path / "b.pt", *FAST, "--steps", 30, "--save_every", 1)
    assert "10 steps in a row" in complaint((status, text, err)) and text.count("step skipped") == 10
    kept = read_checkpoint(str(tmp_path / "b.pt"))["model"]
    assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.mark.parametrize("name, flag, value, why", [
    ("expo", "--pairs", "best", "--pairs best"), ("expo", "--lam", 1.5, "--lam 1.5"), ("expo", "--candidates", 1, "--candidates 1"), ("expo", "--steps", 0, "--steps 0"),
    ("expo", "--ckpt", "none.pt", "no such file"), ("expo", "--block_size", 100000, "--block_size"), ("expo", "--dtype", "int8", "--dtype int8"),
    ("rollout", "--mode", "luck", "--mode luck"), ("rollout", "--horizons", "10,3", "--horizons 10,3"), ("rollout", "--horizons", "0", "--horizons 0"),
    ("rollout", "--kl", -1, "--kl -1"), ("rollout", "--temperature", 0, "--temperature 0"), ("rollout", "--out", "no/such/a.pt", "folder"), ("rollout", "--paths", 1, "--paths 1"),
])
def test_bad_flags_get_one_line(checkpoint, tmp_path, call, monkeypatch, name, flag, value, why):
    monkeypatch.chdir(tmp_path)
    args = ["--ckpt", checkpoint] * (flag != "--ckpt")
    assert why in complaint(call(name, *args, *FAST, flag, value)) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["expo", "rollout"])
def test_a_missing_checkpoint_and_other_bars_get_one_line(checkpoint, tmp_path, call, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "--ckpt is missing" in complaint(call(name))
    assert call(name, "--ckpt", checkpoint, "--out", "a.pt", *FAST)[0] == 0
    entry = torch.load("a.pt", weights_only=True)
    torch.save(entry | dict(step=2, data=entry["data"] | dict(reference="another")), "b.pt")
    assert "another --ckpt" in complaint(call(name, "--out", "b.pt", "--resume"))


def test_walks_toward_noise_teach_nothing(tmp_path, call, monkeypatch):
    """The truth in training replaced by a random walk of its own: the result is no better than its base."""
    bars = data.synthetic(n_symbols=2, n_bars=8000, signal=0.2)[0]
    data.write_folder(bars, tmp_path / "bars")
    size = "--tok_steps 100 --steps 150 --n_layer 2 --n_head 4 --n_embd 32 --block_size 64 --coarse_bits 6 --fine_bits 5 --lr 3e-3".split()
    assert call("pretrain", "--data", tmp_path / "bars", "--out", tmp_path / "base.pt", *size)[0] == 0
    real = rollout.origins_of

    def noisy(*args):
        origins = real(*args)
        rng = np.random.default_rng(int(origins.times[0, 0]))
        origins.truth = np.cumsum(rng.normal(0, np.abs(origins.truth).mean(), origins.truth.shape), 1)
        return origins
    monkeypatch.setattr(rollout, "origins_of", noisy)
    status, out, err = call("rollout", "--ckpt", tmp_path / "base.pt", "--out", tmp_path / "a.pt", "--steps", 60, "--batch_size", 8, "--plain", 0, "--lr", 1e-3,
                            "--horizons", "2,4", "--no-backtest", "--eval_every", 60)
    assert status == 0, err
    last = [m for m in read_checkpoint(str(tmp_path / "a.pt"))["metrics"] if m["stage"] == "rollout"][-1]["path_crps_ratio"]
    assert last["lo"] is not None and last["hi"] > 1, last
