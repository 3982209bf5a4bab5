"""The loop of stage 1 uses what its flags and its parts promise."""
import os
import signal

import numpy as np
import pytest
import torch

import data
import pretrain
from backstage import prepare
from backstage.files import load_safe
from backstage.loop import Run
from conftest import TINY
from model import Layer, Model


def trained(call, market, out, *flags):
    handler = signal.getsignal(signal.SIGINT)
    status, _, err = call("pretrain", "--data", market, "--out", out, *TINY, *flags)
    assert status == 0, err
    assert signal.getsignal(signal.SIGINT) is handler   # a notebook's Ctrl-C is its own again
    return load_safe(out)


def test_the_weights_that_forecast_are_averaged(market, tmp_path, call, monkeypatch):
    """average_t = d average_{t-1} + (1 - d) w_t d = min(decay, t / (t + 10)); val scores it."""
    weights, update, scores = [], Run.update, iter([0.9, 0.8])

    def noted(run, model, *args):
        if not weights:
            weights.append({k: p.detach().double().clone() for k, p in model.named_parameters()})
        norm = update(run, model, *args)
        weights.append({k: p.detach().double().clone() for k, p in model.named_parameters()})
        return norm
    monkeypatch.setattr(Run, "update", noted)
    evaluate = pretrain.evaluate
    scored = lambda *args: evaluate(*args) | dict(score=next(scores))
    monkeypatch.setattr(pretrain, "evaluate", scored)
    entry = trained(call, market, tmp_path / "a.pt", "--average", 0.3)
    want = weights[0]
    for t, new in enumerate(weights[1:], 1):
        d = min(0.3, t / (t + 10))
        want = {k: d * v + (1 - d) * new[k] for k, v in want.items()}
    for k, v in want.items():
        torch.testing.assert_close(entry["average"][k].double(), v, rtol=1e-4, atol=1e-6)
        assert torch.equal(entry["best"][k], entry["average"][k])
    assert any((entry["model"][k] - v).abs().max() > 1e-3 for k, v in want.items())
    assert entry["metrics"][-1]["lean"] == entry["best"]["lean"].item() < 1     # fitted on val


