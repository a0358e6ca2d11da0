"""What an evaluation found, as a page to look at."""
