"""The backtest's scores against naive forms written here, its intervals by simulation, and what it must never see: the future."""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backstage import copula, opponents, pictures, stage_scores
from backstage.bins import Bins, BinnedLaw, candle_tables, close_table, pair_law
from backstage.door import span_of
from backstage.opponents import baselines, early_error, filtered_paths, fit_form, fit_har, give_residuals, har, historical, joint_paths, place, range_volatility, slow_scale, volatility_paths
from backstage.portfolio import Together
from backstage.scores import MIN_BLOCKS, NORMAL, RARE, at_step, time_block_sums, bootstrap, groups_of, score_distribution, score_draws, score_normal, score_paths, score_residuals, ordered_bins, path_sums, score_of, scored, sums_by_bin, trading_sums, within
from backstage.series import DAY
import data
import backtest
import sample
import study
from data import UserError
from model import Model, ModelConfig, save_checkpoint
from tokenizer import TokenizerConfig, train_tokenizer

BITS = dict(coarse_bits=5, fine_bits=4)
KEYS = ["split", "start", "end", "blocks", "checkpoints", "baselines", "paired"]
SCORES = ["da", "balanced_accuracy", "auc", "logloss", "ece", "ic", "rank_ic", "mae", "rmse", "mape", "crps", "coverage50", "coverage80",
          "coverage90", "range_crps", "range_coverage90", "volume_crps", "volume_coverage90", "path_mape", "path_crps",
          "path_coverage50", "path_coverage80", "path_coverage90", "path_rv_crps", "var95_hits",
          "es95_ratio", "extreme_flagged", "extreme_said", "extreme_came"]  # of the interface; EXTRA: what post-training looks at besides
EXTRA = ["up_share"]
TRADING = ["long_short", "turnover"]     # of the interface, too, but not of time_block_sums


def daily(n_bars, n_symbols, seed=0, common=0.0):
    """Random walks with daily bars, symbols that move together by `common`."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.01, n_bars)
    out = []
    for i in range(n_symbols):
        close = 50 * np.exp(np.cumsum(math.sqrt(common) * shared + math.sqrt(1 - common) * rng.normal(0, 0.01, n_bars)))
        open_ = close * np.exp(rng.normal(0, 0.004, n_bars))
        high, low = np.maximum(open_, close) * np.exp(rng.uniform(0, 0.01, n_bars)), np.minimum(open_, close) * np.exp(-rng.uniform(0, 0.01, n_bars))
        volume = rng.integers(1000, 9000, n_bars).astype(float)
        out.append(data.Bars(f"D{i}", 1_400_025_600 // DAY * DAY + DAY * np.arange(n_bars), np.stack([open_, high, low, close, volume, volume * close], 1)))
    return out


@pytest.fixture(scope="module")
def tokenizer():
    x = np.concatenate([data.features(bars)[0][32:] for bars in data.synthetic(seed=5, n_symbols=2, n_bars=600)[0]])
    return train_tokenizer(torch.from_numpy(x), TokenizerConfig(**BITS, n_hidden=32), steps=40, batch_size=256)


def make(seed=0, **options):
    """An untrained model with weights so large that its forecasts differ from bar to bar."""
    torch.manual_seed(seed)
    model = Model(ModelConfig(**BITS | dict(n_layer=2, n_head=2, n_embd=16, windows=(8,), block_size=64, span=32, latents=12) | options)).eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * (0.5 if "embed" in name else 1.5 * p.shape[-1] ** -0.5))
    return model


@pytest.fixture(scope="module")
def triple(tokenizer):
    """A checkpoint as load_checkpoint gives it, and daily bars of which the last 100 are its test."""
    series = daily(300, 6, common=0.3)
    return (make(), tokenizer, dict(splits=(int(series[0].time[150]), int(series[0].time[200])), seed=0)), series


def targets(series, first, horizon=5, **options):
    return backtest.Targets(series, int(series[0].time[first]), 2**62, horizon, options.get("stride"), 0)


# ---- single scores

def naive_crps(r, p, y, halves=False):
    """halves: of all pairs only those of a draw of the first half and one of the second, of which len(r) // 2 are first."""
    half, n = len(r) // 2, len(r)
    pairs = [(i, j, 1 / (half * (n - half))) for i in range(half) for j in range(half, n)] if halves else [(i, j, p[i] * p[j]) for i in range(n) for j in range(n)]
    return sum(a * abs(u - y) for u, a in zip(r, p)) - sum(w * abs(r[i] - r[j]) for i, j, w in pairs) / 2


@pytest.mark.parametrize("draws", [False, True])
def test_score_distribution_is_the_double_sum(draws):
    rng = np.random.default_rng(0)
    r = rng.standard_t(3, (7, 13))
    r[3, 4:7] = r[3, 4]  # equal draws
    r = r if draws else np.sort(r, -1)
    p = np.full((7, 13), 1 / 13) if draws else rng.dirichlet(np.ones(13), 7)
    y = rng.normal(size=7)
    y[2] = r[2, 5]
    got = score_draws(r, y) if draws else score_distribution(r, p, y)
    for i in range(7):
        assert got["crps"][i] == pytest.approx(naive_crps(r[i], p[i], y[i], draws), abs=1e-12)
        assert got["mean"][i] == pytest.approx((p[i] * r[i]).sum())
        assert got["pit"][i] == pytest.approx(p[i][r[i] < y[i]].sum() + p[i][r[i] == y[i]].sum() / 2)
    if draws:
        np.testing.assert_allclose(got["point"], np.median(r, -1))
    else:
        assert all(p[i][r[i] < got["point"][i]].sum() <= 0.5 <= p[i][r[i] <= got["point"][i]].sum() for i in range(7))


def law(K, width, n=20_000, horizon=2, seed=0):
    """Targets and a forecaster whose paths are normal, the truth too but for its width."""
    rng = np.random.default_rng(seed)
    y = 0.01 * width * rng.normal(size=(n, horizon))
    t = SimpleNamespace(path_r=y.cumsum(1), path_rv=np.sqrt((y**2).sum(1)), usual=np.full(n, 0.006), horizon=horizon,
                        path_time_block=np.arange(n) % 20, n_path_blocks=20)
    return t, score_paths(0.01 * rng.normal(size=(n, K, horizon)), t, slice(0, n))


@pytest.mark.parametrize("K", [3, 16, 64])
def test_a_right_forecast_covers_what_it_says_whatever_the_number_of_paths(K):
    """A share of ranks alone cannot be 90 %: of 64 draws it is 87.7 or 90.8 %."""
    for width, right in ((1, True), (2, False)):
        t, f = law(K, width)
        inside = within(f["path_pit"], f["path_width"], 0.05, 0.95)[:, 0]
        assert (inside.mean() == pytest.approx(0.9, abs=4 * inside.std() / len(inside)**0.5)) == right


def test_risk_of_a_right_law_is_what_it_says_and_of_a_wrong_one_is_not():
    """Of a normal law: 5 % of the losses are beyond VaR and together as large as said; the warning comes true as often as said."""
    def scores(K, width):
        t, f = law(K, width)
        return {name: score_of(name, s.sum(0)) for name, s in path_sums(f, t).items()}
    for K in (20, 100):
        right = scores(K, 1)
        assert right["var95_hits"] == pytest.approx(0.05, abs=0.004) and right["es95_ratio"] == pytest.approx(1, abs=0.08)
    chance = 2 * NORMAL.cdf(-3 * 0.006 / 0.01)  # of a move beyond 3 usual sigmas, whatever the horizon
    assert right["extreme_flagged"] == pytest.approx(0.73, abs=0.03) and right["extreme_came"] == pytest.approx(chance, abs=0.005)
    assert right["extreme_said"] == pytest.approx(chance, rel=0.2)
    wide = scores(100, 2)  # twice the losses that were forecast: z = -1.645 is now -0.822
    assert wide["var95_hits"] == pytest.approx(NORMAL.cdf(-0.8224), abs=0.01)
    assert wide["es95_ratio"] > 3 and wide["extreme_came"] > 4 * wide["extreme_said"]
    calm, _ = law(100, 1)
    calm.usual = np.full(len(calm.usual), 0.02)
    f = score_paths(0.01 * np.random.default_rng(1).normal(size=(20_000, 100, 2)), calm, slice(None))
    assert path_sums(f, calm)["extreme_flagged"][:, 0].sum() == 0      # a calm market raises no flag


def test_realized_volatility_is_scored_over_the_whole_horizon():
    t, f = law(5, 1, n=50)
    moves = 0.01 * np.random.default_rng(0).normal(size=(50, 5, 2))
    f = score_paths(moves, t, slice(0, 50))
    for i in (0, 31):
        drawn = [math.sqrt(a * a + b * b) for a, b in moves[i]]
        came = math.hypot(t.path_r[i, 0], t.path_r[i, 1] - t.path_r[i, 0])
        assert f["path_rv_crps"][i] == pytest.approx(naive_crps(drawn, np.full(5, 0.2), came, True))


