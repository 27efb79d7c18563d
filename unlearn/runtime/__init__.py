"""Device and precision, work side by side, progress, how a program starts and ends, signals."""
