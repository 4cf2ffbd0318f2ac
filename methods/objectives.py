"""List every objective in one table. Adding one is a function and a line.

    def my_loss(chosen_logps, rejected_logps, beta): ...       in the shape of simpo.py: a triple
    "mine": Objective(lambda p, s: my_loss(*p.logps, s.beta), {"beta": 1.0}),           at the end

Everything else follows from the entry: the choices of `--objective`, the defaults in `--help`, the
check for hyperparameters of other objectives, the reference model, the analyses, and `torchrun
train.py --objective mine` on the toy; toy/mine.toml may hold settings that suit it better.

A loss that compares with a reference model asks for `*p.ref_logps`, and its defaults hold
"reference": "online". The absolute margin `s.gamma` needs "beta" and "gamma_beta_ratio" in the
defaults. A new hyperparameter is one more line in `runtime/settings.py`; None there means that the
default is the objective's:

    margin_tokens: float | None = option(None, "mine: tokens per margin", above=0)

The losses stand in `simpo.py`, `methods/baselines.py` and `methods/successors.py`.
`train.forward_backward` calls `pair_losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.baselines import (
    cpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    rdpo_loss,
    rrhf_loss,
    slic_loss,
)
from methods.successors import alphapo_loss, apo_zero_loss, dpo_norm_loss, repo_loss, simper_loss
from simpo import dpo_loss, simpo_loss


@dataclass(frozen=True)
class LossInputs:
    """Holds what a loss may ask for. Tensors come as (chosen, rejected) and are [pairs] each.

    logps, reference: summed log-probabilities in nats, under the policy and under the reference.
    lengths: response lengths in tokens. baseline: the objective's `step_baseline`, else 0.
    """

    logps: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor] | None = None
    baseline: float = 0.0

    @property
    def ref_logps(self) -> tuple[Tensor, Tensor]:
        """Return those under the reference. Raises TypeError if the objective asked for none."""
        if self.reference is None:
            raise TypeError('a loss reads ref_logps: add "reference": "online" to its defaults')
        return self.reference


@dataclass(frozen=True)
class Objective:
    """Joins a loss to its hyperparameters, and says what it needs besides the policy's logps.

    loss: maps (LossInputs, settings) to (losses, chosen_rewards, rejected_rewards), each [pairs];
        None for an objective that trains on one response.
    defaults: the hyperparameters of this objective and their default values. An objective that has
        `reference` among them gets `ref_logps`.
    responses: how many responses a training example has: 2, or 1 for the chosen one alone.
    sft_weight: weight of the negative log-likelihood per chosen token, added to `--sft-weight`.
    step_baseline: function from the step's mean metrics, of a forward pass without gradients, to
        `LossInputs.baseline`; None for a loss that looks at each pair alone.
    """

    loss: Callable[[LossInputs, Any], tuple[Tensor, Tensor, Tensor]] | None
    defaults: dict[str, Any] = field(default_factory=dict)
    responses: int = 2
    sft_weight: float = 0.0
    step_baseline: Callable[[dict[str, float]], float] | None = None

    @property
    def needs_reference(self) -> bool:
        """Return True if the loss uses `ref_logps`."""
        return "reference" in self.defaults


def mean_reward(metrics: dict[str, float]) -> float:
    """Return the mean reward of all responses of a step: KTO's z_ref."""
    return (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2


# fmt: off
OBJECTIVES: dict[str, Objective] = {
    "simpo": Objective(
        lambda p, s: simpo_loss(
            *p.logps, *p.lengths, s.beta, s.gamma, s.label_smoothing, s.length_norm),
        {"beta": 2.0, "gamma_beta_ratio": 0.5, "length_norm": True, "label_smoothing": 0.0}),
    "dpo": Objective(
        lambda p, s: dpo_norm_loss(
            *p.logps, *p.ref_logps, *p.lengths, s.beta, s.label_smoothing)
        if s.length_norm else dpo_loss(*p.logps, *p.ref_logps, s.beta, s.label_smoothing),
        {"beta": 0.01, "length_norm": False, "label_smoothing": 0.0, "reference": "online"}),
    "rrhf": Objective(
        lambda p, s: rrhf_loss(*p.logps, *p.lengths, s.lam), {"lam": 1.0}),
    "slic": Objective(
        lambda p, s: slic_loss(*p.logps, s.delta, s.lam), {"lam": 1.0, "delta": 1.0}),
    "ipo": Objective(
        lambda p, s: ipo_loss(*p.logps, *p.ref_logps, *p.lengths, s.beta, s.length_norm),
        {"beta": 0.1, "length_norm": False, "reference": "online"}),
    "cpo": Objective(
        lambda p, s: cpo_loss(*p.logps, s.beta, s.lam), {"beta": 0.01, "lam": 1.0}),
    "kto": Objective(
        lambda p, s: kto_loss(*p.logps, *p.ref_logps, s.beta, p.baseline),
        {"beta": 0.01, "reference": "online"}, step_baseline=mean_reward),
    "orpo": Objective(
        lambda p, s: orpo_loss(*p.logps, *p.lengths, s.lam), {"lam": 0.1}),
    "rdpo": Objective(
        lambda p, s: rdpo_loss(*p.logps, *p.ref_logps, *p.lengths, s.beta, s.alpha),
        {"beta": 0.01, "alpha": 0.05, "reference": "online"}),
    "alphapo": Objective(
        lambda p, s: alphapo_loss(*p.logps, *p.lengths, s.beta, s.gamma, s.alphapo_alpha),
        {"beta": 2.5, "gamma_beta_ratio": 0.04, "alphapo_alpha": 0.25}),
    "simper": Objective(
        lambda p, s: simper_loss(*p.logps, *p.lengths)),
    "repo": Objective(
        lambda p, s: repo_loss(*p.logps, *p.lengths, s.gamma_beta_ratio),
        {"gamma_beta_ratio": 0.6}),
    "apo_zero": Objective(
        lambda p, s: apo_zero_loss(*p.logps, *p.ref_logps, s.beta),
        {"beta": 0.1, "reference": "online"}),
    "sft": Objective(None, responses=1, sft_weight=1.0),
}
# fmt: on


def hyperparameters() -> dict[str, dict[str, Any]]:
    """Return every hyperparameter: name → {objective that has it: its default there}."""
    names = dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.defaults)
    return {
        name: {key: o.defaults[name] for key, o in OBJECTIVES.items() if name in o.defaults}
        for name in names
    }


