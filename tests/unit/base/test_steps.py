"""Each step of an end is taken, whatever becomes of the others."""

import pytest

from pytest_chvm.base.steps import take_all


def test_each_step_is_taken_in_order_and_what_went_wrong_is_returned_in_words():
    taken = []

    def step(number, failures=None):
        taken.append(number)
        return failures

    def fails():
        taken.append("fails")
        raise OSError("it is busy")

    def fails_without_a_word():
        raise TimeoutError

    steps = [lambda: step(1), lambda: step(2, ["a", "b"]), fails, fails_without_a_word, lambda: step(3, ["c"])]
    assert take_all(steps) == ["a", "b", "it is busy", "TimeoutError", "c"]
    assert taken == [1, 2, "fails", 3]
    assert take_all([]) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, pytest.fail.Exception])
@pytest.mark.parametrize("at", range(5))
def test_an_interrupt_goes_on_after_the_last_step(interrupt, at):
    taken = []

    def step(number):
        taken.append(number)
        if number == at:
            raise interrupt

    with pytest.raises(interrupt):
        take_all([lambda number=number: step(number) for number in range(5)])
    assert taken == [0, 1, 2, 3, 4]


def test_many_steps_are_no_deep_recursion():
    assert len(take_all([lambda: ["left"]] * 5000)) == 5000
