"""Test the two losses of simpo.py.

The first tests compare with numbers worked by hand. The others check properties that hold for any
numbers. tests/test_baselines.py does the same for methods/baselines.py.
"""

import math
from functools import partial

import pytest
import torch

from simpo import dpo_loss, simpo_loss

LN2 = math.log(2)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The pair of most examples. Chosen: −3 nats over 3 tokens, an average of −1 per token. Rejected:
# −8 nats over 4 tokens, an average of −2.
CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH = t(-3.0), t(-8.0), t(3.0), t(4.0)
PAIR = (CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH)
SWAPPED_PAIR = (REJECTED, CHOSEN, REJECTED_LENGTH, CHOSEN_LENGTH)


@pytest.mark.parametrize(
    "beta, gamma, normalized, rewards, loss",
    [
        # a reward difference of 2 against a margin of 0
        (2.0, 0.0, True, (-2.0, -4.0), math.log(1 + math.exp(-2))),
        # 2 against 2: a coin toss
        (2.0, 2.0, True, (-2.0, -4.0), LN2),
        # 2 against 5: a logit of −3
        (2.0, 5.0, True, (-2.0, -4.0), math.log(1 + math.exp(3))),
        # without length normalization, rewards are sums
        (0.1, 0.0, False, (-0.3, -0.8), math.log(1 + math.exp(-0.5))),
        # the margin applies without length normalization too
        (0.1, 0.2, False, (-0.3, -0.8), math.log(1 + math.exp(-0.3))),
    ],
)
def test_simpo_by_hand(beta, gamma, normalized, rewards, loss):
    """SimPO returns the rewards and the loss worked by hand, with and without normalization."""
    losses, chosen, rejected = simpo_loss(*PAIR, beta, gamma, length_normalized=normalized)
    assert (chosen.item(), rejected.item()) == pytest.approx(rewards)
    assert losses.item() == pytest.approx(loss)


@pytest.mark.parametrize(
    "gamma, loss", [(0.0, 0.6931471806), (1.0, 1.3132616875), (3.0, 3.0485873516)]
)
def test_equal_rewards_cost_ln2_shifted_by_the_margin(gamma, loss):
    """The loss of equal averages, here −6 nats over 3 tokens and −4 over 2, is ln(1 + e^γ)."""
    losses, _, _ = simpo_loss(t(-6.0), t(-4.0), t(3.0), t(2.0), beta=2.5, gamma=gamma)
    assert losses.item() == pytest.approx(loss)


def test_dpo_by_hand():
    """DPO returns the rewards and the loss worked by hand."""
    # The chosen is 2 nats above the reference, the rejected 1 below. At β = 0.1 the logit is 0.3.
    losses, chosen, rejected = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=0.1)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.2, -0.1))
    assert losses.item() == pytest.approx(0.5543552445)


def test_dpo_where_policy_is_the_reference():
    """If policy and reference agree, every DPO loss is ln 2 and every reward 0."""
    logps = t(-5.0, -700.0, -0.1)
    losses, chosen, _ = dpo_loss(logps, logps - 3, logps, logps - 3, beta=0.1)
    assert losses.tolist() == pytest.approx([LN2] * 3)
    assert chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "epsilon, loss", [(0.0, math.log(4 / 3)), (0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4))]
)
def test_label_smoothing(epsilon, loss):
    """Label smoothing mixes the loss of a right label with the loss of a wrong one."""
    ln3 = math.log(3)  # where σ is ¾: a right label costs ln 4/3, a wrong one ln 4
    losses, _, _ = dpo_loss(t(ln3), t(0.0), t(0.0), t(0.0), beta=1.0, label_smoothing=epsilon)
    assert losses.item() == pytest.approx(loss)
    losses, _, _ = simpo_loss(
        t(2 * ln3), t(0.0), t(2.0), t(5.0), beta=1.0, gamma=0.0, label_smoothing=epsilon
    )
    assert losses.item() == pytest.approx(loss)


def test_swapped_pair():
    """Swapping a pair adds its reward difference m to the loss: −log σ(−m) = −log σ(m) + m."""
    right, _, _ = simpo_loss(*PAIR, 2.0, 0.0)
    wrong, _, _ = simpo_loss(*SWAPPED_PAIR, 2.0, 0.0)
    assert (wrong - right).item() == pytest.approx(2.0)
    right, _, _ = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), 0.1)
    wrong, _, _ = dpo_loss(t(-9.0), t(-10.0), t(-8.0), t(-12.0), 0.1)
    assert (wrong - right).item() == pytest.approx(0.3)


