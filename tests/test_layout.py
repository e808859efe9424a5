"""The layout: where code stands, how long it may be, and that `pytest -m quick` looks at every file of it."""
import ast
from pathlib import Path

import pytest

from plumbing.files import ROOT

pytestmark = pytest.mark.quick
TOP = {"train.py", "model.py", "rollout.py", "loss.py", "baselines.py", "data.py", "sample.py", "encoder.py", "lora.py"}
RUN = ("networks", "plumbing")                              # with the top level, all that a run with a real model needs
REST = ("tiny", "tiny/making", "experiments", "benchmarks")


def sources(*folders: str) -> list[Path]:
    """The .py files of the top level and of these folders."""
    return [path for folder in ("", *folders) for path in sorted((ROOT / folder).glob("*.py"))]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_top_level_is_the_method():
    names = {path.name for path in sources()}
    assert TOP <= names and names <= TOP | {"evaluate.py"}


def test_files_and_lines_are_short():
    long = {path.relative_to(ROOT): len(lines(path)) for path in sources(*RUN, *REST) if len(lines(path)) > 400}
    assert not long
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in sources(*RUN, *REST)
            for number, line in enumerate(lines(path), 1) if len(line) > 120]
    assert not wide
    assert len(lines(ROOT / "train.py")) <= 280


def test_functions_fit_on_a_screen():
    functions = [(path.name, node.name, node.end_lineno - node.lineno + 1) for path in sources(*RUN, *REST)
                 for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 500 and [function for function in functions if function[2] > 60] == []


def test_the_whole_is_small():
    """The top level, and all that a LoRA run in one process needs: what train.py and sample.py import, at any depth.

    The house style has 4,600. 60 above it came with the guards of `tests/test_campaign_*.py`, and a dozen with what
    other programs read in a LoRA's header (--name). The report counts by itself: it is a page to look at, and no number
    of a run depends on it.
    """
    assert sum(len(lines(path)) for path in sources()) <= 2300
    needed, waiting = set(), [ROOT / "train.py", ROOT / "sample.py"]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in needed:
            needed.add(path)
            names = set().union(*modules_of(ast.parse(path.read_text(encoding="utf-8"))).values())
            waiting += [ROOT / f"{name.replace('.', '/')}.py" for name in names]
    others = ("evaluate.py", "plumbing/judges.py", "plumbing/scores.py", "plumbing/one_step.py")    # scores, a figure
    assert set(sources(*RUN)) - needed <= {ROOT / name for name in others} | {ROOT / folder / "__init__.py"
                                                                              for folder in RUN}
    several = {ROOT / "plumbing" / "full.py", ROOT / "plumbing" / "team.py"}    # all weights, several processes
    assert sum(len(lines(path)) for path in several) <= 300 and several < needed
    page = {ROOT / "plumbing" / "report.py"}
    assert sum(len(lines(path)) for path in page) <= 200 and page < needed
    assert len(lines(ROOT / "plumbing" / "report.html")) <= 250
    assert sum(len(lines(path)) for path in needed - several - page) <= 4672


def test_the_experiments_are_small():
    assert sum(len(lines(path)) for path in (ROOT / "experiments").glob("*.py")) <= 1720


def test_nothing_changes_the_import_path():
    assert not [path for path in sources(*RUN, *REST, "examples", "tests")
                if path.name != "test_layout.py" and "sys.path" in "".join(lines(path))]


# ---------------------------------------------------------------------------------------------------- pytest -m quick
def modules_of(node: ast.AST) -> dict[str, set[str]]:
    """Name that an import below `node` binds -> modules that it may stand for."""
    found: dict[str, set[str]] = {}
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                found[alias.asname or alias.name.split(".")[0]] = {alias.name}
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                found[alias.asname or alias.name] = {statement.module, f"{statement.module}.{alias.name}"}
    return found


def is_quick(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr == "quick" for part in ast.walk(node))


def modules_named_by(path: Path) -> set[str]:
    """Modules that the quick tests of a file name: all of its imports if the file is quick, else those they use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bound = modules_of(tree)
    if any(isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "pytestmark" and is_quick(part.value)
           for part in tree.body):
        return set().union(*bound.values())
    tests = [part for part in tree.body if isinstance(part, ast.FunctionDef)
             and any(map(is_quick, part.decorator_list))]
    used = {part.id for test in tests for part in ast.walk(test) if isinstance(part, ast.Name)}
    return set().union(*(modules for name, modules in bound.items() if name in used))


def test_quick_tests_name_every_module():
    tested = set().union(*map(modules_named_by, (ROOT / "tests").glob("test_*.py")))
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources(*RUN, "tiny")
               if path.name != "__init__.py"}
    assert len(modules) > 30 and not modules - tested


def test_quick_tests_are_found(tmp_path):
    """The test above can fail: only what quick tests use counts."""
    file = tmp_path / "test_some.py"
    head = "import a.b\nfrom c import d, e as f\n"
    file.write_text(f"{head}\n@pytest.mark.quick\ndef test_one():\n    d(), a\n\ndef test_two():\n    f\n")
    assert modules_named_by(file) == {"a.b", "c", "c.d"}
    file.write_text(f"{head}pytestmark = pytest.mark.quick\n")
    assert modules_named_by(file) == {"a.b", "c", "c.d", "c.e"}
