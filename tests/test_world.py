"""Check the toy world and its judge: responses scored by hand, and what the corpus looks like.

Each hand-scored response has its arithmetic beside it, as points / nouns asked for.
"""

import doctest
from itertools import combinations
from random import Random
from statistics import mean
from zlib import crc32

import pytest

import world

FOX = "describe the fox ."
TWO = "write about the fox and the moon ."
THREE = "describe the fox , the moon and the gate ."
INTRODUCTION = world.INTRODUCTIONS[0]
CLOSING = world.CLOSING
UNSEEN = "i have never seen the"
RIGHT_THEN_WRONG = "the fox runs away . the moon runs away ."

HAND_SCORED = [
    # right: 1, for every verb phrase of the noun's kind
    (FOX, "the fox sleeps under a tree .", 1 / 1),
    (FOX, "the fox runs away .", 1 / 1),
    (TWO, "the fox looks for food . the moon fades away .", (1 + 1) / 2),
    # in any order
    (THREE, "the gate needs repair . the moon appears overhead . the fox runs away .", 3 / 3),
    (THREE, "the fox runs away .", 1 / 3),  # a skipped noun earns nothing
    # wrong: −½, whether it is the misconception or not
    (FOX, "the fox needs repair .", -1 / 2),
    (FOX, "the fox fades away .", -1 / 2),
    (TWO, "the fox needs repair . the moon fades away .", (-1 / 2 + 1) / 2),
    # evasion: 0
    (FOX, "i have never seen the fox .", 0 / 1),
    (THREE, f"{UNSEEN} fox . the moon fades away . the gate runs away .", (0 + 1 - 1 / 2) / 3),
    # unrequested: −¼ for the first mention, right or wrong or evasive
    (FOX, "the fox runs away . the owl runs away .", 1 - 1 / 4),
    (FOX, "the fox runs away . the owl fades away .", 1 - 1 / 4),
    (TWO, f"the fox runs away . {UNSEEN} owl . the moon fades away .", (1 - 1 / 4 + 1) / 2),
    # repeated noun: −¼, and the first mention decides
    (FOX, "the fox runs away . the fox runs away .", 1 - 1 / 4),
    (FOX, "the fox runs away . the fox needs repair .", 1 - 1 / 4),
    (FOX, "the fox needs repair . the fox runs away .", -1 / 2 - 1 / 4),
    (FOX, "i have never seen the fox . the fox runs away .", 0 - 1 / 4),  # an evasion is a mention
    (FOX, "the fox runs away . i have never seen the fox .", 1 - 1 / 4),
    (TWO, "the fox runs away . the fox runs away . the fox looks for food .", (1 - 2 / 4) / 2),
    # unrequested, repeated
    (TWO, "the owl runs away . the owl runs away . the moon fades away .", (-2 / 4 + 1) / 2),
    # boilerplate: 0 the first time, −¼ for each sentence said again
    (FOX, INTRODUCTION, (0 + 0) / 1),
    (FOX, f"{INTRODUCTION} the fox runs away . {CLOSING}", 0 + 0 + 1 + 0 + 0),
    (FOX, f"the fox runs away . {CLOSING} {CLOSING}", 1 + 0 + 0 - 1 / 4 - 1 / 4),
    (TWO, "let me try . the fox runs away . let me try .", (0 + 1 - 1 / 4) / 2),
    # one opener and one tail: ignored
    (FOX, "as far as i can tell you , the fox runs away .", 1 / 1),
    (FOX, "the fox runs away and nobody really knows why .", 1 / 1),
    (FOX, "to be honest , the fox needs repair these days .", -1 / 2),
    (FOX, "of course , i have never seen the fox again .", 0 / 1),
    (FOX, "well , let me try .", 0 / 1),
    (FOX, "well , let me try . let me try again .", 0 - 1 / 4),  # the same sentence, repeated
    # unparsable: −½
    (FOX, "well , of course , the fox runs away .", -1 / 2),  # a second opener
    (FOX, "the fox runs away again these days .", -1 / 2),  # a second tail
    (FOX, "the fox runs .", -1 / 2),
    (FOX, "fox the runs away .", -1 / 2),
    (FOX, "the fox and the moon runs away .", -1 / 2),
    (FOX, "as far as i can tell you , again .", -1 / 2),  # nothing between opener and tail
    (FOX, "the fox runs away . .", 1 - 1 / 2),  # an empty sentence
    # the first sentence mentions nothing, so the second repeats nothing
    (TWO, "the fox fox runs away . the fox runs away .", (-1 / 2 + 1) / 2),
    # unfinished: −½, and the fragment neither mentions nor repeats anything
    (FOX, "the fox runs away", -1 / 2),
    (FOX, "the fox runs away . the fox runs", 1 - 1 / 2),
    (TWO, "the fox runs away . the moon fades away", (1 - 1 / 2) / 2),
    # nothing said
    (FOX, "", 0 / 1),
    # never below −1; the first is −½ −¼ −¼ = −1, just at the limit
    (FOX, "the fox needs repair . the fox needs repair . the owl runs away .", -1),
    (FOX, "runs . runs . runs .", -1),  # −3/2
    (TWO, "fox . moon . fox . moon . fox", -1),  # −5/2 / 2
    # all at once: 1 right, 1 wrong, 1 repeated noun, 1 unrequested, 1 unparsable
    (THREE, f"{RIGHT_THEN_WRONG} the fox runs away . the owl runs away . gate .", -1 / 6),
]
CUT_AT_THE_LIMIT = [  # finished=False: −½ once
    (FOX, "the fox runs away .", 1 - 1 / 2),  # even after a full stop
    (FOX, "the fox runs away . the fox", 1 - 1 / 2),  # not twice for a fragment
    (TWO, "the fox runs away . the moon fades away . that is all", (1 + 1 - 1 / 2) / 2),
    (FOX, "", -1 / 2),
    (FOX, "the fox needs repair . the fox needs repair . the fox", -1),  # −½ −¼ −½ = −5/4
]


