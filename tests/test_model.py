"""The model against naive forms written here: attention as quadratic sums, the reasoner border by border, no look-ahead bit for bit,
the recurrence against the parallel form, the next bar in closed form against brute force, and the checkpoint's refusals."""

import copy
import datetime
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import data
import model as M
from model import Model, ModelConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, TokenizerConfig

BITS = dict(coarse_bits=6, fine_bits=5)
MIXES = {       # every option that changes the computation
    "rope": {},
    "alibi": dict(pos="alibi"),
    "linear only": dict(linear_heads=4, windows=()),
    "local only": dict(linear_heads=0),
    "local only, alibi": dict(linear_heads=0, pos="alibi"),
    "no reasoner": dict(reasoner=False),
    "one window, short span": dict(windows=(24,), span=32, slots=4, rounds=1),
}


def make(seed=0, **options):
    """A small model whose weights are large enough that every part moves the logits by much more than a tolerance."""
    torch.manual_seed(seed)
    model = Model(ModelConfig(**{**BITS, "n_layer": 3, "n_head": 4, "n_embd": 32, **options})).eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.ones_like(p) if name.endswith("gate") else torch.randn_like(p) * (0.5 if "embed" in name else p.shape[-1] ** -0.5))
    return model


def bars(B, T, seed=0):
    """Random tokens, and stamps with gaps of a minute to some days."""
    g = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randint(0, 2**BITS[name], (B, T), generator=g) for name in ("coarse_bits", "fine_bits"))
    gap = 60 * 2 ** torch.randint(0, 12, (B, T), generator=g)
    return coarse, fine, 1_500_000_000 + gap.cumsum(1)


def close(a, b, tolerance):
    """The largest difference, as a share of b's root mean square."""
    error = ((a.double() - b.double()).abs().max() / b.double().square().mean().sqrt()).item()
    assert error <= tolerance, error


def close_half(a, b):
    """bfloat16 against exact, each row brought to unit size: 2e-2 for 999 of 1,000 numbers, 3e-2 for all. The rounding of the result
    alone reaches 1.3e-2, and torch's own attention 1.4e-2, since the largest of many numbers is several times their size."""
    error = (F.rms_norm(a.double(), a.shape[-1:]) - F.rms_norm(b, b.shape[-1:])).abs().flatten()
    assert error.kthvalue(math.ceil(0.999 * len(error))).values <= 2e-2 and error.max() <= 3e-2, error.max()


def half(T):
    """q, k, v [3, 2, T, 16] in bfloat16: the same inputs for both forms, rounded once."""
    q, k, v = torch.randn(3, 3, 2, T, 16, generator=torch.Generator().manual_seed(T))
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


