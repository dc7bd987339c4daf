"""Import and export weights of the released PyTorch models; the command is `python -m medfuse_jax.torch_import`.

A released checkpoint holds the modules of all methods; `unused` lists the entries that a method does not read. Each
entry that it needs is read exactly once. An entry that is unknown, missing, of the wrong shape or not finite raises a
UserError that names it.

torch is needed only to read and write its own files (`pip install medfuse_jax[torch]`).
"""

from medfuse_jax.torch_import.convert import export, fill, fill_backbone, is_backbone, load, unused
from medfuse_jax.torch_import.names import known_names, table
from medfuse_jax.torch_import.storage import read, write

__all__ = ["export", "fill", "fill_backbone", "is_backbone", "known_names", "load", "read", "table", "unused", "write"]
