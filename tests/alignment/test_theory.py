"""What `cca_loss` (Theorem B.1 of arXiv 2410.09347) and `ddo_loss` converge to, exactly, in a world that is known.

The world: 256 sequences of 4 codes from 4, and 4 conditions of equal probability. A base sequence law q has
small integer counts; condition c shifts the first code by c. Enumerating the counts makes the mean over "all
pairs, every other condition" the exact expectation of the loss, so training sees no noise, and the optimum
has a closed form:

    r*(x, c) = log p(x|c)/p(x) - log lambda,     p_sample(x|c) ~ p(x|c) [p(x|c)/p(x)]^s,  s = 1/beta

A policy that need not sum to one reaches r* for every lambda. One that does, as every softmax model, can only
reach it where r* itself leaves p_sample summing to one: lambda = Z^beta, with Z = sum_x p(x|c)
[p(x|c)/p(x)]^s, which the shift makes the same for all c.

DDO (arXiv 2503.01103) contrasts x ~ p(x|c) with x~ ~ q(x|c), the reference, under the same condition:

    r*(x, c) = log p(x|c)/q(x|c) - log lambda,           p_sample(x|c) ~ q(x|c) [p(x|c)/q(x|c)]^(1/beta)

so that beta = lambda = 1 gives the data's own p(x|c) from any q; there Z is 1.

X sequences (256), C conditions (4), K rows of the enumeration, L codes (4), V vocabulary (4).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cca_ds.alignment.losses import cca_loss, ddo_loss, dpo_loss

CONDITIONS, LENGTH, VOCABULARY = 4, 4, 4
SEQUENCES = VOCABULARY**LENGTH

# distances the trained policies have to reach: in nats for rewards, total variation for distributions
REWARD_DISTANCE = 1e-4
VARIATION_DISTANCE = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: a second thread only waits, for minutes where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class World(NamedTuple):
    """Probabilities, and the enumeration of all pairs with all second conditions."""

    conditional_CX: Tensor  # p(x|c), float64
    marginal_X: Tensor  # p(x)
    sequence_K: Tensor  # index of x
    condition_K: Tensor  # c
    other_K: Tensor  # c', independent of (x, c): equal to c in a quarter of the rows

    @property
    def log_ratio_CX(self) -> Tensor:
        """log p(x|c)/p(x)."""
        return (self.conditional_CX / self.marginal_X).log()

    def sharpened_CX(self, s: float) -> Tensor:
        """p(x|c) [p(x|c)/p(x)]^s, normalised over x."""
        return (self.conditional_CX.log() + s * self.log_ratio_CX).softmax(dim=1)


@functools.cache
def world() -> World:
    counts_X = torch.randint(1, 10, (SEQUENCES,), generator=torch.Generator().manual_seed(0))
    shift = SEQUENCES // VOCABULARY  # sequences between one first code and the next
    counts_CX = torch.stack([counts_X.roll(condition * shift) for condition in range(CONDITIONS)])
    conditional_CX = counts_CX.double() / counts_X.sum()
    pair = torch.arange(CONDITIONS * SEQUENCES).repeat_interleave(counts_CX.flatten())
    pair_K, other_K = pair.repeat_interleave(CONDITIONS), torch.arange(CONDITIONS).repeat(len(pair))
    return World(conditional_CX, conditional_CX.mean(0), pair_K % SEQUENCES, pair_K // SEQUENCES, other_K)


class TabularSequenceModel(torch.nn.Module):
    """An autoregressive model without limits: one row of logits per condition and prefix."""

    def __init__(self, start_CX: Tensor):
        """Starts as the model of the given distributions."""
        super().__init__()
        self.logits = torch.nn.ParameterList()
        for length in range(LENGTH):
            mass_CPV = start_CX.reshape(CONDITIONS, VOCABULARY**length, VOCABULARY, -1).sum(-1)
            self.logits.append(torch.nn.Parameter(mass_CPV.log()))

    def forward(self) -> Tensor:
        """log p(x|c), [C, X], of all conditions and sequences."""
        logp_CP = torch.zeros(CONDITIONS, 1, dtype=torch.float64)
        for logits_CPV in self.logits:
            logp_CP = (logp_CP[:, :, None] + logits_CPV.log_softmax(dim=2)).flatten(1)
        return logp_CP


def train(
    logp_CX: Callable[[], Tensor],
    parameters: list[Tensor],
    loss: Callable[..., Tensor],
    mask_K: Tensor | None = None,
    reference_CX: Tensor | None = None,
    drawn_K: Tensor | None = None,
    **settings: float | Tensor,
) -> Tensor:
    """Trains to convergence by full-batch L-BFGS; the final log p, [C, X].

    Args:
        logp_CX: log p of the policy.
        reference_CX: log p of the reference; by default of p(x|c).
        drawn_K: second sequences, under the rows' own conditions; by default the rows' own, under the others.
    """
    known = world()
    reference_CX = known.conditional_CX.log() if reference_CX is None else reference_CX
    mask_K = torch.zeros_like(known.other_K, dtype=torch.bool) if mask_K is None else mask_K
    positive, negative = (known.condition_K, known.sequence_K), (known.other_K, known.sequence_K)
    if drawn_K is not None:
        negative = (known.condition_K, drawn_K)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, max_eval=800, tolerance_grad=2e-10, tolerance_change=1e-15, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy_CX = logp_CX()
        value = loss(
            policy_CX[positive], policy_CX[negative], reference_CX[positive], reference_CX[negative], mask_K,
            **settings,
        )  # fmt: skip
        value.backward()
        return value

    optimizer.step(closure)
    return logp_CX().detach()


def variation(a_CX: Tensor, b_CX: Tensor) -> float:
    """Largest total variation distance over the conditions."""
    return float((a_CX - b_CX).detach().abs().sum(dim=1).max() / 2)


@pytest.mark.parametrize(("beta", "lambda_"), [(0.5, 1.0), (0.5, 10.0), (1.0, 0.1), (2.0, 100.0)])
def test_unnormalised_policy_reaches_the_optimal_reward_for_every_lambda(beta, lambda_):
    known = world()
    table_CX = known.conditional_CX.log().requires_grad_()
    logp_CX = train(lambda: table_CX, [table_CX], cca_loss, beta=beta, lambda_=lambda_)
    reward_CX = beta * (logp_CX - known.conditional_CX.log())
    optimum_CX = known.log_ratio_CX - torch.tensor(lambda_).log()
    assert (reward_CX - optimum_CX).abs().max() < REWARD_DISTANCE
    assert variation(logp_CX.softmax(dim=1), known.sharpened_CX(1 / beta)) < VARIATION_DISTANCE


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_autoregressive_policy_reaches_the_guided_distribution(beta):
    """From p_policy = p_reference = p(x|c) to p(x|c) [p(x|c)/p(x)]^(1/beta), and to r* with it."""
    known = world()
    target_CX = known.sharpened_CX(1 / beta)
    normaliser_C = (known.conditional_CX.log() + known.log_ratio_CX / beta).logsumexp(dim=1).exp()
    torch.testing.assert_close(normaliser_C, normaliser_C[:1].expand(CONDITIONS))
    lambda_ = float(normaliser_C[0]) ** beta
    policy = TabularSequenceModel(known.conditional_CX)
    assert variation(policy().exp(), known.conditional_CX) < 1e-12
    assert variation(known.conditional_CX, target_CX) > 0.05  # there is a way to go

    logp_CX = train(policy, list(policy.parameters()), cca_loss, beta=beta, lambda_=lambda_)
    reward_CX = beta * (logp_CX - known.conditional_CX.log())
    optimum_CX = known.log_ratio_CX - torch.tensor(lambda_).log()
    assert (reward_CX - optimum_CX).abs().max() < REWARD_DISTANCE
    assert variation(logp_CX.exp(), target_CX) < VARIATION_DISTANCE


def test_guided_sampling_and_the_aligned_policy_have_one_distribution():
    """Drawn from the aligned policy code by code, sequences pass for draws of the guided law."""
    known = world()
    lambda_ = float((known.conditional_CX.log() + 2 * known.log_ratio_CX).logsumexp(dim=1)[0].exp()) ** 0.5
    policy = TabularSequenceModel(known.conditional_CX)
    train(policy, list(policy.parameters()), cca_loss, beta=0.5, lambda_=lambda_)
    draws, generator = 40_000, torch.Generator().manual_seed(0)
    sequence_N = torch.zeros(draws, dtype=torch.long)
    for logits_CPV in policy.logits:
        probabilities_NV = logits_CPV.detach()[0, sequence_N].softmax(dim=1)
        code_N = torch.multinomial(probabilities_NV, 1, generator=generator)[:, 0]
        sequence_N = sequence_N * VOCABULARY + code_N
    expected_X = draws * known.sharpened_CX(2.0)[0]
    chi_squared = ((torch.bincount(sequence_N, minlength=SEQUENCES) - expected_X) ** 2 / expected_X).sum()
    assert chi_squared < 255 + 4 * (2 * 255) ** 0.5  # 255 degrees of freedom, four deviations
    base_X = draws * known.conditional_CX[0]
    assert ((torch.bincount(sequence_N, minlength=SEQUENCES) - base_X) ** 2 / base_X).sum() > 10_000


def test_coinciding_conditions_taken_as_positives_have_their_own_closed_form():
    """The program's rule for c' = c. Positives then weigh 1 + p(c), negatives lack theirs; p(c) = 1/C:

    r*(x, c) = log [(1 + p(c)) p(x|c)] / [lambda (p(x) - p(c) p(x|c))],

    which tends to Theorem B.1 with many classes.
    """
    known, lambda_, share = world(), 10.0, 1 / CONDITIONS
    table_CX = known.conditional_CX.log().requires_grad_()
    mask_K = known.condition_K == known.other_K
    logp_CX = train(lambda: table_CX, [table_CX], cca_loss, mask_K, beta=0.5, lambda_=lambda_)
    reward_CX = 0.5 * (logp_CX - known.conditional_CX.log())
    negatives_CX = known.marginal_X - share * known.conditional_CX
    optimum_CX = ((1 + share) * known.conditional_CX / (lambda_ * negatives_CX)).log()
    assert (reward_CX - optimum_CX).abs().max() < REWARD_DISTANCE


def test_dpo_fixes_differences_between_conditions_only():
    """DPO reaches CCA's optimum up to a number per sequence, which nothing holds: its likelihoods drift."""
    known = world()
    policy = TabularSequenceModel(known.conditional_CX)
    logp_CX = train(policy, list(policy.parameters()), dpo_loss, beta=0.5)
    difference_CX = 0.5 * (logp_CX - known.conditional_CX.log()) - known.log_ratio_CX
    assert difference_CX.std(dim=0).max() < REWARD_DISTANCE
    assert difference_CX.std(dim=1).min() > 0.01
    assert variation(logp_CX.exp(), known.sharpened_CX(2.0)) > 0.01


