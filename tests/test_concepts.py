"""tiny/concepts.py: held-out concepts and their data folders."""
import pytest
import torch

import data
from plumbing import pictures
from plumbing.files import InputError
from tiny import concepts
from tiny.world import COLUMN, HELD_OUT_STYLES, held_out_object

pytestmark = pytest.mark.quick


def test_concepts_are_held_out_and_shared_by_nothing(tmp_path, reader):
    test, tuning = concepts.draw_concepts(6, 2, 2, 2605)
    assert [kind for kind, _ in test] == ["object"] * 6 + ["style"] * 2
    assert [kind for kind, _ in tuning] == ["object"] * 2 + ["style"]
    names = [concepts.described(kind, row) for kind, row in test + tuning]
    assert len(set(names)) == 11 and "striped orange and blue star" not in names and names[-1] == "chalk checked style"
    assert held_out_object(torch.stack([row for kind, row in test + tuning if kind == "object"])).all()
    assert {tuple(name.split()[:2]) for name in names[6:8]} == HELD_OUT_STYLES - {("chalk", "checked")}
    again, _ = concepts.draw_concepts(6, 2, 2, 2605)
    fewer, others = concepts.draw_concepts(1, 1, 2, 2605)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(test, again))
    assert torch.equal(fewer[0][1], test[0][1]) and torch.equal(others[0][1], tuning[0][1])
    with pytest.raises(InputError, match="world holds out 2"):
        concepts.draw_concepts(6, 3, 2, 2605)
    with pytest.raises(InputError, match="202 objects as concepts: the world holds out 107"):      # and the star
        concepts.draw_concepts(200, 2, 2, 2605)


@pytest.mark.parametrize("number, kind", [(0, "object"), (7, "style")])
def test_data_folders(tmp_path, reader, number, kind):
    test, _ = concepts.draw_concepts(6, 2, 2, 2605)
    made = concepts.write(*test[number], tmp_path / "a", 2605, reader.render)
    again = concepts.write(*test[number], tmp_path / "b", 2605, reader.render)
    other = concepts.write(*test[number], tmp_path / "c", 7, reader.render)
    assert made.key == again.key != other.key and made.name == made.folder.name
    rows = data.read_folder(made.folder)
    seen = reader(torch.cat([pictures.to_tensor(pictures.open_image(row.image)) for row in rows])).rows
    assert len(seen) == 4 and all("[V]" in row.captions[0] for row in rows)
    for name in ("place", "backdrop", *(["shape"] if kind == "style" else [])):
        assert len(set(seen[:, COLUMN[name]].tolist())) == 4
    assert len(set(seen[:, COLUMN["size"]].tolist())) == 2
    assert all(concepts.described(kind, row) == made.words for row in seen)
    if kind == "style":
        assert not held_out_object(seen).any()                          # four ordinary objects
    read = concepts.read(made.folder, reader)
    assert (read.kind, read.words, read.key) == (kind, made.words, made.key)