def test_path_intervals_count_the_blocks_that_hold_paths():
    """Ten origins of one symbol among thousands of bars are ten blocks at most, too few for an interval."""
    bars = data.synthetic(seed=1, n_symbols=1, n_bars=3000)[0]
    t = backtest.Targets(bars, int(bars[0].time[40]), 2**62, 5, 290, 0)
    assert t.n_path_blocks > MIN_BLOCKS > len(t.path_r) >= t.blocks_of("path_crps")
    scores = bootstrap(time_block_sums(dict(path_point=np.zeros(t.path_r.shape), path_crps=np.abs(t.path_r)), t), t)
    assert scored(*at_step(scores, "path_crps", -1), t.blocks_of("path_crps"))["lo"] is None


@pytest.mark.parametrize("symbols, n_bars, horizon, stride", [(1, 1032, 10, 10), (1, 3032, 1, 3), (3, 532, 7, 7), (120, 232, 10, 19), (1, 20032, 10, 19)])
def test_paths_start_every_horizon_or_a_thousand_times(symbols, n_bars, horizon, stride):
    series = [data.Bars(f"S{i}", bars.time, bars.ohlcva) for i in range(symbols) for bars in daily(n_bars, 1)]
    t = targets(series, 32, horizon)
    assert t.stride == stride
    assert all((np.diff(o) == stride).all() and o[0] >= 31 and o[-1] + horizon < n_bars for o in t.origins)


def test_one_symbol_of_a_thousand_bars_has_intervals():
    t = targets(daily(1332, 1), 332, horizon=10)
    assert t.blocks_of("path_crps") in (99, 100) and t.n_blocks == 100
    f = baselines(t, 20)["har"]
    scores = bootstrap(time_block_sums(f, t), t)
    for metric in ("crps", "range_crps", "volume_crps", "path_rv_crps", "var95_hits", "es95_ratio"):
        assert scored(*scores[metric], t.blocks_of(metric))["lo"] is not None, metric


def test_score_residuals_is_score_distribution():
    rng = np.random.default_rng(0)
    z, scale, y = np.sort(rng.standard_t(3, 40)), rng.random(30) + 0.1, rng.normal(size=30)
    z[5:8] = z[5]
    y[:9] = scale[:9] * z[:9]     # on a step, up to rounding
    place = rng.normal(size=30)
    got = score_residuals(z, y + place, scale, place)
    want = score_distribution(place[:, None] + scale[:, None] * z, np.full((30, 40), 1 / 40), y + place)
    for key in want:
        np.testing.assert_allclose(got[key][9:], want[key][9:], rtol=1e-9, err_msg=key)
        np.testing.assert_allclose(got[key][:9], want[key][:9], atol=0.05, err_msg=key)


def test_crps_of_a_gaussian_is_its_closed_form():
    """sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)): of many quantiles, of draws in the mean, and as an integral."""
    mu, sigma, y = 0.3, 2.0, np.array([-3.0, 0.2, 1.0, 6.0])
    z = (y - mu) / sigma
    want = np.array([sigma * (v * math.erf(v / math.sqrt(2)) + 2 * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)) for v in z])
    np.testing.assert_allclose(score_normal(np.full(4, mu), np.full(4, sigma), y)["crps"], want, rtol=1e-12)
    grid = np.linspace(-30, 30, 60_001)
    cdf = np.array([0.5 * (1 + math.erf((x - mu) / sigma / math.sqrt(2))) for x in grid])
    np.testing.assert_allclose([((cdf - (grid >= v))**2).sum() * 0.001 for v in y], want, rtol=2e-3)
    r = mu + sigma * np.array([NORMAL.inv_cdf((i + 0.5) / 4000) for i in range(4000)])
    np.testing.assert_allclose(score_distribution(np.tile(r, (4, 1)), np.full((4, 4000), 1 / 4000), y)["crps"], want, rtol=1e-3)
    # five or six draws each, independent or stratified: only pairs across the halves give the right spread
    rng = np.random.default_rng(0)
    inverse = np.vectorize(NORMAL.inv_cdf)
    for draws in (rng.normal(mu, sigma, (40_000, 5)),
                  mu + sigma * inverse(np.stack([copula.stratified(rng, 6, 1)[:, 0, 0] for _ in range(20_000)]).astype(float).clip(1e-9, 1 - 1e-9))):
        few = [score_draws(draws, np.full(len(draws), v))["crps"].mean() for v in y]
        np.testing.assert_allclose(few, want, rtol=0.02)


def random_forecaster(t, seed=0):
    rng = np.random.default_rng(seed)
    n, shape = len(t.r), t.path_r.shape
    some = dict(range_crps=rng.random(n), range_pit=rng.random(n), volume_crps=np.where(np.isnan(t.volume), np.nan, rng.random(n)),
                volume_pit=rng.random(n), path_rv_crps=rng.random(shape[0]), path_es95=rng.random(shape[0]), path_extreme=0.1 * rng.random(shape[0]))
    some["path_extreme"][0] = np.nan  # a symbol that never moved
    return some | dict(p_up=rng.integers(1, 40, n) / 40, mean=rng.normal(0, 0.01, n), point=rng.normal(0, 0.01, n), pit=rng.random(n),  # ties in P(up)
                crps=rng.random(n), path_point=rng.normal(0, 0.02, shape), path_crps=rng.random(shape), path_pit=rng.random(shape), path_width=np.full(shape, 0.1))


def stub(seed=0, n_stamps=40, n_symbols=9, still=0.1):
    """Targets with holes and bars that do not move."""
    rng = np.random.default_rng(seed)
    stamp, symbol = np.divmod(np.flatnonzero(rng.random(n_stamps * n_symbols) < 0.8), n_symbols)
    r = rng.normal(0, 0.01, len(stamp)) * (rng.random(len(stamp)) > still)
    origins = rng.integers(0, n_stamps, 50)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), 8).astype(float)
    volume = np.where(rng.random(len(stamp)) > 0.2, rng.random(len(stamp)), np.nan)
    return SimpleNamespace(volume=volume, usual=rng.random(50) / 200, r=r, stamp=stamp, symbol=symbol, time_block=stamp // 2, n_blocks=20, path_r=rng.normal(0, 0.02, (50, 4)), path_time_block=origins // 2,
                           n_path_blocks=20, horizon=4, weights=weights, path_weights=weights, series=range(n_symbols))


def naive_ranks(v):
    return np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])


def naive_scores(f, r, stamp, path_r, usual):
    moved = r != 0
    p, up = f["p_up"][moved], r[moved] > 0
    call = np.where(p == 0.5, 0.5, np.where(p > 0.5, up, ~up))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in p[up] for b in p[~up]]
    ece = 0.0
    for k in range(10):
        inside = (p >= k / 10) & ((p < (k + 1) / 10) | (k == 9))
        if inside.any():
            ece += inside.mean() * abs(p[inside].mean() - up[inside].mean())
    by_date = []
    for s in np.unique(stamp):
        x, y = naive_ranks(f["mean"][stamp == s]), naive_ranks(r[stamp == s])
        if len(x) >= 3 and x.std() > 0 and y.std() > 0:
            by_date.append(np.corrcoef(x, y)[0, 1])
    out = dict(da=call.mean(), balanced_accuracy=(call[up].mean() + call[~up].mean()) / 2, auc=np.mean(wins),
               logloss=np.mean([-math.log(a if b else 1 - a) for a, b in zip(p, up)]), ece=ece, ic=np.corrcoef(f["mean"], r)[0, 1],
               rank_ic=np.mean(by_date), mae=np.abs(100 * r - 100 * f["point"]).mean(), rmse=math.sqrt(((100 * r - 100 * f["mean"])**2).mean()),
               mape=np.mean([abs(100 * math.exp(a) - 100 * math.exp(b)) / math.exp(b) for a, b in zip(f["point"], r)]), crps=100 * f["crps"].mean())
    out |= {f"coverage{q}": np.mean([50 - q / 2 <= 100 * x <= 50 + q / 2 for x in f["pit"]]) for q in (50, 80, 90)}
    out["path_mape"] = (100 * np.abs(np.exp(f["path_point"]) / np.exp(path_r) - 1)).mean(0)
    out["path_crps"] = 100 * f["path_crps"].mean(0)
    for q, low, high in ((50, 0.25, 0.75), (80, 0.1, 0.9), (90, 0.05, 0.95)):
        inside = [[max(0, min(v + 0.05, high) - max(v - 0.05, low)) / 0.1 for v in row] for row in f["path_pit"]]  # of a width of 0.1
        out[f"path_coverage{q}"] = np.mean(inside, 0)
    out["up_share"] = (p > 0.5).mean()
    has = np.isfinite(f["volume_crps"])
    out |= dict(range_crps=100 * f["range_crps"].mean(), volume_crps=f["volume_crps"][has].mean(), path_rv_crps=100 * f["path_rv_crps"].mean())
    out |= dict(range_coverage90=np.mean([0.05 <= v <= 0.95 for v in f["range_pit"]]), volume_coverage90=np.mean([0.05 <= v <= 0.95 for v in f["volume_pit"][has]]))
    hit = np.array([max(0, min(v + 0.05, 0.05) - max(v - 0.05, 0)) / 0.1 for v in f["path_pit"][:, -1]])
    loss, raised = 1 - np.exp(path_r[:, -1]), f["path_extreme"] > 0.05
    came = np.abs(path_r[:, -1]) > 3 * 2 * usual  # four steps
    out |= dict(var95_hits=hit.mean(), es95_ratio=(loss * hit).sum() / (0.05 * f["path_es95"]).sum(), extreme_flagged=raised.mean(),
                extreme_said=f["path_extreme"][raised].mean(), extreme_came=came[raised].mean())
    return out


