"""Change one thing in the code at a time, and see which test fails.

    python bench/mutations.py --results runs/mutations.jsonl            what has no result yet
    python bench/mutations.py --results runs/mutations.jsonl --whole    survivors: all test files

Each mutation is a small slip that somebody could make: an off-by-one, a wrong sign or dtype, an
element that is skipped, a missing flush, another default, an edge. It is applied in a copy of the
tracked files. The test files named beside it run first, up to the first failure; for a survivor
with `--whole` all others follow. The failing test must pass without the mutation to count. A test
file that takes longer than `--limit` seconds counts as killed, since such a run would be noticed.

Results are appended to a file, so an interrupted command resumes. A result counts for as long as
the mutation is the same. At the end the command writes bench/MUTATIONS.md and exits with status 1
if a mutation survived whose reason `SURVIVORS` does not give. Each run is forked from a process
that has imported torch, so that a mutation costs little more than its tests.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Of what torch and others need seconds to import; none of it may be a module of this project.
SLOW = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.checkpoint", "pytest")
SLOW += ("safetensors.torch", "tokenizers", "jinja2", "tqdm")


class Mutation(NamedTuple):
    """Holds a change of one place: `old` stands once in `file`; tests: nearest files, in order."""

    file: str
    old: str
    new: str
    tests: str  # "model train::test_x" is tests/test_model.py, then a test of tests/test_train.py

    @property
    def key(self) -> str:
        """Return a name that stays the same while the mutation does."""
        text = "\0".join((self.file, self.old, self.new))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def copy_tree(folder: Path) -> Path:
    """Copy the tracked files; return the copy, which finds ../shared where this tree does."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        (folder / "main" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "main" / name)
    if (shared := ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(shared.resolve())
    return folder / "main"


def mutated(mutation: Mutation, tree: Path = ROOT) -> str:
    """Return the file's text with the mutation. Exits with an error if it does not apply."""
    text = (tree / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        sys.exit(f"error: {mutation.file}: stands {count} times, not once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def run_tests(tree: Path, targets: list[str], limit: float) -> str | None:
    """Run pytest in the tree up to the first failure; return what failed, None if all passed."""
    log = tree.parent / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.dont_write_bytecode, sys.path[:] = True, [p for p in sys.path if p != str(ROOT / "bench")]
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *targets]))
    end = time.monotonic() + limit
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.1)
    if done == (0, 0):
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"{targets[0]}: longer than {limit:.0f} s"
    if done[1] == 0:
        return None
    text = log.read_text(errors="replace")
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - .*)?$", text, re.MULTILINE)
    return found[1] if found else f"{targets[0]}: {text[-300:]}"


def target(name: str) -> str:
    file, colons, test = name.partition("::")
    return f"tests/test_{file}.py{colons}{test}"


def verdict(mutation: Mutation, tree: Path, targets: list[str], limit: float) -> str | None:
    """Return the test that kills a mutation in this tree, and leave the tree as it was."""
    path = tree / mutation.file
    original = path.read_text(encoding="utf-8")
    for one in targets:
        path.write_text(mutated(mutation, tree), encoding="utf-8")
        killed = run_tests(tree, [one], limit)
        path.write_text(original, encoding="utf-8")
        if killed and run_tests(tree, [killed.partition(": ")[0]], limit) is None:
            return killed
    return None