@pytest.mark.parametrize("normalized, slopes", [(True, (-1 / 3, 1 / 4)), (False, (-1.0, 1.0))])
def test_gradient_carries_one_over_length(normalized, slopes):
    """SimPO's gradient with respect to log π is ∓ β σ(−logit) / |y|, or ∓ β σ(−logit) for sums."""
    # At a logit of 0, σ is ½. With β = 2 that makes −1/3 for 3 tokens and +1/4 for 4 tokens.
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    gamma = 2.0 if normalized else 10.0
    losses, _, _ = simpo_loss(
        chosen, rejected, CHOSEN_LENGTH, REJECTED_LENGTH, 2.0, gamma, length_normalized=normalized
    )
    losses.sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx(slopes)


def test_dpo_gradient():
    """DPO's gradient with respect to log π is ∓ β σ(−logit): ∓ β/2 at step 0, for any lengths."""
    chosen, rejected = t(-7.0).requires_grad_(), t(-9.0).requires_grad_()
    dpo_loss(chosen, rejected, t(-7.0), t(-9.0), beta=0.3)[0].sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.15, 0.15))


def test_limits():
    """The loss tends to ln 2 as β → 0, and to γ − m, for a reward difference m, as γ → ∞."""
    losses, _, _ = simpo_loss(*PAIR, beta=1e-12, gamma=0.0)
    assert losses.item() == pytest.approx(LN2)
    losses, _, _ = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=1e-12)
    assert losses.item() == pytest.approx(LN2)
    chosen = CHOSEN.clone().requires_grad_()
    losses, _, _ = simpo_loss(
        chosen, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, beta=2.0, gamma=100.0
    )
    losses.sum().backward()
    assert losses.item() == pytest.approx(98.0)  # 100 − 2, with a slope of −β / |y|
    assert chosen.grad.item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_extreme_logits_in_float32(logit, epsilon):
    """Loss and gradient stay finite and right at logits of ±10,000."""
    # Without logsigmoid the loss would be log(0) = −inf, and its gradient 0 · inf = nan.
    zero, one = torch.zeros(1), torch.ones(1)

    def simpo(logit: torch.Tensor) -> torch.Tensor:
        return simpo_loss(logit, zero, one, one, 1.0, 0.0, label_smoothing=epsilon)[0]

    def dpo(logit: torch.Tensor) -> torch.Tensor:
        return dpo_loss(logit, zero, zero, zero, 1.0, label_smoothing=epsilon)[0]

    expected = (1 - epsilon) * max(-logit, 0) + epsilon * max(logit, 0)
    for loss_of in (simpo, dpo):
        x = torch.tensor([logit], requires_grad=True)
        losses = loss_of(x)
        losses.sum().backward()
        assert losses.item() == pytest.approx(expected)
        assert x.grad.item() == pytest.approx(epsilon if logit > 0 else epsilon - 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_gradcheck(epsilon):
    """The gradients of both losses agree with finite differences."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.rand, 5, generator=generator, dtype=torch.float64)
    logps = [(-10 * draw()).requires_grad_() for _ in range(4)]
    lengths = [torch.randint(1, 9, (5,), generator=generator) for _ in range(2)]
    for normalized in (True, False):
        assert torch.autograd.gradcheck(
            lambda c, r: simpo_loss(c, r, *lengths, 2.0, 1.0, epsilon, normalized)[0], logps[:2]
        )
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, 0.5, epsilon)[0], logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back(dtype):
    """Both losses return [pairs] in the dtype given, and only the losses carry a gradient."""
    logps = torch.tensor([-3.0, -5.0, -1.0], dtype=dtype, requires_grad=True)
    lengths = torch.tensor([3, 4, 1])
    for losses, chosen, rejected in (
        simpo_loss(logps, logps - 1, lengths, lengths, 2.0, 1.0),
        dpo_loss(logps, logps, logps, logps - 1, 0.1),
    ):
        assert all(x.shape == (3,) and x.dtype == dtype for x in (losses, chosen, rejected))
        assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    # No pair's loss depends on another pair.
    jacobian = torch.autograd.functional.jacobian(
        lambda x: simpo_loss(x, x.detach() - 1, lengths, lengths, 2.0, 1.0)[0], logps
    )
    assert torch.equal(jacobian, jacobian.diag().diag())


def test_broadcasting_is_refused():
    """Shapes must be equal, since [pairs] against [pairs, 1] would pair each with every other."""
    with pytest.raises(AssertionError, match=r"\(3,\).*\(3, 1\)"):
        simpo_loss(torch.zeros(3), torch.zeros(3, 1), torch.ones(3), torch.ones(3), 2.0, 1.0)
    with pytest.raises(AssertionError):
        dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.zeros(3), 0.1)
