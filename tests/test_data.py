"""Bars, features, splits and batches, against naive forms and against what users feed in."""
import datetime
import functools
import inspect
import os
import pickle
import signal
import subprocess
import time
import sys
import threading
import zipfile
import zoneinfo

import numpy as np
import pytest
import torch

from backstage.clock import calendar
from backstage.files import _beside, check_out, csv_text, fingerprint, load_safe, save_atomic, write_atomic, sole_writer
from backstage.markets import KINDS, _student4, reverting_best, reverting_path
from backstage.mapped import write_folder
from backstage.script import StopSignal, bf16_gain, cli, peak_memory, pick_dtype, printable, run
from backstage.opponents import log_range
from backstage.series import DAY, HOUR, WEEK, decayed_sum
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


@functools.cache
def hourly(kind):
    """Bars whose hours differ: an exchange, one with summer time, a market that never closes, weekdays of daily bars, an
    exchange with gaps."""
    step, n = dict(daily=(DAY, 400)).get(kind, (1800, 4000))
    time = 1_600_000_200 // step * step + step * np.arange(3 * n)
    hour, weekday = time // 3600 % 24, (time // DAY + 3) % 7
    opens = dict(session=(hour >= 8) & (hour < 14) & (weekday < 5), always=hour >= 0, daily=weekday != 5)
    opens["gappy"] = opens["session"] & (np.random.default_rng(1).random(len(time)) < 0.7)
    opens["summer"] = opens["session"]
    time = time[opens[kind]][:n]
    hour, weekday = time // 3600 % 24, (time // DAY + 3) % 7
    wide = np.where(weekday == 6, 0.2, 1.0) if kind == "daily" else np.where(hour % 8 == 0, 5.0, 1.0)
    wide = wide * np.where((kind == "always") & (weekday >= 5), 0.4, 1.0)
    rng = np.random.default_rng(0)
    size, normal = 0.002 * wide * np.exp(0.3 * rng.normal(size=len(time))), rng.normal(size=(5, len(time)))
    close = 50 * np.exp(np.cumsum(size * normal[0]))
    open_ = np.append(close[0], close[:-1]) * np.exp(0.2 * size * normal[1])
    high = np.maximum(open_, close) * np.exp(0.5 * size * np.abs(normal[2]))
    low = np.minimum(open_, close) * np.exp(-0.5 * size * np.abs(normal[3]))
    volume = np.exp(8 + 0.4 * normal[4]) * wide ** 1.5
    if kind == "summer":
        time = time + HOUR * (time // (75 * DAY) % 2)
    return Bars("X", time, np.stack([open_, high, low, close, volume, volume * (high + low) / 2], axis=1)), wide


HOURS = ("session", "summer", "always", "daily", "gappy")


def without_summer_time(time):
    """Stamps less the hours by which openings, bars after half a day without any, have moved."""
    local, moved, opening = [], 0, time[0]
    for before, stamp in zip([time[0], *time], time):
        if stamp - before >= DAY / 2:
            moved += {HOUR: HOUR, DAY - HOUR: -HOUR}.get((stamp - opening) % DAY, 0)
            opening = stamp
        local.append(stamp - moved)
    return np.array(local)


def naive_log_factors(time, y, levels):
    """Slots from the definition, of one series y: period by period, slot by slot."""
    a, L_of_bar = 0.5 ** (1 / 15), np.zeros(len(time))
    for period, width in levels:
        S, W, L, before = {}, {}, {}, {}       # before: L as known when each period began
        noise = age = total = 0.0
        left = y - L_of_bar
        for d in np.unique(time // period):
            before[d], x = dict(L), {}
            for k in np.unique(time[time // period == d] % period // width):
                values = left[(time // period == d) & (time % period // width == k)]
                if np.isfinite(values).any():
                    x[k] = np.nanmean(values)
            level = np.mean([x[k] - L.get(k, 0) for k in x])
            noise = a * noise + np.mean([(x[k] - level - L.get(k, 0)) ** 2 for k in x])
            age, total = a * age + 1, a * total + len(x)
            for k in {*S, *x}:
                S[k] = a * S.get(k, 0) + (x[k] - level if k in x else 0)
                W[k] = a * W.get(k, 0) + (k in x)
            error, signal = noise / age, sum(S[k] ** 2 / W[k] for k in S)
            r = max(0.5, error / max((signal - error * len(S)) / total, 1e-9))
            by_chance = signal <= error * (len(S) + 3 * (2 * len(S)) ** 0.5)
            L = {k: 0.0 if by_chance else S[k] / (W[k] + r) for k in S}
        L_of_bar = L_of_bar + [before[time[t - 1] // period].get(time[t] % period // width, 0) if t >= 32 else 0
                               for t in range(len(time))]
    return L_of_bar


@pytest.mark.parametrize("kind", HOURS)
def test_factors_of_the_hours_equal_the_definition_and_are_found(kind):
    bars, wide = hourly(kind)
    slots, local = data.slots_of(bars), without_summer_time(bars.time)
    assert (local != bars.time).any() == (kind in ("summer", "gappy"))
    y = np.log1p(bars.ohlcva[:, 4])
    levels = [(WEEK, DAY)] if kind == "daily" else [(DAY, 1800), (WEEK, HOUR)]
    np.testing.assert_allclose(slots.log_factors[:, 1], naive_log_factors(local, y, levels), atol=1e-9)
    late = slots.log_factors[len(bars) // 2:, 0]
    assert np.corrcoef(late, np.log(wide[len(bars) // 2:]))[0, 1] > 0.9
    assert (slots.log_factors[:32] == 0).all()
    ratio = [np.log(log_range(bars) / data.scales(bars, f))[200:].std() for f in (slots.log_factors, 0 * slots.log_factors)]
    assert ratio[0] < (1 if kind == "daily" else 0.8) * ratio[1]


@pytest.mark.parametrize("kind", HOURS)
def test_g1_and_g2_with_hours_in_the_scale(kind):
    """No later bar, no later stamp changes a bit; any bars come back, and the next bar by what the State itself holds."""
    bars, _ = hourly(kind)
    x, end = data.features(bars)
    slots = data.slots_of(bars)
    back, state = data.inverse(x[1:], data.features(bars[:1])[1], slots.log_factors[1:])
    np.testing.assert_allclose(back[:, :4], bars.ohlcva[1:, :4], rtol=1e-6)
    np.testing.assert_allclose(back[:, 4:], bars.ohlcva[1:, 4:], rtol=1e-4)
    np.testing.assert_allclose(state.total, end.total, rtol=1e-4)
    for t in [*range(33, len(bars), 97), *np.flatnonzero(np.diff(slots.shift)) + 1]:  # the day that clocks change, too
        np.testing.assert_array_equal(slots.coming(t - 1, bars.time[t:t + 1])[0], slots.log_factors[t])
    wrong = 0
    for t in (31, 32, 33, 200, len(bars) // 2, len(bars) - 1):
        z, state = data.features(bars[:t])
        np.testing.assert_array_equal(x[:t].view(np.uint32), z.view(np.uint32))
        np.testing.assert_array_equal(state.coming, data.states_at(bars, [t - 1])[0].coming)
        if data.future_times(bars.time[:t], 1) == bars.time[t]:
            one, _ = data.inverse(x[t:t + 1], state)
            np.testing.assert_allclose(one[0, :4], bars.ohlcva[t, :4], rtol=1e-6)
        else:
            wrong += 1
    assert wrong <= (4 if kind == "gappy" else 1)


def test_factors_of_stamps_to_come():
    bars, _ = hourly("session")
    slots, row = data.slots_of(bars), 2000
    stamps = bars.time[row + 1:row + 40]
    cut = data.slots_of(bars[:row + 1])
    np.testing.assert_array_equal(slots.coming(row, stamps), cut.coming(row, stamps))
    assert np.abs(slots.coming(row, stamps)[:, 0]).max() > 0.5
    assert (slots.coming(row, bars.time[row:row + 1] // DAY * DAY + 3 * HOUR) == 0).all()  # no day had it
    state = data.features(bars[:row + 1])[1].anchored(slots.coming(row, stamps))
    s, _, d, _ = state.scales()
    for size in (4.0, -4.0):        # s over its factor stays within [1/8, 8] of the origin
        _, end = data.inverse(np.full((39, 6), size), state)
        assert 0.12 < end.scales()[0] / np.exp(end.coming[:1, 0].sum()) / (s / np.exp(state.coming[0, 0])) < 8.01


def test_without_hours_all_factors_are_one():
    assert (data.slots_of(random_bars(20_000)).log_factors == 0).all()
    weekly = Bars("X", 7 * DAY * np.arange(300), random_bars(300).ohlcva)
    assert (data.slots_of(weekly).log_factors == 0).all()


def test_the_sign_of_the_close_feature_is_the_sign_of_the_move():
    bars = random_bars(5000, volatility=1e-3)
    still = np.random.default_rng(0).random(5000) < 0.3
    still[::512] = True  # where a piece of features begins, too
    for t in np.flatnonzero(still)[1:]:
        bars.ohlcva[t:, :4] *= bars.ohlcva[t - 1, 3] / bars.ohlcva[t, 3]
        bars.ohlcva[t, 3] = bars.ohlcva[t - 1, 3]
    x, _ = data.features(bars)
    np.testing.assert_array_equal(np.sign(x[1:, 0]), np.sign(np.diff(bars.ohlcva[:, 3])))


def test_features_go_on_from_a_state():
    bars = random_bars(20_000)
    whole, end = data.features(bars)
    head, state = data.features(bars[:12_345])
    tail = [x for x, state in data.feature_pieces(bars[12_345:], state)]
    np.testing.assert_allclose(np.concatenate([head, *tail]), whole, atol=3e-6)


def test_g2_round_trip_over_200_000_bars():
    bars = random_bars(200_000, holes=False)
    x, end = data.features(bars)
    _, first = data.features(bars[:1])
    back, state = data.inverse(x[1:], first)
    np.testing.assert_allclose(back[:, :4], bars.ohlcva[1:, :4], rtol=1e-5)
    np.testing.assert_allclose(back[:, 4:], bars.ohlcva[1:, 4:], rtol=1e-4)
    assert end.close == bars.ohlcva[-1, 3]
    for t in (2, 700, 150_000):  # one bar from the true past
        one, _ = data.inverse(x[t:t + 1], data.states_at(bars, [t - 1])[0])
        np.testing.assert_allclose(one[0, :4], bars.ohlcva[t, :4], rtol=1e-6)
    for k in ("close", "total", "weight"):
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
    for bound, origin in ((True, state.anchored()), (False, state)):  # and the bars are made with them
        bars, _ = data.inverse(np.full((2000, 6), 1.5), origin)
        move = np.abs(np.diff(np.log(bars[:, 3]))).max()
        assert (move <= np.sinh(1.5) * s0 * 8 * (1 + 1e-9)) == bound


def test_no_generated_bar_moves_by_more_than_twice_the_widest_before_it():
    """The true range of the wildest bar whose s_t had settled, found bar by bar, or by way of the inverse; at least ten s_t."""
    for wild in (1.0, 40.0):
        bars = random_bars(400)
        bars.ohlcva[4:, :4] *= 20       # before s_t has settled: does not count
        bars.ohlcva[200:, :4] *= np.exp(wild * data.scales(bars)[200])
        x, state = data.features(bars)
        s, c = data.scales(bars), bars.ohlcva[:, 3]
        high, low = np.maximum(bars.ohlcva[1:, 1], c[:-1]), np.minimum(bars.ohlcva[1:, 2], c[:-1])
        widest = (np.log(high / low) / s[1:])[20:].max()      # of bars that have 20 true ranges before them
        assert state.widest == pytest.approx(widest) and (widest > 20) == (wild > 1)
        _, came = data.inverse(x[300:], data.states_at(bars, [299])[0])
        assert came.widest == pytest.approx(widest, rel=1e-5)
        for sign in (-1, 1):
            far = np.zeros((1, 6))
            far[0, 0] = sign * np.arcsinh(1e4)
            (bound,), _ = data.inverse(far, state.anchored())
            assert np.log(bound[3] / c[-1]) / state.scales()[0] == pytest.approx(sign * max(10, 2 * widest))
            (free,), _ = data.inverse(far, state)
            assert free[3] / c[-1] == pytest.approx(10.0 ** sign)


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
    limits = {"train": (-np.inf, val), "val": (val, test), "test": (test, np.inf)}
    for bars in series:
        for split, (begin, end) in limits.items():
            first, last = data.targets_of(bars, split, (val, test))
            assert ((bars.time[first:last] >= begin) & (bars.time[first:last] < end)).all() and first >= data.CONTEXT
    assert data.split_borders(series, "1970-01-01 10:00", "1970-01-01T15:00:00") == (36_000, 54_000)
    for bad in (("1970-01-02", "1970-01-01"), ("never", None), ("1960-01-01", None)):
        with pytest.raises(UserError):
            data.split_borders(series, *bad)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches(split):
    """Windows of one series, targets one bar later, -1 for those that do not count; ranks share them; (seed, step) decide."""
    series, tokens = panel()
    borders = data.split_borders(series)
    streams = data.make_streams(series, tokens, split, borders, 64, 7)
    seen = set()
    for step in range(60):
        coarse, fine, time, (tc, tf) = data.get_batch(streams, 9, step)
        assert coarse.shape == (7, 64) and coarse.dtype == torch.int64
        for rank in range(3):  # rank r takes rows r::world
            part = data.get_batch(streams, 9, step, rank, 3)
            assert torch.equal(part[0], coarse[rank::3]) and torch.equal(part[3][1], tf[rank::3])
        for b, (which, end) in enumerate(zip(*data.draw_windows(streams, 9, step))):
            bars, own = series[which], tokens[which]
            first, last = data.targets_of(bars, split, borders)
            np.testing.assert_array_equal(time[b], bars.time[end - 64:end])
            np.testing.assert_array_equal(torch.stack((coarse[b], fine[b]), 1), own[end - 64:end])
            at = np.arange(end - 63, end + 1)
            counts = (at >= first) & (at < last)
            np.testing.assert_array_equal(torch.stack((tc[b], tf[b]), 1), np.where(counts[:, None], own[at], -1))
            assert counts[-1] and (split != "train" or counts.all())
            seen.update((which, t) for t in at[counts])
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


def test_memory_mapped_form_holds_the_same_bars(tmp_path):
    series = [Bars("B", np.arange(9000), random_bars(9000).ohlcva), Bars("A", np.arange(100), random_bars(100).ohlcva)]
    write_folder([series[0][:4000], series[1], series[0][3000:]], tmp_path / "set")  # B goes on in another file
    loaded = data.load(str(tmp_path / "set"))
    assert [b.symbol for b in loaded] == ["B", "A"] and isinstance(loaded[0].ohlcva, np.memmap)
    for a, b in zip(series, loaded):
        np.testing.assert_array_equal(a.time, b.time)
        np.testing.assert_array_equal(a.ohlcva, b.ohlcva)
    assert fingerprint(series) == fingerprint(loaded)
    with pytest.raises(UserError, match="already"):
        write_folder(series, tmp_path / "set")


def test_tokens_are_those_of_the_features_made_in_pieces():
    bars, tokenizer = random_bars(2000), FakeTokenizer()
    x, _ = data.features(bars)
    tokens = data.tokenize(bars, tokenizer)
    assert tokens.dtype == np.int16 and tokenizer.calls == 4
    np.testing.assert_array_equal(tokens, x[:, :2] > 0)
    np.testing.assert_array_equal(tokens, data.tokenize(bars, tokenizer, x))
    with pytest.raises(ValueError, match="1999 bars"):
        data.tokenize(bars, tokenizer, x[1:])


# ---- the clock of the future

def stamps(*texts):
    return np.array([data.parse_time(t) for t in texts], np.int64)


def daily(first, n):
    days = np.arange(np.datetime64(first), np.datetime64(first) + n)
    return days[(days.astype(int) + 3) % 7 < 5].astype("datetime64[s]").astype(np.int64)


@pytest.mark.parametrize("history, future", [
    (daily("2024-01-01", 60), ("2024-03-01", "2024-03-04", "2024-03-05")),                                     # ends on a Thursday
    (np.arange(100) * DAY + data.parse_time("2024-01-06"), ("2024-04-15", "2024-04-16")),                     # every day
    (np.arange(9) * 7 * DAY + data.parse_time("2024-01-05"), ("2024-03-08", "2024-03-15")),                   # weekly
    (stamps("2024-01-31", "2024-02-29", "2024-03-31"), ("2024-04-30", "2024-05-31")),                          # month ends
    (stamps("2024-01-01", "2024-02-01", "2024-03-01"), ("2024-04-01", "2024-05-01")),
    (stamps("2023-12-30", "2024-01-30"), ("2024-02-29", "2024-03-30")),
    (stamps("2023-08-31", "2023-09-29", "2023-10-31", "2023-11-30", "2023-12-29", "2024-01-31"), ("2024-02-29", "2024-03-29")),
    (stamps("2023-08-01", "2023-09-01", "2023-10-02", "2023-11-01", "2023-12-01", "2024-01-02"), ("2024-02-01", "2024-03-01")),
    (data.parse_time("2023-10-16 04:00") + 7 * DAY * np.arange(21) + 3600 * (np.arange(21) > 2),
     ("2024-03-11 04:00", "2024-03-18 04:00")),  # midnight in New York
    (stamps("2023-11-01", "2023-12-01", "2024-01-01", "2024-02-14"), ("2024-03-01", "2024-04-01")),             # a live bar
    (stamps("2023-11-30", "2023-12-31", "2024-01-31", "2024-02-14"), ("2024-02-29", "2024-03-31")),
    (stamps("2023-04-01", "2023-07-01", "2023-10-01", "2024-01-01", "2024-02-14"), ("2024-04-01", "2024-07-01")),
    (np.concatenate([d + 52_200 + 3600 * np.arange(7) for d in daily("2024-01-01", 26)]), ("2024-01-29 14:30", "2024-01-29 15:30")),  # sessions, Friday's close
    (np.arange(3000) * 60 + data.parse_time("2024-03-01"), ("2024-03-03 02:00", "2024-03-03 02:01")),              # round the clock
    (stamps("2024-03-01 10:00"), ("2024-03-04 10:00",)),                                                       # one bar, a Friday
])
def test_future_times_follow_spacing_and_sessions(history, future):
    assert data.future_times(np.asarray(history, np.int64), len(future)).tolist() == stamps(*future).tolist()


def test_calendar_weekday():
    assert calendar(torch.tensor([0, 3 * DAY]))[:, 2].tolist() == [3, 6]  # 1970 began on a Thursday


SUMMER = stamps("2024-03-10 07:00", "2024-11-03 06:00")  # of New York


def open_times(gap, is_open, first="2024-01-01", days=366):
    """Stamps of a year at which a market in New York is open. is_open(weekday, seconds of the day), both local."""
    time = data.parse_time(first) + np.arange(0, days * DAY, gap)
    local = time - 5 * 3600 + 3600 * ((time >= SUMMER[0]) & (time < SUMMER[1]))
    return time[is_open((local // DAY + 3) % 7, local % DAY)].astype(np.int64)


def hour(h, m=0):
    return 3600 * h + 60 * m


STOCKS = lambda day, s: (day < 5) & (s >= hour(9, 30)) & (s < hour(16))
CURRENCY = lambda day, s: (day < 4) | ((day == 4) & (s < hour(17))) | ((day == 6) & (s >= hour(17)))
FUTURES = lambda day, s: CURRENCY(day, s) & ((s < hour(17)) | (s >= hour(18)))
CLOCKS = {
    "stocks, 15 minutes": open_times(900, STOCKS),
    "stocks, hours from half past": open_times(1800, lambda day, s: STOCKS(day, s) & (s % 3600 == 1800)),
    "stocks, days from midnight there": open_times(3600, lambda day, s: (day < 5) & (s == 0)),
    "currency, 5 minutes": open_times(300, CURRENCY),
    "currency, hours": open_times(3600, CURRENCY),
    "currency, 4 hours": open_times(3600, lambda day, s: CURRENCY(day, s) & (s % hour(4) == hour(1))),
    "currency, minutes from five past": open_times(60, lambda day, s: CURRENCY(day, s) & ((day < 6) | (s >= hour(17, 5))), days=60),
    "futures with an hour's break": open_times(1800, FUTURES),
    "coins, minutes": open_times(60, lambda day, s: day >= 0, days=40),
    "coins, days": open_times(DAY, lambda day, s: day >= 0),
    "Saturday to Wednesday": open_times(DAY, lambda day, s: (day < 2) | (day > 3)),
    "Shanghai, with lunch": np.concatenate([d + hour(h, m) + 300 * np.arange(24) for d in daily("2024-01-01", 300) for h, m in ((1, 30), (5, 0))]),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_future_times_are_those_that_come(name):
    """From anywhere in a year, except over a change of the clock and in the hours after it."""
    time, rng = CLOCKS[name], np.random.default_rng(0)
    first, longest = np.searchsorted(time, time[0] + 15 * DAY), 300 if len(time) > 3000 else 30
    checked = 0
    for end in rng.integers(first, len(time) - longest, 60):
        horizon = int(rng.choice([1, 10, longest // 3, longest]))
        came = time[end:end + horizon]
        if any(time[end - 1] < change <= came[-1] for change in SUMMER):
            continue
        np.testing.assert_array_equal(data.future_times(time[:end], horizon), came, str(data.iso(time[end - 1])))
        checked += 1
    assert checked >= 25


@pytest.mark.parametrize("name, last, came", [
    ("stocks, 15 minutes", "2024-03-11 13:30", "2024-03-11 13:45"),  # the first bar of summer time
    ("currency, 5 minutes", "2024-03-15 20:55", "2024-03-17 21:00"),
    ("currency, hours", "2024-11-08 21:00", "2024-11-10 22:00"),
    ("coins, minutes", "2024-01-19 23:59", "2024-01-20 00:00"),      # a Friday
])
def test_a_week_of_either_clock_has_each_bar_once(name, last, came):
    time = CLOCKS[name]
    history, came = time[time <= data.parse_time(last)], data.parse_time(came)
    future = data.future_times(history, 12_000)
    assert future[0] == came
    np.testing.assert_array_equal(future[future < came + 7 * DAY], time[(time >= came) & (time < came + 7 * DAY)])


@pytest.mark.parametrize("name, last, live, came", [
    ("coins, minutes", "2024-01-19 12:00", "2024-01-19 12:00:41", ("2024-01-19 12:01", "2024-01-19 12:02")),
    ("currency, hours", "2024-01-18 12:00", "2024-01-18 12:23", ("2024-01-18 13:00", "2024-01-18 14:00")),
    ("stocks, hours from half past", "2024-01-19 20:30", "2024-01-19 20:48:10", ("2024-01-22 14:30", "2024-01-22 15:30")),
    ("stocks, days from midnight there", "2024-01-18 05:00", "2024-01-19 18:32:07", ("2024-01-22 05:00", "2024-01-23 05:00")),
])
def test_a_live_last_bar_shifts_nothing(name, last, live, came):
    time = CLOCKS[name]
    time = np.append(time[time <= data.parse_time(last)], data.parse_time(live)).astype(np.int64)
    for history in (time, time[-80:]):
        assert data.future_times(history, 2).tolist() == stamps(*came).tolist()


def test_weeks_with_a_live_bar_or_a_holiday_keep_their_day():
    mondays = data.parse_time("2024-01-01") + 7 * DAY * np.arange(20)
    want = [mondays[-1] + 7 * DAY, mondays[-1] + 14 * DAY]
    for late in (0, 1, 3, 5, 3.6):
        time = np.append(mondays[:-1], mondays[-1] + late * DAY).astype(np.int64)
        assert data.future_times(time, 2).tolist() == want


@pytest.mark.parametrize("dropped", [("2024-02-19", "2024-02-20"), ("2024-02-12", "2024-02-19"), ("2024-01-22", "2024-02-19")])
def test_holidays_of_the_past_close_no_day_to_come(dropped):
    """A Monday, the last whole week, and four weeks without a bar."""
    time = CLOCKS["stocks, 15 minutes"]
    began, ended = stamps(*dropped)
    history = time[(time < data.parse_time("2024-02-21 21:00")) & ((time < began) | (time >= ended))]
    came = time[time >= data.parse_time("2024-02-21 21:00")][:200]
    np.testing.assert_array_equal(data.future_times(history, 200), came)


@pytest.mark.parametrize("zone", ["America/New_York", "Europe/London", "Australia/Sydney", "Asia/Tokyo"])
def test_a_change_of_the_clock_months_ago_is_remembered(zone):
    """One stamp a day, at an exchange's opening: from a year's history on, the next change comes on its own day."""
    zone, days = zoneinfo.ZoneInfo(zone), [datetime.date(2022, 1, 3) + datetime.timedelta(n) for n in range(900)]
    time = np.array([int(datetime.datetime(d.year, d.month, d.day, 9, 30, tzinfo=zone).timestamp()) for d in days if d.weekday() < 5])
    for end in range(300, 560, 20):
        np.testing.assert_array_equal(data.future_times(time[:end], 60), time[end:end + 60])


def test_a_change_of_the_clock_is_seen_beside_a_holiday_and_a_lone_session_is_no_habit():
    time = CLOCKS["stocks, 15 minutes"]
    end = data.parse_time("2024-03-12 20:00")
    history = time[(time < end) & (time // DAY != data.parse_time("2024-03-11") // DAY)]
    saturday = data.parse_time("2024-02-24 12:00") + 900 * np.arange(20)
    came = time[time >= end][:300]
    np.testing.assert_array_equal(data.future_times(history, 300), came)
    np.testing.assert_array_equal(data.future_times(np.sort(np.append(history, saturday)), 300), came)


@pytest.mark.parametrize("name, first, last, came", [
    ("coins, minutes", "2024-01-17 10:00", "2024-01-19 23:59", "2024-01-22 00:00"),       # no weekend seen
    ("coins, minutes", "2024-01-19 19:00", "2024-01-19 23:59", "2024-01-22 00:00"),
    ("coins, minutes", "2024-01-20 10:00", "2024-01-20 20:00", "2024-01-20 20:01"),       # a Saturday
    ("coins, minutes", "2024-01-12 10:00", "2024-01-14 09:00", "2024-01-14 09:01"),
    ("stocks, 15 minutes", "2024-01-16 14:30", "2024-01-18 20:45", "2024-01-19 14:30"),   # Friday as Thursday
    ("currency, hours", "2024-01-17 10:00", "2024-01-22 09:00", "2024-01-22 10:00"),      # Monday as Thursday, not as Sunday
    ("stocks, 15 minutes", "2024-01-18 14:30", "2024-01-18 16:00", "2024-01-18 16:15"),   # less than a day
    ("currency, hours", "2024-01-14 22:00", "2024-01-19 21:00", "2024-01-19 22:00"),      # Friday as Thursday; Saturday not as Sunday
])
def test_short_histories_go_on_as_their_last_day(name, first, last, came):
    time = CLOCKS[name]
    time = time[(time >= data.parse_time(first)) & (time <= data.parse_time(last))]
    future = data.future_times(time, 400)
    assert data.iso(future[0]) == data.iso(data.parse_time(came))
    assert len(future) == 400 and (np.diff(future) > 0).all()
    assert ((future // DAY + 3) % 7 != 5).all() or name == "coins, minutes"


def test_bars_that_are_missing_at_times_are_expected_and_stamps_without_a_grid_keep_their_number():
    rng, time = np.random.default_rng(2), CLOCKS["stocks, 15 minutes"]
    for end in (700, 811, 912):
        history = time[:end][(rng.random(end) > 0.3) | (np.arange(end) == end - 1)]
        assert np.isin(time[end:end + 100], data.future_times(history, 100)).mean() > 0.9
    history = np.cumsum(rng.integers(20, 100, 40_000)) + data.parse_time("2024-01-01")
    assert 45 < np.diff(data.future_times(history, 5000)).mean() < 75


def test_future_times_of_any_history_rise():
    rng = np.random.default_rng(1)
    for gap in (1, 7, 420, 3600, 5 * 3600, DAY, 2 * DAY, 7 * DAY, 31 * DAY):
        for n in (1, 2, 3, 11, 200):
            time = 1_700_000_000 + np.cumsum(rng.integers(1, 2 * gap + 1, n))
            for horizon in (1, 50):
                future = data.future_times(time, horizon)
                assert future.shape == (horizon,) and future.dtype == np.int64
                assert future[0] > time[-1] and (np.diff(future) > 0).all(), (gap, n)


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


def looks_like_a_market(bars):
    o, h, l, c, v, a = bars.ohlcva.T
    assert (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all() and np.isfinite(bars.ohlcva).all()
    r = np.diff(np.log(c))
    size = np.abs(r)
    assert (np.diff(bars.time) > 0).all()
    assert ((r - r.mean()) ** 4).mean() / r.var() ** 2 > 4                     # fat tails (3 for a Gaussian)
    assert np.corrcoef(size[:-1], size[1:])[0, 1] > 0.05                       # volatility clusters
    assert np.corrcoef(np.log(v[1:]), size)[0, 1] > 0.1                        # volume moves with it


def test_synthetic_market_looks_like_one():
    series, _ = data.synthetic(seed=2, n_bars=20_000)
    for bars in series:
        looks_like_a_market(bars)
        assert 0.005 < (np.diff(bars.ohlcva[:, 3]) == 0).mean() < 0.02
    both = np.corrcoef(np.sign(np.diff(series[0].ohlcva[:, 3])), np.sign(np.diff(series[1].ohlcva[:, 3])))[0, 1]
    assert both > 0.05                                                         # symbols move together


@pytest.fixture(scope="module")
def reverting():
    """A long series of the reverting market, and its best accuracy."""
    series, best = data.synthetic(seed=4, n_symbols=1, n_bars=200_000, kind="reverting")
    return series[0], best


def right_calls(guess, move):
    """(share of signs called right, four standard errors)."""
    share = np.mean((guess > 0) == (move > 0))
    return share, 4 * 0.5 / np.sqrt(len(move))


def test_reverting_market_is_called_best_by_the_sign_of_its_expected_move(reverting):
    bars, best = reverting
    assert 0.56 < best < 0.57 and reverting_best()[1] < 0.0002
    path = reverting_path(bars, 10)
    log_close = np.log(bars.ohlcva[:, 3])
    move = np.diff(log_close)
    share, error = right_calls(path[:-1, 0], move)
    assert abs(share - best) < error
    for quantile, p in ((-2.131847, 0.05), (0.0, 0.5), (2.776445, 0.975)):  # from tables
        assert _student4(quantile) == pytest.approx(p, abs=1e-6)
    for name, rule in (("momentum", move[:-1]), ("ten bars", -(log_close[10:-1] - log_close[:-11]))):
        assert right_calls(rule, move[-len(rule):])[0] < best + error, name
    for h in (1, 3, 10):  # the path is right on average: the slope of what comes on what is forecast is 1
        came, told = log_close[h:] - log_close[:-h], path[:-h, h - 1]
        slope = (came * told).sum() / (told * told).sum()
        assert abs(slope - 1) < 0.1, h
    missed = [np.abs(log_close[h:] - log_close[:-h] - path[:-h, h - 1]).sum() for h in range(1, 11)]
    still = [np.abs(log_close[h:] - log_close[:-h]).sum() for h in range(1, 11)]
    assert sum(missed) / sum(still) == pytest.approx(reverting_best()[2], abs=0.004)


def test_no_linear_filter_beats_the_best_accuracy_and_a_good_one_comes_near(reverting):
    bars, best = reverting
    o, h, l, c, v, _ = bars.ohlcva.T
    move = np.diff(np.log(c), prepend=np.log(c[0]))
    lags = [np.append(np.zeros(k), move[:len(move) - k]) for k in range(6)]
    sums = [decayed_sum(move, decay=0.5 ** (1 / n)) for n in (2, 4, 8, 16, 32)]
    others = [np.log(h / np.maximum(o, c)), np.log(np.minimum(o, c) / l), np.log(np.append(1, o[1:] / c[:-1])),
              np.log(v) - np.log(v).mean()]
    half = len(move) // 2
    for names, columns in (("moves", lags + sums), ("all", lags + sums + others)):
        x = np.stack(columns, axis=1)[:-1]
        weights = np.linalg.lstsq(x[:half], move[1:half + 1], rcond=None)[0]
        share, error = right_calls(x[half:] @ weights, move[half + 1:])
        assert best - 0.008 < share < best + error, names


def test_wicks_opens_and_volume_of_the_reverting_market_do_not_tell_its_direction(reverting):
    bars, _ = reverting
    o, h, l, c, v, _ = bars.ohlcva.T
    surprise = np.sign(np.diff(np.log(c)) - reverting_path(bars, 1)[:-1, 0])
    told = (h / np.maximum(o, c) - np.minimum(o, c) / l, np.append(0, o[1:] / c[:-1] - 1), np.diff(np.log(v), prepend=0),
            np.diff(c, prepend=c[0]))
    for i, x in enumerate(told):
        assert abs(np.corrcoef(np.sign(x[:-1]), surprise)[0, 1]) < 4 / np.sqrt(len(surprise)), i


@pytest.mark.parametrize("kind", KINDS)
def test_a_market_without_signal_is_a_null_market(kind):
    series, best = data.synthetic(seed=1, signal=0, n_symbols=1, n_bars=20_000, kind=kind)
    move = np.diff(np.log(series[0].ohlcva[:, 3]))
    back = decayed_sum(-move, decay=0.9)[:-1][move[1:] != 0]
    share, error = right_calls(back, move[1:][move[1:] != 0])
    assert best == 0.5 and abs(share - best) < error
    assert kind == "edge" or (reverting_path(series[0], 3, signal=0) == 0).all()


def test_reverting_market_looks_like_one(reverting):
    looks_like_a_market(reverting[0])
    longer = data.synthetic(seed=4, n_symbols=1, n_bars=3000, kind="reverting", half_life=32)[0][0]
    assert reverting_path(longer, 64, half_life=32)[-1, [31, 63]] @ [1.5, -1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong, why", [
    (dict(kind="trend"), "--kind trend"), (dict(signal=0.5), "--signal 0.5"), (dict(signal=float("nan")), "--signal nan"),
    (dict(kind="reverting", signal=1.0), "--signal 1.0"), (dict(kind="reverting", half_life=0), "--half_life 0"),
])
def test_markets_that_cannot_be_are_refused(wrong, why):
    with pytest.raises(UserError, match=why):
        data.synthetic(n_bars=10, **wrong)


# ---- files

def test_g5_a_failed_save_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_atomic({"step": 1}, path)
    def refuse(*_):
        raise OSError(28, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, refuse)
            with pytest.raises(UserError, match="No space"):
                save_atomic({"step": 2}, path)
        assert load_safe(path) == {"step": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_g5_killed_while_saving(tmp_path):
    """SIGKILL between and within writes, fifteen times: whatever is on disk loads, and never goes back."""
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1]); from backstage.files import save_atomic\n"
            "i = 0\n"
            "while True:\n    i += 1\n    save_atomic({'i': i, 'x': torch.full((300_000,), i)}, sys.argv[2]); print(i, flush=True)")
    path, last = tmp_path / "a.pt", 0
    for round_ in range(3):
        job = subprocess.Popen([sys.executable, "-c", code, ROOT, str(path)], stdout=subprocess.PIPE, text=True)
        done = [int(job.stdout.readline()) for _ in range(3 + 4 * round_)][-1]
        job.send_signal(signal.SIGKILL)
        job.wait()
        found = load_safe(path)
        assert found["i"] >= done and (found["x"] == found["i"]).all()


def test_a_kill_leaves_no_litter_for_ever(tmp_path):
    """Temporary files of the same output, an hour old; the younger ones and those of the user stay."""
    target = str(tmp_path / "a.pt")
    kept = [_beside(target, "124-456.tmp"), target + ".keep-me.tmp", target + ".lock"]
    for name in (_beside(target, "123-456.tmp"), *kept):
        open(name, "wb").close()
    os.utime(_beside(target, "123-456.tmp"), (1e9, 1e9))
    save_atomic({"a": 1}, target)
    with sole_writer(target):   # there is no other writer now: however young
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.pt.keep-me.tmp", "a.pt.lock"]


def test_writing_leaves_an_old_file_until_all_is_written(tmp_path, monkeypatch):
    path = tmp_path / "a.svg"
    path.write_text("old")
    path.chmod(0o640)
    with write_atomic(path, text=True) as f:
        f.write("caf\u00e9 \udce9\n")
        f.flush()
        assert path.read_text() == "old"
        with write_atomic(tmp_path / "b.svg") as other:
            other.write(b"b")
    assert path.read_bytes() == "caf\u00e9 \\udce9\n".encode() and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ZeroDivisionError):
        with write_atomic(path) as f:
            f.write(b"half")
            1 / 0
    assert path.read_bytes().startswith(b"caf") and sorted(os.listdir(tmp_path)) == ["a.svg", "b.svg"]
    with pytest.raises(UserError, match="a.svg: cannot be saved .No space"):
        with write_atomic(path) as f:
            raise OSError(28, "No space left on device")
    assert path.read_bytes().startswith(b"caf")


def test_two_writers_of_one_path_do_not_share_their_file(tmp_path):
    path, ready, written = tmp_path / "a", threading.Barrier(2, timeout=10), []
    def write(letter):
        with write_atomic(path) as f:
            f.write(letter * 1000)
            ready.wait()  # both are writing now
            f.write(letter * 1000)
        written.append(letter)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 2 and path.read_bytes() in (b"a" * 2000, b"b" * 2000) and os.listdir(tmp_path) == ["a"]


def test_links_devices_and_the_own_output_stay_what_they_are(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real" / "a", tmp_path / "link")
    for text in (b"one", b"two"):
        with write_atomic(tmp_path / "link") as f:
            f.write(text)
    assert os.path.islink(tmp_path / "link") and (tmp_path / "real" / "a").read_bytes() == b"two"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with write_atomic(tmp_path / "pipe") as f:
        f.write(b"through")
    check_out(tmp_path / "pipe")
    check_out("/dev/stdout")
    with pytest.raises(UserError, match="exists already"):
        check_out(tmp_path / "link")
    assert os.read(reader, 99) == b"through" and not os.path.isfile(tmp_path / "pipe")
    os.close(reader)
    code = "print('before'); f = write_atomic(sys.argv[2], text=True); f.__enter__().write('within\\n'); f.__exit__(None, None, None); print('after')"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); from backstage.files import write_atomic; " + code, ROOT, "/dev/stdout"], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nwithin\nafter\n"


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, recwarn):
    path = tmp_path / "a.pt"
    for wrong in (torch.zeros(1).expand(10**9), torch.zeros(100).as_strided((50, 50), (1, 1)), torch.zeros(5).to_sparse(), torch.zeros(10**9, device="meta")):
        save_atomic({"a": [({"x": wrong},)]}, path)
        with pytest.raises(UserError, match="a.pt: .*(more numbers|run code)"):
            load_safe(path)
    save_atomic({"a": [torch.zeros(100)[10:20], torch.zeros(3, 4).T, torch.tensor(1.0), torch.zeros(0), torch.nn.Parameter(torch.zeros(2))]}, path)
    assert len(load_safe(path)["a"]) == 5
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    (tmp_path / "c.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("b.pt", "c.pt"):
        with pytest.raises(UserError, match="truncated or foreign"):
            load_safe(tmp_path / name)
    assert not recwarn.list


def test_text_that_is_none_is_made_harmless(tmp_path, capfd):
    assert printable("AAPL 5 % \u00e9\u65e5\u672c") == "AAPL 5 % \u00e9\u65e5\u672c"
    assert printable("a\x1b[31m\n\r\t\x07\x9b\u202e\udce9\0") == "a\\x1b[31m\\n\\r\\t\\x07\\x9b\\u202e\\udce9\\x00"
    assert [csv_text(t) for t in ("=1+1", "+A", "-A", "@A", "A=B", "", "\t=1")] == ["'=1+1", "'+A", "'-A", "'@A", "A=B", "", "\\t=1"]
    def main():
        raise UserError("no\x1b[2J such \udce9 file\nat all")
    with pytest.raises(SystemExit):
        run(main)
    assert capfd.readouterr().err == "error: no\\x1b[2J such \\udce9 file\\nat all\n"
    bars = Bars("\udce9", np.arange(3), np.ones((3, 6)))
    assert fingerprint([bars]) != fingerprint([Bars("e", bars.time, bars.ohlcva)])
    name = os.path.join(os.fsencode(tmp_path), b"\xe9.csv")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "data.py"), "--data", name], capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"\\udce9.csv: no such file" in done.stderr


def test_closed_output(tmp_path, monkeypatch):
    command = [sys.executable, os.path.join(ROOT, "data.py"), "--synthetic", "100", "--out"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command, str(tmp_path / "bars")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "bars").exists()
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", None)
        m.setattr(sys, "stderr", None)
        with pytest.raises(SystemExit) as e:
            run(lambda: data.main(["--seed", "-1"]))
    assert e.value.code == 2


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


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
            load_safe(name)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "hacked").exists()


def test_a_pickle_that_takes_memory_or_time_is_refused_before_it_does(tmp_path):
    """bytearray(4 GB), and lists that hold the same list ten times over, twelve deep: 10^12 visits."""
    many = []
    for _ in range(12):
        many = [many] * 10
    large = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R."
    for name, raw in (("large.pt", large), ("many.pt", pickle.dumps({"a": many}, 2))):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("a/data.pkl", raw)
            file.writestr("a/version", "3\n")
        began = time.process_time()
        with pytest.raises(UserError, match=f"{name}: .*(run code|without end)"):
            load_safe(tmp_path / name)
        assert time.process_time() - began < 2


# ---- the machine it finds

def test_auto_takes_bf16_where_it_is_faster(monkeypatch):
    assert bf16_gain() > 0
    for gain, found in ((3.0, ("bf16", torch.bfloat16)), (0.7, ("fp32", torch.float32))):
        monkeypatch.setattr("backstage.script.bf16_gain", lambda: gain)
        assert pick_dtype("auto", torch.device("cpu"))[:2] == found
    assert pick_dtype("fp16", torch.device("cpu")) == ("fp16", torch.float16, "as asked")


def test_systems_without_these_names(monkeypatch, tmp_path):
    assert 50e6 < peak_memory() < 1e12
    monkeypatch.setattr("backstage.script.resource", None)
    assert peak_memory() is None
    monkeypatch.delattr(signal, "SIGHUP")
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGTERM and stop.status == 143
    stop.release()
    def no_folders(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "open", no_folders)
    save_atomic({"a": 1}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert load_safe(tmp_path / "a.pt") == {"a": 1} and os.listdir(tmp_path) == ["a.pt"]


def in_python(code, *argv, **kwargs):
    """Run code in a process of its own, with data imported."""
    code = "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import data\n" + code
    return subprocess.run([sys.executable, "-c", code, ROOT, *map(str, argv)], capture_output=True, text=True, timeout=60, **kwargs)


def test_a_pipe_that_closed_where_there_is_no_sigpipe():
    done = in_python("del signal.SIGPIPE\ndef main(): raise BrokenPipeError\ndata.run(main)")
    assert done.returncode == 141 and not done.stderr


def test_a_thread_other_than_the_main_one():
    found = []
    def work():
        stop = StopSignal()
        found.append((stop.signum, stop.before))
        stop.release()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, {})]


def test_under_a_profiler_and_from_a_notebook(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "cProfile", "-o", "profile", os.path.join(ROOT, "data.py"), "--synthetic", "100", "--out", "bars"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    data.main(["--synthetic", "100", "--out", "more"])
    assert "more: 8 symbols, 96 bars" in capsys.readouterr().out
    def gone(_):
        raise OSError("source code not available")
    monkeypatch.setattr(inspect, "getsource", gone)
    assert cli(data.Config, "", ["--seed", "3"]) == {"seed": 3}


def test_a_scale_over_the_whole_window_shows_skill_on_a_random_walk_and_a_causal_one_does_not():
    """On z-scores the rule is exact: they add up to zero, so what is right is that the last move's sign is that of its distance from the mean."""
    import study
    rows = study.leak_demo(n_windows=1000)
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


def test_volume_tells_whether_the_planted_market_goes_on_or_turns():
    """Who knows the surprise of the last bar's volume calls 60 % right; without the volume the move is a coin's."""
    import study
    calls, coin = [], []
    for seed in range(8):
        bars = study.volume_market(seed)
        move = np.sign(np.diff(np.log(bars.ohlcva[:, 3])))
        slow = decayed_sum(np.random.default_rng(seed).normal(0, 0.05, len(bars)), decay=0.98)
        high = np.log(bars.ohlcva[:, 4]) > 9 + 0.7 * slow
        calls.append(np.mean(move[1:] == move[:-1] * np.where(high[1:-1], 1, -1)))
        coin.append(np.mean(move[1:] == move[:-1]))
        assert (bars.ohlcva[:, 1] >= bars.ohlcva[:, [0, 3]].max(1)).all() and (bars.ohlcva[:, 2] <= bars.ohlcva[:, [0, 3]].min(1)).all()
    assert np.mean(calls) == pytest.approx(0.6, abs=0.006) and np.mean(coin) == pytest.approx(0.5, abs=0.006)


def by_hand(bars, k):
    """merged, bar by bar."""
    out = []
    for t, row in zip(bars.time, bars.ohlcva):
        new_day = not out or t // DAY != out[-1][0] // DAY
        if not out or len(out[-1][1]) == k or new_day and np.diff(bars.time).min() < DAY:
            out.append((t, []))
        out[-1][1].append(row)
    rows = np.array([[x[0][0], max(r[1] for r in x), min(r[2] for r in x), x[-1][3],
                      *(np.nansum([r[c] for r in x]) if any(r[c] == r[c] for r in x) else np.nan for c in (4, 5))] for _, x in out])
    return np.array([t for t, _ in out]), rows


@pytest.mark.parametrize("step, k", [(60, 7), (HOUR, 5), (DAY, 3), (HOUR, 1), (DAY, 500)])
def test_merged_bars_are_candles_of_the_bars_within_them(step, k):
    """Beside a loop over bars; bars of hours end with the day; a volume is missing where all are."""
    bars = random_bars(400, seed=k)
    bars.time, bars.ohlcva[30:60, 4] = 1_600_000_000 // DAY * DAY + HOUR + step * np.arange(400), np.nan
    bars = bars[np.random.default_rng(k).random(400) < 0.9]
    time, want = by_hand(bars, k)
    found = data.merged(bars, k)
    assert np.array_equal(found.time, time) and found.symbol == bars.symbol
    np.testing.assert_allclose(found.ohlcva, want, rtol=1e-12)
    assert len(data.merged(bars[:0], k)) == 0
