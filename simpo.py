"""SimPO and DPO, side by side: the mathematics, and nothing else.

Both methods model how probable it is that a human prefers the chosen response to the rejected one
(Bradley and Terry: the sigmoid of a difference of rewards) and minimise the negative log of that
probability. They differ in what they call a reward:

    DPO    r = β · log( π(y|x) / π_ref(y|x) )     how much likelier than under the reference model
    SimPO  r = β · log π(y|x) / |y|               how likely per token, without a reference model,
                                                  and the chosen must win by a margin γ

DPO's reward is the one for which the policy is optimal if leaving π_ref costs a KL penalty; π_ref
must be kept. SimPO defines its reward directly: apart from the factor β it is the average
log-probability, the measure by which beam search, for one, ranks what a model may say.

    paper  here              unit                 shape
    -----  ----              ----                 -----
    log π  chosen_logps,     nats, a sum          [pairs]  log-probability of the whole response:
           rejected_logps                                  a sum over its tokens, not an average
    |y|    chosen_lengths,   tokens               [pairs]  number of tokens in that sum
           rejected_lengths
    r      chosen_rewards,   –                    [pairs]
           rejected_rewards
    L      losses            nats                 [pairs]  one per pair; the caller averages
    β      beta              1/nats (DPO),        scalar   how fast reward grows with log π
                             tokens/nats (SimPO)
    γ      gamma             –                    scalar   target reward margin, in units of reward;
                                                           `--gamma-beta-ratio` is the paper's γ/β
    σ      logsigmoid        –                    –

Sources: SimPO, Meng, Xia and Chen 2024, arXiv 2405.14734. DPO, Rafailov et al. 2023, arXiv
2305.18290. Equation numbers below are the SimPO paper's.
"""

import torch.nn.functional as F
from torch import Tensor


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute SimPO (Eq. 6). Tensors are [pairs]; log-probabilities are sums, in nats.

    `gamma` is the absolute margin. `length_normalized=False` and `gamma=0` are the paper's two
    ablations (Table 5). Returns (losses, chosen_rewards, rejected_rewards), the rewards detached.
    """
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    if not length_normalized:
        chosen_lengths = rejected_lengths = 1
    chosen_rewards = beta * chosen_logps / chosen_lengths  # Eq. 4
    rejected_rewards = beta * rejected_logps / rejected_lengths
    logits = chosen_rewards - rejected_rewards - gamma  # Eq. 5, the argument of σ
    losses = _preference_nll(logits, label_smoothing)  # Eq. 6
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute DPO (Eq. 2). Tensors are [pairs]; log-probabilities are sums, in nats.

    Where policy and reference agree, as at the first step, every loss is ln 2. Returns (losses,
    chosen_rewards, rejected_rewards), the rewards detached.
    """
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # Eq. 1 without its β log Z(x)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # … equal for both
    logits = chosen_rewards - rejected_rewards  # the argument of σ in Eq. 2
    losses = _preference_nll(logits, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def _preference_nll(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return the expected −log σ, in nats, if each label is wrong with this probability.

    `logsigmoid` never forms σ itself, so value and gradient stay finite for all finite logits.
    """
    log_right, log_wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    return -(1 - label_smoothing) * log_right - label_smoothing * log_wrong


def assert_same_shape(*tensors: Tensor) -> None:
    """Check shapes: [pairs] against [pairs, 1] would compare every pair with every other."""
    shapes = [tuple(t.shape) for t in tensors]
    assert len(set(shapes)) == 1, f"one number per pair in each tensor, not {shapes}"


if __name__ == "__main__":
    print(__doc__)
