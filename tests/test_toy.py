"""The embedded default: made identically from a seed, loadable, small; and the miniature's verdicts follow from its numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import model as llama

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
sys.path.insert(0, str(TOY))

import miniature  # noqa: E402

SMALL = ("--texts=200", "--steps=4", "--prompts=12", "--held-out=6")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name in ("a", "b"):
        subprocess.run(
            [sys.executable, TOY / "make.py", "--out", tmp_path / name, *SMALL], check=True, capture_output=True
        )
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a == b
    committed = files_of(TOY / "checkpoint")
    assert a.keys() == {"train.jsonl", "heldout.jsonl"} | {f"checkpoint/{name}" for name in committed}


def test_the_committed_toy_loads():
    model, tokenizer = llama.load(TOY / "checkpoint"), data.Tokenizer(TOY / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) < 150_000
    tokenizer.check_fits(model.config.vocab_size)
    unknown = tokenizer.backend.token_to_id("<|unknown|>")
    for name, least in (("train", 1900), ("heldout", 390)):
        pairs = [data.parse_record(record, where)[1] for where, record in data.read_records(str(TOY / f"{name}.jsonl"))]
        assert len(pairs) >= least
        assert all(miniature.world.is_held_out(pair.prompt) == (name == "heldout") for pair in pairs)
        ids = tokenizer.encode_responses([response for pair in pairs for response in pair.responses])
        assert all(unknown not in response and len(response) <= miniature.make.MAX_NEW_TOKENS + 1 for response in ids)
    sizes = [path.stat().st_size for path in (*(TOY / "checkpoint").iterdir(), *TOY.glob("*.jsonl"))]
    assert sum(sizes) < 2 * 2**20


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
    finding = miniature.FINDINGS[0]
    results = [miniature.checked(claim, [seed_of(*seed) for seed in seeds]) for claim in finding.claims]
    assert miniature.verdict(results) == words
    summary, sections = miniature.findings_text(miniature.FINDINGS, [seed_of(*seed) for seed in seeds])
    assert len(summary) == len(sections) == 1 and f"**{words}**" in summary[0]  # the others need what was not measured


def test_a_judge_without_bias_does_not_see_length():
    short = miniature.Answers.judged([{"prompt": "describe the moon .", "responses": ["the moon fades away ."]}])
    closing = miniature.world.CLOSING
    long = miniature.Answers.judged(
        [{"prompt": "describe the moon .", "responses": [f"the moon fades away . {closing}"]}]
    )
    silent = miniature.Answers.judged([{"prompt": "describe the moon .", "responses": [closing]}])
    assert long.win_rate(short) == 50 and long.win_rate(silent) == 100 and silent.win_rate(short) == 0
    judged = long.under_a_biased_judge(short)
    assert judged["unbiased"] == 50 < judged["raw"]


@pytest.mark.skipif(not (TOY / "results.json").exists(), reason="no committed results")
def test_the_committed_results_say_what_their_numbers_say():
    record, text = json.loads((TOY / "results.json").read_text()), (TOY / "RESULTS.md").read_text()
    for finding in miniature.FINDINGS + miniature.OURS:
        results = [r for claim in finding.claims if (r := miniature.checked(claim, record["seeds"]))]
        assert f"### {finding.title}: {miniature.verdict(results)}\n" in text
    assert miniature.results_table(record["seeds"]) in text


def test_the_readme_quotes_lines_that_exist_and_the_committed_numbers():
    readme = (ROOT / "README.md").read_text()
    rows = [line.split(" | ") for line in readme.splitlines() if line.startswith("| Eq. ")]
    assert len(rows) == 6
    source = "".join((ROOT / name).read_text() for name in ("simpo.py", "train.py"))
    for row in rows:
        where, *code = row[2].split("`")[1::2]
        assert f"def {where}(" in source and code and all(line in source for line in code), row
        assert all((ROOT / link).exists() for link in re.findall(r"\]\((.*?)\)", row[3]))
    table = miniature.results_table(json.loads((TOY / "results.json").read_text())["seeds"])
    numbers = set(re.findall(r"[\d.]+ ± [\d.]+", readme[readme.index("## The paper in miniature") :].split("![")[0]))
    assert len(numbers) > 12 and numbers <= set(re.findall(r"[\d.]+ ± [\d.]+", table))
