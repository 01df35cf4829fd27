"""Drafts from a predicted text: followed from its beginning, left where it is wrong, found again behind that."""

from __future__ import annotations

from pathlib import Path

import pytest

from ocserve.engine import llama
from ocserve.engine.prediction import Prediction
from ocserve.engine.speculation import PromptLookup
from ocserve.generation import Sampling
from tests import tiny
from tests.engine.schedules import NO_END, Engine, FixedCosts, load


def test_the_answer_is_followed_left_and_found_again() -> None:
    predicted = list(range(100, 130))
    drafter = Prediction(predicted, PromptLookup([1, 2, 3]))
    assert drafter.draft(4) == [100, 101, 102, 103]
    drafter.extend([100, 101])
    assert drafter.draft(4) == [102, 103, 104, 105]
    drafter.extend([7, 8])  # instead of 102 … 109
    assert not drafter.ready()
    assert drafter.draft(4) == []
    drafter.extend([110, 111])
    assert not drafter.ready()
    drafter.extend([112])
    assert drafter.draft(3) == [113, 114, 115]
    drafter.extend([*range(113, 127)])
    assert drafter.draft(5) == [127, 128, 129, 129, 129]
    drafter.extend([127, 128, 129])
    assert not drafter.ready()
    drafter.close()
    assert not drafter.ready()


def test_of_equal_places_the_next_one_counts() -> None:
    line = [5, 6, 7]
    predicted = [1, *line, 2, *line, 3, *line, 4]
    drafter = Prediction(predicted, PromptLookup())
    drafter.extend([1, *line, 2, 9, *line])  # a token was put in before the second line
    assert drafter.draft(1) == [3]


def test_elsewhere_the_other_drafter_guesses() -> None:
    prompt = [50, 51, 52, 53, 54]
    drafter = Prediction([1, 2, 3, 4], PromptLookup(prompt))
    drafter.extend([50, 51])
    assert drafter.draft(2) == [52, 53]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    return load(tiny.write(tmp_path_factory.mktemp("model") / "m.gguf"))


def test_a_prediction_saves_steps_and_changes_nothing(model: llama.Model) -> None:
    """The answer alone, then with a prediction of it that is wrong in one place."""
    prompt = [3 + (10 + 7 * index) % 250 for index in range(40)]
    varied = Sampling(temperature=0.8, seed=3, logit_bias=NO_END)
    generated, steps = [], []
    for predicts in (False, True):
        engine = Engine(Path(), model=model, costs=FixedCosts(step_s=0.01, row_s=0.00001))
        predicted = [*generated[0][:60], 9, 9, 9, *generated[0][70:]] if predicts else ()
        sequence = engine.submit("one", prompt, 150, sampling=varied, speculates=True, predicted=predicted)
        engine.run()
        generated.append(sequence.generated)
        steps.append(engine.loop.stats().steps)
    assert generated[0] == generated[1]
    assert steps[1] < 0.4 * steps[0]
    assert sequence.usage.accepted_draft_tokens > 100
    assert sequence.usage.rejected_draft_tokens > 0
