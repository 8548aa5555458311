"""A teacher that has spoken before: its outputs are written once, and read by every student."""
