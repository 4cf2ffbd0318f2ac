"""Run docs/tutorial.md from top to bottom, and hold its quotes, numbers and links to the files."""

import contextlib
import io
import re

import pytest
from quotes import ROOT, stands_in

FILE = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def fences(text: str, kind: str) -> list[tuple[int, str, str]]:
    """Return (line of its first line of code, what follows `kind`, code) of every such fence."""
    return [
        (text[: match.start(2)].count("\n") + 1, match[1].removeprefix(kind).strip(), match[2])
        for match in FENCE.finditer(text)
        if match[1].split()[:1] == [kind]
    ]


def run(text: str) -> None:
    """Run all fences in one namespace; what a fence prints is what its `# → ` comments say."""
    namespace: dict = {"__name__": "tutorial"}
    for line, quoted, code in fences(text, "python"):
        if quoted:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * (line - 1) + code, FILE, "exec"), namespace)
        said = re.findall(r"^# → (.*)$", code, re.MULTILINE)
        assert printed.getvalue().splitlines() == said, f"the fence at line {line}"


def missing_quotes(text: str) -> list[str]:
    """Return the code that the text shows and its files do not hold.

    A fence says where it is from: ```python quoted=FILE:NAME. In a paragraph, code after "`NAME` in
    `FILE`" is from there. A bare name has to occur in some file, and a path to exist.
    """
    missing = []
    for _, quoted, code in fences(text, "python"):
        if quoted and not stands_in(code, *quoted.removeprefix("quoted=").split(":")):
            missing.append(code)
    sources = "".join(
        path.read_text() for room in (".", *"formats methods runtime study".split())
        for path in (ROOT / room).glob("*.py")
    ) + "".join(code for _, _, code in fences(text, "python"))  # fmt: skip
    for paragraph in FENCE.sub("\n", text).split("\n\n"):
        place: tuple[str, str] | None = None
        for span, file in re.findall(r"`([^`]+)`(?: in\s`([\w/]+\.py)`)?", paragraph):
            if file:
                place = (file, span)
                found = stands_in("", *place)
            elif re.fullmatch(r"[\w/]+\.(py|md)", span):
                found = (ROOT / span).exists()
            elif place and not span.isidentifier():
                found = stands_in(span, *place)
            else:
                found = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", sources)
            missing += [] if found else [span]
    return missing


def test_every_fence_runs_and_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    run(FILE.read_text())


def test_quoted_code_stands_where_the_tutorial_says():
    assert missing_quotes(FILE.read_text()) == []


def test_numbers_of_the_miniature_are_the_committed_ones():
    number = r"\d+(?:\.\d+)? ± \d+(?:\.\d+)?"
    text, results = FILE.read_text(), (ROOT / "toy" / "RESULTS.md").read_text()
    assert len(numbers := set(re.findall(number, text))) > 12
    assert numbers <= set(re.findall(number, results))


def test_it_is_one_sitting():
    """Prose, formulas and tables; code and drawings are not counted."""
    text = FILE.read_text()
    assert len(FENCE.sub("", text).split()) <= 3500
    assert 0 < len(text.partition("\n## Words\n")[2].splitlines()) <= 25


@pytest.mark.parametrize(
    "code", ["print(1 + 1)\n# → 3", "print(1)", "x = 1\n# → 1", "assert 1 + 1 == 3"]
)
def test_a_stale_result_is_seen(code):
    run("```python\nprint(1 + 1)\n# → 2\n```\n")
    with pytest.raises(AssertionError):
        run(f"```python\n{code}\n```\n")


@pytest.mark.parametrize(
    "text, missing",
    [
        ("`dpo_loss` in `simpo.py`: `chosen_rewards - rejected_rewards`", []),
        ("`simpo_loss` in `simpo.py`: `ref_chosen_logps`, `beta * ref`", ["beta * ref"]),
        ("`dpo_loss` in `data.py`", ["dpo_loss"]),
        ("`simpo_lost` and `docs/tutorials.md`", ["simpo_lost", "docs/tutorials.md"]),
        ("```python quoted=data.py:pack\nend += q\n```\n", ["end += q\n"]),
        ("```python quoted=model.py:TiledLogps.backward\nmaximum = 1\n```\n", ["maximum = 1\n"]),
        ("```python quoted=data.py:pack\nend += p\n```\n", []),
    ],
)
def test_a_stale_quote_is_seen(text, missing):
    assert missing_quotes(text) == missing
