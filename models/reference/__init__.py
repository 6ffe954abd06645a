"""Networks, data sets, training and export: what the shipped models are made with."""
