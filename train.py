"""Train a Llama or Mistral checkpoint on preference pairs, with SimPO, DPO or what they are compared with.

    torchrun train.py                                                    the embedded toy, on a laptop, in a minute
    torchrun train.py --objective dpo                                    the same with DPO
    torchrun --nproc-per-node 8 train.py --model DIR --data FILE         a real checkpoint on a node
    python train.py --config recipe.toml --lr 2e-6                       settings from a file; flags win over it
    python train.py --config recipe.toml --dry-run                       what that would train, on what

A *step* takes `--batch-size` pairs, whatever the hardware. They are spread over processes and micro-batches by their
number of tokens, and the step's loss is the sum over its pairs divided by their number, so that one process and eight,
with little memory or much, optimise the very same loss. Every process takes the same path; one process is a group of
one. Parameters are sharded by FSDP2, kept in float32, and computed with in `--dtype`.

Writes OUT/config.json (everything resolved), OUT/metrics.jsonl (one object per step), OUT/model/ (a Hugging Face folder).
"""

import argparse
import difflib
import gc
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import time
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
import model as llama
from baselines import cpo_loss, ipo_loss, kto_loss, orpo_loss, rdpo_loss, rrhf_loss, slic_loss
from data import Tokenizer, Tree
from model import CheckpointError, Config, Llama, Weights
from sample import generate
from simpo import dpo_loss, simpo_loss

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Settings: one table. A flag is `--batch-size`, a key of a TOML file `batch-size` or `batch_size`.

# objective: the hyperparameters that are its own, with the value taken where none is given
HYPERPARAMETERS = {
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "length_norm": True, "label_smoothing": 0.0},
    "dpo": {"beta": 0.01, "label_smoothing": 0.0},
    "rrhf": {"lam": 1.0},
    "slic": {"lam": 1.0, "delta": 1.0},
    "ipo": {"beta": 0.1, "length_norm": False},
    "cpo": {"beta": 0.01, "lam": 1.0},
    "kto": {"beta": 0.01},
    "orpo": {"lam": 0.1},
    "rdpo": {"beta": 0.01, "alpha": 0.05},
    "sft": {},
}
NEEDS_REFERENCE = {"dpo", "ipo", "kto", "rdpo"}


