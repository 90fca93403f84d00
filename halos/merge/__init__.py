"""LoRA adapters merged into their bases on the disk, and the proof that what was written is what was trained."""
