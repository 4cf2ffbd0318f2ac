"""Hold code that prose quotes to the file it is quoted from."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFINITIONS = ast.FunctionDef, ast.ClassDef


def stands_in(code: str, file: str, name: str = "") -> bool:
    """Return True if the code, however indented and broken into lines, stands in a file.

    name: the function or class that must hold it; "TiledLogps.forward" is a method.
    """
    source = (ROOT / file).read_text()
    node: ast.AST | None = ast.parse(source)
    lines = source.splitlines()
    for part in filter(None, name.split(".")):
        found = (n for n in ast.walk(node) if isinstance(n, DEFINITIONS) and n.name == part)
        if (node := next(found, None)) is None:
            return False
    held = lines[node.lineno - 1 : node.end_lineno] if name else lines
    return " ".join(code.split()) in " ".join(" ".join(held).split())
