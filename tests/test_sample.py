"""Forecasts: what is simulated, what the report says of it, what is written; from the command line and from arrays."""
import json
import math
import os
import types
import xml.dom.minidom

import numpy as np
import pytest
import torch

from backstage.pictures import QUANTILES
from backstage.scores import usual_sigma
from backstage.series import DAY, YEAR
import backtest
import data
import sample
from backstage import copula, grid, inputs, past, report, trust
from conftest import ROOT, complaint, write_csv
from data import UserError
from backstage.bins import close_table
from model import load_checkpoint


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)[:2]


@pytest.fixture(scope="module")
def series(market):
    return data.load(str(market))


# ---- simulation

def test_a_forecast_is_valid_candles_and_repeats(loaded, series):
    out = sample.forecast(*loaded, series[0], horizon=12, paths=7, seed=3)
    assert out.shape == (7, 12, 6) and out.dtype == np.float64 and np.isfinite(out).all()
    o, h, l, c, v, a = np.moveaxis(out, -1, 0)
    assert (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all() and (out[..., :4] > 0).all() and (v >= 0).all()
    np.testing.assert_array_equal(out, sample.forecast(*loaded, series[0], horizon=12, paths=7, seed=3))
    assert (out != sample.forecast(*loaded, series[0], horizon=12, paths=7, seed=4)).any()


def test_a_forecast_starts_from_the_last_bar_with_a_window_of_context(loaded, series):
    (model, tokenizer), bars = loaded, series[0]
    _, [p_up] = sample.simulate(model, tokenizer, [bars], 1, 1)
    tokens = torch.from_numpy(data.tokenize(bars, tokenizer).astype(np.int64))[-64:]
    with torch.no_grad():
        h = model.hidden(tokens[None, :, 0], tokens[None, :, 1], torch.from_numpy(bars.time[-64:])[None])[0, -1]
    still = sample.unmoved_share(bars, model.config.unmoved)[-1]
    assert model.config.block_size == 64 and p_up == pytest.approx(up_of_pairs(model, tokenizer, h, still), abs=0.005)


def up_of_pairs(model, tokenizer, h, still):
    """P(up | moved) over all pairs one by one: those of the least moves stay, up to a mass of `still`."""
    every, moves = torch.arange(64), close_table(tokenizer)
    with torch.no_grad():
        fine = model.fine_logits(h.expand(64, -1), every).double().softmax(-1)
        p = model.coarse_logits(h).double().softmax(-1)[:, None] * fine
    order = moves.abs().flatten().argsort()
    p, up = p.flatten()[order], moves.flatten()[order] > 0
    left = (p.cumsum(0) - still).clamp(min=0).minimum(p)
    return (left[up].sum() / left.sum()).item()


def test_paths_stay_and_keep_to_the_ticks_of_a_market_that_does(loaded):
    """Three bars of five repeat the close before, on ticks of a quarter: P(up) is no certainty, and paths agree."""
    model, tokenizer = loaded
    [bars] = one_factor(1, 600, 0.0)
    prices = np.round(4 * bars.ohlcva[:, :4]) / 4
    for i in np.flatnonzero(np.random.default_rng(1).random(600) < 0.6)[1:]:
        prices[i] = prices[i - 1, 3]
    bars = data.Bars("STAYS", bars.time, np.concatenate([prices, bars.ohlcva[:, 4:]], 1))
    still = sample.unmoved_share(bars, model.config.unmoved)[-1]
    assert grid.tick_of(bars.ohlcva[:, 3]) == 0.25 and still > 0.5
    for calibration in (None, sample.Calibration(a=0.4, k=0.0)):
        paths, [p_up] = sample.simulate(model, tokenizer, [bars], 5, 2000, calibration=calibration)
        move = np.sign(paths[0, :, 0, 3] - bars.ohlcva[-1, 3])
        assert 0.3 < p_up < 0.7 and (move > 0).sum() / (move != 0).sum() == pytest.approx(p_up, abs=0.05)
        if calibration is None:
            assert (move == 0).mean() == pytest.approx(still, abs=0.03)
        prices = paths[0, :, :, :4]
        np.testing.assert_array_equal(prices, np.round(4 * prices) / 4)
        o, high, low, close = np.moveaxis(prices, -1, 0)
        assert (low > 0).all() and (low <= np.minimum(o, close)).all() and (high >= np.maximum(o, close)).all()


def test_the_tick_is_the_largest_step_of_nearly_all_closes():
    random = np.random.default_rng(0)
    for tick, level in ((0.01, 30), (0.25, 4000), (1e-5, 1.1), (5.0, 20000), (1 / 32, 99), (0.005, 5)):
        close = np.round(level * np.exp(0.02 * random.standard_normal(500)) / tick) * tick
        assert grid.tick_of(np.append(close, level * 1.00123456)) == pytest.approx(tick), tick    # one print beside
    assert grid.tick_of(30 * random.random(500)) == grid.tick_of(np.full(500, 5.0)) == 0


def test_g1_no_forecast_sees_a_later_bar(loaded, series):
    """From the data to the tokens, the logits and the forecast: later bars change nothing, to the bit."""
    (model, tokenizer), bars = loaded, series[0]
    for t in (100, 300):
        changed = data.Bars(bars.symbol, bars.time, bars.ohlcva.copy())
        changed.ohlcva[t:] *= np.random.default_rng(t).uniform(0.5, 2, (len(bars) - t, 1))
        tokens = [data.tokenize(b, tokenizer).astype(np.int64) for b in (bars, changed)]
        np.testing.assert_array_equal(tokens[0][:t], tokens[1][:t])
        assert (tokens[0][t:] != tokens[1][t:]).any()
        logits = [model(torch.tensor(k[None, :, 0]), torch.tensor(k[None, :, 1]), torch.from_numpy(bars.time)[None])[:2] for k in tokens]
        for a, b in zip(*logits):
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t:], b[:, t:])
        both = [sample.forecast(model, tokenizer, b[:t], horizon=3, paths=4) for b in (bars, changed)]
        np.testing.assert_array_equal(*both)


