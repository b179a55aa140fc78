"""Writes a report: one self-contained HTML page about one or several runs.

``mmgraph report`` writes a report about any runs. A training run can also write its own report when it ends.
"""
