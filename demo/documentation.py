"""Instruction rows in plain English that every Python carries: what a function, class or module of the standard library is for.

    python demo/documentation.py --output DIR

writes train.json and heldout.json in Alpaca's schema. The answer is the first paragraph of a docstring; rows go by a hash of the
name to one file or the other, so that nothing of a held-out row is trained on. The standard library only.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__", "turtledemo", "pydoc_data"}
QUESTIONS = {
    "function": "What does the Python function `{name}` do?",
    "class": "What is the Python class `{name}` for?",
    "module": "What is the Python module `{name}` for?",
}
SHORTEST, LONGEST = 60, 500  # characters of an answer


def documented(library: Path) -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, first paragraph of the docstring) of what is public in the standard library."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        parts = [*relative.parts[:-1], *([] if relative.stem == "__init__" else [relative.stem])]
        if LEFT_OUT & set(relative.parts) or any(part.startswith("_") for part in parts) or not parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose
            continue
        yield from _of(tree, "module", ".".join(parts))


def _of(node: ast.AST, kind: str, name: str) -> Iterator[tuple[str, str, str]]:
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if SHORTEST <= len(paragraph) <= LONGEST and paragraph.isascii() and ">>>" not in paragraph:
        yield kind, name, paragraph
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from _of(child, "class" if isinstance(child, ast.ClassDef) else "function", f"{name}.{child.name}")


def rows(library: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows and held-out ones, a fifth; each in the order of a hash of its name."""
    seen, found = set(), []
    for kind, name, answer in documented(library):
        if answer not in seen:  # overridden methods repeat their docstrings
            seen.add(answer)
            digest = hashlib.sha256(name.encode()).hexdigest()
            found.append((digest, {"instruction": QUESTIONS[kind].format(name=name), "input": "", "output": answer}))
    found.sort(key=lambda pair: pair[0])
    return (
        [row for digest, row in found if int(digest[:4], 16) % 5],
        [row for digest, row in found if not int(digest[:4], 16) % 5],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Instruction rows from the standard library's documentation.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "heldout"), rows(Path(sysconfig.get_path("stdlib")))):
        (arguments.output / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n")
        print(f"{arguments.output / name}.json: {len(part)} rows")


if __name__ == "__main__":
    main()
