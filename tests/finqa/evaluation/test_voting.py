from __future__ import annotations

import pytest

from finqa.evaluation.judging import majority


@pytest.mark.parametrize(
    ("answers", "place"),
    [
        ([1.0, 2.0, 2.0], 1),
        ([1.0, 2.0], 0),
        ([2.0, 1.0, 1.0, 2.0], 0),
        ([None, None, 3.0], 2),
        ([None, None], None),
        ([], None),
        ([0.30000000000000004, 5.0, 0.3, 5.0, 0.3], 0),
        ([100.0, 1.0, 1.0], 1),
        ([True, "no", "yes"], 0),
        (["no", True, "yes"], 1),
        ([None, "some text", 4.0], 2),
        ([float("nan"), float("nan"), 4.0], 2),
        ([1, True, 1.0], 0),
        ([7.0], 0),
    ],
)
def test_the_answer_most_samples_gave_wins_and_of_equal_ones_the_first_seen(answers: list, place: int | None):
    assert majority(answers) == place
