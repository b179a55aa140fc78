"""Train: ``accelerate launch [--config_file accelerate_configs/X.yaml] launch.py [--flags]``; see ``--help``."""

import sys

from mmgraph.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