def read_results(path: Path) -> dict[str, dict]:
    """Return the newest result of every mutation, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def campaign(results: Path, whole: bool, limit: float) -> Iterator[str]:
    """Try what has no result yet, and with `whole` survivors once more; yield a line for each."""
    for name in SLOW:
        importlib.import_module(name)
    every = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree, known = copy_tree(Path(folder)), read_results(results)
        for number, mutation in enumerate(MUTATIONS, 1):
            old = known.get(mutation.key)
            if old and (old["killed"] or not whole or old["whole"]):
                continue
            names = mutation.tests.split()
            if whole:
                names = ([] if old else names) + [name for name in every if name not in names]
            killed = verdict(mutation, tree, list(map(target, names)), limit)
            result = {"key": mutation.key, "killed": killed, "whole": whole}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            yield f"{number}/{len(MUTATIONS)} {mutation.file}: {mutation.new!r}: {killed or 'SURVIVED'}"


def report(results: dict[str, dict]) -> str:
    """Return bench/MUTATIONS.md."""
    tried = [(m, results[m.key]) for m in MUTATIONS if m.key in results]
    lived = [m for m, result in tried if not result["killed"]]

    def cell(text: str) -> str:
        return "`" + " ".join(text.split()).replace("|", "\\|") + "`"

    lines = [
        "# Mutations",
        "",
        "Written by `bench/mutations.py`, which says what this is.",
        f"Of {len(MUTATIONS)} mutations {len(tried)} were tried; {len(tried) - len(lived)} are",
        f"killed, {len(lived)} survive.",
        "",
    ]
    if lived:
        lines += ["| survivor | becomes | why |", "|---|---|---|"]
        for m in lived:
            why = SURVIVORS.get((m.file, m.new), "not tried against the whole suite")
            lines += [f"| {m.file}: {cell(m.old)} | {cell(m.new)} | {why} |"]
        lines += [""]
    lines += ["| file | code | becomes | killed by |", "|---|---|---|---|"]
    for m, result in tried:
        if result["killed"]:
            test = result["killed"].removeprefix("tests/").split("[")[0].replace("|", "\\|")
            lines += [f"| {m.file} | {cell(m.old)} | {cell(m.new)} | {' '.join(test.split())} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the campaign."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--whole", action="store_true", help="try survivors on all test files")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a test file")
    flags = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for mutation in MUTATIONS:
        mutated(mutation)
    for line in campaign(flags.results, flags.whole, flags.limit):
        print(line, flush=True)
    results = read_results(flags.results)
    (ROOT / "bench" / "MUTATIONS.md").write_text(report(results), encoding="utf-8")
    lived = [m for m in MUTATIONS if not results[m.key]["killed"]]
    sys.exit(any((m.file, m.new) not in SURVIVORS for m in lived))


# (file, new text): why no test can or need fail
SURVIVORS: dict[tuple[str, str], str] = {}

# fmt: off
MUTATIONS = [Mutation(*row) for row in (
    # -- those that once survived
    ("model.py", "positions.float()[:, None]", "positions.bfloat16().float()[:, None]", "mutants"),
    ("model.py", "yield entries, upcast(F.linear(hidden, weight[entries]))", "yield entries, F.linear(hidden, weight[entries])", "mutants model"),
    ("model.py", "grad_hidden, grad_weight = torch.zeros_like(upcast(hidden))", "grad_hidden, grad_weight = torch.zeros_like(hidden)", "mutants model"),
    ("model.py", "min(n, c.sliding_window or n)", "n", "mutants"),
    ("train.py", "reduce_dtype=master", "reduce_dtype=compute", "mutants"),
    ("train.py", "master = torch.promote_types(compute, torch.float32)", "master = compute", "mutants"),
    ("train.py", "betas = settings.adam_beta1, settings.adam_beta2", "betas = 0.9, settings.adam_beta2", "mutants"),
    ("train.py", "torch.optim.AdamW(groups, settings.lr, betas", "torch.optim.AdamW(groups, settings.lr, (betas[0], 0.999)", "mutants"),
    ("train.py", "eps, decay = settings.adam_eps, settings.weight_decay", "eps, decay = 1e-8, settings.weight_decay", "mutants"),
    ("train.py", "eps, decay = settings.adam_eps, settings.weight_decay", "eps, decay = settings.adam_eps, 0.0", "mutants"),
    ("train.py", "math.ceil(settings.warmup_ratio * steps)", "int(settings.warmup_ratio * steps)", "mutants"),
    ("train.py", "(loss * dist.get_world_size()).backward()", "loss.backward()", "train"),
    ("train.py", "shares[rank] or [shortest], float(bool(shares[rank]))", "shares[rank] or [shortest], 1.0", "train"),
    ("runtime/reference.py", "math.ceil(len(inputs.pairs) / settings.batch_size)", "(len(inputs.pairs) // settings.batch_size)", "mutants"),
    ("runtime/run.py", "sum(pair.tokens for pair in pairs) / seconds", "len(pairs) / seconds", "mutants"),
    ("runtime/run.py", "flops / seconds / peak / dist.get_world_size()", "flops / seconds / peak", "mutants"),
    ("runtime/settings.py", "min(1800, self.max_length * 1800 // 2048)", "min(1800, self.max_length)", "mutants"),
    ("methods/objectives.py", '{"lam": 0.1}),', '{"lam": 1.0}),', "mutants"),
    ("methods/objectives.py", '"alpha": 0.05', '"alpha": 0.5', "mutants"),
    ("sample.py", "turn * 2**24 + i % n", "i % n", "mutants"),
    ("sample.py", "likelier < top_p *", "likelier <= top_p *", "sample::test_pick_by_hand"),
    ("study/analyze.py", "reward, likelihood = np.asarray(reward_margins) > 0", "reward, likelihood = np.asarray(reward_margins) >= 0", "mutants"),
    ("study/analyze.py", "np.asarray(likelihood_margins) > 0", "np.asarray(likelihood_margins) >= 0", "mutants"),
    ("sample.py", "(first + i // n) * 2**32", "(i // n) * 2**32", "mutants"),
    ("runtime/settings.py", '"longest prompt plus response, in tokens; the response is cut at its end", above=0', '"longest prompt plus response, in tokens; the response is cut at its end", least=0', "settings"),
    # -- simpo.py
    ("simpo.py", "logits = chosen_rewards - rejected_rewards - gamma", "logits = chosen_rewards - rejected_rewards + gamma", "simpo"),
    ("simpo.py", "rejected_rewards = beta * rejected_logps / rejected_lengths", "rejected_rewards = beta * rejected_logps / chosen_lengths", "simpo"),
    ("simpo.py", "beta * (rejected_logps - ref_rejected_logps)", "beta * (rejected_logps - ref_chosen_logps)", "simpo"),
    ("simpo.py", "- label_smoothing * log_wrong", "- label_smoothing * log_right", "simpo"),
    # -- data.py
    ("data.py", "prompt[:1] if prompt[0] in tokenizer.bos_ids else []", "[]", "data"),
    ("data.py", "if len(prompt) > max_prompt_length:", "if len(prompt) >= max_prompt_length:", "data"),
    ("data.py", "np.random.default_rng((seed, epoch))", "np.random.default_rng(seed)", "data::test_batches"),
    ("data.py", "q_lengths.append(r if i else p + r)", "q_lengths.append(p + r)", "data model"),
    ("data.py", "key=lambda i: -costs[i]", "key=lambda i: costs[i]", "data mutants plan"),
    ("data.py", "positions.append(np.arange(p, p + r))", "positions.append(np.arange(p + 1, p + r + 1))", "data"),
    # -- model.py
    ("model.py", "keep + (1 - keep) / s[\"factor\"]", "keep + (1 - keep) * s[\"factor\"]", "model"),
    ("model.py", "distance >= (self.window or longest + 1)", "distance > (self.window or longest + 1)", "model"),
    ("model.py", "left = -1 if window is None else window - 1", "left = -1 if window is None else window", "cuda_branch"),
    ("model.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)", "model"),
    ("model.py", 'save = op.name() in attention', 'save = False', "model"),
    ("model.py", "return head_dim % 8 == 0 and head_dim <= 256", "return head_dim % 8 == 0 and head_dim < 256", "cuda_branch"),
    # -- train.py
    ("train.py", "x.double().sum() / len(batch)", "x.double().mean()", "train"),
    ("train.py", "sft_weight * logps[:, 0].sum() / chosen_tokens", "sft_weight * logps.sum() / chosen_tokens", "train::test_loss_of_a_step_by_hand"),
    ("train.py", "if p.dim() == 1]", "if p.dim() == 0]", "train::test_weight_decay_leaves_norm_gains_alone mutants"),
    ("train.py", "model.set_requires_gradient_sync(last)", "model.set_requires_gradient_sync(True)", "train"),
    ("train.py", "if not (math.isfinite(loss) and math.isfinite(norm))", "if not math.isfinite(norm)", "train::test_not_a_number_stops_before_the_optimizer resume"),
    ("train.py", "step {step + 1}: loss {loss}", "step {step}: loss {loss}", "train::test_not_a_number_stops_before_the_optimizer"),
    ("train.py", "left = 1 - (step - warmup) / (steps - warmup)", "left = 1 - (step + 1 - warmup) / (steps - warmup)", "mutants train::test_learning_rate"),
    ("train.py", "torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)", "torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])", "mutants train"),
    # -- sample.py
    ("sample.py", "rows[i] = rows[-1]\n                cache.move(len(rows) - 1, i)", "rows[i] = rows[-1]", "sample::test_greedy_equals_full_forward_passes"),
    ("sample.py", "(distance < (self.window or longest))", "(distance <= (self.window or longest))", "sample::test_greedy_equals_full_forward_passes"),
    ("sample.py", "sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))", "range(len(prompts))", "sample"),
    ("sample.py", "right=True)", "right=False)", "sample::test_pick_at_the_edges_of_a_draw"),
    ("sample.py", "most = config.max_position_embeddings - 1", "most = config.max_position_embeddings", "sample"),
    ("sample.py", "samples[i].append(Answer(tokenizer.decode(ids), ids[-1] in tokenizer.stop_ids))", "samples[i].append(Answer(tokenizer.decode(ids), True))", "answers sample"),
    # -- methods/
    ("methods/baselines.py", "z_ref = max(z_ref, 0.0)", "z_ref = z_ref", "baselines"),
    ("methods/baselines.py", "explained = alpha * (chosen_lengths - rejected_lengths)", "explained = alpha * (rejected_lengths - chosen_lengths)", "baselines"),
    ("methods/baselines.py", "average_logps.clamp(max=-1e-6)", "average_logps.clamp(max=-1e-3)", "baselines"),
    ("methods/baselines.py", "return losses, tau * chosen_ratios.detach()", "return losses, chosen_ratios.detach()", "baselines"),
    ("methods/successors.py", ".clamp(max=30)", "", "successors"),
    ("methods/successors.py", "F.relu(margin - chosen_rewards + rejected_rewards)", "F.relu(chosen_rewards - rejected_rewards - margin)", "successors"),
    ("methods/objectives.py", '(chosen > rejected).float() + ties / 2', '(chosen > rejected).float() + ties', "train::test_dpo_starts_at_ln2_with_both_references"),
    ("methods/objectives.py", '/ 2\n\n\n# fmt: off', '\n\n\n# fmt: off', "baselines"),
    # -- formats/
    ("formats/authors.py", 'r if r[-1:] == [eos] else [*r, eos]', '[*r, eos]', "like_authors"),
    ("formats/authors.py", "prompt = prompt[-max_prompt_length:]", "prompt = prompt[:max_prompt_length]", "like_authors"),
    ("formats/benchmarks.py", '"math": 0.0', '"math": 0.7', "answers"),
    ("formats/candidates.py", "start = done - done % size if done < len(questions) else done", "start = done", "sample"),
    ("formats/candidates.py", "self.file.flush()", "pass", "sample answers"),
    ("formats/candidates.py", 'for stale in ("chosen", "rejected", "scores")', 'for stale in ("chosen", "rejected")', "sample::test_candidates_become_pairs"),
    ("formats/checkpoint.py", "size = math.ceil(rows / parameter.device_mesh.size(dim))", "size = rows // parameter.device_mesh.size(dim)", "model::test_sharded_load_and_save"),
    ("formats/checkpoint.py", "if size > room and groups[-1]:", "if size >= room and groups[-1]:", "model data::test_docstrings"),
    ("formats/checkpoint.py", 'path.chmod(0o644)', 'pass', "model::test_save_and_load"),
    ("formats/config.py", '2**17 if kind == "mistral" else 2048', '2048', "model checkpoint"),
    ("formats/config.py", "kv_heads = 8\n", "kv_heads = heads\n", "model"),
    ("formats/files.py", "if len(value := dict(pairs)) < len(pairs):", "if len(value := dict(pairs)) < len(pairs) - 1:", "model::test_duplicate_key data"),
    ("formats/records.py", "if len(line) == LONGEST_LINE:", "if len(line) > LONGEST_LINE:", "data::test_a_line_without_end"),
    ("formats/schemas.py", "best, worst = scores.index(max(scores)), scores.index(min(scores))", "best, worst = scores.index(min(scores)), scores.index(max(scores))", "sample::test_candidates_become_pairs"),
    ("formats/schemas.py", "sign = dict.fromkeys(RANKS, -1)", "sign = dict.fromkeys(RANKS, 1)", "schemas"),
    ("formats/tokenizer.py", "[ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids] for ids in encoded]", "[[self.bos_id, *ids] for ids in encoded]", "data::test_one_bos"),
    ("formats/errors.py", "[:2000]", "[:20000]", "model::test_error_is_one_short_line data"),
    # -- runtime/
    ("runtime/plan.py", "passes = 3 + online + baseline_pass * (1 + online)", "passes = 3 + online + baseline_pass", "plan"),
    ("runtime/plan.py", "shards=machine.gpus // settings.replicate", "shards=machine.gpus", "plan"),
    ("runtime/plan.py", "low, high = 0, most + 1", "low, high = 0, most", "plan"),
    ("runtime/processes.py", "items[len(items) * rank // world : len(items) * (rank + 1) // world]", "items[len(items) // world * rank : len(items) // world * (rank + 1)]", "fidelity train"),
    ("runtime/processes.py", "dist.ReduceOp.MAX", "dist.ReduceOp.MIN", "resume"),
    ("runtime/resume.py", "_delete(checkpoints(out)[:-keep])", "_delete(checkpoints(out)[: -keep - 1])", "resume"),
    ("runtime/resume.py", "return sorted((p for p in found if re.fullmatch(r\"step-\\d+\", p.name)), key=step_of)", "return sorted((p for p in found if re.fullmatch(r\"step-\\d+\", p.name)), key=step_of, reverse=True)", "resume"),
    ("runtime/resume.py", 'sha.update(len(array).to_bytes(8, "little") + array.tobytes())', 'sha.update(array.tobytes())', "resume"),
    ("runtime/run.py", "if every and (step + 1) % every == 0 and not last:", "if every and step % every == 0 and not last:", "train::test_simpo_learns_and_the_folder_is_whole"),
    ("runtime/run.py", "if stop or (every and (last or (step + 1) % every == 0)):", "if stop or (every and (step + 1) % every == 0):", "resume"),
    ("runtime/run.py", "self.metrics_file.flush()  # the next", "pass  # the next", "resume"),
    ("runtime/run.py", "status = 130 if isinstance(e, KeyboardInterrupt) else 1", "status = 1", "resume"),
    ("runtime/run.py", "sys.exit(signals.RESUME_ME)", "sys.exit(0)", "resume"),
    ("runtime/signals.py", "signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP", "signal.SIGTERM, signal.SIGUSR1", "ending"),
    ("runtime/settings.py", '0.999, "AdamW', '0.99, "AdamW', "train::test_defaults_are_the_paper_s"),
    ("runtime/inputs.py", "if len(refused) > settings.skip_unusable * counts", "if len(refused) >= settings.skip_unusable * counts", "fidelity"),
    ("runtime/show.py", "len(uncut) - len(ids)", "len(ids)", "show"),
    # -- study/
    ("study/analyze.py", "(counts.cumsum() - (counts - 1) / 2)[inverse]", "(counts.cumsum() - counts / 2)[inverse]", "analyze"),
    ("study/analyze.py", "float((np.sign(margins) + 1).mean() / 2)", "float((margins > 0).mean())", "analyze"),
    ("study/analyze.py", "np.tanh(differences / (differences.std() or 1.0))", "differences / (differences.std() or 1.0)", "analyze"),
    ("study/analyze.py", 'side="left"', 'side="right"', "analyze"),
    ("study/analyze.py", "indices = [start + i for i in share]", "indices = list(share)", "analyze"),
    ("study/labels.py", "differ = len({described", "differ = 1 < len({name, described", "analyze"),
    ("study/figures.py", "min(high - low) >= least *", "max(high - low) >= least *", "figures"),
    ("study/tokens.py", ".replace(\"<\", \"\\\\u003c\")", "", "tokens"),
    # -- toy/
    ("toy/evidence.py", "world.win_probability(a, b, 0, 0) for a, b in zip(scores, others)", "world.win_probability(b, a, 0, 0) for a, b in zip(scores, others)", "evidence"),
    ("toy/evidence.py", "answer[-1] in tokenizer.stop_ids", "len(answer) < 128", "evidence"),
    ("toy/evidence.py", "FEWEST = 300", "FEWEST = 301", "evidence"),
    ("toy/world.py", "% 5 == 0", "% 4 == 0", "world toy"),
    ("toy/world.py", '"repeated": -0.25', '"repeated": 0.0', "world"),
    ("toy/world.py", "if topic:\n            mentioned.add(topic)", "if topic in RIGHT:\n            mentioned.add(topic)", "world"),
    ("toy/world.py", "(score_a > score_b) + (score_a >= score_b)", "(score_a >= score_b) + (score_a >= score_b)", "world"),
    ("toy/world.py", "return max(-1.0, points / len(asked))", "return points / len(asked)", "world"),
)]
# fmt: on

if __name__ == "__main__":
    main()
