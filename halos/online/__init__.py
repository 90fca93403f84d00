"""Online training: rounds of sampling, labelling and training, each stage a command that writes one file; and live loops."""