# --- Attention -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("slope", [[0.0, 0.0, 0.0], [0.06, 0.01, 0.001]])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 129, 1000])
def test_linear_attention_is_the_quadratic_sum(T, slope):
    slope = torch.tensor(slope)
    q, k, v = torch.randn(3, 3, 2, T, 16, generator=torch.Generator().manual_seed(T))
    want = naive_linear(q, k, v, slope)
    o, S = M.linear_attention(q, k, v, slope)
    close(o, want, 1e-5)
    assert S.dtype == torch.float32
    decay = torch.exp(-slope.double()[:, None] * torch.arange(T - 1, -1, -1))
    close(S, torch.einsum("ht,hbtd,hbte->hbde", decay, k.double(), v.double()), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        o, S = M.linear_attention(*half(T), slope)
    close_half(o, naive_linear(*half(T), slope))
    assert S.dtype == torch.float32


def test_linear_attention_over_many_groups_of_chunks():
    T, slope = 64 * 300 + 7, torch.tensor([0.0, 0.001])
    q, k, v = torch.randn(3, 2, 1, T, 4, generator=torch.Generator().manual_seed(0))
    o, _ = M.linear_attention(q, k, v, slope)
    d = torch.arange(T - 50, T)[:, None] - torch.arange(T)
    weight = torch.exp(-slope.double()[:, None, None, None] * d.clamp(min=0)) * (d >= 0)
    close(o[:, :, -50:], (q[:, :, -50:].double() @ k.double().mT * weight) @ v.double() / 2, 1e-5)


@pytest.mark.parametrize("window", [1, 16, 24, 64])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 64, 100, 257])
def test_local_attention_is_softmax_with_a_band_mask(T, window):
    slope = torch.tensor([0.5, 0.05, 0.001])
    q, k, v = torch.randn(3, 3, 2, T, 16, generator=torch.Generator().manual_seed(T))
    for bias in (torch.zeros(3), slope):
        close(M.local_attention(q, k, v, window, bias), naive_local(q, k, v, window, bias), 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            close_half(M.local_attention(*half(T), window, bias), naive_local(*half(T), window, bias))


def test_norm_has_the_gradient_of_rms_norm():
    x, g = torch.randn(2, 7, 5, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for f in (M.norm, lambda x: F.rms_norm(x, (16,), eps=M.EPS)):
        x = x.detach().requires_grad_()
        y = f(x)
        y.backward(g)
        results.append((y, x.grad))
    for a, b in zip(*results):
        close(a, b, 1e-6)


@pytest.mark.parametrize("pos", ["rope", "alibi"])
@pytest.mark.parametrize("T", [1, 50, 333])
def test_block_is_its_naive_form(T, pos):
    """Heads divided among linear, window 16 and window 64; rotation or decay; norm per head; MLP."""
    block = make(pos=pos, windows=(16, 64)).blocks[0]
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        got = block(x, M.rotation(torch.arange(T), 8))
    weight = {name: p.detach().double() for name, p in block.named_parameters()}
    qkv = F.rms_norm(x.double(), (32,)) @ weight["qkv.weight"].T
    q, k, v = qkv.view(2, T, 3, 4, 8).permute(2, 3, 0, 1, 4)         # [3, H, B, T, D]
    if pos == "rope":
        q, k = naive_rotate(q), naive_rotate(k)
    o = [F.rms_norm(naive_linear(q[:2], k[:2], v[:2], block.slope[:2]), (8,), eps=M.EPS)]
    o += [naive_local(q[[n]], k[[n]], v[[n]], w, block.slope[[n]]) for n, w in ((2, 16), (3, 64))]
    x = x.double() + torch.cat(o).permute(1, 2, 0, 3).reshape(2, T, 32) @ weight["out.weight"].T
    x = x + F.gelu(F.rms_norm(x, (32,)) @ weight["up.weight"].T) @ weight["down.weight"].T
    close(got, x, 1e-5)


def test_rotation_stays_exact_far_out():
    cos, sin = M.rotation(torch.tensor([20_000, 3_000_017]), 8)
    for row, p in enumerate((20_000, 3_000_017)):
        for i in range(4):
            angle = p * 10000.0 ** (-2 * i / 8)
            assert cos[row, i] == pytest.approx(math.cos(angle), abs=1e-6) and sin[row, 4 + i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_slopes_differ_among_heads_in_alibi_and_vanish_in_rope():
    for pos in ("rope", "alibi"):
        block = make(pos=pos, n_head=8, n_embd=32).blocks[0]
        assert bool((block.slope > 0).all()) == (pos == "alibi")
        assert [len(set(a.tolist())) for a in block.slope.split((4, 2, 2))] == ([4, 2, 2] if pos == "alibi" else [1, 1, 1])


# --- The reasoner ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, phase", [(1, 0), (31, 0), (32, 0), (33, 0), (33, 31), (200, 5), (200, 31), (400, 17)])
def test_reasoner_border_by_border(T, phase):
    """Slots of each border from its span alone, one border after another, read by the bars up to the next one. In float64, both."""
    r = make().reasoner.double()
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(T)).double()
    with torch.no_grad():
        got, slots = r(x, phase)
        want, seen = x.clone(), 0
        for p in range(1, T):
            if (p + phase) % 32:
                continue
            past = x[:, max(0, p - 128):p]
            kv = r.look_kv(unit(past)).view(2, -1, 2, 4, 8)
            s = r.latent.expand(2, -1, -1)
            for _ in range(2):
                q = r.look_q(unit(s)).view(2, 16, 4, 8)
                score = torch.einsum("bshd,bthd->bhst", q, kv[:, :, 0]) / math.sqrt(8) + r.near[:, None, -past.shape[1]:]
                s = s + r.look_out(torch.einsum("bhst,bthd->bshd", score.softmax(-1), kv[:, :, 1]).reshape(2, 16, 32))
                q, k, v = r.self_qkv(unit(s)).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
                s = s + r.self_out(naive_softmax(q, k, v).transpose(1, 2).reshape(2, 16, 32))
                s = s + r.down(F.gelu(r.up(unit(s))))
            close(slots[:, seen], s, 1e-6)
            here = x[:, p:p + 32]
            q = (r.read_q(unit(here)) + r.offset[:here.shape[1]]).view(2, -1, 4, 8).transpose(1, 2)
            k, v = r.read_kv(unit(s)).view(2, 16, 2, 4, 8).permute(2, 0, 3, 1, 4)
            want[:, p:p + 32] += r.gate * r.read_out(naive_softmax(q, k, v).transpose(1, 2).reshape(2, -1, 32))
            seen += 1
    assert slots.shape[1] == seen
    close(got, want, 1e-6)


def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + M.EPS).sqrt()


def naive_softmax(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100, 300])
def test_parallel_forecast_comes_from_a_border_at_the_origin(T):
    """Its slots are those that forward computes at a border at T, once there is a bar T; that bar changes nothing."""
    model = make()
    coarse, fine, time = bars(2, T + 1)
    with torch.no_grad():
        logits, h = model.parallel(coarse[:, :T], fine[:, :T], time[:, :T])
        _, slots = model.trunk(coarse, fine, time, phase=-T % 32)
    assert logits.shape == (2, 16, 64) and model.fine_logits(h, coarse[:, :1].expand(-1, 16)).shape == (2, 16, 32)
    close(logits, model.coarse_logits(F.rms_norm(slots[:, -1], (32,))), 1e-5)
    with pytest.raises(data.UserError, match="reasoner"):
        make(reasoner=False).parallel(coarse, fine, time)


