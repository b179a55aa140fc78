"""launch.py with injected faults, for real launches. ``FAULTS`` holds the faults as JSON, as in warm.py."""

import json
import os

import injection

from mmgraph.cli import leave, train_main

for name, settings in json.loads(os.environ["FAULTS"]):
    if settings.pop("rank", os.environ.get("RANK", "0")) == os.environ.get("RANK", "0"):
        getattr(injection, name)(**settings)
leave(train_main())
