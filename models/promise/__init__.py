"""Whether the limit of the loss holds on data that nobody has seen: re-splits of one data set."""
