"""The loop, and how each kind of data becomes a loss: sft, paired, unpaired, reward."""
