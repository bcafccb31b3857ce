"""The log-likelihood ops against float64, per dtype, instruction set and edge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cca_ds.likelihood import (
    backend,
    linear_sequence_logp,
    linear_sequence_logp_eager,
    sequence_logp,
    sequence_logp_eager,
)
from cca_ds.ops import library
from tests.support.likelihood_inputs import leaves, relative, sample

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Relative error of a gradient, by norm: one rounding in the 16-bit types (two for hidden's, whose row scale is last).
GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-14}
kernels = pytest.mark.skipif(backend() == "torch", reason="no kernels are built")


def by_hand(logits_BLV, targets_BL):
    """log p [B] in float64, from the definition and by loops."""
    sums = []
    for rows, targets in zip(logits_BLV.double(), targets_BL, strict=True):
        sums.append(
            sum(
                (row[t] - row.max() - (row - row.max()).exp().sum().log()) for row, t in zip(rows, targets, strict=True)
            )
        )
    return torch.stack([torch.as_tensor(s, dtype=torch.float64, device=logits_BLV.device) for s in sums])


def test_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, torch.tensor(3.0).log()]]])
    expected = torch.tensor(0.5).log() + torch.tensor(0.75).log()  # 1/2, then 3/4
    for op in (sequence_logp, sequence_logp_eager):
        torch.testing.assert_close(op(logits, torch.tensor([[0, 1]])), expected.unsqueeze(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 4097, 16384])
def test_from_logits(device, dtype, vocabulary):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CPU only")
    g = torch.Generator().manual_seed(vocabulary)
    values = (torch.randn(2, 5, vocabulary, generator=g) * 3).to(device, dtype)
    targets = torch.randint(vocabulary, (2, 5), generator=g).to(device)
    logits, exact64 = leaves(values, values.double())
    logp, expected = sequence_logp(logits, targets), sequence_logp_eager(exact64, targets)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(expected, by_hand(values, targets), atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=1e-6)
    scale = torch.tensor([0.5, -2.0], device=device)
    (logp * scale).sum().backward()
    (expected * scale).sum().backward()
    assert logits.grad.dtype == dtype
    if vocabulary > 1:
        assert relative(logits.grad, exact64.grad) < GRADIENT[dtype]
    else:
        assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
def test_sequences_of_576_tokens(device, dtype, limit):
    hidden, weight, bias, targets = sample(device, dtype, tokens=576, vocabulary=16384, width=96)
    exact64 = [t.double() for t in (hidden, weight, bias)]
    exact = sequence_logp_eager(F.linear(*exact64), targets)
    assert (linear_sequence_logp(hidden, weight, targets, bias) - exact).abs().max() < limit
    logits = F.linear(hidden, weight, bias)
    assert (sequence_logp(logits, targets) - sequence_logp_eager(logits.double(), targets)).abs().max() < 1e-3
    if dtype == torch.bfloat16:  # what rounding the logits costs, the reason for accumulate="fp32"
        assert (sequence_logp_eager(logits, targets) - exact).abs().max() > limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 5}, {"chunk_rows": 100}, {"accumulate": "native"}])
def test_linear(device, dtype, with_bias, options):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CPU only")
    hidden, weight, bias, targets = sample(device, dtype, vocabulary=1001)
    inputs = leaves(hidden, weight, bias if with_bias else None)
    exact64 = leaves(*(None if t is None else t.double() for t in inputs))
    logp = linear_sequence_logp(inputs[0], inputs[1], targets, inputs[2], **options)
    expected = linear_sequence_logp_eager(exact64[0], exact64[1], targets, exact64[2])
    limit = 0.05 if options.get("accumulate") else 1e-5
    torch.testing.assert_close(logp.double(), expected, atol=limit, rtol=1e-6)
    scale = torch.tensor([0.3, -2.0], device=device)
    (logp * scale).sum().backward()
    (expected * scale).sum().backward()
    for found, exact in zip(inputs, exact64, strict=True):
        if found is not None:
            assert found.grad.dtype == dtype
            tolerance = GRADIENT[dtype] * (1.5 if options.get("accumulate") else 1)
            assert relative(found.grad, exact.grad) < tolerance
    with torch.no_grad():
        torch.testing.assert_close(linear_sequence_logp(inputs[0], inputs[1], targets, inputs[2], **options), logp)


def two_heads(hidden, other, weight, bias, share, targets):
    """A mixed log-likelihood in float64 from its definition: two heads, the second one without gradient."""
    t = share.double().view(-1, 1, 1)
    constant = [None if x is None else x.detach() for x in (weight, bias)]
    logits = t * F.linear(hidden, weight, bias) + (1 - t) * F.linear(other.double(), *constant)
    return sequence_logp_eager(logits, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 5}, {"chunk_rows": 100}, {"accumulate": "native"}])
def test_mixed(device, dtype, with_bias, options):
    """One head on mixed hidden states is the mix of two heads, and its gradients take the first operand alone."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CPU only")
    hidden, weight, bias, targets = sample(device, dtype, sequences=3, vocabulary=1001)
    other = sample(device, dtype, sequences=3, seed=1)[0]
    share = torch.tensor([0.0, 0.37, 0.9], device=device)
    inputs = leaves(hidden, weight, bias if with_bias else None)
    exact64 = leaves(*(None if t is None else t.double() for t in inputs))
    other.requires_grad_()
    logp = linear_sequence_logp(inputs[0], inputs[1], targets, inputs[2], (other, share), **options)
    expected = two_heads(exact64[0], other.detach(), exact64[1], exact64[2], share, targets)
    # the mix is rounded to the inputs' dtype once
    rounding = {torch.bfloat16: 0.15, torch.float16: 0.02}.get(dtype, 1e-5)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logp.double(), expected, atol=rounding, rtol=1e-6)
    scale = torch.tensor([0.3, -2.0, 1.5], device=device)
    (logp * scale).sum().backward()
    (expected * scale).sum().backward()
    assert other.grad is None and not inputs[0].grad[0].any()
    for found, exact in zip(inputs, exact64, strict=True):
        if found is not None:
            assert found.grad.dtype == dtype
            limit = GRADIENT[dtype] * (1.5 if dtype in (torch.bfloat16, torch.float16) else 1)
            assert relative(found.grad, exact.grad) < limit
    with torch.no_grad():
        again = linear_sequence_logp(inputs[0], inputs[1], targets, inputs[2], (other, share), **options)
        torch.testing.assert_close(again, logp)


