"""The model against naive forms written here: attention as quadratic sums, the reasoner origin by origin, range means bar by bar, no
look-ahead bit for bit, the recurrence against the parallel form, heads that know candles alone, CRPS, and the checkpoint's refusals."""

import copy
import datetime
import gc
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backstage.bins import close_table
from backstage.checkpoint import Checkpoint
from backstage.clock import calendar
from backstage import generate, kernels, validation
from backstage.files import load_safe
from backstage.lean import fit_lean
from backstage.loop import Optimizer, Run
from backstage.series import DAY
import data
import model as M
from model import Model, ModelConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, TokenizerConfig

BITS = dict(coarse_bits=6, fine_bits=5)
MIXES = {       # every option that changes the computation
    "both": {},
    "rope": dict(pos="rope"),
    "alibi": dict(pos="alibi"),
    "linear only": dict(linear_heads=4, windows=()),
    "local only": dict(linear_heads=0, pos="rope"),
    "local only, alibi": dict(linear_heads=0, pos="alibi"),
    "no reasoner": dict(reasoner=False),
    "one window, short span": dict(windows=(24,), span=32, latents=4, rounds=1),
}


def make(seed=0, **options):
    """A small model whose weights are large enough that every part moves the logits by much more than a tolerance."""
    model = Model(ModelConfig(**{**BITS, "n_layer": 3, "n_head": 4, "n_embd": 32, **options})).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = 1.0 if name.endswith("latent") or "calendar" in name else p.shape[-1] ** -0.5
            p.copy_(size * torch.randn(p.shape, generator=random))
        for share in (model.coarse_share, model.fine_share):
            share.copy_(torch.randn(share.shape, generator=random))
        model.mean.copy_(0.1 * torch.randn(6, generator=random))
    return model


def bars(B, T, seed=0, least=60, doublings=12):
    """Random tokens, and stamps with gaps of `least` seconds, doubled up to so many times: of a minute to some days."""
    g = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randint(0, 2**BITS[name], (B, T), generator=g) for name in ("coarse_bits", "fine_bits"))
    gap = least * 2 ** torch.randint(0, doublings, (B, T), generator=g)
    return coarse, fine, 1_500_000_000 + gap.cumsum(1)


def mixed_bars(T):
    """Two rows, one of them with half hours and their multiples between bars, so that a time of day comes again."""
    return [torch.cat(pair) for pair in zip(bars(1, T), bars(1, T, least=1800, doublings=6))]


def close(a, b, tolerance):
    """The largest difference, as a share of b's root mean square."""
    error = ((a.double() - b.double()).abs().max() / b.double().square().mean().sqrt()).item()
    assert error <= tolerance, error


def close_half(a, b):
    """bfloat16 against exact, each row brought to unit size: 2e-2 for 999 of 1,000 numbers, 3e-2 for all. The rounding of the result
    alone reaches 1.3e-2, and torch's own attention 1.4e-2, since the largest of many numbers is several times their size."""
    error = (F.rms_norm(a.double(), a.shape[-1:]) - F.rms_norm(b, b.shape[-1:])).abs().flatten()
    assert error.kthvalue(math.ceil(0.999 * len(error))).values <= 2e-2 and error.max() <= 3e-2, error.max()


def random_qkv(T, H=3, B=2, D=16):
    return torch.randn(3, H, B, T, D, generator=torch.Generator().manual_seed(T))


def half(T):
    """q, k, v [3, 2, T, 16] in bfloat16: the same inputs for both forms, rounded once."""
    q, k, v = random_qkv(T)
    return (0.7 * q).bfloat16(), (0.7 * k).bfloat16(), v.bfloat16()


def naive_linear(q, k, v, slope):
    """The quadratic sum with mask and decay, in float64; q, k, v [H, B, T, D]."""
    q, k, v = q.double(), k.double(), v.double()
    i = torch.arange(q.shape[2])
    d = i[:, None] - i
    weight = torch.exp(-slope.double()[:, None, None, None] * d.clamp(min=0)) * (d >= 0)
    return (q @ k.mT * weight) @ v / math.sqrt(q.shape[-1])


