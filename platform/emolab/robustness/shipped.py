"""The suites that come with the package, by name. Nothing is read of them here, so an option may list them."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "suites"


def shipped_suites() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
