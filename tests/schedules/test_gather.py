"""Rows of a table, whole vectors and what is left of them."""

import numpy as np
import pytest
from kernels import ALL_ISAS, garbage, run_kernel

from pumice.schedules.gather import Gather, gather
from pumice.targets.isa import isa


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize(("length", "dtype"), [(1, "int32"), (16, "int64"), (37, "int64")])
def test_rows_by_number(isa_name, length, dtype):
    table = np.random.default_rng(1).standard_normal((9, length)).astype(np.float32)
    index = np.array([0, 8, 3, 3, -5, 2**31 - 1, 7], dtype)
    work = Gather(9, length, len(index), dtype)
    empty = garbage((index.size * length,), "float32")
    y = run_kernel(gather(work, isa(isa_name)), isa_name, table.ravel(), index, empty)
    np.testing.assert_array_equal(y.reshape(-1, length), table[np.clip(index, 0, 8)])
