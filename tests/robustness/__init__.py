"""What goes wrong: bad input, hostile files, faults, signals, and where results may not go."""