# --- No look-ahead ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("phase", [0, 5, 31])
def test_no_lookahead_bit_for_bit(name, phase):
    """G1, G3: changing bar t (tokens and stamp) changes no logit before t, in one bit; and it does change the one at t."""
    model, T = make(**MIXES[name]), 203
    coarse, fine, time = bars(1, T)
    with torch.no_grad():
        before = model(coarse, fine, time, phase=phase)[:2]
        for t in [0, 1, 15, 16, 26, 27, 28, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 130, 160, 187, 191, 192, 201, 202]:
            c, f, s = coarse.clone(), fine.clone(), time.clone()
            c[0, t] ^= 33
            f[0, t] ^= 7
            s[0, t] += 100_000          # another minute, hour and day
            after = model(c, f, s, phase=phase)[:2]
            for a, b in zip(after, before):
                assert torch.equal(a[:, :t], b[:, :t]), t
                assert not torch.equal(a[:, t], b[:, t]), t


@pytest.mark.parametrize("pos", ["rope", "alibi"])
@pytest.mark.parametrize("half", [False, True])
def test_no_lookahead_in_training_with_activation_checkpointing(pos, half):
    """As above through the training forward: recomputed activations, autocast, and targets. Targets, too, stay behind their logits."""
    model, T = make(pos=pos).train(), 150
    model.grad_ckpt = True
    coarse, fine, time = bars(1, T + 1)

    def logits(c, f):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(c[:, :-1], f[:, :-1], time[:, :-1], (c[:, 1:], f[:, 1:]), phase=9)[:2]

    before = logits(coarse, fine)
    for t in (1, 22, 23, 24, 55, 64, 87, 118, 119, 120, 140):
        c, f = coarse.clone(), fine.clone()
        c[0, t] ^= 33
        f[0, t] ^= 7
        after = logits(c, f)
        assert torch.equal(after[0][:, :t], before[0][:, :t]) and torch.equal(after[1][:, :t - 1], before[1][:, :t - 1]), t
        assert not torch.equal(after[0][:, t], before[0][:, t])


