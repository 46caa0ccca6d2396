"""Files of text: what they are, their documents and lines, and where Chinese is in them."""
