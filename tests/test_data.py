"""Bars, features, splits and batches, against naive forms and against what users feed in."""
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from conftest import ROOT
from data import Bars, UserError


def random_bars(n, seed=0, volatility=0.01, holes=True):
    rng = np.random.default_rng(seed)
    sigma = volatility * np.exp(rng.normal(0, 0.5, n))
    close = 50 * np.exp(np.cumsum(rng.standard_t(4, n) * sigma))
    open_ = np.append(close[0], close[:-1]) * np.exp(rng.normal(0, 0.2, n) * sigma)
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, 0.5, n)) * sigma)
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, 0.5, n)) * sigma)
    volume = np.exp(rng.normal(8, 1, n))
    if holes:
        volume[rng.random(n) < 0.03] = 0.0
        volume[rng.random(n) < 0.02] = np.nan
    amount = volume * (high + low + close) / 3
    return Bars("X", np.arange(n) * 60, np.stack([open_, high, low, close, volume, amount], axis=1))


# ---- folders and caches

def test_damaged_folders_and_caches(tmp_path):
    class Tokens:  # codes of nothing in particular
        def encode(self, x):
            return x[:, 0].long() * 0 + 1, x[:, 0].long() * 0 + 2

        def state_dict(self):
            return {"a": torch.zeros(1)}

    folder = tmp_path / "bars"
    data.write_folder(data.synthetic(n_symbols=1, n_bars=600)[0], str(folder))
    [bars] = data.load(str(folder))
    want = np.array(data.tokenize(bars, Tokens()))
    [cache] = folder.glob("*.tokens-*.npy")
    for damage in (cache.read_bytes()[:200], b"", b"no array"):
        cache.write_bytes(damage)
        np.testing.assert_array_equal(data.tokenize(bars, Tokens()), want)
    np.save(cache, want[:100])
    np.testing.assert_array_equal(data.tokenize(bars, Tokens()), want)
    np.save(folder / "000000.ohlcva.npy", np.asarray(bars.ohlcva[:50]))
    for name in (None, "5", "[1, 2]", "{"):
        if name:
            (folder / "symbols.json").write_text(name)
        with pytest.raises(UserError, match="not a whole data set"):
            data.load(str(folder))


# ---- features

def naive_features(bars):
    """Bar by bar from the definition, in float64, without asinh's rounding."""
    a, x = 0.5 ** (1 / 32), np.zeros((len(bars), 6))
    tr, lv, dev, vw = [], [], [], []  # (bar, value)

    def mean(pairs, t):
        w = np.array([a ** (t - i) for i, _ in pairs])
        return (w * np.array([v for _, v in pairs])).sum() / w.sum() if pairs else None
    for t in range(1, len(bars)):
        o, h, l, c, v, m = bars.ohlcva[t]
        prev = bars.ohlcva[t - 1, 3]
        s, level, d, g = max(mean(tr, t) or 0, 1e-5), mean(lv, t), max(mean(dev, t) or 0, 1e-2), mean(vw, t) or 0
        x[t, :4] = np.log(c / prev) / s, np.log(o / prev) / s, np.log(h / max(o, c)) / s, np.log(min(o, c) / l) / s
        tr.append((t, np.log(max(h, prev) / min(l, prev))))
        if v > 0:
            x[t, 4] = (np.log1p(v) - (level or 0)) / d
            x[t, 5] = (np.log(m / (v * c)) - g) / s if m > 0 else 0
            if level is not None:
                dev.append((t, abs(np.log1p(v) - level)))
            lv.append((t, np.log1p(v)))
            if m > 0:
                vw.append((t, np.log(m / (v * c))))
    return np.arcsinh(x)


def test_features_equal_the_definition():
    bars = random_bars(400)
    bars.ohlcva[7, 5] = np.nan
    x, _ = data.features(bars)
    assert x.dtype == np.float32 and (x[0] == 0).all()
    assert (x[np.isnan(bars.ohlcva[:, 4]) | (bars.ohlcva[:, 4] == 0)][:, 4:] == 0).all()
    np.testing.assert_allclose(x, naive_features(bars), atol=2e-6)


@pytest.mark.parametrize("t", [0, 1, 31, 511, 512, 5000, 9999])
def test_g1_no_feature_sees_a_later_bar(t):
    bars = random_bars(10_000)
    x, _ = data.features(bars)
    changed = Bars("X", bars.time, bars.ohlcva.copy())
    changed.ohlcva[t] *= 1.7
    y, _ = data.features(changed)
    np.testing.assert_array_equal(x[:t].view(np.uint32), y[:t].view(np.uint32))
    z, _ = data.features(bars[:max(t, 1)])  # nor does it matter that later bars exist
    np.testing.assert_array_equal(x[:max(t, 1)].view(np.uint32), z.view(np.uint32))
    if 0 < t:
        assert (x[t] != y[t]).any()