def option(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    # what to train, on what
    objective: str = option(
        "simpo",
        "what to optimise: baselines.py has the formulas; sft trains on the chosen responses alone",
        tuple(HYPERPARAMETERS),
    )
    model: str | None = option(
        None, "checkpoint: a Hugging Face folder, or a hub id NAME[@REVISION]; the toy's if absent"
    )
    data: str | None = option(
        None,
        "training pairs: .jsonl, .json, .jsonl.gz or .parquet, a folder of them, or a hub id NAME[:SPLIT][@REVISION]",
    )
    eval_data: str | None = option(
        None, "held-out pairs, read likewise; evaluated before the first step and after the last"
    )
    chat_template: str | None = option(
        None, "file with a jinja2 chat template to use instead of the checkpoint's; 'none' for plain text"
    )
    max_length: int = option(2048, "tokens of a prompt and one response together; a longer response is cut at its end")
    max_prompt_length: int | None = option(
        None, "tokens of a prompt; a longer one is cut at its start; 1800 of 2048 if absent, the same share of less"
    )
    # the objective
    beta: float | None = option(
        None,
        "β, the scale of the reward: 2.0 for simpo (the paper tunes 2.0–10), 0.01 for dpo, cpo, kto and rdpo "
        "(0.01, 0.05, 0.1); for ipo its τ, 0.1 (0.01, 0.1, 0.5, 1.0)",
    )
    gamma_beta_ratio: float | None = option(
        None, "simpo's margin γ as a multiple of β, γ = ratio · β, 0.5 (the paper tunes 0.1–0.8); 0 is its ablation"
    )
    length_norm: bool | None = option(
        None,
        "divide log-probabilities by response length: on for simpo, where --no-length-norm is the paper's ablation; "
        "off for ipo, where --length-norm is TRL's form",
    )
    lam: float | None = option(
        None,
        "λ, weight of the SFT term, a sum over the response, in rrhf and slic, 1.0 (the paper tunes 0.1, 0.5, 1.0, "
        "10), and in cpo, 1.0 (not tuned); weight of the odds ratio in orpo, 0.1 (0.1, 0.5, 1.0, 2.0)",
    )
    delta: float | None = option(None, "slic's margin δ in nats, 1.0 (the paper tunes 0.1, 0.5, 1.0, 2.0)")
    alpha: float | None = option(None, "rdpo's α per token of length, 0.05 (the paper tunes 0.05, 0.1, 0.5, 1.0)")
    label_smoothing: float | None = option(
        None, "simpo, dpo: probability that a pair's label is wrong (conservative DPO), below 0.5; 0 if absent"
    )
    sft_weight: float = option(
        0.0, "add this times the mean negative log-likelihood of a chosen token, to any objective"
    )
    reference: str = option(
        "online",
        "of dpo, ipo, kto, rdpo: online keeps a frozen copy in memory; cached scores all pairs once, then frees it",
        ("online", "cached"),
    )
    # optimisation
    batch_size: int = option(128, "pairs per optimizer step, over all processes and micro-batches")
    epochs: int = option(1, "passes over the training pairs")
    max_steps: int | None = option(None, "stop after this many steps")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    lr_schedule: str = option(
        "cosine",
        "learning rate after warm-up: falls to 0 along a cosine or a line, or stays",
        ("cosine", "linear", "constant"),
    )
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises to its peak")
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients")
    adam_eps: float = option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = option(0.0, "AdamW: decay of the weights, times the learning rate")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    shuffle: bool = option(True, "take the pairs in a new order each epoch; --no-shuffle keeps that of the file")
    seed: int = option(42, "decides the order of the pairs, together with the epoch and nothing else")
    # hardware
    device: str = option("auto", "cuda where there is one, else cpu", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "what is computed with: bf16 on cuda, fp32 on a cpu; master weights and the loss are always float32",
        ("auto", "bf16", "fp32"),
    )
    microbatch_tokens: int = option(8192, "tokens per forward pass and process: the memory knob; changes nothing else")
    activation_checkpointing: bool = option(
        True, "keep only each block's input for backward and compute the rest again: less memory, a third more work"
    )
    compile: bool = option(False, "torch.compile the norms and MLPs: a slow start, then fewer trips to memory")
    replicate: int = option(
        1, "HSDP: keep so many copies of the sharded model, usually one a node; gradients are averaged over them"
    )
    # output
    out: str | None = option(None, "folder of the run; runs/OBJECTIVE-N with the first free N if absent")
    overwrite: bool = option(False, "replace a finished run in --out")
    dry_run: bool = option(
        False, "resolve everything but the weights, print it and stop; nothing is fetched, computed or written"
    )
    log_every: int = option(1, "write metrics of every so many steps")
    eval_every: int = option(0, "also evaluate every so many steps; 0 for only before and after")

    def __post_init__(self):
        for name, value in HYPERPARAMETERS.get(self.objective, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.max_prompt_length is None:
            self.max_prompt_length = min(1800, self.max_length * 1800 // 2048)

    @property
    def gamma(self) -> float | None:
        return None if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta


SECTIONS = {
    "objective": "what to train, on what",
    "beta": "the objective",
    "batch_size": "optimisation",
    "device": "hardware",
    "out": "output",
}


def read_settings(argv: list[str] | None = None) -> Settings:
    """Defaults, then the TOML file, then the flags. Exits with status 2 and one line on a usage error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage="train.py [--flag value ...]     (--help explains every flag)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these settings, without the dashes before them"
    )
    group = parser
    for f, kind in zip(fields(Settings), setting_types()):
        group = parser.add_argument_group(SECTIONS[f.name]) if f.name in SECTIONS else group
        flag = "--" + f.name.replace("_", "-")
        text = (f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")).replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = f.metadata["choices"] or None
            group.add_argument(
                flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(), help=text
            )
    flags = vars(parser.parse_args(argv))
    config = flags.pop("config", None)
    toy = not ({"model", "data"} & flags.keys() or config)
    if toy:  # the embedded default: its settings stand beside it, one file per objective
        config = HERE / "toy" / f"{flags.get('objective', 'simpo')}.toml"
    try:
        values = (read_toml(Path(config)) if config else {}) | flags
    except ValueError as e:
        parser.error(str(e))
    if toy:
        values |= {
            key: str(HERE / values[key]) for key in ("model", "data", "eval_data") if key in values and key not in flags
        }
    settings = Settings(**values)
    if problem := settings_problem(settings):
        parser.error(problem)
    return settings


def setting_types() -> list[type]:
    """int, float, str or bool for each setting; `X | None` is an X that may be left out."""
    hints = typing.get_type_hints(Settings)
    return [
        next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not types.NoneType)
        for f in fields(Settings)
    ]


def read_toml(path: Path) -> dict:
    """A flat file of settings. Raises ValueError naming file and key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read: {e}") from None
    kinds = dict(zip((f.name for f in fields(Settings)), setting_types()))
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[name]:
            raise ValueError(f"{path}: {key} = {value!r}: expected {kinds[name].__name__}")
        values[name] = value
    return values


def settings_problem(s: Settings) -> str | None:
    """The first thing wrong with the settings, in words; None if nothing is."""
    flag = lambda name: "--" + name.replace("_", "-")
    for f in fields(Settings):
        if f.metadata["choices"] and getattr(s, f.name) not in f.metadata["choices"]:
            return f"{flag(f.name)}: {getattr(s, f.name)!r} is not one of {', '.join(f.metadata['choices'])}"
        if isinstance(getattr(s, f.name), float) and not math.isfinite(getattr(s, f.name)):
            return f"{flag(f.name)}: not a finite number"
        if getattr(s, f.name) == "":
            return f"{flag(f.name)}: is empty"
    if s.model is None or s.data is None:
        return "--model and --data go together; without both, the toy is trained"
    if s.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device here"
    own = HYPERPARAMETERS[s.objective]
    for name in {name: None for names in HYPERPARAMETERS.values() for name in names}:
        if getattr(s, name) is not None and name not in own:
            users = [objective for objective, names in HYPERPARAMETERS.items() if name in names]
            return f"{flag(name)}: not a setting of {s.objective}, but of {', '.join(users)}"
    positive = "beta batch_size epochs max_steps lr adam_eps max_grad_norm microbatch_tokens max_prompt_length "
    positive += "replicate log_every"
    for name in positive.split():
        if getattr(s, name) is not None and getattr(s, name) <= 0:
            return f"{flag(name)}: expected a positive number"
    for name in "gamma_beta_ratio lam delta alpha sft_weight weight_decay eval_every seed".split():
        if getattr(s, name) is not None and getattr(s, name) < 0:
            return f"{flag(name)}: expected 0 or a positive number"
    for name, top in (("label_smoothing", 0.5), ("warmup_ratio", 1), ("adam_beta1", 1), ("adam_beta2", 1)):
        if getattr(s, name) is not None and not 0 <= getattr(s, name) < top:
            return f"{flag(name)}: expected a number from 0 to below {top}"
    if s.max_prompt_length >= s.max_length:
        return f"--max-prompt-length {s.max_prompt_length} leaves no room for a response in --max-length {s.max_length}"
    if s.eval_every and not s.eval_data:
        return "--eval-every goes with --eval-data"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_processes(settings: Settings) -> tuple[torch.device, DeviceMesh]:
    """Join the group that torchrun described in the environment, or be a group of one."""
    kind = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:  # oneDNN keeps buffers for every shape it has seen, and no two of our streams have the same length
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **alone)
    return device, make_mesh(settings, kind)


def make_mesh(settings: Settings, kind: str) -> DeviceMesh:
    """All processes in a row, which parameters are sharded over; with `--replicate N`, in N rows with a copy each."""
    world, copies = dist.get_world_size(), settings.replicate
    if world % copies:
        sys.exit(f"train.py: error: --replicate {copies} does not divide the number of processes, {world}")
    if copies == 1:
        return init_device_mesh(kind, (world,))
    return init_device_mesh(kind, (copies, world // copies), mesh_dim_names=("replicate", "shard"))


def share_out(items: list) -> list:
    """This process's contiguous share of a list; the shares of all ranks, in order, are the list."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def gather(thing) -> list:
    """What every process has, in the order of ranks."""
    things = [thing]
    if dist.get_world_size() > 1:
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def agree(work: Callable):
    """This process's `work()`. Where it fails on one process, all raise that error, so that none waits for it."""
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as e:
        error = e
    if errors := [e for e in gather(error) if e]:
        raise errors[0]
    return result


def on_every_rank(work: Callable) -> list:
    """The results of `work()` of all processes, in the order of ranks; errors as in `agree`."""
    return gather(agree(work))


def on_rank_0(work: Callable):
    """The result of `work()`, which rank 0 does alone while the others wait."""
    return on_every_rank(lambda: work() if dist.get_rank() == 0 else None)[0]


def say(*words) -> None:
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def progress(items, what: str):
    """A bar on rank 0 of a terminal, silence elsewhere."""
    return tqdm(items, desc=what, disable=None if dist.get_rank() == 0 else True, leave=False, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def load_trees(name: str, tokenizer: Tokenizer, settings: Settings) -> tuple[list[Tree], dict[str, int]]:
    """Read, tokenize (each process its share) and gather; also the counts of what was read, cut and dropped."""
    counts: Counter = Counter()
    examples, first_dropped = [], ""

    def read() -> None:
        nonlocal first_dropped
        for where, record in data.read_records(name):
            counts["records"] += 1
            try:
                kind, example = data.parse_record(record, where, paired=settings.objective != "sft")
                counts[f"format: {kind}"] += 1
                examples.append(example)
            except data.Dropped as e:
                counts[f"dropped: {e}"] += 1
                first_dropped = first_dropped or f"; the first, {where}: {e}"

    def encode() -> tuple[list[Tree], Counter]:
        mine, trees, seen = share_out(examples), [], Counter()
        for i in progress(range(0, len(mine), 256), f"tokenizing {name}"):
            trees += tokenizer.encode(mine[i : i + 256], settings.max_length, settings.max_prompt_length, seen)
        return trees, seen

    agree(read)
    trees = []
    for share, seen in on_every_rank(encode):
        trees += share
        counts += seen
    summary = ", ".join(f"{n} {what}" if ":" not in what else f"{what} ({n})" for what, n in counts.items())
    if not trees:
        raise data.DataError(f"{name}: nothing to learn from: {summary or 'it is empty'}{first_dropped}")
    say(f"{name}: {summary}{first_dropped}")
    return trees, dict(counts) | {"used": len(trees)}


def read_inputs(settings: Settings) -> tuple[Path, Config, Weights, Tokenizer]:
    """The checkpoint folder and what is read from it before any memory is spent."""
    source = data.local_path(settings.model, "model", llama.CHECKPOINT_FILES)
    config, weights = Config.from_folder(source), Weights(source)
    tokenizer = Tokenizer(source, data.read_template(settings.chat_template))
    tokenizer.check_fits(config.vocab_size)
    return source, config, weights, tokenizer


def build_model(weights: Weights, config: Config, mesh: DeviceMesh, settings: Settings, trainable: bool) -> Llama:
    """Empty on the meta device, sharded, then filled: nothing is ever whole on one process.

    The policy is kept in float32 and computed with in `--dtype`; a frozen reference needs only the latter."""
    compute = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        model = Llama(config)
    weights.check(model)
    if not trainable:
        model.requires_grad_(False).to(compute)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        block.recompute = settings.activation_checkpointing
        if settings.compile:
            for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
                part.compile(dynamic=True)  # streams differ in length; one compilation serves them all
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # embedding and head: the policy's stay whole from forward to backward, a reference has no backward to wait for
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=not trainable)
    model.to_empty(device=mesh.device_type)
    weights.copy_into(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Objective


def response_logps(model: Llama, trees: list[Tree]) -> Tensor:
    """Summed log-probability of every response, [pairs, responses], in nats."""
    packed = data.pack(trees)
    for name in packed.keys() - {"cu_q", "cu_k"}:  # these two stay on the CPU, see model.PackedAttention
        packed[name] = torch.from_numpy(packed[name]).to(model.device)
    lengths = response_lengths(model, trees)
    return torch.segment_reduce(model(**packed), "sum", lengths=lengths.flatten()).view_as(lengths)


def response_lengths(model: Llama, trees: list[Tree]) -> Tensor:
    """[pairs, responses], in tokens, where the model is."""
    return torch.tensor([[len(r) for r in tree.responses] for tree in trees], device=model.device)


def pair_losses(
    settings: Settings, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None, z_ref: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every pair and what to report of it, all [pairs]; the one place where the objective is chosen.

    logps, ref_logps: summed, in nats, [pairs, (chosen, rejected)]; lengths: in tokens, likewise; z_ref: KTO's."""
    names = ("chosen", "rejected")[: logps.shape[1]]
    report = {f"logps/{name}": column for name, column in zip(names, logps.detach().unbind(1))}
    report |= {f"avg_logps/{name}": column for name, column in zip(names, (logps.detach() / lengths).unbind(1))}
    report |= {f"lengths/{name}": column for name, column in zip(names, lengths.unbind(1))}
    s, policy, tokens = settings, logps.unbind(1), lengths.unbind(1)
    reference = ref_logps.unbind(1) if s.objective in NEEDS_REFERENCE else ()
    match s.objective:
        case "sft":
            return torch.zeros_like(logps[:, 0]), report
        case "simpo":
            result = simpo_loss(*policy, *tokens, s.beta, s.gamma, s.label_smoothing, s.length_norm)
        case "dpo":
            result = dpo_loss(*policy, *reference, s.beta, s.label_smoothing)
        case "rrhf":
            result = rrhf_loss(*policy, *tokens, s.lam)
        case "slic":
            result = slic_loss(*policy, s.delta, s.lam)
        case "ipo":
            result = ipo_loss(*policy, *reference, *tokens, s.beta, s.length_norm)
        case "cpo":
            result = cpo_loss(*policy, s.beta, s.lam)
        case "kto":
            result = kto_loss(*policy, *reference, s.beta, z_ref)
        case "orpo":
            result = orpo_loss(*policy, *tokens, s.lam)
        case "rdpo":
            result = rdpo_loss(*policy, *reference, *tokens, s.beta, s.alpha)
    losses, chosen, rejected = result
    report |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    report["rewards/accuracies"] = (chosen > rejected).float() + (chosen == rejected).float() / 2  # a tie is half right
    return losses, report


Reference = Callable[[list[Tree], list[int]], Tensor]  # (trees, their numbers in the data set) → logps [pairs, 2]


def run_pairs(
    model: Llama,
    trees: list[Tree],
    numbers: list[int],
    settings: Settings,
    reference: Reference | None,
    backward: bool,
    z_ref: float | None = None,
) -> dict[str, float]:
    """Forward, and with `backward` also backward, over the pairs `numbers`; training and evaluation both.

    Spreads them over processes and micro-batches; gradients and the metrics returned are those of all pairs together.
    A process whose share is empty computes one pair at weight 0, since FSDP needs everybody at every forward pass.
    KTO compares with the mean reward of the whole step, `z_ref`: it is found by a pass without gradient."""
    if settings.objective == "kto" and z_ref is None:
        means = run_pairs(model, trees, numbers, settings, reference, backward=False, z_ref=0.0)
        z_ref = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
    batch = [trees[n] for n in numbers]
    rank, world = dist.get_rank(), dist.get_world_size()
    sft_weight = settings.sft_weight + (settings.objective == "sft")
    chosen_tokens = sum(len(tree.responses[0]) for tree in batch)
    sums: dict[str, Tensor] = {}
    sizes = [len(tree) for tree in batch]
    shortest = sizes.index(min(sizes))
    for shares in data.plan(sizes, world, settings.microbatch_tokens):
        mine, weight = shares[rank] or [shortest], 1.0 if shares[rank] else 0.0
        share = [batch[i] for i in mine]
        with torch.set_grad_enabled(backward):
            ref_logps = reference(share, [numbers[i] for i in mine]) if reference else None
            logps, lengths = response_logps(model, share), response_lengths(model, share)
            losses, report = pair_losses(settings, logps, lengths, ref_logps, z_ref)
            loss = weight * (losses.sum() / len(batch) - sft_weight * logps[:, 0].sum() / chosen_tokens)
        if backward:
            (loss * world).backward()  # FSDP averages over processes; ours is a sum
        means = {name: weight * value.double().sum() / len(batch) for name, value in report.items()}
        for name, value in {"loss": loss.detach().double(), **means}.items():
            sums[name] = sums.get(name, 0) + value
    if not backward:
        model.reshard()  # after a forward pass the root would wait for its backward, in the precision of computing
    table = torch.stack(list(sums.values()))
    dist.all_reduce(table)
    return dict(zip(sums, table.tolist()))


def online_reference(model: Llama) -> Reference:
    """Score pairs with a frozen copy when they are needed: before the policy's forward, so that no activations wait."""

    @torch.no_grad()
    def score(trees: list[Tree], numbers: list[int]) -> Tensor:
        return response_logps(model, trees)

    return score


def cached_reference(model: Llama, trees: list[Tree], steps: list[np.ndarray], settings: Settings) -> Reference:
    """Score every pair of `steps` once, now, and look the numbers up later. The model can be freed afterwards.

    Goes through the very micro-batches that training will see, so that at step 0 policy and reference agree to the bit.
    """
    table = torch.zeros(len(trees), 2, device=model.device)
    seen = torch.zeros(len(trees), device=model.device)
    online, rank = online_reference(model), dist.get_rank()
    for step in progress(steps, "reference"):
        for shares in data.plan([len(trees[n]) for n in step], dist.get_world_size(), settings.microbatch_tokens):
            numbers = [int(step[i]) for i in shares[rank] or [0]]
            logps = online([trees[n] for n in numbers], numbers)
            if shares[rank]:
                table[numbers] = logps
                seen[numbers] += 1
    dist.all_reduce(table)
    dist.all_reduce(seen)
    wanted = np.unique(np.concatenate(steps))
    assert (seen[wanted] == 1).all(), "every pair is scored exactly once"
    return lambda trees, numbers: table[numbers]


# ---------------------------------------------------------------------------------------------------------------------
# The run


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Of step 0 … steps − 1: up to the peak in a line over the warm-up, which ends at it, then down to just above 0."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    left = 1 - (step - warmup) / (steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return settings.lr * shape[settings.lr_schedule]


def prepare_out(settings: Settings) -> Path:
    """The folder of this run, on rank 0: new, empty, or left by a run of ours that did not finish."""
    if settings.out is None:
        names = (Path("runs") / f"{settings.objective}-{n}" for n in range(1, 10**6))
        settings.out = str(next(path for path in names if not path.exists()))
    out = Path(settings.out)
    if (out / "model").exists() and not settings.overwrite:
        raise FileExistsError(f"{out} holds a finished run: pass --overwrite to replace it, or another --out")
    if out.exists() and any(out.iterdir()) and not (out / "metrics.jsonl").exists():
        raise FileExistsError(f"{out} is not empty and holds no run of ours: pass another --out")
    shutil.rmtree(out / "model", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# dense bfloat16 matrix products per second, from NVIDIA's data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}


def train_flops(config: Config, trees: list[Tree]) -> float:
    """Floating-point operations of forward and backward that the mathematics needs: 6 per weight and token, 12 per
    feature of a visible query-key pair; recomputation does not count, nor positions that meet no vocabulary."""
    c = config
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # rows of q, k, v, o
    block = c.hidden_size * (attention + 3 * c.intermediate_size)
    predicted, visible = 0, 0.0
    for tree in trees:
        p = len(tree.prompt)
        visible += p * (p + 1) / 2
        for r in map(len, tree.responses):
            visible += r * (p + (r + 1) / 2)
            predicted += r
    blocks = 6 * block * sum(map(len, trees)) + 12 * c.num_attention_heads * c.head_dim * visible
    return c.num_hidden_layers * blocks + 6 * c.vocab_size * c.hidden_size * predicted


def speed(config: Config, trees: list[Tree], seconds: float, device: torch.device) -> dict[str, float]:
    """Rates over all processes, and the share of known GPUs' peak that went into the mathematics (MFU)."""
    rates = {"tokens_per_second": sum(map(len, trees)) / seconds, "pairs_per_second": len(trees) / seconds}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
    if peak:
        rates["mfu"] = train_flops(config, trees) / seconds / peak / dist.get_world_size()
    return rates


def describe(metrics: dict[str, float]) -> str:
    """The few numbers of a line on the terminal."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        parts += [f"margin {metrics['rewards/margins']:+.4f}", f"accuracy {100 * metrics['rewards/accuracies']:.1f} %"]
    else:
        parts += [f"log p {metrics['avg_logps/chosen']:.3f} nats/token"]
    return "  ".join(parts)


def main() -> None:
    settings = read_settings()
    try:
        device, mesh = start_processes(settings)
        if settings.dry_run:
            dry_run(settings)
        else:
            train(settings, device, mesh)
    except (data.DataError, CheckpointError, OSError, FloatingPointError) as e:
        if dist.get_rank() == 0:
            print(f"train.py: error: {e}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as e:  # on whichever process it happens: the others wait for it and cannot be asked
        print(
            f"train.py: error: {e}\nlower --microbatch-tokens ({settings.microbatch_tokens})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            print(f"\ntrain.py: interrupted; weights are not saved, metrics are in {settings.out}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def at_hand(name: str) -> bool:
    """Whether `name`, or what it names a split of, is here; if not, it may be on the hub. DataError if it cannot be."""
    if Path(name).expanduser().exists() or Path(name.partition("@")[0].partition(":")[0]).exists():
        return True
    if name.endswith(data.SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", name):
        raise data.DataError(f"{name}: no such file or folder")
    return False


def dry_run(settings: Settings) -> None:
    """Say what would be trained, on what: every setting, and of model and data as much as is on this machine."""
    notes = {name: "" for name in ("model", "data", "eval_data") if getattr(settings, name)}
    missing = [name for name in notes if not at_hand(getattr(settings, name))]
    notes |= dict.fromkeys(missing, "would be fetched from the hub")
    template, tokenizer = data.read_template(settings.chat_template), None
    if "model" not in missing:
        source = Path(settings.model).expanduser()
        config, tokenizer = Config.from_folder(source), Tokenizer(source, template)
        tokenizer.check_fits(config.vocab_size)
        with torch.device("meta"):
            notes["model"] = f"{sum(p.numel() for p in Llama(config).parameters()):,} parameters"
    for name in notes:
        if name == "model" or name in missing:
            continue
        where = getattr(settings, name)
        n = len(load_trees(where, tokenizer, settings)[0]) if tokenizer else sum(1 for _ in data.read_records(where))
        notes[name] = f"{n:,} {'used' if tokenizer else 'records'}"
        if name == "data":
            epochs = data.batches(n, settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
            notes[name] += f", {sum(1 for _ in itertools.islice(epochs, settings.max_steps)):,} steps"
    if settings.gamma is not None:
        notes["gamma_beta_ratio"] = f"γ = {settings.gamma:g}"
    for name, value in asdict(settings).items():
        if name in SECTIONS:
            say(f"\n{SECTIONS[name]}")
        if value is not None:
            say(f"  {name.replace('_', '-'):26}{value!s:58}{notes.get(name, '')}".rstrip())


def train(settings: Settings, device: torch.device, mesh: DeviceMesh) -> None:
    if settings.dtype == "auto":
        settings.dtype = "bf16" if device.type == "cuda" else "fp32"

    # What to train, on what. Errors come before anything is written.
    [source, config, weights, tokenizer] = agree(lambda: read_inputs(settings))
    if settings.max_length > config.max_position_embeddings:
        say(
            f"warning: --max-length {settings.max_length}, but the model knows {config.max_position_embeddings} positions"
        )
    trees, counts = load_trees(settings.data, tokenizer, settings)
    held_out, eval_counts = load_trees(settings.eval_data, tokenizer, settings) if settings.eval_data else ([], {})
    epochs = data.batches(len(trees), settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
    steps = list(itertools.islice(epochs, settings.max_steps))
    policy = agree(lambda: build_model(weights, config, mesh, settings, trainable=True))
    parameters = sum(p.numel() for p in policy.parameters())

    out = on_rank_0(lambda: prepare_out(settings))
    metrics_file = None
    if dist.get_rank() == 0:
        record = {
            "settings": asdict(settings) | {"gamma": settings.gamma, "out": str(out)},
            "source": str(source),
            "architecture": asdict(config),
            "parameters": parameters,
            "data": counts,
            "eval_data": eval_counts,
            "steps": len(steps),
            "processes": dist.get_world_size(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")},
        }
        (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        metrics_file = open(out / "metrics.jsonl", "w")

    reference = held_out_reference = None
    if settings.objective in NEEDS_REFERENCE:
        frozen = build_model(weights, config, mesh, settings, trainable=False)
        if settings.reference == "cached":
            first_epoch = steps[: math.ceil(len(trees) / settings.batch_size)]
            reference = cached_reference(frozen, trees, first_epoch, settings)
            if held_out:
                held_out_reference = cached_reference(frozen, held_out, [np.arange(len(held_out))], settings)
        else:
            reference = held_out_reference = online_reference(frozen)
        del frozen
        gc.collect()  # FSDP's modules refer to each other in circles: without this a cached reference stays in memory

    betas = settings.adam_beta1, settings.adam_beta2
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings.lr, betas, settings.adam_eps, settings.weight_decay, fused=True
    )

    def log(row: dict) -> None:
        if metrics_file:
            metrics_file.write(json.dumps(row) + "\n")
            metrics_file.flush()

    def evaluate(step: int) -> dict[str, float]:
        if not held_out:
            return {}
        metrics = run_pairs(policy, held_out, list(range(len(held_out))), settings, held_out_reference, backward=False)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"held out, after {step} steps: loss {metrics['loss']}")
        log({"step": step} | {f"eval_{name}": value for name, value in metrics.items()})
        say(f"held out, after {step} steps:  {describe(metrics)}")
        return metrics

    own = [*HYPERPARAMETERS[settings.objective], *(["reference"] if settings.objective in NEEDS_REFERENCE else [])]
    say(
        ", ".join([settings.objective, *(f"{name} {getattr(settings, name)}" for name in own)])
        + f": {len(steps)} steps of {len(steps[0])} pairs, {parameters:,} parameters, "
        + f"{dist.get_world_size()} × {device.type} in {settings.dtype} → {out}"
    )
    before = evaluate(0)
    # The loop. Every process is in every line of it; metrics are sums over all of them.
    seen = 0
    for step, numbers in enumerate(bar := progress(steps, settings.objective)):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(steps))
        metrics = run_pairs(policy, trees, numbers.tolist(), settings, reference, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        grad_norm = norm.full_tensor().item()  # of all shards
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            pairs = ", ".join(trees[n].where for n in numbers)
            raise FloatingPointError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {grad_norm}; {pairs}")
        optimizer.step()
        optimizer.zero_grad()
        seen += len(numbers)
        batch, seconds = [trees[n] for n in numbers], time.perf_counter() - start
        row = {
            "step": step + 1,
            "epoch": seen / len(trees),
            **metrics,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **speed(config, batch, seconds, device),
            "peak_memory_gib": peak_memory_gib(device),
        }
        if (step + 1) % settings.log_every == 0:
            log(row)
        if not bar.disable:
            bar.set_postfix_str(describe(row))
        elif (step + 1) % settings.log_every == 0:
            rates = f"lr {row['learning_rate']:.2e}  {row['pairs_per_second']:.2f} pairs/s"
            say(f"step {step + 1}/{len(steps)}  {describe(row)}  {rates}")
        if settings.eval_every and (step + 1) % settings.eval_every == 0 and step + 1 < len(steps):
            evaluate(step + 1)
    after = evaluate(len(steps))

    llama.save(
        policy, source, out / "model", weights.dtype, write=dist.get_rank() == 0, replace=tokenizer.changed_files()
    )
    if dist.get_rank() == 0:
        print(report(source, out, tokenizer, held_out or trees, before, after))


def report(source: Path, out: Path, tokenizer: Tokenizer, trees: list[Tree], before: dict, after: dict) -> str:
    """What was learnt on held-out pairs, and where to look: for people."""
    lines = []
    if "rewards/margins" in after:
        lines += [f"\nWhat was learnt, on {len(trees)} held-out pairs:"]
        (a, b), (c, d) = ((m["rewards/accuracies"] * 100, m["rewards/margins"]) for m in (before, after))
        lines += [f"  reward accuracy  {a:7.1f} %  →  {c:.1f} %", f"  reward margin    {b:+7.3f}    →  {d:+.3f}"]
    model, prompt = out / "model", "PROMPT"
    if sum(path.stat().st_size for path in model.glob("*.safetensors")) < 2**27:  # small enough to answer at once
        prompt = tokenizer.decode(trees[0].prompt.tolist())
        lines += ["", f"One prompt, answered greedily: {prompt}"]
        for when, folder in (("before", source), ("after", model)):
            [ids] = generate(llama.load(folder), [trees[0].prompt.tolist()], tokenizer.stop_ids, max_new_tokens=128)
            lines += [f"  {when:6}  {tokenizer.decode(ids)}"]
    lines += ["", f"Sample from it:  python sample.py --model {model} --prompt {shlex.quote(prompt)}"]
    lines += [f"Look at the run: {out}/metrics.jsonl (a line per step), {out}/config.json (everything resolved)"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
