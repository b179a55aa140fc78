"""Entry point of ``python -m mmgraph VERB`` and ``accelerate launch -m mmgraph VERB``."""

from mmgraph.cli import leave, main

leave(main())
