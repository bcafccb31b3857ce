"""Guidance schedules, per-image random numbers and the draw of a code, against the definitions."""

import numpy as np
import pytest
import torch

from cca_ds.models import FAMILIES
from cca_ds.sampling.guidance import (
    describe_guidance,
    draw_codes,
    family_scale,
    guidance_scales,
    guide,
    image_uniforms,
    paper_scale,
)


def test_schedules_by_hand():
    assert guidance_scales(1.5, 4) == [1.5, 1.5, 1.5, 1.5]
    assert guidance_scales(1.5, 4, "linear") == [0.0, 0.5, 1.0, 1.5]
    assert guidance_scales(2.0, 5, "constant", (1, 3)) == [0.0, 2.0, 2.0, 0.0, 0.0]
    assert guidance_scales(4.0, 5, "linear", (2, 99)) == [0.0, 0.0, 2.0, 3.0, 4.0]
    assert guidance_scales(0.0, 3, "linear") == [0.0, 0.0, 0.0]
    assert guidance_scales(3.0, 1, "linear") == [0.0]


def test_guided_logits_follow_the_papers_equation():
    cond, uncond = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    for scale in (0.3, 1.5, 7.0):
        torch.testing.assert_close(guide(cond, uncond, scale), cond + scale * (cond - uncond))
        own = family_scale(FAMILIES["llamagen"], scale)
        torch.testing.assert_close(guide(cond, uncond, scale), uncond + own * (cond - uncond))
    assert guide(cond, uncond, 0.0) is cond


def test_each_familys_own_number():
    llamagen, var = FAMILIES["llamagen"], FAMILIES["var"]
    assert (family_scale(llamagen, 0.5), family_scale(var, 0.5)) == (1.5, 0.5)
    assert (paper_scale(llamagen, 4.0), paper_scale(var, 4.0)) == (3.0, 4.0)
    assert describe_guidance(llamagen, 0.5) == "guidance s = 0.5 (LlamaGen's cfg-scale = 1.5)"
    assert describe_guidance(var, 1.5) == "guidance s = 1.5 (VAR's cfg = 1.5)"


def test_an_images_numbers_depend_on_its_seed_and_index_only():
    whole = image_uniforms(7, range(50), 64)
    assert whole.dtype == torch.float64 and whole.shape == (50, 64)
    assert torch.equal(image_uniforms(7, [31, 4], 64), whole[[31, 4]])
    assert torch.equal(image_uniforms(7, np.array([9], dtype=np.int64), 10), whole[9:10, :10])
    assert len(whole.unique()) == 50 * 64
    assert not (image_uniforms(8, range(50), 64) == whole).any()
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 3], dtype=np.uint64)))
    assert torch.equal(whole[3], torch.from_numpy(generator.random(64)))  # the documented stream


def test_numbers_are_uniform():
    numbers = image_uniforms(0, range(300), 200).flatten()
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    chi_squared = ((counts - 3000) ** 2 / 3000).sum()
    assert chi_squared < 43.8  # 19 degrees of freedom, 1 in 1,000
    assert numbers.min() >= 0 and numbers.max() < 1


def drawn_frequencies(logits, **settings):
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    codes = draw_codes(logits.expand(100_000, -1), uniforms, **settings)
    return torch.bincount(codes, minlength=logits.shape[-1]) / 100_000


def test_codes_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    for temperature in (1.0, 0.5, 3.0):
        expected = (logits.double() / temperature).softmax(-1).float()
        torch.testing.assert_close(drawn_frequencies(logits, temperature=temperature), expected, atol=2e-5, rtol=0)


def test_top_k_keeps_the_k_most_probable_and_ties():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    torch.testing.assert_close(
        drawn_frequencies(logits, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=2e-5, rtol=0
    )
    tied = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    torch.testing.assert_close(drawn_frequencies(tied, top_k=2), torch.full((4,), 0.25), atol=2e-5, rtol=0)
    torch.testing.assert_close(drawn_frequencies(logits, top_k=99), logits.exp(), atol=2e-5, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, kept in [(0.35, [1]), (0.65, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1e-6, [1])]:
        expected = torch.zeros(4)
        expected[kept] = logits.exp()[kept] / logits.exp()[kept].sum()
        torch.testing.assert_close(drawn_frequencies(logits, top_p=top_p), expected, atol=2e-5, rtol=0)
    # top-k comes first, and p counts what it left
    frequencies = drawn_frequencies(logits, top_k=2, top_p=0.5)
    torch.testing.assert_close(frequencies, torch.tensor([0.0, 1, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_code_of_no_probability_is_never_drawn(dtype):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf], dtype=dtype)
    extremes = torch.tensor([0.0, 1.0 - 2.0**-53, 5e-324], dtype=torch.float64)
    assert draw_codes(logits.expand(3, -1), extremes).tolist() == [1, 3, 1]


def test_top_1_is_argmax_whatever_the_number():
    logits = torch.randn(20, 30)
    assert torch.equal(draw_codes(logits, torch.rand(20), top_k=1), logits.argmax(-1))


def test_on_many_codes_the_tail_is_reached():
    logits = torch.zeros(1, 16384)
    uniforms = torch.tensor([(code + 0.5) / 16384 for code in (0, 1, 8191, 16382, 16383)], dtype=torch.float64)
    codes = draw_codes(logits.expand(5, -1), uniforms)
    assert codes.tolist() == [0, 1, 8191, 16382, 16383]
