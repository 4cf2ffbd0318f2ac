"""Check the embedded toy and the miniature.

The toy is made identically from a seed, loads, and is small. The miniature's verdicts follow from
its numbers.
"""

import contextlib
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
from quotes import stands_in

import make
import world
from data import batches
from formats.checkpoint import load
from formats.records import read_records
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
SMALL = ("--texts=200", "--steps=4", "--prompts=40", "--held-out=6")


# The toy.


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_same_seed_makes_the_same_files(tmp_path):
    command = [sys.executable, TOY / "make.py", *SMALL, "--out"]
    makers = [
        subprocess.Popen([*command, tmp_path / name], stdout=subprocess.DEVNULL) for name in "ab"
    ]
    assert [maker.wait() for maker in makers] == [0, 0]
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a == b
    committed = {f"checkpoint/{name}" for name in files_of(TOY / "checkpoint")}
    assert a.keys() == {"train.jsonl", "heldout.jsonl"} | committed
    # 40 prompts: a step of pairs is kept, what is left is dropped
    assert len(a["train.jsonl"].splitlines()) == make.BATCH_SIZE


def test_the_doctests_of_make():
    failed, attempted = doctest.testmod(make)
    assert failed == 0 and attempted


def test_a_log_sees_a_quarter_of_the_steps_at_a_time(capsys):
    """Only on the real stdout, whatever replaces it meanwhile."""
    milestones = make.Milestones("seed 1  ")
    with contextlib.redirect_stdout(milestones):
        for step in range(1, 63):
            print(f"step {step}/62 (3 pairs)  loss {step}.5  margin +1.1  accuracy 65.6 %")
        print("held out, after 62 steps:  loss 2.2")
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"seed 1  step {n}/62 (3 pairs)  loss {n}.5" for n in (15, 30, 45, 60)]
    assert make.milestone("step 1/2  loss 0.7  margin") and make.milestone("step 1/1  loss 0.7")


def test_surplus_pairs_are_dropped_at_the_end():
    pairs = [{"prompt": str(i)} for i in range(100)]
    assert make.whole_steps(pairs) == pairs[:96]
    assert make.whole_steps(pairs[:96]) == pairs[:96]
    assert make.whole_steps(pairs[:31]) == pairs[:31]  # less than a step is better than nothing


def test_no_step_of_the_toy_is_short():
    """Keep all steps full: a short one prints a noisy loss just before the result."""
    sizes = set(
        re.findall(r"batch.size = (\d+)", "".join(p.read_text() for p in TOY.glob("*.toml")))
    )
    assert sizes == {str(make.BATCH_SIZE)}
    count = len((TOY / "train.jsonl").read_text().splitlines())
    assert {len(step) for step in batches(count, make.BATCH_SIZE, 1, 42)} == {make.BATCH_SIZE}


def test_the_committed_toy_loads():
    model, tokenizer = load(TOY / "checkpoint"), Tokenizer(TOY / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) < 150_000
    tokenizer.check_fits(model.config.vocab_size)
    unknown = tokenizer.backend.token_to_id("<|unknown|>")
    for name, least in (("train", 1900), ("heldout", 390)):
        records = read_records(str(TOY / f"{name}.jsonl"))
        examples = [parse_record(record, where)[1] for where, record in records]
        assert len(examples) >= least
        assert all(world.is_held_out(e.prompt) == (name == "heldout") for e in examples)
        texts = [response for e in examples for response in e.responses]
        for ids in tokenizer.encode_responses(texts):
            assert unknown not in ids and len(ids) <= make.MAX_NEW_TOKENS + 1
    files = (*(TOY / "checkpoint").iterdir(), *TOY.glob("*.jsonl"))
    assert sum(path.stat().st_size for path in files) < 2 * 2**20


# The miniature.


def seed_of(simpo: float, dpo: float) -> dict:
    return {"methods": {"SimPO": {"win_rate": simpo}, "DPO": {"win_rate": dpo}}, "duels": {}}


@pytest.mark.parametrize(
    "seeds, words",
    [
        ([(60, 70), (51, 55)], "reproduced"),
        ([(60, 70), (51, 49)], "partly reproduced"),
        ([(60, 40), (51, 49)], "partly reproduced"),  # one of two claims, always
        ([(60, 40), (49, 45)], "not reproduced"),
        ([(50, 50)], "not reproduced"),  # a claim's range does not include its ends
    ],
)
def test_verdicts(seeds, words):
    finding, results = miniature.FINDINGS[0], [seed_of(*seed) for seed in seeds]
    numbers = [miniature.checked(claim, results) for claim in finding.claims]
    assert miniature.verdict(numbers) == words
    summary, sections = miniature.findings_text(miniature.FINDINGS, results)
    # the other findings need what was not measured
    assert len(summary) == len(sections) == 1 and f"**{words}**" in summary[0]


def test_a_judge_without_bias_does_not_see_length():
    closing = world.CLOSING

    def answers(response: str) -> miniature.Answers:
        record = {"prompt": "describe the moon .", "responses": [response]}
        return miniature.Answers.judged([record])

    short = answers("the moon fades away .")
    long = answers(f"the moon fades away . {closing}")
    silent = answers(closing)
    assert long.win_rate(short) == 50
    assert long.win_rate(silent) == 100 and silent.win_rate(short) == 0
    judged = long.under_a_biased_judge(short)
    assert judged["unbiased"] == 50 < judged["raw"]


@pytest.mark.skipif(not (TOY / "results.json").exists(), reason="no committed results")
def test_the_committed_results_say_what_their_numbers_say():
    """Hold RESULTS.md to what `--redraw` writes from results.json."""
    record, text = json.loads((TOY / "results.json").read_text()), (TOY / "RESULTS.md").read_text()
    for finding in miniature.FINDINGS + miniature.OURS:
        results = [
            r for claim in finding.claims if (r := miniature.checked(claim, record["seeds"]))
        ]
        assert f"### {finding.title}: {miniature.verdict(results)}\n" in text
    drawn = [name for name in miniature.CAPTIONS if (TOY / f"{name}.png").exists()]
    assert text == miniature.report(record, drawn)


def test_the_readme_quotes_lines_that_exist():
    readme = (ROOT / "README.md").read_text()
    rows = [line.split(" | ") for line in readme.splitlines() if line.startswith("| Eq. ")]
    assert len(rows) == 6
    for row in rows:
        where, *code = row[2].split("`")[1::2]
        file = code.pop(0) if code[0].endswith(".py") else "simpo.py"
        assert code and all(stands_in(line, file, where) for line in code), row
        assert all((ROOT / link).exists() for link in re.findall(r"\]\((.*?)\)", row[3]))
