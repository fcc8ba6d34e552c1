"""Values that were not read yet, where another number of ranks goes on with them."""

from __future__ import annotations

import torch

from lightkit.windows import EMPTY, merged


def state(values, steps, **named):
    windows = {name: {"values": list(v), "weights": [1] * len(v)} for name, v in named.items()}
    loss = {"values": list(values), "weights": [1] * len(values)}
    return {"windows": windows, "loss": loss, "loss_steps": list(steps), "objects": {}}


def test_one_rank_takes_its_own():
    own = state([1.0], [0])
    assert merged([own], {}) is own


def test_values_of_several_ranks_come_in_the_order_of_batches():
    """So "last" and running means go on exactly where one process takes over from two."""
    first = state([1.0, 3.0, 5.0], [0, 1, 2], x=[torch.tensor(1.0), torch.tensor(3.0)])
    second = state([2.0, 4.0], [0, 1], x=[torch.tensor(2.0)], y=[7.0])
    both = merged([first, second], {})
    assert both["loss"] == {"values": [1.0, 2.0, 3.0, 4.0, 5.0], "weights": [1] * 5}
    assert both["loss_steps"] == [0, 0, 1, 1, 2]
    assert [float(v) for v in both["windows"]["x"]["values"]] == [1.0, 2.0, 3.0]
    assert both["windows"]["y"]["values"] == [7.0]
    assert EMPTY == {"values": [], "weights": []}
