"""What the command line does: a module for each command, and what several of them share."""
