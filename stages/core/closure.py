"""What a module really depends on, computed from its source: the repository files that it imports, at any depth."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("stages", "tools")


def code_closure(root: Path, module: str) -> set[str]:
    """Paths, relative to `root`, of the module and of all repository modules that it imports, directly or not.

    Imports inside functions and under TYPE_CHECKING count. Empty `__init__.py` files do not: they hold nothing.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        path = _file_of(root, waiting.pop())
        if path is None or (name := path.relative_to(root).as_posix()) in found:
            continue
        if path.name == "__init__.py" and not path.read_text().strip():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import; write it in full"
                waiting.append(node.module or "")
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def code_hash(root: Path, modules: Iterable[str]) -> str:
    """SHA-256 (64 hex digits) of the source of some modules and of all of ours that they import."""
    digest = hashlib.sha256()
    for name in sorted(set[str]().union(*(code_closure(root, module) for module in modules))):
        digest.update(name.encode() + b"\0" + hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


def _file_of(root: Path, module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    package = path / "__init__.py"
    return package if package.is_file() else None
