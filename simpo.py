"""SimPO and DPO, side by side: the mathematics, and nothing else.

Both methods say how probable it is that a human prefers the chosen response to the rejected one (Bradley and Terry's
model: the sigmoid of a difference of rewards) and lower the negative log of that probability. They differ in what
they call a reward:

    DPO    r = β · log( π(y|x) / π_ref(y|x) )        how much likelier than under the reference model
    SimPO  r = β · log π(y|x) / |y|                  how likely per token, without a reference model,
                                                     and the chosen must win by a margin γ

SimPO's reward is, up to β, the very quantity that guides generation: the average log-probability. That is the point of
the paper: what is trained is what is sampled from.

    paper      here                       unit              shape
    -----      ----                       ----              -----
    log π      chosen_logps,              nats, a sum       [pairs]    log-probability of the whole response:
               rejected_logps                                          a sum over its tokens, never an average
    |y|        chosen_lengths,            tokens            [pairs]    tokens that the sum ran over
               rejected_lengths
    r          chosen_rewards,            –                 [pairs]
               rejected_rewards
    L          losses                     nats              [pairs]    one per pair; the caller averages
    β          beta                       1/nats (DPO),     scalar     how fast reward grows with log-probability
                                          tokens/nats (SimPO)
    γ          gamma                      –                 scalar     target reward margin, in units of reward; the
                                                                       paper tunes γ/β (`--gamma-beta-ratio`), γ = ratio · β
    σ          logsigmoid                 –                 –

Sources: SimPO, Meng, Xia and Chen 2024, arXiv 2405.14734. DPO, Rafailov et al. 2023, arXiv 2305.18290; equation
numbers below are the SimPO paper's.
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
    """SimPO (Eq. 6). All tensors are `[pairs]`; log-probabilities are sums in nats, lengths are in tokens.

    `gamma` is the absolute margin. `length_normalized=False` and `gamma=0` are the paper's two ablations (Table 5).
    Returns `(losses, chosen_rewards, rejected_rewards)`; the rewards carry no gradient.
    """
    _assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    if not length_normalized:
        chosen_lengths = rejected_lengths = 1
    chosen_rewards = beta * chosen_logps / chosen_lengths  # Eq. 4
    rejected_rewards = beta * rejected_logps / rejected_lengths
    logits = chosen_rewards - rejected_rewards - gamma  # Eq. 5, the argument of σ
    return _preference_nll(logits, label_smoothing), chosen_rewards.detach(), rejected_rewards.detach()  # Eq. 6


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (Eq. 2). All tensors are `[pairs]`, log-probabilities are sums in nats.

    Where policy and reference agree, as at the first step, every loss is ln 2.
    Returns `(losses, chosen_rewards, rejected_rewards)`; the rewards carry no gradient.
    """
    _assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # Eq. 1, without log Z(x): it cancels in the difference
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    logits = chosen_rewards - rejected_rewards  # the argument of σ in Eq. 2
    return _preference_nll(logits, label_smoothing), chosen_rewards.detach(), rejected_rewards.detach()


def _preference_nll(logits: Tensor, label_smoothing: float) -> Tensor:
    """−log σ(logits), in nats; with label smoothing ε, labels that are wrong with probability ε (conservative DPO).

    `logsigmoid` never forms σ itself, so the value and its gradient stay finite however large the logits.
    """
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _assert_same_shape(*tensors: Tensor) -> None:
    """Broadcasting [pairs] against [pairs, 1] would silently compare every pair with every other."""
    assert len({t.shape for t in tensors}) == 1, (
        f"one number per pair in each tensor, not {[tuple(t.shape) for t in tensors]}"
    )