def pair_losses(
    settings: Any,
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    baseline: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return per-pair losses and the metrics to report, each [pairs].

    logps, ref_logps: summed log-probabilities in nats, [pairs, (chosen, rejected)].
    lengths: response lengths in tokens, of the same shape.
    baseline: what the objective's `step_baseline` gave for this step; None if it has none.

    Raises:
        TypeError: the loss does not return one number per pair, three times.
    """
    objective = OBJECTIVES[settings.objective]
    names = ("chosen", "rejected")[: logps.shape[1]]
    metrics = {
        f"{group}/{name}": column
        for group, values in (
            ("logps", logps.detach()),
            ("avg_logps", logps.detach() / lengths),
            ("lengths", lengths),
        )
        for name, column in zip(names, values.unbind(1))
    }
    if objective.loss is None:
        return torch.zeros_like(logps[:, 0]), metrics
    reference = None if ref_logps is None else ref_logps.unbind(1)
    inputs = LossInputs(logps.unbind(1), lengths.unbind(1), reference, baseline or 0.0)
    found = objective.loss(inputs, settings)
    # A mean instead of losses, or [pairs, pairs], would pass, and depend on the micro-batches.
    shapes = [getattr(x, "shape", None) for x in found] if isinstance(found, tuple) else []
    if shapes != [logps[:, 0].shape] * 3:
        triple = "(losses, chosen_rewards, rejected_rewards), each [pairs]"
        raise TypeError(f"objective {settings.objective}: its loss must return {triple}")
    losses, chosen, rejected = found[0], found[1].detach(), found[2].detach()
    ties = (chosen == rejected).float()
    return losses, metrics | {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float() + ties / 2,
    }
