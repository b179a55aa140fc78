"""Texts of errors: missing packages and exhausted memory, with a remedy."""

import pytest
import torch

from mmgraph.cli.failures import run
from mmgraph.errors import RunError
from mmgraph.utils.error_text import describe_error, describe_out_of_memory, explain_out_of_memory

# The text of an error in torch 2.11, on a GPU.
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5.38 MiB is "
    "free. Including non-PyTorch memory, this process has 79.08 GiB memory in use. Of the allocated memory 78.00 GiB "
    "is allocated by PyTorch, and 10.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
SHORT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5.38 MiB is free"
)


def raising(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("No module named 'bokeh.io'", name="bokeh.io"), "bokeh"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), "scikit-learn"),
    ],
)
def test_a_missing_package_is_one_line(
    error: ModuleNotFoundError, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: raising(error)) == 2
    assert capsys.readouterr().err == (f"mmgraph: error: the package {text} is not installed; run pip install {text}\n")


def test_a_missing_module_of_mmgraph_is_a_bug() -> None:
    error = ModuleNotFoundError("No module named 'mmgraph.nowhere'", name="mmgraph.nowhere")
    with pytest.raises(ModuleNotFoundError):
        run(lambda: raising(error))
    assert describe_error(error) == "ModuleNotFoundError: No module named 'mmgraph.nowhere'"


def test_exhausted_memory_of_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: raising(torch.OutOfMemoryError(CUDA_TEXT))) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"mmgraph: error: rank 0: {SHORT}; ") and err.count("\n") == 1


def test_exhausted_memory_of_the_cpu_is_described() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    text = describe_out_of_memory(caught.value)
    assert text is not None and text.startswith("out of memory on the CPU") and "\n" not in text
    assert describe_out_of_memory(MemoryError()) == "out of memory on the CPU (MemoryError)"


def test_a_remedy_is_added_to_exhausted_memory_only() -> None:
    with pytest.raises(RunError) as caught, explain_out_of_memory("set --flag 1"):
        raise torch.OutOfMemoryError(CUDA_TEXT)
    assert str(caught.value) == f"{SHORT}; set --flag 1"
    for error in (RuntimeError("another"), ValueError("bad"), KeyError("key")):
        with pytest.raises(type(error)) as other, explain_out_of_memory("set --flag 1"):
            raise error
        assert other.value is error