def test_a_generation_of_20_000_bars_stays_finite(loaded, series):
    """Any tokens whatever, the wildest ones again and again too; and what the model itself goes on with."""
    (model, tokenizer), bars = loaded, series[0]
    _, state = data.features(bars)
    codes = [torch.randint(0, 2**bits, (3, 20_000), generator=torch.Generator().manual_seed(0)) for bits in (6, 5)]
    wildest = tokenizer.decode(torch.arange(64))[:, 0].argmax()
    codes[0][1] = wildest
    codes[0][2] = torch.where(codes[0][2] < 32, wildest, codes[0][2])
    for out in (data.inverse(tokenizer.decode(*codes).numpy(), state.anchored())[0], sample.forecast(model, tokenizer, bars, horizon=1000, paths=1)):
        assert np.isfinite(out).all() and (out[..., :4] > 0).all() and (out[..., 4:] >= 0).all()


def test_stratified_numbers_are_uniform_and_spread_evenly():
    u = np.stack([copula.stratified(np.random.default_rng(k), 9, 3) for k in range(2000)])       # [2000, 9, 3, 2]
    assert u.shape == (2000, 9, 3, 2) and 0 <= u.min() and u.max() <= 1
    assert np.abs(u.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / 2000)
    for first, n in ((0, 4), (4, 5)):       # each half: one number in each n-th, at every step
        assert (np.sort(np.floor(u[:, first:first + n] * n).clip(max=n - 1), 1) == np.arange(n)[:, None, None]).all()
    flat = u[:, :, :, 0].reshape(2000, 27)
    across = np.corrcoef(flat.T)
    steps = [across[3 * i + a, 3 * j + b] for i in range(9) for j in range(9) for a in range(3) for b in range(3) if a != b]
    assert np.abs(steps).max() < 5 / math.sqrt(2000)                                            # steps know nothing of each other
    halves = [across[3 * i, 3 * j] for i in range(4) for j in range(4, 9)]
    assert np.abs(halves).max() < 5 / math.sqrt(2000)                                           # nor the halves


