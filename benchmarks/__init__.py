"""What the library costs, measured: the time of a step, and what travels between devices."""