def naive_local(q, k, v, window, slope):
    """Full softmax with a band mask, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    i = torch.arange(q.shape[2])
    d = i[:, None] - i
    score = q @ k.mT / math.sqrt(q.shape[-1]) - slope.double()[:, None, None, None] * d
    return score.masked_fill((d < 0) | (d >= window), -math.inf).softmax(-1) @ v


def naive_rotate(x):
    """Pairs (x_i, x_{i + D/2}) as complex numbers, turned by position * theta."""
    x = x.double()
    D = x.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.exp(1j * torch.arange(x.shape[2])[:, None] * theta)
    return torch.cat((z.real, z.imag), dim=-1)


def one_bar(q, k, v, t):
    """Bar t of each [H, B, T, D], as a step takes it: [H B, 1, D]."""
    return (a[:, :, [t]].flatten(0, 1) for a in (q, k, v))


def tensors_in(a):
    return [a] if torch.is_tensor(a) else sum(map(tensors_in, a), [])


def normed(x):
    return F.rms_norm(x, x.shape[-1:], eps=kernels.EPS)


# --- Attention -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("slope", [[0.0, 0.0, 0.0], [0.06, 0.01, 0.001]])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 65, 1000])
def test_linear_attention_is_the_quadratic_sum(T, slope):
    """Over many bars and bar by bar, and the state that either leaves."""
    slope = torch.tensor(slope)
    heads, (q, k, v) = M.LinearAttention(slope, chunk=32), random_qkv(T)
    want = naive_linear(q, k, v, slope)
    q = q / 4       # by sqrt(D), as it comes from rotate
    o, S = heads(q, k, v, heads.weights(T, q.dtype))
    close(o, normed(want), 1e-4)
    decay = torch.exp(-slope.double()[:, None] * torch.arange(T - 1, -1, -1))
    close(S, torch.einsum("ht,hbtd,hbte->hbde", decay, k.double(), v.double()).flatten(0, 1), 1e-5)
    state = torch.zeros_like(S)
    [fade] = generate.step_weights(heads, torch.zeros(1), 2)
    steps = [generate.linear_step(*one_bar(q, k, v, t), state, fade) for t in range(T)]
    close(torch.cat(steps, dim=1), normed(want).flatten(0, 1), 1e-4)
    close(state.mT, S, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = half(T)
        o, S = heads(q / 4, k, v, heads.weights(T, q.dtype))
    close_half(o, naive_linear(*half(T), slope))
    assert S.dtype == torch.float32


def test_linear_attention_over_many_groups_of_chunks():
    T, slope = 64 * 300 + 7, torch.tensor([0.0, 0.001])
    heads, (q, k, v) = M.LinearAttention(slope), random_qkv(T, H=2, B=1, D=4)
    o, _ = heads(q / 2, k, v, heads.weights(T, q.dtype))
    d = torch.arange(T - 50, T)[:, None] - torch.arange(T)
    weight = torch.exp(-slope.double()[:, None, None, None] * d.clamp(min=0)) * (d >= 0)
    close(o[:, :, -50:], normed((q[:, :, -50:].double() @ k.double().mT * weight) @ v.double() / 2), 1e-4)


@pytest.mark.parametrize("window", [1, 16, 24])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 100, 257])
def test_local_attention_is_softmax_with_a_band_mask(T, window):
    """Over many bars, and one bar more from the ring that the bars before it left."""
    for slope in (torch.zeros(3), torch.tensor([0.5, 0.05, 0.001])):
        heads, (q, k, v) = M.LocalAttention(window, slope), random_qkv(T)
        want, q = naive_local(q, k, v, window, slope), q / 4
        close(heads(q, k, v, heads.weights(T, q.dtype))[0], want, 1e-5)
        n, places = T // 2, generate.step_weights(heads, torch.arange(T), 2)
        last = heads(q[:, :, :n], k[:, :, :n], v[:, :, :n], heads.weights(n, q.dtype))[1] if n else torch.zeros(2, 3, 2, 0, 16)
        ring = [generate.ring(a.flatten(0, 1), window, n) for a in last]
        for t in range(n, T):
            close(generate.local_step(*one_bar(q, k, v, t), ring, places[t]), want[:, :, t].flatten(0, 1)[:, None], 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = half(T)
            close_half(heads(q / 4, k, v, heads.weights(T, q.dtype))[0], naive_local(q, k, v, window, slope))


@pytest.mark.parametrize("pos", ["rope", "alibi", "both"])
@pytest.mark.parametrize("T", [1, 50, 333])
def test_layer_is_its_naive_form(T, pos):
    """Heads divided among linear, window 16 and window 64; rotation, decay or both; norm per head; MLP; dropout of either part."""
    model = make(pos=pos, windows=(16, 64))
    layer, x = model.layers[0], torch.randn(2, T, 32, generator=torch.Generator().manual_seed(T))
    drop = torch.randn(2, 2, 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = layer(x, model.places(x), drop=drop)[0]
    weight = {name: p.detach().double() for name, p in layer.named_parameters()}
    qkv = normed(x.double()) @ weight["qkv.weight"].T
    q, k, v = qkv.view(2, T, 3, 4, 8).permute(2, 3, 0, 1, 4)         # [3, H, B, T, D]
    if pos != "alibi":
        q, k = naive_rotate(q), naive_rotate(k)
    slopes = [kind.slope for kind in layer.kinds]
    assert all((slope == 0).all() if pos == "rope" else (slope > 0).all() for slope in slopes)
    o = [normed(naive_linear(q[:2], k[:2], v[:2], slopes[0]))]
    o += [naive_local(q[[n]], k[[n]], v[[n]], w, slopes[n - 1]) for n, w in ((2, 16), (3, 64))]
    x = x.double() + drop[0].double() * (torch.cat(o).permute(1, 2, 0, 3).reshape(2, T, 32) @ weight["out.weight"].T)
    x = x + drop[1].double() * (F.silu(normed(x) @ weight["up.weight"].T) @ weight["down.weight"].T)
    close(got, x, 1e-5)


def test_rotation_stays_exact_far_out():
    cos, sin = (a[1, 0, 0] for a in kernels.rotation(torch.tensor([20_000, 3_000_017]), 8))       # k's
    for row, p in enumerate((20_000, 3_000_017)):
        for i in range(4):
            angle = p * 10000.0 ** (-2 * i / 8)
            assert cos[row, i] == pytest.approx(math.cos(angle), abs=1e-6) and sin[row, 4 + i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_slopes_differ_among_the_heads_of_a_kind():
    layer = make(n_head=8, pos="both").layers[0]
    assert [len(set(kind.slope.tolist())) for kind in layer.kinds] == [4, 2, 2]


# --- The reasoner ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("span", [128, 24])
def test_reasoner_origin_by_origin(span):
    """Latents of each origin from the bars of its span alone, written out. In float64, both."""
    model, T, origins = make(span=span), 200, torch.tensor([[1, 77, 150], [20, 128, 184]])
    r, slope = model.reasoner.double(), 0.5 ** (1 + 2 * torch.arange(4).double())
    random = torch.Generator().manual_seed(T)
    h = torch.randn(2, T, 32, generator=random).double()
    stamps = torch.randn(2, 3, 16, 32, generator=random).double()
    with torch.no_grad():
        got = r(h, origins, stamps)
        for b, m in np.ndindex(2, 3):
            n = int(origins[b, m])
            past = slice(max(0, n - span), n)
            k, v = r.look_kv(h[b, past]).view(-1, 2, 4, 8).permute(1, 2, 0, 3)
            s = r.latent + r.stamp(stamps[b, m])
            bias = -slope[:, None, None] * torch.arange(k.shape[1], 0, -1)          # bars before the origin
            later = torch.full((16, 16), -math.inf).triu(1)
            for _ in range(2):
                q = r.look_q(normed(s)).view(16, 4, 8).transpose(0, 1)
                s = s + r.look_out(naive_softmax(q, k, v, bias).transpose(0, 1).reshape(16, 32))
                q, own_k, own_v = r.self_qkv(normed(s)).view(16, 3, 4, 8).permute(1, 2, 0, 3)
                s = s + r.self_out(naive_softmax(q, own_k, own_v, later).transpose(0, 1).reshape(16, 32))
                s = s + r.down(F.silu(r.up(normed(s))))
            close(got[b, m], normed(s), 1e-6)


def naive_softmax(q, k, v, bias):
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


@pytest.mark.parametrize("T", [1, 31, 100])
def test_parallel_forecast_is_the_reasoner_at_the_last_bar(T):
    """As it was trained at an origin T, within more bars, but for the first bar, which the heads read from the bars' own hidden state;
    of fewer bars ahead it is the beginning."""
    model = make()
    coarse, fine, time = bars(2, T + 16)
    past, ahead = (coarse[:, :T], fine[:, :T], time[:, :T]), time[:, T:]
    with torch.no_grad():
        last, h = model.parallel(*past, ahead)
        hidden = model.hidden(coarse, fine, time)
        close(last, hidden[:, T - 1], 1e-5)
        latents = model.reasoner(hidden, torch.full((2, 1), T), model.embedding.clock(time)[:, None, T:])[:, 0]
        close(h, torch.cat((hidden[:, T - 1:T], latents[:, 1:]), 1), 1e-5)
        close(model.parallel(*past, ahead[:, :5])[1], h[:, :5], 1e-5)
        later = model.parallel(*past, ahead + 3600)[1]
        moved = (later - h).abs()[:, 1:].amax((0, 2))
        assert moved.max() > 0.1 and moved.min() > 0.01                 # each knows the stamps to come
    with pytest.raises(data.UserError, match="reasoner"):
        make(reasoner=False).parallel(*past, ahead)


def test_reasoner_sees_only_bars_before_its_origin():
    """G3: a changed bar changes no latent of an origin at or before it, in one bit; and those after it."""
    model, rows = make(), bars(1, 150)
    origins = torch.arange(1, 135)[None]

    def latents(coarse, fine, time):
        stamps = model.embedding.clock(rows[2])[:, origins[0, :, None] + torch.arange(16)]
        return model.reasoner(model.hidden(coarse, fine, time), origins, stamps)[0]

    with torch.no_grad():
        before = latents(*rows)
        for t in (0, 1, 50, 100, 133):
            after = latents(*changed(rows, t))
            assert torch.equal(after[:t], before[:t]) and not (after[t:] == before[t:]).flatten(1).all(1).any(), t


def test_reasoner_learns_alone():
    """Its loss has no gradient with respect to the layers and what the bars are read as."""
    model, (coarse, fine, time) = make(aux_weight=1.0), bars(2, 101)
    inputs, targets = (coarse[:, :-1], fine[:, :-1], time[:, :-1]), (coarse[:, 1:], fine[:, 1:])
    grads = []
    for origins in (None, torch.tensor([[40], [84]])):
        model.zero_grad()
        model(*inputs, targets, origins=origins)[2].backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, with_it in grads[1].items():
        if name.startswith("reasoner"):
            assert grads[0][name] is None and with_it.abs().max() > 0, name
        elif "head" not in name and "fine" not in name:
            assert torch.equal(with_it, grads[0][name]), name


# --- No look-ahead ---------------------------------------------------------------------------------------------------

def changed(bars, t):
    """The same bars, but for the tokens and the stamp (another minute, hour and day) of bar t."""
    coarse, fine, time = (a.clone() for a in bars)
    coarse[0, t] ^= 33
    fine[0, t] ^= 7
    time[0, t] += 100_000
    return coarse, fine, time


@pytest.mark.parametrize("name", MIXES)
def test_no_lookahead_bit_for_bit(name):
    """G1: changing bar t (tokens and stamp) changes no logit before t, in one bit; and it does change the one at t."""
    model, T = make(**MIXES[name]), 203
    rows = bars(1, T)
    with torch.no_grad():
        before = model(*rows)[:2]
        for t in [0, 1, 16, 26, 27, 28, 31, 32, 33, 64, 95, 96, 97, 128, 160, 187, 191, 192, 202]:
            for a, b in zip(model(*changed(rows, t))[:2], before):
                assert torch.equal(a[:, :t], b[:, :t]), t
                assert not torch.equal(a[:, t], b[:, t]), t


@pytest.mark.parametrize("pos", ["rope", "both"])
@pytest.mark.parametrize("half", [False, True])
def test_no_lookahead_in_training_with_activation_checkpointing(pos, half):
    """As above through the training forward: recomputed activations, autocast, targets, dropout. Targets, too, stay behind their logits."""
    model, T = make(pos=pos).train(), 150
    model.grad_ckpt = True
    rows = bars(1, T + 1)
    drop = torch.rand(3, 2, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def logits(c, f, s):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(c[:, :-1], f[:, :-1], s[:, :-1], (c[:, 1:], f[:, 1:]), drop=drop)[:2]

    before = logits(*rows)
    for t in (1, 22, 23, 24, 55, 64, 87, 118, 119, 120, 140):
        after = logits(*changed(rows, t))
        assert torch.equal(after[0][:, :t], before[0][:, :t]) and torch.equal(after[1][:, :t - 1], before[1][:, :t - 1]), t
        assert not torch.equal(after[0][:, t], before[0][:, t])


def test_gradients_of_a_logit_stay_behind_it():
    """The logit at t has no gradient with respect to any later bar: what a comparison of two inputs may miss by chance."""
    model, t = make(), 90
    coarse, fine, time = bars(1, 150)
    embedded = []
    model.embedding.register_forward_hook(lambda _, inputs, outputs: embedded.append(outputs[0].retain_grad() or outputs[0]))
    model(coarse, fine, time)[0][0, t].square().sum().backward()
    size = embedded[0].grad[0].abs().sum(-1)
    assert (size[t + 1:] == 0).all() and (size[:t + 1] > 0).all()


def test_activation_checkpointing_changes_no_gradient():
    coarse, fine, time = bars(2, 101)
    drop = torch.rand(3, 2, 2, 1, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for save in (False, True):
        model = make().train()
        model.grad_ckpt = save
        origins = torch.tensor([[30], [84]])
        model(coarse[:, :-1], fine[:, :-1], time[:, :-1], (coarse[:, 1:], fine[:, 1:]), drop, origins)[2].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients))


# --- The recurrence --------------------------------------------------------------------------------------------------

def step_through(model, rows, start, state):
    """Hidden states of the bars from `start` - 1 on, [B, T - start + 1, C]: the prefill's, then one a step."""
    found = [state.h]
    for t in range(start, rows[0].shape[1]):
        h, state = model.step(*(a[:, t] for a in rows), state)
        found.append(h.clone())
    return torch.stack(found, dim=1)


