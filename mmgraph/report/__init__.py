"""One page of a run, or of several side by side, that opens anywhere: ``mmgraph report``, and at a run's end."""
