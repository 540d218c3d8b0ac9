"""Line charts as plain geometry, which the report's template draws as inline SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 280  # of the drawing, in which a letter is 13 high: legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 42
POINTS = 240  # of a line; longer ones are averaged
LABEL = 14  # between the lines of two labels

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line. `colour` numbers its run; `marked`: each point is a measurement worth a mark and a tooltip."""

    name: str
    points: Points
    colour: int = 0
    marked: bool = False


@dataclass(frozen=True)
class Line:
    name: str
    colour: int
    path: str
    marks: list[tuple[float, float, str]]
    dashed: bool


@dataclass(frozen=True)
class Chart:
    """Ticks, levels and labels are positions in the drawing with a text; a label is on the left or on the right."""

    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]] = field(default_factory=list)
    labels: list[tuple[float, str, bool]] = field(default_factory=list)


def _settled(series: Sequence[Series], levels: dict[str, float], most: float) -> list[float]:
    """The values that a chart must have room for."""
    values = [y for each in series for _, y in each.points[len(each.points) // 20 if not each.marked else 0 :]]
    values += levels.values()
    return [y for y in values if y <= most] or values


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    levels: dict[str, float] | None = None,
    show_x: Callable[[float], str] = "{:g}".format,
    log: bool = False,
    from_zero: bool = False,
    most: float = math.inf,
) -> Chart | None:
    """A chart of the series with a horizontal line at each of `levels`; None where there is nothing to draw.

    `log`: a logarithmic scale where values span more than a factor of 20. Lines with more than POINTS
    points are averaged; those not `marked` may run off the top in their first twentieth, which would squash the rest.
    So may values above `most`, unless all are.
    """
    series = [Series(each.name, thinned(each.points), each.colour, each.marked) for each in series if each.points]
    if not series:
        return None
    settled = _settled(series, levels or {}, most)
    log = log and min(settled) > 0 and max(settled) > 20 * min(settled)
    scale = math.log10 if log else float
    right = max(0.0, *(x for each in series for x, _ in each.points)) or 1.0
    low, high = (scale(f(settled)) for f in (min, max))
    low = min(low, 0.0) if from_zero and not log else low
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - (0 if from_zero and not log else margin), high + margin

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / right, 1)

    def down(y: float) -> float:
        y = scale(max(y, 1e-12)) if log else y
        return round(min(max(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), -HEIGHT), 2 * HEIGHT), 1)

    lines = []
    for each in series:
        places = [(across(x), down(y)) for x, y in each.points]
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in places)
        said = [f"{each.name}: {y:.4f} at {show_x(x)} {x_label}" for x, y in each.points]
        marks = [(*place, text) for place, text in zip(places, said, strict=True)] if each.marked else []
        lines.append(Line(each.name, each.colour, path, marks, dashed=not each.marked and len(series) > 1))
    placed = sorted((down(value), f"{name} {value:.2f}") for name, value in (levels or {}).items())
    drawn = [(across(x), down(y)) for each in series for x, y in each.points]

    def crowd(at: float, left: bool) -> int:
        """How many points lie where a label at this height would stand."""
        middle = (LEFT + WIDTH - RIGHT) / 2
        return sum((x < middle) == left and -LABEL / 2 < at - y < 1.5 * LABEL for x, y in drawn)

    labels = [(at, text, crowd(at, True) < crowd(at, False)) for at, text in _joined(placed)]
    if log:
        powers = [10.0**n for n in range(math.ceil(low), math.floor(high) + 1)]
        steps = [power * times for power in powers for times in ((1,) if len(powers) > 2 else (1, 3))]
        y_ticks = [(down(y), f"{y:g}") for y in steps if scale(y) <= high]
    else:
        y_ticks = [(down(y), compact(y)) for y in nice(low, high, 5)]
    x_ticks = [(across(x), show_x(x)) for x in nice(0, right, 5)]
    return Chart(title, x_label, lines, x_ticks, y_ticks, placed, labels)


def _joined(placed: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Labels of levels, from the top; those that would meet share a line."""
    joined: list[tuple[float, str]] = []
    for at, text in placed:
        if joined and at - joined[-1][0] < LABEL:
            joined[-1] = (joined[-1][0], f"{joined[-1][1]}, {text}")
        else:
            joined.append((at, text))
    return joined


def thinned(points: Points) -> Points:
    """At most POINTS + 1 points: means of neighbours, the last point as it is."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points) - 1, size)]
    return [*((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups), points[-1]]


def nice(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def compact(value: float) -> str:
    """A number in few characters: 0.02, 1.5, 300 k, 2.5 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}" if value else "0"
