"""INT4: integers of four bits with a scale, and perhaps a zero point, for each group of columns."""