def test_the_sign_of_the_close_feature_is_the_sign_of_the_move():
    bars = random_bars(5000, volatility=1e-3)
    still = np.random.default_rng(0).random(5000) < 0.3
    still[::512] = True  # where features start a block, too
    for t in np.flatnonzero(still)[1:]:
        bars.ohlcva[t:, :4] *= bars.ohlcva[t - 1, 3] / bars.ohlcva[t, 3]
        bars.ohlcva[t, 3] = bars.ohlcva[t - 1, 3]
    x, _ = data.features(bars)
    np.testing.assert_array_equal(np.sign(x[1:, 0]), np.sign(np.diff(bars.ohlcva[:, 3])))


def test_features_go_on_from_a_state():
    bars = random_bars(20_000)
    whole, end = data.features(bars)
    head, state = data.features(bars[:12_345])
    tail = [x for x, state in data.feature_blocks(bars[12_345:], state)]
    np.testing.assert_allclose(np.concatenate([head, *tail]), whole, atol=3e-6)


def test_g2_round_trip_over_200_000_bars():
    bars = random_bars(200_000, holes=False)
    x, end = data.features(bars)
    _, first = data.features(bars[:1])
    back, state = data.inverse(x[1:], first)
    np.testing.assert_allclose(back[:, :4], bars.ohlcva[1:, :4], rtol=1e-6)
    np.testing.assert_allclose(back[:, 4:], bars.ohlcva[1:, 4:], rtol=1e-4)
    for k in ("close", "s", "m", "d", "g"):
        np.testing.assert_allclose(getattr(state, k), getattr(end, k), rtol=1e-4)


def test_g2_round_trip_with_days_without_volume_and_without_amounts():
    bars = random_bars(3000)
    bars.ohlcva[:, 5] = np.nan
    x, _ = data.features(bars)
    _, first = data.features(bars[:40])
    back, _ = data.inverse(x[40:], first)
    np.testing.assert_allclose(back[:, :4], bars.ohlcva[40:, :4], rtol=1e-6)
    np.testing.assert_allclose(back[:, 4], np.nan_to_num(bars.ohlcva[40:, 4]), rtol=1e-4)


def test_inverse_is_the_same_for_each_path_of_many():
    _, state = data.features(random_bars(100))
    x = np.random.default_rng(0).normal(size=(2, 3, 50, 6))
    many, end = data.inverse(x, state)
    one, _ = data.inverse(x[1, 2], state)
    assert many.shape == (2, 3, 50, 6) and end.close.shape == (2, 3)
    np.testing.assert_array_equal(many[1, 2], one)


@pytest.mark.parametrize("size", [1, 10, 100, 1e30])
def test_g2_any_channels_give_valid_candles(size):
    _, state = data.features(random_bars(100))
    x = np.random.default_rng(1).standard_t(2, size=(20, 300, 6)) * size
    ohlcva, _ = data.inverse(x, state)
    o, h, l, c, v, a = np.moveaxis(ohlcva, -1, 0)
    assert np.isfinite(ohlcva).all() and (ohlcva[..., :4] > 0).all() and (v >= 0).all() and (a >= 0).all()
    assert (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all()
    assert np.abs(np.diff(np.log(c), axis=1)).max() <= np.log(10) * (1 + 1e-9)


def test_inverse_refuses_what_is_not_finite():
    _, state = data.features(random_bars(100))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError):
            data.inverse(np.full((1, 6), bad), state)


def test_generated_scales_stay_near_their_origin():
    _, state = data.features(random_bars(100))
    s0, _, d0, _ = state.scales()
    for x in (np.full((2000, 6), 4.0), np.full((2000, 6), -4.0), np.zeros((2000, 6))):
        _, end = data.inverse(x, state.anchored())
        s, _, d, _ = end.scales()
        assert s0 / 8 * 0.999 <= s <= s0 * 8.001 and d0 / 8 * 0.999 <= d <= d0 * 8.001
        _, free = data.inverse(x, state)
        assert not s0 / 8 <= free.scales()[0] <= s0 * 8


def test_no_volume_in_history_gives_none_and_missing_amounts_are_volume_times_close():
    bars = random_bars(100, holes=False)
    x = np.random.default_rng(2).normal(size=(20, 6))
    bars.ohlcva[:, 5] = np.nan
    out, _ = data.inverse(x, data.features(bars)[1])
    np.testing.assert_allclose(out[:, 5], out[:, 4] * out[:, 3])
    bars.ohlcva[:, 4] = np.nan
    out, _ = data.inverse(x, data.features(bars)[1])
    assert (out[:, 4:] == 0).all()


# ---- splits and batches

