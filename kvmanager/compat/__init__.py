"""Other projects' interfaces on this project's parts. Nothing here is loaded unless it is asked for."""