def test_paths_go_in_pieces_of_bounded_bytes(loaded, series, monkeypatch):
    model, tokenizer = loaded
    whole = sample.simulate(model, tokenizer, series, 3, 40)[0]
    sizes, generate = [], sample.generate
    monkeypatch.setattr(sample, "BATCH_BYTES", sample.BATCH_BYTES // sample.rows_at_once(model) * 64)
    monkeypatch.setattr(sample, "generate", lambda *a: sizes.append(len(a[2])) or generate(*a))
    assert sample.rows_at_once(model) == 64
    np.testing.assert_allclose(sample.simulate(model, tokenizer, series, 3, 40)[0], whole, rtol=1e-6)    # 40 paths a symbol: one at a time
    np.testing.assert_allclose(sample.simulate(model, tokenizer, series, 3, 30)[0], sample.simulate(model, tokenizer, series[:3], 3, 30)[0])
    assert sizes == [40] * 3 + [60, 30] * 2
    sample.forecast(model, tokenizer, series[0], 3, 150)
    assert sizes[-3:] == [64, 64, 22]


def test_parallel_forecast_samples_the_latents(loaded, series):
    out, _ = sample.simulate(*loaded, series, 16, 5, parallel=True)
    assert out.shape == (3, 5, 16, 6) and np.isfinite(out).all()


# ---- as a library

class Frame:
    """A stand-in for a data frame: named columns, and nothing else."""

    def __init__(self, columns):
        self.columns, self.values = list(columns), columns

    def __getitem__(self, name):
        return self.values[name]


def test_from_a_frame_to_a_table(checkpoint, series):
    """The README's lines, as they stand there, many series at once."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as readme:
        lines = readme.read().split("```python\n")[1].split("```")[0]
    columns = "open high low close volume amount".split()
    frames = {bars.symbol: Frame(dict(zip(columns, bars.ohlcva.T), Date=bars.time.astype("datetime64[s]"))) for bars in series}
    names = dict(frames=frames)
    exec(lines.replace("assets/base.pt", checkpoint), names)
    for bars, own in zip(names["bars"], series):
        np.testing.assert_array_equal(bars.time, own.time)
        np.testing.assert_allclose(bars.ohlcva, own.ohlcva)
    table = names["table"]
    assert names["ohlcva"].shape == (3, 200, 10, 6) and {len(column) for column in table.values()} == {30}
    assert (table["q05"] <= table["q50"]).all() and table["symbol"][10] == series[1].symbol
    assert table["time"][:10].astype(np.int64).tolist() == data.future_times(series[0].time, 10).tolist()


def test_stamps_of_the_future_can_be_given(loaded, series):
    (model, tokenizer), bars = loaded, series[:2]
    clock = np.stack([data.future_times(b.time, 4) for b in bars])
    own = sample.simulate(model, tokenizer, bars, 4, 6)[0]
    np.testing.assert_array_equal(sample.simulate(model, tokenizer, bars, 4, 6, times=clock)[0], own)
    later = clock + 3 * DAY + 3600     # other hours, other weekdays: the model reads them from the second bar on
    moved = sample.simulate(model, tokenizer, bars, 4, 6, times=later)[0]
    assert (moved[:, :, 0] == own[:, :, 0]).all() and (moved[:, :, 2] != own[:, :, 2]).any()
    for wrong in (clock[0, :3], clock - 10 * YEAR, clock[:, ::-1], 5):
        with pytest.raises(UserError, match="times"):
            sample.simulate(model, tokenizer, bars, 4, 6, times=wrong)


# ---- the report

def test_report_row_against_naive_numbers():
    rng = np.random.default_rng(1)
    bars = data.synthetic(n_symbols=1, n_bars=400)[0][0]
    last = bars.ohlcva[-1, 3]
    paths = np.zeros((1000, 2, 6))
    paths[:, -1, 3] = last * np.exp(rng.normal(0, 0.01, 1000))
    row = report.describe(bars, paths, 0.6)
    r = np.sort(paths[:, -1, 3] / last - 1)
    assert row["p_up_horizon"] == (r > 0).mean() and row["expected_return"] == pytest.approx(r.mean())
    assert row["var95"] == pytest.approx(-r[49], abs=2e-4) and row["es95"] == pytest.approx(-r[:50].mean(), abs=1e-4)
    sigma = np.diff(np.log(bars.ohlcva[-251:, 3])).std() * 2 ** 0.5      # long-run, over the horizon: not that of the last days
    assert row["p_extreme"] == (np.abs(np.log1p(r)) > 3 * sigma).mean()
    assert math.isnan(usual_sigma(np.full(300, 7.0)))             # never moved: no chance can be stated


def test_options_agree_with_black_scholes_on_gaussian_paths():
    from statistics import NormalDist
    N, rng = NormalDist().cdf, np.random.default_rng(0)
    spot, sigma, rate, years = 80.0, 0.3, 0.05, 0.5
    close = spot * np.exp(0.4 + sigma * years ** 0.5 * rng.standard_normal(400_000))  # a drift that the pricing must take out
    for strike in ("70", "1x", "1.2x"):
        k = float(strike[:-1]) * spot if strike.endswith("x") else float(strike)
        d1 = (np.log(spot / k) + (rate + sigma ** 2 / 2) * years) / (sigma * years ** 0.5)
        call = spot * N(d1) - k * np.exp(-rate * years) * N(d1 - sigma * years ** 0.5)
        found = report.option(close, spot, strike, years, rate)
        assert found["call"] == pytest.approx(call, abs=0.08)
        assert found["call"] - found["put"] == pytest.approx(spot - k * np.exp(-rate * years), abs=1e-9)


def renamed(bars, symbol, n=None):
    return data.Bars(symbol, bars.time[:n], bars.ohlcva[:n])


def test_a_symbol_that_ended_is_shown_with_its_date_and_has_no_rank(series, capsys):
    """Its next bar is another time's: it takes no part in rank and breadth."""
    histories = [renamed(series[0], "BTC/USDT-PERP"), renamed(series[1], "OLD", 200), renamed(series[2], "\x1b[31mRED")]
    old = histories[1].time
    old -= 60 * DAY
    paths = np.tile(histories[0].ohlcva[-1], (4, 3, 1))
    rows = [report.describe(bars, paths, p) for bars, p in zip(histories, (0.4, 0.9, 0.6))]
    ranked = report.give_ranks(rows, histories, 3)
    assert [row["rank"] for row in rows] == [2, None, 1] and sorted(ranked) == [0.4, 0.6]
    report.print_report(rows, 3, 0.5, 0.5)
    out = capsys.readouterr().out
    assert "BTC/USDT-PERP" in out and f"ended {data.iso(old[-1])[:10]}" in out and "of 2 symbols" in out and "\x1b" not in out
    assert out.splitlines()[4].startswith("OLD")       # last


@pytest.mark.parametrize("known, steps, said", [
    ([60, 604800], [25200], ["A: bars 7 h apart, the weights were trained on bars 1 min to 7 d apart and none near: trust this less"]),
    ([3600], [86400, 86400, 60], ["A and 1 more: bars 1 d apart, the weights were trained on bars 1 h apart: trust this less",
                                  "C: bars 1 min apart, the weights were trained on bars 1 h apart: trust this less"]),
    ([3600], [9000, 1440], []), ([3600], [9001, 1439], ["A: bars 2.5 h", "B: bars 24 min"]),  # a factor of 2.5
    ([60, 3600], [300], ["A: bars 5 min"]), ([0, 60], [1], ["A: bars 1 s"]), (None, [25200], []), ([], [25200], [])])
def test_bars_of_another_spacing_than_those_of_the_training_are_told_once(known, steps, said, capsys):
    series = [data.Bars(symbol, np.cumsum([0, 9 * step, *[step] * 30]), np.ones((32, 6))) for symbol, step in zip("ABC", steps)]
    inputs.warn_of_intervals(series, dict(data=dict(sources=[], intervals=known)))
    err = capsys.readouterr().err.splitlines()
    assert len(err) == len(said) and all(line.startswith(text) for line, text in zip(err, said)), err
    inputs.warn_of_intervals(series, dict(data=None))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name, flags", [("sample", []), ("backtest", ["--stride", 200, "--start", "1970-01-01"])])
def test_a_forecast_and_a_backtest_say_that_such_bars_are_strange_to_the_weights(name, flags, checkpoint, series, tmp_path, call):
    for k, bars in enumerate(series):
        write_csv(tmp_path / f"S{k}.csv", data.Bars(bars.symbol, 1_400_000_400 + 720 * np.arange(500), bars.ohlcva))
    status, _, err = call(name, "--ckpt", checkpoint, "--data", tmp_path, "--paths", 2, "--horizon", 2, *flags)
    lines = [line for line in err.splitlines() if "apart" in line]
    assert status == 0 and len(lines) == 1 and lines[0].startswith("S0 and 2 more: bars 12 min apart"), err


# ---- files and flags

def test_forecast_table_json_and_files(checkpoint, tmp_path, call):
    names = {flag: tmp_path / name for flag, name in (("--out", "f.csv"), ("--paths_out", "p"), ("--plot", "f.svg"), ("--plot_codebook", "c.svg"),
                                                      ("--plot_loss", "l.svg"))}
    argv = ["--ckpt", checkpoint, "--paths", 30, "--horizon", 4]
    status, out, err = call("sample", *argv, *sum(names.items(), ()), "--strike", "1.01x", "100")
    assert status == 0 and err == ""
    table, options = out.split("\n\n")
    assert max(map(len, table.splitlines())) <= 80 and options.count("SYN1") == 2
    assert all(f"SYN{i}" in out for i in range(3)) and "breadth" in out
    for name in ("f.svg", "c.svg", "l.svg"):
        assert xml.dom.minidom.parse(str(tmp_path / name)).documentElement.tagName == "svg"
    assert sorted(os.listdir(tmp_path)) == sorted(p.name for p in names.values())
    found = np.load(tmp_path / "p")
    assert found["ohlcva"].shape == (3, 30, 4, 6) and found["time"].shape == (3, 4)
    rows = [line.split(",") for line in (tmp_path / "f.csv").read_text().splitlines()]
    assert rows[0] == "time,symbol,step,p_up,q05,q25,q50,q75,q95,mean,open,high,low,close,volume,amount".split(",") and len(rows) == 1 + 3 * 4
    for row, paths in zip(rows[1:], found["ohlcva"].transpose(0, 2, 1, 3).reshape(12, 30, 6)):
        np.testing.assert_allclose([float(v) for v in row[10:]], np.median(paths, 0), rtol=1e-6)
        np.testing.assert_allclose([float(v) for v in row[4:9]], np.quantile(paths[:, 3], QUANTILES), rtol=1e-6)
    status, out, _ = call("sample", *argv, "--json", "--strike", "1.01x")
    report = json.loads(out)
    assert set(report) == {"horizon", "paths", "breadth", "mean_p_up", "record", "portfolio", "symbols"}
    assert set(report["symbols"][0]) == set("symbol last_time last_close p_up p_up_horizon expected_return q05 q50 q95 var95 es95 p_extreme rank options p_best p_beats".split())
    assert sorted(s["rank"] for s in report["symbols"]) == [1, 2, 3]
    argv += ["--horizon", 1, "--no-calibrate"]
    report = json.loads(call("sample", *argv, "--json")[1])
    one = json.loads(call("sample", *argv, "--json", "--symbols", "SYN1")[1])["symbols"][0]
    for key in ("p_up", "q05", "q50", "q95"):       # a symbol's forecast does not depend on the others
        assert one[key] == pytest.approx(report["symbols"][1][key], rel=1e-4)


def test_stamps_from_a_file(checkpoint, series, tmp_path, call, capfd):
    stamps = data.future_times(series[0].time, 9)[1::2]     # every other bar: as a holiday would have it
    (tmp_path / "t.txt").write_text("\n".join(data.iso(t) for t in [series[0].time[3], *stamps]) + "\n\n")
    argv = ["--ckpt", checkpoint, "--paths", 3, "--times", tmp_path / "t.txt"]
    sample.main([*map(str, argv), "--horizon", "4", "--out", str(tmp_path / "f.csv")])      # as a notebook calls it
    assert [line[:19] for line in (tmp_path / "f.csv").read_text().splitlines()[1:5]] == [str(np.datetime64(int(t), "s")) for t in stamps]
    assert "lower --horizon" in complaint(call("sample", *argv, "--horizon", 5))
    (tmp_path / "t.txt").write_text("2024-01-01\nsoon\n")
    assert "t.txt:2" in complaint(call("sample", *argv))


def test_columns_that_are_not_there_stay_empty_and_no_cell_is_a_formula(series, tmp_path):
    bars = data.Bars("=1+1", series[0].time, series[0].ohlcva.copy())
    bars.ohlcva[:, 5] = np.nan
    times = data.future_times(bars.time, 2)[None]
    report.write_csv(tmp_path / "f.csv", [bars], np.ones((1, 5, 2, 6)), times)
    rows = (tmp_path / "f.csv").read_text().splitlines()
    assert rows[1].endswith(",1,") and ",'=1+1," in rows[1]


@pytest.mark.parametrize("argv, why", [
    (("--horizon", 0), "--horizon 0"), (("--paths", -1), "--paths -1"), (("--symbols", "NOPE"), "NOPE"), (("--temperature", 0), "temperature"),
    (("--top_p", 1.5), "top_p"), (("--strike", "-3"), "--strike"), (("--strike", "abc"), "--strike abc"), (("--out", "no/where.csv"), "folder"),
    (("--parallel", "--horizon", 17), "--parallel"), (("--data", "none.csv"), "none.csv"), (("--device", "cuda:9"), "--device"), (("--rate", "inf"), "--rate"),
    (("--backtest",), "python backtest.py"), (("--start", "2018-01-01"), "--start"), (("--cost_bps", 5), "--cost_bps"), (("--times", "none.txt"), "none.txt"),
    (("--seed", -1), "--seed"), (("--rate", "10"), "--rate"), (("--out", "f", "--plot", "f"), "writes something else"), (("--out", __file__), "--overwrite"),
])
def test_bad_forecast_flags_get_one_line(checkpoint, tmp_path, call, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    line = complaint(call("sample", "--ckpt", checkpoint, "--paths", 3, *argv))
    assert why in line and "--resume" not in line       # which sample.py does not have


@pytest.mark.parametrize("script, argv, why", [
    ("sample", ("--temperature", 0), "temperature"), ("sample", ("--parallel", "--horizon", 17), "--parallel"),
    ("backtest", ("--parallel", "--horizon", 17), "--parallel")])
def test_what_no_forecast_can_be_made_with_is_refused_before_any(checkpoint, call, monkeypatch, script, argv, why):
    def work(*args):
        raise AssertionError("too late")
    monkeypatch.setattr(sample, "read_pasts", work)
    assert why in complaint(call(script, "--ckpt", checkpoint, "--paths", 3, *argv))


# ---- the record, trust, joint futures

def one_factor(n, n_bars, rho, seed=0):
    """Symbols of one market: closes whose moves are correlated by rho."""
    random = np.random.default_rng(seed)
    market = random.standard_normal(n_bars)
    found = []
    for i in range(n):
        moves = np.sqrt(rho) * market + np.sqrt(1 - rho) * random.standard_normal(n_bars)
        close = 50 * np.exp(0.01 * moves.cumsum())
        open_ = np.append(close[0], close[:-1])
        wick = np.exp(0.002 * random.random((2, n_bars)))
        high, low = np.maximum(open_, close) * wick[0], np.minimum(open_, close) / wick[1]
        volume = np.round(np.exp(random.normal(8, 0.5, n_bars)))
        bars = np.stack([open_, high, low, close, volume, volume * close], 1)
        found.append(data.Bars(f"S{i}", 1_600_000_000 // DAY * DAY + DAY * np.arange(n_bars), bars))
    return found


def test_paths_of_symbols_move_as_the_symbols_did_and_keep_their_margins(loaded):
    model, tokenizer = loaded
    series = one_factor(6, 600, 0.5)
    joint, p_up = sample.simulate(model, tokenizer, series, 2, 400)
    apart, _ = sample.simulate(model, tokenizer, series, 2, 400, joint=False)
    alone, p_alone = sample.simulate(model, tokenizer, series[:1], 2, 400)
    np.testing.assert_array_equal(np.sort(joint[:, :, 0, 3]), np.sort(apart[:, :, 0, 3]))
    np.testing.assert_array_equal(np.sort(joint[0, :, 0, 3]), np.sort(alone[0, :, 0, 3]))
    assert p_up[0] == pytest.approx(p_alone[0], rel=1e-6)      # six rows or one: the last bits may differ
    pairs = ~np.eye(6, dtype=bool)
    assert abs(np.corrcoef(np.log(joint[:, :, 0, 3]))[pairs].mean() - 0.5) < 0.1
    assert abs(np.corrcoef(np.log(apart[:, :, 0, 3]))[pairs].mean()) < 0.05
    # a symbol that ends on another day stays apart
    late = [*series[:2], series[2][:-1]]
    paths, _ = sample.simulate(model, tokenizer, late, 1, 400)
    first, second, other = np.log(paths[:, :, 0, 3])
    assert np.corrcoef(first, second)[0, 1] > 0.3 and abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_the_correlation_is_drawn_to_the_mean_where_little_is_known():
    series = one_factor(8, 500, 0.6)
    short = one_factor(8, 500, 0.0, seed=1)[7]
    def origin(bars, n):
        return types.SimpleNamespace(time=bars.time, closes=np.diff(np.log(bars.ohlcva[:, 3]))[-n:])

    R = copula.correlation([*(origin(bars, 400) for bars in series[:7]), origin(short, 10)])
    np.linalg.cholesky(R)
    known = R[:7, :7][~np.eye(7, dtype=bool)]
    assert (np.diag(R) == 1).all() and np.abs(known - 0.6).max() < 0.1
    assert np.allclose(R[7, :7], known.mean(), atol=0.02)


def test_the_correlation_is_that_of_the_last_bars_and_positive_definite():
    """A market that came closer lately; a symbol of other bars than the others, which no matrix of pairs allows."""
    early, late = one_factor(6, 250, 0.1), one_factor(6, 250, 0.7, seed=1)
    closes = [np.append(np.diff(np.log(a.ohlcva[:, 3])), np.diff(np.log(b.ohlcva[:, 3]))) for a, b in zip(early, late)]
    time = DAY * np.arange(498)
    R = copula.correlation([types.SimpleNamespace(time=time, closes=row) for row in closes])
    away = ~np.eye(6, dtype=bool)
    share = 0.5 ** (249 / 125)      # of the early bars in the weights, about
    expected = (0.1 * share + 0.7) / (1 + share)
    assert R[away].mean() == pytest.approx(expected, abs=0.06) and R[away].mean() > 0.5
    wrong = np.full((3, 3), 0.9) + 0.1 * np.eye(3)
    wrong[0, 2] = wrong[2, 0] = -0.9
    F = copula.root_of(wrong.astype(np.float32))
    R = F @ F.T
    assert np.allclose(np.diag(R), 1) and R[0, 1] > 0.4 and R[0, 2] < -0.4     # nearest, not the identity
    right = np.full((3, 3), 0.5, np.float32) + 0.5 * np.eye(3, dtype=np.float32)
    F = copula.root_of(right.copy())
    assert np.allclose(F @ F.T, right, atol=1e-6)


def test_trust_is_found_and_shrunk_by_its_error():
    """Beside the planted law; noise earns none, little data leaves the prior, a bias is found; a quiet model may be
    believed twice over."""
    random = np.random.default_rng(0)
    x, stamp = random.normal(0.2, 0.5, 8000), np.arange(8000)
    for k, a, low, high in ((1.0, 0.0, 0.85, 1.15), (0.4, 0.0, 0.25, 0.55), (0.0, 0.0, 0.0, 0.2), (0.5, -0.4, 0.35, 0.65)):
        rose = random.random(8000) < 1 / (1 + np.exp(-(a + k * (x - 0.2))))
        found = trust.fit_trust(x, rose, stamp)
        assert low <= found.k <= high and abs(found.a - a) < 0.1, (k, a, found)
    rose = random.random(8000) < 1 / (1 + np.exp(-2 * (x - 0.2) / 5))
    assert 1.5 < trust.fit_trust(0.2 + (x - 0.2) / 5, rose, stamp).k < 2.2      # the planted 2, drawn to the prior
    for n in (1, 10):
        few = trust.fit_trust(x[:n], rose[:n], stamp[:n])
        assert abs(few.k - trust.PRIOR_TRUST) < 0.15 and abs(few.a) < 1


def codes_by_a_tilt(W, n, seed=0):
    """logits [n, 8], codes [n] drawn from softmax(logits + T W X), T [8, 2], X [n, 3]."""
    random = torch.Generator().manual_seed(seed)
    logits, T = torch.randn(n, 8, generator=random), torch.randn(8, 2, generator=random, dtype=torch.float64)
    X = torch.cat((torch.ones(n, 1), torch.randn(n, 2, generator=random)), 1).double()
    p = (logits + X @ W.T @ T.T).softmax(-1)
    return logits, torch.multinomial(p, 1, generator=random)[:, 0], T, X


def penalized(W, logits, codes, T, X):
    log_p = (logits.double() + X @ W.T @ T.T).log_softmax(-1)
    penalty = trust.FLAT * W[:, 0].square().sum() + trust.RIDGE * W[:, 1:].square().sum()
    return log_p.gather(1, codes[:, None]).sum() - penalty / 2


def test_the_head_has_the_greatest_penalized_likelihood(monkeypatch):
    """Beside a descent of the formula itself, and the tilt that the codes were drawn by."""
    W = torch.tensor([[0.3, -0.5, 0.2], [0.0, 0.4, -0.3]], dtype=torch.float64)
    drawn = codes_by_a_tilt(W, 20_000)
    best = torch.zeros_like(W, requires_grad=True)
    descent = torch.optim.LBFGS([best], lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        descent.zero_grad()
        value = -penalized(best, *drawn) / 20_000
        value.backward()
        return value

    descent.step(loss)
    reach = [(penalized(each, *drawn) - penalized(torch.zeros_like(W), *drawn)).item() for each in (trust.fit_tilt(*drawn), best)]
    assert 0.999 * reach[1] < reach[0] <= reach[1] + 1e-3           # two steps come near enough
    monkeypatch.setattr(trust, "STEPS", 8)
    torch.testing.assert_close(trust.fit_tilt(*drawn), best.detach(), atol=1e-4, rtol=0)
    monkeypatch.setattr(trust, "RIDGE", 1.0)
    monkeypatch.setattr(trust, "FLAT", 1.0)
    torch.testing.assert_close(trust.fit_tilt(*drawn), W, atol=0.05, rtol=0)


def test_no_head_is_worse_than_none_on_the_bars_that_it_was_fitted_on(monkeypatch):
    """A start from which Newton's method overshoots: codes that the law holds for all but impossible."""
    monkeypatch.setattr(trust, "RIDGE", 1e-3)
    monkeypatch.setattr(trust, "FLAT", 1e-3)
    logits, codes, T, X = codes_by_a_tilt(torch.zeros(2, 3, dtype=torch.float64), 50)
    far = (logits * 0).index_fill(1, torch.tensor([0]), 12.0), codes, T, X
    found = trust.fit_tilt(*far)
    assert found.isfinite().all() and penalized(found, *far) >= penalized(torch.zeros_like(found), *far)


def test_codes_are_told_apart_by_range_volume_and_move():
    """Beside the means of what a coarse code's pairs decode to."""
    model, tokenizer, _ = load_checkpoint(os.path.join(ROOT, "assets", "base.pt"))
    x = tokenizer.decode(torch.arange(1024)[:, None], torch.arange(1024)).double().sinh().mean(1)
    size = (x[:, 0] - x[:, 1]).abs() + x[:, 2].clamp(min=0) + x[:, 3].clamp(min=0)
    columns = trust.code_columns(model)
    for column, truth in ((0, size), (2, x[:, 4]), (4, x[:, 0].abs())):
        ranks = [a.argsort().argsort().numpy() for a in (columns[:, column], truth)]
        assert np.corrcoef(*ranks)[0, 1] > 0.99 and columns[:, column].abs().max() <= trust.FARTHEST
    assert torch.equal(columns[:, 1], columns[:, 0]**2) and torch.equal(columns[:, 3], columns[:, 2]**2)


def test_the_past_mends_what_the_model_says_of_ranges_and_volume(loaded):
    """A market unlike those of the training; as it comes, and with a head turned by a tilt: fitted on one half, judged on the
    other."""
    model, tokenizer = loaded
    [own] = past.read_pasts(model, tokenizer, one_factor(1, 4000, 0.0))
    half = len(own.h) // 2
    with torch.no_grad():
        raw = model.coarse_logits(own.h)
        turned = raw + trust.code_columns(model).float() @ torch.tensor([-0.6, 0.0, 0.4, 0.0, 0.0])
        nats, mended = [], []
        for logits in (raw, turned):
            head = trust.fit_head(model, own.h[:half], logits[:half], own.coarse[:half])
            pair = logits[half:], head(logits, own.h)[half:]
            before, after = [torch.nn.functional.cross_entropy(a, own.coarse[half:]).item() for a in pair]
            nats.append(before)
            mended.append(after)
    assert nats[0] + 0.1 < nats[1] and max(mended) < nats[0] - 0.1 and abs(mended[0] - mended[1]) < 0.1


def test_the_share_of_unmoved_bars_is_a_mixture_by_likelihood_and_follows_a_market_that_changes():
    random = np.random.default_rng(3)
    still = random.random(3000) < np.where(np.arange(3000) < 2000, 0.05, 0.5)
    close = 100 + np.cumsum(np.append(0, ~still))
    bars = data.Bars("S", np.arange(3001), np.repeat(close[:, None], 6, 1).astype(float))
    share, prior = sample.unmoved_share(bars, 0.1), 0.1
    assert len(share) == 3002 and share[0] == share[1] == pytest.approx(prior)
    for k in (2, 5, 90, 300):                       # bars before the forecast one
        forecasts, weights = [], []
        for half_life in grid.HALF_LIVES:
            def mean(n):        # of still[:n], the last one weighs 1
                w = 0.5 ** (np.arange(n)[::-1] / half_life)
                return (16 * prior + (w * still[:n]).sum()) / (16 + w.sum())
            p = np.array([mean(n) if still[n] else 1 - mean(n) for n in range(k - 1)])
            forecasts.append(mean(k - 1))
            weights.append(np.prod(p ** 0.5 ** (np.arange(k - 1)[::-1] / grid.FORGET)))
        assert share[k] == pytest.approx(np.average(forecasts, weights=weights), rel=1e-9)
    assert abs(share[2001] - 0.05) < 0.02 and abs(share[2300] - 0.5) < 0.15 and abs(share[-1] - 0.5) < 0.05
    changed = data.Bars("S", bars.time, np.where(np.arange(3001)[:, None] < 900, bars.ohlcva, 7.0))
    np.testing.assert_array_equal(sample.unmoved_share(changed, 0.1)[:901], share[:901])


def test_no_later_bar_moves_a_calibration_and_paths_agree_with_p_up(loaded):
    model, tokenizer = loaded
    series = one_factor(2, 700, 0.0)
    first = sample.calibrate(model, tokenizer, [bars[:600] for bars in series])
    wild = [data.Bars(b.symbol, b.time, np.where(np.arange(700)[:, None] < 600, b.ohlcva, b.ohlcva * 3)) for b in series]
    again = sample.calibrate(model, tokenizer, [bars[:600] for bars in wild])
    assert again == first and all(torch.equal(*pair) for pair in zip(vars(again.head).values(), vars(first.head).values()))
    assert first.n_bars > 300
    for head in (None, first.head):
        told = sample.Calibration(a=0.8, k=0.0, head=head)     # 69 % up, whatever the model says
        paths, p_up = sample.simulate(model, tokenizer, series, 1, 1000, calibration=told)
        rose = paths[:, :, 0, 3] > np.array([b.ohlcva[-1, 3] for b in series])[:, None]
        assert np.allclose(p_up, 1 / (1 + np.exp(-0.8)))
        for i in range(2):
            unmoved = sample.unmoved_share(series[i], model.config.unmoved)[-1]
            assert rose[i].mean() == pytest.approx(p_up[i] * (1 - unmoved), abs=0.02)


def test_the_record_is_of_forecasts_calibrated_on_the_bars_before(loaded, monkeypatch):
    model, tokenizer = loaded
    pasts, seen, real = past.read_pasts(model, tokenizer, one_factor(2, 900, 0.0)), [], sample.calibrate_on
    monkeypatch.setattr(sample, "calibrate_on", lambda model, tokenizer, pasts: seen.extend(pasts) or real(model, tokenizer, pasts))
    scored = []
    monkeypatch.setattr(backtest, "next_bars", lambda *a, plain=backtest.next_bars: scored.append(a) or plain(*a))
    record = sample.record_of(model, tokenizer, pasts)
    _, _, t, _, calibration, _ = scored[0]
    assert len(seen) == 2 and all(one.bars.time[-1] < t.time.min() for one in seen) and record["bars"] == len(t.r)
    assert all(len(one.h) == len(one.coarse) == len(one.bars) - one.first for one in seen)
    assert calibration == real(model, tokenizer, seen) and calibration.head is not None


def test_symbols_that_end_years_apart_have_a_record_of_the_newest(loaded):
    model, tokenizer = loaded
    one, two = one_factor(2, 900, 0.0)
    apart = [one, data.Bars(two.symbol, two.time - 9 * 365 * DAY, two.ohlcva)]
    record = sample.record_of(model, tokenizer, past.read_pasts(model, tokenizer, apart))
    alone = sample.record_of(model, tokenizer, past.read_pasts(model, tokenizer, apart[:1]))
    assert record["bars"] == alone["bars"] == 300 and record["close"] == pytest.approx(alone["close"], abs=0.05)


def test_a_record_without_a_call_says_so(capsys):
    [bars] = one_factor(1, 50, 0.0)
    record = dict(bars=300, da=dict(value=0.5, lo=0.5, hi=0.5), coverage90=0.9, close=1.0, range=None, volume=None)
    for hi, words in ((0.5, "no direction called"), (0.55, "50.0% right calls [50.0%, 55.0%]")):
        record["da"]["hi"] = hi
        report.print_record(record, sample.Calibration(k=0.0), {}, [bars])
        said = capsys.readouterr().out
        assert words in said and ("right calls" in said) == (hi > 0.5) and "no better than a coin" in said


def test_where_most_bars_stay_the_head_stays(loaded):
    model, tokenizer = loaded
    [bars] = one_factor(1, 700, 0.0)
    for share, is_fitted in ((0.3, True), (0.7, False)):
        ohlcva = bars.ohlcva.copy()
        for i in np.flatnonzero(np.random.default_rng(0).random(700) < share)[1:]:
            ohlcva[i, :4] = ohlcva[i - 1, 3]
        found = sample.calibrate(model, tokenizer, [data.Bars("S", bars.time, ohlcva)])
        assert (found.head is not None) == is_fitted and 0 <= found.k <= trust.MOST_TRUST


def test_paths_have_the_ranges_that_the_head_says(loaded):
    """Every path's first coarse code, against the corrected law itself."""
    model, tokenizer = loaded
    series = one_factor(1, 700, 0.0)
    T, C = trust.code_columns(model).float(), model.config.n_embd
    wide = trust.Head(torch.zeros(C, 5), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), T)
    spreads = []
    for calibration in (sample.Calibration(), sample.Calibration(head=wide)):
        paths, _ = sample.simulate(model, tokenizer, series, 1, 4000, calibration=calibration)
        [origin] = sample.origins_of(model, tokenizer, series)
        with torch.no_grad():
            h = model.prefill(*origin.tokens.T[:, None], torch.from_numpy(origin.time[None, -len(origin.tokens):])).h
            law = calibration.law(model, h).double().softmax(-1)[0]
        log_range = np.log(paths[0, :, 0, 1] / paths[0, :, 0, 2]).clip(1e-9)
        spreads.append((np.log(log_range).mean(), (law @ T[:, 0].double()).item()))
    drawn, said = spreads[1][0] - spreads[0][0], spreads[1][1] - spreads[0][1]
    columns = (model.values(model.D1.double())[1] - model.values(model.D1.double())[2]).clamp(min=1e-2).log()
    share = model.coarse_share.double().softmax(-1)
    unit = (share @ (columns - share @ columns)**2).sqrt().item()
    assert said > 0.3 and drawn == pytest.approx(said * unit, rel=0.25)


def test_a_market_that_stands_and_a_new_listing(loaded, tmp_path, call):
    model, tokenizer = loaded
    still = one_factor(1, 600, 0.0)[0]
    flat = data.Bars("FLAT", still.time, np.tile([5.0, 5, 5, 5, 100, 500], (600, 1)))
    calibration = sample.calibrate(model, tokenizer, [flat, still[-40:]])
    paths, p_up = sample.simulate(model, tokenizer, [flat, still[-40:]], 3, 50, calibration=calibration)
    assert np.isnan(p_up[0]) and 0 < p_up[1] < 1 and np.isfinite(paths[..., :5]).all()


def test_g1_the_past_is_forecast_from_earlier_bars_alone(loaded):
    """What a calibration and a record are made of: each bar's own and later ones change nothing before, to the bit."""
    model, tokenizer = loaded
    series = one_factor(2, 700, 0.0)
    wild = [data.Bars(b.symbol, b.time, np.where(np.arange(700)[:, None] < 500, b.ohlcva, b.ohlcva * 3)) for b in series]
    for one, other in zip(*(past.read_pasts(model, tokenizer, each) for each in (series, wild))):
        k = 501 - one.first         # bar 500 itself is forecast from those before it
        assert one.first == other.first < 300 and len(one.h) == 700 - one.first
        assert torch.equal(one.h[:k], other.h[:k]) and not torch.equal(one.h[k], other.h[k])
        n = model.config.block_size     # and as a forecast from there has it
        tokens = torch.from_numpy(data.tokenize(one.bars, tokenizer).astype(np.int64))[700 - 1 - n:-1]
        time = torch.from_numpy(one.bars.time[700 - 1 - n:-1].copy())
        torch.testing.assert_close(one.h[-1], model.hidden(*tokens.T[:, None], time[None])[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source, named, own", [
    ("a", "a/x.csv", True), ("a/x.csv", "a", True), ("a/*.csv", "a/x.csv", True), ("a/x.csv", "b/x.csv", True), ("a/x.csv", None, True),
    ("a", "b/y.csv", False), ("a/*.csv", "b", False), ("c", "d", False), ("c", "c", True)])
def test_own_bars_are_known_by_their_files(tmp_path, monkeypatch, source, named, own):
    """Also those of folders, of globs, and of arrays, whose names are all alike."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.csv", "b/x.csv", "b/y.csv", "c/symbols.json", "c/bars.time", "d/symbols.json", "d/bars.time"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if source == "a/*.csv" and named == "b":
        (tmp_path / "b/x.csv").unlink()
    meta = dict(data=dict(sources=[source]), splits=(7, 9))
    assert inputs.trained_until(named and [named], meta) == (7 if own else None)


def test_g1_a_backtest_is_calibrated_on_bars_before_its_first_target(loaded):
    model, tokenizer = loaded
    series = one_factor(2, 700, 0.0)
    wild = [data.Bars(b.symbol, b.time, np.where(np.arange(700)[:, None] < 500, b.ohlcva, b.ohlcva[::-1])) for b in series]
    start, val = series[0].time[[500, 300]]
    # (val, val): weights of many markets
    for splits, n_bars in ((None, 2 * (500 - data.CONTEXT)), ((val, start), 2 * 200), ((val, val), 2 * (500 - data.CONTEXT))):
        found = [backtest.past_calibration(model, tokenizer, dict(splits=splits), backtest.Targets(each, start, 2**62, 1, 50, 0), start)
                 for each in (series, wild)]
        assert found[0] == found[1] and torch.equal(found[0].table, found[1].table) and found[0].n_bars == n_bars


def test_g1_a_backtest_is_calibrated_anew_as_time_goes_on(loaded, monkeypatch):
    """Each target and each path by the last calibration before it, from bars before that alone."""
    model, tokenizer = loaded
    monkeypatch.setattr(backtest, "RENEW", 50)
    series = one_factor(2, 700, 0.0)
    series[1] = series[1][:650]
    time = series[0].time
    wild = [data.Bars(b.symbol, b.time, np.where(b.time[:, None] < time[600], b.ohlcva, b.ohlcva[::-1])) for b in series]
    t, other = (backtest.Targets(each, time[500], 2**62, 2, 7, 0) for each in (series, wild))
    found, blind = (backtest.calibrations(model, tokenizer, dict(splits=None), each) for each in (t, other))
    assert [stamp for stamp, _ in found] == time[500:700:50].tolist()
    for i, ((stamp, one), (_, same)) in enumerate(zip(found, blind)):
        assert one == backtest.past_calibration(model, tokenizer, dict(splits=None), t, stamp) and (one == same) == (i < 3)
    assert len({one.k for _, one in found}) == 4
    for forecaster, extra, stamps in ((backtest.next_bars, [4], t.time), (backtest.simulated, [20], t.begins)):
        whole = forecaster(model, tokenizer, t, *extra, calibration=found)
        turn = np.searchsorted(time[550:700:50], stamps, side="right")
        for i, (_, one) in enumerate(found):
            alone = forecaster(model, tokenizer, t, *extra, calibration=one)
            for name, value in alone.items():
                assert np.allclose(whole[name][turn == i], value[turn == i], rtol=1e-5, atol=1e-7), name
        name = "p_up" if "p_up" in whole else "path_crps"
        assert not np.allclose(whole[name], alone[name], rtol=1e-4)


def test_strange_histories_get_a_forecast_and_a_true_line(checkpoint, tmp_path, call):
    """A bad tick, a market that stands, a new listing, bars that end before the weights' dates."""
    [usual] = one_factor(1, 900, 0.0)
    tick, stands, early = (data.Bars(name, usual.time, usual.ohlcva.copy()) for name in ("TICK", "STANDS", "EARLY"))
    tick.ohlcva[850, [1, 3]] *= 100
    stands.ohlcva[:, :4] = 5.0
    early.time = usual.time - 20_000 * DAY
    cases = {"TICK": (tick, "record, the last 300 bars"), "STANDS": (stands, "no record"), "NEW": (usual[-40:], "no record"),
             "EARLY": (early, "weights of 2")}
    splits = load_checkpoint(checkpoint)[2]["splits"]
    assert early.time[-1] < splits[1] < usual.time[0]
    for name, (bars, line) in cases.items():
        path = write_csv(tmp_path / f"{name}.csv", bars)
        status, out, _ = call("sample", "--ckpt", checkpoint, "--data", path, "--paths", 20, "--horizon", 3)
        assert status == 0 and line in out and ("they have seen years after" in out) == (name == "EARLY"), out
        status, out, _ = call("sample", "--ckpt", checkpoint, "--data", path, "--paths", 20, "--horizon", 3, "--json")
        report = json.loads(out)
        [row] = report["symbols"]
        assert (report["record"] is None) == (name in ("STANDS", "NEW"))
        if name == "STANDS":
            assert row["p_up"] is None and row["rank"] is None and row["q05"] == row["q95"] == 5
        else:
            last = bars.ohlcva[-1, 3]
            assert 0 < row["p_up"] < 1 and 0.5 * last < row["q05"] < row["q50"] < row["q95"] < 2 * last, name


def test_a_portfolio_has_the_weights_that_are_given():
    series = one_factor(3, 50, 0.0)
    ohlcva = np.random.default_rng(0).normal(50, 5, (3, 200, 2, 6))
    assert np.allclose(report.weights_of(None, series, 5), 1 / 3)
    assert report.weights_of(["S0=0.5,S2=0.25"], series, 5).tolist() == [0.5, 0, 0.25]
    for wrong in ("XX=1", "S0=a", "S0", "S0=nan", "S0=0"):
        with pytest.raises(UserError, match="weights"):
            report.weights_of([wrong], series, 5)
    early = data.Bars("EARLY", series[0].time - 400 * DAY, series[0].ohlcva)
    assert report.weights_of(None, [early, *series[1:]], 5).tolist() == [0, 0.5, 0.5]      # it ended long before
    assert report.weights_of(["EARLY=1"], [early, *series[1:]], 5).tolist() == [1, 0, 0]
    weights = np.array([0.5, 0.3, 0.2])
    found, beside = report.portfolio_of(series, ohlcva, weights, 0)
    moves = ohlcva[:, :, -1, 3] / np.array([b.ohlcva[-1, 3] for b in series])[:, None] - 1
    assert found["q05"] == pytest.approx(np.quantile(weights @ moves, 0.05)) and found["var95"] == -found["q05"]
    assert beside["p_best"].sum() == pytest.approx(1) and found["apart"]["expected_return"] == pytest.approx(found["expected_return"])
