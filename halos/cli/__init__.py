"""What is typed becomes a run, a sweep, a workflow, or one message. The only room that imports hydra."""