def prefilled(model, rows, start):
    return model.prefill(*(a[:, :start] for a in rows))


@pytest.mark.parametrize("name", MIXES)
def test_recurrence_is_the_parallel_form_over_a_long_context(name):
    """G4: from a prefill on, every step's logits are the parallel forward's."""
    model, rows = make(**MIXES[name]), mixed_bars(2100)
    with torch.inference_mode():
        want = model(*rows)[0]
        got = model.coarse_logits(step_through(model, rows, 1800, prefilled(model, rows, 1800)))
    assert (got - want[:, 1799:]).abs().max() <= 1e-4
    assert want.std() > 0.3


@pytest.mark.parametrize("windows", [(16, 64), (24,)])
@pytest.mark.parametrize("start", [1, 2, 20, 63, 64, 65, 140])
def test_recurrence_from_any_start(windows, start):
    """Contexts shorter than a window, as long, longer; and the fine logits."""
    model, rows = make(windows=windows), mixed_bars(start + 70)
    with torch.inference_mode():
        want, want_fine, _ = model(*rows)
        h = step_through(model, rows, start, prefilled(model, rows, start))
        assert (model.coarse_logits(h) - want[:, start - 1:]).abs().max() <= 1e-4
        given = want[:, start - 1:].argmax(-1)
        assert (model.fine_logits(h, given) - want_fine[:, start - 1:]).abs().max() <= 1e-4


