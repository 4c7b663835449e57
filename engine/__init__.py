"""The engine: scheduling on rank 0, execution of the same plans on every rank."""
