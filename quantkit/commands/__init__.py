"""What each command does: a file a command, named as it is typed. None of them prints."""