def test_paths_share_one_prefill_and_are_each_their_own():
    model, (coarse, fine, time), (c, f, _) = make(), bars(2, 120), bars(6, 60, seed=1)
    later = time[:, -1:].repeat_interleave(3, dim=0) + 60 + 60 * torch.arange(60)
    with torch.inference_mode():
        state = model.prefill(coarse, fine, time)
        got = step_through(model, (c, f, later), 0, state.repeat(3))                        # rows 0, 0, 0, 1, 1, 1
        for n in range(3):                                          # the paths left the prefill's own state as it was
            alone = step_through(model, (c[n::3], f[n::3], later[n::3]), 0, state.repeat(1))
            assert (alone - got[n::3]).abs().max() <= 1e-4


def test_stamps_told_ahead_change_nothing():
    """step with the stamps of all bars to come, told anew at each or by some calls alone, and repeated in between."""
    model, rows, more = make(), bars(2, 50), bars(2, 200, seed=1)
    later = rows[2][:, -1:] + more[2] - more[2][:, :1] + 60
    with torch.inference_mode():
        want = step_through(model, (*more[:2], later), 0, model.prefill(*rows))
        state, found = model.prefill(*rows), []
        for t in range(200):
            state = state.repeat(1)
            found.append(model.step(more[0][:, t], more[1][:, t], later[:, t:] if t != 64 else later[:, t], state)[0].clone())
    assert (torch.stack(found, dim=1) - want[:, 1:]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", MIXES)
def test_recurrence_in_half_precision(name):
    """Prefilled under autocast, steps stay near the float32 forward; states stay float32."""
    model, rows, start = make(**MIXES[name]), bars(3, 200), 90
    with torch.inference_mode():
        want = model(*rows)[0]
        with torch.autocast("cpu", torch.bfloat16):
            state = prefilled(model, rows, start)
        h = step_through(model, rows, start, state)
        tensors = tensors_in([state.h, state.layers])
        assert all(a.dtype == torch.float32 for a in tensors) and h.dtype == torch.float32
        error = (model.coarse_logits(h) - want[:, start - 1:]).square().mean().sqrt() / want.std()
    assert error < 0.05, error


def test_kept_weights_of_steps_are_never_stale():
    """A prefill makes copies of the layers' weights for steps: again, once a weight changes."""
    model, rows = make(n_layer=1), bars(2, 40)
    other = make(seed=1, n_layer=1).state_dict()
    changes = (lambda: None, lambda: model.layers[0].up.weight.mul_(0.5), lambda: model.load_state_dict(other),
               lambda: model.load_state_dict(make(seed=2, n_layer=1).state_dict(), assign=True))
    with torch.no_grad():
        for change in changes:
            change()
            h, _ = model.step(*(a[:, -1] for a in rows), prefilled(model, rows, 39))
            assert (h - model.hidden(*rows)[:, -1]).abs().max() <= 1e-4
        assert prefilled(model, rows, 39).steps is prefilled(model, rows, 20).steps


def test_memory_of_generation_does_not_grow():
    """After 600 bars of a path there are as many numbers in tensors, anywhere, as after 100."""
    model, held = make(n_layer=1), []
    coarse, fine, time = bars(2, 70)
    with torch.inference_mode():
        state = model.prefill(coarse, fine, time)
        for t in range(601):
            coarse, fine = model.sample(state.h, u=torch.full((2, 2), 0.5))
            h, state = model.step(coarse, fine, state.stamps[:, -1] + 60, state)
            if t in (100, 600):
                gc.collect()
                held.append(sum(a.numel() for a in gc.get_objects() if type(a) is torch.Tensor))
    assert torch.isfinite(h).all() and held[0] == held[1]


# --- What it reads ---------------------------------------------------------------------------------------------------

def test_calendar_is_the_clock_and_the_weekday():
    time = torch.cat((torch.arange(-40, 60_000, 7) * 86400 + 4_000, torch.randint(0, 4_000_000_000, (2000,))))
    for row, t in zip(calendar(time).tolist(), time.tolist()):
        d = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=t)
        assert row == [d.hour, d.minute, d.weekday()]


