"""Ways in which a file gets damaged."""

from pathlib import Path


def cut(path: Path) -> None:
    """Ends the file in its middle, as a stopped copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Changes one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
