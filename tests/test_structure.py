"""The house as a table: who may import whom, who may print, and what must be found after an install."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import edgecl
import edgecl_convert

ROOTS = {"edgecl": Path(edgecl.__file__).parent, "edgecl_convert": Path(edgecl_convert.__file__).parent}
FILES = {
    ".".join((name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
    for name, root in ROOTS.items()
    for path in sorted(root.rglob("*.py"))
}
LAYERS = (
    {"errors", "edgecl_convert"},
    {
        "data",
        "replay",
        "metrics",
        "gate",
        "profile",
        "migrations",
        "child",
        "sandbox",
        "redact",
        "lock",
        "turns",
        "places",
        "imports",
        "rows",
        "shape",
    },
    {"train", "engine", "store", "generations", "device", "timer", "tries", "template"},
    {
        "measure",
        "writers",
        "night",
        "parts",
        "learner",
        "nightly",
        "chat",
        "beside",
        "stream",
        "tasks",
        "stages",
        "demo",
        "audit",
        "export",
        "modelfile",
        "forget",
        "rebuild",
        "home",
    },
    {"cli", "edgecl"},  # "edgecl" is the package's own __init__
    {"__main__"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
FREE = {"errors", "edgecl_convert"}
OWNERS = {  # a dependency is imported by these rooms alone
    "torch": {"train", "edgecl_convert"},
    "transformers": {"edgecl_convert"},
    "tokenizers": {"edgecl_convert"},
    "peft": set(),
    "llama_cpp": {"engine", "edgecl_convert"},
    "sqlite_utils": {"store", "migrations"},
    "sqlite3": {"store", "train", "imports"},
    "psutil": {"child", "train"},
    "jinja2": {"template"},
    "matplotlib": {"demo", "edgecl_convert"},
    "click": {"cli"},
    "rich": {"cli"},
    "gguf": {"edgecl_convert"},
    "safetensors": {"train", "edgecl_convert"},
    "threadpoolctl": {"edgecl_convert"},
}
CONVERT_OWNERS = {  # and within the conversion stage by these files alone, inside functions
    "torch": {"verify", "imatrix"},
    "transformers": {"verify", "imatrix"},
    "tokenizers": {"hf_tokenizer"},
    "llama_cpp": {"amx", "llama_model", "perplexity"},
}
HEAVY = ["torch", "transformers", "tokenizers", "peft", "llama_cpp", "matplotlib"]
MODULES = pytest.mark.parametrize("module", FILES)


def room_of(module: str) -> str:
    """errors, train, cli ... for a module of edgecl; the top name for any other."""
    parts = module.split(".")
    return parts[1] if parts[0] == "edgecl" and len(parts) > 1 else parts[0]


def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text("utf-8"))


def imports(module: str) -> Iterator[str]:
    """Yield every module that a module imports, at its top or inside a function, in full."""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in FILES else source


def test_every_room_has_its_place_in_the_table() -> None:
    assert {room_of(module) for module in FILES} == set(LAYER)
    assert len(FILES) > 30
    found = set(imports("edgecl.learner"))
    assert {"edgecl.store", "edgecl.engine", "edgecl_convert", "contextlib"} <= found  # also inside functions


@MODULES
def test_imports_point_down_only(module: str) -> None:
    room = room_of(module)
    for name in imports(module):
        other = room_of(name)
        if name.split(".")[0] not in ROOTS or other == room or other in FREE:
            continue
        same_floor = LAYER[other] == LAYER[room] and LAYER[room] in (1, 3)
        assert LAYER[other] < LAYER[room] or same_floor or room == "edgecl", f"{module} imports {name}"


@MODULES
def test_the_conversion_stage_stands_alone_and_every_dependency_has_its_owner(module: str) -> None:
    room = room_of(module)
    for name in imports(module):
        top = name.split(".")[0]
        assert room not in FREE or room == top or top != "edgecl", f"{module} imports {name}"
        assert room in OWNERS.get(top, {room}), f"{module} imports {name}; only {OWNERS[top]} may"


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("edgecl_convert.")])
def test_the_conversion_stage_loads_models_in_few_places_and_only_when_asked(module: str) -> None:
    own = module.split(".")[1]
    for name in imports(module):
        top = name.split(".")[0]
        assert own in CONVERT_OWNERS.get(top, {own}), f"{module} imports {name}; only {CONVERT_OWNERS[top]} may"
    for node in tree_of(module).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & set(CONVERT_OWNERS), f"{module} imports {names} at its top"


@MODULES
def test_only_the_terminal_app_prints(module: str) -> None:
    calls = {
        node.func.id for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert room_of(module) == "cli" or not calls & {"print", "input", "breakpoint"}


@MODULES
def test_every_public_thing_says_what_it_is(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree), module
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


@MODULES
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    assert len(FILES[module].read_text("utf-8").splitlines()) <= 400


# --- what is loaded, what is found ------------------------------------------------------------------------------------

LOOK = """
import json, sys
from pathlib import Path
import edgecl
at_import = sorted(sys.modules)
from edgecl import demo, profile, stages
from edgecl.cli import cli
for arguments in (["--help"], *([name, "--help"] for name in cli.commands)):
    cli.main(arguments, standalone_mode=False)
print(json.dumps({
    "import": at_import,
    "help": sorted(sys.modules),
    "verbs": sorted(cli.commands),
    "profiles": sorted(p.stem for p in (profile.resource_folder("firmware_configs") / "profiles").glob("*.toml")),
    "prose": len(stages.prose_text()),
    "anchor": len((stages.HERE / "anchor.txt").read_text("utf-8")),
    "demo": hasattr(demo.demo_data(), "write_stream"),
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a fresh process in an empty folder has loaded and found."""
    command = [sys.executable, "-W", "error", "-c", LOOK]
    ran = subprocess.run(command, cwd=tmp_path_factory.mktemp("empty"), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("when", ["import", "help"])
def test_neither_import_nor_help_loads_a_model_library(seen: dict[str, list[str]], when: str) -> None:
    assert "edgecl.learner" in seen[when]
    assert not set(HEAVY) & set(seen[when])
    assert when == "help" or "rich" not in seen[when]


def test_help_names_every_verb(seen: dict[str, list[str]]) -> None:
    assert {"init", "observe", "adapt", "ask", "status", "rollback", "stream", "merge", "demo"} <= set(seen["verbs"])


def test_profiles_and_texts_are_found_from_any_folder(seen: dict[str, object]) -> None:
    assert "laptop-cpu" in seen["profiles"]  # type: ignore[operator]
    assert seen["prose"] > 1000 and seen["anchor"] > 1000  # type: ignore[operator]
    assert seen["demo"]


@pytest.mark.parametrize("package", [edgecl, edgecl_convert], ids=lambda package: package.__name__)
def test_public_names_are_there(package: ModuleType) -> None:
    assert package.__all__ and len(set(package.__all__)) == len(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