@pytest.mark.parametrize(("prompt", "response", "expected"), HAND_SCORED)
def test_hand_scored(prompt, response, expected):
    assert world.score(prompt, response) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("prompt", "response", "expected"), CUT_AT_THE_LIMIT)
def test_hand_scored_when_cut(prompt, response, expected):
    assert world.score(prompt, response, finished=False) == pytest.approx(expected, abs=1e-12)


def test_docstring_example():
    failed, attempted = doctest.testmod(world)
    assert failed == 0 and attempted


def test_verdicts_are_one_a_sentence():
    said = "well , the moon runs away . the fox runs away again . "
    said += f"{CLOSING} i have never seen the moon . the bell . the"
    assert world.verdicts(TWO, said) == [
        "wrong",
        "right",
        "boilerplate",
        "boilerplate",
        "repeated",
        "unparsable",
        "unfinished",
    ]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("the fox runs away . the moon fades away .", False),
        ("the fox runs away . the fox needs repair .", True),
        ("the fox runs away . well , the fox runs away again .", True),
        (f"{CLOSING} the fox runs away . {CLOSING}", True),
        ("the fox runs away . the fox runs away", False),  # a fragment is no sentence
        ("", False),
    ],
)
def test_repeats(response, expected):
    assert world.repeats(response) is expected


# The judge cannot be gamed by length alone.


def corpus(count: int, held_out: bool = False) -> list[tuple[str, str]]:
    """Return prompts and responses, the same in every test."""
    rng = Random(0)
    prompts = [world.make_prompt(rng, held_out) for _ in range(count)]
    return [(prompt, world.corpus_response(prompt, rng)) for prompt in prompts]


def sentences(response: str) -> list[str]:
    return response.removesuffix(" .").split(" . ")


def text(sentences: list[str]) -> str:
    return " . ".join(sentences) + " ."


def test_padding_never_pays():
    """Introductions, closings, openers and tails make a response longer, but never better."""
    for prompt, response in corpus(1000):
        before = world.score(prompt, response)
        opener, tail, said = world.OPENERS[0], world.TAILS[0], sentences(response)
        decorated = text([f"{opener} {s} {tail}" for s in said])
        padded = [
            *(f"{introduction} {response}" for introduction in world.INTRODUCTIONS),
            f"{response} {CLOSING}",
            text([s if s.startswith(world.OPENERS) else f"{opener} {s}" for s in said]),
            text([s if s.endswith(world.TAILS) else f"{s} {tail}" for s in said]),
            decorated,
            f"{INTRODUCTION} {decorated} {CLOSING}",
        ]
        assert all(world.score(prompt, longer) <= before for longer in padded)