def test_mixed_eager_gives_the_same_numbers(device):
    hidden, weight, bias, targets = sample(device, torch.float32)
    mixed = (sample(device, torch.float32, seed=1)[0], torch.tensor([0.2, 0.8], device=device))
    found, eager = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    a = linear_sequence_logp(found[0], found[1], targets, found[2], mixed)
    b = linear_sequence_logp_eager(eager[0], eager[1], targets, eager[2], mixed)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    a.sum().backward()
    b.sum().backward()
    for x, y in zip(found, eager, strict=True):
        assert relative(x.grad, y.grad.double()) < 1e-5
    with pytest.raises(ValueError, match=r"mixed hidden states of shape \[2, 7, 64\] with shares \[3\] do not match"):
        linear_sequence_logp(hidden, weight, targets, bias, (mixed[0], torch.ones(3)))


def test_a_mixed_log_likelihood_keeps_no_second_operand(device):
    """Where onehot - softmax is kept, the backward needs neither the other hidden states nor the mix."""
    hidden, weight, _, targets = sample(device, torch.float32)
    other, share = sample(device, torch.float32, seed=1)[0], torch.tensor([0.2, 0.8], device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        linear_sequence_logp(*leaves(hidden, weight), targets, None, (other, share))
    assert other.data_ptr() not in kept or backend() == "torch"


@pytest.mark.parametrize("accumulate", ["fp32", "native"])
def test_eager_gives_the_same_numbers(device, accumulate):
    hidden, weight, bias, targets = sample(device, torch.bfloat16)
    found, eager = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    a = linear_sequence_logp(found[0], found[1], targets, found[2], accumulate=accumulate)
    b = linear_sequence_logp_eager(eager[0], eager[1], targets, eager[2], accumulate=accumulate)
    torch.testing.assert_close(a, b, atol=2e-2 if accumulate == "native" else 1e-4, rtol=0)
    a.sum().backward()
    b.sum().backward()
    for x, y in zip(found, eager, strict=True):
        assert relative(x.grad, y.grad.double()) < 8e-3


def test_shapes_at_the_edges(device):
    hidden, weight, bias, targets = sample(device, torch.float32)
    for rows, tokens in ((0, 7), (2, 0), (1, 1), (2, 1)):
        h, w, b = leaves(hidden[:rows, :tokens], weight, bias)
        logp = linear_sequence_logp(h, w, targets[:rows, :tokens], b)
        assert logp.shape == (rows,)
        expected = linear_sequence_logp_eager(h, w, targets[:rows, :tokens], b)
        torch.testing.assert_close(logp, expected)
        logits = F.linear(h, w, b)
        torch.testing.assert_close(sequence_logp(logits, targets[:rows, :tokens]), expected)
        logp.sum().backward()
        assert h.grad.shape == h.shape and w.grad.shape == w.shape and b.grad.isfinite().all()


def test_not_finite_logits_are_propagated(device):
    inf, nan = float("inf"), float("nan")
    for bad in (inf, nan, -inf):
        logits = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(0)).to(device)
        targets = torch.zeros(3, 4, dtype=torch.long, device=device)
        logits[1, 2, 50] = bad  # not a target
        logits[2, 1, 0] = bad  # a target
        found, eager = leaves(logits, logits)
        a, b = sequence_logp(found, targets), sequence_logp_eager(eager, targets)
        torch.testing.assert_close(a, b, equal_nan=True)
        assert a[0].isfinite() and a[1].isfinite() == (bad == -inf)
        a.sum().backward()
        b.sum().backward()
        torch.testing.assert_close(found.grad, eager.grad, equal_nan=True, atol=1e-6, rtol=1e-5)
        identity = torch.eye(100, device=device)
        if bad == nan or bad != bad:
            assert linear_sequence_logp(logits, identity, targets)[1].isnan()
    everywhere = torch.full((1, 1, 64), -inf, device=device)
    assert sequence_logp(everywhere, torch.zeros(1, 1, dtype=torch.long, device=device)).isnan().all()