@functools.cache
def wrong_reference() -> tuple[Tensor, Tensor]:
    """q(x|c) [C, X], whose counts are those of p(x|c) for other sequences; and for each row an x~ of it [K].

    A condition has as many rows as counts, of p and of q, so pairing them in order makes the mean over rows the exact
    expectation: real and generated sequences are in different terms of the loss.
    """
    known = world()
    moved_X = torch.randperm(SEQUENCES, generator=torch.Generator().manual_seed(1))
    counts_CX = torch.bincount(known.condition_K * SEQUENCES + known.sequence_K, minlength=CONDITIONS * SEQUENCES)
    counts_CX = counts_CX.view(CONDITIONS, SEQUENCES)[:, moved_X]
    drawn_K = torch.arange(CONDITIONS * SEQUENCES).repeat_interleave(counts_CX.flatten()) % SEQUENCES
    return counts_CX.double() / counts_CX.sum(dim=1, keepdim=True), drawn_K


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ddo_leads_a_wrong_reference_to_the_data_and_beyond(beta):
    """At beta = lambda = 1 from 0.31 (total variation) to 2e-7 of the data; at a smaller beta past it."""
    known, (q_CX, drawn_K) = world(), wrong_reference()
    log_ratio_CX = known.conditional_CX.log() - q_CX.log()
    normaliser_C = (q_CX.log() + log_ratio_CX / beta).logsumexp(dim=1).exp()
    target_CX = (q_CX.log() + log_ratio_CX / beta).softmax(dim=1)
    lambda_C = normaliser_C**beta
    assert variation(q_CX, known.conditional_CX) > 0.3
    if beta == 1.0:
        assert variation(target_CX, known.conditional_CX) < 1e-12 and (lambda_C - 1).abs().max() < 1e-12
    policy = TabularSequenceModel(q_CX)
    logp_CX = train(
        policy, list(policy.parameters()), ddo_loss, reference_CX=q_CX.log(), drawn_K=drawn_K, beta=beta,
        lambda_=lambda_C[known.condition_K],
    )  # fmt: skip
    assert (beta * (logp_CX - q_CX.log()) - (log_ratio_CX - lambda_C.log()[:, None])).abs().max() < REWARD_DISTANCE
    assert variation(logp_CX.exp(), target_CX) < VARIATION_DISTANCE


@pytest.mark.parametrize(("beta", "lambda_"), [(1.0, 1.0), (0.5, 10.0), (2.0, 0.1)])
def test_an_unnormalised_policy_reaches_ddos_optimal_reward_for_every_lambda(beta, lambda_):
    known, (q_CX, drawn_K) = world(), wrong_reference()
    table_CX = q_CX.log().requires_grad_()
    logp_CX = train(
        lambda: table_CX, [table_CX], ddo_loss, reference_CX=q_CX.log(), drawn_K=drawn_K, beta=beta, lambda_=lambda_
    )
    optimum_CX = known.conditional_CX.log() - q_CX.log() - torch.tensor(lambda_).log()
    assert (beta * (logp_CX - q_CX.log()) - optimum_CX).abs().max() < REWARD_DISTANCE