def test_activation_checkpointing_changes_no_gradient():
    coarse, fine, time = bars(2, 101)
    gradients = []
    for save in (False, True):
        model = make().train()
        model.grad_ckpt = save
        model(coarse[:, :-1], fine[:, :-1], time[:, :-1], (coarse[:, 1:], fine[:, 1:]), phase=3)[2].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# --- The recurrence --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MIXES)
def test_recurrence_is_the_parallel_form_over_2000_steps(name):
    """G4: from a prefill on, every step's logits are the parallel forward's, across every border."""
    model, T = make(**MIXES[name]), 2100
    coarse, fine, time = bars(1, T)
    with torch.inference_mode():
        want = model(coarse, fine, time, phase=11)[0]
        state = model.prefill(coarse[:, :100], fine[:, :100], time[:, :100], phase=11)
        got = [state.h]
        for t in range(100, T):
            h, state = model.step(coarse[:, t], fine[:, t], time[:, t], state)
            got.append(h.clone())
        got = model.coarse_logits(torch.stack(got, dim=1))
    assert (got - want[:, 99:]).abs().max() <= 1e-4
    assert want.std() > 0.3


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("start, phase", [(1, 0), (1, 31), (2, 30), (20, 12), (31, 0), (32, 0), (33, 0), (64, 7), (140, 31), (200, 0)])
def test_recurrence_from_any_start_and_phase(name, start, phase):
    model, T = make(**MIXES[name]), start + 70
    coarse, fine, time = bars(3, T)
    with torch.inference_mode():
        want, want_fine, _ = model(coarse, fine, time, phase=phase)
        state = model.prefill(coarse[:, :start], fine[:, :start], time[:, :start], phase=phase)
        for t in range(start - 1, T):
            if t >= start:
                _, state = model.step(coarse[:, t], fine[:, t], time[:, t], state)
            assert (model.coarse_logits(state.h) - want[:, t]).abs().max() <= 1e-4, t
            assert (model.fine_logits(state.h, want[:, t].argmax(-1)) - want_fine[:, t]).abs().max() <= 1e-4, t


def test_paths_share_one_prefill_and_are_each_their_own():
    model = make()
    coarse, fine, time = bars(2, 120)
    paths = bars(6, 60, seed=1)
    later = time[:, -1:].repeat_interleave(3, dim=0) + 60 + 60 * torch.arange(60)
    with torch.inference_mode():
        state = model.prefill(coarse, fine, time)
        many = state.repeat(3)                                      # rows 0, 0, 0, 1, 1, 1
        for t in range(60):
            h, many = model.step(paths[0][:, t], paths[1][:, t], later[:, t], many)
        got = h.clone()
        for n in range(3):                                          # the paths left the prefill's own state as it was
            alone = state.repeat(1)
            for t in range(60):
                h, alone = model.step(paths[0][n::3, t], paths[1][n::3, t], later[n::3, t], alone)
            assert (h - got[n::3]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MIXES)
def test_recurrence_in_half_precision(name):
    """Prefilled under autocast, steps run with bfloat16 weights and stay near the float32 forward; the states stay float32."""
    model = make(**MIXES[name])
    coarse, fine, time = bars(3, 200)
    with torch.inference_mode():
        want = model(coarse, fine, time)[0]
        with torch.autocast("cpu", torch.bfloat16):
            state = model.prefill(coarse[:, :90], fine[:, :90], time[:, :90])
        for t in range(90, 200):
            h, state = model.step(coarse[:, t], fine[:, t], time[:, t], state)
        assert all(a is None or a.dtype == torch.float32 for a in (h, state.past, state.slots, state.pending, *sum(state.layers, [])))
        error = (model.coarse_logits(h) - want[:, -1]).square().mean().sqrt() / want[:, -1].std()
    assert error < 0.05, error