def test_large_logits(device):
    logits = (torch.randn(2, 64, 3000, generator=torch.Generator().manual_seed(3)) + 1e4).to(device)
    targets = torch.arange(128, device=device).view(2, 64)
    found, exact64 = leaves(logits, logits.double())
    a, b = sequence_logp(found, targets), sequence_logp_eager(exact64, targets)
    assert (a - b).abs().max() < 1e-4
    a.sum().backward()
    b.sum().backward()
    assert relative(found.grad, exact64.grad) < 1e-6
    wide_apart = torch.tensor([[[1e4, -1e4, 0.0]]], device=device)
    torch.testing.assert_close(
        sequence_logp(wide_apart, torch.tensor([[1]], device=device)), torch.tensor([-2e4], device=device)
    )


def test_non_contiguous_input(device):
    hidden, weight, bias, targets = sample(device, torch.float32)
    logits = F.linear(hidden, weight, bias)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2]
    expected = sequence_logp(logits[:, ::2].contiguous(), targets[:, ::2].contiguous())
    found = turned.detach().requires_grad_()
    logp = sequence_logp(found, targets[:, ::2].int())
    assert not turned.is_contiguous() and torch.equal(logp, expected)
    logp.sum().backward()
    assert found.grad.shape == turned.shape
    slow = weight.t().contiguous().t()
    turned_hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        linear_sequence_logp(turned_hidden, slow, targets, bias), linear_sequence_logp(hidden, weight, targets, bias)
    )


