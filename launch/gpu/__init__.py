"""The GPU suite: checks of crashes, exactness, repeatability, speed and memory on one card. `bash launch/gpu.sh --help`."""