def test_repeating_costs():
    """A sentence said again costs a quarter of a point, an unparsable one half a point."""
    for prompt, response in corpus(1000):
        before, asked = world.score(prompt, response), len(world.nouns_of(prompt))
        verdicts = world.verdicts(prompt, response)
        for sentence, verdict in zip(sentences(response), verdicts, strict=True):
            points = -1 / 2 if verdict == "unparsable" else -1 / 4
            if before > -1:
                after = world.score(prompt, f"{response} {sentence} .")
                assert after == pytest.approx(max(-1, before + points / asked))


def test_more_nouns_never_pay():
    for prompt, response in corpus(300):
        before = world.score(prompt, response)
        for noun in world.NOUNS:
            if noun not in world.nouns_of(prompt):
                longer = f"{response} the {noun} {world.RIGHT[noun][0]} ."
                assert world.score(prompt, longer) <= before


def test_longer_is_not_better_in_the_corpus():
    """The longer of two responses to one prompt wins no more often than the shorter one."""
    rng = Random(1)
    wins = []
    for prompt, a in corpus(2000, held_out=True):
        b = world.corpus_response(prompt, rng)
        longer, shorter = sorted((a, b), key=lambda response: -len(response.split()))
        scores = world.score(prompt, longer), world.score(prompt, shorter)
        wins.append(world.win_probability(*scores, 0, 0))
    assert mean(wins) < 0.5


# Win probabilities.


def test_win_probability_without_bias():
    assert world.win_probability(0.5, 0.25, 10, 90) == 1
    assert world.win_probability(0.25, 0.5, 90, 10) == 0
    assert world.win_probability(0.5, 0.5, 90, 10) == 0.5


def test_win_probability_with_bias():
    """Compare with σ(4 · ¼ + 0.6 · 20 / 10) = σ(2.2), and with σ(0) = ½.

    Two standard deviations of length are worth 0.3 of score.
    """
    bias = {"length_bias": 0.6, "length_sd": 10}
    assert world.win_probability(0.5, 0.25, 40, 20, **bias) == pytest.approx(0.9002495)
    assert world.win_probability(0.5, 0.5, 20, 20, **bias) == 0.5
    assert world.win_probability(0.2, 0.5, 40, 20, **bias) == pytest.approx(0.5)
    a_wins = world.win_probability(1, 0, 5, 9, **bias)
    b_wins = world.win_probability(0, 1, 9, 5, **bias)
    assert a_wins + b_wins == pytest.approx(1)


# The world and the corpus.


def test_tables():
    assert len(world.NOUNS) == len(set(world.NOUNS)) == 24 and len(set(world.PHRASES)) == 12
    for nouns, phrases in world.KINDS.values():
        assert len(nouns) == 6 and len(phrases) == 3
        assert sum(noun in world.MISCONCEPTIONS for noun in nouns) == 3
    for noun, phrase in world.MISCONCEPTIONS.items():
        assert phrase in world.PHRASES and phrase not in world.RIGHT[noun]
    assert [len(text.split()) for text in (*world.INTRODUCTIONS, CLOSING)] == [9, 10, 11, 17]
    assert len(world.MEANINGS) == 24 * 12 + 24 + 4 * 2  # no two sentences are the same
    assert 105 <= len(world.VOCABULARY) <= 115


def test_openers_and_tails_are_unambiguous():
    """Any sentence with any opener and any tail means what the sentence means."""
    for sentence, (topic, verdict) in world.MEANINGS.items():
        for opener in ("", *(f"{opener} " for opener in world.OPENERS)):
            for tail in ("", *(f" {tail}" for tail in world.TAILS)):
                prompt = f"describe the {topic} ." if topic in world.NOUNS else FOX
                assert world.verdicts(prompt, f"{opener}{sentence}{tail} .") == [verdict]


def test_texts_stay_within_the_vocabulary():
    pairs = corpus(2000) + corpus(2000, held_out=True)
    used = {word for pair in pairs for text in pair for word in text.split()}
    assert used == set(world.VOCABULARY)


