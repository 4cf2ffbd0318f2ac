"""The losses against numbers worked by hand, and against what must hold for any numbers."""

import math

import pytest
import torch

from simpo import dpo_loss, simpo_loss

LN2 = math.log(2)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A pair to work by hand. Chosen: −3 nats over 3 tokens, an average of −1. Rejected: −8 over 4, an average of −2.
CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH = t(-3.0), t(-8.0), t(3.0), t(4.0)


@pytest.mark.parametrize(
    "beta, gamma, normalized, rewards, loss",
    [
        (2.0, 0.0, True, (-2.0, -4.0), math.log(1 + math.exp(-2))),  # margin 2 against 0
        (2.0, 2.0, True, (-2.0, -4.0), LN2),  # margin 2 against 2: a coin toss
        (2.0, 5.0, True, (-2.0, -4.0), math.log(1 + math.exp(3))),  # 2 − 5 = −3
        (0.1, 0.0, False, (-0.3, -0.8), math.log(1 + math.exp(-0.5))),  # sums, not averages
        (0.1, 0.2, False, (-0.3, -0.8), math.log(1 + math.exp(-0.3))),  # the margin stays when the normalisation goes
    ],
)
def test_simpo_by_hand(beta, gamma, normalized, rewards, loss):
    losses, chosen, rejected = simpo_loss(
        CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, beta, gamma, length_normalized=normalized
    )
    assert (chosen.item(), rejected.item()) == pytest.approx(rewards)
    assert losses.item() == pytest.approx(loss)


@pytest.mark.parametrize("gamma, loss", [(0.0, 0.6931471806), (1.0, 1.3132616875), (3.0, 3.0485873516)])
def test_equal_rewards_cost_ln2_shifted_by_the_margin(gamma, loss):
    """ln(1 + e^γ): −6 over 3 tokens and −4 over 2 are the same average."""
    losses, _, _ = simpo_loss(t(-6.0), t(-4.0), t(3.0), t(2.0), beta=2.5, gamma=gamma)
    assert losses.item() == pytest.approx(loss)


def test_dpo_by_hand():
    """Chosen 2 nats above the reference, rejected 1 below: rewards 0.2 and −0.1 at β 0.1, a logit of 0.3."""
    losses, chosen, rejected = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=0.1)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.2, -0.1))
    assert losses.item() == pytest.approx(0.5543552445)


def test_dpo_where_policy_is_the_reference():
    logps = t(-5.0, -700.0, -0.1)
    losses, chosen, _ = dpo_loss(logps, logps - 3, logps, logps - 3, beta=0.1)
    assert losses.tolist() == pytest.approx([LN2] * 3)
    assert chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("epsilon, loss", [(0.0, math.log(4 / 3)), (0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4))])
def test_label_smoothing(epsilon, loss):
    """At a logit of ln 3, σ is ¾: the label is right with loss ln 4/3, wrong with ln 4."""
    losses, _, _ = dpo_loss(t(math.log(3)), t(0.0), t(0.0), t(0.0), beta=1.0, label_smoothing=epsilon)
    assert losses.item() == pytest.approx(loss)
    losses, _, _ = simpo_loss(t(2 * math.log(3)), t(0.0), t(2.0), t(5.0), beta=1.0, gamma=0.0, label_smoothing=epsilon)
    assert losses.item() == pytest.approx(loss)


def test_swapped_pair():
    """−log σ(m) and −log σ(−m) differ by m: here by the margin of 2 (SimPO) and 0.3 (DPO)."""
    right, _, _ = simpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, 2.0, 0.0)
    wrong, _, _ = simpo_loss(REJECTED, CHOSEN, REJECTED_LENGTH, CHOSEN_LENGTH, 2.0, 0.0)
    assert (wrong - right).item() == pytest.approx(2.0)
    right, _, _ = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), 0.1)
    wrong, _, _ = dpo_loss(t(-9.0), t(-10.0), t(-8.0), t(-12.0), 0.1)
    assert (wrong - right).item() == pytest.approx(0.3)