def test_spacing_is_the_causal_running_median():
    _, _, time = bars(2, 60)
    gaps = F.pad(time, (M.GAPS, 0), value=M.NO_BAR).diff().unfold(1, M.GAPS, 1)
    got = M.gap_bucket(gaps)[..., 0]
    for b in range(2):
        for t in range(60):
            last = sorted((time[b, 1:t + 1] - time[b, :t]).tolist()[-7:])
            assert got[b, t] == (int(math.log2(last[(len(last) - 1) // 2])) + 1 if last else 0)


def test_past_moves_are_those_of_the_bars_themselves():
    """From real features: the decayed means of moves over data.features' own s_t, which the model never sees."""
    series = data.synthetic(seed=5, n_symbols=1, n_bars=2000)[0][0]
    model = make()
    model.mean.zero_()
    x = torch.from_numpy(data.features(series)[0])
    with torch.no_grad():
        got, _ = model.embedding.past_moves(model.values(x[None].double()))
    _, high, low, c = series.ohlcva[:, :4].T
    true_range = np.log(np.maximum(high[1:], c[:-1]) / np.minimum(low[1:], c[:-1]))
    decays = np.array([0.5 ** (1 / half_life) for half_life in (*M.HALF_LIVES, data.HALF_LIFE)])
    ranges, moves = np.zeros((2, len(decays)))
    for t, (size, move) in enumerate(zip(true_range, np.diff(np.log(c))), start=1):
        ranges, moves = (decays * before + (1 - decays) * value for before, value in ((ranges, size), (moves, move)))
        if t > 1700:    # what the first bars count has decayed
            want = (moves / ranges[-1] * np.sqrt(2 / (1 - decays)))[:-1]
            assert got[0, t].tolist() == pytest.approx(want, abs=1e-4), t
    s = data.features(series)[1]
    assert ranges[-1] == pytest.approx(float(s.scales()[0]), rel=1e-9)


def test_past_moves_go_on_where_they_stopped():
    model = make()
    z = torch.randn(2, 77, 6, generator=torch.Generator().manual_seed(0))
    values = model.values(z.double())
    whole, after = model.embedding.past_moves(values)
    first, between = model.embedding.past_moves([a[:, :30] for a in values])
    second, last = model.embedding.past_moves([a[:, 30:] for a in values], between)
    close(torch.cat((first, second), 1), whole, 1e-6)
    close(last, after, 1e-12)
    # bounded, whatever a candle claims
    wild, _ = model.embedding.past_moves(model.values(1e6 * z.double()))
    assert torch.isfinite(wild).all() and wild.abs().max() <= M.MAX_MOVE


def test_read_codes_takes_the_candles_of_the_tokenizer():
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(**BITS)).eval()
    tokenizer.mean.copy_(torch.randn(6))
    tokenizer.std.copy_(torch.rand(6) + 0.5)
    model, shares = make(), [np.arange(1, 65) / 2080, np.arange(1, 33) / 528]
    model.read_codes(tokenizer, shares)
    coarse, fine = torch.arange(64).repeat_interleave(32), torch.arange(32).repeat(64)
    z = model.D1[coarse] + (model.M[coarse] @ model.g[fine][..., None])[..., 0]
    x = model.mean + model.std * z
    want = tokenizer.decode(coarse, fine)
    torch.testing.assert_close(x[:, 1:], want[:, 1:])
    same_side = (want[:, 0] > 0) == (x[:, 0] > 0)       # the direction bit bends the close of the others to its side
    torch.testing.assert_close(x[same_side, 0], want[same_side, 0], atol=2e-4, rtol=0)
    assert torch.equal(model.up_mask, torch.arange(64) >= 32)
    for share, got in zip(shares, (model.coarse_share, model.fine_share)):
        torch.testing.assert_close(got.softmax(-1), torch.from_numpy(share).float())


# --- What it says ----------------------------------------------------------------------------------------------------

def test_what_all_codes_share_costs_bf16_no_digits():
    """A large common part of the codes' vectors, which no softmax sees, leaves the logits of bf16 as they were."""
    model, h = make(), torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    h = h / 8       # logits of at most 4, of which a last digit is less than the bound

    def in_bf16():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            coarse = torch.zeros(50, dtype=torch.int64)
            return [a.float().log_softmax(-1) for a in (model.coarse_logits(h), model.fine_logits(h, coarse))]

    before = in_bf16()
    with torch.no_grad():
        for head in (model.coarse_head, model.fine_head):
            head[2].bias.add_(100)
    for a, b in zip(in_bf16(), before):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0)
        assert (a - b).abs().mean() < 5e-4


def test_codes_of_one_candle_are_one_to_the_model():
    model = make()
    model.D1[9], model.M[9], model.g[7] = model.D1[40], model.M[40], model.g[20]
    coarse, fine, time = bars(1, 40)
    coarse[0, 10], fine[0, 10], again = 9, 7, (coarse.clone(), fine.clone())
    again[0][0, 10], again[1][0, 10] = 40, 20
    with torch.no_grad():
        close(model(coarse, fine, time)[0], model(*again, time)[0], 1e-6)


def test_heads_score_a_code_by_its_candle():
    """Their naive forms."""
    model, h = make(), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    coarse = torch.arange(5) * 7
    given = model.fine_given(torch.cat((model.D1[coarse], model.M[coarse].flatten(1)), 1))
    fine, vectors = (a - a.mean(0) for a in (model.fine_head(model.g), model.coarse_head(model.D1)))
    want = F.silu(h @ model.fine_mix.weight.T + given) @ fine.T + model.fine_share
    close(model.fine_logits(h, coarse), want.detach(), 1e-5)
    close(model.coarse_logits(h), (h @ vectors.T + model.coarse_share).detach(), 1e-5)


def test_no_weight_belongs_to_a_code():
    shapes = [{name: p.shape for name, p in Model(dict(coarse_bits=k1, fine_bits=k2)).named_parameters()} for k1, k2 in ((4, 3), (11, 9))]
    assert shapes[0] == shapes[1]


def test_kept_code_vectors_are_never_stale():
    """What changes a weight or a candle changes the logits of the next call, in any precision and mode."""
    model, h = make(), torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    other = make(seed=1).state_dict()
    tokenizer = Tokenizer(TokenizerConfig(**BITS)).eval()

    def halve():
        for p in model.fine_given.parameters():
            p.mul_(0.5)
        model.coarse_head[0].weight.mul_(0.5)

    def train():
        with torch.enable_grad():
            optimizer = Optimizer(model, 0.1, 0.1, 0.0)    # AdamW is fused
            loss = model.coarse_logits(h).square().sum() + model.fine_logits(h, torch.arange(4)).square().sum()
            loss.backward()
        model.coarse_logits(h)                                      # kept before the update
        Run().update(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), loss.item(), 1.0)

    changes = (halve, train, lambda: model.load_state_dict(other), lambda: model.read_codes(tokenizer), lambda: model.half().float(),
               lambda: model.load_state_dict(make(seed=2).state_dict(), assign=True), lambda: model.to(torch.float64).float())
    with torch.no_grad():
        for change in changes:
            before = model.coarse_logits(h), model.fine_logits(h, torch.arange(4))
            change()
            after = model.coarse_logits(h), model.fine_logits(h, torch.arange(4))
            with torch.enable_grad():                               # made anew
                want = model.coarse_logits(h), model.fine_logits(h, torch.arange(4))
            for a, b, c in zip(after, want, before):
                assert torch.equal(a, b)
                assert change is changes[-1] or not torch.equal(a, c)
        model.coarse_head[0].weight.mul_(0.5)
        with torch.autocast("cpu", torch.bfloat16):                 # who asks first must not round it for who comes after
            model.coarse_logits(h)
        assert torch.equal(model.coarse_logits(h), copy.deepcopy(model).coarse_logits(h))
    with torch.inference_mode():
        assert torch.isfinite(make().coarse_logits(h)).all()


def test_p_up_is_the_share_of_up_tokens_among_bars_that_move():
    model = make(unmoved=0.1)
    h = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    unmoved = torch.rand(40, generator=torch.Generator().manual_seed(2)) / 2
    with torch.no_grad():
        p = model.coarse_logits(h).double().softmax(-1)[:, 32:].sum(-1)
        close(model.p_up(h), (p / 0.9).clamp(max=1), 1e-6)
        close(model.p_up(h, unmoved), (p / (1 - unmoved)).clamp(max=1), 1e-6)
        close(model.p_up(h, 0.0), p, 1e-6)
    assert model.p_up(h, 0.99).max() == 1


def test_lean_draws_the_mean_move_towards_that_of_the_training_data():
    """By a tilt along the moves alone; for small tilts the mean then lies where it should."""
    model, h = make(), 0.03 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    model.coarse_share.mul_(0.1)
    x = torch.sinh(model.mean[0] + model.std[0] * model.D1[:, 0]).clamp(-10, 10).double()
    with torch.no_grad():
        before = model.coarse_logits(h).double()
        p, base = before.softmax(-1), model.coarse_share.double().softmax(-1) @ x
        mean = p @ x
        for lean in (0.0, 0.3, 1.0):
            model.lean.fill_(lean)
            after = model.coarse_logits(h).double()
            want = base + lean * (mean - base)
            assert (after.softmax(-1) @ x - want).abs().max() <= 0.05 * (mean - base).abs().max()
            tilt = (after - before)[:, :1] / x[0]
            close(after - before + 1, tilt * x + 1, 1e-4)


def test_loss_is_the_cross_entropy_of_what_counts():
    model = make()
    coarse, fine, time = bars(2, 101)
    targets = coarse[:, 1:].clone(), fine[:, 1:].clone()
    targets[0][:, :40] = targets[1][:, :40] = -1
    with torch.no_grad():
        inputs, origins = (coarse[:, :-1], fine[:, :-1], time[:, :-1]), torch.tensor([[30, 60], [84, 95]])
        coarse_logits, fine_logits, loss = model(*inputs, targets, origins=origins)
        h = model.hidden(*inputs)
        close(fine_logits[:, 40:], model.fine_logits(h, coarse[:, 1:])[:, 40:], 1e-6)
        want = 0.0
        for logits, target in ((coarse_logits, targets[0]), (fine_logits, targets[1])):
            want += -logits.log_softmax(-1)[:, 40:].gather(-1, target[:, 40:, None]).mean()
        stamps = model.embedding.clock(time)[torch.arange(2)[:, None, None], (origins[..., None] + torch.arange(16)).clamp(max=99)]
        latents, nats = model.reasoner(h, origins, stamps), []
        for b, m, n in np.ndindex(2, 2, 16):            # latent n after p bars names bar p + n
            at = int(origins[b, m]) + n
            if 40 < at < 100:                           # the stamp of bar 100 is not known
                c, f = coarse[b, at], fine[b, at]
                one = latents[b, m, n]
                nats.append(F.cross_entropy(model.coarse_logits(one), c) + F.cross_entropy(model.fine_logits(one, c), f))
        torch.testing.assert_close(loss, want + 0.1 * torch.stack(nats).mean())
        nothing = [torch.full_like(a, -1) for a in targets]
        assert model(*inputs, nothing, origins=origins)[2] == 0


def test_an_order_of_the_codes_changes_which_number_draws_which_and_nothing_else():
    model = make()
    h, n = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), 100_000
    V = 2**model.config.coarse_bits
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    u = torch.stack(((torch.arange(n) + 0.5) / n, torch.rand(n, generator=torch.Generator().manual_seed(3))), -1)
    with torch.no_grad():
        coarse, fine = model.sample(h.expand(n, -1), u=u, order=order)
        p = model.coarse_logits(h)[0].softmax(-1)
    assert (torch.bincount(coarse, minlength=V) / n - p).abs().max() < 2 / n + 1e-6
    assert (order.argsort()[coarse].diff() >= 0).all()
    for c in coarse.unique()[:5]:       # the fine token is drawn given the coarse one that came out
        rows = coarse == c
        with torch.no_grad():
            given = generate.draw(model.fine_logits(h.expand(int(rows.sum()), -1), c.expand(int(rows.sum()))), 1.0, 1.0, u[rows, 1:])[:, 0]
        assert torch.equal(fine[rows], given)


