"""The processes of a launch: Accelerator, collectives, DeepSpeed, signals."""
