"""experiments/measure.py on renderings, which are right by construction, and on damaged ones."""
import pytest
import torch

from tiny import metrics, validation
from tiny.metrics import Reading
from tiny.score import Prompts, of_concept
from tiny.world import COLUMN, draw_marks, draw_scenes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_diversity_on_renderings(reader):
    rows = draw_scenes(3, seeded(4), styled=0.5).repeat_interleave(6, 0)
    marks = draw_marks(18, seeded(5))
    same = reader(reader.render(rows, marks[::6].repeat_interleave(6, 0)))
    fair = reader(reader.render(rows, marks))
    assert metrics.diversity(same, 6, reader.render) == 0
    assert metrics.diversity(fair, 6, reader.render) == pytest.approx(0.5, abs=0.06)
    hidden = metrics.hidden_cells(rows, reader.render)
    assert hidden.any((1, 2)).all() and not hidden.all((1, 2)).any()
    assert not hidden[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()          # no object reaches into a corner


@pytest.mark.quick
def test_the_measures_tell_true_renderings_from_damaged_ones(reader):
    found = validation.validate(reader, seed=1, scenes=3, group=3)
    true = found.pop("true renderings")
    assert all(true[name] == 1 for name in true if name.startswith(("concept", "ordinary")))
    assert true["distance"] < 0.005 and true["decided"] > 0.999 and 0.4 < true["diversity"] < 0.6
    assert found["the same marks every time"]["diversity"] == 0
    assert found["wrong colours"]["concept (object)"] == 0.5 and found["wrong colours"]["concept (style)"] == 1
    assert found["half marks"]["decided"] < 0.2 and found["half marks"]["concept (object)"] == 1
    for name in ("blurred over 5 pixels", "shifted by 4 pixels", "half marks", "mixed with another scene"):
        assert found[name]["distance"] > 0.05 and found[name]["decided"] < 0.9
    for name in ("shifted by 4 pixels", "mixed with another scene"):
        assert found[name]["ordinary"] < 0.9 and found[name]["concept, whole (object)"] < 1


def test_scores_of_a_concept_by_hand(reader):
    """Two pictures: one with a wrong colour, one at a wrong place; the second is right as an object."""
    asked = draw_scenes(2, seeded(6), styled=0.0)
    got = asked.clone()
    got[0, COLUMN["main"]] += 1
    got[1, COLUMN["place"]] += 1
    prompts = Prompts(asked, ["", ""], [], "object")
    found = of_concept(Reading(got, torch.zeros(2, 8, 8), torch.tensor([.1, .3]), torch.ones(2)), prompts)
    assert found == pytest.approx({"concept": 7 / 8, "concept, whole": .5, "concept, rest": 5 / 6,
                                   "concept, distance": .2})
