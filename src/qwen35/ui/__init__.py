"""A page in the browser for the public API: it starts commands, and shows what they say."""
