"""What an optional module says when its extra is not installed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str, *modules: str) -> Iterator[None]:
    """Says how to install an extra if one of its modules is missing.

    Every other error passes unchanged: of a module that is there but broken, or of our own.

    >>> with needs_extra("peft", "a_missing_module"):
    ...     import a_missing_module
    Traceback (most recent call last):
    ModuleNotFoundError: mora_jax.peft needs a_missing_module; run pip install 'mora_jax[peft]'

    Args:
      extra: the extra's name in pyproject.toml, and the optional module's in mora_jax.
      *modules: the modules that the extra's packages install.

    Raises:
      ModuleNotFoundError: one of `modules` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        message = f"mora_jax.{extra} needs {error.name}; run pip install 'mora_jax[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
