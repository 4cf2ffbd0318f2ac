"""The rules of the house: who imports whom, and how long functions and the five files may be."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from test_train import TOY

import train
from data import Pair
from formats.errors import DataError
from runtime import processes, signals
from runtime.settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("simpo.py", "data.py", "model.py", "train.py", "sample.py")
ROOMS = ("formats", "runtime", "methods", "study")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
GROUND = {"formats.errors", "simpo", "model", "data"}


def modules() -> dict[str, Path]:
    """Return every module of the project but toy/, bench/ and tests/, by name."""
    paths = [ROOT / name for name in FIVE]
    paths += [path for room in ROOMS for path in (ROOT / room).glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere, also inside a function."""
    found, ours = set(), modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in ours} or {node.module}
    return {name for name in found if name in ours}


def allowed(module: str, imported: str) -> bool:
    """Say whether a module may import another: the ground floor knows nothing of the rooms."""
    room, other = module.partition(".")[0], imported.partition(".")[0]
    if module in GROUND:
        return imported == "formats.errors" and module != "formats.errors"
    floors = {
        "formats": {"formats"},
        "methods": {"methods"},
        "runtime": {"formats", "methods", "runtime"},
        "train": {"formats", "methods", "runtime", "sample"},
        "sample": {"formats", "methods", "runtime"},
        "study": {"formats", "methods", "runtime", "study", "train", "sample"},
    }
    return imported in GROUND or other in floors[room]


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    wrong = {name for name in imports_of(modules()[module]) if not allowed(module, name)}
    assert not wrong, f"{module} must not import {', '.join(sorted(wrong))}"


def test_no_circles():
    graph = {name: imports_of(path) for name, path in modules().items()}
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other: {', '.join(sorted(graph))}"


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{module}.{node.name}", node)
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def length_of(function: ast.FunctionDef) -> int:
    """Return the number of lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def test_no_function_is_long():
    assert [name for name, node in functions() if length_of(node) > 60] == []


def test_loop_and_step_fit_on_a_slide():
    lengths = {name: length_of(node) for name, node in functions()}
    assert lengths["train.train"] <= 45 and lengths["train.forward_backward"] <= 40


def test_five_files_are_one_sitting():
    assert sum((ROOT / name).read_text().count("\n") for name in FIVE) < 1450


def test_top_level_holds_nothing_else():
    """The card's files, the rooms, and what belongs to a repository."""
    known = {*FIVE, "README.md", "requirements.txt", "pyproject.toml", "LICENSE", *ROOMS}
    known |= {"tests", "toy", "recipes", "bench", "docs", "runs"}
    assert {path.name for path in ROOT.iterdir() if path.name[0] not in "._"} <= known


def test_readme_is_short_and_names_every_file():
    """Its tree has a line for every file of the rooms, and no line for a file that is gone."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) < 1900
    tree = readme.split("```\nsimpo.py ")[1].split("```")[0]
    named = set(re.findall(r"\w+\.py\b", "simpo.py " + tree))
    ours = {path.name for path in modules().values()} - {"__init__.py"}
    assert ours <= named <= ours | {path.name for path in (ROOT / "toy").glob("*.py")}


def titles(page: Path) -> list[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in found]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if "://" not in link and not (target.exists() and (not anchor or anchor in titles(target))):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("name", FIVE)
def test_help_of_every_file(name, monkeypatch, capsys):
    """`python data.py --help` says what the file is, also where it is no command."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(signals, "listen", lambda program: None)  # pytest goes on after it
    try:
        exec(
            compile((ROOT / name).read_text(), str(ROOT / name), "exec"),
            {"__name__": "__main__", "__file__": str(ROOT / name)},
        )
    except SystemExit as e:
        assert e.code == 0
    first = ast.get_docstring(ast.parse((ROOT / name).read_text())).splitlines()[0]
    assert first in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["simpo", "dpo", "kto"])
def test_a_pair_passes_no_file_twice(objective, tmp_path):
    """On the way down to the loss, no call leads back into a file that it came through."""
    settings = read_settings([f"--objective={objective}", "--device=cpu"])
    device = processes.start_ranks(settings)
    settings = settings.resolved(device.type)
    inputs = train.open_inputs(settings, device)
    mesh = processes.make_mesh(settings, device)
    policy = train.build_model(inputs, mesh, settings, trainable=True)
    freeze = train.partial(train.freeze_reference, inputs, mesh, settings)
    reference, _ = train.make_reference(settings, inputs, device, freeze, resumed=None)
    seen, bad = set(), set()

    ours = {str(path): path.name for path in modules().values()}

    def trace(frame, event, _):
        if event != "call" or frame.f_code.co_filename not in ours:
            return
        stack, at = [], frame
        while at is not None:
            name = ours.get(at.f_code.co_filename)
            stack += [name] if name and stack[-1:] != [name] else []
            at = at.f_back
        seen.update(stack)
        if len(set(stack)) < len(stack):
            bad.add(" ← ".join(stack))

    sys.setprofile(trace)
    try:
        train.forward_backward(policy, inputs.batch(0)[:4], settings, reference)
    finally:
        sys.setprofile(None)
    assert {"train.py", "data.py", "model.py", "objectives.py"} <= seen
    assert not bad


def test_train_may_be_called_twice_from_python(tmp_path):
    """It returns what a caller wants, and leaves the caller's settings alone."""
    flags = [f"--model={TOY}/checkpoint", f"--data={TOY}/heldout.jsonl", "--device=cpu"]
    flags += [f"--eval-data={TOY}/heldout.jsonl", "--max-steps=1", "--batch-size=8"]
    settings = read_settings([*flags, f"--out={tmp_path}/one"])
    first = train.train(settings)
    settings.out = f"{tmp_path}/two"
    second = train.train(settings)
    assert settings.out == f"{tmp_path}/two" and settings.dtype == "auto"
    assert first["model"] == tmp_path / "one" / "model" and first["model"].exists()
    assert first["after"] == second["after"] and first["before"]["loss"] != first["after"]["loss"]
    settings.lr = -1.0
    with pytest.raises(DataError, match="--lr: expected a positive number"):
        train.train(settings)


def test_a_pair_has_a_size_and_is_true():
    """A tuple with a length of its own was falsy when empty, and could not be replaced."""
    pair = Pair(torch.zeros(3).numpy(), (torch.zeros(2).numpy(), torch.zeros(4).numpy()))
    assert pair.tokens == 9 and pair
    assert not hasattr(pair, "__len__")
