"""The laws of the source: imports point down, no pickle, one reader of the environment, torch-free tools."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resume_kit"

LAYERS = [
    "cli",
    "run",
    "resuming",
    "saving",
    "engines",
    "policy",
    "recovery",
    "integrity",
    "planning",
    "checkpoint",
    "algebra",
    "environment",
    "errors",
]
"""From the top down: each imports only what stands below it."""

ASIDE = {"data": {"run", "resuming"}}
"""Folders beside the order, with the layers that may import them. They import only the errors."""

TORCH_FREE = ["algebra", "checkpoint", "planning", "integrity", "recovery", "policy", "cli"]
HEAVY = {"torch", "deepspeed", "transformers", "torchdata", "megatron"}

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
ENVIRONMENT_READERS = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}


def sources() -> dict[str, str]:
    """Module name -> source, of all of resume_kit."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts)] = path.read_text()
    return found


def nodes_with_names(source: str, module: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node that names something outside the module, with the dotted name it stands for.

    Import aliases are followed, relative imports resolved; `module` ends in ``.__init__`` for a package.
    """
    tree = ast.parse(source)
    meaning: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
                meaning[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{base}.{alias.name}"
                meaning[alias.asname or alias.name] = f"{base}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = _dotted(node, meaning)
            if name:
                yield node, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_module_name(node.value):
            # import_module("resume_kit.run.kit"), and tables of such names
            yield node, node.value


def _dotted(node: ast.expr, meaning: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return meaning.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, meaning)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _is_module_name(text: str) -> bool:
    words = text.split(".")
    return all(word.isidentifier() for word in words) and (
        text in UNSAFE_MODULES or (words[0] == "resume_kit" and len(words) > 1 and words[1] in {*LAYERS, *ASIDE})
    )


def layer_problems(source: str, module: str) -> list[str]:
    """Imports of `module` that point upwards, sideways, or at the facade."""
    words = module.split(".")
    if words == ["resume_kit", "__init__"]:
        return []
    own = words[1]
    if own not in LAYERS and own not in ASIDE:
        return [f"{module}: {own!r} has no place in LAYERS"]
    problems = set()
    for node, name in nodes_with_names(source, module):
        if name.split(".")[0] != "resume_kit" or isinstance(node, ast.Attribute | ast.Name):
            continue
        target = name.split(".")[1] if "." in name else ""
        if target != own and not _may_import(own, target):
            problems.add(f"{module}:{node.lineno}: {own} imports {target or 'the facade'} ({name})")
    return sorted(problems)


def _may_import(own: str, target: str) -> bool:
    if own in ASIDE:
        return target == "errors"
    if target in ASIDE:
        return own in ASIDE[target]
    return target in LAYERS and LAYERS.index(own) < LAYERS.index(target)


def pickle_problems(source: str, module: str) -> list[str]:
    """Mentions of anything that would run code from a file: pickle and its kin, torch.load, allow_pickle."""
    problems = set()
    for node, name in nodes_with_names(source, module):
        words = name.split(".")
        unsafe = UNSAFE_MODULES.intersection(words) or (words[0] == "torch" and words[-1] == "load")
        if unsafe:
            problems.add(f"{module}:{node.lineno}: {name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            problems.add(f"{module}:{node.lineno}: allow_pickle")
    return sorted(problems)


def environment_problems(source: str, module: str) -> list[str]:
    """Reads of environment variables."""
    if module == "resume_kit.environment":
        return []
    return sorted(
        {
            f"{module}:{node.lineno}: {name}"
            for node, name in nodes_with_names(source, module)
            if any(name == reader or name.startswith(f"{reader}.") for reader in ENVIRONMENT_READERS)
        }
    )


def eager_imports(source: str) -> list[str]:
    """Imports of resume_kit or of heavy packages that run when the module itself is imported."""
    found = []
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        waiting += ast.iter_child_nodes(node)
    return sorted(name for name in found if name.split(".")[0] in {"", "resume_kit", *HEAVY})


@pytest.mark.parametrize("check", [layer_problems, pickle_problems, environment_problems])
def test_the_source_keeps_the_law(check: object) -> None:
    assert callable(check)
    problems = [problem for module, source in sources().items() for problem in check(source, module)]
    assert not problems, "\n".join(["", *problems])


def test_the_whole_source_is_looked_at() -> None:
    folders = {module.split(".")[1] for module in sources()} - {"__init__"}
    assert folders >= {*LAYERS}


def test_the_facade_imports_lazily() -> None:
    assert eager_imports((PACKAGE / "__init__.py").read_text()) == []


def modules_loaded_by(*names: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that has imported all of the given packages."""
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in sys.argv[1:]:\n"
        "    package = importlib.import_module(name)\n"
        "    inside = pkgutil.walk_packages(package.__path__, name + '.') if name != 'resume_kit' else ()\n"
        "    for found in inside:\n"
        "        if not found.name.endswith('__main__'):\n"
        "            try:\n"
        "                importlib.import_module(found.name)\n"
        "            except ModuleNotFoundError as error:  # Triton comes with builds of torch for CUDA\n"
        "                if error.name != 'triton':\n"
        "                    raise\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("layer", ["", *[name for name in TORCH_FREE if (PACKAGE / name / "__init__.py").exists()]])
def test_what_a_login_node_needs_imports_no_torch(layer: str) -> None:
    assert not HEAVY & modules_loaded_by(f"resume_kit.{layer}".rstrip("."))


def test_the_torch_check_fires() -> None:
    assert "torch" in modules_loaded_by("resume_kit.engines")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("resume_kit.algebra.boxes", "from resume_kit.checkpoint.records import TensorKey"),
        ("resume_kit.algebra.boxes", "import resume_kit.checkpoint.records as records"),
        ("resume_kit.algebra.boxes", "from resume_kit import checkpoint"),
        ("resume_kit.algebra.boxes", "from ..checkpoint import records"),
        ("resume_kit.algebra.__init__", "from ..checkpoint import records"),
        ("resume_kit.algebra.boxes", "from .. import checkpoint"),
        ("resume_kit.planning.reads", "def later():\n    from resume_kit.engines import adapter"),
        (
            "resume_kit.planning.reads",
            "if TYPE_CHECKING:\n    from resume_kit.engines.adapter import EngineAdapter",
        ),
        ("resume_kit.checkpoint.names", "kit = import_module('resume_kit.run.kit')"),
        ("resume_kit.run.kit", "from resume_kit import Policy"),
        ("resume_kit.run.kit", "import resume_kit"),
        ("resume_kit.run.kit", "from resume_kit.newcomer import thing"),
        ("resume_kit.engines.deepspeed.adapter", "from resume_kit.saving import staging"),
        ("resume_kit.errors", "from resume_kit import environment"),
        ("resume_kit.data.loader", "from resume_kit.algebra.boxes import Box"),
        ("resume_kit.saving.save", "from resume_kit.data import TokenDataset"),
        ("resume_kit.newcomer.thing", ""),
    ],
)
def test_the_layer_check_fires(module: str, source: str) -> None:
    assert len(layer_problems(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "resume_kit.run.kit",
            "from resume_kit.saving.save import save\nfrom resume_kit.data import TokenDataset",
        ),
        ("resume_kit.engines.deepspeed.adapter", "from ..adapter import LivePiece\nfrom . import zero3"),
        ("resume_kit.data.loader", "from resume_kit.errors import UsageError\nimport torch"),
        ("resume_kit.__init__", "from resume_kit.run.kit import ResumeKit"),
        ("resume_kit.errors", "text = 'resume_kit says no'; import numpy as np; np.zeros(3)"),
        ("resume_kit.checkpoint.index", "SCHEMA = 'resume_kit.rank-index'; OTHER = 'resume_kit.index'"),
    ],
)
def test_the_layer_check_lets_good_imports_pass(module: str, source: str) -> None:
    assert layer_problems(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as harmless",
        "import_module('pickle')",
        "__import__('dill')",
        "import marshal",
        "import shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch.serialization\ntorch.serialization.load('x')",
        "import torch\nread = torch.load",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "torch.serialization.pickle.load(file)",
    ],
)
def test_the_pickle_check_fires(source: str) -> None:
    assert pickle_problems(source, "resume_kit.saving.save")


