"""``python -m mmgraph VERB``, and so ``accelerate launch -m mmgraph VERB``."""

import sys

from mmgraph.cli import main

sys.exit(main())
