"""Which files of the package a module needs, read from its imports without running it."""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent

# What no result depends on: views of results, messages, notes on the machine, estimates, where files lie (dvc.yaml says
# so too) and the reading of params.yaml, whose values DVC watches itself. A change here re-runs nothing.
VIEWS = frozenset(
    f"molf{name}"
    for name in (
        *("", ".errors", ".blocks", ".method_blocks", ".config", ".problems", ".paths", ".secrets"),
        *(".machine", ".tracking", ".lineage", ".notes", ".cards", ".closure", ".estimate", ".memory"),
    )
)


# Beside a module: what it compiles or fills in. Nothing else counts, such as what an editor leaves there.
BESIDE = (".cpp", ".css", ".html", ".js")


def closure(module: str, package: Path = PACKAGE) -> set[str]:
    """Names of all modules of the package that `module` imports, at the top or inside functions, itself included.

    `VIEWS` are left out and not followed.
    """
    seen: set[str] = set()
    open_modules = [module]
    while open_modules:
        name = open_modules.pop()
        if name in seen or name in VIEWS:
            continue
        seen.add(name)
        open_modules += _imports(module_path(name, package).read_text(encoding="utf-8"), package)
    return seen


def of_method(kind: str) -> str:
    """The module of a kind of method, which `molf.methods` imports by this name and no `closure` sees.

    So a stage's closure holds the code of no method, and what depends on one's adds its own: a cell of LoRA is not
    trained anew for what another method is made of.
    """
    return f"molf.methods.{kind.replace('-', '_')}"


def code_hash(*modules: str, package: Path = PACKAGE) -> str:
    """sha256 over the files of all of the modules' closures, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(set().union(*(closure(module, package) for module in modules))):
        for path in files(name, package):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def files(module: str, package: Path = PACKAGE) -> list[Path]:
    """A module's file and those of the same stem beside it: what it compiles or fills in."""
    path = module_path(module, package)
    beside = (path.with_suffix(suffix) for suffix in BESIDE)
    return [path, *(other for other in beside if other.is_file())]


def module_path(name: str, package: Path = PACKAGE) -> Path:
    """The file that holds a module."""
    base = package.parent.joinpath(*name.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def _imports(text: str, package: Path) -> frozenset[str]:
    """Names of the package's modules that a module of this text imports."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []  # imports for the type checker run nothing
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for candidate in candidates:
            if candidate.split(".")[0] == package.name and module_path(candidate, package).is_file():
                # Importing a.b.c runs a/__init__ and a/b/__init__ too.
                parts = candidate.split(".")
                found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return frozenset(found)
