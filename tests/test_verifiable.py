"""Check bench/verifiable.py: its verifier by hand, its numbers, and the whole chain on the toy."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import verifiable

import sample
import train
from runtime.settings import read_settings

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy" / "checkpoint"
FOX = "Foxes are small wild animals that live in the woods"
ITEMS = "- Foxes eat mice.\n- Foxes dig dens.\n- Foxes run fast."


def verdict(kind: str, text: str, value: str = "", finished: bool = True) -> str:
    row = {
        "prompt": "Tell me a few things about foxes.",
        "topic": "foxes",
        "kind": kind,
        "value": value,
    }
    return verifiable.problem(row, text, finished)


@pytest.mark.parametrize(
    "kind, value, passing, failing",
    [
        ("list", "", ITEMS, f"{FOX}."),
        ("list", "", f"Three facts about foxes:\n\n{ITEMS}", f"{ITEMS}\n- Foxes sleep."),
        ("list", "", ITEMS.replace("- ", "1. "), ITEMS.replace("\n", " ")),
        ("prose", "", f"{FOX}. They eat mice.", ITEMS),
        ("prose", "", f"{FOX}.", f"1. {FOX}. 2. They eat mice."),
        ("include", "winter", f"{FOX} in winter.", f"{FOX} in winters."),
        ("leave out", "in", f"{FOX[:-13]} everywhere.", f"{FOX}."),
        ("no comma", "", f"{FOX}.", f"{FOX}, and they eat mice."),
        ("comma", "", f"{FOX}, and they eat mice.", f"{FOX}."),
        ("short", "12", f"{FOX}.", f"{FOX} and fields."),
        ("long", "12", f"{FOX} and fields.", f"{FOX}."),
        ("begin", "Once upon a time", f'"Once upon a time, {FOX}."', f"Once upon the time {FOX}."),
        ("begin otherwise", "Foxes", f"Red {FOX}.", f"{FOX}."),
        ("begin otherwise", "The moon", f"The {FOX}.", f"The moon shines. {FOX}."),
        ("question", "", f"Do you know that {FOX}?", f"Why? {FOX}."),
        ("statement", "", f"{FOX}.", f"Why? {FOX}."),
    ],
)
def test_every_kind_passes_and_fails(kind, value, passing, failing):
    assert verdict(kind, passing, value) == ""
    assert verdict(kind, failing, value) == "constraint"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("Foxes.", "too short"),
        ("", "too short"),
        ("These are small wild animals that live in the woods.", "off the topic"),
        ("The firefox and the foal are small and wild animals.", "off the topic"),
        ("A fox is a fox and a fox is a fox and a fox is a fox.", "repeats itself"),
        (f"{FOX}.\n{FOX}.", "repeats itself"),
        ("Foxes without commas are small animals that live here.", "talks about the constraint"),
        ("Here is a sentence:\nFoxes are small wild animals.", "talks about the constraint"),
        ("I will Begin with foxes, which begins with an F.", "talks about the constraint"),
        ("Tell me a few things about foxes now.", "reads the prompt back"),
        (FOX, "does not end"),
        (f"{FOX}, and", "does not end"),
        (f'"{FOX}."', ""),
        (f"**{FOX}.**", ""),
    ],
)
def test_a_pass_needs_an_answer(text, problem):
    assert verdict("statement", text) == problem


def test_a_cut_answer_fails_and_an_introduction_is_no_talk():
    assert verdict("statement", f"{FOX}.", finished=False) == "cut"
    assert verdict("list", f"Here is a list:\n{ITEMS}") == ""
    assert verdict("list", f"Here is a list:\nFoxes.\n{ITEMS}") == "talks about the constraint"
    assert verdict("list", ITEMS.replace("dig dens", "eat mice")) == "repeats itself"


def test_facts_take_digits_and_whole_words():
    assert verifiable.obeys("fact", "seven 7", "There are 7 days.")
    assert verifiable.obeys("fact", "dog dogs", "A Dog barks.")
    assert not verifiable.obeys("fact", "ice", "It is nice.")


def test_prompts_stand_beside_their_opposites_and_no_topic_is_in_two_sets():
    sets = [verifiable.make_prompts(*how) for how in (("train", 3, 3), ("held-out", 1, 4))]
    for rows in (*sets, verifiable.make_prompts("tuning", 1, 3)):
        assert len({row["prompt"] for row in rows}) == len(rows)
        asked = {(row["kind"], row["topic"]) for row in rows}
        assert {(verifiable.OPPOSITE[kind], topic) for kind, topic in asked} == asked
    topics = sum(verifiable.ASK["topics"].values(), [])
    assert len(set(topics)) == len(topics)
    assert sum(row["unseen"] for row in sets[1]) == 60 and not any(r["unseen"] for r in sets[0])


def candidates(kind: str, texts: str) -> dict:
    row = {"prompt": f"{kind} {len(texts)}", "kind": kind, "topic": "foxes", "value": ""}
    return row | {"responses": texts.split("|"), "finished": [True] * (1 + texts.count("|"))}


def test_pairs_are_balanced_in_length_over_a_kind_and_its_opposite():
    """Take a pair in which the chosen response is longer where it was shorter before."""
    short = "Foxes eat mice and frogs all day"
    long = "Foxes eat mice and frogs and fruit that is old all day"
    one = candidates("comma", f"{short}, yes.|{short}.|{long}.")
    other = candidates("no comma", f"{long}, yes.|{short}.|{long}.")
    for seed in range(4):
        pairs = verifiable.make_pairs([one, other], seed, most=1)
        chosen, rejected = zip(*(pair["responses"] for pair in pairs))
        assert len(pairs) == 2 and all(pair["scores"] == [1, 0] for pair in pairs)
        size = [sum(len(verifiable.words(text)) for text in side) for side in (chosen, rejected)]
        assert abs(size[0] - size[1]) <= 2


def test_a_response_serves_once_and_keeps_its_mark():
    good, bad = "Foxes eat mice, frogs and fruit.", "Foxes eat mice and frogs all day."
    row = candidates("comma", f"{good}|{FOX}|{bad}|{good} They sleep, too.")
    row["finished"][1] = False  # cut while it was sampled
    pairs = verifiable.make_pairs([row], seed=0)
    assert [len({pair["responses"][i] for pair in pairs}) for i in (0, 1)] == [2, 2]
    assert {pair["finished"] for pair in pairs} == {(True, False), (True, True)}
    assert len(verifiable.make_pairs([row], seed=0, most=1)) == 1
    assert verifiable.make_pairs([candidates("comma", good), candidates("comma", bad)], 0) == []


class Answers:
    """Stands for a Run of a seed with these passes, [prompts, answers]."""

    def __init__(self, name: str, passed: list[list[int]]):
        self.seed, self.passed = name.rpartition("-")[2], 100.0 * np.array(passed)


def test_a_claim_is_judged_over_the_seeds_of_both():
    good, bad = [[1, 1, 1]] * 40, [[0, 0, 0]] * 40
    mixed = [[1, 0, 0], [0, 1, 0]] * 20
    runs = {"a": [Answers("a-0", bad), Answers("a-1", good)], "b": [Answers("b-1", mixed)]}
    runs["base"] = [Answers("base", mixed)]
    row = verifiable.compare(runs, "a", "b", "passed", "more")
    assert (
        row[2] == "1" and row[3].startswith("+50.0 [+3") and row[-3:] == ["20 : 0", "more", "holds"]
    )
    assert verifiable.compare(runs, "b", "a", "passed", "more")[-1] == "does not hold"
    assert verifiable.compare(runs, "b", "base", "passed", "level")[-1] == "holds"
    row = verifiable.compare(runs, "a", "base", "passed", "more")
    assert row[2] == "2" and row[-1] == "open"  # one seed gains what the other loses


def test_the_whole_study(monkeypatch, tmp_path, capsys):
    """Make all products and a report on the toy; a second run makes only what was lost."""
    few = {"train": ["the fox", "owls", "bees"], "held-out": ["moon"], "tuning": ["gate"]}
    monkeypatch.setitem(verifiable.ASK, "topics", few)
    monkeypatch.setitem(verifiable.ASK, "facts", {"Which animal barks?": "dog"})
    monkeypatch.setattr(verifiable, "KINDS", ["comma", "no comma"])
    commands = {name: how.replace("64", "12") for name, how in verifiable.COMMANDS.items()}
    monkeypatch.setattr(verifiable, "COMMANDS", commands)
    ran = []

    def verdict(row: dict, text: str, finished: bool) -> str:
        return "" if len(text) % 2 else "constraint"

    monkeypatch.setattr(verifiable, "problem", verdict)

    def in_this_process(command: list[str], check: bool, cwd: Path) -> SimpleNamespace:
        """Run a script in this process: starting Python is most of the time the toy takes."""
        ran.append(Path(command[1]).name)
        with contextlib.chdir(cwd):
            if command[1].endswith("sample.py"):
                sample.sample(sample.read_flags(command[2:]))
            else:
                train.train(read_settings([*command[2:], "--max-steps=1"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verifiable, "subprocess", SimpleNamespace(run=in_this_process))
    out, texts = tmp_path / "out", ROOT / "toy" / "heldout.jsonl"
    flags = f"--model {TOY} --texts {texts} --out {out} --seeds 0 --methods simpo dpo".split()
    monkeypatch.setattr(sys, "argv", ["verifiable.py", *flags])
    verifiable.main()
    assert ran.count("train.py") == 2 and ran.count("sample.py") == 7
    report = (out / "VERIFIABLE.md").read_text()
    assert str(tmp_path) not in report and str(TOY) not in report
    assert "| simpo-0 |" in report and "simpo − dpo" in report and "nan" not in report
    assert report.count("`python sample.py") == 7 and report.count("`python train.py") == 2
    assert (out / "verifiable.png").stat().st_size > 10_000
    assert "9 steps, about " in capsys.readouterr().out

    ran.clear()
    (out / "held-out" / "dpo-0-sampled.jsonl").unlink()
    verifiable.main()
    assert ran == ["sample.py"] and (out / "held-out" / "dpo-0-sampled.jsonl").exists()
    monkeypatch.setattr(sys, "argv", ["verifiable.py", *flags, "--tune"])
    monkeypatch.setattr(verifiable, "TRIED", {"weak": "--objective simpo --lr 1e-5"})
    verifiable.main()
    assert "| weak-0 |" in (out / "VERIFIABLE.md").read_text()


def test_the_committed_report_has_the_prose_and_settings_of_the_study():
    committed = (ROOT / "bench" / "VERIFIABLE.md").read_text()
    template = verifiable.ASK["report"]["text"]
    for part in verifiable.re.split(r"\{\w+\}", template):
        assert part.strip() in committed
    for how in verifiable.TRIED.values():
        assert how in committed
