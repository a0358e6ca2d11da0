"""The commands of the toolkit before this one, each a thin front to the function of a verb."""