def test_memory_of_generation_does_not_grow():
    """Peak resident memory of 20,000 generated bars within 2 % of that of 1,000."""
    code = ("import resource, sys; sys.path[:0] = sys.argv[1:]; import torch; from test_model import *\n"
            "torch.set_num_threads(1); model = make(n_layer=1); coarse, fine, time = bars(2, 64)\n"
            "with torch.inference_mode():\n"
            "    state = model.prefill(coarse, fine, time)\n"
            "    for t in range(20000):\n"
            "        if t == 1000: first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "        if t % 8 == 0: coarse, fine = model.sample(state.h)\n"
            "        h, state = model.step(coarse, fine, state.time + 60, state)\n"
            "assert torch.isfinite(h).all(); print(first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    run = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert run.returncode == 0, run.stderr
    first, last = map(int, run.stdout.split())
    assert last <= 1.02 * first, (first, last)


# --- Inputs, loss, sampling ------------------------------------------------------------------------------------------

def test_calendar_is_the_civil_date():
    time = torch.cat((torch.arange(-40, 60_000, 7) * 86400 + 4_000, torch.randint(0, 4_000_000_000, (2000,))))
    for row, t in zip(data.calendar(time).tolist(), time.tolist()):
        d = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=t)
        assert row == [d.hour, d.minute, d.weekday(), d.day - 1, d.month - 1]


