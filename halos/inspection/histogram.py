"""A histogram of lengths as inline SVG, with train.max_length marked."""

from halos.inspection.facts import Lengths
from halos.inspection.html import Html, joined, tag

WIDTH, HEIGHT, FOOT = 360, 120, 22  # units of the picture; FOOT below the bars


def drawn(lengths: Lengths, max_length: int | None) -> Html:
    """Draw one. The axis ends at the longest sequence, or at `max_length` where that is near."""
    most, top = int(lengths.edges[-1]), int(lengths.counts.max())
    marked = max_length if max_length is not None and max_length <= 1.25 * most else None
    end = max(most, marked or 0)
    scale = WIDTH / end
    bins = zip(lengths.edges[:-1].tolist(), lengths.edges[1:].tolist(), lengths.counts.tolist(), strict=True)
    bars = [_bar(start, stop, count, scale, top) for start, stop, count in bins if count]
    foot = HEIGHT + 15
    axis = [tag("line", x1=0, x2=WIDTH, y1=HEIGHT, y2=HEIGHT, class_="axis"), tag("text", "0", x=0, y=foot),
            tag("text", f"{end} tokens", x=WIDTH, y=foot, text_anchor="end")]  # fmt: skip
    title, text = f"{lengths.part} ({lengths.split})", _summary(lengths)
    if max_length is not None:
        text += f", max_length {max_length}{'' if marked else ' (beyond the axis)'}"
    picture = tag("svg", joined(bars), _mark(marked, scale) if marked else "", *axis, role="img", aria_label=f"{title}: {text}",
                  viewBox=f"-2 -4 {WIDTH + 4} {HEIGHT + FOOT + 4}")  # fmt: skip
    return tag("figure", tag("figcaption", tag("strong", title), f": {text}"), picture)


def _summary(lengths: Lengths) -> str:
    most = f"99% up to {lengths.at_percentile_99:.0f}, longest {lengths.most}"
    return f"mean {lengths.mean:.0f}, median {lengths.median:.0f}, {most}"


def _mark(limit: int, scale: float) -> Html:
    at = round(limit * scale, 1)
    return tag("g", tag("title", f"train.max_length={limit}"), tag("line", x1=at, x2=at, y1=0, y2=HEIGHT, class_="limit"))


def _bar(start: int, stop: int, count: int, scale: float, top: int) -> Html:
    height = max(1.0, HEIGHT * count / top)
    lasts = stop - 1
    label = f"{start}{f' to {lasts}' if lasts > start else ''} tokens: {count}"
    return tag("rect", tag("title", label), x=round(start * scale, 1), y=round(HEIGHT - height, 1),
               width=round(max(0.8, (stop - start) * scale - 1), 1), height=round(height, 1))  # fmt: skip