def test_every_score_is_the_naive_one_and_every_replicate_is_the_score_of_its_blocks():
    """A replicate is, by definition, the score of all bars of the blocks drawn, each as often as it was drawn."""
    t = stub()
    f = random_forecaster(t)
    sums = time_block_sums(f, t)
    assert sorted(sums) == sorted(SCORES + EXTRA)
    want = naive_scores(f, t.r, t.stamp, t.path_r, t.usual)
    got = bootstrap(sums, t)
    for name in SCORES + EXTRA:
        np.testing.assert_allclose(got[name][0], want[name], rtol=1e-9, err_msg=name)
    drawn = {name: score_of(name, np.tensordot(t.weights, s, 1)) for name, s in sums.items()}
    for k in range(3):
        bars, stamps, origins = [], [], []
        for copy_, b in enumerate(np.repeat(np.arange(20), t.weights[k].astype(int))):
            rows = np.flatnonzero(t.time_block == b)
            bars.append(rows)
            stamps.append(1000 * copy_ + t.stamp[rows])  # a block drawn twice is twice as many dates
            origins.append(np.flatnonzero(t.path_time_block == b))
        bars, origins = np.concatenate(bars), np.concatenate(origins)
        part = {key: v[origins if key.startswith("path") else bars] for key, v in f.items()}
        want = naive_scores(part, t.r[bars], np.concatenate(stamps), t.path_r[origins], t.usual[origins])
        for name in SCORES + EXTRA:
            np.testing.assert_allclose(drawn[name][k], want[name], rtol=1e-9, err_msg=name)
    for name in SCORES:  # replicates are centred on the score
        if name.startswith(RARE) and (sums[name][:, 0] != 0).sum() < 5:
            continue  # too few cases for any
        np.testing.assert_allclose(got[name][1].mean(0), got[name][0], rtol=1e-9, err_msg=name)


def test_auc_of_many_distinct_values_is_binned_closely():
    rng = np.random.default_rng(0)
    p, up = rng.random(6000), rng.random(6000)
    up = up < 0.3 + 0.4 * p
    bins = ordered_bins(p)
    assert bins.max() < 2048
    area = score_of("auc", sums_by_bin([up, ~up], bins, np.zeros(6000, int), 1)[0])
    place = np.argsort(np.argsort(p)) + 1
    exact = (place[up].sum() - up.sum() * (up.sum() + 1) / 2) / (up.sum() * (~up).sum())
    assert area == pytest.approx(exact, abs=1e-5)


def test_what_a_forecaster_does_not_say_has_no_score():
    t = stub()
    f = random_forecaster(t)
    assert set(time_block_sums(dict(p_up=f["p_up"]), t)) == {"da", "balanced_accuracy", "auc", "logloss", "ece", "ic", "rank_ic", "up_share"}
    t.stamp = np.arange(len(t.r))  # one symbol a date: no rank IC
    t.time_block = t.stamp * 20 // len(t.r)
    got = bootstrap(time_block_sums(f, t), t)
    assert scored(*got["rank_ic"], 20) is None
    assert scored(*got["mae"], 20)["lo"] is None  # eight replicates are none


