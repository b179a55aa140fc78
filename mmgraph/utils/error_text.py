"""Turns errors into text for messages: on one line, and with a remedy where the cause is known."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmgraph.errors import RunError

PACKAGE_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # modules with another name on PyPI


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line."""
    return " ".join(str(error).split())


def describe_error(error: BaseException) -> str:
    """Return the type and the text of an error, or how to install the package whose import failed."""
    missing = describe_missing_package(error)
    return missing if missing is not None else f"{type(error).__name__}: {one_line(error)}"


def describe_missing_package(error: BaseException) -> str | None:
    """Return which package is missing and how to install it; None for other errors.

    A missing module of mmgraph is a bug, not a missing package.
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module in ("", "mmgraph"):
        return None
    package = PACKAGE_NAMES.get(module, module)
    return f"the package {package} is not installed; run pip install {package}"


def describe_out_of_memory(error: BaseException) -> str | None:
    """Return what a failed allocation of memory reports, on one line; None for other errors.

    PyTorch raises ``torch.OutOfMemoryError`` for a GPU, and a plain ``RuntimeError`` for the CPU. What follows the
    third sentence of its text, such as advice on the allocator, is left out.
    """
    text = one_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # not isinstance: this module does not import torch
        return ". ".join(text.split(". ")[:3]).rstrip(".")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text):
        return f"out of memory on the CPU ({text or type(error).__name__})"
    return None


@contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Add a remedy to the error of an allocation of memory that fails in the block.

    Args:
        remedy: what the user can do.

    Raises:
        RunError: an allocation failed in the block. Other errors are raised unchanged.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        description = describe_out_of_memory(error)
        if description is None:
            raise
        raise RunError(f"{description}; {remedy}") from None