def panel():
    series = [random_bars(n, seed=n) for n in (1500, 700, 40, 3)]
    series[1].time = series[1].time + 800 * 60
    rng = np.random.default_rng(5)
    return series, [rng.integers(0, 64, (len(b), 2)).astype(np.int16) for b in series]


def test_splits_are_by_time_stamp_over_all_symbols():
    series, _ = panel()
    val, test = data.split_borders(series)
    stamps = np.unique(np.concatenate([b.time for b in series]))
    assert (val, test) == (stamps[int(0.8 * len(stamps))], stamps[int(0.9 * len(stamps))])
    for bars in series:
        ranges = [data.targets_of(bars, s, (val, test)) for s in ("train", "val", "test")]
        assert all((bars.time[f:l] < val).all() for f, l in ranges[:1])
        assert all(((bars.time[f:l] >= val) & (bars.time[f:l] < test)).all() for f, l in ranges[1:2])
        assert all((bars.time[f:l] >= test).all() for f, l in ranges[2:])
        assert min(f for f, _ in ranges) >= data.CONTEXT
    assert data.split_borders(series, "1970-01-01 10:00", "1970-01-01T15:00:00") == (36_000, 54_000)
    for bad in (("1970-01-02", "1970-01-01"), ("never", None), ("1960-01-01", None)):
        with pytest.raises(UserError):
            data.split_borders(series, *bad)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches(split):
    series, tokens = panel()
    borders = data.split_borders(series)
    streams = data.make_streams(series, tokens, split, borders, 64, 7)
    seen = set()
    for step in range(60):
        coarse, fine, time, (tc, tf) = whole = data.get_batch(streams, 9, step)
        start = time[:, 0].tolist()
        assert coarse.shape == (7, 64) and coarse.dtype == torch.int64
        parts = [data.get_batch(streams, 9, step, rank, 3) for rank in range(3)]
        for r in range(3):  # rank r takes rows r::world
            assert torch.equal(parts[r][0], coarse[r::3]) and torch.equal(parts[r][3][1], tf[r::3])
        for b in range(7):
            [bars] = [s for s in series if len(s) > 64 and start[b] in s.time and time[b, -1].item() in s.time
                      and np.array_equal(tokens[[x is s for x in series].index(True)][np.searchsorted(s.time, start[b]):][:64, 0], coarse[b].numpy())]
            i = np.searchsorted(bars.time, start[b])
            first, last = data.targets_of(bars, split, borders)
            own = tokens[[x is bars for x in series].index(True)]
            for k in range(64):
                target = i + k + 1
                expected = own[target] if first <= target < last else (-1, -1)
                assert (tc[b, k], tf[b, k]) == tuple(expected)
                seen.add((bars.symbol, len(bars), target)) if tc[b, k] >= 0 else None
            if split == "train":
                assert (tc[b] >= 0).all()
    assert len(seen) > 50
    again = data.get_batch(streams, 9, 5)
    assert torch.equal(again[0], data.get_batch(streams, 9, 5)[0]) and not torch.equal(again[0], data.get_batch(streams, 10, 5)[0])


def test_tiles_hold_each_val_target_once():
    series, tokens = panel()
    borders = data.split_borders(series)
    streams = data.make_streams(series, tokens, "val", borders, 64, 1)
    tiles = data.tiles(streams, 10_000)
    _, _, time, (tc, _) = data.gather(streams, *map(np.array, zip(*tiles)))
    expected = sum(max(0, l - f) for f, l in streams.targets if l > 64)
    assert (tc >= 0).sum() == expected and len(data.tiles(streams, 2)) == 2


class FakeTokenizer:
    """Tokens straight from the features; counts its calls."""
    calls = 0

    def encode(self, x):
        self.calls += 1
        return (x[..., 0] > 0).long(), (x[..., 1] > 0).long()

    def state_dict(self):
        return {"w": torch.zeros(2)}


def test_memory_mapped_form_holds_the_same_bars_and_caches_tokens(tmp_path):
    series = [Bars("B", np.arange(9000), random_bars(9000).ohlcva), Bars("A", np.arange(100), random_bars(100).ohlcva)]
    data.write_folder([series[0][:4000], series[1], series[0][3000:]], tmp_path / "set")  # B goes on in another file
    loaded = data.load(str(tmp_path / "set"))
    assert [b.symbol for b in loaded] == ["B", "A"] and isinstance(loaded[0].ohlcva, np.memmap)
    for a, b in zip(series, loaded):
        np.testing.assert_array_equal(a.time, b.time)
        np.testing.assert_array_equal(a.ohlcva, b.ohlcva)
    assert data.fingerprint(series) == data.fingerprint(loaded)
    tokenizer = FakeTokenizer()
    mapped = data.tokenize(loaded[0], tokenizer)
    calls = tokenizer.calls
    np.testing.assert_array_equal(data.tokenize(loaded[0], tokenizer), data.tokenize(series[0], FakeTokenizer()))
    assert tokenizer.calls == calls and isinstance(mapped, np.memmap)
    with pytest.raises(UserError, match="already"):
        data.write_folder(series, tmp_path / "set")


