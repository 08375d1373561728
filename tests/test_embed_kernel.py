# SPDX-License-Identifier: Apache-2.0
"""embed: rows of the table, and a token that is not in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels import PREFILL, SETS, Batch, Kernels
from numpy.typing import DTypeLike

from edgecascade.backends._lib import Weight
from edgecascade.errors import InvalidRequest

TYPES: list[tuple[DTypeLike, int]] = [(np.float32, 0), (np.float16, 1)]


def embed(kernels: Kernels, table: Any, kind: int, tokens: list[int]) -> Any:
    ids = np.array(tokens, np.int32)
    x = np.full((len(ids), table.shape[1]), np.nan, np.float32)
    weight = Weight(kernels.place(table), 0, *table.shape, kind, 1)
    kernels.run("embed", PREFILL, Batch([len(ids)], [0], [0]), tokens=ids, table=weight, x=x)
    return x


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("dtype", "kind"), TYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_rows_are_the_tables(isa: str, dtype: DTypeLike, kind: int, columns: int) -> None:
    table = np.random.default_rng(0).standard_normal((11, columns)).astype(dtype)
    tokens = [0, 10, 3, 3]
    got = embed(Kernels(isa), table, kind, tokens)
    assert np.array_equal(got, table[tokens].astype(np.float32))


@pytest.mark.parametrize("token", [-1, 11, 2**31 - 1])
def test_a_token_outside_the_table_is_refused(token: int) -> None:
    with pytest.raises(
        InvalidRequest, match=rf"tokens\[1\] is {token}, the table has rows 0 to 10"
    ):
        embed(Kernels(), np.zeros((11, 4), np.float32), 0, [3, token])