def test_same_bits_every_time(device):
    hidden, weight, bias, targets = sample(device, torch.bfloat16, tokens=33, vocabulary=5000)
    runs = []
    for _ in range(2):
        inputs = leaves(hidden, weight, bias)
        logp = linear_sequence_logp(inputs[0], inputs[1], targets, inputs[2])
        logp.sum().backward()
        runs.append([logp, *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bad_input_is_one_clear_line(device, monkeypatch):
    hidden, weight, _, targets = sample(device, torch.float32)
    bad = targets.clone()
    bad[1, 3] = 1000
    if device == "cuda":
        assert sequence_logp(F.linear(hidden, weight), bad).isnan().tolist() == [False, True]
        monkeypatch.setenv("CCA_DS_DEBUG", "1")
    error = ValueError if backend() != "torch" else (RuntimeError, IndexError)
    for call in (
        lambda: sequence_logp(F.linear(hidden, weight), bad),
        lambda: linear_sequence_logp(hidden, weight, bad),
    ):
        with pytest.raises(error, match=r"outside the vocabulary of 1000|out of bounds"):
            call()
    with pytest.raises(ValueError, match="accumulate='fp8' is not known; choose one of fp32, native"):
        linear_sequence_logp(hidden, weight, targets, accumulate="fp8")
    with pytest.raises(ValueError, match="chunk_rows=0 is too few"):
        linear_sequence_logp(hidden, weight, targets, chunk_rows=0)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        linear_sequence_logp(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="give integers from 0 to 999"):
        linear_sequence_logp(hidden, weight, targets.float())
    with pytest.raises(ValueError, match="do not match"):
        linear_sequence_logp(hidden, weight, targets[:, :3])


@kernels
def test_opcheck(device):
    hidden, weight, bias, targets = leaves_and_targets = sample(device, torch.float32, vocabulary=33, width=8)
    hidden, weight, bias = leaves(*leaves_and_targets[:3])
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    torch.library.opcheck(torch.ops.cca_ds.sequence_logp.default, (logits, targets))
    stats = torch.ops.cca_ds.sequence_logp(logits, targets)[1].detach()
    grad = torch.ones(2, device=device)
    back = (grad, logits.detach(), targets, stats)
    torch.library.opcheck(torch.ops.cca_ds.sequence_logp_backward.default, back)
    for b, rows, keep in ((bias, 0, True), (None, 0, True), (bias, 4, False)):
        args = (hidden, weight, targets, b, True, rows, keep)
        torch.library.opcheck(torch.ops.cca_ds.linear_sequence_logp.default, args)
        residual = torch.ops.cca_ds.linear_sequence_logp(*args)[1].detach()
        detached = [None if t is None else t.detach() for t in (hidden, weight, targets, b)]
        needed = [True, True, b is not None]
        torch.library.opcheck(
            torch.ops.cca_ds.linear_sequence_logp_backward.default, (grad, *detached, residual, True, rows, needed)
        )
        mixed = (args[0].detach() * 2, torch.tensor([0.2, 0.8], device=device))
        torch.library.opcheck(torch.ops.cca_ds.linear_sequence_logp.default, (*args, *mixed))
        residual = torch.ops.cca_ds.linear_sequence_logp(*args, *mixed)[1].detach()
        back = (grad, *detached, residual, True, rows, needed, *mixed)
        torch.library.opcheck(torch.ops.cca_ds.linear_sequence_logp_backward.default, back)
    out = torch.empty(14, 33, device=device)
    rows = (logits.detach().view(14, 33), bias.detach(), targets.view(-1), out)
    utilities = ("test_schema",)  # the declared mutation; it is called from C++ only, and has no fake kernel
    torch.library.opcheck(torch.ops.cca_ds.row_residual.default, rows, test_utils=utilities)


def test_only_the_gradients_that_are_asked_for(device):
    hidden, weight, bias, targets = sample(device, torch.float32)
    frozen, (trained,) = weight, leaves(hidden)
    linear_sequence_logp(trained, frozen, targets, bias).sum().backward()
    full = leaves(hidden, weight, bias)
    linear_sequence_logp(full[0], full[1], targets, full[2]).sum().backward()
    torch.testing.assert_close(trained.grad, full[0].grad)
    assert frozen.grad is None


@kernels
def test_forward_only_keeps_nothing(device):
    hidden, weight, _, targets = sample(device, torch.float32)
    keeping = torch.ops.cca_ds.linear_sequence_logp(hidden, weight, targets, None, True, 0, True)[1]
    assert keeping.shape == (14, 1000)
    lean = torch.ops.cca_ds.linear_sequence_logp(hidden, weight, targets, None, True, 0, False)[1]
    assert lean.numel() == 0


@kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """This file's numbers once more, on the kernels that other processors would use."""
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    chosen = "(from_logits and (17 or 4097)) or (test_linear and options1) or not_finite or large_logits"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_without_libraries_the_plain_version_runs_with_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match=r"not built; the slower plain-torch versions are used.*pip install --no-build-isolation"
    ):
        assert library._load_libraries(tmp_path) == "torch"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = capability if capability in ("avx2", "avx512") else "default"
    for stem in ("_C", f"_cpu_{name}"):
        (tmp_path / f"{stem}.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="built for another PyTorch or Python"):
        assert library._load_libraries(tmp_path) == "torch"


def test_what_computes_is_said_for_each_device():
    assert backend("cpu") == ("torch" if backend() == "torch" else "cpp")
    assert backend("cuda") == ("cuda" if backend() == "cuda" else "torch")


def test_targets_elsewhere_are_refused():
    with pytest.raises(ValueError, match="targets are on meta, the others on cpu; move them there"):
        sequence_logp(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long, device="meta"))
