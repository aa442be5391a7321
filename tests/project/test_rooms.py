"""How the files that travel with a checkpoint depend on each other."""

import ast
from pathlib import Path

import hf_pareprop

ROOT = Path(hf_pareprop.__file__).parent
PRIVATE = ("torch._C", "torch._subclasses", "torch.utils._python_dispatch", "._cdata", "._version", "._backward_hooks")


def imports_of(path: Path) -> set[str]:
    """The siblings that a file imports at run time, without imports for type checkers."""
    found: set[str] = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found.add(str(node.module))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            else:
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text()).body)
    return found


GRAPH = {path.stem: imports_of(path) for path in ROOT.glob("*.py") if path.stem != "__init__"}


def reached_from(name: str) -> set[str]:
    found: set[str] = set()
    names = [name]
    while names:
        for other in GRAPH[names.pop()] - found:
            found.add(other)
            names.append(other)
    return found


def test_no_file_imports_itself_by_way_of_others():
    assert all(name not in reached_from(name) for name in GRAPH)


def test_files_that_travel_are_flat():
    assert all(other in GRAPH for others in GRAPH.values() for other in others)


def test_a_configuration_imports_no_engine():
    for name in GRAPH:
        if name.startswith("configuration"):
            assert reached_from(name) <= {"plan", "configuration_reversible", "remote_code"}


def test_private_interfaces_of_pytorch_have_one_room():
    for path in ROOT.glob("*.py"):
        if path.stem != "torch_private":
            assert not [word for word in PRIVATE if word in path.read_text()], path.name
