"""Rewrites of the hub, one file each, and the table of which format gets which."""
