"""Checks that the columns of a node table give the texts that its user expects."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import is_text
from mmgraph.errors import UserError
from mmgraph.utils.log import log

SAMPLE = 10_000  # maximum number of nodes whose texts are checked
LONG = 20  # characters; a summary of more characters is a text, also without spaces between its words
WARN_SHARE = 0.01  # fraction of the checked nodes from which on the warning is logged


def check_texts(nodes: NodeTable, rules: InputRules, path: str | Path) -> None:
    """Check the text columns, and warn of summaries that the default rule leaves out although they are long.

    The default rule is that of the original trainer: ``summary`` if it has more than three words. Languages that put no
    spaces between words, such as Japanese and Thai, have few words by this count.

    Args:
        nodes: the node table.
        rules: the rules of the run.
        path: path of the node table, for messages.

    Raises:
        UserError: a column of ``--text_columns`` does not exist, or has values that are no text.
    """
    for name in rules.columns:
        _check_column(nodes.schema, name, path)
    if rules.text_columns is not None:
        return
    rows = np.sort(np.random.default_rng(0).permutation(len(nodes))[:SAMPLE])
    unused, example = 0, ""
    with nodes.column("summary") as summaries:
        for row in rows.tolist():
            summary = summaries[row].as_py() or ""
            if len(summary) > LONG and len(summary.split()) <= 3:
                unused, example = unused + 1, example or summary
    if unused >= WARN_SHARE * len(rows):
        log(
            f"warning: {path}: the summary of {unused:,} of {len(rows):,} checked nodes is not used, although it has "
            f"more than {LONG} characters, such as '{example[:LONG]}...': it has at most three words between spaces. "
            "Their short_name is used; set --text_columns short_name,summary to use both"
        )


def _check_column(schema: pa.Schema, name: str, path: str | Path) -> None:
    if name not in schema.names:
        raise UserError(f"--text_columns: {path} has no column '{name}', only {', '.join(schema.names)}")
    data_type = schema.field(name).type
    data_type = data_type.value_type if pa.types.is_dictionary(data_type) else data_type
    types = pa.types
    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null, is_text)
    if not any(is_kind(data_type) for is_kind in kinds):
        raise UserError(
            f"--text_columns: column '{name}' of {path} has type {data_type}; give columns of text or numbers"
        )