@pytest.mark.parametrize("source", ["np.load('x', allow_pickle=False)", "json.load(file)", "'never a pickle'"])
def test_the_pickle_check_lets_safe_reads_pass(source: str) -> None:
    assert pickle_problems(source, "resume_kit.saving.save") == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['RANK']",
        "import os\nos.environ.get('RANK')",
        "import os\nos.getenv('RANK')",
        "import os as system\nsystem.getenv('RANK')",
        "from os import environ",
        "from os import getenv as setting\nsetting('RANK')",
    ],
)
def test_the_environment_check_fires(source: str) -> None:
    assert environment_problems(source, "resume_kit.run.kit")
    assert environment_problems(source, "resume_kit.environment") == []


@pytest.mark.parametrize(
    ("source", "eager"),
    [
        ("from resume_kit.run.kit import ResumeKit", ["resume_kit.run.kit"]),
        ("from .errors import ResumeKitError", [".errors"]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", ["torch"]),
        ("if TYPE_CHECKING:\n    from resume_kit.errors import UsageError", []),
        ("def __getattr__(name):\n    from resume_kit.errors import UsageError", []),
        ("from importlib import import_module", []),
    ],
)
def test_the_laziness_check_fires(source: str, eager: list[str]) -> None:
    assert eager_imports(source) == eager
