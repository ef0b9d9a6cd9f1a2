"""The state machine: a command is decided against the state and becomes events, events are applied. No sockets, clocks, files or threads.

`decide` and `apply` say what becomes of which command and event; what one kind of thing does in both stands in the module of its name.
"""
