"""Merge a LoRA adapter into its base on the disk, and prove that the merged model is the trained one."""