def test_many_draws_from_one_hidden_state_are_those_from_its_copies():
    model, random = make(), torch.Generator().manual_seed(1)
    h, u = torch.randn(3, 5, 32, generator=random), torch.rand(3, 5, 7, 2, generator=random)
    with torch.no_grad():
        many, copies = model.sample(h, u=u), model.sample(h[:, :, None].expand(-1, -1, 7, -1), u=u)
    assert all(torch.equal(a, b) for a, b in zip(many, copies))


def test_a_uniform_number_rounded_up_to_one_draws_a_token_that_can_be():
    logits = torch.tensor([[3.0, 2.0, -50.0, -200.0]])
    for temperature, top_p, allowed in ((1.0, 0.9, (0, 1)), (1e-6, 1.0, (0,))):
        assert generate.draw(logits, temperature, top_p, torch.ones(1, 1)).item() in allowed


def test_sampling_follows_the_distribution():
    model = make()
    h = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    n, generator = 200_000, torch.Generator().manual_seed(0)
    with torch.no_grad():
        coarse, fine = model.sample(h.expand(n, -1), temperature=0.8, generator=generator)
        p = (model.coarse_logits(h)[0] / 0.8).softmax(-1)
        assert (torch.bincount(coarse, minlength=64) / n - p).abs().max() < 5e-3
        c = int(p.argmax())
        p_fine = (model.fine_logits(h[0], torch.tensor(c)) / 0.8).softmax(-1)
        drawn = fine[coarse == c]
        assert (torch.bincount(drawn, minlength=32) / len(drawn) - p_fine).abs().max() < 2e-2
        p = model.coarse_logits(h)[0].softmax(-1)
        value, order = p.sort(descending=True)
        keep = order[:int((value.cumsum(0) < 0.5).sum()) + 1]
        coarse, _ = model.sample(h.expand(20_000, -1), top_p=0.5, generator=generator)
        assert set(coarse.tolist()) == set(keep.tolist())
        again = [model.sample(h.expand(50, -1), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]) and torch.equal(again[0][1], again[1][1])


