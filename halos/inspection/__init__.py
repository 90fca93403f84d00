"""Checks of what a run would train on, estimates of what it would take, and the page of a dry run that shows both."""
