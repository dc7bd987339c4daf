"""Ways to damage a file."""

import json
from pathlib import Path


def cut(path: Path) -> None:
    """Truncate the file to half, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unsealed(path: Path) -> dict:
    """Return a JSON object without its seal, to be edited as if it had been written so."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
