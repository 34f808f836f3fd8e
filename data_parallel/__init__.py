"""The gradients of a stage's replicas become one."""
