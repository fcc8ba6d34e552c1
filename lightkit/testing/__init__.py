"""For tests of your own: proofs that a task trains, validates, resumes and spreads as it should.

::

    from lightkit.testing import assert_trains

    def test_my_task_trains():
        assert_trains(MyTask(), train_loader)
"""

from __future__ import annotations

from lightkit.testing.purity import assert_validation_is_pure
from lightkit.testing.ranks import assert_same_on_ranks
from lightkit.testing.resuming import assert_resumes_exactly
from lightkit.testing.training import assert_trains

__all__ = [
    "assert_resumes_exactly",
    "assert_same_on_ranks",
    "assert_trains",
    "assert_validation_is_pure",
]
