"""Train with ``accelerate launch [--config_file accelerate_configs/X.yaml] launch.py [--flags]`` (see ``--help``)."""

from mmgraph.cli import leave, train_main

if __name__ == "__main__":
    leave(train_main())
