"""Check that the benches compare like with like, and that every script explains itself.

Both sides get the same tokens and compute the same log-probabilities; ratios follow from the times.
"""

import argparse
import ast
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import best
import compare
import gpu
import limits
import mutations
import numpy as np
import peer
import pytest
import switches
import torch

import workload
from data import Pair, assign
from formats.checkpoint import load
from formats.errors import DataError
from formats.records import read_records
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer
from train import response_logps

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "checkpoint"
SCRIPTS = sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "toy").glob("*.py")])


def pairs_of(*shapes: tuple[int, int, int]) -> list[Pair]:
    """Return pairs of random tokens; shapes: tokens of prompt, chosen and rejected."""
    rng = np.random.default_rng(0)
    pairs = []
    for p, c, r in shapes:
        prompt, chosen, rejected = (rng.integers(4, 90, n) for n in (p, c, r))
        pairs.append(Pair(prompt, (chosen, rejected)))
    return pairs


# Every script explains itself.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_prints_the_docstring(script, monkeypatch, capsys):
    """Print it even without the packages that only the comparisons need."""
    for name in ("datasets", "transformers", "trl"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e:
        assert not e.code
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring and docstring.strip() in capsys.readouterr().out


@pytest.mark.parametrize("script", ["decoding", "parity"])
def test_a_missing_peer_is_one_line(script, monkeypatch):
    """Say what is missing and how to install it, not a traceback."""
    for name in ("transformers", "trl"):
        monkeypatch.setitem(sys.modules, name, None)
    flags = ["--model=a", "--prompts=b"] if script == "decoding" else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as e:
        __import__(script).main()
    assert "\n" not in str(e.value) and "bench/requirements.txt" in str(e.value)


# Pairs and checkpoints to compare on.


@pytest.mark.parametrize("shape", workload.SHAPES)
def test_made_up_pairs_have_the_lengths_of_the_known_set(shape):
    median, ratio = workload.SHAPES[shape]
    lengths = workload.shape_lengths(shape, 20000, seed=1)
    prompt, chosen, rejected = np.median(lengths, axis=0)
    assert prompt / chosen == pytest.approx(ratio, rel=0.03)
    assert chosen == pytest.approx(rejected, rel=0.03)
    assert prompt + chosen == pytest.approx(median, rel=0.03)
    assert (lengths[:5] == workload.shape_lengths(shape, 20000, seed=1)[:5]).all()


def test_made_up_pairs_become_as_many_tokens_as_were_asked_for(tmp_path):
    tokenizer = Tokenizer(TOY, "")
    lengths = np.array([[5, 9, 2], [30, 3, 40]])
    records = workload.shaped_records(tokenizer, lengths, seed=0)
    assert len(workload.tokenized(records, 1, tokenizer, 100, 80)[1]) == 1
    kept, many = workload.tokenized(records, 3, tokenizer, 100, 80)
    assert kept == records and len(many) == 2
    pairs = workload.write_pairs(kept, many, 2, tmp_path / "pairs.jsonl")
    bos = tokenizer.bos_id is not None
    found = [[len(pair.prompt), *map(len, pair.responses)] for pair in pairs]
    assert found == [[p + bos, c, r] for p, c, r in lengths]
    read = read_records(str(tmp_path / "pairs.jsonl"))  # as train.py does
    prompts = [parse_record(record, where)[1].prompt for where, record in read]
    assert prompts == [record["prompt"] for record in records]
    with pytest.raises(DataError, match="only 2 usable pairs"):
        workload.write_pairs(kept, many, 3, tmp_path / "pairs.jsonl")


def test_a_random_checkpoint_can_be_trained(tmp_path):
    """Make new weights from the shape alone; the loss is near what chance gives."""
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    workload.random_checkpoint(tmp_path / "model", workload.MODELS["smollm2-135m"] | small)
    model, tokenizer = load(tmp_path / "model"), Tokenizer(tmp_path / "model", "")
    tokenizer.check_fits(model.config.vocab_size)
    assert model.config.rope_theta == 100000.0 and model.model.norm.weight.eq(1).all()
    deviation = model.model.layers[1].mlp.up_proj.weight.float().std().item()
    assert deviation == pytest.approx(0.02, rel=0.05)
    logps, lengths = response_logps(model, pairs_of((7, 5, 3), (2, 1, 11)))
    assert (logps / lengths).mean().item() == pytest.approx(-np.log(1000), rel=0.02)


# What each side computes.


def test_padded_rows_by_hand():
    """Pad to 2 + 11 tokens, the longest of two pairs; the third, alone, has 12 + 4."""
    rows = compare.padded(pairs_of((7, 5, 3), (2, 1, 11), (12, 4, 4)), microbatch=2)
    assert [row.tokens for row in rows] == [13] * 4 + [16] * 2
    # all of it meets the vocabulary
    assert sum(len(r) for row in rows for r in row.responses) == 4 * 13 + 2 * 16


def test_peak_is_of_what_is_allocated_at_once():
    def work() -> None:
        kept = torch.empty(2**20)
        torch.empty(2**21)  # freed at once
        (kept + 1).sum()
        kept.exp().log()  # both, beside what they are made from

    assert limits.peak_bytes("cpu", work) == pytest.approx(3 * 4 * 2**20, rel=1e-3)


@pytest.mark.parametrize("check", ["vocabulary", "tokens", "data"])
def test_limits_print_a_line(check, monkeypatch, capsys):
    monkeypatch.setattr(limits, "SMALL", limits.Config(97, 24, 32, 1, 3, 1, 8))
    monkeypatch.setattr(sys, "argv", ["limits.py", check, "--tokens=2048", "--device=cpu"])
    limits.main()
    assert "2048 tokens" in capsys.readouterr().out


def test_every_switch_computes_the_same_log_probabilities():
    model = load(TOY)
    pairs = pairs_of((7, 5, 3), (2, 1, 11), (12, 4, 4))
    # One pair by another way: one response at a time, without padding.
    first, expected = pairs[0], switches.rectangle(model, pairs[:1])
    singles = [Pair(first.prompt, (response, response)) for response in first.responses]
    alone = torch.stack([switches.rectangle(model, [single])[0, 0] for single in singles])
    torch.testing.assert_close(expected[0], alone)
    expected = switches.rectangle(model, pairs)
    for name, logps in switches.VARIANTS.items():
        torch.testing.assert_close(
            logps(model, pairs), expected, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_budget_is_the_least_that_takes_no_more_passes():
    pairs = pairs_of(*[(20, n, 2 * n) for n in (10, 30, 60, 20, 25, 90, 40, 15)])
    budget = compare.microbatch_tokens(pairs, batch_size=4, microbatch=2)

    def passes(budget: int) -> list[int]:
        steps = ([pair.tokens for pair in pairs[i : i + 4]] for i in (0, 4))
        return [len(assign(step, 1, budget)) for step in steps]

    assert max(passes(budget)) == 2 and max(passes(budget - 64)) == 3


def test_the_peer_is_told_to_predict_responses_alone():
    row = peer.cpo_row({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})
    assert row["rejected_input_ids"] == [1, 2, 4, 5]
    assert row["rejected_labels"] == [-100, -100, 4, 5]
    assert row["chosen_labels"] == [-100, -100, 3]
    assert row["chosen_attention_mask"] == [1, 1, 1]


# The comparison.


def flags_of(**changes) -> argparse.Namespace:
    flags = {"batch_size": 1, "rounds": 2, "dtype": "fp32", "device": "cpu", "peer": "trl"}
    return argparse.Namespace(model=TOY, **flags | changes)


def test_the_table_follows_from_the_times(monkeypatch):
    """Leave out the first step, however slow. A pair has 10 response tokens."""
    monkeypatch.setattr(compare, "gemm_flops", lambda *_: 1e9)
    ours = iter([[9.0, 1.0, 1.0], [9.0, 2.0, 2.0]])  # seconds per step

    def run(seconds: list[float], peak: float, loss: float) -> dict:
        return {"seconds": seconds, "peak_gib": peak, "loss": loss, "logps": [-1.0, -2.0]}

    contenders = [
        compare.Contender("A", lambda _: run(next(ours), 1.0, 0.5)),
        compare.Contender("B", lambda _: run([1.0, 4.0, 4.0], 2.0, 0.55)),
        compare.Contender("C", lambda _: {"unavailable": "no such device"}),
    ]
    pairs = pairs_of((5, 6, 4), (5, 6, 4), (5, 6, 4))
    table = compare.compare(flags_of(), pairs, contenders, [(0, 1), (0, 2)])
    assert "| A | 0.7500 (0.5000–1.0000) | 8 | 1.00 (1.00–1.00) |" in table
    speed, time = "pairs/s × 3.00 (2.00–4.00)", "time × 0.38 (0.25–0.50)"
    assert f"A : B: {speed}, {time}, memory × 0.50 (0.50–0.50)" in table
    assert "at step 1 losses differ by 9e-02, log-probabilities by 0e+00" in table
    assert "THE SIDES DO NOT COMPUTE THE SAME" in table
    assert "not run: no such device" in table and "A : C" not in table


@pytest.mark.parametrize("objective, given", [("simpo", False), ("dpo", True)])
def test_only_an_objective_with_a_reference_is_given_one(objective, given, monkeypatch, tmp_path):
    """Leave the flag out for any other, since train.py refuses it."""
    started = []

    def start(script: Path, *arguments: str, **_) -> str:
        started.extend(arguments)
        (tmp_path / "run").mkdir()
        row = '{"pairs_per_second": 1, "loss": 1, "peak_memory_gib": 1, '
        row += ", ".join(
            f'"{kind}/{name}": 1'
            for kind in ("logps", "avg_logps")
            for name in ("chosen", "rejected")
        )
        (tmp_path / "run" / "metrics.jsonl").write_text(row + "}\n")
        return ""

    monkeypatch.setattr(compare, "start", start)
    flags = flags_of(max_length=64, microbatch_tokens=64, shape=None, activation_checkpointing=True)
    compare.our_run(flags, tmp_path / "pairs.jsonl", objective, "cached", "", tmp_path)
    assert ("--reference=cached" in started) is given


# The search for each side's best. Made-up speeds; memory is the sum of what the settings take.


def search(speeds: dict[str, float], *axes: str) -> best.Search:
    """Return a search over letters: a setting takes as many GiB as its letter's place in the axis.

    speeds: by the settings' letters; all others are slow, and stopped where there is a rival.
    """

    def measure(settings: tuple, rival: list[float]) -> dict:
        peak = sum(axis.index(value) for axis, value in zip(axes, settings))
        speed = speeds.get("".join(settings), 0.1)
        if speed == 0.1 and rival:
            return {"unavailable": "it is clearly slower", "peak_gib": 0.5}
        return {"pairs": speed, "peak_gib": float(peak), "ends": [1.0]}

    return best.Search([list(axis) for axis in axes], measure)


def test_the_search_finds_the_fastest_within_each_limit_and_repeats_nothing():
    speeds = {"Aa": 1.0, "Ba": 1.2, "Ca": 1.3, "Cb": 1.5, "Db": 1.6, "Da": 1.1}
    found = search(speeds, "ABCD", "abc")
    assert found.settings(found.fastest((0, 0), 2)) == ("C", "a")
    few = set(found.runs)
    assert len(few) == 6  # Aa Ba Ca, then Da and Cb pass the limit, as does less of the other axis
    assert found.settings(found.fastest((2, 0), 9)) == ("D", "b")
    assert few < set(found.runs) and (3, 2) in found.runs


def test_a_step_that_does_not_fit_gives_up_another_setting():
    found = search({"Ab": 1.0, "Ba": 1.4, "Aa": 0.9, "Bb": 2.0}, "AB", "ab")
    assert found.settings(found.fastest((0, 1), 1)) == ("B", "a")


def test_a_start_that_does_not_fit_is_lowered_until_it_does():
    found = search({"Aa": 1.0, "Ba": 1.2, "Ca": 1.4}, "ABC", "ab")
    assert found.settings(found.fastest((2, 1), 1)) == ("B", "a")
    assert (0, 0) in found.runs and (2, 0) in found.runs
    assert found.fastest((2, 1), -1) is None


def test_nothing_runs_that_holds_more_than_what_did_not_fit():
    speeds = {a + b: 1.0 + i for i, (a, b) in enumerate(zip("ABCD" * 4, "aaaabbbbccccdddd"))}
    found = search(speeds, "ABCD", "abcd")
    found.fastest((1, 1), 1)
    found.fastest((3, 3), 1)
    assert (1, 1) in found.runs
    assert not {(3, 3), (2, 3), (1, 3), (0, 3)} & set(found.runs)


def test_a_search_within_less_memory_learns_from_one_within_more():
    """The way to Ac leads over Bc, which takes more than Ac does."""
    found = search({"Ba": 1.0, "Aa": 0.8, "Ca": 0.9, "Bb": 0.9, "Bc": 1.4, "Ac": 1.6}, "ABC", "abc")
    assert found.settings(found.fastest((1, 0), 2)) == ("B", "a")
    assert found.settings(found.fastest((1, 0), 9)) == ("A", "c")
    assert found.settings(found.fastest((1, 0), 2)) == ("A", "c")


def test_a_side_that_does_not_run_is_no_best():
    missing = {"unavailable": "no such package", "peak_gib": 0.0}
    assert best.Search([[1, 2]], lambda *_: missing).fastest((0,), 9) is None


def test_noise_is_no_reason_to_take_more_memory():
    found = search({"A": 1.0, "B": 1.01, "C": 1.015, "D": 1.5}, "ABCD")
    assert found.fastest((0,), 9) == (0,)
    assert (3,) not in found.runs


def test_a_step_that_changes_little_hides_no_better_one():
    found = search({"A": 1.0, "B": 1.01, "C": 1.5}, "ABC")
    assert found.fastest((0,), 1) == (0,)
    assert found.fastest((0,), 9) == (2,)
    assert search({"A": 1.0, "C": 1.5}, "ABC").fastest((0,), 9) == (0,)  # B is clearly slower


@pytest.mark.parametrize(
    "rival, most_gib, seconds, reason",
    [
        ([], 99, 100.0, None),
        ([90.0, 150.0], 99, 90.0, None),  # in time: 1.05 × 90 s and 2 s
        ([50.0, 150.0], 99, 60.0, "clearly slower"),  # its first step still runs
        ([], 1e-6, 1.0, "more than 0.00 GiB"),
    ],
)
def test_a_run_is_stopped_when_its_outcome_is_clear(
    rival, most_gib, seconds, reason, monkeypatch, tmp_path
):
    watch = best.Watch(most_gib, rival)
    monkeypatch.setattr(best.time, "perf_counter", lambda: watch.started + seconds)
    monkeypatch.setattr(best, "peak_resident", lambda pid: 2**27)
    if reason is None:
        return watch.look(1, tmp_path / "steps")
    with pytest.raises(best.Stopped, match=reason):
        watch.look(1, tmp_path / "steps")


def test_ends_are_those_of_the_lines_so_far(monkeypatch, tmp_path):
    watch, now = best.Watch(99, [10.0, 20.0]), iter([9.0, 12.0, 23.5])
    monkeypatch.setattr(best.time, "perf_counter", lambda: watch.started + next(now))
    for lines in ("x\n", "x\nhalf"):
        (tmp_path / "steps").write_text(lines)
        watch.look(os.getpid(), tmp_path / "steps")
    assert watch.ends == [9.0] and watch.peak_gib > 0.01
    with pytest.raises(best.Stopped, match="slower"):
        watch.look(os.getpid(), tmp_path / "steps")


def test_a_stopped_process_is_gone(tmp_path):
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)\n")
    watch = best.Watch(1e-6, [])
    with pytest.raises(best.Stopped):
        compare.start(tmp_path / "sleep.py", watch=watch, steps=tmp_path / "steps")
    (tmp_path / "fail.py").write_text("raise MemoryError\n")
    with pytest.raises(SystemExit, match="MemoryError"):
        compare.start(tmp_path / "fail.py", watch=best.Watch(99, []), steps=tmp_path / "steps")


def test_best_compares_the_fastest_of_both_sides(monkeypatch, tmp_path):
    """Within the memory of TRL's best and at any; the starts are one pair and 4,096 tokens."""
    monkeypatch.setattr(compare, "gemm_flops", lambda *_: 1e9)

    def ran(speed: float, peak: float) -> dict:
        return {"seconds": [9.0, 1 / speed], "peak_gib": peak, "loss": 0.5, "logps": [-1.0, -2.0]}

    def trl(flags, pairs, padding_free, folder, watch=None) -> dict:
        kept = not flags.activation_checkpointing
        return ran(2.0 + kept - 0.5 * flags.microbatch, 3.0 + kept * flags.microbatch)

    def ours(flags, pairs_file, objective, reference, more, folder, watch=None) -> dict:
        place = [flag in more for flag in compare.KEPT.values()].index(True)
        return ran(4.0 + place, 2.0 + 0.9 * place)

    monkeypatch.setattr(compare, "trl_run", trl)
    monkeypatch.setattr(compare, "our_run", ours)
    changes = {"memory_cap": 9.0, "microbatch": 1, "microbatch_tokens": 4096, "ours": [""]}
    changes |= {"objective": "simpo", "reference": "online", "rounds": 1}
    flags = flags_of(**changes)
    pairs = pairs_of((5, 6, 4), (5, 6, 4))
    contenders, comparisons, tried = compare.best_of_each(flags, tmp_path / "pairs.jsonl", pairs)
    names = [contender.name for contender in contenders]
    assert names == [
        "this project, 2,048 tokens per pass, all products kept",
        "this project, 2,048 tokens per pass, no checkpointing",
        "TRL, 1 pair per pass, no checkpointing",
    ]
    table = compare.compare(flags, pairs, contenders, comparisons)
    assert f"{names[0]} : {names[2]}: pairs/s × 2.40" in table
    assert f"{names[1]} : {names[2]}: pairs/s × 2.80" in table
    assert len(tried) == len(set(tried)) == 6


# On a GPU.


def test_every_part_for_a_gpu_runs_to_its_end(tmp_path):
    """On a CPU with a tiny model; what is not here is said and skipped."""
    command = [sys.executable, ROOT / "bench" / "gpu.py", "all", "--tiny", f"--out={tmp_path}/r"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and "failed: none" in ran.stdout, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    by_part = {part: [row for row in rows if row["part"] == part] for part in gpu.PARTS}
    for part, found in by_part.items():
        assert [row["name"] for row in found][:: len(found) - 1] == ["machine", "part"], part
        assert not any("failed" in row for row in found)
        skipped = [row["skipped"] for row in found if "skipped" in row]
        assert bool(skipped) == (part in ("tests", "8b") or (part == "trl" and "TRL" in skipped[0]))
    speeds = [row for row in rows if "pairs_per_second" in row]
    assert len(speeds) == 5 and all(row["peak_memory_gib"] > 0.1 for row in speeds)
    planned = [row["planned_gib"] / row["peak_memory_gib"] for row in rows if "planned_gib" in row]
    assert len(planned) == 2 and all(0.5 < ratio < 2 for ratio in planned)
    [killed] = [row for row in by_part["killed"] if "statuses" in row]
    assert killed["statuses"] == [1, -9] and 0 < killed["seconds"] < 30


def test_a_measurement_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    """A script with another status, a deaf one that hangs, no time left, and a part that raises."""
    script = tmp_path / "script.py"
    deaf = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script.write_text(f"{deaf}time.sleep(float(sys.argv[1]))\nraise OSError('no disk')")

    def part(bench: gpu.Bench) -> None:
        bench.measure("status", lambda: {"said": bench.run(script, "0")})
        bench.began = time.time() - gpu.LIMIT * 7 / 8 + 0.1
        bench.measure("hangs", lambda: {"said": bench.run(script, "99")})
        bench.measure("late", lambda: {"said": bench.run(script, "0")})
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(gpu.PARTS, "part", part)
    monkeypatch.setattr(gpu, "LIMIT", 4)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu.Bench, "tool", lambda *_: {})
    with pytest.raises(ZeroDivisionError):
        gpu.one_part("part", tmp_path / "r", tiny=False)
    rows = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    said = {row["name"]: row.get("failed") for row in rows}
    assert "status 1 after" in said["status"] and "OSError: no disk" in said["status"]
    assert "status -9 after" in said["hangs"] and "not started" in said["late"]
    assert said["part"] == "ZeroDivisionError: a bug" and said["machine"] is None
    gpu.summary(tmp_path / "r")
    assert "late: failed not started" in capsys.readouterr().out


# Mutations.


def test_every_mutation_applies():
    """A line that changed takes its mutations along: the error names the file and the old text."""
    for mutation in mutations.MUTATIONS:
        assert mutation.old != mutation.new and mutations.mutated(mutation)
        for test in map(mutations.target, mutation.tests.split()):
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / file).read_text()
    assert len({mutation.key for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS) > 85
    with pytest.raises(SystemExit, match="simpo.py: stands 0 times, not once: 'not there'"):
        mutations.mutated(mutations.Mutation("simpo.py", "not there", "", "simpo"))


def test_a_mutation_is_killed_and_its_tree_restored(tmp_path):
    """The result names the failing test, and one that passes kills nothing."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "half.py").write_text("def half(x):\n    return x / 2\n")
    tests = "import sys\nsys.path.insert(0, '.')\nfrom half import half\n"
    tests += "def test_right(): assert half(4) == 2\ndef test_zero(): assert half(0) == 0\n"
    (tmp_path / "tests" / "test_half.py").write_text(tests)
    # In a process of its own: a fork of this one, which has threads, might wait for ever.
    code = "import mutations, pathlib, sys; tree = pathlib.Path(sys.argv[1])\n"
    code += "wrong = mutations.Mutation('half.py', 'x / 2', 'x // 3', 'half')\n"
    code += "for name in ('half', 'half::test_zero'):\n"
    code += "    print(mutations.verdict(wrong, tree, [mutations.target(name)], 60))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"cwd": ROOT / "bench", "capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(command, check=True, **options)
    assert done.stdout.splitlines() == ["tests/test_half.py::test_right", "None"]
    assert (tmp_path / "half.py").read_text() == "def half(x):\n    return x / 2\n"
