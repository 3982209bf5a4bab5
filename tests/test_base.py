"""The weights that come along: what they are, and that they forecast bars of any interval."""
import os

import numpy as np
import pytest

from backstage.scores import against
from backstage.series import DAY
import backtest
import data
import sample
from conftest import ROOT
from model import load_checkpoint

BASE = os.path.join(ROOT, "assets", "base.pt")


@pytest.fixture(scope="module")
def base():
    return load_checkpoint(BASE)


def market(interval, n_bars=600, seed=0):
    """Bars of a market with clusters of volatility, `interval` seconds apart, from 2022 on."""
    bars = data.synthetic(seed=seed, signal=0.0, n_symbols=1, n_bars=n_bars)[0][0]
    return data.Bars(f"M{interval}", 1_640_995_200 + interval * np.arange(n_bars), bars.ohlcva)


def test_they_say_where_they_come_from(base):
    """Small, with their sources by name alone, the dates and the scores that chose them."""
    _, _, meta = base
    assert os.path.getsize(BASE) <= 8e6
    assert len(meta["data"]["sources"]) > 10 and not any("/" in name for name in meta["data"]["sources"])
    assert meta["splits"][1] <= data.parse_time("2026-05-01")
    assert min(meta["data"]["intervals"]) <= 60 and max(meta["data"]["intervals"]) >= 7 * DAY
    assert 0 < min(row["score"] for row in meta["metrics"] if row["stage"] == "pretrain") < 1


@pytest.mark.parametrize("interval", [60, 3600, DAY])
def test_they_forecast_any_interval(base, interval):
    model, tokenizer, _ = base
    bars = market(interval)
    paths = sample.forecast(model, tokenizer, bars, horizon=5, paths=40)
    open_, high, low, close, volume, _ = np.moveaxis(paths, -1, 0)
    assert paths.shape == (40, 5, 6) and np.isfinite(paths[..., :5]).all()
    assert (low <= np.minimum(open_, close)).all() and (np.maximum(open_, close) <= high).all()
    assert (low > 0).all() and (volume >= 0).all()
    move = np.log(close[:, -1] / bars.ohlcva[-1, 3])
    usual = np.diff(np.log(bars.ohlcva[:, 3])).std() * 5**0.5
    assert usual / 4 < move.std() < 4 * usual


def test_they_beat_a_gaussian_on_clusters_of_volatility():
    """CRPS of the close and its 95 % interval, on a simulated market that is none of those they were trained on."""
    series = [market(DAY, 2500, seed) for seed in (3, 4)]
    start = data.iso(series[0].time[1500])
    result = backtest.backtest([BASE], series, start=start, horizon=1, paths=2, stride=10**6)
    ratio = against(result["replicates"][BASE], result["replicates"]["gaussian20"], "crps", result["targets"])
    assert ratio["hi"] < 1, ratio
