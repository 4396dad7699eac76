"""Every pass that a test in this folder runs is checked: well formed, and no pruned weight came back."""

from collections.abc import Iterator

import pytest
import tvm

from pumice.passes.check_zeros import NoPrunedWeightCameBack


@pytest.fixture(autouse=True)
def checked_passes() -> Iterator[None]:
    with tvm.transform.PassContext(instruments=[NoPrunedWeightCameBack()]):
        yield
