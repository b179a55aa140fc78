"""The report: one self-contained HTML page for one or several runs, written by ``mmgraph report`` or at a run's end."""
