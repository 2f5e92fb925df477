"""Where kernels run: on the GPU where there is one, otherwise in Triton's interpreter, on the CPU."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("attnspan", deadline=None)  # machines are shared
hypothesis.settings.load_profile("attnspan")

GPU = torch.cuda.is_available()
KERNEL_TESTS = ("test_kernels_", "test_torch_ops")
"""Modules whose tensors are on the GPU where there is one."""

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU, kernel tests are marked `gpu`, too; without one, tests that are marked so are skipped."""
    for item in items:
        if GPU and item.path.name.startswith(KERNEL_TESTS):
            item.add_marker("gpu")
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
