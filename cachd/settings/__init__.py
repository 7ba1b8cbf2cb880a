"""Where options come from: their types, the file, and who gave each."""
