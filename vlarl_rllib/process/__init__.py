"""What a process of ours does with its surroundings: signals, output, files, what it imports. Loads nothing heavy."""
