"""What classification adds to a report."""

import pytest
import torch
from report_pages import classified, predictions_of

from peft_modal.report import Chart, Gallery, Row, Table
from peft_modal.tasks.classification_report import ClassificationCollector

NAMES = ("ant", "bee", "cat")


def collect(labels, logits, names=NAMES):
    collector = ClassificationCollector(names, predictions_of(names), seed=0)
    samples = torch.arange(len(labels), dtype=torch.float32)
    collector.add({"points": samples, "label": torch.tensor(labels), "kind": "toy"}, torch.tensor(logits))
    return {section.key: section for section in collector.sections()}


def blocks(section, kind):
    inner = [block for block in section.blocks if not isinstance(block, Row)]
    inner += [block for row in section.blocks if isinstance(row, Row) for block in row.blocks]
    return [block for block in inner if isinstance(block, kind)]


@pytest.fixture
def sections():
    # Right, right, ant taken for bee (surely), ant taken for bee (less surely), bee taken for cat.
    labels = [0, 1, 0, 0, 1]
    logits = [[3.0, 0, 0], [0, 3.0, 0], [0, 9.0, 0], [0, 4.0, 0], [0, 0, 2.0]]
    return collect(labels, logits)


def test_the_matrix_has_true_classes_as_rows(sections):
    (matrix,) = blocks(sections["classes"], Chart)

    assert matrix.data["counts"] == [[1, 2, 0], [0, 1, 1], [0, 0, 0]]
    assert matrix.data["labels"] == list(NAMES)


def test_the_most_confused_pair_comes_first(sections):
    pairs, _ = blocks(sections["classes"], Table)

    assert pairs.rows == (("ant", "bee", 2, 2 / 3), ("bee", "cat", 1, 1 / 2))


def test_the_worst_class_comes_first_and_one_without_samples_last(sections):
    _, classes = blocks(sections["classes"], Table)

    assert classes.rows == (("ant", 3, 1, 1 / 3), ("bee", 2, 1, 1 / 2), ("cat", 0, 0, None))


def test_the_surest_mistake_of_each_pair_is_shown(sections):
    wrong, right = blocks(sections["samples"], Gallery)

    assert [(tile.title, tile.sample["points"].item()) for tile in wrong.tiles] == [("bee", 2.0), ("cat", 4.0)]
    assert {tile.sample["points"].item() for tile in right.tiles} == {0.0, 1.0}
    assert wrong.tiles[0].facts[0].value == "ant"
    assert wrong.tiles[0].prediction["probabilities"]["bee"] == pytest.approx(wrong.tiles[0].facts[1].value)
    assert wrong.tiles[0].sample["kind"] == "toy"


def test_without_mistakes_there_is_nothing_about_mistakes():
    sections = collect([0, 1], [[3.0, 0, 0], [0, 3.0, 0]])

    assert [gallery.title for gallery in blocks(sections["samples"], Gallery)] == ["Right"]
    assert [table.title for table in blocks(sections["classes"], Table)] == ["Accuracy of each class"]


def test_without_a_batch_there_is_nothing():
    assert ClassificationCollector(NAMES, predictions_of(NAMES), seed=0).sections() == ()


def test_the_choice_does_not_depend_on_the_batch_size():
    names = tuple("abcdefghij")
    chosen = [
        [
            [tile.facts[-1].value for tile in gallery.tiles]
            for gallery in blocks(classified(names, batch_size=size).sections()[0], Gallery)
        ]
        for size in (7, 400)
    ]

    assert chosen[0] == chosen[1]
    assert all(len(gallery) == 6 for gallery in chosen[0])


def test_of_many_classes_the_matrix_shows_those_with_most_mistakes():
    names = tuple(f"class {i}" for i in range(70))
    labels = [*range(70), 68, 69]
    guesses = [*range(69), 68, 69, 69]
    sections = collect(labels, torch.nn.functional.one_hot(torch.tensor(guesses), 70).float().tolist(), names)
    (matrix,) = blocks(sections["classes"], Chart)

    assert len(matrix.data["labels"]) == 60
    assert matrix.data["labels"][-2:] == ["class 68", "class 69"]
    assert "60 classes with the most mistakes" in matrix.title