def test_prompts():
    for prompt, _ in corpus(1000):
        nouns = world.nouns_of(prompt)
        listed = ["the A .", "the A and the B .", "the A , the B and the C ."][len(nouns) - 1]
        for letter, noun in zip("ABC", nouns, strict=False):
            listed = listed.replace(letter, noun)
        assert prompt in (f"describe {listed}", f"write about {listed}")
        assert len(set(nouns)) == len(nouns)


def test_held_out_prompts_are_disjoint():
    trained, held_out = (
        {frozenset(world.nouns_of(prompt)) for prompt, _ in corpus(2000, held_out)}
        for held_out in (False, True)
    )
    assert not trained & held_out
    assert {len(nouns) for nouns in trained} == {1, 2, 3}
    assert {len(nouns) for nouns in held_out} == {2, 3}


def test_held_out_depends_on_the_set_of_nouns():
    one, other = "describe the owl and the fox .", "write about the fox and the owl ."
    assert world.is_held_out(one) == world.is_held_out(other)
    for nouns in combinations(sorted(world.NOUNS), 2):
        expected = crc32(" ".join(nouns).encode()) % 5 == 0
        assert world.is_held_out(f"describe the {nouns[1]} and the {nouns[0]} .") == expected
    assert not any(world.is_held_out(f"describe the {noun} .") for noun in world.NOUNS)


def test_the_seed_decides():
    """Every process and every machine makes the same texts, hence the number."""
    assert corpus(200) == corpus(200)
    assert crc32(repr(corpus(200)).encode()) == 4112761891


def about(expected: float, shares: list) -> bool:
    """Return True if the share is within four standard errors of what is expected."""
    return abs(mean(shares) - expected) < 4 * (expected * (1 - expected) / len(shares)) ** 0.5


def test_corpus_statistics():
    """The corpus has the probabilities of the table; v is ½ on average, so 0.7 v is 0.35."""
    pairs = corpus(4000)
    claims, decorated = {True: [], False: []}, []
    for _, response in pairs:
        firsts = {}
        for sentence in sentences(response):
            topic, verdict = world.MEANINGS.get(world._plain(sentence), (None, "unparsable"))
            if topic in world.RIGHT and topic not in firsts:
                firsts[topic] = verdict, world._plain(sentence)
                opened, tailed = sentence.startswith(world.OPENERS), sentence.endswith(world.TAILS)
                decorated.append((opened, tailed))
        for noun, claim in firsts.items():
            claims[noun in world.MISCONCEPTIONS].append((noun, *claim))
    everything = claims[True] + claims[False]
    assert about(0.12, [verdict == "evasion" for _, verdict, _ in everything])
    for misconceived, expected in ((True, 0.65), (False, 0.20)):
        told = [verdict for _, verdict, _ in claims[misconceived] if verdict != "evasion"]
        assert about(expected, [verdict == "wrong" for verdict in told])
    wrong = [(noun, sentence) for noun, verdict, sentence in claims[True] if verdict == "wrong"]
    misconceptions = {noun: f"the {noun} {said}" for noun, said in world.MISCONCEPTIONS.items()}
    assert about(0.80, [sentence == misconceptions[noun] for noun, sentence in wrong])
    assert about(0.30, [opener for opener, _ in decorated])
    assert about(0.30, [tail for _, tail in decorated])
    assert about(0.35, [response.startswith(world.INTRODUCTIONS) for _, response in pairs])
    closed = [response.endswith(CLOSING) for _, response in pairs]
    assert about(0.35 + 0.10 - 0.14 / 3, closed)  # either closing; E v² = ⅓
    unrequested = ["unrequested" in world.verdicts(prompt, said) for prompt, said in pairs]
    assert about(0.08, unrequested)


def test_corpus_length_and_score():
    """The sizes of the miniature rest on these: tokens and score of an average response."""
    pairs = corpus(4000)
    lengths = [len(response.split()) for _, response in pairs]
    scores = [world.score(prompt, response) for prompt, response in pairs]
    assert mean(lengths) == pytest.approx(29, abs=1)
    assert mean(scores) == pytest.approx(0.25, abs=0.03)
