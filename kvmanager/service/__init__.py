"""The manager behind sockets, and the client that speaks to it."""