@pytest.mark.parametrize("normalized, slopes", [(True, (-1 / 3, 1 / 4)), (False, (-1.0, 1.0))])
def test_gradient_carries_one_over_length(normalized, slopes):
    """At a logit of 0, σ is ½ and dL/d log π = ∓ ½ β / |y|: with β 2, −1/3 for 3 tokens and +1/4 for 4."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    gamma = 2.0 if normalized else 10.0
    losses, _, _ = simpo_loss(
        chosen, rejected, CHOSEN_LENGTH, REJECTED_LENGTH, 2.0, gamma, length_normalized=normalized
    )
    losses.sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx(slopes)


def test_dpo_gradient():
    """dL/d log π = ∓ β σ(−logit): at step 0, ∓ β/2 whatever the lengths."""
    chosen, rejected = t(-7.0).requires_grad_(), t(-9.0).requires_grad_()
    dpo_loss(chosen, rejected, t(-7.0), t(-9.0), beta=0.3)[0].sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.15, 0.15))


def test_limits():
    """β → 0 leaves a coin toss; γ → ∞ leaves a line in the margin, γ − m, whose slope no longer depends on the pair."""
    losses, _, _ = simpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, beta=1e-12, gamma=0.0)
    assert losses.item() == pytest.approx(LN2)
    losses, _, _ = dpo_loss(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=1e-12)
    assert losses.item() == pytest.approx(LN2)
    chosen = CHOSEN.clone().requires_grad_()
    losses, _, _ = simpo_loss(chosen, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH, beta=2.0, gamma=100.0)
    losses.sum().backward()
    assert losses.item() == pytest.approx(98.0)
    assert chosen.grad.item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_extreme_logits_in_float32(logit, epsilon):
    """A forgotten logsigmoid gives log(0) = −inf, and 0 · inf = nan in its gradient."""
    for loss_of in (
        lambda x: simpo_loss(x, torch.zeros(1), torch.ones(1), torch.ones(1), 1.0, 0.0, label_smoothing=epsilon),
        lambda x: dpo_loss(x, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0, label_smoothing=epsilon),
    ):
        x = torch.tensor([logit], requires_grad=True)
        losses, _, _ = loss_of(x)
        losses.sum().backward()
        assert losses.item() == pytest.approx((1 - epsilon) * max(-logit, 0) + epsilon * max(logit, 0))
        assert x.grad.item() == pytest.approx(epsilon if logit > 0 else epsilon - 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_gradcheck(epsilon):
    generator = torch.Generator().manual_seed(0)
    logps = [(-10 * torch.rand(5, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = [torch.randint(1, 9, (5,), generator=generator) for _ in range(2)]
    for normalized in (True, False):
        assert torch.autograd.gradcheck(
            lambda c, r: simpo_loss(c, r, *lengths, 2.0, 1.0, epsilon, normalized)[0], logps[:2]
        )
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, 0.5, epsilon)[0], logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back(dtype):
    """[pairs] each, in the dtype given; rewards without gradient; pairs do not touch each other."""
    logps = torch.tensor([-3.0, -5.0, -1.0], dtype=dtype, requires_grad=True)
    lengths = torch.tensor([3, 4, 1])
    for losses, chosen, rejected in (
        simpo_loss(logps, logps - 1, lengths, lengths, 2.0, 1.0),
        dpo_loss(logps, logps, logps, logps - 1, 0.1),
    ):
        assert all(x.shape == (3,) and x.dtype == dtype for x in (losses, chosen, rejected))
        assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    jacobian = torch.autograd.functional.jacobian(
        lambda x: simpo_loss(x, x.detach() - 1, lengths, lengths, 2.0, 1.0)[0], logps
    )
    assert torch.equal(jacobian, jacobian.diag().diag())


def test_broadcasting_is_refused():
    """[pairs] against [pairs, 1] would compare every pair with every other and still return a number."""
    with pytest.raises(AssertionError, match=r"\(3,\).*\(3, 1\)"):
        simpo_loss(torch.zeros(3), torch.zeros(3, 1), torch.ones(3), torch.ones(3), 2.0, 1.0)
    with pytest.raises(AssertionError):
        dpo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.zeros(3), 0.1)
