"""Rewards under the dotted path that users write, halos.online.rewards.length; the functions are in halos/rollout/rewards.py."""

from halos.rollout.rewards import ends, exact_match, final_answer, last_number, length, maths, overlong, solution_of

__all__ = ["ends", "exact_match", "final_answer", "last_number", "length", "maths", "overlong", "solution_of"]
