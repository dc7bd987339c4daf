"""How tests expect a UserError: by what it is about, not by its prose."""

import contextlib
from collections.abc import Iterator

import pytest

from medfuse_jax.runtime.errors import UserError


@contextlib.contextmanager
def refused(**attributes) -> Iterator[pytest.ExceptionInfo]:
    """Expect a UserError of one line with these attributes, such as field='config.seed'."""
    with pytest.raises(UserError) as caught:
        yield caught
    found = {name: getattr(caught.value, name) for name in attributes}
    assert found == attributes, str(caught.value)
    assert "\n" not in str(caught.value)
