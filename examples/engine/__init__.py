"""A small multi-process engine on kvmanager: what a user runs, reads and copies from."""
