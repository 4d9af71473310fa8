"""Holds C++ includes and Python imports against the arrows of docs/architecture.md.

Usage: check_layers.py [ROOT]. Prints every wrong arrow and exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

# Room -> rooms it may include. Every room may include itself and the standard library.
CPP_ROOMS: dict[str, set[str]] = {
    "common": set(),
    "kernels": {"common"},
    "assign": {"common"},
    "hw": {"common"},
    "storage": {"common"},
    "runtime": {"common"},
    "ops": {"common", "kernels", "runtime"},
    "bindings": {"common", "assign", "hw", "storage", "runtime"},
}
# Third-party headers by first path element, and the rooms that may see them.
CPP_EXTERNAL: dict[str, set[str]] = {
    "torch": {"ops"},
    "ATen": {"ops"},
    "c10": {"ops"},
    "Python.h": set(),
    "pybind11": {"bindings"},
    "fmt": {"hw", "bindings"},
    "immintrin.h": {"kernels", "runtime"},
    "cuda_runtime.h": {"kernels"},
}

_BASE = {"errors", "files"}
_DATA = _BASE | {"recipe", "tables"}
PYTHON_ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "recipe": _BASE,
    "tables": _BASE | {"recipe"},
    "pareto": {"errors"},
    "progress": set(),
    "ops": {"errors"},
    "network": {"errors"},
    "quantizers": _BASE | {"ops", "network", "recipe"},
    "analysis": _DATA | {"ops", "network", "quantizers", "progress"},
    "hw": _DATA | {"network", "pareto", "_C"},
    "costs": _DATA | {"network", "hw", "_C"},
    "assignment": _DATA | {"_C"},
    "refinement": {"errors", "recipe", "tables"},
    "profiling": _BASE | {"costs", "network", "progress", "runtime", "tables", "_C"},
    "sweeps": _DATA | {"assignment", "pareto", "progress"},
    "export": _DATA | {"ops", "network", "quantizers", "runtime", "_C"},
    "runtime": {"errors", "_C"},
    "training": _BASE | {"ops", "network", "quantizers", "progress"},
    "search": _DATA | {"ops", "network", "quantizers", "pareto", "assignment", "progress", "training"},
    "retrain": _DATA | {"ops", "network", "quantizers", "progress", "training", "_C"},
    "evaluation": _DATA | {"ops", "network", "quantizers", "export"},
    "zoo": {"errors", "files"},
    "report": _DATA,
    "bench": _BASE | {"ops"},
}
# The top: may import everything.
PYTHON_TOP = {"pipeline", "cli", "sources", "__init__", "__main__"}


def cpp_violations(root: Path) -> list[str]:
    """Wrong includes below csrc/."""
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        room = path.relative_to(root / "csrc").parts[0]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            parts = match.group(1).split("/")
            where = f"{path.relative_to(root)}:{number}"
            if parts[0] == "mixbit" and len(parts) > 2:
                if parts[1] != room and parts[1] not in CPP_ROOMS.get(room, set()):
                    found.append(f"{where}: {room} may not include {parts[1]} ({match.group(1)})")
            elif parts[0] in CPP_EXTERNAL and room not in CPP_EXTERNAL[parts[0]]:
                found.append(f"{where}: {room} may not include {match.group(1)}")
    return found


def imported_rooms(tree: ast.AST, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, room) of every import of mixbit in a module; `package` is the module's package below mixbit."""
    rooms = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "mixbit" and len(parts) > 1:
                    rooms.append((node.lineno, parts[1]))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ("mixbit", *package)[: 1 + len(package) - (node.level - 1)]
                parts = [*base, *(node.module.split(".") if node.module else [])]
            else:
                parts = (node.module or "").split(".")
            if parts[0] != "mixbit":
                continue
            if len(parts) > 1:
                rooms.append((node.lineno, parts[1]))
            else:
                rooms.extend((node.lineno, alias.name) for alias in node.names)
    return rooms


def python_violations(root: Path) -> list[str]:
    """Wrong imports below python/mixbit, type-checking and function-level imports included."""
    found = []
    package_root = root / "python" / "mixbit"
    for path in sorted(package_root.rglob("*.py")):
        relative = path.relative_to(package_root)
        room = relative.parts[0].removesuffix(".py")
        if room in PYTHON_TOP or room.startswith("_build_info"):
            continue
        where = path.relative_to(root)
        if room not in PYTHON_ROOMS:
            found.append(f"{where}: room {room!r} is not in the table of {Path(__file__).name}")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in imported_rooms(tree, relative.parts[:-1]):
            if target not in PYTHON_ROOMS and target not in {"_C", "_build_info", "pipeline", "cli"}:
                continue  # a public name of mixbit itself, such as __version__
            if target not in {room, "_build_info"} | PYTHON_ROOMS[room]:
                found.append(f"{where}:{line}: {room} may not import {target}")
    return found


def main() -> int:
    """Prints the violations of the tree given (default: this checkout)."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = cpp_violations(root) + python_violations(root)
    for line in found:
        print(line)
    if not found:
        print("layers: every include and import follows the arrows")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
