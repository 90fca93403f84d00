"""Engines that continue prompts, behind one contract: a list of requests in, a completion for each out."""
