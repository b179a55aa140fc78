"""``python -m mmgraph VERB``, and so ``accelerate launch -m mmgraph VERB``."""

from mmgraph.cli import leave, main

leave(main())
