"""Reading and writing files: untrusted ones checked, ours complete or absent."""
