"""Rules for words: openings of docstrings, and names that a variable may not have."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENINGS = {"what", "of", "which", "whether", "where", "from", "how"}
# A variable is named after its quantity.
NAMES = {"found", "said", "kept", "there", "beside", "ahead", "turns"}
# The largest share of docstrings that may open with one of these words.
LIMIT = 0.01

Docstrings = dict[str, list[tuple[str, str]]]


def sources(*folders: str) -> dict[str, ast.Module]:
    """Syntax trees of the Python files in folders, by path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def docstrings(trees: dict[str, ast.Module]) -> Docstrings:
    """Line and text of every docstring, by path."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        path: [
            (f"{path}:{getattr(node, 'lineno', 1)}", text)
            for node in ast.walk(tree)
            if isinstance(node, documented) and (text := ast.get_docstring(node))
        ]
        for path, tree in trees.items()
    }


def assigned(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of every variable, argument and attribute that a file assigns."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.attr))
    return names


def opening(text: str) -> str:
    return text.split()[0].strip(".,:;").lower()


def test_docstrings_open_with_a_verb_or_a_noun():
    texts = docstrings(sources("sigmarep", "scripts", "configs", "examples", "tests"))
    places = [place for each in texts.values() for place, text in each if opening(text) in OPENINGS]
    count = sum(map(len, texts.values()))
    assert count > 500
    assert len(places) < LIMIT * count, "\n".join(places)


def test_a_variable_is_named_after_its_quantity():
    trees = sources("sigmarep", "scripts")
    places = [
        f"{path}:{line}: {name}" for path, tree in trees.items() for line, name in assigned(tree) if name in NAMES
    ]
    assert not places, "\n".join(places)
