"""What the manager holds: pages of a pool, the prefix index over them, the sequences that own them. Plain data and its upkeep, no commands."""
