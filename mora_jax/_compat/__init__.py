"""What keeps older programs and files working."""
