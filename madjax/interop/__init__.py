"""Other people's files: readers that run nothing of what they read."""
