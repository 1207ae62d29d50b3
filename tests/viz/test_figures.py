import itertools

from matplotlib.figure import Figure
from matplotlib.text import Text

from performers.viz.figures import label_points


def test_no_name_of_a_point_covers_another():
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    near = {f"mechanism {number}": (1.0 + number / 100, 1.0 - number / 1000) for number in range(7)}
    places = {**near, "far away": (9.0, 9.0)}
    axes.scatter(*zip(*places.values(), strict=True))
    label_points(axes, places)
    figure.draw_without_rendering()
    found = {label.get_text(): label for label in axes.texts}
    assert found.keys() == places.keys()
    boxes = {name: Text.get_window_extent(label) for name, label in found.items()}
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    assert found["far away"].get_position() == (0, 0)
