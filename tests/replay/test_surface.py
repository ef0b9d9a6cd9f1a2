"""The replay is a user of the manager like any other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    f"kvmanager.{name}"
    for name in ("config", "errors", "manager", "surface", "tables", "machine.batch", "machine.commands", "machine.events")
}


def test_replay_uses_the_public_surface_alone() -> None:
    """No state, no index, no pool: commands go in, replies and published batches come out."""
    wrong = []
    for path in sorted((ROOT / "kvmanager" / "replay").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvmanager"):
                if node.module not in ALLOWED and not (node.module or "").startswith("kvmanager.replay"):
                    wrong.append(f"{path.name}:{node.lineno} imports {node.module}")
            elif isinstance(node, ast.Attribute) and node.attr == "state":
                wrong.append(f"{path.name}:{node.lineno} looks into a state")
    assert not wrong
