"""Rank 0's front ends, a folder for each, and the generation layer that they share."""
