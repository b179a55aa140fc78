"""Builds the parts of a report that are sent to trackers: images of the map and of the gallery, and tables."""

from typing import Any, NamedTuple

from PIL.Image import Image

from mmgraph.report.page import Shown, relations_of
from mmgraph.report.pictures import scattered, sheet

MAP_PIXELS, GALLERY_PIXELS = 1200, 100  # side of the map, and side of a node's image in the gallery


class Figures(NamedTuple):
    """Images and tables of a report. The keys are the names that they get in a tracker."""

    pictures: dict[str, Image]
    tables: dict[str, tuple[list[str], list[list[Any]]]]  # columns, rows


def figures(shown: Shown) -> Figures:
    """Build the images and tables of one run."""
    result = Figures({}, {})
    if shown.nodes is not None:
        positions = [(float(x), float(y)) for x, y in shown.nodes.positions]
        result.pictures["report/map"] = scattered([node.picture for node in shown.nodes.map], positions, MAP_PIXELS)
        rows = [[entry.node, *(near.node for near in entry.nearest)] for entry in shown.nodes.gallery]
        result.pictures["report/gallery"] = sheet([[node.picture for node in row] for row in rows], GALLERY_PIXELS)
        named = [[first.name, ", ".join(node.name for node in others)] for first, *others in rows]
        result.tables["report/nearest"] = ["node", "nearest nodes, nearest first"], named
    relations = relations_of(shown.run.table)
    if relations is not None:
        names, of_relations = relations
        columns = ["relation", "edges", *(f"{name} MRR" for name in names)]
        result.tables["report/relations"] = columns, [[name, edges, *values] for name, edges, values in of_relations]
    return result