def test_recomputed_activations_cost_a_second_forward(market, tmp_path, call, monkeypatch):
    calls, forward = [], Layer.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(Layer, "forward", counted)
    entries, counts = [], []
    for flag in ("--no-grad_ckpt", "--grad_ckpt"):
        calls.clear()
        entries.append(trained(call, market, tmp_path / f"{flag}.pt", flag, "--steps", 1))
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0] > 0
    for k, v in entries[0]["average"].items():
        torch.testing.assert_close(entries[1]["average"][k], v, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_drops_a_share_of_channels_alike_in_all_bars():
    config = pretrain.Config(dropout=0.2, n_layer=2, batch_size=64, n_embd=64)
    masks = pretrain.dropout_masks(np.random.default_rng(0), config)
    assert masks.shape == (2, 2, 64, 1, 64)
    assert masks.unique().tolist() == pytest.approx([0, 1.25])
    assert masks.mean().item() == pytest.approx(1, abs=0.02)


def test_ctrl_c_while_the_tokenizer_trains_acts_at_once(market, tmp_path, call, monkeypatch):
    train = prepare.train_tokenizer

    def interrupted(x, sizes, progress, **settings):
        def after(step, loss):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            assert step <= 2
            progress(step, loss)
        return train(x, sizes, progress=after, **settings)
    monkeypatch.setattr(prepare, "train_tokenizer", interrupted)
    status, out, _ = call("pretrain", "--data", market, "--out", tmp_path / "a.pt", *TINY)
    assert status == 130 and "stopped at step 2 of the tokenizer" in out
    assert os.listdir(tmp_path) == []


def test_val_is_each_series_own_last_share_and_nothing_is_test():
    early = data.Bars("A", np.arange(1000) * 60, np.ones((1000, 6)))
    late = data.Bars("B", 10**6 + np.arange(500) * 3600, np.ones((500, 6)))
    borders = data.own_borders([early, late], 0.1)
    train = data.make_streams([early, late], None, "train", borders, 64, 4).targets
    val = data.make_streams([early, late], None, "val", borders, 64, 4).targets
    test = data.make_streams([early, late], None, "test", borders, 64, 4).targets
    assert train.tolist() == [[32, 900], [32, 450]] and val.tolist() == [[900, 1000], [450, 500]]
    assert (test[:, 0] >= test[:, 1]).all()


def test_merged_bars_are_learned_beside_the_others_and_never_scored(
        market, tmp_path, call, monkeypatch):
    """Those of the training dates alone: none reaches into val."""
    (drawn, ends_at), gather = [{True: [], False: []} for _ in range(2)], data.gather

    def noted(streams, which, ends):
        drawn[torch.is_grad_enabled()] += [np.diff(streams.time[i]).min() for i in which]
        ends_at[torch.is_grad_enabled()] += [streams.time[i][e] for i, e in zip(which, ends)]
        return gather(streams, which, ends)
    monkeypatch.setattr(data, "gather", noted)
    bar = int(np.diff(data.load(str(market))[0].time).min())
    flags = ["--steps", 20, "--batch_size", 16, "--block_size", 32, "--eval_every", 10, "--merge", "2,5"]
    entry = trained(call, market, tmp_path / "a.pt", *flags)
    assert set(drawn[True]) == {bar, 2 * bar, 5 * bar} and set(drawn[False]) == {bar}
    share = np.mean(np.array(drawn[True]) > bar)        # series of 400, 200 and 80 training bars
    assert share == pytest.approx((200 - 32 + 80 - 32) / (400 + 200 + 80 - 3 * 32), abs=0.12)
    assert max(ends_at[True]) < entry["splits"][0] <= min(ends_at[False])


def test_mirrored_windows_fade_with_the_rate(market, tmp_path, call, monkeypatch):
    """Half of the windows while the rate stands, then fewer in a straight line."""
    drawn, gather = [], data.gather

    def noted(streams, which, ends):
        if torch.is_grad_enabled():
            drawn.append(np.mean(which >= len(streams.tokens) / 2))
        return gather(streams, which, ends)
    monkeypatch.setattr(data, "gather", noted)
    flags = ["--steps", 50, "--warmup", 0, "--batch_size", 64, "--block_size", 32, "--eval_every",
             50, "--n_embd", 16, "--n_layer", 1]
    trained(call, market, tmp_path / "a.pt", *flags, "--mirror", 1)
    assert len(drawn) == 50 and np.mean(drawn[:40]) == pytest.approx(0.5, abs=0.04)
    for i in range(0, 10, 2):
        want = 0.5 * np.mean([10 - i, 9 - i]) / 10
        assert np.mean(drawn[40 + i:42 + i]) == pytest.approx(want, abs=0.14)
    assert np.mean(drawn[45:]) < 0.5 * np.mean(drawn[40:45])


@pytest.mark.parametrize("flags, stands", [([], 32), (["--cooldown", 0.5], 20)])
def test_the_reasoner_learns_now_and_then_and_always_while_the_rate_falls(
        market, tmp_path, call, monkeypatch, flags, stands):
    learned, loss = [], Model.reasoner_loss

    def noted(self, h, time, origins, targets):
        learned.append(origins.shape)
        assert (1 <= origins).all() and (origins <= time.shape[1] - self.config.latents).all()
        return loss(self, h, time, origins, targets)
    monkeypatch.setattr(Model, "reasoner_loss", noted)
    sizes = ["--steps", 40, "--warmup", 0, "--batch_size", 4, "--block_size", 128, "--eval_every",
             40, "--n_embd", 16, "--n_layer", 1]
    trained(call, market, tmp_path / "a.pt", *sizes, *flags)
    # at the update `stands` the rate is still whole
    assert learned == [(4, 2)] * (stands // pretrain.ORIGIN_EVERY + 1 + 39 - stands)


def test_windows_of_many_markets_move_by_quarters_of_an_hour():
    """Half of them, by half a day at most, daily ones not; those of one market not at all."""
    when = torch.arange(30) * torch.tensor([3600] * 400 + [86400] * 400)[:, None]
    config = pretrain.Config(batch_size=800, val_share=0.05)
    moved = pretrain.shift_hours(when, np.random.default_rng(0), config, slice(None)) - when
    assert (moved == moved[:, :1]).all() and not moved[400:].any()
    hours = moved[:400, 0]
    assert (hours % 900 == 0).all() and 20_000 < hours.max() <= 43_200 and -43_200 <= hours.min() < -20_000
    assert 160 < (hours != 0).sum() < 240 and len(hours.unique()) > 60
    config.val_share = 0.0
    assert pretrain.shift_hours(when, np.random.default_rng(0), config, slice(None)) is when


def test_the_rate_rises_stays_and_falls():
    shares = [pretrain.rate(step, 80, 100, 20) for step in range(100)]
    want = np.interp(np.arange(100), [-1, 19, 80, 100], [0, 1, 1, 0])
    np.testing.assert_allclose(shares, want)
    assert pretrain.rate(0, 1, 1, 20) == 1 / 20
