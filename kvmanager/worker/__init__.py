"""What a worker keeps of the manager's state: block tables, lengths, and what it owes an acknowledgement for."""
