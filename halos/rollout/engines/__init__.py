"""Sampling engines behind one interface: a list of requests in, one sample for each out."""
