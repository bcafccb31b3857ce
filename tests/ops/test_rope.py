"""Rotary positions."""

import pytest
import torch

from cca_ds.ops.rope import rope, rope_eager, rotary_table
from tests.support.ops import TOLERANCE, check_op


def test_the_table_encodes_row_and_column_and_is_zero_for_the_class_token():
    table = rotary_table(grid_size=3, head_dim=8, base=100.0)
    assert table.shape == (10, 4, 2) and table.dtype == torch.float32 and (table[0] == 0).all()
    row, column = 2, 1
    angles = torch.tensor([row * 1.0, row * 100.0**-0.5, column * 1.0, column * 100.0**-0.5])
    torch.testing.assert_close(table[1 + row * 3 + column], torch.stack([angles.cos(), angles.sin()], -1))
    x = torch.randn(1, 10, 1, 8)
    a, b = x[0, 8, 0, 2], x[0, 8, 0, 3]
    for rotate in (rope, rope_eager):
        rotated = rotate(x, table)[0, :, 0]
        torch.testing.assert_close(rotated[8, 2], a * angles[1].cos() - b * angles[1].sin())
        torch.testing.assert_close(rotated[8, 3], b * angles[1].cos() + a * angles[1].sin())
        assert (rotated[0] == 0).all()


@pytest.mark.parametrize("op", [rope, rope_eager])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [4, 20, 64])
def test_rope_and_its_gradient(device, op, dtype, channels):
    torch.manual_seed(0)
    table = rotary_table(3, channels)[:9].to(device)
    angles = torch.view_as_complex(table.double())

    def definition(x):
        rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles[:, None]
        return torch.view_as_real(rotated).flatten(-2)

    x = torch.randn(2, 9, 3, channels, device=device).to(dtype)
    check_op(lambda x: op(x, table), definition, [x], TOLERANCE[dtype])