def test_spacing_is_the_causal_running_median():
    _, _, time = bars(2, 60)
    gaps = F.pad(time[:, 1:] - time[:, :-1], (M.GAPS, 0), value=M.NO_GAP).unfold(1, M.GAPS, 1)
    got = M.gap_bucket(gaps)[..., 0]
    for b in range(2):
        for t in range(60):
            last = sorted((time[b, 1:t + 1] - time[b, :t]).tolist()[-7:])
            assert got[b, t] == (int(math.log2(last[(len(last) - 1) // 2])) + 1 if last else 0)


def test_loss_is_the_cross_entropy_of_what_counts():
    model = make()
    coarse, fine, time = bars(2, 101)
    targets = coarse[:, 1:].clone(), fine[:, 1:].clone()
    targets[0][:, :40] = targets[1][:, :40] = -1
    coarse_logits, fine_logits, loss = model(coarse[:, :-1], fine[:, :-1], time[:, :-1], targets, phase=4)
    parts = model.parts
    for logits, target, part in ((coarse_logits, targets[0], "coarse"), (fine_logits, targets[1], "fine")):
        nats = -logits.log_softmax(-1)[:, 40:].gather(-1, target[:, 40:, None])
        torch.testing.assert_close(parts[part], nats.mean().detach())
    with torch.no_grad():
        _, slots = model.trunk(coarse[:, :-1], fine[:, :-1], time[:, :-1], 4)
        nats = []
        for m, p in enumerate((28, 60, 92)):                        # slot n at border p predicts bar p + n
            for n in range(16):
                if 40 < p + n <= 100:
                    h = F.rms_norm(slots[:, m, n], (32,))
                    c, f = coarse[:, p + n], fine[:, p + n]
                    nats.append(F.cross_entropy(model.coarse_logits(h), c) + F.cross_entropy(model.fine_logits(h, c), f))
    torch.testing.assert_close(parts["aux"], torch.stack(nats).mean())
    torch.testing.assert_close(loss.detach(), parts["coarse"] + parts["fine"] + 0.1 * parts["aux"])
    nothing = [torch.full_like(a, -1) for a in targets]
    assert model(coarse[:, :-1], fine[:, :-1], time[:, :-1], nothing)[2] == 0


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
            given = M.draw(model.fine_logits(h.expand(int(rows.sum()), -1), c.expand(int(rows.sum()))), 1.0, 1.0, u[rows, 1:])[:, 0]
        assert torch.equal(fine[rows], given)


def test_a_uniform_number_rounded_up_to_one_draws_a_token_that_can_be():
    logits = torch.tensor([[3.0, 2.0, -50.0, -200.0]])
    for temperature, top_p, allowed in ((1.0, 0.9, (0, 1)), (1e-6, 1.0, (0,))):
        assert M.draw(logits, temperature, top_p, torch.ones(1, 1)).item() in allowed


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


# --- The next bar in closed form -------------------------------------------------------------------------------------

def test_next_bar_in_closed_form_is_brute_force():
    """Against a loop over every pair of tokens, for closes at random."""
    model = make(unmoved=0.02)
    h, scale, table = torch.randn(3, 32), torch.tensor([0.01, 0.02, 0.2]), torch.randn(64, 32)
    p_up, mean, quantile = M.next_bar(model, table, h, scale, (0.05, 0.5, 0.95))
    with torch.no_grad():
        for b in range(3):
            outcomes, up = [], 0.0
            pc = model.coarse_logits(h[b]).double().softmax(-1)
            for c in range(64):
                pf = model.fine_logits(h[b], torch.tensor(c)).double().softmax(-1)
                outcomes += [(max(-math.log(10), min(math.log(10), math.sinh(table[c, f].item()) * scale[b].item())), (pc[c] * pf[f]).item()) for f in range(32)]
                up += pc[c].item() * (c >= 32)
            outcomes.sort()
            assert p_up[b].item() == pytest.approx(up, abs=1e-6)
            assert model.p_up(h[b]).item() == pytest.approx(min(1, up / 0.98), abs=1e-6)
            assert mean[b].item() == pytest.approx(sum(p * math.expm1(r) for r, p in outcomes), abs=1e-6)
            for q, got in zip((0.05, 0.5, 0.95), quantile[b].tolist()):
                total = 0.0
                for r, p in outcomes:
                    total += p
                    if total >= q:
                        break
                assert got == pytest.approx(r, abs=1e-6)


def test_close_table_is_what_the_tokenizer_decodes():
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(**BITS))
    table = M.close_table(tokenizer)
    assert table.shape == (64, 32)
    for c, f in ((0, 0), (5, 31), (63, 2)):
        torch.testing.assert_close(table[c, f], tokenizer.decode(torch.tensor([c]), torch.tensor([f]))[0, 0])


# --- The checkpoint --------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    model, tokenizer = make(), Tokenizer(TokenizerConfig(**BITS))
    best = {name: p + 1 if p.is_floating_point() else p for name, p in model.state_dict().items()}
    path = str(tmp_path / "out.pt")
    save_checkpoint(path, model, tokenizer, stage="pretrain", best=best, step=7, metrics=[{"val": 1.5}], splits=(1, 2))
    return path, model, tokenizer


def test_checkpoint_gives_back_what_it_took(saved):
    path, model, tokenizer = saved
    last, again, meta = load_checkpoint(path, weights="last")
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), model.state_dict().values()))
    assert last.config == model.config and not last.training
    x = torch.randn(50, 6)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), tokenizer.encode(x)))
    assert meta["step"] == 7 and meta["stage"] == "pretrain" and meta["metrics"] == [{"val": 1.5}] and "model" not in meta and "best" not in meta
    best, _, _ = load_checkpoint(path)
    assert torch.equal(best.coarse_head.weight, model.coarse_head.weight + 1)
    save_checkpoint(path, model, tokenizer, stage="pretrain")
    none, _, meta = load_checkpoint(path, weights="best")       # without a best the last weights serve
    assert torch.equal(none.coarse_head.weight, model.coarse_head.weight)
    keys = "format_version stage config model best tokenizer features optimizer scaler step bad_steps seed data splits metrics".split()
    assert set(keys) == set(data.load_safe(path))


def damage(path, change):
    entry = data.load_safe(path)
    change(entry)
    torch.save(entry, path)


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
    "weight missing": lambda path: damage(path, lambda e: e["best"].pop("embed.weight")),
    "weight of another shape": lambda path: damage(path, lambda e: e["best"].update({"embed.weight": torch.ones(2, 2)})),
    "weight is text": lambda path: damage(path, lambda e: e["best"].update({"embed.weight": "x"})),
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


@pytest.mark.parametrize("wrong", [dict(n_head=3), dict(n_embd=33), dict(pos="none"), dict(span=100), dict(slots=64), dict(linear_heads=5),
                                   dict(linear_heads=1), dict(windows=(0,)), dict(n_layer=0), dict(n_layer=True), dict(unmoved=1.0)])
def test_config_out_of_bounds(wrong):
    with pytest.raises(ValueError):
        ModelConfig(**{**BITS, "n_head": 4, "n_embd": 32, **wrong})