# --- Scores of a training --------------------------------------------------------------------------------------------

def test_crps_is_the_integral_and_the_mean_distance():
    """Against the integral of (F - 1{x >= y})^2 on a fine grid, and E|X - y| - E|X - X'| / 2; values in any order, equal ones too."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(12, generator=random)
    values[3] = values[8]
    p = torch.rand(7, 12, generator=random).softmax(-1)
    p[0] = F.one_hot(torch.tensor(5), 12)
    y = torch.tensor([values[5], 0.1, -9.0, 9.0, values[3], values.min(), 0.5])
    got = validation.crps(p, values, y)
    x = torch.linspace(-10, 10, 400_001).double()
    for n in range(7):
        below = (values[:, None] <= x) * p[n][:, None]
        integral = ((below.sum(0) - (x >= y[n]).double()) ** 2).sum() * 5e-5
        assert got[n] == pytest.approx(integral.item(), abs=1e-3)
        spread = (p[n][:, None] * p[n] * (values[:, None] - values).abs()).sum()
        assert got[n] == pytest.approx(((p[n] * (values - y[n]).abs()).sum() - spread / 2).item(), abs=1e-5)
    assert got[0] == 0


@pytest.mark.parametrize("truth", [-0.5, 0.0, 0.4, 0.8, 2.0])
def test_lean_is_the_slope_of_what_came_as_far_as_it_is_known(truth):
    """Over many draws: the mean of the fitted ones is near the truth, and one of nothing is mostly taken for nothing."""
    random = torch.Generator().manual_seed(0)
    day = torch.arange(400).repeat_interleave(10)
    found = []
    for _ in range(50):
        mean = torch.randn(4000, generator=random)
        common = torch.randn(400, generator=random)[day]    # symbols of one day move together
        found.append(fit_lean(mean, truth * mean + common + 3 * torch.randn(4000, generator=random), day * DAY))
    found = torch.tensor(found)
    assert ((0 <= found) & (found <= 1)).all()
    assert abs(found.mean().item() - min(1.0, max(0.0, truth))) < 0.02
    if truth <= 0:
        assert (found == 0).float().mean() > 0.6
    minutes = 60 * torch.arange(4000) // 10                             # less than a day, yet many bars
    sure = fit_lean(mean, mean + torch.randn(4000, generator=random), minutes)
    assert 0.9 < sure <= 1
    alone = fit_lean(torch.ones(10), torch.ones(10), torch.zeros(10, dtype=torch.int64))
    assert alone == fit_lean(*[torch.zeros(0)] * 3) == 0.0     # a single stamp tells nothing


def test_candle_values_are_close_range_and_volume():
    model = make()
    coarse, fine = torch.arange(64), torch.arange(64) % 32
    x = model.mean + model.std * (model.D1[coarse] + (model.M[coarse] @ model.g[fine][..., None])[..., 0])
    for (close_, range_, volume), (c, o, u, l, v, _) in zip(validation.candle_values(model, coarse, fine).tolist(), x.tolist()):
        c, o, u, l = map(math.sinh, (c, o, u, l))
        assert close_ == pytest.approx(c, rel=1e-4) and volume == pytest.approx(v, rel=1e-5)
        assert range_ == pytest.approx(max(c, o) + max(u, 0) - min(c, o) + max(l, 0), rel=1e-4)


def test_close_table_is_what_the_tokenizer_decodes():
    torch.manual_seed(0)
    for direction_bit in (True, False):
        tokenizer = Tokenizer(TokenizerConfig(**BITS, direction_bit=direction_bit))
        every = tokenizer.decode(torch.arange(64)[:, None], torch.arange(32))           # [64, 32, 6]
        assert every.shape == (64, 32, 6) and ((every[32:, :, 0] > 0).all() == direction_bit)
        torch.testing.assert_close(tokenizer.decode_pairs().movedim(0, -1), every)
        torch.testing.assert_close(close_table(tokenizer), every[..., 0])


# --- The checkpoint --------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    model, tokenizer = make(), Tokenizer(TokenizerConfig(**BITS)).eval()
    model.read_codes(tokenizer)
    best = {name: p + 1 if "candle" in name else p for name, p in model.state_dict().items()}
    path = str(tmp_path / "out.pt")
    save_checkpoint(path, model, tokenizer, stage="pretrain", best=best, step=7, metrics=[{"stage": "pretrain", "step": 7, "val": 1.5}], splits=(1, 2))
    return path, model, tokenizer


def test_checkpoint_gives_back_what_it_took(saved):
    path, model, tokenizer = saved
    last, again, meta = load_checkpoint(path, weights="last")
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), model.state_dict().values()))
    assert last.config == model.config and not last.training
    x = torch.randn(50, 6)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), tokenizer.encode(x)))
    assert meta["step"] == 7 and meta["stage"] == "pretrain" and meta["metrics"] == [{"stage": "pretrain", "step": 7, "val": 1.5}] and "model" not in meta and "best" not in meta
    best, _, _ = load_checkpoint(path)
    assert torch.equal(best.embedding.candle_linear.weight, model.embedding.candle_linear.weight + 1)
    save_checkpoint(path, model, tokenizer, stage="pretrain")
    none, _, meta = load_checkpoint(path, weights="best")       # without a best the last weights serve
    assert torch.equal(none.embedding.candle_linear.weight, model.embedding.candle_linear.weight)
    assert Checkpoint.__annotations__.keys() | {"format_version"} == load_safe(path).keys()


def damage(path, change):
    entry = load_safe(path)
    change(entry)
    torch.save(entry, path)


ROWS = "embedding.calendar.weight"


def of_best(change):
    return lambda path: damage(path, lambda entry: change(entry["best"]))


BROKEN = {
    "some other dict": lambda path: torch.save({"weights": torch.ones(3)}, path),
    "not a dict": lambda path: torch.save(torch.ones(3), path),
    "text": lambda path: open(path, "w").write("time,open,high,low,close\n"),
    "empty": lambda path: open(path, "w").close(),
    "truncated": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "missing": os.remove,
    "other version": lambda path: damage(path, lambda e: e.update(format_version=99)),
    "key missing": lambda path: damage(path, lambda e: e.pop("tokenizer")),
    "unknown setting": lambda path: damage(path, lambda e: e["config"].update(n_wings=2)),
    "config is no dict": lambda path: damage(path, lambda e: e.update(config=3)),
    "zero heads": lambda path: damage(path, lambda e: e["config"].update(n_head=0)),
    "text for a number": lambda path: damage(path, lambda e: e["config"].update(n_layer="3")),
    "absurd depth": lambda path: damage(path, lambda e: e["config"].update(n_layer=10**9)),
    "absurd width": lambda path: damage(path, lambda e: e["config"].update(n_embd=16384)),
    "absurd windows": lambda path: damage(path, lambda e: e["config"].update(windows=(10**12,))),
    "windows no list": lambda path: damage(path, lambda e: e["config"].update(windows=16)),
    "weight missing": of_best(lambda w: w.pop(ROWS)),
    "weight of another shape": of_best(lambda w: w.update({ROWS: torch.ones(2, 2)})),
    "weight is text": of_best(lambda w: w.update({ROWS: "x"})),
    "weight of integers": of_best(lambda w: w.update({ROWS: w[ROWS].long()})),
    "weight of complex numbers": of_best(lambda w: w.update({ROWS: w[ROWS] + 0j})),
    "weight is NaN": of_best(lambda w: w[ROWS].fill_(math.nan)),
    "a last weight is infinite": lambda path: damage(path, lambda e: e["model"][ROWS].fill_(math.inf)),
    "one number claims to be many": of_best(lambda w: w.update({ROWS: torch.ones(()).expand(165, 32)})),
    "a last weight of another shape": lambda path: damage(path, lambda e: e["model"].update({ROWS: torch.ones(2, 2)})),
    "mask of numbers": lambda path: damage(path, lambda e: e["model"].update(up_mask=e["model"]["up_mask"].float())),
    "a code turned upside down": lambda path: damage(path, lambda e: e["model"]["up_mask"].logical_not_()),
    "candles of another tokenizer": lambda path: damage(path, lambda e: e["model"]["D1"].add_(1)),
    "tokenizer of other bits": lambda path: damage(path, lambda e: e.update(tokenizer=Tokenizer(TokenizerConfig(coarse_bits=5, fine_bits=5)).dump())),
    "tokenizer of integers": lambda path: damage(path, lambda e: e["tokenizer"]["state"].update(mean=torch.zeros(6, dtype=torch.int64))),
    "splits the wrong way round": lambda path: damage(path, lambda e: e.update(splits=(2, 1))),
    "a report is text": lambda path: damage(path, lambda e: e.update(metrics=["x"])),
    "other features": lambda path: damage(path, lambda e: e.update(features=dict(channels=("close",), half_life=32))),
    "weights are none": lambda path: damage(path, lambda e: e.update(best=[1])),
    "no model yet": lambda path: damage(path, lambda e: e.update(model=None, config=None)),
    "tokenizer is none": lambda path: damage(path, lambda e: e.update(tokenizer=None)),
    "tokenizer without weights": lambda path: damage(path, lambda e: e.update(tokenizer={"config": e["tokenizer"]["config"]})),
}


@pytest.mark.parametrize("how", BROKEN)
def test_checkpoint_that_is_none_gets_one_line(saved, how):
    path = saved[0]
    BROKEN[how](path)
    with pytest.raises(data.UserError) as error:
        load_checkpoint(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_weights_in_half_precision_are_given_away_and_read(saved, tmp_path):
    path, model, tokenizer = saved
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.half()
    save_checkpoint(tmp_path / "half.pt", half, tokenizer, stage="pretrain")
    again = load_checkpoint(str(tmp_path / "half.pt"))[0]
    for a, b in zip(again.parameters(), model.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())


@pytest.mark.parametrize("wrong", [dict(n_head=3), dict(n_embd=33), dict(pos="none"), dict(span=0), dict(latents=0), dict(linear_heads=5),
                                   dict(linear_heads=1), dict(windows=(0,)), dict(n_layer=0), dict(n_layer=True), dict(unmoved=1.0)])
def test_config_out_of_bounds(wrong):
    with pytest.raises(ValueError):
        ModelConfig(**{**BITS, "n_head": 4, "n_embd": 32, **wrong})
