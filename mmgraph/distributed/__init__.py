"""The processes of a launch: the Accelerator, collectives, DeepSpeed, signals."""