# ---- the synthetic market

def wick_rule(bars):
    """The planted rule read off the bars: called right, of the bars that moved."""
    o, h, l, c = bars.ohlcva[:, :4].T
    says_up = np.minimum(o, c) / l > h / np.maximum(o, c)
    move = np.diff(c)
    return (says_up[:-1] == (move > 0))[move != 0]


def test_synthetic_market_has_the_edge_that_it_states_and_none_without():
    for signal in (0.1, 0.0):
        series, best = data.synthetic(seed=1, signal=signal, n_symbols=6, n_bars=20_000)
        right = np.concatenate([wick_rule(b) for b in series])
        # coins of a bar are correlated by 0.25 across symbols: the standard error grows by sqrt(1 + 5 * 0.16) at most
        assert best == 0.5 + signal and abs(right.mean() - best) < 4 * 0.5 / np.sqrt(len(right)) * 1.4
    again, _ = data.synthetic(seed=1, signal=0.0, n_symbols=6, n_bars=20_000)
    np.testing.assert_array_equal(series[3].ohlcva, again[3].ohlcva)


def test_synthetic_market_looks_like_one():
    series, _ = data.synthetic(seed=2, n_bars=20_000)
    for bars in series:
        o, h, l, c, v, a = bars.ohlcva.T
        assert (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all() and (np.diff(bars.time) > 0).all()
        r = np.diff(np.log(c))
        size = np.abs(r)
        assert ((r - r.mean()) ** 4).mean() / r.var() ** 2 > 4                     # fat tails (3 for a Gaussian)
        assert np.corrcoef(size[:-1], size[1:])[0, 1] > 0.05                       # volatility clusters
        assert np.corrcoef(np.log(v[1:]), size)[0, 1] > 0.1                        # volume moves with it
        assert 0.005 < (r == 0).mean() < 0.02
    both = np.corrcoef(np.sign(np.diff(series[0].ohlcva[:, 3])), np.sign(np.diff(series[1].ohlcva[:, 3])))[0, 1]
    assert both > 0.05                                                             # symbols move together


# ---- files

def test_g5_a_failed_save_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    data.save_atomic({"step": 1}, path)
    def refuse(*_):
        raise OSError(28, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, refuse)
            with pytest.raises(UserError, match="No space"):
                data.save_atomic({"step": 2}, path)
        assert data.load_safe(path) == {"step": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_g5_killed_while_saving(tmp_path):
    """SIGKILL between and within writes, fifteen times: whatever is on disk loads, and never goes back."""
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import data\n"
            "i = 0\n"
            "while True:\n    i += 1\n    data.save_atomic({'i': i, 'x': torch.full((300_000,), i)}, sys.argv[2]); print(i, flush=True)")
    path, last = tmp_path / "a.pt", 0
    for round_ in range(3):
        job = subprocess.Popen([sys.executable, "-c", code, ROOT, str(path)], stdout=subprocess.PIPE, text=True)
        done = [int(job.stdout.readline()) for _ in range(3 + 4 * round_)][-1]
        job.send_signal(signal.SIGKILL)
        job.wait()
        found = data.load_safe(path)
        assert found["i"] >= done and (found["x"] == found["i"]).all()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_load_safe_runs_no_code_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, "hostile.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "text.pt").write_text("time,open\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"x": torch.zeros(1000)}, "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    for name in ("hostile.pt", "pickle.pt", "text.pt", "empty.pt", "cut.pt", "none.pt", "."):
        with pytest.raises(UserError, match=name) as e:
            data.load_safe(name)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "hacked").exists()


def test_a_scale_over_the_whole_window_shows_skill_on_a_random_walk_and_a_causal_one_does_not():
    """On z-scores the rule is exact: they add up to zero, so what is right is that the last move's sign is that of its distance from the mean."""
    rows = data.leak_demo(n_windows=1000)
    for name, window, kept, share, half in rows:
        if name == "causal features":
            assert abs(share - 0.5) < 1.5 * half
        else:
            assert share - half > 0.53
    exact = [row for row in rows if row[2] > 0.9999 and row[0] != "causal features"]
    for _, window, _, share, _ in exact:
        rng = np.random.default_rng([0, window])
        r = rng.standard_t(4, (1000, window))
        assert share == pytest.approx(np.mean((r[:, -1] > r.mean(1)) == (r[:, -1] > 0)), abs=1e-9)