@pytest.mark.parametrize("n_symbols", [6, 12])     # of six often fewer than five are there
def test_long_short_is_the_naive_one(n_symbols):
    t = stub(n_symbols=n_symbols)
    f = random_forecaster(t)
    f["p_up"] = np.random.default_rng(4).random(len(t.r))
    sums = trading_sums(f["p_up"], t, 7.0)     # by blocks of two stamps
    want, held = np.zeros((2, 20, 2)), {}
    for s in np.unique(t.stamp):
        rows = np.flatnonzero(t.stamp == s)
        new = {}
        if len(rows) >= 5:
            order, k = rows[np.argsort(f["p_up"][rows])], max(1, len(rows) // 5)
            new = {t.symbol[i]: -1 / k for i in order[:k]} | {t.symbol[i]: 1 / k for i in order[-k:]}
        traded = sum(abs(new.get(i, 0) - held.get(i, 0)) for i in range(n_symbols))
        held = new
        if len(rows) >= 5:
            gain = sum(new.get(t.symbol[i], 0) * (math.exp(t.r[i]) - 1) for i in rows)
            want[0, s // 2] += traded, 1
            want[1, s // 2] += 1e4 * gain - 7.0 * traded, 1
    np.testing.assert_allclose(sums["turnover"], want[0], atol=1e-9)
    np.testing.assert_allclose(sums["long_short"], want[1], atol=1e-9)


# ---- intervals

def covered(t, blocks, weights, runs=300):
    """How often the interval of right calls holds one half: fair coins that all symbols of a date share in part."""
    t = copy.copy(t)
    t.time_block, t.n_blocks, t.weights = blocks, blocks.max() + 1, weights
    hits = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        coin = 0.8 * rng.normal(size=t.stamp.max() + 1)[t.stamp] + 0.6 * rng.normal(size=len(t.r))
        t.r = np.where(coin > 0, 0.01, -0.01)
        sums = {"da": time_block_sums(dict(p_up=np.full(len(t.r), 0.6)), t)["da"]}
        s = scored(*bootstrap(sums, t)["da"], t.n_blocks)
        hits += s["lo"] <= 0.5 <= s["hi"]
    return hits / runs


def test_too_few_rare_cases_make_no_interval():
    """Where no warning came true, blocks drawn anew all say 0 %: that is no certainty."""
    t = targets(daily(400, 2), 100, horizon=2, stride=2)
    for cases in (0, 4, 5, 40):
        sums = np.zeros((t.n_path_blocks, 2))
        sums[:, 1], sums[:cases, 0] = 3, 1
        found = bootstrap(dict(extreme_came=sums), t)["extreme_came"]
        score = scored(*found, t.n_path_blocks)
        assert score["value"] == pytest.approx(cases / sums[:, 1].sum()) and (score["lo"] is None) == (cases < 5)


@pytest.mark.parametrize("n, t975", [(20, 2.093), (40, 2.023), (300, 1.968)])
def test_intervals_of_few_blocks_are_as_wide_as_students(n, t975):
    drawn = np.array([NORMAL.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    s = scored(0.0, drawn, n)
    assert s["hi"] == pytest.approx(t975 * math.sqrt(n / (n - 1)), rel=2e-3) and s["lo"] == pytest.approx(-s["hi"])


def test_the_interval_covers_over_100_dates_as_often_as_it_says():
    t = targets(daily(132, 10), 32, horizon=1)
    assert t.n_blocks == 25 and len(np.unique(t.stamp)) == 100
    assert (np.bincount(t.stamp, minlength=100) == 10).all()
    assert all(len(np.unique(t.time_block[t.stamp == s])) == 1 for s in range(100))  # all symbols of a date in one block
    assert covered(t, t.time_block, t.weights) == pytest.approx(0.95, abs=0.03)
    single = np.arange(len(t.r)) % 100  # the symbols of a date in different blocks: the fault that the test must see
    wrong = np.random.default_rng(0).multinomial(100, np.full(100, 0.01), 2000).astype(float)
    assert covered(t, np.random.default_rng(1).permutation(single), wrong, runs=100) < 0.8


def test_blocks_are_whole_dates_and_at_least_the_horizon():
    series = daily(332, 3)
    t = targets(series, 32, horizon=10)
    for block in range(t.n_path_blocks):
        assert len(np.unique(t.stamp[t.stamp * t.n_path_blocks // 300 == block])) >= 10
    assert t.n_path_blocks == 30 and t.n_blocks == 50
    minutes = data.synthetic(n_symbols=2, n_bars=3000)[0]
    t = backtest.Targets(minutes, int(minutes[0].time[1000]), 2**62, 5, None, 0)
    assert min(np.bincount(t.time_block)) >= 32 * 2
    few = backtest.Targets(minutes, int(minutes[0].time[2900]), 2**62, 5, None, 0)     # 100 bars: blocks of 4, so that there is an interval
    assert few.n_blocks == 20 and few.n_path_blocks == 20


def test_few_blocks_make_no_interval_and_a_warning(triple, capsys):
    (model, tokenizer, meta), series = triple
    few = dict(horizon=10, paths=2, stride=50)
    result = backtest.backtest([(model, tokenizer, meta)], [b[:215] for b in series[:2]], **few)
    assert result["blocks"] < 20
    assert result["checkpoints"][0]["da"]["value"] is not None
    assert result["checkpoints"][0]["da"]["lo"] is None and result["checkpoints"][0]["path_crps"][0]["hi"] is None
    err = capsys.readouterr().err
    assert "no intervals" in err and "20" in err


def test_on_null_markets_the_interval_covers_one_half(tokenizer):
    """Of 20 intervals of 95 % more than four miss in one of 400 cases: a single one may always."""
    missed = 0
    for seed in range(20):
        series = data.synthetic(seed=seed, signal=0, n_symbols=4, n_bars=1500)[0]
        t = targets(series, 500, horizon=2, stride=500)
        da = scored(*stage_scores.model_scores(make(seed), tokenizer, t, probes=1)["da"], t.n_blocks)
        assert t.n_blocks >= 20 and da["hi"] - da["lo"] < 0.1
        missed += not da["lo"] <= 0.5 <= da["hi"]
    assert missed <= 4


# ---- no look-ahead

def test_no_forecast_sees_the_future(triple):
    """A target and the bars after it are replaced by others: its forecast, and all before it, stay as they are to the last bit."""
    (model, tokenizer, _), series = triple
    cut = 250
    other = [data.Bars(b.symbol, b.time, np.concatenate([b.ohlcva[:cut], b.ohlcva[cut:][::-1] * 1.7])) for b in series]
    t, u = targets(series, 200, stride=7), targets(other, 200, stride=7)
    row = np.concatenate([np.arange(200, 300)] * 6)
    done = np.concatenate([o for o in t.origins]) + t.horizon < cut
    known = np.concatenate([o for o in t.origins]) < cut
    assert done.any() and not known.all()
    for name, f, g in [("model", backtest.next_bars(model, tokenizer, t) | backtest.simulated(model, tokenizer, t, 3),
                        backtest.next_bars(model, tokenizer, u) | backtest.simulated(model, tokenizer, u, 3))] + \
                      [(name, f, baselines(u, 3)[name]) for name, f in baselines(t, 3).items()]:
        for key in f:
            outcome = key.endswith(("crps", "pit"))     # what came is in it
            rows = (done if outcome else known) if key.startswith("path") else row < cut if outcome else row <= cut
            assert np.array_equal(f[key][rows], g[key][rows]), (name, key)
    assert not np.array_equal(backtest.next_bars(model, tokenizer, t)["p_up"], backtest.next_bars(model, tokenizer, u)["p_up"])


def test_next_bars_are_the_models_own_distributions(triple):
    """P(up) is that of a forecast from the same context, half a window at least; CRPS and percentile those of all pairs."""
    (_, tokenizer, _), series = triple
    model = make(unmoved=0.1)
    for p in model.parameters():  # less sure: a pair that was rare and now holds most of the probability shares a bin
        p.data *= 0.8
    t = targets(series, 100)
    f = backtest.next_bars(model, tokenizer, t)
    tables = candle_tables(tokenizer)
    every, moves = torch.arange(len(tables["close"])), close_table(tokenizer)
    crps, off = {name: [] for name in tables}, []
    for k in range(0, len(t.r), 37):
        i, row = int(t.symbol[k]), 100 + k % 200
        begin = max(0, 100 + (row - 100) // 32 * 32 - 32)
        assert 32 <= row - begin <= 100
        tokens = torch.from_numpy(np.asarray(data.tokenize(series[i], tokenizer)[begin:row]).astype(np.int64))
        with torch.no_grad():
            h = model.prefill(tokens[None, :, 0], tokens[None, :, 1], torch.from_numpy(series[i].time[begin:row])[None]).h[0]
            still = (32 * model.config.unmoved + (np.diff(series[i].ohlcva[:row, 3]) == 0).sum()) / (32 + row - 1)
            p = model.coarse_logits(h).double().softmax(-1)[:, None] * model.fine_logits(h.expand(len(every), -1), every).double().softmax(-1)
        order = moves.abs().flatten().argsort()     # the least moves stay
        left = (p.flatten()[order].cumsum(0) - still).clamp(min=0).minimum(p.flatten()[order])
        up = (left * (moves.flatten()[order] > 0)).sum() / left.sum()
        assert f["p_up"][k] == pytest.approx(up.item(), abs=0.01)
        _, state = data.features(series[i][:row])
        s, m, d, _ = (float(v) for v in state.scales())
        o, high, low, c, v, _ = series[i].ohlcva[row]
        for name, value, came in (("close", tables["close"] * s, t.r[k]), ("range", tables["range"] * s, math.log(high / low)),
                                  ("volume", (m + d * tables["volume"]).clamp(0, 80), math.log1p(v))):
            r, order = value.flatten().sort()
            exact = score_distribution(r.numpy()[None], p.flatten()[order].numpy()[None], np.array([came]))
            prefix = "" if name == "close" else f"{name}_"
            crps[name].append((f[f"{prefix}crps"][k], exact["crps"][0]))
            off.append(f[f"{prefix}pit"][k] - exact["pit"][0])  # 512 pairs only: one of them may hold much of the probability
    assert np.sqrt(np.mean(np.square(off))) < 0.02
    for name in crps:
        got, exact = np.array(crps[name]).T / np.mean(crps[name])
        assert got.mean() == pytest.approx(exact.mean(), abs=0.004) and np.abs(got - exact).mean() < 0.01, name


def test_no_score_hangs_on_where_the_first_target_lies(monkeypatch):
    """Start moved within a day: mean scores of the same bars stay. And bins agree with all pairs, though a single context that is sure
    of one code be all the past that they know."""
    bits = dict(coarse_bits=6, fine_bits=6)     # 4,096 pairs in 512 bins
    [bars] = data.synthetic(seed=5, n_symbols=1, n_bars=700)[0]
    hours = np.arange(700)
    bars = data.Bars("HOURS", 1_400_025_600 + 3600 * hours, bars.ohlcva * np.exp(np.outer(np.sin(hours / 24 * 2 * math.pi), [0, 0, 0, 0, 1.2, 1.2])))
    tokenizer = train_tokenizer(torch.from_numpy(data.features(bars)[0][32:]), TokenizerConfig(**bits, n_hidden=32), steps=40, batch_size=256)
    model, names = make(3, **bits), ("crps", "range_crps", "volume_crps")

    def scores(start):
        t = backtest.Targets([bars], int(bars.time[start]), 2**62, 1, 10**9, 0)
        f = backtest.next_bars(model, tokenizer, t)
        return t, np.stack([f[name][419 - start:] for name in names], -1)

    means = [scores(start)[1].mean(0) for start in (400, 405, 411)]
    past_states = backtest.past_states
    monkeypatch.setattr(backtest, "past_states", lambda *where: 4 * past_states(*where)[:1])
    t, binned = scores(419)
    means.append(binned.mean(0))
    assert (np.max(means, 0) / np.min(means, 0) < 1.02).all(), means

    tables, exact = candle_tables(tokenizer), []
    windows = [(0, j, min(j + 32, 700)) for j in range(419, 700, 32)]
    level, width = opponents.volume_scales(bars, t.slots[0])[419:].T
    with torch.no_grad():
        h = torch.cat(list(backtest.hidden_states(model, tokenizer, t, windows)))
        for k in range(0, len(h), 3):
            p, row = pair_law(model, h[k]).double().flatten(), []
            values = tables["close"] * t.s[k], tables["range"] * t.s[k], (level[k] + width[k] * tables["volume"]).clamp(0, 80)
            for value, outcome in zip(values, (t.r[k], t.range[k], t.volume[k])):
                r, order = value.flatten().sort()
                row.append(score_distribution(r.numpy()[None], p[order].numpy()[None], np.array([outcome]))["crps"][0])
            exact.append(row)
    np.testing.assert_allclose(binned[::3].mean(0), np.mean(exact, 0), rtol=0.02)


def test_tables_are_what_the_inverse_makes_of_the_tokens(tokenizer):
    """Range and close of a pair's candle, in units of s; volume in units of d above m."""
    _, state = data.features(data.synthetic(seed=5, n_symbols=1, n_bars=300)[0][0])
    s, m, d, _ = (float(v) for v in state.scales())
    tables = candle_tables(tokenizer)
    for coarse, fine in ((0, 0), (7, 3), (31, 15), (20, 9)):
        bar = data.inverse(tokenizer.decode(torch.tensor([coarse]), torch.tensor([fine])).numpy(), state)[0][0]
        assert tables["close"][coarse, fine] * s == pytest.approx(math.log(bar[3] / float(state.close)), rel=1e-5)
        assert tables["range"][coarse, fine] * s == pytest.approx(math.log(bar[1] / bar[2]), rel=1e-5)
        assert max(0, m + tables["volume"][coarse, fine] * d) == pytest.approx(math.log1p(bar[4]), rel=1e-5)


def test_scales_of_volume_are_those_of_the_features():
    bars = data.synthetic(seed=5, n_symbols=1, n_bars=300)[0][0]
    bars.ohlcva[40:44, 4] = 0
    level, width = opponents.volume_scales(bars, data.slots_of(bars)).T
    for k in (1, 2, 3, 42, 45, 299):
        _, m, d, _ = data.features(bars[:k])[1].scales()
        assert level[k] == pytest.approx(float(m)) and width[k] == pytest.approx(float(d))


def test_p_up_knows_that_ticks_differ(triple):
    """A symbol of which a third of the bars do not move and one that always moves: both are fair coins, and P(up) says so."""
    (model, tokenizer, _), series = triple
    fine, rough = series[0], data.Bars("ROUGH", series[0].time, series[0].ohlcva.copy())
    flat = np.random.default_rng(0).random(300) < 1 / 3
    rough.ohlcva[flat, 3] = 0
    close = rough.ohlcva[:, 3]
    close[0] = 50
    close[:] = close[np.maximum.accumulate(np.where(close > 0, np.arange(300), 0))]
    rough.ohlcva[:, 1], rough.ohlcva[:, 2] = np.maximum(rough.ohlcva[:, 1], close), np.minimum(rough.ohlcva[:, 2], close)
    shares = [sample.unmoved_share(bars, 0.1) for bars in (fine, rough)]
    assert shares[0][0] == shares[1][0] == 0.1 and len(shares[0]) == 301
    assert shares[0][-1] < 0.015 and shares[1][-1] == pytest.approx(1 / 3, abs=0.08)


def test_path_scores_are_those_of_the_forecasts(triple):
    (model, tokenizer, _), series = triple
    t = targets(series, 200, horizon=4, stride=30)
    f = backtest.simulated(model, tokenizer, t, 5)
    k = len(t.origins[0])
    o = int(t.origins[1][0])
    paths = sample.forecast(model, tokenizer, series[1][:o + 1], 4, 5)[:, :, 3]
    truth = series[1].ohlcva[o + 1:o + 5, 3]
    for step in range(4):
        r = np.log(paths[:, step] / series[1].ohlcva[o, 3])
        assert f["path_point"][k, step] == pytest.approx(np.median(r))
        assert f["path_crps"][k, step] == pytest.approx(naive_crps(r, np.full(5, 0.2), math.log(truth[step] / series[1].ohlcva[o, 3]), True))


def test_baselines_are_the_naive_ones(triple):
    _, series = triple
    t = targets(series, 250, horizon=3, stride=10)
    f = baselines(t, 4000)
    r = np.diff(np.log(series[2].ohlcva[:, 3]), prepend=np.log(series[2].ohlcva[0, 3]))
    k, row = 2 * 50 + 17, 250 + 17
    normal = lambda mu, sigma, y: score_normal(np.array([mu]), np.array([sigma]), np.array([y]))["crps"][0]  # tested above
    assert f["gaussian20"]["crps"][k] == pytest.approx(normal(0.0, math.sqrt((r[row - 20:row]**2).mean()), r[row]))
    (b, a), *_ = np.linalg.lstsq(np.stack([r[1:249], np.ones(248)], 1), r[2:250], rcond=None)
    assert f["ar1"]["point"][k] == pytest.approx(a + b * r[row - 1])
    volatility = [math.sqrt(sum(0.94**(i - j) * r[j]**2 for j in range(1, i + 1)) / sum(0.94**(i - j) for j in range(1, i + 1))) for i in range(1, row)]
    z = r[2:row] / volatility[:-1]  # of bars 2 .. row - 1
    draws = np.sort(z[-238:] * volatility[-1])
    assert f["fhs"]["crps"][k] == pytest.approx(naive_crps(draws, np.full(238, 1 / 238), r[row], False))
    # paths: the first step from the origin is the next bar's forecast, up to the draws
    o = [int(o) for o in t.origins[2]]
    first = sum(map(len, t.origins[:2]))
    for j, origin in enumerate(o):
        at = 2 * 50 + origin + 1 - 250
        assert f["fhs"]["path_crps"][first + j, 0] == pytest.approx(f["fhs"]["crps"][at], rel=0.05, abs=1e-4)
        for name in ("gaussian20", "ar1"):
            assert f[name]["path_crps"][first + j, 0] == pytest.approx(f[name]["crps"][at])
        truth = r[origin + 1:origin + 4].sum()
        assert f["gaussian20"]["path_crps"][first + j, 2] == pytest.approx(normal(0.0, math.sqrt(3 * (r[origin - 19:origin + 1]**2).mean()), truth))
        step = [a + b * r[origin]]
        step += [a + b * step[0]]
        step += [a + b * step[1]]
        assert f["ar1"]["path_point"][first + j, 2] == pytest.approx(sum(step))


def test_fhs_paths_follow_the_volatility_drawn(monkeypatch):
    """After a large step a larger one: the second step is the naive recursion's of the first."""
    series, kept = daily(300, 1), []
    monkeypatch.setattr("backstage.opponents.score_paths", lambda moves, t, rows: kept.append(moves) or {})
    t = targets(series, 250, horizon=3, stride=40)
    historical(t, 0, slice(0, len(t.origins[0])), 20_000)
    moves, r = kept[0][0], t.returns[0]
    o = int(t.origins[0][0])
    volatility = [math.sqrt(sum(0.94**(i - j) * r[j]**2 for j in range(1, i + 1)) / sum(0.94**(i - j) for j in range(1, i + 1))) for i in range(1, o + 1)]
    z = np.unique(moves[:, 0] / volatility[-1])
    second = moves[:, 1] / np.sqrt(0.94 * volatility[-1]**2 + 0.06 * moves[:, 0]**2)     # residuals again
    assert np.abs(second[:, None] - z[np.searchsorted(z, second)[:, None].clip(1, len(z) - 1) - [0, 1]]).min(1).max() < 1e-9


# ---- HAR

def ranging(u, seed=0, start=1_400_025_600, step=DAY):
    """Bars without gaps whose range volatility is u [T]."""
    rng = np.random.default_rng(seed)
    width = u * math.sqrt(4 * math.log(2))
    up = rng.uniform(0, 1, len(u)) * width                      # of the high above the open
    move = up - rng.uniform(0, 1, len(u)) * width
    close = 100 * np.exp(np.cumsum(move))
    open_ = np.append(100.0, close[:-1])
    high, low = open_ * np.exp(up), open_ * np.exp(up - width)
    volume = np.full(len(u), 1000.0)
    return data.Bars(f"R{seed}", start + step * np.arange(len(u)), np.stack([open_, high, low, close, volume, volume * close], 1))


def test_har_finds_the_weights_of_its_own_law():
    true, series = (0.1, 0.25, 0.2, 0.25, 0.2), []
    for seed in range(6):
        rng, u = np.random.default_rng(seed), list(np.full(66, 1.0))
        for _ in range(4000):
            root = true[0] + sum(b * math.sqrt(np.mean(u[-n:])) for b, n in zip(true[1:], (1, 5, 22, 66)))
            u.append((root * (1 + 0.25 * rng.normal()))**2)
        series.append(ranging(0.01 * (1 + seed) * np.array(u), seed))
    t = backtest.Targets(series, int(series[0].time[4000]), 2**62, 2, 20, 0)
    values = [range_volatility(bars) for bars in series]
    har = fit_har(t, values)[3]
    np.testing.assert_allclose(har.weights[0, 1:], true[1:], atol=0.05)
    assert np.mean(har.ratio) == pytest.approx(1 + 0.25**2, abs=0.02)


def test_har_is_the_naive_loop():
    series = daily(300, 3)
    t = targets(series, 200, horizon=2, stride=20)
    v = []
    for bars in series:
        o, h, l, c = bars.ohlcva[:, :4].T
        v.append([math.sqrt(math.log(h[k] / l[k])**2 / (4 * math.log(2)) + (math.log(o[k] / c[k - 1])**2 if k else 0)) for k in range(300)])
    v = [np.maximum(u, 0.05 * np.mean(u[:200])) for u in v]
    units = [np.mean(u[:200]) for u in v]      # no weekday differs more than by chance
    v = [u / unit for u, unit in zip(v, units)]
    lagged = lambda u, k: [1.0] + [math.sqrt(np.mean(u[max(0, k - n):k])) for n in (1, 5, 22, 66)]       # known before bar k
    X = np.array([lagged(u, k) for u in v for k in range(66, 200)])
    y = np.array([math.sqrt(u[k]) for u in v for k in range(66, 200)])
    w = np.array([1 / np.mean(row[1:]) for row in X])
    beta = np.linalg.lstsq(X * w[:, None], y * w, rcond=None)[0]
    hars = fit_har(t, [range_volatility(bars) for bars in series])
    np.testing.assert_allclose(hars[0].weights, [beta], rtol=1e-6)
    for k in (200, 277):
        want = np.dot(beta, lagged(v[1], k))**2 * units[1]
        assert hars[1].forecast[k] == pytest.approx(want)
    f = har(t, 4000)
    first = sum(map(len, t.origins[:1]))
    for j, origin in enumerate(t.origins[1]):       # the paths' first step is the next bar's forecast, up to the draws
        assert f["path_crps"][first + j, 0] == pytest.approx(f["crps"][100 + origin + 1 - 200], rel=0.05, abs=1e-4)


def test_residuals_are_half_a_series_own_and_half_of_all():
    rng, hars = np.random.default_rng(0), [SimpleNamespace(early=np.arange(400), fitted=np.arange(400)) for _ in range(2)]
    first = [k + rng.random(400) for k in range(2)]
    give_residuals(hars, [np.stack([v, 2 * v]) for v in first])
    for k, har in enumerate(hars):
        z, other = har.residuals
        assert len(z) == 500 and (np.diff(z) >= 0).all() and np.array_equal(other, 2 * z)
        assert (np.floor(z) == k).sum() == 250 + 125
        assert np.abs(np.quantile(z[np.floor(z) == k], (0.1, 0.5, 0.9)) - np.quantile(first[k], (0.1, 0.5, 0.9))).max() < 0.02


def test_the_scale_of_residuals_follows_slowly():
    size = np.random.default_rng(0).random(60)
    size[45] = 100.0        # counts as six usual ones
    got = slow_scale(size, np.arange(10, 40), 0.8)
    usual = (size[10:40].sum() + 30 * 0.8) / 60
    a = 0.5 ** (1 / 500)
    for k in (0, 10, 11, 30, 46, 60):       # known before bar k
        seen = [min(size[j], 6 * usual) * a ** (k - 1 - j) for j in range(10, k)]
        assert got[k] == pytest.approx((sum(seen) + 250 * usual) / (sum(a ** (k - 1 - j) for j in range(10, k)) + 250))


def test_har_paths_follow_the_volatility_drawn():
    """A path whose ranges were wide goes on wide: the size of its steps depends on the ones before."""
    rng = np.random.default_rng(0)
    series = [ranging(0.01 * np.exp(0.5 * rng.normal(size=1500)), seed) for seed in range(2)]
    t = backtest.Targets(series, int(series[0].time[1000]), 2**62, 5, 400, 0)
    har = t.volatility[0]
    har.weights[:] = 0.1, 0.9, 0, 0, 0  # in each fit
    moves = volatility_paths(har, np.array([1100]), rng.integers(500, size=(1, 20_000, 5)))[0]
    size = np.log(np.abs(moves) + 1e-9)
    assert np.corrcoef(size[:, 2], size[:, 3])[0, 1] > 0.1
    z, ratio = har.residuals
    assert np.abs(moves[:, 1:2]).mean() == pytest.approx(       # two steps by hand: forecast, drawn range, next forecast
        np.mean([(0.1 + 0.9 * math.sqrt((0.1 + 0.9 * math.sqrt(har.u[1100]))**2 * q))**2 for q in ratio])
        * np.abs(z).mean() * har.mean * har.scale[1101], rel=0.03)


def test_har_learns_from_no_bar_after_the_first_target_of_any_symbol():
    """A symbol listed late has its context after the others' first targets: they must not see it."""
    series = daily(300, 4)
    late = [data.Bars("LATE", bars.time[190:], bars.ohlcva[190:].copy()) for bars in daily(300, 1, seed=9) for _ in range(2)]
    late[1].ohlcva[15:, :4] *= np.exp(np.cumsum(0.2 * np.random.default_rng(1).normal(size=95)))[:, None]
    found = [har(targets([*series, one], 200), 3) for one in late]
    assert all(np.array_equal(found[0][key][:400], found[1][key][:400]) for key in ("point", "range_crps", "volume_crps"))
    assert not np.array_equal(found[0]["crps"][400:], found[1]["crps"][400:])


def test_har_knows_the_time_of_day_of_the_bars_to_come():
    """Hours that differ fourfold: a path's first step is the next bar's forecast in each of them."""
    hour = np.arange(3000) % 24
    series = [ranging(0.001 * np.where(hour < 6, 4, 1) * np.exp(0.2 * np.random.default_rng(s).normal(size=3000)), s, step=3600) for s in range(2)]
    t = backtest.Targets(series, int(series[0].time[2800]), 2**62, 2, 13, 0)
    f = har(t, 4000)
    at = np.concatenate([o + 1 - first + i * 200 for i, (o, (first, _)) in enumerate(zip(t.origins, t.ranges))])
    np.testing.assert_allclose(f["path_crps"][:, 0], f["crps"][at], rtol=0.08, atol=1e-5)
    busy = hour[2800:] < 6
    sigma = t.volatility[0].sigma[2800:]
    assert sigma[busy].mean() / sigma[~busy].mean() == pytest.approx(4, rel=0.1)


def test_har_is_fitted_anew_to_all_bars_before(monkeypatch):
    """Weights of targets behind the k-th edge: least squares over the settled bars of all symbols before it."""
    monkeypatch.setattr(opponents, "REFIT", 40)
    t = targets(daily(300, 2), 200)
    hars = fit_har(t, [range_volatility(bars) for bars in t.series])
    edge = np.unique(t.time)[80]
    before = [har.bars.time < edge for har in hars]
    X = np.concatenate([har.x[b & har.known] for har, b in zip(hars, before)])
    y = np.concatenate([har.y[b & har.known] for har, b in zip(hars, before)])
    w = 1 / X.mean(1)
    want = np.linalg.lstsq(np.column_stack([w, X * w[:, None]]), y * w, rcond=None)[0]
    np.testing.assert_allclose(hars[0].weights[2], want, rtol=1e-6)
    assert hars[0].weights.shape == (3, 5) and hars[0].fit[[0, 199, 239, 240, 280, 299]].tolist() == [0, 0, 0, 1, 2, 2]


def test_har_takes_no_hours_where_they_only_disturb():
    """Weekends in a market that keeps none: of the forms the best before the first target is in use."""
    t = targets(daily(300, 2), 200)
    forms = [fit_form(t, [range_volatility(bars) for bars in t.series], False, k) for k in range(3)]
    got = fit_har(t, [range_volatility(bars) for bars in t.series])
    errors = [early_error(hars) for hars in forms]
    np.testing.assert_array_equal(got[0].forecast, forms[int(np.argmin(errors))][0].forecast)


def test_har_follows_a_time_of_day_that_changes():
    """Six bars a day; until day 200 the first is four times as wide: from day 260 on it is forecast as the others are."""
    midnight, day = np.arange(6 * 330) % 6 == 0, np.arange(6 * 330) // 6
    u = 0.001 * np.where(midnight & (day < 200), 4, 1) * np.exp(0.2 * np.random.default_rng(0).normal(size=6 * 330))
    bars = ranging(u, start=1_400_025_600 // DAY * DAY, step=4 * 3600)
    t = backtest.Targets([bars], int(bars.time[6 * 260]), 2**62, 2, 13, 0)
    forecast = t.volatility[0].forecast.reshape(-1, 6)
    wide = forecast[:, 0] / forecast[:, 1:].mean(1)
    assert wide[260:].mean() == pytest.approx(1, abs=0.1) and wide[150:200].mean() > 3


# ---- the interface

def test_the_result_has_the_keys_of_the_interface(triple, tmp_path, call):
    (model, tokenizer, meta), series = triple
    for name in ("a", "b", "c"):
        save_checkpoint(tmp_path / f"{name}.pt", make(ord(name)), tokenizer, stage="pretrain", seed=0, splits=meta["splits"], data=dict(sources=["bars.csv"]))
    text = "date,symbol,open,high,low,close,volume,amount\n" + "".join(
        f"{t},{b.symbol}," + ",".join(map(repr, row.tolist())) + "\n" for b in series for t, row in zip(b.time, b.ohlcva))
    (tmp_path / "bars.csv").write_text(text)
    argv = ["--ckpt", *(tmp_path / f"{n}.pt" for n in "abc"), "--data", tmp_path / "bars.csv", "--horizon", 4, "--paths", 4, "--stride", 40]
    status, out, err = call("backtest", *argv, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert list(result) == KEYS and result["split"] == "test" and result["blocks"] == 25
    assert result["start"] == data.iso(series[0].time[200]) and result["end"] == data.iso(series[0].time[299])
    assert list(result["baselines"]) == ["persistence", "always_up", "ar1", "logistic", "gaussian20", "fhs", "har"]
    for entry in result["checkpoints"]:
        assert list(entry) == ["ckpt", *SCORES, *TRADING, "tokens", "portfolio"]
        assert sorted(entry["tokens"]) == ["coarse_perplexity", "coarse_used", "fine_perplexity", "fine_used", "pairs"]
    for entry in result["checkpoints"] + list(result["baselines"].values()):
        for name in SCORES:
            for s in entry[name] if isinstance(entry[name], list) else [entry[name]]:
                assert s is None or set(s) == {"value", "lo", "hi"} and (s["lo"] is None or s["lo"] <= s["value"] <= s["hi"]), (name, s)
        assert entry["path_crps"] is None or len(entry["path_crps"]) == 4
    still = result["baselines"]["persistence"]
    assert still["da"] is None and still["crps"]["value"] == pytest.approx(still["mae"]["value"])
    assert result["baselines"]["always_up"]["balanced_accuracy"]["value"] == 0.5 and result["baselines"]["always_up"]["mae"] is None
    pairs = {(p["a"][-4:-3], p["b"][-4:-3], p["metric"]) for p in result["paired"]}
    assert {("a", "b", "da"), ("a", "c", "crps"), ("b", "c", "path_crps")} <= pairs
    status, out, err = call("backtest", *argv, "--by", "volatility", "--cost_bps", 5)
    assert status == 0 and "a to b" in out and "steady" in out
    assert "portfolios of 6 symbols" in out and "a to apart" in out and "a to har" in out
    assert result["checkpoints"][0]["portfolio"]["symbols"] == 6 and "c.pt" in " ".join(result["checkpoints"][0]["portfolio"]["ratio"])
    status, out, _ = call("backtest", "--ckpt", tmp_path / "a.pt", *argv[4:], "--by", "quarter")
    assert status == 0 and max(map(len, out.splitlines())) <= 80, out


# ---- many symbols together

def test_a_portfolio_and_spreads_are_what_a_plain_loop_makes_of_the_symbols():
    """Dates where five symbols go on at the same stamps, the others left out; what came, and paths, combined one by one."""
    series = daily(300, 7)
    series[2] = data.Bars("gap", np.delete(series[2].time, 252), np.delete(series[2].ohlcva, 252, 0))   # not where the others are
    t = targets(series, 250, horizon=4)
    g = Together(t)
    stamps = series[0].time[250:]
    assert g.n_dates == 12 and g.n_symbols == 7 and g.n_blocks == 12
    moves = np.random.default_rng(0).normal(0, 0.02, (len(g.date), 6, 4))
    held, _ = g.hold(moves.cumsum(-1))
    spreads, dates = g.differ(moves.cumsum(-1))
    at, pair = 0, 0
    for d in range(12):
        present = [i for i, bars in enumerate(series) if i != 2 or d != 0]
        for i in present:
            o = int(np.searchsorted(series[i].time, stamps[4 * d])) - 1
            assert (g.symbol[at], g.bar[at], g.date[at]) == (i, o, d)
            close = np.log(series[i].ohlcva[:, 3])
            np.testing.assert_allclose(g.moves[at].cumsum(), close[o + 1:o + 5] - close[o], atol=1e-12)
            at += 1
        rows = moves[at - len(present):at]
        np.testing.assert_allclose(held[d], np.log(sum(np.exp(row.cumsum(-1)) for row in rows) / len(rows)))
        for a in range(0, len(present) - 1, 2):
            np.testing.assert_allclose(spreads[pair], (rows[a] - rows[a + 1]).cumsum(-1))
            assert dates[pair] == d
            pair += 1
    assert at == len(g.date) and pair == len(spreads)


def one_factor_paths(rho, n_symbols=10, n_bars=500, K=100, horizon=2):
    """Symbols of one factor, their Together, and paths drawn from their own law."""
    t = targets(daily(n_bars, n_symbols, common=rho), 100, horizon=horizon)
    g, rng = Together(t, horizon), np.random.default_rng(1)
    shared = np.sqrt(rho) * rng.normal(size=(g.n_dates, K, horizon))
    moves = 0.01 * (shared[g.date] + np.sqrt(1 - rho) * rng.normal(size=(len(g.date), K, horizon)))
    return t, g, moves


def test_the_true_law_of_one_factor_holds_its_portfolio_and_paths_apart_do_not():
    t, g, moves = one_factor_paths(0.5)
    scores = g.score(dict(true=moves))["true"]
    assert scores["symbols"] == 10 and scores["origins"] == scores["blocks"] == 200 and Together(t).n_dates == 100
    assert scores["coverage90"]["lo"] < 0.9 < scores["coverage90"]["hi"] and scores["var95_hits"]["lo"] < 0.05 < scores["var95_hits"]["hi"]
    assert scores["spread_coverage90"]["value"] == pytest.approx(0.9, abs=0.02)
    apart = scores["apart"]     # a sigma of sqrt(1 / 10) in place of sqrt(0.55)
    inside = 1 - 2 * NORMAL.cdf(-NORMAL.inv_cdf(0.95) * math.sqrt(0.1 / 0.55))
    assert apart["coverage90"]["value"] == pytest.approx(inside, abs=0.08)
    assert scores["ratio"]["apart"]["crps"]["hi"] < 0.95 and scores["ratio"]["apart"]["spread_crps"]["hi"] < 0.99
    _, g, moves = one_factor_paths(0.0)      # where nothing is common the order of paths is worth nothing
    ratio = g.score(dict(true=moves))["true"]["ratio"]["apart"]
    assert ratio["crps"]["lo"] < 1 < ratio["crps"]["hi"] and ratio["crps"]["value"] == pytest.approx(1, abs=0.01)


def test_paths_apart_are_each_symbols_own_paths_by_halves():
    _, g, moves = one_factor_paths(0.5)
    apart = g.apart(moves)
    for half in (slice(0, 50), slice(50, 100)):
        for j in (0, 7, 1999):
            assert sorted(map(tuple, apart[j, half])) == sorted(map(tuple, moves[j, half]))
            assert (apart[j, half] != moves[j, half]).any()
    def correlation(r):
        return np.mean([np.corrcoef(r[g.date == d, :, 0])[~np.eye(10, dtype=bool)].mean() for d in range(20)])
    assert correlation(moves) == pytest.approx(0.5, abs=0.05) and abs(correlation(apart)) < 0.02


def test_opponents_know_the_copula_too_and_keep_each_symbols_law():
    """By the model's own numbers for paths: their first bars move together as the market does; each symbol's are its residuals."""
    t = targets(daily(700, 8, common=0.5), 550, horizon=3)
    g = Together(t, 50)
    u = np.stack(backtest.uniform_numbers(t, g, 400))
    for name, moves in joint_paths(t, g, u).items():
        pairs = [np.corrcoef(moves[g.date == d, :, 0])[~np.eye(8, dtype=bool)].mean() for d in range(g.n_dates)]
        assert np.mean(pairs) == pytest.approx(0.5, abs=0.1), name
        assert moves[:, :, 0].std() == pytest.approx(0.01, rel=0.2), name
    assert place(np.array([0.0, 0.5, 0.999, 1.0]), 4).tolist() == [0, 2, 3, 3]
    z = np.array([[-1.0, 0.0, 2.0]])
    first, second = filtered_paths(np.array([0.1]), z, np.array([[[0, 2]]]))[0, 0]
    assert first == pytest.approx(-0.1) and second == pytest.approx(2 * math.sqrt(0.94 * 0.01 + 0.06 * 0.01))


def test_a_portfolio_needs_five_symbols_and_does_not_see_what_comes(triple):
    (model, tokenizer, meta), series = triple
    few = backtest.backtest([(model, tokenizer, meta)], series[:4], horizon=4, paths=4, stride=40)
    assert few["checkpoints"][0]["portfolio"] is None and "portfolio" not in few["baselines"]["har"]
    def paths(series):
        t = targets(series, 200, horizon=4)
        g = Together(t, 20)
        return g, backtest.paths_together({"own": (model, tokenizer, meta)}, {"own": None}, t, g, 6)
    g, before = paths(series)
    for d in range(2):      # the model's are those that sample.simulate has of the bars themselves
        past = [series[i][:o + 1] for i, o in zip(g.symbol[g.date == d], g.bar[g.date == d])]
        ohlcva, _ = sample.simulate(model, tokenizer, past, 4, 6)
        np.testing.assert_allclose(before["own"][g.date == d].sum(2), np.log(ohlcva[:, :, -1, 3]) - np.log([[bars.ohlcva[-1, 3]] for bars in past]), atol=1e-6)
    cut = int(g.bar[g.start[2]])
    wild = [data.Bars(b.symbol, b.time, np.where(np.arange(300)[:, None] <= cut, b.ohlcva, b.ohlcva[::-1] * 3)) for b in series]
    _, after = paths(wild)
    for name in ("own", "fhs"):      # HAR is fitted anew as the targets come
        np.testing.assert_array_equal(before[name][g.date <= 2], after[name][g.date <= 2])
        assert (before[name][g.date > 2] != after[name][g.date > 2]).any()


def test_the_picture_of_many_symbols_begins_with_their_portfolio(tmp_path):
    series, rng = daily(80, 6), np.random.default_rng(0)
    weights, ohlcva = rng.normal(size=6), rng.uniform(40, 60, (6, 5, 3, 6))
    times = np.tile(series[0].time[-1] + DAY * np.arange(1, 4), (6, 1))
    view = pictures.portfolio_view(series, ohlcva, times, weights, 60)
    for k in (0, 59):
        gain = sum(w * (bars.ohlcva[20 + k, 3] / bars.ohlcva[-1, 3] - 1) for w, bars in zip(weights, series))
        assert view.past[k] == pytest.approx(100 * gain)
    assert view.past[-1] == 0 and len(view.past) == 60 and view.first_time == series[0].time[20]
    gain = sum(w * (paths[4, 1, 3] / bars.ohlcva[-1, 3] - 1) for w, bars, paths in zip(weights, series, ohlcva))
    assert view.paths[4, 2] == pytest.approx(100 * gain) and (view.paths[:, 0] == 0).all()
    late = [*series[:5], series[5][:40]]        # what ended long ago: to its last stamp, then today
    view = pictures.portfolio_view(late, ohlcva, times, weights, 60)
    assert len(view.past) == 41 and view.past[-1] == 0 and np.isfinite(view.past).all()
    pictures.plot_forecast(tmp_path / "a.svg", series, ohlcva, times, weights)
    pictures.plot_forecast(tmp_path / "b.svg", series[:4], ohlcva, times, weights[:4])
    assert (tmp_path / "a.svg").read_text().index("portfolio of 6 symbols") < (tmp_path / "a.svg").read_text().index("D0, 3 bars")
    assert "portfolio" not in (tmp_path / "b.svg").read_text()


def test_the_best_opponent_is_the_one_shown():
    score = lambda v: dict(value=v, lo=None, hi=None)
    found = dict(a=dict(crps=score(2), da=score(0.5), path_crps=[score(1), score(9)]), b=dict(crps=score(1), da=score(0.6), path_crps=None),
                 c=dict(crps=None, da=None, path_crps=[score(2), score(8)]))
    assert [backtest.best_rival(found, m) for m in ("crps", "da", "path_crps")] == ["b", "b", "c"]


def test_groups_by_volatility_are_thirds_of_where_it_is_to_go():
    t = targets(daily(400, 3), 150)
    groups = dict(groups_of(t, "volatility"))
    rising = np.concatenate([har.sigma[150:] for har in t.volatility]) / t.s
    assert rising[groups["falling"]].max() <= rising[groups["steady"]].min() and rising[groups["steady"]].max() <= rising[groups["rising"]].min()
    assert [mask.sum() for mask in groups.values()] == [250, 250, 250]


def test_paired_differences_use_the_same_blocks(triple):
    (model, tokenizer, meta), series = triple
    pairs = backtest.backtest([(model, tokenizer, meta)] * 2, series, horizon=2, paths=3, stride=10)["paired"]
    for pair in (p for p in pairs if p["b"] == "checkpoint 2"):  # a model against itself
        for s in pair["difference"] if isinstance(pair["difference"], list) else [pair["difference"]]:
            assert s["value"] == 0 and (s["lo"] == s["hi"] == 0 or pair["metric"].startswith(RARE))
        if pair["metric"] in ("mae", "crps"):
            assert pair["ratio"]["value"] == pair["ratio"]["hi"] == 1


def test_in_sample_targets_are_refused_unless_named(triple):
    (model, tokenizer, meta), series = triple
    old = [b[:180] for b in series]
    quick = dict(horizon=2, paths=2, stride=100)
    with pytest.raises(UserError, match="--start"):
        backtest.backtest([(model, tokenizer, meta)], old, **quick)
    with pytest.raises(UserError, match="--start"):
        backtest.backtest([(model, tokenizer, meta)], series, end=data.iso(series[0].time[180]), **quick)
    with pytest.raises(UserError, match="--start"):
        backtest.backtest([(model, tokenizer, meta), (model, tokenizer, meta | dict(splits=(1, 2)))], series, **quick)
    assert backtest.backtest([(model, tokenizer, meta)], old, start=data.iso(series[0].time[100]), **quick)["split"] == "in-sample"
    for borders in (None, ()):      # nobody knows what it has seen
        assert backtest.backtest([(model, tokenizer, dict(splits=borders))], series, start=data.iso(series[0].time[220]), **quick)["split"] == "in-sample"
    later = backtest.backtest([(model, tokenizer, meta)], series, start=data.iso(series[0].time[220]), **quick)
    assert later["split"] == "test" and later["start"] == data.iso(series[0].time[220])
    val = backtest.backtest([(model, tokenizer, meta)], series, split="val", **quick)
    assert (val["split"], val["start"], val["end"]) == ("val", data.iso(series[0].time[150]), data.iso(series[0].time[199]))


def test_the_correlation_of_tokens_and_accuracy_is_pearsons_and_spearmans():
    use = [dict(pairs=v) for v in (3, 10, 7, 40)]
    da = np.array([0.5, 0.52, 0.53, 0.55])
    drawn = da + np.random.default_rng(0).normal(0, 0.001, (2000, 4))
    got = study.token_correlations(use, da, drawn, 25)["pairs"]
    assert got["pearson"]["value"] == pytest.approx(np.corrcoef([3, 10, 7, 40], da)[0, 1])
    assert got["spearman"]["value"] == pytest.approx(np.corrcoef([0, 2, 1, 3], [0, 1, 2, 3])[0, 1])
    assert got["pearson"]["lo"] < got["pearson"]["value"] < got["pearson"]["hi"]


def test_a_market_that_does_not_move_is_refused_in_one_line(triple):
    (model, tokenizer, meta), series = triple
    still = data.Bars("STILL", series[0].time, np.full((300, 6), 10.0))
    with pytest.raises(UserError, match="no close moves"):
        backtest.backtest([(model, tokenizer, meta)], [still], horizon=2, paths=2)
    both = backtest.backtest([(model, tokenizer, meta)], [still, series[1]], horizon=2, paths=2)
    assert both["checkpoints"][0]["da"]["value"] > 0


def test_checkpoints_of_different_dates_are_told_what_to_type(triple):
    (model, tokenizer, meta), series = triple
    later = meta | dict(splits=(meta["splits"][0], int(series[0].time[240]) + 3600))
    pair, quick = [(model, tokenizer, meta), (model, tokenizer, later)], dict(horizon=2, paths=2, stride=50)
    with pytest.raises(UserError) as error:
        backtest.backtest(pair, series, **quick)
    date = str(error.value).split('--start "')[1].split('"')[0]
    assert backtest.backtest(pair, series, start=date, **quick)["split"] == "test"


def test_codes_that_never_come_have_bins_too():
    table = torch.randn(8, 16, dtype=torch.float64)
    p = torch.rand(8, 16)
    p[3], p[:, 5] = 0.0, 0.0  # as where a probability is below the least float
    bins = Bins(table)
    assert np.isfinite(bins.values).all() and torch.isfinite(bins.shares(p / p.sum())).all()


def test_weights_of_many_markets_beside_own_ones_are_scored_on_the_test_of_these():
    """They have no test, and may have seen these dates."""
    own, base = dict(splits=(100, 240), data={}), dict(splits=(900, 900), data={})
    for metas, start, want in (
            ([own], None, ("test", 240)), ([base], None, ("test", 900)), ([own, base], None, ("test, overlap", 240)),
            ([own, base], "1970-01-01 00:05", ("test, overlap", 300)), ([own, base], "1970-01-01 00:03", ("in-sample", 180)),
            ([own, base], "1970-01-01 00:15", ("test", 900)), ([base], "1970-01-01 00:05", ("in-sample", 300)),
            ([dict(base, data=dict(overlap=True))], None, ("test, overlap", 900))):
        assert span_of(dict(enumerate(metas)), "test", start, None)[:2] == want
