"""What trackers get of a report: pictures of map and gallery, and the table by relation."""

from typing import Any, NamedTuple

from PIL.Image import Image

from mmgraph.report.page import Shown, relations_of
from mmgraph.report.pictures import scattered, sheet

MAP_PIXELS, GALLERY_PIXELS = 1200, 100  # sides: of the map, of a node's picture


class Figures(NamedTuple):
    """What a report has beyond the metrics."""

    pictures: dict[str, Image]
    tables: dict[str, tuple[list[str], list[list[Any]]]]  # columns, rows


def figures(shown: Shown) -> Figures:
    """The figures of one run."""
    found = Figures({}, {})
    if shown.nodes is not None:
        places = [(float(x), float(y)) for x, y in shown.nodes.places]
        found.pictures["report/map"] = scattered([node.picture for node in shown.nodes.map], places, MAP_PIXELS)
        rows = [[entry.node, *(near.node for near in entry.nearest)] for entry in shown.nodes.gallery]
        found.pictures["report/gallery"] = sheet([[node.picture for node in row] for row in rows], GALLERY_PIXELS)
        named = [[first.name, ", ".join(node.name for node in others)] for first, *others in rows]
        found.tables["report/nearest"] = ["node", "nearest, best first"], named
    relations = relations_of(shown.run.table)
    if relations is not None:
        names, of_relations = relations
        columns = ["relation", "edges", *(f"{name} MRR" for name in names)]
        found.tables["report/relations"] = columns, [[name, edges, *values] for name, edges, values in of_relations]
    return found
