"""Train from Python, and with an objective of your own; each takes ten lines.

python docs/from_python.py          from the repository root, about 20 seconds on a CPU
"""

import sys

sys.path.insert(0, ".")  # the repository root

from methods.objectives import OBJECTIVES, Objective
from runtime.settings import Settings
from train import train

TOY = {"model": "toy/checkpoint", "data": "toy/train.jsonl", "eval_data": "toy/heldout.jsonl"}


# Train from Python. Settings has the flags of train.py; what is not named has its default.
def simpo(**more):
    settings = Settings(objective="simpo", beta=10.0, gamma_beta_ratio=0.3, lr=5e-4, **more)
    result = train(settings)  # may be called again in the same process
    before, after = result["before"], result["after"]  # metrics of the held-out pairs
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        print(f"{name:20} {before[name]:.3f} → {after[name]:.3f}")
    return result["model"]  # a Hugging Face folder


# Write your own objective: one number per pair in, losses and both rewards out. Here, SimPO with a
# hinge, for which a pair that wins by 1 is settled.
def hinge_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta):
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    losses = (1 - (chosen_rewards - rejected_rewards)).clamp(min=0)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


OBJECTIVES["hinge"] = Objective(
    lambda p, s: hinge_loss(*p.logps, *p.lengths, s.beta), defaults={"beta": 10.0}
)


if __name__ == "__main__":
    print(simpo(**TOY, batch_size=32, max_steps=20, out="runs/from-python"))
    print(train(Settings(objective="hinge", **TOY, lr=5e-4, batch_size=32, max_steps=20))["after"])
